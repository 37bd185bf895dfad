"""Full-parameter tuning with derivatives: all weights in a private copy, ordinary backward, AdamW or SGD.

The plain reference beside LOMO and MeZO. Per weight of fp32 it holds 4 bytes of weight, 4 of
gradient and, with Adam, 8 of moments, and the activations on top.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import importlib.metadata
import json
import math
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..dialogue import DialogueSet
from ..models.weights import DTYPES
from ..runtime import InputError, whole_file, write_whole
from .adapters import CARD, CHECKPOINT, WEIGHTS, decoder_layers, fingerprint, without_adapter
from .checkpoint import own_folder
from .data import Row, token_rows
from .forward import plain_objective
from .loop import Objective, Progress, Run, Schedule, Watch, train
from .lora import real, whole
from .memory import PeakMemory
from .pages import Range, drop, mapped_pages
from .perturb import all_finite
from .result import TuningResult

if TYPE_CHECKING:
    from ..models import LLM

__all__ = ["private_copy", "tune_full", "with_weights"]

Number = float | int
MODEL, STATE = "model.safetensors", "weights_checkpoint.safetensors"
LOWER = "Lower lr, raise warmup, clip the gradients, or look for odd dialogues. The last checkpoint, if any, is whole."


def tune_full(
    llm: LLM,
    dialogues: Sequence[DialogueSet],
    *,
    steps: int,
    lr: Number,
    seed: int = 0,
    out: str | Path | None = None,
    optimizer: str = "adam",
    batch_size: int = 8,
    accumulate: int = 1,
    warmup: Number = 0.1,
    decay: str = "linear",
    clip_norm: Number | None = None,
    weight_decay: Number = 0.0,
    max_tokens: int = 512,
    dtype: str = "fp32",
    checkpointing: bool = False,
    held_out: Sequence[DialogueSet] | None = None,
    evaluate_every: int | None = None,
    checkpoint_every: int | None = None,
    resume: bool = True,
    progress: Progress = None,
) -> TuningResult:
    """Train every weight of a private copy of ``llm`` with its exact gradient; ``llm`` is left as it was.

    The loss is that of :func:`~pllm_helpers.tuning.tune_lora`: mean NLL of the answers' tokens,
    logits at answer positions only.

    Parameters
    ----------
    steps, lr, seed, batch_size, accumulate, warmup, decay, max_tokens, held_out, evaluate_every,
    resume, progress : as in :func:`~pllm_helpers.tuning.tune_lora`.
    out : folder for the tuned weights (``model.safetensors``), card and checkpoints.
    optimizer : ``"adam"`` (AdamW, betas 0.9 and 0.999) or ``"sgd"`` (no momentum).
    clip_norm : largest norm of the gradient of all weights together; ``None`` does not clip.
    weight_decay : decoupled, all weights.
    dtype : of the private copy, ``"fp32"`` or ``"bf16"``. A bf16 weight has 8 bits of precision:
        an update below about 1/500 of it is rounded away.
    checkpointing : keep only the input of every block and compute the block again on the way back.
    checkpoint_every : steps between checkpoints; ``None``: about once a minute.

    Raises :class:`~pllm_helpers.runtime.InputError` as :func:`~pllm_helpers.tuning.tune_lora`
    does, and if the loss diverges.
    """
    given = locals()
    if optimizer not in ("adam", "sgd"):
        raise InputError("optimizer", f"expected 'adam' or 'sgd', got {optimizer!r}")
    settings = weight_settings(llm, given) | {
        "method": "full",
        "optimizer": optimizer,
        "accumulate": whole("accumulate", accumulate, 1, 100_000),
        "clip_norm": clip_norm if clip_norm is None else real("clip_norm", clip_norm, 1e-12, 1e9),
    }
    return tune_weights(llm, dialogues, settings, FullRun, given)


class FullRun(Run):
    """A :class:`~pllm_helpers.tuning.loop.Run` over all weights, with a check against divergence."""

    def __init__(self, double: LLM, rows: Sequence[Row], plan: Schedule, settings: dict[str, Any]):
        super().__init__(dict(double.model.named_parameters()), self.make_objective(double, settings), rows, plan)
        self.worst = 2 * math.log(double.model.config.get_text_config().vocab_size)
        if settings["optimizer"] != "adam":
            self.optimizer = torch.optim.SGD(
                list(self.parameters.values()), lr=plan.lr, weight_decay=plan.weight_decay, foreach=False
            )

    def make_objective(self, double: LLM, settings: dict[str, Any]) -> Objective:
        """Summed NLL of each row's answer, with a graph to all weights."""
        return plain_objective(double.model, double.tokenizer.pad_token_id or 0)

    def close(self) -> None:
        """Undo what the run has hung into the weights."""
        for p in self.parameters.values():
            p.grad = None

    def measured(self) -> dict[str, Any]:
        """What this kind of run adds to the card."""
        return {}

    def one_step(self, batches: Sequence[Sequence[int]]) -> float:
        loss = super().one_step(batches)
        self.check(loss, self.step)
        return loss

    def check(self, loss: float, step: int) -> None:
        """Raise :class:`~pllm_helpers.runtime.InputError` on a loss that is not finite or twice that of guessing.

        ``step`` counts from 1.
        """
        if not math.isfinite(loss):
            raise InputError("lr", f"expected finite losses, got {loss} at step {step}", LOWER)
        if loss > max(self.worst, 2 * self.losses[0] if self.losses else 0.0):
            raise InputError(
                "lr",
                f"expected losses that fall, got {loss:.1f} nats per token at step {step}: "
                f"guessing costs {self.worst / 2:.1f}, the first step had {(self.losses or [loss])[0]:.1f}",
                LOWER,
            )

    @property
    def optimizer_state(self) -> dict[str, torch.Tensor]:
        """Moments of AdamW under ``first/NAME`` and ``second/NAME``; nothing for SGD."""
        found = {}
        for name, p in self.parameters.items():
            moments = self.optimizer.state.get(p) or {}
            if "exp_avg" in moments:
                found[f"first/{name}"], found[f"second/{name}"] = moments["exp_avg"], moments["exp_avg_sq"]
        return found

    def make_optimizer_state(self) -> None:
        """Room for what :attr:`optimizer_state` of a run at this step holds, to be filled by :meth:`resume_from`."""
        for p in self.parameters.values() if isinstance(self.optimizer, torch.optim.AdamW) else ():
            self.optimizer.state[p] = {
                "step": torch.tensor(float(self.step)),
                "exp_avg": torch.empty_like(p),
                "exp_avg_sq": torch.empty_like(p),
            }

    def checkpoint(self, key: str) -> Any:
        return _Writer(self, key)

    def write(self, folder: Path, key: str) -> None:
        """State of the run into ``folder``: tensor by tensor, without a second copy in memory."""
        tensors = {f"weight/{k}": p.detach() for k, p in self.parameters.items()} | self.optimizer_state
        if not all_finite(self.parameters.values()):
            raise InputError("lr", f"expected finite weights, got NaN or infinity after step {self.step}", LOWER)
        progress = {k: getattr(self, k) for k in ("losses", "held_out", "tokens", "seconds", "peak_mb")}
        head = {"key": key, "sha256": _hash(tensors), "progress": json.dumps(progress)}
        write_tensors(folder / STATE, tensors, head)

    def resume_from(self, folder: Path, key: str) -> bool:
        """Take up the state in ``folder``; whether there was one.

        Raises :class:`~pllm_helpers.runtime.InputError` on a damaged one and on one of another run.
        """
        if not (folder / STATE).is_file():
            return False
        try:
            with _opened(folder / STATE) as f:
                head = f.metadata()
                if head["key"] != key:
                    raise mixed(folder)
                progress = json.loads(head["progress"])
                self.losses = list(progress["losses"])
                self.held_out = [(int(s), x) for s, x in progress["held_out"]]
                self.tokens, self.seconds, self.peak_mb = (progress[k] for k in ("tokens", "seconds", "peak_mb"))
                self.make_optimizer_state()
                wanted = {f"weight/{k}": p for k, p in self.parameters.items()} | self.optimizer_state
                if set(wanted) != set(f.keys()):
                    raise ValueError("it holds other tensors")
                for name, tensor in wanted.items():
                    tensor.detach().copy_(f.get_tensor(name))
                if head["sha256"] != _hash(wanted):
                    raise ValueError("its checksum differs")
        except InputError:
            raise
        except Exception as e:  # safetensors raises its own kinds
            raise InputError(
                "checkpoint",
                f"expected a whole {STATE} in {folder}, got a damaged one ({e})",
                "Start over with resume=False or another out.",
            ) from e
        return True


