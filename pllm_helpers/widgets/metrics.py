"""Notebook 01: type a dialogue and watch the three buffer metrics of Qin et al. react."""

from __future__ import annotations

import html
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ipywidgets
import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float
from plotly.subplots import make_subplots

from .. import figures
from ..corpora import authored_dialogues
from ..dialogue import DialogueSet
from ..models import Encoder
from ..runtime import InputError
from ..selection import (
    BUILT_IN,
    DEFAULT_READING,
    READINGS,
    Span,
    domain_specific_score,
    dominant_domain,
    embedding_probabilities,
    entropy_of_embedding,
    highlight,
    in_domain_dissimilarity,
    score_dialogues,
    word_tokens,
)
from .base import Explorable
from .controls import Region, esc

__all__ = ["MetricExplorer", "Scores", "metric_explorer"]

OWN = "Your own text"
EXAMPLES: Mapping[str, tuple[str, str]] = {
    "Medicine and worry": (
        "I was so afraid of the needle that my arm went numb. How many days do I take the tablets?",
        "Most people finish the whole course, usually seven days. Trust your doctor on the dose, and call the clinic "
        "if the numbness stays.",
    ),
    "Rich content": (
        "Why did the harbour town of Saint-Pierre vanish in 1902?",
        "Mount Pelée erupted and a cloud of hot gas and ash destroyed it within minutes; hardly anyone survived.",
    ),
    "Everyday chat": ("lol ok see you at 8 then?", "haha yes, my sister is coming too"),
    "Nothing but repetition": ("ok ok ok ok ok ok", "ok ok ok ok ok ok"),
    "One word": ("Thanks", ""),
    "Emoji only": ("😀🎉", "👍"),
    "Empty": ("", ""),
}
UNDERLINES = ("solid", "double", "dotted", "dashed", "wavy")
X_TITLES = {"norm": "token", "spectral": "eigenvalue", "histogram": "component bin"}
SHOWN_TOKENS = 20  # more tick labels than that cannot be read


@dataclass(frozen=True)
class Scores:
    """What the package says about one dialogue.

    Attributes
    ----------
    text : question and answer. spans : its words. tokens : the encoder's tokens.
    eoe : score per reading. p : the probabilities behind it, shapes differ.
    dss, domain, hits : score, dominant domain, and the number of words in each lexicon.
    idd, peers, buffered : score, buffered sets of the same domain, buffered sets.
    """

    text: str
    spans: list[Span]
    tokens: list[str]
    eoe: dict[str, float]
    p: dict[str, Float[np.ndarray, " k"]]
    dss: float
    domain: str | None
    hits: dict[str, int]
    idd: float
    peers: int
    buffered: int


