"""The same objective without padding, for blocks as in Llama, SmolLM2 and Qwen2.

A batch becomes one row of tokens. What all its dialogues have in common at the start (the chat
template's system message) is computed once for all of them. Logits exist at answer positions
only, and so do the last block's output and feed-forward parts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .data import Row
from .kernels import AnswerNll, Attention, Layout, RmsNorm, Rotary, SharedInput, SwiGlu

WORTH = 4  # shared tokens
BLOCKS = ("LlamaDecoderLayer", "Qwen2DecoderLayer")


class Packed(NamedTuple):
    """A batch as one row of T tokens: P shared ones, then the rest of each dialogue."""

    ids: Tensor  # (T,)
    positions: Tensor  # (T,)
    predicting: Tensor  # (N,): places whose logits are needed
    targets: Tensor  # (N,)
    answers: list[int]  # answer tokens per dialogue, N in all
    layouts: tuple[Layout, ...]


def shared_beginning(rows: Sequence[Row]) -> int:
    """How many tokens all rows start with; at most all but the last token of the shortest question.

    Fewer than ``WORTH`` are not worth a block of their own: 0.
    """
    if len(rows) < 2:
        return 0
    limit = min(len(r.ids) - r.answer for r in rows) - 1
    first = rows[0].ids
    count = next((k for k in range(limit) if any(r.ids[k] != first[k] for r in rows)), limit)
    return count if count >= WORTH else 0


def layout(starts: Sequence[int], lengths: Sequence[int], shared: int, heads: int, groups: int, like: Tensor) -> Layout:
    """Index tensors for rows of ``lengths`` tokens at ``starts``, behind ``shared`` tokens at 0.

    ``like`` gives device and dtype.
    """
    n, device = max(lengths), like.device
    step = torch.arange(n, device=device)
    begin = torch.tensor(starts, device=device)[:, None]
    real = step < torch.tensor(lengths, device=device)[:, None]  # (R, n): there is a token
    token = torch.where(real, begin + step, 0)
    common = torch.arange(shared, device=device).expand(len(starts), -1)

    def per_head(tokens: Tensor, count: int) -> Tensor:  # (R, m) -> (R, count, m)
        return tokens[:, None] * count + torch.arange(count, device=device)[:, None]

    def other_way(count: int, skip: int) -> Tensor:
        index = per_head(token, count)
        inside = real[:, None].expand(index.shape)
        width = skip + n
        there = torch.arange(len(starts) * count * width, device=device).view(len(starts), count, width)[..., skip:]
        return there[inside][index[inside].argsort()]

    bias = torch.zeros(n, shared + n, device=device, dtype=like.dtype)
    bias[:, shared:].masked_fill_(step > step[:, None], torch.finfo(like.dtype).min)
    key = per_head(torch.cat([common, token], 1), groups)
    query = per_head(token, heads)
    return Layout(
        len(starts), n, shared, query.flatten(), other_way(heads, 0), key.flatten(), other_way(groups, shared), bias
    )


def pack(rows: Sequence[Row], heads: int, groups: int, like: Tensor) -> Packed:
    """Lay ``rows`` out for a model with that many heads and groups (key/value heads); device and dtype of ``like``."""
    shared = shared_beginning(rows)
    ids, positions = list(rows[0].ids[:shared]), list(range(shared))
    starts, predicting, targets = [], [], []
    for r in rows:
        starts.append(len(ids))
        ids += r.ids[shared:]
        positions += range(shared, len(r.ids))
        predicting += range(len(ids) - r.answer - 1, len(ids) - 1)
        targets += r.ids[-r.answer :]
    lengths = [len(r.ids) - shared for r in rows]
    parts = [layout(starts, lengths, shared, heads, groups, like)]
    if shared:
        parts.insert(0, layout([0], [shared], 0, heads, groups, like))
    tensors = (torch.tensor(values, device=like.device) for values in (ids, positions, predicting, targets))
    return Packed(*tensors, [r.answer for r in rows], tuple(parts))


def is_packable(model: Any) -> bool:
    """Whether the model's blocks are of the kind that :func:`packed_objective` computes."""
    decoder, config = model.get_decoder(), model.config.get_text_config()
    layers = getattr(decoder, "layers", None) or []
    return (
        len(layers) > 0
        and all(type(layer).__name__ in BLOCKS for layer in layers)
        and getattr(config, "hidden_act", "") == "silu"
        and all(kind == "full_attention" for kind in getattr(config, "layer_types", None) or [])
        and not getattr(config, "attention_dropout", 0.0)
        and getattr(model.get_output_embeddings(), "bias", None) is None
    )


