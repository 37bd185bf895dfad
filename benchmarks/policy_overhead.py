"""What a decision costs beyond the encoder at 1,000 buffered sets: ours, crash-safe, against a plain loop."""

from __future__ import annotations

import itertools
import os
import tempfile
import time
from pathlib import Path

import numpy as np

from pllm_helpers.dialogue import DialogueSet
from pllm_helpers.models import load_encoder
from pllm_helpers.selection import (
    POLICIES,
    DialogueBuffer,
    MetricTable,
    in_domain_dissimilarity,
    load_lexicons,
    run_stream,
    score_dialogues,
)

from .compare import Row, in_turn, row
from .metrics_throughput import dialogue_sets

BINS = 1000
LIMIT_MS = 1.0


def ours(
    policy: str, path: Path | None, dialogues: list[DialogueSet], table: MetricTable
) -> tuple[np.ndarray, list[int | None]]:
    """Milliseconds of each decision once the buffer is full, and the slots that were chosen."""
    times, slots = [], []
    with DialogueBuffer(path, bins=BINS) as buffer:
        run_stream(buffer, policy, dialogues, table, stop=BINS)
        last = time.perf_counter()

        def note(decision) -> None:
            nonlocal last
            now = time.perf_counter()
            times.append(1000 * (now - last))
            slots.append(decision.slot)
            last = now

        run_stream(buffer, policy, dialogues, table, on_decision=note)
    return np.array(times), slots


def plain(dialogues: list[DialogueSet], table: MetricTable) -> tuple[np.ndarray, list[int | None]]:
    """The paper's rule with every IDD taken anew from its formula, vectorised by domain; nothing is saved."""
    rng, names = np.random.Generator(np.random.PCG64(0)), table.domain_names
    embeddings, domains = table.embeddings[:BINS].astype(np.float64), list(names[:BINS])
    scores = np.stack([table.eoe[:BINS], table.dss[:BINS], np.zeros(BINS)], 1)
    times, slots = [], []
    for i in range(BINS, len(dialogues)):
        start = time.perf_counter()
        e, slot = table.embeddings[i], None
        groups = {d: np.array([k for k in range(BINS) if domains[k] == d]) for d in set(domains)}
        for members in groups.values():
            cosines = embeddings[members] @ embeddings[members].T
            others = max(1, len(members) - 1)
            scores[members, 2] = 1 - (cosines.sum(1) - 1) / others if len(members) > 1 else 1
        same = embeddings[groups[names[i]]] if names[i] in groups else np.zeros((0, len(e)))
        mine = [table.eoe[i], table.dss[i], in_domain_dissimilarity(e, same)]
        beaten = np.flatnonzero((np.array(mine) > scores).all(1))
        if len(beaten):
            slot = int(beaten[rng.integers(len(beaten))])
            embeddings[slot], domains[slot], scores[slot] = e, names[i], mine
        times.append(1000 * (time.perf_counter() - start))
        slots.append(slot)
    return np.array(times), slots


def run(quick: bool = False) -> list[Row]:
    """Rows ``policy_overhead_ms`` (buffer in memory) and ``policy_overhead_ms_file`` (synchronous=FULL).

    Mean milliseconds per streamed set for the paper's rule, real sets and scores; less is better, and
    ``limit`` is what they should stay below. Both sides must choose the same slots. ``policies`` has
    of every policy the mean, the 95th percentile and the mean of processor time alone; ``sync_ms`` is
    what this disk takes to flush 16 KB, which a file pays for each insert and replacement.
    """
    streamed = 150 if quick else 1000
    dialogues = dialogue_sets(BINS + streamed)
    encoder, lexicons = load_encoder(), load_lexicons()
    tables = {"paper": score_dialogues(dialogues, encoder, lexicons, progress=False)}
    tables["released_code"] = score_dialogues(dialogues, encoder, lexicons, mode="released_code", progress=False)
    with tempfile.TemporaryDirectory() as folder:
        return [
            measure("policy_overhead_ms", None, dialogues, tables, 2 if quick else 3),
            measure("policy_overhead_ms_file", Path(folder), dialogues, tables, 2 if quick else 3),
        ]


def measure(
    name: str, folder: Path | None, dialogues: list[DialogueSet], tables: dict[str, MetricTable], rounds: int
) -> Row:
    """One row; ``folder`` is where the buffers lie, ``None``: in memory."""
    numbers, chosen = itertools.count(), {}

    def path() -> Path | None:
        return folder / f"{next(numbers)}.db" if folder else None

    def side(kind: str) -> float:
        table = tables["paper"]
        times, chosen[kind] = ours("quality", path(), dialogues, table) if kind == "ours" else plain(dialogues, table)
        return float(times.mean())

    a, b = in_turn(lambda: side("ours"), lambda: side("plain"), rounds)
    assert chosen["ours"] == chosen["plain"], "both sides must decide alike"
    policies = {}
    for policy in POLICIES:
        table, cpu = tables["released_code" if policy == "released_code" else "paper"], time.process_time()
        times, _ = ours(policy, path(), dialogues, table)
        cpu = 1000 * (time.process_time() - cpu) / len(dialogues)  # with the filling, which costs about the same
        policies[policy] = [round(float(x), 3) for x in (times.mean(), np.percentile(times, 95), cpu)]
    result = row(name, "numpy loop, every IDD anew, nothing saved", a, b, "ms per set", more=False)
    streamed, replaced = len(chosen["ours"]), sum(s is not None for s in chosen["ours"])
    return {
        **result,
        "limit": LIMIT_MS,
        "bins": BINS,
        "streamed": streamed,
        "replaced": replaced,
        "policies": policies,
        **({"sync_ms": sync_ms(folder)} if folder else {}),
    }


def sync_ms(folder: Path) -> list[float]:
    """Median and mean milliseconds to append 16 KB to a file and flush them to the disk."""
    times = []
    with open(folder / "sync", "wb", buffering=0) as file:
        for _ in range(300):
            start = time.perf_counter()
            file.write(bytes(16384))
            os.fsync(file.fileno())
            times.append(1000 * (time.perf_counter() - start))
    return [round(float(np.median(times)), 3), round(float(np.mean(times)), 3)]
