"""The figures of notebook 05: each function gives ``(figure, alt text)`` for :func:`~pllm_helpers.figures.show`.

Every figure says in the line under its title what its intervals are, over how many held-out
dialogues and seeds, and whether its cells were recorded or measured live.
"""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from jaxtyping import Float
from plotly.subplots import make_subplots

from .. import figures
from ..evaluation import Estimate, rank_correlation
from ..runtime import InputError
from . import replication
from .policy_study import Study
from .replication import METRICS, PAPER_NAMES

__all__ = ["curve_figure", "difference_panels", "null_figure", "paper_figure", "scatter_figure", "timing_figure"]

Drawn = tuple[go.Figure, str]
DASHED = {"line_dash": "dash", "line_color": figures.SOFT_INK, "line_width": 1.5}


def paper_figure() -> Drawn:
    """Fig. 2 of the paper from its digitised points: a panel per data set, a line per policy."""
    points = replication.paper_numbers("Fig. 2")
    fig = make_subplots(
        2,
        3,
        subplot_titles=list(PAPER_NAMES.values()),
        shared_xaxes=True,
        shared_yaxes=True,
        vertical_spacing=0.1,
        horizontal_spacing=0.03,
    )
    said = []
    for k, (data, name) in enumerate(PAPER_NAMES.items()):
        own = points[points["data"] == data]
        for policy, part in own.groupby("policy", sort=False):
            look = figures.trace_style(str(policy)) | {"showlegend": k == 0}
            place = {"row": k // 3 + 1, "col": k % 3 + 1}
            fig.add_scatter(x=part["sets"], y=part["rouge1"], mode="lines+markers", **look, **place)
        end = own[own["sets"] == own["sets"].max()].set_index("policy")["rouge1"]
        said.append(f"{name} quality {end['quality']:.3f}, best other {end.drop('quality').max():.3f}")
    _finish(
        fig, "Qin et al., Fig. 2, digitised", "One run per line: 1 seed, n not stated, no interval; about ±0.003", 600
    )
    fig.update_xaxes(title_text="dialogue sets streamed", row=2).update_yaxes(title_text="ROUGE-1", col=1)
    fig.update_layout(legend={"y": -0.16, "yanchor": "top"}, margin_b=110)
    return fig, f"Six line charts of ROUGE-1 against streamed sets. At 4,600 sets: {'; '.join(said)}."


def difference_panels(
    study: Study,
    policies: Sequence[str],
    metric: str = "rouge1",
    *,
    reference: str = "random",
    origin: str = "recorded",
    seed: int = 0,
    columns: int = 3,
) -> Drawn:
    """A panel per stream; in it a dot with interval per policy: its paired difference from ``reference``.

    Policies that a stream does not have are left out. Raises
    :class:`~pllm_helpers.experiments.replication.NotMeasured` if nothing is left.
    """
    found: dict[str, dict[str, Estimate]] = {}
    for stream in study.streams:
        for p in policies:
            if p == reference:
                continue
            try:
                found.setdefault(stream, {})[p] = study.estimate(metric, stream, p, against=reference, seed=seed)
            except InputError:
                continue
    found = {s: rows for s, rows in found.items() if rows}
    if not found:
        raise replication.NotMeasured(study.name, f"expected {reference} and another policy on one stream")
    columns = min(columns, len(found))
    rows = math.ceil(len(found) / columns)
    order = [p for p in policies if any(p in own for own in found.values())]
    inner = 34 * len(order) + 10
    height = 100 + rows * (inner + 95)
    fig = make_subplots(
        rows,
        columns,
        subplot_titles=list(found),
        shared_yaxes=True,
        horizontal_spacing=0.03,
        vertical_spacing=min(0.5, 80 / (height - 160)) if rows > 1 else 0,
    )
    for k, own in enumerate(found.values()):
        place = {"row": k // columns + 1, "col": k % columns + 1}
        for p, e in own.items():
            m = figures.METHODS[p]
            fig.add_scatter(
                x=[e.value],
                y=[m.name],
                error_x=figures.error_bars([e.value], [e.low], [e.high], m.colour),
                mode="markers",
                name=m.name,
                marker={"color": m.colour, "symbol": m.marker, "size": 11},
                showlegend=False,
                **place,
            )
        fig.add_vline(x=0, **DASHED, **place)
    names = [figures.METHODS[p].name for p in order]
    fig.update_yaxes(type="category", categoryorder="array", categoryarray=names[::-1])
    fig.update_yaxes(range=[-0.6, len(names) - 0.4])
    fig.update_xaxes(nticks=5)
    m, other = METRICS[metric], figures.METHODS[reference].name
    side = {1: "right of the line is better", -1: "left of the line is better", 0: ""}[m.better]
    counts = replication.what_is_behind({origin: [e for own in found.values() for e in own.values()]}, paired=True)
    _finish(fig, f"{m.name} minus that of {other}", f"{counts}; {side}".removesuffix("; "), height)
    said = [
        f"{s}: " + ", ".join(f"{figures.METHODS[p].name} {_signed(e)}" for p, e in own.items())
        for s, own in found.items()
    ]
    return fig, f"Dots with intervals, one panel per stream: {m.name} minus that of {other}. " + ". ".join(said) + "."


def curve_figure(
    study: Study,
    policies: Sequence[str],
    title: str,
    x: str,
    metric: str = "rouge1",
    *,
    against: str | None = None,
    stream: str | None = None,
    seed: int = 0,
) -> Drawn:
    """Lines with intervals along the study's factor; with ``against``, paired differences from that policy.

    ``stream=None`` pools all streams. Raises
    :class:`~pllm_helpers.experiments.replication.NotMeasured` if none of the policies was run.
    """
    m, used, said = METRICS[metric], [], []
    y = f"{m.name}, minus {figures.METHODS[against].name}" if against else f"{m.name}{f', {m.unit}' if m.unit else ''}"
    fig = figures.new_figure(title=title, x=x, y=y, height=480)
    for p in policies:
        if p not in study.policies or p == against:
            continue
        try:
            c = replication.curve(study, stream, p, metric, against=against, seed=seed)
        except replication.NotMeasured:
            continue
        figures.add_series(fig, p, **c.drawn, interval="bars")
        used += c.estimates
        said.append(f"{figures.METHODS[p].name}: " + ", ".join(f"{e.value:.3f}" for e in c.estimates))
    if not used:
        raise replication.NotMeasured(study.name, f"expected some of {', '.join(policies)}")
    levels = list(study.levels())
    fig.update_xaxes(tickvals=levels)
    if levels[0] > 0 and levels[-1] >= 8 * levels[0]:
        fig.update_xaxes(type="log")
    if against:
        fig.add_hline(y=0, **DASHED)
    where = stream or ", ".join(study.streams)
    figures.spread_labels(figures.dodge(fig))
    figures.add_note(fig, f"{where}. {replication.what_is_behind({'recorded': used}, paired=bool(against))}")
    return fig, f"{title}, {y}: lines with intervals at {x} {', '.join(map(str, levels))}. {'; '.join(said)}."


def timing_figure(study: Study, policy: str = "quality", *, seed: int = 0) -> Drawn:
    """ROUGE-1 against CPU seconds per cell, a dot per number of synthesised sets, intervals both ways (Fig. 3)."""
    fig = figures.new_figure(
        title="Synthesised sets: what they cost", x="CPU seconds per cell", y="ROUGE-1", height=420
    )
    m, said, used = figures.METHODS[policy], [], []
    for k in study.levels():
        try:
            e = study.estimate("rouge1", None, policy, synthesis=k, seed=seed)
            t = study.estimate("cpu_seconds", None, policy, synthesis=k, seed=seed)
        except InputError:
            continue
        fig.add_scatter(
            x=[t.value],
            y=[e.value],
            error_x=figures.error_bars([t.value], [t.low], [t.high], m.colour),
            error_y=figures.error_bars([e.value], [e.low], [e.high], m.colour),
            mode="markers+text",
            text=[f" {k}"],
            textposition="top right",
            marker={"color": m.colour, "symbol": m.marker, "size": 11},
            showlegend=False,
        )
        used.append(e)
        said.append(f"{k} sets: {e.value:.3f} in {t.value:.0f} s")
    if not used:
        raise replication.NotMeasured(study.name, f"expected {policy} with synthesised sets")
    note = f"{', '.join(study.streams)}. The number: synthesised sets per original. "
    figures.add_note(fig, note + replication.what_is_behind({"recorded": used}))
    return fig, f"Dots of ROUGE-1 against CPU seconds per cell: {'; '.join(said)}."


def scatter_figure(inner: pd.DataFrame, columns: Mapping[str, str], origin: str, seeds: Sequence[int]) -> Drawn:
    """A panel per column: ROUGE-1 against it, a dot per stream and policy, both minus the stream's mean.

    ``inner`` comes from :func:`~pllm_helpers.experiments.replication.centred`; ``columns`` maps its
    columns to the titles of the axes; ``seeds``: how many are behind each dot.
    """
    fig = make_subplots(1, len(columns), shared_yaxes=True, horizontal_spacing=0.05)
    for k, column in enumerate(columns, start=1):
        for p, part in inner.groupby("policy", sort=False):
            look = figures.trace_style(str(p))
            fig.add_scatter(
                x=part[column],
                y=part["rouge1"],
                mode="markers",
                marker=look["marker"] | {"size": 11},
                name=look["name"],
                showlegend=k == 1,
                row=1,
                col=k,
            )
    for k, title in enumerate(columns.values(), start=1):
        fig.update_xaxes(title_text=html.escape(title), col=k)
    fig.update_yaxes(title_text="ROUGE-1, minus the stream's mean", col=1)
    rho = {c: rank_correlation(inner["rouge1"].to_numpy(), inner[c].to_numpy()) for c in columns}
    behind = f"{min(seeds)}" if min(seeds) == max(seeds) else f"{min(seeds)} to {max(seeds)}"
    note = f"{origin}: n = {len(inner)} means (a stream and a policy each) over {behind} seeds. Rank correlation "
    note += ", ".join(f"{rho[c]:.2f} with {t}" for c, t in columns.items()) + "; intervals in the claims below"
    _finish(fig, "What goes with ROUGE-1?", note, 560)
    fig.update_layout(legend={"y": -0.2, "yanchor": "top"}, margin_b=150)
    said = "; ".join(f"rank correlation with {t} {rho[c]:.2f}" for c, t in columns.items())
    return fig, f"{len(columns)} scatter plots of {len(inner)} policy means, ROUGE-1 against each column: {said}."


def null_figure(null: Float[np.ndarray, " draws"], best: str, largest: Estimate, origin: str, headline: float) -> Drawn:
    """What the largest relative lead would be by noise alone, with ours and the headline as lines."""
    fig = figures.new_figure(
        title="The largest relative lead in ROUGE-1", x="largest relative lead", y="share of draws", height=400
    )
    m = figures.METHODS["ours"]
    fig.add_histogram(
        x=null, histnorm="probability", nbinsx=60, marker={"color": m.colour}, opacity=0.45, showlegend=False
    )
    lines = sorted([(largest.value, "ours"), (headline, "headline")])
    for (value, text), side in zip(lines, ("left", "right"), strict=True):  # names on the outer sides never meet
        annotation = {"text": text, "font": {"size": 14}}
        fig.add_vline(x=value, **DASHED, annotation=annotation, annotation_position=f"top {side}")
    note = f"Bars: noise alone, {len(null):,} draws. Ours: {largest.value:.3f} [{largest.low:.3f}, {largest.high:.3f}]"
    note += f" on {best}; {origin}, n = {largest.n}, {len(largest.seeds)} seeds, 95 % corrected for the search"
    figures.add_note(fig, note)
    low, high = np.quantile(null, [0.05, 0.95])
    return fig, (
        f"Histogram of the largest relative lead by noise alone: median {np.median(null):.3f}, nine tenths between "
        f"{low:.3f} and {high:.3f}. Lines at ours, {largest.value:.3f}, and at the headline, {headline:.2f}."
    )


def _finish(fig: go.Figure, title: str, note: str, height: int) -> None:
    """House look for a figure made of panels."""
    fig.update_layout(template="pllm", height=height, title_text=html.escape(title))
    figures.add_note(fig, note)
    fig.update_layout(margin_t=(fig.layout.margin.t or 60) + 24)  # room for the panels' titles


def _signed(e: Estimate) -> str:
    return f"{e.value:+.3f} [{e.low:+.3f}, {e.high:+.3f}]"
