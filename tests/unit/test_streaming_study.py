"""Streams, playbacks and what a buffer holds, as notebook 02 uses them."""

from __future__ import annotations

import numpy as np
import pytest

from pllm_helpers.dialogue import DialogueSet
from pllm_helpers.experiments import streaming_study as study
from pllm_helpers.models import Encoder, load_encoder
from pllm_helpers.runtime import InputError
from pllm_helpers.selection import (
    POLICIES,
    DialogueBuffer,
    in_domain_dissimilarity,
    load_lexicons,
    make_policy,
    run_stream,
    score_dialogues,
)
from tests.unit.streams import random_stream


@pytest.fixture(scope="module")
def scored() -> study.ScoredStream:
    dialogues, table = random_stream(150, seed=3)
    _, released = random_stream(150, seed=3, mode="released_code")
    return study.ScoredStream(tuple(dialogues), table, released)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_playback_knows_the_buffer_at_every_moment(scored: study.ScoredStream, policy: str):
    run = study.play(scored, policy, bins=12, seed=4)
    rule = make_policy(policy)
    with DialogueBuffer(bins=12, seed=4) as buffer:
        for t in (0, 5, 12, 13, 80, 150):
            run_stream(buffer, rule, scored.dialogues, scored.scores_for(rule), stop=t)
            assert run.kept(t).tolist() == [e.position for e in buffer]
            assert run.slots(t).tolist() == [e.position for e in buffer] + [-1] * (12 - len(buffer))
            if t >= 12:
                present = study.present_idd(scored.table, run.kept(t))
                if policy != "released_code":
                    assert present == pytest.approx(buffer.present_idd(), abs=1e-5)
    assert run.slots().tolist() == run.slots(150).tolist()
    alive = {born for born, gone in run.lives if gone == 150}
    assert alive == set(run.kept().tolist())
    assert len(run.lives) == 12 + int(run.accepted.sum()) and len(run.accepted) == 138
    for t in (30, 100):
        assert {b for b, gone in run.lives if b < t <= gone} == set(run.kept(t).tolist())


def test_redundancy_and_idd_by_their_definitions(scored: study.ScoredStream):
    kept = np.array([3, 50, 77, 120, 8])
    E, names = scored.table.embeddings[kept].astype(float), scored.table.domain_names
    pairs = [E[i] @ E[j] for i in range(5) for j in range(i)]
    assert study.redundancy(scored.table, kept) == pytest.approx(np.mean(pairs))
    expected = []
    for row, i in enumerate(kept):
        peers = [j for j, other in enumerate(kept) if j != row and names[other] == names[i]]
        expected.append(in_domain_dissimilarity(E[row], E[peers].reshape(len(peers), E.shape[1])))
    assert study.present_idd(scored.table, kept) == pytest.approx(expected)
    with pytest.raises(InputError, match="at least two"):
        study.redundancy(scored.table, kept[:1])


def test_what_a_buffer_holds(scored: study.ScoredStream):
    kept = np.array([0, 10, 20])
    held = study.holdings(scored, kept, after=101)
    assert held["eoe"] == pytest.approx(scored.table.eoe[kept].mean())
    assert held["dss"] == pytest.approx(scored.table.dss[kept].mean())
    assert held["arrival"] == pytest.approx(0.1) and held["words"] == 1 and held["conversations"] == 1
    assert set(study.MEASURES) <= set(held)


def test_policies_without_dice_are_those_that_do_not_change_with_the_seed(scored: study.ScoredStream):
    def kept(policy: str, seed: int) -> list[int]:
        return study.play(scored, policy, bins=10, seed=seed).kept().tolist()

    for policy in study.WITHOUT_DICE:
        assert kept(policy, 1) == kept(policy, 2)
    for policy in ("quality", "random"):
        assert kept(policy, 1) != kept(policy, 2)
    runs, held = study.seed_portraits(scored, "fifo", bins=10, seeds=5)
    assert len(runs) == 1 and study.seed_interval(held["eoe"]).low == study.seed_interval(held["eoe"]).high
    runs, held = study.seed_portraits(scored, "random", bins=10, seeds=5)
    e = study.seed_interval(held["eoe"])
    assert [r.seed for r in runs] == [0, 1, 2, 3, 4] and e.low < e.value < e.high and e.seeds == (0, 1, 2, 3, 4)


@pytest.mark.parametrize("policy", ["quality", "facility"])
def test_a_killed_stream_goes_on(tmp_path, scored: study.ScoredStream, policy: str):
    path = tmp_path / "b.db"
    killed = study.stream_and_kill(path, scored, policy, bins=12, seed=4, after=60)
    assert killed.status != 0 and 60 <= killed.acknowledged < 150
    with DialogueBuffer(path) as buffer, DialogueBuffer(bins=12, seed=4) as whole:
        assert killed.acknowledged <= buffer.position <= killed.acknowledged + 1
        run_stream(buffer, policy, scored.dialogues, scored.table)
        run_stream(whole, policy, scored.dialogues, scored.table)
        assert buffer.digest() == whole.digest()


def test_a_child_that_fails_says_why(tmp_path, scored: study.ScoredStream):
    (tmp_path / "b.db").write_bytes(b"no buffer")
    with pytest.raises(RuntimeError, match="InputError"):
        study.stream_and_kill(tmp_path / "b.db", scored, bins=12, after=60)


# ---------------------------------------------------------------- scoring


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return load_encoder()


@pytest.mark.model
def test_one_pass_gives_both_tables(encoder: Encoder):
    lexicons = load_lexicons("medical", "emotion")
    dialogues = list(study.person_dialogues(2, 80))
    dialogues[40:40] = [dialogues[3], DialogueSet("u", "x" * 30_000, "too large for a bin")]
    told: list[tuple[int, int]] = []
    scored = study.score_stream(dialogues, encoder, lexicons, on_progress=lambda *a: told.append(a))
    assert told == [(0, 82), (64, 82)] and scored.left_out == 2
    assert list(scored.dialogues) == dialogues[:40] + dialogues[42:]
    for mode, table in (("paper", scored.table), ("released_code", scored.released)):
        whole = score_dialogues(scored.dialogues, encoder, lexicons, mode=mode, progress=False)
        assert table.mode == mode and table.domain.tolist() == whole.domain.tolist()
        assert table.eoe == pytest.approx(whole.eoe, abs=2e-3) and table.dss == pytest.approx(whole.dss)
        assert np.abs(table.embeddings - whole.embeddings).max() < 1e-4


@pytest.mark.model
def test_scoring_goes_on_where_it_was_interrupted(encoder: Encoder):
    lexicons, dialogues = load_lexicons("medical"), study.person_dialogues(1, 130)
    chunks: list = []

    def stop(done: int, _: int) -> None:
        if done == 64:
            raise KeyError("enough")

    with pytest.raises(KeyError):
        study.score_stream(dialogues, encoder, lexicons, on_progress=stop, chunks=chunks)
    told: list[int] = []
    scored = study.score_stream(dialogues, encoder, lexicons, on_progress=lambda d, _: told.append(d), chunks=chunks)
    assert told == [64, 128] and len(scored) + scored.left_out == 130


@pytest.mark.model
def test_nothing_to_stream(encoder: Encoder):
    with pytest.raises(InputError, match="at least one"):
        study.score_stream([], encoder, load_lexicons("medical"))
