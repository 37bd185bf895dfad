"""Exact gradients in little memory: blocks computed twice, frozen weights read from their file when needed.

Two old ideas that MeBP (arXiv 2510.03425) and MeSP (arXiv 2602.13069) put on phones:

* *Checkpointing.* A block keeps only its input and computes itself again on the way back, so that
  the activations of one block are in memory at a time, not those of all.
* *Streaming.* Frozen weights are clean pages of a memory-mapped file. After each use the system
  is told that they may go; what stays resident is about one block. The output matrix is read in
  slices of the vocabulary.

Both give the gradient of ordinary backpropagation, not an estimate of it: the same operations in
the same order, except that streaming sums the output matrix's part slice by slice (rounding).
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from ..runtime import InputError
from .forward import plain_objective
from .loop import Objective
from .packed import Packed, block, is_packable, packed_objective
from .pages import Range, drop, mapped_pages

__all__ = ["SlicedNll", "frugal_objective"]

WORDS = 4096  # of the vocabulary whose logits are in memory at once
WAYS = ("checkpoint", "stream")


class Again(torch.autograd.Function):
    """``run(x)``, of which only x is kept; the backward pass runs it again, with a graph.

    ``trained`` are the leaves that ``run`` uses. ``after`` is called when ``run`` is done with the
    weights it reads: once on the way forward, once on the way back.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, run: Callable[[Tensor], Tensor], after: Callable[[], None], *trained: Tensor):
        ctx.run, ctx.after, ctx.trained = run, after, trained
        ctx.save_for_backward(x)
        y = run(x)
        after()
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor):
        (x,) = ctx.saved_tensors
        x = x.detach().requires_grad_(ctx.needs_input_grad[0])
        wanted = [t for t in (x, *ctx.trained) if t.requires_grad]
        with torch.enable_grad():
            y = ctx.run(x)
        found = iter(torch.autograd.grad(y, wanted, g))
        ctx.after()
        dx, *rest = (next(found) if t.requires_grad else None for t in (x, *ctx.trained))
        return dx, None, None, *rest


class SlicedNll(torch.autograd.Function):
    """Negative log-likelihood of each target, logits for ``WORDS`` words of the vocabulary at a time.

    x (N, d), head (V, d), target (N,) -> (N,) fp32. Keeps x and one number per token,
    ``log sum exp`` of its logits, and computes the logits again on the way back. There,
    ``use(first, gradient)``, if given, gets the gradient of each slice ``head[first : first +
    WORDS]`` as soon as nothing needs the slice any more, so it may be changed in place.
    ``after(first)`` is called at the end of each use of a slice.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        head: Tensor,
        target: Tensor,
        use: Callable[[int, Tensor], None] | None = None,
        after: Callable[[int], None] | None = None,
    ) -> Tensor:
        total = x.new_full((len(x),), -torch.inf, dtype=torch.float32)
        chosen = torch.empty_like(total)
        for first in range(0, len(head), WORDS):
            logits = (x @ head[first : first + WORDS].T).float()
            row, word = _inside(target, first)
            chosen[row] = logits[row, word]
            torch.logaddexp(total, logits.logsumexp(-1), out=total)
            if after:
                after(first)
        ctx.save_for_backward(x, total, target)
        ctx.head, ctx.use, ctx.after = head, use, after
        return total - chosen

    @staticmethod
    def backward(ctx: Any, g: Tensor):
        x, total, target = ctx.saved_tensors
        head, scaled = ctx.head, x * g[:, None].to(x.dtype)
        dx = torch.zeros(x.shape, device=x.device)
        for first in range(0, len(head), WORDS):
            part = head[first : first + WORDS]
            p = (x @ part.T).float().sub_(total[:, None]).exp_()
            row, word = _inside(target, first)
            p[row, word] -= 1
            p = p.to(x.dtype)
            if p.dtype == dx.dtype:
                dx.addmm_(p, part)
            else:
                dx += p @ part
            if ctx.use:
                ctx.use(first, p.T @ scaled)
            if ctx.after:
                ctx.after(first)
        return (dx * g[:, None]).to(x.dtype), None, None, None, None


def _inside(target: Tensor, first: int) -> tuple[Tensor, Tensor]:
    """Rows whose target lies in the slice that starts at ``first``, and its place there."""
    row = ((target >= first) & (target < first + WORDS)).nonzero()[:, 0]
    return row, target[row] - first


def frugal_objective(model: Any, pad: int, way: str, fast: bool = True) -> Objective:
    """``rows -> (rows,)`` summed NLL, as ``plain_objective`` and ``packed_objective`` have it, in little memory.

    Parameters
    ----------
    model : with an adapter of peft in place; the weights that need no gradient are only read.
    way : ``"checkpoint"`` or ``"stream"`` (checkpointing and streaming).

    Raises :class:`~pllm_helpers.runtime.InputError` if there is nothing to stream: the weights are
    not memory-mapped, or were changed in memory.
    """
    frozen = [p for p in model.parameters() if not p.requires_grad]
    pages = mapped_pages(frozen) if way == "stream" else {}
    if way == "stream" and sum(p.nbytes for p in frozen if id(p) in pages) < sum(p.nbytes for p in frozen) / 2:
        raise InputError(
            "frugal",
            "expected memory-mapped weights that nobody has written to, got weights in the process's own memory",
            "Use load_llm with the dtype of the file ('bf16' or 'fp32' for the bundled model), on Linux; "
            "or frugal='checkpoint'.",
        )

    def ranges(parameters: Iterable[Tensor]) -> list[Range]:
        return [r for p in parameters for r in pages.get(id(p), ())]

    head, layers = model.get_output_embeddings().weight, blocks(model)
    used = {id(layer): ranges(layer.parameters()) for layer in layers}
    drop(ranges(frozen))
    if not (fast and is_packable(model)):
        from .full import checkpoint_blocks

        checkpoint_blocks(layers, used)
        rest = ranges([model.get_input_embeddings().weight, head])
        return _then(plain_objective(model, pad), lambda: drop(rest))
    trained = {id(layer): [p for p in layer.parameters() if p.requires_grad] for layer in layers}

    def twice(layer: Any, x: Tensor, turns: Any, batch: Packed, last: bool) -> Tensor:
        def run(x: Tensor) -> Tensor:
            return block(layer, x, turns, batch, last)

        return Again.apply(x, run, lambda: drop(used[id(layer)]), *trained[id(layer)])

    if way == "checkpoint":
        return packed_objective(model, twice)
    whole, width = ranges([head]), head.nbytes // len(head)

    def slice_done(first: int) -> None:
        # the page at either end may belong to a neighbour, which reads it again
        start, end = head.data_ptr() + first * width, head.data_ptr() + min(first + WORDS, len(head)) * width
        size = mmap.PAGESIZE
        drop([Range(max(w.start, start // size * size), min(w.end, -(-end // size) * size)) for w in whole])

    def nll(x: Tensor, head: Tensor, target: Tensor, wanted: bool) -> Tensor:
        drop(whole)  # the embedding's rows, where it is the same matrix
        return SlicedNll.apply(x, head, target, None, slice_done)

    return packed_objective(model, twice, nll)


def blocks(model: Any) -> list[Any]:
    """The transformer blocks of a model, first to last."""
    lists = [m for m in model.modules() if isinstance(m, torch.nn.ModuleList)]
    return list(max(lists, key=lambda m: sum(p.numel() for p in m.parameters())))


def _then(objective: Objective, after: Callable[[], None]) -> Objective:
    def both(rows: Any) -> Tensor:
        value = objective(rows)
        after()
        return value

    return both
