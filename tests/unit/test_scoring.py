"""The batched scores on the real encoder and real messages against the scalar functions."""

import numpy as np
import pytest

from pllm_helpers.corpora import chitchat_stream
from pllm_helpers.dialogue import DialogueSet
from pllm_helpers.models import load_encoder, load_llm
from pllm_helpers.runtime import InputError
from pllm_helpers.selection import (
    READINGS,
    domain_specific_score,
    dominant_domain,
    entropy_of_embedding,
    in_domain_dissimilarity,
    llm_batches,
    load_lexicons,
    reading_evidence,
    score_dialogues,
    word_tokens,
)


@pytest.fixture(scope="module")
def encoder():
    return load_encoder()


@pytest.fixture(scope="module")
def lexicons():
    return load_lexicons()


@pytest.fixture(scope="module")
def stream():
    return chitchat_stream(0).stream[:200]


@pytest.mark.parametrize("reading", READINGS)
@pytest.mark.parametrize("mode", ["paper", "released_code"])
def test_real_messages_equal_the_scalar_functions(encoder, lexicons, stream, reading, mode):
    table = score_dialogues(stream, encoder, lexicons, reading=reading, mode=mode, batch_size=16)
    for row, (d, e) in enumerate(zip(stream, encoder.embed([d.text for d in stream]), strict=True)):
        words = word_tokens(d.text)
        assert table.eoe[row] == pytest.approx(entropy_of_embedding(e.vectors, reading, mode=mode), abs=1e-4)
        assert table.dss[row] == pytest.approx(domain_specific_score(words, lexicons))
        assert table.domain_names[row] == dominant_domain(words, lexicons)
        assert (table.n_tokens[row], table.n_words[row]) == (len(e.tokens), len(words))
        np.testing.assert_allclose(table.embeddings[row], e.sentence, atol=1e-5)


def test_idd_against_a_buffer(encoder, lexicons, stream):
    table = score_dialogues(stream, encoder, lexicons)
    buffer, names = table.embeddings[:40], table.domain_names[:40]
    scores = table.idd_against(buffer, names)
    for row in range(len(stream)):
        same = buffer[[name == table.domain_names[row] for name in names]]
        assert scores[row] == pytest.approx(in_domain_dissimilarity(table.embeddings[row], same), abs=1e-6)
    with pytest.raises(InputError, match="domains"):
        table.idd_against(buffer, names[:3])


def test_texts_and_dialogues_score_alike_in_any_order(encoder, lexicons, stream):
    table = score_dialogues(stream[:50], encoder, lexicons)
    texts = [d.text for d in stream[:50]][::-1]
    other = score_dialogues(texts, encoder, lexicons, batch_size=7)
    np.testing.assert_allclose(table.eoe, other.eoe[::-1], atol=1e-5)
    np.testing.assert_allclose(table.dss, other.dss[::-1])
    assert list(table.to_pandas().columns) == ["eoe", "dss", "domain", "n_tokens", "n_words"]


def test_hidden_states_of_the_language_model(lexicons, stream):
    import torch

    llm = load_llm(dtype="fp32")
    texts = [d.text for d in stream[:6]]
    for layer in (-1, 15):
        table = score_dialogues(texts, llm_batches(llm, layer=layer), lexicons, batch_size=4)
        for row, text in enumerate(texts):
            with torch.inference_mode():
                out = llm.model(**llm.tokenizer(text, return_tensors="pt"), output_hidden_states=True)
            states = out.hidden_states[layer][0]
            assert table.eoe[row] == pytest.approx(entropy_of_embedding(states, "spectral"), abs=1e-3)
            last = states[-1] / states[-1].norm()  # the released code embeds a text by its last token
            np.testing.assert_allclose(table.embeddings[row], last.numpy(), atol=1e-4)


def test_odd_texts(encoder, lexicons):
    odd = ["", "ok", "🙂🙂🙂", "你好,世界", "a" * 5000, "word " * 2000, "<script>alert(1)</script>", "\u200b"]
    table = score_dialogues(odd, encoder, lexicons)
    assert np.isfinite(table.eoe).all() and (table.eoe >= 0).all() and (table.eoe <= 1).all()
    assert table.eoe[0] == 0 and table.domain[0] == -1
    assert len(score_dialogues([], encoder, lexicons)) == 0


def test_refuses(encoder, lexicons):
    for arguments in ({"reading": "x"}, {"mode": "x"}, {"batch_size": 0}):
        with pytest.raises(InputError, match=next(iter(arguments))):
            score_dialogues([DialogueSet("u", "a", "b")], encoder, lexicons, **arguments)
    with pytest.raises(InputError, match="dialogues"):
        score_dialogues("one text", encoder, lexicons)


def test_evidence_for_the_default_reading(encoder, stream):
    table = reading_evidence(encoder, [d.text for d in stream[:80]])
    assert list(table.index) == list(READINGS)
    assert table.loc["spectral", "content_over_repetition"] > 0.95 > table.loc["norm", "content_over_repetition"]
    assert table.loc["norm", "sd"] < 0.05 < table.loc["spectral", "sd"]
    with pytest.raises(InputError, match="at least 10"):
        reading_evidence(encoder, ["hello there you"])
