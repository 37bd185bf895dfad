"""Data for the claims of notebooks 00 and 01: where each must fail, and where it must hold."""

import numpy as np

rng = np.random.default_rng(0)
A, B = rng.normal(0, 0.01, 200), rng.normal(0, 1, 200)
LENGTH = np.linspace(0, 5, 200)

FAILS = {
    "parameter_count_claim": (100, 101),
    "same_answers_claim": (["a", "b"], ["a", "c"]),
    "throughput_claim": (A + 10, A + 9),
    "surprise_claim": (A + 1, A + 2 + B / 100),
    "by_hand_claim": ("EOE", A, A + 0.001),
    "bounded_claim": ("EOE", A + 1.5),
    "repetition_claim": ("norm", A, A + 0.1 + B / 100),
    "flat_reading_claim": ("norm", B),
    "length_bias_claim": (B, LENGTH + A, LENGTH),
    "no_hit_claim": (np.full(200, 0.1),),
    "sign_flip_claim": (A + 0.5, A + 0.5),
    "redundancy_claim": ("EOE", LENGTH, "IDD", LENGTH + A),
}
HOLDS = {
    "parameter_count_claim": (100, 100),
    "same_answers_claim": (["a", "b"], ["a", "b"]),
    "throughput_claim": (A + 30, A + 9),
    "surprise_claim": (A + 2 + B / 100, A + 1),
    "by_hand_claim": ("EOE", A, A),
    "bounded_claim": ("EOE", np.array([0.0, 1.0])),
    "repetition_claim": ("spectral", A + 0.1 + B / 100, A),
    "flat_reading_claim": ("norm", A / 10),
    "length_bias_claim": (LENGTH + A, B, LENGTH),
    "no_hit_claim": (np.zeros(200),),
    "sign_flip_claim": (A + 0.4, 0.6 - A),
    "redundancy_claim": ("EOE", B, "IDD", LENGTH),
}
