"""Streams whose engine is lost go on at another one, where the manifest lets them: nothing twice, nothing lost."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import openai
import pytest
from tests.integration.router_world import ASK, TEXT, World, events, eventually
from tests.integration.wire_engine import WireEngine

from quire_schemas import signals


async def streamed(client: openai.AsyncOpenAI, **more: Any) -> dict[int, str]:
    """The whole texts of a stream's choices, each of which has come to its end."""
    texts: dict[int, str] = {}
    ended: set[int] = set()
    asked: dict[str, Any] = {"model": "tiny", "messages": ASK, "stream": True, **more}
    async for event in await client.chat.completions.create(**asked):
        for choice in event.choices:
            assert choice.index not in ended
            texts[choice.index] = texts.get(choice.index, "") + (choice.delta.content or "")
            if choice.finish_reason is not None:
                ended.add(choice.index)
    assert ended == set(texts)
    return texts


async def dying(world: World, *after: int | None, **serve: Any) -> list[WireEngine]:
    """Replicas that die once they have sent so many tokens of a request, the first ones first asked."""
    engines = [await world.engine(f"r{number}", die_after=count, pace=0.005) for number, count in enumerate(after)]
    await world.serve(*engines, **{"max_migrations": 3, **serve})
    return engines


async def migrations(world: World) -> float:
    return (await world.metrics()).get(f'{signals.STREAM_MIGRATIONS}_total{{model="tiny"}}', 0.0)


async def test_a_stream_goes_on_behind_what_was_sent(world: World) -> None:
    before = await migrations(world)
    first, second = await dying(world, 5, None)
    async with world.client() as client:
        for _ in range(4):  # whichever of them is asked first
            assert await streamed(client, extra_body={"cache_salt": "mine"}) == {0: TEXT}
    taken_up = [message for message in second.generates if message.written]
    assert taken_up
    for message in taken_up:
        asked = next(
            each for each in first.generates if each.id.rpartition("-")[0] == message.id.rpartition("-")[0]
        )
        assert message.token_ids == asked.token_ids
        assert message.sampling == asked.sampling, "that of the whole answer"
        assert message.cache_salt == asked.cache_salt == "mine", "what it finds cached there is still its own"
        assert list(message.written) == first.script(asked)[: len(message.written)]
        assert len(message.written) >= 5
    assert await migrations(world) - before == len(taken_up)


async def test_usage_and_choices_count_once(world: World) -> None:
    await dying(world, 4, None)
    async with world.client() as client:
        for _ in range(3):
            whole = await client.chat.completions.create(model="tiny", messages=ASK, n=3)
            assert await streamed(client, n=3) == {0: TEXT, 1: TEXT, 2: TEXT}
            last = None
            async for event in await client.chat.completions.create(
                model="tiny", messages=ASK, n=3, stream=True, stream_options={"include_usage": True}
            ):
                last = event
            assert last is not None
            assert last.usage == whole.usage


@pytest.mark.parametrize(
    ("limit", "after", "ends"), [(0, (5, None), False), (1, (5, 9), False), (2, (5, 5, None), True)]
)
async def test_as_often_as_the_manifest_says(
    world: World, limit: int, after: tuple[int | None, ...], ends: bool
) -> None:
    engines = await dying(world, *after, max_migrations=limit)
    async with world.client() as client:
        while True:  # until it begins with the first
            count = len(engines[0].generates)
            problem = None
            try:
                assert await streamed(client) == {0: TEXT}
            except openai.APIError as error:
                problem = error.code
            if len(engines[0].generates) > count and not engines[0].generates[-1].written:
                break
    assert problem == (None if ends else "engine_died")


async def test_one_replica_that_comes_back_takes_its_streams_up(world: World) -> None:
    (engine,) = await dying(world, 6)
    async with world.client() as client:
        asked = asyncio.create_task(streamed(client))
        await eventually(lambda: asyncio.sleep(0, bool(engine.generates)))
        engine.die_after = None if len(engine.generates) > 1 else engine.die_after
        await eventually(lambda: asyncio.sleep(0, len(engine.generates) >= 2))
        engine.die_after = None
        assert await asked == {0: TEXT}


@pytest.mark.parametrize("why", ["another revision", "an older engine"])
async def test_only_what_can_go_on_is_asked_to(world: World, why: str) -> None:
    """A stream of one revision never goes on with the weights of another."""
    other = {"template_hash": "f" * 16} if why == "another revision" else {"goes_on": False}
    engine = await world.engine("a", die_after=5, pace=0.01)
    unfit = await world.engine("b", pace=0.01, **other)
    await world.serve(engine, max_migrations=3)
    async with world.client() as client:
        stream = await client.chat.completions.create(model="tiny", messages=ASK, stream=True)
        with pytest.raises(openai.APIError) as caught:
            async for _ in stream:
                if not unfit.generates:
                    await world.table(
                        world.route(
                            unfit.endpoint(), max_migrations=3, max_queue_wait=1.0,
                            template_hash=unfit.template_hash,
                        )
                    )  # fmt: skip
                    await world.connected("b")
                    await engine.stop()
        assert caught.value.code == "engine_died"
        assert not [message for message in unfit.generates if message.written]
        assert await streamed(client) == {0: TEXT}


async def test_a_stream_whose_engine_stands_still_goes_on_elsewhere(world: World) -> None:
    still, other = await dying(world, None, None)
    async with world.client() as client:
        asked = [asyncio.create_task(streamed(client, max_tokens=400)) for _ in range(4)]

        async def begun() -> bool:
            return any(run.sent for run in still.running.values())

        await eventually(begun)
        still.stalled = True
        for task in asked:
            assert await task == {0: TEXT}
        assert [message for message in other.generates if message.written]
        still.stalled = False
        await eventually(lambda: world.is_ready(2))


async def test_log_probabilities_and_those_of_the_prompt_come_once(world: World) -> None:
    engines = await dying(world, 5, None)
    body: dict[str, Any] = {
        "model": "tiny", "prompt": "one two", "echo": True, "stream": True, "logprobs": 1, "max_tokens": 400
    }  # fmt: skip
    async with world.client() as client:
        whole = await client.completions.create(**{**body, "stream": False})
    for _ in range(3):
        *told, done = events(await world.raw(world.post("/v1/completions", json.dumps(body).encode())))
        assert done == "DONE"
        choices = [choice for event in told for choice in event["choices"]]
        tokens = [token for choice in choices if choice["logprobs"] for token in choice["logprobs"]["tokens"]]
        assert "".join(choice["text"] for choice in choices) == f"one two{TEXT}"
        assert tokens == whole.choices[0].logprobs.tokens
    asked = [message for engine in engines for message in engine.generates]
    assert [message for message in asked if message.written]
    for message in asked:
        assert (message.sampling.prompt_logprobs is None) == bool(message.written)
