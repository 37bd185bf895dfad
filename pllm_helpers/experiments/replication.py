"""Qin et al. beside us: the paper's numbers with their sources, our measured cells, and a verdict on each claim.

The cells come from :mod:`.policy_study`, recorded under ``data/results`` or measured in the
notebook. Every interval is computed from them here, none is stored; what is compared is paired by
seed and by dialogue.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from ..evaluation import Claim, Estimate, bootstrap_interval, check_claim, paired_difference, rank_correlation
from ..runtime import InputError, data_dir
from .cells import BASE
from .policy_study import Study, load_results

__all__ = [
    "ALONE",
    "BASELINES",
    "HEADLINE",
    "METRICS",
    "PAPER_NAMES",
    "STUDIES",
    "TAGS",
    "Curve",
    "LedgerRow",
    "Metric",
    "NotMeasured",
    "ablation_claim",
    "all_pairs",
    "beats_everywhere_claim",
    "beyond_chance_claim",
    "buffer_size_claim",
    "buffer_relation_claim",
    "by_cell",
    "cell_table",
    "centred",
    "comparisons",
    "copying_claim",
    "curve",
    "faster_learning_claim",
    "headline_claim",
    "how_to_measure",
    "not_recorded",
    "improvement_claim",
    "largest_improvement",
    "ledger",
    "null_largest",
    "paired_by_hand_claim",
    "pairs",
    "paper_agrees_claim",
    "paper_beside_us",
    "paper_numbers",
    "personalization_claim",
    "pooled_difference",
    "recorded",
    "relative_improvements",
    "released_code_claim",
    "rouge_and_length_claim",
    "rouge_and_nll_claim",
    "same_in_practice_claim",
    "saturation_claim",
    "synthesis_claim",
    "what_is_behind",
    "where_from",
]

Number = float | int
Rows = Sequence[np.ndarray] | np.ndarray  # one array of scores per seed; or shape (seeds, n)
Pairs = Mapping[str, tuple[Rows, Rows]]  # stream -> (a policy's scores, those it is compared with)

AGAINST = " against "
BASELINES = ("random", "fifo", "kcenter")
ALONE = ("eoe_only", "dss_only", "idd_only")
STUDIES = (
    "policy_comparison",
    "learning_curve",
    "buffer_size_sweep",
    "metric_ablation",
    "synthesis_sweep",
    "released_code_gap",
)
_WITHIN = {"metric_ablation": "policy_comparison", "released_code_gap": "policy_comparison"}  # the same cells


@dataclass(frozen=True)
class Metric:
    """A score per dialogue: its name, and whether higher is better (+1), lower (-1) or neither (0)."""

    name: str
    better: int
    unit: str = ""


METRICS: Mapping[str, Metric] = {
    "rouge1": Metric("ROUGE-1", 1),
    "rougeL": Metric("ROUGE-L", 1),
    "nll": Metric("NLL of the real reply", -1, "nats per token"),
    "bleu": Metric("BLEU", 1),
    "length_ratio": Metric("Length, written over real", 0),
    "copy_rate": Metric("Words copied from the question", 0),
}

# ---------------------------------------------------------------- the paper

# our name of the stream -> the data set's name in the paper
PAPER_NAMES: Mapping[str, str] = {
    "alpaca": "ALPACA",
    "dolly": "DOLLY",
    "prosocial": "Prosocial",
    "empathetic_dialogues": "Empathetic",
    "openorca": "OPENORCA",
    "meddialog": "MedDialog",
}
TAGS: Mapping[str, str] = {
    "read": "printed there; read in a public copy (UCSD-SEELab, reading group)",
    "digitised": "digitised from the published figure, about ±0.003",
    "by eye": "read by eye from the published figure",
    "calculated": "our arithmetic on numbers of this table",
}
SETS_SEEN = (800, 1600, 2400, 3200, 4000, 4600)
_FIGURE_2 = {
    "alpaca": (
        ".299 .313 .341 .360 .370 .373",
        ".242 .252 .243 .253 .249 .264",
        ".228 .218 .228 .243 .235 .233",
        ".249 .262 .238 .238 .244 .271",
    ),
    "dolly": (
        ".274 .315 .342 .353 .347 .347",
        ".249 .246 .250 .250 .243 .240",
        ".207 .211 .217 .211 .221 .221",
        ".226 .232 .231 .240 .238 .247",
    ),
    "prosocial": (
        ".198 .254 .277 .291 .300 .305",
        ".192 .198 .203 .221 .228 .237",
        ".183 .193 .190 .193 .202 .205",
        ".214 .203 .208 .215 .209 .202",
    ),
    "empathetic_dialogues": (
        ".246 .300 .315 .320 .320 .326",
        ".258 .233 .229 .250 .241 .235",
        ".241 .236 .230 .245 .236 .226",
        ".229 .219 .208 .210 .219 .214",
    ),
    "openorca": (
        ".227 .247 .270 .267 .280 .281",
        ".215 .218 .230 .225 .231 .238",
        ".223 .209 .223 .220 .221 .229",
        ".211 .193 .195 .205 .196 .204",
    ),
    "meddialog": (
        ".275 .318 .337 .347 .336 .343",
        ".241 .245 .246 .240 .248 .246",
        ".232 .236 .233 .243 .238 .240",
        ".217 .218 .209 .221 .208 .217",
    ),
}
_TABLE_4 = {  # EOE only, DSS only, IDD only, all three
    "alpaca": (0.2821, 0.2726, 0.2950, 0.3736),
    "dolly": (0.2782, 0.2633, 0.2247, 0.3465),
    "prosocial": (0.2617, 0.2441, 0.2324, 0.3062),
    "empathetic_dialogues": (0.2661, 0.2726, 0.2707, 0.3260),
    "openorca": (0.2468, 0.2362, 0.2468, 0.2813),
    "meddialog": (0.2608, 0.2726, 0.2931, 0.3429),
}
_FIGURE_3 = (  # ROUGE-1 and seconds per epoch for 1 to 9 synthesised sets per original, MedDialog
    (0.24, 15),
    (0.281, 44),
    (0.292, 59),
    (0.314, 88),
    (0.322, 104),
    (0.344, 111),
    (0.343, 126),
    (0.345, 139),
    (0.344, 157),
)
HEADLINE = 0.38  # "up to 38 %"


def paper_numbers(source: str = "") -> pd.DataFrame:
    """The numbers of Qin et al. that could be had, one a row, each with how it was obtained.

    Columns: ``source`` (``"Fig. 2"``, ``"Table 4"``, ``"Fig. 3"``, ``"Headline"``), ``data``,
    ``policy``, ``sets`` (dialogue sets streamed), ``synthesised`` (sets per original), ``rouge1``,
    ``seconds`` (per epoch), ``tag`` (a key of :data:`TAGS`). One run each, no interval is given.
    The values of Tables 2 and 3 were not found; Fig. 2 ends where Table 2 should.

    Raises :class:`InputError` for a source that is not there.
    """
    rows: list[dict[str, Any]] = []
    for data, lines in _FIGURE_2.items():
        for policy, line in zip(("quality", *BASELINES), lines, strict=True):
            for sets, value in zip(SETS_SEEN, line.split(), strict=True):
                rows.append(_number("Fig. 2", data, policy, float(value), "digitised", sets=sets))
    for data, values in _TABLE_4.items():
        for policy, value in zip((*ALONE, "quality"), values, strict=True):
            rows.append(_number("Table 4", data, policy, value, "read", sets=SETS_SEEN[-1]))
    for count, (value, seconds) in enumerate(_FIGURE_3, start=1):
        rows.append(
            _number("Fig. 3", "meddialog", "quality", value, "by eye", synthesised=count, seconds=float(seconds))
        )
    best = _TABLE_4["alpaca"][3] / float(_FIGURE_2["alpaca"][3].split()[-1]) - 1
    rows.append(_number("Headline", "alpaca", "quality", best, "calculated"))
    table = pd.DataFrame(rows)
    if not source:
        return table
    if source not in set(table["source"]):
        raise InputError("source", f"expected one of {', '.join(table['source'].unique())}, got {source!r}")
    return table[table["source"] == source].reset_index(drop=True)


def _number(source: str, data: str, policy: str, value: float, tag: str, **more: Any) -> dict[str, Any]:
    row = {"source": source, "data": data, "policy": policy, "sets": None, "synthesised": None}
    return {**row, "rouge1": value, "seconds": None, "tag": tag, **more}


# ---------------------------------------------------------------- what was measured


class NotMeasured(InputError):
    """A comparison needs cells that the results do not hold (yet)."""


def recorded(folder: str | os.PathLike = "") -> dict[str, Study]:
    """The recorded tables of :data:`STUDIES` that are there, by name; empty where none is.

    ``folder`` holds ``policy_comparison.json`` and its like, as ``python -m pllm_helpers.experiments``
    writes them; blank: those that ship under ``data/results``. Raises :class:`InputError` if there
    is no such folder or a table is damaged.
    """
    place = Path(folder) if folder else data_dir() / "results"
    if folder and not place.is_dir():
        raise InputError("results", f"expected a folder with recorded tables, got {str(folder)!r}", "Leave it blank.")
    return {name: load_results(place / f"{name}.json") for name in STUDIES if (place / f"{name}.json").is_file()}


def where_from(study: Study) -> pd.DataFrame:
    """How a study was made, one fact a row: command, machine, settings, seeds, cells, notes on the streams."""
    run, machine = study.run, study.run.get("machine", {})
    settings = run.get("settings", {})
    chosen = (
        "model",
        "dtype",
        "device",
        "length",
        "held_out",
        "generated",
        "steps",
        "lr",
        "batch_size",
        "rank",
        "layers",
    )
    bins = study.levels("bins")
    facts = {
        "experiment": study.name,
        "command": run.get("command", "this notebook"),
        "machine": ", ".join(f"{k} {v}" for k, v in machine.items()),
        "threads per cell": ", ".join(map(str, run.get("threads_per_cell", []))),
        "median seconds per cell": run.get("seconds_per_cell", ""),
        "settings": ", ".join(f"{k} {settings[k]}" for k in chosen if k in settings),
        "buffer": f"{', '.join(map(str, bins))} bins" if bins else "",
        "streams": ", ".join(study.streams),
        "seeds": ", ".join(map(str, study.seeds)),
        "cells": f"{len(study.cells)} of {study.planned} planned",
    }
    facts |= {f"note on {k}": v for k, v in study.notes.items()}
    return pd.DataFrame({"value": [str(v) for v in facts.values()]}, index=list(facts))


def not_recorded(studies: Mapping[str, Study]) -> list[str]:
    """The :data:`STUDIES` whose cells none of ``studies`` holds, in order."""
    return [name for name in STUDIES if name not in studies and _WITHIN.get(name) not in studies]


def how_to_measure(name: str) -> str:
    """What to say where a table is missing: the command that makes it."""
    if name not in STUDIES:
        raise InputError("study", f"expected one of {', '.join(STUDIES)}, got {name!r}")
    return f"Not recorded yet: {name}. To make it: python -m pllm_helpers.experiments {name} --streams person:0"


def by_cell(
    study: Study, metric: str, policy: str, other: str
) -> tuple[Float[np.ndarray, " k"], Float[np.ndarray, " k"]]:
    """Cell means of two policies on the streams and seeds that both have, in the same order.

    For metrics of which a recorded table keeps means only. Raises :class:`NotMeasured` with fewer
    than two such cells.
    """
    found = []
    for name in (policy, other):
        cells = study.results(None, name) if name in study.policies else []
        found.append({(c.cell.stream, c.cell.seed): float(c.means[metric]) for c in cells if metric in c.means})
    common = [k for k in found[0] if k in found[1]]
    if len(common) < 2:
        raise NotMeasured(study.name, f"expected at least two cells of {policy} and {other} with {metric}")
    return np.array([found[0][k] for k in common]), np.array([found[1][k] for k in common])


def pairs(
    study: Study, policy: str, other: str, metric: str = "rouge1", *, oriented: bool = True, **levels: int
) -> dict[str, tuple[list[np.ndarray], list[np.ndarray]]]:
    """Scores of two policies on each stream that has both, seed by seed: ``{stream: (policy's, other's)}``.

    ``oriented``: turn the sign of a metric for which lower is better. ``levels`` as in
    :meth:`Study.estimate`. Raises :class:`NotMeasured` if no stream has both.
    """
    return _matched(study, (policy, levels), (other, levels), metric, oriented)


def _matched(
    study: Study,
    one: tuple[str, Mapping[str, int]],
    two: tuple[str, Mapping[str, int]],
    metric: str,
    oriented: bool = True,
) -> dict[str, tuple[list[np.ndarray], list[np.ndarray]]]:
    if metric not in METRICS:
        raise InputError("metric", f"expected one of {', '.join(METRICS)}, got {metric!r}")
    sign = -1 if oriented and METRICS[metric].better < 0 else 1
    found = {}
    for stream in study.streams:
        a, b = (_rows(study, stream, policy, metric, levels) for policy, levels in (one, two))
        seeds = sorted(set(a) & set(b))
        if seeds:
            found[stream] = ([sign * a[s] for s in seeds], [sign * b[s] for s in seeds])
    if not found:
        raise NotMeasured(study.name, f"expected {one[0]} and {two[0]} on one stream, with {METRICS[metric].name}")
    return found


def _rows(study: Study, stream: str, policy: str, metric: str, levels: Mapping[str, int]) -> dict[int, np.ndarray]:
    """Scores by seed; empty where the policy was not run on the stream."""
    if policy not in study.policies:
        return {}
    found = {c.cell.seed: c for c in study.results(stream, policy, **levels) if metric in c.rows}
    return {seed: np.asarray(c.rows[metric], dtype=float) for seed, c in found.items()}


@dataclass(frozen=True)
class Curve:
    """Estimates along a factor (sets seen, bins, sets synthesised)."""

    x: list[int]
    estimates: list[Estimate]

    @property
    def drawn(self) -> dict[str, list[Any]]:
        """Arguments for :func:`~pllm_helpers.figures.add_series`."""
        e = self.estimates
        return {"x": self.x, "y": [p.value for p in e], "low": [p.low for p in e], "high": [p.high for p in e]}


def curve(
    study: Study, stream: str | None, policy: str, metric: str = "rouge1", *, against: str | None = None, seed: int = 0
) -> Curve:
    """A policy along the study's factor; with ``against``, its paired difference from another policy.

    ``stream=None`` pools all streams. Levels that were not measured are left out. The base model
    knows no level: its curve is flat. Raises :class:`NotMeasured` if nothing is left.
    """
    factor = study.factor
    x: list[int] = []
    estimates: list[Estimate] = []
    for level in study.levels():
        try:
            estimates.append(study.estimate(metric, stream, policy, against=against, seed=seed, **{factor: level}))
            x.append(level)
        except InputError:
            continue
    if not x:
        raise NotMeasured(study.name, f"expected {policy} along {factor or 'a factor'} on {stream or 'any stream'}")
    return Curve(x, estimates)


def what_is_behind(estimates: Iterable[Estimate] | Mapping[str, Iterable[Estimate]], paired: bool = False) -> str:
    """The line under a figure's title: what is drawn, over how many held-out dialogues and seeds.

    ``estimates`` may be grouped by origin: ``{"recorded": …, "live": …}``.
    """
    groups = estimates if isinstance(estimates, Mapping) else {"": estimates}
    counts = {origin: list(found) for origin, found in groups.items()}
    parts = [(f"{origin}: " if origin else "") + _counted(found) for origin, found in counts.items() if found]
    if not parts:
        return "Nothing measured yet"
    return f"{'Paired difference' if paired else 'Mean'} with 95 % interval; {'; '.join(parts)}"


def _counted(estimates: Sequence[Estimate]) -> str:
    seeds = [len(e.seeds) for e in estimates]
    each = [e.n // max(1, len(e.seeds)) for e in estimates]
    total = f"n = {_range([e.n for e in estimates])}"
    if max(each) == 1:  # one number per cell: rows of this metric were not kept
        return f"{total} cells, one per seed"
    return f"{total} ({_span(seeds, 'seed')} × {_span(each, 'held-out dialogue')})"


def _range(counts: Sequence[int]) -> str:
    return str(min(counts)) if min(counts) == max(counts) else f"{min(counts)} to {max(counts)}"


def _span(counts: Sequence[int], what: str) -> str:
    return f"{_range(counts)} {what}" + ("" if max(counts) == 1 else "s")


# ---------------------------------------------------------------- comparisons


def comparisons(study: Study, reference: str = "random", metric: str = "rouge1", seed: int = 0) -> pd.DataFrame:
    """Every policy minus ``reference`` on every stream that has both; the base model is no policy.

    Columns: ``stream``, ``policy``, ``difference``, ``low``, ``high`` (95 %), ``p`` (two-sided: where the
    interval's width, read as that of a normal, puts 0), ``p_holm`` (the same after Holm's correction
    for the number of rows), ``n`` (held-out dialogues of all seeds), ``seeds``.
    """
    rows = []
    for stream in study.streams:
        for policy in study.policies:
            if policy in (reference, BASE):
                continue
            try:
                e = study.estimate(metric, stream, policy, against=reference, seed=seed)
            except InputError:  # one of the two is missing here
                continue
            p = 2 * (1 - NormalDist().cdf(abs(e.value) / _spread(e))) if _spread(e) else float(e.value == 0)
            rows.append(
                {"stream": stream, "policy": policy, "difference": e.value, "low": e.low, "high": e.high, "p": p}
                | {"n": e.n, "seeds": len(e.seeds)}
            )
    columns = ["stream", "policy", "difference", "low", "high", "p", "p_holm", "n", "seeds"]
    if not rows:
        return pd.DataFrame(columns=columns)
    table = pd.DataFrame(rows)
    order = np.argsort(table["p"].to_numpy(), kind="stable")
    held = np.maximum.accumulate(table["p"].to_numpy()[order] * np.arange(len(order), 0, -1)).clip(max=1)
    table.loc[order, "p_holm"] = held
    return table[columns]


def _spread(e: Estimate) -> float:
    """Standard error that a normal's 95 % interval of this width would have."""
    return (e.high - e.low) / 2 / NormalDist().inv_cdf(0.975)


