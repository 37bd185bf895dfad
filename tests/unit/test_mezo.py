"""MeZO on a tiny model: noise, estimate and update against plain transcriptions; replay, kills, damage, bad input."""

import json
import math
import os
import random
import signal
import subprocess
import sys
import time
import traceback
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from pllm_helpers.dialogue import DialogueSet
from pllm_helpers.evaluation import response_nll
from pllm_helpers.runtime import InputError
from pllm_helpers.tuning import (
    Recipe,
    ReplayLog,
    adapted,
    answer_loss,
    load_result,
    perturb_,
    private_copy,
    read_log,
    replay,
    restoring_drift,
    spsa_gradient,
    tune_lora,
    tune_mezo,
)
from pllm_helpers.tuning import perturb as perturb_module
from pllm_helpers.tuning.data import batch_stream, token_rows
from pllm_helpers.tuning.forward import plain_objective
from pllm_helpers.tuning.mezo import LOOKS, SNAPSHOT, AnswerLoss, MezoRun
from pllm_helpers.tuning.perturb import BLOCK, CHUNK, Pass, Rademacher, all_finite, blocks, sweep_
from pllm_helpers.tuning.replay import REPLAY, LogWriter, start_of, weights_hash
from tests.unit.tuning_kit import dialogue_sets, tiny_llm

ROOT = Path(__file__).parents[2]
IDS = torch.arange(20, 40)[None]
SHORT = dict(steps=6, lr=1e-4, batch_size=3, progress=False)
LORA = dict(parameters="lora", rank=4, lr=0.01)
KINDS = {
    "gaussian": {},
    "rademacher": dict(noise="rademacher"),
    "bf16": dict(dtype="bf16"),
    "bf16 signs": dict(dtype="bf16", noise="rademacher", epsilon=2**-10, weight_decay=0.5),
    "bf16 nearest": dict(dtype="bf16", rounding="nearest", directions=2),
    "directions": dict(directions=3, weight_decay=0.5),
    "one-sided": dict(noise="rademacher", directions=3, estimator="one_sided", normalize=True, lr=1e-3),
    "lora": LORA,
    "lora signs": LORA | dict(noise="rademacher", directions=2, weight_decay=0.5),
    "lora together": LORA | dict(noise="rademacher", directions=2, together=True, layers="upper", weight_decay=0.5),
}


@pytest.fixture(scope="module")
def llm():
    return tiny_llm()


@pytest.fixture(scope="module")
def data():
    return dialogue_sets()


def tuned_tensors(result):
    return result.weights or result.adapter


