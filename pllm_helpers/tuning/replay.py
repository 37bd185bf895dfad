"""The whole of a zeroth-order run in a few bytes per step: seeds follow from one seed, scalars are kept.

The weights after step t are those before it, walked to the places where the loss was measured
and moved by ``-lr g z``. All of this is seeded, so the base model and the list of scalars rebuild
the tuned weights bit for bit: the same sums in the same order.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ..runtime import InputError, write_whole
from .perturb import Pass, derived_seed, sweep_

if TYPE_CHECKING:
    from ..models import LLM
    from .result import TuningResult

__all__ = ["Recipe", "ReplayLog", "read_log", "replay"]

REPLAY = "replay.log"
MAGIC = b"pllm-mezo-1\n"


@dataclass(frozen=True)
class Recipe:
    """What, with the scalars, decides the weights: how a step walks, and how it updates.

    ``stochastic``: round updates of bf16 weights stochastically. ``in_place``: the weights
    themselves walk to where the loss is measured, and back.
    """

    seed: int
    lr: float
    epsilon: float
    noise: str = "gaussian"
    directions: int = 1
    estimator: str = "two_sided"
    weight_decay: float = 0.0
    stochastic: bool = False
    in_place: bool = True

    def seeds(self, step: int) -> list[int]:
        """Seed of each direction's noise in ``step`` (from 0)."""
        return [derived_seed(self.seed, step, k) for k in range(self.directions)]

    def walk(self, step: int) -> list[Pass | None]:
        """The move before each measurement of the loss; ``None``: measure where you are.

        ``two_sided``: ``θ + εz₁, θ - εz₁, θ + εz₂, …``; ``one_sided``: ``θ, θ + εz₁, θ + εz₂, …``.
        Going back from one direction and out in the next is one walk.
        """
        e = self.epsilon
        moves: list[Pass | None] = [] if self.estimator == "two_sided" else [None]
        back: tuple[tuple[int, float], ...] = ()
        for s in self.seeds(step):
            moves.append(Pass((*back, (s, e))))
            if self.estimator == "two_sided":
                moves.append(Pass(((s, -2 * e),)))
                back = ((s, e),)
            else:
                back = ((s, -e),)
        return moves

    def scalars(self, losses: Sequence[float], normalize: bool = False) -> list[float]:
        """Slope along each direction from the losses that :meth:`walk` asked for, as fp32 numbers.

        ``normalize`` divides by the standard deviation of the losses over ``ε`` (FZOO's adaptive step).
        """
        e = self.epsilon
        if self.estimator == "two_sided":
            found = [(up - down) / (2 * e) for up, down in zip(losses[::2], losses[1::2], strict=True)]
        else:
            found = [(up - losses[0]) / e for up in losses[1:]]
        if normalize:
            spread = float(np.std(losses if self.estimator == "two_sided" else losses[1:])) / e
            found = [g / spread if spread else 0.0 for g in found]
        return [float(np.float32(g)) for g in found]

    def update(self, step: int, scalars: Sequence[float]) -> Pass:
        """Back to ``θ`` and on: ``θ ← θ - lr (mean of g z + weight_decay θ)``, in one walk.

        Without decay the way back and the step along the last direction are one sum. A step
        along each of n directions is n sums.
        """
        seeds = self.seeds(step)
        sign = 1 if self.estimator == "two_sided" else -1
        home = (seeds[-1], sign * self.epsilon)
        steps = tuple((s, -self.lr * g / self.directions) for s, g in zip(seeds, scalars, strict=True))
        dither = derived_seed(self.seed, step, self.directions) if self.stochastic else None
        keep = 1 - self.lr * self.weight_decay
        if not self.in_place or keep != 1.0:
            return Pass((home,) if self.in_place else (), keep, steps, dither)
        return Pass(((seeds[-1], home[1] + steps[-1][1]), *steps[:-1]), dither=dither)

    def passes(self, step: int, scalars: Sequence[float]) -> list[Pass]:
        """All that happens to the weights in ``step``."""
        moves = [p for p in self.walk(step) if p is not None] if self.in_place else []
        return [*moves, self.update(step, scalars)]

    def replay_(
        self, parameters: Sequence[Tensor], scalars: Float[np.ndarray, "steps directions"], first: int = 0
    ) -> None:
        """Do steps ``first``, ``first + 1``, … again: every sum of them, but no loss."""
        for step, row in enumerate(scalars.tolist(), first):
            sweep_(parameters, self.passes(step, row), self.noise)