def pooled_difference(pairs: Pairs, seed: int = 0, unit: str = "") -> Estimate:
    """Mean over streams of the paired difference.

    Every stream is resampled on its own and half the widths are added as squares: the interval
    speaks about these streams, not about streams in general.
    """
    parts = _differences(pairs, seed)
    value = float(np.mean([e.value for e in parts]))
    down = math.sqrt(sum((e.value - e.low) ** 2 for e in parts)) / len(parts)
    up = math.sqrt(sum((e.high - e.value) ** 2 for e in parts)) / len(parts)
    return Estimate(value, value - down, value + up, *_behind(pairs), unit)


def _differences(pairs: Pairs, seed: int = 0, level: Number = 0.95) -> list[Estimate]:
    if not pairs:
        raise InputError("pairs", "expected at least one stream, got none")
    return [paired_difference(list(a), list(b), seed, level=level) for a, b in pairs.values()]


def relative_improvements(pairs: Pairs, seed: int = 0, level: Number = 0.95) -> dict[str, Estimate]:
    """Relative improvement a / b - 1 of each pair, a and b being means of seed means.

    Up to second order the ratio r of two means is the mean of r + (a - r b) / mean(b) over dialogues,
    so it is resampled like a difference: numerator and denominator together.
    """
    if not pairs:
        raise InputError("pairs", "expected at least one stream, got none")
    found = {}
    for key, (a, b) in pairs.items():
        above, below = (float(np.mean([r.mean() for r in rows])) for rows in (a, b))
        if below <= 0:
            raise InputError("improvement", "expected positive scores to divide by", "Use a metric above 0.")
        r = above / below
        found[key] = paired_difference(
            [r - 1 + (x - r * y) / below for x, y in zip(a, b, strict=True)], seed=seed, level=level
        )
    return found


