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
    meta          installation id, schema version, version of the routing table, base of the clock, and notes that
                  the control plane leaves for the next one

Objects and replicas carry a `resource_version`, and every update is a compare-and-set on it. Status and events
live in tables of their own, so that writing them never changes an object.
"""

from __future__ import annotations

import sqlalchemy as sa

SCHEMA_VERSION = 3

METADATA = sa.MetaData()
META = sa.Table("meta", METADATA, sa.Column("key", sa.Text, primary_key=True), sa.Column("value", sa.Text))
OBJECTS = sa.Table(
    "objects",
    METADATA,
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
REVISIONS = sa.Table(
    "revisions",
    METADATA,
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
REPLICAS = sa.Table(
    "replicas",
    METADATA,
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
INCARNATIONS = sa.Table(
    "incarnations",
    METADATA,
    sa.Column("id", sa.Text, primary_key=True),
    sa.Column("n", sa.Integer, nullable=False),
)
STATUS = sa.Table(
    "status", METADATA, sa.Column("uid", sa.Text, primary_key=True), sa.Column("json", sa.JSON, nullable=False)
)
OVERRIDES = sa.Table(
    "overrides",
    METADATA,
    sa.Column("uid", sa.Text, primary_key=True),
    sa.Column("kind", sa.Text, primary_key=True),
    sa.Column("json", sa.JSON, nullable=False),
)
ORIGINS = sa.Table(
    "origins", METADATA, sa.Column("uid", sa.Text, primary_key=True), sa.Column("traceparent", sa.Text)
)
EVENTS = sa.Table(
    "events",
    METADATA,
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
UPGRADES = {
    1: (
        "ALTER TABLE replicas ADD COLUMN last_exit JSON",
        "ALTER TABLE events ADD COLUMN uid TEXT NOT NULL DEFAULT ''",
    ),
    2: ("ALTER TABLE revisions ADD COLUMN stable_at FLOAT", "ALTER TABLE revisions ADD COLUMN failure TEXT"),
}
"""What turns a store of each older schema into one of the next."""
