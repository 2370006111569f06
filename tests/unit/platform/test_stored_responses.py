"""What is read for a response that goes on from others is counted and bounded, whatever small request names it."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from quire.errors import InternalError, InvalidRequest, describe
from quire.router.access import EVERYBODY
from quire.router.api.responses import ResponsesStream
from quire.router.job import Shown, Update
from quire.router.responses import Responses
from quire.router.store import Store
from quire.text.dialects.parts import Content
from quire_schemas.openai.answer import Usage
from quire_schemas.openai.responses import (
    Item,
    ItemReference,
    ItemTextPart,
    MessageItem,
    OutputMessage,
    OutputText,
    ResponseObject,
    read_response,
    write_items,
)

PLENTY = 4 * 1024 * 1024


@pytest.fixture
async def responses(tmp_path: Path) -> AsyncIterator[Responses]:
    store = Store(tmp_path / "router")
    yield Responses(store)
    await store.close()


async def kept(
    responses: Responses, text: str, previous: str | None = None, logprobs: list[Any] | None = None
) -> tuple[str, str]:
    """A response that says `text`, after a user has said it: its id, and that of its one item."""
    body = b'{"model": "m", "input": "x"}'
    response = ResponseObject.begun(responses.new_id(), int(time.time()), read_response(body))
    words = OutputText(text=text, logprobs=logprobs or [])
    item = OutputMessage(id=f"msg_{response.id}", status="completed", content=[words])
    response.output, response.status, response.previous_response_id = [item], "completed", previous
    await responses.keep(response, [MessageItem(role="user", content=text)], "", "")
    return response.id, item.id


def _said(item: Item) -> str:
    assert isinstance(item, MessageItem)
    assert isinstance(item.content, list)
    [part] = item.content
    assert isinstance(part, ItemTextPart)
    return part.text


async def test_items_that_are_named_are_counted_each_time(responses: Responses) -> None:
    _, long = await kept(responses, "x" * 20_000)
    _, short = await kept(responses, "y" * 100)
    own: list[Item] = [ItemReference(type="item_reference", id=name) for name in (long, short, long, long)]
    context = await responses.context(None, own, PLENTY, "")
    assert [len(_said(item)) for item in context.own] == [20_000, 100, 20_000, 20_000]
    assert 60_100 < context.size < 62_000
    with pytest.raises(InvalidRequest, match="more than 60000 bytes") as refused:
        await responses.context(None, own, 60_000, "")
    assert refused.value.param == "input"
    assert (await responses.context(None, own[:2], 60_000, "")).size > 20_000


async def test_a_conversation_is_read_up_to_a_bound_of_bytes(responses: Responses) -> None:
    last: str | None = None
    for _ in range(30):
        last, _ = await kept(responses, "z" * 10_000, last)
    whole = await responses.context(last, [], PLENTY, "")
    assert len(whole.before) == 60
    assert 600_000 < whole.size < 700_000
    assert responses.store._opened is not None
    statements: list[str] = []
    sa.event.listen(
        responses.store._opened[1], "before_cursor_execute", lambda *told: statements.append(str(told[2]))
    )
    with pytest.raises(InvalidRequest, match="more than 100000 bytes") as refused:
        await responses.context(last, [], 100_000, "")
    assert refused.value.param == "previous_response_id"
    assert len(statements) < 8, "no more is read than was needed to know"
    assert not [each for each in statements if "answer" in each]


async def test_what_shaped_an_answer_is_no_part_of_the_conversation(responses: Responses) -> None:
    """Log-probabilities are in the answer that is kept, and of no use to whoever goes on from it."""
    scores = [{"token": "x", "bytes": [120], "logprob": -0.5, "top_logprobs": []}] * 1000
    name, item = await kept(responses, "x" * 1000, logprobs=scores)
    assert len(await responses.get(name, "")) > 50_000
    context = await responses.context(name, [ItemReference(type="item_reference", id=item)], PLENTY, "")
    assert context.size < 5_000
    assert b"logprob" not in write_items([*context.before, *context.own])


async def test_names_that_nobody_has_are_told_as_a_terminal_may_show_them(responses: Responses) -> None:
    odd = "resp_\x1b[31m\n" + "x" * 500
    with pytest.raises(InvalidRequest) as response:
        await responses.context(odd, [], PLENTY, "")
    with pytest.raises(InvalidRequest) as item:
        await responses.context(None, [ItemReference(type="item_reference", id=odd)], PLENTY, "")
    for told in (response.value.message, item.value.message):
        assert told.isprintable()
        assert len(told) < 250


@pytest.mark.parametrize("at", ["an event", "the last event"])
async def test_a_stream_whose_writing_fails_ends_with_one_event(responses: Responses, at: str) -> None:
    """What cannot be written is in the response itself, from then on: the event that says so goes without it."""
    request = read_response(b'{"model": "m", "input": "x", "metadata": {"a": "b"}}')
    job: Any = OfAStream()
    stream = ResponsesStream(responses, job, request)
    usage = Usage(prompt_tokens=1, completion_tokens=1, total_tokens=2)
    sent = stream.events([Update(0, "Hi", (), None, parts=(Content("Hi"),))], lambda: usage)
    half = "\ud83d"  # of a surrogate pair
    with pytest.raises(UnicodeEncodeError):
        if at == "an event":
            stream.events([Update(0, half, (), "stop", parts=(Content(half),))], lambda: usage)
        else:
            stream._output._text.append(half)
            await stream.end(usage)
    sent += await stream.broken(describe(InternalError("It failed.")))
    events = [json.loads(each.rpartition(b"data: ")[2]) for each in sent.split(b"\n\n") if each]
    assert [each["type"] for each in events].count("response.failed") == 1
    numbers = [each["sequence_number"] for each in events]
    assert numbers == sorted(set(numbers))
    last = events[-1]["response"]
    assert (last["status"], last["error"]["code"]) == ("failed", "internal_error")
    assert (last["id"], last["metadata"], last["usage"]) == ("resp_1", {"a": "b"}, None)
    assert (last["completed_at"], last["incomplete_details"]) == (None, None)


class OfAStream:
    """What of a job the writing of its stream needs."""

    id = "resp_1"
    created = 1_700_000_000
    shown = Shown()
    caller = EVERYBODY
