"""Weight-only quantisation to 8 or 4 bits, and what it costs: size, quality, speed.

The packed products are PyTorch's own CPU kernels (``_weight_int8pack_mm`` and
``_weight_int4pack_mm_for_cpu``, which torchao's CPU layouts call as well): they read the integers
and never build the full weights. torchao itself adds nothing here: its int4 weight-only tensor
needs a GPU library, its other sub-byte tensors keep one byte per weight on x86.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ..evaluation import Estimate, bootstrap_interval
from ..models import LLM
from ..runtime import InputError
from ..tuning.adapters import twin
from .envelope import size_mb

__all__ = [
    "GenerationSpeed",
    "QuantizedLLM",
    "generation_speed",
    "quantize",
    "weight_error",
]

GROUPS = (32, 64, 128, 256)  # of the int4 kernel
CHUNK = 8192  # rows of a large matrix that exist as numbers at once
SLICE = 1024  # of these while they are packed


# --------------------------------------------------------------------------- numbers to integers and back


def to_int8(weight: Float[Tensor, "out in"]) -> tuple[Int[Tensor, "out in"], Float[Tensor, " out"]]:
    """Symmetric, one scale per output row: ``w = q s``, q in -127..127, s = max|w| / 127 rounded to bf16."""
    q = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    scale = torch.empty(len(weight), dtype=torch.bfloat16, device=weight.device)
    for start in range(0, len(weight), SLICE):  # an embedding matrix in fp32 would be as large as the packed model
        part = slice(start, start + SLICE)
        wide = weight[part].float()
        scale[part] = (wide.abs().amax(1) / 127).clamp_min(1e-30)
        q[part] = (wide / scale[part].float()[:, None]).round_().clamp_(-127, 127)
    return q, scale


def to_int4(weight: Float[Tensor, "out in"], group: int) -> tuple[Int[Tensor, "out in"], Float[Tensor, "groups out 2"]]:
    """Asymmetric, per row and ``group`` inputs: ``w = (q - 8) s + z``, q in 0..15.

    s = (max - min) / 15 and z = min + 8 s, both rounded to bf16 *before* q is chosen, so that q makes
    up for most of that rounding. This is the family of GGUF's Q4_1 (scale and minimum per 32).
    Scales and zeros as the kernel wants them, (in / group, out, 2).
    """
    out, inside = weight.shape
    w = weight.float().view(out, inside // group, group)
    low, high = w.amin(-1), w.amax(-1)
    scale = ((high - low) / 15).clamp_min(1e-30).to(torch.bfloat16)
    zero = (low + 8 * scale.float()).to(torch.bfloat16)
    q = ((w - zero.float()[..., None]) / scale.float()[..., None]).round().add_(8).clamp_(0, 15)
    return q.view(out, inside).to(torch.int32), torch.stack([scale.T, zero.T], -1).contiguous()


@functools.lru_cache(maxsize=64)
def nibble_order(rows: int, columns: int) -> Int[Tensor, " n"]:
    """Where weight (r, c) of a packed int4 matrix lies, as an index into its half bytes, low half first.

    The layout belongs to the kernel and depends on the processor, so it is found out: every bit of
    a weight's number is packed and looked up.
    """
    number = torch.arange(rows * columns, dtype=torch.int64)
    found = torch.zeros(rows * columns, dtype=torch.int64)
    for shift in range(0, max(1, (rows * columns - 1).bit_length()), 4):
        part = (number >> shift & 15).to(torch.int32).view(rows, columns)
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(part, 1).flatten()
        found |= torch.stack([packed & 15, packed >> 4], 1).flatten().to(torch.int64) << shift
    order = torch.empty_like(found)
    order[found] = number
    return order.to(torch.int32)


class Product(torch.autograd.Function):
    """``x W'`` with a packed W; backward (for adapters below) unpacks W again instead of keeping it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: QuantizedLinear) -> Tensor:
        ctx.layer = layer
        return layer.product(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor):
        layer, dx = ctx.layer, None
        for start in range(0, layer.out_features, CHUNK):
            part = g[..., start : start + CHUNK] @ layer.rows(start, CHUNK).to(g.dtype)
            dx = part if dx is None else dx.add_(part)
        return dx, None


