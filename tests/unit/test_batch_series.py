"""Choosing notebooks and checking profiles and parameters before anything runs."""

import pytest

from pllm_helpers.batch.parameters import Text
from pllm_helpers.batch.series import find_notebooks, load_profiles, notebooks_dir, parse_assignments, plan, select
from pllm_helpers.runtime import InputError

PARAMETERS = "seed: int = 0  # 0..99: random seed\nn: int = 4  # 1..50: rows\nrate: float = 0.1  # 0.0..1.0: rate"
PROFILES = """
00_first:
  title: "Start: here"
  minutes: 0.5
  timeout: 60
  quick: {n: 2}
  standard: {n: 10, rate: 0.5}
  full: {n: 50}
01_second:
  timeout: {quick: 10, standard: 20, full: 30}
  quick: {}
  standard: {}
  full: {}
"""


@pytest.fixture
def folder(tmp_path, write_notebook):
    write_notebook(tmp_path / "00_first.ipynb", [("md", "# First"), ("parameters", PARAMETERS), "print(seed, n, rate)"])
    write_notebook(
        tmp_path / "01_second.ipynb", [("md", "# Second, *really*"), ("parameters", PARAMETERS), "print(seed, rate)"]
    )
    (tmp_path / "profiles.yaml").write_text(PROFILES, encoding="utf-8")
    return tmp_path


def test_the_series_is_found(root):
    assert notebooks_dir() == root / "notebooks"


@pytest.mark.parametrize("word", ["1", "01", "001", "01_second", "01_second.ipynb"])
def test_notebooks_are_chosen_by_number_or_name(folder, word):
    assert [p.stem for p in select(find_notebooks(folder), [word, word])] == ["01_second"]


def test_without_a_choice_all_come_in_order(folder):
    paths = find_notebooks(folder)
    assert (
        [p.stem for p in select(paths, [])] == [p.stem for p in select(paths, ["1", "0"])] == ["00_first", "01_second"]
    )


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("7", "expected one of 00_first, 01_second"),
        ("01_secnd", "did you mean 01_second"),
        ("x/y.ipynb", "--notebooks"),
    ],
)
def test_unknown_notebooks_are_refused(folder, word, expected):
    with pytest.raises(InputError, match=expected):
        select(find_notebooks(folder), [word])


def test_folders_without_notebooks_are_refused(tmp_path):
    for wrong in (tmp_path, tmp_path / "absent"):
        with pytest.raises(InputError, match="notebooks: expected"):
            find_notebooks(wrong)


def test_profile_then_command_line_then_one_notebook(folder):
    jobs = plan(folder, profile="standard", parameters={"01_second:rate": Text("0.3"), "rate": 0.2, "0:n": Text("7")})
    assert [job.values for job in jobs] == [{"seed": 0, "n": 7, "rate": 0.2}, {"seed": 0, "n": 4, "rate": 0.3}]
    assert [dict(job.given) for job in jobs] == [{"n": 7, "rate": 0.2}, {"rate": 0.3}]
    assert [job.title for job in jobs] == ["Start: here", "Second, really"]
    assert [job.timeout for job in jobs] == [60.0, 20.0]
    assert [job.timeout for job in plan(folder, timeout=5)] == [5.0, 5.0]


@pytest.mark.parametrize(
    ("parameters", "expected"),
    [
        ({"sed": Text("1")}, r"parameter sed: expected one of n, rate, seed; got 'sed' \(did you mean seed\?\)"),
        ({"0:rnak": Text("1")}, "parameter rnak"),
        ({"7:n": Text("1")}, "notebook '7'"),
        (
            {"seed": Text("eight")},
            r"00_first: parameter seed: expected a whole number from 0 to 99 \(int\), got text 'eight'",
        ),
        ({"seed": True}, "expected a whole number .* got bool True"),
        ({"rate": Text("2")}, "parameter rate: expected a number from 0 to 1"),
        ({"1:n": Text("2")}, "01_second: parameter n: expected a parameter that the notebook reads"),
    ],
)
def test_bad_parameters_are_refused(folder, parameters, expected):
    with pytest.raises(InputError, match=expected):
        plan(folder, parameters=parameters)


