"""Private memory that a second kernel adds: ours against plain ``from_pretrained`` of the same weights."""

from __future__ import annotations

import os
import subprocess
import sys

import transformers

from pllm_helpers.models import load_llm
from pllm_helpers.models.weights import DTYPES

from .compare import Row, row

CHILD = """
import gc, sys
import torch, transformers
from transformers import AutoModelForCausalLM
import transformers.models.llama.modeling_llama
from pllm_helpers.models import load_llm
from pllm_helpers.models.weights import quiet_transformers
def private():
    gc.collect()
    lines = open("/proc/self/smaps_rollup", encoding="utf-8").read().splitlines()
    return sum(int(x.split()[1]) for x in lines if x.startswith("Private_Dirty")) / 1024
torch.set_num_threads(1)
side, dtype, folder = sys.argv[1:]
before = private()
with quiet_transformers():
    if side == "ours":
        model = load_llm(dtype=dtype).model
    else:
        wanted = torch.bfloat16 if dtype == "bf16" else torch.float32
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=wanted, attn_implementation="eager")
with torch.inference_mode():
    out = model(input_ids=torch.arange(10, 42)[None]).logits
print(private() - before, float(out.double().abs().sum()), flush=True)
sys.stdin.read()
"""


def second_kernel(side: str, dtype: str, folder: str) -> tuple[float, float]:
    """Megabytes that the second of two living processes adds, and a checksum of its logits."""
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", CHILD, side, dtype, folder]
    both = []
    for _ in range(2):
        process = subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        megabytes, checksum = map(float, process.stdout.readline().split())  # type: ignore[union-attr]
        both.append(process)
    for process in both:
        process.communicate("", timeout=60)
    return megabytes, checksum


def run(quick: bool = False) -> list[Row]:
    """Rows ``kernel_private_mb`` (bf16) and ``kernel_private_mb_fp32``: megabytes, less is better.

    The peer loads a folder that ``save_pretrained`` wrote from the same weights at the same dtype,
    and one that holds fp32 weights loaded as bf16, the usual way to get bf16 (the ``_converted`` row).
    """
    import tempfile

    rows = []
    with tempfile.TemporaryDirectory() as base:
        folders = {}
        for dtype in DTYPES:
            llm = load_llm(dtype=dtype)
            folders[dtype] = f"{base}/{dtype}"
            llm.model.save_pretrained(folders[dtype])
        cases = [("kernel_private_mb", "bf16", "bf16"), ("kernel_private_mb_fp32", "fp32", "fp32")]
        for name, dtype, stored in [*cases, ("kernel_private_mb_converted", "bf16", "fp32")]:
            a, b = [], []
            for _ in range(2 if quick else 3):
                for side, kept in (("ours", a), ("theirs", b)):
                    kept.append(second_kernel(side, dtype, folders[stored]))
            assert len({checksum for _, checksum in a + b}) == 1, "both sides must compute the same logits"
            peer = f"transformers from_pretrained, {stored} file as {dtype}"
            ours, theirs = [x for x, _ in a], [x for x, _ in b]
            rows.append(row(name, peer, ours, theirs, "MB", version=transformers.__version__, more=False))
    return rows
