"""Intervals cover what they should, and verdicts follow the stated rule."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pllm_helpers.evaluation import Estimate, bootstrap_interval, check_claim, rank_correlation
from pllm_helpers.runtime import InputError

number = st.floats(-1e6, 1e6)


@given(st.tuples(number, number, number).map(sorted), number)
def test_verdicts_partition(triple, bound):
    low, value, high = triple
    estimate = Estimate(value, low, high, 10)
    above, below = check_claim("c", estimate, above=bound), check_claim("c", estimate, below=bound)
    assert above.verdict == ("holds" if low >= bound else "fails" if high < bound else "inconclusive")
    assert below.verdict == ("holds" if high <= bound else "fails" if low > bound else "inconclusive")
    if low < bound < high:
        assert above.verdict == below.verdict == "inconclusive"


def test_range_claim():
    assert check_claim("c", 0.5, above=0, below=1).verdict == "holds"
    assert check_claim("c", 2, above=0, below=1).verdict == "fails"
    assert check_claim("c", Estimate(0.9, 0.5, 1.5), above=0, below=1).verdict == "inconclusive"
    assert check_claim("c", 2, above=0, below=1).bound == "at least 0 and at most 1"


def test_interval_covers_the_mean_at_its_level():
    rng = np.random.default_rng(0)
    hits = 0
    for trial in range(200):
        e = bootstrap_interval(rng.exponential(2.0, 60), seed=trial, resamples=400)
        hits += e.low <= 2.0 <= e.high
    assert 0.86 <= hits / 200 <= 0.98  # 95 % nominal; the percentile bootstrap is a little short at n = 60


def test_paired_interval_is_narrower_than_unpaired():
    rng = np.random.default_rng(1)
    shared = rng.normal(0, 10, 200)
    a, b = shared + rng.normal(1, 0.5, 200), shared + rng.normal(0, 0.5, 200)
    paired = bootstrap_interval(a, b, statistic=lambda x, y: x.mean() - y.mean())
    shuffled = bootstrap_interval(a, rng.permutation(b), statistic=lambda x, y: x.mean() - y.mean())
    assert paired.low > 0 and paired.high - paired.low < 0.2 * (shuffled.high - shuffled.low)


def test_interval_is_reproducible_and_seeded():
    x = list(range(30))
    assert bootstrap_interval(x, seed=1) == bootstrap_interval(x, seed=1)
    assert bootstrap_interval(x, seed=1).low != bootstrap_interval(x, seed=2).low


@pytest.mark.parametrize("bad", [[], [1.0], [1.0, math.nan], [1.0, math.inf], [[1.0, 2.0], [3.0, 4.0]]])
def test_interval_refuses(bad):
    with pytest.raises(InputError, match="samples"):
        bootstrap_interval(np.array(bad))
    with pytest.raises(InputError):
        bootstrap_interval([1.0, 2.0], [1.0, 2.0, 3.0])
    with pytest.raises(InputError, match="level"):
        bootstrap_interval([1.0, 2.0], level=95)


def test_estimate_and_claim_refuse():
    with pytest.raises(InputError, match="NaN"):
        Estimate(math.nan, 0, 1)
    with pytest.raises(InputError, match="low <= high"):
        Estimate(0, 1, 0)
    with pytest.raises(InputError, match="bound"):
        check_claim("c", 1)
    with pytest.raises(InputError, match="kind"):
        check_claim("c", 1, above=0, kind="guess")


def test_rank_correlation_known_values():
    assert rank_correlation([1, 2, 3, 4], [10, 20, 30, 4000]) == pytest.approx(1)
    assert rank_correlation([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1)
    assert rank_correlation([1, 2, 3], [5, 5, 5]) == 0
