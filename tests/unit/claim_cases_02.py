"""Data for the claims of notebook 02: where each must fail, and where it must hold."""

import numpy as np

rng = np.random.default_rng(2)
A, B = rng.normal(0, 0.01, 20), rng.normal(0, 0.01, 20)
SLOTS = np.arange(16)
OFTEN, SELDOM = np.arange(300) % 2 == 0, np.arange(300) % 10 == 0
EVEN = rng.permuted(np.tile(np.arange(40) < 8, (2000, 1)), axis=1)  # 8 of 40, anywhere
LATE = np.tile(np.arange(40) >= 32, (2000, 1))

FAILS = {
    "same_buffer_claim": ("The rule", SLOTS, SLOTS[::-1]),
    "nothing_lost_claim": (100, 99),
    "resumed_claim": ("1f", "1e"),
    "uniform_reservoir_claim": (LATE,),
    "acceptance_falls_claim": ("The rule", np.r_[SELDOM, OFTEN].astype(float)),
    "below_reservoir_claim": (np.r_[SELDOM, OFTEN].astype(float), np.full(600, 0.1)),
    "first_arrivals_claim": (SLOTS + 100, 16),
    "higher_mean_claim": ("eoe", A + 0.5, B + 0.6),
    "less_redundant_claim": (A + 0.2, B + 0.1),
    "fifo_redundancy_claim": (A + 0.1, B + 0.2),
    "correlated_stream_claim": (0.05, A + 0.1),
}
HOLDS = {
    "same_buffer_claim": ("The rule", SLOTS, SLOTS),
    "nothing_lost_claim": (100, 101),
    "resumed_claim": ("1f", "1f"),
    "uniform_reservoir_claim": (EVEN,),
    "acceptance_falls_claim": ("The rule", np.r_[OFTEN, SELDOM].astype(float)),
    "below_reservoir_claim": (np.r_[OFTEN, SELDOM].astype(float), np.full(600, 0.3)),
    "first_arrivals_claim": (SLOTS, 16),
    "higher_mean_claim": ("idd", A + 0.6, B + 0.5),
    "less_redundant_claim": (A + 0.1, B + 0.2),
    "fifo_redundancy_claim": (A + 0.2, B + 0.1),
    "correlated_stream_claim": (0.2, A + 0.1),
}
