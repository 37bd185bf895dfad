"""What fits on a device, and what it is worth there: the experiments of notebook 07.

Four experiments, each a set of *cells* whose results are kept in a cache folder:

``architectures``: small models of one size and different shapes (MobileLLM, arXiv 2402.14905),
    trained from scratch on real people's chats, then quantised.
``precision``: the LLM in bf16, int8 and int4: surprise at real replies, small tasks, speed
    (MobileAIBench, arXiv 2406.10290).
``personal``: LoRA, retrieval and both on 10 to 500 of a person's replies, full and int8
    (Empirical Guidelines, arXiv 2406.03777).
``tasks``: the same choice on small tasks of different difficulty; MobileLLM's two probes.

``python -m pllm_helpers.experiments.device_study NAME`` runs the missing cells of one and writes
its table; stop it at any time, the same command goes on. Several processes may share the work.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.metadata
import json
import os
import platform
import random
import signal
import sys
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property, lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from ..corpora import chitchat_stream
from ..corpora.tasks import TASKS, load_task
from ..device.architectures import Architecture
from ..device.small_models import END, small_tokenizer, train_small
from ..dialogue import DialogueSet
from ..evaluation import Estimate, paired_difference, response_nll
from ..retrieval import RetrievalPersonalizer
from ..runtime import InputError, cache_dir, data_dir, prepare, processor_name, thread_count, write_whole
from .lora_study import earlier_and_later

if TYPE_CHECKING:
    from ..models import LLM, Encoder
    from ..tuning import TuningResult

__all__ = [
    "EXPERIMENTS",
    "FORMATS",
    "VARIANTS",
    "ChatText",
    "DeviceSettings",
    "DeviceTable",
    "Lab",
    "Measured",
    "chat_text",
    "how_to_measure",
    "load_table",
    "personal_data",
    "plan_architectures",
    "plan_personal",
    "plan_precision",
    "plan_tasks",
    "recorded",
    "steps_for",
    "task_examples",
    "weight_bytes",
    "window_nll",
]

CODE_VERSION = 1  # raise it when a change of code changes what a cell measures
EXPERIMENTS = ("architectures", "precision", "personal", "tasks")
METHODS = ("base", "lora", "rag", "both")
_LORA = {"lr", "rank", "layers", "batch_size", "k", "epochs", "least", "most"}
USED = {  # settings that decide a cell
    "architectures": {"people", "small_steps", "small_batch", "window", "small_windows"},
    "precision": {"replies", "rows"},
    "personal": {"replies", *_LORA},
    "tasks": {"rows", *_LORA},
}
PRECISIONS = ("bf16", "int8", "int4")
LEARNED = ("sentiment", "qa", "api_calls")  # a label, a few words, a format never seen

Number = float | int
Say = Callable[[str], None]


@dataclass(frozen=True)
class DeviceSettings:
    """What all cells have in common; part of every cell's key.

    Attributes
    ----------
    people : whose chats the small models read. small_steps, small_batch, window, small_windows :
        their training, and the windows of held-out conversations that judge them.
    replies : later replies of a person to score.
    rows : test rows of a task (at most; there are as many as ship).
    lr, rank, layers, batch_size : of ``tune_lora``.
    k : examples that retrieval puts into a prompt.
    epochs, least, most : steps of a LoRA run: so many passes over the n examples, within bounds.
    """

    people: int = 150
    small_steps: int = 320
    small_batch: int = 16
    window: int = 128
    small_windows: int = 256
    replies: int = 24
    rows: int = 24
    lr: Number = 2e-3
    rank: int = 8
    layers: str | int = "upper"
    batch_size: int = 8
    k: int = 3
    epochs: Number = 3
    least: int = 8
    most: int = 40

    def __post_init__(self) -> None:
        least = {"people": 1, "small_steps": 1, "small_batch": 1, "window": 8, "small_windows": 2}
        for name, low in (least | {"replies": 2, "rows": 2, "k": 1, "least": 1}).items():
            value = getattr(self, name)
            if isinstance(value, bool) or value < low:
                raise InputError(name, f"expected a whole number of at least {low}, got {value!r}")
        for name in ("lr", "epochs"):
            if not getattr(self, name) > 0:
                raise InputError(name, f"expected a number above 0, got {getattr(self, name)!r}")


# --------------------------------------------------------------------------- bytes

FORMATS = ("fp32", "bf16", "int8", "int4")


def weight_bytes(architecture: Architecture, form: str, *, group: int = 32) -> int:
    """Bytes of a model's weights in a form of :data:`FORMATS`, scales included; vectors stay at two bytes there.

    int8 and int4 as :func:`~pllm_helpers.device.quantize` packs them: two bytes of scale per output
    row of int8; scale and zero, two bytes each, per ``group`` inputs of int4; the embedding, and an
    output matrix that is the embedding, always int8. A test holds it against a packed model. Raises
    :class:`~pllm_helpers.runtime.InputError` on another form.
    """
    if form not in FORMATS:
        raise InputError("form", f"expected one of {', '.join(FORMATS)}, got {form!r}")
    a, count = architecture, architecture.parameters()
    if form in ("fp32", "bf16"):
        return count.total * (4 if form == "fp32" else 2)
    keys = a.dim * a.kv_heads // a.heads
    rows = a.layers * (2 * a.dim + 2 * keys + 2 * a.ffn + a.dim)  # outputs of q, o, k, v, gate, up, down
    table = a.vocab * (a.dim + 2)
    own = 0 if a.share_embedding else a.vocab
    matrices = count.attention + count.ffn + count.head
    if form == "int8":
        return matrices + 2 * (rows + own) + table + 2 * count.norms
    return matrices // 2 + 4 * matrices // group + table + 2 * count.norms


# --------------------------------------------------------------------------- small models from scratch

# One budget, five shapes: 0.47 million weights, small enough for a few tokens per weight in minutes.
# What a variant saves in one place it spends in another, so that each is within 3 % of the first (a
# test holds that); a vocabulary of 1,472 makes an own output matrix worth two blocks.
VARIANTS: Mapping[str, Architecture] = MappingProxyType(
    {
        "deep": Architecture(8, 64, 2, 2, 160, 1472, name="deep and thin"),
        "wide": Architecture(2, 128, 4, 4, 192, 1472, name="shallow and wide"),
        "unshared": Architecture(6, 64, 2, 2, 160, 1472, share_embedding=False, name="own output matrix"),
        "gqa": Architecture(9, 64, 2, 1, 160, 1472, name="grouped queries"),
        "twice": Architecture(8, 64, 2, 2, 160, 1472, share_blocks=True, name="every block twice"),
    }
)
"""The small shapes; what "deep" leaves out or "wide" replaces is spent on blocks or width."""


@dataclass(frozen=True)
class ChatText:
    """Real conversations: to train on, to choose a rate by, to judge by; and a tokenizer made from the first."""

    train: tuple[str, ...] = field(repr=False)
    choice: tuple[str, ...] = field(repr=False)
    held_out: tuple[str, ...] = field(repr=False)
    tokenizer: Any = field(repr=False)

    @cached_property
    def hash(self) -> str:
        """Of all texts, in their order."""
        texts = "\x1f".join(t for part in (self.train, self.choice, self.held_out) for t in part)
        return hashlib.sha256(texts.encode()).hexdigest()[:16]


@lru_cache(maxsize=2)
def chat_text(people: int = 150, vocabulary: int = 1472) -> ChatText:
    """The conversations of the ``people`` most active volunteers, one text each, a turn a line.

    One in forty is kept for the choice of a learning rate and one in forty for judging, by a hash
    of the conversation's id, so that no turn is in two parts. Raises
    :class:`~pllm_helpers.runtime.InputError` if there are too few people for that.
    """
    turns: dict[str, dict[int, str]] = {}
    for rank in range(people):
        for d in chitchat_stream(rank, 0).stream:
            here = turns.setdefault(d.meta["conversation"], {})
            here[d.meta["turn"]] = d.answer.strip()
            here.setdefault(d.meta["turn"] - 1, d.question.strip())
    parts: tuple[list[str], ...] = ([], [], [])
    for key in sorted(turns):
        text = "\n".join(t for _, t in sorted(turns[key].items()) if t)
        if len(text) > 40:
            number = zlib.crc32(key.encode()) % 40
            parts[1 if number == 0 else 2 if number == 1 else 0].append(text)
    if not all(parts):
        raise InputError("people", f"expected more people, {people} have too few conversations", "Take 40 or more.")
    return ChatText(*map(tuple, parts), small_tokenizer(parts[0], vocabulary))


def window_nll(model: Any, tokenizer: Any, texts: Sequence[str], length: int, most: int = 256) -> np.ndarray:
    """Mean NLL per token of windows of ``length`` tokens of ``texts``, spread evenly; ``(windows,)``, nats."""
    import torch

    end = tokenizer.token_to_id(END)
    ids = torch.tensor([i for e in tokenizer.encode_batch(list(texts)) for i in (*e.ids, end)])
    windows = ids[: len(ids) // (length + 1) * (length + 1)].view(-1, length + 1)
    if not len(windows):
        raise InputError("texts", f"expected more than {length} tokens, got {len(ids)}")
    windows = windows[np.linspace(0, len(windows) - 1, min(most, len(windows))).round().astype(int)]
    found = []
    with torch.inference_mode():
        for part in windows.split(16):
            logits = model(input_ids=part[:, :-1], use_cache=False).logits.float()
            nll = torch.nn.functional.cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten(), reduction="none")
            found.append(nll.view(len(part), -1).mean(1))
    return torch.cat(found).double().numpy()


# --------------------------------------------------------------------------- small tasks


def task_examples(task: str, split: str, most: int = 10_000) -> list[DialogueSet]:
    """Rows of a task as examples to learn from: the task's prompt and the wanted answer (a label, or text)."""
    from .task_runs import choice_prompt

    rows = load_task(task, split)[:most]
    if not TASKS[task].labels:
        return [replace(d, question=TASKS[task].prompt(d)) for d in rows]
    form = choice_prompt(task)
    return form.dialogues([d.question for d in rows], [d.meta["label"] for d in rows])


