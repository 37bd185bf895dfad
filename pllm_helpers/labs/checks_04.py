"""Checks for the exercises of notebook 04."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .checks import passed, probe

__all__ = ["check_answer_labels", "check_lora_forward", "check_lora_parameters"]


def check_lora_parameters(function: Callable[..., Any]) -> None:
    """``function(shapes, r)``: trained numbers of LoRA on matrices of shape ``(d_out, d_in)``."""
    probe(
        function,
        ([(192, 576)], 8),
        8 * (192 + 576),
        {
            "That is the matrix itself. LoRA leaves it alone and trains A (r x d_in) and B (d_out x r).": 192 * 576,
            "B·A is as large as W, but only A and B are stored and trained: add their sizes.": 8 * 192 * 576,
            "That is A alone, of shape (r, d_in). B counts, too.": 8 * 576,
            "That is B alone, of shape (d_out, r). A counts, too.": 8 * 192,
            "A has r·d_in entries and B has d_out·r: both sides of W count, not d_in twice.": 8 * 2 * 576,
            "A has r·d_in entries and B has d_out·r: both sides of W count, not d_out twice.": 8 * 2 * 192,
            "The rank has no effect: A and B have r rows and r columns.": 192 + 576,
            "W stays frozen: only A and B are trained.": 192 * 576 + 8 * (192 + 576),
            "Divided by r; each of A and B has r times as many numbers as W has rows or columns.": (192 + 576) / 8,
        },
    )
    probe(
        function,
        ([(192, 576), (576, 576), (64, 576)], 4),
        4 * (768 + 1152 + 640),
        {
            "That is the first matrix only: sum over all of them.": 4 * 768,
            "That is the last matrix only: sum over all of them.": 4 * 640,
            "That is the mean over the matrices, not their sum.": 4 * (768 + 1152 + 640) / 3,
            "All matrices are counted with the shape of the first; their shapes differ.": 3 * 4 * 768,
        },
        otherwise="Sum r·(d_in + d_out) over the matrices.",
    )
    probe(function, ([], 4), 0, {}, otherwise="Without a matrix there is nothing to train: 0.")
    passed("lora_parameters")


def check_lora_forward(function: Callable[..., Any]) -> None:
    """``function(x, W, A, B, alpha)``: shapes ``(n, d_in)``, ``(d_out, d_in)``, ``(r, d_in)``, ``(d_out, r)``."""
    rng = np.random.default_rng(0)
    x, W = rng.normal(size=(3, 5)), rng.normal(size=(4, 5))
    A, B, alpha = rng.normal(size=(2, 5)), rng.normal(size=(4, 2)), 16.0
    base, update = x @ W.T, x @ A.T @ B.T
    probe(
        function,
        (x, W, A, B, alpha),
        base + alpha / 2 * update,
        {
            "The update is not scaled: multiply it by alpha / r.": base + update,
            "Scale by alpha / r, not by alpha: r is the number of rows of A.": base + alpha * update,
            "Scale by alpha / r, not by r / alpha.": base + 2 / alpha * update,
            "Scale by alpha / r, not by 1 / r.": base + update / 2,
            "alpha / sqrt(r) is another method (rank-stabilised LoRA): here it is alpha / r.": base
            + alpha / np.sqrt(2) * update,
            "r is the inner dimension of B·A: A.shape[0], not A.shape[1].": base + alpha / 5 * update,
            "r is the inner dimension of B·A: B.shape[1], not B.shape[0].": base + alpha / 4 * update,
            "alpha / r scales the update only, not the frozen part.": alpha / 2 * (base + update),
            "This is the frozen part alone: add the update.": base,
            "This is the update alone: add the frozen part, x times W.": alpha / 2 * update,
            "The update is added, not subtracted.": base - alpha / 2 * update,
            "The result is transposed: expected one row per row of x.": (base + alpha / 2 * update).T,
        },
        otherwise="x (n, d_in) goes through A (down to r numbers a row) and then through B (up to d_out): "
        "are A and B swapped, or is one not transposed?",
    )
    # square everything: here a wrong order of A and B runs through without an error
    x, W, A, B = (rng.normal(size=(3, 3)) for _ in range(4))
    base, right = x @ W.T, x @ A.T @ B.T
    probe(
        function,
        (x, W, A, B, alpha),
        base + alpha / 3 * right,
        {
            "A and B are swapped: x goes through A first (down to r numbers), then through B (up again).": base
            + alpha / 3 * (x @ B.T @ A.T),
            "Transpose: a weight of shape (d_out, d_in) is applied as x @ W.T, and so are A and B.": x @ W
            + alpha / 3 * (x @ A @ B),
            "Transpose A and B as well: x @ A.T @ B.T.": base + alpha / 3 * (x @ A @ B),
            "Transpose A and B as well, and A comes first: x @ A.T @ B.T.": base + alpha / 3 * (x @ B @ A),
            "Transpose W: a weight of shape (d_out, d_in) is applied as x @ W.T.": x @ W + alpha / 3 * right,
        },
    )
    passed("lora_forward")


def check_answer_labels(function: Callable[..., Any]) -> None:
    """``function(prompt, answer, end, width)``: labels of the row ``prompt + answer + [end]``, padded with ``end``.

    ``-100`` where no loss is wanted; label ``t`` belongs to input ``t`` (the model shifts by itself).
    """
    prompt, answer, end, width = [1, 15, 16, 17, 2, 1], [23, 24, 25], 2, 13
    row = [*prompt, *answer, end] + [end] * 3
    p, n = len(prompt), len(prompt) + len(answer) + 1
    skip = [-100]
    right = skip * p + [*answer, end] + skip * (width - n)

    def inside(ids: list[int], wanted: list[bool]) -> list[int]:
        return [i if w else -100 for i, w in zip(ids, wanted, strict=True)]

    probe(
        function,
        (prompt, answer, end, width),
        right,
        {
            "There is loss on the question: its labels must be -100.": inside(row, [t < n for t in range(width)]),
            "There is loss on the question and on the padding: only the answer and its end token count.": row,
            "The end token after the answer is left out: the model would never learn to stop.": inside(
                row, [p <= t < n - 1 for t in range(width)]
            ),
            "The end token after the answer is left out, and the question counts.": inside(
                row, [t < n - 1 for t in range(width)]
            ),
            "Padding has the same id as the end token here. Masking every such id also hides the end of the answer, "
            "and the model would never learn to stop: mask by position.": inside(row, [i != end for i in row]),
            "Padding is counted: after the end token every label is -100.": inside(row, [t >= p for t in range(width)]),
            "Labels are shifted by one to the left. The model shifts by itself: label t belongs to input t.": skip
            * (p - 1)
            + [*answer, end]
            + skip * (width - n + 1),
            "Labels are shifted by one to the right: label t belongs to input t.": skip * (p + 1)
            + [*answer, end]
            + skip * (width - n - 1),
            "Positions without loss carry -100; 0 is a real token.": [0 if i == -100 else i for i in right],
            "Positions without loss carry -100; -1 is no sign that PyTorch's loss knows.": [
                -1 if i == -100 else i for i in right
            ],
            "The padding is missing: one label for each of the `width` positions.": right[:n],
            "These are the labels of the answer alone: one for each of the `width` positions.": [*answer, end],
            "Padding belongs on the right here: the answer follows the question directly.": skip * (width - n)
            + skip * p
            + [*answer, end],
        },
        otherwise="Question: -100. Answer and its end token: their ids. Padding: -100.",
    )
    probe(
        function,
        ([1, 7, 2], [7, 2, 9], 2, 7),
        [-100, -100, -100, 7, 2, 9, 2],
        {
            "A row without padding lost its end token: mask by position, not from the end of the row.": [
                *[-100] * 3,
                *[7, 2, 9],
                -100,
            ],
            "A token of the answer that also occurs in the question still counts: mask by position.": [
                *[-100] * 4,
                *[2, 9, 2],
            ],
        },
        otherwise="Mask by position, not by token id: an answer may repeat tokens of the question.",
    )
    passed("answer_labels")
