"""One look for every figure: template, colour per method, intervals, and text for those who cannot see it.

>>> from pllm_helpers import figures
>>> fig = figures.new_figure(x="dialogue sets seen", y="ROUGE-1")
>>> figures.add_series(fig, "quality", [800, 1600], [0.30, 0.31], low=[0.28, 0.29], high=[0.32, 0.33])
>>> figures.show(fig, alt="ROUGE-1 rises from 0.30 to 0.31 …")            # doctest: +SKIP

Importing this module makes ``"pllm"`` plotly's default template. The page under a figure is
always a white card, so that the same colours read in a light and in a dark JupyterLab.
"""

from __future__ import annotations

import html
import json
import math
import sys
import textwrap
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

import plotly.graph_objects as go
import plotly.io as pio
from plotly.basedatatypes import BaseFigure

from .runtime import InputError

# A FigureWidget imports jsonschema, which compiles dozens of grammars for an optional check of
# international addresses: a second per kernel for nothing. It does without if the import fails.
sys.modules.setdefault("rfc3987_syntax", None)

__all__ = [
    "CONFIG",
    "METHODS",
    "PALETTE",
    "Method",
    "add_band",
    "add_estimates",
    "add_note",
    "add_reference",
    "add_series",
    "contrast",
    "describe_html",
    "dodge",
    "error_bars",
    "figure_bundle",
    "method",
    "new_figure",
    "show",
    "spread_labels",
    "tint",
    "trace_style",
]

Values = Iterable[Any]  # a list, an array, a column of a data frame

PLOTLY_MIME = "application/vnd.plotly.v1+json"
FONT = "'Source Sans 3', 'Segoe UI', 'Helvetica Neue', Arial, 'Liberation Sans', sans-serif"
INK, SOFT_INK, GRID, CARD = "#1f2328", "#57606a", "#e1e4e8", "#ffffff"

# The five Okabe-Ito hues that keep 3:1 on white, and a wine red: any two stay at least 16 CIELAB
# units apart for people without red, green or blue cones (a test computes it).
PALETTE: Mapping[str, str] = MappingProxyType(
    {
        "blue": "#0072B2",
        "vermillion": "#D55E00",
        "green": "#009E73",
        "purple": "#CC79A7",
        "black": "#222222",
        "wine": "#882255",
    }
)

# Mode bar only on hover and without links off the machine; figures follow the width of the page.
CONFIG: Mapping[str, Any] = MappingProxyType(
    {"displaylogo": False, "responsive": True, "modeBarButtonsToRemove": ["lasso2d", "select2d"]}
)


@dataclass(frozen=True)
class Method:
    """How one method looks in every notebook: name, colour, line dash, marker and hatch.

    Dash and marker (lines) or hatch (bars) tell methods of one family apart without colour.
    """

    key: str
    name: str
    family: str
    colour: str
    dash: str = "solid"
    marker: str = "circle"
    hatch: str = ""

    @property
    def ink(self) -> str:
        """The colour, darkened until text in it has contrast 4.5:1 on white (WCAG AA)."""
        return _darken(self.colour, 4.5)


