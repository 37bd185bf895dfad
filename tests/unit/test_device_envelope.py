"""Envelopes: what finishes, what is killed, what fails, and that nothing is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest

from pllm_helpers.device import PHONES, PhoneEnvelope
from pllm_helpers.runtime import InputError
from tests.unit import device_kit as kit
from tests.unit.tuning_kit import dialogue_sets, tiny_llm

pytestmark = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's /proc")

SMALL = PhoneEnvelope(150, preload=())


def test_a_function_that_fits_finishes():
    result = SMALL.run(kit.grow, 64)
    assert (result.status, result.signal, result.value) == ("finished", None, 8)
    assert 60 < result.peak_mb < 100
    assert result.seconds > 0 and result.cpu_seconds > 0 and result.startup_seconds > 0
    assert "finished" in str(result) and "150 MB" in result.message


def test_a_function_that_grows_too_large_is_really_killed():
    result = SMALL.run(kit.grow, 1000)
    assert (result.status, result.signal, result.value) == ("killed", signal.SIGKILL, None)
    assert 150 < result.peak_mb < 250  # it was stopped early, not at 1000
    assert "phase 'grow'" in result.message and "150 MB" in result.message
    assert result.cpu_seconds > 0


def test_a_killed_child_leaves_its_timeline():
    seen = []
    result = PhoneEnvelope(150, preload=(), on_sample=seen.append).run(kit.grow, 1000, pause=0.03)
    times = [s.seconds for s in result.timeline]
    assert times == sorted(times) and len(times) > 10
    growing = [s.resident_mb for s in result.timeline if s.phase == "grow"]
    assert growing[-1] > 120 and growing[0] < 30
    assert {p.name: p for p in result.phases}["grow"].resident_mb > 120
    assert seen and all(s in result.timeline for s in seen)


def test_a_spike_between_two_looks_is_seen():
    lazy = PhoneEnvelope(150, preload=(), interval=5.0)
    result = lazy.run(kit.spike, 400)
    assert (result.status, result.signal, result.value) == ("killed", signal.SIGKILL, None)
    assert result.peak_mb > 390
    assert lazy.run(kit.spike, 60).value == "had 60"


def test_grace_lets_a_short_spike_pass():
    assert PhoneEnvelope(150, preload=(), grace=30).run(kit.spike, 400).status == "finished"
    result = PhoneEnvelope(150, preload=(), grace=0.05).run(kit.grow, 1000)
    assert result.status == "killed" and result.signal == signal.SIGKILL


def test_private_memory_does_not_count_file_pages(tmp_path):
    file = tmp_path / "pages"
    file.write_bytes(os.urandom(1 << 20) * 300)

    def read(path: str) -> int:
        import mmap
        import time

        with open(path, "rb") as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as pages:
            total = sum(pages[k] for k in range(0, len(pages), 4096))
            time.sleep(0.5)  # stay at the full size until the parent has looked
            return total

    assert PhoneEnvelope(150, preload=(), counts="resident").run(read, str(file)).status == "killed"
    result = PhoneEnvelope(150, preload=(), counts="private").run(read, str(file))
    assert result.status == "finished" and result.value > 0
    assert max(s.resident_mb for s in result.timeline) > 200


def test_above_nothing_counts_python_itself():
    result = PhoneEnvelope(4000, above="nothing", preload=()).run(kit.grow, 8)
    assert result.baseline_mb == (0.0, 0.0) and result.peak_mb > 60


def test_an_exception_comes_back_with_its_message():
    result = SMALL.run(kit.refuse, "tea")
    assert (result.status, result.signal, result.value) == ("failed", None, None)
    assert result.message == "ValueError: no tea today"
    assert "about to refuse" in result.output and "refuse(word" not in result.message
    assert "Traceback" in result.output and "in refuse" in result.output and result.cpu_seconds > 0


def test_a_child_that_vanishes_is_a_failure_that_says_how():
    result = SMALL.run(kit.vanish, 7)
    assert result.status == "failed" and result.signal is None and "exit code 7" in result.message
    result = SMALL.run(_crash)
    assert result.status == "failed" and result.signal == signal.SIGSEGV and "SIGSEGV" in result.message


def _crash() -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


def test_a_timeout_stops_the_child():
    result = PhoneEnvelope(150, preload=(), timeout=0.3).run(time.sleep, 600)
    assert result.status == "failed" and "timeout" in result.message and result.seconds < 60


def test_a_large_value_is_not_sent_and_said_so():
    result = PhoneEnvelope(500, preload=(), value_mb=1).run(kit.big_value, 40)
    assert result.status == "finished" and result.value is None and "not sent back" in result.message
    assert len(PhoneEnvelope(500, preload=()).run(kit.big_value, 40).value) == 40 << 20


def test_nothing_is_left_of_a_killed_child(tmp_path):
    result = SMALL.run(kit.grow_and_start_another, 1000, str(tmp_path / "pid"))
    assert result.status == "killed"
    assert kit.has_gone(int((tmp_path / "pid").read_text(encoding="utf-8")))


def test_nothing_is_left_of_a_child_that_is_done(tmp_path):
    """No process, no zombie, no file: neither of one that returned nor of one that raised."""
    before, zombies = set(os.listdir(tempfile.gettempdir())), kit.children()
    assert SMALL.run(kit.grow_and_start_another, 8, str(tmp_path / "pid")).status == "finished"
    assert kit.has_gone(int((tmp_path / "pid").read_text(encoding="utf-8")))
    assert SMALL.run(kit.refuse, "tea").status == "failed"
    assert kit.children() == zombies
    made = set(os.listdir(tempfile.gettempdir())) - before
    assert not {name for name in made if not name.startswith(("pytest", "pip", "torch"))}, made


def test_a_hanging_child_ends_with_an_interrupt():
    """Ctrl-C in a notebook raises KeyboardInterrupt in the kernel's main thread."""
    before = kit.children()
    watch = PhoneEnvelope(150, preload=(), on_sample=_interrupt)
    ours = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job starts with it ignored
    try:
        with pytest.raises(KeyboardInterrupt):
            watch.run(time.sleep, 600)
    finally:
        signal.signal(signal.SIGINT, ours)
    assert kit.children() == before


