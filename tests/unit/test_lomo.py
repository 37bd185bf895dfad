"""tune_lomo: plain SGD (or AdaLomo) with one gradient in memory at a time."""

import copy
import math
import weakref

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from pllm_helpers.evaluation import response_nll
from pllm_helpers.models import LLM
from pllm_helpers.runtime import InputError
from pllm_helpers.tuning import adapted, load_result, private_copy, tune_full, tune_lomo
from pllm_helpers.tuning.data import batch_stream, token_rows
from pllm_helpers.tuning.forward import plain_objective
from pllm_helpers.tuning.frugal import WORDS, SlicedNll
from pllm_helpers.tuning.full import STATE
from pllm_helpers.tuning.lomo import AdaLomo, FusedBackward, GradientNorm, LomoRun, clip_share
from tests.unit.test_full import interrupted, same_weights
from tests.unit.tuning_kit import SIZES, dialogue_sets, tiny_llm

SHORT = dict(steps=4, lr=0.5, batch_size=4, progress=False)
VARIANTS = {
    "plain": {},
    "decay": {"weight_decay": 0.1},
    "clip": {"clip_norm": 0.5},
    "both": {"weight_decay": 0.1, "clip_norm": 0.5},
}


def untied() -> LLM:
    """The tiny model with an output matrix of its own."""
    llm = tiny_llm()
    model = LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=False))
    model.load_state_dict(llm.model.state_dict())
    model.lm_head.weight.data.mul_(0.9)
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    return LLM(model.eval().requires_grad_(False), llm.tokenizer, "untied", "fp32")


@pytest.fixture(scope="module")
def llm():
    return tiny_llm()


@pytest.fixture(scope="module")
def data():
    return dialogue_sets(12)


@pytest.fixture(scope="module", params=["tied", "untied", "biased"])
def any_llm(request, llm):
    return {"tied": lambda: llm, "untied": untied, "biased": lambda: tiny_llm(family="qwen2")}[request.param]()


# --- equal to SGD ---


@pytest.mark.parametrize("variant", VARIANTS)
def test_whole_gradients_make_the_steps_of_sgd_to_the_last_bit(any_llm, data, variant):
    """With clipping too: the norm comes from a pass of its own, and is that of ``clip_grad_norm_``."""
    more = VARIANTS[variant]
    lomo = tune_lomo(any_llm, data, **SHORT, **more, fused_head=False)
    sgd = tune_full(any_llm, data, **SHORT, **more, optimizer="sgd")
    assert lomo.losses == sgd.losses and same_weights(lomo, sgd) and lomo.tokens == sgd.tokens
    assert lomo.losses[-1] != lomo.losses[0]


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_fused_head_makes_the_same_steps_up_to_rounding(any_llm, data, variant):
    more = VARIANTS[variant] | {"checkpointing": variant == "both"}
    lomo = tune_lomo(any_llm, data, **SHORT, **more)
    sgd = tune_full(any_llm, data, **SHORT, **more, optimizer="sgd")
    np.testing.assert_allclose(lomo.losses, sgd.losses, rtol=1e-5)
    for name, p in sgd.weights.items():
        moved = (p - any_llm.model.get_parameter(name)).norm()
        assert (lomo.weights[name] - p).norm() <= 1e-4 * moved + 2e-7 * p.norm(), name
    whole = any_llm.model.get_output_embeddings().weight.nbytes / 2**20
    tied = any_llm.model.get_output_embeddings().weight is any_llm.model.get_input_embeddings().weight
    assert (lomo.card["measured"]["largest_gradient_mb"] < whole / 5) == tied  # untied: the embedding's is whole


def test_clipping_by_value_clamps_the_sum_of_both_parts(llm, data):
    lomo = tune_lomo(llm, data, **{**SHORT, "steps": 1}, warmup=0, clip_value=1e-3)
    gradients = gradients_of(llm, data)
    for name, g in gradients.items():
        expected = llm.model.get_parameter(name) - 0.5 * g.clamp(-1e-3, 1e-3)
        torch.testing.assert_close(lomo.weights[name], expected, rtol=0, atol=1e-7, msg=name)
    assert any((g.abs() > 1e-3).any() for g in gradients.values())


