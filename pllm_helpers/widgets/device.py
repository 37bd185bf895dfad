"""Notebook 07: draw the shape of a model, see what it weighs on a phone; then write with a quantised one."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from typing import Any

import ipywidgets
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from .. import figures
from ..device import PHONES, Phone, quantize, size_mb
from ..device.architectures import MOBILE_LLM, SMOLLM2_135M, Architecture
from ..experiments.device_study import FORMATS, weight_bytes
from ..models import LLM, generate
from ..runtime import InputError
from .base import Explorable, from_page
from .controls import Checks, Prompt, Region, Slider, esc

__all__ = ["DeviceDesigner", "Sheet", "Written", "device_designer"]

PUBLISHED = {a.name: a for a in (*MOBILE_LLM.values(), SMOLLM2_135M)}
PARTS = {
    "tokens": ("embedding, output", "blue", ""),
    "attention": ("attention", "vermillion", "/"),
    "ffn": ("feed-forward", "green", "x"),
}
HEAD = 64  # width of a head, as in all published configurations
CONTEXT = 1024  # tokens behind which the cost of the next one is stated
VOCABULARIES = (2048, 32000, 49152, 128256)
PRECISIONS = ("bf16", "int8", "int4")
NEW_TOKENS = 24
MB = 2**20


@dataclass(frozen=True)
class Sheet:
    """A shape, the phone it is held against, and what follows."""

    architecture: Architecture
    phone: Phone

    @property
    def megabytes(self) -> dict[str, float]:
        """Weights by form."""
        return {form: weight_bytes(self.architecture, form) / MB for form in FORMATS}

    @property
    def cache_mb(self) -> float:
        """Keys and values of ``CONTEXT`` tokens, two bytes a number."""
        return CONTEXT * self.architecture.kv_bytes() / MB

    @property
    def fits(self) -> list[str]:
        """Forms whose weights and cache stay within the phone's budget."""
        return [f for f, mb in self.megabytes.items() if mb + self.cache_mb <= self.phone.limit_mb]

    @property
    def mflops(self) -> float:
        """Million operations for the next token behind ``CONTEXT`` others."""
        return self.architecture.flops(CONTEXT) / 1e6


@dataclass(frozen=True)
class Written:
    """One real answer: precision, megabytes of weights, seconds to the first token, tokens, seconds in all, text."""

    number: int
    precision: str
    megabytes: float
    first: float
    tokens: int
    seconds: float
    text: str

    @property
    def rate(self) -> float:
        """Tokens per second after the first."""
        rest = self.seconds - self.first
        return (self.tokens - 1) / rest if self.tokens > 1 and rest > 0 else 0.0


