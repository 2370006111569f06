"""The router's HTTP application: routes, and the one place where an exception becomes an answer."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from litestar import Litestar, Request, Response, get, post, route
from litestar.enums import HttpMethod
from litestar.exceptions import HTTPException, MethodNotAllowedException, NotFoundException
from litestar.handlers import HTTPRouteHandler
from litestar.types import ASGIApp, Receive, Scope, Send

from quire.errors import Api, InvalidRequest, MethodNotAllowed, NotFound, Unauthenticated, describe
from quire.router import openapi
from quire.router.access import ANY, NO_KEY, authorize, may_have, visit_of
from quire.router.account import AccessLog, Account
from quire.router.api import absent, batches, files, health, models, responses
from quire.router.api.chat import ChatFormat
from quire.router.api.completions import CompletionFormat
from quire.router.api.embeddings import EmbeddingFormat
from quire.router.api.messages import MessagesFormat, TokenCounting
from quire.router.api.query import checked
from quire.router.api.reply import Reply
from quire.router.api.score import ScoreFormat
from quire.router.api.tokens import Tokens
from quire.router.background import Background
from quire.router.batches import Batches
from quire.router.config import RouterConfig
from quire.router.desk import Desk, OwnDesk
from quire.router.exams import Examiner
from quire.router.exchange import Exchange
from quire.router.executor import Executor
from quire.router.far import FarHead
from quire.router.files import Files
from quire.router.fleet import Fleet
from quire.router.formats import Format
from quire.router.gateway import Gateway
from quire.router.guard import Guard
from quire.router.metrics import CONTENT_TYPE
from quire.router.model_metrics import REFUSED
from quire.router.proof import Prover
from quire.router.responses import Responses
from quire.router.spans import RequestSpans
from quire.router.store import Store
from quire.router.telling import Teller
from quire.router.usage import Usage
from quire_operators.nvml import Watch
from quire_schemas.wire import METRICS

log = logging.getLogger("quire.router")


@dataclass(frozen=True, slots=True)
class Application:
    """What serves HTTP, and what goes on beside it."""

    asgi: ASGIApp
    store: Store


@dataclass(frozen=True, slots=True)
class Head(Application):
    """That of a router's head, or of its one worker."""

    desk: OwnDesk
    executor: Executor
    usage: Usage
    background: Background
    examiner: Examiner
    look: Callable[[], Awaitable[tuple[int, bytes]]]
    """What `/health` answers."""


Scrape = Callable[[], Awaitable[bytes]]
"""Gives what `/metrics` answers."""


def build(fleet: Fleet, config: RouterConfig, teller: Teller, scrape: Scrape | None = None) -> Head:
    """The application that serves `fleet`, and owns what all workers share; it works off batches once its executor
    is started. `scrape` asks all workers, where there are several.
    """
    fleet.metrics.watch(teller.counts, lambda: teller.pid)
    fleet.metrics.watch_store(config.store)
    if config.metrics_compat == "vllm":
        fleet.metrics.add_vllm_names()
    gpus = Watch()
    gpus.start()
    fleet.metrics.watch_gpus(gpus)
    store, prover, desk = Store(config.store), Prover(), OwnDesk(fleet)
    usage = Usage(store, budgets=fleet.access.limiter.budgets)
    fleet.metrics.watch_budgets(fleet.access.limiter.all_budgets)
    fleet.access.read_spending = usage.read_for_budgets
    gateway, spans = Gateway(fleet, desk, usage), RequestSpans(teller)
    kept, answered = Files(store), Responses(store)
    stored = Batches(store, kept)
    batched = _batched(gateway, answered)
    background = Background(
        answered,
        lambda name: Exchange(gateway, spans, responses.ResponsesFormat(gateway, answered, name), background=True),
        fleet.access,
    )
    executor = Executor(gateway, spans, kept, stored, batched, (background, usage))

    async def look() -> tuple[int, bytes]:
        return await health.health(fleet, prover)

    async def own_series() -> bytes:
        return await fleet.metrics.scraped()

    inference = _inference(gateway, spans, batched)
    routes = [
        *inference,
        *responses.routes(gateway, spans, answered, background),
        *models.routes(fleet),
        *files.routes(kept, fleet),
        *batches.routes(stored, batched, executor.wake, fleet),
        *health.routes(fleet, look),
        *_told(scrape or own_series),
    ]
    guard = _guarded(routes, inference, fleet, config, desk)
    return Head(guard, store, desk, executor, usage, background, Examiner(fleet), look)


