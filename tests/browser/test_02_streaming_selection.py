"""Notebook 02 in a real browser: two policies side by side against the package in this process."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from pllm_helpers.experiments import streaming_study as study
from pllm_helpers.figures import METHODS, SOFT_INK
from pllm_helpers.models import load_encoder
from pllm_helpers.selection import load_lexicons

from .kit import Lab, LabPage

pytestmark = pytest.mark.model

MESSAGES, BINS = 120, 16


@pytest.fixture(scope="module")
def people() -> dict[int, study.ScoredStream]:
    encoder, lexicons = load_encoder(), load_lexicons("medical", "emotion", "clusters")
    return {rank: study.person_scores(rank, MESSAGES, encoder, lexicons) for rank in (0, 2)}


@pytest.fixture(scope="module")
def page(lab: Lab) -> Iterator[LabPage]:
    with lab.open("02_streaming_selection", parameters={"messages": MESSAGES, "buffer_size": BINS}) as nb:
        yield nb


@pytest.fixture
def nb(page: LabPage) -> LabPage:
    """The open notebook in its starting state."""
    if page.button("Pause").count():
        page.button("Pause").click()
    page.by_label("Person").select_option("Person 0")
    page.by_label("Left policy").select_option(METHODS["quality"].name)
    page.by_label("Right policy").select_option(METHODS["random"].name)
    number(page, "Seed", 0)
    number(page, "Bins", BINS)
    number(page, "Messages per step", 1)
    page.by_label("Messages seen").focus()
    page.page.keyboard.press("End")
    arrived(page, MESSAGES)
    return page


def number(nb: LabPage, label: str, value: int) -> None:
    box = nb.by_label(label)
    box.fill(str(value))
    box.press("Tab")


def arrived(nb: LabPage, count: int, timeout: float = 60) -> None:
    """Wait until the page shows this moment, with nothing left to do."""
    wanted = f"Message {count} of" if count else "Nothing has arrived yet."
    nb.eventually(lambda: wanted in nb.output().locator(".pllm-explorable").inner_text(), timeout)
    nb.eventually(lambda: nb.output().locator(".pllm-busy.on").count() == 0, timeout)


BINS_JS = """e => Array.from(e.querySelectorAll('.pllm-bins li[data-message]'))
  .map(li => [Number(li.dataset.slot), Number(li.dataset.message)])"""


def check(nb: LabPage, scored: study.ScoredStream, policies: tuple[str, str], at: int, bins: int = BINS, seed: int = 0):
    """Bins, decision and figure of both sides are those of the package."""
    runs = [study.play(scored, key, bins=bins, seed=seed) for key in policies]

    def same() -> None:
        for side, run in enumerate(runs):
            section = nb.output().locator(".pllm-side").nth(side)
            kept = [[slot, int(i) + 1] for slot, i in enumerate(run.slots(at)) if i >= 0]
            assert section.evaluate(BINS_JS) == kept, (policies[side], at)
            assert section.get_attribute("data-policy") == policies[side]
            if at:
                decision = section.locator(".pllm-decision")
                assert decision.get_attribute("data-action") == run.decisions[at - 1].action
            figure = nb.figure()
            heights = [y for y in figure["data"][3 * side + 1]["y"] if y is not None]
            assert sorted(set(heights)) == sorted(m for _, m in kept)
            ended = [y for y in figure["data"][3 * side]["y"] if y is not None]
            assert len(ended) == 2 * sum(d.action == "replace" for d in run.decisions[:at])
            present = figure["data"][3 * side + 2]
            assert present["x"] == [at, at] and present["line"]["color"] == SOFT_INK
            assert figure["data"][3 * side + 1]["line"]["color"] == METHODS[policies[side]].colour
            assert figure["layout"]["annotations"][side]["text"] == METHODS[policies[side]].name

    nb.eventually(same)


def test_the_starting_state(nb: LabPage, people: dict):
    check(nb, people[0], ("quality", "random"), MESSAGES)
    held = study.holdings(people[0], study.play(people[0], "quality", bins=BINS, seed=0).kept())
    assert f"mean pairwise cosine {held['redundancy']:.3f}" in nb.text(".pllm-holding")
    nb.check_accessible()
    nb.screenshot("02_start")


def test_slider_and_steps_by_keyboard(nb: LabPage, people: dict):
    slider = nb.by_label("Messages seen")
    slider.focus()
    nb.page.keyboard.press("Home")
    arrived(nb, 0)
    check(nb, people[0], ("quality", "random"), 0)
    nb.page.keyboard.press("ArrowRight")
    arrived(nb, 1)
    number(nb, "Messages per step", 25)
    nb.button("Step forward").focus()
    nb.page.keyboard.press("Enter")
    arrived(nb, 26)
    nb.page.keyboard.press("Enter")
    arrived(nb, 51)
    check(nb, people[0], ("quality", "random"), 51)
    nb.button("Step back").click()
    arrived(nb, 26)
    assert float(slider.input_value()) == 26
    nb.check_accessible()
    nb.screenshot("02_middle")


def test_play_and_pause(nb: LabPage, people: dict):
    nb.by_label("Messages seen").focus()
    nb.page.keyboard.press("Home")
    arrived(nb, 0)
    nb.button("Play").click()
    nb.eventually(lambda: float(nb.by_label("Messages seen").input_value()) >= 3)
    nb.button("Pause").click()
    nb.eventually(lambda: nb.button("Play").count() == 1)
    nb.page.wait_for_timeout(800)
    at = int(float(nb.by_label("Messages seen").input_value()))
    nb.page.wait_for_timeout(1200)
    assert int(float(nb.by_label("Messages seen").input_value())) == at and 3 <= at < MESSAGES
    check(nb, people[0], ("quality", "random"), at)
    number(nb, "Messages per step", 40)
    nb.button("Play").click()
    arrived(nb, MESSAGES)
    nb.eventually(lambda: nb.button("Play").count() == 1)


@pytest.mark.parametrize(("left", "right"), [("released_code", "fifo"), ("kcenter", "facility")])
def test_other_policies_by_mouse(nb: LabPage, people: dict, left: str, right: str):
    nb.by_label("Left policy").select_option(METHODS[left].name)
    nb.by_label("Right policy").select_option(METHODS[right].name)
    check(nb, people[0], (left, right), MESSAGES)
    nb.screenshot(f"02_{left}")


def test_seed_and_bins(nb: LabPage, people: dict):
    number(nb, "Seed", 7)
    check(nb, people[0], ("quality", "random"), MESSAGES, seed=7)
    number(nb, "Bins", 5)
    check(nb, people[0], ("quality", "random"), MESSAGES, bins=5, seed=7)
    number(nb, "Bins", MESSAGES + 1)
    nb.eventually(lambda: f"Bins: expected at most {MESSAGES}" in nb.text("[role=alert]"))
    check(nb, people[0], ("quality", "random"), MESSAGES, bins=5, seed=7)  # the last that worked stays
    nb.check_accessible()
    nb.screenshot("02_error")
    number(nb, "Bins", 6)
    nb.eventually(lambda: nb.text("[role=alert]") == "")
    check(nb, people[0], ("quality", "random"), MESSAGES, bins=6, seed=7)


def test_another_person_is_scored_in_the_background(nb: LabPage, people: dict):
    seen = "() => { window.pllmSeen = []; const e = document.querySelector('.pllm-progress');"
    seen += " new MutationObserver(() => window.pllmSeen.push(e.textContent)).observe(e, {childList: true}); }"
    nb.page.evaluate(seen)
    nb.by_label("Person").select_option("Person 2")
    first = people[2].dialogues[MESSAGES - 1].answer.split()[0]
    nb.eventually(lambda: first in nb.text(".pllm-text"), 120)
    check(nb, people[2], ("quality", "random"), MESSAGES)
    progress = nb.page.evaluate("() => window.pllmSeen")
    assert any("Scoring person 2: 64 of 120" in text for text in progress) and progress[-1] == ""


def test_the_buffer_can_be_read_and_the_figure_is_described(nb: LabPage, people: dict):
    kept = study.play(people[0], "quality", bins=BINS, seed=0).kept()
    nb.output().get_by_text(f"Read the {BINS} buffered messages").first.click()
    rows = nb.output().locator(".pllm-scroll").first.locator("tbody tr")
    nb.eventually(lambda: rows.first.is_visible())
    assert [int(t) for t in rows.locator("td:first-child").all_inner_texts()] == sorted(int(i) + 1 for i in kept)
    nb.output().get_by_text("Describe this figure").click()
    text = nb.output().locator(".pllm-alt p")
    nb.eventually(lambda: text.is_visible())
    assert f"{BINS} lines reach the present, from message {kept.min() + 1} to {kept.max() + 1}" in text.inner_text()
    nb.check_accessible()
