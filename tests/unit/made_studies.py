"""Studies with known effects, made up for tests only: what the real ones look like, without the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from pllm_helpers.experiments.cells import BASE, Cell, CellResult
from pllm_helpers.experiments.policy_study import ALL_POLICIES, Study

STREAMS = ("person:0", "alpaca")
LEVELS = {"policy_comparison": ({},), "metric_ablation": ({},), "released_code_gap": ({},)} | {
    "learning_curve": tuple({"sets": k} for k in (100, 200, 400, 800)),
    "buffer_size_sweep": tuple({"bins": k} for k in (8, 32, 128)),
    "synthesis_sweep": tuple({"synthesis": k} for k in (0, 1, 3, 6)),
}


def made_study(
    name: str = "policy_comparison",
    *,
    effects: Mapping[str, float] | None = None,
    slope: float = 0.0,
    streams: Sequence[str] = STREAMS,
    policies: Sequence[str] = (*ALL_POLICIES, BASE),
    seeds: int = 5,
    noise: float = 0.02,
    held_out: int = 40,
    generated: int = 20,
    buffer: bool = True,
) -> Study:
    """ROUGE-1 is 0.2 + effect of the policy + ``slope`` per level; NLL moves ten times as far, downwards.

    Dialogues scatter by 0.1 in common to all policies of a seed, and by ``noise`` each on its own.
    """
    effects = effects or {}
    cells = []
    for s, stream in enumerate(streams):
        for seed in range(seeds):
            shared = np.random.default_rng([s, seed]).normal(0, 0.1, held_out)
            for policy in policies:
                for step, level in enumerate(LEVELS[name] if policy != BASE else ({},)):
                    rng = np.random.default_rng([s, seed, sum(policy.encode()), step, 7])
                    gain = effects.get(policy, 0.0) + slope * step * (policy == "quality")
                    rouge = 0.2 + gain + shared[:generated] + rng.normal(0, noise, generated)
                    nll = 4 - 10 * (gain + shared) + rng.normal(0, noise, held_out)
                    rows = {"rouge1": rouge, "rougeL": rouge * 0.8, "nll": nll}
                    means = {k: float(v.mean()) for k, v in rows.items()}
                    means |= {
                        "bleu": means["rouge1"] / 5,
                        "length_ratio": 1 + gain,
                        "copy_rate": 0.1,
                        "corpus_bleu": 0.02,
                    }
                    info = {
                        "streamed": level.get("sets", 800),
                        "held_out": held_out,
                        "threads": 1,
                        "note": "",
                        "cpu_seconds": 7.0,
                    }
                    if buffer and policy != BASE:
                        info["buffer"] = {"words": 20 + 100 * gain, "redundancy": 0.3, "recency": 0.1 * seed}
                    cell = Cell(stream, seed, policy, **level)
                    cells.append(CellResult(cell, "", rows, means, {"tune": 8.0}, info))
    run = {"experiment": name, "settings": {"model": "made"}, "machine": {"cores": 2}, "threads_per_cell": [1]}
    run["data"] = {s: {"streamed": 800, "held_out": held_out} for s in streams}
    return Study(name, tuple(cells), len(cells), run)


def save_made(folder: Path, names: Sequence[str], **options: object) -> Path:
    """Write made studies as the command line writes real ones."""
    for name in names:
        made_study(name, **options).save(folder / f"{name}.json", "made for a test")
    return folder
