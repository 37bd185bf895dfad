"""Notebook 00 in a real browser: the machine check and the chat, against the model in this process."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from pllm_helpers.models import LLM, generate, load_llm

from .kit import Lab, LabPage, notebook

pytestmark = pytest.mark.model


@pytest.fixture(scope="module")
def llm() -> LLM:
    return load_llm()


@pytest.fixture(scope="module")
def page(lab: Lab) -> Iterator[LabPage]:
    with lab.open("00_start_here") as nb:
        yield nb


@pytest.fixture
def nb(page: LabPage) -> LabPage:
    """The open notebook with an empty conversation and greedy answers of at most 12 tokens."""
    page.eventually(lambda: page.output().locator(".pllm-busy.on").count() == 0)
    page.button("Reset").click()
    page.eventually(lambda: page.text(".pllm-log") == "Nothing said yet.")
    page.by_label("Temperature").fill("0")
    page.by_label("Longest answer, in tokens").fill("12")
    page.by_label("Seed").fill("0")
    page.by_label("Your message").fill("")
    return page


def answers(nb: LabPage) -> list[str]:
    return [t.strip() for t in nb.output().locator(".pllm-turn.model .pllm-said").all_inner_texts()]


def answered(nb: LabPage, n: int) -> None:
    nb.eventually(lambda: nb.output().locator(".pllm-foot").count() == n, timeout=240)


def visible(text: str) -> str:
    return "\n".join(line.strip() for line in text.split("\n")).strip()


def test_machine_check_tells_the_truth(lab: Lab, llm: LLM):
    setup = "from pllm_helpers.models import load_llm\nfrom pllm_helpers.widgets import machine_check\nllm = load_llm()"
    with lab.open(notebook(setup=setup, widget="machine_check(llm)")) as nb:
        rows = [
            [" ".join(c.split()) for c in row.locator("th, td").all_inner_texts()]
            for row in nb.output().locator("tbody tr").all()
        ]
        values = {row[0]: row[1] for row in rows}
        assert values["Language model"] == llm.name and values["Number format"] == llm.dtype
        assert values["Network"] == "off"
        assert re.fullmatch(r"[1-9]\d* of [1-9]\d*", values["Threads"])
        nb.check_accessible()
        nb.screenshot("00_machine")


def test_keyboard_only_conversation_of_two_turns(nb: LabPage, llm: LLM):
    first, second = "Where do puffins nest in summer?", "And what do they eat there?"
    nb.by_label("Your message").focus()
    nb.page.keyboard.type(first)
    nb.page.keyboard.press("Enter")
    answered(nb, 1)
    assert nb.by_label("Your message").input_value() == ""
    nb.page.keyboard.type(second)  # the box has kept the focus
    nb.page.keyboard.press("Enter")
    answered(nb, 2)
    talk = [{"role": "user", "content": first}]
    (one,) = generate(llm, [talk], max_new_tokens=12)
    talk += [{"role": "assistant", "content": one}, {"role": "user", "content": second}]
    (two,) = generate(llm, [talk], max_new_tokens=12, details=True)
    assert answers(nb) == [visible(one), visible(two.text)]
    foot = nb.output().locator(".pllm-foot").last.inner_text()
    assert re.match(rf"{two.tokens} tokens? in \d+\.\d s: \d+ tokens/s", foot)
    assert ("cut at the longest answer allowed" in foot) is not two.finished
    nb.check_accessible()
    nb.screenshot("00_chat")


def test_mouse_temperature_and_seed_reach_the_model(nb: LabPage, llm: LLM):
    nb.by_label("Temperature").focus()
    for _ in range(9):
        nb.page.keyboard.press("ArrowRight")
    nb.by_label("Seed").fill("7")
    nb.by_label("Your message").fill("Tell me about lighthouses.")
    nb.button("Send").click()
    answered(nb, 1)
    (expected,) = generate(llm, ["Tell me about lighthouses."], max_new_tokens=12, temperature=0.9, seed=7)
    (greedy,) = generate(llm, ["Tell me about lighthouses."], max_new_tokens=12)
    assert answers(nb) == [visible(expected)] != [visible(greedy)]


def test_hostile_text_stays_text(nb: LabPage):
    hostile = "<img src=x onerror=\"document.title='broken'\"><script>document.title='broken'</script>"
    nb.by_label("Your message").fill(hostile)
    nb.page.keyboard.press("Enter")
    answered(nb, 1)
    assert nb.output().locator(".pllm-turn.you .pllm-said").inner_text() == hostile
    assert nb.output().locator("img, script").count() == 0 and "broken" not in nb.page.title()


def test_an_empty_message_gets_a_message_in_place(nb: LabPage):
    nb.by_label("Your message").fill("   ")
    nb.button("Send").click()
    nb.eventually(lambda: "Your message: expected some text, got none." in nb.text("[role=alert]"))
    assert nb.text(".pllm-log") == "Nothing said yet."
    nb.check_accessible()
    nb.screenshot("00_chat_error")
    nb.by_label("Your message").fill("Hello")
    nb.button("Send").click()
    answered(nb, 1)
    assert nb.text("[role=alert]") == ""


def test_no_double_send_and_typing_goes_on_while_the_model_writes(nb: LabPage):
    box = nb.by_label("Your message")
    nb.by_label("Longest answer, in tokens").fill("24")
    nb.page.keyboard.press("Tab")
    box.fill("Explain why the sky is blue.")
    for _ in range(3):
        nb.page.keyboard.press("Enter")
    assert nb.button("Send").get_attribute("aria-disabled") == "true"
    nb.eventually(lambda: nb.output().get_by_text("writing an answer…").is_visible())
    nb.eventually(lambda: box.input_value() == "")
    nb.page.keyboard.type("Next")
    answered(nb, 1)
    nb.eventually(lambda: nb.button("Send").get_attribute("aria-disabled") == "false")
    assert len(answers(nb)) == 1 and box.input_value() == "Next"


def test_a_new_conversation_drops_the_answer_in_the_making(nb: LabPage):
    nb.by_label("Longest answer, in tokens").fill("24")
    nb.by_label("Your message").fill("List ten rivers of Europe.")
    nb.page.keyboard.press("Enter")
    nb.eventually(lambda: nb.output().get_by_text("writing an answer…").is_visible())
    nb.button("Reset").focus()
    nb.page.keyboard.press("Enter")
    nb.eventually(lambda: nb.text(".pllm-log") == "Nothing said yet.")
    nb.eventually(lambda: nb.output().locator(".pllm-busy.on").count() == 0, timeout=240)
    assert nb.text(".pllm-log") == "Nothing said yet."
