"""Rows, truncation and batches of the training data."""

import pytest

from pllm_helpers.dialogue import DialogueSet
from pllm_helpers.runtime import InputError
from pllm_helpers.tuning.data import batch_order, batch_stream, padded, token_rows
from tests.unit.tuning_kit import dialogue_sets, tiny_llm


@pytest.fixture(scope="module")
def llm():
    return tiny_llm()


def test_a_row_is_the_templated_question_then_the_answer_and_the_end_of_turn(llm):
    d = DialogueSet("u", "How are you?", " Fine, thanks. ")
    (row,) = token_rows(llm, [d], 512).rows
    decode = llm.tokenizer.decode
    assert decode(row.ids[: -row.answer]) == llm.format_chat("How are you?")
    assert decode(row.ids[-row.answer :]) == "Fine, thanks.<|im_end|>"
    # the same text as the template gives for the whole conversation
    whole = [{"role": "user", "content": "How are you?"}, {"role": "assistant", "content": "Fine, thanks."}]
    assert decode(row.ids) == llm.format_chat(whole, add_generation_prompt=False).rstrip("\n")
    assert llm.end_of_turn == 2


def test_a_long_question_loses_its_start_and_the_answer_stays_whole(llm):
    question = " ".join(f"word{i} naïve 日本語 🎈" for i in range(60))
    long = DialogueSet("u", question, "A short answer.")
    rows = token_rows(llm, [long, DialogueSet("u", "hi", "yo")], 100)
    first = rows.rows[0]
    text = llm.tokenizer.decode(first.ids)
    assert rows.shortened == 1 and len(first.ids) <= 100
    assert text.startswith(llm.format_chat("").split("<|im_end|>")[0])  # the template's head
    assert text.endswith("word59 naïve 日本語 🎈<|im_end|>\n<|im_start|>assistant\nA short answer.<|im_end|>")
    assert "word0 " not in text and len(first.ids) > 85  # as much as fits
    with pytest.raises(InputError, match="at most 100"):
        token_rows(llm, [long], 100, cut=False)


def test_refuses_what_cannot_be_trained_on(llm):
    good = DialogueSet("u", "hi", "yo")
    for bad, message in (
        ([], "at least one"),
        ([good, DialogueSet("u", "only a question", "")], r"dialogues\[1\].*blank"),
        ([DialogueSet("u", " ", "only an answer")], "blank"),
        ([DialogueSet("u", "hi", "long " * 600)], "too long"),
    ):
        with pytest.raises(InputError, match=message):
            token_rows(llm, bad, 512)


def test_hash_tells_data_apart(llm):
    data = dialogue_sets()
    assert token_rows(llm, data, 512).hash == token_rows(llm, list(data), 512).hash
    assert token_rows(llm, data, 512).hash != token_rows(llm, data[::-1], 512).hash


def test_batches_cover_each_pass_once_and_hold_similar_lengths():
    lengths = [(7 * i) % 101 for i in range(101)]
    for epoch in range(3):
        batches = batch_order(lengths, 8, 5, epoch)
        assert sorted(i for b in batches for i in b) == list(range(101))
        assert [len(b) for b in batches].count(8) == 12 and min(map(len, batches)) == 5
    spread = [max(lengths[i] for i in b) - min(lengths[i] for i in b) for b in batches]
    assert sum(spread) / len(spread) < 35  # of 8 rows at random: about 78
    assert batch_order(lengths, 8, 5, 0) == batch_order(lengths, 8, 5, 0)
    assert batch_order(lengths, 8, 5, 0) != batch_order(lengths, 8, 5, 1) != batch_order(lengths, 8, 6, 1)


def test_a_stream_may_start_anywhere():
    lengths = list(range(19))
    stream = batch_stream(lengths, 4, 9)
    whole = [next(stream) for _ in range(23)]
    for skip in (0, 3, 5, 17):
        later = batch_stream(lengths, 4, 9, skip)
        assert [next(later) for _ in range(23 - skip)] == whole[skip:]
    assert len(next(batch_stream([5, 6], 8, 0))) == 2  # fewer dialogues than a batch


def test_padding_is_masked(llm):
    rows = token_rows(llm, dialogue_sets(3), 512).rows
    ids, mask = padded(rows, 0)
    assert mask.sum(1).tolist() == [len(r.ids) for r in rows]
    assert ids[0, : len(rows[0].ids)].tolist() == rows[0].ids
