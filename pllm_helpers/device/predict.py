r"""Memory of a tuning method, from the shapes alone.

Peak memory is the largest of a few moments of a step: the end of the forward pass, the start of
the backward pass at the output matrix, and its end. At each the parts are counted by hand:

* *weights*: 4 or 2 bytes each; of a frozen base they are clean pages of a file.
* *gradients* and *optimiser*: of what is trained; Adam keeps two moments.
* *activations*: what the backward pass needs again, per token and block. For a Llama block of
  transformers with all weights trained that is 6 vectors of the hidden size d (input of each norm,
  its normalised form, its output), 4 of the attention's width (queries, keys and values repeated
  per head, attention's output), 4 of the feed-forward width, and the attention probabilities. Frozen
  weights need fewer; our packed blocks fewer still.
* *logits*: answer positions only.
* *workspace*: the largest temporaries of a forward or backward pass.
* *runtime*: tokenizer, code pages that the first step touches, Python objects. A measured constant.

Sequences are counted as long as they are padded. Measured peaks are within 10 % where the allocator
gives freed memory back (as in an envelope; see the tests); one that keeps some adds what no formula
sees.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ..models import LLM
from ..runtime import InputError
from ..tuning.frugal import WORDS
from ..tuning.kernels import KEEP, ROWS, SLICE
from ..tuning.packed import WORTH, is_packable
from ..tuning.perturb import CHUNK

__all__ = ["METHODS", "SHAPES", "MemoryPrediction", "Shape", "predict_memory", "shape_of"]

METHODS = (
    "adam",
    "sgd",
    "lora_adam",
    "lora_checkpointed",
    "lora_streamed",
    "lomo",
    "adalomo",
    "mezo",
    "mezo_lora",
)
Number = float | int
BYTES = {"fp32": 4, "bf16": 2}

# What a process takes besides, resident MB above the memory after imports; measured (tests/unit/test_device_memory.py):
# code pages that a first step touches and Python objects, and the tokenizer of SmolLM2 with its 49,152 words (twice
# that for a moment while it is read, long before a step's peak).
CODE_MB, TOKENIZER_MB = 22.0, 32.0


@dataclass(frozen=True)
class Shape:
    """What decides a model's memory. ``head``: weights of the output matrix, ``tied`` to the embeddings or not."""

    family: str
    layers: int
    dim: int
    width: int  # of queries
    key_width: int
    heads: int
    ffn: int
    vocab: int
    tied: bool
    parameters: int
    block: int  # parameters of one block
    lora: tuple[tuple[int, int], ...]  # (in, out) of the query and value layers of a block
    packable: bool


def configuration(name: str) -> Any:
    """Published configuration of a model that the papers tuned; nothing is fetched."""
    from transformers import LlamaConfig, OPTConfig, RobertaConfig

    known = {
        "roberta-large": lambda: RobertaConfig(
            vocab_size=50265,
            hidden_size=1024,
            num_hidden_layers=24,
            num_attention_heads=16,
            intermediate_size=4096,
            max_position_embeddings=514,
            type_vocab_size=1,
        ),
        "opt-1.3b": lambda: OPTConfig(
            vocab_size=50272,
            hidden_size=2048,
            num_hidden_layers=24,
            num_attention_heads=32,
            ffn_dim=8192,
            max_position_embeddings=2048,
            word_embed_proj_dim=2048,
        ),
        "smollm2-135m": lambda: LlamaConfig(
            vocab_size=49152,
            hidden_size=576,
            intermediate_size=1536,
            num_hidden_layers=30,
            num_attention_heads=9,
            num_key_value_heads=3,
            max_position_embeddings=8192,
            tie_word_embeddings=True,
        ),
    }
    if name not in known:
        raise InputError(
            "model", f"expected an LLM, a configuration of transformers or one of {', '.join(known)}, got {name!r}"
        )
    return known[name]()


SHAPES = ("smollm2-135m", "roberta-large", "opt-1.3b")


