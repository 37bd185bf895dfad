"""Seeds, threads, offline mode and folders."""

import os
import random
import subprocess
import sys

import numpy as np
import pytest
import torch

from pllm_helpers import runtime
from pllm_helpers.runtime import InputError, cache_dir, data_dir, prepare, thread_count


@pytest.fixture(autouse=True)
def restore():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    runtime.go_offline()


def draw():
    return random.random(), np.random.rand(), torch.rand(1).item()


def test_one_seed_for_all():
    prepare(3)
    first = draw()
    prepare(3)
    assert draw() == first
    prepare(4)
    second = draw()
    assert all(a != b for a, b in zip(first, second, strict=True))
    prepare(2**40)  # larger than NumPy's seeds
    with pytest.raises(InputError, match="seed"):
        prepare(-1)


def test_threads(monkeypatch):
    monkeypatch.setenv("PLLM_THREADS", "1")
    assert prepare().threads == 1 == torch.get_num_threads()
    assert prepare(threads=2).threads == 2 == torch.get_num_threads()
    for bad in ("0", "two", "-1", "1.5"):
        monkeypatch.setenv("PLLM_THREADS", bad)
        with pytest.raises(InputError, match="PLLM_THREADS"):
            thread_count()
    monkeypatch.delenv("PLLM_THREADS")
    assert 1 <= thread_count() <= (os.cpu_count() or 1)
    with pytest.raises(InputError, match="threads"):
        prepare(threads=0)


def test_offline_reaches_a_hub_library_that_is_loaded_already():
    from huggingface_hub import constants

    prepare(offline=False)
    assert not constants.HF_HUB_OFFLINE and "HF_HUB_OFFLINE" not in os.environ
    prepare()
    assert constants.HF_HUB_OFFLINE and os.environ["TRANSFORMERS_OFFLINE"] == "1"


def test_importing_the_package_makes_waiting_threads_sleep():
    """Spinning threads of two kernels slow each other several times; set before torch is loaded."""
    env = {k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"}
    code = "import pllm_helpers, os, sys; print(os.environ['OMP_WAIT_POLICY'], 'torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert out.stdout.split() == ["PASSIVE", "False"]


def test_folders(tmp_path, monkeypatch):
    monkeypatch.setenv("PLLM_CACHE", str(tmp_path / "a" / "b"))
    assert cache_dir() == tmp_path / "a" / "b" and cache_dir().is_dir()
    assert (data_dir() / "dialogues").is_dir()
    monkeypatch.setattr(runtime, "__file__", str(tmp_path / "pkg" / "runtime.py"))
    with pytest.raises(InputError, match="data folder"):
        data_dir()
    (tmp_path / "pkg" / "_data" / "dialogues").mkdir(parents=True)  # as in a wheel
    assert data_dir() == tmp_path / "pkg" / "_data"


def test_error_text():
    error = InputError("top_p", "expected a number up to 1, got 2", "Lower it.")
    assert str(error) == "top_p: expected a number up to 1, got 2. Lower it." and isinstance(error, ValueError)
