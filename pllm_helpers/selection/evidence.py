"""The evidence behind ``DEFAULT_READING``: what each reading of EOE does on real messages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ..evaluation import rank_correlation
from ..models import Encoder
from ..runtime import InputError
from .metrics import READINGS, entropy_of_embedding

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["reading_evidence"]


def reading_evidence(encoder: Encoder, messages: Sequence[str]) -> pd.DataFrame:
    """One row per reading: mean, spread, rank correlation with length, share of wins over repetition.

    ``content_over_repetition`` is the share of messages of at least three words that score higher
    than their own first word repeated to the same number of words; 0.5 is a coin. Messages of a
    single token are left out. Raises :class:`~pllm_helpers.runtime.InputError` if fewer than ten
    messages are long enough.
    """
    import pandas as pd

    texts = [m for m in messages if len(m.split()) >= 3]
    if len(texts) < 10:
        raise InputError("messages", f"expected at least 10 of three words or more, got {len(texts)}")
    repeated = [" ".join([t.split()[0]] * len(t.split())) for t in texts]
    all_rows = [e.vectors for e in encoder.embed(list(messages)) if len(e.tokens) > 1]
    real, dull = ([e.vectors for e in encoder.embed(side)] for side in (texts, repeated))
    lengths = np.log([len(v) for v in all_rows])
    rows = {}
    for reading in READINGS:
        scores = np.array([entropy_of_embedding(v, reading) for v in all_rows])
        wins = [
            entropy_of_embedding(a, reading) > entropy_of_embedding(b, reading) for a, b in zip(real, dull, strict=True)
        ]
        rows[reading] = {
            "mean": scores.mean(),
            "sd": scores.std(ddof=1),
            "rank_correlation_with_length": rank_correlation(scores, lengths),
            "content_over_repetition": float(np.mean(wins)),
        }
    return pd.DataFrame(rows).T
