"""Retrieval over a person's dialogues: what is found, in which order, and what the prompts hold."""

from dataclasses import replace

import numpy as np
import pytest

from pllm_helpers.corpora import authored_dialogues
from pllm_helpers.dialogue import DialogueSet
from pllm_helpers.evaluation import response_nll
from pllm_helpers.models import generate, load_encoder, load_llm
from pllm_helpers.retrieval import FORMS, RetrievalPersonalizer
from pllm_helpers.runtime import InputError
from pllm_helpers.selection import DialogueBuffer, FifoReplace
from tests.unit.tuning_kit import tiny_llm

QA = [
    ("Which bread do you bake on Sundays?", "Rye, always rye."),
    ("What should I cook for dinner tonight?", "Lentil soup, it is cold outside."),
    ("Did you watch the football match?", "I never watch football."),
    ("How is your garden doing?", "The beans are up at last!"),
    ("Can you recommend a novel?", "Anything with a ship in it."),
    ("Do you like sourdough bread?", "Only when it is still warm."),
]


@pytest.fixture(scope="module")
def encoder():
    return load_encoder()


@pytest.fixture(scope="module")
def tiny():
    return tiny_llm()


@pytest.fixture
def stored():
    return [DialogueSet("u", q, a, float(i)) for i, (q, a) in enumerate(QA)]


def questions(hits):
    return [h.dialogue.question for h in hits]


# ---------------------------------------------------------------- search


def test_equals_a_plain_cosine_search(encoder):
    rows = authored_dialogues("open_qa")
    store = RetrievalPersonalizer(encoder, rows)
    asked = ["How can I save electricity at home?", "Tell me about an old city", "What is a good gift?"]
    vectors, queries = encoder.encode([d.question for d in rows]), encoder.encode(asked)
    for found, q in zip(store.retrieve_all(asked, 5), queries, strict=True):
        cosine = vectors @ q
        best = sorted(range(len(rows)), key=lambda i: -cosine[i])[:5]
        assert [h.dialogue.id for h in found] == [rows[i].id for i in best]
        np.testing.assert_allclose([h.similarity for h in found], cosine[best], atol=2e-5)


def test_meaning_decides(encoder, stored):
    hits = RetrievalPersonalizer(encoder, stored).retrieve("Any tips for baking a loaf?", 2)
    assert set(questions(hits)) == {QA[0][0], QA[5][0]} and hits[0].similarity >= hits[1].similarity


def test_one_by_one_and_together_find_the_same(encoder):
    rows = authored_dialogues("reasoning")
    store = RetrievalPersonalizer(encoder, rows[:40])
    together = store.retrieve_all(list(rows[40:]), 7)
    assert together == [store.retrieve(d, 7) for d in rows[40:]]


def test_equal_similarity_goes_by_the_order_of_storing(encoder):
    twins = [DialogueSet("u", "What time is it?", f"Reply {i}.") for i in range(6)]
    for rows in (twins, twins[::-1]):
        assert [h.dialogue for h in RetrievalPersonalizer(encoder, rows).retrieve("Tell me the time", 6)] == rows


def test_fewer_than_k_and_none(encoder, stored):
    store = RetrievalPersonalizer(encoder, stored)
    assert len(store.retrieve("bread", 99)) == 6 and store.retrieve("bread", 0) == []
    empty = RetrievalPersonalizer(encoder)
    assert len(empty) == 0 and empty.retrieve("bread") == []
    assert empty.prompt("bread") == store.prompt("bread", 0) == [{"role": "user", "content": "bread"}]


def test_recent_and_random_examples_are_there_to_compare_with(encoder, stored):
    recent = RetrievalPersonalizer(encoder, stored[::-1], choose="recent")
    assert [h.dialogue.time for h in recent.retrieve("bread", 3)] == [5.0, 4.0, 3.0]
    assert [h.dialogue.time for h in recent.retrieve("bread", 3, before=4.0)] == [3.0, 2.0, 1.0]
    draw = RetrievalPersonalizer(encoder, stored, choose="random")
    assert draw.retrieve("bread", 4) == RetrievalPersonalizer(encoder, stored, choose="random").retrieve("bread", 4)
    firsts = {draw.retrieve(f"question {i}", 1)[0].dialogue.id for i in range(30)}
    assert len(firsts) >= 4  # another question, another draw
    assert stored[0].id not in {h.dialogue.id for h in draw.retrieve(stored[0], 9)}


# ---------------------------------------------------------------- leaks and time


