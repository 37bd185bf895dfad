"""Figures of notebook 06 show the numbers that they are given, and say them."""

from __future__ import annotations

import numpy as np
import pytest

from pllm_helpers.device import EnvelopeResult, Sample
from pllm_helpers.experiments import pocket_figures as drawn
from pllm_helpers.experiments import pocket_study as study
from pllm_helpers.experiments.pocket_study import Alignment, Trial


def texts(fig) -> str:
    return " | ".join(a.text for a in fig.layout.annotations)


def trial(method: str, seed: int, end: float) -> Trial:
    looks = [(0, 5.0), (10, (5 + end) / 2), (20, end)]
    return Trial(method, seed, 1e-3, [1.0] * 20, looks, 0.5, np.full(7, 5.0), np.full(7, end))


def test_the_slope_of_a_slice_is_that_of_its_probes():
    places = [-2e-3, -1e-3, 0.0, 1e-3, 2e-3]
    fig, alt = drawn.slice_figure({4: (places, [5.0, 4.9, 4.85, 4.7, 4.6]), 5: (places, [4.0] * 5)}, 1e-3)
    assert "seed 4: g = -100.00" in texts(fig) and "seed 5: g = 0.00" in texts(fig) and "slope -100.00" in alt
    assert list(fig.data[1].y) == [4.9, 4.7] and fig.layout.xaxis.range[1] >= 2


def test_alignment_stands_beside_its_theory():
    found = [Alignment(f"part {d:.0f}", int(d), np.full(4, d**-0.5), np.ones(4), np.ones(4)) for d in (1e2, 1e4, 1e6)]
    fig, alt = drawn.alignment_figure(found)
    theory, measured = fig.data
    np.testing.assert_allclose(np.array(theory.y) ** 2 * np.array(theory.x), 2 / np.pi)
    np.testing.assert_allclose(measured.y, [0.1, 0.01, 0.001])
    assert (
        all(a.name in texts(fig) and a.name in alt for a in found) and "4 directions" in fig.layout.title.subtitle.text
    )


def test_errors_of_epsilon_are_drawn_as_they_are():
    fig, alt = drawn.epsilon_figure([1e-5, 1e-3], [0.5, 0.01])
    assert list(fig.data[0].y) == [0.5, 0.01] and "1e-05: 0.5" in alt and fig.layout.xaxis.type == "log"


def test_bars_add_up_and_what_is_over_the_limit_says_so():
    table = study.memory_table("smollm2-135m", limit_mb=1024)
    fig, alt = drawn.memory_figure(table, 1024)
    labels = texts(fig)
    for row in table.itertuples():
        assert (f"{row.total:,.0f}" + ("" if row.fits else " over")) in labels
    for name, axis, batch in (("Batch of 8", None, 8), ("Batch of 64", "x2", 64)):
        bars = [
            t for t in fig.data if t.type == "bar" and (t.xaxis == axis or (axis is None and t.xaxis in (None, "x")))
        ]
        total = np.sum([np.array(t.x, float) for t in bars], axis=0)
        np.testing.assert_allclose(total, table[table["batch"] == batch]["total"])
        assert name in labels and f"{name}:" in alt
    assert "1,024 MB" in alt


def test_a_killed_run_ends_in_a_cross():
    def result(status: str, signal: int | None, peak: float) -> EnvelopeResult:
        line = [Sample(0.0, 0.0, 0.0, ""), Sample(1.0, 500.0, 500.0, ""), Sample(2.0, 80.0, 80.0, "")]
        return EnvelopeResult(
            status, signal, peak, line, None, "", 1024.0, "resident", (100.0, 60.0), 1.0, 1.0, 1.0, ""
        )

    fig, alt = drawn.timeline_figure(
        {"mezo": result("finished", None, 600.0), "adam": result("killed", 9, 1024.0)}, 1024
    )
    ends = [t.marker.symbol for t in fig.data if t.mode == "markers"]
    assert ends == ["circle", "x"] and "MeZO: finished" in texts(fig) and "Adam, all weights: killed" in texts(fig)
    assert "peak 600 MB" in alt and "killed after 2.0 s, peak 1,024 MB" in alt


def test_curves_are_means_over_seeds_against_steps_and_seconds():
    fig, alt = drawn.curves_figure([trial("mezo", 0, 4.0), trial("mezo", 1, 3.0), trial("lora", 0, 2.0)], "Loss")
    lines = {(t.legendgroup, t.xaxis): t for t in fig.data if t.mode == "lines+markers"}
    assert len(lines) == 4 and sum(t.fill == "toself" for t in fig.data) == 2
    assert list(lines["mezo", "x"].y) == pytest.approx([5, 4.25, 3.5]) and list(lines["mezo", "x"].x) == [0, 10, 20]
    assert list(lines["mezo", "x2"].x) == [0, 5, 10] and list(lines["lora", "x2"].y)[-1] == 2
    assert "MeZO, 2 seeds: 5.000 at the start, 3.500 after 20 steps and 10.0 CPU seconds" in alt
    assert "LoRA, 1 seed:" in alt and "7 held-out rows" in fig.layout.title.subtitle.text
