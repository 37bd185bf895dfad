"""Figures of notebook 06: each function gives a figure and the text that stands for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from .. import figures
from ..device import EnvelopeResult
from ..evaluation import bootstrap_interval
from .pocket_study import Alignment, Trial

__all__ = ["alignment_figure", "curves_figure", "epsilon_figure", "memory_figure", "slice_figure", "timeline_figure"]

Number = float | int
Drawn = tuple[go.Figure, str]
PARTS = {
    "weights": ("blue", ""),
    "gradients": ("vermillion", "/"),
    "optimiser": ("wine", "x"),
    "activations": ("green", "."),
    "logits": ("purple", "-"),
    "workspace": ("black", "\\"),
    "runtime": (figures.SOFT_INK, ""),
}


def slice_figure(slices: Mapping[int, tuple[Sequence[Number], Sequence[Number]]], epsilon: Number) -> Drawn:
    """Loss along the direction of each seed, with the two probes at ±epsilon and the line between them.

    ``slices``: seed -> (places along z, losses there); ``-epsilon``, ``0`` and ``epsilon`` are among the places.
    """
    fig = figures.new_figure(
        title="Loss along random directions", x="place along z, in epsilon", y="nats per answer token"
    )
    looks = [("blue", "solid", "circle"), ("vermillion", "dash", "square"), ("green", "dot", "diamond")]
    told = []
    for (seed, (places, losses)), (colour, dash, symbol) in zip(slices.items(), looks, strict=False):
        x = [p / epsilon for p in places]
        at = {round(p, 6): v for p, v in zip(x, losses, strict=True)}
        slope = (at[1.0] - at[-1.0]) / (2 * epsilon)
        ink = figures.PALETTE[colour]
        fig.add_scatter(x=x, y=list(losses), mode="lines", line={"color": ink, "dash": dash}, showlegend=False)
        marker = {"color": ink, "symbol": symbol, "size": 11}
        fig.add_scatter(x=[-1, 1], y=[at[-1.0], at[1.0]], mode="markers", marker=marker, showlegend=False)
        fig.add_annotation(
            x=x[-1],
            y=losses[-1],
            text=f"seed {seed}: g = {slope:.2f}",
            xanchor="left",
            xshift=8,
            font={"color": ink if figures.contrast(ink) > 4.5 else figures.INK},
        )
        told.append(
            f"Seed {seed}, from {x[0]:g} to {x[-1]:g} epsilon: {losses[0]:.4f} at the left end, {at[-1.0]:.4f} and "
            f"{at[1.0]:.4f} at the probes, {at[0.0]:.4f} in the middle, {losses[-1]:.4f} at the right end; "
            f"slope {slope:.2f}."
        )
    ends = [p / epsilon for places, _ in slices.values() for p in places]
    fig.update_xaxes(range=[1.04 * min(ends), 1.04 * max(ends)])
    fig.update_layout(margin_r=170)
    figures.add_note(fig, f"one batch; large marks: the probes at ±{epsilon:g}, one epsilon, and their slope g")
    figures.spread_labels(fig)
    alt = f"Loss of one real batch along {len(slices)} random directions, with probes at plus and minus epsilon. "
    return fig, alt + " ".join(told)


def alignment_figure(found: Sequence[Alignment], seed: int = 0) -> Drawn:
    """Mean cosine between estimated and exact gradient against the number of perturbed weights, theory beside it."""
    fig = figures.new_figure(
        title="How well one estimate points", x="perturbed weights d (log scale)", y="mean cosine (log scale)"
    )
    d = np.array([a.dimension for a in found], dtype=float)
    line = np.geomspace(d.min(), d.max(), 50)
    grey = {"color": figures.SOFT_INK, "dash": "dash", "width": 2}
    fig.add_scatter(x=line, y=np.sqrt(2 / (np.pi * line)), mode="lines", line=grey, name="theory: √(2 / πd)")
    means = [bootstrap_interval(np.abs(a.cosines), seed=seed) for a in found]
    value, low, high = ([getattr(e, k) for e in means] for k in ("value", "low", "high"))
    look = figures.trace_style("mezo")
    bars = figures.error_bars(value, low, high, look["marker"]["color"])
    fig.add_scatter(x=d, y=value, error_y=bars, mode="markers", marker=look["marker"], name="measured")
    for place, (a, e) in enumerate(zip(found, means, strict=True)):
        side = {"y": np.log10(e.high), "yshift": 14} if place % 2 else {"y": np.log10(e.low), "yshift": -14}
        fig.add_annotation(x=np.log10(a.dimension), text=a.name, **side)
    figures.add_note(fig, f"95 % intervals over {len(found[0].cosines)} directions each; one batch")
    fig.update_layout(margin_t=110)  # room for the legend below the note
    fig.update_xaxes(type="log", exponentformat="power", dtick=1)
    fig.update_yaxes(type="log", exponentformat="power", dtick=1)
    said = "; ".join(
        f"{a.name}, {a.dimension:,} weights: {e.value:.1e} [{e.low:.1e}, {e.high:.1e}], theory {a.expected:.1e}"
        for a, e in zip(found, means, strict=True)
    )
    return fig, f"Mean cosine of estimate and gradient against dimension on log scales, falling. {said}."


def epsilon_figure(epsilons: Sequence[Number], errors: Sequence[Number]) -> Drawn:
    """Error of the two-point slope, relative to the exact one, against epsilon."""
    fig = figures.new_figure(
        title="How far to probe", x="epsilon (log scale)", y="error of the slope, share of it (log scale)"
    )
    look = figures.trace_style("mezo")
    fig.add_scatter(x=list(epsilons), y=list(errors), mode="lines+markers", showlegend=False, **look)
    figures.add_note(fig, "one direction over all weights, one batch; exact slope: backpropagation")
    fig.update_xaxes(type="log", exponentformat="power", dtick=1)
    fig.update_yaxes(type="log", exponentformat="power", dtick=1)
    said = "; ".join(f"{e:g}: {v:.2g}" for e, v in zip(epsilons, errors, strict=True))
    return fig, f"Relative error of the two-point slope against epsilon, log scales. {said}."


def memory_figure(table: pd.DataFrame, limit_mb: Number) -> Drawn:
    """Predicted peak memory of each method as stacked bars, one panel per batch size, the limit as a dashed line.

    ``table``: of :func:`~pllm_helpers.experiments.pocket_study.memory_table`.
    """
    batches = list(dict.fromkeys(table["batch"]))
    fig = make_subplots(
        rows=1,
        cols=len(batches),
        shared_yaxes=True,
        horizontal_spacing=0.06,
        subplot_titles=[f"Batch of {b}" for b in batches],
    )
    told, beside = [], {"xanchor": "left", "xshift": 4, "borderpad": 0, "bgcolor": figures.CARD}
    for column, batch in enumerate(batches, 1):
        part = table[table["batch"] == batch]
        names = [figures.method(m).name for m in part["method"]]
        for name, (colour, hatch) in PARTS.items():
            fig.add_bar(
                x=part[name],
                y=names,
                orientation="h",
                name=name,
                legendgroup=name,
                showlegend=column == 1,
                marker={
                    "color": figures.PALETTE.get(colour, colour),
                    "pattern": {"shape": hatch, "fgcolor": figures.CARD, "fillmode": "overlay", "size": 6},
                },
                row=1,
                col=column,
            )
        for name, total in zip(names, part["total"], strict=True):
            over = " over" if total > limit_mb else ""
            fig.add_annotation(x=total, y=name, text=f"{total:,.0f}{over}", **beside, row=1, col=column)
        dash = {"color": figures.INK, "dash": "dash", "width": 2}
        fig.add_vline(x=limit_mb, line=dash, row=1, col=column)
        fig.update_xaxes(
            range=[0, 1.28 * part["total"].max()], title_text="predicted MB above imports", row=1, col=column
        )
        totals = "; ".join(f"{n} {t:,.0f}" for n, t in zip(names, part["total"], strict=True))
        told.append(f"Batch of {batch}: {totals}.")
    fig.update_yaxes(autorange="reversed", type="category")
    fig.update_layout(
        template="pllm",
        barmode="stack",
        height=430,
        margin={"t": 100, "b": 60, "r": 20},
        legend={"y": 1.12, "traceorder": "normal"},
    )
    alt = f"Stacked bars of predicted peak memory in MB, the limit at {limit_mb:,.0f} MB as a dashed line. "
    return fig, alt + " ".join(told)


def timeline_figure(results: Mapping[str, EnvelopeResult], limit_mb: Number) -> Drawn:
    """Resident memory over time of runs in an envelope; a cross where one was killed."""
    fig = figures.new_figure(
        title="Memory in the envelope", x="seconds since the imports", y="MB above imports", height=400
    )
    figures.add_reference(fig, limit_mb, f"the limit: {limit_mb:,.0f} MB")
    told = []
    for key, r in results.items():
        m, look = figures.method(key), figures.trace_style(key)
        x, y = [s.seconds for s in r.timeline], [s.resident_mb for s in r.timeline]
        if not x:
            continue
        y[-1] = r.peak_mb if r.status == "killed" else y[-1]
        fig.add_scatter(x=x, y=y, mode="lines", line=look["line"], showlegend=False)
        killed = r.status == "killed"
        end = {"color": m.colour, "symbol": "x" if killed else "circle", "size": 12}
        fig.add_scatter(x=x[-1:], y=y[-1:], mode="markers", marker=end, showlegend=False)
        text = f"{m.name}: {'killed' if killed else 'finished'}"
        # a run that finished gives its memory back at the end: its name stands above the long stretch
        place = {"x": 0.97 * x[-1], "y": r.peak_mb, "yshift": 16, "xanchor": "right"}
        if killed:  # beside the cross, on the side with more room
            early = x[-1] < max(o.timeline[-1].seconds for o in results.values() if o.timeline) / 2
            place = {"x": x[-1], "y": y[-1], "xshift": 12 if early else -12, "xanchor": "left" if early else "right"}
        fig.add_annotation(text=text, font={"color": m.ink}, bgcolor=figures.CARD, **place)
        told.append(f"{m.name}: {r.status} after {x[-1]:.1f} s, peak {r.peak_mb:,.0f} MB.")
    fig.update_yaxes(rangemode="tozero")
    fig.update_xaxes(rangemode="tozero")
    return fig, f"Resident memory over time, a dashed line at the limit of {limit_mb:,.0f} MB. " + " ".join(told)


def curves_figure(trials: Sequence[Trial], what: str) -> Drawn:
    """Fall of the held-out loss against steps and against CPU seconds of training; seeds as a band.

    ``what`` names the held-out loss. Runs without looks are left out.
    """
    fig = make_subplots(
        rows=1,
        cols=2,
        shared_yaxes=True,
        horizontal_spacing=0.06,
        subplot_titles=("against steps", "against CPU seconds of training"),
    )
    told = []
    for key in dict.fromkeys(t.method for t in trials):
        mine = [t for t in trials if t.method == key and t.looks]
        if not mine:
            continue
        steps = [s for s, _ in mine[0].looks]
        values = np.array([[v for _, v in t.looks] for t in mine])
        seconds = np.mean([t.seconds() for t in mine], axis=0)
        look, m = figures.trace_style(key), figures.method(key)
        for column, x in ((1, steps), (2, list(seconds))):
            if len(mine) > 1:
                low, high = values.min(0), values.max(0)
                fig.add_scatter(
                    x=[*x, *x[::-1]],
                    y=[*high, *low[::-1]],
                    fill="toself",
                    fillcolor=figures.tint(m.colour, 0.18),
                    line={"width": 0},
                    mode="lines",
                    hoverinfo="skip",
                    showlegend=False,
                    row=1,
                    col=column,
                )
            fig.add_scatter(
                x=x,
                y=values.mean(0),
                mode="lines+markers",
                showlegend=column == 1,
                legendgroup=key,
                row=1,
                col=column,
                **look,
            )
        several = f"{len(mine)} {'seed' if len(mine) == 1 else 'seeds'}"
        told.append(
            f"{m.name}, {several}: {values[:, 0].mean():.3f} at the start, {values[:, -1].mean():.3f} after "
            f"{steps[-1]} steps and {seconds[-1]:.1f} CPU seconds."
        )
    fig.update_xaxes(title_text="step", rangemode="tozero", row=1, col=1)
    fig.update_xaxes(title_text="CPU seconds", rangemode="tozero", row=1, col=2)
    fig.update_yaxes(title_text="nats per token", row=1, col=1)
    legend = {"y": 1.13, "yanchor": "bottom"}
    fig.update_layout(template="pllm", height=460, margin={"r": 20, "b": 60}, legend=legend, title_text=what)
    rows, seeds = sorted({len(t.before) for t in trials}), len({t.seed for t in trials})
    band = f"{seeds} seeds, bands from the lowest to the highest" if seeds > 1 else "one seed"
    figures.add_note(fig, f"mean over {' and '.join(map(str, rows))} held-out rows; {band}")
    fig.update_layout(margin_t=140)
    return fig, f"{what}, two panels: against steps and against CPU seconds of training. " + " ".join(told)
