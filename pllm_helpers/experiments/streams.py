"""The streams of the study: a real person's chats, a public data set, or the authored dialogues; each with a tail.

Names, as the command line takes them:

``person:R``
    the R-th most active person of chitchat (0 first), in time order.
``alpaca``, ``dolly``, ``prosocial``, ``empathetic_dialogues``, ``openorca``, ``meddialog``
    the six data sets of Qin et al. (section 4.1), shuffled by the seed, from a folder of files.
``medquad``, ``chatdoctor5k``, ``mts_dialog``
    larger medical stand-ins for MedDialog, likewise.
``authored``, ``authored:FAMILY``
    the dialogues that ship with the project: as one user's correlated stream, or one family shuffled.
"""

from __future__ import annotations

import hashlib
import os
import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..corpora import FAMILIES, NoDialogues, authored_dialogues, authored_stream, chitchat_stream, load_dialogues
from ..dialogue import DialogueSet
from ..evaluation import response_words
from ..runtime import InputError

__all__ = [
    "DATA_SETS",
    "StudyStream",
    "authored_study_stream",
    "data_set_stream",
    "open_stream",
    "person_stream",
    "shorten",
]

# name of the stream -> name for load_dialogues, the stems of its file or folder, the authored family
DATA_SETS: dict[str, tuple[str, tuple[str, ...], str]] = {
    "alpaca": ("alpaca", ("alpaca",), "instruction"),
    "dolly": ("dolly", ("dolly",), "open_qa"),
    "prosocial": ("prosocial", ("prosocial", "prosocial_dialog", "prosocial_full_tiny"), "prosocial"),
    "empathetic_dialogues": ("empathetic", ("empathetic_dialogues", "empathetic"), "empathetic"),
    "openorca": ("openorca", ("openorca",), "reasoning"),
    "meddialog": ("meddialog", ("meddialog", "covid_dialogue_en"), "medical"),
    "medquad": ("meddialog", ("medquad",), "medical"),
    "chatdoctor5k": ("meddialog", ("chatdoctor5k",), "medical"),
    "mts_dialog": ("meddialog", ("mts_dialog",), "medical"),
}
_ENDINGS = (".jsonl.gz", ".jsonl", ".json.gz", ".json", ".csv.gz", ".csv", ".parquet", ".txt.gz", ".txt", "")
_FEWEST = 96  # rows; a data set with fewer cannot fill a buffer and be tested
_SHARE = 4  # of a short data set, one row in so many is held out


@dataclass(frozen=True)
class StudyStream:
    """What comes in, in order, and the rows on which the tuned model is judged.

    Attributes
    ----------
    name, seed : which stream, and which part or shuffle of it.
    stream, held_out : dialogue sets; no row is in both.
    note : what stands in for what, which rows were left out; may be blank.
    """

    name: str
    seed: int
    stream: tuple[DialogueSet, ...]
    held_out: tuple[DialogueSet, ...]
    note: str = ""

    def __repr__(self) -> str:
        sizes = f"{len(self.stream):,} dialogue sets + {len(self.held_out):,} held out"
        return f"StudyStream({self.name!r}, seed {self.seed}, {sizes})"

    @property
    def hash(self) -> str:
        """Hash of all rows in order, 16 hex digits: equal data have equal hashes."""
        ids = [d.id for d in self.stream] + ["|"] + [d.id for d in self.held_out]
        return hashlib.sha256("\n".join(ids).encode()).hexdigest()[:16]


def person_stream(rank: int, seed: int = 0, *, length: int = 800, held_out: int = 64) -> StudyStream:
    """The seed-th window of a real person's chats, in time order; windows do not overlap.

    Window s holds ``length`` pairs and the ``held_out`` pairs that follow them, so different seeds
    are different data of the same person, and the model is judged on what the person wrote next.
    Pairs without a word in question or answer are left out beforehand.

    Raises :class:`~pllm_helpers.runtime.InputError` if the person's history has no such window.
    """
    _check_sizes(seed, length, held_out)
    pairs, left_out = _with_words(chitchat_stream(rank, 0).stream)
    size = length + held_out
    if (seed + 1) * size > len(pairs):
        raise InputError(
            "seed",
            f"expected below {len(pairs) // size}: person {rank} has {len(pairs):,} pairs in windows of {size}, "
            f"got {seed}",
            "Take a smaller seed, a shorter stream or a more active person.",
        )
    window = pairs[seed * size : (seed + 1) * size]
    note = f"{left_out} pairs without a word left out of the history" if left_out else ""
    return StudyStream(f"person:{rank}", seed, tuple(window[:length]), tuple(window[length:]), note)


