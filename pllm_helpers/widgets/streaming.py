"""Notebook 02: a real person's stream played through two replacement policies side by side."""

from __future__ import annotations

import html
import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ipywidgets
import numpy as np
import plotly.graph_objects as go
from jaxtyping import Int
from plotly.subplots import make_subplots

from .. import figures
from ..dialogue import DialogueSet
from ..experiments.streaming_study import (
    MEASURES,
    Playback,
    ScoredStream,
    holdings,
    person_dialogues,
    play,
    present_idd,
    score_stream,
)
from ..models import Encoder
from ..runtime import InputError
from ..selection import BUILT_IN, METRICS, POLICIES, Decision, Lexicons
from .base import Explorable, from_page
from .controls import Region, Slider, esc

__all__ = ["Moment", "PolicyDuel", "Side", "policy_duel"]

REMEMBERED = 24  # playbacks
LOOKS = {"medical": "medical", "emotion": "emotion", "clusters": "cluster"}  # family of lexicons -> figures.METHODS
FAMILY = {name: LOOKS[family] for family, names in BUILT_IN.items() for name in names if family in LOOKS}
DONE = {"insert": "Takes a free bin", "replace": "Replaces", "discard": "Discarded"}


@dataclass(frozen=True)
class Side:
    """One policy at one moment.

    Attributes
    ----------
    play : the whole run. slots : stream position of the entry in each bin now, −1 for a free one.
    decision : on the newest message; ``None`` before the first.
    mine, theirs : EOE, DSS and IDD of the newcomer, and of the entry that it replaced, as the policy saw them.
    counts : decisions so far by action. short : how often each metric stood in the way.
    holds : what the buffer holds, ``{}`` with fewer than two sets; see ``streaming_study.holdings``.
    """

    play: Playback
    slots: Int[np.ndarray, " b"]
    decision: Decision | None
    mine: dict[str, float]
    theirs: dict[str, float]
    counts: dict[str, int]
    short: dict[str, int]
    holds: dict[str, float]

    @property
    def name(self) -> str:
        """The policy's name in figures."""
        return figures.METHODS[self.play.policy].name

    @property
    def kept(self) -> Int[np.ndarray, " k"]:
        """Stream positions of the buffered sets."""
        return self.slots[self.slots >= 0]


@dataclass(frozen=True)
class Moment:
    """Both policies after ``position`` messages of one person."""

    person: int
    position: int
    scored: ScoredStream
    sides: tuple[Side, Side]

    @property
    def newest(self) -> DialogueSet | None:
        """The message that was decided on last."""
        return self.scored.dialogues[self.position - 1] if self.position else None

    def domain(self, i: int) -> str:
        """Dominant domain of a message, in words."""
        return self.scored.table.domain_names[i] or "no domain"


