"""Notebook 03: annotate a buffer by hand, and see which of the model's rewritings pass the sanity check."""

from __future__ import annotations

import math
import re
import shutil
import tempfile
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ipywidgets
import plotly.graph_objects as go

from .. import figures
from ..annotation import Annotator, is_label
from ..dialogue import DialogueSet
from ..evaluation import response_words
from ..models import LLM
from ..runtime import InputError
from ..selection import DialogueBuffer, Entry, FifoReplace
from ..synthesis import HIGH, LOW, Synthesis, rouge1, synthesize
from .base import Explorable, Latest, from_page
from .controls import Prompt, Region, Slider, esc

__all__ = ["AnnotationDesk", "Checked", "Desk", "Rewriter", "SynthesisLab", "open_desk", "synthesis_lab"]

OWN, SEVERAL = "Your own text", "Several messages"
STARTERS, EACH = 4, 2  # the start state: so many messages, so many texts from each
CHUNK = 8  # requests between two looks at the Stop button
PROMPT_NAMES = {"few_shot": "Few-shot (four examples)", "paper": "The paper's (recalled)"}
MODE_NAMES = {"question": "Question only, keep the reply", "pair": "Question and reply"}
# verdicts in the figure: name, colour, marker
KINDS = {
    "passed": ("passed", figures.PALETTE["blue"], "circle"),
    "too_far": ("too far", figures.PALETTE["vermillion"], "x"),
    "copy": ("copy or repeat", figures.PALETTE["wine"], "square"),
    "too_long": ("cut off", figures.PALETTE["black"], "triangle-up"),
    "reply": ("reply did not pass", figures.PALETTE["green"], "diamond"),
}
WORDS = {
    "passed": "passed",
    "too_far": "too far",
    "copy": "a copy",
    "duplicate": "said before",
    "too_long": "cut off",
    "empty": "no word in it",
    "unparsed": "no text found",
}


def _kind(verdict: str) -> str | None:
    """Which of :data:`KINDS` a verdict is drawn as; ``None`` where there is no ROUGE-1 to draw."""
    if verdict.startswith("reply_"):
        return "reply"
    return {"duplicate": "copy", "empty": None, "unparsed": None}.get(verdict, verdict)


def _say(verdict: str) -> str:
    if verdict == "reply_unasked":
        return "reply not asked for yet"
    return f"reply: {WORDS[verdict[6:]]}" if verdict.startswith("reply_") else WORDS[verdict]


# ---------------------------------------------------------------- annotate by hand


@dataclass(frozen=True)
class Desk:
    """What lies on the desk: the entry shown (``None``: nothing to ask), and the counts.

    ``left``: requests left today, of ``per_day``. ``pending``: sets without a mark. ``annotated``,
    ``skipped``: marks. ``day``: days after today, 0 unless somebody turned the page.
    """

    entry: Entry | None
    left: int
    per_day: int
    pending: int
    annotated: tuple[tuple[str, str], ...]
    skipped: int
    day: int


