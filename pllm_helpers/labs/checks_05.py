"""Checks for the exercises of notebook 05: intervals, verdicts, seeds, and the bias of "up to"."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from statistics import NormalDist
from typing import Any

import numpy as np

from .checks import Mistake, passed, probe

__all__ = ["check_chance_of_up_to", "check_hierarchical_mean", "check_paired_interval", "check_verdict"]


def check_paired_interval(function: Callable[..., Any]) -> None:
    """``function(a, b, seed)``: ends of the 95 % bootstrap interval of the mean of a - b, paired; ``(low, high)``."""
    rng = np.random.default_rng(0)
    b = rng.uniform(0.0, 1.0, 60)
    probe(
        function,
        (b + 0.125, b, 0),
        (0.125, 0.125),
        {
            "The sign is turned: the difference is a minus b.": (-0.125, -0.125),
            "That is one number: return both ends, (low, high).": 0.125,
            "That is the relative difference: subtract, do not divide.": tuple([(b.mean() + 0.125) / b.mean() - 1] * 2),
        },
        otherwise="Here a is b plus a constant, so a paired interval has no width. Draw the rows once per resample "
        "and take the same rows of a and of b: they belong to the same dialogues.",
    )
    d = rng.normal(0.3, 1.0, 50)
    a, b = b[:50] + d, b[:50]
    draws = d[np.random.default_rng(1).integers(0, 50, (20_000, 50))].mean(1)
    low, high = np.quantile(draws, [0.025, 0.975])
    got = np.asarray(function(a.copy(), b.copy(), 3), dtype=float)
    if got.shape != (2,):
        raise Mistake(f"Return the two ends, (low, high); this is of shape {got.shape}.")
    if got[0] > got[1]:
        raise Mistake(f"The ends stand in the wrong order: ({got[0]:.3g}, {got[1]:.3g}).")
    _like(
        float(got[1] - got[0]) / float(high - low),
        {
            "Every resample is the same set of rows: draw n rows *with replacement*.": 0.0,
            "That is a 90 % interval: 2.5 % are cut off at each end, not 5 %.": 0.84,
            "That is a 99 % interval: 2.5 % are cut off at each end, not 0.5 %.": 1.31,
            "That is the scatter of single dialogues: take the mean of each resample first.": 50**0.5,
            "That is one standard error to each side: take the 2.5 and 97.5 % quantiles of the draws.": 0.51,
            "Each resample is half as large as the sample: draw n rows of n.": 2**0.5,
        },
        f"The interval is ({got[0]:.3g}, {got[1]:.3g}); expected about ({low:.3g}, {high:.3g}).",
    )
    if abs(got.mean() - (low + high) / 2) > 0.2 * (high - low):
        raise Mistake(f"The interval lies elsewhere: ({got[0]:.3g}, {got[1]:.3g}), expected ({low:.3g}, {high:.3g}).")
    if not np.array_equal(got, np.asarray(function(a.copy(), b.copy(), 3), dtype=float)):
        raise Mistake("The same seed must give the same interval: make the generator from `seed`.")
    passed("paired_interval")


def check_verdict(function: Callable[..., Any]) -> None:
    """``function(low, high, bound, side)``: holds, fails or inconclusive; side ``"above"``: claimed at least bound."""
    probe(function, (0.1, 0.3, 0.0, "above"), "holds", {"All of the interval is on the claimed side.": "inconclusive"})
    probe(
        function,
        (-0.1, 0.3, 0.0, "above"),
        "inconclusive",
        {
            "The middle of the interval does not decide: it has points on both sides.": "holds",
            "“Not shown” is not “false”: only an interval wholly on the other side says fails.": "fails",
        },
    )
    probe(
        function,
        (-0.3, -0.1, 0.0, "above"),
        "fails",
        {"An interval wholly on the other side is evidence against the claim: fails.": "inconclusive"},
    )
    probe(
        function,
        (-0.3, -0.1, 0.0, "below"),
        "holds",
        {"The side has no effect: with “below” the claim is *at most* the bound.": "fails"},
    )
    probe(
        function,
        (0.0, 0.3, 0.0, "above"),
        "holds",
        {"The bound belongs to the claimed side (at least): low equal to bound holds.": "inconclusive"},
    )
    probe(
        function,
        (-0.3, 0.0, 0.0, "above"),
        "inconclusive",
        {"The interval still touches the bound, which belongs to the claimed side: this is not yet fails.": "fails"},
    )
    probe(
        function,
        (0.0, 0.3, 0.0, "below"),
        "inconclusive",
        {"With “below”, low equal to bound still touches the claimed side: not yet fails.": "fails"},
    )
    probe(
        function,
        (0.5, 0.5, 0.5, "above"),
        "holds",
        {"An interval of one point on the bound holds: at least 0.5 is true of 0.5.": "inconclusive"},
        otherwise="An interval of one point on the bound holds.",
    )
    passed("verdict")


def check_hierarchical_mean(function: Callable[..., Any]) -> None:
    """``function(rows, rng)``: one resampled mean; ``rows`` lists an array of differences per seed."""
    alike = [np.full(40, v) for v in (0.0, 0.2, 0.4)]  # all scatter is between seeds
    _scatter(
        function,
        alike,
        float(np.std([0.0, 0.2, 0.4])) / 3**0.5,
        {
            "The seeds never change: draw as many seeds as there are, with replacement, before the dialogues.": 0.0,
            "All dialogues are thrown together: the seeds must be drawn as wholes.": float(np.std([0, 0.2, 0.4]))
            / 120**0.5,
            "One seed is drawn instead of as many as there are.": float(np.std([0.0, 0.2, 0.4])),
        },
    )
    rng = np.random.default_rng(0)
    noisy = [x - x.mean() for x in rng.normal(0, 1, (4, 25))]  # all scatter is between dialogues
    spread = float(np.mean([x.var() for x in noisy]))
    _scatter(
        function,
        noisy,
        (spread / 100) ** 0.5,
        {
            "The dialogues never change: within each drawn seed draw its dialogues with replacement.": 0.0,
            "One dialogue per seed is drawn instead of as many as it has.": (spread / 4) ** 0.5,
        },
    )
    uneven = [np.zeros(90), np.ones(10)]
    values = {round(float(function([x.copy() for x in uneven], np.random.default_rng(s))), 6) for s in range(40)}
    if not values <= {0.0, 0.5, 1.0}:
        raise Mistake("Take the mean within each drawn seed first, then the mean of those: seeds count alike.")
    passed("hierarchical_mean")


def check_chance_of_up_to(function: Callable[..., Any]) -> None:
    """``function(lead, spreads)``: chance that the largest of k leads reaches ``lead`` if none is real."""
    spreads = np.array([0.05, 0.05, 0.1, 0.1])
    normal = NormalDist()
    single = [1 - normal.cdf(0.1 / s) for s in spreads]
    joint = 1 - float(np.prod([1 - p for p in single]))
    probe(
        function,
        (0.1, spreads),
        joint,
        {
            "That is the chance of the best single comparison alone; “up to” searches through all k.": max(single),
            "That is the mean chance of one comparison.": float(np.mean(single)),
            "That is the chance that *all* leads are so large: it takes only one.": float(np.prod(single)),
            "That is the chance that none is so large: take 1 minus it.": 1 - joint,
            "The chances of single comparisons add up only roughly (Bonferroni): several may happen at once.": float(
                np.sum(single)
            ),
            "A lead counts in one direction only: do not take the absolute value.": 1
            - float(np.prod([1 - 2 * p for p in single])),
        },
        otherwise="Draw a normal number with mean 0 and each standard error, take the largest, and count how often "
        "it reaches the lead (or multiply the chances that each stays below).",
        tolerance=0.012,
    )
    probe(
        function,
        (0.3, np.full(18, 0.1)),
        1 - normal.cdf(3.0) ** 18,
        {"The number of comparisons has no effect.": 1 - normal.cdf(3.0)},
        tolerance=0.008,
    )
    passed("chance_of_up_to")


def _like(ratio: float, mistakes: Mapping[str, float], otherwise: str, tolerance: float = 0.08) -> None:
    """Nothing if ``ratio`` is about 1; else the mistake whose ratio is near, or ``otherwise``."""
    if abs(ratio - 1) <= tolerance:
        return
    for message, wrong in mistakes.items():
        if abs(ratio - wrong) <= tolerance * max(wrong, 0.1):
            raise Mistake(f"{message} {otherwise}")
    raise Mistake(otherwise)


def _scatter(
    function: Callable[..., Any], rows: list[np.ndarray], expected: float, mistakes: Mapping[str, float]
) -> None:
    """Compare the standard deviation of many resampled means with what it should be."""
    name = getattr(function, "__name__", "your function")

    def constant(*_: Any) -> Any:
        return function([np.full(5, 0.25)] * 3, np.random.default_rng(0))

    constant.__name__ = name
    probe(constant, (), 0.25, {}, otherwise="If all differences are the same, so is every resampled mean.")
    given = [x.copy() for x in rows]
    rng = np.random.default_rng(1)
    spread = float(np.std([function(given, rng) for _ in range(3000)]))
    if any(not np.array_equal(x, y) for x, y in zip(given, rows, strict=True)):
        raise Mistake("The function changes its input. Work on copies.")
    _like(
        spread / expected,
        {message: wrong / expected for message, wrong in mistakes.items()},
        f"Over many draws the mean scatters by {spread:.3g}; expected about {expected:.3g}.",
    )
