"""Hand-written gradients against autograd on the plain formulas; packed against padded batches."""

import copy

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig

from pllm_helpers.dialogue import DialogueSet
from pllm_helpers.tuning.adapters import attach
from pllm_helpers.tuning.data import token_rows
from pllm_helpers.tuning.forward import plain_objective
from pllm_helpers.tuning.kernels import AnswerNll, RmsNorm, Rotary, SharedInput, SwiGlu
from pllm_helpers.tuning.packed import is_packable, packed_objective, shared_beginning
from tests.unit.tuning_kit import dialogue_sets, tiny_llm


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def gradients(function, *inputs):
    """Value and gradients of ``(function(...) * weights).sum()``."""
    leaves = [x.detach().clone().requires_grad_(x.is_floating_point()) for x in inputs]
    out = function(*leaves)
    out = torch.cat([o.flatten() for o in (out if isinstance(out, tuple) else (out,))])
    (out * draw(len(out), seed=99).to(out.dtype)).sum().backward()
    return [out.detach(), *(x.grad for x in leaves if x.is_floating_point())]


def assert_close(ours, plain, inputs):
    """fp32: equal to 1e-5. bf16: no further from the fp32 values than 1.5 times the plain bf16 computation."""
    exact = gradients(plain, *inputs)
    for a, b in zip(gradients(ours, *inputs), exact, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * float(b.abs().max()))
    narrow = [x.bfloat16() if x.is_floating_point() else x for x in inputs]
    for a, b, e in zip(gradients(ours, *narrow), gradients(plain, *narrow), exact, strict=True):
        assert a.dtype == b.dtype
        assert (a.float() - e).norm() <= 1.5 * (b.float() - e).norm() + 1e-6 * e.norm()


def test_rms_norm():
    weight = draw(32, seed=2)

    def plain(x):
        wide = x.float()
        return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)).to(x.dtype) * weight.to(x.dtype)

    assert_close(lambda x: RmsNorm.apply(x, weight.to(x.dtype), 1e-5), plain, [draw(7, 32)])


def test_swiglu():
    assert_close(lambda g, u: SwiGlu.apply(g, u), lambda g, u: F.silu(g) * u, [draw(9, 40), draw(9, 40, seed=1)])


def test_rotary():
    from transformers.models.llama.modeling_llama import rotate_half

    angle = draw(6, 1, 8, seed=3)
    cos, sin = angle.cos(), angle.sin()

    def plain(x):
        c, s = (torch.cat([t, t], -1).to(x.dtype) for t in (cos, sin))
        return x * c + rotate_half(x) * s

    assert_close(lambda x: Rotary.apply(x, cos.to(x.dtype), sin.to(x.dtype)), plain, [draw(6, 3, 16)])


@pytest.mark.parametrize("with_input_gradient", [True, False])
def test_linear_layers_on_one_input_with_and_without_lora(with_input_gradient):
    w, bias = [draw(n, 24, seed=n) for n in (24, 8, 40)], draw(8, seed=7)
    scales = (2.0, 0.0, 0.5)
    x, a1, b1, a3, b3 = draw(10, 24), draw(4, 24, seed=1), draw(24, 4, seed=2), draw(3, 24, seed=3), draw(40, 3, seed=4)

    def ours(x, a1, b1, a3, b3):
        bases = tuple(
            (m.to(x.dtype), b if b is None else b.to(x.dtype)) for m, b in zip(w, (None, bias, None), strict=True)
        )
        x = x if with_input_gradient else x.detach()
        return SharedInput.apply(x, bases, scales, a1.float(), b1.float(), None, None, a3.float(), b3.float())

    def plain(x, a1, b1, a3, b3):
        y = x if with_input_gradient else x.detach()
        first = F.linear(y, w[0].to(y.dtype))
        third = F.linear(y, w[2].to(y.dtype))
        first = (first + 2.0 * (y.float() @ a1.float().T @ b1.float().T)).to(y.dtype)
        third = (third + 0.5 * (y.float() @ a3.float().T @ b3.float().T)).to(y.dtype)
        return first, F.linear(y, w[1].to(y.dtype), bias.to(y.dtype)), third + 0 * x.sum()

    def with_x(*args):
        return tuple(o + 0 * args[0].sum() for o in ours(*args))

    assert_close(with_x, plain, [x, a1, b1, a3, b3])


