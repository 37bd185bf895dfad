"""Exact LoRA gradients in little memory: blocks computed twice, weights that need not stay resident."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from pllm_helpers.runtime import InputError
from pllm_helpers.tuning import tune_lora
from pllm_helpers.tuning.adapters import attach
from pllm_helpers.tuning.data import token_rows
from pllm_helpers.tuning.forward import plain_objective
from pllm_helpers.tuning.frugal import WORDS, SlicedNll, frugal_objective
from pllm_helpers.tuning.packed import packed_objective
from pllm_helpers.tuning.pages import drop, file_mappings, mapped_pages
from tests.unit.tuning_kit import dialogue_sets, tiny_llm

SHORT = dict(steps=3, lr=0.02, batch_size=4, progress=False)


@pytest.fixture(scope="module")
def data():
    return dialogue_sets(12)


def mapped_tiny(folder, dtype="fp32", family="llama"):
    """The tiny model around a file that is mapped into memory, as ``load_llm`` does it."""
    llm = tiny_llm(dtype, family)
    state = {k: v for k, v in llm.model.state_dict().items() if k != "lm_head.weight"}
    save_file(state, folder / "tiny.safetensors")
    llm.model.load_state_dict(load_file(folder / "tiny.safetensors"), strict=False, assign=True)
    llm.model.tie_weights()
    llm.model.requires_grad_(False)
    return llm


def resident_kb(name):
    """Resident kilobytes of the mappings of a file."""
    total, inside = 0, False
    with open("/proc/self/smaps", encoding="utf-8") as f:
        for line in f:
            if "-" in line.split()[0]:
                inside = line.rstrip().endswith(name)
            elif inside and line.startswith("Rss:"):
                total += int(line.split()[1])
    return total


def same_adapter(a, b):
    return a.adapter.keys() == b.adapter.keys() and all(torch.equal(v, b.adapter[k]) for k, v in a.adapter.items())


def gradients(llm, rows, make, **lora):
    """Loss and gradient of every adapter weight of one batch, the adapter away from its start."""
    from peft import LoraConfig

    config = LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"], **lora})
    model = attach(llm, config, 0).eval()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    generator = torch.Generator().manual_seed(0)
    for p in trained.values():
        p.data.copy_(torch.randn(p.shape, generator=generator) * 0.05)
    loss = make(model.get_base_model())(rows).sum()
    loss.backward()
    assert not any(p.grad is not None for p in model.parameters() if not p.requires_grad)
    return loss.item(), {n: p.grad for n, p in trained.items()}


def distance(a, b):
    """Relative distance of two sets of gradients, all weights together."""
    top = sum((a[n].double() - b[n].double()).square().sum() for n in b)
    return (top / sum(b[n].double().square().sum() for n in b)).sqrt().item()


# --- gradients ---


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("fast", [True, False])
def test_checkpointing_changes_no_bit(data, family, dtype, fast):
    llm = tiny_llm(dtype, family)
    rows = token_rows(llm, data, 512).rows[:5]
    plain = packed_objective if fast else lambda m: plain_objective(m, 0)
    loss, expected = gradients(llm, rows, plain)
    again, found = gradients(llm, rows, lambda m: frugal_objective(m, 0, "checkpoint", fast))
    assert again == loss and expected.keys() == found.keys()
    assert all(torch.equal(found[n], g) for n, g in expected.items())
    assert all(g.abs().sum() > 0 for g in expected.values())


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("fast", [True, False])
def test_streaming_gives_the_same_gradients_up_to_rounding(tmp_path, data, family, fast):
    llm = mapped_tiny(tmp_path, "fp32", family)
    rows = token_rows(llm, data, 512).rows[:5]
    loss, expected = gradients(llm, rows, packed_objective)
    again, found = gradients(llm, rows, lambda m: frugal_objective(m, 0, "stream", fast))
    assert again == pytest.approx(loss, rel=1e-6) and distance(found, expected) < 1e-5
    for name, g in expected.items():
        torch.testing.assert_close(found[name], g, rtol=1e-3, atol=1e-5 * g.abs().max().item(), msg=name)


def test_streaming_in_bf16_is_as_close_to_fp32_as_the_ordinary_way(tmp_path, data):
    (tmp_path / "narrow").mkdir()
    narrow = mapped_tiny(tmp_path / "narrow", "bf16")
    wide = tiny_llm("bf16")
    wide.model.float()
    rows = token_rows(wide, data, 512).rows[:5]
    _, truth = gradients(wide, rows, packed_objective)
    _, plain = gradients(narrow, rows, packed_objective)
    _, stream = gradients(narrow, rows, lambda m: frugal_objective(m, 0, "stream"))
    assert 0 < distance(stream, truth) < 1.2 * distance(plain, truth) + 1e-4


def test_only_the_upper_layers(tmp_path, data):
    """Blocks below the first adapted one need no backward pass at all."""
    llm = mapped_tiny(tmp_path)
    rows = token_rows(llm, data, 512).rows[:4]
    _, expected = gradients(llm, rows, packed_objective, layers_to_transform=[2, 3])
    for way in ("checkpoint", "stream"):
        _, found = gradients(llm, rows, lambda m, way=way: frugal_objective(m, 0, way), layers_to_transform=[2, 3])
        assert found.keys() == expected.keys() and distance(found, expected) < 1e-5


# --- runs ---


def test_a_checkpointed_run_is_the_ordinary_run(data, tmp_path):
    llm, more = tiny_llm(), dict(held_out=data[:3], evaluate_every=1, accumulate=2)
    ordinary = tune_lora(llm, data, **SHORT, **more)
    frugal = tune_lora(llm, data, **SHORT, **more, frugal="checkpoint", out=tmp_path / "a")
    assert same_adapter(ordinary, frugal)
    assert (ordinary.losses, ordinary.held_out, ordinary.tokens) == (frugal.losses, frugal.held_out, frugal.tokens)
    assert frugal.card["settings"]["frugal"] == "checkpoint" and "frugal" not in ordinary.card["settings"]
    assert same_adapter(tune_lora(llm, data, **SHORT, **more, frugal="checkpoint", out=tmp_path / "a"), frugal)
    with pytest.raises(InputError, match="other settings"):
        tune_lora(llm, data, **SHORT, **more, out=tmp_path / "a")


def test_a_streamed_run_follows_the_ordinary_one_and_leaves_the_model_alone(data, tmp_path):
    llm = mapped_tiny(tmp_path)
    before = [p.clone() for p in llm.model.parameters()]
    ordinary = tune_lora(llm, data, **SHORT)
    frugal = tune_lora(llm, data, **SHORT, frugal="stream")
    assert frugal.losses == pytest.approx(ordinary.losses, rel=1e-4)
    assert all(torch.equal(a, b) for a, b in zip(before, llm.model.parameters(), strict=True))
    with pytest.raises(KeyError):  # an error in the middle leaves nothing behind either
        tune_lora(llm, data, **{**SHORT, "progress": lambda *_: {}["no"]}, frugal="stream")
    assert tune_lora(llm, data, **SHORT, frugal="stream").losses == frugal.losses


def test_refuses_what_it_cannot_stream(data, tmp_path):
    with pytest.raises(InputError, match="frugal.*memory-mapped weights.*load_llm.*'checkpoint'"):
        tune_lora(tiny_llm(), data, **SHORT, frugal="stream")
    llm = mapped_tiny(tmp_path)
    weight = llm.model.model.layers[1].mlp.up_proj.weight
    weight.data[0, 0] = 7.0  # dropping this page would undo it
    with pytest.raises(InputError, match="nobody has written to"):
        tune_lora(llm, data, **SHORT, frugal="stream")
    assert weight[0, 0] == 7.0
    with pytest.raises(InputError, match="frugal.*None, 'checkpoint' or 'stream'"):
        tune_lora(llm, data, **SHORT, frugal="offload")


# --- the output matrix in slices ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sliced_nll_against_cross_entropy(dtype):
    generator = torch.Generator().manual_seed(3)
    words = 2 * WORDS + 17
    x = torch.randn(9, 24, generator=generator).to(dtype).requires_grad_(True)
    head = (torch.randn(words, 24, generator=generator) / 3).to(dtype).requires_grad_(True)
    target = torch.tensor([0, WORDS - 1, WORDS, 2 * WORDS, words - 1, 5, 5, WORDS + 7, 1])
    weight = torch.rand(9, generator=generator)
    nll = torch.nn.functional.cross_entropy((x @ head.T).float(), target, reduction="none")
    dx, dhead = torch.autograd.grad((nll * weight).sum(), (x, head))
    parts, done = {}, []
    ours = SlicedNll.apply(
        x, head.detach(), target, lambda first, g: parts.update({first: g.clone()}), lambda first: done.append(first)
    )
    (found,) = torch.autograd.grad((ours * weight).sum(), x)
    close = dict(rtol=1e-4, atol=1e-5) if dtype == torch.float32 else dict(rtol=0.05, atol=0.02)
    torch.testing.assert_close(ours, nll, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found, dx, **close)
    assert list(parts) == [0, WORDS, 2 * WORDS] and done == 2 * [0, WORDS, 2 * WORDS]
    torch.testing.assert_close(torch.cat(list(parts.values())), dhead, **close)


def test_sliced_nll_with_large_logits_does_not_overflow():
    x, head = torch.full((2, 4), 50.0, requires_grad=True), torch.zeros(WORDS + 3, 4)
    head[7], head[WORDS + 1] = 100.0, -100.0
    nll = SlicedNll.apply(x, head, torch.tensor([7, WORDS + 1]))
    assert nll.tolist() == [0.0, pytest.approx(40000.0)]
    nll.sum().backward()
    assert torch.isfinite(x.grad).all() and x.grad[0].abs().max() == 0 and x.grad[1, 0] == pytest.approx(200.0)


# --- pages ---


def test_pages_are_found_dropped_and_read_again(tmp_path):
    torch.manual_seed(0)
    state = {"a": torch.randn(1000, 1000), "b": torch.randn(700, 1000), "own": torch.randn(3)}
    save_file(state, tmp_path / "pages.safetensors")
    mapped = load_file(tmp_path / "pages.safetensors")
    assert any(m.path.endswith("pages.safetensors") and m.written_kb == 0 for m in file_mappings())
    own = torch.randn(1000, 1000)
    pages = mapped_pages([mapped["a"], mapped["b"], own])
    assert id(own) not in pages and {id(mapped["a"]), id(mapped["b"])} <= pages.keys()
    (whole,) = pages[id(mapped["a"])]
    assert whole.start <= mapped["a"].data_ptr() and whole.end - whole.start < mapped["a"].nbytes + 8192
    assert mapped["a"].sum() == state["a"].sum() and mapped["b"].sum() == state["b"].sum()
    full = resident_kb("pages.safetensors")
    drop(pages[id(mapped["a"])])
    left = resident_kb("pages.safetensors")
    assert full > 6000 and left < full - 3800  # a: 3906 KB; neighbours on its border pages may go, too
    assert torch.equal(mapped["a"], state["a"]) and torch.equal(mapped["b"], state["b"])


def test_a_mapping_that_was_written_to_is_left_alone(tmp_path):
    save_file({"a": torch.zeros(5000), "b": torch.zeros(5000)}, tmp_path / "w.safetensors")
    mapped = load_file(tmp_path / "w.safetensors")
    assert len(mapped_pages(mapped.values())) == 2
    mapped["a"][17] = 1.0
    assert not mapped_pages(mapped.values())
    drop([])
    assert mapped["a"][17] == 1.0


@pytest.mark.model
def test_gradients_on_the_real_model():
    """fp32: equal up to rounding; bf16: as far from fp32 as the ordinary way. Weights as shipped, mapped."""
    from benchmarks.lora import dialogues
    from pllm_helpers.models import load_llm

    data = dialogues(3)
    narrow, wide = load_llm(dtype="bf16"), load_llm(dtype="fp32")
    rows = token_rows(wide, data, 512).rows
    lora = {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [0, 14, 29]}
    loss, truth = gradients(wide, rows, packed_objective, **lora)
    again, found = gradients(wide, rows, lambda m: frugal_objective(m, 0, "stream"), **lora)
    assert again == pytest.approx(loss, rel=1e-5) and distance(found, truth) < 1e-4
    _, plain = gradients(narrow, rows, packed_objective, **lora)
    _, stream = gradients(narrow, rows, lambda m: frugal_objective(m, 0, "stream"), **lora)
    _, checkpoint = gradients(narrow, rows, lambda m: frugal_objective(m, 0, "checkpoint"), **lora)
    assert all(torch.equal(checkpoint[n], g) for n, g in plain.items())
    assert distance(stream, truth) < 1.2 * distance(plain, truth)
