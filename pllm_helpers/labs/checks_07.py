"""Checks for the exercises of notebook 07."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .checks import passed, probe

__all__ = ["check_choose_method", "check_count_parameters", "check_sharing_buys"]


def _count(layers: int, dim: int, heads: int, kv_heads: int, ffn: int, vocab: int, shared: bool, **change: Any) -> int:
    """The right count, or one with a mistake: ``change`` names parts."""
    keys = change.get("keys", dim // heads * kv_heads)
    block = change.get("attention", 2 * dim * dim + 2 * dim * keys) + change.get("inner", 3 * dim * ffn)
    block += change.get("norms", 2 * dim)
    tables = change.get("tables", 1 if shared else 2)
    return layers * block + tables * vocab * dim + change.get("last", dim)


def check_count_parameters(function: Callable[..., Any]) -> None:
    """``function(layers, dim, heads, kv_heads, ffn, vocab, share_embedding)``: all weights of such a model."""
    a = (32, 960, 15, 5, 2560, 32000, True)
    layers, dim, heads, kv, ffn, vocab, _ = a
    probe(
        function,
        a,
        _count(*a),
        {
            "Keys and values have fewer heads than queries: their matrices are dim x (dim / heads * kv_heads).": _count(
                *a, keys=dim
            ),
            "Keys and values are kv_heads heads wide, not one: dim / heads * kv_heads.": _count(*a, keys=dim // heads),
            "Each key-value head is dim / heads wide, not dim / kv_heads.": _count(*a, keys=dim // kv),
            "SwiGLU has three matrices (gate, up, down), not two.": _count(*a, inner=2 * dim * ffn),
            "The embedding is counted twice, but it is shared with the output: count it once.": _count(*a, tables=2),
            "The embedding is missing.": _count(*a, tables=0),
            "Attention also has an output matrix, dim x dim.": _count(
                *a, attention=dim * dim + 2 * dim * (dim // heads * kv)
            ),
            "Both keys and values have a matrix.": _count(*a, attention=2 * dim * dim + dim * (dim // heads * kv)),
            "The norms are missing: two vectors of width dim per layer, and one at the end.": _count(
                *a, norms=0, last=0
            ),
            "Each layer has two norms, one before attention and one before the feed-forward part.": _count(
                *a, norms=dim
            ),
            "The last norm, after all layers, is missing.": _count(*a, last=0),
            "That is one layer: multiply the blocks by the number of layers.": _count(1, *a[1:]),
        },
        otherwise="Add up: embedding; per layer q, k, v, o, three feed-forward matrices and two norms; one last norm.",
    )
    b = (4, 128, 4, 4, 320, 1000, False)
    probe(
        function,
        b,
        _count(*b),
        {
            "Without sharing, the output has a matrix of its own, as large as the embedding.": _count(*b, tables=1),
            "share_embedding has no effect: without sharing there are two tables.": _count(*b, tables=1),
        },
        otherwise="Here the embedding is not shared and every head has its own keys.",
    )
    passed("count_parameters")


def check_sharing_buys(function: Callable[..., Any]) -> None:
    """``function(vocab, dim, block)``: whole blocks of ``block`` weights that the shared embedding pays for."""
    probe(
        function,
        (32000, 576, 3_540_096),
        5,
        {
            "Whole blocks only: round down.": 32000 * 576 / 3_540_096,
            "Rounded up: the last block is not paid for.": 6,
            "Sharing saves one matrix of vocab x dim, not two.": 10,
            "Upside down: weights saved divided by weights of a block.": 3_540_096 / (32000 * 576),
            "That is how many weights are saved. How many blocks can they pay for?": 32000 * 576,
            "A block costs more than dim weights: divide by `block`.": 32000,
        },
        otherwise="One table of vocab x dim is saved; a block costs `block`.",
    )
    probe(function, (1000, 64, 64_001), 0, {"A part of a block cannot be built: 0.": 1}, otherwise="Round down.")
    probe(
        function,
        (1000, 64, 64_000),
        1,
        {"Exactly enough is enough: 1.": 0},
        otherwise="The table holds 64,000 weights, the block as many.",
    )
    passed("sharing_buys")


def check_choose_method(function: Callable[..., Any]) -> None:
    """``function(n, sizes, lora, retrieval)``: which method to take with ``n`` examples.

    ``sizes`` ascending, and the NLL of each method at these sizes. Between two sizes the NLL is
    taken from the straight line over log n; outside, from the nearest end. A tie goes to
    retrieval, and without examples it is ``"base"``.
    """
    sizes, lora, retrieval = [10, 100, 1000], [4.6, 4.2, 3.9], [4.3, 4.2, 4.15]
    probe(
        function,
        (10, sizes, lora, retrieval),
        "retrieval",
        {
            "A lower NLL is better: the reply surprises the model less.": "lora",
            "With examples there is something to learn from.": "base",
        },
    )
    probe(function, (1000, sizes, lora, retrieval), "lora", {"A lower NLL is better.": "retrieval"})
    probe(
        function,
        (100, sizes, lora, retrieval),
        "retrieval",
        {"A tie goes to retrieval: it costs no training.": "lora"},
    )
    probe(function, (0, sizes, lora, retrieval), "base", {
        "Without a single example nothing can be retrieved or learned: \"base\".": "retrieval",
        "Without a single example there is nothing to train on: \"base\".": "lora",
    })  # fmt: skip
    probe(
        function,
        (3, [10, 100], [3.5, 3.0], [3.6, 3.5]),
        "lora",
        {"Below the smallest size take the smallest size's values: do not extrapolate the lines.": "retrieval"},
    )
    probe(
        function,
        (1000, [10, 100], [4.0, 3.6], [3.6, 3.5]),
        "retrieval",
        {"Above the largest size take the largest size's values: do not extrapolate the lines.": "lora"},
    )
    # at 30 the lines over log n and over n have different winners
    probe(
        function,
        (30, [10, 100], [4.0, 3.0], [3.6, 3.6]),
        "lora",
        {"Interpolate over log n, not over n: log 30 lies nearly half-way from log 10 to log 100.": "retrieval"},
    )
    passed("choose_method")
