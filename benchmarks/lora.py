"""LoRA training against trl's SFTTrainer: same batches, adapter start, steps and losses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pllm_helpers.corpora import chitchat_stream
from pllm_helpers.dialogue import DialogueSet
from pllm_helpers.models import LLM, load_llm
from pllm_helpers.models.weights import quiet_transformers
from pllm_helpers.tuning import tune_lora
from pllm_helpers.tuning.adapters import attach
from pllm_helpers.tuning.cost import matrix_rate
from pllm_helpers.tuning.data import Row as TokenRow
from pllm_helpers.tuning.data import batch_stream, token_rows
from pllm_helpers.tuning.packed import shared_beginning

from .compare import Row, row, status_mb

BATCH, RANK, ALPHA, LR, SEED = 8, 8, 16, 1e-3, 0
FLOOR_GFLOP = 0.54  # per token: 2 + 2 FLOP for each of 135 million weights, forward and gradient of the input


def dialogues(n: int) -> list[DialogueSet]:
    """The first ``n`` messages with a reply of the most active person of chitchat."""
    usable = (d for d in chitchat_stream(0).stream if d.question.strip() and d.answer.strip())
    return [d for d, _ in zip(usable, range(n), strict=False)]


def in_batches(rows: Sequence[TokenRow], steps: int, batch_size: int, seed: int) -> list[TokenRow]:
    """Rows in the order in which ``tune_lora`` takes them."""
    stream = batch_stream([len(r.ids) for r in rows], batch_size, seed)
    return [rows[i] for _ in range(steps) for i in next(stream)]


def sft_trainer(
    model: Any, tokenizer: Any, rows: Sequence[TokenRow], folder: str, peft_config: Any = None, **more: Any
):
    """trl's SFTTrainer on ``rows`` in their order, loss on the answers, everything else as ``more`` or its defaults."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    data = {
        "input_ids": [r.ids for r in rows],
        "completion_mask": [[0] * (len(r.ids) - r.answer) + [1] * r.answer for r in rows],
    }
    settings = SFTConfig(
        output_dir=folder,
        completion_only_loss=True,
        train_sampling_strategy="sequential",
        num_train_epochs=1,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        **more,
    )
    return SFTTrainer(
        model=model,
        args=settings,
        train_dataset=Dataset.from_dict(data),
        processing_class=tokenizer,
        peft_config=peft_config,
    )


def trl_losses(trainer: Any) -> list[float]:
    """Train; the loss of each step."""
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def child(side: str, model: str, folder: str, steps: int) -> dict[str, Any]:
    """One training run in this process: tokens per second, megabytes beyond the imports, losses.

    Both sides are clocked from the first step to the last; loading, tokenising and saving do not count.
    """
    import peft
    import torch
    from safetensors.torch import load_file

    from pllm_helpers.runtime import prepare

    data = json.loads(Path(folder, "dialogues.json").read_text(encoding="utf-8"))
    data = [DialogueSet(**d) for d in data]
    prepare(0)
    if side == "ours":
        import transformers.models.llama.modeling_llama  # noqa: F401  the peer has it before its model, too

        before = status_mb("VmRSS")
        llm = load_llm(dtype="bf16")
        settings = {"rank": RANK, "alpha": ALPHA, "batch_size": BATCH, "warmup": 0, "seed": SEED}
        result = tune_lora(llm, data, steps=steps, lr=LR, progress=False, **settings)
        losses, seconds, tokens = result.losses, result.seconds, result.tokens
    else:
        import transformers.models.llama.modeling_llama  # noqa: F401
        from transformers import AutoTokenizer, TrainerCallback
        from trl import SFTTrainer  # noqa: F401

        before = status_mb("VmRSS")
        tokenizer = AutoTokenizer.from_pretrained(model)
        rows = in_batches([TokenRow(*r) for r in json.loads(Path(folder, "rows.json").read_text())], steps, BATCH, SEED)
        config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        with tempfile.TemporaryDirectory() as out:
            trainer = sft_trainer(
                model, tokenizer, rows, out, config, per_device_train_batch_size=BATCH, learning_rate=LR
            )
            peft.set_peft_model_state_dict(trainer.model, load_file(Path(folder, "start.safetensors")))
            clock = []

            class Clock(TrainerCallback):
                def on_train_begin(self, *_: Any, **__: Any) -> None:
                    clock.append(time.perf_counter())

                on_train_end = on_train_begin

            trainer.add_callback(Clock())
            losses = trl_losses(trainer)
        seconds, tokens = clock[1] - clock[0], sum(len(r.ids) for r in rows)
    peak = status_mb("VmHWM")
    return {
        "rate": tokens / seconds,
        "tokens": tokens,
        "mb": peak - before,
        "losses": losses,
        "threads": torch.get_num_threads(),
    }


