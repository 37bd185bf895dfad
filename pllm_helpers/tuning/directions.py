"""All probes of a zeroth-order step inside LoRA in one forward pass.

A probe differs from the next by its adapter only, so K probes are K groups of rows. Everything
below the first adapted layer is the same for all of them and runs once; so do the products with
that layer's frozen weights. From there on the groups share each product with frozen weights,
and each group adds its own ``s (x A_k') B_k'``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .data import Row
from .kernels import AnswerNll, Attention, RmsNorm, SwiGlu, _turn
from .packed import Packed, block, pack
from .perturb import Pass, sweep_
from .replay import Recipe

__all__ = ["joint_probe"]

Pairs = dict[int, tuple[float, Tensor, Tensor]]  # id of an adapted layer -> scale, A (K, r, in), B (K, out, r)


def places(recipe: Recipe, step: int) -> list[tuple[tuple[int, float], ...]]:
    """Where a step measures the loss, as sums of (seed, scale) beside the weights; the order of ``Recipe.walk``."""
    e = recipe.epsilon
    if recipe.estimator == "two_sided":
        return [((s, sign * e),) for s in recipe.seeds(step) for sign in (1, -1)]
    return [(), *(((s, e),) for s in recipe.seeds(step))]


def joint_probe(
    model: Any, parameters: dict[str, Tensor], recipe: Recipe
) -> Callable[[Sequence[Row], int], list[float]]:
    """``(rows, step) -> losses`` at every place of the step, equal to walking there up to rounding.

    ``model`` carries a peft adapter whose tensors are ``parameters``, and has blocks that
    :func:`~pllm_helpers.tuning.packed.is_packable` accepts.
    """
    layers = model.get_decoder().layers
    owner = {id(p): m for m in model.modules() if hasattr(m, "lora_A") for p in m.parameters()}
    adapted = [owner[id(p)] for p in parameters.values()]
    first = next(i for i, layer in enumerate(layers) if any(m in adapted for m in layer.modules()))

    @torch.no_grad()
    def probe(rows: Sequence[Row], step: int) -> list[float]:
        copies = []
        for place in places(recipe, step):
            copies.append([p.detach().clone() for p in parameters.values()])
            if place:
                sweep_(copies[-1], [Pass(place)], recipe.noise)
        pairs: Pairs = {}
        for k in range(0, len(adapted), 2):  # peft lists A, then B
            layer = adapted[k]
            (name,) = layer.active_adapters
            a, b = (torch.stack([c[i] for c in copies]) for i in (k, k + 1))
            pairs[id(layer)] = (layer.scaling[name], a, b)
        return group_losses(model, rows, pairs, len(copies), first)

    return probe


def group_losses(model: Any, rows: Sequence[Row], pairs: Pairs, groups: int, first: int) -> list[float]:
    """Mean NLL per answer token of ``rows`` under each of ``groups`` adapters; layers below ``first`` have none."""
    decoder, head = model.get_decoder(), model.get_output_embeddings().weight
    config = model.config.get_text_config()
    batch = pack(rows, config.num_attention_heads, config.num_key_value_heads, head)
    x = decoder.embed_tokens(batch.ids)
    tables = decoder.rotary_emb(x, position_ids=batch.positions[None])
    cos, sin = (t[0, :, None, : t.shape[-1] // 2] for t in tables)
    scale = decoder.layers[0].self_attn.scaling
    turns = {"q": (cos * scale, sin * scale), "k": (cos, sin)}
    last = decoder.layers[-1]
    for layer in decoder.layers[:first]:
        x = block(layer, x, turns, batch, last=layer is last)
    x = x[None]  # (1 or groups, T, d)
    for layer in decoder.layers[first:]:
        x = group_block(layer, x, turns, batch, pairs, layer is last)
    x = RmsNorm.apply(x, decoder.norm.weight, decoder.norm.variance_epsilon)
    nll = AnswerNll.apply(x.reshape(-1, x.shape[-1]), head, batch.targets.repeat(len(x)), False)
    return (nll.double().view(len(x), -1).sum(1) / sum(batch.answers)).tolist()


def group_block(layer: Any, x: Tensor, turns: dict[str, Any], batch: Packed, pairs: Pairs, last: bool) -> Tensor:
    """:func:`~pllm_helpers.tuning.packed.block` for groups of rows, (1 or K, T, d) -> (K, T, d)."""
    attention, mlp, norm = layer.self_attn, layer.mlp, layer.input_layernorm
    y = RmsNorm.apply(x, norm.weight, norm.variance_epsilon)
    q, k, v = (linear(m, y, pairs) for m in (attention.q_proj, attention.k_proj, attention.v_proj))
    q, k = (
        _turn(t.view(*t.shape[:2], -1, attention.head_dim), *turns[name], 1).flatten(2)
        for name, t in (("q", q), ("k", k))
    )
    groups = max(map(len, (q, k, v)))
    q, k, v = (t.expand(groups, -1, -1) for t in (q, k, v))
    mixed = torch.stack([Attention.apply(*one, batch.layouts, attention.head_dim) for one in zip(q, k, v, strict=True)])
    if last:
        mixed, x = mixed.index_select(1, batch.predicting), x.index_select(1, batch.predicting)
    x = x + linear(attention.o_proj, mixed, pairs)
    norm = layer.post_attention_layernorm
    y = RmsNorm.apply(x, norm.weight, norm.variance_epsilon)
    gate, up = (linear(m, y, pairs) for m in (mlp.gate_proj, mlp.up_proj))
    hidden = SwiGlu.apply(gate.expand(max(len(gate), len(up)), -1, -1), up)
    return x + linear(mlp.down_proj, hidden, pairs)


def linear(layer: Any, x: Tensor, pairs: Pairs) -> Tensor:
    """``x W' + b``, and for an adapted layer each group's own low-rank term, added in fp32."""
    base = getattr(layer, "base_layer", layer)
    y = F.linear(x, base.weight, base.bias)
    if id(layer) not in pairs:
        return y
    scale, a, b = pairs[id(layer)]
    low = torch.matmul(x.float(), a.transpose(1, 2))  # (K, T, r)
    return torch.matmul(low, (scale * b).transpose(1, 2)).add_(y).to(y.dtype)
