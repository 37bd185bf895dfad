"""Data synthesis of Qin et al.: the language model rewrites what the user asked, a ROUGE-1 check keeps the near ones.

From each annotated dialogue set the paper generates more sets by a prompt that asks for "a text
semantically similar" to the question; the response stays as it is ("Keep Same"), although the
abstract speaks of similar pairs of questions and responses. A sanity check on ROUGE-1 drops what
strayed too far; its threshold is not given.

Here a text passes if its ROUGE-1 F-measure against the original lies in ``[LOW, HIGH]``: below, it
is about something else; above, it is a copy, which teaches nothing new. ROUGE-1 counts shared
words and no more: an answer that repeats the question's words passes, and a good paraphrase in
entirely other words does not.

The bounds come from texts that no model of ours wrote. Of 700 tweets and their neutral paraphrases
(style-transfer-paraphrase, "English tweet"), ROUGE-1 has the quantiles 0.24 (10 %), 0.37 (25 %), 0.50,
0.67 (75 %) and 0.89 (95 %); of a tweet and the paraphrase of another one, 0.21 at 99 %. Two random messages of
one chitchat person, or two authored questions of the same topic, reach 0.27 and 0.26 at 99 %. So
0.3 lies above what unrelated text shares by chance, and 0.9 above what most paraphrases keep.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, SupportsIndex

from .annotation import is_label
from .dialogue import DialogueSet
from .evaluation import response_words
from .models.generation import generate, progress_bar
from .runtime import InputError

if TYPE_CHECKING:
    import pandas as pd

    from .models import LLM

__all__ = [
    "HIGH",
    "LOW",
    "MODES",
    "PAPER_PROMPT",
    "PROMPTS",
    "SHOTS",
    "VERDICTS",
    "Attempt",
    "Synthesis",
    "parse_bracketed",
    "rouge1",
    "sanity_check",
    "synthesis_prompt",
    "synthesize",
]

LOW, HIGH = 0.3, 0.9
MODES = ("question", "pair")
VERDICTS = ("passed", "too_far", "copy", "duplicate", "too_long", "empty", "unparsed")

# Qin et al. The wording is recalled, not read: unverified.
PAPER_PROMPT = (
    "Please refine and generate a text semantically similar to the following text block, no need to answer it, "
    "no need to explain, use [ ] to hold your generated response: {text}"
)

# written for this project; a question, chat, a symptom, chat without capitals
SHOTS = (
    (
        "How do I get red wine out of a white shirt?",
        "What is the best way to remove a red wine stain from a white shirt?",
    ),
    ("my sister just had her baby, I'm so happy!", "I'm over the moon, my sister's baby has finally arrived!"),
    (
        "I have had a headache since Monday and it won't go away. Should I be worried?",
        "My head has been hurting since Monday and nothing helps. Is that something to worry about?",
    ),
    ("what did you do last night", "how did you spend yesterday evening"),
)
_ASK = "Rewrite this message in other words: [{text}]"


def _paper(text: str) -> str:
    return PAPER_PROMPT.replace("{text}", text)


def _few_shot(text: str) -> list[dict[str, str]]:
    messages: list[dict[str, str]] = []
    for message, other in SHOTS:
        messages += [
            {"role": "user", "content": _ASK.replace("{text}", message)},
            {"role": "assistant", "content": f"[{other}]"},
        ]
    return [*messages, {"role": "user", "content": _ASK.replace("{text}", text)}]


PROMPTS: Mapping[str, Callable[[str], Any]] = {"paper": _paper, "few_shot": _few_shot}


def synthesis_prompt(text: str, prompt: str = "few_shot") -> str | list[dict[str, str]]:
    """What the model is asked, to be given to :func:`~pllm_helpers.models.generate`.

    ``"paper"``: the prompt of Qin et al., its wording recalled (unverified).
    ``"few_shot"``: four worked examples (:data:`SHOTS`) as turns of a chat, for models that do not
    follow an instruction without seeing it followed.

    SmolLM2-135M-Instruct on 20 authored and 20 chitchat questions, seed 0, default bounds: of the
    paper's prompt 15 of 40 outputs pass at temperature 0.7 and 14 of 40 at 1.0, with brackets in 1
    and 8 of them; of the few-shot prompt 27 of 40 at 0.5, 82 of 120 at 0.7 and 22 of 40 at 1.0, with
    brackets in all.
    """
    return PROMPTS[_choice("prompt", prompt, tuple(PROMPTS))](text)


# ---------------------------------------------------------------- parsing

_ROLE = re.compile(r"<\|[^|>\n]{0,40}\|>|^[ \t]*(?:assistant|user|system)[ \t]*(?::|$)", re.IGNORECASE | re.MULTILINE)
_OPEN, _CLOSE = "[［【", "]］】"
_QUOTES = {'"': '"', "“": "”", "'": "'", "‘": "’", "«": "»", "`": "`"}
# what announces the text: a first line that ends in a colon, or the same words with the text on their line
_PREFACE = re.compile(r"[^\n:]{0,300}?:[ \t]*(?:\n|$)")
_LABEL = re.compile(
    r"(?:(?:here(?:'s|’s| is| are)|sure|certainly|of course)\b[^\n:]{0,300}|"
    r"the (?:text|sentence|message)(?: is)?|"
    r"[^\n:.?!]{0,200}\b(?:semantically similar|original|revised|edited|rewritten|rephrased)\b[^\n:]{0,80}):[ \t]+",
    re.IGNORECASE,
)
_LATER = re.compile(  # further down, only lines that speak of the text are taken for announcements
    r"[^\n:]{0,200}\b(?:text|version|translated|revised|edited|rewritten|rephrased)\b[^\n:]{0,80}:[ \t]*(?:\n|$)?",
    re.IGNORECASE,
)


def parse_bracketed(text: str, *, strict: bool = False) -> str | None:
    """The generated text in a raw output.

    The first bracketed group that holds a word counts; brackets inside it belong to it, and one
    that is never closed runs to the end. Role tags and quotation marks around are taken off.

    Small models rarely write the brackets that they are asked for. So, unless ``strict``, an
    output without a bracket counts as it stands: its first paragraph, after a preface that ends in
    a colon ("Here's a revised version of the text:").

    Returns ``""`` where there is nothing but brackets, quotes and white space, and ``None`` where
    no text can be told apart: no bracket (``strict``), or a preface and nothing after it.
    """
    clean = _ROLE.sub("\n", text).replace("\x00", " ").strip()
    if not _has_word(clean):
        return ""
    groups = _groups(clean)
    for group in groups:
        if _has_word(group):
            return _unquoted(group)
    if strict:
        return "" if groups else None
    return _plain(re.sub(r"[\[\]［］【】]", " ", clean))


def _groups(text: str) -> list[str]:
    """Contents of the outermost brackets, in order; the last one may lack its closing bracket."""
    groups: list[str] = []
    depth, start = 0, 0
    for place, c in enumerate(text):
        if c in _OPEN:
            if depth == 0:
                start = place + 1
            depth += 1
        elif c in _CLOSE and depth:
            depth -= 1
            if depth == 0:
                groups.append(text[start:place])
    if depth:
        groups.append(text[start:])
    return groups


def _plain(text: str) -> str | None:
    """The text in an output without brackets: its first paragraph, or what an announcement is followed by."""
    paragraphs = [p.strip() for p in re.split(r"\n[ \t]*\n", text) if _has_word(p)]
    found, place = None, 0
    while place < len(paragraphs):
        match = _PREFACE.match(paragraphs[place]) or _LABEL.match(paragraphs[place])
        if match is None:
            found = paragraphs[place]
            later = ((k, m) for k in range(place + 1, len(paragraphs)) if (m := _LATER.match(paragraphs[k])))
            place, match = next(later, (len(paragraphs), None))
        if match is not None:
            rest = paragraphs[place][match.end() :].strip()
            if _has_word(rest):
                paragraphs[place] = rest
            else:
                place += 1
    return None if found is None else _unquoted(found)


def _unquoted(text: str) -> str:
    """Without outer white space and without quotation marks that enclose it all."""
    text = text.strip()
    while len(text) > 1 and _QUOTES.get(text[0]) == text[-1] and text[0] not in text[1:-1] and _has_word(text):
        text = text[1:-1].strip()
    if text[:1] in ('"', "“") and not any(q in text[1:] for q in '"”'):  # opened, never closed
        text = text[1:].strip()
    return text


def _has_word(text: str) -> bool:
    return any(c.isalnum() for c in text) or bool(response_words(text))


# ---------------------------------------------------------------- the check


class _Words:
    """What ``rouge_score`` asks a tokenizer for; its own knows only a-z and 0-9."""

    tokenize = staticmethod(response_words)


@lru_cache(maxsize=1)
def _scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rouge1"], tokenizer=_Words())


def rouge1(original: str, text: str) -> float:
    """ROUGE-1 F-measure in [0, 1] (Lin 2004): shared words, each as often as both texts have it.

    Words come from :func:`~pllm_helpers.evaluation.response_words`, so every script counts. Texts
    without a word score 0.
    """
    return float(_scorer().score(original, text)["rouge1"].fmeasure)


def sanity_check(
    original: str,
    text: str | None,
    *,
    low: float | int = LOW,
    high: float | int = HIGH,
    seen: Iterable[Sequence[str]] = (),
) -> str:
    """Verdict on one generated text (Qin et al.; the upper bound is ours).

    ``"passed"``: ROUGE-1 against ``original`` in ``[low, high]``. ``"too_far"``, ``"copy"``: below
    or above, or the same words. ``"duplicate"``: the words, in order, of a text in ``seen``
    (sequences of words, as from ``response_words``). ``"empty"``: no word. ``"unparsed"``:
    ``text`` is ``None``. (``"too_long"`` is for :func:`synthesize` to say.)

    Raises :class:`~pllm_helpers.runtime.InputError` unless ``0 <= low <= high <= 1``.
    """
    _bounds(low, high)
    if text is None:
        return "unparsed"
    words = tuple(response_words(text))
    if not words:
        return "empty"
    score = rouge1(original, text)
    if words == tuple(response_words(original)) or score > high:
        return "copy"
    if words in (seen if isinstance(seen, (set, frozenset, dict)) else {tuple(s) for s in seen}):
        return "duplicate"
    return "too_far" if score < low else "passed"


# ---------------------------------------------------------------- results


class Reply(NamedTuple):
    """The reply as the model rewrote it, with its own ROUGE-1 against the original's reply."""

    raw: str
    finished: bool
    text: str | None
    rouge1: float | None


