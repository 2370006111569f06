"""What the store keeps everything in: opened, brought up to date, written in whole transactions.

It is a file of SQLite, or a database of PostgreSQL: how it is opened, what its errors mean and whether somebody
else has written is `sqlite`'s part and `postgres`'s. All the rest is the same for both. Every write is one
transaction, and every transaction that writes makes sure first, and until it is over, that this control plane
still leads (`lease`): whatever was decided before somebody else took over comes to nothing.

What is read is kept until it is written: each pass over each model asks for the same. Only one process writes
(the one that leads); should another have, SQLite and PostgreSQL say so, and all is read anew. What a read gave is
shared: nobody changes it.

Exceptions, besides those of `sqlite`:

    StoreError
    ├── Conflict            the object changed since it was read
    ├── NotFound            no such object
    └── Deposed             another control plane leads, or may: see `lease`
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, TypeVar

import sqlalchemy as sa

from quire_operators.clock import SteadyClock, boot_id, new_base
from quire_operators.postgres import Server
from quire_operators.sqlite import File, StoreError, StoreUnavailable, UnusableStore
from quire_operators.tables import (
    EVENTS,
    LEASES,
    META,
    METADATA,
    OBJECTS,
    REPLICAS,
    SCHEMA_VERSION,
    UPGRADES,
    WRITER_VERSION,
)

T = TypeVar("T")


class Conflict(StoreError):
    """Somebody else changed the object since it was read."""


class NotFound(StoreError):
    """No such object."""


class Deposed(StoreError):
    """This control plane does not lead any more, or cannot know that it does. It changes nothing."""


class Location(Protocol):
    """What differs between SQLite and PostgreSQL. As a text it is what a person calls the place; never a
    secret."""

    def engine(self) -> sa.Engine: ...
    def check_in_place(self) -> None: ...
    def refusal(self, error: sa.exc.DBAPIError) -> StoreUnavailable: ...
    def unusable(self, error: sa.exc.DBAPIError) -> StoreError: ...
    def prepare(self, db: sa.Connection) -> None: ...
    def hear_of_writes(self, db: sa.Connection) -> None: ...
    def written_elsewhere(self) -> bool: ...
    def keep_copy(self, db: sa.Connection, schema: int) -> None: ...
    def close(self) -> None: ...


def location(place: Path | sa.URL) -> Location:
    """What opens the file of this path, which is made, or the database of this URL."""
    return File(place) if isinstance(place, Path) else Server(place)


class Leading(Protocol):
    """That this control plane leads: see `lease`."""

    name: str
    epoch: int

    def check(self) -> None: ...
    def lose(self) -> None: ...


class Database:
    """One open database. `clock` gives unix seconds; without one it is the steady clock that the database keeps.
    Where `lease` is given, nothing is written without it."""

    def __init__(
        self, place: Path | sa.URL, clock: Callable[[], float] | None = None, lease: Leading | None = None
    ) -> None:
        self._kept: dict[str, dict[str, Any]] = {}
        """What was read, by the table it is of and by uid, model or kind."""
        self.rows_version = 0
        """Changes whenever a replica's row may have."""
        self.others_version = 0
        """Changes whenever another connection has written, or may have."""
        self.lease = lease
        self._fenced = False
        """Whether the transaction under way has made sure of the lease."""
        self._location = location(place)
        self._engine = self._location.engine()
        sa.event.listen(self._engine, "before_cursor_execute", self._before)
        try:
            with self._begin() as db:
                self._location.prepare(db)
                self._upgrade(db)
                METADATA.create_all(db)
                self.install_id = self.setting(db, "installId", lambda: uuid.uuid4().hex)
                self.clock = clock or self._steady_clock(db)
                self._location.hear_of_writes(db)
        except sa.exc.DatabaseError as error:
            self.close()
            raise self._location.unusable(error) from error
        except StoreError:
            self.close()
            raise

    def __str__(self) -> str:
        return str(self._location)

    def _upgrade(self, db: sa.Connection) -> None:
        """Bring an older store to this schema, in the transaction that opens it."""
        META.create(db, checkfirst=True)
        found = refuse_newer(db, self._location) or SCHEMA_VERSION
        if found < SCHEMA_VERSION:
            self._location.keep_copy(db, found)
        for version in range(found, SCHEMA_VERSION):
            for statement in UPGRADES[version]:
                db.exec_driver_sql(statement)
        self.keep_setting(db, "schemaVersion", str(SCHEMA_VERSION))
        self.keep_setting(db, "minWriterVersion", str(WRITER_VERSION))

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
        upsert(db, META, {"key": key}, {"value": value})

    @staticmethod
    def setting(db: sa.Connection, key: str, default: Callable[[], str]) -> str:
        value = db.scalar(sa.select(META.c.value).where(META.c.key == key))
        if value is None:
            value = default()
            db.execute(sa.insert(META).values(key=key, value=value))
        return str(value)

    def close(self) -> None:
        self._location.close()
        self._engine.dispose()

    @contextmanager
    def _begin(self) -> Iterator[sa.Connection]:
        self._fenced = False
        with self._engine.begin() as db:
            yield db

    def _before(self, db: sa.Connection, _cursor: Any, statement: str, *_: Any) -> None:
        """Before the first statement of a transaction that changes anything: see that the lease is ours, and keep
        it so until the transaction is over. PostgreSQL has whoever wants it wait for that; SQLite has all wait."""
        if self.lease is None or self._fenced or statement.lstrip()[:6].upper() in _READS:
            return
        self._fenced = True
        query = sa.select(LEASES.c.epoch).where(LEASES.c.name == self.lease.name)
        if db.scalar(query.with_for_update(read=True)) != self.lease.epoch:
            self.lease.lose()
            self.lease.check()

    @contextmanager
    def transaction(self, *touched: tuple[str, str | None]) -> Iterator[sa.Connection]:
        """One transaction, as a whole or not at all. What the disk refuses is a `StoreUnavailable`: nothing was
        written, and the next transaction may well succeed. Raises `Deposed` before anything is written when
        another control plane leads.

        `touched`: what may be written, as (table, key); a key of None is all of the table.
        """
        self._location.check_in_place()
        try:
            with self._begin() as db:
                yield db
        except sa.exc.DBAPIError as error:
            raise self._location.refusal(error) from error
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
        self.look()
        return self._kept.setdefault(table, {})

    def look(self) -> None:
        """Forget what was read if somebody else has written since."""
        if self._location.written_elsewhere():
            self._kept.clear()
            self.rows_version += 1
            self.others_version += 1


