"""Replacement policies: which entry of a full buffer goes when a new dialogue set arrives.

A new policy is one small class; the buffer keeps its decisions, its random state and its memory::

    class LongestAnswer(Policy):
        name = "longest"

        def choose(self, new, buffer, rng):
            lengths = [len(e.dialogue.answer) for e in buffer.entries]
            shortest = int(np.argmin(lengths))
            return shortest if len(new.dialogue.answer) > lengths[shortest] else None

``choose`` is called when the buffer is full. It may look at the newcomer and at the
:class:`~pllm_helpers.selection.BufferView`, draw from ``rng``, keep things in ``buffer.memory``,
and must depend on nothing else: then an interrupted stream goes on as if it had not been interrupted.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Float

from ..runtime import InputError
from .buffer import METRICS, BufferView, Candidate, Choice
from .metrics import MODES, check_choice

__all__ = [
    "POLICIES",
    "CombinedScore",
    "FacilityLocation",
    "FifoReplace",
    "KCenter",
    "Policy",
    "QualityPolicy",
    "RandomReplace",
    "make_policy",
]


class Policy(ABC):
    """Decides on a newcomer when the buffer is full. See the module's text for how to write one."""

    name: ClassVar[str] = "policy"
    mode: str | None = None  # of the scores it needs; None: it looks at no scores

    @abstractmethod
    def choose(self, new: Candidate, buffer: BufferView, rng: np.random.Generator) -> int | None | Choice:
        """The slot of the entry that goes, or ``None`` to discard the newcomer; a ``Choice`` says why."""

    def settings(self) -> dict[str, Any]:
        """What a buffer file remembers of its policy; two policies of equal settings decide alike."""
        own = {k: list(v) if isinstance(v, tuple) else v for k, v in vars(self).items() if not k.startswith("_")}
        return {"policy": self.name, **own}

    def __repr__(self) -> str:
        own = ", ".join(f"{k}={v!r}" for k, v in self.settings().items() if k != "policy")
        return f"{type(self).__name__}({own})"


