"""Annotation desk and rewriter without a page: what they show is what the package keeps and computes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from pllm_helpers.dialogue import DialogueSet
from pllm_helpers.evaluation import response_words
from pllm_helpers.models import LLM, load_llm
from pllm_helpers.runtime import InputError, prepare
from pllm_helpers.selection import DialogueBuffer, Entry
from pllm_helpers.synthesis import rouge1, synthesize
from pllm_helpers.widgets import AnnotationDesk, Rewriter, SynthesisLab, open_desk, synthesis_lab
from pllm_helpers.widgets import synthesis as module

TALK = [
    ("Do you want to see a film with me on Friday?", "Sure, anything but horror"),
    ("My sister just moved to Denver for a new job", "wow good for her"),
    ("What did you think of the exam this morning?", "way too long honestly"),
    ("I never know what to cook on a rainy day", "soup. always soup"),
    ("ok", "lol"),
]


def entries() -> list[Entry]:
    rng = np.random.default_rng(0)
    return [
        Entry(
            slot=i,
            dialogue=DialogueSet("p", q, a, 86_400.0 * i, "chitchat"),
            domain=None,
            embedding=rng.normal(size=8).astype(np.float32),
            scores={"eoe": 0.5, "dss": 0.1, "idd": 1.0},
            annotation=None,
            position=i,
        )
        for i, (q, a) in enumerate(TALK)
    ]


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path
    for path in [p for p in module._OPEN if p.startswith(str(tmp_path))]:
        module._OPEN.pop(path).close()


@pytest.fixture
def desk(folder: Path) -> AnnotationDesk:
    return open_desk(entries(), folder, per_day=3)


# ------------------------------------------------------------------ the desk


def test_sets_are_shown_one_by_one_and_kept_on_disk(desk: AnnotationDesk, folder: Path):
    assert desk.result.entry.dialogue.question == "ok" and (desk.result.left, desk.result.pending) == (3, 5)
    desk.save("  lol yes ")
    assert desk.result.entry.dialogue.question == TALK[3][0] and TALK[3][0] in desk.shown.html
    desk.skip.click()
    assert (desk.result.left, desk.result.pending, desk.result.skipped) == (1, 3, 1)
    assert "1 request of 3 left today · 3 sets without a mark" in desk.shown.html
    desk.buffer.close()
    with DialogueBuffer(folder / "annotations.sqlite") as kept:
        marks = [(m.dialogue.question, m.kind, m.text) for m in kept.history()]
    assert marks == [("ok", "answer", "lol yes"), (TALK[3][0], "skip", None)]


def test_running_the_cell_again_finds_everything(desk: AnnotationDesk, folder: Path):
    desk.save("first")
    again = open_desk(entries(), folder, per_day=3)
    assert again.result.annotated == (("ok", "first"),) and again.result.left == 2
    assert len(again.buffer) == len(TALK)


def test_the_budget_ends_undo_returns_a_request_and_a_new_day_brings_more(desk: AnnotationDesk):
    for text in ("one", "two", "three"):
        desk.save(text)
    assert desk.result.entry is None and "used up" in desk.shown.html
    assert desk.skip.disabled and not desk.turn.disabled
    with pytest.raises(InputError, match="budget of today is used up"):
        desk.save("four")
    assert "used up" in desk._error.html and len(desk.result.annotated) == 3
    desk.undo.click()
    assert desk.result.entry.dialogue.question == TALK[2][0] and desk._draft == "three"
    assert desk.result.left == 1 and desk._error.html == ""
    desk.save("three, better")
    desk.turn.click()
    assert desk.result.left == 3 and desk.result.entry.dialogue.question == TALK[1][0] and "tomorrow" in desk.shown.html
    desk.save("four")
    desk.save("five")
    assert desk.result.entry is None and "every buffered set" in desk.shown.html and desk.turn.disabled
    assert [a for _, a in desk.result.annotated] == ["one", "two", "three, better", "four", "five"]


def test_blank_replies_and_empty_undo_are_refused_in_place(desk: AnnotationDesk):
    with pytest.raises(InputError, match="expected a reply"):
        desk.save(" \n ")
    assert "expected a reply" in desk._error.html and desk.result.left == 3
    with pytest.raises(InputError, match="there is none"):
        desk.take_back()
    assert desk.undo.disabled


def test_a_file_in_use_elsewhere_is_an_error_that_names_it(folder: Path):
    with (
        DialogueBuffer(folder / "annotations.sqlite", bins=256),
        pytest.raises(InputError, match=r"annotations\.sqlite"),
    ):
        open_desk(entries(), folder)


def test_what_people_write_is_escaped(folder: Path):
    hostile = "<img src=x onerror=alert(1)>"
    one = entries()[0]
    desk = open_desk([Entry(0, DialogueSet("p", hostile, hostile), None, one.embedding, one.scores, None, 0)], folder)
    desk.save(hostile)
    for html in (desk.shown.html, desk.kept.html, desk.fallback_html()):
        assert "<img" not in html
    assert "&lt;img" in desk.kept.html


# ------------------------------------------------------------------ small parts


def test_underlined_words_are_those_that_rouge_counts():
    original, text = "the cat and the dog", "The DOG saw the cat, the cat!"
    marked = module._marked(original, text)
    assert re.sub(r"</?u>", "", marked) == text
    assert re.findall(r"<u>(.*?)</u>", marked) == ["The", "DOG", "the", "cat"]
    shared = len(re.findall("<u>", marked))
    assert 2 * shared / (5 + 7) == pytest.approx(rouge1(original, text))
    assert module._marked("don't <b>go</b>", "Don’t <b>") == "<u>Don’t</u> &lt;<u>b</u>&gt;"


def test_dots_of_like_value_do_not_cover_each_other():
    heights = module._stacked([0.5, 0.5, 0.9, 0.5], 1.0, 1.8)
    assert len({heights[0], heights[1], heights[3]}) == 3 and heights[2] == heights[0] == 1.0
    assert max(module._stacked([0.3] * 100, 0.0, 2.0)) == pytest.approx(2.0)
    assert module._stacked([], 0.0, 1.0) == []


def test_every_verdict_has_words_and_a_place():
    from pllm_helpers.synthesis import VERDICTS

    for v in (*VERDICTS, *(f"reply_{v}" for v in VERDICTS if v != "passed"), "reply_unasked"):
        assert module._say(v) and module._kind(v) in (*module.KINDS, None)
    assert module._kind("unparsed") is None and module._kind("duplicate") == "copy"


# ------------------------------------------------------------------ the rewriter, with the real model


@pytest.fixture(scope="module")
def llm() -> LLM:
    prepare(0)
    return load_llm()


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the model wrote in one test is not written again in the next."""
    return tmp_path_factory.mktemp("rewritings") / "outputs.jsonl"


