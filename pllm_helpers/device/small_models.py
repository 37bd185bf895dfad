"""Small models trained from scratch on real text: long enough to rank shapes, or to see that it was not."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, SupportsIndex

import numpy as np
import torch
from jaxtyping import Float, Int

from ..models.generation import progress_bar
from ..runtime import InputError
from .architectures import Architecture, build

__all__ = ["END", "SmallRun", "small_tokenizer", "train_small"]

END = "<|end|>"


def small_tokenizer(texts: Sequence[str], vocab: SupportsIndex = 1024) -> Any:
    """A byte-level BPE tokenizer (of ``tokenizers``) learned from ``texts``; the same one for the same texts.

    ``vocab`` counts the 256 bytes and the end-of-text token. Raises
    :class:`~pllm_helpers.runtime.InputError` on too small a vocabulary or no text.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    size = vocab.__index__()
    if size < 257:
        raise InputError("vocab", f"expected at least 257 (256 bytes and the end of a text), got {size}")
    _texts("texts", texts)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=[END], initial_alphabet=alphabet, show_progress=False, min_frequency=2
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


@dataclass(frozen=True)
class SmallRun:
    """One small model's training.

    Attributes
    ----------
    architecture, seed, steps, lr : what was run.
    losses : shape ``(steps,)``, nats per token on each training batch.
    held_out : shape ``(windows,)``, nats per token on windows of text that was not trained on.
    curve : (step, mean held-out loss), from step 0 to the last.
    bits_per_byte : the held-out loss free of the tokenizer.
    tokens, seconds : training tokens, and wall time of training alone.
    model : the trained model, in evaluation mode.
    """

    architecture: Architecture
    seed: int
    steps: int
    lr: float
    losses: Float[np.ndarray, " steps"]
    held_out: Float[np.ndarray, " windows"]
    curve: tuple[tuple[int, float], ...]
    bits_per_byte: float
    tokens: int
    seconds: float
    model: Any = field(repr=False, compare=False)

    @property
    def loss(self) -> float:
        """Mean held-out loss at the end, nats per token."""
        return float(self.held_out.mean())

    @property
    def tokens_per_weight(self) -> float:
        """Training tokens per weight; compute-optimal training takes about 20 (Hoffmann et al. 2022)."""
        return self.tokens / self.architecture.parameters().total


def train_small(
    architecture: Architecture,
    texts: Sequence[str],
    steps: SupportsIndex,
    seed: SupportsIndex = 0,
    *,
    held_out: Sequence[str] | None = None,
    tokenizer: Any = None,
    lr: float | int = 2e-3,
    batch_size: SupportsIndex = 16,
    length: SupportsIndex = 64,
    weight_decay: float | int = 0.1,
    evaluations: SupportsIndex = 4,
    held_out_windows: SupportsIndex = 64,
    progress: bool | None = None,
) -> SmallRun:
    """Train a small model of this shape from scratch on real text; held-out loss beside training loss.

    AdamW (betas 0.9, 0.95), linear warm-up over a twentieth of the steps, cosine decay to a tenth,
    gradient norm clipped at 1; lr 2e-3 and weight decay 0.1 as MobileLLM (unverified). Weights,
    order and windows depend on ``seed`` alone; the held-out windows are the same for all seeds.

    Parameters
    ----------
    texts : what to train on, joined by an end-of-text token; batches are random windows of ``length`` tokens.
    held_out : texts for the held-out loss; ``None``: every tenth of ``texts``, which is then not trained on.
    tokenizer : from :func:`small_tokenizer`; ``None`` learns one of ``architecture.vocab`` tokens from
        the training texts.
    evaluations : how often the held-out loss is taken on the way, the end included.

    Raises :class:`~pllm_helpers.runtime.InputError` on too little text, a tokenizer with more tokens
    than the model, and a loss that is no longer finite.
    """
    count, number = _whole("steps", steps, 1), _whole("seed", seed, 0)
    rows, window = _whole("batch_size", batch_size, 1), _whole("length", length, 2)
    looks, most = _whole("evaluations", evaluations, 1), _whole("held_out_windows", held_out_windows, 2)
    if not 0 < lr < 1:
        raise InputError("lr", f"expected a number above 0 and below 1, got {lr}")
    train, test = _split(texts, held_out)
    tokenizer = tokenizer or small_tokenizer(train, architecture.vocab)
    if tokenizer.get_vocab_size() > architecture.vocab:
        raise InputError("tokenizer", f"expected at most {architecture.vocab} tokens, got {tokenizer.get_vocab_size()}")
    stream, aside = _ids(tokenizer, train), _ids(tokenizer, test)
    for name, ids in (("texts", stream), ("held_out", aside)):
        if len(ids) < 2 * window + 2:
            raise InputError(name, f"expected at least {2 * window + 2} tokens, got {len(ids)}", "Pass more text.")
    windows = _windows(aside, window, most)
    model = build(architecture, seed=number, positions=window).train()
    decayed = [p for p in model.parameters() if p.dim() > 1]
    plain = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}],
        lr=lr,
        betas=(0.9, 0.95),
    )
    draw = torch.Generator().manual_seed(number)
    data, losses, spent = torch.from_numpy(stream), np.zeros(count), 0.0
    stops = {round(count * k / looks) for k in range(1, looks + 1)}
    scores = _held_out(model, windows, rows)
    curve = [(0, float(scores.mean()))]
    with progress_bar(count, "training", progress) as bar:
        for step in range(count):
            began = time.perf_counter()
            for group in optimizer.param_groups:
                group["lr"] = lr * _schedule(step, count)
            starts = torch.randint(len(data) - window, (rows,), generator=draw)
            batch = torch.stack([data[s : s + window + 1] for s in starts])
            loss = _loss(model, batch).mean()
            losses[step] = loss.item()
            if not math.isfinite(losses[step]):
                raise InputError(
                    "lr", f"expected a loss that stays finite, got {losses[step]} at step {step}", "Lower lr."
                )
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            spent += time.perf_counter() - began
            bar.update(1)
            if step + 1 in stops:
                scores = _held_out(model, windows, rows)
                curve.append((step + 1, float(scores.mean())))
    size = sum(len(t.encode()) for t in test) + len(test)  # an end of text counts as one byte
    bits = float(scores.mean()) * len(aside) / size / math.log(2)
    tokens = count * rows * window
    model.eval()
    return SmallRun(architecture, number, count, float(lr), losses, scores, tuple(curve), bits, tokens, spent, model)


