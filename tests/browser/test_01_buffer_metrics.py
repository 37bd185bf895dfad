"""Notebook 01 in a real browser: the metric explorer against the package in this process."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from pllm_helpers.corpora import authored_dialogues
from pllm_helpers.dialogue import DialogueSet
from pllm_helpers.models import Encoder, load_encoder
from pllm_helpers.selection import (
    READINGS,
    Lexicons,
    embedding_probabilities,
    entropy_of_embedding,
    in_domain_dissimilarity,
    load_lexicons,
    score_dialogues,
)

from .kit import Lab, LabPage

pytestmark = pytest.mark.model

NOVEL = (
    "Grandma fears the new inhaler: how many ml per dose?",
    "Two puffs, and her doctor trusts that the wheezing stops by Sunday.",
)


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return load_encoder()


@pytest.fixture(scope="module")
def lexicons() -> Lexicons:
    return load_lexicons("medical", "emotion", "clusters")


@pytest.fixture(scope="module")
def page(lab: Lab) -> Iterator[LabPage]:
    with lab.open("01_buffer_metrics") as nb:
        yield nb


@pytest.fixture
def nb(page: LabPage) -> LabPage:
    """The open notebook with the buffer it starts with, showing one of its examples."""
    page.button("Restore the buffer").click()
    page.by_label("Example").select_option("One word")
    page.eventually(lambda: page.text(".pllm-text") == "Thanks" and "buffer holds 32" in page.text(".pllm-cards"))
    return page


def card(nb: LabPage, name: str) -> str:
    return nb.text(f"[data-score='{name}']")


def settled(nb: LabPage, text: str) -> None:
    """Wait until the page shows this text and its numbers, figure included."""
    nb.eventually(lambda: nb.output().locator(".pllm-text").evaluate(PLAIN) == text)
    nb.eventually(lambda: nb.output().locator(".pllm-busy.on").count() == 0)


# the text without the names of lexicons
PLAIN = """e => { const c = e.cloneNode(true); c.querySelectorAll('sup').forEach(s => s.remove());
  c.querySelectorAll('br').forEach(b => b.replaceWith('\\n')); return c.textContent; }"""


def check_numbers(nb: LabPage, dialogue: DialogueSet, encoder: Encoder, lexicons: Lexicons, buffer: list) -> None:
    """Cards and figure show what the package gives for this dialogue."""
    table = score_dialogues([dialogue], encoder, lexicons)
    kept = score_dialogues(buffer, encoder, lexicons) if buffer else None
    domain = table.domain_names[0]
    peers = [e for e, d in zip(kept.embeddings, kept.domain_names, strict=True) if d == domain] if kept else []
    idd = in_domain_dissimilarity(table.embeddings[0], np.array(peers).reshape(len(peers), encoder.dim))
    assert float(card(nb, "EOE")) == pytest.approx(float(table.eoe[0]), abs=6e-4)
    assert float(card(nb, "DSS")) == pytest.approx(float(table.dss[0]), abs=6e-4)
    assert card(nb, "Dominant domain") == (domain or "none")
    assert float(card(nb, "IDD")) == pytest.approx(idd, abs=6e-4)
    vectors = encoder.embed([dialogue.text])[0].vectors
    figure = nb.figure()
    for trace, title, reading in zip(figure["data"], figure["layout"]["annotations"], READINGS, strict=True):
        expected = embedding_probabilities(vectors, reading)
        assert trace["y"] == pytest.approx(expected.tolist(), abs=1e-5), reading
        assert title["text"] == f"{reading}: EOE {entropy_of_embedding(vectors, reading):.3f}"


def default_buffer() -> list[DialogueSet]:
    return list(authored_dialogues()[::12][:32])


def test_novel_text_typed_by_keyboard(nb: LabPage, encoder: Encoder, lexicons: Lexicons):
    nb.by_label("Question").focus()
    nb.page.keyboard.press("ControlOrMeta+A")
    nb.page.keyboard.type(NOVEL[0])
    nb.page.keyboard.press("Tab")
    nb.page.keyboard.type(NOVEL[1])
    settled(nb, "\n".join(NOVEL))
    check_numbers(nb, DialogueSet("x", *NOVEL), encoder, lexicons, default_buffer())
    assert nb.by_label("Example").input_value() == "Your own text"
    marked = dict(
        nb.output().locator("mark").evaluate_all("m => m.map(e => [e.textContent, e.nextSibling.textContent])")
    )
    assert marked["dose"] == "administration" and marked["fears"].startswith("fear")
    nb.check_accessible()
    nb.screenshot("01_novel_text")


def test_examples_chosen_by_keyboard_and_by_mouse(nb: LabPage, encoder: Encoder, lexicons: Lexicons):
    nb.by_label("Example").focus()
    for _ in range(4):  # from "One word" up to the first example
        nb.page.keyboard.press("ArrowUp")
    nb.eventually(lambda: nb.by_label("Question").input_value().startswith("I was so afraid"))
    dialogue = DialogueSet("x", nb.by_label("Question").input_value(), nb.by_label("Answer").input_value())
    settled(nb, dialogue.text)
    check_numbers(nb, dialogue, encoder, lexicons, default_buffer())
    nb.screenshot("01_example")
    nb.by_label("Example").select_option("Nothing but repetition")
    settled(nb, "ok ok ok ok ok ok\nok ok ok ok ok ok")
    check_numbers(nb, DialogueSet("x", *["ok ok ok ok ok ok"] * 2), encoder, lexicons, default_buffer())


def test_emoji_only_has_no_tokens_and_no_error(nb: LabPage):
    nb.by_label("Example").select_option("Emoji only")
    settled(nb, "😀🎉\n👍")
    assert card(nb, "EOE") == card(nb, "DSS") == "0.000" and card(nb, "Dominant domain") == "none"
    assert [len(t["y"]) for t in nb.figure()["data"]] == [0, 0, 0]
    assert nb.text("[role=alert]") == ""


def test_an_empty_dialogue_gets_a_message_in_place(nb: LabPage, encoder: Encoder, lexicons: Lexicons):
    nb.by_label("Question").fill("")
    nb.eventually(lambda: "Dialogue: expected a question or an answer, both are empty." in nb.text("[role=alert]"))
    assert nb.text(".pllm-text") == "Thanks"  # the last result that worked stays
    nb.check_accessible()
    nb.screenshot("01_error")
    nb.by_label("Answer").fill("Back again")
    settled(nb, "Back again")
    nb.eventually(lambda: nb.text("[role=alert]") == "")
    check_numbers(nb, DialogueSet("x", "", "Back again"), encoder, lexicons, default_buffer())


def test_hostile_text_stays_text(nb: LabPage):
    hostile = "<img src=x onerror=\"document.title='broken'\"> dose <script>document.title='broken'</script>"
    nb.by_label("Question").fill(hostile)
    settled(nb, hostile)
    assert nb.output().locator("img, script").count() == 0
    nb.by_label("Question").fill("<b>dose")  # short enough for the figure to name its tokens
    settled(nb, "<b>dose")
    ticks = nb.output().locator(".xtick text").all_text_contents()
    assert ticks[:4] == ["<", "b", ">", "dose"]
    assert "broken" not in nb.page.title()


def test_the_buffer_changes_idd(nb: LabPage, encoder: Encoder, lexicons: Lexicons):
    nb.by_label("Question").fill("My knee aches after running.")
    settled(nb, "My knee aches after running.")
    mine = DialogueSet("x", "My knee aches after running.", "")
    check_numbers(nb, mine, encoder, lexicons, default_buffer())
    nb.button("Keep in buffer").click()
    nb.eventually(lambda: "buffer holds 33" in nb.text(".pllm-cards"))
    check_numbers(nb, mine, encoder, lexicons, [*default_buffer(), mine])
    nb.button("Empty the buffer").focus()
    nb.page.keyboard.press("Enter")
    nb.eventually(lambda: card(nb, "IDD") == "1.000")
    check_numbers(nb, mine, encoder, lexicons, [])


def test_the_figure_is_described_in_words(nb: LabPage, encoder: Encoder):
    nb.output().get_by_text("Describe this figure").click()
    text = nb.output().locator(".pllm-alt p")
    nb.eventually(lambda: text.is_visible())
    value = entropy_of_embedding(encoder.embed(["Thanks"])[0].vectors, "histogram")
    assert f"histogram: EOE {value:.3f}" in text.inner_text()
    nb.check_accessible()
