"""MobileLLM: where a small model's weights are, and small models of any such shape.

Liu et al., "MobileLLM: Optimizing Sub-billion Parameter Language Models for On-Device Use Cases"
(arXiv 2402.14905): below a billion weights deep and thin beats shallow and wide, the embedding is
shared with the output, keys and values have fewer heads than queries (GQA), and MobileLLM-LS runs
every block twice in a row. The counts below are exact for Llama-type models; the configurations
are those of the authors' repository (``configs/*/config.json``; there ``tie_word_embeddings`` says
false, and sharing is the training flag ``share_embedding``, on by default).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, SupportsIndex

import torch

from ..runtime import InputError

__all__ = [
    "MOBILE_LLM",
    "MOBILE_LLM_SIZES",
    "SMOLLM2_135M",
    "ZERO_SHOT",
    "Architecture",
    "ParameterCount",
    "at_budget",
    "build",
    "design_effects",
]

# ---------------------------------------------------------------- shapes and counts


@dataclass(frozen=True)
class ParameterCount:
    """Weights by part; ``head`` is 0 where the output matrix is the embedding."""

    embedding: int
    attention: int
    ffn: int
    norms: int
    head: int

    @property
    def total(self) -> int:
        return self.embedding + self.attention + self.ffn + self.norms + self.head

    @property
    def vocabulary_share(self) -> float:
        """Share of the weights that stand for tokens (embedding and head), in [0, 1]."""
        return (self.embedding + self.head) / self.total

    def to_dict(self) -> dict[str, int]:
        """Part -> weights, ``total`` last."""
        parts = ("embedding", "attention", "ffn", "norms", "head")
        return {name: getattr(self, name) for name in parts} | {"total": self.total}


@dataclass(frozen=True)
class Architecture:
    """The shape of a Llama-type model: RMS norms, rotary positions, SwiGLU, no biases.

    Attributes
    ----------
    layers : blocks with weights of their own.
    dim, heads, kv_heads : width, query heads (``dim / heads`` wide each), key and value heads.
    ffn : inner width of the feed-forward part.
    vocab : number of tokens.
    share_embedding : the output matrix is the embedding.
    share_blocks : every block runs twice in a row (MobileLLM-LS): as many weights, twice the passes.

    Raises :class:`~pllm_helpers.runtime.InputError` on sizes that do not fit together.
    """

    layers: int
    dim: int
    heads: int
    kv_heads: int
    ffn: int
    vocab: int = 32000
    share_embedding: bool = True
    share_blocks: bool = False
    name: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        for name in ("layers", "dim", "heads", "kv_heads", "ffn", "vocab"):
            value = getattr(self, name)
            if isinstance(value, bool) or value < 1:
                raise InputError(f"Architecture.{name}", f"expected a whole number of at least 1, got {value!r}")
        if self.dim % (2 * self.heads):
            raise InputError(
                "Architecture.heads", f"expected heads of an even width, got {self.dim} / {self.heads} = {self.width:g}"
            )
        if self.heads % self.kv_heads:
            raise InputError(
                "Architecture.kv_heads", f"expected a divisor of the {self.heads} heads, got {self.kv_heads}"
            )

    @property
    def width(self) -> float:
        """Width of one head."""
        return self.dim / self.heads

    @property
    def passes(self) -> int:
        """Blocks that a token runs through."""
        return self.layers * (2 if self.share_blocks else 1)

    def parameters(self) -> ParameterCount:
        """Weights by part."""
        keys = self.dim * self.kv_heads // self.heads
        return ParameterCount(
            embedding=self.vocab * self.dim,
            attention=self.layers * (2 * self.dim * self.dim + 2 * self.dim * keys),
            ffn=self.layers * 3 * self.dim * self.ffn,
            norms=self.layers * 2 * self.dim + self.dim,
            head=0 if self.share_embedding else self.vocab * self.dim,
        )

    def flops(self, context: SupportsIndex = 0) -> int:
        """Floating-point operations of one token's forward pass behind ``context`` others.

        Two per weight of a matrix and pass (the embedding is only looked up), plus four per context
        token, channel and pass for attention's two products; norms and activations left out.
        """
        count = self.parameters()
        matrices = (count.attention + count.ffn) * self.passes // self.layers + self.vocab * self.dim
        return 2 * matrices + 4 * self.dim * (context.__index__() + 1) * self.passes

    def kv_bytes(self, bytes_per_number: SupportsIndex = 2) -> int:
        """Bytes that one token leaves in the cache of keys and values. A shared block keeps two."""
        return 2 * self.passes * self.dim * self.kv_heads // self.heads * bytes_per_number.__index__()

    @classmethod
    def of(cls, model: Any) -> Architecture:
        """The shape of a Llama-type model of transformers, read off its configuration."""
        c = model.config.get_text_config()
        return cls(
            c.num_hidden_layers,
            c.hidden_size,
            c.num_attention_heads,
            getattr(c, "num_key_value_heads", None) or c.num_attention_heads,
            c.intermediate_size,
            c.vocab_size,
            bool(c.tie_word_embeddings),
        )


MOBILE_LLM: Mapping[str, Architecture] = MappingProxyType(
    {
        "125M": Architecture(30, 576, 9, 3, 1536, name="MobileLLM-125M"),
        "350M": Architecture(32, 960, 15, 5, 2560, name="MobileLLM-350M"),
        "600M": Architecture(40, 1152, 18, 6, 3072, name="MobileLLM-600M"),
        "1B": Architecture(54, 1280, 20, 5, 3584, name="MobileLLM-1B"),
        "1.5B": Architecture(54, 1600, 25, 5, 4352, name="MobileLLM-1.5B"),
    }
)
"""The published configurations, all sizes read in the authors' ``configs/*/config.json``."""

