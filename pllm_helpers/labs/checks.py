"""How a check works: ordered probes, each on an input that makes one mistake visible."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

__all__ = ["Mistake", "passed", "probe"]


class Mistake(AssertionError):
    """An answer that is not right yet; the message says what is probably wrong."""


def probe(
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
    expected: Any,
    mistakes: Mapping[str, Any],
    *,
    otherwise: str = "",
    tolerance: float | int = 1e-6,
) -> None:
    """Call ``function`` on a copy of ``arguments`` and compare with ``expected``.

    ``mistakes`` maps a message to the value that this mistake would give on these arguments.
    Raises :class:`Mistake` with the first message that fits, or with ``otherwise``.
    """
    shown = ", ".join(_short(a) for a in arguments)
    name = getattr(function, "__name__", "your function")
    given = copy.deepcopy(arguments)
    try:
        with np.errstate(all="ignore"):
            got = function(*given)
    except NotImplementedError as e:
        raise Mistake(f"{name} is not written yet.") from e
    except Exception as e:
        raise Mistake(f"{name}({shown}) stopped with {type(e).__name__}: {e}. {otherwise}".strip()) from e
    if got is None:
        raise Mistake(f"{name} gives back nothing: is the last line a `return`?")
    if not _same(given, arguments, 0):
        raise Mistake(f"{name} changes its input. Work on a copy, or build new values.")
    if _same(got, expected, tolerance):
        return
    for message, wrong in mistakes.items():
        if _same(got, wrong, tolerance):
            raise Mistake(f"{message} ({name}({shown}) gave {_short(got)}, expected {_short(expected)}.)")
    raise Mistake(f"{name}({shown}) gave {_short(got)}, expected {_short(expected)}. {otherwise}".strip())


def passed(name: str) -> None:
    """Say that an exercise is solved."""
    print(f"Passed: {name}.")


def _same(a: Any, b: Any, tolerance: float | int) -> bool:
    if (
        isinstance(a, (list, tuple))
        and isinstance(b, (list, tuple))
        and any(isinstance(x, (str, dict, list, np.ndarray)) for x in (*a, *b))
    ):
        return len(a) == len(b) and all(_same(x, y, tolerance) for x, y in zip(a, b, strict=True))
    if isinstance(a, (str, dict)) or isinstance(b, (str, dict)):
        return bool(type(a) is type(b) and a == b)
    try:
        x, y = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    except (TypeError, ValueError):
        return bool(a == b)
    return x.shape == y.shape and bool(np.allclose(x, y, rtol=tolerance, atol=tolerance, equal_nan=True))


def _short(value: Any) -> str:
    if isinstance(value, np.ndarray) and value.ndim > 1:
        return f"array of shape {value.shape}"
    if isinstance(value, (float, np.floating)):
        return f"{value:.4g}"
    if isinstance(value, np.ndarray):
        return np.array2string(value, precision=4, threshold=6)
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "…"
