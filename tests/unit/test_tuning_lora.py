"""tune_lora from end to end on a tiny model; resuming, killing, damage and bad input."""

import json
import math
import resource
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.kill_tuning import differences, train_and_kill
from pllm_helpers.dialogue import DialogueSet
from pllm_helpers.evaluation import response_nll
from pllm_helpers.models import generate
from pllm_helpers.runtime import InputError
from pllm_helpers.tuning import TuningResult, adapted, load_result, tune_lora
from pllm_helpers.tuning.adapters import CARD, CHECKPOINT, CONFIG, WEIGHTS, attach, decoder_layers
from pllm_helpers.tuning.data import token_rows
from pllm_helpers.tuning.forward import plain_objective
from pllm_helpers.tuning.loop import Run, Schedule
from tests.unit.tuning_kit import dialogue_sets, tiny_llm

ROOT = Path(__file__).parents[2]
IDS = torch.arange(20, 40)[None]
SHORT = dict(steps=6, lr=0.01, batch_size=4, progress=False)


@pytest.fixture(scope="module")
def llm():
    return tiny_llm()


@pytest.fixture(scope="module")
def data():
    return dialogue_sets()


@pytest.fixture(scope="module")
def trained(llm, data, tmp_path_factory) -> TuningResult:
    return tune_lora(llm, data, steps=30, lr=0.02, batch_size=4, out=tmp_path_factory.mktemp("run"), progress=False)


def same_adapter(a: TuningResult, b: TuningResult) -> bool:
    return a.adapter.keys() == b.adapter.keys() and all(torch.equal(v, b.adapter[k]) for k, v in a.adapter.items())


def test_training_fits_the_answers_and_leaves_the_model_alone(llm, data):
    before = [p.clone() for p in llm.model.parameters()]
    logits, modules = llm.model(IDS).logits, [type(m) for m in llm.model.modules()]
    state = torch.get_rng_state()
    result = tune_lora(llm, data, steps=30, lr=0.02, batch_size=4, progress=False)
    assert result.losses[0] > 10 and np.mean(result.losses[-3:]) < result.losses[0] - 0.25
    assert result.adapter_path is None and result.peak_mb > 0 and result.seconds > 0
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(before, llm.model.parameters(), strict=True))
    assert torch.equal(llm.model(IDS).logits, logits) and [type(m) for m in llm.model.modules()] == modules
    assert not any(p.requires_grad for p in llm.model.parameters())
    with adapted(llm, result) as tuned:
        assert response_nll(tuned, data).mean() < response_nll(llm, data).mean() - 0.25


def test_first_loss_is_the_nll_of_the_untouched_model(llm, data):
    """B starts at zero, so the first step sees the base model: mean over the batch's answer tokens."""
    result = tune_lora(llm, data[:4], **{**SHORT, "steps": 1})
    answers = [r.answer for r in token_rows(llm, data[:4], 512).rows]
    expected = np.average(response_nll(llm, data[:4]), weights=answers)
    assert result.losses == [pytest.approx(expected, abs=1e-5)]
    assert result.tokens == sum(len(r.ids) for r in token_rows(llm, data[:4], 512).rows)


def test_the_seed_decides_everything(llm, data):
    torch.manual_seed(5)
    first = tune_lora(llm, data, **SHORT, seed=1)
    torch.manual_seed(6)
    assert same_adapter(first, tune_lora(llm, data, **SHORT, seed=1))
    assert not same_adapter(first, tune_lora(llm, data, **SHORT, seed=2))


def test_accumulated_batches_equal_one_large_batch(llm, data):
    """Gradient of the mean over all answer tokens, not a mean of means: answers have 5 to 20 tokens."""
    rows = token_rows(llm, data, 512).rows
    plan = Schedule(1, 0.01, 4, 3, 0, "linear", 0, 0, 0)
    found = []
    for batches in ([[0, 1, 2, 3], [4], [5, 6, 7]], [list(range(8))]):
        from peft import LoraConfig

        model = attach(llm, LoraConfig(r=4, target_modules=["q_proj"]), 0).eval()
        parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        run = Run(parameters, plain_objective(model.get_base_model(), 0), rows, plan)
        gradients = {}
        run.optimizer.register_step_pre_hook(
            lambda *_, into=gradients, of=parameters: into.update({n: p.grad.clone() for n, p in of.items()})
        )
        found.append((run.one_step(batches), gradients))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-6)
    for name, g in found[0][1].items():
        torch.testing.assert_close(g, found[1][1][name], rtol=1e-4, atol=1e-7, msg=name)


