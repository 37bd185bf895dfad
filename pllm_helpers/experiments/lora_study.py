"""What notebook 04 claims about LoRA, each from arrays that the notebook measured."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

from ..corpora import chitchat_stream
from ..dialogue import DialogueSet
from ..evaluation import Claim, bootstrap_interval, check_claim

__all__ = [
    "answer_share_claim",
    "earlier_and_later",
    "layer_by_hand_claim",
    "loss_by_hand_claim",
    "nll_falls_claim",
    "overfitting_claim",
    "own_adapter_claim",
    "plain_peft_claim",
    "positions_claim",
    "predicted_parameters_claim",
    "predicted_time_claim",
    "recital_claim",
    "resume_claim",
    "shared_gain_claim",
    "trainable_claim",
    "unchanged_start_claim",
]


def earlier_and_later(person: int, messages: int, replies: int) -> tuple[list[DialogueSet], list[DialogueSet]]:
    """What notebook 04 trains on and what it judges by: a person's last ``messages`` usable pairs
    of the stream, and ``replies`` usable pairs spread over the held-out time after it.

    Usable: a question, an answer of at least two words, and together fewer than 400 characters.
    """
    stream = chitchat_stream(person)
    earlier, later = (
        [d for d in part if d.question.strip() and len(d.text) < 400 and len(d.answer.split()) > 1]
        for part in (stream.stream, stream.held_out)
    )
    return earlier[-messages:], later[:: max(1, len(later) // replies)][:replies]


def unchanged_start_claim(before: Float[np.ndarray, "..."], after: Float[np.ndarray, "..."]) -> Claim:
    """With B = 0 the adapted model computes what the base model computes, to the last bit."""
    gap = float(np.max(np.abs(before - after)))
    return check_claim(
        "A fresh adapter changes nothing: largest difference between the logits is 0",
        gap,
        below=0,
        kind="deterministic",
        paper="B = 0 at the start, so that BA = 0 (Hu et al., LoRA, section 4.1)",
    )


def layer_by_hand_claim(by_hand: Float[np.ndarray, "..."], peft: Float[np.ndarray, "..."]) -> Claim:
    """W x + (alpha / r) B A x in two lines, and peft's layer; relative to the largest output."""
    gap = float(np.max(np.abs(by_hand - peft)) / np.max(np.abs(peft)))
    return check_claim(
        "The low-rank update by hand equals peft's layer: largest relative difference is at most 0.00001",
        gap,
        below=1e-5,
        kind="deterministic",
    )


def loss_by_hand_claim(by_hand: float | int, package: float | int) -> Claim:
    """Answer-only cross-entropy of one batch, by hand and as the package trains on it, in nats per token.

    The two pad differently, and bf16 rounds by shape, hence the tolerance.
    """
    return check_claim(
        "The answer-only loss by hand equals the package's: relative difference is at most 0.01",
        abs(by_hand - package) / abs(package),
        below=0.01,
        kind="deterministic",
    )


def trainable_claim(counted: int, by_formula: int) -> Claim:
    """Trained numbers in the saved adapter against the sum of r (d_in + d_out) over its matrices."""
    return check_claim(
        f"The adapter holds {counted:,} numbers and the sum of r(d_in + d_out) is {by_formula:,}: the difference is 0",
        abs(counted - by_formula),
        below=0,
        kind="deterministic",
    )


def predicted_parameters_claim(predicted: Int[np.ndarray, " n"], real: Int[np.ndarray, " n"]) -> Claim:
    """Predicted parameters of several settings against the adapters that were really made."""
    return check_claim(
        f"Predicted parameters equal the real ones in {len(real)} settings: largest difference is 0",
        int(np.max(np.abs(predicted - real))),
        below=0,
        kind="deterministic",
    )


def predicted_time_claim(predicted: Float[np.ndarray, " n"], measured: Float[np.ndarray, " n"]) -> Claim:
    """Seconds per step, predicted over measured, worst setting; a busy machine moves it."""
    ratio = predicted / measured
    worst = float(np.max(np.maximum(ratio, 1 / ratio)))
    return check_claim(
        f"Predicted seconds per step are within a factor of 2 in {len(ratio)} settings: the worst factor is at most 2",
        worst,
        below=2,
    )


