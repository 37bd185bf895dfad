"""One model on one of the small tasks, scored with intervals; and how examples are best put into a prompt."""

from __future__ import annotations

import os
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, SupportsIndex

import numpy as np
from jaxtyping import Float

from ..corpora.tasks import TASKS, Task, load_task
from ..dialogue import DialogueSet
from ..evaluation import Estimate, bootstrap_interval, paired_difference, response_nll
from ..evaluation.task_scores import score_task
from ..models.generation import generate
from ..retrieval import FORMS, RetrievalPersonalizer
from ..runtime import InputError
from ..tuning.prompts import PromptTask, classify

if TYPE_CHECKING:
    from ..models import LLM, Encoder

__all__ = ["TaskResult", "choice_prompt", "compare_forms", "run_task"]


@dataclass(frozen=True)
class TaskResult:
    """What a model did on a task.

    Attributes
    ----------
    task, dialogues, predictions : the task, its rows and what came out, row by row.
    scores : name -> shape ``(n,)``; the task's main score first.
    estimates : name -> mean with a 95 % bootstrap interval over rows.
    """

    task: Task
    dialogues: tuple[DialogueSet, ...]
    predictions: tuple[str, ...]
    scores: Mapping[str, Float[np.ndarray, " n"]]
    estimates: Mapping[str, Estimate]

    @property
    def main(self) -> Estimate:
        """The task's main score."""
        return self.estimates[self.task.metric]

    def to_pandas(self) -> Any:
        """A row per question: question, prediction, reference, scores."""
        import pandas as pd

        columns = {
            "question": [d.meta["text"] for d in self.dialogues],
            "prediction": list(self.predictions),
            "reference": [d.meta.get("label", d.answer) for d in self.dialogues],
        }
        return pd.DataFrame(columns | dict(self.scores))


def choice_prompt(name: str) -> PromptTask:
    """The task's template with its labels as verbalisers, for ``classify`` and every tuner.

    In chat form, as retrieved examples are shown and as the other tasks are asked: what is trained, prompted and
    judged is then one and the same text.
    Raises :class:`~pllm_helpers.runtime.InputError` if the task is none of choosing a label.
    """
    task = TASKS.get(name)
    if task is None or not task.labels:
        choices = ", ".join(t.name for t in TASKS.values() if t.labels)
        raise InputError("name", f"expected a task with labels ({choices}), got {name!r}")
    template = task.template.replace("{question}", "{text}")
    return PromptTask(template, {label: label for label in task.labels}, task.name, form="chat")


def run_task(
    llm: LLM,
    name: str,
    n: SupportsIndex | None = None,
    seed: int = 0,
    *,
    split: str = "test",
    shots: SupportsIndex = 0,
    prompt: PromptTask | None = None,
    calibrate: bool = False,
    source: str | os.PathLike | None = None,
    batch_size: int = 8,
    progress: bool | None = None,
) -> TaskResult:
    """Run a model, plain, tuned or quantised, on a task and score it.

    Choice tasks (sentiment, safety) compare the likelihood of the labels' verbalisers; ``chat_probe``
    compares the NLL per token of the better and the worse reply (``margin``: worse minus better,
    in nats per token); the others write greedily. The same rows for the same ``n`` and ``seed``, so
    that two models compare row by row with :func:`~pllm_helpers.evaluation.paired_difference`.

    Parameters
    ----------
    n : rows to draw from the split, evenly over labels; ``None``: all.
    shots : worked examples from the train split, drawn by ``seed``, as earlier turns; for tasks that write.
    prompt : another template with verbalisers for a choice task, for instance
        ``tuning.prompts.SENTIMENT``; default :func:`choice_prompt`.
    calibrate : take out what the model likes whatever it is asked. Choice tasks: subtract each label's
        score for the text "N/A" (contextual calibration, Zhao et al. 2021). ``chat_probe``: subtract each
        reply's NLL after the question "N/A" (pointwise mutual information, Holtzman et al. 2021);
        without it, empty phrases win because they are likely anywhere.
    source : SST-2 instead of the authored sentiment rows, as in
        :func:`~pllm_helpers.corpora.tasks.load_task`.

    Raises :class:`~pllm_helpers.runtime.InputError` on unknown names and settings that do not fit the task.
    """
    rows = load_task(name, split, source=source)
    task = TASKS[name]
    if n is not None:
        rows = _draw(rows, task, n.__index__(), seed)
    many = shots.__index__()
    if many < 0 or (many and (task.labels or name == "chat_probe")):
        raise InputError(
            "shots", f"expected 0 for {name}, got {many}" if many > 0 else f"expected at least 0, got {many}"
        )
    if prompt is not None and not task.labels:
        raise InputError("prompt", f"expected none for {name}, it has no labels")
    if calibrate and not (task.labels or name == "chat_probe"):
        raise InputError("calibrate", f"expected False for {name}, which is written")
    extra: dict[str, Float[np.ndarray, " n"]] = {}
    if task.labels:
        form = prompt or choice_prompt(name)
        missing = set(task.labels) - set(form.labels)
        if missing:
            raise InputError("prompt", f"expected a verbaliser for each label, none for {', '.join(sorted(missing))}")
        scores = classify(llm, [d.question for d in rows], form, batch_size=batch_size).scores
        if calibrate:
            scores = scores - classify(llm, ["N/A"], form).scores
        predictions = [form.labels[i] for i in scores.argmax(1)]
    elif name == "chat_probe":
        settings = dict(batch_size=batch_size, progress=progress)
        both = [*rows, *(replace(d, answer=d.meta["rejected"]) for d in rows)]
        nll = response_nll(llm, both, **settings)
        if calibrate:
            nll = nll - response_nll(llm, both, prompts=["N/A"] * len(both), **settings)
        margin = nll[len(rows) :] - nll[: len(rows)]
        predictions = ["chosen" if m > 0 else "rejected" for m in margin]
        extra["margin"] = margin
    else:
        turns = _worked(task, many, seed)
        prompts = [[*turns, {"role": "user", "content": task.prompt(d)}] for d in rows]
        predictions = generate(
            llm, prompts, max_new_tokens=task.max_new_tokens, batch_size=batch_size, progress=progress
        )
    found = score_task(task, rows, predictions) | extra
    estimates = {k: bootstrap_interval(v, seed=seed) for k, v in found.items()}
    return TaskResult(task, tuple(rows), tuple(predictions), MappingProxyType(found), MappingProxyType(estimates))


