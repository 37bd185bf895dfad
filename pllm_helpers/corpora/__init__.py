"""Where dialogues come from: real people's chats, public data sets, and dialogues written for this project."""

from .authored import FAMILIES, authored_dialogues, authored_stream
from .chitchat import Stream, UserActivity, chitchat_stream, chitchat_users
from .correlation import temporal_correlation
from .loading import DATASETS, load_dialogues
from .report import DroppedRow, LoadedDialogues, LoadReport, NoDialogues

__all__ = [
    "DATASETS",
    "FAMILIES",
    "DroppedRow",
    "LoadReport",
    "LoadedDialogues",
    "NoDialogues",
    "Stream",
    "UserActivity",
    "authored_dialogues",
    "authored_stream",
    "chitchat_stream",
    "chitchat_users",
    "load_dialogues",
    "temporal_correlation",
]
