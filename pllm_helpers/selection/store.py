"""The file under a dialogue buffer: SQLite with a write-ahead log, one writer, every row with a checksum.

Opening checks the whole file (SQLite's own check, then each row's CRC-32); whatever is wrong with
it becomes an :class:`~pllm_helpers.runtime.InputError` that names the file and a remedy, and
nothing is deleted or overwritten.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sqlite3
import tempfile
import threading
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..runtime import InputError

__all__ = ["Store", "checksum"]

APPLICATION_ID = 0x504C4D42  # in the header of every file that we make
SCHEMA_VERSION = 1
WAIT_SECONDS = 1.0  # for a killed writer's lock to go

SCHEMA = f"""
PRAGMA application_id = {APPLICATION_ID};
PRAGMA user_version = {SCHEMA_VERSION};
CREATE TABLE settings (key TEXT PRIMARY KEY, value BLOB NOT NULL, crc INTEGER NOT NULL);
CREATE TABLE entries (
  slot INTEGER PRIMARY KEY, position INTEGER NOT NULL, id TEXT NOT NULL, domain TEXT,
  eoe REAL NOT NULL, dss REAL NOT NULL, idd REAL NOT NULL,
  embedding BLOB NOT NULL, dialogue BLOB NOT NULL, crc INTEGER NOT NULL);
CREATE TABLE progress (
  one INTEGER PRIMARY KEY CHECK (one = 0), position INTEGER NOT NULL, seen INTEGER NOT NULL,
  chain BLOB NOT NULL, random BLOB NOT NULL, crc INTEGER NOT NULL);
CREATE TABLE memory (key TEXT PRIMARY KEY, value BLOB NOT NULL, crc INTEGER NOT NULL);
CREATE TABLE actions (
  number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL, kind TEXT NOT NULL,
  text BLOB NOT NULL, dialogue BLOB NOT NULL, crc INTEGER NOT NULL);
CREATE TABLE state (key TEXT PRIMARY KEY, value BLOB NOT NULL, crc INTEGER NOT NULL);
"""


def checksum(*fields: Any) -> int:
    """CRC-32 of one row's fields, in order."""
    crc = 0
    for field in fields:
        data = field if isinstance(field, bytes) else repr(field).encode("utf-8", "surrogatepass")
        crc = zlib.crc32(data, zlib.crc32(len(data).to_bytes(8, "little"), crc))
    return crc


