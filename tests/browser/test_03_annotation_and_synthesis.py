"""Notebook 03 in a real browser: annotation by hand and the sanity check, against the package in this process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import pytest
from playwright.sync_api import Locator

from pllm_helpers.corpora import chitchat_stream
from pllm_helpers.dialogue import DialogueSet
from pllm_helpers.models import LLM, load_encoder, load_llm
from pllm_helpers.runtime import prepare
from pllm_helpers.selection import DialogueBuffer, Entry, load_lexicons, run_stream, score_dialogues
from pllm_helpers.synthesis import Synthesis, rouge1, synthesize

from .kit import Lab, LabPage

pytestmark = [pytest.mark.model, pytest.mark.timeout(900)]

NAME = "03_annotation_and_synthesis"
SMALL = {"messages": 100, "bins": 24, "per_day": 3}
BUSY = 240


@pytest.fixture(scope="module")
def llm() -> LLM:
    prepare(0)  # as in the notebook: the number of threads decides on the number format
    return load_llm()


@pytest.fixture(scope="module")
def rewrite(llm: LLM, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Synthesis]:
    """What the package writes; nothing is asked twice."""
    return partial(synthesize, llm, rounds=1, progress=False, out=tmp_path_factory.mktemp("texts") / "outputs.jsonl")


@pytest.fixture(scope="module")
def entries() -> list[Entry]:
    """What the notebook's setup leaves in the buffer."""
    stream = chitchat_stream(0).stream[: SMALL["messages"]]
    table = score_dialogues(stream, load_encoder(), load_lexicons("medical", "emotion", "clusters"))
    with DialogueBuffer(bins=SMALL["bins"], seed=0) as buffer:
        run_stream(buffer, "quality", stream, table)
        return buffer.entries


@pytest.fixture(scope="module")
def page(lab: Lab) -> Iterator[LabPage]:
    with lab.open(NAME, parameters=SMALL, timeout=400) as nb:
        yield nb


@pytest.fixture
def nb(page: LabPage) -> LabPage:
    """The open notebook, nothing being written, the default bounds and settings."""
    idle(page)
    for label, value in (("Lower bound", "0.3"), ("Upper bound", "0.9"), ("Temperature", "0.7")):
        page.by_label(label).fill(value)
    page.by_label("Prompt").select_option("Few-shot (four examples)")
    page.by_label("What").select_option("Question only, keep the reply")
    page.by_label("Texts per message").fill("2")
    page.eventually(lambda: error(page) == "")
    return page


def live(nb: LabPage, selector: str) -> Locator:
    """Inside the widget, not in the static text that stands behind it."""
    return nb.output().locator(f".pllm-explorable {selector}")


def error(nb: LabPage) -> str:
    shown = live(nb, "[role=alert].pllm-error")
    return " ".join(shown.first.inner_text().split()) if shown.count() else ""


def idle(nb: LabPage) -> None:
    nb.eventually(lambda: nb.button("Stop").is_disabled(), timeout=BUSY)
    nb.eventually(lambda: nb.output().locator(".pllm-busy.on").count() == 0, timeout=BUSY)


def messages(nb: LabPage) -> list[str]:
    return live(nb, ".pllm-texts th[scope=rowgroup]").evaluate_all(TEXT)


TEXT = """l => l.map(e => { const c = e.cloneNode(true); c.querySelectorAll('details').forEach(d => d.remove());
  c.querySelectorAll('br').forEach(b => b.replaceWith('\\n')); return c.textContent; })"""


def check_page(nb: LabPage, expected: Synthesis) -> None:
    """Table, cards and figure show these attempts and verdicts."""
    rows = live(nb, ".pllm-texts tr[data-verdict]")
    by_original = [a for d in expected.originals for a in expected.attempts if a.original is d]
    assert rows.evaluate_all("l => l.map(e => e.dataset.verdict)") == [a.verdict for a in by_original]
    texts = live(nb, ".pllm-texts tr[data-verdict] td:nth-child(3)").evaluate_all(TEXT)
    assert texts == [a.text if a.text is not None else "(nothing)" for a in by_original]
    shown = live(nb, ".pllm-texts tr[data-verdict] td:nth-child(2)").all_inner_texts()
    assert shown == ["" if a.rouge1 is None else f"{a.rouge1:.2f}" for a in by_original]
    assert nb.text("[data-count='Passed']") == str(expected.passed)
    assert nb.text("[data-count='In brackets']") == str(expected.bracketed)
    figure = nb.figure()
    drawn = {t["name"]: t["x"] for t in figure["data"]}
    passed = [a.rouge1 for a in expected.attempts if a.verdict == "passed"]
    assert sorted(drawn.get(f"passed {len(passed)}", [])) == pytest.approx(sorted(passed))
    scores = [a.rouge1 for a in expected.attempts if a.rouge1 is not None]
    dots = [x for n, xs in drawn.items() if not n.startswith("other messages") for x in xs or []]
    assert sorted(dots) == pytest.approx(sorted(scores))
    (band,) = figure["layout"]["shapes"]
    assert (band["x0"], band["x1"]) == (expected.settings["low"], expected.settings["high"])