def data_set_stream(
    name: str, source: str | os.PathLike | None, seed: int = 0, *, length: int = 800, held_out: int = 64
) -> StudyStream:
    """Rows of a data set, shuffled by the seed: the first are held out, the next are the stream.

    Parameters
    ----------
    name : one of ``DATA_SETS``.
    source : folder with a file or subfolder per data set (``alpaca.jsonl.gz``, ``dolly/``, …; in
        any layout that :func:`~pllm_helpers.corpora.load_dialogues` reads), or such a file itself,
        or ``"hub"``. ``None``: the authored family that mirrors the data set.

    Rows with an earlier row's question are left out. A set with fewer than ``length + held_out``
    rows gives what it has, at most a quarter of it held out. Seeds of one data set are shuffles
    of the same rows: held-out rows of one seed are stream rows of another (never of the same).

    ProsocialDialog is often passed on as opening lines with safety *labels*. Labels are never
    taken for replies: with fewer than 96 real replies at hand, the authored family serves instead,
    and ``note`` says so.

    Raises :class:`~pllm_helpers.runtime.InputError` for an unknown name, a folder without the data
    set, or too few rows.
    """
    _check_sizes(seed, length, held_out)
    if name not in DATA_SETS:
        raise InputError("data set", f"expected one of {', '.join(DATA_SETS)}, got {name!r}")
    known, stems, family = DATA_SETS[name]
    notes: list[str] = []
    rows: Sequence[DialogueSet] = ()
    if source is not None:
        try:
            loaded = load_dialogues(known, _find(Path(source), stems) if str(source) != "hub" else "hub")
            rows, notes = list(loaded), [n for n in loaded.report.notes if "stands in" in n]
        except NoDialogues:
            if name != "prosocial":
                raise
        except InputError as problem:
            if name != "prosocial" or problem.what != "source":
                raise
    if source is None or (name == "prosocial" and len(rows) < _FEWEST):
        why = "" if source is None else f" ({len(rows)} replies at hand; safety labels are not replies)"
        rows, notes = authored_dialogues(family), [f"the authored family {family} stands in for {name}{why}"]
    return _shuffled(name, rows, seed, length, held_out, notes)