class AnnotationDesk(Explorable):
    """Buffered sets one by one; Save, Skip, Undo. Make one with :func:`open_desk`."""

    title = "Annotate"
    help = "Only what stayed in the buffer is asked about. What you save is on disk at once."
    live = False
    buffer: DialogueBuffer
    per_day: int = 5

    def build(self) -> tuple[dict[str, ipywidgets.Widget], list[ipywidgets.Widget]]:
        self.day = 0
        self.annotator = Annotator(self.buffer, per_day=self.per_day, clock=lambda: time.time() + 86_400 * self.day)
        self.listeners: list[Callable[[], None]] = []
        self._draft = ""
        self._doing = threading.RLock()
        self.shown, self.kept = Region(), Region()
        self.reply = Prompt(
            "Your reply",
            placeholder="The reply that you would have liked",
            button="Save",
            hint="Enter saves, Shift+Enter starts a new line.",
        )
        self.reply.on_submit(self._submitted)
        self.skip = ipywidgets.Button(description="Skip", tooltip="Leave this set out; it counts as a request")
        self.undo = ipywidgets.Button(description="Undo", tooltip="Take back the newest answer or skip")
        self.turn = ipywidgets.Button(description="Next day", tooltip="Pretend that it is tomorrow: a new budget")
        for button, action in ((self.skip, self._skip), (self.undo, self._undo), (self.turn, self._turn)):
            button.on_click(lambda _, action=action: self.act(action))
        buttons = ipywidgets.HBox([self.skip, self.undo, self.turn]).add_class("pllm-buttons")
        return {}, [self.shown, self.reply, buttons, self.kept]

    # -- for code -------------------------------------------------------------------------------
    def save(self, text: str) -> Desk:
        """Keep ``text`` as the reply to the set that is shown; it is on disk on return."""
        return self.attempt(lambda: self._save(text))

    def skip_set(self) -> Desk:
        """Leave the set that is shown out."""
        return self.attempt(self._skip)

    def take_back(self) -> Desk:
        """Take back the newest answer or skip and show its set again, with what was written."""
        return self.attempt(self._undo)

    def next_day(self) -> Desk:
        """Turn the page of the calendar: tomorrow has its own budget."""
        return self.attempt(self._turn)

    # -- the widget -----------------------------------------------------------------------------
    def compute(self, entry: Entry | None = None) -> Desk:
        a = self.annotator
        marks = {m.id: m.text for m in self.buffer.history()}
        questions = {m.id: m.dialogue.question for m in self.buffer.history()}
        kept = tuple((questions[id], text) for id, text in marks.items() if text is not None)
        left = a.left() or 0
        entry = (entry if left and entry is not None else None) or a.ask()
        return Desk(entry, left, self.per_day, len(a.pending()), kept, len(marks) - len(kept), self.day)

    def draw(self, result: Desk) -> None:
        self.shown.html = self._card(result)
        self.kept.html = self._kept(result)
        self.skip.disabled = result.entry is None
        self.undo.disabled = not (result.annotated or result.skipped)
        self.turn.disabled = not (result.left == 0 and result.pending)
        self.reply.fill(self._draft)

    def announce(self, result: Desk) -> str:
        return f"{len(result.annotated)} annotated, {result.pending} to go, {result.left} requests left today."

    def summary(self, result: Desk) -> str:
        return self._card(result) + self._kept(result)

    # -- inside ---------------------------------------------------------------------------------
    def _save(self, text: str) -> Desk:
        with self._doing:
            self.annotator.answer(self._entry(), text.strip())
            return self._next()

    def _skip(self) -> Desk:
        with self._doing:
            self.annotator.skip(self._entry())
            return self._next()

    def _undo(self) -> Desk:
        with self._doing:
            action = self.annotator.undo()
            if action is None:
                raise InputError("Undo", "expected an answer or a skip to take back, there is none")
            again = next((e for e in self.buffer.entries if e.id == action.id), None)
            return self._next(again, action.text or "")

    def _turn(self) -> Desk:
        with self._doing:
            self.day += 1
            return self._next()

    def _entry(self) -> Entry:
        if self.result is None or self.result.entry is None:
            why = "the budget of today is used up" if self.result and self.result.pending else "every set has a mark"
            raise InputError("Annotate", f"expected a set to answer, {why}", "Undo, or go on the next day.")
        return self.result.entry

    def _next(self, entry: Entry | None = None, draft: str = "") -> Desk:
        self._draft = draft
        self._succeed(self.compute(entry))
        for told in self.listeners:
            told()
        return self.result

    def _submitted(self, text: str) -> None:
        def keep() -> None:
            self.reply.waiting = True
            try:
                self._save(text)
            except Exception:
                self.reply.fill(text)
                raise
            finally:
                self.reply.waiting = False

        self.act(keep)

    def _card(self, s: Desk) -> str:
        when = "today" if s.day == 0 else "tomorrow" if s.day == 1 else f"in {s.day} days"
        foot = f"{_count(s.left, 'request')} of {s.per_day} left {when} · {_count(s.pending, 'set')} without a mark"
        if s.entry is None:
            line = (
                "The budget of this day is used up. The device waits; Undo gives a request back."
                if s.pending
                else "Nothing left to ask: every buffered set is annotated or skipped."
            )
            return f'<div class="pllm-text pllm-ask"><p>{line}</p></div><p class="pllm-help pllm-budget">{foot}</p>'
        d = s.entry.dialogue
        real = esc(d.answer) if d.answer.strip() else "<em>(no reply)</em>"
        return (
            f'<div class="pllm-text pllm-ask"><p class="pllm-sub">Somebody wrote</p><p class="pllm-question">'
            f"{esc(d.question)}</p><details><summary>What this person really replied</summary><p>{real}</p></details>"
            f'</div><p class="pllm-help pllm-budget">{foot}</p>'
        )

    def _kept(self, s: Desk) -> str:
        if not (s.annotated or s.skipped):
            return '<p class="pllm-help">Nothing annotated yet.</p>'
        rows = "".join(f"<tr><td>{esc(q)}</td><td>{esc(a)}</td></tr>" for q, a in s.annotated)
        head = '<thead><tr><th scope="col">Message</th><th scope="col">Your reply</th></tr></thead>'
        table = f'<table class="pllm-table pllm-kept">{head}<tbody>{rows}</tbody></table>' if s.annotated else ""
        kept = _count(len(s.annotated), "reply", "replies")
        return f'<p class="pllm-help">Kept: {kept}, {s.skipped} skipped.</p>{table}'


