"""Clients that take their time: those that send a head or a body in drops, and those that read nothing."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import statistics
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from benchmarks.rows import NO_KERNELS, provenance, write
from tests.effort import bound
from tests.integration.router_world import CHAT, TEXT, World, big, events, eventually

SOON = 3.0
"""What a busy machine may add to a second."""
LARGE: dict[str, Any] = {"stream": True, "logprobs": True, "top_logprobs": 20, "max_tokens": 400}
"""A stream of about a megabyte."""


@contextlib.asynccontextmanager
async def connected(world: World, sent: bytes = b"") -> AsyncIterator[asyncio.StreamReader]:
    reader, writer = await asyncio.open_connection("127.0.0.1", world.port)
    writer.write(sent)
    try:
        yield reader
    finally:
        writer.transport.abort()


async def seconds_until_cut(reader: asyncio.StreamReader) -> float:
    began = time.monotonic()
    with contextlib.suppress(ConnectionError):
        while await asyncio.wait_for(reader.read(4096), 20):
            pass
    return time.monotonic() - began


async def serve(world: World, **options: Any) -> Any:
    """One engine, and a gateway with little patience."""
    engine = await world.engine(**options)
    await world.table(
        world.route(engine.endpoint(), max_model_len=4096, kv_tokens=4096),
        head_seconds=1.0, body_seconds=1.0, send_seconds=1.0, idle_seconds=2.0,
    )  # fmt: skip
    await world.connected(engine.replica_id)
    return engine


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nX-",
        b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\nGET /livez HTTP/1.1\r\nHost: loc",
    ],
    ids=["nothing", "half a head", "half of the next head"],
)
async def test_a_head_that_does_not_come_is_waited_for_no_longer(world: World, sent: bytes) -> None:
    await serve(world)
    async with connected(world, sent) as reader:
        assert 0.9 < await seconds_until_cut(reader) < 1 + SOON


async def test_drops_do_not_prolong_it(world: World) -> None:
    await serve(world)
    reader, writer = await asyncio.open_connection("127.0.0.1", world.port)
    cut = asyncio.create_task(seconds_until_cut(reader))
    for byte in b"GET /livez HTTP/1.1\r\nHost: localhost\r\nX-Slow: " + 1000 * b"a":
        if cut.done():
            break
        with contextlib.suppress(ConnectionError):
            writer.write(bytes([byte]))
            await writer.drain()
        await asyncio.sleep(0.05)
    assert await cut < 1 + SOON
    writer.transport.abort()


async def test_who_waits_for_an_answer_or_between_two_is_not_cut(world: World) -> None:
    await serve(world, pace=0.05)
    async with httpx.AsyncClient(base_url=world.url, timeout=20) as http:
        began = time.monotonic()
        answer = await http.post("/v1/chat/completions", json={**CHAT, "max_tokens": 40})
        assert answer.status_code == 200
        assert time.monotonic() - began > 1.5, "longer than a head may take"
        await asyncio.sleep(1.3)
        stream = answer.extensions["network_stream"].get_extra_info("client_addr")
        again = await http.get("/v1/models")
        assert again.extensions["network_stream"].get_extra_info("client_addr") == stream, "the same connection"
    async with connected(world, b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n") as reader:
        assert 1.9 < await seconds_until_cut(reader) < 2 + SOON, "kept for a while"


async def test_a_body_that_does_not_come_is_told_so(world: World) -> None:
    await serve(world)
    head = world.post("/v1/chat/completions", big()).split(b"\r\n\r\n")[0]
    answer = await world.raw(head + b'\r\n\r\n{"model"')
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b"within 1 seconds" in answer


async def test_who_does_not_read_is_cut_and_the_engine_is_free(world: World) -> None:
    engine = await serve(world, pace=0.02)
    lazy = socket.socket()
    lazy.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    lazy.connect(("127.0.0.1", world.port))
    with lazy:
        lazy.sendall(world.post("/v1/chat/completions", big(**LARGE, n=8)))
        await eventually(lambda: asyncio.sleep(0, len(engine.running) == 8))
        began = time.monotonic()
        async with httpx.AsyncClient(base_url=world.url, timeout=20) as http:
            answer = await http.post("/v1/chat/completions", json=CHAT)
        assert answer.json()["choices"][0]["message"]["content"] == TEXT
        await eventually(lambda: asyncio.sleep(0, not engine.running), 20)
        assert time.monotonic() - began < 4 + SOON, "long before the answers would have ended"
        assert len(engine.aborts) == 8
        lazy.settimeout(10)
        with contextlib.suppress(ConnectionError):
            while lazy.recv(65536):
                pass  # what the system had kept for it

    async def counted() -> bool:
        return (await world.metrics())['quire_requests_in_flight{model="tiny"}'] == 0

    await eventually(counted)


async def test_who_reads_late_gets_all_of_it(world: World) -> None:
    """What an engine brings while a client reads nothing is kept in another form."""
    engine = await world.engine(text=10 * TEXT)
    await world.table(world.route(engine.endpoint(), max_model_len=4096, kv_tokens=4096))
    await world.connected("r1")
    asked = world.post("/v1/chat/completions", big(**LARGE))
    with socket.socket() as late:
        late.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        late.connect(("127.0.0.1", world.port))
        late.sendall(asked)
        await eventually(lambda: asyncio.sleep(0, bool(engine.generates) and not engine.running), 20)
        read = await asyncio.to_thread(_whole, late)
    pieces: list[Any] = []
    for answer in (read, await world.raw(asked)):
        told = events(answer)
        assert told[-1] == "DONE"
        choices = [choice for event in told[:-1] for choice in event["choices"]]
        text = "".join(choice["delta"].get("content") or "" for choice in choices)
        scores = [entry for choice in choices if choice["logprobs"] for entry in choice["logprobs"]["content"]]
        pieces.append((text, scores, choices[-1]["finish_reason"]))
    assert len(pieces[0][1]) == 400
    assert pieces[0] == pieces[1]


def _whole(link: socket.socket) -> bytes:
    link.settimeout(20)
    answer = b""
    while piece := link.recv(65536):
        answer += piece
    return answer


SLOW = {**LARGE, "max_tokens": 200}
"""Several times what fits between the router and a client; soon made, so that it is the clients that are slow."""


@pytest.mark.nightly
async def test_r18_slow_clients_cost_others_nothing_and_little_memory(world: World) -> None:
    """Times with slow clients and without take turns, so that what the machine does falls on both."""
    engine = await world.engine(pace=0.01)
    await world.table(world.route(engine.endpoint(), max_model_len=4096, kv_tokens=4096, max_queue_length=500))
    await world.connected("r1")
    router = psutil.Process(world.process.pid)

    async def normal(http: httpx.AsyncClient) -> list[float]:
        """Seconds between the events of a stream."""
        found, last = [], time.monotonic()
        async with http.stream("POST", "/v1/chat/completions", json={**CHAT, "stream": True}) as answer:
            async for _ in answer.aiter_lines():
                found.append(time.monotonic() - last)
                last = time.monotonic()
        return found

    async def p99s(seconds: float, beside: list[socket.socket]) -> list[float]:
        """The 99th percentile, again and again for that long, while the slow ones read a byte each second."""
        found: list[float] = []
        ends = time.monotonic() + seconds
        async with httpx.AsyncClient(base_url=world.url, timeout=60) as http:
            while time.monotonic() < ends:
                gaps: list[float] = []
                for _ in range(4):
                    for each in await asyncio.gather(*(normal(http) for _ in range(8))):
                        gaps += each
                for lazy in beside:
                    with contextlib.suppress(BlockingIOError, ConnectionError):
                        lazy.recv(1, socket.MSG_DONTWAIT)
                found.append(statistics.quantiles(gaps, n=100)[98])
        return found

    async def stands() -> bool:
        """Whether nothing more goes out to the slow ones: their buffers are full."""
        before = engine.steps
        await asyncio.sleep(0.3)
        return engine.steps == before

    await p99s(2, [])  # what is made once
    before, alone, among, most = router.memory_info().rss, list[float](), list[float](), 0
    slow: list[socket.socket] = []
    try:
        for _ in range(3):
            alone += await p99s(20, [])
            for lazy in slow:
                lazy.close()
            slow = []
            for _ in range(50):
                lazy = socket.socket()
                lazy.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                lazy.connect(("127.0.0.1", world.port))
                lazy.sendall(world.post("/v1/chat/completions", big(**SLOW)))
                slow.append(lazy)
            await eventually(stands, 20)
            among += await p99s(20, slow)
            most = max(most, router.memory_info().rss)
        await eventually(lambda: asyncio.sleep(0, not engine.running), 60)

        async def cut() -> bool:
            return (await world.metrics())['quire_requests_in_flight{model="tiny"}'] == 0

        await eventually(cut, 60)
    finally:
        for lazy in slow:
            lazy.close()
    beside, base, grown = statistics.median(among), statistics.median(alone), most - before
    print(f"p99 between events: alone {base:.4f} s, beside slow clients {beside:.4f} s; grown by {grown} bytes")
    if path := os.environ.get("QUIRE_FIGURES"):
        figures = {"alone_p99_s": round(base, 4), "p99_s": round(beside, 4), "grown_bytes": grown}
        row = {
            **provenance(NO_KERNELS),
            "benchmark": "survival",
            "system": "50 slow clients",
            "repeat": len(among),
        }
        write(Path(path), [{**row, **figures}])
    assert beside <= 1.2 * base + 0.005
    assert grown <= 50 * 64 * 1024 + (8 << 20), "and what Python keeps for later"


@pytest.mark.nightly
async def test_r19_two_hundred_connections_that_send_drops_disturb_nobody(world: World) -> None:
    engine = await world.engine()
    await world.serve(engine)
    links = [await asyncio.open_connection("127.0.0.1", world.port) for _ in range(200)]
    began = time.monotonic()
    for _, writer in links:
        writer.write(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n")
    cut = [asyncio.create_task(seconds_until_cut(reader)) for reader, _ in links]
    async with httpx.AsyncClient(base_url=world.url, timeout=10) as http:
        while not all(task.done() for task in cut):
            for _, writer in links:
                with contextlib.suppress(ConnectionError):
                    writer.write(b"X")
            answer = await http.post("/v1/chat/completions", json=CHAT)
            assert answer.json()["choices"][0]["message"]["content"] == TEXT
            assert time.monotonic() - began < bound(12)
    assert max(await asyncio.gather(*cut)) < bound(11)
    for _, writer in links:
        writer.transport.abort()
