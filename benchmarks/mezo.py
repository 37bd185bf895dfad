"""A MeZO step against a plain transcription of the published algorithm: same batches, dtype and forward pass."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pllm_helpers.models import LLM, load_llm
from pllm_helpers.tuning import Recipe, private_copy
from pllm_helpers.tuning.data import Row as TokenRow
from pllm_helpers.tuning.mezo import AnswerLoss, MezoRun
from pllm_helpers.tuning.replay import LogWriter, start_of

from .compare import Row, in_turn, row, status_mb
from .lora import dialogues

SIZES = {"": (8, 32), "_16x128": (16, 128)}  # rows x tokens; a quarter of each row counts as answer
LR, EPSILON = 1e-7, 1e-3
PEER = "plain transcription of the published algorithm"


def token_batch(llm: LLM, rows: int, tokens: int) -> list[TokenRow]:
    """Rows of exactly ``tokens`` tokens of real chat, without a template that rows would have in common."""
    text = " ".join(d.text for d in dialogues(2 * rows * tokens // 20 + 20))
    ids = llm.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert len(ids) >= rows * tokens
    return [TokenRow(ids[k * tokens : (k + 1) * tokens], tokens // 4) for k in range(rows)]


def official_step(
    parameters: dict[str, torch.Tensor], loss: Callable[[], float], seed: int, lr: float, epsilon: float
) -> float:
    """Algorithm 1 of MeZO as in its released trainer: noise per tensor in the weights' dtype, sums not in place."""

    def walk(scale: int) -> None:
        torch.manual_seed(seed)
        for p in parameters.values():
            z = torch.normal(mean=0, std=1, size=p.data.size(), device=p.data.device, dtype=p.data.dtype)
            p.data = p.data + scale * z * epsilon

    with torch.inference_mode():
        walk(1)
        up = loss()
        walk(-2)
        down = loss()
        walk(1)
        slope = (up - down) / (2 * epsilon)
        torch.manual_seed(seed)
        for p in parameters.values():
            z = torch.normal(mean=0, std=1, size=p.data.size(), device=p.data.device, dtype=p.data.dtype)
            p.data = p.data - lr * (slope * z)
    return slope


class Side:
    """A private copy of the model, its forward pass on one batch, and a step of either kind."""

    def __init__(self, llm: LLM, batch: Sequence[TokenRow]):
        double = private_copy(llm, llm.dtype)
        double.model.requires_grad_(False)
        self.parameters, self.batch = dict(double.model.named_parameters()), batch
        self.measure, self.count = AnswerLoss(double), 0

    def forward(self) -> float:
        return self.measure.mean(self.batch)

    def ours(self, noise: str) -> Callable[[], float]:
        """A function that takes one step of ours; returns its slope."""
        log = LogWriter({"recipe": {"directions": 1}})
        recipe = Recipe(0, LR, EPSILON, noise, stochastic=next(iter(self.parameters.values())).dtype == torch.bfloat16)
        run = MezoRun(list(self.parameters.values()), self.measure.mean, recipe, log)

        def step() -> float:
            run.one_step(self.batch)
            return log.rows[-1][0]

        return step

    def theirs(self) -> float:
        seed = Recipe(0, LR, EPSILON).seeds(self.count)[0]
        self.count += 1
        return official_step(self.parameters, self.forward, seed, LR, EPSILON)


def timed(function: Callable[[], Any]) -> Callable[[], float]:
    def run() -> float:
        start = time.perf_counter()
        function()
        return time.perf_counter() - start

    return run


def same_estimates(llm: LLM, batch: Sequence[TokenRow]) -> list[float]:
    """Slopes of two steps with the published noise on both sides; they must be equal up to rounding."""
    a, b = Side(llm, batch), Side(llm, batch)
    step = a.ours("gaussian")
    ours, theirs = [step() for _ in range(2)], [b.theirs() for _ in range(2)]
    np.testing.assert_allclose(ours, theirs, rtol=2e-3, atol=2e-2, err_msg="other estimates")
    return ours