# ---------------------------------------------------------------- rewrite and check


@dataclass(frozen=True)
class Checked:
    """Rewritings under the present bounds, and ROUGE-1 of other messages against the originals."""

    synthesis: Synthesis
    unrelated: tuple[float, ...]

    @property
    def low(self) -> float:
        return self.synthesis.settings["low"]

    @property
    def high(self) -> float:
        return self.synthesis.settings["high"]


class Rewriter(Explorable):
    """Real outputs of the model, and two bounds that decide which of them become training sets.

    ``low`` and ``high`` judge what is written already, at once. The other controls say what is
    written next; **Write** starts it in the background, a few requests at a time.
    """

    title = "Rewrite and check"
    help = "Move the two bounds: texts below the lower one are about something else, those above the upper one copies."
    delay = 0.05
    llm: LLM
    dialogues: Sequence[DialogueSet]
    outputs: Path | None = None
    seed: int = 0

    def build(self) -> tuple[dict[str, ipywidgets.Widget], list[ipywidgets.Widget]]:
        self._folder: str | None = None
        if self.outputs is None:  # what was written once is not written again
            self._folder = tempfile.mkdtemp(prefix="pllm-rewritings-")
            self.outputs = Path(self._folder) / "outputs.jsonl"
            weakref.finalize(self, shutil.rmtree, self._folder, True)
        self.sets = list(self.dialogues)
        self._written: Synthesis | None = None
        self._writer, self._stop = Latest(), threading.Event()
        controls = {
            "low": Slider("Lower bound", value=LOW, min=0.0, max=1.0, step=0.05, continuous_update=True),
            "high": Slider("Upper bound", value=HIGH, min=0.0, max=1.0, step=0.05, continuous_update=True),
        }
        self.source = ipywidgets.Dropdown(description="Rewrite", options=self._sources()).add_class("pllm-row")
        self.message = ipywidgets.Textarea(description="Message", rows=2).add_class("pllm-half")
        self.answer = ipywidgets.Textarea(description="Reply", rows=2).add_class("pllm-half")
        self.prompt = ipywidgets.Dropdown(description="Prompt", options=[(PROMPT_NAMES[p], p) for p in PROMPT_NAMES])
        self.mode = ipywidgets.Dropdown(description="What", options=[(v, k) for k, v in MODE_NAMES.items()])
        self.temperature = Slider("Temperature", value=0.7, min=0.1, max=1.5, step=0.1, digits=1)
        self.each = ipywidgets.BoundedIntText(EACH, min=1, max=20, description="Texts per message")
        self.start = ipywidgets.Button(description="Write", button_style="primary", tooltip="Ask the model")
        self.stop = ipywidgets.Button(description="Stop", disabled=True, tooltip="Keep what is written and stop")
        self.start.on_click(lambda _: self._pressed())
        self.stop.on_click(lambda _: self._stop.set())
        self.source.observe(lambda _: self._toggle(), names="value")
        self._own = ipywidgets.Box([self.message, self.answer])
        settings = [self.prompt, self.mode, self.temperature, self.each]
        asked = [ipywidgets.Box([self.source]), self._own, ipywidgets.Box(settings)]
        for box in asked:
            box.add_class("pllm-controls")
        self._toggle()
        buttons = ipywidgets.HBox([self.start, self.stop]).add_class("pllm-buttons")
        self.progress = Region(role="status", kind="pllm-progress")
        self.cards, self.table, self.described = Region(), Region(), Region()
        self.plot = self._empty_plot()
        return controls, [self.cards, self.plot, self.described, self.table, *asked, buttons, self.progress]

    # -- for code -------------------------------------------------------------------------------
    def write(self, **settings: Any) -> Checked:
        """Set some of ``source, message, answer, prompt, mode, temperature, each`` and write; waits, and raises.

        ``source`` is a place in the list of messages, :data:`SEVERAL` or :data:`OWN`.
        """
        fields = self._fields()
        if unknown := set(settings) - set(fields):
            raise InputError("setting", f"expected some of {', '.join(fields)}, got {', '.join(sorted(unknown))}")
        for name, value in settings.items():
            fields[name].value = value
        self.attempt(lambda: self._write(self._wanted(), lambda: False))
        return self.result

    def wait(self, timeout: float | int = 60) -> bool:
        """Block until nothing is being written."""
        return self._writer.wait(timeout)

    def offer(self, dialogues: Sequence[DialogueSet]) -> None:
        """Put other dialogue sets on the list, for instance the annotated ones."""
        chosen = self.source.value
        self.sets = list(dialogues)
        self.source.options = self._sources()
        self.source.value = chosen if isinstance(chosen, str) or chosen < len(self.sets) else SEVERAL

    # -- computing ------------------------------------------------------------------------------
    def compute(self, low: float | int, high: float | int) -> Checked:
        if low > high:
            raise InputError(
                "Bounds",
                f"expected the lower one below the upper one, got {low:.2f} and {high:.2f}",
                "Move one of them.",
            )
        if self._written is None:
            self._written = self._ask(self.sets[:STARTERS], EACH, self._settings())
        checked = self._written.judged(low=round(low, 4), high=round(high, 4))
        return Checked(checked, self._unrelated(checked.originals))

    def _ask(self, originals: Sequence[DialogueSet], n: int, settings: dict[str, Any]) -> Synthesis:
        return synthesize(
            self.llm, originals, n, seed=self.seed, rounds=1, out=self.outputs, progress=False, **settings
        )

    def _settings(self) -> dict[str, Any]:
        return {
            "prompt": self.prompt.value,
            "mode": self.mode.value,
            "temperature": round(self.temperature.value, 4),
            "low": round(self.controls["low"].value, 4) if hasattr(self, "controls") else LOW,
            "high": round(self.controls["high"].value, 4) if hasattr(self, "controls") else HIGH,
        }

    def _unrelated(self, originals: Sequence[DialogueSet]) -> tuple[float, ...]:
        """ROUGE-1 of each original with up to eight other messages of the buffer."""
        found = []
        for d in originals:
            others = [o for o in self.dialogues if o.question != d.question and o.question.strip()]
            found += [rouge1(d.question, o.question) for o in others[:: max(1, len(others) // 8)][:8]]
        return tuple(found)

    # -- writing --------------------------------------------------------------------------------
    def _fields(self) -> dict[str, Any]:
        names = ("source", "message", "answer", "prompt", "mode", "temperature", "each")
        return {name: getattr(self, name) for name in names}

    def _wanted(self) -> tuple[list[DialogueSet], int, dict[str, Any]]:
        source = self.source.value
        if source == OWN:
            if not self.message.value.strip():
                raise InputError("Message", "expected some text, got none", "Type a message first.")
            if not self.answer.value.strip():
                raise InputError("Reply", "expected some text, got none", "Type the reply that is to be kept.")
            originals = [DialogueSet("you", self.message.value.strip(), self.answer.value.strip(), source="typed")]
        else:
            originals = self.sets[:STARTERS] if source == SEVERAL else [self.sets[source]]
        return originals, self.each.value, self._settings()

    def _pressed(self) -> None:
        if not from_page():
            self.attempt(lambda: self._write(self._wanted(), lambda: False))
            return

        def job(stale: Callable[[], bool]) -> None:
            try:
                self._write(self._wanted(), stale)
            except Exception as error:
                self._fail(error)

        self._stop.set()  # what is being written now ends at its next pause
        # a click may overtake the value of the field that it took the focus from: read them a little later
        self._writer.submit(job, delay=0.3)

    def _write(self, wanted: tuple[list[DialogueSet], int, dict[str, Any]], stale: Callable[[], bool]) -> None:
        originals, n, settings = wanted
        self._stop.clear()
        self.stop.disabled = False
        step = max(1, math.ceil(CHUNK / len(originals)))
        try:
            for done in range(0, n, step):
                self._tell(done * len(originals), n * len(originals))
                written = self._ask(originals, min(done + step, n), settings)  # what is known is read, not asked
                if stale():
                    return
                self._written = written
                self._succeed(self.compute(**self.values))
                if self._stop.is_set():
                    break
        finally:
            self.stop.disabled = True
            self.progress.html = ""

    def _tell(self, done: int, total: int) -> None:
        bar = f'<progress max="{total}" value="{done}" aria-label="Texts written"></progress>'
        self.progress.html = f"{bar} The model writes: {done} of {_count(total, 'text')}."

    def _sources(self) -> list[tuple[str, Any]]:
        several = f"{SEVERAL} ({min(STARTERS, len(self.sets))})"
        return [(several, SEVERAL), *((_short(d.question), i) for i, d in enumerate(self.sets)), (OWN, OWN)]

    def _toggle(self) -> None:
        self._own.layout.display = "" if self.source.value == OWN else "none"

    # -- drawing --------------------------------------------------------------------------------
    def draw(self, result: Checked) -> None:
        self.cards.html = self._cards(result.synthesis)
        self.table.html = self._rows(result.synthesis)
        self._draw_plot(result)
        self.described.html = figures.describe_html(self.describe(result))

    def announce(self, result: Checked) -> str:
        s = result.synthesis
        return f"{s.passed} of {s.asked} pass between {result.low:.2f} and {result.high:.2f}."

    def summary(self, result: Checked) -> str:
        return self._cards(result.synthesis) + self._rows(result.synthesis)

    def figure(self, result: Checked) -> tuple[go.Figure, str]:
        return go.Figure(self.plot.to_dict()), self.describe(result)

    def describe(self, result: Checked) -> str:
        """The figure in words."""
        s = result.synthesis
        scores = sorted(a.rouge1 for a in s.attempts if a.rouge1 is not None)
        counts = ", ".join(f"{_say(v)} {n}" for v, n in s.verdicts.items() if n)
        text = (
            f"Two rows of dots on a scale of ROUGE-1 from 0 to 1, the band from {result.low:.2f} to {result.high:.2f}"
        )
        text += f" shaded. Upper row, {len(scores)} texts of the model"
        if scores:
            text += f" between {scores[0]:.2f} and {scores[-1]:.2f}, median {scores[len(scores) // 2]:.2f}"
        text += f": {counts}."
        if result.unrelated:
            text += f" Lower row, {len(result.unrelated)} other messages, the highest at {max(result.unrelated):.2f}."
        return text

    def _cards(self, s: Synthesis) -> str:
        reasons = ", ".join(f"{_say(v)} {n}" for v, n in s.verdicts.items() if n and v != "passed")
        cards = [
            ("Asked", s.asked, _count(len(s.originals), "message")),
            ("In brackets", s.bracketed, "as the prompt demands"),
            ("Text found", s.parsed, "with or without brackets"),
            ("Passed", s.passed, f"{s.passed / s.asked:.0%} of those asked" if s.asked else ""),
        ]
        out = "".join(
            f'<div class="pllm-card"><dt>{name}</dt><dd class="pllm-value num" data-count="{name}">{n}</dd>'
            f'<dd class="pllm-help">{foot}</dd></div>'
            for name, n, foot in cards
        )
        line = f'<p class="pllm-help pllm-reasons">Not passed: {esc(reasons) or "none"}.</p>'
        return f'<dl class="pllm-cards pllm-funnel">{out}</dl>{line}'

    def _rows(self, s: Synthesis) -> str:
        bodies = []
        for d in s.originals:
            head = f'<tr><th colspan="4" scope="rowgroup">{esc(d.question)}</th></tr>'
            rows = ""
            for a in s.attempts:
                if a.original is not d:
                    continue
                text = "<em>(nothing)</em>" if a.text is None else _marked(d.question, a.text)
                if a.raw.strip() != a.text:
                    text += f"<details><summary>What it printed</summary><p>{esc(a.raw)}</p></details>"
                if a.reply is None:
                    reply = esc(d.answer) if s.settings["mode"] == "question" else ""
                else:
                    reply = esc(a.reply.text or "(nothing)")
                score = "" if a.rouge1 is None else f"{a.rouge1:.2f}"
                kind = " class='pllm-pass'" if a.verdict == "passed" else ""
                rows += (
                    f'<tr{kind} data-verdict="{esc(a.verdict)}"><td>{esc(_say(a.verdict))}</td>'
                    f'<td class="num">{score}</td><td>{text}</td><td>{reply}</td></tr>'
                )
            bodies.append(f"<tbody>{head}{rows}</tbody>")
        reply = "Reply, kept" if s.settings["mode"] == "question" else "Reply, rewritten"
        head = "".join(f'<th scope="col">{h}</th>' for h in ("Verdict", "ROUGE-1", "Text of the model", reply))
        return (
            '<div class="pllm-scroll" role="region" aria-label="Texts and verdicts" tabindex="0">'
            f'<table class="pllm-table pllm-texts"><thead><tr>{head}</tr></thead>{"".join(bodies)}</table></div>'
            '<p class="pllm-help">Underlined words are those that ROUGE-1 counts as shared.</p>'
        )

    def _empty_plot(self) -> go.FigureWidget:
        fig = figures.new_figure(x="ROUGE-1 against the original message", height=300)
        fig.add_scatter(
            x=[],
            y=[],
            mode="markers",
            name="",
            marker={"color": figures.SOFT_INK, "symbol": "circle-open", "size": 8},
            hovertemplate="other message: %{x:.2f}<extra></extra>",
        )
        for name, colour, symbol in KINDS.values():
            fig.add_scatter(
                x=[],
                y=[],
                mode="markers",
                name=name,
                marker={"color": colour, "symbol": symbol, "size": 10},
                hovertemplate="%{text}<extra></extra>",
            )
        fig.update_xaxes(range=[-0.03, 1.03], dtick=0.1)
        fig.update_yaxes(tickvals=[0.1, 1.3], ticktext=["other messages", "the model's texts"], range=[-0.4, 2.9])
        fig.update_layout(margin={"l": 140, "r": 10, "t": 60, "b": 60})
        plot = go.FigureWidget(fig)
        plot._config = {**plot._config, **figures.CONFIG, "displayModeBar": False}
        return plot

    def _draw_plot(self, result: Checked) -> None:
        attempts = [a for a in result.synthesis.attempts if a.rouge1 is not None]
        places = _stacked([a.rouge1 or 0.0 for a in attempts], 1.0, 1.8)
        band = {
            "type": "rect",
            "xref": "x",
            "yref": "paper",
            "x0": result.low,
            "x1": result.high,
            "y0": 0,
            "y1": 1,
            "fillcolor": figures.tint(figures.PALETTE["blue"], 0.1),
            "line": {"color": figures.PALETTE["blue"], "width": 1.5, "dash": "dot"},
            "layer": "below",
        }
        with self.plot.batch_update():
            self.plot.data[0].x = list(result.unrelated)
            self.plot.data[0].y = _stacked(result.unrelated, -0.2, 0.9)
            self.plot.data[0].name = f"other messages {len(result.unrelated)}"
            for trace, kind in zip(self.plot.data[1:], KINDS, strict=True):
                mine = [(a, y) for a, y in zip(attempts, places, strict=True) if _kind(a.verdict) == kind]
                trace.x, trace.y = [a.rouge1 for a, _ in mine], [y for _, y in mine]
                trace.text = [f"{a.rouge1:.2f}, {_say(a.verdict)}: {_short(esc(a.text or ''), 90)}" for a, _ in mine]
                trace.name = f"{KINDS[kind][0]} {len(mine)}"
                trace.showlegend = bool(mine)
            self.plot.layout.shapes = [band]


# ---------------------------------------------------------------- both together


class SynthesisLab(Explorable):
    """Annotate, then rewrite; make one with :func:`synthesis_lab`."""

    title = "From the buffer to training sets"
    help = "Your annotations become the replies that synthesis keeps."
    live = False
    desk: AnnotationDesk
    rewriter: Rewriter

    def build(self) -> tuple[dict[str, ipywidgets.Widget], list[ipywidgets.Widget]]:
        self.desk.listeners.append(self._hand_over)
        return {}, [self.desk.view, self.rewriter.view]

    def compute(self) -> tuple[Desk, Checked]:
        self._hand_over()
        return self.desk.result, self.rewriter.result

    def draw(self, result: tuple[Desk, Checked]) -> None:
        pass

    def summary(self, result: tuple[Desk, Checked]) -> str:
        return f"{self.desk.summary(result[0])}{self.rewriter.summary(result[1])}"

    def figure(self, result: tuple[Desk, Checked]) -> tuple[go.Figure, str]:
        return self.rewriter.figure(result[1])

    def _hand_over(self) -> None:
        """Sets on the rewriter's list get the annotation as their reply, where there is one."""
        reply = self.desk.buffer.answer_of
        self.rewriter.offer([replace(d, answer=reply(d.id) or d.answer) for d in self.rewriter.dialogues])


def _words(text: str) -> int:
    return len(response_words(text))


def _count(n: int, what: str, many: str = "") -> str:
    return f"{n} {what}" if n == 1 else f"{n} {many or what + 's'}"


def _short(text: str, length: int = 70) -> str:
    line = " ".join(text.split())
    return line if len(line) <= length else line[: length - 1] + "…"


def _marked(original: str, text: str) -> str:
    """The text with the words underlined that ROUGE-1 counts: each as often as both have it."""
    left = Counter(response_words(original))
    out = []
    for part in re.split(r"([^\W_]+(?:['’][^\W_]+)*)", text):
        (word,) = response_words(part) if _words(part) == 1 else ("",)
        if word and left[word] > 0:
            left[word] -= 1
            out.append(f"<u>{esc(part)}</u>")
        else:
            out.append(esc(part))
    return "".join(out)


def _stacked(values: Sequence[float], base: float, height: float, width: float = 0.025) -> list[float]:
    """Heights that put dots of like value on top of each other instead of over each other."""
    stacks = Counter[int]()
    ranks = []
    for v in values:
        place = round(v / width)
        ranks.append(stacks[place])
        stacks[place] += 1
    step = min(0.22, height / max(max(stacks.values(), default=1) - 1, 1))
    return [base + step * r for r in ranks]


_OPEN: dict[str, DialogueBuffer] = {}  # one handle a file; a cell that runs again finds its own
_SCRATCH: list[tempfile.TemporaryDirectory] = []


def open_desk(entries: Sequence[Entry], folder: str | Path | None = None, *, per_day: int = 5) -> AnnotationDesk:
    """A desk for ``entries`` of a buffer; marks go to ``annotations.sqlite`` in ``folder``.

    Without a folder they last as long as the kernel does: running the cell again finds them, a new
    kernel starts afresh. With a folder they survive everything. Entries are added to what the file
    holds already. Raises :class:`~pllm_helpers.runtime.InputError` if another kernel has the file open.
    """
    if folder is None:
        if not _SCRATCH:
            _SCRATCH.append(tempfile.TemporaryDirectory(prefix="pllm-annotations-", ignore_cleanup_errors=True))
        folder = _SCRATCH[0].name
    target = Path(folder).expanduser()
    target.mkdir(parents=True, exist_ok=True)
    path = str((target / "annotations.sqlite").resolve())
    buffer = _OPEN.get(path)
    if buffer is None:
        buffer = _OPEN[path] = DialogueBuffer(path, bins=256)
    known = {e.id for e in buffer.entries}
    policy = FifoReplace()
    for e in sorted(entries, key=lambda e: e.position):  # the newest is asked about first
        if e.id not in known:
            scores = {"eoe": float(e.scores["eoe"]), "dss": float(e.scores["dss"])}
            buffer.offer(policy, e.dialogue, embedding=e.embedding, domain=e.domain, **scores)
    return AnnotationDesk(buffer=buffer, per_day=per_day)


def synthesis_lab(
    llm: LLM,
    entries: Sequence[Entry],
    folder: str | Path | None = None,
    *,
    per_day: int = 5,
    outputs: str | Path | None = None,
    seed: int = 0,
) -> SynthesisLab:
    """Annotate the entries of a buffer by hand, let the model rewrite them, and set the bounds of the check.

    Parameters
    ----------
    llm : from :func:`~pllm_helpers.models.load_llm`.
    entries : what stayed in a buffer; at least one with a question and a reply.
    folder : where your annotations are kept, see :func:`open_desk`.
    per_day : requests a day.
    outputs : a file that keeps what the model wrote, so that nothing is written twice.

    Raises :class:`~pllm_helpers.runtime.InputError` if no entry can be used.
    """
    usable = [e for e in entries if _words(e.dialogue.question) and _words(e.dialogue.answer)]
    usable = [e for e in usable if not is_label(e.dialogue)]
    if not usable:
        raise InputError("entries", f"expected some with a question and a reply, got none among {len(entries)}")
    usable.sort(key=lambda e: not 6 <= _words(e.dialogue.question) <= 24)  # those that are good to watch first
    desk = open_desk(usable, folder, per_day=per_day)
    out = None if outputs is None else Path(outputs)
    rewriter = Rewriter(llm=llm, dialogues=[e.dialogue for e in usable], outputs=out, seed=seed)
    return SynthesisLab(desk=desk, rewriter=rewriter)
