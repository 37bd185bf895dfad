"""Rows of each data set, in its own field names, turned into dialogue sets.

One function per data set. Each takes the rows of one file and gives dialogue sets; what it cannot
use it hands to ``drop`` with a reason. Safety labels, placeholders and blanks are never replies.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..dialogue import DialogueSet
from .readers import Row

__all__ = ["CONVERTERS", "FAMILIES", "FIELDS", "MIRRORS", "UNIFORM_SOURCES", "Options"]

FAMILIES = ("instruction", "open_qa", "prosocial", "empathetic", "reasoning", "medical")

# the authored family that mirrors each data set, and stands in for it offline
MIRRORS = {
    "alpaca": "instruction",
    "dolly": "open_qa",
    "prosocial": "prosocial",
    "empathetic": "empathetic",
    "openorca": "reasoning",
    "meddialog": "medical",
}

# what the uniform files call their rows; the first is the data set itself, the others stand in for it
UNIFORM_SOURCES: dict[str, tuple[str, ...]] = {
    "alpaca": ("alpaca",),
    "dolly": ("dolly",),
    "prosocial": ("prosocial_dialog",),
    "empathetic": ("empathetic_dialogues",),
    "openorca": ("openorca",),
    "meddialog": ("meddialog", "covid_dialogue_en", "mts_dialog", "medquad", "chatdoctor5k"),
    "sst2": ("sst2",),
}

# the fields that a row must have, for error messages
FIELDS: dict[str, str] = {
    "alpaca": "instruction, input, output",
    "dolly": "instruction, context, response, category",
    "prosocial": "context, response (or a list of turns with text, labels)",
    "empathetic": "conv_id, utterance_idx, speaker_idx, utterance",
    "openorca": "system_prompt, question, response",
    "meddialog": "utterances, dialogue_turns or src (or the raw text with Patient: and Doctor:)",
    "sst2": "sentence, label",
    "uniform": "id, response, source and instruction or turns",
    **dict.fromkeys(("authored", *FAMILIES[:2], *FAMILIES[4:]), "id, family, topic, question, answer"),
}


@dataclass(frozen=True, slots=True)
class Options:
    """What the caller asked for; see ``load_dialogues``."""

    name: str
    keep_unanswered: bool = False
    context_turns: int = 0


class Drop(Exception):
    """A row that cannot be used; ``wrong`` marks rows that are broken, of another format or of another data set."""

    def __init__(self, reason: str, wrong: bool = False):
        super().__init__(reason)
        self.reason, self.wrong = reason, wrong


Dropper = Callable[[int, str, bool], None]
Converter = Callable[[Iterator[Row], Options, Dropper], Iterator[DialogueSet]]

# ---------------------------------------------------------------- cells

_SURROGATE = re.compile("[\ud800-\udfff]")
_NO_INPUT = re.compile(
    r"<?\s*no\s*input(\s+(required|needed|necessary|provided))?\s*>?[\s.\d]*|<none>|n/a", re.IGNORECASE
)


def _text(value: Any, name: str) -> str:
    """The cell as text without outer white space; missing and NaN count as blank."""
    if value is None or value != value:
        return ""
    if not isinstance(value, str):
        raise Drop(f"{name} is not text but {type(value).__name__}")
    if _SURROGATE.search(value):
        raise Drop(f"{name} is not valid UTF-8")
    return value.strip()


def _has(value: Any, *names: str) -> bool:
    return isinstance(value, Mapping) and all(n in value for n in names)


def _wrong(value: Any, options: Options) -> Drop:
    got = (
        f"the fields {', '.join(map(str, list(value)[:8]))}"
        if isinstance(value, Mapping)
        else f"a {type(value).__name__}"
    )
    return Drop(f"expected the fields {FIELDS[options.name]}, got {got}", wrong=True)


def _make(
    options: Options,
    question: str,
    answer: str,
    meta: Mapping[str, Any],
    *,
    source: str = "",
    blank: str = "the question is blank",
    unanswered: str = "no reply: it is blank",
) -> DialogueSet:
    if not question and blank:
        raise Drop(blank)
    if not answer and not (options.keep_unanswered and question):
        raise Drop(unanswered)
    user = "authored" if source.startswith("authored/") else options.name
    return DialogueSet(user, question, answer, None, source or options.name, meta)


def _join(instruction: str, extra: str) -> str:
    return f"{instruction}\n\n{extra}" if instruction and extra else instruction or extra


# ---------------------------------------------------------------- turns


@dataclass(slots=True)
class _Turn:
    speaker: str
    text: str
    rows: list[int] = field(default_factory=list)


def _runs(turns: Iterable[_Turn]) -> list[_Turn]:
    """Turns in a row by one speaker made one, their texts on lines of their own; blank ones left out."""
    merged: list[_Turn] = []
    for turn in turns:
        if not turn.text:
            continue
        if merged and merged[-1].speaker == turn.speaker:
            last = merged[-1]
            merged[-1] = _Turn(last.speaker, f"{last.text}\n{turn.text}", last.rows + turn.rows)
        else:
            merged.append(turn)
    return merged


def _with_context(turns: list[_Turn], at: int, options: Options) -> str:
    """Turn ``at`` as the question, after up to ``context_turns`` earlier turns as ``speaker: text`` lines."""
    first = max(0, at - options.context_turns)
    if first == at:
        return turns[at].text
    return "\n".join(f"{t.speaker}: {t.text}" for t in turns[first : at + 1])


def _listed(value: Any, name: str = "turns") -> list[_Turn]:
    if not isinstance(value, list) or not all(_has(t, "speaker", "text") for t in value):
        raise Drop(f"{name} is not a list of turns with speaker and text")
    return [_Turn(_text(t["speaker"], "speaker").lower(), _text(t["text"], "text")) for t in value]


# ---------------------------------------------------------------- the uniform format


def _own_format(value: Any, number: int, options: Options) -> DialogueSet | None:
    """The row read in one of this project's own formats, whatever the data set; ``None`` if it is in neither."""
    if _has(value, "id", "response", "source") and ("instruction" in value or "turns" in value):
        return _uniform(value, number, options)
    if _has(value, "id", "family", "topic", "question", "answer"):
        return _authored(value, number, options)
    return None


