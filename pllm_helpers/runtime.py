"""Seeds, thread caps, offline mode, folders and errors: set in one place, used everywhere."""

from __future__ import annotations

import contextlib
import os
import platform
import random
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

__all__ = [
    "InputError",
    "Runtime",
    "cache_dir",
    "data_dir",
    "go_offline",
    "online",
    "prepare",
    "processor_name",
    "thread_count",
    "whole_file",
    "write_whole",
]


class InputError(ValueError):
    """Bad input: names the input, says what was expected and what to do about it.

    Parameters
    ----------
    what : the input at fault, for instance ``"top_p"``.
    expected : what would have been accepted, and what came instead.
    remedy : what the reader can do now; may be empty.
    """

    def __init__(self, what: str, expected: str, remedy: str = ""):
        self.what, self.expected, self.remedy = what, expected, remedy
        super().__init__(f"{what}: {expected}." + (f" {remedy}" if remedy else ""))


@dataclass(frozen=True)
class Runtime:
    """What :func:`prepare` set: seed, CPU threads and whether hubs may be reached."""

    seed: int
    threads: int
    offline: bool


def thread_count() -> int:
    """CPU threads that this process may use: ``PLLM_THREADS`` or the cores it may run on.

    Raises :class:`InputError` if ``PLLM_THREADS`` is not a positive whole number.
    """
    wanted = os.environ.get("PLLM_THREADS", "").strip()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if not wanted:
        return cores
    if not wanted.isdigit() or int(wanted) < 1:
        raise InputError(
            "PLLM_THREADS", f"expected a whole number of at least 1, got {wanted!r}", "Unset it or correct it."
        )
    return int(wanted)


def prepare(seed: int = 0, *, threads: int | None = None, offline: bool = True) -> Runtime:
    """Seed Python, NumPy and torch, cap the CPU threads, and keep the hub libraries offline.

    Every notebook calls this first. Model loaders call :func:`go_offline` by themselves, so a
    forgotten ``prepare`` costs reproducibility but never privacy.
    """
    if seed < 0:
        raise InputError("seed", f"expected a whole number of at least 0, got {seed}")
    if threads is not None and threads < 1:
        raise InputError("threads", f"expected at least 1, got {threads}")
    import torch

    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    count = threads or thread_count()
    torch.set_num_threads(count)
    go_offline(offline)
    return Runtime(seed, count, offline)


def go_offline(offline: bool = True) -> None:
    """Tell the Hugging Face libraries not to touch the network (and not to count downloads)."""
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if offline:
        os.environ["HF_HUB_OFFLINE"] = "1"
        os.environ["TRANSFORMERS_OFFLINE"] = "1"
    else:
        os.environ.pop("HF_HUB_OFFLINE", None)
        os.environ.pop("TRANSFORMERS_OFFLINE", None)
    # the hub library reads its switch once, at import
    import sys

    constants = sys.modules.get("huggingface_hub.constants")
    if constants is not None:
        constants.HF_HUB_OFFLINE = offline


_ONLINE_LOCK = threading.RLock()


@contextlib.contextmanager
def online(allowed: bool = True) -> Iterator[None]:
    """Reach the hub inside this block only; offline again afterwards, whatever happens."""
    with _ONLINE_LOCK:
        go_offline(not allowed)
        try:
            yield
        finally:
            go_offline(True)


def processor_name() -> str:
    """Model name of the CPU, as the operating system tells it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a whole file, synced to disk, or nothing; text as UTF-8."""
    with whole_file(path) as beside:
        beside.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A path beside ``path`` to write to; it takes the place of ``path``, synced to disk, when the block ends well.

    For what is too large to be built in memory first.
    """
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        os.close(handle)
        yield Path(name)
        with open(name, "rb+") as f:
            os.fsync(f.fileno())
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def cache_dir() -> Path:
    """Per-user cache folder (``PLLM_CACHE`` overrides it); created on first use."""
    import platformdirs

    path = Path(os.environ.get("PLLM_CACHE") or platformdirs.user_cache_dir("pllm"))
    path.mkdir(parents=True, exist_ok=True)
    return path


def data_dir() -> Path:
    """The project's ``data`` folder: beside the package in a checkout, inside it in a wheel.

    Raises :class:`InputError` if neither is there.
    """
    package = Path(__file__).resolve().parent
    for path in (package / "_data", package.parent / "data"):
        if (path / "dialogues").is_dir():
            return path
    raise InputError(
        "data folder", f"expected {package.parent / 'data'}", "Install the project again from a full checkout."
    )
