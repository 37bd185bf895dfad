"""Personalization by training: LoRA adapters on a frozen model, and what they cost."""

from .adapters import adapted
from .cost import CostPrediction, predict_cost
from .full import private_copy, tune_full, with_weights
from .lomo import tune_lomo
from .lora import tune_lora
from .mezo import answer_loss, tune_mezo
from .perturb import Drift, perturb_, restoring_drift, spsa_gradient
from .prompts import REVIEW, SENTIMENT, Classification, PromptTask, classify
from .replay import Recipe, ReplayLog, read_log, replay
from .result import TuningResult, load_result

__all__ = [
    "REVIEW",
    "SENTIMENT",
    "Classification",
    "CostPrediction",
    "Drift",
    "PromptTask",
    "Recipe",
    "ReplayLog",
    "TuningResult",
    "adapted",
    "answer_loss",
    "classify",
    "load_result",
    "perturb_",
    "predict_cost",
    "private_copy",
    "read_log",
    "replay",
    "restoring_drift",
    "spsa_gradient",
    "tune_full",
    "tune_lomo",
    "tune_lora",
    "tune_mezo",
    "with_weights",
]
