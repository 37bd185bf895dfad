"""Estimates with intervals, and the verdicts that claims get from them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, Literal

import numpy as np
from jaxtyping import Float

from ..runtime import InputError

__all__ = ["Claim", "Estimate", "bootstrap_interval", "check_claim", "paired_difference", "rank_correlation"]

Number = float | int
Kind = Literal["deterministic", "statistical"]
Verdict = Literal["holds", "fails", "inconclusive"]


@dataclass(frozen=True)
class Estimate:
    """A number with its 95 % interval, the number of rows behind it and the seeds used.

    ``low == high == value`` says that no chance is involved.
    """

    value: Number
    low: Number
    high: Number
    n: int = 1
    seeds: tuple[int, ...] = ()
    unit: str = ""

    def __post_init__(self) -> None:
        if any(math.isnan(x) for x in (self.value, self.low, self.high)):
            raise InputError("Estimate", "expected numbers, got NaN", "Look for an empty or constant sample.")
        if not self.low <= self.high:
            raise InputError("Estimate", f"expected low <= high, got {self.low} > {self.high}")

    @classmethod
    def exact(cls, value: Number, *, n: int = 1, unit: str = "") -> Estimate:
        """A number without chance: the interval is the number itself."""
        return cls(float(value), float(value), float(value), n, (), unit)

    def __str__(self) -> str:
        unit = f" {self.unit}" if self.unit else ""
        if self.low == self.high:
            return f"{self.value:.4g}{unit}"
        return f"{self.value:.4g} [{self.low:.4g}, {self.high:.4g}]{unit} (n = {self.n})"


def bootstrap_interval(
    *samples: Sequence[Any] | np.ndarray,
    statistic: Callable[..., Any] = np.mean,
    seed: int = 0,
    resamples: int = 2000,
    level: Number = 0.95,
    unit: str = "",
) -> Estimate:
    """Percentile bootstrap interval of ``statistic(*samples)``.

    Several samples are resampled *together* (row i of each belongs to the same dialogue), which
    is the paired bootstrap. Resamples on which the statistic is undefined (NaN) are an error,
    not skipped: skipping them would narrow the interval.

    Parameters
    ----------
    samples : one or more sequences of shape ``(n,)``.
    statistic : maps the resampled sequences to one number.
    resamples, level, seed : number of resamples, coverage in (0, 1), random seed.

    Raises :class:`InputError` on empty, unequal or NaN input.
    """
    arrays = [np.asarray(s, dtype=float) for s in samples]
    if not arrays or any(a.ndim != 1 for a in arrays):
        raise InputError("samples", "expected one or more one-dimensional sequences")
    n = len(arrays[0])
    if n < 2 or any(len(a) != n for a in arrays):
        raise InputError("samples", f"expected equal lengths of at least 2, got {[len(a) for a in arrays]}")
    if any(not np.isfinite(a).all() for a in arrays):
        raise InputError("samples", "expected finite numbers, got NaN or infinity")
    if not 0 < level < 1:
        raise InputError("level", f"expected a number between 0 and 1, got {level}")
    rng = np.random.default_rng(seed)
    rows = rng.integers(0, n, size=(resamples, n))
    draws = np.array([statistic(*(a[r] for a in arrays)) for r in rows], dtype=float)
    tail = (1 - level) / 2
    low, high = np.quantile(draws, [tail, 1 - tail])
    return Estimate(float(statistic(*arrays)), float(low), float(high), n, (seed,), unit)


def paired_difference(
    a: Sequence[Any] | np.ndarray,
    b: Sequence[Any] | np.ndarray | None = None,
    seed: int = 0,
    *,
    resamples: int = 2000,
    level: Number = 0.95,
    unit: str = "",
) -> Estimate:
    """Mean of ``a - b`` with an interval over seeds *and* dialogues: a hierarchical bootstrap.

    Parameters
    ----------
    a, b : shape ``(seeds, n)``: row s holds the scores of the n held-out dialogues of seed s under
        two methods; ``a[s, i]`` and ``b[s, i]`` belong to the same dialogue. Shape ``(n,)`` is one
        seed. Without ``b``, the mean of ``a`` itself. Rows may differ in length (a list of arrays).

    Each resample draws seeds with replacement, then dialogues with replacement within each drawn
    seed. Left alone, that counts the dialogues' scatter twice (it is also in the seed means), and
    with few seeds it draws too little of the seeds' scatter. So the seed means are first scaled
    about their mean to the scatter that is the seeds' own (random-effects estimate
    :math:`\\hat\\sigma_s^2=\\max(0, s^2-\\overline{v/n})`, :math:`s^2` the variance of the seed means,
    :math:`v` that within a seed); and where the seeds differ by more than their dialogues explain,
    the interval is widened from the normal's to Student's quantile with seeds − 1 degrees of
    freedom, since few seeds tell little about further ones. With one seed the interval covers
    dialogues only and says nothing about other seeds.

    Raises :class:`InputError` on unequal shapes, fewer than two dialogues in a seed, or NaN.
    """
    rows = _seed_rows("a", a)
    if b is not None:
        others = _seed_rows("b", b)
        if [len(r) for r in others] != [len(r) for r in rows]:
            raise InputError(
                "b", f"expected rows of lengths {[len(r) for r in rows]} like a, got {[len(r) for r in others]}"
            )
        rows = [x - y for x, y in zip(rows, others, strict=True)]
    if not 0 < level < 1:
        raise InputError("level", f"expected a number between 0 and 1, got {level}")
    means = np.array([r.mean() for r in rows])
    value, seeds = float(means.mean()), len(rows)
    noise = float(np.mean([r.var(ddof=1) / len(r) for r in rows]))
    spread = float(means.var(ddof=1)) if seeds > 1 else 0.0
    own = max(0.0, spread - noise)
    # drawing S of S values with replacement has (S - 1) / S of their variance
    scale = math.sqrt(own / spread * seeds / (seeds - 1)) if own > 0 else 0.0
    centred = [r - m for r, m in zip(rows, means, strict=True)]
    shifts = (means - value) * scale
    rng = np.random.default_rng(seed)
    chosen = rng.integers(0, seeds, size=(resamples, seeds))
    draws = np.zeros(resamples)
    for s in range(seeds):
        times = (chosen == s).sum(1)
        total = int(times.sum())
        drawn = centred[s][rng.integers(0, len(rows[s]), size=(total, len(rows[s])))].mean(1) + shifts[s]
        draws += np.bincount(np.repeat(np.arange(resamples), times), weights=drawn, minlength=resamples)
    draws = draws / seeds
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    widen = _student_quantile((1 + level) / 2, seeds - 1) / NormalDist().inv_cdf((1 + level) / 2) if own > 0 else 1.0
    return Estimate(
        value,
        value + min(0.0, float(low)) * widen,
        value + max(0.0, float(high)) * widen,
        sum(len(r) for r in rows),
        tuple(range(seeds)),
        unit,
    )


def _seed_rows(name: str, values: Sequence[Any] | np.ndarray) -> list[Float[np.ndarray, " n"]]:
    rows = [np.asarray(v, dtype=float) for v in values] if len(values) else []
    if rows and all(r.ndim == 0 for r in rows):
        rows = [np.array([float(r) for r in rows])]
    if not rows or any(r.ndim != 1 or len(r) < 2 for r in rows):
        raise InputError(name, "expected scores of shape (seeds, n) with at least two dialogues per seed")
    if not all(np.isfinite(r).all() for r in rows):
        raise InputError(name, "expected finite numbers, got NaN or infinity")
    return rows


def _student_quantile(p: float, df: int) -> float:
    """Quantile of Student's t for ``p`` above 0.5, by bisection of its distribution function."""
    # P(T <= t) by the substitution t = sqrt(df) tan(u): the integrand cos(u)^(df - 1) is smooth
    grid = np.linspace(0, math.pi / 2, 20001)
    density = np.cos(grid) ** (df - 1)
    area = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2)])
    u = np.interp((p - 0.5) * 2 * area[-1], area, grid)
    return math.sqrt(df) * math.tan(float(u))


