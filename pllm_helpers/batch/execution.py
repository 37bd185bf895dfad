"""One notebook through papermill: own interpreter, time limit, memory, what widgets swallowed.

Papermill and nbclient do the work; the classes here add what they lack: a time limit for the whole
notebook, a kernel that surely is this Python, peak memory, and the errors that end up in a widget
instead of failing the cell.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty
from typing import Any

import nbformat
import papermill
import psutil
from jupyter_client.kernelspec import KernelSpec, KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient.exceptions import CellExecutionComplete, CellTimeoutError, DeadKernelError
from nbclient.util import ensure_async, run_sync
from nbformat import NotebookNode
from papermill.clientwrap import PapermillNotebookClient
from papermill.engines import Engine, NotebookExecutionManager, papermill_engines
from papermill.exceptions import PapermillExecutionError
from papermill.execute import remove_error_markers
from traitlets import default

from .series import Job

__all__ = ["Execution", "Watch", "execute", "ThisPython"]

ANSI = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
THREAD_VARIABLES = (
    "PLLM_THREADS",
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "NUMEXPR_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
    "RAYON_NUM_THREADS",
)
SAVE_EVERY = 10.0  # seconds between saves of a notebook that is still running


class _SpecManager(KernelSpecManager):
    """Knows one kernel: the Python that runs this, whatever kernels the user has installed."""

    def get_kernel_spec(self, kernel_name: str) -> KernelSpec:
        from ipykernel.kernelspec import get_kernel_dict

        return KernelSpec(resource_dir="", **get_kernel_dict())


class ThisPython(AsyncKernelManager):
    """Starts kernels of the Python that runs this."""

    @default("kernel_spec_manager")
    def _this_python(self) -> KernelSpecManager:
        return _SpecManager()


@dataclass
class Execution:
    """What came of one notebook.

    Attributes
    ----------
    status : ``"ok"``, ``"failed"`` or ``"timeout"``.
    seconds, peak_rss_mb : wall time with kernel start and stop; peak resident memory of the
        kernel and the processes it started, in MB of 10**6 bytes (shared pages count in full).
    notebook : the executed notebook, as far as it came.
    error : one line on what went wrong; ``traceback``: its traceback, plain text.
    """

    status: str
    seconds: float
    peak_rss_mb: float
    notebook: NotebookNode
    error: str = ""
    traceback: str = ""


@dataclass
class Watch:
    """The run's hold on a notebook while it executes: progress, memory, stopping it.

    ``on_progress(cell, cells, seconds, rss_mb)`` is called from time to time, from another thread.
    """

    deadline: float
    on_progress: Callable[[int, int, float, float], None] = lambda *_: None
    save_to: Path | None = None
    start: float = field(default_factory=time.monotonic)
    cell: int = 0
    cells: int = 0
    peak: float = 0.0
    rss: float = 0.0
    stopped: bool = False
    ready: bool = False
    problems: list[tuple[str, str]] = field(default_factory=list)  # (one line, traceback)
    manager: Any = None
    notebook: Any = None

    @property
    def left(self) -> float:
        return self.deadline - time.monotonic()

    @property
    def process(self) -> subprocess.Popen | None:
        return getattr(getattr(self.manager, "provisioner", None), "process", None)

    def sample(self) -> None:
        """Read the memory of the kernel and its children."""
        process = self.process
        if process is None:
            return
        with contextlib.suppress(psutil.Error, OSError):
            kernel = psutil.Process(process.pid)
            total = sum(_rss(p) for p in [kernel, *kernel.children(recursive=True)])
            self.rss = total / 1e6
            self.peak = max(self.peak, self.rss, _high_water(process.pid) / 1e6)

    def stop(self) -> None:
        """End the notebook: interrupt its cell, and kill the kernel if that does not help."""
        self.stopped = True
        process = self.process
        if process is None:
            return
        if self.ready and hasattr(os, "killpg"):
            with contextlib.suppress(OSError):
                os.killpg(process.pid, signal.SIGINT)
            timer = threading.Timer(3.0, self._kill, (process,))
            timer.daemon = True
            timer.start()
        else:
            self._kill(process)

    @staticmethod
    def _kill(process: subprocess.Popen) -> None:
        if process.poll() is not None:
            return
        with contextlib.suppress(OSError):
            if hasattr(os, "killpg"):
                os.killpg(process.pid, signal.SIGKILL)
            else:
                process.kill()

    @contextlib.contextmanager
    def sampling(self, every: float = 0.25) -> Iterator[None]:
        """Sample memory and report progress in the background."""
        done = threading.Event()

        def loop() -> None:
            while not done.wait(every):
                self.sample()
                self.on_progress(self.cell, self.cells, time.monotonic() - self.start, self.rss)

        thread = threading.Thread(target=loop, daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()


def _rss(process: psutil.Process) -> int:
    try:
        return process.memory_info().rss
    except psutil.Error:
        return 0


def _high_water(pid: int) -> int:
    """Peak resident bytes of ``pid`` as Linux keeps it; 0 elsewhere."""
    with contextlib.suppress(OSError, ValueError):
        status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8", errors="replace")
        if match := re.search(r"VmHWM:\s+(\d+) kB", status):
            return int(match[1]) * 1024
    return 0


class _Stopped(Exception):
    """The user stopped the run."""


class _Client(PapermillNotebookClient):
    """Keeps widget state out of the file, but looks into it for errors."""

    def __init__(self, nb_man: NotebookExecutionManager, watch: Watch, **kw: Any):
        super().__init__(nb_man, **kw)
        self.watch = watch

    def create_kernel_manager(self) -> Any:
        self.watch.manager = super().create_kernel_manager()
        return self.watch.manager

    async def async_start_new_kernel_client(self) -> Any:
        client = await super().async_start_new_kernel_client()
        self.watch.ready = True
        return client

    start_new_kernel_client = run_sync(async_start_new_kernel_client)

    def process_message(self, msg: dict[str, Any], cell: NotebookNode, cell_index: int) -> Any:
        hooked = self.output_hook_stack[msg["parent_header"].get("msg_id")]
        if msg["msg_type"] == "error" and hooked and not _raises(cell):
            self._found(msg["content"], f"swallowed by a widget in cell {cell_index + 1}")
        return super().process_message(msg, cell, cell_index)

    async def _async_poll_output_msg(self, parent_msg_id: str, cell: NotebookNode, cell_index: int) -> None:
        # as in nbclient, but messages of earlier cells (threads, callbacks) are looked at, not dropped
        while True:
            msg = await ensure_async(self.kc.iopub_channel.get_msg(timeout=None))
            if msg["parent_header"].get("msg_id") != parent_msg_id:
                self._late(msg)
                continue
            try:
                self.process_message(msg, cell, cell_index)
            except CellExecutionComplete:
                return

    def set_widgets_metadata(self) -> None:
        """Called when all cells are done: the last look at the kernel. Stores no widget state."""
        self.watch.sample()
        get = run_sync(self.kc.iopub_channel.get_msg)
        end = time.monotonic() + 5.0
        with contextlib.suppress(Empty):
            while time.monotonic() < end:
                self._late(get(timeout=0.3))
        for state in self.widget_state.values():
            if state.get("_model_name") == "OutputModel":
                text = "".join(o.get("text", "") for o in state.get("outputs", ()) if o.get("name") == "stderr")
                self._in_text(text, "printed inside a widget")

    def _late(self, msg: dict[str, Any]) -> None:
        content = msg.get("content", {})
        if msg["msg_type"] == "error":
            self._found(content, "raised in the background")
        elif msg["msg_type"] == "stream" and content.get("name") == "stderr":
            self._in_text(content.get("text", ""), "raised in the background")

    def _in_text(self, text: str, how: str) -> None:
        if found := traceback_in(text):
            self.watch.problems.append((f"{found.splitlines()[-1]} ({how})", found))

    def _found(self, content: dict[str, Any], how: str) -> None:
        line = f"{content.get('ename')}: {content.get('evalue')} ({how})"
        text = plain("\n".join(content.get("traceback", [])))
        if (line, text) not in self.watch.problems:
            self.watch.problems.append((line, text))


def _raises(cell: NotebookNode) -> bool:
    return "raises-exception" in cell.metadata.get("tags", [])


def plain(text: str) -> str:
    """``text`` without terminal colours."""
    return ANSI.sub("", text)


def traceback_in(text: str) -> str:
    """The last traceback printed in ``text``, up to its exception line; empty without one."""
    start = plain(text).rfind("Traceback (most recent call last):")
    if start < 0:
        return ""
    kept: list[str] = []
    for line in plain(text)[start:].splitlines():
        kept.append(line)
        if len(kept) > 1 and line and not line[0].isspace():
            break
    return "\n".join(kept)


class _Manager(NotebookExecutionManager):
    """Papermill's bookkeeping, with our progress, time limit and crash-safe saves."""

    def __init__(self, nb: NotebookNode, watch: Watch):
        super().__init__(nb, output_path=None, progress_bar=False, autosave_cell_every=0)
        self.watch = watch
        watch.notebook, watch.cells = nb, len(nb.cells)
        self.saved = 0.0

    def cell_start(self, cell: NotebookNode, cell_index: int | None = None, **kw: Any) -> None:
        super().cell_start(cell, cell_index, **kw)
        self.watch.cell = (cell_index or 0) + 1
        if self.watch.stopped:
            raise _Stopped

    def save(self, **kw: Any) -> None:
        if self.watch.save_to is not None and time.monotonic() - self.saved > SAVE_EVERY:
            write_notebook(self.nb, self.watch.save_to)
            self.saved = time.monotonic()