@dataclass(frozen=True, slots=True)
class Attempt:
    """One request to the model and what became of it.

    Attributes
    ----------
    original : the dialogue set that was to be rewritten.
    number : 0, 1, … for each original.
    raw : what the model printed. finished : whether it ended its turn before the token limit.
    text : the question in ``raw``, ``None`` if there is none.
    rouge1 : of ``text`` against the original's question; ``None`` without text.
    verdict : one of :data:`VERDICTS`; in mode ``"pair"`` also ``"reply_…"``: the question passed,
        the reply did not.
    reply : the rewritten reply (mode ``"pair"``, and only where the question passed).
    """

    original: DialogueSet
    number: int
    raw: str
    finished: bool
    text: str | None
    rouge1: float | None
    verdict: str
    reply: Reply | None = None

    @property
    def bracketed(self) -> bool:
        """Whether the model put a text into brackets, as it was asked to."""
        return bool(parse_bracketed(self.raw, strict=True))


@dataclass(frozen=True)
class Synthesis:
    """What :func:`synthesize` made of ``originals``.

    Attributes
    ----------
    attempts : every request, in the order in which they were judged: round by round, and within
        a round in the order of the originals.
    settings : what :func:`synthesize` was called with.
    skipped : originals that were left out, each with the reason (``unfit="skip"`` only).
    """

    originals: tuple[DialogueSet, ...]
    attempts: tuple[Attempt, ...]
    settings: Mapping[str, Any]
    skipped: tuple[tuple[DialogueSet, str], ...] = ()

    def __repr__(self) -> str:
        counts = f"{self.asked} asked, {self.parsed} parsed, {self.passed} passed"
        return f"Synthesis({len(self.originals)} originals: {counts})"

    @cached_property
    def dialogues(self) -> list[DialogueSet]:
        """The sets that passed, in the order of their originals; ``source`` is ``"synthetic"``."""
        rank = {id(d): place for place, d in enumerate(self.originals)}
        passed = [a for a in self.attempts if a.verdict == "passed"]
        return [self._made(a) for a in sorted(passed, key=lambda a: rank[id(a.original)])]

    def _made(self, attempt: Attempt) -> DialogueSet:
        d = attempt.original
        meta = {
            "original": d.id,
            "original_source": d.source,
            "rouge1": attempt.rouge1,
            "attempt": attempt.number,
            **{name: self.settings[name] for name in ("seed", "mode", "prompt", "model")},
        }
        answer = d.answer if attempt.reply is None else attempt.reply.text or ""
        return DialogueSet(d.user, attempt.text or "", answer, d.time, "synthetic", meta)

    @property
    def asked(self) -> int:
        """Requests to the model."""
        return len(self.attempts)

    @property
    def bracketed(self) -> int:
        """Outputs in which the model used brackets."""
        return sum(a.bracketed for a in self.attempts)

    @property
    def parsed(self) -> int:
        """Outputs in which a text was found."""
        return sum(bool(a.text) for a in self.attempts)

    @property
    def passed(self) -> int:
        """Texts that passed the sanity check."""
        return sum(a.verdict == "passed" for a in self.attempts)

    @property
    def verdicts(self) -> dict[str, int]:
        """How many attempts got each verdict; all of :data:`VERDICTS`, then those on replies."""
        counts = Counter(a.verdict for a in self.attempts)
        return {v: counts.pop(v, 0) for v in VERDICTS} | dict(sorted(counts.items()))

    def table(self) -> pd.DataFrame:
        """One row per attempt: original, text, ROUGE-1, verdict and the raw output."""
        import pandas as pd

        columns = ["original", "number", "question", "text", "rouge1", "verdict", "bracketed", "raw"]
        rows = [
            (a.original.id, a.number, a.original.question, a.text, a.rouge1, a.verdict, a.bracketed, a.raw)
            for a in self.attempts
        ]
        return pd.DataFrame(rows, columns=columns)

    def judged(self, *, low: float | int = LOW, high: float | int = HIGH) -> Synthesis:
        """The same outputs under other bounds, without asking the model again.

        An original may then have more or fewer than ``n`` sets. In mode ``"pair"`` a question
        that passes only now has no rewritten reply: verdict ``"reply_unasked"``.
        """
        settings = {**self.settings, "low": low, "high": high}
        judge = _Judge(self.originals, settings)
        attempts = []
        for a in self.attempts:
            new = judge.question(a.original, a.number, a.raw, a.finished)
            if new.verdict == "passed" and settings["mode"] == "pair":
                new = (
                    judge.reply(new, a.reply.raw, a.reply.finished)
                    if a.reply
                    else replace(new, verdict="reply_unasked")
                )
            attempts.append(new)
        return replace(self, attempts=tuple(attempts), settings=settings)