_PATIENT = ("patient", "guest_family", "gest_family")  # the last as MTS-Dialog spells it once


def _uniform(value: Mapping[str, Any], number: int, options: Options) -> DialogueSet:
    source = _text(value["source"], "source")
    if source not in UNIFORM_SOURCES.get(options.name, (source,)):
        raise Drop(f"expected rows of {options.name}, got rows of {source}", wrong=True)
    extra = value.get("meta")
    labels = dict(extra) if isinstance(extra, Mapping) else {}
    answer = _text(value["response"], "response")
    unanswered = "no reply: it is blank"
    if str(labels.get("response_is", "")).startswith("safety label") or (
        options.name == "prosocial" and is_safety_label(answer)
    ):
        answer, unanswered = "", "no reply: only a safety label"
    elif answer.lower() == "<nooutput>":
        answer, unanswered = "", "no reply: it says <nooutput>"
    blank = "the question is blank"
    if "turns" in value:
        turns = _runs(_listed(value["turns"]))
        if not turns:
            raise Drop("no turn before the reply")
        at = len(turns) - 1
        if options.name == "meddialog" and turns[-1].speaker not in _PATIENT:
            # the last word is the patient's: go back to the doctor's last reply
            replies = [
                i for i in range(1, len(turns)) if turns[i].speaker == "doctor" and turns[i - 1].speaker in _PATIENT
            ]
            if not replies:
                raise Drop("no doctor's reply to a patient")
            at, answer = replies[-1] - 1, turns[replies[-1]].text
        question = _with_context(turns, at, options)
    else:
        given = _text(value.get("input"), "input")
        if options.name == "alpaca" and _NO_INPUT.fullmatch(given):
            given = ""
        question = _join(_text(value["instruction"], "instruction"), given)
        if options.name == "uniform":
            blank = ""  # poems and the like have no prompt
    if system := _text(value.get("system"), "system"):
        labels["system"] = system
    meta = {**labels, "id": str(value["id"]), "row": number}
    return _make(options, question, answer, meta, source=source, blank=blank, unanswered=unanswered)


# ---------------------------------------------------------------- one row, one dialogue set


