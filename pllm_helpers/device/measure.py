"""Memory of a tuning method, measured: a few real steps in a child process.

Weights do not matter for bytes, so models that are not at hand (RoBERTa-large, OPT-1.3B) run at
their true shapes with random ones; the steps are those of the tuners.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ..dialogue import DialogueSet
from ..models import LLM
from ..models.weights import DTYPES
from ..runtime import InputError
from ..tuning import tune_full, tune_lomo, tune_lora, tune_mezo
from ..tuning.data import Row, padded, token_rows
from ..tuning.forward import plain_objective
from ..tuning.frugal import frugal_objective
from ..tuning.full import checkpoint_blocks
from ..tuning.lomo import LomoRun
from ..tuning.loop import Objective, Run, Schedule
from ..tuning.packed import is_packable, packed_objective, shared_beginning
from ..tuning.perturb import sweep_
from ..tuning.replay import Recipe
from .envelope import EnvelopeResult, PhoneEnvelope
from .meter import mark_phase
from .predict import METHODS, configuration, skeleton

__all__ = ["measure_memory", "random_model", "uniform_dialogues"]


def measure_memory(
    model: LLM | str | Any,
    *,
    method: str,
    dtype: str = "fp32",
    batch: int = 8,
    tokens: int = 64,
    answer_tokens: int = 16,
    rank: int = 8,
    steps: int = 2,
    envelope: PhoneEnvelope | None = None,
) -> EnvelopeResult:
    """Run ``steps`` steps of a method in an envelope and see what it takes; arguments as in :func:`predict_memory`.

    Two steps, because Adam's moments exist from the end of the first on.

    Parameters
    ----------
    model : an LLM, which the tuners themselves then tune on made-up dialogues of exactly that many
        tokens; or a configuration of transformers or a name in ``SHAPES``: the same steps on a model with
        random weights, built in the child.
    envelope : default: resident memory, a limit of nine tenths of what the machine has free, so that a
        run that does not fit is killed and the machine is not.

    Returns the envelope's result; ``value`` holds ``losses`` and the ``tokens``, ``answer_tokens`` and
    ``shared_tokens`` that a prediction needs. Raises :class:`~pllm_helpers.runtime.InputError` on an
    unknown method or model.
    """
    if method not in METHODS:
        raise InputError("method", f"expected one of {', '.join(METHODS)}, got {method!r}")
    if dtype not in DTYPES:
        raise InputError("dtype", f"expected 'fp32' or 'bf16', got {dtype!r}")
    if isinstance(model, str):
        model = configuration(model)
    if envelope is None:
        import psutil

        envelope = PhoneEnvelope(0.9 * psutil.virtual_memory().available / 2**20)
    run = _tuner_steps if isinstance(model, LLM) else _random_steps
    return envelope.run(run, model, method, dtype, batch, tokens, answer_tokens, rank, steps)


def uniform_dialogues(llm: LLM, number: int, tokens: int, answer_tokens: int) -> list[DialogueSet]:
    """``number`` dialogues of exactly ``tokens`` tokens with the template, ``answer_tokens`` of them answer and end.

    Raises :class:`~pllm_helpers.runtime.InputError` if the template leaves no room.
    """

    def count(text: str) -> int:
        return len(llm.tokenizer(text, add_special_tokens=False)["input_ids"])

    words = [w for w in "a the so one time way day part more first".split() if [count(w), count(f"{w} {w}")] == [1, 2]]
    made: list[DialogueSet] = []
    for k in range(number if words else 0):
        word = words[k % len(words)]
        answer = " ".join([word] * (answer_tokens - 1))
        (row,) = token_rows(llm, [DialogueSet("u", word, answer or word)], 1 << 20).rows
        question = " ".join([word] * (1 + tokens - len(row.ids)))
        made.append(DialogueSet("u", question or word, answer or word))
    rows = token_rows(llm, made, 1 << 20).rows if made else []
    if {(len(r.ids), r.answer) for r in rows} != {(tokens, answer_tokens)}:
        raise InputError(
            "tokens",
            f"expected room for the template, a question and {answer_tokens} answer tokens, got {tokens} tokens",
            "Give more tokens, and at least 2 answer tokens.",
        )
    return made


def _tuner_steps(
    llm: LLM, method: str, dtype: str, batch: int, tokens: int, answers: int, rank: int, steps: int
) -> dict[str, Any]:
    """Steps of the tuner itself."""
    dialogues = uniform_dialogues(llm, batch, tokens, answers)
    rows = token_rows(llm, dialogues, 1 << 20).rows
    common: dict[str, Any] = dict(steps=steps, batch_size=batch, max_tokens=tokens, progress=False)
    kind, _, way = method.partition("_")
    if kind == "lora":
        frugal = {"adam": None, "checkpointed": "checkpoint", "streamed": "stream"}[way]
        result = tune_lora(llm, dialogues, lr=1e-4, rank=rank, frugal=frugal, **common)
    elif kind == "mezo":
        where = {"parameters": "lora", "rank": rank} if way else {"dtype": dtype}
        result = tune_mezo(llm, dialogues, lr=1e-7, **where, **common)
    elif kind in ("lomo", "adalomo"):
        result = tune_lomo(llm, dialogues, lr=1e-4, optimizer=kind, dtype=dtype, **common)
    else:
        result = tune_full(llm, dialogues, lr=1e-6, optimizer=kind, dtype=dtype, **common)
    return _facts(result.losses, rows)


def _facts(losses: Sequence[float], rows: Sequence[Row]) -> dict[str, Any]:
    return {
        "losses": list(losses),
        "tokens": max(len(r.ids) for r in rows),
        "answer_tokens": max(r.answer for r in rows),
        "shared_tokens": shared_beginning(rows),
    }


# --------------------------------------------------------------------------- models with random weights


def random_model(config: Any, dtype: str = "fp32", seed: int = 0) -> Any:
    """A model of transformers with random weights, built from its configuration alone, in evaluation mode.

    Matrices get normal values with the configuration's spread, 65,536 of them over and over: 1.3
    billion draws would take longer than a step, and bytes are what counts here. Norms are ones,
    biases zeros.
    """
    model = skeleton(config).to(DTYPES[dtype])
    buffers = {n: b for n, b in _fresh_buffers(config, model)}
    model = model.to_empty(device="cpu")
    model.tie_weights()
    draw = torch.randn(1 << 16, generator=torch.Generator().manual_seed(seed)) * 0.02
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim < 2:
                p.fill_(0.0 if name.endswith("bias") else 1.0)
                continue
            flat = p.view(-1)
            whole = len(flat) // len(draw) * len(draw)
            flat[:whole].view(-1, len(draw)).copy_(draw)
            flat[whole:].copy_(draw[: len(flat) - whole])
        for name, b in model.named_buffers():
            b.copy_(buffers[name])
    return model.eval().requires_grad_(False)


def _fresh_buffers(config: Any, like: Any) -> list[tuple[str, Tensor]]:
    """Buffers (rotary frequencies, position numbers) as a real model of one layer computes them."""
    import copy

    small = copy.deepcopy(config)
    small.num_hidden_layers, small.vocab_size = 1, 8
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        if getattr(small, name, None) is not None:
            setattr(small, name, 1)
    if getattr(small, "layer_types", None):
        small.layer_types = small.layer_types[:1]
    return list(type(like)(small).named_buffers())


def masked_objective(model: Any, pad: int) -> Objective:
    """Summed NLL of each row's last ``answer`` tokens where a model fills gaps: read at their own places.

    The prompt form of classification (a verbaliser at a mask), as PocketLLM's RoBERTa has it;
    logits at these places only.
    """

    def objective(rows: Sequence[Row]) -> Tensor:
        ids, mask = padded(rows, pad)
        hidden = model.base_model(input_ids=ids, attention_mask=mask).last_hidden_state
        row, place = torch.tensor(
            [(i, len(r.ids) - r.answer + k) for i, r in enumerate(rows) for k in range(r.answer)]
        ).T
        logits = model.lm_head(hidden[row, place]).float()
        nll = torch.nn.functional.cross_entropy(logits, ids[row, place], reduction="none")
        return torch.stack([part.sum() for part in nll.split([r.answer for r in rows])])

    return objective


class _MaskedLomo(LomoRun):
    def make_objective(self, double: LLM, settings: dict[str, Any]) -> Objective:
        double.model.get_input_embeddings().sparse = True  # few rows, which join the output matrix's gradient
        return masked_objective(double.model, self.pad_id(double))

    @staticmethod
    def pad_id(double: LLM) -> int:
        return double.tokenizer.pad_token_id or 0


def _random_steps(
    config: Any, method: str, dtype: str, batch: int, tokens: int, answers: int, rank: int, steps: int
) -> dict[str, Any]:
    """The tuners' steps on a model with random weights, without their loops, cards and folders."""
    with mark_phase("load"):
        model = random_model(config, dtype)
    masked, pad = config.model_type == "roberta", config.pad_token_id or 0
    draw = torch.Generator().manual_seed(1)
    start = torch.randint(3, config.vocab_size, (batch, tokens), generator=draw).tolist()
    rows = [Row(ids, answers) for ids in start]
    plan = Schedule(steps, 1e-6, batch, 1, 0, "constant", 0, 0.0, 0)
    kind, _, way = method.partition("_")
    losses: list[float] = []

    def objective(plain: bool) -> Objective:
        if masked:
            return masked_objective(model, pad)
        return plain_objective(model, pad) if plain or not is_packable(model) else packed_objective(model)

    if kind == "lora" or way == "lora":
        parameters, model = _with_adapter(model, config, rank)
    if kind in ("adam", "sgd"):
        model.requires_grad_(True)
        run = Run(dict(model.named_parameters()), objective(True), rows, plan)
        if kind == "sgd":
            run.optimizer = torch.optim.SGD(run.parameters.values(), lr=1e-6, foreach=False)
    elif kind in ("lomo", "adalomo"):
        model.requires_grad_(True)
        llm = LLM(model, SimpleNamespace(pad_token_id=pad), config.model_type, dtype)
        run = (_MaskedLomo if masked else LomoRun)(
            llm, rows, plan, {"optimizer": kind, "clip_norm": None, "clip_value": None, "fused_head": True}
        )
    elif kind == "lora":
        if way == "adam":
            work = objective(False)
        elif masked:
            checkpoint_blocks(model.base_model.encoder.layer)
            work = objective(True)
        else:
            work = frugal_objective(model, pad, {"checkpointed": "checkpoint", "streamed": "stream"}[way])
        run = Run(parameters, work, rows, plan)
    else:
        tensors = list(parameters.values() if way else model.parameters())
        recipe, work = Recipe(0, 1e-7, 1e-3), objective(False)
        for step in range(steps):
            found = []
            for move in recipe.walk(step):
                if move:
                    sweep_(tensors, [move], recipe.noise)
                with torch.no_grad():
                    found.append(work(rows).double().sum().item() / (batch * answers))
            sweep_(tensors, [recipe.update(step, recipe.scalars(found))], recipe.noise)
            losses.append(sum(found) / len(found))
        return _facts(losses, rows)
    for _ in range(steps):
        losses.append(run.one_step([list(range(batch))]))
    return _facts(losses, rows)


def _with_adapter(model: Any, config: Any, rank: int) -> tuple[dict[str, Any], Any]:
    """A LoRA adapter on queries and values of all blocks: its parameters, and the model that carries it."""
    import peft

    names = ["query", "value"] if config.model_type == "roberta" else ["q_proj", "v_proj"]
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=rank, lora_alpha=16, target_modules=names))
    wrapped.eval()
    return {n: p for n, p in wrapped.named_parameters() if p.requires_grad}, wrapped.get_base_model()
