"""Notebook 06: one MeZO step on a real loss slice, and the memory of each method in a phone's envelope."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ipywidgets
import plotly.graph_objects as go
import torch
from plotly.subplots import make_subplots

from .. import figures
from ..device import EnvelopeResult, PhoneEnvelope, Sample, measure_memory, predict_memory
from ..dialogue import DialogueSet
from ..experiments.pocket_study import LIMIT_MB, MEMORY_METHODS, TUNERS, Surface
from ..models import LLM
from ..runtime import InputError
from ..tuning.data import token_rows
from .base import Explorable, Latest, from_page
from .controls import Region, Slider, esc

__all__ = ["EnvelopeTry", "PocketLab", "Step", "pocket_lab"]

Number = float | int
EPSILONS = {"0.00001": 1e-5, "0.0001": 1e-4, "0.001 (MeZO's)": 1e-3, "0.01": 1e-2, "0.03": 3e-2}
RATES = {"0.000001 (MeZO's)": 1e-6, "0.00001": 1e-5, "0.0001": 1e-4, "0.001": 1e-3}
NOISES = {"signs (quick)": "rademacher", "Gaussian (MeZO's)": "gaussian"}
PLACES = (-2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0)  # in units of epsilon
ADAPTERS = ("lora", "lora_checkpointed", "lora_streamed", "mezo_lora")


@dataclass(frozen=True)
class Step:
    """One MeZO step on one batch: the loss along z, the two probes, the slope, and where the step leads.

    ``places`` along z, ``losses`` there; ``slope`` = (L₊ - L₋) / 2ε; ``step`` = -lr · slope, a place
    along z, and ``after`` the loss there.
    """

    seed: int
    epsilon: float
    rate: float
    noise: str
    places: tuple[float, ...]
    losses: tuple[float, ...]
    slope: float
    step: float
    after: float

    def at(self, place: Number) -> float:
        """Loss at ``place`` (in units of epsilon), one of those measured."""
        return self.losses[PLACES.index(place)]

    @property
    def change(self) -> float:
        """What the step does to the loss of this batch."""
        return self.after - self.at(0.0)

    def __str__(self) -> str:
        return (
            f"Seed {self.seed}: probes {self.at(1.0):.5f} and {self.at(-1.0):.5f}, slope {self.slope:.3f}, "
            f"loss {self.at(0.0):.5f} before the step and {self.after:.5f} after it"
        )


@dataclass(frozen=True)
class EnvelopeTry:
    """One method in one envelope, with what was predicted."""

    number: int
    method: str
    predicted_mb: float
    result: EnvelopeResult

    def __str__(self) -> str:
        return f"Run {self.number}, {figures.method(self.method).name}: {self.result}"


class PocketLab(Explorable):
    """The slice follows the controls; a button takes the step; another runs a method in an envelope."""

    title = "Walk a MeZO step, and put methods into a phone's memory"
    help = "The loss of a real batch along one random direction. Below: run a method in a memory envelope."
    llm: LLM
    dialogues: Sequence[DialogueSet]

    def build(self) -> tuple[dict[str, ipywidgets.Widget], list[ipywidgets.Widget]]:
        self.surface = Surface(self.llm, token_rows(self.llm, self.dialogues, 512).rows)
        self.taken: list[Step] = []
        self.tries: list[EnvelopeTry] = []
        self._walking, self._runner, self._count = threading.Lock(), Latest(), 0
        controls = {
            "seed": ipywidgets.BoundedIntText(value=0, min=0, max=999_999, description="Seed of z"),
            "epsilon": ipywidgets.Dropdown(options=list(EPSILONS), value="0.001 (MeZO's)", description="Epsilon"),
            "rate": ipywidgets.Dropdown(options=list(RATES), value="0.00001", description="Learning rate"),
            "noise": ipywidgets.Dropdown(options=list(NOISES), value="signs (quick)", description="Noise z"),
        }
        self.cards, self.history = Region(), Region()
        self.go_on = ipywidgets.Button(
            description="Take the step, next seed", button_style="primary", tooltip="Move the weights, draw the next z"
        )
        self.home = ipywidgets.Button(description="Back to the start", tooltip="Undo all steps", disabled=True)
        self.go_on.on_click(lambda _: self.act(self.take))
        self.home.on_click(lambda _: self.act(self.reset))
        names = [(figures.method(m).name, m) for m in MEMORY_METHODS]
        self.method = ipywidgets.Dropdown(options=names, value="mezo", description="Method")
        self.limit = Slider("Limit, MB above imports", value=LIMIT_MB, min=400, max=4096, step=8, digits=0, unit=" MB")
        self.start = ipywidgets.Button(description="Run in the envelope", tooltip="Two steps, in a process of its own")
        self.clear = ipywidgets.Button(description="Remove the runs", tooltip="Forget the runs so far", disabled=True)
        self.start.on_click(lambda _: self._start())
        self.clear.on_click(lambda _: self.forget())
        for w in (self.method, self.limit):
            w.observe(lambda _: self._draw_limit(), names="value")
        buttons = ipywidgets.HBox([self.go_on, self.home]).add_class("pllm-buttons")
        more = ipywidgets.HBox([self.start, self.clear]).add_class("pllm-buttons")
        chosen = ipywidgets.Box([self.method, self.limit]).add_class("pllm-controls")
        self.predicted, self.now, self.table = Region(), Region(kind="pllm-progress"), Region()
        self.plot, self.described = self._empty_plot(), Region()
        body = [self.cards, buttons, self.history, self.plot, self.described, chosen]
        return controls, [*body, self.predicted, more, self.now, self.table]

    # -- the step -------------------------------------------------------------------------------
    def compute(self, seed: int, epsilon: str, rate: str, noise: str) -> Step:
        e, lr, kind = EPSILONS[epsilon], RATES[rate], NOISES[noise]
        with self._walking:
            losses = self.surface.along(seed, [p * e for p in PLACES], kind)
            slope = (losses[PLACES.index(1.0)] - losses[PLACES.index(-1.0)]) / (2 * e)
            (after,) = self.surface.along(seed, [-lr * slope], kind)
        return Step(int(seed), e, lr, kind, tuple(p * e for p in PLACES), tuple(losses), slope, -lr * slope, after)

    def take(self) -> Step:
        """Move the weights by the step that is shown, then show the next seed's."""
        step: Step = self.result
        with self._walking:
            self.surface.move(step.seed, step.step, step.noise)
        self.taken = [*self.taken, step]
        return self.set(seed=min(step.seed + 1, 999_999))

    def reset(self) -> Step:
        """The weights of the model again."""
        with self._walking, torch.no_grad():
            for p, q in zip(self.surface.parameters, self.llm.model.parameters(), strict=True):
                p.copy_(q)
        self.taken = []
        return self.set(seed=0)

    # -- the envelope ---------------------------------------------------------------------------
    def predict(self) -> float:
        """Predicted peak of the chosen method, MB above imports."""
        return predicted_mb(self.llm, self.method.value)

    def run(self) -> EnvelopeTry:
        """Run the chosen method in an envelope and wait; raises what starting it raises."""
        self.start.disabled = True
        return self._run()

    def wait(self, timeout: float | int = 600) -> bool:
        """Block until no run is in progress; ``False`` after ``timeout`` seconds."""
        return self._runner.wait(timeout)

    def forget(self) -> None:
        """Remove the runs from figure and table."""
        with self._drawing:
            self.tries = []
            self._draw_tries()

    def _start(self) -> None:
        if self.start.disabled:
            return
        if not from_page():
            self.run()
            return
        self.start.disabled = True
        self._runner.submit(self._in_background, keep=True)

    def _in_background(self, _: Any) -> None:
        try:
            self._run()
        except Exception:
            pass  # shown in place, and kept in `errors`

    def _run(self) -> EnvelopeTry:
        try:
            return self._measured()
        except Exception as error:
            self._fail(error)
            self._body.remove_class("pllm-stale")  # what stands below is still right
            raise
        finally:
            self.now.html = ""
            self._live([])
            self.start.disabled = False

    def _measured(self) -> EnvelopeTry:
        method, limit = self.method.value, float(self.limit.value)
        number, name = self._count + 1, figures.method(method).name
        with self._drawing:
            self._error.kind = self._error.html = ""
        seen: list[Sample] = []

        def sampled(sample: Sample) -> None:
            seen.append(sample)
            self.now.html = f"<p>Run {number}, {esc(name)}: {sample.seconds:.1f} s, {sample.resident_mb:.0f} MB…</p>"
            self._live(seen)

        self.now.html = f"<p>Run {number}, {esc(name)}: a new process starts…</p>"
        envelope = PhoneEnvelope(limit, on_sample=sampled)
        result = measure_memory(
            self.llm, method=TUNERS[method].predicted, dtype=dtype_of(self.llm, method), envelope=envelope
        )
        if result.status == "failed":
            raise RuntimeError(result.message)
        self._count = number
        done = EnvelopeTry(number, method, predicted_mb(self.llm, method), result)
        with self._drawing:
            self.tries = [*self.tries, done]
            self._live([])
            self._draw_tries()
            self.runs += 1
            self._status.data = {"runs": str(self.runs)}
            self._status.html = esc(done)
        return done

    # -- drawing --------------------------------------------------------------------------------
    def draw(self, result: Step) -> None:
        self.cards.html = self._cards_html(result)
        self.home.disabled = not self.taken
        self.history.html = self._history_html()
        x = [p / result.epsilon for p in result.places]
        probes = [-1.0, 1.0]
        with self.plot.batch_update():
            slice_, probe, step = self.plot.data[:3]
            slice_.x, slice_.y = x, list(result.losses)
            probe.x, probe.y = probes, [result.at(p) for p in probes]
            step.x, step.y = [0.0, result.step / result.epsilon], [result.at(0.0), result.after]
        if not self.runs:
            self._draw_limit()
            self._draw_tries()
        self.described.html = figures.describe_html(self.describe(result))

    def announce(self, result: Step) -> str:
        return f"{result}."

    def describe(self, result: Step) -> str:
        """The figure in words."""
        where = "; ".join(f"{p / result.epsilon:g}: {v:.5f}" for p, v in zip(result.places, result.losses, strict=True))
        ran = " ".join(f"{t}." for t in self.tries) or "No run yet."
        return (
            f"Left: loss of {len(self.surface.rows)} dialogues along the direction of seed {result.seed}, by place in "
            f"units of epsilon: {where}. {result}. Right: memory over time of runs in an envelope. {ran}"
        )

    def summary(self, result: Step) -> str:
        rows = "".join(
            f'<tr><th scope="row">{esc(n)}</th><td>{esc(v)}</td><td>{esc(f)}</td></tr>'
            for n, v, f in self._facts(result)
        )
        return f"<table><tbody>{rows}</tbody></table>{self._predictions_html()}"

    def figure(self, result: Step) -> tuple[Any, str]:
        return go.Figure(self.plot.to_dict()), self.describe(result)

    def _facts(self, s: Step) -> list[tuple[str, str, str]]:
        share = abs(s.step) / s.epsilon
        return [
            (
                "Loss at the probes",
                f"{s.at(1.0):.5f} / {s.at(-1.0):.5f}",
                f"at plus and minus epsilon; {s.at(0.0):.5f} here",
            ),
            ("Slope g", f"{s.slope:.3f}", "difference of the two losses, over two epsilon; the only number kept"),
            ("Step along z", f"{s.step:.2e}", f"minus rate times slope: {share:.2g} times as far as a probe"),
            ("Loss after the step", f"{s.after:.5f}", f"{s.change:+.1e} on this batch"),
        ]

    def _cards_html(self, s: Step) -> str:
        cards = "".join(
            f'<div class="pllm-card"><dt>{esc(name)}</dt><dd class="pllm-value num" data-card="{esc(name)}">'
            f'{esc(value)}</dd><dd class="pllm-help">{esc(foot)}</dd></div>'
            for name, value, foot in self._facts(s)
        )
        return f'<dl class="pllm-cards">{cards}</dl>'

    def _history_html(self) -> str:
        if not self.taken:
            return '<p class="pllm-help">No step taken yet: the weights are the model\'s.</p>'
        first, last = self.taken[0].at(0.0), self.taken[-1].after
        log = ", ".join(f"({s.seed}, {s.slope:.3f})" for s in self.taken[-6:])
        dots = "…, " if len(self.taken) > 6 else ""
        count = "1 step" if len(self.taken) == 1 else f"{len(self.taken)} steps"
        return (
            f'<p data-steps="{len(self.taken)}">{count}: loss of this batch {first:.5f} → {last:.5f}. '
            f"The log, (seed, slope): {dots}{esc(log)}</p>"
        )

    def _predictions_html(self) -> str:
        rows = "".join(
            f'<tr><th scope="row">{esc(figures.method(m).name)}</th><td>{predicted_mb(self.llm, m):,.0f} MB</td></tr>'
            for m in MEMORY_METHODS
        )
        return (
            "<p>Predicted peak above imports, 8 dialogues of 64 tokens:</p>"
            f"<table><tbody>{rows}</tbody></table><p>The envelope's limit: {self.limit.value:,.0f} MB.</p>"
        )

    def _empty_plot(self) -> go.FigureWidget:
        fig = make_subplots(
            rows=1,
            cols=2,
            column_widths=[0.5, 0.5],
            horizontal_spacing=0.14,
            subplot_titles=("Loss along z", "Memory in the envelope"),
        )
        slice_, mezo = figures.PALETTE["blue"], figures.trace_style("mezo")
        fig.add_scatter(x=[], y=[], name="loss", mode="lines+markers", line={"color": slice_}, row=1, col=1)
        fig.add_scatter(x=[], y=[], name="probes and slope", mode="lines+markers", row=1, col=1)
        fig.data[1].update(
            line={**mezo["line"]}, marker={"color": mezo["marker"]["color"], "size": 11, "symbol": "diamond"}
        )
        fig.add_scatter(x=[], y=[], name="step", mode="lines+markers", row=1, col=1)
        black = figures.PALETTE["black"]
        fig.data[2].update(
            line={"color": black, "width": 3}, marker={"color": black, "size": 9, "symbol": ["circle", "x"]}
        )
        fig.add_scatter(x=[], y=[], name="limit", mode="lines", row=1, col=2)
        fig.data[3].update(line={"color": figures.SOFT_INK, "dash": "dash", "width": 2})
        fig.add_scatter(x=[], y=[], name="now", mode="lines", showlegend=False, row=1, col=2)
        fig.data[4].update(line={"color": figures.SOFT_INK, "width": 2})
        fig.update_xaxes(title_text="place along z, in epsilon", col=1)
        fig.update_yaxes(title_text="nats per answer token", col=1)
        fig.update_xaxes(title_text="seconds since imports", rangemode="tozero", col=2)
        fig.update_yaxes(title_text="MB above imports", rangemode="tozero", col=2)
        legend = {"orientation": "h", "yanchor": "top", "y": -0.24, "x": 0}
        fig.update_layout(template="pllm", height=420, margin={"l": 80, "r": 20, "t": 40, "b": 110}, legend=legend)
        plot = go.FigureWidget(fig)
        plot._config = {**plot._config, **figures.CONFIG, "displayModeBar": False}
        return plot

    def _longest(self, live: Sequence[Sample] = ()) -> float:
        ends = [t.result.timeline[-1].seconds for t in self.tries if t.result.timeline]
        return max([1.0, *ends, *(s.seconds for s in live[-1:])])

    def _draw_limit(self, live: Sequence[Sample] = ()) -> None:
        with self._drawing, self.plot.batch_update():
            self.plot.data[3].x, self.plot.data[3].y = [0.0, self._longest(live)], [float(self.limit.value)] * 2
        predicted, limit = self.predict(), float(self.limit.value)
        verdict = "it should fit" if predicted <= limit else "it should be killed"
        self.predicted.html = (
            f'<p data-predicted="{predicted:.0f}">Predicted peak of {esc(figures.method(self.method.value).name)}, '
            f"8 dialogues of 64 tokens: {predicted:,.0f} MB. The limit is {limit:,.0f} MB: {verdict}.</p>"
        )

    def _live(self, seen: Sequence[Sample]) -> None:
        """The timeline of the run in progress; empty takes it away."""
        with self._drawing, self.plot.batch_update():
            self.plot.data[4].x, self.plot.data[4].y = [s.seconds for s in seen], [s.resident_mb for s in seen]
        if seen:
            self._draw_limit(seen)

    def _draw_tries(self) -> None:
        traces = []
        for t in self.tries:
            m = figures.method(t.method)
            thinned = _thinned(t.result.timeline)
            x, y = [s.seconds for s in thinned], [s.resident_mb for s in thinned]
            symbols = ["circle"] * (len(x) - 1) + ["x" if t.result.status == "killed" else "circle"]
            traces.append(
                go.Scatter(
                    x=x,
                    y=y,
                    mode="lines+markers",
                    name=f"run {t.number}: {m.name}",
                    line={"color": m.colour, "dash": m.dash, "width": 2.5},
                    marker={"color": m.colour, "symbol": symbols, "size": [0] * (len(x) - 1) + [12]},
                    xaxis="x2",
                    yaxis="y2",
                )
            )
        with self.plot.batch_update():
            self.plot.data = self.plot.data[:5]
            if traces:
                self.plot.add_traces(traces)
        self._draw_limit()
        self.clear.disabled = not self.tries
        self.table.html = self._tries_html()
        if self.result is not None:
            self.described.html = figures.describe_html(self.describe(self.result))

    def _tries_html(self) -> str:
        if not self.tries:
            return '<p class="pllm-help">No run yet. A run takes some ten seconds, in a process of its own.</p>'
        heads = ("Run", "Method", "Limit", "Predicted peak", "Measured peak", "What became of it")
        head = "".join(f'<th scope="col">{h}</th>' for h in heads)
        rows = []
        for t in self.tries:
            r = t.result
            end = f"killed, signal {r.signal}" if r.status == "killed" else f"finished in {r.seconds:.1f} s"
            numbers = (f"{r.limit_mb:,.0f} MB", f"{t.predicted_mb:,.0f} MB", f"{r.peak_mb:,.0f} MB")
            cells = "".join(f"<td class=num>{n}</td>" for n in numbers)
            name = esc(figures.method(t.method).name)
            rows.append(f'<tr><th scope="row">{t.number}</th><td>{name}</td>{cells}<td>{esc(end)}</td></tr>')
        return (
            f'<table class="pllm-table"><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table>'
            '<p class="pllm-help">Two steps on 8 dialogues of 64 tokens; resident memory above that after imports. '
            "A killed run's peak is where it was stopped.</p>"
        )


