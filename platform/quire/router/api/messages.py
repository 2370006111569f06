"""`POST /v1/messages`: Anthropic's Messages API over the same road as chat.

A stream's events: `message_start`, then each block of content with its start, its deltas and its stop, then
`message_delta` with what ended the answer and the whole usage, and `message_stop`; a `ping` where nothing else
came for a while. A stream that breaks off ends with one `error` event.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

import msgspec
from litestar.types import Send
from pydantic_core import from_json

from quire.errors import Api, HttpError
from quire.router import conversation
from quire.router.access import Caller
from quire.router.api.said import Said
from quire.router.fleet import ServedModel
from quire.router.gateway import Gateway
from quire.router.job import Job, Update
from quire.router.reception import Reception, send_json
from quire.router.spans import RequestSpan, RequestSpans
from quire.text.dialects.parts import CallArguments, CallBegins, Content, Part, Reasoning, joined
from quire_schemas.anthropic import (
    AnswerTextBlock,
    AnswerThinkingBlock,
    AnswerToolUseBlock,
    MessagesAnswer,
    MessagesUsage,
    StopReason,
    TokenCount,
    read_count,
    read_messages,
)
from quire_schemas.openai.answer import Usage
from quire_schemas.openai.chat import ChatRequest

_json = msgspec.json.Encoder()
_STOP_REASONS: Final[dict[str, StopReason]] = {
    "stop": "end_turn",
    "length": "max_tokens",
    "tool_calls": "tool_use",
    "repetition": "end_turn",
}


_STRUCTURE: Final = "output_config.format.schema"
_NAMES: Final[Mapping[str, str]] = MappingProxyType(
    {
        "response_format.json_schema.schema": _STRUCTURE,
        "response_format": _STRUCTURE,
        "stop": "stop_sequences",
        "continue_final_message": "messages",
        "reasoning_effort": "thinking",
        "thinking_token_budget": "thinking.budget_tokens",
        "parallel_tool_calls": "tool_choice.disable_parallel_tool_use",
    }
)
"""By the chat request's, the names that this API has."""


class MessagesFormat:
    """The messages endpoint's `Format`. What it carries on is the chat request that a body stands for."""

    operation = "chat"
    api = Api.ANTHROPIC
    names = _NAMES

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway

    def read(self, body: bytes, ignore_unknown: bool) -> ChatRequest:
        return read_messages(body, ignore_unknown)

    def sequences(self, request: ChatRequest) -> int:
        return 1

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
        said = Said.of(part for update in updates for part in update.parts)
        content: list[AnswerTextBlock | AnswerThinkingBlock | AnswerToolUseBlock] = []
        if said.reasoning and job.shown.reasoning:
            content.append(AnswerThinkingBlock(said.reasoning))
        if said.content:
            content.append(AnswerTextBlock(said.content))
        reason, stop = _ended(updates[-1])
        for number, call in enumerate(said.calls, 1):
            cut = number == len(said.calls) and reason != "tool_use"
            given = _object(call.arguments, cut=cut)
            if given is None:  # there is no other place for what is no object, and nothing may be lost
                content.append(AnswerTextBlock(f"{call.name}({call.arguments})"))
            else:
                content.append(AnswerToolUseBlock(_id(job), call.name, given))
        if reason == "tool_use" and not any(isinstance(block, AnswerToolUseBlock) for block in content):
            reason = "end_turn"
        return _json.encode(
            MessagesAnswer(
                id=_message_id(job),
                model=job.asked_model,
                content=content,
                stop_reason=reason,
                stop_sequence=stop,
                usage=_usage(usage),
            )
        )

    def stream(self, job: Job, request: ChatRequest) -> MessagesStream:
        return MessagesStream(job)


def _message_id(job: Job) -> str:
    return f"msg_{job.id.partition('-')[2]}"


def _id(job: Job) -> str:
    """Of a call: in the form of the model's template where that wants one, else as Anthropic's look."""
    made = job.new_call_id()
    return f"toolu_{made.removeprefix('call_')}" if made.startswith("call_") else made


def _object(arguments: str, *, cut: bool) -> msgspec.Raw | None:
    """The object that they are, to the letter; of one that is cut off as much as there is, as the official clients
    read a stream. None where they are none.
    """
    written = (arguments or "{}").encode()
    try:
        msgspec.json.decode(written, type=dict[str, msgspec.Raw])
        return msgspec.Raw(written)
    except (ValueError, RecursionError):
        if not cut:
            return None
    try:
        found = from_json(written, allow_partial=True)
        return msgspec.Raw(json.dumps(found, allow_nan=False).encode()) if isinstance(found, dict) else None
    except (ValueError, RecursionError):
        return None


def _ended(last: Update) -> tuple[StopReason, str | None]:
    """Why the answer ended, and the stop string if it was one."""
    if isinstance(last.stop_reason, str):
        return "stop_sequence", last.stop_reason
    return _STOP_REASONS[last.finish_reason or "stop"], None


