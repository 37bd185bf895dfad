"""The training loop: a step, a schedule, early stopping, checkpoints."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..models.generation import progress_bar
from ..runtime import InputError
from .checkpoint import Checkpoint
from .data import Row, batch_stream
from .memory import PeakMemory

Objective = Callable[[Sequence[Row]], torch.Tensor]  # rows -> summed NLL of each row's answer, (rows,), with a graph
# ``True`` or ``None``: a text bar always or for long runs; a function: called after each step
Progress = bool | Callable[[int, float, float], bool | None] | None


@dataclass(frozen=True)
class Schedule:
    """Steps, learning rate and what surrounds them."""

    steps: int
    lr: float | int
    batch_size: int
    accumulate: int
    warmup: float | int
    decay: str
    clip: float | int
    weight_decay: float | int
    seed: int

    @property
    def warmup_steps(self) -> int:
        """Steps of the rise: ``warmup`` itself, or that share of all steps if it is below 1."""
        return int(self.warmup) if self.warmup >= 1 else math.ceil(self.warmup * self.steps)

    def rate(self, step: int) -> float:
        """Learning rate of ``step`` (from 0): a straight rise, then the decay towards 0."""
        rise = self.warmup_steps
        if step < rise:
            return self.lr * (step + 1) / (rise + 1)
        share = (step - rise) / max(1, self.steps - rise)  # 0 at the first full step, below 1 at the last
        factor = {"constant": 1.0, "linear": 1 - share, "cosine": 0.5 * (1 + math.cos(math.pi * share))}[self.decay]
        return self.lr * factor


@dataclass
class Watch:
    """Held-out rows, and when to look at them and to stop."""

    rows: Sequence[Row]
    every: int
    patience: int | None


class Run:
    """One training run; :meth:`steps` advances it, :meth:`checkpoint` and :meth:`restore` save and load it."""

    def __init__(
        self, parameters: dict[str, torch.nn.Parameter], objective: Objective, rows: Sequence[Row], plan: Schedule
    ):
        self.parameters, self.objective, self.rows, self.plan = parameters, objective, rows, plan
        self.optimizer = torch.optim.AdamW(
            list(parameters.values()), lr=plan.lr, weight_decay=plan.weight_decay, fused=True
        )
        self.losses: list[float] = []
        self.held_out: list[tuple[int, float]] = []
        self.best: dict[str, torch.Tensor] = {}
        self.tokens, self.seconds, self.peak_mb = 0, 0.0, 0.0
        self.ended = False  # by the caller, before the last step

    @property
    def step(self) -> int:
        return len(self.losses)

    def one_step(self, batches: Sequence[Sequence[int]]) -> float:
        """One update from ``accumulate`` batches: the gradient of the mean over *all* their answer tokens.

        A mean of the batches' means would weigh a token of a short batch more than one of a long
        batch, so every batch's sum is divided by the tokens of all.
        """
        chosen = [[self.rows[i] for i in batch] for batch in batches]
        answers = sum(r.answer for batch in chosen for r in batch)
        total = 0.0
        for batch in chosen:
            loss = self.objective(batch).sum() / answers
            total += loss.item()
            if not math.isfinite(total):
                raise InputError(
                    "lr",
                    f"expected finite losses, got {total} at step {self.step + 1}",
                    "Lower lr, raise warmup, or look for odd dialogues. The last checkpoint, if any, is untouched.",
                )
            loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.parameters.values(), self.plan.clip or math.inf)
        if not torch.isfinite(norm):
            self.optimizer.zero_grad()
            raise InputError(
                "lr",
                f"expected finite gradients, got {norm.item()} at step {self.step + 1}",
                "Lower lr, raise warmup, or look for odd dialogues. The last checkpoint, if any, is untouched.",
            )
        for group in self.optimizer.param_groups:
            group["lr"] = self.plan.rate(self.step)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.losses.append(total)
        self.tokens += sum(len(r.ids) for batch in chosen for r in batch)
        return total

    def steps(self, watch: Watch | None, progress: Progress) -> Iterator[None]:
        """Train to the end or until early stopping; yields after every step, when the state is whole."""
        plan = self.plan
        stream = batch_stream([len(r.ids) for r in self.rows], plan.batch_size, plan.seed, self.step * plan.accumulate)
        with progress_bar(plan.steps, "training", False if callable(progress) else progress) as bar:
            bar.update(self.step)
            if watch and not self.held_out:
                self.look(watch)
            while self.step < plan.steps and not self.stopped(watch):
                start = time.perf_counter()
                loss = self.one_step([next(stream) for _ in range(plan.accumulate)])
                if watch and (self.step % watch.every == 0 or self.step == plan.steps):
                    self.look(watch)
                self.seconds += time.perf_counter() - start
                bar.set_postfix_str(self._line(loss), refresh=False)
                bar.update()
                if callable(progress) and progress(self.step, loss, self.seconds) is False:
                    self.ended = self.step < plan.steps
                yield
                if self.ended:
                    return

    def _line(self, loss: float) -> str:
        held = f", held-out {self.held_out[-1][1]:.3f}" if self.held_out else ""
        return f"loss {loss:.3f}{held}, {self.tokens / max(self.seconds, 1e-9):.0f} tokens/s"

    def look(self, watch: Watch) -> None:
        """Mean held-out NLL per token and dialogue, as ``response_nll`` has it; keeps the best adapter."""
        size, total = self.plan.batch_size, 0.0
        order = sorted(range(len(watch.rows)), key=lambda i: len(watch.rows[i].ids))
        with torch.no_grad():
            for start in range(0, len(order), size):
                part = [watch.rows[i] for i in order[start : start + size]]
                total += sum((x / r.answer) for x, r in zip(self.objective(part).tolist(), part, strict=True))
        value = total / len(watch.rows)
        if not math.isfinite(value):
            raise InputError("held_out", f"expected finite losses, got {value} at step {self.step}", "Lower lr.")
        if watch.patience is not None and value < min((x for _, x in self.held_out), default=math.inf):
            self.best = {k: p.detach().clone() for k, p in self.parameters.items()}
        self.held_out.append((self.step, value))

    def stopped(self, watch: Watch | None) -> bool:
        """Whether the last ``patience`` looks brought nothing better."""
        if not watch or watch.patience is None or not self.held_out:
            return False
        values = [x for _, x in self.held_out]
        return len(values) - 1 - values.index(min(values)) >= watch.patience

    @property
    def state(self) -> dict[str, torch.Tensor]:
        return {k: p.detach() for k, p in self.parameters.items()}

    def checkpoint(self, key: str) -> Checkpoint:
        tensors = {f"adapter/{k}": v for k, v in self.state.items()}
        tensors |= {f"best/{k}": v for k, v in self.best.items()}
        for name, p in self.parameters.items():
            moments = self.optimizer.state.get(p)
            if moments:
                tensors[f"first/{name}"], tensors[f"second/{name}"] = moments["exp_avg"], moments["exp_avg_sq"]
        progress: dict[str, Any] = {
            "losses": self.losses,
            "held_out": self.held_out,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "peak_mb": self.peak_mb,
        }
        return Checkpoint(key, {k: v.contiguous() for k, v in tensors.items()}, progress)

    def restore(self, saved: Checkpoint) -> None:
        progress = saved.progress
        self.losses = list(progress["losses"])
        self.held_out = [(int(s), x) for s, x in progress["held_out"]]
        self.tokens, self.seconds, self.peak_mb = progress["tokens"], progress["seconds"], progress["peak_mb"]
        for name, p in self.parameters.items():
            p.data.copy_(saved.tensors[f"adapter/{name}"])
            if f"best/{name}" in saved.tensors:
                self.best[name] = saved.tensors[f"best/{name}"].to(p.device)
            if f"first/{name}" in saved.tensors:
                self.optimizer.state[p] = {
                    "step": torch.tensor(float(self.step)),
                    "exp_avg": saved.tensors[f"first/{name}"].to(p.device),
                    "exp_avg_sq": saved.tensors[f"second/{name}"].to(p.device),
                }


def train(
    run: Run,
    watch: Watch | None,
    memory: PeakMemory,
    folder: Path | None,
    key: str,
    every: int | None,
    progress: Progress,
    pause: float | int = 20,
) -> None:
    """Drive ``run`` to its end and write checkpoints: every ``every`` steps or ``pause`` seconds, and when ended."""
    written = time.monotonic()
    for _ in run.steps(watch, progress):
        run.peak_mb = max(run.peak_mb, memory.mb)
        due = run.step % every == 0 if every else time.monotonic() - written > pause
        if folder is not None and (due or run.ended):
            run.checkpoint(key).write(folder)
            written = time.monotonic()
