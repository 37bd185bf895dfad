"""Functions that the tests of envelopes run in a child process."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time

from pllm_helpers.device import mark_phase


def grow(mb: int, step: int = 8, pause: float = 0.01) -> int:
    """Take ``mb`` megabytes bit by bit and touch every page."""
    held = []
    with mark_phase("grow"):
        for _ in range(mb // step):
            held.append(b"x" * (step << 20))
            time.sleep(pause)
    return len(held)


def spike(mb: int) -> str:
    """Take ``mb`` megabytes for an instant."""
    size = len(b"x" * (mb << 20))
    return f"had {size >> 20}"


def grow_and_start_another(mb: int, file: str) -> int:
    """Start a process that sleeps, write its number to ``file``, then grow."""
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    with open(file, "w", encoding="utf-8") as f:
        f.write(str(other.pid))
    return grow(mb)


def write_number_and_wait(file: str, seconds: float = 600) -> None:
    """Write this process's number to ``file`` and sleep."""
    beside = file + ".part"
    with open(beside, "w", encoding="utf-8") as f:
        f.write(str(os.getpid()))
    os.replace(beside, file)
    time.sleep(seconds)


def refuse(word: str) -> None:
    """Print something and raise an error."""
    print("about to refuse")
    raise ValueError(f"no {word} today")


def vanish(code: int) -> None:
    """End the process without a word."""
    os._exit(code)


def big_value(mb: int) -> bytes:
    """Return ``mb`` megabytes."""
    return b"x" * (mb << 20)


def has_gone(pid: int, seconds: float = 20) -> bool:
    """Whether a process ends (or is a zombie that nobody waits for) within some seconds."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as f:
                if f.read().rsplit(")", 1)[1].split()[0] == "Z":
                    return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.02)
    return False


def children() -> set[int]:
    """Processes whose parent this one is, zombies included."""
    found = set()
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError), open(f"/proc/{name}/stat", encoding="ascii", errors="replace") as f:
            if int(f.read().rsplit(")", 1)[1].split()[1]) == os.getpid():
                found.add(int(name))
    return found
