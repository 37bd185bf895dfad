"""MeZO on the real SmolLM2: estimates, replay, memory, drift, and what bf16 does to both."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.mezo import Side, same_estimates, token_batch
from pllm_helpers.models import load_llm
from pllm_helpers.tuning import replay, restoring_drift, tune_mezo
from pllm_helpers.tuning.replay import weights_hash
from tests.unit.tuning_kit import dialogue_sets

pytestmark = pytest.mark.model
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def llm():
    return load_llm(dtype="bf16")


def test_same_estimates_as_the_published_algorithm():
    llm = load_llm(dtype="fp32")
    slopes = same_estimates(llm, token_batch(llm, 2, 24))
    assert all(abs(g) > 0.5 for g in slopes)


def test_a_short_run_replays_bit_for_bit_and_leaves_the_model(llm, tmp_path):
    before = weights_hash(dict(llm.model.named_parameters()))
    data = dialogue_sets(4)
    more = dict(steps=3, lr=1e-6, noise="rademacher", epsilon=2**-10, batch_size=4, progress=False)
    for dtype in ("fp32", "bf16"):
        result = tune_mezo(llm, data, **more, dtype=dtype, out=tmp_path / dtype)
        tuned = replay(llm, tmp_path / dtype)
        assert weights_hash(dict(tuned.model.named_parameters())) == result.card["tuned_hash"]
        for name, w in tuned.model.named_parameters():
            assert torch.equal(w, result.weights[name])
        assert result.parameters == 134_515_008
        assert result.log.header["dtype"] == dtype and (tmp_path / dtype / "replay.log").stat().st_size < 1000
    assert weights_hash(dict(llm.model.named_parameters())) == before


CHILD = """
import json, sys
import torch
import peft, transformers.models.llama.modeling_llama
from benchmarks.compare import status_mb
from pllm_helpers.models import load_llm
from pllm_helpers.tuning import tune_mezo
from tests.unit.tuning_kit import dialogue_sets
torch.set_num_threads(1)
data = dialogue_sets(8)
before = status_mb("VmRSS")
llm = load_llm(dtype=sys.argv[1])
result = tune_mezo(llm, data, steps=2, lr=1e-6, noise="rademacher", batch_size=8, progress=False)
print(json.dumps({"mb": status_mb("VmHWM") - before, "losses": result.losses}))
"""


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_all_weights_in_fp32_train_within_a_gigabyte(dtype):
    """Resident memory above the imports, pages of the mapped weight file included; 513 MB are the private copy."""
    done = subprocess.run([sys.executable, "-c", CHILD, dtype], cwd=ROOT, capture_output=True, text=True)
    assert not done.returncode, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert 513 < found["mb"] < 640 and np.isfinite(found["losses"]).all()


def test_restoring_drift_of_real_weights(llm):
    """bf16 with Gaussian noise drifts at every cycle; signs times a power of two do not after the first."""
    weights = [p for n, p in llm.model.named_parameters() if "layers.12." in n]
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        for noise in ("gaussian", "rademacher"):
            for cycles in (1, 9):
                drift = restoring_drift(weights, cycles=cycles, noise=noise, epsilon=2**-10, dtype=dtype)
                found[dtype, noise, cycles] = drift.relative
                assert drift.relative < 3 * cycles**0.5 * torch.finfo(dtype).eps / 2
    assert found[torch.bfloat16, "gaussian", 9] > 2 * found[torch.bfloat16, "gaussian", 1]
    assert found[torch.bfloat16, "rademacher", 9] < 1.2 * found[torch.bfloat16, "rademacher", 1]
    assert found[torch.bfloat16, "rademacher", 9] < 0.5 * found[torch.bfloat16, "gaussian", 9]


def test_bf16_finds_nearly_the_same_slopes(llm):
    """Same signs, same batch: fp32 against bf16 weights; what is left is rounding of the loss over 2 epsilon."""
    wide = load_llm(dtype="fp32")
    batch = token_batch(llm, 2, 24)
    slopes = {}
    for name, model in (("bf16", llm), ("fp32", wide)):
        step = Side(model, batch).ours("rademacher")
        slopes[name] = [step() for _ in range(3)]
    assert all(np.isfinite(v).all() for v in slopes.values())