class QualityPolicy(Policy):
    """The rule of Qin et al. (unverified): the newcomer replaces an entry that it beats in all metrics.

    If it beats several, one of them at random goes; if it beats none, it is discarded. Equal is not
    higher. Entries of all domains compete.

    Parameters
    ----------
    metrics : some of ``"eoe"``, ``"dss"``, ``"idd"``; a single one is an ablation of the paper's
        table 4.
    mode : ``"released_code"`` is what the first author's single-metric scripts do: only entries of
        the newcomer's domain compete, IDD is the mean *similarity*, stored once, and the entry with
        the domain's lowest score goes if the newcomer's score is *lower* still; so a domain ever
        changes one slot. No script for three metrics was released: here the newcomer must be lower
        than every entry of its domain in every metric, and the entry with the lowest mean rank
        within the domain goes. With one metric that is the released rule.
    idd : ``"present"`` compares IDD with that of the entries against the rest of their domain as
        the buffer is now; ``"stored"`` with what they scored when they came in. The paper's entry
        holds domain, text and embedding but no scores, so they are taken anew; and the stored
        IDD of a domain's first entry is 1 for ever, which hardly any newcomer can beat. In mode
        ``"released_code"`` always ``"stored"``.
    """

    name = "quality"

    def __init__(
        self,
        metrics: Sequence[str] = METRICS,
        mode: str = "paper",
        *,
        idd: str | None = None,
    ):
        chosen = (metrics,) if isinstance(metrics, str) else tuple(metrics)
        if not chosen or len(set(chosen)) < len(chosen) or set(chosen) - set(METRICS):
            raise InputError("metrics", f"expected different ones of {', '.join(METRICS)}, got {metrics!r}")
        check_choice(mode, MODES, "mode")
        idd = idd or ("present" if mode == "paper" else "stored")
        check_choice(idd, ("present", "stored"), "idd")
        if mode == "released_code" and idd == "present":
            raise InputError("idd", "expected 'stored' in mode 'released_code', got 'present'")
        self.metrics, self.mode, self.idd = chosen, mode, idd

    def choose(self, new: Candidate, buffer: BufferView, rng: np.random.Generator) -> Choice:
        columns = [METRICS.index(m) for m in self.metrics]
        mine = np.array([new.scores[m] for m in self.metrics])
        theirs = (buffer.present_scores if self.idd == "present" else buffer.stored_scores)[:, columns]
        return self._released(mine, theirs, buffer) if self.mode == "released_code" else self._paper(mine, theirs, rng)

    def _paper(
        self, mine: Float[np.ndarray, " m"], theirs: Float[np.ndarray, "n m"], rng: np.random.Generator
    ) -> Choice:
        higher = mine > theirs
        wins = higher.sum(1)
        beaten = np.flatnonzero(wins == len(mine))
        if len(beaten):
            slot = int(beaten[rng.integers(len(beaten))])
            among = "the only candidate" if len(beaten) == 1 else f"drawn from {len(beaten)} candidates"
            return Choice(slot, f"higher in {_names(self.metrics)} than slot {slot}, {among}", len(beaten))
        closest = np.flatnonzero(wins == wins.max())
        slot = int(closest[np.argmin(np.maximum(theirs[closest] - mine, 0).sum(1))])
        low = [k for k in range(len(mine)) if not higher[slot, k]]
        short = ", ".join(f"{self.metrics[k].upper()} {mine[k]:.4g} is not above {theirs[slot, k]:.4g}" for k in low)
        return Choice(None, f"closest to slot {slot}, but {short}", 0, tuple(self.metrics[k] for k in low))

    def _released(self, mine: Float[np.ndarray, " m"], theirs: Float[np.ndarray, "n m"], buffer: BufferView) -> Choice:
        members = np.flatnonzero(buffer.same_domain)
        if not len(members):
            return Choice(None, "no entry of its domain")
        scores = theirs[members]
        lower = mine < scores.min(0)
        if lower.all():
            slot = int(members[np.argmin(mean_ranks(scores))])
            return Choice(slot, f"lower in {_names(self.metrics)} than its whole domain", 1)
        high = [k for k in range(len(mine)) if not lower[k]]
        long = ", ".join(f"{self.metrics[k].upper()} {mine[k]:.4g} is not below {scores[:, k].min():.4g}" for k in high)
        return Choice(None, long, 0, tuple(self.metrics[k] for k in high))


class RandomReplace(Policy):
    """Reservoir sampling (Vitter's algorithm R): every set so far is in the buffer with equal probability."""

    name = "random"

    def choose(self, new: Candidate, buffer: BufferView, rng: np.random.Generator) -> Choice:
        drawn = int(rng.integers(buffer.seen))
        if drawn < buffer.capacity:
            return Choice(drawn, f"drawn with probability {buffer.capacity}/{buffer.seen}", buffer.capacity)
        return Choice(None, f"not drawn; the probability was {buffer.capacity}/{buffer.seen}", buffer.capacity)


class FifoReplace(Policy):
    """First in, first out: the buffer holds the newest sets."""

    name = "fifo"

    def choose(self, new: Candidate, buffer: BufferView, rng: np.random.Generator) -> Choice:
        slot = int(np.argmin(buffer.positions))
        return Choice(slot, f"slot {slot} is the oldest", 1)


