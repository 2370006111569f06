"""Budgets over real sockets: spent, told of, hot, and known again after a kill."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import anthropic
import httpx
import openai
import pytest
from tests.integration.router_world import ASK, World, eventually
from tests.integration.test_router_access import CHAT, TEAM, batch_of, ended, headed, tenant, uploaded

from quire.router.usage import WRITE_SECONDS
from quire_schemas import signals, wire

TALK: dict[str, Any] = {**CHAT, "max_tokens": 5}
PRICES = wire.Prices(input=10**6, cached_input=10**5, output=10**7)
"""A hundred, ten and a thousand for a million tokens."""


def budget(policy: str, name: str = "month", tokens: int | None = 10_000, **more: Any) -> wire.AccessBudget:
    fields: dict[str, Any] = {"scope": "policy", "per": "month", **more}
    return wire.AccessBudget(policy=policy, name=name, tokens=tokens, **fields)


async def serve(world: World, policy: str, *budgets: wire.AccessBudget) -> None:
    """A model with prices, and a policy of the test's own with these budgets: nothing of it was spent."""
    if not world.engines:
        await world.engine(cached=lambda _: 16)
    route = world.route(world.engines[0].endpoint(), prices=PRICES)
    await world.table(route, access=[tenant(policy, TEAM)], budgets=budgets)
    await world.connected(world.engines[0].replica_id)


async def stands(world: World) -> list[wire.BudgetStanding]:
    report = await world.asked(wire.GetUsage("2000-01-01"))
    assert isinstance(report, wire.UsageReport)
    assert report.problem == ""
    return report.budgets


def client_of(world: World, retries: int = 0) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{world.url}/v1", api_key=TEAM, max_retries=retries, timeout=20)


async def test_a_spent_budget_is_what_the_official_clients_know_as_a_quota(world: World) -> None:
    await serve(world, "quota", budget("quota", tokens=31))
    async with client_of(world, retries=5) as client:
        first = await client.chat.completions.with_raw_response.create(**TALK)
        usage = first.parse().usage
        assert usage is not None
        assert "x-quire-budget" not in first.headers, "nothing was spent when it began"
        assert usage.total_tokens < 31
        second = await client.chat.completions.with_raw_response.create(**TALK)
        assert second.status_code == 200, "something is left, so it may go beyond"
        began = time.monotonic()
        with pytest.raises(openai.RateLimitError) as refused:
            await client.chat.completions.create(**TALK)
    answer = refused.value.response
    assert (refused.value.code, refused.value.type) == ("insufficient_quota", "insufficient_quota")
    assert answer.headers["x-should-retry"] == "false"
    assert time.monotonic() - began < 0.4, "no client tries it again"
    assert answer.headers["x-quire-budget"].startswith("month; left=0.00%; until=")
    (shown,) = await stands(world)
    assert (shown.spent, shown.held, shown.state) == (2 * usage.total_tokens, 0, "spent")
    assert abs(int(answer.headers["retry-after"]) - (shown.resets - time.time())) < 5
    async with anthropic.AsyncAnthropic(base_url=world.url, api_key=TEAM, max_retries=0) as claude:
        with pytest.raises(anthropic.RateLimitError):
            await claude.messages.create(model="tiny", messages=ASK, max_tokens=5)
    async with httpx.AsyncClient(base_url=world.url, headers=headed(TEAM)) as http:
        assert (await http.get("/v1/models")).status_code == 200, "what costs nothing goes on"
    status = await world.control(wire.GetRouterStatus())
    assert [(each.name, each.state) for each in status.budgets] == [("month", "spent")]
    ratio = f'{signals.BUDGET_SPENT}{{budget="month",key="",policy="quota"}}'
    assert (await world.metrics())[ratio] == shown.spent / 31
    async with client_of(world) as client:  # what is changed counts what was spent, and holds at once
        more = budget("quota", "day", 1000, per="day", warn_at=100)
        await serve(world, "quota", budget("quota", tokens=shown.spent + 1), more)
        warned = await client.chat.completions.with_raw_response.create(**TALK)
        assert warned.headers["x-quire-budget"].startswith("month; left=")
        assert [each.spent for each in await stands(world)] == [3 * usage.total_tokens] * 2
        await serve(world, "quota", budget("quota", "day", shown.spent, per="day"))
        with pytest.raises(openai.RateLimitError):
            await client.chat.completions.create(**TALK)
        await serve(world, "quota")
        assert (await client.chat.completions.create(**TALK)).choices


