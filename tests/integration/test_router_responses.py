"""OpenAI's Responses API with its official client: a real router with its store, and a real scripted engine."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import AsyncIterator
from typing import Any

import httpx
import openai
import pytest
from tests.integration.router_world import World, eventually
from tests.integration.test_router_tools import CLOCK, PARIS, PARIS_CALL, THOUGHT

from quire_schemas import wire

TOOLS: Any = [
    {
        "type": "function",
        "name": "weather",
        "description": "The weather of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        "strict": False,
    },
    {"type": "function", "name": "time", "parameters": {"type": "object"}, "strict": False},
]


@pytest.fixture
async def says(world: World, scripted_spec: wire.EngineSpec) -> AsyncIterator[openai.AsyncOpenAI]:
    """A client of a model that repeats the last message, or says its `script`."""
    await world.serve_process(scripted_spec, scripted=True, max_model_len=1024, kv_tokens=2048)
    async with world.client() as client:
        yield client


def shape(value: Any) -> Any:
    """Items without what is made anew each time, and without what the client adds."""
    if isinstance(value, list):
        return [shape(each) for each in value]
    told = value if isinstance(value, dict | str) else value.to_dict()
    if isinstance(told, str):
        return told
    left_out = ("id", "call_id", "parsed", "parsed_arguments")
    return {
        key: shape(each) if isinstance(each, list) else each
        for key, each in told.items()
        if key not in left_out and each is not None
    }


def words(text: str) -> dict[str, Any]:
    part = {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
    return {"type": "message", "role": "assistant", "status": "completed", "content": [part]}


def thought(text: str) -> dict[str, Any]:
    content = [{"type": "reasoning_text", "text": text}]
    return {"type": "reasoning", "status": "completed", "summary": [], "content": content}


def call(name: str, arguments: str) -> dict[str, Any]:
    return {"type": "function_call", "status": "completed", "name": name, "arguments": arguments}


EVERYTHING = f"{THOUGHT}Let me look.\n{PARIS}\n{CLOCK}"
ITEMS = [
    thought("Where is it?"),
    words("Let me look."),
    call("weather", PARIS_CALL["arguments"]),
    call("time", "{}"),
]


@pytest.mark.parametrize(
    ("script", "items"),
    [("Just text.", [words("Just text.")]), (EVERYTHING, ITEMS)],
    ids=["text", "thought, text and calls"],
)
async def test_a_response_is_the_same_whole_streamed_and_read_again(
    says: openai.AsyncOpenAI, script: str, items: list[Any]
) -> None:
    options: dict[str, Any] = {
        "model": "tiny",
        "input": "hi",
        "tools": TOOLS,
        "metadata": {"a": "b"},
        "instructions": "Be brief.",
        "extra_body": {"script": script},
    }
    whole = await says.responses.create(**options)
    assert (whole.status, whole.metadata, whole.instructions) == ("completed", {"a": "b"}, "Be brief.")
    assert shape(whole.output) == items
    assert whole.usage is not None
    assert whole.usage.total_tokens == whole.usage.input_tokens + whole.usage.output_tokens
    async with says.responses.stream(**options) as stream:
        events = [event async for event in stream]
        final = await stream.get_final_response()
    assert shape(final.output) == items
    assert final.usage is not None
    assert final.usage.output_tokens == whole.usage.output_tokens
    numbers = [event.sequence_number for event in events if hasattr(event, "sequence_number")]
    assert numbers == sorted(set(numbers))
    kinds = [event.type for event in events]
    assert (kinds[:2], kinds[-1]) == (["response.created", "response.in_progress"], "response.completed")
    assert kinds.count("response.output_item.done") == len(items)
    for response in (whole, final):
        again = await says.responses.retrieve(response.id)
        assert again.to_dict() == response.to_dict() | {"output": again.to_dict()["output"]}
        assert shape(again.output) == items


async def test_a_conversation_goes_on_from_a_stored_response(world: World, says: openai.AsyncOpenAI) -> None:
    first = await says.responses.create(
        model="tiny", input="Weather in Paris?", tools=TOOLS, extra_body={"script": PARIS}
    )
    [made] = [item for item in first.output if item.type == "function_call"]
    second = await says.responses.create(
        model="tiny",
        previous_response_id=first.id,
        tools=TOOLS,
        input=[{"type": "function_call_output", "call_id": made.call_id, "output": "sunny"}],
        extra_body={"script": "It is sunny."},
    )
    third = await says.responses.create(model="tiny", previous_response_id=second.id, input="Thanks!")
    assert (second.output_text, third.output_text) == ("It is sunny.", "Thanks!")
    chat = [
        {"role": "user", "content": "Weather in Paris?"},
        {"role": "assistant", "tool_calls": [{"type": "function", "function": PARIS_CALL}]},
        {"role": "tool", "content": "sunny"},
        {"role": "assistant", "content": "It is sunny."},
        {"role": "user", "content": "Thanks!"},
    ]
    async with httpx.AsyncClient(base_url=world.url) as http:
        same = (await http.post("/tokenize", json={"messages": chat})).json()
    assert third.usage is not None
    assert third.usage.input_tokens == same["count"]
    listed = [item async for item in says.responses.input_items.list(second.id)]
    assert [item.type for item in listed] == ["function_call_output"]


async def test_items_are_referred_to_by_their_ids(says: openai.AsyncOpenAI) -> None:
    first = await says.responses.create(model="tiny", input="hi", extra_body={"script": "Hello there."})
    items: Any = [
        {"role": "user", "content": "hi"},
        {"type": "item_reference", "id": first.output[0].id},
        {"role": "user", "content": "go on"},
    ]
    again = await says.responses.create(model="tiny", input=items)
    direct = await says.responses.create(
        model="tiny",
        input=[
            {"role": "user", "content": "hi"},
            {"role": "assistant", "content": "Hello there."},
            {"role": "user", "content": "go on"},
        ],
    )
    assert again.usage is not None
    assert direct.usage is not None
    assert again.usage.input_tokens == direct.usage.input_tokens
    with pytest.raises(openai.BadRequestError) as unknown:
        await says.responses.create(model="tiny", input=[{"type": "item_reference", "id": "msg_none"}])
    assert unknown.value.param == "input"


async def test_what_a_small_request_stands_for_is_no_larger_than_a_body_may_be(
    world: World, scripted_spec: wire.EngineSpec
) -> None:
    endpoint = wire.ReplicaEndpoint(scripted_spec.replica_id, scripted_spec.incarnation, scripted_spec.socket)
    route = world.route(endpoint, tokenizer_dir=scripted_spec.model_dir, scripted=True, max_model_len=1024)
    world.version += 1
    settings = wire.HttpSettings(max_body_bytes=4096)
    await world.control(wire.RoutingTable(version=world.version, models=(route,), http=settings))
    await world.connected(scripted_spec.replica_id)
    async with world.client() as client:
        first = await client.responses.create(model="tiny", input="hi", extra_body={"script": "word " * 200})
        twice: Any = [{"type": "item_reference", "id": first.output[0].id}] * 2
        go_on: Any = [*twice, *twice, {"role": "user", "content": "go on"}]
        again = await client.responses.create(model="tiny", input=[*twice, {"role": "user", "content": "x"}])
        assert again.status == "completed"
        before = (await client.responses.input_items.list(first.id)).data
        ways: tuple[dict[str, Any], ...] = ({}, {"background": True}, {"stream": True})
        for how in ways:
            with pytest.raises(openai.BadRequestError, match="4096 bytes") as refused:
                await client.responses.create(model="tiny", input=go_on, **how)
            assert refused.value.param == "input"
        with pytest.raises(openai.BadRequestError, match="4096 bytes") as refused:
            await client.responses.input_tokens.count(model="tiny", input=go_on)
        last = first.id
        with pytest.raises(openai.BadRequestError, match="4096 bytes") as refused:
            for _ in range(8):
                script = {"script": "word " * 200}
                last = (
                    await client.responses.create(
                        model="tiny", input="x", previous_response_id=last, extra_body=script
                    )
                ).id
        assert refused.value.param == "previous_response_id"
        assert (await client.responses.input_items.list(first.id)).data == before


async def test_what_is_not_stored_or_is_deleted_cannot_be_gone_on_from(says: openai.AsyncOpenAI) -> None:
    loose = await says.responses.create(model="tiny", input="hi", store=False)
    gone = await says.responses.create(model="tiny", input="hi")
    await says.responses.delete(gone.id)
    for response_id in (loose.id, gone.id):
        with pytest.raises(openai.NotFoundError):
            await says.responses.retrieve(response_id)
        with pytest.raises(openai.BadRequestError) as unknown:
            await says.responses.create(model="tiny", input="x", previous_response_id=response_id)
        assert unknown.value.param == "previous_response_id"


async def test_limits_formats_and_choices(says: openai.AsyncOpenAI) -> None:
    cut = await says.responses.create(model="tiny", input="one two three four five", max_output_tokens=2)
    assert cut.status == "incomplete"
    assert cut.incomplete_details is not None
    assert cut.incomplete_details.reason == "max_output_tokens"
    assert cut.output[0].to_dict()["status"] == "incomplete"
    scored = await says.responses.create(
        model="tiny", input="one two", include=["message.output_text.logprobs"], top_logprobs=1
    )
    [message] = scored.output
    assert message.type == "message"
    part = message.content[0]
    assert part.type == "output_text"
    assert part.logprobs is not None
    assert "".join(entry.token for entry in part.logprobs).startswith("one two")
    one = await says.responses.create(
        model="tiny", input="x", tools=TOOLS, parallel_tool_calls=False, extra_body={"script": f"{PARIS}\n{CLOCK}"}
    )
    assert [item.type for item in one.output] == ["function_call"]
    summed = await says.responses.create(
        model="tiny", input="x", reasoning={"summary": "auto"}, extra_body={"script": f"{THOUGHT}Here."}
    )
    assert summed.output[0].to_dict()["summary"] == [{"type": "summary_text", "text": "Where is it?"}]


@pytest.mark.parametrize(
    ("asked", "param"),
    [
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content[0]"),
        ({"input": [{"role": "user"}]}, "input[0].content"),
        ({"input": [{"role": "user", "content": "x", "bogus": 1}]}, "input[0].bogus"),
        ({"input": [5]}, "input[0]"),
        ({"input": "x", "max_output_tokens": 99999}, "max_output_tokens"),
        ({"input": "x " * 5000}, "input"),
        ({"input": []}, "input"),
        ({"input": "x", "tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"input": "x", "conversation": "c"}, "conversation"),
        ({"input": "x", "truncation": "auto"}, "truncation"),
        ({"input": "x", "background": True, "store": False}, "background"),
        ({"input": "x", "background": True, "stream": True}, "background"),
        ({"input": "x", "max_tokens": 5}, "max_tokens"),
        ({"input": "x", "temprature": 1}, "temprature"),
        ({"input": "x", "tool_choice": "required"}, "tool_choice"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
async def test_what_is_not_honoured_is_refused_by_name(
    says: openai.AsyncOpenAI, asked: dict[str, Any], param: str
) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        await says.post("/responses", body={"model": "tiny", **asked}, cast_to=object)
    assert refused.value.param == param


async def test_what_a_model_wrote_is_kept_whatever_it_is(says: openai.AsyncOpenAI) -> None:
    odd = '<tool_call>\n{"name": "my tool", "arguments": {"a": 1}}\n</tool_call>'
    cut = '<tool_call>\n{"name": "time", "arguments": {"a": '
    for script, arguments in ((odd, '{"a": 1}'), (cut, '{"a": ')):
        first = await says.responses.create(model="tiny", input="x", tools=TOOLS, extra_body={"script": script})
        [made] = first.output
        assert made.type == "function_call"
        assert made.arguments.startswith(arguments)
        output: Any = [{"type": "function_call_output", "call_id": made.call_id, "output": "no"}]
        second = await says.responses.create(
            model="tiny", input=output, previous_response_id=first.id, tools=TOOLS, extra_body={"script": "I see."}
        )
        assert second.output_text == "I see."


async def test_tokens_are_counted_without_an_answer(says: openai.AsyncOpenAI) -> None:
    first = await says.responses.create(model="tiny", input="one two three")
    counted = await says.responses.input_tokens.count(
        model="tiny", input="and four", previous_response_id=first.id
    )
    second = await says.responses.create(model="tiny", input="and four", previous_response_id=first.id)
    assert second.usage is not None
    assert counted.input_tokens == second.usage.input_tokens
    with pytest.raises(openai.NotFoundError) as absent:
        await says.post("/responses/compact", body={}, cast_to=object)
    assert absent.value.code == "endpoint_not_served"


async def test_a_background_response_is_asked_for_until_it_is_there(says: openai.AsyncOpenAI) -> None:
    begun = await says.responses.create(model="tiny", input="one two three", background=True)
    assert begun.status == "queued"

    async def done() -> Any:
        response = await says.responses.retrieve(begun.id)
        return response if response.status == "completed" else None

    response = await eventually(done)
    assert response.output_text == "one two three"
    with pytest.raises(openai.ConflictError):
        other = await says.responses.create(model="tiny", input="x")
        await says.responses.cancel(other.id)
    failed = await says.responses.create(model="tiny", input="x", background=True, max_output_tokens=100_000)

    async def broken() -> Any:
        response = await says.responses.retrieve(failed.id)
        return response if response.status == "failed" else None

    response = await eventually(broken)
    assert response.error.code == "context_length_exceeded"


async def test_a_background_response_is_cancelled_and_the_engine_is_free(world: World) -> None:
    engine = await world.engine(pace=0.05)
    await world.serve(engine)
    async with world.client() as client:
        begun = await client.responses.create(model="tiny", input="x", background=True)

        async def runs() -> bool:
            return bool(engine.running)

        await eventually(runs)
        cancelled = await client.responses.cancel(begun.id)
        assert cancelled.status == "cancelled"

        async def free() -> bool:
            return not engine.running

        await asyncio.wait_for(eventually(free), 1)
        assert (await client.responses.retrieve(begun.id)).status == "cancelled"
        assert (await client.responses.cancel(begun.id)).status == "cancelled"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=["killed", "ended"])
async def test_a_background_response_outlives_the_router(own_world: World, number: int) -> None:
    engine = await own_world.engine(pace=0.02)
    await own_world.serve(engine)
    async with own_world.client() as client:
        begun = await client.responses.create(model="tiny", input="x", background=True)

        async def runs() -> bool:
            return bool(engine.running)

        await eventually(runs)
        began = time.monotonic()
        await asyncio.to_thread(own_world.restart, number)
        assert time.monotonic() - began < 10
        await asyncio.to_thread(own_world.wait_until_up)

        async def done() -> Any:
            try:
                response = await client.responses.retrieve(begun.id)
            except openai.APIConnectionError:
                return None
            return response if response.status == "completed" else None

        response = await eventually(done, 20)
        assert "quick brown fox" in response.output_text


async def test_a_stream_whose_engine_dies_ends_with_one_failed_response(world: World) -> None:
    engine = await world.engine(die_after=4)
    await world.serve(engine)
    kinds: list[str] = []
    async with world.client() as client:
        with pytest.raises((openai.APIError, httpx.RemoteProtocolError)):
            async for event in await client.responses.create(model="tiny", input="x", stream=True):
                kinds.append(event.type)
                if event.type == "response.failed":
                    assert event.response.error is not None
                    assert str(event.response.error.code) == "engine_died"
    assert kinds.count("response.failed") == 1
    assert kinds[-1] == "response.failed"


async def test_a_store_that_cannot_be_written_stops_only_what_is_kept(own_world: World) -> None:
    await own_world.serve(await own_world.engine())
    folder = own_world.folder / "router"
    async with own_world.client() as client:
        await client.responses.create(model="tiny", input="x")
        database = folder / "router.db"
        assert database.exists(), list(folder.iterdir())
        database.rename(folder / "elsewhere.db")
        with pytest.raises(openai.InternalServerError) as refused:
            await client.responses.create(model="tiny", input="x")
        assert refused.value.code == "storage_unavailable"
        assert (await client.responses.create(model="tiny", input="x", store=False)).status == "completed"