def linears(x: Tensor, *layers: Any) -> tuple[Tensor, ...]:
    """Outputs of linear layers on one input, LoRA included where peft has put it."""
    bases, scales, pairs = [], [], []
    for layer in layers:
        base = getattr(layer, "base_layer", layer)
        bases.append((base.weight, base.bias))
        if base is layer:
            scales.append(0.0)
            pairs += [None, None]
        else:
            (name,) = layer.active_adapters
            scales.append(layer.scaling[name])
            pairs += [layer.lora_A[name].weight, layer.lora_B[name].weight]
    return SharedInput.apply(x, tuple(bases), tuple(scales), *pairs)


def packed_objective(
    model: Any, through: Callable[..., Tensor] | None = None, answer_nll: Callable[..., Tensor] = AnswerNll.apply
) -> Callable[[Sequence[Row]], Tensor]:
    """``rows -> (rows,)`` summed NLL of each row's answer tokens, as ``plain_objective`` has it.

    ``through`` and ``answer_nll`` may replace :func:`block` and ``AnswerNll``.
    """
    through = through or block
    decoder, head = model.get_decoder(), model.get_output_embeddings().weight
    config = model.config.get_text_config()
    heads, groups = config.num_attention_heads, config.num_key_value_heads

    def objective(rows: Sequence[Row]) -> Tensor:
        batch = pack(rows, heads, groups, head)
        x = decoder.embed_tokens(batch.ids)
        tables = decoder.rotary_emb(x, position_ids=batch.positions[None])
        cos, sin = (t[0, :, None, : t.shape[-1] // 2] for t in tables)  # (T, 1, width / 2)
        scale = decoder.layers[0].self_attn.scaling
        turns = {"q": (cos * scale, sin * scale), "k": (cos, sin)}
        for layer in decoder.layers:
            x = through(layer, x, turns, batch, last=layer is decoder.layers[-1])
        x = RmsNorm.apply(x, decoder.norm.weight, decoder.norm.variance_epsilon)
        nll = answer_nll(x, head, batch.targets, x.requires_grad and torch.is_grad_enabled())
        return torch.stack([part.sum() for part in nll.split(batch.answers)])

    return objective


def block(layer: Any, x: Tensor, turns: dict[str, tuple[Tensor, Tensor]], batch: Packed, last: bool) -> Tensor:
    """One transformer block on packed tokens (T, d); the last one ends with the predicting tokens only."""
    attention, mlp, norm = layer.self_attn, layer.mlp, layer.input_layernorm
    y = RmsNorm.apply(x, norm.weight, norm.variance_epsilon)
    q, k, v = linears(y, attention.q_proj, attention.k_proj, attention.v_proj)
    q, k = (
        Rotary.apply(t.view(len(t), -1, attention.head_dim), *turns[name]).view(len(t), -1)
        for name, t in (("q", q), ("k", k))
    )
    mixed = Attention.apply(q, k, v, batch.layouts, attention.head_dim)
    if last:
        mixed, x = mixed.index_select(0, batch.predicting), x.index_select(0, batch.predicting)
    x = x + linears(mixed, attention.o_proj)[0]
    norm = layer.post_attention_layernorm
    y = RmsNorm.apply(x, norm.weight, norm.variance_epsilon)
    hidden = SwiGlu.apply(*linears(y, mlp.gate_proj, mlp.up_proj))
    return x + linears(hidden, mlp.down_proj)[0]