def _draw(rows: Sequence[DialogueSet], task: Task, n: int, seed: int) -> list[DialogueSet]:
    """``n`` rows in their order, as evenly over the labels as can be."""
    if not 2 <= n <= len(rows):
        raise InputError("n", f"expected 2 to {len(rows)} rows, got {n}")
    groups = [[d for d in rows if d.meta.get("label") == label] for label in task.labels or (None,)]
    shuffled = [random.Random(f"{seed}/{i}").sample(g, len(g)) for i, g in enumerate(groups)]
    chosen: list[DialogueSet] = []
    while len(chosen) < n:  # one of each label in turn, as long as there are any
        for g in shuffled:
            if g and len(chosen) < n:
                chosen.append(g.pop())
    order = {id(d): i for i, d in enumerate(rows)}
    return sorted(chosen, key=lambda d: order[id(d)])


def _worked(task: Task, shots: int, seed: int) -> list[dict[str, str]]:
    examples = load_task(task.name, "train")
    if shots > len(examples):
        raise InputError("shots", f"expected at most {len(examples)}, the rows of the train split, got {shots}")
    chosen = random.Random(seed).sample(examples, shots)
    return [
        m
        for d in chosen
        for m in ({"role": "user", "content": task.prompt(d)}, {"role": "assistant", "content": d.answer})
    ]


def compare_forms(
    llm: LLM,
    encoder: Encoder,
    stored: Sequence[DialogueSet],
    held_out: Sequence[DialogueSet],
    k: SupportsIndex = 3,
    *,
    budget: SupportsIndex = 768,
    seed: int = 0,
    **settings: Any,
) -> tuple[dict[str, Float[np.ndarray, " n"]], dict[str, Estimate]]:
    """NLL per token of held-out replies without examples and with ``k`` retrieved ones, in each form.

    Gives the NLLs by form (``"none"``, ``"turns"``, ``"context"``) and the paired differences from
    ``"none"`` and between the two forms (``"turns - context"``), below 0 where the first is better.
    """
    nll = {"none": response_nll(llm, held_out, max_tokens=2048, **settings)}
    for form in FORMS:
        store = RetrievalPersonalizer(encoder, stored, form=form, budget=budget)
        nll[form] = store.nll(llm, held_out, k, **settings)
    pairs = {f"{form} - none": (form, "none") for form in FORMS} | {"turns - context": FORMS}
    unit = "nats/token"
    return nll, {name: paired_difference(nll[a], nll[b], seed, unit=unit) for name, (a, b) in pairs.items()}
