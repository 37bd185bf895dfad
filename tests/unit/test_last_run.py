"""The line at the top of a notebook comes from recorded results."""

import json

import pytest

from pllm_helpers.batch import last_run
from pllm_helpers.runtime import InputError


def test_last_run(tmp_path):
    path = tmp_path / "r.json"
    run = {"threads": 2, "machine": {"processor": "Some <CPU>"}}
    path.write_text(json.dumps({"run": run, "notebooks": [{"name": "00", "seconds": 12.4, "peak_rss_mb": 811.2}]}))
    assert "12 s" in last_run("00", path) and "811 MB" in last_run("00", path)
    assert "&lt;CPU&gt;" in last_run("00", path)._repr_html_()
    assert "not hold 05" in last_run("05", path)
    assert "recorded yet" in last_run("00", tmp_path / "none.json")
    path.write_text("{}")
    with pytest.raises(InputError, match="make results"):
        last_run("00", path)
