"""Replacement policies: the paper's rule, what the released scripts do, and what each policy promises."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pllm_helpers.dialogue import DialogueSet
from pllm_helpers.figures import METHODS
from pllm_helpers.runtime import InputError
from pllm_helpers.selection import (
    METRICS,
    POLICIES,
    Choice,
    CombinedScore,
    DialogueBuffer,
    FacilityLocation,
    FifoReplace,
    KCenter,
    MetricTable,
    Policy,
    QualityPolicy,
    RandomReplace,
    in_domain_dissimilarity,
    make_policy,
    run_stream,
)
from pllm_helpers.selection.policies import mean_ranks
from tests.unit.streams import DOMAINS, random_stream, real_stream


def played(policy, dialogues, table, **buffer):
    """Decisions, and the entries before each of them."""
    before, decisions = [], []
    with DialogueBuffer(**buffer) as b:
        for stop in range(1, len(dialogues) + 1):
            before.append(b.entries)
            decisions += run_stream(b, policy, dialogues, table, stop=stop)
        before.append(b.entries)
    return before, decisions


def idd(entry, entries, mode="paper"):
    """From the formula, against the other entries of its domain."""
    others = [e.embedding for e in entries if e.domain == entry.domain and e.slot != entry.slot]
    return in_domain_dissimilarity(entry.embedding, others, mode=mode)


# ---------------------------------------------------------------- registry


def test_every_policy_has_a_look_in_figures_and_is_made_anew():
    assert set(POLICIES) <= set(METHODS)
    assert list(POLICIES) == (
        "quality random fifo kcenter combined facility eoe_only dss_only idd_only released_code".split()
    )
    for key in POLICIES:
        assert isinstance(make_policy(key), Policy) and make_policy(key) is not make_policy(key)
    assert len({repr(make_policy(k)) for k in POLICIES}) == len(POLICIES), "settings tell them apart"
    with pytest.raises(InputError, match="one of quality, random"):
        make_policy("fifo ")


def test_policy_of_one_mode_refuses_scores_of_the_other():
    dialogues, table = random_stream(5)
    released = replace(table, mode="released_code")
    with DialogueBuffer(bins=2) as buffer:
        with pytest.raises(InputError, match=r"score_dialogues\(…, mode='paper'\)"):
            run_stream(buffer, "quality", dialogues, released)
        with pytest.raises(InputError, match="mode 'released_code'"):
            run_stream(buffer, "released_code", dialogues, table)
        run_stream(buffer, "random", dialogues, released)


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        ({"metrics": ()}, "metrics"),
        ({"metrics": ("eoe", "eoe")}, "metrics"),
        ({"metrics": ("rouge",)}, "metrics"),
        ({"idd": "fresh"}, "idd"),
        ({"mode": "released_code", "idd": "present"}, "idd"),
    ],
)
def test_bad_settings_of_the_quality_policy(arguments, what):
    with pytest.raises(InputError, match=f"^{what}: expected"):
        QualityPolicy(**arguments)


# ---------------------------------------------------------------- the paper's rule


@pytest.mark.parametrize("idd_of", ["present", "stored"])
@pytest.mark.parametrize("metrics", [METRICS, ("eoe",), ("dss",), ("idd",), ("eoe", "idd")])
def test_quality_rule_against_the_formulas(metrics, idd_of):
    dialogues, table = random_stream(150, seed=2)
    before, decisions = played(QualityPolicy(metrics, idd=idd_of), dialogues, table, bins=8)
    actions = set()
    for entries, d, after in zip(before, decisions, before[1:], strict=False):
        if d.action == "insert":
            continue
        actions.add(d.action)
        scores = [dict(e.scores, idd=idd(e, entries)) if idd_of == "present" else dict(e.scores) for e in entries]
        beaten = [e.slot for e, s in zip(entries, scores, strict=True) if all(d.scores[m] > s[m] for m in metrics)]
        assert d.candidates == len(beaten)
        if beaten:
            assert d.action == "replace" and d.slot in beaten and d.replaced.id == entries[d.slot].id
            assert after[d.slot].position == d.position and d.too_low == ()
            assert [e.id for e in after if e.slot != d.slot] == [e.id for e in entries if e.slot != d.slot]
        else:
            assert d.action == "discard" and [e.id for e in after] == [e.id for e in entries]
            wins = [sum(d.scores[m] > s[m] for m in metrics) for s in scores]
            assert len(metrics) - len(d.too_low) == max(wins)
            closest = [s for s in scores if all(d.scores[m] > s[m] for m in metrics if m not in d.too_low)]
            assert any(all(d.scores[m] <= s[m] for m in d.too_low) for s in closest)
            assert all(m.upper() in d.reason for m in d.too_low)
    assert actions == {"replace", "discard"}


def test_equal_is_not_higher():
    dialogues, table = random_stream(10)
    same = replace(table, eoe=np.full(10, 0.5), dss=np.full(10, 0.5))
    with DialogueBuffer(bins=3) as buffer:
        decisions = run_stream(buffer, "quality", dialogues, same)
    assert {d.action for d in decisions[3:]} == {"discard"} and set(decisions[-1].too_low) >= {"eoe", "dss"}


def test_draw_among_candidates_is_uniform():
    """A newcomer that beats four of six entries replaces each of the four equally often."""
    scores = np.array([[0.1] * 3, [0.9] * 3, [0.2] * 3, [0.3] * 3, [0.4, 0.4, 0.6], [0.4] * 3])
    n, hits, rng = 4000, np.zeros(6), np.random.default_rng(0)
    for _ in range(n):
        choice = QualityPolicy()._paper(np.full(3, 0.5), scores, rng)
        assert choice.candidates == 4
        hits[choice.slot] += 1
    assert hits[1] == hits[4] == 0
    assert ((hits[[0, 2, 3, 5]] - n / 4) ** 2 / (n / 4)).sum() < 16.3  # chi-squared, 3 degrees of freedom, p = 0.001


def test_single_metric_keeps_at_least_as_good_a_buffer():
    """Each replacement raises the metric of its slot, so the buffer's sum never falls (EOE, DSS: fixed scores)."""
    dialogues, table = random_stream(300, seed=4)
    for metric in ("eoe", "dss"):
        before, _ = played(QualityPolicy((metric,)), dialogues, table, bins=10)
        sums = [sum(e.scores[metric] for e in entries) for entries in before if len(entries) == 10]
        assert all(b >= a for a, b in zip(sums, sums[1:], strict=False)) and sums[-1] > sums[0] + 2


