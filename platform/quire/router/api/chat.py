"""`POST /v1/chat/completions`: how a conversation is read, and how its answer is written.

An answer has the shape of `quire_schemas.openai.chat.ChatCompletion`, and is written without it. A stream has, per
choice, an event with the role alone, events with content, reasoning or a call each, and one with the finish reason
alone, in the shape of `ChatChunk`. Tests hold both to that. Of a call the first event has the id and the name; the
others what its arguments gain.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import msgspec

from quire.errors import Api
from quire.router.access import Caller
from quire.router.api.events import COMMENT, Envelope, closed, ending
from quire.router.api.logprobs import Writer
from quire.router.api.said import Said
from quire.router.api.timing import Timing
from quire.router.fleet import ServedModel
from quire.router.formats import NO_NAMES
from quire.router.gateway import Gateway
from quire.router.job import Job, Update
from quire.router.spans import RequestSpan
from quire.text.dialects.parts import CallArguments, CallBegins, Content, Part, Reasoning, joined
from quire_schemas.openai.answer import Usage
from quire_schemas.openai.chat import ChatRequest, read_chat

_json = msgspec.json.Encoder()


class ChatFormat:
    """The chat endpoint's `Format`."""

    operation = "chat"
    api = Api.OPENAI
    names = NO_NAMES

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway

    def read(self, body: bytes, ignore_unknown: bool) -> ChatRequest:
        return read_chat(body, ignore_unknown)

    def sequences(self, request: ChatRequest) -> int:
        return request.n or 1

    async def job(
        self,
        request: ChatRequest,
        served: ServedModel,
        size: int,
        arrived_at: float,
        span: RequestSpan,
        caller: Caller,
    ) -> Job:
        return await self._gateway.chat(request, served, size, arrived_at, span)

    async def whole(self, job: Job, request: ChatRequest, updates: Sequence[Update], usage: Usage) -> bytes:
        return await job.written(lambda: self._whole(job, updates, usage), updates)

    def _whole(self, job: Job, updates: Sequence[Update], usage: Usage) -> bytes:
        writer = Writer(job)
        by_choice = [[update for update in updates if update.index == index] for index in range(job.n)]
        answer: dict[str, Any] = {
            "id": job.id,
            "object": "chat.completion",
            "created": job.created,
            "model": job.asked_model,
            "system_fingerprint": job.fingerprint,
            "choices": [_choice(job, index, mine, writer) for index, mine in enumerate(by_choice)],
            "usage": usage.model_dump(),
        }
        of_prompt = writer.prompt([entry for update in updates for entry in update.prompt_scores])
        if of_prompt is not None:
            answer["prompt_logprobs"] = msgspec.Raw(of_prompt)
        if job.shown.token_ids:
            answer["prompt_token_ids"] = job.prompts[0]
        if job.shown.prompt_text:
            answer["prompt_text"] = _prompt_text(job)
        if (metrics := Timing(job).whole(updates)) is not None:
            answer["metrics"] = metrics.model_dump()
        return _json.encode(answer)

    def stream(self, job: Job, request: ChatRequest) -> ChatStream:
        return ChatStream(job, request)


def _choice(job: Job, index: int, mine: Sequence[Update], writer: Writer) -> dict[str, Any]:
    """A `ChatChoice`."""
    said = Said.of(part for update in mine for part in update.parts)
    message: dict[str, Any] = {
        "role": "assistant",
        "content": said.content if said.content or not said.calls else None,
        "refusal": None,
    }
    if said.calls:
        message["tool_calls"] = [
            {
                "id": job.new_call_id(),
                "type": "function",
                "function": {"name": call.name, "arguments": call.arguments},
            }
            for call in said.calls
        ]
    if said.reasoning and job.shown.reasoning:
        message["reasoning"] = message["reasoning_content"] = said.reasoning
    choice = {
        "index": index,
        "message": message,
        "logprobs": msgspec.Raw(writer.chat([score for update in mine for score in update.scores])),
        "finish_reason": mine[-1].finish_reason,
        "stop_reason": mine[-1].stop_reason,
    }
    if job.shown.token_ids:
        choice["token_ids"] = [token for update in mine for token in update.token_ids]
    return choice


