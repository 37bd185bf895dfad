"""Scores of the small tasks against hand-made cases and published definitions."""

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pllm_helpers.corpora.tasks import TASKS, load_task
from pllm_helpers.evaluation.task_scores import (
    check_rules,
    exact_match,
    lead_sentences,
    normal_answer,
    parse_call,
    same_call,
    score_task,
    token_f1,
)
from pllm_helpers.runtime import InputError

# ---------------------------------------------------------------- short answers


def test_squad_normal_form():
    assert normal_answer("  The Cat, an  old-ish one. ") == "cat oldish one"


@pytest.mark.parametrize(
    "prediction,references,em,f1",
    [
        ("The reindeer horn.", ["reindeer horn"], 1, 1),
        ("horn", ["reindeer horn"], 0, 2 / 3),
        ("made of reindeer horn", ["antler", "reindeer horn"], 0, 2 * 2 / 6),
        ("", ["nine"], 0, 0),
        ("the the", ["the"], 1, 1),  # both are blank in normal form, as in SQuAD
        ("nine nine nine", ["nine"], 0, 2 * 1 / 4),  # a repeated word counts once
        ("ten", ["nine"], 0, 0),
    ],
)
def test_exact_match_and_f1(prediction, references, em, f1):
    assert exact_match(prediction, references) == em
    assert token_f1(prediction, references) == pytest.approx(f1)


@given(st.text(max_size=30), st.text(max_size=30))
def test_f1_is_symmetric_bounded_and_one_on_itself(a, b):
    assert 0 <= token_f1(a, [b]) == pytest.approx(token_f1(b, [a])) and token_f1(a, [b]) <= 1
    assert exact_match(a, [a]) == token_f1(a, [a]) == 1
    assert exact_match(a, [b]) <= token_f1(a, [b])


@pytest.mark.parametrize("references", ["nine", []])
def test_references_must_be_a_list(references):
    for function in (exact_match, token_f1):
        with pytest.raises(InputError, match="references"):
            function("nine", references)


def test_lead_sentences():
    text = 'It rained. "Really?" she asked. Yes!'
    assert lead_sentences(text) == "It rained." and lead_sentences(text, 9).endswith("Yes!")


# ---------------------------------------------------------------- rules


@pytest.mark.parametrize(
    "rule,kept,broken",
    [
        ({"kind": "words", "min": 3, "max": 3}, "a well-known cat's", "one two"),
        ({"kind": "sentences", "min": 2, "max": 2}, "One. Two!", "One, two."),
        ({"kind": "lines", "min": 2, "max": 2}, "a\n\nb", "a b"),
        ({"kind": "characters", "max": 4}, "four", "fiver"),
        ({"kind": "paragraphs", "count": 2}, "a\nb\n\nc", "a\nb"),
        ({"kind": "bullets", "count": 2}, "- a\n- b", "Here:\n- a\n- b"),
        ({"kind": "numbered", "count": 2}, "1. a\n2) b", "1. a\n3. b"),
        ({"kind": "items", "count": 3}, "a, b, c", "a, b, , c"),
        ({"kind": "contains", "words": ["door"]}, "The Door is open.", "The doorman left."),
        ({"kind": "excludes", "words": ["good"]}, "goodness me", "so Good!"),
        ({"kind": "excludes_characters", "characters": "e"}, "a kitty", "THE CAT"),
        ({"kind": "repeats", "word": "echo", "count": 2}, "Echo, echo!", "echoes echo"),
        ({"kind": "repeats", "word": "!", "count": 1}, "Up!", "Up!!"),
        ({"kind": "starts", "text": "Yes", "or": "No"}, "No, thanks", "Well, yes"),
        ({"kind": "ends", "text": "?"}, "Why?", "Why? Because."),
        ({"kind": "wrapped", "left": "[", "right": "]"}, "[a]", "a [b]"),
        ({"kind": "wrapped", "left": '"', "right": '"'}, '"a"', '"'),
        ({"kind": "case", "case": "upper"}, "STOP, 2!", "Stop"),
        ({"kind": "case", "case": "lower"}, "quiet 1", "123"),
        ({"kind": "initials", "letter": "s"}, "Seven seals", "seven red seals"),
        ({"kind": "sorted"}, "ant, Bee, cat", "bee, ant"),
        ({"kind": "one_of", "options": ["yes", "no"]}, "Yes.", "Yes, it is"),
        ({"kind": "digits"}, "42", "forty-two 42"),
        ({"kind": "digits"}, "7", "²"),
        ({"kind": "json", "keys": ["a"]}, '{"a": 1}', '{"a": 1, "b": 2}'),
        ({"kind": "json", "keys": ["a"], "lengths": {"a": 2}}, '{"a": [1, 2]}', '{"a": [1]}'),
        ({"kind": "json", "keys": ["a"]}, '{"a": null}', 'Sure: {"a": 1}'),
    ],
)
def test_each_rule_holds_and_breaks(rule, kept, broken):
    assert check_rules(kept, [rule]) == [True]
    assert check_rules(broken, [rule]) == [False]
    assert check_rules("  ", [rule]) == [False]


