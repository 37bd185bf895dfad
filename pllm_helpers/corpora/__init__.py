"""Where dialogues come from: real people's chats, public data sets, and dialogues written for this project."""

from .authored import FAMILIES, authored_dialogues, authored_stream
from .chitchat import Stream, UserActivity, chitchat_stream, chitchat_users
from .correlation import temporal_correlation
from .loading import DATASETS, load_dialogues
from .report import DroppedRow, LoadedDialogues, LoadReport, NoDialogues
from .tasks import TASKS, Task, load_task

__all__ = [
    "DATASETS",
    "FAMILIES",
    "TASKS",
    "DroppedRow",
    "LoadReport",
    "LoadedDialogues",
    "NoDialogues",
    "Stream",
    "Task",
    "UserActivity",
    "authored_dialogues",
    "authored_stream",
    "chitchat_stream",
    "chitchat_users",
    "load_dialogues",
    "load_task",
    "temporal_correlation",
]
