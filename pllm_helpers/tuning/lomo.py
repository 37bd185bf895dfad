"""LOMO: every weight trained with its exact gradient, and hardly any gradient in memory.

Lv et al., *Full Parameter Fine-tuning for Large Language Models with Limited Resources*
(arXiv 2306.09782), and AdaLomo (arXiv 2310.10195). Backward goes through the layers from the last
to the first; as soon as the gradient of a weight is complete, the weight is updated and the
gradient freed. What is left in memory is one gradient, instead of one per weight.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from ..dialogue import DialogueSet
from ..runtime import InputError
from .data import Row
from .forward import plain_objective
from .frugal import WORDS, SlicedNll
from .full import FullRun, tune_weights, weight_settings
from .loop import Objective, Progress, Schedule
from .lora import real
from .result import TuningResult

if TYPE_CHECKING:
    from ..models import LLM

__all__ = ["AdaLomo", "FusedBackward", "Sgd", "tune_lomo"]

Number = float | int
Use = Callable[[str, Tensor, Tensor, int | None], None]  # name, weight or rows of it, gradient, first of these rows


def tune_lomo(
    llm: LLM,
    dialogues: Sequence[DialogueSet],
    *,
    steps: int,
    lr: Number,
    seed: int = 0,
    out: str | Path | None = None,
    optimizer: str = "lomo",
    clip_norm: Number | None = None,
    clip_value: Number | None = None,
    batch_size: int = 8,
    warmup: Number = 0.1,
    decay: str = "linear",
    weight_decay: Number = 0.0,
    max_tokens: int = 512,
    dtype: str = "fp32",
    checkpointing: bool = False,
    fused_head: bool = True,
    held_out: Sequence[DialogueSet] | None = None,
    evaluate_every: int | None = None,
    checkpoint_every: int | None = None,
    resume: bool = True,
    progress: Progress = None,
) -> TuningResult:
    """Train every weight of a private copy of ``llm`` with LOMO or AdaLomo; ``llm`` is left as it was.

    The steps are those of plain SGD (``optimizer="lomo"``): equal to :func:`tune_full` with
    ``optimizer="sgd"``, in a fraction of its memory. A step is one batch: gradients that are gone
    cannot be summed over several.

    Parameters
    ----------
    steps, lr, seed, out, batch_size, warmup, decay, weight_decay, max_tokens, dtype, checkpointing,
    held_out, evaluate_every, checkpoint_every, resume, progress : as in
        :func:`~pllm_helpers.tuning.tune_full`. SGD needs a far larger ``lr`` than Adam; for AdaLomo
        ``lr`` is relative to the size of each weight.
    optimizer : ``"lomo"`` (:class:`Sgd`) or ``"adalomo"`` (:class:`AdaLomo`).
    clip_norm : largest norm of the gradient of all weights together. It is known only when every
        gradient has been seen, so a step takes two backward passes: the first sums up the norms,
        the second updates (2306.09782, section 3.3).
    clip_value : largest size of each element of the gradient; one pass. Not both.
    fused_head : the output matrix is by far the largest weight of a small model, and where it is
        also the embedding (SmolLM2), its gradient has two parts: the output's, which is there
        first, and the embedding's, which comes last. ``True``: both are used at once, the first
        slice by slice of the vocabulary, the second as the rows of the tokens that occur; no
        gradient of the whole matrix ever exists, and the sum is the same up to rounding.
        ``False``: the first part waits for the second, bit-equal to SGD, with up to three such
        gradients in memory. AdaLomo and ``clip_value``, which need the whole gradient, always wait.

    Raises :class:`~pllm_helpers.runtime.InputError` as :func:`~pllm_helpers.tuning.tune_full` does.
    """
    given = locals()
    if optimizer not in RULES:
        raise InputError("optimizer", f"expected 'lomo' or 'adalomo', got {optimizer!r}")
    if clip_norm is not None and clip_value is not None:
        raise InputError("clip_norm", "expected clip_norm or clip_value, got both")
    settings = weight_settings(llm, given) | {
        "method": "lomo",
        "optimizer": optimizer,
        "clip_norm": clip_norm if clip_norm is None else real("clip_norm", clip_norm, 1e-12, 1e9),
        "clip_value": clip_value if clip_value is None else real("clip_value", clip_value, 1e-12, 1e9),
        "fused_head": bool(fused_head),
    }
    return tune_weights(llm, dialogues, settings, LomoRun, given)


class FusedBackward:
    """Backward passes that hand over each gradient as soon as it is complete, and free it.

    ``register_post_accumulate_grad_hook`` calls back once per weight and backward pass, after all
    parts of its gradient (a tied weight has two) have been summed up; nothing later in that pass
    needs the weight, so it may be changed in place. :meth:`close` removes the hooks.
    """

    def __init__(self, parameters: Mapping[str, torch.nn.Parameter]):
        self.largest = 0  # bytes of the largest gradient seen
        self._use: Use | None = None
        self._parameters = parameters
        self._handles = [
            p.register_post_accumulate_grad_hook(lambda p, name=name: self._complete(name, p))
            for name, p in parameters.items()
            if p.requires_grad
        ]

    def _complete(self, name: str, p: Tensor) -> None:
        gradient, p.grad = p.grad, None
        assert gradient is not None
        self.part(name, p, gradient)

    def part(self, name: str, p: Tensor, gradient: Tensor, first: int | None = None) -> None:
        """Hand over a gradient: of the weight ``name``, or of its rows ``p`` from row ``first`` on."""
        assert self._use is not None, "use the call, not loss.backward()"
        self.largest = max(self.largest, _nbytes(gradient))
        with torch.no_grad():
            self._use(name, p, gradient, first)

    def __call__(self, loss: Tensor, use: Use, *, keep_graph: bool = False) -> None:
        """One backward pass with ``use`` for every weight. ``keep_graph``: another pass will follow."""
        self._use = use
        try:
            loss.backward(retain_graph=keep_graph)
        finally:
            self._use = None

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def __enter__(self) -> FusedBackward:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Rule(Protocol):
    """How a gradient changes its weight."""

    def __call__(self, name: str, p: Tensor, g: Tensor, lr: float) -> None: ...

    @property
    def state(self) -> dict[str, Tensor]: ...

    def start_step(self, step: int) -> None: ...


class Sgd:
    """LOMO's rule: ``p ← p - lr (g + weight_decay p)``, in place; no state.

    A sparse g is the second part of a gradient, the rows of an embedding that were looked up;
    p has decayed with the first.
    """

    def __init__(self, parameters: Mapping[str, Tensor], weight_decay: float):
        self.weight_decay = weight_decay
        self.state: dict[str, Tensor] = {}

    def start_step(self, step: int) -> None:
        """Nothing depends on the step."""

    def __call__(self, name: str, p: Tensor, g: Tensor, lr: float) -> None:
        if g.is_sparse:
            rows, place = g._indices()[0].unique(return_inverse=True)
            total = g._values().new_zeros(len(rows), p.shape[1], dtype=torch.float32)
            total.index_add_(0, place, g._values().float())
            p.index_add_(0, rows, total.to(p.dtype), alpha=-lr)
            return
        if self.weight_decay:
            g.add_(p, alpha=self.weight_decay)
        p.add_(g, alpha=-lr)


class AdaLomo:
    """AdaLomo's rule (2310.10195, section 3; constants of its code): Adafactor's second moment, update by update.

    For a matrix with gradient G (n, m) at step t = 1, 2, …::

        β = 1 - t^-0.8
        R ← β R + (1 - β) mean of G² + 1e-30 over columns      (n,)
        C ← β C + (1 - β) mean of G² + 1e-30 over rows         (m,)
        U = G / sqrt(R C' / mean(R))
        U ← U / max(1, rms(U))
        p ← p (1 - lr s weight_decay) - lr s U,  s = max(1e-3, rms(p))

    A vector keeps its whole second moment V and has U = G / sqrt(V). The two roots that
    normalise a whole weight at once are the *grouped update normalisation*: the step's size
    follows the weight's, whatever the gradient's. State: n + m numbers per matrix, fp32.
    """

    EPS, LEAST, DECAY = 1e-30, 1e-3, -0.8

    def __init__(self, parameters: Mapping[str, Tensor], weight_decay: float):
        self.weight_decay, self.beta = weight_decay, 0.0
        self.state: dict[str, Tensor] = {}
        for name, p in parameters.items():
            if p.ndim < 2:
                self.state[f"square/{name}"] = torch.zeros(p.shape, device=p.device)
            else:
                self.state[f"row/{name}"] = torch.zeros(p.shape[:-1], device=p.device)
                self.state[f"column/{name}"] = torch.zeros((*p.shape[:-2], p.shape[-1]), device=p.device)

    def start_step(self, step: int) -> None:
        """``step`` counts from 0."""
        self.beta = 1 - (step + 1) ** self.DECAY

    def __call__(self, name: str, p: Tensor, g: Tensor, lr: float) -> None:
        u = g.float()  # no copy in fp32
        if p.ndim < 2:
            square = self.state[f"square/{name}"]
            square.lerp_(u.square().add_(self.EPS), 1 - self.beta)
            u.mul_(square.rsqrt())
        else:
            row, column = self.state[f"row/{name}"], self.state[f"column/{name}"]
            row.lerp_(mean_square(u, -1).add_(self.EPS), 1 - self.beta)
            column.lerp_(mean_square(u, -2).add_(self.EPS), 1 - self.beta)
            u.mul_((row / row.mean(-1, keepdim=True)).rsqrt_().unsqueeze(-1)).mul_(column.rsqrt().unsqueeze(-2))
        size = torch.linalg.vector_norm(u) / math.sqrt(u.numel())
        scale = lr * max(self.LEAST, float(torch.linalg.vector_norm(p, dtype=torch.float32)) / math.sqrt(p.numel()))
        u.mul_(scale / max(1.0, float(size)))
        if self.weight_decay:
            u.add_(p, alpha=scale * self.weight_decay)
        p.sub_(u)


RULES: dict[str, Callable[[Mapping[str, Tensor], float], Rule]] = {"lomo": Sgd, "adalomo": AdaLomo}


def mean_square(x: Tensor, dim: int) -> Tensor:
    """Mean of the squares along ``dim``, without a square of the whole in memory."""
    return torch.linalg.vector_norm(x, dim=dim).square_().div_(x.shape[dim])


class LomoRun(FullRun):
    """A run whose step updates during the backward pass."""

    def __init__(self, double: LLM, rows: Sequence[Row], plan: Schedule, settings: dict[str, Any]):
        super().__init__(double, rows, plan, settings)
        self.rule = RULES[settings["optimizer"]](self.parameters, plan.weight_decay)
        self.clip_norm, self.clip_value = settings["clip_norm"], settings["clip_value"]
        self.pad = double.tokenizer.pad_token_id or 0
        self.backward = FusedBackward(self.parameters)

    def make_objective(self, double: LLM, settings: dict[str, Any]) -> Objective:
        output, embedding = double.model.get_output_embeddings(), double.model.get_input_embeddings()
        head, tied = output.weight, output.weight is embedding.weight
        # the embedding's part of the gradient then holds only the rows of tokens that occur
        embedding.sparse = bool(settings["fused_head"] and tied)
        linear = settings["optimizer"] == "lomo" and settings["clip_value"] is None
        if not (settings["fused_head"] and linear and getattr(output, "bias", None) is None):
            return super().make_objective(double, settings)
        if not tied:
            head.requires_grad_(False)  # autograd need not know: the slices are handed over
        name = next(n for n, p in double.model.named_parameters() if p is head)
        frozen = head.detach()

        def use(first: int, gradient: Tensor) -> None:
            self.backward.part(name, frozen[first : first + WORDS], gradient, first)

        def answer_nll(x: Tensor, target: Tensor) -> Tensor:
            return SlicedNll.apply(x, frozen, target, use)

        return plain_objective(double.model, double.tokenizer.pad_token_id or 0, answer_nll)

    def one_step(self, batches: Sequence[Sequence[int]]) -> float:
        """Forward, backward with updates inside; with ``clip_norm`` a backward pass for the norm in front of it."""
        (batch,) = batches
        chosen = [self.rows[i] for i in batch]
        loss = self.objective(chosen).sum() / sum(r.answer for r in chosen)
        value = loss.item()
        self.check(value, self.step + 1)
        lr, share = self.plan.rate(self.step), 1.0
        if self.clip_norm is not None:
            norm = GradientNorm({self.pad, *(i for r in chosen for i in r.ids)}, loss.device)
            self.backward(loss, norm, keep_graph=True)
            share = float(clip_share(norm.total(self.parameters), self.clip_norm))
        self.rule.start_step(self.step)

        def update(name: str, p: Tensor, g: Tensor, first: int | None) -> None:
            if self.clip_value is not None:
                g.clamp_(-self.clip_value, self.clip_value)
            if self.clip_norm is not None:
                g.mul_(share)
            self.rule(name, p, g, lr)

        self.backward(loss, update)
        self.losses.append(value)
        self.tokens += sum(len(r.ids) for r in chosen)
        return value

    def close(self) -> None:
        self.backward.close()
        super().close()

    def measured(self) -> dict[str, Any]:
        return {"largest_gradient_mb": self.backward.largest / 2**20}

    @property
    def optimizer_state(self) -> dict[str, Tensor]:
        return self.rule.state

    def make_optimizer_state(self) -> None:
        """It is there from the start."""


class GradientNorm:
    """Norm of the gradient of all weights together, from gradients that are seen once and freed.

    The matrix that is both output and embedding comes in two parts: first slices of the output's,
    at the end the rows of ``tokens``, the embedding's. The norm of the sum is not the sum of the
    norms, so of the first part the rows of ``tokens`` are kept for the second.
    """

    def __init__(self, tokens: set[int], device: torch.device | str = "cpu"):
        self.tokens = torch.tensor(sorted(tokens), device=device)
        self.norms: dict[str, Tensor] = {}
        self.rows: Tensor | None = None

    def __call__(self, name: str, p: Tensor, g: Tensor, first: int | None) -> None:
        """Take note of a gradient; ``first``: row of the weight at which this part of it starts."""
        if g.is_sparse:
            assert self.rows is not None, "the output's part comes first"
            place = torch.searchsorted(self.tokens, g._indices()[0])
            self.rows.index_add_(0, place, g._values().float())
        elif first is None:
            self.norms[name] = torch.linalg.vector_norm(g, dtype=torch.float32)
        else:
            inside = (self.tokens >= first) & (self.tokens < first + len(g))
            here = self.tokens[inside] - first
            if self.rows is None:
                self.rows = torch.zeros(len(self.tokens), g.shape[1], device=g.device)
            self.rows[inside] = g[here].float()
            self.norms[f"{name}, {first}"] = torch.linalg.vector_norm(g.index_fill_(0, here, 0), dtype=torch.float32)

    def total(self, order: Mapping[str, Any]) -> Tensor:
        """The norm; summed up in the ``order`` of the weights, as ``torch.nn.utils.clip_grad_norm_`` does."""
        known = [self.norms.pop(n) for n in order if n in self.norms]
        rows = [] if self.rows is None else [torch.linalg.vector_norm(self.rows)]
        return torch.linalg.vector_norm(torch.stack([*known, *self.norms.values(), *rows]))


def clip_share(norm: Tensor, limit: Number) -> Tensor:
    """What a gradient of ``norm`` is multiplied with so that it is at most ``limit``.

    Raises :class:`~pllm_helpers.runtime.InputError` if the norm is not finite.
    """
    if not torch.isfinite(norm):
        raise InputError("lr", f"expected finite gradients, got a norm of {norm.item()}", "Lower lr or raise warmup.")
    return torch.clamp(limit / (norm + 1e-6), max=1.0)


def _nbytes(g: Tensor) -> int:
    return g._values().nbytes + g._indices().nbytes if g.is_sparse else g.nbytes
