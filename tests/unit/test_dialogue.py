"""The record that everything is made of."""

import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pllm_helpers.dialogue import DialogueSet
from pllm_helpers.runtime import InputError

FIELDS = st.tuples(st.text(), st.text(), st.text(min_size=1), st.none() | st.floats(allow_nan=False), st.text()).filter(
    lambda f: f[1].strip() or f[2].strip()
)


def test_text_joins_what_is_not_blank():
    assert DialogueSet("u", " Who? ", "I.\n").text == "Who?\nI."
    assert DialogueSet("u", "", "Only this").text == "Only this"
    assert DialogueSet("u", "Only that", "  ").text == "Only that"


@pytest.mark.parametrize("question,answer", [("", ""), (" ", "\n\t")])
def test_both_blank_is_refused(question, answer):
    with pytest.raises(InputError, match="both are blank"):
        DialogueSet("u", question, answer)


def test_meta_is_read_only_and_does_not_leak_in():
    labels = {"topic": "bees"}
    dialogue = DialogueSet("u", "q", "a", meta=labels)
    labels["topic"] = "wasps"
    assert dialogue.meta["topic"] == "bees"
    with pytest.raises(TypeError):
        dialogue.meta["topic"] = "wasps"  # type: ignore[index]


def test_meta_does_not_count_for_equality_or_hash():
    a, b = DialogueSet("u", "q", "a", meta={"x": 1}), DialogueSet("u", "q", "a", meta={"x": 2})
    assert a == b and hash(a) == hash(b) and a.id == b.id


def test_id_is_the_same_on_every_machine():
    assert DialogueSet("u", "q", "a", 1.0, "s").id == "f89a485cc48d55f0"


@pytest.mark.parametrize("changed", [("v", "q", "a", 1.0, "s"), ("u", "qa", "", 1.0, "s"), ("u", "q", "a", None, "s")])
def test_id_tells_rows_apart(changed):
    assert DialogueSet(*changed).id != DialogueSet("u", "q", "a", 1.0, "s").id


@given(FIELDS, st.dictionaries(st.text(max_size=5), st.integers(), max_size=3))
def test_pickle_keeps_everything(fields, meta):
    dialogue = DialogueSet(*fields, meta)
    again = pickle.loads(pickle.dumps(dialogue))
    assert again == dialogue and dict(again.meta) == meta and again.id == dialogue.id
