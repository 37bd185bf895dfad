"""``load_dialogues``: the six data sets of Qin et al. and SST-2, from files, from the hub, or mirrored offline."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import SupportsIndex

from ..dialogue import DialogueSet
from ..runtime import InputError
from . import hub
from .authored import family_path
from .formats import CONVERTERS, FAMILIES, FIELDS, MIRRORS, UNIFORM_SOURCES, Options
from .readers import SUFFIXES, Row, read_rows, suffix
from .report import DroppedRow, LoadedDialogues, LoadReport, NoDialogues

__all__ = ["DATASETS", "load_dialogues"]

DATASETS = ("alpaca", "dolly", "prosocial", "empathetic", "openorca", "meddialog", "sst2")
_NAMES = (*DATASETS, "authored", *(f for f in FAMILIES if f not in DATASETS), "uniform")
_SPLITS = {"dev": "validation", "val": "validation", "valid": "validation"}
_MANY_FILES = 1000
_PATIENCE = 1000  # after so many rows without a fit, the rest of a file is not worth reading


def load_dialogues(
    name: str,
    source: str | os.PathLike | None = None,
    *,
    split: str | None = None,
    limit: SupportsIndex | None = None,
    allow_download: bool = False,
    revision: str | None = None,
    keep_unanswered: bool = False,
    context_turns: SupportsIndex = 0,
) -> LoadedDialogues:
    """Dialogue sets of a named data set, with a report on every row that was left out.

    Parameters
    ----------
    name : ``alpaca``, ``dolly``, ``prosocial``, ``empathetic``, ``openorca``, ``meddialog`` (the six
        data sets of Qin et al., section 4.1), ``sst2``; ``authored`` or one of its families;
        ``uniform`` for any file in the uniform format (below), whatever data set its rows name.
    source : where the rows come from.

        * ``None``: the authored family that mirrors the data set, which ships with the project
          (``.source`` and the report's notes say so). There is none for ``sst2``.
        * a path to a file or folder in the data set's *original format*: its own field names in
          JSON, JSON Lines, CSV, TSV or parquet, for MedDialog also the raw text; each also gzipped.
          Files of a folder are read in the order of their names, subfolders included.
        * a path to a file in the uniform format: JSON Lines with ``id``, ``response``, ``source``
          and either ``instruction`` (with ``input``, ``system``) or ``turns`` ({speaker, text}).
        * ``"hub"``: the data set's files on the Hugging Face hub (``./hub`` for a folder of that name).
    split : ``train``, ``validation`` or ``test``: which split of the hub data set (default: train),
        or which files of a folder, by the word in their names (default: all).
    limit : end the reading after this many dialogue sets. Files are read as streams, so that the
        first rows of a giant file are quick.
    allow_download : let this one call use the network. Without it ``"hub"`` uses what earlier
        downloads left on this machine.
    revision : branch, tag or commit of the hub repository.
    keep_unanswered : keep questions without a reply (blank answer) instead of dropping them.
    context_turns : how many turns before the question to put in front of it, each as a line
        ``speaker: text``, in data sets of several turns; 0 takes the last user turn alone.

    The question is the instruction with its input, the question, or the last user turn; system
    prompts and labels go to ``meta``, the line or record number to ``meta["row"]``. ProsocialDialog's
    safety labels are never taken for replies. ``user`` is the data set's name: Qin et al. treat a
    whole data set as one user's stream.

    Raises :class:`InputError` for an unknown name, a missing path, an empty file, another format,
    a download that is not allowed, and (:class:`NoDialogues`) if no row could be kept.
    """
    if name not in _NAMES:
        close = difflib.get_close_matches(name.lower(), _NAMES, n=3, cutoff=0.5)
        hint = f"Did you mean {' or '.join(map(repr, close))}?" if close else ""
        raise InputError("name", f"expected one of {', '.join(_NAMES)}, got {name!r}", hint)
    count = None if limit is None else _whole("limit", limit, 1)
    options = Options(name, keep_unanswered, _whole("context_turns", context_turns, 0))
    wanted = None if split is None else _SPLITS.get(split.lower(), split.lower())
    notes: list[str] = []

    if source is None:
        if wanted is not None:
            raise InputError(
                "split", "expected none for the authored dialogues, which have no splits", "Leave split out."
            )
        family = MIRRORS.get(name, name)
        if family not in (*FAMILIES, "authored"):
            ways = f'Pass a path, or type load_dialogues({name!r}, "hub", allow_download=True).'
            raise InputError(
                "source",
                f'expected a path or "hub", {name} has no authored stand-in',
                ways if name in hub.HUB else "Pass a path.",
            )
        if name in MIRRORS:
            notes.append(f"not {name} itself: the authored family {family!r}, written to mirror it, stands in offline")
        files = [family_path(f) for f in (FAMILIES if family == "authored" else (family,))]
        label = "authored" if family == "authored" else f"authored/{family}"
    elif isinstance(source, str) and source == "hub":
        if name not in hub.HUB:
            raise InputError("source", f"expected a path, {name} is not on the hub")
        files, label = hub.fetch(name, wanted or "train", revision=revision, allow_download=allow_download)
        notes += [f"split: {wanted or 'train'}"] + ([hub.HUB[name].note] if hub.HUB[name].note else [])
    else:
        label = os.fspath(source)
        if not label.strip():
            raise InputError("source", "expected a path, got blank text")
        files = _files(Path(source).expanduser(), label, wanted)
    if revision is not None and not label.startswith("hub:"):
        raise InputError("revision", 'expected none unless source is "hub"', "Leave revision out.")
    return _load(files, label, options, count, notes)


def _whole(what: str, value: SupportsIndex, least: int) -> int:
    if isinstance(value, bool) or value.__index__() < least:
        raise InputError(what, f"expected a whole number of at least {least}, got {value!r}")
    return value.__index__()


def _files(path: Path, label: str, split: str | None) -> list[Path]:
    if path.is_file():
        if split is not None:
            raise InputError(
                "split", f"expected none with a single file ({label})", "Leave split out, or pass the folder."
            )
        return [path]
    if not path.is_dir():
        near = (
            difflib.get_close_matches(path.name, [p.name for p in path.parent.iterdir()])
            if path.parent.is_dir()
            else []
        )
        hint = f"Is it {near[0]!r}?" if near else "Check the path; relative ones start at the working directory."
        raise InputError("source", f"expected a file or folder, there is none at {label}", hint)
    found: list[Path] = []
    for p in path.rglob("*"):
        hidden = any(part.startswith(".") for part in p.relative_to(path).parts)
        if not hidden and suffix(p) in SUFFIXES and p.is_file():
            found.append(p)
        if len(found) > _MANY_FILES:
            raise InputError("source", f"expected a data set's folder, {label} holds over {_MANY_FILES} files")
    if not found:
        raise InputError("source", f"expected {', '.join(SUFFIXES)} files in {label}, found none")
    found.sort(key=lambda p: p.relative_to(path).as_posix())
    if split is None:
        return found
    chosen = [p for p in found if split in _split_words(p.relative_to(path))]
    if not chosen:
        names = ", ".join(p.relative_to(path).as_posix() for p in found[:6])
        raise InputError("split", f"expected a file of {label} with {split!r} in its name, found {names}")
    return chosen


def _split_words(path: Path) -> set[str]:
    words = "".join(c if c.isalnum() else " " for c in path.as_posix().lower()).split()
    return {_SPLITS.get(word, word) for word in words}


def _load(files: Sequence[Path], label: str, options: Options, limit: int | None, notes: list[str]) -> LoadedDialogues:
    kept: list[DialogueSet] = []
    dropped: list[DroppedRow] = []
    used: list[str] = []
    unreadable: list[InputError] = []
    read, complete = 0, True
    root = Path(os.path.commonpath(files)) if len(files) > 1 else files[0].parent

    for path in files:
        if limit is not None and len(kept) >= limit:
            complete = False
            break
        reading = _Reading(path, path.relative_to(root).as_posix(), options)
        try:
            made = reading.dialogues()
            before = len(kept)
            kept += made if limit is None else islice(made, limit - len(kept))
            if limit is not None and len(kept) == limit:
                complete = next(made, None) is None
        except InputError as error:  # in no known format; the other files of the folder may be
            unreadable.append(error)
            continue
        if len(kept) == before and 0 < reading.read == reading.misfits:
            unreadable.append(reading.misfit())
            continue
        read += reading.read
        dropped += reading.dropped
        used.append(reading.shown)

    if unreadable and not read:
        raise unreadable[0]
    if not read:
        raise InputError(label, "expected dialogues, got no rows at all")
    notes = notes + [f"file left out: {error}" for error in unreadable[:3]]
    if len(unreadable) > 3:
        notes.append(f"{len(unreadable) - 3} more files left out")
    stand_ins = {d.source for d in kept} & set(UNIFORM_SOURCES.get(options.name, ())[1:])
    notes += [f"not {options.name} itself: {source} stands in for it" for source in sorted(stand_ins)]
    report = LoadReport(options.name, label, tuple(used), read, len(kept), tuple(dropped), tuple(notes), complete)
    if not kept:
        remedy = "" if options.keep_unanswered else "Pass keep_unanswered=True to keep questions without a reply."
        raise NoDialogues(report, remedy)
    return LoadedDialogues(kept, report)


class _Reading:
    """One file on its way through: rows read, rows dropped, and how many of those did not fit at all."""

    def __init__(self, path: Path, shown: str, options: Options):
        self.path, self.shown, self.options = path, shown, options
        self.read, self.misfits = 0, 0
        self.dropped: list[DroppedRow] = []

    def dialogues(self) -> Iterator[DialogueSet]:
        return CONVERTERS[self.options.name](self._rows(), self.options, self._drop)

    def _rows(self) -> Iterator[Row]:
        for row in read_rows(self.path, self.options.name):
            self.read += 1
            yield row

    def _drop(self, row: int, reason: str, wrong: bool) -> None:
        self.dropped.append(DroppedRow(self.shown, row, reason))
        self.misfits += wrong
        if self.misfits == self.read == _PATIENCE:
            raise self.misfit()

    def misfit(self) -> InputError:
        """What to say about a file of which no row fits."""
        reason = self.dropped[0].reason
        if not reason.startswith("expected"):
            reason = f"expected rows with {FIELDS[self.options.name]}, got none ({reason})"
        return InputError(str(self.path), reason, "Check the name of the data set and the file.")
