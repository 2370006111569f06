"""Clients that take their time: those that send a head or a body in drops, and those that read nothing."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import statistics
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import Any

import httpx
import psutil
import pytest
from tests.effort import bound
from tests.figures import record
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
        head_seconds=1.0, body_seconds=1.0, send_seconds=1.0, idle_seconds=2.0, access_log="all",
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


@contextlib.contextmanager
def slow_to_read(world: World) -> Iterator[socket.socket]:
    """A connection with little room for what is not read."""
    with socket.socket() as link:
        link.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        link.connect(("127.0.0.1", world.port))
        yield link


async def sip(link: socket.socket) -> None:
    """Read a byte ten times a second, until there is none."""
    while True:
        await asyncio.sleep(0.1)
        try:
            if not link.recv(1, socket.MSG_DONTWAIT):
                return
        except BlockingIOError:
            continue
        except ConnectionError:
            return


async def test_who_does_not_read_is_cut_and_the_engine_is_free(world: World) -> None:
    """One reads nothing, the other a byte now and then. The log does not say of them that they left."""
    engine = await serve(world, pace=0.02)
    with slow_to_read(world) as lazy, slow_to_read(world) as drop:
        for each in (lazy, drop):
            each.sendall(world.post("/v1/chat/completions", big(**LARGE, n=8)))
        await eventually(lambda: asyncio.sleep(0, len(engine.running) == 16))
        sipping = asyncio.create_task(sip(drop))
        began = time.monotonic()
        async with httpx.AsyncClient(base_url=world.url, timeout=20) as http:
            answer = await http.post("/v1/chat/completions", json=CHAT)
        assert answer.json()["choices"][0]["message"]["content"] == TEXT
        await eventually(lambda: asyncio.sleep(0, not engine.running), 20)
        assert time.monotonic() - began < 4 + SOON, "long before the answers would have ended"
        assert len(engine.aborts) == 16
        assert not sipping.done(), "to the last it has bytes to read, which the system had kept for it"
        sipping.cancel()
        for each in (lazy, drop):
            each.settimeout(10)
            with contextlib.suppress(ConnectionError):
                while each.recv(65536):
                    pass

    async def counted() -> bool:
        return (await world.metrics())['quire_requests_in_flight{model="tiny"}'] == 0

    await eventually(counted)
    log = (world.folder / "router.log").read_text()
    assert log.count(" finish=abort error=client_slow client=slow ") == 2
    assert "client=gone" not in log


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


SLOW: dict[str, Any] = {"stream": True, "max_tokens": 2000}
"""Several times what fits between the router and a client; soon made, so that it is the clients that are slow."""
SCORED = {**LARGE, "max_tokens": 200}
"""The same in log-probabilities, which are 60 KiB even as they are packed."""


@pytest.mark.nightly
async def test_r18_slow_clients_cost_others_nothing_and_little_memory(world: World) -> None:
    """Times with slow clients and without take turns, so that what the machine does falls on both.

    Memory is what fifty slow clients take beside ten that are there already: the first large answers that a router
    writes at all cost it some MiB, once, whoever reads them.
    """
    engine = await world.engine(pace=0.004, text=30 * TEXT)
    await world.table(world.route(engine.endpoint(), max_model_len=4096, kv_tokens=400_000, max_queue_length=500))
    await world.connected("r1")
    router = psutil.Process(world.process.pid)

    async def normal(http: httpx.AsyncClient) -> list[float]:
        """Seconds between the events of a stream."""
        found, last = [], time.monotonic()
        async with http.stream(
            "POST", "/v1/chat/completions", json={**CHAT, "stream": True, "max_tokens": 75}
        ) as answer:
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

    async def in_flight(count: int) -> bool:
        return (await world.metrics())['quire_requests_in_flight{model="tiny"}'] == count

    alone, among, grown = list[float](), list[float](), list[int]()
    for body in (SLOW, SLOW, SCORED):
        alone += await p99s(20, [])
        with contextlib.ExitStack() as links:
            slow: list[socket.socket] = []
            resident = []
            for count in (10, 50):
                more = [links.enter_context(slow_to_read(world)) for _ in range(count)]
                for lazy in more:
                    lazy.sendall(world.post("/v1/chat/completions", big(**body)))
                slow += more
                await asyncio.sleep(1)
                await eventually(stands, 60)
                assert await in_flight(len(slow)), "none was cut yet"
                resident.append(router.memory_info().rss)
            grown.append(resident[1] - resident[0])
            among += await p99s(20, slow[:50])
            await eventually(lambda: in_flight(0), 60)  # each was cut, though some have read a byte each second
            assert not engine.running
    beside, base = statistics.median(among), statistics.median(alone)
    print(f"p99 between events: alone {base:.4f} s, beside slow clients {beside:.4f} s; grown by {grown} bytes")
    figures = {"alone_p99_s": round(base, 4), "p99_s": round(beside, 4)}
    figures |= {"grown_bytes": max(grown[:2]), "grown_bytes_scored": grown[2]}
    record({"system": "50 slow clients", "repeat": len(among), **figures})
    assert beside <= 1.2 * base + 0.005
    assert max(grown[:2]) <= 50 * 64 * 1024
    assert grown[2] <= 50 * 256 * 1024


@pytest.mark.nightly
async def test_r19_two_hundred_connections_that_send_drops_disturb_nobody(world: World) -> None:
    engine = await world.engine()
    await world.serve(engine)
    async with httpx.AsyncClient(base_url=world.url, timeout=10) as http:

        async def asked(until: Callable[[], bool], beside: Sequence[asyncio.StreamWriter]) -> list[float]:
            """Seconds of short requests, of which each tenth comes with a drop from everybody."""
            took: list[float] = []
            while not until():
                if not len(took) % 10:
                    for writer in beside:
                        with contextlib.suppress(ConnectionError):
                            writer.write(b"X")
                began = time.monotonic()
                answer = await http.post("/v1/chat/completions", json={**CHAT, "max_tokens": 8})
                took.append(time.monotonic() - began)
                assert TEXT.startswith(answer.json()["choices"][0]["message"]["content"])
            return took

        began = time.monotonic()
        alone = await asked(lambda: time.monotonic() - began > 5, [])
        links = [await asyncio.open_connection("127.0.0.1", world.port) for _ in range(200)]
        opened = time.monotonic()
        for _, writer in links:
            writer.write(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n")
        cut = [asyncio.create_task(seconds_until_cut(reader)) for reader, _ in links]
        among = await asked(lambda: all(task.done() for task in cut), [writer for _, writer in links])
        assert time.monotonic() - opened < bound(12)
    closed = await asyncio.gather(*cut)
    for _, writer in links:
        writer.transport.abort()
    base, beside = (statistics.quantiles(each, n=100)[98] for each in (alone, among))
    figures = {"alone_p99_s": round(base, 4), "p99_s": round(beside, 4), "closed_after_s": round(max(closed), 3)}
    print(figures)
    record({"system": "200 heads in drops", "repeat": len(among), **figures})
    assert max(closed) < bound(11)
    assert statistics.median(among) <= 1.2 * statistics.median(alone) + 0.002
    assert beside <= 1.2 * base + 0.01
