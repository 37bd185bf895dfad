"""The buffer: budget, exactness, one transaction a decision, annotations, bad input and broken files."""

import json
import os
import shutil
import sqlite3
import subprocess
import sys
import textwrap

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pllm_helpers.dialogue import DialogueSet
from pllm_helpers.runtime import InputError
from pllm_helpers.selection import (
    BIN_BYTES,
    METRICS,
    POLICIES,
    DialogueBuffer,
    DomainMeans,
    Policy,
    QualityPolicy,
    in_domain_dissimilarity,
    run_stream,
)
from pllm_helpers.selection.buffer import grid_bits, on_grid
from tests.unit.streams import random_stream, real_stream


def stream_for(key, n=120, seed=0, d=16):
    return random_stream(n, seed=seed, d=d, mode="released_code" if key == "released_code" else "paper")


def offer(buffer, dialogue, policy="random", *, embedding=(1.0, 0.0, 0.0), domain=None, eoe=0.5, dss=0.5):
    policy = POLICIES[policy]() if isinstance(policy, str) else policy
    return buffer.offer(
        policy, dialogue, embedding=np.array(embedding, dtype=np.float32), domain=domain, eoe=eoe, dss=dss
    )


def sets(*texts):
    return [DialogueSet("u", t, "", i) for i, t in enumerate(texts)]


# ---------------------------------------------------------------- budget and slots


@pytest.mark.parametrize("key", POLICIES)
def test_never_more_than_the_bins_and_entries_in_slot_order(key):
    dialogues, table = stream_for(key)
    with DialogueBuffer(bins=7) as buffer:
        seen = []
        for i in range(1, len(dialogues) + 1):
            (decision,) = run_stream(buffer, key, dialogues, table, stop=i)
            seen.append(decision)
            assert len(buffer) == min(i, 7) and buffer.position == i
            assert [e.slot for e in buffer] == list(range(len(buffer)))
            assert buffer.bytes_used <= buffer.bytes_reserved == 7 * BIN_BYTES
        assert [d.action for d in seen[:7]] == ["insert"] * 7 and "insert" not in [d.action for d in seen[7:]]
        for d in seen:
            assert (d.slot is None) == (d.action == "discard") and (d.replaced is None) == (d.action != "replace")
            assert d.reason


def test_entry_holds_what_was_offered():
    dialogues, table = random_stream(5)
    with DialogueBuffer(bins=5) as buffer:
        run_stream(buffer, "fifo", dialogues, table)
        for i, e in enumerate(buffer):
            assert (e.dialogue, e.domain, e.position, e.annotation) == (dialogues[i], table.domain_names[i], i, None)
            assert e.embedding.dtype == np.float32 and np.array_equal(e.embedding, table.embeddings[i])
            assert (e.scores["eoe"], e.scores["dss"]) == (table.eoe[i], table.dss[i])
            assert set(e.scores) == set(METRICS)


def test_set_too_large_for_a_bin_is_not_stored():
    giant, small = DialogueSet("u", "word " * 20_000, "yes"), DialogueSet("u", "hi", "hello")
    with DialogueBuffer(bins=2) as buffer:
        decision = offer(buffer, giant)
        assert (decision.action, len(buffer), buffer.position) == ("discard", 0, 1)
        assert decision.reason.startswith("too large: 100,") and "22,528" in decision.reason
        assert offer(buffer, small).action == "insert"
    with DialogueBuffer(bins=2, bin_bytes=10) as tight:
        assert "too large" in offer(tight, small).reason


def test_bin_counts_bytes_not_characters():
    latin, greek = (DialogueSet("u", c * 6000, "") for c in "aα")
    with DialogueBuffer(bins=2, bin_bytes=8000) as buffer:
        assert offer(buffer, latin).action == "insert"
        assert "too large" in offer(buffer, greek).reason


def test_twin_in_the_buffer_is_a_duplicate_but_may_come_back_later():
    a, b, c = sets("one", "two", "three")
    with DialogueBuffer(bins=2) as buffer:
        actions = [offer(buffer, d, "fifo") for d in (a, b, a, c, a)]
    assert [d.action for d in actions] == ["insert", "insert", "discard", "replace", "replace"]
    assert actions[2].reason == "duplicate of slot 0"


