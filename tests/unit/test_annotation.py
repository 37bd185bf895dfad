"""Requests to the user: budget per day, order, skip, undo, restarts, kills; safety labels are no replies."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from datetime import UTC, date, datetime

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from pllm_helpers.annotation import ORDERS, Annotator, GoldReplies, Rules, is_label
from pllm_helpers.corpora import chitchat_stream, load_dialogues
from pllm_helpers.corpora.readers import read_rows
from pllm_helpers.dialogue import DialogueSet
from pllm_helpers.runtime import InputError
from pllm_helpers.selection import DialogueBuffer, FifoReplace

DAY = 86_400.0


def _dialogue(i, *, day=0, question="question", answer="answer", **more):
    return DialogueSet("u", f"{question} {i}", f"{answer} {i}", day * DAY + i, **more)


def _offer(buffer, dialogue, *, eoe=0.5, dss=0.1, domain="d"):
    """The next set of a stream, replacing the oldest where the buffer is full."""
    rng = np.random.default_rng(buffer.position)
    return buffer.offer(
        FifoReplace(), dialogue, embedding=rng.normal(size=8).astype(np.float32), domain=domain, eoe=eoe, dss=dss
    )


def _filled(n, path=None, **more):
    buffer = DialogueBuffer(path, bins=more.pop("bins", n))
    for i in range(n):
        _offer(buffer, _dialogue(i, **more))
    return buffer


def test_gold_replies_up_to_the_budget_then_the_next_day():
    buffer = _filled(7)
    a = Annotator(buffer, GoldReplies(), per_day=3)
    assert a.today() == date(1970, 1, 1)
    first = a.run()
    assert [x.text for x in first] == ["answer 6", "answer 5", "answer 4"]  # newest first
    assert (a.asked(), a.left(), a.ask(), a.run()) == (3, 0, None, [])
    assert [e.dialogue.question for e in a.pending()] == [f"question {i}" for i in (3, 2, 1, 0)]
    assert len(a.run("1970-01-02")) == 3 and len(a.run(date(1970, 1, 3))) == 1 and a.run(DAY * 9) == []
    assert a.pending() == [] and a.asked("1970-01-02") == 3 and a.asked(DAY * 2) == 1
    assert [d.answer for d in a.dialogues()] == [f"answer {i}" for i in range(7)]
    with pytest.raises(InputError, match="this annotator asks a person"):
        Annotator(buffer).run()


def test_only_what_stays_is_asked_about():
    """A stream of 40 sets through 4 bins, annotated once a day: never more than was in the buffer at that time."""
    buffer = DialogueBuffer(bins=4)
    a = Annotator(buffer, GoldReplies(), per_day=2)
    asked = []
    for i in range(40):
        _offer(buffer, _dialogue(i, day=i // 10))
        if i % 10 == 9:
            held = {e.id for e in buffer.entries}
            done = a.run()
            assert len(done) == 2 and {x.id for x in done} <= held
            asked += done
    assert [x.text for x in asked] == [f"answer {i}" for i in (9, 8, 19, 18, 29, 28, 39, 38)]
    # replaced entries keep their annotation in the history, and are no training material any more
    assert [x.text for x in buffer.history()] == [x.text for x in asked]
    assert [d.answer for d in a.dialogues()] == ["answer 38", "answer 39"]
    assert buffer.answer_of(asked[0].id) == "answer 9"


def test_a_real_stream_brings_its_own_days():
    person = chitchat_stream(9).stream[:300]
    buffer = DialogueBuffer(bins=32)
    a = Annotator(buffer, GoldReplies(), per_day=5)
    per_day = {}
    for d in person:
        _offer(buffer, d)
        for x in a.run():
            assert x.text == x.dialogue.answer
            per_day[a.today()] = per_day.get(a.today(), 0) + 1
    assert (
        len(per_day) > 1
        and max(per_day.values()) == 5
        and set(per_day) <= {datetime.fromtimestamp(d.time, UTC).date() for d in person}
    )
    assert all(a.asked(day) == n for day, n in per_day.items())


def test_orders_are_documented_and_survive_a_restart(tmp_path):
    path = tmp_path / "b.db"
    scores = [(0.2, 0.9), (0.9, 0.1), (0.5, 0.5), (0.9, 0.4)]
    with DialogueBuffer(path, bins=4) as buffer:
        for i, (eoe, dss) in enumerate(scores):
            _offer(buffer, _dialogue(i), eoe=eoe, dss=dss, domain=f"d{i}")

    def order(name, seed=0):
        with DialogueBuffer(path) as buffer:
            return [e.position for e in Annotator(buffer, order=name, seed=seed).pending()]

    assert order("newest") == [3, 2, 1, 0] and order("oldest") == [0, 1, 2, 3]
    assert order("eoe") == [3, 1, 2, 0] and order("dss") == [0, 2, 3, 1]  # ties to the newest
    assert order("idd") == [3, 2, 1, 0]  # each alone in its domain: all 1
    assert order("random") == order("random") and sorted(order("random")) == [0, 1, 2, 3]
    assert len({tuple(order("random", s)) for s in range(6)}) > 1
    assert set(ORDERS) == {"newest", "oldest", "score", "eoe", "dss", "idd", "random"}


def test_score_order_is_the_mean_rank():
    buffer = DialogueBuffer(bins=3)
    for i, (eoe, dss) in enumerate([(0.1, 0.2), (0.8, 0.9), (0.9, 0.1)]):
        _offer(buffer, _dialogue(i), eoe=eoe, dss=dss, domain=f"d{i}")
    # ranks (eoe, dss; idd equal): 0 -> 0 + 1/2, 1 -> 1/2 + 1, 2 -> 1 + 0
    assert [e.position for e in Annotator(buffer, order="score").pending()] == [1, 2, 0]


def test_skip_and_undo_give_the_request_back():
    buffer = _filled(4)
    a = Annotator(buffer, per_day=2)
    newest = a.ask()
    a.skip(newest)
    assert newest.id not in {e.id for e in a.pending()} and a.left() == 1 and a.dialogues() == []
    second = a.ask()
    a.answer(second, "my own words")
    assert a.left() == 0 and a.ask() is None
    with pytest.raises(InputError, match="at most 2 requests a day, they are used up on 1970-01-01"):
        a.answer(a.pending()[0], "too many")
    a.answer(second, "corrected")  # costs nothing
    a.answer(newest.id, "after all")  # it was asked about already
    assert [d.answer for d in a.dialogues()] == ["corrected", "after all"]
    assert a.undo().text == "after all" and a.undo().text == "corrected"
    assert [d.answer for d in a.dialogues()] == ["my own words"] and a.left() == 0
    assert a.undo().text == "my own words" and a.left() == 1
    assert a.undo().kind == "skip" and a.left() == 2 and a.undo() is None
    assert [e.id for e in a.pending()][:2] == [newest.id, second.id]


def test_undo_gives_back_to_the_day_on_which_it_was_asked():
    a = Annotator(_filled(3), per_day=2)
    a.answer(a.ask(), "x", "2024-03-01")
    a.answer(a.ask(), "y", "2024-03-02")
    a.undo()
    assert (a.asked("2024-03-01"), a.asked("2024-03-02")) == (1, 0)


def test_an_entry_replaced_while_the_person_types():
    buffer = _filled(2)
    a = Annotator(buffer, order="oldest")
    shown = a.ask()
    _offer(buffer, _dialogue(7))
    assert shown.id not in {e.id for e in buffer.entries}
    a.answer(shown, "late")
    assert buffer.answer_of(shown.id) == "late" and a.dialogues() == [] and a.asked() == 1
    with pytest.raises(InputError, match="id of a buffered set"):
        a.answer("0" * 16, "nobody")


def test_rules_and_their_faults():
    def polite(d):
        return f"Thank you. {d.answer}" if d.question.endswith(("0", "1")) else None

    a = Annotator(_filled(3), Rules(polite), per_day=None)
    assert a.left() is None
    assert [(x.kind, x.text) for x in a.run()] == [
        ("skip", None),
        ("answer", "Thank you. answer 1"),
        ("answer", "Thank you. answer 0"),
    ]
    assert [d.answer for d in a.dialogues()] == ["Thank you. answer 0", "Thank you. answer 1"]
    with pytest.raises(InputError, match="expected a reply or None from it, got int"):
        Annotator(_filled(1), Rules(lambda d: 3)).run()


@pytest.mark.parametrize(
    ("given", "what"),
    [
        ({"per_day": 0}, "per_day"),
        ({"per_day": True}, "per_day"),
        ({"order": "best"}, "order"),
        ({"clock": lambda: float("nan")}, "day"),
        ({"clock": lambda: -5}, "day"),
    ],
)
def test_bad_settings(given, what):
    with pytest.raises(InputError, match=what):
        Annotator(_filled(1), GoldReplies(), **given).run()


def test_bad_days_and_blank_answers():
    a = Annotator(_filled(1))
    for day in ("tomorrow", float("inf"), -1.0):
        with pytest.raises(InputError, match="day"):
            a.asked(day)
    with pytest.raises(InputError, match="expected a reply"):
        a.answer(a.ask(), " \n")
    assert a.asked() == 0 and a.buffer.history() == []
    assert a.asked(datetime(1970, 1, 1, 23, tzinfo=UTC)) == 0


def test_the_clock_decides_where_sets_have_no_time():
    buffer = DialogueBuffer(bins=2)
    for i in range(2):
        _offer(buffer, replace(_dialogue(i), time=None))
    now = [DAY * 100]
    a = Annotator(buffer, GoldReplies(), per_day=1, clock=lambda: now[0])
    assert len(a.run()) == 1 and a.run() == []
    now[0] += DAY
    assert len(a.run()) == 1 and a.asked() == 1
    assert Annotator(buffer).today() == datetime.now(UTC).date()


def test_other_scripts_emoji_blank_questions_and_surrogates(tmp_path):
    texts = ["日本語の返事", "نعم بالتأكيد", "👍🏽👍🏽", "x\x00y", "\ud83d"]
    path = tmp_path / "b.db"
    with DialogueBuffer(path, bins=8) as buffer:
        for i, t in enumerate(texts):
            _offer(buffer, DialogueSet("u", f"q{i}", t, float(i)))
        _offer(buffer, DialogueSet("u", " ", "a reply to nothing", 9.0))
        a = Annotator(buffer, GoldReplies())
        a.run()
        assert len(buffer) == 6
    with DialogueBuffer(path) as buffer:
        assert [d.answer for d in Annotator(buffer).dialogues()] == texts


# ---------------------------------------------------------------- safety labels


def test_labels_are_refused_and_replies_are_not():
    label = DialogueSet("prosocial", "I pushed a kid.", "needs_intervention", 0.0, "prosocial_dialog")
    assert is_label(label)
    assert is_label(DialogueSet("me", "q", "__probably_needs_caution__"))
    assert is_label(DialogueSet("prosocial", "q", "casual"))
    assert is_label(DialogueSet("me", "q", "anything", meta={"response_is": "safety label, NOT the guiding reply"}))
    assert is_label(DialogueSet("me", "q", "__casual__", meta={"safety_label": "__casual__"}))
    for answer in ("casual", "needs caution", "Please be careful.", "it needs_caution tape"):
        assert not is_label(DialogueSet("me", "how should I dress?", answer, 0.0, "chitchat"))
    assert not is_label(DialogueSet("prosocial", "q", "Don't.", meta={"safety_label": "__needs_caution__"}))
    buffer = DialogueBuffer(bins=1)
    _offer(buffer, label)
    with pytest.raises(InputError, match="safety label 'needs_intervention'.*authored family"):
        Annotator(buffer, GoldReplies()).run()
    assert buffer.history() == []
    # a person may answer such a set; then it is training material, and no label any more
    a = Annotator(buffer)
    a.answer(a.ask(), "Go and see how he is.")
    assert not is_label(a.dialogues()[0])


def test_labels_of_the_shared_data(shared_data):
    """However rows of labels come in, as such or stripped of their marks, none becomes an annotation."""
    path = shared_data / "prosocial_contexts.jsonl.gz"
    rows = [r.value for r in read_rows(path, "uniform")]
    assert len(rows) == 2000
    for row in rows:
        with_marks = DialogueSet("prosocial", row["instruction"], row["response"], None, row["source"], row["meta"])
        without = DialogueSet("prosocial", row["instruction"], row["response"])
        assert is_label(with_marks) and is_label(without)
        assert is_label(DialogueSet("u", row["instruction"], row["response"], meta=row["meta"]))
    for name in ("prosocial", "uniform"):
        kept = load_dialogues(name, path, keep_unanswered=True)
        assert len(kept) > 1900 and not any(d.answer for d in kept)
        buffer = DialogueBuffer(bins=16)
        for d in kept[:16]:
            _offer(buffer, d)
        a = Annotator(buffer, GoldReplies(), per_day=None)
        assert {x.kind for x in a.run()} == {"skip"} and a.dialogues() == []


def test_no_real_reply_is_taken_for_a_label(shared_data):
    real = load_dialogues("prosocial", shared_data / "prosocial_full_tiny.jsonl.gz")
    assert len(real) == 12 and not any(is_label(d) for d in real)
    for name in ("alpaca", "empathetic_dialogues", "daily_dialog", "dolly", "synthetic_persona_chat", "sst2"):
        assert not any(is_label(d) for d in load_dialogues("uniform", shared_data / f"{name}.jsonl.gz", limit=200))
    assert not any(is_label(d) for d in load_dialogues("prosocial"))
    assert not any(is_label(d) for d in chitchat_stream(5).stream)


# ---------------------------------------------------------------- restarts and kills


def test_everything_survives_a_restart(tmp_path):
    path = tmp_path / "b.db"
    buffer = _filled(5, path)
    a = Annotator(buffer, per_day=3)
    a.answer(a.ask(), "one")
    a.skip(a.ask())
    buffer.close()
    with DialogueBuffer(path) as buffer:
        a = Annotator(buffer, GoldReplies(), per_day=3)
        assert a.asked() == 2 and [d.answer for d in a.dialogues()] == ["one"] and len(a.pending()) == 3
        assert len(a.run()) == 1
        a.undo(), a.undo()
    with DialogueBuffer(path) as buffer:
        a = Annotator(buffer, per_day=3)
        assert a.asked() == 1 and len(a.pending()) == 4 and [x.text for x in buffer.history()] == ["one"]


class _Model(RuleBasedStateMachine):
    """Any sequence of answers, skips, undos, days, newcomers and restarts against a plain list."""

    def __init__(self):
        super().__init__()
        import tempfile

        self.folder = tempfile.TemporaryDirectory()
        self.path = f"{self.folder.name}/b.db"
        self.buffer = _filled(3, self.path, bins=4)
        self.count, self.day, self.actions = 3, 10, []
        self.annotator = Annotator(self.buffer, per_day=2)

    def teardown(self):
        self.buffer.close()
        self.folder.cleanup()

    @property
    def now(self):
        return self.day * DAY

    def _asked_today(self):
        first = {}
        for id, _, day in self.actions:
            first.setdefault(id, day)
        return sum(d == self.day for d in first.values())

    @rule(place=st.integers(0, 3), text=st.sampled_from(["a", "b", None]))
    def act(self, place, text):
        entry = self.buffer.entries[place % len(self.buffer)]
        new = entry.id not in {id for id, _, _ in self.actions}
        call = self.annotator.skip if text is None else lambda e, d: self.annotator.answer(e, text, d)
        if new and self._asked_today() >= 2:
            with pytest.raises(InputError, match="used up"):
                call(entry, self.now)
        else:
            call(entry, self.now)
            self.actions.append((entry.id, text, self.day))

    @precondition(lambda self: self.actions)
    @rule()
    def undo(self):
        id, text, _ = self.actions.pop()
        last = self.annotator.undo()
        assert (last.id, last.text) == (id, text)

    @rule()
    def tomorrow(self):
        self.day += 1

    @rule()
    def newcomer(self):
        _offer(self.buffer, _dialogue(self.count))
        self.count += 1

    @rule()
    def restart(self):
        self.buffer.close()
        self.buffer = DialogueBuffer(self.path)
        self.annotator = Annotator(self.buffer, per_day=2)

    @invariant()
    def agrees(self):
        state = {id: text for id, text, _ in self.actions}
        assert [(x.id, x.text) for x in self.buffer.history()] == [(id, text) for id, text, _ in self.actions]
        assert {e.id for e in self.annotator.pending()} == {e.id for e in self.buffer.entries} - set(state)
        assert [d.answer for d in self.annotator.dialogues()] == [
            state[e.id] for e in self.buffer.entries if state.get(e.id)
        ]
        assert self.annotator.asked(self.now) == self._asked_today()


TestAnyOrderOfActions = _Model.TestCase
TestAnyOrderOfActions.settings = settings(max_examples=15, stateful_step_count=25, deadline=None)


# A child answers, skips and undoes by a fixed script, tells each step when it has returned, and is
# killed at a random moment. The next child goes on from what the file says.
_KILL = """
import json, os, random, signal, sys, time
from pllm_helpers.annotation import Annotator
from pllm_helpers.selection import DialogueBuffer

