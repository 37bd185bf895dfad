"""What notebook 02 shows and claims about streams, buffers and replacement rules (Qin et al., section 3)."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import SupportsIndex

import numpy as np
from jaxtyping import Bool, Float, Int

from ..corpora import chitchat_stream
from ..dialogue import DialogueSet
from ..evaluation import Claim, Estimate, bootstrap_interval, check_claim
from ..models import EncodedBatch, Encoder
from ..runtime import InputError
from ..selection import (
    Decision,
    DialogueBuffer,
    DomainMeans,
    Lexicons,
    MetricTable,
    Policy,
    make_policy,
    run_stream,
    score_dialogues,
)

__all__ = [
    "MEASURES",
    "WITHOUT_DICE",
    "Killed",
    "Playback",
    "ScoredStream",
    "acceptance_falls_claim",
    "below_reservoir_claim",
    "correlated_stream_claim",
    "fifo_redundancy_claim",
    "first_arrivals_claim",
    "higher_mean_claim",
    "holdings",
    "less_redundant_claim",
    "nothing_lost_claim",
    "person_dialogues",
    "person_scores",
    "play",
    "present_idd",
    "redundancy",
    "resumed_claim",
    "same_buffer_claim",
    "score_stream",
    "seed_interval",
    "seed_portraits",
    "stream_and_kill",
    "uniform_reservoir_claim",
]

_ARRAYS = ("eoe", "dss", "domain", "embeddings", "n_tokens", "n_words")
CHUNK = 64  # dialogue sets scored at a time: progress can be told, and an interrupted scoring goes on
WITHOUT_DICE = ("fifo", "kcenter", "combined", "released_code")
"""Policies that draw no random number: one stream, one buffer, whatever the seed."""
MEASURES = {
    "eoe": "mean EOE",
    "dss": "mean DSS",
    "idd": "mean IDD within the buffer",
    "redundancy": "mean pairwise cosine",
    "arrival": "mean arrival (0 first, 1 last)",
    "words": "mean length in words",
}
"""What :func:`holdings` tells of a buffer, with a title for figures; further keys are shares."""


# ---------------------------------------------------------------- streams with scores


@dataclass(frozen=True)
class ScoredStream:
    """A stream with the scores of both modes, from one pass of the encoder.

    ``table``: the paper's formulas; ``released``: what the first author's scripts compute.
    ``left_out``: sets that no buffer could store (no content, a twin of an earlier one, larger than
    a bin), which are not in the stream.
    """

    dialogues: tuple[DialogueSet, ...]
    table: MetricTable
    released: MetricTable
    left_out: int = 0

    def __len__(self) -> int:
        return len(self.dialogues)

    def __repr__(self) -> str:
        return f"ScoredStream({len(self):,} dialogue sets, {self.left_out} left out)"

    def scores_for(self, policy: Policy) -> MetricTable:
        """The table that this policy compares by."""
        return self.released if policy.mode == "released_code" else self.table


def score_stream(
    dialogues: Sequence[DialogueSet],
    encoder: Encoder,
    lexicons: Lexicons,
    *,
    on_progress: Callable[[int, int], object] | None = None,
    chunks: list[tuple[MetricTable, MetricTable]] | None = None,
) -> ScoredStream:
    """Score a stream in both modes and leave out what no buffer could store.

    Parameters
    ----------
    on_progress : called with ``(done, all)`` before each chunk; an exception from it interrupts.
    chunks : the finished chunks; pass the same list again to go on after an interruption.

    Raises :class:`~pllm_helpers.runtime.InputError` if nothing is left to stream.
    """
    dialogues = tuple(dialogues)
    chunks = [] if chunks is None else chunks
    while (done := len(chunks) * CHUNK) < len(dialogues):
        if on_progress is not None:
            on_progress(done, len(dialogues))
        part = dialogues[done : done + CHUNK]
        chunks.append(
            _both_modes(part, list(encoder.forward_batches([d.text for d in part], progress=False)), lexicons)
        )
    if not chunks:
        raise InputError("dialogues", "expected at least one dialogue set, got none")
    paper, released = (_joined([pair[k] for pair in chunks]) for k in (0, 1))
    with DialogueBuffer(bins=len(dialogues)) as roomy:  # a bin for each: what is not inserted cannot be stored
        rows = np.array([d.position for d in run_stream(roomy, "fifo", dialogues, paper) if d.action == "insert"])
    if not len(rows):
        raise InputError("dialogues", "expected at least one set that fits into a bin, got none")
    stored = tuple(dialogues[i] for i in rows)
    return ScoredStream(stored, _rows(paper, rows), _rows(released, rows), len(dialogues) - len(rows))


def person_scores(person: SupportsIndex, messages: SupportsIndex, encoder: Encoder, lexicons: Lexicons) -> ScoredStream:
    """The first ``messages`` dialogue sets of a real person, by rank of activity, scored."""
    return score_stream(person_dialogues(person, messages), encoder, lexicons)


def person_dialogues(person: SupportsIndex, messages: SupportsIndex) -> tuple[DialogueSet, ...]:
    """The first ``messages`` dialogue sets of a real person, by rank of activity."""
    return chitchat_stream(person).stream[: messages.__index__()]


def _both_modes(
    part: Sequence[DialogueSet], batches: list[EncodedBatch], lexicons: Lexicons
) -> tuple[MetricTable, MetricTable]:
    """One pass of the encoder, two tables."""
    paper, released = (
        score_dialogues(part, lambda *_, **__: batches, lexicons, mode=mode, progress=False)
        for mode in ("paper", "released_code")
    )
    return paper, released


def _joined(tables: Sequence[MetricTable]) -> MetricTable:
    return replace(tables[0], **{name: np.concatenate([getattr(t, name) for t in tables]) for name in _ARRAYS})


def _rows(table: MetricTable, rows: Int[np.ndarray, " k"]) -> MetricTable:
    return replace(table, **{name: getattr(table, name)[rows] for name in _ARRAYS})


# ---------------------------------------------------------------- playing a stream through a policy


@dataclass(frozen=True)
class Playback:
    """A stream played through one policy: every decision, and the buffer at any moment."""

    policy: str
    bins: int
    seed: int
    decisions: tuple[Decision, ...]

    def slots(self, after: SupportsIndex | None = None) -> Int[np.ndarray, " b"]:
        """Stream position of the entry in each bin after so many decisions; −1 for a free bin."""
        n = len(self.decisions) if after is None else after.__index__()
        slots = np.full(self.bins, -1)
        for d in self.decisions[:n]:
            if d.slot is not None:
                slots[d.slot] = d.position
        return slots

    def kept(self, after: SupportsIndex | None = None) -> Int[np.ndarray, " k"]:
        """Stream positions of the buffered sets after so many decisions, by slot."""
        slots = self.slots(after)
        return slots[slots >= 0]

    @cached_property
    def accepted(self) -> Bool[np.ndarray, " m"]:
        """Whether the newcomer got in, for every decision on a full buffer."""
        first = next((i for i, d in enumerate(self.decisions) if d.action != "insert"), len(self.decisions))
        return np.array([d.slot is not None for d in self.decisions[first:]], dtype=bool)

    @cached_property
    def lives(self) -> list[tuple[int, int]]:
        """Of every set that got in: its position, and that of its successor (the stream's length if it stayed)."""
        end, born, lives = len(self.decisions), dict[int, int](), []
        for d in self.decisions:
            if d.slot is None:
                continue
            if d.slot in born:
                lives.append((born[d.slot], d.position))
            born[d.slot] = d.position
        return sorted(lives + [(position, end) for position in born.values()])


def play(scored: ScoredStream, policy: Policy | str, *, bins: SupportsIndex, seed: SupportsIndex = 0) -> Playback:
    """Play a whole stream through one policy, given as object or key, into an empty buffer in memory."""
    rule = make_policy(policy) if isinstance(policy, str) else policy
    with DialogueBuffer(bins=bins, seed=seed) as buffer:
        decisions = run_stream(buffer, rule, scored.dialogues, scored.scores_for(rule))
        name = policy if isinstance(policy, str) else policy.name
        return Playback(name, buffer.capacity, buffer.seed, tuple(decisions))


def redundancy(table: MetricTable, kept: Int[np.ndarray, " k"]) -> float:
    """Mean cosine over all pairs of buffered sets: 1 if all say the same. Raises with fewer than two."""
    if len(kept) < 2:
        raise InputError("kept", f"expected at least two buffered sets, got {len(kept)}")
    total = table.embeddings[kept].astype(float).sum(0)
    return float((total @ total - len(kept)) / (len(kept) * (len(kept) - 1)))


def present_idd(table: MetricTable, kept: Int[np.ndarray, " k"]) -> Float[np.ndarray, " k"]:
    """IDD of every buffered set against the *other* sets of its domain; 1 where it has none there."""
    means, names = DomainMeans(), table.domain_names
    for i in kept:
        means.add(table.embeddings[i], names[i])
    scores = np.empty(len(kept))
    for row, i in enumerate(kept):
        means.remove(table.embeddings[i], names[i])
        scores[row] = means.idd(table.embeddings[i], names[i])
        means.add(table.embeddings[i], names[i])
    return scores


def holdings(scored: ScoredStream, kept: Int[np.ndarray, " k"], after: SupportsIndex | None = None) -> dict[str, float]:
    """What a buffer holds, in the paper's scores whatever the policy went by; see :data:`MEASURES`.

    ``after``: how many sets had arrived. Also ``with_domain``: share with a lexicon word, and
    ``conversations``: different conversations per buffered set.
    """
    table = scored.table
    seen = len(scored) if after is None else after.__index__()
    talks = {scored.dialogues[i].meta.get("conversation", i) for i in kept}
    return {
        "eoe": float(table.eoe[kept].mean()),
        "dss": float(table.dss[kept].mean()),
        "idd": float(present_idd(table, kept).mean()),
        "redundancy": redundancy(table, kept),
        "arrival": float(kept.mean() / max(seen - 1, 1)),
        "words": float(table.n_words[kept].mean()),
        "with_domain": float((table.domain[kept] >= 0).mean()),
        "conversations": len(talks) / len(kept),
    }


def seed_portraits(
    scored: ScoredStream, policy: str, *, bins: SupportsIndex, seeds: SupportsIndex
) -> tuple[list[Playback], dict[str, Float[np.ndarray, " s"]]]:
    """Playbacks with seeds 0, 1, … (one if no dice are involved) and what their last buffers hold."""
    count = 1 if policy in WITHOUT_DICE else seeds.__index__()
    plays = [play(scored, policy, bins=bins, seed=s) for s in range(count)]
    found = [holdings(scored, p.kept()) for p in plays]
    return plays, {key: np.array([f[key] for f in found]) for key in found[0]}


def seed_interval(values: Float[np.ndarray, " s"], seed: int = 0, unit: str = "") -> Estimate:
    """Mean over seeds with its bootstrap interval; a single run without dice has none."""
    if len(values) == 1:
        return Estimate.exact(float(values[0]), unit=unit)
    e = bootstrap_interval(values, seed=seed, unit=unit)
    return replace(e, seeds=tuple(range(len(values))))


# ---------------------------------------------------------------- a crash


@dataclass(frozen=True)
class Killed:
    """A child process that streamed into a file and was killed: sets it had reported, its exit status."""

    acknowledged: int
    status: int


_CHILD = """
import pickle, sys, time
from pllm_helpers.selection import DialogueBuffer, run_stream
with open(sys.argv[1], "rb") as file:
    path, bins, seed, policy, dialogues, table, pause = pickle.load(file)
def report(decision):
    print(decision.position, flush=True)
    time.sleep(pause)
with DialogueBuffer(path, bins=bins, seed=seed) as buffer:
    run_stream(buffer, policy, dialogues, table, on_decision=report)
"""


def stream_and_kill(
    path: str | os.PathLike[str],
    scored: ScoredStream,
    policy: str = "quality",
    *,
    bins: SupportsIndex,
    seed: SupportsIndex = 0,
    after: SupportsIndex,
    pause: float | int = 0.002,
) -> Killed:
    """Stream into the file ``path`` in a process of its own and kill it once ``after`` sets are reported.

    The child gets no chance to tidy up (SIGKILL; on Windows TerminateProcess). It waits ``pause``
    seconds after each set, so that the blow falls in the middle. Raises ``RuntimeError`` with its
    last words if it stops by itself before that.
    """
    rule = make_policy(policy)
    with tempfile.TemporaryDirectory() as folder:
        job = Path(folder) / "job.pickle"
        content = (os.fspath(path), bins, seed, rule, scored.dialogues, scored.scores_for(rule), pause)
        job.write_bytes(pickle.dumps(content))
        command = [sys.executable, "-c", _CHILD, str(job)]
        with open(Path(folder) / "errors", "w+", encoding="utf-8") as errors:
            with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True) as child:
                assert child.stdout is not None
                reported = 0
                for line in child.stdout:
                    reported = int(line) + 1
                    if reported >= after.__index__():
                        break
                child.kill()
                reported = max([reported, *(int(line) + 1 for line in child.stdout if line.endswith("\n"))])
            if reported < after.__index__():
                errors.seek(0)
                raise RuntimeError(f"the child stopped after {reported} sets: {errors.read()[-2000:]}")
        return Killed(reported, child.returncode)


