"""MeZO (Malladi et al. 2023), the method of PocketLLM: fine-tuning from two forward passes a step, without gradients.

A step draws noise ``z`` from a seed, measures the loss at ``θ + εz`` and at ``θ - εz``, and
moves by ``-lr g z`` with the slope ``g`` between them. Memory is that of inference; the price is
paid in steps, because one number per step says little about a gradient of millions.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..dialogue import DialogueSet
from ..models.generation import progress_bar
from ..models.weights import DTYPES
from ..runtime import InputError, write_whole
from .adapters import CARD, CONFIG, WEIGHTS, adapter_state, plain_config, without_adapter, write_adapter
from .checkpoint import own_folder
from .data import Row, batch_stream, token_rows
from .full import mixed, write_tensors
from .loop import Progress, Watch
from .lora import chosen_layers, chosen_modules, real, whole
from .memory import PeakMemory
from .packed import is_packable, packed_objective
from .perturb import ESTIMATORS, NOISES, all_finite, sweep_
from .replay import REPLAY, LogWriter, Recipe, ReplayLog, base_hash, header_of, read_log, start_of, weights_hash
from .result import TuningResult, load_result

if TYPE_CHECKING:
    from ..models import LLM

__all__ = ["answer_loss", "tune_mezo"]

Number = float | int
SNAPSHOT, LOOKS = "snapshot.safetensors", "looks.json"
WINDOW = 8  # steps over which a loss must have risen to count as diverged


def tune_mezo(
    llm: LLM,
    dialogues: Sequence[DialogueSet],
    *,
    steps: int,
    lr: Number,
    seed: int = 0,
    out: str | Path | None = None,
    epsilon: Number = 1e-3,
    noise: str = "gaussian",
    directions: int = 1,
    estimator: str = "two_sided",
    normalize: bool = False,
    parameters: str = "full",
    rank: int = 8,
    alpha: Number = 16,
    modules: Sequence[str] = ("q_proj", "v_proj"),
    layers: str | int | Sequence[int] = "all",
    together: bool = False,
    dtype: str | None = None,
    rounding: str = "stochastic",
    batch_size: int = 8,
    max_tokens: int = 512,
    weight_decay: Number = 0.0,
    held_out: Sequence[DialogueSet] | None = None,
    evaluate_every: int | None = None,
    checkpoint_every: int | None = None,
    resume: bool = True,
    progress: Progress = None,
) -> TuningResult:
    """Tune ``llm`` on ``dialogues`` with forward passes only (MeZO, algorithm 1), in place.

    The loss is that of :func:`~pllm_helpers.tuning.tune_lora`: mean NLL of the answers' tokens,
    logits at answer positions only. ``.losses`` are the mean of ``L(θ + εz)`` and ``L(θ - εz)``
    (the official code reports the first), or ``L(θ)`` with ``estimator="one_sided"``. ``llm`` is
    left as it was; use :func:`~pllm_helpers.tuning.adapted` or :func:`replay` to talk to the result.

    Parameters
    ----------
    steps, lr : number of updates, learning rate (constant). MeZO takes about 100 times the steps of
        a derivative-based run; for all weights try 1e-7 to 1e-5, inside LoRA 1e-4 to 1e-2.
    seed : decides noise, adapter start and batches.
    out : folder for the log (``replay.log``, 12 bytes a step), card and, with LoRA, the adapter. A
        run that was killed goes on bit for bit: the log rebuilds the weights. ``None`` keeps all in memory.
    epsilon : how far the loss is probed.
    noise : ``"gaussian"``, or ``"rademacher"`` (signs: a tenth of the time to draw, the same bits on
        every machine, and with ``epsilon`` a power of two nearly no rounding in bf16).
    directions : probes per step; their estimates are averaged.
    estimator : ``"two_sided"`` (2 forward passes per direction) or ``"one_sided"`` (1, and one for the
        step, as in FZOO): cheaper from two directions on, biased by O(epsilon).
    normalize : divide the slopes by the standard deviation of the step's losses over ``epsilon``
        (FZOO's adaptive step): ``lr`` then is the length of a step along a direction.
    parameters : ``"full"`` tunes a private copy of all weights (4 bytes each in fp32, 2 in bf16);
        ``"lora"`` tunes an fp32 adapter on the shared weights.
    rank, alpha, modules, layers : of the adapter, as in :func:`~pllm_helpers.tuning.tune_lora`.
    together : with LoRA, measure all probes of a step in one forward pass: layers below the first
        adapted one run once for all. Not in place, since an adapter is small; needs a Llama or Qwen2.
    dtype : of the private copy, ``"fp32"`` (default) or ``"bf16"``. An adapter is always fp32.
    rounding : of updates in bf16, ``"stochastic"`` or ``"nearest"``. An update below 1/512 of a weight
        is lost by the second and kept on average by the first.
    batch_size, max_tokens, held_out, evaluate_every, resume, progress : as in :func:`~pllm_helpers.tuning.tune_lora`.
    weight_decay : decoupled; norms and biases are spared.
    checkpoint_every : steps between snapshots of the weights in ``out``; ``None``: none, a resumed run
        replays its log instead (a fraction of the time of training).

    Raises :class:`~pllm_helpers.runtime.InputError` on settings out of range, blank dialogues, losses
    that are not finite or that diverge, an ``epsilon`` too small to change the loss, a damaged log,
    and an ``out`` that holds another run.
    """
    settings = _checked(llm, locals())
    rows = token_rows(llm, dialogues, max_tokens)
    held = token_rows(llm, held_out, max_tokens, what="held_out") if held_out is not None else None
    card: dict[str, Any] = {
        "base_model": llm.name,
        "base_dtype": llm.dtype,
        "base_hash": base_hash(llm),
        "settings": settings,
        "data_sha256": rows.hash,
        "held_out_sha256": held.hash if held else None,
    }
    recipe = Recipe(
        seed,
        float(lr),
        float(epsilon),
        noise,
        directions,
        estimator,
        float(weight_decay),
        settings["dtype"] == "bf16" and rounding == "stochastic",
        not together,
    )
    header = header_of(
        recipe,
        key=hashlib.sha256(json.dumps(card, sort_keys=True).encode()).hexdigest(),
        model=llm.name,
        base=card["base_hash"],
        base_dtype=llm.dtype,
        parameters=parameters,
        dtype=settings["dtype"],
        lora=settings["lora"],
    )
    watch = Watch(held.rows, evaluate_every or max(1, steps // 10), None) if held else None

    def go(folder: Path | None) -> TuningResult:
        return _tune(llm, rows, watch, settings, card, header, folder, checkpoint_every, progress)

    if out is None:
        return go(None)
    with own_folder(out) as folder:
        if resume and (folder / CARD).is_file():
            return _finished(folder, card)
        if not resume:
            for name in (CARD, REPLAY, SNAPSHOT, LOOKS, WEIGHTS, CONFIG):
                (folder / name).unlink(missing_ok=True)
        return go(folder)


class MezoRun:
    """One run of zeroth-order steps on ``parameters``, which are walked in place.

    ``loss(rows)`` gives the mean NLL per answer token as a float; ``probe``, if given, measures
    all places of a step at once instead of walking there.
    """

    def __init__(
        self,
        parameters: Sequence[torch.Tensor],
        loss: Callable[[Sequence[Row]], float],
        recipe: Recipe,
        log: LogWriter,
        *,
        normalize: bool = False,
        probe: Callable[[Sequence[Row], int], list[float]] | None = None,
    ):
        self.parameters, self.loss, self.recipe, self.log = parameters, loss, recipe, log
        self.normalize, self.probe = normalize, probe

    @property
    def step(self) -> int:
        return len(self.log.losses)

    def losses_at(self, rows: Sequence[Row]) -> list[float]:
        """The loss at every place that the step asks for; leaves the weights at the last one."""
        if self.probe:
            return self.probe(rows, self.step)
        found = []
        for move in self.recipe.walk(self.step):
            if move:
                sweep_(self.parameters, [move], self.recipe.noise)
            found.append(self.loss(rows))
        return found

    def one_step(self, rows: Sequence[Row]) -> float:
        """One update from one batch; the loss that counts for the curve."""
        found = self.losses_at(rows)
        if not all(map(math.isfinite, found)):
            raise self._stop(f"expected finite losses, got {found}")
        scalars = self.recipe.scalars(found, self.normalize)
        if not all(map(math.isfinite, scalars)):
            raise self._stop(f"expected slopes that fp32 can hold, got {scalars}")
        if self.step == 0 and not any(scalars):
            raise InputError(
                "epsilon",
                f"expected probes that change the loss, got the same loss at ±{self.recipe.epsilon:g}",
                "Raise epsilon: it is lost in rounding.",
            )
        value = float(np.mean(found)) if self.recipe.estimator == "two_sided" else found[0]
        last = [*self.log.losses[-WINDOW + 1 :], value]
        first = (self.log.losses or [value])[0]
        if self.step >= WINDOW and np.mean(last) > 1.5 * first + 2:
            raise self._stop(f"expected losses that fall, the first was {first:.2f}, the last {WINDOW} {last[-1]:.2f}")
        sweep_(self.parameters, [self.recipe.update(self.step, scalars)], self.recipe.noise)
        self.log.append(value, scalars)
        return self.log.losses[-1]

    def _stop(self, expected: str) -> InputError:
        recipe = self.recipe
        what = "lr" if self.step else "epsilon"
        remedy = f"Lower lr (now {recipe.lr:g})" if self.step else f"Lower epsilon (now {recipe.epsilon:g})"
        return InputError(what, f"{expected} at step {self.step + 1}", f"{remedy}, or look for odd dialogues.")


def _tune(
    llm: LLM,
    rows: Any,
    watch: Watch | None,
    settings: dict[str, Any],
    card: dict[str, Any],
    header: dict[str, Any],
    folder: Path | None,
    every: int | None,
    progress: Progress,
) -> TuningResult:
    with PeakMemory() as memory:
        known = _known_log(folder, header)
        start = start_of(llm, header)
        tensors = list(start.parameters.values())
        measure = AnswerLoss(start.llm)
        log = LogWriter(header, folder / REPLAY if folder else None)
        recipe: Recipe = known.recipe if known else Recipe(**header["recipe"])
        if known:
            done = _snapshot(folder, header["key"], start.parameters, known.steps)
            recipe.replay_(tensors, known.scalars[done:], done)
        probe = None
        if settings["together"]:
            from .directions import joint_probe

            probe = joint_probe(start.llm.model, start.parameters, recipe)
        run = MezoRun(tensors, measure.mean, recipe, log, normalize=settings["normalize"], probe=probe)
        looks = Looks(watch, measure, settings["batch_size"], folder)
        log.start(known)
        try:
            for _ in _steps(run, rows.rows, settings, looks, memory, progress):
                if folder and every and run.step % every == 0:
                    _write_snapshot(folder, header["key"], start.parameters, run.step)
        finally:
            log.close()
            looks.save(run.step)
            if folder and not run.step:  # nothing to go on from: the folder is free again
                (folder / REPLAY).unlink()
                (folder / LOOKS).unlink()
    tuned = {k: p.detach() for k, p in start.parameters.items()}
    if not all_finite(tuned.values()):
        raise InputError("lr", f"expected finite weights, got NaN or infinity after step {run.step}", "Lower lr.")
    lengths, size = [len(r.ids) for r in rows.rows], settings["batch_size"]
    batches = batch_stream(lengths, size, settings["seed"])
    card = card | {
        "shortened_questions": rows.shortened,
        "dialogues": len(rows.rows),
        "trained": sum(p.numel() for p in tuned.values()),
        "tuned_hash": weights_hash(tuned),
        "versions": {p: importlib.metadata.version(p) for p in ("torch", "transformers", "peft")},
        "measured": {
            "losses": log.losses,
            "held_out": looks.found,
            "tokens": sum(lengths[i] for _ in range(run.step) for i in next(batches)),
            "seconds": looks.seconds,
            "peak_mb": looks.peak_mb,
        },
    }
    if run.step < settings["steps"]:  # ended by the caller
        card["ended_at"], folder = run.step, None  # the log stays; a finished run it is not
    state, config = {}, {}
    if start.adapter is not None:
        state = adapter_state(start.adapter)
        config = plain_config(start.adapter.peft_config["default"]) | {"inference_mode": True}
    result = TuningResult(
        log.losses,
        looks.seconds,
        looks.peak_mb,
        card["measured"]["tokens"],
        folder if state else None,
        looks.found,
        card,
        state,
        config,
        weights={} if state else tuned,
        replay_log=folder / REPLAY if folder else None,
        log=log.log,
    )
    if folder:
        if state:
            write_adapter(folder, state, config, card)
        else:
            write_whole(folder / CARD, json.dumps(card, indent=1))
        for name in (SNAPSHOT, LOOKS):
            (folder / name).unlink(missing_ok=True)
    return result


class AnswerLoss:
    """NLL of answers without gradients: on our own packed blocks where they fit, else on those of transformers."""

    def __init__(self, llm: LLM):
        from .forward import plain_objective

        model = llm.model
        self.objective = (
            packed_objective(model) if is_packable(model) else plain_objective(model, llm.tokenizer.pad_token_id or 0)
        )

    @torch.no_grad()
    def mean(self, rows: Sequence[Row]) -> float:
        """Mean over all answer tokens of the batch, as a derivative-based step has it."""
        return self.objective(rows).double().sum().item() / sum(r.answer for r in rows)

    @torch.no_grad()
    def per_dialogue(self, rows: Sequence[Row]) -> list[float]:
        """Mean over the answer tokens of each dialogue."""
        return [x / r.answer for x, r in zip(self.objective(rows).tolist(), rows, strict=True)]


def answer_loss(llm: LLM, dialogues: Sequence[DialogueSet], max_tokens: int = 512) -> Callable[[], float]:
    """The loss of all tuners as a function of nothing: walk the weights of ``llm.model`` and call it again.

    Mean NLL of the answers' tokens, all ``dialogues`` in one batch, without gradients.
    """
    rows, measure = token_rows(llm, dialogues, max_tokens).rows, AnswerLoss(llm)
    return lambda: measure.mean(rows)


class Looks:
    """Held-out losses and clock of a run; in ``out`` beside the log, so that a resumed run has them too."""

    def __init__(self, watch: Watch | None, measure: AnswerLoss, batch_size: int, folder: Path | None):
        self.watch, self.measure, self.size, self.folder = watch, measure, batch_size, folder
        self.found: list[tuple[int, float]] = []
        self.seconds = self.peak_mb = 0.0
        if folder and (folder / LOOKS).is_file():
            saved = json.loads((folder / LOOKS).read_text(encoding="utf-8"))
            self.found = [(int(s), float(x)) for s, x in saved["held_out"]]
            self.seconds, self.peak_mb = saved["seconds"], saved["peak_mb"]

    def due(self, step: int, steps: int) -> bool:
        watch = self.watch
        return bool(watch) and (step % watch.every == 0 or step == steps) and step not in {s for s, _ in self.found}

    def look(self, step: int) -> None:
        assert self.watch
        rows, total = sorted(self.watch.rows, key=lambda r: len(r.ids)), 0.0
        for k in range(0, len(rows), self.size):
            total += sum(self.measure.per_dialogue(rows[k : k + self.size]))
        value = total / len(rows)
        if not math.isfinite(value):
            raise InputError("held_out", f"expected finite losses, got {value} at step {step}", "Lower lr.")
        self.found.append((step, value))
        self.save(step)

    def save(self, step: int) -> None:
        if self.folder:
            kept = [x for x in self.found if x[0] <= step]
            state = {"held_out": kept, "seconds": self.seconds, "peak_mb": self.peak_mb}
            write_whole(self.folder / LOOKS, json.dumps(state))


def _steps(
    run: MezoRun, rows: Sequence[Row], settings: dict[str, Any], looks: Looks, memory: PeakMemory, progress: Progress
) -> Iterator[None]:
    """Train to the end, or until ``progress`` returns ``False``; yields after every step."""
    steps, size = settings["steps"], settings["batch_size"]
    stream = batch_stream([len(r.ids) for r in rows], size, settings["seed"], run.step)
    tokens, before = 0, looks.seconds
    looks.found = [x for x in looks.found if x[0] <= run.step]
    with progress_bar(steps, "training", False if callable(progress) else progress) as bar:
        bar.update(run.step)
        start = time.perf_counter()
        if looks.due(run.step, steps):
            looks.look(run.step)
        while run.step < steps:
            batch = [rows[i] for i in next(stream)]
            loss = run.one_step(batch)
            tokens += sum(len(r.ids) for r in batch)
            if looks.due(run.step, steps):
                looks.look(run.step)
            looks.seconds = before + time.perf_counter() - start
            looks.peak_mb = max(looks.peak_mb, memory.mb)
            held = f", held-out {looks.found[-1][1]:.3f}" if looks.found else ""
            rate = tokens / max(looks.seconds - before, 1e-9)
            bar.set_postfix_str(f"loss {loss:.3f}{held}, {rate:.0f} tokens/s", refresh=False)
            bar.update()
            ended = callable(progress) and progress(run.step, loss, looks.seconds) is False
            yield
            if ended:
                return


def _known_log(folder: Path | None, header: dict[str, Any]) -> ReplayLog | None:
    """What an earlier sitting has left in ``folder``, if it is the same run."""
    if folder is None:
        return None
    if not (folder / REPLAY).is_file():
        if any(folder.glob("*.safetensors")):
            raise mixed(folder)
        return None
    log = read_log(folder / REPLAY)
    if log.header != json.loads(json.dumps(header)):
        raise mixed(folder)
    return log


def _finished(folder: Path, card: dict[str, Any]) -> TuningResult:
    done = load_result(folder)
    if done.log is None or any(done.card.get(k) != json.loads(json.dumps(v)) for k, v in card.items()):
        raise mixed(folder)
    return done


def _write_snapshot(folder: Path, key: str, parameters: dict[str, torch.Tensor], step: int) -> None:
    tensors = {k: p.detach() for k, p in parameters.items()}
    write_tensors(folder / SNAPSHOT, tensors, {"key": key, "step": str(step), "hash": weights_hash(tensors)})


def _snapshot(folder: Path | None, key: str, parameters: dict[str, torch.Tensor], steps: int) -> int:
    """Load the snapshot in ``folder`` into ``parameters``; the step it was taken after.

    0 if there is none or if it is of no use; the weights then are as they were, because a
    snapshot only saves time.
    """
    if folder is None or not (folder / SNAPSHOT).is_file():
        return 0
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(folder / SNAPSHOT, framework="pt") as f:
            head = f.metadata()
            if head["key"] != key or not 0 < int(head["step"]) <= steps:
                return 0
            if weights_hash({k: f.get_tensor(k) for k in parameters}) != head["hash"]:
                return 0
            for name, p in parameters.items():
                p.data.copy_(f.get_tensor(name))
            return int(head["step"])
    except (OSError, SafetensorError, KeyError, ValueError, TypeError):
        return 0


def _checked(llm: LLM, given: dict[str, Any]) -> dict[str, Any]:
    """The settings that decide the result, in range, as JSON types."""
    if llm.kind != "causal":
        raise InputError("llm", f"expected a model that writes text, got {llm.name}, which fills gaps")
    without_adapter(llm)
    for name, names in (
        ("noise", NOISES),
        ("estimator", ESTIMATORS),
        ("parameters", ("full", "lora")),
        ("rounding", ("stochastic", "nearest")),
    ):
        if given[name] not in names:
            raise InputError(name, f"expected {' or '.join(map(repr, names))}, got {given[name]!r}")
    full = given["parameters"] == "full"
    if given["dtype"] not in ((None, *DTYPES) if full else (None, "fp32")):
        known = "'fp32' or 'bf16'" if full else "None: an adapter is always fp32"
        raise InputError("dtype", f"expected {known}, got {given['dtype']!r}")
    lora = None
    if not full:
        layers, modules = chosen_layers(llm, given["layers"]), chosen_modules(llm, given["modules"])
        lora = {
            "rank": whole("rank", given["rank"], 1, 4096),
            "alpha": real("alpha", given["alpha"], 1e-6, 1e6),
            "modules": modules,
            "layers": layers,
        }
    if given["together"] and (full or not is_packable(llm.model)):
        raise InputError("together", "expected parameters='lora' on a Llama or Qwen2 model")
    directions = whole("directions", given["directions"], 1, 1000)
    if given["normalize"] and directions * (2 if given["estimator"] == "two_sided" else 1) < 2:
        raise InputError("normalize", "expected at least two directions with estimator='one_sided'")
    for name in ("evaluate_every", "checkpoint_every"):
        if given[name] is not None:
            whole(name, given[name], 1)
    return {
        "method": "mezo",
        "steps": whole("steps", given["steps"], 1),
        "lr": real("lr", given["lr"], 1e-15, 1000),
        "seed": whole("seed", given["seed"], 0),
        "epsilon": real("epsilon", given["epsilon"], 1e-12, 10),
        "noise": given["noise"],
        "directions": directions,
        "estimator": given["estimator"],
        "normalize": bool(given["normalize"]),
        "parameters": given["parameters"],
        "lora": lora,
        "together": bool(given["together"]),
        "dtype": given["dtype"] or "fp32",
        "rounding": given["rounding"],
        "batch_size": whole("batch_size", given["batch_size"], 1, 100_000),
        "max_tokens": whole("max_tokens", given["max_tokens"], 8, 1 << 20),
        "weight_decay": real("weight_decay", given["weight_decay"], 0, 10),
        "evaluate_every": given["evaluate_every"],
    }
