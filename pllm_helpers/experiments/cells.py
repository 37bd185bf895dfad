"""One cell of the study: a stream, a seed and a policy; play, annotate, synthesise, tune, evaluate.

A cell's result is a JSON file in a cache folder. Its name is a hash of everything that matters:
the settings, the model's name, dtype and weights, the encoder, the rows, the policy and the seed,
and :data:`CODE_VERSION`. Files are written whole or not at all, so a kill loses at most the cell
in work, and several processes may share a folder: each cell is worked on under a lock.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from ..dialogue import DialogueSet
from ..evaluation import evaluate_responses, response_nll, response_words
from ..runtime import InputError, cache_dir, prepare, write_whole
from .streams import StudyStream, open_stream, shorten

if TYPE_CHECKING:
    from ..models import LLM, Encoder
    from ..selection import MetricTable

__all__ = ["BASE", "CODE_VERSION", "METRICS", "Cell", "CellResult", "Settings", "Workbench"]

CODE_VERSION = 1  # raise it when a change of code changes what a cell measures
BASE = "base"  # "policy" of the row that shows the model without an adapter
METRICS = ("nll", "rouge1", "rouge2", "rougeL", "bleu", "length_ratio", "copy_rate")
FLAGS = ("equals_prompt", "equals_another", "blank")

Number = float | int
Say = Callable[[str], None]


@dataclass(frozen=True)
class Settings:
    """What every cell of a study has in common. All of it is part of a cell's key.

    Attributes
    ----------
    model, dtype : as :func:`~pllm_helpers.models.load_llm` takes them; blank: the bundled model.
    device : of the model: ``"cpu"``, ``"cuda"``, or ``"auto"`` for a GPU where there is one.
    encoder, reading : encoder of the buffer metrics (blank: bundled) and reading of EOE.
    length, held_out : dialogue sets streamed, and held out for the evaluation.
    question_tokens, answer_tokens : longer questions and answers are cut, see
        :func:`~pllm_helpers.experiments.shorten`; in the stream and in the held-out rows.
    system_prompt : keep the default system message of the model's chat template.
    steps, lr, batch_size, rank, alpha, layers : of ``tune_lora``.
    generated, new_tokens : held-out rows that the tuned model answers (greedily), tokens per answer.
    """

    model: str = ""
    dtype: str = "auto"
    device: str = "cpu"
    encoder: str = ""
    reading: str = "spectral"
    length: int = 800
    held_out: int = 64
    question_tokens: int = 64
    answer_tokens: int = 64
    system_prompt: bool = True
    steps: int = 16
    lr: Number = 3e-3
    batch_size: int = 8
    rank: int = 8
    alpha: Number = 16
    layers: str | int = "upper"
    generated: int = 32
    new_tokens: int = 24

    def __post_init__(self) -> None:
        least = {"length": 8, "held_out": 2, "question_tokens": 4, "answer_tokens": 4, "generated": 2, "new_tokens": 1}
        for name, low in (least | {"steps": 1, "batch_size": 1, "rank": 1}).items():
            value = getattr(self, name)
            if isinstance(value, bool) or value < low:
                raise InputError(name, f"expected a whole number of at least {low}, got {value!r}")
        if not self.lr > 0:
            raise InputError("lr", f"expected a number above 0, got {self.lr!r}")

    @classmethod
    def profile(cls, name: str) -> Settings:
        """Settings of a profile: ``quick`` (seconds per cell), ``standard`` (laptop), ``full`` (hub model, GPU)."""
        if name not in PROFILES:
            raise InputError("profile", f"expected one of {', '.join(PROFILES)}, got {name!r}")
        return PROFILES[name]


PROFILES: dict[str, Settings] = {
    "quick": Settings(length=200, held_out=32, steps=8, generated=12, new_tokens=16),
    "standard": Settings(),
    "full": Settings(
        model="HuggingFaceTB/SmolLM2-1.7B-Instruct",
        dtype="bf16",
        device="auto",
        held_out=256,
        question_tokens=256,
        answer_tokens=128,
        steps=64,
        layers="all",
        generated=128,
        new_tokens=64,
    ),
}


@dataclass(frozen=True)
class Cell:
    """What varies between cells.

    Attributes
    ----------
    stream, seed : see :func:`~pllm_helpers.experiments.open_stream`; the seed also draws the
        adapter's start, the order of batches and the policy's choices.
    policy : a name from ``POLICIES``, or ``"base"``: no adapter.
    bins : entries of the buffer, in bins of 22 KB (one dialogue set each).
    sets : how much of the stream is played before tuning; 0: all of it.
    synthesis : dialogue sets synthesised per buffered one.
    steps : training steps; 0: as in the settings.
    """

    stream: str
    seed: int
    policy: str
    bins: int = 32
    sets: int = 0
    synthesis: int = 0
    steps: int = 0

    def __str__(self) -> str:
        extra = f", {self.sets} sets" if self.sets else ""
        extra += f", {self.synthesis} synthesised each" if self.synthesis else ""
        return f"{self.stream} seed {self.seed} {self.policy} ({self.bins} bins{extra})"


@dataclass(frozen=True)
class CellResult:
    """What a cell measured.

    Attributes
    ----------
    cell, key : which cell, and the hash of everything that mattered.
    rows : metric -> one number per held-out row: ``nll`` (nats per token, ``(held_out,)``); ROUGE,
        BLEU, length ratio and copy rate of the answers, ``(generated,)`` each. A result read from
        a committed table holds only some of them; ``means`` holds all.
    means : metric -> mean over rows, also the shares ``equals_prompt``, ``equals_another``, ``blank``
        and ``corpus_bleu``.
    seconds : per stage: ``select``, ``synthesise``, ``tune``, ``evaluate``.
    info : stream sizes and note, ``kept`` (stream positions in the buffer), ``buffer`` (what it
        holds, in numbers), losses, tokens, threads, ``cpu_seconds``, yield of the synthesis, and
        ``answers`` (the texts written; in the cache only, never in a table).
    """

    cell: Cell
    key: str
    rows: Mapping[str, Float[np.ndarray, " n"]]
    means: Mapping[str, float]
    seconds: Mapping[str, float]
    info: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """As JSON types."""
        return {
            "cell": asdict(self.cell),
            "key": self.key,
            "rows": {k: [round(float(x), 6) for x in v] for k, v in self.rows.items()},
            "means": dict(self.means),
            "seconds": dict(self.seconds),
            "info": dict(self.info),
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> CellResult:
        """The inverse of :meth:`to_json`."""
        rows = {k: np.array(v, dtype=float) for k, v in content["rows"].items()}
        return cls(Cell(**content["cell"]), content["key"], rows, content["means"], content["seconds"], content["info"])


class Workbench:
    """Runs cells: holds model, encoder, streams and the cache.

    Parameters
    ----------
    settings : shared by all cells.
    source : folder with the public data sets; ``None``: authored families stand in.
    llm, encoder : loaded on first use where not given; they must be what ``settings`` name.
    cache : folder of results; ``None``: ``experiments`` in the user's cache folder. Tables of
        metrics are kept there too, since all policies of a stream share them.
    allow_download : let a hub model that is not on this machine yet be fetched.
    say : takes lines of progress.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        source: str | os.PathLike | None = None,
        llm: LLM | None = None,
        encoder: Encoder | None = None,
        cache: str | os.PathLike | None = None,
        allow_download: bool = False,
        say: Say | None = None,
    ):
        self.settings, self.source, self.allow_download = settings, source, allow_download
        self._llm, self._encoder = llm, encoder
        self.cache = Path(cache) if cache is not None else cache_dir() / "experiments"
        self.cache.mkdir(parents=True, exist_ok=True)
        self.say = say or (lambda line: None)
        self._streams: dict[tuple[str, int], StudyStream] = {}
        self._tables: dict[tuple[str, str], MetricTable] = {}

    # ------------------------------------------------------------ what cells share

    @cached_property
    def llm(self) -> LLM:
        """The model; without its default system message if the settings say so."""
        import torch

        from ..models import load_llm

        s, llm = self.settings, self._llm
        if llm is None:
            device = s.device if s.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
            llm = load_llm(s.model or None, dtype=s.dtype, device=device, allow_download=self.allow_download)
        return llm if s.system_prompt else without_system_message(llm)

    @cached_property
    def encoder(self) -> Encoder:
        from ..models import load_encoder

        return self._encoder or load_encoder(self.settings.encoder or None, allow_download=self.allow_download)

    @cached_property
    def _model_key(self) -> dict[str, str]:
        from ..tuning.adapters import fingerprint

        llm = self.llm
        return {"name": llm.name, "dtype": llm.dtype, "device": llm.device.type, "weights": fingerprint(llm.model)}

    def stream(self, name: str, seed: int) -> StudyStream:
        """The stream of a name and seed, long rows cut."""
        if (name, seed) not in self._streams:
            s = self.settings
            whole = open_stream(name, seed, source=self.source, length=s.length, held_out=s.held_out)
            cut = [
                tuple(shorten(d, self.llm.tokenizer, s.question_tokens, s.answer_tokens) for d in part)
                for part in (whole.stream, whole.held_out)
            ]
            self._streams[name, seed] = replace(whole, stream=cut[0], held_out=cut[1])
        return self._streams[name, seed]

    def table(self, stream: StudyStream, mode: str = "paper") -> MetricTable:
        """Scores of a stream, from the cache where they are there."""
        from ..selection import MetricTable, load_lexicons, score_dialogues

        key = (stream.hash, mode)
        if key in self._tables:
            return self._tables[key]
        lexicons = load_lexicons()
        words = hashlib.sha256(repr([(k, sorted(lexicons[k])) for k in lexicons]).encode()).hexdigest()
        s = self.settings
        name = _hash([CODE_VERSION, *key, s.reading, s.encoder, words])
        path = self.cache / "tables" / f"{name}.npz"
        if path.is_file():
            with np.load(path, allow_pickle=False) as saved:
                arrays = {k: saved[k] for k in ("eoe", "dss", "domain", "embeddings", "n_tokens", "n_words")}
                table = MetricTable(**arrays, lexicons=tuple(lexicons), reading=s.reading, mode=mode)
        else:
            self.say(f"scoring {stream!r}, {mode}")
            table = score_dialogues(stream.stream, self.encoder, lexicons, reading=s.reading, mode=mode, progress=False)
            path.parent.mkdir(parents=True, exist_ok=True)
            arrays = {k: getattr(table, k) for k in ("eoe", "dss", "domain", "embeddings", "n_tokens", "n_words")}
            temporary = path.with_name(f".{os.getpid()}-{path.name}")
            np.savez(temporary, **arrays)
            os.replace(temporary, path)
        self._tables[key] = table
        return table

    # ------------------------------------------------------------ keys and cache

    def key(self, cell: Cell) -> str:
        """Hash of everything that decides the result of a cell; 20 hex digits."""
        what = asdict(cell)
        if cell.policy == BASE:  # the model without an adapter knows neither policy nor buffer
            what |= {"bins": 0, "sets": 0, "synthesis": 0, "steps": 0}
        return _hash(
            [CODE_VERSION, what, asdict(self.settings), self._model_key, self.stream(cell.stream, cell.seed).hash]
        )

    def path(self, cell: Cell) -> Path:
        """File of a cell's result."""
        return self.cache / f"{self.key(cell)}.json"

    def cached(self, cell: Cell) -> CellResult | None:
        """The result of a cell if it is there; a damaged file counts as absent."""
        try:
            content = json.loads(self.path(cell).read_text(encoding="utf-8"))
            return replace(CellResult.from_json(content), cell=cell)
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def run(self, cell: Cell, *, wait: bool = True) -> CellResult | None:
        """The result of a cell: from the cache, or measured now and cached.

        ``wait=False`` gives ``None`` at once where another process works on the cell.
        """
        import filelock

        done = self.cached(cell)
        if done:
            return done
        path = self.path(cell)
        try:
            with filelock.FileLock(str(path.with_suffix(".lock")), timeout=-1 if wait else 0):
                done = self.cached(cell)
                if done is None:
                    done = self.measure(cell)
                    write_whole(path, json.dumps(done.to_json(), ensure_ascii=False))
        except filelock.Timeout:
            return None
        with contextlib.suppress(OSError):
            path.with_suffix(".lock").unlink()
        return done

    def stale(self, cell: Cell) -> bool:
        """Whether a cached cell was tuned on another buffer than its policy would give now.

        The key holds :data:`CODE_VERSION`, not the code: this replays the selection (about a
        second) and compares. Cells that are not cached are not stale.
        """
        done = self.cached(cell)
        return done is not None and cell.policy != BASE and self.select(cell)[1]["kept"] != done.info.get("kept")

    # ------------------------------------------------------------ the work

    def select(self, cell: Cell) -> tuple[list[DialogueSet], dict[str, Any]]:
        """Play the stream through the policy and annotate what stayed: training rows, and an account."""
        from ..annotation import Annotator, GoldReplies
        from ..selection import POLICIES, DialogueBuffer, run_stream

        if cell.policy not in POLICIES:
            raise InputError("policy", f"expected one of {', '.join((BASE, *POLICIES))}, got {cell.policy!r}")
        stream = self.stream(cell.stream, cell.seed)
        table = self.table(stream, "released_code" if cell.policy == "released_code" else "paper")
        with DialogueBuffer(bins=cell.bins, seed=cell.seed) as buffer:
            decisions = run_stream(buffer, POLICIES[cell.policy](), stream.stream, table, stop=cell.sets or None)
            annotator = Annotator(buffer, GoldReplies(), per_day=None)  # all that stayed, as in the paper
            annotator.run()
            account = {
                "kept": sorted(entry.position for entry in buffer.entries),
                "actions": {a: sum(d.action == a for d in decisions) for a in ("insert", "replace", "discard")},
                "buffer": _portrait(buffer.entries, len(decisions)),
            }
            return annotator.dialogues(), account

    def measure(self, cell: Cell) -> CellResult:
        """Run a cell, whatever the cache holds."""
        import torch

        from ..tuning import adapted, tune_lora

        prepare(cell.seed, threads=torch.get_num_threads())
        used = time.process_time()
        stream, s = self.stream(cell.stream, cell.seed), self.settings
        info: dict[str, Any] = {"streamed": cell.sets or len(stream.stream), "note": stream.note}
        info |= {"held_out": len(stream.held_out), "threads": torch.get_num_threads()}
        seconds: dict[str, float] = {}
        if cell.policy == BASE:
            scores = self._evaluate(self.llm, stream, seconds, info)
        else:
            start = time.perf_counter()
            rows, account = self.select(cell)
            seconds["select"] = time.perf_counter() - start
            info |= account
            if cell.synthesis:
                rows = rows + self._synthesise(rows, cell, seconds, info)
            start = time.perf_counter()
            tuned = tune_lora(
                self.llm,
                rows,
                steps=cell.steps or s.steps,
                lr=s.lr,
                seed=cell.seed,
                rank=s.rank,
                alpha=s.alpha,
                layers=s.layers,
                batch_size=s.batch_size,
                progress=False,
            )
            seconds["tune"] = time.perf_counter() - start
            info |= {"trained_on": len(rows), "losses": [round(x, 4) for x in tuned.losses], "tokens": tuned.tokens}
            with adapted(self.llm, tuned) as personal:
                scores = self._evaluate(personal, stream, seconds, info)
        rows_out, means = scores
        info["cpu_seconds"] = round(time.process_time() - used, 2)
        _tidy()
        return CellResult(cell, self.key(cell), rows_out, means, {k: round(v, 3) for k, v in seconds.items()}, info)

    def _synthesise(
        self, rows: Sequence[DialogueSet], cell: Cell, seconds: dict[str, float], info: dict[str, Any]
    ) -> list[DialogueSet]:
        from ..synthesis import synthesize

        start = time.perf_counter()
        made = synthesize(self.llm, rows, cell.synthesis, seed=cell.seed, unfit="skip", progress=False)
        seconds["synthesise"] = time.perf_counter() - start
        info["synthesis"] = {"asked": made.asked, "parsed": made.parsed, "passed": made.passed}
        return list(made.dialogues)

    def _evaluate(
        self, llm: LLM, stream: StudyStream, seconds: dict[str, float], info: dict[str, Any]
    ) -> tuple[dict[str, Float[np.ndarray, " n"]], dict[str, float]]:
        """NLL of all held-out replies; answers to the first ``generated`` of them, and their scores."""
        from ..models import generate

        start, s = time.perf_counter(), self.settings
        rows = {"nll": reply_nll(llm, stream.held_out)}
        asked = stream.held_out[: s.generated]
        questions = [d.question for d in asked]
        answers = generate(llm, questions, max_new_tokens=s.new_tokens, batch_size=32, progress=False)
        scores = evaluate_responses(answers, [d.answer for d in asked], questions)
        rows |= {name: getattr(scores, name) for name in METRICS[1:]}
        means = {name: float(values.mean()) for name, values in rows.items()}
        means |= {name: float(getattr(scores, name).mean()) for name in FLAGS} | {"corpus_bleu": scores.corpus_bleu}
        seconds["evaluate"] = time.perf_counter() - start
        info["answers"] = answers
        return rows, means


