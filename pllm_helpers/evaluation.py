"""Estimates with intervals, and the verdicts that claims get from them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from jaxtyping import Float

from .dialogue import DialogueSet
from .runtime import InputError

if TYPE_CHECKING:
    from .models import LLM

__all__ = ["Estimate", "Claim", "bootstrap_interval", "check_claim", "rank_correlation", "response_nll"]

Number = float | int
Kind = Literal["deterministic", "statistical"]
Verdict = Literal["holds", "fails", "inconclusive"]


@dataclass(frozen=True)
class Estimate:
    """A number with its 95 % interval, the number of rows behind it and the seeds used.

    ``low == high == value`` says that no chance is involved.
    """

    value: Number
    low: Number
    high: Number
    n: int = 1
    seeds: tuple[int, ...] = ()
    unit: str = ""

    def __post_init__(self) -> None:
        if any(math.isnan(x) for x in (self.value, self.low, self.high)):
            raise InputError("Estimate", "expected numbers, got NaN", "Look for an empty or constant sample.")
        if not self.low <= self.high:
            raise InputError("Estimate", f"expected low <= high, got {self.low} > {self.high}")

    @classmethod
    def exact(cls, value: Number, *, n: int = 1, unit: str = "") -> Estimate:
        """A number without chance: the interval is the number itself."""
        return cls(float(value), float(value), float(value), n, (), unit)

    def __str__(self) -> str:
        unit = f" {self.unit}" if self.unit else ""
        if self.low == self.high:
            return f"{self.value:.4g}{unit}"
        return f"{self.value:.4g} [{self.low:.4g}, {self.high:.4g}]{unit} (n = {self.n})"


def bootstrap_interval(
    *samples: Sequence[Any] | np.ndarray,
    statistic: Callable[..., Any] = np.mean,
    seed: int = 0,
    resamples: int = 2000,
    level: Number = 0.95,
    unit: str = "",
) -> Estimate:
    """Percentile bootstrap interval of ``statistic(*samples)``.

    Several samples are resampled *together* (row i of each belongs to the same dialogue), which
    is the paired bootstrap. Resamples on which the statistic is undefined (NaN) are an error,
    not skipped: skipping them would narrow the interval.

    Parameters
    ----------
    samples : one or more sequences of shape ``(n,)``.
    statistic : maps the resampled sequences to one number.
    resamples, level, seed : number of resamples, coverage in (0, 1), random seed.

    Raises :class:`InputError` on empty, unequal or NaN input.
    """
    arrays = [np.asarray(s, dtype=float) for s in samples]
    if not arrays or any(a.ndim != 1 for a in arrays):
        raise InputError("samples", "expected one or more one-dimensional sequences")
    n = len(arrays[0])
    if n < 2 or any(len(a) != n for a in arrays):
        raise InputError("samples", f"expected equal lengths of at least 2, got {[len(a) for a in arrays]}")
    if any(not np.isfinite(a).all() for a in arrays):
        raise InputError("samples", "expected finite numbers, got NaN or infinity")
    if not 0 < level < 1:
        raise InputError("level", f"expected a number between 0 and 1, got {level}")
    rng = np.random.default_rng(seed)
    rows = rng.integers(0, n, size=(resamples, n))
    draws = np.array([statistic(*(a[r] for a in arrays)) for r in rows], dtype=float)
    tail = (1 - level) / 2
    low, high = np.quantile(draws, [tail, 1 - tail])
    return Estimate(float(statistic(*arrays)), float(low), float(high), n, (seed,), unit)


def rank_correlation(x: Sequence[Any] | np.ndarray, y: Sequence[Any] | np.ndarray) -> float:
    """Spearman's rank correlation of two ``(n,)`` sequences; 0 where one of them is constant."""
    import pandas as pd

    a, b = pd.Series(np.asarray(x, float)).rank(), pd.Series(np.asarray(y, float)).rank()
    if a.std() == 0 or b.std() == 0:
        return 0.0
    return float(np.corrcoef(a, b)[0, 1])


