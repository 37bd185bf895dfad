"""The loss curve of tune_lora against trl's SFTTrainer on the real model: same batches, same adapter at the start."""

import numpy as np
import pytest

from pllm_helpers.models import load_llm
from pllm_helpers.tuning import tune_lora
from pllm_helpers.tuning.adapters import adapter_state, attach
from pllm_helpers.tuning.data import token_rows
from tests.unit.tuning_kit import dialogue_sets, tiny_llm

pytest.importorskip("trl", reason="trl is not installed (extra: test)")
pytest.importorskip("datasets", reason="datasets is not installed (comes with trl)")


def both(llm, data, folder, steps, batch, lr, accumulate=1, **trl_settings):
    """Losses and adapters of ``tune_lora`` and of trl, optimiser and schedule at trl's defaults."""
    from peft import LoraConfig

    from benchmarks.lora import in_batches, sft_trainer, trl_losses

    ours = tune_lora(
        llm, data, steps=steps, lr=lr, batch_size=batch, accumulate=accumulate, warmup=0, seed=4, progress=False
    )
    config = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = attach(llm, config, 4)
    rows = in_batches(token_rows(llm, data, 512).rows, steps * accumulate, batch, 4)
    trainer = sft_trainer(
        model,
        llm.tokenizer,
        rows,
        str(folder),
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulate,
        learning_rate=lr,
        **trl_settings,
    )
    return ours.losses, trl_losses(trainer), ours.adapter, adapter_state(model)


def test_every_batch_counts_by_its_tokens_as_in_trl(tmp_path):
    """Accumulation over batches of different sizes: also trl divides by the tokens of all of them."""
    ours, theirs, a, b = both(tiny_llm(), dialogue_sets(), tmp_path, 4, 3, 0.01, accumulate=2, bf16=False)
    np.testing.assert_allclose(ours, theirs, rtol=2e-5)
    assert a.keys() == b.keys() and all((a[k] - b[k]).norm() <= 1e-2 * b[k].norm() for k in b)


@pytest.mark.model
@pytest.mark.parametrize(("dtype", "tolerance"), [("fp32", 1e-4), ("bf16", 2e-2)])
def test_same_losses_on_the_real_model(tmp_path, dtype, tolerance):
    llm = load_llm(dtype=dtype)
    ours, theirs, *_ = both(llm, dialogue_sets(2), tmp_path, 3, 2, 0.002, bf16=dtype == "bf16")
    np.testing.assert_allclose(ours, theirs, rtol=tolerance)
    assert ours[-1] < ours[0] - 0.1  # the same two dialogues in every step
