"""The dialogues written for this project: their quality, and their order as a stream."""

import itertools
import json
import random
from collections import Counter

import pytest
from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenizers import DefaultTokenizer

from pllm_helpers.corpora import FAMILIES, authored_dialogues, authored_stream, temporal_correlation
from pllm_helpers.corpora.authored import family_path, read_family
from pllm_helpers.runtime import InputError, data_dir

HIGHEST = 0.5


def too_similar(texts: list[str], limit: float = HIGHEST) -> list[tuple[float, int, int]]:
    """Pairs whose ROUGE-L F1 is above ``limit``.

    A common subsequence is no longer than the words that both texts have, so that most pairs are
    settled by counting words; only the others need the slow score.
    """
    scorer, words = RougeScorer(["rougeL"]), DefaultTokenizer(use_stemmer=False)
    bags = [Counter(words.tokenize(t)) for t in texts]
    found = []
    for i, j in itertools.combinations(range(len(texts)), 2):
        if 2 * (bags[i] & bags[j]).total() > limit * (bags[i].total() + bags[j].total()):
            score = scorer.score(texts[i], texts[j])["rougeL"].fmeasure
            if score > limit:
                found.append((score, i, j))
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_no_two_dialogues_of_a_family_are_alike(family):
    assert too_similar([f"{d.question} {d.answer}" for d in authored_dialogues(family)]) == []


def test_the_similarity_check_sees_a_twin_and_spares_a_stranger():
    texts = ["the cat sat on the mat today", "a train left for Oslo at nine", "the cat sat on a mat today"]
    assert [(i, j) for _, i, j in too_similar(texts)] == [(0, 2)]
    exact = RougeScorer(["rougeL"])
    rows = [f"{d.question} {d.answer}" for d in authored_dialogues("medical")[:16]]
    slow = [
        (i, j)
        for i, j in itertools.combinations(range(16), 2)
        if exact.score(rows[i], rows[j])["rougeL"].fmeasure > 0.15
    ]
    assert [(i, j) for _, i, j in too_similar(rows, 0.15)] == slow != []


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_at_least_60_dialogues_in_topics(family):
    dialogues = authored_dialogues(family)
    assert len(dialogues) >= 60
    assert len({d.question for d in dialogues}) == len({d.answer for d in dialogues}) == len(dialogues)
    assert set(Counter(d.meta["topic"] for d in dialogues).values()) == {4}
    assert {d.source for d in dialogues} == {f"authored/{family}"} and {d.user for d in dialogues} == {"authored"}


def test_topics_and_ids_are_not_shared_between_families():
    dialogues = authored_dialogues()
    assert len({d.meta["id"] for d in dialogues}) == len({d.id for d in dialogues}) == len(dialogues)
    assert {d.meta["family"] for d in dialogues} == set(FAMILIES)


def test_the_datasheet_gives_the_counts_that_hold():
    sheet = (data_dir() / "dialogues" / "DATASHEET.md").read_text(encoding="utf-8")
    for family in FAMILIES:
        dialogues = authored_dialogues(family)
        words = [len(d.answer.split()) for d in dialogues]
        topics, mean = len({d.meta["topic"] for d in dialogues}), sum(words) / len(words)
        cells = f"| {len(dialogues)} | {topics} | {mean:.0f} ({min(words)}–{max(words)}) |"
        line = next(line for line in sheet.splitlines() if line.startswith(f"| `{family}` |"))
        assert cells in line


@pytest.mark.parametrize(
    "families,expected", [("medical", ["medical"]), (["reasoning", "open_qa"], ["reasoning", "open_qa"])]
)
def test_families_can_be_chosen(families, expected):
    assert list(dict.fromkeys(d.meta["family"] for d in authored_dialogues(families))) == expected
    assert {d.meta["family"] for d in authored_stream(1, families)} == set(expected)


@pytest.mark.parametrize(
    "families,message", [("medcal", "Did you mean 'medical'"), ([], "at least one"), (["medical", "x"], "'x'")]
)
def test_unknown_families(families, message):
    for function in (authored_dialogues, lambda f: authored_stream(0, f)):
        with pytest.raises(InputError, match=message):
            function(families)


# ---------------------------------------------------------------- validation