# ---------------------------------------------------------------- synthesis


def synthesize(
    llm: LLM,
    dialogues: DialogueSet | Sequence[DialogueSet],
    n: SupportsIndex,
    *,
    seed: SupportsIndex = 0,
    mode: str = "question",
    prompt: str = "few_shot",
    low: float | int = LOW,
    high: float | int = HIGH,
    temperature: float | int = 0.7,
    top_p: float | int = 0.95,
    max_new_tokens: SupportsIndex | None = None,
    batch_size: SupportsIndex = 16,
    rounds: SupportsIndex = 2,
    strict: bool = False,
    unfit: str = "raise",
    out: str | os.PathLike[str] | None = None,
    progress: bool | None = None,
) -> Synthesis:
    """Up to ``n`` new dialogue sets from each of ``dialogues`` (Qin et al.).

    Parameters
    ----------
    n : sets wanted per original, 1 to 100.
    mode : ``"question"``: a new question, the original's reply ("Keep Same"). ``"pair"``: where
        the question passes, the reply is rewritten by the same prompt and has to pass as well. A
        small model often turns a reply's meaning round, and the check does not see it ("I Need
        you!" became "I don't want to hear about you!"): look at such pairs before training on them.
    prompt : ``"paper"`` or ``"few_shot"``, see :func:`synthesis_prompt`.
    low, high : bounds of :func:`sanity_check`.
    temperature, top_p : sampling, see :func:`~pllm_helpers.models.generate`.
    max_new_tokens : bound on each output; by default one and a half times the original's
        tokens, rounded up to 32, 64, 128, … An output cut by it inside its brackets, or
        without brackets, is ``"too_long"``.
    rounds : each round asks for as many texts as an original still lacks; so at most
        ``n * rounds`` requests per original.
    strict : count only texts in brackets, see :func:`parse_bracketed`.
    unfit : ``"raise"`` or ``"skip"`` for originals with a blank question or reply, without a word,
        or too long for the model.
    out : a JSON Lines file that every batch is added to. A later call takes from it whatever was
        asked with the same weights, prompt, text, sampling and seed, so an interrupted run goes on
        where it was. A line that broke off is asked again.

    Every request draws its own random numbers, from ``seed``, the original and the request's number:
    batch size, other originals and interruptions do not change a text. No text is kept twice, nor
    one that equals any original's question.

    Accepted sets have the original's user and time, ``source="synthetic"`` and in ``meta``:
    ``original`` (id), ``original_source``, ``rouge1``, ``attempt``, ``seed``, ``mode``, ``prompt``, ``model``.

    Raises :class:`~pllm_helpers.runtime.InputError` for settings out of range and unfit originals
    (safety labels in the place of replies are unfit too).
    """
    originals = [dialogues] if isinstance(dialogues, DialogueSet) else list(dialogues)
    for place, d in enumerate(originals):
        if not isinstance(d, DialogueSet):
            raise InputError(f"dialogues[{place}]", f"expected a DialogueSet, got {type(d).__name__}")
    settings = {
        "n": _whole("n", n, 1, 100),
        "seed": _whole("seed", seed, 0, 2**63),
        "mode": _choice("mode", mode, MODES),
        "prompt": _choice("prompt", prompt, tuple(PROMPTS)),
        "low": low,
        "high": high,
        "temperature": temperature,
        "top_p": top_p,
        "max_new_tokens": None if max_new_tokens is None else _whole("max_new_tokens", max_new_tokens, 1, 4096),
        "batch_size": _whole("batch_size", batch_size, 1, 10_000),
        "rounds": _whole("rounds", rounds, 1, 100),
        "strict": strict,
        "model": llm.name,
    }
    _bounds(low, high)
    if temperature == 0 and settings["n"] * settings["rounds"] > 1:
        raise InputError("temperature", "expected more than 0 for several texts: greedy decoding repeats itself")
    _choice("unfit", unfit, ("raise", "skip"))
    kept: list[DialogueSet] = []
    skipped: list[tuple[DialogueSet, str]] = []
    for place, d in enumerate(originals):
        if problem := _unfit(llm, d, settings):
            if unfit == "raise":
                raise InputError(f"dialogues[{place}]", problem, "Leave it out or pass unfit='skip'.")
            skipped.append((d, problem))
        else:
            kept.append(d)

    writer = _Writer(llm, settings, None if out is None else Path(out).expanduser(), progress)
    judge = _Judge(kept, settings)
    names = _names(kept)
    attempts: list[Attempt] = []
    asked, passed = Counter[int](), Counter[int]()
    for _ in range(settings["rounds"]):
        wanted = [(i, asked[i] + k) for i in range(len(kept)) for k in range(settings["n"] - passed[i])]
        outputs = writer.rewrite([(kept[i].question, f"{names[i]}|{k}") for i, k in wanted], "questions")
        made = [judge.question(kept[i], k, *o) for (i, k), o in zip(wanted, outputs, strict=True)]
        if mode == "pair":
            good = [place for place, a in enumerate(made) if a.verdict == "passed"]
            replies = [(made[p].original.answer, f"{names[wanted[p][0]]}|{wanted[p][1]}|reply") for p in good]
            for place, output in zip(good, writer.rewrite(replies, "replies"), strict=True):
                made[place] = judge.reply(made[place], *output)
        for (i, _), attempt in zip(wanted, made, strict=True):
            asked[i] += 1
            passed[i] += attempt.verdict == "passed"
        attempts += made
    return Synthesis(tuple(kept), tuple(attempts), settings, tuple(skipped))