class DeviceDesigner(Explorable):
    """Sliders for a shape; a button for a real answer of the quantised model. Make one with :func:`device_designer`."""

    title = "Draw a model for a phone"
    help = "Numbers and bars follow your choices at once. Write lets the real model answer, in 16, 8 or 4 bits."
    delay = 0.1
    llm: LLM

    def build(self) -> tuple[dict[str, ipywidgets.Widget], list[ipywidgets.Widget]]:
        self.written: list[Written] = []
        self._models: dict[str, LLM] = {"bf16": self.llm}
        self._writing, self._count = False, 0
        self._lock = threading.Lock()
        start = MOBILE_LLM["125M"]
        self.preset = ipywidgets.Dropdown(options=list(PUBLISHED), value=start.name, description="Start from")
        self.preset.observe(self._take, names="value")
        controls = {
            "layers": Slider("Layers", value=start.layers, min=1, max=64, step=1, digits=0),
            "heads": Slider(f"Heads of width {HEAD}", value=start.heads, min=1, max=32, step=1, digits=0),
            "kv_heads": Slider("Key-value heads", value=start.kv_heads, min=1, max=32, step=1, digits=0),
            "ffn": Slider("Feed-forward width", value=start.ffn, min=128, max=8192, step=64, digits=0),
            "vocab": ipywidgets.Dropdown(
                options=[(f"{v:,} tokens", v) for v in VOCABULARIES], value=start.vocab, description="Vocabulary"
            ),
            "sharing": Checks(
                "Sharing",
                [("embedding", "output matrix is the embedding"), ("blocks", "every block runs twice")],
                ["embedding"],
            ),
            "phone": ipywidgets.Dropdown(options=list(PHONES), value=next(iter(PHONES)), description="Budget"),
        }
        self.cards, self.described, self.note = Region(), Region(), Region()
        self.plot = self._empty_plot()
        self.precision = ipywidgets.Dropdown(options=list(PRECISIONS), value="int4", description="Precision")
        self.prompt = Prompt("Message to the real model", placeholder="Ask something short", button="Write")
        self.prompt.on_submit(self._submitted)
        self.now, self.table = Region(kind="pllm-progress"), Region(html=self._table_html())
        first = ipywidgets.HBox([self.preset]).add_class("pllm-buttons")
        row = ipywidgets.VBox([self.precision, self.prompt])
        return controls, [first, self.cards, self.note, self.plot, self.described, row, self.now, self.table]

    # -- shapes ---------------------------------------------------------------------------------
    def compute(self, layers: float, heads: float, kv_heads: float, ffn: float, vocab: int, sharing: list[str],
                phone: str) -> Sheet:  # fmt: skip
        if int(heads) % int(kv_heads):
            divisors = [d for d in range(1, int(heads) + 1) if int(heads) % d == 0]
            raise InputError(
                "Key-value heads",
                f"expected a divisor of the {int(heads)} heads, got {int(kv_heads)}",
                f"Each key-value head serves equally many heads: take {', '.join(map(str, divisors))}.",
            )
        shape = Architecture(
            int(layers),
            HEAD * int(heads),
            int(heads),
            int(kv_heads),
            int(ffn),
            vocab,
            "embedding" in sharing,
            "blocks" in sharing,
            name="yours",
        )
        return Sheet(shape, PHONES[phone])

    def load(self, name: str) -> Sheet:
        """Set the controls to a published configuration. Raises :class:`InputError` for an unknown one."""
        if name not in PUBLISHED:
            raise InputError("Start from", f"expected one of {', '.join(PUBLISHED)}, got {name!r}")
        a = PUBLISHED[name]
        sharing = ["embedding"] * a.share_embedding + ["blocks"] * a.share_blocks
        return self.set(layers=a.layers, heads=a.heads, kv_heads=a.kv_heads, ffn=a.ffn, vocab=a.vocab, sharing=sharing)

    def _take(self, change: Any) -> None:
        self.act(lambda: self.load(change["new"]))

    # -- writing --------------------------------------------------------------------------------
    def write(self, message: str, precision: str | None = None) -> Written:
        """Let the model answer in a precision (default: the control's) and wait; raises what the model raises."""
        if precision is not None:
            self.precision.value = precision
        return self.attempt(lambda: self._exchange(message))

    def _submitted(self, message: str) -> None:
        if not from_page():
            self.write(message)
        elif not self._writing:
            self._writing = True
            self.background(lambda _: self._exchange(message), keep=True)

    def _exchange(self, message: str) -> Written:
        self._writing, self.prompt.waiting = True, True
        self._error.kind = self._error.html = ""
        try:
            found = self._write(message.strip(), self.precision.value)
            with self._drawing:
                self.written = [*self.written, found]
                self.table.html = self._table_html()
                self.runs += 1
                self._status.data = {"runs": str(self.runs)}
                self._status.html = esc(f"Answer {found.number}: {self.sentence(found)}")
            return found
        finally:
            self.now.html = ""
            self._writing, self.prompt.waiting = False, False

    def _write(self, message: str, precision: str) -> Written:
        if not message:
            raise InputError("Message", "expected some text, got none", "Type a message, then press Enter.")
        llm = self._model(precision)
        self.now.html = f"<p>{esc(llm.name)} writes in {precision}…</p>"
        began = time.perf_counter()
        generate(llm, [message], max_new_tokens=1, progress=False)
        first = time.perf_counter() - began
        began = time.perf_counter()
        (answer,) = generate(llm, [message], max_new_tokens=NEW_TOKENS, progress=False, details=True)
        seconds = time.perf_counter() - began
        self._count += 1
        return Written(self._count, precision, size_mb(llm), first, answer.tokens, seconds, answer.text)

    def _model(self, precision: str) -> LLM:
        with self._lock:
            if precision not in self._models:
                self.now.html = f"<p>Packing the weights into {precision}…</p>"
                self._models[precision] = quantize(self.llm, precision)
            return self._models[precision]

    def sentence(self, w: Written) -> str:
        """One answer's cost in words."""
        return (
            f"{w.precision}, {w.megabytes:.0f} MB of weights, first token after {w.first:.2f} s, "
            f"then {w.rate:.1f} tokens/s, {w.tokens} tokens."
        )

    # -- drawing --------------------------------------------------------------------------------
    def draw(self, result: Sheet) -> None:
        self.cards.html = self._cards_html(result)
        fits = ", ".join(result.fits) or "no form"
        tag = "" if result.phone.tag == "verified" else " (unverified)"
        self.note.html = (
            f'<p class="pllm-help"><strong>{esc(result.phone.name)}</strong>, {result.phone.limit_mb:,.0f} MB{tag}: '
            f"weights and cache of {CONTEXT:,} tokens fit in {esc(fits)}. Source: {esc(result.phone.source)}.</p>"
        )
        self._draw_plot(result)
        self.described.html = figures.describe_html(self.describe(result))

    def announce(self, result: Sheet) -> str:
        count = result.architecture.parameters().total
        fits = ", ".join(result.fits) or "no form"
        return f"{count:,} parameters, {result.megabytes['int4']:.0f} MB in int4, fits in {fits}."

    def summary(self, result: Sheet) -> str:
        rows = "".join(
            f'<tr><th scope="row">{esc(n)}</th><td>{esc(v)}</td><td>{esc(f)}</td></tr>'
            for n, v, f in self._facts(result)
        )
        return f"<p>{esc(self.preset.value)}, against {esc(result.phone.name)}:</p><table><tbody>{rows}</tbody></table>"

    def figure(self, result: Sheet) -> tuple[Any, str] | None:
        return go.Figure(self.plot.to_dict()), self.describe(result)

    def describe(self, r: Sheet) -> str:
        """The figure in words."""
        count = r.architecture.parameters()
        bars = "; ".join(f"{n}: {a.parameters().total / 1e6:.1f} million" for n, a in PUBLISHED.items())
        memory = ", ".join(f"{f} {mb:,.0f} MB" for f, mb in r.megabytes.items())
        return (
            f"Left: stacked bars of parameters. Yours: {count.total / 1e6:.1f} million, of which "
            f"{count.vocabulary_share:.0%} stand for tokens; {bars}. Right: bars of your weights by form: {memory}; "
            f"a dashed line marks the budget of {r.phone.limit_mb:,.0f} MB ({r.phone.name})."
        )

    def _facts(self, r: Sheet) -> list[tuple[str, str, str]]:
        a, count, mb = r.architecture, r.architecture.parameters(), r.megabytes
        near = min(PUBLISHED.values(), key=lambda p: abs(p.parameters().total - count.total))
        ratio = a.flops(CONTEXT) / near.flops(CONTEXT)
        return [
            (
                "Parameters",
                f"{count.total:,}",
                f"{count.vocabulary_share:.1%} of them for {a.vocab:,} tokens; nearest: {near.name}",
            ),
            ("Weights, fp32 / bf16", f"{mb['fp32']:,.0f} / {mb['bf16']:,.0f} MB", "4 and 2 bytes a number"),
            (
                "Weights, int8 / int4",
                f"{mb['int8']:,.0f} / {mb['int4']:,.0f} MB",
                "scales included; int4 keeps int8 tokens",
            ),
            (
                "Work per token",
                f"{r.mflops:,.0f} MFLOP",
                f"behind {CONTEXT:,} tokens, {a.passes} pass{'es' if a.passes > 1 else ''}; "
                f"{ratio:.2f} times {near.name}",
            ),
            ("Keys and values", f"{r.cache_mb:,.1f} MB", f"for {CONTEXT:,} tokens in 16 bits"),
        ]

    def _cards_html(self, r: Sheet) -> str:
        cards = "".join(
            f'<div class="pllm-card"><dt>{esc(n)}</dt><dd class="pllm-value num" data-card="{esc(n)}">{esc(v)}</dd>'
            f'<dd class="pllm-help">{esc(f)}</dd></div>'
            for n, v, f in self._facts(r)
        )
        return f'<dl class="pllm-cards">{cards}</dl>'

    def _empty_plot(self) -> go.FigureWidget:
        fig = make_subplots(
            rows=1,
            cols=2,
            column_widths=[0.58, 0.42],
            horizontal_spacing=0.14,
            subplot_titles=("Million parameters", "Your weights, MB"),
        )
        margin = {"l": 60, "r": 20, "t": 40, "b": 100}
        legend = {"orientation": "h", "yanchor": "top", "y": -0.28, "x": 0}
        fig.update_layout(template="pllm", height=430, barmode="stack", margin=margin, legend=legend)
        fig.update_xaxes(tickangle=-30, col=1)
        fig.update_yaxes(rangemode="tozero")
        for name, colour, hatch in PARTS.values():
            marker = {
                "color": figures.PALETTE[colour],
                "pattern": {"shape": hatch, "fgcolor": figures.CARD, "fillmode": "overlay", "solidity": 0.25},
            }
            fig.add_bar(x=[], y=[], name=name, marker=marker, row=1, col=1)
        fig.add_bar(
            x=[], y=[], name="weights", showlegend=False, marker={"color": figures.PALETTE["blue"]}, row=1, col=2
        )
        line = {"color": figures.SOFT_INK, "dash": "dash", "width": 2}
        fig.add_scatter(x=[], y=[], name="budget", mode="lines", line=line, row=1, col=2)
        plot = go.FigureWidget(fig)
        plot._config = {**plot._config, **figures.CONFIG, "displayModeBar": False}
        return plot

    def _draw_plot(self, r: Sheet) -> None:
        shapes = {"yours": r.architecture, **{n.replace("MobileLLM-", ""): a for n, a in PUBLISHED.items()}}
        counts = {n: a.parameters() for n, a in shapes.items()}
        with self.plot.batch_update():
            for trace, part in zip(self.plot.data, PARTS, strict=False):
                trace.x = list(counts)
                trace.y = [
                    (c.embedding + c.head if part == "tokens" else getattr(c, part)) / 1e6 for c in counts.values()
                ]
            weights, budget = self.plot.data[len(PARTS) :]
            weights.x, weights.y = list(r.megabytes), list(r.megabytes.values())
            budget.x, budget.y = [FORMATS[0], FORMATS[-1]], [r.phone.limit_mb] * 2

    def _table_html(self) -> str:
        if not self.written:
            return '<p class="pllm-help">No answer yet. Answers stay here for comparison.</p>'
        names = ("Answer", "Precision", "Weights", "First token", "Then", "Tokens", "Text")
        head = "".join(f'<th scope="col">{n}</th>' for n in names)
        rows = "".join(
            f'<tr><th scope="row">{w.number}</th><td>{w.precision}</td><td class="num">{w.megabytes:.0f} MB</td>'
            f'<td class="num">{w.first:.2f} s</td><td class="num">{w.rate:.1f} tokens/s</td>'
            f'<td class="num">{w.tokens}</td><td>{esc(w.text) or "<em>(an empty answer)</em>"}</td></tr>'
            for w in self.written
        )
        return f'<table class="pllm-table"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>'


def device_designer(llm: LLM) -> DeviceDesigner:
    """Draw a shape against published ones and a phone's budget; write with ``llm`` in 16, 8 or 4 bits.

    Quantised copies are made when they are first asked for. Raises
    :class:`~pllm_helpers.runtime.InputError` for a model that does not write text.
    """
    if llm.kind != "causal":
        raise InputError("llm", f"expected a model that writes text, got {llm.name}, which fills gaps")
    return DeviceDesigner(llm=llm)