def gradients_of(llm, data, batch=4):
    """Gradients of the first batch by plain autograd, by name."""
    model = copy.deepcopy(llm.model).requires_grad_(True)
    rows = token_rows(llm, data, 512).rows
    chosen = [rows[i] for i in next(batch_stream([len(r.ids) for r in rows], batch, 0))]
    (plain_objective(model, 0)(chosen).sum() / sum(r.answer for r in chosen)).backward()
    return {n: p.grad for n, p in model.named_parameters()}


def test_bf16_weights_take_the_steps_of_the_wide_ones_rounded(data):
    llm = tiny_llm("bf16")
    for more in ({}, {"fused_head": False}):
        result = tune_lomo(llm, data, **{**SHORT, "lr": 0.1}, dtype="bf16", **more)
        assert all(w.dtype == torch.bfloat16 for w in result.weights.values()) and result.losses[-1] < result.losses[0]
        wide = tune_lomo(llm, data, **{**SHORT, "lr": 0.1}, dtype="fp32")
        np.testing.assert_allclose(result.losses, wide.losses, rtol=0.02)


# --- gradients are used at once and freed ---


class Watcher:
    """Notes at every gradient which others are alive: as ``.grad`` of a weight, or as a tensor."""

    def __init__(self, parameters):
        self.parameters, self.refs, self.names, self.alive = parameters, [], [], []

    def __call__(self, name, p, g, first):
        others = sum(q.grad is not None for q in self.parameters.values())
        self.alive.append(others + sum(r() is not None for r in self.refs))
        self.refs.append(weakref.ref(g))
        self.names.append(name)


def test_hooks_see_every_weight_once_with_its_whole_gradient_and_no_other_gradient_is_alive(llm, data):
    expected, double = gradients_of(llm, data), private_copy(llm)
    parameters = dict(double.model.named_parameters())
    rows = token_rows(llm, data, 512).rows
    chosen = [rows[i] for i in next(batch_stream([len(r.ids) for r in rows], 4, 0))]
    found, watcher = {}, Watcher(parameters)
    with FusedBackward(parameters) as backward:
        for _ in range(2):  # a graph may be walked twice
            loss = plain_objective(double.model, 0)(chosen).sum() / sum(r.answer for r in chosen)
            backward(loss, watcher, keep_graph=True)
            backward(loss, lambda name, p, g, first: found.update({name: g.clone()}))
    assert watcher.names[: len(expected)] == watcher.names[len(expected) :]
    assert sorted(watcher.names[: len(expected)]) == sorted(expected)
    assert watcher.names[len(expected) - 1] == "model.embed_tokens.weight"  # tied: waits for its second part
    assert watcher.alive == [0] * len(watcher.alive)
    assert not any(p.grad is not None for p in parameters.values())
    assert all(torch.equal(found[n], g) for n, g in expected.items())
    assert backward.largest == parameters["model.embed_tokens.weight"].nbytes
    (parameters["model.norm.weight"].sum() * 1).backward()  # the hooks are gone
    assert parameters["model.norm.weight"].grad is not None


def test_with_a_fused_head_no_gradient_of_the_whole_matrix_exists(llm, data):
    sizes = []
    with pytest.MonkeyPatch.context() as patch:
        part = FusedBackward.part

        def noted(self, name, p, gradient, first=None):
            sizes.append((name, first, gradient.is_sparse, p.shape[0]))
            part(self, name, p, gradient, first)

        patch.setattr(FusedBackward, "part", noted)
        tune_lomo(llm, data, **{**SHORT, "steps": 1})
    head = [s for s in sizes if s[0] == "model.embed_tokens.weight"]
    assert [s[1] for s in head[:-1]] == list(range(0, 49152, WORDS)) and all(s[3] == WORDS for s in head[:-1])
    assert head[-1][2] and sizes[-1] == head[-1] and sizes[: len(head) - 1] == head[:-1]


def test_a_weight_used_in_two_blocks_is_updated_after_both(data):
    """As with shared blocks: the update must wait for every use of the weight."""

    def net():
        torch.manual_seed(0)
        layers = [torch.nn.Linear(6, 6) for _ in range(3)]
        return torch.nn.ModuleList(layers), [layers[0], layers[1], layers[0], layers[2], layers[1]]

    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(1))
    results = []
    for fused in (True, False):
        modules, path = net()
        parameters = dict(modules.named_parameters())
        y = x
        for layer in path:
            y = torch.tanh(layer(y))
        if fused:
            with FusedBackward(parameters) as backward:
                backward(y.square().sum(), lambda name, p, g, first: p.sub_(g, alpha=0.1))
        else:
            y.square().sum().backward()
            torch.optim.SGD(modules.parameters(), lr=0.1).step()
        results.append({n: p.detach().clone() for n, p in parameters.items()})
    assert all(torch.equal(results[0][n], results[1][n]) for n in results[0])