def test_the_start_state_is_the_packages(nb: LabPage, rewrite: Callable[..., Synthesis], entries: list[Entry]):
    """First of the module: nothing has been annotated or written yet."""
    by_question = {e.dialogue.question: e.dialogue for e in entries}
    originals = [by_question[q] for q in messages(nb)]
    assert len(originals) == 4
    expected = rewrite(originals, 2)
    check_page(nb, expected)
    kept = live(nb, ".pllm-texts tr[data-verdict] td:nth-child(4)").evaluate_all(TEXT)
    assert kept == [d.answer for d in originals for _ in range(2)]
    others = nb.figure()["data"][0]
    assert others["name"] == f"other messages {len(others['x'])}" and max(others["x"]) <= max(
        rouge1(d.question, e.dialogue.question) for d in originals for e in entries if e.dialogue != d
    )
    nb.check_accessible()
    nb.screenshot("03_start")


def test_bounds_by_keyboard_and_an_impossible_pair(
    nb: LabPage, rewrite: Callable[..., Synthesis], entries: list[Entry]
):
    by_question = {e.dialogue.question: e.dialogue for e in entries}
    written = rewrite([by_question[q] for q in messages(nb)], 2)
    nb.by_label("Lower bound").focus()
    for _ in range(3):
        nb.page.keyboard.press("ArrowRight")
    nb.by_label("Upper bound").focus()
    nb.page.keyboard.press("End")
    nb.eventually(lambda: check_page(nb, written.judged(low=0.45, high=1.0)))
    nb.by_label("Upper bound").focus()
    nb.page.keyboard.press("Home")
    nb.eventually(lambda: "Bounds: expected the lower one below the upper one, got 0.45 and 0.00." in error(nb))
    check_page(nb, written.judged(low=0.45, high=1.0))  # the last result that worked
    nb.check_accessible()
    nb.screenshot("03_impossible_bounds")
    nb.by_label("Upper bound").fill("0.7")
    nb.eventually(lambda: check_page(nb, written.judged(low=0.45, high=0.7)))
    assert error(nb) == ""


def test_annotate_by_keyboard_skip_undo_and_the_budget(nb: LabPage, entries: list[Entry]):
    order = [e.dialogue for e in sorted(entries, key=lambda e: -e.position)]
    asked = [d.question for d in order if d.question.strip() and d.answer.strip()]

    def shown(question: str, line: str) -> None:
        nb.eventually(
            lambda: live(nb, ".pllm-question").evaluate_all(TEXT) == [question] and line in nb.text(".pllm-budget")
        )

    shown(asked[0], "3 requests of 3 left today")
    reply = nb.by_label("Your reply")
    reply.fill("   ")
    nb.page.keyboard.press("Enter")
    nb.eventually(lambda: "text: expected a reply, got none" in error(nb))
    reply.fill("")
    nb.page.keyboard.type("As <b>I</b> would say it")
    nb.page.keyboard.press("Enter")
    shown(asked[1], "2 requests of 3 left today")
    assert error(nb) == "" and reply.input_value() == ""
    nb.eventually(lambda: live(nb, ".pllm-kept td").evaluate_all(TEXT) == [asked[0], "As <b>I</b> would say it"])
    assert live(nb, ".pllm-kept b").count() == 0
    nb.button("Skip").click()
    shown(asked[2], "1 request of 3 left today")
    nb.page.keyboard.press("Tab")  # from Skip to Undo
    nb.page.keyboard.press("Enter")
    shown(asked[1], "2 requests of 3 left today")
    nb.button("Undo").click()
    shown(asked[0], "3 requests of 3 left today")
    nb.eventually(lambda: reply.input_value() == "As <b>I</b> would say it")
    for text in ("one", "two", "three"):
        reply.fill(text)
        nb.page.keyboard.press("Enter")
        nb.eventually(lambda text=text: text in live(nb, ".pllm-kept td").all_inner_texts())
    nb.eventually(lambda: "The budget of this day is used up" in nb.text(".pllm-ask"))
    assert nb.button("Skip").is_disabled()
    nb.check_accessible()
    nb.screenshot("03_budget")
    nb.button("Next day").click()
    shown(asked[3], "3 requests of 3 left tomorrow")


