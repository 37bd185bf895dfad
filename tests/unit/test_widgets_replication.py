"""The replication explorer without a page: what it shows is what the studies say, and gaps are named."""

from __future__ import annotations

import re

import pytest

from pllm_helpers.experiments import replication
from pllm_helpers.experiments.policy_study import Study
from pllm_helpers.figures import METHODS, PLOTLY_MIME
from pllm_helpers.runtime import InputError
from pllm_helpers.widgets import ReplicationExplorer, replication_explorer
from pllm_helpers.widgets.controls import Checks
from pllm_helpers.widgets.replication import ABLATION, ALL, BOTH, LIVE, RECORDED, VIEWS

from .made_studies import made_study

POLICIES = ("quality", "random", "fifo", "kcenter", "eoe_only", "dss_only", "idd_only", "released_code", "base")
EFFECTS = {"quality": 0.03, "base": -0.05}
SWEEPS = ("learning_curve", "buffer_size_sweep", "synthesis_sweep")


@pytest.fixture(scope="module")
def studies() -> dict[str, Study]:
    found = {"policy_comparison": made_study(effects=EFFECTS, policies=POLICIES)}
    return found | {n: made_study(n, effects=EFFECTS, slope=0.01, policies=POLICIES[:3] + ("base",)) for n in SWEEPS}


@pytest.fixture(scope="module")
def live() -> dict[str, Study]:
    return {"policy_comparison": made_study(policies=("quality", "random", "base"), streams=("person:0",), seeds=2)}


@pytest.fixture
def explorer(studies: dict[str, Study], live: dict[str, Study]) -> ReplicationExplorer:
    return replication_explorer(studies, live)


def drawn(explorer: ReplicationExplorer) -> dict[str, list[tuple[float, float, float]]]:
    """Name of the trace -> (value, low, high) per point, as the figure has them."""
    out: dict[str, list[tuple[float, float, float]]] = {}
    for t in explorer.plot.data:
        values, bars = (t.y, t.error_y) if t.error_y.array is not None else (t.x, t.error_x)
        out[t.name] = [(v, v - d, v + u) for v, u, d in zip(values, bars.array, bars.arrayminus, strict=True)]
    return out


def test_scores_are_the_studies(explorer: ReplicationExplorer, studies: dict[str, Study], live: dict[str, Study]):
    shown = drawn(explorer)
    for p in ("quality", "random", "fifo", "kcenter", "base"):
        e = studies["policy_comparison"].estimate("rouge1", "person:0", p)
        assert shown[METHODS[p].name] == [pytest.approx((e.value, e.low, e.high))]
    e = live["policy_comparison"].estimate("rouge1", "person:0", "random")
    assert shown["Random replace · live"] == [pytest.approx((e.value, e.low, e.high))]
    note = explorer.plot.layout.title.subtitle.text.replace("<br>", " ")
    assert "recorded: n = 100 (5 seeds × 20 held-out dialogues)" in note
    assert "live: n = 40 (2 seeds × 20 held-out dialogues)" in note


@pytest.mark.parametrize("metric", ["rouge1", "rougeL", "nll", "length_ratio", "bleu", "copy_rate"])
@pytest.mark.parametrize("stream", [ALL, "person:0", "alpaca"])
def test_every_metric_and_stream(explorer: ReplicationExplorer, studies: dict[str, Study], metric: str, stream: str):
    explorer.set(metric=metric, stream=stream, origin=RECORDED, reference="random")
    where = None if stream == ALL else stream
    e = studies["policy_comparison"].estimate(metric, where, "quality", against="random")
    row = next(r for r in explorer.result.rows if r.policy == "quality")
    assert row.estimate == e and METHODS["random"].name not in drawn(explorer)
    table = re.findall(r'<tr><th scope="row">([^<]*)</th><td class="num">([^<]*)</td>', explorer.table.html)
    assert dict(table)[METHODS["quality"].name] == f"{e.value:.4f}"


@pytest.mark.parametrize("view", ["Learning curves", "Buffer sizes", "Synthesised sets"])
@pytest.mark.parametrize("reference", ["", "random"])
def test_curves_have_a_point_per_level(
    explorer: ReplicationExplorer, studies: dict[str, Study], view: str, reference: str
):
    explorer.set(view=view, reference=reference, origin=RECORDED)
    study = studies[VIEWS[view].studies[0]]
    c = replication.curve(study, "person:0", "quality", against=reference or None)
    shown = drawn(explorer)[METHODS["quality"].name]
    assert shown == [pytest.approx((e.value, e.low, e.high)) for e in c.estimates]
    assert list(explorer.plot.layout.xaxis.ticktext) == [str(x) for x in study.levels()]
    names = [a.text for a in explorer.plot.layout.annotations if a.visible is not False]
    assert sorted(names) == sorted({METHODS[r.policy].name for r in explorer.result.rows})
    low, high = explorer.plot.layout.yaxis.range
    assert all(low < r.estimate.low and r.estimate.high < high for r in explorer.result.rows)