def _prompt_text(job: Job) -> str:
    """What the model read, special tokens written out."""
    return job.tokenizer.decode(job.prompts[0], skip_special_tokens=False)


class ChatStream:
    """Writes one chat stream's events."""

    ping = COMMENT
    cut = True

    def __init__(self, job: Job, request: ChatRequest) -> None:
        self._job = job
        self._envelope = Envelope(job, "chat.completion.chunk", request.stream_options)
        self.end = self._envelope.end
        self.broken = self._envelope.broken
        self._writer = Writer(job)
        self._first = True
        self._timing = Timing(job)
        shown = job.shown
        self._is_plain = shown.logprobs is None and not (shown.token_ids or self._envelope.wants_running_usage)
        """Nothing stands beside a piece of content that is another each time."""
        self._ends: dict[int, tuple[bytes, bytes]] = {}
        """What stands around it, by choice, once there was an event of that."""

    def events(self, updates: Sequence[Update], usage: Callable[[], Usage]) -> bytes:
        return b"".join([self._plain(update) or self._any(update, usage) for update in updates])

    def _plain(self, update: Update) -> bytes:
        """The event of an update that is a piece of content alone, as nearly all are; empty for another."""
        if not self._is_plain or update.finish_reason is not None or len(update.parts) != 1:
            return b""
        ends, [part] = self._ends.get(update.index), update.parts
        return ends[0] + _json.encode(part.text) + ends[1] if ends is not None and type(part) is Content else b""

    def _any(self, update: Update, usage: Callable[[], Usage]) -> bytes:
        made = b"".join(
            self._envelope.event(choice, usage, self._once() + last)
            for choice, last in closed(self._choices(update), self._timing.take(update))
        )
        if self._is_plain and update.index not in self._ends and not self._first:
            before, _, behind = self._envelope.event(_chunk(update.index, _content("")), usage).rpartition(b'""')
            self._ends[update.index] = before, behind
        return made

    def _once(self) -> bytes:
        """What the first event alone has."""
        first, self._first = self._first, False
        shown, fields = self._job.shown, b""
        if first and shown.token_ids:
            fields += b',"prompt_token_ids":' + _json.encode(self._job.prompts[0])
        if first and shown.prompt_text:
            fields += b',"prompt_text":' + _json.encode(_prompt_text(self._job))
        return fields

    def _choices(self, update: Update) -> Iterator[bytes]:
        if self._envelope.opens(update.index):
            yield _chunk(update.index, b'{"role":"assistant","content":""}')
        deltas = [self._delta(part) for part in joined(update.parts)]
        shown = [delta for delta in deltas if delta is not None]
        ids = update.token_ids if self._job.shown.token_ids else ()
        if not shown and (update.scores or ids):
            shown = [_content("")]  # what belongs to tokens goes out with them, though they have no text yet
        scores = self._writer.chat(update.scores)
        for place, delta in enumerate(shown):
            yield _chunk(update.index, delta, scores, ids=ids) if place == 0 else _chunk(update.index, delta)
        if update.finish_reason is not None:
            yield _chunk(update.index, b"{}", finish=ending(update))

    def _delta(self, part: Part) -> bytes | None:
        match part:
            case Content(text=text):
                return _content(text)
            case Reasoning(text=text):
                thought = _json.encode(text)
                both = b'{"reasoning":' + thought + b',"reasoning_content":' + thought + b"}"
                return both if self._job.shown.reasoning else None
            case CallBegins(index=index, name=name):
                told = {"index": index, "id": self._job.new_call_id(), "type": "function"}
                begun = {**told, "function": {"name": name, "arguments": ""}}
                return b'{"tool_calls":[' + _json.encode(begun) + b"]}"
            case CallArguments(index=index, text=text):
                more = {"index": index, "function": {"arguments": text}}
                return b'{"tool_calls":[' + _json.encode(more) + b"]}"


def _content(text: str) -> bytes:
    return b'{"content":' + _json.encode(text) + b"}"


def _chunk(
    index: int, delta: bytes, scores: bytes = b"null", finish: bytes = b"null", ids: Sequence[int] = ()
) -> bytes:
    more = b',"token_ids":' + _json.encode(ids) if ids else b""
    return b'{"index":%d,"delta":%b,"logprobs":%b,"finish_reason":%b%b}' % (index, delta, scores, finish, more)
