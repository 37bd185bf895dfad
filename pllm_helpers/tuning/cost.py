"""What a LoRA run will cost, before it is started."""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from .adapters import decoder_layers
from .kernels import KEEP, ROWS
from .lora import chosen_layers, chosen_modules, whole
from .packed import is_packable

if TYPE_CHECKING:
    from ..models import LLM

__all__ = ["CostPrediction", "predict_cost"]


EFFICIENCY = 0.42  # share of the matrix rate that a whole step reaches, as `make bench` measured it (matrix_share)


@dataclass(frozen=True)
class CostPrediction:
    """Predicted cost of a LoRA run.

    ``parameters`` and ``adapter_bytes`` (fp32; the file is some kilobytes larger) are exact.
    ``gflop_per_step`` counts the matrix products with weights. ``memory_mb`` (beyond the
    memory-mapped base) and ``seconds_per_step`` (from this machine's matrix rate, measured now)
    are estimates.
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

    ``tokens`` is the length of a dialogue with its template, ``answer_tokens`` of its answer
    (default: a third). A weight costs 2 FLOP per token forward, and 2 more backward (the
    gradient of the input, weights being frozen) from the first adapted layer upwards; the output
    matrix sees answer tokens only, and the template's beginning is computed once per batch.

    Raises :class:`~pllm_helpers.runtime.InputError` on unknown layers or modules and on sizes below 1.
    """
    chosen, names = chosen_layers(llm, layers), chosen_modules(llm, modules)
    for name, value in (("rank", rank), ("batch_size", batch_size), ("tokens", tokens)):
        whole(name, value, 1)
    answers = batch_size * whole("answer_tokens", answer_tokens or max(1, tokens // 3), 1, tokens)
    blocks, head = decoder_layers(llm), llm.model.get_output_embeddings().weight
    pairs = [
        rank * sum(m.weight.shape)
        for i in chosen
        for n, m in blocks[i].named_modules()
        if n.rsplit(".", 1)[-1] in names and hasattr(m, "weight")
    ]
    shared = min(template_beginning(llm), tokens - 1) if is_packable(llm.model) else 0
    total = batch_size * (tokens - shared) + shared
    weights = [sum(p.numel() for p in block.parameters() if p.ndim == 2) for block in blocks]
    flop = 2 * total * (sum(weights) + sum(weights[chosen[0] :])) + 4 * answers * head.numel() + 6 * total * sum(pairs)
    config = llm.model.config.get_text_config()
    heads, groups = config.num_attention_heads, getattr(config, "num_key_value_heads", config.num_attention_heads)
    width = config.hidden_size // heads
    inner = getattr(config, "intermediate_size", 4 * config.hidden_size)
    # kept per token and layer: input of both norms and of the adapted layers, q, k, v, attention, gate and up
    kept = 3 * config.hidden_size + (heads + 2 * groups) * width + heads * min(tokens, KEEP) + 2 * inner
    activations = total * kept * head.itemsize * (len(blocks) - chosen[0])
    logits = min(answers, ROWS) * head.shape[0] * (head.itemsize + 0.5)
    memory = 16 * sum(pairs) + activations + logits + 6 * total * inner * head.itemsize
    rate = matrix_rate(head.dtype, torch.get_num_threads())
    seconds = flop / 1e9 / rate / EFFICIENCY
    return CostPrediction(sum(pairs), 4 * sum(pairs), memory / 2**20, flop / 1e9, seconds)


def template_beginning(llm: LLM) -> int:
    """Tokens that the chat template puts in front of every question."""
    first, second = (llm.tokenizer(llm.format_chat(t), add_special_tokens=False)["input_ids"] for t in ("a", "Z"))
    return next((k for k, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), 0)