def authored_study_stream(family: str = "", seed: int = 0, *, length: int = 800, held_out: int = 64) -> StudyStream:
    """The authored dialogues: all six families as one user's correlated stream, or one family shuffled.

    For the whole, whole topics (sessions) are held out, drawn by the seed, so that the stream
    keeps its order and no held-out row has a neighbour of its own session in it.
    """
    _check_sizes(seed, length, held_out)
    if family:
        return _shuffled(f"authored:{family}", authored_dialogues(family), seed, length, held_out, [])
    whole = authored_stream(seed)
    topics = sorted({d.meta["topic"] for d in whole})
    random.Random(seed).shuffle(topics)
    tail: list[DialogueSet] = []
    goal = min(held_out, len(whole) // _SHARE)
    for topic in topics:
        if len(tail) >= goal:
            break
        tail += [d for d in whole if d.meta["topic"] == topic]
    kept = {d.meta["topic"] for d in tail}
    stream = [d for d in whole if d.meta["topic"] not in kept]
    return StudyStream("authored", seed, tuple(stream[:length]), tuple(tail[:goal]), "whole topics held out")


def open_stream(
    name: str,
    seed: int = 0,
    *,
    source: str | os.PathLike | None = None,
    length: int = 800,
    held_out: int = 64,
) -> StudyStream:
    """The stream of a name as the command line takes it (see the module's text).

    Raises :class:`~pllm_helpers.runtime.InputError` for a name that no stream has.
    """
    kind, _, rest = name.partition(":")
    if kind == "person" and rest.isdigit():
        return person_stream(int(rest), seed, length=length, held_out=held_out)
    if kind == "authored" and (rest in FAMILIES or name == "authored"):
        return authored_study_stream(rest, seed, length=length, held_out=held_out)
    if name in DATA_SETS:
        return data_set_stream(name, source, seed, length=length, held_out=held_out)
    raise InputError(
        "stream", f"expected person:RANK, authored, authored:FAMILY or one of {', '.join(DATA_SETS)}, got {name!r}"
    )


def shorten(dialogue: DialogueSet, tokenizer: Any, question_tokens: int, answer_tokens: int) -> DialogueSet:
    """The dialogue set with a long question and a long answer cut to so many tokens each.

    The question keeps its beginning. The answer keeps its first whole sentences, so that it still
    ends where an answer may end; where even the first sentence is too long, its first words.
    """
    question = _first_tokens(dialogue.question.strip(), tokenizer, question_tokens)
    answer = dialogue.answer.strip()
    begin = _first_tokens(answer, tokenizer, answer_tokens)
    if begin != answer:
        ends = [m.end() for m in _SENTENCE_END.finditer(begin)]
        if ends and response_words(begin[: ends[-1]]):
            begin = begin[: ends[-1]]
        elif len(words := begin.rsplit(None, 1)) == 2 and response_words(words[0]):
            begin = words[0]  # the last word may be torn
    if (question, begin) == (dialogue.question, dialogue.answer):
        return dialogue
    return replace(dialogue, question=question, answer=begin.strip())


_SENTENCE_END = re.compile(r"[.!?…。！？]+[\"'”’)\]]*(?=\s)|\n")


def _first_tokens(text: str, tokenizer: Any, most: int) -> str:
    coded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    if len(coded["input_ids"]) <= most:
        return text
    return text[: coded["offset_mapping"][most - 1][1]].rstrip()


def _check_sizes(seed: int, length: int, held_out: int) -> None:
    for what, value, least in (("seed", seed, 0), ("length", length, 1), ("held_out", held_out, 2)):
        if isinstance(value, bool) or value < least:
            raise InputError(what, f"expected a whole number of at least {least}, got {value!r}")


def _with_words(rows: Iterable[DialogueSet]) -> tuple[list[DialogueSet], int]:
    rows = list(rows)
    kept = [d for d in rows if response_words(d.question) and response_words(d.answer)]
    return kept, len(rows) - len(kept)


def _find(source: Path, stems: Sequence[str]) -> Path:
    """The file or subfolder of a data set in a folder; a file is taken as it is."""
    if source.is_file():
        return source
    if not source.is_dir():
        raise InputError(
            "source", "expected a folder with the data sets, there is none of that name", "Check --source."
        )
    for stem in stems:
        for ending in _ENDINGS:
            if (path := source / f"{stem}{ending}").exists():
                return path
    raise InputError("source", f"expected {' or '.join(stems)} with an ending such as .jsonl.gz in the folder")


def _shuffled(
    name: str, rows: Sequence[DialogueSet], seed: int, length: int, held_out: int, notes: list[str]
) -> StudyStream:
    rows, left_out = _with_words(rows)
    distinct = list({d.question: d for d in reversed(rows)}.values())[::-1]
    if left_out:
        notes = [*notes, f"{left_out} rows without a word left out"]
    if len(rows) > len(distinct):
        notes = [*notes, f"{len(rows) - len(distinct)} rows with an earlier row's question left out"]
    if len(distinct) < 8:
        raise InputError(name, f"expected at least 8 dialogue sets, got {len(distinct)}")
    random.Random(seed).shuffle(distinct)
    tail = min(held_out, len(distinct) // _SHARE)
    stream = distinct[tail : tail + length]
    if len(stream) < length:
        notes = [*notes, f"all of its {len(distinct)} rows: {len(stream)} streamed, {tail} held out"]
    return StudyStream(name, seed, tuple(stream), tuple(distinct[:tail]), "; ".join(notes))