@pytest.fixture
def lab(llm: LLM, folder: Path, outputs: Path) -> SynthesisLab:
    return synthesis_lab(llm, entries(), folder, outputs=outputs)


@pytest.fixture
def rewriter(lab: SynthesisLab) -> Rewriter:
    return lab.rewriter


def drawn(rewriter: Rewriter) -> list[float]:
    return sorted(float(x) for trace in rewriter.plot.data[1:] for x in trace.x)


@pytest.mark.model
def test_the_start_state_is_what_the_package_writes_and_judges(llm: LLM, rewriter: Rewriter, outputs: Path):
    originals = [e.dialogue for e in entries()[:4]]  # "ok" is too short to be watched first
    expected = synthesize(llm, originals, 2, rounds=1, out=outputs, progress=False)
    shown = rewriter.result.synthesis
    assert [(a.raw, a.verdict) for a in shown.attempts] == [(a.raw, a.verdict) for a in expected.attempts]
    assert f'data-count="Passed">{expected.passed}<' in rewriter.cards.html
    assert re.findall(r'data-verdict="(\w+)"', rewriter.table.html).count("passed") == expected.passed
    assert drawn(rewriter) == pytest.approx(sorted(a.rouge1 for a in expected.attempts if a.rouge1 is not None))
    others = [rouge1(d.question, o.question) for d in originals for o in [e.dialogue for e in entries()] if o != d]
    assert sorted(rewriter.plot.data[0].x) == pytest.approx(sorted(others))
    assert f"passed {expected.passed}" in rewriter.describe(rewriter.result)


