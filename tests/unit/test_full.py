"""tune_full: exact gradients of all weights in a private copy; resuming, damage and bad input."""

import copy
import json
import math
import resource
import shutil

import numpy as np
import pytest
import torch

from pllm_helpers.dialogue import DialogueSet
from pllm_helpers.evaluation import response_nll
from pllm_helpers.models import generate
from pllm_helpers.runtime import InputError
from pllm_helpers.tuning import adapted, load_result, private_copy, tune_full, tune_lomo, tune_lora, with_weights
from pllm_helpers.tuning.adapters import CARD
from pllm_helpers.tuning.data import batch_stream, token_rows
from pllm_helpers.tuning.full import MODEL, STATE, FullRun
from tests.unit.tuning_kit import dialogue_sets, tiny_llm

IDS = torch.arange(20, 40)[None]
SHORT = dict(steps=4, lr=1e-3, batch_size=4, progress=False)


@pytest.fixture(scope="module")
def llm():
    return tiny_llm()


@pytest.fixture(scope="module")
def data():
    return dialogue_sets(12)


@pytest.fixture(scope="module")
def trained(llm, data, tmp_path_factory):
    return tune_full(llm, data, **SHORT, out=tmp_path_factory.mktemp("run"))


def same_weights(a, b) -> bool:
    return a.weights.keys() == b.weights.keys() and all(torch.equal(v, b.weights[k]) for k, v in a.weights.items())


class Stop(Exception):
    pass


def interrupted(tune, llm, data, folder, after=2, **more):
    """Leave the checkpoint of step ``after`` behind and stop with an exception."""
    write, seen = FullRun.write, []

    def stop(self, where, key):
        write(self, where, key)
        seen.append(1)
        if len(seen) == after:
            raise Stop

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stop):
        patch.setattr(FullRun, "write", stop)
        tune(llm, data, **{**SHORT, **more}, out=folder, checkpoint_every=1)


# --- what it computes ---