def shape_of(model: LLM | str | Any) -> Shape:
    """Shape of an LLM, a configuration of transformers, or one of the names in ``SHAPES``.

    Raises :class:`~pllm_helpers.runtime.InputError` on a kind of block that is not counted here.
    """
    if isinstance(model, LLM):
        module, config = model.model, model.model.config.get_text_config()
    else:
        config = configuration(model) if isinstance(model, str) else model
        module = skeleton(config)
    family = {"llama": "llama", "qwen2": "llama", "opt": "opt", "roberta": "roberta"}.get(config.model_type)
    if family is None:
        raise InputError("model", f"expected blocks as in Llama, Qwen2, OPT or RoBERTa, got {config.model_type!r}")
    heads = config.num_attention_heads
    head = getattr(config, "head_dim", None) or config.hidden_size // heads
    groups = getattr(config, "num_key_value_heads", None) or heads
    stacks = [m for m in module.modules() if isinstance(m, torch.nn.ModuleList)]
    block = max(stacks, key=lambda m: sum(p.numel() for p in m.parameters()))[0]
    names = ("query", "value") if family == "roberta" else ("q_proj", "v_proj")
    linear = {n.rsplit(".", 1)[-1]: m for n, m in block.named_modules() if isinstance(m, torch.nn.Linear)}
    return Shape(
        family,
        config.num_hidden_layers,
        config.hidden_size,
        heads * head,
        groups * head,
        heads,
        getattr(config, "intermediate_size", None) or config.ffn_dim,
        config.vocab_size,
        module.get_output_embeddings().weight is module.get_input_embeddings().weight,
        sum(p.numel() for p in module.parameters()),
        sum(p.numel() for p in block.parameters()),
        tuple((linear[n].in_features, linear[n].out_features) for n in names if n in linear),
        family == "llama" and is_packable(module),
    )


def skeleton(config: Any) -> Any:
    """The model of a configuration without any memory for its weights, heads as in the papers."""
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

    from ..models.weights import quiet_transformers

    kind = AutoModelForMaskedLM if config.model_type == "roberta" else AutoModelForCausalLM
    with quiet_transformers(), torch.device("meta"):
        model = kind.from_config(config, attn_implementation="eager")
        model.tie_weights()
    return model


@dataclass(frozen=True)
class MemoryPrediction:
    """Megabytes (2**20 bytes) at the worst moment of a step, part by part; ``total`` is their sum.

    ``moment`` names it. ``mapped``: the part of ``weights`` that are clean pages of a file, which
    some phones do not count (``private_total`` leaves them out).
    """

    method: str
    weights: float
    gradients: float
    optimiser: float
    activations: float
    logits: float
    workspace: float
    runtime: float
    moment: str
    mapped: float

    @property
    def total(self) -> float:
        """Resident megabytes above the memory after imports."""
        return sum(self.parts.values())

    @property
    def private_total(self) -> float:
        """The same without clean pages of the weights' file."""
        return self.total - self.mapped

    @property
    def parts(self) -> dict[str, float]:
        """Name of each part -> megabytes, for a stacked bar."""
        return {
            name: getattr(self, name)
            for name in ("weights", "gradients", "optimiser", "activations", "logits", "workspace", "runtime")
        }

    def __str__(self) -> str:
        parts = ", ".join(f"{k} {v:.0f}" for k, v in self.parts.items() if v >= 0.5)
        return f"{self.method}: {self.total:.0f} MB at the {self.moment} ({parts})"