def test_same_stream_twice_is_refused_duplicate_by_duplicate():
    dialogues, table = random_stream(6)
    with DialogueBuffer(bins=6) as buffer:
        twice = [run_stream(buffer, "random", dialogues, table), []]
        for i, d in enumerate(dialogues):
            e = table.embeddings[i]
            decision = buffer.offer(
                POLICIES["random"](), d, embedding=e, domain=table.domain_names[i], eoe=table.eoe[i], dss=table.dss[i]
            )
            twice[1].append(decision)
    assert [d.reason for d in twice[1]] == [f"duplicate of slot {i}" for i in range(6)]


# ---------------------------------------------------------------- exact sums


@given(st.integers(0, 10_000), st.integers(1, 12))
@settings(max_examples=40, deadline=None)
def test_sums_on_the_grid_do_not_depend_on_order(seed, d):
    rng = np.random.default_rng(seed)
    vectors = [on_grid(v, 20) for v in rng.normal(size=(60, d))]
    order = rng.permutation(60)
    assert np.array_equal(sum(vectors), sum(vectors[i] for i in order))
    total = sum(vectors)
    for i in order[:59]:
        total = total - vectors[i]
    assert np.array_equal(total, vectors[order[59]])


def test_grid_is_fine_enough_and_small_enough():
    v = np.random.default_rng(0).normal(size=384)
    exact = v / np.linalg.norm(v)
    assert np.abs(on_grid(v, 20) - exact).max() <= 2.0**-21
    assert [grid_bits(b) for b in (1, 64, 1000, 4095, 4096, 1_000_000)] == [20, 20, 20, 20, 19, 16]
    for bins in (1, 64, 4095, 100_000):  # a dot product with a sum of all bins fits into 53 digits
        assert 2 * grid_bits(bins) + np.log2(bins) < 53


@pytest.mark.parametrize("mode", ["paper", "released_code"])
def test_idd_agrees_with_the_formula_after_many_replacements(mode):
    dialogues, table = random_stream(400, mode=mode)
    policy = Always()
    with DialogueBuffer(bins=20) as buffer:
        decisions = [run_stream(buffer, policy, dialogues, table, stop=i)[0] for i in range(1, 200)]
        means = DomainMeans()
        for e in buffer:
            means.add(e.embedding, e.domain)
        assert set(means.counts.items()) == set(buffer._means.counts.items())
        for name, total in means.sums.items():
            assert np.allclose(total, buffer._means.sums[name], atol=1e-4)
        before = buffer.entries
        last = run_stream(buffer, policy, dialogues, table, stop=200)[0]
        same = [e.embedding for e in before if e.domain == last.domain]
        assert last.scores["idd"] == pytest.approx(
            in_domain_dissimilarity(table.embeddings[199], same, mode=mode), abs=2e-6
        )
        for e, value in zip(buffer, buffer.present_idd(mode), strict=True):
            others = [o.embedding for o in buffer if o.domain == e.domain and o.slot != e.slot]
            assert value == pytest.approx(in_domain_dissimilarity(e.embedding, others, mode=mode), abs=2e-6)
    assert sum(d.action == "replace" for d in decisions) == 179


class Always(Policy):
    """Replaces a random slot, always."""

    name = "always"

    def choose(self, new, buffer, rng):
        return int(rng.integers(buffer.capacity))


def test_cosines_among_entries_stay_those_of_the_entries():
    dialogues, table = random_stream(300)
    with DialogueBuffer(bins=12) as buffer:
        run_stream(buffer, Always(), dialogues, table, stop=20)
        buffer._similarity_matrix()
        for stop in range(21, 300):
            run_stream(buffer, Always(), dialogues, table, stop=stop)
            expected = buffer._vectors @ buffer._vectors.T
            np.fill_diagonal(expected, -np.inf)
            assert np.array_equal(buffer._gram, expected)
            assert np.array_equal(buffer._nearest, expected.max(1))


# ---------------------------------------------------------------- the file


