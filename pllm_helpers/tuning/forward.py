"""Negative log-likelihood of answers, the plain way: any causal model of transformers, padded batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .data import Row, padded


def plain_objective(model: Any, pad: int) -> Any:
    """``rows -> (rows,)`` summed NLL of each row's answer tokens, with a graph to the adapter.

    Logits are computed at answer positions only: the model's blocks run on every token, its
    output matrix on those that predict an answer token.
    """
    decoder, head = model.get_decoder(), model.get_output_embeddings()
    device = next(model.parameters()).device

    def objective(rows: Sequence[Row]) -> torch.Tensor:
        ids, mask = padded(rows, pad, device)
        hidden = decoder(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        predicting = [(i, len(r.ids) - r.answer - 1 + k) for i, r in enumerate(rows) for k in range(r.answer)]
        row, place = torch.tensor(predicting, device=device).T
        logits = head(hidden[row, place]).float()
        nll = torch.nn.functional.cross_entropy(logits, ids[row, place + 1], reduction="none")
        return torch.stack([part.sum() for part in nll.split([r.answer for r in rows])])

    return objective
