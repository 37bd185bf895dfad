"""load_dialogues: names, sources, layouts, reports. Real files where the shared test data are there."""

import csv
import gzip
import json
import re
import subprocess
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from pllm_helpers.corpora import DATASETS, FAMILIES, LoadedDialogues, NoDialogues, authored_dialogues, load_dialogues
from pllm_helpers.dialogue import DialogueSet
from pllm_helpers.runtime import InputError, data_dir

MIRRORS = dict(
    zip(DATASETS, ("instruction", "open_qa", "prosocial", "empathetic", "reasoning", "medical"), strict=False)
)

# two rows of each data set in its own field names (written here)
ROWS = {
    "alpaca": [
        {"instruction": "Name a colour.", "input": "", "output": "Teal."},
        {"instruction": "Shorten this.", "input": "It is, so to speak, raining", "output": "It rains, “so”."},
    ],
    "dolly": [
        {"instruction": "Who wrote it?", "context": "The letter is Ann's.", "response": "Ann.", "category": "qa"},
        {"instruction": "List two nuts", "context": "", "response": "Hazel\nWalnut", "category": "brainstorming"},
    ],
    "prosocial": [
        {"context": "I skipped the queue.", "response": "Others waited.", "rots": ["Wait."], "safety_label": "casual"},
        {"context": "So what?", "response": "It is unfair, \"really\".", "rots": [], "safety_label": "__casual__"},
    ],
    "openorca": [
        {"id": "flan.1", "system_prompt": "Be brief.", "question": "2+2?", "response": "4"},
        {"id": "cot.2", "system_prompt": "", "question": "Why, though?", "response": "Two and two."},
    ],
    "sst2": [{"sentence": "a joy ", "label": 1}, {"sentence": "no , thanks", "label": 0}],
}  # fmt: skip
EXPECTED = {
    "alpaca": [("Name a colour.", "Teal."), ("Shorten this.\n\nIt is, so to speak, raining", "It rains, “so”.")],
    "dolly": [("Who wrote it?\n\nThe letter is Ann's.", "Ann."), ("List two nuts", "Hazel\nWalnut")],
    "prosocial": [("I skipped the queue.", "Others waited."), ("So what?", 'It is unfair, "really".')],
    "openorca": [("2+2?", "4"), ("Why, though?", "Two and two.")],
    "sst2": [("a joy", "positive"), ("no , thanks", "negative")],
}


def texts(dialogues):
    return [(d.question, d.answer) for d in dialogues]


def write(path: Path, rows: list[dict]) -> Path:
    """Rows in the layout that the suffix names."""
    kind = path.name.removesuffix(".gz").rsplit(".", 1)[1]
    if kind == "json":
        text = json.dumps(rows, indent=1, ensure_ascii=False)
    elif kind == "jsonl":
        text = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows)
    elif kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        return path
    else:
        temporary = path.with_name("table")
        with temporary.open("w", newline="", encoding="utf-8") as stream:
            table = csv.DictWriter(stream, list(rows[0]), delimiter="\t" if kind == "tsv" else ",")
            table.writeheader()
            table.writerows(rows)
        text = temporary.read_text(encoding="utf-8")
        temporary.unlink()
    (gzip.open if path.name.endswith(".gz") else open)(path, "wb").write(text.encode())
    return path


# ---------------------------------------------------------------- names and the offline stand-ins


@pytest.mark.parametrize("name,family", MIRRORS.items())
def test_without_a_source_the_authored_mirror_stands_in_and_says_so(name, family):
    loaded = load_dialogues(name)
    assert tuple(loaded) == authored_dialogues(family)
    assert loaded.source == f"authored/{family}" and loaded.name == name
    assert any(name in note and "stands in" in note for note in loaded.report.notes)


@pytest.mark.parametrize("family", FAMILIES)
def test_families_are_names_too(family):
    assert tuple(load_dialogues(family)) == authored_dialogues(family)


def test_authored_is_all_families():
    loaded = load_dialogues("authored")
    assert tuple(loaded) == authored_dialogues() and loaded.report.notes == ()


@pytest.mark.parametrize("name,guess", [("alpca", "alpaca"), ("Empathetic", "empathetic"), ("med_dialog", "meddialog")])
def test_an_unknown_name_shows_the_close_ones(name, guess):
    with pytest.raises(InputError, match=f"Did you mean .*'{guess}'"):
        load_dialogues(name)


def test_sst2_has_no_stand_in():
    with pytest.raises(InputError, match='load_dialogues.*"hub", allow_download=True'):
        load_dialogues("sst2")


