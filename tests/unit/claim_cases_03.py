"""Data for the claims of notebook 03: where each must fail, and where it must hold."""

import numpy as np

rng = np.random.default_rng(3)
IDS = [f"original {i // 4}" for i in range(160)]  # four attempts on each of forty
RARE, OFTEN = ((rng.random(160) < p).tolist() for p in (0.1, 0.9))
NOISE = rng.normal(0, 0.05, 40)
MARKS = [("a", "yes"), ("b", "no")]

FAILS = {
    "rouge_by_hand_claim": ("the package's", np.array([0.5, 1.0]), np.array([0.5, 0.9])),
    "restart_claim": (MARKS, [("a", "yes"), ("b", "No")]),
    "asking_at_the_end_claim": ("FIFO", np.array([41, 42, 44]), np.array([40, 40, 40])),
    "paper_prompt_claim": (RARE, IDS),
    "few_shot_claim": (RARE, IDS, OFTEN, IDS),
    "copies_claim": (np.zeros(40),),
    "nearer_than_unrelated_claim": (0.3 + NOISE, 0.3 + NOISE[::-1]),
    "kept_reply_claim": (4 + NOISE, 3 + NOISE[::-1]),
}
HOLDS = {
    "rouge_by_hand_claim": ("the package's", np.array([0.5, 1.0]), np.array([0.5, 1.0])),
    "restart_claim": (MARKS, MARKS),
    "asking_at_the_end_claim": ("FIFO", np.array([300, 320, 310]), np.array([40, 40, 40])),
    "paper_prompt_claim": (OFTEN, IDS),
    "few_shot_claim": (OFTEN, IDS, RARE, IDS),
    "copies_claim": (0.3 + NOISE,),
    "nearer_than_unrelated_claim": (0.8 + NOISE, 0.2 + NOISE[::-1]),
    "kept_reply_claim": (3 + NOISE, 4 + NOISE[::-1]),
}
