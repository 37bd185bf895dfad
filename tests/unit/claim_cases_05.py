"""Data for the claims of notebook 05: where each must fail, and where it must hold."""

import numpy as np

from pllm_helpers.evaluation import Estimate

rng = np.random.default_rng(5)
BASE = rng.normal(0.2, 0.05, (5, 40))
NOISE = rng.normal(0, 0.01, (5, 40))
BETTER, WORSE, SAME = BASE + 0.05 + NOISE, BASE - 0.05 + NOISE, BASE + NOISE / 10
X, Y = np.linspace(-1, 1, 40), rng.normal(0, 1, 400)

WINS = {"a": (BETTER, BASE), "b": (BETTER, BASE)}
LOSES = {"a": (WORSE, BASE), "b": (WORSE, BASE)}
MIXED = {"a": (BETTER, BASE), "b": (WORSE, BASE)}  # one loss is enough against "everywhere"
DRAW = {"a": (SAME, BASE), "b": (SAME, BASE)}
SPLIT = {"a against x": (BASE * 1.5, BASE), "a against y": (BASE * 1.1 + NOISE, BASE)}

FAILS = {
    "paper_agrees_claim": (np.array([0.3, 0.2]), np.array([0.3, 0.21])),
    "headline_claim": (0.3, 0.271),
    "paired_by_hand_claim": (Estimate(0.0, -1.0, 1.0), Estimate(0.5, -0.5, 1.5)),
    "beats_everywhere_claim": ("Quality", "Random replace", MIXED),
    "improvement_claim": (WINS,),
    "beyond_chance_claim": (LOSES,),
    "ablation_claim": ("EOE alone", LOSES),
    "faster_learning_claim": ("Random replace", LOSES),
    "personalization_claim": ("quality", LOSES),
    "released_code_claim": (LOSES,),
    "buffer_size_claim": (8, 128, LOSES),
    "synthesis_claim": (1, 6, LOSES),
    "saturation_claim": (6, 9, WINS),
    "rouge_and_nll_claim": (X, X),
    "rouge_and_length_claim": (X, X),
    "copying_claim": (X / 100 + 0.5, X / 100 + 0.1),
    "buffer_relation_claim": ("length", Y[:200], Y[200:]),
    "same_in_practice_claim": ("Quality", "Random replace", LOSES),
}
HOLDS = {
    "paper_agrees_claim": (np.array([0.3, 0.2]), np.array([0.301, 0.2])),
    "headline_claim": (0.3736, 0.271),
    "paired_by_hand_claim": (Estimate(0.0, -1.0, 1.0), Estimate(0.01, -0.99, 1.01)),
    "beats_everywhere_claim": ("Quality", "Random replace", WINS),
    "improvement_claim": (SPLIT,),
    "beyond_chance_claim": (SPLIT,),
    "ablation_claim": ("EOE alone", WINS),
    "faster_learning_claim": ("Random replace", WINS),
    "personalization_claim": ("quality", WINS),
    "released_code_claim": (WINS,),
    "buffer_size_claim": (8, 128, WINS),
    "synthesis_claim": (1, 6, WINS),
    "saturation_claim": (6, 9, DRAW),
    "rouge_and_nll_claim": (X, -X),
    "rouge_and_length_claim": (Y[:200], Y[200:]),
    "copying_claim": (X / 100 + 0.1, X / 100 + 0.5),
    "buffer_relation_claim": ("length", X, -X),
    "same_in_practice_claim": ("Quality", "Random replace", DRAW),
}
