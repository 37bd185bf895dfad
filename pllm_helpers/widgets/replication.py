"""Notebook 05: look at the measured cells from every side: scores or paired differences, curves, sizes, ablation."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import ipywidgets
import plotly.graph_objects as go

from .. import figures
from ..evaluation import Estimate
from ..experiments import replication
from ..experiments.policy_study import ALL_POLICIES, Study
from ..runtime import InputError
from .base import Explorable
from .controls import Checks, Region, esc

__all__ = ["ReplicationExplorer", "Row", "Shown", "replication_explorer"]


@dataclass(frozen=True)
class View:
    """A question: the studies that can answer it, in order of preference, and the title of its axis."""

    studies: tuple[str, ...]
    axis: str = ""


VIEWS: Mapping[str, View] = {
    "End of the stream": View(("policy_comparison", "metric_ablation", "released_code_gap")),
    "Learning curves": View(("learning_curve",), "dialogue sets streamed"),
    "Buffer sizes": View(("buffer_size_sweep",), "buffer, in bins of 22 KB"),
    "Synthesised sets": View(("synthesis_sweep",), "synthesised sets per buffered one"),
    "Ablation": View(("metric_ablation", "policy_comparison", "released_code_gap")),
}
ABLATION = ("quality", *replication.ALONE, "released_code")
ALL, BOTH, RECORDED, LIVE = "All streams", "Recorded and live", "Recorded", "Live"


@dataclass(frozen=True)
class Row:
    """One estimate: policy, origin (``"recorded"`` or ``"live"``), place on the axis (``None`` without one)."""

    policy: str
    origin: str
    x: int | None
    estimate: Estimate

    @property
    def name(self) -> str:
        """The policy's name, with its origin where that is not the committed table."""
        name = figures.METHODS[self.policy].name
        return f"{name} · live" if self.origin == "live" else name


@dataclass(frozen=True)
class Shown:
    """What the widget shows: rows, what was asked for and is not there, and how to get it."""

    view: str
    stream: str
    metric: str
    reference: str
    rows: list[Row]
    missing: list[str] = field(default_factory=list)
    sources: list[str] = field(default_factory=list)

    @property
    def axis(self) -> str:
        """Title of the axis of values."""
        m = replication.METRICS[self.metric]
        what = f"{m.name}, {m.unit}" if m.unit else m.name
        return f"{what}, minus {figures.METHODS[self.reference].name}" if self.reference else what

    @property
    def direction(self) -> str:
        """Which values are better; blank where neither is."""
        words = {1: ("higher", "above 0"), -1: ("lower", "below 0"), 0: ("", "")}
        word = words[replication.METRICS[self.metric].better][bool(self.reference)]
        return f"{word} is better" if word else ""