path, kills, steps = sys.argv[1], int(sys.argv[2]), 120

def script(buffer, a, start):
    for step in range(start, steps):
        rng = random.Random(step)
        day = f"2024-01-{1 + step // 10:02d}"
        history = buffer.history()
        if step % 7 == 6 and history:
            a.undo()
        else:
            left = a.pending() or buffer.entries
            entry = left[rng.randrange(len(left))]
            if rng.random() < 0.25:
                a.skip(entry, day)
            else:
                a.answer(entry, f"step {step} " + "x" * rng.randrange(400), day)
        yield step

class Counting(Annotator):
    # counts its steps in the same transaction as the action
    def _counted(self, what, day):
        return {**super()._counted(what, day), "steps": self.buffer.state("steps", 0) + 1}

    def undo(self):
        days = self._days(len(self.buffer.history()))
        from pllm_helpers.annotation import _STATE, _packed
        return self.buffer.undo_last(state={_STATE: _packed(days[:-1]), "steps": self.buffer.state("steps", 0) + 1})

def child(write):
    with DialogueBuffer(path) as buffer:
        a = Counting(buffer, per_day=None)
        for step in script(buffer, a, buffer.state("steps", 0)):
            os.write(write, f"{step} {buffer.digest()}\\n".encode())

def dump():
    with DialogueBuffer(path) as buffer:
        a = Annotator(buffer)
        days = {f"2024-01-{d:02d}": a.asked(f"2024-01-{d:02d}") for d in range(1, 13)}
        return {"steps": buffer.state("steps", 0), "digest": buffer.digest(), "days": days,
                "history": [[x.number, x.id, x.text] for x in buffer.history()],
                "answers": [d.answer for d in a.dialogues()]}