@dataclass(frozen=True)
class ReplayLog:
    """A run as its log has it.

    Attributes
    ----------
    header : recipe, base model (name, hash, dtype), what was tuned, and a key of all settings.
    losses : ``(steps,)`` loss of each step, nats per answer token.
    scalars : ``(steps, directions)`` slopes g, one per seeded direction.
    torn : whether the last record was cut off (a kill or a power cut) and left out.
    """

    header: dict[str, Any]
    losses: Float[np.ndarray, " steps"]
    scalars: Float[np.ndarray, "steps directions"]
    torn: bool = False

    @property
    def recipe(self) -> Recipe:
        return Recipe(**self.header["recipe"])

    @property
    def steps(self) -> int:
        return len(self.losses)

    def pairs(self) -> Iterator[tuple[int, float]]:
        """(seed, scalar) of every direction of every step: with the base model, all there is to a run."""
        recipe = self.recipe
        for step, row in enumerate(self.scalars.tolist()):
            yield from zip(recipe.seeds(step), row, strict=True)

    def to_bytes(self) -> bytes:
        parts, crc = [], 0
        data, crc = _head(self.header)
        parts.append(data)
        for loss, row in zip(self.losses.tolist(), self.scalars.tolist(), strict=True):
            data, crc = _record(loss, row, crc)
            parts.append(data)
        return b"".join(parts)

    def first(self, steps: int) -> ReplayLog:
        """The same run, only its first ``steps`` steps."""
        return replace(self, losses=self.losses[:steps], scalars=self.scalars[:steps], torn=False)


def _head(header: Mapping[str, Any]) -> tuple[bytes, int]:
    text = json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
    crc = zlib.crc32(text)
    return MAGIC + len(text).to_bytes(4, "little") + text + crc.to_bytes(4, "little"), crc


def _record(loss: float, scalars: Sequence[float], crc: int) -> tuple[bytes, int]:
    """Loss and scalars as fp32 and the checksum of everything up to here: 8 + 4 bytes per direction."""
    data = np.array([loss, *scalars], "<f4").tobytes()
    crc = zlib.crc32(data, crc)
    return data + crc.to_bytes(4, "little"), crc


