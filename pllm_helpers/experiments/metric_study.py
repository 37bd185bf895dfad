"""What notebook 01 claims about the buffer metrics of Qin et al., each from arrays of scores."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from ..evaluation import Claim, bootstrap_interval, check_claim, rank_correlation

__all__ = [
    "by_hand_claim",
    "bounded_claim",
    "flat_reading_claim",
    "length_bias_claim",
    "no_hit_claim",
    "redundancy_claim",
    "repetition_claim",
    "sign_flip_claim",
]


def by_hand_claim(name: str, by_hand: Float[np.ndarray, " n"], package: Float[np.ndarray, " n"]) -> Claim:
    """The formula written out in the notebook and the package's function give the same numbers."""
    gap = float(np.max(np.abs(by_hand - package)))
    return check_claim(
        f"{name} by hand equals the package: largest difference is at most 0.00001",
        gap,
        below=1e-5,
        kind="deterministic",
    )


def bounded_claim(name: str, scores: Float[np.ndarray, " n"]) -> Claim:
    """Every score lies in [0, 1]; the value is the distance of the worst one from that range."""
    outside = float(np.max(np.maximum(-scores, scores - 1).clip(min=0)))
    return check_claim(
        f"{name} lies between 0 and 1 on every message: largest excess is 0", outside, below=0, kind="deterministic"
    )


def repetition_claim(
    reading: str, content: Float[np.ndarray, " n"], repeated: Float[np.ndarray, " n"], seed: int = 0
) -> Claim:
    """EOE of a real message minus EOE of its first word repeated to the same length, paired."""
    gap = bootstrap_interval(content, repeated, statistic=lambda a, b: a.mean() - b.mean(), seed=seed)
    return check_claim(
        f"Reading '{reading}' prefers content to repetition: mean difference is above 0",
        gap,
        above=0,
        paper="“the higher, the better” for EOE (Qin et al.)",
    )


def flat_reading_claim(reading: str, scores: Float[np.ndarray, " n"], seed: int = 0) -> Claim:
    """Spread (standard deviation) of EOE over real messages; a score that hardly varies cannot rank."""
    spread = bootstrap_interval(scores, statistic=lambda x: x.std(ddof=1), seed=seed)
    return check_claim(
        f"Reading '{reading}' hardly tells messages apart: standard deviation is below 0.02", spread, below=0.02
    )


def length_bias_claim(
    released: Float[np.ndarray, " n"], ours: Float[np.ndarray, " n"], log_length: Float[np.ndarray, " n"], seed: int = 0
) -> Claim:
    """|Spearman correlation with log length| of the released code's EOE minus that of our default reading."""
    excess = bootstrap_interval(
        released,
        ours,
        log_length,
        seed=seed,
        resamples=1000,
        statistic=lambda a, b, n: abs(rank_correlation(a, n)) - abs(rank_correlation(b, n)),
    )
    return check_claim(
        "The released code's EOE follows text length more than our default reading: excess is above 0", excess, above=0
    )


def no_hit_claim(dss: Float[np.ndarray, " n"], seed: int = 0) -> Claim:
    """Share of messages without a medical or emotional word, on which DSS cannot choose."""
    share = bootstrap_interval((dss == 0).astype(float), seed=seed, unit="of messages")
    return check_claim(
        "Most of a real person's messages hold no medical or emotional word: share is at least 0.5", share, above=0.5
    )


def sign_flip_claim(paper_idd: Float[np.ndarray, " n"], released_idd: Float[np.ndarray, " n"]) -> Claim:
    """The released code stores mean similarity: one minus the paper's in-domain *dis*similarity."""
    gap = float(np.max(np.abs(paper_idd - (1 - released_idd))))
    return check_claim(
        "The released code's IDD is 1 minus the paper's: largest difference is at most 0.00001",
        gap,
        below=1e-5,
        kind="deterministic",
    )


def redundancy_claim(
    a_name: str, a: Float[np.ndarray, " n"], b_name: str, b: Float[np.ndarray, " n"], seed: int = 0
) -> Claim:
    """|Spearman correlation| of two metrics; near 1 means that one of them is superfluous."""
    size = bootstrap_interval(a, b, statistic=lambda x, y: abs(rank_correlation(x, y)), seed=seed, resamples=1000)
    return check_claim(f"{a_name} and {b_name} say different things: |rank correlation| is below 0.5", size, below=0.5)
