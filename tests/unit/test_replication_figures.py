"""Figures of notebook 05: they draw the studies' own numbers, say what is behind them, and keep names apart."""

from __future__ import annotations

import numpy as np
import pytest

from pllm_helpers import figures
from pllm_helpers.experiments import replication
from pllm_helpers.experiments import replication_figures as drawn
from pllm_helpers.experiments.policy_study import Study
from pllm_helpers.figures import METHODS

from .made_studies import made_study

POLICIES = ("quality", "random", "fifo", "kcenter", "combined", "facility", "base")
EFFECTS = {"quality": 0.03, "base": -0.05}


@pytest.fixture(scope="module")
def study() -> Study:
    return made_study(effects=EFFECTS, policies=POLICIES)


@pytest.fixture(scope="module")
def curves() -> Study:
    return made_study("learning_curve", effects=EFFECTS, slope=0.01, policies=POLICIES[:4] + ("base",))


def note(fig) -> str:
    return fig.layout.title.subtitle.text.replace("<br>", " ")


def test_the_papers_figure_has_its_144_points():
    fig, alt = drawn.paper_figure()
    assert sum(len(t.x) for t in fig.data) == 144 and len(fig.data) == 24
    assert "1 seed" in note(fig) and "no interval" in note(fig)
    assert "OPENORCA quality 0.281, best other 0.238" in alt
    assert sum(bool(t.showlegend) for t in fig.data) == 4


def test_panels_hold_paired_differences(study: Study):
    fig, alt = drawn.difference_panels(study, POLICIES, "nll")
    assert len(fig.data) == 2 * (len(POLICIES) - 1)  # the reference is the line
    e = study.estimate("nll", "alpaca", "quality", against="random")
    t = next(t for t in fig.data if t.name == METHODS["quality"].name and t.xaxis == "x2")
    assert (t.x[0], t.error_x.array[0]) == pytest.approx((e.value, e.high - e.value))
    assert "recorded: n = 200 (5 seeds × 40 held-out dialogues)" in note(fig) and "left of the line" in note(fig)
    assert f"{e.value:+.3f} [{e.low:+.3f}, {e.high:+.3f}]" in alt
    with pytest.raises(replication.NotMeasured):
        drawn.difference_panels(study, ["eoe_only"], "rouge1")


def test_curves_are_drawn_apart_with_their_names(curves: Study):
    fig, alt = drawn.curve_figure(curves, POLICIES, "Learning curves", "sets")
    lines = [t for t in fig.data if t.mode == "lines+markers"]
    assert [t.name for t in lines] == [METHODS[p].name for p in POLICIES[:4] + ("base",)]
    want = replication.curve(curves, None, "fifo").drawn["y"]
    assert list(next(t for t in lines if t.name == "FIFO replace").y) == pytest.approx(want)
    assert list(fig.layout.xaxis.tickvals) == [100, 200, 400, 800] and fig.layout.xaxis.type == "log"
    first = [t.x[0] for t in lines]
    assert len(set(first)) == len(first) and np.prod(first) ** (1 / len(first)) == pytest.approx(100)
    assert "n = 200 (5 seeds × 40 held-out dialogues)" in note(fig) and "Learning curves" in alt
    paired, alt = drawn.curve_figure(curves, POLICIES, "Curves", "sets", against="random", stream="alpaca")
    assert "Paired difference" in note(paired) and "minus Random replace" in paired.layout.yaxis.title.text
    assert "; Random replace: " not in alt
    with pytest.raises(replication.NotMeasured):
        drawn.curve_figure(curves, ["eoe_only"], "Curves", "sets")


def test_time_scatter_and_null_say_their_numbers(study: Study):
    sweep = made_study("synthesis_sweep", policies=("quality", "base"))
    fig, alt = drawn.timing_figure(sweep)
    assert [t.text[0].strip() for t in fig.data] == ["0", "1", "3", "6"]
    assert "in 7 s" in alt  # CPU seconds, not the 8 of the wall
    inner = replication.centred(replication.cell_table(study), ["rouge1", "nll"])
    fig, alt = drawn.scatter_figure(inner, {"nll": "NLL"}, "recorded", [5])
    assert sum(len(t.x) for t in fig.data) == len(inner) == 12 and "n = 12 means" in note(fig)
    pairs = replication.all_pairs(study)
    best, largest = replication.largest_improvement(pairs)
    null = replication.null_largest(pairs)
    fig, alt = drawn.null_figure(null, best, largest, "recorded", 0.38)
    assert len(fig.data[0].x) == 10_000 and best in note(fig) and f"n = {largest.n}" in note(fig)
    assert f"{np.median(null):.3f}" in alt and "0.38" in alt


def test_names_at_the_ends_keep_their_order_and_their_distance():
    fig = figures.new_figure(height=420)
    ends = {"quality": 0.30, "random": 0.301, "fifo": 0.302, "kcenter": 0.9}
    for key, end in ends.items():
        figures.add_series(fig, key, [1, 2], [0.1, end], low=[0.0, end - 0.05], high=[0.2, end + 0.05], interval="bars")
    figures.spread_labels(fig, gap=20)
    low, high = fig.layout.yaxis.range
    assert low < 0.0 and high > 0.95  # the intervals fit in
    scale = (420 - 60 - 30) / (high - low)
    places = [(a.y - low) * scale + a.yshift for a in sorted(fig.layout.annotations, key=lambda a: a.y)]
    assert np.diff(places).min() >= 20 - 1e-6
    assert [a.yshift for a in fig.layout.annotations if a.y == 0.9] == [pytest.approx(0)]  # far from the others
    shifts = [a.yshift for a in fig.layout.annotations if a.y != 0.9]
    assert sum(shifts) == pytest.approx(0, abs=1e-6)  # spread evenly about where they belong


def test_dodged_lines_stay_about_their_places():
    for kind in ("linear", "log"):
        fig = figures.new_figure()
        for key in ("quality", "random", "fifo"):
            figures.add_series(fig, key, [10, 100], [1, 2], low=[0, 1], high=[2, 3], interval="bars")
        fig.update_xaxes(type=kind)
        figures.dodge(fig, share=0.01)
        xs = np.array([t.x for t in fig.data])
        if kind == "log":
            xs = np.log10(xs)
            assert xs.mean(0) == pytest.approx([1, 2]) and np.diff(xs[:, 0]) == pytest.approx(0.01)
            assert [a.x for a in fig.layout.annotations] == pytest.approx([xs.max()] * 3)
        else:
            assert xs.mean(0) == pytest.approx([10, 100]) and np.diff(xs[:, 0]) == pytest.approx(0.9)
            assert [a.x for a in fig.layout.annotations] == pytest.approx([xs.max()] * 3)
    assert figures.dodge(figures.new_figure()) is not None


def test_a_note_is_escaped_and_wrapped():
    fig = figures.add_note(figures.new_figure(title="T"), "<b> & " + "word " * 40)
    text = fig.layout.title.subtitle.text
    assert "&lt;b&gt; &amp;" in text and text.count("<br>") == 2
    assert fig.layout.margin.t > figures.add_note(figures.new_figure(title="T"), "short").layout.margin.t


def test_ablation_and_policies_differ_in_mark_where_they_share_a_colour():
    both = [m for m in METHODS.values() if m.family in ("policy", "ablation")]
    looks = {(m.colour, m.marker, m.dash) for m in both}
    assert len(looks) == len(both)
    same = [(a, b) for a in both for b in both if a.key < b.key and a.colour == b.colour]
    assert same and all(a.marker != b.marker for a, b in same)