class _Judge:
    """Verdicts, in the order in which texts come; remembers the questions that passed."""

    def __init__(self, originals: Sequence[DialogueSet], settings: Mapping[str, Any]):
        _bounds(settings["low"], settings["high"])
        self.settings = settings
        self.seen = {tuple(response_words(d.question)) for d in originals}

    def question(self, original: DialogueSet, number: int, raw: str, finished: bool) -> Attempt:
        text, score, verdict = self._verdict(original.question, raw, finished, self.seen)
        if verdict == "passed":
            self.seen.add(tuple(response_words(text or "")))
        return Attempt(original, number, raw, finished, text, score, verdict)

    def reply(self, attempt: Attempt, raw: str, finished: bool) -> Attempt:
        text, score, verdict = self._verdict(attempt.original.answer, raw, finished, set())
        verdict = verdict if verdict == "passed" else f"reply_{verdict}"
        return replace(attempt, verdict=verdict, reply=Reply(raw, finished, text, score))

    def _verdict(
        self, original: str, raw: str, finished: bool, seen: set[tuple[str, ...]]
    ) -> tuple[str | None, float | None, str]:
        text = parse_bracketed(raw, strict=self.settings["strict"])
        score = rouge1(original, text) if text else None
        if text and not finished and raw.rstrip().endswith(text):  # the limit cut the text itself
            return text, score, "too_long"
        verdict = sanity_check(original, text, low=self.settings["low"], high=self.settings["high"], seen=seen)
        return text, score, verdict