# ---------------------------------------------------------------- claims


def same_buffer_claim(what: str, by_hand: Int[np.ndarray, " b"], package: Int[np.ndarray, " b"]) -> Claim:
    """The rule written out in the notebook and the package fill the same bins with the same sets."""
    differ = float(np.sum(by_hand != package)) if len(by_hand) == len(package) else float(len(package))
    return check_claim(
        f"{what} by hand equals the package on the whole stream: bins that differ, 0 of {len(package)}",
        differ,
        below=0,
        kind="deterministic",
    )


def nothing_lost_claim(acknowledged: int, found: int) -> Claim:
    """What the killed process had reported as done is in the file."""
    return check_claim(
        f"Nothing acknowledged was lost: of {acknowledged} reported decisions, 0 are missing in the file",
        max(0, acknowledged - found),
        below=0,
        kind="deterministic",
    )


def resumed_claim(resumed: str, whole: str) -> Claim:
    """Digests of the buffer that was killed and resumed, and of one that ran through."""
    return check_claim(
        "Killed and resumed equals uninterrupted, bit by bit: buffers that differ, 0 of 1",
        float(resumed != whole),
        below=0,
        kind="deterministic",
    )


def uniform_reservoir_claim(kept: Bool[np.ndarray, "runs n"], seed: int = 0) -> Claim:
    """Share of the reservoir that comes from the first half of the stream, over simulated runs."""
    half = kept.shape[1] // 2
    early, late = kept[:, :half].sum(1), kept[:, -half:].sum(1)
    share = bootstrap_interval(early, late, statistic=lambda a, b: a.sum() / (a.sum() + b.sum()), seed=seed)
    return check_claim(
        "A reservoir favours neither early nor late messages: share from the first half is 0.49 to 0.51",
        share,
        above=0.49,
        below=0.51,
    )