def _interrupt(sample) -> None:
    signal.raise_signal(signal.SIGINT)


PARENT = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job starts with it ignored
from pllm_helpers.device import PhoneEnvelope
from tests.unit.device_kit import write_number_and_wait
PhoneEnvelope(500, preload=()).run(write_number_and_wait, sys.argv[1])
"""


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGINT])
def test_the_child_dies_with_its_parent(tmp_path, root, sent):
    file = tmp_path / "pid"
    parent = subprocess.Popen([sys.executable, "-c", PARENT, str(file)], cwd=root, stderr=subprocess.DEVNULL)
    try:
        end = time.monotonic() + 120
        while not file.exists() and time.monotonic() < end:
            time.sleep(0.05)
        child = int(file.read_text(encoding="utf-8"))
        assert not kit.has_gone(child, 0.1)
        parent.send_signal(sent)
        assert kit.has_gone(child)
        assert parent.wait(timeout=60) != 0
    finally:
        parent.kill()
        parent.wait()


def test_bad_settings_name_the_setting():
    for settings, what in (
        (dict(limit_mb=0), "limit_mb"),
        (dict(limit_mb=float("nan")), "limit_mb"),
        (dict(limit_mb=100, above="weights"), "above"),
        (dict(limit_mb=100, counts="swap"), "counts"),
        (dict(limit_mb=100, grace=-1), "grace"),
        (dict(limit_mb=100, timeout=0), "timeout"),
        (dict(limit_mb=100, value_mb=-1), "value_mb"),
        (dict(limit_mb=100, preload="json"), "preload"),
    ):
        with pytest.raises(InputError) as e:
            PhoneEnvelope(**settings)
        assert e.value.what == what
    with pytest.raises(InputError, match="can be sent"):
        SMALL.run(print, threading.Lock())


def test_a_small_model_is_sent_whole_and_tuned():
    from pllm_helpers.tuning import tune_lora

    result = PhoneEnvelope(1500).run(tune_lora, tiny_llm(), dialogue_sets(), steps=2, lr=1e-3, progress=False)
    assert result.status == "finished", result.message
    assert len(result.value.losses) == 2
    assert result.value.losses == tune_lora(tiny_llm(), dialogue_sets(), steps=2, lr=1e-3, progress=False).losses


@pytest.mark.model
def test_a_limit_below_the_model_says_what_to_change():
    from pllm_helpers.models import load_llm
    from pllm_helpers.tuning import tune_lora

    llm = load_llm(dtype="fp32")
    with pytest.raises(InputError, match="513 MB") as e:
        PhoneEnvelope(400).run(tune_lora, llm, dialogue_sets(), steps=1, lr=1e-3)
    assert "Raise limit_mb" in str(e.value)

    def load_and_use() -> int:
        import torch

        model = load_llm(dtype="fp32").model
        return int(sum(p.detach().float().sum() for p in model.parameters()).isfinite()) + torch.get_num_threads()

    result = PhoneEnvelope(300).run(load_and_use)  # a model that the function itself loads
    assert result.status == "killed" and result.signal == signal.SIGKILL


@pytest.mark.model
def test_a_changed_model_is_refused():
    from pllm_helpers.models import load_llm
    from pllm_helpers.tuning import private_copy, tune_lora

    llm = private_copy(load_llm(dtype="fp32"))
    next(iter(llm.model.parameters())).data.flatten()[0] += 1
    result = PhoneEnvelope(3000).run(tune_lora, llm, dialogue_sets(), steps=1, lr=1e-3)
    assert result.status == "failed" and "changed" in result.message


@pytest.mark.model
def test_in_one_gigabyte_mezo_trains_and_adam_is_killed():
    """The promise of the lab: 1.0 GB above imports, SmolLM2-135M in fp32, all weights tuned."""
    from pllm_helpers.models import load_llm
    from pllm_helpers.tuning import tune_full, tune_mezo

    llm, phone = load_llm(dtype="fp32"), PHONES["1 GB app"].envelope()
    assert phone.limit_mb == 1024 and phone.counts == "resident" and phone.above == "imports"
    data = dialogue_sets(4)
    mezo = phone.run(tune_mezo, llm, data, steps=2, lr=1e-6, batch_size=4, progress=False)
    assert mezo.status == "finished", mezo.message
    assert len(mezo.value.losses) == 2 and 513 < mezo.peak_mb < 1024
    adam = phone.run(tune_full, llm, data, steps=2, lr=1e-5, optimizer="adam", batch_size=4, progress=False)
    assert (adam.status, adam.signal, adam.value) == ("killed", signal.SIGKILL, None)
    assert adam.timeline[-1].resident_mb > 900


NOTEBOOK = [
    """
