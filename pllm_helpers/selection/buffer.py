"""The buffer of Qin et al., section 3: a few bins of fixed size, each with one dialogue set.

Crash-safe: every decision on a streamed set, with the stream's position and the random state, is
one transaction, and so is every annotation. What a call has returned is kept.

Exact: vectors are rounded to a grid on which sums and dot products in fp64 make no rounding error
(:func:`on_grid`). So the sums behind IDD do not depend on the order in which entries came and went,
and a stream that was interrupted goes on exactly as if it had not been.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import sqlite3
from collections import UserDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple, SupportsIndex

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped

from ..dialogue import DialogueSet
from ..runtime import InputError
from .metrics import MODES, check_choice
from .scoring import DomainMeans, MetricTable
from .store import Store, checksum

if TYPE_CHECKING:
    from .policies import Policy

__all__ = [
    "BIN_BYTES",
    "METRICS",
    "Annotation",
    "BufferView",
    "Candidate",
    "Choice",
    "Decision",
    "DialogueBuffer",
    "Entry",
    "on_grid",
]

BIN_BYTES = 22 * 1024
"""Bytes of one bin: 22 KB as in Qin et al. (unverified)."""
METRICS = ("eoe", "dss", "idd")
DEFAULT_BINS = 64  # of the first author's scripts


# ---------------------------------------------------------------- records


@dataclass(frozen=True, eq=False)
class Entry:
    """What one bin holds.

    ``embedding``: float32, shape ``(d,)``. ``scores``: ``eoe``, ``dss`` and ``idd`` as they were when
    the set came in. ``position``: its place in the stream. ``annotation``: the person's preferred
    reply, if there is one.
    """

    slot: int
    dialogue: DialogueSet
    domain: str | None
    embedding: Float[np.ndarray, " d"]
    scores: Mapping[str, float]
    annotation: str | None
    position: int

    @property
    def id(self) -> str:
        """Content hash of the dialogue set."""
        return self.dialogue.id


@dataclass(frozen=True, eq=False)
class Candidate:
    """A set that has arrived and is to be decided on: what a policy sees of it.

    ``vector``: its embedding scaled to length 1, on the buffer's grid, fp64, shape ``(d,)``.
    """

    position: int
    dialogue: DialogueSet
    domain: str | None
    vector: Float[np.ndarray, " d"]
    scores: Mapping[str, float]


class Choice(NamedTuple):
    """A policy's answer with its grounds; a bare slot or ``None`` will do as well.

    ``slot``: which entry goes, ``None`` to discard the newcomer. ``candidates``: how many entries
    could have gone. ``too_low``: the metrics in which the newcomer fell short.
    """

    slot: int | None
    reason: str = ""
    candidates: int = 0
    too_low: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Decision:
    """What became of one streamed set, and why.

    ``action``: ``"insert"`` (into a free bin), ``"replace"`` or ``"discard"``. ``slot``: the bin, and
    ``replaced`` the entry that was in it. ``candidates``: how many entries could have gone.
    ``too_low``: the metrics in which the newcomer fell short of the entry it came closest to.
    """

    position: int
    action: str
    slot: int | None
    replaced: Entry | None
    scores: Mapping[str, float]
    domain: str | None
    reason: str
    candidates: int = 0
    too_low: tuple[str, ...] = ()


@dataclass(frozen=True)
class Annotation:
    """One answer or skip, in the order given; ``text`` is ``None`` for a skip."""

    number: int
    id: str
    kind: str
    text: str | None
    dialogue: DialogueSet


# ---------------------------------------------------------------- exact vectors


def grid_bits(bins: int) -> int:
    """Binary digits after the point such that sums over ``bins`` unit vectors are exact in fp64.

    A product of two numbers of b digits has 2b, and a dot product with a sum of ``bins`` unit
    vectors stays below ``bins``: 2b + log₂ bins digits must fit into 53.
    """
    return min(20, (52 - math.ceil(math.log2(bins + 1))) // 2)


def on_grid(embedding: Float[np.ndarray, " d"], bits: int = 20) -> Float[np.ndarray, " d"]:
    """The embedding scaled to length 1 and rounded to ``bits`` binary digits: an error below 5e-7."""
    scale = 2.0**bits
    return np.round(DomainMeans.unit(embedding) * scale) / scale


class _ExactMeans(DomainMeans):
    """Per-domain sums of vectors that are on the grid already."""

    @staticmethod
    def unit(embedding: Float[np.ndarray, " d"]) -> Float[np.ndarray, " d"]:
        return embedding


# ---------------------------------------------------------------- what a policy sees


class BufferView:
    """The full buffer as arrays over its slots, for a policy to choose from; they cannot be written to.

    Attributes
    ----------
    capacity : number of bins, n. seen : sets offered so far that could have been stored, the
        newcomer included. mode : of IDD.
    positions : place in the stream of each entry, shape ``(n,)``. domains : their dominant domains.
    stored_scores : EOE, DSS, IDD at insertion, shape ``(n, 3)``.
    vectors : unit vectors on the grid, fp64, shape ``(n, d)``.
    memory : what the policy wants to remember, JSON values or bytes under names; what it assigns is
        kept in the same transaction. It lies outside the bins: say how much it takes.
    scratch : a place for what can be computed again from all this; never saved.
    """

    def __init__(self, buffer: DialogueBuffer, new: Candidate, mode: str):
        self._buffer, self._new, self.mode = buffer, new, mode
        self.capacity, self.seen = buffer.capacity, buffer._seen + 1
        self.positions: Int[np.ndarray, " n"] = _read_only(buffer._positions)
        self.stored_scores: Float[np.ndarray, "n 3"] = _read_only(buffer._scores)
        self.vectors: Float[np.ndarray, "n d"] = _read_only(buffer._vectors)
        self.memory, self.scratch = buffer._memory, buffer._scratch

    @property
    def entries(self) -> list[Entry]:
        """The entries by slot."""
        return self._buffer.entries

    @property
    def domains(self) -> list[str | None]:
        return [e.domain for e in self._buffer._entries]

    @cached_property
    def same_domain(self) -> Bool[np.ndarray, " n"]:
        """Which entries share the newcomer's dominant domain."""
        return self._buffer._codes == self._buffer._code(self._new.domain)

    @cached_property
    def present_scores(self) -> Float[np.ndarray, "n 3"]:
        """EOE, DSS, and IDD of every entry against the *others* of its domain as they are now."""
        scores = self.stored_scores.copy()
        scores[:, 2] = self._buffer.present_idd(self.mode)
        return scores

    @cached_property
    def similarity(self) -> Float[np.ndarray, " n"]:
        """Cosine of the newcomer with every entry."""
        return self.vectors @ self._new.vector

    @property
    def similarities(self) -> Float[np.ndarray, "n n"]:
        """Cosines among the entries, −∞ on the diagonal; kept up to date from the first use on."""
        return _read_only(self._buffer._similarity_matrix())

    @property
    def nearest(self) -> Float[np.ndarray, " n"]:
        """Cosine of every entry with the one nearest to it."""
        self._buffer._similarity_matrix()
        return _read_only(self._buffer._nearest)


