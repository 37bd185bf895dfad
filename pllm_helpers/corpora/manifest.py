"""Checksums of everything in ``data``: ``python -m pllm_helpers.corpora.manifest [--write]``.

``data/MANIFEST.sha256`` has the layout of ``sha256sum``, so ``sha256sum -c MANIFEST.sha256`` in
``data`` checks it too. Hidden files and folders, and the manifest itself, are left out.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from ..runtime import InputError, data_dir

__all__ = ["MANIFEST", "checksums", "read_manifest", "verify", "write_manifest"]

MANIFEST = "MANIFEST.sha256"


def checksums(folder: Path) -> dict[str, str]:
    """SHA-256 of every file under ``folder`` by its relative POSIX path, sorted by path."""
    found = {}
    for path in folder.rglob("*"):
        relative = path.relative_to(folder)
        hidden = any(part.startswith(".") or part == "__pycache__" for part in relative.parts)
        if path.is_file() and not hidden and relative.as_posix() != MANIFEST:
            with path.open("rb") as stream:
                found[relative.as_posix()] = hashlib.file_digest(stream, "sha256").hexdigest()
    return dict(sorted(found.items()))


def read_manifest(folder: Path) -> dict[str, str]:
    """The manifest of ``folder``. Raises :class:`InputError` if it is missing or malformed."""
    path = folder / MANIFEST
    if not path.is_file():
        raise InputError(MANIFEST, f"expected it in {folder}", "Write it with --write.")
    listed: dict[str, str] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        digest, gap, name = line[:64], line[64:66], line[66:]
        if len(digest) != 64 or set(digest) - set("0123456789abcdef") or gap != "  " or not name or name in listed:
            raise InputError(
                f"{MANIFEST}, line {number}", f"expected 'sha256  path', got {line!r}", "Write it with --write."
            )
        listed[name] = digest
    return listed


def verify(folder: Path | None = None) -> list[str]:
    """What differs from the manifest, a line each: ``missing``, ``changed`` or ``not listed``; ``[]`` if nothing."""
    folder = folder or data_dir()
    listed, found = read_manifest(folder), checksums(folder)
    faults = [f"missing: {name}" for name in listed if name not in found]
    faults += [f"changed: {name}" for name, digest in found.items() if listed.get(name, digest) != digest]
    return faults + [f"not listed: {name}" for name in found if name not in listed]


def write_manifest(folder: Path | None = None) -> Path:
    """Write the manifest of ``folder`` (default: the project's ``data``) in one step; gives its path."""
    folder = folder or data_dir()
    lines = [f"{digest}  {name}\n" for name, digest in checksums(folder).items()]
    handle, temporary = tempfile.mkstemp(dir=folder, prefix=".manifest-")
    with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as stream:
        stream.writelines(lines)
    os.chmod(temporary, 0o644)
    os.replace(temporary, folder / MANIFEST)
    return folder / MANIFEST


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; 0 if all is as listed, 1 if not."""
    parser = argparse.ArgumentParser(
        prog="python -m pllm_helpers.corpora.manifest", description="Check the data files."
    )
    parser.add_argument("--write", action="store_true", help="write the manifest instead of checking it")
    if parser.parse_args(arguments).write:
        path = write_manifest()
        print(f"{len(read_manifest(path.parent))} files listed in {MANIFEST}")
        return 0
    try:
        faults = verify()
    except InputError as error:
        print(error, file=sys.stderr)
        return 1
    print("\n".join(faults) if faults else "all files are as listed")
    return 1 if faults else 0


if __name__ == "__main__":
    raise SystemExit(main())