class _Engine(Engine):
    """Registered with papermill as ``pllm``."""

    @classmethod
    def execute_notebook(cls, nb: NotebookNode, kernel_name: str, watch: Watch, **kw: Any) -> NotebookNode:  # type: ignore[override]
        # papermill notes its input here, as a path or as the whole notebook once more
        nb.metadata.papermill["input_path"] = nb.metadata.papermill["output_path"] = kw["job_name"] + ".ipynb"
        manager = _Manager(nb, watch)
        manager.notebook_start()
        try:
            _Client(
                manager,
                watch,
                kernel_manager_class=ThisPython,
                kernel_name=kernel_name,
                timeout_func=lambda cell: max(watch.left, 0.001),
                startup_timeout=max(1, math.ceil(min(120.0, watch.left))),
                iopub_timeout=60,  # the default of 4 s fails a busy machine
                shutdown_kernel="immediate",
                store_widget_state=True,
                log=logging.getLogger("papermill"),
            ).execute(env=kw["env"], cwd=str(kw["workdir"]), stdout=kw["log"], stderr=kw["log"])
        finally:
            manager.notebook_complete()
        return manager.nb


papermill_engines.register("pllm", _Engine)


def execute(job: Job, watch: Watch, *, env: dict[str, str], cwd: Path) -> Execution:
    """Run ``job`` in a fresh kernel and report what came of it; its failures are not raised.

    Parameters
    ----------
    watch : limits and progress; :meth:`Watch.stop` ends the run early.
    env, cwd : environment and working folder of the kernel; ``cwd`` also takes its log.
    """
    status, error, trace = "ok", "", ""
    log_path = cwd / "kernel.log"
    with open(log_path, "w", encoding="utf-8") as log, _quiet_papermill(), watch.sampling():
        try:
            papermill.execute_notebook(
                job.notebook,
                None,
                parameters=dict(job.given),
                engine_name="pllm",
                kernel_name="python3",
                language="python",
                progress_bar=False,
                watch=watch,
                job_name=job.name,
                env=env,
                workdir=cwd,
                log=log,
            )
        except PapermillExecutionError:
            pass  # it also counts errors that a cell is tagged to raise: see _raised
        except CellTimeoutError:
            over = watch.left <= 0
            status = "timeout" if over else "failed"
            limit = watch.deadline - watch.start
            error = (
                f"stopped after {limit:.0f} s in cell {watch.cell}" if over else "the kernel's output did not arrive"
            )
        except DeadKernelError:
            status, error = "failed", f"the kernel died in cell {watch.cell} (out of memory?)"
        except _Stopped:
            status, error = "failed", "interrupted"
        except RuntimeError as e:  # nbclient: the kernel did not start
            over = watch.left <= 0
            status, error = ("timeout" if over else "failed"), f"the kernel did not start: {e}"
        except Exception as e:  # a bug here must not take the other notebooks with it
            status, error = "failed", f"{type(e).__name__}: {e}"
    notebook = watch.notebook if watch.notebook is not None else job.notebook
    notebook = remove_error_markers(notebook)
    if watch.stopped:
        status, error = "failed", "interrupted by the user"
    elif status == "ok":
        found = _raised(notebook) + _printed(notebook) + watch.problems + _unfinished(notebook)
        if found:
            status, (error, trace) = "failed", found[0]
    if error and not trace and not watch.stopped:
        trace = _tail(log_path)
    if status != "ok" and not _raised(notebook):
        _mark(notebook, watch.cell, status, error, trace)
    return Execution(status, time.monotonic() - watch.start, watch.peak, notebook, " ".join(error.split()), trace)


