"""Exercise checks that name the mistake."""

from .checks import Mistake
from .checks_00 import check_temperature_softmax, check_weight_megabytes
from .checks_01 import check_dissimilarity, check_domain_score, check_norm_entropy

__all__ = [
    "Mistake",
    "check_dissimilarity",
    "check_domain_score",
    "check_norm_entropy",
    "check_temperature_softmax",
    "check_weight_megabytes",
]