def largest_improvement(pairs: Pairs, seed: int = 0) -> tuple[str, Estimate]:
    """Where the relative improvement is largest, and that largest one.

    Its interval serves statements of the form "in at least one of these ``k`` cases": the lower
    end is the best of the ``k`` lower ends with Bonferroni's correction (the case was searched
    for); the upper end the best of the plain upper ends (that *no* case reaches a bound needs no
    correction).
    """
    plain = relative_improvements(pairs, seed)
    wide = relative_improvements(pairs, seed, 1 - 0.05 / len(pairs))
    best = max(plain, key=lambda key: plain[key].value)
    value = plain[best].value
    low, high = max(e.low for e in wide.values()), max(e.high for e in plain.values())
    return best, Estimate(value, min(low, value), max(high, value), *_behind(pairs))


def _behind(pairs: Pairs) -> tuple[int, tuple[int, ...]]:
    """Held-out dialogues of all streams and seeds together, and the seeds (by number) that every pair has."""
    streams = {key.split(AGAINST)[0]: sum(len(r) for r in a) for key, (a, _) in pairs.items()}
    return sum(streams.values()), tuple(range(min(len(a) for a, _ in pairs.values())))


def null_largest(pairs: Pairs, seed: int = 0, draws: int = 10_000) -> Float[np.ndarray, " draws"]:
    """What the largest relative improvement would be if no policy were better; shape ``(draws,)``.

    Each pair keeps its standard error and loses its effect: a normal number about 0 is drawn for
    each, and the largest of the ``k`` is taken, as a reader of "up to" does. Pairs are drawn
    independently; those of one stream share a policy, which makes the true largest a little smaller.
    """
    spreads = np.array([_spread(e) for e in relative_improvements(pairs).values()])
    return (np.random.default_rng(seed).normal(size=(draws, len(spreads))) * spreads).max(axis=1)


