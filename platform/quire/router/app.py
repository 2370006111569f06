"""The router's HTTP application: routes, and the one place where an exception becomes an answer."""

from __future__ import annotations

import difflib
import logging
from typing import Any, Final

from litestar import Litestar, Request, Response, delete, get, post, route
from litestar.enums import HttpMethod
from litestar.exceptions import HTTPException, MethodNotAllowedException, NotFoundException
from litestar.types import ASGIApp, Receive, Scope, Send

from quire.errors import Api, InvalidRequest, MethodNotAllowed, NotFound, describe
from quire.router import openapi
from quire.router.api import absent, batches, files, health, models
from quire.router.api.chat import ChatFormat
from quire.router.api.completions import CompletionFormat
from quire.router.api.embeddings import EmbeddingFormat
from quire.router.api.exchange import Exchange, Format
from quire.router.api.messages import MessagesFormat, TokenCounting
from quire.router.api.query import known
from quire.router.api.responses import Responding, ResponsesFormat, deleted, input_items
from quire.router.api.score import ScoreFormat
from quire.router.api.tokens import Tokens
from quire.router.background import Background
from quire.router.batches import Batches
from quire.router.config import RouterConfig
from quire.router.executor import Executor
from quire.router.files import Files
from quire.router.fleet import Fleet
from quire.router.gateway import Gateway
from quire.router.guard import Guard
from quire.router.metrics import CONTENT_TYPE
from quire.router.proof import Prover
from quire.router.responses import Responses
from quire.router.spans import RequestSpans
from quire.router.store import Store
from quire.tracing import Tracing
from quire_operators.nvml import Watch

log = logging.getLogger("quire.router")

_PROBE: Final = (HttpMethod.GET, HttpMethod.HEAD)


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
        body = b"" if scope.get("method") == "HEAD" else self._body
        await send({"type": "http.response.body", "body": body, "more_body": False})


