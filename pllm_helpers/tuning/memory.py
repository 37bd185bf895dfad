"""Peak private memory of this process while something runs."""

from __future__ import annotations

import threading
from pathlib import Path


def private_mb() -> float:
    """Megabytes of this process that no file backs: heap and stacks, not memory-mapped weights.

    Where the system does not say (macOS, Windows), all resident memory.
    """
    try:
        resident, shared = Path("/proc/self/statm").read_text(encoding="ascii").split()[1:3]
        return (int(resident) - int(shared)) * _PAGE
    except (OSError, ValueError):
        import psutil

        return psutil.Process().memory_info().rss / 2**20


def _page_mb() -> float:
    import os

    return os.sysconf("SC_PAGE_SIZE") / 2**20 if hasattr(os, "sysconf") else 4096 / 2**20


_PAGE = _page_mb()


class PeakMemory:
    """Context manager; ``.mb`` is the largest private memory inside the block beyond that at its start.

    A thread samples every 5 ms. Memory that the process had freed but kept (and now uses again)
    does not count, so a second run in one process may show less than the first.
    """

    def __init__(self, interval: float = 0.005):
        self.mb, self._interval, self._stop = 0.0, interval, threading.Event()

    def __enter__(self) -> PeakMemory:
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