def test_an_annotated_message_written_with_the_papers_prompt(
    nb: LabPage, rewrite: Callable[..., Synthesis], entries: list[Entry]
):
    """Comes after the annotations: the reply that is kept is what was typed."""
    replies = dict(zip(*[iter(live(nb, ".pllm-kept td").evaluate_all(TEXT))] * 2, strict=True))
    names = nb.by_label("Rewrite").locator("option").all_text_contents()  # with no-break spaces
    starts = {n.replace("\xa0", " ").rstrip("…"): n for n in names}
    question, name = next(
        (q, n) for start, n in starts.items() for q in replies if " ".join(q.split()).startswith(start)
    )
    nb.by_label("Rewrite").select_option(name)
    nb.by_label("Prompt").select_option("The paper's (recalled)")
    nb.by_label("Texts per message").fill("3")
    nb.by_label("Temperature").focus()
    nb.page.keyboard.press("ArrowRight")
    nb.button("Write").focus()
    nb.page.keyboard.press("Enter")
    nb.eventually(lambda: "The model writes: 0 of 3 texts." in nb.text(".pllm-progress"))
    nb.eventually(lambda: messages(nb) == [question], timeout=BUSY)
    idle(nb)
    before = next(e.dialogue for e in entries if e.dialogue.question == question)
    original = DialogueSet(before.user, question, replies[question], before.time, before.source)
    expected = rewrite(original, 3, prompt="paper", temperature=0.8)
    check_page(nb, expected)
    kept = live(nb, ".pllm-texts tr[data-verdict] td:nth-child(4)").evaluate_all(TEXT)
    assert kept == [replies[question]] * 3
    nb.check_accessible()
    nb.screenshot("03_paper_prompt")


def test_own_text_stays_text_and_is_needed(nb: LabPage, rewrite: Callable[..., Synthesis]):
    assert not nb.by_label("Message").is_visible()
    nb.by_label("Rewrite").select_option("Your own text")
    nb.by_label("Message").wait_for()
    nb.button("Write").click()
    nb.eventually(lambda: "Message: expected some text, got none." in error(nb))
    hostile = "Is the <img src=x onerror=\"document.title='broken'\"> shop open on Sunday morning?"
    nb.by_label("Message").fill(hostile)
    nb.by_label("Reply").fill("No, <script>closed</script>")
    nb.by_label("Texts per message").fill("1")
    nb.button("Write").click()
    nb.eventually(lambda: messages(nb) == [hostile], timeout=BUSY)
    idle(nb)
    assert live(nb, ":is(img, .pllm-texts script)").count() == 0 and "broken" not in nb.page.title()
    original = DialogueSet("you", hostile, "No, <script>closed</script>", source="typed")
    check_page(nb, rewrite(original, 1))
    nb.check_accessible()
    nb.screenshot("03_own_text")


def test_stop_keeps_what_is_written(nb: LabPage):
    nb.by_label("Rewrite").select_option("Several messages (4)")
    nb.by_label("Texts per message").fill("6")
    nb.by_label("Temperature").fill("0.9")
    nb.button("Write").click()
    nb.eventually(lambda: nb.button("Stop").is_enabled())
    nb.button("Stop").click()
    idle(nb)
    nb.eventually(lambda: 0 < int(nb.text("[data-count='Asked']")) < 24)
    assert len(messages(nb)) == 4


def test_running_the_cell_again_keeps_the_annotations(nb: LabPage):
    before = live(nb, ".pllm-kept td").evaluate_all(TEXT)
    assert "one" in before
    nb.by_label("Lower bound").fill("0.55")
    nb.eventually(lambda: nb.figure()["layout"]["shapes"][0]["x0"] == 0.55)
    nb.screenshot("03_lab")
    nb.command("notebook:run-cell")  # the last cell is the active one
    nb.eventually(lambda: nb.by_label("Lower bound").input_value() == "0.3", timeout=BUSY)
    nb.eventually(lambda: live(nb, ".pllm-kept td").evaluate_all(TEXT) == before)
    assert "0 requests of 3 left today" in nb.text(".pllm-budget")
