"""Checks for the exercises of notebook 01."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .checks import passed, probe


def check_norm_entropy(function: Callable[..., Any]) -> None:
    """``function(vectors)`` of shape ``(n, d)``: EOE with p = token norm / sum of norms."""
    vectors = np.array([[3.0, 4.0], [0.0, 1.0], [2.0, 0.0], [1.0, 1.0]])
    norms = np.linalg.norm(vectors, axis=1)
    p = norms / norms.sum()
    h = float(-(p * np.log(p)).sum())
    square = norms**2 / (norms**2).sum()
    columns = np.linalg.norm(vectors, axis=0)
    q = columns / columns.sum()
    probe(
        function,
        (vectors,),
        h / np.log(4),
        {
            "The minus sign in front of the sum is missing.": -h / np.log(4),
            "Divide by log n, so that long and short texts can be compared.": h,
            "log2 above and log below do not cancel: use one base for both.": h / np.log(2) / np.log(4),
            "log above and log2 below do not cancel: use one base for both.": h / np.log2(4),
            "p is the share of the norm, not of the squared norm.": float(-(square * np.log(square)).sum() / np.log(4)),
            "One norm per token: take it over the last axis (axis=1).": float(-(q * np.log(q)).sum() / np.log(2)),
            "Divided by n; the formula divides by log n.": h / 4,
        },
    )
    probe(
        function,
        (np.array([[1.0, 2.0, 2.0]]),),
        0.0,
        {
            "A single token has log n = 0 in the denominator: its entropy is 0 by definition, return it.": float("nan"),
        },
        otherwise="A single token has entropy 0: treat n = 1 apart.",
    )
    passed("norm_entropy")


def check_domain_score(function: Callable[..., Any]) -> None:
    """``function(tokens, lexicons)``: DSS, the mean over lexicons of the share of tokens inside."""
    lexicons = {"drug": {"ibuprofen", "aspirin"}, "fear": {"afraid"}}
    tokens = ["ibuprofen", "and", "ibuprofen", "i", "am", "afraid", "of", "pills"]
    probe(
        function,
        (tokens, lexicons),
        (2 / 8 + 1 / 8) / 2,
        {
            "A word that occurs twice counts twice: the tokens are a list, not a set.": (1 / 7 + 1 / 7) / 2,
            "A word that occurs twice counts twice.": (1 / 8 + 1 / 8) / 2,
            "Take the mean over the m lexicons, not the sum.": 3 / 8,
            "Divide by the number of tokens, not by the size of the lexicon.": (2 / 2 + 1 / 1) / 2,
            "Divide by the number of tokens, too.": 1.5,
            "DSS is the mean over all lexicons, not the best one.": 2 / 8,
        },
    )
    probe(function, (["hello", "there"], lexicons), 0.0, {}, otherwise="Without a hit the score is 0.")
    passed("domain_score")


def check_dissimilarity(function: Callable[..., Any]) -> None:
    """``function(embedding, others)``, shapes ``(d,)`` and ``(r, d)``: mean of 1 - cosine; 1 if r = 0."""
    e = np.array([1.0, 2.0])
    others = np.array([[2.0, 0.0], [0.0, 3.0], [1.0, -1.0]])
    size, sizes = np.linalg.norm(e), np.linalg.norm(others, axis=1)
    cosine = others @ e / sizes / size
    probe(
        function,
        (e, others),
        float(np.mean(1 - cosine)),
        {
            "This is similarity, as the released code has it: the paper takes 1 minus the cosine.": float(
                cosine.mean()
            ),
            "A cosine divides by both lengths.": float(np.mean(1 - others @ e)),
            "A cosine divides by both lengths; that of `embedding` is missing.": float(np.mean(1 - others @ e / sizes)),
            "A cosine divides by both lengths; those of `others` are missing.": float(np.mean(1 - others @ e / size)),
            "Take the mean over the R sets, not the sum.": float(np.sum(1 - cosine)),
            "Take the mean over all R sets, not the nearest one.": float(np.min(1 - cosine)),
            "Mean of the cosines, not cosine to the mean.": float(
                1 - others.mean(0) @ e / np.linalg.norm(others.mean(0)) / np.linalg.norm(e)
            ),
        },
    )
    probe(
        function,
        (e, np.zeros((0, 2))),
        1.0,
        {
            "An empty domain has no mean: a first dialogue of its domain is as new as can be, return 1.": float("nan"),
            "An empty domain means that nothing like it is there yet: 1, not 0.": 0.0,
        },
        otherwise="With no set of that domain in the buffer the score is 1.",
    )
    passed("in_domain_dissimilarity")
