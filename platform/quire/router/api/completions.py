"""`POST /v1/completions`: continuations of plain prompts, several at once if asked.

Choice `p * n + i` is the i-th continuation of prompt p, in the order they were begun; with `best_of` the i-th
best, by the mean log-probability of its tokens. With `echo` each begins with its prompt. Events of a stream have
the shape of the whole answer; the last one of a choice has the finish reason and no text.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import msgspec

from quire.errors import Api
from quire.router.access import Caller
from quire.router.api import logprobs
from quire.router.api.events import COMMENT, Envelope, closed, ending
from quire.router.api.timing import Timing
from quire.router.fleet import ServedModel
from quire.router.formats import NO_NAMES
from quire.router.gateway import Gateway
from quire.router.job import Job, TokenScore, Update
from quire.router.spans import RequestSpan
from quire.text import Detokenizer
from quire_schemas import wire
from quire_schemas.openai.answer import FinishReason, Usage
from quire_schemas.openai.completions import (
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    CompletionRequest,
    read_completion,
)

_json = msgspec.json.Encoder()


class CompletionFormat:
    """The completions endpoint's `Format`."""

    operation = "text_completion"
    api = Api.OPENAI
    names = NO_NAMES

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway

    def read(self, body: bytes, ignore_unknown: bool) -> CompletionRequest:
        return read_completion(body, ignore_unknown)

    def sequences(self, request: CompletionRequest) -> int:
        return len(request.prompt) * request.sequences

    async def job(
        self,
        request: CompletionRequest,
        served: ServedModel,
        size: int,
        arrived_at: float,
        span: RequestSpan,
        caller: Caller,
    ) -> Job:
        return await self._gateway.completion(request, served, size, arrived_at, span)

    async def whole(self, job: Job, request: CompletionRequest, updates: Sequence[Update], usage: Usage) -> bytes:
        return await job.written(lambda: self._whole(job, updates, usage), updates)

    def _whole(self, job: Job, updates: Sequence[Update], usage: Usage) -> bytes:
        answer = Completion(
            id=job.id,
            object="text_completion",
            created=job.created,
            model=job.asked_model,
            system_fingerprint=job.fingerprint,
            choices=[],
            usage=usage,
            metrics=Timing(job).whole(updates),
        ).model_dump()
        answer["choices"] = _choices(job, updates)
        return _json.encode(answer)

    def stream(self, job: Job, request: CompletionRequest) -> CompletionStream:
        return CompletionStream(job, request)