_READS = ("SELECT", "PRAGMA", "BEGIN ")


def refuse_newer(db: sa.Connection, place: object) -> int | None:
    """The schema of a database, None of a new one. Raises `UnusableStore` where a newer version has written."""
    query = sa.select(META.c.key, META.c.value).where(META.c.key.in_(("schemaVersion", "minWriterVersion")))
    found = {row.key: int(row.value) for row in db.execute(query)}
    for key, what, own in (
        ("schemaVersion", "schema", SCHEMA_VERSION),
        ("minWriterVersion", "writers of version", WRITER_VERSION),
    ):
        if found.get(key, own) > own:
            raise UnusableStore(
                f"{place} was written by another version ({what} {found[key]}, this version has {own})",
                "use the version that wrote it, or choose another state directory",
            )
    return found.get("schemaVersion")


def upsert(db: sa.Connection, table: sa.Table, key: Mapping[str, Any], values: Mapping[str, Any]) -> None:
    """Write a row under its primary key, in place of one that has it."""
    if db.dialect.name == "postgresql":  # neither store loads what the other needs
        from sqlalchemy.dialects.postgresql import insert
    else:
        from sqlalchemy.dialects.sqlite import insert  # type: ignore[assignment]
    statement = insert(table).values(**key, **values)
    db.execute(statement.on_conflict_do_update(index_elements=list(key), set_=dict(values)))
