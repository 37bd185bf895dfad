"""The buffer metrics on many dialogues at once: one encoder pass, then batched arithmetic."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int

from ..dialogue import DialogueSet
from ..models import EncodedBatch, Encoder
from ..runtime import InputError
from .lexicons import Lexicons, count_hits, word_tokens
from .metrics import BINS, DEFAULT_READING, MODES, READINGS, check_choice

if TYPE_CHECKING:
    import pandas as pd

    from ..models import LLM

__all__ = ["DomainMeans", "MetricTable", "batched_entropy", "llm_batches", "score_dialogues"]


@dataclass(frozen=True)
class MetricTable:
    """Scores of ``n`` dialogue sets, in their order.

    Attributes
    ----------
    eoe, dss : shape ``(n,)``.
    domain : place of the dominant domain in ``lexicons``, −1 without a hit; shape ``(n,)``.
    embeddings : unit vectors, shape ``(n, d)``.
    n_tokens : tokens of the encoder behind EOE. n_words : words behind DSS.
    lexicons : names, in order.
    """

    eoe: Float[np.ndarray, " n"]
    dss: Float[np.ndarray, " n"]
    domain: Int[np.ndarray, " n"]
    embeddings: Float[np.ndarray, "n d"]
    n_tokens: Int[np.ndarray, " n"]
    n_words: Int[np.ndarray, " n"]
    lexicons: tuple[str, ...]
    reading: str
    mode: str = "paper"

    def __len__(self) -> int:
        return len(self.eoe)

    @property
    def domain_names(self) -> list[str | None]:
        """Name of the dominant domain of each set, ``None`` without a hit."""
        return [self.lexicons[i] if i >= 0 else None for i in self.domain]

    def to_pandas(self) -> pd.DataFrame:
        """One row per dialogue set, without the embeddings."""
        import pandas as pd

        columns = {"eoe": self.eoe, "dss": self.dss, "domain": self.domain_names}
        return pd.DataFrame({**columns, "n_tokens": self.n_tokens, "n_words": self.n_words})

    def idd_against(
        self, embeddings: Float[np.ndarray, "b d"], domains: Sequence[str | None]
    ) -> Float[np.ndarray, " n"]:
        """IDD of every set against one buffer, given by its embeddings and dominant domains."""
        if len(embeddings) != len(domains):
            raise InputError("domains", f"expected {len(embeddings)} of them, one per embedding, got {len(domains)}")
        means = DomainMeans()
        for e, name in zip(embeddings, domains, strict=True):
            means.add(e, name)
        scores = [means.idd(e, d, mode=self.mode) for e, d in zip(self.embeddings, self.domain_names, strict=True)]
        return np.array(scores, dtype=float)


@dataclass
class DomainMeans:
    """IDD from per-domain sums of unit vectors: 1 − e·S_d / R_d, at the cost of one dot product.

    The mean of cosines over a domain is a dot product with the domain's mean unit vector, so a
    buffer need not look at its entries one by one. Sums are kept in fp64.
    """

    sums: dict[str | None, Float[np.ndarray, " d"]] = field(default_factory=dict)
    counts: dict[str | None, int] = field(default_factory=dict)

    @staticmethod
    def unit(embedding: Float[np.ndarray, " d"]) -> Float[np.ndarray, " d"]:
        """The embedding in fp64, scaled to length 1. Raises on zero and NaN."""
        e = np.asarray(embedding, dtype=np.float64)
        largest = float(np.abs(e).max(initial=0))
        if not math.isfinite(largest) or largest == 0:
            raise InputError("embedding", "expected a vector with a direction, got a zero vector or NaN")
        e = e / largest  # squares must neither over- nor underflow
        return e / np.linalg.norm(e)

    def add(self, embedding: Float[np.ndarray, " d"], domain: str | None) -> None:
        """Count one buffered set in."""
        self.sums[domain] = self.sums.get(domain, 0.0) + self.unit(embedding)
        self.counts[domain] = self.counts.get(domain, 0) + 1

    def remove(self, embedding: Float[np.ndarray, " d"], domain: str | None) -> None:
        """Count one buffered set out again. Raises if its domain is empty."""
        if not self.counts.get(domain):
            raise InputError("domain", f"expected a domain with buffered sets, {domain!r} has none")
        self.sums[domain] = self.sums[domain] - self.unit(embedding)
        self.counts[domain] -= 1
        if self.counts[domain] == 0:  # forget the rounding of many additions
            del self.sums[domain], self.counts[domain]

    def idd(self, embedding: Float[np.ndarray, " d"], domain: str | None, *, mode: str = "paper") -> float:
        """IDD of a set against the buffered sets of its domain; see ``in_domain_dissimilarity``."""
        check_choice(mode, MODES, "mode")
        count = self.counts.get(domain, 0)
        if count == 0:
            return 1.0 if mode == "paper" else 0.0
        similarity = float(self.unit(embedding) @ self.sums[domain]) / count
        similarity = min(1.0, max(-1.0, similarity))  # clipped against rounding only
        return similarity if mode == "released_code" else 1.0 - similarity


def score_dialogues(
    dialogues: Sequence[DialogueSet] | Sequence[str],
    encoder: Encoder | Callable[..., Iterable[EncodedBatch]],
    lexicons: Mapping[str, Any],
    *,
    reading: str = DEFAULT_READING,
    mode: str = "paper",
    batch_size: int = 16,
    progress: bool | None = None,
) -> MetricTable:
    """EOE, DSS, dominant domain and embedding of many dialogue sets (Qin et al.).

    Parameters
    ----------
    dialogues : dialogue sets (their ``text``, question and answer, is scored) or texts.
    encoder : from :func:`~pllm_helpers.models.load_encoder`; or :func:`llm_batches` of a language
        model.
    lexicons : from :func:`~pllm_helpers.selection.load_lexicons`, or any mapping to sets of words.
    reading, mode : see :func:`~pllm_helpers.selection.entropy_of_embedding`.

    A text without tokens scores EOE 0. Raises :class:`~pllm_helpers.runtime.InputError` on a bad
    reading or mode, or if the encoder gives NaN.
    """
    check_choice(reading, READINGS, "reading")
    check_choice(mode, MODES, "mode")
    if isinstance(dialogues, str):
        raise InputError("dialogues", "expected a list of dialogue sets or texts", "Put a single text into a list.")
    texts = [d.text if isinstance(d, DialogueSet) else d for d in dialogues]
    lists = lexicons if isinstance(lexicons, Lexicons) else Lexicons(lexicons)
    hits, n_words = count_hits([word_tokens(t) for t in texts], lists)
    dss = hits.sum(1) / np.maximum(n_words, 1) / len(lists)
    domain = np.where(hits.any(1), hits.argmax(1), -1)
    n, eoe, n_tokens, embeddings = len(texts), np.zeros(len(texts)), np.zeros(len(texts), dtype=int), None
    batches = encoder.forward_batches if isinstance(encoder, Encoder) else encoder
    for batch in batches(texts, batch_size, progress=progress):
        if embeddings is None:
            embeddings = np.zeros((n, batch.sentence.shape[1]), dtype=np.float32)
        eoe[batch.indices] = batched_entropy(batch.vectors, batch.mask, reading=reading, mode=mode).numpy()
        n_tokens[batch.indices] = batch.mask.sum(1).numpy()
        embeddings[batch.indices] = torch.nn.functional.normalize(batch.sentence.float(), dim=1).numpy()
    if embeddings is None:
        embeddings = np.zeros((n, 0), dtype=np.float32)
    if not np.isfinite(embeddings).all():
        raise InputError("encoder", "expected finite embeddings, got NaN or infinity")
    return MetricTable(eoe, dss, domain, embeddings, n_tokens, n_words, tuple(lists), reading, mode)


@torch.inference_mode()
def batched_entropy(
    vectors: Float[torch.Tensor, "b n d"],
    mask: Bool[torch.Tensor, "b n"],
    *,
    reading: str = DEFAULT_READING,
    mode: str = "paper",
) -> Float[torch.Tensor, " b"]:
    """EOE of a padded batch; row i equals ``entropy_of_embedding(vectors[i][mask[i]])`` within 1e-5.

    Rows without a token score 0. What stands at padding does not count, be it NaN. Raises
    :class:`~pllm_helpers.runtime.InputError` on NaN or infinity at a token.
    """
    x = torch.where(mask[..., None], vectors, 0).float()
    if not torch.isfinite(x.sum((1, 2))).all() and not torch.isfinite(x).all():
        raise InputError("vectors", "expected finite embeddings, got NaN or infinity", "Has the model diverged?")
    count = mask.sum(1)
    log_n = count.clamp(min=2).double().log()
    if mode == "released_code" or reading == "histogram":
        if mode == "released_code":
            last = (mask * torch.arange(1, mask.shape[1] + 1)).argmax(1)
            one = x[torch.arange(len(x)), last]
        else:
            one = x.sum(1) / count.clamp(min=1)[:, None]
        score = _histogram_entropies(one) / (count + 1).double().clamp(min=2).log2()
        return torch.where(count > 0, score, 0.0)
    lengths = x.norm(dim=2)
    if reading == "norm":
        p = lengths.double() / lengths.double().sum(1, keepdim=True).clamp(min=1e-300)
    else:
        unit = torch.nn.functional.normalize(x, dim=2, eps=1e-30)
        small = unit @ unit.transpose(1, 2) if x.shape[1] <= x.shape[2] else unit.transpose(1, 2) @ unit
        p = _eigenvalues(small).double().clamp(min=0)
        p = p / p.sum(1, keepdim=True).clamp(min=1e-300)
    score = torch.special.entr(p).sum(1) / log_n
    return torch.where(count > 1, score.clamp(0, 1), 0.0)


def _eigenvalues(matrices: Float[torch.Tensor, "b k k"]) -> Float[torch.Tensor, "b k"]:
    """Eigenvalues of many small symmetric matrices, half of them on each core.

    The linear algebra library would split every single small matrix among the cores and spend
    more time waking them than computing.
    """
    halves = _WORKERS.map(torch.linalg.eigvalsh, matrices.chunk(2))
    return torch.cat(list(halves))


_WORKERS = ThreadPoolExecutor(2, thread_name_prefix="eigenvalues")


def _histogram_entropies(vectors: Float[torch.Tensor, "b d"]) -> Float[torch.Tensor, " b"]:
    """Entropy in bits of a 100-bin histogram of each row, binned as NumPy does."""
    values = vectors.double().numpy()
    low, high = values.min(1, keepdims=True), values.max(1, keepdims=True)
    flat = low == high
    low, high = np.where(flat, low - 0.5, low), np.where(flat, high + 0.5, high)
    edges = np.linspace(low[:, 0], high[:, 0], BINS + 1, axis=1)
    place = np.minimum(((values - low) / (high - low) * BINS).astype(int), BINS - 1)
    # a value next to an edge may have been rounded across it: the edges decide
    place -= values < np.take_along_axis(edges, place, 1)
    place += (values >= np.take_along_axis(edges, place + 1, 1)) & (place < BINS - 1)
    counts = np.zeros((len(values), BINS))
    np.add.at(counts, (np.arange(len(values))[:, None], place), 1)
    p = torch.from_numpy(counts / values.shape[1])
    return torch.special.entr(p).sum(1) / math.log(2)


def llm_batches(llm: LLM, *, layer: int = -1, max_tokens: int = 512) -> Callable[..., Iterable[EncodedBatch]]:
    """Batches of a language model's hidden states, to be given to :func:`score_dialogues`.

    ``layer`` counts as ``hidden_states`` of transformers do: 0 is the embedding, −1 the last. The
    text's own vector is that of its last token, as in the released code of Qin et al.
    (``max_length`` 512).
    """

    @torch.inference_mode()
    def batches(texts: Sequence[str], batch_size: int = 8, *, progress: bool | None = None) -> Iterable[EncodedBatch]:
        from ..models.generation import progress_bar

        rows = [llm.tokenizer(t, truncation=True, max_length=max_tokens)["input_ids"] for t in texts]
        order = sorted((i for i in range(len(rows)) if rows[i]), key=lambda i: len(rows[i]))
        with progress_bar(len(rows), "encoding", progress) as bar:
            for start in range(0, len(order), batch_size):
                chosen = order[start : start + batch_size]
                width = max(len(rows[i]) for i in chosen)
                ids = torch.tensor([rows[i] + [0] * (width - len(rows[i])) for i in chosen])
                mask = torch.arange(width)[None] < torch.tensor([len(rows[i]) for i in chosen])[:, None]
                inputs = {"input_ids": ids.to(llm.device), "attention_mask": mask.long().to(llm.device)}
                out = llm.model.get_decoder()(**inputs, output_hidden_states=layer != -1)
                states = (out.last_hidden_state if layer == -1 else out.hidden_states[layer]).float().cpu()
                last = states[torch.arange(len(chosen)), mask.sum(1) - 1]
                yield EncodedBatch(np.array(chosen), states, mask, last, ids)
                bar.update(len(chosen))

    return batches