@pytest.mark.parametrize("key", POLICIES)
def test_interrupted_stream_gives_the_same_bits_as_an_uninterrupted_one(key, tmp_path):
    dialogues, table = stream_for(key, 150)
    with DialogueBuffer(bins=9, seed=3) as whole:
        run_stream(whole, key, dialogues, table)
        digests = whole.digest()
    path = tmp_path / "b.db"
    for stop in (0, 5, 9, 10, 60, 61, 149, 150, None):
        with DialogueBuffer(path, bins=9, seed=3) as part:
            run_stream(part, key, dialogues, table, stop=stop)
    with DialogueBuffer(path) as part:
        assert part.digest() == digests
    assert not (tmp_path / "b.db-wal").exists(), "closing writes the log back"


@pytest.mark.parametrize("key", ["quality", "random", "kcenter", "facility", "released_code"])
def test_real_person_in_a_file_and_in_memory(key, tmp_path):
    dialogues, table = real_stream(0)
    if key == "released_code":
        from dataclasses import replace

        table = replace(table, mode="released_code")
    with DialogueBuffer(bins=32) as memory:
        run_stream(memory, key, dialogues, table)
        digest = memory.digest()
    with DialogueBuffer(tmp_path / "b.db", bins=32) as file:
        run_stream(file, key, dialogues, table, stop=100)
    with DialogueBuffer(tmp_path / "b.db") as file:
        run_stream(file, key, dialogues, table)
        assert file.digest() == digest and file.position == len(dialogues)


def test_seed_decides_and_nothing_else_does():
    dialogues, table = random_stream(100)
    digests = {}
    for seed in (0, 0, 1):
        with DialogueBuffer(bins=8, seed=seed) as buffer:
            run_stream(buffer, "quality", dialogues, table)
            digests.setdefault(seed, set()).add(buffer.digest())
    assert len(digests[0]) == 1 and digests[0] != digests[1]


def test_insert_is_flushed_to_disk_and_a_discard_is_not(tmp_path):
    with DialogueBuffer(tmp_path / "b.db", bins=1) as buffer:
        level = lambda: buffer._store.connection.execute("PRAGMA synchronous").fetchone()[0]  # noqa: E731
        first, second = sets("one", "two")
        offer(buffer, first)
        assert level() == 2, "FULL"
        assert buffer._store.connection.execute("PRAGMA journal_mode").fetchone()[0] == "wal"
        offer(buffer, first)  # a duplicate
        assert level() == 1, "NORMAL"
        buffer.annotate(buffer.entries[0], "yes")
        assert level() == 2


def test_second_writer_is_refused_at_once_in_this_and_another_process(tmp_path):
    path = tmp_path / "b.db"
    code = f"""
        from pllm_helpers.selection import DialogueBuffer
        from pllm_helpers.runtime import InputError
        try:
            DialogueBuffer({str(path)!r})
        except InputError as e:
            print(e)
    """
    with DialogueBuffer(path, bins=2) as buffer:
        with pytest.raises(InputError, match=r"b\.db for this buffer alone, it is open elsewhere"):
            DialogueBuffer(path)
        out = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=60)
        assert "open elsewhere" in out.stdout, out.stderr
        offer(buffer, sets("still works")[0])
    with DialogueBuffer(path) as again:
        assert len(again) == 1


def test_settings_of_the_file_count(tmp_path):
    path = tmp_path / "b.db"
    DialogueBuffer(path, bins=3, bin_bytes=4096, seed=7).close()
    with DialogueBuffer(path) as buffer:
        assert (buffer.capacity, buffer.bin_bytes, buffer.seed) == (3, 4096, 7)
    for wrong in ({"bins": 4}, {"seed": 0}, {"bin_bytes": BIN_BYTES}):
        with pytest.raises(InputError, match="as .*b.db was made with"):
            DialogueBuffer(path, **wrong)
    with DialogueBuffer(path, bins=3):
        pass  # a refused opening let go of the file


@pytest.mark.parametrize("bad", [{"bins": 0}, {"bins": -1}, {"seed": -1}, {"bin_bytes": 0}, {"bins": True}])
def test_bad_settings(bad):
    with pytest.raises(InputError, match=f"^{next(iter(bad))}: expected a whole number"):
        DialogueBuffer(**bad)


