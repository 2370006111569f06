"""`POST /v1/chat/completions`: how a conversation is read, and how its answer is written.

A stream's events per choice: one with the role alone, events with content, one with the finish reason alone. The
bytes around what changes are made once per stream; `quire_schemas.openai.ChatChunk` is their shape, and a test
holds them to it.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from quire.router.api import logprobs
from quire.router.fleet import ServedModel
from quire.router.gateway import Gateway, Job, TokenScore, Update
from quire_schemas.openai import (
    AssistantMessage,
    ChatChoice,
    ChatCompletion,
    ChatRequest,
    ChoiceLogprobs,
    FinishReason,
    Usage,
    read_chat,
)

_json = msgspec.json.Encoder()


class ChatFormat:
    """The chat endpoint's `Format`."""

    operation = "chat"

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway

    def read(self, body: bytes) -> ChatRequest:
        return read_chat(body)

    def sequences(self, request: ChatRequest) -> int:
        return request.n or 1

    async def job(
        self, request: ChatRequest, served: ServedModel, size: int, arrived_at: float, traceparent: str | None
    ) -> Job:
        return await self._gateway.chat(request, served, size, arrived_at, traceparent)

    def whole(self, job: Job, updates: Sequence[Update], usage: Usage) -> bytes:
        answer = ChatCompletion(
            id=job.id,
            object="chat.completion",
            created=job.created,
            model=job.asked_model,
            system_fingerprint=job.fingerprint,
            choices=[_choice(job, index, updates) for index in range(job.n)],
            usage=usage,
        )
        return answer.model_dump_json().encode()

    def stream(self, job: Job, request: ChatRequest) -> ChatStream:
        return ChatStream(job, request)


def _choice(job: Job, index: int, updates: Sequence[Update]) -> ChatChoice:
    mine = [update for update in updates if update.index == index]
    finish: FinishReason = "length" if mine[-1].finish_reason == "length" else "stop"
    return ChatChoice(
        index=index,
        message=AssistantMessage(role="assistant", content="".join(update.text for update in mine)),
        logprobs=_logprobs(job, [score for update in mine for score in update.scores]),
        finish_reason=finish,
    )


def _logprobs(job: Job, scores: Sequence[TokenScore]) -> ChoiceLogprobs | None:
    if job.sampling.logprobs is None:
        return None
    return ChoiceLogprobs(content=[logprobs.token(job.model.usable, score) for score in scores])


class ChatStream:
    """Writes one chat stream's events."""

    def __init__(self, job: Job, request: ChatRequest) -> None:
        self._job = job
        self._opened: set[int] = set()
        head = {
            "id": job.id,
            "object": "chat.completion.chunk",
            "created": job.created,
            "model": job.asked_model,
            "system_fingerprint": job.fingerprint,
        }
        self._head = b"data: " + _json.encode(head)[:-1] + b',"choices":['
        self._tail = b',"usage":null}\n\n' if request.wants_usage else b"}\n\n"

    def events(self, updates: Sequence[Update], usage: Usage | None) -> bytes:
        tail = b"]" + (self._tail if usage is None else _usage(usage))
        out: list[bytes] = []
        for update in updates:
            if update.index not in self._opened:
                self._opened.add(update.index)
                out.append(self._event(update.index, b'{"role":"assistant","content":""}', b"null", b"null", tail))
            if update.text or update.scores:
                content = b'{"content":' + _json.encode(update.text) + b"}"
                found = _logprobs(self._job, update.scores)
                scores = found.model_dump_json().encode() if found is not None else b"null"
                out.append(self._event(update.index, content, scores, b"null", tail))
            if update.finish_reason is not None:
                out.append(self._event(update.index, b"{}", b"null", _json.encode(update.finish_reason), tail))
        return b"".join(out)

    def _event(self, index: int, delta: bytes, scores: bytes, finish: bytes, tail: bytes) -> bytes:
        return b'%b{"index":%d,"delta":%b,"logprobs":%b,"finish_reason":%b}%b' % (
            self._head,
            index,
            delta,
            scores,
            finish,
            tail,
        )

    def closing(self, usage: Usage) -> bytes:
        return self._head + b"]" + _usage(usage)


def _usage(usage: Usage) -> bytes:
    return b',"usage":' + usage.model_dump_json().encode() + b"}\n\n"
