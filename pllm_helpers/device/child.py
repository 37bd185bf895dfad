"""The other side of :class:`~.envelope.PhoneEnvelope`: what runs in the child process."""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import pickle
import signal
import sys
import threading
import time
import traceback
from dataclasses import replace
from typing import Any, BinaryIO

from ..tuning.memory import memory_mb
from .meter import _LISTENERS, high_water_mb, mark_phase


class Wire:
    """Frames to the parent (a letter, eight bytes of length, the content) and single bytes from it.

    The pipes take over standard input and output; what the function prints goes to standard error,
    which the parent keeps in a file.
    """

    def __init__(self) -> None:
        self._out: BinaryIO = os.fdopen(os.dup(1), "wb", buffering=0)
        self._in: BinaryIO = os.fdopen(os.dup(0), "rb", buffering=0)
        os.dup2(2, 1)
        nothing = os.open(os.devnull, os.O_RDONLY)
        os.dup2(nothing, 0)
        os.close(nothing)
        self._lock, self._go = threading.Lock(), threading.Event()

    def send(self, kind: bytes, content: Any) -> None:
        body = pickle.dumps(content)
        with self._lock:
            write_all(self._out, kind + len(body).to_bytes(8, "little"))
            write_all(self._out, body)

    def read(self) -> bytes:
        return read_exactly(self._in, int.from_bytes(read_exactly(self._in, 8), "little"))

    def listen(self) -> None:
        """From now on every byte is a "go"; the end of the pipe means that the parent is gone, and so are we."""

        def wait() -> None:
            while self._in.read(1):
                self._go.set()
            os._exit(1)

        threading.Thread(target=wait, daemon=True).start()

    def wait(self) -> None:
        self._go.wait()
        self._go.clear()


def write_all(pipe: BinaryIO, data: bytes) -> None:
    """Write all of ``data``; one ``write`` to a pipe may take a part."""
    view = memoryview(data)
    while view:
        view = view[pipe.write(view) :]


def read_exactly(pipe: BinaryIO, count: int) -> bytes:
    """``count`` bytes; raises EOFError if the pipe ends before."""
    parts = bytearray()
    while len(parts) < count:
        part = pipe.read(min(count - len(parts), 1 << 20))
        if not part:
            raise EOFError
        parts += part
    return bytes(parts)


def die_with(parent: int) -> None:
    """Ask Linux to kill this process when its parent dies, however the parent dies."""
    if sys.platform.startswith("linux"):
        import ctypes

        pdeathsig = 1  # PR_SET_PDEATHSIG
        ctypes.CDLL(None, use_errno=True).prctl(pdeathsig, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it died before the request
        os._exit(1)


class TooLarge(Exception):
    """More bytes than were allowed."""


class Bounded(io.BytesIO):
    """Memory for at most ``most`` bytes."""

    def __init__(self, most: float):
        super().__init__()
        self.most = most

    def write(self, data: Any) -> int:
        if self.tell() + memoryview(data).nbytes > self.most:
            raise TooLarge
        return super().write(data)


def packed_value(value: Any, most_mb: float) -> tuple[bytes, str]:
    """The value as bytes, and what of it was left out."""
    import cloudpickle

    from ..tuning import TuningResult

    left_out = ""
    if isinstance(value, TuningResult) and sum(t.nbytes for t in value.weights.values()) > most_mb * 2**20:
        value, left_out = replace(value, weights={}), "; the tuned weights stayed in the child"
    file = Bounded(most_mb * 2**20)
    try:
        cloudpickle.dump(value, file)
    except TooLarge:
        return pickle.dumps(None), f"; its value of more than {most_mb:g} MB was not sent back: return less"
    return file.getvalue(), left_out


def main(parent: int) -> None:
    """Import, report ready, wait for the word, run, report, and wait for the end, which the parent sets."""
    die_with(parent)
    wire = Wire()
    cpu = time.process_time()
    settings, payload = pickle.loads(wire.read()), wire.read()
    wire.listen()
    try:
        for name in settings["preload"]:
            importlib.import_module(name)
        if settings["threads"]:
            import torch

            torch.set_num_threads(settings["threads"])
        import gc

        import cloudpickle  # noqa: F401  (before the baseline)

        gc.collect()
        with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w", encoding="ascii") as f:
            f.write("5")  # the high-water mark starts again at what is resident now
        wire.send(b"R", None)
        wire.wait()
        _LISTENERS.append(lambda name: wire.send(b"P", (name or "run", memory_mb())))
        cpu = time.process_time()
        with mark_phase("load"):
            function, args, kwargs = pickle.loads(payload)
            del payload
        value = function(*args, **kwargs)
        _LISTENERS.clear()
        wire.send(b"F", (high_water_mb(), time.process_time() - cpu))
        wire.wait()  # the parent stops counting: packing the value takes memory, too
        last = b"V", packed_value(value, settings["value_mb"])
    except BaseException as e:  # whatever it was, the parent says it
        _LISTENERS.clear()
        traceback.print_exc()
        last = b"E", (time.process_time() - cpu, f"{type(e).__name__}: {e}")
    sys.stdout.flush()
    sys.stderr.flush()
    wire.send(*last)
    while True:  # nothing to tidy up: the parent kills this process and what it has started
        wire.wait()