def test_another_policy_or_stream_is_refused(tmp_path):
    dialogues, table = random_stream(40)
    path = tmp_path / "b.db"
    with DialogueBuffer(path, bins=4) as buffer:
        run_stream(buffer, "quality", dialogues, table, stop=20)
        before = buffer.digest()
    with DialogueBuffer(path) as buffer:
        with pytest.raises(InputError, match="policy.*'quality'.*'fifo'"):
            run_stream(buffer, "fifo", dialogues, table)
        with pytest.raises(InputError, match=r"policy.*metrics.*eoe"):
            run_stream(buffer, QualityPolicy(("eoe",)), dialogues, table)
        others, other_table = random_stream(40, seed=1)
        with pytest.raises(InputError, match="first 20 sets"):
            run_stream(buffer, "quality", others, table)
        with pytest.raises(InputError, match="first 20 sets"):
            run_stream(buffer, "quality", dialogues, other_table)
        with pytest.raises(InputError, match="first 20 sets"):
            run_stream(buffer, "quality", *random_stream(10))
        with pytest.raises(InputError, match="expected 39 rows"):
            run_stream(buffer, "quality", dialogues[:39], table)
        assert buffer.digest() == before
        longer = [*dialogues, *others]
        grown = type(table)(
            *(
                np.concatenate([getattr(t, f) for t in (table, other_table)])
                for f in ("eoe", "dss", "domain", "embeddings", "n_tokens", "n_words")
            ),
            table.lexicons,
            table.reading,
        )
        run_stream(buffer, "quality", longer, grown)  # the stream may have grown
        assert buffer.position == 80
        with pytest.raises(InputError, match="policy"):
            run_stream(buffer, "fifo", longer, grown)  # although nothing is left to decide


# ---------------------------------------------------------------- broken files, full disks


def filled(path, n=40):
    dialogues, table = random_stream(n, d=300)
    with DialogueBuffer(path, bins=30) as buffer:
        run_stream(buffer, "quality", dialogues, table)
        buffer.annotate(buffer.entries[0], "a reply")
        return buffer.digest()


def test_garbage_empty_and_foreign_files_are_refused_and_left_alone(tmp_path):
    garbage, empty, foreign = tmp_path / "garbage.db", tmp_path / "empty.db", tmp_path / "foreign.db"
    garbage.write_bytes(os.urandom(10_000))
    empty.touch()
    other = sqlite3.connect(foreign)
    other.executescript("CREATE TABLE t (a); INSERT INTO t VALUES (1)")
    other.close()
    for path, why in ((garbage, "damaged"), (empty, "is empty"), (foreign, "another SQLite database")):
        before = path.read_bytes()
        with pytest.raises(InputError, match=f"{path.name}.*{why}|{why}.*{path.name}"):
            DialogueBuffer(path)
        assert path.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty.db", "foreign.db", "garbage.db"]


def test_no_folder_no_file_name_or_another_version(tmp_path):
    with pytest.raises(InputError, match="Create it first"):
        DialogueBuffer(tmp_path / "no" / "b.db")
    with pytest.raises(InputError, match="got the folder"):
        DialogueBuffer(tmp_path)
    path = tmp_path / "b.db"
    filled(path)
    c = sqlite3.connect(path)
    c.execute("PRAGMA user_version = 99")
    c.close()
    with pytest.raises(InputError, match=r"version 1 .*got 99"):
        DialogueBuffer(path)


def test_every_truncation_is_noticed(tmp_path):
    path, copy = tmp_path / "b.db", tmp_path / "copy.db"
    filled(path)
    data = path.read_bytes()
    for share in (0.05, 0.3, 0.5, 0.8, 0.97):
        copy.write_bytes(data[: int(len(data) * share)])
        with pytest.raises(InputError, match="Restore a copy"):
            DialogueBuffer(copy)
        assert copy.stat().st_size == int(len(data) * share)


