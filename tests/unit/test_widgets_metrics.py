"""The metric explorer without a page: it shows what the package computes, and nothing else."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest

from pllm_helpers.dialogue import DialogueSet
from pllm_helpers.figures import PLOTLY_MIME
from pllm_helpers.models import Encoder, load_encoder
from pllm_helpers.runtime import InputError
from pllm_helpers.selection import (
    READINGS,
    DomainMeans,
    Lexicons,
    embedding_probabilities,
    entropy_of_embedding,
    load_lexicons,
    score_dialogues,
)
from pllm_helpers.widgets import MetricExplorer, metric_explorer
from pllm_helpers.widgets.metrics import EXAMPLES, OWN

BUFFER = [
    DialogueSet("a", "Which tablets are for my knee?", "Take one dose of ibuprofen after food."),
    DialogueSet("a", "My arm and my shoulder ache.", "Rest the muscle for two days."),
    DialogueSet("a", "What is the time?", "Ten past four."),
]


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return load_encoder()


@pytest.fixture(scope="module")
def lexicons() -> Lexicons:
    return load_lexicons()


@pytest.fixture
def explorer(encoder: Encoder, lexicons: Lexicons) -> MetricExplorer:
    return metric_explorer(encoder, lexicons, BUFFER)


@pytest.mark.parametrize("reading", READINGS)
@pytest.mark.parametrize("n", [1, 2, 7, 500])
def test_probabilities_are_those_behind_the_score(reading: str, n: int):
    x = np.random.default_rng(n).normal(size=(n, 384))
    p = embedding_probabilities(x, reading)
    assert p.sum() == pytest.approx(1) and (p >= 0).all()
    entropy = -sum(v * math.log(v) for v in p if v > 0)
    base = math.log(2) * math.log2(n + 1) if reading == "histogram" else math.log(n) if n > 1 else 1.0
    assert entropy / base == pytest.approx(entropy_of_embedding(x, reading), abs=1e-9)
    assert len(p) == {"norm": n, "spectral": min(n, 384), "histogram": 100}[reading]


def test_probabilities_at_the_edges():
    assert embedding_probabilities(np.zeros((3, 4)), "norm").tolist() == [1, 0, 0]
    same = embedding_probabilities(np.ones((4, 8)), "spectral")
    assert same[0] == pytest.approx(1) and (np.diff(same) <= 0).all()
    with pytest.raises(InputError):
        embedding_probabilities(np.zeros((0, 4)), "norm")
    with pytest.raises(InputError):
        embedding_probabilities(np.full((2, 4), np.nan))


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        *(pair for name, pair in EXAMPLES.items() if name != "Empty"),
        ("", "Only an answer about my shoulder"),
        ("word " * 600, "more than the encoder reads"),
        ("Ärztin: don’t panic — naïve café 12:30", "Fieber? 38,5 °C"),
    ],
)
def test_every_number_is_the_packages(
    explorer: MetricExplorer, encoder: Encoder, lexicons: Lexicons, question: str, answer: str
):
    shown = explorer.set(question=question, answer=answer)
    dialogue = DialogueSet("x", question, answer)
    tables = {r: score_dialogues([dialogue], encoder, lexicons, reading=r) for r in READINGS}
    for r, table in tables.items():
        assert shown.eoe[r] == pytest.approx(float(table.eoe[0]), abs=1e-4)
    table = tables["spectral"]
    assert shown.dss == pytest.approx(float(table.dss[0])) and shown.domain == table.domain_names[0]
    means, buffered = DomainMeans(), score_dialogues(BUFFER, encoder, lexicons)
    for e, d in zip(buffered.embeddings, buffered.domain_names, strict=True):
        means.add(e, d)
    assert shown.idd == pytest.approx(means.idd(table.embeddings[0], shown.domain), abs=1e-5)
    drawn = [np.asarray(t.y) for t in explorer.plot.data]
    for y, r in zip(drawn, READINGS, strict=True):
        assert y == pytest.approx(shown.p[r])
    cards = dict(re.findall(r'data-score="([^"]+)">([^<]*)<', explorer.cards.html))
    assert cards == {
        "EOE": f"{shown.eoe['spectral']:.3f}",
        "DSS": f"{shown.dss:.3f}",
        "Dominant domain": shown.domain or "none",
        "IDD": f"{shown.idd:.3f}",
    }


def test_words_are_marked_with_the_name_of_their_lexicon(encoder: Encoder):
    explorer = metric_explorer(encoder, {"fruit": {"apple", "pear"}, "colour": {"pear", "red"}}, BUFFER)
    explorer.set(question="A Pear & a <b>red</b> apple", answer="")
    marked = re.findall(r"<mark[^>]*underline (\w+)[^>]*>([^<]*)</mark><sup[^>]*>([^<]*)</sup>", explorer.words.html)
    assert [(w, names) for _, w, names in marked] == [("Pear", "fruit, colour"), ("red", "colour"), ("apple", "fruit")]
    text = re.sub(r"<sup.*?</sup>|<[^>]+>", "", explorer.words.html)
    assert "A Pear &amp; a &lt;b&gt;red&lt;/b&gt; apple" in text


def test_lexicons_of_one_family_differ_without_colour(encoder: Encoder, lexicons: Lexicons):
    explorer = metric_explorer(encoder, lexicons, BUFFER)
    looks = {name: explorer._looks[name] for name in lexicons}
    assert len(set(looks.values())) == len(lexicons)
    assert len({line for colour, line in looks.values() if colour == looks["drug"][0]}) == 3


def test_hostile_text_is_escaped_everywhere(explorer: MetricExplorer):
    hostile = "<img src=x onerror=alert(1)> dose"
    explorer.set(question=hostile, answer="</div><script>")
    for html in (explorer.words.html, explorer.cards.html, explorer.described.html):
        assert "<img" not in html and "<script" not in html
    explorer.set(question="<b>dose", answer="")
    assert list(explorer.plot.layout.xaxis.ticktext) == ["&lt;", "b", "&gt;", "dose"]


def test_empty_dialogue_says_what_is_missing(explorer: MetricExplorer):
    with pytest.raises(InputError, match="question or an answer"):
        explorer.example.value = "Empty"
    assert "Type something or choose an example" in explorer._error.html


def test_examples_fill_the_boxes_and_typing_makes_the_text_ones_own(explorer: MetricExplorer):
    runs = explorer.runs
    explorer.example.value = "One word"
    assert (explorer.question.value, explorer.answer.value) == EXAMPLES["One word"]
    assert explorer.result.text == "Thanks" and explorer.runs == runs + 1
    explorer.question.value = "Thanks a lot"
    assert explorer.example.value == OWN and explorer.result.text == "Thanks a lot"


def test_the_buffer_grows_and_empties(explorer: MetricExplorer):
    explorer.set(question="My arm hurts", answer="")
    before = explorer.result
    assert before.domain == "anatomy" and before.peers == 1 and before.buffered == 3
    explorer.keep.click()
    kept = explorer.result
    assert (kept.peers, kept.buffered) == (2, 4)
    assert kept.idd == pytest.approx((before.idd + 0) / 2, abs=1e-5)  # itself is at distance 0
    explorer.drop.click()
    assert (explorer.result.idd, explorer.result.peers, explorer.result.buffered) == (1.0, 0, 0)
    explorer.restore.click()
    assert explorer.result.buffered == 3 and explorer.result.idd == pytest.approx(before.idd)


def test_the_starting_state_is_kept_for_exports(encoder: Encoder, lexicons: Lexicons):
    explorer = metric_explorer(encoder, lexicons, BUFFER, reading="norm")
    first = explorer.result
    explorer.set(question="something else")
    bundle, metadata = explorer._repr_mimebundle_()
    html = bundle["text/html"]
    assert f"{first.eoe['norm']:.3f}" in html and "afraid (fear)" in html and "something else" not in html
    assert len(bundle[PLOTLY_MIME]["data"]) == 3
    assert f"spectral: EOE {first.eoe['spectral']:.3f}" in metadata["alt"]


def test_default_buffer_and_bad_arguments(encoder: Encoder, lexicons: Lexicons):
    assert metric_explorer(encoder, lexicons).result.buffered == 32
    with pytest.raises(InputError, match="spectrl"):
        metric_explorer(encoder, lexicons, BUFFER, reading="spectrl")
    with pytest.raises(InputError, match="lexicon"):
        metric_explorer(encoder, {}, BUFFER)