def _whole(what: str, value: SupportsIndex, least: int) -> int:
    if isinstance(value, bool) or value.__index__() < least:
        raise InputError(what, f"expected a whole number of at least {least}, got {value!r}")
    return value.__index__()


def _texts(name: str, texts: Sequence[str]) -> None:
    if isinstance(texts, str) or not texts or not all(isinstance(t, str) for t in texts):
        raise InputError(name, "expected a list of texts")


def _split(texts: Sequence[str], held_out: Sequence[str] | None) -> tuple[list[str], list[str]]:
    _texts("texts", texts)
    if held_out is None:
        if len(texts) < 10:
            raise InputError("texts", f"expected at least 10, of which every tenth is held out, got {len(texts)}")
        return [t for i, t in enumerate(texts) if i % 10 != 9], list(texts[9::10])
    _texts("held_out", held_out)
    both = set(texts) & set(held_out)
    if both:
        raise InputError("held_out", f"expected texts that are not trained on, {len(both)} are in both")
    return list(texts), list(held_out)


def _ids(tokenizer: Any, texts: Sequence[str]) -> Int[np.ndarray, " n"]:
    end = tokenizer.token_to_id(END)
    if end is None:
        raise InputError("tokenizer", f"expected the token {END}, it has none", "Make it with small_tokenizer.")
    return np.array([i for e in tokenizer.encode_batch(list(texts)) for i in (*e.ids, end)], dtype=np.int64)


def _windows(ids: Int[np.ndarray, " n"], length: int, most: int) -> torch.Tensor:
    """At most ``most`` windows that do not overlap, spread evenly; shape (windows, length + 1)."""
    starts = np.arange(0, len(ids) - length - 1, length + 1)
    if len(starts) > most:
        starts = starts[np.linspace(0, len(starts) - 1, most).round().astype(int)]
    return torch.from_numpy(np.stack([ids[s : s + length + 1] for s in starts]))


def _schedule(step: int, steps: int) -> float:
    warm = max(1, steps // 20)
    if step < warm:
        return (step + 1) / warm
    return 0.1 + 0.45 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def _loss(model: Any, batch: torch.Tensor) -> torch.Tensor:
    """Mean NLL per token of each row, nats; shape (rows,)."""
    logits = model(input_ids=batch[:, :-1], use_cache=False).logits.float()
    nll = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="none")
    return nll.view(len(batch), -1).mean(1)


@torch.no_grad()
def _held_out(model: Any, windows: torch.Tensor, rows: int) -> Float[np.ndarray, " windows"]:
    model.eval()
    found = torch.cat([_loss(model, part) for part in windows.split(rows)])
    model.train()
    return found.double().numpy()
