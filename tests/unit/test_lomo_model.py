"""LOMO and frugal LoRA on the real model: what they keep in memory, and what they learn."""

import numpy as np
import pytest

from benchmarks.lomo import in_process_of_its_own, write_dialogues
from benchmarks.lora import dialogues
from pllm_helpers.evaluation import response_nll
from pllm_helpers.models import load_llm
from pllm_helpers.tuning import adapted, tune_full, tune_lomo
from pllm_helpers.tuning.memory import memory_mb, trim

pytestmark = pytest.mark.model


@pytest.fixture(scope="module")
def memory(tmp_path_factory):
    """Peak resident memory of one step of eight dialogues, beyond the imports, each in a process of its own."""
    folder = tmp_path_factory.mktemp("memory")
    write_dialogues(folder, dialogues(8))
    sides = ("lomo_checkpoint", "sgd_checkpoint", "lora", "lora_checkpoint", "lora_stream")
    return {side: in_process_of_its_own(side, folder, 1) for side in sides}


def test_lomo_spares_the_memory_of_the_gradients(memory):
    """135 million fp32 weights: 513 MB, and as much again for gradients where all exist together."""
    lomo, sgd = memory["lomo_checkpoint"], memory["sgd_checkpoint"]
    np.testing.assert_allclose(lomo["losses"], sgd["losses"], rtol=1e-4)
    assert lomo["mb"] < 513 + 400 and sgd["mb"] > lomo["mb"] + 400


def test_exact_lora_gradients_need_neither_all_activations_nor_all_weights(memory):
    """bf16 weights: 257 MB in a file."""
    plain, checkpoint, stream = (memory[k] for k in ("lora", "lora_checkpoint", "lora_stream"))
    assert checkpoint["losses"] == plain["losses"]
    np.testing.assert_allclose(stream["losses"], plain["losses"], rtol=2e-3)
    assert checkpoint["mb"] < plain["mb"] - 100 and stream["mb"] < checkpoint["mb"] - 150


def test_lomo_takes_the_steps_of_sgd_and_learns():
    llm, data = load_llm(dtype="fp32"), dialogues(4)
    settings = dict(steps=3, lr=3e-3, batch_size=2, warmup=0, progress=False, clip_norm=1.0)
    lomo = tune_lomo(llm, data, **settings)
    sgd = tune_full(llm, data, **settings, optimizer="sgd")
    np.testing.assert_allclose(lomo.losses, sgd.losses, rtol=1e-4)
    for name in ("model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight", "model.norm.weight"):
        moved = (sgd.weights[name] - llm.model.get_parameter(name)).norm()
        assert (
            moved > 0
            and (lomo.weights[name] - sgd.weights[name]).norm() <= 1e-3 * moved + 2e-7 * sgd.weights[name].norm()
        ), name
    before = response_nll(llm, data).mean()
    with adapted(llm, lomo) as tuned:
        assert response_nll(tuned, data).mean() < before


def test_a_private_copy_gives_back_the_pages_it_has_read():
    from pllm_helpers.tuning import private_copy

    llm = load_llm(dtype="fp32")
    trim()
    resident, private = memory_mb()
    double = private_copy(llm)
    grown, own = (b - a for a, b in zip((resident, private), memory_mb(), strict=True))
    size = sum(p.nbytes for p in double.model.parameters()) / 2**20
    assert size > 500 and own > 0.8 * size and grown < 1.05 * size
