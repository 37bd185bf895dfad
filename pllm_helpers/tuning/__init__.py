"""Personalization by training: LoRA adapters on a frozen model, and what they cost."""

from .adapters import adapted
from .cost import CostPrediction, predict_cost
from .lora import tune_lora
from .result import TuningResult, load_result

__all__ = ["CostPrediction", "TuningResult", "adapted", "load_result", "predict_cost", "tune_lora"]