rng, done, trials, landed = random.Random(int(sys.argv[3])), 0, 0, 0
digests = {}
while True:
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(read)
        try:
            child(write)
        finally:
            os._exit(0)
    os.close(write)
    if trials < kills:
        # after a random number of acknowledged steps and a random moment more
        wanted, told = rng.randrange(1, max(2, steps // kills)), b""
        while told.count(b"\\n") < wanted and (more := os.read(read, 65536)):
            told += more
        time.sleep(rng.random() * 0.004)
        os.kill(pid, signal.SIGKILL)
    else:
        told = b""
    while more := os.read(read, 65536):
        told += more
    os.waitpid(pid, 0)
    os.close(read)
    for line in told.decode().splitlines():
        step, digest = line.split()
        digests[int(step)] = digest
        done = int(step) + 1
    state = dump()
    assert done <= state["steps"] <= done + 1, (done, state["steps"])  # nothing acknowledged is lost
    if state["steps"] == done:
        assert state["digest"] == digests[done - 1]
    done = state["steps"]
    trials += 1
    if state["steps"] == steps:
        break
print(json.dumps({**dump(), "trials": trials}))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_kill_at_random_moments_of_annotation(tmp_path):
    """Ten kills; the resumed result equals an uninterrupted one, bit by bit."""
    results = []
    for name, kills in (("killed", 10), ("whole", 0)):
        path = tmp_path / f"{name}.db"
        _filled(20, path).close()
        run = subprocess.run(
            [sys.executable, "-c", _KILL, str(path), str(kills), "5"], capture_output=True, text=True, timeout=240
        )
        assert run.returncode == 0, run.stderr
        results.append(json.loads(run.stdout))
    killed, whole = results
    assert killed.pop("trials") >= 8 and whole.pop("trials") == 1
    assert killed == whole and killed["steps"] == 120 and sum(killed["days"].values()) > 0
