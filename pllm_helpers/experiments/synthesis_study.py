"""What notebook 03 claims about annotation and synthesis, each from counts or scores; yields with intervals."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Int

from ..evaluation import Claim, Estimate, bootstrap_interval, check_claim
from ..runtime import InputError

__all__ = [
    "asking_at_the_end_claim",
    "copies_claim",
    "few_shot_claim",
    "kept_reply_claim",
    "nearer_than_unrelated_claim",
    "paper_prompt_claim",
    "restart_claim",
    "rouge_by_hand_claim",
    "yield_interval",
]


def yield_interval(
    passed: Bool[np.ndarray, " k"] | Sequence[bool],
    originals: Sequence[str],
    seed: int = 0,
    unit: str = "of those asked",
) -> Estimate:
    """Share of attempts that passed, with a bootstrap interval over *originals*.

    Attempts on one original resemble each other, so originals are resampled and not attempts:
    ``passed`` and ``originals`` (an id per attempt) have shape ``(k,)``. Raises
    :class:`~pllm_helpers.runtime.InputError` if lengths differ or there are fewer than 2 originals.
    """
    good, tried = _sums(passed, originals)
    return bootstrap_interval(good, tried, statistic=lambda g, t: g.sum() / t.sum(), seed=seed, unit=unit)


def rouge_by_hand_claim(other: str, by_hand: Float[np.ndarray, " n"], theirs: Float[np.ndarray, " n"]) -> Claim:
    """ROUGE-1 written out in the notebook and that of ``other`` agree on every pair of texts."""
    gap = float(np.max(np.abs(by_hand - theirs)))
    return check_claim(
        f"ROUGE-1 by hand equals {other} on {len(by_hand)} pairs of texts: largest difference is at most 1e-9",
        gap,
        below=1e-9,
        kind="deterministic",
    )


def restart_claim(before: Sequence[tuple[str, str]], after: Sequence[tuple[str, str]]) -> Claim:
    """Annotations ``(dialogue id, reply)`` that were acknowledged and are not there, unchanged, after a restart."""
    lost = len(set(before) - set(after))
    return check_claim(
        f"A restart loses no annotation: lost of {len(before)} is 0", lost, below=0, kind="deterministic"
    )


def asking_at_the_end_claim(
    policy: str, at_once: Int[np.ndarray, " runs"], at_end: Int[np.ndarray, " runs"], seed: int = 0
) -> Claim:
    """Requests saved by asking only about what stays, in share of those that asking at once makes; one value a run."""
    saved = bootstrap_interval(
        at_once, at_end, statistic=lambda a, b: 1 - b.sum() / a.sum(), seed=seed, unit="of requests"
    )
    return check_claim(
        f"{policy}: asking at the end saves requests against asking at once: the share saved is at least 0.25",
        saved,
        above=0.25,
        paper="only what stays in the buffer is shown to the user (Qin et al.)",
    )


def paper_prompt_claim(passed: Sequence[bool], originals: Sequence[str], seed: int = 0) -> Claim:
    """Does a model of this size serve the paper's prompt? Half of what was asked is the bound."""
    return check_claim(
        "The paper's prompt works on this model: at least half of what was asked passes the sanity check",
        yield_interval(passed, originals, seed),
        above=0.5,
        paper="prompt recalled, unverified; the paper used a model of 3 billion weights and gives no yield",
    )


def few_shot_claim(
    few_shot: Sequence[bool],
    few_shot_originals: Sequence[str],
    paper: Sequence[bool],
    paper_originals: Sequence[str],
    seed: int = 0,
) -> Claim:
    """Yield of the few-shot prompt minus that of the paper's prompt, paired by original."""
    if set(few_shot_originals) != set(paper_originals):
        raise InputError("originals", "expected the same ones for both prompts, they differ")
    g1, t1 = _sums(few_shot, few_shot_originals)
    g0, t0 = _sums(paper, paper_originals)
    gap = bootstrap_interval(
        g1, t1, g0, t0, statistic=lambda a, n, b, m: a.sum() / n.sum() - b.sum() / m.sum(), seed=seed
    )
    return check_claim("Examples in the prompt raise the yield: few-shot minus paper's prompt is above 0", gap, above=0)


def copies_claim(copied: Float[np.ndarray, " n"], seed: int = 0) -> Claim:
    """Share of copies among the texts that a lower bound alone would accept; one value an original."""
    share = bootstrap_interval(copied, seed=seed, unit="of those above the lower bound")
    return check_claim(
        "A lower bound alone lets copies through: the share above the upper bound is at least 0.05", share, above=0.05
    )


def nearer_than_unrelated_claim(
    accepted: Float[np.ndarray, " n"], unrelated: Float[np.ndarray, " n"], seed: int = 0
) -> Claim:
    """Cosine of accepted texts with their original minus that of other messages with it; one value an original.

    The encoder is a yardstick of its own: the sanity check counts words and knows nothing of it.
    """
    gap = bootstrap_interval(accepted, unrelated, statistic=lambda a, b: a.mean() - b.mean(), seed=seed)
    return check_claim(
        "Accepted texts mean something nearer to their original than other messages do: "
        "the mean difference in cosine is at least 0.2",
        gap,
        above=0.2,
    )


def kept_reply_claim(rewritten: Float[np.ndarray, " n"], original: Float[np.ndarray, " n"], seed: int = 0) -> Claim:
    """NLL per token of the kept reply after the rewritten question minus after its own; one value an original."""
    gap = bootstrap_interval(
        rewritten, original, statistic=lambda a, b: a.mean() - b.mean(), seed=seed, unit="nats per token"
    )
    return check_claim(
        "The kept reply fits the rewritten question as well as its own: the mean rise in NLL is at most 0.1",
        gap,
        below=0.1,
    )


def _sums(values: Sequence[bool] | np.ndarray, originals: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Sum and count per original, in the order of their ids."""
    if len(values) != len(originals):
        raise InputError("originals", f"expected one id per value, got {len(originals)} for {len(values)}")
    names, place = np.unique(np.asarray(originals, dtype=str), return_inverse=True)
    good = np.bincount(place, weights=np.asarray(values, dtype=float), minlength=len(names))
    return good, np.bincount(place, minlength=len(names)).astype(float)
