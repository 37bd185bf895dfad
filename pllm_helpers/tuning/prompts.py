"""Classification as text completion: a template, a word per class, and the model's preference among them.

Zeroth-order tuning needs a task that the model half knows already. "{text} It was great" is one
(Malladi et al. 2023, appendix; Gao et al. 2021); a new classification layer is not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float

from ..dialogue import DialogueSet
from ..runtime import InputError
from .data import Row, padded, token_rows

if TYPE_CHECKING:
    from ..models import LLM

__all__ = ["REVIEW", "SENTIMENT", "Classification", "PromptTask", "classify"]


@dataclass(frozen=True)
class PromptTask:
    """A classification task in prompt form.

    Attributes
    ----------
    template : with ``{text}`` in it once; what the model's answer follows.
    verbalisers : label -> the word (or words) that the model answers with; no word begins another.
    name : goes into ``DialogueSet.source``.
    form : ``"plain"``: template and word are one running text, as in the paper, and the loss of every
        tuner on :meth:`dialogues` is the NLL of the word's tokens. ``"chat"``: the template is a
        user's message, the word the reply, and the loss counts the end of the turn, too.

    The loss is over the *whole vocabulary*, as in MeZO's code for language models; the choice of
    :func:`classify` is among the verbalisers only. Raises
    :class:`~pllm_helpers.runtime.InputError` on a template without ``{text}``, fewer than two
    labels, and blank or equal words.
    """

    template: str
    verbalisers: Mapping[str, str]
    name: str = "prompt"
    form: str = "plain"

    def __post_init__(self) -> None:
        if self.template.count("{text}") != 1:
            raise InputError("template", f"expected {{text}} once, got {self.template!r}")
        if self.form not in ("plain", "chat"):
            raise InputError("form", f"expected 'plain' or 'chat', got {self.form!r}")
        words = [w.strip() for w in self.verbalisers.values()]
        if len(words) < 2 or not all(words) or any(not label for label in self.verbalisers):
            raise InputError("verbalisers", f"expected two or more labels with a word each, got {self.verbalisers}")
        for a in range(len(words)):
            for b in range(len(words)):
                if a != b and words[b].startswith(words[a]):
                    raise InputError(
                        "verbalisers", f"expected words that tell the labels apart, got {words[a]!r} and {words[b]!r}"
                    )
        object.__setattr__(self, "verbalisers", dict(self.verbalisers))

    @property
    def labels(self) -> list[str]:
        return list(self.verbalisers)

    def question(self, text: str) -> str:
        """The message for ``text``."""
        return self.template.replace("{text}", text.strip())

    def word(self, label: str) -> str:
        """The verbaliser of ``label``; :class:`~pllm_helpers.runtime.InputError` if there is none."""
        try:
            return self.verbalisers[label].strip()
        except (KeyError, TypeError) as e:
            raise InputError(
                "label",
                f"expected one of {', '.join(map(repr, self.labels))}, got {label!r}",
                "Add a verbaliser for it, or leave the row out.",
            ) from e

    def dialogues(self, texts: Sequence[str], labels: Sequence[str]) -> list[DialogueSet]:
        """Rows for any tuner: the prompt as question, the label's word as answer, the label in ``meta``."""
        if len(texts) != len(labels):
            raise InputError("labels", f"expected one per text ({len(texts)}), got {len(labels)}")
        for place, text in enumerate(texts):
            if not isinstance(text, str) or not text.strip():
                raise InputError(f"texts[{place}]", "expected text, got a blank", "Leave the row out.")
        return [
            DialogueSet(
                "",
                self.question(text),
                self.word(label),
                source=self.name,
                meta={"label": label, "text": text, "form": self.form},
            )
            for text, label in zip(texts, labels, strict=True)
        ]

    def few_shot(self, texts: Sequence[str], labels: Sequence[str], shots: int, seed: int = 0) -> list[DialogueSet]:
        """``shots`` rows per class, drawn without replacement, a function of its arguments alone.

        Raises :class:`~pllm_helpers.runtime.InputError` if a class has fewer rows or a label has no word.
        """
        rows = self.dialogues(texts, labels)
        rng, chosen = np.random.default_rng([seed, shots]), []
        for label in self.labels:
            of_class = [r for r in rows if r.meta["label"] == label]
            if len(of_class) < shots:
                raise InputError("shots", f"expected at most {len(of_class)}, the rows of {label!r}, got {shots}")
            chosen += [of_class[i] for i in rng.choice(len(of_class), shots, replace=False)]
        return chosen