class MetricExplorer(Explorable):
    """Words marked by lexicon, three scores, and the p behind three readings of EOE."""

    title = "Score a dialogue"
    help = "Type, or choose an example. Every number is computed by the package from your text."
    encoder: Encoder
    lexicons: Mapping[str, Collection[str]]
    buffer: Sequence[DialogueSet]
    reading: str = DEFAULT_READING

    def build(self) -> tuple[dict[str, ipywidgets.Widget], list[ipywidgets.Widget]]:
        self._looks = _lexicon_looks(self.lexicons)
        self._empty()
        self._add(list(self.buffer))
        first = next(iter(EXAMPLES))
        question, answer = EXAMPLES[first]
        self.example = ipywidgets.Dropdown(options=[*EXAMPLES, OWN], value=first, description="Example")
        self.question = ipywidgets.Textarea(question, description="Question", rows=3)
        self.answer = ipywidgets.Textarea(answer, description="Answer", rows=3)
        for w, kind in ((self.example, "pllm-row"), (self.question, "pllm-half"), (self.answer, "pllm-half")):
            w.add_class(kind)
        self.example.observe(self._chosen, names="value")
        for w in (self.question, self.answer):
            w.observe(self._typed, names="value")
        self.keep = ipywidgets.Button(description="Keep in buffer", tooltip="Add this dialogue to the buffer")
        self.drop = ipywidgets.Button(description="Empty the buffer", tooltip="Remove every dialogue from the buffer")
        self.restore = ipywidgets.Button(description="Restore the buffer", tooltip="Back to the buffer of the start")
        for button, action in (
            (self.keep, self.keep_dialogue),
            (self.drop, self.empty_buffer),
            (self.restore, self.restore_buffer),
        ):
            button.on_click(lambda _, action=action: self.act(action))
        buttons = ipywidgets.HBox([self.keep, self.drop, self.restore]).add_class("pllm-buttons")
        self.words, self.cards = Region(kind="pllm-words"), Region()
        self.plot, self.described = self._empty_plot(), Region()
        controls = {"example": self.example, "question": self.question, "answer": self.answer}
        return controls, [self.words, self.cards, buttons, self.plot, self.described]

    # -- computing ------------------------------------------------------------------------------
    def compute(self, question: str, answer: str, **_: str) -> Scores:
        dialogue = self._dialogue(question, answer)
        text = dialogue.text
        (embedded,) = self.encoder.embed([text])
        words = word_tokens(text)
        domain = dominant_domain(words, self.lexicons)
        peers = self._embeddings[[d == domain for d in self._domains]]
        some = len(embedded.tokens) > 0  # a text without tokens, such as emoji, has no entropy
        spans = highlight(text, self.lexicons)
        return Scores(
            text=text,
            spans=spans,
            tokens=embedded.tokens,
            eoe={r: entropy_of_embedding(embedded.vectors, reading=r) if some else 0.0 for r in READINGS},
            p={r: embedding_probabilities(embedded.vectors, reading=r) if some else np.zeros(0) for r in READINGS},
            dss=domain_specific_score(words, self.lexicons),
            domain=domain,
            hits={name: sum(name in s.lexicons for s in spans) for name in self.lexicons},
            idd=in_domain_dissimilarity(embedded.sentence, peers),
            peers=len(peers),
            buffered=len(self._kept),
        )

    def keep_dialogue(self) -> None:
        """Add the dialogue in the boxes to the buffer."""
        self._add([self._dialogue(self.question.value, self.answer.value)])
        self.refresh()

    def empty_buffer(self) -> None:
        """Remove every dialogue from the buffer."""
        self._empty()
        self.refresh()

    def restore_buffer(self) -> None:
        """Fill the buffer as it was at the start."""
        self._empty()
        self._add(list(self.buffer))
        self.refresh()

    def _dialogue(self, question: str, answer: str) -> DialogueSet:
        if not (question.strip() or answer.strip()):
            raise InputError(
                "Dialogue", "expected a question or an answer, both are empty", "Type something or choose an example."
            )
        return DialogueSet("you", question, answer, source="typed")

    def _empty(self) -> None:
        self._kept: list[DialogueSet] = []
        self._domains: list[str | None] = []
        self._embeddings = np.zeros((0, self.encoder.dim), dtype=np.float32)

    def _add(self, dialogues: list[DialogueSet]) -> None:
        if not dialogues:
            return
        table = score_dialogues(dialogues, self.encoder, self.lexicons, progress=False)
        self._kept = [*self._kept, *dialogues]
        self._domains = [*self._domains, *table.domain_names]
        self._embeddings = np.concatenate([self._embeddings, table.embeddings])

    # -- events ---------------------------------------------------------------------------------
    def _chosen(self, change: Any) -> None:
        if change["new"] in EXAMPLES:
            with self.held():
                self.question.value, self.answer.value = EXAMPLES[change["new"]]

    def _typed(self, _: Any) -> None:
        if EXAMPLES.get(self.example.value) not in (None, (self.question.value, self.answer.value)):
            if not self._hold:
                with self.held():
                    self.example.value = OWN

    # -- drawing --------------------------------------------------------------------------------
    def draw(self, result: Scores) -> None:
        self.words.html = self._words_html(result)
        self.cards.html = self._cards_html(result)
        self._draw_plot(result)
        self.described.html = figures.describe_html(self.describe(result))

    def announce(self, result: Scores) -> str:
        return (
            f"EOE {result.eoe[self.reading]:.3f}, DSS {result.dss:.3f}, "
            f"dominant domain {result.domain or 'none'}, IDD {result.idd:.3f}."
        )

    def summary(self, result: Scores) -> str:
        rows = [
            *((f"EOE, {r} reading", f"{v:.3f}") for r, v in result.eoe.items()),
            ("DSS", f"{result.dss:.3f}"),
            ("Dominant domain", result.domain or "none"),
            ("IDD", f"{result.idd:.3f}"),
        ]
        marked = ", ".join(f"{esc(s.word)} ({esc(', '.join(s.lexicons))})" for s in result.spans if s.lexicons)
        body = "".join(f'<tr><th scope="row">{esc(a)}</th><td>{esc(b)}</td></tr>' for a, b in rows)
        return (
            f"<p>{esc(result.text)}</p><p>Words in a lexicon: {marked or 'none'}.</p>"
            f"<table><tbody>{body}</tbody></table>"
        )

    def figure(self, result: Scores) -> tuple[go.Figure, str]:
        return go.Figure(self.plot.to_dict()), self.describe(result)

    def describe(self, result: Scores) -> str:
        """The figure in words."""
        if not result.tokens:
            return "Three empty bar charts: the text has no token that the encoder knows."
        parts = [f"Three bar charts of p for {len(result.tokens)} tokens, one per reading of EOE."]
        for r in READINGS:
            p = np.sort(result.p[r])[::-1]
            top = ", ".join(f"{x:.3f}" for x in p[:3])
            parts.append(f"{r}: EOE {result.eoe[r]:.3f}, {len(p)} bars, the tallest {top}, the smallest {p[-1]:.3f}.")
        return " ".join(parts)

    def _words_html(self, s: Scores) -> str:
        parts, at = [], 0
        for span in s.spans:
            parts.append(esc(s.text[at : span.start]))
            word = esc(s.text[span.start : span.end])
            if span.lexicons:
                colour, line = self._looks[span.lexicons[0]]
                names = esc(", ".join(span.lexicons))
                word = (
                    f'<mark class="pllm-word" style="background:{figures.tint(colour, 0.1)};'
                    f'text-decoration:underline {line} {colour}">{word}</mark>'
                    f'<sup class="pllm-lexicon">{names}</sup>'
                )
            parts.append(word)
            at = span.end
        parts.append(esc(s.text[at:]))
        found = [f"{name}\u00a0{n}" for name, n in s.hits.items() if n]
        legend = "Words in a lexicon: " + ", ".join(found) if found else "No word stands in a lexicon."
        return f'<div class="pllm-text">{"".join(parts)}</div><p class="pllm-help">{esc(legend)}</p>'

    def _cards_html(self, s: Scores) -> str:
        hits, words = sum(s.hits.values()), len(s.spans)
        counted = f"{_count(hits, 'hit')} in {_count(words, 'word')}, mean over {_count(len(s.hits), 'lexicon')}"
        sets = _count(s.peers, "set")
        peers = (
            f"mean distance to {sets} {'of this domain' if s.domain else 'without a domain'}; buffer holds {s.buffered}"
        )
        if not s.peers:
            peers = f"1 by definition: none of the {s.buffered} buffered sets is of this domain"
        cards = [
            (
                "EOE",
                f"{s.eoe[self.reading]:.3f}",
                s.eoe[self.reading],
                f"{self.reading} reading, {_count(len(s.tokens), 'token')}",
            ),
            ("DSS", f"{s.dss:.3f}", s.dss, counted),
            ("Dominant domain", s.domain or "none", None, "the lexicon with the most words"),
            ("IDD", f"{s.idd:.3f}", s.idd, peers),
        ]
        out = []
        for name, value, share, foot in cards:
            key = {"EOE": "eoe", "DSS": "dss", "IDD": "idd"}.get(name)
            colour = figures.method(key).colour if key else figures.SOFT_INK
            width = 0 if share is None else 100 * min(max(share, 0.0), 1.0)
            bar = f'<div class="pllm-bar"><span style="width:{width:.1f}%;background:{colour}"></span></div>'
            kind = "" if share is None else " num"
            out.append(
                f'<div class="pllm-card"><dt>{esc(name)}</dt><dd class="pllm-value{kind}" data-score="{esc(name)}">'
                f'{esc(value)}</dd><dd aria-hidden="true">{bar if share is not None else ""}</dd>'
                f'<dd class="pllm-help">{esc(foot)}</dd></div>'
            )
        return f'<dl class="pllm-cards">{"".join(out)}</dl>'

    def _empty_plot(self) -> go.FigureWidget:
        fig = make_subplots(rows=1, cols=3, subplot_titles=list(READINGS), horizontal_spacing=0.08)
        for i, r in enumerate(READINGS, start=1):
            fig.add_bar(x=[], y=[], row=1, col=i, showlegend=False, hovertemplate="%{x}: %{y:.4f}<extra></extra>")
            fig.data[-1].update(figures.trace_style(r, kind="bar"), marker_pattern_shape="")
            fig.update_xaxes(title_text=X_TITLES[r], row=1, col=i)
        fig.update_xaxes(tick0=0, dtick=25, range=[0, 101], col=3)
        fig.update_yaxes(rangemode="tozero", nticks=5)
        fig.update_yaxes(title_text="p", col=1)
        fig.update_layout(template="pllm", height=330, margin={"l": 64, "r": 10, "t": 40, "b": 60}, bargap=0.15)
        plot = go.FigureWidget(fig)
        plot._config = {**plot._config, **figures.CONFIG, "displayModeBar": False}
        return plot

    def _draw_plot(self, s: Scores) -> None:
        with self.plot.batch_update():
            for i, r in enumerate(READINGS):
                p, axis = s.p[r], self.plot.layout["xaxis" if i == 0 else f"xaxis{i + 1}"]
                self.plot.data[i].x, self.plot.data[i].y = np.arange(1, len(p) + 1), p
                self.plot.layout.annotations[i].text = f"{r}: EOE {s.eoe[r]:.3f}"
                if r == "norm":
                    named = 0 < len(s.tokens) <= SHOWN_TOKENS
                    axis.tickmode = "array" if named else "auto"
                    axis.tickvals = np.arange(1, len(p) + 1) if named else None
                    axis.ticktext = [html.escape(t) for t in s.tokens] if named else None
                    axis.tickangle = -60 if named else 0


