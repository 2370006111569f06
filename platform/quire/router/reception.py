"""One request, from the first byte of its body to its end, whatever answers it.

`Reception` is what all requests with a JSON body have in common, those that need no engine among them:

- the body is read under a limit of size and time;
- the request counts towards the limits of whoever sent it (`limits`), until its end;
- the client is watched while the work goes on, for whole answers as for streams: when it leaves, the work is
  cancelled, and with it every sequence at the engines;
- whatever goes wrong becomes the one answer, or the one event of a stream that has begun, which says so;
- its end is counted, told to the access log (`account`) and to its span.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Coroutine, Mapping, Sequence
from typing import Any, Final, cast

import msgspec
from litestar.types import Receive, Scope, Send

from quire.errors import (
    Api,
    ApiError,
    BodyTimeout,
    BodyTooLarge,
    BudgetSpent,
    InvalidRequest,
    RateLimited,
    ServiceUnavailable,
    ThreadsUnsupported,
    UnsupportedMediaType,
    describe,
    renamed,
)
from quire.router.access import EVERYBODY, visit_of
from quire.router.account import Account
from quire.router.desk import nobodys
from quire.router.fleet import ServedModel
from quire.router.formats import NO_NAMES, StreamFormat
from quire.router.gateway import Gateway
from quire.router.http import GONE, SLOW
from quire.router.model_metrics import NO_MODEL, REFUSED_FOR_ITSELF
from quire.router.spans import RequestSpan, RequestSpans
from quire.router.traffic import Asked
from quire_schemas.openai.body import BadRequest, BadStandIn, NoThreads
from quire_schemas.wire import HttpSettings

log = logging.getLogger("quire.router")

DRAIN: Final = 4
"""A body up to this many times the limit, or up to `DRAIN_BYTES`, is read to its end before it is refused."""
DRAIN_BYTES: Final = 16 * 1024 * 1024
_CHARSETS: Final = frozenset({b"utf-8", b"utf8", b"us-ascii"})


GLANCE_BYTES: Final = 64 * 1024
"""A body up to this size is looked at for the name of its model, even if it is refused unread."""


class _Named(msgspec.Struct):
    """What a request says first of all."""

    model: str


class ClientGone(Exception):
    """The client closed its connection.

    ClientGone
    └── ClientSlow    it was closed for it, as it read nothing
    """


class ClientSlow(ClientGone):
    """The client was cut off, as it read nothing of its answer for `timeouts.send`."""


class Reception:
    """Answers one request with whatever its kind says; counts it, traces it, and tells what went wrong.

    Call it as an ASGI application.
    """

    def __init__(
        self,
        gateway: Gateway,
        spans: RequestSpans,
        operation: str,
        api: Api = Api.OPENAI,
        *,
        names: Mapping[str, str] = NO_NAMES,
        background: bool = False,
    ) -> None:
        """`background`: nobody waits for the answer."""
        self._background = background
        self._gateway = gateway
        self._api = api
        self._names = names
        self._spans = spans
        self._operation = operation
        self._settings = gateway.fleet.table.http
        self._stream: StreamFormat | None = None
        """Of a stream that has begun."""
        self._refused = True
        """Until a run begins, whatever goes wrong is a refusal."""
        self._model: str | None = None
        self._caller = EVERYBODY
        self._ticket = nobodys()
        self._headers: Sequence[tuple[bytes, bytes]] = ()
        self._received_at = 0.0
        """When the whole body was there."""
        self._account = Account()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        arrived_at = time.monotonic()
        account = self._account = Account.of(scope)
        account.operation, account.background = self._operation, self._background
        visit = visit_of(scope)
        visit.limited = True
        self._headers = list(scope["headers"])
        headers = dict(self._headers)
        span = self._spans.start(self._operation, self._headers, scope["path"], scope["server"])
        account.trace_id = span.trace_id
        finish, failure, status, body = "error", "internal_error", 500, b""
        try:
            self._caller = visit.known
            if not self._background:  # of that there is never much at once, and it waits for no better moment
                visit.unread = self._gateway.fleet.memory.refusing
                self._gateway.fleet.memory.check()
            body = await read_body(headers, receive, self._settings)
            if not self._background:
                self._gateway.fleet.memory.check()  # again: many may have been let in at once
            self._received_at = time.monotonic()
            async with self._gateway.desk.entered(self._caller.tenant, self._caller.key) as self._ticket:
                finish = await _while_connected(scope, self._answer(body, arrived_at, span, send))
            failure, status = "", 200
        except ClientGone as left:
            account.client = "slow" if isinstance(left, ClientSlow) else "gone"
            finish, failure, status = "abort", f"client_{account.client}", 0
        except asyncio.CancelledError:
            # Only the server's shutdown cancels an exchange, and nothing comes after this in its task.
            failure, status = "shutdown", 503
            stopped = "The server stopped before the answer was complete."
            await self._fail(send, ServiceUnavailable(stopped, retry_after=1.0))
        except Exception as error:
            known = describe(_ours(error, self._names), self._api)
            at_fault = known.status < 500 and self._stream is None  # an engine may be the one who refuses
            finish = "refused" if known.status != 500 and (self._refused or at_fault) else "error"
            failure, status = known.code or REFUSED_FOR_ITSELF, known.status
            if isinstance(error, RateLimited | BudgetSpent) and not account.model:
                self._find_model(body)
            if known.status == 500:
                log.error("a request failed", exc_info=error)
            await self._fail(send, error)
        finally:
            handles = self._gateway.fleet.metrics.model(self._model or NO_MODEL)
            handles.requests[self._operation, finish].inc()
            now = time.monotonic()
            if finish == "refused":
                handles.rejections[failure].inc()
            elif not self._refused and not self._background:
                handles.e2e.observe(now - arrived_at)
            account.finish, account.error, account.failed = finish, failure, status >= 500
            account.total = now - arrived_at
            self._spans.measure(account)
            sent = 200 if self._stream is not None else status or None
            span.end(now, failure or None, failed=status >= 500, status=sent)

    async def _answer(self, body: bytes, arrived_at: float, span: RequestSpan, send: Send) -> str:
        """Do the work and send the answer; gives the word by which the request is counted."""
        raise NotImplementedError

    def _resolve(self, name: str, body: bytes) -> ServedModel:
        """The model that the request of that body would go to by this name. Raises `PermissionDenied`,
        `ModelNotFound` and `ModelStopped`."""
        return self._gateway.fleet.resolve(Asked(name, self._headers, body), self._caller)

    def _find_model(self, body: bytes) -> None:
        """Note which model a request was for that was refused before anybody read what it asks for, as far as it
        has one that its caller may use, and is soon read."""
        if len(body) <= GLANCE_BYTES:
            with contextlib.suppress(msgspec.DecodeError, ApiError):
                name = msgspec.json.decode(body, type=_Named).model
                self._account.model = self._resolve(name, body).name
                self._account.asked = name

    def _serves(self, served: ServedModel, asked: str, span: RequestSpan, adapter: str = "") -> None:
        """Note which model, with which adapter, the request is for, and the name that it has for it."""
        self._model = self._account.model = served.target(adapter)
        self._account.asked = asked
        span.name(asked, self._model)

    async def _fail(self, send: Send, error: Exception) -> None:
        """Answer with the error; in a stream that has begun, as its one error event.

        Where the event is no end of the answer by itself, the server cuts the connection behind it.
        """
        known = describe(_ours(error, self._names), self._api)
        if self._stream is not None:
            told = await self._stream.broken(known)
            await send({"type": "http.response.body", "body": told, "more_body": self._stream.cut})
            return
        await send({"type": "http.response.start", "status": known.status, "headers": list(known.headers)})
        await send({"type": "http.response.body", "body": known.body, "more_body": False})


async def send_json(send: Send, payload: bytes, more: Sequence[tuple[bytes, bytes]] = ()) -> None:
    """The whole answer to a request that went well, with headers of its own if there are `more`."""
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(payload)).encode()), *more]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": payload, "more_body": False})


def _ours(error: Exception, names: Mapping[str, str]) -> Exception:
    """The schema's complaint as the error that the table knows, and in the client's words."""
    if not isinstance(error, BadRequest):
        return renamed(error, names)
    kind = ThreadsUnsupported if isinstance(error, NoThreads) else InvalidRequest
    told = kind(error.message, param=error.param)
    return renamed(told, names) if isinstance(error, BadStandIn) else told


async def read_body(headers: dict[bytes, bytes], receive: Receive, settings: HttpSettings) -> bytes:
    """The whole body. Raises `UnsupportedMediaType`, `BodyTooLarge`, `BodyTimeout` and `ClientGone`."""
    media, *options = (part.strip().lower() for part in headers.get(b"content-type", b"").split(b";"))
    if media != b"application/json":
        raise UnsupportedMediaType("The body must be declared as JSON: Content-Type: application/json.")
    charsets = [option.partition(b"=")[2].strip(b'"') for option in options if option.startswith(b"charset=")]
    if not set(charsets) <= _CHARSETS:
        raise UnsupportedMediaType("The body must be UTF-8, and its Content-Type may name no other charset.")
    if headers.get(b"content-encoding", b"identity").strip().lower() != b"identity":
        raise UnsupportedMediaType("The body must be sent as it is, without a Content-Encoding.")
    stated = int(headers.get(b"content-length", b"0"))
    limit = settings.max_body_bytes
    parts: list[bytes] = []
    size = 0
    bearable = max(DRAIN * limit, DRAIN_BYTES)
    more = stated <= bearable
    try:
        async with asyncio.timeout(settings.body_seconds):
            while more:
                message = await receive()
                if message["type"] != "http.request":
                    raise ClientGone
                size += len(message["body"])
                if size <= limit:
                    parts.append(message["body"])
                # A client cut off while it sends never sees why: what is too large is read on for a while.
                more = message["more_body"] and size <= bearable
    except TimeoutError:
        raise BodyTimeout(f"The body did not arrive within {settings.body_seconds:g} seconds.") from None
    if more or max(size, stated) > limit:
        raise BodyTooLarge(f"The body is larger than the limit of {limit} bytes, the Gateway's spec.maxBodySize.")
    return b"".join(parts)


async def _while_connected(scope: Scope, work: Coroutine[Any, Any, str]) -> str:
    """The result of `work`; cancelled, and `ClientGone` or `ClientSlow` raised, when the client leaves before."""
    task, left, gone = asyncio.current_task(), cast(Mapping[str, asyncio.Future[Any]], scope)[GONE], False
    if task is None:
        raise RuntimeError("there is no task to cancel")

    def leave(_: asyncio.Future[Any]) -> None:
        nonlocal gone
        gone = True
        task.cancel()

    left.add_done_callback(leave)
    try:
        return await work
    except asyncio.CancelledError:
        if gone and not task.uncancel():  # else it is the server's shutdown, whoever has left besides
            raise (ClientSlow if left.result() == SLOW else ClientGone) from None
        raise
    finally:
        left.remove_done_callback(leave)


__all__ = ["ClientGone", "Reception", "read_body", "send_json"]
