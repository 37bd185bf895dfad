"""Checks for the exercises of notebook 00."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .checks import passed, probe


def check_weight_megabytes(function: Callable[..., Any]) -> None:
    """``function(parameters, bits)``: megabytes (10**6 bytes) of that many weights."""
    probe(
        function,
        (8_000_000, 8),
        8.0,
        {
            "That is megabits: a byte has 8 bits.": 64.0,
            "That is bytes: divide by 1,000,000.": 8e6,
            "That is mebibytes (2**20 bytes); a megabyte is 10**6 bytes.": 8e6 / 2**20,
        },
    )
    probe(
        function,
        (135_000_000, 4),
        67.5,
        {
            "Four-bit weights take half a byte each: keep the fraction, use / and not //.": 0.0,
            "The result is cut to a whole number: use / and not //.": 67.0,
            "The number of bits has no effect.": 135.0,
        },
        otherwise="Check the units: weights x bits per weight / 8 bits per byte / 10**6.",
    )
    passed("weight_megabytes")


def check_temperature_softmax(function: Callable[..., Any]) -> None:
    """``function(logits, temperature)``: probabilities, shape ``(v,)``; temperature 0 is greedy."""
    logits = np.array([2.0, 1.0, -1.0])

    def softmax(x: np.ndarray) -> np.ndarray:
        e = np.exp(x - x.max())
        return e / e.sum()

    probe(
        function,
        (logits, 1.0),
        softmax(logits),
        {
            "These are not probabilities yet: divide by their sum.": np.exp(logits),
            "These are log-probabilities: take exp.": np.log(softmax(logits)),
        },
    )
    probe(
        function,
        (logits, 0.5),
        softmax(logits / 0.5),
        {
            "Divide the logits by the temperature; a low temperature must make the peak sharper.": softmax(
                logits * 0.5
            ),
            "The temperature has no effect.": softmax(logits),
            "Divide the logits, not the probabilities.": softmax(logits) / 0.5,
        },
    )
    big = np.array([1000.0, 999.0])
    probe(
        function,
        (big, 1.0),
        softmax(big),
        {
            "exp overflows on large logits: subtract the largest logit first.": np.array([np.nan, np.nan]),
        },
    )
    probe(
        function,
        (logits, 0.0),
        np.array([1.0, 0.0, 0.0]),
        {
            "Temperature 0 divides by zero: give all probability to the largest logit.": np.array([np.nan, 0.0, 0.0]),
        },
        otherwise="Temperature 0 means greedy: all probability on the largest logit.",
    )
    passed("temperature_softmax")
