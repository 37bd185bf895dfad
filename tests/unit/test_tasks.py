"""The small tasks written for this project: their rows, splits, references and loader."""

import json
import re
from collections import Counter

import pytest

from pllm_helpers.corpora.tasks import SPLITS, TASKS, load_task, read_task, task_path
from pllm_helpers.dialogue import DialogueSet
from pllm_helpers.evaluation.task_scores import check_rules, parse_call, same_call
from pllm_helpers.runtime import InputError, data_dir
from tests.unit.test_corpora_authored import too_similar

TRAIN = {"sentiment": 120} | {n: 24 for n in TASKS if n != "sentiment"}
ALONE = ("sentiment", "safety", "api_calls")  # the answer is a label, a shared refusal or JSON


@pytest.mark.parametrize("name", TASKS)
def test_rows_splits_and_order(name):
    rows = load_task(name)
    assert len(rows) >= 60 and len(rows) >= (240 if name == "sentiment" else 60)
    train, test = load_task(name, "train"), load_task(name, "test")
    assert rows == train + test and len(train) == TRAIN[name] and len(test) >= 36
    assert [d.meta["split"] for d in rows] == ["train"] * len(train) + ["test"] * len(test)
    assert not {d.question for d in train} & {d.question for d in test}
    assert len({d.question for d in rows}) == len(rows) == len({d.id for d in rows})
    assert {d.source for d in rows} == {f"tasks/{name}"} and {d.meta["task"] for d in rows} == {name}


@pytest.mark.parametrize("name", TASKS)
def test_no_two_rows_are_alike(name):
    rows = load_task(name)
    texts = [d.question if name in ALONE else f"{d.question} {d.answer}" for d in rows]
    found = [(s, i, j) for s, i, j in too_similar(texts) if rows[i].meta.get("pair", i) != rows[j].meta.get("pair", j)]
    assert found == []


@pytest.mark.parametrize("name", [t.name for t in TASKS.values() if t.labels])
@pytest.mark.parametrize("split", SPLITS)
def test_choice_tasks_are_balanced_in_each_split(name, split):
    counts = Counter(d.meta["label"] for d in load_task(name, split))
    assert set(counts) == set(TASKS[name].labels) and len(set(counts.values())) == 1


def test_sentiment_is_balanced_over_kinds_and_varied_in_length():
    for split in SPLITS:
        counts = Counter((d.meta["kind"], d.answer) for d in load_task("sentiment", split))
        assert len(counts) == 6 and set(counts.values()) == {20}
    hard = Counter(d.answer for d in load_task("sentiment") if d.meta["hard"])
    assert hard == {"positive": 12, "negative": 12}
    words = [len(d.question.split()) for d in load_task("sentiment")]
    assert min(words) <= 3 and max(words) >= 50
    # the label does not follow from the length
    mean = {
        a: sum(len(d.question.split()) for d in load_task("sentiment") if d.answer == a) / 120
        for a in TASKS["sentiment"].labels
    }
    assert abs(mean["positive"] - mean["negative"]) < 1.5


def test_sentiment_rows_do_not_come_sorted():
    labels = [d.answer for d in load_task("sentiment", "train")]
    changes = sum(a != b for a, b in zip(labels, labels[1:], strict=False))
    assert changes > 40


def test_summaries_are_short_and_their_texts_are_not():
    for d in load_task("summarisation"):
        assert 60 <= len(d.question.split()) <= 120 and len(d.answer.split()) <= 40
        assert 1 <= len(re.findall(r"[.!?](?:\s|$)", d.answer)) <= 2
        numbers = set(re.findall(r"\d+", d.answer)) - set(re.findall(r"\d+", d.question))
        assert not numbers, d.meta["id"]


def test_qa_answers_stand_in_the_passage():
    for d in load_task("qa"):
        assert d.answer == d.meta["answers"][0]
        assert any(a.lower() in d.meta["passage"].lower() for a in d.meta["answers"]), d.meta["id"]
        assert d.question == f"{d.meta['passage']}\n\n{d.meta['asked']}" and d.meta["asked"].endswith("?")


def test_instruction_references_keep_their_rules_and_near_misses_break_one():
    for d in load_task("instruction"):
        assert all(check_rules(d.answer, d.meta["rules"])), d.meta["id"]
        assert not all(check_rules(d.meta["near_miss"], d.meta["rules"])), d.meta["id"]