class _Writer:
    """What :func:`~pllm_helpers.tuning.loop.train` asks for: something with ``write(folder)``."""

    def __init__(self, run: FullRun, key: str):
        self.run, self.key = run, key

    def write(self, folder: Path) -> None:
        self.run.write(folder, self.key)


def private_copy(llm: LLM, dtype: str = "fp32") -> LLM:
    """``llm`` with weights of its own, in ``dtype``, gradients on, evaluation mode; tied weights stay tied.

    One tensor at a time; pages of a weight file that only the copying read are given back, so
    that the resident memory grows by the copy alone.
    """
    with without_adapter(llm).lock:
        pages = mapped_pages(llm.model.parameters())
        double: dict[int, torch.Tensor] = {}
        for p in llm.model.parameters():
            value = p.detach().to(DTYPES[dtype], copy=True, memory_format=torch.contiguous_format)
            double[id(p)] = torch.nn.Parameter(value, requires_grad=value.is_floating_point())
            drop(pages.get(id(p), ()))
        model = copy.deepcopy(llm.model, double)
    # else the embedding of the token that also pads (SmolLM2: the end of a turn) would get no gradient;
    # padding itself gets none anyway, because nothing looks at it
    model.get_input_embeddings().padding_idx = None
    return replace(llm, model=model.eval(), dtype=dtype, lock=threading.RLock())


