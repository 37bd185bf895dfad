"""How every row is measured: alternate, pair, and give the ratio an interval."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from pllm_helpers.evaluation import bootstrap_interval

Row = dict[str, object]


def status_mb(field: str) -> float:
    """``VmRSS`` (resident memory) or ``VmHWM`` (its peak) of this process.

    Not ``ru_maxrss``: a process inherits that from the one that started it.
    """
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"the system does not tell {field}")


def in_turn(ours: Callable[[], float], theirs: Callable[[], float], rounds: int) -> tuple[list[float], list[float]]:
    """Measure ours and theirs ``rounds`` times, A B B A A B …, after one round that does not count."""
    ours(), theirs()
    a, b = [], []
    for k in range(rounds):
        for side, kept in ((ours, a), (theirs, b)) if k % 2 == 0 else ((theirs, b), (ours, a)):
            kept.append(side())
    return a, b


def row(
    name: str, peer: str, ours: Sequence[float], theirs: Sequence[float], unit: str, *, version: str = "", more: bool
) -> Row:
    """One row of ``results.json``; ``more`` says whether more of ``unit`` is better. Ratio above 1: ours is better."""
    top, bottom = (ours, theirs) if more else (theirs, ours)
    ratio = bootstrap_interval(top, bottom, statistic=lambda a, b: a.mean() / b.mean())
    return {
        "name": name,
        "peer": peer,
        "peer_version": version or importlib.metadata.version(peer.split()[0]),
        "ours": round(float(np.mean(ours)), 4),
        "theirs": round(float(np.mean(theirs)), 4),
        "unit": unit,
        "ratio": round(ratio.value, 3),
        "ratio_low": round(ratio.low, 3),
        "ratio_high": round(ratio.high, 3),
        "n": len(ours),
    }
