"""Notebook 04 in a real browser: the LoRA lab against the package in this process."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from pllm_helpers.corpora import chitchat_stream
from pllm_helpers.dialogue import DialogueSet
from pllm_helpers.evaluation import response_nll
from pllm_helpers.models import LLM, load_llm
from pllm_helpers.runtime import prepare
from pllm_helpers.tuning import adapted, predict_cost, tune_lora

from .kit import Lab, LabPage

pytestmark = pytest.mark.model

MESSAGES, REPLIES = 16, 8
LONG = 120  # seconds that a small run may take on a busy machine


@pytest.fixture(scope="module")
def llm() -> LLM:
    prepare(0)
    return load_llm()


def data() -> tuple[list[DialogueSet], list[DialogueSet]]:
    """The notebook's own choice, written once more."""
    stream = chitchat_stream(0)
    good = [
        [d for d in part if d.question.strip() and len(d.text) < 400 and len(d.answer.split()) > 1]
        for part in (stream.stream, stream.held_out)
    ]
    return good[0][-MESSAGES:], good[1][:: max(1, len(good[1]) // REPLIES)][:REPLIES]


@pytest.fixture(scope="module")
def page(lab: Lab) -> Iterator[LabPage]:
    with lab.open("04_lora_fine_tuning", parameters={"messages": MESSAGES, "replies": REPLIES}) as nb:
        yield nb


@pytest.fixture
def nb(page: LabPage) -> LabPage:
    """The open notebook with short runs of the top layers planned and no run in progress."""
    idle(page)
    page.by_label("Layers").select_option("top one")
    page.by_label("Matrices").select_option("q, v")
    page.by_label("Rank r").fill("8")
    page.by_label("Steps").fill("2")
    rate(page, "0.005")
    page.eventually(lambda: page.text("[role=alert]") == "")
    return page


def idle(nb: LabPage) -> None:
    nb.eventually(lambda: nb.button("Train").is_enabled() and nb.button("Stop").is_disabled(), timeout=LONG)


def rate(nb: LabPage, value: str) -> None:
    nb.by_label("Learning rate").fill(value)
    nb.page.keyboard.press("Tab")


def card(nb: LabPage, name: str) -> str:
    return nb.text(f"[data-card='{name}']")


def runs(nb: LabPage) -> list[list[str]]:
    rows = nb.output().locator("table.pllm-table tbody tr").all()
    return [[c.inner_text() for c in row.locator("th, td").all()] for row in rows]


def test_cards_follow_keyboard_and_mouse(nb: LabPage, llm: LLM):
    def shows(rank: int, layers: str | int, modules: tuple[str, ...]) -> None:
        cost = predict_cost(llm, rank=rank, layers=layers, modules=modules)
        nb.eventually(lambda: card(nb, "Trained numbers") == f"{cost.parameters:,}")
        assert card(nb, "Adapter file") == f"{cost.adapter_bytes / 1e6:.2f} MB"

    shows(8, 1, ("q_proj", "v_proj"))
    nb.by_label("Rank r").focus()
    for _ in range(3):
        nb.page.keyboard.press("ArrowRight")
    shows(11, 1, ("q_proj", "v_proj"))
    nb.by_label("Layers").select_option("all")
    shows(11, "all", ("q_proj", "v_proj"))
    nb.by_label("Matrices").focus()
    nb.page.keyboard.press("ArrowDown")
    shows(11, "all", ("q_proj", "k_proj", "v_proj", "o_proj"))
    one = float(card(nb, "Time").split()[0])
    nb.by_label("Steps").focus()
    nb.page.keyboard.press("End")
    nb.eventually(lambda: float(card(nb, "Time").split()[0]) > max(10 * one, 1))
    nb.check_accessible()


def test_a_run_by_mouse_is_the_packages_run(nb: LabPage, llm: LLM):
    before_that = len(runs(nb))
    nb.button("Train").click()
    nb.eventually(lambda: len(runs(nb)) == before_that + 1, timeout=LONG)
    idle(nb)
    earlier, later = data()
    same = tune_lora(llm, earlier, steps=2, lr=0.005, rank=8, alpha=16, layers=1)
    with adapted(llm, same) as tuned:
        after = response_nll(tuned, later)
    before = response_nll(llm, later)
    number = runs(nb)[-1][0]
    curves = {t["name"]: t for t in nb.figure()["data"] if t.get("xaxis") in (None, "x")}
    assert curves[f"run {number}"]["y"] == pytest.approx(same.losses, abs=0.02)
    dots = {t["name"]: t for t in nb.figure()["data"] if t.get("xaxis") == "x2"}
    assert dots[f"run {number}"]["y"] == pytest.approx([np.mean(before - after)], abs=0.02)
    shown = runs(nb)[-1]
    assert shown[2] == f"{same.parameters:,}"
    assert [float(x) for x in shown[4].split(" → ")] == pytest.approx([before.mean(), after.mean()], abs=0.02)
    assert f"Run {number} done" in nb.output().locator(".pllm-status").inner_text()
    nb.check_accessible()
    nb.screenshot("04_lora_run")


def test_the_page_stays_usable_during_a_run_and_stop_ends_it(nb: LabPage, llm: LLM):
    before_that = len(runs(nb))
    nb.by_label("Steps").focus()
    nb.page.keyboard.press("End")  # 100 steps
    nb.eventually(lambda: "100 steps" in nb.text(".pllm-cards"))
    nb.button("Train").focus()
    nb.page.keyboard.press("Enter")
    nb.eventually(
        lambda: "step 1 of 100" in nb.text(".pllm-progress") or "step 2 of 100" in nb.text(".pllm-progress"),
        timeout=LONG,
    )
    nb.by_label("Rank r").focus()
    nb.page.keyboard.press("Home")
    small = predict_cost(llm, rank=1, layers=1).parameters
    nb.eventually(lambda: card(nb, "Trained numbers") == f"{small:,}")
    assert nb.button("Train").is_disabled() and "of 100" in nb.text(".pllm-progress")
    live = next(t for t in nb.figure()["data"] if t["name"] == "now")
    assert len(live["y"]) >= 1
    nb.screenshot("04_lora_training")
    nb.button("Stop").focus()
    nb.page.keyboard.press("Enter")
    nb.eventually(lambda: len(runs(nb)) == before_that + 1, timeout=LONG)
    assert "stopped after" in runs(nb)[-1][1] and "rank 8" in runs(nb)[-1][1]
    idle(nb)


def test_a_bad_rate_gets_a_message_in_place(nb: LabPage):
    before_that = len(runs(nb))
    rate(nb, "-1")
    nb.eventually(lambda: "Learning rate: expected a number above 0" in nb.text("[role=alert]"))
    nb.check_accessible()
    nb.screenshot("04_lora_error")
    nb.button("Train").click()
    idle(nb)
    assert len(runs(nb)) == before_that and "Learning rate" in nb.text("[role=alert]")
    rate(nb, "0.01")
    nb.eventually(lambda: nb.text("[role=alert]") == "")


def test_runs_can_be_removed_and_the_figure_is_described(nb: LabPage):
    if not runs(nb):
        nb.button("Train").click()
        nb.eventually(lambda: len(runs(nb)) == 1, timeout=LONG)
        idle(nb)
    nb.output().get_by_text("Describe this figure").click()
    told = nb.output().locator(".pllm-alt p")
    nb.eventually(lambda: told.is_visible())
    assert "held-out NLL" in told.inner_text() and runs(nb)[-1][1].split(" (")[0] in told.inner_text()
    nb.button("Remove the runs").click()
    nb.eventually(lambda: "No run yet" in nb.text(".pllm-body"))
    assert [t["name"] for t in nb.figure()["data"]] == ["now", "none"]
