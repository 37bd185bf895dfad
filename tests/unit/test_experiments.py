"""The study: streams, keys, order, cache, resumption, tables; and one small run on the real model."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import fields, replace

import numpy as np
import pytest

from pllm_helpers.dialogue import DialogueSet
from pllm_helpers.evaluation import evaluate_responses, paired_difference, response_nll
from pllm_helpers.experiments import (
    ALL_POLICIES,
    DATA_SETS,
    Cell,
    CellResult,
    Settings,
    Study,
    Workbench,
    buffer_size_sweep,
    data_set_stream,
    learning_curve,
    load_results,
    metric_ablation,
    open_stream,
    person_stream,
    policy_comparison,
    released_code_gap,
    shorten,
    synthesis_sweep,
)
from pllm_helpers.experiments.__main__ import main, settings_of, shown_command
from pllm_helpers.experiments.cells import BASE, reply_nll, without_system_message
from pllm_helpers.experiments.policy_study import _plan, run_cells
from pllm_helpers.models import LLM, load_encoder, load_llm
from pllm_helpers.runtime import InputError
from pllm_helpers.selection import POLICIES, MetricTable
from pllm_helpers.tuning import adapted, tune_lora
from tests.unit.tuning_kit import tiny_llm

SMALL = Settings(length=24, held_out=4, steps=2, generated=2, new_tokens=2, rank=2, batch_size=4)
STREAM = "authored:empathetic"


def tiny_model() -> LLM:
    """A tiny random model: cells, keys and files are the same as with a real one."""
    return tiny_llm(hidden_size=32, intermediate_size=64, num_hidden_layers=2)


@pytest.fixture(scope="module")
def tiny() -> LLM:
    return tiny_model()


@pytest.fixture(scope="module")
def encoder():
    return load_encoder()


@pytest.fixture
def parts(tiny, encoder, tmp_path):
    return {"llm": tiny, "encoder": encoder, "cache": tmp_path / "cache", "progress": False}


# ---------------------------------------------------------------- streams


def test_windows_of_a_person_are_different_data():
    windows = [person_stream(3, seed) for seed in range(5)]
    ids = [d.id for w in windows for d in (*w.stream, *w.held_out)]
    assert all(len(w.stream) == 800 and len(w.held_out) == 64 for w in windows)
    assert len(set(ids)) > 0.995 * len(ids)  # the same greeting at the same second is the same row
    times = [d.time for w in windows for d in (*w.stream, *w.held_out)]
    assert times == sorted(times)
    with pytest.raises(InputError, match="seed: expected below 5: person 3 has .* got 5"):
        person_stream(3, 5)


def test_the_four_people_of_the_table_have_five_windows():
    for rank in range(4):
        assert len(person_stream(rank, 4).held_out) == 64


def test_seeds_shuffle_a_data_set_and_keep_held_out_apart(shared_data):
    a, b = (data_set_stream("alpaca", shared_data, seed) for seed in (0, 1))
    assert (len(a.stream), len(a.held_out)) == (800, 64)
    questions = [d.question for d in (*a.stream, *a.held_out)]
    assert len(set(questions)) == len(questions)
    assert a.hash == data_set_stream("alpaca", shared_data, 0).hash != b.hash
    assert [d.id for d in a.held_out] != [d.id for d in b.held_out]


def test_short_sets_give_what_they_have_and_say_so(shared_data):
    orca, covid = (data_set_stream(n, shared_data) for n in ("openorca", "meddialog"))
    assert (len(orca.stream), len(orca.held_out)) == (729, 64) and "all of its 793 rows" in orca.note
    assert (len(covid.stream), len(covid.held_out)) == (351, 64) and "covid_dialogue_en stands in" in covid.note


def test_safety_labels_are_never_replies(shared_data, tmp_path):
    """With contexts and labels only, or a handful of real replies, the authored family serves and the note says so."""
    both = data_set_stream("prosocial", shared_data)
    only_labels = tmp_path / "prosocial.jsonl.gz"
    only_labels.write_bytes((shared_data / "prosocial_contexts.jsonl.gz").read_bytes())
    for stream in (both, data_set_stream("prosocial", tmp_path), data_set_stream("prosocial", only_labels)):
        rows = [*stream.stream, *stream.held_out]
        assert len(rows) == 64 and {d.source for d in rows} == {"authored/prosocial"}
        assert "authored family prosocial stands in" in stream.note and "labels are not replies" in stream.note
        assert not any(d.answer.strip("_").endswith(("caution", "intervention", "casual")) for d in rows)


def test_real_prosocial_replies_are_used_where_there_are_enough(tmp_path):
    rows = [
        {"context": f"I want to do thing {i}", "response": f"Think about person {i} first.", "safety_label": "__ok__"}
        for i in range(120)
    ]
    (tmp_path / "prosocial.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    stream = data_set_stream("prosocial", tmp_path)
    assert (len(stream.stream), len(stream.held_out)) == (90, 30) and "stands in" not in stream.note


def test_without_files_authored_families_stand_in():
    for name in DATA_SETS:
        stream = open_stream(name, 1)
        assert (len(stream.stream), len(stream.held_out)) == (48, 16) and "stands in" in stream.note
    whole = open_stream("authored", 2)
    assert (len(whole.stream), len(whole.held_out)) == (320, 64)
    assert not {d.meta["topic"] for d in whole.stream} & {d.meta["topic"] for d in whole.held_out}


@pytest.mark.parametrize(
    "name, source, message",
    [
        ("persona:3", None, "stream: expected person:RANK"),
        ("person:x", None, "stream: expected person:RANK"),
        ("authored:nonsense", None, "stream"),
        ("alpaca", "/nowhere", "source: expected a folder"),
        ("alpaca", ".", "source: expected alpaca with an ending"),
    ],
)
def test_bad_streams(name, source, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=message):
        open_stream(name, source=source)


def test_long_answers_end_with_a_sentence():
    tokenizer = load_llm().tokenizer
    answer = "One short sentence. A second one, which is a little longer! " + "And then words " * 30
    cut = shorten(DialogueSet("u", "why " * 50, answer), tokenizer, 8, 20)
    assert cut.answer == "One short sentence. A second one, which is a little longer!"
    assert cut.question == "why why why why why why why why"
    no_end = shorten(DialogueSet("u", "q", "word " * 40), tokenizer, 8, 8)
    assert set(no_end.answer.split()) == {"word"} and len(tokenizer(no_end.answer)["input_ids"]) <= 8
    short = DialogueSet("u", "hi", "hello 😀 καλημέρα")
    assert shorten(short, tokenizer, 20, 20) is short
    for text in ("ααα" * 40, "我不知道" * 20, "😀" * 30, "x" * 300):
        d = shorten(DialogueSet("u", "q", text), tokenizer, 8, 8)
        assert d.answer and text.startswith(d.answer) and "\ufffd" not in d.answer


def test_template_without_system_message():
    llm = load_llm()
    plain = without_system_message(llm)
    text = plain.format_chat("hi")
    assert "system" in llm.format_chat("hi") and text == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert "Be brief" in plain.format_chat("hi", system="Be brief")
    assert plain.model is llm.model and "system" in llm.format_chat("hi")


# ---------------------------------------------------------------- keys


def test_keys_change_with_everything_that_matters(parts, tiny):
    bench = Workbench(SMALL, llm=tiny, encoder=parts["encoder"], cache=parts["cache"])
    cell = Cell(STREAM, 0, "quality", bins=8)
    keys = {bench.key(cell)}
    others = [replace(cell, **change) for change in (
        {"stream": "authored:medical"}, {"seed": 1}, {"policy": "random"}, {"bins": 9}, {"sets": 12},
        {"synthesis": 1}, {"steps": 3},
    )]  # fmt: skip
    keys |= {bench.key(c) for c in others}
    assert len(keys) == 1 + len(others)

    changes = {
        "model": "other",
        "dtype": "fp32",
        "device": "cuda",
        "encoder": "other",
        "reading": "norm",
        "layers": "all",
    }
    changes |= {"system_prompt": False, "lr": 0.5, "alpha": 3}
    for f in fields(Settings):
        value = changes.get(f.name, getattr(SMALL, f.name) if f.name in changes else None)
        value = getattr(SMALL, f.name) + 1 if value is None else value
        changed = Workbench(replace(SMALL, **{f.name: value}), llm=tiny, encoder=parts["encoder"], cache=parts["cache"])
        keys.add(changed.key(cell))
    assert len(keys) == 1 + len(others) + len(fields(Settings))

    weights = LLM(tiny.model, tiny.tokenizer, tiny.name, tiny.dtype)
    import copy

    weights.model = copy.deepcopy(tiny.model)
    weights.model.lm_head.weight.data[0, 0] += 1
    keys.add(Workbench(SMALL, llm=weights, encoder=parts["encoder"], cache=parts["cache"]).key(cell))
    assert len(keys) == 2 + len(others) + len(fields(Settings))
    assert bench.key(cell) == Workbench(SMALL, llm=tiny, cache=parts["cache"]).key(cell)


def test_code_version_and_data_are_in_the_key(parts, tiny, tmp_path, monkeypatch):
    rows = [{"instruction": f"question {i}", "input": "", "output": f"an answer {i}"} for i in range(40)]
    file = tmp_path / "alpaca.json"
    cell = Cell("alpaca", 0, "fifo", bins=8)

    def key() -> str:
        file.write_text(json.dumps(rows), encoding="utf-8")
        return Workbench(SMALL, source=tmp_path, llm=tiny, cache=parts["cache"]).key(cell)

    first = key()
    assert key() == first
    rows[7]["output"] += "!"
    second = key()
    monkeypatch.setattr("pllm_helpers.experiments.cells.CODE_VERSION", -1)
    assert len({first, second, key()}) == 3


def test_the_base_model_is_measured_once_whatever_the_buffer(parts, tiny):
    bench = Workbench(SMALL, llm=tiny, cache=parts["cache"])
    assert bench.key(Cell(STREAM, 0, BASE, bins=8)) == bench.key(Cell(STREAM, 0, BASE, bins=64, sets=12))


# ---------------------------------------------------------------- order


def test_stopping_anywhere_leaves_a_balanced_table():
    plan = _plan(["a", "b"], ("quality", "random", BASE), 3, [{"bins": 8}, {"bins": 16}])
    assert len(plan) == len(set(plan)) == 3 * 2 * (2 * 2 + 1)
    assert [c.seed for c in plan] == sorted(c.seed for c in plan)
    for cut in range(len(plan) + 1):
        done = plan[:cut]
        counts = [sum(c.stream == s and c.policy == "quality" and c.bins == b for c in done)
                  for s in "ab" for b in (8, 16)]  # fmt: skip
        assert max(counts) - min(counts) <= 1


def test_plans_of_the_experiments(monkeypatch):
    seen = {}

    def planned(name, cells, settings, **options):
        seen[name] = cells
        return Study(name, (), len(cells))

    monkeypatch.setattr("pllm_helpers.experiments.policy_study.run_cells", planned)
    policy_comparison(["person:0", "alpaca"])
    assert len(seen["policy_comparison"]) == 2 * 5 * (10 + 1)
    learning_curve("person:0", ("quality",), 1)
    assert [c.sets for c in seen["learning_curve"] if c.policy == "quality"] == [133, 267, 400, 533, 667, 800]
    buffer_size_sweep("person:0", policies="random", seeds=[4])
    assert [c.bins for c in seen["buffer_size_sweep"] if c.policy == "random"] == [8, 16, 32, 64, 128]
    metric_ablation("person:0", 1)
    assert {"quality", "eoe_only", "dss_only", "idd_only"} < {c.policy for c in seen["metric_ablation"]}
    released_code_gap("person:0", 1)
    assert {c.policy for c in seen["released_code_gap"]} == {"quality", "released_code", "random", BASE}
    synthesis_sweep("person:0", (0, 2), seeds=1, growing=True)
    assert [(c.synthesis, c.steps) for c in seen["synthesis_sweep"] if c.policy == "quality"] == [(0, 16), (2, 48)]
    assert set(ALL_POLICIES) == set(POLICIES)
    for wrong in ((), ("qualty",)):
        with pytest.raises(InputError, match="policies"):
            policy_comparison("person:0", wrong)
    with pytest.raises(InputError, match="streams"):
        policy_comparison([])


# ---------------------------------------------------------------- running, resuming


def test_cells_are_cached_paired_and_repeatable(parts, tiny, tmp_path):
    study = policy_comparison(STREAM, ("fifo", "random"), 2, settings=SMALL, bins=8, **parts)
    assert study.complete and len(study.cells) == 6
    files = sorted(parts["cache"].glob("*.json"))
    stamps = [f.stat().st_mtime_ns for f in files]
    again = policy_comparison(STREAM, ("fifo", "random"), 2, settings=SMALL, bins=8, **parts)
    assert [f.stat().st_mtime_ns for f in sorted(parts["cache"].glob("*.json"))] == stamps
    assert again.table().equals(study.table())
    assert not list(parts["cache"].glob("*.lock"))

    elsewhere = policy_comparison(STREAM, "fifo", [1], settings=SMALL, bins=8, **{**parts, "cache": tmp_path / "new"})
    one, other = (s.results(STREAM, "fifo")[-1] for s in (study, elsewhere))
    assert one.cell == other.cell and one.info["losses"] == other.info["losses"]
    assert all((one.rows[k] == other.rows[k]).all() for k in one.rows)

    bench = Workbench(SMALL, llm=tiny, encoder=parts["encoder"], cache=parts["cache"])
    stream = bench.stream(STREAM, 0)
    fifo = study.results(STREAM, "fifo")[0]
    assert fifo.info["kept"] == list(range(16, 24)) and fifo.info["trained_on"] == 8
    assert fifo.info["actions"] == {"insert": 8, "replace": 16, "discard": 0}
    assert 0 < fifo.info["buffer"]["recency"] <= 1 and fifo.info["buffer"]["words"] > 1
    base = study.results(STREAM, BASE)[0]
    np.testing.assert_allclose(base.rows["nll"], response_nll(bench.llm, stream.held_out), atol=1e-4)
    scores = evaluate_responses(fifo.info["answers"], [d.answer for d in stream.held_out[:2]])
    assert (scores.rouge1 == fifo.rows["rouge1"]).all() and fifo.means["rouge1"] == scores.rouge1.mean()
    assert base.rows["rouge1"].shape == (2,) and base.rows["nll"].shape == (4,)


def test_development_grid(parts, tmp_path):
    from pllm_helpers.experiments import development_grid

    grid = development_grid(STREAM, (1e-3, 1e-2), (1, 2), 1, settings=SMALL, bins=8, **parts)
    assert set(grid.estimates) == {(0, 0), (1e-3, 1), (1e-3, 2), (1e-2, 1), (1e-2, 2)}
    assert len({e.value for e in grid.estimates.values()}) == 5 and len(grid.table()) == 5
    content = json.loads(grid.save(tmp_path / "grid.json", "command").read_text(encoding="utf-8"))
    assert {f"nll/{STREAM}/base", f"nll/{STREAM}/lr=0.01/steps=2"} < {r["name"] for r in content["results"]}
    assert content["run"]["command"] == "command" and "lr" not in content["run"]["settings"]


def test_a_damaged_result_is_measured_again(parts):
    run = lambda: policy_comparison(STREAM, "fifo", 1, settings=SMALL, bins=8, **parts)  # noqa: E731
    first = run()
    for file in parts["cache"].glob("*.json"):
        file.write_text(file.read_text(encoding="utf-8")[:100], encoding="utf-8")
    assert run().table("nll").equals(first.table("nll"))


def test_cells_of_another_buffer_are_dropped(parts, capsys):
    """If a policy changes, --verify finds the cells that it would now fill otherwise."""
    run = {"settings": SMALL, "bins": 8, **parts, "progress": True}
    before = policy_comparison(STREAM, ("fifo", "random"), 1, **run)
    file = next(f for f in parts["cache"].glob("*.json") if '"policy": "fifo"' in f.read_text(encoding="utf-8"))
    content = json.loads(file.read_text(encoding="utf-8"))
    content["info"]["kept"][0] += 1
    file.write_text(json.dumps(content), encoding="utf-8")
    capsys.readouterr()
    found = policy_comparison(STREAM, ("fifo", "random"), 1, **run, measure=False, verify=True)
    assert len(found.cells) == 2 and capsys.readouterr().out.count("dropped") == 1
    assert policy_comparison(STREAM, ("fifo", "random"), 1, **run, verify=True).table("nll").equals(before.table("nll"))


def test_time_limit_stops_between_cells(parts, capsys):
    options = {**parts, "progress": True}
    study = policy_comparison(STREAM, "fifo", 1, settings=SMALL, bins=8, max_minutes=1e-9, **options)
    assert not study.cells and not study.complete and "time is up" in capsys.readouterr().out
    assert policy_comparison(STREAM, "fifo", 1, settings=SMALL, bins=8, **parts).complete


SCRIPT = """
import sys
sys.path[:0] = {path!r}
from test_experiments import SMALL, STREAM, tiny_model
from pllm_helpers.experiments import policy_comparison
from pllm_helpers.models import load_encoder
tiny = tiny_model()
policy_comparison(STREAM, ("fifo", "random"), 2, settings=SMALL, bins=8, llm=tiny,
                  encoder=load_encoder(), cache={cache!r})