def predict_memory(
    model: LLM | str | Any,
    *,
    method: str,
    dtype: str = "fp32",
    batch: int = 8,
    tokens: int = 64,
    answer_tokens: int = 16,
    shared_tokens: int = 0,
    rank: int = 8,
    runtime_mb: Number | None = None,
) -> MemoryPrediction:
    """Peak memory of a tuning method, above the memory after imports.

    Counted are the implementations here: :func:`~pllm_helpers.tuning.tune_full` (``"adam"``,
    ``"sgd"``), :func:`~pllm_helpers.tuning.tune_lora` on queries and values of all layers
    (``"lora_adam"``; with ``frugal="checkpoint"`` and ``"stream"``: ``"lora_checkpointed"``,
    ``"lora_streamed"``), :func:`~pllm_helpers.tuning.tune_lomo` (``"lomo"``, ``"adalomo"``),
    :func:`~pllm_helpers.tuning.tune_mezo` (``"mezo"``, and inside LoRA ``"mezo_lora"``).

    Parameters
    ----------
    model : an LLM, a configuration of transformers, or ``"smollm2-135m"``, ``"roberta-large"``,
        ``"opt-1.3b"``: their true shapes.
    dtype : of weights and activations, ``"fp32"`` or ``"bf16"``; adapters are fp32.
    batch, tokens : dialogues of a step, tokens of the longest, template included.
    answer_tokens : of one dialogue's answer: the positions that have logits.
    shared_tokens : with which all dialogues begin (the template's system message): packed blocks
        compute them once.
    runtime_mb : the constant part; ``None``: what was measured here for code pages and, with an LLM, its
        tokenizer.

    Raises :class:`~pllm_helpers.runtime.InputError` on an unknown method, dtype or kind of model
    and on sizes below 1.
    """
    if method not in METHODS:
        raise InputError("method", f"expected one of {', '.join(METHODS)}, got {method!r}")
    if dtype not in BYTES:
        raise InputError("dtype", f"expected 'fp32' or 'bf16', got {dtype!r}")
    for name, value, low in (
        ("batch", batch, 1),
        ("tokens", tokens, 2),
        ("answer_tokens", answer_tokens, 1),
        ("rank", rank, 1),
        ("shared_tokens", shared_tokens, 0),
    ):
        if isinstance(value, bool) or not isinstance(value, int) or value < low:
            raise InputError(name, f"expected a whole number of at least {low}, got {value!r}")
    if answer_tokens >= tokens or shared_tokens > tokens - answer_tokens:
        raise InputError(
            "answer_tokens", f"expected fewer than the {tokens} tokens with the shared ones, got {answer_tokens}"
        )
    s = shape_of(model)
    work = _Count(s, BYTES[dtype], batch, tokens, answer_tokens, shared_tokens if shared_tokens >= WORTH else 0, rank)
    moments = work.moments(method)
    runtime = float(runtime_mb) if runtime_mb is not None else CODE_MB + (TOKENIZER_MB if isinstance(model, LLM) else 0)
    worst = max(moments, key=lambda m: sum(v for k, v in m[1].items() if k != "mapped"))
    parts = {k: v / 2**20 for k, v in worst[1].items()}
    names = ("weights", "gradients", "optimiser", "activations", "logits", "workspace")
    return MemoryPrediction(
        method, *(parts.get(k, 0.0) for k in names), runtime, moment=worst[0], mapped=parts.get("mapped", 0.0)
    )


Moments = list[tuple[str, dict[str, Number]]]  # name of a moment, bytes of each part