def test_fast_and_plain_path_train_alike(llm, data):
    fast = tune_lora(llm, data, **SHORT)
    plain = tune_lora(llm, data, **SHORT, fast=False)
    np.testing.assert_allclose(fast.losses, plain.losses, rtol=1e-4)


def test_schedule():
    plan = Schedule(10, 1.0, 1, 1, 0.2, "linear", 1, 0, 0)
    assert [round(plan.rate(s), 3) for s in range(10)] == [0.333, 0.667, 1, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125]
    assert Schedule(4, 2.0, 1, 1, 0, "constant", 1, 0, 0).rate(3) == 2
    cosine = Schedule(8, 1.0, 1, 1, 0, "cosine", 1, 0, 0)
    assert [round(cosine.rate(s), 3) for s in (0, 4, 7)] == [1, 0.5, round(0.5 * (1 + math.cos(math.pi * 7 / 8)), 3)]
    assert Schedule(10, 1.0, 1, 1, 3, "linear", 1, 0, 0).warmup_steps == 3


@pytest.mark.parametrize(("layers", "expected"), [("all", [0, 1, 2, 3]), ("upper", [2, 3]), (1, [3]), ([2, 0], [0, 2])])
def test_chosen_layers_and_modules_are_adapted_and_no_others(llm, data, layers, expected):
    result = tune_lora(llm, data, **{**SHORT, "steps": 1}, rank=3, layers=layers, modules=["up_proj", "k_proj"])
    names = {k.removeprefix("base_model.model.model.layers.") for k in result.adapter}
    parts = ("self_attn.k_proj", "mlp.up_proj")
    assert names == {f"{i}.{p}.lora_{m}.weight" for i in expected for p in parts for m in "AB"}
    assert result.parameters == len(expected) * 3 * (64 + 32 + 64 + 96)
    assert result.card["settings"]["layers"] == expected


def test_folder_holds_adapter_config_and_card_without_any_text(trained, data):
    folder = trained.adapter_path
    assert {p.name for p in folder.iterdir()} - {".lock"} == {WEIGHTS, CONFIG, CARD}
    card = json.loads((folder / CARD).read_text(encoding="utf-8"))
    assert card["base_model"] == "tiny" and len(card["base_fingerprint"]) == 16 and len(card["data_sha256"]) == 64
    assert card["settings"]["seed"] == 0 and card["settings"]["steps"] == 30 and card["dialogues"] == len(data)
    assert set(card["versions"]) == {"torch", "transformers", "peft"}
    assert card["measured"]["losses"] == trained.losses and card["measured"]["tokens"] == trained.tokens
    everything = b"".join(p.read_bytes() for p in folder.iterdir()).decode("utf-8", "replace")
    assert not any(d.answer in everything or d.question in everything for d in data)
    assert str(ROOT) not in everything and "/.cache/" not in everything


def test_plain_peft_reads_the_adapter(llm, trained):
    import copy

    from peft import PeftModel

    with adapted(llm, trained) as tuned:
        expected = tuned.model(IDS).logits
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = PeftModel.from_pretrained(copy.deepcopy(llm.model), trained.adapter_path)
    assert torch.equal(model(IDS).logits, expected)
    assert not torch.equal(llm.model(IDS).logits, expected)


def test_adapted_from_result_and_folder_and_saved_copy_are_the_same(llm, data, trained, tmp_path):
    in_memory = tune_lora(llm, data, **SHORT)
    in_memory.save(tmp_path / "copy")
    with adapted(llm, in_memory) as a, adapted(llm, tmp_path / "copy") as b, adapted(llm, trained) as c:
        assert torch.equal(a.model(IDS).logits, b.model(IDS).logits)
        assert not torch.equal(a.model(IDS).logits, c.model(IDS).logits)
        assert generate(a, ["hi"], max_new_tokens=4) == generate(b, ["hi"], max_new_tokens=4)


def test_adapted_never_wraps_twice_and_undoes_everything(llm, data, trained):
    logits = llm.model(IDS).logits
    with pytest.raises(KeyError), adapted(llm, trained) as tuned:
        with pytest.raises(InputError, match="without an adapter"), adapted(tuned, trained):
            pass
        with pytest.raises(InputError, match="without an adapter"):
            tune_lora(tuned, data, **SHORT)
        raise KeyError("in the block")
    assert torch.equal(llm.model(IDS).logits, logits)
    with adapted(llm, trained) as again:  # a cell that runs twice
        assert sum(k.endswith("lora_A.default.weight") for k in again.model.state_dict()) == 8