def _count(n: int, what: str) -> str:
    return f"{n} {what}" if n == 1 else f"{n} {what}s"


def _lexicon_looks(lexicons: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """Colour by family of lexicons, kind of underline within it."""
    families = {member: family for family, members in BUILT_IN.items() for member in members}
    colours = {"medical": "medical", "emotion": "emotion", "clusters": "cluster"}
    looks, used = {}, {}
    for name in lexicons:
        family = families.get(name, name.split("/")[0])
        place = used[family] = used.get(family, -1) + 1
        colour = figures.METHODS[colours[family]].colour if family in colours else figures.PALETTE["wine"]
        looks[name] = (colour, UNDERLINES[place % len(UNDERLINES)])
    return looks


def metric_explorer(
    encoder: Encoder,
    lexicons: Mapping[str, Collection[str]],
    buffer: Sequence[DialogueSet] | None = None,
    reading: str = DEFAULT_READING,
) -> MetricExplorer:
    """Type a dialogue: words marked by lexicon, EOE, DSS, dominant domain and IDD, all live.

    Parameters
    ----------
    encoder : from :func:`~pllm_helpers.models.load_encoder`.
    lexicons : from :func:`~pllm_helpers.selection.load_lexicons`, or any mapping to sets of words.
    buffer : what IDD compares with; by default 32 of the authored dialogues. Buttons add to it
        and empty it.
    reading : the reading of EOE on the score card; the figure shows all three.

    Raises :class:`~pllm_helpers.runtime.InputError` on an unknown reading or without lexicons.
    """
    if reading not in READINGS:
        raise InputError("reading", f"expected one of {', '.join(READINGS)}, got {reading!r}")
    if not lexicons:
        raise InputError("lexicons", "expected at least one lexicon, got none")
    if buffer is None:
        buffer = authored_dialogues()[::12][:32]
    return MetricExplorer(encoder=encoder, lexicons=lexicons, buffer=buffer, reading=reading)