def test_answer_nll_is_cross_entropy_in_parts():
    head, target = draw(500, 16, seed=5) * 3, torch.randint(0, 500, (300,), generator=torch.Generator().manual_seed(0))

    def plain(x):
        return F.cross_entropy((x @ head.to(x.dtype).T).float(), target, reduction="none")

    assert_close(lambda x: AnswerNll.apply(x, head.to(x.dtype), target, True), plain, [draw(300, 16)])
    x = draw(4, 16) * 200  # targets whose probability is below the smallest fp32 number
    torch.testing.assert_close(
        AnswerNll.apply(x, head, target[:4], False), F.cross_entropy(x @ head.T, target[:4], reduction="none")
    )


def adapters(model):
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


def wrapped(llm, layers=None, modules=("q_proj", "v_proj")):
    """A peft model whose second matrices are not zero, so that every gradient is there."""
    config = LoraConfig(r=4, lora_alpha=8, target_modules=list(modules), layers_to_transform=layers)
    model = attach(llm, config, 0).eval()
    for i, (name, p) in enumerate(adapters(model).items()):
        if "lora_B" in name:
            p.data = 0.1 * draw(*p.shape, seed=i)
    return model


def losses_and_gradients(model, objective, rows):
    loss = objective(rows)
    (loss.sum() / 10).backward()
    grads = {n: p.grad for n, p in adapters(model).items()}
    model.zero_grad()
    return loss.detach(), grads


LONG = DialogueSet("u", "tell me " + "more and more " * 90, "No. " * 70)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize(
    ("layers", "modules"),
    [
        (None, ("q_proj", "v_proj")),
        ([2, 3], ("q_proj", "v_proj")),
        ([1], ("k_proj", "o_proj", "gate_proj", "up_proj", "down_proj")),
    ],
)
def test_packed_batches_give_the_losses_and_gradients_of_padded_ones(family, layers, modules):
    llm = tiny_llm(family=family)
    model = wrapped(llm, layers, modules)
    base = model.get_base_model()
    assert is_packable(base)
    data = dialogue_sets()
    for batch in (data[:5], [data[3], LONG], [data[0], data[0], data[0]], data[7:8]):
        rows = token_rows(llm, batch, 1024).rows
        ours = losses_and_gradients(model, packed_objective(base), rows)
        plain = losses_and_gradients(model, plain_objective(base, 0), rows)
        torch.testing.assert_close(ours[0], plain[0], rtol=1e-5, atol=1e-5)
        for name, g in plain[1].items():
            torch.testing.assert_close(ours[1][name], g, rtol=1e-4, atol=2e-5 * float(g.abs().max()), msg=name)


def test_shared_beginning_leaves_each_row_its_last_question_token():
    llm = tiny_llm()
    data = dialogue_sets(4)
    rows = token_rows(llm, data, 512).rows
    head = shared_beginning(rows)
    text = llm.tokenizer.decode(rows[0].ids[:head])
    assert text.endswith("<|im_start|>user\nWhat about")
    same = token_rows(llm, [data[0], data[0]], 512).rows
    assert shared_beginning(same) == len(same[0].ids) - same[0].answer - 1
    assert shared_beginning(rows[:1]) == 0


@pytest.mark.model
def test_packed_bf16_is_as_close_to_fp32_as_the_padded_path():
    from pllm_helpers.models import load_llm

    llm = load_llm(dtype="bf16")
    model = wrapped(llm)
    rows = token_rows(llm, dialogue_sets(4), 512).rows
    wide = copy.deepcopy(model).float()
    exact = losses_and_gradients(wide, plain_objective(wide.get_base_model(), 0), rows)
    ours = losses_and_gradients(model, packed_objective(model.get_base_model()), rows)
    plain = losses_and_gradients(model, plain_objective(model.get_base_model(), 0), rows)

    def away(side):
        return torch.cat([(side[1][n] - g).flatten() for n, g in exact[1].items()]).norm()

    assert (ours[0] - exact[0]).norm() <= 1.5 * (plain[0] - exact[0]).norm() + 0.005 * exact[0].norm()
    assert away(ours) <= 1.3 * away(plain)


@pytest.mark.model
def test_packed_fp32_equals_padded_fp32_on_the_real_model():
    from pllm_helpers.models import load_llm

    llm = load_llm(dtype="fp32")
    model = wrapped(llm)
    rows = token_rows(llm, dialogue_sets(4), 512).rows
    ours = losses_and_gradients(model, packed_objective(model.get_base_model()), rows)
    plain = losses_and_gradients(model, plain_objective(model.get_base_model(), 0), rows)
    torch.testing.assert_close(ours[0], plain[0], rtol=1e-5, atol=1e-5)
    for name, g in plain[1].items():
        assert (ours[1][name] - g).norm() <= 1e-4 * g.norm(), name
