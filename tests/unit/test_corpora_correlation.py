"""The measure of temporal correlation."""

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pllm_helpers.corpora import temporal_correlation
from pllm_helpers.runtime import InputError


def test_by_hand():
    # neighbours agree in 2 of 3; a random order of two a and two b agrees in 1 of 3
    assert temporal_correlation("aabb") == pytest.approx([0.5])


def test_blocks_decay_and_alternation_is_negative():
    blocks = temporal_correlation([i // 50 for i in range(200)], max_lag=60)
    assert blocks[0] > 0.97 and np.all(np.diff(blocks[:50]) < 0) and blocks[-1] < 0
    assert temporal_correlation("ab" * 50)[0] < -0.97


@pytest.mark.parametrize("seed", range(3))
def test_a_shuffled_stream_has_none(seed):
    labels = [i // 500 for i in range(3000)]
    random.Random(seed).shuffle(labels)
    assert abs(temporal_correlation(labels, max_lag=5)).max() < 0.05


@given(st.permutations(list("aaabbc")), st.integers(1, 5))
def test_against_a_slow_reading(labels, lag):
    pairs = [(i, j) for i in range(6) for j in range(6) if i != j]
    chance = sum(labels[i] == labels[j] for i, j in pairs) / len(pairs)
    share = sum(labels[i] == labels[i + lag] for i in range(6 - lag)) / (6 - lag)
    assert temporal_correlation(labels, max_lag=lag)[-1] == pytest.approx((share - chance) / (1 - chance))


@pytest.mark.parametrize("labels,lag", [("ab", 2), ("ab", 0), ("", 1), ("a", 1), ("aaa", 1)])
def test_nothing_to_measure(labels, lag):
    with pytest.raises(InputError):
        temporal_correlation(labels, max_lag=lag)
