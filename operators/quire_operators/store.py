"""The durable memory of the control plane: what was asked for, what was decided, what was told.

Who writes says what was there before: objects and replicas are compared and set. The database is that of
`database`, its shape that of `tables`; what is read and written is in `records`.

Times are those of the store's clock, which no change of the wall clock moves (see `clock`).

Calls are short and synchronous; the control plane makes them from its event loop. Their exceptions are those of
`database`.
"""

from __future__ import annotations

import itertools
import json
import secrets
import uuid
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from quire_operators.database import Conflict, Database, Leading, NotFound, upsert
from quire_operators.inventory import Inventory, Managed
from quire_operators.overrides import Kind, Override, ended_by_intent
from quire_operators.records import Applied, Change, Event, Origin, Revision, StoredObject
from quire_operators.rollout import Cause, Exit, Goal, Row
from quire_operators.tables import (
    EVENTS,
    INCARNATIONS,
    MANAGED,
    META,
    OBJECTS,
    ORIGINS,
    OVERRIDES,
    REPLICAS,
    REVISIONS,
    STATUS,
    SYNCS,
)
from quire_schemas.resource import Key

NAMESPACE = "default"
ALL = "all"
MANY = 8
"""Rows of more models than this are read at once."""
EVENTS_PER_OBJECT = 200
EVENT_SECONDS = 7 * 86400.0
ROW_FIELDS = tuple(field.name for field in fields(Row))