def task_prompts(
    store: RetrievalPersonalizer, task: str, questions: Sequence[str], k: int
) -> list[list[dict[str, str]]]:
    """A task's prompts behind ``k`` retrieved examples each. Found by the bare question, shown in the template.

    The template is the same in all rows; left in, it would make all of them alike.
    """
    known, out = TASKS[task], []
    for question, hits in zip(questions, store.retrieve_all(list(questions), k), strict=True):
        turns = [
            {"role": role, "content": text}
            for h in reversed(hits)
            for role, text in (("user", known.prompt(h.dialogue)), ("assistant", h.dialogue.answer))
        ]
        out.append([*turns, {"role": "user", "content": known.template.replace("{question}", question)}])
    return out


# --------------------------------------------------------------------------- personal examples


def personal_data(person: int, seed: int, n: int, replies: int) -> tuple[list[DialogueSet], list[DialogueSet]]:
    """``n`` of a person's last 500 usable earlier pairs, drawn by ``seed``, and ``replies`` later ones.

    Draws of one seed are nested: the 10 are among the 25, and so on. Later replies do not depend on
    the seed. Raises :class:`~pllm_helpers.runtime.InputError` if there are fewer pairs.
    """
    earlier, later = earlier_and_later(person, 500, replies)
    if n > len(earlier) or len(later) < replies:
        raise InputError(
            "n", f"expected at most {len(earlier)} examples and {len(later)} replies of person {person}, got {n}"
        )
    return random.Random(seed).sample(earlier, len(earlier))[:n], later