def test_uniform_needs_a_path():
    with pytest.raises(InputError, match="Pass a path"):
        load_dialogues("uniform")


# ---------------------------------------------------------------- the result


def test_loaded_dialogues_are_a_sequence(tmp_path):
    loaded = load_dialogues("alpaca", write(tmp_path / "a.json", ROWS["alpaca"]))
    assert isinstance(loaded, LoadedDialogues) and len(loaded) == 2
    assert loaded[-1] is loaded[1] and loaded[:1] == (loaded[0],) and loaded[0] in loaded
    assert all(isinstance(d, DialogueSet) for d in loaded)
    assert loaded[0].meta == {"row": 1} and loaded[0].source == loaded[0].user == "alpaca" and loaded[0].time is None
    assert loaded.report.read == loaded.report.kept == loaded.report.used == 2
    assert loaded.report.dropped == () and loaded.report.complete
    assert repr(loaded) == f"LoadedDialogues('alpaca', 2 dialogue sets from {tmp_path / 'a.json'})"


@pytest.mark.parametrize("suffix", ["json", "jsonl", "csv", "parquet", "json.gz", "jsonl.gz", "csv.gz", "tsv"])
@pytest.mark.parametrize("name", ROWS)
def test_every_container_gives_the_same_dialogues(name, suffix, tmp_path):
    if (name, suffix) == ("prosocial", "parquet"):
        rows = [{k: v for k, v in r.items() if k != "rots"} for r in ROWS[name]]
    else:
        rows = ROWS[name]
    loaded = load_dialogues(name, write(tmp_path / f"rows.{suffix}", rows))
    assert texts(loaded) == EXPECTED[name]


def test_columns_and_wrapped_rows_are_unpacked(tmp_path):
    rows = ROWS["openorca"]
    (tmp_path / "columns.json").write_text(json.dumps({k: [r[k] for r in rows] for k in rows[0]}), encoding="utf-8")
    wrapped = {"rows": [{"row_idx": i, "row": r} for i, r in enumerate(rows)]}
    (tmp_path / "viewer.json").write_text(json.dumps(wrapped, indent=2), encoding="utf-8")
    for file in ("columns.json", "viewer.json"):
        assert texts(load_dialogues("openorca", tmp_path / file)) == EXPECTED["openorca"]


def test_json_lines_under_the_suffix_json(tmp_path):
    """The Hub's ProsocialDialog files are such."""
    path = write(tmp_path / "train.jsonl", ROWS["prosocial"]).rename(tmp_path / "train.json")
    assert texts(load_dialogues("prosocial", path)) == EXPECTED["prosocial"]


def test_labels_go_to_meta(tmp_path):
    orca = load_dialogues("openorca", write(tmp_path / "o.jsonl", ROWS["openorca"]))[0]
    assert orca.meta == {"id": "flan.1", "system": "Be brief.", "row": 1}
    assert load_dialogues("dolly", write(tmp_path / "d.jsonl", ROWS["dolly"]))[0].meta["category"] == "qa"
    assert load_dialogues("sst2", write(tmp_path / "s.jsonl", ROWS["sst2"]))[1].meta == {"row": 2, "label": 0}
    assert load_dialogues("prosocial", write(tmp_path / "p.jsonl", ROWS["prosocial"]))[0].meta["rots"] == ["Wait."]


@pytest.mark.parametrize("filler", ["<noinput>", "No input", "no input required.", "<no input>", "Noinput", "N/A"])
def test_alpacas_words_for_no_input_are_not_part_of_the_question(filler, tmp_path):
    rows = [{"instruction": "Name a colour.", "input": filler, "output": "Teal."}]
    assert load_dialogues("alpaca", write(tmp_path / "a.json", rows))[0].question == "Name a colour."


def test_an_input_that_only_starts_like_that_is_kept(tmp_path):
    rows = [{"instruction": "Rewrite.", "input": "No input device was found.", "output": "Nothing to type on."}]
    assert load_dialogues("alpaca", write(tmp_path / "a.json", rows))[0].question.endswith("No input device was found.")


# ---------------------------------------------------------------- rows that cannot be used


