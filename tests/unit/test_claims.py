"""Every claim function is able to fail: each gets data on which it must say so, and data on which it holds."""

import importlib
import inspect
import pkgutil
import runpy
from pathlib import Path

import pytest

import pllm_helpers.experiments as experiments
from pllm_helpers.evaluation import Claim

FAILS, HOLDS = {}, {}
for path in sorted(Path(__file__).parent.glob("claim_cases_*.py")):  # one file per notebook
    cases = runpy.run_path(str(path))
    FAILS |= cases["FAILS"]
    HOLDS |= cases["HOLDS"]


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
