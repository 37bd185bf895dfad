"""LoRA fine-tuning on dialogues: a frozen bf16 model, fp32 adapters, a loss on the answers."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..dialogue import DialogueSet
from ..runtime import InputError
from .adapters import (
    CARD,
    CHECKPOINT,
    CONFIG,
    WEIGHTS,
    adapter_state,
    attach,
    decoder_layers,
    fingerprint,
    plain_config,
    without_adapter,
    write_adapter,
)
from .checkpoint import own_folder, read_checkpoint
from .data import token_rows
from .forward import plain_objective
from .loop import Objective, Progress, Run, Schedule, Watch, train
from .memory import PeakMemory
from .packed import is_packable, packed_objective
from .result import TuningResult, load_result

if TYPE_CHECKING:
    from ..models import LLM

__all__ = ["tune_lora"]

Number = float | int


def tune_lora(
    llm: LLM,
    dialogues: Sequence[DialogueSet],
    *,
    steps: int,
    lr: Number,
    seed: int = 0,
    out: str | Path | None = None,
    rank: int = 8,
    alpha: Number = 16,
    modules: Sequence[str] = ("q_proj", "v_proj"),
    layers: str | int | Sequence[int] = "all",
    batch_size: int = 8,
    accumulate: int = 1,
    warmup: Number = 0.1,
    decay: str = "linear",
    clip: Number = 1.0,
    weight_decay: Number = 0.0,
    max_tokens: int = 512,
    held_out: Sequence[DialogueSet] | None = None,
    evaluate_every: int | None = None,
    patience: int | None = None,
    checkpoint_every: int | None = None,
    resume: bool = True,
    progress: Progress = None,
    fast: bool = True,
    frugal: str | None = None,
) -> TuningResult:
    """Train a LoRA adapter (Hu et al. 2021) so that ``llm`` answers as ``dialogues`` do.

    The question goes through the chat template; the loss is the mean NLL of the answer's tokens
    and its end-of-turn token. The base weights keep their dtype and are never written; the
    adapter is fp32. ``llm`` is left as it was; use :func:`adapted` to talk to the result.

    Parameters
    ----------
    steps, lr : number of updates, peak learning rate of AdamW.
    seed : draws the adapter's start and the order of the batches; nothing else is random.
    out : folder for adapter, card and checkpoints. A run that was killed goes on from its last
        checkpoint with bit-equal results (same machine and threads); a finished run is returned
        from the folder at once. ``None`` keeps the adapter in memory.
    rank, alpha : the update of a matrix is ``alpha / rank * B @ A`` with ``A`` (rank, in), ``B`` (out, rank).
    modules : names of the linear layers to adapt, as in ``"q_proj"``.
    layers : ``"all"``, ``"upper"`` (the upper half), a number (that many from the top) or a list of numbers from 0.
    batch_size, accumulate : dialogues per batch, batches per update.
    warmup : steps (or, below 1, share of the steps) of linear rise.
    decay : what follows the rise: ``"linear"`` or ``"cosine"`` towards 0, or ``"constant"``.
    clip : largest norm of the gradient; 0 does not clip.
    max_tokens : a longer dialogue loses the start of its question; the card counts these.
    held_out : dialogues whose mean NLL per token is measured every ``evaluate_every`` steps
        (default: a tenth of all), before the first and after the last.
    patience : stop after that many looks without a better held-out NLL, and keep the best adapter.
    checkpoint_every : steps between checkpoints; ``None``: about every 20 seconds.
    resume : ``False`` starts over in ``out``.
    progress : ``None`` shows a text bar for long runs only. A function is called after each step with
        the step (from 1), its loss and the seconds so far; if it returns ``False``, the run ends there.
        With ``out`` such a run leaves a checkpoint, and the same call goes on from it; what it
        returns stays in memory, and its card says ``"ended_at"``.
    fast : ``False`` runs the blocks of transformers on padded batches even where our own, which
        give the same losses up to rounding, could.
    frugal : ``"checkpoint"`` keeps one block's activations at a time and computes each block twice;
        the steps are the same to the last bit. ``"stream"`` also lets go of the memory-mapped
        weights after each use, so that about one block is resident (same up to rounding).

    Raises :class:`~pllm_helpers.runtime.InputError` on settings out of range, blank dialogues,
    answers longer than ``max_tokens``, losses that are not finite, a damaged checkpoint, and an
    ``out`` that holds a run with other settings or data.
    """
    settings = _checked(llm, locals())
    rows = token_rows(llm, dialogues, max_tokens)
    held = token_rows(llm, held_out, max_tokens, what="held_out") if held_out is not None else None
    card: dict[str, Any] = {
        "base_model": llm.name,
        "base_dtype": llm.dtype,
        "base_fingerprint": fingerprint(llm.model),
        "settings": settings,
        "data_sha256": rows.hash,
        "held_out_sha256": held.hash if held else None,
    }
    key = hashlib.sha256(json.dumps(card, sort_keys=True).encode()).hexdigest()
    plan = Schedule(steps, lr, batch_size, accumulate, warmup, decay, clip, weight_decay, seed)
    watch = Watch(held.rows, evaluate_every or max(1, steps // 10), patience) if held else None

    if out is None:
        return _tune(llm, rows, plan, watch, settings, card, key, None, checkpoint_every, progress)
    with own_folder(out) as folder:
        if resume and (done := _finished(folder, card)):
            return done
        if not resume:
            for name in (CARD, CONFIG, WEIGHTS, CHECKPOINT):
                (folder / name).unlink(missing_ok=True)
        return _tune(llm, rows, plan, watch, settings, card, key, folder, checkpoint_every, progress)


def _tune(
    llm: LLM,
    rows: Any,
    plan: Schedule,
    watch: Watch | None,
    settings: dict[str, Any],
    card: dict[str, Any],
    key: str,
    folder: Path | None,
    checkpoint_every: int | None,
    progress: Progress,
) -> TuningResult:
    from peft import LoraConfig

    config = LoraConfig(
        r=settings["rank"],
        lora_alpha=settings["alpha"],
        target_modules=list(settings["modules"]),
        layers_to_transform=settings["layers"],
        task_type="CAUSAL_LM",
    )
    with PeakMemory() as memory:
        model = attach(llm, config, plan.seed)
        model.eval()  # dropout of the base model, where it has one, would be the only chance in a step
        parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        objective = _objective(
            model.get_base_model(), llm.tokenizer.pad_token_id or 0, settings["fast"], settings.get("frugal")
        )
        run = Run(parameters, objective, rows.rows, plan)
        saved = read_checkpoint(folder) if folder else None
        if saved:
            if saved.key != key:
                raise _mixed(folder)
            run.restore(saved)
        train(run, watch, memory, folder, key, checkpoint_every, progress)
        if watch and watch.patience is not None:
            for name, p in parameters.items():
                p.data.copy_(run.best[name])
    card = {
        **card,
        "shortened_questions": rows.shortened,
        "dialogues": len(rows.rows),
        "versions": {p: importlib.metadata.version(p) for p in ("torch", "transformers", "peft")},
        "measured": {
            "losses": run.losses,
            "held_out": run.held_out,
            "tokens": run.tokens,
            "seconds": run.seconds,
            "peak_mb": run.peak_mb,
        },
    }
    state, plain = adapter_state(model), plain_config(config)
    plain["inference_mode"] = True
    if run.ended:
        card["ended_at"], folder = run.step, None  # the checkpoint stays; a finished run it is not
    if folder:
        write_adapter(folder, state, plain, card)
        (folder / CHECKPOINT).unlink(missing_ok=True)
    return TuningResult(run.losses, run.seconds, run.peak_mb, run.tokens, folder, run.held_out, card, state, plain)


def _objective(model: Any, pad: int, fast: bool, frugal: str | None = None) -> Objective:
    if frugal:
        from .frugal import frugal_objective

        return frugal_objective(model, pad, frugal, fast)
    return packed_objective(model) if fast and is_packable(model) else plain_objective(model, pad)


def _mixed(folder: Path | None) -> InputError:
    return InputError(
        "out",
        f"expected an empty folder or the same run, {folder} holds one with other settings, data or base model",
        "Give another folder, or resume=False to start over.",
    )


def _finished(folder: Path, card: dict[str, Any]) -> TuningResult | None:
    """The finished run in ``folder`` if it is the one that ``card`` describes."""
    if not (folder / CARD).is_file():
        return None
    done = load_result(folder)
    if any(done.card.get(k) != json.loads(json.dumps(v)) for k, v in card.items()):
        raise _mixed(folder)
    return done


def whole(name: str, value: Any, low: int, high: int = 1 << 40) -> int:
    """``value`` if it is a whole number from ``low`` to ``high``, else an error that names the setting."""
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise InputError(name, f"expected a whole number from {low} to {high}, got {value!r}")
    return value


def real(name: str, value: Any, low: Number, high: Number) -> Number:
    """``value`` if it is a number from ``low`` to ``high`` (not NaN), else an error that names the setting."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
        raise InputError(name, f"expected a number from {low} to {high}, got {value!r}")
    return value


