"""Which notebooks there are, and what each runs with: selection, profiles, parameters."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import nbformat
import yaml
from nbformat import NotebookNode

from ..runtime import InputError
from .parameters import Parameter, Text, closest, effective, read_parameters, unread_parameters

__all__ = ["PROFILES", "Job", "notebooks_dir", "find_notebooks", "select", "load_profiles", "plan", "tagged"]

PROFILES = ("quick", "standard", "full")
DEFAULT_TIMEOUT = 1800.0
ENTRY_KEYS = ("title", "minutes", "timeout", *PROFILES)


@dataclass(frozen=True)
class Job:
    """One notebook, checked and ready to run.

    Attributes
    ----------
    name : file name without ending; ``title``: its first heading or the profile's title.
    path : the source notebook; only ever read.
    notebook : its content.
    parameters : those its parameters cell declares, by name.
    given : the values to inject (profile, then command line).
    timeout : seconds after which the run of this notebook is stopped.
    """

    name: str
    title: str
    path: Path
    notebook: NotebookNode
    parameters: Mapping[str, Parameter]
    given: Mapping[str, Any]
    timeout: float

    @property
    def values(self) -> dict[str, Any]:
        """Every parameter with the value it runs with."""
        return effective(self.parameters, self.given)

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.path.read_bytes()).hexdigest()


def notebooks_dir() -> Path:
    """The series: inside the installed package, or ``notebooks`` beside it in a checkout.

    Raises :class:`InputError` if neither is there.
    """
    package = Path(__file__).resolve().parents[1]
    for path in (package / "_notebooks", package.parent / "notebooks"):
        if path.is_dir():
            return path
    raise InputError("notebooks", f"expected the folder {package.parent / 'notebooks'}", "Install the project again.")


def find_notebooks(folder: Path) -> list[Path]:
    """Notebooks of ``folder`` in order of their names.

    Raises :class:`InputError` if there is no such folder or no notebook in it.
    """
    if not folder.is_dir():
        raise InputError("notebooks", f"expected a folder, got {str(folder)!r}")
    found = sorted(path for path in folder.glob("*.ipynb") if not path.name.startswith("."))
    if not found:
        raise InputError("notebooks", f"expected .ipynb files in {str(folder)!r}, found none")
    return found


def select(paths: Sequence[Path], wanted: Sequence[str]) -> list[Path]:
    """Those of ``paths`` that are ``wanted``, by number (``1``, ``01``) or name; none wanted: all.

    Raises :class:`InputError` with the closest names where one is unknown.
    """
    if not wanted:
        return list(paths)
    chosen = set()
    for word in wanted:
        plain = word.removesuffix(".ipynb")
        hits = [p for p in paths if p.stem == plain]
        if not hits and plain.isdigit():
            hits = [p for p in paths if (m := re.match(r"\d+", p.stem)) and int(m[0]) == int(plain)]
        if not hits and "/" in plain:
            remedy = "Name notebooks by number or name; another folder is given by --notebooks FOLDER."
            raise InputError("notebook", f"expected a number or a name, got {word!r}", remedy)
        if len(hits) != 1:
            names = ", ".join(p.stem for p in (hits or paths))
            raise InputError(f"notebook {word!r}", f"expected one of {names}{closest(plain, (p.stem for p in paths))}")
        chosen.add(hits[0])
    return [path for path in paths if path in chosen]


def load_profiles(folder: Path, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """``profiles.yaml`` of ``folder``: notebook → entry; empty where the folder has none.

    A notebook without an entry runs with its defaults in every profile.

    An entry holds ``quick``, ``standard`` and ``full`` (parameter → value, possibly empty) and may
    hold ``title``, ``minutes`` (expected, in the quick profile) and ``timeout`` (seconds, one number
    or one per profile).

    Raises :class:`InputError` on anything else, and on an entry for a notebook that is not there.
    """
    path = folder / "profiles.yaml"
    if not path.is_file():
        return {}
    where = path.name
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_StrictLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as problem:
        raise InputError(where, f"expected YAML, got {' '.join(str(problem).split())}") from None
    content = {} if content is None else content
    if not isinstance(content, dict):
        raise InputError(where, f"expected notebook names with their profiles, got {type(content).__name__}")
    for name, entry in content.items():
        if name not in names:
            raise InputError(where, f"expected names of notebooks, got {name!r}{closest(str(name), names)}")
        _check_entry(f"{where}, {name}", entry)
    return content


def _check_entry(where: str, entry: Any) -> None:
    if not isinstance(entry, dict):
        raise InputError(where, f"expected {', '.join(PROFILES)}, got {type(entry).__name__}")
    for key in entry:
        if key not in ENTRY_KEYS:
            raise InputError(
                where, f"expected one of {', '.join(ENTRY_KEYS)}, got {key!r}{closest(str(key), ENTRY_KEYS)}"
            )
    for profile in PROFILES:
        if profile not in entry:
            raise InputError(where, f"expected profile {profile} (write {profile}: {{}} for the defaults)")
        if not isinstance(entry[profile], dict):
            raise InputError(f"{where}, {profile}", f"expected parameter: value, got {type(entry[profile]).__name__}")
    if not isinstance(entry.get("title", ""), str):
        raise InputError(f"{where}, title", f"expected text, got {entry['title']!r}")
    if not _positive(entry.get("minutes", 1)):
        raise InputError(f"{where}, minutes", f"expected a number above 0, got {entry['minutes']!r}")
    timeout = entry.get("timeout", 1)
    per_profile = timeout if isinstance(timeout, dict) else dict.fromkeys(PROFILES, timeout)
    if set(per_profile) != set(PROFILES) or not all(_positive(s) for s in per_profile.values()):
        expected = f"expected seconds above 0, or {', '.join(PROFILES)} with seconds each, got {timeout!r}"
        raise InputError(f"{where}, timeout", expected)


def _positive(x: Any) -> bool:
    return isinstance(x, (int, float)) and not isinstance(x, bool) and 0 < x < float("inf")


class _StrictLoader(yaml.SafeLoader):
    """Safe YAML in which a key may stand only once."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"{key!r} stands twice", node.start_mark)
        return super().construct_mapping(node, deep=deep)