class KCenter(Policy):
    """Streaming k-center by swaps: the newcomer breaks up the closest pair if it is farther away than they are.

    Distance is 1 − cosine. If the newcomer's distance to the buffer exceeds that of the closest
    pair, the one of the two that has the nearer other neighbour goes (ties: the older). So the
    least distance within the buffer never shrinks, the streaming counterpart of the greedy
    farthest-point rule, which would need the whole stream.
    """

    name = "kcenter"

    def choose(self, new: Candidate, buffer: BufferView, rng: np.random.Generator) -> Choice:
        if buffer.capacity == 1:
            return Choice(None, "one bin has no pair to break up")
        nearest = buffer.nearest
        a = int(np.argmax(nearest))
        b = int(np.argmax(buffer.similarities[a]))
        to_new, pair = float(buffer.similarity.max()), float(nearest[a])
        if to_new >= pair:
            return Choice(None, f"distance {1 - to_new:.4f} to the buffer, its closest pair has {1 - pair:.4f}")
        goes = max((a, b), key=lambda i: (self._second(buffer, i, a + b - i), -buffer.positions[i]))
        reason = f"farther away ({1 - to_new:.4f}) than slots {min(a, b)} and {max(a, b)} are apart ({1 - pair:.4f})"
        return Choice(goes, reason, 2)

    @staticmethod
    def _second(buffer: BufferView, slot: int, other: int) -> float:
        row = buffer.similarities[slot].copy()
        row[other] = -np.inf
        return float(row.max())


class CombinedScore(Policy):
    """Beyond the paper: one score, the mean rank of the three metrics, so that strength may make up for weakness.

    Ranks are taken among the entries and the newcomer, as shares in [0, 1], IDD as the buffer is
    now. The lowest of all goes; ties go against the newcomer.
    """

    name = "combined"
    mode = "paper"

    def choose(self, new: Candidate, buffer: BufferView, rng: np.random.Generator) -> Choice:
        mine = [new.scores[m] for m in METRICS]
        ranks = mean_ranks(np.vstack([buffer.present_scores, mine]))
        slot = int(np.argmin(ranks[:-1]))
        count = int((ranks[:-1] < ranks[-1]).sum())
        if count:
            return Choice(slot, f"mean rank {ranks[-1]:.3f}, the lowest entry has {ranks[slot]:.3f}", count)
        return Choice(None, f"mean rank {ranks[-1]:.3f} is not above the lowest entry's {ranks[slot]:.3f}")


