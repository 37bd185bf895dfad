"""``dtype="auto"``: time bf16 and fp32 once on this machine and remember the faster."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch

from ..runtime import InputError, cache_dir, processor_name, write_whole
from .weights import DTYPES

_MEASURED: dict[str, dict] = {}  # this process; for caches that cannot be written


def machine_key(model_name: str) -> str:
    """Hash of what the choice depends on: model, processor and its flags, torch, threads."""
    capability = torch.backends.cpu.get_cpu_capability()
    flags = ""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        flags = next((x for x in lines if x.startswith(("flags", "Features"))), "")
    parts = (model_name, processor_name(), capability, flags, torch.__version__, torch.get_num_threads())
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def seconds_per_forward(model: torch.nn.Module, *, rows: int = 4, tokens: int = 48) -> float:
    """Seconds of one forward pass on a ``(rows, tokens)`` batch of fixed ids."""
    vocabulary = model.config.get_text_config().vocab_size
    ids = (torch.arange(rows * tokens) * 7919 % min(vocabulary, 20_000)).view(rows, tokens)
    start = time.perf_counter()
    with torch.inference_mode():
        model(input_ids=ids)
    return time.perf_counter() - start


def faster_dtype(model_name: str, build: Callable[[str], torch.nn.Module]) -> str:
    """``"bf16"`` or ``"fp32"``, whichever runs ``model_name`` faster here.

    The first call times three forward passes of each, in turn, and keeps the minimum; the answer
    is stored per model, processor, torch version and thread count. ``PLLM_DTYPE`` overrides it.
    """
    forced = os.environ.get("PLLM_DTYPE")
    if forced:
        if forced not in DTYPES:
            raise InputError(
                "PLLM_DTYPE", f"expected one of {sorted(DTYPES)}, got {forced!r}", "Unset it or correct it."
            )
        return forced
    key, store = machine_key(model_name), cache_dir() / "machine.json"
    known: dict = {}
    with contextlib.suppress(OSError, ValueError):
        known = json.loads(store.read_text(encoding="utf-8"))
    entry = known.get(key) or _MEASURED.get(key)
    if not entry or entry.get("dtype") not in DTYPES:
        models = {name: build(name) for name in DTYPES}
        for model in models.values():
            seconds_per_forward(model)  # warm up
        times = {name: 1e9 for name in DTYPES}
        for _ in range(3):  # in turn, so that a busy moment does not fall on one side only
            for name, model in models.items():
                times[name] = min(times[name], seconds_per_forward(model))
        entry = {
            "dtype": min(times, key=times.__getitem__),
            "model": model_name,
            "processor": processor_name(),
            "seconds": times,
            "threads": torch.get_num_threads(),
        }
        _MEASURED[key] = entry
        with contextlib.suppress(OSError):
            write_whole(store, json.dumps({**known, key: entry}, indent=1))
    return entry["dtype"]


def measured_dtypes() -> list[dict]:
    """What ``dtype="auto"`` has measured on this machine so far."""
    known: dict = {}
    with contextlib.suppress(OSError, ValueError):
        known = json.loads((cache_dir() / "machine.json").read_text(encoding="utf-8"))
    return list({**known, **_MEASURED}.values())
