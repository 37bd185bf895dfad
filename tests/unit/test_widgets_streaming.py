"""Two policies side by side without a page: the widget shows what the package does, and nothing else."""

from __future__ import annotations

import re

import numpy as np
import pytest

from pllm_helpers.dialogue import DialogueSet
from pllm_helpers.experiments import streaming_study as study
from pllm_helpers.figures import METHODS, PLOTLY_MIME
from pllm_helpers.models import Encoder, load_encoder
from pllm_helpers.runtime import InputError
from pllm_helpers.selection import POLICIES, DialogueBuffer, Lexicons, load_lexicons, make_policy, run_stream
from pllm_helpers.widgets import PolicyDuel, policy_duel
from tests.unit.streams import random_stream

N, BINS = 90, 8


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return load_encoder()


@pytest.fixture(scope="module")
def lexicons() -> Lexicons:
    return load_lexicons("medical")


@pytest.fixture(scope="module")
def scored() -> study.ScoredStream:
    dialogues, table = random_stream(N, seed=5)
    _, released = random_stream(N, seed=5, mode="released_code")
    return study.ScoredStream(tuple(dialogues), table, released)


@pytest.fixture
def duel(scored: study.ScoredStream, encoder: Encoder, lexicons: Lexicons) -> PolicyDuel:
    return policy_duel(scored, encoder, lexicons, bins=BINS, seed=1)


def shown(duel: PolicyDuel) -> list[list[tuple[int, int]]]:
    """Slot and message number of every full bin, per policy, as drawn."""
    sides = duel.sides.html.split("<section")[1:]
    return [[(int(a), int(b)) for a, b in re.findall(r'data-slot="(\d+)" data-message="(\d+)"', s)] for s in sides]


@pytest.mark.parametrize("policy", POLICIES)
def test_bins_and_figure_are_the_packages(duel: PolicyDuel, scored: study.ScoredStream, policy: str):
    rule = make_policy(policy)
    with DialogueBuffer(bins=BINS, seed=1) as buffer:
        for t in (0, 3, 8, 40, N):
            decisions = run_stream(buffer, rule, scored.dialogues, scored.scores_for(rule), stop=t)
            duel.set(left=policy, position=t)
            assert shown(duel)[0] == [(e.slot, e.position + 1) for e in buffer]
            side = duel.result.sides[0]
            if decisions:
                assert side.decision.reason == decisions[-1].reason and side.mine == decisions[-1].scores
            alive = duel.plot.data[1]
            lines = [y for y in alive.y if y is not None]
            assert sorted(lines[::2]) == sorted(e.position + 1 for e in buffer)
            assert duel.plot.data[2].x == (t, t)
    assert duel.plot.layout.annotations[0].text == METHODS[policy].name.replace("&", "&amp;")


def test_scores_beside_a_replacement_are_those_that_decided(duel: PolicyDuel, scored: study.ScoredStream):
    run = study.play(scored, "quality", bins=BINS, seed=1)
    replaced = [d.position + 1 for d in run.decisions if d.action == "replace"]
    assert len(replaced) > 3
    for t in replaced:
        duel.set(position=t)
        side = duel.result.sides[0]
        assert all(side.mine[m] > side.theirs[m] for m in ("eoe", "dss", "idd")), t
        assert duel.sides.html.split("<section")[1].count("▲") == 4  # the heading and the three scores


def test_counts_add_up(duel: PolicyDuel, scored: study.ScoredStream):
    duel.set(left="quality", right="fifo", position=60)
    left, right = duel.result.sides
    assert sum(left.counts.values()) == sum(right.counts.values()) == 60
    assert right.counts == {"insert": BINS, "replace": 60 - BINS} and right.short == {}
    assert sum(left.short.values()) >= left.counts["discard"]
    assert left.holds == study.holdings(scored, left.kept, 60)
    assert f'<td class="num">{left.holds["redundancy"]:.3f}</td>' in duel.holding.html


def test_steps_and_play(duel: PolicyDuel):
    duel.set(position=10)
    duel.forward.click()
    assert duel.position.value == 11 == duel.result.position
    duel.stride.value = 5
    duel.back.click()
    assert duel.position.value == 6
    duel.back.click()
    duel.back.click()
    assert duel.position.value == 0 and "Nothing has arrived" in duel.message.html
    runs = duel.runs
    duel.stride.value = 20
    duel.playing.click()
    assert duel.position.value == N and duel.runs == runs + 5 and duel.playing.description == "Play"
    duel.playing.click()  # from the end: once more from the start
    assert duel.position.value == N and duel.runs == runs + 11


def test_another_seed_another_buffer(duel: PolicyDuel):
    before = shown(duel)[1]
    duel.set(seed=2)
    assert shown(duel)[1] != before
    duel.set(seed=1)
    assert shown(duel)[1] == before


def test_more_bins_than_messages_is_said_in_place(duel: PolicyDuel):
    with pytest.raises(InputError, match="Bins"):
        duel.set(bins=N + 1)
    assert f"expected at most {N}" in duel._error.html
    duel.set(bins=4)
    assert duel._error.html == "" and len(shown(duel)[0]) == 4


@pytest.mark.model
def test_another_person_is_scored_once(encoder: Encoder, lexicons: Lexicons):
    scored = study.person_scores(0, 30, encoder, lexicons)
    duel = policy_duel(scored, encoder, lexicons, bins=8, others=2)
    told: list[str] = []
    duel.progress.observe(lambda change: told.append(change["new"]), names="html")
    duel.set(person=1)
    assert any("Scoring person 1" in t for t in told) and duel.progress.html == ""
    expected = study.person_scores(1, 30, encoder, lexicons)
    assert duel.result.scored.dialogues == expected.dialogues
    run = study.play(expected, "quality", bins=8, seed=0)
    assert [m - 1 for _, m in shown(duel)[0]] == run.kept().tolist()
    told.clear()
    duel.set(person=0)
    duel.set(person=1)
    assert not told


def test_hostile_text_is_escaped_everywhere(encoder: Encoder, lexicons: Lexicons):
    dialogues, table = random_stream(20, seed=1)
    hostile = [DialogueSet("u", f'<img src=x onerror="alert({i})">', f"</li><script>{i}", float(i)) for i in range(20)]
    duel = policy_duel(study.ScoredStream(tuple(hostile), table, table), encoder, lexicons, bins=4, right="fifo")
    for html in (duel.message.html, duel.sides.html, duel.holding.html, duel.described.html):
        assert "<img" not in html and "<script" not in html
    assert "&lt;img" in duel.sides.html and 'onerror="' not in duel.sides.html


def test_the_starting_state_is_kept_for_exports(duel: PolicyDuel):
    first = duel.result
    duel.set(left="kcenter", position=5)
    bundle, metadata = duel._repr_mimebundle_()
    assert METHODS["quality"].name in bundle["text/html"] and METHODS["kcenter"].name not in bundle["text/html"]
    assert f"{first.sides[0].holds['eoe']:.3f}" in bundle["text/html"]
    kept = np.sort(first.sides[0].kept)
    assert f"from message {kept[0] + 1} to {kept[-1] + 1}" in metadata["alt"]
    assert len(bundle[PLOTLY_MIME]["data"]) == 6


def test_bad_arguments(scored: study.ScoredStream, encoder: Encoder, lexicons: Lexicons):
    with pytest.raises(InputError, match="qualty"):
        policy_duel(scored, encoder, lexicons, left="qualty")
    with pytest.raises(InputError, match="Bins"):
        policy_duel(scored, encoder, lexicons, bins=N + 1)