"""


def test_a_kill_loses_at_most_the_cell_in_work(parts, tmp_path, root):
    """kill -9 after the first cells are there; the same call goes on and equals an uninterrupted one."""
    script = tmp_path / "run.py"
    paths = [str(root), str(root / "tests" / "unit")]
    script.write_text(textwrap.dedent(SCRIPT.format(path=paths, cache=str(parts["cache"]))), encoding="utf-8")
    process = subprocess.Popen([sys.executable, str(script)], env=os.environ | {"PLLM_THREADS": "1"})
    limit = time.monotonic() + 240
    while len(list(parts["cache"].glob("*.json"))) < 2 and process.poll() is None and time.monotonic() < limit:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    left = {f.name: f.read_bytes() for f in parts["cache"].glob("*.json")}
    assert len(left) >= 2
    plan = {"policies": ("fifo", "random"), "seeds": 2, "settings": SMALL, "bins": 8}
    resumed = policy_comparison(STREAM, **plan, **parts)
    for name, content in left.items():  # what was acknowledged is whole and was not measured again
        assert (parts["cache"] / name).read_bytes() == content and CellResult.from_json(json.loads(content))
    whole = policy_comparison(STREAM, **plan, **{**parts, "cache": tmp_path / "whole"})
    assert resumed.complete and resumed.table("nll").equals(whole.table("nll"))


def test_a_cell_in_another_process_is_not_measured_twice(parts, tiny):
    import filelock

    bench = Workbench(SMALL, llm=tiny, encoder=parts["encoder"], cache=parts["cache"])
    cell = Cell(STREAM, 0, BASE)
    with filelock.FileLock(str(bench.path(cell).with_suffix(".lock"))):
        assert bench.run(cell, wait=False) is None and not bench.path(cell).exists()
    assert bench.run(cell, wait=False) is not None


def test_synthesised_sets_are_added(parts):
    study = synthesis_sweep(STREAM, (0, 1), "fifo", 1, settings=SMALL, bins=3, **parts)
    assert study.factor == "synthesis" and study.levels() == (0, 1)
    made = study.results(STREAM, "fifo", synthesis=1)[0].info
    assert made["synthesis"]["asked"] >= 3 and made["trained_on"] == 3 + made["synthesis"]["passed"]
    assert study.estimate("seconds", STREAM, "fifo", synthesis=1).value > 0
    assert 0 <= study.estimate("synthesis_yield", STREAM, "fifo", synthesis=1).value <= 1


# ---------------------------------------------------------------- tables


def made_up(seeds=3, n=16) -> Study:
    """Cells with known differences: policy good is better than random by 0.5 nats and 0.1 ROUGE-1."""
    rng, cells = np.random.default_rng(0), []
    for stream in ("person:0", "alpaca"):
        for seed in range(seeds):
            nll, rouge = rng.normal(4, 1, n), rng.uniform(0.2, 0.6, n // 2)
            for policy, better in (("quality", 1.0), ("random", 0.0), (BASE, -2.0)):
                rows = {"nll": nll - 0.5 * better, "rouge1": rouge + 0.1 * better, "rougeL": rouge}
                means = {k: float(v.mean()) for k, v in rows.items()} | {"bleu": 0.01 * seed, "copy_rate": 0.3}
                means |= {"length_ratio": 1.0 + 0.1 * seed, "corpus_bleu": 0.02, "blank": 0.0}
                info = {"streamed": 800, "held_out": n, "threads": 1, "note": "a note" if stream == "alpaca" else ""}
                cells.append(CellResult(Cell(stream, seed, policy), "", rows, means, {"tune": 2.0}, info))
    data = {s: {"streamed": 800, "held_out": n} for s in ("person:0", "alpaca")}
    run = {"experiment": "policy_comparison", "versions": {"torch": "2"}, "data": data, "threads_per_cell": [1]}
    return Study("policy_comparison", tuple(cells), len(cells), run)


def test_estimates_are_paired_and_state_n_and_seeds():
    study = made_up()
    gap = study.estimate("nll", "alpaca", "quality", against="random")
    assert gap.value == pytest.approx(-0.5) and gap.high - gap.low < 1e-9 and gap.n == 48 and gap.seeds == (0, 1, 2)
    level = study.estimate("nll", "alpaca", "quality")
    assert level.high - level.low > 0.2 and level.unit == "nats per token"
    pooled = study.estimate("rouge1", None, "quality", against="random")
    assert pooled.value == pytest.approx(0.1) and pooled.n == 2 * 3 * 8
    rows = [c.rows["nll"] for c in study.results("alpaca", "quality")]
    assert level.value == paired_difference(rows).value
    over_seeds = study.estimate("bleu", "alpaca", "quality")
    assert over_seeds.value == pytest.approx(0.01) and over_seeds.low < 0.01 < over_seeds.high


def test_table_and_names():
    study = made_up()
    table = study.table("rouge1", against="random")
    assert set(table["policy"]) == {"quality", BASE} and len(table) == 4 and set(table["note"]) == {"", "a note"}
    names = study.estimates()
    assert {"rouge1/person:0/quality", "nll/alpaca/random", "nll_minus_random/alpaca/quality"} <= set(names)
    assert "nll_minus_random/alpaca/random" not in names
    assert len(study.table("nll", pooled=True)) == 3


def test_unknown_names_are_refused():
    study = made_up()
    for wrong in (("rouge9", "alpaca", "quality"), ("nll", "dolly", "quality"), ("nll", "alpaca", "fifo")):
        with pytest.raises(InputError):
            study.estimate(*wrong)
    with pytest.raises(InputError, match="levels"):
        study.estimate("nll", "alpaca", "quality", epochs=2)
    cells = [CellResult(Cell("a", 0, "fifo", bins=b), "", {"nll": np.arange(3.0)}, {}, {}) for b in (8, 9)]
    two = Study("x", tuple(cells), 2)
    with pytest.raises(InputError, match="expected one of the levels"):
        two.estimate("nll", "a", "fifo")
    assert two.estimate("nll", "a", "fifo", bins=8).value == 1


def test_saved_tables_read_back(tmp_path):
    study = made_up()
    path = study.save(tmp_path / "policy_comparison.json", "python -m pllm_helpers.experiments …")
    content = json.loads(path.read_text(encoding="utf-8"))
    assert set(content) == {"run", "results", "cells"}
    row = next(r for r in content["results"] if r["name"] == "nll_minus_random/person:0/quality")
    assert row["value"] == pytest.approx(-0.5) and row["n"] == 48 and row["seeds"] == [0, 1, 2] and row["unit"]
    loaded = load_results(path)
    assert loaded.complete and loaded.notes == {"alpaca": "a note"}
    for metric in ("nll", "rouge1", "bleu", "copy_rate"):
        a, b = (s.table(metric).drop(columns=["n"]) for s in (study, loaded))
        np.testing.assert_allclose(a[["value", "low", "high"]], b[["value", "low", "high"]], atol=4e-3)
    assert str(tmp_path) not in path.read_text(encoding="utf-8")
    with pytest.raises(InputError, match="nothing.json under data/results, there is none"):
        load_results("nothing")
    path.write_text('{"run": {}}', encoding="utf-8")
    with pytest.raises(InputError, match="policy_comparison.json: expected the table"):
        load_results(path)


def test_a_full_table_is_small(tmp_path):
    """300 cells of 64 held-out rows and 32 answers stay below 300 KB."""
    study = made_up(seeds=1, n=64)
    cells = [
        replace(study.cells[0], cell=Cell("person:0", s, "quality", bins=b + 1)) for s in range(5) for b in range(60)
    ]
    info = dict(study.cells[0].info) | {"buffer": dict.fromkeys(("different_words", *"abcdefgh"), 0.1234)}
    path = Study("x", tuple(replace(c, info=info) for c in cells), 300, study.run).save(tmp_path / "x.json")
    assert sum(len(line) for line in path.read_text(encoding="utf-8").splitlines() if '"rows"' in line) < 300_000


# ---------------------------------------------------------------- command line


def test_settings_from_the_command_line():
    s = settings_of("standard", ["lr=0.002", "steps=20", "system_prompt=False", "layers=8", "model=some/hub"])
    assert (s.lr, s.steps, s.system_prompt, s.layers, s.model) == (0.002, 20, False, 8, "some/hub")
    for wrong in ("lrr=1", "lr", "steps=many", "system_prompt=perhaps", "steps=0"):
        with pytest.raises(InputError):
            settings_of("standard", [wrong])
    with pytest.raises(InputError, match="profile"):
        settings_of("fast", [])


def test_the_quoted_command_names_no_folder_of_this_machine(tmp_path, monkeypatch):
    monkeypatch.setenv("PLLM_SHARED", str(tmp_path / "shared"))
    monkeypatch.chdir(tmp_path)
    folder = str(tmp_path / "shared" / "data")
    words = ["policy_comparison", "--source", folder, "--cache", "/somewhere/else", "--out", "a b"]
    shown = shown_command(words)
    assert "--source shared/data" in shown and "--cache DIR" in shown and "'a b'" in shown
    assert "/somewhere" not in shown and str(tmp_path) not in shown
    (tmp_path / "checkout").mkdir()
    monkeypatch.chdir(tmp_path / "checkout")
    assert "--source $PLLM_SHARED/data" in shown_command(words)
    assert "--source $PLLM_SHARED/data" in shown_command(["x", "--source", "../shared/data"])
    assert shown_command(["x", "--no-measure", "--verify"]).endswith("experiments x")


def test_command_line_refuses(capsys, tmp_path):
    for words, message in (
        (["policy_comparison", "--streams", "nobody", "--cache", str(tmp_path)], "stream: expected"),
        (["metric_ablation", "--streams", "person:0", "--policies", "random"], "--policies"),
        (["policy_comparison", "--streams", "person:0", "--counts", "1"], "--counts"),
        (["policy_comparison", "--streams", "person:0", "--bins", "1", "2"], "--bins"),
        (["policy_comparison", "--streams", "person:0", "--max-minutes", "0"], "max_minutes"),
    ):
        assert main(words) == 2
        assert message in capsys.readouterr().err


# ---------------------------------------------------------------- the real model


@pytest.mark.model
def test_a_small_study_on_the_real_model(tmp_path, capsys, monkeypatch):
    """From the command line: a real person, two policies, 8 bins, 4 steps; adapters learn, differences are paired."""
    monkeypatch.chdir(tmp_path)
    changes = ["length=64", "held_out=8", "steps=4", "generated=4", "new_tokens=8", "lr=0.003"]
    words = ["policy_comparison", "--streams", "person:4", "--policies", "quality", "random", "--seeds", "1"]
    words += ["--bins", "8", "--profile", "quick", "--set", *changes]
    words += ["--cache", str(tmp_path / "cache"), "--out", "table.json"]
    assert main(words) == 0
    assert "table written to table.json" in capsys.readouterr().out
    study = load_results(tmp_path / "table.json")
    assert study.complete and study.policies == ("quality", "random", BASE)
    assert study.run["settings"]["model"] == "SmolLM2-135M-Instruct" and study.run["versions"]["torch"]
    for policy in ("quality", "random"):
        assert study.estimate("nll", "person:4", policy, against=BASE).value < 0  # it learned something
    bench = Workbench(settings_of("quick", changes), cache=tmp_path / "cache")
    cell = Cell("person:4", 0, "random", bins=8)
    result = bench.cached(cell)
    assert isinstance(bench.table(bench.stream("person:4", 0)), MetricTable)
    rows, account = bench.select(cell)
    assert account["kept"] == result.info["kept"] and len(rows) == 8
    kept = {bench.stream("person:4", 0).stream[p].answer for p in account["kept"]}
    assert {d.answer for d in rows} == kept  # gold replies of what stayed
    asked = bench.stream("person:4", 0).held_out[:4]
    assert result.rows["rouge1"].shape == (len(asked),) and result.rows["nll"].shape == (8,)
    assert result.info["losses"][0] > result.info["losses"][-1] or len(result.info["losses"]) == 4


@pytest.mark.model
def test_the_faster_nll_is_that_of_response_nll():
    """On the real model in fp32; an adapter is seen by both."""
    rows = [shorten(d, load_llm().tokenizer, 32, 24) for d in person_stream(4, length=8, held_out=6).held_out]
    llm = load_llm(dtype="fp32")
    np.testing.assert_allclose(reply_nll(llm, rows), response_nll(llm, rows), atol=1e-4)
    tuned = tune_lora(llm, rows, steps=2, lr=0.01, rank=2, layers="upper", batch_size=3, progress=False)
    with adapted(llm, tuned) as personal:
        after = reply_nll(personal, rows)
        np.testing.assert_allclose(after, response_nll(personal, rows), atol=1e-4)
    assert np.abs(after - reply_nll(llm, rows)).max() > 0.01


def test_scores_do_not_need_prompts():
    assert evaluate_responses(["a"], ["a"]).copy_rate[0] == 0


def test_run_cells_refuses(parts):
    for wrong in ({"workers": -1}, {"max_minutes": 0}):
        with pytest.raises(InputError):
            run_cells("x", [], SMALL, **{**parts, **wrong})