def acceptance_falls_claim(name: str, accepted: Float[np.ndarray, " n"], seed: int = 0) -> Claim:
    """Acceptance rate per message on a full buffer, in stream order: first half minus second half."""
    half = len(accepted) // 2
    fall = bootstrap_interval(
        accepted[:half], accepted[-half:], statistic=lambda a, b: a.mean() - b.mean(), seed=seed, unit="of messages"
    )
    return check_claim(f"{name} accepts less in the second half of the stream: the fall is above 0", fall, above=0)


def below_reservoir_claim(
    accepted: Float[np.ndarray, " n"], reservoir: Float[np.ndarray, " n"], seed: int = 0
) -> Claim:
    """Acceptance in the second half of the stream: reservoir sampling's k/i minus the three-way rule's."""
    half = len(accepted) // 2
    gap = bootstrap_interval(
        reservoir[-half:],
        accepted[-half:],
        statistic=lambda a, b: a.mean() - b.mean(),
        seed=seed,
        unit="of messages",
    )
    return check_claim(
        "In the second half “all three higher” lets in fewer messages than a fair lottery: the gap is above 0",
        gap,
        above=0,
    )


def first_arrivals_claim(kept: Int[np.ndarray, " k"], bins: int, seed: int = 0) -> Claim:
    """Share of the buffer that simply arrived first, under the released scripts' rule."""
    share = bootstrap_interval((kept < bins).astype(float), seed=seed, unit="of the buffer")
    return check_claim(
        "The released scripts' rule keeps mostly whatever came first: share of first arrivals is at least 0.5",
        share,
        above=0.5,
        paper="not in the paper; the released scripts, simulated with random scores, keep 61 of 64 (our calculation)",
    )