def chosen_layers(llm: LLM, layers: str | int | Sequence[int]) -> list[int]:
    """Layer numbers, ascending, from what ``layers`` may be."""
    count = len(decoder_layers(llm))
    if layers == "all":
        return list(range(count))
    if layers == "upper":
        return list(range(count // 2, count))
    if isinstance(layers, int) and not isinstance(layers, bool):
        return list(range(count - whole("layers", layers, 1, count), count))
    if isinstance(layers, str) or not isinstance(layers, Sequence) or not layers:
        raise InputError("layers", f"expected 'all', 'upper', a number or a list of numbers, got {layers!r}")
    return sorted({whole("layers", x, 0, count - 1) for x in layers})


def chosen_modules(llm: LLM, modules: Sequence[str]) -> list[str]:
    """Names of linear layers of a block, sorted; unknown ones are an error that lists the known."""
    import torch

    known = sorted(
        {n.rsplit(".", 1)[-1] for n, m in decoder_layers(llm)[0].named_modules() if isinstance(m, torch.nn.Linear)}
    )
    names = [modules] if isinstance(modules, str) else list(modules)
    unknown = [m for m in names if m not in known]
    if not names or unknown:
        raise InputError("modules", f"expected some of {', '.join(known)}, got {unknown or 'none'}")
    return sorted(set(names))


def _checked(llm: LLM, given: dict[str, Any]) -> dict[str, Any]:
    """The settings that decide the result, in range, as JSON types."""
    if llm.kind != "causal":
        raise InputError("llm", f"expected a model that writes text, got {llm.name}, which fills gaps")
    without_adapter(llm)
    layers, modules = chosen_layers(llm, given["layers"]), chosen_modules(llm, given["modules"])
    linear = dict(decoder_layers(llm)[layers[0]].named_modules())
    narrow = min(min(m.weight.shape) for n, m in linear.items() if n.rsplit(".", 1)[-1] in modules)
    if given["decay"] not in ("linear", "cosine", "constant"):
        raise InputError("decay", f"expected 'linear', 'cosine' or 'constant', got {given['decay']!r}")
    if given["patience"] is not None and given["held_out"] is None:
        raise InputError("patience", "expected held_out dialogues to watch, got none")
    steps = whole("steps", given["steps"], 1)
    settings = {
        "method": "lora",
        "steps": steps,
        "lr": real("lr", given["lr"], 1e-9, 10),
        "seed": whole("seed", given["seed"], 0),
        "rank": whole("rank", given["rank"], 1, narrow),
        "alpha": real("alpha", given["alpha"], 1e-6, 1e6),
        "modules": modules,
        "layers": layers,
        "batch_size": whole("batch_size", given["batch_size"], 1, 100_000),
        "accumulate": whole("accumulate", given["accumulate"], 1, 100_000),
        "warmup": real("warmup", given["warmup"], 0, steps),
        "decay": given["decay"],
        "clip": real("clip", given["clip"], 0, 1e9),
        "weight_decay": real("weight_decay", given["weight_decay"], 0, 10),
        "max_tokens": whole("max_tokens", given["max_tokens"], 8, 1 << 20),
    }
    if given["frugal"] not in (None, "checkpoint", "stream"):
        raise InputError("frugal", f"expected None, 'checkpoint' or 'stream', got {given['frugal']!r}")
    if given["frugal"]:
        settings["frugal"] = given["frugal"]
    for name, low in (("evaluate_every", 1), ("patience", 1), ("checkpoint_every", 1)):
        if given[name] is not None:
            whole(name, given[name], low)
    return settings | {
        "fast": bool(given["fast"]),
        "evaluate_every": given["evaluate_every"],
        "patience": given["patience"],
    }
