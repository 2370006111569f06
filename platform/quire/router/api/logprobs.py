"""Log-probabilities as answers show them: each token with its text and its bytes.

A token that is part of a character has U+FFFD in its text; `bytes` is what to join. The alternatives at a position
are the likeliest tokens, and then those that the request named and that are not among them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from quire.router.job import Job, TokenScore
from quire_schemas import wire
from quire_schemas.openai import PromptLogprob, PromptLogprobs, TokenLogprob, TopLogprob

_LOWEST = -9999.0


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


def token(job: Job, score: TokenScore) -> TokenLogprob:
    """One position of a chat choice."""
    scores, tokenizer = score.scores, job.tokenizer
    return TokenLogprob(
        token=job.token_text(scores.token_id),
        logprob=finite(scores.logprob),
        bytes=list(tokenizer.token_bytes(scores.token_id)),
        top_logprobs=[
            TopLogprob(
                token=job.token_text(index), logprob=finite(value), bytes=list(tokenizer.token_bytes(index))
            )
            for index, value in alternatives(job, scores, job.shown.logprobs)
        ],
    )


def of_prompt(job: Job, scores: Sequence[wire.TokenLogprobs]) -> PromptLogprobs | None:
    """Those of a prompt, if they are to be shown; `scores` begin with its second token."""
    if job.shown.prompt_logprobs is None:
        return None
    return [None, *(_position(job, entry) for entry in scores)]


def _position(job: Job, scores: wire.TokenLogprobs) -> dict[str, PromptLogprob]:
    ranks = {index: rank for rank, (index, _) in enumerate(scores.top, 1)} | {scores.token_id: scores.rank}
    found = {scores.token_id: scores.logprob} | dict(alternatives(job, scores, job.shown.prompt_logprobs))
    return {
        str(index): PromptLogprob(
            logprob=finite(value), rank=ranks.get(index), decoded_token=job.tokenizer.token_text(index)
        )
        for index, value in found.items()
    }
