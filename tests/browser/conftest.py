"""One JupyterLab and one Chromium for all browser tests of a run."""

from __future__ import annotations

from collections.abc import Generator, Iterator

import pytest
from playwright.sync_api import Browser

from .kit import Lab, LabPage


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory, chromium: Browser) -> Iterator[Lab]:
    """See ``kit.py``: ``with lab.open("01_buffer_metrics") as nb: …``."""
    with Lab(tmp_path_factory.mktemp("lab"), chromium) as running:
        yield running


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "tests/browser/" in item.path.as_posix():
            item.add_marker(pytest.mark.browser)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Keep a picture of the pages that are open when a test fails."""
    report = yield
    lab = getattr(item, "funcargs", {}).get("lab") or next(
        (p.lab for p in getattr(item, "funcargs", {}).values() if isinstance(p, LabPage)), None
    )
    if report.failed and lab is not None:
        for page in lab.pages:
            page.screenshot_of_failure(item.name)
    return report