def spoilt(tmp_path, change):
    rows = [json.loads(line) for line in family_path("medical").read_text(encoding="utf-8").splitlines()]
    lines = change(rows)
    path = tmp_path / "medical.jsonl"
    path.write_text("\n".join(x if isinstance(x, str) else json.dumps(x) for x in lines or rows), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    "change,message",
    [
        (lambda rows: rows[4].update(answer=" "), "line 5: expected text in answer"),
        (lambda rows: rows[4].update(answer=3), "line 5: expected text in answer"),
        (lambda rows: rows[1].update(id=rows[0]["id"]), "line 2: expected unique ids"),
        (lambda rows: rows[2].update(family="reasoning"), "line 3: expected family 'medical'"),
        (lambda rows: rows[9].update(topic=rows[0]["topic"]), "line 10: expected the rows of topic"),
        (lambda rows: rows[6].pop("topic"), "line 7: expected the fields"),
        (lambda rows: [*rows[:3], "{"], "line 4: expected a JSON object"),
        (lambda rows: [*rows[:3], "[]"], "line 4: expected the fields"),
        (lambda rows: [""], "line 1: expected dialogues, got an empty file"),
    ],
)
def test_a_damaged_file_is_an_error_with_the_line(change, message, tmp_path):
    def changed(rows):
        result = change(rows)
        return result if isinstance(result, list) else None

    with pytest.raises(InputError, match=message):
        read_family(spoilt(tmp_path, changed), "medical")


def test_a_missing_file_and_a_good_one(tmp_path):
    with pytest.raises(InputError, match="FileNotFoundError"):
        read_family(tmp_path / "medical.jsonl", "medical")
    assert read_family(spoilt(tmp_path, lambda rows: None), "medical") == authored_dialogues("medical")


# ---------------------------------------------------------------- the stream


def families_of(stream):
    return [d.meta["family"] for d in stream]


@pytest.mark.parametrize("seed", range(5))
def test_neighbours_share_the_domain_far_more_often_than_in_a_shuffled_order(seed):
    stream = families_of(authored_stream(seed))
    shuffled = stream[:]
    random.Random(seed).shuffle(shuffled)
    agree = lambda labels: sum(a == b for a, b in itertools.pairwise(labels)) / (len(labels) - 1)  # noqa: E731
    assert agree(stream) > 0.85 and agree(shuffled) < 0.3
    measured = temporal_correlation(stream, max_lag=8)
    assert measured[0] > 0.8 and measured[7] > 0.2  # beyond one session, too
    assert abs(temporal_correlation(shuffled)[0]) < 0.15


@pytest.mark.parametrize("seed", range(5))
def test_sessions_stay_whole_and_nothing_is_lost(seed):
    stream = authored_stream(seed)
    assert sorted(d.meta["id"] for d in stream) == sorted(d.meta["id"] for d in authored_dialogues())
    sessions = [list(group) for _, group in itertools.groupby(stream, key=lambda d: d.meta["session"])]
    assert [s[0].meta["session"] for s in sessions] == list(range(96))
    for session in sessions:
        assert len(session) == 4 and len({(d.meta["family"], d.meta["topic"]) for d in session}) == 1
        assert [d.meta["row"] for d in session] == list(range(session[0].meta["row"], session[0].meta["row"] + 4))


def test_times_increase_and_leave_gaps_between_sessions():
    stream = authored_stream(3)
    gaps = [(a.meta["session"] == b.meta["session"], b.time - a.time) for a, b in itertools.pairwise(stream)]
    assert all(gap > 0 for _, gap in gaps)
    assert max(gap for same, gap in gaps if same) < min(gap for same, gap in gaps if not same)


def test_the_seed_decides():
    assert authored_stream(7) == authored_stream(7) != authored_stream(8)


def test_the_order_is_the_same_on_every_machine():
    assert [d.meta["id"] for d in authored_stream(0)[::64]] == ORDER


ORDER = ["reasoning-057", "open_qa-009", "empathetic-037", "prosocial-005", "reasoning-037", "reasoning-029"]


def test_stay_is_the_strength_of_the_drift():
    never, often = (temporal_correlation(families_of(authored_stream(0, stay=s)), max_lag=4)[3] for s in (0, 0.95))
    assert never < 0.05 < 0.5 < often


@pytest.mark.parametrize("options", [{"seed": -1}, {"stay": 1.1}, {"stay": -0.1}])
def test_bad_options(options):
    with pytest.raises(InputError):
        authored_stream(**options)
