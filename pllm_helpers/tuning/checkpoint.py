"""State of a run in one file, whole or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..runtime import InputError, write_whole
from .adapters import CHECKPOINT

# names that whole_file gives, and that safetensors gives to what it renames at the end
HALF_WRITTEN = re.compile(r"\..+\.(safetensors|json|log)\.[a-z0-9_]{8}|\.tmp[A-Za-z0-9]{6}")


@contextlib.contextmanager
def own_folder(out: str | Path) -> Iterator[Path]:
    """The folder of a run, made if need be, for this process alone; what a killed run left half written goes.

    Raises :class:`~pllm_helpers.runtime.InputError` if another process trains in it, and for any
    error of the system inside the block: no room, no right to write.
    """
    import filelock

    folder = Path(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(str(folder / ".lock"), timeout=0):
            for path in folder.iterdir():
                if HALF_WRITTEN.fullmatch(path.name):
                    path.unlink()
            yield folder
    except filelock.Timeout as e:
        raise InputError("out", f"expected a folder of its own, another process trains in {folder}") from e
    except OSError as e:
        raise InputError(
            "out", f"expected a folder with room to write in, got: {e}", "Free space, or give another."
        ) from e


@dataclass
class Checkpoint:
    """Everything that the next step depends on.

    ``tensors``: adapter, optimiser moments and, with early stopping, the best adapter so far;
    ``progress``: JSON values (step, losses, tokens, held-out curve …). Batches are a function of
    seed and step, and training draws no other random numbers, so no generator state is needed.
    """

    key: str
    tensors: dict[str, torch.Tensor]
    progress: dict[str, Any]

    def write(self, folder: Path) -> None:
        from safetensors.torch import save

        body = save(self.tensors)
        head = {"key": self.key, "sha256": hashlib.sha256(body).hexdigest(), "progress": self.progress}
        text = json.dumps(head).encode()
        write_whole(folder / CHECKPOINT, len(text).to_bytes(8, "little") + text + body)


def read_checkpoint(folder: Path) -> Checkpoint | None:
    """The checkpoint in ``folder``, or ``None`` if there is none.

    Raises :class:`~pllm_helpers.runtime.InputError` if it is damaged.
    """
    from safetensors.torch import load

    path = folder / CHECKPOINT
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    try:
        size = int.from_bytes(data[:8], "little")
        head = json.loads(data[8 : 8 + size])
        body = data[8 + size :]
        if hashlib.sha256(body).hexdigest() != head["sha256"]:
            raise ValueError("its checksum differs")
        return Checkpoint(head["key"], load(body), head["progress"])
    except (ValueError, KeyError, TypeError, OverflowError, MemoryError) as e:
        raise InputError(
            "checkpoint",
            f"expected a whole {CHECKPOINT} in {folder}, got a damaged one",
            "Start over with resume=False or another out.",
        ) from e
