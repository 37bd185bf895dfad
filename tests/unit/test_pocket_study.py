"""Notebook 06's experiment: surfaces come back, alignment is real, runs are the package's, tables are complete."""

from __future__ import annotations

import copy
import json
import math

import numpy as np
import pytest
import torch

from pllm_helpers.corpora.tasks import load_task
from pllm_helpers.device import PhoneEnvelope
from pllm_helpers.evaluation import check_claim, response_nll
from pllm_helpers.experiments import pocket_study as study
from pllm_helpers.experiments.pocket_study import Plan, Surface
from pllm_helpers.models import LLM
from pllm_helpers.runtime import InputError
from pllm_helpers.tuning import read_log, replay, tune_lora, tune_mezo
from pllm_helpers.tuning.data import token_rows
from pllm_helpers.tuning.replay import weights_hash

from .tuning_kit import dialogue_sets, tiny_llm

DATA = dialogue_sets(12)


@pytest.fixture(scope="module")
def tiny() -> LLM:
    torch.set_num_threads(1)
    return tiny_llm()


@pytest.fixture
def surface(tiny: LLM) -> Surface:
    return Surface(tiny, token_rows(tiny, DATA[:4], 512).rows)


def test_a_slice_is_the_loss_at_moved_weights_and_the_weights_come_back(surface: Surface, tiny: LLM):
    before = [p.clone() for p in surface.parameters]
    found = surface.along(3, [-0.02, 0, 0.02])
    for p, q in zip(surface.parameters, before, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-6)
    generator = torch.Generator().manual_seed(3)
    for p in surface.parameters:  # the walk written out
        p.data += 0.02 * torch.normal(0.0, 1.0, p.shape, generator=generator)
    assert surface.loss() == pytest.approx(found[2], abs=1e-5)
    assert found[1] == pytest.approx(Surface(tiny, surface.rows).loss(), abs=1e-5)
    assert found[0] != found[2]


def test_the_gradient_is_that_of_the_loss(surface: Surface):
    gradient = surface.gradient()
    assert [g.shape for g in gradient] == [p.shape for p in surface.parameters]
    place, index = 5, int(gradient[5].abs().flatten().argmax())
    flat, h = surface.parameters[place].data.view(-1), 1e-2
    flat[index] += h
    up = surface.loss()
    flat[index] -= 2 * h
    down = surface.loss()
    flat[index] += h
    assert (up - down) / (2 * h) == pytest.approx(gradient[place].flatten()[index].item(), rel=0.05, abs=1e-5)
    assert all(p.grad is None and not p.requires_grad for p in surface.parameters)


def test_the_gradient_counts_the_token_that_pads_and_ends_turns(tiny: LLM):
    from dataclasses import replace

    padded = replace(tiny, model=copy.deepcopy(tiny.model))
    end = tiny.end_of_turn
    padded.model.get_input_embeddings().padding_idx = end
    rows = token_rows(tiny, DATA[:2], 512).rows
    assert any(end in r.ids[: -r.answer] for r in rows)
    with_row, without = Surface(padded, rows).gradient()[0][end], Surface(tiny, rows).gradient()[0][end]
    torch.testing.assert_close(with_row, without)
    assert padded.model.get_input_embeddings().padding_idx == end


@pytest.mark.parametrize("noise", ["gaussian", "rademacher"])
def test_cosines_are_those_of_full_vectors(surface: Surface, noise: str):
    gradient = surface.gradient()
    subsets = study.growing_subsets(surface.llm.model)
    sizes = [sum(surface.parameters[i].numel() for i in places) for places in subsets.values()]
    assert sizes == sorted(sizes) and sizes[-1] == surface.llm.parameters and len(set(sizes)) == 5
    name = "a block"
    (found,) = study.align(surface, gradient, {name: subsets[name]}, seeds=3, epsilon=1e-2, noise=noise)
    assert found.dimension == sizes[2] and found.expected == pytest.approx(math.sqrt(2 / (math.pi * sizes[2])))
    flat = torch.cat([gradient[i].flatten() for i in subsets[name]])
    for seed in range(3):
        zeros = [torch.zeros_like(gradient[i]) for i in subsets[name]]
        study.perturb_(zeros, seed, 1.0, noise)
        z = torch.cat([t.flatten() for t in zeros])
        assert found.exact[seed] == pytest.approx((z @ flat).item(), rel=1e-3, abs=1e-6)
        cosine = torch.cosine_similarity(z * math.copysign(1, found.slopes[seed]), flat, 0).item()
        assert found.cosines[seed] == pytest.approx(cosine, abs=1e-5)


