"""`POST /v1/chat/completions`: how a conversation is read, and how its answer is written.

A stream's events per choice: one with the role alone, events with content, reasoning or a call each, one with the
finish reason alone. `quire_schemas.openai.chat.ChatChunk` is their shape, and a test holds them to it. Of a call
the first event has the id and the name, the others what its arguments gain.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import cast

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
from quire_schemas.openai.chat import (
    ChatChoice,
    ChatCompletion,
    ChatFinishReason,
    ChatRequest,
    ChoiceMessage,
    read_chat,
)
from quire_schemas.openai.tools import AnsweredCall, CalledFunction

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
        return await job.written(lambda: self._whole(job, updates, usage))

    def _whole(self, job: Job, updates: Sequence[Update], usage: Usage) -> bytes:
        writer = Writer(job)
        by_choice = [[update for update in updates if update.index == index] for index in range(job.n)]
        answer = ChatCompletion(
            id=job.id,
            object="chat.completion",
            created=job.created,
            model=job.asked_model,
            system_fingerprint=job.fingerprint,
            choices=[_choice(job, index, mine) for index, mine in enumerate(by_choice)],
            usage=usage,
            prompt_token_ids=job.prompts[0] if job.shown.token_ids else None,
            prompt_text=_prompt_text(job) if job.shown.prompt_text else None,
            metrics=Timing(job).whole(updates),
        ).model_dump()
        for choice, mine in zip(answer["choices"], by_choice, strict=True):
            choice["logprobs"] = msgspec.Raw(writer.chat([score for update in mine for score in update.scores]))
        of_prompt = writer.prompt([entry for update in updates for entry in update.prompt_scores])
        if of_prompt is not None:
            answer["prompt_logprobs"] = msgspec.Raw(of_prompt)
        return _json.encode(answer)

    def stream(self, job: Job, request: ChatRequest) -> ChatStream:
        return ChatStream(job, request)


def _choice(job: Job, index: int, mine: Sequence[Update]) -> ChatChoice:
    """A choice but for its log-probabilities."""
    said = Said.of(part for update in mine for part in update.parts)
    thought = said.reasoning or None if job.shown.reasoning else None
    calls = [
        AnsweredCall(id=job.new_call_id(), function=CalledFunction(name=call.name, arguments=call.arguments))
        for call in said.calls
    ]
    return ChatChoice(
        index=index,
        message=ChoiceMessage(
            role="assistant",
            content=said.content if said.content or not calls else None,
            tool_calls=calls or None,
            reasoning=thought,
            reasoning_content=thought,
        ),
        logprobs=None,
        finish_reason=cast(ChatFinishReason, mine[-1].finish_reason),
        stop_reason=mine[-1].stop_reason,
        token_ids=[token for update in mine for token in update.token_ids] if job.shown.token_ids else None,
    )


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

    def events(self, updates: Sequence[Update], usage: Callable[[], Usage]) -> bytes:
        return b"".join(
            self._envelope.event(choice, usage, self._once() + last)
            for update in updates
            for choice, last in closed(self._choices(update), self._timing.take(update))
        )

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
            shown = [b'{"content":""}']  # what belongs to tokens goes out with them, though they have no text yet
        scores = self._writer.chat(update.scores)
        for place, delta in enumerate(shown):
            yield _chunk(update.index, delta, scores, ids=ids) if place == 0 else _chunk(update.index, delta)
        if update.finish_reason is not None:
            yield _chunk(update.index, b"{}", finish=ending(update))

    def _delta(self, part: Part) -> bytes | None:
        match part:
            case Content(text=text):
                return b'{"content":' + _json.encode(text) + b"}"
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


def _chunk(
    index: int, delta: bytes, scores: bytes = b"null", finish: bytes = b"null", ids: Sequence[int] = ()
) -> bytes:
    more = b',"token_ids":' + _json.encode(ids) if ids else b""
    return b'{"index":%d,"delta":%b,"logprobs":%b,"finish_reason":%b%b}' % (index, delta, scores, finish, more)
