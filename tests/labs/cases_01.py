"""Right and wrong answers to the exercises of notebooks 00 and 01; the message that each mistake must get."""

import numpy as np

from pllm_helpers.selection import domain_specific_score, entropy_of_embedding, in_domain_dissimilarity


def megabytes(parameters, bits):
    return parameters * bits / 8 / 1e6


def softmax(logits, temperature):
    if temperature == 0:
        return (np.arange(len(logits)) == np.argmax(logits)).astype(float)
    e = np.exp((logits - logits.max()) / temperature)
    return e / e.sum()


REFERENCE = {
    "check_weight_megabytes": megabytes,
    "check_temperature_softmax": softmax,
    "check_norm_entropy": lambda v: entropy_of_embedding(v, reading="norm"),
    "check_domain_score": domain_specific_score,
    "check_dissimilarity": in_domain_dissimilarity,
}


def norm_p(v):
    n = np.linalg.norm(v, axis=1)
    return n / n.sum()


def mutating(tokens, lexicons):
    tokens.clear()
    return 0.1875


def cos(e, o):
    return o @ e / np.linalg.norm(o, axis=1) / np.linalg.norm(e)


WRONG = [
    ("check_weight_megabytes", lambda n, b: n * b / 1e6, "megabits"),
    ("check_weight_megabytes", lambda n, b: n * b / 8, "bytes: divide"),
    ("check_weight_megabytes", lambda n, b: n * b / 8 / 2**20, "mebibytes"),
    ("check_weight_megabytes", lambda n, b: n * (b // 8) / 1e6, "half a byte"),
    ("check_weight_megabytes", lambda n, b: n * b // 8 // 10**6, "whole number"),
    ("check_temperature_softmax", lambda x, t: np.exp(x / t), "divide by their sum"),
    ("check_temperature_softmax", lambda x, t: softmax(x * t, 1), "Divide the logits by the temperature"),
    ("check_temperature_softmax", lambda x, t: softmax(x, 1), "no effect"),
    ("check_temperature_softmax", lambda x, t: np.exp(x / t) / np.exp(x / t).sum(), "overflows"),
    (
        "check_temperature_softmax",
        lambda x, t: np.exp((x - x.max()) / t) / np.exp((x - x.max()) / t).sum(),
        "Temperature 0",
    ),
    ("check_norm_entropy", lambda v: (norm_p(v) * np.log(norm_p(v))).sum() / np.log(len(v)), "minus sign"),
    ("check_norm_entropy", lambda v: -(norm_p(v) * np.log(norm_p(v))).sum(), "Divide by log n"),
    ("check_norm_entropy", lambda v: -(norm_p(v) * np.log2(norm_p(v))).sum() / np.log(len(v)), "one base"),
    ("check_norm_entropy", lambda v: -(norm_p(v.T) * np.log(norm_p(v.T))).sum() / np.log(v.shape[1]), "axis=1"),
    ("check_norm_entropy", lambda v: -(norm_p(v) * np.log(norm_p(v))).sum() / np.log(len(v)), "single token"),
    ("check_domain_score", lambda t, lex: np.mean([len(set(t) & w) / len(set(t)) for w in lex.values()]), "not a set"),
    ("check_domain_score", lambda t, lex: sum(sum(x in w for x in t) / len(t) for w in lex.values()), "not the sum"),
    (
        "check_domain_score",
        lambda t, lex: max(sum(x in w for x in t) / len(t) for w in lex.values()),
        "not the best one",
    ),
    ("check_domain_score", mutating, "changes its input"),
    ("check_dissimilarity", lambda e, o: cos(e, o).mean(), "similarity"),
    ("check_dissimilarity", lambda e, o: (1 - o @ e).mean(), "both lengths"),
    ("check_dissimilarity", lambda e, o: (1 - cos(e, o)).sum(), "not the sum"),
    ("check_dissimilarity", lambda e, o: (1 - cos(e, o)).mean(), "empty domain"),
    ("check_dissimilarity", lambda e, o: (1 - cos(e, o)).mean() if len(o) else 0.0, "1, not 0"),
]