class FacilityLocation(Policy):
    """Beyond the paper: submodular facility location, the mean over the stream of the greatest cosine in the buffer.

    A device cannot keep the stream that is to be covered. A reservoir of ``ground`` of its vectors
    stands for it (algorithm R; 16 bits a component, so 256 of 384 dimensions take 192 KB, about
    nine bins of 22 KB: count them when you compare). The newcomer takes the place of the entry with
    which it raises the coverage of this ground set most, if it raises it at all. The ground set
    should be several times as large as the buffer.
    """

    name = "facility"

    def __init__(self, ground: int = 256):
        if isinstance(ground, bool) or ground < 1:
            raise InputError("ground", f"expected at least 1, got {ground!r}")
        self.ground = ground

    def choose(self, new: Candidate, buffer: BufferView, rng: np.random.Generator) -> Choice:
        ground = self._sample(new, buffer, rng)
        best, slots, second = self._covered(ground, buffer)
        mine = ground @ new.vector
        gain = float(np.maximum(mine - best, 0).sum())
        # what each entry adds once the newcomer is in
        worth = np.bincount(slots, np.maximum(best, mine) - np.maximum(second, mine), buffer.capacity)
        slot, n = int(np.argmin(worth)), len(ground)
        if gain > worth[slot]:
            better = int((worth < gain).sum())
            change = f"adds {gain / n:.5f} to the mean cosine, slot {slot} only {worth[slot] / n:.5f}"
            return Choice(slot, f"{change}; {better} candidates", better)
        return Choice(None, f"adds {gain / n:.5f} to the mean cosine, the least useful entry {worth[slot] / n:.5f}")

    def _sample(self, new: Candidate, buffer: BufferView, rng: np.random.Generator) -> Float[np.ndarray, "g d"]:
        """The ground set with the newcomer offered to it; at first a sample of the buffer."""
        memory, kept = buffer.memory, buffer.scratch.get("ground")
        if not memory:
            first = rng.permutation(buffer.capacity)[: self.ground]
            kept = None
            for k, i in enumerate(first):
                memory[str(k)] = _pack(buffer.vectors[i])
        size = len(memory)
        place = size if size < self.ground else int(rng.integers(buffer.seen))
        if place < self.ground:
            memory[str(place)] = _pack(new.vector)
        if kept is None or len(kept) < len(memory):
            kept = buffer.scratch["ground"] = np.stack([_unpack(memory[str(k)]) for k in range(len(memory))])
            buffer.scratch.pop("cosines", None)
        elif place < self.ground:
            kept[place] = _unpack(memory[str(place)])
            buffer.scratch["cosines"][place] = kept[place] @ buffer.vectors.T
            buffer.scratch.pop("covered", None)
        return kept

    @staticmethod
    def _covered(ground: Float[np.ndarray, "g d"], buffer: BufferView) -> tuple[Any, Any, Any]:
        """Of every ground vector: greatest cosine in the buffer, its slot, and the second greatest; each ``(g,)``."""
        scratch, positions = buffer.scratch, buffer.positions
        if "cosines" not in scratch:
            scratch["cosines"], scratch["positions"] = ground @ buffer.vectors.T, positions.copy()
            scratch.pop("covered", None)
        changed = np.flatnonzero(scratch["positions"] != positions)
        if len(changed):
            scratch["cosines"][:, changed] = ground @ buffer.vectors[changed].T
            scratch["positions"][changed] = positions[changed]
            scratch.pop("covered", None)
        if "covered" not in scratch:
            cosines, rows = scratch["cosines"], np.arange(len(ground))
            slots = cosines.argmax(1)
            best = cosines[rows, slots]
            cosines[rows, slots] = -np.inf
            second = cosines.max(1) if buffer.capacity > 1 else np.zeros(len(ground))
            cosines[rows, slots] = best
            scratch["covered"] = best, slots, second
        return scratch["covered"]


def _pack(vector: Float[np.ndarray, " d"]) -> bytes:
    return np.round(vector * 2.0**14).astype("<i2").tobytes()


def _unpack(data: bytes) -> Float[np.ndarray, " d"]:
    return np.frombuffer(data, dtype="<i2") / 2.0**14


def mean_ranks(scores: Float[np.ndarray, "n m"]) -> Float[np.ndarray, " n"]:
    """Mean over columns of the share of rows that are lower, ties counted half: in [0, 1)."""
    total = np.zeros(len(scores))
    for column in scores.T:
        order = np.argsort(column)
        ordered = column[order]
        first = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])  # of each run of equal values
        after = np.r_[first[1:], len(column)]
        total[order] += np.repeat(first + after, after - first)
    return total / (2 * scores.size)


def _names(metrics: Sequence[str]) -> str:
    return ", ".join(m.upper() for m in metrics)


POLICIES: Mapping[str, Callable[[], Policy]] = MappingProxyType(
    {
        "quality": QualityPolicy,
        "random": RandomReplace,
        "fifo": FifoReplace,
        "kcenter": KCenter,
        "combined": CombinedScore,
        "facility": FacilityLocation,
        "eoe_only": lambda: QualityPolicy(("eoe",)),
        "dss_only": lambda: QualityPolicy(("dss",)),
        "idd_only": lambda: QualityPolicy(("idd",)),
        "released_code": lambda: QualityPolicy(mode="released_code"),
    }
)
"""A fresh policy by the key under which figures know it."""


def make_policy(key: str) -> Policy:
    """A policy by its key in ``POLICIES``. Raises :class:`~pllm_helpers.runtime.InputError` for another."""
    if key not in POLICIES:
        raise InputError("policy", f"expected one of {', '.join(POLICIES)}, got {key!r}")
    return POLICIES[key]()