def rank_correlation(x: Sequence[Any] | np.ndarray, y: Sequence[Any] | np.ndarray) -> float:
    """Spearman's rank correlation of two ``(n,)`` sequences; 0 where one of them is constant."""
    import pandas as pd

    a, b = pd.Series(np.asarray(x, float)).rank(), pd.Series(np.asarray(y, float)).rank()
    if a.std() == 0 or b.std() == 0:
        return 0.0
    return float(np.corrcoef(a, b)[0, 1])


@dataclass(frozen=True)
class Claim:
    """A sentence about a number, the bound that makes it true, and the verdict.

    ``holds``: the whole interval lies on the claimed side of the bound; ``fails``: the whole
    interval lies on the other side; ``inconclusive``: it straddles the bound.
    """

    text: str
    kind: Kind
    estimate: Estimate
    verdict: Verdict
    bound: str
    paper: str = ""


def check_claim(
    text: str,
    estimate: Estimate | Number,
    *,
    above: Number | None = None,
    below: Number | None = None,
    kind: str = "statistical",
    paper: str = "",
) -> Claim:
    """Compare an estimate with the claimed bound; give ``above``, ``below`` or both (a range).

    A bound belongs to the claimed side: ``above=0`` holds for an interval that starts at 0.
    ``paper`` quotes what the paper says, with its tag where it could not be verified.
    """
    if above is None and below is None:
        raise InputError("claim", "expected a bound: above=… or below=…")
    if kind not in ("deterministic", "statistical"):
        raise InputError("kind", f"expected 'deterministic' or 'statistical', got {kind!r}")
    e = estimate if isinstance(estimate, Estimate) else Estimate.exact(estimate)
    floor, ceiling = (-math.inf if above is None else above), (math.inf if below is None else below)
    if floor <= e.low and e.high <= ceiling:
        verdict: Verdict = "holds"
    elif e.high < floor or e.low > ceiling:
        verdict = "fails"
    else:
        verdict = "inconclusive"
    bound = " and ".join(
        ([f"at least {above:g}"] if above is not None else []) + ([f"at most {below:g}"] if below is not None else [])
    )
    return Claim(text, kind, e, verdict, bound, paper)