class _Writer:
    """Asks the model in batches; what a file already holds is not asked again."""

    def __init__(self, llm: LLM, settings: Mapping[str, Any], path: Path | None, progress: bool | None):
        self.llm, self.settings, self.path, self.progress = llm, settings, path, progress
        self.known: dict[str, tuple[str, bool]] = {}
        if path is not None:
            self.weights = _fingerprint(llm)
            self.known = _read(path)

    def rewrite(self, wanted: Sequence[tuple[str, str]], what: str) -> list[tuple[str, bool]]:
        """Raw output, and whether it ended by itself, for each (text, name of its random numbers)."""
        s = self.settings
        jobs = []
        for place, (text, name) in enumerate(wanted):
            prompt = synthesis_prompt(text, s["prompt"])
            limit = s["max_new_tokens"] or _limit(self.llm, text)
            seed = int.from_bytes(hashlib.sha256(f"{s['seed']}|{name}".encode()).digest()[:8], "big") >> 1
            key = "" if self.path is None else self._key(prompt, limit, seed)
            jobs.append((limit, len(text), place, prompt, seed, key))
        found: dict[int, tuple[str, bool]] = {j[2]: self.known[j[5]] for j in jobs if j[5] in self.known}
        jobs = sorted((j for j in jobs if j[2] not in found), key=lambda j: (-j[0], -j[1], j[2]))
        size = s["batch_size"]
        with progress_bar(len(jobs), what, self.progress) as bar:
            while jobs:  # a batch has one token limit; texts of like length go together
                batch = [j for j in jobs[:size] if j[0] == jobs[0][0]]
                jobs = jobs[len(batch) :]
                answers = generate(
                    self.llm,
                    [j[3] for j in batch],
                    max_new_tokens=batch[0][0],
                    temperature=s["temperature"],
                    top_p=s["top_p"],
                    seed=[j[4] for j in batch],
                    batch_size=size,
                    progress=False,
                    details=True,
                )
                outputs = [(a.text, a.finished) for a in answers]
                found.update({j[2]: o for j, o in zip(batch, outputs, strict=True)})
                if self.path is not None:
                    self._append({j[5]: o for j, o in zip(batch, outputs, strict=True)})
                bar.update(len(batch))
        return [found[place] for place in range(len(wanted))]

    def _key(self, prompt: Any, limit: int, seed: int) -> str:
        s = self.settings
        seen = self.llm.format_chat(prompt)
        greedy = s["temperature"] == 0
        parts = [self.weights, seen, limit, float(s["temperature"]), None if greedy else [float(s["top_p"]), seed]]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]

    def _append(self, rows: Mapping[str, tuple[str, bool]]) -> None:
        lines = "".join(f"{_line(key, *output)}\n" for key, output in rows.items())
        try:
            with self.path.open("a+b") as file:
                if file.tell() and not _ends_line(file):
                    lines = "\n" + lines
                file.write(lines.encode("ascii"))
                file.flush()
                os.fsync(file.fileno())
        except OSError as e:
            raise InputError("out", f"expected a file that can be written, {self.path} cannot ({e})") from e
        self.known.update(rows)