MOBILE_LLM_SIZES: Mapping[str, tuple[float, float]] = MappingProxyType(
    {
        "125M": (124.6e6, 0.1e6),
        "350M": (345.3e6, 0.1e6),
        "600M": (603.1e6, 0.1e6),
        "1B": (1.01e9, 0.01e9),
        "1.5B": (1.51e9, 0.01e9),
    }
)
"""Published number of weights and the unit of its last digit (model cards of facebook/MobileLLM-*)."""

ZERO_SHOT: Mapping[str, float] = MappingProxyType(
    {
        "125M": 46.3,
        "125M-LS": 47.0,
        "350M": 51.3,
        "350M-LS": 52.1,
        "600M": 54.3,
        "1B": 57.3,
        "1.5B": 59.4,
        "OPT-125M": 42.6,
        "Pythia-160M": 42.5,
        "OPT-350M": 43.9,
        "Pythia-410M": 46.6,
    }
)
"""Published zero-shot average over eight reasoning tasks, in % (README of the authors' repository)."""

SMOLLM2_135M = Architecture(30, 576, 9, 3, 1536, 49152, name="SmolLM2-135M")
"""The model that ships with this project: MobileLLM-125M's blocks under a vocabulary half as large again."""


def at_budget(
    weights: float | int,
    layers: SupportsIndex,
    *,
    vocab: SupportsIndex = 32000,
    head_width: SupportsIndex = 64,
    kv_share: SupportsIndex = 3,
    ffn_ratio: float | int = 8 / 3,
    share_embedding: bool = True,
    share_blocks: bool = False,
) -> Architecture:
    """The architecture of ``layers`` blocks that comes closest to ``weights`` in all: deep-thin or wide at equal cost.

    The width is the multiple of ``head_width`` whose total is nearest with an inner width of
    ``ffn_ratio`` times the width (SwiGLU's usual 8/3); the inner width is then moved, in steps of 8,
    to close the rest of the gap. ``kv_share``: query heads per key head, where that divides them.

    Raises :class:`~pllm_helpers.runtime.InputError` if even the narrowest such model is over the
    budget by more than 5 %.
    """
    if not weights > 0:
        raise InputError("weights", f"expected a number above 0, got {weights}")
    depth, step = layers.__index__(), head_width.__index__()

    def shape(heads: int, ffn: int) -> Architecture:
        groups = max(d for d in range(1, heads + 1) if heads % d == 0 and d <= max(1, heads / kv_share.__index__()))
        flags = dict(share_embedding=share_embedding, share_blocks=share_blocks)
        return Architecture(depth, heads * step, heads, groups, ffn, vocab.__index__(), **flags)

    def usual(heads: int) -> Architecture:
        return shape(heads, max(8, round(ffn_ratio * heads * step / 8) * 8))

    heads = 1
    while usual(heads + 1).parameters().total <= weights:
        heads += 1
    best = min((usual(heads), usual(heads + 1)), key=lambda a: abs(a.parameters().total - weights))
    per_step = depth * 3 * best.dim * 8
    moved = best.ffn + 8 * round((weights - best.parameters().total) / per_step)
    found = shape(best.heads, max(8, moved))
    if abs(found.parameters().total - weights) > 0.05 * weights:
        raise InputError(
            "weights",
            f"expected a budget that {depth} layers and {vocab.__index__()} tokens can meet within 5 %, "
            f"got {weights:,.0f} (nearest: {found.parameters().total:,})",
            "Change the number of layers, the vocabulary or head_width.",
        )
    return found


