"""The sentence encoder: token and sentence embeddings from one forward pass."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int

from ..runtime import InputError, go_offline
from .generation import progress_bar
from .weights import BUNDLED_ENCODER, bundled_encoder, fetch, quiet_transformers

__all__ = ["Encoder", "EncodedBatch", "TokenEmbeddings", "load_encoder"]


class EncodedBatch(NamedTuple):
    """One padded batch of a forward pass: ``b`` texts, ``n`` positions, ``d`` dimensions."""

    indices: Int[np.ndarray, " b"]  # places of these texts in the input
    vectors: Float[torch.Tensor, "b n d"]
    mask: Bool[torch.Tensor, "b n"]  # true at tokens; false at padding and special tokens
    sentence: Float[torch.Tensor, "b d"]  # as the encoder pools them
    ids: Int[torch.Tensor, "b n"]


@dataclass(frozen=True)
class TokenEmbeddings:
    """The tokens of one text without special tokens, their vectors, and the text's own vector."""

    tokens: list[str]
    vectors: Float[np.ndarray, "n d"]
    sentence: Float[np.ndarray, " d"]


@dataclass
class Encoder:
    """A sentence encoder (any ``sentence-transformers`` model).

    Attributes
    ----------
    model : the ``SentenceTransformer``.
    name : what :func:`load_encoder` was asked for.
    max_tokens : longer texts are cut here, special tokens counted in.
    """

    model: Any
    name: str
    max_tokens: int
    lock: Any = field(default_factory=threading.RLock, repr=False)  # a widget may encode while a cell does

    def __repr__(self) -> str:
        return f"Encoder({self.name}, {self.dim} dimensions, at most {self.max_tokens} tokens)"

    @property
    def dim(self) -> int:
        """Dimensions of token and sentence embeddings."""
        return int(self.model.get_embedding_dimension())

    @property
    def tokenizer(self) -> Any:
        return self.model.tokenizer

    @torch.inference_mode()
    def forward_batches(
        self, texts: Sequence[str], batch_size: int = 16, *, progress: bool | None = None
    ) -> Iterator[EncodedBatch]:
        """Run the encoder over ``texts``, shortest first, and hand out its padded batches.

        Sorting by length keeps padding small. Raises :class:`~pllm_helpers.runtime.InputError`
        if ``texts`` is one string or holds anything but text.
        """
        if isinstance(texts, str) or not all(isinstance(t, str) for t in texts):
            raise InputError("texts", "expected a list of texts", "Put a single text into a list: [text].")
        if batch_size < 1:
            raise InputError("batch_size", f"expected at least 1, got {batch_size}")
        if not texts:
            return
        with self.lock:  # fast tokenizers must not be shared between threads
            rows = self.tokenizer(
                list(texts),
                truncation=True,
                max_length=self.max_tokens,
                padding=False,
                return_attention_mask=False,
                return_token_type_ids=False,
            )["input_ids"]
        special = torch.tensor(sorted(self.tokenizer.all_special_ids))
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        pad = self.tokenizer.pad_token_id or 0
        device = next(self.model.parameters()).device
        with progress_bar(len(rows), "encoding", progress) as bar:
            for start in range(0, len(order), batch_size):
                chosen = order[start : start + batch_size]
                width = max(len(rows[i]) for i in chosen)
                ids = torch.tensor([rows[i] + [pad] * (width - len(rows[i])) for i in chosen])
                lengths = torch.tensor([len(rows[i]) for i in chosen])
                attended = torch.arange(width)[None, :] < lengths[:, None]
                features = {"input_ids": ids.to(device), "attention_mask": attended.long().to(device)}
                out = self.model(features)
                mask = attended & ~torch.isin(ids, special)
                yield EncodedBatch(
                    np.array(chosen), out["token_embeddings"].cpu(), mask, out["sentence_embedding"].cpu(), ids
                )
                bar.update(len(chosen))

    def encode(
        self, texts: Sequence[str], batch_size: int = 16, *, progress: bool | None = None
    ) -> Float[np.ndarray, "n d"]:
        """Sentence embeddings, unit length, in the order of ``texts``; shape ``(n, dim)``."""
        out = np.zeros((len(texts), self.dim), dtype=np.float32)
        for batch in self.forward_batches(texts, batch_size, progress=progress):
            out[batch.indices] = torch.nn.functional.normalize(batch.sentence.float(), dim=1).numpy()
        return out

    def embed(
        self, texts: Sequence[str], batch_size: int = 16, *, progress: bool | None = None
    ) -> list[TokenEmbeddings]:
        """Tokens, token embeddings and sentence embedding of each text, special tokens dropped."""
        out: list[TokenEmbeddings | None] = [None] * len(texts)
        for batch in self.forward_batches(texts, batch_size, progress=progress):
            unit = torch.nn.functional.normalize(batch.sentence.float(), dim=1)
            for row, index in enumerate(batch.indices):
                keep = batch.mask[row]
                out[index] = TokenEmbeddings(
                    self.tokenizer.convert_ids_to_tokens(batch.ids[row][keep].tolist()),
                    batch.vectors[row][keep].float().numpy(),
                    unit[row].numpy(),
                )
        return [e for e in out if e is not None]


def load_encoder(
    name: str | Path | None = None, *, revision: str | None = None, allow_download: bool = False, device: str = "cpu"
) -> Encoder:
    """Load a sentence encoder in fp32, memory-mapped, without touching the network.

    ``name``: ``None`` for the bundled all-MiniLM-L6-v2, a local ``sentence-transformers`` folder,
    or a hub id (with ``allow_download=True`` where it is not on this machine yet). Raises
    :class:`~pllm_helpers.runtime.InputError` that says what to type where it is not to be had.
    """
    go_offline()
    if name is None or str(name) == BUNDLED_ENCODER:
        label, folder = BUNDLED_ENCODER, bundled_encoder()
    elif Path(name).expanduser().is_dir():
        folder = Path(name).expanduser()
        label = folder.name
    elif str(name).count("/") > 1 or str(name).startswith((".", "~", "/")) or not str(name).strip():
        raise InputError("encoder", f"expected a local folder or a hub id, found no folder {str(name)!r}")
    else:
        label, folder = str(name), fetch(str(name), revision, allow_download)
    if not list(folder.rglob("*.safetensors")):
        raise InputError("encoder", f"expected *.safetensors in {folder}, found none", "Pickled weights are not read.")
    with quiet_transformers():
        from sentence_transformers import SentenceTransformer

        try:
            model = SentenceTransformer(str(folder), device=device, local_files_only=True, trust_remote_code=False)
        except (OSError, ValueError, KeyError) as e:
            raise InputError("encoder", f"expected a sentence-transformers folder at {folder}, got: {e}") from e
    model.eval().requires_grad_(False)
    return Encoder(model, label, int(model.max_seq_length or model.tokenizer.model_max_length))
