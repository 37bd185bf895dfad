"""``kill -9`` at random moments of training: is the resumed adapter the uninterrupted one, bit by bit?"""

from __future__ import annotations

import importlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

from pllm_helpers.dialogue import DialogueSet
from pllm_helpers.models import LLM, load_llm
from pllm_helpers.tuning import load_result, tune_lora
from pllm_helpers.tuning.adapters import WEIGHTS

from .compare import Row
from .kill import kill_row

ROOT = Path(__file__).resolve().parents[1]
Run = tuple[LLM, list[DialogueSet], dict[str, Any]]  # model, dialogues, settings of tune_lora


def real_run() -> Run:
    """SmolLM2 on real chat messages: a few seconds, a checkpoint after every step."""
    from .lora import dialogues

    settings = dict(steps=6, lr=0.001, seed=3, batch_size=2, accumulate=2, layers=6, checkpoint_every=1)
    data = dialogues(24)
    return load_llm(dtype="bf16"), data[4:], settings | dict(held_out=data[:4], evaluate_every=3, patience=3)


def train_and_kill(run: str, folder: Path, kills: int, seed: int = 0) -> list[Path]:
    """Train ``run`` (``"module:function"``) until ``kills`` processes were killed; folders of the runs that ended.

    The first is never interrupted. A run that ends in spite of the kills is followed by another.
    """
    command = [sys.executable, "-m", "benchmarks.kill_tuning", run, str(folder), str(kills), str(seed)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return [Path(p) for p in json.loads(done.stdout.splitlines()[-1])]


def nursery(run: str, base: str, kills: int, seed: int) -> list[str]:
    """Import and load once, then fork a child for each sitting."""
    import torch

    torch.set_num_threads(1)  # no pool of threads: the process may fork
    module, name = run.split(":")
    llm, data, settings = getattr(importlib.import_module(module), name)()
    rng, folders, left, longest = random.Random(seed), [f"{base}/whole"], kills, 0.0
    sitting(llm, data, settings, folders[0], None)
    longest = 0.7 * load_result(folders[0]).seconds
    while left:
        folders.append(f"{base}/{len(folders)}")
        while left and not sitting(llm, data, settings, folders[-1], rng.uniform(0, longest)):
            left -= 1
    sitting(llm, data, settings, folders[-1], None)
    return folders


def sitting(llm: LLM, data: list[DialogueSet], settings: dict[str, Any], folder: str, delay: float | None) -> bool:
    """Train in a child that is killed after ``delay`` seconds; whether it had ended by then."""
    child = os.fork()
    if child == 0:
        try:
            tune_lora(llm, data, out=folder, progress=False, **settings)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    if delay is not None:
        time.sleep(delay)
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    if status not in (0, signal.SIGKILL):
        raise RuntimeError(f"the child died by itself: {status}")
    return status == 0


def differences(folders: list[Path]) -> list[str]:
    """What in the runs differs from the first: losses, held-out curve, adapter."""
    whole, found = load_result(folders[0]), []
    for folder in folders[1:]:
        result = load_result(folder)
        if (result.losses, result.held_out, result.tokens) != (whole.losses, whole.held_out, whole.tokens):
            found.append(f"{folder}: other losses")
        if (folder / WEIGHTS).read_bytes() != (folders[0] / WEIGHTS).read_bytes():
            found.append(f"{folder}: another adapter")
    return found


def run(quick: bool = False, kills: int | None = None) -> list[Row]:
    """Row ``kill_tuning``: ``kills`` (50; 10 if quick) sittings of real training, killed at random moments."""
    kills = kills or (10 if quick else 50)
    with tempfile.TemporaryDirectory() as folder:
        found = differences(train_and_kill("benchmarks.kill_tuning:real_run", Path(folder), kills))
        assert not found, found
    return [kill_row("kill_tuning", kills, kills)]


if __name__ == "__main__":
    print(json.dumps(nursery(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))), flush=True)
