"""Checks for the exercises of notebook 02."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from numbers import Integral
from typing import Any

import numpy as np
from jaxtyping import Float

from .checks import Mistake, passed, probe

__all__ = ["check_replacement_slot", "check_reservoir_slot", "check_stored_sets"]

CLOSE = 0.015  # three standard errors of the rates below


def check_reservoir_slot(function: Callable[..., Any]) -> None:
    """``function(i, k, rng)``: slot for item number ``i`` (from 0) in a full reservoir of ``k``, or ``None``."""
    i, k = 9, 4
    got = _draws(function, (i, k), 12_000, k)
    rate = np.mean([slot is not None for slot in got])
    wanted = k / (i + 1)
    known = {
        "The first item has i = 0, so the newest is number i + 1: the probability is k / (i + 1).": k / i,
        "That is one too many: with the newcomer, i + 1 items have arrived, not i + 2.": k / (i + 2),
        "Each of the k slots gets the newcomer with probability 1 / (i + 1): together k / (i + 1).": 1 / (i + 1),
        "The probability is k / (i + 1): it falls as the stream goes on, and 1 / k does not.": 1 / k,
        "That is the probability of discarding; k / (i + 1) is that of keeping.": 1 - wanted,
        "A fair coin favours late items: the probability must be k / (i + 1).": 0.5,
        "Every newcomer gets in: then the newest items fill the reservoir.": 1.0,
    }
    if rate == 0:
        raise Mistake(
            f"{_name(function)}({i}, {k}, rng) gives back nothing (None) every time: {wanted:.2g} must get in."
        )
    if abs(rate - wanted) > CLOSE:
        for message, wrong in known.items():
            if abs(rate - wrong) <= CLOSE:
                raise Mistake(f"{message} (Of 12,000 newcomers {rate:.3f} got in, expected {wanted:.3f}.)")
        raise Mistake(
            f"Of 12,000 newcomers with i = {i}, k = {k}, {rate:.3f} got in, expected {wanted:.3f} (k / (i + 1))."
        )
    slots = Counter(slot for slot in got if slot is not None)
    if len(slots) == 1:
        raise Mistake(f"Always slot {next(iter(slots))}: draw the slot, too, else the others keep the first arrivals.")
    missing = [slot for slot in range(k) if not slots[slot]]
    if missing:
        raise Mistake(
            f"Slot {missing[0]} of 0 to {k - 1} is never chosen: rng.integers(k) draws from 0 to k - 1, k excluded."
        )
    shares = [slots[slot] / sum(slots.values()) for slot in range(k)]
    if max(abs(share - 1 / k) for share in shares) > 2 * CLOSE:
        shown = ", ".join(f"{share:.2f}" for share in shares)
        raise Mistake(f"The slots are not equally likely: shares {shown}, expected {1 / k:.2f} each.")
    late = np.mean([slot is not None for slot in _draws(function, (199, 10), 12_000, 10)])
    if abs(late - 10 / 200) > CLOSE:
        raise Mistake(
            f"With i = 199, k = 10, {late:.3f} of the newcomers got in, expected 0.050: does that depend on i?"
        )
    _repeatable(function, (i, k), k)
    passed("reservoir_slot")


def check_replacement_slot(function: Callable[..., Any]) -> None:
    """``function(new, scores, rng)``: the paper's rule; ``new`` has shape ``(3,)``, ``scores`` ``(k, 3)``."""
    new = np.array([0.5, 0.5, 0.5])
    several = np.array([[0.9, 0.1, 0.1], [0.2, 0.2, 0.3], [0.7, 0.6, 0.1], [0.1, 0.3, 0.2], [0.4, 0.2, 0.4], [0.6] * 3])
    tied = np.array([[0.9, 0.9, 0.4], [0.9, 0.1, 0.1], [0.4, 0.4, 0.9], [0.5, 0.1, 0.1], [0.6, 0.7, 0.8]])
    none = np.array([[0.6, 0.7, 0.8], [0.9, 0.9, 0.9]])
    higher = {
        "A set must be beaten in all three scores, not in any of them.": lambda s: (new > s).any(1),
        "A set must be beaten in all three scores; two of three are not enough.": lambda s: (new > s).sum(1) >= 2,
        "Equal is not higher: use > and not >=.": lambda s: (new >= s).all(1),
        "Compare score by score: a high sum must not make up for a low score.": lambda s: new.sum() > s.sum(1),
        "The newcomer must be higher, not lower (that is what the released scripts do).": lambda s: (new < s).all(1),
        "Only the first score is compared.": lambda s: new[0] > s[:, 0],
        "Every set may go, whatever the scores say.": lambda s: np.ones(len(s), dtype=bool),
    }
    for scores in (tied, several, none):
        right = set(np.flatnonzero((new > scores).all(1)).tolist()) or {None}
        got = _draws(function, (new, scores), 400, len(scores))
        found = set(got)
        rows = [_row(row) for row in scores]
        shown = f"(new {_row(new)}, scores {rows}: chose {_options(found)}, expected {_options(right)}.)"
        if found == {None} and right != {None}:
            raise Mistake(f"{_name(function)} gives back nothing (None) although there are candidates. {shown}")
        if not found <= right:
            wrong = {m: set(np.flatnonzero(rule(scores)).tolist()) or {None} for m, rule in higher.items()}
            for message, options in wrong.items():
                if found == options:
                    raise Mistake(f"{message} {shown}")
            if right != {None} and found <= set(range(len(right))):
                raise Mistake(
                    f"Give back the slot, not the place among the candidates: candidates[rng.integers(…)]. {shown}"
                )
            message = next(m for m, options in wrong.items() if found <= options | {None})
            raise Mistake(f"{message} {shown}")
        if len(found) < len(right):
            first, last = min(right), max(right)
            which = "the first" if found == {first} else "the last" if found == {last} else "always the same"
            raise Mistake(f"Several candidates: choose one at random, not {which}. {shown}")
        if right != {None}:
            _even(function, new, scores, sorted(right))
    _repeatable(function, (new, several), len(several))
    passed("replacement_slot")


