"""Real people's chats: the PyPI package ``chitchat-dataset`` (BYU Chit-Chat Challenge, 2018, MIT licence).

258,145 utterances by 1,315 people, given as opaque ids, in 7,168 conversations of two.

What a pair is
    A *turn* is a maximal run of utterances by one person, their texts joined by line breaks. A
    *pair* is somebody else's turn (the question) and the person's own next turn (the answer). So
    nobody replies to himself, an opening turn answers nothing, and a conversation in which only
    one person wrote (3,150 of them) has no pair.
Blank text
    Upstream lost some emoji: 33 utterances are blank and are left out of their turns. A turn of
    blanks only is no reply, so a pair needs text in the answer; where the other person's turn is
    blank, the pair stays, with a blank question.
Time
    That of the last utterance of the reply: the moment from which the whole pair is known. Pairs
    of one person are sorted by time, then by conversation and position, since people chat with
    several others at once. The file marks times as UTC; they lag its ``start`` fields by the
    offset of Utah's local time, so only differences should be read off them.
"""

from __future__ import annotations

import difflib
import importlib.metadata
import importlib.util
import json
import os
import tempfile
import warnings
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, SupportsIndex

from ..dialogue import DialogueSet
from ..runtime import InputError, cache_dir

__all__ = ["Stream", "UserActivity", "chitchat_stream", "chitchat_users"]

_LAYOUT = 1  # of the index; raise it when the definition of a pair changes


class UserActivity(NamedTuple):
    """A person and how many message-reply pairs he or she has."""

    user: str
    pairs: int


@dataclass(frozen=True)
class Stream:
    """One person's dialogue sets in time order: what comes in, and the later part kept for evaluation."""

    user: str
    stream: tuple[DialogueSet, ...]
    held_out: tuple[DialogueSet, ...]

    def __repr__(self) -> str:
        ends = (self.stream[0], (self.held_out or self.stream)[-1])
        first, last = (datetime.fromtimestamp(d.time or 0, UTC).date() for d in ends)
        sizes = f"{len(self.stream):,} dialogue sets + {len(self.held_out):,} held out"
        return f"Stream({self.user!r}, {sizes}, {first} to {last})"


def chitchat_users(min_pairs: SupportsIndex = 1) -> list[UserActivity]:
    """People with at least ``min_pairs`` pairs, the most active first, ties by id.

    The position in the list with the default ``min_pairs`` is the rank that
    :func:`chitchat_stream` takes. With ``min_pairs=0`` the people without any pair come too
    (1,315 in all). Raises :class:`InputError` if ``min_pairs`` is negative or the package is missing.
    """
    least = _whole("min_pairs", min_pairs)
    return [UserActivity(user, pairs) for user, pairs in _read("users.json") if pairs >= least]


def chitchat_stream(user: str | SupportsIndex, held_out: float | int = 0.2) -> Stream:
    """The pairs of one person, split by time into a stream and a held-out tail.

    Parameters
    ----------
    user : an id, or a rank: 0 is the most active person.
    held_out : share of the pairs that goes to the tail, in [0, 1). The tail has
        ``round(n * held_out)`` pairs, at least one of a positive share; pairs of the same second
        are not torn apart (they all join the tail), and at least one pair stays in the stream.
        Whoever has a single pair has no tail.

    ``meta`` holds ``conversation`` (id), ``turn`` (position of the reply in it) and ``prompt`` (the
    topic that the two were given; may be blank). Raises :class:`InputError` for an unknown id, a
    rank out of range and a person without pairs.
    """
    if isinstance(held_out, bool) or not 0 <= held_out < 1:
        raise InputError("held_out", f"expected a share of at least 0 and below 1, got {held_out}")
    users = _read("users.json")
    if isinstance(user, str):
        position = next((i for i, (name, _) in enumerate(users) if name == user), None)
        if position is None:
            close = difflib.get_close_matches(user, [name for name, _ in users], n=2, cutoff=0.3) if user else []
            hint = f"Did you mean {' or '.join(map(repr, close))}?" if close else "chitchat_users() lists them."
            raise InputError("user", f"expected the id of one of {len(users):,} people, got {user!r}", hint)
        if users[position][1] == 0:
            raise InputError(
                "user", f"expected somebody with a reply, {user!r} has none", "chitchat_users() lists the others."
            )
    else:
        active = sum(pairs > 0 for _, pairs in users)
        position = _whole("user", user)
        if position >= active:
            raise InputError("user", f"expected a rank from 0 to {active - 1}, got {position}")
    name = users[position][0]
    stored = _read(f"{position}.json")
    dialogues = tuple(
        DialogueSet(
            name,
            question,
            answer,
            float(time),
            "chitchat",
            {"conversation": stored["conversations"][c][0], "turn": turn, "prompt": stored["conversations"][c][1]},
        )
        for time, c, turn, question, answer in stored["pairs"]
    )
    cut = _cut([d.time or 0.0 for d in dialogues], held_out)
    return Stream(name, dialogues[:cut], dialogues[cut:])


