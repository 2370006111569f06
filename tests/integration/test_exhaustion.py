"""A router that has too little: descriptors, memory. It says so, keeps what runs, and comes back by itself."""

from __future__ import annotations

import asyncio
import contextlib
import json
import resource
import socket
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import msgspec
import psutil
import pytest
from tests.effort import times
from tests.figures import record
from tests.integration.router_world import CHAT, TEXT, World, eventually

from quire.doors import reserve

IDLE = 0.25
"""Processors' worth of time that a router may take which only waits: far from a loop that never sleeps."""


@contextlib.contextmanager
def limited(pid: int, which: int, limit: int) -> Iterator[None]:
    """A process that may have no more than `limit` meanwhile."""
    before = resource.prlimit(pid, which)
    resource.prlimit(pid, which, (limit, before[1]))
    try:
        yield
    finally:
        resource.prlimit(pid, which, before)


@contextlib.contextmanager
def crowd(world: World, count: int) -> Iterator[list[socket.socket]]:
    """So many connections that ask for nothing."""
    links = [socket.create_connection(("127.0.0.1", world.port), timeout=10) for _ in range(count)]
    try:
        yield links
    finally:
        for link in links:
            link.close()


async def spends(process: psutil.Process, seconds: float) -> float:
    """Processors' worth of time that the process takes over an interval."""
    before = sum(process.cpu_times()[:2])
    await asyncio.sleep(seconds)
    return float(sum(process.cpu_times()[:2]) - before) / seconds


async def stream(world: World, began: asyncio.Event, **fields: Any) -> str:
    """The text of a stream that has to end as it should."""
    text, last = "", ""
    async with (
        httpx.AsyncClient(timeout=60) as http,
        http.stream("POST", f"{world.url}/v1/chat/completions", json={**CHAT, "stream": True, **fields}) as answer,
    ):
        assert answer.status_code == 200, await answer.aread()
        async for line in answer.aiter_lines():
            last = line or last
            if line.startswith("data: {"):
                began.set()
                text += json.loads(line[6:])["choices"][0]["delta"].get("content") or ""
    assert last == "data: [DONE]"
    return text


@contextlib.asynccontextmanager
async def streaming(world: World, count: int) -> AsyncIterator[list[asyncio.Task[str]]]:
    """Streams that have begun; at the end each has said all that it had to say."""
    began = [asyncio.Event() for _ in range(count)]
    tasks = [asyncio.create_task(stream(world, each, max_tokens=400)) for each in began]
    await asyncio.wait_for(asyncio.gather(*(each.wait() for each in began)), 20)
    yield tasks
    assert await asyncio.wait_for(asyncio.gather(*tasks), 60) == [TEXT] * count


async def answers(world: World) -> bool:
    async with httpx.AsyncClient(timeout=5) as http:
        try:
            return (await http.get(f"{world.url}/livez")).status_code == 200
        except httpx.TransportError:
            return False


async def test_r31_connections_leave_the_router_the_descriptors_that_it_needs(own_world: World) -> None:
    world = own_world
    engine = await world.engine(pace=0.03)
    await world.serve(engine)
    router = psutil.Process(world.process.pid)
    with limited(router.pid, resource.RLIMIT_NOFILE, 64):
        async with streaming(world, 4):
            with crowd(world, 100) as links:
                spent = await spends(router, times(1, 5))
                assert spent < IDLE, f"{spent:.2f} of a processor"
                turned_away = []
                for link in links:
                    link.setblocking(False)
                    with contextlib.suppress(BlockingIOError):
                        turned_away.append(link.recv(65536))
                assert len(turned_away) > 50
                assert all(said.startswith(b"HTTP/1.1 503 Service Unavailable\r\n") for said in turned_away)
                head, _, body = turned_away[0].partition(b"\r\n\r\n")
                assert {b"connection: close", b"retry-after: 1", b"x-should-retry: true"} <= {*head.split(b"\r\n")}
                assert json.loads(body)["error"]["code"] == "service_unavailable"
                assert router.num_fds() <= 64 - reserve(64) + 2
                # its own descriptors: a routing table is kept, another engine is found
                other = await world.engine("r2")
                await asyncio.wait_for(world.serve(engine, other), 10)
            await eventually(lambda: answers(world))
    assert (await world.metrics())["quire_connections_refused_total"] >= len(turned_away)
    log = (world.folder / "router.log").read_text()
    assert 1 <= log.count("others are turned away") <= 3
    assert "Traceback" not in log


