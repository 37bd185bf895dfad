"""The buffer metrics on many dialogue sets at once against one at a time, over the same encoder."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch

from pllm_helpers.corpora import chitchat_stream
from pllm_helpers.dialogue import DialogueSet
from pllm_helpers.models import EncodedBatch, Encoder, load_encoder
from pllm_helpers.selection import (
    Lexicons,
    domain_specific_score,
    dominant_domain,
    entropy_of_embedding,
    in_domain_dissimilarity,
    load_lexicons,
    score_dialogues,
    word_tokens,
)

from .compare import Row, in_turn, row

BUFFER = 64  # sets that IDD is taken against, as many as the released code of Qin et al. keeps
Scores = tuple[list[float], list[float], list[str | None], list[float]]  # EOE, DSS, dominant domain, IDD


def dialogue_sets(n: int) -> list[DialogueSet]:
    """``n`` real dialogue sets: the first 100 each of the most active people of chitchat."""
    rows = (d for person in range(-(-n // 100)) for d in chitchat_stream(person).stream[:100])
    return [d for d, _ in zip(rows, range(n), strict=False)]


def at_once(
    dialogues: Sequence[DialogueSet], encoder: Encoder | Callable[..., Iterator[EncodedBatch]], lexicons: Lexicons
) -> Scores:
    """All scores from the batched functions; IDD against the first sets."""
    table = score_dialogues(dialogues, encoder, lexicons, progress=False)
    names = table.domain_names
    idd = table.idd_against(table.embeddings[:BUFFER], names[:BUFFER])
    return table.eoe.tolist(), table.dss.tolist(), names, idd.tolist()


def scalar_scores(
    texts: Sequence[str], vectors: Sequence[np.ndarray], sentences: Sequence[np.ndarray], lexicons: Lexicons
) -> Scores:
    """The same scores from the scalar functions, given token vectors and sentence vectors."""
    eoe, dss, names, idd = [], [], [], []
    for text, v in zip(texts, vectors, strict=True):
        words = word_tokens(text)
        eoe.append(entropy_of_embedding(v) if len(v) else 0.0)
        dss.append(domain_specific_score(words, lexicons))
        names.append(dominant_domain(words, lexicons))
    groups = {name: np.array([sentences[i] for i in range(BUFFER) if names[i] == name]) for name in set(names)}
    for e, name in zip(sentences, names, strict=True):
        idd.append(in_domain_dissimilarity(e, groups[name]))
    return eoe, dss, names, idd


def one_by_one(dialogues: Sequence[DialogueSet], encoder: Encoder, lexicons: Lexicons) -> Scores:
    """The plain loop: ``encode`` of sentence-transformers on one text, then the scalar functions.

    One forward pass gives token and sentence embeddings, so that the peer does no work twice.
    """
    special = torch.tensor(encoder.tokenizer.all_special_ids)
    texts, vectors, sentences = [d.text for d in dialogues], [], []
    for text in texts:
        (out,) = encoder.model.encode([text], output_value=None, show_progress_bar=False)
        keep = ~torch.isin(out["input_ids"], special)
        vectors.append(out["token_embeddings"][keep].numpy())
        sentences.append(out["sentence_embedding"].numpy())
    return scalar_scores(texts, vectors, sentences, lexicons)


def compare(a: Scores, b: Scores) -> None:
    """Both sides gave the same scores; batches round differently in the fifth digit."""
    assert a[2] == b[2], "dominant domains differ"
    for x, y in ((a[0], b[0]), (a[1], b[1]), (a[3], b[3])):
        np.testing.assert_allclose(x, y, atol=1e-4)


class Clock:
    """An encoder that keeps the seconds spent in its own forward passes, tokenisation included."""

    def __init__(self, encoder: Encoder):
        self.encoder, self.seconds = encoder, 0.0

    def __call__(
        self, texts: Sequence[str], batch_size: int, *, progress: bool | None = None
    ) -> Iterator[EncodedBatch]:
        batches = self.encoder.forward_batches(texts, batch_size, progress=progress)
        while True:
            start = time.perf_counter()
            batch = next(batches, None)
            self.seconds += time.perf_counter() - start
            if batch is None:
                return
            yield batch


def run(quick: bool = False) -> list[Row]:
    """Rows ``metrics_throughput`` (dialogue sets per second, encoder included) and
    ``metrics_overhead_share`` (scoring beyond the encoder's own batched forward, in percent of it).

    Same texts, encoder, threads and scores (EOE ``spectral``, DSS, dominant domain, IDD against a
    buffer of 64) on both sides. The peer of the second row is the scalar functions on the vectors
    of the same forward pass.
    """
    encoder, lexicons, dialogues = load_encoder(), load_lexicons(), dialogue_sets(200 if quick else 2000)
    part = dialogues[:200]
    compare(at_once(part, encoder, lexicons), one_by_one(part, encoder, lexicons))
    rounds = 2 if quick else 3

    def rate(scores: Callable[[], Scores]) -> Callable[[], float]:
        def measure() -> float:
            start = time.perf_counter()
            scores()
            return len(dialogues) / (time.perf_counter() - start)

        return measure

    a, b = in_turn(
        rate(lambda: at_once(dialogues, encoder, lexicons)),
        rate(lambda: one_by_one(dialogues, encoder, lexicons)),
        rounds,
    )
    unit = "dialogue sets/s"
    whole = row("metrics_throughput", "sentence-transformers encode, one by one", a, b, unit, more=True)

    embedded = encoder.embed([d.text for d in dialogues], progress=False)
    texts, vectors, sentences = (
        [d.text for d in dialogues],
        [e.vectors for e in embedded],
        [e.sentence for e in embedded],
    )
    forward: list[float] = []

    def batched_share() -> float:
        clock = Clock(encoder)
        start = time.perf_counter()
        at_once(dialogues, clock, lexicons)
        forward.append(clock.seconds)
        return 100 * (time.perf_counter() - start - clock.seconds) / clock.seconds

    def scalar_share() -> float:
        start = time.perf_counter()
        scalar_scores(texts, vectors, sentences, lexicons)
        return 100 * (time.perf_counter() - start) / float(np.median(forward))

    a, b = in_turn(batched_share, scalar_share, rounds)
    unit = "% of the encoder's forward"
    share = row("metrics_overhead_share", "numpy scalar functions in a loop", a, b, unit, more=False)
    return [whole, share]
