"""A router of several processes on one port: what they share is counted once, and one that is killed takes nothing
of it along.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import os
import signal
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.effort import times
from tests.integration.router_world import CHAT, TEXT, World, a_world, end_world, eventually, make_world
from tests.integration.test_router_access import headed, tenant
from tests.integration.test_router_replicas import POISON, is_poison
from tests.integration.wire_engine import WireEngine

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
    await asyncio.to_thread(made.wait_for_workers, COUNT)
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
    # a table that changes while it is read may have a row twice
    (inode,) = {row[9] for row in rows if row[1].endswith(ours) and row[2].endswith(theirs)}
    for pid in among:
        for fd in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):
                if os.readlink(fd) == f"socket:[{inode}]":
                    return pid
    raise AssertionError("nobody has taken the connection")


@contextlib.asynccontextmanager
async def clients(world: World, each: int = 1) -> AsyncIterator[list[httpx.AsyncClient]]:
    """Clients with one connection, so many at each worker: the head's first, and in turns. One that asks for more
    at a time opens another connection, which any worker may take."""
    found: dict[int, list[httpx.AsyncClient]] = {pid: [] for pid in await pids(world)}
    async with contextlib.AsyncExitStack() as stack:
        for _ in range(100):
            http = await stack.enter_async_context(httpx.AsyncClient(base_url=world.url, timeout=20))
            async with http.stream("GET", "/livez") as answer:
                port = answer.extensions["network_stream"].get_extra_info("client_addr")[1]
                found[who_has(world, port, list(found))].append(http)
                await answer.aread()
            if all(len(mine) >= each for mine in found.values()):
                yield [mine[n] for n in range(each) for mine in found.values()]
                return
        raise AssertionError(f"of 100 connections the workers took {[len(mine) for mine in found.values()]}")


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
    async with clients(crew, 10) as many:
        answers = await asyncio.gather(*(chat(http, TEAM) for http in many))
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
    async with clients(crew, 4) as many:
        for _ in range(times(1, 40)):
            answers = await asyncio.gather(*(chat(http, TEAM, max_tokens=30) for http in many))
            codes = sorted(answer.status_code for answer in answers)
            assert codes == [200] * 3 + [429] * 5
    assert len(engine.generates) == 3 * times(1, 40)


async def test_places_in_a_models_queue_are_counted_over_all_workers(crew: World) -> None:
    engine = await crew.engine(pace=0.01, max_num_seqs=2)
    await crew.serve(engine, max_queue_length=3)
    async with clients(crew, 6) as many:
        for _ in range(times(1, 40)):
            answers = await asyncio.gather(*(chat(http, max_tokens=20) for http in many))
            assert sorted(answer.status_code for answer in answers) == [200] * 5 + [429] * 7
            assert {answer.json()["error"]["code"] for answer in answers if answer.is_error} == {"queue_full"}


async def test_requests_go_where_the_burden_of_all_workers_is_least(crew: World) -> None:
    engines = [await crew.engine(f"r{n}", pace=0.05) for n in range(4)]
    await crew.serve(*engines)
    async with clients(crew, 4) as many, contextlib.AsyncExitStack() as stack:
        for n, http in enumerate(many):
            body = {**LONG, "messages": [{"role": "user", "content": f"number {n}"}]}
            await stack.enter_async_context(http.stream("POST", "/v1/chat/completions", json=body))
        assert [len(engine.running) for engine in engines] == [2, 2, 2, 2]
        status = await crew.control(wire.GetRouterStatus())
        assert [load.in_flight for load in status.replicas] == [2, 2, 2, 2]


async def test_a_killed_worker_gives_all_that_it_held_back_and_is_followed_by_another(crew: World) -> None:
    engine = await crew.engine(text=TEXT * 5, pace=0.02, max_num_seqs=4)
    team = tenant("team", TEAM, limits=(wire.AccessLimit("policy", concurrency=4),))
    await crew.table(crew.route(engine.endpoint(), max_queue_length=0), access=(team,))
    await crew.connected(engine.replica_id)
    before = await crew.metrics()
    head, victim = await pids(crew)
    async with clients(crew, 3) as (mine, its, *more), contextlib.AsyncExitStack() as stack:
        assert (await chat(its, TEAM)).status_code == 200
        told = await crew.metrics()

        async def begin(http: httpx.AsyncClient) -> AsyncIterator[str]:
            ask = http.stream("POST", "/v1/chat/completions", json=LONG, headers=headed(TEAM))
            lines = (await stack.enter_async_context(ask)).aiter_lines()
            await anext(lines)
            return lines

        kept = [await begin(http) for http in more[0::2]]
        lost = [await begin(http) for http in more[1::2]]
        assert (await chat(mine, TEAM)).status_code == 429
        os.kill(victim, signal.SIGKILL)
        for lines in lost:
            with pytest.raises(httpx.RemoteProtocolError):
                async for _ in lines:
                    pass

        for lines in kept:
            further = [await anext(lines) for _ in range(40)]
            assert sum(line.startswith("data: {") for line in further) == 20, "they go on"

        async def has_room() -> bool:
            return (await chat(mine, TEAM)).status_code == 200

        await eventually(has_room)  # its places, at the policy and at the model
        second = await asyncio.to_thread(crew.wait_for_workers, COUNT)
        assert second[0].pid == head
        assert victim not in [each.pid for each in second]
        (end,) = (await crew.control(wire.GetRouterStatus())).worker_ends
        assert (end.number, end.worker, end.code, end.because, end.restarts) == (1, 1, -signal.SIGKILL, "", 1)
    async with clients(crew) as two:
        assert [(await chat(http, TEAM)).status_code for http in two] == [200, 200]
    after = await crew.metrics()
    assert after.keys() == before.keys()
    in_flight = f'{signals.REQUESTS_IN_FLIGHT}{{model="tiny"}}'
    assert after[in_flight] == 0
    fell = [name for name in told if "_total" in name and after[name] < told[name]]
    assert not fell


async def test_a_table_counts_when_all_that_take_requests_have_it(crew: World) -> None:
    engine = await crew.engine()
    old = await crew.table()
    _, other = await pids(crew)
    os.kill(other, signal.SIGSTOP)
    try:
        asked = asyncio.create_task(crew.table(crew.route(engine.endpoint())))
        await asyncio.sleep(0.3)
        now = await crew.control(wire.GetRouterStatus())
        assert now.version == old.version, "one of them does not act by the new one"
        assert not any(load.connected for load in now.replicas)
        assert not asked.done()
    finally:
        os.kill(other, signal.SIGCONT)
    assert (await asked).version == old.version + 1
    await crew.connected(engine.replica_id)


async def test_shares_of_a_route_are_exact_over_all_workers(crew: World) -> None:
    often, seldom = await crew.engine("often"), await crew.engine("seldom")
    route = wire.TrafficRoute("r", ("both",), 5, (wire.Backend("often", 3), wire.Backend("seldom", 1)))
    await crew.table(
        *(
            crew.route(each.endpoint(), model=each.replica_id, names=(each.replica_id,))
            for each in (often, seldom)
        ),
        routes=[route],
    )
    await crew.connected("often", "seldom")
    async with clients(crew) as two:
        for n in range(1, 9):
            assert (await chat(two[n * n % COUNT], model="both")).status_code == 200
            due = n * 3 / 4
            assert abs(len(often.generates) - due) < 1, f"after {n} requests"
    assert (len(often.generates), len(seldom.generates)) == (6, 2)


async def test_what_engines_died_of_at_one_worker_is_refused_by_the_other(crew: World) -> None:
    kills = is_poison(crew)
    engines = [await crew.engine(f"p{n}", poison=kills) for n in range(2)]
    await crew.serve(*engines, model="poisoned", names=("tiny",))
    bad = [{"role": "user", "content": POISON}]
    async with clients(crew) as two:
        for http in reversed(two):
            answer = await chat(http, messages=bad)
            assert (answer.status_code, answer.json()["error"]["code"]) == (502, "request_quarantined")
            assert [engine.deaths for engine in engines] == [1, 1]
        await eventually(lambda: crew.is_ready(2))
        assert [(await chat(http)).status_code for http in two] == [200, 200]


async def test_fair_shares_hold_between_tenants_at_different_workers(crew: World) -> None:
    engine = await crew.engine(pace=0.01, max_num_seqs=2)
    access = (tenant("other", OTHER), tenant("team", TEAM))
    await crew.table(crew.route(engine.endpoint(), max_queue_length=8), access=access)
    await crew.connected(engine.replica_id)
    async with clients(crew, 12) as many:
        flood = [asyncio.create_task(chat(http, TEAM, max_tokens=20)) for http in many[1::2]]
        await asyncio.sleep(0.3)
        mine = await chat(many[0], OTHER, max_tokens=2)
        assert mine.status_code == 200, "he is not refused for what others do"
        assert sum(not each.done() for each in flood) >= 2, "nor waits behind all of theirs"
        codes = sorted(answer.status_code for answer in await asyncio.gather(*flood))
    assert codes == [200] * 8 + [429] * 4, "four fifths of ten places"


async def test_what_is_kept_by_one_worker_is_there_at_the_other(crew: World) -> None:
    engine = await crew.engine(pace=0.02)
    await crew.serve(engine)
    async with clients(crew) as (mine, its):
        for http, other in ((mine, its), (its, mine)):
            asked: dict[str, Any] = {"model": "tiny", "input": "hi", "background": True, "max_output_tokens": 200}
            begun = (await http.post("/v1/responses", json=asked)).json()
            await eventually(functools.partial(has_begun, other, begun["id"]))
            ended = await other.post(f"/v1/responses/{begun['id']}/cancel")
            assert ended.json()["status"] == "cancelled"
            await eventually(lambda: is_idle(engine))
            assert (await http.get(f"/v1/responses/{begun['id']}")).json()["status"] == "cancelled"
        line = {
            "custom_id": "a",
            "method": "POST",
            "url": "/v1/chat/completions",
            "body": {**CHAT, "max_tokens": 3},
        }
        content = json.dumps(line).encode() + b"\n"
        sent = await its.post("/v1/files", data={"purpose": "batch"}, files={"file": ("in.jsonl", content)})
        file = sent.json()
        asked = {"input_file_id": file["id"], "endpoint": "/v1/chat/completions", "completion_window": "24h"}
        batch = (await its.post("/v1/batches", json=asked)).json()

        async def completed() -> str | None:
            found = (await mine.get(f"/v1/batches/{batch['id']}")).json()
            return found["output_file_id"] if found["status"] == "completed" else None

        output = await eventually(completed)
        assert json.loads((await its.get(f"/v1/files/{output}/content")).text)["custom_id"] == "a"


async def has_begun(http: httpx.AsyncClient, response: str) -> bool:
    status: str = (await http.get(f"/v1/responses/{response}")).json()["status"]
    return status == "in_progress"


async def is_idle(engine: WireEngine) -> bool:
    return not engine.running


async def test_what_was_used_is_in_one_ledger(crew: World) -> None:
    engine = await crew.engine()
    team = tenant("counted", TEAM)
    await crew.table(crew.route(engine.endpoint()), access=(team,))
    await crew.connected(engine.replica_id)
    async with clients(crew) as two:
        for http in (*two, *two):
            assert (await chat(http, TEAM)).status_code == 200

        async def counted() -> wire.UsageRow | None:
            """What it used, once every worker has told the head: who asks for sums is not told by a worker."""
            report = await crew.asked(wire.GetUsage("2000-01-01", ("policy",)))
            assert isinstance(report, wire.UsageReport)
            return next((row for row in report.rows if row.policy == "counted" and row.requests >= 4), None)

        row = await eventually(counted)
    assert (row.requests, row.completion_tokens) == (4, 20)


async def test_a_burst_of_connections_is_spread(crew: World) -> None:
    among = await pids(crew)
    async with contextlib.AsyncExitStack() as stack:
        found = []
        for _ in range(10):
            http = await stack.enter_async_context(httpx.AsyncClient(base_url=crew.url))
            async with http.stream("GET", "/livez") as answer:
                port = answer.extensions["network_stream"].get_extra_info("client_addr")[1]
                found.append(who_has(crew, port, among))
                await answer.aread()
    assert 3 <= found.count(among[0]) <= 7, found


@pytest.mark.nightly  # two routers that start, and one that ends in order
async def test_told_to_finish_all_end_what_they_do_and_killed_all_begin_anew() -> None:
    with tempfile.TemporaryDirectory(prefix="qr") as name, a_world(Path(name), workers=COUNT) as world:
        engine = await world.engine(pace=0.01)
        await world.serve(engine)
        before = await pids(world)
        async with clients(world) as two:
            streams = [asyncio.create_task(chat(http, max_tokens=70)) for http in two]
            await eventually(lambda: has_running(engine, COUNT))
            await world.control(wire.Finish(5.0))
            answers = await asyncio.gather(*streams)
        assert [answer.json()["usage"]["completion_tokens"] for answer in answers] == [70, 70]
        assert world.process.wait(10) == 0
        assert not any(Path(f"/proc/{pid}").exists() for pid in before)
        waiting = asyncio.create_task(asyncio.to_thread(httpx.get, f"{world.url}/livez", timeout=30))
        world.restart()
        assert (await waiting).status_code == 200, "who came meanwhile has waited in the socket's queue"
        first = [each.pid for each in await asyncio.to_thread(world.wait_for_workers, COUNT)]
        world.restart(signal.SIGKILL)
        second = [each.pid for each in await asyncio.to_thread(world.wait_for_workers, COUNT)]
        assert not set(first) & set(second)
        await eventually(lambda: are_gone(first))  # nobody of ours waits for the workers of a head that was killed
        await world.connected(engine.replica_id)
        async with clients(world) as two:
            assert [(await chat(http)).status_code for http in two] == [200, 200], "by the table on disk"
        await engine.stop()
        log = (world.folder / "router.log").read_text()
        assert "Traceback" not in log, log


async def has_running(engine: WireEngine, count: int) -> bool:
    return len(engine.running) == count


async def are_gone(pids: list[int]) -> bool:
    return not any(Path(f"/proc/{pid}").exists() for pid in pids)
