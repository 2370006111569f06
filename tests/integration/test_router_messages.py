"""Anthropic's Messages API with its official client: a real router and a real scripted engine."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import anthropic
import httpx
import pytest
from tests.integration.router_world import World, eventually
from tests.integration.test_router_tools import CLOCK, PARIS, THOUGHT

from quire_schemas import wire

ASK: list[Any] = [{"role": "user", "content": "Weather in Paris?"}]
TOOLS: list[Any] = [
    {
        "name": "weather",
        "description": "The weather of a city",
        "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
    {"name": "time", "input_schema": {"type": "object"}},
]
PARIS_INPUT = {"city": 'Paris "12e" 🗼'}


@pytest.fixture
async def says(world: World, scripted_spec: wire.EngineSpec) -> AsyncIterator[anthropic.AsyncAnthropic]:
    """A client of a model that repeats the last message, which is how it is told what to say."""
    await world.serve_process(scripted_spec, scripted=True, max_model_len=1024, kv_tokens=2048)
    async with anthropic.AsyncAnthropic(base_url=world.url, api_key="none", max_retries=0, timeout=20) as client:
        yield client


def told(script: str) -> list[Any]:
    return [{"role": "user", "content": script}]


def blocks(message: anthropic.types.Message) -> list[dict[str, Any]]:
    """The content without the ids of calls."""
    return [
        {k: v for k, v in block.to_dict().items() if k not in ("id", "citations")} for block in message.content
    ]


SCRIPTS: list[Any] = [
    pytest.param("Just text.", [{"type": "text", "text": "Just text."}], "end_turn", id="text"),
    pytest.param(
        f"{THOUGHT}Let me look.\n{PARIS}\n{CLOCK}",
        [
            {"type": "thinking", "thinking": "Where is it?", "signature": ""},
            {"type": "text", "text": "Let me look."},
            {"type": "tool_use", "name": "weather", "input": PARIS_INPUT},
            {"type": "tool_use", "name": "time", "input": {}},
        ],
        "tool_use",
        id="thought, text and two calls",
    ),
]


@pytest.mark.parametrize(("script", "content", "reason"), SCRIPTS)
async def test_an_answer_is_the_same_whole_and_streamed(
    says: anthropic.AsyncAnthropic, script: str, content: list[Any], reason: str
) -> None:
    options: dict[str, Any] = {
        "model": "tiny",
        "max_tokens": 200,
        "messages": told(script),
        "tools": TOOLS,
        "thinking": {"type": "adaptive"},
    }
    whole = await says.messages.create(**options)
    assert blocks(whole) == content
    assert whole.stop_reason == reason
    async with says.messages.stream(**options) as stream:
        kinds = [event.type async for event in stream]
        final = await stream.get_final_message()
    assert blocks(final) == content
    assert (final.stop_reason, final.stop_sequence) == (whole.stop_reason, None)
    assert final.usage.output_tokens == whole.usage.output_tokens
    assert (kinds[0], kinds[-1]) == ("message_start", "message_stop")
    counted = await says.messages.count_tokens(model="tiny", messages=told(script), tools=TOOLS)
    for usage in (whole.usage, final.usage):
        assert usage.input_tokens + (usage.cache_read_input_tokens or 0) == counted.input_tokens


async def test_what_nobody_knows_of_blocks_is_left_out_where_the_gateway_says_so(
    world: World, scripted_spec: wire.EngineSpec, says: anthropic.AsyncAnthropic
) -> None:
    told_of = {"type": "text", "text": "Fine.", "foo": 1, "cache_control": {"type": "ephemeral", "foo": 1}}
    thought = {"type": "thinking", "thinking": "hm", "signature": "", "foo": 1}
    asked: Any = [{"role": "user", "content": [told_of]}, {"role": "assistant", "content": [thought]}]
    options: dict[str, Any] = {"model": "tiny", "max_tokens": 50, "messages": [*asked, asked[0]]}
    with pytest.raises(anthropic.BadRequestError, match=r"messages\[0\].content\[0\].*foo"):
        await says.messages.create(**options)
    endpoint = wire.ReplicaEndpoint(scripted_spec.replica_id, scripted_spec.incarnation, scripted_spec.socket)
    changes: dict[str, Any] = {"scripted": True, "max_model_len": 1024, "kv_tokens": 2048}
    route = world.route(endpoint, tokenizer_dir=scripted_spec.model_dir, **changes)
    await world.table(route, ignore_unknown=True)
    assert blocks(await says.messages.create(**options)) == [{"type": "text", "text": "Fine."}]
    named = {"type": "function", "foo": 1, "function": {"name": "time"}}
    choice: Any = {"type": "allowed_tools", "foo": 1, "allowed_tools": {"mode": "auto", "tools": [named]}}
    tools: Any = [{"type": "function", "function": {"name": "time"}}]
    async with world.client() as client:
        answer = await client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "Fine."}], tools=tools, tool_choice=choice
        )
        given: Any = [{"role": "user", "content": [{"type": "text", "text": "Fine.", "foo": 1}]}]
        response = await client.responses.create(model="tiny", input=given)
    assert (answer.choices[0].message.content, response.output_text) == ("Fine.", "Fine.")


async def test_what_ended_an_answer_is_told(says: anthropic.AsyncAnthropic) -> None:
    cut = await says.messages.create(model="tiny", max_tokens=2, messages=told("one two three four"))
    assert (cut.stop_reason, cut.usage.output_tokens) == ("max_tokens", 2)
    stopped = await says.messages.create(
        model="tiny", max_tokens=50, messages=told("one two three four"), stop_sequences=["three", "never"]
    )
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", "three")
    assert blocks(stopped) == [{"type": "text", "text": "one two "}]
    async with says.messages.stream(
        model="tiny", max_tokens=50, messages=told("one two three four"), stop_sequences=["three"]
    ) as stream:
        final = await stream.get_final_message()
    assert (final.stop_reason, final.stop_sequence) == ("stop_sequence", "three")


async def test_turns_with_calls_and_their_results_reach_the_template(
    world: World, says: anthropic.AsyncAnthropic
) -> None:
    messages: list[Any] = [
        *ASK,
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "hm", "signature": "x"},
                {"type": "text", "text": "Looking."},
                {"type": "tool_use", "id": "toolu_1", "name": "weather", "input": {"city": "Paris"}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "toolu_1", "content": [{"type": "text", "text": "sunny"}]},
                {"type": "text", "text": "And now?", "cache_control": {"type": "ephemeral"}},
            ],
        },
    ]
    system: Any = [{"type": "text", "text": "Be brief."}]
    answer = await says.messages.create(
        model="tiny",
        max_tokens=20,
        system=system,
        messages=messages,
        metadata={"user_id": "u"},
    )
    assert blocks(answer) == [{"type": "text", "text": "And now?"}]
    chat = [
        {"role": "system", "content": "Be brief."},
        *ASK,
        {
            "role": "assistant",
            "content": "Looking.",
            "tool_calls": [
                {"type": "function", "function": {"name": "weather", "arguments": '{"city": "Paris"}'}},
            ],
        },
        {"role": "tool", "tool_call_id": "toolu_1", "content": "sunny"},
        {"role": "user", "content": "And now?"},
    ]
    async with httpx.AsyncClient(base_url=world.url) as http:
        same = (await http.post("/tokenize", json={"messages": chat})).json()
    assert same["count"] == answer.usage.input_tokens + (answer.usage.cache_read_input_tokens or 0)


async def test_an_answer_goes_on_with_what_was_begun_for_it(says: anthropic.AsyncAnthropic) -> None:
    answer = await says.messages.create(
        model="tiny", max_tokens=20, messages=[*told("Say"), {"role": "assistant", "content": "I say"}]
    )
    assert blocks(answer) == [{"type": "text", "text": "I say"}]


@pytest.mark.parametrize(
    ("body", "status", "kind", "words"),
    [
        ({"max_tokens": 5}, 400, "invalid_request_error", "'messages' is required"),
        ({"messages": ASK}, 400, "invalid_request_error", "'max_tokens' is required"),
        ({"model": "none", "max_tokens": 5, "messages": ASK}, 404, "not_found_error", "none"),
        ({"max_tokens": 5, "messages": ASK, "mcp_servers": [{}]}, 400, "invalid_request_error", "mcp_servers"),
        ({"max_tokens": 5, "messages": ASK, "max_token": 1}, 400, "invalid_request_error", "Did you mean"),
        (
            {"max_tokens": 5, "messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]},
            400,
            "invalid_request_error",
            "messages[0].content[0]",
        ),
        (
            {"max_tokens": 5000, "messages": ASK},
            400,
            "invalid_request_error",
            "'messages' and 5000 for the answer",
        ),
    ],
    ids=["no messages", "no limit", "model", "refused", "slip", "image", "too long"],
)
async def test_errors_have_the_shape_of_this_api(
    world: World, says: anthropic.AsyncAnthropic, body: dict[str, Any], status: int, kind: str, words: str
) -> None:
    async with httpx.AsyncClient(base_url=world.url) as http:
        answer = await http.post("/v1/messages", json={"model": "tiny", **body})
    assert answer.status_code == status
    told = answer.json()
    assert set(told) == {"type", "error"}
    assert told["type"] == "error"
    assert told["error"]["type"] == kind
    assert words in told["error"]["message"]
    assert answer.headers["request-id"] == answer.headers["x-request-id"]


async def test_a_path_that_is_none_and_a_method_that_is_wrong_have_it_too(world: World) -> None:
    async with httpx.AsyncClient(base_url=world.url) as http:
        for answer in (await http.get("/v1/messages"), await http.post("/v1/messages/batches", json={})):
            assert answer.status_code in (404, 405)
            assert answer.json()["type"] == "error"


async def test_a_stream_whose_engine_dies_ends_in_the_clients_typed_error(world: World) -> None:
    engine = await world.engine(die_after=4)
    await world.serve(engine)
    async with anthropic.AsyncAnthropic(base_url=world.url, api_key="none", max_retries=0, timeout=20) as client:
        with pytest.raises(anthropic.APIStatusError) as broken:
            async with client.messages.stream(model="tiny", max_tokens=50, messages=told("x")) as stream:
                async for _ in stream:
                    pass
    assert json.loads(json.dumps(broken.value.body))["error"]["type"] == "api_error"


async def test_a_client_that_leaves_a_stream_frees_the_engine(world: World) -> None:
    engine = await world.engine(pace=0.02)
    await world.serve(engine)
    async with anthropic.AsyncAnthropic(base_url=world.url, api_key="none", max_retries=0, timeout=20) as client:
        async with client.messages.stream(model="tiny", max_tokens=400, messages=told("x")) as stream:
            async for event in stream:
                if event.type == "text":
                    break

        async def gone() -> bool:
            return not engine.running

        await asyncio.wait_for(eventually(gone), 1)


async def test_thoughts_are_shown_to_those_who_ask(says: anthropic.AsyncAnthropic) -> None:
    options: dict[str, Any] = {"model": "tiny", "max_tokens": 60, "messages": told(f"{THOUGHT}Here.")}
    whole = await says.messages.create(**options)
    assert blocks(whole) == [{"type": "text", "text": "Here."}]
    async with says.messages.stream(**options) as stream:
        assert blocks(await stream.get_final_message()) == blocks(whole)


async def test_a_call_that_is_no_object_is_text_and_no_use_of_a_tool(says: anthropic.AsyncAnthropic) -> None:
    broken = '<tool_call>\n{"name": "time", "arguments": [1]}\n</tool_call>'
    answer = await says.messages.create(model="tiny", max_tokens=60, messages=told(broken), tools=TOOLS)
    assert [block["type"] for block in blocks(answer)] == ["text"]
    assert answer.stop_reason == "end_turn"


async def test_forced_and_forbidden_calls(says: anthropic.AsyncAnthropic) -> None:
    options: dict[str, Any] = {
        "model": "tiny",
        "max_tokens": 80,
        "messages": told(f"{PARIS}\n{CLOCK}"),
        "tools": TOOLS,
    }
    none = await says.messages.create(tool_choice={"type": "none"}, **options)
    assert [block["type"] for block in blocks(none)] == ["text"]
    one = await says.messages.create(tool_choice={"type": "auto", "disable_parallel_tool_use": True}, **options)
    assert [block["type"] for block in blocks(one)] == ["tool_use"]
    with pytest.raises(anthropic.BadRequestError):  # a script cannot be held to a grammar
        await says.messages.create(tool_choice={"type": "any"}, **options)