def tagged(notebook: NotebookNode, tag: str) -> list[NotebookNode]:
    """Code cells of ``notebook`` that carry ``tag``."""
    return [c for c in notebook.cells if c.cell_type == "code" and tag in c.metadata.get("tags", [])]


def plan(
    folder: Path,
    wanted: Sequence[str] = (),
    *,
    profile: str = "quick",
    parameters: Mapping[str, Any] | None = None,
    timeout: float | int | None = None,
) -> list[Job]:
    """Choose notebooks and check every value they would run with; runs and writes nothing.

    Parameters
    ----------
    wanted : numbers or names; empty: all of ``folder``.
    parameters : ``{"name": value}`` for every chosen notebook that has the parameter, or
        ``{"notebook:name": value}`` for one.
    timeout : seconds per notebook; without it profiles.yaml decides.

    Raises :class:`InputError` on an unknown profile, notebook or parameter, a value of the wrong
    type or out of range, and on a parameter that its notebook never reads.
    """
    if profile not in PROFILES:
        raise InputError(
            "profile", f"expected one of {', '.join(PROFILES)}, got {profile!r}{closest(profile, PROFILES)}"
        )
    if timeout is not None and not _positive(timeout):
        raise InputError("timeout", f"expected seconds above 0, got {timeout!r}")
    paths = find_notebooks(folder)
    entries = load_profiles(folder, [p.stem for p in paths])
    jobs = []
    for path in select(paths, list(wanted)):
        notebook = _read(path)
        cells = tagged(notebook, "parameters")
        if len(cells) > 1:
            raise InputError(path.stem, f"expected one cell tagged parameters, got {len(cells)}")
        declared = read_parameters(cells[0].source, path.stem) if cells else {}
        entry = entries.get(path.stem, {})
        given: dict[str, Any] = {}
        for each in PROFILES:  # all of them, so that a mistake in `full` shows up today
            where = f"profiles.yaml, {path.stem}, {each}"
            values = {}
            for name, value in entry.get(each, {}).items():
                if name not in declared:
                    near = closest(str(name), declared)
                    raise InputError(where, f"expected parameters of the notebook, got {name!r}{near}")
                values[name] = declared[name].check(value, where)
            if each == profile:
                given = values
        limit = timeout or entry.get("timeout", DEFAULT_TIMEOUT)
        limit = float(limit[profile] if isinstance(limit, dict) else limit)
        title = entry.get("title") or _heading(notebook) or path.stem
        jobs.append(Job(path.stem, title, path, notebook, declared, given, limit))
    return _apply(jobs, parameters or {})