def test_an_error_in_a_callback_leaves_no_gradient_and_no_model_changed(llm, data):
    before = {k: p.clone() for k, p in llm.model.named_parameters()}
    parameters = dict(private_copy(llm).model.named_parameters())
    with FusedBackward(parameters) as backward:
        loss = sum(p.square().sum() for p in parameters.values())

        def fail(name, p, g, first):
            raise KeyError(name)

        with pytest.raises(KeyError):
            backward(loss, fail)
        assert not any(p.grad is not None for p in parameters.values())
        with pytest.raises(AssertionError, match="not loss.backward"):
            parameters["model.norm.weight"].sum().backward()

    def stop(step, loss, seconds):
        raise KeyError("in the middle")

    with pytest.raises(KeyError):
        tune_lomo(llm, data, **{**SHORT, "progress": stop})
    assert all(torch.equal(p, before[k]) for k, p in llm.model.named_parameters())
    assert not any(p.requires_grad or p._backward_hooks for p in llm.model.parameters())
    assert not llm.model.get_input_embeddings().sparse


# --- norms ---


def test_norm_from_parts_is_the_norm_of_the_sum(llm, data):
    """The tied matrix: slices of the output's part, then the embedding's rows, tokens that repeat included."""
    gradients = gradients_of(llm, data)
    rows = token_rows(llm, data, 512).rows
    chosen = [rows[i] for i in next(batch_stream([len(r.ids) for r in rows], 4, 0))]
    double = private_copy(llm)
    run = LomoRun(
        double, rows, schedule(), {"optimizer": "lomo", "clip_norm": 1.0, "clip_value": None, "fused_head": True}
    )
    norm = GradientNorm({i for r in chosen for i in r.ids} | {run.pad})
    loss = run.objective(chosen).sum() / sum(r.answer for r in chosen)
    run.backward(loss, norm, keep_graph=True)
    squares = {n: g.double().square().sum().item() for n, g in gradients.items()}
    assert norm.total(run.parameters).item() == pytest.approx(math.sqrt(sum(squares.values())), rel=1e-5)
    assert squares["model.embed_tokens.weight"] > 0.02 * sum(squares.values())
    run.close()


def schedule():
    from pllm_helpers.tuning.loop import Schedule

    return Schedule(1, 0.1, 4, 1, 0, "constant", 0, 0.0, 0)


def test_clip_share():
    assert clip_share(torch.tensor(4.0), 1.0).item() == pytest.approx(0.25, rel=1e-5)
    assert clip_share(torch.tensor(0.5), 1.0).item() == 1.0
    with pytest.raises(InputError, match="finite gradients.*Lower lr"):
        clip_share(torch.tensor(math.inf), 1.0)


# --- AdaLomo ---


class PlainAdaLomo:
    """The formulas of 2310.10195 with the constants of its code, written out with whole matrices."""

    def __init__(self):
        self.t, self.rows, self.columns, self.squares = 0, {}, {}, {}

    def step(self, weights, gradients, lr, decay):
        self.t += 1
        beta = 1 - self.t**-0.8
        for name, p in weights.items():
            g = gradients[name].double()
            square = g**2 + 1e-30
            if p.ndim == 1:
                v = beta * self.squares.get(name, 0) + (1 - beta) * square
                self.squares[name] = v
            else:
                r = beta * self.rows.get(name, 0) + (1 - beta) * square.mean(1)
                c = beta * self.columns.get(name, 0) + (1 - beta) * square.mean(0)
                self.rows[name], self.columns[name] = r, c
                v = torch.outer(r, c) / r.mean()
            u = g / v.sqrt()
            u = u / max(1.0, (u**2).mean().sqrt().item())
            size = lr * max(1e-3, (p.double() ** 2).mean().sqrt().item())
            p.copy_(p * (1 - size * decay) - size * u)


