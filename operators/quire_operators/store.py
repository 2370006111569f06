"""The durable memory of the control plane: what was asked for, what was decided, what was told.

SQLite in WAL mode through SQLAlchemy Core, `synchronous=FULL`: an acknowledged `apply` survives a power cut. Every
write is a transaction that begins IMMEDIATE (a transaction that reads first and upgrades later fails at once when
another writes, whatever the timeout). Objects and replicas carry a `resource_version`, and every update is a
compare-and-set on it. Status and events live in tables of their own, so that writing them never changes an object.

    objects       kind, namespace, name -> intent as submitted, its hash, generation, current revision
    revisions     what one rollout template was resolved to; what needs no new template follows later intents
    replicas      one row each: see `rollout.Row`
    incarnations  the highest incarnation a replica id ever had, so that no two processes ever share one
    overrides     what was decided about an object beside its intent: see `overrides`
    origins       the trace context of the request that made an object's generation
    status        what the reconciler last reported, one JSON document an object
    events        decisions and observations, equal ones counted, capped per object and by age. An object's uid
                  keeps those of a deleted one apart from those of a new one of its name
    meta          installation id, schema version, version of the routing table, base of the clock, and notes that
                  the control plane leaves for the next one

What is read is kept until it is written: each pass over each model asks for the same. Only this process writes
(the control plane has `daemon.lock`); should another have, SQLite says so (`data_version`), and all is read anew.
What a read gave is shared: nobody changes it.

Times are those of the store's clock, which no change of the wall clock moves (see `clock`).

Calls are short and synchronous; the control plane makes them from its event loop.

Exceptions:

    StoreError
    ├── Conflict            the object changed since it was read
    ├── NotFound            no such object
    ├── StoreUnavailable    the disk is full, read-only or failing: nothing was written
    └── UnusableStore       another version's file, a network filesystem, or a damaged one
"""

from __future__ import annotations

import itertools
import json
import os
import secrets
import sqlite3
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeVar

import sqlalchemy as sa
from sqlalchemy.dialects.sqlite import insert

from quire_operators.clock import SteadyClock, boot_id, new_base
from quire_operators.host import NETWORK_FILESYSTEMS, file_system
from quire_operators.overrides import Kind, Override, ended_by_intent
from quire_operators.rollout import Cause, Exit, Goal, Row
from quire_schemas.resource import Key

SCHEMA_VERSION = 3
NAMESPACE = "default"
ALL = "all"
MANY = 8
"""Rows of more models than this are read at once."""
EVENTS_PER_OBJECT = 200
EVENT_SECONDS = 7 * 86400.0