def test_refreshed_idd_frees_the_first_of_a_domain():
    """Stored, the IDD of a domain's first entry is 1 for ever; refreshed, it falls as its like come in."""
    vectors = np.eye(4, dtype=np.float32)
    tight = np.stack([vectors[0], vectors[0] + 0.1 * vectors[1], vectors[2]])
    ones = np.ones(3, dtype=int)
    table = MetricTable(
        np.array([0.1, 0.9, 0.5]), np.array([0.1, 0.9, 0.5]), ones * 0, tight, ones, ones, DOMAINS, "spectral"
    )
    dialogues = random_stream(3)[0]
    results = {}
    for kind in ("present", "stored"):
        with DialogueBuffer(bins=2) as buffer:
            results[kind] = run_stream(buffer, QualityPolicy(idd=kind), dialogues, table)[-1]
    assert (results["present"].action, results["present"].slot) == ("replace", 0)
    assert (results["stored"].action, results["stored"].too_low) == ("discard", ("idd",))


# ---------------------------------------------------------------- the released scripts


def released_loop(score, domain, size):
    """The released single-metric loop as the facts describe it, for one block: list of kept row numbers."""
    kept = []
    for i in range(len(score)):
        if len(kept) < size:
            kept.append(i)
            continue
        rivals = [k for k in kept if domain[k] == domain[i]]
        if rivals:
            lowest = min(rivals, key=lambda k: score[k])
            if score[lowest] > score[i]:
                kept[kept.index(lowest)] = i
    return kept


@pytest.mark.parametrize("metric", ["eoe", "dss"])
def test_released_code_is_that_loop(metric):
    dialogues, table = random_stream(300, seed=5, mode="released_code")
    with DialogueBuffer(bins=16) as buffer:
        run_stream(buffer, QualityPolicy((metric,), "released_code"), dialogues, table)
        kept = [e.position for e in buffer]
    assert kept == released_loop(getattr(table, metric), table.domain, 16)