def _alpaca(value: Mapping[str, Any], number: int, options: Options) -> DialogueSet:
    if not _has(value, "instruction", "output"):
        raise _wrong(value, options)
    given, answer = _text(value.get("input"), "input"), _text(value["output"], "output")
    if _NO_INPUT.fullmatch(given):
        given = ""
    unanswered = "no reply: output is blank"
    if answer.lower() == "<nooutput>":
        answer, unanswered = "", "no reply: it says <nooutput>"
    question = _join(_text(value["instruction"], "instruction"), given)
    return _make(options, question, answer, {"row": number}, blank="instruction is blank", unanswered=unanswered)


def _dolly(value: Mapping[str, Any], number: int, options: Options) -> DialogueSet:
    if not _has(value, "instruction", "response") or "output" in value:
        raise _wrong(value, options)
    question = _join(_text(value["instruction"], "instruction"), _text(value.get("context"), "context"))
    meta = {"category": _text(value.get("category"), "category"), "row": number}
    answer = _text(value["response"], "response")
    return _make(
        options, question, answer, meta, blank="instruction is blank", unanswered="no reply: response is blank"
    )


def _openorca(value: Mapping[str, Any], number: int, options: Options) -> DialogueSet:
    if not _has(value, "question", "response"):
        raise _wrong(value, options)
    meta = {"id": str(value.get("id", "")), "system": _text(value.get("system_prompt"), "system_prompt"), "row": number}
    question, answer = _text(value["question"], "question"), _text(value["response"], "response")
    return _make(options, question, answer, meta, unanswered="no reply: response is blank")


def _sst2(value: Mapping[str, Any], number: int, options: Options) -> DialogueSet:
    if not _has(value, "sentence"):
        raise _wrong(value, options)
    label = value.get("label")
    names = {"0": "negative", "1": "positive", "negative": "negative", "positive": "positive"}
    answer = names.get(str(label).strip().lower(), "")
    if not answer and str("" if label is None else label).strip() not in ("", "-1"):
        raise Drop("label is neither 0 nor 1")
    meta = {"row": number} | ({"label": int(answer == "positive")} if answer else {})
    return _make(
        options, _text(value["sentence"], "sentence"), answer, meta, blank="sentence is blank", unanswered="no label"
    )


def _authored(value: Mapping[str, Any], number: int, options: Options) -> DialogueSet:
    cells = {k: _text(value[k], k) for k in ("id", "family", "topic", "question", "answer")}
    if options.name != "authored" and cells["family"] != MIRRORS.get(options.name, options.name):
        raise Drop(f"expected rows of {options.name}, got rows of {cells['family']}", wrong=True)
    meta = {"id": cells["id"], "family": cells["family"], "topic": cells["topic"], "row": number}
    return _make(options, cells["question"], cells["answer"], meta, source=f"authored/{cells['family']}")


def _by_row(build: Callable[[Mapping[str, Any], int, Options], DialogueSet]) -> Converter:
    def convert(rows: Iterator[Row], options: Options, drop: Dropper) -> Iterator[DialogueSet]:
        for row in rows:
            try:
                if row.problem:
                    raise Drop(row.problem, wrong=True)
                if not isinstance(row.value, Mapping):
                    raise _wrong(row.value, options)
                made = _own_format(row.value, row.number, options) or build(row.value, row.number, options)
            except Drop as reason:
                drop(row.number, reason.reason, reason.wrong)
            else:
                yield made

    return convert


def _no_other(value: Mapping[str, Any], number: int, options: Options) -> DialogueSet:
    raise _wrong(value, options)


# ---------------------------------------------------------------- dialogues over several turns or rows


def is_safety_label(answer: str) -> bool:
    """Whether a text is one of ProsocialDialog's safety labels, which no one ever said."""
    words = answer.strip("_ ").lower().replace(" ", "_")
    return (
        words == "casual" or re.fullmatch(r"((possibly|probably|or)_)*needs_(caution|intervention)", words) is not None
    )


