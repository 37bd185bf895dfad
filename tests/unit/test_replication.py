"""What notebook 05 computes from cells: pairing, bounds for "everywhere" and "up to", and what is missing is said."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pllm_helpers.evaluation import Estimate, paired_difference
from pllm_helpers.experiments import replication
from pllm_helpers.experiments.policy_study import Study
from pllm_helpers.runtime import InputError

from .made_studies import made_study, save_made

FEW = ("quality", "random", "fifo", "kcenter", "eoe_only", "dss_only", "idd_only", "released_code", "base")
EFFECTS = {"quality": 0.03, "base": -0.05}
NAMES = ("policy_comparison", "learning_curve", "buffer_size_sweep", "synthesis_sweep")


@pytest.fixture(scope="module")
def study() -> Study:
    return made_study(effects=EFFECTS, policies=FEW)


@pytest.fixture(scope="module")
def studies() -> dict[str, Study]:
    return {n: made_study(n, effects=EFFECTS, slope=0.02, policies=FEW) for n in NAMES}


# ------------------------------------------------------------------ the paper's numbers


def test_every_paper_number_has_a_source_and_a_tag():
    table = replication.paper_numbers()
    assert set(table["tag"]) == set(replication.TAGS) and table["rouge1"].between(0.1, 0.4).all()
    assert set(table["data"]) == set(replication.PAPER_NAMES)
    counts = table.groupby("source").size().to_dict()
    assert counts == {"Fig. 2": 6 * 4 * 6, "Table 4": 6 * 4, "Fig. 3": 9, "Headline": 1}
    headline = replication.paper_numbers("Headline")["rouge1"].item()
    assert headline == pytest.approx(0.3736 / 0.271 - 1)
    figure = replication.paper_numbers("Fig. 2").set_index(["data", "policy", "sets"])["rouge1"]
    assert figure["alpaca", "quality", 800] == 0.299 and figure["meddialog", "kcenter", 4600] == 0.217
    assert figure["openorca", "fifo", 2400] == 0.223
    best = max(figure[d, "quality", 4600] / figure[d, p, 4600] for d in replication.PAPER_NAMES for p in ("fifo",))
    assert best > 1 + headline  # so the headline is not the largest ratio of the figure
    with pytest.raises(InputError, match="Table 3"):
        replication.paper_numbers("Table 3")


# ------------------------------------------------------------------ pairing


def test_pairs_are_paired_by_seed_and_oriented(study: Study):
    found = replication.pairs(study, "quality", "random", "nll")
    assert list(found) == ["person:0", "alpaca"]
    a, b = found["person:0"]
    assert len(a) == len(b) == 5 and len(a[0]) == 40
    assert -a[3] == pytest.approx(study.results("person:0", "quality")[3].rows["nll"])
    assert np.mean(a) > np.mean(b)  # lower NLL is better, so the sign is turned
    plain = replication.pairs(study, "quality", "random", "nll", oriented=False)["person:0"][0]
    assert plain[0] == pytest.approx(-a[0])


def test_only_common_seeds_are_compared():
    whole = made_study(policies=("quality", "random"), streams=("person:0",))
    part = replace(whole, cells=tuple(c for c in whole.cells if (c.cell.policy, c.cell.seed) != ("random", 2)))
    a, b = replication.pairs(part, "quality", "random")["person:0"]
    assert len(a) == len(b) == 4
    rows = [c.rows["rouge1"] for c in part.results("person:0", "quality") if c.cell.seed != 2]
    assert np.array(a) == pytest.approx(np.array(rows))


def test_what_is_not_there_is_said(study: Study):
    with pytest.raises(replication.NotMeasured, match="facility"):
        replication.pairs(study, "quality", "facility")
    with pytest.raises(replication.NotMeasured, match="BLEU"):  # rows of BLEU are not kept
        replication.pairs(study, "quality", "random", "bleu")
    with pytest.raises(InputError, match="meteor"):
        replication.pairs(study, "quality", "random", "meteor")
    with pytest.raises(replication.NotMeasured, match="along"):
        replication.curve(study, "person:0", "quality")


# ------------------------------------------------------------------ intervals


def test_pooling_keeps_the_mean_and_narrows_like_independent_streams():
    rng = np.random.default_rng(0)
    pairs = {s: (rng.normal(0.1, 0.2, (5, 60)), rng.normal(0, 0.2, (5, 60))) for s in "abcd"}
    parts = [paired_difference(a, b) for a, b in pairs.values()]
    e = replication.pooled_difference(pairs)
    assert e.value == pytest.approx(np.mean([p.value for p in parts]))
    assert e.high - e.low == pytest.approx(np.mean([p.high - p.low for p in parts]) / 2, rel=0.25)
    assert (e.n, len(e.seeds)) == (4 * 300, 5)


def test_relative_improvement_is_a_ratio_of_means_and_is_paired():
    rng = np.random.default_rng(1)
    b = rng.uniform(0.1, 0.5, (5, 60))
    e = replication.relative_improvements({"a": (1.3 * b, b)})["a"]
    assert [e.value, e.low, e.high] == pytest.approx([0.3] * 3)  # the same factor everywhere: nothing is left to chance
    a = 1.3 * b + rng.normal(0, 0.02, b.shape)
    paired = replication.relative_improvements({"a": (a, b)})["a"]
    shuffled = replication.relative_improvements({"a": (a, rng.permuted(b, axis=1))})["a"]
    assert paired.high - paired.low < (shuffled.high - shuffled.low) / 3
    draws = rng.integers(0, 60, (500, 5, 60))
    ratio = [np.take_along_axis(a, i, 1).mean() / np.take_along_axis(b, i, 1).mean() - 1 for i in draws]
    assert (paired.high - paired.low) == pytest.approx(3.92 * np.std(ratio), rel=0.35)
    with pytest.raises(InputError, match="positive"):
        replication.relative_improvements({"a": (a, -b)})


def test_up_to_is_biased_and_its_bounds_know_it():
    """Without any effect the largest of 18 improvements is above 0 nearly always; the bounds still cover 0."""
    rng = np.random.default_rng(2)
    above = covered = beyond = 0
    for _ in range(20):
        pairs = {}
        for s in range(6):
            policy = rng.uniform(0.1, 0.3, (3, 30))
            for other in "xyz":
                pairs[f"{s} against {other}"] = (policy, policy + rng.normal(0, 0.05, policy.shape))
        where, e = replication.largest_improvement(pairs)
        assert where in pairs and e.low <= e.value <= e.high
        above += e.value > 0
        covered += e.low <= 0 <= e.high
        beyond += replication.beyond_chance_claim(pairs).verdict == "holds"
    assert above >= 19 and covered >= 18 and beyond <= 3


def test_the_null_of_the_largest_grows_with_the_number_of_comparisons():
    rng = np.random.default_rng(3)
    b = rng.uniform(0.1, 0.3, (3, 30))
    pair = (b + rng.normal(0.02, 0.05, b.shape), b)
    one = replication.null_largest({"0": pair})
    many = replication.null_largest({str(k): pair for k in range(18)})
    assert one.shape == many.shape == (10_000,)
    e = replication.relative_improvements({"0": pair})["0"]
    spread = (e.high - e.low) / 3.92
    assert abs(one.mean()) < 0.05 * spread and one.std() == pytest.approx(spread, rel=0.03)
    assert many.mean() == pytest.approx(1.82 * spread, rel=0.03)  # the mean of the largest of 18 normal numbers


def test_everywhere_needs_every_stream():
    rng = np.random.default_rng(4)
    b = rng.uniform(0.1, 0.3, (5, 40))
    wins = {s: (b + 0.05 + rng.normal(0, 0.01, b.shape), b) for s in "abc"}
    assert replication.beats_everywhere_claim("A", "B", wins).verdict == "holds"
    loses = wins | {"d": (b - 0.05 + rng.normal(0, 0.01, b.shape), b)}
    failed = replication.beats_everywhere_claim("A", "B", loses)
    assert failed.verdict == "fails" and "smallest lead on d" in failed.text
    even = wins | {"d": (b + rng.normal(0, 0.01, b.shape), b)}
    assert replication.beats_everywhere_claim("A", "B", even).verdict == "inconclusive"


def test_holm_corrects_for_the_number_of_rows(study: Study):
    table = replication.comparisons(study, "random")
    assert len(table) == 2 * (len(FEW) - 2) and not {"random", "base"} & set(table["policy"])
    ordered = table.sort_values("p").reset_index()
    expected = np.maximum.accumulate(ordered["p"] * np.arange(len(ordered), 0, -1)).clip(upper=1)
    assert ordered["p_holm"].to_numpy() == pytest.approx(expected.to_numpy())
    found = table.set_index(["stream", "policy"])
    assert found.loc["alpaca", "quality"]["p_holm"] < 0.01 < found.loc["alpaca", "fifo"]["p"]
    row = found.loc["person:0", "quality"]
    e = study.estimate("rouge1", "person:0", "quality", against="random")
    assert (row["low"], row["high"], row["n"], row["seeds"]) == (e.low, e.high, 100, 5)
    assert replication.comparisons(study, "facility").empty


# ------------------------------------------------------------------ cells


def test_policies_count_once_and_streams_are_taken_out(study: Study):
    table = replication.cell_table(study)
    assert len(table) == 2 * len(FEW) and set(table["seeds"]) == {5}
    one = table[(table["stream"] == "alpaca") & (table["policy"] == "quality")].iloc[0]
    assert one["rouge1"] == pytest.approx(np.mean([c.means["rouge1"] for c in study.results("alpaca", "quality")]))
    inner = replication.centred(table, ["rouge1", "buffer_words"])
    assert "base" not in set(inner["policy"])
    assert inner.groupby("stream")["rouge1"].mean().abs().max() < 1e-12
    with pytest.raises(replication.NotMeasured, match="buffer_age"):
        replication.centred(table, ["rouge1", "buffer_age"])
    with pytest.raises(replication.NotMeasured, match="four cells"):
        replication.centred(table[table["policy"] == "quality"], ["rouge1"])


def test_a_line_says_what_is_behind():
    e = Estimate(0.2, 0.1, 0.3, 160, (0, 1, 2, 3, 4))
    text = replication.what_is_behind([e, replace(e, n=80, seeds=(0, 1))], paired=True)
    assert text == "Paired difference with 95 % interval; n = 80 to 160 (2 to 5 seeds × 32 to 40 held-out dialogues)"
    text = replication.what_is_behind({"recorded": [e], "live": [replace(e, n=1, seeds=(0,))]})
    assert text.endswith("; recorded: n = 160 (5 seeds × 32 held-out dialogues); live: n = 1 cells, one per seed")
    assert replication.what_is_behind([]) == "Nothing measured yet"


def test_curves_follow_the_factor(studies: dict[str, Study]):
    found = replication.curve(studies["learning_curve"], "alpaca", "quality")
    assert found.x == [100, 200, 400, 800] and found.drawn["y"] == sorted(found.drawn["y"])
    gap = replication.curve(studies["learning_curve"], "alpaca", "quality", against="random")
    assert [e.value for e in gap.estimates] == pytest.approx([0.03, 0.05, 0.07, 0.09], abs=0.012)
    assert all(g.high - g.low < c.high - c.low for g, c in zip(gap.estimates, found.estimates, strict=True))


# ------------------------------------------------------------------ ledger and paper beside us


def test_the_ledger_judges_what_is_there(studies: dict[str, Study]):
    rows = {r.key: r for r in replication.ledger(studies)}
    assert {
        k: rows[k].verdict for k in ("beats_random", "beats_kcenter", "eoe_only", "released_code")
    } == dict.fromkeys(("beats_random", "beats_kcenter", "eoe_only", "released_code"), "holds")
    assert rows["headline"].verdict == "fails"  # the made effect is 0.03 on 0.2
    assert rows["faster_random"].verdict == rows["buffer_size"].verdict == rows["synthesis"].verdict == "holds"
    assert rows["saturation"].verdict == "not measured" and "more than 6" in rows["saturation"].missing
    worse = {"policy_comparison": made_study(effects={"quality": -0.03}, policies=FEW)}
    judged = {r.key: r.verdict for r in replication.ledger(worse)}
    assert judged["beats_random"] == judged["eoe_only"] == "fails" and judged["buffer_size"] == "not measured"
    nll = {r.key: r.verdict for r in replication.ledger(worse, "nll")}
    assert nll["beats_random"] == "fails"


def test_an_empty_ledger_has_no_verdict_but_all_rows(studies: dict[str, Study]):
    nothing = replication.ledger({})
    assert {r.verdict for r in nothing} == {"not measured"} and all(r.missing for r in nothing)
    assert [r.key for r in nothing] == [r.key for r in replication.ledger(studies)]


def test_one_seed_and_few_policies_do_not_stop_the_ledger():
    thin = made_study(policies=("quality", "random", "base"), streams=("person:0",), seeds=1)
    rows = {r.key: r for r in replication.ledger({"policy_comparison": thin})}
    assert rows["beats_random"].claim is not None and rows["beats_fifo"].verdict == "not measured"


def test_paper_beside_us_keeps_both_sides(study: Study):
    table = replication.paper_beside_us(study).set_index(["data", "policy"])
    assert table.loc[("alpaca", "quality"), "paper"] == "0.374 (read)"
    assert table.loc[("alpaca", "random"), "paper"] == "0.264 (digitised)"
    e = study.estimate("rouge1", "alpaca", "quality")
    assert table.loc[("alpaca", "quality"), "ours"] == f"{e.value:.3f} [{e.low:.3f}, {e.high:.3f}]"
    assert table.loc[("dolly", "quality"), "ours"] == "–" and table.loc[("person:0", "fifo"), "paper"] == "–"
    alone = replication.paper_beside_us(None)
    assert len(alone) == 6 * 7 and set(alone["n"]) == {0}


def test_tables_are_read_from_a_folder(tmp_path: Path):
    save_made(tmp_path, ["policy_comparison"], policies=("quality", "random"), streams=("person:0",), seeds=2)
    found = replication.recorded(tmp_path)
    assert list(found) == ["policy_comparison"]
    made = made_study(policies=("quality", "random"), streams=("person:0",), seeds=2)
    for mine, read in zip(made.cells, found["policy_comparison"].cells, strict=True):
        assert read.rows["rouge1"] == pytest.approx(mine.rows["rouge1"], abs=5.1e-3)  # kept to two decimals
    assert "buffer_redundancy" in replication.cell_table(found["policy_comparison"])
    facts = replication.where_from(found["policy_comparison"])["value"]
    assert facts["command"] == "made for a test" and facts["seeds"] == "0, 1"
    assert replication.recorded(tmp_path / "..") == {}
    with pytest.raises(InputError, match="folder"):
        replication.recorded(tmp_path / "nowhere")
    (tmp_path / "learning_curve.json").write_text("{", encoding="utf-8")
    with pytest.raises(InputError, match="learning_curve"):
        replication.recorded(tmp_path)


def test_what_is_not_recorded(study: Study):
    assert replication.not_recorded({}) == list(replication.STUDIES)
    assert not {"metric_ablation", "released_code_gap"} & set(replication.not_recorded({"policy_comparison": study}))
    assert "learning_curve" in replication.not_recorded({"policy_comparison": study})
