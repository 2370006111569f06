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


def test_models_are_listed_page_by_page_in_the_client_s_own_shapes(asking: anthropic.Anthropic) -> None:
    pages = [model.id for model in asking.models.list(limit=1)]
    whole = asking.models.list()
    assert pages == [model.id for model in whole.data]
    assert {"tiny", "parrot"} <= set(pages)
    assert (whole.has_more, whole.first_id, whole.last_id) == (False, pages[0], pages[-1])
    before = asking.models.list(limit=1, before_id=pages[-1])
    assert [model.id for model in before.data] == [pages[-2]]
    one = asking.models.retrieve("parrot")
    assert (one.type, one.display_name, one.lifecycle) == ("model", "parrot", "active")
    assert one.created_at.tzinfo is not None
    assert {model.id for model in asking.beta.models.list()} == set(pages)
    with pytest.raises(anthropic.NotFoundError) as lost:
        asking.models.retrieve("third")
    assert (lost.value.type, lost.value.error_code) == ("not_found_error", "model_not_found")
    with pytest.raises(anthropic.BadRequestError, match="limit"):
        asking.models.list(limit=5000)


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


def test_the_tool_runner_calls_tools_until_there_is_an_answer(asking: anthropic.Anthropic) -> None:
    cities: list[str] = []

    @anthropic.beta_tool
    def weather(city: str) -> str:
        """The weather in a city."""
        cities.append(city)
        return "sunny"

    runner = asking.beta.messages.tool_runner(**asked(CALL, tools=[weather]))
    last = runner.until_done()
    assert cities == ["Graz"]
    assert [block.text for block in last.content if block.type == "text"] == ["sunny"]


@pytest.mark.parametrize(
    ("arguments", "kind"),
    [
        ('{"city":"Os', "text"),
        ('{"city":NaN}', "text"),
        ("[1]", "text"),
        ('{"city":1e999}', "tool_use"),
        ('{"city":"Rom","city":"Oslo"}', "tool_use"),
        ('{"city":1.0,"days":1e2}', "tool_use"),
    ],
)
def test_odd_arguments_never_become_another_call(asking: anthropic.Anthropic, arguments: str, kind: str) -> None:
    call = f'<tool_call>{{"name":"weather","arguments":{arguments}</tool_call>'
    whole = asking.messages.with_raw_response.create(**asked(call, tools=TOOLS)).text()
    [block] = json.loads(whole)["content"]
    assert block["type"] == kind
    assert arguments in block["text"] if kind == "text" else f'"input":{arguments}' in whole
    with asking.messages.stream(**asked(call, tools=TOOLS)) as stream:
        deltas = [event.delta for event in stream if event.type == "content_block_delta"]
    written = "".join(delta.partial_json for delta in deltas if delta.type == "input_json_delta")
    assert written.startswith(arguments)


def test_arguments_that_were_cut_off_are_as_far_as_they_got(asking: anthropic.Anthropic) -> None:
    arguments = '{"city":"Oslo","day":"the day after tomorrow, if then"}'
    call = f'<tool_call>{{"name":"weather","arguments":{arguments}}}</tool_call>'
    for fields in ({"max_tokens": 30}, {"stop_sequences": ["morrow"]}):
        cut = asking.messages.create(**asked(call, tools=TOOLS, **fields))
        [use] = [block for block in cut.content if block.type == "tool_use"]
        assert use.input == {"city": "Oslo"}
        assert cut.stop_reason in ("max_tokens", "stop_sequence")


def test_leaving_a_stream_frees_the_engine(asking: anthropic.Anthropic, server: Server) -> None:
    with asking.messages.stream(**asked(LENGTHY, max_tokens=1000)) as stream:
        next(iter(stream.text_stream))
    assert server.seconds_until_idle("parrot", since=time.monotonic()) < FREED
