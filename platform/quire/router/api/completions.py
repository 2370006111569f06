"""`POST /v1/completions`: continuations of plain prompts, several at once if asked.

Choice `p * n + i` is the i-th continuation of prompt p. With `echo` each begins with its prompt. Events of a
stream have the shape of the whole answer; the last one of a choice has the finish reason and no text.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import msgspec

from quire.router.api import logprobs
from quire.router.api.events import Envelope
from quire.router.fleet import ServedModel
from quire.router.gateway import Gateway
from quire.router.job import Job, TokenScore, Update
from quire.router.spans import RequestSpan
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
        span: RequestSpan,
    ) -> Job:
        return await self._gateway.completion(request, served, size, arrived_at, span)

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
    tokenizer = job.tokenizer
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
        self._envelope = Envelope(job, "text_completion", wants_usage=request.wants_usage)
        self.closing = self._envelope.closing

    def events(self, updates: Sequence[Update], usage: Usage | None) -> bytes:
        return b"".join(
            self._envelope.event(choice, usage) for update in updates for choice in self._choices(update)
        )

    def _choices(self, update: Update) -> Iterator[bytes]:
        text = update.text
        if self._envelope.opens(update.index):
            text = _echo(self._job, update.index) + text
        if text or update.scores:
            yield self._chunk(update.index, text, update.scores, b"null")
        if update.finish_reason is not None:
            yield self._chunk(update.index, "", (), _json.encode(update.finish_reason))

    def _chunk(self, index: int, text: str, scores: Sequence[TokenScore], finish: bytes) -> bytes:
        found = _logprobs(self._job, scores) if scores else None
        shown = found.model_dump_json().encode() if found is not None else b"null"
        return b'{"index":%d,"text":%b,"logprobs":%b,"finish_reason":%b}' % (
            index,
            _json.encode(text),
            shown,
            finish,
        )