def test_an_adapter_for_another_model_is_refused(llm, trained):
    other = tiny_llm()
    other.model.get_decoder().layers[1].mlp.up_proj.weight.data[0, 0] += 1
    with pytest.raises(InputError, match="with other weights"), adapted(other, trained):
        pass
    narrow = tiny_llm("bf16")  # the same weights, rounded: fine
    with adapted(narrow, trained) as tuned:
        assert torch.isfinite(tuned.model(IDS).logits).all()


def test_progress_bar_shows_loss_and_speed(llm, data, capfd):
    tune_lora(llm, data, **{**SHORT, "progress": True}, held_out=data[:2])
    shown = capfd.readouterr().err
    assert "training" in shown and "loss 1" in shown and "held-out" in shown and "tokens/s" in shown


# --- held-out dialogues and early stopping ---


def test_held_out_curve_is_response_nll_and_does_not_change_training(llm, data):
    held = data[:5]
    result = tune_lora(llm, data[5:], **SHORT, held_out=held, evaluate_every=2)
    assert [s for s, _ in result.held_out] == [0, 2, 4, 6]
    assert result.held_out[0][1] == pytest.approx(response_nll(llm, held).mean(), abs=1e-5)
    with adapted(llm, result) as tuned:
        assert result.held_out[-1][1] == pytest.approx(response_nll(tuned, held).mean(), abs=1e-5)
    assert same_adapter(result, tune_lora(llm, data[5:], **SHORT))


def test_early_stop_keeps_the_best_adapter(llm, data):
    other = [DialogueSet("u", "hello", "qx zv jk " * 4)]  # gets worse after a while
    settings = dict(steps=200, lr=0.03, batch_size=4, held_out=other, evaluate_every=2, patience=3, progress=False)
    result = tune_lora(llm, data, **settings)
    values = [x for _, x in result.held_out]
    assert len(result.losses) < 200 and values.index(min(values)) == len(values) - 4
    with adapted(llm, result) as tuned:
        assert response_nll(tuned, other)[0] == pytest.approx(min(values), abs=1e-5)


# --- resuming ---


def test_a_finished_run_is_returned_not_repeated(llm, data, tmp_path):
    first = tune_lora(llm, data, **SHORT, out=tmp_path)
    stamp = (tmp_path / WEIGHTS).stat().st_mtime_ns
    again = tune_lora(llm, data, **SHORT, out=tmp_path)
    assert same_adapter(first, again) and again.losses == first.losses and again.seconds == first.seconds
    assert (tmp_path / WEIGHTS).stat().st_mtime_ns == stamp
    assert load_result(tmp_path).held_out == first.held_out
    fresh = tune_lora(llm, data, **SHORT, out=tmp_path, resume=False)
    assert same_adapter(first, fresh) and (tmp_path / WEIGHTS).stat().st_mtime_ns > stamp


@pytest.mark.parametrize("change", ["steps", "seed", "data", "held_out", "model"])
def test_another_run_in_the_same_folder_is_refused(llm, data, tmp_path, change):
    finished, halfway = tmp_path / "finished", tmp_path / "halfway"
    tune_lora(llm, data, **SHORT, out=finished)
    halfway.mkdir()
    interrupted(llm, data, halfway)
    other, rows, settings = llm, data, dict(SHORT)
    if change == "data":
        rows = data[1:]
    elif change == "model":
        other = tiny_llm("bf16")
    elif change == "held_out":
        settings["held_out"] = data[:3]
    else:
        settings[change] = 7
    for folder in (finished, halfway):
        with pytest.raises(InputError, match="other settings, data or base model"):
            tune_lora(other, rows, **settings, out=folder)


class Stop(Exception):
    pass


def interrupted(llm, data, folder, after=3, **more):
    """Leave a checkpoint behind: an exception out of the progress bar's place in the loop."""
    from pllm_helpers.tuning.checkpoint import Checkpoint

    write, seen = Checkpoint.write, []

    def stop(self, where):
        write(self, where)
        seen.append(1)
        if len(seen) == after:
            raise Stop

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stop):
        patch.setattr(Checkpoint, "write", stop)
        tune_lora(llm, data, **{**SHORT, **more}, out=folder, checkpoint_every=1)


