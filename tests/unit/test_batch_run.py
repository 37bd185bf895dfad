"""Runs of toy notebooks in real kernels, through the command as a user types it."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import nbformat
import pytest

from pllm_helpers.batch import run_series
from pllm_helpers.batch.execution import kernel_environment, traceback_in
from pllm_helpers.runtime import InputError

FINE = """
from pllm_helpers.batch import claim, record
from pllm_helpers.evaluation import Estimate
record("nll/toy/quality", Estimate(1.5, 1.2, 1.8, n=n, seeds=(seed,)), unit="nats")
claim("It grows <b>", Estimate(1.5, 1.2, 1.8, n=n), above=1, paper="yes")
claim("It shrinks", Estimate(1.5, 1.2, 1.8, n=n), below=1)
claim("One is one", 1, above=1, below=1, kind="deterministic")
"""
MACHINE = """
import os, sys
from pathlib import Path
print(sys.executable)
print([os.environ[name] for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "PLLM_THREADS")])
Path("written_here.txt").write_text("x")
block = bytearray(150_000_000)
"""
FIGURE = """
import plotly.graph_objects as go
go.Figure(go.Bar(x=["a", "b"], y=[1, 2], name="übung"))
"""
THREAD = """
import threading, time
def late():
    time.sleep(0.3)
    raise OSError("in a thread")
