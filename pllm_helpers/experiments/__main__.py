"""``python -m pllm_helpers.experiments NAME …``: run an experiment's missing cells and write its table.

Stop it at any time (Ctrl-C, kill): finished cells are kept, and the same command goes on. To write
the table from what is there without measuring anything, add ``--no-measure``.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import signal
import sys
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from ..runtime import InputError, prepare
from . import policy_study as study
from .cells import Settings

EXPERIMENTS = {
    "policy_comparison": study.policy_comparison,
    "learning_curve": study.learning_curve,
    "buffer_size_sweep": study.buffer_size_sweep,
    "metric_ablation": study.metric_ablation,
    "synthesis_sweep": study.synthesis_sweep,
    "released_code_gap": study.released_code_gap,
    "development_grid": study.development_grid,
}
_FIXED_POLICIES = ("metric_ablation", "released_code_gap", "development_grid")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        prog="python -m pllm_helpers.experiments",
        description="Run the missing cells of an experiment and write its table.",
        epilog="STREAM: person:RANK, authored, authored:FAMILY, alpaca, dolly, prosocial, "
        "empathetic_dialogues, openorca, meddialog, medquad, chatdoctor5k, mts_dialog.",
    )
    p.add_argument("experiment", choices=EXPERIMENTS)
    p.add_argument("--streams", nargs="+", required=True, metavar="STREAM")
    p.add_argument("--policies", nargs="+", metavar="POLICY", help="default: those of the experiment")
    p.add_argument("--seeds", type=int, default=5, help="number of seeds, from 0 (default 5)")
    p.add_argument("--source", metavar="DIR", help="folder with the public data sets; without it authored ones serve")
    p.add_argument("--profile", default="standard", help="quick, standard (default) or full")
    p.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE", help="change a setting of the profile")
    p.add_argument("--bins", nargs="+", type=int, metavar="N", help="bins of the buffer; several for buffer_size_sweep")
    p.add_argument("--counts", nargs="+", type=int, metavar="N", help="synthesised sets per buffered one")
    p.add_argument("--growing", action="store_true", help="synthesis_sweep: steps grow with the sets, as in the paper")
    p.add_argument("--points", type=int, metavar="N", help="learning_curve: parts of the stream (default 6)")
    p.add_argument("--out", metavar="FILE", help="default: data/results/EXPERIMENT.json")
    p.add_argument("--cache", metavar="DIR", help="folder of finished cells (default: the user's cache)")
    p.add_argument(
        "--workers", type=int, default=0, metavar="N", help="processes of one thread; 0: this one, all cores"
    )
    p.add_argument("--max-minutes", type=float, metavar="M", help="start no further cell after M minutes")
    p.add_argument("--allow-download", action="store_true", help="let a hub model be fetched")
    p.add_argument("--verify", action="store_true", help="first drop cells whose policy now selects otherwise")
    p.add_argument("--no-measure", action="store_true", help="write the table from the cells that are there")
    return p


def settings_of(profile: str, assignments: Sequence[str]) -> Settings:
    """A profile with ``name=value`` changes. Raises :class:`InputError` on a misspelt or mistyped one."""
    settings = Settings.profile(profile)
    known = {f.name: type(getattr(settings, f.name)) for f in fields(Settings)}
    changes: dict[str, Any] = {}
    for text in assignments:
        name, equals, value = text.partition("=")
        if name not in known or not equals:
            raise InputError("--set", f"expected NAME=VALUE with a name among {', '.join(known)}, got {text!r}")
        try:
            kind = known[name]
            changes[name] = {"True": True, "False": False}[value] if kind is bool else kind(value)
        except (ValueError, KeyError):
            raise InputError("--set", f"expected {known[name].__name__} for {name}, got {value!r}") from None
        if name == "layers" and value.isdigit():
            changes[name] = int(value)
    return replace(settings, **changes)


def shown_command(arguments: Sequence[str]) -> str:
    """The command to quote in a table: it measures the cells, and spells no folder elsewhere out."""
    shared, shown, here = os.environ.get("PLLM_SHARED"), [], Path.cwd()
    for word in arguments:
        if word in ("--no-measure", "--verify"):  # these look after the cells that the command measures
            continue
        path = Path(word)
        if path.is_absolute() or word.startswith(".."):
            full = path.resolve()
            if full.is_relative_to(here):
                word = full.relative_to(here).as_posix()
            elif shared and full.is_relative_to(Path(shared).resolve()):
                word = (Path("$PLLM_SHARED") / full.relative_to(Path(shared).resolve())).as_posix()
            else:
                word = "DIR" if full.suffix == "" else f"DIR/{full.name}"
        shown.append(word if word.startswith("$") else shlex.quote(word))
    return " ".join(["python -m pllm_helpers.experiments", *shown])


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0: all cells are there; 3: stopped by ``--max-minutes``, go on with the same command; 2: bad input."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if arguments is None:  # kill stops it as Ctrl-C does: workers end, the cells are kept
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    a = parser().parse_args(given)
    try:
        options: dict[str, Any] = {"settings": settings_of(a.profile, a.set), "seeds": a.seeds, "source": a.source}
        options |= {"cache": a.cache, "workers": a.workers, "max_minutes": a.max_minutes, "measure": not a.no_measure}
        options |= {"allow_download": a.allow_download, "verify": a.verify}
        if a.policies:
            if a.experiment in _FIXED_POLICIES:
                raise InputError("--policies", f"expected none, those of {a.experiment} are fixed")
            options["policies"] = a.policies
        if a.bins:
            if a.experiment != "buffer_size_sweep" and len(a.bins) > 1:
                raise InputError("--bins", f"expected one number, got {a.bins}", "buffer_size_sweep takes several.")
            options["bins"] = a.bins if a.experiment == "buffer_size_sweep" else a.bins[0]
        for name, value, owner in (
            ("counts", a.counts, "synthesis_sweep"),
            ("growing", a.growing, "synthesis_sweep"),
            ("points", a.points, "learning_curve"),
        ):
            if value:
                if a.experiment != owner:
                    raise InputError(f"--{name}", f"expected with {owner} only")
                options[name] = value
        prepare(0)
        if a.experiment == "development_grid":
            if len(a.streams) > 1:
                raise InputError("--streams", f"expected one stream, got {a.streams}")
            grid = study.development_grid(a.streams[0], **options)
            grid.save(a.out or Path("data/results") / "development_grid.json", shown_command(given))
            print(grid.table().to_string(index=False))
            return 0
        result = EXPERIMENTS[a.experiment](a.streams, **options)
        print(result)
        if result.cells:
            out = result.save(a.out or Path("data/results") / f"{a.experiment}.json", shown_command(given))
            with contextlib.suppress(ValueError):
                out = out.resolve().relative_to(Path.cwd())
            print(f"table written to {out}")
        return 0 if result.complete else 3
    except InputError as problem:
        print(f"experiments: {problem}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; finished cells are kept, the same command goes on", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
