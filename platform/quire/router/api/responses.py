"""`/v1/responses`: OpenAI's Responses API over the same road as chat.

A response's output is a list of items: the thought, what is said, the calls. A stream tells of each item when it
begins, what it gains and when it is done, and of the response itself at the beginning and at the end; its events
are numbered. A response that is kept is on the disk before the client hears that it is complete, so that the next
request can go on from it at once. A stream that breaks off ends with one `response.failed`,
which is kept as well and is an end like any other.

With `background` the answer comes at once, and the work is done by `quire.router.background`.
"""

from __future__ import annotations

import dataclasses
import logging
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final

import msgspec
from litestar import Request, delete, get, post
from litestar.handlers import HTTPRouteHandler
from litestar.types import ASGIApp, Send

from quire.errors import Api, ApiError, HttpError, InvalidRequest
from quire.router import conversation
from quire.router.access import Caller
from quire.router.api.events import COMMENT
from quire.router.api.logprobs import Writer
from quire.router.api.query import descends, whole
from quire.router.api.reply import Reply, named, owner_of
from quire.router.background import Later
from quire.router.exchange import Exchange
from quire.router.fleet import ServedModel
from quire.router.gateway import Gateway
from quire.router.job import Job, Update
from quire.router.reception import Reception, send_json
from quire.router.responses import Responses
from quire.router.spans import RequestSpan, RequestSpans
from quire.router.traffic import Asked
from quire.text.dialects.parts import CallArguments, CallBegins, Content, Part, Reasoning, joined
from quire_schemas import signals
from quire_schemas.openai.answer import Usage
from quire_schemas.openai.chat import ChatRequest
from quire_schemas.openai.responses import (
    INPUT_ITEMS_LISTED,
    MAX_INPUT_ITEMS_LISTED,
    IncompleteDetails,
    InputDetails,
    InputItems,
    InputTokens,
    Item,
    OutputCall,
    OutputDetails,
    OutputItem,
    OutputMessage,
    OutputReasoning,
    OutputSummary,
    OutputText,
    OutputThought,
    ResponseDeleted,
    ResponseError,
    ResponseObject,
    ResponsesRequest,
    ResponseUsage,
    read_response,
)

log = logging.getLogger("quire.router")
_json = msgspec.json.Encoder()
_PREFIXES: Final = {OutputMessage: "msg_", OutputReasoning: "rs_", OutputCall: "fc_"}


_NAMES: Final[Mapping[str, str]] = MappingProxyType(
    {
        "response_format.json_schema.schema": "text.format.schema",
        "response_format": "text.format",
        "max_completion_tokens": "max_output_tokens",
        "max_tokens": "max_output_tokens",
        "reasoning_effort": "reasoning.effort",
        "messages": "input",
    }
)
"""By the chat request's, the names that this API has."""


class ResponsesFormat:
    """The responses endpoint's `Format`. `response_id` is that of the response it makes; None: a new one."""

    operation = "responses"
    api = Api.OPENAI
    names = _NAMES

    def __init__(self, gateway: Gateway, responses: Responses, response_id: str | None = None) -> None:
        self._gateway = gateway
        self._responses = responses
        self._id = response_id

    def read(self, body: bytes, ignore_unknown: bool) -> ResponsesRequest:
        return read_response(body, ignore_unknown)

    def sequences(self, request: ResponsesRequest) -> int:
        return 1

    async def job(
        self,
        request: ResponsesRequest,
        served: ServedModel,
        size: int,
        arrived_at: float,
        span: RequestSpan,
        caller: Caller,
    ) -> Job:
        if request.stored:
            self._responses.store.check_room()
        chat, size, first = await stands_for(self._gateway, self._responses, request, size, caller)
        job = await self._gateway.chat(chat, served, size, arrived_at, span)
        response_id = self._id or self._responses.new_id()
        span.set({signals.GEN_AI_CONVERSATION_ID: first or response_id})
        return dataclasses.replace(job, id=response_id)

    async def whole(self, job: Job, request: ResponsesRequest, updates: Sequence[Update], usage: Usage) -> bytes:
        def made() -> ResponseObject:
            output = Output(job, request, self._responses.store.clock)
            for update in updates:
                list(output.take(update))
            list(output.close())
            return output.ended(usage)

        return await kept(self._responses, request, await job.written(made, updates), job.caller)

    def stream(self, job: Job, request: ResponsesRequest) -> ResponsesStream:
        return ResponsesStream(self._responses, job, request)


