"""The look: legible and distinguishable without colour vision; figures that carry their text."""

from __future__ import annotations

import itertools

import numpy as np
import plotly.graph_objects as go
import plotly.io as pio
import pytest
from IPython.core.displaypub import CapturingDisplayPublisher
from IPython.core.interactiveshell import InteractiveShell

from pllm_helpers import figures
from pllm_helpers.evaluation import Estimate
from pllm_helpers.runtime import InputError

# Machado, Oliveira and Fernandes 2009, severity 1.0, on linear RGB
VISION = {
    "normal": np.eye(3),
    "protan": np.array(
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
    ),
    "deutan": np.array(
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
    ),
    "tritan": np.array(
        [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]]
    ),
}
TO_XYZ = np.array(
    [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
)


def linear(colour: str) -> np.ndarray:
    c = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)


def lab(colour: str, vision: str) -> np.ndarray:
    xyz = TO_XYZ @ np.clip(VISION[vision] @ linear(colour), 0, 1) / np.array([0.95047, 1, 1.08883])
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize("vision", VISION)
def test_any_two_colours_differ_for_every_kind_of_vision(vision: str):
    for a, b in itertools.combinations(figures.PALETTE.values(), 2):
        assert np.linalg.norm(lab(a, vision) - lab(b, vision)) >= 16, (a, b)


def test_marks_have_3_to_1_and_text_4_5_to_1_on_the_card():
    assert figures.contrast("#000000", "#ffffff") == pytest.approx(21)
    assert figures.contrast("#767676") == pytest.approx(4.54, abs=0.01)  # a value known from WCAG's own examples
    for m in figures.METHODS.values():
        assert figures.contrast(m.colour) >= 3, m
        assert figures.contrast(m.ink) >= 4.5, m
    for ink in (figures.INK, figures.SOFT_INK):
        assert figures.contrast(ink) >= 4.5


def test_methods_of_one_family_differ_in_colour_and_without_it():
    families = {m.family for m in figures.METHODS.values()}
    for family in families:
        members = [m for m in figures.METHODS.values() if m.family == family]
        for part in ("colour", "dash", "marker", "hatch", "name"):
            assert len({getattr(m, part) for m in members}) == len(members), (family, part)


def test_methods_are_found_by_key_and_by_name():
    assert figures.method("LoRA") is figures.method("lora") is figures.METHODS["lora"]
    assert figures.method("fifo replace").key == "fifo"
    with pytest.raises(InputError, match="lorra"):
        figures.method("lorra")


def test_template_is_the_default_and_large_enough_for_a_lecture_hall():
    layout = pio.templates[pio.templates.default].layout
    assert pio.templates.default == "pllm"
    sizes = [layout.font.size, layout.xaxis.tickfont.size, layout.yaxis.tickfont.size, layout.xaxis.title.font.size,
             layout.legend.font.size, layout.annotationdefaults.font.size, layout.title.font.size]  # fmt: skip
    assert min(sizes) >= 14
    assert layout.paper_bgcolor == layout.plot_bgcolor == "#ffffff"  # a white card in every theme


def test_series_carries_look_label_and_interval():
    fig = figures.new_figure(x="step")
    figures.add_series(fig, "mezo", [1, 2], [0.5, 0.6], low=[0.4, 0.5], high=[0.6, 0.9], interval="bars")
    (trace,) = fig.data
    assert trace.line.color == figures.METHODS["mezo"].colour and trace.line.dash == "dot"
    assert list(trace.error_y.array) == pytest.approx([0.1, 0.3])
    assert list(trace.error_y.arrayminus) == pytest.approx([0.1, 0.1])
    assert [a.text for a in fig.layout.annotations] == ["MeZO"]
    figures.add_series(fig, "lora", [1, 2], [0.5, 0.6], low=[0.4, 0.5], high=[0.6, 0.9])
    band = fig.data[1]
    assert list(band.x) == [1, 2, 2, 1] and list(band.y) == [0.6, 0.9, 0.5, 0.4]


@pytest.mark.parametrize(
    ("y", "low", "high"),
    [([1.0], [2.0], [3.0]), ([1.0], [0.0], [0.5]), ([1.0], [0.0, 0.0], [2.0]), ([1.0], [0.0], None), ([], None, None)],
)
def test_wrong_intervals_are_refused(y, low, high):
    with pytest.raises(InputError):
        figures.add_series(figures.new_figure(), "lora", [1] * len(y), y, low=low, high=high)


def test_estimates_are_drawn_with_interval_and_numbers():
    fig = figures.add_estimates(figures.new_figure(), {"base": Estimate(4.5, 4.25, 5.0), "lora": Estimate.exact(4.0)})
    assert [t.x[0] for t in fig.data] == [4.5, 4.0]
    assert fig.data[0].error_x.array[0] == 0.5 and fig.data[0].error_x.arrayminus[0] == 0.25
    assert [a.text for a in fig.layout.annotations] == ["4.5 [4.25, 5]", "4"]
    assert [t.y[0] for t in fig.data] == ["Base model", "LoRA"]
    with pytest.raises(InputError):
        figures.add_estimates(figures.new_figure(), {})


def test_estimates_take_any_label():
    fig = figures.add_estimates(figures.new_figure(), {"one by one": Estimate.exact(1.0), "<b>": Estimate.exact(2.0)})
    assert [t.y[0] for t in fig.data] == ["one by one", "&lt;b&gt;"]
    assert {t.marker.color for t in fig.data} == {figures.PALETTE["blue"]}


def test_titles_and_labels_stay_text():
    fig = figures.new_figure(title="<b>x", x="a<i>", y="&")
    figures.add_series(fig, "lora", [1], [1], label="<a href='x'>")
    texts = [fig.layout.title.text, fig.layout.xaxis.title.text, fig.layout.annotations[0].text]
    assert all("<" not in text for text in texts)


@pytest.fixture
def published(monkeypatch: pytest.MonkeyPatch) -> list[dict]:
    shell = InteractiveShell.instance()
    pub = CapturingDisplayPublisher(parent=shell)
    monkeypatch.setattr(shell, "display_pub", pub)
    monkeypatch.setattr(InteractiveShell, "initialized", classmethod(lambda cls: True))
    return pub.outputs


def test_show_publishes_figure_alt_and_description(published: list[dict]):
    fig = figures.new_figure().add_scatter(x=np.arange(3.0), y=[1, 2, 3])
    figures.show(fig, alt=" Rises\n from 1 to 3 <script>. ", caption="It <em>rises</em>.")
    figure, text = published
    mime = "application/vnd.plotly.v1+json"
    assert figure["metadata"] == {mime: {"alt": "Rises from 1 to 3 <script>."}, "alt": "Rises from 1 to 3 <script>."}
    assert figure["data"][mime]["data"][0]["y"] == [1, 2, 3]
    assert "Rises from 1 to 3" in figure["data"]["text/plain"]
    html = text["data"]["text/html"]
    assert "<details" in html and "Rises from 1 to 3 &lt;script&gt;." in html and "It &lt;em&gt;rises" in html


@pytest.mark.parametrize("alt", ["", "  \n "])
def test_show_refuses_a_figure_without_description(alt: str, published: list[dict]):
    with pytest.raises(InputError, match="alt"):
        figures.show(figures.new_figure(), alt=alt)
    assert not published


def test_show_refuses_live_figures(published: list[dict]):
    with pytest.raises(InputError, match="FigureWidget"):
        figures.show(go.FigureWidget(), alt="something")
    assert not published
