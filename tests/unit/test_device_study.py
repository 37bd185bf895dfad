"""Experiments of notebook 07: data apart, cells kept, tables paired, the ledger honest about what is missing."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from pllm_helpers.device import quantize, size_mb
from pllm_helpers.device.architectures import MOBILE_LLM, Architecture, build
from pllm_helpers.evaluation import response_nll
from pllm_helpers.experiments import device_claims as claims
from pllm_helpers.experiments import device_study as study
from pllm_helpers.experiments.device_study import DeviceSettings, DeviceTable, Lab, Measured
from pllm_helpers.models import LLM, load_encoder
from pllm_helpers.retrieval import RetrievalPersonalizer
from pllm_helpers.runtime import InputError, prepare
from pllm_helpers.tuning import adapted, tune_lora
from pllm_helpers.tuning.data import token_rows

from .tuning_kit import tiny_llm

QUICK = DeviceSettings(
    people=20, small_steps=8, small_batch=2, window=16, small_windows=8, replies=4, rows=4, k=2, least=2, most=3
)


@pytest.fixture(scope="module", autouse=True)
def seeded():
    prepare(0, threads=1)


# ---------------------------------------------------------------- shapes and bytes


def test_all_variants_have_the_budget_of_the_first():
    totals = {name: a.parameters().total for name, a in study.VARIANTS.items()}
    assert all(abs(n / totals["deep"] - 1) < 0.03 for n in totals.values()), totals
    assert len({a.vocab for a in study.VARIANTS.values()}) == 1
    for a in study.VARIANTS.values():  # or int4 would leave layers as they are
        assert a.dim % 32 == 0 and a.ffn % 32 == 0


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("kv_heads", [1, 4])
def test_bytes_are_those_of_packed_models(share: bool, kv_heads: int):
    shape = Architecture(3, 128, 4, kv_heads, 192, 512, share_embedding=share)
    model = build(shape).to(torch.bfloat16).eval().requires_grad_(False)
    llm = LLM(model, None, "built", "bf16")
    assert study.weight_bytes(shape, "bf16") == size_mb(llm) * 2**20
    assert study.weight_bytes(shape, "fp32") == 2 * study.weight_bytes(shape, "bf16")
    for form in ("int8", "int4"):
        assert study.weight_bytes(shape, form) == size_mb(quantize(llm, form)) * 2**20


def test_bytes_refuse_another_form():
    with pytest.raises(InputError, match="int4"):
        study.weight_bytes(MOBILE_LLM["125M"], "int3")


# ---------------------------------------------------------------- data


def test_conversations_are_in_one_part_only():
    text = study.chat_text(20)
    parts = [set(p) for p in (text.train, text.choice, text.held_out)]
    assert len(parts[0]) > 20 * len(parts[2]) > 0 and len(parts[1]) > 0
    lines = [{line for t in p for line in t.splitlines() if len(line) > 60} for p in parts]
    assert not (parts[0] & parts[2] or parts[1] & parts[2])
    assert len(lines[0] & lines[2]) < 0.02 * len(lines[2])  # long lines that people wrote twice are rare
    assert text.tokenizer.get_vocab_size() == study.VARIANTS["wide"].vocab
    said = text.held_out[0]
    assert text.tokenizer.decode(text.tokenizer.encode(said).ids) == said
    with pytest.raises(InputError, match="more people"):
        study.chat_text(0)


def test_window_nll_is_the_models_loss():
    text = study.chat_text(20)
    model = build(study.VARIANTS["wide"]).eval()
    longest = max(text.held_out, key=len)
    found = study.window_nll(model, text.tokenizer, [longest], 24, 6)
    ids = torch.tensor(text.tokenizer.encode(longest).ids)[:25][None]
    with torch.no_grad():
        loss = model(input_ids=ids, labels=ids).loss.item()
    assert found.shape == (6,) and found[0] == pytest.approx(loss, rel=1e-4)
    assert found.mean() == pytest.approx(np.log(study.VARIANTS["wide"].vocab), rel=0.05)  # untrained: guessing
    with pytest.raises(InputError, match="tokens"):
        study.window_nll(model, text.tokenizer, ["short"], 64)


def test_examples_are_nested_and_earlier_than_what_judges_them():
    few, later = study.personal_data(0, 3, 10, 8)
    many, same = study.personal_data(0, 3, 60, 8)
    assert few == many[:10] and later == same and len(later) == 8
    assert study.personal_data(0, 4, 10, 8)[0] != few
    assert max(d.time for d in many) < min(d.time for d in later)
    with pytest.raises(InputError, match="at most"):
        study.personal_data(0, 0, 5000, 8)


def test_steps_follow_the_rule():
    s = DeviceSettings(epochs=3, batch_size=8, least=8, most=96)
    assert [study.steps_for(n, s) for n in (10, 50, 100, 500)] == [8, 19, 38, 96]


@pytest.mark.parametrize(
    ("change", "message"), [({"replies": 1}, "replies"), ({"lr": 0}, "lr"), ({"small_steps": 0}, "small_steps")]
)
def test_settings_out_of_range(change: dict, message: str):
    with pytest.raises(InputError, match=message):
        DeviceSettings(**change)


def test_task_prompts_find_by_the_bare_question():
    class Store(RetrievalPersonalizer):
        def __init__(self):
            pass

        def retrieve_all(self, questions, k):
            assert questions == ["Ring Ann."] and k == 2
            rows = study.load_task("api_calls", "train")[:2]
            return [[type("Hit", (), {"dialogue": d}) for d in rows]]

    (prompt,) = study.task_prompts(Store(), "api_calls", ["Ring Ann."], 2)
    first, second = study.load_task("api_calls", "train")[:2]
    assert [m["role"] for m in prompt] == ["user", "assistant", "user", "assistant", "user"]
    assert prompt[3]["content"] == first.answer and prompt[1]["content"] == second.answer  # the best one last
    assert prompt[-1]["content"].endswith("Request: Ring Ann.") and "Functions:" in prompt[-1]["content"]


def test_examples_of_choice_tasks_answer_with_the_label():
    for name in ("sentiment", "safety", "qa"):
        rows, plain = study.task_examples(name, "train"), study.load_task(name, "train")
        assert len(rows) == len(plain)
        wanted = [d.meta.get("label", d.answer) for d in plain]
        assert [d.answer for d in rows] == wanted
        assert plain[0].question in rows[0].question and rows[0].question != plain[0].question


# ---------------------------------------------------------------- cells


def test_architectures_end_to_end_then_from_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    lab = Lab(QUICK, cache=tmp_path)
    table = lab.architectures(("deep", "wide"), 1, (1e-3, 4e-3))
    assert table.complete and table.planned == 2 and table.values("variant") == ["deep", "wide"]
    assert len(list(tmp_path.glob("*.json"))) == 4  # both rates were tried
    for cell in table.cells:
        tried = [json.loads(p.read_text(encoding="utf-8")) for p in tmp_path.glob("*.json")]
        mine = [c for c in tried if c["labels"]["variant"] == cell.labels["variant"]]
        best = min(mine, key=lambda c: c["facts"]["choice"])
        assert cell.facts["rate"] == best["labels"]["rate"] and "rate" not in cell.labels
        assert set(cell.rows) == {"nll", "nll/int8", "nll/int4"} and cell.rows["nll"].shape == (8,)
        assert np.abs(cell.rows["nll/int8"] - cell.rows["nll"]).max() < 0.05
        assert cell.facts["error/int4"] == pytest.approx(cell.facts["random_error/int4"], rel=0.2)
    assert set(claims.ranking(table)) == {"wide"}
    monkeypatch.setattr(Lab, "measure_architectures", lambda *_: pytest.fail("measured again"))
    again = Lab(QUICK, cache=tmp_path).architectures(("deep", "wide"), 1, (1e-3, 4e-3))
    assert np.allclose(again.rows("nll", variant="wide")[0], table.rows("nll", variant="wide")[0])
    assert not Lab(QUICK, cache=tmp_path).architectures(("gqa",), 1, (1e-3,), measure=False).cells


def test_keys_know_what_matters():
    lab, other = Lab(QUICK), Lab(replace(QUICK, lr=1e-4))
    cell = {"variant": "deep", "seed": 0, "rate": 1e-3}
    assert lab.key("architectures", cell) == other.key("architectures", cell)  # lr is LoRA's
    assert lab.key("architectures", cell) != Lab(replace(QUICK, small_steps=9)).key("architectures", cell)
    assert lab.key("architectures", cell) != lab.key("architectures", cell | {"seed": 1})


@pytest.mark.model
def test_personal_cells_are_the_packages_numbers(tmp_path: Path):
    llm = tiny_llm()
    lab = Lab(QUICK, llm=llm, encoder=load_encoder(), cache=tmp_path)
    plan = study.plan_personal((0,), 1, (12,), (12,), (12,), 2)
    table = lab.table("personal", plan)
    assert table.complete and len(table.cells) == 7  # int8: base and LoRA only
    earlier, later = study.personal_data(0, 0, 12, 4)
    (base,) = table.rows("nll", method="base", precision="bf16")
    assert base == pytest.approx(response_nll(llm, later))
    assert study.steps_for(12, QUICK) == 3  # 12 examples, three passes of 8 a step, at most 3
    usual = tune_lora(llm, earlier, steps=3, lr=QUICK.lr, rank=8, alpha=16, layers="upper")
    with adapted(llm, usual) as tuned:
        assert table.rows("nll", method="lora", precision="bf16", factor=1)[0] == pytest.approx(
            response_nll(tuned, later)
        )
    (long,) = table.find(method="lora", factor=2)
    assert long.facts["steps"] == 6
    rag, both = (table.rows("nll", method=m, precision="bf16")[0] for m in ("rag", "both"))
    assert not np.allclose(rag, base) and not np.allclose(both, rag)
    verdicts = {r.says: r.verdict for r in claims.ledger({"personal": table}) if r.paper == "Empirical Guidelines"}
    assert "not measured" not in verdicts.values()
    saved = table.save(tmp_path / "device_personal.json", "a command")
    read = study.recorded(tmp_path)["personal"]
    assert saved.name == "device_personal.json" and read.run["command"] == "a command"
    assert read.rows("nll", method="rag", precision="bf16")[0] == pytest.approx(rag, abs=1e-3)


@pytest.mark.model
def test_task_and_precision_cells(tmp_path: Path):
    lab = Lab(replace(QUICK, replies=8), llm=tiny_llm(), encoder=load_encoder(), cache=tmp_path)
    table = lab.table("tasks", study.plan_tasks(("sentiment",), 1))
    assert table.complete and {c.labels["method"] for c in table.cells} == set(study.METHODS)
    (base,) = table.find(method="base")
    assert base.rows["score"].shape == base.rows["nll"].shape == (4,) and set(base.rows["score"]) <= {0.0, 1.0}
    assert "score" not in table.find(method="rag")[0].rows
    hard, lora, rag = claims.difficulty_rows(table)
    assert hard.shape == lora.shape == rag.shape == (4,)
    plan = [{"what": w, "precision": p} for w in ("person:0", "safety", "speed") for p in ("bf16", "int8")]
    table = lab.table("precision", plan)
    assert table.rows("nll", what="person:0", precision="int8")[0].shape == (8,)
    assert set(table.find(what="safety")[0].rows) >= {"accuracy", "too_lax", "too_strict"}
    assert (table.rows("decode", what="speed", precision="bf16")[0] > 0).all()
    with pytest.raises(InputError, match="precision"):
        lab.model("int2")


# ---------------------------------------------------------------- tables


def made_table(name: str = "personal") -> DeviceTable:
    rng = np.random.default_rng(0)
    base = rng.normal(4, 0.5, (2, 40))
    cells = []
    for person in (0, 1):
        who = {"person": person, "precision": "bf16"}
        cells.append(Measured(who | {"method": "base"}, {"nll": base[person]}))
        for seed in (0, 1):
            for n, gain in ((10, 0.1), (100, 0.5)):
                noise = rng.normal(0, 0.02, 40)
                data = who | {"seed": seed, "n": n}
                cells.append(Measured(data | {"method": "rag"}, {"nll": base[person] - 0.3 + noise}))
                for m, more in (("lora", 0.0), ("both", 0.2)):
                    rows = {"nll": base[person] - gain - more + noise}
                    cells.append(Measured(data | {"method": m, "factor": 1}, rows))
                rows = {"nll": base[person] - gain + 0.1 + noise}
                cells.append(Measured(data | {"method": "lora", "factor": 4}, rows))
        rows = {"nll": base[person] - 0.05}
        cells.append(Measured(who | {"precision": "int8", "seed": 0, "n": 10, "method": "lora", "factor": 1}, rows))
    return DeviceTable(name, tuple(cells), len(cells), {"experiment": name})


def test_pairs_match_person_and_seed_and_the_base_matches_all_seeds():
    table = made_table()
    a, b = table.pairs("nll", {"method": "base"}, {"method": "lora", "n": 100, "factor": 1}, precision="bf16")
    assert len(a) == 4
    assert all(np.mean(x - y) == pytest.approx(0.5, abs=0.03) for x, y in zip(a, b, strict=True))
    e = table.difference("nll", {"method": "base"}, {"method": "rag", "n": 10}, precision="bf16")
    assert e.low < 0.3 < e.high + 0.02 and e.n == 160
    with pytest.raises(InputError, match="found none"):
        table.difference("nll", {"method": "base"}, {"method": "magic"})
    with pytest.raises(InputError, match="found none"):
        table.estimate("nll", method="magic")


def test_tables_survive_the_disk_and_damage_is_named(tmp_path: Path):
    table = made_table()
    path = table.save(tmp_path / "device_personal.json", "python -m x")
    again = study.load_table(path)
    assert again.complete and [c.labels for c in again.cells] == [c.labels for c in table.cells]
    content = json.loads(path.read_text(encoding="utf-8"))
    assert content["run"]["command"] == "python -m x" and set(content) == {"run", "results", "cells"}
    assert all({"name", "value", "low", "high", "n", "seeds"} <= set(r) for r in content["results"])
    path.write_text("{", encoding="utf-8")
    with pytest.raises(InputError, match="device_personal"):
        study.load_table(path)
    with pytest.raises(InputError, match="folder"):
        study.recorded(tmp_path / "absent")


def test_the_ledger_judges_what_is_there_and_says_what_is_not():
    empty = claims.ledger({})
    assert {r.verdict for r in empty} == {"not measured"} and all(r.missing for r in empty)
    found = {r.says: r.verdict for r in claims.ledger({"personal": made_table()})}
    assert found["retrieval wins at cold start"] == "holds"
    assert found["gains of tuning grow with data"] == "holds"
    assert found["both together gain most"] == "holds"
    assert found["longer fine-tuning does not necessarily help"] == "holds"
    assert found["a compressed LLM may be better on little personal data"] == "fails"
    assert found["block-wise sharing: 0.7 % / 0.8 % more accuracy at no increase in size"] == "not measured"


def test_rankings_wait_for_the_end_of_the_training():
    rng = np.random.default_rng(0)

    def table(fall: float, tokens: int = 200) -> DeviceTable:
        cells = [
            Measured(
                {"variant": v, "seed": s},
                {"nll": rng.normal(3 + up, 0.01, 50)},
                {"still_falling": fall, "tokens": tokens, "parameters": 100},
            )
            for s in range(3)
            for v, up in (("deep", 0.0), ("wide", 0.1), ("gqa", 0.0))
        ]
        return DeviceTable("architectures", tuple(cells), len(cells))

    assert claims.ranking(table(0.01))["wide"] == "worse"
    assert claims.ranking(table(0.5))["wide"] == "too short to rank"
    assert claims.ranking(table(0.01))["gqa"] == "no difference seen"
    assert set(claims.ranking(table(0.01, tokens=50)).values()) == {"too short to rank"}
    judged = {r.says: r.verdict for r in claims.ledger({"architectures": table(0.01)})}
    assert judged["architecture matters below a billion parameters: deep and thin"] == "holds"
    assert {r.verdict for r in claims.ledger({"architectures": table(0.01, tokens=50)})} == {"not measured"}


# ---------------------------------------------------------------- command line


def test_command_line_says_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture):
    command = ["architectures", "--no-measure", "--cache", str(tmp_path), "--seeds", "2", "--set", "people=20"]
    assert study.main(command) == 3
    assert "0 of 10 cells" in capsys.readouterr().out
    assert study.main(["precision", "--seeds", "2", "--cache", str(tmp_path)]) == 2
    assert study.main(["personal", "--set", "lrr=3", "--cache", str(tmp_path)]) == 2
    assert study.main(["personal", "--set", "lr=fast", "--cache", str(tmp_path)]) == 2
    assert "expected" in capsys.readouterr().err


def test_settings_from_the_command_line():
    s = study.settings_of(["layers=3", "lr=1e-4", "replies=9"])
    assert (s.layers, s.lr, s.replies) == (3, 1e-4, 9)
    assert study.settings_of(["layers=all"]).layers == "all"
    assert study._without_paths(["personal", "--out", "/a/b.json"]) == ["personal", "--out", "DIR"]


def test_examples_of_a_choice_are_judged_in_the_form_they_are_trained_in():
    llm = tiny_llm()
    for d in study.task_examples("sentiment", "train", 3):
        (trained,) = token_rows(llm, [d], 512).rows
        (judged,) = token_rows(llm, [replace(d, meta={})], 512).rows  # as response_nll reads it
        assert list(trained.ids) == list(judged.ids) and trained.answer == judged.answer
        assert response_nll(llm, [d], progress=False).shape == (1,)
        with pytest.raises(InputError, match=r"dialogues\[0\]: expected a message and a reply, got one running text"):
            response_nll(llm, [replace(d, meta={**d.meta, "form": "plain"})], progress=False)