def test_a_run_in_an_envelope_sends_its_log_and_no_weights(tiny: LLM):
    settings = {"steps": 2, "seed": 4, "batch_size": 4}
    result = PhoneEnvelope(3000).run(study.in_pocket, "mezo", tiny, DATA, **settings)
    assert result.status == "finished", result.output
    same = tune_mezo(tiny, DATA, lr=study.TUNERS["mezo"].lr, progress=False, **settings)
    run = result.value
    assert run.losses == same.losses and run.tuned_hash == same.card["tuned_hash"]
    rebuilt = replay(tiny, read_log(run.log))
    assert weights_hash(dict(rebuilt.model.named_parameters())) == run.tuned_hash
    assert run.tokens == max(len(r.ids) for r in token_rows(tiny, DATA, 512).rows)
    assert {p.name for p in result.phases} >= {"load", "train"}
    assert study.predicted_for(tiny, "mezo", run, 4).total > 0


@pytest.mark.parametrize("method", ["lora", "mezo_lora", "mezo"])
def test_a_personal_trial_is_the_tuners_run(tiny: LLM, method: str):
    trial = study.personal_trial(tiny, method, DATA, DATA[:3], steps=4, seed=1, looks=2, batch_size=4)
    tuner = study.TUNERS[method]
    same = tuner.tune(tiny, DATA, steps=4, lr=tuner.lr, seed=1, batch_size=4, progress=False, **tuner.settings)
    assert trial.losses == same.losses and trial.steps == 4 and trial.cpu_seconds > 0
    assert [s for s, _ in trial.looks] == [0, 2, 4]
    np.testing.assert_allclose(trial.before, response_nll(tiny, DATA[:3], progress=False))
    assert trial.seconds() == [0, 2 * trial.cpu_seconds, 4 * trial.cpu_seconds]
    if method == "lora":
        assert not np.allclose(trial.after, trial.before)


def test_few_shots_come_from_train_and_are_judged_on_test(tiny: LLM):
    train, test = study.sentiment_texts("train", 1000), study.sentiment_texts("test", 12, seed=3)
    every = {d.meta["text"] for d in load_task("sentiment", "test")}
    assert len(test[0]) == 12 and set(test[0]) <= every and not set(train[0]) & every
    assert set(train[1]) == {"positive", "negative"}
    trial = study.few_shot_trial(tiny, "lora", train, test, shots=2, steps=2, looks=0, noise="gaussian")
    assert set(trial.after) <= {0.0, 1.0} and len(trial.after) == 12 and trial.looks == []


def test_a_file_without_splits_gets_them_and_pieces_do_not_leak(tmp_path):
    whole = [f"this film number {k} is a joy from end to end" for k in range(40)]
    pieces = [f"film number {k} is a joy from" for k in range(40)] + ["too short a text"]
    lines = [f"{t}\t{k % 2}" for k, t in enumerate([*whole, *pieces])]
    path = tmp_path / "all.tsv"
    path.write_text("\n".join(["sentence\tlabel", *lines]) + "\n", encoding="utf-8")
    train, test = (study.sentiment_texts(part, 1000, source=str(path))[0] for part in ("train", "test"))
    assert len(test) == 40 and train and set(train + test) < {*whole, *pieces}
    assert not any(a in b or b in a for a in train for b in test)
    assert study.sentiment_texts("test", 1000, source=str(path))[0] == test


def test_dialogues_of_even_length(tiny: LLM):
    lengths = [len(r.ids) for r in token_rows(tiny, DATA, 512).rows]
    chosen = study.even_dialogues(tiny, DATA, 3, 50)
    gaps = sorted(abs(n - 50) for n in lengths)[:3]
    assert sorted(abs(len(r.ids) - 50) for r in token_rows(tiny, chosen, 512).rows) == gaps
    with pytest.raises(InputError, match="count"):
        study.even_dialogues(tiny, DATA, 13)