T = TypeVar("T")
_metadata = sa.MetaData()
_meta = sa.Table("meta", _metadata, sa.Column("key", sa.Text, primary_key=True), sa.Column("value", sa.Text))
_objects = sa.Table(
    "objects",
    _metadata,
    sa.Column("uid", sa.Text, primary_key=True),
    sa.Column("kind", sa.Text, nullable=False),
    sa.Column("namespace", sa.Text, nullable=False),
    sa.Column("name", sa.Text, nullable=False),
    sa.Column("generation", sa.Integer, nullable=False),
    sa.Column("resource_version", sa.Integer, nullable=False),
    sa.Column("intent", sa.JSON, nullable=False),
    sa.Column("intent_hash", sa.Text, nullable=False),
    sa.Column("resolved", sa.JSON, nullable=False),
    sa.Column("revision", sa.Integer),
    sa.Column("created_at", sa.Float, nullable=False),
    sa.Column("applied_at", sa.Float, nullable=False),
    sa.Column("deletion_time", sa.Float),
    sa.UniqueConstraint("kind", "namespace", "name"),
)
_revisions = sa.Table(
    "revisions",
    _metadata,
    sa.Column("uid", sa.Text, primary_key=True),
    sa.Column("n", sa.Integer, primary_key=True),
    sa.Column("template_hash", sa.Text, nullable=False),
    sa.Column("resolved", sa.JSON, nullable=False),
    sa.Column("defaults_version", sa.Integer, nullable=False),
    sa.Column("placement", sa.JSON, nullable=False),
    sa.Column("cause", sa.Text, nullable=False),
    sa.Column("created_at", sa.Float, nullable=False),
    sa.Column("load_seconds", sa.Float),
    sa.Column("stable_at", sa.Float),
    sa.Column("failure", sa.Text),
)
_replicas = sa.Table(
    "replicas",
    _metadata,
    sa.Column("id", sa.Text, primary_key=True),
    sa.Column("resource_version", sa.Integer, nullable=False),
    sa.Column("model", sa.Text, nullable=False),
    sa.Column("index", sa.Integer, nullable=False),
    sa.Column("revision", sa.Integer, nullable=False),
    sa.Column("template_hash", sa.Text, nullable=False),
    sa.Column("goal", sa.Text, nullable=False),
    sa.Column("created_at", sa.Float, nullable=False),
    sa.Column("memory", sa.Integer, nullable=False),
    sa.Column("device", sa.Text, nullable=False),
    sa.Column("incarnation", sa.Integer, nullable=False),
    sa.Column("exited", sa.Integer, nullable=False),
    sa.Column("nonce", sa.Text, nullable=False),
    sa.Column("restarts", sa.Integer, nullable=False),
    sa.Column("not_before", sa.Float, nullable=False),
    sa.Column("launched_at", sa.Float, nullable=False),
    sa.Column("ready_since", sa.Float),
    sa.Column("drain_since", sa.Float),
    sa.Column("stop_sent", sa.Float),
    sa.Column("failed_generation", sa.Integer),
    sa.Column("reason", sa.Text, nullable=False),
    sa.Column("message", sa.Text, nullable=False),
    sa.Column("last_exit", sa.JSON),
)
_incarnations = sa.Table(
    "incarnations",
    _metadata,
    sa.Column("id", sa.Text, primary_key=True),
    sa.Column("n", sa.Integer, nullable=False),
)
_status = sa.Table(
    "status", _metadata, sa.Column("uid", sa.Text, primary_key=True), sa.Column("json", sa.JSON, nullable=False)
)
_overrides = sa.Table(
    "overrides",
    _metadata,
    sa.Column("uid", sa.Text, primary_key=True),
    sa.Column("kind", sa.Text, primary_key=True),
    sa.Column("json", sa.JSON, nullable=False),
)
_origins = sa.Table(
    "origins", _metadata, sa.Column("uid", sa.Text, primary_key=True), sa.Column("traceparent", sa.Text)
)
_events = sa.Table(
    "events",
    _metadata,
    sa.Column("id", sa.Integer, primary_key=True, autoincrement=True),
    sa.Column("object", sa.Text, nullable=False, index=True),
    sa.Column("uid", sa.Text, nullable=False, server_default=""),
    sa.Column("type", sa.Text, nullable=False),
    sa.Column("reason", sa.Text, nullable=False),
    sa.Column("message", sa.Text, nullable=False),
    sa.Column("count", sa.Integer, nullable=False),
    sa.Column("first_seen", sa.Float, nullable=False),
    sa.Column("last_seen", sa.Float, nullable=False),
)
_ROW_FIELDS = tuple(field.name for field in fields(Row))
_UPGRADES = {
    1: (
        "ALTER TABLE replicas ADD COLUMN last_exit JSON",
        "ALTER TABLE events ADD COLUMN uid TEXT NOT NULL DEFAULT ''",
    ),
    2: ("ALTER TABLE revisions ADD COLUMN stable_at FLOAT", "ALTER TABLE revisions ADD COLUMN failure TEXT"),
}
"""What turns a store of each older schema into one of the next."""


class StoreError(Exception):
    """The store cannot do what was asked."""

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class Conflict(StoreError):
    """Somebody else changed the object since it was read."""


class NotFound(StoreError):
    """No such object."""


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
    """The file cannot serve as a store."""


@dataclass(frozen=True, slots=True)
class StoredObject:
    """One object. `resolved` is its spec with every default; times are unix seconds."""

    key: Key
    uid: str
    generation: int
    resource_version: int
    intent: dict[str, Any]
    intent_hash: str
    resolved: dict[str, Any]
    revision: int | None
    created_at: float
    applied_at: float
    deletion_time: float | None = None


