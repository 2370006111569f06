"""One request for text, from the first byte of its body to the last byte of its answer.

An endpoint family brings a `Format`: how to read a body, how to make a `Job` of it, and how an answer looks, whole
and in pieces. `Exchange` does all the rest, the same for every family; what it shares with requests that need no
engine is `Reception`:

- the body is read under a limit of size and time;
- the request counts towards the limits of whoever sent it (`limits`), until its end;
- the client is watched while the work goes on, for whole answers as for streams: when it leaves, the work is
  cancelled, and with it every sequence at the engines;
- a stream says nothing until the first piece is there, so that everything that goes wrong before is an ordinary
  error with a status of its own;
- a stream ends in exactly one of three ways: finish reasons and `[DONE]`; one error event and a connection that is
  cut (the answer is left without its end, which the server takes as the order to close); or the client left;
- a stream that has begun and has nothing to tell for a while (a thought that is not shown, a long queue of others)
  says that it goes on, in words that clients pass over: proxies cut what is silent.

Server-sent events are written as bytes, one `send` for all that one step brought.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final, Generic, Protocol, TypeVar

from litestar.types import Receive, Scope, Send

from quire.errors import (
    Api,
    ApiError,
    BodyTimeout,
    BodyTooLarge,
    EngineDied,
    EngineUnavailable,
    HttpError,
    InternalError,
    InvalidRequest,
    ModelNotFound,
    OutOfTime,
    QueueFull,
    RequestQuarantined,
    ServiceUnavailable,
    ThreadsUnsupported,
    TimedOut,
    UnsupportedMediaType,
    describe,
    failure_of,
    renamed,
)
from quire.router.access import EVERYBODY, Caller, visit_of
from quire.router.account import Account
from quire.router.budgets import Amount, most
from quire.router.fleet import ServedModel
from quire.router.gateway import Gateway
from quire.router.job import Job, Update
from quire.router.limits import Ticket
from quire.router.metrics import NO_MODEL, REFUSED_FOR_ITSELF, ROUTED, STEPPED_IN
from quire.router.run import Run
from quire.router.spans import RequestSpan, RequestSpans
from quire.router.traffic import Asked, Way
from quire.router.usage import Who
from quire.text import TextError
from quire.text.errors import BadTemplate, TemplateFailed
from quire_schemas import signals
from quire_schemas.openai.answer import CompletionTokensDetails, PromptTokensDetails, Usage
from quire_schemas.openai.body import BadRequest, BadStandIn, NoThreads
from quire_schemas.openai.request import ModelRequest
from quire_schemas.wire import HttpSettings

log = logging.getLogger("quire.router")

PING_SECONDS: Final = 10.0
"""So long a stream is silent at most."""
DRAIN: Final = 4
"""A body up to this many times the limit, or up to `DRAIN_BYTES`, is read to its end before it is refused."""
DRAIN_BYTES: Final = 16 * 1024 * 1024
_CHARSETS: Final = frozenset({b"utf-8", b"utf8", b"us-ascii"})
_STREAM_HEADERS: Final = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]
R = TypeVar("R", bound=ModelRequest)
NO_NAMES: Final[Mapping[str, str]] = MappingProxyType({})
"""Of an API whose fields are our own."""


class ClientGone(Exception):
    """The client closed its connection."""


class Format(Protocol[R]):
    """What is particular to one endpoint family."""

    operation: str
    api: Api
    """Whose clients read the answers, errors among them."""
    names: Mapping[str, str]
    """Its fields, by the names of those of the chat request that they stand for, the longer ones first."""

    def read(self, body: bytes, ignore_unknown: bool) -> R:
        """The request in a body, without the fields that are unknown if they are to be ignored. Raises
        `BadRequest`.
        """

    def sequences(self, request: R) -> int:
        """How many sequences it will run."""

    def job(
        self, request: R, served: ServedModel, size: int, arrived_at: float, span: RequestSpan, caller: Caller
    ) -> Awaitable[Job]:
        """The request as a job."""

    def whole(self, job: Job, request: R, updates: Sequence[Update], usage: Usage) -> Awaitable[bytes]:
        """The answer in one piece, as JSON, from all updates of the run."""

    def stream(self, job: Job, request: R) -> StreamFormat:
        """The answer in pieces."""


class StreamFormat(Protocol):
    """Writes the events of one stream."""

    ping: bytes
    """Says that the stream goes on; it may stand between any two events."""
    cut: bool
    """Whether clients tell a stream that broke off from a whole one by its connection alone, which is cut then."""

    def events(self, updates: Sequence[Update], usage: Callable[[], Usage]) -> bytes:
        """Events for one batch; `usage` tells the tokens so far."""

    def end(self, usage: Usage) -> Awaitable[bytes]:
        """What tells the client that the answer is complete."""

    def broken(self, error: HttpError) -> Awaitable[bytes]:
        """The one event that says that it never will be."""


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
        self._ticket = Ticket()
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
        span = self._spans.start(self._operation, scope["headers"], scope["path"], scope["server"])
        account.trace_id = span.trace_id
        finish, failure, status = "error", "internal_error", 500
        try:
            self._caller = visit.known
            if not self._background:  # of that there is never much at once, and it waits for no better moment
                visit.unread = self._gateway.fleet.memory.refusing
                self._gateway.fleet.memory.check()
            body = await read_body(headers, receive, self._settings)
            if not self._background:
                self._gateway.fleet.memory.check()  # again: many may have been let in at once
            self._received_at = time.monotonic()
            with self._gateway.fleet.access.limiter.entered(self._caller.tenant, self._caller.key) as self._ticket:
                finish = await _while_connected(receive, self._answer(body, arrived_at, span, send))
            failure, status = "", 200
        except ClientGone:
            finish, failure, status = "abort", "client_gone", 0
            account.gone = True
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
            span.set({signals.GEN_AI_E2E: now - arrived_at, signals.HTTP_STATUS: sent})
            span.end(now, failure or None, failed=status >= 500)

    async def _answer(self, body: bytes, arrived_at: float, span: RequestSpan, send: Send) -> str:
        """Do the work and send the answer; gives the word by which the request is counted."""
        raise NotImplementedError

    def _resolve(self, name: str, body: bytes) -> ServedModel:
        """The model that the request of that body would go to by this name. Raises `PermissionDenied`,
        `ModelNotFound` and `ModelStopped`."""
        return self._gateway.fleet.resolve(Asked(name, self._headers, body), self._caller)

    def _serves(self, served: ServedModel, asked: str, span: RequestSpan) -> None:
        """Note which model the request is for, and the name that it has for it."""
        self._model = self._account.model = served.name
        self._account.asked = asked
        span.name(self._operation, asked)
        span.set({signals.GEN_AI_REQUEST_MODEL: asked, signals.GEN_AI_RESPONSE_MODEL: self._model})

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


class Exchange(Reception, Generic[R]):
    """Answers one request for text or vectors, which a run on the fleet makes."""

    def __init__(
        self, gateway: Gateway, spans: RequestSpans, form: Format[R], *, background: bool = False
    ) -> None:
        super().__init__(gateway, spans, form.operation, form.api, names=form.names, background=background)
        self._format = form
        self._runs: list[Run] = []
        """One for each model that was tried."""

    async def _answer(self, body: bytes, arrived_at: float, span: RequestSpan, send: Send) -> str:
        ignore_unknown = self._settings.ignore_unknown
        request = await self._gateway.aside(lambda: self._format.read(body, ignore_unknown), len(body))
        return await self._serve(request, body, arrived_at, span, send)

    async def _serve(self, request: R, body: bytes, arrived_at: float, span: RequestSpan, send: Send) -> str:
        """Have a request answered that is understood, by the model that it goes to, or by one that steps in."""
        fleet = self._gateway.fleet
        way = fleet.way(Asked(request.model, self._headers, body), self._caller)
        if way.mirror is not None and not self._background:

            async def copy(served: ServedModel, at: float, unseen: RequestSpan) -> Job:
                return self._own(await self._format.job(request, served, len(body), at, unseen, self._caller))

            self._gateway.mirrors.begin(way.terms.route, way.mirror, self._format.sequences(request), copy)
        model, tried = way.model, list[str]()
        first: ApiError | TextError | None = None
        try:
            while True:
                begun_at = time.monotonic() if tried else arrived_at
                try:
                    served = fleet.at(way, model)
                    fleet.metrics.count_routed(ROUTED, way.terms.route, served.name)
                    times = (arrived_at, begun_at)
                    return await self._serve_by_turn(served, way, request, len(body), times, span, send)
                except (ApiError, TextError) as error:
                    first = first or error
                    tried.append(model or "")
                    failure = failure_of(error) if self._stream is None else None
                    model = way.instead(failure, tried, fleet.by_model) if failure is not None else None
                    if model is None or failure is None:
                        raise first from None
                    fleet.metrics.count_routed(STEPPED_IN, way.terms.route, model, failure)
                    span.event(signals.EVENT_FALLBACK, time.monotonic(), {signals.QUIRE_MODEL: model})
        finally:
            self._note()

    async def _serve_by_turn(
        self,
        served: ServedModel,
        way: Way,
        request: R,
        size: int,
        times: tuple[float, float],
        span: RequestSpan,
        send: Send,
    ) -> str:
        """Have it answered by this model, or by its canary if it is its turn. Where that fails, and nothing of it
        has gone out, the model has it after all."""
        canaries = self._gateway.fleet.canaries
        canary = canaries.turn(served)
        if canary is not served:
            try:
                return await self._serve_by(canary, way, request, size, times, span, send)
            except (ApiError, TextError) as error:
                if self._stream is not None or not _is_of_revision(error):
                    raise
                span.event(signals.EVENT_FALLBACK, time.monotonic(), {signals.QUIRE_MODEL: served.name})
        return await self._serve_by(served, way, request, size, times, span, send)

    async def _serve_by(
        self,
        served: ServedModel,
        way: Way,
        request: R,
        size: int,
        times: tuple[float, float],
        span: RequestSpan,
        send: Send,
    ) -> str:
        """Have it answered by this model. `times` are those of its arrival and of its beginning there."""
        arrived_at, begun_at = times
        self._serves(served, request.model, span)
        span.set({signals.QUIRE_ROUTE: way.terms.route or None})
        terms = way.terms.patient() if self._background else way.terms
        sequences, owner = self._format.sequences(request), self._caller.owner
        with self._gateway.admit(served, sequences, owner, background=self._background):
            made = await self._format.job(request, served, size, arrived_at, span, self._caller)
            job = dataclasses.replace(self._own(made), terms=terms, begun_at=begun_at)
            self._ticket.reserve(most(job.prompt_tokens, job.most_tokens, served.route.prices))
            run = Run(self._gateway.fleet, job, self._received_at)
            self._runs.append(run)
            span.set(_request_attributes(run.job))
            metrics = self._gateway.fleet.metrics.model(served.name)
            metrics.in_flight.inc()
            self._refused = False
            tally = None if self._background else self._gateway.fleet.canaries.tally(served)
            try:
                if job.stream:
                    reasons = await self._send_stream(request, run, send)
                else:
                    reasons = await self._send_whole(request, run, send)
                if tally is not None:
                    tally.whole(void=run.is_void)
            except (ApiError, TextError) as error:
                if tally is not None and (self._stream is not None or _is_of_revision(error)):
                    tally.fail()
                raise
            finally:
                if tally is not None:
                    tally.time(run.first_token_after, run.between_tokens)
                metrics.in_flight.dec()
                self._ticket.used += run.prompt_tokens + run.completion_tokens
                span.set(_answer_attributes(run))
                self._tell(run)
            span.set({signals.GEN_AI_RESPONSE_FINISH_REASONS: reasons})
            return next((reason for reason in ("length", "repetition") if reason in reasons), "stop")

    def _tell(self, run: Run) -> None:
        """Put what became of a run into the account."""
        account, job, first = self._account, run.job, run.first_token_at
        account.replica, account.stream = run.replica, job.stream
        account.prompt_tokens, account.cached_tokens = job.prompt_tokens, run.cached_tokens
        account.completion_tokens, account.queue = run.completion_tokens, run.queue_time
        if first is not None:
            account.first_token, account.writing = first - job.arrived_at, time.monotonic() - first

    def _note(self) -> None:
        """Have what its runs came to in the ledger: one request, of the model that had it last."""
        for run in self._runs:
            requests = int(run is self._runs[-1])
            used = Amount(requests, run.prompt_tokens, run.cached_tokens, run.completion_tokens)
            route = run.job.model.route
            who = Who(self._caller.owner, self._caller.key, run.job.model.name)
            self._gateway.usage.add(who, used.priced(route.prices))

    def _own(self, job: Job) -> Job:
        """The job as its caller's: with his rank where there are ranks, and in a cache that is his alone.

        Raises `InvalidRequest` for one that would go before others of his policy's rank.
        """
        if self._caller.tenant is not None and job.priority < 0:
            raise InvalidRequest(
                "'priority' is below 0: a request may go behind others of its policy's rank, not before them.",
                param="priority",
            )
        ranked = job.model.route.policy == "priority"
        return dataclasses.replace(
            job,
            caller=self._caller,
            background=self._background,
            priority=self._caller.rank(job.priority) if ranked else job.priority,
            cache_salt=self._caller.salted(job.cache_salt),
        )

    async def _send_whole(self, request: R, run: Run, send: Send) -> list[str]:
        updates: list[Update] = []
        async with contextlib.aclosing(run.updates()) as batches:
            async for batch in batches:
                updates.extend(batch)
        answer = await self._format.whole(run.job, request, updates, usage_of(run))
        await send_json(send, answer, _served_by(run))
        run.delivered()
        return [update.finish_reason for update in updates if update.finish_reason is not None]

    async def _send_stream(self, request: R, run: Run, send: Send) -> list[str]:
        form, usage = self._format.stream(run.job, request), functools.partial(usage_of, run)
        reasons: list[str] = []
        async with contextlib.aclosing(run.updates()) as batches, _Pings(send, form.ping) as pings:
            async for batch in batches:
                if self._stream is None:
                    headers = [*_STREAM_HEADERS, *_served_by(run)]
                    await send({"type": "http.response.start", "status": 200, "headers": headers})
                    self._stream = form
                    pings.begin()
                made = await run.job.written(functools.partial(form.events, batch, usage))
                if made:  # of what is not shown there is nothing to tell
                    await send({"type": "http.response.body", "body": made, "more_body": True})
                    pings.sent_at = time.monotonic()
                    run.delivered()
                reasons += [update.finish_reason for update in batch if update.finish_reason is not None]
        await send({"type": "http.response.body", "body": await form.end(usage_of(run)), "more_body": False})
        return reasons


class _Pings:
    """Says that a stream goes on whenever nothing of it was sent for `PING_SECONDS`.

    A task sleeps from one look at the clock to the next, so that whoever sends has but to note the time. Events
    are sent whole, so that a ping comes between two of them.
    """

    def __init__(self, send: Send, ping: bytes) -> None:
        self.sent_at = 0.0
        self._send = send
        self._ping = ping
        self._task: asyncio.Task[None] | None = None

    def begin(self) -> None:
        self.sent_at = time.monotonic()
        self._task = asyncio.create_task(self._watch())

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(self.sent_at + PING_SECONDS - time.monotonic())
            if time.monotonic() - self.sent_at >= PING_SECONDS:
                await self._send({"type": "http.response.body", "body": self._ping, "more_body": True})
                self.sent_at = time.monotonic()

    async def __aenter__(self) -> _Pings:
        return self

    async def __aexit__(self, *_: object) -> None:
        """None comes after this."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])


