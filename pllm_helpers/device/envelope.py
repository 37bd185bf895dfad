"""A phone's memory limit around a function: it runs in a child process, which is killed when it takes too much.

What a phone's low-memory killer counts
    Android's ``lmkd`` ranks processes by ``oom_score_adj`` and reads their size from the second
    field of ``/proc/PID/statm``: *all* resident pages, clean file pages included (``proc_get_size``
    in AOSP's ``lmkd.cpp``; https://source.android.com/docs/core/perf/lmkd). It acts on memory pressure
    of the whole system, not on a limit per app, so a fixed limit is a simplification, stated here once.
    iOS gives every app a limit on its *footprint*: dirty and compressed pages; clean memory-mapped
    file pages are free (WWDC 2018, session 416).

``counts="resident"`` is Android's number (``VmRSS``), ``counts="private"`` the nearest that Linux
has to the iOS footprint: resident pages that no file backs. They differ for frozen memory-mapped
weights, which only the first counts.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from typing import Any, Literal

from ..models import LLM, load_llm
from ..models.weights import BUNDLED_LLM
from ..runtime import InputError
from ..tuning.adapters import fingerprint
from ..tuning.memory import memory_mb
from .child import read_exactly, write_all
from .meter import PHONE_WATTS, EnergyProxy, Phase, Sample, Timeline, high_water_mb, phases

__all__ = ["PRELOAD", "EnvelopeResult", "PhoneEnvelope", "size_mb"]

Number = float | int

# Modules that tuning functions import only when they run; imported before the baseline is taken.
PRELOAD = (
    "accelerate",
    "peft",
    "safetensors.torch",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.llama.modeling_llama",
    "pllm_helpers.models",
    "pllm_helpers.tuning",
)
BY_VALUE_MB = 64  # a model that no folder holds is sent with its weights up to this size


@dataclass(frozen=True)
class EnvelopeResult:
    """What became of a function in a :class:`PhoneEnvelope`. Memory in MB (2**20 bytes) above the baseline.

    Attributes
    ----------
    status : ``"finished"``; ``"killed"``: by SIGKILL, for its memory; ``"failed"``: it raised an
        exception, ended its process, or ran out of time.
    signal : number of the signal that ended the child (9 for SIGKILL), else ``None``.
    peak_mb : largest memory of the kind that the envelope counts.
    timeline : list of :class:`~pllm_helpers.device.Sample`, of a killed child too.
    value : what the function returned; ``None`` unless finished.
    message : one sentence that says how it ended; of a failure, the exception's message.
    baseline_mb : resident and private memory of the child at the baseline.
    seconds, cpu_seconds : from the baseline to the end.
    startup_seconds : from the start of the child to the baseline (imports).
    output : what the function printed, and the traceback of an exception; the last 20,000 characters.
    """

    status: Literal["finished", "killed", "failed"]
    signal: int | None
    peak_mb: float
    timeline: list[Sample] = field(repr=False)
    value: Any = field(repr=False)
    message: str
    limit_mb: float
    counts: str
    baseline_mb: tuple[float, float]
    seconds: float
    cpu_seconds: float
    startup_seconds: float
    output: str = field(repr=False)

    @property
    def phases(self) -> list[Phase]:
        """Seconds and peak memory per phase."""
        return phases(self.timeline)

    @property
    def energy_proxy(self) -> EnergyProxy:
        """CPU seconds times an assumed power; not an energy."""
        return EnergyProxy(self.cpu_seconds, PHONE_WATTS)

    def __str__(self) -> str:
        return f"{self.status}: {self.message}"


@dataclass(frozen=True)
class PhoneEnvelope:
    """Run functions in a child process that is killed when its memory passes a limit.

    Parameters
    ----------
    limit_mb : megabytes (2**20 bytes) above the baseline.
    above : ``"imports"``: the baseline is the child's memory after imports and before any weights;
        ``"nothing"``: all memory of the child counts, as on a phone, Python and torch included.
    counts : ``"resident"`` or ``"private"``, see the module's text.
    grace : seconds for which memory may stay above the limit. With 0 a spike of any length kills.
    interval : seconds between two looks.
    timeout : seconds after the baseline until the child is stopped; ``None``: never.
    preload : modules imported before the baseline, beside those of the function itself.
    value_mb : a larger value is not sent back (a tuned model's weights, say; give the tuner ``out`` to keep
        those). Of a :class:`~pllm_helpers.tuning.TuningResult` all but its ``weights`` comes back in any case.
    returns_freed : the child's allocator (glibc) gives freed blocks of 128 KB and more back to the system
        at once, so that its memory is what is in use. ``False``: it keeps some, as glibc otherwise does,
        which adds 10 to 40 % to a training step's peak and makes it a little faster.
    on_sample : called with a :class:`~pllm_helpers.device.Sample` some ten times a second, for a live display.
    name : what the envelope stands for, for titles.

    Notes
    -----
    Resident memory is judged by the kernel's high-water mark of the child, read at every look and
    once more when the function has returned: a spike between two looks is seen at the next one, and
    a function that passed the limit and returned is killed before its value is taken. Private memory
    has no such mark; spikes shorter than ``interval`` may pass. Processes that the child starts are
    killed with it, or when it is done, but their memory is not counted.

    The child dies with its parent, whether that ends, is interrupted (Ctrl-C) or is killed itself.
    """

    limit_mb: Number
    _: KW_ONLY
    above: str = "imports"
    counts: str = "resident"
    grace: Number = 0.0
    interval: Number = 0.002
    timeout: Number | None = None
    preload: Sequence[str] = PRELOAD
    value_mb: Number = 64
    returns_freed: bool = True
    on_sample: Callable[[Sample], None] | None = None
    name: str = ""

    def __post_init__(self) -> None:
        for what, value, low in (
            ("limit_mb", self.limit_mb, 1),
            ("grace", self.grace, 0),
            ("interval", self.interval, 1e-4),
            ("value_mb", self.value_mb, 0),
            ("timeout", 1 if self.timeout is None else self.timeout, 1e-3),
        ):
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value < 1e9:
                raise InputError(what, f"expected a number of at least {low}, got {value!r}")
        if self.above not in ("imports", "nothing"):
            raise InputError("above", f"expected 'imports' or 'nothing', got {self.above!r}")
        if self.counts not in ("resident", "private"):
            raise InputError("counts", f"expected 'resident' or 'private', got {self.counts!r}")
        if isinstance(self.preload, str):
            raise InputError("preload", f"expected a list of modules, got {self.preload!r}", "Write [module].")

    def run(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> EnvelopeResult:
        """Call ``function(*args, **kwargs)`` in a child and say what became of it.

        Functions and classes defined in a notebook are sent whole (cloudpickle); others are
        imported by the child. An LLM among the arguments is not sent: the child loads it from its
        folder after the baseline, so that its weights count. An LLM that no folder holds is sent
        with its weights if they are small.

        Raises :class:`~pllm_helpers.runtime.InputError` if the limit is below the size of an LLM
        among the arguments, and if something cannot be sent. Exceptions of the function do not
        raise here: they come back as status ``"failed"`` with their message.
        """
        if not callable(function):
            raise InputError("function", f"expected something to call, got {type(function).__name__}")
        payload, models_mb = packed(function, args, kwargs)
        if self.counts == "resident" and models_mb >= self.limit_mb:
            raise InputError(
                "limit_mb",
                f"expected more than the {models_mb:.0f} MB of the model's weights, got {self.limit_mb:g}",
                "Raise limit_mb, load the model as bf16 or quantised, or take a smaller one.",
            )
        return _Run(self).drive(function, payload)


class _Run:
    """One child from start to end."""

    def __init__(self, envelope: PhoneEnvelope):
        self.envelope = envelope
        self.line, self.phase, self.peak = Timeline(), "", 0.0
        self.base, self.high, self.over_since = (0.0, 0.0), 0.0, None
        self.ready = self.finished = 0.0  # when
        self.frames: queue.SimpleQueue[tuple[bytes, Any]] = queue.SimpleQueue()
        self.cpu_seconds, self.shown = 0.0, 0.0
        self.answered = False  # the child has said its last word

    def drive(self, function: Callable[..., Any], payload: bytes) -> EnvelopeResult:
        started = time.perf_counter()
        with tempfile.TemporaryFile() as printed:
            child = subprocess.Popen(
                [
                    sys.executable,
                    "-u",
                    "-c",
                    _START,
                    json.dumps([p for p in sys.path if isinstance(p, str)]),
                    str(os.getpid()),
                ],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=printed,
                env=self._environment(),
                start_new_session=True,
            )
            try:
                with contextlib.suppress(BrokenPipeError):
                    for part in (pickle.dumps(self._settings(function)), payload):
                        write_all(child.stdin, len(part).to_bytes(8, "little"))
                        write_all(child.stdin, part)
                    child.stdin.flush()
                del payload
                threading.Thread(target=self._receive, args=(child.stdout,), daemon=True).start()
                status, value, message = self._watch(child)
            finally:
                self._end(child)
            self.line.flush()
            now = time.perf_counter()
            code = child.returncode
            if status == "gone":
                status, message = self._unexplained(code)
            return EnvelopeResult(
                status=status,
                signal=-code if code < 0 and not self.answered else None,
                peak_mb=self.peak,
                timeline=self.line.samples,
                value=value,
                message=message,
                limit_mb=float(self.envelope.limit_mb),
                counts=self.envelope.counts,
                baseline_mb=self.base,
                seconds=(self.finished or now) - self.ready if self.ready else 0.0,
                cpu_seconds=self.cpu_seconds,
                startup_seconds=(self.ready or now) - started,
                output=_tail(printed),
            )

    def _environment(self) -> dict[str, str]:
        """As here; the variable holds glibc's own first threshold, and holding it keeps it from growing."""
        extra = {"MALLOC_MMAP_THRESHOLD_": str(128 << 10)} if self.envelope.returns_freed else {}
        return {**os.environ, **extra}

    def _settings(self, function: Callable[..., Any]) -> dict[str, Any]:
        own = getattr(function, "__module__", None)
        torch = sys.modules.get("torch")
        return {
            "preload": [*self.envelope.preload, *([own] if own and own != "__main__" else [])],
            "value_mb": self.envelope.value_mb,
            "threads": torch.get_num_threads() if torch is not None else None,
        }

    def _receive(self, pipe: Any) -> None:
        """Frames of the child, until it ends."""
        try:
            while True:
                kind, size = read_exactly(pipe, 1), int.from_bytes(read_exactly(pipe, 8), "little")
                self.frames.put((kind, pickle.loads(read_exactly(pipe, size))))
        except (EOFError, OSError, ValueError):
            self.frames.put((b"", None))

    def _watch(self, child: Any) -> tuple[Any, Any, str]:
        envelope = self.envelope
        while True:
            counting = self.ready and not self.finished
            with contextlib.suppress(queue.Empty):
                kind, content = self.frames.get(timeout=envelope.interval if counting else 0.02)
                if kind == b"R":
                    self._baseline(child.pid)
                    _go(child)
                elif kind == b"P":
                    self._take(content[1])  # the child's own reading ends a phase
                    self.phase = content[0]
                elif kind == b"F":
                    high, self.cpu_seconds = content
                    self._look(child.pid)
                    if envelope.counts == "resident" and not envelope.grace and high > self.high:
                        self.peak = max(self.peak, high - self.base[0])
                    self.finished = time.perf_counter()
                    if self._over():
                        return self._kill(child)
                    _go(child)
                elif kind == b"V":
                    self.answered, (value, left_out) = True, content
                    try:
                        return "finished", pickle.loads(value), self._summary() + left_out
                    except Exception as e:
                        return "failed", None, f"its value cannot be taken over: {type(e).__name__}: {e}"
                elif kind == b"E":
                    self.answered, self.finished = True, self.finished or time.perf_counter()
                    self.cpu_seconds, message = content
                    return "failed", None, message
                elif kind == b"":
                    return "gone", None, ""
            if self.ready and not self.finished:
                self._look(child.pid)
                if self._over():
                    return self._kill(child)
                if envelope.timeout is not None and time.perf_counter() - self.ready > envelope.timeout:
                    self._measure_cpu(child.pid)
                    return "failed", None, f"stopped after {envelope.timeout:g} seconds (timeout)"

    def _baseline(self, pid: int) -> None:
        now, self.ready = memory_mb(pid), time.perf_counter()
        self.base = now if self.envelope.above == "imports" else (0.0, 0.0)
        self.high, self.phase = max(high_water_mb(pid), now[0]), "start"

    def _look(self, pid: int) -> None:
        """Read the child's memory and put it into the timeline."""
        import psutil

        with contextlib.suppress(psutil.Error):
            self._take(memory_mb(pid))
            if self.envelope.counts == "resident" and (high := high_water_mb(pid)) > self.high:
                self.peak = max(self.peak, high - self.base[0])

    def _take(self, memory: tuple[float, float]) -> None:
        resident, private = (now - base for now, base in zip(memory, self.base, strict=True))
        sample = Sample(time.perf_counter() - self.ready, resident, private, self.phase)
        if memory[0] > 0:  # a process that has just ended shows zeros
            self.line.add(sample)
            self.peak = max(self.peak, self._counted(sample))
            if self.envelope.on_sample is not None and sample.seconds - self.shown > 0.1:
                self.shown = sample.seconds
                self.envelope.on_sample(sample)
            if self._counted(sample) <= self.envelope.limit_mb:
                self.over_since = None
            elif self.over_since is None:
                self.over_since = sample.seconds

    def _counted(self, sample: Sample) -> float:
        return sample.resident_mb if self.envelope.counts == "resident" else sample.private_mb

    def _over(self) -> bool:
        """Whether it is time to kill."""
        if not self.envelope.grace:
            return self.peak > self.envelope.limit_mb
        since = self.over_since
        return since is not None and time.perf_counter() - self.ready - since >= self.envelope.grace

    def _kill(self, child: Any) -> tuple[Any, Any, str]:
        self._measure_cpu(child.pid)
        after = time.perf_counter() - self.ready
        _kill_group(child)
        where = f" in phase '{self.phase}'" if self.phase else ""
        text = (
            f"killed{where} {after:.1f} s after the baseline, at {self.peak:.0f} MB {self.envelope.counts} above it; "
            f"the limit is {self.envelope.limit_mb:g} MB"
        )
        if self.phase in ("start", "load"):
            text += (
                ". The model itself does not fit: raise limit_mb, load it as bf16 or quantised, or take a smaller one"
            )
        return "killed", None, text

    def _measure_cpu(self, pid: int) -> None:
        import psutil

        with contextlib.suppress(psutil.Error):
            times = psutil.Process(pid).cpu_times()
            self.cpu_seconds = times.user + times.system

    def _summary(self) -> str:
        return (
            f"finished in {self.finished - self.ready:.1f} s with a peak of {self.peak:.0f} MB {self.envelope.counts} "
            f"above the baseline; the limit is {self.envelope.limit_mb:g} MB"
        )

    def _end(self, child: Any) -> None:
        """The child and what it started are gone when this returns, whatever happened.

        A child that has answered waits for this, so that its group's number is still its own.
        """
        _kill_group(child)
        child.wait()
        for pipe in (child.stdin, child.stdout):
            with contextlib.suppress(OSError):
                pipe.close()

    def _unexplained(self, code: int) -> tuple[str, str]:
        if code == -signal.SIGKILL:
            return "killed", "killed by somebody else, most likely by the system for want of memory"
        how = f"signal {-code} ({signal.Signals(-code).name})" if code < 0 else f"exit code {code}"
        return "failed", f"the child process ended without a result, with {how}; see output"


