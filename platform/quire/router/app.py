"""The router's HTTP application: routes, and the one place where an exception becomes an answer."""

from __future__ import annotations

import logging
from typing import Any

from litestar import Litestar, Request, Response, get, post
from litestar.exceptions import HTTPException, MethodNotAllowedException, NotFoundException
from litestar.types import ASGIApp, Receive, Scope, Send

from quire.errors import InvalidRequest, MethodNotAllowed, NotFound, describe
from quire.router.api import health, models
from quire.router.api.chat import ChatFormat
from quire.router.api.completions import CompletionFormat
from quire.router.api.exchange import Exchange
from quire.router.config import RouterConfig
from quire.router.fleet import Fleet
from quire.router.gateway import Gateway
from quire.router.guard import Guard
from quire.telemetry import CONTENT_TYPE, Tracing

log = logging.getLogger("quire.router")


class Reply:
    """A small answer that is ready to send."""

    def __init__(self, status: int, body: bytes, content_type: str = "application/json") -> None:
        self._start = {
            "type": "http.response.start",
            "status": status,
            "headers": [
                (b"content-type", content_type.encode()),
                (b"content-length", str(len(body)).encode()),
                (b"cache-control", b"no-store"),
            ],
        }
        self._body = body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send(self._start)  # type: ignore[arg-type]
        await send({"type": "http.response.body", "body": self._body, "more_body": False})


def build(fleet: Fleet, config: RouterConfig, tracing: Tracing) -> ASGIApp:
    """The application that serves `fleet`."""
    gateway = Gateway(fleet)
    chat_format = ChatFormat(gateway)
    completion_format = CompletionFormat(gateway)

    @post("/v1/chat/completions")
    async def chat() -> ASGIApp:
        return Exchange(gateway, tracing, chat_format, config.max_body_bytes)

    @post("/v1/completions")
    async def completions() -> ASGIApp:
        return Exchange(gateway, tracing, completion_format, config.max_body_bytes)

    @get("/v1/models")
    async def list_models() -> ASGIApp:
        return Reply(200, models.all_models(fleet))

    @get("/v1/models/{name:path}")
    async def get_model(request: Request[Any, Any, Any]) -> ASGIApp:
        name = str(request.path_params["name"]).removeprefix("/")  # names may have slashes, as hubs' do
        return Reply(200, models.one_model(fleet, name))

    @get("/health")
    async def get_health() -> ASGIApp:
        return Reply(*health.health(fleet))

    @get("/livez")
    async def get_livez() -> ASGIApp:
        return Reply(200, b'{"alive":true}')

    @get("/readyz")
    async def get_readyz() -> ASGIApp:
        return Reply(*health.readiness(fleet))

    @get("/metrics")
    async def get_metrics() -> ASGIApp:
        return Reply(200, fleet.metrics.render(), CONTENT_TYPE)

    routes = [chat, completions, list_models, get_model, get_health, get_livez, get_readyz, get_metrics]
    app = Litestar(
        route_handlers=list(routes),
        exception_handlers={Exception: answer},
        openapi_config=None,
        logging_config=None,
        debug=False,
    )
    return Guard(app, config.allowed_hosts)


def answer(request: Request[Any, Any, Any], error: Exception) -> Response[bytes]:
    """The answer to anything that a route or the framework raised."""
    known = describe(_ours(error))
    if known.status == 500:
        log.error("a request failed", exc_info=error)
    headers = {name.decode(): value.decode() for name, value in known.headers}
    if isinstance(error, MethodNotAllowedException) and error.headers:
        headers.update(error.headers)
    return Response(
        content=known.body,
        status_code=known.status,
        headers={name: value for name, value in headers.items() if name != "content-length"},
        media_type="application/json",
    )


def _ours(error: Exception) -> Exception:
    """The framework's errors as ours: they carry its own words, and sometimes paths."""
    if isinstance(error, NotFoundException):
        return NotFound("There is no such path. The API is below /v1; /v1/models lists what is served.")
    if isinstance(error, MethodNotAllowedException):
        return MethodNotAllowed("This path does not take that method.")
    if isinstance(error, HTTPException) and error.status_code < 500:
        return InvalidRequest("The request is not understood.")
    return error
