"""Tables and figures of Qin et al. with error bars: policies, learning curves, buffer sizes, ablation, synthesis.

Each experiment is one function that plans cells (see :mod:`.cells`), runs what the cache lacks and
gives a :class:`Study`. Cells are ordered so that stopping early leaves a balanced table: all
methods and streams of seed 0 first, then seed 1. All methods of a seed share the stream, the
held-out rows, the adapter's start and the order seed, so their differences are paired.
"""

from __future__ import annotations

import importlib.metadata
import json
import multiprocessing
import os
import platform
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from ..evaluation import Estimate, paired_difference
from ..runtime import InputError, data_dir, prepare, processor_name, write_whole
from .cells import BASE, FLAGS, METRICS, Cell, CellResult, Settings, Workbench

if TYPE_CHECKING:
    import pandas as pd

    from ..models import LLM, Encoder

__all__ = [
    "ALL_POLICIES",
    "Grid",
    "Study",
    "buffer_size_sweep",
    "development_grid",
    "learning_curve",
    "load_results",
    "metric_ablation",
    "policy_comparison",
    "released_code_gap",
    "run_cells",
    "synthesis_sweep",
]

ALL_POLICIES = (
    "quality",
    "random",
    "fifo",
    "kcenter",
    "combined",
    "facility",
    "eoe_only",
    "dss_only",
    "idd_only",
    "released_code",
)
UNITS = {"nll": "nats per token", "length_ratio": "words per reference word", "seconds": "s", "cpu_seconds": "s"}
_STORED = ("nll", "rouge1", "rougeL")  # rows that a committed table keeps, in hundredths
_FACTORS = ("bins", "sets", "synthesis", "steps")
_EXTRA = ("seconds", "cpu_seconds", "synthesis_yield", "trained_on")

Number = float | int
Names = str | Sequence[str]