# the paper's prompt, and one that says more: of ten tried on 128 training rows of SST-2 it ranks best untrained
# (area under the curve 0.93 against 0.78; as a chat message, the same words get 0.59)
SENTIMENT = PromptTask("{text} It was", {"positive": "great", "negative": "terrible"}, "sentiment")
REVIEW = PromptTask(
    'A movie review: "{text}" In short, the movie was', {"positive": "good", "negative": "bad"}, "review"
)


@dataclass(frozen=True)
class Classification:
    """What :func:`classify` found.

    Attributes
    ----------
    labels : the likeliest label of each text.
    scores : ``(texts, labels)`` log-probability of each label among the labels, in the task's order.
    names : the task's labels.
    """

    labels: list[str]
    scores: Float[np.ndarray, "texts labels"]
    names: list[str]

    def hits(self, gold: Sequence[str]) -> Float[np.ndarray, " texts"]:
        """1.0 where the label is ``gold``'s, else 0.0; a row of a bootstrap interval."""
        if len(gold) != len(self.labels):
            raise InputError("gold", f"expected one label per text ({len(self.labels)}), got {len(gold)}")
        for label in gold:
            if label not in self.names:
                raise InputError("gold", f"expected one of {', '.join(map(repr, self.names))}, got {label!r}")
        return np.array([float(a == b) for a, b in zip(self.labels, gold, strict=True)])

    def accuracy(self, gold: Sequence[str]) -> float:
        """Share of texts whose label is ``gold``'s."""
        return float(self.hits(gold).mean())

    def loss(self, gold: Sequence[str]) -> float:
        """Mean cross-entropy among the labels, nats."""
        self.hits(gold)
        return float(-np.mean([row[self.names.index(label)] for row, label in zip(self.scores, gold, strict=True)]))


@torch.no_grad()
def classify(
    llm: LLM, texts: Sequence[str], task: PromptTask, *, batch_size: int = 16, max_tokens: int = 512
) -> Classification:
    """The label of each text: the verbaliser that ``llm`` finds likeliest as its reply.

    Where the verbalisers begin with different tokens, one forward pass per text compares their
    first tokens; else every verbaliser is scored whole, which takes a pass each. Texts are run
    in batches of similar length, logits at the last position only.

    Raises :class:`~pllm_helpers.runtime.InputError` on blank texts and on prompts of more than ``max_tokens``.
    """
    if isinstance(texts, str) or not len(texts):
        raise InputError("texts", f"expected a list of texts, got {texts!r}")
    end = 1 if task.form == "chat" else 0  # the end of the turn is no part of the word
    words, prompts = [], []
    for label in task.labels:
        rows = token_rows(llm, task.dialogues(texts, [label] * len(texts)), max_tokens, what="texts", cut=False).rows
        words.append(rows[0].ids[len(rows[0].ids) - rows[0].answer : len(rows[0].ids) - end])
        prompts = [r.ids[: -r.answer] for r in rows]
    first = [w[0] for w in words]
    alone = len(set(first)) == len(first)
    scores = np.zeros((len(texts), len(words)))
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for k in range(0, len(order), batch_size):
        part = order[k : k + batch_size]
        for column, word in enumerate(words[:1] if alone else words):
            rows = [Row(prompts[i] + ([] if alone else word), 1 if alone else len(word)) for i in part]
            found = _log_probabilities(llm, rows, first if alone else None)
            if alone:
                scores[part] = found
            else:
                scores[part, column] = found[:, 0]
    scores -= np.logaddexp.reduce(scores, axis=1, keepdims=True)
    return Classification([task.labels[i] for i in scores.argmax(1)], scores, task.labels)


def _log_probabilities(llm: LLM, rows: Sequence[Row], candidates: Sequence[int] | None) -> np.ndarray:
    """``(rows, candidates)`` log-probability of the next token, or ``(rows, 1)`` of the answer in each row."""
    ids, mask = padded(rows, llm.tokenizer.pad_token_id or 0, llm.device)
    hidden = llm.model.get_decoder()(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    head = llm.model.get_output_embeddings()
    if candidates is not None:
        last = torch.tensor([len(r.ids) - 1 for r in rows], device=llm.device)
        logits = head(hidden[torch.arange(len(rows), device=llm.device), last]).float()
        return torch.log_softmax(logits, -1)[:, list(candidates)].double().cpu().numpy()
    found = []
    for i, r in enumerate(rows):
        end = len(r.ids)
        logits = torch.log_softmax(head(hidden[i, end - r.answer - 1 : end - 1]).float(), -1)
        found.append(logits.gather(1, ids[i, end - r.answer : end, None]).sum().item())
    return np.array(found)[:, None]
