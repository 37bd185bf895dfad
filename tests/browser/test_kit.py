"""The kit itself and what every widget shares: the kit sees what a page shows, and fails where it should."""

from __future__ import annotations

import sys

import pytest

from .kit import Lab, notebook, reduce_notebook

FIGURE = """
import numpy as np
from pllm_helpers import figures
fig = figures.new_figure(title="Growth <b>", x="step", y="value")
fig.add_heatmap(x=[1, 2, 3], y=[0, 0.6], z=np.arange(6.0).reshape(2, 3), showscale=False, opacity=0.15)
x = np.array([1.0, 2.0, 3.0])
figures.add_series(fig, "lora", x, [0.1, 0.4, 0.2], low=[0.0, 0.3, 0.1], high=[0.2, 0.5, 0.3])
figures.show(fig, alt="A line rises from 0.1 to 0.4 and falls to 0.2.", caption="Up & down <i>.")
"""

TOY = """
import ipywidgets
import time
from pllm_helpers import figures
from pllm_helpers.runtime import InputError
from pllm_helpers.widgets.base import Explorable
from pllm_helpers.widgets.controls import Region, Slider, esc

class Toy(Explorable):
    title = "Count the <letters>"
    help = "Type & see."

    def build(self):
        self.answer = Region()
        return {
            "text": ipywidgets.Textarea("hello", description="Your text", rows=2).add_class("pllm-wide"),
            "factor": Slider("Factor", value=1.0, max=3.0, step=0.5, digits=1),
            "unit": ipywidgets.Dropdown(options=["letters", "stones"], description="Unit"),
            "start": ipywidgets.BoundedIntText(0, 0, 9, description="Start"),
        }, [self.answer]

    def compute(self, text, factor, unit, start):
        if not text.strip():
            raise InputError("Your text", "expected some words, got none", "Type a word.")
        if text == "crash":
            raise RuntimeError("no <i>way</i>")
        if text.startswith("slow"):
            time.sleep(1)
        return f"{text}: {start + factor * len(text):g} {unit}"

    def draw(self, result):
        self.answer.html = f"<p id='answer'>{esc(result)}</p>"

    def summary(self, result):
        return f"<p>{esc(result)}</p>"

    def figure(self, result):
        return figures.new_figure().add_bar(x=["hello"], y=[5]), "One bar of height 5."
"""


def test_figure_renders_offline_with_its_text(lab: Lab):
    with lab.open(notebook(widget=FIGURE)) as nb:
        heat, band, line = nb.figure()["data"]
        assert heat["z"] == [[0, 1, 2], [3, 4, 5]]
        assert band["x"] == [1, 2, 3, 3, 2, 1]
        assert line["x"] == [1, 2, 3] and line["y"] == [0.1, 0.4, 0.2] and line["name"] == "LoRA"
        assert nb.output().locator(".js-plotly-plot svg.main-svg").count() > 0
        nb.output().get_by_text("Describe this figure").focus()
        nb.page.keyboard.press("Enter")
        nb.eventually(lambda: nb.output().get_by_text("A line rises from 0.1 to 0.4").is_visible())
        assert nb.output().get_by_text("Up & down <i>.").is_visible()  # text, not mark-up
        nb.check_accessible()
        nb.screenshot("kit_figure")


def test_figure_is_a_white_card_in_the_dark_theme(lab: Lab):
    with lab.open(notebook(widget=FIGURE), dark=True) as nb:
        assert nb.page.evaluate("document.body.dataset.jpThemeLight") == "false"
        background = nb.output().locator(".js-plotly-plot svg.main-svg").first.evaluate("e => e.style.background")
        assert background == "rgb(255, 255, 255)"
        nb.check_accessible()
        nb.screenshot("kit_figure_dark")


def test_controls_work_by_keyboard_and_errors_appear_in_place(lab: Lab):
    with lab.open(notebook(setup=TOY, widget="toy = Toy(); toy")) as nb:
        assert nb.text("#answer") == "hello: 5 letters"
        text = nb.by_label("Your text")
        text.click()
        nb.page.keyboard.press("ControlOrMeta+A")
        nb.page.keyboard.type("<img src=x onerror=alert(1)>")
        nb.eventually(lambda: nb.text("#answer") == "<img src=x onerror=alert(1)>: 28 letters")
        assert nb.output().locator("img").count() == 0
        nb.page.keyboard.press("Tab")  # on to the slider
        for _ in range(2):
            nb.page.keyboard.press("ArrowRight")
        nb.eventually(lambda: nb.text("#answer").endswith(": 56 letters"))
        nb.page.keyboard.press("Tab")  # the list
        nb.page.keyboard.press("ArrowDown")
        nb.eventually(lambda: nb.text("#answer").endswith(": 56 stones"))
        nb.page.keyboard.press("Tab")  # the number
        nb.page.keyboard.press("ArrowUp")
        nb.eventually(lambda: nb.text("#answer").endswith(": 57 stones"))
        nb.screenshot("kit_widget")
        text.fill(" ")
        nb.eventually(lambda: nb.text("[role=alert]") == "Your text: expected some words, got none. Type a word.")
        nb.check_accessible()
        text.fill("crash")
        nb.eventually(lambda: nb.text("[role=alert] > strong") == "This did not work.")
        assert "RuntimeError: no <i>way</i>" in nb.text("[role=alert]")
        nb.check_accessible()
        nb.screenshot("kit_widget_error")
        text.fill("back")
        nb.eventually(lambda: nb.text("#answer").startswith("back: ") and nb.text("[role=alert]") == "")


