"""The three buffer metrics of Qin et al.: EOE, DSS with the dominant domain, and IDD.

Scalar functions first, exactly as the formulas stand (``papers``: Qin et al., DAC 2024); their
batched twins live in :mod:`pllm_helpers.selection.scoring`.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Float

from ..runtime import InputError

__all__ = [
    "DEFAULT_READING",
    "READINGS",
    "Mode",
    "Reading",
    "domain_specific_score",
    "dominant_domain",
    "embedding_probabilities",
    "entropy_of_embedding",
    "in_domain_dissimilarity",
]

Reading = Literal["norm", "spectral", "histogram"]
Mode = Literal["paper", "released_code"]
READINGS: tuple[str, ...] = get_args(Reading)
MODES: tuple[str, ...] = get_args(Mode)

DEFAULT_READING: Reading = "spectral"
"""Stays in [0, 1] and puts real messages above repetition by the widest margin (``reading_evidence``, notebook 01)."""

BINS = 100  # of the released code's histogram


def as_array(values: object, what: str, ndim: int) -> Float[np.ndarray, "..."]:
    """fp64 array of ``ndim`` dimensions; refuses NaN, infinity, complex numbers and other shapes."""
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu().resolve_conj()
        values = (values if values.is_complex() else values.to(torch.float64)).numpy()
    try:
        if np.iscomplexobj(values):  # NumPy would drop the imaginary part with no more than a warning
            raise TypeError
        array = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as e:
        raise InputError(what, f"expected numbers, got {type(values).__name__}") from e
    if array.ndim != ndim:
        raise InputError(what, f"expected {ndim} dimension(s), got shape {array.shape}")
    if not np.isfinite(array).all():
        raise InputError(
            what, "expected finite numbers, got NaN or infinity", "Look for an empty text or a diverged model."
        )
    return array


def check_choice(value: str, allowed: Sequence[str], what: str) -> None:
    """Raise :class:`~pllm_helpers.runtime.InputError` unless ``value`` is one of ``allowed``."""
    if value not in allowed:
        raise InputError(what, f"expected one of {', '.join(allowed)}, got {value!r}")


def entropy_of_embedding(
    token_embeddings: Float[np.ndarray, "n d"] | Float[torch.Tensor, "n d"] | Sequence[Any],
    reading: str = DEFAULT_READING,
    *,
    mode: str = "paper",
) -> float:
    """Entropy of embedding, EOE (Qin et al., equation for EOE): −Σ p log p / log n.

    The paper does not say how an embedding becomes a probability p; the readings are

    * ``norm``: p = ‖e‖₂ / Σ‖e‖₂, each token's share of the total length;
    * ``spectral``: p = eigenvalues of UUᵀ/n, rows of U are the tokens scaled to length 1, not
      centred: 0 if all tokens point one way, 1 if all are orthogonal;
    * ``histogram``: what the first author's scripts compute: shares of a 100-bin histogram of the
      components of *one* vector, here the mean token vector, log₂, divided by log₂(n + 1). It can
      exceed 1.

    Parameters
    ----------
    token_embeddings : shape ``(n, d)``, n ≥ 1, without special tokens; NumPy or torch.
    reading : see above.
    mode : ``"released_code"`` is the histogram of the *last* token's vector, whatever ``reading`` is.

    Returns a number in [0, 1] for ``norm`` and ``spectral``; 0 for a single token, and where all
    vectors are zero. Zero vectors among others carry no weight.

    Raises :class:`~pllm_helpers.runtime.InputError` on NaN, infinity, an empty or misshapen input.
    """
    check_choice(reading, READINGS, "reading")
    check_choice(mode, MODES, "mode")
    x = as_array(token_embeddings, "token_embeddings", 2)
    n, d = x.shape
    if n == 0 or d == 0:
        raise InputError(
            "token_embeddings", f"expected at least one token, got shape {x.shape}", "Leave empty texts out."
        )
    if mode == "released_code":
        return _entropy(_histogram(x[-1])) / math.log(2) / math.log2(n + 1)
    p = embedding_probabilities(x, reading)
    if reading == "histogram":
        return _entropy(p) / math.log(2) / math.log2(n + 1)
    return min(1.0, max(0.0, _entropy(p) / math.log(n))) if n > 1 else 0.0  # clipped against rounding only


def embedding_probabilities(
    token_embeddings: Float[np.ndarray, "n d"] | Float[torch.Tensor, "n d"] | Sequence[Any],
    reading: str = DEFAULT_READING,
) -> Float[np.ndarray, " k"]:
    """The p behind a reading of :func:`entropy_of_embedding`, summing to 1.

    ``norm``: one share per token, in their order, k = n. ``spectral``: eigenvalues, largest first,
    k ≤ min(n, d). ``histogram``: k = 100 bins, from the smallest to the largest component. If all
    vectors are zero, one outcome is certain: p = 1, 0, 0 … Arguments and errors as there.
    """
    check_choice(reading, READINGS, "reading")
    x = as_array(token_embeddings, "token_embeddings", 2)
    if not x.size:
        raise InputError(
            "token_embeddings", f"expected at least one token, got shape {x.shape}", "Leave empty texts out."
        )
    if reading == "histogram":
        return _histogram(x.mean(0))
    x = x / (np.abs(x).max() or 1.0)  # squares must not overflow
    lengths = np.linalg.norm(x, axis=1)
    if lengths.sum() == 0:
        return np.eye(1, len(x))[0]
    if reading == "norm":
        return lengths / lengths.sum()
    unit = x[lengths > 0] / lengths[lengths > 0, None]
    small = unit @ unit.T if len(unit) <= x.shape[1] else unit.T @ unit  # both have the same non-zero eigenvalues
    p = np.linalg.eigvalsh(small).clip(min=0)[::-1]
    return p / p.sum()


def _entropy(p: Float[np.ndarray, " k"]) -> float:
    p = p[p > 0]
    return float(-(p * np.log(p)).sum())


def _histogram(vector: Float[np.ndarray, " d"]) -> Float[np.ndarray, " k"]:
    counts, _ = np.histogram(vector, bins=BINS)
    return counts / counts.sum()


def domain_specific_score(tokens: Sequence[str], lexicons: Mapping[str, Collection[str]]) -> float:
    """Domain-specific score, DSS (Qin et al.): (1/m) Σᵢ |T ∩ lᵢ| / n.

    ``tokens`` are counted with multiplicity (a word that occurs twice counts twice) and compared
    as they are: fold the case before (:func:`~pllm_helpers.selection.lexicons.word_tokens` does).
    0 for a text without tokens. Raises :class:`~pllm_helpers.runtime.InputError` without lexicons.
    """
    hits = domain_hits(tokens, lexicons)
    return sum(hits.values()) / len(hits) / len(tokens) if len(tokens) else 0.0


def dominant_domain(tokens: Sequence[str], lexicons: Mapping[str, Collection[str]]) -> str | None:
    """Name of the lexicon with the most tokens, Dom_d = argmax |T ∩ lᵢ| (Qin et al.).

    Ties go to the first lexicon; ``None`` where no token is in any lexicon.
    """
    hits = domain_hits(tokens, lexicons)
    best = max(hits, key=hits.__getitem__)  # max keeps the first of equals
    return best if hits[best] else None


def domain_hits(tokens: Sequence[str], lexicons: Mapping[str, Collection[str]]) -> dict[str, int]:
    """|T ∩ lᵢ| per lexicon, with multiplicity."""
    if isinstance(tokens, str):
        raise InputError("tokens", "expected a list of words, got one text", "Split it: word_tokens(text).")
    if not lexicons:
        raise InputError("lexicons", "expected at least one lexicon, got none")
    hits = {}
    for name, words in lexicons.items():
        if isinstance(words, str):
            raise InputError(f"lexicons[{name!r}]", "expected a collection of words, got one text")
        words = words if isinstance(words, (set, frozenset, dict)) else set(words)
        hits[name] = sum(t in words for t in tokens)
    return hits


def in_domain_dissimilarity(
    embedding: Float[np.ndarray, " d"] | Float[torch.Tensor, " d"] | Sequence[Any],
    same_domain_embeddings: Float[np.ndarray, "r d"] | Float[torch.Tensor, "r d"] | Sequence[Any],
    *,
    mode: str = "paper",
) -> float:
    """In-domain dissimilarity, IDD: (1/R) Σᵢ (1 − cos(E, Eᵢ)) over the R buffered sets of one domain.

    Parameters
    ----------
    embedding : shape ``(d,)``, any length but zero.
    same_domain_embeddings : shape ``(R, d)``; R may be 0.
    mode : ``"released_code"`` gives the mean *similarity*, as the first author's scripts do, and
        0 for an empty domain.

    Returns a number in [0, 2]; 1 for an empty domain: nothing there is like it.

    Raises :class:`~pllm_helpers.runtime.InputError` on NaN, zero vectors or unequal dimensions.
    """
    check_choice(mode, MODES, "mode")
    e = as_array(embedding, "embedding", 1)
    if len(same_domain_embeddings) == 0:
        return 1.0 if mode == "paper" else 0.0
    others = as_array(same_domain_embeddings, "same_domain_embeddings", 2)
    if others.shape[1] != len(e):
        raise InputError("same_domain_embeddings", f"expected {len(e)} dimensions, got {others.shape[1]}")
    largest, peaks = np.abs(e).max(initial=0), np.abs(others).max(axis=1, keepdims=True, initial=0)
    if largest == 0 or (peaks == 0).any():
        raise InputError("embedding", "expected vectors with a direction, got a zero vector", "Leave empty texts out.")
    e, others = e / largest, others / peaks  # squares must neither over- nor underflow
    cosines = others @ e / np.linalg.norm(others, axis=1) / np.linalg.norm(e)
    similarity = float(np.mean(np.clip(cosines, -1, 1)))  # clipped against rounding only
    return similarity if mode == "released_code" else 1.0 - similarity
