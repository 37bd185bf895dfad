"""Data for the claims of notebook 07: where each must fail, and where it must hold."""

import numpy as np

rng = np.random.default_rng(7)
SMALL, BASE = rng.normal(0, 0.01, 200), rng.normal(4, 0.4, 200)
LOW, HIGH = [BASE, BASE + 0.1], [BASE + 0.5 + SMALL, BASE + 0.6 + SMALL]
SAME = [BASE + SMALL, BASE + 0.1 + SMALL]
RIGHT, WRONG = np.array([1.0] * 90 + [0.0] * 10), np.array([1.0] * 10 + [0.0] * 90)
EASY, MANY = np.linspace(1, 6, 200), np.linspace(1, 6, 4000)
COUNTS = np.array([10, 20, 30])

FAILS = {
    "count_by_hand_claim": (COUNTS, COUNTS + 1),
    "built_model_claim": (COUNTS, COUNTS + 1),
    "published_sizes_claim": (COUNTS * 1e6, COUNTS * 1e6 + 3e5, np.full(3, 1e5)),
    "embedding_share_claim": (0.1, 0.09),
    "blocks_claim": (np.array([5, 5]), np.array([10, 11])),
    "better_shape_claim": ("this", "that", (HIGH, LOW)),
    "quantised_by_hand_claim": ([SMALL + 1], [SMALL + 1.01]),
    "size_claim": (100, 60),
    "grid_claim": (0.08, 0.1),
    "int8_loss_claim": (HIGH, LOW),
    "int4_loss_claim": (HIGH, LOW),
    "decode_speed_claim": (np.full(9, 20.0), np.linspace(10, 15, 9)),
    "task_kept_claim": ("qa", WRONG, RIGHT, "int4"),
    "chat_probe_claim": (WRONG,),
    "tuned_task_claim": ("qa", [WRONG], [RIGHT], "F1"),
    "cold_start_claim": (10, LOW, HIGH),
    "more_data_claim": (10, 500, LOW, HIGH),
    "both_claim": (10, HIGH, LOW, HIGH),
    "choice_by_difficulty_claim": (MANY, np.tile([4.0, 4.1, 4.2, 4.3], 1000), np.full(4000, 4.0)),
    "longer_tuning_claim": (50, 4, HIGH, LOW),
    "compressed_claim": (10, LOW, HIGH),
}
HOLDS = {
    "count_by_hand_claim": (COUNTS, COUNTS),
    "built_model_claim": (COUNTS, COUNTS),
    "published_sizes_claim": (COUNTS * 1e6, COUNTS * 1e6 + 5e4, np.full(3, 1e5)),
    "embedding_share_claim": (0.13, 0.03),
    "blocks_claim": (np.array([5, 5]), np.array([10, 18])),
    "better_shape_claim": ("this", "that", (LOW, HIGH)),
    "quantised_by_hand_claim": ([SMALL + 1], [SMALL + 1]),
    "size_claim": (100, 40),
    "grid_claim": (0.01, 0.1),
    "int8_loss_claim": (SAME, LOW),
    "int4_loss_claim": (SAME, LOW),
    "decode_speed_claim": (np.full(9, 20.0), np.linspace(25, 30, 9)),
    "task_kept_claim": ("qa", RIGHT, RIGHT, "int4"),
    "chat_probe_claim": (RIGHT,),
    "tuned_task_claim": ("qa", [RIGHT], [WRONG], "F1"),
    "cold_start_claim": (10, HIGH, LOW),
    "more_data_claim": (10, 500, HIGH, LOW),
    "both_claim": (10, LOW, HIGH, HIGH),
    "choice_by_difficulty_claim": (EASY, 5 - EASY, np.full(200, 4.0)),
    "longer_tuning_claim": (50, 4, LOW, HIGH),
    "compressed_claim": (10, HIGH, LOW),
}