def _ends_line(file: Any) -> bool:
    file.seek(-1, os.SEEK_END)
    return file.read(1) == b"\n"


def _line(key: str, raw: str, finished: bool) -> str:
    crc = zlib.crc32(f"{key}|{finished}|{raw}".encode("utf-8", "surrogatepass"))
    return json.dumps({"key": key, "finished": finished, "raw": raw, "crc": crc})


def _read(path: Path) -> dict[str, tuple[str, bool]]:
    """Outputs by key. A line that is not whole is passed over: its request will be made again."""
    try:
        lines = path.read_bytes().splitlines()
    except FileNotFoundError:
        if not path.parent.is_dir():
            raise InputError("out", f"expected the folder {path.parent} to be there", "Create it first.") from None
        return {}
    except OSError as e:
        raise InputError("out", f"expected a file that can be read and written, got {path} ({e})") from e
    known: dict[str, tuple[str, bool]] = {}
    for line in lines:
        try:
            row = json.loads(line)
            if _line(row["key"], row["raw"], row["finished"]) == line.decode("ascii"):
                known[row["key"]] = (row["raw"], row["finished"])
        except (ValueError, TypeError, KeyError, RecursionError):
            continue
    if any(line.strip() for line in lines) and not known and not lines[0].startswith(b'{"key"'):
        raise InputError("out", f"expected a file of an earlier synthesis, {path} is another one", "Name a new file.")
    return known


