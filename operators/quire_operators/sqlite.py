"""How a store's file is opened, and what SQLite's errors mean to whoever wanted something written.

SQLite in WAL mode through SQLAlchemy Core, `synchronous=FULL`: what was acknowledged survives a power cut. Every
transaction begins IMMEDIATE (one that reads first and upgrades later fails at once when another writes, whatever
the timeout). The control plane's store and the router's are files of their own; each has one process that writes.

Exceptions:

    StoreError
    ├── StoreUnavailable    the disk is full, read-only or failing: nothing was written
    └── UnusableStore       another version's file, a network filesystem, a damaged one, or a wrong database
"""

from __future__ import annotations

import os
import sqlite3
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from quire_operators.host import NETWORK_FILESYSTEMS, file_system
from quire_operators.paths import sync_folder


class StoreError(Exception):
    """The store cannot do what was asked."""

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class StoreUnavailable(StoreError):
    """The file cannot be written or read now. `full` says that it is for want of room, `passing` that the cause
    lies outside the file and can pass."""

    def __init__(self, message: str, hint: str, *, full: bool, passing: bool) -> None:
        super().__init__(message, hint)
        self.full = full
        self.passing = passing

    @classmethod
    def of(cls, error: sa.exc.DBAPIError, path: Path) -> StoreUnavailable:
        """What SQLite's error means for whoever wanted something written."""
        code = getattr(error.orig, "sqlite_errorcode", 0) & 0xFF
        # A disk whose quota or limit is reached answers with an error of input and output.
        full = code in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR)
        hint = {
            sqlite3.SQLITE_READONLY: f"make {path.parent} writable",
            sqlite3.SQLITE_BUSY: "another program holds the store open: end it",
        }.get(code, f"make room where {path.parent} is" if full else "platform doctor says more")
        return cls(
            f"the store {path} cannot be used now: {error.orig}. Nothing was stored; what runs goes on",
            f"{hint}, then try again",
            full=full,
            passing=full or code in (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_BUSY),
        )


class UnusableStore(StoreError):
    """The file, or the database, cannot serve as a store."""


def _refuse_network_filesystem(folder: Path) -> None:
    """SQLite's locks and its WAL do not hold on a network filesystem. Raises `UnusableStore`."""
    kind = file_system(folder)
    if kind in NETWORK_FILESYSTEMS:
        raise UnusableStore(
            f"the state directory {folder} is on a network filesystem ({kind})",
            "QUIRE_STATE_DIR must name a folder on a local disk",
        )


class File:
    """A store's file, made if it is not there. Raises `OSError`, `UnusableStore` where locks do not hold."""

    def __init__(self, path: Path) -> None:
        _refuse_network_filesystem(path.parent)
        self._path = path
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        os.fchmod(descriptor, 0o600)
        opened = os.fstat(descriptor)
        self._opened = (opened.st_dev, opened.st_ino)
        os.close(descriptor)

    def __str__(self) -> str:
        return str(self._path)

    def engine(self) -> sa.Engine:
        """With one connection, which the thread that uses it first keeps."""
        engine = sa.create_engine(f"sqlite:///{self._path}", poolclass=sa.pool.StaticPool)
        sa.event.listen(engine, "connect", _set_pragmas)
        sa.event.listen(engine, "begin", _begin_immediate)
        return engine

    def refusal(self, error: sa.exc.DBAPIError) -> StoreUnavailable:
        """What an error means for whoever wanted something written."""
        return StoreUnavailable.of(error, self._path)

    def unusable(self, error: sa.exc.DBAPIError) -> StoreError:
        """What an error means for whoever opens it."""
        refused = self.refusal(error)
        if refused.passing:
            return refused
        return UnusableStore(
            f"{self._path} is not a usable store: {error.orig}",
            "move it away; what was applied must be applied again",
        )

    def prepare(self, db: sa.Connection) -> None:
        """Nothing: a transaction has the file to itself."""

    def hear_of_writes(self, db: sa.Connection) -> None:
        """Be able to say from now on whether somebody else has written."""
        self._driver: sqlite3.Connection = db.connection.driver_connection  # type: ignore[assignment]
        self._data_version = self._version()

    def written_elsewhere(self) -> bool:
        """Whether another connection has written since this was asked last."""
        before, self._data_version = self._data_version, self._version()
        return before != self._data_version

    def _version(self) -> int:
        try:
            (version,) = self._driver.execute("PRAGMA data_version").fetchone()
        except sqlite3.Error:
            return self._data_version  # the next transaction says what is wrong
        return int(version)

    def close(self) -> None:
        """Nothing is open beside the engine."""

    def keep_copy(self, db: sa.Connection, schema: int) -> None:
        """Copy a store beside itself before anything of it is changed: the version that wrote it can use the copy.
        An earlier copy of the same schema is kept: it is the one from before."""
        kept = self._path.with_name(f"{self._path.name}.schema{schema}")
        if kept.exists():
            return
        making = kept.with_name(f"{kept.name}.part")
        try:
            making.unlink(missing_ok=True)
            with closing(sqlite3.connect(self._path)) as source, closing(sqlite3.connect(making)) as copy:
                making.chmod(0o600)
                source.backup(copy)
            making.replace(kept)
            sync_folder(kept.parent)
        except (sqlite3.Error, OSError) as error:
            with suppress(OSError):
                making.unlink()
            raise UnusableStore(
                f"{self._path} is of an earlier version and cannot be copied before it is changed: {error}",
                f"make room and the folder {self._path.parent} writable; nothing was changed",
            ) from error

    def check_in_place(self) -> None:
        """Raise `StoreUnavailable` where the open file is not the one of that name: writes would be lost."""
        try:
            found = os.stat(self._path)
        except OSError:
            found = None
        if found is None or (found.st_dev, found.st_ino) != self._opened:
            raise StoreUnavailable(
                f"{self._path} was moved away or replaced while it was open",
                "put it back; to begin anew with another one: platform daemon restart",
                full=False,
                passing=True,
            )


def _set_pragmas(connection: Any, _record: Any) -> None:
    connection.isolation_level = None  # SQLAlchemy begins transactions itself: see _begin_immediate
    cursor = connection.cursor()
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "busy_timeout=5000", "foreign_keys=ON"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _begin_immediate(connection: sa.Connection) -> None:
    connection.exec_driver_sql("BEGIN IMMEDIATE")