def test_released_code_takes_similarity_for_idd_and_lets_one_slot_of_a_domain_change():
    dialogues, table = random_stream(300, seed=6, mode="released_code")
    before, decisions = played(QualityPolicy(("idd",), "released_code"), dialogues, table, bins=16)
    changed = {}
    for entries, d in zip(before, decisions, strict=False):
        same = [e.embedding for e in entries if e.domain == d.domain]
        expected = in_domain_dissimilarity(table.embeddings[d.position], same, mode="released_code")
        assert d.scores["idd"] == pytest.approx(expected, abs=2e-6)
        if d.action == "replace":
            assert d.replaced.domain == d.domain
            assert d.scores["idd"] < min(e.scores["idd"] for e in entries if e.domain == d.domain)
            changed.setdefault(d.domain, set()).add(d.slot)
    assert changed and all(len(slots) == 1 for slots in changed.values())


def test_released_code_on_random_scores_keeps_the_first_arrivals():
    """61 of 64 kept sets are simply the first arrivals of a block of 800, at a mean score near 0.5.

    So says the known simulation of the released loop, with scores drawn uniformly. Here: 64 bins,
    blocks of 800, one metric, a fresh buffer per block, and three equally frequent domains, as many
    as the paper's lexicon groups have (the simulation's own number is not on record). Only one slot
    per domain ever changes, which with three domains leaves 61, or one more where a domain's first
    arrivals hold its lowest score (8 % each).
    """
    firsts, means = [], []
    for block in range(3):
        dialogues, table = random_stream(800, seed=100 + block, mode="released_code", d=4)
        table = replace(table, domain=np.random.default_rng(block).integers(0, 3, 800))
        with DialogueBuffer(bins=64) as buffer:
            run_stream(buffer, QualityPolicy(("eoe",), "released_code"), dialogues, table)
            firsts.append(sum(e.position < 64 for e in buffer))
            means.append(np.mean([e.scores["eoe"] for e in buffer]))
    assert min(firsts) >= 61 and np.median(firsts) <= 61.5
    assert 0.4 < np.mean(means) < 0.57  # no higher than random, where the rule of the paper gets near 1
    with DialogueBuffer(bins=64) as buffer:
        run_stream(buffer, "eoe_only", dialogues, replace(table, mode="paper"))
        assert np.mean([e.scores["eoe"] for e in buffer]) > 0.8


def test_three_metrics_of_the_released_code_hardly_ever_replace():
    dialogues, table = random_stream(800, seed=7, mode="released_code")
    before, decisions = played(QualityPolicy(mode="released_code"), dialogues, table, bins=16)
    for entries, d in zip(before, decisions, strict=False):
        if d.action == "insert":
            continue
        rivals = [e for e in entries if e.domain == d.domain]
        wins = bool(rivals) and all(d.scores[m] < min(e.scores[m] for e in rivals) for m in METRICS)
        assert (d.action == "replace") == wins
    assert 0 <= sum(d.action == "replace" for d in decisions) <= 8


# ---------------------------------------------------------------- baselines


