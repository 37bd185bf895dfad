"""Evaluation: estimates with intervals, verdicts for claims, overlap scores of answers, likelihood of replies."""

from .intervals import Claim, Estimate, Kind, bootstrap_interval, check_claim, paired_difference, rank_correlation
from .likelihood import response_nll
from .responses import ResponseScores, evaluate_responses, response_words
from .task_scores import check_rules, exact_match, parse_call, same_call, score_task, token_f1

__all__ = [
    "Claim",
    "Estimate",
    "Kind",
    "ResponseScores",
    "bootstrap_interval",
    "check_claim",
    "check_rules",
    "evaluate_responses",
    "exact_match",
    "paired_difference",
    "parse_call",
    "rank_correlation",
    "response_nll",
    "response_words",
    "same_call",
    "score_task",
    "token_f1",
]
