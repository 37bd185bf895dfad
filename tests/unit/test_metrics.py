"""The metrics against plain loops, known values, invariances and edges; batch against scalar; the released code."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from pllm_helpers.runtime import InputError
from pllm_helpers.selection import (
    READINGS,
    DomainMeans,
    batched_entropy,
    domain_specific_score,
    dominant_domain,
    entropy_of_embedding,
    in_domain_dissimilarity,
)

component = st.floats(-100, 100).map(lambda x: 0.0 if abs(x) < 1e-3 else x)
tokens = st.integers(1, 9).flatmap(
    lambda n: st.integers(1, 7).flatmap(lambda d: arrays(np.float64, (n, d), elements=component))
)
LEXICONS = {"drug": {"ibuprofen", "aspirin"}, "fear": {"afraid", "scared"}, "both": {"aspirin", "afraid"}}
word = st.sampled_from(["ibuprofen", "aspirin", "afraid", "scared", "the", "cat", "sat"])


def slow_entropy(rows, reading):
    """An independent reference: Python floats, no matrix library but a general eigenvalue routine."""
    n, d = len(rows), len(rows[0])
    if reading == "histogram":
        mean = [sum(r[j] for r in rows) / n for j in range(d)]
        low, high = min(mean), max(mean)
        if low == high:
            low, high = low - 0.5, high + 0.5
        edges = np.linspace(low, high, 101)
        counts = [0] * 100
        for x in mean:
            place = max(k for k in range(100) if edges[k] <= x)
            counts[place] += 1
        return -sum(c / d * math.log2(c / d) for c in counts if c) / math.log2(n + 1)
    if n == 1:
        return 0.0
    lengths = [math.sqrt(sum(x * x for x in r)) for r in rows]
    if sum(lengths) == 0:
        return 0.0
    if reading == "norm":
        p = [v / sum(lengths) for v in lengths]
    else:
        unit = [[x / v for x in r] for r, v in zip(rows, lengths, strict=True) if v > 0]
        gram = [[sum(a * b for a, b in zip(u, w, strict=True)) / len(unit) for w in unit] for u in unit]
        p = [max(0.0, x.real) for x in np.linalg.eigvals(np.array(gram))]
    return -sum(x * math.log(x) for x in p if x > 1e-15) / math.log(n)


@given(tokens, st.sampled_from(READINGS))
@settings(max_examples=200, deadline=None)
def test_entropy_equals_the_slow_reference(x, reading):
    assert entropy_of_embedding(x, reading) == pytest.approx(slow_entropy(x.tolist(), reading), abs=1e-6)


@given(tokens, st.sampled_from(("norm", "spectral")), st.randoms(use_true_random=False), st.floats(1e-3, 1e3))
@settings(max_examples=100, deadline=None)
def test_entropy_is_bounded_and_ignores_order_rotation_and_scale(x, reading, random, scale):
    value = entropy_of_embedding(x, reading)
    assert 0 <= value <= 1
    order = list(range(len(x)))
    random.shuffle(order)
    rotation, _ = np.linalg.qr(np.random.default_rng(random.randrange(1000)).normal(size=(x.shape[1],) * 2))
    for other in (x[order], x @ rotation, x * scale):
        assert entropy_of_embedding(other, reading) == pytest.approx(value, abs=1e-6)


def test_known_values():
    same, orthogonal = np.ones((4, 3)), np.eye(4)
    assert entropy_of_embedding(same, "spectral") == pytest.approx(0, abs=1e-9)
    assert entropy_of_embedding(orthogonal, "spectral") == pytest.approx(1)
    assert entropy_of_embedding(same, "norm") == pytest.approx(1)  # the literal reading loves repetition
    assert entropy_of_embedding([[3.0, 4.0], [0.0, 5.0]], "norm") == pytest.approx(1)
    two_pairs = np.array([[1.0, 0], [1, 0], [0, 1], [0, 1]])
    assert entropy_of_embedding(two_pairs, "spectral") == pytest.approx(0.5)
    assert entropy_of_embedding([[1.0, 0], [3.0, 0]], "norm") == pytest.approx(
        -(0.25 * math.log(0.25) + 0.75 * math.log(0.75)) / math.log(2)
    )


@pytest.mark.parametrize("reading", READINGS)
def test_edges(reading):
    assert math.isfinite(entropy_of_embedding([[1.0, 2.0]], reading))
    if reading != "histogram":
        assert entropy_of_embedding([[1.0, 2.0]], reading) == 0
        assert entropy_of_embedding(np.zeros((3, 4)), reading) == 0
        for size in (1e-160, 1e160):  # squares under- and overflow
            value = entropy_of_embedding(np.array([[1.0, 2], [2, 1], [-1, 3]]) * size, reading)
            assert value == pytest.approx(entropy_of_embedding([[1.0, 2], [2, 1], [-1, 3]], reading))
    for bad in (
        np.zeros((0, 3)),
        np.zeros((3, 0)),
        np.zeros(3),
        np.zeros((2, 2, 2)),
        [[1.0, math.nan]],
        [[1.0, math.inf]],
    ):
        with pytest.raises(InputError, match="token_embeddings"):
            entropy_of_embedding(bad if isinstance(bad, list) else bad.tolist(), reading)
    with pytest.raises(InputError, match="reading"):
        entropy_of_embedding(np.ones((2, 2)), "shannon")
    for bad in ([[1j, 2.0]], [["a", "b"]]):
        with pytest.raises(InputError, match="numbers"):
            entropy_of_embedding(bad, reading)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_torch_equals_numpy(dtype):
    x = torch.randn(6, 8, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    for reading in READINGS:
        assert entropy_of_embedding(x, reading) == entropy_of_embedding(x.detach().double().numpy(), reading)
    assert in_domain_dissimilarity(x[0], x[1:]) == pytest.approx(
        in_domain_dissimilarity(x[0].detach().double().numpy(), x[1:].detach().double().numpy())
    )


@pytest.mark.parametrize("reading", READINGS)
@pytest.mark.parametrize("mode", ["paper", "released_code"])
def test_batch_equals_scalar(reading, mode):
    g = torch.Generator().manual_seed(1)
    for n, d in ((12, 16), (12, 5), (1, 4)):  # wide and tall Gram matrices
        x, lengths = torch.randn(30, n, d, generator=g), torch.randint(0, n + 1, (30,), generator=g)
        mask = torch.arange(n) < lengths[:, None]
        mask[:, 0] &= torch.rand(30, generator=g) < 0.8  # a special token in front
        x[3] = x[3, :1]
        got = batched_entropy(x, mask, reading=reading, mode=mode)
        for row in range(30):
            kept = x[row][mask[row]]
            expected = entropy_of_embedding(kept, reading, mode=mode) if len(kept) else 0.0
            assert got[row].item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_batch_bins_coarse_numbers_as_numpy_does(dtype):
    """Components on a coarse grid fall on bin edges, where rounding decides about the bin."""
    x = torch.randn(200, 3, 576, generator=torch.Generator().manual_seed(0)).to(dtype)
    x[0] = 1.0  # all in one bin
    got = batched_entropy(x, torch.ones(200, 3, dtype=torch.bool), mode="released_code")
    expected = [entropy_of_embedding(v, mode="released_code") for v in x]
    np.testing.assert_allclose(got.numpy(), expected, atol=1e-9)


@pytest.mark.parametrize("reading", READINGS)
def test_batch_refuses_nan_at_tokens_and_ignores_it_at_padding(reading):
    x, mask = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(2)), torch.ones(3, 5, dtype=torch.bool)
    mask[1, 3:] = False
    expected = batched_entropy(x, mask, reading=reading)
    for odd in (math.nan, math.inf):
        broken = x.clone()
        broken[1, 4] = odd
        torch.testing.assert_close(batched_entropy(broken, mask, reading=reading), expected)
        broken[2, 0, 1] = odd
        with pytest.raises(InputError, match="finite"):
            batched_entropy(broken, mask, reading=reading)


@given(st.lists(word, max_size=12))
def test_domain_scores_equal_the_slow_reference(words):
    hits = {}
    for name, lexicon in LEXICONS.items():
        hits[name] = 0
        for w in words:
            if w in lexicon:
                hits[name] += 1
    expected = sum(h / len(words) for h in hits.values()) / 3 if words else 0.0
    assert domain_specific_score(words, LEXICONS) == pytest.approx(expected)
    first = None
    for name in LEXICONS:
        if hits[name] and (first is None or hits[name] > hits[first]):
            first = name
    assert dominant_domain(words, LEXICONS) == first


def test_domain_edges():
    assert dominant_domain(["aspirin"], LEXICONS) == "drug"  # ties go to the first lexicon
    assert dominant_domain(["aspirin"], {k: list(LEXICONS[k]) for k in ("both", "drug")}) == "both"
    assert dominant_domain([], LEXICONS) is None and domain_specific_score([], LEXICONS) == 0
    assert domain_specific_score(["aspirin", "aspirin", "x", "y"], LEXICONS) == pytest.approx(2 * 0.5 / 3)
    for call in (domain_specific_score, dominant_domain):
        with pytest.raises(InputError, match="lexicons"):
            call(["a"], {})
        with pytest.raises(InputError, match="tokens"):
            call("one text", LEXICONS)


@given(
    arrays(np.float64, 4, elements=component),
    st.integers(0, 5).flatmap(lambda r: arrays(np.float64, (r, 4), elements=component)),
)
@settings(deadline=None)
def test_dissimilarity_equals_the_slow_reference(e, others):
    if not e.any() or any(not row.any() for row in others):
        if len(others):
            with pytest.raises(InputError, match="zero vector"):
                in_domain_dissimilarity(e, others)
        return
    total = 0.0
    for row in others:
        dot = sum(a * b for a, b in zip(e, row, strict=True))
        total += 1 - dot / math.sqrt(sum(a * a for a in e)) / math.sqrt(sum(b * b for b in row))
    expected = total / len(others) if len(others) else 1.0
    assert in_domain_dissimilarity(e, others) == pytest.approx(expected, abs=1e-9)
    released = 1 - expected if len(others) else 0.0
    assert in_domain_dissimilarity(e, others, mode="released_code") == pytest.approx(released, abs=1e-9)
    means = DomainMeans()
    for row in others:
        means.add(row, "d")
        means.add(-row, "other")
    assert means.idd(e, "d") == pytest.approx(expected, abs=1e-9)
    assert means.idd(e, "d", mode="released_code") == pytest.approx(released, abs=1e-9)


def test_dissimilarity_edges():
    e = np.array([1.0, 0.0])
    assert in_domain_dissimilarity(e, np.zeros((0, 2))) == in_domain_dissimilarity(e, []) == 1
    assert in_domain_dissimilarity(e, [[2.0, 0.0]]) == pytest.approx(0)
    assert in_domain_dissimilarity(e, [[-3.0, 0.0]]) == pytest.approx(2)
    assert in_domain_dissimilarity(e, [[0.0, 1.0], [5.0, 0.0]]) == pytest.approx(0.5)
    with pytest.raises(InputError, match="dimensions"):
        in_domain_dissimilarity(e, [[1.0, 1.0, 1.0]])
    with pytest.raises(InputError, match="finite"):
        in_domain_dissimilarity(e, [[math.nan, 1.0]])
    for size in (1e-170, 1e170):  # squares under- and overflow
        means = DomainMeans()
        means.add(np.array([0.0, size]), "d")
        assert in_domain_dissimilarity(e * size, [[0.0, size], [size, size]]) == pytest.approx(1 - math.sqrt(0.5) / 2)
        assert means.idd(np.array([size, size]), "d") == pytest.approx(1 - math.sqrt(0.5))


def test_domain_means_forget():
    rng = np.random.default_rng(0)
    rows, e, means = rng.normal(size=(50, 8)), rng.normal(size=8), DomainMeans()
    for row in rows:
        means.add(row, None)
    for row in rows[:49]:
        means.remove(row, None)
    assert means.idd(e, None) == pytest.approx(in_domain_dissimilarity(e, rows[49:]), abs=1e-12)
    means.remove(rows[49], None)
    assert means.idd(e, None) == 1
    with pytest.raises(InputError, match="none"):
        means.remove(rows[0], None)


def test_released_code_departs_as_described():
    """The histogram entropy rewards short texts and exceeds 1; simulated values of papers: 2.27, 1.03, 0.68."""
    rng = np.random.default_rng(0)
    values = {
        n: np.mean([entropy_of_embedding(rng.normal(size=(n, 3200)), mode="released_code") for _ in range(5)])
        for n in (5, 50, 400)
    }
    assert values[5] > values[50] > values[400]
    assert (
        values[5] == pytest.approx(2.27, abs=0.06)
        and values[50] == pytest.approx(1.03, abs=0.04)
        and values[400] == pytest.approx(0.68, abs=0.03)
    )
    x = rng.normal(size=(6, 64))
    changed = x.copy()
    changed[:5] = rng.normal(size=(5, 64))  # only the last token's vector is looked at
    assert entropy_of_embedding(x, mode="released_code") == entropy_of_embedding(changed, mode="released_code")