# ---------------------------------------------------------------- what the cells hold


def cell_table(study: Study) -> pd.DataFrame:
    """One row per stream and policy: means over seeds of the scores and of what the buffer held.

    Seeds are averaged first, so that a policy counts once and not once per seed. Facts about the
    buffer stand in columns ``buffer_…`` where the study recorded them.
    """
    rows = []
    for c in study.cells:
        facts = {f"buffer_{k}": float(v) for k, v in (c.info.get("buffer") or {}).items() if _is_number(v)}
        rows.append({"stream": c.cell.stream, "policy": c.cell.policy} | dict(c.means) | facts)
    if not rows:
        return pd.DataFrame(columns=["stream", "policy", "seeds"])
    grouped = pd.DataFrame(rows).groupby(["stream", "policy"], sort=False)
    return grouped.mean().assign(seeds=grouped.size()).reset_index()


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def centred(table: pd.DataFrame, columns: Sequence[str]) -> pd.DataFrame:
    """The columns minus their mean over the policies of the same stream: what policies change, streams aside.

    The base model, streams with a single policy and rows with a gap drop out. Raises
    :class:`NotMeasured` when fewer than four rows are left.
    """
    missing = [c for c in columns if c not in table]
    if missing:
        raise NotMeasured(" and ".join(missing), "expected cells that hold it")
    whole = table[table["policy"] != BASE].dropna(subset=list(columns))
    whole = whole[whole.groupby("stream")["policy"].transform("size") > 1]
    if len(whole) < 4:
        raise NotMeasured(" and ".join(columns), f"expected at least four cells that hold it, got {len(whole)}")
    out = whole[["stream", "policy"]].copy()
    for c in columns:
        out[c] = whole[c] - whole.groupby("stream")[c].transform("mean")
    return out.reset_index(drop=True)