class Store:
    """One open store. `clock` gives unix seconds; without one it is the steady clock that the store keeps. Where
    `lease` is given, nothing is written without it."""

    def __init__(
        self, place: Path | sa.URL, clock: Callable[[], float] | None = None, lease: Leading | None = None
    ) -> None:
        self._database = Database(place, clock, lease)
        self.install_id = self._database.install_id
        self.clock = self._database.clock
        self.inventory = Inventory(self._database)

    @property
    def rows_version(self) -> int:
        """Changes whenever a replica's row may have."""
        return self._database.rows_version

    @property
    def place(self) -> str:
        """Where everything is kept, for people; no secret is in it."""
        return str(self._database)

    def check_lease(self) -> None:
        """Raise `Deposed` unless this control plane leads: before a side effect."""
        if self._database.lease is not None:
            self._database.lease.check()

    @property
    def others_version(self) -> int:
        """Changes whenever somebody else may have written: then all is read anew."""
        self._database.look()
        return self._database.others_version

    def close(self) -> None:
        self._database.close()

    # ── objects ───────────────────────────────────────────────────────────────────────────────────────────

    def get(self, key: Key) -> StoredObject | None:
        return self._database.read("objects", str(key), lambda db: self._get(db, key))

    def objects(self, kind: str | None = None) -> Sequence[StoredObject]:
        """All objects, or those of one kind, by kind and name."""

        def load(db: sa.Connection) -> tuple[StoredObject, ...]:
            query = sa.select(OBJECTS).order_by(OBJECTS.c.kind, OBJECTS.c.name)
            if kind is not None:
                query = query.where(OBJECTS.c.kind == kind)
            return tuple(_object(row) for row in db.execute(query).mappings())

        return self._database.read("objects", f"kind {kind}", load)

    @staticmethod
    def _get(db: sa.Connection, key: Key) -> StoredObject | None:
        query = sa.select(OBJECTS).where(
            OBJECTS.c.kind == key.kind,
            OBJECTS.c.namespace == NAMESPACE,
            OBJECTS.c.name == key.name,
        )
        row = db.execute(query).mappings().first()
        return _object(row) if row is not None else None

    def apply(
        self, changes: Sequence[Change], traceparent: str | None = None, managed: Sequence[Managed] = ()
    ) -> tuple[Applied, ...]:
        """Write all of them or none. An object whose intent hash is the stored one is not written at all, unless
        its revision is another one: what it refers to may have changed.

        `traceparent` is remembered as the origin of what is written, `managed` with it as whose it is.

        Raises `Conflict` when an object is not what the decision was made on.
        """
        now = self.clock()
        touched: list[tuple[str, str | None]] = [("objects", None)]
        for change in changes:
            old = self.get(change.key)
            touched.append(("replicas", change.key.name))
            touched += [(table, old.uid) for table in ("revisions", "overrides") if old is not None]
        if managed:
            touched.append(("managed", None))
        with self._database.transaction(*touched) as db:
            self.inventory.write(db, managed)
            return tuple(self._apply(db, change, now, traceparent) for change in changes)

    @staticmethod
    def _is_same(db: sa.Connection, old: StoredObject, change: Change) -> bool:
        if old.intent_hash != change.intent_hash or change.revision is None:
            return old.intent_hash == change.intent_hash
        asked = sa.select(REVISIONS.c.template_hash).where(
            REVISIONS.c.uid == old.uid, REVISIONS.c.n == old.revision
        )
        return db.execute(asked).scalar() == change.revision.template_hash

    def _apply(self, db: sa.Connection, change: Change, now: float, traceparent: str | None) -> Applied:
        old = self._get(db, change.key)
        if (old.resource_version if old else None) != change.expected:
            raise Conflict(f"{change.key} was changed by somebody else meanwhile", "apply again")
        if old is not None and old.deletion_time is None and self._is_same(db, old, change):
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
                sa.update(REVISIONS)
                .where(REVISIONS.c.uid == uid, REVISIONS.c.n == revision)
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
                sa.insert(OBJECTS).values(
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
            sa.update(OBJECTS)
            .where(OBJECTS.c.uid == uid, OBJECTS.c.resource_version == old.resource_version)
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
        n = (db.scalar(sa.select(sa.func.max(REVISIONS.c.n)).where(REVISIONS.c.uid == uid)) or 0) + 1
        same = sa.select(REVISIONS.c.load_seconds).where(
            REVISIONS.c.uid == uid, REVISIONS.c.template_hash == new.template_hash
        )
        db.execute(
            sa.insert(REVISIONS).values(
                uid=uid,
                n=n,
                template_hash=new.template_hash,
                resolved=change.resolved,
                defaults_version=new.defaults_version,
                placement=new.placement,
                cause=new.cause,
                created_at=now,
                load_seconds=db.scalar(same.order_by(REVISIONS.c.n.desc())),
            )
        )
        db.execute(
            sa.update(REPLICAS)
            .where(REPLICAS.c.model == change.key.name, REPLICAS.c.template_hash == new.template_hash)
            .values(revision=n, resource_version=REPLICAS.c.resource_version + 1)
        )
        running = sa.select(REPLICAS.c.revision).where(REPLICAS.c.model == change.key.name)
        stable = (
            sa.select(REVISIONS.c.n)
            .where(REVISIONS.c.uid == uid, REVISIONS.c.stable_at.is_not(None))
            .order_by(REVISIONS.c.stable_at.desc())
            .limit(1)
        )
        db.execute(
            sa.delete(REVISIONS).where(
                REVISIONS.c.uid == uid,
                REVISIONS.c.n < n - change.keep_revisions,
                REVISIONS.c.n.not_in(running),
                REVISIONS.c.n.not_in(stable),
            )
        )
        return n

    def mark_deleting(self, key: Key, traceparent: str | None = None) -> StoredObject:
        """Begin a deletion: the object stays until what runs of it is gone. Raises `NotFound`."""
        with self._database.transaction(("objects", None)) as db:
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
                sa.update(OBJECTS)
                .where(OBJECTS.c.uid == old.uid)
                .values(
                    deletion_time=new.deletion_time,
                    generation=new.generation,
                    resource_version=new.resource_version,
                )
            )
            _set_origin(db, old.uid, traceparent)
            return new

    def remove(self, key: Key) -> None:
        """Forget a deleted object with its revisions and status; its events stay. What a git source managed stays,
        and is nobody's."""
        kept = ("objects", "revisions", "status", "overrides", "managed", "syncs")
        with self._database.transaction(*((table, None) for table in kept)) as db:
            old = self._get(db, key)
            if old is None:
                return
            for table in (OBJECTS, REVISIONS, STATUS, ORIGINS, OVERRIDES, SYNCS):
                db.execute(sa.delete(table).where(table.c.uid == old.uid))
            db.execute(sa.delete(MANAGED).where(MANAGED.c.source == old.uid))

    def origin(self, key: Key) -> Origin | None:
        """What made the object's generation; None when there is no such object."""
        query = (
            sa.select(OBJECTS.c.generation, ORIGINS.c.traceparent)
            .select_from(OBJECTS.outerjoin(ORIGINS, ORIGINS.c.uid == OBJECTS.c.uid))
            .where(
                OBJECTS.c.kind == key.kind,
                OBJECTS.c.namespace == NAMESPACE,
                OBJECTS.c.name == key.name,
            )
        )
        with self._database.transaction() as db:
            found = db.execute(query).first()
        return Origin(*found) if found is not None else None

    # ── revisions ─────────────────────────────────────────────────────────────────────────────────────────

    def revisions(self, uid: str) -> Sequence[Revision]:
        """All kept revisions of an object, newest first."""

        def load(db: sa.Connection) -> tuple[Revision, ...]:
            query = sa.select(REVISIONS).where(REVISIONS.c.uid == uid).order_by(REVISIONS.c.n.desc())
            return tuple(Revision(**row) for row in db.execute(query).mappings())

        return self._database.read("revisions", uid, load)

    def set_load_seconds(self, uid: str, n: int, seconds: float) -> None:
        """Remember how long a replica of this revision took to load, for the next estimate."""
        with self._database.transaction(("revisions", uid)) as db:
            db.execute(
                sa.update(REVISIONS).where(REVISIONS.c.uid == uid, REVISIONS.c.n == n).values(load_seconds=seconds)
            )

    def mark_stable(self, uid: str, n: int) -> None:
        """Remember that this revision is all that serves, in full number."""
        with self._database.transaction(("revisions", uid)) as db:
            db.execute(
                sa.update(REVISIONS)
                .where(REVISIONS.c.uid == uid, REVISIONS.c.n == n)
                .values(stable_at=self.clock(), failure=None)
            )

    # ── overrides ─────────────────────────────────────────────────────────────────────────────────────────

    def overrides(self, uid: str) -> tuple[Override, ...]:
        """What was decided about an object beside its intent; those whose time is over, too."""

        def load(db: sa.Connection) -> tuple[Override, ...]:
            query = sa.select(OVERRIDES.c.json).where(OVERRIDES.c.uid == uid).order_by(OVERRIDES.c.kind)
            return tuple(map(Override.from_dict, db.scalars(query)))

        return self._database.read("overrides", uid, load)

    def set_override(self, uid: str, override: Override, *, failed: tuple[int, str] | None = None) -> None:
        """Keep a decision, in place of one of its kind; with it that a revision failed, and why."""
        with self._database.transaction(("overrides", uid), ("revisions", uid)) as db:
            upsert(db, OVERRIDES, {"uid": uid, "kind": override.kind.value}, {"json": override.as_dict()})
            if failed is not None:
                n, why = failed
                db.execute(
                    sa.update(REVISIONS).where(REVISIONS.c.uid == uid, REVISIONS.c.n == n).values(failure=why)
                )

    def end_overrides(self, uid: str, kinds: Sequence[Kind]) -> None:
        """Take decisions back."""
        with self._database.transaction(("overrides", uid)) as db:
            self._end_overrides(db, uid, kinds)

    @staticmethod
    def _end_overrides(db: sa.Connection, uid: str, kinds: Sequence[Kind]) -> None:
        named = [kind.value for kind in kinds]
        db.execute(sa.delete(OVERRIDES).where(OVERRIDES.c.uid == uid, OVERRIDES.c.kind.in_(named)))

    # ── replicas ──────────────────────────────────────────────────────────────────────────────────────────

    def replicas(self, model: str | None = None) -> tuple[Row, ...]:
        """Rows of one model, or all, by model and index."""
        if model is not None:
            return self._database.read("replicas", model, lambda db: self._rows(db, model))
        models = self._database.read("models of replicas", ALL, self._models_of_rows)
        kept = self._database.kept_of("replicas")
        if sum(name not in kept for name in models) > MANY:
            kept.update(self._all_rows())
        return tuple(itertools.chain.from_iterable(map(self.replicas, models)))

    def _all_rows(self) -> dict[str, tuple[Row, ...]]:
        query = sa.select(REPLICAS).order_by(REPLICAS.c.model, REPLICAS.c.revision, REPLICAS.c.index)
        with self._database.transaction() as db:
            rows = list(map(_row, db.execute(query).mappings()))
        return {model: tuple(of) for model, of in itertools.groupby(rows, key=lambda row: row.model)}

    @staticmethod
    def _rows(db: sa.Connection, model: str) -> tuple[Row, ...]:
        query = sa.select(REPLICAS).where(REPLICAS.c.model == model)
        query = query.order_by(REPLICAS.c.revision, REPLICAS.c.index)
        return tuple(map(_row, db.execute(query).mappings()))

    @staticmethod
    def _models_of_rows(db: sa.Connection) -> tuple[str, ...]:
        return tuple(db.scalars(sa.select(REPLICAS.c.model).distinct().order_by(REPLICAS.c.model)))

    def create_replica(self, row: Row) -> Row:
        """Write a new row. It takes up counting incarnations where its id last stopped."""
        with self._database.transaction(("replicas", row.model), ("models of replicas", None)) as db:
            last = db.scalar(sa.select(INCARNATIONS.c.n).where(INCARNATIONS.c.id == row.id)) or 0
            row = replace(row, incarnation=last, exited=last)
            db.execute(sa.insert(REPLICAS).values(resource_version=1, **_values(row)))
            return row

    def update_replica(self, old: Row, new: Row) -> Row:
        """Compare-and-set: `old` must be what is stored, apart from its revision number. Raises `Conflict`."""
        with self._database.transaction(("replicas", old.model)) as db:
            found = db.execute(sa.select(REPLICAS).where(REPLICAS.c.id == old.id)).mappings().first()
            if found is None or replace(_row(found), revision=old.revision) != old:
                raise Conflict(f"replica {old.id} was changed meanwhile", "it is looked at again")
            version = found["resource_version"]
            new = replace(new, revision=found["revision"])
            done = db.execute(
                sa.update(REPLICAS)
                .where(REPLICAS.c.id == old.id, REPLICAS.c.resource_version == version)
                .values(resource_version=version + 1, **_values(new))
            )
            if done.rowcount != 1:
                raise Conflict(f"replica {old.id} was changed meanwhile", "it is looked at again")
            if new.incarnation != old.incarnation:
                upsert(db, INCARNATIONS, {"id": new.id}, {"n": new.incarnation})
            return new

    def delete_replica(self, row: Row) -> None:
        with self._database.transaction(("replicas", row.model), ("models of replicas", None)) as db:
            db.execute(sa.delete(REPLICAS).where(REPLICAS.c.id == row.id))

    def next_incarnation(self, name: str) -> int:
        """A number above every one this name ever had, durable before it is used."""
        with self._database.transaction() as db:
            n = (db.scalar(sa.select(INCARNATIONS.c.n).where(INCARNATIONS.c.id == name)) or 0) + 1
            upsert(db, INCARNATIONS, {"id": name}, {"n": n})
            return n

    @staticmethod
    def new_nonce() -> str:
        """128 random bits that one incarnation alone knows."""
        return secrets.token_hex(16)

    # ── status, settings ──────────────────────────────────────────────────────────────────────────────────

    def status(self, uid: str) -> dict[str, Any]:
        """What was last reported of an object; empty before the first report."""

        found = self._database.read(
            "status", uid, lambda db: db.scalar(sa.select(STATUS.c.json).where(STATUS.c.uid == uid))
        )
        return dict(found or {})

    def put_status(self, uid: str, status: dict[str, Any]) -> bool:
        """Write a report if it differs from the last; says whether it did."""
        if self.status(uid) == status:
            return False
        with self._database.transaction(("status", uid)) as db:
            upsert(db, STATUS, {"uid": uid}, {"json": status})
            return True

    def routing_version(self) -> int:
        with self._database.transaction() as db:
            return int(self._database.setting(db, "routingVersion", lambda: "0"))

    def set_routing_version(self, version: int) -> None:
        """Durable before the table is sent: no two tables ever share a version."""
        with self._database.transaction() as db:
            self._database.keep_setting(db, "routingVersion", str(version))

    def note(self, name: str) -> dict[str, Any]:
        """What a control plane left under this name for itself or the next one; empty if nothing."""
        with self._database.transaction() as db:
            found = db.scalar(sa.select(META.c.value).where(META.c.key == f"note:{name}"))
        return dict(json.loads(found)) if found is not None else {}

    def set_note(self, name: str, content: dict[str, Any]) -> None:
        with self._database.transaction() as db:
            self._database.keep_setting(db, f"note:{name}", json.dumps(content))

    # ── events ────────────────────────────────────────────────────────────────────────────────────────────

    def add_event(self, key: Key, type_: str, reason: str, message: str) -> None:
        """Note an event; one with the same reason and message as an earlier one of the object raises its count."""
        now = self.clock()
        name = str(key)
        with self._database.transaction() as db:
            uid = self._uid(db, key)
            same = db.scalar(
                sa.select(EVENTS.c.id).where(
                    EVENTS.c.object == name,
                    EVENTS.c.uid == uid,
                    EVENTS.c.reason == reason,
                    EVENTS.c.message == message,
                )
            )
            if same is not None:
                db.execute(
                    sa.update(EVENTS)
                    .where(EVENTS.c.id == same)
                    .values(count=EVENTS.c.count + 1, last_seen=now, type=type_)
                )
                return
            db.execute(
                sa.insert(EVENTS).values(
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
                sa.select(EVENTS.c.id)
                .where(EVENTS.c.object == name)
                .order_by(EVENTS.c.last_seen.desc(), EVENTS.c.id.desc())
                .limit(EVENTS_PER_OBJECT)
            )
            db.execute(sa.delete(EVENTS).where(EVENTS.c.object == name, EVENTS.c.id.not_in(keep)))
            db.execute(sa.delete(EVENTS).where(EVENTS.c.last_seen < now - EVENT_SECONDS))

    def events(self, key: Key | None = None, after: int = 0) -> tuple[Event, ...]:
        """Events of one object, or all, with an id above `after`; least recently seen first.

        Of an object that exists they are its own, not those of a deleted one that had its name; of a name that
        nothing has, they are all that are kept.
        """
        query = sa.select(EVENTS).where(EVENTS.c.id > after).order_by(EVENTS.c.last_seen, EVENTS.c.id)
        with self._database.transaction() as db:
            if key is not None:
                query = query.where(EVENTS.c.object == str(key))
                if uid := self._uid(db, key):
                    query = query.where(EVENTS.c.uid.in_((uid, "")))
            return tuple(Event(**row) for row in db.execute(query).mappings())

    @staticmethod
    def _uid(db: sa.Connection, key: Key) -> str:
        """The uid of the object that has this key now; empty when none has."""
        query = sa.select(OBJECTS.c.uid).where(
            OBJECTS.c.kind == key.kind,
            OBJECTS.c.namespace == NAMESPACE,
            OBJECTS.c.name == key.name,
        )
        return str(db.scalar(query) or "")


def _set_origin(db: sa.Connection, uid: str, traceparent: str | None) -> None:
    upsert(db, ORIGINS, {"uid": uid}, {"traceparent": traceparent})


def _object(row: Any) -> StoredObject:
    values = {name: row[name] for name in row if name not in ("kind", "namespace", "name")}
    return StoredObject(key=Key(row["kind"], row["name"]), **values)


def _row(found: Any) -> Row:
    values = {name: found[name] for name in ROW_FIELDS}
    ended = values["last_exit"]
    if ended is not None:
        cause, lines = Cause(ended["cause"]), tuple(ended["lines"])
        ended = Exit(ended["reason"], ended["message"], cause, lines, ended.get("at"))
    return Row(**{**values, "goal": Goal(values["goal"]), "last_exit": ended})


def _values(row: Row) -> dict[str, Any]:
    values = {name: getattr(row, name) for name in ROW_FIELDS}
    return {**values, "last_exit": asdict(row.last_exit) if row.last_exit is not None else None}
