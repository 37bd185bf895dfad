"""Negative log-likelihood of answers, the plain way: any causal model of transformers, padded batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .data import Row, padded


def plain_objective(model: Any, pad: int, answer_nll: Callable[[Tensor, Tensor], Tensor] | None = None) -> Any:
    """``rows -> (rows,)`` summed NLL of each row's answer tokens, with a graph to the adapter.

    Logits are computed at answer positions only: the model's blocks run on every token, its
    output matrix on those that predict an answer token. ``answer_nll`` may take the place of the
    output matrix: last hidden states (N, d) and target ids (N,) -> NLL of each (N,).
    """
    decoder, head = model.get_decoder(), model.get_output_embeddings()
    device = next(model.parameters()).device

    def objective(rows: Sequence[Row]) -> torch.Tensor:
        ids, mask = padded(rows, pad, device)
        hidden = decoder(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        predicting = [(i, len(r.ids) - r.answer - 1 + k) for i, r in enumerate(rows) for k in range(r.answer)]
        row, place = torch.tensor(predicting, device=device).T
        x, target = hidden[row, place], ids[row, place + 1]
        if answer_nll:
            nll = answer_nll(x, target)
        else:
            nll = torch.nn.functional.cross_entropy(head(x).float(), target, reduction="none")
        return torch.stack([part.sum() for part in nll.split([r.answer for r in rows])])

    return objective