# ---------------------------------------------------------------- claims


def paper_agrees_claim(figure: Float[np.ndarray, " k"], table: Float[np.ndarray, " k"]) -> Claim:
    """Fig. 2 ends at Table 4's last column on every data set, so both were run with the same buffer."""
    gap = float(np.max(np.abs(figure - table)))
    return check_claim(
        "The end points of Fig. 2 equal Table 4 within the digitising error: largest difference is at most 0.003",
        gap,
        below=0.003,
        kind="deterministic",
        paper="Fig. 2 (digitised) and Table 4 (read)",
    )


def headline_claim(ours: Number, baseline: Number, headline: Number = HEADLINE) -> Claim:
    """ "Up to 38 %" is one ratio on one data set: ALPACA, against K-Center."""
    return check_claim(
        f"Table 4's {ours:.4f} over Fig. 2's {baseline:.3f} (ALPACA, K-Center) gives the headline: "
        f"{ours / baseline - 1:.3f} rounds to {headline:g}",
        abs(ours / baseline - 1 - headline),
        below=0.005,
        kind="deterministic",
        paper=f"up to {100 * headline:.0f} % higher ROUGE-1; our arithmetic on the paper's numbers",
    )


def paired_by_hand_claim(by_hand: Estimate, package: Estimate) -> Claim:
    """The bootstrap written out in the notebook and the package's give the same mean and nearly the same ends."""
    width = package.high - package.low
    gap = max(abs(by_hand.value - package.value), abs(by_hand.low - package.low), abs(by_hand.high - package.high))
    return check_claim(
        "The interval written out by hand equals the package's: ends differ by at most a tenth of its width",
        gap / width if width else gap,
        below=0.1,
        kind="deterministic",
    )


def beats_everywhere_claim(name: str, other: str, pairs: Pairs, metric: str = "rouge1", paper: str = "") -> Claim:
    """``name`` is better than ``other`` on every stream; the value is the smallest difference.

    The sentence holds if each 95 % interval lies above 0 (no correction is needed to state all of
    them). It fails if one interval lies below 0, at Bonferroni's level, since that one is searched for.
    Scores in ``pairs`` are oriented: higher is better.
    """
    plain, wide = _differences(pairs), _differences(pairs, level=1 - 0.05 / len(pairs))
    worst = int(np.argmin([e.value for e in plain]))
    value = plain[worst].value
    low, high = min(e.low for e in plain), min(e.high for e in wide)
    e = Estimate(value, min(low, value), max(high, value), *_behind(pairs), METRICS[metric].unit)
    return check_claim(
        f"{name} beats {other} in {METRICS[metric].name} on every stream ({_span([len(pairs)], 'stream')}; "
        f"smallest lead on {list(pairs)[worst]}): lead is at least 0",
        e,
        above=0,
        paper=paper,
    )


