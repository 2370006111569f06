"""What the store keeps, as those who read it see it: objects, revisions, events, and what an apply writes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from quire_schemas.resource import Key


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
