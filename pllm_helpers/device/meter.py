"""What a piece of work takes on this device: memory over time, wall and CPU seconds, tokens, an energy proxy."""

from __future__ import annotations

import contextlib
import re
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from ..runtime import InputError
from ..tuning.memory import memory_mb

__all__ = ["EnergyProxy", "Meter", "Phase", "Sample", "mark_phase"]

Number = float | int

# Whole-phone power while a small LLM is fine-tuned. XPerT (arXiv 2504.13938), table 5, "scratch", synthetic:
# 15.7 kJ in 97.8 min (OnePlus 12R), 6.2 kJ in 26.4 min (Pixel 9 Pro), 18.0 kJ in 93.6 min (Pixel 7)
# = 2.7, 3.9 and 3.2 W. The middle one is used.
PHONE_WATTS = 3.2


class Sample(NamedTuple):
    """Memory at one moment. ``seconds`` since the start; megabytes above the start's (or the envelope's baseline)."""

    seconds: float
    resident_mb: float
    private_mb: float
    phase: str


class Phase(NamedTuple):
    """All stretches of one name together: wall seconds, and the largest memory seen in them."""

    name: str
    seconds: float
    resident_mb: float
    private_mb: float


@dataclass(frozen=True)
class EnergyProxy:
    """CPU seconds times an assumed power. A stand-in for comparing runs *on one machine*; no energy was measured.

    ``value`` is in "proxy joules". It knows nothing of memory traffic, clock rates, idle power or
    the screen, and a CPU second here is not a CPU second of a phone. The power is that of a whole
    phone at work, so that seconds of two threads side by side count twice.
    """

    cpu_seconds: float
    watts: float

    @property
    def value(self) -> float:
        """``cpu_seconds * watts``, proxy joules."""
        return self.cpu_seconds * self.watts

    def __str__(self) -> str:
        return f"{self.value:.0f} proxy J ({self.cpu_seconds:.1f} CPU s x {self.watts:g} W assumed; no energy measured)"


class Timeline:
    """Samples in order of time, thinned out as they grow: of two neighbours the larger one stays."""

    def __init__(self, most: int = 4096):
        self.samples: list[Sample] = []
        self._most, self._every, self._waiting = most, 1, list[Sample]()

    def add(self, sample: Sample) -> None:
        """Take a sample later than all before."""
        if self._waiting and self._waiting[-1].phase != sample.phase:
            self.flush()
        self._waiting.append(sample)
        if len(self._waiting) < self._every:
            return
        self.flush()
        if len(self.samples) >= self._most:
            self._every *= 2
            self.samples = self._merged(self.samples)

    def flush(self) -> None:
        """Put what waits for its group to fill into :attr:`samples`."""
        if self._waiting:
            self.samples.append(max(self._waiting, key=lambda s: s.resident_mb))
            self._waiting = []

    @staticmethod
    def _merged(samples: list[Sample]) -> list[Sample]:
        """Half as many; neighbours of different phases both stay, so that no phase disappears."""
        out: list[Sample] = []
        for k, s in enumerate(samples):
            if k % 2 and out and out[-1].phase == s.phase:
                out[-1] = max(out[-1], s, key=lambda x: x.resident_mb)
            else:
                out.append(s)
        return out


def phases(samples: list[Sample]) -> list[Phase]:
    """Seconds and peaks per phase, in the order in which phases first occur."""
    found: dict[str, list[float]] = {}
    for k, s in enumerate(samples):
        until = samples[k + 1].seconds if k + 1 < len(samples) else s.seconds
        entry = found.setdefault(s.phase, [0.0, s.resident_mb, s.private_mb])
        entry[0] += until - s.seconds
        entry[1], entry[2] = max(entry[1], s.resident_mb), max(entry[2], s.private_mb)
    return [Phase(name, *values) for name, values in found.items()]


def high_water_mb(pid: int | str = "self") -> float:
    """The largest resident memory the kernel has seen for a process (``VmHWM``), megabytes; 0 where it does not say.

    The kernel updates it at every page, so no spike is too short for it.
    """
    with contextlib.suppress(OSError, ValueError):
        status = Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace")
        if found := re.search(r"VmHWM:\s+(\d+) kB", status):
            return int(found[1]) / 1024
    return 0.0


_LISTENERS: list[Callable[[str], None]] = []  # of running meters, and of the envelope in whose child this runs
_CURRENT = [""]


@contextlib.contextmanager
def mark_phase(name: str) -> Iterator[None]:
    """Name a stretch of work for every running :class:`Meter` and for the envelope around this process, if any."""
    before, _CURRENT[0] = _CURRENT[0], name
    _tell(name)
    try:
        yield
    finally:
        _CURRENT[0] = before
        _tell(before)