def same(a, b) -> bool:
    a, b = tuned_tensors(a), tuned_tensors(b)
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# --- noise ---


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 300), min_size=1, max_size=5), st.integers(0, 2**32 - 1), st.booleans())
def test_gaussian_noise_is_that_of_the_official_code(sizes, seed, narrow):
    """One ``torch.normal`` per tensor after ``manual_seed``, though drawn in chunks of 64 here."""
    dtype = torch.bfloat16 if narrow else torch.float32
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        expected = [torch.normal(mean=0, std=1, size=(n,), dtype=dtype) for n in sizes]
    found = [torch.zeros(n, dtype=dtype) for n in sizes]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(perturb_module, "CHUNK", 64)
        perturb_(found, seed, 1.0)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_gaussian_noise_of_tensors_larger_than_a_chunk():
    shapes = [(CHUNK + 5,), (CHUNK // 8, 16), (3,), (2 * CHUNK + 16,)]
    found = [torch.zeros(s) for s in shapes]
    perturb_(found, 7, 1.0)
    with torch.random.fork_rng():
        torch.manual_seed(7)
        assert all(torch.equal(p, torch.normal(mean=0, std=1, size=p.size())) for p in found)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_signs_are_the_bits_of_the_mersenne_twister(dtype):
    """As NumPy has it, so that a log means the same on every machine."""
    for seed, n in ((0, 64 * 5), (2**32 - 1, 1000), (5, 1)):
        draws = np.random.RandomState(seed)._bit_generator.random_raw(2 * -(-n // 64)).astype(np.uint64)
        words = (draws[::2] << np.uint64(32) | draws[1::2]).view("<u2")
        bits = np.array([[int(w) >> (15 - k) & 1 for w in words] for k in range(16)])
        found = torch.zeros(n, dtype=dtype)
        perturb_([found], seed, 1.0, "rademacher")
        np.testing.assert_array_equal(found.double().numpy(), 1.0 - 2 * bits.flatten()[:n])


def test_signs_of_large_tensors_go_on_block_by_block():
    """A block has a layout of its own; several at once are the same as one after the other."""
    sizes = [BLOCK, BLOCK, BLOCK, BLOCK, BLOCK, BLOCK + 7]
    assert blocks(sum(sizes)) == sizes and blocks(BLOCK + 16) == [BLOCK, 16] and blocks(7) == [7]
    whole, parts = torch.zeros(sum(sizes)), [torch.zeros(n) for n in sizes]
    perturb_([whole], 3, 1.0, "rademacher")
    perturb_(parts, 3, 1.0, "rademacher")
    assert torch.equal(whole, torch.cat(parts))
    Rademacher(3, torch.device("cpu")).fill(torch.empty(0))  # an empty tensor draws nothing


def test_signs_are_fair_and_independent_of_their_neighbours():
    z = torch.zeros(1 << 22)
    perturb_([z], 1, 1.0, "rademacher")
    error = 5 / math.sqrt(len(z))
    assert set(z.unique().tolist()) == {-1.0, 1.0} and abs(z.mean().item()) < error
    for lag in (1, 2, 16, 64, BLOCK // 16, BLOCK, CHUNK):  # in the tensor, in a word, in a block, between blocks
        assert abs((z[lag:] * z[:-lag]).mean().item()) < error * math.sqrt(len(z) / (len(z) - lag))
    other = torch.zeros_like(z)
    perturb_([other], 2, 1.0, "rademacher")
    assert abs((z * other).mean().item()) < error


class LargestTemporary(TorchDispatchMode):
    """Bytes of the largest tensor that comes out of an operation without being part of one that was there."""

    def __init__(self, known):
        super().__init__()
        self.known, self.bytes = {t.untyped_storage().data_ptr() for t in known}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.untyped_storage().data_ptr() not in self.known:
            self.bytes = max(self.bytes, out.untyped_storage().nbytes())
        return out


@pytest.mark.parametrize("noise", ["gaussian", "rademacher"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_is_as_large_as_a_weight(noise, dtype):
    big = torch.zeros(3000, 1000, dtype=dtype)
    passes = [Pass(((1, 1e-3),)), Pass(((1, -2e-3),)), Pass(((1, 1e-3),), 0.9, ((1, 0.1), (2, 0.1)), dither=3)]
    with LargestTemporary([big]) as seen:
        sweep_([big], passes, noise)
    assert 0 < seen.bytes <= 4 * (CHUNK + 64)  # four megabytes
    with LargestTemporary([big]) as seen:  # the official way is seen to be larger
        big.data = big.data + torch.normal(mean=0, std=1, size=big.size(), dtype=dtype)
    assert seen.bytes >= big.nbytes


def test_looking_for_nan_makes_nothing_large():
    big = torch.zeros(3000, 1000)
    with LargestTemporary([big]) as seen:
        assert all_finite([torch.ones(3), big])
    assert 0 < seen.bytes <= 4 * (CHUNK + 64)
    for place, value in ((0, math.nan), (-1, math.inf), (CHUNK, -math.inf)):
        broken = big.clone()
        broken.view(-1)[place] = value
        assert not all_finite([big, broken])


@pytest.mark.parametrize("noise", ["gaussian", "rademacher"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length", [CHUNK + 7, 3 * BLOCK + 1001])
def test_updates_do_not_depend_on_the_number_of_threads(noise, dtype, length):
    """So that a log rebuilds the weights on a machine with other cores."""
    before, found = torch.get_num_threads(), []
    update = Pass(((3, -1e-3),), 0.9, ((4, 1e-4),), dither=7 if dtype == torch.bfloat16 else None)
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(torch.linspace(-1, 1, length).to(dtype))
            perturb_(found[-1:], 3, 1e-3, noise)
            sweep_(found[-1:], [update], noise)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*found)


def test_walks_leave_the_number_of_threads_as_it_was_and_do_not_depend_on_it():
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            weights = [torch.linspace(-1, 1, 3 * CHUNK + 7)]
            perturb_(weights, 5, 1e-3, "rademacher")
            perturb_(weights, 6, 1e-3, "gaussian")
            assert torch.get_num_threads() == threads
            found.append(weights[0])
        with pytest.raises(RuntimeError):
            perturb_([torch.ones(20, 20)[:, :7]], 5, 1e-3)  # cannot be walked in place
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*found)


@pytest.mark.parametrize("noise", ["gaussian", "rademacher"])
def test_several_passes_at_once_equal_walks_one_by_one_on_any_number_of_threads(noise):
    passes = [Pass(((1, 1e-3),)), Pass(((1, -2e-3),)), Pass(((1, 1e-3), (2, 1e-3)), 0.99, ((2, 0.1),))]
    start = torch.randn(1000, 613, generator=torch.Generator().manual_seed(0))
    found, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            together, apart = start.clone(), start.clone()
            sweep_([together], passes, noise)
            for one in passes:
                sweep_([apart], [one], noise)
            found += [together, apart]
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(found[0], other) for other in found[1:]) and not torch.equal(found[0], start)


# --- estimate ---


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 40), st.integers(0, 10**6), st.sampled_from(["gaussian", "rademacher"]))
def test_slope_of_a_quadratic(n, seed, noise):
    """``L = b'θ + θ'Aθ/2``: two-sided exactly ``z'∇L``, one-sided ``ε z'Az / 2`` more."""
    g = torch.Generator().manual_seed(seed)
    a, b, theta = (torch.randn(s, generator=g, dtype=torch.float64) for s in ((n, n), (n,), (n,)))
    a = a + a.T
    z = torch.zeros(n, dtype=torch.float64)
    perturb_([z], seed, 1.0, noise)
    before = theta.clone()

    def loss():
        return (b @ theta + theta @ a @ theta / 2).item()

    slope, curve = (z @ (b + a @ theta)).item(), (z @ a @ z).item()
    scale = 1 + abs(slope) + abs(curve)
    both = spsa_gradient(loss, [theta], seed=seed, epsilon=1e-3, noise=noise)
    one = spsa_gradient(loss, [theta], seed=seed, epsilon=1e-3, noise=noise, estimator="one_sided")
    assert both == pytest.approx(slope, abs=1e-8 * scale * n)
    assert one == pytest.approx(slope + 5e-4 * curve, abs=1e-8 * scale * n)
    torch.testing.assert_close(theta, before, rtol=0, atol=1e-12)


@pytest.mark.parametrize("noise", ["gaussian", "rademacher"])
def test_estimate_is_unbiased(noise):
    """Mean of ``g z`` over seeds: within 5 standard errors of the gradient in every coordinate."""
    theta = torch.tensor([0.3, -1.0, 2.0, 0.5], dtype=torch.float64)
    gradient = theta.cos()
    estimates = []
    for seed in range(2000):
        g = spsa_gradient(lambda: theta.sin().sum().item(), [theta], seed=seed, epsilon=1e-4, noise=noise)
        z = torch.zeros(4, dtype=torch.float64)
        perturb_([z], seed, 1.0, noise)
        estimates.append((g * z).numpy())
    mean, error = np.mean(estimates, 0), np.std(estimates, 0) / math.sqrt(len(estimates))
    assert (np.abs(mean - gradient.numpy()) < 5 * error + 1e-6).all()


def test_weights_come_back_when_the_loss_raises():
    theta = torch.ones(10, dtype=torch.float64)
    with pytest.raises(KeyError):
        spsa_gradient(lambda: {}["no"], [theta], seed=0)
    torch.testing.assert_close(theta, torch.ones_like(theta), rtol=0, atol=1e-15)


def official(llm, rows, steps, lr, eps, batch_size, seeds, decay):
    """MeZO as published (papers.md 2.2), not in place, on the blocks of transformers: slopes and weights."""
    twin = private_copy(llm, "fp32").model.requires_grad_(False)
    objective = plain_objective(twin, 0)
    weights = dict(twin.named_parameters())

    def walk(seed, scale):
        torch.manual_seed(seed)
        for p in weights.values():
            z = torch.normal(mean=0, std=1, size=p.data.size(), dtype=p.data.dtype)
            p.data = p.data + scale * z * eps

    stream, slopes = batch_stream([len(r.ids) for r in rows], batch_size, 0), []
    with torch.random.fork_rng(), torch.inference_mode():
        for _, seed in zip(range(steps), seeds, strict=False):
            batch = [rows[i] for i in next(stream)]
            losses = []
            for scale in (1, -2):
                walk(seed, scale)
                losses.append((objective(batch).sum() / sum(r.answer for r in batch)).item())
            walk(seed, 1)
            slopes.append((losses[0] - losses[1]) / (2 * eps))
            torch.manual_seed(seed)
            for name, p in weights.items():
                z = torch.normal(mean=0, std=1, size=p.data.size(), dtype=p.data.dtype)
                spared = "norm" in name or "bias" in name
                p.data = p.data - lr * (slopes[-1] * z + (0 if spared else decay) * p.data)
    return slopes, weights


def test_same_slopes_and_weights_as_a_plain_transcription(llm, data):
    rows = token_rows(llm, data, 512).rows
    more = dict(steps=4, lr=1e-5, batch_size=3, weight_decay=0.1)
    ours = tune_mezo(llm, data, **more, progress=False)
    seeds = [s for s, _ in ours.log.pairs()]
    slopes, weights = official(llm, rows, 4, 1e-5, 1e-3, 3, seeds, 0.1)
    np.testing.assert_allclose(ours.log.scalars[:, 0], slopes, rtol=2e-3, atol=5e-3)
    assert min(map(abs, slopes)) > 0.1
    for name, w in weights.items():
        torch.testing.assert_close(ours.weights[name], w, rtol=0, atol=3e-6)
    moved = max((ours.weights[k] - p).abs().max().item() for k, p in llm.model.named_parameters())
    assert moved > 1e-4


def test_scalars_follow_their_definitions():
    losses = [3.0, 2.0, 2.5, 3.5]
    two = Recipe(0, 0.1, 0.5, directions=2)
    assert two.scalars(losses) == [1.0, -1.0]
    one = Recipe(0, 0.1, 0.5, directions=3, estimator="one_sided")
    assert one.scalars(losses) == [-2.0, -1.0, 1.0]
    spread = np.std(losses[1:])  # FZOO: (l_i - l_0) / sigma
    np.testing.assert_allclose(one.scalars(losses, normalize=True), np.array([-1, -0.5, 0.5]) / spread, rtol=1e-6)
    assert one.scalars([1.0] * 4, normalize=True) == [0, 0, 0]


@pytest.mark.parametrize("estimator", ["two_sided", "one_sided"])
@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_a_step_measures_where_it_says_and_ends_where_it_should(estimator, decay):
    """Sums in double precision: places and result against the formula, three directions."""
    recipe = Recipe(3, 0.1, 1e-3, "rademacher", 3, estimator, decay)
    theta = [torch.ones(5, 4, dtype=torch.float64), torch.ones(6, dtype=torch.float64)]
    z = []
    for s in recipe.seeds(2):
        z.append([torch.zeros_like(t) for t in theta])
        perturb_(z[-1], s, 1.0, "rademacher")
    places = []
    for move in recipe.walk(2):
        if move:
            sweep_(theta, [move], recipe.noise)
        places.append([t.clone() for t in theta])
    signs = [(0, k, s) for k in range(3) for s in (1, -1)] if estimator == "two_sided" else [(0, 0, 0)]
    signs += [] if estimator == "two_sided" else [(0, k, 1) for k in range(3)]
    for found, (_, k, sign) in zip(places, signs, strict=True):
        for t, noise in zip(found, z[k], strict=True):
            torch.testing.assert_close(t, 1 + sign * 1e-3 * noise, rtol=0, atol=1e-14)
    scalars = [0.5, -2.0, 1.0]
    sweep_(theta, [recipe.update(2, scalars)], recipe.noise)
    for i, t in enumerate(theta):
        kept = 1 - 0.1 * decay if i == 0 else 1.0  # one axis: a norm or a bias
        expected = kept - 0.1 / 3 * sum(g * z[k][i] for k, g in enumerate(scalars))
        torch.testing.assert_close(t, expected, rtol=0, atol=1e-14)


# --- narrow weights ---


@settings(max_examples=25, deadline=None)
@given(st.floats(-100, 100).filter(lambda x: abs(x) > 1e-3), st.floats(-3, 3), st.integers(0, 1000))
def test_stochastic_rounding_takes_a_neighbour_and_is_right_on_average(value, ulps, seed):
    """Zero noise from scale 0; the update is the decay alone, a part of a unit in the last place."""
    start = torch.full((200, 200), value, dtype=torch.bfloat16)
    exact = start[0, 0].float() * (1 + ulps * 2**-8)
    out = start.clone()
    sweep_([out], [Pass((), (1 + ulps * 2**-8), (), dither=seed)], "rademacher")
    low, high = out.float().min(), out.float().max()
    assert low <= exact <= high or low == high == exact.to(torch.bfloat16)
    step = torch.nextafter(low.bfloat16(), torch.tensor(math.inf).bfloat16()).float()
    assert high <= step
    share = ((exact - low) / (step - low)).item()
    error = 5 * math.sqrt(max(share * (1 - share), 1e-4) / out.numel()) * (step - low)
    assert abs(out.float().mean() - exact) <= error + 1e-6 * abs(exact)


def test_an_update_below_the_resolution_is_lost_by_nearest_and_kept_by_stochastic_rounding():
    """200 updates of 1e-5 on weights near 0.05, where bf16 counts in steps of 2.4e-4."""
    start = torch.full((64, 64), 0.05, dtype=torch.bfloat16)
    nearest, stochastic = start.clone(), start.clone()
    for k in range(200):
        for w, dither in ((nearest, None), (stochastic, k)):
            sweep_([w], [Pass((), 1 + 2e-4, (), dither)], "rademacher")
    assert torch.equal(nearest, start)
    gain = (stochastic.float().mean() / start.float().mean()).item()
    assert gain == pytest.approx((1 + 2e-4) ** 200, rel=2e-3)


@pytest.mark.parametrize(("dtype", "noise"), [("fp32", "gaussian"), ("bf16", "gaussian"), ("bf16", "rademacher")])
def test_restoring_drift_is_bounded(llm, dtype, noise):
    kind = torch.float32 if dtype == "fp32" else torch.bfloat16
    weights = [p for n, p in llm.model.named_parameters() if "layers.0." in n and p.ndim == 2]
    before = [w.clone() for w in weights]
    short, long = (restoring_drift(weights, cycles=c, noise=noise, epsilon=2**-10, dtype=kind) for c in (4, 64))
    assert all(torch.equal(a, b) for a, b in zip(weights, before, strict=True))
    unit = torch.finfo(kind).eps / 2
    for drift, cycles in ((short, 4), (long, 64)):
        # half a unit per sum, three sums; |z| < 6
        assert drift.largest <= 3 * cycles * unit * (drift.weight_largest + 12 * 2**-10 + drift.largest)
        # errors of either sign: a random walk (a unit per cycle), not a straight one
        assert drift.relative <= 3 * math.sqrt(cycles) * unit
    assert short.largest > 0
    if noise == "rademacher":  # after the first rounding every place is a number that bf16 has
        assert long.rms < 1.5 * short.rms
    else:
        assert 2 < long.rms / short.rms < 8  # 4 for a random walk


# --- training ---


@pytest.mark.parametrize("kind", ["gaussian", "bf16 signs", "lora", "lora together"])
def test_training_fits_the_answers_and_leaves_the_model_alone(llm, data, kind):
    before, state = weights_hash(dict(llm.model.named_parameters())), torch.get_rng_state()
    modules = [type(m) for m in llm.model.modules()]
    settings = dict(steps=20, batch_size=8, lr=4e-4, seed=1, progress=False) | KINDS[kind]
    if kind.startswith("lora"):
        settings |= dict(lr=0.02)
    result = tune_mezo(llm, data[:8], **settings)
    assert weights_hash(dict(llm.model.named_parameters())) == before and torch.equal(state, torch.get_rng_state())
    assert [type(m) for m in llm.model.modules()] == modules
    assert not any(p.requires_grad for p in llm.model.parameters())
    assert np.mean(result.losses[-5:]) < result.losses[0] - 0.04
    assert result.peak_mb > 0 and result.seconds > 0 and result.parameters > 1000
    with adapted(llm, result) as tuned:
        assert response_nll(tuned, data[:8]).mean() < response_nll(llm, data[:8]).mean() - 0.04
    assert torch.equal(llm.model(IDS).logits, tiny_llm().model(IDS).logits)


def test_first_loss_is_the_base_models(llm, data):
    answers = [r.answer for r in token_rows(llm, data[:4], 512).rows]
    expected = np.average(response_nll(llm, data[:4]), weights=answers)
    one = tune_mezo(llm, data[:4], **SHORT | dict(steps=1, batch_size=4), directions=2, estimator="one_sided")
    two = tune_mezo(llm, data[:4], **SHORT | dict(steps=1, batch_size=4))
    assert one.losses == [pytest.approx(expected, abs=1e-5)]
    assert two.losses == [pytest.approx(expected, abs=2e-2)] and two.losses != one.losses  # ± epsilon, averaged


@pytest.mark.parametrize("kind", KINDS)
def test_replay_rebuilds_the_weights_bit_for_bit(llm, data, tmp_path, kind):
    settings = SHORT | KINDS[kind] | dict(steps=4, seed=5, held_out=data[:2], evaluate_every=2)
    result = tune_mezo(llm, data, **settings, out=tmp_path)
    assert result.replay_log == tmp_path / REPLAY and [s for s, _ in result.held_out] == [0, 2, 4]
    start = start_of(llm, result.log.header)
    here, there = list(start.parameters.values()), list(tuned_tensors(result).values())
    assert not all(torch.equal(p, w) for p, w in zip(here, there, strict=True))
    result.log.recipe.replay_(here, result.log.scalars)
    assert weights_hash(start.parameters) == result.card["tuned_hash"]
    assert all(torch.equal(p, w) for p, w in zip(here, there, strict=True))
    again = load_result(tmp_path)
    assert again.losses == result.losses and again.held_out == result.held_out and not again.weights
    assert again.parameters == result.parameters and again.card == json.loads(json.dumps(result.card))
    logits = replay(llm, tmp_path).model(IDS).logits
    for source in (again, result, tmp_path, str(tmp_path)):
        with adapted(llm, source) as tuned:
            assert torch.equal(tuned.model(IDS).logits, logits)
    result.save(tmp_path / "copy")
    with adapted(llm, tmp_path / "copy") as tuned:
        assert torch.equal(tuned.model(IDS).logits, logits)
    assert not torch.equal(logits, llm.model(IDS).logits)


def test_replay_stops_where_it_is_told(llm, data):
    whole = tune_mezo(llm, data, **SHORT)
    part = tune_mezo(llm, data, **SHORT | dict(steps=4))
    assert torch.equal(replay(llm, whole, steps=4).model(IDS).logits, replay(llm, part).model(IDS).logits)
    assert torch.equal(replay(llm, whole, steps=0).model(IDS).logits, llm.model(IDS).logits)
    with pytest.raises(InputError, match="steps.*0 to 6"):
        replay(llm, whole, steps=7)


def test_log_of_200_steps_is_below_5_kb_and_still_exact(llm, data):
    """The header of a real run, 200 slopes: one walk over each chunk per step against three per step."""
    short = tune_mezo(llm, data, **SHORT | LORA | dict(steps=1, noise="rademacher", weight_decay=0.5))
    slopes = np.random.default_rng(0).normal(size=(200, 1)).astype(np.float32)
    log = read_log(replace(short.log, losses=slopes[:, 0], scalars=slopes).to_bytes())
    assert log.steps == 200 and len(log.to_bytes()) < 5000
    pairs = list(log.pairs())
    assert len({s for s, _ in pairs}) == 200 and [g for _, g in pairs] == slopes[:, 0].tolist()
    weights = [list(start_of(llm, log.header).parameters.values()) for _ in range(2)]
    log.recipe.replay_(weights[0], log.scalars)
    for step, (_, g) in enumerate(pairs):
        for one in log.recipe.passes(step, [g]):
            sweep_(weights[1], [one], "rademacher")
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


def test_a_trained_run_of_200_steps_is_rebuilt_from_less_than_5_kb(data, tmp_path):
    llm = tiny_llm(hidden_size=16, intermediate_size=32, num_hidden_layers=2)
    settings = dict(steps=200, lr=1e-4, batch_size=2, noise="rademacher", progress=False)
    result = tune_mezo(llm, data, **settings, out=tmp_path)
    assert len(result.losses) == 200 and result.replay_log.stat().st_size < 5000
    tuned = dict(replay(llm, tmp_path).model.named_parameters())
    assert all(torch.equal(p, tuned[name]) for name, p in result.weights.items())
    assert np.count_nonzero(result.log.scalars) > 150


def test_one_step_by_hand_equals_a_step_of_the_run(llm, data):
    """As a notebook has it: a private copy, the loss, a slope, an update; walked and restored in one sum more."""
    result = tune_mezo(llm, data[:3], **SHORT | dict(steps=1))
    ((seed, slope),) = result.log.pairs()
    mine = private_copy(llm)
    weights = list(mine.model.requires_grad_(False).parameters())
    loss = answer_loss(mine, data[:3])
    assert loss() == pytest.approx(answer_loss(llm, data[:3])(), abs=1e-6)
    g = spsa_gradient(loss, weights, seed=seed)
    assert g == pytest.approx(slope, abs=5e-3) and abs(slope) > 0.1
    perturb_(weights, seed, -SHORT["lr"] * g)
    for p, w in zip(weights, result.weights.values(), strict=True):
        torch.testing.assert_close(p, w, rtol=0, atol=2e-6)


def test_seed_and_nothing_else_decides(llm, data):
    torch.manual_seed(5)
    first = tune_mezo(llm, data, **SHORT, seed=1)
    torch.manual_seed(6)
    assert same(first, tune_mezo(llm, data, **SHORT, seed=1))
    assert not same(first, tune_mezo(llm, data, **SHORT, seed=2))


SOME_MODULES = [("q_proj", "v_proj"), ("up_proj",), ("k_proj", "o_proj", "gate_proj", "down_proj")]


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("estimator", ["two_sided", "one_sided"])
@pytest.mark.parametrize("modules", SOME_MODULES)
def test_probes_in_one_pass_equal_those_one_by_one(data, family, estimator, modules):
    from pllm_helpers.tuning.directions import joint_probe

    llm = tiny_llm("fp32", family)
    rows = token_rows(llm, data, 512).rows[:4]
    for layers in ([0, 1, 2, 3], [2, 3], [3]):
        recipe = Recipe(3, 0.01, 0.01, "rademacher", 2, estimator)
        lora = dict(rank=3, alpha=8, modules=modules, layers=layers)
        start = start_of(llm, {"parameters": "lora", "recipe": {"seed": 3}, "lora": lora})
        for name, p in start.parameters.items():
            if "lora_B" in name:
                p.data.normal_(0, 0.1, generator=torch.Generator().manual_seed(1))
        here = list(start.parameters.values())
        before = [p.clone() for p in here]
        together = joint_probe(start.llm.model, start.parameters, replace(recipe, in_place=False))(rows, 7)
        assert all(torch.equal(a, b) for a, b in zip(here, before, strict=True))
        run = MezoRun(here, AnswerLoss(start.llm).mean, recipe, LogWriter({}))
        run.log.losses = [0.0] * 7  # step 7
        np.testing.assert_allclose(together, run.losses_at(rows), rtol=1e-5)
        assert np.ptp(together) > 1e-4


def test_a_model_that_is_no_llama(data):
    from transformers import OPTConfig, OPTForCausalLM

    llm = tiny_llm()
    config = OPTConfig(
        vocab_size=49152, hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=2, word_embed_proj_dim=32
    )
    opt = type(llm)(OPTForCausalLM(config).eval().requires_grad_(False), llm.tokenizer, "tiny-opt", "fp32")
    for more in ({}, LORA):
        first, again = (tune_mezo(opt, data, **SHORT | more) for _ in range(2))
        assert same(first, again)
        assert replay(opt, first)
    with pytest.raises(InputError, match="together"):
        tune_mezo(opt, data, **SHORT | LORA, together=True)


# --- resuming ---


@pytest.mark.parametrize("kind", ["rademacher", "bf16", "lora signs"])
@pytest.mark.parametrize("snapshots", [None, 2])
def test_a_resumed_run_is_bit_equal(llm, data, tmp_path, kind, snapshots):
    more = SHORT | KINDS[kind] | dict(held_out=data[:3], evaluate_every=2)
    whole = tune_mezo(llm, data, **more)
    seen = []

    def pause(step, loss, seconds):
        seen.append(step)
        return step not in (1, 3, 4)

    parts = more | dict(progress=pause, checkpoint_every=snapshots)
    for after in (1, 3, 4):
        part = tune_mezo(llm, data, **parts, out=tmp_path)
        assert part.card["ended_at"] == after and part.replay_log is None and part.losses == whole.losses[:after]
        assert (tmp_path / SNAPSHOT).is_file() == bool(snapshots and after > 1)
    end = tune_mezo(llm, data, **parts, out=tmp_path)
    assert seen == [1, 2, 3, 4, 5, 6] and same(end, whole)
    assert (end.losses, end.held_out, end.tokens) == (whole.losses, whole.held_out, whole.tokens)
    assert not (tmp_path / SNAPSHOT).exists() and not (tmp_path / LOOKS).exists()
    stamp = (tmp_path / REPLAY).stat().st_mtime_ns
    again = tune_mezo(llm, data, **more, out=tmp_path)  # finished: returned, not repeated
    assert again.losses == whole.losses and (tmp_path / REPLAY).stat().st_mtime_ns == stamp
    fresh = tune_mezo(llm, data, **more, out=tmp_path, resume=False)
    assert same(fresh, whole) and (tmp_path / REPLAY).stat().st_mtime_ns > stamp


@pytest.mark.parametrize("damage", ["other run", "flipped", "cut", "ahead"])
def test_a_snapshot_of_no_use_is_left_aside(llm, data, tmp_path, damage):
    more = SHORT | KINDS["rademacher"]
    whole = tune_mezo(llm, data, **more)
    parts = more | dict(out=tmp_path, checkpoint_every=2)
    tune_mezo(llm, data, **parts | dict(progress=lambda step, *_: step != 4))
    log, file = tmp_path / REPLAY, tmp_path / SNAPSHOT
    content = file.read_bytes()
    if damage == "flipped":
        file.write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
    elif damage == "cut":
        file.write_bytes(content[: len(content) // 2])
    elif damage == "other run":
        key = read_log(tmp_path).header["key"].encode()
        assert key in content
        file.write_bytes(content.replace(key, key[::-1]))
    else:  # the log has lost two steps, which a power cut can do
        log.write_bytes(read_log(tmp_path).first(2).to_bytes())
    end = tune_mezo(llm, data, **parts)
    assert same(end, whole) and end.losses == whole.losses


def nursery(folder: str, kills: int) -> None:
    """Fork children that train and are killed at random moments, until one ends; then the next run."""
    torch.set_num_threads(1)  # no pool of threads: the process may fork
    llm, data = tiny_llm(), dialogue_sets()
    more = dict(steps=30, lr=1e-4, batch_size=3, noise="rademacher", progress=False, checkpoint_every=5)

    def sitting(where: Path, delay: float | None) -> bool:
        child = os.fork()
        if child == 0:
            try:
                tune_mezo(llm, data, **more, held_out=data[:2], evaluate_every=7, out=where)
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
        if delay is not None:
            time.sleep(delay)
            os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
        assert status in (0, signal.SIGKILL), "the child died by itself"
        return status == 0

    assert sitting(Path(folder, "whole"), None)
    longest = 0.7 * load_result(Path(folder, "whole")).seconds
    rng, run, where = random.Random(0), 0, Path(folder)
    while kills:
        where = Path(folder, str(run := run + 1))
        while kills and not sitting(where, rng.uniform(0, longest)):
            kills -= 1
    sitting(where, None)


def test_killed_at_random_moments_the_result_is_the_uninterrupted_one(llm, tmp_path):
    code = f"from tests.unit.test_mezo import nursery; nursery({str(tmp_path)!r}, 8)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert not done.returncode, done.stderr
    whole, *others = (load_result(p) for p in [tmp_path / "whole", *sorted(tmp_path.glob("[0-9]*"))])
    assert others and len(whole.losses) == 30
    for other in others:
        assert (other.losses, other.held_out, other.tokens) == (whole.losses, whole.held_out, whole.tokens)
        assert other.card["tuned_hash"] == whole.card["tuned_hash"]
        assert other.replay_log.read_bytes() == whole.replay_log.read_bytes()
        assert {p.name for p in other.replay_log.parent.iterdir()} - {".lock"} == {REPLAY, "card.json"}
    assert replay(llm, whole)


def test_what_a_kill_left_half_written_goes(llm, data, tmp_path):
    for name in (".snapshot.safetensors.y910cp53", ".card.json.ab_defgh", ".tmpR3UYfn"):
        (tmp_path / name).write_bytes(b"half")
    (tmp_path / ".notes.txt").write_text("mine", encoding="utf-8")
    tune_mezo(llm, data, **SHORT, out=tmp_path)
    assert {p.name for p in tmp_path.iterdir()} - {".lock"} == {REPLAY, "card.json", ".notes.txt"}


@pytest.mark.parametrize("error", [KeyboardInterrupt, KeyError])
def test_an_interrupted_run_leaves_model_and_log(llm, data, tmp_path, error):
    before = weights_hash(dict(llm.model.named_parameters()))

    def stop(step, loss, seconds):
        if step == 3:
            raise error

    with pytest.raises(error):
        tune_mezo(llm, data, **SHORT | dict(progress=stop), out=tmp_path)
    assert weights_hash(dict(llm.model.named_parameters())) == before
    assert read_log(tmp_path).steps == 3
    assert same(tune_mezo(llm, data, **SHORT, out=tmp_path), tune_mezo(llm, data, **SHORT))


@pytest.mark.parametrize("change", ["steps", "epsilon", "noise", "data", "model"])
def test_another_run_in_the_same_folder_is_refused(llm, data, tmp_path, change):
    finished, halfway = tmp_path / "finished", tmp_path / "halfway"
    tune_mezo(llm, data, **SHORT, out=finished)
    tune_mezo(llm, data, **SHORT | dict(progress=lambda step, *_: step < 2), out=halfway)
    model, rows, more = llm, data, dict(SHORT)
    if change == "data":
        rows = data[1:]
    elif change == "model":
        model = tiny_llm()
        model.model.get_decoder().layers[1].mlp.up_proj.weight.data[60, 60] += 1e-3
    else:
        more[change] = {"steps": 7, "epsilon": 2e-3, "noise": "rademacher"}[change]
    for folder in (finished, halfway):
        with pytest.raises(InputError, match="other settings, data or base model"):
            tune_mezo(model, rows, **more, out=folder)


def test_runs_of_other_methods_are_not_mixed(llm, data, tmp_path):
    tune_mezo(llm, data, **SHORT | LORA, out=tmp_path / "mezo")
    tune_lora(llm, data, **SHORT, out=tmp_path / "lora")
    for tune, folder in ((tune_lora, "mezo"), (tune_mezo, "lora")):
        with pytest.raises(InputError, match="other settings, data or base model"):
            tune(llm, data, **SHORT, out=tmp_path / folder)


# --- the log ---


def made_log(losses, rows) -> ReplayLog:
    recipe = {"seed": 1, "lr": 0.1, "epsilon": 0.01, "directions": len(rows[0]) if rows else 1}
    width = recipe["directions"]
    return ReplayLog({"recipe": recipe}, np.array(losses, np.float32), np.array(rows, np.float32).reshape(-1, width))


FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 3).flatmap(lambda n: st.lists(st.lists(FLOATS, min_size=n, max_size=n), max_size=6)), st.data())
def test_a_log_comes_back_and_a_torn_end_is_cut_off(rows, data):
    log = made_log([1.0] * len(rows), rows)
    raw = log.to_bytes()
    again = read_log(raw)
    assert again.to_bytes() == raw and not again.torn and again.steps == len(rows)
    beginning = len(made_log([], rows).to_bytes()) if not rows else len(raw) - len(rows) * 4 * (2 + len(rows[0]))
    cut = data.draw(st.integers(0, len(raw) - 1))
    if cut < beginning:
        with pytest.raises(InputError, match="log"):
            read_log(raw[:cut])
    else:
        part = read_log(raw[:cut])
        width = (len(raw) - beginning) // len(rows)
        assert part.steps == (cut - beginning) // width and part.torn == bool((cut - beginning) % width)
        np.testing.assert_array_equal(part.scalars, log.scalars[: part.steps])
    zeros = read_log(raw + bytes(data.draw(st.integers(1, 100))))
    assert zeros.torn and zeros.steps == len(rows)
    bit = data.draw(st.integers(0, 8 * len(raw) - 1))
    bad = bytearray(raw)
    bad[bit // 8] ^= 1 << bit % 8
    try:
        found = read_log(bytes(bad))
    except InputError:
        return
    assert found.torn and found.steps == len(rows) - 1  # only the last record may look torn


def test_a_damaged_or_foreign_log_is_refused(llm, data, tmp_path):
    result = tune_mezo(llm, data, **SHORT | LORA, out=tmp_path)
    raw = result.replay_log.read_bytes()
    middle = len(raw) - 30
    for bad, why in (
        (raw[:middle] + bytes([raw[middle] ^ 1]) + raw[middle + 1 :], "wrong checksum in step 4 of 6"),
        (b"GIF89a" + raw, "another file"),
        (raw[:30] + b"?" + raw[31:], "damaged beginning"),
        (b"", "damaged beginning"),
    ):
        with pytest.raises(InputError, match=why):
            replay(llm, bad)
        result.replay_log.write_bytes(bad)
        with pytest.raises(InputError, match="log"):
            tune_mezo(llm, data, **SHORT | LORA, out=tmp_path)
    result.replay_log.unlink()
    with pytest.raises(InputError, match="found none"):
        replay(llm, tmp_path)
    other = tiny_llm()
    other.model.get_decoder().layers[3].mlp.down_proj.weight.data[-1, -1] += 1e-4
    for model in (other, tiny_llm("bf16")):
        with pytest.raises(InputError, match="other weights"):
            replay(model, result)
    wrong = replace(result, card=result.card | {"tuned_hash": "0" * 16})
    with pytest.raises(InputError, match="got others"):
        replay(llm, wrong)
    with pytest.raises(InputError, match="without a log"):
        replay(llm, tune_lora(llm, data, steps=1, lr=0.01, batch_size=2, progress=False))


# --- bad input ---


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (dict(steps=0), "steps"),
        (dict(lr=0), "lr"),
        (dict(lr=float("nan")), "lr"),
        (dict(epsilon=0.0), "epsilon"),
        (dict(epsilon=100), "epsilon"),
        (dict(noise="uniform"), "noise.*gaussian"),
        (dict(estimator="both"), "estimator"),
        (dict(parameters="prefix"), "parameters.*full.*lora"),
        (dict(rounding="up"), "rounding"),
        (dict(directions=0), "directions"),
        (dict(normalize=True, estimator="one_sided"), "normalize"),
        (dict(dtype="fp16"), "dtype.*fp32.*bf16"),
        (dict(parameters="lora", dtype="bf16"), "dtype.*adapter is always fp32"),
        (dict(parameters="lora", rank=0), "rank"),
        (dict(parameters="lora", modules=["c_attn"]), "modules"),
        (dict(together=True), "together"),
        (dict(weight_decay=-1), "weight_decay"),
        (dict(held_out=[]), "held_out"),
        (dict(evaluate_every=0), "evaluate_every"),
        (dict(checkpoint_every=0), "checkpoint_every"),
        (dict(seed=-1), "seed"),
        (dict(max_tokens=0), "max_tokens"),
    ],
    ids=str,
)
def test_refuses_settings_out_of_range(llm, data, bad, message):
    with pytest.raises(InputError, match=message):
        tune_mezo(llm, data, **SHORT | bad)


def test_pieces_refuse_unknown_names():
    w = [torch.zeros(4)]
    with pytest.raises(InputError, match="noise"):
        perturb_(w, 0, 1.0, "uniform")
    with pytest.raises(InputError, match="estimator"):
        spsa_gradient(lambda: 0.0, w, seed=0, estimator="central")
    with pytest.raises(InputError, match="at least one tensor"):
        restoring_drift([], cycles=1)


def test_a_rate_that_diverges_is_stopped_with_advice(llm, data, tmp_path):
    with pytest.raises(InputError, match=r"lr: expected (losses that fall|finite).*Lower lr \(now 1\)"):
        tune_mezo(llm, data, **SHORT | dict(steps=60, lr=1.0), out=tmp_path)
    log = read_log(tmp_path)  # whole, up to the step before the stop: any earlier state can be rebuilt
    assert log.steps > 0 and not log.torn and np.isfinite(log.losses).all()
    assert replay(llm, tmp_path, steps=1).model(IDS).logits.isfinite().all()
    with pytest.raises(InputError, match=r"epsilon: expected probes that change the loss.*Raise epsilon"):
        tune_mezo(llm, data, **SHORT | dict(epsilon=1e-12))
    broken = tiny_llm()
    broken.model.get_decoder().layers[2].mlp.down_proj.weight.data[60:] = float("nan")
    with pytest.raises(InputError, match="finite losses.*at step 1"):
        tune_mezo(broken, data, **SHORT, out=tmp_path / "new")
    assert tune_mezo(llm, data, **SHORT, out=tmp_path / "new").losses  # nothing was left there


def test_full_disk_is_an_error_and_the_run_goes_on_later(llm, data, tmp_path):
    import resource

    tune_mezo(llm, data, **SHORT | dict(progress=lambda step, *_: step < 3), out=tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:  # no file may grow beyond that: half a record of the fifth step
        resource.setrlimit(resource.RLIMIT_FSIZE, ((tmp_path / REPLAY).stat().st_size + 18, limits[1]))
        with pytest.raises(InputError, match="room to write"):
            tune_mezo(llm, data, **SHORT, out=tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert read_log(tmp_path).steps == 4 and read_log(tmp_path).torn
    assert same(tune_mezo(llm, data, **SHORT, out=tmp_path), tune_mezo(llm, data, **SHORT))


def test_odd_dialogues(llm):
    odd = [DialogueSet("u", "日本語で話して 🎈🎈", "はい 🙂")] * 3 + [DialogueSet("u", "long " * 5000, "ok")]
    result = tune_mezo(llm, odd, **SHORT, max_tokens=128)
    assert all(map(math.isfinite, result.losses)) and result.card["shortened_questions"] == 1
    with pytest.raises(InputError, match="at least one"):
        tune_mezo(llm, [], **SHORT)