def _tidy() -> None:
    """Give back what a cell leaves: reference cycles of the adapted model, and freed pages that malloc keeps."""
    import gc

    from ..tuning.memory import trim

    gc.collect()
    trim()


def reply_nll(llm: LLM, dialogues: Sequence[DialogueSet]) -> Float[np.ndarray, " n"]:
    """NLL per token as :func:`~pllm_helpers.evaluation.response_nll` has it, by the trainer's unpadded forward pass.

    It takes little more than half the time. The two agree to 1e-4 in fp32 and to rounding in bf16.
    """
    import torch

    from ..tuning.data import token_rows
    from ..tuning.packed import is_packable, packed_objective

    if not is_packable(llm.model):
        return response_nll(llm, dialogues, batch_size=16, progress=False)
    rows = token_rows(llm, dialogues, 1024, cut=False).rows
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].ids))
    objective, out = packed_objective(llm.model), np.zeros(len(rows))
    with torch.no_grad():
        for start in range(0, len(order), 16):
            part = order[start : start + 16]
            for i, total in zip(part, objective([rows[i] for i in part]).tolist(), strict=True):
                out[i] = total / rows[i].answer
    if not np.isfinite(out).all():
        raise InputError("model", "expected finite losses on the held-out replies, got NaN or infinity", "Lower lr.")
    return out


