"""The admin API: HTTP and JSON on a Unix socket that only its owner can open. Thin: `views`, `intents`, `steering`
and `holdings` have the answers, `plane` the life of the processes.

Errors are `{"error": {"code", "message", "hint", "exitCode"}}`; manifests with problems add `"problems"`. The API
is described in docs/admin-api.md.
"""

from __future__ import annotations

import logging
import math
from typing import Any

from litestar import Litestar, Request, Response, delete, get, post
from litestar.datastructures import State
from litestar.exceptions import HTTPException

from quire.console.listener import AddressTaken, Console, ConsoleError
from quire.console.load import Router
from quire.controlplane.errors import ApiError, address_in_use, answer
from quire.controlplane.following import Following
from quire.controlplane.holdings import Holdings
from quire.controlplane.intents import Intents
from quire.controlplane.plane import ControlPlane
from quire.controlplane.spans import traced
from quire.controlplane.steering import Steering
from quire.controlplane.views import Views, parse_key
from quire_operators.gitops import KIND as SOURCE

log = logging.getLogger(__name__)

MAX_BODY = 16 * 1024 * 1024
DEFAULT_GRACE = 30.0


def _plane(state: State) -> ControlPlane:
    plane: ControlPlane = state.plane
    return plane


def _views(state: State) -> Views:
    views: Views = state.views
    return views


def _intents(state: State) -> Intents:
    intents: Intents = state.intents
    return intents


def _holdings(state: State) -> Holdings:
    holdings: Holdings = state.holdings
    return holdings


async def _body(request: Request[Any, Any, Any]) -> dict[str, Any]:
    """The request's JSON object."""
    try:
        body = await request.json()
    except ValueError as error:
        raise ApiError(400, "bad_request", f"the body is not JSON: {error}") from error
    if body is None:
        return {}
    if not isinstance(body, dict):
        raise ApiError(400, "bad_request", "the body is not a JSON object")
    return body


@get("/v1/ping")
async def ping(state: State) -> dict[str, Any]:
    return _views(state).ping()


@post("/v1/plan", status_code=200)
async def plan(request: Request[Any, Any, Any], state: State) -> dict[str, Any]:
    return await _intents(state).plan(await _body(request))


@post("/v1/apply", status_code=200)
async def apply(request: Request[Any, Any, Any], state: State) -> dict[str, Any]:
    with traced(_plane(state).tracer, request, "/v1/apply") as traceparent:
        return await _intents(state).apply(await _body(request), traceparent)


@post("/v1/up", status_code=200)
async def up(request: Request[Any, Any, Any], state: State) -> dict[str, Any]:
    with traced(_plane(state).tracer, request, "/v1/up"):
        return await _intents(state).up()


@get("/v1/objects")
async def objects(state: State, kind: str | None = None) -> dict[str, Any]:
    return _views(state).objects(kind.lower() if kind else None)


@get("/v1/objects/{kind:str}/{name:str}")
async def read_object(state: State, kind: str, name: str) -> dict[str, Any]:
    return _views(state).object(parse_key(f"{kind}/{name}"))


@delete("/v1/objects/{kind:str}/{name:str}", status_code=202)
async def delete_object(request: Request[Any, Any, Any], state: State, kind: str, name: str) -> dict[str, Any]:
    with traced(_plane(state).tracer, request, "/v1/objects/{kind}/{name}") as traceparent:
        take, prune = (request.query_params.get(name) == "true" for name in ("takeOwnership", "prune"))
        return _intents(state).delete(parse_key(f"{kind}/{name}"), traceparent, take=take, prune=prune)


@post("/v1/objects/{kind:str}/{name:str}/{verb:str}", status_code=200)
async def decide(request: Request[Any, Any, Any], state: State, kind: str, name: str, verb: str) -> dict[str, Any]:
    with traced(_plane(state).tracer, request, "/v1/objects/{kind}/{name}/{verb}"):
        key, body = parse_key(f"{kind}/{name}"), await _body(request)
        if key.kind == SOURCE:
            following: Following = state.following
            return following.decide(key, verb, body)
        steering: Steering = state.steering
        return steering.decide(key, verb, body)


@get("/v1/events")
async def events(request: Request[Any, Any, Any], state: State, after: int = 0) -> dict[str, Any]:
    key = request.query_params.get("for")  # no name that Python could have for an argument
    return _views(state).events(parse_key(key) if key else None, after)


@post("/v1/diff", status_code=200)
async def diff(request: Request[Any, Any, Any], state: State) -> dict[str, Any]:
    return _intents(state).diff(await _body(request))