def test_the_memory_table_has_every_method_and_batch():
    table = study.memory_table("smollm2-135m", batches=(8, 64), limit_mb=1024)
    assert len(table) == 2 * len(study.MEMORY_METHODS) == len(table.drop_duplicates(["method", "batch"]))
    total = table.set_index(["method", "batch"])["total"]
    assert total["adam", 8] > total["sgd", 8] > total["mezo", 8]
    assert (table["fits"] == (table["total"] <= 1024)).all()
    parts = ["weights", "gradients", "optimiser", "activations", "logits", "workspace", "runtime"]
    np.testing.assert_allclose(table[parts].sum(axis=1), table["total"])
    with pytest.raises(InputError, match="method"):
        study.memory_table("smollm2-135m", methods=["adamw"])


def test_sizes_say_who_is_killed():
    table = study.memory_table("roberta-large", batches=(8, 64), answer_tokens=1)
    shown = study.sizes(table, 4096)
    assert len(shown) == len(study.MEMORY_METHODS) and list(shown.columns) == ["batch 8, GB", "batch 64, GB"]
    total = table.set_index(["method", "batch"])["total"]
    assert shown.loc["Adam, all weights", "batch 8, GB"] == f"{total['adam', 8] / 1024:.2f} killed"
    assert shown.loc["MeZO", "batch 64, GB"] == f"{total['mezo', 64] / 1024:.2f}"


def test_the_ledger_says_what_was_not_measured():
    claim = check_claim("x", 1.0, above=2)
    table = study.ledger({"gain": claim})
    assert len(table) == len(study.LEDGER)
    verdicts = dict(zip([row.key for row in study.LEDGER], table["here"], strict=True))
    assert verdicts["gain"] == "fails" and verdicts["adam"] == "not measured" and verdicts["batch"] == "not judged"
    unverified = table[table["source"].str.contains("unverified")]
    assert len(unverified) == 2 and (unverified["here"] == "not judged").all()
    with pytest.raises(InputError, match="keys"):
        study.ledger({"speed": claim})


def small_plan(**changes) -> Plan:
    given = {
        "seeds": 1,
        "gradient_steps": 8,
        "mezo_steps": 10,
        "looks": 2,
        "messages": 8,
        "replies": 3,
        "shots": 2,
        "texts": 12,
    }
    return Plan(**given | {"shots": 2, "texts": 12, "shot_steps": 8, "shot_mezo_steps": 10} | changes)


@pytest.mark.parametrize("name", ["curves", "few_shot"])
def test_recorded_cells_come_back_and_rates_are_chosen_elsewhere(tmp_path, tiny: LLM, monkeypatch, name: str):
    monkeypatch.setattr(study, "load_llm", lambda *_, **__: tiny)
    people, texts = [], []
    few_shot_trial = study.few_shot_trial

    def stream(person, *_):
        people.append(person)
        return DATA[person:], DATA[:3]

    def shots(llm, method, train, test, **given):
        texts.append((set(train[0]), set(test[0]), given["seed"]))
        return few_shot_trial(llm, method, train, test, **given)

    monkeypatch.setattr(study, "earlier_and_later", stream)
    monkeypatch.setattr(study, "few_shot_trial", shots)
    plan, said = small_plan(), []
    table = study.run_experiment(name, plan, cache=tmp_path / "cache", say=said.append)
    assert table.complete and len(said) == len(table.cells) == 3 * 4 + 3
    again = study.run_experiment(name, plan, cache=tmp_path / "cache", say=said.append)
    assert len(said) == 15 and again.cells[0].labels == table.cells[0].labels
    if name == "curves":
        assert people == 12 * [plan.development] + 3 * [plan.person]
    else:
        test = {d.meta["text"] for d in load_task("sentiment", "test")}
        assert [seed for *_, seed in texts] == 12 * [study.DEVELOPMENT_SEED] + 3 * [0]
        assert all(not learned & judged for learned, judged, _ in texts)
        assert all(not (learned | judged) & test for learned, judged, _ in texts[:12])
    for method, rates in study.RATES.items():
        tried = table.find(method=method, role="development")
        assert [c.labels["lr"] for c in tried] == list(rates) and len(rates) == 4
        assert {c.facts["steps"] for c in tried} == {4 if method == "lora" else 2}
        best = min(tried, key=lambda c: c.facts["looks"][-1][1]).labels["lr"]
        assert study.best_rate(table.cells, method) == best
        (judged,) = study.trials(table, method=method)
        assert judged.lr == best and judged.steps == (8 if method == "lora" else 10) and judged.looks[-1][0] > 0
    shown = study.rates_table(table)
    assert len(shown) == 12 and (shown[""] == "taken").groupby(level="method").sum().tolist() == [1, 1, 1]
    path = table.save(tmp_path / f"pocket_{name}.json", "command")
    (back,) = study.trials(study.recorded(tmp_path)[name], method="mezo")
    (first,) = study.trials(table, method="mezo")
    np.testing.assert_allclose(back.after, first.after, atol=6e-4)
    assert back.lr == first.lr in study.RATES["mezo"]
    content = path.read_text(encoding="utf-8")
    assert "/tmp" not in content and json.loads(content)["run"]["planned"] == 15