def _table() -> dict[str, Method]:
    looks = (
        ("solid", "circle", ""),
        ("dash", "square", "/"),
        ("dot", "diamond", "."),
        ("dashdot", "triangle-up", "x"),
        ("longdash", "cross", "-"),
        ("longdashdot", "star", "\\"),
    )
    families: dict[str, list[tuple[str, str, str]]] = {
        "metric": [("eoe", "EOE", "blue"), ("dss", "DSS", "vermillion"), ("idd", "IDD", "green")],
        "reading": [
            ("norm", "norm", "black"),
            ("spectral", "spectral", "blue"),
            ("histogram", "histogram", "vermillion"),
        ],
        "policy": [
            ("quality", "Quality (EOE, DSS, IDD)", "blue"),
            ("random", "Random replace", "black"),
            ("fifo", "FIFO replace", "vermillion"),
            ("kcenter", "K-Center", "green"),
            ("combined", "Combined score", "purple"),
            ("facility", "Facility location", "wine"),
        ],
        "ablation": [
            ("eoe_only", "EOE only", "blue"),
            ("dss_only", "DSS only", "vermillion"),
            ("idd_only", "IDD only", "green"),
            ("released_code", "Quality, released code", "wine"),
        ],
        "tuning": [
            ("base", "Base model", "black"),
            ("lora", "LoRA", "blue"),
            ("mezo", "MeZO", "vermillion"),
            ("lomo", "LOMO", "green"),
            ("adam", "Adam, all weights", "wine"),
            ("rag", "Retrieval", "purple"),
        ],
        "pocket": [
            ("mezo_lora", "MeZO inside LoRA", "purple"),
            ("sgd", "SGD, all weights", "black"),
            ("lora_checkpointed", "LoRA, checkpointed", "blue"),
            ("lora_streamed", "LoRA, streamed", "wine"),
            ("adalomo", "AdaLomo", "green"),
        ],
        "device": [
            ("bf16", "16 bits", "black"),
            ("int8", "int8", "blue"),
            ("int4", "int4", "vermillion"),
            ("both", "LoRA and retrieval", "green"),
        ],
        "search": [
            ("xpert", "XPerT", "blue"),
            ("exhaustive", "Exhaustive search", "black"),
            ("bo", "Bayesian optimisation", "vermillion"),
            ("hyperband", "HyperBand", "green"),
        ],
        "lexicon": [
            ("medical", "medical", "blue"),
            ("emotion", "emotion", "vermillion"),
            ("cluster", "word cluster", "green"),
        ],
        "source": [("paper", "Paper", "black"), ("ours", "This run", "blue"), ("released", "Released code", "wine")],
    }
    table = {}
    for family, members in families.items():
        # the ablation shares figures with the policies: other dashes and markers than theirs
        own = looks[3:] + looks[:3] if family == "ablation" else looks
        for (key, name, colour), (dash, marker, hatch) in zip(members, own, strict=False):
            table[key] = Method(key, name, family, PALETTE[colour], dash, marker, hatch)
    return table


METHODS: Mapping[str, Method] = MappingProxyType(_table())


def method(key: str) -> Method:
    """Look a method up by key or by its name, upper or lower case.

    Raises :class:`InputError` for a method without a fixed look.
    """
    wanted = key.strip().lower()
    found = METHODS.get(wanted) or next((m for m in METHODS.values() if m.name.lower() == wanted), None)
    if found is None:
        raise InputError("method", f"expected one of {', '.join(METHODS)}, got {key!r}")
    return found


def trace_style(key: str, kind: Literal["line", "bar"] = "line") -> dict[str, Any]:
    """Keyword arguments that give a plotly trace a method's name and look.

    ``go.Scatter(x=x, y=y, **trace_style("lora"))``; ``kind="bar"`` for bars and histograms.
    """
    m = method(key)
    if kind == "bar":
        pattern = {"shape": m.hatch, "fgcolor": CARD, "fillmode": "overlay", "size": 7, "solidity": 0.25}
        return {"name": m.name, "marker": {"color": m.colour, "pattern": pattern}}
    return {
        "name": m.name,
        "line": {"color": m.colour, "dash": m.dash, "width": 2.5},
        "marker": {"color": m.colour, "symbol": m.marker, "size": 8},
    }


def _template() -> go.layout.Template:
    axis = {
        "automargin": True,
        "gridcolor": GRID,
        "linecolor": SOFT_INK,
        "showline": True,
        "tickcolor": SOFT_INK,
        "ticks": "outside",
        "tickfont": {"size": 14},
        "title": {"font": {"size": 16}, "standoff": 10},
        "zeroline": False,
    }
    return go.layout.Template(
        data={"heatmap": [go.Heatmap(colorscale="Cividis", colorbar={"outlinewidth": 0})]},
        layout={
            "autosize": True,
            "colorway": list(PALETTE.values()),
            "font": {"family": FONT, "size": 15, "color": INK},
            "title": {"font": {"size": 18}, "x": 0, "xref": "paper", "xanchor": "left"},
            "paper_bgcolor": CARD,
            "plot_bgcolor": CARD,
            "margin": {"l": 70, "r": 30, "t": 60, "b": 60},
            "height": 420,
            "hoverlabel": {"font": {"size": 15, "color": INK}, "bgcolor": CARD, "bordercolor": SOFT_INK},
            "legend": {"font": {"size": 14}, "orientation": "h", "yanchor": "bottom", "y": 1.0, "x": 0},
            "annotationdefaults": {"font": {"size": 15}, "showarrow": False},
            "colorscale": {"sequential": "Cividis", "diverging": "PuOr"},
            "xaxis": axis,
            "yaxis": axis,
        },
    )