def _raised(notebook: NotebookNode) -> list[tuple[str, str]]:
    return [
        (f"{o.ename}: {o.evalue}", plain("\n".join(o.traceback)))
        for c in notebook.cells
        if c.cell_type == "code" and not _raises(c)
        for o in c.outputs
        if o.output_type == "error"
    ]


def _unfinished(notebook: NotebookNode) -> list[tuple[str, str]]:
    """A notebook may end itself without an error, by ``sys.exit(0)``: then it did not run."""
    for number, cell in enumerate(notebook.cells, 1):
        skipped = "skip-execution" in cell.metadata.get("tags", [])
        if cell.cell_type == "code" and cell.source.strip() and not skipped and cell.execution_count is None:
            return [(f"ended before cell {number}, which never ran", "")]
    return []


def _printed(notebook: NotebookNode) -> list[tuple[str, str]]:
    found = []
    for number, cell in enumerate(notebook.cells, 1):
        if cell.cell_type == "code" and not _raises(cell):
            text = "".join(o.text for o in cell.outputs if o.output_type == "stream" and o.name == "stderr")
            if trace := traceback_in(text):
                found.append((f"{trace.splitlines()[-1]} (printed in cell {number})", trace))
    return found


def _tail(path: Path) -> str:
    """End of the kernel's own log, without the line that every kernel start prints."""
    text = path.read_text(encoding="utf-8", errors="replace")
    return "\n".join(line for line in text.splitlines() if "without encryption" not in line).strip()[-4000:]


