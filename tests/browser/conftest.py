"""One JupyterLab and one Chromium for all browser tests of a run."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from .kit import Lab, find_chromium


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """See ``kit.py``: ``with lab.open("01_buffer_metrics") as nb: …``."""
    chromium = find_chromium()
    if chromium is None:
        pytest.skip("no Chromium or Chrome found: install one (Debian: apt-get install chromium) or set PLLM_CHROMIUM")
    with Lab(tmp_path_factory.mktemp("lab"), chromium) as running:
        yield running


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "tests/browser/" in item.path.as_posix():
            item.add_marker(pytest.mark.browser)