class PolicyDuel(Explorable):
    """Play, step or slide through a stream: what two policies keep and drop, and why."""

    title = "One stream, two policies"
    help = "Press Play, or move the slider. Messages are numbered in the order in which they were written."
    #: seconds between two steps of Play
    interval = 0.35
    encoder: Encoder
    lexicons: Lexicons
    scored: dict[int, ScoredStream]
    people: Sequence[int]
    messages: int
    left: str = "quality"
    right: str = "random"
    bins: int = 32
    seed: int = 0

    def build(self) -> tuple[dict[str, ipywidgets.Widget], list[ipywidgets.Widget]]:
        self._plays: dict[tuple[int, str, int, int], Playback] = {}
        self._chunks: dict[int, list[Any]] = {}
        self._playing, self._pause = False, threading.Event()
        names = [(figures.METHODS[key].name, key) for key in POLICIES]
        size = len(self.scored[self.people[0]])
        people = [(f"Person {rank}", rank) for rank in self.people]
        self.position = Slider("Messages seen", value=size, min=0, max=size, step=1, digits=0).add_class("pllm-wide")
        controls = {
            "person": ipywidgets.Dropdown(options=people, value=self.people[0], description="Person"),
            "left": ipywidgets.Dropdown(options=names, value=self.left, description="Left policy"),
            "right": ipywidgets.Dropdown(options=names, value=self.right, description="Right policy"),
            "bins": ipywidgets.BoundedIntText(self.bins, min=2, max=512, description="Bins"),
            "seed": ipywidgets.BoundedIntText(self.seed, min=0, max=10**6, description="Seed"),
            "position": self.position,
        }
        self.stride = ipywidgets.BoundedIntText(1, min=1, max=100, description="Messages per step")
        self.back = ipywidgets.Button(description="Step back", tooltip="Back by one step")
        self.playing = ipywidgets.Button(description="Play", tooltip="Play the stream, or pause it")
        self.forward = ipywidgets.Button(description="Step forward", tooltip="On by one step")
        self.back.on_click(lambda _: self.act(lambda: self.step(-1)))
        self.forward.on_click(lambda _: self.act(lambda: self.step(1)))
        self.playing.on_click(lambda _: self.toggle())
        buttons = [self.back, self.playing, self.forward, self.stride]
        row = ipywidgets.HBox(buttons).add_class("pllm-buttons").add_class("pllm-player")
        self.progress = Region(role="status", kind="pllm-progress")
        self.message, self.sides, self.holding = Region(), Region(), Region()
        self.plot, self.described = self._empty_plot(), Region()
        return controls, [row, self.progress, self.message, self.sides, self.plot, self.described, self.holding]

    # -- computing ------------------------------------------------------------------------------
    def compute(self, person: int, left: str, right: str, bins: int, seed: int, position: float | int) -> Moment:
        scored = self._scored(person)
        if bins > len(scored):
            raise InputError("Bins", f"expected at most {len(scored)}, as many as there are messages, got {bins}")
        at = min(int(position), len(scored))
        sides = [self._side(self._played(person, key, bins, seed), scored, at) for key in (left, right)]
        return Moment(person, at, scored, (sides[0], sides[1]))

    def _scored(self, person: int) -> ScoredStream:
        """The person's stream; scored at the first visit, chunk by chunk, going on where it was interrupted."""
        if person in self.scored:
            return self.scored[person]

        def told(done: int, everything: int) -> None:
            if self._latest.waiting:  # somebody has changed a control: that comes first
                raise InputError("Person", "expected to finish scoring, something newer came")
            text = f"Scoring person {person}: {done} of {everything} messages"
            self.progress.html = (
                f'<progress value="{done}" max="{everything}" aria-label="{esc(text)}"></progress>{esc(text)}'
            )

        try:
            stream = person_dialogues(person, self.messages)
            chunks = self._chunks.setdefault(person, [])
            self.scored[person] = score_stream(stream, self.encoder, self.lexicons, on_progress=told, chunks=chunks)
        finally:
            self.progress.html = ""
        self._chunks.pop(person, None)
        return self.scored[person]

    def _played(self, person: int, policy: str, bins: int, seed: int) -> Playback:
        key = (person, policy, bins, seed)
        if key not in self._plays:
            self._plays[key] = play(self.scored[person], policy, bins=bins, seed=seed)
            while len(self._plays) > REMEMBERED:
                del self._plays[next(iter(self._plays))]
        return self._plays[key]

    @staticmethod
    def _side(run: Playback, scored: ScoredStream, at: int) -> Side:
        slots, past = run.slots(at), run.decisions[:at]
        kept = slots[slots >= 0]
        decision = past[-1] if past else None
        theirs: dict[str, float] = {}
        if decision is not None and decision.replaced is not None and decision.slot is not None:
            theirs = dict(decision.replaced.scores)
            if run.policy != "released_code":  # the others compare with IDD as the buffer is now
                before = run.kept(at - 1)
                theirs["idd"] = float(present_idd(scored.table, before)[decision.slot])
        return Side(
            run,
            slots,
            decision,
            dict(decision.scores) if decision else {},
            theirs,
            dict(Counter(d.action for d in past)),
            dict(Counter(metric for d in past for metric in d.too_low)),
            holdings(scored, kept, at) if len(kept) > 1 else {},
        )

    # -- moving ---------------------------------------------------------------------------------
    def step(self, direction: int) -> None:
        """Move by one step of ``stride`` messages: 1 on, −1 back."""
        self._go(self.position.value + direction * self.stride.value)

    def toggle(self) -> None:
        """Play from here to the end (from the start, if this is the end), or pause."""
        if self._playing:
            self._playing = False
            self._pause.set()
            return
        self._playing = True
        self._pause.clear()
        self.playing.description = "Pause"
        if from_page():
            self.background(self._run)
        else:
            self.attempt(lambda: self._run(lambda: False, wait=False))

    def _run(self, stale: Any, *, wait: bool = True) -> None:
        self._busy.kind = "pllm-busy"  # playing is not waiting
        try:
            if self.position.value >= self.position.max:
                self._go(0)
            while self._playing and not stale() and self.position.value < self.position.max:
                if wait and self._pause.wait(self.interval):
                    break
                self.step(1)
        finally:
            self._playing = False
            self.playing.description = "Play"

    def _go(self, position: float | int) -> None:
        with self.held():
            self.position.value = position
        self._refresh(lambda: False)

    # -- drawing --------------------------------------------------------------------------------
    def draw(self, result: Moment) -> None:
        with self.held():
            self.position.max = float(len(result.scored))
        self.message.html = self._message_html(result)
        self.sides.html = f'<div class="pllm-duel">{"".join(self._side_html(result, s) for s in result.sides)}</div>'
        self.holding.html = self._holding_html(result)
        self._draw_plot(result)
        self.described.html = figures.describe_html(self.describe(result))

    def announce(self, result: Moment) -> str:
        if self._playing:
            return ""
        return f"After {result.position} messages. " + " ".join(
            f"{s.name}: {_plain_decision(s)}." for s in result.sides
        )

    def summary(self, result: Moment) -> str:
        return (
            f"<p>Person {result.person}, after {result.position} of {len(result.scored)} messages, "
            f"{result.sides[0].play.bins} bins.</p>{self._holding_html(result)}"
        )

    def figure(self, result: Moment) -> tuple[go.Figure, str]:
        return go.Figure(self.plot.to_dict()), self.describe(result)

    def describe(self, result: Moment) -> str:
        """The figure in words."""
        parts = [
            f"Two panels over {len(result.scored)} messages, of which {result.position} have arrived: each kept "
            "message is a horizontal line from its arrival to the message that replaced it."
        ]
        for s in result.sides:
            if not len(s.kept):
                parts.append(f"{s.name}: empty.")
                continue
            first = int((s.kept < s.play.bins).sum())
            parts.append(
                f"{s.name}: {len(s.kept)} lines reach the present, from message {s.kept.min() + 1} to "
                f"{s.kept.max() + 1}, half of them at or before {int(np.median(s.kept)) + 1}; {first} are among the "
                f"first {s.play.bins} messages; {s.counts.get('replace', 0)} lines have ended."
            )
        return " ".join(parts)

    def _message_html(self, m: Moment) -> str:
        if m.newest is None:
            return '<div class="pllm-text">Nothing has arrived yet.</div>'
        i = m.position - 1
        table = m.scored.table
        question = esc(_cut(m.newest.question.strip(), 300)) or "<em>(blank)</em>"
        return (
            f'<h4 class="pllm-arrived">Message {m.position} of {len(m.scored)}: {esc(m.domain(i))}, '
            f"EOE {table.eoe[i]:.3f}, DSS {table.dss[i]:.3f}</h4>"
            f'<div class="pllm-text"><span class="pllm-who">Asked</span> {question}<br>'
            f'<span class="pllm-who">Replied</span> {esc(_cut(m.newest.answer.strip(), 300))}</div>'
        )

    def _side_html(self, m: Moment, s: Side) -> str:
        look = figures.METHODS[s.play.policy]
        head = f'<h4 style="color:{look.ink}">{esc(s.name)}</h4>'
        return (
            f'<section class="pllm-side" data-policy="{esc(s.play.policy)}" aria-label="{esc(s.name)}">{head}'
            f"{self._decision_html(m, s)}{self._bins_html(m, s)}</section>"
        )

    def _decision_html(self, m: Moment, s: Side) -> str:
        d = s.decision
        if d is None:
            return '<p class="pllm-decision">No decision yet.</p>'
        what = DONE[d.action]
        if d.replaced is not None:
            what = f"Replaces message {d.replaced.position + 1} in slot {d.slot}"
        elif d.slot is not None:
            what = f"{what}, slot {d.slot}"
        parts = [
            f'<p class="pllm-decision" data-action="{d.action}"><strong>{esc(what)}</strong> {esc(_reason(d))}</p>'
        ]
        if s.theirs:
            marks = [f'<td class="num">{s.mine[k]:.3f}{" ▲" if s.mine[k] > s.theirs[k] else ""}</td>' for k in METRICS]
            left = d.replaced
            assert left is not None
            heads = "".join(f'<th scope="col" class="num">{k.upper()}</th>' for k in METRICS)
            theirs = "".join(f'<td class="num">{s.theirs[k]:.3f}</td>' for k in METRICS)
            parts.append(
                f'<table class="pllm-table pllm-against"><thead><tr><th scope="col">▲ higher</th>{heads}</tr></thead>'
                f'<tbody><tr><th scope="row">newcomer</th>{"".join(marks)}</tr>'
                f'<tr><th scope="row">message {left.position + 1}</th>{theirs}</tr></tbody></table>'
                f'<p class="pllm-help">Dropped: {esc(_cut(left.dialogue.text, 140))}</p>'
            )
        return f'<div class="pllm-verdict">{"".join(parts)}</div>'

    def _bins_html(self, m: Moment, s: Side) -> str:
        newest = m.position - 1
        items = []
        for slot, i in enumerate(s.slots):
            if i < 0:
                items.append(f'<li class="free" data-slot="{slot}">free</li>')
                continue
            domain = m.scored.table.domain_names[i]
            colour = figures.METHODS[FAMILY[domain]].colour if domain in FAMILY else figures.SOFT_INK
            kind = ' class="new"' if i == newest else ""
            text = _cut(" ".join(m.scored.dialogues[i].text.split()), 160)
            items.append(
                f'<li{kind} data-slot="{slot}" data-message="{i + 1}" style="border-left-color:{colour}" '
                f'title="{esc(text)}"><b>{i + 1}</b> {esc(domain or "–")}</li>'
            )
        rows = "".join(
            f'<tr><td class="num">{i + 1}</td><td>{esc(m.domain(int(i)))}</td>'
            f"<td>{esc(_cut(m.scored.dialogues[i].text, 200))}</td></tr>"
            for i in sorted(s.kept)
        )
        heads = "".join(f'<th scope="col">{h}</th>' for h in ("Message", "Domain", "Text"))
        read = (
            f"<details><summary>Read the {len(s.kept)} buffered messages</summary>"
            f'<div class="pllm-scroll" tabindex="0" role="region" aria-label="Buffer of {esc(s.name)}">'
            f'<table class="pllm-table"><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table></div></details>'
            if rows
            else ""
        )
        return f'<ul class="pllm-bins" aria-label="Bins of {esc(s.name)}">{"".join(items)}</ul>{read}'

    def _holding_html(self, m: Moment) -> str:
        rows: list[tuple[str, list[str]]] = []
        for action, title in (("replace", "replacements"), ("discard", "discarded")):
            rows.append((title, [str(s.counts.get(action, 0)) for s in m.sides]))
        for k in METRICS:
            if any(s.short for s in m.sides):
                rows.append((f"… held back by {k.upper()}", [str(s.short.get(k, 0)) for s in m.sides]))
        first = [f"{(s.kept < s.play.bins).mean():.0%}" if len(s.kept) else "–" for s in m.sides]
        rows.append(("first arrivals in the buffer", first))
        for key, title in MEASURES.items():
            values = [f"{s.holds[key]:.1f}" if key == "words" else f"{s.holds[key]:.3f}" for s in m.sides if s.holds]
            rows.append((title, values if len(values) == len(m.sides) else ["–"] * len(m.sides)))
        names = m.scored.table.domain_names
        domains = [Counter(names[i] or "no domain" for i in s.kept) for s in m.sides]
        for name in dict.fromkeys(d for c in domains for d, _ in c.most_common()):
            rows.append((f"of domain: {name}", [str(c[name]) for c in domains]))
        heads = "".join(f'<th scope="col" class="num">{esc(s.name)}</th>' for s in m.sides)
        body = ""
        for title, values in rows:
            cells = "".join(f'<td class="num">{esc(v)}</td>' for v in values)
            body += f'<tr><th scope="row">{esc(title)}</th>{cells}</tr>'
        return (
            f'<table class="pllm-table pllm-holding"><thead><tr><th scope="col">Buffer now</th>{heads}</tr></thead>'
            f"<tbody>{body}</tbody></table>"
        )

    def _empty_plot(self) -> go.FigureWidget:
        fig = make_subplots(
            rows=1, cols=2, shared_yaxes=True, subplot_titles=["left", "right"], horizontal_spacing=0.05
        )
        for column in (1, 2):
            for held in (False, True):
                fig.add_scatter(
                    x=[], y=[], mode="lines", line={"width": 2.5 if held else 1.2}, showlegend=False, row=1, col=column,
                    hovertemplate="message %{y}<extra></extra>",
                )  # fmt: skip
            fig.add_scatter(
                x=[0, 0], y=[0, 1], mode="lines", line={"color": figures.SOFT_INK, "dash": "dot", "width": 1.5},
                showlegend=False, hoverinfo="skip", row=1, col=column,
            )  # fmt: skip
            fig.update_xaxes(title_text="messages seen", row=1, col=column)
        fig.update_yaxes(title_text="kept message", col=1)
        fig.update_layout(template="pllm", height=400, margin={"l": 70, "r": 16, "t": 40, "b": 60})
        plot = go.FigureWidget(fig)
        plot._config = {**plot._config, **figures.CONFIG, "displayModeBar": False}
        return plot

    def _draw_plot(self, m: Moment) -> None:
        n = len(m.scored)
        for column, s in enumerate(m.sides):
            look = figures.METHODS[s.play.policy]
            here = [(born, gone) for born, gone in s.play.lives if born < m.position]
            gone = [(a, b) for a, b in here if b < m.position]
            held = [(a, m.position) for a, b in here if b >= m.position]
            present = ([m.position, m.position], [0, n])
            drawn = (
                (_segments(gone), figures.tint(look.colour, 0.45)),
                (_segments(held), look.colour),
                (present, figures.SOFT_INK),
            )
            for line, ((x, y), colour) in zip(self.plot.data[3 * column : 3 * column + 3], drawn, strict=True):
                # one batch a line: what a batch leaves out of some lines, the page would set to nothing
                with self.plot.batch_update():
                    line.x, line.y, line.line.color = x, y, colour
        with self.plot.batch_update():
            for column, s in enumerate(m.sides):
                self.plot.layout.annotations[column].text = html.escape(s.name)
            for axis in ("xaxis", "xaxis2", "yaxis", "yaxis2"):
                self.plot.layout[axis].range = [0, n * 1.01]


