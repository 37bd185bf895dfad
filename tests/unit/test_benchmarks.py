"""How a benchmark row is made: sides in turn, ratio above 1 when ours is better."""

from benchmarks.compare import in_turn, row


def test_sides_alternate_and_the_first_round_does_not_count():
    calls = []

    def side(name):
        return lambda: calls.append(name) or float(len(calls))

    ours, theirs = in_turn(side("a"), side("b"), 4)
    assert calls == list("ab" + "ab" + "ba" + "ab" + "ba")
    assert (len(ours), len(theirs)) == (4, 4) and 1.0 not in ours and 2.0 not in theirs


def test_ratio_says_how_much_better_ours_is():
    more = row("x", "peer", [30, 30, 30], [10, 10, 10], "tokens/s", version="1", more=True)
    less = row("x", "peer", [30, 30, 30], [10, 10, 10], "MB", version="1", more=False)
    assert (more["ratio"], round(less["ratio"], 3)) == (3.0, 0.333)
    assert more["ratio_low"] <= more["ratio"] <= more["ratio_high"]
    contract = {"name", "peer", "peer_version", "ours", "theirs", "unit", "ratio", "ratio_low", "ratio_high"}
    assert contract <= set(more)
