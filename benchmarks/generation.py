"""Batched generation against the same answers one by one."""

from __future__ import annotations

import time

import transformers

from pllm_helpers.corpora import authored_dialogues
from pllm_helpers.models import generate, load_llm

from .compare import Row, in_turn, row


def run(quick: bool = False) -> list[Row]:
    """Row ``generation_batched``: new tokens per second of ``generate`` on real questions.

    The peer is ``model.generate`` of transformers, one prompt at a time, as a plain loop does it;
    the same model, prompts and length; answers of our own batch and our own loop must be equal.
    """
    llm = load_llm()
    questions = [d.question for d in authored_dialogues()][:: 48 if quick else 24]
    new = 16 if quick else 24
    together = generate(llm, questions, max_new_tokens=new, progress=False)
    assert together == [generate(llm, [q], max_new_tokens=new, progress=False)[0] for q in questions]

    def ours() -> float:
        start = time.perf_counter()
        answers = generate(llm, questions, max_new_tokens=new, details=True, progress=False)
        return sum(a.tokens for a in answers) / (time.perf_counter() - start)

    def theirs() -> float:
        start, tokens = time.perf_counter(), 0
        for q in questions:
            ids = llm.tokenizer(llm.format_chat(q), return_tensors="pt", add_special_tokens=False)
            out = llm.model.generate(**ids, max_new_tokens=new, do_sample=False)
            tokens += out.shape[1] - ids["input_ids"].shape[1]
        return tokens / (time.perf_counter() - start)

    a, b = in_turn(ours, theirs, 2 if quick else 3)
    return [
        row(
            "generation_batched",
            "transformers generate, one by one",
            a,
            b,
            "tokens/s",
            version=transformers.__version__,
            more=True,
        )
    ]
