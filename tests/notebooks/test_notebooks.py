"""Every notebook of the series: its form, one run of all of them without network, what the run left.

The run is made once and shared: it is the test that the notebooks execute, that their deterministic
claims hold, and that nothing reaches off this machine.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import nbformat
import pytest

from pllm_helpers.batch import run_series
from pllm_helpers.batch.parameters import read_parameters, unread_parameters
from pllm_helpers.batch.report import NO_ALT, PLOTLY, WIDGET
from pllm_helpers.batch.run import RunReport
from pllm_helpers.batch.series import PROFILES, load_profiles, plan, tagged

FOLDER = Path(__file__).resolve().parents[2] / "notebooks"
PATHS = sorted(FOLDER.glob("*.ipynb"))
NAMES = [path.stem for path in PATHS]
MAX_LINES = 40
MAX_MEMORY_MB = 4000
KNOWN_TAGS = {"parameters", "setup", "widget", "exercise", "solution", "check", "hide-input", "raises-exception"}

pytestmark = pytest.mark.timeout(1800)
each = pytest.mark.parametrize("name", NAMES)


def read(name: str) -> nbformat.NotebookNode:
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


def code_cells(name: str) -> list[nbformat.NotebookNode]:
    return [cell for cell in read(name).cells if cell.cell_type == "code"]


@pytest.fixture(scope="session")
def series(tmp_path_factory: pytest.TempPathFactory) -> RunReport:
    """All notebooks, quick profile, sockets off this machine refused."""
    return run_series(out=tmp_path_factory.mktemp("series") / "run", network=False, quiet=True)


# ------------------------------------------------------------------ form


def test_the_series_is_numbered_without_gaps():
    assert [int(name[:2]) for name in NAMES] == list(range(len(NAMES))) and NAMES
    assert all(re.fullmatch(r"\d\d_[a-z0-9_]+", name) for name in NAMES)


def test_profiles_cover_every_notebook_with_valid_values():
    assert sorted(load_profiles(FOLDER, NAMES)) == NAMES
    for profile in PROFILES:
        assert [job.name for job in plan(FOLDER, profile=profile)] == NAMES


@each
def test_notebooks_are_stripped(name):
    text = (FOLDER / f"{name}.ipynb").read_text(encoding="utf-8")
    notebook = read(name)
    nbformat.validate(notebook)
    assert "widgets" not in notebook.metadata and "papermill" not in notebook.metadata
    assert all(cell.outputs == [] and cell.execution_count is None for cell in code_cells(name))
    assert notebook.metadata.get("kernelspec", {}).get("name", "python3") == "python3"
    assert not re.search(r"/(home|root|Users)/", text)


@each
def test_one_parameters_cell_and_every_parameter_is_read(name):
    cells = code_cells(name)
    places = [i for i, cell in enumerate(cells) if "parameters" in cell.metadata.get("tags", [])]
    assert len(places) == 1
    declared = read_parameters(cells[places[0]].source, name)
    assert declared, "a notebook has at least one parameter"
    assert unread_parameters(declared, [cell.source for cell in cells[places[0] + 1 :]]) == []


@each
def test_cells_are_short_and_tags_are_known(name):
    for number, cell in enumerate(read(name).cells, 1):
        tags = set(cell.metadata.get("tags", []))
        assert tags <= KNOWN_TAGS, f"cell {number}: unknown tags {tags - KNOWN_TAGS}"
        if cell.cell_type == "code":
            assert len(cell.source.splitlines()) <= MAX_LINES, f"cell {number} is longer than {MAX_LINES} lines"
            assert cell.source.strip(), f"cell {number} is empty"


@each
def test_setup_and_widget_cells_are_there(name):
    notebook = read(name)
    assert tagged(notebook, "setup") and len(tagged(notebook, "widget")) == 1


# ------------------------------------------------------------------ the run


def test_the_run_succeeds(series):
    assert series.results["run"]["errors"] == {}
    assert series.exit_code == 0
    assert series.results["run"]["network_attempts"] == []


def test_results_json_follows_the_contract(series):
    on_disk = json.loads((series.out / "results.json").read_text(encoding="utf-8"))
    assert on_disk == series.results
    assert set(on_disk) == {"run", "notebooks", "results", "claims"}
    assert {"versions", "seed", "profile", "machine"} <= set(on_disk["run"])
    assert [row["name"] for row in on_disk["notebooks"]] == NAMES
    for row in on_disk["notebooks"]:
        assert set(row) == {"name", "status", "seconds", "peak_rss_mb"}
    for row in on_disk["results"]:
        assert set(row) == {"notebook", "name", "value", "low", "high", "unit", "n", "seeds"}
        assert math.isfinite(row["value"]) and row["notebook"] in NAMES and row["n"] >= 1
    for row in on_disk["claims"]:
        assert set(row) == {"notebook", "claim", "kind", "verdict", "value", "low", "high", "paper"}
        assert row["verdict"] in ("holds", "fails", "inconclusive")
        assert row["kind"] == "statistical" or row["verdict"] == "holds"


@each
def test_every_notebook_states_claims(series, name):
    assert [c for c in series.results["claims"] if c["notebook"] == name]


@each
def test_memory_stays_within_the_promise(series, name):
    peak = next(row["peak_rss_mb"] for row in series.results["notebooks"] if row["name"] == name)
    assert 0 < peak < MAX_MEMORY_MB


@each
def test_figures_have_alt_text_and_widgets_a_static_text(series, name):
    notebook = nbformat.read(series.out / "notebooks" / f"{name}.ipynb", as_version=4)
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            data, metadata = output.get("data", {}), output.get("metadata", {})
            if PLOTLY in data and WIDGET not in data:
                alt = metadata.get(PLOTLY, {}).get("alt") or metadata.get("alt") or ""
                assert len(alt.split()) >= 8, f"alt text too short to stand for the figure: {alt!r}"
        if "widget" in cell.metadata.get("tags", []):
            outputs = [o.get("data", {}) for o in cell.outputs]
            assert any(WIDGET in data for data in outputs), "the widget cell shows no widget"
            left = [data["text/html"] for data in outputs if data.get("text/html", "").strip()]
            assert left, "the widget cell leaves nothing in a static page"


# ------------------------------------------------------------------ the pages


class Loads(HTMLParser):
    """What a browser would fetch for a page."""

    def __init__(self, page: str):
        super().__init__()
        self.found: list[tuple[str, str]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            fetched = name in ("src", "srcset", "poster", "data") or (tag == "link" and name == "href")
            if fetched and value and not value.startswith("data:"):
                self.found.append((tag, value))


@each
def test_pages_are_self_contained(series, name):
    page = (series.out / "html" / f"{name}.html").read_text(encoding="utf-8")
    assert Loads(page).found == []
    assert not re.search(r"url\(\s*['\"]?https?:|@import", page.partition("<body>")[0])
    assert 'class="tex"' not in page, "a formula could not be converted"
    assert f'aria-label="{NO_ALT}"' not in page and f'alt="{NO_ALT}"' not in page


@pytest.mark.browser
def test_pages_open_offline_with_their_figures(series, chromium):
    for path in [series.out / "index.html", *sorted((series.out / "html").iterdir())]:
        context = chromium.new_context(offline=True)
        page = context.new_page()
        requests, problems = [], []
        page.on("request", lambda r, seen=requests: seen.append(r.url))
        page.on("pageerror", lambda e, seen=problems: seen.append(str(e)))
        page.on("console", lambda m, seen=problems: seen.append(m.text))
        page.goto(path.as_uri())
        figures = page.locator("figure.plotly")
        for index in range(figures.count()):
            figures.nth(index).locator("svg.main-svg").first.wait_for(state="attached")
        assert requests == [path.as_uri()] and problems == []
        context.close()


# ------------------------------------------------------------------ the widget alone


def test_widgets_need_only_parameters_and_setup(tmp_path):
    short = tmp_path / "notebooks"
    short.mkdir()
    shutil.copy(FOLDER / "profiles.yaml", short)
    for name in NAMES:
        notebook = read(name)
        wanted = {"parameters", "setup", "widget"}
        notebook.cells = [c for c in notebook.cells if wanted & set(c.metadata.get("tags", []))]
        nbformat.write(notebook, short / f"{name}.ipynb")
    report = run_series(folder=short, out=tmp_path / "run", network=False, quiet=True)
    assert report.results["run"]["errors"] == {} and report.exit_code == 0
    for name in NAMES:
        notebook = nbformat.read(tmp_path / "run" / "notebooks" / f"{name}.ipynb", as_version=4)
        shown = [o for cell in tagged(notebook, "widget") for o in cell.outputs if WIDGET in o.get("data", {})]
        assert shown, f"{name}: the widget cell shows no widget"