def _prosocial(rows: Iterator[Row], options: Options, drop: Dropper) -> Iterator[DialogueSet]:
    """Hub rows (one reply each, grouped by ``dialogue_id``) or the download's lists of turns."""
    turns: list[_Turn] = []
    dialogue: Any = None
    for row in rows:
        try:
            if row.problem:
                raise Drop(row.problem, wrong=True)
            value = row.value
            if own := _own_format(value, row.number, options):
                made = [own]
            elif isinstance(value, list) and value and all(_has(t, "text", "labels") for t in value):
                turns, made, last = [], [], None
                for turn in value:
                    labels = turn["labels"] if isinstance(turn["labels"], list) else [turn["labels"]]
                    try:
                        made.append(
                            _guided(turns, turn["text"], labels[0] if labels else "", turn, row.number, options)
                        )
                    except Drop as reason:
                        last = reason
                if not made and last:
                    raise last
            elif (
                _has(value, "context")
                and "instruction" not in value
                and ("response" in value or "safety_label" in value)
            ):
                key = value.get("dialogue_id")
                if key is None or key != dialogue:
                    turns, dialogue = [], key
                made = [_guided(turns, value["context"], value.get("response"), value, row.number, options)]
            else:
                raise _wrong(value, options)
        except Drop as reason:
            drop(row.number, reason.reason, reason.wrong)
        else:
            yield from made


def _guided(
    turns: list[_Turn], said: Any, reply: Any, value: Mapping[str, Any], number: int, options: Options
) -> DialogueSet:
    """One message and its reply; both join ``turns``, the dialogue so far."""
    question, answer = _text(said, "context"), _text(reply, "response")
    unanswered = "no reply: response is blank"
    if is_safety_label(answer) or ("response" not in value and "labels" not in value):
        answer, unanswered = "", "no reply: only a safety label"
    turns.append(_Turn("user", question))
    asked = _with_context(turns, len(turns) - 1, options) if question else ""
    if answer:
        turns.append(_Turn("assistant", answer))
    keys = ("safety_label", "rots", "dialogue_id", "response_id")
    meta = {k: value[k] for k in keys if k in value} | {"row": number}
    return _make(options, asked, answer, meta, blank="context is blank", unanswered=unanswered)


def _empathetic(rows: Iterator[Row], options: Options, drop: Dropper) -> Iterator[DialogueSet]:
    """Utterance rows, grouped by ``conv_id``: each listener's turn answers the speaker's turn before it."""
    group: list[tuple[int, int, str, str, Mapping[str, Any]]] = []
    for row in rows:
        try:
            if row.problem:
                raise Drop(row.problem, wrong=True)
            value = row.value
            own = _own_format(value, row.number, options)
            if own is not None:
                yield own
                continue
            if not _has(value, "conv_id", "utterance_idx", "speaker_idx", "utterance"):
                raise _wrong(value, options)
            order = str(value["utterance_idx"]).strip()
            if not order.isdigit():
                raise Drop("utterance_idx is not a number")
            said = _commas(_text(value["utterance"], "utterance"))
            if not said:
                raise Drop("utterance is blank")
        except Drop as reason:
            drop(row.number, reason.reason, reason.wrong)
            continue
        if group and group[-1][4]["conv_id"] != value["conv_id"]:
            yield from _conversation(group, options, drop)
            group = []
        group.append((int(order), row.number, str(value["speaker_idx"]).strip(), said, value))
    if group:
        yield from _conversation(group, options, drop)


def _conversation(
    group: list[tuple[int, int, str, str, Mapping[str, Any]]], options: Options, drop: Dropper
) -> Iterator[DialogueSet]:
    group.sort(key=lambda g: g[0])
    # the one who tells the story says the odd utterances (the first one is 1)
    told_by = {who for order, _, who, _, _ in group if order % 2 == 1}
    teller = next((who for order, _, who, _, _ in group if order % 2 == 1), None)
    if len(told_by) > 1:  # somebody spoke twice in a row: the opening decides
        teller = group[0][2]
    turns = _runs(
        _Turn("speaker" if who == teller else "listener", said, [number]) for _, number, who, said, _ in group
    )
    first = group[0][4]
    labels = {
        "emotion": _safe(first.get("context")),
        "situation": _commas(_safe(first.get("prompt"))),
        "conversation": _safe(first.get("conv_id")),
    }
    used: set[int] = set()
    for i, turn in enumerate(turns):
        if turn.speaker != "speaker":
            continue
        reply = turns[i + 1] if i + 1 < len(turns) else None
        if reply is None and not options.keep_unanswered:
            continue
        used.update(turn.rows, reply.rows if reply else ())
        meta = {**labels, "row": (reply or turn).rows[0]}
        yield _make(options, _with_context(turns, i, options), reply.text if reply else "", meta)
    for turn in turns:
        for number in turn.rows:
            if number not in used:
                teller_waits = turn.speaker == "speaker"
                drop(
                    number,
                    "no reply: the listener does not answer" if teller_waits else "no speaker's turn before it",
                    False,
                )


