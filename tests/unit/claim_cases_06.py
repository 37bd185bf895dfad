"""Data for the claims of notebook 06: where each must fail, and where it must hold."""

import numpy as np

from pllm_helpers.device import EnvelopeResult

rng = np.random.default_rng(6)
G = rng.normal(0, 5, 60)
NOISE = rng.normal(0, 0.01, 60)
WIDE = rng.normal(0, 0.3, 60)
D = np.array([1e3, 1e5, 1e7])
HALF = np.stack([d**-0.5 * np.abs(1 + rng.normal(0, 0.1, 20)) for d in D])
FLAT = np.abs(1 + rng.normal(0, 0.1, (3, 20)))
RIGHT, WRONG = np.ones(40), np.zeros(40)


def envelope(status, signal, peak):
    return EnvelopeResult(status, signal, peak, [], None, "", 1024.0, "resident", (100.0, 60.0), 1.0, 1.0, 1.0, "")


FAILS = {
    "mezo_by_hand_claim": (G, G + 1),
    "weights_by_hand_claim": (1e-3,),
    "predicted_slope_claim": (G[::-1].copy(), G),
    "alignment_claim": (D, FLAT),
    "epsilon_claim": (np.array([1e-5, 1e-3, 1e-1]), np.array([1.0, 0.9, 3.0])),
    "mezo_trains_claim": (envelope("killed", 9, 1030.0),),
    "adam_killed_claim": (envelope("finished", None, 900.0),),
    "prediction_claim": (np.array([800.0, 1000.0]), np.array([790.0, 1200.0])),
    "replay_claim": ("0123", "4567"),
    "log_size_claim": (700, 120),
    "batch_growth_claim": (3.0, 2.0),
    "paper_memory_claim": ("RoBERTa-large", 5000.0, 4096),
    "exact_fits_claim": (1500.0, 1024),
    "loss_falls_claim": ("MeZO", WIDE + 4, WIDE + 4.2 + NOISE),
    "gradient_wins_claim": (WIDE + 4.2 + NOISE, WIDE + 4, 10),
    "accuracy_gain_claim": ("MeZO", RIGHT, WRONG),
}
HOLDS = {
    "mezo_by_hand_claim": (G, G + 1e-6),
    "weights_by_hand_claim": (1e-8,),
    "predicted_slope_claim": (G + NOISE, G),
    "alignment_claim": (D, HALF),
    "epsilon_claim": (np.array([1e-1, 1e-5, 1e-3]), np.array([3.0, 1.0, 0.01])),
    "mezo_trains_claim": (envelope("finished", None, 900.0),),
    "adam_killed_claim": (envelope("killed", 9, 1030.0),),
    "prediction_claim": (np.array([800.0, 1000.0]), np.array([790.0, 1050.0])),
    "replay_claim": ("0123", "0123"),
    "log_size_claim": (700, 12),
    "batch_growth_claim": (2.0, 3.0),
    "paper_memory_claim": ("RoBERTa-large", 2000.0, 4096),
    "exact_fits_claim": (800.0, 1024),
    "loss_falls_claim": ("MeZO", WIDE + 4.2 + NOISE, WIDE + 4),
    "gradient_wins_claim": (WIDE + 4, WIDE + 4.2 + NOISE, 10),
    "accuracy_gain_claim": ("MeZO", WRONG, RIGHT),
}