def read_log(source: str | Path | bytes) -> ReplayLog:
    """A log from a file, a folder of a run, or bytes; a record that a kill has cut off is left out.

    Raises :class:`~pllm_helpers.runtime.InputError` if there is none, or if anything but the end is damaged.
    """
    if isinstance(source, bytes):
        data, name = source, "the bytes given"
    else:
        path = Path(source)
        path, name = path / REPLAY if path.is_dir() else path, str(source)
        try:
            data = path.read_bytes()
        except OSError as e:
            raise InputError("log", f"expected {REPLAY} of a run, found none at {path}") from e

    def damaged(why: str) -> InputError:
        return InputError("log", f"expected a whole log in {name}, got {why}", "Copy it again, or train again.")

    start = len(MAGIC) + 4
    size = int.from_bytes(data[len(MAGIC) : start], "little")
    text, checksum = data[start : start + size], data[start + size : start + size + 4]
    if not data.startswith(MAGIC) or len(checksum) < 4 or zlib.crc32(text) != int.from_bytes(checksum, "little"):
        raise damaged("another file" if not MAGIC.startswith(data[: len(MAGIC)]) else "a damaged beginning")
    try:
        header = json.loads(text)
        width = 4 * (2 + Recipe(**header["recipe"]).directions)
    except (ValueError, KeyError, TypeError) as e:
        raise damaged(f"a header that this version cannot read ({e})") from e
    body, crc, rows, torn = data[start + size + 4 :], zlib.crc32(text), [], False
    for k in range(0, len(body), width):
        record = body[k : k + width]
        crc = zlib.crc32(record[:-4], crc)
        if len(record) < width or crc != int.from_bytes(record[-4:], "little"):
            if len(body) - k > width and any(body[k:]):  # zeros: what a power cut leaves of a file that grew
                raise damaged(f"a wrong checksum in step {len(rows) + 1} of {len(body) // width}")
            torn = True
            break
        rows.append(np.frombuffer(record[:-4], "<f4"))
    table = np.array(rows, np.float32).reshape(len(rows), width // 4 - 1)
    return ReplayLog(header, table[:, 0], table[:, 1:], torn)


@dataclass
class LogWriter:
    """Appends a record per step: to a file, where a kill costs at most the step in progress, or in memory."""

    header: dict[str, Any]
    path: Path | None = None
    losses: list[float] = field(default_factory=list)
    rows: list[list[float]] = field(default_factory=list)
    _file: Any = None
    _crc: int = 0

    def start(self, known: ReplayLog | None = None) -> None:
        """Begin, or go on behind ``known``; a torn end is cut off."""
        log = known or ReplayLog(self.header, np.zeros(0, np.float32), np.zeros((0, self._directions), np.float32))
        self.losses, self.rows = log.losses.tolist(), log.scalars.tolist()
        data = log.to_bytes()
        self._crc = int.from_bytes(data[-4:], "little")
        if self.path:
            if known is None or known.torn:
                write_whole(self.path, data)
            self._file = self.path.open("ab", buffering=0)

    @property
    def _directions(self) -> int:
        return self.header["recipe"]["directions"]

    def append(self, loss: float, scalars: Sequence[float]) -> None:
        data, crc = _record(loss, scalars, self._crc)
        if self._file and self._file.write(data) != len(data):
            raise OSError("the log could not be written: no room")
        self._crc = crc
        self.losses.append(float(np.float32(loss)))
        self.rows.append(list(scalars))

    def close(self) -> None:
        if self._file:
            os.fsync(self._file.fileno())
            self._file.close()
            self._file = None

    @property
    def log(self) -> ReplayLog:
        rows = np.array(self.rows, np.float32).reshape(len(self.rows), self._directions)
        return ReplayLog(self.header, np.array(self.losses, np.float32), rows)


def header_of(recipe: Recipe, **more: Any) -> dict[str, Any]:
    return {"recipe": asdict(recipe), **more}


def weights_hash(tensors: Mapping[str, Tensor]) -> str:
    """16 hex digits of the SHA-256 of every weight: name, shape, dtype and bytes."""
    digest = hashlib.sha256()
    for name, p in tensors.items():
        digest.update(repr((name, tuple(p.shape), str(p.dtype))).encode())
        flat = p.detach().to("cpu").contiguous().view(-1)
        digest.update(memoryview(flat.view(torch.uint8).numpy()))
    return digest.hexdigest()[:16]


def base_hash(llm: LLM) -> str:
    """:func:`weights_hash` of a model; pages of a weight file that only the hashing read are given back."""
    from .pages import drop, mapped_pages

    pages = mapped_pages(llm.model.parameters())
    digest = hashlib.sha256()
    for name, p in llm.model.named_parameters():
        digest.update(weights_hash({name: p}).encode())
        drop(pages.get(id(p), ()))
    return digest.hexdigest()[:16]


def replay(llm: LLM, log: ReplayLog | TuningResult | str | Path | bytes, *, steps: int | None = None) -> LLM:
    """The model that a zeroth-order run ended with, rebuilt from ``llm`` and the log: bit for bit.

    ``llm`` stays as it was; full-parameter runs give a model with weights of its own (4 or 2
    bytes each), runs inside LoRA one that shares the weights of ``llm``.

    Parameters
    ----------
    log : a :class:`ReplayLog`, a result of :func:`tune_mezo`, the file or its bytes, or the folder of a run.
    steps : stop after that many steps (default: all), to look into a run.

    Raises :class:`~pllm_helpers.runtime.InputError` if the log is damaged, was written for
    another base model or another dtype of it, or (for a result) leads to other weights.
    """
    from .result import TuningResult

    wanted = None
    if isinstance(log, TuningResult):
        if log.log is None:
            raise InputError("log", "expected the result of tune_mezo, got one without a log")
        log, wanted = log.log, log.card.get("tuned_hash")
    found = log if isinstance(log, ReplayLog) else read_log(log)
    if steps is not None:
        if not 0 <= steps <= found.steps:
            raise InputError("steps", f"expected 0 to {found.steps}, the length of the log, got {steps}")
        found = found.first(steps)
    check_base(llm, found)
    start = start_of(llm, found.header)
    found.recipe.replay_(list(start.parameters.values()), found.scalars)
    if wanted and steps is None and weights_hash(start.parameters) != wanted:
        raise InputError(
            "log",
            "expected to rebuild the weights that training ended with, got others",
            "Gaussian noise may differ in the last bit between kinds of processors: replay where it was trained.",
        )
    return start.llm


def check_base(llm: LLM, log: ReplayLog) -> None:
    """Raise :class:`~pllm_helpers.runtime.InputError` unless ``log`` belongs to ``llm``."""
    header = log.header
    if header["base_dtype"] != llm.dtype or header["base"] != base_hash(llm):
        raise InputError(
            "log",
            f"expected a log for {llm.name} in {llm.dtype}, got one for {header['model']} in "
            f"{header['base_dtype']} or with other weights",
            "Load the model and dtype that it was written for.",
        )


class Start(NamedTuple):
    """A model to tune, its parameters by name, and peft's model around it (``None`` for all weights)."""

    llm: LLM
    parameters: dict[str, Tensor]
    adapter: Any = None


def start_of(llm: LLM, header: Mapping[str, Any]) -> Start:
    """Where every run with this header begins; ``llm`` is left as it was."""
    from .adapters import attach
    from .full import private_copy

    if header["parameters"] == "full":
        tuned = private_copy(llm, header["dtype"])
        tuned.model.requires_grad_(False)
        return Start(tuned, dict(tuned.model.named_parameters()))
    model = attach(llm, lora_config(header["lora"]), header["recipe"]["seed"]).eval()
    chosen = {n: p for n, p in model.named_parameters() if p.requires_grad}
    model.requires_grad_(False)
    return Start(replace(llm, model=model.get_base_model(), lock=threading.RLock()), chosen, model)


def lora_config(settings: Mapping[str, Any]) -> Any:
    """peft's configuration for the adapter that a header describes."""
    from peft import LoraConfig

    return LoraConfig(
        r=settings["rank"],
        lora_alpha=settings["alpha"],
        target_modules=list(settings["modules"]),
        layers_to_transform=list(settings["layers"]),
        task_type="CAUSAL_LM",
    )