def test_dropped_rows_are_named_with_the_reason(tmp_path):
    good = ROWS["alpaca"]
    lines = [
        json.dumps(good[0]),
        '{"instruction": "Cut off", "input": "", "out',
        json.dumps({"instruction": "No reply", "input": "", "output": "  "}),
        "",
        json.dumps({"instruction": 7, "input": "", "output": "Seven."}),
        json.dumps({"instruction": "", "input": "", "output": "To what?"}),
        json.dumps({"question": "other", "reply": "layout"}),
        json.dumps({"instruction": "Lone \ud83d surrogate", "input": "", "output": "x"}),
        json.dumps(["a", "list"]),
        json.dumps({"instruction": "Placeholder", "input": "", "output": "<nooutput>"}),
        json.dumps(good[1]),
    ]
    path = tmp_path / "bad.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    loaded = load_dialogues("alpaca", path)
    assert texts(loaded) == EXPECTED["alpaca"] and [d.meta["row"] for d in loaded] == [1, 11]
    assert {d.row: d.reason for d in loaded.report.dropped} == {
        2: "not valid JSON: Unterminated string starting at",
        3: "no reply: output is blank",
        5: "instruction is not text but int",
        6: "instruction is blank",
        7: "expected the fields instruction, input, output, got the fields question, reply",
        8: "instruction is not valid UTF-8",
        9: "expected the fields instruction, input, output, got a list",
        10: "no reply: it says <nooutput>",
    }
    assert {d.file for d in loaded.report.dropped} == {"bad.jsonl"}
    assert (loaded.report.read, loaded.report.used, loaded.report.kept) == (10, 2, 2)
    text = str(loaded.report)
    assert (
        "10 rows read, 2 dialogue sets kept, 8 rows dropped" in text and "1 × no reply: output is blank (row 3)" in text
    )
    assert repr(loaded).endswith("8 of 10 rows dropped)")


def test_bytes_that_are_not_utf8_cost_one_row(tmp_path):
    path = tmp_path / "a.jsonl"
    rows = [json.dumps(r).encode() for r in ROWS["alpaca"]]
    path.write_bytes(rows[0] + b'\n{"instruction": "caf\xe9?", "output": "coffee"}\n' + rows[1] + b"\n")
    loaded = load_dialogues("alpaca", path)
    assert len(loaded) == 2
    assert [(d.row, d.reason) for d in loaded.report.dropped] == [(2, "instruction is not valid UTF-8")]


def test_a_byte_order_mark_is_no_fault(tmp_path):
    for suffix in ("json", "jsonl", "csv"):
        path = write(tmp_path / f"a.{suffix}", ROWS["alpaca"])
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
        assert texts(load_dialogues("alpaca", path)) == EXPECTED["alpaca"]


def test_a_broken_element_of_a_json_list_costs_only_itself(tmp_path):
    good = [json.dumps(r) for r in ROWS["alpaca"]]
    path = tmp_path / "a.json"
    path.write_text(f'[{good[0]}, {{"instruction": "a "quote" inside", "output": "x"}}, {good[1]}]', encoding="utf-8")
    loaded = load_dialogues("alpaca", path)
    assert texts(loaded) == EXPECTED["alpaca"]
    assert [(d.row, d.reason) for d in loaded.report.dropped] == [(2, "not valid JSON: Expecting ',' delimiter")]


@pytest.mark.parametrize("suffix", ["json", "jsonl.gz"])
def test_a_file_that_breaks_off_gives_what_it_has(suffix, tmp_path):
    rows = [{"instruction": f"Question {i}", "input": "", "output": f"Answer {i * 7919}"} for i in range(3000)]
    path = write(tmp_path / f"a.{suffix}", rows)
    path.write_bytes(path.read_bytes()[:-500])
    loaded = load_dialogues("alpaca", path)
    assert 0 < len(loaded) < 3000 and loaded[100].answer == f"Answer {100 * 7919}"
    (last,) = loaded.report.dropped[-1:]
    assert last.row > len(loaded) and re.search("not valid JSON|breaks off|ends before", last.reason)