def steps_for(n: int, settings: DeviceSettings) -> int:
    """Steps of a LoRA run on ``n`` examples: ``epochs`` passes, at least ``least``, at most ``most``."""
    return int(min(settings.most, max(settings.least, round(settings.epochs * n / settings.batch_size))))


# --------------------------------------------------------------------------- cells and tables


@dataclass(frozen=True)
class Measured:
    """One cell: what it was (``labels``), numbers per row of data (``rows``), and facts about it."""

    labels: dict[str, Any]
    rows: dict[str, np.ndarray]
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class DeviceTable:
    """The cells of one experiment.

    Attributes
    ----------
    name : of the experiment. cells : those measured. planned : how many there should be.
    run : settings, versions, hardware, command.
    """

    name: str
    cells: tuple[Measured, ...]
    planned: int
    run: Mapping[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        return f"DeviceTable({self.name}, {len(self.cells)} of {self.planned} cells)"

    @property
    def complete(self) -> bool:
        return len(self.cells) == self.planned

    def values(self, label: str, **labels: Any) -> list[Any]:
        """Distinct values of a label, in the order planned; of the cells with these ``labels``."""
        return list(dict.fromkeys(c.labels[label] for c in self.find(**labels) if label in c.labels))

    def find(self, **labels: Any) -> list[Measured]:
        """Cells with these labels."""
        return [c for c in self.cells if all(c.labels.get(k) == v for k, v in labels.items())]

    def rows(self, metric: str, **labels: Any) -> list[np.ndarray]:
        """Rows of a metric, one array per cell with these labels (persons and seeds)."""
        return [c.rows[metric] for c in self.find(**labels) if metric in c.rows]

    def estimate(self, metric: str, seed: int = 0, unit: str = "", **labels: Any) -> Estimate:
        """Mean over cells and rows with its interval (see ``paired_difference``)."""
        rows = self.rows(metric, **labels)
        if not rows:
            raise InputError("labels", f"expected cells of {self.name} with {labels}, found none")
        return paired_difference(rows, seed=seed, unit=unit)

    def pairs(
        self, metric: str, a: Mapping[str, Any], b: Mapping[str, Any], **shared: Any
    ) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Rows of ``metric`` under labels ``a`` and under ``b``, cell by cell: same person, seed and so on.

        What a cell does not depend on is not among its labels (the base model knows no seed), and
        then it matches every value.
        """
        differ = set(a) | set(b)
        mine, theirs = self.find(**{**shared, **a}), self.find(**{**shared, **b})
        found: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
        for x in mine:
            for y in theirs:
                common = (set(x.labels) & set(y.labels)) - differ
                if all(x.labels[k] == y.labels[k] for k in common) and metric in x.rows and metric in y.rows:
                    found[0].append(x.rows[metric])
                    found[1].append(y.rows[metric])
        return found

    def difference(
        self, metric: str, a: Mapping[str, Any], b: Mapping[str, Any], seed: int = 0, unit: str = "", **shared: Any
    ) -> Estimate:
        """Mean of a − b, paired by row. Raises :class:`InputError` where no cells match."""
        x, y = self.pairs(metric, a, b, **shared)
        if not x:
            raise InputError("labels", f"expected cells of {self.name} with {dict(a)} and {dict(b)}, found none")
        return paired_difference(x, y, seed, unit=unit)

    def save(self, path: str | os.PathLike, command: str = "") -> Path:
        """Write the table as ``data/results`` keeps it: run, results (a mean per cell), and the cells' rows."""
        run = dict(self.run) | ({"command": command} if command else {})
        run |= {"experiment": self.name, "cells": len(self.cells), "planned": self.planned, "complete": self.complete}
        results = []
        for c in self.cells:
            tail = "/".join(f"{k}={v}" for k, v in c.labels.items())
            for metric, values in c.rows.items():
                e = paired_difference(values)
                seeds = [c.labels["seed"]] if "seed" in c.labels else []
                numbers = {k: round(float(getattr(e, k)), 5) for k in ("value", "low", "high")}
                results.append({"name": f"{metric}/{self.name}/{tail}", **numbers, "n": e.n, "seeds": seeds})
        lines = [json.dumps(r, ensure_ascii=False) for r in results]
        cells = [json.dumps(_compact(c), ensure_ascii=False, separators=(",", ":")) for c in self.cells]
        head = json.dumps(run, indent=1, ensure_ascii=False)
        text = f'{{"run": {head},\n"results": [\n' + ",\n".join(lines) + '\n],\n"cells": [\n' + ",\n".join(cells)
        text += "\n]}\n"
        json.loads(text)
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        write_whole(target, text)
        target.chmod(0o644)
        return target


def _compact(c: Measured) -> dict[str, Any]:
    facts = {k: round(v, 5) if isinstance(v, float) else v for k, v in c.facts.items()}
    return {"labels": c.labels, "rows": {k: np.round(v, 3).tolist() for k, v in c.rows.items()}, "facts": facts}


def _measured(content: Mapping[str, Any]) -> Measured:
    rows = {k: np.array(v, dtype=float) for k, v in content["rows"].items()}
    return Measured(dict(content["labels"]), rows, dict(content["facts"]))


def load_table(path: str | os.PathLike) -> DeviceTable:
    """A table that :meth:`DeviceTable.save` wrote.

    Raises :class:`~pllm_helpers.runtime.InputError` if there is none or it is damaged.
    """
    place = Path(path)
    try:
        content = json.loads(place.read_text(encoding="utf-8"))
        cells = tuple(_measured(c) for c in content["cells"])
        return DeviceTable(content["run"]["experiment"], cells, content["run"]["planned"], content["run"])
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise InputError(place.name, f"expected the table of an experiment, got {type(e).__name__}: {e}") from e


def recorded(folder: str | os.PathLike = "") -> dict[str, DeviceTable]:
    """The recorded tables that are there, by experiment; empty where none is.

    ``folder`` holds ``device_NAME.json`` as the command line writes them; blank: those that ship.
    Raises :class:`~pllm_helpers.runtime.InputError` for a folder that is not there.
    """
    place = Path(folder) if str(folder) else data_dir() / "results"
    if str(folder) and not place.is_dir():
        raise InputError("results", f"expected a folder with recorded tables, got {str(folder)!r}", "Leave it blank.")
    found = {name: place / f"device_{name}.json" for name in EXPERIMENTS}
    return {name: load_table(path) for name, path in found.items() if path.is_file()}


def how_to_measure(name: str) -> str:
    """The command that makes a table."""
    if name not in EXPERIMENTS:
        raise InputError("experiment", f"expected one of {', '.join(EXPERIMENTS)}, got {name!r}")
    return f"python -m pllm_helpers.experiments.device_study {name}"


class Lab:
    """Measures cells: holds models, text and the cache.

    Parameters
    ----------
    settings : shared by all cells.
    llm, encoder : loaded on first use where not given.
    cache : folder of results; ``None``: ``experiments/device`` in the user's cache folder.
    say : takes lines of progress.
    """

    def __init__(
        self,
        settings: DeviceSettings | None = None,
        *,
        llm: LLM | None = None,
        encoder: Encoder | None = None,
        cache: str | os.PathLike | None = None,
        say: Say | None = None,
    ):
        self.settings = settings or DeviceSettings()
        self._llm, self._encoder = llm, encoder
        self.cache = Path(cache) if cache is not None else cache_dir() / "experiments" / "device"
        self.cache.mkdir(parents=True, exist_ok=True)
        self.say = say or (lambda line: None)
        self._models: dict[str, LLM] = {}
        self._tuned: dict[Any, TuningResult] = {}

    # ------------------------------------------------------------ what cells share

    @cached_property
    def llm(self) -> LLM:
        from ..models import load_llm

        return self._llm or load_llm(dtype="bf16")

    @cached_property
    def encoder(self) -> Encoder:
        from ..models import load_encoder

        return self._encoder or load_encoder()

    @cached_property
    def text(self) -> ChatText:
        return chat_text(self.settings.people, next(iter(VARIANTS.values())).vocab)

    def model(self, precision: str) -> LLM:
        """The LLM in a precision: its own dtype for ``"bf16"``, else quantised."""
        from ..device import quantize

        if precision not in PRECISIONS:
            raise InputError("precision", f"expected one of {', '.join(PRECISIONS)}, got {precision!r}")
        if precision not in self._models:
            self._models[precision] = self.llm if precision == "bf16" else quantize(self.llm, precision)
        return self._models[precision]

    @cached_property
    def _llm_key(self) -> list[str]:
        from ..tuning.adapters import fingerprint

        return [self.llm.name, self.llm.dtype, self.llm.device.type, fingerprint(self.llm.model)]

    # ------------------------------------------------------------ cache

    def key(self, experiment: str, labels: Mapping[str, Any]) -> str:
        """Hash of everything that decides a cell's result; 20 hex digits."""
        used = USED[experiment]
        mine = {k: v for k, v in asdict(self.settings).items() if k in used}
        data = self.text.hash if experiment == "architectures" else self._llm_key
        shape = asdict(VARIANTS[labels["variant"]]) if experiment == "architectures" else {}
        parts = [CODE_VERSION, experiment, sorted(labels.items()), mine, data, shape]
        return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:20]

    def cached(self, experiment: str, labels: Mapping[str, Any]) -> Measured | None:
        """A cell's result if it is there; a damaged file counts as absent."""
        try:
            path = self.cache / f"{self.key(experiment, labels)}.json"
            return _measured(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def run(self, experiment: str, labels: Mapping[str, Any], *, wait: bool = True) -> Measured | None:
        """A cell's result: from the cache, or measured now and kept; ``None`` where another process is at it."""
        import filelock

        if done := self.cached(experiment, labels):
            return done
        path = self.cache / f"{self.key(experiment, labels)}.json"
        try:
            with filelock.FileLock(str(path.with_suffix(".lock")), timeout=-1 if wait else 0):
                if done := self.cached(experiment, labels):
                    return done
                began, used = time.perf_counter(), time.process_time()
                made = getattr(self, f"measure_{experiment}")(dict(labels))
                cost = {"seconds": time.perf_counter() - began, "cpu_seconds": time.process_time() - used}
                made = replace(made, facts={**made.facts, **cost, "threads": thread_count()})
                kept = {k: [float(x) for x in v] for k, v in made.rows.items()}
                write_whole(path, json.dumps({"labels": made.labels, "rows": kept, "facts": made.facts}))
                return made
        except filelock.Timeout:
            return None

    def table(
        self,
        experiment: str,
        cells: Sequence[Mapping[str, Any]],
        *,
        measure: bool = True,
        max_minutes: Number | None = None,
    ) -> DeviceTable:
        """All ``cells``, those missing measured now; what another process works on is waited for at the end."""
        if experiment not in EXPERIMENTS:
            raise InputError("experiment", f"expected one of {', '.join(EXPERIMENTS)}, got {experiment!r}")
        deadline = time.monotonic() + 60 * max_minutes if max_minutes is not None else None
        done: dict[int, Measured] = {}
        for wait in (False, True):
            for place, labels in enumerate(cells):
                if place in done:
                    continue
                late = deadline is not None and time.monotonic() > deadline
                found = self.cached(experiment, labels) if late or not measure else None
                if not late and measure:
                    found = self.run(experiment, labels, wait=wait)
                if found is None:
                    continue
                done[place] = found
                what = " ".join(f"{k}={v}" for k, v in labels.items())
                self.say(f"[{len(done)}/{len(cells)}] {what}: {found.facts.get('seconds', 0):.1f} s")
        return DeviceTable(experiment, tuple(done[i] for i in sorted(done)), len(cells), self.card(experiment, done))

    def card(self, experiment: str, done: Mapping[int, Measured]) -> dict[str, Any]:
        """Settings, versions and hardware, without a path or a name of this machine."""
        versions = {"python": platform.python_version()}
        for package in ("pllm-helpers", "torch", "transformers", "peft", "tokenizers", "chitchat-dataset", "numpy"):
            with contextlib.suppress(importlib.metadata.PackageNotFoundError):
                versions[package] = importlib.metadata.version(package)
        system = f"{platform.system()} {platform.machine()}"
        model = {} if experiment == "architectures" else {"model": self.llm.name, "dtype": self.llm.dtype}
        return {
            "experiment": experiment,
            "settings": asdict(self.settings) | model,
            "versions": versions,
            "machine": {"system": system, "processor": processor_name(), "cores": os.cpu_count()},
            "threads": sorted({c.facts.get("threads", 1) for c in done.values()}),
            "cpu_minutes": round(sum(c.facts.get("cpu_seconds", 0.0) for c in done.values()) / 60, 1),
        }

    # ------------------------------------------------------------ the four kinds of cell

    def measure_architectures(self, labels: dict[str, Any]) -> Measured:
        """Labels ``variant``, ``seed`` and ``rate``: train, then score held-out windows in fp32, int8 and int4."""
        from ..device import quantize, size_mb, weight_error
        from ..models import LLM

        s, text = self.settings, self.text
        made = train_small(
            VARIANTS[labels["variant"]],
            text.train,
            s.small_steps,
            labels["seed"],
            held_out=text.choice,
            tokenizer=text.tokenizer,
            lr=labels["rate"],
            batch_size=s.small_batch,
            length=s.window,
            evaluations=max(2, min(8, s.small_steps // 5)),
            held_out_windows=s.small_windows,
            progress=False,
        )
        small = LLM(made.model.requires_grad_(False), None, labels["variant"], "fp32")

        def score(llm: LLM) -> np.ndarray:
            return window_nll(llm.model, text.tokenizer, text.held_out, s.window, s.small_windows)

        rows = {"nll": score(small)}
        facts: dict[str, Any] = {"size_mb/fp32": size_mb(small), "choice": made.loss}
        for kind in ("int8", "int4"):
            packed = quantize(small, kind)
            rows[f"nll/{kind}"] = score(packed)
            facts[f"size_mb/{kind}"] = size_mb(packed)
            facts[f"error/{kind}"], facts[f"random_error/{kind}"] = weight_error(small, kind)
        falls = made.curve[-2][1] - made.curve[-1][1]
        facts |= {"tokens": made.tokens, "parameters": made.architecture.parameters().total, "still_falling": falls}
        facts |= {"curve": [list(point) for point in made.curve], "tuning_seconds": made.seconds}
        return Measured(labels, rows, facts)

    def architectures(
        self,
        variants: Sequence[str] = tuple(VARIANTS),
        seeds: int = 3,
        rates: Sequence[Number] = (1e-3, 3e-3),
        *,
        measure: bool = True,
        max_minutes: Number | None = None,
    ) -> DeviceTable:
        """Every variant with every seed, each variant at the rate that served it best with seed 0.

        The choice is by conversations that are neither trained on nor judged by. One rate for all
        would favour the shape that it suits.
        """
        began = time.monotonic()
        first = plan_architectures(1, variants, {v: rates for v in variants})
        tried = self.table("architectures", first, measure=measure, max_minutes=max_minutes)
        best: dict[str, Sequence[Number]] = {}
        for v in variants:
            found = tried.find(variant=v)
            best[v] = [min(found, key=lambda c: c.facts["choice"]).labels["rate"]] if len(found) == len(rates) else []
        left = None if max_minutes is None else max(0.0, max_minutes - (time.monotonic() - began) / 60)
        plan = plan_architectures(seeds, variants, best)
        table = self.table("architectures", plan, measure=measure, max_minutes=left)
        chosen = tuple(
            Measured({k: v for k, v in c.labels.items() if k != "rate"}, c.rows, {**c.facts, "rate": c.labels["rate"]})
            for c in table.cells
        )
        return replace(table, cells=chosen, planned=seeds * len(variants))

    def measure_precision(self, labels: dict[str, Any]) -> Measured:
        """Labels ``precision`` and ``what``: ``"person:RANK"``, ``"speed"`` or a task."""
        from ..device import generation_speed, size_mb
        from .task_runs import run_task

        s, llm, what = self.settings, self.model(labels["precision"]), labels["what"]
        facts: dict[str, Any] = {"size_mb": size_mb(llm)}
        if what == "speed":
            prompts = [d.question for d in earlier_and_later(0, 16, 12)[1]]
            found = generation_speed(llm, prompts[: max(3, min(12, s.replies // 4))], new_tokens=16)
            decode = np.array([(found.new_tokens - 1) / b for _, b in found.seconds])
            return Measured(labels, {"first_token": np.array([a for a, _ in found.seconds]), "decode": decode}, facts)
        if what.startswith("person:"):
            later = earlier_and_later(int(what.partition(":")[2]), 16, s.replies)[1]
            return Measured(labels, {"nll": response_nll(llm, later, progress=False)}, facts)
        rows = min(s.rows, len(load_task(what, "test")))
        return Measured(labels, dict(run_task(llm, what, rows, progress=False).scores), facts)

    def measure_personal(self, labels: dict[str, Any]) -> Measured:
        """Labels ``person``, ``precision``, ``method``; beside ``base`` also ``seed`` and ``n``; LoRA also ``factor``.

        ``factor`` multiplies the steps of :func:`steps_for`.
        """
        n = labels.get("n", 0)
        earlier, later = personal_data(labels["person"], labels.get("seed", 0), n, self.settings.replies)
        prompts = None
        if labels["method"] in ("rag", "both"):
            store = RetrievalPersonalizer(self.encoder, earlier)
            prompts = store.prompts(later, self.settings.k, llm=self.llm)
        nll, facts = self._learned(labels, earlier, later, prompts)
        return Measured(labels, {"nll": nll}, facts)

    def measure_tasks(self, labels: dict[str, Any]) -> Measured:
        """Labels ``task``, ``precision``, ``method``, LoRA also ``seed``: NLL of the wanted answers, and scores.

        The examples are the task's train split, all of it. ``score``: the task's main score of what
        the model answers without retrieved examples (``base`` and ``lora``).
        """
        from .task_runs import choice_prompt, run_task

        s, name = self.settings, labels["task"]
        train, test = task_examples(name, "train"), task_examples(name, "test", s.rows)
        prompts = None
        if labels["method"] in ("rag", "both"):
            label = choice_prompt(name).word if TASKS[name].labels else None
            rows = load_task(name, "train")
            bare = [replace(d, answer=label(d.meta["label"])) for d in rows] if label else rows
            asked = [d.question for d in load_task(name, "test")[: s.rows]]
            prompts = task_prompts(RetrievalPersonalizer(self.encoder, bare), name, asked, s.k)
        rows: dict[str, np.ndarray] = {}

        def look(llm: LLM) -> None:
            if labels["method"] in ("base", "lora"):
                found = run_task(llm, name, min(s.rows, len(load_task(name, "test"))), progress=False)
                rows["score"] = np.array(found.scores[TASKS[name].metric])

        rows["nll"], facts = self._learned(labels, train, test, prompts, look)
        return Measured(labels, rows, facts)

    def _learned(
        self,
        labels: Mapping[str, Any],
        examples: Sequence[DialogueSet],
        judged: Sequence[DialogueSet],
        prompts: Sequence[Any] | None,
        look: Callable[[LLM], None] | None = None,
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """NLL of the judged replies under a method, and what it cost; ``look`` sees the tuned model."""
        from ..tuning import adapted, tune_lora

        s, llm, method = self.settings, self.model(labels["precision"]), labels["method"]
        if method not in METHODS:
            raise InputError("method", f"expected one of {', '.join(METHODS)}, got {method!r}")
        facts, result = {}, None
        if method in ("lora", "both"):
            key = (id(llm), labels.get("seed", 0), labels.get("factor", 1), tuple(d.id for d in examples))
            result = self._tuned.get(key)
            if result is None:
                steps = steps_for(len(examples), s) * labels.get("factor", 1)
                result = tune_lora(
                    llm,
                    examples,
                    steps=steps,
                    lr=s.lr,
                    seed=labels.get("seed", 0),
                    rank=s.rank,
                    alpha=2 * s.rank,
                    layers=s.layers,
                    batch_size=s.batch_size,
                    fast=labels["precision"] == "bf16",
                    progress=False,
                )
                self._tuned = {key: result}  # "both" comes right after "lora" and needs the same adapter
            facts = {"steps": len(result.losses), "tuning_seconds": result.seconds}
            facts["last_loss"] = float(np.mean(result.losses[-4:]))
        with adapted(llm, result) if result is not None else contextlib.nullcontext(llm) as model:
            nll = response_nll(model, judged, prompts=prompts, max_tokens=2048, progress=False)
            if look is not None:
                look(model)
        return nll, facts


# --------------------------------------------------------------------------- plans


def plan_architectures(
    seeds: int, variants: Sequence[str], rates: Mapping[str, Sequence[Number]]
) -> list[dict[str, Any]]:
    """Cells of ``architectures``, seed by seed; ``rates`` per variant."""
    return [{"variant": v, "seed": k, "rate": r} for k in range(seeds) for v in variants for r in rates[v]]


def plan_precision(
    precisions: Sequence[str] = PRECISIONS, persons: int = 3, tasks: Sequence[str] = tuple(TASKS), speed: bool = False
) -> list[dict[str, Any]]:
    """Cells of ``precision``: persons, tasks, and speed, which is worth recording on a quiet machine only."""
    what = [f"person:{p}" for p in range(persons)] + list(tasks) + (["speed"] if speed else [])
    return [{"what": w, "precision": p} for w in what for p in precisions]


def plan_personal(
    persons: Sequence[int] = (0, 1, 2),
    seeds: int = 2,
    sizes: Sequence[int] = (10, 50, 200, 500),
    compressed: Sequence[int] = (10,),
    longer: Sequence[int] = (50,),
    factor: int = 4,
) -> list[dict[str, Any]]:
    """Cells of ``personal``.

    ``sizes``: examples for the full model; ``compressed``: those at which LoRA also tunes the int8
    model; ``longer``: those at which LoRA on the full model also trains ``factor`` times as long.
    """
    cells: list[dict[str, Any]] = []
    for seed in range(seeds):  # the first seed of everybody first
        for person in persons:
            for precision, chosen in (("bf16", sizes), ("int8", compressed)):
                who = {"person": person, "precision": precision}
                if seed == 0 and chosen:
                    cells.append(who | {"method": "base"})
                for n in chosen:
                    data = who | {"seed": seed, "n": n}
                    if precision == "int8":  # tuning only: retrieval trains nothing that could differ
                        cells.append(data | {"method": "lora", "factor": 1})
                        continue
                    cells.append(data | {"method": "rag"})
                    cells += [data | {"method": m, "factor": 1} for m in ("lora", "both")]
                    if n in longer:
                        cells.append(data | {"method": "lora", "factor": factor})
    return cells


def plan_tasks(
    tasks: Sequence[str] = LEARNED, seeds: int = 3, precisions: Sequence[str] = ("bf16",)
) -> list[dict[str, Any]]:
    """Cells of ``tasks``."""
    cells: list[dict[str, Any]] = []
    for task in tasks:
        for precision in precisions:
            what = {"task": task, "precision": precision}
            cells += [what | {"method": m} for m in ("base", "rag")]
            cells += [what | {"method": m, "seed": k} for k in range(seeds) for m in ("lora", "both")]
    return cells


PLANS: Mapping[str, Callable[..., list[dict[str, Any]]]] = {
    "precision": plan_precision,
    "personal": plan_personal,
    "tasks": plan_tasks,
}


# --------------------------------------------------------------------------- command line


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        prog="python -m pllm_helpers.experiments.device_study",
        description="Run the missing cells of an experiment of notebook 07 and write its table.",
    )
    p.add_argument("experiment", choices=EXPERIMENTS)
    p.add_argument("--seeds", type=int, metavar="N", help="number of seeds, from 0 (default: that of the plan)")
    p.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE", help="change a setting")
    p.add_argument("--out", metavar="FILE", help="default: data/results/device_EXPERIMENT.json")
    p.add_argument("--cache", metavar="DIR", help="folder of finished cells (default: the user's cache)")
    p.add_argument("--max-minutes", type=float, metavar="M", help="start no further cell after M minutes")
    p.add_argument("--threads", type=int, metavar="T", help="processor threads (default: one per core)")
    p.add_argument("--no-measure", action="store_true", help="write the table from the cells that are there")
    return p


def settings_of(assignments: Sequence[str]) -> DeviceSettings:
    """Default settings with ``name=value`` changes. Raises :class:`InputError` on a misspelt or mistyped one."""
    known = {f.name: type(f.default) for f in fields(DeviceSettings)}
    changes: dict[str, Any] = {}
    for text in assignments:
        name, equals, value = text.partition("=")
        if name not in known or not equals:
            raise InputError("--set", f"expected NAME=VALUE with a name among {', '.join(known)}, got {text!r}")
        try:
            changes[name] = int(value) if name == "layers" and value.isdigit() else known[name](value)
        except ValueError:
            raise InputError("--set", f"expected {known[name].__name__} for {name}, got {value!r}") from None
    return DeviceSettings(**changes)


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0: all cells are there; 3: stopped by ``--max-minutes``, go on with the same command; 2: bad input."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if arguments is None:  # kill stops it as Ctrl-C does; the finished cells are kept
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    a = parser().parse_args(given)
    try:
        prepare(0, threads=a.threads)
        lab = Lab(settings_of(a.set), cache=a.cache, say=lambda line: print(line, flush=True))
        if a.seeds is not None and (a.seeds < 1 or a.experiment == "precision"):
            raise InputError("--seeds", "expected at least 1, and none for precision, which has no chance in it")
        options = {} if a.seeds is None else {"seeds": a.seeds}
        how: dict[str, Any] = {"measure": not a.no_measure, "max_minutes": a.max_minutes}
        if a.experiment == "architectures":
            result = lab.architectures(**options, **how)
        else:
            result = lab.table(a.experiment, PLANS[a.experiment](**options), **how)
        print(result)
        if result.cells:
            words = [w for w in given if w != "--no-measure"]
            command = " ".join(["python -m pllm_helpers.experiments.device_study", *_without_paths(words)])
            out = result.save(a.out or Path("data/results") / f"device_{a.experiment}.json", command)
            print(f"table written to {out}")
        return 0 if result.complete else 3
    except InputError as problem:
        print(f"device_study: {problem}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; finished cells are kept, the same command goes on", file=sys.stderr)
        return 130


def _without_paths(words: Sequence[str]) -> list[str]:
    return [w if "/" not in w and "\\" not in w else "DIR" for w in words]


if __name__ == "__main__":
    sys.exit(main())
