"""How far a stream is from a shuffled one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence

import numpy as np
from jaxtyping import Float

from ..runtime import InputError

__all__ = ["temporal_correlation"]


def temporal_correlation(labels: Sequence[Hashable], max_lag: int = 1) -> Float[np.ndarray, "{max_lag}"]:
    """Chance-corrected share of neighbours with the same label, for lags 1 to ``max_lag``.

    With ``p_k`` the share of positions i with ``labels[i] == labels[i + k]`` and ``p_0`` what a
    random order of the same labels gives on average, ``sum_l n_l (n_l - 1) / (n (n - 1))``, the
    result is ``(p_k - p_0) / (1 - p_0)``: 1 where neighbours always agree, 0 on average for a
    shuffled stream, negative where they avoid each other. It is the auto-correlation of the
    labels' indicator vectors in the manner of Cohen's kappa.

    Raises :class:`InputError` if ``max_lag`` is not in [1, n) or all labels are equal (there is
    nothing to correlate).
    """
    n = len(labels)
    if not 1 <= max_lag < n:
        raise InputError("max_lag", f"expected a whole number from 1 to {n - 1} for {n} labels, got {max_lag}")
    by_chance = sum(c * (c - 1) for c in Counter(labels).values()) / (n * (n - 1))
    if by_chance == 1:
        raise InputError("labels", "expected at least two different labels, all are equal")
    agree = [np.mean([a == b for a, b in zip(labels, labels[k:], strict=False)]) for k in range(1, max_lag + 1)]
    return (np.array(agree, dtype=float) - by_chance) / (1 - by_chance)
