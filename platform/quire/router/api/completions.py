"""`POST /v1/completions`: continuations of plain prompts, several at once if asked.

Choice `p * n + i` is the i-th continuation of prompt p. With `echo` each begins with its prompt. Events of a
stream have the shape of the whole answer; the last one of a choice has the finish reason and no text.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from quire.router.api import logprobs
from quire.router.fleet import ServedModel
from quire.router.gateway import Gateway, Job, TokenScore, Update
from quire_schemas.openai import (
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    CompletionRequest,
    FinishReason,
    Usage,
    read_completion,
)

_json = msgspec.json.Encoder()


class CompletionFormat:
    """The completions endpoint's `Format`."""

    operation = "text_completion"

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway

    def read(self, body: bytes) -> CompletionRequest:
        return read_completion(body)

    def sequences(self, request: CompletionRequest) -> int:
        return len(request.prompt) * (request.n or 1)

    async def job(
        self,
        request: CompletionRequest,
        served: ServedModel,
        size: int,
        arrived_at: float,
        traceparent: str | None,
    ) -> Job:
        return await self._gateway.completion(request, served, size, arrived_at, traceparent)

    def whole(self, job: Job, updates: Sequence[Update], usage: Usage) -> bytes:
        answer = Completion(
            id=job.id,
            object="text_completion",
            created=job.created,
            model=job.asked_model,
            system_fingerprint=job.fingerprint,
            choices=[_choice(job, index, updates) for index in range(len(job.prompts) * job.n)],
            usage=usage,
        )
        return answer.model_dump_json().encode()

    def stream(self, job: Job, request: CompletionRequest) -> CompletionStream:
        return CompletionStream(job, request)


def _echo(job: Job, index: int) -> str:
    return job.echoes[index // job.n] if job.echoes else ""


def _choice(job: Job, index: int, updates: Sequence[Update]) -> CompletionChoice:
    mine = [update for update in updates if update.index == index]
    finish: FinishReason = "length" if mine[-1].finish_reason == "length" else "stop"
    return CompletionChoice(
        index=index,
        text=_echo(job, index) + "".join(update.text for update in mine),
        logprobs=_logprobs(job, [score for update in mine for score in update.scores]),
        finish_reason=finish,
    )


def _logprobs(job: Job, scores: Sequence[TokenScore]) -> CompletionLogprobs | None:
    if job.sampling.logprobs is None:
        return None
    tokenizer = job.model.usable
    return CompletionLogprobs(
        tokens=[tokenizer.token_text(score.scores.token_id) for score in scores],
        token_logprobs=[logprobs.finite(score.scores.logprob) for score in scores],
        top_logprobs=[
            {tokenizer.token_text(index): logprobs.finite(value) for index, value in score.scores.top}
            for score in scores
        ],
        text_offset=[score.offset for score in scores],
    )


class CompletionStream:
    """Writes one completion stream's events."""

    def __init__(self, job: Job, request: CompletionRequest) -> None:
        self._job = job
        self._opened: set[int] = set()
        head = {
            "id": job.id,
            "object": "text_completion",
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
            text = update.text
            if update.index not in self._opened:
                self._opened.add(update.index)
                text = _echo(self._job, update.index) + text
            if text or update.scores:
                out.append(self._event(update.index, text, update.scores, b"null", tail))
            if update.finish_reason is not None:
                out.append(self._event(update.index, "", (), _json.encode(update.finish_reason), tail))
        return b"".join(out)

    def _event(self, index: int, text: str, scores: Sequence[TokenScore], finish: bytes, tail: bytes) -> bytes:
        found = _logprobs(self._job, scores) if scores else None
        return b'%b{"index":%d,"text":%b,"logprobs":%b,"finish_reason":%b}%b' % (
            self._head,
            index,
            _json.encode(text),
            found.model_dump_json().encode() if found is not None else b"null",
            finish,
            tail,
        )

    def closing(self, usage: Usage) -> bytes:
        return self._head + b"]" + _usage(usage)


def _usage(usage: Usage) -> bytes:
    return b',"usage":' + usage.model_dump_json().encode() + b"}\n\n"