def _segments(lives: Sequence[tuple[int, int]]) -> tuple[list[int | None], list[int | None]]:
    """Horizontal lines with gaps between them; messages count from 1."""
    x: list[int | None] = []
    y: list[int | None] = []
    for born, end in lives:
        x += [born + 1, max(end, born + 1), None]
        y += [born + 1, born + 1, None]
    return x, y


def _reason(d: Decision) -> str:
    """The policy's grounds, where they say more than the decision itself."""
    return "" if d.action == "insert" else f"({d.reason})"


def _plain_decision(s: Side) -> str:
    if s.decision is None:
        return "no decision yet"
    if s.decision.replaced is not None:
        return f"replaces message {s.decision.replaced.position + 1}"
    return DONE[s.decision.action].lower()


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


def policy_duel(
    scored: ScoredStream,
    encoder: Encoder,
    lexicons: Lexicons,
    *,
    person: int = 0,
    bins: int = 32,
    seed: int = 0,
    others: int = 3,
    left: str = "quality",
    right: str = "random",
) -> PolicyDuel:
    """Play a person's stream through two policies side by side.

    Parameters
    ----------
    scored : the stream of ``person``, from ``streaming_study.person_scores``; other people are
        scored when they are chosen, as many of their messages.
    bins, seed, left, right : what the widget starts with; policies by their keys in ``POLICIES``.
    others : how many of the next most active people can be chosen, too.

    Raises :class:`~pllm_helpers.runtime.InputError` on an unknown policy and on more bins than messages.
    """
    for key in (left, right):
        if key not in POLICIES:
            raise InputError("policy", f"expected one of {', '.join(POLICIES)}, got {key!r}")
    return PolicyDuel(
        scored={person: scored},
        people=tuple(range(person, person + others + 1)),
        messages=len(scored) + scored.left_out,
        encoder=encoder,
        lexicons=lexicons,
        bins=bins,
        seed=seed,
        left=left,
        right=right,
    )
