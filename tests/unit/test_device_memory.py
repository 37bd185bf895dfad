"""Predicted memory against measured memory: real steps in child processes."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, OPTConfig, RobertaConfig

from pllm_helpers.device import METHODS, measure_memory, predict_memory, uniform_dialogues
from pllm_helpers.device.measure import random_model
from pllm_helpers.device.predict import SHAPES, configuration, shape_of
from pllm_helpers.runtime import InputError
from pllm_helpers.tuning.data import token_rows
from tests.unit.tuning_kit import tiny_llm

SMALL = {
    "llama": LlamaConfig(
        vocab_size=8192,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        pad_token_id=0,
    ),
    "opt": OPTConfig(
        vocab_size=8192,
        hidden_size=256,
        ffn_dim=1024,
        num_hidden_layers=8,
        num_attention_heads=4,
        max_position_embeddings=512,
        word_embed_proj_dim=256,
        pad_token_id=0,
    ),
    "roberta": RobertaConfig(
        vocab_size=8192,
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=8,
        num_attention_heads=4,
        max_position_embeddings=512,
        pad_token_id=0,
    ),
}
LOAD = dict(batch=8, tokens=96, answer_tokens=24)
SHALLOW = {"num_hidden_layers": 1, "vocab_size": 256}


def runtime_mb(family: str, method: str) -> float:
    """What the code itself takes on this machine (pages of libraries, buffers of threads), from one layer.

    It differs by 10 MB or so between machines and numbers of threads: little beside a language
    model, a tenth of the models here.
    """
    config = SMALL[family].__class__(**{**SMALL[family].to_dict(), **SHALLOW})
    measured = measure_memory(config, method=method, **LOAD)
    assert measured.status == "finished", measured.message + measured.output
    return max(0.0, measured.peak_mb - predict_memory(config, method=method, runtime_mb=0, **LOAD).total)


@pytest.mark.parametrize(
    ("family", "method"),
    [
        ("llama", "adam"),
        ("llama", "lora_adam"),
        ("llama", "lora_checkpointed"),
        ("llama", "lomo"),
        ("llama", "mezo"),
        ("opt", "sgd"),
        ("opt", "mezo"),
        ("roberta", "adam"),
        ("roberta", "lora_adam"),
    ],
)
def test_prediction_is_within_a_tenth_of_a_small_model(family, method):
    measured = measure_memory(SMALL[family], method=method, **LOAD)
    assert measured.status == "finished", measured.message + measured.output
    predicted = predict_memory(SMALL[family], method=method, runtime_mb=runtime_mb(family, method), **LOAD)
    # up to 16 MB of buffers that grow with threads and free memory are beyond the formula
    assert predicted.total == pytest.approx(measured.peak_mb, rel=0.1, abs=16), str(predicted)


@pytest.mark.parametrize(
    ("family", "method"), [("llama", "sgd"), ("llama", "adalomo"), ("opt", "lomo"), ("roberta", "lomo")]
)
def test_prediction_holds_where_the_vocabulary_is_most_of_the_model(family, method):
    """The gradients of a tied output matrix decide here."""
    changed = {**SMALL[family].to_dict(), "vocab_size": 65536, "num_hidden_layers": 2}
    config = SMALL[family].__class__(**changed)
    load = dict(batch=2, tokens=32, answer_tokens=1)
    measured = measure_memory(config, method=method, **load)
    assert measured.status == "finished", measured.message + measured.output
    predicted = predict_memory(config, method=method, **load)
    assert predicted.total == pytest.approx(measured.peak_mb, rel=0.1), str(predicted)


@pytest.mark.model
@pytest.mark.parametrize("method", ["adam", "lora_adam", "lora_checkpointed", "lora_streamed", "lomo", "mezo"])
def test_prediction_is_within_a_tenth_of_the_real_model(method):
    from pllm_helpers.models import load_llm

    llm = load_llm(dtype="fp32")
    measured = measure_memory(llm, method=method, batch=4, tokens=64, answer_tokens=16)
    assert measured.status == "finished", measured.message + measured.output
    shape = {k: measured.value[k] for k in ("tokens", "answer_tokens", "shared_tokens")}
    assert shape["tokens"] == 64 and shape["answer_tokens"] == 16 and shape["shared_tokens"] > 20
    predicted = predict_memory(llm, method=method, batch=4, **shape)
    assert predicted.total == pytest.approx(measured.peak_mb, rel=0.1), str(predicted)


def test_true_shapes_have_the_published_sizes():
    assert shape_of("roberta-large").parameters == 355_412_057  # 355M
    assert shape_of("opt-1.3b").parameters == 1_315_758_080
    assert shape_of("smollm2-135m").parameters == 134_515_008
    assert shape_of("smollm2-135m").packable and not shape_of("opt-1.3b").packable
    assert all(shape_of(name).tied for name in SHAPES)


def test_the_order_of_the_methods_is_that_of_the_papers():
    total = {m: predict_memory("opt-1.3b", method=m, batch=8, tokens=64).total for m in METHODS}
    order = ["lora_streamed", "mezo", "lora_checkpointed", "lora_adam", "lomo", "adalomo", "sgd", "adam"]
    assert sorted(order, key=total.__getitem__) == order
    assert total["adam"] > 3 * total["mezo"]


def test_what_grows_with_the_batch_and_what_does_not():
    def parts(method: str, batch: int) -> dict[str, float]:
        return predict_memory("roberta-large", method=method, batch=batch, tokens=64, answer_tokens=1).parts

    small, large = parts("adam", 8), parts("adam", 64)
    assert small["weights"] == large["weights"] == pytest.approx(355_412_057 * 4 / 2**20)
    assert small["optimiser"] == large["optimiser"] == pytest.approx(2 * small["weights"])
    assert large["activations"] == pytest.approx(
        8 * predict_memory("roberta-large", method="lomo", batch=8, tokens=64, answer_tokens=1).activations
    )
    assert parts("mezo", 64)["gradients"] == parts("mezo", 64)["optimiser"] == 0
    half = predict_memory("roberta-large", method="mezo", dtype="bf16").weights
    assert half == pytest.approx(small["weights"] / 2)


def test_totals_and_text():
    p = predict_memory("smollm2-135m", method="lora_adam")
    assert p.total == pytest.approx(sum(p.parts.values())) and p.private_total == pytest.approx(p.total - p.weights)
    assert "lora_adam" in str(p) and p.moment in str(p)
    assert predict_memory("smollm2-135m", method="mezo", runtime_mb=0).runtime == 0


def test_saved_tensors_are_those_that_are_counted():
    """The heart of the prediction, exactly: bytes that autograd keeps for one more block."""

    def kept(layers: int, family: str) -> int:
        config = SMALL[family].__class__(**{**SMALL[family].to_dict(), "num_hidden_layers": layers})
        model = random_model(config).requires_grad_(True)
        own = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}
        seen: dict[int, int] = {}

        def pack(t: torch.Tensor) -> torch.Tensor:
            storage = t.untyped_storage()
            if storage.data_ptr() not in own:
                seen[storage.data_ptr()] = storage.nbytes()
            return t

        ids = torch.arange(8 * 96).view(8, 96) % 8000 + 3
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            out = model.base_model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
        assert out.requires_grad
        return sum(seen.values())

    for family in SMALL:
        more = kept(3, family) - kept(2, family)
        expected = predict_memory(SMALL[family], method="lomo", **LOAD).activations
        per_block = (expected * 2**20 - 3 * 4 * 8 * 96 * 256) / 8
        assert more == pytest.approx(per_block, rel=0.03), family


def test_random_models_have_finite_outputs_and_right_buffers():
    for family, config in SMALL.items():
        model, again = random_model(config), random_model(config)
        ids = torch.arange(20)[None] + 3
        with torch.no_grad():
            logits = model(input_ids=ids).logits
        assert torch.isfinite(logits).all() and logits.std() > 0, family
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    from transformers import AutoModelForCausalLM

    fresh = AutoModelForCausalLM.from_config(SMALL["llama"])
    buffers = dict(random_model(SMALL["llama"]).named_buffers())
    assert buffers and all(torch.equal(b, buffers[n]) for n, b in fresh.named_buffers())


def test_uniform_dialogues_have_the_wanted_lengths():
    llm = tiny_llm()
    rows = token_rows(llm, uniform_dialogues(llm, 10, 70, 9), 512).rows
    assert {(len(r.ids), r.answer) for r in rows} == {(70, 9)} and len(rows) == 10
    with pytest.raises(InputError, match="more tokens"):
        uniform_dialogues(llm, 2, 20, 9)


def test_bad_input():
    cases = (
        (dict(method="adamw"), "method"),
        (dict(method="adam", dtype="fp16"), "dtype"),
        (dict(method="adam", batch=0), "batch"),
        (dict(method="adam", tokens=16, answer_tokens=16), "answer_tokens"),
    )
    for settings, what in cases:
        with pytest.raises(InputError) as e:
            predict_memory("smollm2-135m", **settings)
        assert e.value.what == what
    with pytest.raises(InputError, match="roberta-large"):
        predict_memory("bert", method="adam")
    with pytest.raises(InputError, match="method"):
        measure_memory("smollm2-135m", method="magic")
    from transformers import GPT2Config

    with pytest.raises(InputError, match="gpt2"):
        shape_of(GPT2Config(n_layer=1, n_embd=64, n_head=2, vocab_size=100))
    assert configuration("opt-1.3b").num_hidden_layers == 24
