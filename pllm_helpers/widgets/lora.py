"""Notebook 04: choose rank, layers and rate, see the predicted cost, then train for real."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ipywidgets
import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float
from plotly.subplots import make_subplots

from .. import figures
from ..dialogue import DialogueSet
from ..evaluation import Estimate, bootstrap_interval, response_nll
from ..models import LLM
from ..runtime import InputError
from ..tuning import CostPrediction, TuningResult, adapted, predict_cost, tune_lora
from ..tuning.data import token_rows
from .base import Explorable, Latest, from_page
from .controls import Region, Slider, esc

__all__ = ["LoraLab", "Plan", "TrainedRun", "lora_lab"]

MODULES = {
    "q, v": ("q_proj", "v_proj"),
    "q, k, v, o (all of attention)": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "attention and feed-forward": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
}
LAYERS: dict[str, str | int] = {"upper half": "upper", "all": "all", "top five": 5, "top one": 1}
COLOURS = ("blue", "vermillion", "green", "purple", "wine", "black")
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")


@dataclass(frozen=True)
class Plan:
    """Settings as chosen, and what the package predicts for them."""

    rank: int
    layers: str
    modules: str
    rate: float
    steps: int
    cost: CostPrediction
    share: float

    @property
    def seconds(self) -> float:
        """Predicted seconds of training, scoring not counted."""
        return self.steps * self.cost.seconds_per_step

    def __str__(self) -> str:
        return f"rank {self.rank}, {self.layers}, {self.modules.split(' (')[0]}, rate {self.rate:g}, {self.steps} steps"


@dataclass(frozen=True)
class TrainedRun:
    """One run: what was planned, what came out, and the held-out NLL of each reply before and after."""

    number: int
    plan: Plan
    result: TuningResult
    before: Float[np.ndarray, " n"]
    after: Float[np.ndarray, " n"]

    @property
    def stopped(self) -> bool:
        """Whether somebody pressed Stop before the last step."""
        return len(self.result.losses) < self.plan.steps

    @property
    def fall(self) -> Estimate:
        """Fall of the held-out NLL, paired by reply."""
        return bootstrap_interval(self.before, self.after, statistic=_mean_fall, unit="nats per token")


def _mean_fall(before: np.ndarray, after: np.ndarray) -> float:
    return float((before - after).mean())


class LoraLab(Explorable):
    """Predictions follow the controls; a button trains in the background, another one stops."""

    title = "Plan a LoRA run, then train it"
    help = "The cards follow your choices at once. Train runs on this machine while the page stays usable."
    llm: LLM
    dialogues: Sequence[DialogueSet]
    held_out: Sequence[DialogueSet]
    batch_size: int = 8
    seed: int = 0

    def build(self) -> tuple[dict[str, ipywidgets.Widget], list[ipywidgets.Widget]]:
        rows = token_rows(self.llm, self.dialogues, 512).rows
        self._tokens = max(1, round(float(np.mean([len(r.ids) for r in rows]))))
        self._answers = max(1, round(float(np.mean([r.answer for r in rows]))))
        self.trained: list[TrainedRun] = []
        self._trainer, self._stop, self._count = Latest(), threading.Event(), 0
        self._before: np.ndarray | None = None
        controls = {
            "rank": Slider("Rank r", value=8, min=1, max=64, step=1, digits=0),
            "layers": ipywidgets.Dropdown(options=list(LAYERS), value="upper half", description="Layers"),
            "modules": ipywidgets.Dropdown(options=list(MODULES), value="q, v", description="Matrices"),
            "rate": ipywidgets.FloatText(0.005, description="Learning rate"),
            "steps": Slider("Steps", value=8, min=1, max=100, step=1, digits=0),
        }
        self.cards = Region()
        self.start = ipywidgets.Button(description="Train", button_style="primary", tooltip="Train with these settings")
        self.halt = ipywidgets.Button(description="Stop", tooltip="End the run after this step", disabled=True)
        self.clear = ipywidgets.Button(description="Remove the runs", tooltip="Forget the runs so far", disabled=True)
        self.start.on_click(lambda _: self._start())
        self.halt.on_click(lambda _: self._stop.set())
        self.clear.on_click(lambda _: self.forget())
        buttons = ipywidgets.HBox([self.start, self.halt, self.clear]).add_class("pllm-buttons")
        self.now, self.table = Region(kind="pllm-progress"), Region()
        self.plot, self.described = self._empty_plot(), Region()
        return controls, [self.cards, buttons, self.now, self.plot, self.described, self.table]

    # -- predicting -----------------------------------------------------------------------------
    def compute(self, rank: float, layers: str, modules: str, rate: float, steps: float) -> Plan:
        if not 0 < rate <= 10:
            raise InputError(
                "Learning rate",
                f"expected a number above 0 and at most 10, got {rate:g}",
                "Common values: 0.0001 to 0.01.",
            )
        cost = predict_cost(
            self.llm,
            rank=int(rank),
            layers=LAYERS[layers],
            modules=MODULES[modules],
            batch_size=self.batch_size,
            tokens=self._tokens,
            answer_tokens=self._answers,
        )
        return Plan(int(rank), layers, modules, float(rate), int(steps), cost, cost.parameters / self.llm.parameters)

    # -- training -------------------------------------------------------------------------------
    def train(self) -> TrainedRun:
        """Train with the controls' settings and wait; raises what training raises."""
        self._begin()
        return self._train()

    def stop(self) -> None:
        """End the run in progress after its current step."""
        self._stop.set()

    def forget(self) -> None:
        """Remove the runs from figure and table."""
        with self._drawing:
            self.trained = []
            self._draw_runs()
            self._say("")

    def wait(self, timeout: float | int = 600) -> bool:
        """Block until no run is in progress; ``False`` after ``timeout`` seconds."""
        return self._trainer.wait(timeout)

    def _start(self) -> None:
        if self.start.disabled:
            return
        if not from_page():
            self.train()
            return
        self._begin()
        self._trainer.submit(self._in_background, keep=True)

    def _begin(self) -> None:
        self._stop.clear()  # here, not in the thread: Stop pressed right after Train must count
        self.start.disabled, self.halt.disabled = True, False

    def _in_background(self, _: Any) -> None:
        try:
            self._train()
        except Exception:
            pass  # shown in place, and kept in `errors`

    def _train(self) -> TrainedRun:
        try:
            run = self._run()
        except Exception as error:
            self._fail(error)
            self._body.remove_class("pllm-stale")  # what stands below is still right
            raise
        finally:
            self._progress("")
            self._live(None)
            self.start.disabled, self.halt.disabled = False, True
        return run

    def _run(self) -> TrainedRun:
        plan = self.compute(**self.values)
        with self._drawing:
            self._error.kind = self._error.html = ""
        number = self._count = self._count + 1
        if self._before is None:
            self._progress(f"Run {number}: scoring {len(self.held_out)} later replies with the base model")
            self._before = response_nll(self.llm, self.held_out, progress=False)
        self._progress(f"Run {number}: preparing", 0, plan.steps)
        losses: list[float] = []

        def stepped(step: int, loss: float, seconds: float) -> bool:
            losses.append(loss)
            self._live(losses)
            self._progress(f"Run {number}: step {step} of {plan.steps}, loss {loss:.3f}", step, plan.steps)
            return not self._stop.is_set()

        result = tune_lora(
            self.llm,
            self.dialogues,
            steps=plan.steps,
            lr=plan.rate,
            seed=self.seed,
            rank=plan.rank,
            alpha=2 * plan.rank,
            layers=LAYERS[plan.layers],
            modules=MODULES[plan.modules],
            batch_size=self.batch_size,
            progress=stepped,
        )
        self._progress(f"Run {number}: scoring the later replies again", plan.steps, plan.steps)
        with adapted(self.llm, result) as tuned:
            after = response_nll(tuned, self.held_out, progress=False)
        run = TrainedRun(number, plan, result, self._before, after)
        with self._drawing:
            self.trained = [*self.trained, run]
            self._live(None)
            self._draw_runs()
            self._say(f"Run {number} {'stopped' if run.stopped else 'done'}: {self.sentence(run)}")
        return run

    def _say(self, sentence: str) -> None:
        self.runs += 1
        self._status.data = {"runs": str(self.runs)}
        self._status.html = esc(sentence)

    # -- drawing --------------------------------------------------------------------------------
    def draw(self, result: Plan) -> None:
        self.cards.html = self._cards_html(result)
        if not self.runs:
            self._draw_runs()

    def announce(self, result: Plan) -> str:
        numbers, size = f"{result.cost.parameters:,} trained numbers", _size(result.cost.adapter_bytes)
        return f"{numbers}, adapter {size}, about {result.seconds:.0f} seconds."

    def summary(self, result: Plan) -> str:
        rows = "".join(
            f'<tr><th scope="row">{esc(name)}</th><td>{esc(value)}</td><td>{esc(foot)}</td></tr>'
            for name, value, foot in self._facts(result)
        )
        return f"<p>Predicted for {esc(result)}:</p><table><tbody>{rows}</tbody></table>"

    def sentence(self, run: TrainedRun) -> str:
        """One run in words."""
        return (
            f"{run.plan}. Loss {run.result.losses[0]:.3f} at the first step, {run.result.losses[-1]:.3f} at the last; "
            f"held-out NLL {run.before.mean():.3f} before, {run.after.mean():.3f} after, fall {run.fall}."
        )

    def describe(self) -> str:
        """The figure in words."""
        if not self.trained:
            return "Two empty charts: training loss by step, and fall of the held-out NLL by run. No run yet."
        said = " ".join(f"Run {r.number}: {self.sentence(r)}" for r in self.trained)
        return f"Left: training loss by step, one line per run. Right: fall of the held-out NLL with interval. {said}"

    def _facts(self, p: Plan) -> list[tuple[str, str, str]]:
        cost = p.cost
        batch = f"{self.batch_size} dialogues of about {self._tokens} tokens"
        return [
            (
                "Trained numbers",
                f"{cost.parameters:,}",
                f"{100 * p.share:.2g} % of the model's {self.llm.parameters / 1e6:.0f} million",
            ),
            (
                "Adapter file",
                _size(cost.adapter_bytes),
                "four bytes a number; the whole model in this format: " + _size(4 * self.llm.parameters),
            ),
            ("Memory for training", f"{cost.memory_mb:,.0f} MB", f"beyond the weights; {batch} a step"),
            (
                "Time",
                f"{p.seconds:.0f} s",
                f"{cost.seconds_per_step:.2f} s a step, {p.steps} steps; more on a busy machine",
            ),
        ]

    def _cards_html(self, p: Plan) -> str:
        cards = "".join(
            f'<div class="pllm-card"><dt>{esc(name)}</dt><dd class="pllm-value num" data-card="{esc(name)}">'
            f'{esc(value)}</dd><dd class="pllm-help">{esc(foot)}</dd></div>'
            for name, value, foot in self._facts(p)
        )
        return f'<dl class="pllm-cards">{cards}</dl>'

    def _progress(self, text: str, done: int = 0, total: int = 1) -> None:
        bar = f'<progress value="{done}" max="{total}" aria-label="Steps of this run"></progress> '
        self.now.html = f"<p>{bar}{esc(text)}…</p>" if text else ""

    def _empty_plot(self) -> go.FigureWidget:
        fig = make_subplots(
            rows=1,
            cols=2,
            column_widths=[0.6, 0.4],
            horizontal_spacing=0.12,
            subplot_titles=("Training loss", "Fall of the held-out NLL"),
        )
        fig.update_xaxes(title_text="step", rangemode="tozero", col=1)
        fig.update_yaxes(title_text="nats per answer token", col=1)
        fig.update_xaxes(title_text="run", dtick=1, col=2)
        fig.update_yaxes(title_text="nats per token", col=2)
        zero = {"color": figures.SOFT_INK, "dash": "dash", "width": 1.5}
        fig.add_hline(y=0, line=zero, row=1, col=2, exclude_empty_subplots=False)
        legend = {"orientation": "h", "yanchor": "top", "y": -0.24, "x": 0}
        margin = {"l": 70, "r": 20, "t": 40, "b": 100}
        fig.update_layout(template="pllm", height=390, margin=margin, legend=legend)
        plot = go.FigureWidget(fig)
        plot._config = {**plot._config, **figures.CONFIG, "displayModeBar": False}
        return plot

    def _live(self, losses: Sequence[float] | None) -> None:
        """The curve of the run in progress; ``None`` takes it away."""
        with self._drawing, self.plot.batch_update():
            trace = self.plot.data[0]
            trace.x, trace.y = list(range(1, len(losses or ()) + 1)), list(losses or ())
            longest = max([len(losses or ()), *(len(r.result.losses) for r in self.trained)])
            self.plot.layout.xaxis.dtick = 1 if longest <= 12 else None  # no half steps

    def _draw_runs(self) -> None:
        live = {"mode": "lines+markers", "line": {"color": figures.SOFT_INK, "width": 2}, "marker": {"size": 6}}
        traces = [
            go.Scatter(x=[], y=[], name="now", showlegend=False, xaxis="x", yaxis="y", **live),
            # draws nothing; without a trace plotly shows no axes
            go.Scatter(x=[], y=[], name="none", showlegend=False, xaxis="x2", yaxis="y2"),
        ]
        for run in self.trained:
            colour, dash = figures.PALETTE[COLOURS[(run.number - 1) % 6]], DASHES[(run.number - 1) % 6]
            losses, fall = run.result.losses, run.fall
            traces += [
                go.Scatter(
                    x=list(range(1, len(losses) + 1)),
                    y=losses,
                    mode="lines" if len(losses) > 1 else "markers",
                    name=f"run {run.number}",
                    line={"color": colour, "dash": dash, "width": 2.5},
                    marker={"color": colour},
                    showlegend=True,
                    xaxis="x",
                    yaxis="y",
                ),
                go.Scatter(
                    x=[run.number],
                    y=[fall.value],
                    mode="markers",
                    marker={"color": colour, "size": 9},
                    name=f"run {run.number}",
                    error_y=figures.error_bars([fall.value], [fall.low], [fall.high], colour),
                    showlegend=False,
                    xaxis="x2",
                    yaxis="y2",
                ),
            ]
        with self.plot.batch_update():
            self.plot.data = ()
            self.plot.add_traces(traces)
        self._live(None)
        self.clear.disabled = not self.trained
        self.described.html = figures.describe_html(self.describe())
        self.table.html = self._table_html()

    def _table_html(self) -> str:
        if not self.trained:
            return '<p class="pllm-help">No run yet. Runs stay here for comparison.</p>'
        head = "".join(
            f'<th scope="col">{h}</th>'
            for h in (
                "Run",
                "Settings",
                "Trained numbers",
                "Seconds, predicted and real",
                "NLL before and after",
                "Fall",
            )
        )
        rows = []
        for r in self.trained:
            end = f" (stopped after {len(r.result.losses)})" if r.stopped else ""
            planned = len(r.result.losses) * r.plan.cost.seconds_per_step
            cells = [
                f"{r.plan}{end}",
                f"{r.result.parameters:,}",
                f"{planned:.1f} / {r.result.seconds:.1f}",
                f"{r.before.mean():.3f} → {r.after.mean():.3f}",
                f"{r.fall.value:.3f} [{r.fall.low:.3f}, {r.fall.high:.3f}]".replace(" ", "\u00a0"),
            ]
            kinds = ["", " class=num", " class=num", " class=num", " class=num"]
            body = "".join(f"<td{k}>{esc(c)}</td>" for k, c in zip(kinds, cells, strict=True))
            rows.append(f'<tr><th scope="row">{r.number}</th>{body}</tr>')
        note = (
            f"NLL: mean over {len(self.held_out)} later replies, nats per token. Fall: paired by reply, 95 % interval."
        )
        return (
            f'<table class="pllm-table"><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table>'
            f'<p class="pllm-help">{note}</p>'
        )


def _size(n: int) -> str:
    return f"{n / 1e6:,.2f} MB" if n < 1e7 else f"{n / 1e6:,.0f} MB"


def lora_lab(
    llm: LLM,
    dialogues: Sequence[DialogueSet],
    held_out: Sequence[DialogueSet],
    *,
    batch_size: int = 8,
    seed: int = 0,
) -> LoraLab:
    """Choose rank, layers, matrices, rate and steps; see the cost; train; compare runs.

    Parameters
    ----------
    dialogues : what a run trains on.
    held_out : replies that no run trains on, at least two; scored before and after each run.
    batch_size, seed : dialogues a step; start of the adapter and order of the batches.

    Raises :class:`~pllm_helpers.runtime.InputError` for a model that does not write text, for
    fewer than two held-out dialogues, and for blank questions or answers.
    """
    if llm.kind != "causal":
        raise InputError("llm", f"expected a model that writes text, got {llm.name}, which fills gaps")
    if len(held_out) < 2:
        raise InputError("held_out", f"expected at least two dialogues, got {len(held_out)}")
    return LoraLab(llm=llm, dialogues=dialogues, held_out=held_out, batch_size=batch_size, seed=seed)