def with_weights(llm: LLM, weights: Mapping[str, torch.Tensor]) -> LLM:
    """An LLM that answers with ``weights`` (as :func:`tune_full` gives them); ``llm`` is left as it was.

    The tensors are used as they are, not copied. Raises
    :class:`~pllm_helpers.runtime.InputError` if names or shapes are those of another model.
    """
    with without_adapter(llm).lock:
        own = dict(llm.model.named_parameters())
        wrong = own.keys() ^ weights.keys() or [k for k, p in own.items() if p.shape != weights[k].shape]
        if wrong:
            raise InputError("weights", f"expected the weights of {llm.name}, got a misfit at {sorted(wrong)[0]}")
        memo = {id(p): torch.nn.Parameter(weights[k].detach(), requires_grad=False) for k, p in own.items()}
        model = copy.deepcopy(llm.model, memo)
    kind = next(iter(weights.values())).dtype
    dtype = next((name for name, d in DTYPES.items() if d == kind), llm.dtype)
    return replace(llm, model=model.eval(), dtype=dtype, lock=threading.RLock())


def weight_settings(llm: LLM, given: dict[str, Any]) -> dict[str, Any]:
    """The settings that all tuners of weights share, in range, as JSON types."""
    if llm.kind != "causal":
        raise InputError("llm", f"expected a model that writes text, got {llm.name}, which fills gaps")
    without_adapter(llm)
    if given["decay"] not in ("linear", "cosine", "constant"):
        raise InputError("decay", f"expected 'linear', 'cosine' or 'constant', got {given['decay']!r}")
    if given["dtype"] not in DTYPES:
        raise InputError("dtype", f"expected 'fp32' or 'bf16', got {given['dtype']!r}")
    steps = whole("steps", given["steps"], 1)
    for name in ("evaluate_every", "checkpoint_every"):
        if given[name] is not None:
            whole(name, given[name], 1)
    return {
        "steps": steps,
        "lr": real("lr", given["lr"], 1e-12, 1000),
        "seed": whole("seed", given["seed"], 0),
        "batch_size": whole("batch_size", given["batch_size"], 1, 100_000),
        "accumulate": 1,
        "warmup": real("warmup", given["warmup"], 0, steps),
        "decay": given["decay"],
        "weight_decay": real("weight_decay", given["weight_decay"], 0, 10),
        "max_tokens": whole("max_tokens", given["max_tokens"], 8, 1 << 20),
        "dtype": given["dtype"],
        "checkpointing": bool(given["checkpointing"]),
        "evaluate_every": given["evaluate_every"],
    }


