"""``kill -9`` at random moments of a stream with annotations: is anything acknowledged lost, is the end the same?

A child process streams a real person's dialogue sets through a buffer in a file and annotates now and
then; it prints a line when a call has returned. The parent kills it, opens the file, compares it with an
uninterrupted run at the same point, and starts the next child where that one died.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from pllm_helpers.dialogue import DialogueSet
from pllm_helpers.runtime import InputError
from pllm_helpers.selection import DialogueBuffer, MetricTable, run_stream

from .compare import Row

Stream = tuple[Sequence[DialogueSet], MetricTable]
ROOT = Path(__file__).resolve().parents[1]
BINS = 32
POLICIES = ("quality", "random", "kcenter", "facility", "combined")


@dataclass
class Report:
    """What ``kills`` did: which of them lost something acknowledged, and whether the end was the same."""

    policy: str
    kills: int = 0
    lost: list[str] = field(default_factory=list)
    points: list[int] = field(default_factory=list)  # stream positions at which the children ended
    same_end: bool = False


def play(buffer: DialogueBuffer, policy: str, stream: Stream, say=lambda line: None) -> None:
    """The rest of a stream, with an annotation, a skip or an undo after some of the sets.

    Which of them is due follows from the position, and ``state`` says up to which it was done, so
    that a run that was killed between a decision and its annotation catches up.
    """
    dialogues, table = stream
    while True:
        position = buffer.position
        if buffer.state("marked", 0) < position:
            entry, done = buffer.entries[position % len(buffer)], {"marked": position}
            if position % 11 == 0:
                buffer.undo_last(state=done)
            elif position % 7 == 0:
                buffer.skip(entry, state=done)
            elif position % 3 == 0:
                buffer.annotate(entry, f"reply at {position}: {entry.dialogue.answer[:40]}", state=done)
            else:
                buffer.set_state(done)
            say({"marked": position, "actions": len(buffer.history())})
        if position == len(dialogues):
            return
        (decision,) = run_stream(buffer, policy, dialogues, table, stop=position + 1)
        say({"decided": decision.position + 1, "action": decision.action, "slot": decision.slot})


def reference(policy: str, stream: Stream) -> dict[tuple[int, int], str]:
    """Digests of an uninterrupted run, by position and by how far it was annotated."""
    digests = {}
    with DialogueBuffer(bins=BINS, seed=1) as buffer:
        digests[0, 0] = buffer.digest()
        play(buffer, policy, stream, lambda _: digests.update({_point(buffer): buffer.digest()}))
    return digests


def _point(buffer: DialogueBuffer) -> tuple[int, int]:
    return buffer.position, buffer.state("marked", 0)


def save(stream: Stream, path: Path) -> None:
    """The stream for the children, without scoring it again."""
    dialogues, t = stream
    rows = [[d.user, d.question, d.answer, d.time, d.source, dict(d.meta)] for d in dialogues]
    arrays = {name: getattr(t, name) for name in ("eoe", "dss", "domain", "embeddings", "n_tokens", "n_words")}
    np.savez(path, rows=json.dumps(rows), lexicons=t.lexicons, reading=t.reading, mode=t.mode, **arrays)


def load(path: Path) -> Stream:
    with np.load(path) as f:
        scores = [f[name] for name in ("eoe", "dss", "domain", "embeddings", "n_tokens", "n_words")]
        table = MetricTable(*scores, tuple(map(str, f["lexicons"])), str(f["reading"]), str(f["mode"]))
        return [DialogueSet(*row) for row in json.loads(str(f["rows"]))], table


def nursery(policy: str, stream_file: str) -> None:
    """Fork a child for every path that comes in on a line: imports are paid for once.

    It is waited for at the next line only, so that its number cannot be given to another process
    before the kill.
    """
    stream = load(Path(stream_file))
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            child(line.strip(), policy, stream)
            os._exit(0)
        sys.stdin.readline()
        _say({"dead": os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])})


def child(path: str, policy: str, stream: Stream) -> None:
    """Open, go on, say what is acknowledged; to be killed."""
    _say({"pid": os.getpid()})
    with DialogueBuffer(path, bins=BINS, seed=1) as buffer:
        play(buffer, policy, stream, _say)
    _say({"closed": True})


def _say(line: dict[str, object]) -> None:
    os.write(1, (json.dumps(line) + "\n").encode())


def kill_stream(policy: str, kills: int, stream: Stream, folder: Path, seed: int = 0) -> Report:
    """Kill a streaming child ``kills`` times at random moments, then finish the stream and compare.

    A moment is a random number of lines after the child starts to open the file (so some die while
    opening) and up to two milliseconds more. A child that reaches the end first counts as no kill,
    and the stream starts anew.
    """
    rng, report = random.Random(seed), Report(policy)
    stream_file = folder / "stream.npz"
    save(stream, stream_file)
    wanted = reference(policy, stream)
    last, length = max(wanted), len(stream[0])
    command = [sys.executable, "-m", "benchmarks.kill", policy, str(stream_file)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd=ROOT
    ) as parent:
        try:
            run, path = 0, folder / "b0.db"
            while report.kills < kills and not report.lost:
                lines = 1 if rng.random() < 0.2 else rng.randint(2, max(4, 4 * length // kills))  # a set has two
                said = _one_child(parent, path, lines, rng.random() * 0.002)
                finished = any("closed" in line for line in said)
                report.kills += not finished
                _compare(report, said, path, wanted)
                if finished:
                    run += 1
                    path = folder / f"b{run}.db"
        finally:
            parent.kill()
    with DialogueBuffer(path, bins=BINS, seed=1) as buffer:
        play(buffer, policy, stream)
        report.same_end = buffer.digest() == wanted[last]
    return report


def _one_child(parent: subprocess.Popen[str], path: Path, lines: int, delay: float) -> list[dict[str, int]]:
    """All that a child said before it was killed, ``delay`` seconds after so many lines."""
    assert parent.stdin is not None and parent.stdout is not None
    parent.stdin.write(f"{path}\n")
    parent.stdin.flush()
    said: list[dict[str, int]] = []
    killed = False
    for text in parent.stdout:
        said.append(json.loads(text))
        if "dead" in said[-1]:
            if said[-1]["dead"] not in (0, -signal.SIGKILL):
                raise RuntimeError(f"the child died by itself: {said[-1]}")
            return said
        if not killed and (len(said) == lines or "closed" in said[-1]):
            killed = True
            time.sleep(delay)
            os.kill(said[0]["pid"], signal.SIGKILL)
            parent.stdin.write("killed\n")
            parent.stdin.flush()
    raise RuntimeError(f"the parent of the children died with code {parent.wait()}")


def _compare(report: Report, said: list[dict[str, int]], path: Path, wanted: dict[tuple[int, int], str]) -> None:
    """What was acknowledged against what is in the file, and the file against the uninterrupted run."""
    try:
        with DialogueBuffer(path, bins=BINS, seed=1) as buffer:
            point, digest = _point(buffer), buffer.digest()
    except InputError as e:
        report.lost.append(f"at {report.points[-1:]}: {e}")
        return
    report.points.append(point[0])
    decided, marked = (max((line[k] for line in said if k in line), default=0) for k in ("decided", "marked"))
    if point[0] < decided or point[1] < marked:
        report.lost.append(f"acknowledged {decided}, {marked}; found {point}")
    if wanted.get(point) != digest:
        report.lost.append(f"at {point} the buffer is not that of the uninterrupted run")


def run(quick: bool = False, kills: int | None = None) -> list[Row]:
    """Row ``kill_stream``: of ``kills`` (50; 10 if quick) those after which nothing acknowledged was missing."""
    from pllm_helpers.corpora import chitchat_stream
    from pllm_helpers.models import load_encoder
    from pllm_helpers.selection import load_lexicons, score_dialogues

    kills = kills or (10 if quick else 50)
    dialogues = chitchat_stream(0).stream[: 100 if quick else 400]
    stream = dialogues, score_dialogues(dialogues, load_encoder(), load_lexicons(), progress=False)
    good = 0
    for i, policy in enumerate(POLICIES):
        with tempfile.TemporaryDirectory() as folder:
            share = kills // len(POLICIES) + (i < kills % len(POLICIES))
            report = kill_stream(policy, share, stream, Path(folder), seed=i)
            assert report.same_end and not report.lost, report
            good += report.kills - len(report.lost)
    return [kill_row("kill_stream", good, kills)]


def kill_row(name: str, good: int, kills: int) -> Row:
    """A row that says how many kills went well; the ratio's interval is Wilson's for their share."""
    low, high = wilson(good, kills)
    numbers = {"ratio": round(good / kills, 3), "ratio_low": round(low, 3), "ratio_high": round(high, 3)}
    return {
        "name": name,
        "peer": "uninterrupted run, equal bit by bit",
        "peer_version": "",
        "ours": good,
        "theirs": kills,
        "unit": "kills survived",
        **numbers,
        "n": kills,
    }


def wilson(good: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """95 % interval of a share."""
    centre, half = good / n + z * z / (2 * n), z * np.sqrt(good / n * (1 - good / n) / n + z * z / (4 * n * n))
    return float((centre - half) / (1 + z * z / n)), float(min(1, (centre + half) / (1 + z * z / n)))


if __name__ == "__main__":
    nursery(*sys.argv[1:])
