"""What a device allows: memory envelopes, meters, phones, predicted and measured memory, quantisation."""

from .architectures import (
    MOBILE_LLM,
    Architecture,
    ParameterCount,
    at_budget,
    build,
    design_effects,
)
from .envelope import EnvelopeResult, PhoneEnvelope, size_mb
from .measure import measure_memory, uniform_dialogues
from .meter import EnergyProxy, Meter, Phase, Sample, mark_phase
from .phones import PHONES, Phone
from .predict import METHODS, MemoryPrediction, predict_memory
from .quantize import (
    GenerationSpeed,
    QuantizedLLM,
    generation_speed,
    quantize,
    weight_error,
)
from .small_models import SmallRun, small_tokenizer, train_small

__all__ = [
    "METHODS",
    "MOBILE_LLM",
    "PHONES",
    "Architecture",
    "EnergyProxy",
    "EnvelopeResult",
    "GenerationSpeed",
    "MemoryPrediction",
    "Meter",
    "ParameterCount",
    "Phase",
    "Phone",
    "PhoneEnvelope",
    "QuantizedLLM",
    "Sample",
    "SmallRun",
    "at_budget",
    "build",
    "design_effects",
    "generation_speed",
    "mark_phase",
    "measure_memory",
    "predict_memory",
    "quantize",
    "size_mb",
    "small_tokenizer",
    "train_small",
    "uniform_dialogues",
    "weight_error",
]