@pytest.mark.model
def test_bounds_judge_again_without_asking_again(rewriter: Rewriter, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "synthesize", lambda *a, **k: pytest.fail("asked the model"))
    attempts = [a for a in rewriter.result.synthesis.attempts if a.rouge1 is not None and a.verdict != "too_long"]
    for low, high in ((0.0, 1.0), (0.5, 0.6), (0.95, 1.0)):
        result = rewriter.set(low=low, high=high).synthesis
        questions = {tuple(response_words(d.question)) for d in result.originals}
        inside = {
            tuple(response_words(a.text))
            for a in attempts
            if low <= a.rouge1 <= high and tuple(response_words(a.text)) not in questions
        }
        assert result.passed == len(inside)
        (band,) = rewriter.plot.layout.shapes
        assert (band.x0, band.x1) == (low, high)
    with pytest.raises(InputError, match="lower one below"):
        rewriter.set(low=0.8, high=0.2)
    assert "Move one of them." in rewriter._error.html and rewriter.result.low == 0.95


@pytest.mark.model
def test_settings_reach_the_model_and_annotations_are_kept(llm: LLM, lab: SynthesisLab, outputs: Path):
    lab.desk.skip_set()  # "ok"
    lab.desk.save("Tomato soup with too much pepper")
    place = next(i for i, d in enumerate(lab.rewriter.sets) if d.question == TALK[3][0])
    shown = lab.rewriter.write(source=place, prompt="paper", temperature=0.5, each=3).synthesis
    original = DialogueSet("p", TALK[3][0], "Tomato soup with too much pepper", 3 * 86_400.0, "chitchat")
    expected = synthesize(llm, original, 3, rounds=1, prompt="paper", temperature=0.5, out=outputs, progress=False)
    assert [a.raw for a in shown.attempts] == [a.raw for a in expected.attempts]
    assert lab.rewriter.table.html.count("Tomato soup with too much pepper") == 3
    assert lab.rewriter.progress.html == "" and lab.rewriter.stop.disabled


@pytest.mark.model
def test_own_text_is_needed_where_it_was_chosen(rewriter: Rewriter):
    assert rewriter._own.layout.display == "none"
    with pytest.raises(InputError, match="Message"):
        rewriter.write(source=module.OWN)
    assert rewriter._own.layout.display == ""
    with pytest.raises(InputError, match="Reply"):
        rewriter.write(message="Is the <b>shop</b> open on Sunday?")
    shown = rewriter.write(answer="No, <i>closed</i>", each=1).synthesis
    assert shown.originals[0].question == "Is the <b>shop</b> open on Sunday?" and shown.asked == 1
    assert "<b>" not in rewriter.table.html and "<i>" not in rewriter.table.html
    with pytest.raises(InputError, match="some of source"):
        rewriter.write(temprature=0.2)


@pytest.mark.model
def test_replies_are_rewritten_too_on_request(rewriter: Rewriter):
    shown = rewriter.write(source=1, mode="pair", each=2).synthesis
    assert shown.settings["mode"] == "pair" and "Reply, rewritten" in rewriter.table.html
    assert any(a.reply for a in shown.attempts) or not any(a.verdict == "passed" for a in shown.attempts)
    wide = rewriter.set(low=0.0, high=1.0).synthesis
    asked = [a for a in wide.attempts if a.verdict == "reply_unasked"]
    assert ("reply not asked for yet" in rewriter.table.html) is bool(asked)


@pytest.mark.model
def test_both_halves_are_in_the_static_text(lab: SynthesisLab):
    html = lab.fallback_html()
    assert "Somebody wrote" in html and "Text of the model" in html and "Nothing annotated yet" in html
    figure, alt = lab.figure(lab.result)
    assert len(figure.data) == 6 and len(alt.split()) >= 8


@pytest.mark.model
def test_without_a_usable_entry_it_says_so(llm: LLM, folder: Path):
    label = DialogueSet("prosocial", "I will cheat.", "__needs_caution__", source="prosocial")
    one = entries()[0]
    bad = Entry(0, label, None, one.embedding, one.scores, None, 0)
    with pytest.raises(InputError, match="none among 1"):
        synthesis_lab(llm, [bad], folder)
