"""Checksums of the data files."""

import hashlib
import subprocess
import sys

import pytest

from pllm_helpers.corpora.manifest import MANIFEST, main, read_manifest, verify, write_manifest
from pllm_helpers.runtime import InputError


def test_the_projects_data_are_as_listed():
    assert verify() == []


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "z.txt").write_text("z", encoding="utf-8")
    (tmp_path / "a.txt").write_text("a", encoding="utf-8")
    (tmp_path / ".hidden").write_text("h", encoding="utf-8")
    write_manifest(tmp_path)
    return tmp_path


def test_layout_is_that_of_sha256sum(folder):
    digest = {name: hashlib.sha256(name.encode()).hexdigest() for name in "az"}
    assert (folder / MANIFEST).read_bytes().decode() == f"{digest['a']}  a.txt\n{digest['z']}  b/z.txt\n"
    assert list(folder.glob(".manifest-*")) == [] and verify(folder) == []


def test_every_difference_is_named(folder):
    (folder / "a.txt").write_text("A", encoding="utf-8")
    (folder / "b" / "z.txt").unlink()
    (folder / "new.txt").write_text("n", encoding="utf-8")
    assert verify(folder) == ["missing: b/z.txt", "changed: a.txt", "not listed: new.txt"]
    write_manifest(folder)
    assert verify(folder) == [] and list(read_manifest(folder)) == ["a.txt", "new.txt"]


@pytest.mark.parametrize(
    "text", ["nonsense\n", "0" * 64 + " one-space\n", "0" * 64 + "  \n", ("0" * 64 + "  twice\n") * 2]
)
def test_a_malformed_manifest_is_an_error(folder, text):
    (folder / MANIFEST).write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match="line"):
        verify(folder)


def test_a_missing_manifest_says_how_to_write_it(folder):
    (folder / MANIFEST).unlink()
    with pytest.raises(InputError, match="--write"):
        verify(folder)


def test_command_line(folder, monkeypatch, capsys):
    monkeypatch.setattr("pllm_helpers.corpora.manifest.data_dir", lambda: folder)
    assert main([]) == 0 and "as listed" in capsys.readouterr().out
    (folder / "a.txt").write_text("A", encoding="utf-8")
    assert main([]) == 1 and "changed: a.txt" in capsys.readouterr().out
    assert main(["--write"]) == 0 and main([]) == 0
    (folder / MANIFEST).unlink()
    assert main([]) == 1 and "--write" in capsys.readouterr().err


def test_it_runs_as_a_module():
    done = subprocess.run(
        [sys.executable, "-m", "pllm_helpers.corpora.manifest", "--help"],
        capture_output=True,
        text=True,
        encoding="utf-8",
    )
    assert done.returncode == 0 and "--write" in done.stdout and "Warning" not in done.stderr