pio.templates["pllm"] = _template()
pio.templates.default = "pllm"


def new_figure(*, title: str = "", x: str = "", y: str = "", height: int = 420, **layout: Any) -> go.Figure:
    """An empty figure in the house look; ``x`` and ``y`` title the axes, with their unit."""
    fig = go.Figure(layout={"template": "pllm", "height": height, **layout})
    if title:
        fig.update_layout(title_text=html.escape(title))
    else:
        fig.update_layout(margin_t=30)
    fig.update_xaxes(title_text=html.escape(x))
    fig.update_yaxes(title_text=html.escape(y))
    return fig


def error_bars(value: Values, low: Values, high: Values, colour: str = INK) -> dict[str, Any]:
    """``error_y`` or ``error_x`` of plotly for intervals given by their ends.

    Raises :class:`InputError` if lengths differ or an end lies on the wrong side of its value.
    """
    value, low, high = list(value), list(low), list(high)
    if not len(value) == len(low) == len(high):
        raise InputError("interval", f"expected equal lengths, got {len(value)}, {len(low)} and {len(high)}")
    for v, lo, hi in zip(value, low, high, strict=True):
        if not lo <= v <= hi:
            raise InputError("interval", f"expected low <= value <= high, got {lo}, {v}, {hi}")
    return {
        "type": "data",
        "symmetric": False,
        "array": [hi - v for v, hi in zip(value, high, strict=True)],
        "arrayminus": [v - lo for v, lo in zip(value, low, strict=True)],
        "thickness": 2,
        "width": 6,
        "color": colour,  # never that of the marks: plotly cannot take it over where each has its own
    }


def add_band(fig: BaseFigure, x: Values, low: Values, high: Values, colour: str) -> BaseFigure:
    """Shade the interval between ``low`` and ``high``, each of shape ``(len(x),)``."""
    x, low, high = list(x), list(low), list(high)
    if not len(x) == len(low) == len(high):
        raise InputError("band", f"expected equal lengths, got {len(x)}, {len(low)} and {len(high)}")
    return fig.add_scatter(
        x=[*x, *reversed(x)],
        y=[*high, *reversed(low)],
        fill="toself",
        fillcolor=tint(colour, 0.18),
        line={"width": 0},
        hoverinfo="skip",
        mode="lines",
        showlegend=False,
    )


def add_series(
    fig: BaseFigure,
    key: str,
    x: Values,
    y: Values,
    *,
    low: Values | None = None,
    high: Values | None = None,
    interval: Literal["band", "bars"] = "band",
    label: str | None = None,
) -> BaseFigure:
    """Draw one method as a line with markers, its interval, and its name at the last point.

    ``low`` and ``high`` are the ends of the intervals, shape ``(len(x),)`` like ``y``; ``label``
    replaces the method's own name, ``""`` draws none.
    """
    x, y = list(x), list(y)
    if len(x) != len(y) or not x:
        raise InputError("series", f"expected x and y of one length, at least 1, got {len(x)} and {len(y)}")
    m, style = method(key), trace_style(key)
    if (low is None) != (high is None):
        raise InputError("interval", "expected both low and high or neither")
    if low is not None and high is not None:
        bars = error_bars(y, low, high, m.colour)  # checks the interval in both cases
        if interval == "band":
            add_band(fig, x, low, high, m.colour)
        else:
            style["error_y"] = bars
    fig.add_scatter(x=x, y=y, mode="lines+markers", showlegend=False, **style)
    text = m.name if label is None else label
    if text:
        fig.add_annotation(x=x[-1], y=y[-1], text=html.escape(text), font={"color": m.ink}, xanchor="left", xshift=10)
        # room at the right for the longest label: about 8.5 px a character at 15 px
        fig.update_layout(margin_r=max(fig.layout.margin.r or 30, int(8.5 * len(text)) + 20))
    return fig


