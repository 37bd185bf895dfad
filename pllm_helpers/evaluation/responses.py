"""Overlap of answers with the real replies (ROUGE, BLEU), and what shows that such overlap misleads.

ROUGE counts shared words. It rises when answers get longer or shorter towards the reference's
length, when they repeat the prompt's words, and when all answers are one safe phrase. So lengths
and copy rates stand beside it; a gain in ROUGE that comes with them is not yet a better answer.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from ..runtime import InputError
from .intervals import Estimate, bootstrap_interval

__all__ = ["ResponseScores", "evaluate_responses", "response_words"]

_METRICS = ("rouge1", "rouge2", "rougeL", "bleu", "length_ratio", "copy_rate")
_FLAGS = ("equals_prompt", "equals_another", "blank")


def response_words(text: str) -> list[str]:
    """The words that ROUGE compares: runs of letters, marks and digits of any script, case folded.

    The tokenizer of ``rouge_score`` keeps only a-z and 0-9: it turns "café" into "caf" and a
    Greek or Chinese answer into nothing. Here characters of scripts written without spaces
    (Chinese, Japanese, Thai, …) and emoji count as one word each; an apostrophe inside a word
    joins it ("don't"). Text is brought to Unicode's NFKC form first.
    """
    words: list[str] = []
    word: list[str] = []
    normal = unicodedata.normalize("NFKC", text).casefold()
    for place, c in enumerate(normal):
        kind = _kind(c)
        if kind == "letter" or (kind == "mark" and word):
            word.append(c)
            continue
        if kind == "apostrophe" and word and _kind(normal[place + 1 : place + 2]) == "letter":
            word.append("'")
            continue
        if word:
            words.append("".join(word))
            word = []
        if kind == "alone":
            words.append(c)
    if word:
        words.append("".join(word))
    return words


@lru_cache(maxsize=4096)
def _kind(c: str) -> str:
    if c.isascii():
        return "letter" if c.isalnum() else "apostrophe" if c == "'" else ""
    if c == "’":
        return "apostrophe"
    code = ord(c)
    spaceless = (
        0x0E00 <= code <= 0x0EFF  # Thai, Lao
        or 0x1000 <= code <= 0x109F  # Burmese
        or 0x1780 <= code <= 0x17FF  # Khmer
        or 0x3040 <= code <= 0x30FF  # kana
        or 0x3400 <= code <= 0x9FFF  # ideographs
        or 0xF900 <= code <= 0xFAFF
        or 0x20000 <= code <= 0x3FFFF
    )
    category = unicodedata.category(c)
    if category[0] in "LN":
        return "alone" if spaceless else "letter"
    if category[0] == "M":
        return "" if spaceless or 0xFE00 <= code <= 0xFE0F else "mark"
    return "alone" if category == "So" else ""


class _Words:
    """What ``rouge_score`` asks a tokenizer for."""

    tokenize = staticmethod(response_words)


@dataclass(frozen=True)
class ResponseScores:
    """Scores of ``n`` answers, each of shape ``(n,)``, in their order.

    Attributes
    ----------
    rouge1, rouge2, rougeL : F-measures in [0, 1] (Lin 2004), words from :func:`response_words`.
    bleu : sentence BLEU in [0, 1] (sacrebleu, its smoothing and effective order).
    length_ratio : words of the answer per word of the reference.
    copy_rate : share of the answer's words that also stand in the prompt, in [0, 1]; 0 without prompts.
    equals_prompt, equals_another : the answer's words are the prompt's, or those of another answer.
    blank : the answer holds no word.
    corpus_bleu : BLEU of all answers together, in [0, 1]; not the mean of ``bleu``.
    bleu_signature : settings of sacrebleu, to be quoted with ``bleu``.
    """

    rouge1: Float[np.ndarray, " n"]
    rouge2: Float[np.ndarray, " n"]
    rougeL: Float[np.ndarray, " n"]
    bleu: Float[np.ndarray, " n"]
    length_ratio: Float[np.ndarray, " n"]
    copy_rate: Float[np.ndarray, " n"]
    equals_prompt: Bool[np.ndarray, " n"]
    equals_another: Bool[np.ndarray, " n"]
    blank: Bool[np.ndarray, " n"]
    corpus_bleu: float
    bleu_signature: str
    _statistics: Float[np.ndarray, "n k"]

    def __len__(self) -> int:
        return len(self.rouge1)

    def summary(self, seed: int = 0) -> dict[str, Estimate]:
        """Means with 95 % bootstrap intervals over answers; shares for the yes-or-no columns.

        ``corpus_bleu`` is resampled as a whole, from its counts. Needs at least two answers.
        """
        out = {name: bootstrap_interval(getattr(self, name), seed=seed) for name in _METRICS}
        out |= {name: bootstrap_interval(getattr(self, name).astype(float), seed=seed) for name in _FLAGS}
        rng = np.random.default_rng(seed)
        rows = rng.integers(0, len(self), size=(1000, len(self)))
        draws = [_corpus_bleu(self._statistics[r].sum(0)) for r in rows]
        low, high = np.quantile(draws, [0.025, 0.975])
        value = self.corpus_bleu
        out["corpus_bleu"] = Estimate(value, min(float(low), value), max(float(high), value), len(self), (seed,))
        return out

    def to_pandas(self) -> Any:
        """One row per answer."""
        import pandas as pd

        return pd.DataFrame({name: getattr(self, name) for name in (*_METRICS, *_FLAGS)})


def evaluate_responses(
    predictions: Sequence[str], references: Sequence[str], prompts: Sequence[str] | None = None
) -> ResponseScores:
    """Compare answers with the replies that were really given.

    Parameters
    ----------
    predictions, references : answers and real replies, row by row. An answer may be blank (it
        scores 0); a reference may not.
    prompts : what was answered, for the copy rates.

    Two texts without a shared word score ROUGE 0. Raises
    :class:`~pllm_helpers.runtime.InputError` on lists of unequal length, no row, or a reference
    without a word.
    """
    from rouge_score.rouge_scorer import RougeScorer
    from sacrebleu.metrics import BLEU

    for name, texts in (("predictions", predictions), ("references", references), ("prompts", prompts)):
        if isinstance(texts, str):
            raise InputError(name, "expected a list of texts, got one text", "Write [text].")
        if texts is not None and len(texts) != len(predictions):
            raise InputError(name, f"expected {len(predictions)} texts, one per prediction, got {len(texts)}")
    if not len(predictions):
        raise InputError("predictions", "expected at least one answer, got none")
    given = [response_words(p) for p in predictions]
    wanted = [response_words(r) for r in references]
    for place, words in enumerate(wanted):
        if not words:
            raise InputError(f"references[{place}]", "expected a reply with at least one word", "Leave the row out.")
    asked = [response_words(p) for p in prompts] if prompts is not None else [[] for _ in given]

    rouge = RougeScorer(["rouge1", "rouge2", "rougeL"], tokenizer=_Words())
    scores = [rouge.score(r, p) for p, r in zip(predictions, references, strict=True)]
    sentence, corpus = BLEU(effective_order=True), BLEU()
    bleu = [sentence.sentence_score(p, [r]) for p, r in zip(predictions, references, strict=True)]
    # per answer: lengths, n-gram hits and totals; their sums give the corpus score
    counts = np.array([[b.sys_len, b.ref_len, *b.counts, *b.totals] for b in bleu], dtype=float)
    whole = corpus.corpus_score(list(predictions), [list(references)])
    seen = Counter(tuple(words) for words in given)
    return ResponseScores(
        **{m: np.array([s[m].fmeasure for s in scores], dtype=float) for m in ("rouge1", "rouge2", "rougeL")},
        bleu=np.array([min(1.0, b.score / 100) for b in bleu], dtype=float),  # 100.00000000000004 comes up
        length_ratio=np.array([len(p) / len(r) for p, r in zip(given, wanted, strict=True)], dtype=float),
        copy_rate=np.array([_copied(p, q) for p, q in zip(given, asked, strict=True)], dtype=float),
        equals_prompt=np.array([bool(p) and p == q for p, q in zip(given, asked, strict=True)]),
        equals_another=np.array([bool(p) and seen[tuple(p)] > 1 for p in given]),
        blank=np.array([not p for p in given]),
        corpus_bleu=min(1.0, whole.score / 100),
        bleu_signature=str(corpus.get_signature()),
        _statistics=counts,
    )


def _copied(answer: Sequence[str], prompt: Sequence[str]) -> float:
    """Share of the answer's words that the prompt holds too, each of its words used at most once."""
    if not answer:
        return 0.0
    return sum((Counter(answer) & Counter(prompt)).values()) / len(answer)


def _corpus_bleu(counts: Float[np.ndarray, " k"]) -> float:
    """Corpus BLEU in [0, 1] from summed counts: lengths of answers and references, hits and totals per order."""
    from sacrebleu.metrics import BLEU

    order = (len(counts) - 2) // 2
    whole = [int(c) for c in counts]
    found = BLEU.compute_bleu(whole[2 : 2 + order], whole[2 + order :], sys_len=whole[0], ref_len=whole[1])
    return min(1.0, found.score / 100)