import numpy as np
from dataclasses import dataclass
from pllm_helpers.device import PhoneEnvelope, mark_phase

@dataclass
class Take:
    mb: int

def hold(take):
    with mark_phase("hold"):
        return len(np.ones((take.mb, 1 << 17)).ravel()), take
""",
    """
envelope = PhoneEnvelope(200, preload=())
fits = envelope.run(hold, Take(20))
assert fits.status == "finished", fits
assert fits.value == (20 << 17, Take(20)), fits.value
""",
    """
too_much = envelope.run(lambda mb: hold(Take(mb)), 500)
assert (too_much.status, too_much.signal) == ("killed", 9), too_much
assert "hold" in too_much.message
len(too_much.timeline)
""",
]


def test_notebook_functions_run_in_an_envelope(tmp_path, root, write_notebook):
    """Functions and classes that exist in a kernel only reach the child, and come back."""
    import nbformat
    from nbclient import NotebookClient

    path = write_notebook(tmp_path / "n.ipynb", NOTEBOOK)
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(root)}})
    client.execute()
    assert int(notebook.cells[-1].outputs[0]["data"]["text/plain"]) > 0


def test_phones_say_where_their_numbers_come_from():
    for name, phone in PHONES.items():
        assert phone.tag in ("verified", "unverified") and len(phone.source) > 30 and name == phone.name
        assert phone.envelope().limit_mb == phone.limit_mb and phone.envelope().counts == phone.counts
    twelve = next(p for p in PHONES.values() if p.limit_mb == 12 * 1024)
    assert twelve.tag == "unverified" and "recalled" in twelve.source


def test_scaling_keeps_the_share_of_the_weights():
    phone = PHONES["OPPO Reno 6, MeZO on RoBERTa-large"]
    scaled = phone.scaled(134_515_008)
    assert scaled.limit_mb == pytest.approx(4096 * 134_515_008 / 355_412_057)
    assert "0.378" in scaled.name
    assert phone.scaled(355_412_057).limit_mb == pytest.approx(4096)
    llm = tiny_llm()
    assert phone.scaled(llm).limit_mb == pytest.approx(4096 * llm.parameters / 355_412_057)
    assert phone.scaled(10**9, reference="OPT-1.3B", grace=1).grace == 1
    with pytest.raises(InputError, match="RoBERTa-large"):
        phone.scaled(10**9, reference="BERT")
    with pytest.raises(InputError, match="model"):
        phone.scaled(0)