def add_estimates(fig: BaseFigure, estimates: Mapping[str, Any], *, digits: int = 3) -> BaseFigure:
    """One row per estimate: a dot, its 95 % interval, and the numbers written beside it.

    ``estimates`` maps a method's key, or any other label, to an object with ``value``, ``low``
    and ``high`` (:class:`~pllm_helpers.evaluation.Estimate`). Rows stand in the order given,
    the first on top; labels without a fixed look share one.
    """
    if not estimates:
        raise InputError("estimates", "expected at least one, got none")
    free = METHODS["ours"]
    for key, e in estimates.items():
        m = METHODS.get(key) or Method(key, key, "free", free.colour, marker="circle")
        text = f"{e.value:.{digits}g}"
        if e.low != e.high:
            text += f" [{e.low:.{digits}g}, {e.high:.{digits}g}]"
        fig.add_scatter(
            x=[e.value],
            y=[html.escape(m.name)],
            error_x=error_bars([e.value], [e.low], [e.high], m.colour),
            mode="markers",
            name=m.name,
            marker={"color": m.colour, "symbol": m.marker, "size": 11},
            showlegend=False,
            hovertemplate=f"{html.escape(m.name)}: {text}<extra></extra>",
        )
        fig.add_annotation(x=e.high, y=html.escape(m.name), text=text, xanchor="left", xshift=12, font={"color": m.ink})
    fig.update_yaxes(autorange="reversed", type="category", title_text="")
    fig.update_layout(margin_r=max(fig.layout.margin.r or 30, 190))
    return fig


def add_reference(fig: BaseFigure, y: float | int, text: str) -> BaseFigure:
    """A dashed grey line across the figure with its meaning written on it."""
    return fig.add_hline(
        y=y,
        line={"color": SOFT_INK, "dash": "dash", "width": 1.5},
        annotation={"text": html.escape(text), "font": {"color": SOFT_INK, "size": 14}},
    )


def add_note(fig: BaseFigure, text: str) -> BaseFigure:
    """A line below the title: what an interval is, how many rows and seeds are behind the figure."""
    lines = textwrap.wrap(text, 100) or [""]
    note = {"text": "<br>".join(html.escape(line) for line in lines), "font": {"size": 14, "color": SOFT_INK}}
    fig.update_layout(
        title_subtitle=note, margin_t=66 + 18 * len(lines), title_y=1, title_yanchor="top", title_pad_t=14
    )
    return fig


def dodge(fig: BaseFigure, share: float | int = 0.011) -> BaseFigure:
    """Move lines sideways by ``share`` of the width each, so that their error bars do not hide each other.

    Names at the ends of lines move along, also to where a logarithmic axis wants them. Call it once
    the type of the x axis is set, and before :func:`spread_labels`.
    """
    lines = [t for t in fig.data if t.mode == "lines+markers" and t.x is not None and len(t.x)]
    if not lines:
        return fig
    every = [float(x) for t in lines for x in t.x]
    log = fig.layout.xaxis.type == "log"
    width = math.log(max(every) / min(every)) if log else max(every) - min(every)
    for k, line in enumerate(lines):
        step = (k - (len(lines) - 1) / 2) * share * width
        line.x = [float(x) * math.exp(step) if log else float(x) + step for x in line.x]
    end = max(float(x) for t in lines for x in t.x)
    for label in fig.layout.annotations:
        if label.xanchor == "left" and label.xref in (None, "x"):
            label.x = math.log10(end) if log else end
    return fig


