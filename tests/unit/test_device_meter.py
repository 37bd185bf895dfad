"""The meter: what a block of work took."""

from __future__ import annotations

import threading
import time

import pytest

from pllm_helpers.device import Meter, Sample, mark_phase
from pllm_helpers.device.meter import PHONE_WATTS, Timeline, high_water_mb, phases
from pllm_helpers.runtime import InputError


def test_memory_time_and_tokens():
    with Meter() as meter:
        with meter.phase("hold"):
            held = b"x" * (200 << 20)
            time.sleep(0.05)
        del held
        with meter.phase("work"):
            end = time.process_time() + 0.1
            while time.process_time() < end:
                pass
        meter.add_tokens(30)
        meter.add_tokens(12)
    found = {p.name: p for p in meter.phases}
    assert 195 < meter.peak_private_mb < 260 and 195 < meter.peak_resident_mb < 260
    assert found["hold"].private_mb > 195 and found["hold"].seconds > 0.04
    assert meter.cpu_seconds >= 0.1 and meter.wall_seconds >= 0.15
    assert meter.tokens == 42 and meter.tokens_per_second == pytest.approx(42 / meter.wall_seconds)
    assert "42 tokens" in str(meter)


def test_the_timeline_goes_forward_and_names_phases():
    with Meter(interval=0.002) as meter:
        for name in ("forward", "backward", "forward"):
            with meter.phase(name):
                time.sleep(0.02)
    times = [s.seconds for s in meter.timeline]
    assert times == sorted(times) and times[0] >= 0
    order = [a.phase for a, b in zip(meter.timeline, meter.timeline[1:], strict=False) if a.phase != b.phase]
    assert order[:4] == ["", "forward", "", "backward"]
    assert sum(p.seconds for p in meter.phases) == pytest.approx(times[-1] - times[0])


def test_phases_nest_and_end_with_an_exception():
    with Meter() as meter:
        with pytest.raises(KeyError), mark_phase("outer"):
            with mark_phase("inner"):
                raise KeyError
        with mark_phase("after"):
            pass
    names = [p.name for p in meter.phases]
    assert names == ["", "outer", "inner", "after"]
    assert meter.timeline[-1].phase == ""


def test_a_spike_between_two_readings_is_in_the_resident_peak():
    if not high_water_mb():
        pytest.skip("needs Linux's VmHWM")
    room = high_water_mb()  # earlier tests of this process may have been higher: go beyond
    from pllm_helpers.tuning.memory import memory_mb

    size = int(room - memory_mb()[0]) + 150
    with Meter(interval=30) as meter:
        length = len(b"x" * (size << 20))
    assert length == size << 20 and meter.peak_resident_mb > size - 5


def test_the_energy_proxy_says_what_it_is():
    with Meter(watts=2) as meter:
        end = time.process_time() + 0.05
        while time.process_time() < end:
            pass
    proxy = meter.energy_proxy
    assert proxy.value == pytest.approx(2 * meter.cpu_seconds) and proxy.cpu_seconds == meter.cpu_seconds
    assert "no energy measured" in str(proxy) and "assumed" in str(proxy)
    # the three whole-phone figures of XPerT's table 5, joules by seconds
    figures = sorted(kj * 1000 / (60 * minutes) for kj, minutes in ((15.7, 97.8), (6.2, 26.4), (18.0, 93.6)))
    assert figures[1] == pytest.approx(PHONE_WATTS, abs=0.05)


def test_meters_run_side_by_side_and_stop():
    before = threading.active_count()
    with Meter() as outer, Meter() as inner, mark_phase("both"):
        time.sleep(0.02)
    assert threading.active_count() == before
    assert [p.name for p in outer.phases] == [p.name for p in inner.phases] == ["", "both"]


def test_a_meter_used_again_starts_anew():
    meter = Meter(interval=0.002)
    with meter, meter.phase("first"):
        meter.add_tokens(5)
        time.sleep(0.02)
    with meter, meter.phase("second"):
        time.sleep(0.02)
    times = [s.seconds for s in meter.timeline]
    assert meter.tokens == 0 and [p.name for p in meter.phases] == ["", "second"]
    assert times == sorted(times) and len(times) > 4


def test_long_timelines_keep_their_peak_and_their_phases():
    line = Timeline(most=64)
    for k in range(5000):
        line.add(Sample(k * 0.005, 100.0 if k == 2345 else k % 7, 1.0, "short" if k == 1000 else "long"))
    line.flush()
    times = [s.seconds for s in line.samples]
    assert len(line.samples) <= 128 and times == sorted(times)
    assert max(s.resident_mb for s in line.samples) == 100
    assert {p.name for p in phases(line.samples)} == {"long", "short"}


def test_bad_settings():
    for settings, what in (({"interval": 0}, "interval"), ({"watts": -1}, "watts")):
        with pytest.raises(InputError) as e:
            Meter(**settings)
        assert e.value.what == what