def test_no_flipped_bit_gives_a_silently_wrong_buffer(tmp_path):
    path, copy = tmp_path / "b.db", tmp_path / "copy.db"
    digest = filled(path)
    data, rng = path.read_bytes(), np.random.default_rng(0)
    refused = 0
    for place in rng.integers(100, len(data), 150):  # the first 100 bytes are SQLite's own header
        flipped = bytearray(data)
        flipped[place] ^= 1 << int(rng.integers(8))
        copy.write_bytes(flipped)
        try:
            with DialogueBuffer(copy) as buffer:
                assert buffer.digest() == digest, f"byte {place}"  # it hit free space
        except InputError as e:
            refused += 1
            assert "copy.db" in str(e)
        for leftover in tmp_path.glob("copy.db-*"):
            leftover.unlink()
    assert refused > 20


def test_a_log_without_its_file_is_not_mixed_into_a_new_one(tmp_path):
    path = tmp_path / "b.db"
    path.with_name("b.db-wal").write_bytes(b"x" * 100)
    with pytest.raises(InputError, match="found only the log"):
        DialogueBuffer(path)


def test_full_disk_loses_nothing_and_the_same_buffer_goes_on(tmp_path):
    dialogues, table = random_stream(200, d=300)
    with DialogueBuffer(bins=100) as whole:
        run_stream(whole, "random", dialogues, table)
        digest = whole.digest()
    with DialogueBuffer(tmp_path / "b.db", bins=100) as buffer:
        run_stream(buffer, "random", dialogues, table, stop=10)
        c = buffer._store.connection
        pages = c.execute("PRAGMA page_count").fetchone()[0]
        c.execute(f"PRAGMA max_page_count = {pages + 10}")
        with pytest.raises(InputError, match=r"room to write .*b\.db.*full.*Nothing acknowledged is lost"):
            run_stream(buffer, "random", dialogues, table)
        stopped, ids = buffer.position, [e.id for e in buffer]
        assert 10 < stopped < 100 and ids == [d.id for d in dialogues[:stopped]]
        with pytest.raises(InputError, match="full"):
            for e in buffer:
                buffer.annotate(e, "w" * 5000)
        kept = [a.text for a in buffer.history()]
        c.execute("PRAGMA max_page_count = 1000000")
        assert [e.annotation for e in buffer if e.annotation] == kept
        for _ in kept:
            buffer.undo_last()
        run_stream(buffer, "random", dialogues, table)
        assert buffer.digest() == digest
    with DialogueBuffer(tmp_path / "b.db") as buffer:
        assert buffer.digest() == digest