def step_rows(dtype: str, quick: bool) -> list[Row]:
    llm, found, suffix = load_llm(dtype=dtype), [], "" if dtype == "fp32" else "_bf16"
    for size, (rows, tokens) in SIZES.items():
        batch = token_batch(llm, rows, tokens)
        if dtype == "fp32" and not size:
            slopes = same_estimates(llm, batch)
            print(f"  same estimates with the same noise: {', '.join(f'{g:.3f}' for g in slopes)}", flush=True)
        ours, theirs = Side(llm, batch), Side(llm, batch)
        rounds = 2 if quick else 6
        a, b = in_turn(timed(ours.ours("rademacher")), timed(theirs.theirs), rounds)
        shape = f"{rows} x {tokens} tokens, {dtype}"
        found.append(row(f"mezo_step{suffix}{size}", f"{PEER}, {shape}", a, b, "s", version="2024", more=False))
        forward, _ = in_turn(timed(ours.forward), timed(theirs.forward), rounds)
        if size:
            unit = float(np.mean(forward))
            in_forwards = row(
                f"mezo_forwards{suffix}",
                f"{PEER}, {shape}",
                [x / unit for x in a],
                [x / unit for x in b],
                "forward passes",
                version="2024",
                more=False,
            )
            found.append(in_forwards | {"floor": 2, "forward_seconds": round(unit, 4)})
    return found


def together_row(quick: bool) -> Row:
    """Inside LoRA on the upper half: 4 two-sided directions in one forward pass against 8 passes."""
    from pllm_helpers.tuning.directions import joint_probe

    llm = load_llm(dtype="bf16")
    layers = len(llm.model.get_decoder().layers)
    lora = {"rank": 8, "alpha": 16, "modules": ["q_proj", "v_proj"], "layers": list(range(layers // 2, layers))}
    start = start_of(llm, {"parameters": "lora", "recipe": {"seed": 0}, "lora": lora})
    recipe = Recipe(0, 1e-3, 1e-2, "rademacher", 4)
    batch = token_batch(llm, *SIZES[""])
    run = MezoRun(list(start.parameters.values()), AnswerLoss(start.llm).mean, recipe, LogWriter({}))
    before = [p.clone() for p in run.parameters]
    joint = joint_probe(start.llm.model, start.parameters, replace(recipe, in_place=False))

    def one_by_one() -> list[float]:
        found = run.losses_at(batch)
        for p, kept in zip(run.parameters, before, strict=True):
            p.data.copy_(kept)
        return found

    np.testing.assert_allclose(joint(batch, 0), one_by_one(), rtol=5e-3, err_msg="other losses")
    a, b = in_turn(timed(lambda: joint(batch, 0)), timed(one_by_one), 2 if quick else 6)
    peer = "ours, one forward pass per probe (LoRA on the upper half, 4 two-sided directions, 8 x 32 tokens, bf16)"
    return row("mezo_lora_together", peer, a, b, "s", version="2024", more=False)


def child(side: str) -> dict[str, float]:
    """Peak resident megabytes beyond the imports of three forward passes, or of three steps."""
    import transformers.models.llama.modeling_llama  # noqa: F401

    before = status_mb("VmRSS")
    llm = load_llm(dtype="fp32")
    work = Side(llm, token_batch(llm, *SIZES["_16x128"]))
    step = {"forward": work.forward, "ours": work.ours("rademacher"), "theirs": work.theirs}[side]
    for _ in range(3):
        step()
    return {"mb": status_mb("VmHWM") - before}


def in_process_of_its_own(side: str) -> float:
    command = [sys.executable, "-m", "benchmarks.mezo", side]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], env={**os.environ}, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])["mb"]


def memory_rows(quick: bool) -> list[Row]:
    found: dict[str, list[float]] = {"ours": [], "forward": [], "theirs": []}
    for k in range(2 if quick else 3):
        for side in list(found)[:: 1 if k % 2 == 0 else -1]:
            found[side].append(in_process_of_its_own(side))
    rows, tokens = SIZES["_16x128"]
    shape = f"{rows} x {tokens} tokens, fp32, model included"
    return [
        row(name, f"{peer}, {shape}", found["ours"], found[side], "MB", version="2024", more=False)
        for name, side, peer in (
            ("mezo_peak_memory", "forward", "the same forward pass alone"),
            ("mezo_peak_memory_transcription", "theirs", PEER),
        )
    ]


def run(quick: bool = False) -> list[Row]:
    """Rows ``mezo_step`` (seconds; 8 x 32 tokens, fp32; ``_16x128`` and ``_bf16`` variants), ``mezo_forwards``
    (a step in forward passes, floor 2), ``mezo_peak_memory`` (against the forward pass alone; 1 / 1.05 is
    the aim) and ``mezo_lora_together``.

    All weights of SmolLM2. Both sides run the same forward pass, logits at answer positions only.
    First they must find the same slopes with the same Gaussian noise; then ours takes its fastest
    noise, signs.
    """
    return [*step_rows("fp32", quick), *step_rows("bf16", quick), *memory_rows(quick), together_row(quick)]


if __name__ == "__main__":
    print(json.dumps(child(sys.argv[1])), flush=True)
