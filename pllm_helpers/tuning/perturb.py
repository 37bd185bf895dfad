"""Seeded noise added to weights in place: chunk by chunk, through one small buffer.

Zeroth-order methods walk the weights to ``θ + εz``, ``θ - εz`` and back without keeping ``z``: a
seed brings the same noise back. Nothing here is ever as large as a weight matrix.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..runtime import InputError

__all__ = ["Drift", "perturb_", "restoring_drift", "spsa_gradient"]

Number = float | int
CHUNK = 1 << 20  # values in the buffer: 4 MB of fp32, of which the cache keeps most
BLOCK = 1 << 18  # values that share one layout of random bits, and one shift of the dither
NOISES = ("gaussian", "rademacher")
ESTIMATORS = ("two_sided", "one_sided")


class Gaussian:
    """Standard normal values, in the order in which ``torch.normal`` draws them tensor by tensor.

    torch fills 16 values at a time, so a chunk that starts at a multiple of 16 continues the
    stream of the whole tensor. Bits are the same on processors of one kind; logarithm and cosine
    may differ in the last bit between kinds.
    """

    def __init__(self, seed: int, device: torch.device):
        self.generator = torch.Generator(device).manual_seed(seed)

    def fill(self, out: Tensor) -> None:
        out.normal_(generator=self.generator)


class Rademacher:
    """+1 or -1 with probability 1/2, one random bit each; the same on every machine and for every dtype.

    Word ``i`` (16 bits) of a block of n words gives values ``i, i + n, i + 2n, …``: its bits from
    the top. A sign moves into place by a shift, so that whole rows are written at once.
    """

    WORDS = {torch.float64: torch.int64, torch.float32: torch.int32, torch.bfloat16: torch.int16}

    def __init__(self, seed: int, device: torch.device):
        self.generator = torch.Generator(device).manual_seed(seed)
        self.random = torch.empty(0, dtype=torch.int64, device=device)
        self.shifts = {kind: torch.arange(16, dtype=kind, device=device)[:, None] for kind in self.WORDS.values()}

    def fill(self, out: Tensor) -> None:
        if not out.numel():
            return
        last = blocks(out.numel())[-1]
        if many := out.numel() - last:
            self._fill(out[:many], many // BLOCK)
        self._fill(out[many:], 1)

    def _fill(self, out: Tensor, count: int) -> None:
        """``count`` blocks of equal size."""
        kind = self.WORDS[out.dtype]
        self.random.resize_(-(-out.numel() // 64)).random_(-(2**63), None, generator=self.generator)
        words = self.random.view(torch.int16).to(kind).view(count, 1, -1)
        whole = out.numel() == 16 * words.numel()  # else the end of a tensor
        bits = (out.view(kind) if whole else words.new_empty(16 * words.numel())).view(count, 16, -1)
        torch.bitwise_left_shift(words, self.shifts[kind] + (8 * out.itemsize - 16), out=bits)
        bits &= torch.iinfo(kind).min  # the sign bit only …
        bits |= ONES[out.dtype]  # … and the exponent of 1
        if not whole:
            out.copy_(bits.view(-1)[: out.numel()].view(out.dtype))


ONES = {dtype: torch.ones((), dtype=dtype).view(kind).item() for dtype, kind in Rademacher.WORDS.items()}


class Pass(NamedTuple):
    """One walk over the weights: ``θ ← keep (θ + Σ scale z) + Σ scale z``, rounded after every sum.

    ``before`` and ``after`` hold (seed, scale); ``keep`` (weight decay) spares tensors of one
    axis, that is norms and biases. ``dither``: a seed for stochastic rounding, see :func:`sweep_`.
    """

    before: tuple[tuple[int, float], ...]
    keep: float = 1.0
    after: tuple[tuple[int, float], ...] = ()
    dither: int | None = None


def noise_source(noise: str, seed: int, device: torch.device) -> Gaussian | Rademacher:
    return (Rademacher if noise == "rademacher" else Gaussian)(seed, device)


def chunks(p: Tensor) -> Iterator[Tensor]:
    """Flat views of ``p``, ``CHUNK`` values each; a rest below 16 values joins the chunk before it."""
    yield from p.data.view(-1).split(blocks(p.numel(), CHUNK))


def blocks(length: int, size: int = BLOCK) -> list[int]:
    """Lengths of the blocks of ``length`` values; a rest below 16 values joins the block before it."""
    count, rest = divmod(length, size)
    lengths = [size] * count + [rest] * (rest > 0)
    if 0 < rest < 16 and count:
        lengths[-2:] = [size + rest]
    return lengths


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether every weight is a number; nothing as large as a weight comes into being.

    A sum is finite only if all its parts are; one that is not may have overflowed, and is looked at in chunks.
    """
    return all(
        bool(torch.isfinite(p.data.sum(dtype=torch.float32))) or all(bool(torch.isfinite(c).all()) for c in chunks(p))
        for p in tensors
    )


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """One thread of torch inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@torch.no_grad()
def sweep_(parameters: Iterable[Tensor], passes: Sequence[Pass], noise: str) -> None:
    """Apply ``passes`` one after the other, all of them to one chunk before the next chunk.

    The result is that of as many separate walks, bit for bit, but the noise of a seed is drawn
    once. A pass with ``dither`` rounds weights below fp32 *stochastically*: up with a probability
    equal to the part that is cut off, so that an update far below the resolution of bf16 (2⁻⁸ of
    a weight) is kept on average, where rounding to nearest loses it. The dither of one block,
    shifted by a random number per block, serves all blocks: uniform for each weight, independent
    for each pair.
    """
    weights = list(parameters)
    # torch adds 16-bit numbers at the end of a thread's part with another rounding than in its middle; signs that
    # are exact do not care, other noise must not depend on the number of threads
    narrow = noise == "gaussian" and any(p.dtype == torch.bfloat16 for p in weights)
    with one_thread() if narrow else contextlib.nullcontext():
        _sweep_(weights, passes, noise)


def _sweep_(parameters: Sequence[Tensor], passes: Sequence[Pass], noise: str) -> None:
    sources: dict[int, Gaussian | Rademacher] = {}
    buffers: dict[int, Tensor] = {}
    rounding: dict[int, Dither] = {}
    wide: Tensor | None = None
    seeds = list(dict.fromkeys(seed for step in passes for seed, _ in (*step.before, *step.after)))
    for p in parameters:
        if not sources:
            sources = {s: noise_source(noise, s, p.device) for s in seeds}
            rounding = {s.dither: Dither(s.dither, p.device) for s in passes if s.dither is not None}
        for c in chunks(p):
            z = {}
            for seed, source in sources.items():
                buffer = buffers.get(seed)
                if buffer is None or buffer.dtype != c.dtype:
                    buffer = buffers[seed] = torch.empty(CHUNK + 16, dtype=c.dtype, device=c.device)
                z[seed] = buffer[: len(c)]
                source.fill(z[seed])
            for step in passes:
                narrow = c.dtype == torch.bfloat16 and (step.dither is not None or len(step.before + step.after) > 1)
                if narrow:  # sums in fp32, one rounding
                    wide = torch.empty(CHUNK + 16, device=c.device) if wide is None else wide
                    target = wide[: len(c)].copy_(c)
                else:
                    target = c
                for seed, scale in step.before:
                    target.add_(z[seed], alpha=scale)
                if step.keep != 1.0 and p.ndim > 1:
                    target.mul_(step.keep)
                for seed, scale in step.after:
                    target.add_(z[seed], alpha=scale)
                if narrow:
                    if step.dither is not None:
                        rounding[step.dither].round_(target)
                    c.copy_(target)


class Dither:
    """Stochastic rounding of fp32 values to bf16: add a random number below the cut, then cut."""

    def __init__(self, seed: int, device: torch.device):
        self.generator = torch.Generator(device).manual_seed(seed)
        self.base = torch.empty(BLOCK + 16, dtype=torch.int32, device=device)
        self.base.random_(0, 1 << 16, generator=self.generator)
        self.shifted = torch.empty_like(self.base)

    def round_(self, values: Tensor) -> None:
        for block in values.split(blocks(len(values))):
            self._round_(block)

    def _round_(self, values: Tensor) -> None:
        shift = torch.randint(0, 1 << 16, (), generator=self.generator, device=values.device).item()
        random = torch.add(self.base[: len(values)], shift, out=self.shifted[: len(values)])
        random &= 0xFFFF
        bits = values.view(torch.int32)
        bits += random
        bits &= -(1 << 16)


def perturb_(parameters: Iterable[Tensor], seed: int, scale: Number, noise: str = "gaussian") -> None:
    """``θ ← θ + scale · z(seed)`` in place, tensor after tensor in the given order.

    With ``noise="gaussian"`` the values are those of ``torch.manual_seed(seed)`` followed by one
    ``torch.normal`` per tensor, as in the code of MeZO (Malladi et al. 2023); with
    ``"rademacher"`` they are +1 or -1. The same call with ``-scale`` goes back, up to rounding.
    """
    sweep_(parameters, [Pass(((seed, float(scale)),))], _known("noise", noise, NOISES))


def spsa_gradient(
    loss: Callable[[], float],
    parameters: Sequence[Tensor],
    *,
    seed: int,
    epsilon: Number = 1e-3,
    noise: str = "gaussian",
    estimator: str = "two_sided",
) -> float:
    """The scalar ``g`` of the estimate ``g z(seed)`` of the gradient (Spall 1992; MeZO, definition 1).

    ``(L(θ + εz) - L(θ - εz)) / 2ε`` (``"two_sided"``) or ``(L(θ + εz) - L(θ)) / ε``
    (``"one_sided"``), from two calls of ``loss``. The weights are walked in place and come back
    up to rounding, also if ``loss`` raises. Its mean over ``z`` is the gradient's projection:
    ``E[g z] = ∇L`` up to O(ε²), or O(ε) one-sided.
    """
    _known("estimator", estimator, ESTIMATORS)
    where = 0.0  # in units of z
    values = []
    try:
        for place in (epsilon, -epsilon) if estimator == "two_sided" else (epsilon, 0.0):
            perturb_(parameters, seed, place - where, noise)
            where = place
            values.append(float(loss()))
    finally:
        if where:
            perturb_(parameters, seed, -where, noise)
    return (values[0] - values[1]) / (2 * epsilon if estimator == "two_sided" else epsilon)


class Drift(NamedTuple):
    """How far weights are from where they were: root mean square and maximum, and the same of the weights."""

    rms: float
    largest: float
    weight_rms: float
    weight_largest: float

    @property
    def relative(self) -> float:
        """Drift per weight, both as root mean square."""
        return self.rms / self.weight_rms


def restoring_drift(
    parameters: Iterable[Tensor],
    *,
    cycles: int,
    epsilon: Number = 1e-3,
    noise: str = "gaussian",
    seed: int = 0,
    dtype: torch.dtype | None = None,
) -> Drift:
    """Rounding left over after ``cycles`` of +ε, -2ε, +ε without any update; the given weights stay as they are.

    Exact arithmetic would leave nothing. Each of the three sums errs by at most half a unit in
    the last place, so the drift of a weight is at most ``3 cycles u (|θ| + 2ε max|z| + drift)``
    with ``u = 2⁻²⁴`` in fp32 and ``2⁻⁸`` … in bf16 (``torch.finfo(dtype).eps / 2``). One tensor is
    copied at a time.
    """
    squares = weight_squares = 0.0
    largest = weight_largest = 0.0
    count = 0
    for number, p in enumerate(parameters):
        start = p.detach().to(dtype or p.dtype)
        moved = start.clone()
        for k in range(cycles):
            for scale in (epsilon, -2 * epsilon, epsilon):
                perturb_([moved], derived_seed(seed, k, number), scale, noise)
        off = (moved.float() - start.float()).abs_()
        squares += off.double().square().sum().item()
        weight_squares += start.double().square().sum().item()
        largest = max(largest, off.max().item())
        weight_largest = max(weight_largest, start.abs().max().item())
        count += p.numel()
    if not count:
        raise InputError("parameters", "expected at least one tensor, got none")
    return Drift(math.sqrt(squares / count), largest, math.sqrt(weight_squares / count), weight_largest)


def derived_seed(seed: int, step: int, direction: int = 0) -> int:
    """Seed of one direction of one step (32 bits, all that torch's generator takes), from the run's seed."""
    return int(np.random.SeedSequence([seed, step, direction]).generate_state(1)[0])


def _known(what: str, value: str, names: Sequence[str]) -> str:
    if value not in names:
        raise InputError(what, f"expected {' or '.join(map(repr, names))}, got {value!r}")
    return value
