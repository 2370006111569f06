"""One request for text or vectors: where it goes, and how what comes is written.

An endpoint family brings a `Format` (`formats`); `Exchange` does all the rest, the same for every family, on top
of what any request has (`reception`):

- a model is chosen, and another one steps in where the route of the request says so;
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
import functools
import time
from typing import Any, Final, Generic, Literal, TypeVar

from litestar.types import Send

from quire.errors import (
    ApiError,
    EngineDied,
    EngineUnavailable,
    InternalError,
    InvalidRequest,
    ModelNotFound,
    OutOfTime,
    QueueFull,
    RequestQuarantined,
    ServiceUnavailable,
    TimedOut,
    failure_of,
)
from quire.router.account import Account
from quire.router.budgets import Amount, most
from quire.router.fleet import ServedModel
from quire.router.formats import Format
from quire.router.gateway import Gateway
from quire.router.job import Job, Update
from quire.router.model_metrics import ROUTED, STEPPED_IN
from quire.router.reception import Reception, send_json
from quire.router.run import Run
from quire.router.spans import RequestSpan, RequestSpans
from quire.router.traffic import Asked, Way, adapter_of
from quire.router.usage import Who
from quire.text import TextError
from quire.text.errors import BadTemplate, TemplateFailed
from quire_schemas import signals
from quire_schemas.openai.answer import CompletionTokensDetails, PromptTokensDetails, Usage
from quire_schemas.openai.request import ModelRequest

PING_SECONDS: Final = 10.0
"""So long a stream is silent at most."""
_STREAM_HEADERS: Final = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]
R = TypeVar("R", bound=ModelRequest)


class Exchange(Reception, Generic[R]):
    """Answers one request for text or vectors, which a run on the fleet makes."""

    def __init__(
        self, gateway: Gateway, spans: RequestSpans, form: Format[R], *, background: bool = False
    ) -> None:
        super().__init__(gateway, spans, form.operation, form.api, names=form.names, background=background)
        self._format = form
        self._runs: list[Run] = []
        """One for each model that was tried."""
        self._adapter = ""
        """Of the one that is tried now."""

    async def _answer(self, body: bytes, arrived_at: float, span: RequestSpan, send: Send) -> str:
        ignore_unknown = self._settings.ignore_unknown
        request = await self._gateway.aside(lambda: self._format.read(body, ignore_unknown), len(body))
        return await self._serve(request, body, arrived_at, span, send)

    async def _serve(self, request: R, body: bytes, arrived_at: float, span: RequestSpan, send: Send) -> str:
        """Have a request answered that is understood, by the model that it goes to, or by one that steps in."""
        fleet = self._gateway.fleet
        way = await self._gateway.desk.way(Asked(request.model, self._headers, body), self._caller)
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
                    served, self._adapter = fleet.at(way, model), adapter_of(model)
                    fleet.metrics.count_routed(ROUTED, way.terms.route, served.target(self._adapter))
                    times = (arrived_at, begun_at)
                    return await self._serve_by_turn(served, way, request, len(body), times, span, send)
                except (ApiError, TextError) as error:
                    first = first or error
                    tried.append(model or "")
                    failure = failure_of(error) if self._stream is None else None
                    model = way.instead(failure, tried, fleet.targets) if failure is not None else None
                    if model is None or failure is None:
                        raise first from None
                    fleet.metrics.count_routed(STEPPED_IN, way.terms.route, model, failure)
                    span.event(signals.EVENT_FALLBACK, time.monotonic(), {signals.QUIRE_MODEL: model})
        finally:
            first = None  # it has this frame, which has it: garbage for a long time
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
        turn = await self._gateway.desk.turn(served)
        if turn is not served and turn.has_adapter(self._adapter):
            try:
                return await self._serve_by(turn, way, request, size, times, span, send)
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
        self._serves(served, request.model, span, self._adapter)
        if way.terms.route:
            span.set({signals.QUIRE_ROUTE: way.terms.route})
        terms = way.terms.patient() if self._background else way.terms
        sequences, owner = self._format.sequences(request), self._caller.owner
        async with self._gateway.desk.admitted(served, sequences, owner, background=self._background):
            job = self._own(await self._format.job(request, served, size, arrived_at, span, self._caller))
            job.terms, job.begun_at, job.adapter = terms, begun_at, self._adapter
            await self._ticket.reserve(most(job.prompt_tokens, job.most_tokens, served.route.prices))
            run = Run(self._gateway.fleet, self._gateway.desk, job, self._received_at)
            self._runs.append(run)
            metrics = self._gateway.fleet.metrics.model(job.target)
            metrics.in_flight.inc()
            self._refused = False
            end: Literal["whole", "failed", "left"] = "left"
            reasons: list[str] | None = None
            try:
                if job.stream:
                    reasons = await self._send_stream(request, run, send)
                else:
                    reasons = await self._send_whole(request, run, send)
                end = "whole"
            except (ApiError, TextError) as error:
                if self._stream is not None or _is_of_revision(error):
                    end = "failed"
                raise
            finally:
                if self._gateway.fleet.canaries.compares(served) and not self._background:
                    self._gateway.desk.compare(served, run.fared(end))
                metrics.in_flight.dec()
                self._ticket.used += run.prompt_tokens + run.completion_tokens
                self._tell(run)
                if span.is_recorded:
                    span.set(_attributes(run, self._account, reasons))
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
            who = Who(self._caller.owner, self._caller.key, run.job.target)
            self._gateway.usage.add(who, used.priced(route.prices))

    def _own(self, job: Job) -> Job:
        """The job made its caller's: with his rank where there are ranks, and in a cache that is his alone.

        Raises `InvalidRequest` for one that would go before others of his policy's rank.
        """
        if self._caller.tenant is not None and job.priority < 0:
            raise InvalidRequest(
                "'priority' is below 0: a request may go behind others of its policy's rank, not before them.",
                param="priority",
            )
        if job.model.route.policy == "priority":
            job.priority = self._caller.rank(job.priority)
        job.caller, job.background = self._caller, self._background
        job.cache_salt = self._caller.salted(job.cache_salt)
        return job

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
        large = run.job.is_large or run.job.shown.logprobs is not None
        async with contextlib.aclosing(run.updates()) as batches, _Pings(send, form.ping) as pings:
            async for batch in batches:
                if self._stream is None:
                    headers = [*_STREAM_HEADERS, *_served_by(run)]
                    await send({"type": "http.response.start", "status": 200, "headers": headers})
                    self._stream = form
                    pings.begin()
                if large:
                    made = await run.job.written(functools.partial(form.events, batch, usage), batch)
                else:
                    made = form.events(batch, usage)
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
            self._task = None  # it has its end, that has its frame, and that has this: garbage for a long time


def _served_by(run: Run) -> list[tuple[bytes, bytes]]:
    """Which Model the answer is from, with its adapter: the body repeats the name that was asked for."""
    return [(b"x-quire-model", run.job.target.encode())]


def _is_of_revision(error: ApiError | TextError) -> bool:
    """Whether a request might fare better at another revision of the model: it, not the request, is at
    fault, or it has left."""
    lasting = (RequestQuarantined, OutOfTime)
    return isinstance(error, _OF_REVISION) and not isinstance(error, lasting)


_OF_REVISION: Final = (
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


def _attributes(run: Run, account: Account, reasons: list[str] | None) -> dict[str, Any]:
    """What was asked for, as it was carried out, and what came of it. Stop strings are left out: they are text."""
    job, sampling = run.job, run.job.sampling
    if job.pooling is not None:
        embeds = job.operation == "embeddings"
        asked: dict[str, Any] = {
            signals.GEN_AI_REQUEST_ENCODINGS: ["base64" if job.as_base64 else "float"] if embeds else None,
            signals.GEN_AI_EMBEDDINGS_DIMENSIONS: job.pooling.dimensions,
        }
    else:
        structured = sampling.structured
        asked = {
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
        }
    return {
        **asked,
        signals.GEN_AI_RESPONSE_ID: job.id,
        signals.GEN_AI_RESPONSE_FINISH_REASONS: reasons,
        signals.GEN_AI_USAGE_INPUT_TOKENS: job.prompt_tokens,
        signals.GEN_AI_USAGE_OUTPUT_TOKENS: account.completion_tokens,
        signals.GEN_AI_USAGE_CACHE_READ: account.cached_tokens,
        signals.GEN_AI_USAGE_REASONING: run.reasoning_tokens or None,
        signals.GEN_AI_TIME_TO_FIRST_TOKEN: account.first_token,
        signals.GEN_AI_RESPONSE_TIME_TO_FIRST_CHUNK: account.first_token if job.stream else None,
    }


__all__ = ["Exchange", "usage_of"]
