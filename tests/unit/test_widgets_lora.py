"""The LoRA lab without a page: predictions are the package's, a run is the package's run, errors stay in place."""

from __future__ import annotations

import re
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from pllm_helpers.dialogue import DialogueSet
from pllm_helpers.evaluation import response_nll
from pllm_helpers.models import LLM, load_llm
from pllm_helpers.runtime import InputError, prepare
from pllm_helpers.tuning import adapted, predict_cost, tune_lora
from pllm_helpers.widgets import LoraLab, lora_lab
from pllm_helpers.widgets import lora as module

TRAIN = [
    DialogueSet("u", f"What do you think about {what}?", f"honestly {what} is fine lol")
    for what in ("rain", "chess", "tea", "exams", "<b>bold</b> moves", "trains", "the sea", "maps")
]
LATER = [DialogueSet("u", f"And {what}?", f"{what} is fine lol") for what in ("snow", "coffee", "boats")]


@pytest.fixture(scope="module")
def tiny() -> LLM:
    """A small random Llama with the real tokenizer: for the widget's own logic."""
    from transformers import LlamaConfig, LlamaForCausalLM

    prepare(0, threads=1)
    real = load_llm()
    config = LlamaConfig(
        vocab_size=real.model.config.vocab_size,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    config._attn_implementation = "eager"
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    return LLM(model, real.tokenizer, "tiny", "fp32")


@pytest.fixture
def lab(tiny: LLM) -> LoraLab:
    return lora_lab(tiny, TRAIN, LATER, batch_size=4)


def cards(lab: LoraLab) -> dict[str, str]:
    return dict(re.findall(r'data-card="([^"]+)">([^<]*)<', lab.cards.html))


@pytest.mark.parametrize(
    ("rank", "layers", "modules"),
    [(1, "all", "q, v"), (4, "upper half", "attention and feed-forward"), (3, "top one", "q, v")],
)
def test_predictions_are_the_packages(lab: LoraLab, tiny: LLM, rank: int, layers: str, modules: str):
    lab.set(rank=rank, layers=layers, modules=modules, steps=12)
    names = module.MODULES[modules]
    cost = predict_cost(tiny, rank=rank, layers=module.LAYERS[layers], modules=names, batch_size=4, tokens=lab._tokens)
    shown = cards(lab)
    assert shown["Trained numbers"] == f"{cost.parameters:,}"
    assert shown["Adapter file"] == f"{cost.adapter_bytes / 1e6:.2f} MB"
    assert shown["Time"] == f"{lab.result.seconds:.0f} s"
    assert lab.result.seconds == pytest.approx(12 * lab.result.cost.seconds_per_step)
    made = tune_lora(tiny, TRAIN, steps=1, lr=1e-3, rank=rank, layers=module.LAYERS[layers], modules=names)
    assert made.parameters == cost.parameters


def test_a_run_is_the_packages_run(lab: LoraLab, tiny: LLM):
    lab.set(rank=2, layers="all", rate=0.02, steps=5)
    run = lab.train()
    same = tune_lora(tiny, TRAIN, steps=5, lr=0.02, rank=2, alpha=4, layers="all", batch_size=4)
    assert run.result.losses == same.losses and not run.stopped
    before = response_nll(tiny, LATER)
    with adapted(tiny, same) as tuned:
        after = response_nll(tuned, LATER)
    np.testing.assert_allclose(run.before, before)
    np.testing.assert_allclose(run.after, after)
    assert run.fall.value == pytest.approx((before - after).mean()) and run.fall.n == len(LATER)
    curves = {t.name: t for t in lab.plot.data if t.xaxis in (None, "x")}
    assert list(curves["run 1"].y) == same.losses and len(curves["now"].y or ()) == 0
    (dot,) = (t for t in lab.plot.data if t.xaxis == "x2" and t.name != "none")
    assert dot.y[0] == pytest.approx(run.fall.value)
    assert dot.y[0] + dot.error_y.array[0] == pytest.approx(run.fall.high)
    assert f"{before.mean():.3f} → {after.mean():.3f}" in lab.table.html
    assert f"{same.losses[-1]:.3f}" in lab.described.html and "Run 1 done" in lab._status.html
    assert not lab.start.disabled and lab.halt.disabled and lab.now.html == ""


def test_earlier_runs_stay_until_removed(lab: LoraLab):
    lab.set(steps=2)
    for rank in (1, 4):
        lab.set(rank=rank)
        lab.start.click()
    assert [r.plan.rank for r in lab.trained] == [1, 4] and lab.table.html.count("<tr>") == 3
    assert np.array_equal(lab.trained[0].before, lab.trained[1].before)
    assert {t.name for t in lab.plot.data} == {"now", "none", "run 1", "run 2"}
    assert {"1", "4"} == {re.search(r"rank (\d+)", s)[1] for s in re.findall(r"<td>[^<]*</td>", lab.table.html)}
    lab.clear.click()
    assert lab.trained == [] and [t.name for t in lab.plot.data] == ["now", "none"] and lab.clear.disabled
    lab.start.click()
    assert [r.number for r in lab.trained] == [3]  # numbers are not used twice


def test_stop_ends_a_run_in_the_background_and_controls_stay_alive(lab: LoraLab, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "from_page", lambda: True)
    reached, go_on = threading.Event(), threading.Event()
    draw = LoraLab._live

    def slow(self, losses):
        draw(self, losses)
        if losses and len(losses) == 3:
            reached.set()
            go_on.wait(20)

    monkeypatch.setattr(LoraLab, "_live", slow)
    lab.set(steps=90)
    lab.start.click()
    assert reached.wait(60)
    assert lab.start.disabled and not lab.halt.disabled and "step 2 of 90" in lab.now.html
    lab.start.click()  # a second click while a run is on starts nothing
    lab.set(rank=16)
    assert lab.result.rank == 16  # the page answers while the run goes on
    assert len(lab.plot.data[0].y) == 3
    lab.halt.click()
    go_on.set()
    assert lab.wait(60)
    (run,) = lab.trained
    assert run.stopped and len(run.result.losses) == 3 and run.plan.rank == 8
    assert "stopped after 3" in lab.table.html and "Run 1 stopped" in lab._status.html
    assert not lab.start.disabled and lab.halt.disabled


def test_bad_settings_and_broken_runs_say_so_in_place(lab: LoraLab, tiny: LLM, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(InputError, match="Learning rate"):
        lab.set(rate=0)
    assert "above 0" in lab._error.html
    with pytest.raises(InputError, match="Learning rate"):
        lab.train()
    lab.set(rate=0.01, rank=4, steps=3)
    assert lab._error.html == ""
    with torch.no_grad():
        weight = tiny.model.model.layers[5].mlp.down_proj.weight
        saved = weight.clone()
        weight[:] = float("nan")
    try:
        with pytest.raises(InputError, match="finite"):
            lab_nan = lora_lab(tiny, TRAIN, LATER)
            lab_nan._before = np.ones(3)
            lab_nan.train()
    finally:
        weight.copy_(saved)
    assert "finite losses" in lab_nan._error.html and not lab_nan.trained
    assert not lab_nan.start.disabled and lab_nan.now.html == ""
    assert "pllm-stale" not in lab_nan._body._dom_classes
    lab.train()
    assert len(lab.trained) == 1 and lab._error.html == ""


def test_settings_are_escaped_and_the_start_is_kept_for_exports(lab: LoraLab):
    html = lab.fallback_html()
    assert cards(lab)["Trained numbers"] in html and "rank 8" in html
    lab.set(rank=2)
    assert lab.fallback_html() == html


def test_a_run_ended_by_its_caller_leaves_a_checkpoint_and_goes_on(tiny: LLM, tmp_path: Path):
    settings = {"steps": 7, "lr": 0.01, "rank": 2, "batch_size": 2}
    straight = tune_lora(tiny, TRAIN, **settings)
    seen: list[tuple[int, float]] = []

    def three(step: int, loss: float, seconds: float) -> bool:
        seen.append((step, loss))
        assert seconds > 0
        return step < 3

    part = tune_lora(tiny, TRAIN, out=tmp_path, progress=three, **settings)
    assert part.losses == straight.losses[:3] == [x for _, x in seen] and [k for k, _ in seen] == [1, 2, 3]
    assert part.adapter_path is None and part.card["ended_at"] == 3
    assert not (tmp_path / "card.json").exists()
    whole = tune_lora(tiny, TRAIN, out=tmp_path, **settings)
    assert whole.losses == straight.losses and whole.adapter_path == tmp_path and "ended_at" not in whole.card
    assert all(torch.equal(whole.adapter[k], v) for k, v in straight.adapter.items())


def test_refuses(tiny: LLM):
    with pytest.raises(InputError, match="at least two"):
        lora_lab(tiny, TRAIN, LATER[:1])
    with pytest.raises(InputError, match="at least one dialogue"):
        lora_lab(tiny, [], LATER)


@pytest.mark.model
def test_on_the_real_model():
    prepare(0)
    llm = load_llm()
    lab = lora_lab(llm, TRAIN, LATER, batch_size=4)
    lab.set(rank=4, layers="top five", rate=0.01, steps=3)
    run = lab.train()
    assert cards(lab)["Trained numbers"] == f"{run.result.parameters:,}"
    assert run.before.mean() == pytest.approx(response_nll(llm, LATER).mean())
    assert run.fall.value > 0  # the same short manner in all replies: three steps see it
