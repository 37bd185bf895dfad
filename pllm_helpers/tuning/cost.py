"""What a LoRA run will cost, before it is started."""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from .adapters import decoder_layers
from .lora import chosen_layers, chosen_modules

if TYPE_CHECKING:
    from ..models import LLM

__all__ = ["CostPrediction", "predict_cost"]


@dataclass(frozen=True)
class CostPrediction:
    """Predicted cost of a LoRA run.

    ``parameters`` and ``adapter_bytes`` (fp32 on disk) are exact; ``memory_mb`` (beyond the
    memory-mapped base) and ``seconds_per_step`` are estimates, ``gflop_per_step`` counts the
    matrix products.
    """

    parameters: int
    adapter_bytes: int
    memory_mb: float
    gflop_per_step: float
    seconds_per_step: float


@functools.lru_cache(maxsize=8)
def matrix_rate(dtype: torch.dtype, threads: int, size: int = 1024) -> float:
    """GFLOP per second of a square matrix product here, the best of some; measured once, about 0.1 s."""
    a, b = torch.randn(size, size).to(dtype), torch.randn(size, size).to(dtype)
    best, end = 1e9, time.perf_counter() + 0.15
    while time.perf_counter() < end:
        start = time.perf_counter()
        torch.nn.functional.linear(a, b)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best / 1e9


def predict_cost(
    llm: LLM,
    *,
    rank: int = 8,
    layers: str | int | Sequence[int] = "all",
    modules: Sequence[str] = ("q_proj", "v_proj"),
    batch_size: int = 8,
    tokens: int = 70,
    answer_tokens: int | None = None,
) -> CostPrediction:
    """Parameters, memory and time of one step of :func:`tune_lora`, before running it.

    ``tokens`` is the length of a dialogue, ``answer_tokens`` of its answer (default: a third).
    Frozen weights cost a forward product for every token and a backward product (gradient of the
    input only) in the adapted layers and those above them: 2 + 2 FLOP per weight and token.
    """
    chosen, names = chosen_layers(llm, layers), chosen_modules(llm, modules)
    blocks = decoder_layers(llm)
    adapted_linears = [
        m
        for i in chosen
        for n, m in blocks[i].named_modules()
        if n.rsplit(".", 1)[-1] in names and hasattr(m, "weight")
    ]
    parameters = sum(rank * sum(m.weight.shape) for m in adapted_linears)
    total = batch_size * tokens
    answers = batch_size * (answer_tokens or max(1, tokens // 3))
    head: Any = llm.model.get_output_embeddings()
    weights = [sum(p.numel() for n, p in b.named_parameters() if p.ndim == 2) for b in blocks]
    flop = 2 * total * (sum(weights) + sum(weights[chosen[0] :])) + 4 * answers * head.weight.numel()
    dtype = head.weight.dtype
    width = llm.model.config.get_text_config()
    saved = (5 * width.hidden_size + 3 * width.intermediate_size) * dtype.itemsize * (len(blocks) - chosen[0])
    logits = min(answers, 128) * head.weight.shape[0] * 10
    memory = 16 * parameters + total * saved + logits
    rate = matrix_rate(dtype, torch.get_num_threads())
    return CostPrediction(parameters, 4 * parameters, memory / 2**20, flop / 1e9, flop / 1e9 / rate / 0.5)