def answer_share_claim(answer: Int[np.ndarray, " n"], tokens: Int[np.ndarray, " n"], seed: int = 0) -> Claim:
    """Share of token positions at which a logit is needed; one entry per dialogue."""
    share = bootstrap_interval(
        answer, tokens, statistic=lambda a, b: a.sum() / b.sum(), seed=seed, unit="of all tokens"
    )
    return check_claim(
        "Less than half of the tokens are answer: share of positions with a loss is below 0.5", share, below=0.5
    )


def positions_claim(what: str, before: Float[np.ndarray, " n"], after: Float[np.ndarray, " n"], seed: int = 0) -> Claim:
    """Positions computed per token of dialogue, before and after a change of layout; one entry per shuffle."""
    saved = bootstrap_interval(
        before, after, statistic=lambda a, b: (a - b).mean(), seed=seed, unit="positions per dialogue token"
    )
    return check_claim(f"{what}: positions saved per dialogue token are at least 0.1", saved, above=0.1)


def nll_falls_claim(
    before: Float[np.ndarray, " n"], after: Float[np.ndarray, " n"], who: str = "the person", seed: int = 0
) -> Claim:
    """Fall of the NLL per token on replies that came later than the training data, paired by reply."""
    gain = bootstrap_interval(before, after, statistic=lambda a, b: (a - b).mean(), seed=seed, unit="nats per token")
    return check_claim(f"The adapter makes later replies of {who} less surprising: mean fall is above 0", gain, above=0)


def shared_gain_claim(own: Float[np.ndarray, " n"], other: Float[np.ndarray, " n"], seed: int = 0) -> Claim:
    """Fall of the NLL on another person's replies over the fall on the own ones, under one adapter."""
    share = bootstrap_interval(
        own, other, statistic=lambda a, b: b.mean() / a.mean(), seed=seed, unit="of the own gain"
    )
    return check_claim(
        "Most of what was learned is chat in general: the other person gains at least half as much", share, above=0.5
    )


def own_adapter_claim(own: Float[np.ndarray, " n"], foreign: Float[np.ndarray, " n"], seed: int = 0) -> Claim:
    """NLL of one person's replies under another person's adapter minus under the own one, paired by reply."""
    edge = bootstrap_interval(foreign, own, statistic=lambda a, b: (a - b).mean(), seed=seed, unit="nats per token")
    return check_claim("The own adapter serves a person better than another's: mean edge is above 0", edge, above=0)


def overfitting_claim(best: Float[np.ndarray, " n"], last: Float[np.ndarray, " n"], seed: int = 0) -> Claim:
    """NLL of held-out replies at the end of too long a training minus at its best moment, paired by reply.

    The best moment was chosen on these very replies, which favours the claim a little.
    """
    rise = bootstrap_interval(last, best, statistic=lambda a, b: (a - b).mean(), seed=seed, unit="nats per token")
    return check_claim(
        "Trained on too little for too long, the model gets worse on new replies: mean rise is at least 0.05",
        rise,
        above=0.05,
    )


def recital_claim(said: Sequence[str], written: Sequence[str], seed: int = 0) -> Claim:
    """Training replies that an over-fitted model gives back word for word when asked the same again."""
    same = [a.strip() == b.strip() for a, b in zip(said, written, strict=True)]
    share = bootstrap_interval(same, seed=seed, unit="of the training replies")
    return check_claim(
        "The over-fitted model recites private replies word for word: share is at least half", share, above=0.5
    )


def resume_claim(straight: Float[np.ndarray, " n"], resumed: Float[np.ndarray, " n"]) -> Claim:
    """Losses of an uninterrupted run and of one that was stopped half-way and resumed."""
    return check_claim(
        f"A resumed run repeats the uninterrupted one: largest difference of {len(straight)} losses is 0",
        float(np.max(np.abs(straight - resumed))),
        below=0,
        kind="deterministic",
    )


def plain_peft_claim(package: Float[np.ndarray, "..."], plain: Float[np.ndarray, "..."]) -> Claim:
    """The saved adapter opened by peft alone gives the same logits as the package's way."""
    return check_claim(
        "Plain peft reads the adapter: largest difference between the logits is 0",
        float(np.max(np.abs(package - plain))),
        below=0,
        kind="deterministic",
    )
