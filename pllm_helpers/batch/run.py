"""``run_series``: execute the notebooks, one after the other, and keep what came of them.

The folder of a run is complete and readable after every notebook: what is there was written
atomically, and ``results.json`` says how far the run came.
"""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import json
import os
import platform
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..runtime import InputError, processor_name, thread_count

__all__ = ["RunReport", "run_series"]

TOOL = "pllm run"
VERSIONS = ("torch", "transformers", "sentence-transformers", "peft", "numpy", "papermill", "ipykernel", "plotly")
CLAIM_KEYS = ("notebook", "claim", "kind", "verdict", "value", "low", "high", "paper")
RESULT_KEYS = ("notebook", "name", "value", "low", "high", "unit", "n", "seeds")
STATUS_KEYS = ("name", "status", "seconds", "peak_rss_mb")
SHOWN_TRACEBACK = 25  # lines


@dataclass(frozen=True)
class RunReport:
    """What came of a run.

    Attributes
    ----------
    exit_code : 0 if every notebook ran and every deterministic claim holds, else 1.
    out : the folder with ``notebooks``, ``html``, ``index.html`` and ``results.json``.
    results : the content of ``results.json``.
    """

    exit_code: int
    out: Path
    results: dict[str, Any]


def run_series(
    notebooks: Sequence[str | int] | None = None,
    *,
    profile: str = "quick",
    parameters: Mapping[str, Any] | None = None,
    out: str | Path = "runs/latest",
    timeout: float | int | None = None,
    threads: int | None = None,
    network: bool = True,
    folder: str | Path | None = None,
    quiet: bool = False,
) -> RunReport:
    """Execute notebooks in fresh kernels and write notebooks, HTML, claims and results to ``out``.

    Everything is checked before anything runs. A notebook that fails or runs out of time does not
    stop the others. Ctrl-C stops the run and leaves what was finished. Kernels work in a scratch
    folder that is gone afterwards; the source notebooks are only read.

    Parameters
    ----------
    notebooks : numbers or names; all where not given.
    profile : ``"quick"``, ``"standard"`` or ``"full"``: the parameters in ``profiles.yaml``.
    parameters : ``{"name": value}`` for every notebook that has it, ``{"notebook:name": value}`` for one.
    out : folder of the run; what an earlier run left there is removed.
    timeout : seconds per notebook, kernel start included; ``profiles.yaml`` says where not given.
    threads : CPU threads per kernel; all cores, or ``PLLM_THREADS``, where not given.
    network : False refuses and logs every connection off this machine, and fails the notebook.
    folder : where the notebooks are; the series where not given.
    quiet : print one line per notebook only.

    Raises
    ------
    InputError : bad input, before anything ran or was written.
    KeyboardInterrupt : Ctrl-C, after the results so far were written.
    """
    from .series import notebooks_dir, plan

    source = Path(folder) if folder is not None else notebooks_dir()
    names = [str(n) for n in notebooks or ()]
    jobs = plan(source, names, profile=profile, parameters=parameters, timeout=timeout)
    if threads is not None and threads < 1:
        raise InputError("threads", f"expected a whole number of at least 1, got {threads}")
    count = threads or thread_count()
    out = Path(out).absolute()
    _check_out(out, source.resolve())
    with _only_run(out):
        run = _Run(jobs, profile, out, count, network, source, _Progress(len(jobs), quiet))
        return run.go()


def _check_out(out: Path, source: Path) -> None:
    """Refuse a folder in which removing an earlier run could remove something else."""
    where = out.resolve()
    if (where / "notebooks").resolve() in (source, *source.parents) or source in (where, *where.parents):
        raise InputError("out", f"expected a folder apart from the notebooks, got {str(out)!r}", "Use --out FOLDER.")
    if out.exists() and not out.is_dir():
        raise InputError("out", f"expected a folder, got the file {str(out)!r}")
    try:
        taken = out.is_dir() and any(p.name != ".lock" for p in out.iterdir())
        if taken and not _is_run(out / "results.json"):
            expected = f"expected a new folder or one of an earlier run, but {str(out)!r} holds something else"
            raise InputError("out", expected, "Use --out with another folder.")
        out.mkdir(parents=True, exist_ok=True)
        probe = out / f".write-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as problem:
        raise InputError("out", f"expected a folder that can be written, got {problem}") from None


def _is_run(path: Path) -> bool:
    try:
        return json.loads(path.read_text(encoding="utf-8"))["run"]["tool"] == TOOL
    except (OSError, ValueError, KeyError, TypeError):
        return False