def _served_by(run: Run) -> list[tuple[bytes, bytes]]:
    """Which Model the answer is from: the body repeats the name that was asked for."""
    return [(b"x-quire-model", run.job.model.name.encode())]


def _is_of_revision(error: ApiError | TextError) -> bool:
    """Whether a request might fare better at another revision of the model: it, not the request, is at
    fault, or it has left."""
    lasting = (RequestQuarantined, OutOfTime)
    return isinstance(error, _OF_REVISION) and not isinstance(error, lasting)


_OF_REVISION: Final = (
    EngineUnavailable,
    EngineUnavailable,
    EngineDied,
    InternalError,
    ModelNotFound,
    QueueFull,
    ServiceUnavailable,
    TimedOut,
    BadTemplate,
    TemplateFailed,
)


async def send_json(send: Send, payload: bytes, more: Sequence[tuple[bytes, bytes]] = ()) -> None:
    """The whole answer to a request that went well, with headers of its own if there are `more`."""
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(payload)).encode()), *more]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": payload, "more_body": False})


def usage_of(run: Run) -> Usage:
    """The tokens of a run so far."""
    prompt, completion = run.job.prompt_tokens, run.completion_tokens
    return Usage(
        prompt_tokens=prompt,
        completion_tokens=completion,
        total_tokens=prompt + completion,
        prompt_tokens_details=PromptTokensDetails(cached_tokens=run.cached_tokens),
        completion_tokens_details=(
            CompletionTokensDetails(reasoning_tokens=run.reasoning_tokens) if run.job.operation == "chat" else None
        ),
    )


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
        raise BodyTooLarge(f"The body is larger than the limit of {limit} bytes.")
    return b"".join(parts)