async def test_r31_without_any_descriptor_connections_wait_and_nothing_spins(own_world: World) -> None:
    world = own_world
    engine = await world.engine(pace=0.03)
    await world.serve(engine)
    router = psutil.Process(world.process.pid)
    async with streaming(world, 4):
        seconds = times(1, 10)
        # new ones would have numbers below this, which are all taken for as long as the router runs
        with limited(router.pid, resource.RLIMIT_NOFILE, 8), crowd(world, 50) as links:
            spent = await spends(router, seconds)
            told = 0
            for link in links:
                link.setblocking(False)
                with contextlib.suppress(BlockingIOError):
                    told += bool(link.recv(1))
            assert told == 0, "they wait, neither taken nor turned away"
        await eventually(lambda: answers(world))
    assert spent < IDLE, f"{spent:.2f} of a processor"
    log = (world.folder / "router.log").read_text()
    assert log.count("connections wait") == 1
    assert len(log.splitlines()) < 30 + 3 * seconds, "the log does not flood"


HEADROOM = 192 << 20
IDS = 100_000


@pytest.mark.nightly
async def test_r32_work_is_refused_before_the_memory_is_gone_and_taken_again_after(own_world: World) -> None:
    """Requests that are held for a replica that does not come fill the memory, each with a list of token ids."""
    world = own_world
    engine = await world.engine(pace=0.03)
    holding = world.route(
        model="held", names=("held",), max_model_len=1 << 20, kv_tokens=1 << 20, max_queue_length=5000
    )
    await world.table(world.route(engine.endpoint()), msgspec.structs.replace(holding, max_queue_wait=60.0))
    await world.connected("r1")
    router = psutil.Process(world.process.pid)
    body = json.dumps({"model": "held", "prompt": list(range(257, 297)) * (IDS // 40), "max_tokens": 1}).encode()
    statuses: list[int] = []
    most = 0.0

    async def ask(http: httpx.AsyncClient) -> None:
        answer = await http.post("/v1/completions", content=body, headers={"content-type": "application/json"})
        statuses.append(answer.status_code)
        assert answer.status_code == 429, answer.text
        assert answer.json()["error"]["code"] == "memory_short"
        assert answer.headers["retry-after"] == "1"

    limits = httpx.Limits()
    async with httpx.AsyncClient(base_url=world.url, timeout=60, limits=limits) as http:
        impatient = [asyncio.create_task(ask(http)) for _ in range(12)]
        await eventually(lambda: world.holds(12, "held"))  # by now it has all its threads, with their stacks
        for each in impatient:
            each.cancel()
        await asyncio.wait(impatient)
    limit = router.memory_info().vms + HEADROOM
    with limited(router.pid, resource.RLIMIT_AS, limit):
        many = httpx.AsyncClient(base_url=world.url, timeout=60, limits=limits)
        async with streaming(world, 2), many as http:
            asking: list[asyncio.Task[None]] = []
            while len(statuses) < times(10, 200):
                asking.append(asyncio.create_task(ask(http)))
                await asyncio.sleep(0.005)
                most = max(most, router.memory_info().vms / limit)
                assert len(asking) < 3000, f"{most:.3f} of its memory, and nothing is refused"
            held = len(asking) - len(statuses)
            assert (await http.get("/livez")).status_code == 200
            for task in asking:
                task.cancel()
            for ended in await asyncio.gather(*asking, return_exceptions=True):
                assert ended is None or isinstance(ended, asyncio.CancelledError), ended
        began = time.monotonic()

        async def taken() -> bool:
            async with httpx.AsyncClient(base_url=world.url, timeout=20) as http:
                return (await http.post("/v1/chat/completions", json=CHAT)).status_code == 200

        await eventually(taken, 20)
        again = time.monotonic() - began
    print(f"at most {most:.3f} of its memory with {held} requests held; work is taken again after {again:.2f} s")
    figures = {"most_of_its_memory": round(most, 4), "held": held, "taken_again_s": round(again, 3)}
    record({"system": "router short of memory", "refused": len(statuses), **figures})
    assert most < 0.95
    log = (world.folder / "router.log").read_text()
    assert "memory: requests are refused" in log
    assert "memory: requests are taken again" in log
    assert "MemoryError" not in log


@pytest.mark.nightly
async def test_r32_a_text_that_would_take_more_than_there_is_is_refused_before_it_does(own_world: World) -> None:
    world = own_world
    engine = await world.engine()
    await world.serve(engine, max_model_len=1 << 22, kv_tokens=1 << 23)
    router = psutil.Process(world.process.pid)
    large = {**CHAT, "messages": [{"role": "user", "content": "a b " * 500_000}]}
    with limited(router.pid, resource.RLIMIT_AS, router.memory_info().vms + HEADROOM):
        async with httpx.AsyncClient(base_url=world.url, timeout=60) as http:
            refused = await http.post("/v1/chat/completions", json=large)
            assert (refused.status_code, refused.json()["error"]["code"]) == (429, "memory_short")
            assert (await http.post("/v1/chat/completions", json=CHAT)).status_code == 200