def design_effects(architecture: Architecture, *, context: SupportsIndex = 512) -> list[dict[str, Any]]:
    """What each of MobileLLM's choices does to weights and work, one at a time, from ``architecture``.

    Rows: as given; without embedding sharing; without GQA (a key head for every query head); with
    and without block sharing. Columns: ``weights``, ``vocabulary_share``, ``mflops`` per token behind
    ``context`` others, ``kv_bytes`` per token at two bytes a number, ``passes``.
    """
    variants = {
        "as given": architecture,
        "own output matrix": replace(architecture, share_embedding=False),
        "shared embedding": replace(architecture, share_embedding=True),
        "no GQA": replace(architecture, kv_heads=architecture.heads),
        "every block twice": replace(architecture, share_blocks=True),
        "every block once": replace(architecture, share_blocks=False),
    }
    rows = []
    for name, a in variants.items():
        if name != "as given" and a == architecture:
            continue
        count = a.parameters()
        rows.append(
            {
                "variant": name,
                "weights": count.total,
                "vocabulary_share": count.vocabulary_share,
                "mflops": a.flops(context) / 1e6,
                "kv_bytes": a.kv_bytes(),
                "passes": a.passes,
            }
        )
    return rows


# ---------------------------------------------------------------- real models of such a shape


def build(architecture: Architecture, *, seed: SupportsIndex = 0, positions: SupportsIndex = 2048) -> Any:
    """A trainable ``LlamaForCausalLM`` of this shape with random weights, the same ones for a seed; fp32.

    With ``share_blocks``, passes ``2i`` and ``2i + 1`` hold the *same* parameters (one gradient, one
    optimizer state) and a cache entry each. The authors' code runs a block twice under one cache
    index; a cache then sees both passes as one longer text, so that they get an index each here.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    a = architecture
    config = LlamaConfig(
        vocab_size=a.vocab,
        hidden_size=a.dim,
        intermediate_size=a.ffn,
        num_hidden_layers=a.passes,
        num_attention_heads=a.heads,
        num_key_value_heads=a.kv_heads,
        max_position_embeddings=positions.__index__(),
        tie_word_embeddings=a.share_embedding,
        rms_norm_eps=1e-5,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed.__index__())
        model = LlamaForCausalLM(config)
    if a.share_blocks:
        for i in range(0, a.passes, 2):
            first, second = model.model.layers[i : i + 2]
            for path, weight in list(first.named_parameters()):
                owner, _, name = path.rpartition(".")
                setattr(second.get_submodule(owner), name, weight)
    return model
