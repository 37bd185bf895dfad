"""Data for the claims of notebook 04: where each must fail, and where it must hold."""

import numpy as np

rng = np.random.default_rng(4)
A, B = rng.normal(0, 0.01, 200), rng.normal(0, 0.3, 200)
ONE, MANY = np.full(200, 10), np.full(200, 60)

FAILS = {
    "unchanged_start_claim": (A, A + 1e-7),
    "layer_by_hand_claim": (A + 1, A + 1.001),
    "loss_by_hand_claim": (4.0, 4.1),
    "trainable_claim": (100, 101),
    "predicted_parameters_claim": (np.array([5, 6]), np.array([5, 7])),
    "predicted_time_claim": (np.array([1.0, 1.0]), np.array([1.0, 2.5])),
    "answer_share_claim": (MANY - ONE, MANY),
    "positions_claim": ("Sorting", A + 1.3, A + 1.29),
    "nll_falls_claim": (B + 4, B + 4.2 + A),
    "shared_gain_claim": (A + 0.6, A[::-1] + 0.1),
    "own_adapter_claim": (B + 4.2, B + 4 + A),
    "overfitting_claim": (B + 4, B + 4),
    "recital_claim": (["a", "b", "c", "d"], ["x", "y", "z", "w"]),
    "resume_claim": (A, A + 1e-6),
    "plain_peft_claim": (A, A + 1e-6),
}
HOLDS = {
    "unchanged_start_claim": (A, A),
    "layer_by_hand_claim": (A + 1, A + 1),
    "loss_by_hand_claim": (4.01, 4.0),
    "trainable_claim": (100, 100),
    "predicted_parameters_claim": (np.array([5, 7]), np.array([5, 7])),
    "predicted_time_claim": (np.array([1.0, 2.0]), np.array([1.2, 1.5])),
    "answer_share_claim": (ONE, MANY),
    "positions_claim": ("Sorting", A + 1.3, A + 1.1),
    "nll_falls_claim": (B + 4.2 + A, B + 4),
    "shared_gain_claim": (A + 0.6, A[::-1] + 0.5),
    "own_adapter_claim": (B + 4, B + 4.2 + A),
    "overfitting_claim": (B + 4, B + 4.2 + A),
    "recital_claim": (["a", "b ", "c"], ["a", "b", "c"]),
    "resume_claim": (A, A),
    "plain_peft_claim": (A, A),
}