def improvement_claim(pairs: Pairs, at_least: Number = HEADLINE, paper: str = "") -> Claim:
    """Somewhere the relative improvement in ROUGE-1 reaches the headline; see :func:`largest_improvement`."""
    where, e = largest_improvement(pairs)
    return check_claim(
        f"Somewhere among {len(pairs)} comparisons the relative lead reaches {100 * at_least:.0f} % "
        f"(largest: {where}): it is at least {at_least:g}",
        e,
        above=at_least,
        paper=paper,
    )


def beyond_chance_claim(pairs: Pairs, paper: str = "") -> Claim:
    """The largest relative improvement minus the largest one that noise alone produces among as many comparisons."""
    largest, null = max(e.value for e in relative_improvements(pairs).values()), null_largest(pairs)
    low, high = np.quantile(largest - null, [0.025, 0.975])
    e = Estimate(largest - float(np.median(null)), float(low), float(high), *_behind(pairs))
    return check_claim(
        f"The largest of {len(pairs)} relative leads exceeds what noise alone would give: excess is above 0",
        e,
        above=0,
        paper=paper,
    )


def ablation_claim(alone: str, pairs: Pairs, paper: str = "") -> Claim:
    """All three metrics together against one of them, averaged over streams; oriented scores."""
    return check_claim(
        f"Three metrics together beat {alone} on average over {_span([len(pairs)], 'stream')}: difference is above 0",
        pooled_difference(pairs),
        above=0,
        paper=paper,
    )


def faster_learning_claim(other: str, pairs: Pairs, paper: str = "") -> Claim:
    """Rise of ROUGE-1 from the first to the last checkpoint, minus the other policy's rise; mean over streams.

    ``pairs`` holds last minus first per dialogue, for the policy and for the other.
    """
    return check_claim(
        f"From the first to the last checkpoint quality rises more than {other}: difference of rises is above 0",
        pooled_difference(pairs),
        above=0,
        paper=paper,
    )


def personalization_claim(policy: str, pairs: Pairs, metric: str = "rouge1") -> Claim:
    """Tuning on what ``policy`` kept against the untuned model, averaged over streams; oriented scores."""
    return check_claim(
        f"Tuning on what {policy} kept helps on held-out replies ({METRICS[metric].name}, mean of "
        f"{_span([len(pairs)], 'stream')}): difference from the base model is above 0",
        pooled_difference(pairs, unit=METRICS[metric].unit),
        above=0,
    )


def released_code_claim(pairs: Pairs, paper: str = "") -> Claim:
    """The paper's rule against the rule in the first author's released scripts, averaged over streams."""
    return check_claim(
        f"The paper's rule beats the released scripts' rule on average over {_span([len(pairs)], 'stream')}: "
        "difference is above 0",
        pooled_difference(pairs),
        above=0,
        paper=paper,
    )


def buffer_size_claim(small: int, large: int, pairs: Pairs, paper: str = "") -> Claim:
    """The largest buffer against the smallest, same policy, averaged over streams; oriented scores."""
    return check_claim(
        f"A buffer of {large} bins beats one of {small}: difference is above 0",
        pooled_difference(pairs),
        above=0,
        paper=paper,
    )


def synthesis_claim(few: int, many: int, pairs: Pairs, paper: str = "") -> Claim:
    """More synthesised sets per original against fewer, averaged over streams; oriented scores."""
    return check_claim(
        f"{many} synthesised sets per original beat {few}: difference is above 0",
        pooled_difference(pairs),
        above=0,
        paper=paper,
    )


def saturation_claim(enough: int, most: int, pairs: Pairs, margin: Number = 0.01, paper: str = "") -> Claim:
    """Beyond ``enough`` synthesised sets nothing changes by more than ``margin`` (an equivalence test)."""
    return check_claim(
        f"Going from {enough} to {most} synthesised sets per original changes ROUGE-1 by at most {margin:g}",
        pooled_difference(pairs),
        above=-margin,
        below=margin,
        paper=paper,
    )


def rouge_and_nll_claim(rouge: Float[np.ndarray, " k"], nll: Float[np.ndarray, " k"]) -> Claim:
    """Over cells with the stream's mean removed: does higher ROUGE-1 go with lower NLL of the real replies?"""
    rho = bootstrap_interval(rouge, -nll, statistic=rank_correlation)
    return check_claim(
        "Policies that gain in ROUGE-1 also gain in NLL: rank correlation over cells is above 0.5", rho, above=0.5
    )


def rouge_and_length_claim(rouge: Float[np.ndarray, " k"], length: Float[np.ndarray, " k"]) -> Claim:
    """Over cells with the stream's mean removed: does ROUGE-1 follow the length of what is written?"""
    size = bootstrap_interval(rouge, length, statistic=lambda a, b: abs(rank_correlation(a, b)))
    return check_claim(
        "ROUGE-1 does not follow the length of the answers: |rank correlation| over cells is below 0.5", size, below=0.5
    )


