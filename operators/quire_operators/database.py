"""The file that the store keeps everything in: opened, brought up to date, written in whole transactions.

How the file is opened, and what its errors mean, is `sqlite`'s part. Every write is one transaction.

What is read is kept until it is written: each pass over each model asks for the same. Only this process writes
(the control plane has `daemon.lock`); should another have, SQLite says so (`data_version`), and all is read anew.
What a read gave is shared: nobody changes it.

Exceptions, besides those of `sqlite`:

    StoreError
    ├── Conflict            the object changed since it was read
    └── NotFound            no such object
"""

from __future__ import annotations

import json
import sqlite3
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import sqlalchemy as sa
from sqlalchemy.dialects.sqlite import insert

from quire_operators.clock import SteadyClock, boot_id, new_base
from quire_operators.paths import sync_folder
from quire_operators.sqlite import File, StoreError, StoreUnavailable, UnusableStore
from quire_operators.tables import EVENTS, META, METADATA, OBJECTS, REPLICAS, SCHEMA_VERSION, UPGRADES

T = TypeVar("T")


class Conflict(StoreError):
    """Somebody else changed the object since it was read."""


class NotFound(StoreError):
    """No such object."""


class Database:
    """One open database. `clock` gives unix seconds; without one it is the steady clock that the file keeps."""

    def __init__(self, path: Path, clock: Callable[[], float] | None = None) -> None:
        self._path = path
        self._kept: dict[str, dict[str, Any]] = {}
        """What was read, by the table it is of and by uid, model or kind."""
        self._data_version = -1
        self.rows_version = 0
        """Changes whenever a replica's row may have."""
        self._file = File(path)
        self._engine = self._file.engine()
        try:
            with self._engine.begin() as db:
                self._upgrade(db, path)
                METADATA.create_all(db)
                self.install_id = self.setting(db, "installId", lambda: uuid.uuid4().hex)
                self.clock = clock or self._steady_clock(db)
                self._driver: sqlite3.Connection = db.connection.driver_connection  # type: ignore[assignment]
                """The only connection of the pool."""
        except sa.exc.DatabaseError as error:
            self._engine.dispose()
            refused = StoreUnavailable.of(error, path)
            if refused.passing:
                raise refused from error
            raise UnusableStore(
                f"{path} is not a usable store: {error.orig}",
                "move it away; what was applied must be applied again",
            ) from error

    def _upgrade(self, db: sa.Connection, path: Path) -> None:
        """Bring an older store to this schema, in the transaction that opens it."""
        META.create(db, checkfirst=True)
        found = int(self.setting(db, "schemaVersion", lambda: str(SCHEMA_VERSION)))
        if found > SCHEMA_VERSION:
            raise UnusableStore(
                f"{path} was written by another version (schema {found}, this version has {SCHEMA_VERSION})",
                "use the version that wrote it, or choose another state directory",
            )
        if found < SCHEMA_VERSION:
            self._back_up(path, found)
        for version in range(found, SCHEMA_VERSION):
            for statement in UPGRADES[version]:
                db.exec_driver_sql(statement)
        self.keep_setting(db, "schemaVersion", str(SCHEMA_VERSION))

    @staticmethod
    def _back_up(path: Path, schema: int) -> None:
        """Copy a store beside itself before anything of it is changed: the version that wrote it can use the copy.
        An earlier copy of the same schema is kept: it is the one from before."""
        kept = path.with_name(f"{path.name}.schema{schema}")
        if kept.exists():
            return
        making = kept.with_name(f"{kept.name}.part")
        try:
            making.unlink(missing_ok=True)
            with closing(sqlite3.connect(path)) as source, closing(sqlite3.connect(making)) as copy:
                making.chmod(0o600)
                source.backup(copy)
            making.replace(kept)
            sync_folder(kept.parent)
        except (sqlite3.Error, OSError) as error:
            with suppress(OSError):
                making.unlink()
            raise UnusableStore(
                f"{path} is of an earlier version and cannot be copied before it is changed: {error}",
                f"make room and the folder {path.parent} writable; nothing was changed",
            ) from error

    def _steady_clock(self, db: sa.Connection) -> SteadyClock:
        """The clock of this boot, or a new one that no time on record is ahead of."""
        kept = json.loads(self.setting(db, "clock", lambda: "{}"))
        if kept.get("boot") != boot_id():
            columns = (
                REPLICAS.c.created_at, REPLICAS.c.launched_at, REPLICAS.c.ready_since, REPLICAS.c.drain_since,
                REPLICAS.c.stop_sent, OBJECTS.c.applied_at, OBJECTS.c.deletion_time, EVENTS.c.last_seen,
            )  # fmt: skip
            newest = [db.scalar(sa.select(sa.func.max(column))) or 0.0 for column in columns]
            kept = {"boot": boot_id(), "base": new_base(max(newest))}
            self.keep_setting(db, "clock", json.dumps(kept))
        return SteadyClock(kept["base"])

    @staticmethod
    def keep_setting(db: sa.Connection, key: str, value: str) -> None:
        statement = insert(META).values(key=key, value=value)
        db.execute(statement.on_conflict_do_update(index_elements=["key"], set_={"value": value}))

    @staticmethod
    def setting(db: sa.Connection, key: str, default: Callable[[], str]) -> str:
        value = db.scalar(sa.select(META.c.value).where(META.c.key == key))
        if value is None:
            value = default()
            db.execute(insert(META).values(key=key, value=value))
        return str(value)

    def close(self) -> None:
        self._engine.dispose()

    @contextmanager
    def transaction(self, *touched: tuple[str, str | None]) -> Iterator[sa.Connection]:
        """One transaction, as a whole or not at all. What the disk refuses is a `StoreUnavailable`: nothing was
        written, and the next transaction may well succeed.

        `touched`: what may be written, as (table, key); a key of None is all of the table.
        """
        self._file.check_in_place()
        try:
            with self._engine.begin() as db:
                yield db
        except sa.exc.DBAPIError as error:
            raise StoreUnavailable.of(error, self._path) from error
        finally:
            for table, key in touched:
                self._forget(table, key)

    def _forget(self, table: str, key: str | None) -> None:
        if table == "replicas":
            self.rows_version += 1
        if key is None:
            self._kept.pop(table, None)
        else:
            self._kept.get(table, {}).pop(key, None)

    def read(self, table: str, key: str, load: Callable[[sa.Connection], T]) -> T:
        """What `load` gives, or gave since the last write."""
        kept: dict[str, T] = self.kept_of(table)
        if key not in kept:
            with self.transaction() as db:
                kept[key] = load(db)
        return kept[key]

    def kept_of(self, table: str) -> dict[str, Any]:
        """What was read of a table and not written since, by key; readers may add to it."""
        try:
            (version,) = self._driver.execute("PRAGMA data_version").fetchone()
        except sqlite3.Error:
            version = self._data_version  # the next transaction says what is wrong
        if version != self._data_version:
            self._kept.clear()
            self.rows_version += 1
            self._data_version = version
        return self._kept.setdefault(table, {})