def check_stored_sets(function: Callable[..., Any]) -> None:
    """``function(texts, dim, budget, bin_bytes)``: how many texts, in order, get a bin; sizes in bytes."""
    sizes = (30, 37, 36, 20, 58, 70, 90)
    texts = ["a" * n for n in sizes] + ["é" * 20]
    room = {"expected": 36, "fp16": 56, "no scores": 60, "no embedding": 76, "no test": 10**6}
    count = {key: sum(len(t.encode()) <= limit for t in texts) for key, limit in room.items()}
    probe(
        function,
        (texts, 10, 2000, 100),
        count["expected"],
        {
            "Count bytes, not characters: “é” takes two bytes in UTF-8.": sum(len(t) <= 36 for t in texts),
            "An entry that fills its bin to the last byte fits: use <= and not <.": sum(
                len(t.encode()) < 36 for t in texts
            ),
            "An fp32 number takes 4 bytes, not 8.": 0,
            "An fp32 number takes 4 bytes, not 2.": count["fp16"],
            "The three scores lie in the bin, too: 8 bytes each.": count["no scores"],
            "The embedding lies in the bin, too: 4 bytes a number.": count["no embedding"],
            "Every text got in: one that takes more than a bin, with embedding and scores, is left out.": count[
                "no test"
            ],
            "The number of bins alone: texts that do not fit and texts that are not there take none.": 20,
        },
        otherwise="Bytes of an entry: UTF-8 text + 4 per number of the embedding + 3 scores of 8.",
    )
    small = ["b"] * 9
    probe(
        function,
        (small, 10, 290, 100),
        2,
        {
            "A part of a bin is no bin: use // and not /.": 2.9,
            "A part of a bin is no bin: round down.": 3,
            "Entries are not packed: each takes a whole bin, however small it is.": 290 // 65,
            "The budget has no effect: at most budget // bin_bytes sets get a bin.": 9,
        },
    )
    probe(
        function,
        (["c" * 50, "d", "e", "f"], 10, 200, 100),
        2,
        {
            "A text that does not fit must not use up a bin: the next one gets it.": 1,
            "One text that does not fit must not end the stream: go on with the next.": 0,
        },
    )
    passed("stored_sets")


# ---------------------------------------------------------------- inside


def _draws(function: Callable[..., Any], arguments: tuple[Any, ...], times: int, slots: int) -> list[int | None]:
    """What ``times`` calls with one generator give, each checked to be a slot or ``None``."""
    rng, out = np.random.default_rng(0), []
    for _ in range(times):
        given = tuple(a.copy() if isinstance(a, np.ndarray) else a for a in arguments)
        try:
            got = function(*given, rng)
        except NotImplementedError as e:
            raise Mistake(f"{_name(function)} is not written yet.") from e
        except Exception as e:
            raise Mistake(f"{_name(function)} stopped with {type(e).__name__}: {e}.") from e
        if not all(np.array_equal(a, b) for a, b in zip(given, arguments, strict=True)):
            raise Mistake(f"{_name(function)} changes its input. Work on a copy, or build new values.")
        if got is not None and (isinstance(got, (bool, np.bool_)) or not isinstance(got, Integral)):
            raise Mistake(f"{_name(function)} must give back a slot (a whole number) or None, it gave {got!r}.")
        if got is not None and not 0 <= got < slots:
            raise Mistake(
                f"{_name(function)} gave slot {got}: the {slots} slots are 0 to {slots - 1}; "
                "give back None where the newcomer is discarded."
            )
        out.append(None if got is None else int(got))
    return out


def _even(function: Callable[..., Any], new: Any, scores: Any, right: list[int]) -> None:
    counts = Counter(_draws(function, (new, scores), 4000, len(scores)))
    shares = [counts[slot] / 4000 for slot in right]
    if max(abs(share - 1 / len(right)) for share in shares) > 3 * CLOSE:
        shown = ", ".join(f"slot {slot}: {share:.2f}" for slot, share in zip(right, shares, strict=True))
        raise Mistake(f"The candidates must be equally likely: {shown}, expected {1 / len(right):.2f} each.")


def _repeatable(function: Callable[..., Any], arguments: tuple[Any, ...], slots: int) -> None:
    if _draws(function, arguments, 200, slots) != _draws(function, arguments, 200, slots):
        raise Mistake(
            "Two runs with the same generator differ: draw from the rng that is given, and from nothing else."
        )


def _name(function: Callable[..., Any]) -> str:
    return getattr(function, "__name__", "your function")


def _row(values: Float[np.ndarray, " m"]) -> str:
    return "[" + " ".join(f"{v:g}" for v in values) + "]"


def _options(found: set[int | None]) -> str:
    return " or ".join(
        "None" if s is None else f"slot {s}" for s in sorted(found, key=lambda s: math.inf if s is None else s)
    )