def test_an_open_quotation_mark_in_csv_costs_one_row(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('instruction,input,output\nOne?,,1\n"Two?,,2\nThree?,,3\n"Four,\nor more?",,4\n', encoding="utf-8")
    loaded = load_dialogues("alpaca", path)
    assert texts(loaded) == [("One?", "1"), ("Three?", "3"), ("Four,\nor more?", "4")]
    assert [d.row for d in loaded.report.dropped] == [3]


def test_rows_with_too_few_cells_are_reported(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("instruction,input,output\nOne?,,1\nTwo?\n\nThree?,,3,extra\nFour?,,4\n", encoding="utf-8")
    loaded = load_dialogues("alpaca", path)
    assert texts(loaded) == [("One?", "1"), ("Four?", "4")]
    assert [(d.row, d.reason) for d in loaded.report.dropped] == [
        (3, "1 cells in a row, the header has 3"),
        (5, "4 cells in a row, the header has 3"),
    ]


# ---------------------------------------------------------------- files that cannot be used


@pytest.mark.parametrize("content", [b"", b"\n \n", b"\xef\xbb\xbf", b"[]", b"{}", b"[\n]\n"])
@pytest.mark.parametrize("name", ["alpaca", "prosocial", "empathetic", "meddialog", "uniform"])
def test_empty_files_are_an_error(name, content, tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(InputError, match=re.escape(str(path))):
        load_dialogues(name, path)


def test_an_empty_gzip_and_a_table_of_a_header_are_errors(tmp_path):
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b""))
    (tmp_path / "a.csv").write_text("instruction,input,output\n", encoding="utf-8")
    for file in ("a.jsonl.gz", "a.csv"):
        with pytest.raises(InputError, match="empty file|no rows at all"):
            load_dialogues("alpaca", tmp_path / file)


@pytest.mark.parametrize("name", DATASETS)
@pytest.mark.parametrize("other", ROWS)
def test_another_data_sets_file_is_an_error(name, other, tmp_path):
    path = write(tmp_path / "a.json", ROWS[other])
    if name == other:
        assert len(load_dialogues(name, path)) == 2
    else:
        with pytest.raises(InputError, match="expected the fields .* got the fields"):
            load_dialogues(name, path)


@pytest.mark.parametrize(
    "file,content,message",
    [
        ("a.json", b"not json at all", "expected one of JSON"),
        ("a.txt", b"id=1\nPatient:\nhello\nDoctor:\nhi", "expected one of JSON"),
        ("a.csv", b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR", "binary file"),
        ("a.json", "[{}]".encode("utf-16"), "UTF-16"),
        ("a.parquet", b"PAR1 but not really", "whole parquet file"),
        ("a.jsonl", b"nonsense\nmore nonsense\n", r"rows with instruction, input, output, got none \(not valid JSON"),
        ("a.jsonl.gz", gzip.compress(b'{"instruction": "x"}')[:12], "expected a readable file"),
        ("a.json", b'"just a string"', "expected one of JSON"),
        ("a.json", b"[" * 100_000, "nested too deeply"),
    ],
)  # fmt: skip
def test_wrong_formats_are_errors(file, content, message, tmp_path):
    (tmp_path / file).write_bytes(content)
    with pytest.raises(InputError, match=message):
        load_dialogues("alpaca", tmp_path / file)


def test_text_without_records_is_not_meddialog(tmp_path):
    (tmp_path / "a.txt").write_text("Patient:\nhello\nDoctor:\nhi\n", encoding="utf-8")
    with pytest.raises(InputError, match='"id='):
        load_dialogues("meddialog", tmp_path / "a.txt")


def test_a_giant_wrong_file_is_not_read_to_its_end(tmp_path):
    path = write(tmp_path / "a.jsonl", ROWS["sst2"] * 5000)
    path.write_bytes(path.read_bytes() + b"\xff" * 10)
    with pytest.raises(InputError, match="got the fields sentence, label"):
        load_dialogues("alpaca", path)


@pytest.mark.parametrize(
    "source,message", [("no/such/file.json", "there is none at no/such/file.json"), ("", "blank"), ("hub ", "none at")]
)
def test_missing_paths_are_errors(source, message):
    with pytest.raises(InputError, match=message):
        load_dialogues("alpaca", source)


def test_a_misspelt_file_shows_the_close_one(tmp_path):
    write(tmp_path / "alpaca_data.json", ROWS["alpaca"])
    with pytest.raises(InputError, match="Is it 'alpaca_data.json'"):
        load_dialogues("alpaca", tmp_path / "alpaca-data.json")


# ---------------------------------------------------------------- options


def test_limit_ends_the_reading(tmp_path):
    path = write(tmp_path / "a.jsonl", ROWS["alpaca"] * 50)
    path.write_bytes(path.read_bytes() + b"rubbish\n")
    loaded = load_dialogues("alpaca", path, limit=3)
    assert len(loaded) == 3 and not loaded.report.complete and loaded.report.dropped == ()
    assert "stopped at the limit" in str(loaded.report)
    assert load_dialogues("alpaca", limit=64).report.complete


def test_limit_counts_over_the_files_of_a_folder(tmp_path):
    for name in "abc":
        write(tmp_path / f"{name}.json", ROWS["alpaca"])
    loaded = load_dialogues("alpaca", tmp_path, limit=4)
    assert len(loaded) == 4 and not loaded.report.complete and loaded.report.files == ("a.json", "b.json")


@pytest.mark.parametrize("limit", [0, -1, True])
def test_bad_limits(limit):
    with pytest.raises(InputError, match="limit"):
        load_dialogues("alpaca", limit=limit)


def test_folders_are_read_in_the_order_of_names_and_by_split(tmp_path):
    (tmp_path / "deep").mkdir()
    for file, answer in [("train-2.json", "second"), ("train-1.jsonl", "first"), ("deep/valid.csv", "third")]:
        write(tmp_path / file, [{"instruction": "Which?", "input": "", "output": answer}])
    (tmp_path / "README.md").write_text("about", encoding="utf-8")
    (tmp_path / ".cache.json").write_text("{", encoding="utf-8")
    answers = lambda **options: [d.answer for d in load_dialogues("alpaca", tmp_path, **options)]  # noqa: E731
    assert answers() == ["third", "first", "second"]
    assert answers(split="train") == ["first", "second"]
    assert answers(split="dev") == answers(split="validation") == ["third"]
    with pytest.raises(InputError, match="'test' in its name, found deep/valid.csv"):
        answers(split="test")


def test_a_stray_file_in_a_folder_is_noted(tmp_path):
    write(tmp_path / "a.json", ROWS["alpaca"])
    write(tmp_path / "b.json", ROWS["sst2"])
    loaded = load_dialogues("alpaca", tmp_path)
    assert len(loaded) == 2 and loaded.report.files == ("a.json",) and loaded.report.dropped == ()
    assert "file left out" in loaded.report.notes[0] and "b.json" in loaded.report.notes[0]


def test_a_folder_without_data_is_an_error(tmp_path):
    (tmp_path / "notes.md").write_text("x", encoding="utf-8")
    with pytest.raises(InputError, match="found none"):
        load_dialogues("alpaca", tmp_path)


def test_split_and_revision_only_where_they_mean_something(tmp_path):
    path = write(tmp_path / "a.json", ROWS["alpaca"])
    for options, message in [({"split": "train"}, "single file"), ({"revision": "main"}, "revision")]:
        with pytest.raises(InputError, match=message):
            load_dialogues("alpaca", path, **options)
    with pytest.raises(InputError, match="no splits"):
        load_dialogues("alpaca", split="train")


def test_keep_unanswered_keeps_questions_only(tmp_path):
    rows = [
        *ROWS["alpaca"],
        {"instruction": "Unanswered?", "input": "", "output": ""},
        {"instruction": "", "output": ""},
    ]
    path = write(tmp_path / "a.jsonl", rows)
    loaded = load_dialogues("alpaca", path, keep_unanswered=True)
    assert texts(loaded) == [*EXPECTED["alpaca"], ("Unanswered?", "")]
    assert [d.row for d in loaded.report.dropped] == [4]


# ---------------------------------------------------------------- dialogues over several turns


def test_prosocial_labels_are_no_replies(tmp_path):
    rows = [
        {"context": "I lied.", "response": "__needs_caution__", "safety_label": "__needs_caution__"},
        {"context": "I stole.", "safety_label": "needs intervention"},
        {"context": "I ran.", "response": "Casual"},
        {"context": "I sang.", "response": "A casual remark is fine; this needs caution, though."},
    ]
    path = write(tmp_path / "p.jsonl", rows)
    loaded = load_dialogues("prosocial", path)
    assert [d.question for d in loaded] == ["I sang."]
    assert loaded.report.reasons == {"no reply: only a safety label": 3}
    questions = load_dialogues("prosocial", path, keep_unanswered=True)
    assert [d.answer for d in questions] == ["", "", "", rows[3]["response"]]


def test_nothing_but_labels_is_an_error_that_carries_its_report(tmp_path):
    path = write(tmp_path / "p.jsonl", [{"context": "I lied.", "safety_label": "casual"}] * 3)
    with pytest.raises(
        NoDialogues, match="all 3 rows were dropped: 3 × no reply: only a safety label.*keep_unanswered"
    ) as caught:
        load_dialogues("prosocial", path)
    assert caught.value.report.read == 3 and [d.row for d in caught.value.report.dropped] == [1, 2, 3]


def test_context_turns_put_the_dialogue_so_far_in_front(tmp_path):
    rows = [{**r, "dialogue_id": 0, "response_id": i} for i, r in enumerate(ROWS["prosocial"])]
    rows.append({**rows[0], "dialogue_id": 1})
    loaded = load_dialogues("prosocial", write(tmp_path / "p.jsonl", rows), context_turns=5)
    assert [d.question for d in loaded] == [
        "I skipped the queue.",
        "user: I skipped the queue.\nassistant: Others waited.\nuser: So what?",
        "I skipped the queue.",
    ]
    assert (
        load_dialogues("prosocial", tmp_path / "p.jsonl", context_turns=1)[1].question
        == "assistant: Others waited.\nuser: So what?"
    )


EMPATHETIC = """conv_id,utterance_idx,context,prompt,speaker_idx,utterance,selfeval,tags
hit:0_conv:1,1,proud,I won_comma_ finally.,10,I won_comma_ "at last"!,5|5|5_2|2|5,
hit:0_conv:1,2,proud,I won_comma_ finally.,11,Well done_comma_ truly.,5|5|5_2|2|5,
hit:0_conv:1,3,proud,I won_comma_ finally.,10,Thanks.,5|5|5_2|2|5,
hit:0_conv:2,1,sad,Rain.,12,It rains.,,
hit:0_conv:2,2,sad,Rain.,12,And rains.,,
hit:0_conv:2,3,sad,Rain.,13,Oh no.,,
hit:0_conv:3,x,sad,Rain.,13,Lost row,,
hit:0_conv:4,2,sad,Rain.,14,An answer without a question,,
hit:0_conv:5,1,glad,Sun.,15,Sun!
hit:0_conv:5,2,glad,Sun.,16,Yes!,5
"""


def test_empathetic_dialogues_are_put_together_from_utterances(tmp_path):
    path = tmp_path / "train.csv"
    path.write_text(EMPATHETIC, encoding="utf-8")
    loaded = load_dialogues("empathetic", path)
    assert texts(loaded) == [
        ('I won, "at last"!', "Well done, truly."),
        ("It rains.\nAnd rains.", "Oh no."),
        ("Sun!", "Yes!"),
    ]
    assert loaded[0].meta == {
        "emotion": "proud",
        "situation": "I won, finally.",
        "conversation": "hit:0_conv:1",
        "row": 3,
    }
    assert {d.row: d.reason for d in loaded.report.dropped} == {
        4: "no reply: the listener does not answer",
        8: "utterance_idx is not a number",
        9: "no speaker's turn before it",
    }
    assert loaded.report.read == loaded.report.used + 3 == 10


def test_empathetic_dialogues_saved_again_with_quotes(tmp_path):
    rows = list(csv.reader(EMPATHETIC.splitlines()[:4], quoting=csv.QUOTE_NONE))
    again = tmp_path / "again.csv"
    with again.open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream, quoting=csv.QUOTE_ALL).writerows([[c.replace("_comma_", ",") for c in r] for r in rows])
    assert texts(load_dialogues("empathetic", again)) == [('I won, "at last"!', "Well done, truly.")]


MEDDIALOG = """id=0
https://example.org/1

Description
Does it hurt?

Dialogue
Patient:
It hurts.

Here: in the knee.
Doctor:
Rest it.
 Take care.
Patient: Thanks. How long?
Doctor: Two weeks.

id=1
https://example.org/2
Description
Nobody answers.
Dialogue
Patient:
Hello?

id=2
https://example.org/3
Description
Torn record.
"""


def test_meddialog_raw_text(tmp_path):
    path = tmp_path / "raw.txt"
    path.write_text(MEDDIALOG, encoding="utf-8")
    loaded = load_dialogues("meddialog", path)
    assert texts(loaded) == [
        ("It hurts.\nHere: in the knee.", "Rest it.\nTake care."),
        ("Thanks. How long?", "Two weeks."),
    ]
    assert loaded[0].meta == {"id": "0", "url": "https://example.org/1", "description": "Does it hurt?", "row": 1}
    assert [(d.row, d.reason) for d in loaded.report.dropped] == [
        (18, "no doctor's reply to a patient"),
        (26, "no Patient: or Doctor: line"),
    ]
    assert load_dialogues("meddialog", path, context_turns=2)[1].question.startswith("patient: It hurts.")


@pytest.mark.parametrize(
    "row",
    [
        {"description": "x", "utterances": ["patient: It hurts: here.", "doctor: Rest it."]},
        {"dialogue_id": 0, "dialogue_turns": {"speaker": [0, 1], "utterance": ["It hurts: here.", "Rest it."]}},
        {
            "dialogue_turns": [
                {"speaker": "Patient", "utterance": "It hurts: here."},
                {"speaker": "Doctor", "utterance": "Rest it."},
            ]
        },
        {"src": "Patient: It hurts: here. Doctor: Rest it.", "tgt": "Pain?", "id": 3},
    ],
)  # fmt: skip
def test_meddialog_packagings(row, tmp_path):
    assert texts(load_dialogues("meddialog", write(tmp_path / "m.json", [row]))) == [("It hurts: here.", "Rest it.")]


# ---------------------------------------------------------------- the uniform format


def uniform(source="x", **fields):
    return {"id": "1", "response": "Yes.", "source": source, **fields}


def test_uniform_rows(tmp_path):
    rows = [
        uniform(instruction="Is it?", input="A bee.", system="Be kind.", meta={"topic": "bees"}),
        uniform(
            turns=[{"speaker": "A", "text": "Hi"}, {"speaker": "B", "text": "Hi!"}, {"speaker": "A", "text": "Ok?"}]
        ),
        uniform(instruction=""),
        uniform(turns=[]),
        uniform(turns="Hi"),
    ]
    path = write(tmp_path / "u.jsonl", rows)
    loaded = load_dialogues("uniform", path)
    assert texts(loaded) == [("Is it?\n\nA bee.", "Yes."), ("Ok?", "Yes."), ("", "Yes.")]
    assert loaded[0].meta == {"topic": "bees", "system": "Be kind.", "id": "1", "row": 1} and loaded[0].source == "x"
    assert [d.row for d in loaded.report.dropped] == [4, 5]
    assert load_dialogues("uniform", path, context_turns=9)[1].question == "a: Hi\nb: Hi!\na: Ok?"


def test_a_named_set_takes_only_its_own_uniform_rows(tmp_path):
    path = write(tmp_path / "u.jsonl", [uniform("dolly", instruction="Is it?")])
    assert len(load_dialogues("dolly", path)) == 1
    with pytest.raises(InputError, match="expected rows of alpaca, got rows of dolly"):
        load_dialogues("alpaca", path)


def test_stand_ins_for_meddialog_are_named(tmp_path):
    loaded = load_dialogues("meddialog", write(tmp_path / "u.jsonl", [uniform("medquad", instruction="Is it?")]))
    assert loaded[0].source == "medquad" and "medquad stands in" in loaded.report.notes[0]


def test_meddialog_answers_are_the_doctors(tmp_path):
    turns = [{"speaker": s, "text": t} for s, t in [("patient", "Ow."), ("doctor", "Where?"), ("doctor", "When?")]]
    loaded = load_dialogues("meddialog", write(tmp_path / "u.jsonl", [uniform("mts_dialog", turns=turns)]))
    assert texts(loaded) == [("Ow.", "Where?\nWhen?")]


def test_authored_files_can_be_named_by_path():
    path = data_dir() / "dialogues" / "medical.jsonl"
    for name in ("medical", "authored", "meddialog"):
        assert tuple(load_dialogues(name, path)) == authored_dialogues("medical")
    with pytest.raises(InputError, match="expected rows of alpaca, got rows of medical"):
        load_dialogues("alpaca", path)


# ---------------------------------------------------------------- real files

UNIFORM = {
    "alpaca": "alpaca", "dolly": "dolly", "prosocial_full_tiny": "prosocial", "empathetic_dialogues": "empathetic",
    "openorca": "openorca", "covid_dialogue_en": "meddialog", "mts_dialog": "meddialog", "medquad": "meddialog",
    "chatdoctor5k": "meddialog", "sst2": "sst2",
}  # fmt: skip


def rows_of(path):
    with gzip.open(path, "rt", encoding="utf-8") as stream:
        return [json.loads(line) for line in stream]


@pytest.mark.parametrize("file,name", UNIFORM.items())
def test_real_uniform_files_by_name(file, name, shared_data):
    path = shared_data / f"{file}.jsonl.gz"
    rows, loaded = rows_of(path), load_dialogues(name, path)
    assert loaded.report.read == len(rows) == len(loaded) + len(loaded.report.dropped)
    if file == "mts_dialog":
        assert loaded.report.reasons == {"no doctor's reply to a patient": 156}
        assert all(d.question != d.answer for d in loaded)
        return
    assert [r["response"] for r in rows if r["response"].strip() == "<nooutput>"] == ["<nooutput>"] * len(
        loaded.report.dropped
    )
    for dialogue in loaded:
        row = rows[dialogue.meta["row"] - 1]
        assert dialogue.meta["id"] == row["id"]
        if file != "covid_dialogue_en":  # one of its replies is the patient's
            assert dialogue.answer == row["response"].strip()
        if "turns" not in row:
            assert dialogue.question.startswith(row["instruction"].strip())


def test_every_real_uniform_file(shared_data):
    files = sorted(shared_data.glob("*.jsonl.gz"))
    assert len(files) >= 22
    for path in files:
        loaded = load_dialogues("uniform", path, keep_unanswered=True)
        rows = rows_of(path)
        assert len(loaded) == len(rows), path.name
        assert {d.source for d in loaded} <= {r["source"] for r in rows}


def test_real_safety_labels_are_never_replies(shared_data):
    path = shared_data / "prosocial_contexts.jsonl.gz"
    with pytest.raises(NoDialogues, match="2,000 × no reply: only a safety label"):
        load_dialogues("prosocial", path)
    loaded = load_dialogues("prosocial", path, keep_unanswered=True)
    assert len(loaded) == 2000 and {d.answer for d in loaded} == {""} and all(d.question for d in loaded)


# rows read, dialogue sets
ORIGINAL = {
    ("alpaca", "alpaca/alpaca_data.json"): (20, 20),
    ("dolly", "dolly/databricks-dolly-15k.jsonl"): (20, 20),
    ("empathetic", "empathetic_dialogues/dialogstudio_original_examples.json"): (5, 2),
    ("empathetic", "empathetic_dialogues/hf_dummy/train.csv"): (2, 1),
    ("empathetic", "empathetic_dialogues/hf_dummy/valid.csv"): (2, 1),
    ("empathetic", "empathetic_dialogues/reconstructed_train.csv"): (20, 10),
    ("meddialog", "meddialog/covid_dialogue_english_first20.txt"): (21, 32),
    ("meddialog", "meddialog/hf_dummy_qa_en_1.txt"): (20, 20),
    ("meddialog", "meddialog/hf_dummy_qa_en_2.txt"): (18, 18),
    ("openorca", "openorca/OpenOrca_sample.jsonl"): (20, 20),
    ("prosocial", "prosocial/dialogstudio_original_examples.json"): (5, 5),
    ("prosocial", "prosocial/direct_download_layout.json"): (5, 12),
    ("prosocial", "prosocial/hf_rows.jsonl"): (12, 12),
    ("sst2", "sst2/dev.tsv"): (20, 20),
    ("sst2", "sst2/train.tsv"): (20, 20),
    ("sst2", "sst2/sentence_level_dev.tsv"): (20, 20),
    ("sst2", "sst2/sentence_level_test.tsv"): (20, 20),
    ("sst2", "sst2/sentence_level_train.tsv"): (20, 20),
}


@pytest.mark.parametrize("name,file", ORIGINAL)
def test_real_files_in_their_original_format(name, file, shared_data):
    loaded = load_dialogues(name, shared_data / "original_format" / file)
    assert (loaded.report.read, len(loaded)) == ORIGINAL[name, file]
    assert all(d.question and d.answer and "_comma_" not in d.text for d in loaded)


def test_an_utterance_alone_is_no_dialogue(shared_data):
    with pytest.raises(NoDialogues, match="the listener does not answer"):
        load_dialogues("empathetic", shared_data / "original_format/empathetic_dialogues/hf_dummy/test.csv")


def test_real_files_of_other_data_sets_are_refused(shared_data):
    root = shared_data / "original_format"
    own = {root / file for _, file in ORIGINAL} | {root / "empathetic_dialogues/hf_dummy/test.csv"}
    others = [p for p in sorted(root.rglob("*")) if p.is_file() and p not in own]
    assert len(others) >= 50
    for path in others:
        for name in DATASETS:
            with pytest.raises(InputError):
                load_dialogues(name, path)


def test_both_real_layouts_of_prosocial_hold_the_same(shared_data):
    folder = shared_data / "original_format/prosocial"
    hub, download = (
        load_dialogues("prosocial", folder / f, context_turns=2)
        for f in ("hf_rows.jsonl", "direct_download_layout.json")
    )
    assert texts(hub) == texts(download)
    assert any("\nassistant: " in d.question for d in hub)


def test_a_real_folder_of_empathetic_dialogues_by_split(shared_data):
    folder = shared_data / "original_format/empathetic_dialogues"
    assert load_dialogues("empathetic", folder, split="train").report.files == (
        "hf_dummy/train.csv",
        "reconstructed_train.csv",
    )
    assert load_dialogues("empathetic", folder, split="validation").report.kept == 1


def test_real_meddialog_reads_as_it_stands(shared_data):
    loaded = load_dialogues("meddialog", shared_data / "original_format/meddialog/hf_dummy_qa_en_2.txt")
    assert loaded[0].question.startswith("questions regarding abdominal pressure.")
    assert loaded[0].answer.endswith("Dr. Sujoy Dasgupta")
    assert loaded[0].meta["id"] == "23" and loaded[0].meta["description"].endswith("sitting position?")


def test_the_import_is_light():
    heavy = "'torch', 'pandas', 'pyarrow', 'transformers', 'huggingface_hub', 'chitchat_dataset'"
    code = f"import sys, pllm_helpers.corpora; print([m for m in ({heavy}) if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, encoding="utf-8", check=True)
    assert done.stdout.strip() == "[]"