def plain_loop(llm, data, steps, make_optimizer):
    """Full logits, a loop over rows, torch's optimiser: nothing of the package but the rows and their order."""
    model = copy.deepcopy(llm.model).requires_grad_(True)
    optimizer, rows = make_optimizer(model.parameters()), token_rows(llm, data, 512).rows
    stream, losses = batch_stream([len(r.ids) for r in rows], 4, 0), []
    for _ in range(steps):
        batch = [rows[i] for i in next(stream)]
        total = 0.0
        for r in batch:
            logits = model(torch.tensor([r.ids])).logits[0, -r.answer - 1 : -1]
            total += torch.nn.functional.cross_entropy(logits, torch.tensor(r.ids[-r.answer :]), reduction="sum")
        loss = total / sum(r.answer for r in batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, dict(model.named_parameters())


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_equals_a_plain_loop_with_the_optimiser_of_torch(llm, data, optimizer):
    lr, decay = {"adam": (1e-3, 0.1), "sgd": (0.5, 0.01)}[optimizer]
    kind = {"adam": torch.optim.AdamW, "sgd": torch.optim.SGD}[optimizer]
    losses, weights = plain_loop(llm, data, 3, lambda p: kind(p, lr=lr, weight_decay=decay))
    settings = SHORT | dict(steps=3, lr=lr, warmup=0, decay="constant", weight_decay=decay, optimizer=optimizer)
    result = tune_full(llm, data, **settings)
    np.testing.assert_allclose(result.losses, losses, rtol=1e-4)
    for name, p in weights.items():
        moved = (p - llm.model.get_parameter(name)).norm()
        assert moved > 0, name
        assert (result.weights[name] - p).norm() <= 0.02 * moved, name  # Adam divides by small numbers


PADDED = {
    "sgd": (tune_full, dict(optimizer="sgd")),
    "lomo": (tune_lomo, {}),
    "lomo, whole": (tune_lomo, dict(fused_head=False)),
    "lomo, clipped": (tune_lomo, dict(clip_norm=1e-3)),
    "adam": (tune_full, dict(optimizer="adam", lr=1e-3)),
}


@pytest.mark.parametrize("kind", PADDED)
def test_the_token_that_ends_a_turn_is_trained_though_it_also_pads(data, kind):
    """SmolLM2 pads with its end of turn, for which ``torch.nn.Embedding(padding_idx)`` gives no gradient."""
    llm = tiny_llm(pad_token_id=2)
    assert llm.tokenizer.pad_token_id == llm.tokenizer.eos_token_id == llm.model.model.embed_tokens.padding_idx == 2
    model = copy.deepcopy(llm.model).requires_grad_(True)
    weight, rows = model.get_input_embeddings().weight, token_rows(llm, data[:4], 512).rows
    total = torch.zeros(())
    for r in rows:  # row by row, looked up by indexing: no padding, no embedding module
        assert 2 in r.ids[: -r.answer]
        logits = model(inputs_embeds=weight[r.ids][None]).logits[0, -r.answer - 1 : -1]
        total = total + torch.nn.functional.cross_entropy(logits, torch.tensor(r.ids[-r.answer :]), reduction="sum")
    (total / sum(r.answer for r in rows)).backward()
    tune, more = PADDED[kind]
    settings = SHORT | dict(steps=1, lr=0.5, warmup=0) | more
    result = tune(llm, data[:4], **settings)
    gradient = weight.grad[2]
    if kind == "adam":  # the first step goes as far as lr for every element that has a gradient
        found, expected = (weight - result.weights["model.embed_tokens.weight"])[2], 1e-3 * gradient.sign()
        torch.testing.assert_close(found, expected, rtol=0.01, atol=1e-6)
        return
    if kind == "lomo, clipped":
        norm = torch.linalg.vector_norm(torch.stack([p.grad.norm() for p in model.parameters()]))
        gradient = gradient * (1e-3 / norm)
    found = (weight - result.weights["model.embed_tokens.weight"])[2] / settings["lr"]
    assert (found - gradient).norm() <= 1e-3 * gradient.norm() + 1e-7


def test_leaves_the_model_alone_and_the_result_answers(llm, data):
    before = {k: p.clone() for k, p in llm.model.named_parameters()}
    logits, state = llm.model(IDS).logits, torch.get_rng_state()
    result = tune_full(llm, data, **{**SHORT, "steps": 12, "lr": 3e-3})
    assert all(torch.equal(p, before[k]) for k, p in llm.model.named_parameters())
    assert not any(p.requires_grad or p.grad is not None or p._backward_hooks for p in llm.model.parameters())
    assert torch.equal(llm.model(IDS).logits, logits) and torch.equal(state, torch.get_rng_state())
    assert result.adapter_path is None and not result.adapter and result.parameters == llm.parameters
    with adapted(llm, result) as tuned:
        assert response_nll(tuned, data).mean() < response_nll(llm, data).mean() - 0.5
        assert len(generate(tuned, ["hi"], max_new_tokens=3)) == 1
        assert tuned.model.lm_head.weight is tuned.model.model.embed_tokens.weight
    assert torch.equal(llm.model(IDS).logits, logits)
    assert result.peak_mb > 10 and result.seconds > 0 and result.card["settings"]["method"] == "full"


def test_first_loss_and_held_out_curve_are_the_nll_of_response_nll(llm, data):
    held = data[:5]
    result = tune_full(llm, data[5:], **SHORT, held_out=held, evaluate_every=2)
    assert [s for s, _ in result.held_out] == [0, 2, 4]
    assert result.held_out[0][1] == pytest.approx(response_nll(llm, held).mean(), abs=1e-5)
    tuned = with_weights(llm, result.weights)
    assert result.held_out[-1][1] == pytest.approx(response_nll(tuned, held).mean(), abs=1e-5)
    assert same_weights(result, tune_full(llm, data[5:], **SHORT))


def test_accumulated_batches_equal_one_large_batch(llm):
    rows = dialogue_sets(8)
    settings = dict(steps=1, lr=0.5, optimizer="sgd", warmup=0, progress=False)
    whole = tune_full(llm, rows, **settings, batch_size=8)
    parts = tune_full(llm, rows, **settings, batch_size=2, accumulate=4)
    assert whole.losses == pytest.approx(parts.losses, rel=1e-6)
    for name, p in whole.weights.items():
        torch.testing.assert_close(p, parts.weights[name], rtol=1e-4, atol=1e-6, msg=name)


def test_computing_blocks_twice_changes_no_bit(llm, data):
    result = tune_full(llm, data, **SHORT, checkpointing=True)
    assert same_weights(result, tune_full(llm, data, **SHORT))


def test_the_seed_decides_the_batches(llm, data):
    torch.manual_seed(5)
    first = tune_full(llm, data, **SHORT, seed=1)
    torch.manual_seed(6)
    assert same_weights(first, tune_full(llm, data, **SHORT, seed=1))
    assert not same_weights(first, tune_full(llm, data, **SHORT, seed=2))


def test_private_copy_is_private_tied_and_of_the_wanted_dtype(llm):
    double = private_copy(llm, "bf16")
    assert double.dtype == "bf16" and double.model.lm_head.weight is double.model.model.embed_tokens.weight
    for name, p in double.model.named_parameters():
        own = llm.model.get_parameter(name)
        assert p.dtype == torch.bfloat16 and p.requires_grad and torch.equal(p, own.bfloat16())
    same = private_copy(llm)
    for p in same.model.parameters():
        p.data.add_(1)
    assert not any(torch.equal(p, llm.model.get_parameter(n)) for n, p in same.model.named_parameters())


def test_bf16_copy_trains_and_its_small_updates_are_lost(data):
    llm = tiny_llm("bf16")
    large = tune_full(llm, data, **{**SHORT, "lr": 0.01}, dtype="bf16")
    small = tune_full(llm, data, **{**SHORT, "lr": 1e-7}, dtype="bf16")
    assert all(w.dtype == torch.bfloat16 for w in large.weights.values()) and large.losses[-1] < large.losses[0]
    norm = "model.norm.weight"  # ones: 1e-7 is far below the last of their 8 bits
    assert torch.equal(small.weights[norm], llm.model.get_parameter(norm))
    assert not torch.equal(large.weights[norm], llm.model.get_parameter(norm))


# --- folder, resuming ---


def test_folder_holds_weights_and_card_without_any_text(llm, data, trained):
    folder = trained.weights_path
    assert {p.name for p in folder.iterdir()} - {".lock"} == {MODEL, CARD}
    card = json.loads((folder / CARD).read_text(encoding="utf-8"))
    assert len(card["data_sha256"]) == 64 and card["dialogues"] == len(data)
    assert set(card["versions"]) == {"torch", "transformers"}
    everything = b"".join(p.read_bytes() for p in folder.iterdir()).decode("utf-8", "replace")
    assert not any(d.answer in everything or d.question in everything for d in data)
    again = load_result(folder)
    assert same_weights(again, trained) and again.losses == trained.losses and again.tokens == trained.tokens
    with adapted(llm, folder) as tuned:
        assert torch.equal(tuned.model(IDS).logits, with_weights(llm, trained.weights).model(IDS).logits)
    stamp = (folder / MODEL).stat().st_mtime_ns
    assert same_weights(tune_full(llm, data, **SHORT, out=folder), trained)  # returned, not repeated
    assert (folder / MODEL).stat().st_mtime_ns == stamp


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_a_resumed_run_is_bit_equal(llm, data, tmp_path, optimizer):
    more = dict(optimizer=optimizer, held_out=data[:2], evaluate_every=2, accumulate=2)
    whole = tune_full(llm, data, **SHORT, **more)
    for after in (1, 3):
        folder = tmp_path / str(after)
        interrupted(tune_full, llm, data, folder, after, **more)
        assert (folder / STATE).is_file() and not (folder / CARD).exists()
        resumed = tune_full(llm, data, **SHORT, **more, out=folder)
        assert resumed.losses == whole.losses and resumed.held_out == whole.held_out
        assert same_weights(resumed, whole) and not (folder / STATE).exists()


def test_a_caller_may_end_a_run_and_go_on_later(llm, data, tmp_path):
    ended = tune_full(llm, data, **{**SHORT, "progress": lambda step, loss, seconds: step < 2}, out=tmp_path)
    assert len(ended.losses) == 2 and ended.card["ended_at"] == 2 and ended.weights_path is None
    assert not (tmp_path / CARD).exists()
    assert same_weights(tune_full(llm, data, **SHORT, out=tmp_path), tune_full(llm, data, **SHORT))


def test_another_run_in_the_same_folder_is_refused(llm, data, trained, tmp_path):
    interrupted(tune_full, llm, data, tmp_path / "halfway")
    for folder in (trained.weights_path, tmp_path / "halfway"):
        for change in (dict(steps=5), dict(optimizer="sgd"), dict(seed=1), dict(held_out=data[:2])):
            with pytest.raises(InputError, match="other settings, data or base model"):
                tune_full(llm, data, **{**SHORT, **change}, out=folder)
    tune_lora(llm, data, steps=1, lr=0.01, progress=False, out=tmp_path / "lora")
    with pytest.raises(InputError, match="other settings, data or base model"):
        tune_full(llm, data, **SHORT, out=tmp_path / "lora")


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty"])
def test_damaged_files_are_refused(llm, data, trained, tmp_path, damage):
    interrupted(tune_full, llm, data, tmp_path / "run")
    finished = shutil.copytree(trained.weights_path, tmp_path / "finished")
    for file in (tmp_path / "run" / STATE, finished / MODEL):
        body = file.read_bytes()
        file.write_bytes(
            {"cut": body[:-100], "flipped": body[:-5] + bytes([body[-5] ^ 64]) + body[-4:]}.get(damage, b"")
        )
    with pytest.raises(InputError, match="checkpoint.*damaged"):
        tune_full(llm, data, **SHORT, out=tmp_path / "run")
    with pytest.raises(InputError, match="weights.*finished run"):
        load_result(finished)
    again = tune_full(llm, data, **SHORT, out=tmp_path / "run", resume=False)
    assert same_weights(again, trained)


def test_full_disk_is_an_error_and_the_last_checkpoint_stays(llm, data, tmp_path):
    interrupted(tune_full, llm, data, tmp_path)
    before = (tmp_path / STATE).read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
        with pytest.raises(InputError, match="room to write"):
            tune_full(llm, data, **SHORT, out=tmp_path, checkpoint_every=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (tmp_path / STATE).read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == [".lock", STATE]
    assert same_weights(tune_full(llm, data, **SHORT, out=tmp_path), tune_full(llm, data, **SHORT))


# --- divergence, bad input ---


def test_a_rate_that_diverges_is_stopped_with_a_remedy_and_the_checkpoint_stays(llm, data, tmp_path):
    with pytest.raises(InputError, match=r"lr: expected .*step \d.*Lower lr") as caught:
        tune_full(llm, data, **{**SHORT, "steps": 30, "lr": 300.0}, optimizer="sgd", warmup=0, decay="constant")
    assert "guessing costs 10.8" in str(caught.value) or "finite" in str(caught.value)
    interrupted(tune_full, llm, data, tmp_path)
    before = (tmp_path / STATE).read_bytes()
    with pytest.MonkeyPatch.context() as patch:  # weights that overflow in the last step before a checkpoint
        step = FullRun.one_step

        def poisoned(self, batches):
            value = step(self, batches)
            next(iter(self.parameters.values())).data[0, 0] = math.inf
            return value

        patch.setattr(FullRun, "one_step", poisoned)
        with pytest.raises(InputError, match="expected finite weights.*after step 3"):
            tune_full(llm, data, **SHORT, out=tmp_path, checkpoint_every=1)
    assert (tmp_path / STATE).read_bytes() == before


def test_nan_in_the_model_is_an_error(data):
    model = tiny_llm()
    model.model.get_decoder().layers[2].mlp.down_proj.weight.data[60:] = float("nan")
    with pytest.raises(InputError, match="finite losses, got nan at step 1.*Lower lr"):
        tune_full(model, data, **SHORT)


def test_weights_of_another_model_are_refused(llm, trained):
    with pytest.raises(InputError, match="weights.*misfit at model.layers.0.self_attn.k_proj.bias"):
        with_weights(tiny_llm(family="qwen2"), trained.weights)
    fewer = {k: v for k, v in trained.weights.items() if k != "model.norm.weight"}
    with pytest.raises(InputError, match="misfit at model.norm.weight"):
        with_weights(llm, fewer)
    with pytest.raises(InputError, match="misfit at model.norm.weight"):
        with_weights(llm, trained.weights | {"model.norm.weight": torch.ones(3)})


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (dict(steps=0), "steps.*from 1"),
        (dict(lr=0), "lr"),
        (dict(lr=float("nan")), "lr"),
        (dict(optimizer="lion"), "optimizer.*'adam' or 'sgd'"),
        (dict(dtype="fp16"), "dtype.*'fp32' or 'bf16'"),
        (dict(decay="sqrt"), "decay"),
        (dict(clip_norm=0), "clip_norm"),
        (dict(batch_size=0), "batch_size"),
        (dict(accumulate=0), "accumulate"),
        (dict(warmup=9), "warmup"),
        (dict(max_tokens=0), "max_tokens"),
        (dict(seed=-1), "seed"),
        (dict(weight_decay=-1), "weight_decay"),
        (dict(evaluate_every=0), "evaluate_every"),
        (dict(checkpoint_every=0), "checkpoint_every"),
        (dict(held_out=[]), "held_out.*at least one"),
    ],
    ids=str,
)
def test_refuses_settings_out_of_range(llm, data, bad, message):
    with pytest.raises(InputError, match=message):
        tune_full(llm, data, **{**SHORT, **bad})


def test_refuses_a_model_with_an_adapter_and_blank_dialogues(llm, data, tmp_path):
    adapter = tune_lora(llm, data, steps=1, lr=0.01, progress=False)
    with adapted(llm, adapter) as tuned, pytest.raises(InputError, match="without an adapter"):
        tune_full(tuned, data, **SHORT)
    with pytest.raises(InputError, match="one is blank"):
        tune_full(llm, [DialogueSet("u", "hello", " ")], **SHORT)
    (tmp_path / "file").write_text("x", encoding="utf-8")
    with pytest.raises(InputError, match="out"):
        tune_full(llm, data, **SHORT, out=tmp_path / "file")