def _portrait(entries: Sequence[Any], streamed: int) -> dict[str, float]:
    """What a buffer holds, in numbers, to explain what comes of it.

    Words per answer and question; share of different words among the answers' words; redundancy
    (mean cosine between entries); recency (mean position over length of the stream); share of
    entries with a dominant domain; means of the scores at insertion.
    """
    answers = [response_words(e.dialogue.answer) for e in entries]
    words = [w for answer in answers for w in answer]
    unit = np.array([e.embedding / max(float(np.linalg.norm(e.embedding)), 1e-12) for e in entries], dtype=float)
    k = len(entries)
    numbers = {
        "words": len(words) / k,
        "question_words": float(np.mean([len(response_words(e.dialogue.question)) for e in entries])),
        "different_words": len(set(words)) / max(1, len(words)),
        "redundancy": float((unit @ unit.T).sum() - k) / (k * (k - 1)) if k > 1 else 0.0,
        "recency": float(np.mean([e.position for e in entries])) / max(1, streamed - 1),
        "with_domain": float(np.mean([e.domain is not None for e in entries])),
    }
    numbers |= {m: float(np.mean([e.scores[m] for e in entries])) for m in ("eoe", "dss", "idd")}
    return {name: round(value, 4) for name, value in numbers.items()}


def without_system_message(llm: LLM) -> LLM:
    """The same model with a chat template that adds no system message of its own."""
    import copy

    template = getattr(llm.tokenizer, "chat_template", None)
    plain = _no_default_system(template) if isinstance(template, str) else None
    if plain is None or plain == template:
        return llm
    tokenizer = copy.deepcopy(llm.tokenizer)
    tokenizer.chat_template = plain
    return replace(llm, tokenizer=tokenizer)


def _no_default_system(template: str) -> str:
    """A chat template without the branch that puts a default system message in front (SmolLM2, Qwen 2)."""
    import re

    pattern = r"\{%-? *if loop\.first and messages\[0\]\['role'\] != 'system' *-?%\}.*?\{%-? *endif *-?%\}"
    return re.sub(pattern, "", template, count=1, flags=re.DOTALL)


def _hash(what: Any) -> str:
    return hashlib.sha256(json.dumps(what, sort_keys=True, default=str).encode()).hexdigest()[:20]