async def stands_for(
    gateway: Gateway, responses: Responses, request: ResponsesRequest, size: int, caller: Caller
) -> tuple[ChatRequest, int, str | None]:
    """The chat request of a conversation and all that is kept of it for the caller, the bytes that both take, and
    the first response of it, if there is one before. Raises `BadRequest`, `InvalidRequest` and `NotFound`.
    """
    most = gateway.fleet.table.http.max_body_bytes
    context = await responses.context(request.previous_response_id, request.input, most, caller.owner)
    size += context.size
    chat = await gateway.aside(lambda: request.chat([*context.before, *context.own]), size)
    return chat, size, context.first


async def kept(responses: Responses, request: ResponsesRequest, response: ResponseObject, caller: Caller) -> bytes:
    """The response as JSON, which is on the disk if it is to be."""
    if not response.store:
        return _json.encode(response)
    given = await responses.resolved(request.input, caller.owner)
    return await responses.keep(response, given, caller.owner, caller.key)


class Output:
    """A response as it grows. `take` and `close` give what there is to be told of it, as names and fields."""

    def __init__(self, job: Job, request: ResponsesRequest, clock: Callable[[], float]) -> None:
        self.response = ResponseObject.begun(job.id, job.created, request)
        self.response.status = "in_progress"
        self._job = job
        self._clock = clock
        self._summary = request.wants_summary
        self._writer = Writer(job)
        self._open: OutputItem | None = None
        self._text: list[str] = []
        """What has come of the text of the item that is open: it is put together once."""
        self._finish = "stop"
        self._scores: list[Any] = []
        """Of tokens whose text has not come yet."""

    def take(self, update: Update) -> Iterator[tuple[str, dict[str, Any]]]:
        """Add what one update brings."""
        self._scores += self._writer.tokens(update.scores)
        parts = joined(update.parts)
        for part in parts:
            if isinstance(part, Content):
                yield from self._said(part.text, self._scores)
            else:
                yield from self._other(part)
        if parts:  # of a thought or a call they are told nowhere; where nothing came, its text is held back
            self._scores = []
        if update.finish_reason is not None:
            self._finish = update.finish_reason

    def close(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """There will be no more."""
        said = any(isinstance(item, OutputMessage | OutputCall) for item in self.response.output)
        if not said and (self._finish != "length" or self._open is None):
            yield from self._begin_message(_message())
        yield from self._done("incomplete" if self._finish == "length" else "completed")

    def ended(self, usage: Usage) -> ResponseObject:
        """The response once it is complete, or cut off by its limit."""
        response = self.response
        response.status = "completed"
        if self._finish == "length":
            response.status, response.incomplete_details = "incomplete", IncompleteDetails("max_output_tokens")
        details, cached = usage.completion_tokens_details, usage.prompt_tokens_details
        response.completed_at = max(int(self._clock()), response.created_at)
        response.usage = ResponseUsage(
            input_tokens=usage.prompt_tokens,
            input_tokens_details=InputDetails(cached.cached_tokens if cached is not None else 0),
            output_tokens=usage.completion_tokens,
            output_tokens_details=OutputDetails(details.reasoning_tokens if details is not None else 0),
            total_tokens=usage.total_tokens,
        )
        return response

    @property
    def _at(self) -> int:
        return len(self.response.output) - 1

    def _where(self, item: OutputItem) -> dict[str, Any]:
        return {"item_id": item.id, "output_index": self._at}

    def _item(self, item: OutputItem) -> Iterator[tuple[str, dict[str, Any]]]:
        """Begin an item, after the one before is done."""
        yield from self._done("completed")
        self.response.output.append(item)
        self._open = item
        yield "response.output_item.added", {"output_index": self._at, "item": item}

    def _said(self, text: str, scores: list[Any]) -> Iterator[tuple[str, dict[str, Any]]]:
        item = self._open
        if not isinstance(item, OutputMessage):
            item = _message()
            yield from self._begin_message(item)
        words = item.content[0]
        self._text.append(text)
        words.logprobs += scores
        self._scores = []
        fields = {**self._where(item), "content_index": 0}
        yield "response.output_text.delta", {**fields, "delta": text, "logprobs": scores}

    def _begin_message(self, item: OutputMessage) -> Iterator[tuple[str, dict[str, Any]]]:
        yield from self._item(item)
        item.content.append(OutputText(text="", annotations=[], logprobs=[]))
        fields = {**self._where(item), "content_index": 0}
        yield "response.content_part.added", {**fields, "part": item.content[0]}

    def _other(self, part: Part) -> Iterator[tuple[str, dict[str, Any]]]:
        match part:
            case Reasoning(text=text) if self._job.shown.reasoning:
                yield from self._thought(text)
            case CallBegins(name=name):
                call_id = self._job.new_call_id()
                call = OutputCall(
                    id=_new(OutputCall), call_id=call_id, name=name, arguments="", status="in_progress"
                )
                yield from self._item(call)
            case CallArguments(text=text) if isinstance(self._open, OutputCall):
                self._text.append(text)
                yield "response.function_call_arguments.delta", {**self._where(self._open), "delta": text}

    def _thought(self, text: str) -> Iterator[tuple[str, dict[str, Any]]]:
        item = self._open
        if not isinstance(item, OutputReasoning):
            item = OutputReasoning(id=_new(OutputReasoning), status="in_progress", summary=[], content=[])
            yield from self._item(item)
            yield from self._begin_thought(item)
        self._text.append(text)
        if self._summary:
            fields = {**self._where(item), "summary_index": 0}
            yield "response.reasoning_summary_text.delta", {**fields, "delta": text}
        else:
            fields = {**self._where(item), "content_index": 0}
            yield "response.reasoning_text.delta", {**fields, "delta": text}

    def _begin_thought(self, item: OutputReasoning) -> Iterator[tuple[str, dict[str, Any]]]:
        if self._summary:
            item.summary.append(OutputSummary(""))
            fields = {**self._where(item), "summary_index": 0}
            yield "response.reasoning_summary_part.added", {**fields, "part": item.summary[0]}
        else:
            item.content.append(OutputThought(""))
            fields = {**self._where(item), "content_index": 0}
            yield "response.content_part.added", {**fields, "part": item.content[0]}

    def _done(self, status: str) -> Iterator[tuple[str, dict[str, Any]]]:
        """The item that is open gains nothing more."""
        item, self._open = self._open, None
        if item is None:
            return
        self._put_together(item)
        item.status = "incomplete" if status == "incomplete" else "completed"
        where = self._where(item)
        match item:
            case OutputMessage(content=[words]):
                fields = {**where, "content_index": 0}
                yield "response.output_text.done", {**fields, "text": words.text, "logprobs": words.logprobs}
                yield "response.content_part.done", {**fields, "part": words}
            case OutputReasoning(summary=[thought]):
                fields = {**where, "summary_index": 0}
                yield "response.reasoning_summary_text.done", {**fields, "text": thought.text}
                yield "response.reasoning_summary_part.done", {**fields, "part": thought}
            case OutputReasoning(content=[thought]):
                fields = {**where, "content_index": 0}
                yield "response.reasoning_text.done", {**fields, "text": thought.text}
                yield "response.content_part.done", {**fields, "part": thought}
            case OutputCall(name=name, arguments=arguments):
                told = {"name": name, "arguments": arguments}
                yield "response.function_call_arguments.done", {**where, **told}
        yield "response.output_item.done", {"output_index": self._at, "item": item}

    def broken(self) -> None:
        """There will be no more, and what there is has no end."""
        item, self._open = self._open, None
        if item is not None:
            self._put_together(item)
            item.status = "incomplete"

    def _put_together(self, item: OutputItem) -> None:
        text, self._text = "".join(self._text), []
        match item:
            case OutputMessage(content=[part]) | OutputReasoning(summary=[part]) | OutputReasoning(content=[part]):
                part.text = text
            case OutputCall():
                item.arguments = text


def _message() -> OutputMessage:
    return OutputMessage(id=_new(OutputMessage), status="in_progress", content=[])


def _new(kind: type[OutputItem]) -> str:
    return _PREFIXES[kind] + uuid.uuid4().hex


class _Ended(msgspec.Struct):
    status: str


class ResponsesStream:
    """Writes one stream's events."""

    ping = COMMENT
    cut = False

    def __init__(self, responses: Responses, job: Job, request: ResponsesRequest) -> None:
        self._responses = responses
        self._request = request
        self._caller = job.caller
        self._output = Output(job, request, responses.store.clock)
        self._number = 0

    def events(self, updates: Sequence[Update], usage: Callable[[], Usage]) -> bytes:
        made: list[bytes] = []
        if not self._number:
            for kind in ("response.created", "response.in_progress"):
                made.append(self._event(kind, {"response": self._output.response}))
        for update in updates:
            made += [self._event(kind, fields) for kind, fields in self._output.take(update)]
        return b"".join(made)

    async def end(self, usage: Usage) -> bytes:
        last = list(self._output.close())
        response = self._output.ended(usage)
        # before anything has its number
        stored = await kept(self._responses, self._request, response, self._caller)
        last.append((f"response.{response.status}", {"response": msgspec.Raw(stored)}))
        return b"".join(self._event(kind, fields) for kind, fields in last)

    async def broken(self, error: HttpError) -> bytes:
        """Keeps the response as far as it got and tells of it; without its output where that cannot be written,
        which may be what broke the stream.
        """
        self._output.broken()
        failed = msgspec.structs.replace(
            self._output.response,
            status="failed",
            error=ResponseError(error.code or "server_error", error.message),
            usage=None,
            completed_at=None,
            incomplete_details=None,
        )
        try:
            stored = _json.encode(failed)
        except ValueError:
            failed.output = []
            stored = _json.encode(failed)
        try:
            stored = await kept(self._responses, self._request, failed, self._caller)
        except ApiError as error_of_store:
            log.warning("response %s failed, and is not kept: %s", failed.id, error_of_store)
        ended = msgspec.json.decode(stored, type=_Ended).status  # not so, if it had ended and was not told yet
        return self._event(f"response.{ended}", {"response": msgspec.Raw(stored)})

    def _event(self, kind: str, fields: dict[str, Any]) -> bytes:
        told = _json.encode({"type": kind, "sequence_number": self._number, **fields})
        self._number += 1
        return b"event: " + kind.encode() + b"\ndata: " + told + b"\n\n"


class Responding(Exchange[ResponsesRequest]):
    """Answers one request of `POST /v1/responses`: at once, where it asks for that."""

    def __init__(self, gateway: Gateway, spans: RequestSpans, responses: Responses, background: Later) -> None:
        super().__init__(gateway, spans, ResponsesFormat(gateway, responses))
        self._responses = responses
        self._later = background

    async def _serve(
        self, request: ResponsesRequest, body: bytes, arrived_at: float, span: RequestSpan, send: Send
    ) -> str:
        if not request.background:
            return await super()._serve(request, body, arrived_at, span, send)
        asked = Asked(request.model, (), body)  # its headers are not kept
        served = self._gateway.fleet.resolve(asked, self._caller)
        self._serves(served, request.model, span)
        await self._later.check_room()
        self._responses.store.check_room()
        caller = self._caller
        # what is wrong with it is said now
        await stands_for(self._gateway, self._responses, request, len(body), caller)
        own = await self._responses.resolved(request.input, caller.owner)
        response_id = self._responses.new_id()
        response = ResponseObject.begun(response_id, int(self._responses.store.clock()), request)
        await self._responses.begin(response, body, own, caller.owner, caller.key)
        self._ticket.uncount()  # what is done for it later counts
        self._later.begin(response_id, len(body))
        await send_json(send, _json.encode(response))
        return "stop"


class InputCounting(Reception):
    """Answers one request of `POST /v1/responses/input_tokens`, for which no replica has to be there."""

    def __init__(self, gateway: Gateway, spans: RequestSpans, responses: Responses) -> None:
        super().__init__(gateway, spans, "count_tokens", names=_NAMES)
        self._responses = responses

    async def _answer(self, body: bytes, arrived_at: float, span: RequestSpan, send: Send) -> str:
        ignore_unknown = self._settings.ignore_unknown
        request = await self._gateway.aside(lambda: read_response(body, ignore_unknown), len(body))
        served = self._resolve(request.model, body)
        self._serves(served, request.model, span)
        chat, size, _ = await stands_for(self._gateway, self._responses, request, len(body), self._caller)

        def counted() -> bytes:
            text, _ = conversation.prompt_text(chat, served.usable)
            return _json.encode(
                InputTokens(input_tokens=len(served.usable.encode(text, add_special_tokens=False)))
            )

        await send_json(send, await self._gateway.aside(counted, size))
        return "stop"


# ── what is kept ──────────────────────────────────────────────────────────────────────────────────────────


async def deleted(responses: Responses, owner: str, response_id: str) -> bytes:
    """Answer to `DELETE /v1/responses/{id}`. Raises `NotFound` and `Conflict`."""
    await responses.delete(response_id, owner)
    return _json.encode(ResponseDeleted(id=response_id))


async def input_items(responses: Responses, owner: str, response_id: str, query: dict[str, str]) -> bytes:
    """Answer to `GET /v1/responses/{id}/input_items`. Raises `NotFound` and `InvalidRequest`."""
    limit = whole(query, "limit", INPUT_ITEMS_LISTED, MAX_INPUT_ITEMS_LISTED)
    items: list[dict[str, Any]] = []
    taken: set[str] = set()
    for at, item in enumerate(await responses.input_of(response_id, owner)):
        items.append(_listed(response_id, at, item, taken))
        taken.add(items[-1]["id"])
    if descends(query):
        items.reverse()
    after = query.get("after")
    names = [item["id"] for item in items]
    if after is not None and after not in names:
        raise InvalidRequest("'after' is none of the items.", param="after")
    first = names.index(after) + 1 if after is not None else 0
    page = items[first : first + limit]
    return _json.encode(
        InputItems(
            data=page,
            first_id=page[0]["id"] if page else None,
            last_id=page[-1]["id"] if page else None,
            has_more=first + limit < len(items),
        )
    )


def _listed(response_id: str, at: int, item: Item, taken: Collection[str]) -> dict[str, Any]:
    """An item as the API lists it: a message's words as parts, and an id, of its place if its own is `taken`."""
    told = item.model_dump(exclude_none=True)
    if isinstance(told.get("content"), str):
        kind = "output_text" if told.get("role") == "assistant" else "input_text"
        told["content"] = [{"type": kind, "text": told["content"]}]
    if told.get("id") is None or told["id"] in taken:
        told["id"] = f"item_{response_id.removeprefix('resp_')}_{at}"
    return {"status": "completed", **told}


def routes(
    gateway: Gateway, spans: RequestSpans, responses: Responses, background: Later
) -> list[HTTPRouteHandler]:
    """What `/v1/responses` answers."""

    @post("/v1/responses", operation="responses")
    async def respond() -> ASGIApp:
        return Responding(gateway, spans, responses, background)

    @post("/v1/responses/input_tokens", operation="responses")
    async def count_input() -> ASGIApp:
        return InputCounting(gateway, spans, responses)

    @get("/v1/responses/{response_id:str}", operation="responses")
    async def get_response(request: Request[Any, Any, Any]) -> ASGIApp:
        return Reply(200, await responses.get(named(request, "response_id"), owner_of(request)))

    @delete("/v1/responses/{response_id:str}", status_code=200, operation="responses")
    async def delete_response(request: Request[Any, Any, Any]) -> ASGIApp:
        return Reply(200, await deleted(responses, owner_of(request), named(request, "response_id")))

    @post("/v1/responses/{response_id:str}/cancel", operation="responses")
    async def cancel_response(request: Request[Any, Any, Any]) -> ASGIApp:
        return Reply(200, await background.cancel(named(request, "response_id"), owner_of(request)))

    @get("/v1/responses/{response_id:str}/input_items", operation="responses")
    async def list_input(request: Request[Any, Any, Any]) -> ASGIApp:
        name, query = named(request, "response_id"), dict(request.query_params)
        return Reply(200, await input_items(responses, owner_of(request), name, query))

    return [respond, count_input, get_response, delete_response, cancel_response, list_input]