def test_a_question_never_finds_itself_or_its_duplicate(encoder, stored):
    copy = DialogueSet("other", "  which BREAD do you bake\non sundays? ", "White.", 9.0)
    store = RetrievalPersonalizer(encoder, [*stored, copy])
    for asked in (stored[0], QA[0][0], copy, "Which bread do you bake on Sundays?"):
        found = store.retrieve(asked, 9)
        assert not {h.dialogue.id for h in found} & {stored[0].id, copy.id} and len(found) == 5
    found = store.retrieve(stored[0], 2, allow_same=True)
    assert {h.dialogue.id for h in found} == {stored[0].id, copy.id}


def test_an_annotated_entry_is_still_itself(encoder, stored):
    with DialogueBuffer(bins=4) as buffer:
        put(buffer, stored[:4], encoder)
        buffer.annotate(buffer.entries[0], "My own words.")
        store = RetrievalPersonalizer(encoder, buffer)
        assert stored[0] in store and store.dialogues[0].answer == "My own words."
        renamed = replace(stored[0], question=stored[0].question)
        assert stored[0].id not in {h.dialogue.id for h in store.retrieve(renamed, 9)}
        assert "My own words." not in [h.dialogue.answer for h in store.retrieve(renamed, 9)]


def test_only_earlier_dialogues(encoder, stored):
    timeless = DialogueSet("u", "Is bread good?", "Yes.")
    store = RetrievalPersonalizer(encoder, [*stored, timeless], earlier_only=True)
    now = DialogueSet("u", "Which bread shall I buy?", "Rye.", 3.0)
    assert {h.dialogue.time for h in store.retrieve(now, 9)} == {0.0, 1.0, 2.0}
    assert {h.dialogue.time for h in store.retrieve("Which bread?", 9, before=1.5)} == {0.0, 1.0}
    with pytest.raises(InputError, match="a dialogue set with a time"):
        store.retrieve("Which bread?", 3)
    free = RetrievalPersonalizer(encoder, [*stored, timeless])
    assert len(free.retrieve(now, 9)) == 7
    assert {h.dialogue.time for h in free.retrieve(now, 9, before=2.0)} == {0.0, 1.0}


# ---------------------------------------------------------------- what is stored


def put(buffer, dialogues, encoder):
    vectors = encoder.encode([d.text for d in dialogues])
    for d, v in zip(dialogues, vectors, strict=True):
        buffer.offer(FifoReplace(), d, embedding=v, domain=None, eoe=0.5, dss=0.5)


def test_add_remove_and_follow(encoder, stored):
    store = RetrievalPersonalizer(encoder, stored[:3])
    assert store.add(stored[2:5]) == 2 and store.add(stored[:5]) == 0 and len(store) == 5
    assert store.add([DialogueSet("u", "unanswered", " "), DialogueSet("u", " ", "unasked")]) == 0
    assert store.remove(stored[1]) == 1 and stored[1] not in store
    assert store.remove([stored[0].id, stored[2], stored[0]]) == 2
    assert store.dialogues == stored[3:5]
    with pytest.raises(InputError, match="expected a stored dialogue"):
        store.remove([stored[3], "nothing"])
    assert len(store) == 2  # nothing was forgotten on the way to the error
    with DialogueBuffer(bins=3) as buffer:
        put(buffer, stored[:3], encoder)
        live = RetrievalPersonalizer(encoder, buffer)
        assert live.dialogues == stored[:3]
        put(buffer, [stored[4]], encoder)  # takes the oldest one's place
        assert live.follow(buffer) == (1, 1) and stored[0] not in live and stored[4] in live
        buffer.annotate(stored[1].id, "Changed my mind.")
        assert live.follow(buffer) == (0, 0)
        assert [d.answer for d in live.dialogues if d.question == stored[1].question] == ["Changed my mind."]


def test_removed_dialogues_are_not_found(encoder, stored):
    store = RetrievalPersonalizer(encoder, stored)
    before = store.retrieve("bread", 6)
    store.remove(before[0].dialogue)
    assert store.retrieve("bread", 6) == before[1:]


def test_a_buffers_own_vectors_serve_without_encoding(encoder, stored):
    with DialogueBuffer(bins=6) as buffer:
        put(buffer, stored, encoder)
        store = RetrievalPersonalizer(encoder, buffer, vectors="stored")
        texts = encoder.encode([d.text for d in stored])
        query = encoder.encode(["Any tips for baking a loaf?"])[0]
        best = np.argsort(-(texts @ query), kind="stable")
        assert questions(store.retrieve("Any tips for baking a loaf?", 6)) == [stored[i].question for i in best]
        entry = buffer.entries[0]
        with pytest.raises(InputError, match="384 finite numbers"):
            RetrievalPersonalizer(encoder, [replace(entry, embedding=entry.embedding[:5])], vectors="stored")
    with pytest.raises(InputError, match="an entry with its embedding|a buffer's entry"):
        RetrievalPersonalizer(encoder, stored, vectors="stored")


# ---------------------------------------------------------------- prompts


