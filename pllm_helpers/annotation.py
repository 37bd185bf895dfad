"""Annotation of Qin et al.: the user is asked for a preferred reply, seldom, and only to what stayed in the buffer.

The paper asks about "all the samples in the buffer" and does not say how it simulated the user.
Here a day has a budget of requests, and the reply comes from one of three sources: the person's own
held-out reply (:class:`GoldReplies`), a function (:class:`Rules`), or a person at a widget, who
calls :meth:`Annotator.answer`, :meth:`~Annotator.skip` and :meth:`~Annotator.undo`.

Every answer, skip and undo is one transaction of the buffer, with the day's count in it: whatever
was acknowledged survives a restart and a kill.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import UTC, date, datetime, timedelta
from typing import Any, SupportsIndex

from .corpora.formats import is_safety_label
from .dialogue import DialogueSet
from .runtime import InputError
from .selection.buffer import Annotation, DialogueBuffer, Entry

__all__ = ["ORDERS", "Annotator", "GoldReplies", "Rules", "Source", "is_label"]

ORDERS = ("newest", "oldest", "score", "eoe", "dss", "idd", "random")
_DAY = 86_400
_EPOCH = date(1970, 1, 1)
_STATE = "annotation"  # under this name the buffer keeps what is ours


Source = Callable[[Entry], str | None]
"""Whoever is asked: gives the reply to one buffered entry, or ``None`` to skip it."""


def is_label(dialogue: DialogueSet) -> bool:
    """Whether a safety label of ProsocialDialog stands where the reply should be.

    True if the source says so (``meta["response_is"]``, or the answer is the row's own
    ``safety_label``), if the answer is one of the labels with an underscore, which nobody types,
    or the label "casual" in a row of ProsocialDialog.
    """
    answer = dialogue.answer.strip()
    if not answer:
        return False
    marked = str(dialogue.meta.get("response_is", "")).startswith("safety label")
    label = dialogue.meta.get("safety_label")
    own = isinstance(label, str) and answer.strip("_").casefold() == label.strip("_ ").casefold()
    if marked or own:
        return True
    prosocial = dialogue.source.removeprefix("authored/").startswith("prosocial") or dialogue.user == "prosocial"
    return is_safety_label(answer) and ("_" in answer or prosocial)


class GoldReplies:
    """The simulated user: the reply that the person really gave, which stands in the dialogue set.

    A blank reply is skipped. Raises :class:`~pllm_helpers.runtime.InputError` where a safety label
    stands in its place.
    """

    def __call__(self, entry: Entry) -> str | None:
        if is_label(entry.dialogue):
            raise InputError(
                f"entry {entry.id}",
                f"expected a reply, got the safety label {entry.dialogue.answer.strip()!r}",
                "These rows hold no replies; the authored family 'prosocial' has some.",
            )
        return entry.dialogue.answer if entry.dialogue.answer.strip() else None

    def __repr__(self) -> str:
        return "GoldReplies()"


class Rules:
    """The simulated user as a function from a dialogue set to a reply; ``None`` or blank text skips it."""

    def __init__(self, function: Callable[[DialogueSet], str | None]):
        if not callable(function):
            raise InputError("function", f"expected a function of a dialogue set, got {type(function).__name__}")
        self.function = function

    def __call__(self, entry: Entry) -> str | None:
        reply = self.function(entry.dialogue)
        if reply is not None and not isinstance(reply, str):
            raise InputError("function", f"expected a reply or None from it, got {type(reply).__name__}")
        return reply if reply and reply.strip() else None

    def __repr__(self) -> str:
        return f"Rules({getattr(self.function, '__name__', self.function)!s})"


class Annotator:
    """Asks about buffered dialogue sets, at most ``per_day`` a day.

    Parameters
    ----------
    buffer : answers are kept in it.
    source : who is asked by :meth:`run`; ``None``: a person, through :meth:`answer` and :meth:`skip`.
    per_day : requests per day; ``None``: no bound, as in the paper.
    order : who comes first. ``"newest"`` (default: what the person remembers best) and
        ``"oldest"`` go by position in the stream; ``"eoe"``, ``"dss"``, ``"idd"`` by that score,
        highest first; ``"score"`` by the mean rank over all three; ``"random"`` by ``seed``. Ties go to
        the newest. All orders are the same after a restart.
    clock : gives the present as seconds since 1970-01-01 UTC. By default the present is the time
        of the newest set in the buffer, so that a recorded stream brings its own days; where the
        sets have no times, it is the machine's clock.

    A request is the first answer or skip to a set, on the day on which it is given. Correcting an
    answer later costs nothing, and undoing it gives the request back. Days are UTC days.

    >>> from pllm_helpers.selection import DialogueBuffer
    >>> Annotator(DialogueBuffer(bins=2), GoldReplies(), per_day=3).left()
    3
    """

    def __init__(
        self,
        buffer: DialogueBuffer,
        source: Source | None = None,
        *,
        per_day: SupportsIndex | None = 8,
        order: str = "newest",
        seed: SupportsIndex = 0,
        clock: Callable[[], float | int] | None = None,
    ):
        if source is not None and not callable(source):
            raise InputError("source", f"expected GoldReplies(), Rules(function) or None, got {source!r}")
        if per_day is not None and (isinstance(per_day, bool) or per_day.__index__() < 1):
            raise InputError("per_day", f"expected a whole number of at least 1, or None, got {per_day!r}")
        if order not in ORDERS:
            raise InputError("order", f"expected one of {', '.join(ORDERS)}, got {order!r}")
        self.buffer, self.source, self.order = buffer, source, order
        self.per_day = None if per_day is None else per_day.__index__()
        self.seed, self.clock = seed.__index__(), clock
        self._lock = threading.RLock()  # a widget may answer while a cell runs

    def __repr__(self) -> str:
        source = self.source or "a person"
        return f"Annotator({source}, {self.per_day or 'any number'} a day, {len(self.pending())} to ask)"

    # ------------------------------------------------------------ asking

    def today(self) -> date:
        """The present day; see ``clock``."""
        return _EPOCH + timedelta(days=self._day(None))

    def asked(self, day: date | str | float | int | None = None) -> int:
        """Requests made on a day: a date, ``"2024-05-01"``, or seconds since 1970-01-01; default: today."""
        wanted = self._day(day)
        return sum(d == wanted for d in self._first_days().values())

    def left(self, day: date | str | float | int | None = None) -> int | None:
        """Requests left on a day; ``None`` without a bound."""
        return None if self.per_day is None else max(0, self.per_day - self.asked(day))

    def pending(self) -> list[Entry]:
        """Entries that are still to be asked about, in order, whatever the budget.

        Those without a question are left out: there is nothing to reply to.
        """
        skipped = self.buffer.skipped
        entries = [
            e
            for e in self.buffer.entries
            if e.annotation is None and e.id not in skipped and e.dialogue.question.strip()
        ]
        newest_first = sorted(entries, key=lambda e: -e.position)
        if self.order == "newest":
            return newest_first
        if self.order == "oldest":
            return newest_first[::-1]
        if self.order == "random":
            return sorted(newest_first, key=lambda e: hashlib.sha256(f"{self.seed}|{e.id}".encode()).digest())
        if self.order == "score":
            ranks = dict.fromkeys((e.slot for e in entries), 0)
            for metric in ("eoe", "dss", "idd"):
                values = sorted({e.scores[metric] for e in entries})
                place = {v: i / max(1, len(values) - 1) for i, v in enumerate(values)}
                for e in entries:
                    ranks[e.slot] += place[e.scores[metric]]
            return sorted(newest_first, key=lambda e: -ranks[e.slot])
        return sorted(newest_first, key=lambda e: -e.scores[self.order])

    def ask(self, day: date | str | float | int | None = None) -> Entry | None:
        """The entry to ask about now; ``None`` if none is left or the day's budget is used up."""
        if self.left(day) == 0:
            return None
        return next(iter(self.pending()), None)

    def run(self, day: date | str | float | int | None = None) -> list[Annotation]:
        """Ask the source until the day's budget is used up or nothing is pending; returns what it said.

        Skips count as requests and are returned too. Raises
        :class:`~pllm_helpers.runtime.InputError` without a source.
        """
        if self.source is None:
            raise InputError("source", "expected GoldReplies() or Rules(function), this annotator asks a person")
        today = _EPOCH + timedelta(days=self._day(day))
        done: list[Annotation] = []
        while (entry := self.ask(today)) is not None:
            reply = self.source(entry)
            done.append(self.skip(entry, today) if reply is None else self.answer(entry, reply, today))
        return done

    # ------------------------------------------------------------ answering

    def answer(self, what: Entry | str, text: str, day: date | str | float | int | None = None) -> Annotation:
        """Keep a reply to an entry (or its id). On return it is on disk.

        An entry that was replaced while the person was typing can still be answered; the answer
        stays in the history. Raises :class:`~pllm_helpers.runtime.InputError` on blank text, an
        unknown id, a text for which the bin has no room, and a used up budget.
        """
        with self._lock:
            return self.buffer.annotate(what, text, state=self._counted(what, day))

    def skip(self, what: Entry | str, day: date | str | float | int | None = None) -> Annotation:
        """Leave an entry out; it is not asked about again, unless this is undone."""
        with self._lock:
            return self.buffer.skip(what, state=self._counted(what, day))

    def undo(self) -> Annotation | None:
        """Take back the newest answer or skip and return it, ``None`` if there is none.

        The request is given back to the day on which it was made.
        """
        with self._lock:
            days = self._days(len(self.buffer.history()))
            return self.buffer.undo_last(state={_STATE: _packed(days[:-1])})

    def dialogues(self) -> list[DialogueSet]:
        """Buffered sets with the annotation as their reply, by slot: what there is to train on."""
        out = []
        for e in self.buffer.entries:
            if e.annotation is not None:
                labels = {k: v for k, v in e.dialogue.meta.items() if k not in ("response_is", "safety_label")}
                out.append(replace(e.dialogue, answer=e.annotation, meta=labels))
        return out

    # ------------------------------------------------------------ days

    def _counted(self, what: Entry | str, day: date | str | float | int | None) -> Mapping[str, Any]:
        """The state after one more action. Raises if it is a request and the budget is used up."""
        id = what if isinstance(what, str) else what.id
        today = self._day(day)
        firsts = self._first_days()
        if id not in firsts and self.per_day is not None and sum(d == today for d in firsts.values()) >= self.per_day:
            raise InputError(
                "per_day",
                f"expected at most {self.per_day} requests a day, they are used up on {_EPOCH + timedelta(days=today)}",
                "Go on the next day or raise per_day.",
            )
        return {_STATE: _packed([*self._days(len(self.buffer.history())), today])}

    def _first_days(self) -> dict[str, int | None]:
        """When each set was first asked about."""
        firsts: dict[str, int | None] = {}
        history = self.buffer.history()
        for action, day in zip(history, self._days(len(history)), strict=True):
            firsts.setdefault(action.id, day)
        return firsts

    def _days(self, actions: int) -> list[int | None]:
        """The day of each of so many actions in the buffer's history; ``None`` where others made them."""
        kept = [day for day, count in self.buffer.state(_STATE, []) for _ in range(count)]
        return (kept + [None] * (actions - len(kept)))[:actions]

    def _day(self, day: date | str | float | int | None) -> int:
        """Days since 1970-01-01."""
        if day is None:
            times = [e.dialogue.time for e in self.buffer.entries if e.dialogue.time is not None]
            day = self.clock() if self.clock else max(times) if times else time.time()
        if isinstance(day, (int, float)):
            if not 0 <= day < 253_402_300_800:  # NaN fails too
                raise InputError("day", f"expected seconds since 1970-01-01, got {day}", "Pass a date.")
            return int(day // _DAY)
        if isinstance(day, str):
            try:
                day = date.fromisoformat(day)
            except ValueError:
                raise InputError("day", f"expected a date such as '2024-05-01', got {day!r}") from None
        if isinstance(day, datetime):
            day = (day.astimezone(UTC) if day.tzinfo else day).date()
        return (day - _EPOCH).days


def _packed(days: list[int | None]) -> list[list[Any]]:
    """Runs of equal days: ``[[day, count], …]``."""
    runs: list[list[Any]] = []
    for day in days:
        if runs and runs[-1][0] == day:
            runs[-1][1] += 1
        else:
            runs.append([day, 1])
    return runs
