"""What notebook 00 claims about the model: its size, and how far a real person is from it."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from ..evaluation import Claim, bootstrap_interval, check_claim

__all__ = ["parameter_count_claim", "same_answers_claim", "surprise_claim", "throughput_claim"]


def parameter_count_claim(counted: int, by_hand: int) -> Claim:
    """The formula written out by hand gives the number of weights that the model holds."""
    return check_claim(
        f"The formula gives {by_hand:,} weights and the model holds {counted:,}: the difference is 0",
        abs(counted - by_hand),
        below=0,
        kind="deterministic",
    )


def same_answers_claim(together: list[str], alone: list[str]) -> Claim:
    """Greedy answers do not depend on what else is in the batch."""
    same = float(np.mean([a == b for a, b in zip(together, alone, strict=True)]))
    return check_claim(
        "Answers in one batch equal the answers one by one: share of equal answers is 1",
        same,
        above=1,
        kind="deterministic",
    )


def throughput_claim(batched: Float[np.ndarray, " n"], alone: Float[np.ndarray, " n"]) -> Claim:
    """Tokens per second in a batch over tokens per second one by one; runs in turn, shape ``(n,)`` each."""
    ratio = bootstrap_interval(batched, alone, statistic=lambda a, b: a.mean() / b.mean(), unit="times")
    return check_claim(
        "Batching makes generation faster: tokens per second, batch over one by one, is at least 2", ratio, above=2
    )


def surprise_claim(real: Float[np.ndarray, " n"], own: Float[np.ndarray, " n"]) -> Claim:
    """NLL per token of a person's real replies minus that of the model's own answers to the same messages."""
    gap = bootstrap_interval(real, own, statistic=lambda a, b: a.mean() - b.mean(), unit="nats per token")
    return check_claim(
        "A real person's replies surprise the model more than its own answers: the gap is above 0", gap, above=0
    )
