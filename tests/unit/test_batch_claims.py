"""claim() and record(): verdicts, text outside Jupyter, what a run reads back."""

import json
import math

import pytest

from pllm_helpers.batch import ClaimError, claim, record
from pllm_helpers.batch.claims import CLAIM_MIME, RESULT_MIME, claim_html, collect, result_html
from pllm_helpers.evaluation import Claim, Estimate, check_claim
from pllm_helpers.runtime import InputError


@pytest.mark.parametrize(
    ("interval", "verdict"), [((1.0, 2.0), "holds"), ((0.0, 0.9), "fails"), ((0.5, 1.5), "inconclusive")]
)
def test_statistical_claim_says_what_came_out_and_never_raises(interval, verdict, capsys):
    low, high = interval
    made = claim("it grows", Estimate((low + high) / 2, low, high, n=30), above=1.0, paper="says it grows")
    text = capsys.readouterr().out
    assert isinstance(made, Claim) and made.verdict == verdict
    for part in (f"Claim {verdict}: it grows", "at least 1", "says it grows", "n = 30"):
        assert part in text


def test_deterministic_claim_that_fails_raises_after_it_was_shown(capsys):
    with pytest.raises(ClaimError, match="two is one: claimed at most 1, got 2"):
        claim("two is one", 2, below=1, kind="deterministic")
    assert "Claim fails: two is one" in capsys.readouterr().out


def test_deterministic_claim_that_holds_returns_the_claim():
    assert claim("two is two", 2, above=2, below=2, kind="deterministic").verdict == "holds"


def test_inconclusive_is_not_enough_for_a_deterministic_claim():
    with pytest.raises(ClaimError, match="inconclusive"):
        claim("positive", Estimate(0.1, -0.1, 0.3), above=0, kind="deterministic")


def test_a_ready_claim_is_taken_as_it_is(capsys):
    ready = check_claim("ready", 3.0, above=1.0)
    assert claim(ready).text == "ready"
    assert "Claim holds: ready" in capsys.readouterr().out
    with pytest.raises(InputError, match="ready Claim alone"):
        claim(ready, above=2)


@pytest.mark.parametrize(
    ("arguments", "options", "expected"),
    [
        (("it", 1.0), {}, "expected a bound"),
        (("it", 1.0), {"above": 0, "kind": "certain"}, "kind"),
        (("  ", 1.0), {"above": 0}, "blank"),
        (("it",), {"above": 0}, "expected an Estimate or a number"),
        (("it", math.nan), {"above": 0}, "NaN"),
    ],
)
def test_bad_claims_are_refused(arguments, options, expected):
    with pytest.raises(InputError, match=expected):
        claim(*arguments, **options)


def test_record_takes_numbers_and_estimates(capsys):
    plain = record("buffer/size", 32, unit="sets")
    assert (plain.value, plain.low, plain.high, plain.unit) == (32.0, 32.0, 32.0, "sets")
    both = record("nll", Estimate(2.0, 1.5, 2.5, n=10, seeds=(0, 1), unit="nats"), n=12)
    assert (both.n, both.seeds, both.unit) == (12, (0, 1), "nats")
    assert capsys.readouterr().out.splitlines() == ["buffer/size = 32 sets", "nll = 2 [1.5, 2.5] nats (n = 12)"]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_record_refuses_what_is_no_number(value):
    with pytest.raises(InputError):
        record("x", value)
    with pytest.raises(InputError, match="blank"):
        record(" ", 1.0)


def _cell(*bundles):
    return {"outputs": [{"output_type": "display_data", "data": b} for b in bundles]}


def test_collect_keeps_all_claims_and_the_last_result_of_a_name():
    row = {"name": "a", "value": 1.0, "low": 1.0, "high": 1.0, "unit": "", "n": 1, "seeds": []}
    cells = [
        {"cell_type": "markdown"},
        _cell({RESULT_MIME: row}, {CLAIM_MIME: {"claim": "c"}}),
        _cell({CLAIM_MIME: {"claim": "c"}}, {RESULT_MIME: {**row, "value": 2.0}}, {"text/plain": "x"}),
    ]
    claims, results = collect("nb", cells)
    assert claims == [{"notebook": "nb", "claim": "c"}] * 2
    assert results == [{"notebook": "nb", **row, "value": 2.0}]


def test_html_is_escaped_and_verdicts_do_not_need_colour():
    rows = [
        {"claim": "<b>x</b>", "verdict": v, "kind": "statistical", "bound": "at least 1", "paper": "<i>", "value": 1.0,
         "low": None, "high": 2.0, "n": 3, "unit": "<u>"}
        for v in ("holds", "fails", "inconclusive")
    ]  # fmt: skip
    for row in rows:
        html = claim_html(row)
        assert "&lt;b&gt;x&lt;/b&gt;" in html and "&lt;i&gt;" in html and "&lt;u&gt;" in html
        assert f"Claim {row['verdict']}" in html and "[−∞, 2]" in html
    html = result_html({"name": "<b>", "value": 1.0, "low": 1.0, "high": 1.0, "unit": "", "n": 5, "seeds": [1, 2]})
    assert "&lt;b&gt;" in html and "n = 5; seeds 1, 2" in html


def test_in_jupyter_the_display_carries_a_bundle_that_is_strict_json(monkeypatch):
    from IPython.core import displaypub
    from IPython.core.interactiveshell import InteractiveShell

    InteractiveShell.clear_instance()
    shell = InteractiveShell.instance()
    sent = []
    try:
        monkeypatch.setattr(displaypub.DisplayPublisher, "publish", lambda self, data, **kw: sent.append(data))
        shown = claim("open end", Estimate(2.0, 1.0, math.inf, n=4), above=1)
        record("n", 3)
        # as the last line of a cell neither is echoed
        assert shell.display_formatter.format(shown) == ({}, {})
    finally:
        InteractiveShell.clear_instance()
    assert [set(data) for data in sent] == [
        {"text/plain", "text/html", CLAIM_MIME},
        {"text/plain", "text/html", RESULT_MIME},
    ]
    payload = json.loads(json.dumps(sent[0][CLAIM_MIME], allow_nan=False))
    assert (payload["verdict"], payload["low"], payload["high"], payload["bound"]) == ("holds", 1.0, None, "at least 1")
