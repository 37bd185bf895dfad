"""Variants of MeZO against plain MeZO at equal CPU seconds: how far the held-out loss has fallen.

``python -m benchmarks.mezo_variants --pair lora --seconds 20 --seeds 4`` runs one pair; the rows
of ``make bench`` are the same with the defaults.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from pllm_helpers.dialogue import DialogueSet
from pllm_helpers.evaluation import bootstrap_interval
from pllm_helpers.models import LLM, load_llm
from pllm_helpers.tuning import TuningResult, adapted, answer_loss, tune_mezo

from .compare import Row, row
from .lora import dialogues

STREAM, HELD_OUT, SHORT = 64, 24, 220  # dialogues to tune on, held-out ones, characters of a dialogue at most
TRIAL = 1000  # seed of the runs that choose a learning rate


class Pair(NamedTuple):
    """A variant, what it is compared with, and the learning rates that both may choose from."""

    plain: dict[str, Any]
    variant: dict[str, Any]
    rates: tuple[float, ...]
    seconds: float | int
    words: str


PAIRS = {
    "full": Pair(
        {"noise": "gaussian"},
        {"noise": "rademacher"},
        (3e-6, 1e-5, 3e-5),
        60,
        "all weights, Gaussian noise against signs",
    ),
    "lora": Pair(
        {"parameters": "lora", "noise": "gaussian", "epsilon": 1e-2},
        {
            "parameters": "lora",
            "noise": "rademacher",
            "epsilon": 1e-2,
            "layers": "upper",
            "directions": 4,
            "together": True,
        },
        (1e-3, 3e-3, 1e-2, 3e-2),
        30,
        "LoRA, one Gaussian direction on all layers against 4 of signs on the upper half in one forward pass",
    ),
}


def parts() -> tuple[list[DialogueSet], list[DialogueSet], list[DialogueSet]]:
    """Dialogues to tune on, those by which a learning rate is chosen, and those that judge: one person, in order."""
    short = [d for d in dialogues(4 * (STREAM + 2 * HELD_OUT)) if len(d.question) + len(d.answer) <= SHORT]
    chosen = short[: STREAM + 2 * HELD_OUT]
    assert len(chosen) == STREAM + 2 * HELD_OUT
    return chosen[:STREAM], chosen[STREAM : STREAM + HELD_OUT], chosen[STREAM + HELD_OUT :]


def for_seconds(llm: LLM, data: Sequence[DialogueSet], seconds: float | int, **settings: Any) -> TuningResult:
    """A run that ends with the step in which this process has spent ``seconds`` of CPU time on steps."""
    start: list[float] = []

    def watch(step: int, loss: float, wall: float) -> bool:
        start.append(time.process_time())  # from the end of the first step, which every method is given
        return start[-1] - start[0] < seconds

    return tune_mezo(llm, data, steps=10**6, batch_size=8, progress=watch, **settings)


def fall(llm: LLM, result: TuningResult, held: Sequence[DialogueSet], before: float) -> float:
    """How far the loss on ``held`` has fallen, nats per answer token."""
    with adapted(llm, result) as tuned:
        return before - answer_loss(tuned, held)()


def compared(
    llm: LLM, pair: Pair, seconds: float | int, seeds: int, say: Callable[[str], None]
) -> dict[str, list[float]]:
    """Falls of ``plain`` and ``variant``, one per seed, each at the learning rate that did best in a trial."""
    stream, development, held = parts()
    before = {"development": answer_loss(llm, development)(), "held": answer_loss(llm, held)()}
    found: dict[str, list[float]] = {"plain": [], "variant": []}
    for name in found:
        settings, trials = getattr(pair, name), []
        for rate in pair.rates:
            try:
                result = for_seconds(llm, stream, seconds, seed=TRIAL, lr=rate, **settings)
                trials.append(fall(llm, result, development, before["development"]))
            except ValueError as e:  # diverged
                say(f"  {name}, lr {rate:g}: {e}")
                trials.append(-np.inf)
        best = pair.rates[int(np.argmax(trials))]
        falls = ", ".join(f"{rate:g}: {x:.3f}" for rate, x in zip(pair.rates, trials, strict=True))
        edge = ", at the edge of the grid" if best in (pair.rates[0], pair.rates[-1]) else ""
        say(f"  {name}: falls in trials {falls}; lr {best:g}{edge}")
        steps = []
        for seed in range(seeds):
            result = for_seconds(llm, stream, seconds, seed=seed, lr=best, **settings)
            steps.append(len(result.losses))
            found[name].append(fall(llm, result, held, before["held"]))
        say(f"  {name}: falls {', '.join(f'{x:.3f}' for x in found[name])} in {np.mean(steps):.0f} steps")
    return found


def run(quick: bool = False, names: Sequence[str] = tuple(PAIRS), seconds: int = 0, seeds: int = 0) -> list[Row]:
    """Rows ``mezo_variant_full`` and ``mezo_variant_lora``: fall of the held-out loss (nats per token, more is
    better) after equal CPU seconds, several seeds; ``theirs`` is plain MeZO in our own implementation.

    Real chat of one person, batches of 8, logits at answer positions only. Both sides choose their
    learning rate from the same grid, in a trial with another seed and on other dialogues than those that judge.
    """
    llm, rows = load_llm(dtype="fp32"), []
    for name in names:
        pair = PAIRS[name]
        budget = seconds or (2 if quick else pair.seconds)
        found = compared(llm, pair, budget, seeds or (2 if quick else 5), lambda line: print(line, flush=True))
        peer = f"plain MeZO, ours ({pair.words}; {budget} CPU seconds each)"
        ours, theirs = found["variant"], found["plain"]
        more = bootstrap_interval(ours, theirs, statistic=lambda a, b: a.mean() - b.mean())
        found_row = row(f"mezo_variant_{name}", peer, ours, theirs, "nats per token", version="2024", more=True)
        # a ratio means little where the peer's fall is about nothing
        rows.append(found_row | {"difference": [round(x, 4) for x in (more.value, more.low, more.high)]})
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks.mezo_variants", description=__doc__)
    parser.add_argument("--pair", choices=list(PAIRS), action="append", help="default: both")
    parser.add_argument("--seconds", type=int, default=0, help="CPU seconds of every run (default: 60 and 30)")
    parser.add_argument("--seeds", type=int, default=0, help="default: 5")
    given = parser.parse_args()
    for found in run(False, given.pair or tuple(PAIRS), given.seconds, given.seeds):
        print(json.dumps(found))
