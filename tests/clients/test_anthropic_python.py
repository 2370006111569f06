"""The `anthropic` package against the Messages endpoint."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any, Final

import anthropic
import pytest
from tests.clients.features import needs
from tests.clients.server import ENDLESS, Server
from tests.effort import bound

pytestmark = needs("messages")

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


def asked(script: str, **fields: Any) -> dict[str, Any]:
    return {"model": "parrot", "max_tokens": 100, "messages": SAY, "extra_body": {"script": script}, **fields}


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
    counted = asking.messages.count_tokens(model="parrot", messages=SAY)
    assert counted.input_tokens == asking.messages.create(**asked(WORDS)).usage.input_tokens


def test_errors_are_typed(asking: anthropic.Anthropic) -> None:
    with pytest.raises(anthropic.NotFoundError):
        asking.messages.create(model="third", max_tokens=5, messages=SAY)
    with pytest.raises(anthropic.BadRequestError, match="temperature"):
        asking.messages.create(model="parrot", max_tokens=5, messages=SAY, extra_body={"temperature": 9})


@needs("tools")
def test_tools_are_used_whole_and_as_a_stream(asking: anthropic.Anthropic) -> None:
    whole = asking.messages.create(**asked(CALL, tools=TOOLS))
    [use] = [block for block in whole.content if block.type == "tool_use"]
    assert (whole.stop_reason, use.name, use.input) == ("tool_use", "weather", {"city": "Graz"})
    with asking.messages.stream(**asked(CALL, tools=TOOLS)) as stream:
        final = stream.get_final_message()
    assert [block.input for block in final.content if block.type == "tool_use"] == [{"city": "Graz"}]
    result: dict[str, Any] = {"type": "tool_result", "tool_use_id": use.id, "content": "sunny"}
    turns: list[Any] = [
        *SAY,
        {"role": "assistant", "content": whole.content},
        {"role": "user", "content": [result]},
    ]
    assert asking.messages.create(**asked("It is sunny.", tools=TOOLS) | {"messages": turns}).content


def test_leaving_a_stream_frees_the_engine(asking: anthropic.Anthropic, server: Server) -> None:
    endless = {name: value for name, value in ENDLESS.items() if name != "max_tokens"}
    with asking.messages.stream(
        model="parrot", messages=SAY, max_tokens=ENDLESS["max_tokens"], extra_body=endless
    ) as stream:
        next(iter(stream.text_stream))
    assert server.seconds_until_idle("parrot", since=time.monotonic()) < bound(0.3)
