"""From dialogues to batches of token ids whose loss counts the answer only."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from ..dialogue import DialogueSet
from ..runtime import InputError

if TYPE_CHECKING:
    from ..models import LLM

POOL = 4  # batches that are sorted by length together


class Row(NamedTuple):
    """Token ids of one dialogue; the loss counts the last ``answer`` of them."""

    ids: list[int]
    answer: int


@dataclass(frozen=True)
class TokenRows:
    """Dialogues as token ids, how many questions had to be shortened, and a hash of the ids."""

    rows: list[Row]
    shortened: int

    @property
    def hash(self) -> str:
        """SHA-256 of ids and answer lengths: equal training data have equal hashes."""
        return hashlib.sha256(repr([(r.answer, r.ids) for r in self.rows]).encode()).hexdigest()


def token_rows(
    llm: LLM, dialogues: Sequence[DialogueSet], max_tokens: int, *, what: str = "dialogues", cut: bool = True
) -> TokenRows:
    """Question through the chat template, then the answer and the end-of-turn token.

    A dialogue with ``meta["form"] == "plain"`` is one running text instead: question, a space and
    the answer, without template or end (see :class:`~pllm_helpers.tuning.PromptTask`).

    Where that exceeds ``max_tokens``, the *start of the question* is left out (the template and
    the whole answer stay). Raises :class:`~pllm_helpers.runtime.InputError` on an empty list, on
    a blank question or answer, and if the answer alone does not fit (or, with ``cut=False``, on
    any row that does not fit).
    """
    if isinstance(dialogues, DialogueSet) or not isinstance(dialogues, Sequence):
        raise InputError(what, f"expected a list of dialogue sets, got {type(dialogues).__name__}")
    if not dialogues:
        raise InputError(what, "expected at least one dialogue set, got none")
    rows, shortened, stop = [], 0, llm.end_of_turn
    for place, d in enumerate(dialogues):
        name = f"{what}[{place}]"
        if not isinstance(d, DialogueSet):
            raise InputError(name, f"expected a DialogueSet, got {type(d).__name__}")
        if not d.question.strip() or not d.answer.strip():
            raise InputError(name, "expected a question and an answer, one is blank", "Leave the row out.")
        plain = d.meta.get("form") == "plain"
        answer = _ids(llm, " " + d.answer.strip()) if plain else [*_ids(llm, d.answer.strip()), stop]
        prompt = _plain_ids(llm, d.question) if plain else _ids(llm, llm.format_chat(d.question))
        if len(prompt) + len(answer) > max_tokens:
            if not cut:
                raise InputError(name, f"expected at most {max_tokens} tokens, got {len(prompt) + len(answer)}")
            room = max_tokens - len(answer)
            cut_short = plain and room > 1
            prompt = prompt[-room:] if cut_short else _shortened(llm, d.question, room, name, max_tokens)
            shortened += 1
        rows.append(Row(prompt + answer, len(answer)))
    return TokenRows(rows, shortened)


def _ids(llm: LLM, text: str) -> list[int]:
    return llm.tokenizer(text, add_special_tokens=False)["input_ids"]


def _plain_ids(llm: LLM, text: str) -> list[int]:
    """Ids of a text from its beginning, behind the token that begins a text where the model has one."""
    begin = [llm.tokenizer.bos_token_id] if getattr(llm.tokenizer, "add_bos_token", False) else []
    return begin + _ids(llm, text.strip())


def _shortened(llm: LLM, question: str, room: int, name: str, max_tokens: int) -> list[int]:
    """Ids of the prompt with as much of the question's end as fits into ``room`` tokens."""
    words = _ids(llm, question)
    excess = len(_ids(llm, llm.format_chat(question))) - room
    while excess < len(words):
        prompt = _ids(llm, llm.format_chat(llm.tokenizer.decode(words[excess:])))
        if len(prompt) <= room:
            return prompt
        excess += len(prompt) - room  # a cut inside a word may need a token more
    raise InputError(
        name,
        f"expected an answer that leaves room for the question in {max_tokens} tokens, the answer is too long",
        "Leave the row out or raise max_tokens.",
    )


def batch_order(lengths: Sequence[int], batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """Row numbers of each batch of one pass over the data, a function of its arguments alone.

    The rows are shuffled, cut into pools of ``POOL`` batches, sorted by length inside each pool,
    cut into batches, and the batches are shuffled: rows of one batch have similar lengths, and
    who meets whom changes from pass to pass. The last batch of a pass may be smaller.
    """
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(len(lengths)).tolist()
    batches = []
    for start in range(0, len(order), POOL * batch_size):
        pool = sorted(order[start : start + POOL * batch_size], key=lambda i: lengths[i])
        batches += [pool[k : k + batch_size] for k in range(0, len(pool), batch_size)]
    return [batches[k] for k in rng.permutation(len(batches))]


def batch_stream(lengths: Sequence[int], batch_size: int, seed: int, skip: int = 0) -> Iterator[list[int]]:
    """Batches of row numbers, pass after pass, without end; ``skip`` leaves out the first ones."""
    per_pass = -(-len(lengths) // batch_size)
    epoch, done = divmod(skip, per_pass)
    while True:
        yield from batch_order(lengths, batch_size, seed, epoch)[done:]
        epoch, done = epoch + 1, 0


def padded(rows: Sequence[Row], pad: int, device: torch.device | str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and attention mask, both ``(rows, longest)``, padded on the right."""
    width = max(len(r.ids) for r in rows)
    ids = [r.ids + [pad] * (width - len(r.ids)) for r in rows]
    mask = [[1] * len(r.ids) + [0] * (width - len(r.ids)) for r in rows]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)