def _tell(name: str) -> None:
    for listener in list(_LISTENERS):
        listener(name)


class Meter:
    """Context manager that watches this process: memory, time, tokens, and an energy proxy.

    A thread reads the memory every ``interval`` seconds. ``private`` memory is what no file backs,
    so memory-mapped weights are in ``resident`` only. Both count from the start of the block;
    memory that the process had freed but kept, and uses again, does not show. The resident peak
    also takes the kernel's own high-water mark where that rose inside the block, so a spike between
    two readings is not lost. A meter that is used again starts anew.

    Parameters
    ----------
    interval : seconds between two readings.
    watts : power assumed by the energy proxy; the default is the middle one of three whole-phone
        figures for LLM fine-tuning (XPerT, arXiv 2504.13938, table 5: energy by time).

    Attributes
    ----------
    peak_resident_mb, peak_private_mb : largest memory above the start's, megabytes.
    wall_seconds, cpu_seconds : of the block; CPU seconds count all threads of this process.
    tokens : what :meth:`add_tokens` was told.
    timeline : list of :class:`Sample`; thinned out in long runs, peaks stay.

    >>> with Meter() as meter:
    ...     with meter.phase("forward"):
    ...         _ = sum(range(1000))
    >>> [p.name for p in meter.phases]
    ['', 'forward']
    """

    def __init__(self, *, interval: Number = 0.005, watts: Number = PHONE_WATTS):
        for name, value in (("interval", interval), ("watts", watts)):
            if not 0 < value < 1e6:
                raise InputError(name, f"expected a number above 0, got {value!r}")
        self._interval, self._watts, self._lock = float(interval), float(watts), threading.Lock()
        self._reset()

    def _reset(self) -> None:
        self._line, self._stop = Timeline(), threading.Event()
        self.peak_resident_mb = self.peak_private_mb = self.wall_seconds = self.cpu_seconds = 0.0
        self.tokens = 0

    def __enter__(self) -> Meter:
        self._reset()
        self._base, self._high = memory_mb(), high_water_mb()
        self._wall, self._cpu = time.perf_counter(), time.process_time()
        self._phase = _CURRENT[0]
        self._look()
        _LISTENERS.append(self._turn)
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._look()
        _LISTENERS.remove(self._turn)
        self._line.flush()
        self.wall_seconds, self.cpu_seconds = time.perf_counter() - self._wall, time.process_time() - self._cpu
        if (high := high_water_mb()) > self._high:
            self.peak_resident_mb = max(self.peak_resident_mb, high - self._base[0])

    def _watch(self) -> None:
        while not self._stop.wait(self._interval):
            self._look()

    def _look(self) -> None:
        with self._lock:
            resident, private = (now - base for now, base in zip(memory_mb(), self._base, strict=True))
            self._line.add(Sample(time.perf_counter() - self._wall, resident, private, self._phase))
            self.peak_resident_mb = max(self.peak_resident_mb, resident)
            self.peak_private_mb = max(self.peak_private_mb, private)

    def _turn(self, name: str) -> None:
        """Another phase: a reading on either side, so that even a short one is in the timeline."""
        self._look()
        self._phase = name
        self._look()

    def phase(self, name: str) -> contextlib.AbstractContextManager[None]:
        """Name what runs inside the block, for instance ``with meter.phase("forward"):``."""
        return mark_phase(name)

    def add_tokens(self, count: int) -> None:
        """Count tokens that were processed."""
        self.tokens += int(count)

    @property
    def timeline(self) -> list[Sample]:
        """Samples so far, in order of time."""
        return list(self._line.samples)

    @property
    def phases(self) -> list[Phase]:
        """Seconds and peak memory per phase."""
        return phases(self.timeline)

    @property
    def energy_proxy(self) -> EnergyProxy:
        """CPU seconds times an assumed power; not an energy (see :class:`EnergyProxy`)."""
        return EnergyProxy(self.cpu_seconds, self._watts)

    @property
    def tokens_per_second(self) -> float:
        """Tokens per wall second; 0 before the end."""
        return self.tokens / self.wall_seconds if self.wall_seconds else 0.0

    def __str__(self) -> str:
        return (
            f"{self.wall_seconds:.1f} s wall, {self.cpu_seconds:.1f} s CPU, "
            f"peak {self.peak_resident_mb:.0f} MB resident ({self.peak_private_mb:.0f} MB private) above the start, "
            f"{self.tokens} tokens, {self.energy_proxy}"
        )
