"""The pocket lab without a page: the slice is the package's, steps are MeZO's, runs are real, errors stay in place."""

from __future__ import annotations

import re

import pytest
import torch

from pllm_helpers.device import predict_memory
from pllm_helpers.experiments.pocket_study import MEMORY_METHODS, TUNERS, Surface
from pllm_helpers.models import LLM
from pllm_helpers.runtime import InputError
from pllm_helpers.tuning import perturb_
from pllm_helpers.tuning.data import token_rows
from pllm_helpers.widgets import PocketLab, pocket_lab
from pllm_helpers.widgets import pocket as module

from .tuning_kit import dialogue_sets, tiny_llm

ROWS = dialogue_sets(4)


@pytest.fixture(scope="module")
def tiny() -> LLM:
    torch.set_num_threads(1)
    return tiny_llm()


@pytest.fixture
def lab(tiny: LLM) -> PocketLab:
    return pocket_lab(tiny, ROWS)


def cards(lab: PocketLab) -> dict[str, str]:
    return dict(re.findall(r'data-card="([^"]+)">([^<]*)<', lab.cards.html))


@pytest.mark.parametrize(
    ("seed", "epsilon", "noise"), [(0, "0.001 (MeZO's)", "signs (quick)"), (7, "0.03", "Gaussian (MeZO's)")]
)
def test_the_slice_is_the_packages(lab: PocketLab, tiny: LLM, seed: int, epsilon: str, noise: str):
    step = lab.set(seed=seed, epsilon=epsilon, noise=noise)
    e, kind = module.EPSILONS[epsilon], module.NOISES[noise]
    surface = Surface(tiny, token_rows(tiny, ROWS, 512).rows)
    expected = surface.along(seed, [p * e for p in module.PLACES], kind)
    assert step.losses == pytest.approx(expected, abs=1e-5)
    slope = (step.at(1.0) - step.at(-1.0)) / (2 * e)
    assert step.slope == pytest.approx(slope) and step.step == pytest.approx(-step.rate * slope)
    drawn = {t.name: t for t in lab.plot.data}
    assert list(drawn["loss"].x) == pytest.approx(list(module.PLACES)) and list(drawn["loss"].y) == list(step.losses)
    assert list(drawn["probes and slope"].y) == [step.at(-1.0), step.at(1.0)]
    assert list(drawn["step"].x) == pytest.approx([0.0, step.step / e])
    assert cards(lab)["Slope g"] == f"{step.slope:.3f}" and f"{step.after:.5f}" in lab.described.html


def test_steps_are_mezos_and_the_way_back_is_exact(lab: PocketLab, tiny: LLM):
    lab.set(rate="0.001", noise="Gaussian (MeZO's)", seed=5)
    first = lab.result
    lab.go_on.click()
    second = lab.result
    lab.go_on.click()
    assert [s.seed for s in lab.taken] == [5, 6] and lab.controls["seed"].value == 7
    surface = Surface(tiny, lab.surface.rows)
    for s in (first, second):
        perturb_(surface.parameters, s.seed, s.step)
    for p, q in zip(lab.surface.parameters, surface.parameters, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-6)
    assert 'data-steps="2"' in lab.history.html and f"({first.seed}, {first.slope:.3f})" in lab.history.html
    assert not lab.home.disabled
    lab.home.click()
    assert lab.taken == [] and lab.home.disabled and lab.controls["seed"].value == 0
    before_first_walk = Surface(tiny, lab.surface.rows).parameters
    for p, q in zip(lab.surface.parameters, before_first_walk, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-6)


def test_predictions_follow_method_and_limit(lab: PocketLab, tiny: LLM):
    for method in MEMORY_METHODS:
        lab.method.value = method
        dtype = tiny.dtype if method in module.ADAPTERS else "fp32"
        expected = predict_memory(tiny, method=TUNERS[method].predicted, dtype=dtype).total
        assert f'data-predicted="{expected:.0f}"' in lab.predicted.html
    lab.limit.value = 400
    lab.method.value = "mezo"
    assert ("should fit" if lab.predict() <= 400 else "should be killed") in lab.predicted.html
    assert list(next(t for t in lab.plot.data if t.name == "limit").y) == [400.0, 400.0]


def test_runs_are_real_and_can_be_removed(lab: PocketLab):
    lab.method.value, lab.limit.value = "mezo", 4096
    lab.start.click()
    (done,) = lab.tries
    assert done.result.status == "finished" and done.method == "mezo" and done.result.limit_mb == 4096
    curve = next(t for t in lab.plot.data if t.name == "run 1: MeZO")
    assert max(curve.y) <= done.result.peak_mb + 1e-6 and curve.x[-1] == done.result.timeline[-1].seconds
    assert f"{done.result.peak_mb:,.0f} MB" in lab.table.html and "finished" in lab._status.html
    assert not lab.start.disabled and lab.now.html == "" and "Run 1, MeZO" in lab.described.html
    lab.clear.click()
    assert lab.tries == [] and len(lab.plot.data) == 5 and lab.clear.disabled


def test_a_kill_is_shown(lab: PocketLab, monkeypatch: pytest.MonkeyPatch):
    small = module.PhoneEnvelope
    monkeypatch.setattr(module, "PhoneEnvelope", lambda limit, **more: small(60, **more))  # below a tiny model's needs
    lab.method.value = "adam"
    done = lab.run()
    assert done.result.status == "killed" and done.result.signal == 9
    assert "killed, signal 9" in lab.table.html
    curve = next(t for t in lab.plot.data if t.name.startswith("run 1"))
    assert curve.marker.symbol[-1] == "x"


def test_an_error_of_a_run_stays_in_place(lab: PocketLab, monkeypatch: pytest.MonkeyPatch):
    def broken(*_: object, **__: object) -> None:
        raise InputError("limit_mb", "expected more than the 12 MB of the model's weights, got 1", "Raise limit_mb.")

    monkeypatch.setattr(module, "measure_memory", broken)
    with pytest.raises(InputError):
        lab.run()
    assert "limit_mb" in lab._error.html and not lab.start.disabled and lab.tries == []
    assert "pllm-stale" not in lab._body._dom_classes


def test_a_static_page_has_the_numbers(lab: PocketLab):
    html = lab.fallback_html()
    assert f"{lab.result.slope:.3f}" in html and "Adam, all weights" in html and "<script" not in html
    figure, alt = lab._figure
    assert len(alt.split()) > 8 and len(figure.data) == 5


def test_only_models_that_write_text(tiny: LLM):
    from dataclasses import replace

    with pytest.raises(InputError, match="writes text"):
        pocket_lab(replace(tiny, kind="masked"), ROWS)