def test_every_state_names_what_another_may_have_set(explorer: ReplicationExplorer):
    """The page keeps what a layout does not name: a line or a text of an earlier view would stay."""
    for view in VIEWS:
        for reference in ("", "random"):
            explorer.set(view=view, reference=reference, origin=RECORDED)
            layout = explorer.plot.layout
            assert len(layout.shapes) == 1 and layout.shapes[0].visible == bool(reference)
            assert layout.annotations[0].visible == (not explorer.result.rows)
            for axis in (layout.xaxis, layout.yaxis):
                assert axis.type == "linear" and axis.range is not None and axis.tickmode in ("auto", "array")


def test_live_marks_are_open_and_named(explorer: ReplicationExplorer):
    symbols = {t.name: t.marker.symbol for t in explorer.plot.data}
    assert symbols["Random replace · live"].endswith("-open") and not symbols["Random replace"].endswith("-open")
    explorer.set(origin=LIVE)
    assert all(t.name.endswith("· live") for t in explorer.plot.data)
    explorer.set(origin=RECORDED)
    assert not any(t.name.endswith("· live") for t in explorer.plot.data)


def test_what_is_missing_is_said(explorer: ReplicationExplorer):
    explorer.set(view="Buffer sizes", origin=LIVE)
    assert explorer.result.rows == [] and "no buffer_size_sweep in this notebook" in explorer.told.html
    assert "Not measured yet" in explorer.plot.layout.annotations[0].text and explorer.table.html == ""
    explorer.set(view="Learning curves", origin=RECORDED, policies=["quality", "kcenter"])
    assert "not measured here: K-Center" in explorer.told.html
    assert {r.policy for r in explorer.result.rows} == {"quality"}


def test_nothing_recorded_is_a_state_and_not_an_error(live: dict[str, Study]):
    empty = replication_explorer({})
    assert empty.result.rows == [] and "python -m pllm_helpers.experiments policy_comparison" in empty.told.html
    for view in VIEWS:
        empty.set(view=view)
        assert empty.result.rows == []
    only = replication_explorer({}, live)
    assert {r.origin for r in only.result.rows} == {"live"} and len(only.result.rows) == 3


def test_no_policy_is_told_in_place(explorer: ReplicationExplorer):
    with pytest.raises(InputError, match="at least one"):
        explorer.set(policies=[])
    assert "Check a policy" in explorer._error.html
    with pytest.raises(InputError, match="reference"):
        explorer.set(policies=["random"], reference="random")
    explorer.set(policies=["quality"])
    assert explorer._error.html == "" and len(explorer.result.rows) == 2


def test_the_ablation_checks_its_policies_and_gives_the_others_back(explorer: ReplicationExplorer):
    before = explorer.controls["policies"].value
    explorer.view_of.value = "Ablation"
    assert explorer.controls["policies"].value == [p for p in POLICIES if p in ABLATION]
    assert {r.policy for r in explorer.result.rows if r.origin == "recorded"} == set(ABLATION)
    explorer.view_of.value = "End of the stream"
    assert explorer.controls["policies"].value == before


def test_the_figure_is_told_in_words_and_kept_for_exports(explorer: ReplicationExplorer, studies: dict[str, Study]):
    first = explorer.result
    explorer.set(view="Learning curves", origin=RECORDED, policies=["quality"])
    c = replication.curve(studies["learning_curve"], "person:0", "quality")
    assert f"at 100 {c.estimates[0].value:.3f} [{c.estimates[0].low:.3f}" in explorer.described.html
    assert "best Quality" in explorer.announce(explorer.result)
    bundle, metadata = explorer._repr_mimebundle_()
    e = next(r.estimate for r in first.rows if r.policy == "fifo")
    assert f"{e.value:.4f}" in bundle["text/html"] and f"FIFO replace: {e.value:.3f}" in metadata["alt"]
    assert len(bundle[PLOTLY_MIME]["data"]) == len(first.rows)


def test_lower_is_better_for_nll(explorer: ReplicationExplorer, studies: dict[str, Study]):
    explorer.set(metric="nll", origin=RECORDED)
    assert "best Quality" in explorer.announce(explorer.result)  # which lowers NLL in the made study
    assert explorer.result.direction == "lower is better"
    explorer.set(reference="random")
    assert explorer.result.direction == "below 0 is better"


def test_bad_arguments_are_refused(studies: dict[str, Study]):
    with pytest.raises(InputError, match="policy_comparision"):
        replication_explorer({"policy_comparision": studies["policy_comparison"]})
    assert BOTH in replication_explorer(studies).controls["origin"].options


def test_check_boxes_keep_the_order_of_the_options_and_drop_what_is_unknown():
    boxes = Checks("Fruit", [("a", "Apple"), ("b", "Pear"), ("c", "Plum")], ["c", "a"])
    assert boxes.value == ["a", "c"]
    boxes.value = ["b", "x"]
    assert boxes.value == ["b"]
