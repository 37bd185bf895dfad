"""The manners every widget shares, without a page; tests/browser drives them in one."""

from __future__ import annotations

import threading
from typing import Any

import ipywidgets
import pytest

from pllm_helpers import figures
from pllm_helpers.runtime import InputError
from pllm_helpers.widgets.base import Explorable, Latest, from_page
from pllm_helpers.widgets.controls import Prompt, Region, Slider, esc

HOSTILE = "<img src=x onerror=\"alert('x')\"> & <b>"


class Share(Explorable):
    title = "Share <of> a cake"
    help = "Pieces & people"

    def build(self) -> Any:
        self.answer = Region()
        self.asked: list[dict] = []
        return {
            "cake": ipywidgets.Text("apple", description="Cake"),
            "people": ipywidgets.BoundedIntText(4, 0, 100, description="People"),
        }, [self.answer]

    def compute(self, cake: str, people: int) -> tuple[str, float]:
        self.asked.append({"cake": cake, "people": people})
        if not cake:
            raise InputError("cake", f"expected a name, got {HOSTILE}", "Name it.")
        return cake, 1 / people

    def draw(self, result: tuple[str, float]) -> None:
        self.answer.html = f"<p>{esc(result[0])}: {result[1]:.2f}</p>"

    def summary(self, result: tuple[str, float]) -> str:
        return f"<p>{esc(result[0])} for 4: {result[1]:.2f}</p>"

    def announce(self, result: tuple[str, float]) -> str:
        return f"{result[0]}, {result[1]:.2f} each"


def test_the_default_state_is_there_at_once():
    w = Share()
    assert w.result == ("apple", 0.25) and "apple: 0.25" in w.answer.html and w.runs == 1
    assert w.values == {"cake": "apple", "people": 4}


def test_a_widget_that_cannot_start_fails_its_cell():
    class Broken(Share):
        def compute(self, **_: Any) -> Any:
            raise OSError("no file")

    with pytest.raises(OSError, match="no file"):
        Broken()


def test_code_that_moves_a_control_sees_the_result_and_the_exception():
    w = Share()
    w.controls["people"].value = 5
    assert w.result == ("apple", 0.2)
    with pytest.raises(ZeroDivisionError):
        w.controls["people"].value = 0
    with pytest.raises(ZeroDivisionError):
        w.set(people=0, cake="pear")
    assert w.set(people=2) == ("pear", 0.5)
    with pytest.raises(InputError, match="peple"):
        w.set(peple=2)


def test_set_computes_once_for_several_controls():
    w = Share()
    w.asked.clear()
    w.set(cake="plum", people=10)
    assert w.asked == [{"cake": "plum", "people": 10}] and w.answer.html == "<p>plum: 0.10</p>"


def test_bad_input_is_a_message_and_a_fault_is_kept():
    w = Share()
    with pytest.raises(InputError):
        w.set(cake="")
    assert "cake" in w._error.html and "Name it." in w._error.html and "<img" not in w._error.html
    assert w._error.role == "alert" and not w.errors
    assert "apple: 0.25" in w.answer.html  # the last good result stays
    with pytest.raises(ZeroDivisionError):
        w.set(cake=HOSTILE, people=0)
    assert [type(e) for e in w.errors] == [ZeroDivisionError] and "ZeroDivisionError" in w._error.html
    w.set(people=1)
    assert w._error.html == "" and "&lt;img" in w.answer.html and "<img" not in w.answer.html


def test_background_errors_are_shown_not_lost():
    w = Share()

    def fail(_: Any) -> None:
        raise RuntimeError(HOSTILE)

    w.background(fail)
    assert w._latest.wait(10)
    assert [str(e) for e in w.errors] == [HOSTILE] and "RuntimeError" in w._error.html
    assert "<img" not in w._error.html and w._busy.kind == "pllm-busy"


def test_fallback_is_plain_escaped_and_part_of_the_bundle():
    w = Share()
    w.set(people=2)  # the summary stays that of the starting state
    bundle, metadata = w._repr_mimebundle_()
    assert "apple for 4: 0.25" in bundle["text/html"] and "Share &lt;of&gt; a cake" in bundle["text/html"]
    assert "<script" not in bundle["text/html"] and "Share <of> a cake" in bundle["text/plain"]
    assert bundle["application/vnd.jupyter.widget-view+json"]["model_id"] == w.view.model_id
    assert metadata == {}


def test_a_starting_figure_travels_with_its_description():
    class Drawn(Share):
        def figure(self, result: Any) -> Any:
            return figures.new_figure().add_bar(x=["each"], y=[result[1]]), "One bar at 0.25"

    bundle, metadata = Drawn()._repr_mimebundle_()
    assert bundle[figures.PLOTLY_MIME]["data"][0]["y"] == [0.25]
    assert metadata["alt"] == metadata[figures.PLOTLY_MIME]["alt"] == "One bar at 0.25"


def test_only_the_newest_waiting_job_runs():
    ran: list[int] = []
    queue = Latest()
    for i in range(20):
        queue.submit(lambda _, i=i: ran.append(i), delay=0.05)
    assert queue.busy and queue.wait(10)
    assert ran == [19] and not queue.busy


def test_what_a_person_did_on_purpose_is_never_dropped():
    started, go, ran = threading.Event(), threading.Event(), []
    queue = Latest()

    def slow(_: Any) -> None:
        started.set()
        assert go.wait(10)

    queue.submit(slow)
    assert started.wait(10)
    for i in range(3):
        queue.submit(lambda _, i=i: ran.append(f"typed {i}"))
        queue.submit(lambda _, i=i: ran.append(f"pressed {i}"), keep=True)
    assert queue.waiting
    go.set()
    assert queue.wait(10) and not queue.waiting
    assert ran == ["pressed 0", "pressed 1", "pressed 2", "typed 2"]


def test_a_running_job_learns_that_it_is_stale():
    started, overtaken, told = threading.Event(), threading.Event(), []
    queue = Latest()

    def first(stale: Any) -> None:
        told.append(stale())
        started.set()
        assert overtaken.wait(10)
        told.append(stale())

    queue.submit(first)
    assert started.wait(10)
    queue.submit(lambda stale: told.append(stale()))
    overtaken.set()
    assert queue.wait(10)
    assert told == [False, True, False]


def test_escaping_leaves_no_markup_but_line_breaks():
    assert esc(HOSTILE + "\nnext") == (
        "&lt;img src=x onerror=&quot;alert(&#x27;x&#x27;)&quot;&gt; &amp; &lt;b&gt;<br>next"
    )


def test_slider_keeps_to_its_range():
    s = Slider("Share", value=0.5, min=0.2, max=0.8)
    s.value = 7
    assert s.value == 0.8
    s.value = -1
    assert s.value == 0.2


def test_prompt_hands_on_what_was_sent_and_nothing_else():
    got: list[str] = []
    p = Prompt("Message")
    p.on_submit(got.append)
    p._handle_custom_msg({"submit": "a\nb"}, [])
    p._handle_custom_msg({"submit": 3}, [])
    p._handle_custom_msg({"other": "x"}, [])
    assert got == ["a\nb"]


def test_plain_python_is_no_page():
    assert from_page() is False
