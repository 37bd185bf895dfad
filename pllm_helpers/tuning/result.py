"""What a training run gives back."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..runtime import InputError, write_whole
from .adapters import CARD, WEIGHTS, read_adapter, write_adapter
from .replay import REPLAY, ReplayLog, read_log

__all__ = ["TuningResult", "load_result"]


@dataclass(frozen=True)
class TuningResult:
    """Losses, cost and adapter of one training run.

    Attributes
    ----------
    losses : one per step, mean over the answer tokens of the step's batch, nats per token.
    seconds : wall-clock time of the training loop, over all sittings of a resumed run.
    peak_mb : largest private memory of the process during training beyond what it had before,
        sampled every 5 ms; adapter, optimiser, activations; not the memory-mapped weights.
    tokens : tokens of the dialogues trained on, padding not counted, repeats counted.
    adapter_path : folder with ``adapter_model.safetensors``, ``adapter_config.json`` and
        ``card.json``; ``None`` for a run without ``out``.
    held_out : ``(step, NLL per token)`` of the held-out dialogues, step 0 is the base model.
    card : data hash, seed, base model, settings, versions; no text of the dialogues.
    adapter, config : the adapter's tensors and peft configuration; empty for a run over all weights.
    weights : all weights after a run over all of them, by parameter name; else empty.
    weights_path : folder with ``model.safetensors`` and ``card.json`` of such a run, if ``out`` was given.
    replay_log, log : of a zeroth-order run, the file from which :func:`replay` rebuilds the result, and what it holds.
    """

    losses: list[float]
    seconds: float
    peak_mb: float
    tokens: int
    adapter_path: Path | None
    held_out: list[tuple[int, float]]
    card: dict[str, Any]
    adapter: dict[str, torch.Tensor] = field(repr=False)
    config: dict[str, Any] = field(repr=False)
    weights: dict[str, torch.Tensor] = field(default_factory=dict, repr=False)
    weights_path: Path | None = None
    replay_log: Path | None = None
    log: ReplayLog | None = field(default=None, repr=False)

    @property
    def tokens_per_second(self) -> float:
        """Tokens of the dialogues per second of training."""
        return self.tokens / self.seconds if self.seconds else 0.0

    @property
    def parameters(self) -> int:
        """Number of trained weights."""
        return sum(v.numel() for v in (self.adapter or self.weights).values()) or self.card.get("trained", 0)

    def save(self, folder: str | Path) -> Path:
        """Write card and what was trained to ``folder``: an adapter (plain peft reads it, too), a log, or weights."""
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        if self.log is not None:
            write_whole(path / REPLAY, self.log.to_bytes())
        if self.adapter:
            write_adapter(path, self.adapter, self.config, dict(self.card))
        elif self.log is not None:
            write_whole(path / CARD, json.dumps(self.card, indent=1))
        else:
            from .full import write_weights

            write_weights(path, self.weights, dict(self.card))
        return path


def load_result(folder: str | Path) -> TuningResult:
    """The result that a tuner wrote to ``folder``.

    A full-parameter run of :func:`tune_mezo` comes with its log, not with weights:
    :func:`~pllm_helpers.tuning.replay` rebuilds them. Raises
    :class:`~pllm_helpers.runtime.InputError` if the folder holds no finished run.
    """
    path = Path(folder)
    log = read_log(path) if (path / REPLAY).is_file() else None
    state, config, card = {}, {}, {}
    if (path / WEIGHTS).is_file() or not (path / CARD).is_file():
        state, config, card = read_adapter(path)
    elif log is None:
        from .full import load_weights

        return load_weights(path)
    try:
        card = card or json.loads((path / CARD).read_text(encoding="utf-8"))
        measured = card["measured"]
        held = [(int(s), float(x)) for s, x in measured["held_out"]]
        return TuningResult(
            [float(x) for x in measured["losses"]],
            float(measured["seconds"]),
            float(measured["peak_mb"]),
            int(measured["tokens"]),
            path if state else None,
            held,
            card,
            state,
            config,
            replay_log=path / REPLAY if log else None,
            log=log,
        )
    except (KeyError, TypeError, ValueError) as e:
        raise InputError("adapter", f"expected card.json of a finished run in {path}, got none or another") from e
