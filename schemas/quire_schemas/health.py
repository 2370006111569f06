"""What `/livez`, `/readyz` and `/health` say."""

from __future__ import annotations

from typing import Literal

import msgspec


class Liveness(msgspec.Struct):
    """The process answers."""

    alive: Literal[True] = True


class Readiness(msgspec.Struct, rename="camel"):
    """Whether it acts by a routing table, and by which."""

    ready: bool
    table_version: int


class ModelHealth(msgspec.Struct):
    """Replicas of one model, by what can be said of them."""

    replicas: int
    ready: int
    stalled: int
    failing: int
    """They are there and make no progress, but no token when one is asked for."""
    draining: int
    standby: int


class Health(msgspec.Struct):
    """Whether a request can be served now: of every model, of some, of none."""

    status: Literal["ok", "degraded", "unavailable"]
    models: dict[str, ModelHealth]