@pytest.mark.parametrize("fast", [True, False])
def test_a_resumed_run_is_bit_equal(llm, data, tmp_path, fast):
    more = dict(fast=fast, accumulate=2, held_out=data[:3], evaluate_every=2, patience=4)
    whole = tune_lora(llm, data, **SHORT, **more)
    for after in (1, 3, 5):
        folder = tmp_path / str(after)
        interrupted(llm, data, folder, after, **more)
        assert (folder / CHECKPOINT).is_file() and not (folder / CARD).exists()
        resumed = tune_lora(llm, data, **SHORT, **more, out=folder)
        assert resumed.losses == whole.losses and resumed.held_out == whole.held_out
        assert same_adapter(resumed, whole) and resumed.tokens == whole.tokens
        assert not (folder / CHECKPOINT).exists()


def test_a_caller_may_end_a_run_and_go_on_later(llm, data, tmp_path):
    seen = []

    def until_three(step, loss, seconds):
        seen.append((step, loss))
        return step < 3

    ended = tune_lora(llm, data, **{**SHORT, "progress": until_three}, out=tmp_path)
    assert [s for s, _ in seen] == [1, 2, 3] and [x for _, x in seen] == ended.losses
    assert ended.adapter_path is None and ended.card["ended_at"] == 3 and not (tmp_path / CARD).exists()
    whole = tune_lora(llm, data, **SHORT)
    rest = tune_lora(llm, data, **SHORT, out=tmp_path)
    assert same_adapter(rest, whole) and rest.losses == whole.losses and "ended_at" not in rest.card


@pytest.mark.parametrize(
    ("run", "kills"),
    [
        ("tests.unit.tuning_kit:tiny_run", 10),
        pytest.param("benchmarks.kill_tuning:real_run", 1, marks=pytest.mark.model),
    ],
)
def test_killed_at_random_moments_the_result_is_the_uninterrupted_one(tmp_path, run, kills):
    folders = train_and_kill(run, tmp_path, kills, seed=7)
    assert len(folders) > 1 and not differences(folders)
    assert {p.name for p in folders[-1].iterdir() if not p.name.startswith(".")} == {WEIGHTS, CONFIG, CARD}


def test_two_runs_do_not_share_a_folder_at_one_time(llm, data, tmp_path):
    import filelock

    with filelock.FileLock(str(tmp_path / ".lock")), pytest.raises(InputError, match="another process"):
        tune_lora(llm, data, **SHORT, out=tmp_path)
    assert tune_lora(llm, data, **SHORT, out=tmp_path).losses


