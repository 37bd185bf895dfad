"""Lexicon files that ship, user files, their errors, and words in texts."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pllm_helpers.runtime import InputError, data_dir
from pllm_helpers.selection import BUILT_IN, Lexicons, highlight, load_lexicons, read_lexicon, word_tokens
from pllm_helpers.selection.lexicons import count_hits


def test_built_in_lists_are_clean():
    lexicons = load_lexicons()
    assert list(lexicons) == [name for members in BUILT_IN.values() for name in members]
    for name, words in lexicons.items():
        assert len(words) >= 150, name
        assert all(word_tokens(w) == [w] for w in words), name
    for family in ("medical", "emotion"):
        for path in (data_dir() / "lexicons" / family).glob("*.txt"):
            lines = [x for x in path.read_text(encoding="utf-8").splitlines() if not x.startswith("#")]
            assert lines == sorted(set(lines)), path.name
            assert path.name in (data_dir() / "lexicons" / "DATASHEET.md").read_text(encoding="utf-8")
    assert {"dose", "inhale", "pills", "vial"} <= lexicons["administration"]
    assert {"arm", "pelvis", "sinus", "breast"} <= lexicons["anatomy"]
    assert {"ibuprofen", "metformin"} <= lexicons["drug"] and not {"the", "and", "air", "oral"} & lexicons["drug"]
    authored = set().union(*load_lexicons("medical", "emotion").values())
    assert not {"gold", "protein", "yellow", "factor", "back", "course", "sure", "kind", "awesome"} & authored
    assert "terrified" in lexicons["fear"] and "astonished" in lexicons["surprise"] and "loyal" in lexicons["trust"]
    assert any("share" in note for note in lexicons.notes)


def test_one_list_of_a_family():
    assert list(load_lexicons("medical/drug", "emotion")) == ["drug", "fear", "surprise", "trust"]
    with pytest.raises(InputError, match="twice"):
        load_lexicons("medical", "medical/drug")


def test_user_files(tmp_path):
    plain = tmp_path / "garden.txt"
    plain.write_text("\ufeff# my garden\nRose\n\ntulip\nrose\nfollow-up\nCAFÉ\n", encoding="utf-8")
    lexicons = load_lexicons(plain)
    assert lexicons["garden"] == {"rose", "tulip", "follow-up", "café"}
    assert any("1 repeated" in n for n in lexicons.notes)
    released = tmp_path / "released.txt"
    released.write_text("pets\tdog,cat\nfood\tbread\npets\tbird,\n", encoding="utf-8")
    assert read_lexicon(released) == {"pets": ["dog", "cat", "bird"], "food": ["bread"]}  # no line is lost
    assert set(load_lexicons(tmp_path)) == {"garden", "pets", "food"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "words"),
        (b"# only a comment\n", "words"),
        (b"good\ntwo words\n", "line 2.*two words"),
        (b"caf\xe9\n", "UTF-8"),
        (b"b12\n", "line 1.*b12"),
        (b"\tdog\n", "name before the tab"),
    ],
)
def test_unusable_files(tmp_path, content, message):
    path = tmp_path / "mine.txt"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        load_lexicons(path)


def test_typographic_apostrophes_match():
    assert Lexicons({"x": ["Don’t"]})["x"] == {"don't"} == set(word_tokens("don’t"))


def test_unknown_names(tmp_path):
    with pytest.raises(InputError, match="'medical'"):
        load_lexicons("medcal")
    with pytest.raises(InputError, match="found none"):
        load_lexicons(tmp_path)
    with pytest.raises(InputError, match="at least one word"):
        Lexicons({"empty": [" "]})
    with pytest.raises(InputError, match="collection"):
        Lexicons({"text": "words"})
    with pytest.raises(InputError, match="at least one list"):
        Lexicons({})


def test_words():
    assert word_tokens("Don’t take 2x200mg; IBUPROFEN, follow-up at 5!") == [
        "don't",
        "take",
        "x",
        "mg",
        "ibuprofen",
        "follow-up",
        "at",
    ]
    assert word_tokens("🙂 123 …") == [] and word_tokens("Straße мир 你好") == ["strasse", "мир", "你好"]


@given(st.text(max_size=60))
def test_highlight_covers_the_words(text):
    lexicons = Lexicons({"a": ["a", "the"], "b": ["the", "мир"]})
    spans = highlight(text, lexicons)
    assert [s.word for s in spans] == word_tokens(text)
    for before, after in zip(spans, spans[1:], strict=False):
        assert before.end <= after.start
    for s in spans:
        assert text[s.start : s.end].casefold().replace("’", "'") == s.word
        assert s.lexicons == tuple(n for n in lexicons if s.word in lexicons[n])
    hits, words = count_hits([word_tokens(text)], lexicons)
    assert hits[0].tolist() == [sum(n in s.lexicons for s in spans) for n in lexicons] and words[0] == len(spans)