def build(fleet: Fleet, config: RouterConfig, tracing: Tracing) -> tuple[ASGIApp, Executor]:
    """The application that serves `fleet`, and what works off its batches once it is started."""
    gateway = Gateway(fleet)
    prover = Prover()
    fleet.metrics.watch(tracing.counts)
    gpus = Watch()
    gpus.start()
    fleet.metrics.watch_gpus(gpus)
    spans = RequestSpans(tracing)
    chat_format = ChatFormat(gateway)
    completion_format = CompletionFormat(gateway)
    embedding_format = EmbeddingFormat(gateway)
    score_format = ScoreFormat(gateway)
    messages_format = MessagesFormat(gateway)
    store = Store(config.store)
    kept = Files(store)
    stored = Batches(store, kept)
    batched: dict[str, Format[Any]] = {
        "/v1/chat/completions": chat_format,
        "/v1/completions": completion_format,
        "/v1/embeddings": embedding_format,
    }
    responses = Responses(store)
    batched["/v1/responses"] = ResponsesFormat(gateway, responses)
    background = Background(
        responses, lambda name: Exchange(gateway, spans, ResponsesFormat(gateway, responses, name))
    )
    executor = Executor(gateway, spans, kept, stored, batched, (background,))

    @post("/v1/chat/completions")
    async def chat() -> ASGIApp:
        return Exchange(gateway, spans, chat_format)

    @post("/v1/completions")
    async def completions() -> ASGIApp:
        return Exchange(gateway, spans, completion_format)

    @post("/v1/responses")
    async def respond() -> ASGIApp:
        return Responding(gateway, spans, responses, background)

    @get("/v1/responses/{response_id:str}")
    async def get_response(request: Request[Any, Any, Any]) -> ASGIApp:
        known(dict(request.query_params), ())
        return Reply(200, await responses.get(_named(request, "response_id")))

    @delete("/v1/responses/{response_id:str}", status_code=200)
    async def delete_response(request: Request[Any, Any, Any]) -> ASGIApp:
        return Reply(200, await deleted(responses, _named(request, "response_id")))

    @post("/v1/responses/{response_id:str}/cancel")
    async def cancel_response(request: Request[Any, Any, Any]) -> ASGIApp:
        return Reply(200, await background.cancel(_named(request, "response_id")))

    @get("/v1/responses/{response_id:str}/input_items")
    async def list_input(request: Request[Any, Any, Any]) -> ASGIApp:
        named = _named(request, "response_id")
        return Reply(200, await input_items(responses, named, dict(request.query_params)))

    @post("/v1/embeddings")
    async def embeddings() -> ASGIApp:
        return Exchange(gateway, spans, embedding_format)

    @post(["/v1/score", "/score"])
    async def score() -> ASGIApp:
        return Exchange(gateway, spans, score_format)

    @post("/v1/messages")
    async def messages() -> ASGIApp:
        return Exchange(gateway, spans, messages_format)

    @post("/v1/messages/count_tokens")
    async def count_tokens() -> ASGIApp:
        return TokenCounting(gateway, spans)

    @post(["/v1/tokenize", "/tokenize"])
    async def tokenize() -> ASGIApp:
        return Tokens(gateway, spans)

    @post(["/v1/detokenize", "/detokenize"])
    async def detokenize() -> ASGIApp:
        return Tokens(gateway, spans, back=True)

    @get("/v1/models")
    async def list_models() -> ASGIApp:
        return Reply(200, models.all_models(fleet))

    @get("/v1/models/{name:path}")
    async def get_model(request: Request[Any, Any, Any]) -> ASGIApp:
        name = str(request.path_params["name"]).removeprefix("/")  # names may have slashes, as hubs' do
        return Reply(200, models.one_model(fleet, name))

    @post("/v1/files")
    async def upload() -> ASGIApp:
        return files.Upload(kept)

    @get("/v1/files")
    async def list_files(request: Request[Any, Any, Any]) -> ASGIApp:
        return Reply(200, await files.listed(kept, dict(request.query_params)))

    @get("/v1/files/{file_id:str}")
    async def get_file(request: Request[Any, Any, Any]) -> ASGIApp:
        return Reply(200, await files.one(kept, _named(request, "file_id")))

    @delete("/v1/files/{file_id:str}", status_code=200)
    async def delete_file(request: Request[Any, Any, Any]) -> ASGIApp:
        return Reply(200, await files.deleted(kept, _named(request, "file_id")))

    @get("/v1/files/{file_id:str}/content")
    async def get_content(request: Request[Any, Any, Any]) -> ASGIApp:
        return files.Content(kept, _named(request, "file_id"))

    @post("/v1/batches")
    async def create_batch() -> ASGIApp:
        return batches.Create(stored, executor, fleet.table.http)

    @get("/v1/batches")
    async def list_batches(request: Request[Any, Any, Any]) -> ASGIApp:
        return Reply(200, await batches.listed(stored, dict(request.query_params)))

    @get("/v1/batches/{batch_id:str}")
    async def get_batch(request: Request[Any, Any, Any]) -> ASGIApp:
        return Reply(200, await batches.one(stored, _named(request, "batch_id")))

    @post("/v1/batches/{batch_id:str}/cancel")
    async def cancel_batch(request: Request[Any, Any, Any]) -> ASGIApp:
        return Reply(200, await batches.cancelled(stored, executor, _named(request, "batch_id")))

    @route("/health", http_method=_PROBE)
    async def get_health() -> ASGIApp:
        return Reply(*await health.health(fleet, prover))

    @route("/livez", http_method=_PROBE)
    async def get_livez() -> ASGIApp:
        return Reply(*health.liveness())

    @route("/readyz", http_method=_PROBE)
    async def get_readyz() -> ASGIApp:
        return Reply(*health.readiness(fleet))

    @get("/openapi.json")
    async def get_description() -> ASGIApp:
        return Reply(200, openapi.as_json())

    @get("/metrics")
    async def get_metrics() -> ASGIApp:
        return Reply(200, fleet.metrics.render(), CONTENT_TYPE)

    routes = [
        chat,
        completions,
        respond,
        get_response,
        delete_response,
        cancel_response,
        list_input,
        embeddings,
        score,
        messages,
        count_tokens,
        tokenize,
        detokenize,
        list_models,
        get_model,
        upload,
        list_files,
        get_file,
        delete_file,
        get_content,
        create_batch,
        list_batches,
        get_batch,
        cancel_batch,
        get_health,
        get_livez,
        get_readyz,
        get_description,
        get_metrics,
    ]
    app = Litestar(
        route_handlers=list(routes),
        exception_handlers={Exception: answer},
        openapi_config=None,
        logging_config=None,
        debug=False,
    )
    return Guard(app, config.allowed_hosts, lambda: fleet.table.http.allow_origins), executor


def _named(request: Request[Any, Any, Any], parameter: str) -> str:
    """What stands in the path."""
    return str(request.path_params[parameter])


def answer(request: Request[Any, Any, Any], error: Exception) -> Response[bytes]:
    """The answer to anything that a route or the framework raised."""
    known = describe(_ours(error, request), Api.at(request.url.path))
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


def _ours(error: Exception, request: Request[Any, Any, Any]) -> Exception:
    """The framework's errors as ours: they carry its own words, and sometimes paths."""
    if isinstance(error, NotFoundException):
        return absent.refusal(request.url.path) or NotFound(_no_such_path(request.url.path))
    if isinstance(error, MethodNotAllowedException):
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
