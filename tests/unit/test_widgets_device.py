"""The designer of notebook 07 without a page: counts are the package's, answers the model's, errors stay in place."""

from __future__ import annotations

import re
import time

import pytest

from pllm_helpers.device import PHONES, quantize, size_mb
from pllm_helpers.device.architectures import MOBILE_LLM, SMOLLM2_135M, Architecture
from pllm_helpers.experiments.device_study import weight_bytes
from pllm_helpers.models import LLM, generate, load_llm
from pllm_helpers.runtime import InputError, prepare
from pllm_helpers.widgets import DeviceDesigner, device_designer
from pllm_helpers.widgets import device as module

from .tuning_kit import tiny_llm


@pytest.fixture(scope="module")
def tiny() -> LLM:
    prepare(0, threads=1)
    return tiny_llm("bf16")


@pytest.fixture
def lab(tiny: LLM) -> DeviceDesigner:
    return device_designer(tiny)


def cards(lab: DeviceDesigner) -> dict[str, str]:
    return dict(re.findall(r'data-card="([^"]+)">([^<]*)<', lab.cards.html))


def test_it_opens_with_the_smallest_published_model(lab: DeviceDesigner):
    assert cards(lab)["Parameters"] == "124,635,456" == f"{MOBILE_LLM['125M'].parameters().total:,}"
    bars = {t.name: t for t in lab.plot.data}
    mine = [bars[n].y[0] for n in ("embedding, output", "attention", "feed-forward")]
    assert sum(mine) == pytest.approx(124.6, abs=0.1) and bars["attention"].x[0] == "yours"
    assert len(bars["attention"].x) == 7
    assert "124,635,456" in lab.fallback_html() and "No answer yet" in lab.table.html


@pytest.mark.parametrize(
    ("change", "shape"),
    [
        ({"layers": 12, "heads": 4, "kv_heads": 4, "ffn": 768}, Architecture(12, 256, 4, 4, 768, 32000)),
        ({"vocab": 128256, "sharing": []}, Architecture(30, 576, 9, 3, 1536, 128256, share_embedding=False)),
        ({"sharing": ["embedding", "blocks"]}, Architecture(30, 576, 9, 3, 1536, 32000, share_blocks=True)),
    ],
)
def test_numbers_follow_the_controls(lab: DeviceDesigner, change: dict, shape: Architecture):
    sheet = lab.set(**change)
    shown, mb = cards(lab), {f: weight_bytes(shape, f) / 2**20 for f in ("fp32", "bf16", "int8", "int4")}
    assert sheet.architecture == shape and shown["Parameters"] == f"{shape.parameters().total:,}"
    assert shown["Weights, fp32 / bf16"] == f"{mb['fp32']:,.0f} / {mb['bf16']:,.0f} MB"
    assert shown["Weights, int8 / int4"] == f"{mb['int8']:,.0f} / {mb['int4']:,.0f} MB"
    assert shown["Work per token"] == f"{shape.flops(1024) / 1e6:,.0f} MFLOP"
    weights = next(t for t in lab.plot.data if t.name == "weights")
    assert list(weights.y) == pytest.approx(list(mb.values()))
    assert f"{shape.parameters().total:,} parameters" in lab._status.html


def test_the_phone_decides_what_fits(lab: DeviceDesigner):
    lab.load("MobileLLM-1B")
    for name, phone in PHONES.items():
        sheet = lab.set(phone=name)
        for form, mb in sheet.megabytes.items():
            assert (form in sheet.fits) == (mb + sheet.cache_mb <= phone.limit_mb)
        budget = next(t for t in lab.plot.data if t.name == "budget")
        assert list(budget.y) == [phone.limit_mb] * 2
        assert ("unverified" in lab.note.html) == (phone.tag == "unverified")


def test_start_from_sets_all_controls(lab: DeviceDesigner):
    lab.preset.value = "SmolLM2-135M"
    assert lab.result.architecture == SMOLLM2_135M and lab.values["vocab"] == 49152
    for name, a in module.PUBLISHED.items():
        assert lab.load(name).architecture == a
    with pytest.raises(InputError, match="Start from"):
        lab.load("GPT-9")


def test_key_heads_that_do_not_divide_get_a_message_in_place(lab: DeviceDesigner):
    before = lab.cards.html
    with pytest.raises(InputError, match="divisor of the 9 heads"):
        lab.set(kv_heads=4)
    assert "1, 3, 9" in lab._error.html and lab.cards.html == before
    lab.set(kv_heads=9)
    assert lab._error.html == ""


def test_answers_are_the_quantised_models(lab: DeviceDesigner, tiny: LLM):
    for precision in ("bf16", "int8", "int4"):
        one = lab.write("Hello <b>there</b>", precision)
        llm = tiny if precision == "bf16" else quantize(tiny, precision)
        (same,) = generate(llm, ["Hello <b>there</b>"], max_new_tokens=module.NEW_TOKENS, details=True)
        assert (one.text, one.tokens) == (same.text, same.tokens)
        assert one.megabytes == pytest.approx(size_mb(llm)) and 0 < one.first and one.seconds > 0
    assert [w.number for w in lab.written] == [1, 2, 3] and lab.table.html.count("<tr>") == 4
    assert lab.written[2].megabytes < lab.written[1].megabytes < lab.written[0].megabytes
    assert f"{lab.written[2].rate:.1f} tokens/s" in lab.table.html and "<b>" not in lab.table.html
    assert "Answer 3: int4" in lab._status.html and lab.now.html == ""


def test_a_blank_message_changes_nothing(lab: DeviceDesigner):
    with pytest.raises(InputError, match="expected some text"):
        lab.write("  ")
    assert not lab.written and not lab.prompt.waiting and "Message" in lab._error.html


def test_writing_in_a_page_does_not_block_the_sliders(lab: DeviceDesigner, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "from_page", lambda: True)
    lab._submitted("Hello")
    lab._submitted("a second click while one is written")
    lab.set(layers=2)
    assert lab.result.architecture.layers == 2
    deadline = time.monotonic() + 120
    while (lab._writing or not lab.written) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(lab.written) == 1 and lab.written[0].precision == "int4"


def test_refuses_a_model_that_fills_gaps(tiny: LLM):
    from dataclasses import replace

    with pytest.raises(InputError, match="fills gaps"):
        device_designer(replace(tiny, kind="masked"))


@pytest.mark.model
def test_on_the_real_model():
    prepare(0)
    lab = device_designer(load_llm(dtype="bf16"))
    found = lab.write("Name a colour.", "int4")
    assert found.tokens >= 1 and found.text
    assert found.megabytes == pytest.approx(weight_bytes(SMOLLM2_135M, "int4") / 2**20)