def _apply(jobs: list[Job], parameters: Mapping[str, Any]) -> list[Job]:
    given = {job.name: dict(job.given) for job in jobs}
    # what is meant for one notebook outranks what is meant for all
    for key, value in sorted(parameters.items(), key=lambda item: ":" in item[0]):
        target, colon, name = key.rpartition(":")
        chosen = jobs
        if colon:
            stems = {job.path: job for job in jobs}
            chosen = [stems[p] for p in select([job.path for job in jobs], [target])]
        having = [job for job in chosen if name in job.parameters]
        if not having:
            known = sorted({n for job in chosen for n in job.parameters})
            got = f"{name!r}{closest(name, known)}"
            what = ", ".join(known) if known else "none, as the notebook declares no parameters"
            raise InputError(f"parameter {name}", f"expected one of {what}; got {got}")
        for job in having:
            given[job.name][name] = job.parameters[name].check(value, job.name)
            if unread_parameters([name], _cells_after_parameters(job.notebook)):
                remedy = "Setting it would change nothing."
                raise InputError(
                    f"{job.name}: parameter {name}", "expected a parameter that the notebook reads", remedy
                )
    return [replace(job, given=given[job.name]) for job in jobs]


def _cells_after_parameters(notebook: NotebookNode) -> list[str]:
    code = [c for c in notebook.cells if c.cell_type == "code"]
    first = next((i for i, c in enumerate(code) if "parameters" in c.metadata.get("tags", [])), -1)
    return [c.source for c in code[first + 1 :]]


def _read(path: Path) -> NotebookNode:
    try:
        notebook = nbformat.reads(path.read_text(encoding="utf-8"), as_version=4)
        nbformat.validate(notebook)
    except Exception as e:  # nbformat trips over broken files in many ways
        problem = " ".join(str(e).split())[:200]
        raise InputError(path.name, f"expected a notebook, got {type(e).__name__}: {problem}") from None
    return notebook


def _heading(notebook: NotebookNode) -> str:
    for cell in notebook.cells:
        if cell.cell_type == "markdown" and (m := re.search(r"(?m)^#{1,2}\s+(.+?)\s*#*$", cell.source)):
            return re.sub(r"[*`]", "", m[1])
    return ""


def parse_assignments(texts: Sequence[str]) -> dict[str, Text]:
    """``name=value`` words of the command line.

    Raises :class:`InputError` on a word without ``=`` and on a name given twice.
    """
    found: dict[str, Text] = {}
    for text in texts:
        name, sign, value = text.partition("=")
        name = name.strip()
        if not sign or not name.rpartition(":")[2].isidentifier():
            raise InputError("-p", f"expected name=value or NOTEBOOK:name=value, got {text!r}")
        if name in found:
            raise InputError(f"-p {name}", f"expected it once, got {found[name]!s} and {value}")
        found[name] = Text(value)
    return found