def test_full_disk_of_the_operating_system(tmp_path):
    """The same with a limit that the kernel sets: the log cannot grow."""
    code = """
        import json, resource, sys
        from pllm_helpers.runtime import InputError
        from pllm_helpers.selection import DialogueBuffer, run_stream
        from tests.unit.streams import random_stream
        dialogues, table = random_stream(200, d=300)
        buffer = DialogueBuffer(sys.argv[1], bins=100)
        resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, resource.RLIM_INFINITY))
        acknowledged = []
        try:
            run_stream(buffer, "random", dialogues, table, on_decision=lambda d: acknowledged.append(d.position))
        except InputError as e:
            message = str(e)
        stopped = buffer.position
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        run_stream(buffer, "random", dialogues, table)
        print(json.dumps([message, len(acknowledged), stopped, buffer.digest()]))
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path / "b.db")]
    out = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert out.returncode == 0, out.stderr
    message, acknowledged, stopped, digest = json.loads(out.stdout)
    assert "b.db" in message and "full" in message and 5 < acknowledged == stopped < 200
    dialogues, table = random_stream(200, d=300)
    with DialogueBuffer(bins=100) as whole:
        run_stream(whole, "random", dialogues, table)
        assert whole.digest() == digest
    with DialogueBuffer(tmp_path / "b.db") as again:
        assert again.digest() == digest


def test_read_only_file_and_folder(tmp_path):
    path = tmp_path / "b.db"
    filled(path)
    tmp_path.chmod(0o555)
    path.chmod(0o444)
    code = f"""
        import os, sys
        from pllm_helpers.selection import DialogueBuffer
        from pllm_helpers.runtime import InputError
        if os.geteuid() == 0:
            os.setgroups([]); os.setgid(65534); os.setuid(65534)
        for name in ("b.db", "new.db"):
            try:
                DialogueBuffer(os.path.join({str(tmp_path)!r}, name))
            except InputError as e:
                print(e)
    """
    parents = [p for p in tmp_path.parents if p.stat().st_uid == os.geteuid() and p != p.parent]
    modes = {p: p.stat().st_mode for p in parents}
    try:
        for p in parents:  # another user must reach the folder
            if not modes[p] & 0o001:
                p.chmod(modes[p] | 0o011)
        out = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=60)
    finally:
        for p, mode in modes.items():
            p.chmod(mode)
        tmp_path.chmod(0o755)
    lines = out.stdout.splitlines()
    assert len(lines) == 2, out.stderr
    for line, name in zip(lines, ("b.db", "new.db"), strict=True):
        assert name in line and "may be written" in line and "Change the permissions" in line


def test_closed_buffer_says_so():
    buffer = DialogueBuffer(bins=2)
    buffer.close()
    buffer.close()
    with pytest.raises(InputError, match="it was closed"):
        offer(buffer, sets("one")[0])


# ---------------------------------------------------------------- odd input


ODD = st.text(st.characters(codec=None, categories=None), max_size=40)


@given(ODD, ODD, ODD)
@settings(max_examples=60, deadline=None)
def test_any_text_survives(question, answer, reply):
    if not (question.strip() or answer.strip()):
        return
    dialogue = DialogueSet("u", question, answer, None, "odd", {"note": question, "list": [1, None, 2.5]})
    with DialogueBuffer(bins=1) as buffer:
        offer(buffer, dialogue)
        if reply.strip():
            buffer.annotate(buffer.entries[0], reply)
        before = buffer.digest()
        buffer._load()  # as at opening
        (entry,) = buffer
        assert entry.dialogue == dialogue and dict(entry.dialogue.meta) == dict(dialogue.meta)
        assert buffer.digest() == before and entry.annotation == (reply if reply.strip() else None)


@pytest.mark.parametrize("text", ["你好，世界", "привет", "שלום", "👩‍👩‍👧‍👦 ok", "a\x00b", "\ud83d alone", "e\u0301"])
def test_scripts_emoji_nul_and_lone_surrogates_survive_in_a_file(text, tmp_path):
    dialogue = DialogueSet("u", text, text)
    with DialogueBuffer(tmp_path / "b.db", bins=1) as buffer:
        offer(buffer, dialogue, domain="people")
        buffer.annotate(dialogue.id, text)
        before = buffer.digest()
    with DialogueBuffer(tmp_path / "b.db") as buffer:
        assert buffer.digest() == before
        assert buffer.entries[0].dialogue == dialogue and buffer.entries[0].annotation == text


def test_set_without_content_is_passed_over():
    with DialogueBuffer(bins=2) as buffer:
        decision = offer(buffer, DialogueSet("u", "\u200b", ""), embedding=(0, 0, 0))
        assert (decision.action, decision.slot, len(buffer)) == ("discard", None, 0) and "no content" in decision.reason


@pytest.mark.parametrize(
    "bad",
    [{"embedding": (np.nan, 0, 0)}, {"embedding": (np.inf, 0, 0)}, {"eoe": np.nan}, {"dss": np.inf}],
    ids=str,
)
def test_nan_is_an_error_and_changes_nothing(bad):
    first, second = sets("one", "two")
    with DialogueBuffer(bins=2) as buffer:
        offer(buffer, first)
        before = buffer.digest()
        with pytest.raises(InputError, match=f"{next(iter(bad))}: expected finite numbers at position 1"):
            offer(buffer, second, **bad)
        assert buffer.digest() == before
        assert offer(buffer, second).action == "insert"


def test_embedding_of_another_length_and_unstorable_meta_are_errors():
    first, second = sets("one", "two")
    with DialogueBuffer(bins=2) as buffer:
        offer(buffer, first)
        with pytest.raises(InputError, match=r"embedding: expected shape \(3,\), got \(2,\)"):
            offer(buffer, second, embedding=(1.0, 0.0))
        with pytest.raises(InputError, match=r"dialogue\.meta.*set"):
            offer(buffer, DialogueSet("u", "q", "a", meta={"x": {1, 2}}))
        offer(buffer, DialogueSet("u", "q", "a", meta={"x": np.float64(0.5), "y": np.arange(2)}))
        assert dict(buffer.entries[1].dialogue.meta) == {"x": 0.5, "y": [0, 1]}


def test_interrupt_after_the_commit_leaves_memory_and_file_alike(tmp_path, monkeypatch):
    """A kernel's stop button may strike between commit and the change in memory."""
    dialogues, table = random_stream(60)
    with DialogueBuffer(bins=5) as whole:
        run_stream(whole, "quality", dialogues, table)
        digest = whole.digest()
    with DialogueBuffer(tmp_path / "b.db", bins=5) as buffer:
        hold, calls = DialogueBuffer._hold, []

        def strike(self, *args):
            calls.append(1)
            if len(calls) in (3, 9) and sys._getframe(1).f_code.co_name == "_decide":
                raise KeyboardInterrupt
            return hold(self, *args)

        monkeypatch.setattr(DialogueBuffer, "_hold", strike)
        struck = 0
        while buffer.position < 60:
            try:
                run_stream(buffer, "quality", dialogues, table)
            except KeyboardInterrupt:
                struck += 1
        assert buffer.digest() == digest and struck >= 1


