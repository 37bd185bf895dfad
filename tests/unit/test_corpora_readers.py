"""Properties of the file readers: nothing good is lost, nothing bad gets through, all of it is accounted for."""

import csv
import io
import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pllm_helpers.corpora import load_dialogues, readers
from pllm_helpers.runtime import InputError

WORDS = st.text(st.characters(codec="utf-8", exclude_characters="\x00"), max_size=30)
SAID = WORDS.filter(lambda s: s.strip() not in ("", "<nooutput>"))
ROWS = st.lists(
    st.fixed_dictionaries({"instruction": SAID, "input": st.just(""), "output": SAID}), min_size=1, max_size=12
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | WORDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=3),
    max_leaves=8,
)
in_folder = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)


@in_folder
@given(
    st.lists(st.dictionaries(WORDS, VALUES, max_size=3), min_size=1, max_size=8),
    st.sampled_from([None, 1, 2]),
    st.booleans(),
    st.integers(1, 40),
)
def test_a_json_list_is_read_as_json_reads_it_however_it_is_cut_into_chunks(tmp_path, rows, indent, ascii_only, chunk):
    path = tmp_path / "a.json"
    path.write_text(json.dumps(rows, indent=indent, ensure_ascii=ascii_only), encoding="utf-8", newline="")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(readers, "_CHUNK", chunk)
        got = list(readers.read_rows(path, "alpaca"))
    assert [r.problem for r in got] == [""] * len(rows)
    assert [r.value for r in got] == rows and [r.number for r in got] == list(range(1, len(rows) + 1))


@in_folder
@given(ROWS, st.data())
def test_broken_lines_cost_exactly_themselves(tmp_path, rows, data):
    lines = [json.dumps(r) for r in rows]
    broken = data.draw(st.sets(st.integers(0, len(lines) - 1), max_size=len(lines) - 1))
    for i in broken:
        lines[i] = lines[i][: data.draw(st.integers(1, len(lines[i]) - 1))]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8", newline="")
    loaded = load_dialogues("alpaca", path)
    assert [(d.meta["row"], d.question, d.answer) for d in loaded] == [
        (i + 1, r["instruction"].strip(), r["output"].strip()) for i, r in enumerate(rows) if i not in broken
    ]
    assert {d.row for d in loaded.report.dropped} == {i + 1 for i in broken}


@in_folder
@given(ROWS, st.sampled_from([",", ";", "\t"]), st.sampled_from(["\n", "\r\n"]))
def test_tables_come_back_as_they_were_written(tmp_path, rows, delimiter, ending):
    written = io.StringIO(newline="")
    table = csv.DictWriter(
        written, ["instruction", "input", "output"], delimiter=delimiter, lineterminator=ending, quoting=csv.QUOTE_ALL
    )
    table.writeheader()
    table.writerows(rows)
    path = tmp_path / ("a.tsv" if delimiter == "\t" else "a.csv")
    path.write_text(written.getvalue(), encoding="utf-8", newline="")
    loaded = load_dialogues("alpaca", path)
    assert [(d.question, d.answer) for d in loaded] == [(r["instruction"].strip(), r["output"].strip()) for r in rows]
    assert loaded.report.dropped == ()


UTTERANCES = st.lists(
    st.tuples(
        st.integers(1, 3), st.integers(1, 6), st.integers(0, 2), st.sampled_from(["", " ", "Hm", "Yes_comma_ no"])
    ),
    min_size=1,
    max_size=25,
)


@in_folder
@given(UTTERANCES, st.booleans())
def test_every_utterance_is_used_or_accounted_for(tmp_path, utterances, keep):
    header = "conv_id,utterance_idx,context,prompt,speaker_idx,utterance,selfeval,tags\n"
    lines = [f"hit:{c},{i},sad,Rain.,{who},{said},,\n" for c, i, who, said in utterances]
    path = tmp_path / "a.csv"
    path.write_text(header + "".join(lines), encoding="utf-8")
    try:
        loaded = load_dialogues("empathetic", path, keep_unanswered=keep)
    except InputError:
        assert not keep or all(i % 2 == 0 or not said.strip() for _, i, _, said in utterances)
        return
    report = loaded.report
    assert report.read == len(utterances) == report.used + len(report.dropped)
    assert len({d.row for d in report.dropped}) == len(report.dropped), "no row is dropped twice"
    used = set(range(2, len(utterances) + 2)) - {d.row for d in report.dropped}
    spoken = sorted(utterances[row - 2][3].replace("_comma_", ",") for row in used)
    assert sorted(line for d in loaded for line in d.text.split("\n")) == spoken
    assert all(d.question and (d.answer or keep) for d in loaded)


@in_folder
@given(st.binary(max_size=300), st.sampled_from([".json", ".jsonl", ".csv", ".tsv", ".parquet", ".txt", ".jsonl.gz"]))
@pytest.mark.parametrize("name", ["alpaca", "prosocial", "empathetic", "meddialog", "sst2"])
def test_any_bytes_at_all_give_dialogues_or_an_input_error(name, tmp_path, content, suffix):
    path = tmp_path / f"a{suffix}"
    path.write_bytes(content)
    try:
        assert len(load_dialogues(name, path)) > 0
    except InputError as error:
        assert str(path) in str(error) or error.what == "source"


@in_folder
@given(VALUES)
@pytest.mark.parametrize(
    "name", ["alpaca", "dolly", "prosocial", "empathetic", "openorca", "meddialog", "sst2", "uniform"]
)
def test_any_json_at_all_gives_dialogues_or_an_input_error(name, tmp_path, value):
    keys = {
        "alpaca": ["instruction", "input", "output"],
        "dolly": ["instruction", "context", "response", "category"],
        "prosocial": ["context", "response", "dialogue_id", "rots"],
        "empathetic": ["conv_id", "utterance_idx", "speaker_idx", "utterance", "context", "prompt"],
        "openorca": ["id", "system_prompt", "question", "response"],
        "meddialog": ["utterances", "description"],
        "sst2": ["sentence", "label"],
        "uniform": ["id", "response", "source", "turns", "meta"],
    }[name]
    path = tmp_path / "a.json"
    rows = [value, *({**dict.fromkeys(keys, "1"), key: value} for key in keys), [{"text": value, "labels": value}]]
    rows += [{"dialogue_turns": value}, {"src": value}, {"dialogue_turns": {"speaker": value, "utterance": value}}]
    rows += [{"id": value, "response": "x", "source": name, "turns": [{"speaker": value, "text": value}]}]
    path.write_text(json.dumps(rows), encoding="utf-8")
    try:
        loaded = load_dialogues(name, path)
    except InputError:
        return
    assert loaded.report.read == len(rows)
    assert all(d.answer.strip() for d in loaded)