@contextlib.contextmanager
def _only_run(out: Path) -> Iterator[None]:
    from filelock import FileLock, Timeout

    lock = FileLock(out / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        expected = f"expected a folder that no other run is writing to, got {str(out)!r}"
        raise InputError("out", expected, "Wait for it, or use --out with another folder.") from None
    try:
        yield
    finally:
        lock.release()


@dataclass
class _Run:
    jobs: list[Any]
    profile: str
    out: Path
    threads: int
    network: bool
    source: Path
    progress: _Progress
    rows: list[dict[str, Any]] = field(default_factory=list)
    claims: list[dict[str, Any]] = field(default_factory=list)
    results: list[dict[str, Any]] = field(default_factory=list)
    attempts: list[dict[str, Any]] = field(default_factory=list)
    interrupted: str | None = None
    started: float = field(default_factory=time.monotonic)
    watch: Any = None
    stop_signal: int | None = None

    def go(self) -> RunReport:
        self.facts = _facts(self.jobs, self.profile, self.threads, self.network)
        self._write(complete=False)
        for name in ("notebooks", "html", "work"):
            shutil.rmtree(self.out / name, ignore_errors=True)
            (self.out / name).mkdir()
        with self._signals():
            for number, job in enumerate(self.jobs, 1):
                if self.stop_signal is None:
                    self._one(number, job)
            stopped = self.stop_signal is not None
            shutil.rmtree(self.out / "work", ignore_errors=True)
            report = self._write(complete=not stopped)
        self.progress.finish(report, stopped)
        if self.stop_signal == signal.SIGINT:
            raise KeyboardInterrupt
        if stopped:
            raise SystemExit(128 + int(self.stop_signal or 0))
        return report

    def _one(self, number: int, job: Any) -> None:
        from .claims import collect
        from .execution import Watch, execute, kernel_environment, write_notebook, write_text
        from .report import notebook_page

        work = self.out / "work" / job.name
        work.mkdir()
        log = None if self.network else work / "network.log"
        path = self.out / "notebooks" / f"{job.name}.ipynb"
        self.watch = Watch(
            time.monotonic() + job.timeout,
            on_progress=lambda *now: self.progress.tick(number, job.name, *now),
            save_to=path,
        )
        if self.stop_signal is not None:
            return
        self.progress.begin(number, job.name)
        done = execute(job, self.watch, env=kernel_environment(self.threads, network_log=log), cwd=work)
        stopped, self.watch = self.watch.stopped, None
        attempts = _read_attempts(log)
        if attempts:
            self.attempts += [{"notebook": job.name, **a} for a in attempts]
            first = attempts[0]
            refused = f"tried to use the network: {first['event']} to {first['host']} at {first['where']}"
            done.error = f"{refused} ({done.error})" if done.error else refused
            done.status = "failed" if done.status == "ok" else done.status
        if stopped:
            self.interrupted = job.name
        claims, results = collect(job.name, done.notebook.cells)
        self.claims += claims
        self.results += results
        write_notebook(done.notebook, path)
        page = notebook_page(done.notebook, title=job.title, folder=self.source, error=done.error)
        write_text(self.out / "html" / f"{job.name}.html", page)
        row = {
            "name": job.name,
            "status": done.status,
            "seconds": round(done.seconds, 2),
            "peak_rss_mb": round(done.peak_rss_mb, 1),
            "error": done.error,
        }
        self.rows.append(row)
        self._write(complete=False)
        self.progress.end(number, row, done.traceback)

    @property
    def exit_code(self) -> int:
        held = all(c["verdict"] == "holds" for c in self.claims if c["kind"] == "deterministic")
        ran = len(self.rows) == len(self.jobs) and all(row["status"] == "ok" for row in self.rows)
        return 0 if held and ran else 1

    def _write(self, *, complete: bool) -> RunReport:
        from .execution import write_text
        from .report import index_page

        done = {row["name"] for row in self.rows}
        run = {
            **self.facts,
            "finished": _now() if complete else None,
            "seconds": round(time.monotonic() - self.started, 2),
            "complete": complete,
            "exit_code": self.exit_code if complete else 128 + self.stop_signal if self.stop_signal else None,
            "interrupted": (self.interrupted or "between notebooks") if self.stop_signal else None,
            "not_run": [job.name for job in self.jobs if job.name not in done],
            "errors": {row["name"]: row["error"] for row in self.rows if row["error"]},
            "network_attempts": self.attempts,
        }
        content = {
            "run": run,
            "notebooks": [{key: row[key] for key in STATUS_KEYS} for row in self.rows],
            "results": [{key: row[key] for key in RESULT_KEYS} for row in self.results],
            "claims": [{key: row[key] for key in CLAIM_KEYS} for row in self.claims],
        }
        write_text(self.out / "results.json", json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
        rows = {row["name"]: row for row in self.rows}
        missing = {"status": "", "seconds": 0.0, "peak_rss_mb": 0.0, "error": ""}
        shown = [
            {"name": job.name, "title": job.title, "parameters": job.values, **rows.get(job.name, missing)}
            for job in self.jobs
        ]
        write_text(self.out / "index.html", index_page(run, shown, self.claims, self.results))
        return RunReport(self.exit_code, self.out, content)

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """First Ctrl-C (or SIGTERM): stop the kernel, keep the results. Second: stop at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def stop(number: int, _frame: Any) -> None:
            if self.stop_signal is not None:
                raise KeyboardInterrupt
            self.stop_signal = number
            self.progress.note("stopping; the results so far are kept (once more: stop at once)")
            if self.watch is not None:
                self.watch.stop()

        before = {s: signal.signal(s, stop) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _facts(jobs: Sequence[Any], profile: str, threads: int, network: bool) -> dict[str, Any]:
    """What does not change during a run: versions, seed, profile, machine, parameters."""
    import psutil

    from .. import __version__

    versions = {"pllm-helpers": __version__, "python": platform.python_version()}
    for name in VERSIONS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    seeds = {job.name: job.values["seed"] for job in jobs if "seed" in job.values}
    same = set(map(repr, seeds.values()))
    return {
        "tool": TOOL,
        "versions": versions,
        "seed": next(iter(seeds.values())) if len(same) == 1 else seeds or None,
        "profile": profile,
        "machine": {
            "system": f"{platform.system()} {platform.machine()}",
            "processor": processor_name(),
            "cores": psutil.cpu_count() or 1,
            "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        },
        "threads": threads,
        "network": "not restricted" if network else "refused",
        "started": _now(),
        "parameters": {job.name: job.values for job in jobs},
        "sources": {job.name: job.sha256 for job in jobs},
    }


def _read_attempts(log: Path | None) -> list[dict[str, Any]]:
    if log is None or not log.exists():
        return []
    return [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]


class _Progress:
    """Lines on standard output; on a terminal also one line that follows the running cell."""

    def __init__(self, total: int, quiet: bool):
        self.total, self.quiet = total, quiet
        self.live = not quiet and sys.stdout.isatty()
        self.drawn, self.last = 0, 0.0
        self.lock = threading.Lock()

    def _line(self, text: str) -> None:
        with self.lock:
            print(f"\r{' ' * self.drawn}\r{text}" if self.drawn else text, flush=True)
            self.drawn = 0

    def begin(self, number: int, name: str) -> None:
        self.last = time.monotonic()
        if not self.quiet and not self.live:
            self._line(f"[{number}/{self.total}] {name} …")

    def tick(self, number: int, name: str, cell: int, cells: int, seconds: float, rss: float) -> None:
        text = f"[{number}/{self.total}] {name}  cell {cell}/{cells}  {seconds:.0f} s  {rss:,.0f} MB"
        if self.live:
            text = text[: shutil.get_terminal_size().columns - 1]
            with self.lock:
                print(f"\r{text.ljust(self.drawn)}", end="", flush=True)
                self.drawn = len(text)
        elif not self.quiet and time.monotonic() - self.last > 15:
            self.last = time.monotonic()
            self._line(text)

    def end(self, number: int, row: Mapping[str, Any], traceback: str) -> None:
        facts = f"{row['seconds']:.1f} s, {row['peak_rss_mb']:,.0f} MB"
        self._line(f"[{number}/{self.total}] {row['name']}  {row['status']}  {facts}")
        if row["error"]:
            self._line(f"    {row['error']}")
            shown = traceback.strip().splitlines()[-SHOWN_TRACEBACK:]
            for line in shown:
                self._line(f"    | {line}")

    def note(self, text: str) -> None:
        self._line(text)

    def finish(self, report: RunReport, stopped: bool) -> None:
        claims = report.results["claims"]
        counts = {v: sum(c["verdict"] == v for c in claims) for v in ("holds", "fails", "inconclusive")}
        ok = sum(n["status"] == "ok" for n in report.results["notebooks"])
        state = "Interrupted" if stopped else "Done"
        self._line(
            f"{state}: {ok} of {self.total} notebooks ok, claims: {counts['holds']} hold, {counts['fails']} fail, "
            f"{counts['inconclusive']} inconclusive, {report.results['run']['seconds']:.0f} s"
        )
        self._line(f"See {report.out / 'index.html'}")
