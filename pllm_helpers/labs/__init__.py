"""Exercise checks that name the mistake."""

from .checks import Mistake
from .checks_00 import check_temperature_softmax, check_weight_megabytes
from .checks_01 import check_dissimilarity, check_domain_score, check_norm_entropy
from .checks_02 import check_replacement_slot, check_reservoir_slot, check_stored_sets
from .checks_03 import check_bracketed_text, check_keep_paraphrases, check_rouge1
from .checks_04 import check_answer_labels, check_lora_forward, check_lora_parameters
from .checks_05 import check_chance_of_up_to, check_hierarchical_mean, check_paired_interval, check_verdict
from .checks_06 import check_best_epsilon, check_mezo_step, check_tuning_bytes
from .checks_07 import check_choose_method, check_count_parameters, check_sharing_buys

__all__ = [
    "Mistake",
    "check_answer_labels",
    "check_best_epsilon",
    "check_bracketed_text",
    "check_chance_of_up_to",
    "check_choose_method",
    "check_count_parameters",
    "check_dissimilarity",
    "check_domain_score",
    "check_hierarchical_mean",
    "check_keep_paraphrases",
    "check_lora_forward",
    "check_lora_parameters",
    "check_mezo_step",
    "check_norm_entropy",
    "check_paired_interval",
    "check_replacement_slot",
    "check_reservoir_slot",
    "check_rouge1",
    "check_sharing_buys",
    "check_stored_sets",
    "check_temperature_softmax",
    "check_tuning_bytes",
    "check_verdict",
    "check_weight_megabytes",
]