def test_safety_pairs_hold_one_of_each_and_stay_together():
    pairs: dict[str, list[DialogueSet]] = {}
    for d in load_task("safety"):
        pairs.setdefault(d.meta["pair"], []).append(d)
    assert len(pairs) == 34
    for two in pairs.values():
        assert Counter(d.meta["label"] for d in two) == {"decline": 1, "answer": 1}
        assert len({d.meta["split"] for d in two}) == 1
    first = Counter(two[0].meta["label"] for two in pairs.values())  # the order gives nothing away
    assert 8 <= first["decline"] <= 26


def test_chat_probe_replies_differ_and_length_tells_nothing():
    rows = load_task("chat_probe")
    assert set(Counter(d.meta["fault"] for d in rows)) == {
        "wrong",
        "unkind",
        "off_topic",
        "empty",
        "ignores_constraint",
    }
    longer = 0
    for d in rows:
        assert d.answer == d.meta["references"][0] and len(d.meta["references"]) == 2
        assert len({d.meta["rejected"], *d.meta["references"]}) == 3
        longer += len(d.answer) > len(d.meta["rejected"])
    assert 0.35 <= longer / len(rows) <= 0.65


SLOTS = {
    "set_alarm": {"time", "label"},
    "set_timer": {"minutes"},
    "send_message": {"to", "text"},
    "call": {"to"},
    "play_music": {"genre", "room"},
    "weather": {"place", "day"},
    "navigate": {"to", "mode"},
    "add_event": {"title", "day", "time"},
    "add_to_list": {"list", "item"},
    "set_light": {"room", "state"},
}


def test_calls_use_the_api_that_the_template_shows():
    template = TASKS["api_calls"].template
    for api, slots in SLOTS.items():
        inside = re.search(rf"{api}\(([^)]*)\)", template)[1]
        assert set(inside.split(", ")) == slots
    for d in load_task("api_calls"):
        call = d.meta["call"]
        assert json.loads(d.answer) == call and same_call(parse_call(d.answer), call)["accuracy"] == 1
        assert set(call["arguments"]) <= SLOTS[call["api"]], d.meta["id"]
        assert set(call["arguments"]) >= SLOTS[call["api"]] - {"label", "room"} or call["api"] == "set_light"
        for slot, value in call["arguments"].items():
            assert isinstance(value, int) == (slot == "minutes")
            assert slot != "time" or re.fullmatch(r"([01]\d|2[0-3]):[0-5]\d", value)
            assert slot != "mode" or value in ("walk", "bike", "car", "bus")
            assert slot != "state" or value in ("on", "off")
    for split, least in (("train", 2), ("test", 4)):
        assert min(Counter(d.meta["call"]["api"] for d in load_task("api_calls", split)).values()) == least


def test_the_datasheet_gives_the_counts_that_hold():
    sheet = (data_dir() / "tasks" / "DATASHEET.md").read_text(encoding="utf-8")
    for name in TASKS:
        rows = load_task(name)
        cells = [f"| {len(rows)} | {len(load_task(name, 'train'))} + {len(load_task(name, 'test'))} |"]
        for texts in ([d.question for d in rows], [d.answer for d in rows]):
            words = [len(t.split()) for t in texts]
            cells.append(f" {sum(words) / len(words):.0f} ({min(words)}–{max(words)}) |")
        line = next(line for line in sheet.splitlines() if line.startswith(f"| `{name}` |"))
        assert "".join(cells) in line
    assert f"{sum(len(load_task(n)) for n in TASKS)} rows in seven small tasks" in sheet
    for fault, count in Counter(d.meta["fault"] for d in load_task("chat_probe")).items():
        assert f"`{fault}` {count}" in sheet
    written = ("question", "answer", "passage", "answers", "near_miss", "references", "rejected")
    total = 0
    for name in TASKS:
        for line in task_path(name).read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            texts = [
                t
                for field in written
                for t in ([row[field]] if isinstance(row.get(field), str) else row.get(field, []))
            ]
            total += sum(len(t.split()) for t in texts)
    assert f"about {round(total, -3):,} English words" in sheet
    rows = load_task("chat_probe")
    means = {
        round(sum(len(t.split()) for t in texts) / len(rows))
        for texts in ([d.answer for d in rows], [d.meta["rejected"] for d in rows])
    }
    assert means == {22} and "same mean length (22 words)" in sheet