def build_worker(fleet: Fleet, config: RouterConfig, teller: Teller, head: FarHead) -> Application:
    """The application of another worker, which asks `head` for what all share."""
    fleet.metrics.watch(teller.counts, lambda: teller.pid)
    store = Store(config.store)
    gateway, spans = Gateway(fleet, head.desk, head), RequestSpans(teller)
    kept, answered = Files(store), Responses(store)
    batched = _batched(gateway, answered)

    async def scrape() -> bytes:
        return (await head.page("/metrics"))[1]

    inference = _inference(gateway, spans, batched)
    routes = [
        *inference,
        *responses.routes(gateway, spans, answered, head.later(answered)),
        *models.routes(fleet),
        *files.routes(kept, fleet),
        *batches.routes(Batches(store, kept), batched, head.wake, fleet),
        *health.routes(fleet, lambda: head.page("/health")),
        *_told(scrape),
    ]
    return Application(_guarded(routes, inference, fleet, config, head.desk), store)


def _batched(gateway: Gateway, answered: Responses) -> dict[str, Format[Any]]:
    """The formats of the endpoints that lines of batches may be for."""
    return {
        "/v1/chat/completions": ChatFormat(gateway),
        "/v1/completions": CompletionFormat(gateway),
        "/v1/embeddings": EmbeddingFormat(gateway),
        "/v1/responses": responses.ResponsesFormat(gateway, answered),
    }


def _guarded(
    routes: Sequence[HTTPRouteHandler],
    inference: Sequence[HTTPRouteHandler],
    fleet: Fleet,
    config: RouterConfig,
    desk: Desk,
) -> ASGIApp:
    """The application of `routes`, of which those of `inference` have a short road."""
    app: ASGIApp = Litestar(
        route_handlers=[*_options(routes), *routes],
        exception_handlers={Exception: answer},
        guards=[authorize],
        before_request=_query_checked(fleet),
        openapi_config=None,
        logging_config=None,
        debug=False,
    )
    access_log = AccessLog(lambda: fleet.table.http.access_log)
    app = _straight(app, inference)
    count = partial(fleet.metrics.count_routed, REFUSED)
    return Guard(app, config.allowed_hosts, fleet.access, access_log, desk.limits, count, lambda: fleet.table.http)


def _straight(app: ASGIApp, handlers: Sequence[HTTPRouteHandler]) -> ASGIApp:
    """`app`, but for requests that need nothing of what a framework does before a handler: a POST to the very path
    of one of `handlers`, with nothing behind a question mark, by somebody who may have that route.

    What a framework does is as much work as all of a short request. Refusals of any kind are `app`'s.
    """
    by_path = {path: handler for handler in handlers for path in handler.paths}

    async def serve(scope: Scope, receive: Receive, send: Send) -> None:
        handler = by_path.get(scope["path"]) if scope.get("method") == "POST" else None
        if handler is None or scope["query_string"] or not may_have(visit_of(scope), handler):
            await app(scope, receive, send)
            return
        scope["path_template"] = scope["path"]
        answers: ASGIApp = await handler.fn()
        await answers(scope, receive, send)

    return serve


def _query_checked(fleet: Fleet) -> Callable[[Request[Any, Any, Any]], Awaitable[None]]:
    """Looks at what stands behind the question mark of every request for the API, by the row of its path."""
    rows = {
        (method, path): each
        for each in openapi.ENDPOINTS
        for path in (each.path, *each.aliases)
        for method in each.methods
        if not each.watched
    }

    async def check(request: Request[Any, Any, Any]) -> None:
        row = rows.get((request.method, request.scope["path_template"]))
        if row is not None:
            ignore_unknown = fleet.table.http.ignore_unknown
            checked(request.query_params.multi_items(), row.query, ignore_unknown=ignore_unknown)

    return check