def _fingerprint(llm: LLM) -> str:
    """Hash of the model's name, dtype and up to 1,024 values of each weight; adapters count as weights."""
    digest = hashlib.sha256(f"{llm.name}|{llm.dtype}".encode())
    with llm.lock:
        for name, weight in llm.model.named_parameters():
            values = weight.detach().flatten()
            sample = values[:: max(1, values.numel() // 1024)].float().cpu().numpy()
            digest.update(f"{name}|{tuple(weight.shape)}".encode() + sample.tobytes())
    return digest.hexdigest()


def _limit(llm: LLM, text: str) -> int:
    """Tokens that a rewriting may take: one and a half times the text's, rounded up to a power of two, 32 at least."""
    tokens = len(llm.tokenizer(text, add_special_tokens=False)["input_ids"])
    return max(32, 1 << math.ceil(math.log2(1.5 * tokens + 1)))


def _names(originals: Sequence[DialogueSet]) -> list[str]:
    """Names for the random numbers: content hashes; of equal originals, the later ones get a count."""
    times: Counter[str] = Counter()
    names = []
    for d in originals:
        names.append(f"{d.id}|{times[d.id]}")
        times[d.id] += 1
    return names


def _unfit(llm: LLM, d: DialogueSet, settings: Mapping[str, Any]) -> str:
    """Why an original cannot be used, or nothing."""
    if not _has_word(d.question):
        return "expected a question with a word in it, it has none"
    if not d.answer.strip() or (settings["mode"] == "pair" and not _has_word(d.answer)):
        return "expected a reply with a word in it, it has none"
    if is_label(d):
        return f"expected a reply, got the safety label {d.answer.strip()!r}"
    room = getattr(llm.model.config.get_text_config(), "max_position_embeddings", None) or 1 << 30
    for name in ("question", "answer") if settings["mode"] == "pair" else ("question",):
        text = getattr(d, name)
        try:
            text.encode()
        except UnicodeEncodeError:
            return f"expected Unicode text in its {name}, got a lone surrogate"
        prompt = llm.format_chat(synthesis_prompt(text, settings["prompt"]))
        tokens = len(llm.tokenizer(prompt, add_special_tokens=False)["input_ids"])
        limit = settings["max_new_tokens"] or _limit(llm, text)
        if tokens + 1 + limit > room:
            return f"expected room for its {name}: {tokens} tokens of prompt and {limit} new ones, the model has {room}"
    return ""


def _bounds(low: float | int, high: float | int) -> None:
    if isinstance(low, bool) or isinstance(high, bool) or not 0 <= low <= high <= 1:
        raise InputError("low, high", f"expected 0 <= low <= high <= 1, got {low} and {high}")


def _choice(name: str, value: str, known: tuple[str, ...]) -> str:
    if value not in known:
        raise InputError(name, f"expected {' or '.join(map(repr, known))}, got {value!r}")
    return value


def _whole(name: str, value: SupportsIndex, least: int, most: int) -> int:
    if isinstance(value, bool) or not least <= value.__index__() <= most:
        raise InputError(name, f"expected a whole number from {least} to {most}, got {value!r}")
    return value.__index__()