def _thinned(samples: Sequence[Sample], most: int = 300) -> list[Sample]:
    """At most about ``most`` samples, the largest of each stretch, the last one always."""
    size = -(-len(samples) // most) if samples else 1
    kept = [max(samples[k : k + size], key=lambda s: s.resident_mb) for k in range(0, len(samples), size)]
    return [*kept[:-1], samples[-1]] if kept else []


def dtype_of(llm: LLM, method: str) -> str:
    """Dtype of the weights that a method works on: adapters use the model's, the others an fp32 copy."""
    return llm.dtype if method in ADAPTERS else "fp32"


def predicted_mb(llm: LLM, method: str) -> float:
    """Predicted peak of two steps on 8 dialogues of 64 tokens, as the widget runs them."""
    return predict_memory(llm, method=TUNERS[method].predicted, dtype=dtype_of(llm, method)).total


def pocket_lab(llm: LLM, dialogues: Sequence[DialogueSet]) -> PocketLab:
    """Walk MeZO steps on the loss of ``dialogues``; run methods in memory envelopes.

    Parameters
    ----------
    dialogues : one batch; every place on the slice is a forward pass over all of it.

    Raises :class:`~pllm_helpers.runtime.InputError` for a model that does not write text and for
    blank questions or answers.
    """
    if llm.kind != "causal":
        raise InputError("llm", f"expected a model that writes text, got {llm.name}, which fills gaps")
    return PocketLab(llm=llm, dialogues=dialogues)
