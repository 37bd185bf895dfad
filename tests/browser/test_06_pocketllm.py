"""Notebook 06 in a real browser: the pocket lab against the package in this process."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from pllm_helpers.device import predict_memory
from pllm_helpers.experiments import lora_study, pocket_study
from pllm_helpers.experiments.pocket_study import TUNERS, Surface
from pllm_helpers.models import LLM, load_llm
from pllm_helpers.runtime import prepare
from pllm_helpers.tuning.data import token_rows
from pllm_helpers.widgets.pocket import PLACES

from .kit import Lab, LabPage

pytestmark = pytest.mark.model

MESSAGES, REPLIES = 64, 8
LONG = 180  # seconds that a run in an envelope may take on a busy machine
EPSILON = 1e-3


@pytest.fixture(scope="module")
def llm() -> LLM:
    prepare(0)
    return load_llm()


@pytest.fixture(scope="module")
def surface(llm: LLM) -> Surface:
    """The notebook's own batch, chosen once more."""
    earlier, _ = lora_study.earlier_and_later(0, MESSAGES, REPLIES)
    return Surface(llm, token_rows(llm, pocket_study.even_dialogues(llm, earlier, 2, 48), 512).rows)


@pytest.fixture(scope="module")
def page(lab: Lab) -> Iterator[LabPage]:
    with lab.open("06_pocketllm", parameters={"messages": MESSAGES, "replies": REPLIES}) as nb:
        yield nb


@pytest.fixture
def nb(page: LabPage) -> LabPage:
    """The open notebook at the model's own weights, seed 0, MeZO's epsilon, signs, and no run in progress."""
    page.eventually(lambda: page.button("Run in the envelope").is_enabled(), timeout=LONG)
    if page.button("Back to the start").is_enabled():
        page.button("Back to the start").click()
        page.eventually(lambda: "No step taken" in page.text(".pllm-body"), timeout=LONG)
    seed(page, 0)
    page.by_label("Epsilon").select_option("0.001 (MeZO's)")
    page.by_label("Noise z").select_option("signs (quick)")
    page.by_label("Learning rate").select_option("0.00001")
    page.eventually(lambda: "seed 0," in page.output().locator(".pllm-alt p").first.text_content(), timeout=LONG)
    return page


def seed(nb: LabPage, value: int) -> None:
    nb.by_label("Seed of z").fill(str(value))
    nb.page.keyboard.press("Enter")


def trace(nb: LabPage, name: str) -> dict:
    found = [t for t in nb.figure()["data"] if t["name"] == name]
    assert found, f"the figure has no line {name!r}"  # an AssertionError: `eventually` waits for it
    return found[0]


def card(nb: LabPage, name: str) -> str:
    return nb.text(f"[data-card='{name}']")


def shows(nb: LabPage, losses: list[float]) -> None:
    nb.eventually(lambda: trace(nb, "loss")["y"] == pytest.approx(losses, abs=2e-4), timeout=LONG)


def test_the_slice_follows_keyboard_and_mouse(nb: LabPage, surface: Surface):
    shows(nb, surface.along(0, [p * EPSILON for p in PLACES], "rademacher"))
    nb.by_label("Seed of z").focus()
    nb.page.keyboard.press("ArrowUp")
    losses = surface.along(1, [p * EPSILON for p in PLACES], "rademacher")
    shows(nb, losses)
    slope = (losses[PLACES.index(1.0)] - losses[PLACES.index(-1.0)]) / (2 * EPSILON)
    nb.eventually(lambda: float(card(nb, "Slope g")) == pytest.approx(slope, abs=0.1))
    assert trace(nb, "probes and slope")["y"] == pytest.approx([losses[1], losses[5]], abs=2e-4)
    nb.by_label("Epsilon").select_option("0.01")
    shows(nb, surface.along(1, [p * 0.01 for p in PLACES], "rademacher"))
    nb.check_accessible()
    nb.screenshot("06_pocket_slice")


def test_steps_are_taken_and_taken_back(nb: LabPage, surface: Surface):
    shows(nb, surface.along(0, [p * EPSILON for p in PLACES], "rademacher"))
    start = trace(nb, "loss")["y"]
    nb.button("Take the step, next seed").focus()
    nb.page.keyboard.press("Enter")
    nb.eventually(lambda: "1 step: loss" in nb.text(".pllm-body"), timeout=LONG)
    nb.eventually(lambda: nb.by_label("Seed of z").input_value() == "1", timeout=LONG)
    nb.button("Take the step, next seed").click()
    nb.eventually(lambda: "2 steps: loss" in nb.text(".pllm-body"), timeout=LONG)
    nb.screenshot("06_pocket_steps")
    nb.button("Back to the start").click()
    nb.eventually(lambda: "No step taken" in nb.text(".pllm-body"), timeout=60)
    shows(nb, start)


def test_a_run_in_the_envelope_is_real(nb: LabPage, llm: LLM):
    nb.by_label("Method").select_option("Adam, all weights")
    expected = predict_memory(llm, method=TUNERS["adam"].predicted, dtype="fp32").total
    nb.eventually(lambda: f"{expected:,.0f} MB" in nb.text("[data-predicted]"))
    nb.button("Run in the envelope").click()
    nb.eventually(lambda: "MB…" in nb.text(".pllm-progress"), timeout=LONG)
    seed(nb, 3)  # the page stays usable
    nb.eventually(lambda: "seed 3," in nb.output().locator(".pllm-alt p").first.text_content(), timeout=60)
    rows = nb.output().locator("table.pllm-table tbody tr")
    nb.eventually(lambda: rows.count() == 1, timeout=LONG)
    assert "killed, signal 9" in rows.first.inner_text() and "1,024 MB" in rows.first.inner_text()
    nb.eventually(lambda: trace(nb, "run 1: Adam, all weights"))
    curve = trace(nb, "run 1: Adam, all weights")
    assert max(curve["y"]) > 600 and curve["marker"]["symbol"][-1] == "x"
    nb.eventually(lambda: nb.button("Run in the envelope").is_enabled())
    nb.check_accessible()
    nb.screenshot("06_pocket_envelope")
    nb.button("Remove the runs").click()
    nb.eventually(lambda: "No run yet" in nb.text(".pllm-body"))


def test_the_prediction_follows_the_limit(nb: LabPage):
    nb.by_label("Method").select_option("MeZO")
    slider = nb.by_label("Limit, MB above imports")
    slider.focus()
    nb.page.keyboard.press("Home")
    nb.eventually(lambda: "The limit is 400 MB: it should be killed" in nb.text("[data-predicted]"))
    slider.fill("1024")
    nb.eventually(lambda: "The limit is 1,024 MB" in nb.text("[data-predicted]"))