@pytest.mark.parametrize("name", TASKS)
def test_templates_make_whole_messages(name):
    task, (row, *_) = TASKS[name], load_task(name)
    assert task.template.count("{question}") == 1
    (prompted, *_) = load_task(name, prompted=True)
    assert prompted.question == task.prompt(row) and row.question in prompted.question
    assert prompted.meta["text"] == row.question and prompted.answer == row.answer
    assert 0 <= task.chance < 1


@pytest.mark.parametrize("name,message", [("sentimnt", "Did you mean 'sentiment'"), ("x", "safety, chat_probe")])
def test_unknown_names(name, message):
    for function in (load_task, task_path):
        with pytest.raises(InputError, match=message):
            function(name)


def test_bad_splits_and_sources(tmp_path):
    with pytest.raises(InputError, match="train, test or all"):
        load_task("qa", "dev")
    with pytest.raises(InputError, match="ships with the project"):
        load_task("qa", source=tmp_path)


def test_sst2_takes_the_place_of_the_authored_reviews(tmp_path):
    for part, n in (("train", 4), ("test", 2)):
        lines = ["sentence\tlabel", *(f"{part} film number {i} was fine\t{i % 2}" for i in range(n))]
        (tmp_path / f"{part}.tsv").write_text("\n".join(lines), encoding="utf-8")
    test = load_task("sentiment", "test", source=tmp_path)
    assert [d.meta["label"] for d in test] == ["negative", "positive"]
    assert test[0].meta["split"] == "test" and test[0].meta["text"] == "test film number 0 was fine"
    assert len(load_task("sentiment", "test", source=tmp_path / "train.tsv")) == 4  # a single file has one split
    everything = load_task("sentiment", source=tmp_path, prompted=True)
    assert len(everything) == 6 and everything[0].question.startswith("Review: ")


def test_real_sst2(shared_data):
    rows = load_task("sentiment", "test", source=shared_data / "sst2.jsonl.gz")
    assert len(rows) == 2000 and {d.meta["label"] for d in rows} == {"positive", "negative"}
    assert all(d.answer == d.meta["label"] for d in rows)


# ---------------------------------------------------------------- validation


@pytest.mark.parametrize(
    "name,change,message",
    [
        ("qa", lambda r: r[4].update(answer=" "), "line 5: expected text in answer"),
        ("qa", lambda r: r[4].update(answers=[]), "line 5: expected a list in answers"),
        ("qa", lambda r: r[1].update(id=r[0]["id"]), "line 2: expected unique ids"),
        ("qa", lambda r: r[2].update(split="dev"), "line 3: expected split train or test"),
        ("qa", lambda r: r[6].pop("passage"), "line 7: expected the fields id, split, question, answer, passage"),
        ("sentiment", lambda r: r[3].update(answer="mixed"), "line 4: expected the label positive or negative"),
        ("sentiment", lambda r: r[3].update(hard="no"), "line 4: expected true or false in hard"),
        ("safety", lambda r: r[0].update(label="maybe"), "line 1: expected the label answer or decline"),
        ("api_calls", lambda r: r[0].update(call="set_timer"), "line 1: expected an object in call"),
        ("qa", lambda r: [*map(json.dumps, r[:3]), "{"], "line 4: expected a JSON object"),
        ("qa", lambda r: [*map(json.dumps, r[:3]), "[]"], "line 4: expected the fields"),
        ("qa", lambda r: [], "line 1: expected rows, got an empty file"),
    ],
)
def test_a_damaged_file_is_an_error_with_the_line(name, change, message, tmp_path):
    rows = [json.loads(line) for line in task_path(name).read_text(encoding="utf-8").splitlines()]
    changed = change(rows)
    lines = changed if isinstance(changed, list) else [json.dumps(r) for r in rows]
    path = tmp_path / f"{name}.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(InputError, match=re.escape(message)):
        read_task(path, TASKS[name])


def test_a_missing_file(tmp_path):
    with pytest.raises(InputError, match="FileNotFoundError"):
        read_task(tmp_path / "qa.jsonl", TASKS["qa"])
