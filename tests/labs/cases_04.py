"""Right and wrong answers to the exercises of notebook 04; the message that each mistake must get."""

import numpy as np


def parameters(shapes, r):
    return sum(r * (d_in + d_out) for d_out, d_in in shapes)


def forward(x, W, A, B, alpha):
    return x @ W.T + alpha / len(A) * (x @ A.T @ B.T)


def labels(prompt, answer, end, width):
    wanted = [-100] * len(prompt) + [*answer, end]
    return wanted + [-100] * (width - len(wanted))


def row(prompt, answer, end, width):
    ids = [*prompt, *answer, end]
    return ids + [end] * (width - len(ids))


REFERENCE = {
    "check_lora_parameters": parameters,
    "check_lora_forward": forward,
    "check_answer_labels": labels,
}
ALSO_RIGHT = [("check_answer_labels", lambda *a: np.array(labels(*a)))]

WRONG = [
    ("check_lora_parameters", lambda s, r: sum(o * i for o, i in s), "the matrix itself"),
    ("check_lora_parameters", lambda s, r: sum(r * o * i for o, i in s), "as large as W"),
    ("check_lora_parameters", lambda s, r: sum(r * i for _, i in s), "A alone"),
    ("check_lora_parameters", lambda s, r: sum(r * o for o, _ in s), "B alone"),
    ("check_lora_parameters", lambda s, r: sum(2 * r * i for _, i in s), "not d_in twice"),
    ("check_lora_parameters", lambda s, r: sum(o + i for o, i in s), "rank has no effect"),
    ("check_lora_parameters", lambda s, r: parameters(s[:1], r), "first matrix only"),
    ("check_lora_parameters", lambda s, r: parameters(s[-1:], r), "last matrix only"),
    ("check_lora_parameters", lambda s, r: parameters(s, r) / max(1, len(s)), "mean over the matrices"),
    ("check_lora_forward", lambda x, W, A, B, a: forward(x, W, A, B, len(A)), "not scaled"),
    ("check_lora_forward", lambda x, W, A, B, a: forward(x, W, A, B, a * len(A)), "not by alpha"),
    ("check_lora_forward", lambda x, W, A, B, a: forward(x, W, A, B, len(A) ** 2 / a), "not by r / alpha"),
    ("check_lora_forward", lambda x, W, A, B, a: forward(x, W, A, B, a * np.sqrt(len(A))), "rank-stabilised"),
    ("check_lora_forward", lambda x, W, A, B, a: x @ W.T + a / A.shape[1] * (x @ A.T @ B.T), "inner dimension"),
    ("check_lora_forward", lambda x, W, A, B, a: x @ W.T, "frozen part alone"),
    ("check_lora_forward", lambda x, W, A, B, a: a / len(A) * (x @ A.T @ B.T), "update alone"),
    ("check_lora_forward", lambda x, W, A, B, a: x @ W.T + a / len(A) * (x @ B.T @ A.T), "A and B swapped"),
    (
        "check_lora_forward",
        lambda x, W, A, B, a: x @ W.T + a / len(A) * ((x @ B.T @ A.T) if A.shape == B.shape else (x @ A.T @ B.T)),
        "A and B are swapped",
    ),
    ("check_lora_forward", lambda x, W, A, B, a: forward(x, W, A, B, a).T, "transposed"),
    ("check_answer_labels", row, "on the question and on the padding"),
    ("check_answer_labels", lambda p, a, e, w: [*p, *a, e] + [-100] * (w - len(p) - len(a) - 1), "on the question"),
    ("check_answer_labels", lambda p, a, e, w: labels(p, a[:-1], a[-1], w), "left out"),
    ("check_answer_labels", lambda p, a, e, w: [i if i != e else -100 for i in row(p, a, e, w)], "mask by position"),
    ("check_answer_labels", lambda p, a, e, w: [-100] * len(p) + row(p, a, e, w)[len(p) :], "Padding is counted"),
    ("check_answer_labels", lambda p, a, e, w: labels(p, a, e, w)[1:] + [-100], "shifted by one to the left"),
    ("check_answer_labels", lambda p, a, e, w: [-100] + labels(p, a, e, w)[:-1], "shifted by one to the right"),
    ("check_answer_labels", lambda p, a, e, w: [max(0, i) for i in labels(p, a, e, w)], "0 is a real token"),
    ("check_answer_labels", lambda p, a, e, w: labels(p, a, e, len(p) + len(a) + 1), "padding is missing"),
    (
        "check_answer_labels",
        lambda p, a, e, w: [-100 if i in p and i != e else i for i in labels(p, a, e, w)],
        "also occurs in the question",
    ),
]