def test_the_newest_change_wins_and_stale_ones_are_dropped(lab: Lab):
    with lab.open(notebook(setup=TOY, widget="toy = Toy(); toy")) as nb:
        before = int(nb.output().locator("[data-runs]").get_attribute("data-runs"))
        for i in range(5):
            nb.by_label("Your text").fill(f"slow {i}")
            nb.page.wait_for_timeout(400)  # longer than the widget waits, shorter than it computes
        nb.eventually(lambda: nb.text("#answer") == "slow 4: 6 letters")
        drawn = int(nb.output().locator("[data-runs]").get_attribute("data-runs")) - before
        assert drawn < 5, "every overtaken result was drawn"
        nb.eventually(lambda: nb.output().locator(".pllm-busy.on").count() == 0)


def test_a_saved_widget_stays_readable_without_its_kernel(lab: Lab):
    with lab.open(notebook(setup=TOY, widget="toy = Toy(); toy")) as nb:
        assert nb.output().get_by_text("starting state").is_hidden()  # a live widget needs no stand-in
        assert nb.output().locator(".js-plotly-plot").count() == 0
        saved = nb.save()
        nb.reload()  # the kernel still runs: the widget comes back to life
        nb.eventually(lambda: nb.output().locator("#answer").count() == 1)
        assert nb.output().get_by_text("starting state").is_hidden()
    live = saved.cells[-1].outputs[0]
    assert live["metadata"]["alt"] == "One bar of height 5." and "text/html" not in live["data"]
    with lab.open(saved, reduce=False, run=False, same_file=nb.name) as again:
        again.eventually(lambda: again.output().get_by_text("hello: 5 letters").is_visible())
        assert again.output().get_by_text("starting state").is_visible()
        again.check_accessible()
        again.screenshot("kit_widget_saved")
        # JupyterLab's own complaint about the model that is gone
        again.console_errors[:] = [e for e in again.console_errors if "widget model not found" not in e]


def test_a_failing_cell_fails_the_test(lab: Lab):
    with pytest.raises(AssertionError, match="ZeroDivisionError"):
        lab.open(notebook(widget="1 / 0"))


def test_console_errors_and_foreign_requests_are_seen(lab: Lab):
    nb = lab.open(notebook(widget="1"))
    try:
        nb.check_clean()
        nb.page.evaluate("console.error('broken thing')")
        nb.page.evaluate("fetch('https://example.org/x').catch(() => null)")
        nb.eventually(lambda: nb.foreign_requests() == ["https://example.org/x"])
        with pytest.raises(AssertionError, match="broken thing"):
            nb.check_clean()
        nb.console_errors.clear()
        with pytest.raises(AssertionError, match="example.org"):
            nb.check_clean()
    finally:
        nb.close()


def test_inaccessible_output_is_seen(lab: Lab):
    bad = "import ipywidgets\nipywidgets.HTML('<button></button><p style=\"color:#bbb;background:#fff\">faint</p>')"
    with lab.open(notebook(widget=bad)) as nb:
        with pytest.raises(AssertionError) as found:
            nb.check_accessible()
        assert "button-name (critical)" in str(found.value) and "color-contrast (serious)" in str(found.value)


def test_nothing_of_the_users_configuration_is_used_and_kernels_end(lab: Lab):
    with lab.open(notebook(widget="import sys, os; print(sys.executable, os.environ['JUPYTER_CONFIG_DIR'])")) as nb:
        python, config = nb.saved_outputs()[0][0]["text"].split()
        assert python == sys.executable and config.startswith(str(lab.folder))
        assert len(lab.api("sessions")) == 1
    assert lab.api("sessions") == []


def test_reduced_notebooks_keep_what_a_widget_needs():
    nb = notebook(parameters="rank: int = 4\nname = 'x'", other="1/0", setup="load()", widget="show()")
    small = reduce_notebook(nb, {"rank": 8})
    assert [c.source for c in small.cells] == ["rank: int = 4\nname = 'x'", "rank = 8", "load()", "show()"]
    with pytest.raises(ValueError, match="rnak"):
        reduce_notebook(nb, {"rnak": 8})
    with pytest.raises(ValueError, match="widget"):
        reduce_notebook(notebook(setup="1"))