def _read_only(array: Shaped[np.ndarray, "..."]) -> Shaped[np.ndarray, "..."]:
    view = array.view()
    view.flags.writeable = False
    return view


# ---------------------------------------------------------------- the buffer


class DialogueBuffer:
    """A buffer of ``bins`` bins, in memory or in a file that survives crashes.

    Parameters
    ----------
    path : the file, made if it is not there; ``None``: in memory.
    bins : number of bins; 64 if not given, or what the file says.
    bin_bytes : size of one bin; 22 KB if not given, or what the file says. A set whose text, labels
        and embedding take more is not stored.
    seed : of the random choices; 0 if not given, or what the file says.

    One process at a time may have a file open. Raises :class:`~pllm_helpers.runtime.InputError` if
    it is open elsewhere, damaged, of another kind, or was made with other settings. Copy a file
    only while it is closed: its newest changes lie in the ``-wal`` beside it.

    >>> with DialogueBuffer(bins=2) as buffer:
    ...     len(buffer), buffer.capacity, buffer.position
    (0, 2, 0)
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        bins: SupportsIndex | None = None,
        bin_bytes: SupportsIndex | None = None,
        seed: SupportsIndex | None = None,
    ):
        wanted = {
            "bins": _whole("bins", bins, 1),
            "bin_bytes": _whole("bin_bytes", bin_bytes, 1),
            "seed": _whole("seed", seed, 0),
        }
        self._store = Store(path)
        self.path = self._store.path
        try:
            self._settle(wanted)
            self._load()
        except BaseException:
            self._store.close()
            raise

    def _settle(self, wanted: Mapping[str, int | None]) -> None:
        """Settings of a new file, or agreement with those of an old one."""
        found = self._settings()
        if "bins" not in found:
            defaults = {"bins": DEFAULT_BINS, "bin_bytes": BIN_BYTES, "seed": 0}
            found = {k: defaults[k] if v is None else v for k, v in wanted.items()}
            rng = np.random.Generator(np.random.PCG64(found["seed"]))
            with self._store.transaction() as c:
                for key, value in found.items():
                    _put(c, "settings", key, value)
                fields = (0, 0, b"", _encode(rng.bit_generator.state))
                c.execute("INSERT INTO progress VALUES (0, ?, ?, ?, ?, ?)", (*fields, checksum(*fields)))
        for key, value in wanted.items():
            if value is not None and value != found[key]:
                raise InputError(
                    key, f"expected {found[key]}, as {self.path} was made with, got {value}", "Or choose another file."
                )
        self.capacity: int = found["bins"]
        self.bin_bytes: int = found["bin_bytes"]
        self.seed: int = found["seed"]
        self._bits = grid_bits(self.capacity)
        self._rng = np.random.Generator(np.random.PCG64(self.seed))

    def _settings(self) -> dict[str, Any]:
        return {k: json.loads(v) for k, v in self._store.rows("SELECT key, value, crc FROM settings")}

    def _load(self) -> None:
        """Everything in memory from the file: at opening, and after a failed transaction."""
        rows = self._store.rows
        self._stream_settings: dict[str, Any] | None = self._settings().get("stream")
        self._state: dict[str, str] = dict(rows("SELECT key, value, crc FROM state"))
        progress = rows("SELECT position, seen, chain, random, crc FROM progress")
        if len(progress) != 1:
            raise self._store.damaged("its stream position is missing")
        self._position, self._seen, self._chain, random = progress[0]
        self._rng.bit_generator.state = json.loads(random)
        self._actions = [
            Annotation(number, id, kind, json.loads(text), _dialogue(dialogue))
            for number, id, kind, text, dialogue in rows(
                "SELECT number, id, kind, text, dialogue, crc FROM actions ORDER BY number"
            )
        ]
        self._answers = {a.id: a.text for a in self._actions}
        n = self.capacity
        self._entries: list[Entry] = []
        self._slots: dict[str, int] = {}  # by id
        self._codes_by_domain: dict[str | None, int] = {}
        self._positions, self._codes = np.zeros(n, dtype=np.int64), np.full(n, -1)
        self._scores, self._sizes = np.zeros((n, 3)), np.zeros(n, dtype=np.int64)
        self._vectors: Float[np.ndarray, "n d"] = np.zeros((n, 0))
        self._means, self._gram = _ExactMeans(), None
        self._verified: tuple[Sequence[DialogueSet], MetricTable] | None = None
        self._within, self._stale = np.zeros(n), set[int]()  # cosine sums inside the domain, domains to redo
        for slot, position, id, domain, *scores, embedding, dialogue in rows(
            "SELECT slot, position, id, domain, eoe, dss, idd, embedding, dialogue, crc FROM entries ORDER BY slot"
        ):
            if slot != len(self._entries) or slot >= n:
                raise self._store.damaged(f"slot {slot} is out of order")
            vector = np.frombuffer(embedding, dtype="<f4").astype(np.float32)
            vector.flags.writeable = False
            d = _dialogue(dialogue)
            entry = Entry(
                slot, d, domain, vector, dict(zip(METRICS, scores, strict=True)), self._answers.get(id), position
            )
            self._hold(entry, id, on_grid(vector, self._bits), _bytes(dialogue, vector, domain))
        self._scratch: dict[str, Any] = {}
        self._memory = _Memory()
        for key, value in rows("SELECT key, value, crc FROM memory"):
            self._memory[key] = value if isinstance(value, bytes) else json.loads(value)
        self._memory.changed.clear()

    # ------------------------------------------------------------ looking

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Entry]:
        return iter(self.entries)

    def __repr__(self) -> str:
        where = self.path or "memory"
        return f"DialogueBuffer({len(self)} of {self.capacity} bins, position {self.position:,}, {where})"

    @property
    def entries(self) -> list[Entry]:
        """The entries by slot."""
        return list(self._entries)

    @property
    def position(self) -> int:
        """How many sets of the stream have been decided on."""
        return self._position

    @property
    def full(self) -> bool:
        """Whether no bin is free."""
        return len(self._entries) == self.capacity

    @property
    def bytes_used(self) -> int:
        """Bytes of text, labels, embeddings and annotations in the bins."""
        return sum(int(self._sizes[e.slot]) + _size(e.annotation) for e in self._entries)

    @property
    def bytes_reserved(self) -> int:
        """The byte budget: bins times size of a bin."""
        return self.capacity * self.bin_bytes

    def present_idd(self, mode: str = "paper") -> Float[np.ndarray, " k"]:
        """IDD of every entry against the *other* entries of its domain; 1 where it has none there."""
        check_choice(mode, MODES, "mode")
        k = len(self._entries)
        codes = self._codes[:k]
        for code in self._stale:
            members = np.flatnonzero(codes == code)
            vectors = self._vectors[members]
            if len(members):
                total = self._means.sums[self._entries[members[0]].domain]
                self._within[members] = vectors @ total - np.einsum("rd,rd->r", vectors, vectors)
        self._stale.clear()
        counts = np.bincount(codes, minlength=1)[codes] - 1 if k else np.zeros(0, dtype=int)
        similarity = np.clip(self._within[:k] / np.maximum(counts, 1), -1, 1)
        if mode == "released_code":
            return np.where(counts > 0, similarity, 0.0)
        return np.where(counts > 0, 1.0 - similarity, 1.0)

    def digest(self) -> str:
        """Hash of all that the buffer is: entries, annotations, position, random state, the policy's memory.

        Equal digests mean equal bits, and the same future on the same stream.
        """
        h = hashlib.sha256()
        for e in self._entries:
            scores = [e.scores[m].hex() for m in METRICS]
            h.update(_encode([e.slot, e.position, e.domain, scores, e.annotation]))
            h.update(_record(e.dialogue) + e.embedding.astype("<f4").tobytes())
        h.update(_encode([self._position, self._seen, self._rng.bit_generator.state]))
        for key in sorted(self._memory):
            value = self._memory[key]
            h.update(_encode(key) + (value if isinstance(value, bytes) else _encode(value)))
        h.update(_encode([[a.number, a.id, a.kind, a.text] for a in self._actions]) + self._chain)
        return h.hexdigest()

    # ------------------------------------------------------------ streaming

    def offer(
        self,
        policy: Policy,
        dialogue: DialogueSet,
        *,
        embedding: Float[np.ndarray, " d"],
        domain: str | None,
        eoe: float | int,
        dss: float | int,
        mode: str = "paper",
    ) -> Decision:
        """Decide on the next set of the stream, in one transaction.

        A free bin is filled; a full buffer asks the policy. Never stored, and said so in the
        decision: a set that is too large for a bin, one without content (its embedding is zero),
        and one whose twin (same id) is in the buffer already. Raises
        :class:`~pllm_helpers.runtime.InputError` on NaN and on an embedding of another length; the
        buffer is then as before.
        """
        check_choice(mode, MODES, "mode")
        vector32 = np.array(embedding, dtype=np.float32)  # a copy, whatever becomes of the caller's
        vector32.flags.writeable = False
        for what, value in (("embedding", vector32), ("eoe", eoe), ("dss", dss)):
            if not np.isfinite(value).all():
                raise InputError(what, f"expected finite numbers at position {self._position}, got NaN or infinity")
        if domain is not None and not isinstance(domain, str):
            raise InputError("domain", f"expected a name or None, got {type(domain).__name__}")
        if self._entries and vector32.shape != self._entries[0].embedding.shape:
            raise InputError(
                "embedding", f"expected shape {self._entries[0].embedding.shape}, got {vector32.shape}", "Same encoder?"
            )
        record, id = _record(dialogue), dialogue.id
        size = _bytes(record, vector32, domain) + _size(self._answers.get(id))
        with self._store.lock, self._reloading():
            return self._decide(policy, dialogue, record, id, size, vector32, domain, float(eoe), float(dss), mode)

    def _decide(
        self,
        policy: Policy,
        dialogue: DialogueSet,
        record: bytes,
        id: str,
        size: int,
        embedding: Float[np.ndarray, " d"],
        domain: str | None,
        eoe: float,
        dss: float,
        mode: str,
    ) -> Decision:
        stream = {**policy.settings(), "idd": mode}
        self._agree(stream)
        blank = not embedding.any()
        vector = np.zeros(len(embedding)) if blank else on_grid(embedding, self._bits)
        idd = 0.0 if blank else self._means.idd(vector, domain, mode=mode)
        scores = {"eoe": eoe + 0.0, "dss": dss + 0.0, "idd": idd + 0.0}  # no minus zero: SQLite has none
        twin = self._slots.get(id)
        seen = self._seen
        if blank:
            choice = Choice(None, "no content: its embedding is zero")
        elif size > self.bin_bytes:
            choice = Choice(None, f"too large: {size:,} bytes, a bin holds {self.bin_bytes:,}")
        elif twin is not None:
            choice = Choice(None, f"duplicate of slot {twin}")
        elif not self.full:
            choice, seen = Choice(len(self._entries), "a bin is free"), seen + 1
        else:
            new = Candidate(self._position, dialogue, domain, vector, scores)
            answer = policy.choose(new, BufferView(self, new, mode), self._rng)
            choice, seen = answer if isinstance(answer, Choice) else Choice(answer), seen + 1
        slot = None if choice.slot is None else int(choice.slot)
        if slot is not None and not 0 <= slot <= min(len(self._entries), self.capacity - 1):
            raise InputError(f"policy {policy.name}", f"expected a slot below {self.capacity} or None, got {slot}")
        action = "discard" if slot is None else "replace" if slot < len(self._entries) else "insert"
        replaced = self._entries[slot] if slot is not None and action == "replace" else None
        entry = None
        if slot is not None:
            entry = Entry(slot, _dialogue(record), domain, embedding, scores, self._answers.get(id), self._position)
        chain = _link(self._chain, id, domain, eoe, dss, embedding)
        self._write(stream, entry, id, record, seen, chain)
        if entry is not None:
            self._hold(entry, id, vector, _bytes(record, embedding, domain))
        self._position, self._seen, self._chain, self._stream_settings = self._position + 1, seen, chain, stream
        for key in self._memory.changed & set(self._memory):  # tuples are lists from here on, as after a restart
            if not isinstance(self._memory[key], bytes):
                self._memory.data[key] = json.loads(json.dumps(self._memory[key]))
        self._memory.changed.clear()
        self._verified = None
        reason = choice.reason or {"discard": "the policy keeps what it has"}.get(action, f"the policy chose {slot}")
        return Decision(
            self._position - 1,
            action,
            slot,
            replaced,
            scores,
            domain,
            reason,
            choice.candidates,
            tuple(choice.too_low),
        )

    def check_past(self, policy: Policy, dialogues: Sequence[DialogueSet], table: MetricTable) -> None:
        """Raise unless this policy decided on the first sets of this stream, with these scores, so far."""
        self._agree({**policy.settings(), "idd": table.mode})
        if self._verified is not None and all(a is b for a, b in zip(self._verified, (dialogues, table), strict=True)):
            return
        n, chain, names = self._position, b"", table.domain_names
        if n <= len(dialogues):
            for i in range(n):
                row = (names[i], float(table.eoe[i]), float(table.dss[i]), table.embeddings[i])
                chain = _link(chain, dialogues[i].id, *row)
        if n > len(dialogues) or chain != self._chain:
            raise InputError(
                "dialogues",
                f"expected the stream whose first {n:,} sets, with their scores, this buffer has decided on",
                "Pass the stream from its beginning, scored as before, or use another buffer.",
            )
        self._verified = (dialogues, table)

    def _agree(self, stream: Mapping[str, Any]) -> None:
        """Refuse to go on with another policy than the buffer was filled by."""
        old = self._stream_settings
        if old is None or old == stream or _encode(old) == _encode(stream):
            return
        differ = [k for k in {**old, **stream} if old.get(k) != stream.get(k)]
        was, now = ({k: s.get(k) for k in differ} for s in (old, stream))
        raise InputError(
            "policy", f"expected {was}, by which this buffer was filled, got {now}", "Use another buffer for it."
        )

    def _write(
        self, stream: Mapping[str, Any], entry: Entry | None, id: str, record: bytes, seen: int, chain: bytes
    ) -> None:
        random = _encode(self._rng.bit_generator.state)
        # a discard repeats itself after a power cut, so it need not wait for the disk; a kill does not lose it
        with self._store.transaction(durable=entry is not None) as c:
            if self._stream_settings is None:
                _put(c, "settings", "stream", stream)
            if entry is not None:
                e, scores = entry, [entry.scores[m] for m in METRICS]
                fields = (e.slot, e.position, id, e.domain, *scores, e.embedding.astype("<f4").tobytes(), record)
                c.execute(
                    "INSERT OR REPLACE INTO entries VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", (*fields, checksum(*fields))
                )
            for key in sorted(self._memory.changed):
                if key in self._memory:
                    _put(c, "memory", key, self._memory[key])
                else:
                    c.execute("DELETE FROM memory WHERE key = ?", (key,))
            progress = (self._position + 1, seen, chain, random)
            c.execute(
                "UPDATE progress SET position = ?, seen = ?, chain = ?, random = ?, crc = ?",
                (*progress, checksum(*progress)),
            )

    def _code(self, domain: str | None) -> int:
        return self._codes_by_domain.setdefault(domain, len(self._codes_by_domain))

    def _hold(self, entry: Entry, id: str, vector: Float[np.ndarray, " d"], size: int) -> None:
        """Put an entry into its slot, in memory."""
        slot = entry.slot
        if not self._vectors.shape[1]:
            self._vectors = np.zeros((self.capacity, len(vector)))
        if slot < len(self._entries):
            old = self._entries[slot]
            self._means.remove(self._vectors[slot], old.domain)
            self._stale.add(self._code(old.domain))
            del self._slots[old.id]
            self._entries[slot] = entry
        else:
            self._entries.append(entry)
        self._slots[id] = slot
        self._means.add(vector, entry.domain)
        self._stale.add(self._code(entry.domain))
        self._vectors[slot], self._codes[slot] = vector, self._code(entry.domain)
        self._positions[slot], self._scores[slot] = entry.position, [entry.scores[m] for m in METRICS]
        self._sizes[slot] = size
        if self._gram is not None:
            self._update_similarities(slot)

    # ------------------------------------------------------------ cosines among entries

    def _similarity_matrix(self) -> Float[np.ndarray, "n n"]:
        if self._gram is None:
            self._gram = self._vectors @ self._vectors.T
            np.fill_diagonal(self._gram, -np.inf)
            self._nearest = self._gram.max(1)
        return self._gram

    def _update_similarities(self, slot: int) -> None:
        row = self._vectors @ self._vectors[slot]
        row[slot] = -np.inf
        lost = self._gram[slot] >= self._nearest  # whose nearest was the old entry
        self._gram[slot], self._gram[:, slot] = row, row
        np.maximum(self._nearest, row, out=self._nearest)
        lost[slot] = True
        self._nearest[lost] = self._gram[lost].max(1)

    # ------------------------------------------------------------ annotations

    def annotate(self, what: Entry | str, text: str, *, state: Mapping[str, Any] | None = None) -> Annotation:
        """Keep the person's reply to a buffered set, given as entry or id, in one transaction.

        It belongs to the id: it stays in :meth:`history` when the entry is replaced later (an entry
        that was replaced since it was shown can still be annotated), and comes back if the same set
        enters again. A second annotation takes the place of the first. ``state`` as in
        :meth:`set_state`, in the same transaction. Raises
        :class:`~pllm_helpers.runtime.InputError` on blank text, an unknown id and a text for which
        the entry's bin has no room.
        """
        if not isinstance(text, str) or not text.strip():
            raise InputError("text", "expected a reply, got none", "Use skip() to leave a set out.")
        return self._act(what, "answer", text, state)

    def skip(self, what: Entry | str, *, state: Mapping[str, Any] | None = None) -> Annotation:
        """Note that the person does not want to answer; an earlier annotation no longer counts."""
        return self._act(what, "skip", None, state)

    def undo_last(self, *, state: Mapping[str, Any] | None = None) -> Annotation | None:
        """Take back the newest annotation or skip and return it; what was there before counts again."""
        with self._store.lock:
            if not self._actions:
                return None
            last = self._actions[-1]
            with self._reloading():
                with self._store.transaction() as c:
                    c.execute("DELETE FROM actions WHERE number = ?", (last.number,))
                    self._put_state(c, state)
                self._actions.pop()
                earlier = next((a for a in reversed(self._actions) if a.id == last.id), None)
                self._show(last.id, earlier)
                self._state.update(_texts(state or {}))
            return last

    def history(self) -> list[Annotation]:
        """All annotations and skips that were not undone, oldest first, also of entries since replaced."""
        return list(self._actions)

    def answer_of(self, what: Entry | str) -> str | None:
        """The annotation that counts for a set, in the buffer or not."""
        return self._answers.get(what if isinstance(what, str) else what.id)

    @property
    def skipped(self) -> frozenset[str]:
        """Ids whose newest mark is a skip."""
        return frozenset(id for id, text in self._answers.items() if text is None)

    def state(self, key: str, default: Any = None) -> Any:
        """A value that :meth:`set_state` kept."""
        return json.loads(self._state[key]) if key in self._state else default

    def set_state(self, values: Mapping[str, Any]) -> None:
        """Keep small JSON values under names, for instance how many questions were asked today."""
        with self._store.lock, self._reloading():
            with self._store.transaction() as c:
                self._put_state(c, values)
            self._state.update(_texts(values))

    def _act(self, what: Entry | str, kind: str, text: str | None, state: Mapping[str, Any] | None) -> Annotation:
        id = what if isinstance(what, str) else what.id
        with self._store.lock:
            slot = self._slots.get(id)
            if slot is not None:
                dialogue = self._entries[slot].dialogue
                needed = int(self._sizes[slot]) + _size(text)
                if needed > self.bin_bytes:
                    expected = f"expected at most {self.bin_bytes:,} bytes with its dialogue set, got {needed:,}"
                    raise InputError("text", expected, "Shorten the reply.")
            elif isinstance(what, Entry):
                dialogue = what.dialogue
            else:
                known = next((a.dialogue for a in reversed(self._actions) if a.id == id), None)
                if known is None:
                    raise InputError("id", f"expected the id of a buffered set, got {id!r}", "See buffer.entries.")
                dialogue = known
            fields = (id, kind, _encode(text), _record(dialogue))
            with self._reloading():
                with self._store.transaction() as c:
                    cursor = c.execute(
                        "INSERT INTO actions (id, kind, text, dialogue, crc) VALUES (?, ?, ?, ?, 0)", fields
                    )
                    number = int(cursor.lastrowid or 0)
                    c.execute("UPDATE actions SET crc = ? WHERE number = ?", (checksum(number, *fields), number))
                    self._put_state(c, state)
                action = Annotation(number, id, kind, text, dialogue)
                self._actions.append(action)
                self._show(id, action)
                self._state.update(_texts(state or {}))
            return action

    def _show(self, id: str, action: Annotation | None) -> None:
        if action is None:
            self._answers.pop(id, None)
        else:
            self._answers[id] = action.text
        slot = self._slots.get(id)
        if slot is not None:
            self._entries[slot] = replace(self._entries[slot], annotation=self._answers.get(id))

    def _put_state(self, c: sqlite3.Connection, values: Mapping[str, Any] | None) -> None:
        for key, value in (values or {}).items():
            _put(c, "state", key, value)

    @contextlib.contextmanager
    def _reloading(self) -> Iterator[None]:
        """What is in memory must be what is in the file, even after an interrupt between the two."""
        try:
            yield
        except BaseException:
            if self._store.open:
                try:
                    self._load()
                except BaseException:  # half read: of no more use
                    self._store.close()
                    raise
            raise

    # ------------------------------------------------------------ closing

    def close(self) -> None:
        """Let go of the file. Closing twice is harmless; what was acknowledged is kept anyway."""
        self._store.close()

    def __enter__(self) -> DialogueBuffer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Memory(UserDict[str, Any]):
    """A dictionary that knows which of its keys were assigned or deleted."""

    def __init__(self) -> None:
        self.changed: set[str] = set()
        super().__init__()

    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(key, value)
        self.changed.add(key)

    def __delitem__(self, key: str) -> None:
        super().__delitem__(key)
        self.changed.add(key)


# ---------------------------------------------------------------- bytes


def _link(
    chain: bytes, id: str, domain: str | None, eoe: float, dss: float, embedding: Float[np.ndarray, " d"]
) -> bytes:
    """Hash over the stream so far, so that another stream is not taken for it."""
    labels = _encode([id, domain, eoe.hex(), dss.hex()])
    return hashlib.blake2b(chain + labels + embedding.astype("<f4").tobytes(), digest_size=16).digest()


def _encode(value: Any) -> bytes:
    """JSON in UTF-8; lone surrogates, which JavaScript may send, are kept as they are."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "surrogatepass")