def test_no_run_is_judged_before_all_its_rates_are_tried(tmp_path, tiny: LLM, monkeypatch):
    monkeypatch.setattr(study, "load_llm", lambda *_, **__: tiny)
    monkeypatch.setattr(study, "earlier_and_later", lambda person, *_: (DATA[person:], DATA[:3]))
    plan = small_plan(replies=2)
    stopped = study.run_experiment("curves", plan, cache=tmp_path, max_minutes=0, say=lambda _: None)
    assert not stopped.complete and not stopped.cells and study.trials(stopped) == []
    with pytest.raises(InputError, match="tried"):
        plan.measure("curves", {"method": "lora", "seed": 0, "role": "judged"}, tiny)
    more_seeds, base = small_plan(seeds=2), plan.cells("curves")
    assert all(label in more_seeds.cells("curves") for label in base)  # what is there stays good


def test_memory_cells_stand_beside_their_prediction(tmp_path, tiny: LLM, monkeypatch):
    monkeypatch.setattr(study, "load_llm", lambda *_, **__: tiny)
    plan = small_plan()
    monkeypatch.setattr(Plan, "cells", lambda *_: [{"method": "mezo", "batch": 2}])
    (cell,) = study.run_experiment("memory", plan, cache=tmp_path, say=lambda _: None).cells
    table = study.run_experiment("memory", plan, cache=tmp_path, say=lambda _: None)
    (row,) = study.measured_sizes(table).itertuples(index=False)
    assert row == ("mezo", 2, cell.facts["peak_mb"], cell.facts["predicted_mb"])
    assert cell.facts["status"] == "finished" and cell.facts["peak_mb"] > 0 and cell.facts["predicted_mb"] > 0


def test_a_change_of_nothing_is_no_gain():
    same = np.linspace(3, 4, 9)
    assert study.loss_falls_claim("MeZO", same, same).verdict == "fails"
    assert study.gradient_wins_claim(same, same, 3).verdict == "fails"
    step = np.zeros(9)
    step[0] = 0.5  # one reply in nine: the interval begins at zero
    touching = study.loss_falls_claim("MeZO", same + step, same)
    assert touching.estimate.low == 0 and touching.verdict == "inconclusive" and touching.bound == "above 0"


def test_bad_names_are_refused(tmp_path):
    for call in (
        lambda: study.how_to_measure("speed"),
        lambda: study.recorded(tmp_path / "none"),
        lambda: study.run_experiment("speed"),
    ):
        with pytest.raises(InputError):
            call()
    assert study.main(["curves", "--seeds", "0"]) == 2
    assert study.recorded(tmp_path) == {} and "pocket_study memory" in study.how_to_measure("memory")


def test_equal_weights_have_no_gap(tiny: LLM):
    a = {k: p.detach() for k, p in tiny.model.named_parameters()}
    b = {k: p.clone() for k, p in a.items()}
    assert study.weights_gap(a, b) == 0
    changed = next(iter(b.values()))
    changed[0, 0] = 2.0
    assert study.weights_gap(a, b) == pytest.approx(abs(next(iter(a.values()))[0, 0].item() - 2) / 2)
    with pytest.raises(InputError, match="weights"):
        study.weights_gap(a, {})


def test_a_lora_trial_leaves_the_model_alone(tiny: LLM):
    before = weights_hash(dict(tiny.model.named_parameters()))
    study.personal_trial(tiny, "mezo", DATA, DATA[:2], steps=1, batch_size=4)
    assert weights_hash(dict(tiny.model.named_parameters())) == before
    assert tune_lora(tiny, DATA, steps=1, lr=1e-3, progress=False).parameters > 0