def copying_claim(tuned: Float[np.ndarray, " k"], base: Float[np.ndarray, " k"]) -> Claim:
    """Share of an answer's words that stand in the question: tuned minus base model; one pair per stream and seed."""
    gap = bootstrap_interval(tuned, base, statistic=lambda a, b: a.mean() - b.mean())
    return check_claim(
        "The tuned model does not copy more from the question than the base model: difference is at most 0.02",
        gap,
        below=0.02,
    )


def buffer_relation_claim(fact: str, held: Float[np.ndarray, " k"], gain: Float[np.ndarray, " k"]) -> Claim:
    """Over cells with the stream's mean removed: does the gain follow something that the buffer held?"""
    size = bootstrap_interval(held, gain, statistic=lambda a, b: abs(rank_correlation(a, b)))
    return check_claim(
        f"What policies gain follows {fact} of what they keep: |rank correlation| over cells is above 0.5",
        size,
        above=0.5,
    )


def same_in_practice_claim(name: str, other: str, pairs: Pairs, margin: Number = 0.01) -> Claim:
    """An equivalence test: the difference lies within the margin on both sides; oriented scores."""
    return check_claim(
        f"{name} and {other} are the same for practical purposes, mean of {_span([len(pairs)], 'stream')}: "
        f"they differ by at most {margin:g}",
        pooled_difference(pairs),
        above=-margin,
        below=margin,
    )


# ---------------------------------------------------------------- the ledger


@dataclass(frozen=True)
class LedgerRow:
    """One sentence of the paper, what it rests on there, and our verdict (or what is missing for one)."""

    key: str
    paper: str
    evidence: str
    claim: Claim | None
    missing: str = ""

    @property
    def verdict(self) -> str:
        """``holds``, ``fails``, ``inconclusive`` or ``not measured``."""
        return self.claim.verdict if self.claim else "not measured"


def ledger(studies: Mapping[str, Study], metric: str = "rouge1") -> list[LedgerRow]:
    """The paper's claims, each with our verdict; what was not measured is said, not skipped.

    ``studies`` maps names of :data:`STUDIES` to studies, as :func:`recorded` does. Sentences about
    ROUGE-1 percentages and about Fig. 3 are always judged in ROUGE-1.
    """

    def study(*names: str) -> Study:
        found = next((studies[n] for n in names if n in studies), None)
        if found is None:
            raise NotMeasured(names[0], "expected its table under data/results, there is none")
        return found

    def beats(other: str) -> Claim:
        found = pairs(study("policy_comparison"), "quality", other, metric)
        return beats_everywhere_claim("Quality", _NAMES[other], found, metric, "true of all six data sets in Fig. 2")

    def headline() -> Claim:
        return improvement_claim(all_pairs(study("policy_comparison")), HEADLINE, "up to 38 %")

    def beyond() -> Claim:
        return beyond_chance_claim(all_pairs(study("policy_comparison")))

    def together(alone: str) -> Claim:
        where = _with(studies, ("quality", alone), "policy_comparison", "metric_ablation")
        found = pairs(where, "quality", alone, metric)
        return ablation_claim(_NAMES[alone], found, "true of all six data sets in Table 4")

    def faster(other: str) -> Claim:
        found = _rises(study("learning_curve"), "quality", other, metric)
        return faster_learning_claim(_NAMES[other], found, "steeper curves in Fig. 2")

    def released() -> Claim:
        where = _with(studies, ("quality", "released_code"), "policy_comparison", "released_code_gap")
        return released_code_claim(pairs(where, "quality", "released_code", metric))

    plan: list[tuple[str, str, str, Callable[[], Claim]]] = [
        *(
            (f"beats_{o}", f"Quality scores beat {_NAMES[o]} on every data set", "Fig. 2, one run", partial(beats, o))
            for o in BASELINES
        ),
        ("headline", "Up to 38 % higher ROUGE-1", "one data set, one baseline, one run", headline),
        ("beyond_chance", "(the same, against chance)", "not tested there", beyond),
        *((a, f"Three metrics together beat {_NAMES[a]}", "Table 4, one run", partial(together, a)) for a in ALONE),
        *(
            (f"faster_{o}", f"Learning is faster than with {_NAMES[o]}", "Fig. 2, one run", partial(faster, o))
            for o in BASELINES
        ),
        (
            "buffer_size",
            "A larger buffer helps",
            "Table 3; its numbers were not found",
            lambda: _larger(study("buffer_size_sweep"), metric),
        ),
        (
            "synthesis",
            "More synthesised sets help, up to about 6",
            "Fig. 3, by eye",
            lambda: _more(study("synthesis_sweep")),
        ),
        ("saturation", "Beyond 6 nothing is gained", "Fig. 3, by eye", lambda: _enough(study("synthesis_sweep"))),
        ("released_code", "(not in the paper) its rule beats that of the released scripts", "scripts read", released),
    ]
    rows = []
    for key, paper, evidence, make in plan:
        try:
            rows.append(LedgerRow(key, paper, evidence, make()))
        except NotMeasured as gap:
            rows.append(LedgerRow(key, paper, evidence, None, f"{gap.what}: {gap.expected}"))
    return rows


_NAMES = {
    "random": "Random replace",
    "fifo": "FIFO replace",
    "kcenter": "K-Center",
    "eoe_only": "EOE alone",
    "dss_only": "DSS alone",
    "idd_only": "IDD alone",
}


