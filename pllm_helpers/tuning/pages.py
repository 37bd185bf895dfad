"""Which tensors are clean pages of a file, and how to give those pages back to the system.

A memory-mapped weight costs resident memory only while its pages are in use. ``drop`` tells the
system that they are not needed now; the next access reads them again, from the page cache or
from storage. Linux only; elsewhere no tensor counts as mapped.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

DONTNEED = 4  # MADV_DONTNEED of Linux
_HEAD = re.compile(r"^([0-9a-f]+)-([0-9a-f]+) (\S{4}) \S+ \S+ (\d+)\s*(.*)$")


class Range(NamedTuple):
    """Addresses ``start`` to ``end``, on page borders."""

    start: int
    end: int


class Mapping(NamedTuple):
    """A file-backed part of the address space, and how many kilobytes of it were written to in memory."""

    start: int
    end: int
    path: str
    written_kb: int


def file_mappings() -> list[Mapping]:
    """Private, readable file mappings of this process; none where the system does not tell."""
    found: list[Mapping] = []
    try:
        lines = Path("/proc/self/smaps").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return found
    for line in lines:
        head = _HEAD.match(line)
        if head:
            start, end, mode, inode, path = head.groups()
            usable = inode != "0" and mode.startswith("r") and mode.endswith("p") and path.startswith("/")
            current = Mapping(int(start, 16), int(end, 16), path, 0) if usable else None
        elif current and line.startswith("Anonymous:"):
            found.append(current._replace(written_kb=int(line.split()[1])))
    return found


def mapped_pages(tensors: Iterable[torch.Tensor]) -> dict[int, tuple[Range, ...]]:
    """``id(tensor)`` -> its pages, for every tensor that lies in pages of a file that nobody has written to.

    A mapping with pages that were changed in memory is left out as a whole: dropping them would
    undo the changes.
    """
    clean = [m for m in file_mappings() if m.written_kb == 0]
    found = {}
    for t in tensors:
        if t.device.type != "cpu" or not t.is_contiguous():
            continue
        start, end = t.data_ptr(), t.data_ptr() + t.nbytes
        for m in clean:
            if m.start <= start and end <= m.end:
                size = mmap.PAGESIZE
                found[id(t)] = (Range(start // size * size, min(m.end, -(-end // size) * size)),)
                break
    return found


@functools.cache
def _madvise() -> Any:
    function = ctypes.CDLL(None, use_errno=True).madvise
    function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return function


def drop(pages: Sequence[Range]) -> None:
    """Give the resident pages of these ranges back; only for ranges from :func:`mapped_pages`."""
    for r in pages:
        if _madvise()(r.start, r.end - r.start, DONTNEED):
            raise OSError(ctypes.get_errno(), "madvise failed")