class ReplicationExplorer(Explorable):
    """Learning curves, buffer sizes, synthesis counts and ablation with intervals, from the cells themselves."""

    title = "The measured cells, from every side"
    help = (
        "Every mean and interval is computed from the cells when you choose. Filled marks: recorded in a table; "
        "open marks: measured in this notebook."
    )
    studies: Mapping[str, Study]
    live_studies: Mapping[str, Study]

    def build(self) -> tuple[dict[str, ipywidgets.Widget], list[ipywidgets.Widget]]:
        everything = [*self.studies.values(), *self.live_studies.values()]
        streams = list(dict.fromkeys(s for study in everything for s in study.streams))
        known = [p for p in (*ALL_POLICIES, "base") if any(p in study.policies for study in everything)]
        names = [(figures.METHODS[p].name, p) for p in known]
        first = [p for p in ("quality", *replication.BASELINES, "combined", "facility", "base") if p in known]
        origin = BOTH if self.studies and self.live_studies else LIVE if self.live_studies else RECORDED
        self.view_of = ipywidgets.Dropdown(options=[*VIEWS], description="Show")
        controls = {
            "view": self.view_of,
            "stream": ipywidgets.Dropdown(options=[ALL, *streams], value=(streams or [ALL])[0], description="Stream"),
            "metric": ipywidgets.Dropdown(
                options=[(m.name, key) for key, m in replication.METRICS.items()], description="Metric"
            ),
            "reference": ipywidgets.Dropdown(
                options=[("nothing (scores)", ""), *names], value="", description="Compare with"
            ),
            "origin": ipywidgets.Dropdown(options=[BOTH, RECORDED, LIVE], value=origin, description="Cells"),
            "policies": Checks("Policies", [(p, n) for n, p in names], first).add_class("pllm-wide"),
        }
        self.view_of.observe(self._viewed, names="value")
        self.plot, self.table, self.described = self._empty_plot(), Region(), Region()
        self.told = Region(kind="pllm-help")
        return controls, [self.plot, self.told, self.table, self.described]

    # -- computing ------------------------------------------------------------------------------
    def compute(
        self, view: str, stream: str, metric: str, reference: str, origin: str, policies: Sequence[str]
    ) -> Shown:
        asked = [p for p in policies if p != reference]
        if self.studies or self.live_studies:
            if not asked:
                raise InputError(
                    "Policies", "expected at least one other than the reference, got none", "Check a policy."
                )
        rows: list[Row] = []
        missing, sources = [], []
        for mark, word, there in (("recorded", RECORDED, self.studies), ("live", LIVE, self.live_studies)):
            if origin not in (word, BOTH):
                continue
            study = self._study(there, view, asked, reference)
            if study is None:
                if not (mark == "live" and there == {} and origin == BOTH):
                    missing.append(f"{word}: {self._how(view, mark)}")
                continue
            found, gaps = self._rows(study, mark, VIEWS[view].axis, stream, metric, reference, asked)
            rows += found
            if gaps:
                missing.append(f"{word}: not measured here: {', '.join(gaps)}")
            if found:
                sources.append(f"{word}: {study.name}, {len(study.cells)} of {study.planned} cells")
        rows.sort(key=lambda r: (asked.index(r.policy), r.origin == "live"))  # stable: levels stay in order
        return Shown(view, stream, metric, reference, rows, missing, sources)

    def _study(self, there: Mapping[str, Study], view: str, asked: Sequence[str], reference: str) -> Study | None:
        """The study of this view that holds most of the policies asked for."""
        found = [there[name] for name in VIEWS[view].studies if name in there]
        wanted = {*asked, reference} - {""}
        return max(found, key=lambda s: len(wanted & set(s.policies)), default=None)

    def _rows(
        self, study: Study, mark: str, axis: str, stream: str, metric: str, reference: str, asked: Sequence[str]
    ) -> tuple[list[Row], list[str]]:
        where = None if stream == ALL else stream
        rows: list[Row] = []
        gaps: list[str] = []
        for policy in asked:
            try:
                if axis and policy != "base":
                    c = replication.curve(study, where, policy, metric, against=reference or None)
                    rows += [Row(policy, mark, x, e) for x, e in zip(c.x, c.estimates, strict=True)]
                elif axis and reference and reference != "base":
                    gaps.append(figures.METHODS[policy].name)  # one base model, many levels of the other
                else:
                    e = study.estimate(metric, where, policy, against=reference or None)
                    rows += [Row(policy, mark, x, e) for x in (study.levels() if axis else (None,))]
            except InputError:
                gaps.append(figures.METHODS[policy].name)
        return rows, gaps

    @staticmethod
    def _how(view: str, mark: str) -> str:
        """What is missing and the command that makes it."""
        name = VIEWS[view].studies[0]
        return f"no {name} in this notebook" if mark == "live" else replication.how_to_measure(name)

    # -- events ---------------------------------------------------------------------------------
    def _viewed(self, change: Any) -> None:
        """The ablation is about other policies: check those; going back restores what was checked."""
        if change["new"] == "Ablation" and change["old"] != "Ablation":
            self._before = list(self.controls["policies"].value)
            wanted = list(ABLATION)
        elif change["old"] == "Ablation" and hasattr(self, "_before"):
            wanted = self._before
        else:
            return
        if not self._hold:
            with self.held():
                self.controls["policies"].value = wanted

    # -- drawing --------------------------------------------------------------------------------
    def draw(self, result: Shown) -> None:
        figure = self.picture(result)
        self.plot.data = ()
        self.plot.layout = figure.layout
        self.plot.add_traces(list(figure.data))
        self.told.html = "".join(f"<p>{esc(line)}</p>" for line in (*result.sources, *result.missing))
        self.table.html = self._table_html(result)
        self.described.html = figures.describe_html(self.describe(result))

    def announce(self, result: Shown) -> str:
        if not result.rows:
            return f"{result.view}, {result.stream}: nothing measured."
        best = self._best(result)
        text = (
            f"{result.view}, {result.stream}, {replication.METRICS[result.metric].name}: {len(result.rows)} estimates"
        )
        return text + (f"; best {best.name}, {best.estimate.value:.3f}." if best else ".")

    def summary(self, result: Shown) -> str:
        if not result.rows:
            return "".join(f"<p>{esc(line)}</p>" for line in result.missing) or "<p>Nothing measured yet.</p>"
        head = f"<p>{esc(self._headline(result))}</p>"
        return head + self._table_html(result)

    def figure(self, result: Shown) -> tuple[go.Figure, str]:
        return self.picture(result), self.describe(result)

    def describe(self, result: Shown) -> str:
        """The figure in words."""
        if not result.rows:
            return f"An empty figure: {result.view} of {result.stream} was not measured."
        parts = [self._headline(result)]
        names = list(dict.fromkeys(r.name for r in result.rows))
        for name in names:
            own = [r for r in result.rows if r.name == name]
            texts = [f"{'' if r.x is None else f'at {r.x} '}{_number(r.estimate)}" for r in own]
            parts.append(f"{name}: {', '.join(texts)}.")
        return " ".join(parts)

    def _headline(self, result: Shown) -> str:
        side = f", {result.direction}" if result.direction else ""
        return f"{result.view} of {result.stream}, {result.axis}{side}. {self._note(result)}."

    def _best(self, result: Shown) -> Row | None:
        better = replication.METRICS[result.metric].better
        return max(result.rows, key=lambda r: better * r.estimate.value) if better and result.rows else None

    def _note(self, result: Shown) -> str:
        origins = dict.fromkeys(r.origin for r in result.rows)
        groups = {o: [r.estimate for r in result.rows if r.origin == o] for o in origins}
        return replication.what_is_behind(groups, paired=bool(result.reference))

    def _table_html(self, result: Shown) -> str:
        if not result.rows:
            return ""
        axis = VIEWS[result.view].axis
        heads = ["Policy", *([axis.capitalize()] if axis else []), "Value", "95 % interval", "n", "Seeds", "Cells"]
        sides = ["", *[' class="num"'] * (len(heads) - 2), ""]
        head = "".join(f'<th scope="col"{side}>{esc(h)}</th>' for h, side in zip(heads, sides, strict=True))
        body = []
        for r in result.rows:
            e = r.estimate
            cells = [*([f"{r.x}"] if axis else []), f"{e.value:.4f}"]
            cells += [_interval(e), f"{e.n}", f"{len(e.seeds)}"]
            numbers = "".join(f'<td class="num">{esc(c)}</td>' for c in cells)
            name = esc(figures.METHODS[r.policy].name)
            body.append(f'<tr><th scope="row">{name}</th>{numbers}<td>{esc(r.origin)}</td></tr>')
        return (
            f'<table class="pllm-table" data-rows="{len(body)}"><thead><tr>{head}</tr></thead>'
            f"<tbody>{''.join(body)}</tbody></table>"
        )

    def _empty_plot(self) -> go.FigureWidget:
        plot = go.FigureWidget(figures.new_figure())
        plot._config = {**plot._config, **figures.CONFIG, "displayModeBar": False}
        return plot

    def picture(self, result: Shown) -> go.Figure:
        """The figure of a state: dots with intervals, or lines along the axis.

        The page keeps whatever a new layout does not name, so every state names the same things: two
        linear axes with their ranges and ticks, one line of no difference and one text, shown or not.
        """
        axis = VIEWS[result.view].axis
        height = 470 if axis else 190 + 34 * len({r.name for r in result.rows})
        fig = figures.new_figure(title=f"{result.view}: {result.stream}", height=height if result.rows else 220)
        some = bool(result.rows)
        text = "" if some else "Not measured yet; see the line below."
        fig.add_annotation(text=text, x=0.5, y=0.5, xref="paper", yref="paper", visible=not some)
        plain = {"type": "linear", "autorange": False, "range": [0, 1], "tickmode": "auto", "visible": some}
        fig.update_layout(xaxis=plain, yaxis=plain)
        zero = {"color": figures.SOFT_INK, "dash": "dash", "width": 1.5}
        if not some:
            fig.add_hline(y=0, line=zero, visible=False)
            return fig
        ends = [end for r in result.rows for end in (r.estimate.low, r.estimate.high)] + [0.0] * bool(result.reference)
        pad = 0.06 * (max(ends) - min(ends) or 1)
        span = [min(ends) - pad, max(ends) + pad]
        if axis:
            self._draw_lines(fig, result)
            fig.add_hline(y=0, line=zero, visible=bool(result.reference))
            fig.update_xaxes(title_text=axis).update_yaxes(title_text=result.axis, range=span)
            figures.spread_labels(figures.dodge(fig, share=0.012))
        else:
            self._draw_dots(fig, result)
            fig.add_vline(x=0, line=zero, visible=bool(result.reference))
            fig.update_xaxes(title_text=result.axis, range=span).update_yaxes(title_text="")
        return figures.add_note(fig, f"{self._note(result)}; {result.direction}".removesuffix("; "))

    def _draw_dots(self, fig: go.Figure, result: Shown) -> None:
        for place, r in enumerate(result.rows):
            m, e, live = figures.METHODS[r.policy], r.estimate, r.origin == "live"
            fig.add_scatter(
                x=[e.value],
                y=[place],
                error_x=figures.error_bars([e.value], [e.low], [e.high], m.colour),
                mode="markers",
                name=r.name,
                marker={"color": m.colour, "symbol": m.marker + ("-open" if live else ""), "size": 12},
                marker_line={"width": 3 if live else 0, "color": m.colour},
                showlegend=False,
                hovertemplate=f"{html.escape(r.name)}: {_number(e)}<extra></extra>",
            )
        names = [html.escape(r.name) for r in result.rows]
        ticks = {"tickmode": "array", "tickvals": list(range(len(names))), "ticktext": names}
        fig.update_yaxes(range=[len(names) - 0.5, -0.5], **ticks)

    def _draw_lines(self, fig: go.Figure, result: Shown) -> None:
        levels = sorted({r.x for r in result.rows if r.x is not None})
        for policy, origin in dict.fromkeys((r.policy, r.origin) for r in result.rows):
            own = [r for r in result.rows if (r.policy, r.origin) == (policy, origin)]
            c = replication.Curve([levels.index(r.x or 0) for r in own], [r.estimate for r in own])
            figures.add_series(fig, policy, **c.drawn, interval="bars", label=own[0].name)
            fig.data[-1].name = own[0].name
            if origin == "live":
                fig.data[-1].marker.symbol = f"{figures.METHODS[policy].marker}-open"
        ticks = {"tickmode": "array", "tickvals": list(range(len(levels))), "ticktext": [str(x) for x in levels]}
        fig.update_xaxes(range=[-0.25, len(levels) - 0.75], **ticks)


def _number(e: Estimate) -> str:
    return f"{e.value:.3f} {_interval(e)}" if e.low != e.high else f"{e.value:.3f} (no interval)"


def _interval(e: Estimate) -> str:
    return f"[{e.low:.3f}, {e.high:.3f}]" if e.low != e.high else "–"


def replication_explorer(studies: Mapping[str, Study], live: Mapping[str, Study] | None = None) -> ReplicationExplorer:
    """Choose a question, a stream, a metric and policies; scores or paired differences from one of them.

    Parameters
    ----------
    studies : recorded tables by name, see :func:`~pllm_helpers.experiments.replication.recorded`.
    live : studies measured in this session, by the same names; drawn with open marks.

    Raises :class:`~pllm_helpers.runtime.InputError` for a name that no view knows.
    """
    known = {name for view in VIEWS.values() for name in view.studies}
    for name in (*studies, *(live or {})):
        if name not in known:
            raise InputError("studies", f"expected names among {', '.join(sorted(known))}, got {name!r}")
    return ReplicationExplorer(studies=dict(studies), live_studies=dict(live or {}))