def _usage(usage: Usage) -> MessagesUsage:
    """Anthropic's count leaves those that were cached out of `input_tokens`."""
    cached = usage.prompt_tokens_details.cached_tokens if usage.prompt_tokens_details is not None else 0
    details = usage.completion_tokens_details
    thought = details.reasoning_tokens if details is not None else 0
    fresh = usage.prompt_tokens - cached
    return MessagesUsage(fresh, 0, cached, usage.completion_tokens, {"thinking_tokens": thought})


def _event(kind: str, fields: dict[str, Any]) -> bytes:
    return b"event: " + kind.encode() + b"\ndata: " + _json.encode({"type": kind, **fields}) + b"\n\n"


class TokenCounting(Reception):
    """Answers one request of `POST /v1/messages/count_tokens`, for which no replica has to be there."""

    def __init__(self, gateway: Gateway, spans: RequestSpans) -> None:
        super().__init__(gateway, spans, "count_tokens", Api.ANTHROPIC, names=_NAMES)

    async def _answer(self, body: bytes, arrived_at: float, span: RequestSpan, send: Send) -> str:
        request = await self._gateway.aside(lambda: read_count(body, self._settings.ignore_unknown), len(body))
        served = self._resolve(request.model, body)
        self._serves(served, request.model, span)

        def counted() -> bytes:
            text = conversation.prompt_text(request, served.usable)[0]
            return _json.encode(TokenCount(len(served.usable.encode(text, add_special_tokens=False))))

        await send_json(send, await self._gateway.aside(counted, len(body)))
        return "stop"


@dataclass(slots=True)
class _Open:
    """The block that is being written."""

    index: int
    kind: type[Part]


class MessagesStream:
    """Writes one stream's events."""

    ping = _event("ping", {})
    cut = True

    def __init__(self, job: Job) -> None:
        self._job = job
        self._begun = False
        self._blocks = 0
        self._open: _Open | None = None
        self._ended: tuple[StopReason, str | None] = ("end_turn", None)

    def events(self, updates: Sequence[Update], usage: Callable[[], Usage]) -> bytes:
        made = [] if self._begun else [self._start(usage())]
        self._begun = True
        for update in updates:
            for part in joined(update.parts):
                made += self._part(part)
            if update.finish_reason is not None:
                self._ended = _ended(update)
        return b"".join(made)

    async def end(self, usage: Usage) -> bytes:
        reason, stop = self._ended
        delta = {"stop_reason": reason, "stop_sequence": stop}
        return b"".join(
            [
                *self._close(),
                _event("message_delta", {"delta": delta, "usage": _usage(usage)}),
                _event("message_stop", {}),
            ]
        )

    async def broken(self, error: HttpError) -> bytes:
        return b"event: error\ndata: " + error.body + b"\n\n"

    def _start(self, usage: Usage) -> bytes:
        empty = MessagesAnswer(
            id=_message_id(self._job),
            model=self._job.asked_model,
            content=[],
            stop_reason=None,
            stop_sequence=None,
            usage=_usage(usage),
        )
        return _event("message_start", {"message": empty})

    def _part(self, part: Part) -> Iterator[bytes]:
        match part:
            case Content(text=text):
                yield from self._block(Content, AnswerTextBlock(""))
                yield self._delta({"type": "text_delta", "text": text})
            case Reasoning(text=text) if self._job.shown.reasoning:
                yield from self._block(Reasoning, AnswerThinkingBlock(""))
                yield self._delta({"type": "thinking_delta", "thinking": text})
            case CallBegins(name=name):
                yield from self._close()
                begun = AnswerToolUseBlock(_id(self._job), name, msgspec.Raw(b"{}"))
                yield from self._block(CallBegins, begun)
            case CallArguments(text=text):
                yield self._delta({"type": "input_json_delta", "partial_json": text})

    def _block(
        self, kind: type[Part], empty: AnswerTextBlock | AnswerThinkingBlock | AnswerToolUseBlock
    ) -> Iterator[bytes]:
        """Open a block of this kind, if it is not the one that is open."""
        if self._open is not None and self._open.kind is kind:
            return
        yield from self._close()
        self._open = _Open(self._blocks, kind)
        self._blocks += 1
        yield _event("content_block_start", {"index": self._open.index, "content_block": empty})

    def _close(self) -> Iterator[bytes]:
        if self._open is not None:
            if self._open.kind is Reasoning:
                yield self._delta({"type": "signature_delta", "signature": ""})
            yield _event("content_block_stop", {"index": self._open.index})
            self._open = None

    def _delta(self, delta: dict[str, str]) -> bytes:
        index = self._open.index if self._open is not None else self._blocks
        return _event("content_block_delta", {"index": index, "delta": delta})
