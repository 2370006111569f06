"""Replicas that look well and fail what they are given: kept from requests, tried again, refused for at once."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import httpx
from tests.integration.router_world import CHAT, World, eventually

from quire_schemas import signals, wire

RULES = wire.BreakerRules(failures=3, pause=1.5, longest=2.0)
PATIENT = wire.BreakerRules(failures=3, pause=60.0, longest=60.0)


async def serve(world: World, *names: str, rules: wire.BreakerRules = RULES, **more: Any) -> list[Any]:
    engines = [await world.engine(name) for name in names]
    await world.table(world.route(*(each.endpoint() for each in engines), breaker=rules, **more))
    await world.connected(*names)
    return engines


async def ask(world: World, http: httpx.AsyncClient, **more: Any) -> httpx.Response:
    return await http.post(f"{world.url}/v1/chat/completions", json={**CHAT, "max_tokens": 4, **more}, timeout=20)


async def states(world: World) -> dict[str, str]:
    status = await world.control(wire.GetRouterStatus())
    return {load.replica_id: load.breaker for load in status.replicas}


def quiet(world: World) -> None:
    """The failures that a test has asked for are in the log, and the fixture looks for others."""
    (world.folder / "router.log").write_text("")


async def test_a_replica_that_fails_its_requests_gets_no_more_until_one_goes_well(world: World) -> None:
    bad, _ = await serve(world, "bad", "good")
    bad.fail_with = "internal_error"
    async with httpx.AsyncClient() as http:
        failed = 0
        while (await states(world))["bad"] == "closed":
            failed += (await ask(world, http)).status_code == 500
        assert failed == 3
        assert (await states(world)) == {"bad": "open", "good": "closed"}
        metrics = await world.metrics()
        of = '{model="tiny",replica="%s"}'
        assert [metrics[signals.REPLICA_TRIPPED + of % name] for name in ("bad", "good")] == [1.0, 0.0]
        assert metrics[f'{signals.REPLICA_EJECTIONS}_total{{model="tiny",reason="tripped"}}'] == 1
        before = len(bad.generates)
        for _ in range(6):
            assert (await ask(world, http)).status_code == 200
        assert len(bad.generates) == before

        async def tried() -> bool:
            await ask(world, http)
            return len(bad.generates) > before

        await eventually(tried)
        assert len(bad.generates) == before + 1, "one alone, and it failed"
        assert (await ask(world, http)).status_code == 200
        bad.fail_with = None

        async def closed() -> bool:
            assert (await ask(world, http)).status_code == 200
            return (await states(world))["bad"] == "closed"

        await eventually(closed)
    quiet(world)


async def test_a_replica_that_dies_of_each_request_and_comes_back_is_left_alone(world: World) -> None:
    dying, good = await serve(world, "dying", "good", rules=PATIENT)
    dying.die_after = 1
    async with httpx.AsyncClient() as http:
        while (await states(world))["dying"] == "closed":
            await world.connected("dying")
            assert (await ask(world, http)).status_code == 200, "it goes to the other one"
        await world.connected("dying")
        deaths = len(dying.generates)
        answers = await asyncio.gather(*(ask(world, http) for _ in range(8)))
    assert [answer.status_code for answer in answers] == [200] * 8
    assert len(dying.generates) == deaths == 3
    assert len(good.generates) >= 8


async def test_where_all_replicas_fail_nobody_waits_for_his_deadline(world: World) -> None:
    one, two = await serve(world, "one", "two", max_queue_wait=30.0)
    spare = await world.engine("spare")
    routes = [
        wire.TrafficRoute(
            "r", ("alias",), 5, (wire.Backend("tiny", 1),), fallbacks=(wire.Fallback("spare", ("Unavailable",)),)
        )
    ]
    rules = {"max_queue_wait": 30.0, "breaker": PATIENT}
    endpoints = [each.endpoint() for each in (one, two)]
    await world.table(
        world.route(*endpoints, **rules),
        world.route(spare.endpoint(), model="spare", names=("spare",)),
        routes=routes,
    )
    await world.connected("one", "two", "spare")
    for engine in (one, two):
        engine.fail_with = "internal_error"
    async with httpx.AsyncClient() as http:

        async def all_open() -> bool:
            await ask(world, http)
            found = await states(world)
            return {found["one"], found["two"]} == {"open"}

        await eventually(all_open)
        began = time.monotonic()
        refused = await ask(world, http)
        assert time.monotonic() - began < 2
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "service_unavailable")
        assert 40 < int(refused.headers["retry-after"]) <= 72, "until somebody is tried"
        assert refused.headers["x-should-retry"] == "true"
        stepped_in = await ask(world, http, model="alias")
        assert (stepped_in.status_code, stepped_in.headers["x-quire-model"]) == (200, "spare")
        assert len(one.generates) + len(two.generates) == 6
        for engine in (one, two):
            engine.fail_with = None
        await world.table(world.route(*endpoints, breaker=RULES))  # hot; what opened stays so until its time
        assert (await ask(world, http)).status_code == 503
        fresh = [wire.ReplicaEndpoint(each.replica_id, 2, str(each.socket)) for each in (one, two)]
        for engine in (one, two):
            await engine.stop()
            engine.incarnation = 2
            await engine.start()
        await world.table(world.route(*fresh, breaker=RULES))
        await world.connected("one", "two")
        assert (await ask(world, http)).status_code == 200, "a new process is tried at once"
    quiet(world)