@dataclass(frozen=True)
class Study:
    """The cells of one experiment, and what they amount to.

    Attributes
    ----------
    name : of the experiment, also of its file under ``data/results``.
    cells : those that were measured. planned : how many there should be.
    run : settings, versions, hardware, command, notes on the streams.
    """

    name: str
    cells: tuple[CellResult, ...]
    planned: int
    run: Mapping[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        return (
            f"Study({self.name}, {len(self.cells)} of {self.planned} cells, streams {', '.join(self.streams)}, "
            f"policies {', '.join(self.policies)}, {len(self.seeds)} seeds)"
        )

    @property
    def streams(self) -> tuple[str, ...]:
        """Streams, in the order planned."""
        return tuple(dict.fromkeys(c.cell.stream for c in self.cells))

    @property
    def policies(self) -> tuple[str, ...]:
        """Policies, in the order planned; ``base`` is the model without an adapter."""
        return tuple(dict.fromkeys(c.cell.policy for c in self.cells))

    @property
    def seeds(self) -> tuple[int, ...]:
        return tuple(sorted({c.cell.seed for c in self.cells}))

    @property
    def complete(self) -> bool:
        return len(self.cells) == self.planned

    @property
    def notes(self) -> dict[str, str]:
        """What stands in for what, per stream; only where there is something to say."""
        found = {c.cell.stream: str(c.info.get("note", "")) for c in self.cells}
        return {k: v for k, v in found.items() if v}

    @property
    def factor(self) -> str:
        """What varies beside policy, stream and seed: ``bins``, ``sets``, ``synthesis``, ``steps``, or ``""``."""
        own = [c.cell for c in self.cells if c.cell.policy != BASE]
        return next((f for f in _FACTORS if len({getattr(c, f) for c in own}) > 1), "")

    def levels(self, factor: str | None = None) -> tuple[int, ...]:
        """Values of a factor (default: :attr:`factor`), ascending."""
        name = self.factor if factor is None else factor
        own = (c.cell for c in self.cells if c.cell.policy != BASE)
        return tuple(sorted({getattr(c, name) for c in own})) if name else ()

    @cached_property
    def _by_cell(self) -> dict[Cell, CellResult]:
        return {c.cell: c for c in self.cells}

    def results(self, stream: Names | None, policy: str, **levels: int) -> list[CellResult]:
        """Cells of a policy on one stream, several, or all (``None``), by stream and seed."""
        wanted = (stream,) if isinstance(stream, str) else tuple(stream or self.streams)
        unknown = [s for s in wanted if s not in self.streams]
        if unknown:
            raise InputError("stream", f"expected some of {', '.join(self.streams)}, got {unknown[0]!r}")
        if policy not in self.policies:
            raise InputError("policy", f"expected one of {', '.join(self.policies)}, got {policy!r}")
        bad = set(levels) - set(_FACTORS)
        if bad:
            raise InputError("levels", f"expected some of {', '.join(_FACTORS)}, got {sorted(bad)[0]!r}")
        found = [
            c
            for c in self.cells
            if c.cell.stream in wanted
            and c.cell.policy == policy
            and (policy == BASE or all(getattr(c.cell, k) == v for k, v in levels.items()))
        ]
        return sorted(found, key=lambda c: (wanted.index(c.cell.stream), c.cell.seed))

    def estimate(
        self,
        metric: str,
        stream: Names | None,
        policy: str,
        *,
        against: str | None = None,
        seed: int = 0,
        **levels: int,
    ) -> Estimate:
        """Mean of a metric over held-out rows and seeds, with a hierarchical bootstrap interval.

        Parameters
        ----------
        metric : one of ``METRICS``, a share (``equals_prompt``, ``equals_another``, ``blank``), or
            ``seconds``, ``synthesis_yield``, ``trained_on`` (one number per cell).
        stream : one stream; several or ``None`` (all) pool them, each (stream, seed) one group.
        against : a second policy: the paired mean difference ``policy - against`` instead.
        levels : ``bins=``, ``sets=``, ``synthesis=``, ``steps=`` where they vary.

        Where a table read from a file keeps no rows of the metric, the interval is over seeds only.
        Raises :class:`~pllm_helpers.runtime.InputError` if nothing was measured, or if cells that
        differ in a factor would be mixed.
        """
        if metric not in (*METRICS, *FLAGS, "corpus_bleu", *_EXTRA):
            known = ", ".join((*METRICS, *FLAGS, "corpus_bleu", *_EXTRA))
            raise InputError("metric", f"expected one of {known}, got {metric!r}")
        first = self.results(stream, policy, **levels)
        groups = {(c.cell.stream, c.cell.seed): c for c in first}
        if len(groups) < len(first):
            raise InputError("levels", f"expected one of the levels {self.levels()} of {self.factor}", "Name it.")
        others: dict[tuple[str, int], CellResult] = {}
        if against is not None:
            second = self.results(stream, against, **levels)
            others = {(c.cell.stream, c.cell.seed): c for c in second}
            groups = {k: c for k, c in groups.items() if k in others}
        if not groups:
            raise InputError("study", f"expected cells of {policy} on {stream or 'any stream'}, none were measured")
        unit = UNITS.get(metric, "")
        seeds = tuple(sorted({k[1] for k in groups}))
        if all(metric in c.rows for c in [*groups.values(), *(others[k] for k in groups if others)]):
            a = [c.rows[metric] for c in groups.values()]
            b = [others[k].rows[metric] for k in groups] if others else None
            e = paired_difference(a, b, seed, unit=unit)
            return replace(e, seeds=seeds)
        values = np.array([_mean(c, metric) for c in groups.values()])
        if others:
            values = values - np.array([_mean(others[k], metric) for k in groups])
        return _over_groups(values, seeds, unit)

    def table(
        self,
        metric: str = "rouge1",
        *,
        against: str | None = None,
        streams: Names | None = None,
        pooled: bool = False,
        seed: int = 0,
    ) -> pd.DataFrame:
        """One row per stream, policy and level: value, low, high, n (held-out rows), seeds.

        ``pooled=True`` pools the streams into one row (``stream`` is ``"all"``). ``against``: paired
        differences to that policy, which itself is left out.
        """
        import pandas as pd

        wanted = (streams,) if isinstance(streams, str) else tuple(streams or self.streams)
        factor, rows = self.factor, []
        for name in ("all",) if pooled else wanted:
            for policy in self.policies:
                for level in self.levels() or (None,):
                    levels = {} if level is None else {factor: level}
                    pick = wanted if pooled else name
                    if policy == against or not self.results(pick, policy, **levels):
                        continue
                    if against is not None and not self.results(pick, against, **levels):
                        continue
                    e = self.estimate(metric, pick, policy, against=against, seed=seed, **levels)
                    row = {"stream": name, "policy": policy, **({factor: level} if factor else {})}
                    row |= {"value": e.value, "low": e.low, "high": e.high, "n": e.n, "seeds": len(e.seeds)}
                    rows.append(row | {"note": "" if pooled else self.notes.get(name, "")})
                    if policy == BASE:
                        break  # one row: the model without an adapter knows no level
        return pd.DataFrame(rows)

    def estimates(self) -> dict[str, Estimate]:
        """Named results: ``METRIC/STREAM/POLICY`` and ``METRIC_minus_random/STREAM/POLICY``, with ``/FACTOR=LEVEL``."""
        out: dict[str, Estimate] = {}
        for metric in ("rouge1", "nll"):
            for against in (None, "random"):
                if against is not None and against not in self.policies:
                    continue
                table = self.table(metric, against=against)
                for row in table.to_dict("records"):
                    if row["low"] == row["high"] and row["seeds"] < 2:
                        continue  # a lone mean without its rows: no interval to state
                    level = f"/{self.factor}={row[self.factor]}" if self.factor and row["policy"] != BASE else ""
                    name = f"{metric}{'_minus_random' if against else ''}/{row['stream']}/{row['policy']}{level}"
                    levels = {self.factor: row[self.factor]} if level else {}
                    out[name] = self.estimate(metric, row["stream"], row["policy"], against=against, **levels)
        return out

    def save(self, path: str | os.PathLike, command: str = "") -> Path:
        """Write the table as ``data/results`` keeps it: run, results, and the cells in compact form."""
        run = dict(self.run) | ({"command": command} if command else {})
        run |= {"cells": len(self.cells), "planned": self.planned, "complete": self.complete, "notes": self.notes}
        results = [{"name": name, **_stated(e)} for name, e in self.estimates().items()]
        head = json.dumps({"run": run, "results": []}, indent=1, ensure_ascii=False)
        lines = ",\n".join("  " + json.dumps(r, ensure_ascii=False) for r in results)
        cells = ",\n".join(
            "  " + json.dumps(_compact(c), separators=(",", ":"), ensure_ascii=False) for c in self.cells
        )
        text = head[: head.rindex('"results": []')] + f'"results": [\n{lines}\n ],\n "cells": [\n{cells}\n ]\n}}\n'
        json.loads(text)
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        write_whole(target, text)
        target.chmod(0o644)
        return target


def load_results(name: str | os.PathLike) -> Study:
    """A committed experiment: ``load_results("policy_comparison")`` reads ``data/results/policy_comparison.json``.

    A path to such a file will do as well. The file holds the held-out rows of NLL, ROUGE-1
    and ROUGE-L to two decimals; of other metrics the means per cell. Raises
    :class:`~pllm_helpers.runtime.InputError` if there is no such file or it is damaged.
    """
    path = Path(name)
    if path.suffix != ".json":
        path = data_dir() / "results" / f"{name}.json"
    if not path.is_file():
        remedy = "Make it: python -m pllm_helpers.experiments --help says how."
        raise InputError("results", f"expected {path.name} under data/results, there is none", remedy)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        cells = tuple(_expanded(c, content["run"]) for c in content["cells"])
        return Study(content["run"]["experiment"], cells, content["run"]["planned"], content["run"])
    except (ValueError, KeyError, TypeError) as e:
        raise InputError(path.name, f"expected the table of an experiment, got {type(e).__name__}: {e}") from e


# ---------------------------------------------------------------- running cells


def run_cells(
    name: str,
    cells: Sequence[Cell],
    settings: Settings,
    *,
    source: str | os.PathLike | None = None,
    llm: LLM | None = None,
    encoder: Encoder | None = None,
    cache: str | os.PathLike | None = None,
    allow_download: bool = False,
    workers: int = 0,
    max_minutes: Number | None = None,
    progress: bool = True,
    measure: bool = True,
    verify: bool = False,
) -> Study:
    """Run the cells that the cache lacks, in the order given, and gather all that are there.

    Parameters
    ----------
    source : folder with the public data sets, see :func:`~pllm_helpers.experiments.data_set_stream`.
    llm, encoder : those that ``settings`` name, if they are loaded already (``workers=0`` only).
    cache : folder of results; default: ``experiments`` in the user's cache folder. Several
        processes may share it.
    allow_download : let a hub model that is not on this machine yet be fetched.
    workers : further processes with one thread each; 0: this process, with all its threads.
    max_minutes : start no further cell after so many minutes.
    progress : print a line per cell.
    measure : ``False`` gathers only.
    verify : first replay the selection of every cached cell, and drop those whose policy would now
        fill the buffer otherwise (about a second each).
    """
    if max_minutes is not None and not max_minutes > 0:
        raise InputError("max_minutes", f"expected a number above 0, got {max_minutes!r}")
    if isinstance(workers, bool) or not 0 <= workers <= 1024:
        raise InputError("workers", f"expected a whole number from 0 to 1024, got {workers!r}")
    say = (lambda line: print(line, flush=True)) if progress else (lambda line: None)
    shared: dict[str, Any] = {"source": source, "allow_download": allow_download}
    bench = Workbench(settings, llm=llm, encoder=encoder, cache=cache, say=say, **shared)
    deadline = None if max_minutes is None else time.time() + 60 * max_minutes
    for cell in cells if verify else ():
        if bench.stale(cell):
            say(f"dropped, its buffer is no longer what the policy gives: {cell}")
            bench.path(cell).unlink(missing_ok=True)
    if measure and workers:
        context = multiprocessing.get_context("spawn")
        options = shared | {"cache": bench.cache}
        work = (list(cells), settings, options, deadline, progress, os.getpid())
        team = [context.Process(target=_work, args=work) for _ in range(workers)]
        before = {k: os.environ.get(k) for k in ("OMP_NUM_THREADS", "PLLM_THREADS")}
        os.environ.update(OMP_NUM_THREADS="1", PLLM_THREADS="1")
        try:
            for process in team:
                process.start()
        finally:
            for k, v in before.items():
                os.environ.pop(k, None) if v is None else os.environ.__setitem__(k, v)
        try:
            for process in team:
                process.join()
        except BaseException:
            for process in team:
                process.terminate()
            raise
        if any(process.exitcode for process in team):
            raise RuntimeError(f"a worker failed, exit codes {[process.exitcode for process in team]}; see its message")
    elif measure:
        _run_in_order(bench, cells, deadline, say)
    done = [found for cell in cells if (found := bench.cached(cell))]
    return Study(name, tuple(done), len(cells), _run_card(name, bench, done, workers))


def _work(
    cells: list[Cell], settings: Settings, options: dict[str, Any], deadline: float | None, progress: bool, parent: int
) -> None:
    """What one worker process does, as long as its parent lives."""
    prepare(0, threads=1)
    say = (lambda line: print(line, flush=True)) if progress else (lambda line: None)
    _run_in_order(Workbench(settings, **options, say=say), cells, deadline, say, parent)


def _run_in_order(
    bench: Workbench,
    cells: Sequence[Cell],
    deadline: float | None,
    say: Callable[[str], None],
    parent: int | None = None,
) -> None:
    """Measure what is missing; what another process has in hand is looked at again at the end."""
    waiting: list[Cell] = []
    spent: list[float] = []
    for number, cell in enumerate(cells, 1):
        if bench.cached(cell):
            continue
        if deadline is not None and time.time() > deadline:
            say("time is up; the same command goes on from here")
            return
        if parent is not None and os.getppid() != parent:
            return
        start = time.perf_counter()
        result = bench.run(cell, wait=False)
        if result is None:
            waiting.append(cell)
            continue
        spent.append(time.perf_counter() - start)
        left = (len(cells) - number) * float(np.median(spent[-20:])) / 60
        score = f"NLL {result.means['nll']:.3f}, ROUGE-1 {result.means['rouge1']:.3f}"
        say(f"[{number}/{len(cells)}] {cell}: {score}, {spent[-1]:.1f} s, about {left:.0f} min left")
    for cell in waiting:
        if deadline is None or time.time() < deadline:
            bench.run(cell)


def _run_card(name: str, bench: Workbench, done: Sequence[CellResult], workers: int) -> dict[str, Any]:
    """Versions, hardware and settings, without a path or a name of this machine."""
    packages = (
        "pllm-helpers",
        "torch",
        "transformers",
        "peft",
        "rouge-score",
        "sacrebleu",
        "chitchat-dataset",
        "numpy",
    )
    versions = {"python": platform.python_version()}
    for package in packages:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    settings = asdict(bench.settings)
    used = [c.info["cpu_seconds"] for c in done if "cpu_seconds" in c.info]
    if done:
        settings |= {"model": bench.llm.name, "dtype": bench.llm.dtype, "device": str(bench.llm.device)}
    return {
        "experiment": name,
        "settings": settings,
        "versions": versions,
        "machine": {"system": f"{platform.system()} {platform.machine()}", "processor": processor_name(),
                    "cores": os.cpu_count()},
        "workers": workers,
        "threads_per_cell": sorted({int(c.info["threads"]) for c in done}),
        "seconds_per_cell": round(float(np.median([_mean(c, "seconds") for c in done])), 1) if done else None,
        "cpu_seconds_per_cell": round(float(np.median(used)), 1) if used else None,
        "data": {
            s: {"streamed": max(int(c.info["streamed"]) for c in done if c.cell.stream == s),
                "held_out": max(int(c.info["held_out"]) for c in done if c.cell.stream == s)}
            for s in dict.fromkeys(c.cell.stream for c in done)
        },
    }  # fmt: skip


# ---------------------------------------------------------------- the experiments


def policy_comparison(
    streams: Names,
    policies: Names = ALL_POLICIES,
    seeds: int | Sequence[int] = 5,
    *,
    settings: Settings | None = None,
    bins: int = 32,
    **options: Any,
) -> Study:
    """Policies against each other after the whole stream (Table 2 and the right end of Fig. 2).

    ``options`` go to :func:`run_cells`. The base model comes along as policy ``base``.
    """
    cells = _plan(streams, _with_base(policies), seeds, [{"bins": bins}])
    return run_cells("policy_comparison", cells, settings or Settings(), **options)


def learning_curve(
    streams: Names,
    policies: Names = ("quality", "random", "fifo", "kcenter"),
    seeds: int | Sequence[int] = 5,
    *,
    points: int = 6,
    settings: Settings | None = None,
    bins: int = 32,
    **options: Any,
) -> Study:
    """Quality against the length of the stream (Fig. 2): at each of ``points`` equal parts a fresh adapter.

    The level ``sets`` is the number of dialogue sets streamed; the same held-out rows follow the
    *whole* stream at every point.
    """
    s = settings or Settings()
    levels = [{"bins": bins, "sets": round(s.length * k / points)} for k in range(1, points + 1)]
    return run_cells("learning_curve", _plan(streams, _with_base(policies), seeds, levels), s, **options)


def buffer_size_sweep(
    streams: Names,
    bins: Sequence[int] = (8, 16, 32, 64, 128),
    policies: Names = ("quality", "random", "fifo", "kcenter"),
    seeds: int | Sequence[int] = 5,
    *,
    settings: Settings | None = None,
    **options: Any,
) -> Study:
    """Quality against the size of the buffer in bins of 22 KB (Table 3); training steps stay the same."""
    levels = [{"bins": b} for b in bins]
    cells = _plan(streams, _with_base(policies), seeds, levels)
    return run_cells("buffer_size_sweep", cells, settings or Settings(), **options)


def metric_ablation(
    streams: Names,
    seeds: int | Sequence[int] = 5,
    *,
    settings: Settings | None = None,
    bins: int = 32,
    **options: Any,
) -> Study:
    """All three metrics against each alone, beside random replacement (Table 4)."""
    policies = ("quality", "eoe_only", "dss_only", "idd_only", "random", BASE)
    cells = _plan(streams, policies, seeds, [{"bins": bins}])
    return run_cells("metric_ablation", cells, settings or Settings(), **options)


def synthesis_sweep(
    streams: Names,
    counts: Sequence[int] = (0, 1, 2, 3, 6),
    policies: Names = ("quality",),
    seeds: int | Sequence[int] = 5,
    *,
    settings: Settings | None = None,
    bins: int = 32,
    growing: bool = False,
    **options: Any,
) -> Study:
    """Quality and time against the number of synthesised sets per buffered one (Fig. 3).

    The paper trains on all sets for the same number of epochs, so more synthesised sets also mean
    more training. Here the number of steps stays the same, which separates the two; ``growing=True``
    gives (1 + count) times the steps, as in the paper. ``estimate("cpu_seconds", …)`` and
    ``estimate("synthesis_yield", …)`` give time and share of accepted attempts; ``"seconds"`` is the
    wall clock, which also counts what else the machine did.
    """
    s = settings or Settings()
    levels = [{"bins": bins, "synthesis": k, "steps": s.steps * (1 + k) if growing else 0} for k in counts]
    return run_cells("synthesis_sweep", _plan(streams, _with_base(policies), seeds, levels), s, **options)


def released_code_gap(
    streams: Names,
    seeds: int | Sequence[int] = 5,
    *,
    settings: Settings | None = None,
    bins: int = 32,
    **options: Any,
) -> Study:
    """The paper's rule against what the first author's released scripts do, beside random replacement."""
    cells = _plan(streams, ("quality", "released_code", "random", BASE), seeds, [{"bins": bins}])
    return run_cells("released_code_gap", cells, settings or Settings(), **options)


@dataclass(frozen=True)
class Grid:
    """Held-out NLL by learning rate and steps: ``(lr, steps)`` -> estimate; ``(0, 0)`` is the base model."""

    stream: str
    estimates: Mapping[tuple[Number, int], Estimate]
    run: Mapping[str, Any]

    def table(self) -> pd.DataFrame:
        """One row per learning rate and number of steps."""
        import pandas as pd

        rows = [{"lr": lr, "steps": n, **_stated(e)} for (lr, n), e in self.estimates.items()]
        return pd.DataFrame(rows).assign(seeds=[len(r["seeds"]) for r in rows])

    def save(self, path: str | os.PathLike, command: str = "") -> Path:
        """Write it as ``data/results`` keeps it."""
        names = {key: f"lr={key[0]:g}/steps={key[1]}" if key[1] else BASE for key in self.estimates}
        results = [{"name": f"nll/{self.stream}/{names[k]}", **_stated(e)} for k, e in self.estimates.items()]
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        write_whole(target, json.dumps({"run": {**self.run, "command": command}, "results": results}, indent=1) + "\n")
        target.chmod(0o644)
        return target


def development_grid(
    stream: str = "person:4",
    lrs: Sequence[Number] = (1e-3, 3e-3, 1e-2),
    steps: Sequence[int] = (8, 16, 24),
    seeds: int | Sequence[int] = 2,
    *,
    settings: Settings | None = None,
    bins: int = 32,
    **options: Any,
) -> Grid:
    """NLL of held-out replies by learning rate and steps, on a stream that no table reports, random policy.

    Learning rate and steps of the study were chosen on this stream, once; nothing else was tuned.
    16 steps at 0.003 came within 0.05 nats of the best of ``data/results/development_grid.json``,
    and unlike at 0.01 longer training does no harm there. ``options`` go to :func:`run_cells`.
    """
    s = replace(settings or Settings(), generated=2, new_tokens=1)  # only the NLL is looked at
    out: dict[tuple[Number, int], Estimate] = {}
    run: dict[str, Any] = {}
    for lr, n in [(0, 0), *((lr, n) for lr in lrs for n in steps)]:
        policy, own = ("random", replace(s, lr=lr, steps=n)) if n else (BASE, s)
        found = run_cells("development_grid", _plan(stream, (policy,), seeds, [{"bins": bins}]), own, **options)
        if found.cells:
            out[lr, n] = found.estimate("nll", stream, policy)
            run = dict(found.run)
    varied = ("lr", "steps", "generated", "new_tokens")  # the last two: no answers were written
    shared = {k: v for k, v in run.get("settings", {}).items() if k not in varied}
    run |= {"settings": shared, "policy": "random", "bins": bins, "lrs": list(lrs), "steps": list(steps)}
    return Grid(stream, out, run)


def _with_base(policies: Names) -> tuple[str, ...]:
    names = (policies,) if isinstance(policies, str) else tuple(policies)
    unknown = [p for p in names if p not in (*ALL_POLICIES, BASE)]
    if unknown or not names:
        raise InputError("policies", f"expected some of {', '.join(ALL_POLICIES)}, got {unknown or 'none'}")
    return tuple(dict.fromkeys((*names, BASE)))


def _plan(
    streams: Names, policies: Iterable[str], seeds: int | Sequence[int], levels: Sequence[Mapping[str, int]]
) -> list[Cell]:
    """Cells in an order that may be cut anywhere: seed by seed, stream by stream, all methods of each."""
    names = (streams,) if isinstance(streams, str) else tuple(dict.fromkeys(streams))
    if not names:
        raise InputError("streams", "expected at least one stream, got none")
    numbers = range(seeds) if isinstance(seeds, int) else seeds
    if not len(numbers):
        raise InputError("seeds", f"expected at least one seed, got {seeds!r}")
    cells = [
        Cell(name, seed, policy, **(level if policy != BASE else {}))
        for seed in numbers
        for name in names
        for level in levels
        for policy in policies
    ]
    return list(dict.fromkeys(cells))


# ---------------------------------------------------------------- numbers


def _mean(c: CellResult, metric: str) -> float:
    if metric == "seconds":
        return float(sum(c.seconds.values()))
    if metric == "cpu_seconds":
        if metric not in c.info:
            raise InputError(
                "metric", "expected cells that recorded the processor's seconds, one did not", "Use seconds."
            )
        return float(c.info[metric])
    if metric == "trained_on":
        return float(c.info.get("trained_on", 0))
    if metric == "synthesis_yield":
        made = c.info.get("synthesis") or {}
        return made["passed"] / made["asked"] if made.get("asked") else 0.0
    return float(c.means[metric])


def _over_groups(values: Float[np.ndarray, " g"], seeds: tuple[int, ...], unit: str) -> Estimate:
    """Mean of one number per (stream, seed) with Student's interval over them; no interval for a single one."""
    from ..evaluation.intervals import _student_quantile

    value, n = float(values.mean()), len(values)
    half = _student_quantile(0.975, n - 1) * float(values.std(ddof=1)) / n**0.5 if n > 1 else 0.0
    return Estimate(value, value - half, value + half, n, seeds, unit)


def _stated(e: Estimate) -> dict[str, Any]:
    numbers = {k: round(float(getattr(e, k)), 5) for k in ("value", "low", "high")}
    return {**numbers, "unit": e.unit, "n": e.n, "seeds": list(e.seeds)}


def _compact(c: CellResult) -> dict[str, Any]:
    cell = {k: v for k, v in asdict(c.cell).items() if v or k == "seed"}
    means = {k: round(float(v), 4) for k, v in c.means.items() if k not in _STORED and (v or k not in FLAGS)}
    rows = {k: np.rint(c.rows[k] * 100).astype(int).tolist() for k in _STORED if k in c.rows}
    info = {k: c.info[k] for k in ("trained_on", "synthesis", "buffer", "cpu_seconds") if k in c.info}
    if "buffer" in info:
        info["buffer"] = {k: round(v, 3) for k, v in info["buffer"].items()}
    return {**cell, "seconds": round(_mean(c, "seconds"), 1), "means": means, "rows": rows, "info": info}


def _expanded(content: Mapping[str, Any], run: Mapping[str, Any]) -> CellResult:
    names = ("stream", "seed", "policy", "bins", "sets", "synthesis", "steps")
    cell = Cell(**{k: content[k] for k in names if k in content})
    rows = {k: np.array(v, dtype=float) / 100 for k, v in content["rows"].items()}
    means = dict.fromkeys(FLAGS, 0.0) | {k: float(v.mean()) for k, v in rows.items()} | dict(content["means"])
    data = run["data"][cell.stream]
    info = dict(content["info"]) | {"note": run["notes"].get(cell.stream, ""), "held_out": data["held_out"]}
    info |= {"streamed": cell.sets or data["streamed"], "threads": run["threads_per_cell"][0]}
    return CellResult(cell, "", rows, means, {"all": content["seconds"]}, info)