async def _while_connected(receive: Receive, work: Coroutine[Any, Any, str]) -> str:
    """The result of `work`; cancelled, and `ClientGone` raised, when the client leaves before."""
    task = asyncio.ensure_future(work)
    watch = asyncio.ensure_future(_disconnect(receive))
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        for each in (task, watch):
            if not each.done():
                each.cancel()
        await asyncio.wait({task, watch})


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        continue


def _request_attributes(job: Job) -> dict[str, Any]:
    """What was asked for, as it is carried out. Stop strings are left out: they are text."""
    sampling = job.sampling
    if job.pooling is not None:
        embeds = job.operation == "embeddings"
        return {
            signals.GEN_AI_REQUEST_ENCODINGS: ["base64" if job.as_base64 else "float"] if embeds else None,
            signals.GEN_AI_EMBEDDINGS_DIMENSIONS: job.pooling.dimensions,
            signals.GEN_AI_RESPONSE_ID: job.id,
            signals.GEN_AI_USAGE_INPUT_TOKENS: job.prompt_tokens,
        }
    structured = sampling.structured
    return {
        signals.GEN_AI_OUTPUT_TYPE: (
            "json" if structured is not None and structured.kind == "json_schema" else None
        ),
        signals.GEN_AI_REQUEST_MAX_TOKENS: sampling.max_tokens,
        signals.GEN_AI_REQUEST_TEMPERATURE: sampling.temperature,
        signals.GEN_AI_REQUEST_TOP_P: sampling.top_p,
        signals.GEN_AI_REQUEST_TOP_K: sampling.top_k or None,
        signals.GEN_AI_REQUEST_SEED: sampling.seed,
        signals.GEN_AI_REQUEST_FREQUENCY_PENALTY: sampling.frequency_penalty or None,
        signals.GEN_AI_REQUEST_PRESENCE_PENALTY: sampling.presence_penalty or None,
        signals.GEN_AI_REQUEST_CHOICES: job.n if job.n != 1 else None,
        signals.GEN_AI_REQUEST_STREAM: job.stream or None,
        signals.GEN_AI_RESPONSE_ID: job.id,
        signals.GEN_AI_USAGE_INPUT_TOKENS: job.prompt_tokens,
    }


def _answer_attributes(run: Run) -> dict[str, Any]:
    first = run.first_token_at
    until_first = first - run.job.arrived_at if first is not None else None
    return {
        signals.GEN_AI_USAGE_OUTPUT_TOKENS: run.completion_tokens,
        signals.GEN_AI_USAGE_CACHE_READ: run.cached_tokens,
        signals.GEN_AI_USAGE_REASONING: run.reasoning_tokens or None,
        signals.GEN_AI_TIME_TO_FIRST_TOKEN: until_first,
        signals.GEN_AI_RESPONSE_TIME_TO_FIRST_CHUNK: until_first if run.job.stream else None,
    }


__all__ = ["Exchange", "Format", "Reception", "StreamFormat", "read_body", "send_json", "usage_of"]