def _echo(job: Job, index: int) -> str:
    return job.echoes[index // job.n] if job.echoes else ""


def _choices(job: Job, updates: Sequence[Update]) -> list[dict[str, Any]]:
    writer = logprobs.Writer(job)
    made: list[list[Update]] = [[] for _ in range(len(job.prompts) * job.n)]
    for update in updates:
        made[update.index].append(update)
    choices: list[dict[str, Any]] = []
    for first in range(0, len(made), job.n):
        prompt_scores = [entry for update in made[first] for entry in update.prompt_scores]
        of_prompt = writer.prompt(prompt_scores)
        sequences = list(range(first, first + job.n))
        if job.kept < job.n:
            sequences = sorted(sequences, key=lambda index: _mean_logprob(made[index]), reverse=True)[: job.kept]
        for index in sequences:
            choice = _choice(job, len(choices), index, made[index], prompt_scores).model_dump()
            if of_prompt is not None:
                choice["prompt_logprobs"] = msgspec.Raw(of_prompt)
            choices.append(choice)
    return choices


def _mean_logprob(updates: Sequence[Update]) -> float:
    """Of the tokens that were drawn; without one, a sequence is behind all others."""
    values = [score.scores.logprob for update in updates for score in update.scores]
    return sum(values) / len(values) if values else -math.inf


def _choice(
    job: Job, place: int, index: int, mine: Sequence[Update], prompt_scores: Sequence[wire.TokenLogprobs]
) -> CompletionChoice:
    """Sequence `index` as the choice at `place`, but for the log-probabilities of its prompt."""
    return CompletionChoice(
        index=place,
        text=_echo(job, index) + "".join(update.text for update in mine),
        logprobs=_logprobs(job, index, [score for update in mine for score in update.scores], prompt_scores, True),
        finish_reason=cast(FinishReason, mine[-1].finish_reason),
        stop_reason=mine[-1].stop_reason,
        token_ids=[token for update in mine for token in update.token_ids] if job.shown.token_ids else None,
        prompt_token_ids=job.prompts[index // job.n] if job.shown.token_ids else None,
    )


def _logprobs(
    job: Job, index: int, scores: Sequence[TokenScore], prompt: Sequence[wire.TokenLogprobs], opens: bool
) -> CompletionLogprobs | None:
    """Those of a choice, or of a part of it; where it `opens`, with those of the `prompt` if that is echoed."""
    if job.shown.logprobs is None:
        return None
    found = CompletionLogprobs(tokens=[], token_logprobs=[], top_logprobs=[], text_offset=[])
    if opens and job.echoes:
        ids = job.prompts[index // job.n]
        found.tokens += [job.token_key(token) for token in ids]
        found.token_logprobs += [None, *(logprobs.finite(entry.logprob) for entry in prompt)]
        found.top_logprobs += [None, *(_alternatives(job, entry) for entry in prompt)]
        found.text_offset += _offsets(job, ids)
    found.tokens += [job.token_key(score.scores.token_id) for score in scores]
    found.token_logprobs += [logprobs.finite(score.scores.logprob) for score in scores]
    found.top_logprobs += [_alternatives(job, score.scores) for score in scores]
    behind = len(_echo(job, index))
    found.text_offset += [behind + score.offset for score in scores]
    return found


def _alternatives(job: Job, scores: wire.TokenLogprobs) -> dict[str, float]:
    shown = logprobs.alternatives(job, scores, job.shown.logprobs)
    return {job.token_key(index): logprobs.finite(value) for index, value in shown}


def _offsets(job: Job, ids: Sequence[int]) -> list[int]:
    """Where in its text each token of a prompt begins."""
    text = Detokenizer(job.tokenizer, job.skip_special_tokens)
    lengths = [len(text.push((token,))) for token in ids]
    return [0, *itertools.accumulate(lengths)][: len(ids)]


class CompletionStream:
    """Writes one completion stream's events."""

    ping = COMMENT
    cut = True

    def __init__(self, job: Job, request: CompletionRequest) -> None:
        self._job = job
        self._envelope = Envelope(job, "text_completion", request.stream_options)
        self.end = self._envelope.end
        self.broken = self._envelope.broken
        self._timing = Timing(job)

    def events(self, updates: Sequence[Update], usage: Callable[[], Usage]) -> bytes:
        return b"".join(
            self._envelope.event(choice, usage, last)
            for update in updates
            for choice, last in closed(self._choices(update), self._timing.take(update))
        )

    def _choices(self, update: Update) -> Iterator[bytes]:
        job, text = self._job, update.text
        opens = self._envelope.opens(update.index)
        if opens:
            text = _echo(job, update.index) + text
        ids = update.token_ids if job.shown.token_ids else ()
        if text or update.scores or ids:
            found = None
            if update.scores or (opens and job.echoes):
                found = _logprobs(job, update.index, update.scores, update.prompt_scores, opens)
            more = b',"token_ids":' + _json.encode(ids) if ids else b""
            if opens and job.shown.token_ids:
                more += b',"prompt_token_ids":' + _json.encode(job.prompts[update.index // job.n])
            shown = found.model_dump_json().encode() if found is not None else b"null"
            yield _chunk(update.index, text, shown, b"null", more)
        if update.finish_reason is not None:
            yield _chunk(update.index, "", b"null", ending(update))


def _chunk(index: int, text: str, scores: bytes, finish: bytes, more: bytes = b"") -> bytes:
    fields = (index, _json.encode(text), scores, finish, more)
    return b'{"index":%d,"text":%b,"logprobs":%b,"finish_reason":%b%b}' % fields
