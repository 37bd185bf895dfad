"""Rows out of files, one at a time: JSON, JSON Lines, CSV, TSV, parquet, MedDialog text, each also gzipped.

The content decides about the format where it can, since data sets travel under wrong suffixes
(JSON Lines called ``.json``). A row that cannot be read is reported and the next one is tried.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import zlib
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..runtime import InputError

__all__ = ["Row", "read_rows", "SUFFIXES"]

SUFFIXES = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".txt")
_CHUNK = 1 << 16
_SPACE = " \t\r\n"


@dataclass(frozen=True, slots=True)
class Row:
    """A row as the file has it (``value``), or what kept it from being read (``problem``).

    ``number`` counts from 1: the line in line-based files, else the record.
    """

    number: int
    value: Any = None
    problem: str = ""


def suffix(path: Path) -> str:
    """Suffix in lower case, without a trailing ``.gz``."""
    name = path.name.lower().removesuffix(".gz")
    return Path(name).suffix


def read_rows(path: Path, name: str) -> Iterator[Row]:
    """Rows of one file. ``name`` (a data set) settles what the file alone leaves open.

    Raises :class:`InputError` if the file is empty, cannot be opened or is in no known format.
    A file that breaks off (truncated gzip, cut JSON) gives its good rows, then one problem row.
    """
    last = 0
    try:
        for row in _dispatch(path, name):
            last = row.number
            yield row
    except (EOFError, zlib.error, OSError) as error:
        if last == 0:
            raise InputError(str(path), f"expected a readable file, got {type(error).__name__}: {error}") from error
        yield Row(last + 1, problem=f"the file breaks off ({type(error).__name__})")


def _dispatch(path: Path, name: str) -> Iterator[Row]:
    with _binary(path) as stream:
        head = stream.read(4096)
    if not head.strip():
        raise InputError(str(path), "expected dialogues, got an empty file")
    if head[:4] == b"PAR1":
        return _parquet(path)
    if head[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise InputError(str(path), "expected UTF-8, got UTF-16", "Save the file as UTF-8.")
    if head.count(0) * 10 > len(head):
        raise InputError(str(path), f"expected one of {_formats()}, got a binary file")
    kind, start = suffix(path), head.decode("utf-8-sig", "replace").lstrip()[:1]
    if start == "[":
        return _json_list(path)
    if start == "{":
        return _json_lines(path) if kind in (".jsonl", ".ndjson") else _json_objects(path)
    if kind in (".csv", ".tsv"):
        return _table(path, name, kind)
    if kind == ".txt" and name == "meddialog":
        return _meddialog(path)
    if kind in (".jsonl", ".ndjson"):
        return _json_lines(path)  # a broken first line; the others may be good
    raise InputError(str(path), f"expected one of {_formats()}, got text that is none of them")


def _formats() -> str:
    return "JSON, JSON Lines, CSV, TSV, parquet (or, for meddialog, its raw text), each also as .gz"


def _binary(path: Path) -> gzip.GzipFile | io.BufferedReader:
    with path.open("rb") as stream:
        zipped = stream.read(2) == b"\x1f\x8b"
    return gzip.open(path, "rb") if zipped else path.open("rb")


def _text(path: Path, newline: str | None = None) -> io.TextIOWrapper:
    # bytes that are not UTF-8 become lone surrogates, which `formats.text` finds and reports per row
    return io.TextIOWrapper(_binary(path), encoding="utf-8-sig", errors="surrogateescape", newline=newline)


# ---------------------------------------------------------------- JSON


def _loads(number: int, text: str) -> Row:
    try:
        return Row(number, json.loads(text))
    except json.JSONDecodeError as error:
        return Row(number, problem=f"not valid JSON: {error.msg}")
    except RecursionError:
        return Row(number, problem="not valid JSON: nested too deeply")


def _json_lines(path: Path) -> Iterator[Row]:
    with _text(path, newline="\n") as stream:
        for number, line in enumerate(stream, 1):
            if line.strip():
                yield _loads(number, line.strip())


def _json_objects(path: Path) -> Iterator[Row]:
    """``.json`` that starts with ``{``: JSON Lines, or one object that holds the rows."""
    with _text(path) as stream:
        first = next(line for line in stream if line.strip())
        several = any(line.strip() for line in stream)
    whole = _loads(1, first)
    if whole.problem and several:
        with _text(path) as stream:
            whole = _loads(1, stream.read())
        several = False
    if whole.problem or several:
        yield from _json_lines(path)
        return
    yield from (Row(i, value) for i, value in enumerate(_unwrap(whole.value), 1))


def _unwrap(value: dict) -> list:
    """Rows of an object: equally long columns, or a list under one of the usual keys; else itself."""
    columns = list(value.values())
    if (
        columns
        and all(isinstance(c, list) for c in columns)
        and len({len(c) for c in columns}) == 1
        and len(columns) > 1
    ):
        return [dict(zip(value, cells, strict=True)) for cells in zip(*columns, strict=True)]
    for key in ("rows", "data", "train"):
        rows = value.get(key)
        if isinstance(rows, list) and rows:  # the Hub's row viewer wraps each row once more
            return [r["row"] if isinstance(r, dict) and isinstance(r.get("row"), dict) else r for r in rows]
    return [value]


def _json_list(path: Path) -> Iterator[Row]:
    """A JSON list, element by element, without holding the file in memory.

    After a broken element the reading goes on at the next ``}, {`` (or ``], [``).
    """
    decoder = json.JSONDecoder()
    with _text(path) as stream:
        buffer, end = stream.read(_CHUNK), False
        position, number, grow = buffer.index("[") + 1, 0, _CHUNK
        while True:
            while position < len(buffer) and buffer[position] in _SPACE + ",":
                position += 1
            if position >= len(buffer) and not end:
                more = stream.read(_CHUNK)
                buffer, position, end = more, 0, not more
                continue
            if position >= len(buffer):
                yield Row(number + 1, problem="the file ends before its JSON list does")
                return
            if buffer[position] == "]":
                return
            try:
                value, position = decoder.raw_decode(buffer, position)
            except json.JSONDecodeError as error:
                # an error well inside the buffer is a fault; at its end, there may just be more to read
                inside = not error.msg.startswith("Unterminated") and error.pos < len(buffer) - 16
                if not (inside or end):
                    more = stream.read(grow)
                    buffer, position, end, grow = buffer[position:] + more, 0, not more, 2 * grow
                    continue
                number += 1
                yield Row(number, problem=f"not valid JSON: {error.msg}")
                closing, opening = (r"\]", r"\[") if buffer[position] == "[" else (r"\}", r"\{")
                found, start = re.compile(rf"{closing}\s*,\s*(?={opening})"), error.pos
                while not (match := found.search(buffer, start)):
                    if not (more := stream.read(_CHUNK)):
                        return
                    buffer, start = buffer[max(start, len(buffer) - 64) :] + more, 0  # a separator may straddle
                position = match.end()
                continue
            except RecursionError:
                yield Row(number + 1, problem="not valid JSON: nested too deeply")
                return
            number, grow = number + 1, _CHUNK
            yield Row(number, value)
            if position > _CHUNK:
                buffer, position = buffer[position:], 0


# ---------------------------------------------------------------- tables


def _table(path: Path, name: str, kind: str) -> Iterator[Row]:
    if name == "empathetic" and kind == ".csv":
        yield from _empathetic_csv(path)
        return
    with _text(path, newline="") as stream:
        waiting = deque([stream.readline()])
        delimiter = "\t" if kind == ".tsv" else max(",;\t", key=waiting[0].count)
        # GLUE's TSV files hold bare quotation marks; elsewhere quotes mean what they mean in CSV
        quoting = csv.QUOTE_NONE if name == "sst2" and kind == ".tsv" else csv.QUOTE_MINIMAL
        taken: list[str] = []

        def lines() -> Iterator[str]:
            while line := waiting.popleft() if waiting else stream.readline():
                taken.append(line)
                yield line

        header: list[str] | None = None
        number = 1
        while True:
            taken.clear()
            problem, cells = "", []
            try:
                cells = next(csv.reader(lines(), delimiter=delimiter, quoting=quoting))
            except StopIteration:
                return
            except csv.Error as error:
                problem = f"not a table row: {error}"
            row, number = number, number + len(taken)
            if not problem and not any(c.strip() for c in cells):
                continue
            if header is None and not problem:
                header = [c.strip() for c in cells]
                if not (name == "sst2" and len(cells) == 2 and cells[1].strip() in ("0", "1")):
                    continue
                header = ["sentence", "label"]  # a file without a header line
            if not problem and header is not None and len(cells) != len(header):
                problem = f"{len(cells)} cells in a row, the header has {len(header)}"
            if problem:
                # an open quotation mark swallows the lines after it: give those back
                waiting.extendleft(reversed(taken[1:]))
                number = row + 1
                yield Row(row, problem=problem)
            else:
                yield Row(row, dict(zip(header or [], cells, strict=True)))


def _empathetic_csv(path: Path) -> Iterator[Row]:
    """EmpatheticDialogues writes commas as ``_comma_`` and quotes nothing: a row is a plain split.

    A file that was saved again by a spreadsheet or pandas has quoted cells, which are understood too.
    """
    with _text(path, newline="\n") as stream:
        header: list[str] = []
        for number, line in enumerate(stream, 1):
            line = line.rstrip("\r\n")
            if not line.strip():
                continue
            cells = line.split(",")
            if header and len(cells) > len(header) and '"' in line:
                cells = next(csv.reader([line]))
            cells = [c[1:-1].replace('""', '"') if _quoted(c) else c for c in cells]
            if not header:
                header = [c.strip() for c in cells]
            elif len(cells) > len(header) or len(cells) < len(header) - 2:  # the last two are often left out
                yield Row(number, problem=f"{len(cells)} cells in a row, the header has {len(header)}")
            else:
                yield Row(number, dict(zip(header, cells, strict=False)))


def _quoted(cell: str) -> bool:
    return len(cell) > 1 and cell[0] == cell[-1] == '"' and '"' not in cell[1:-1].replace('""', "")


def _parquet(path: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches(batch_size=1024):
                for value in batch.to_pylist():
                    number += 1
                    yield Row(number, value)
    except pyarrow.ArrowException as error:
        raise InputError(str(path), f"expected a whole parquet file, got {error}", "Fetch the file again.") from error


# ---------------------------------------------------------------- MedDialog

_SPEAKER = re.compile(r"(patient|doctor)\s*:\s*(.*)$", re.IGNORECASE | re.DOTALL)


def _meddialog(path: Path) -> Iterator[Row]:
    """Raw MedDialog and COVID-Dialogue text: ``id=``, address, Description, Dialogue, ``Patient:``, ``Doctor:``."""
    record: dict[str, Any] | None = None
    found, part = False, ""
    with _text(path) as stream:
        for number, line in enumerate(stream, 1):
            line = line.strip()
            if re.fullmatch(r"id\s*=\s*\S+", line):
                if record is not None:
                    yield _closed(record)
                found, part = True, "address"
                record = {
                    "line": number,
                    "id": line.split("=", 1)[1].strip(),
                    "url": "",
                    "description": "",
                    "turns": [],
                }
            elif record is None or not line:
                continue
            elif line in ("Description", "Dialogue"):
                part = line
            elif part == "address":
                record["url"] = line
            elif part == "Description":
                record["description"] = f"{record['description']}\n{line}".strip()
            elif match := _SPEAKER.match(line):
                record["turns"].append([match[1].lower(), match[2].strip()])
            elif record["turns"]:
                turn = record["turns"][-1]
                turn[1] = f"{turn[1]}\n{line}".strip()
    if record is not None:
        yield _closed(record)
    if not found:
        raise InputError(str(path), 'expected records that start with "id=…" and hold "Patient:" and "Doctor:" lines')


def _closed(record: dict[str, Any]) -> Row:
    number = record.pop("line")
    if not record["turns"]:
        return Row(number, problem="no Patient: or Doctor: line")
    return Row(number, record)