def _mark(notebook: NotebookNode, cell: int, status: str, error: str, trace: str) -> None:
    """Leave the reason in the executed notebook, where the run stopped."""
    code = [c for c in notebook.cells[: max(cell, 1)] if c.cell_type == "code"] or [
        c for c in notebook.cells if c.cell_type == "code"
    ]
    if code:
        lines = [*trace.splitlines(), f"{status}: {error}"]
        code[-1].outputs.append(nbformat.v4.new_output("error", ename=status, evalue=error, traceback=lines))


def write_notebook(notebook: NotebookNode, path: Path) -> None:
    """Save atomically: a reader sees the old file or the new one."""
    write_text(path, nbformat.writes(notebook))


def write_text(path: Path, text: str) -> None:
    """Save ``text`` as UTF-8, atomically."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(part, "w", encoding="utf-8", errors="replace") as file:
            file.write(text)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


@contextlib.contextmanager
def _quiet_papermill() -> Iterator[None]:
    """Its log repeats what we report, and its parameter warnings are false (we checked them)."""
    logger = logging.getLogger("papermill")
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        logger.setLevel(level)


def kernel_environment(threads: int, *, network_log: Path | None = None) -> dict[str, str]:
    """Environment of a kernel: thread caps, UTF-8, and with ``network_log`` no network."""
    env = dict(os.environ)
    env.update(dict.fromkeys(THREAD_VARIABLES, str(threads)))
    env["PYTHONUTF8"] = "1"
    env.setdefault("PLOTLY_RENDERER", "plotly_mimetype")
    env.pop("PYTHONSTARTUP", None)
    if network_log is not None:
        guard = str(Path(__file__).resolve().parent / "guard")
        env["PLLM_NETWORK_LOG"] = str(network_log)
        env["PYTHONPATH"] = os.pathsep.join([guard, *filter(None, [env.get("PYTHONPATH", "")])])
    return env
