"""What a training run gives back."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..runtime import InputError
from .adapters import read_adapter, write_adapter

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
    adapter, config : the adapter's tensors and peft configuration.
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

    @property
    def tokens_per_second(self) -> float:
        """Tokens of the dialogues per second of training."""
        return self.tokens / self.seconds if self.seconds else 0.0

    @property
    def parameters(self) -> int:
        """Number of trained weights."""
        return sum(v.numel() for v in self.adapter.values())

    def save(self, folder: str | Path) -> Path:
        """Write the adapter and its card to ``folder``; plain peft reads it too."""
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        write_adapter(path, self.adapter, self.config, dict(self.card))
        return path


def load_result(folder: str | Path) -> TuningResult:
    """The result that :func:`tune_lora` wrote to ``folder``.

    Raises :class:`~pllm_helpers.runtime.InputError` if the folder holds no finished run.
    """
    path = Path(folder)
    state, config, card = read_adapter(path)
    try:
        measured = card["measured"]
        held = [(int(s), float(x)) for s, x in measured["held_out"]]
        return TuningResult(
            [float(x) for x in measured["losses"]],
            float(measured["seconds"]),
            float(measured["peak_mb"]),
            int(measured["tokens"]),
            path,
            held,
            card,
            state,
            config,
        )
    except (KeyError, TypeError, ValueError) as e:
        raise InputError("adapter", f"expected card.json of a finished run in {path}, got none or another") from e
