"""Right and wrong answers to the exercises of notebook 03; the message that each mistake must get."""

import re
from collections import Counter


def bracketed_text(raw):
    for found in re.findall(r"\[([^\[\]]*)(?:\]|$)", raw):
        if found.strip():
            return found.strip()
    return None


def words(text):
    return re.findall(r"[a-z0-9]+", text.lower())


def f1(shared, a, b):
    return 2 * shared / (len(a) + len(b)) if a and b else 0.0


def rouge1(reference, text, split=words):
    a, b = split(reference), split(text)
    return f1(sum((Counter(a) & Counter(b)).values()), a, b)


def recall(reference, text):
    a, b = words(reference), words(text)
    return sum((Counter(a) & Counter(b)).values()) / len(a)


def sets(reference, text):
    a, b = set(words(reference)), set(words(text))
    return f1(len(a & b), a, b)


def unclipped(reference, text):
    a, b = words(reference), words(text)
    return f1(sum(w in a for w in b), a, b)


def keep_paraphrases(texts, scores, low, high):
    kept, seen = [], set()
    for text, score in zip(texts, scores, strict=True):
        if low <= score <= high and tuple(words(text)) not in seen:
            seen.add(tuple(words(text)))
            kept.append(text)
    return kept


def keep(inside, key=lambda t: tuple(words(t)), early=False):
    def wrong(texts, scores, low, high):
        kept, seen = [], set()
        for text, score in zip(texts, scores, strict=True):
            fine, new = inside(score, low, high), key(text) not in seen
            if fine and new:
                kept.append(text)
            if fine or early:
                seen.add(key(text))
        return kept

    return wrong


def within(score, low, high):
    return low <= score <= high


def neighbours(texts, scores, low, high):
    kept = []
    for text, score in zip(texts, scores, strict=True):
        if low <= score <= high and not (kept and words(kept[-1]) == words(text)):
            kept.append(text)
    return kept


REFERENCE = {
    "check_bracketed_text": bracketed_text,
    "check_rouge1": rouge1,
    "check_keep_paraphrases": keep_paraphrases,
}

WRONG = [
    ("check_bracketed_text", lambda t: re.search(r"\[.*?\]", t, re.DOTALL)[0], "Take the brackets off"),
    ("check_bracketed_text", lambda t: re.search(r"\[(.*?)\]", t, re.DOTALL)[1], "strip"),
    ("check_bracketed_text", lambda t: re.findall(r"\[(.*?)\]", t), "not a list"),
    ("check_bracketed_text", lambda t: t, "whole output"),
    ("check_bracketed_text", lambda t: re.search(r"\[(.*)\]", t)[1].strip(), "greedy"),
    ("check_bracketed_text", lambda t: re.findall(r"\[([^\]]*)\]", t)[-1].strip(), "not the last"),
    ("check_bracketed_text", lambda t: re.search(r"\[([^\]]*)\]", t)[1].strip(), "Empty brackets"),
    (
        "check_bracketed_text",
        lambda t: next((f.strip() for f in re.findall(r"\[(.+?)\]", t) if f.strip()), None),
        "DOTALL",
    ),
    ("check_bracketed_text", lambda t: bracketed_text(t) or "", "give back None, not ''"),
    (
        "check_bracketed_text",
        lambda t: next(f.strip() for f in re.findall(r"\[([^\]]*)\]", t) if f.strip()),
        "Without brackets it stops with StopIteration",
    ),
    (
        "check_bracketed_text",
        lambda t: next((f.strip() for f in re.findall(r"\[([^\]]*)\]", t) if f.strip()), None),
        "never closed",
    ),
    ("check_rouge1", recall, "That is recall"),
    ("check_rouge1", lambda a, b: recall(b, a), "That is precision"),
    ("check_rouge1", lambda a, b: (recall(a, b) + recall(b, a)) / 2, "harmonic"),
    ("check_rouge1", sets, "Sets forget"),
    ("check_rouge1", unclipped, "clip its count"),
    ("check_rouge1", lambda a, b: rouge1(a, b) / 2, "2PR"),
    ("check_rouge1", lambda a, b: rouge1(a, b, lambda t: re.findall(r"\w+", t)), "Upper and lower case"),
    ("check_rouge1", lambda a, b: rouge1(a, b, lambda t: t.lower().split()), "Punctuation sticks"),
    ("check_rouge1", lambda a, b: 2 / (1 / recall(a, b) + 1 / recall(b, a)), "division by zero"),
    ("check_keep_paraphrases", keep(lambda s, low, high: low <= s), "no upper bound"),
    ("check_keep_paraphrases", keep(lambda s, low, high: s <= high), "no lower bound"),
    ("check_keep_paraphrases", keep(lambda s, low, high: low < s < high), "The bounds belong"),
    ("check_keep_paraphrases", keep(lambda s, low, high: low < s <= high), "lower bound belongs"),
    ("check_keep_paraphrases", keep(lambda s, low, high: low <= s < high), "upper bound belongs"),
    ("check_keep_paraphrases", keep(lambda s, low, high: not low <= s <= high), "upside down"),
    ("check_keep_paraphrases", lambda *a: sorted(keep_paraphrases(*a)), "in their order"),
    ("check_keep_paraphrases", lambda t, *a: t, "Nothing is checked"),
    ("check_keep_paraphrases", lambda t, s, low, high: [x for x in s if low <= x <= high], "not their scores"),
    (
        "check_keep_paraphrases",
        lambda t, s, low, high: [x for x, y in zip(t, s, strict=True) if low <= y <= high],
        "Repeats stay in",
    ),
    ("check_keep_paraphrases", keep(within, key=str), "case or punctuation"),
    ("check_keep_paraphrases", lambda t, *a: keep_paraphrases(t[::-1], a[0][::-1], *a[1:])[::-1], "not the last"),
    ("check_keep_paraphrases", neighbours, "Only neighbours"),
    ("check_keep_paraphrases", keep(within, early=True), "must not block"),
]
