"""Self-supervised data selection of Qin et al.: lexicons and buffer metrics."""

from .evidence import reading_evidence
from .lexicons import BUILT_IN, Lexicons, Span, highlight, load_lexicons, read_lexicon, word_tokens
from .metrics import (
    DEFAULT_READING,
    READINGS,
    domain_specific_score,
    dominant_domain,
    embedding_probabilities,
    entropy_of_embedding,
    in_domain_dissimilarity,
)
from .scoring import DomainMeans, MetricTable, batched_entropy, llm_batches, score_dialogues

__all__ = [
    "BUILT_IN",
    "DEFAULT_READING",
    "READINGS",
    "DomainMeans",
    "Lexicons",
    "MetricTable",
    "Span",
    "batched_entropy",
    "domain_specific_score",
    "dominant_domain",
    "embedding_probabilities",
    "entropy_of_embedding",
    "highlight",
    "in_domain_dissimilarity",
    "llm_batches",
    "load_lexicons",
    "read_lexicon",
    "reading_evidence",
    "score_dialogues",
    "word_tokens",
]
