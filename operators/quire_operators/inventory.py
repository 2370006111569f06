"""What git sources keep in the store: whose each object is, and how far each source is.

    managed   an object's kind and name -> the source that applied it, from which commit and file, and the hash of
              what it applied. One row an object, so two sources never share one. It outlives the object: one that
              was deleted by hand is missed.
    syncs     a source's uid -> what it remembers from pass to pass, one JSON document

A row of `managed` is written in the transaction that writes the object. It goes when the object is no longer
declared and is being deleted, so that a crash between the two leaves nothing that nobody deletes. All rows of a
source go with it, in the transaction that removes it (`Store.remove`).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from quire_operators.database import Database
from quire_operators.tables import MANAGED, SYNCS
from quire_schemas.resource import Key

ALL = "all"


@dataclass(frozen=True, slots=True)
class Managed:
    """One object of a source. `source` is the source's uid, `intent_hash` that of what it applied last."""

    key: Key
    source: str
    source_name: str
    commit: str
    file: str
    intent_hash: str

    @property
    def owner(self) -> Key:
        return Key("gitsource", self.source_name)


class Inventory:
    """These two tables of an open store."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def all(self) -> dict[Key, Managed]:
        """Every object that a source manages."""

        def load(db: sa.Connection) -> dict[Key, Managed]:
            rows = db.execute(sa.select(MANAGED).order_by(MANAGED.c.kind, MANAGED.c.name))
            return {
                Key(row.kind, row.name): Managed(
                    Key(row.kind, row.name), row.source, row.source_name, row.commit_id, row.file, row.intent_hash
                )
                for row in rows
            }

        return self._database.read("managed", ALL, load)

    def manager(self, key: Key) -> Managed | None:
        """Whose the object is; None where it is nobody's but of who applied it."""
        return self.all().get(key)

    @staticmethod
    def write(db: sa.Connection, rows: Sequence[Managed]) -> None:
        """Keep these, within a transaction that has `managed` among what it touches."""
        for row in rows:
            db.execute(_of(row.key))
            db.execute(
                sa.insert(MANAGED).values(
                    kind=row.key.kind,
                    name=row.key.name,
                    source=row.source,
                    source_name=row.source_name,
                    commit_id=row.commit,
                    file=row.file,
                    intent_hash=row.intent_hash,
                )
            )

    def keep(self, rows: Sequence[Managed]) -> None:
        with self._database.transaction(("managed", None)) as db:
            self.write(db, rows)

    def drop(self, keys: Collection[Key]) -> None:
        """These objects are nobody's any more."""
        with self._database.transaction(("managed", None)) as db:
            for key in keys:
                db.execute(_of(key))

    def memory(self, uid: str) -> dict[str, Any]:
        """What the source remembers; empty at first."""
        found = self._database.read(
            "syncs", uid, lambda db: db.scalar(sa.select(SYNCS.c.json).where(SYNCS.c.uid == uid))
        )
        return dict(found or {})

    def remember(self, uid: str, memory: dict[str, Any]) -> None:
        if self.memory(uid) == memory:
            return
        with self._database.transaction(("syncs", uid)) as db:
            db.execute(sa.delete(SYNCS).where(SYNCS.c.uid == uid))
            db.execute(sa.insert(SYNCS).values(uid=uid, json=memory))


def _of(key: Key) -> sa.Delete:
    return sa.delete(MANAGED).where(MANAGED.c.kind == key.kind, MANAGED.c.name == key.name)