def higher_mean_claim(
    measure: str, quality: Float[np.ndarray, " s"], random: Float[np.ndarray, " s"], seed: int = 0
) -> Claim:
    """Mean of a metric in the quality buffer minus that in the random one, seed by seed."""
    gap = _paired(quality, random, seed)
    return check_claim(
        f"The quality buffer has a higher {MEASURES[measure]} than the random one: difference is above 0", gap, above=0
    )


def less_redundant_claim(quality: Float[np.ndarray, " s"], random: Float[np.ndarray, " s"], seed: int = 0) -> Claim:
    """Mean pairwise cosine in the random buffer minus that in the quality buffer, seed by seed."""
    gap = _paired(random, quality, seed)
    return check_claim(
        "The quality buffer repeats itself less than the random one: difference of mean cosines is above 0",
        gap,
        above=0,
    )


def fifo_redundancy_claim(fifo: Float[np.ndarray, " w"], random: Float[np.ndarray, " w"], seed: int = 0) -> Claim:
    """Mean pairwise cosine in the FIFO buffer minus that in a random one, at several moments of the stream."""
    gap = bootstrap_interval(fifo, random, statistic=lambda a, b: a.mean() - b.mean(), seed=seed)
    return check_claim(
        "The newest messages repeat themselves more than a random sample: difference of mean cosines is above 0",
        gap,
        above=0,
    )


def correlated_stream_claim(observed: float | int, shuffled: Float[np.ndarray, " r"], seed: int = 0) -> Claim:
    """Mean cosine of neighbours in the stream minus that in its shuffles; the interval is that of the shuffles."""
    low, high = observed - np.quantile(shuffled, [0.975, 0.025])
    excess = Estimate(float(observed - shuffled.mean()), float(low), float(high), len(shuffled), (seed,))
    return check_claim(
        "Neighbours in the stream resemble each other more than in shuffled streams: excess of the cosine is above 0",
        excess,
        above=0,
    )


def _paired(a: Float[np.ndarray, " s"], b: Float[np.ndarray, " s"], seed: int) -> Estimate:
    e = bootstrap_interval(a, b, statistic=lambda x, y: x.mean() - y.mean(), seed=seed)
    return replace(e, seeds=tuple(range(len(a))))
