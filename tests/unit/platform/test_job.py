"""Where an answer is written: what has many numbers is written aside, whatever was asked for."""

from __future__ import annotations

import threading
from typing import Any

import pytest
from tests.unit.platform.test_conversation import serving

from quire import builtin
from quire.router.job import INLINE_NUMBERS, Job, Shown, TokenScore, Update
from quire.router.spans import RequestSpan
from quire.text import Tokenizer
from quire.text.dialects import Dialects
from quire_schemas import wire

FEW, MANY = INLINE_NUMBERS // 21, INLINE_NUMBERS // 21 + 1
"""Tokens with 20 alternatives each."""
SCORED = {"shown": Shown(logprobs=20), "sampling": wire.Sampling(max_tokens=1, logprobs=20)}
POOLED = {"pooling": wire.Pooling("last")}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(builtin.path())


def scored(tokens: int) -> Update:
    one = TokenScore(0, 1, wire.TokenLogprobs(1, -1.0, ((1, -1.0),), 1, ()))
    return Update(0, "", (one,) * tokens, None)


def vector(numbers: int) -> Update:
    return Update(0, "", (), "stop", embedding=bytes(4 * numbers))


@pytest.mark.parametrize(
    ("options", "updates", "aside"),
    [
        ({}, [scored(MANY)], False),  # they are not shown
        (SCORED, [scored(FEW)], False),
        (SCORED, [scored(MANY)], True),
        (SCORED, [scored(FEW), scored(1)], True),
        (POOLED, [vector(INLINE_NUMBERS)], False),
        (POOLED, [vector(INLINE_NUMBERS // 2), vector(INLINE_NUMBERS)], True),
        ({"shown": Shown(prompt_text=True)}, [], True),
    ],
)
async def test_what_takes_long_to_write_is_written_on_another_thread(
    tokenizer: Tokenizer, options: dict[str, Any], updates: list[Update], aside: bool
) -> None:
    fields: dict[str, Any] = {"shown": Shown(), "sampling": wire.Sampling(max_tokens=1), **options}
    job = Job(
        id="chatcmpl-1",
        asked_model="m",
        model=serving(tokenizer, Dialects()),
        tokenizer=tokenizer,
        operation="chat",
        prompts=([1],),
        echoes=(),
        n=1,
        kept=1,
        stops=(),
        include_stop=False,
        skip_special_tokens=True,
        stream=False,
        arrived_at=0.0,
        span=RequestSpan.unseen(),
        **fields,
    )
    written_on = await job.written(threading.get_ident, updates)
    assert (written_on != threading.get_ident()) == aside
