"""Peak private memory of this process while something runs."""

from __future__ import annotations

import contextlib
import ctypes
import threading
from pathlib import Path


def private_mb(pid: int | str = "self") -> float:
    """Megabytes of a process (default: this one) that no file backs: heap and stacks, not memory-mapped weights.

    Where the system does not say (macOS, Windows), all resident memory.
    """
    return memory_mb(pid)[1]


def memory_mb(pid: int | str = "self") -> tuple[float, float]:
    """Megabytes of a process: resident ones, and those of them that no file backs (see :func:`private_mb`)."""
    try:
        resident, shared = Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1:3]
        return int(resident) * _PAGE, (int(resident) - int(shared)) * _PAGE
    except (OSError, ValueError):
        import psutil

        resident = psutil.Process(None if pid == "self" else int(pid)).memory_info().rss / 2**20
        return resident, resident


def trim() -> None:
    """Give the system back what was freed and malloc keeps (GNU C library; elsewhere nothing happens)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def _page_mb() -> float:
    import os

    return os.sysconf("SC_PAGE_SIZE") / 2**20 if hasattr(os, "sysconf") else 4096 / 2**20


_PAGE = _page_mb()


class PeakMemory:
    """Context manager; ``.mb`` is the largest private memory inside the block beyond that at its start.

    A thread samples every 5 ms. Freed memory that malloc keeps is given back first, or using it
    again would not count.
    """

    def __init__(self, interval: float = 0.005):
        self.mb, self._interval, self._stop = 0.0, interval, threading.Event()

    def __enter__(self) -> PeakMemory:
        trim()
        self._start = private_mb()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._stop.wait(self._interval):
            self.mb = max(self.mb, private_mb() - self._start)

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self.mb = max(self.mb, private_mb() - self._start)
