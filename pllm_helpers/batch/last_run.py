"""Time and memory that a notebook took at the last run, for the line at its top."""

from __future__ import annotations

import json
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from ..runtime import InputError, data_dir

__all__ = ["LastRun", "last_run"]


class LastRun(str):
    """One sentence; shown as text in the notebook."""

    def _repr_html_(self) -> str:
        return f"<p>{escape(self)}</p>"

    def __repr__(self) -> str:
        return str(self)


def last_run(notebook: str, results: Path | None = None) -> LastRun:
    """What ``notebook`` took when the committed results of the quick profile were made.

    Reads ``data/results/series_quick.json``, which ``make results`` writes after a run of the
    whole series. Raises :class:`~pllm_helpers.runtime.InputError` if that file is damaged.
    """
    path = results or data_dir() / "results" / "series_quick.json"
    if not path.is_file():
        return LastRun("No run of the quick profile has been recorded yet.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        run: Mapping[str, Any] = content["run"]
        row = next((r for r in content["notebooks"] if r["name"] == notebook), None)
        if row is None:
            return LastRun(f"The recorded run of the quick profile does not hold {notebook} yet.")
        where = f"quick profile, {run['threads']} threads, {run['machine']['processor']}"
        return LastRun(
            f"At the last recorded run ({where}) this notebook took "
            f"{row['seconds']:.0f} s from kernel start to end and at most {row['peak_rss_mb']:.0f} MB of memory."
        )
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        said = f"expected the results of a run, got {type(e).__name__}: {e}"
        raise InputError(path.name, said, "Type: make results.") from e
