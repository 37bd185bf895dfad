"""Predicted cost against what a run really has: parameters, bytes, FLOP, memory."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pllm_helpers.dialogue import DialogueSet
from pllm_helpers.runtime import InputError
from pllm_helpers.tuning import predict_cost, tune_lora
from pllm_helpers.tuning.adapters import WEIGHTS
from pllm_helpers.tuning.cost import EFFICIENCY, matrix_rate, template_beginning
from pllm_helpers.tuning.data import token_rows
from pllm_helpers.tuning.memory import PeakMemory
from tests.unit.tuning_kit import dialogue_sets, tiny_llm

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def llm():
    return tiny_llm()


def equal_rows(llm, n, tokens):
    """``n`` dialogues of exactly ``tokens`` tokens, about a third of them answer."""
    out = []
    for i in range(n):
        d = DialogueSet("u", f"{i}", " ".join(["tea"] * (tokens // 3 - 1)))
        missing = tokens - len(token_rows(llm, [d], 512).rows[0].ids)
        out.append(DialogueSet("u", d.question + missing * " rain", d.answer))
    assert {len(r.ids) for r in token_rows(llm, out, 512).rows} == {tokens}
    return out


@pytest.mark.parametrize(("layers", "modules", "rank"), [("all", ["q_proj", "v_proj"], 8), ("upper", ["down_proj"], 2)])
def test_parameters_and_bytes_are_exact(llm, tmp_path, layers, modules, rank):
    cost = predict_cost(llm, rank=rank, layers=layers, modules=modules)
    result = tune_lora(
        llm, dialogue_sets(4), steps=1, lr=0.01, rank=rank, layers=layers, modules=modules, out=tmp_path, progress=False
    )
    assert cost.parameters == result.parameters and cost.adapter_bytes == 4 * result.parameters
    assert 0 < (tmp_path / WEIGHTS).stat().st_size - cost.adapter_bytes < 8192


@pytest.mark.parametrize("layers", ["all", 1])
def test_flop_are_those_of_a_real_step(llm, layers):
    from torch.utils.flop_counter import FlopCounterMode

    data, predicted = equal_rows(llm, 6, 90), predict_cost(llm, layers=layers, batch_size=6, tokens=90)
    with FlopCounterMode(display=False) as counter:
        tune_lora(llm, data, steps=1, lr=0.01, layers=layers, batch_size=6, progress=False)
    counts = counter.get_flop_counts()["Global"]
    weights = sum(v for k, v in counts.items() if k != torch.ops.aten.bmm)  # bmm: attention, not counted
    assert predicted.gflop_per_step == pytest.approx(weights / 1e9, rel=0.05)


def test_more_of_anything_costs_more(llm):
    base = predict_cost(llm, layers="upper", batch_size=4, tokens=60)
    for change in (dict(layers="all"), dict(batch_size=8), dict(tokens=120)):
        more = predict_cost(llm, **{**dict(layers="upper", batch_size=4, tokens=60), **change})
        assert more.memory_mb > base.memory_mb and more.gflop_per_step > base.gflop_per_step
    assert predict_cost(llm, rank=16).parameters == 2 * predict_cost(llm, rank=8).parameters


def test_seconds_follow_from_the_measured_rate(llm):
    cost, rate = predict_cost(llm), matrix_rate(torch.float32, torch.get_num_threads())
    assert cost.seconds_per_step == pytest.approx(cost.gflop_per_step / rate / EFFICIENCY)


def test_template_beginning(llm):
    text = llm.tokenizer.decode(llm.tokenizer(llm.format_chat("x"))["input_ids"][: template_beginning(llm)])
    assert text.startswith("<|im_start|>system") and text.endswith("<|im_start|>user\n")


@pytest.mark.parametrize("bad", [dict(rank=0), dict(layers=[9]), dict(modules=["x"]), dict(tokens=0)], ids=str)
def test_refuses(llm, bad):
    with pytest.raises(InputError):
        predict_cost(llm, **bad)


def test_peak_memory_sees_an_array_that_was_there():
    with PeakMemory() as memory:
        array = torch.ones(60_000_000)  # 229 MiB
        del array
    assert 190 < memory.mb < 300


CHILD = """
import dataclasses, json, torch
torch.set_num_threads(1)
from pllm_helpers.models import load_llm
from pllm_helpers.tuning import predict_cost, tune_lora
from tests.unit.test_tuning_cost import equal_rows
llm = load_llm(dtype="bf16")
cost = predict_cost(llm, batch_size=8, tokens=90)
result = tune_lora(llm, equal_rows(llm, 8, 90), steps=1, lr=0.001, batch_size=8, progress=False)
print(json.dumps([cost.memory_mb, result.peak_mb]))
"""


@pytest.mark.model
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="private memory is told by Linux only")
def test_memory_is_of_the_predicted_size_on_the_real_model():
    done = subprocess.run([sys.executable, "-c", CHILD], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    predicted, measured = json.loads(done.stdout.splitlines()[-1])
    assert 0.6 < predicted / measured < 1.6, (predicted, measured)