class QuantizedLinear(nn.Linear):
    """A linear layer with packed weights. ``weight`` unpacks them, for whoever asks (peft, our own kernels)."""

    def __init__(self, layer: nn.Linear, bits: int, group: int):
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.bits, self.group, self.dtype = bits, group, layer.weight.dtype
        self.bias = layer.bias
        weight = layer.weight.detach()
        if bits == 8:
            packed, scales = to_int8(weight)
        else:
            q, scales = to_int4(weight, group)
            packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(q, 1)
        self.packed = nn.Parameter(packed, requires_grad=False)
        self.scales = nn.Parameter(scales, requires_grad=False)

    @property
    def weight(self) -> Tensor:
        """The weights that the integers stand for, (out, in), in the model's dtype; made anew at every access."""
        parts = [self.rows(start, CHUNK) for start in range(0, self.out_features, CHUNK)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def rows(self, start: int, count: int) -> Tensor:
        """Rows ``start`` to ``start + count`` of :attr:`weight`."""
        stop = min(start + count, self.out_features)
        if self.bits == 8:
            return (self.packed[start:stop].float() * self.scales[start:stop, None].float()).to(self.dtype)
        q = self._nibbles()[start:stop].view(stop - start, -1, self.group).float()
        scale, zero = self.scales[:, start:stop].float().unbind(-1)
        return ((q - 8) * scale.T[..., None] + zero.T[..., None]).view(stop - start, -1).to(self.dtype)

    def _nibbles(self) -> Tensor:
        """The 4-bit numbers, (out, in), uint8."""
        halves = torch.stack([self.packed & 15, self.packed >> 4], -1)
        block = 64 if self.out_features % 64 == 0 else self.out_features  # rows that the kernel packs together
        order = nibble_order(block, self.in_features)
        return halves.view(-1, block * self.in_features)[:, order].view(self.out_features, self.in_features)

    def forward(self, x: Tensor) -> Tensor:
        if x.requires_grad and torch.is_grad_enabled():
            y = Product.apply(x, self)
        else:
            y = self.product(x)
        return y if self.bias is None else y + self.bias

    def product(self, x: Tensor) -> Tensor:
        """``x W'``. In bf16 the kernels read the integers; in fp32, where they are slow, parts of W are unpacked."""
        flat = x.reshape(-1, self.in_features)
        if x.dtype == torch.bfloat16 and x.device.type == "cpu":
            flat = flat.contiguous()
            if self.bits == 8:
                y = torch.ops.aten._weight_int8pack_mm(flat, self.packed, self.scales)
            else:
                y = torch.ops.aten._weight_int4pack_mm_for_cpu(flat, self.packed, self.group, self.scales)
        else:
            starts = range(0, self.out_features, CHUNK)
            y = torch.cat([flat @ self.rows(start, CHUNK).to(x.dtype).T for start in starts], -1)
        return y.view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return f"{self.in_features} -> {self.out_features}, int{self.bits}" + (
            f", groups of {self.group}" if self.bits == 4 else ", a scale per row"
        )


class QuantizedEmbedding(nn.Module):
    """Word embeddings out of the packed matrix that the output layer uses too (tied weights stay one matrix)."""

    def __init__(self, table: QuantizedLinear):
        super().__init__()
        self.table = table

    @property
    def weight(self) -> Tensor:
        """All embeddings, unpacked; see :attr:`QuantizedLinear.weight`."""
        return self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        table = self.table
        return (table.packed[ids].float() * table.scales[ids, None].float()).to(table.dtype)


# --------------------------------------------------------------------------- models


@dataclass
class QuantizedLLM(LLM):
    """An LLM with packed linear layers: all that takes an LLM takes it, adapters included.

    ``bits`` (8 or 4), ``group`` (of int4), ``weights`` (how many the model has; the packed tensors
    hold two per byte), ``kept``: names of linear layers that stayed as they were.
    """

    bits: int = 8
    group: int = 0
    weights: int = 0
    kept: list[str] = field(default_factory=list)

    def __repr__(self) -> str:
        return (
            f"QuantizedLLM({self.name}, {self.weights / 1e6:.0f}M parameters, int{self.bits}, {size_mb(self):.0f} MB)"
        )

    @property
    def parameters(self) -> int:
        """Number of weights of the model, as before quantisation."""
        return self.weights


def quantize(llm: LLM, to: str, *, group: int = 32, embeddings: str = "int8") -> QuantizedLLM:
    """A copy of ``llm`` whose linear layers are packed integers; ``llm`` is left as it was.

    Parameters
    ----------
    to : ``"int8"``: symmetric, one scale per output row. ``"int4"``: asymmetric, one scale and zero
        per ``group`` inputs (32, 64, 128 or 256).
    embeddings : ``"int8"`` packs the embedding matrix too (one row per token), and an output layer
        tied to it with it; ``"keep"`` leaves both.

    Activations keep the model's dtype. In bf16 the products run on the packed integers, and fast; in
    fp32 they are exact but slow, because weights are unpacked at every use. Load the model in bf16
    to measure speed. Adapters may be trained on top (``tune_lora(..., fast=False)`` keeps the packed
    weights packed on the way back).

    The shipped SmolLM2 weights were de-quantised from GGUF Q4_1 (4 bits, groups of 32): ``int4`` with
    groups of 32 gives back almost the same numbers, so its loss there says little. See
    :func:`weight_error`, and conclude from weights that never were quantised.

    Raises :class:`~pllm_helpers.runtime.InputError` on an unknown kind or group, on a model that is
    quantised already or carries an adapter, and if no layer fits.
    """
    _known_kind(to, group)
    if embeddings not in ("int8", "keep"):
        raise InputError("embeddings", f"expected 'int8' or 'keep', got {embeddings!r}")
    if isinstance(llm, QuantizedLLM):
        raise InputError("llm", f"expected a model that is not quantised, got {llm!r}", "Quantise the original.")
    count, double = llm.parameters, twin(llm)
    model, bits = double.model, int(to[3:])
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = head is not None and getattr(head, "weight", None) is table.weight
    kept: list[str] = []
    done: dict[tuple[int, int], QuantizedLinear] = {}  # blocks that share weights go on sharing them
    for name, layer in [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear)]:
        is_tied_head = layer is head and tied
        wanted = 8 if is_tied_head else bits
        odd = wanted == 4 and (layer.in_features % group or layer.out_features % 16)
        if odd or is_tied_head and embeddings == "keep":
            kept.append(name)
            continue
        key = (id(layer.weight), id(layer.bias))
        if key not in done:
            done[key] = QuantizedLinear(layer, wanted, group)
        _replace(model, name, done[key])
    if embeddings == "int8":
        if tied:
            rows = model.get_output_embeddings()
        else:
            shell = nn.Linear(table.weight.shape[1], table.weight.shape[0], bias=False, device="meta")
            shell.weight = table.weight
            rows = QuantizedLinear(shell, 8, group)
        name = next(n for n, m in model.named_modules() if m is table)
        _replace(model, name, QuantizedEmbedding(rows))
    if not any(isinstance(m, QuantizedLinear) for m in model.modules()):
        raise InputError("group", f"expected a divisor of the layers' inputs, got {group}", "Try 32.")
    shared = {f.name: getattr(double, f.name) for f in fields(LLM)}
    return QuantizedLLM(**shared, bits=bits, group=group if bits == 4 else 0, weights=count, kept=kept)