def test_reservoir_is_uniform():
    """200 of 1,000 sets are kept, equally many of each tenth of the stream: chi-squared over four seeds."""
    n, k, parts, seeds = 1000, 200, 10, 4
    dialogues, table = random_stream(n, d=2)
    statistics, firsts = [], 0
    for seed in range(seeds):
        with DialogueBuffer(bins=k, seed=seed) as buffer:
            run_stream(buffer, RandomReplace(), dialogues, table)
            positions = np.array([e.position for e in buffer])
        counts = np.bincount(positions * parts // n, minlength=parts)
        # drawn without replacement, counts vary less than independent ones: by (n - k) / (n - 1)
        statistics.append(((counts - k / parts) ** 2 / (k / parts)).sum() * (n - 1) / (n - k))
        firsts += (positions < k).sum()
    freedom = seeds * (parts - 1)
    assert abs(sum(statistics) - freedom) < 3.3 * np.sqrt(2 * freedom)
    spread = np.sqrt(seeds * k * (k / n) * (1 - k / n) * (n - k) / (n - 1))
    assert abs(firsts - seeds * k * k / n) < 3.3 * spread, "the first arrivals are neither kept nor driven out"


def test_reservoir_counts_only_what_could_be_stored():
    """Duplicates and giants take no place in the count, or later sets would be too rare."""
    with DialogueBuffer(bins=2, bin_bytes=500) as buffer:
        giant, policy = DialogueSet("u", "x" * 600, ""), RandomReplace()
        for text in ("a", "a", None, "b", "c"):
            d = giant if text is None else DialogueSet("u", text, "")
            last = buffer.offer(policy, d, embedding=np.ones(2, np.float32), domain=None, eoe=0, dss=0)
    assert "probability 2/3" in last.reason or "probability was 2/3" in last.reason


def test_fifo_holds_the_newest():
    dialogues, table = random_stream(37)
    before, decisions = played(FifoReplace(), dialogues, table, bins=10)
    assert sorted(e.position for e in before[-1]) == list(range(27, 37))
    assert [d.replaced.position for d in decisions[10:]] == list(range(27))


def test_k_center_never_brings_entries_closer_together():
    dialogues, table = random_stream(400, seed=8, d=8)
    before, decisions = played(KCenter(), dialogues, table, bins=12)
    closest = []
    for entries, d in zip(before, decisions, strict=False):
        if len(entries) < 12:
            continue
        e = np.array([x.embedding for x in entries], dtype=float)
        cosines = e @ e.T - 2 * np.eye(12)
        closest.append(cosines.max())
        new = e @ table.embeddings[d.position]
        assert (d.action == "replace") == (new.max() < cosines.max()) or abs(new.max() - cosines.max()) < 1e-5
        if d.action == "replace":
            assert d.slot in np.unravel_index(cosines.argmax(), cosines.shape)
    assert all(b <= a + 1e-6 for a, b in zip(closest, closest[1:], strict=False))
    assert closest[-1] < closest[0] - 0.1


def test_k_center_with_one_bin_keeps_the_first():
    dialogues, table = random_stream(5)
    with DialogueBuffer(bins=1) as buffer:
        run_stream(buffer, "kcenter", dialogues, table)
        assert buffer.entries[0].position == 0


# ---------------------------------------------------------------- beyond the paper


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 9)), min_size=1, max_size=30))
@settings(max_examples=60, deadline=None)
def test_mean_ranks_against_counting(rows):
    scores = np.array(rows, dtype=float)
    expected = [
        np.mean([(scores[:, j] < r[j]).mean() + ((scores[:, j] == r[j]).mean()) / 2 for j in range(2)]) for r in scores
    ]
    assert np.allclose(mean_ranks(scores), expected)


def test_combined_score_drops_the_lowest_mean_rank():
    dialogues, table = random_stream(200, seed=9)
    before, decisions = played(CombinedScore(), dialogues, table, bins=10)
    for entries, d in zip(before, decisions, strict=False):
        if d.action == "insert":
            continue
        rows = [[e.scores["eoe"], e.scores["dss"], idd(e, entries)] for e in entries]
        ranks = mean_ranks(np.array([*rows, [d.scores[m] for m in METRICS]]))
        assert (d.action == "replace") == bool((ranks[:-1] < ranks[-1]).any())
        assert d.action == "discard" or ranks[d.slot] == ranks.min()


def test_combined_score_lets_strength_make_up_for_weakness():
    """Top in EOE and DSS but a near copy: the paper's rule discards it, the mean rank does not."""
    vectors = np.eye(4, dtype=np.float32)[[0, 1, 2, 2]] + np.float32(0.1) * np.eye(4, dtype=np.float32)[[0, 1, 2, 3]]
    scores, ones = np.array([0.1, 0.2, 0.3, 0.9]), np.ones(4, dtype=int)
    table = MetricTable(scores, scores, ones * 0, vectors, ones, ones, DOMAINS, "spectral")
    last = {}
    for policy in (QualityPolicy(), CombinedScore()):
        with DialogueBuffer(bins=3) as buffer:
            last[policy.name] = run_stream(buffer, policy, random_stream(4)[0], table)[-1]
    assert (last["quality"].action, last["quality"].too_low) == ("discard", ("idd",))
    assert (last["combined"].action, last["combined"].slot) == ("replace", 0)


def coverage(vectors, chosen):
    """Mean over all vectors of the greatest cosine with the chosen ones."""
    return (vectors @ vectors[chosen].T).max(1).mean()


