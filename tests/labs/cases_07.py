"""Right and wrong answers to the exercises of notebook 07; the message that each mistake must get."""

import math

import numpy as np


def count(layers, dim, heads, kv_heads, ffn, vocab, share_embedding):
    keys = dim // heads * kv_heads
    block = 2 * dim * dim + 2 * dim * keys + 3 * dim * ffn + 2 * dim
    return layers * block + vocab * dim * (1 if share_embedding else 2) + dim


def buys(vocab, dim, block):
    return vocab * dim // block


def choose(n, sizes, lora, retrieval):
    if n == 0:
        return "base"
    a, b = (np.interp(math.log(n), np.log(sizes), y) for y in (lora, retrieval))
    return "lora" if a < b else "retrieval"


def extrapolated(n, sizes, lora, retrieval):
    if n == 0:
        return "base"
    pair = slice(0, 2) if n < sizes[1] else slice(-2, None)
    x = np.log(sizes)[pair]
    a, b = (np.polyval(np.polyfit(x, y[pair], 1), math.log(n)) for y in (lora, retrieval))
    return "lora" if a < b - 1e-9 else "retrieval"


def linear(n, sizes, lora, retrieval):
    if n == 0:
        return "base"
    return "lora" if np.interp(n, sizes, lora) < np.interp(n, sizes, retrieval) else "retrieval"


def swapped(n, sizes, lora, retrieval):
    return {"lora": "retrieval", "retrieval": "lora", "base": "base"}[choose(n, sizes, lora, retrieval)]


def ties(n, sizes, lora, retrieval):
    return choose(n, sizes, np.array(lora) - 1e-9, retrieval)


REFERENCE = {"check_count_parameters": count, "check_sharing_buys": buys, "check_choose_method": choose}
ALSO_RIGHT = [("check_sharing_buys", lambda v, d, b: float(v * d // b))]

WRONG = [
    ("check_count_parameters", lambda *a: count(*a[:3], a[2], *a[4:]), "fewer heads than queries"),
    ("check_count_parameters", lambda *a: count(*a[:3], 1, *a[4:]), "not one"),
    ("check_count_parameters", lambda *a: count(*a) - a[0] * a[1] * a[4], "three matrices"),
    ("check_count_parameters", lambda *a: count(*a[:6], False), "counted twice"),
    ("check_count_parameters", lambda *a: count(*a) - a[5] * a[1], "embedding is missing"),
    ("check_count_parameters", lambda *a: count(*a) - a[0] * a[1] ** 2, "output matrix"),
    ("check_count_parameters", lambda *a: count(*a) - (2 * a[0] + 1) * a[1], "norms are missing"),
    ("check_count_parameters", lambda *a: count(*a) - a[0] * a[1], "two norms"),
    ("check_count_parameters", lambda *a: count(*a) - a[1], "last norm"),
    ("check_count_parameters", lambda *a: count(1, *a[1:]), "one layer"),
    ("check_count_parameters", lambda *a: count(*a[:6], True), "of its own"),
    ("check_sharing_buys", lambda v, d, b: v * d / b, "round down"),
    ("check_sharing_buys", lambda v, d, b: -(-v * d // b), "Rounded up"),
    ("check_sharing_buys", lambda v, d, b: 2 * v * d // b, "not two"),
    ("check_sharing_buys", lambda v, d, b: v * d, "How many blocks"),
    ("check_sharing_buys", lambda v, d, b: (v * d - 1) // b, "Exactly enough"),
    ("check_choose_method", swapped, "lower NLL is better"),
    ("check_choose_method", ties, "tie goes to retrieval"),
    ("check_choose_method", lambda n, *a: choose(max(n, 1), *a), "Without a single example"),
    ("check_choose_method", extrapolated, "do not extrapolate"),
    ("check_choose_method", linear, "log n, not over n"),
]
