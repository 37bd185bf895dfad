"""``pllm``: run the series and check the machine. Everything heavy is imported by the command."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Annotated

import typer

from . import __version__

__all__ = ["app", "main"]

# plain help: importing the formatted one costs a third of the start-up
app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> bool:
    if wanted:
        print(f"pllm {__version__}")
        raise typer.Exit
    return wanted


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    """On-device LLM personalization in Jupyter: run the notebooks, check the machine."""


@contextlib.contextmanager
def _plain_errors() -> Iterator[None]:
    """Bad input: its message and exit 2, no traceback. Ctrl-C: exit 130."""
    from .runtime import InputError

    try:
        yield
    except InputError as problem:
        print(f"pllm: {problem}", file=sys.stderr)
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


@app.command()
def run(
    notebooks: Annotated[
        list[str] | None,
        typer.Argument(metavar="[NOTEBOOK]...", help="Numbers or names, such as 1 or 01_buffer_metrics; all if none."),
    ] = None,
    profile: Annotated[str, typer.Option(help="quick, standard or full.")] = "quick",
    parameter: Annotated[
        list[str] | None,
        typer.Option("-p", "--parameter", metavar="NAME=VALUE", help="Set a parameter; NOTEBOOK:NAME=VALUE for one."),
    ] = None,
    out: Annotated[str, typer.Option(help="Folder of the run.")] = "runs/latest",
    timeout: Annotated[float | None, typer.Option(help="Seconds per notebook.")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads per kernel.")] = None,
    network: Annotated[
        bool,
        typer.Option("--network/--no-network", help="--no-network: fail a notebook that reaches elsewhere."),
    ] = True,
    folder: Annotated[
        str | None, typer.Option("--notebooks", metavar="FOLDER", help="Other notebooks than the series.")
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="One line per notebook.")] = False,
) -> None:
    """Execute notebooks; write them, HTML, index.html and results.json to --out.

    Exit 0: every notebook ran and every deterministic claim holds. 1: not so. 2: bad input,
    nothing was run. 130: stopped by Ctrl-C, the results so far are there.
    """
    with _plain_errors():
        from .batch.run import run_series
        from .batch.series import parse_assignments

        report = run_series(
            notebooks,
            profile=profile,
            parameters=parse_assignments(parameter or []),
            out=out,
            timeout=timeout,
            threads=threads,
            network=network,
            folder=folder,
            quiet=quiet,
        )
        raise typer.Exit(report.exit_code)


@app.command()
def doctor() -> None:
    """Check this machine: [ok] or [fix] per line, with what to do. Exit 1 if anything needs fixing."""
    with _plain_errors():
        from .doctor import check_machine

        needs_fixing = False
        for check in check_machine():
            print(check, flush=True)
            needs_fixing = needs_fixing or not check.ok
        raise typer.Exit(int(needs_fixing))


def main() -> None:
    """Entry point of ``pllm``."""
    for stream in (sys.stdout, sys.stderr):  # a terminal without UTF-8 gets a ? instead of an error
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    app()