def test_facility_location_swaps_what_raises_the_coverage_of_its_ground_set():
    dialogues, table = random_stream(120, seed=11, d=12)
    policy = FacilityLocation(ground=1000)  # never full: the ground set is the whole stream so far
    with DialogueBuffer(bins=6) as buffer:
        run_stream(buffer, policy, dialogues, table, stop=6)
        for i in range(6, 120):
            before = [e.position for e in buffer]
            (d,) = run_stream(buffer, policy, dialogues, table, stop=i + 1)
            seen = table.embeddings[: i + 1].astype(float)
            swaps = [coverage(seen, [i if s == slot else p for s, p in enumerate(before)]) for slot in range(6)]
            stay = coverage(seen, before)
            if max(swaps) > stay + 1e-4:
                assert d.action == "replace" and swaps[d.slot] == pytest.approx(max(swaps), abs=1e-4)
            elif max(swaps) < stay - 1e-4:
                assert d.action == "discard"
        assert len(buffer._memory) == 120


def test_facility_location_covers_a_real_stream_better_than_the_reservoir():
    dialogues, table = real_stream(0)
    covered = {}
    for name, policy in (("facility", FacilityLocation(128)), ("random", RandomReplace())):
        for seed in range(3):
            with DialogueBuffer(bins=20, seed=seed) as buffer:
                run_stream(buffer, policy, dialogues, table)
                chosen = [e.position for e in buffer]
                covered.setdefault(name, []).append(coverage(table.embeddings, chosen))
    assert min(covered["facility"]) > max(covered["random"])


def test_ground_set_is_a_bounded_uniform_sample():
    dialogues, table = random_stream(300, d=4)
    with DialogueBuffer(bins=5) as buffer:
        run_stream(buffer, FacilityLocation(20), dialogues, table)
        assert len(buffer._memory) == 20 and sum(len(v) for v in buffer._memory.values()) == 20 * 4 * 2
        ground = np.array([np.frombuffer(v, "<i2") / 2**14 for v in buffer._memory.values()])
        found = np.abs(ground[:, None] - table.embeddings[None]).max(2).argmin(1)
        assert 90 < np.mean(found) < 210, "from the whole stream, not from its ends"
    with pytest.raises(InputError, match="ground: expected at least 1"):
        FacilityLocation(0)


# ---------------------------------------------------------------- your own


def test_the_small_class_of_the_docstring_works(tmp_path):
    class LongestAnswer(Policy):
        name = "longest"

        def choose(self, new, buffer, rng):
            lengths = [len(e.dialogue.answer) for e in buffer.entries]
            shortest = int(np.argmin(lengths))
            return shortest if len(new.dialogue.answer) > lengths[shortest] else None

    dialogues, table = real_stream(1)
    with DialogueBuffer(tmp_path / "b.db", bins=8) as buffer:
        decisions = run_stream(buffer, LongestAnswer(), dialogues, table)
        kept = sorted(len(e.dialogue.answer) for e in buffer)
    assert kept == sorted(len(d.answer) for d in dialogues)[-8:]
    assert {d.action for d in decisions} == {"insert", "replace", "discard"}


def test_memory_of_a_policy_is_kept_and_a_choice_may_explain(tmp_path):
    class EveryThird(Policy):
        name = "third"

        def choose(self, new, buffer, rng):
            count = buffer.memory["count"] = buffer.memory.get("count", 0) + 1
            buffer.memory["pair"] = (count, count)
            assert buffer.memory.get("old", [0]) == [0] or isinstance(buffer.memory["old"], list)
            buffer.memory["old"] = (count,)
            if count % 7 == 0:
                del buffer.memory["count"]
            return Choice(0, f"the {count}th", 1) if count % 3 == 0 else None

    dialogues, table = random_stream(40)
    with DialogueBuffer(bins=2) as whole:
        decisions = run_stream(whole, EveryThird(), dialogues, table)
        digest = whole.digest()
    assert decisions[4].reason == "the 3th" and decisions[4].action == "replace"
    for stop in (3, 8, 9, 20, 40):
        with DialogueBuffer(tmp_path / "b.db", bins=2) as part:
            run_stream(part, EveryThird(), dialogues, table, stop=stop)
    with DialogueBuffer(tmp_path / "b.db") as part:
        assert part.digest() == digest and part._memory["count"] == 38 % 7


def test_on_decision_may_stop_the_stream_between_two_sets():
    dialogues, table = random_stream(20)

    class Enough(Exception):
        pass

    def stop(decision):
        if decision.position == 7:
            raise Enough

    with DialogueBuffer(bins=3) as buffer:
        with pytest.raises(Enough):
            run_stream(buffer, "quality", dialogues, table, on_decision=stop)
        assert buffer.position == 8
        rest = run_stream(buffer, "quality", dialogues, table)
        assert [d.position for d in rest] == list(range(8, 20))