def test_policy_that_fails_or_answers_nonsense_changes_nothing():
    class Broken(Policy):
        name = "broken"

        def choose(self, new, buffer, rng):
            rng.random()
            buffer.memory["x"] = 1
            return answers.pop()

    first, second, third = sets("one", "two", "three")
    answers = [99, -1]
    policy = Broken()
    with DialogueBuffer(bins=1) as buffer:
        offer(buffer, first, policy)
        before = buffer.digest()
        for _ in range(2):
            with pytest.raises(InputError, match="policy broken: expected a slot below 1"):
                offer(buffer, second, policy)
        with pytest.raises(IndexError):  # no answers left
            offer(buffer, second, policy)
        assert buffer.digest() == before


def test_policy_cannot_write_into_the_buffer_and_the_callers_array_is_its_own():
    class Vandal(Policy):
        name = "vandal"

        def choose(self, new, buffer, rng):
            for array in (buffer.positions, buffer.stored_scores, buffer.vectors, buffer.similarities, buffer.nearest):
                with pytest.raises(ValueError, match="read-only"):
                    array[0] = 0
            return None

    first, second = sets("one", "two")
    array = np.array([1.0, 0.0], dtype=np.float32)
    with DialogueBuffer(bins=1) as buffer:
        offer(buffer, first, Vandal(), embedding=array)
        array[:] = 7
        assert buffer.entries[0].embedding.tolist() == [1, 0]
        with pytest.raises(ValueError, match="read-only"):
            buffer.entries[0].embedding[0] = 5
        before = buffer.entries
        assert offer(buffer, second, Vandal(), embedding=array).action == "discard"
        assert buffer.entries[0] is before[0]


# ---------------------------------------------------------------- annotations


def test_annotations_belong_to_the_set_and_outlive_its_entry(tmp_path):
    one, two, three = sets("one", "two", "three")
    path = tmp_path / "b.db"
    with DialogueBuffer(path, bins=1) as buffer:
        offer(buffer, one, "fifo")
        shown = buffer.entries[0]
        buffer.annotate(shown, "uno")
        offer(buffer, two, "fifo")
        assert buffer.entries[0].annotation is None and buffer.answer_of(one.id) == "uno"
        offer(buffer, three, "fifo")
        buffer.annotate(shown, "eins")  # a slow person answers what has been replaced meanwhile
    with DialogueBuffer(path) as buffer:
        assert [(a.text, a.dialogue) for a in buffer.history()] == [("uno", one), ("eins", one)]
        offer(buffer, one, "fifo")
        assert buffer.entries[0].annotation == "eins", "the same set has come again"
        with pytest.raises(InputError, match="id of a buffered set, got 'nobody'"):
            buffer.annotate("nobody", "text")
        with pytest.raises(InputError, match="expected a reply"):
            buffer.annotate(one.id, " \n")


