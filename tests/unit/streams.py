"""Streams for the tests of buffer and policies: made from random numbers, or real ones with real scores."""

from __future__ import annotations

import functools

import numpy as np

from pllm_helpers.corpora import chitchat_stream
from pllm_helpers.dialogue import DialogueSet
from pllm_helpers.selection import MetricTable, load_lexicons, score_dialogues

DOMAINS = ("drug", "fear", "people")


def random_stream(n: int, *, seed: int = 0, d: int = 16, mode: str = "paper") -> tuple[list[DialogueSet], MetricTable]:
    """``n`` sets with random scores, domains (some without) and clustered unit vectors."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(4, d))[rng.integers(0, 4, n)]
    vectors = (centres + rng.normal(size=(n, d))).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    dialogues = [DialogueSet("u", f"question {i} of {seed}", f"answer {i}", float(i), "random") for i in range(n)]
    ones = np.ones(n, dtype=int)
    domain = rng.integers(-1, len(DOMAINS), n)
    return dialogues, MetricTable(rng.random(n), rng.random(n), domain, vectors, ones, ones, DOMAINS, "spectral", mode)


@functools.cache
def real_stream(user: int = 0, n: int = 240) -> tuple[tuple[DialogueSet, ...], MetricTable]:
    """The first ``n`` sets of a real person, with lexicon scores and a cheap stand-in for the encoder.

    Embeddings are hashed words, EOE is that of the word counts' shares: real texts, real domains,
    and no model to load.
    """
    dialogues = chitchat_stream(user).stream[:n]
    return dialogues, score_dialogues(dialogues, hashed_words, load_lexicons("medical", "emotion"), progress=False)


def hashed_words(texts, batch_size=16, *, progress=None):
    """An encoder's batches from word hashes, as :func:`score_dialogues` wants them."""
    import zlib

    import torch

    from pllm_helpers.models import EncodedBatch

    for i, text in enumerate(texts):
        places = torch.tensor([zlib.crc32(w.encode("utf-8", "surrogatepass")) % 64 for w in text.split()])
        vectors = torch.nn.functional.one_hot(places, 64).float()[None]
        mask = torch.ones(1, len(places), dtype=torch.bool)
        yield EncodedBatch(np.array([i]), vectors, mask, vectors.sum(1), places[None])
