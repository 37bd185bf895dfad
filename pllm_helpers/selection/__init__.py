"""Self-supervised data selection of Qin et al.: lexicons, buffer metrics, buffer, replacement policies."""

from .buffer import (
    BIN_BYTES,
    METRICS,
    Annotation,
    BufferView,
    Candidate,
    Choice,
    Decision,
    DialogueBuffer,
    Entry,
)
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
from .policies import (
    POLICIES,
    CombinedScore,
    FacilityLocation,
    FifoReplace,
    KCenter,
    Policy,
    QualityPolicy,
    RandomReplace,
    make_policy,
)
from .scoring import DomainMeans, MetricTable, batched_entropy, llm_batches, score_dialogues
from .stream import run_stream

__all__ = [
    "BIN_BYTES",
    "BUILT_IN",
    "DEFAULT_READING",
    "METRICS",
    "POLICIES",
    "READINGS",
    "Annotation",
    "BufferView",
    "Candidate",
    "Choice",
    "CombinedScore",
    "Decision",
    "DialogueBuffer",
    "DomainMeans",
    "Entry",
    "FacilityLocation",
    "FifoReplace",
    "KCenter",
    "Lexicons",
    "MetricTable",
    "Policy",
    "QualityPolicy",
    "RandomReplace",
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
    "make_policy",
    "read_lexicon",
    "reading_evidence",
    "run_stream",
    "score_dialogues",
    "word_tokens",
]
