"""Every claim function is able to fail: each gets data on which it must say so, and data on which it holds."""

import importlib
import inspect
import pkgutil

import numpy as np
import pytest

import pllm_helpers.experiments as experiments
from pllm_helpers.evaluation import Claim

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


def claim_functions():
    found = {}
    for module in pkgutil.iter_modules(experiments.__path__):
        loaded = importlib.import_module(f"{experiments.__name__}.{module.name}")
        found |= {
            n: f
            for n, f in inspect.getmembers(loaded, inspect.isfunction)
            if n.endswith("_claim") and f.__module__ == loaded.__name__
        }
    return found


def test_every_claim_function_is_here():
    assert set(claim_functions()) == set(FAILS) == set(HOLDS)


@pytest.mark.parametrize("name", FAILS)
def test_fails_where_it_must(name):
    result = claim_functions()[name](*FAILS[name])
    assert isinstance(result, Claim) and result.verdict == "fails", result


@pytest.mark.parametrize("name", HOLDS)
def test_holds_where_it_must(name):
    assert claim_functions()[name](*HOLDS[name]).verdict == "holds"
