"""A tiny random model with the real tokenizer, dialogues for it, and a run for the kill test."""

from __future__ import annotations

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from pllm_helpers.dialogue import DialogueSet
from pllm_helpers.models import LLM
from pllm_helpers.models.weights import bundled_gguf, converted_gguf

SIZES = dict(
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=49152,
    max_position_embeddings=1024,
)


def tiny_llm(dtype: str = "fp32", family: str = "llama", **sizes: int) -> LLM:
    """Four layers (or ``sizes``) of random weights, the same ones at every call."""
    kinds = {"llama": (LlamaConfig, LlamaForCausalLM), "qwen2": (Qwen2Config, Qwen2ForCausalLM)}
    config_class, model_class = kinds[family]
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = model_class(config_class(**SIZES | sizes, tie_word_embeddings=True))
    for name, p in model.named_parameters():
        if name.endswith("bias"):  # zero at the start, which would hide a forgotten bias
            p.data.normal_(0, 0.1)
    tokenizer = AutoTokenizer.from_pretrained(converted_gguf(bundled_gguf()))
    tokenizer.padding_side = "left"
    wanted = torch.bfloat16 if dtype == "bf16" else torch.float32
    return LLM(model.to(wanted).eval().requires_grad_(False), tokenizer, "tiny", dtype)


def dialogue_sets(n: int = 20) -> list[DialogueSet]:
    """Short dialogues of different lengths."""
    words = "tea coffee walk rain train novel garden music winter bread harbour lamp".split()
    return [
        DialogueSet(
            "u",
            f"What about {' and '.join(words[i % 12 : i % 12 + 1 + i % 4])} today?",
            f"{words[(i + 5) % 12].capitalize()} number {i}, {' '.join(words[: i % 7])} please.",
        )
        for i in range(n)
    ]


def tiny_run() -> tuple[LLM, list[DialogueSet], dict]:
    """A run of the tiny model that lasts about a second."""
    data = dialogue_sets()
    settings = dict(steps=40, lr=0.01, seed=3, batch_size=3, accumulate=2, checkpoint_every=1)
    return tiny_llm(), data, settings | dict(held_out=data[:4], evaluate_every=7, patience=5)
