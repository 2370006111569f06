"""`POST /v1/score`: how alike texts are, as the cosine between the vectors that `/v1/embeddings` gives of them.

A text that is compared with several is read once. The vectors have length 1 when they come, so a cosine is the sum
of their products; what rounding adds beyond 1 is cut off.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import NoReturn

import msgspec

from quire.errors import Api, InvalidRequest
from quire.router.access import Caller
from quire.router.api.embeddings import vectors
from quire.router.fleet import ServedModel
from quire.router.formats import NO_NAMES
from quire.router.gateway import Gateway
from quire.router.job import Job, Update
from quire.router.spans import RequestSpan
from quire_schemas.openai.answer import Usage
from quire_schemas.openai.embeddings import EmbeddingUsage
from quire_schemas.openai.score import Score, ScoreList, ScoreRequest, read_score

_json = msgspec.json.Encoder()


class ScoreFormat:
    """The score endpoint's `Format`."""

    operation = "score"
    api = Api.OPENAI
    names = NO_NAMES

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway

    def read(self, body: bytes, ignore_unknown: bool) -> ScoreRequest:
        return read_score(body, ignore_unknown)

    def sequences(self, request: ScoreRequest) -> int:
        return sum(len(texts) for _, texts in request.sides)

    async def job(
        self,
        request: ScoreRequest,
        served: ServedModel,
        size: int,
        arrived_at: float,
        span: RequestSpan,
        caller: Caller,
    ) -> Job:
        return await self._gateway.score(request, served, size, arrived_at, span)

    async def whole(self, job: Job, request: ScoreRequest, updates: Sequence[Update], usage: Usage) -> bytes:
        return await job.written(lambda: self._whole(job, updates, usage), updates)

    def _whole(self, job: Job, updates: Sequence[Update], usage: Usage) -> bytes:
        found = [memoryview(vector).cast("f").tolist() for vector in vectors(job, updates)]
        answer = ScoreList(
            id=job.id,
            created=job.created,
            model=job.asked_model,
            data=[
                Score(index=index, score=min(max(sum(map(operator.mul, found[left], found[right])), -1.0), 1.0))
                for index, (left, right) in enumerate(job.pairs)
            ],
            usage=EmbeddingUsage(prompt_tokens=usage.prompt_tokens, total_tokens=usage.prompt_tokens),
        )
        return _json.encode(answer)

    def stream(self, job: Job, request: ScoreRequest) -> NoReturn:
        raise InvalidRequest("Scores are not streamed.", param="stream")
