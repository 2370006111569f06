"""The tables of the control plane's database, and how one of an earlier version becomes one of this.

    objects       kind, namespace, name -> intent as submitted, its hash, generation, current revision
    revisions     what one rollout template was resolved to; what needs no new template follows later intents
    replicas      one row each: see `rollout.Row`
    incarnations  the highest incarnation a replica id ever had, so that no two processes ever share one
    overrides     what was decided about an object beside its intent: see `overrides`
    origins       the trace context of the request that made an object's generation
    status        what the reconciler last reported, one JSON document an object
    events        decisions and observations, equal ones counted, capped per object and by age. An object's uid
                  keeps those of a deleted one apart from those of a new one of its name
    managed       whose each object is that a git source applied, and what it applied: see `inventory`
    syncs         what a git source remembers from pass to pass
    meta          installation id, schema version, version of the routing table, base of the clock, and notes that
                  the control plane leaves for the next one
    leases        which control plane leads, by the database's clock, and how many did before it: see `lease`

Objects and replicas carry a `resource_version`, and every update is a compare-and-set on it. Status and events
live in tables of their own, so that writing them never changes an object.

The tables are the same on SQLite and on PostgreSQL. Texts are compared by their bytes on both. PostgreSQL takes no
NUL in a text, so that words that come from processes (`WORDS`) have another sign in its place on both.
"""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa

SCHEMA_VERSION = 3
WRITER_VERSION = 1
"""Grows when what is written comes to mean something else to those who read it, whether or not a table changes.
One that leads has the database refuse every older one from then on (`minWriterVersion`)."""


class _Words(sa.types.TypeDecorator[str]):
    impl = sa.Text
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: Any) -> str | None:
        return value if value is None else value.replace("\0", "\N{SYMBOL FOR NULL}")


TEXT = sa.Text().with_variant(sa.Text(collation="C"), "postgresql")
WORDS = _Words()
NUMBER = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
"""Bytes do not fit into 32 bits."""

