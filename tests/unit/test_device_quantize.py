"""Packed weights: what the integers stand for, what a model loses, how fast it is."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from pllm_helpers.device import generation_speed, quantize, size_mb, weight_error
from pllm_helpers.device.architectures import Architecture, build
from pllm_helpers.device.quantize import SLICE, QuantizedLinear, nibble_order, to_int4, to_int8
from pllm_helpers.evaluation import response_nll
from pllm_helpers.models import generate
from pllm_helpers.runtime import InputError
from pllm_helpers.tuning import adapted, tune_lora
from tests.unit.tuning_kit import dialogue_sets, tiny_llm


def linear(out: int, inside: int, seed: int = 0) -> nn.Linear:
    layer = nn.Linear(inside, out, bias=False)
    layer.weight.data.normal_(generator=torch.Generator().manual_seed(seed))
    return layer


def test_int8_is_the_nearest_of_255_steps_per_row():
    w = linear(8, 64).weight.detach()
    q, scale = to_int8(w)
    s = scale.float()[:, None]
    assert q.dtype == torch.int8 and (q.abs().amax(1) >= 126).all()
    assert ((q.float() * s - w).abs() <= 0.5 * s * 1.02 + 1e-6).all()


def test_a_large_matrix_is_packed_in_parts_with_the_same_numbers():
    w = linear(SLICE + 200, 16).weight.detach()
    (q, scale), (q_first, s_first), (q_last, s_last) = to_int8(w), to_int8(w[:100]), to_int8(w[-100:])
    assert torch.equal(q[:100], q_first) and torch.equal(q[-100:], q_last)
    assert torch.equal(scale[:100], s_first) and torch.equal(scale[-100:], s_last)


def test_int4_is_the_nearest_of_16_steps_per_group_by_hand():
    w = linear(4, 64).weight.detach()
    q, scales = to_int4(w, 32)
    assert q.min() >= 0 and q.max() <= 15 and scales.shape == (2, 4, 2)
    for row in range(4):
        for group in range(2):
            part = w[row, 32 * group : 32 * group + 32]
            s, z = scales[group, row].float()
            grid = (torch.arange(16) - 8) * s + z
            best = (part[:, None] - grid).abs().amin(1)
            mine = (part - grid[q[row, 32 * group : 32 * group + 32].long()]).abs()
            assert torch.allclose(mine, best, atol=1e-6)
            assert grid[0] <= part.min() + s and grid[-1] >= part.max() - s


def test_constant_and_zero_weights_survive():
    for value in (0.0, 0.25, -3.0):
        layer = nn.Linear(64, 32, bias=False)
        layer.weight.data.fill_(value)
        for bits in (4, 8):
            back = QuantizedLinear(layer, bits, 32).weight
            assert torch.isfinite(back).all() and torch.allclose(back, layer.weight, rtol=0.01)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("out", "inside"), [(64, 64), (96, 128), (16, 32), (48, 96), (192, 576), (576, 1536)])
def test_kernels_and_unpacked_weights_agree(bits, out, inside):
    layer = linear(out, inside)
    packed = QuantizedLinear(layer, bits, 32)
    error = ((packed.weight - layer.weight).norm() / layer.weight.norm()).item()
    assert error < {4: 0.09, 8: 0.01}[bits]
    x = torch.randn(2, 5, inside, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(packed(x), x @ packed.weight.T, atol=1e-3)
    narrow = packed(x.bfloat16()).float()  # the packed kernel
    wanted = x.bfloat16().float() @ packed.weight.float().T
    assert (narrow - wanted).norm() / wanted.norm() < 0.01


def test_the_kernels_layout_is_found_out():
    order = nibble_order(64, 32).long()
    assert torch.equal(order.sort().values, torch.arange(64 * 32))
    numbers = torch.randint(0, 16, (64, 32), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(numbers, 1)
    halves = torch.stack([packed & 15, packed >> 4], -1).flatten()
    assert torch.equal(halves[order].view(64, 32).int(), numbers)


def test_int4_loses_as_much_as_ggufs_type_of_the_same_family():
    from gguf import GGMLQuantizationType, quants

    w = linear(64, 256).weight.detach()
    theirs = quants.dequantize(quants.quantize(w.numpy(), GGMLQuantizationType.Q4_1), GGMLQuantizationType.Q4_1)
    mine = QuantizedLinear(linear(64, 256), 4, 32).weight.numpy()
    error, peer = (np.linalg.norm(x - w.numpy()) / np.linalg.norm(w.numpy()) for x in (mine, theirs))
    assert error < 1.05 * peer


@pytest.mark.parametrize("to", ["int8", "int4"])
def test_a_quantised_model_is_used_like_any_other(to):
    llm, data = tiny_llm(), dialogue_sets(6)
    before = {n: p.clone() for n, p in llm.model.named_parameters()}
    packed = quantize(llm, to)
    assert not any(isinstance(m, QuantizedLinear) for m in llm.model.modules())
    assert all(torch.equal(p, before[n]) for n, p in llm.model.named_parameters())
    assert packed.parameters == llm.parameters and not packed.kept
    assert size_mb(packed) < 0.3 * size_mb(llm) and to in repr(packed)
    nll, own = response_nll(packed, data, progress=False), response_nll(llm, data, progress=False)
    assert np.abs(nll - own).max() < 0.2
    text = generate(packed, ["Hello", "What is the time today?"], max_new_tokens=5, progress=False)
    assert len(text) == 2


def test_dequantised_weights_give_the_same_answers():
    """A plain model with the unpacked weights is the packed model in fp32."""
    llm = tiny_llm()
    packed = quantize(llm, "int4")
    plain = tiny_llm()
    with torch.no_grad():
        for name, m in packed.model.named_modules():
            if isinstance(m, QuantizedLinear) and "table" not in name:
                plain.model.get_submodule(name).weight.copy_(m.weight)
        plain.model.get_input_embeddings().weight.copy_(packed.model.get_output_embeddings().weight)
    ids = torch.arange(30)[None]
    with torch.no_grad():
        assert torch.allclose(packed.model(input_ids=ids).logits, plain.model(input_ids=ids).logits, atol=1e-4)


@pytest.mark.parametrize("to", ["int8", "int4"])
def test_blocks_that_share_weights_go_on_sharing_them(to):
    small = tiny_llm()
    shape = Architecture(layers=2, dim=32, heads=2, kv_heads=1, ffn=64, vocab=512)
    sizes, rows = {}, torch.arange(1, 9)[None]
    for shared in (False, True):
        model = build(replace(shape, share_blocks=shared)).eval().requires_grad_(False)
        packed = quantize(replace(small, model=model), to)
        sizes[shared] = size_mb(packed)
        assert torch.isfinite(packed.model(rows).logits).all()
    assert sizes[True] == pytest.approx(sizes[False], rel=0.02)


def test_embeddings_may_stay():
    llm = tiny_llm()
    packed = quantize(llm, "int4", embeddings="keep")
    assert packed.kept == ["lm_head"]
    assert packed.model.get_input_embeddings().weight is packed.model.get_output_embeddings().weight
    assert size_mb(packed) > size_mb(quantize(llm, "int4")) * 2


@pytest.mark.parametrize("fast", [True, False])
def test_adapters_train_on_packed_weights(fast):
    llm, data = tiny_llm(), dialogue_sets()
    packed = quantize(llm, "int8")
    run = dict(steps=3, lr=1e-2, batch_size=4, fast=fast, progress=False)
    result, reference = tune_lora(packed, data, **run), tune_lora(llm, data, **run)
    assert np.allclose(result.losses, reference.losses, atol=0.1)
    with adapted(packed, result) as tuned:
        moved = response_nll(tuned, data, progress=False) - response_nll(packed, data, progress=False)
    assert np.abs(moved).max() > 1e-4


def test_gradients_go_through_packed_weights():
    packed = QuantizedLinear(linear(32, 64), 4, 32)
    x = torch.randn(3, 64, requires_grad=True)
    packed(x).square().sum().backward()
    y = x.detach().clone().requires_grad_(True)
    (y @ packed.weight.T).square().sum().backward()
    assert torch.allclose(x.grad, y.grad, rtol=1e-4, atol=1e-3)


def test_generation_speed_counts_and_times():
    speed = generation_speed(tiny_llm(), ["Hello", "What is the time?"], new_tokens=4)
    assert speed.new_tokens == 4 and len(speed.prompt_tokens) == len(speed.seconds) == 2
    assert all(a > 0 and b > 0 for a, b in speed.seconds)
    assert speed.prompt_tokens[1] > speed.prompt_tokens[0] > 3
    rates = sorted(3 / b for _, b in speed.seconds)
    assert rates[0] <= speed.decode.value <= rates[1] and speed.first_token.unit == "s"
    for bad in (
        dict(prompts=[]),
        dict(prompts="Hello"),
        dict(prompts=["a"]),
        dict(prompts=["a", "b"], new_tokens=1),
        dict(prompts=["a", "b"], repeats=0),
    ):
        with pytest.raises(InputError):
            generation_speed(tiny_llm(), **bad)


def test_bad_input():
    llm = tiny_llm()
    for settings, what in (
        (dict(to="int3"), "to"),
        (dict(to="int4", group=48), "group"),
        (dict(to="int8", embeddings="int4"), "embeddings"),
    ):
        with pytest.raises(InputError) as e:
            quantize(llm, **settings)
        assert e.value.what == what
    with pytest.raises(InputError, match="not quantised"):
        quantize(quantize(llm, "int8"), "int4")
    for settings, what in (
        (dict(to="int2"), "to"),
        (dict(to="int4", group=0), "group"),
        (dict(to="int4", group=256), "group"),
    ):
        with pytest.raises(InputError) as e:
            weight_error(llm, **settings)
        assert e.value.what == what


@pytest.mark.model
def test_the_shipped_weights_were_quantised_before_and_it_shows():
    from pllm_helpers.models import load_llm

    llm = load_llm(dtype="bf16")
    own, random = weight_error(llm, "int4")
    assert own < 0.1 * random and 0.05 < random < 0.1
    eight, random8 = weight_error(llm, "int8")
    assert 0.5 < eight / random8 < 2
    eight, four = quantize(llm, "int8"), quantize(llm, "int4")
    assert size_mb(llm) > 250 > 130 > size_mb(eight) > 100 > size_mb(four)
    assert size_mb(four) * 2**23 / llm.parameters < 6  # bits per weight, scales and int8 embeddings included
    data = dialogue_sets(16)
    base, less, least = (response_nll(m, data, progress=False).mean() for m in (llm, eight, four))
    assert abs(less - base) < 0.1 and abs(least - base) < 0.3
    assert generate(four, ["What is the capital of France?"], max_new_tokens=12, progress=False)[0]
