"""Log-probabilities as answers show them: each token with its text and its bytes.

A token that is part of a character has U+FFFD in its text; `bytes` is what to join.
"""

from __future__ import annotations

from quire.router.job import TokenScore
from quire.text import Tokenizer
from quire_schemas.openai import TokenLogprob, TopLogprob

_LOWEST = -9999.0


def finite(value: float) -> float:
    """JSON has no minus infinity; OpenAI writes this in its place."""
    return max(value, _LOWEST)


def token(tokenizer: Tokenizer, score: TokenScore) -> TokenLogprob:
    """One position of a chat choice."""
    scores = score.scores
    return TokenLogprob(
        token=tokenizer.token_text(scores.token_id),
        logprob=finite(scores.logprob),
        bytes=list(tokenizer.token_bytes(scores.token_id)),
        top_logprobs=[
            TopLogprob(
                token=tokenizer.token_text(index),
                logprob=finite(value),
                bytes=list(tokenizer.token_bytes(index)),
            )
            for index, value in scores.top
        ],
    )