def _record(d: DialogueSet) -> bytes:
    try:
        text = json.dumps(
            [d.user, d.question, d.answer, d.time, d.source, dict(d.meta)],
            ensure_ascii=False,
            separators=(",", ":"),
            default=_plain,
        )
    except (TypeError, ValueError) as e:
        raise InputError("dialogue.meta", f"expected values that JSON can hold, got {e}") from e
    return text.encode("utf-8", "surrogatepass")


def _plain(value: Any) -> Any:
    """NumPy numbers and arrays, as readers of data sets give them."""
    if isinstance(value, (np.generic, np.ndarray)):
        return value.tolist()
    raise TypeError(type(value).__name__)


def _dialogue(record: bytes) -> DialogueSet:
    return DialogueSet(*json.loads(record.decode("utf-8", "surrogatepass")))


def _bytes(record: bytes, embedding: Float[np.ndarray, " d"], domain: str | None) -> int:
    """What an entry takes of its bin, without annotation: text and labels, embedding, scores, domain."""
    return len(record) + embedding.nbytes + 8 * len(METRICS) + _size(domain)


def _size(text: str | None) -> int:
    return len((text or "").encode("utf-8", "surrogatepass"))


def _put(c: sqlite3.Connection, table: str, key: str, value: Any) -> None:
    try:
        data = value if isinstance(value, bytes) else json.dumps(value)  # BLOB and TEXT: the type tells them apart
    except (TypeError, ValueError) as e:
        raise InputError(key, f"expected a value that JSON can hold, got {e}") from e
    c.execute(f"INSERT OR REPLACE INTO {table} VALUES (?, ?, ?)", (key, data, checksum(key, data)))


def _texts(values: Mapping[str, Any]) -> dict[str, str]:
    return {key: json.dumps(value) for key, value in values.items()}


def _whole(what: str, value: SupportsIndex | None, least: int) -> int | None:
    if value is None:
        return None
    if isinstance(value, bool) or not hasattr(value, "__index__") or value.__index__() < least:
        raise InputError(what, f"expected a whole number of at least {least}, got {value!r}")
    return value.__index__()