def in_process_of_its_own(side: str, model: str, folder: str, steps: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.lora", side, model, folder, str(steps)]
    root = Path(__file__).parents[1]
    done = subprocess.run(command, cwd=root, env={**os.environ}, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def executed_gflop(llm: LLM, batches: Sequence[Sequence[TokenRow]]) -> float:
    """Matrix products with weights in one pass over ``batches``: 2 + 2 FLOP per weight and computed token."""
    weights = sum(p.numel() for layer in llm.model.get_decoder().layers for p in layer.parameters() if p.ndim == 2)
    head = llm.model.get_output_embeddings().weight.numel()
    tokens = sum(sum(len(r.ids) for r in b) - (len(b) - 1) * shared_beginning(b) for b in batches)
    return 4 * (tokens * weights + sum(r.answer for b in batches for r in b) * head) / 1e9


def run(quick: bool = False) -> list[Row]:
    """Rows ``lora_vs_trl_default`` and ``lora_vs_trl_bf16`` (tokens per second of the dialogues, padding not
    counted on either side) and ``lora_peak_memory`` (megabytes, model included, beyond the imports; less is better).

    SmolLM2, rank 8 on q and v of all layers, batches of 8 real chat messages, the same rows in the
    same order, the same adapter at the start. The peer: ``SFTTrainer`` given a folder with the
    weights (fp32, as transformers de-quantises the bundled file; its defaults then are bf16
    autocast and gradient checkpointing), or with bf16 weights. Each run is a process of its own.
    """
    import torch
    from peft import LoraConfig
    from safetensors.torch import save_file

    from pllm_helpers.tuning.adapters import adapter_state

    steps = 4 if quick else 12
    with tempfile.TemporaryDirectory() as folder:
        models = {}
        for dtype in ("fp32", "bf16"):
            llm = load_llm(dtype=dtype)
            models[dtype] = f"{folder}/{dtype}"
            with quiet_transformers():
                llm.model.save_pretrained(models[dtype])
            llm.tokenizer.save_pretrained(models[dtype])
        data = dialogues(steps * BATCH)
        Path(folder, "dialogues.json").write_text(
            json.dumps([{"user": "u", "question": d.question, "answer": d.answer} for d in data]), encoding="utf-8"
        )
        Path(folder, "rows.json").write_text(json.dumps(token_rows(llm, data, 512).rows), encoding="utf-8")
        config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        save_file(adapter_state(attach(llm, config, SEED)), Path(folder, "start.safetensors"))
        sides = {"ours": "bf16", "default": "fp32", "bf16": "bf16"}
        found: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
        for k in range(2 if quick else 3):
            for side in list(sides)[:: 1 if k % 2 == 0 else -1]:
                kind = "ours" if side == "ours" else "trl"
                found[side].append(in_process_of_its_own(kind, models[sides[side]], folder, steps))
    expected = found["ours"][0]
    for side, runs in found.items():
        for r in runs:
            assert r["tokens"] == expected["tokens"], f"{side}: other tokens"
            np.testing.assert_allclose(r["losses"], expected["losses"], rtol=0.02, err_msg=f"{side}: other losses")
    rate = matrix_rate(torch.bfloat16, torch.get_num_threads())
    floor = rate / FLOOR_GFLOP

    def values(side: str, what: str) -> list[float]:
        return [r[what] for r in found[side]]

    batches = in_batches(token_rows(load_llm(dtype="bf16"), data, 512).rows, steps, BATCH, SEED)
    batches = [batches[k : k + BATCH] for k in range(0, len(batches), BATCH)]
    spared = sum((len(b) - 1) * shared_beginning(b) for b in batches) / expected["tokens"]
    done = executed_gflop(load_llm(dtype="bf16"), batches) / expected["tokens"]  # per token of the dialogues
    rows = []
    for name, side, peer in (
        ("lora_vs_trl_default", "default", "trl SFTTrainer, its defaults, fp32 weights"),
        ("lora_vs_trl_bf16", "bf16", "trl SFTTrainer, bf16 weights"),
    ):
        r = row(name, peer, values("ours", "rate"), values(side, "rate"), "tokens/s", more=True)
        share = round(float(r["ours"]) / floor, 3)  # type: ignore[arg-type]
        print(
            f"  floor {floor:.0f} tokens/s ({FLOOR_GFLOP} GFLOP per token, {rate:.0f} GFLOP/s); share of it: "
            f"ours {share:.0%}, peer {float(r['theirs']) / floor:.0%}; "  # type: ignore[arg-type]
            f"{spared:.0%} of our tokens were the template's beginning, computed once per batch, "
            f"{done * float(r['ours']) / rate:.0%} of the matrix rate",  # type: ignore[arg-type]
            flush=True,
        )
        rows.append(
            r
            | {
                "floor": round(floor, 1),
                "share_of_floor": share,
                "tokens_spared": round(spared, 3),
                "matrix_share": round(done * float(r["ours"]) / rate, 3),  # type: ignore[arg-type]
                "final_loss": expected["losses"][-1],
            }
        )
    for name, side, peer in (
        ("lora_peak_memory", "default", "trl SFTTrainer, its defaults, fp32 weights"),
        ("lora_peak_memory_bf16", "bf16", "trl SFTTrainer, bf16 weights"),
    ):
        rows.append(row(name, peer, values("ours", "mb"), values(side, "mb"), "MB", more=False))
    return rows


if __name__ == "__main__":
    print(json.dumps(child(*sys.argv[1:4], int(sys.argv[4]))), flush=True)
