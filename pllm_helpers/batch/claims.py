"""Claims and results that a notebook states in code, shown to the reader and read back by a run."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from html import escape
from typing import Any, SupportsFloat

from ..evaluation import Claim, Estimate, Kind, check_claim
from ..runtime import InputError

__all__ = ["CLAIM_MIME", "RESULT_MIME", "ClaimError", "claim", "record", "collect"]

CLAIM_MIME = "application/vnd.pllm.claim+json"
RESULT_MIME = "application/vnd.pllm.result+json"

# sign, word and colour together, so that nobody depends on the colour
SIGNS = {"holds": ("✓", "#2e7d32"), "fails": ("✗", "#c62828"), "inconclusive": ("?", "#8a6d00")}


class ClaimError(AssertionError):
    """A deterministic claim that does not hold: the notebook stops here."""


class _Shown(Claim):
    """A claim that has been displayed: as the last line of a cell it is not echoed again."""

    def _ipython_display_(self) -> None:
        pass


class _ShownEstimate(Estimate):
    def _ipython_display_(self) -> None:
        pass


def claim(
    text: str | Claim,
    estimate: Estimate | SupportsFloat | None = None,
    *,
    above: SupportsFloat | None = None,
    below: SupportsFloat | None = None,
    kind: str = "statistical",
    paper: str = "",
) -> Claim:
    """State a claim beside its figure: show it with its verdict and add it to the run's results.

    Parameters
    ----------
    text : the sentence that is claimed, or a :class:`Claim` that was checked already (then it
        takes no further argument).
    estimate : the number behind it, with its 95 % interval where there is chance.
    above, below : the bound or bounds that make the sentence true (they belong to it).
    kind : ``"deterministic"`` (must hold, or the notebook fails) or ``"statistical"``
        (reported as it came out).
    paper : what the paper says, with its section.

    Raises
    ------
    ClaimError : a deterministic claim does not hold; raised after it has been shown.
    InputError : no bound, an unknown kind, an empty sentence, or NaN.
    """
    if isinstance(text, Claim):
        if estimate is not None or above is not None or below is not None or paper:
            raise InputError("claim", "expected a ready Claim alone, got further arguments")
        checked = text
    else:
        if not text.strip():
            raise InputError("claim", "expected a sentence, got blank text")
        if estimate is None:
            raise InputError("claim", "expected an Estimate or a number, got none")
        number = estimate if isinstance(estimate, Estimate) else Estimate.exact(_number(estimate, "claim"))
        ends = [None if end is None else _number(end, "claim, bound") for end in (above, below)]
        checked = check_claim(text, number, above=ends[0], below=ends[1], kind=_kind(kind), paper=paper)
    e = checked.estimate
    payload = {
        "claim": checked.text,
        "kind": checked.kind,
        "verdict": checked.verdict,
        **_interval(e),
        "bound": checked.bound,
        "unit": e.unit,
        "n": e.n,
        "seeds": list(e.seeds),
        "paper": checked.paper,
    }
    _show(CLAIM_MIME, payload, _claim_text(checked), claim_html(payload))
    if checked.kind == "deterministic" and checked.verdict != "holds":
        raise ClaimError(f"{checked.text}: claimed {checked.bound}, got {e} ({checked.verdict}).")
    return _Shown(**{f.name: getattr(checked, f.name) for f in fields(Claim)})


def record(
    name: str,
    value: Estimate | SupportsFloat,
    *,
    unit: str = "",
    n: int | None = None,
    seeds: Iterable[int] | None = None,
) -> Estimate:
    """Show a named number and add it to the run's results (``results.json``).

    Parameters
    ----------
    name : name under which the number is looked up, for instance ``"rouge1/medical/quality"``;
        of equal names in one notebook the last one counts.
    value : a number without chance, or an :class:`Estimate` with its 95 % interval.
    unit : unit of the number; taken from the estimate where not given.
    n, seeds : rows behind the number and seeds used; taken from the estimate where not given.

    Raises :class:`InputError` on a blank name or a value that is not a finite number.
    """
    if not name.strip():
        raise InputError("record", "expected a name, got blank text")
    e = value if isinstance(value, Estimate) else Estimate.exact(_number(value, f"record {name!r}"))
    if not math.isfinite(e.value):
        raise InputError(f"record {name!r}", f"expected a finite number, got {e.value}")
    e = _ShownEstimate(
        float(e.value),
        float(e.low),
        float(e.high),
        int(e.n if n is None else n),
        tuple(int(s) for s in (e.seeds if seeds is None else seeds)),
        unit or e.unit,
    )
    payload = {"name": name, **_interval(e), "unit": e.unit, "n": e.n, "seeds": list(e.seeds)}
    _show(RESULT_MIME, payload, f"{name} = {e}", result_html(payload))
    return e


def collect(notebook: str, cells: Sequence[Mapping[str, Any]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Claims and results in the outputs of executed ``cells``, each with its notebook's name.

    Rows keep every field that was shown; equal result names: the last one counts.
    """
    claims: list[dict[str, Any]] = []
    results: dict[str, dict[str, Any]] = {}
    for cell in cells:
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if CLAIM_MIME in data:
                claims.append({"notebook": notebook, **data[CLAIM_MIME]})
            if RESULT_MIME in data:
                row = data[RESULT_MIME]
                results[row["name"]] = {"notebook": notebook, **row}
    return claims, list(results.values())


