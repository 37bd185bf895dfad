"""Evaluation: estimates with intervals, verdicts for claims, overlap scores of answers, likelihood of replies."""

from .intervals import Claim, Estimate, Kind, bootstrap_interval, check_claim, paired_difference, rank_correlation
from .likelihood import response_nll
from .responses import ResponseScores, evaluate_responses, response_words

__all__ = [
    "Claim",
    "Estimate",
    "Kind",
    "ResponseScores",
    "bootstrap_interval",
    "check_claim",
    "evaluate_responses",
    "paired_difference",
    "rank_correlation",
    "response_nll",
    "response_words",
]
