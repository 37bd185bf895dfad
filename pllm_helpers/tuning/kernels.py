"""Pieces of a Llama block with hand-written gradients: fewer passes over memory than autograd needs.

The base weights are frozen, so a backward pass never needs the gradient of a weight, and most
inputs need not be kept. Every function here has a plain counterpart in ``transformers`` or
``peft``; tests compare values and gradients with it. T tokens lie behind each other in one
matrix, without padding; d is the hidden size.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

ROWS = 128  # answer tokens whose logits are in memory at once
SLICE = 16  # of these, how many are turned into probabilities at once (fits the processor's cache)
KEEP = 192  # attention probabilities are kept for the backward pass up to this many tokens, else computed again


class RmsNorm(torch.autograd.Function):
    """``x / rms(x) * weight``, rms over the last axis, in fp32 inside. Keeps x and one number per token."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.float()
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, scale, weight)
        return (wide * scale).to(x.dtype) * weight

    @staticmethod
    def backward(ctx: Any, g: Tensor):
        x, scale, weight = ctx.saved_tensors
        unit, g = x.float() * scale, (g * weight).float()
        along = (g * unit).mean(-1, keepdim=True)
        return g.addcmul_(unit, along, value=-1).mul_(scale).to(x.dtype), None, None


class SharedInput(torch.autograd.Function):
    """Several linear layers on one input, each with or without a LoRA pair.

    ``y_i = x W_i' + b_i + s_i (x A_i') B_i'`` with W and b frozen and A (r, in), B (out, r) in
    fp32. Keeps x (if there is a pair) and ``A x'`` (r, T); a product with a short side is fastest
    with that side first. Backward: ``dB' = s (A x') g``, ``dA = s B' g' x``,
    ``dx = sum_i g_i W_i + s_i (g_i B_i) A_i``.
    Called as ``apply(x, bases, scales, A_1, B_1, A_2, B_2, …)``; A and B are None without a pair.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, bases: tuple[tuple[Tensor, Tensor | None], ...], scales: tuple[float, ...], *pairs: Any
    ) -> tuple[Tensor, ...]:
        out = [F.linear(x, weight, bias) for weight, bias in bases]
        downs, ups = pairs[::2], pairs[1::2]
        wide, hidden = None, []
        for y, a, b, s in zip(out, downs, ups, scales, strict=True):
            if a is not None:
                wide = x.float() if wide is None else wide
                u = a @ wide.T
                y += u.T @ (s * b).T
                hidden.append(u)
        ctx.bases, ctx.scales = bases, scales
        ctx.save_for_backward(x if wide is not None else None, *hidden, *pairs)
        ctx.pairs = len(hidden)
        return tuple(out)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor):
        x, saved = ctx.saved_tensors[0], ctx.saved_tensors[1:]
        hidden, pairs = list(saved[: ctx.pairs]), saved[ctx.pairs :]
        wide = None if x is None else x.float()
        dx = None
        if ctx.needs_input_grad[0]:
            for g, (weight, _) in zip(grads, ctx.bases, strict=True):
                dx = g @ weight if dx is None else dx.addmm_(g, weight)
        out: list[Tensor | None] = []
        for g, a, b, s in zip(grads, pairs[::2], pairs[1::2], ctx.scales, strict=True):
            if a is None:
                out += [None, None]
                continue
            g, u = g.float(), hidden.pop(0)
            du = (s * b).T @ g.T
            out += [du @ wide, (u @ g).mul_(s).T]
            if dx is not None:
                dx += du.T @ a
        return dx, None, None, *out


class Rotary(torch.autograd.Function):
    """Rotary positions: halves (u, v) of each head become (u cos - v sin, v cos + u sin). Keeps the tables only.

    x (T, heads, width), cos and sin (T, 1, width / 2). The backward pass turns the other way.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.tables = cos, sin
        return _turn(x, cos, sin, 1)

    @staticmethod
    def backward(ctx: Any, g: Tensor):
        return _turn(g, *ctx.tables, -1), None, None


def _turn(x: Tensor, cos: Tensor, sin: Tensor, sign: int) -> Tensor:
    half = x.shape[-1] // 2
    out = torch.empty_like(x)
    torch.mul(x[..., :half], cos, out=out[..., :half]).addcmul_(x[..., half:], sin, value=-sign)
    torch.mul(x[..., half:], cos, out=out[..., half:]).addcmul_(x[..., :half], sin, value=sign)
    return out


