"""Checks for the exercises of notebook 03."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .checks import Mistake, passed, probe


def check_bracketed_text(function: Callable[..., Any]) -> None:
    """``function(raw)``: the text in the first brackets that hold any; to the end if never closed; else ``None``."""
    probe(
        function,
        ("Sure! Here it is: [ See you tomorrow. ] I hope this helps.",),
        "See you tomorrow.",
        {
            "Take the brackets off.": "[ See you tomorrow. ]",
            "Take the white space around the text off: strip().": " See you tomorrow. ",
            "Give back the text, not a list of matches.": ["See you tomorrow."],
            "Give back the text, not a list of the matches.": [" See you tomorrow. "],
            "The whole output came back: only what stands in brackets counts.": (
                "Sure! Here it is: [ See you tomorrow. ] I hope this helps."
            ),
        },
    )

    def told(raw: str) -> Any:  # ``None`` is an answer here
        text = function(raw)
        return "None" if text is None else text

    told.__name__ = getattr(function, "__name__", "your function")
    probe(
        told,
        ("[See you tomorrow.] or else [Until tomorrow, then.]",),
        "See you tomorrow.",
        {
            "A greedy pattern runs from the first [ to the last ]: use .*? or [^\\]]*.": (
                "See you tomorrow.] or else [Until tomorrow, then."
            ),
            "The first text in brackets counts, not the last.": "Until tomorrow, then.",
        },
    )
    probe(
        told,
        ("I use [ ] as you asked: [See you\ntomorrow.]",),
        "See you\ntomorrow.",
        {
            "Empty brackets hold no text (this model likes to repeat the [ ] of the prompt): look further.": "",
            "The dot of a pattern stops at a line break: pass re.DOTALL, or use [^\\]]*.": "None",
            "Skip empty brackets as a whole, they start no text.": "] as you asked: [See you\ntomorrow.",
        },
    )
    try:
        found = function("No brackets here.")
    except Exception as e:
        raise Mistake(f"Without brackets it stops with {type(e).__name__}: {e}. Give back None.") from e
    if found is not None:
        raise Mistake(f"Without brackets there is no text: give back None, not {found!r}.")
    probe(
        told,
        ("[See you tomorrow, and bring",),
        "See you tomorrow, and bring",
        {"A bracket that is never closed (the token limit cut it) runs to the end.": "None"},
    )
    passed("bracketed_text")


def check_rouge1(function: Callable[..., Any]) -> None:
    """``function(reference, text)``: ROUGE-1 F1 of two texts, words in lower case without punctuation."""
    reference, text = "the cat sat on the mat today", "the cat the cat slept"
    # clipped: the 2, cat 1 -> 3; recall 3/7, precision 3/5
    probe(
        function,
        (reference, text),
        0.5,
        {
            "That is recall: how much of the reference was found. Combine it with precision.": 3 / 7,
            "That is precision: how much of the text stands in the reference. Combine it with recall.": 3 / 5,
            "F1 is the harmonic mean 2PR/(P+R), not the plain mean of precision and recall.": (3 / 7 + 3 / 5) / 2,
            "Sets forget how often a word occurs: count words, and take the smaller count of each.": 4 / 9,
            "That mixes sets and counts: the overlap is the sum over words of the smaller count.": 2 * 2 / 12,
            "A word counts at most as often as the other text has it: clip its count.": 2 * 4 / 12,
            "That is twice too small: F1 is 2PR/(P+R).": 0.25,
        },
    )
    probe(
        function,
        ("Really? anna Yes ok", "really anna yes no"),
        0.75,
        {
            "Upper and lower case are the same word: use lower().": 0.25,
            "Punctuation sticks to the words: split at everything that is neither a letter nor a digit.": 0.5,
        },
        otherwise="Words are runs of letters and digits, in lower case.",
    )
    probe(
        function,
        ("hello there", "?!"),
        0.0,
        {},
        otherwise="Texts without a common word score 0; mind the division by zero.",
    )
    passed("rouge1")


def check_keep_paraphrases(function: Callable[..., Any]) -> None:
    """``function(texts, scores, low, high)``: texts whose score lies in [low, high], the first of each kind."""
    texts = ["new words, same sense", "a copy", "something else", "just enough", "just not too much"]
    scores = [0.6, 1.0, 0.1, 0.4, 0.8]
    right = [texts[0], texts[3], texts[4]]
    probe(
        function,
        (texts, scores, 0.4, 0.8),
        right,
        {
            "There is no upper bound: a copy is not a paraphrase.": [texts[0], texts[1], texts[3], texts[4]],
            "There is no lower bound: a text about something else got through.": [
                texts[0],
                texts[2],
                texts[3],
                texts[4],
            ],
            "The bounds belong to the range: use <= and not <.": [texts[0]],
            "The lower bound belongs to the range: use <= and not <.": [texts[0], texts[4]],
            "The upper bound belongs to the range: use <= and not <.": [texts[0], texts[3]],
            "The result is upside down: these are the texts to drop.": [texts[1], texts[2]],
            "Give back the texts in their order; these are sorted.": sorted(right),
            "Give back the texts, not their scores.": [0.6, 0.4, 0.8],
            "Nothing is checked: every text is kept.": texts,
        },
    )
    again = ["See you at eight.", "see you at eight", "Until eight, then", "See you at eight."]
    probe(
        function,
        (again, [0.6, 0.6, 0.5, 0.6], 0.4, 0.8),
        [again[0], again[2]],
        {
            "Repeats stay in: keep only the first of equal texts.": again,
            "Texts that differ in case or punctuation alone are the same: compare their words.": again[:3],
            "Keep the first of equal texts, not the last.": [again[2], again[3]],
            "Only neighbours are compared: remember every text kept so far.": [again[0], again[2], again[3]],
        },
        otherwise="Two texts are equal if their words are, in lower case and without punctuation.",
    )
    probe(
        function,
        (["Twice said.", "twice said"], [0.9, 0.7], 0.4, 0.8),
        ["twice said"],
        {"A rejected text must not block a later one: check the score before you look for repeats.": []},
    )
    passed("keep_paraphrases")
