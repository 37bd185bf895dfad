"""NLL of replies on the real model against a plain row-by-row computation."""

import numpy as np
import pytest
import torch

from pllm_helpers.dialogue import DialogueSet
from pllm_helpers.evaluation import response_nll
from pllm_helpers.models import load_llm
from pllm_helpers.runtime import InputError

ROWS = [
    DialogueSet("u", "What is the capital of France?", "The capital of France is Paris."),
    DialogueSet("u", "What is the capital of France?", "Purple lamp seven the of of."),
    DialogueSet("u", "hi", "yo whats up, did you watch the match last night or were you asleep already?"),
]


@pytest.fixture(scope="module")
def llm():
    return load_llm(dtype="fp32")


def test_equals_plain_computation(llm):
    expected = []
    for d in ROWS:
        prompt = llm.tokenizer(llm.format_chat(d.question), add_special_tokens=False)["input_ids"]
        answer = llm.tokenizer(d.answer, add_special_tokens=False)["input_ids"] + [2]  # 2: <|im_end|>
        with torch.inference_mode():
            logp = llm.model(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
        expected.append(-np.mean([logp[len(prompt) - 1 + k, t].item() for k, t in enumerate(answer)]))
    for batch_size in (1, 2, 8):
        np.testing.assert_allclose(response_nll(llm, ROWS, batch_size=batch_size), expected, atol=2e-4)


def test_a_good_answer_is_expected_more(llm):
    good, bad, _ = response_nll(llm, ROWS)
    assert good + 1 < bad


def test_refuses(llm):
    with pytest.raises(InputError, match=r"dialogues\[1\].*blank"):
        response_nll(llm, [ROWS[0], DialogueSet("u", "", "only an answer")])
    with pytest.raises(InputError, match=r"dialogues\[0\].*at most 20 tokens"):
        response_nll(llm, ROWS[2:], max_tokens=20)
