"""A router of several processes on one port: what they share is counted once, and one that is killed takes nothing
of it along.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.effort import times
from tests.integration.router_world import CHAT, TEXT, World, end_world, eventually, make_world
from tests.integration.test_router_access import headed, tenant

from quire_schemas import signals, wire
from quire_schemas.keys import new_key

TEAM, OTHER = new_key(), new_key()
COUNT = 2
LONG = {**CHAT, "max_tokens": 400, "stream": True}


@pytest.fixture(scope="module")
def made() -> Iterator[World]:
    with tempfile.TemporaryDirectory(prefix="qr") as name:
        world = make_world(Path(name), workers=COUNT)
        yield world
        pids = [each.pid for each in world.wait_for_workers(COUNT)]
        end_world(world)
        assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
        log = (world.folder / "router.log").read_text()
        assert "Traceback" not in log, log


@pytest.fixture
async def crew(made: World) -> AsyncIterator[World]:
    """A router with two workers, and an empty table before and after."""
    yield made
    for engine in made.engines:
        await engine.stop()
    made.engines.clear()
    await made.table()


async def pids(world: World) -> list[int]:
    return [each.pid for each in (await world.control(wire.GetRouterStatus())).workers]


def who_has(world: World, port: int, among: list[int]) -> int:
    """The process that has the connection which a client has from `port`."""
    ours, theirs = f":{world.port:04X}", f":{port:04X}"
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    (inode,) = [row[9] for row in rows if row[1].endswith(ours) and row[2].endswith(theirs)]
    for pid in among:
        for fd in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):
                if os.readlink(fd) == f"socket:[{inode}]":
                    return pid
    raise AssertionError("nobody has taken the connection")


@contextlib.asynccontextmanager
async def clients(world: World) -> AsyncIterator[list[httpx.AsyncClient]]:
    """A client whose connection each worker has, the head's first."""
    found: dict[int, httpx.AsyncClient] = {}
    among = await pids(world)
    async with contextlib.AsyncExitStack() as stack:
        for _ in range(300):
            http = await stack.enter_async_context(httpx.AsyncClient(base_url=world.url, timeout=20))
            async with http.stream("GET", "/livez") as answer:
                port = answer.extensions["network_stream"].get_extra_info("client_addr")[1]
                found.setdefault(who_has(world, port, among), http)
                await answer.aread()
            if len(found) == COUNT:
                yield [found[pid] for pid in among]
                return
        raise AssertionError(f"only {len(found)} of {COUNT} workers took one of 300 connections")


async def chat(http: httpx.AsyncClient, key: str = "", **changes: Any) -> httpx.Response:
    headers = headed(key) if key else {}
    return await http.post("/v1/chat/completions", json={**CHAT, "max_tokens": 5, **changes}, headers=headers)


async def test_each_worker_answers_and_any_of_them_tells_the_sums(crew: World) -> None:
    engine = await crew.engine()
    await crew.serve(engine)
    before = await crew.metrics()
    async with clients(crew) as two:
        for number, http in enumerate(two):
            for _ in range(number + 1):
                answer = await chat(http)
                assert answer.status_code == 200, answer.text
                assert TEXT.startswith(answer.json()["choices"][0]["message"]["content"][:5])
        told = [(await http.get("/metrics")).text for http in two]
    series = f'{signals.REQUESTS}_total{{finish="length",model="tiny",operation="chat"}}'
    for text in told:
        values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
        assert float(values[series]) - before[series] == 3, text
        assert float(values[f'{signals.GENERATION_TOKENS}_total{{model="tiny"}}']) == 15
        assert float(values[f'{signals.E2E_LATENCY}_count{{model="tiny"}}']) == 3
    assert {line.rsplit(" ", 1)[0] for line in told[0].splitlines()} == {
        line.rsplit(" ", 1)[0] for line in told[1].splitlines()
    }


async def test_a_limit_of_requests_lets_exactly_as_many_through_over_all_workers(crew: World) -> None:
    engine = await crew.engine()
    limit = wire.AccessLimit("policy", requests=7, per=3_600_000)
    team = tenant("team", TEAM, limits=(limit,))
    await crew.table(crew.route(engine.endpoint()), access=(team,))
    await crew.connected(engine.replica_id)
    async with clients(crew) as two:
        answers = await asyncio.gather(*(chat(two[number % COUNT], TEAM) for number in range(20)))
    codes = sorted(answer.status_code for answer in answers)
    assert codes == [200] * 7 + [429] * 13
    assert {answer.headers["x-ratelimit-limit-requests"] for answer in answers} == {"7"}
    assert {answer.headers["x-ratelimit-remaining-requests"] for answer in answers if answer.is_error} == {"0"}
    assert all("retry-after" in answer.headers for answer in answers if answer.is_error)


