"""Log-probabilities as answers show them: each token with its text and its bytes.

A token that is part of a character has U+FFFD in its text; `bytes` is what to join. The alternatives at a position
are the likeliest tokens, and then those that the request named and that are not among them.

An answer may have hundreds of thousands of them. They are therefore written as JSON here, out of pieces that are
made once for each token; `quire_schemas.openai` has their shapes, and tests hold what is written to these.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import msgspec

from quire.router.job import Job, TokenScore
from quire_schemas import wire

_LOWEST = -9999.0
_json = msgspec.json.Encoder()


def finite(value: float) -> float:
    """JSON has no minus infinity; OpenAI writes this in its place."""
    return max(value, _LOWEST)


def alternatives(job: Job, scores: wire.TokenLogprobs, count: int | None) -> Iterator[tuple[int, float]]:
    """The first `count` (-1: all) of the likeliest tokens, then those named."""
    shown = scores.top if count == wire.WHOLE_VOCABULARY else scores.top[: count or 0]
    yield from shown
    if scores.named:
        known = {index for index, _ in shown}
        named = zip(job.sampling.logprob_token_ids, scores.named, strict=True)
        yield from ((index, value) for index, value in named if index not in known)


class Writer:
    """Writes those of one job's answer."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._pieces: dict[int, tuple[str, str]] = {}

    def chat(self, scores: Sequence[TokenScore]) -> bytes:
        """`ChoiceLogprobs` of tokens of an answer, or null if they are not to be shown."""
        if self._job.shown.logprobs is None:
            return b"null"
        return ('{"content":[' + ",".join(map(self._position, scores)) + '],"refusal":null}').encode()

    def tokens(self, scores: Sequence[TokenScore]) -> list[msgspec.Raw]:
        """A `TokenLogprob` for each token of an answer; none if they are not to be shown."""
        if self._job.shown.logprobs is None:
            return []
        return [msgspec.Raw(self._position(score).encode()) for score in scores]

    def prompt(self, scores: Sequence[wire.TokenLogprobs]) -> bytes | None:
        """`PromptLogprobs`, if they are to be shown; `scores` begin with the prompt's second token."""
        if self._job.shown.prompt_logprobs is None:
            return None
        return ("[" + ",".join(["null", *map(self._prompt_position, scores)]) + "]").encode()

    def _position(self, score: TokenScore) -> str:
        scores = score.scores
        shown = alternatives(self._job, scores, self._job.shown.logprobs)
        top = ",".join([f"{self._entry(index, value)}}}" for index, value in shown])
        return f'{self._entry(scores.token_id, scores.logprob)},"top_logprobs":[{top}]}}'

    def _entry(self, index: int, value: float) -> str:
        """A token's fields, without the end of their object."""
        piece = self._pieces.get(index)
        if piece is None:
            text = _json.encode(self._job.token_text(index)).decode()
            numbers = ",".join(map(str, self._job.tokenizer.token_bytes(index)))
            piece = self._pieces[index] = f'{{"token":{text},"logprob":', f',"bytes":[{numbers}]'
        return f"{piece[0]}{max(value, _LOWEST)!r}{piece[1]}"

    def _prompt_position(self, scores: wire.TokenLogprobs) -> str:
        ranks = {index: rank for rank, (index, _) in enumerate(scores.top, 1)} | {scores.token_id: scores.rank}
        found = {scores.token_id: scores.logprob}
        found.update(alternatives(self._job, scores, self._job.shown.prompt_logprobs))
        text = self._job.tokenizer.token_text
        return _json.encode(
            {
                str(index): {
                    "logprob": max(value, _LOWEST),
                    "rank": ranks.get(index),
                    "decoded_token": text(index),
                }
                for index, value in found.items()
            }
        ).decode()
