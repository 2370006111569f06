"""What a stream lives through: engines killed and stopped, shims and routers killed, clients that leave.

Real processes throughout. A stream must be a prefix of its reference, and equal to it when it says that it is
whole; the references are what the running engines answer when nothing happens. Times in CI leave room for a busy
machine; a night holds them to the figures, and keeps them as rows in the file that QUIRE_FIGURES names.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.effort import EFFORT, bound, examples, times
from tests.figures import record, spread
from tests.integration.faulty_engine import POISON
from tests.integration.house import House, Replica
from tests.integration.router_world import end_world, eventually, make_world
from tests.oracle import Reading

from quire_schemas import signals

CLIENTS = 8
SLACK = 0.0 if EFFORT > 1 else 4.0
"""Seconds that a busy machine may add to what takes one; at night there is none."""
NOTICED = 0.2
"""Seconds in which bytes that were under way when an engine was killed are with the client."""


@pytest.fixture(scope="module")
def standing() -> Iterator[House]:
    with tempfile.TemporaryDirectory(prefix="qs") as name:
        folder = Path(name)
        replicas = Replica(folder / "a", "a"), Replica(folder / "b", "b")
        for replica in replicas:
            replica.start()
        world = make_world(folder)
        house = House(world, replicas)
        yield house
        house.close()
        end_world(world)


@pytest.fixture
def short_folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="qs") as name:
        yield Path(name)


@pytest.fixture
async def house(standing: House) -> AsyncIterator[House]:
    """Both replicas are there, and in the end nobody holds a block."""
    await standing.open()
    if not standing.references:
        await standing.learn(6)
    yield standing
    for replica in standing.replicas:
        if replica.engine_lives():
            await eventually(replica.is_empty, 20)


async def test_clients_that_leave_give_their_blocks_back(house: House) -> None:
    """At random moments, streaming or not: before the engine has the request, in its prefill, in its answer."""
    took: list[float] = []
    for number in range(max(50, examples(25))):
        stream = number % 2 == 0
        body = json.dumps({**house.body(number % 6, stream=stream), "max_tokens": 400}).encode()
        reader, writer = await asyncio.open_connection("127.0.0.1", house.world.port)
        writer.write(house.world.post("/v1/completions", body))
        await asyncio.sleep(house.rng.uniform(0, 0.06))
        if number % 5 == 0 and stream:
            await reader.readuntil(b"data: ")
        writer.transport.abort()
        left = time.monotonic()
        await eventually(lambda: _are_empty(house), 10)
        took.append(time.monotonic() - left)
    took.sort()
    print(f"blocks back after {took[len(took) // 2]:.3f} s (median), {took[-1]:.3f} s (longest of {len(took)})")
    record({"system": "client leaves: blocks free", **spread(took)})
    assert took[len(took) // 2] < 0.2 + 0.15 * SLACK
    assert took[-1] <= bound(0.2)

    async def counted() -> bool:
        found = await house.world.metrics()
        return found['quire_requests_in_flight{model="tiny"}'] == 0

    await eventually(counted)


async def _are_empty(house: House) -> bool:
    return all(await asyncio.gather(*(replica.is_empty() for replica in house.replicas)))


async def test_engines_outlive_a_router_and_free_what_was_its(house: House) -> None:
    back = asyncio.Event()

    async def begin() -> bool:
        """Ask until the router is back; whether an answer was cut. One that had just ended may never notice."""
        async with house.http() as http:
            try:
                while not back.is_set():
                    await house.ask(http, 0, stream=True)
            except (httpx.TransportError, AssertionError):  # cut, without a word even
                return True
        return False

    pids = [replica.pid for replica in house.replicas]
    asking = [asyncio.create_task(begin()) for _ in range(CLIENTS)]

    async def busy() -> bool:
        return all([(await replica.stats()).blocks_used > 0 for replica in house.replicas])

    await eventually(busy)
    killed = time.monotonic()
    house.world.restart()
    await eventually(lambda: _are_empty(house))
    freed = time.monotonic() - killed
    house.world.wait_until_up()
    listening = time.monotonic() - killed
    back.set()
    assert any(await asyncio.gather(*asking))
    print(f"router killed: blocks free after {freed:.3f} s, another one answers after {listening:.3f} s")
    record(
        {"system": "router killed, two engines: blocks free", "answers_s": round(listening, 3), **spread([freed])}
    )
    assert freed < 2 + SLACK
    await eventually(lambda: house.world.is_ready(2))
    async with house.http() as http:
        house.verify(await house.ask(http, 0, stream=True))
    assert [replica.pid for replica in house.replicas] == pids
    assert all(replica.engine_lives() for replica in house.replicas)


async def test_a_stopped_engine_gets_nothing_and_says_what_it_would_have_said(house: House) -> None:
    stopped, other = house.replicas
    stall = 1.0  # of the router's configuration

    async def act(_: list[Reading]) -> None:
        await eventually(lambda: _has_streams(stopped))
        os.kill(stopped.pid, signal.SIGSTOP)
        at = time.monotonic()
        await eventually(lambda: house.world.is_ready(1), 20)
        out = time.monotonic() - at
        print(f"stopped engine out of rotation after {out:.3f} s with a stall time of {stall} s")
        record({"system": "engine stopped, one of two: out of rotation", "stall_s": stall, **spread([out])})
        assert out < stall + 1 + SLACK
        for _again in range(5):
            assert await house.world.is_ready(1), "its readiness does not flicker"
            await asyncio.sleep(0.1)
        before = (await other.stats()).steps
        await asyncio.sleep(0.5)
        assert (await other.stats()).steps > before, "what has not begun is retried there"
        os.kill(stopped.pid, signal.SIGCONT)
        await eventually(lambda: house.world.is_ready(2), 20)

    try:
        heard = await house.under_load(CLIENTS, act)
    finally:
        os.kill(stopped.pid, signal.SIGCONT)
    for one in heard:
        house.verify(one)
        assert one.finish_reason == "length", "nobody lost anything"


async def _has_streams(replica: Replica) -> bool:
    return (await replica.stats()).running > 0


@pytest.mark.parametrize("victim", ["engine", "shim"])
async def test_r04_of_two_replicas_one_dies_and_only_what_it_had_begun_is_lost(house: House, victim: str) -> None:
    ends: list[float] = []
    asked = lost = 0
    for _ in range(times(1, 70 if victim == "engine" else 30)):
        await house.open()
        replica = house.rng.choice(house.replicas)
        killed = 0.0

        async def act(heard: list[Reading], replica: Replica = replica) -> None:
            nonlocal killed
            await eventually(lambda: _has_streams(replica))
            await asyncio.sleep(house.rng.uniform(0, 0.1))
            assert replica.shim is not None
            killed = time.monotonic()
            os.kill(replica.pid if victim == "engine" else replica.shim.pid, signal.SIGKILL)
            count = len(heard)
            await eventually(lambda: _more(heard, count + CLIENTS + 4), 60)

        heard = await house.under_load(CLIENTS, act)
        assert not replica.engine_lives()
        if replica.shim is not None:
            replica.shim.wait(20)
        failed = [one for one in heard if one.errors]
        for one in heard:
            house.verify(one)
            assert one.status == 200
        assert all(one.stream and one.first_at is not None for one in failed), "begun, or not failed"
        assert all(one.first_at is not None and one.first_at < killed + NOTICED + SLACK for one in failed)
        assert {error["code"] for one in failed for error in one.errors} <= {"engine_died"}
        assert len(failed) <= 3, "as many as it computed at once"
        last = max((one.ended_at - killed for one in failed), default=0.0)
        print(f"{victim} killed: {len(failed)} of {len(heard)} got an error event, after {last:.3f} s at most")
        assert last < 1 + SLACK
        ends += [one.ended_at - killed for one in failed]
        asked, lost = asked + len(heard), lost + len(failed)
    row = {"system": f"{victim} killed, one of two: error event", "asked": asked, "lost": lost}
    record({**row, "kills": times(1, 70 if victim == "engine" else 30), **(spread(ends) if ends else {})})


async def test_r04m_streams_of_an_engine_that_is_killed_go_on_and_nobody_notices(house: House) -> None:
    """With migrations allowed: every answer is whole, and says what it would have said. An engine that is killed
    before a stream of its own has begun is no case of that: then another one is.
    """
    house.max_migrations = 3
    gone_on, asked, kills = 0.0, 0, 0
    try:
        for _ in range(times(20, 100)):
            if gone_on and EFFORT == 1:
                break
            await house.open()
            replica = house.rng.choice(house.replicas)

            async def act(heard: list[Reading], replica: Replica = replica) -> None:
                await eventually(lambda: _has_streams(replica))
                await asyncio.sleep(house.rng.uniform(0, 0.1))
                os.kill(replica.pid, signal.SIGKILL)
                count = len(heard)
                await eventually(lambda: _more(heard, count + CLIENTS + 4), 60)

            heard = await house.under_load(CLIENTS, act)
            asked, kills = asked + len(heard), kills + 1
            for one in heard:
                house.verify(one)
                assert (one.status, one.errors, one.finish_reason) == (200, [], "length")
            if replica.shim is not None:
                replica.shim.wait(20)
            gone_on = (await house.world.metrics())[f'{signals.STREAM_MIGRATIONS}_total{{model="tiny"}}']
    finally:
        house.max_migrations = 0
    print(f"{gone_on:.0f} streams went on elsewhere")
    record(
        {
            "system": "engine killed, streams may go on",
            "kills": kills,
            "asked": asked,
            "gone_on": gone_on,
        }
    )
    assert gone_on > 0


async def _more(heard: list[Reading], count: int) -> bool:
    return len(heard) >= count


async def test_r09_a_request_that_kills_engines_takes_each_of_two_down_once(house: House) -> None:
    took = []
    for number in range(times(1, 20)):
        await house.open()
        took.append(await _take_down(house, {**house.body(0, stream=False), "prompt": [*POISON, 5 + number]}))
    record({"system": "request that kills engines: condemned", **spread(took)})


async def _take_down(house: House, poison: dict[str, Any]) -> float:
    """Seconds until it is refused, having taken down both."""
    began = time.monotonic()
    async with house.http() as http:
        answer = await http.post("/v1/completions", json=poison)
        assert (answer.status_code, answer.json()["error"]["code"]) == (502, "request_quarantined")
        assert answer.headers["x-should-retry"] == "false"
        took = time.monotonic() - began
        for replica in house.replicas:
            assert replica.exit_record()["exit"]["signal"] == signal.SIGKILL
        assert not any(replica.engine_lives() for replica in house.replicas)
        house.replicas[0].start()  # a replacement, which must not be the third to die
        await eventually(lambda: house.world.is_ready(1), 90)
        for seed in range(3):
            answer = await http.post("/v1/completions", json={**poison, "seed": seed, "stream": True})
            assert (answer.status_code, answer.json()["error"]["code"]) == (502, "request_quarantined")
        house.verify(await house.ask(http, 1, stream=True))
    assert house.replicas[0].engine_lives()
    return took


@pytest.mark.nightly  # in CI: tests/unit/engine/test_lease.py
async def test_an_engine_to_which_nobody_speaks_leaves_and_says_so(short_folder: Path) -> None:
    """A control plane keeps it; one that is stopped, its connections open, does not."""
    replica = Replica(short_folder / "a", "a", adoption_window=1.5)
    replica.start()
    _wait_for(replica, "ready")
    plane = subprocess.Popen([sys.executable, "-c", _HEARTBEATS, str(replica.socket)], stdout=subprocess.PIPE)
    try:
        assert plane.stdout is not None
        with plane.stdout as said:
            assert said.readline() == b"asking\n"
        await asyncio.sleep(3.2)
        assert replica.ask("status")["running"], "two windows"
        plane.send_signal(signal.SIGSTOP)
        silent = time.monotonic()
        record = await asyncio.to_thread(replica.exit_record)
        took = time.monotonic() - silent
        print(f"left {took:.3f} s after the last word, with a window of 1.5 s")
        assert 0.9 < took < 3 + SLACK
        assert record["exit"]["code"] == 0
        last = json.loads(record["lines"][-1])
        assert (last["event"], last["reason"]) == ("failed", "LeaseEnded")
        assert not replica.engine_lives()
    finally:
        plane.kill()
        plane.wait()


_HEARTBEATS = """
import asyncio, sys, time
from quire_operators.fleet.heartbeat import Heartbeats

async def main():
    beats = Heartbeats(lambda replica: None, time.monotonic)
    beats.keep("m", {("a", 1): sys.argv[1]})
    print("asking", flush=True)
    await asyncio.sleep(600)

asyncio.run(main())
"""


def _wait_for(replica: Replica, event: str) -> None:
    end = time.monotonic() + 90
    while event not in [json.loads(line)["event"] for line in replica.ask("status")["lines"]]:
        assert time.monotonic() < end
        time.sleep(0.05)