def tune_weights(
    llm: LLM,
    dialogues: Sequence[DialogueSet],
    settings: dict[str, Any],
    run_class: Callable[..., FullRun],
    given: dict[str, Any],
) -> TuningResult:
    """What all tuners of weights have in common: rows, folder, private copy, loop, result."""
    rows = token_rows(llm, dialogues, settings["max_tokens"])
    held_out, steps = given["held_out"], settings["steps"]
    held = token_rows(llm, held_out, settings["max_tokens"], what="held_out") if held_out is not None else None
    card: dict[str, Any] = {
        "base_model": llm.name,
        "base_dtype": llm.dtype,
        "base_fingerprint": fingerprint(llm.model),
        "settings": settings,
        "data_sha256": rows.hash,
        "held_out_sha256": held.hash if held else None,
    }
    key = hashlib.sha256(json.dumps(card, sort_keys=True).encode()).hexdigest()
    s = settings
    clip = s.get("clip_norm") or 0
    plan = Schedule(
        steps, s["lr"], s["batch_size"], s["accumulate"], s["warmup"], s["decay"], clip, s["weight_decay"], s["seed"]
    )
    watch = Watch(held.rows, given["evaluate_every"] or max(1, steps // 10), None) if held else None

    def go(folder: Path | None) -> TuningResult:
        with PeakMemory() as memory:
            double = private_copy(llm, s["dtype"])
            if s["checkpointing"]:
                checkpoint_blocks(decoder_layers(double))
            run = run_class(double, rows.rows, plan, settings)
            if folder:
                run.resume_from(folder, key)
            try:
                train(run, watch, memory, folder, key, given["checkpoint_every"], given["progress"], pause=60)
            finally:
                run.close()
        finished = card | {
            "shortened_questions": rows.shortened,
            "dialogues": len(rows.rows),
            "versions": {p: importlib.metadata.version(p) for p in ("torch", "transformers")},
            "measured": {
                "losses": run.losses,
                "held_out": run.held_out,
                "tokens": run.tokens,
                "seconds": run.seconds,
                "peak_mb": run.peak_mb,
                **run.measured(),
            },
        }
        weights = {k: p.detach() for k, p in run.parameters.items()}
        if not all_finite(weights.values()):
            raise InputError("lr", f"expected finite weights, got NaN or infinity after step {run.step}", LOWER)
        if run.ended:
            finished["ended_at"], folder = run.step, None  # the checkpoint stays; a finished run it is not
        if folder:
            write_weights(folder, weights, finished)
            (folder / STATE).unlink(missing_ok=True)
        return _result(folder, weights, finished)

    if given["out"] is None:
        return go(None)
    with own_folder(given["out"]) as folder:
        if given["resume"]:
            if (folder / CARD).is_file():
                return _finished(folder, card)
            if any((folder / name).exists() for name in (CHECKPOINT, WEIGHTS)):
                raise mixed(folder)
        else:
            for name in (CARD, MODEL, STATE):
                (folder / name).unlink(missing_ok=True)
        return go(folder)


def checkpoint_blocks(layers: Iterable[Any], pages: Mapping[int, Sequence[Range]] | None = None) -> None:
    """Make every block keep its input only and compute itself again on the way back.

    For blocks of a private copy or a twin: their ``forward`` is replaced. A block's graph is built
    and walked inside the backward pass and then freed, also when another pass will follow
    (torch's other kind of checkpointing keeps it). ``pages``: by ``id`` of the block, what to give
    back to the system after each use of it.
    """
    from torch.utils.checkpoint import checkpoint

    for layer in layers:
        mine = (pages or {}).get(id(layer), ())
        trained = any(p.requires_grad for p in layer.parameters())

        def again(
            x: Any,
            *args: Any,
            run: Any = layer.forward,
            mine: Sequence[Range] = mine,
            trained: bool = trained,
            **kwargs: Any,
        ) -> Any:
            if torch.is_grad_enabled() and (trained or x.requires_grad):
                if not x.requires_grad:  # else the weights of the first block would get no gradient
                    x = x.detach().requires_grad_(True)
                if mine:  # the gradient of x is there when the block's backward pass is over
                    x.register_hook(lambda _: drop(mine))

                def whole(x: Any) -> Any:
                    return run(x, *args, **kwargs)

                out = checkpoint(whole, x, use_reentrant=True, preserve_rng_state=False)
            else:
                out = run(x, *args, **kwargs)
            drop(mine)
            return out

        layer.forward = again


def mixed(folder: Path) -> InputError:
    return InputError(
        "out",
        f"expected an empty folder or the same run, {folder} holds one with other settings, data or base model",
        "Give another folder, or resume=False to start over.",
    )


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], head: Mapping[str, str]) -> None:
    """A safetensors file, whole or not at all, straight from the tensors' memory."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    with whole_file(path) as beside:
        try:
            save_file({k: v.contiguous() for k, v in tensors.items()}, beside, metadata=dict(head))
        except SafetensorError as e:
            raise OSError(str(e)) from e


def write_weights(folder: Path, weights: Mapping[str, torch.Tensor], card: dict[str, Any]) -> None:
    """Tuned weights and ``card.json``, which comes last and carries the weights' checksum."""
    write_tensors(folder / MODEL, weights, {"format": "pt"})
    card["weights_sha256"] = _hash(weights)
    write_whole(folder / CARD, json.dumps(card, indent=1).encode())


