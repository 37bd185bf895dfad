"""Notebook 07 in a real browser: the designer against the package in this process."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from pllm_helpers.device import PHONES, quantize, size_mb
from pllm_helpers.device.architectures import MOBILE_LLM, SMOLLM2_135M, Architecture
from pllm_helpers.experiments.device_study import weight_bytes
from pllm_helpers.models import LLM, generate, load_llm
from pllm_helpers.runtime import prepare

from .kit import Lab, LabPage

pytestmark = pytest.mark.model

LONG = 180  # seconds that packing and writing may take on a busy machine


@pytest.fixture(scope="module")
def llm() -> LLM:
    prepare(0)
    return load_llm(dtype="bf16")


@pytest.fixture(scope="module")
def page(lab: Lab) -> Iterator[LabPage]:
    with lab.open("07_what_fits_on_the_device", timeout=LONG) as nb:
        yield nb


@pytest.fixture
def nb(page: LabPage) -> LabPage:
    """The open notebook with SmolLM2's and then MobileLLM-125M's shape drawn."""
    for name in ("SmolLM2-135M", "MobileLLM-125M"):
        page.by_label("Start from").select_option(name)
        page.eventually(lambda name=name: card(page, "Parameters") == f"{total(name):,}")
    page.eventually(lambda: page.text("[role=alert]") == "")
    return page


def total(name: str) -> int:
    a = SMOLLM2_135M if name.startswith("Smol") else MOBILE_LLM[name.removeprefix("MobileLLM-")]
    return a.parameters().total


def card(nb: LabPage, name: str) -> str:
    return nb.text(f"[data-card='{name}']")


def answers(nb: LabPage) -> list[list[str]]:
    rows = nb.output().locator("table.pllm-table tbody tr").all()
    return [[c.inner_text() for c in row.locator("th, td").all()] for row in rows]


def test_numbers_and_bars_follow_keyboard_and_mouse(nb: LabPage):
    nb.by_label("Layers").focus()
    for _ in range(3):
        nb.page.keyboard.press("ArrowLeft")
    shape = Architecture(27, 576, 9, 3, 1536, 32000)
    nb.eventually(lambda: card(nb, "Parameters") == f"{shape.parameters().total:,}")
    nb.output().get_by_label("every block runs twice").click()
    shape = Architecture(27, 576, 9, 3, 1536, 32000, share_blocks=True)
    nb.eventually(lambda: card(nb, "Work per token") == f"{shape.flops(1024) / 1e6:,.0f} MFLOP")
    assert card(nb, "Parameters") == f"{shape.parameters().total:,}"
    bars = {t["name"]: t for t in nb.figure()["data"]}
    count = shape.parameters()
    assert bars["attention"]["y"][0] == pytest.approx(count.attention / 1e6)
    assert bars["embedding, output"]["y"][0] == pytest.approx(count.embedding / 1e6)
    mb = [weight_bytes(shape, f) / 2**20 for f in ("fp32", "bf16", "int8", "int4")]
    assert bars["weights"]["y"] == pytest.approx(mb)
    nb.output().get_by_label("every block runs twice").click()
    nb.check_accessible()
    nb.screenshot("07_designer")


def test_the_budget_follows_the_phone(nb: LabPage):
    phone = list(PHONES.values())[-1]
    nb.by_label("Budget").select_option(phone.name)
    nb.eventually(lambda: phone.name in nb.text(".pllm-body strong"))
    budget = next(t for t in nb.figure()["data"] if t["name"] == "budget")
    assert budget["y"] == pytest.approx([phone.limit_mb] * 2)
    nb.by_label("Budget").select_option(next(iter(PHONES)))


def test_heads_that_do_not_divide_get_a_message_in_place(nb: LabPage):
    nb.by_label("Key-value heads").focus()
    nb.page.keyboard.press("ArrowRight")
    nb.eventually(lambda: "expected a divisor of the 9 heads, got 4" in nb.text("[role=alert]"))
    nb.check_accessible()
    nb.screenshot("07_error")
    nb.page.keyboard.press("ArrowLeft")
    nb.eventually(lambda: nb.text("[role=alert]") == "")


def test_the_real_model_writes_in_four_bits_while_the_page_stays_usable(nb: LabPage, llm: LLM):
    before = len(answers(nb))
    nb.by_label("Precision").select_option("int4")
    box = nb.by_label("Message to the real model")
    box.fill("Name two colours.")
    box.press("Enter")
    nb.by_label("Layers").focus()
    nb.page.keyboard.press("Home")
    shape = Architecture(1, 576, 9, 3, 1536, 32000)
    nb.eventually(lambda: card(nb, "Parameters") == f"{shape.parameters().total:,}", timeout=LONG)
    nb.eventually(lambda: len(answers(nb)) == before + 1, timeout=LONG)
    packed = quantize(llm, "int4")
    (same,) = generate(packed, ["Name two colours."], max_new_tokens=24, details=True)
    shown = answers(nb)[-1]
    assert shown[1] == "int4" and shown[2] == f"{size_mb(packed):.0f} MB"
    assert shown[5] == str(same.tokens) and " ".join(shown[6].split()) == " ".join(same.text.split())
    assert float(shown[3].split()[0]) > 0
    nb.check_accessible()
    nb.screenshot("07_written")


def test_a_second_precision_by_mouse_and_the_figure_in_words(nb: LabPage, llm: LLM):
    before = len(answers(nb))
    nb.by_label("Precision").select_option("bf16")
    nb.by_label("Message to the real model").fill("Name two colours.")
    nb.button("Write").click()
    nb.eventually(lambda: len(answers(nb)) == before + 1, timeout=LONG)
    (same,) = generate(llm, ["Name two colours."], max_new_tokens=24)
    assert answers(nb)[-1][1] == "bf16" and " ".join(answers(nb)[-1][6].split()) == " ".join(same.split())
    nb.output().get_by_text("Describe this figure").click()
    told = nb.output().locator(".pllm-alt p")
    nb.eventually(lambda: told.is_visible())
    assert "124.6 million" in told.inner_text()