@get("/v1/logs")
async def logs(
    state: State,
    name: str,
    replica: str | None = None,
    tail: int = 200,
    offset: int | None = None,
    previous: bool = False,
    since: float = 0.0,
) -> dict[str, Any]:
    begin = None if offset is None else max(offset, 0)
    return _views(state).logs(name, replica, tail, begin, previous=previous, since=since)


@get("/v1/cache")
async def cache(state: State) -> dict[str, Any]:
    return await _holdings(state).cache()


@post("/v1/cache/prune", status_code=200)
async def prune(request: Request[Any, Any, Any], state: State) -> dict[str, Any]:
    with traced(_plane(state).tracer, request, "/v1/cache/prune"):
        return await _holdings(state).prune(dry_run=(await _body(request)).get("dryRun") is True)


@get("/v1/secrets")
async def secrets(state: State) -> dict[str, Any]:
    return _holdings(state).list_secrets()


@post("/v1/secrets/{name:str}", status_code=200)
async def set_secret(request: Request[Any, Any, Any], state: State, name: str) -> dict[str, Any]:
    with traced(_plane(state).tracer, request, "/v1/secrets/{name}"):
        return _holdings(state).set_secret(name, (await _body(request)).get("value"))


@delete("/v1/secrets/{name:str}", status_code=200)
async def remove_secret(request: Request[Any, Any, Any], state: State, name: str) -> dict[str, Any]:
    with traced(_plane(state).tracer, request, "/v1/secrets/{name}"):
        return _holdings(state).remove_secret(name)


@get("/v1/usage")
async def usage(state: State, since: str, by: str = "") -> dict[str, Any]:
    return await _views(state).usage(since, by)


@post("/v1/down", status_code=202)
async def down(request: Request[Any, Any, Any], state: State) -> dict[str, Any]:
    with traced(_plane(state).tracer, request, "/v1/down"):
        grace = (await _body(request)).get("grace", DEFAULT_GRACE)
        if not isinstance(grace, int | float) or isinstance(grace, bool) or not 0 <= grace <= 86400:
            raise ApiError(400, "bad_request", f"grace is a number of seconds from 0 to 86400, not {grace!r}")
        _plane(state).begin_down(float(grace))
        return {"stopping": True, "grace": math.ceil(grace)}


def _console(state: State) -> Console:
    console: Console = state.console
    return console


@get("/v1/console")
async def read_console(state: State) -> dict[str, Any]:
    return _console(state).told()


@post("/v1/console", status_code=200)
async def open_console(request: Request[Any, Any, Any], state: State) -> dict[str, Any]:
    with traced(_plane(state).tracer, request, "/v1/console"):
        port = (await _body(request)).get("port")
        if port is not None and not (type(port) is int and 0 <= port <= 65535):
            raise ApiError(400, "bad_request", f"port is a whole number from 0 to 65535, not {port!r}")
        _plane(state).refuse_while_going_down()
        try:
            return {"url": await _console(state).open(port)}
        except AddressTaken as error:
            raise address_in_use(error.message, error.hint) from error
        except ConsoleError as error:
            raise ApiError(409, "conflict", error.message, error.hint, exit_code=5) from error


@delete("/v1/console", status_code=200)
async def close_console(request: Request[Any, Any, Any], state: State) -> dict[str, Any]:
    with traced(_plane(state).tracer, request, "/v1/console"):
        return {"closed": await _console(state).close()}


def _refused(request: Request[Any, Any, Any], error: Exception) -> Response[dict[str, Any]]:
    answered = answer(error)
    if answered.status == 500:
        log.error("%s %s failed", request.method, request.url.path, exc_info=error)
    return Response(answered.body, status_code=answered.status)


def create_app(plane: ControlPlane) -> Litestar:
    """The API over `plane`. In its state is the `console`, which is to be closed before the process ends."""
    views = Views(plane)
    intents = Intents(plane, views)
    plane.sources.hands = intents
    rooms = {
        "plane": plane,
        "views": views,
        "intents": intents,
        "steering": Steering(plane, views),
        "following": Following(plane, views),
        "holdings": Holdings(plane),
    }
    gateway = plane.gateway
    console = Console(
        (ping, objects, read_object, events),
        dict(rooms),
        _refused,
        lambda: Router(gateway.base_url(), gateway.certificate(), gateway.unavailable()),
    )
    return Litestar(
        [
            *(ping, plan, diff, apply, up, objects, read_object, delete_object, decide, events, logs, down),
            *(cache, prune, secrets, set_secret, remove_secret, usage),
            *(read_console, open_console, close_console),
        ],
        state=State({**rooms, "console": console}),
        exception_handlers=dict.fromkeys((HTTPException, Exception), _refused),
        request_max_body_size=MAX_BODY,
        openapi_config=None,
        logging_config=None,
    )
