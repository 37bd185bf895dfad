"""LOMO against the package ``lomo-optim``: same weights, batches and forward pass; memory of frugal tuning."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from pllm_helpers.dialogue import DialogueSet
from pllm_helpers.models import load_llm
from pllm_helpers.tuning import private_copy, tune_full, tune_lomo, tune_lora
from pllm_helpers.tuning.data import token_rows
from pllm_helpers.tuning.forward import plain_objective
from pllm_helpers.tuning.full import checkpoint_blocks

from .compare import Row, row, status_mb
from .lora import dialogues, in_batches

BATCH, LR, SEED = 8, 1e-3, 0
SAME = {"lr": LR, "batch_size": BATCH, "warmup": 0, "decay": "constant", "seed": SEED, "progress": False}
TUNERS: dict[str, tuple[str, Any, dict[str, Any]]] = {  # what is run, by name: dtype, tuner, settings
    "lomo": ("fp32", tune_lomo, {}),
    "lomo_checkpoint": ("fp32", tune_lomo, {"checkpointing": True}),
    "sgd_checkpoint": ("fp32", tune_full, {"optimizer": "sgd", "checkpointing": True}),
    "adam_checkpoint": ("fp32", tune_full, {"checkpointing": True}),
    "lora": ("bf16", tune_lora, {}),
    "lora_checkpoint": ("bf16", tune_lora, {"frugal": "checkpoint"}),
    "lora_stream": ("bf16", tune_lora, {"frugal": "stream"}),
}


def peer(data: list[DialogueSet], steps: int, checkpointing: bool) -> tuple[list[float], float, int]:
    """``lomo_optim.Lomo`` on the weights, batches and objective of :func:`tune_lomo`: losses, seconds, tokens."""
    from lomo_optim import Lomo

    llm = load_llm(dtype="fp32")
    double = private_copy(llm)
    if checkpointing:
        checkpoint_blocks(double.model.get_decoder().layers)
    objective = plain_objective(double.model, llm.tokenizer.pad_token_id or 0)
    rows = in_batches(token_rows(llm, data, 512).rows, steps, BATCH, SEED)
    optimizer, losses = Lomo(double.model, lr=LR), []
    start = time.perf_counter()
    for k in range(0, len(rows), BATCH):
        batch = rows[k : k + BATCH]
        loss = objective(batch).sum() / sum(r.answer for r in batch)
        losses.append(loss.item())
        optimizer.fused_backward(loss, LR)
    return losses, time.perf_counter() - start, sum(len(r.ids) for r in rows)


def child(side: str, folder: str, steps: int) -> dict[str, Any]:
    """One run in this process: tokens per second, peak resident megabytes beyond the imports, losses."""
    import transformers.models.llama.modeling_llama  # noqa: F401

    from pllm_helpers.runtime import prepare

    data = [DialogueSet(**d) for d in json.loads(Path(folder, "dialogues.json").read_text(encoding="utf-8"))]
    if side.startswith("peer"):
        import lomo_optim  # noqa: F401
    elif side.startswith("lora"):
        import peft  # noqa: F401
    prepare(0)
    before = status_mb("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # VmHWM starts anew
    if side.startswith("peer"):
        losses, seconds, tokens = peer(data, steps, side.endswith("checkpoint"))
    else:
        dtype, tune, settings = TUNERS[side]
        result = tune(load_llm(dtype=dtype), data, steps=steps, **SAME, **settings)
        losses, seconds, tokens = result.losses, result.seconds, result.tokens
    peak = status_mb("VmHWM") - before
    return {"rate": tokens / seconds, "tokens": tokens, "mb": peak, "losses": losses}


def in_process_of_its_own(side: str, folder: str | Path, steps: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.lomo", side, str(folder), str(steps)]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], env={**os.environ}, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def write_dialogues(folder: str | Path, data: list[DialogueSet]) -> None:
    rows = [{"user": "u", "question": d.question, "answer": d.answer} for d in data]
    Path(folder, "dialogues.json").write_text(json.dumps(rows), encoding="utf-8")


def run(quick: bool = False) -> list[Row]:
    """Rows ``lomo_speed`` (tokens per second) and ``lomo_peak_memory`` (megabytes beyond the imports, less is
    better), and both again with ``_checkpointed``: every block keeps its input only, as LOMO's examples have it.

    All weights of SmolLM2 in fp32, batches of 8 real chat messages, the same rows in the same
    order, logits at answer positions, SGD without clipping. Each run is a process of its own.
    Then the peak memory of other ways of tuning is printed, one run each.
    """
    if importlib.util.find_spec("lomo_optim") is None:
        print("  left out: lomo-optim is not installed (pip install --no-deps lomo-optim==0.1.1)", flush=True)
        return []
    steps, rounds = (2, 2) if quick else (5, 3)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        write_dialogues(folder, dialogues(steps * BATCH))
        for ours, theirs, suffix in (("lomo", "peer", ""), ("lomo_checkpoint", "peer_checkpoint", "_checkpointed")):
            found: dict[str, list[dict[str, Any]]] = {ours: [], theirs: []}
            for k in range(rounds):
                for side in (ours, theirs) if k % 2 == 0 else (theirs, ours):
                    found[side].append(in_process_of_its_own(side, folder, steps))
            first = found[ours][0]
            for r in (*found[ours], *found[theirs]):
                assert r["tokens"] == first["tokens"], "other tokens"
                np.testing.assert_allclose(r["losses"], first["losses"], rtol=1e-3, err_msg="other losses")
            for name, what, unit, more in (("speed", "rate", "tokens/s", True), ("peak_memory", "mb", "MB", False)):
                a, b = ([r[what] for r in found[side]] for side in (ours, theirs))
                rows.append(row(f"lomo_{name}{suffix}", "lomo-optim Lomo", a, b, unit, more=more))
        for side in ("sgd_checkpoint", "adam_checkpoint", "lora", "lora_checkpoint", "lora_stream"):
            r = in_process_of_its_own(side, folder, steps)
            print(f"  {side}: {r['mb']:.0f} MB beyond the imports, {r['rate']:.0f} tokens/s")
    return rows


if __name__ == "__main__":
    print(json.dumps(child(sys.argv[1], sys.argv[2], int(sys.argv[3]))), flush=True)
