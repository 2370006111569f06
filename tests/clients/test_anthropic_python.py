"""The `anthropic` package against the Messages endpoint."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any, Final

import anthropic
import pytest
from tests.clients.server import FREED, LENGTHY, Server

SAY: Final[list[Any]] = [{"role": "user", "content": "Say it"}]
WORDS: Final = "naïve 你好 🦊🙂 — done"
TOOLS: Final[list[Any]] = [
    {
        "name": "weather",
        "description": "The weather in a city",
        "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    }
]
CALL: Final = f"<tool_call>\n{json.dumps({'name': 'weather', 'arguments': {'city': 'Graz'}})}\n</tool_call>"


@pytest.fixture
def asking(server: Server) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=server.world.url, api_key="none", max_retries=0, timeout=20) as client:
        yield client


def asked(text: str, **fields: Any) -> dict[str, Any]:
    """A request that `parrot`, which says again what was said last, answers with this text."""
    return {"model": "parrot", "max_tokens": 100, "messages": [{"role": "user", "content": text}], **fields}


def test_messages_whole_and_as_a_stream(asking: anthropic.Anthropic) -> None:
    whole = asking.messages.create(**asked(WORDS, system="Be brief."))
    assert [block.text for block in whole.content if block.type == "text"] == [WORDS]
    assert whole.stop_reason == "end_turn"
    with asking.messages.stream(**asked(WORDS, system="Be brief.")) as stream:
        pieces = list(stream.text_stream)
        final = stream.get_final_message()
    assert "".join(pieces) == WORDS
    assert len(pieces) > 3
    assert final.usage.output_tokens == whole.usage.output_tokens
    assert final.stop_reason == "end_turn"


def test_limits_and_stops_have_reasons(asking: anthropic.Anthropic) -> None:
    short = asking.messages.create(**asked(WORDS, max_tokens=3))
    assert (short.stop_reason, short.usage.output_tokens) == ("max_tokens", 3)
    stopped = asking.messages.create(**asked(WORDS, stop_sequences=["好"]))
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", "好")


def test_tokens_are_counted_as_they_are_used(asking: anthropic.Anthropic) -> None:
    used = asking.messages.create(**asked(WORDS)).usage
    counted = asking.messages.count_tokens(model="parrot", messages=asked(WORDS)["messages"])
    assert counted.input_tokens == used.input_tokens + (used.cache_read_input_tokens or 0)


def test_errors_are_typed(asking: anthropic.Anthropic) -> None:
    with pytest.raises(anthropic.NotFoundError):
        asking.messages.create(model="third", max_tokens=5, messages=SAY)
    with pytest.raises(anthropic.BadRequestError, match="temperature"):
        asking.messages.create(model="parrot", max_tokens=5, messages=SAY, extra_body={"temperature": 9})


def test_tools_are_used_whole_and_as_a_stream(asking: anthropic.Anthropic) -> None:
    whole = asking.messages.create(**asked(CALL, tools=TOOLS))
    [use] = [block for block in whole.content if block.type == "tool_use"]
    assert (whole.stop_reason, use.name, use.input) == ("tool_use", "weather", {"city": "Graz"})
    with asking.messages.stream(**asked(CALL, tools=TOOLS)) as stream:
        final = stream.get_final_message()
    assert [block.input for block in final.content if block.type == "tool_use"] == [{"city": "Graz"}]
    result = {"type": "tool_result", "tool_use_id": use.id, "content": "sunny"}
    turns: list[Any] = [
        *asked(CALL)["messages"],
        {"role": "assistant", "content": whole.content},
        {"role": "user", "content": [result]},
    ]
    last = asking.messages.create(**{**asked("", tools=TOOLS), "messages": turns})
    assert [block.text for block in last.content if block.type == "text"] == ["sunny"]


def test_leaving_a_stream_frees_the_engine(asking: anthropic.Anthropic, server: Server) -> None:
    with asking.messages.stream(**asked(LENGTHY, max_tokens=1000)) as stream:
        next(iter(stream.text_stream))
    assert server.seconds_until_idle("parrot", since=time.monotonic()) < FREED
