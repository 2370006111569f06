"""Tool calls and reasoning through the router: the official client, a real router, real engines.

Exact texts come from the scripted runner; what a grammar forces is shown with the built-in model itself.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from typing import Any, cast

import openai
import pytest
from tests.effort import EFFORT
from tests.integration.engine_process import engine_running
from tests.integration.router_world import World

from quire import builtin
from quire.router.model_metrics import MODES, OUTCOMES
from quire_schemas import signals, wire
from quire_schemas.openai.chat import ChatChunk

ASK: list[Any] = [{"role": "user", "content": "Weather in Paris?"}]
WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
TIME: dict[str, Any] = {"type": "function", "function": {"name": "time", "parameters": {"type": "object"}}}
TOOLS: Any = [WEATHER, TIME]
PARIS = '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris \\"12e\\" 🗼"}}\n</tool_call>'
CLOCK = '<tool_call>\n{"name": "time", "arguments": {}}\n</tool_call>'
THOUGHT = "<think>\nWhere is it?\n</think>\n\n"


@pytest.fixture
async def says(world: World, scripted_spec: wire.EngineSpec) -> AsyncIterator[openai.AsyncOpenAI]:
    """A client of a model that says what it is told to."""
    await world.serve_process(scripted_spec, scripted=True, max_model_len=1024, kv_tokens=2048)
    async with world.client() as client:
        yield client


@pytest.fixture(scope="module")
def real_spec() -> Iterator[wire.EngineSpec]:
    with engine_running(model_dir=str(builtin.path("tiny")), max_model_len=1024) as spec:
        yield spec


@pytest.fixture
async def model(world: World, real_spec: wire.EngineSpec) -> AsyncIterator[openai.AsyncOpenAI]:
    """A client of the built-in model."""
    await world.serve_process(real_spec, max_model_len=1024, kv_tokens=2048)
    async with world.client() as client:
        yield client


async def streamed(client: openai.AsyncOpenAI, **options: Any) -> dict[str, Any]:
    """What the events of a stream add up to, as the message of a whole answer has it."""
    message: dict[str, Any] = {"content": None, "reasoning": None, "calls": []}
    async for chunk in await client.chat.completions.create(model="tiny", stream=True, **options):
        ChatChunk.model_validate(chunk.to_dict())
        [choice] = chunk.choices
        delta = choice.delta.to_dict()
        for name in ("content", "reasoning"):
            if delta.get(name):
                message[name] = (message[name] or "") + str(delta[name])
        for call in choice.delta.tool_calls or ():
            assert call.function is not None
            if call.id is not None:
                assert call.index == len(message["calls"])
                message["calls"].append({"name": call.function.name, "arguments": ""})
            message["calls"][call.index]["arguments"] += call.function.arguments or ""
        message["finish"] = choice.finish_reason
    return message


async def whole(client: openai.AsyncOpenAI, **options: Any) -> dict[str, Any]:
    answer = await client.chat.completions.create(model="tiny", **options)
    [choice] = answer.choices
    calls = [
        {"name": call.function.name, "arguments": call.function.arguments}
        for call in choice.message.tool_calls or ()
        if call.type == "function"
    ]
    told = choice.message.to_dict()
    assert told.get("reasoning") == told.get("reasoning_content")
    content = choice.message.content or None
    return {
        "content": content,
        "reasoning": told.get("reasoning"),
        "calls": calls,
        "finish": choice.finish_reason,
    }


PARIS_CALL = {"name": "weather", "arguments": '{"city": "Paris \\"12e\\" 🗼"}'}
CLOCK_CALL = {"name": "time", "arguments": "{}"}


@pytest.mark.parametrize(
    ("script", "content", "reasoning", "calls"),
    [
        ("Just text.", "Just text.", None, []),
        (PARIS, None, None, [PARIS_CALL]),
        (f"{PARIS}\n{CLOCK}", None, None, [PARIS_CALL, CLOCK_CALL]),
        (f"{THOUGHT}Let me look.\n{CLOCK}", "Let me look.", "Where is it?", [CLOCK_CALL]),
        (f"{THOUGHT}Here.", "Here.", "Where is it?", []),
    ],
    ids=["text", "call", "two calls", "thought, text and call", "thought and text"],
)
async def test_calls_and_thoughts_are_told_apart_whole_and_streamed(
    world: World,
    says: openai.AsyncOpenAI,
    script: str,
    content: str | None,
    reasoning: str | None,
    calls: list[Any],
) -> None:
    expected = {
        "content": content,
        "reasoning": reasoning,
        "calls": calls,
        "finish": "tool_calls" if calls else "stop",
    }
    options: dict[str, Any] = {"messages": ASK, "tools": TOOLS, "extra_body": {"script": script}}
    before = await read_for_calls(world)
    assert await whole(says, **options) == expected
    assert await streamed(says, **options) == expected
    outcome = "tool_call" if calls else "no_tool_call"
    assert await read_for_calls(world) - before == Counter({(mode, outcome): 1 for mode in MODES}), "each once"


async def read_for_calls(world: World) -> Counter[tuple[str, str]]:
    """How many answers were, by mode and outcome."""
    name, found = signals.TOOL_CALL_PARSER_INVOCATIONS, await world.metrics()
    of = 'mode="{}",model="tiny",operation="chat",outcome="{}"'
    return Counter(
        {
            (mode, outcome): int(found[f"{name}_total{{{of.format(mode, outcome)}}}"])
            for mode in MODES
            for outcome in OUTCOMES
        }
    )


async def test_without_tools_their_markup_is_text(world: World, says: openai.AsyncOpenAI) -> None:
    before = await read_for_calls(world)
    for options in ({}, {"tools": TOOLS, "tool_choice": "none"}):
        answer = await whole(says, messages=ASK, extra_body={"script": PARIS}, **options)
        assert (answer["content"], answer["calls"], answer["finish"]) == (PARIS, [], "stop")
    assert await read_for_calls(world) == before, "nobody looked for calls"


async def test_a_manifest_says_how_the_model_writes(world: World, scripted_spec: wire.EngineSpec) -> None:
    """What its template shows is overridden, from one table to the next."""
    said = {"messages": ASK, "tools": TOOLS, "extra_body": {"script": f"<think>a</think>{CLOCK}"}}
    bare = {**said, "extra_body": {"script": '[weather(city="Paris", days=2)]'}}
    options: dict[str, Any] = {"scripted": True, "max_model_len": 1024, "kv_tokens": 2048}
    await world.serve_process(scripted_spec, **options, reasoning_dialect="none")
    async with world.client() as client:
        answer = await whole(client, **said)
        assert (answer["content"], answer["reasoning"], answer["calls"]) == (
            "<think>a</think>",
            None,
            [CLOCK_CALL],
        )
        await world.serve_process(scripted_spec, **options, tool_dialect="pythonic")
        answer = await whole(client, **said)
        assert (answer["content"], answer["reasoning"], answer["calls"]) == (CLOCK, "a", [])
        assert (await whole(client, **bare))["calls"] == [
            {"name": "weather", "arguments": '{"city": "Paris", "days": 2}'}
        ]
        await world.serve_process(scripted_spec, **options, tool_dialect="none")
        with pytest.raises(openai.BadRequestError, match=r"spec\.parsers\.tools"):
            await whole(client, **said)


async def test_one_call_at_most_ends_the_answer_before_the_second(says: openai.AsyncOpenAI) -> None:
    options: dict[str, Any] = {
        "messages": ASK,
        "tools": TOOLS,
        "parallel_tool_calls": False,
        "extra_body": {"script": f"{PARIS}\n{CLOCK}"},
    }
    for answer in (await whole(says, **options), await streamed(says, **options)):
        assert (answer["calls"], answer["finish"]) == ([PARIS_CALL], "tool_calls")


async def test_an_answer_that_is_cut_off_says_length(says: openai.AsyncOpenAI) -> None:
    options: dict[str, Any] = {"messages": ASK, "tools": TOOLS, "max_tokens": 16, "extra_body": {"script": PARIS}}
    for answer in (await whole(says, **options), await streamed(says, **options)):
        assert answer["finish"] == "length"
        [call] = answer["calls"]
        assert call["name"] == "weather"
        assert PARIS_CALL["arguments"].startswith(call["arguments"])
        assert call["arguments"] != PARIS_CALL["arguments"]


async def test_reasoning_is_hidden_or_left_in_the_text_on_request(says: openai.AsyncOpenAI) -> None:
    script = f"{THOUGHT}Here."
    hidden = {"messages": ASK, "extra_body": {"script": script, "include_reasoning": False}}
    for answer in (await whole(says, **hidden), await streamed(says, **hidden)):
        assert (answer["content"], answer["reasoning"]) == ("Here.", None)
    raw = {"messages": ASK, "extra_body": {"script": script, "separate_reasoning": False}}
    for answer in (await whole(says, **raw), await streamed(says, **raw)):
        assert (answer["content"], answer["reasoning"]) == (script, None)


async def test_tokens_of_thoughts_are_counted(says: openai.AsyncOpenAI) -> None:
    answer = await says.chat.completions.create(
        model="tiny", messages=ASK, extra_body={"script": f"{THOUGHT}Here."}
    )
    assert answer.usage is not None
    details = answer.usage.completion_tokens_details
    assert details is not None
    assert details.reasoning_tokens is not None
    assert 3 <= details.reasoning_tokens < answer.usage.completion_tokens - 2


async def test_a_conversation_goes_on_behind_its_calls(world: World, says: openai.AsyncOpenAI) -> None:
    first = await says.chat.completions.create(
        model="tiny", messages=ASK, tools=TOOLS, extra_body={"script": PARIS}
    )
    call = first.choices[0].message
    assert call.tool_calls
    answer = await says.chat.completions.create(
        model="tiny",
        messages=[
            *ASK,
            cast(Any, call.model_dump(exclude_none=True)),
            {"role": "tool", "tool_call_id": call.tool_calls[0].id, "content": "sunny"},
        ],
        tools=TOOLS,
        extra_body={"script": "It is sunny.", "return_token_ids": True},
    )
    assert answer.choices[0].message.content == "It is sunny."


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
async def test_a_call_that_is_required_comes(model: openai.AsyncOpenAI, stream: bool) -> None:
    ask: list[Any] = [{"role": "user", "content": "What is the capital of France?"}]
    take = streamed if stream else whole
    options: dict[str, Any] = {"messages": ask, "tools": TOOLS, "temperature": 0, "max_tokens": 120}
    free = await take(model, **options)
    assert free["calls"] == []
    required = await take(model, tool_choice="required", **options)
    assert required["finish"] == "tool_calls"
    assert required["calls"][0]["name"] in ("weather", "time")
    for name in ("weather", "time"):
        named = await take(model, tool_choice={"type": "function", "function": {"name": name}}, **options)
        [call] = named["calls"]
        assert call["name"] == name
        given = json.loads(call["arguments"])
        assert isinstance(given, dict)
        if name == "weather":
            assert isinstance(given["city"], str)
    allowed = {
        "type": "allowed_tools",
        "allowed_tools": {"mode": "required", "tools": [{"type": "function", "function": {"name": "time"}}]},
    }
    assert (await take(model, tool_choice=allowed, **options))["calls"][0]["name"] == "time"


async def test_a_model_that_thinks_may_do_so_before_what_it_is_held_to(model: openai.AsyncOpenAI) -> None:
    sums: list[Any] = [{"role": "user", "content": "What is 12 + 34?"}]
    schema = {
        "type": "object",
        "properties": {"sum": {"type": "integer", "maximum": 99}},
        "required": ["sum"],
        "additionalProperties": False,
    }
    answer = await whole(
        model,
        messages=sums,
        temperature=0,
        max_tokens=200,
        reasoning_effort="high",
        response_format={"type": "json_schema", "json_schema": {"name": "sum", "schema": schema}},
    )
    assert answer["reasoning"]
    assert isinstance(json.loads(answer["content"])["sum"], int)
    for more in ({}, {"reasoning_effort": "none"}):  # it is not lured into a thought that nobody asked for
        plain = await whole(
            model,
            messages=sums,
            temperature=0,
            max_tokens=200,
            response_format={"type": "json_schema", "json_schema": {"name": "sum", "schema": schema}},
            **more,
        )
        assert plain["reasoning"] is None
        assert isinstance(json.loads(plain["content"])["sum"], int)


async def test_a_shape_beside_tools_is_an_answer_or_a_call(model: openai.AsyncOpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"a": {"type": "boolean"}},
        "required": ["a"],
        "additionalProperties": False,
    }
    answer = await whole(
        model,
        messages=ASK,
        tools=TOOLS,
        temperature=0,
        max_tokens=120,
        response_format={"type": "json_schema", "json_schema": {"name": "a", "schema": schema}},
    )
    if answer["calls"]:
        assert answer["content"] is None
    else:
        assert isinstance(json.loads(answer["content"])["a"], bool)


@pytest.mark.parametrize(
    ("asked", "param"),
    [
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
        ({"tools": [WEATHER, WEATHER]}, "tools"),
        ({"tools": [{"type": "custom", "custom": {"name": "a"}}]}, "tools[0].type"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": "some"}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": "required", "response_format": {"type": "json_object"}}, "tool_choice"),
        ({"reasoning_effort": "much"}, "reasoning_effort"),
        ({"functions": [{"name": "f"}]}, "functions"),
    ],
    ids=["name", "twice", "kind", "no tools", "unknown function", "mode", "call and shape", "effort", "old name"],
)
async def test_what_is_wrong_with_tools_is_said_by_name(
    says: openai.AsyncOpenAI, asked: dict[str, Any], param: str
) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        await says.chat.completions.create(model="tiny", messages=ASK, extra_body=asked)
    assert refused.value.param == param


async def test_an_effort_is_a_bound_on_thoughts_or_a_word_for_the_template(model: openai.AsyncOpenAI) -> None:
    sums: list[Any] = [{"role": "user", "content": "What is 12 + 34?"}]
    options: dict[str, Any] = {"messages": sums, "temperature": 0, "max_tokens": 200}
    assert (await whole(model, **options))["reasoning"]
    assert (await whole(model, reasoning_effort="high", **options))["reasoning"]
    assert (await whole(model, reasoning_effort="none", **options))["reasoning"] is None


async def test_a_template_without_tools_refuses_them(world: World) -> None:
    await world.serve(await world.engine())
    async with world.client() as client:
        with pytest.raises(openai.BadRequestError) as refused:
            await client.chat.completions.create(model="tiny", messages=ASK, tools=TOOLS)
    assert refused.value.param == "tools"
    assert "template" in refused.value.message


async def test_no_cut_leaves_markup_in_the_content(says: openai.AsyncOpenAI) -> None:
    script = f"{THOUGHT}Let me look.\n{PARIS}\n{CLOCK}"
    free = await says.chat.completions.create(
        model="tiny", messages=ASK, tools=TOOLS, extra_body={"script": script}
    )
    assert free.usage is not None
    for limit in range(1, free.usage.completion_tokens, 3 if EFFORT == 1 else 1):
        options: dict[str, Any] = {
            "messages": ASK,
            "tools": TOOLS,
            "max_tokens": limit,
            "extra_body": {"script": script},
        }
        answer = await whole(says, **options)
        assert "<" not in (answer["content"] or ""), (limit, answer)
        assert answer["finish"] == "length"
        for call, expected in zip(answer["calls"], (PARIS_CALL, CLOCK_CALL), strict=False):
            assert call["name"] == expected["name"]
            written = call["arguments"].removesuffix("\ufffd")  # of a character that was cut in two
            assert expected["arguments"].startswith(written), (limit, call)
        assert await streamed(says, **options) == answer


async def test_a_stop_string_within_a_call_is_no_call(says: openai.AsyncOpenAI) -> None:
    options: dict[str, Any] = {"messages": ASK, "tools": TOOLS, "extra_body": {"script": PARIS}}
    for take in (whole, streamed):
        assert (await take(says, stop=["Paris"], **options))["finish"] == "stop"
        assert (await take(says, stop=["never"], **options))["finish"] == "tool_calls"