class _Count:
    """Bytes of the parts, for one setting."""

    def __init__(self, shape: Shape, size: int, batch: int, tokens: int, answers: int, shared: int, rank: int):
        self.s, self.b, self.rank = shape, size, rank
        self.batch, self.length = batch, tokens
        self.packed_tokens = shared + batch * (tokens - shared)
        self.padded_tokens = batch * tokens
        self.shared, self.own = shared, tokens - shared
        self.answers = batch * answers
        self.weights = shape.parameters * size
        self.head = shape.vocab * shape.dim * size
        self.adapter = 4 * rank * sum(a + b for a, b in shape.lora) * shape.layers

    # ------------------------------------------------------------------ blocks of transformers

    def kept(self, trained: str) -> Number:
        """Kept by one block for the backward pass: ``trained`` is ``"all"`` or ``"lora"``."""
        s, n = self.s, self.padded_tokens
        d, w, f = {
            ("llama", "all"): (6, 4, 4),
            ("llama", "lora"): (3, 3, 3),
            ("opt", "all"): (4, 4, 1),
            ("opt", "lora"): (3, 3, 1),
            ("roberta", "all"): (4, 4, 2),
            ("roberta", "lora"): (3, 3, 1),
        }[s.family, trained]
        pairs = 2 * 4 * self.rank * n if trained == "lora" else 0
        return self.b * n * (d * s.dim + w * s.width + f * s.ffn) + self.scores + pairs

    @property
    def scores(self) -> Number:
        """Attention probabilities of one block."""
        return self.b * self.batch * self.s.heads * self.length**2

    @property
    def block_temporaries(self) -> Number:
        """Largest set alive at once inside a block without a graph."""
        s, n = self.s, self.padded_tokens * self.b
        inner = 3 if s.family == "llama" else 2
        return max(n * (2 * s.dim + inner * s.ffn), n * (2 * s.dim + 4 * s.width) + 3 * self.scores)

    def plain(self, trained: str) -> Number:
        """Activations of all blocks, of the embeddings and of the last norm."""
        return self.s.layers * self.kept(trained) + 3 * self.b * self.padded_tokens * self.s.dim

    @property
    def backward_temporaries(self) -> Number:
        """Gradients that travel through a feed-forward part."""
        return self.b * self.padded_tokens * (2 * self.s.dim + 3 * self.s.ffn)

    def logit(self, copies: Number) -> Number:
        return copies * self.answers * self.s.vocab * 4

    # ------------------------------------------------------------------ our own packed blocks

    @property
    def packed_scores(self) -> Number:
        one = self.batch * self.own * (self.shared + self.own) + self.shared**2
        return self.b * self.s.heads * one

    def packed_kept(self) -> Number:
        """Kept by one packed block with adapters on queries and values."""
        s, n = self.s, self.packed_tokens
        keys = self.batch * (self.shared + self.own) + self.shared
        kept = n * (3 * s.dim + s.width + 2 * s.ffn) + 2 * keys * s.key_width
        probabilities = self.packed_scores if self.own <= KEEP else 0
        return self.b * kept + probabilities + 2 * 4 * self.rank * n

    @property
    def packed_temporaries(self) -> Number:
        s, n = self.s, self.packed_tokens * self.b
        keys = (self.batch * (self.shared + self.own) + self.shared) * s.key_width * self.b
        return max(n * (2 * s.dim + 3 * s.ffn), n * (2 * s.dim + 3 * s.width) + 2 * keys + 2 * self.packed_scores)

    @property
    def packed_logits(self) -> Number:
        """Of ``ROWS`` answers at a time, and a few rows of probabilities."""
        return min(self.answers, ROWS) * self.s.vocab * self.b + SLICE * self.s.vocab * 4

    # ------------------------------------------------------------------ methods

    def moments(self, method: str) -> Moments:
        if method in ("adam", "sgd"):
            return self.full(2 * self.weights if method == "adam" else 0)
        if method == "lomo":
            return self.lomo()
        if method == "adalomo":
            return self.adalomo()
        return self.lora(method) if method.startswith("lora") else self.mezo(method)

    def full(self, optimiser: Number) -> Moments:
        base = {"weights": self.weights, "optimiser": optimiser}
        acts = self.plain("all")
        late = 2 * self.head if self.s.tied else 0  # a tied matrix has two gradients, and then their sum
        return [
            ("end of the forward pass", base | {"activations": acts, "logits": self.logit(2)}),
            ("gradient of the logits", base | {"activations": acts, "logits": self.logit(3)}),
            (
                "gradient of the output matrix",
                base | {"activations": acts, "logits": self.logit(1), "gradients": self.head},
            ),
            (
                "first block of the backward pass",
                base | {"activations": acts, "gradients": self.head, "workspace": self.backward_temporaries},
            ),
            ("end of the backward pass", base | {"gradients": self.weights, "workspace": late}),
        ]

    def lomo(self) -> Moments:
        base, acts = {"weights": self.weights}, self.plain("all")
        part = self.answers * WORDS * 4
        piece = WORDS * self.s.dim * self.b
        matrix = self.s.dim * max(self.s.ffn, self.s.width) * self.b
        logits, kept = 2 * part, 0
        if self.s.family == "roberta":  # its head has a layer and a bias of its own: no slices, one gradient that waits
            logits, piece, kept = self.logit(2), self.head, self.head
        return [
            ("end of the forward pass", base | {"activations": acts, "logits": logits}),
            ("gradient of the output matrix", base | {"activations": acts, "logits": logits, "gradients": piece}),
            (
                "first block of the backward pass",
                base | {"activations": acts, "gradients": kept + matrix, "workspace": self.backward_temporaries},
            ),
            ("end of the backward pass", base | {"gradients": 2 * kept}),
        ]

    def adalomo(self) -> Moments:
        state = 4 * self.s.parameters / self.s.dim * 2  # a row and a column of each matrix
        base, acts = {"weights": self.weights, "optimiser": state}, self.plain("all")
        return [
            ("gradient of the logits", base | {"activations": acts, "logits": self.logit(3)}),
            (
                "first block of the backward pass",
                base | {"activations": acts, "gradients": self.head, "workspace": self.backward_temporaries},
            ),
            # the output's gradient, and its sum with the embedding's rows
            ("end of the backward pass", base | {"gradients": (2 if self.s.tied else 1) * self.head}),
        ]

    def lora(self, method: str) -> Moments:
        packed = self.s.packable
        base: dict[str, Number] = {
            "weights": self.weights,
            "mapped": self.weights,
            "gradients": self.adapter,
            "optimiser": 2 * self.adapter,
        }
        extra = self.adapter  # the adapter itself
        n = self.packed_tokens if packed else self.padded_tokens
        one = self.packed_kept() if packed else self.kept("lora")
        back = self.b * n * (2 * self.s.dim + 3 * self.s.ffn)
        inputs = self.s.layers * self.b * n * self.s.dim
        logits = self.packed_logits if packed else self.logit(3)
        if method == "lora_adam":
            acts = self.s.layers * one + (2 if packed else 3) * self.b * n * self.s.dim
            work, behind = (self.packed_temporaries if packed else self.block_temporaries), back
        else:
            acts, work, behind = inputs, one, one + back
        blocks, head = base, base
        if method == "lora_streamed":  # one block, or one slice of the output matrix, at a time
            block, piece = self.s.block * self.b, WORDS * self.s.dim * self.b
            blocks, head = base | {"weights": block, "mapped": block}, base | {"weights": piece, "mapped": piece}
            logits = 2 * self.answers * WORDS * 4
        return [
            ("forward pass", blocks | {"activations": acts, "workspace": work + extra}),
            ("answers' logits", head | {"activations": acts, "logits": logits, "workspace": extra}),
            ("backward pass", blocks | {"activations": acts, "workspace": behind + extra}),
        ]

    def mezo(self, method: str) -> Moments:
        base: dict[str, Number] = {"weights": self.weights}
        if method == "mezo_lora":
            base = {"weights": self.weights, "mapped": self.weights}
        if self.s.packable:
            work, logits = self.packed_temporaries, self.packed_logits
        else:
            work, logits = self.block_temporaries, self.logit(2)
        x = self.b * (self.packed_tokens if self.s.packable else self.padded_tokens) * self.s.dim
        noise = CHUNK * 4 + (self.adapter if method == "mezo_lora" else 0)
        return [
            ("a block of the forward pass", base | {"activations": x, "workspace": work + noise}),
            ("answers' logits", base | {"activations": x, "logits": logits, "workspace": noise}),
        ]