def _finished(folder: Path, card: dict[str, Any]) -> TuningResult:
    done = load_weights(folder)
    if any(done.card.get(k) != json.loads(json.dumps(v)) for k, v in card.items()):
        raise mixed(folder)
    return done


def load_weights(folder: Path) -> TuningResult:
    """The finished run in ``folder``, its weights memory-mapped.

    Raises :class:`~pllm_helpers.runtime.InputError` if there is none or if it is damaged.
    """
    from safetensors.torch import load_file

    try:
        card = json.loads((folder / CARD).read_text(encoding="utf-8"))
        if "weights_sha256" not in card:
            raise mixed(folder)
        weights = load_file(folder / MODEL)
        if _hash(weights) != card["weights_sha256"]:
            raise ValueError("its checksum differs")
        return _result(folder, weights, card)
    except InputError:
        raise
    except Exception as e:  # safetensors raises its own kinds
        raise InputError(
            "weights", f"expected {MODEL} and {CARD} of a finished run in {folder}, got: {e}", "Train it again."
        ) from e


def _result(folder: Path | None, weights: dict[str, torch.Tensor], card: dict[str, Any]) -> TuningResult:
    measured = card["measured"]
    held = [(int(s), float(x)) for s, x in measured["held_out"]]
    return TuningResult(
        [float(x) for x in measured["losses"]],
        float(measured["seconds"]),
        float(measured["peak_mb"]),
        int(measured["tokens"]),
        None,
        held,
        card,
        {},
        {},
        weights=weights,
        weights_path=folder,
    )


def _hash(tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 of names and bytes, in the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        flat = tensors[name].detach().cpu().contiguous().view(-1).view(torch.uint8)
        digest.update(memoryview(flat.numpy()))
    return digest.hexdigest()


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as f:
        yield f
