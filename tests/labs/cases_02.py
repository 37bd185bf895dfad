"""Right and wrong answers to the exercises of notebook 02; the message that each mistake must get."""

import numpy as np


def reservoir(i, k, rng):
    slot = rng.integers(i + 1)
    return int(slot) if slot < k else None


def biased(chance, draw=lambda k, rng: int(rng.integers(k))):
    return lambda i, k, rng: draw(k, rng) if rng.random() < chance(i, k) else None


def chosen(rule, pick=None):
    """A replacement rule from a mask over the buffer and a way to pick one."""

    def function(new, scores, rng):
        candidates = np.flatnonzero(rule(new, scores))
        if len(candidates) == 0:
            return None
        return int((pick or (lambda c, rng: c[rng.integers(len(c))]))(candidates, rng))

    return function


def all_higher(new, scores):
    return (new > scores).all(axis=1)


def stored(texts, dim, budget, bin_bytes, *, extra=24, number=4, size=lambda t: len(t.encode())):
    fitting = [t for t in texts if size(t) + number * dim + extra <= bin_bytes]
    return min(len(fitting), budget // bin_bytes)


def stored_in_order(texts, dim, budget, bin_bytes):
    """The first sets get the bins, and whoever does not fit leaves one empty."""
    first = texts[: budget // bin_bytes]
    return stored(first, dim, budget, bin_bytes)


def stored_until_first_misfit(texts, dim, budget, bin_bytes):
    count = 0
    for t in texts:
        if count == budget // bin_bytes or (len(t.encode()) + 4 * dim + 24 > bin_bytes and t.startswith("c")):
            break
        count += len(t.encode()) + 4 * dim + 24 <= bin_bytes
    return count


def writes_input(new, scores, rng):
    scores[0] = 0
    return 0


def memory(i, k, rng, state=np.random.default_rng(5)):  # noqa: B008  # the mistake: a generator of its own
    return reservoir(i, k, state)


REFERENCE = {
    "check_reservoir_slot": reservoir,
    "check_replacement_slot": chosen(all_higher),
    "check_stored_sets": stored,
}
WRONG = [
    ("check_reservoir_slot", biased(lambda i, k: k / i), "newest is number i \\+ 1"),
    ("check_reservoir_slot", biased(lambda i, k: k / (i + 2)), "one too many"),
    ("check_reservoir_slot", biased(lambda i, k: 1 / (i + 1)), "together k / \\(i \\+ 1\\)"),
    ("check_reservoir_slot", biased(lambda i, k: 1 / k), "1 / k does not"),
    ("check_reservoir_slot", biased(lambda i, k: 1 - k / (i + 1)), "that of keeping"),
    ("check_reservoir_slot", biased(lambda i, k: 0.5), "fair coin"),
    ("check_reservoir_slot", biased(lambda i, k: 1.0), "Every newcomer gets in"),
    ("check_reservoir_slot", biased(lambda i, k: 0.8), "expected 0.400"),
    ("check_reservoir_slot", biased(lambda i, k: 0.4), "depend on i"),
    ("check_reservoir_slot", biased(lambda i, k: k / (i + 1), lambda k, rng: 0), "Always slot 0"),
    ("check_reservoir_slot", biased(lambda i, k: k / (i + 1), lambda k, rng: int(rng.integers(k - 1))), "never chosen"),
    (
        "check_reservoir_slot",
        biased(lambda i, k: k / (i + 1), lambda k, rng: int(k * rng.random() ** 2)),
        "not equally likely",
    ),
    ("check_reservoir_slot", lambda i, k, rng: int(rng.integers(i + 1)), "give back None where"),
    ("check_reservoir_slot", lambda i, k, rng: reservoir(i, k, rng) is not None, "whole number"),
    ("check_reservoir_slot", memory, "from nothing else"),
    ("check_replacement_slot", chosen(lambda n, s: (n > s).any(axis=1)), "not in any of them"),
    ("check_replacement_slot", chosen(lambda n, s: (n > s).any(axis=1), lambda c, rng: c[0]), "not in any of them"),
    ("check_replacement_slot", chosen(lambda n, s: (n > s).sum(axis=1) >= 2), "two of three"),
    ("check_replacement_slot", chosen(lambda n, s: (n >= s).all(axis=1)), "Equal is not higher"),
    ("check_replacement_slot", chosen(lambda n, s: n.mean() > s.mean(axis=1)), "make up for"),
    ("check_replacement_slot", chosen(lambda n, s: (n < s).all(axis=1)), "not lower"),
    ("check_replacement_slot", chosen(lambda n, s: n[0] > s[:, 0]), "first score"),
    ("check_replacement_slot", chosen(lambda n, s: np.ones(len(s), bool)), "whatever the scores say"),
    ("check_replacement_slot", chosen(all_higher, lambda c, rng: c[0]), "not the first"),
    ("check_replacement_slot", chosen(all_higher, lambda c, rng: c[-1]), "not the last"),
    ("check_replacement_slot", chosen(all_higher, lambda c, rng: c[1 % len(c)]), "not always the same"),
    ("check_replacement_slot", chosen(all_higher, lambda c, rng: rng.integers(len(c))), "not the place among"),
    ("check_replacement_slot", chosen(all_higher, lambda c, rng: c[int(len(c) * rng.random() ** 3)]), "equally likely"),
    ("check_replacement_slot", writes_input, "changes its input"),
    ("check_stored_sets", lambda *a: stored(*a, size=len), "not characters"),
    ("check_stored_sets", lambda t, d, b, n: stored(t, d, b, n, extra=25), "<= and not <"),
    ("check_stored_sets", lambda *a: stored(*a, number=8), "not 8"),
    ("check_stored_sets", lambda *a: stored(*a, number=2), "not 2"),
    ("check_stored_sets", lambda *a: stored(*a, extra=0), "three scores"),
    ("check_stored_sets", lambda *a: stored(*a, number=0), "embedding lies in"),
    ("check_stored_sets", lambda t, d, b, n: min(len(t), b // n), "more than a bin"),
    ("check_stored_sets", lambda t, d, b, n: b // n, "number of bins alone"),
    ("check_stored_sets", lambda t, d, b, n: min(b / n, stored(t, d, 10**6, n)), "// and not /"),
    ("check_stored_sets", lambda t, d, b, n: min(-(-b // n), stored(t, d, 10**6, n)), "round down"),
    ("check_stored_sets", lambda t, d, b, n: min(b // 65, stored(t, d, 10**6, n)), "not packed"),
    ("check_stored_sets", lambda t, d, b, n: stored(t, d, 10**6, n), "budget has no effect"),
    ("check_stored_sets", stored_in_order, "must not use up a bin"),
    ("check_stored_sets", stored_until_first_misfit, "must not end the stream"),
]

ALSO_RIGHT = [
    ("check_reservoir_slot", biased(lambda i, k: k / (i + 1))),
    ("check_replacement_slot", chosen(all_higher, lambda c, rng: rng.choice(c))),
]