def test_a_parameter_need_not_be_in_every_notebook(folder, write_notebook):
    (folder / "profiles.yaml").unlink()
    write_notebook(folder / "02_none.ipynb", ["1"])
    assert [dict(job.given) for job in plan(folder, parameters={"seed": 3})] == [{"seed": 3}, {"seed": 3}, {}]
    with pytest.raises(InputError, match="declares no parameters"):
        plan(folder, ["2"], parameters={"seed": 3})


def test_profiles_and_time_limits_are_known_ones(folder):
    with pytest.raises(InputError, match="quick, standard, full, got 'quik' .*did you mean quick"):
        plan(folder, profile="quik")
    for timeout in (0, -1.0, float("inf"), float("nan")):
        with pytest.raises(InputError, match="timeout"):
            plan(folder, timeout=timeout)


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("quick: {n: 2}", "quick: {m: 2}", "00_first, quick: expected parameters of the notebook, got 'm'"),
        ("quick: {n: 2}", "quick: {n: '2'}", "00_first, quick: parameter n: expected a whole number"),
        ("full: {n: 50}", "full: {n: 51}", "00_first, full: parameter n: expected a whole number from 1 to 50"),
        ("rate: 0.5", "rate: 1e-3", "write 0.001"),
        ("rate: 0.5", "rate: true", "parameter rate: expected a number"),
        ("full: {n: 50}", "", "expected profile full"),
        ("full: {n: 50}", "full: {n: 50}\n  fulll: {}", "got 'fulll' .*did you mean full"),
        ("full: {n: 50}", "full: [1]", "full: expected parameter: value"),
        ("minutes: 0.5", "minutes: -1", "minutes: expected a number above 0"),
        ("minutes: 0.5", "minutes: soon", "minutes: expected a number above 0"),
        ("timeout: 60", "timeout: 0", "timeout: expected seconds"),
        ("timeout: 60", "timeout: {quick: 1}", "timeout: expected seconds"),
        ('"Start: here"', "3", "title: expected text"),
        ("01_second:", "01_secnd:", "got '01_secnd' .*did you mean 01_second"),
        ("01_second:", "02_more: {quick: {}, standard: {}, full: {}}\n01_second:", "got '02_more'"),
        ("timeout: 60", "timeout: 60\n  timeout: 61", "'timeout' stands twice"),
        ("timeout: 60", "timeout: [60", "expected YAML"),
        (PROFILES, "- 1", "expected notebook names"),
        (PROFILES, "00_first: 1\n01_second: 1", "00_first: expected quick, standard, full, got int"),
    ],
)
def test_profiles_yaml_is_strict(folder, old, new, expected):
    assert old in PROFILES
    (folder / "profiles.yaml").write_text(PROFILES.replace(old, new, 1), encoding="utf-8")
    with pytest.raises(InputError, match=f"profiles.yaml.*{expected}"):
        plan(folder, ["1"] if "01_" in new else ["0"])


def test_profiles_are_optional(folder):
    path = folder / "profiles.yaml"
    path.write_text("01_second: {quick: {}, standard: {}, full: {n: 9}}", encoding="utf-8")
    assert [dict(job.given) for job in plan(folder, profile="full")] == [{}, {"n": 9}]
    path.write_text("# nothing yet", encoding="utf-8")
    assert load_profiles(folder, ["00_first", "01_second"]) == {}
    path.unlink()
    assert load_profiles(folder, ["00_first", "01_second"]) == {}
    assert [dict(job.given) for job in plan(folder, profile="full")] == [{}, {}]


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"cells": 3}', '{"nbformat": 4, "nbformat_minor": 5, "metadata": {}}']
)
def test_files_that_are_no_notebooks_are_refused(folder, content):
    (folder / "00_first.ipynb").write_text(content, encoding="utf-8")
    with pytest.raises(InputError, match="00_first.ipynb: expected a notebook"):
        plan(folder)


def test_two_parameters_cells_are_refused(folder, write_notebook):
    write_notebook(folder / "00_first.ipynb", [("parameters", PARAMETERS), ("parameters", PARAMETERS)])
    with pytest.raises(InputError, match="one cell tagged parameters, got 2"):
        plan(folder)


def test_assignments():
    assert parse_assignments(["a=1", "01:b=x=y", "größe=", "c= d"]) == {"a": "1", "01:b": "x=y", "größe": "", "c": " d"}
    for wrong in (["a"], ["=1"], ["1a=2"], ["a=1", "a=2"]):
        with pytest.raises(InputError, match="-p"):
            parse_assignments(wrong)