def test_every_kind_that_the_data_use_is_known_and_others_are_not():
    assert all(check_rules("x", d.meta["rules"]) is not None for d in load_task("instruction"))
    with pytest.raises(InputError, match="got 'rhymes'"):
        check_rules("x", [{"kind": "rhymes"}])


# ---------------------------------------------------------------- calls

CALL = {"api": "set_timer", "arguments": {"minutes": 10}}


@pytest.mark.parametrize(
    "text,found",
    [
        (json.dumps(CALL), CALL),
        ("Sure! ```json\n" + json.dumps(CALL) + "\n```", CALL),
        ('{"note": 1} then ' + json.dumps(CALL), CALL),
        ('{"api": "call"}', {"api": "call", "arguments": {}}),
        ('{"api": "call", "arguments": "Mum"}', {"api": "call", "arguments": {}}),
        ('{"api": 3}', None),
        ("set_timer(10)", None),
        ('{"api": "call", ', None),
        ("", None),
        ("{" * 3000, None),
    ],
)
def test_parse_call(text, found):
    assert parse_call(text) == found


@pytest.mark.parametrize(
    "given_call,intent,slots,accuracy",
    [
        (CALL, 1, 1, 1),
        ({"api": "set_timer", "arguments": {"minutes": " 10. "}}, 1, 1, 1),
        ({"api": "set_timer", "arguments": {"minutes": 11}}, 1, 0, 0),
        ({"api": "set_timer", "arguments": {"minutes": 10, "label": "tea"}}, 1, 2 / 3, 0),
        ({"api": "set_alarm", "arguments": {"minutes": 10}}, 0, 0, 0),
        (None, 0, 0, 0),
    ],
)
def test_same_call(given_call, intent, slots, accuracy):
    scores = same_call(given_call, CALL)
    assert scores == pytest.approx({"intent": intent, "slots": slots, "accuracy": accuracy})


# ---------------------------------------------------------------- whole tasks


def right_answers(name):
    rows = load_task(name)
    if name == "chat_probe":
        return rows, ["chosen"] * len(rows)
    return rows, [d.meta.get("label", d.answer) for d in rows]


@pytest.mark.parametrize("name", TASKS)
def test_the_reference_scores_one_and_the_main_score_comes_first(name):
    rows, answers = right_answers(name)
    scores = score_task(TASKS[name], rows, answers)
    assert next(iter(scores)) == TASKS[name].metric and scores[TASKS[name].metric].mean() == pytest.approx(1)
    assert all(s.shape == (len(rows),) for s in scores.values())


@pytest.mark.parametrize("name", TASKS)
def test_chance_is_what_the_registry_says(name):
    task, rows = TASKS[name], load_task(name)
    if name == "chat_probe":
        guesses = [["chosen"] * len(rows), ["rejected"] * len(rows)]
    else:
        guesses = [[label] * len(rows) for label in task.labels] or [[""] * len(rows)]
    found = np.mean([score_task(task, rows, g)[task.metric].mean() for g in guesses])
    assert found == pytest.approx(task.chance)


def test_safety_counts_both_errors():
    rows = load_task("safety")
    lax, strict = (score_task(TASKS["safety"], rows, [label] * len(rows)) for label in ("answer", "decline"))
    assert lax["too_lax"].mean() == strict["too_strict"].mean() == 0.5
    assert lax["too_strict"].sum() == strict["too_lax"].sum() == 0


def test_summaries_carry_length_and_copying():
    rows = load_task("summarisation")[:3]
    scores = score_task(TASKS["summarisation"], rows, [d.question for d in rows])
    assert (scores["copy_rate"] == 1).all() and (scores["length_ratio"] > 2).all() and (scores["rougeL"] < 0.6).all()
    prompted = [replace(d, question=TASKS["summarisation"].prompt(d)) for d in rows]
    again = score_task(TASKS["summarisation"], prompted, [d.question for d in rows])
    assert (again["copy_rate"] == scores["copy_rate"]).all()  # the template's words are nobody's


@pytest.mark.parametrize(
    "name,predictions,message",
    [
        ("sentiment", ["positive"], "one text for each"),
        ("sentiment", "positive", "one text for each"),
        ("sentiment", ["good"] * 240, "expected positive or negative, got 'good'"),
        ("chat_probe", ["first"] * 64, "expected chosen or rejected"),
    ],
)
def test_bad_predictions(name, predictions, message):
    with pytest.raises(InputError, match=message):
        score_task(TASKS[name], load_task(name), predictions)