def _kind(kind: str) -> Kind:
    if kind == "deterministic" or kind == "statistical":
        return kind
    raise InputError("kind", f"expected 'deterministic' or 'statistical', got {kind!r}")


def _number(value: Any, what: str) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        raise InputError(what, f"expected a number or an Estimate, got {type(value).__name__} {value!r}") from None


def _interval(e: Estimate) -> dict[str, float | None]:
    """Value and interval for JSON, which has no infinity: an open end is ``None``."""
    ends = {"value": e.value, "low": e.low, "high": e.high}
    return {key: float(x) if math.isfinite(x) else None for key, x in ends.items()}


def _claim_text(c: Claim) -> str:
    lines = [
        f"{SIGNS[c.verdict][0]} Claim {c.verdict}: {c.text}",
        f"  measured {c.estimate}; claimed {c.bound}; {c.kind}",
    ]
    return "\n".join(lines + ([f"  paper: {c.paper}"] if c.paper else []))


def number_text(row: Mapping[str, Any]) -> str:
    """``value [low, high] unit`` of a claim or result row, in four significant digits."""
    value, low, high = (row.get(key) for key in ("value", "low", "high"))
    unit = f" {row['unit']}" if row.get("unit") else ""
    shown = "unbounded" if value is None else f"{value:.4g}"
    if low == high == value:
        return shown + unit
    ends = ("−∞" if low is None else f"{low:.4g}", "∞" if high is None else f"{high:.4g}")
    return f"{shown} [{ends[0]}, {ends[1]}]{unit}"


def claim_html(row: Mapping[str, Any]) -> str:
    """One claim as HTML; every text escaped, the verdict as sign, word and border colour."""
    sign, colour = SIGNS[row["verdict"]]
    n = f", n = {row['n']}" if row.get("n", 1) > 1 else ""
    paper = f'<div class="pllm-paper">Paper: {escape(row["paper"])}</div>' if row.get("paper") else ""
    return (
        f'<div class="pllm-claim" role="note" style="border-left:5px solid {colour};padding:.3em .8em;margin:.4em 0">'
        f"<div><strong>{sign} Claim {escape(row['verdict'])}:</strong> {escape(row['claim'])}</div>"
        f"<div>measured <b>{escape(number_text(row))}</b>{n}; claimed {escape(row.get('bound', ''))}; "
        f"{escape(row['kind'])}</div>{paper}</div>"
    )


def result_html(row: Mapping[str, Any]) -> str:
    """One result as HTML."""
    notes = ([f"n = {row['n']}"] if row["n"] > 1 else []) + (
        ["seeds " + ", ".join(map(str, row["seeds"]))] if row["seeds"] else []
    )
    tail = f" ({escape('; '.join(notes))})" if notes else ""
    return (
        '<div class="pllm-result" style="border-left:5px solid #607d8b;padding:.2em .8em;margin:.4em 0">'
        f"<code>{escape(row['name'])}</code> = <b>{escape(number_text(row))}</b>{tail}</div>"
    )


def _show(mime: str, payload: dict[str, Any], text: str, html: str) -> None:
    # no import: outside Jupyter the package must not pull IPython in
    ipython = sys.modules.get("IPython")
    if ipython is None or ipython.get_ipython() is None:
        print(text)
        return
    from IPython.display import display

    display({"text/plain": text, "text/html": html, mime: payload}, raw=True)
