"""Notebook 05 in a real browser: the replication explorer against the package in this process.

The tables are made for the test (known effects, no model), so that every view has something to
show whatever has been recorded.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from pllm_helpers.evaluation import Estimate
from pllm_helpers.experiments import replication
from pllm_helpers.experiments.policy_study import Study
from pllm_helpers.figures import METHODS

from ..unit.made_studies import save_made
from .kit import Lab, LabPage

NOTEBOOK = "05_selection_to_personalization"
POLICIES = ("quality", "random", "fifo", "eoe_only", "dss_only", "idd_only", "released_code", "base")
FULL, RANDOM = METHODS["quality"].name, METHODS["random"].name


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("tables")
    options = {"effects": {"quality": 0.03, "base": -0.05}, "seeds": 3, "streams": ("person:0", "alpaca")}
    save_made(place, ["policy_comparison"], policies=POLICIES, **options)
    save_made(place, ["learning_curve"], policies=("quality", "random", "base"), slope=0.01, **options)
    return place


@pytest.fixture(scope="module")
def studies(folder: Path) -> dict[str, Study]:
    return replication.recorded(folder)


@pytest.fixture(scope="module")
def page(lab: Lab, folder: Path) -> Iterator[LabPage]:
    with lab.open(NOTEBOOK, parameters={"results": str(folder)}) as nb:
        yield nb


@pytest.fixture
def nb(page: LabPage) -> LabPage:
    """The open notebook in its first state."""
    page.by_label("Show").select_option("End of the stream")
    page.by_label("Stream").select_option("person:0")
    page.by_label("Metric").select_option("ROUGE-1")
    page.by_label("Compare with").select_option("nothing (scores)")
    for name in ("quality", "random", "fifo", "base"):
        page.by_label(METHODS[name].name).check()
    for name in ("eoe_only", "dss_only", "idd_only", "released_code"):
        page.by_label(METHODS[name].name).uncheck()
    settled(page, 4)
    return page


def settled(nb: LabPage, rows: int) -> None:
    """Wait until the table has so many rows, nothing is being computed, and the figure is drawn."""
    nb.eventually(
        lambda: nb.output().locator(".pllm-explorable table.pllm-table").get_attribute("data-rows") == str(rows)
    )
    nb.eventually(lambda: nb.output().locator(".pllm-busy.on").count() == 0)


def shown(nb: LabPage) -> dict[str, list[tuple[float, float, float]]]:
    """Name of the trace -> (value, low, high) per point, as the browser draws them."""
    out = {}
    for t in nb.figure()["data"]:
        side = "error_y" if "array" in (t.get("error_y") or {}) else "error_x"
        values, bars = t[side[-1]], t[side]
        out[t["name"]] = [(v, v - d, v + u) for v, u, d in zip(values, bars["array"], bars["arrayminus"], strict=True)]
    return out


def ticks(nb: LabPage) -> list[tuple[str, float]]:
    """Labels of the x axis and where they stand in the window."""
    return (
        nb.output()
        .locator(".pllm-explorable .xtick text")
        .evaluate_all(
            "e => e.map(t => { const b = t.getBoundingClientRect(); return [t.textContent, b.left + b.width / 2]; })"
        )
    )


def points_of(nb: LabPage) -> list[float]:
    """Where the drawn points stand across the window."""
    return (
        nb.output()
        .locator(".pllm-explorable .scatterlayer .point")
        .evaluate_all("e => e.map(t => { const b = t.getBoundingClientRect(); return b.left + b.width / 2; })")
    )


def close(e: Estimate) -> object:
    return pytest.approx((e.value, e.low, e.high), abs=1e-6)


def table(nb: LabPage) -> list[list[str]]:
    rows = nb.output().locator(".pllm-explorable table.pllm-table tbody tr")
    return rows.evaluate_all("r => r.map(x => Array.from(x.children).map(c => c.textContent))")


def test_the_first_state_shows_the_recorded_scores(nb: LabPage, studies: dict[str, Study]):
    found, study = shown(nb), studies["policy_comparison"]
    for policy in ("quality", "random", "fifo", "base"):
        e = study.estimate("rouge1", "person:0", policy)
        assert found[METHODS[policy].name] == [close(e)]
        row = next(r for r in table(nb) if r[0] == METHODS[policy].name)
        assert row[1:] == [f"{e.value:.4f}", f"[{e.low:.3f}, {e.high:.3f}]", "60", "3", "recorded"]
    subtitle = nb.figure()["layout"]["title"]["subtitle"]["text"].replace("<br>", " ")
    assert "recorded: n = 60 (3 seeds × 20 held-out dialogues)" in subtitle
    nb.check_accessible()
    nb.screenshot("05_scores")


def test_paired_differences_by_mouse(nb: LabPage, studies: dict[str, Study]):
    nb.by_label("Compare with").select_option(RANDOM)
    settled(nb, 3)
    found = shown(nb)
    assert RANDOM not in found
    for policy in ("quality", "fifo", "base"):
        e = studies["policy_comparison"].estimate("rouge1", "person:0", policy, against="random")
        assert found[METHODS[policy].name] == [close(e)]
    assert nb.figure()["layout"]["xaxis"]["title"]["text"] == f"ROUGE-1, minus {RANDOM}"
    assert nb.output().locator(".pllm-explorable .shapelayer path").count() == 1  # the line of no difference
    assert max(points_of(nb)) - min(points_of(nb)) > 200
    nb.check_accessible()
    nb.screenshot("05_differences")


def test_learning_curves_by_keyboard(nb: LabPage, studies: dict[str, Study]):
    nb.by_label("Show").focus()
    nb.page.keyboard.press("ArrowDown")
    settled(nb, 3 * 4)
    found, study = shown(nb), studies["learning_curve"]
    for policy in ("quality", "random"):
        want = replication.curve(study, "person:0", policy).estimates
        assert found[METHODS[policy].name] == [close(e) for e in want]
    # levels stand equally far apart over the whole width of the axis; no line is left of the view before
    places = ticks(nb)
    assert [t for t, _ in places] == ["100", "200", "400", "800"]
    gaps = [b - a for (_, a), (_, b) in zip(places, places[1:], strict=False)]
    assert max(gaps) - min(gaps) < 2 and sum(gaps) > 300
    spread = points_of(nb)
    assert len(spread) == 12 and max(spread) - min(spread) > 300
    assert nb.output().locator(".pllm-explorable .shapelayer path").count() == 0
    assert "not measured here: FIFO replace" in nb.text(".pllm-body")
    nb.check_accessible()
    nb.screenshot("05_curves")
    nb.by_label("Stream").focus()
    nb.page.keyboard.press("ArrowDown")  # alpaca
    nb.by_label("Metric").focus()
    for _ in range(2):
        nb.page.keyboard.press("ArrowDown")  # NLL
    want = replication.curve(study, "alpaca", "quality", "nll").estimates
    nb.eventually(lambda: shown(nb).get(FULL) == [close(e) for e in want])


def test_policies_are_checked_by_keyboard(nb: LabPage, studies: dict[str, Study]):
    nb.by_label(METHODS["fifo"].name).focus()
    nb.page.keyboard.press("Space")
    settled(nb, 3)
    assert METHODS["fifo"].name not in shown(nb)
    nb.page.keyboard.press("Tab")
    focus = nb.page.evaluate("() => document.activeElement.nextElementSibling.textContent")
    assert focus == METHODS["eoe_only"].name  # the boxes stayed, and so did the focus
    nb.page.keyboard.press("Space")
    settled(nb, 4)
    e = studies["policy_comparison"].estimate("rouge1", "person:0", "eoe_only")
    assert shown(nb)[METHODS["eoe_only"].name] == [close(e)]


def test_ablation_checks_its_own_policies(nb: LabPage, studies: dict[str, Study]):
    nb.by_label("Show").select_option("Ablation")
    settled(nb, 5)
    assert nb.by_label(METHODS["idd_only"].name).is_checked() and not nb.by_label(RANDOM).is_checked()
    e = studies["policy_comparison"].estimate("rouge1", "person:0", "idd_only")
    assert shown(nb)[METHODS["idd_only"].name] == [close(e)]
    nb.by_label("Show").select_option("End of the stream")
    settled(nb, 4)
    assert nb.by_label(RANDOM).is_checked()


def test_a_view_without_cells_says_how_to_make_them(nb: LabPage):
    nb.by_label("Show").select_option("Buffer sizes")
    nb.eventually(lambda: "python -m pllm_helpers.experiments buffer_size_sweep" in nb.text(".pllm-body"))
    assert nb.output().locator(".pllm-explorable .shapelayer path").count() == 0
    assert nb.figure()["data"] == [] and nb.text("[role=alert]") == ""
    nb.check_accessible()
    nb.screenshot("05_not_measured")


def test_no_policy_gets_a_message_in_place(nb: LabPage):
    for name in ("quality", "random", "fifo", "base"):
        nb.by_label(METHODS[name].name).uncheck()
    nb.eventually(lambda: "Policies: expected at least one" in nb.text("[role=alert]"))
    assert len(shown(nb)) >= 1  # the last result that worked stays
    nb.check_accessible()
    nb.by_label(FULL).check()
    settled(nb, 1)
    nb.eventually(lambda: nb.text("[role=alert]") == "")


def test_all_streams_together_and_in_words(nb: LabPage, studies: dict[str, Study]):
    nb.by_label("Stream").select_option("All streams")
    e = studies["policy_comparison"].estimate("rouge1", None, "quality")
    nb.eventually(lambda: shown(nb).get(FULL) == [close(e)])
    nb.output().locator(".pllm-explorable .pllm-alt summary").click()
    text = nb.output().locator(".pllm-explorable .pllm-alt p")
    nb.eventually(lambda: text.is_visible())
    assert f"{FULL}: {e.value:.3f} [{e.low:.3f}, {e.high:.3f}]" in text.inner_text()


def test_without_any_table_the_widget_opens_and_says_so(lab: Lab, tmp_path: Path):
    with lab.open(NOTEBOOK, parameters={"results": str(tmp_path)}) as nb:
        assert "python -m pllm_helpers.experiments policy_comparison" in nb.text(".pllm-body")
        nb.check_accessible()