def _safe(value: Any) -> str:
    return _SURROGATE.sub("\ufffd", value.strip()) if isinstance(value, str) else ""


def _commas(said: str) -> str:
    return said.replace("_comma_", ",")


def _meddialog(rows: Iterator[Row], options: Options, drop: Dropper) -> Iterator[DialogueSet]:
    """Raw records, ``description`` + ``utterances``, ``dialogue_turns``, or a whole dialogue in ``src``."""
    for row in rows:
        try:
            if row.problem:
                raise Drop(row.problem, wrong=True)
            own = _own_format(row.value, row.number, options)
            made = [own] if own else _consultation(row.value, row.number, options)
        except Drop as reason:
            drop(row.number, reason.reason, reason.wrong)
        else:
            yield from made


_LABELLED = re.compile(r"\b(patient|doctor)\s*:", re.IGNORECASE)


def _labelled(said: str) -> list[_Turn]:
    """``patient: … doctor: …`` cut at its labels."""
    parts = _LABELLED.split(said)
    return [_Turn(who.lower(), text.strip()) for who, text in zip(parts[1::2], parts[2::2], strict=True)]


def _consultation(value: Any, number: int, options: Options) -> list[DialogueSet]:
    if _has(value, "turns", "description"):  # from the raw text
        turns = [_Turn(who, _text(said, "Dialogue")) for who, said in value["turns"]]
    elif _has(value, "utterances") and isinstance(value["utterances"], list):
        # only the label that opens an utterance counts
        turns = []
        for said in value["utterances"]:
            who, colon, rest = _text(said, "utterances").partition(":")
            if colon and who.strip().lower() in ("patient", "doctor"):
                turns.append(_Turn(who.strip().lower(), rest.strip()))
            elif turns:
                turns[-1].text = f"{turns[-1].text}\n{_text(said, 'utterances')}".strip()
    elif _has(value, "dialogue_turns"):
        told = value["dialogue_turns"]
        if _has(told, "speaker", "utterance") and all(isinstance(told[k], list) for k in ("speaker", "utterance")):
            told = [{"speaker": s, "utterance": u} for s, u in zip(told["speaker"], told["utterance"], strict=False)]
        if not isinstance(told, list) or not all(_has(t, "speaker", "utterance") for t in told):
            raise Drop("dialogue_turns is not a list of turns with speaker and utterance")
        names = {"0": "patient", "1": "doctor"}
        speakers = [str(t["speaker"]).strip().lower() for t in told]
        turns = [
            _Turn(names.get(s, s), _text(t["utterance"], "utterance")) for s, t in zip(speakers, told, strict=True)
        ]
    elif _has(value, "src"):
        turns = _labelled(_text(value["src"], "src"))
    else:
        raise _wrong(value, options)
    turns = _runs(turns)
    meta = {k: _safe(value.get(k)) for k in ("id", "url", "description") if _safe(value.get(k))} | {"row": number}
    made = []
    for i, turn in enumerate(turns):
        if turn.speaker != "patient":
            continue
        answer = turns[i + 1].text if i + 1 < len(turns) and turns[i + 1].speaker == "doctor" else ""
        if answer or options.keep_unanswered:
            made.append(_make(options, _with_context(turns, i, options), answer, meta))
    if not made:
        raise Drop("no doctor's reply to a patient")
    return made


CONVERTERS: dict[str, Converter] = {
    "alpaca": _by_row(_alpaca),
    "dolly": _by_row(_dolly),
    "prosocial": _prosocial,
    "empathetic": _empathetic,
    "openorca": _by_row(_openorca),
    "meddialog": _meddialog,
    "sst2": _by_row(_sst2),
    "uniform": _by_row(_no_other),
    **dict.fromkeys(("authored", *FAMILIES[:2], *FAMILIES[4:]), _by_row(_no_other)),
}
