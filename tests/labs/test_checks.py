"""Right answers pass, an empty one is told so, and each typical error is named."""

import runpy
from pathlib import Path

import pytest

from pllm_helpers import labs

CASES = [runpy.run_path(str(path)) for path in sorted(Path(__file__).parent.glob("cases_*.py"))]  # one per notebook
REFERENCE = {check: right for case in CASES for check, right in case["REFERENCE"].items()}
ALSO_RIGHT = [pair for case in CASES for pair in case.get("ALSO_RIGHT", [])]
WRONG = [row for case in CASES for row in case["WRONG"]]


def unwritten(*_):
    raise NotImplementedError


def test_every_check_is_here():
    assert set(REFERENCE) == {name for name in labs.__all__ if name.startswith("check_")}
    assert {check for check, _, _ in WRONG} == set(REFERENCE)


@pytest.mark.parametrize("check", REFERENCE)
def test_reference_passes_and_empty_does_not(check, capsys):
    getattr(labs, check)(REFERENCE[check])
    assert "Passed" in capsys.readouterr().out
    with pytest.raises(labs.Mistake, match="not written yet"):
        getattr(labs, check)(unwritten)
    with pytest.raises(labs.Mistake, match="nothing"):
        getattr(labs, check)(lambda *_: None)


@pytest.mark.parametrize(("check", "right"), ALSO_RIGHT)
def test_other_right_answers_pass(check, right, capsys):
    getattr(labs, check)(right)
    assert "Passed" in capsys.readouterr().out


@pytest.mark.parametrize(("check", "wrong", "message"), WRONG)
def test_the_mistake_is_named(check, wrong, message):
    with pytest.raises(labs.Mistake, match=message):
        getattr(labs, check)(wrong)
