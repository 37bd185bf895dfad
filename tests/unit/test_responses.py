"""ROUGE, BLEU, lengths and copying: against plain counts, other scripts, and what must be refused."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pllm_helpers.evaluation import evaluate_responses, paired_difference, response_words
from pllm_helpers.runtime import InputError

word = st.sampled_from(["the", "cat", "sat", "on", "mat", "café", "ναι", "don't", "7", "я"])
sentence = st.lists(word, min_size=1, max_size=12).map(" ".join)


def f_measure(hits: int, answer: int, reference: int) -> float:
    return 2 * hits / (answer + reference) if hits else 0.0


def by_hand(answer: str, reference: str) -> tuple[float, float, float]:
    """ROUGE-1, ROUGE-2 and ROUGE-L from their definitions (Lin 2004)."""
    a, r = answer.casefold().split(), reference.casefold().split()
    one = f_measure(sum((Counter(a) & Counter(r)).values()), len(a), len(r))
    pairs = [list(zip(x, x[1:], strict=False)) for x in (a, r)]
    two = f_measure(sum((Counter(pairs[0]) & Counter(pairs[1])).values()), len(pairs[0]), len(pairs[1]))
    longest = np.zeros((len(a) + 1, len(r) + 1), dtype=int)
    for i, x in enumerate(a):
        for j, y in enumerate(r):
            longest[i + 1, j + 1] = longest[i, j] + 1 if x == y else max(longest[i, j + 1], longest[i + 1, j])
    return one, two, f_measure(int(longest[-1, -1]), len(a), len(r))


@settings(deadline=None)
@given(st.lists(st.tuples(sentence, sentence), min_size=1, max_size=5))
def test_rouge_equals_its_definition(rows):
    answers, references = zip(*rows, strict=True)
    scores = evaluate_responses(list(answers), list(references))
    expected = np.array([by_hand(a, r) for a, r in rows])
    np.testing.assert_allclose(scores.rouge1, expected[:, 0], atol=1e-12)
    np.testing.assert_allclose(scores.rouge2, expected[:, 1], atol=1e-12)
    np.testing.assert_allclose(scores.rougeL, expected[:, 2], atol=1e-12)


@pytest.mark.parametrize(
    "text, words",
    [
        ("The CAT, sat!", ["the", "cat", "sat"]),
        ("don't  'quote' rock'n'roll’s", ["don't", "quote", "rock'n'roll's"]),
        ("naïve café, Straße", ["naïve", "café", "strasse"]),
        ("Δεν ξέρω. Я не знаю", ["δεν", "ξέρω", "я", "не", "знаю"]),
        ("हिन्दी भाषा", ["हिन्दी", "भाषा"]),
        ("我不知道 ok", ["我", "不", "知", "道", "ok"]),
        ("ﬁne ½", ["fine", "1", "2"]),
        ("ok 😀👍🏽", ["ok", "😀", "👍"]),
        ("... !?", []),
    ],
)
def test_words_of_any_script(text, words):
    assert response_words(text) == words


def test_composed_and_decomposed_letters_are_equal():
    assert response_words("café") == response_words("cafe\u0301")


def test_the_default_tokenizer_of_rouge_score_would_lose_these():
    from rouge_score.rouge_scorer import RougeScorer

    assert RougeScorer(["rouge1"]).score("не знаю", "не знаю")["rouge1"].fmeasure == 0
    assert evaluate_responses(["не знаю"], ["не знаю"]).rouge1[0] == 1


def test_bleu_is_that_of_sacrebleu():
    import sacrebleu

    answers = ["the cat sat on the mat", "it is raining today again", "no"]
    references = ["the cat sat on a mat", "it is raining again today", "yes of course"]
    scores = evaluate_responses(answers, references)
    single = [sacrebleu.sentence_bleu(a, [r]).score / 100 for a, r in zip(answers, references, strict=True)]
    np.testing.assert_allclose(scores.bleu, single)
    assert scores.corpus_bleu == pytest.approx(sacrebleu.corpus_bleu(answers, [references]).score / 100)
    assert scores.corpus_bleu != pytest.approx(scores.bleu.mean(), abs=0.01)
    assert "tok:13a" in scores.bleu_signature
    summary = scores.summary()
    assert summary["corpus_bleu"].low <= scores.corpus_bleu <= summary["corpus_bleu"].high
    assert summary["rouge1"].value == pytest.approx(scores.rouge1.mean()) and summary["rouge1"].n == 3
    assert scores.summary() == summary != scores.summary(1)


def test_a_perfect_answer_has_full_marks_also_as_a_corpus():
    texts = ["one two three four five", "six seven eight nine ten"]
    summary = evaluate_responses(texts, texts).summary()
    assert {summary[m].value for m in ("rouge1", "rouge2", "rougeL", "bleu", "length_ratio")} == {1.0}
    assert summary["corpus_bleu"].low == pytest.approx(1)


def test_what_shows_that_rouge_misleads():
    prompts = ["where is the red car", "what is for dinner", "who are you"]
    references = ["in the garage", "soup I think", "a friend of yours"]
    answers = ["Where is the red car?", "I think so", "i THINK so!"]
    scores = evaluate_responses(answers, references, prompts)
    assert scores.equals_prompt.tolist() == [True, False, False]
    assert scores.equals_another.tolist() == [False, True, True]
    assert scores.copy_rate.tolist() == [1.0, 0.0, 0.0]
    assert scores.length_ratio.tolist() == pytest.approx([5 / 3, 1.0, 3 / 4])
    padded = evaluate_responses(["soup " * 9 + "I think"], ["soup I think"])
    assert padded.length_ratio[0] == pytest.approx(11 / 3) and padded.rouge1[0] < 0.5
    assert list(scores.to_pandas()["equals_prompt"]) == [True, False, False]


def test_each_word_of_the_prompt_counts_once_as_copied():
    assert evaluate_responses(["no no no yes"], ["x"], ["no"]).copy_rate[0] == 0.25


def test_a_blank_answer_scores_nothing():
    scores = evaluate_responses(["", "...", "yes"], ["yes", "yes", "yes"], ["", "...", "ok"])
    assert scores.rouge1.tolist() == [0, 0, 1] and scores.blank.tolist() == [True, True, False]
    assert not scores.equals_prompt.any() and not scores.equals_another.any()


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((["a"], ["a", "b"]), "references: expected 1 text"),
        ((["a"], ["a"], ["a", "b"]), "prompts: expected 1 text"),
        (([], []), "at least one answer"),
        ((["a", "b"], ["a", "!?"]), r"references\[1\]: .*at least one word"),
    ],
)
def test_refuses(arguments, message):
    with pytest.raises(InputError, match=message):
        evaluate_responses(*arguments)


# ---------------------------------------------------------------- differences over seeds and dialogues


@pytest.mark.parametrize("between", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("seeds, least", [(3, 0.9), (5, 0.9)])
def test_interval_over_seeds_and_dialogues_covers(between, seeds, least):
    """Whether seeds differ not at all, a little or mostly: about 95 of 100 intervals hold the truth."""
    rng = np.random.default_rng(int(10 * between) + seeds)
    hits = 0
    for trial in range(200):
        shared = rng.normal(0, 5, (seeds, 40))
        gap = 0.3 + rng.normal(0, between, (seeds, 1)) + rng.normal(0, 1, (seeds, 40))
        e = paired_difference(shared + gap, shared, trial, resamples=400)
        hits += e.low <= 0.3 <= e.high
    assert least <= hits / 200 <= 0.99


def test_dialogues_alone_would_cover_too_little():
    """What the hierarchy is for: with seeds that differ, pooling all dialogues is overconfident."""
    rng = np.random.default_rng(3)
    pooled = whole = 0
    for trial in range(100):
        gap = rng.normal(0, 0.5, (5, 1)) + rng.normal(0, 1, (5, 40))
        flat, both = paired_difference(gap.ravel(), seed=trial), paired_difference(gap, seed=trial)
        pooled += flat.low <= 0 <= flat.high
        whole += both.low <= 0 <= both.high
    assert pooled < 70 < 88 <= whole


def test_pairing_removes_what_both_share():
    rng = np.random.default_rng(0)
    shared = rng.normal(0, 10, (5, 64))
    e = paired_difference(shared + rng.normal(1, 0.1, (5, 64)), shared)
    assert 0.95 < e.low < 1 < e.high < 1.05 and e.n == 5 * 64 and e.seeds == (0, 1, 2, 3, 4)


def test_difference_is_seeded_and_takes_uneven_rows():
    a, b = [np.arange(4.0), np.arange(6.0)], [np.zeros(4), np.zeros(6)]
    assert paired_difference(a, b, 1) == paired_difference(a, b, 1) != paired_difference(a, b, 2)
    assert paired_difference(a, b).value == pytest.approx((1.5 + 2.5) / 2)  # every seed counts the same
    one = paired_difference(np.arange(5.0))
    assert one.value == 2 and one.low < 2 < one.high and one.seeds == (0,)
    same = paired_difference(np.ones((3, 4)), np.zeros((3, 4)))
    assert same.low == same.value == same.high == 1


@pytest.mark.parametrize(
    "a, b",
    [
        ([], None),
        ([[1.0], [2.0]], None),
        ([[1.0, np.nan], [1.0, 2.0]], None),
        (np.ones((2, 3)), np.ones((3, 3))),
        (np.ones((2, 3)), np.ones((2, 4))),
        (np.ones((2, 2, 2)), None),
    ],
)
def test_difference_refuses(a, b):
    with pytest.raises(InputError):
        paired_difference(a, b)