threading.Thread(target=late).start()
"""
TOYS = {
    "00_fine": [("md", "# Fine"), ("parameters", "seed: int = 0  # 0..9: seed\nn: int = 3  # 1..99: rows"), FINE],
    "01_fails": ["1/0", "print('never')"],
    "02_slow": ["import time\nprint('begun')", "time.sleep(100)"],
    "03_widget": ["from ipywidgets import interact\n@interact(x=1)\ndef f(x):\n    raise KeyError('swallowed')", "2"],
    "04_claim": ["from pllm_helpers.batch import claim\nclaim('two is one', 2, below=1, kind='deterministic')", "3"],
    "05_network": ["import socket\ntry:\n    socket.create_connection(('192.0.2.1', 9))\nexcept OSError:\n    pass"],
    "06_thread": [THREAD, "pass"],
    "07_exit": ["import sys\nsys.exit(0)", "print('never')"],
    "08_größe ✓": [("raises-exception", "1/0"), MACHINE, FIGURE],
    "09_dies": ["import os\nos._exit(3)"],
}
STATUS_OF = {"00_fine": "ok", "02_slow": "timeout", "08_größe ✓": "ok"}


def _pllm(*words, **options):
    return [sys.executable, "-c", "from pllm_helpers.cli import main; main()", *map(str, words)]


@pytest.fixture(scope="module")
def toys(tmp_path_factory, write_notebook):
    folder = tmp_path_factory.mktemp("toys")
    for name, cells in TOYS.items():
        write_notebook(folder / f"{name}.ipynb", cells)
    return folder


@pytest.fixture(scope="module")
def ran(toys, tmp_path_factory):
    """All toys in one run; the user has a kernel of another Python, named python3."""
    home = tmp_path_factory.mktemp("home")
    spec = home / "kernels" / "python3"
    spec.mkdir(parents=True)
    text = json.dumps({"argv": ["/nonexistent/python", "{connection_file}"], "display_name": "x", "language": "python"})
    (spec / "kernel.json").write_text(text, encoding="utf-8")
    out = tmp_path_factory.mktemp("run") / "out"
    before = {path: path.read_bytes() for path in sorted(toys.iterdir())}
    command = _pllm(
        "run", "--notebooks", toys, "--out", out, "--no-network", "--timeout", 8, "--threads", 1, "-p", "n=7"
    )
    env = {**os.environ, "JUPYTER_PATH": str(home)}
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", timeout=300, env=env, cwd=home)
    assert {path: path.read_bytes() for path in sorted(toys.iterdir())} == before, "the sources were touched"
    return done, out, json.loads((out / "results.json").read_text(encoding="utf-8"))


def _outputs(out, name):
    notebook = nbformat.read(out / "notebooks" / f"{name}.ipynb", as_version=4)
    return [o for cell in notebook.cells if cell.cell_type == "code" for o in cell.outputs]


def test_every_notebook_has_its_status_and_one_failure_does_not_stop_the_rest(ran):
    done, _, results = ran
    assert done.returncode == 1, done.stdout + done.stderr
    assert {n["name"]: n["status"] for n in results["notebooks"]} == {
        name: STATUS_OF.get(name, "failed") for name in TOYS
    }


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("01_fails", "ZeroDivisionError: division by zero"),
        ("02_slow", "stopped after 8 s in cell 2"),
        ("03_widget", "KeyError: 'swallowed' (swallowed by a widget in cell 1)"),
        ("04_claim", "ClaimError: two is one: claimed at most 1, got 2 (fails)."),
        ("05_network", "tried to use the network: getaddrinfo to 192.0.2.1"),
        ("06_thread", "OSError: in a thread (raised in the background)"),
        ("07_exit", "SystemExit: 0"),
        ("09_dies", "the kernel died in cell 1"),
    ],
)
def test_reasons_are_in_the_results_the_log_the_notebook_and_the_pages(ran, name, reason):
    done, out, results = ran
    assert results["run"]["errors"][name].startswith(reason)
    assert reason in done.stdout
    for page in (out / "index.html", out / "html" / f"{name}.html"):
        assert reason.partition("'")[0] in page.read_text(encoding="utf-8")
    if name != "05_network":  # there the code caught it: only the run knows
        assert [o.output_type for o in _outputs(out, name)].count("error") >= 1 or name == "03_widget"


def test_tracebacks_are_shown_without_terminal_colours(ran):
    done, out, _ = ran
    page = (out / "html" / "03_widget.html").read_text(encoding="utf-8")
    for text in (done.stdout, page):
        assert "\x1b" not in text
    assert "raise KeyError('swallowed')" in done.stdout


def test_what_ran_before_a_failure_is_kept(ran):
    _, out, _ = ran
    assert _outputs(out, "02_slow")[0].text == "begun\n"
    assert "never" not in json.dumps(_outputs(out, "01_fails"))


def test_results_follow_the_contract(ran):
    _, _, results = ran
    assert list(results) == ["run", "notebooks", "results", "claims"]
    run = results["run"]
    assert (run["profile"], run["seed"], run["threads"], run["complete"], run["exit_code"]) == ("quick", 0, 1, True, 1)
    assert run["versions"]["python"] == sys.version.split()[0] and run["versions"]["torch"]
    assert set(run["machine"]) == {"system", "processor", "cores", "memory_gb"}
    assert run["parameters"]["00_fine"] == {"seed": 0, "n": 7} and run["not_run"] == []
    assert [a["host"] for a in run["network_attempts"]] == ["192.0.2.1"]
    for row in results["notebooks"]:
        assert set(row) == {"name", "status", "seconds", "peak_rss_mb"}
        assert 0 < row["seconds"] < 60 and 20 < row["peak_rss_mb"] < 2000
    estimate = {"value": 1.5, "low": 1.2, "high": 1.8}
    row = {"notebook": "00_fine", "name": "nll/toy/quality", **estimate, "unit": "nats", "n": 7, "seeds": [0]}
    assert results["results"] == [row]
    claims = {c["claim"]: c for c in results["claims"]}
    said = {"notebook": "00_fine", "claim": "It grows <b>", "kind": "statistical", "paper": "yes"}
    assert claims["It grows <b>"] == {**said, "verdict": "holds", **estimate}
    verdicts = {"It grows <b>": "holds", "It shrinks": "fails", "One is one": "holds", "two is one": "fails"}
    assert {text: c["verdict"] for text, c in claims.items()} == verdicts


def test_kernels_are_this_python_with_capped_threads_and_a_folder_of_their_own(ran):
    _, out, results = ran
    printed = next(o.text for o in _outputs(out, "08_größe ✓") if o.output_type == "stream")
    assert printed.splitlines() == [sys.executable, "['1', '1', '1']"]
    assert not (out / "work").exists()
    peak = {n["name"]: n["peak_rss_mb"] for n in results["notebooks"]}
    assert peak["08_größe ✓"] > peak["07_exit"] + 140  # the 150 MB that it held


def test_pages_are_there_for_all_and_hold_no_widget_state(ran):
    _, out, _ = ran
    assert {p.stem for p in (out / "html").iterdir()} == {p.stem for p in (out / "notebooks").iterdir()} == set(TOYS)
    assert "plotly.js v" in (out / "html" / "08_größe ✓.html").read_text(encoding="utf-8")
    index = (out / "index.html").read_text(encoding="utf-8")
    assert "It grows &lt;b&gt;" in index and "nll/toy/quality" in index and "08_größe ✓" in index
    notebook = nbformat.read(out / "notebooks" / "03_widget.ipynb", as_version=4)
    assert "widgets" not in notebook.metadata
    assert os.path.basename(str(out.parent)) not in json.dumps(notebook.metadata)


def test_statistical_claims_that_fail_are_reported_and_pass(toys, tmp_path):
    done = subprocess.run(
        _pllm("run", "0", "--notebooks", toys, "--out", tmp_path / "out", "--quiet", "-p", "00_fine:seed=4"),
        capture_output=True, text=True, encoding="utf-8", timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "claims: 2 hold, 1 fail, 0 inconclusive" in done.stdout
    assert json.loads((tmp_path / "out" / "results.json").read_text(encoding="utf-8"))["run"]["seed"] == 4


def test_ctrl_c_keeps_what_was_finished(toys, tmp_path, write_notebook):
    stubborn = (
        "import time\nwhile True:\n    try:\n        time.sleep(60)\n    except KeyboardInterrupt:\n        print('no')"
    )
    write_notebook(tmp_path / "nb" / "00_quick.ipynb", ["from pllm_helpers.batch import record\nrecord('x', 1)"])
    write_notebook(tmp_path / "nb" / "01_stubborn.ipynb", ["print('here')", stubborn])
    write_notebook(tmp_path / "nb" / "02_never.ipynb", ["1"])
    out = tmp_path / "out"
    process = subprocess.Popen(
        _pllm("run", "--notebooks", tmp_path / "nb", "--out", out),
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, encoding="utf-8",
    )  # fmt: skip
    try:
        part = out / "notebooks" / "01_stubborn.ipynb"
        deadline = time.monotonic() + 60
        while not part.exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        time.sleep(2.5)  # the kernel is up and in its loop
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, output
    assert "Traceback" not in output and "Interrupted: 1 of 3" in output
    results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    assert [(n["name"], n["status"]) for n in results["notebooks"]] == [("00_quick", "ok"), ("01_stubborn", "failed")]
    run = results["run"]
    assert (run["complete"], run["interrupted"], run["not_run"]) == (False, "01_stubborn", ["02_never"])
    assert [r["name"] for r in results["results"]] == ["x"]
    assert "here\n" in [o.get("text") for o in _outputs(out, "01_stubborn")]
    assert "Interrupted" in (out / "index.html").read_text(encoding="utf-8")
    assert {p.name for p in out.iterdir()} - {".lock"} == {"notebooks", "html", "index.html", "results.json"}


def test_an_earlier_run_leaves_nothing_behind(toys, tmp_path, write_notebook):
    write_notebook(tmp_path / "nb" / "a.ipynb", ["1"])
    write_notebook(tmp_path / "nb" / "b.ipynb", ["from pllm_helpers.batch import record\nrecord('x', 1)"])
    out = tmp_path / "out"
    first = run_series(folder=tmp_path / "nb", out=out, quiet=True)
    assert (first.exit_code, [n["name"] for n in first.results["notebooks"]]) == (0, ["a", "b"])
    (out / "notes.txt").write_text("mine", encoding="utf-8")
    second = run_series(["a"], folder=tmp_path / "nb", out=out, quiet=True)
    assert second.exit_code == 0 and second.results["results"] == []
    assert sorted(p.name for p in [*(out / "html").iterdir(), *(out / "notebooks").iterdir()]) == ["a.html", "a.ipynb"]
    assert "html/b.html" not in (out / "index.html").read_text(encoding="utf-8")
    assert (out / "notes.txt").read_text(encoding="utf-8") == "mine"


def test_a_deterministic_claim_fails_the_run_even_where_its_error_is_caught(tmp_path, write_notebook):
    caught = "try:\n    claim('x', 2, below=1, kind='deterministic')\nexcept AssertionError:\n    pass"
    write_notebook(tmp_path / "nb" / "a.ipynb", ["from pllm_helpers.batch import claim", caught])
    report = run_series(folder=tmp_path / "nb", out=tmp_path / "out", quiet=True)
    assert (report.results["notebooks"][0]["status"], report.exit_code) == ("ok", 1)


def test_bad_input_runs_nothing_and_touches_nothing(toys, tmp_path):
    out = tmp_path / "out"
    for options, expected in (
        ({"profile": "fast"}, "profile"),
        ({"parameters": {"sed": 1}}, "parameter sed"),
        ({"threads": 0}, "threads"),
        ({"timeout": 0}, "timeout"),
        ({"notebooks": [55]}, "55"),
        ({"folder": tmp_path / "absent"}, "notebooks"),
    ):
        with pytest.raises(InputError, match=expected):
            run_series(**{"folder": toys, "out": out, **options})
        assert not out.exists()


def test_folders_that_hold_something_else_are_refused(toys, tmp_path, write_notebook):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("x", encoding="utf-8")
    (tmp_path / "file").write_text("x", encoding="utf-8")
    write_notebook(tmp_path / "checkout" / "notebooks" / "a.ipynb", ["1"])
    source = tmp_path / "checkout" / "notebooks"
    for folder, out in (
        (toys, tmp_path / "full"),
        (toys, tmp_path / "file"),
        (source, tmp_path / "checkout"),
        (source, source),
        (source, source / "inside" / ".."),
    ):
        with pytest.raises(InputError, match="out: expected"):
            run_series(folder=folder, out=out)
    assert (tmp_path / "full" / "thesis.txt").exists() and (source / "a.ipynb").exists()


def test_two_runs_do_not_share_a_folder(toys, tmp_path):
    from filelock import FileLock

    (tmp_path / "out").mkdir()
    with FileLock(tmp_path / "out" / ".lock"), pytest.raises(InputError, match="no other run"):
        run_series(["0"], folder=toys, out=tmp_path / "out")


def test_kernel_environment_chains_the_path(monkeypatch, tmp_path):
    monkeypatch.setenv("PYTHONPATH", "mine")
    guarded = kernel_environment(3, network_log=tmp_path / "log")
    assert re.fullmatch(r".*guard" + re.escape(os.pathsep) + "mine", guarded["PYTHONPATH"])
    free = kernel_environment(3)
    assert (free["PYTHONPATH"], free["OPENBLAS_NUM_THREADS"]) == ("mine", "3") and "PLLM_NETWORK_LOG" not in free


def test_the_last_traceback_in_a_text_is_cut_out():
    head = "Traceback (most recent call last):"
    assert traceback_in(f"noise\n{head}\n  File x\nA: 1\nmore\n{head}\n  y\nB: 2\nend") == f"{head}\n  y\nB: 2"
    assert traceback_in("UserWarning: no traceback") == ""