async def test_a_limit_of_concurrency_is_exact_over_all_workers(crew: World) -> None:
    engine = await crew.engine(pace=0.02)
    team = tenant("team", TEAM, limits=(wire.AccessLimit("key", concurrency=3),))
    await crew.table(crew.route(engine.endpoint()), access=(team,))
    await crew.connected(engine.replica_id)
    async with clients(crew) as two:
        for _ in range(times(2, 40)):
            first = [asyncio.create_task(chat(two[n % COUNT], TEAM, max_tokens=30)) for n in range(8)]
            codes = sorted(answer.status_code for answer in await asyncio.gather(*first))
            assert codes == [200] * 3 + [429] * 5
    assert max(len(engine.generates), 3) == 3 * times(2, 40)


async def test_places_in_a_models_queue_are_counted_over_all_workers(crew: World) -> None:
    engine = await crew.engine(pace=0.02, max_num_seqs=2)
    await crew.serve(engine, max_queue_length=3)
    async with clients(crew) as two:
        for _ in range(times(2, 40)):
            asked = [asyncio.create_task(chat(two[n % COUNT], max_tokens=20)) for n in range(12)]
            answers = await asyncio.gather(*asked)
            assert sorted(answer.status_code for answer in answers) == [200] * 5 + [429] * 7
            assert {answer.json()["error"]["code"] for answer in answers if answer.is_error} == {"queue_full"}


async def test_requests_go_where_the_burden_of_all_workers_is_least(crew: World) -> None:
    engines = [await crew.engine(f"r{n}", pace=0.05) for n in range(4)]
    await crew.serve(*engines)
    async with clients(crew) as two, contextlib.AsyncExitStack() as stack:
        for n in range(8):
            body = {**LONG, "messages": [{"role": "user", "content": f"number {n}"}]}
            await stack.enter_async_context(two[n % COUNT].stream("POST", "/v1/chat/completions", json=body))
        assert [len(engine.running) for engine in engines] == [2, 2, 2, 2]
        status = await crew.control(wire.GetRouterStatus())
        assert [load.in_flight for load in status.replicas] == [2, 2, 2, 2]


async def test_a_killed_worker_gives_all_that_it_held_back_and_is_followed_by_another(crew: World) -> None:
    engine = await crew.engine(pace=0.02, max_num_seqs=4)
    team = tenant("team", TEAM, limits=(wire.AccessLimit("policy", concurrency=4),))
    await crew.table(crew.route(engine.endpoint(), max_queue_length=0), access=(team,))
    await crew.connected(engine.replica_id)
    before = await crew.metrics()
    head, victim = await pids(crew)
    async with clients(crew) as (mine, its), contextlib.AsyncExitStack() as stack:
        assert (await chat(its, TEAM)).status_code == 200
        told = await crew.metrics()

        async def begin(http: httpx.AsyncClient) -> AsyncIterator[str]:
            ask = http.stream("POST", "/v1/chat/completions", json=LONG, headers=headed(TEAM))
            lines = (await stack.enter_async_context(ask)).aiter_lines()
            await anext(lines)
            return lines

        kept = [await begin(mine) for _ in range(2)]
        lost = [await begin(its) for _ in range(2)]
        assert (await chat(mine, TEAM)).status_code == 429
        os.kill(victim, signal.SIGKILL)
        for lines in lost:
            with pytest.raises(httpx.RemoteProtocolError):
                async for _ in lines:
                    pass

        async def has_room() -> bool:
            return (await chat(mine, TEAM)).status_code == 200

        await eventually(has_room)  # its places, at the policy and at the model
        assert len(engine.running) == 2
        second = await asyncio.to_thread(crew.wait_for_workers, COUNT)
        assert second[0].pid == head
        assert victim not in [each.pid for each in second]
        for lines in kept:
            assert [line async for line in lines][-2:] == ["data: [DONE]", ""]
    async with clients(crew) as two:
        assert [(await chat(http, TEAM)).status_code for http in two] == [200, 200]
    after = await crew.metrics()
    assert after.keys() == before.keys()
    in_flight = f'{signals.REQUESTS_IN_FLIGHT}{{model="tiny"}}'
    assert after[in_flight] == 0
    fell = [name for name in told if "_total" in name and after[name] < told[name]]
    assert not fell