def _known_kind(to: str, group: int) -> None:
    if to not in ("int8", "int4"):
        raise InputError("to", f"expected 'int8' or 'int4', got {to!r}")
    if group not in GROUPS:
        raise InputError("group", f"expected one of {', '.join(map(str, GROUPS))}, got {group!r}")


def _replace(model: nn.Module, name: str, new: nn.Module) -> None:
    path, _, last = name.rpartition(".")
    setattr(model.get_submodule(path), last, new.eval())


def weight_error(llm: LLM, to: str, *, group: int = 32) -> tuple[float, float]:
    """Relative error ``|W - W'| / |W|`` of quantising the model's linear layers, and of random weights like them.

    The second number is for normal weights of the same shapes and scale, which were never
    quantised before. Where the first is far below it, the model's weights already lay on such a grid
    (as the shipped ones do for int4), and its loss by quantisation is understated. The embedding
    and an output layer tied to it are left out, and so are layers that ``group`` does not divide.

    Raises :class:`~pllm_helpers.runtime.InputError` on an unknown kind or group, and if no layer fits.
    """
    _known_kind(to, group)
    tied = llm.model.get_input_embeddings().weight
    sums = torch.zeros(4, dtype=torch.float64)
    draw = torch.Generator().manual_seed(0)
    for layer in llm.model.modules():
        if isinstance(layer, nn.Linear) and layer.weight is not tied and layer.in_features % group == 0:
            w = layer.weight.detach().float()
            for place, x in ((0, w), (2, torch.randn(w.shape, generator=draw).mul_(w.std()))):
                sums[place] += (x - _roundtrip(x, to, group)).double().square().sum()
                sums[place + 1] += x.double().square().sum()
    if not sums[1]:
        raise InputError("group", f"expected a divisor of the layers' inputs, got {group}", "Try 32.")
    own, random = (sums[0] / sums[1]).sqrt().item(), (sums[2] / sums[3]).sqrt().item()
    return own, random


