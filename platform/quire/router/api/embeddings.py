"""`POST /v1/embeddings`: a vector for each text, from the final hidden states of a decoder model.

The vectors come as lists of numbers or, with `encoding_format: base64`, as the engine's float32 bytes
(little-endian), which is what the official client asks for and unpacks.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import NoReturn

import msgspec

from quire.errors import Api, InternalError, InvalidRequest
from quire.router.access import Caller
from quire.router.fleet import ServedModel
from quire.router.formats import NO_NAMES
from quire.router.gateway import Gateway
from quire.router.job import AT_ONCE, Job, Update
from quire.router.spans import RequestSpan
from quire_schemas.openai.answer import Usage
from quire_schemas.openai.embeddings import (
    Embedding,
    EmbeddingList,
    EmbeddingRequest,
    EmbeddingUsage,
    read_embedding,
)

_json = msgspec.json.Encoder()


class EmbeddingAnswer(EmbeddingList, kw_only=True):
    """An `EmbeddingList` whose vectors are written."""

    data: list[msgspec.Raw]  # type: ignore[assignment]


class EmbeddingFormat:
    """The embeddings endpoint's `Format`."""

    operation = "embeddings"
    api = Api.OPENAI
    names = NO_NAMES

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway

    def read(self, body: bytes, ignore_unknown: bool) -> EmbeddingRequest:
        return read_embedding(body, ignore_unknown)

    def sequences(self, request: EmbeddingRequest) -> int:
        return min(len(request.input), AT_ONCE)

    async def job(
        self,
        request: EmbeddingRequest,
        served: ServedModel,
        size: int,
        arrived_at: float,
        span: RequestSpan,
        caller: Caller,
    ) -> Job:
        return await self._gateway.embedding(request, served, size, arrived_at, span)

    async def whole(self, job: Job, request: EmbeddingRequest, updates: Sequence[Update], usage: Usage) -> bytes:
        return await job.written(lambda: self._whole(job, updates, usage), updates)

    def _whole(self, job: Job, updates: Sequence[Update], usage: Usage) -> bytes:
        # each by itself: however many there are, nobody waits for longer than one takes
        data = [
            msgspec.Raw(_json.encode(Embedding(index=index, embedding=_shown(vector, job.as_base64))))
            for index, vector in enumerate(vectors(job, updates))
        ]
        told = EmbeddingUsage(prompt_tokens=usage.prompt_tokens, total_tokens=usage.prompt_tokens)
        return _json.encode(EmbeddingAnswer(data=data, model=job.asked_model, usage=told))

    def stream(self, job: Job, request: EmbeddingRequest) -> NoReturn:
        raise InvalidRequest("Vectors are not streamed.", param="stream")


def vectors(job: Job, updates: Sequence[Update]) -> list[bytes]:
    """The vector of each prompt of the job, as the engine's float32 bytes."""
    found = {update.index: update.embedding for update in updates if update.embedding is not None}
    if len(found) != len(job.prompts):
        raise InternalError("The engine left out a vector.")
    return [found[index] for index in range(len(job.prompts))]


def _shown(vector: bytes, as_base64: bool) -> str | list[float]:
    return base64.b64encode(vector).decode() if as_base64 else [*memoryview(vector).cast("f")]
