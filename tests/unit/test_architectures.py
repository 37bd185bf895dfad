"""MobileLLM's shapes: counts against the published sizes and real models, shared weights, small trainings."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pllm_helpers.corpora import authored_dialogues
from pllm_helpers.device.architectures import (
    MOBILE_LLM,
    MOBILE_LLM_SIZES,
    SMOLLM2_135M,
    ZERO_SHOT,
    Architecture,
    at_budget,
    build,
    design_effects,
)
from pllm_helpers.device.small_models import small_tokenizer, train_small
from pllm_helpers.models import load_llm
from pllm_helpers.runtime import InputError

SMALL = Architecture(2, 32, 4, 2, 48, 400)


@pytest.fixture(scope="module")
def texts():
    return [d.text for d in authored_dialogues()]


# ---------------------------------------------------------------- counts


@pytest.mark.parametrize("name", MOBILE_LLM)
def test_totals_are_the_published_ones(name):
    published, unit = MOBILE_LLM_SIZES[name]
    assert abs(MOBILE_LLM[name].parameters().total - published) < unit


def test_the_125m_model_by_hand():
    count = MOBILE_LLM["125M"].parameters()
    assert count.embedding == 32000 * 576 and count.head == 0
    assert count.attention == 30 * (576 * 576 * 2 + 576 * 192 * 2)
    assert count.ffn == 30 * 3 * 576 * 1536 and count.norms == 61 * 576
    assert count.total == 124_635_456 == sum(v for k, v in count.to_dict().items() if k != "total")


@pytest.mark.model
def test_smollm2_is_counted_right():
    llm = load_llm(dtype="fp32")
    assert Architecture.of(llm.model) == SMOLLM2_135M
    assert SMOLLM2_135M.parameters().total == llm.parameters == 134_515_008
    assert replace(SMOLLM2_135M, vocab=32000) == MOBILE_LLM["125M"]


@settings(max_examples=8, deadline=None)
@given(
    st.integers(1, 3), st.sampled_from([1, 2, 4]), st.integers(1, 3), st.booleans(), st.booleans(), st.integers(8, 40)
)
def test_counts_equal_a_built_model_part_by_part(layers, kv, group, embedding, blocks, ffn):
    heads = kv * group
    a = Architecture(layers, heads * 8, heads, kv, ffn, 50, embedding, blocks)
    model, count = build(a), a.parameters()
    sizes = {name: p.numel() for name, p in model.named_parameters()}  # a shared weight comes once
    part = lambda word: sum(n for name, n in sizes.items() if word in name)  # noqa: E731
    assert part("embed_tokens") == count.embedding and part("lm_head") == count.head
    assert part("self_attn") == count.attention and part("mlp") == count.ffn
    assert part("norm") == count.norms and sum(sizes.values()) == count.total
    assert len(model.model.layers) == a.passes
    if not blocks:
        assert Architecture.of(model) == a


def test_flops_are_what_torch_counts():
    from torch.utils.flop_counter import FlopCounterMode

    for a in (SMALL, replace(SMALL, share_blocks=True), replace(SMALL, share_embedding=False, kv_heads=4)):
        model, tokens = build(a), 24
        model.set_attn_implementation("eager")  # torch does not count its fused attention on a CPU
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(input_ids=torch.zeros(1, tokens, dtype=torch.long), use_cache=False)
        # the eager product of a whole text attends to all positions, later ones too
        assert counter.get_total_flops() == pytest.approx(tokens * a.flops(tokens - 1), rel=0.02)


def test_cache_bytes_are_what_a_cache_holds():
    from transformers import DynamicCache

    for a in (SMALL, replace(SMALL, share_blocks=True)):
        model = build(a)
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            model(input_ids=torch.zeros(1, 5, dtype=torch.long), past_key_values=cache, use_cache=True)
        held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
        assert held == 5 * a.kv_bytes(4)


def test_what_each_design_choice_does():
    base = MOBILE_LLM["125M"]
    rows = {r["variant"]: r for r in design_effects(base)}
    given_row = rows["as given"]
    assert "shared embedding" not in rows and "every block once" not in rows
    assert rows["own output matrix"]["weights"] - given_row["weights"] == 32000 * 576
    assert rows["own output matrix"]["mflops"] == given_row["mflops"]
    assert rows["no GQA"]["kv_bytes"] == 3 * given_row["kv_bytes"] and rows["no GQA"]["weights"] > given_row["weights"]
    twice = rows["every block twice"]
    assert twice["weights"] == given_row["weights"] and twice["kv_bytes"] == 2 * given_row["kv_bytes"]
    assert 1.7 < twice["mflops"] / given_row["mflops"] < 2
    assert set(ZERO_SHOT) >= set(MOBILE_LLM)


# ---------------------------------------------------------------- equal budgets


@settings(max_examples=30, deadline=None)
@given(st.integers(4, 48), st.sampled_from([50e6, 125e6, 350e6]))
def test_a_budget_is_met_at_any_depth(layers, weights):
    a = at_budget(weights, layers)
    assert abs(a.parameters().total - weights) < 0.01 * weights and a.layers == layers
    assert a.dim % 64 == 0 and a.heads % a.kv_heads == 0 and a.ffn % 8 == 0


def test_deep_thin_and_wide_at_the_size_of_the_125m_model():
    total = MOBILE_LLM["125M"].parameters().total
    thin, wide = at_budget(total, 30), at_budget(total, 12)
    assert (thin.dim, thin.heads, thin.kv_heads, thin.ffn) == (576, 9, 3, 1536)
    assert wide.dim > thin.dim and abs(wide.parameters().total / total - 1) < 0.01
    assert wide.parameters().vocabulary_share > thin.parameters().vocabulary_share


def test_a_budget_that_the_vocabulary_eats():
    with pytest.raises(InputError, match="meet within 5 %"):
        at_budget(1e6, 30)
    with pytest.raises(InputError, match="above 0"):
        at_budget(0, 3)


@pytest.mark.parametrize(
    "sizes,message",
    [((2, 30, 4, 2, 8), "an even width"), ((2, 32, 4, 3, 8), "a divisor of the 4 heads"), ((0, 32, 4, 2, 8), "layers")],
)
def test_sizes_that_do_not_fit(sizes, message):
    with pytest.raises(InputError, match=message):
        Architecture(*sizes)


# ---------------------------------------------------------------- shared blocks


def test_a_shared_block_is_one_block_run_twice():
    plain, shared = build(SMALL, seed=3), build(replace(SMALL, share_blocks=True), seed=3)
    layers = shared.model.layers
    for i in (0, 2):
        for a, b in zip(layers[i].parameters(), layers[i + 1].parameters(), strict=True):
            assert a is b
    with torch.no_grad():  # the plain model, with the shared model's weights, each block run twice by hand
        plain.model.embed_tokens.weight.copy_(shared.model.embed_tokens.weight)
        for i in range(2):
            plain.model.layers[i].load_state_dict(layers[2 * i].state_dict())
        ids = torch.arange(12)[None]
        hidden = plain.model.embed_tokens(ids)
        positions = torch.arange(12)[None]
        rotary = plain.model.rotary_emb(hidden, positions)
        mask = torch.full((12, 12), -torch.inf).triu(1)[None, None]
        for layer in plain.model.layers:
            for _ in range(2):
                hidden = layer(hidden, attention_mask=mask, position_ids=positions, position_embeddings=rotary)
        expected = plain.lm_head(plain.model.norm(hidden))
        torch.testing.assert_close(shared(input_ids=ids, use_cache=False).logits, expected, atol=1e-5, rtol=1e-4)


def test_gradients_of_both_passes_add_up_in_one_place():
    shared = build(replace(SMALL, share_blocks=True), seed=3)
    free = build(replace(SMALL, layers=4), seed=3)
    with torch.no_grad():
        for target, source in zip(free.model.layers, shared.model.layers, strict=True):
            target.load_state_dict(source.state_dict())
        free.model.embed_tokens.weight.copy_(shared.model.embed_tokens.weight)
    ids = torch.arange(20)[None]
    for model in (shared, free):
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    both = [layer.mlp.up_proj.weight.grad for layer in free.model.layers[:2]]
    torch.testing.assert_close(shared.model.layers[0].mlp.up_proj.weight.grad, both[0] + both[1], atol=1e-6, rtol=1e-4)


def test_a_shared_model_writes_the_same_with_and_without_a_cache():
    model = build(replace(SMALL, share_blocks=True), seed=1).eval()
    ids = torch.tensor([[5, 9, 2, 77]])
    settings_ = dict(max_new_tokens=8, do_sample=False, pad_token_id=0)
    with torch.no_grad():
        a, b = (
            model.generate(ids, attention_mask=torch.ones_like(ids), use_cache=c, **settings_) for c in (True, False)
        )
    assert torch.equal(a, b)


def test_the_seed_decides_and_leaves_the_random_state_alone():
    state = torch.random.get_rng_state()
    a, b, c = build(SMALL, seed=1), build(SMALL, seed=1), build(SMALL, seed=2)
    assert torch.equal(torch.random.get_rng_state(), state)
    weight = lambda m: m.model.layers[1].mlp.up_proj.weight  # noqa: E731
    assert torch.equal(weight(a), weight(b)) and not torch.equal(weight(a), weight(c))


# ---------------------------------------------------------------- training


def test_the_tokenizer_is_exact_and_repeatable(texts):
    one, two = small_tokenizer(texts[:50], 400), small_tokenizer(texts[:50], 400)
    assert one.to_str() == two.to_str() and one.get_vocab_size() == 400
    odd = "Zürich – 東京 🙂\n\tok"
    assert one.decode(one.encode(odd).ids) == odd
    with pytest.raises(InputError, match="at least 257"):
        small_tokenizer(texts, 100)


def test_training_on_real_text_beats_the_token_frequencies(texts):
    run = train_small(SMALL, texts, 200, seed=0, lr=1e-2, length=32, batch_size=8)
    assert run.losses.shape == (200,) and run.tokens == 200 * 8 * 32
    assert run.curve[0] == (0, pytest.approx(math.log(400), abs=0.3)) and run.curve[-1] == (
        200,
        pytest.approx(run.loss),
    )
    tokenizer = small_tokenizer([t for i, t in enumerate(texts) if i % 10 != 9], 400)
    counts = np.ones(400)
    for t in texts[:300]:
        np.add.at(counts, tokenizer.encode(t).ids, 1)
    p = counts / counts.sum()
    ids = [i for t in texts[9::10] for i in tokenizer.encode(t).ids]
    assert run.loss < -np.log(p[ids]).mean()
    assert 1 < run.bits_per_byte < 8 and run.tokens_per_weight == run.tokens / SMALL.parameters().total


def test_a_run_is_a_function_of_its_seed(texts):
    settings_ = dict(length=16, batch_size=4, held_out_windows=8)
    a, b, c = (train_small(SMALL, texts[:60], 6, s, **settings_) for s in (1, 1, 2))
    assert (a.losses == b.losses).all() and (a.held_out == b.held_out).all() and (a.losses != c.losses).any()
    assert a.held_out.shape == c.held_out.shape == (8,)


def test_bits_per_byte_is_the_loss_over_the_real_bytes(texts):
    tokenizer = small_tokenizer(texts[:60], 300)
    held_out = texts[70:74]
    run = train_small(replace(SMALL, vocab=300), texts[:60], 2, held_out=held_out, tokenizer=tokenizer, length=16)
    tokens = sum(len(tokenizer.encode(t).ids) + 1 for t in held_out)
    size = sum(len(t.encode()) + 1 for t in held_out)
    assert run.bits_per_byte == pytest.approx(run.loss * tokens / size / math.log(2))


@pytest.mark.parametrize(
    "change,message",
    [
        (dict(lr=0), "above 0"),
        (dict(texts=["short"] * 12), "expected at least 130 tokens"),
        (dict(texts=["a", "b"]), "at least 10"),
        (dict(held_out=["x"] * 3), "held_out"),
        (dict(architecture=replace(SMALL, vocab=300), vocab=400), "at most 300 tokens"),
        (dict(steps=0), "at least 1"),
    ],
)
def test_bad_training_input(texts, change, message):
    change = dict(change)
    vocab = change.pop("vocab", None)
    tokenizer = small_tokenizer(texts[:40], vocab) if vocab else None
    arguments = dict(architecture=SMALL, texts=texts[:40], steps=2, tokenizer=tokenizer) | change
    with pytest.raises(InputError, match=message):
        train_small(**arguments)


def test_a_diverging_rate_stops_with_a_remedy(texts):
    with pytest.raises(InputError, match="stays finite"):
        broken = replace(SMALL, dim=32)
        train_small(broken, texts[:40], 300, lr=0.999, length=16, batch_size=2, weight_decay=1e6, progress=False)


def test_held_out_texts_must_be_new(texts):
    with pytest.raises(InputError, match="1 are in both"):
        train_small(SMALL, texts[:40], 2, held_out=[texts[0], *texts[50:55]])
