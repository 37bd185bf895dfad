"""How much a real reply surprises the model: negative log-likelihood per token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float

from ..dialogue import DialogueSet
from ..runtime import InputError

if TYPE_CHECKING:
    from ..models import LLM

__all__ = ["response_nll"]


def response_nll(
    llm: LLM,
    dialogues: Sequence[DialogueSet],
    *,
    prompts: Sequence[str | Sequence[Mapping[str, str]]] | None = None,
    batch_size: int = 8,
    max_tokens: int = 512,
    progress: bool | None = None,
) -> Float[np.ndarray, " n"]:
    """Mean negative log-likelihood of each reply's tokens, in nats per token; shape ``(n,)``.

    The model sees the question through its chat template; only the answer and its end-of-turn
    token are scored. Logits are computed at answer positions only. Lower means that the model
    expected the reply more.

    ``prompts``: what the model sees instead of each question, a text or a list of ``{"role",
    "content"}`` messages, one per row; for instance the prompts of
    :meth:`~pllm_helpers.retrieval.RetrievalPersonalizer.prompts`, so that tuning, retrieval and both
    are compared on the same replies.

    Raises :class:`~pllm_helpers.runtime.InputError` if a row lacks a question or an answer, if it is one
    running text (it would be judged as another text than it is trained as), if there is not one
    prompt per row, or if prompt and answer together have more than ``max_tokens`` tokens (no silent
    cutting).
    """
    import torch

    from ..models.generation import progress_bar

    if prompts is not None and (isinstance(prompts, str) or len(prompts) != len(dialogues)):
        raise InputError("prompts", f"expected one for each of {len(dialogues)} rows, got {len(prompts)}")
    rows: list[tuple[list[int], int]] = []
    for place, d in enumerate(dialogues):
        if not d.question.strip() or not d.answer.strip():
            raise InputError(
                f"dialogues[{place}]", "expected a question and an answer, one is blank", "Leave the row out."
            )
        if prompts is None and d.meta.get("form") == "plain":
            raise InputError(
                f"dialogues[{place}]",
                "expected a message and a reply, got one running text (form 'plain')",
                "Judge it with classify, or write the task in form 'chat'.",
            )
        text = llm.format_chat(d.question if prompts is None else prompts[place])
        prompt = llm.tokenizer(text, add_special_tokens=False)["input_ids"]
        answer = llm.tokenizer(d.answer.strip(), add_special_tokens=False)["input_ids"] + [llm.end_of_turn]
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