@pytest.mark.nightly
async def test_a_router_that_was_killed_knows_what_was_spent(own_world: World) -> None:
    """All but what came in the last seconds."""
    world = own_world
    await serve(world, "team", budget("team", tokens=60))
    async with client_of(world) as client:
        await client.chat.completions.create(**TALK)
        (before,) = await stands(world)
        await client.chat.completions.create(**TALK)
        await asyncio.sleep(WRITE_SECONDS + 0.3)
        world.restart()  # it begins with the table on its disk
        world.wait_until_up()
        (after,) = await stands(world)
        assert (after.spent, after.state) == (2 * before.spent, "spent"), "older than that, it is written"
        with pytest.raises(openai.RateLimitError) as refused:
            await client.chat.completions.create(**TALK)
        assert refused.value.code == "insufficient_quota"


@pytest.mark.nightly
async def test_nobody_spends_what_is_not_known_to_be_left(own_world: World) -> None:
    world = own_world
    await serve(world, "team")
    async with client_of(world) as client:
        await client.chat.completions.create(**TALK)
        await stands(world)  # it is written
        world.process.kill()
        world.process.wait()
        (database,) = world.folder.rglob("router.db")
        aside = database.with_name("aside")
        database.rename(aside)
        database.mkdir()
        world.restart()
        world.wait_until_up()
        await serve(world, "team", budget("team"))
        with pytest.raises(openai.InternalServerError) as unknown:
            await client.chat.completions.create(**TALK)
        assert (unknown.value.status_code, unknown.value.code) == (503, "storage_unavailable")
        await serve(world, "team")
        assert (await client.chat.completions.create(**TALK)).choices, "without a budget nothing has to be known"
        await serve(world, "team", budget("team"))
        database.rmdir()
        aside.rename(database)

        async def served() -> bool:
            try:
                return bool((await client.chat.completions.create(**TALK)).choices)
            except openai.InternalServerError:
                return False

        await eventually(served)
        assert (await stands(world))[0].spent > 60, "what came before it was lost sight of, and since"


async def test_money_is_counted_by_the_prices_of_the_model_and_what_was_cached(world: World) -> None:
    await serve(world, "money", budget("money", "money", None, cost=10**12))
    async with client_of(world) as client:
        usage = (await client.chat.completions.create(**TALK)).usage
    assert usage is not None
    details = usage.prompt_tokens_details
    assert details is not None
    assert details.cached_tokens == 16
    cost = (usage.prompt_tokens - 16) * 10**6 + 16 * 10**5 + usage.completion_tokens * 10**7
    assert [each.spent for each in await stands(world)] == [cost]


async def test_running_requests_hold_what_they_may_need_and_give_it_back(world: World) -> None:
    await serve(world, "holds", budget("holds", tokens=100))
    world.engines[0].pace = 0.05
    async with client_of(world) as client:
        stream = await client.chat.completions.create(**CHAT, max_tokens=400, stream=True)
        await anext(aiter(stream))
        with pytest.raises(openai.RateLimitError) as refused:
            await client.chat.completions.create(**TALK)
        assert refused.value.code == "rate_limit_exceeded", "it may be over in a moment"
        assert refused.value.response.headers["x-should-retry"] == "true"
        assert (await stands(world))[0].held > 400
        await stream.close()

        async def free() -> bool:
            return (await stands(world))[0].held == 0

        await eventually(free)
        world.engines[0].pace = 0.002
        assert (await stands(world))[0].spent < 100
        assert (await client.chat.completions.create(**TALK)).choices


async def test_many_at_once_overdraw_a_budget_by_less_than_one_of_them(world: World) -> None:
    await serve(world, "many", budget("many", tokens=300))
    async with httpx.AsyncClient(base_url=world.url, headers=headed(TEAM), timeout=20) as http:

        async def asking() -> set[str]:
            codes = set[str]()
            while "insufficient_quota" not in codes:
                answer = await http.post("/v1/chat/completions", json={**CHAT, "max_tokens": 20})
                codes.add("ok" if answer.status_code == 200 else answer.json()["error"]["code"])
            return codes - {"ok", "rate_limit_exceeded", "insufficient_quota"}

        assert await asyncio.gather(*(asking() for _ in range(8))) == [set()] * 8
        (shown,) = await stands(world)
        assert 300 <= shown.spent < 300 + 45


async def test_a_batch_rests_at_its_end_and_goes_on_when_it_is_raised(world: World) -> None:
    await serve(world, "batches", budget("batches", tokens=20))
    async with client_of(world) as client:
        batch = await batch_of(client, await uploaded(client, 4))

        async def spent() -> bool:
            return (await stands(world))[0].state == "spent"

        await eventually(spent)
        await asyncio.sleep(0.3)
        found = await client.batches.retrieve(batch.id)
        assert (found.status, found.request_counts and found.request_counts.failed) == ("in_progress", 0)
        await serve(world, "batches", budget("batches"))
        done = await ended(client, batch.id)
        assert (done.status, done.request_counts and done.request_counts.completed) == ("completed", 4)