@dataclass(frozen=True)
class Claim:
    """A sentence about a number, the bound that makes it true, and the verdict.

    ``holds``: the whole interval lies on the claimed side of the bound; ``fails``: the whole
    interval lies on the other side; ``inconclusive``: it straddles the bound.
    """

    text: str
    kind: Kind
    estimate: Estimate
    verdict: Verdict
    bound: str
    paper: str = ""


def check_claim(
    text: str,
    estimate: Estimate | Number,
    *,
    above: Number | None = None,
    below: Number | None = None,
    kind: str = "statistical",
    paper: str = "",
) -> Claim:
    """Compare an estimate with the claimed bound; give ``above``, ``below`` or both (a range).

    A bound belongs to the claimed side: ``above=0`` holds for an interval that starts at 0.
    ``paper`` quotes what the paper says, with its tag where it could not be verified.
    """
    if above is None and below is None:
        raise InputError("claim", "expected a bound: above=… or below=…")
    if kind not in ("deterministic", "statistical"):
        raise InputError("kind", f"expected 'deterministic' or 'statistical', got {kind!r}")
    e = estimate if isinstance(estimate, Estimate) else Estimate.exact(estimate)
    floor, ceiling = (-math.inf if above is None else above), (math.inf if below is None else below)
    if floor <= e.low and e.high <= ceiling:
        verdict: Verdict = "holds"
    elif e.high < floor or e.low > ceiling:
        verdict = "fails"
    else:
        verdict = "inconclusive"
    bound = " and ".join(
        ([f"at least {above:g}"] if above is not None else []) + ([f"at most {below:g}"] if below is not None else [])
    )
    return Claim(text, kind, e, verdict, bound, paper)


def response_nll(
    llm: LLM,
    dialogues: Sequence[DialogueSet],
    *,
    batch_size: int = 8,
    max_tokens: int = 512,
    progress: bool | None = None,
) -> Float[np.ndarray, " n"]:
    """Mean negative log-likelihood of each reply's tokens, in nats per token; shape ``(n,)``.

    The model sees the question through its chat template; only the answer and its end-of-turn
    token are scored. Logits are computed at answer positions only. Lower means that the model
    expected the reply more.

    Raises :class:`~pllm_helpers.runtime.InputError` if a row lacks a question or an answer, or if
    question and answer together have more than ``max_tokens`` tokens (no silent cutting).
    """
    import torch

    from .models.generation import progress_bar

    rows: list[tuple[list[int], int]] = []
    for place, d in enumerate(dialogues):
        if not d.question.strip() or not d.answer.strip():
            raise InputError(
                f"dialogues[{place}]", "expected a question and an answer, one is blank", "Leave the row out."
            )
        prompt = llm.tokenizer(llm.format_chat(d.question), add_special_tokens=False)["input_ids"]
        answer = llm.tokenizer(d.answer.strip(), add_special_tokens=False)["input_ids"] + llm.stop_ids[:1]
        if len(prompt) + len(answer) > max_tokens:
            raise InputError(
                f"dialogues[{place}]",
                f"expected at most {max_tokens} tokens, got {len(prompt) + len(answer)}",
                "Leave the row out or raise max_tokens.",
            )
        rows.append((prompt + answer, len(answer)))
    out = np.zeros(len(rows))
    order = sorted(range(len(rows)), key=lambda i: len(rows[i][0]))
    pad = llm.tokenizer.pad_token_id or 0
    with progress_bar(len(rows), "scoring", progress) as bar, torch.inference_mode():
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            width = max(len(rows[i][0]) for i in chosen)
            ids = torch.tensor([rows[i][0] + [pad] * (width - len(rows[i][0])) for i in chosen], device=llm.device)
            mask = torch.tensor(
                [[1] * len(rows[i][0]) + [0] * (width - len(rows[i][0])) for i in chosen], device=llm.device
            )
            hidden = llm.model.get_decoder()(input_ids=ids, attention_mask=mask).last_hidden_state
            for row, i in enumerate(chosen):
                length, n = len(rows[i][0]), rows[i][1]
                logits = llm.model.get_output_embeddings()(hidden[row, length - n - 1 : length - 1]).float()
                out[i] = torch.nn.functional.cross_entropy(logits, ids[row, length - n : length]).item()
            bar.update(len(chosen))
    return out
