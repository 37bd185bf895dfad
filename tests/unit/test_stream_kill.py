"""``kill -9`` at ten random moments of stream and annotation; 50 of them are in ``make bench``."""

import pytest

from benchmarks.kill import kill_row, kill_stream, play, reference
from pllm_helpers.selection import DialogueBuffer
from tests.unit.streams import real_stream


@pytest.mark.parametrize(("policy", "kills"), [("quality", 6), ("facility", 4)])
def test_nothing_acknowledged_is_lost_and_the_end_is_the_same(policy, kills, tmp_path):
    report = kill_stream(policy, kills, real_stream(2, 160), tmp_path, seed=kills)
    assert report.kills == kills and report.lost == []
    assert report.same_end
    assert len(set(report.points)) >= kills // 2, "the kills struck at different moments"


def test_the_check_would_notice_a_loss(tmp_path, monkeypatch):
    """Children that only pretend to write: every kill but those at the start is a loss."""
    import benchmarks.kill as kill

    stream = real_stream(2, 60)
    honest = kill.DialogueBuffer

    def forgetful(path, **settings):
        (tmp_path / "other.db").unlink(missing_ok=True)
        return honest(tmp_path / "other.db", **settings)  # what the children wrote is not there

    monkeypatch.setattr(kill, "DialogueBuffer", forgetful)
    monkeypatch.setattr(kill, "reference", lambda policy, stream: honest_reference)
    with monkeypatch.context() as m:
        m.setattr(kill, "DialogueBuffer", honest)
        honest_reference = reference("fifo", stream)
    report = kill_stream("fifo", 2, stream, tmp_path, seed=1)
    assert any("acknowledged" in line for line in report.lost)


def test_play_marks_skips_and_undoes():
    stream = real_stream(2, 160)
    with DialogueBuffer(bins=32, seed=1) as buffer:
        play(buffer, "quality", stream)
        kinds = {a.kind for a in buffer.history()}
        assert kinds == {"answer", "skip"} and buffer.state("marked") == 160
        assert any(e.annotation for e in buffer) and any(d.id not in {e.id for e in buffer} for d in buffer.history())
        row = kill_row("kill_stream", 50, 50)
    assert row["ratio"] == 1 and 0.9 < row["ratio_low"] < 1