def _roundtrip(w: Tensor, to: str, group: int) -> Tensor:
    if to == "int8":
        q, scale = to_int8(w)
        return q.float() * scale.float()[:, None]
    q, scales = to_int4(w, group)
    scale, zero = scales.float().unbind(-1)
    return ((q.view(len(w), -1, group) - 8) * scale.T[..., None] + zero.T[..., None]).view_as(w)


# --------------------------------------------------------------------------- what it costs


@dataclass(frozen=True)
class GenerationSpeed:
    """Time to first token and decoding rate of one prompt at a time, greedy.

    ``first_token`` (seconds: tokenising, reading the prompt, one token), ``decode`` (tokens per second
    after the first), ``prompt`` (tokens per second of reading), medians over prompts with intervals;
    ``prompt_tokens`` and ``new_tokens`` per prompt; ``seconds``: the times behind them.
    """

    first_token: Estimate
    decode: Estimate
    prompt: Estimate
    prompt_tokens: list[int]
    new_tokens: int
    seconds: list[tuple[float, float]] = field(repr=False)


def generation_speed(
    llm: LLM, prompts: Sequence[str], *, new_tokens: int = 32, repeats: int = 1, seed: int = 0
) -> GenerationSpeed:
    """MobileAIBench's measures (arXiv 2406.10290) on this machine: time to first token, tokens per second.

    One prompt at a time through the chat template, greedy, ``new_tokens`` tokens each whatever they
    are (an end-of-turn token does not stop it, so that all models do the same work). The first
    prompt runs once more before, unmeasured. Of ``repeats`` runs of a prompt the fastest counts.

    Raises :class:`~pllm_helpers.runtime.InputError` on fewer than two prompts (an interval needs two) or new tokens.
    """
    from transformers import DynamicCache

    if isinstance(prompts, str) or len(prompts) < 2:
        raise InputError("prompts", "expected a list of at least two texts")
    for name, value, low in (("new_tokens", new_tokens, 2), ("repeats", repeats, 1)):
        if isinstance(value, bool) or not isinstance(value, int) or value < low:
            raise InputError(name, f"expected a whole number of at least {low}, got {value!r}")

    def one(prompt: str) -> tuple[int, float, float]:
        cache, last = DynamicCache(config=llm.model.config), torch.tensor([-1])
        start = time.perf_counter()
        ids = torch.tensor([llm.tokenizer(llm.format_chat(prompt), add_special_tokens=False)["input_ids"]])
        count, ids = ids.shape[1], ids.to(llm.device)
        for k in range(new_tokens):
            out = llm.model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=last + ids.shape[1])
            ids = out.logits[:, -1].argmax(-1, keepdim=True)
            int(ids)
            if k == 0:
                first = time.perf_counter() - start
        return count, first, time.perf_counter() - start - first

    with llm.lock, torch.inference_mode():
        one(prompts[0])
        runs = [[one(p) for _ in range(repeats)] for p in prompts]
    counts = [r[0][0] for r in runs]
    times = [(min(x[1] for x in r), min(x[2] for x in r)) for r in runs]

    def median(values: list[float], unit: str) -> Estimate:
        import numpy as np

        return bootstrap_interval(values, statistic=np.median, seed=seed, unit=unit)

    return GenerationSpeed(
        median([a for a, _ in times], "s"),
        median([(new_tokens - 1) / b for _, b in times], "tokens/s"),
        median([n / a for n, (a, _) in zip(counts, times, strict=True)], "tokens/s"),
        counts,
        new_tokens,
        times,
    )