class SwiGlu(torch.autograd.Function):
    """``silu(gate) * up``. Keeps its two inputs, not silu(gate)."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, g: Tensor):
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(g * up, gate), F.silu(gate).mul_(g)


class Layout(NamedTuple):
    """Where tokens lie in a block that attention works on: R rows of n tokens, padded on the right.

    Each row sees the P shared tokens in front of it and its own up to itself. The index tensors
    count single heads of tokens. A packed batch has one layout for the shared beginning (one row,
    P = 0) and one for the dialogues; together they cover the T tokens in order.
    """

    rows: int
    own: int
    shared: int
    query: Tensor  # (R * heads * n,): the head of a token, for each place in the block of queries
    place: Tensor  # (tokens * heads,): the other way round
    key: Tensor  # (R * groups * (P + n),): the same for keys and values
    key_place: Tensor  # (tokens * groups,): the other way round, own tokens only
    bias: Tensor  # (n, P + n): 0 where a query may look, a large negative number elsewhere


class Attention(torch.autograd.Function):
    """Causal attention inside each dialogue: ``softmax(q k' + bias) v``; q comes scaled.

    q (T, heads * width), k and v (T, groups * width): the heads of a group share keys and values
    and are computed in one product. Keys and values of the shared beginning exist once; their
    gradients are sums over the rows.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, layouts: tuple[Layout, ...], width: int) -> Tensor:
        out, kept = [], []
        for m in layouts:
            blocks = [
                t.view(-1, width).index_select(0, index).view(-1, count, width)
                for t, index, count in (
                    (q, m.query, q.shape[1] // k.shape[1] * m.own),
                    (k, m.key, m.shared + m.own),
                    (v, m.key, m.shared + m.own),
                )
            ]
            p = _probabilities(blocks[0], blocks[1], m)
            out.append(torch.bmm(p, blocks[2]).view(-1, width).index_select(0, m.place))
            kept += [*blocks, p if m.own <= KEEP else None]
        ctx.layouts = layouts
        ctx.save_for_backward(*kept)
        return torch.cat(out).view(len(q), -1)

    @staticmethod
    def backward(ctx: Any, g: Tensor):
        saved, width = ctx.saved_tensors, ctx.saved_tensors[0].shape[-1]
        heads, total = g.reshape(-1, width), len(g)
        dq, dk, dv, shared, start = [], [], [], [], 0
        for i, m in enumerate(ctx.layouts):
            q, k, v, p = saved[4 * i : 4 * i + 4]
            p = _probabilities(q, k, m) if p is None else p
            do = g.new_zeros(q.shape)  # places without a token get no gradient
            do.view(-1, width).index_copy_(0, m.place, heads[start : start + len(m.place)])
            start += len(m.place)
            ds = torch.ops.aten._softmax_backward_data(torch.bmm(do, v.transpose(1, 2)), p, -1, p.dtype)
            dq.append(torch.bmm(ds, k).view(-1, width).index_select(0, m.place))
            for all_of, block in ((dk, torch.bmm(ds.transpose(1, 2), q)), (dv, torch.bmm(p.transpose(1, 2), do))):
                all_of.append(block.view(-1, width).index_select(0, m.key_place))
                if m.shared:
                    first = block.view(m.rows, -1, m.shared + m.own, width)[:, :, : m.shared].sum(0)
                    shared.append(first.transpose(0, 1).reshape(m.shared, -1))
        keys, values = (torch.cat(t).view(total, -1) for t in (dk, dv))
        if shared:
            keys[: len(shared[0])] += shared[0]
            values[: len(shared[1])] += shared[1]
        return torch.cat(dq).view(total, -1), keys, values, None, None


def _probabilities(q: Tensor, k: Tensor, m: Layout) -> Tensor:
    scores = torch.bmm(q, k.transpose(1, 2))
    scores.view(-1, *m.bias.shape).add_(m.bias)
    # the bf16 kernel is slow where the width is no multiple of its vectors
    return torch.softmax(scores, -1, dtype=torch.float32).to(q.dtype)


class AnswerNll(torch.autograd.Function):
    """Negative log-likelihood of each target, logits computed ``ROWS`` at a time and thrown away.

    x (N, d), head (vocabulary, d), target (N,) -> (N,) fp32. The gradient with respect to x,
    ``(softmax - onehot) head``, is computed on the way forward, while the logits are there.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, head: Tensor, target: Tensor, wanted: bool) -> Tensor:
        nll, gradient = x.new_empty(len(x), dtype=torch.float32), torch.empty_like(x) if wanted else None
        scratch = x.new_empty(SLICE, len(head), dtype=torch.float32)
        for start in range(0, len(x), ROWS):
            part = slice(start, start + ROWS)
            logits = x[part] @ head.T
            for k in range(0, len(logits), SLICE):
                rows, goal = logits[k : k + SLICE], target[part][k : k + SLICE, None]
                p = scratch[: len(rows)]
                top = rows.amax(-1, keepdim=True)
                chosen = rows.gather(1, goal).float()
                torch.softmax(p.copy_(rows), -1, out=p)
                # log-sum-exp from the largest logit and its probability, which never underflows
                nll[start + k : start + k + len(rows)] = (top.float() - p.amax(-1, keepdim=True).log() - chosen)[:, 0]
                if wanted:
                    p.scatter_add_(1, goal, p.new_full(goal.shape, -1))
                    rows.copy_(p)
            if gradient is not None:
                torch.mm(logits, head, out=gradient[part])
        ctx.save_for_backward(gradient)
        return nll

    @staticmethod
    def backward(ctx: Any, g: Tensor):
        (gradient,) = ctx.saved_tensors
        return gradient * g[:, None].to(gradient.dtype), None, None, None