def test_turns_put_the_most_similar_next_to_the_question(encoder, stored):
    store = RetrievalPersonalizer(encoder, stored)
    hits = store.retrieve("Which bread shall I buy?", 2)
    first, second = (h.dialogue for h in hits)
    assert store.prompt("Which bread shall I buy?", 2) == [
        {"role": "user", "content": second.question},
        {"role": "assistant", "content": second.answer},
        {"role": "user", "content": first.question},
        {"role": "assistant", "content": first.answer},
        {"role": "user", "content": "Which bread shall I buy?"},
    ]


def test_context_quotes_them_in_one_message(encoder, stored):
    store = RetrievalPersonalizer(encoder, stored, form="context")
    (message,) = store.prompt("Which bread shall I buy?", 2)
    places = [message["content"].index(h.dialogue.answer) for h in store.retrieve("Which bread shall I buy?", 2)]
    assert places[0] > places[1] and message["content"].endswith("Which bread shall I buy?")
    assert message["role"] == "user"


@pytest.mark.parametrize("form", FORMS)
def test_the_budget_drops_the_least_similar(encoder, stored, tiny, form):
    def size(messages):
        return len(tiny.tokenizer(tiny.format_chat(messages), add_special_tokens=False)["input_ids"])

    roomy = RetrievalPersonalizer(encoder, stored, form=form)
    asked = "Which bread shall I buy?"
    sizes = [size(roomy.prompt(asked, k, llm=tiny)) for k in range(5)]
    assert sizes == sorted(set(sizes))
    for k in range(5):
        tight = RetrievalPersonalizer(encoder, stored, form=form, budget=sizes[k])
        assert tight.prompt(asked, 4, llm=tiny) == roomy.prompt(asked, k, llm=tiny)
    with pytest.raises(InputError, match=f"at most {sizes[0] - 1} tokens"):
        RetrievalPersonalizer(encoder, stored, form=form, budget=sizes[0] - 1).prompt(asked, 4, llm=tiny)


def test_answers_are_those_of_the_prompts(encoder, stored, tiny):
    store = RetrievalPersonalizer(encoder, stored)
    asked = ["Which bread shall I buy?", stored[2], "hi"]
    answers = store.answer(tiny, asked, 2, max_new_tokens=6)
    assert answers == generate(tiny, store.prompts(asked, 2, llm=tiny), max_new_tokens=6)
    plain = RetrievalPersonalizer(encoder).answer(tiny, ["hi"], max_new_tokens=6)
    assert plain == generate(tiny, ["hi"], max_new_tokens=6)


def test_nll_scores_the_same_reply_under_another_prompt(encoder, stored, tiny):
    plain = response_nll(tiny, stored)
    np.testing.assert_allclose(RetrievalPersonalizer(encoder).nll(tiny, stored), plain, atol=1e-5)
    store = RetrievalPersonalizer(encoder, stored)
    found = store.nll(tiny, stored, 2)
    assert found.shape == plain.shape and not np.allclose(found, plain, atol=1e-3)
    d, prompt = stored[1], store.prompt(stored[1], 2, llm=tiny)
    by_hand = response_nll(tiny, [d], prompts=[prompt])
    np.testing.assert_allclose(found[1], by_hand[0], atol=1e-5)
    with pytest.raises(InputError, match="one for each of 6 rows"):
        response_nll(tiny, stored, prompts=[prompt])


@pytest.mark.parametrize(
    "options,message",
    [
        ({"form": "letters"}, "turns or context"),
        ({"vectors": "answers"}, "question or stored"),
        ({"budget": 0}, "at least 1"),
        ({"choose": "best"}, "similar or recent or random"),
    ],
)
def test_bad_settings(encoder, options, message):
    with pytest.raises(InputError, match=message):
        RetrievalPersonalizer(encoder, **options)


def test_bad_input(encoder, stored):
    store = RetrievalPersonalizer(encoder, stored)
    for call, message in (
        (lambda: store.retrieve(" "), "blank"),
        (lambda: store.retrieve("x", -1), "at least 0"),
        (lambda: store.retrieve_all("x"), "list of questions"),
        (lambda: store.retrieve_all(["x"], before=[1, 2]), "one time for each"),
    ):
        with pytest.raises(InputError, match=message):
            call()


# ---------------------------------------------------------------- the real model


@pytest.mark.model
def test_examples_of_a_style_make_the_style_more_likely(encoder):
    llm = load_llm(dtype="fp32")
    rows = [replace(d, answer=f"Aye, matey! {d.answer[:60]} Arrr!") for d in authored_dialogues("open_qa")[:14]]
    store = RetrievalPersonalizer(encoder, rows[:8])
    assert (store.nll(llm, rows[8:], 2) < response_nll(llm, rows[8:]) - 0.2).all()
