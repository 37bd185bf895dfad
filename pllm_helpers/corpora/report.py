"""What a load gave: the dialogue sets, and an account of every row that was left out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import overload

from ..dialogue import DialogueSet
from ..runtime import InputError

__all__ = ["DroppedRow", "LoadReport", "LoadedDialogues", "NoDialogues"]


@dataclass(frozen=True, slots=True)
class DroppedRow:
    """A row that gave no dialogue set.

    ``row`` counts from 1. In line-based files (JSON Lines, CSV, TSV, raw text) it is the line, so
    that an editor finds it; in JSON lists and parquet files it is the number of the record.
    """

    file: str
    row: int
    reason: str


@dataclass(frozen=True)
class LoadReport:
    """The account of one load.

    ``read`` rows were read; ``used`` of them went into the ``kept`` dialogue sets, the others are
    in ``dropped``, so ``read == used + len(dropped)``. ``used`` and ``kept`` differ where several
    rows make one dialogue set (EmpatheticDialogues) or one row makes several (MedDialog).
    ``notes`` says what stands in for what; ``complete`` is False if ``limit`` ended the reading.
    """

    name: str
    source: str
    files: tuple[str, ...]
    read: int
    kept: int
    dropped: tuple[DroppedRow, ...] = ()
    notes: tuple[str, ...] = ()
    complete: bool = True

    @property
    def used(self) -> int:
        """Rows that went into dialogue sets."""
        return self.read - len(self.dropped)

    @property
    def reasons(self) -> dict[str, int]:
        """Number of dropped rows per reason, most frequent first."""
        return dict(Counter(d.reason for d in self.dropped).most_common())

    def __str__(self) -> str:
        lines = [
            f"{self.name} from {self.source}: {self.read:,} rows read, {self.kept:,} dialogue sets kept, "
            f"{len(self.dropped):,} rows dropped" + ("" if self.complete else " (stopped at the limit)")
        ]
        lines += [f"  note: {note}" for note in self.notes]
        many = len({d.file for d in self.dropped}) > 1
        for reason, count in self.reasons.items():
            rows = [f"{d.file}:{d.row}" if many else str(d.row) for d in self.dropped if d.reason == reason]
            lines.append(f"  {count:,} × {reason} (row {', '.join(rows[:5])}{', …' if count > 5 else ''})")
        return "\n".join(lines)


class NoDialogues(InputError):
    """A readable source of which every row was dropped; ``report`` says why."""

    def __init__(self, report: LoadReport, remedy: str):
        self.report = report
        reasons = "; ".join(f"{count:,} × {reason}" for reason, count in list(report.reasons.items())[:3])
        super().__init__(
            report.source,
            f"expected at least one question with a reply, all {report.read:,} rows were dropped: {reasons}",
            remedy,
        )


class LoadedDialogues(Sequence[DialogueSet]):
    """The dialogue sets of one load, in file order, with the ``report`` on how they came about."""

    def __init__(self, dialogues: Sequence[DialogueSet], report: LoadReport):
        self._dialogues = tuple(dialogues)
        self.report = report

    @property
    def name(self) -> str:
        """Name that was asked for."""
        return self.report.name

    @property
    def source(self) -> str:
        """Where the rows came from: a path, ``"authored/…"`` or ``"hub:repository@commit"``."""
        return self.report.source

    def __len__(self) -> int:
        return len(self._dialogues)

    @overload
    def __getitem__(self, index: int) -> DialogueSet: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[DialogueSet, ...]: ...
    def __getitem__(self, index):
        return self._dialogues[index]

    def __repr__(self) -> str:
        dropped = len(self.report.dropped)
        tail = f", {dropped:,} of {self.report.read:,} rows dropped" if dropped else ""
        return f"LoadedDialogues({self.name!r}, {len(self):,} dialogue sets from {self.source}{tail})"