def _with(studies: Mapping[str, Study], policies: Sequence[str], *names: str) -> Study:
    """The first of these studies in which all of the policies were run."""
    for name in names:
        if name in studies and set(policies) <= set(studies[name].policies):
            return studies[name]
    raise NotMeasured(" or ".join(names), f"expected cells of {' and '.join(policies)}")


def all_pairs(study: Study) -> dict[str, tuple[list[np.ndarray], list[np.ndarray]]]:
    """Quality against each of the paper's baselines on each stream, in ROUGE-1, by ``"STREAM against BASELINE"``.

    Raises :class:`NotMeasured` if there is none.
    """
    found: dict[str, tuple[list[np.ndarray], list[np.ndarray]]] = {}
    for other in BASELINES:
        try:
            for stream, pair in pairs(study, "quality", other).items():
                found[f"{stream}{AGAINST}{_NAMES[other]}"] = pair
        except NotMeasured:
            continue
    if not found:
        raise NotMeasured(study.name, "expected quality and one of the paper's baselines on one stream")
    return found


def _rises(study: Study, policy: str, other: str, metric: str) -> dict[str, tuple[list[np.ndarray], list[np.ndarray]]]:
    """Last minus first checkpoint per dialogue, of both policies, on streams where both have both."""
    levels = study.levels("sets")
    if len(levels) < 2:
        raise NotMeasured(study.name, "expected at least two lengths of the stream")
    ends = ({"sets": levels[0]}, {"sets": levels[-1]})
    rises = [_matched(study, (p, ends[1]), (p, ends[0]), metric) for p in (policy, other)]
    both = [s for s in rises[0] if s in rises[1] and len(rises[0][s][0]) == len(rises[1][s][0])]
    if not both:
        raise NotMeasured(study.name, f"expected two lengths of the stream for {policy} and {other}")
    gains = [{s: [x - y for x, y in zip(*r[s], strict=True)] for s in both} for r in rises]
    return {s: (gains[0][s], gains[1][s]) for s in both}


def _larger(study: Study, metric: str) -> Claim:
    sizes = study.levels("bins")
    if len(sizes) < 2:
        raise NotMeasured(study.name, "expected at least two sizes of the buffer")
    ends = [("quality", {"bins": b}) for b in (sizes[-1], sizes[0])]
    return buffer_size_claim(sizes[0], sizes[-1], _matched(study, *ends, metric))


def _counts(study: Study) -> tuple[int, int, int]:
    """Fewest (at least 1), about six, and most synthesised sets per original."""
    counts = [c for c in study.levels("synthesis") if c > 0]
    if len(counts) < 2:
        raise NotMeasured(study.name, "expected at least two numbers of synthesised sets per original, from 1")
    return counts[0], min(counts, key=lambda c: (abs(c - 6), c)), counts[-1]


def _more(study: Study) -> Claim:
    few, six, _ = _counts(study)
    if few == six:
        raise NotMeasured(study.name, f"expected more than {few} synthesised sets per original")
    found = _matched(study, ("quality", {"synthesis": six}), ("quality", {"synthesis": few}), "rouge1")
    return synthesis_claim(few, six, found, "0.24 at 1, 0.344 at 6 (read by eye)")


def _enough(study: Study) -> Claim:
    _, six, most = _counts(study)
    if six == most:
        raise NotMeasured(study.name, f"expected more than {six} synthesised sets per original")
    found = _matched(study, ("quality", {"synthesis": most}), ("quality", {"synthesis": six}), "rouge1")
    return saturation_claim(six, most, found, paper="0.344 at 6 and at 9 (read by eye)")


# ---------------------------------------------------------------- paper beside us


def paper_beside_us(study: Study | None, policies: Sequence[str] = ("quality", *BASELINES, *ALONE)) -> pd.DataFrame:
    """ROUGE-1 at the end of the stream, the paper's beside ours: one row per data set and policy.

    Rows without a counterpart on one side have a dash there: people are ours alone, data sets
    that were not run are the paper's alone. Columns: ``data``, ``policy``, ``paper`` (with its tag),
    ``ours`` (mean and 95 % interval), ``n``, ``seeds``, ``note`` (what stands in for what).
    """
    end = paper_numbers("Fig. 2")
    end = end[end["sets"] == SETS_SEEN[-1]]
    both = pd.concat([paper_numbers("Table 4"), end]).drop_duplicates(["data", "policy"])
    theirs = {(r.data, r.policy): f"{r.rouge1:.3f} ({r.tag})" for r in both.itertuples()}
    streams = () if study is None else study.streams
    rows = []
    for stream in [*PAPER_NAMES, *(s for s in streams if s not in PAPER_NAMES)]:
        for policy in policies:
            row: dict[str, Any] = {"data": stream, "policy": policy, "paper": theirs.get((stream, policy), "–")}
            row |= {"ours": "–", "n": 0, "seeds": 0, "note": "not measured"}
            if study is not None and stream in streams and policy in study.policies:
                try:
                    e = study.estimate("rouge1", stream, policy)
                    row |= {"ours": f"{e.value:.3f} [{e.low:.3f}, {e.high:.3f}]", "n": e.n, "seeds": len(e.seeds)}
                    row["note"] = study.notes.get(stream, "")
                except InputError:
                    pass
            if row["paper"] != "–" or row["n"]:
                rows.append(row)
    return pd.DataFrame(rows)