def test_skip_and_undo(tmp_path):
    one, two = sets("one", "two")
    path = tmp_path / "b.db"
    with DialogueBuffer(path, bins=2) as buffer:
        offer(buffer, one), offer(buffer, two)
        buffer.annotate(one.id, "first", state={"asked": 1})
        buffer.annotate(one.id, "second", state={"asked": 2})
        buffer.skip(two.id, state={"asked": 3})
        assert buffer.skipped == {two.id} and [e.annotation for e in buffer] == ["second", None]
    with DialogueBuffer(path) as buffer:
        assert buffer.skipped == {two.id} and buffer.state("asked") == 3
        assert buffer.undo_last(state={"asked": 2}).kind == "skip" and buffer.skipped == frozenset()
        assert buffer.undo_last().text == "second" and buffer.entries[0].annotation == "first"
    with DialogueBuffer(path) as buffer:
        assert buffer.entries[0].annotation == "first" and buffer.state("asked") == 2
        assert buffer.undo_last().text == "first" and buffer.entries[0].annotation is None
        assert buffer.undo_last() is None and buffer.history() == []
        buffer.skip(one.id)
        buffer.annotate(one.id, "after all")
        assert buffer.skipped == frozenset()


def test_annotation_must_fit_into_the_bin():
    (one,) = sets("one")
    with DialogueBuffer(bins=1, bin_bytes=200) as buffer:
        offer(buffer, one)
        used = buffer.bytes_used
        buffer.annotate(one.id, "é" * 20)
        assert buffer.bytes_used == used + 40
        with pytest.raises(InputError, match="expected at most 200 bytes with its dialogue set"):
            buffer.annotate(one.id, "w" * 200)
        assert buffer.entries[0].annotation == "é" * 20


def test_state_is_kept_and_must_be_json(tmp_path):
    path = tmp_path / "b.db"
    with DialogueBuffer(path, bins=1) as buffer:
        buffer.set_state({"budget": {"2024-01-01": 3}, "name": "é\ud800"})
        with pytest.raises(InputError, match="bad: expected a value that JSON can hold"):
            buffer.set_state({"good": 1, "bad": object()})
        assert buffer.state("good") is None, "all or nothing"
        buffer.state("budget")["2024-01-01"] = 99
        assert buffer.state("budget") == {"2024-01-01": 3}, "only set_state changes it"
        buffer.set_state({"days": {1: (2, 3)}})
        assert buffer.state("days") == {"1": [2, 3]}, "as after a restart"
    with DialogueBuffer(path) as buffer:
        assert buffer.state("budget") == {"2024-01-01": 3} and buffer.state("name") == "é\ud800"
        assert buffer.state("absent", 5) == 5


def test_file_is_private_and_nothing_else_is_left_beside_it(tmp_path):
    filled(tmp_path / "b.db")
    assert [p.name for p in tmp_path.iterdir()] == ["b.db"]
    assert (tmp_path / "b.db").stat().st_mode & 0o077 == 0


def test_lost_tail_of_the_log_is_a_step_back_in_the_same_stream(tmp_path):
    """A power cut may lose what was not flushed; cutting the log anywhere gives an earlier whole state."""
    dialogues, table = random_stream(80)
    path, copy = tmp_path / "b.db", tmp_path / "copy.db"
    reference = {}
    with DialogueBuffer(bins=6) as whole:
        run_stream(
            whole, "quality", dialogues, table, on_decision=lambda d: reference.update({d.position + 1: whole.digest()})
        )
    reference[0] = None
    with DialogueBuffer(path, bins=6) as buffer:
        run_stream(buffer, "quality", dialogues, table)
        for suffix in ("", "-wal"):  # by another process: closing a second handle here would drop the lock
            subprocess.run(["cp", f"{path}{suffix}", f"{copy}{suffix}"], check=True)
    log, base = (tmp_path / "copy.db-wal").read_bytes(), copy.read_bytes()
    positions = set()
    for share in np.linspace(0.02, 1, 25):
        copy.write_bytes(base)
        (tmp_path / "copy.db-wal").write_bytes(log[: int(len(log) * share)])
        with DialogueBuffer(copy, bins=6) as cut:
            positions.add(cut.position)
            assert cut.position == 0 or cut.digest() == reference[cut.position]
            run_stream(cut, "quality", dialogues, table)
            assert cut.digest() == reference[80]
    assert len(positions) > 10 and 80 in positions
    shutil.rmtree(tmp_path)
    tmp_path.mkdir()