def _cut(times: list[float], held_out: float | int) -> int:
    """Where the tail begins: sorted times before it are strictly earlier than those after it."""
    n = len(times)
    if held_out == 0 or n < 2:
        return n
    cut = min(n - max(1, round(n * held_out)), n - 1)
    while cut > 0 and times[cut - 1] == times[cut]:
        cut -= 1
    if cut > 0:
        return cut
    # all pairs up to the cut are of the first second: the stream keeps exactly those
    return next((i for i in range(1, n) if times[i] > times[0]), n)


def _whole(what: str, value: SupportsIndex) -> int:
    if isinstance(value, bool) or value.__index__() < 0:
        raise InputError(what, f"expected a whole number of at least 0, got {value!r}")
    return value.__index__()


# ---------------------------------------------------------------- the index
#
# Reading the package's 40 MB of JSON takes over a second, and far longer than one person's share
# of it is worth. So the pairs are kept in a zip file, one member per person, which checks itself
# (CRC). Its name holds the package's version and the size of its data: another release, another file.


def _package() -> tuple[Path, str]:
    found = importlib.util.find_spec("chitchat_dataset")
    path = Path(found.origin).parent / "dataset.json" if found and found.origin else None
    if path is None or not path.is_file():
        raise InputError(
            "chitchat-dataset", "expected the package to be installed", "Type: pip install chitchat-dataset"
        )
    try:
        version = importlib.metadata.version("chitchat-dataset")
    except importlib.metadata.PackageNotFoundError:
        version = "unknown"
    return path, f"chitchat-{version}-{path.stat().st_size}-{_LAYOUT}.zip"


def _read(member: str) -> Any:
    """One member of the index, which is built where it is missing or damaged."""
    data, name = _package()
    try:
        path = cache_dir() / name
    except OSError:
        return _in_memory(data, name)[member]
    try:
        with zipfile.ZipFile(path) as index:
            return json.loads(index.read(member))
    except (FileNotFoundError, PermissionError):
        pass
    except (OSError, EOFError, zipfile.BadZipFile, zlib.error, KeyError, ValueError, NotImplementedError, RuntimeError):
        warnings.warn(f"{path.name} in the cache is damaged and is built again", stacklevel=3)
    members = _in_memory(data, name)
    try:
        _write(path, members)
    except OSError as error:
        warnings.warn(f"the chitchat index cannot be cached ({error}); it stays in memory", stacklevel=3)
    else:
        _in_memory.cache_clear()
    return members[member]


def _write(path: Path, members: dict[str, Any]) -> None:
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        with os.fdopen(handle, "wb") as stream, zipfile.ZipFile(stream, "w") as index:
            for name, value in members.items():
                text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
                # ZipInfo has a fixed date: the same data make the same index
                index.writestr(zipfile.ZipInfo(name), text, zipfile.ZIP_DEFLATED, compresslevel=3)
        os.chmod(temporary, 0o644)  # a cache may be shared
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


@lru_cache(maxsize=1)
def _in_memory(data: Path, name: str) -> dict[str, Any]:
    """Members of the index ``name``: ``users.json`` and, by rank, ``{rank}.json`` of whoever has pairs."""
    with data.open(encoding="utf-8") as stream:
        return _members(json.load(stream))


def _members(conversations: dict[str, Any]) -> dict[str, Any]:
    pairs: dict[str, list[tuple[float, str, int, str, str]]] = {}
    prompts: dict[str, str] = {}
    for key, conversation in conversations.items():
        prompts[key] = conversation.get("prompt") or ""
        previous = None
        for turn, (sender, time, text) in enumerate(_turns(conversation["messages"])):
            mine = pairs.setdefault(sender, [])
            if previous is not None and text:
                mine.append((time, key, turn, previous, text))
            previous = text
    ranked = sorted(pairs, key=lambda user: (-len(pairs[user]), user))
    members: dict[str, Any] = {"users.json": [[user, len(pairs[user])] for user in ranked]}
    for rank, user in enumerate(ranked):
        mine = sorted(pairs[user])
        if not mine:
            break
        place = {key: i for i, key in enumerate(dict.fromkeys(key for _, key, *_ in mine))}
        members[f"{rank}.json"] = {
            "conversations": [[key, prompts[key]] for key in place],
            "pairs": [[time, place[key], turn, question, answer] for time, key, turn, question, answer in mine],
        }
    return members


def _turns(messages: list[list[dict[str, str]]]) -> Iterator[tuple[str, float, str]]:
    """Sender, time of the last utterance and joined text of each turn."""
    sender, time, texts = "", 0.0, []
    for utterance in (u for message in messages for u in message):
        if utterance["sender"] != sender:
            if sender:
                yield sender, time, "\n".join(texts)
            sender, texts = utterance["sender"], []
        time = datetime.fromisoformat(utterance["timestamp"]).timestamp()
        if said := utterance["text"].strip():
            texts.append(said)
    if sender:
        yield sender, time, "\n".join(texts)
