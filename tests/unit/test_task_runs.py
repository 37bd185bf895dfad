"""One model on one small task: rows, predictions, scores and intervals."""

from dataclasses import replace

import numpy as np
import pytest

from pllm_helpers.corpora import authored_dialogues
from pllm_helpers.corpora.tasks import TASKS, load_task
from pllm_helpers.evaluation import response_nll
from pllm_helpers.experiments.task_runs import _draw, choice_prompt, compare_forms, run_task
from pllm_helpers.models import generate, load_encoder, load_llm
from pllm_helpers.runtime import InputError
from pllm_helpers.tuning.prompts import SENTIMENT, classify
from tests.unit.tuning_kit import tiny_llm


@pytest.fixture(scope="module")
def tiny():
    return tiny_llm()


@pytest.mark.parametrize("name", TASKS)
def test_every_task_runs_and_gives_its_scores(tiny, name):
    result = run_task(tiny, name, 4, seed=1)
    assert len(result.predictions) == len(result.dialogues) == 4
    assert result.main == result.estimates[TASKS[name].metric] and result.main.n == 4
    assert all(len(s) == 4 for s in result.scores.values()) and set(result.estimates) == set(result.scores)
    assert all(d.meta["split"] == "test" for d in result.dialogues)
    table = result.to_pandas()
    assert list(table["prediction"]) == list(result.predictions) and TASKS[name].metric in table


def test_labels_are_those_of_classify(tiny):
    result = run_task(tiny, "sentiment", 10)
    texts = [d.question for d in result.dialogues]
    assert list(result.predictions) == classify(tiny, texts, choice_prompt("sentiment")).labels
    other = run_task(tiny, "sentiment", 10, prompt=SENTIMENT)
    assert list(other.predictions) == classify(tiny, texts, SENTIMENT).labels


def test_calibration_takes_out_the_liking_for_a_label(tiny):
    form = choice_prompt("safety")
    result = run_task(tiny, "safety", 12, calibrate=True)
    raw = classify(tiny, [d.question for d in result.dialogues], form).scores
    shifted = raw - classify(tiny, ["N/A"], form).scores
    assert list(result.predictions) == [form.labels[i] for i in shifted.argmax(1)]


def test_written_answers_are_those_of_generate_with_worked_examples(tiny, monkeypatch):
    asked = []

    def recorded(llm, prompts, **settings):
        asked.append(prompts)
        return generate(llm, prompts, **settings)

    monkeypatch.setattr("pllm_helpers.experiments.task_runs.generate", recorded)
    result = run_task(tiny, "qa", 3, shots=2, seed=5)
    plain = run_task(tiny, "qa", 3, seed=5)
    shown, bare = asked
    own = [[{"role": "user", "content": TASKS["qa"].prompt(d)}] for d in plain.dialogues]
    assert bare == own and [p[4:] for p in shown] == own and len({str(p[:4]) for p in shown}) == 1
    train = {TASKS["qa"].prompt(d): d.answer for d in load_task("qa", "train")}
    for question, answer in zip(shown[0][:4:2], shown[0][1:4:2], strict=True):
        assert train[question["content"]] == answer["content"]
    for prompts, answers in ((shown, result.predictions), (bare, plain.predictions)):
        assert list(answers) == generate(tiny, prompts, max_new_tokens=TASKS["qa"].max_new_tokens)


def test_the_better_reply_is_the_likelier_one(tiny):
    result = run_task(tiny, "chat_probe", 6)
    margin = [
        response_nll(tiny, [replace(d, answer=d.meta["rejected"])])[0] - response_nll(tiny, [d])[0]
        for d in result.dialogues
    ]
    np.testing.assert_allclose(result.scores["margin"], margin, atol=1e-4)
    assert [p == "chosen" for p in result.predictions] == [m > 0 for m in margin]


def test_a_reply_that_is_likely_anywhere_gains_nothing_when_calibrated(tiny):
    result, plain = (run_task(tiny, "chat_probe", 5, calibrate=c) for c in (True, False))
    gained = []
    for d in result.dialogues:
        two = [d, replace(d, answer=d.meta["rejected"])]
        anywhere = response_nll(tiny, [replace(t, question="N/A") for t in two])
        gained.append(anywhere[0] - anywhere[1])
    np.testing.assert_allclose(result.scores["margin"], plain.scores["margin"] + gained, atol=1e-4)


@pytest.mark.parametrize("name,n", [("sentiment", 11), ("safety", 20), ("qa", 7)])
def test_a_draw_is_even_over_labels_in_file_order_and_follows_the_seed(tiny, name, n):
    rows = load_task(name, "test")
    a, b, c = (_draw(rows, TASKS[name], n, s) for s in (0, 0, 1))
    assert a == b != c and len({d.id for d in a}) == n
    order = [rows.index(d) for d in a]
    assert order == sorted(order)
    counts = [sum(d.meta["label"] == label for d in a) for label in TASKS[name].labels]
    assert not counts or max(counts) - min(counts) <= 1


@pytest.mark.parametrize(
    "name,options,message",
    [
        ("poetry", {}, "expected one of"),
        ("qa", {"n": 999}, "2 to 40 rows"),
        ("qa", {"n": 4, "shots": 99}, "at most 24"),
        ("qa", {"shots": -1}, "at least 0"),
        ("sentiment", {"shots": 2}, "expected 0 for sentiment"),
        ("qa", {"calibrate": True}, "which is written"),
        ("qa", {"prompt": SENTIMENT}, "it has no labels"),
        ("safety", {"prompt": SENTIMENT}, "none for answer, decline"),
    ],
)
def test_bad_settings(tiny, name, options, message):
    with pytest.raises(InputError, match=message):
        run_task(tiny, name, **options)


def test_only_choice_tasks_have_a_prompt_form():
    with pytest.raises(InputError, match="sentiment, safety"):
        choice_prompt("qa")


def test_forms_are_compared_on_the_same_replies(tiny):
    rows = authored_dialogues("empathetic")
    nll, differences = compare_forms(tiny, load_encoder(), rows[:8], rows[8:14], 2)
    assert set(nll) == {"none", "turns", "context"} and all(v.shape == (6,) for v in nll.values())
    assert differences["turns - none"].value == pytest.approx((nll["turns"] - nll["none"]).mean())
    np.testing.assert_allclose(nll["none"], response_nll(tiny, rows[8:14]), atol=1e-5)


@pytest.mark.model
def test_the_real_model_finds_some_of_the_answer_in_a_text():
    assert run_task(load_llm(), "qa", 8).main.low > 0.02  # a blank or unrelated answer scores 0