class Store:
    """One open database; ``path=None`` keeps it in memory.

    A file is held alone until :meth:`close`. Raises :class:`~pllm_helpers.runtime.InputError` for a
    file that is damaged, empty, of another kind or version, read-only, or open elsewhere.
    """

    def __init__(self, path: str | os.PathLike[str] | None):
        self.path = None if path is None else Path(path).expanduser().absolute()
        self.lock = threading.RLock()
        self._connection: sqlite3.Connection | None = None
        self._synchronous = "FULL"
        if self.path is None:
            self._connection = self._connect(":memory:")
            self._connection.executescript(SCHEMA)
            return
        self._look_before_opening(self.path)
        try:
            if not self.path.exists():
                _create(self.path)
            self._connection = self._connect(self.path)
            self._take()
        except (sqlite3.Error, OSError) as e:
            self.close()
            raise self.explain(e) from e
        except BaseException:
            self.close()
            raise

    # ------------------------------------------------------------ opening

    @staticmethod
    def _connect(target: Path | str) -> sqlite3.Connection:
        return sqlite3.connect(target, timeout=WAIT_SECONDS, isolation_level=None, check_same_thread=False)

    def _look_before_opening(self, path: Path) -> None:
        """What SQLite would quietly take for a new database, or would mix into one."""
        log = path.with_name(path.name + "-wal")
        if path.is_dir():
            raise InputError("path", f"expected a file, got the folder {path}", "Add a file name.")
        if not path.parent.is_dir():
            raise InputError("path", f"expected the folder {path.parent} to be there", "Create it first.")
        if not os.access(path.parent, os.W_OK) or (path.exists() and not os.access(path, os.W_OK)):
            raise self.explain(PermissionError(errno.EACCES, "permission denied"))
        size = path.stat().st_size if path.exists() else None
        if size == 0:
            raise InputError(
                "path",
                f"expected a dialogue buffer in {path}, the file is empty",
                "If it should hold something, restore a copy; otherwise remove it.",
            )
        if size is not None and not log.exists():  # else the file may be behind its log
            with open(path, "rb") as file:
                header = file.read(100)
            whole = int.from_bytes(header[16:18], "big") * int.from_bytes(header[28:32], "big")
            if header.startswith(b"SQLite format 3") and size < whole:
                raise self.damaged(f"{size:,} of {whole:,} bytes are left")
        if not path.exists() and log.exists():
            raise InputError(
                "path",
                f"expected {path} beside its write-ahead log {log.name}, found only the log",
                "Restore the file; without it, move the log away.",
            )

    def _take(self) -> None:
        """Refuse other files, lock out other writers, then check every page."""
        c = self.connection
        c.execute("PRAGMA locking_mode = EXCLUSIVE")
        application = c.execute("PRAGMA application_id").fetchone()[0]
        version = c.execute("PRAGMA user_version").fetchone()[0]
        if application != APPLICATION_ID:
            raise InputError(
                "path",
                f"expected a dialogue buffer in {self.path}, got another SQLite database",
                "Choose another file.",
            )
        if version != SCHEMA_VERSION:
            raise InputError(
                "path",
                f"expected version {SCHEMA_VERSION} of the dialogue buffer in {self.path}, got {version}",
                "Open it with the version of this project that wrote it.",
            )
        if c.execute("PRAGMA journal_mode = WAL").fetchone()[0] != "wal":
            raise InputError("path", f"expected a disk that allows a write-ahead log for {self.path}")
        c.execute("PRAGMA synchronous = FULL")
        c.execute("BEGIN IMMEDIATE")  # takes the lock, which stays until the file is closed
        verdict = c.execute("PRAGMA quick_check(1)").fetchone()[0]
        c.execute("COMMIT")
        if verdict != "ok":
            raise self.damaged(verdict)

    # ------------------------------------------------------------ use

    @property
    def open(self) -> bool:
        """Whether it has not been closed."""
        return self._connection is not None

    @property
    def connection(self) -> sqlite3.Connection:
        """The open connection. Raises after :meth:`close`."""
        if self._connection is None:
            raise InputError("buffer", "expected an open buffer, it was closed", "Open it again.")
        return self._connection

    @contextlib.contextmanager
    def transaction(self, *, durable: bool = True) -> Iterator[sqlite3.Connection]:
        """All or nothing. On return the changes survive a kill, and if ``durable`` a power cut too.

        A change that is not durable is on disk by the next durable one at the latest.
        """
        with self.lock:
            c = self.connection
            wanted = "FULL" if durable else "NORMAL"
            try:
                if wanted != self._synchronous:
                    c.execute(f"PRAGMA synchronous = {wanted}")
                    self._synchronous = wanted
                c.execute("BEGIN IMMEDIATE")
                yield c
                c.execute("COMMIT")
            except BaseException as e:
                with contextlib.suppress(sqlite3.Error):
                    if c.in_transaction:
                        c.execute("ROLLBACK")
                if isinstance(e, sqlite3.Error):
                    raise self.explain(e) from e
                raise

    def rows(self, query: str, *values: Any) -> list[tuple[Any, ...]]:
        """Rows whose last column is the checksum of those before it, without it. Raises on damage."""
        with self.lock:
            try:
                found = self.connection.execute(query, values).fetchall()
            except sqlite3.Error as e:
                raise self.explain(e) from e
        for *fields, crc in found:
            if checksum(*fields) != crc:
                raise self.damaged("a row does not match its checksum")
        return [row[:-1] for row in found]

    def close(self) -> None:
        """Write the log back into the file and let go of it. Closing twice is harmless."""
        with self.lock:
            connection, self._connection = self._connection, None
            if connection is not None:
                with contextlib.suppress(sqlite3.Error):  # what was acknowledged is in the log
                    connection.close()

    # ------------------------------------------------------------ errors

    def damaged(self, why: str) -> InputError:
        """The error for a file whose content cannot be trusted."""
        return InputError(
            "path",
            f"expected a sound dialogue buffer in {self.path}, it is damaged ({why})",
            "Nothing was changed. Restore a copy, or move the file and its -wal away to start anew.",
        )

    def explain(self, error: Exception) -> InputError:
        """An error of SQLite or the operating system in words, with file and remedy."""
        where, text = self.path or "memory", str(error)
        # the low byte of SQLite's extended codes is the kind of error
        code = getattr(error, "sqlite_errorcode", -1) & 0xFF
        if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            return InputError(
                "path",
                f"expected {where} for this buffer alone, it is open elsewhere",
                "Close the other buffer, or the kernel that has it.",
            )
        number = error.errno if isinstance(error, OSError) else None
        if code in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR) or number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return InputError(
                "path",
                f"expected room to write {where}, the disk is full or failed ({text})",
                "Nothing acknowledged is lost. Free some space and go on.",
            )
        if code in (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM) or number is not None:
            return InputError(
                "path",
                f"expected a file and folder that may be written, {where} may not ({text})",
                "Change the permissions, or copy the file elsewhere.",
            )
        return self.damaged(text)


def _create(path: Path) -> None:
    """Make an empty database that appears under its name only when it is whole."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-", suffix=".new")
    os.close(handle)
    temporary = Path(name)
    try:
        connection = sqlite3.connect(temporary, isolation_level=None)
        try:
            connection.executescript(f"BEGIN; {SCHEMA} COMMIT;")
        finally:
            connection.close()
        try:
            os.link(temporary, path)  # fails where another process was faster; its file counts then
        except FileExistsError:
            return
        except OSError:  # no hard links on this disk
            os.rename(temporary, path)
        _sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """A new name survives a power cut only once its folder is written; not every system allows it."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
