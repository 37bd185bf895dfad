"""Notebook 06: MeZO as PocketLLM uses it, and its neighbours.

Short runs are measured in the notebook. Longer ones are recorded under ``data/results`` by the
command line, cell by cell, and the notebook reads what is there::

    python -m pllm_helpers.experiments.pocket_study curves      # a person's stream, with learning rates tried
    python -m pllm_helpers.experiments.pocket_study few_shot    # sentiment from a few labelled texts
    python -m pllm_helpers.experiments.pocket_study memory      # peak memory of every method, batch 8 and 64

Stop it at any time: finished cells are kept in the cache, and the same command goes on.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float

from .. import figures
from ..corpora.tasks import load_task
from ..device import PHONES, EnvelopeResult, MemoryPrediction, mark_phase, predict_memory
from ..dialogue import DialogueSet
from ..evaluation import Claim, Estimate, bootstrap_interval, check_claim, paired_difference, response_nll
from ..models import LLM, load_llm
from ..runtime import InputError, cache_dir, data_dir, prepare, processor_name, write_whole
from ..tuning import adapted, perturb_, private_copy, tune_full, tune_lomo, tune_lora, tune_mezo
from ..tuning.data import Row, token_rows
from ..tuning.forward import plain_objective
from ..tuning.mezo import AnswerLoss
from ..tuning.packed import shared_beginning
from ..tuning.perturb import chunks, noise_source
from ..tuning.prompts import REVIEW, PromptTask, classify
from .device_study import DeviceTable, Measured, load_table
from .lora_study import earlier_and_later

if TYPE_CHECKING:
    from ..tuning import TuningResult

__all__ = [
    "EXPERIMENTS",
    "LEDGER",
    "MEMORY_METHODS",
    "MODEL_NAMES",
    "PAPER",
    "RATES",
    "Plan",
    "TUNERS",
    "Alignment",
    "LedgerRow",
    "PocketRun",
    "Surface",
    "Trial",
    "accuracy_gain_claim",
    "adam_killed_claim",
    "align",
    "alignment_claim",
    "batch_growth_claim",
    "best_rate",
    "epsilon_claim",
    "even_dialogues",
    "exact_fits_claim",
    "few_shot_trial",
    "gradient_wins_claim",
    "growing_subsets",
    "how_to_measure",
    "in_pocket",
    "ledger",
    "log_size_claim",
    "loss_falls_claim",
    "measured_sizes",
    "memory_table",
    "mezo_by_hand_claim",
    "mezo_trains_claim",
    "paper_memory_claim",
    "personal_trial",
    "predicted_for",
    "predicted_slope_claim",
    "prediction_claim",
    "rates_table",
    "recorded",
    "replay_claim",
    "run_experiment",
    "sentiment_texts",
    "sizes",
    "trials",
    "weights_by_hand_claim",
    "weights_gap",
]

Number = float | int
Say = Callable[[str], None]
LIMIT_MB = PHONES["1 GB app"].limit_mb
MODEL_NAMES = {"smollm2-135m": "SmolLM2-135M", "roberta-large": "RoBERTa-large", "opt-1.3b": "OPT-1.3B"}
CODE_VERSION = 2  # raise it when a change of code changes what a cell measures

# ---------------------------------------------------------------- data


def even_dialogues(llm: LLM, dialogues: Sequence[DialogueSet], count: int, tokens: int = 64) -> list[DialogueSet]:
    """The ``count`` dialogues whose length with the template is nearest to ``tokens``: a batch with little padding."""
    rows = token_rows(llm, dialogues, 1 << 20).rows
    if not 1 <= count <= len(rows):
        raise InputError("count", f"expected 1 to {len(rows)}, the dialogues given, got {count}")
    nearest = np.argsort([abs(len(r.ids) - tokens) for r in rows], kind="stable")[:count]
    return [dialogues[i] for i in sorted(nearest.tolist())]


def sentiment_texts(split: str, count: int, *, source: str = "", seed: int = 0) -> tuple[list[str], list[str]]:
    """Texts of the sentiment task and their labels, ``count`` drawn from ``split``; ``source``: SST-2, where it is.

    A single file of SST-2 has no splits. It gets them here: a fixed half of its texts of at least six
    words is for the test (SST-2 holds pieces of its sentences, too), and what remains of the other half
    without every text that is part of a test text or has one as its part is for training.

    Raises :class:`~pllm_helpers.runtime.InputError` as :func:`~pllm_helpers.corpora.tasks.load_task` does.
    """
    rows = load_task("sentiment", split, source=source or None)
    if source and Path(source).expanduser().is_file():
        rows = _own_split(rows, split)
    order = np.random.default_rng([seed, len(rows)]).permutation(len(rows))[:count]
    chosen = [rows[i] for i in sorted(order.tolist())]
    return [d.meta["text"] for d in chosen], [d.meta["label"] for d in chosen]


def _own_split(rows: Sequence[DialogueSet], split: str) -> list[DialogueSet]:
    rows = list({d.meta["text"]: d for d in rows if len(d.meta["text"].split()) >= 6}.values())
    order = np.random.default_rng(0).permutation(len(rows))
    test, rest = ([rows[i] for i in part] for part in (order[: len(rows) // 2], order[len(rows) // 2 :]))
    if split == "test":
        return test
    judged = [d.meta["text"] for d in test]
    return [d for d in rest if not any(t in d.meta["text"] or d.meta["text"] in t for t in judged)]


# ---------------------------------------------------------------- the loss around the weights


class Surface:
    """The loss of one batch around the weights of a model: a private copy that is walked in place and comes back."""

    def __init__(self, llm: LLM, rows: Sequence[Row]):
        self.llm = private_copy(llm, "fp32")
        self.llm.model.requires_grad_(False)
        # PyTorch leaves the padding token's row out of an embedding's gradient, and here that token also ends
        # every turn: its part would be missing from the gradient of the loss that is measured
        self.llm.model.get_input_embeddings().padding_idx = None
        self.parameters = list(self.llm.model.parameters())
        self.rows, self._measure = list(rows), AnswerLoss(self.llm)

    def loss(self) -> float:
        """Mean NLL per answer token where the weights are now."""
        return self._measure.mean(self.rows)

    def along(self, seed: int, places: Sequence[Number], noise: str = "gaussian") -> list[float]:
        """Loss at ``θ + place · z(seed)`` for each place; the weights come back, up to rounding."""
        where, found = 0.0, []
        try:
            for place in places:
                if place != where:
                    perturb_(self.parameters, seed, place - where, noise)
                    where = float(place)
                found.append(self.loss())
        finally:
            if where:
                perturb_(self.parameters, seed, -where, noise)
        return found

    def move(self, seed: int, scale: Number, noise: str = "gaussian") -> None:
        """``θ ← θ + scale · z(seed)``."""
        perturb_(self.parameters, seed, scale, noise)

    def gradient(self) -> list[torch.Tensor]:
        """The exact gradient of :meth:`loss`, one tensor per parameter (4 bytes each: as much as the model)."""
        answers = sum(r.answer for r in self.rows)
        self.llm.model.requires_grad_(True)
        try:  # the packed blocks that measure the loss know no gradient of the weights themselves
            nll = plain_objective(self.llm.model, self.llm.tokenizer.pad_token_id or 0)(self.rows)
            (nll.double().sum() / answers).backward()
            return [p.grad.detach() for p in self.parameters if p.grad is not None]
        finally:
            self.llm.model.requires_grad_(False)
            for p in self.parameters:
                p.grad = None


# ---------------------------------------------------------------- gradient alignment


def growing_subsets(model: Any) -> dict[str, list[int]]:
    """Ever larger subsets of a Llama's parameters, as positions in ``model.parameters()``; the last one is all.

    A norm, a matrix, a block, a third of the blocks, everything.
    """
    names = [n for n, _ in model.named_parameters()]
    depth = model.config.get_text_config().num_hidden_layers

    def having(*parts: str) -> list[int]:
        return [i for i, n in enumerate(names) if any(p in n for p in parts)]

    top = [f".layers.{k}." for k in range(depth - 1, -1, -1)]
    return {
        "a norm": having(f"{top[0]}input_layernorm"),
        "a matrix": having(f"{top[0]}self_attn.k_proj"),
        "a block": having(top[0]),
        "a third of the blocks": having(*top[: max(2, depth // 3)]),
        "all weights": list(range(len(names))),
    }


@dataclass(frozen=True)
class Alignment:
    """Estimated gradients of one subset of ``dimension`` weights against the exact one.

    ``cosines``: cos(ĝ, ∇L) per seed; ``slopes``: the two-point slopes g; ``exact``: z · ∇L.
    """

    name: str
    dimension: int
    cosines: Float[np.ndarray, " seeds"]
    slopes: Float[np.ndarray, " seeds"]
    exact: Float[np.ndarray, " seeds"]

    @property
    def expected(self) -> float:
        """Mean cosine of a random direction, its sign corrected: √(2 / πd)."""
        return math.sqrt(2 / (math.pi * self.dimension))


def align(
    surface: Surface,
    gradient: Sequence[torch.Tensor],
    which: Mapping[str, Sequence[int]],
    *,
    seeds: int,
    epsilon: Number = 1e-3,
    noise: str = "gaussian",
) -> list[Alignment]:
    """cos(ĝ, ∇L) for ``seeds`` seeds and each subset of parameters; only the subset is perturbed.

    ĝ = g z with g from two real forward passes, ∇L from one backward pass (``surface.gradient()``).
    """
    found = []
    for name, places in which.items():
        parameters, exact = [surface.parameters[i] for i in places], [gradient[i] for i in places]
        norm = math.sqrt(sum(g.double().square().sum().item() for g in exact))
        if not norm:
            raise InputError("gradient", f"expected one that is not zero on {name!r}")
        slopes, dots, cosines = [], [], []
        for seed in range(seeds):
            values = []
            for scale in (epsilon, -2 * epsilon):
                perturb_(parameters, seed, scale, noise)
                values.append(surface.loss())
            perturb_(parameters, seed, epsilon, noise)
            slopes.append((values[0] - values[1]) / (2 * epsilon))
            dot, length = _projection(exact, seed, noise)
            dots.append(dot)
            cosines.append(math.copysign(1.0, slopes[-1]) * dot / (length * norm))
        dimension = sum(p.numel() for p in parameters)
        found.append(Alignment(name, dimension, np.array(cosines), np.array(slopes), np.array(dots)))
    return found


def _projection(gradient: Sequence[torch.Tensor], seed: int, noise: str) -> tuple[float, float]:
    """z · gradient and |z|, with z drawn piece by piece as the walk draws it."""
    source = noise_source(noise, seed, gradient[0].device)
    dot = square = 0.0
    for g in gradient:
        for piece in chunks(g):
            z = torch.empty_like(piece)
            source.fill(z)
            dot += torch.dot(z, piece).item()
            square += torch.dot(z, z).item()
    return dot, math.sqrt(square)


# ---------------------------------------------------------------- memory


@dataclass(frozen=True)
class Tuner:
    """How one method is called here: its function, its learning rate (LoRA, MeZO: one of ``RATES``), settings.

    ``predicted``: its name in :func:`~pllm_helpers.device.predict_memory`.
    """

    tune: Callable[..., Any]
    lr: float
    settings: Mapping[str, Any]
    predicted: str


TUNERS: Mapping[str, Tuner] = {
    "adam": Tuner(tune_full, 1e-5, {"optimizer": "adam"}, "adam"),
    "sgd": Tuner(tune_full, 1e-2, {"optimizer": "sgd"}, "sgd"),
    "lomo": Tuner(tune_lomo, 1e-2, {}, "lomo"),
    "lora": Tuner(tune_lora, 5e-3, {}, "lora_adam"),
    "lora_checkpointed": Tuner(tune_lora, 5e-3, {"frugal": "checkpoint"}, "lora_checkpointed"),
    "lora_streamed": Tuner(tune_lora, 5e-3, {"frugal": "stream"}, "lora_streamed"),
    "mezo": Tuner(tune_mezo, 1e-5, {}, "mezo"),
    "mezo_lora": Tuner(tune_mezo, 3e-4, {"parameters": "lora"}, "mezo_lora"),
}
MEMORY_METHODS = ("adam", "sgd", "lora", "lora_checkpointed", "lora_streamed", "lomo", "mezo", "mezo_lora")


def _tuner(method: str) -> Tuner:
    if method not in TUNERS:
        raise InputError("method", f"expected one of {', '.join(TUNERS)}, got {method!r}")
    return TUNERS[method]


def memory_table(
    model: LLM | str,
    *,
    batches: Sequence[int] = (8, 64),
    tokens: int = 64,
    answer_tokens: int = 16,
    dtype: str = "fp32",
    limit_mb: Number | None = None,
    methods: Sequence[str] = MEMORY_METHODS,
) -> pd.DataFrame:
    """Predicted peak memory (MB above imports) per method and batch, and what a limit does to it.

    Columns ``method, batch, total`` and the parts of
    :class:`~pllm_helpers.device.MemoryPrediction`; ``fits`` where ``limit_mb`` is given.
    """
    rows = []
    for method in methods:
        for batch in batches:
            found = _prediction(model, method, batch, tokens, answer_tokens, dtype)
            row = {"method": method, "batch": batch, "total": found.total, **found.parts}
            rows.append(row | ({} if limit_mb is None else {"fits": bool(found.total <= limit_mb)}))
    return pd.DataFrame(rows)


def sizes(table: pd.DataFrame, limit_mb: Number) -> pd.DataFrame:
    """A memory table for reading: gigabytes per method (rows) and batch, "killed" where over the limit.

    ``table`` needs the columns ``method, batch, total`` (MB).
    """
    shown = table.assign(
        text=[f"{mb / 1024:.2f}" + (" killed" if mb > limit_mb else "") for mb in table["total"]],
        name=[figures.method(m).name for m in table["method"]],
    )
    order = list(dict.fromkeys(shown.sort_values(["batch", "total"])["name"]))
    wide = shown.pivot(index="name", columns="batch", values="text").loc[order].fillna("–")
    return wide.rename(columns=lambda b: f"batch {b}, GB").rename_axis(index=None, columns=None)


def measured_sizes(table: DeviceTable) -> pd.DataFrame:
    """Measured and predicted peaks of the recorded experiment ``memory``: ``method, batch, total, predicted`` in MB.

    Runs that did not finish on the recording machine are left out.
    """
    done = [c for c in table.cells if c.facts["status"] == "finished"]
    rows = [(c.labels["method"], c.labels["batch"], c.facts["peak_mb"], c.facts["predicted_mb"]) for c in done]
    return pd.DataFrame(rows, columns=["method", "batch", "total", "predicted"])


def _prediction(
    model: LLM | str, method: str, batch: int, tokens: int, answers: int, dtype: str, shared: int = 0
) -> MemoryPrediction:
    return predict_memory(
        model,
        method=_tuner(method).predicted,
        dtype=dtype,
        batch=batch,
        tokens=tokens,
        answer_tokens=answers,
        shared_tokens=shared,
    )


@dataclass(frozen=True)
class PocketRun:
    """What a run in an envelope sends home: no weights, only what describes them.

    ``log``: the replay log's bytes (MeZO); ``tuned_hash``: of the weights it ended with;
    ``tokens``, ``answer_tokens``, ``shared_tokens``: of the batch, for the prediction.
    """

    losses: list[float]
    log: bytes
    tuned_hash: str
    tokens: int
    answer_tokens: int
    shared_tokens: int


def in_pocket(method: str, llm: LLM, dialogues: Sequence[DialogueSet], **settings: Any) -> PocketRun:
    """Tune with one method; made to be the function of a :class:`~pllm_helpers.device.PhoneEnvelope`.

    ``settings`` go to the tuner (steps, seed, batch_size, …); the learning rate is that of ``TUNERS``
    unless given. The weights stay where they are.
    """
    tuner = _tuner(method)
    with mark_phase("prepare"):
        rows = token_rows(llm, dialogues, 512).rows
    given = {"lr": tuner.lr, "progress": False, **tuner.settings, **settings}
    with mark_phase("train"):
        result = tuner.tune(llm, dialogues, **given)
    return PocketRun(
        list(result.losses),
        result.log.to_bytes() if result.log is not None else b"",
        str(result.card.get("tuned_hash", "")),
        max(len(r.ids) for r in rows),
        max(r.answer for r in rows),
        shared_beginning(rows),
    )


def predicted_for(llm: LLM, method: str, run: PocketRun, batch: int, dtype: str = "fp32") -> MemoryPrediction:
    """The prediction for the batches of ``run``."""
    return _prediction(llm, method, batch, run.tokens, run.answer_tokens, dtype, run.shared_tokens)


def weights_gap(a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor]) -> float:
    """Largest difference between weights of the same names, relative to the weight, which counts as at least 0.01."""
    if set(a) != set(b) or not a:
        raise InputError("weights", "expected two sets of weights with the same names")
    return max(((a[k] - b[k]).abs() / b[k].abs().clamp(min=0.01)).max().item() for k in a)


# ---------------------------------------------------------------- trials: what tuning gains


@dataclass(frozen=True)
class Trial:
    """One tuning run judged on data that it has not seen.

    ``before`` and ``after``: per held-out dialogue its NLL per token, or per text 1.0 where the
    label is right. ``cpu_seconds``: per step, the median over the steps without a look.
    ``looks``: (step, held-out loss), step 0 is the base model.
    """

    method: str
    seed: int
    lr: float
    losses: list[float]
    looks: list[tuple[int, float]]
    cpu_seconds: float
    before: Float[np.ndarray, " n"]
    after: Float[np.ndarray, " n"]

    @property
    def steps(self) -> int:
        return len(self.losses)

    def seconds(self) -> list[float]:
        """CPU seconds of training until each look."""
        return [step * self.cpu_seconds for step, _ in self.looks]


def _clocked(looks: int, steps: int) -> tuple[dict[str, Any], Callable[[], float]]:
    """Arguments for a tuner that take the CPU time of every step, and what a step took, held-out looks apart."""
    every = max(1, steps // looks) if looks else 0
    clock: list[float] = [time.process_time()]

    def stepped(step: int, *_: Any) -> None:
        clock.append(time.process_time())

    def per_step() -> float:
        spent = np.diff(clock)
        # the first step has the set-up before it, a look comes before its step's call
        free = [s for k, s in enumerate(spent, 1) if k > 1 and not (every and (k % every == 0 or k == len(spent)))]
        return float(np.median(free if free else spent))

    return {"progress": stepped, **({"evaluate_every": every} if every else {})}, per_step


def _trial(
    llm: LLM,
    method: str,
    train: Sequence[DialogueSet],
    held: Sequence[DialogueSet],
    score: Callable[[LLM], np.ndarray],
    before: np.ndarray,
    steps: int,
    seed: int,
    lr: Number | None,
    looks: int,
    settings: Mapping[str, Any],
) -> tuple[Trial, TuningResult]:
    tuner = _tuner(method)
    rate = float(tuner.lr if lr is None else lr)
    if tuner.tune is not tune_mezo:
        settings = {k: v for k, v in settings.items() if k not in ("noise", "epsilon")}
    watched, per_step = _clocked(looks, steps)
    if looks:
        watched |= {"held_out": held}
    result = tuner.tune(llm, train, **{**tuner.settings, **settings, **watched}, steps=steps, seed=seed, lr=rate)
    with adapted(llm, result) as tuned:
        after = score(tuned)
    found = Trial(method, seed, rate, list(result.losses), list(result.held_out), per_step(), before, after)
    return found, result


def personal_trial(
    llm: LLM,
    method: str,
    earlier: Sequence[DialogueSet],
    later: Sequence[DialogueSet],
    *,
    steps: int,
    seed: int = 0,
    lr: Number | None = None,
    looks: int = 0,
    before: Float[np.ndarray, " n"] | None = None,
    **settings: Any,
) -> Trial:
    """Tune on a person's ``earlier`` replies, judge by the NLL of the ``later`` ones.

    ``looks``: how often the held-out loss is measured on the way; ``before``: the NLL of the start,
    if known (the model under an adapter, its fp32 copy where all weights are tuned: rounding alone
    moves it by more than a few steps do). ``settings`` go to the tuner.
    """

    def score(model: LLM) -> np.ndarray:
        return response_nll(model, later, progress=False)

    base = score(_start(llm, method)) if before is None else before
    return _trial(llm, method, earlier, later, score, base, steps, seed, lr, looks, settings)[0]


def few_shot_trial(
    llm: LLM,
    method: str,
    train: tuple[Sequence[str], Sequence[str]],
    test: tuple[Sequence[str], Sequence[str]],
    *,
    shots: int,
    steps: int,
    seed: int = 0,
    lr: Number | None = None,
    looks: int = 0,
    task: PromptTask = REVIEW,
    before: Float[np.ndarray, " n"] | None = None,
    **settings: Any,
) -> Trial:
    """Tune on ``shots`` texts per label in prompt form, judge by the labels of the ``test`` texts.

    ``train`` and ``test`` are (texts, labels). The held-out loss of the looks is the NLL of the
    right word on the test texts.
    """
    rows, held = task.few_shot(*train, shots, seed), task.dialogues(*test)

    def score(model: LLM) -> np.ndarray:
        return classify(model, test[0], task).hits(test[1])

    base = score(_start(llm, method)) if before is None else before
    return _trial(llm, method, rows, held, score, base, steps, seed, lr, looks, settings)[0]


def _start(llm: LLM, method: str) -> LLM:
    """What a method starts from: all weights in fp32, or the model as it is under an adapter."""
    adapter = _tuner(method).tune is tune_lora or _tuner(method).settings.get("parameters") == "lora"
    return llm if adapter else private_copy(llm, "fp32")


# ---------------------------------------------------------------- claims


def mezo_by_hand_claim(by_hand: Float[np.ndarray, " n"], package: Float[np.ndarray, " n"]) -> Claim:
    """Slopes g of the first steps, written out by hand and by the package; relative to the largest.

    The two add the same numbers in another order, and a slope is a small difference of losses.
    """
    gap = float(np.max(np.abs(by_hand - package)) / np.max(np.abs(package)))
    return check_claim(
        "A MeZO step by hand equals the package's: largest relative difference between the slopes is at most 0.02",
        gap,
        below=0.02,
        kind="deterministic",
        paper="MeZO, algorithm 1 (Malladi et al. 2023)",
    )


def weights_by_hand_claim(gap: Number) -> Claim:
    """:func:`weights_gap` between the weights after the steps by hand and by the package."""
    return check_claim(
        "The tuned weights by hand equal the package's: largest relative difference of any weight is at most 0.00001",
        float(gap),
        below=1e-5,
        kind="deterministic",
    )


def predicted_slope_claim(slopes: Float[np.ndarray, " n"], exact: Float[np.ndarray, " n"], seed: int = 0) -> Claim:
    """The two-point slope against z · ∇L from one backward pass: root mean square error over root mean square."""
    error = bootstrap_interval(
        slopes, exact, statistic=lambda a, b: math.sqrt(np.mean((a - b) ** 2) / np.mean(b**2)), seed=seed
    )
    return check_claim(
        "Two forward passes give the slope along z that backpropagation gives: relative error is at most 0.2",
        error,
        below=0.2,
    )


def alignment_claim(
    dimension: Float[np.ndarray, " subsets"], cosines: Float[np.ndarray, "subsets seeds"], seed: int = 0
) -> Claim:
    """Slope of log mean |cos(ĝ, ∇L)| against log d; resampled over seeds within each subset."""
    x, size = np.log(dimension), np.abs(cosines)
    rng = np.random.default_rng(seed)

    def slope(values: np.ndarray) -> float:
        return float(np.polyfit(x, np.log(values.mean(1)), 1)[0])

    n = size.shape[1]
    draws = [slope(np.stack([row[rng.integers(0, n, n)] for row in size])) for _ in range(2000)]
    low, high = np.quantile(draws, [0.025, 0.975])
    found = Estimate(slope(size), float(low), float(high), size.size, (seed,), "power of d")
    return check_claim(
        "The estimate's cosine with the gradient falls like one over the root of the dimension: "
        "power of d is between -0.6 and -0.4",
        found,
        above=-0.6,
        below=-0.4,
        paper="MeSP (arXiv 2602.13069) reports about 0.001 inside LoRA",
    )


def epsilon_claim(epsilons: Float[np.ndarray, " n"], errors: Float[np.ndarray, " n"]) -> Claim:
    """Error of the slope by epsilon: the smallest one of those in between over the smaller one at the two ends."""
    order = np.argsort(epsilons)
    found = errors[order]
    return check_claim(
        "Too near and too far are both wrong: the smallest error in between over that at the better end is at most 0.5",
        float(found[1:-1].min() / min(found[0], found[-1])),
        below=0.5,
        paper="MeZO's code probes at epsilon = 0.001 on RoBERTa-large and OPT",
    )


def mezo_trains_claim(result: EnvelopeResult) -> Claim:
    """Peak memory of MeZO over all weights in the envelope; infinite if it did not finish."""
    peak = result.peak_mb if result.status == "finished" else math.inf
    return check_claim(
        f"MeZO tunes all fp32 weights inside the envelope: it finishes, peak memory is at most {result.limit_mb:g} MB",
        peak,
        below=result.limit_mb,
        kind="deterministic",
        paper="PocketLLM, abstract: RoBERTa-large with about 4 GB, OPT-1.3B with about 6.5 GB",
    )


def adam_killed_claim(result: EnvelopeResult) -> Claim:
    """The signal that ended Adam over all weights in the same envelope; 9 is SIGKILL, 0 no signal at all."""
    killed = result.status == "killed"
    return check_claim(
        "Adam over all weights is killed in the same envelope: the signal that ends it is 9 (SIGKILL)",
        float(result.signal or 0) if killed else 0.0,
        above=9,
        below=9,
        kind="deterministic",
        paper="PocketLLM, public summary: gradient-based methods run out of memory",
    )


def prediction_claim(predicted: Float[np.ndarray, " n"], measured: Float[np.ndarray, " n"]) -> Claim:
    """Predicted over measured peak memory, worst case."""
    worst = float(np.max(np.abs(predicted / measured - 1)))
    return check_claim(
        f"Predicted peaks are right: the largest relative gap in {len(measured)} measured settings is at most 0.1",
        worst,
        below=0.1,
    )


def replay_claim(trained: str, rebuilt: str) -> Claim:
    """Hash of all weights at the end of training and of those rebuilt from the log; 0 = equal."""
    return check_claim(
        "The log rebuilds the tuned weights bit for bit: number of differing hashes is 0",
        float(trained != rebuilt or not trained),
        below=0,
        kind="deterministic",
    )


def log_size_claim(header: int, per_step: int, steps: int = 200) -> Claim:
    """Bytes of a log with one direction a step."""
    return check_claim(
        f"A log of {steps} steps is small: at most 5,000 bytes",
        float(header + per_step * steps),
        below=5000,
        kind="deterministic",
        paper="a seed and a scalar per step are enough (Malladi et al.)",
    )


def batch_growth_claim(mezo: Number, adam: Number) -> Claim:
    """How many times the predicted memory of batch 8 is that of batch 64, MeZO's over Adam's."""
    return check_claim(
        "A larger batch costs MeZO less than Adam: its growth from batch 8 to 64 over Adam's growth is at most 1",
        float(mezo / adam),
        below=1,
        kind="deterministic",
    )


def paper_memory_claim(model: str, predicted_mb: Number, paper_mb: Number) -> Claim:
    """Predicted MeZO memory at the paper's model against the paper's number, in MB.

    The paper's number is of a whole run on a phone; ours counts from the memory after imports.
    """
    return check_claim(
        f"MeZO on {model} at its true shapes takes no more than in the paper: predicted MB are at most {paper_mb:,.0f}",
        float(predicted_mb),
        below=float(paper_mb),
        paper=f"PocketLLM, abstract: about {paper_mb / 1024:g} GB",
    )


def exact_fits_claim(predicted_mb: Number, limit_mb: Number) -> Claim:
    """Predicted peak of exact LoRA gradients with checkpointing in the same budget."""
    return check_claim(
        f"Exact gradients inside LoRA fit the same budget: predicted peak is at most {limit_mb:g} MB",
        float(predicted_mb),
        below=float(limit_mb),
        paper="MeBP (arXiv 2510.03425): LoRA with exact gradients below 1 GB",
    )


def loss_falls_claim(
    what: str, before: Float[np.ndarray, "..."], after: Float[np.ndarray, "..."], seed: int = 0
) -> Claim:
    """Fall of the NLL on held-out dialogues, shape (n,) or (seeds, n), paired by dialogue and seed."""
    fall = paired_difference(before, after, seed, unit="nats per token")
    return _above_zero(check_claim(f"{what} lowers the held-out loss: mean fall is above 0", fall, above=0))


def gradient_wins_claim(
    exact: Float[np.ndarray, "..."], mezo: Float[np.ndarray, "..."], steps: int, seed: int = 0
) -> Claim:
    """Change of the held-out NLL by as many steps of MeZO and of exact LoRA gradients, paired by dialogue."""
    edge = paired_difference(mezo, exact, seed, unit="nats per token")
    claim = check_claim(
        f"After {steps} steps each, exact gradients are ahead of MeZO: mean edge on held-out replies is above 0",
        edge,
        above=0,
        paper="PocketLLM, public summary: longer convergence times",
    )
    return _above_zero(claim)


def _above_zero(claim: Claim) -> Claim:
    """A claim of ``above=0`` that an interval touching zero does not satisfy: no change at all fails it."""
    e = claim.estimate
    verdict = "holds" if e.low > 0 else "fails" if e.high <= 0 else "inconclusive"
    return replace(claim, verdict=verdict, bound="above 0")


def accuracy_gain_claim(
    what: str, before: Float[np.ndarray, "..."], after: Float[np.ndarray, "..."], seed: int = 0
) -> Claim:
    """Rise of the share of right labels, shape (n,) or (seeds, n), paired by text and seed."""
    rise = paired_difference(after, before, seed, unit="of the texts")
    return check_claim(f"{what} labels new texts better than the base: mean rise is at least 0.01", rise, above=0.01)


# ---------------------------------------------------------------- the paper beside us

# model -> megabytes of the paper's abstract (arXiv 2407.01031)
PAPER: Mapping[str, Number] = {"roberta-large": 4 * 1024, "opt-1.3b": 6.5 * 1024}


@dataclass(frozen=True)
class LedgerRow:
    """A sentence of the paper, where it stands, and what we say to it."""

    key: str
    paper: str
    source: str
    note: str = ""


SUMMARY = "public summary (sciencestack.ai)"
LEDGER: tuple[LedgerRow, ...] = (
    LedgerRow("adam", "Derivative-based fine-tuning runs out of memory on the phone", SUMMARY),
    LedgerRow("mezo", "MeZO tunes the same model within the phone's memory", "abstract"),
    LedgerRow("roberta-large", "RoBERTa-large takes about 4 GB", "abstract"),
    LedgerRow("opt-1.3b", "OPT-1.3B takes about 6.5 GB", "abstract"),
    LedgerRow("gain", "The loss falls meaningfully", SUMMARY),
    LedgerRow("longer", "It takes longer to converge", SUMMARY),
    LedgerRow("exact", "(the reading that only derivative-free tuning fits) exact LoRA gradients fit, too", "MeBP"),
    LedgerRow(
        "hardware", "A significant gap to GPUs remains", SUMMARY, "not measured: neither a phone nor a GPU at hand"
    ),
    LedgerRow(
        "batch",
        "Adam fits at batch 8 and not at 64; MeZO takes about 4 GB at both",
        "recalled, unverified",
        "not judged: the paper's table could not be read",
    ),
    LedgerRow(
        "seconds",
        "About 97 s a step for RoBERTa-large, about 1,800 s for OPT-1.3B",
        "recalled, unverified",
        "not judged: the paper's table could not be read",
    ),
)


def ledger(claims: Mapping[str, Claim]) -> pd.DataFrame:
    """The paper's sentences, each with our verdict and number; what was not measured is said.

    ``claims`` maps keys of :data:`LEDGER` to claims made on the way; others stay "not measured".
    Raises :class:`~pllm_helpers.runtime.InputError` on a key without a row.
    """
    unknown = set(claims) - {row.key for row in LEDGER}
    if unknown:
        raise InputError("claims", f"expected keys of LEDGER, got {', '.join(sorted(unknown))}")
    rows = []
    for row in LEDGER:
        claim = claims.get(row.key)
        verdict = claim.verdict if claim else "not judged" if row.note else "not measured"
        ours = str(claim.estimate) if claim else row.note
        rows.append({"the paper": row.paper, "source": row.source, "here": verdict, "measured": ours})
    return pd.DataFrame(rows)


# ---------------------------------------------------------------- recorded tables

EXPERIMENTS = ("curves", "few_shot", "memory")


def recorded(folder: str | os.PathLike = "") -> dict[str, DeviceTable]:
    """The recorded tables that are there, by experiment; empty where none is.

    ``folder`` holds ``pocket_NAME.json`` as the command line writes them; blank: those that ship.
    Raises :class:`~pllm_helpers.runtime.InputError` for a folder that is not there.
    """
    place = Path(folder) if str(folder) else data_dir() / "results"
    if str(folder) and not place.is_dir():
        raise InputError("results", f"expected a folder with recorded tables, got {str(folder)!r}", "Leave it blank.")
    found = {name: place / f"pocket_{name}.json" for name in EXPERIMENTS}
    return {name: load_table(path) for name, path in found.items() if path.is_file()}


def how_to_measure(name: str) -> str:
    """The command that makes a table."""
    if name not in EXPERIMENTS:
        raise InputError("experiment", f"expected one of {', '.join(EXPERIMENTS)}, got {name!r}")
    return f"python -m pllm_helpers.experiments.pocket_study {name}"


# learning rates tried, as many for every method; the development data below choose one
RATES: Mapping[str, tuple[float, ...]] = {
    "lora": (2e-4, 1e-3, 5e-3, 2e-2),
    "mezo_lora": (3e-5, 1e-4, 3e-4, 1e-3),
    "mezo": (3e-6, 1e-5, 3e-5, 1e-4),
}
DEVELOPMENT_SEED = 1000  # draws the labelled texts on which rates are tried; no judged run has it


@dataclass(frozen=True)
class Plan:
    """What the command line measures.

    Learning rates are tried in shorter runs on development data: another person, and for labelled
    texts another draw, judged by further *training* texts.
    """

    person: int = 0
    development: int = 1  # the person on whom learning rates are tried
    messages: int = 128  # earlier replies, those nearest to ``tokens`` tokens
    tokens: int = 48
    replies: int = 24
    batch: int = 4
    seeds: int = 3
    gradient_steps: int = 40
    mezo_steps: int = 250
    looks: int = 5
    noise: str = "rademacher"
    shots: int = 16
    texts: int = 120  # that judge
    shot_steps: int = 40
    shot_mezo_steps: int = 200
    source: str = ""
    tried_share: int = 5  # a trial of MeZO has a fifth of its steps, one of LoRA half

    def cells(self, name: str) -> list[dict[str, Any]]:
        """Labels of the cells of an experiment; trials of learning rates come first."""
        if name == "memory":
            return [{"method": m, "batch": b} for m in MEMORY_METHODS for b in (8, 64)]
        seed = DEVELOPMENT_SEED if name == "few_shot" else 0
        tried = [
            {"method": m, "seed": seed, "role": "development", "lr": r} for m, rates in RATES.items() for r in rates
        ]
        return tried + [{"method": m, "seed": s, "role": "judged"} for m in RATES for s in range(self.seeds)]

    def settings(self, name: str, labels: Mapping[str, Any], known: Sequence[Measured] = ()) -> dict[str, Any] | None:
        """All that the cell depends on; ``None`` while learning rates of its method are still to be tried."""
        if name == "memory":
            return {}
        method, tried = labels["method"], labels["role"] == "development"
        if not tried and len(_tried(known, method)) < len(RATES[method]):
            return None
        shot, gradient = name == "few_shot", method == "lora"
        steps = self.shot_steps if shot else self.gradient_steps
        if not gradient:
            steps = self.shot_mezo_steps if shot else self.mezo_steps
        if tried:
            steps = max(1, steps // (2 if gradient else self.tried_share))
        found = {"steps": steps, "looks": 1 if tried else self.looks, "noise": self.noise, "batch": self.batch}
        found["lr"] = labels["lr"] if tried else best_rate(known, method)
        if shot:
            return found | {"shots": self.shots, "texts": self.texts, "source": self.source}
        who = self.development if tried else self.person
        return found | {k: getattr(self, k) for k in ("messages", "tokens", "replies")} | {"person": who}

    def measure(self, name: str, labels: Mapping[str, Any], llm: LLM, known: Sequence[Measured] = ()) -> Measured:
        """Measure one cell; ``known``: cells of the same experiment measured before (learning rates)."""
        if name == "memory":
            return self._memory(labels)
        method, settings = labels["method"], self.settings(name, labels, known)
        if settings is None:
            raise InputError("known", f"expected the learning rates tried for {method!r}", "Measure those cells first.")
        run = {k: settings[k] for k in ("steps", "looks", "noise", "lr")} | {"seed": labels["seed"]}
        run |= {"before": _known_start(known, labels), "batch_size": self.batch}
        if name == "few_shot":
            train = sentiment_texts("train", 10_000, source=self.source)
            if labels["role"] == "development":
                train, test = _development(train, self.texts // 3)
            else:
                test = sentiment_texts("test", self.texts, source=self.source)
            return _cell(labels, few_shot_trial(llm, method, train, test, shots=self.shots, **run), "hits")
        earlier, later = earlier_and_later(settings["person"], 4 * self.messages, self.replies)
        stream = even_dialogues(llm, earlier, min(self.messages, len(earlier)), self.tokens)
        return _cell(labels, personal_trial(llm, method, stream, later, **run), "nll")

    def _memory(self, labels: Mapping[str, Any]) -> Measured:
        from ..device import measure_memory

        method, batch = labels["method"], labels["batch"]
        llm = load_llm(dtype="fp32")
        found = measure_memory(llm, method=_tuner(method).predicted, batch=batch)
        facts = {"status": found.status, "peak_mb": found.peak_mb, "seconds": found.seconds}
        if found.status == "finished":
            value = found.value
            sizes = {k: value[k] for k in ("tokens", "answer_tokens", "shared_tokens")}
            facts["predicted_mb"] = predict_memory(llm, method=_tuner(method).predicted, batch=batch, **sizes).total
        return Measured(dict(labels), {}, facts)


def _tried(cells: Sequence[Measured], method: str) -> list[Measured]:
    return [c for c in cells if c.labels.get("role") == "development" and c.labels["method"] == method]


def best_rate(cells: Sequence[Measured], method: str) -> float:
    """The learning rate with the lowest held-out loss among those tried; that of ``TUNERS`` where none was."""
    good = [c for c in _tried(cells, method) if c.facts.get("looks")]
    return float(min(good, key=lambda c: c.facts["looks"][-1][1]).labels["lr"]) if good else _tuner(method).lr


def _known_start(known: Sequence[Measured], labels: Mapping[str, Any]) -> np.ndarray | None:
    """Scores before tuning of a cell that started from the same weights on the same data."""
    for c in known:
        same = c.labels["role"] == labels["role"] and (c.labels["method"] == "mezo") == (labels["method"] == "mezo")
        if same and "before" in c.rows:
            return c.rows["before"]
    return None


def _development(
    texts: tuple[list[str], list[str]], judges: int
) -> tuple[tuple[list[str], list[str]], tuple[list[str], list[str]]]:
    """Training texts to draw shots from, and at most ``judges``, a third of all, to judge learning rates by."""
    order = np.random.default_rng(DEVELOPMENT_SEED).permutation(len(texts[0]))
    cut = len(order) - max(1, min(judges, len(order) // 3))
    first, rest = (([texts[0][i] for i in part], [texts[1][i] for i in part]) for part in (order[:cut], order[cut:]))
    return first, rest


def _cell(labels: Mapping[str, Any], trial: Trial, score: str) -> Measured:
    # the rate as text: a table rounds its numbers
    facts = {"cpu_seconds": trial.cpu_seconds, "steps": trial.steps, "lr": f"{trial.lr:g}", "score": score}
    facts |= {"losses": np.round(trial.losses, 4).tolist(), "looks": [[s, round(x, 4)] for s, x in trial.looks]}
    return Measured(dict(labels), {"before": trial.before, "after": trial.after}, facts)


def rates_table(table: DeviceTable) -> pd.DataFrame:
    """The learning rates tried on development data, what came of each, and which one was taken."""
    rows = []
    for method in RATES:
        best = best_rate(table.cells, method)
        for c in _tried(table.cells, method):
            looks = c.facts.get("looks")
            found = (
                {"steps": c.facts["steps"], "held-out loss": f"{looks[0][1]:.3f} → {looks[-1][1]:.3f}"} if looks else {}
            )
            found = found or {"steps": "–", "held-out loss": "diverged"}
            taken = "taken" if looks and float(c.labels["lr"]) == best else ""
            rows.append({"method": figures.method(method).name, "rate": f"{c.labels['lr']:g}", **found, "": taken})
    return pd.DataFrame(rows).set_index(["method", "rate"])


def trials(table: DeviceTable, **labels: Any) -> list[Trial]:
    """The runs of a recorded table; the ones that chose learning rates are left out."""
    found = []
    for c in table.find(**labels):
        if c.labels.get("role") == "development" or "after" not in c.rows:
            continue
        looks = [(int(s), float(x)) for s, x in c.facts["looks"]]
        found.append(
            Trial(
                c.labels["method"],
                c.labels["seed"],
                float(c.facts["lr"]),
                list(c.facts["losses"]),
                looks,
                float(c.facts["cpu_seconds"]),
                c.rows["before"],
                c.rows["after"],
            )
        )
    return found


def run_experiment(
    name: str,
    plan: Plan | None = None,
    *,
    cache: str | os.PathLike | None = None,
    max_minutes: Number | None = None,
    say: Say = print,
) -> DeviceTable:
    """Measure the missing cells of an experiment; finished ones come from ``cache``.

    A learning rate at which a run diverges is kept as such, not tried again.
    """
    how_to_measure(name)  # checks the name
    plan = plan or Plan()
    folder = Path(cache) if cache else cache_dir() / "experiments" / "pocket"
    folder.mkdir(parents=True, exist_ok=True)
    prepare(0)
    llm = load_llm()
    cells, start = [], time.monotonic()
    planned = plan.cells(name)
    for number, labels in enumerate(planned, 1):
        settings = plan.settings(name, labels, cells)
        if settings is None:  # time was up while learning rates were tried
            continue
        key = [CODE_VERSION, name, sorted(settings.items()), llm.name, llm.dtype, sorted(labels.items())]
        path = folder / f"{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:24]}.json"
        if path.is_file():
            cells.append(_read_cell(path))
            continue
        if max_minutes is not None and time.monotonic() - start > 60 * max_minutes:
            continue
        try:
            cell = plan.measure(name, labels, llm, cells)
        except InputError as e:
            if e.what != "lr":
                raise
            cell = Measured(dict(labels), {}, {"diverged": str(e)})
        rows = {k: v.tolist() for k, v in cell.rows.items()}
        write_whole(path, json.dumps({"labels": cell.labels, "rows": rows, "facts": cell.facts}))
        cells.append(cell)
        say(f"[{number}/{len(planned)}] {name} {labels}: {_told(cell)}")
    versions = {p: importlib.metadata.version(p) for p in ("torch", "transformers", "peft")}
    machine = {"system": f"{platform.system()} {platform.machine()}", "processor": processor_name()}
    machine |= {"cores": os.cpu_count(), "threads": torch.get_num_threads()}
    settings = {k: v for k, v in vars(plan).items() if k != "source"} | {"real_sst2": bool(plan.source)}
    settings |= {"rates": {m: [f"{r:g}" for r in rates] for m, rates in RATES.items()}}
    run = {"settings": settings, "model": llm.name, "dtype": llm.dtype}
    return DeviceTable(name, tuple(cells), len(planned), run | {"versions": versions, "machine": machine})


def _read_cell(path: Path) -> Measured:
    content = json.loads(path.read_text(encoding="utf-8"))
    rows = {k: np.array(v, dtype=float) for k, v in content["rows"].items()}
    return Measured(content["labels"], rows, content["facts"])


def _told(cell: Measured) -> str:
    if "after" in cell.rows:
        before, after = (cell.rows[k].mean() for k in ("before", "after"))
        return f"{before:.3f} -> {after:.3f}, {cell.facts['cpu_seconds']:.2f} CPU s a step"
    return ", ".join(f"{k} {v:.0f}" if isinstance(v, float) else f"{k} {v}" for k, v in cell.facts.items())


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0: all cells are there; 3: stopped by ``--max-minutes``; 2: bad input."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    p = argparse.ArgumentParser(prog="python -m pllm_helpers.experiments.pocket_study", description=__doc__)
    p.add_argument("experiment", choices=EXPERIMENTS)
    p.add_argument("--seeds", type=int, metavar="N", help="seeds of the judged runs")
    p.add_argument("--gradient-steps", type=int, metavar="N", help="steps of LoRA on the person's stream")
    p.add_argument("--mezo-steps", type=int, metavar="N", help="steps of MeZO on the person's stream")
    p.add_argument("--shot-steps", type=int, metavar="N", help="steps of LoRA on labelled texts")
    p.add_argument("--shot-mezo-steps", type=int, metavar="N", help="steps of MeZO on labelled texts")
    p.add_argument("--replies", type=int, metavar="N", help="held-out replies")
    p.add_argument("--source", metavar="DIR", help="folder or file with SST-2; without it the authored set serves")
    p.add_argument("--out", metavar="FILE", help="default: data/results/pocket_EXPERIMENT.json")
    p.add_argument("--cache", metavar="DIR", help="folder of finished cells (default: the user's cache)")
    p.add_argument("--max-minutes", type=float, metavar="M", help="start no further cell after M minutes")
    a = p.parse_args(given)
    names = ("seeds", "gradient_steps", "mezo_steps", "shot_steps", "shot_mezo_steps", "replies", "source")
    changes = {k: getattr(a, k) for k in names if getattr(a, k) is not None}
    try:
        for name, value in changes.items():
            if name != "source" and value < 1:
                raise InputError(f"--{name.replace('_', '-')}", f"expected a number of at least 1, got {value}")
        table = run_experiment(a.experiment, replace(Plan(), **changes), cache=a.cache, max_minutes=a.max_minutes)
        print(table)
        if table.cells:
            places = ("--source", "--cache", "--out")
            shown = ["DIR" if k and given[k - 1] in places else w for k, w in enumerate(given)]
            command = " ".join(["python -m pllm_helpers.experiments.pocket_study", *map(shlex.quote, shown)])
            table.save(a.out or data_dir() / "results" / f"pocket_{a.experiment}.json", command)
        return 0 if table.complete else 3
    except InputError as problem:
        print(f"pocket_study: {problem}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; finished cells are kept, the same command goes on", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