# --- damage ---


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "nan", "foreign", "no config"])
def test_a_damaged_adapter_is_refused(llm, trained, tmp_path, damage):
    folder = shutil.copytree(trained.adapter_path, tmp_path / "adapter")
    file = folder / WEIGHTS
    data = file.read_bytes()
    if damage == "cut":
        (folder / CARD).unlink()  # even without a checksum
        file.write_bytes(data[: len(data) // 2])
    elif damage == "flipped":
        file.write_bytes(data[:-5] + bytes([data[-5] ^ 64]) + data[-4:])
    elif damage == "empty":
        file.write_bytes(b"")
    elif damage == "nan":
        (folder / CARD).unlink()
        file.write_bytes(data[:-4] + b"\x00\x00\xc0\x7f")
    elif damage == "foreign":
        from safetensors.torch import save_file

        (folder / CARD).unlink()
        save_file({"base_model.model.something.lora_A.weight": torch.zeros(2, 2)}, file)
    else:
        (folder / CONFIG).unlink()
    with pytest.raises(InputError, match="adapter"), adapted(llm, folder):
        pass


def test_a_damaged_checkpoint_is_refused_and_may_be_thrown_away(llm, data, tmp_path):
    interrupted(llm, data, tmp_path)
    file = tmp_path / CHECKPOINT
    whole = file.read_bytes()
    for bad in (b"", whole[:100], whole[:-9], whole[:-5] + bytes([whole[-5] ^ 1]) + whole[-4:], b"\xff" * 64):
        file.write_bytes(bad)
        with pytest.raises(InputError, match="damaged"):
            tune_lora(llm, data, **SHORT, out=tmp_path)
    assert same_adapter(tune_lora(llm, data, **SHORT, out=tmp_path, resume=False), tune_lora(llm, data, **SHORT))


def test_losses_that_are_not_finite_are_an_error_and_the_checkpoint_stays(llm, data, tmp_path):
    interrupted(llm, data, tmp_path)
    before = (tmp_path / CHECKPOINT).read_bytes()
    model = tiny_llm()
    model.model.get_decoder().layers[2].mlp.down_proj.weight.data[60:] = float("nan")
    with pytest.raises(InputError, match="finite losses, got nan at step 1.*Lower lr"):
        tune_lora(model, data, **SHORT)
    with pytest.MonkeyPatch.context() as patch:  # in the middle of a resumed run
        step = Run.one_step

        def poisoned(self, batches):
            if self.step == 4:
                next(iter(self.parameters.values())).data.fill_(float("inf"))
            return step(self, batches)

        patch.setattr(Run, "one_step", poisoned)
        with pytest.raises(InputError, match="at step 5"):
            tune_lora(llm, data, **SHORT, out=tmp_path)
    assert (tmp_path / CHECKPOINT).read_bytes() == before
    resumed = tune_lora(llm, data, **SHORT, out=tmp_path)
    assert same_adapter(resumed, tune_lora(llm, data, **SHORT))


def test_full_disk_is_an_error_and_the_last_checkpoint_stays(llm, data, tmp_path):
    interrupted(llm, data, tmp_path)
    before = (tmp_path / CHECKPOINT).read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))  # no file may grow beyond 4 KB
        with pytest.raises(InputError, match="room to write"):
            tune_lora(llm, data, **SHORT, out=tmp_path, checkpoint_every=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (tmp_path / CHECKPOINT).read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == [".lock", CHECKPOINT]
    assert same_adapter(tune_lora(llm, data, **SHORT, out=tmp_path), tune_lora(llm, data, **SHORT))


# --- bad input ---


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (dict(steps=0), "steps.*from 1"),
        (dict(lr=0), "lr"),
        (dict(lr=float("nan")), "lr"),
        (dict(lr=11.0), "lr"),
        (dict(rank=0), "rank"),
        (dict(rank=33), "rank.*1 to 32"),
        (dict(batch_size=0), "batch_size"),
        (dict(accumulate=0), "accumulate"),
        (dict(warmup=7), "warmup"),
        (dict(decay="sqrt"), "decay"),
        (dict(layers="lower"), "layers"),
        (dict(layers=[4]), "layers.*0 to 3"),
        (dict(layers=0), "layers"),
        (dict(layers=[]), "layers"),
        (dict(modules=["c_attn"]), "modules.*q_proj.*c_attn"),
        (dict(modules=[]), "modules"),
        (dict(max_tokens=0), "max_tokens"),
        (dict(patience=2), "patience.*held_out"),
        (dict(held_out=[]), "held_out.*at least one"),
        (dict(seed=-1), "seed"),
        (dict(checkpoint_every=0), "checkpoint_every"),
    ],
    ids=str,
)
def test_refuses_settings_out_of_range(llm, data, bad, message):
    with pytest.raises(InputError, match=message):
        tune_lora(llm, data, **{**SHORT, **bad})


def test_other_scripts_emoji_duplicates_and_one_giant_dialogue(llm):
    odd = [DialogueSet("u", "日本語で話して 🎈🎈", "はい、もちろん 🙂")] * 3 + [DialogueSet("u", "long " * 5000, "ok")]
    result = tune_lora(llm, odd, **SHORT, max_tokens=128)
    assert all(map(math.isfinite, result.losses)) and result.card["shortened_questions"] == 1


def test_out_that_is_a_file(llm, data, tmp_path):
    (tmp_path / "file").write_text("x", encoding="utf-8")
    with pytest.raises(InputError, match="out"):
        tune_lora(llm, data, **SHORT, out=tmp_path / "file")


def test_a_model_that_is_no_llama_takes_the_plain_path(data):
    from transformers import OPTConfig, OPTForCausalLM

    llm = tiny_llm()
    config = OPTConfig(
        vocab_size=49152, hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=2, word_embed_proj_dim=32
    )
    opt = type(llm)(OPTForCausalLM(config).eval().requires_grad_(False), llm.tokenizer, "tiny-opt", "fp32")
    assert len(decoder_layers(opt)) == 2
    first, again = (tune_lora(opt, data, **SHORT) for _ in range(2))
    assert same_adapter(first, again)  # OPT's dropout is off
    assert first.losses[-1] < first.losses[0]