def spread_labels(fig: BaseFigure, gap: float | int = 19) -> BaseFigure:
    """Move the names at the ends of lines apart where they would overlap: at least ``gap`` pixels.

    Fixes the y axis to the range of the data, intervals included; call it last.
    """
    ends: list[float] = []
    for trace in fig.data:
        y = [float(v) for v in (trace.y if trace.y is not None else ()) if v is not None]
        bars = getattr(trace, "error_y", None)
        up, down = ([*y] for _ in range(2))
        if bars is not None and bars.array is not None:
            up = [v + float(d) for v, d in zip(y, bars.array, strict=True)]
            down = [v - float(d) for v, d in zip(y, bars.arrayminus, strict=True)]
        ends += [*up, *down]
    if not ends:
        return fig
    pad = 0.06 * (max(ends) - min(ends) or 1)
    low, high = min(ends) - pad, max(ends) + pad
    fig.update_yaxes(range=[low, high])
    margin = fig.layout.margin
    height = (
        (fig.layout.height or 420) - (60 if margin.t is None else margin.t) - (60 if margin.b is None else margin.b)
    )
    scale = height / (high - low)
    labels = sorted((a for a in fig.layout.annotations if a.xanchor == "left" and a.yref in (None, "y")), key=_place)
    # the nearest places in the same order: isotonic regression of what is left after taking the gaps out
    blocks: list[list[float]] = []
    for i, label in enumerate(labels):
        blocks.append([float(label.y) * scale - i * gap, 1.0])
        while len(blocks) > 1 and blocks[-2][0] > blocks[-1][0]:
            (a, m), (b, n) = blocks[-2:]
            blocks[-2:] = [[(a * m + b * n) / (m + n), m + n]]
    wanted = [mean for mean, count in blocks for _ in range(int(count))]
    for i, (label, place) in enumerate(zip(labels, wanted, strict=True)):
        label.yshift = place + i * gap - float(label.y) * scale
        label.bgcolor = CARD  # a reference line must not strike the text out
    return fig


def _place(label: Any) -> float:
    return float(label.y)


def show(fig: BaseFigure, alt: str, caption: str | None = None) -> None:
    """Display a figure with a text alternative that stays in the notebook.

    Two outputs: the plotly figure, with ``alt`` in its metadata (exports read it there), and
    below it the caption and a *Describe this figure* fold for screen readers and for whoever
    gets the notebook without the figure.

    Parameters
    ----------
    fig : a figure; not a ``FigureWidget``, which displays itself.
    alt : what someone who cannot see the figure needs to know: kind, axes, the pattern, numbers.
    caption : a sentence that reads the figure; shown to everybody.

    Raises :class:`InputError` if ``alt`` is blank or ``fig`` is not a plain figure.
    """
    from IPython.display import publish_display_data

    if not isinstance(fig, go.Figure):
        raise InputError("fig", f"expected a plotly Figure, got {type(fig).__name__}")
    alt = " ".join(str(alt).split())
    if not alt:
        raise InputError("alt", "expected a text that tells what the figure shows, got none")
    publish_display_data(
        {PLOTLY_MIME: figure_bundle(fig), "text/plain": f"[Figure] {alt}"},
        metadata={PLOTLY_MIME: {"alt": alt}, "alt": alt},
    )
    publish_display_data(
        {"text/html": describe_html(alt, caption), "text/plain": (caption or "").strip() or "[description above]"},
        metadata={"pllm": "figure-description"},
    )


def figure_bundle(fig: BaseFigure) -> dict[str, Any]:
    """What the plotly mime type carries: data, layout and configuration as plain JSON."""
    return {**json.loads(pio.to_json(fig, validate=False)), "config": dict(CONFIG)}


def describe_html(alt: str, caption: str | None = None) -> str:
    """Caption and folded description as HTML, everything escaped."""
    line = f'<p class="pllm-caption" style="margin:4px 0">{html.escape(caption.strip())}</p>' if caption else ""
    return (
        f'<div class="pllm-figure-text">{line}<details class="pllm-alt"><summary>Describe this figure</summary>'
        f'<p style="margin:4px 0 0 1em;max-width:48em">{html.escape(alt)}</p></details></div>'
    )


def tint(colour: str, alpha: float | int) -> str:
    """A ``#rrggbb`` colour as ``rgba(…)`` with opacity ``alpha`` in [0, 1]."""
    r, g, b = _rgb(colour)
    return f"rgba({r},{g},{b},{alpha:g})"


def contrast(colour: str, background: str = CARD) -> float:
    """WCAG 2 contrast ratio of two ``#rrggbb`` colours, 1 to 21."""
    high, low = sorted((_luminance(colour), _luminance(background)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def _rgb(colour: str) -> tuple[int, int, int]:
    return int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:7], 16)


def _luminance(colour: str) -> float:
    def linear(c: float) -> float:
        return c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4

    r, g, b = (linear(c / 255) for c in _rgb(colour))
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


def _darken(colour: str, ratio: float) -> str:
    channels: Iterable[float] = _rgb(colour)
    while contrast(colour) < ratio:
        channels = [c * 0.97 for c in channels]
        colour = "#" + "".join(f"{round(c):02X}" for c in channels)
    return colour