@dataclass(frozen=True, slots=True)
class Revision:
    """One rollout template of a model. `placement` is what `auto` became (see `placement.Placement`)."""

    uid: str
    n: int
    template_hash: str
    resolved: dict[str, Any]
    defaults_version: int
    placement: dict[str, Any]
    cause: str
    created_at: float
    load_seconds: float | None = None
    stable_at: float | None = None
    """When it last was all that serves, in full number."""
    failure: str | None = None
    """Why it was given up, if it was."""


@dataclass(frozen=True, slots=True)
class NewRevision:
    """A revision about to be written; the store gives it its number."""

    template_hash: str
    defaults_version: int
    placement: dict[str, Any]
    cause: str


@dataclass(frozen=True, slots=True)
class Change:
    """One object of an `apply`: what to write if it is not what is there already.

    `expected` is the resource version that the decision was made on, None for an object that did not exist.
    `revision` None keeps the current revision.
    """

    key: Key
    intent: dict[str, Any]
    intent_hash: str
    resolved: dict[str, Any]
    expected: int | None
    revision: NewRevision | None = None
    keep_revisions: int = 10


@dataclass(frozen=True, slots=True)
class Applied:
    """What became of one object of an `apply`."""

    key: Key
    result: str
    generation: int
    revision: int | None


@dataclass(frozen=True, slots=True)
class Origin:
    """An object's generation, and the W3C traceparent of the request that made it, if that had one."""

    generation: int
    traceparent: str | None


@dataclass(frozen=True, slots=True)
class Event:
    """Something decided or seen; `count` equal ones were folded into this one. `uid` is that of the object, or
    empty for what is not stored: the gateway by its defaults, the control plane."""

    id: int
    object: str
    uid: str
    type: str
    reason: str
    message: str
    count: int
    first_seen: float
    last_seen: float


def _refuse_network_filesystem(folder: Path) -> None:
    """SQLite's locks and its WAL do not hold on a network filesystem. Raises `UnusableStore`."""
    kind = file_system(folder)
    if kind in NETWORK_FILESYSTEMS:
        raise UnusableStore(
            f"the state directory {folder} is on a network filesystem ({kind})",
            "QUIRE_STATE_DIR must name a folder on a local disk",
        )


