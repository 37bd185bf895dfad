"""Fixtures for all tests: nothing leaves this machine, toy notebooks, shared data where present."""

from __future__ import annotations

import os
import runpy
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[1]

# as in the notebooks: one process does not take all cores, hubs are not asked
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# a test that reaches for another machine fails, whatever library does it
sys.addaudithook(runpy.run_path(str(ROOT / "pllm_helpers/batch/guard/sitecustomize.py"))["refuse"])


@pytest.fixture(scope="session")
def root() -> Path:
    """The checkout."""
    return ROOT


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real test data that is not part of the project; the test is skipped where it is absent."""
    folder = Path(os.environ.get("PLLM_SHARED") or ROOT.parent / "shared") / "data"
    if not folder.is_dir():
        pytest.skip("the shared test data are absent (set PLLM_SHARED to their folder)")
    return folder


@pytest.fixture(scope="session")
def write_notebook() -> Callable[..., Path]:
    """``write_notebook(path, cells)`` with cells as ``"source"`` or ``(tag, "source")``; tag ``md``: text."""

    def write(path: Path, cells: Sequence[str | tuple[str, str]]) -> Path:
        notebook = nbformat.v4.new_notebook()
        for cell in cells:
            tag, source = cell if isinstance(cell, tuple) else ("", cell)
            if tag == "md":
                notebook.cells.append(nbformat.v4.new_markdown_cell(source))
            else:
                notebook.cells.append(nbformat.v4.new_code_cell(source, metadata={"tags": [tag]} if tag else {}))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(nbformat.writes(notebook), encoding="utf-8")
        return path

    return write


@pytest.fixture(scope="session")
def chromium():
    """One Chromium for the whole run (a second playwright beside the first would not start)."""
    from playwright.sync_api import sync_playwright

    from tests.chromium import CHROMIUM_FLAGS, find_chromium

    path = find_chromium()
    if path is None:
        pytest.skip("no Chromium or Chrome found: install one (Debian: apt-get install chromium) or set PLLM_CHROMIUM")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=CHROMIUM_FLAGS, headless=True)
        yield browser
        browser.close()
