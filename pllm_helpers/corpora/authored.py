"""The dialogues written for this project, and an order in which a user might have come up with them."""

from __future__ import annotations

import difflib
import json
import math
import random
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from ..dialogue import DialogueSet
from ..runtime import InputError, data_dir
from .formats import FAMILIES

__all__ = ["FAMILIES", "authored_dialogues", "authored_stream", "family_path", "read_family"]

_FIELDS = ("id", "family", "topic", "question", "answer")
_START = 1_704_096_000.0  # 2024-01-01 08:00 UTC


def family_path(family: str) -> Path:
    """File of one family."""
    return data_dir() / "dialogues" / f"{family}.jsonl"


def _chosen(families: str | Iterable[str] | None) -> tuple[str, ...]:
    if families is None:
        return FAMILIES
    names = (families,) if isinstance(families, str) else tuple(dict.fromkeys(families))
    for name in names:
        if name not in FAMILIES:
            close = difflib.get_close_matches(str(name), FAMILIES, n=2, cutoff=0.5)
            hint = f"Did you mean {' or '.join(map(repr, close))}?" if close else ""
            raise InputError("families", f"expected names among {', '.join(FAMILIES)}, got {name!r}", hint)
    if not names:
        raise InputError("families", f"expected at least one of {', '.join(FAMILIES)}, got none")
    return names


def read_family(path: Path, family: str) -> tuple[DialogueSet, ...]:
    """Read and validate one authored file; unlike ``load_dialogues`` it accepts no flaw.

    Every row must hold the five fields as non-blank text and name the family; ids must be unique
    and the rows of a topic must follow each other, since a topic is one session.
    Raises :class:`InputError` with the line at fault.
    """

    def fault(line: int, expected: str) -> InputError:
        return InputError(f"{path.name}, line {line}", expected, "Restore the file from the project.")

    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            path.name, f"expected a UTF-8 file, got {type(error).__name__}", "Restore the file from the project."
        ) from error
    dialogues: list[DialogueSet] = []
    ids: set[str] = set()
    topics: list[str] = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise fault(number, f"expected a JSON object, got {error.msg}") from error
        if not isinstance(row, dict) or set(row) != set(_FIELDS):
            raise fault(number, f"expected the fields {', '.join(_FIELDS)}")
        for name in _FIELDS:
            if not isinstance(row[name], str) or not row[name].strip():
                raise fault(number, f"expected text in {name}")
        if row["family"] != family:
            raise fault(number, f"expected family {family!r}, got {row['family']!r}")
        if row["id"] in ids:
            raise fault(number, f"expected unique ids, {row['id']!r} comes twice")
        ids.add(row["id"])
        if not topics or topics[-1] != row["topic"]:
            if row["topic"] in topics:
                raise fault(number, f"expected the rows of topic {row['topic']!r} to follow each other")
            topics.append(row["topic"])
        meta = {"id": row["id"], "family": family, "topic": row["topic"], "row": number}
        dialogues.append(
            DialogueSet("authored", row["question"].strip(), row["answer"].strip(), None, f"authored/{family}", meta)
        )
    if not dialogues:
        raise fault(1, "expected dialogues, got an empty file")
    return tuple(dialogues)


def authored_dialogues(families: str | Iterable[str] | None = None) -> tuple[DialogueSet, ...]:
    """The authored dialogue sets of the named families (default: all six), in file order, validated.

    Families mirror the data sets of Qin et al.: instruction (Alpaca), open_qa (Dolly), prosocial
    (ProsocialDialog), empathetic (EmpatheticDialogues), reasoning (OpenOrca), medical (MedDialog).
    ``meta`` holds ``id``, ``family``, ``topic`` and ``row``. Raises :class:`InputError` for an
    unknown family or a damaged file.
    """
    return tuple(d for f in _chosen(families) for d in read_family(family_path(f), f))


def authored_stream(
    seed: int = 0, families: str | Iterable[str] | None = None, *, stay: float | int = 0.75
) -> tuple[DialogueSet, ...]:
    """The authored dialogue sets as one user's temporally correlated stream (Qin et al., section 1).

    Topics are sessions and stay whole. Families drift: after a session the next one is of the same
    family with probability ``stay``, else of another family, drawn uniformly; a family that is used
    up passes on. Within a family the sessions come in random order. Every dialogue set comes once.

    Times are synthetic and increasing: a few minutes between the dialogue sets of a session, hours
    between sessions, from 2024-01-01 on. ``meta["session"]`` numbers the sessions from 0.
    The same seed gives the same stream on every machine.

    Raises :class:`InputError` for an unknown family, a negative seed or ``stay`` outside [0, 1].
    """
    if seed < 0:
        raise InputError("seed", f"expected a whole number of at least 0, got {seed}")
    if not 0 <= stay <= 1:
        raise InputError("stay", f"expected a probability between 0 and 1, got {stay}")
    draw = random.Random(seed).random  # of all generators the one that Python promises to keep
    sessions: dict[str, list[list[DialogueSet]]] = {}
    for family in _chosen(families):
        topics: dict[str, list[DialogueSet]] = {}
        for dialogue in read_family(family_path(family), family):
            topics.setdefault(dialogue.meta["topic"], []).append(dialogue)
        sessions[family] = sorted(topics.values(), key=lambda _: draw())

    stream: list[DialogueSet] = []
    time, session, family = _START, 0, ""
    while sessions:
        others = [f for f in sessions if f != family]
        if family not in sessions or (others and draw() >= stay):
            family = others[int(draw() * len(others))]
        for dialogue in sessions[family].pop():
            stream.append(replace(dialogue, time=float(time), meta={**dialogue.meta, "session": session}))
            time += 30 - round(120 * math.log(1 - draw()))
        time += 3600 - round(5 * 3600 * math.log(1 - draw()))
        session += 1
        if not sessions[family]:
            del sessions[family]
    return tuple(stream)