_START = (
    "import sys, json; sys.path[:] = json.loads(sys.argv[1]); "
    "from pllm_helpers.device.child import main; main(int(sys.argv[2]))"
)


def _go(child: Any) -> None:
    with contextlib.suppress(BrokenPipeError):
        child.stdin.write(b"g")
        child.stdin.flush()


def _kill_group(child: Any) -> None:
    """SIGKILL for the child and what it started."""
    if child.poll() is None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(child.pid, signal.SIGKILL)


def _tail(file: Any, most: int = 20_000) -> str:
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - most))
    return file.read().decode("utf-8", "replace")


# --------------------------------------------------------------------------- sending a function


def packed(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[bytes, float]:
    """The call as bytes, and the megabytes of the LLMs that it will load."""
    import cloudpickle

    sizes: dict[int, float] = {}

    class Pickler(cloudpickle.Pickler):
        def reducer_override(self, obj: Any) -> Any:
            if isinstance(obj, LLM):
                sizes[id(obj)] = size_mb(obj)
                return _sent(obj, sizes[id(obj)])
            return super().reducer_override(obj)

    buffer = io.BytesIO()
    try:
        Pickler(buffer).dump((function, args, kwargs))
    except InputError:
        raise
    except Exception as e:
        raise InputError(
            "function",
            f"expected a function and arguments that can be sent to another process, got: {type(e).__name__}: {e}",
            "Open files, locks and models inside the function.",
        ) from e
    return buffer.getvalue(), sum(sizes.values(), 0.0)


def size_mb(llm: LLM) -> float:
    """Megabytes (2**20 bytes) of an LLM's weights, with the scales of quantised ones; tied ones count once."""
    return sum(t.nbytes for t in llm.model.parameters()) / 2**20


def _sent(llm: LLM, mb: float) -> Any:
    """How an LLM travels: as the name of its folder, or, if it has none and is small, whole."""
    if llm.folder is None:
        if mb > BY_VALUE_MB:
            raise InputError(
                "llm",
                f"expected a model that load_llm loaded, got one of {mb:.0f} MB that no folder holds",
                "Build or load it inside the function.",
            )
        return _whole_llm, (llm.model, llm.tokenizer, llm.name, llm.dtype, llm.kind)
    if llm.name != BUNDLED_LLM and (llm.folder / f"{llm.dtype}.safetensors").is_file():
        raise InputError(
            "llm", "expected the bundled model or a folder, got a .gguf file", "Load it inside the function."
        )
    source = None if llm.name == BUNDLED_LLM else str(llm.folder)
    attention = llm.model.config._attn_implementation
    return _loaded_llm, (source, llm.name, llm.dtype, attention, fingerprint(llm.model))


def _whole_llm(model: Any, tokenizer: Any, name: str, dtype: str, kind: Any) -> LLM:
    return LLM(model, tokenizer, name, dtype, kind)


def _loaded_llm(source: str | None, name: str, dtype: str, attention: str, mark: str) -> LLM:
    llm = load_llm(source, dtype=dtype, attention=attention)
    if fingerprint(llm.model) != mark:
        raise InputError(
            "llm",
            f"expected the weights that {name} has on disk, got changed ones",
            "An envelope loads the model anew: change it inside the function.",
        )
    return replace(llm, name=name)
