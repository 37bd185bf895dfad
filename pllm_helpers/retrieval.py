"""Personalization without training: the most similar past dialogues are put in front of a new question.

The alternative to tuning in "Empirical Guidelines for Deploying LLMs onto Resource-constrained Edge
Devices" (arXiv 2406.03777) and in LaMP (arXiv 2304.11406): nothing is learned, every prompt gets
longer. Tuning and retrieval combine: pass a tuned model to :meth:`RetrievalPersonalizer.answer`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, SupportsIndex

import numpy as np
from jaxtyping import Float

from .dialogue import DialogueSet
from .evaluation import response_nll
from .models.generation import generate
from .runtime import InputError
from .selection import DialogueBuffer, Entry

if TYPE_CHECKING:
    from .models import LLM, Encoder

__all__ = ["CHOICES", "FORMS", "Hit", "RetrievalPersonalizer"]

FORMS = ("turns", "context")
CHOICES = ("similar", "recent", "random")
_DIGITS = 5  # similarities are compared to this many decimals: batching changes the seventh


@dataclass(frozen=True)
class Hit:
    """A stored dialogue that was found: ``similarity`` is the cosine, in [-1, 1]."""

    dialogue: DialogueSet
    similarity: float


class RetrievalPersonalizer:
    """A store of a person's dialogues, searched by the cosine of sentence embeddings.

    Parameters
    ----------
    encoder : from :func:`~pllm_helpers.models.load_encoder`.
    entries : a :class:`~pllm_helpers.selection.DialogueBuffer`, its entries, or dialogue sets; may be
        empty. An entry's annotation, where it has one, is its reply.
    vectors : ``"question"`` embeds the stored questions; ``"stored"`` takes the embeddings that a
        buffer keeps already (of question and answer together), so that nothing is encoded twice.
    form : how examples enter the prompt. ``"turns"``: as earlier turns of the conversation, the
        most similar last; ``"context"``: quoted in the one user message.
    budget : most tokens of a prompt, chat template included. Examples that do not fit are left out,
        the least similar first.
    earlier_only : retrieve only what was said before the question's own time.
    choose : ``"similar"``; or, to see what similarity itself is worth, ``"recent"`` (the latest by
        time, then by order of storing) or ``"random"`` (a draw that question and store alone decide).

    A dialogue without question or reply is no example and is not stored; the same dialogue is
    stored once. Order is exact: by similarity (to five decimals), then by the order of storing.

    ``"turns"`` is the default because the shipped model did better with it on real replies: NLL per
    token 5.23 without examples, 4.78 with ``"context"``, 4.46 with ``"turns"`` (three of 100 stored
    pairs, ten held-out replies of each of the three most active people of chitchat; better for each
    of the three). :func:`pllm_helpers.experiments.task_runs.compare_forms` measures it on any dialogues.

    Raises :class:`~pllm_helpers.runtime.InputError` on unknown settings, entries of another kind, and
    stored vectors that do not fit the encoder.
    """

    def __init__(
        self,
        encoder: Encoder,
        entries: DialogueBuffer | Iterable[Entry | DialogueSet] = (),
        *,
        vectors: str = "question",
        form: str = "turns",
        budget: SupportsIndex = 768,
        earlier_only: bool = False,
        choose: str = "similar",
    ):
        settings = (("vectors", vectors, ("question", "stored")), ("form", form, FORMS), ("choose", choose, CHOICES))
        for name, value, known in settings:
            if value not in known:
                raise InputError(name, f"expected {' or '.join(known)}, got {value!r}")
        self.encoder, self.vectors, self.form, self.earlier_only = encoder, vectors, form, earlier_only
        self.choose = choose
        self.budget = _whole("budget", budget, 1)
        self._rows: dict[str, tuple[DialogueSet, Float[np.ndarray, " d"]]] = {}
        self._matrix: Float[np.ndarray, "n d"] | None = None
        self.add(entries)

    def __len__(self) -> int:
        return len(self._rows)

    def __contains__(self, what: Entry | DialogueSet | str) -> bool:
        return _id(what) in self._rows

    def __repr__(self) -> str:
        return f"RetrievalPersonalizer({len(self)} dialogues, {self.encoder.name}, as {self.form})"

    @property
    def dialogues(self) -> list[DialogueSet]:
        """What is stored, in the order of storing."""
        return [d for d, _ in self._rows.values()]

    # ------------------------------------------------------------ what is stored

    def add(self, entries: DialogueBuffer | Iterable[Entry | DialogueSet]) -> int:
        """Store dialogues; gives how many were new. An entry whose annotation changed takes its old place."""
        if isinstance(entries, DialogueBuffer):
            entries = entries.entries
        if isinstance(entries, (str, DialogueSet, Entry)):
            raise InputError("entries", "expected a list of dialogue sets or entries", "Write [dialogue].")
        fresh: list[tuple[str, DialogueSet, Any]] = []
        for place, e in enumerate(entries):
            if not isinstance(e, (Entry, DialogueSet)):
                raise InputError(f"entries[{place}]", f"expected a dialogue set or an entry, got {type(e).__name__}")
            if self.vectors == "stored" and not isinstance(e, Entry):
                raise InputError(
                    f"entries[{place}]", "expected a buffer's entry with its embedding", "Use vectors='question'."
                )
            d = e.dialogue if isinstance(e, Entry) else e
            if isinstance(e, Entry) and e.annotation is not None:
                d = replace(d, answer=e.annotation)
            if d.question.strip() and d.answer.strip():
                fresh.append((e.id, d, e.embedding if isinstance(e, Entry) else None))
        known = {id: d for id, (d, _) in self._rows.items()}
        fresh = [(id, d, v) for id, d, v in fresh if known.get(id) != d]
        if not fresh:
            return 0
        if self.vectors == "stored":
            found = np.array([_unit(v, self.encoder.dim) for _, _, v in fresh], dtype=np.float32)
        else:
            found = self.encoder.encode([d.question for _, d, _ in fresh], progress=False)
        before = len(self._rows)
        for (id, d, _), vector in zip(fresh, found, strict=True):
            self._rows[id] = (d, vector)
        self._matrix = None
        return len(self._rows) - before

    def remove(self, what: Entry | DialogueSet | str | Iterable[Entry | DialogueSet | str]) -> int:
        """Forget dialogues, given as such, as entries or by id; gives how many.

        Raises :class:`~pllm_helpers.runtime.InputError`, and forgets nothing, if one is not stored.
        """
        chosen = [what] if isinstance(what, (str, DialogueSet, Entry)) else list(what)
        ids = list(dict.fromkeys(_id(w) for w in chosen))
        for id in ids:
            if id not in self._rows:
                raise InputError("what", f"expected a stored dialogue, {id!r} is not among the {len(self)}")
        for id in ids:
            del self._rows[id]
        self._matrix = None
        return len(ids)

    def follow(self, buffer: DialogueBuffer) -> tuple[int, int]:
        """Store what the buffer holds now and forget what it has dropped; gives how many came and went."""
        held = {e.id for e in buffer.entries}
        gone = self.remove([id for id in self._rows if id not in held])
        return self.add(buffer), gone

    # ------------------------------------------------------------ search

    def retrieve(
        self,
        question: str | DialogueSet,
        k: SupportsIndex = 3,
        *,
        before: float | int | None = None,
        allow_same: bool = False,
    ) -> list[Hit]:
        """The ``k`` stored dialogues most similar to a question, the most similar first; fewer if there are not ``k``.

        A question never finds itself: stored dialogues with the same id or the same question (blanks
        and case aside) are left out unless ``allow_same``. ``before`` is a time: only earlier dialogues
        are found (with ``earlier_only``, a dialogue set's own time by default; a stored dialogue
        without a time is never earlier).
        """
        return self.retrieve_all([question], k, before=[before], allow_same=allow_same)[0]

    def retrieve_all(
        self,
        questions: Sequence[str | DialogueSet],
        k: SupportsIndex = 3,
        *,
        before: Sequence[float | int | None] | None = None,
        allow_same: bool = False,
    ) -> list[list[Hit]]:
        """:meth:`retrieve` for many questions, which are encoded together."""
        if isinstance(questions, (str, DialogueSet)):
            raise InputError("questions", "expected a list of questions", "Write [question].")
        if before is not None and len(before) != len(questions):
            raise InputError("before", f"expected one time for each of {len(questions)} questions, got {len(before)}")
        most = _whole("k", k, 0)
        texts = [q.question if isinstance(q, DialogueSet) else q for q in questions]
        for place, text in enumerate(texts):
            if not isinstance(text, str) or not text.strip():
                raise InputError(f"questions[{place}]", f"expected text that is not blank, got {text!r}")
        limits = [self._limit(q, before[i] if before else None) for i, q in enumerate(questions)]
        if not most or not self._rows or not texts:
            return [[] for _ in texts]
        if self._matrix is None:
            self._matrix = np.stack([v for _, v in self._rows.values()])
        similar = np.round(self.encoder.encode(texts, progress=False) @ self._matrix.T, _DIGITS)
        stored = list(self._rows.items())
        out = []
        for q, limit, row in zip(questions, limits, similar, strict=True):
            hits: list[Hit] = []
            for i in self._order(q, row):
                id, (d, _) = stored[i]
                if len(hits) == most:
                    break
                if not allow_same and _same(q, id, d):
                    continue
                if limit is not None and (d.time is None or d.time >= limit):
                    continue
                hits.append(Hit(d, float(row[i])))
            out.append(hits)
        return out

    def _order(self, question: str | DialogueSet, similar: Float[np.ndarray, " n"]) -> Sequence[Any]:
        """Places of all stored dialogues, the first choice first."""
        if self.choose == "similar":
            return np.argsort(-similar, kind="stable").tolist()
        ids, rows = list(self._rows), [d for d, _ in self._rows.values()]
        if self.choose == "recent":
            times = [float("-inf") if d.time is None else d.time for d in rows]
            return sorted(range(len(rows)), key=lambda i: (-times[i], -i))
        text = question.question if isinstance(question, DialogueSet) else question
        return sorted(
            range(len(rows)),
            key=lambda i: hashlib.sha256(f"{text}\x1f{ids[i]}".encode("utf-8", "surrogatepass")).digest(),
        )

    def _limit(self, question: str | DialogueSet, before: float | int | None) -> float | int | None:
        own = question.time if isinstance(question, DialogueSet) else None
        if before is not None or not self.earlier_only:
            return before
        if own is None:
            raise InputError("question", "expected a dialogue set with a time, or before=…", "Or earlier_only=False.")
        return own

    # ------------------------------------------------------------ prompts

    def prompt(
        self,
        question: str | DialogueSet,
        k: SupportsIndex = 3,
        *,
        llm: LLM | None = None,
        before: float | int | None = None,
        allow_same: bool = False,
    ) -> list[dict[str, str]]:
        """Chat messages for a question with its ``k`` examples, in at most ``budget`` tokens of ``llm``.

        Without ``llm`` the encoder's tokenizer does the counting, a fair estimate for English. With
        nothing found (an empty store, ``k=0``) it is the question alone, as without retrieval. Raises
        :class:`~pllm_helpers.runtime.InputError` if the question alone is over the budget.
        """
        return self.prompts([question], k, llm=llm, before=[before], allow_same=allow_same)[0]

    def prompts(
        self,
        questions: Sequence[str | DialogueSet],
        k: SupportsIndex = 3,
        *,
        llm: LLM | None = None,
        before: Sequence[float | int | None] | None = None,
        allow_same: bool = False,
    ) -> list[list[dict[str, str]]]:
        """:meth:`prompt` for many questions: what ``generate`` and ``response_nll`` take as ``prompts``."""
        found = self.retrieve_all(questions, k, before=before, allow_same=allow_same)
        texts = [q.question if isinstance(q, DialogueSet) else q for q in questions]
        return [self._fitted(t, h, llm, place) for place, (t, h) in enumerate(zip(texts, found, strict=True))]

    def _fitted(self, question: str, hits: Sequence[Hit], llm: LLM | None, place: int) -> list[dict[str, str]]:
        size = self._tokens(self._messages(question, []), llm)
        if size > self.budget:
            raise InputError(
                f"questions[{place}]",
                f"expected at most {self.budget} tokens with the chat template, got {size}",
                "Raise the budget or shorten the question.",
            )
        kept = list(hits)
        while kept and self._tokens(self._messages(question, kept), llm) > self.budget:
            kept.pop()  # the least similar goes first
        return self._messages(question, kept)

    def _messages(self, question: str, hits: Sequence[Hit]) -> list[dict[str, str]]:
        """Chat messages; the most similar example stands next to the question."""
        shown = [(h.dialogue.question.strip(), h.dialogue.answer.strip()) for h in reversed(hits)]
        if self.form == "turns" or not shown:
            turns = [m for q, a in shown for m in ({"role": "user", "content": q}, {"role": "assistant", "content": a})]
            return [*turns, {"role": "user", "content": question}]
        examples = "\n\n".join(f"Message: {q}\nReply: {a}" for q, a in shown)
        text = f"These are earlier messages and my replies:\n\n{examples}\n\nReply in the same way to this message:\n\n"
        return [{"role": "user", "content": text + question}]

    def _tokens(self, messages: Sequence[Mapping[str, str]], llm: LLM | None) -> int:
        if llm is None:
            return sum(len(self.encoder.tokenizer(m["content"], truncation=False)["input_ids"]) for m in messages)
        return len(llm.tokenizer(llm.format_chat(messages), add_special_tokens=False)["input_ids"])

    # ------------------------------------------------------------ answers

    def answer(
        self,
        llm: LLM,
        questions: Sequence[str | DialogueSet],
        k: SupportsIndex = 3,
        *,
        before: Sequence[float | int | None] | None = None,
        allow_same: bool = False,
        **settings: Any,
    ) -> list[str]:
        """Answers of ``llm``, plain or tuned, to questions with their examples, in batches.

        ``settings`` go to :func:`~pllm_helpers.models.generate` (``max_new_tokens``, ``batch_size`` …).
        """
        prompts = self.prompts(questions, k, llm=llm, before=before, allow_same=allow_same)
        return generate(llm, prompts, **settings)

    def nll(
        self,
        llm: LLM,
        dialogues: Sequence[DialogueSet],
        k: SupportsIndex = 3,
        *,
        before: Sequence[float | int | None] | None = None,
        allow_same: bool = False,
        max_tokens: SupportsIndex = 2048,
        **settings: Any,
    ) -> Float[np.ndarray, " n"]:
        """NLL per token of each real reply after the retrieved prompt, in nats; shape ``(n,)``.

        The same replies and the same scored tokens as :func:`~pllm_helpers.evaluation.response_nll`
        without retrieval, so that plain, tuned, retrieval and both compare row by row.
        """
        prompts = self.prompts(dialogues, k, llm=llm, before=before, allow_same=allow_same)
        return response_nll(llm, dialogues, prompts=prompts, max_tokens=int(max_tokens), **settings)


def _id(what: Entry | DialogueSet | str) -> str:
    return what if isinstance(what, str) else what.id


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())


def _same(question: str | DialogueSet, id: str, stored: DialogueSet) -> bool:
    text = question.question if isinstance(question, DialogueSet) else question
    return (isinstance(question, DialogueSet) and question.id == id) or _plain(text) == _plain(stored.question)


def _unit(vector: Any, dim: int) -> Float[np.ndarray, " d"]:
    v = np.asarray(vector, dtype=np.float64)
    if v.shape != (dim,) or not np.isfinite(v).all() or not v.any():
        raise InputError(
            "entries", f"expected embeddings of {dim} finite numbers, got shape {v.shape}", "Use vectors='question'."
        )
    return v / np.linalg.norm(v)


def _whole(what: str, value: SupportsIndex, least: int) -> int:
    if isinstance(value, bool) or value.__index__() < least:
        raise InputError(what, f"expected a whole number of at least {least}, got {value!r}")
    return value.__index__()
