"""Classification in prompt form: rows, few-shot draws, scores against the likelihood of each word."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pllm_helpers.runtime import InputError
from pllm_helpers.tuning import REVIEW, SENTIMENT, PromptTask, adapted, classify, tune_lora, tune_mezo
from pllm_helpers.tuning.data import token_rows
from pllm_helpers.tuning.forward import plain_objective
from tests.unit.tuning_kit import tiny_llm

TEXTS = ["a fine and truly distinctive film", "wasting two hours", "warm, funny", "dull from the first minute on"]
LABELS = ["positive", "negative", "positive", "negative"]
CHAT = PromptTask("{text} Was it good?", {"positive": "Yes", "negative": "No"}, form="chat")
WORDY = PromptTask("{text} I", {"positive": "loved it a lot", "negative": "loved nothing", "mixed": "am torn"})


@pytest.fixture(scope="module")
def llm():
    return tiny_llm()


def test_plain_rows_are_one_running_text_and_count_the_word_only(llm):
    rows = token_rows(llm, SENTIMENT.dialogues(TEXTS, LABELS), 512).rows
    for r, text, label in zip(rows, TEXTS, LABELS, strict=True):
        word = SENTIMENT.verbalisers[label]
        assert llm.tokenizer.decode(r.ids) == f"{text} It was {word}"
        assert llm.tokenizer.decode(r.ids[-r.answer :]) == f" {word}"
        assert r.ids == llm.tokenizer(f"{text} It was {word}", add_special_tokens=False)["input_ids"]
    cut = token_rows(llm, SENTIMENT.dialogues(["one two three four five six seven"], ["positive"]), 8)
    assert llm.tokenizer.decode(cut.rows[0].ids) == " three four five six seven It was great" and cut.shortened == 1


def test_chat_rows_go_through_the_template(llm):
    (row,) = token_rows(llm, CHAT.dialogues(TEXTS[:1], ["positive"]), 512).rows
    expected = llm.format_chat("a fine and truly distinctive film Was it good?") + "Yes<|im_end|>"
    assert llm.tokenizer.decode(row.ids) == expected and row.answer == 2


@pytest.mark.parametrize("task", [SENTIMENT, CHAT, WORDY], ids=["plain", "chat", "several words"])
def test_scores_are_the_likelihoods_of_the_words(llm, task):
    """Each word scored whole by the training objective, batch of one; then normalised over the labels."""
    found = classify(llm, TEXTS, task, batch_size=3)
    objective = plain_objective(llm.model, 0)
    plain = np.zeros((len(TEXTS), len(task.labels)))
    for i, text in enumerate(TEXTS):
        for k, label in enumerate(task.labels):
            (row,) = token_rows(llm, task.dialogues([text], [label]), 512).rows
            end = 1 if task.form == "chat" else 0
            scored = type(row)(row.ids[: len(row.ids) - end], row.answer - end)
            if task is not WORDY:  # first tokens tell the words apart
                scored = type(row)(row.ids[: len(row.ids) - row.answer + 1], 1)
            plain[i, k] = -objective([scored]).item()
    expected = plain - np.log(np.exp(plain).sum(1, keepdims=True))
    np.testing.assert_allclose(found.scores, expected, atol=2e-5)
    assert found.labels == [task.labels[k] for k in expected.argmax(1)] and found.names == task.labels
    np.testing.assert_allclose(np.exp(found.scores).sum(1), 1)


def test_accuracy_and_loss(llm):
    found = classify(llm, TEXTS, SENTIMENT)
    other = ["negative" if x == "positive" else "positive" for x in found.labels]
    assert found.accuracy(found.labels) == 1 and found.accuracy(other) == 0
    half = [*found.labels[:2], *other[2:]]
    np.testing.assert_array_equal(found.hits(half), [1, 1, 0, 0])
    gold = [found.scores[i, found.names.index(x)] for i, x in enumerate(LABELS)]
    assert found.loss(LABELS) == pytest.approx(-np.mean(gold))
    for bad, message in ((["neutral"] * 4, "'positive', 'negative'.*neutral"), (["positive"], "one label per text")):
        with pytest.raises(InputError, match=message):
            found.accuracy(bad)


def test_tuning_on_prompts_raises_the_accuracy(llm):
    rows = SENTIMENT.dialogues(TEXTS, LABELS)
    before = classify(llm, TEXTS, SENTIMENT)
    settings = dict(steps=30, batch_size=4, progress=False)
    result = tune_lora(llm, rows, **settings, lr=0.05, rank=4)
    with adapted(llm, result) as tuned:
        after = classify(tuned, TEXTS, SENTIMENT)
    assert after.accuracy(LABELS) == 1 and after.loss(LABELS) < before.loss(LABELS) - 0.1
    more = dict(parameters="lora", rank=4, lr=0.03, directions=4, noise="rademacher", together=True)
    result = tune_mezo(llm, rows, **settings, **more)
    assert result.losses[-1] < result.losses[0] - 0.1


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.sampled_from(["positive", "negative"]), min_size=2, max_size=40), st.integers(1, 5), st.integers(0, 9)
)
def test_few_shot_draws_as_many_of_each_class(labels, shots, seed):
    texts = [f"text {i}" for i in range(len(labels))]
    if min(labels.count("positive"), labels.count("negative")) < shots:
        with pytest.raises(InputError, match="shots.*at most"):
            SENTIMENT.few_shot(texts, labels, shots, seed)
        return
    rows = SENTIMENT.few_shot(texts, labels, shots, seed)
    assert [r.meta["label"] for r in rows] == ["positive"] * shots + ["negative"] * shots
    assert len({r.meta["text"] for r in rows}) == 2 * shots
    assert all(labels[int(r.meta["text"].split()[1])] == r.meta["label"] for r in rows)
    assert rows == SENTIMENT.few_shot(texts, labels, shots, seed)


def test_another_seed_draws_other_rows():
    texts, labels = [f"text {i}" for i in range(100)], ["positive", "negative"] * 50
    first, second = (SENTIMENT.few_shot(texts, labels, 10, s) for s in (0, 1))
    assert {r.question for r in first} != {r.question for r in second}


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (dict(template="It was"), "template.*once"),
        (dict(template="{text} {text}"), "template"),
        (dict(verbalisers={"positive": "great"}), "two or more"),
        (dict(verbalisers={"positive": "great", "negative": " "}), "verbalisers"),
        (dict(verbalisers={"positive": "good", "negative": "goodness"}), "tell the labels apart"),
        (dict(form="raw"), "form.*plain.*chat"),
    ],
    ids=str,
)
def test_a_task_that_cannot_work_is_refused(bad, message):
    good = dict(template="{text} It was", verbalisers={"positive": "great", "negative": "terrible"})
    with pytest.raises(InputError, match=message):
        PromptTask(**good | bad)


def test_bad_rows_are_refused(llm):
    with pytest.raises(InputError, match="label.*'positive', 'negative'.*'neutral'.*Add a verbaliser"):
        SENTIMENT.dialogues(["fine"], ["neutral"])
    with pytest.raises(InputError, match="one per text"):
        SENTIMENT.dialogues(["fine"], [])
    with pytest.raises(InputError, match=r"texts\[1\].*blank"):
        classify(llm, ["fine", " "], SENTIMENT)
    with pytest.raises(InputError, match="texts"):
        classify(llm, [], SENTIMENT)
    with pytest.raises(InputError, match="at most 16 tokens"):
        classify(llm, ["many words " * 20], SENTIMENT, max_tokens=16)


@pytest.mark.model
def test_the_real_model_knows_the_task_half_and_learns_it(shared_data):
    """SST-2: above chance without training, and 16 shots of LoRA help."""
    import gzip
    import json

    from pllm_helpers.models import load_llm

    with gzip.open(shared_data / "sst2.jsonl.gz", "rt", encoding="utf-8") as f:
        rows = [r for r in map(json.loads, f) if len(r["instruction"].split()) >= 5]
    texts, labels = ([r[k] for r in rows] for k in ("instruction", "response"))
    llm = load_llm(dtype="bf16")
    test, gold = texts[200:296], labels[200:296]
    before = classify(llm, test, REVIEW)
    assert before.accuracy(gold) > 0.6  # chance plus two standard errors
    shots = REVIEW.few_shot(texts[400:], labels[400:], 16)
    result = tune_lora(llm, shots, steps=12, lr=2e-3, progress=False)
    with adapted(llm, result) as tuned:
        after = classify(tuned, test, REVIEW)
    assert after.loss(gold) < before.loss(gold) and after.accuracy(gold) > 0.7
    assert result.losses[-1] < result.losses[0]
