"""Streams of real people: checked against the package's own data, read here a second time and differently."""

import itertools
import json
import os
import subprocess
import sys
import warnings
import zipfile
from collections import defaultdict
from datetime import datetime
from importlib.metadata import version
from pathlib import Path

import chitchat_dataset
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pllm_helpers.corpora import Stream, chitchat, chitchat_stream, chitchat_users
from pllm_helpers.runtime import InputError

TOP = "31267496-e50f-4f91-a197-c5b1bfde803b"


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """An index of its own for this file, so that nothing depends on earlier runs."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PLLM_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="module")
def expected():
    """(question, answer, seconds) of everybody's pairs, by the plain reading of the data set's own classes."""
    pairs = defaultdict(list)
    for conversation in chitchat_dataset.Dataset().values():
        for before, after in itertools.pairwise(conversation["messages"]):
            question = "\n".join(u["text"].strip() for u in before if u["text"].strip())
            answer = "\n".join(u["text"].strip() for u in after if u["text"].strip())
            assert before[0]["sender"] != after[0]["sender"]
            if answer:
                seconds = datetime.strptime(after[-1]["timestamp"] + "+0000", "%Y-%m-%dT%H:%M:%SZ%z").timestamp()
                pairs[after[0]["sender"]].append((question, answer, seconds))
    return pairs


def test_the_four_most_active_people():
    users = chitchat_users()
    assert [u.pairs for u in users[:4]] == [12216, 11215, 6752, 4427]
    assert users[0].user == TOP


def test_everybody_has_exactly_the_pairs_of_the_data(expected):
    assert {u.user: u.pairs for u in chitchat_users()} == {user: len(pairs) for user, pairs in expected.items()}


def test_people_come_by_activity_then_id():
    users = chitchat_users(0)
    assert len(users) == len({u.user for u in users}) == 1315
    assert users == sorted(users, key=lambda u: (-u.pairs, u.user))
    assert any(a.pairs == b.pairs for a, b in itertools.pairwise(users[:200])), "no tie, so ties are not tested"
    assert [u for u in users if u.pairs >= 500] == chitchat_users(500) != []
    assert min(u.pairs for u in chitchat_users()) == 1 and users[-1].pairs == 0


@pytest.mark.parametrize("rank", [0, 1, 17, 1112])
def test_a_stream_holds_the_persons_pairs_in_time_order(rank, expected):
    user = chitchat_users()[rank].user
    whole = chitchat_stream(rank)
    dialogues = whole.stream + whole.held_out
    assert sorted((d.question, d.answer, d.time) for d in dialogues) == sorted(expected[user])
    assert all(a.time <= b.time for a, b in itertools.pairwise(dialogues))
    assert {d.user for d in dialogues} == {whole.user} == {user}
    assert {d.source for d in dialogues} == {"chitchat"}
    assert all(d.answer.strip() for d in dialogues)


def test_id_and_rank_name_the_same_person():
    assert chitchat_stream(TOP) == chitchat_stream(0)


@pytest.mark.parametrize("share,tail", [(0.2, 2443), (0, 0), (0.5, 6108)])
def test_the_tail_is_later_than_the_stream(share, tail):
    split = chitchat_stream(TOP, held_out=share)
    assert len(split.stream) + len(split.held_out) == 12216
    assert abs(len(split.held_out) - tail) <= 2  # pairs of one second are not torn apart
    if tail:
        assert split.stream[-1].time < split.held_out[0].time


def test_meta_leads_back_to_the_data():
    data = chitchat_dataset.Dataset()
    for dialogue in chitchat_stream(3).held_out[:50]:
        messages = data[dialogue.meta["conversation"]]["messages"]
        turn = dialogue.meta["turn"]
        assert dialogue.answer == "\n".join(u["text"].strip() for u in messages[turn] if u["text"].strip())
        assert dialogue.question.split("\n")[0] == messages[turn - 1][0]["text"].strip()


def test_a_reply_to_a_lost_emoji_keeps_a_blank_question():
    whole = chitchat_stream(TOP)
    blank = [d for d in whole.stream + whole.held_out if not d.question]
    assert [d.answer for d in blank] != [] and all(d.answer for d in blank)


def test_repr_is_short():
    text = repr(chitchat_stream(0))
    assert TOP in text and "9,773" in text and len(text) < 150


@pytest.mark.parametrize(
    "user,message",
    [
        (TOP[:-1] + "c", f"Did you mean '{TOP}'"),
        ("nobody", "expected the id of one of 1,315 people"),
        ("", "chitchat_users"),
        (1113, "rank from 0 to 1112"),
        (-1, "at least 0"),
        (True, "whole number"),
    ],
)
def test_unknown_people(user, message):
    with pytest.raises(InputError, match=message):
        chitchat_stream(user)


def test_a_person_without_pairs_has_no_stream():
    silent = next(u.user for u in chitchat_users(0) if u.pairs == 0)
    with pytest.raises(InputError, match="has none"):
        chitchat_stream(silent)


@pytest.mark.parametrize("share", [1, -0.1, 1.5, float("nan"), True])
def test_bad_shares(share):
    with pytest.raises(InputError, match="held_out"):
        chitchat_stream(0, held_out=share)


def test_negative_activity_is_refused():
    with pytest.raises(InputError, match="min_pairs"):
        chitchat_users(-1)


# ---------------------------------------------------------------- definitions


def utterance(sender, text, second=0):
    return {"sender": sender, "text": text, "timestamp": f"2018-05-01T10:{second // 60:02d}:{second % 60:02d}Z"}


def pairs_of(messages, user):
    members = chitchat._members({"c": {"messages": messages, "prompt": None}})
    for rank, (name, count) in enumerate(members["users.json"]):
        if name == user:
            return [tuple(p[-2:]) for p in members[f"{rank}.json"]["pairs"]] if count else []
    return None


def test_a_run_by_one_person_is_one_turn_even_over_several_messages():
    messages = [
        [utterance("a", "hi")],
        [utterance("a", "you there?")],
        [utterance("b", "yes"), utterance("b", "hello")],
    ]
    assert pairs_of(messages, "b") == [("hi\nyou there?", "yes\nhello")]
    assert pairs_of(messages, "a") == []  # nobody replies to himself


def test_a_message_of_two_senders_is_two_turns():
    messages = [[utterance("a", "ping"), utterance("b", "pong"), utterance("a", "again")]]
    assert pairs_of(messages, "b") == [("ping", "pong")]
    assert pairs_of(messages, "a") == [("pong", "again")]


def test_blank_turns():
    messages = [
        [utterance("a", "hi")],
        [utterance("b", " ")],
        [utterance("a", "?"), utterance("a", "")],
        [utterance("b", "ok")],
    ]
    assert pairs_of(messages, "b") == [("?", "ok")]  # a blank turn is no reply
    assert pairs_of(messages, "a") == [("", "?")]


def test_the_time_is_that_of_the_last_utterance():
    messages = [[utterance("a", "hi", 1)], [utterance("b", "1", 2), utterance("b", "2", 5)]]
    members = chitchat._members({"c": {"messages": messages}})
    assert members["0.json"]["pairs"][0][0] == datetime.fromisoformat("2018-05-01T10:00:05+00:00").timestamp()


SAYINGS = st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from(["", " ", "x", "y y"])), max_size=30)


@given(SAYINGS)
def test_pairs_against_a_slow_reading(sayings):
    messages = [[utterance(who, said, second)] for second, (who, said) in enumerate(sayings)]
    runs = [
        (who, [s.strip() for _, s in run if s.strip()]) for who, run in itertools.groupby(sayings, key=lambda s: s[0])
    ]
    for user in {who for who, _ in sayings}:
        slow = [
            ("\n".join(before), "\n".join(after))
            for (_, before), (who, after) in itertools.pairwise(runs)
            if who == user and after
        ]
        assert pairs_of(messages, user) == slow


@given(st.lists(st.integers(0, 8), min_size=1, max_size=40), st.floats(0, 0.99))
def test_cut_never_tears_a_second_apart(times, share):
    times = sorted(map(float, times))
    cut = chitchat._cut(times, share)
    assert 1 <= cut <= len(times)
    if cut < len(times):
        assert times[cut - 1] < times[cut]
    if share == 0 or times[0] == times[-1]:
        assert cut == len(times)
    else:
        assert cut < len(times), "a tail was possible"
    if len(set(times)) == len(times) > 1 and share > 0:
        assert len(times) - cut == min(max(1, round(len(times) * share)), len(times) - 1)


# ---------------------------------------------------------------- the index


def test_the_index_is_keyed_by_version_and_size(cache):
    chitchat_users()
    data = Path(chitchat_dataset.__file__).with_name("dataset.json")
    (index,) = cache.glob("*")
    assert index.name == f"chitchat-{version('chitchat-dataset')}-{data.stat().st_size}-1.zip"


def test_another_release_is_read_afresh(cache, tmp_path):
    """A package with other data must not be served from the index of this one."""
    package = tmp_path / "site" / "chitchat_dataset"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("", encoding="utf-8")
    chitchat_users()
    data = {"c": {"messages": [[utterance("a", "hi")], [utterance("b", "hello")]]}}
    (package / "dataset.json").write_text(json.dumps(data), encoding="utf-8")
    code = "from pllm_helpers.corpora import *; print(chitchat_users(), chitchat_stream('b').stream[0].answer)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(package.parent), *sys.path])},
        capture_output=True,
        text=True,
        encoding="utf-8",
        check=True,
    )
    assert "pairs=1" in done.stdout and "hello" in done.stdout
    assert len(list(cache.glob("*"))) == 2


@pytest.mark.parametrize("damage", ["truncate", "flip", "garbage", "empty", "member"])
def test_a_damaged_index_is_built_again(cache, damage):
    before = chitchat_stream(0)
    index = max(cache.glob("*"), key=lambda path: path.stat().st_size)
    there = set(cache.iterdir())
    good = index.read_bytes()
    if damage == "truncate":
        index.write_bytes(good[: len(good) // 2])
    elif damage == "flip":  # inside the first person's member: only its checksum can tell
        with zipfile.ZipFile(index) as stored:
            place = stored.getinfo("0.json").header_offset + 2000
        index.write_bytes(good[:place] + bytes([good[place] ^ 0xFF]) + good[place + 1 :])
    elif damage == "garbage":
        index.write_bytes(b"not a zip file" * 100)
    elif damage == "empty":
        index.write_bytes(b"")
    else:
        with zipfile.ZipFile(index, "w") as stored:
            stored.writestr("other.json", "{}")
    with pytest.warns(UserWarning, match="built again"):
        chitchat_stream(0) if damage == "flip" else chitchat_users()
    assert chitchat_stream(0) == before
    assert (index.read_bytes() == good) is True, "the index is the same every time it is built"
    assert set(cache.iterdir()) == there, "no temporary file is left"


def test_a_cache_that_cannot_be_written_costs_time_only(cache, tmp_path, monkeypatch):
    blocked = tmp_path / "file"
    blocked.write_text("", encoding="utf-8")
    monkeypatch.setenv("PLLM_CACHE", str(blocked / "below"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert chitchat_users()[0].pairs == 12216
    assert isinstance(chitchat_stream(0), Stream)


def test_a_missing_package_says_what_to_type(monkeypatch):
    monkeypatch.setitem(sys.modules, "chitchat_dataset", None)
    with pytest.raises(InputError, match="pip install chitchat-dataset"):
        chitchat_users()