class Store:
    """One open store. `clock` gives unix seconds; without one it is the steady clock that the store keeps."""

    def __init__(self, path: Path, clock: Callable[[], float] | None = None) -> None:
        _refuse_network_filesystem(path.parent)
        self._path = path
        self._kept: dict[str, dict[str, Any]] = {}
        """What was read, by the table it is of and by uid, model or kind."""
        self._data_version = -1
        self.rows_version = 0
        """Changes whenever a replica's row may have."""
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        os.fchmod(descriptor, 0o600)
        os.close(descriptor)
        self._engine = sa.create_engine(f"sqlite:///{path}", poolclass=sa.pool.StaticPool)
        sa.event.listen(self._engine, "connect", _set_pragmas)
        sa.event.listen(self._engine, "begin", _begin_immediate)
        try:
            with self._engine.begin() as db:
                self._upgrade(db, path)
                _metadata.create_all(db)
                self.install_id = self._setting(db, "installId", lambda: uuid.uuid4().hex)
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
        _meta.create(db, checkfirst=True)
        found = int(self._setting(db, "schemaVersion", lambda: str(SCHEMA_VERSION)))
        if found > SCHEMA_VERSION:
            raise UnusableStore(
                f"{path} was written by another version (schema {found}, this version has {SCHEMA_VERSION})",
                "use the version that wrote it, or choose another state directory",
            )
        if found < SCHEMA_VERSION:
            self._back_up(path, found)
        for version in range(found, SCHEMA_VERSION):
            for statement in _UPGRADES[version]:
                db.exec_driver_sql(statement)
        self._set(db, "schemaVersion", str(SCHEMA_VERSION))

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
        except (sqlite3.Error, OSError) as error:
            with suppress(OSError):
                making.unlink()
            raise UnusableStore(
                f"{path} is of an earlier version and cannot be copied before it is changed: {error}",
                f"make room and the folder {path.parent} writable; nothing was changed",
            ) from error

    def _steady_clock(self, db: sa.Connection) -> SteadyClock:
        """The clock of this boot, or a new one that no time on record is ahead of."""
        kept = json.loads(self._setting(db, "clock", lambda: "{}"))
        if kept.get("boot") != boot_id():
            columns = (
                _replicas.c.created_at, _replicas.c.launched_at, _replicas.c.ready_since, _replicas.c.drain_since,
                _replicas.c.stop_sent, _objects.c.applied_at, _objects.c.deletion_time, _events.c.last_seen,
            )  # fmt: skip
            newest = [db.scalar(sa.select(sa.func.max(column))) or 0.0 for column in columns]
            kept = {"boot": boot_id(), "base": new_base(max(newest))}
            self._set(db, "clock", json.dumps(kept))
        return SteadyClock(kept["base"])

    @staticmethod
    def _set(db: sa.Connection, key: str, value: str) -> None:
        statement = insert(_meta).values(key=key, value=value)
        db.execute(statement.on_conflict_do_update(index_elements=["key"], set_={"value": value}))

    @staticmethod
    def _setting(db: sa.Connection, key: str, default: Callable[[], str]) -> str:
        value = db.scalar(sa.select(_meta.c.value).where(_meta.c.key == key))
        if value is None:
            value = default()
            db.execute(insert(_meta).values(key=key, value=value))
        return str(value)

    def close(self) -> None:
        self._engine.dispose()

    @contextmanager
    def _transaction(self, *touched: tuple[str, str | None]) -> Iterator[sa.Connection]:
        """One transaction, as a whole or not at all. What the disk refuses is a `StoreUnavailable`: nothing was
        written, and the next transaction may well succeed.

        `touched`: what may be written, as (table, key); a key of None is all of the table.
        """
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

    def _read(self, table: str, key: str, load: Callable[[sa.Connection], T]) -> T:
        """What `load` gives, or gave since the last write."""
        kept: dict[str, T] = self._kept_of(table)
        if key not in kept:
            with self._transaction() as db:
                kept[key] = load(db)
        return kept[key]

    def _kept_of(self, table: str) -> dict[str, Any]:
        try:
            (version,) = self._driver.execute("PRAGMA data_version").fetchone()
        except sqlite3.Error:
            version = self._data_version  # the next transaction says what is wrong
        if version != self._data_version:
            self._kept.clear()
            self.rows_version += 1
            self._data_version = version
        return self._kept.setdefault(table, {})

    # ── objects ───────────────────────────────────────────────────────────────────────────────────────────

    def get(self, key: Key) -> StoredObject | None:
        return self._read("objects", str(key), lambda db: self._get(db, key))

    def objects(self, kind: str | None = None) -> Sequence[StoredObject]:
        """All objects, or those of one kind, by kind and name."""

        def load(db: sa.Connection) -> tuple[StoredObject, ...]:
            query = sa.select(_objects).order_by(_objects.c.kind, _objects.c.name)
            if kind is not None:
                query = query.where(_objects.c.kind == kind)
            return tuple(_object(row) for row in db.execute(query).mappings())

        return self._read("objects", f"kind {kind}", load)

    @staticmethod
    def _get(db: sa.Connection, key: Key) -> StoredObject | None:
        query = sa.select(_objects).where(
            _objects.c.kind == key.kind, _objects.c.namespace == NAMESPACE, _objects.c.name == key.name
        )
        row = db.execute(query).mappings().first()
        return _object(row) if row is not None else None

    def apply(self, changes: Sequence[Change], traceparent: str | None = None) -> tuple[Applied, ...]:
        """Write all of them or none. An object whose intent hash is the stored one is not written at all.

        `traceparent` is remembered as the origin of what is written.

        Raises `Conflict` when an object is not what the decision was made on.
        """
        now = self.clock()
        touched: list[tuple[str, str | None]] = [("objects", None)]
        for change in changes:
            old = self.get(change.key)
            touched.append(("replicas", change.key.name))
            touched += [(table, old.uid) for table in ("revisions", "overrides") if old is not None]
        with self._transaction(*touched) as db:
            return tuple(self._apply(db, change, now, traceparent) for change in changes)

    def _apply(self, db: sa.Connection, change: Change, now: float, traceparent: str | None) -> Applied:
        old = self._get(db, change.key)
        if (old.resource_version if old else None) != change.expected:
            raise Conflict(f"{change.key} was changed by somebody else meanwhile", "apply again")
        if old is not None and old.intent_hash == change.intent_hash and old.deletion_time is None:
            return Applied(change.key, "unchanged", old.generation, old.revision)
        if old is not None and old.deletion_time is not None:
            raise Conflict(f"{change.key} is being deleted", "wait until it is gone, then apply again")
        uid = old.uid if old else uuid.uuid4().hex
        revision = old.revision if old else None
        if change.revision is not None:
            revision = self._add_revision(db, uid, change, now)
        elif revision is not None:
            # Its template stays; how many there are, and what can change while they run, is what is wanted now.
            db.execute(
                sa.update(_revisions)
                .where(_revisions.c.uid == uid, _revisions.c.n == revision)
                .values(resolved=change.resolved)
            )
        values = {
            "intent": change.intent,
            "intent_hash": change.intent_hash,
            "resolved": change.resolved,
            "revision": revision,
            "applied_at": now,
        }
        _set_origin(db, uid, traceparent)
        if old is None:
            db.execute(
                insert(_objects).values(
                    uid=uid,
                    kind=change.key.kind,
                    namespace=NAMESPACE,
                    name=change.key.name,
                    generation=1,
                    resource_version=1,
                    created_at=now,
                    **values,
                )
            )
            return Applied(change.key, "created", 1, revision)
        db.execute(
            sa.update(_objects)
            .where(_objects.c.uid == uid, _objects.c.resource_version == old.resource_version)
            .values(generation=old.generation + 1, resource_version=old.resource_version + 1, **values)
        )
        self._end_overrides(db, uid, ended_by_intent(old.resolved, change.resolved))
        return Applied(change.key, "updated", old.generation + 1, revision)

    @staticmethod
    def _add_revision(db: sa.Connection, uid: str, change: Change, now: float) -> int:
        """The next number. Replicas that already run this template are replicas of the new revision. Revisions
        beyond the history are removed, except those that a replica still is of and the last stable one."""
        new = change.revision
        if new is None:
            raise ValueError("no revision to add")
        n = (db.scalar(sa.select(sa.func.max(_revisions.c.n)).where(_revisions.c.uid == uid)) or 0) + 1
        same = sa.select(_revisions.c.load_seconds).where(
            _revisions.c.uid == uid, _revisions.c.template_hash == new.template_hash
        )
        db.execute(
            insert(_revisions).values(
                uid=uid,
                n=n,
                template_hash=new.template_hash,
                resolved=change.resolved,
                defaults_version=new.defaults_version,
                placement=new.placement,
                cause=new.cause,
                created_at=now,
                load_seconds=db.scalar(same.order_by(_revisions.c.n.desc())),
            )
        )
        db.execute(
            sa.update(_replicas)
            .where(_replicas.c.model == change.key.name, _replicas.c.template_hash == new.template_hash)
            .values(revision=n, resource_version=_replicas.c.resource_version + 1)
        )
        running = sa.select(_replicas.c.revision).where(_replicas.c.model == change.key.name)
        stable = (
            sa.select(_revisions.c.n)
            .where(_revisions.c.uid == uid, _revisions.c.stable_at.is_not(None))
            .order_by(_revisions.c.stable_at.desc())
            .limit(1)
        )
        db.execute(
            sa.delete(_revisions).where(
                _revisions.c.uid == uid,
                _revisions.c.n < n - change.keep_revisions,
                _revisions.c.n.not_in(running),
                _revisions.c.n.not_in(stable),
            )
        )
        return n

    def mark_deleting(self, key: Key, traceparent: str | None = None) -> StoredObject:
        """Begin a deletion: the object stays until what runs of it is gone. Raises `NotFound`."""
        with self._transaction(("objects", None)) as db:
            old = self._get(db, key)
            if old is None:
                raise NotFound(f"there is no {key}", "platform get shows what there is")
            if old.deletion_time is not None:
                return old
            new = replace(
                old,
                deletion_time=self.clock(),
                generation=old.generation + 1,
                resource_version=old.resource_version + 1,
            )
            db.execute(
                sa.update(_objects)
                .where(_objects.c.uid == old.uid)
                .values(
                    deletion_time=new.deletion_time,
                    generation=new.generation,
                    resource_version=new.resource_version,
                )
            )
            _set_origin(db, old.uid, traceparent)
            return new

    def remove(self, key: Key) -> None:
        """Forget a deleted object with its revisions and status; its events stay."""
        with self._transaction(
            *((table, None) for table in ("objects", "revisions", "status", "overrides"))
        ) as db:
            old = self._get(db, key)
            if old is None:
                return
            for table in (_objects, _revisions, _status, _origins, _overrides):
                db.execute(sa.delete(table).where(table.c.uid == old.uid))

    def origin(self, key: Key) -> Origin | None:
        """What made the object's generation; None when there is no such object."""
        query = (
            sa.select(_objects.c.generation, _origins.c.traceparent)
            .select_from(_objects.outerjoin(_origins, _origins.c.uid == _objects.c.uid))
            .where(_objects.c.kind == key.kind, _objects.c.namespace == NAMESPACE, _objects.c.name == key.name)
        )
        with self._transaction() as db:
            found = db.execute(query).first()
        return Origin(*found) if found is not None else None

    # ── revisions ─────────────────────────────────────────────────────────────────────────────────────────

    def revisions(self, uid: str) -> Sequence[Revision]:
        """All kept revisions of an object, newest first."""

        def load(db: sa.Connection) -> tuple[Revision, ...]:
            query = sa.select(_revisions).where(_revisions.c.uid == uid).order_by(_revisions.c.n.desc())
            return tuple(Revision(**row) for row in db.execute(query).mappings())

        return self._read("revisions", uid, load)

    def set_load_seconds(self, uid: str, n: int, seconds: float) -> None:
        """Remember how long a replica of this revision took to load, for the next estimate."""
        with self._transaction(("revisions", uid)) as db:
            db.execute(
                sa.update(_revisions)
                .where(_revisions.c.uid == uid, _revisions.c.n == n)
                .values(load_seconds=seconds)
            )

    def mark_stable(self, uid: str, n: int) -> None:
        """Remember that this revision is all that serves, in full number."""
        with self._transaction(("revisions", uid)) as db:
            db.execute(
                sa.update(_revisions)
                .where(_revisions.c.uid == uid, _revisions.c.n == n)
                .values(stable_at=self.clock(), failure=None)
            )

    # ── overrides ─────────────────────────────────────────────────────────────────────────────────────────

    def overrides(self, uid: str) -> tuple[Override, ...]:
        """What was decided about an object beside its intent; those whose time is over, too."""

        def load(db: sa.Connection) -> tuple[Override, ...]:
            query = sa.select(_overrides.c.json).where(_overrides.c.uid == uid).order_by(_overrides.c.kind)
            return tuple(map(Override.from_dict, db.scalars(query)))

        return self._read("overrides", uid, load)

    def set_override(self, uid: str, override: Override, *, failed: tuple[int, str] | None = None) -> None:
        """Keep a decision, in place of one of its kind; with it that a revision failed, and why."""
        with self._transaction(("overrides", uid), ("revisions", uid)) as db:
            values = {"json": override.as_dict()}
            statement = insert(_overrides).values(uid=uid, kind=override.kind.value, **values)
            db.execute(statement.on_conflict_do_update(index_elements=["uid", "kind"], set_=values))
            if failed is not None:
                n, why = failed
                db.execute(
                    sa.update(_revisions).where(_revisions.c.uid == uid, _revisions.c.n == n).values(failure=why)
                )

    def end_overrides(self, uid: str, kinds: Sequence[Kind]) -> None:
        """Take decisions back."""
        with self._transaction(("overrides", uid)) as db:
            self._end_overrides(db, uid, kinds)

    @staticmethod
    def _end_overrides(db: sa.Connection, uid: str, kinds: Sequence[Kind]) -> None:
        named = [kind.value for kind in kinds]
        db.execute(sa.delete(_overrides).where(_overrides.c.uid == uid, _overrides.c.kind.in_(named)))

    # ── replicas ──────────────────────────────────────────────────────────────────────────────────────────

    def replicas(self, model: str | None = None) -> tuple[Row, ...]:
        """Rows of one model, or all, by model and index."""
        if model is not None:
            return self._read("replicas", model, lambda db: self._rows(db, model))
        models = self._read("models of replicas", ALL, self._models_of_rows)
        kept = self._kept_of("replicas")
        if sum(name not in kept for name in models) > MANY:
            kept.update(self._all_rows())
        return tuple(itertools.chain.from_iterable(map(self.replicas, models)))

    def _all_rows(self) -> dict[str, tuple[Row, ...]]:
        query = sa.select(_replicas).order_by(_replicas.c.model, _replicas.c.revision, _replicas.c.index)
        with self._transaction() as db:
            rows = list(map(_row, db.execute(query).mappings()))
        return {model: tuple(of) for model, of in itertools.groupby(rows, key=lambda row: row.model)}

    @staticmethod
    def _rows(db: sa.Connection, model: str) -> tuple[Row, ...]:
        query = sa.select(_replicas).where(_replicas.c.model == model)
        query = query.order_by(_replicas.c.revision, _replicas.c.index)
        return tuple(map(_row, db.execute(query).mappings()))

    @staticmethod
    def _models_of_rows(db: sa.Connection) -> tuple[str, ...]:
        return tuple(db.scalars(sa.select(_replicas.c.model).distinct().order_by(_replicas.c.model)))

    def create_replica(self, row: Row) -> Row:
        """Write a new row. It takes up counting incarnations where its id last stopped."""
        with self._transaction(("replicas", row.model), ("models of replicas", None)) as db:
            last = db.scalar(sa.select(_incarnations.c.n).where(_incarnations.c.id == row.id)) or 0
            row = replace(row, incarnation=last, exited=last)
            db.execute(insert(_replicas).values(resource_version=1, **_values(row)))
            return row

    def update_replica(self, old: Row, new: Row) -> Row:
        """Compare-and-set: `old` must be what is stored, apart from its revision number. Raises `Conflict`."""
        with self._transaction(("replicas", old.model)) as db:
            found = db.execute(sa.select(_replicas).where(_replicas.c.id == old.id)).mappings().first()
            if found is None or replace(_row(found), revision=old.revision) != old:
                raise Conflict(f"replica {old.id} was changed meanwhile", "it is looked at again")
            version = found["resource_version"]
            new = replace(new, revision=found["revision"])
            done = db.execute(
                sa.update(_replicas)
                .where(_replicas.c.id == old.id, _replicas.c.resource_version == version)
                .values(resource_version=version + 1, **_values(new))
            )
            if done.rowcount != 1:
                raise Conflict(f"replica {old.id} was changed meanwhile", "it is looked at again")
            if new.incarnation != old.incarnation:
                statement = insert(_incarnations).values(id=new.id, n=new.incarnation)
                db.execute(statement.on_conflict_do_update(index_elements=["id"], set_={"n": new.incarnation}))
            return new

    def delete_replica(self, row: Row) -> None:
        with self._transaction(("replicas", row.model), ("models of replicas", None)) as db:
            db.execute(sa.delete(_replicas).where(_replicas.c.id == row.id))

    def next_incarnation(self, name: str) -> int:
        """A number above every one this name ever had, durable before it is used."""
        with self._transaction() as db:
            n = (db.scalar(sa.select(_incarnations.c.n).where(_incarnations.c.id == name)) or 0) + 1
            statement = insert(_incarnations).values(id=name, n=n)
            db.execute(statement.on_conflict_do_update(index_elements=["id"], set_={"n": n}))
            return n

    @staticmethod
    def new_nonce() -> str:
        """128 random bits that one incarnation alone knows."""
        return secrets.token_hex(16)

    # ── status, settings ──────────────────────────────────────────────────────────────────────────────────

    def status(self, uid: str) -> dict[str, Any]:
        """What was last reported of an object; empty before the first report."""

        found = self._read(
            "status", uid, lambda db: db.scalar(sa.select(_status.c.json).where(_status.c.uid == uid))
        )
        return dict(found or {})

    def put_status(self, uid: str, status: dict[str, Any]) -> bool:
        """Write a report if it differs from the last; says whether it did."""
        if self.status(uid) == status:
            return False
        with self._transaction(("status", uid)) as db:
            statement = insert(_status).values(uid=uid, json=status)
            db.execute(statement.on_conflict_do_update(index_elements=["uid"], set_={"json": status}))
            return True

    def routing_version(self) -> int:
        with self._transaction() as db:
            return int(self._setting(db, "routingVersion", lambda: "0"))

    def set_routing_version(self, version: int) -> None:
        """Durable before the table is sent: no two tables ever share a version."""
        with self._transaction() as db:
            self._set(db, "routingVersion", str(version))

    def note(self, name: str) -> dict[str, Any]:
        """What a control plane left under this name for itself or the next one; empty if nothing."""
        with self._transaction() as db:
            found = db.scalar(sa.select(_meta.c.value).where(_meta.c.key == f"note:{name}"))
        return dict(json.loads(found)) if found is not None else {}

    def set_note(self, name: str, content: dict[str, Any]) -> None:
        with self._transaction() as db:
            self._set(db, f"note:{name}", json.dumps(content))

    # ── events ────────────────────────────────────────────────────────────────────────────────────────────

    def add_event(self, key: Key, type_: str, reason: str, message: str) -> None:
        """Note an event; one with the same reason and message as an earlier one of the object raises its count."""
        now = self.clock()
        name = str(key)
        with self._transaction() as db:
            uid = self._uid(db, key)
            same = db.scalar(
                sa.select(_events.c.id).where(
                    _events.c.object == name,
                    _events.c.uid == uid,
                    _events.c.reason == reason,
                    _events.c.message == message,
                )
            )
            if same is not None:
                db.execute(
                    sa.update(_events)
                    .where(_events.c.id == same)
                    .values(count=_events.c.count + 1, last_seen=now, type=type_)
                )
                return
            db.execute(
                insert(_events).values(
                    object=name,
                    uid=uid,
                    type=type_,
                    reason=reason,
                    message=message,
                    count=1,
                    first_seen=now,
                    last_seen=now,
                )
            )
            keep = (
                sa.select(_events.c.id)
                .where(_events.c.object == name)
                .order_by(_events.c.last_seen.desc(), _events.c.id.desc())
                .limit(EVENTS_PER_OBJECT)
            )
            db.execute(sa.delete(_events).where(_events.c.object == name, _events.c.id.not_in(keep)))
            db.execute(sa.delete(_events).where(_events.c.last_seen < now - EVENT_SECONDS))

    def events(self, key: Key | None = None, after: int = 0) -> tuple[Event, ...]:
        """Events of one object, or all, with an id above `after`; least recently seen first.

        Of an object that exists they are its own, not those of a deleted one that had its name; of a name that
        nothing has, they are all that are kept.
        """
        query = sa.select(_events).where(_events.c.id > after).order_by(_events.c.last_seen, _events.c.id)
        with self._transaction() as db:
            if key is not None:
                query = query.where(_events.c.object == str(key))
                if uid := self._uid(db, key):
                    query = query.where(_events.c.uid.in_((uid, "")))
            return tuple(Event(**row) for row in db.execute(query).mappings())

    @staticmethod
    def _uid(db: sa.Connection, key: Key) -> str:
        """The uid of the object that has this key now; empty when none has."""
        query = sa.select(_objects.c.uid).where(
            _objects.c.kind == key.kind, _objects.c.namespace == NAMESPACE, _objects.c.name == key.name
        )
        return str(db.scalar(query) or "")