METADATA = sa.MetaData()
META = sa.Table("meta", METADATA, sa.Column("key", TEXT, primary_key=True), sa.Column("value", TEXT))
OBJECTS = sa.Table(
    "objects",
    METADATA,
    sa.Column("uid", TEXT, primary_key=True),
    sa.Column("kind", TEXT, nullable=False),
    sa.Column("namespace", TEXT, nullable=False),
    sa.Column("name", TEXT, nullable=False),
    sa.Column("generation", NUMBER, nullable=False),
    sa.Column("resource_version", NUMBER, nullable=False),
    sa.Column("intent", sa.JSON, nullable=False),
    sa.Column("intent_hash", TEXT, nullable=False),
    sa.Column("resolved", sa.JSON, nullable=False),
    sa.Column("revision", NUMBER),
    sa.Column("created_at", sa.Float, nullable=False),
    sa.Column("applied_at", sa.Float, nullable=False),
    sa.Column("deletion_time", sa.Float),
    sa.UniqueConstraint("kind", "namespace", "name"),
)
REVISIONS = sa.Table(
    "revisions",
    METADATA,
    sa.Column("uid", TEXT, primary_key=True),
    sa.Column("n", NUMBER, primary_key=True),
    sa.Column("template_hash", TEXT, nullable=False),
    sa.Column("resolved", sa.JSON, nullable=False),
    sa.Column("defaults_version", NUMBER, nullable=False),
    sa.Column("placement", sa.JSON, nullable=False),
    sa.Column("cause", WORDS, nullable=False),
    sa.Column("created_at", sa.Float, nullable=False),
    sa.Column("load_seconds", sa.Float),
    sa.Column("stable_at", sa.Float),
    sa.Column("failure", WORDS),
)
REPLICAS = sa.Table(
    "replicas",
    METADATA,
    sa.Column("id", TEXT, primary_key=True),
    sa.Column("resource_version", NUMBER, nullable=False),
    sa.Column("model", TEXT, nullable=False),
    sa.Column("index", NUMBER, nullable=False),
    sa.Column("revision", NUMBER, nullable=False),
    sa.Column("template_hash", TEXT, nullable=False),
    sa.Column("goal", TEXT, nullable=False),
    sa.Column("created_at", sa.Float, nullable=False),
    sa.Column("memory", NUMBER, nullable=False),
    sa.Column("device", TEXT, nullable=False),
    sa.Column("incarnation", NUMBER, nullable=False),
    sa.Column("exited", NUMBER, nullable=False),
    sa.Column("nonce", TEXT, nullable=False),
    sa.Column("restarts", NUMBER, nullable=False),
    sa.Column("not_before", sa.Float, nullable=False),
    sa.Column("launched_at", sa.Float, nullable=False),
    sa.Column("ready_since", sa.Float),
    sa.Column("drain_since", sa.Float),
    sa.Column("stop_sent", sa.Float),
    sa.Column("failed_generation", NUMBER),
    sa.Column("reason", TEXT, nullable=False),
    sa.Column("message", WORDS, nullable=False),
    sa.Column("last_exit", sa.JSON),
)
INCARNATIONS = sa.Table(
    "incarnations",
    METADATA,
    sa.Column("id", TEXT, primary_key=True),
    sa.Column("n", NUMBER, nullable=False),
)
STATUS = sa.Table(
    "status", METADATA, sa.Column("uid", TEXT, primary_key=True), sa.Column("json", sa.JSON, nullable=False)
)
OVERRIDES = sa.Table(
    "overrides",
    METADATA,
    sa.Column("uid", TEXT, primary_key=True),
    sa.Column("kind", TEXT, primary_key=True),
    sa.Column("json", sa.JSON, nullable=False),
)
ORIGINS = sa.Table("origins", METADATA, sa.Column("uid", TEXT, primary_key=True), sa.Column("traceparent", TEXT))
EVENTS = sa.Table(
    "events",
    METADATA,
    sa.Column("id", NUMBER, primary_key=True, autoincrement=True),
    sa.Column("object", TEXT, nullable=False, index=True),
    sa.Column("uid", TEXT, nullable=False, server_default=""),
    sa.Column("type", TEXT, nullable=False),
    sa.Column("reason", TEXT, nullable=False),
    sa.Column("message", WORDS, nullable=False),
    sa.Column("count", NUMBER, nullable=False),
    sa.Column("first_seen", sa.Float, nullable=False),
    sa.Column("last_seen", sa.Float, nullable=False),
)
LEASES = sa.Table(
    "leases",
    METADATA,
    sa.Column("name", TEXT, primary_key=True),
    sa.Column("holder", TEXT, nullable=False),
    sa.Column("boot", TEXT, nullable=False),
    sa.Column("epoch", NUMBER, nullable=False),
    sa.Column("locked", sa.Boolean, nullable=False),
    sa.Column("expires", sa.Float),
)
MANAGED = sa.Table(
    "managed",
    METADATA,
    sa.Column("kind", TEXT, primary_key=True),
    sa.Column("name", TEXT, primary_key=True),
    sa.Column("source", TEXT, nullable=False),
    sa.Column("source_name", TEXT, nullable=False),
    sa.Column("commit_id", TEXT, nullable=False),
    sa.Column("file", TEXT, nullable=False),
    sa.Column("intent_hash", TEXT, nullable=False),
)
SYNCS = sa.Table(
    "syncs", METADATA, sa.Column("uid", TEXT, primary_key=True), sa.Column("json", sa.JSON, nullable=False)
)
CACHED = (OBJECTS, REVISIONS, OVERRIDES, REPLICAS, STATUS, MANAGED, SYNCS)
"""What `database` keeps of what it read: it has to hear when somebody else writes there."""
UPGRADES = {
    1: (
        "ALTER TABLE replicas ADD COLUMN last_exit JSON",
        "ALTER TABLE events ADD COLUMN uid TEXT NOT NULL DEFAULT ''",
    ),
    2: ("ALTER TABLE revisions ADD COLUMN stable_at FLOAT", "ALTER TABLE revisions ADD COLUMN failure TEXT"),
}
"""What turns a store of each older schema into one of the next."""
