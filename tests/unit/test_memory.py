"""Weights are shared between kernels: what a second process adds in private memory."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

CHILD = r"""
import gc, sys
import torch, transformers
from transformers import AutoModelForCausalLM
import transformers.models.llama.modeling_llama
from pllm_helpers.models import load_llm
def private():
    gc.collect()
    lines = open("/proc/self/smaps_rollup", encoding="utf-8").read().splitlines()
    return sum(int(x.split()[1]) for x in lines if x.startswith("Private_Dirty")) / 1024
torch.set_num_threads(1)
before = private()
llm = load_llm(dtype=sys.argv[1])
with torch.inference_mode():
    llm.model(input_ids=torch.arange(10, 42)[None])
print(private() - before, flush=True)
sys.stdin.read()
"""


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="needs Linux's smaps_rollup")
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_second_kernel_adds_under_150_mb(dtype):
    env = {**os.environ, "OMP_NUM_THREADS": "1"}

    def start():
        command = [sys.executable, "-c", CHILD, dtype]
        return subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    first = start()
    first.stdout.readline()
    second = start()
    added = float(second.stdout.readline())
    for process in (first, second):
        process.communicate("", timeout=60)
    assert added < 150
