"""Three questions, three answers.

- `/livez`: does the process answer? 200 whenever it does. For whoever would restart it.
- `/readyz`: does it know what to serve? 200 once it acts by a routing table, even by one without models.
- `/health`: can a request be served now? 200 when at least one model has a replica that is connected, neither
  draining nor on standby, making progress, and able to generate; else 503. A replica is stalled after its model's
  stall time without progress (deltas, a step, or an answer to `GetStats` by which there is nothing to do), though
  its socket is open. It is failing when it has shown no token for a while, was asked for one, and gave none in
  time (`quire.router.proof`). The body tells, model by model, how many there are of each. The answer takes as long
  as the slowest of the replicas that have to be asked, and 5 seconds at most; mostly none has to be.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Final, Literal

import msgspec
from litestar import route
from litestar.enums import HttpMethod
from litestar.handlers import HTTPRouteHandler
from litestar.types import ASGIApp

from quire.router.access import ANY, PUBLIC
from quire.router.api.reply import Reply
from quire.router.fleet import Fleet
from quire.router.proof import Prover
from quire_schemas.health import Health, Liveness, ModelHealth, Readiness

_PROBE: Final = (HttpMethod.GET, HttpMethod.HEAD)


def liveness() -> tuple[int, bytes]:
    """Status and body of `/livez`."""
    return 200, msgspec.json.encode(Liveness())


async def health(fleet: Fleet, prover: Prover) -> tuple[int, bytes]:
    """Status and body of `/health`."""
    every = fleet.by_model.values()
    await prover.look([client for served in every for client in served.clients])
    models = {}
    for served in every:
        if served.route.canary_of:
            continue  # nobody depends on it: the model's own replicas have its requests, too
        clients = served.clients
        models[served.route.model] = ModelHealth(
            replicas=len(served.route.replicas),
            ready=sum(client.ready and not prover.failing(client) for client in clients),
            stalled=sum(client.stalled for client in clients),
            failing=sum(client.ready and prover.failing(client) for client in clients),
            draining=sum(client.endpoint.draining for client in clients),
            standby=sum(client.endpoint.standby for client in clients),
        )
    ready = [counts.ready > 0 for counts in models.values()]
    status: Literal["ok", "degraded", "unavailable"]
    status = "ok" if ready and all(ready) else "degraded" if any(ready) else "unavailable"
    return 200 if any(ready) else 503, msgspec.json.encode(Health(status, models))


def readiness(fleet: Fleet) -> tuple[int, bytes]:
    """Status and body of `/readyz`."""
    version = fleet.table.version
    return 200 if version > 0 else 503, msgspec.json.encode(Readiness(version > 0, version))


def routes(fleet: Fleet, look: Callable[[], Awaitable[tuple[int, bytes]]]) -> list[HTTPRouteHandler]:
    """What the three paths answer; `look` gives what `health` does."""

    @route("/health", http_method=_PROBE, operation=ANY)
    async def get_health() -> ASGIApp:
        return Reply(*await look())

    @route("/livez", http_method=_PROBE, operation=PUBLIC)
    async def get_livez() -> ASGIApp:
        return Reply(*liveness())

    @route("/readyz", http_method=_PROBE, operation=PUBLIC)
    async def get_readyz() -> ASGIApp:
        return Reply(*readiness(fleet))

    return [get_health, get_livez, get_readyz]