@pytest.mark.parametrize("decay", [0.0, 0.5])
@pytest.mark.parametrize("more", [{}, {"fused_head": False}, {"clip_norm": 0.5}], ids=str)
def test_adalomo_is_its_formulas(llm, data, decay, more):
    result = tune_lomo(llm, data, steps=4, lr=0.05, batch_size=4, progress=False, optimizer="adalomo", warmup=0,
                       decay="constant", weight_decay=decay, **more)  # fmt: skip
    model, rule, losses = copy.deepcopy(llm.model).requires_grad_(True), PlainAdaLomo(), []
    rows = token_rows(llm, data, 512).rows
    stream = batch_stream([len(r.ids) for r in rows], 4, 0)
    for _ in range(4):
        chosen = [rows[i] for i in next(stream)]
        loss = plain_objective(model, 0)(chosen).sum() / sum(r.answer for r in chosen)
        loss.backward()
        if "clip_norm" in more:
            torch.nn.utils.clip_grad_norm_(model.parameters(), more["clip_norm"])
        with torch.no_grad():
            weights = dict(model.named_parameters())
            rule.step(weights, {n: p.grad for n, p in weights.items()}, 0.05, decay)
        model.zero_grad()
        losses.append(loss.item())
    np.testing.assert_allclose(result.losses, losses, rtol=1e-4)
    for name, p in model.named_parameters():
        moved = (p - llm.model.get_parameter(name)).norm()
        assert moved > 0 and (result.weights[name] - p).norm() <= 1e-3 * moved, name
    assert result.losses[-1] < result.losses[0] - 0.3


def test_adalomo_keeps_a_row_and_a_column_per_matrix():
    parameters = {"m": torch.zeros(50, 30), "v": torch.zeros(7)}
    state = AdaLomo(parameters, 0.0).state
    assert {k: tuple(v.shape) for k, v in state.items()} == {"row/m": (50,), "column/m": (30,), "square/v": (7,)}


def test_adalomo_steps_follow_the_size_of_the_weight_not_of_the_gradient():
    torch.manual_seed(0)
    p, g = torch.randn(40, 30), torch.randn(40, 30)
    moves = []
    for scale in (1.0, 1e-6, 1e6):
        rule, q = AdaLomo({"m": p}, 0.0), p.clone()
        rule.start_step(0)
        rule("m", q, g * scale, 0.01)
        moves.append(q - p)
    torch.testing.assert_close(moves[0], moves[1], rtol=1e-3, atol=1e-7)
    torch.testing.assert_close(moves[0], moves[2], rtol=1e-3, atol=1e-7)
    assert moves[0].square().mean().sqrt() == pytest.approx(0.01 * p.square().mean().sqrt().item(), rel=0.05)


# --- beside lomo-optim ---


def peer_run(llm, data, make, steps=4, lr=0.5, clip=None):
    """Steps of an optimiser of ``lomo_optim`` on a copy, our batches and objective, warm-up and decay off."""
    double = private_copy(llm)
    optimizer, objective = make(double.model), plain_objective(double.model, 0)
    rows = token_rows(llm, data, 512).rows
    stream, losses = batch_stream([len(r.ids) for r in rows], 4, 0), []
    for _ in range(steps):
        chosen = [rows[i] for i in next(stream)]
        loss = objective(chosen).sum() / sum(r.answer for r in chosen)
        losses.append(loss.item())
        if clip:
            optimizer.grad_norm(loss)
        optimizer.fused_backward(loss, lr)
    return losses, {n: p.detach() for n, p in double.model.named_parameters()}


@pytest.mark.parametrize("clip", [None, 0.5])
def test_same_weights_as_lomo_optim(any_llm, data, clip):
    peer = pytest.importorskip("lomo_optim", reason="lomo-optim is not installed (extra: test)")
    losses, weights = peer_run(any_llm, data, lambda m: peer.Lomo(m, lr=0.5, clip_grad_norm=clip), clip=clip)
    settings = SHORT | dict(warmup=0, decay="constant", clip_norm=clip)
    ours = tune_lomo(any_llm, data, **settings, fused_head=False)
    if clip is None:
        assert ours.losses == losses and all(torch.equal(p, ours.weights[n]) for n, p in weights.items())
    np.testing.assert_allclose(ours.losses, losses, rtol=1e-5)
    for run in (ours, tune_lomo(any_llm, data, **settings)):
        for n, p in weights.items():
            moved = (p - any_llm.model.get_parameter(n)).norm()
            assert (run.weights[n] - p).norm() <= 1e-4 * moved + 2e-7 * p.norm(), n


