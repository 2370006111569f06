"""What a router tells the control plane of its traffic: what autoscaling follows, and how a canary fares."""

from __future__ import annotations

import asyncio
from functools import partial

import openai
import pytest
from tests.integration.router_world import ASK, World, eventually
from tests.integration.test_exam_standins import CANARY, NEW
from tests.integration.wire_engine import WireEngine

from quire_schemas import wire


async def test_queue_time_and_cache_use_are_what_the_engines_say_and_how_long_the_first_has_waited(
    world: World,
) -> None:
    busy, idle = await world.engine("busy", max_num_seqs=1, pace=0.3), await world.engine("idle", max_num_seqs=1)
    await world.serve(busy, on_demand=True)

    async def use() -> wire.ModelUse:
        return (await world.control(wire.GetRouterStatus())).uses["tiny"]

    before = await use()
    assert (before.in_flight, before.queue_time, before.kv_usage, before.ready) == (0, 0.0, 0.0, 1)
    async with world.client() as client:
        asking = [
            asyncio.create_task(client.chat.completions.create(model="tiny", messages=ASK, max_tokens=3))
            for _ in range(3)
        ]

        async def waits() -> wire.ModelUse | None:
            found = await use()
            return found if found.queue_time > 0.2 and found.kv_usage else None

        first = await eventually(waits)
        assert first.in_flight == 3
        assert first.kv_usage == pytest.approx(len(busy.running) * 4 / 64), "the share of its blocks"
        await asyncio.sleep(0.3)
        assert 0.25 < (await use()).queue_time - first.queue_time < 1.0, "of the one that waits for longest"
        await world.table(world.route(busy.endpoint(), idle.endpoint(), on_demand=True))
        await world.connected("idle")

        async def halved() -> bool:
            found = await use()
            return found.ready == 2 and found.kv_usage == pytest.approx(len(busy.running) * 4 / 64 / 2)

        await eventually(halved)  # a mean over replicas, not their sum
        await asyncio.gather(*asking)

    async def idle_again() -> bool:
        found = await use()
        return (found.in_flight, found.queue_time) == (0, 0.0) and found.idle is not None

    await eventually(idle_again)


@pytest.mark.parametrize(
    ("says", "limits", "void"),
    [
        ("", {}, 4),
        ("on and on and on and on and on and on and on and on", {"max_model_len": 40}, 4),
        ("on and on", {}, 0),
    ],
    ids=["empty", "cut by the length of the model", "whole"],
)
async def test_answers_without_text_and_those_that_are_cut_count_against_a_canary(
    world: World, says: str, limits: dict[str, int], void: int
) -> None:
    old, new = await world.engine("old", "well said"), await world.engine("new", says, template_hash=NEW)
    await world.table(world.route(old.endpoint()), world.route(new.endpoint(), **CANARY, percent=50, **limits))
    await world.connected("old", "new")
    async with world.client() as client:
        for _ in range(8):
            await client.chat.completions.create(model="tiny", messages=ASK)

    async def counted() -> wire.Comparison | None:
        found = (await world.control(wire.GetRouterStatus())).canaries["tiny"]
        return found if found.stable.answers + found.new.answers == 8 else None

    found = await eventually(counted)
    assert (found.stable.answers, found.stable.void) == (4, 0)
    assert (found.new.answers, found.new.void, found.new.failed) == (4, void, 0)


async def test_a_prompt_that_no_engine_came_to_is_nobodys_to_pay(world: World) -> None:
    engine = await world.engine(max_num_seqs=1, pace=0.5)
    await world.serve(engine, on_demand=True)

    async def used() -> tuple[int, int]:
        report = await world.asked(wire.GetUsage("2000-01-01"))
        assert isinstance(report, wire.UsageReport)
        return sum(row.requests for row in report.rows), sum(row.prompt_tokens for row in report.rows)

    async def is_queued() -> bool:
        return (await world.control(wire.GetRouterStatus())).uses["tiny"].queue_time > 0

    requests, tokens = await used()
    async with world.client() as client:
        ask = partial(client.chat.completions.create, model="tiny", messages=ASK)
        at_work = asyncio.create_task(ask(max_tokens=40))
        await eventually(lambda: has_been_given(engine, 1))
        queued = [asyncio.create_task(ask(max_tokens=1)) for _ in range(2)]
        late = asyncio.create_task(ask(max_tokens=1, extra_body={"timeout": 1.5}))
        await eventually(lambda: has_been_given(engine, 4))
        await eventually(is_queued)
        with pytest.raises(openai.APIStatusError) as refused:
            await late
        assert refused.value.status_code == 504
        for task in (*queued, at_work):
            task.cancel()

        async def told() -> bool:
            return (await used())[0] == requests + 4

        await eventually(told)
    assert (await used())[1] - tokens == len(engine.generates[0].token_ids), (
        "who left the engine at work has used it"
    )


async def has_been_given(engine: WireEngine, count: int) -> bool:
    return len(engine.generates) == count