def _set_pragmas(connection: Any, _record: Any) -> None:
    connection.isolation_level = None  # SQLAlchemy begins transactions itself: see _begin_immediate
    cursor = connection.cursor()
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "busy_timeout=5000", "foreign_keys=ON"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _begin_immediate(connection: sa.Connection) -> None:
    connection.exec_driver_sql("BEGIN IMMEDIATE")


def _set_origin(db: sa.Connection, uid: str, traceparent: str | None) -> None:
    statement = insert(_origins).values(uid=uid, traceparent=traceparent)
    db.execute(statement.on_conflict_do_update(index_elements=["uid"], set_={"traceparent": traceparent}))


def _object(row: Any) -> StoredObject:
    values = {name: row[name] for name in row if name not in ("kind", "namespace", "name")}
    return StoredObject(key=Key(row["kind"], row["name"]), **values)


def _row(found: Any) -> Row:
    values = {name: found[name] for name in _ROW_FIELDS}
    ended = values["last_exit"]
    if ended is not None:
        ended = Exit(ended["reason"], ended["message"], Cause(ended["cause"]), tuple(ended["lines"]))
    return Row(**{**values, "goal": Goal(values["goal"]), "last_exit": ended})


def _values(row: Row) -> dict[str, Any]:
    values = {name: getattr(row, name) for name in _ROW_FIELDS}
    return {**values, "last_exit": asdict(row.last_exit) if row.last_exit is not None else None}