def _inference(
    gateway: Gateway, spans: RequestSpans, formats: Mapping[str, Format[Any]]
) -> list[HTTPRouteHandler]:
    """What a model is asked, or its tokenizer, and nothing is kept of."""
    score_format, messages_format = ScoreFormat(gateway), MessagesFormat(gateway)

    @post("/v1/chat/completions", operation="chat")
    async def chat() -> ASGIApp:
        return Exchange(gateway, spans, formats["/v1/chat/completions"])

    @post("/v1/completions", operation="completions")
    async def completions() -> ASGIApp:
        return Exchange(gateway, spans, formats["/v1/completions"])

    @post("/v1/embeddings", operation="embeddings")
    async def embeddings() -> ASGIApp:
        return Exchange(gateway, spans, formats["/v1/embeddings"])

    @post(["/v1/score", "/score"], operation="score")
    async def score() -> ASGIApp:
        return Exchange(gateway, spans, score_format)

    @post("/v1/messages", operation="messages")
    async def messages() -> ASGIApp:
        return Exchange(gateway, spans, messages_format)

    @post("/v1/messages/count_tokens", operation="messages")
    async def count_tokens() -> ASGIApp:
        return TokenCounting(gateway, spans)

    @post(["/v1/tokenize", "/tokenize"], operation="tokenize")
    async def tokenize() -> ASGIApp:
        return Tokens(gateway, spans)

    @post(["/v1/detokenize", "/detokenize"], operation="tokenize")
    async def detokenize() -> ASGIApp:
        return Tokens(gateway, spans, back=True)

    return [chat, completions, embeddings, score, messages, count_tokens, tokenize, detokenize]


def _told(scrape: Scrape) -> list[HTTPRouteHandler]:
    """What the router tells of itself."""

    @get("/openapi.json", operation=ANY)
    async def get_description() -> ASGIApp:
        return Reply(200, openapi.as_json())

    @get("/metrics", operation=METRICS)
    async def get_metrics() -> ASGIApp:
        return Reply(200, await scrape(), CONTENT_TYPE)

    return [get_description, get_metrics]


def _options(handlers: Sequence[HTTPRouteHandler]) -> list[HTTPRouteHandler]:
    """Routes that say which methods a path takes; the framework's own name those of one of its handlers."""
    methods: dict[str, set[str]] = {}
    for handler in handlers:
        for path in handler.paths:
            methods.setdefault(path, {HttpMethod.OPTIONS.value}).update(handler.http_methods)
    return [_telling(path, ", ".join(sorted(taken))) for path, taken in methods.items()]


def _telling(path: str, allowed: str) -> HTTPRouteHandler:
    @route(path, http_method=HttpMethod.OPTIONS, status_code=204, operation=ANY)
    async def tell() -> Response[None]:
        return Response(None, status_code=204, headers={"allow": allowed})

    return tell


def answer(request: Request[Any, Any, Any], error: Exception) -> Response[bytes]:
    """The answer to anything that a route or the framework raised."""
    known = describe(_ours(error, request), Api.of(request.scope["path"], request.scope["headers"]))
    if known.status == 500:
        log.error("a request failed", exc_info=error)
    Account.of(request.scope).error = known.code or ""
    headers = {name.decode(): value.decode() for name, value in known.headers}
    if isinstance(error, MethodNotAllowedException) and error.headers:
        headers.update(error.headers)
    return Response(
        content=known.body,
        status_code=known.status,
        headers={name: value for name, value in headers.items() if name != "content-length"},
        media_type="application/json",
    )


def _ours(error: Exception, request: Request[Any, Any, Any]) -> Exception:
    """The framework's errors as ours: they carry its own words, and sometimes paths. Who is nobody does not
    learn which paths there are."""
    if isinstance(error, NotFoundException | MethodNotAllowedException):
        visit = visit_of(request.scope)
        if visit.caller is None:
            visit.unread = True
            return Unauthenticated(NO_KEY)
    if isinstance(error, NotFoundException):
        return absent.refusal(request.url.path) or NotFound(_no_such_path(request.url.path))
    if isinstance(error, MethodNotAllowedException):
        if (refusal := absent.refusal(request.url.path)) is not None:  # a word where other paths have an id
            return refusal
        listed = (error.headers or {}).get("allow", "").split(", ")
        allowed = " and ".join(method for method in sorted(listed) if method not in ("", "OPTIONS"))
        return MethodNotAllowed(f"This path takes {allowed or 'other methods'} only.")
    if isinstance(error, HTTPException) and error.status_code < 500:
        return InvalidRequest("The request is not understood.")
    return error


def _no_such_path(path: str) -> str:
    """What to say of one, with a guess at what was meant."""
    every = [known for each in openapi.ENDPOINTS for known in (each.path, *each.aliases)]
    near = difflib.get_close_matches(path[:64], every, n=1, cutoff=0.7)
    there = "There is no such path. GET /openapi.json describes those that there are."
    return f"{there} Did you mean {near[0]}?" if near else there