def test_same_weights_as_adalomo_of_lomo_optim(llm, data, monkeypatch):
    peer = pytest.importorskip("lomo_optim", reason="lomo-optim is not installed (extra: test)")
    monkeypatch.setattr(
        torch.Tensor, "cuda", lambda self: self
    )  # it puts its state on a GPU, whatever the model's place
    losses, weights = peer_run(llm, data, lambda m: peer.AdaLomo(m, lr=0.05), lr=0.05)
    settings = SHORT | dict(lr=0.05, warmup=0, decay="constant", optimizer="adalomo")
    ours = tune_lomo(llm, data, **settings)
    np.testing.assert_allclose(ours.losses, losses, rtol=1e-5)
    for n, p in weights.items():
        assert (ours.weights[n] - p).norm() <= 1e-3 * (p - llm.model.get_parameter(n)).norm(), n


# --- runs ---


@pytest.mark.parametrize("more", [{}, {"optimizer": "adalomo", "lr": 0.05}, {"clip_norm": 1.0}], ids=str)
def test_a_resumed_run_is_bit_equal(llm, data, tmp_path, more):
    settings = SHORT | more | dict(held_out=data[:2], evaluate_every=2)
    whole = tune_lomo(llm, data, **settings)
    interrupted(tune_lomo, llm, data, tmp_path, 2, **settings)
    resumed = tune_lomo(llm, data, **settings, out=tmp_path)
    assert resumed.losses == whole.losses and resumed.held_out == whole.held_out and same_weights(resumed, whole)
    assert not (tmp_path / STATE).exists() and same_weights(load_result(tmp_path), whole)
    with pytest.raises(InputError, match="other settings"):
        tune_lomo(llm, data, **{**settings, "fused_head": False}, out=tmp_path)


def test_training_fits_the_answers(llm, data):
    result = tune_lomo(llm, data, steps=25, lr=0.05, batch_size=4, optimizer="adalomo", progress=False)
    with adapted(llm, result) as tuned:
        assert response_nll(tuned, data).mean() < response_nll(llm, data).mean() - 1
    assert result.parameters == llm.parameters and result.card["settings"]["method"] == "lomo"


def test_divergence_is_stopped_and_the_checkpoint_stays(llm, data, tmp_path):
    settings = dict(batch_size=4, progress=False, decay="constant", warmup=0)
    with pytest.raises(InputError, match=r"lr: expected .*step \d+.*Lower lr"):
        tune_lomo(llm, data, steps=30, lr=300.0, **settings)
    interrupted(tune_lomo, llm, data, tmp_path, 2, **SHORT)
    before = (tmp_path / STATE).read_bytes()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            SlicedNll, "backward", staticmethod(lambda ctx, g: (ctx.saved_tensors[0] * math.nan, *[None] * 4))
        )
        with pytest.raises(InputError, match="expected finite weights.*after step 3.*Lower lr"):
            tune_lomo(llm, data, **SHORT, out=tmp_path, checkpoint_every=1)
    assert (tmp_path / STATE).read_bytes() == before


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (dict(optimizer="sgd"), "optimizer.*'lomo' or 'adalomo'"),
        (dict(clip_norm=1.0, clip_value=1.0), "clip_norm or clip_value, got both"),
        (dict(clip_norm=0), "clip_norm"),
        (dict(clip_value=-1.0), "clip_value"),
        (dict(lr=-1.0), "lr"),
        (dict(steps=0), "steps"),
        (dict(dtype="int8"), "dtype"),
        (dict(batch_size=0), "batch_size"),
        (dict(held_out=[]), "held_out"),
    ],
    ids=str,
)
def test_refuses_settings_out_of_range(llm, data, bad, message):
    with pytest.raises(InputError, match=message):
        tune_lomo(llm, data, **{**SHORT, **bad})


def test_a_model_that_is_no_llama(data):
    from transformers import OPTConfig, OPTForCausalLM

    config = OPTConfig(
        vocab_size=49152, hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=2, word_embed_proj_dim=32
    )
    torch.manual_seed(0)
    opt = LLM(OPTForCausalLM(config).eval().requires_grad_(False), tiny_llm().tokenizer, "tiny-opt", "fp32")
    lomo = tune_lomo(opt, data, **SHORT, checkpointing=True)
    sgd = tune_full(opt, data, **SHORT, optimizer="sgd")
    np.testing.assert_allclose(lomo.losses, sgd.losses, rtol=1e-5)
    assert lomo.losses[-1] < lomo.losses[0]
