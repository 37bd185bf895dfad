"""Parameters cells: what is read, what is accepted, what never reaches the code."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pllm_helpers.batch.parameters import Text, read_parameters, unread_parameters
from pllm_helpers.runtime import InputError

SOURCE = """\
# what this run works on
seed: int = 0  # 0..1000: random seed
rate: float = 1  # 1e-5..1.0: learning rate
user: str | None = None  # any: a chitchat user, none for the default
reading: str = "norm"  # norm|spectral|histogram: reading of EOE's p: see below
sizes: list[int] = [8, 16]  # 1..64: buffer sizes
names: list[str] = ["a"]  # any: names
fast: bool = True  # any: skip # the slow part
limit: int | None = 5  # 1..: at most so many
k: int = 2  # 1|2|4: a choice of numbers
"""


@pytest.fixture(scope="module")
def parameters():
    return read_parameters(SOURCE)


def test_every_line_is_read(parameters):
    assert list(parameters) == ["seed", "rate", "user", "reading", "sizes", "names", "fast", "limit", "k"]
    rate, reading, limit = parameters["rate"], parameters["reading"], parameters["limit"]
    assert (rate.default, type(rate.default), rate.low, rate.high) == (1.0, float, 1e-5, 1.0)
    assert (reading.choices, reading.help) == (("norm", "spectral", "histogram"), "reading of EOE's p: see below")
    assert (limit.low, limit.high, limit.optional, limit.type) == (1, None, True, "int | None")
    assert parameters["fast"].help == "skip # the slow part"


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("seed", " 12 ", 12),
        ("rate", "1e-3", 1e-3),
        ("user", "none", None),
        ("user", "ab=c", "ab=c"),
        ("user", " spaced ", " spaced "),
        ("reading", "spectral", "spectral"),
        ("sizes", "8,16, 32", [8, 16, 32]),
        ("sizes", "[4]", [4]),
        ("names", "['x, y', 'z']", ["x, y", "z"]),
        ("names", "x,y", ["x", "y"]),
        ("names", "[x, y]", ["x", "y"]),
        ("fast", "FALSE", False),
        ("limit", "null", None),
        ("k", "4", 4),
    ],
)
def test_text_is_read_as_the_type(parameters, name, text, value):
    read = parameters[name].check(Text(text))
    assert read == value and type(read) is type(value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("seed", Text("eight")),
        ("seed", Text("1.5")),
        ("seed", Text("")),
        ("seed", Text("1001")),
        ("seed", "8"),
        ("seed", True),
        ("seed", 1.0),
        ("seed", None),
        ("seed", -1),
        ("rate", Text("nan")),
        ("rate", float("inf")),
        ("rate", True),
        ("rate", "1e-3"),
        ("reading", Text("nrom")),
        ("sizes", Text("8,65")),
        ("sizes", Text("")),
        ("sizes", []),
        ("sizes", 8),
        ("sizes", [True]),
        ("sizes", Text("[1, 'x']")),
        ("fast", Text("1")),
        ("fast", 1),
        ("k", 3),
        ("limit", 0),
    ],
)
def test_wrong_values_are_refused_by_name(parameters, name, value):
    with pytest.raises(InputError, match=f"parameter {name}: expected"):
        parameters[name].check(value)


def test_refusals_say_what_to_write(parameters):
    with pytest.raises(InputError, match=r"write 0\.001"):
        parameters["rate"].check("1e-3")
    with pytest.raises(InputError, match=r"one of norm, spectral, histogram .*did you mean norm\?"):
        parameters["reading"].check(Text("nrm"))
    with pytest.raises(InputError, match=r"nb: parameter seed: expected a whole number from 0 to 1000 \(int\)"):
        parameters["seed"].check(Text("x"), "nb")


@given(st.integers(-2000, 2000))
def test_a_range_takes_its_ends_and_nothing_beyond(value):
    parameter = read_parameters(SOURCE)["seed"]
    if 0 <= value <= 1000:
        assert parameter.check(value) == parameter.check(Text(str(value))) == value
    else:
        for given_value in (value, Text(str(value))):
            with pytest.raises(InputError):
                parameter.check(given_value)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("n = 3  # any: untyped", "one typed parameter"),
        ("n: int  # any: no default", "one typed parameter"),
        ("n: int = 3", "RANGE: help"),
        ("n: int = 3  # just words", "RANGE: help"),
        ("n: int = 3  # 1..5:", "RANGE: help"),
        ("n: int = 3  # 5..1: backwards", "a range like"),
        ("n: int = 3  # ..: open", "a range like"),
        ("n: str = 'a'  # 1..5: no numbers", "a range like"),
        ("n: int = 3  # a|b: words", "a range like"),
        ("n: int = 3  # three: one choice", "a range like"),
        ("n: dict = {}  # any: type", "expected int, float"),
        ("n: int | str = 1  # any: two types", "expected int, float"),
        ("n: list[list[int]] = [[1]]  # any: nested", "expected int, float"),
        ("n: int = 2 * 3  # any: derived", "plain value"),
        ("n: int = 1  # any: one\nn: int = 2  # any: two", "each name once"),
        ("import os", "one typed parameter"),
        ("n: int = (", "expected Python"),
    ],
)
def test_lines_of_another_form_are_refused(line, expected):
    with pytest.raises(InputError, match="line .* of the parameters cell") as caught:
        read_parameters(line, "nb")
    assert expected in str(caught.value)


@pytest.mark.parametrize("default", ["9", "True", "'3'", "2.0"])
def test_a_default_must_obey_its_own_line(default):
    with pytest.raises(InputError, match="nb: parameter n: expected a whole number from 1 to 5"):
        read_parameters(f"n: int = {default}  # 1..5: rows", "nb")


@pytest.mark.parametrize(
    ("cells", "read"),
    [
        (["print(n)"], True),
        (["n"], True),
        (["f'{n}'"], True),
        (["def f():\n    return n"], True),
        (["[x for x in range(3) if x < n]"], True),
        (["m = [n for _ in range(2)]"], True),
        (["m = {k: n for k in 'ab'}"], True),
        (["m = {x for x in range(n)}"], True),
        (["async def f():\n    return n"], True),
        (["import numpy, os.path\nfrom os import sep\nnumpy.zeros(n)"], True),
        (["n += 1"], True),
        (["n = n + 1"], True),
        (["%time f(n)\nprint(n)"], True),
        (["%%time\nprint(n)"], True),
        (["class A:\n    size = n"], True),
        (["f = lambda x: x + n"], True),
        (["with open(n) as f: pass"], True),
        (["for n in range(n): pass"], True),
        ([], False),
        (["m = 1"], False),
        (["n = 8", "print(n)"], False),
        (["for n in range(3): print(n)"], False),
        (["def f(n):\n    return n"], False),
        (["[n for n in range(3)]"], False),
        (["obj.n"], False),
        (["f(n=3)"], False),
        (["'n'  # n"], False),
        (["%load_ext n"], False),
        (["import numpy as n", "n.zeros(2)"], False),
        (["n: int = 4", "print(n)"], False),
        (["x = 1", "def f():\n    n = 2\n    return n"], False),
    ],
)
def test_a_parameter_must_reach_the_code(cells, read):
    assert unread_parameters(["n"], cells) == ([] if read else ["n"])
