"""The router as a process: health, metrics, control socket, restarts, signals, configuration."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import openai
import pytest
from tests.integration.router_world import ASK, TEXT, World, big, events, eventually

from quire.router import __main__ as router
from quire.router.config import BadRouterConfig, load
from quire_schemas import signals, wire


@pytest.mark.parametrize("content", ["", "{}", '{"control_socket": "x", "snapshot_file": "y", "port": "x"}'])
def test_a_wrong_configuration_is_named(tmp_path: Path, content: str) -> None:
    file = tmp_path / "c.json"
    file.write_text(content)
    with pytest.raises(BadRouterConfig, match=r"c\.json"):
        load(file)


def test_a_wrong_configuration_ends_the_router_with_78(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "quire.router", str(tmp_path / "absent")], capture_output=True, text=True
    )
    assert done.returncode == 78
    assert done.stderr.startswith("error: ")


@pytest.mark.parametrize(("arguments", "code"), [([], 78), (["a", "b"], 78), (["--help"], 0)])
def test_wrong_arguments_are_not_worth_another_start(arguments: list[str], code: int) -> None:
    assert router.main(arguments) == code


def test_it_says_ready_when_requests_are_answered(own_world: World) -> None:
    reading, writing = os.pipe()
    with os.fdopen(reading) as told:
        own_world.restart(status_fd=writing)
        os.close(writing)
        assert json.loads(told.readline()) == {"event": "ready"}
        assert httpx.get(f"{own_world.url}/livez", timeout=10).status_code == 200
        assert (own_world.folder / "control.sock").exists()
        own_world.process.terminate()
        assert told.read() == ""


async def test_health_is_about_serving(world: World) -> None:
    async with httpx.AsyncClient(base_url=world.url) as http:
        assert (await http.get("/health")).json() == {"status": "unavailable", "models": {}}

        async def states() -> tuple[int, int, int]:
            return tuple([(await http.get(f"/{path}")).status_code for path in ("livez", "readyz", "health")])  # type: ignore[return-value]

        await world.table(world.route())
        assert await states() == (200, 200, 503)
        engine = await world.engine()
        await world.serve(engine)
        assert await states() == (200, 200, 200)
        await world.table(world.route(engine.endpoint(draining=True)))
        assert await states() == (200, 200, 503)
        for path in ("livez", "readyz", "health"):
            head, get = await http.head(f"/{path}"), await http.get(f"/{path}")
            assert (head.status_code, head.content) == (get.status_code, b"")
            assert head.headers["content-length"] == get.headers["content-length"]


async def test_series_are_there_at_zero_and_leave_with_their_model(world: World) -> None:
    engine = await world.engine()
    await world.serve(engine)
    names = {
        f'{signals.REQUESTS}_total{{finish="stop",model="tiny",operation="chat"}}',
        f'{signals.PROMPT_TOKENS}_total{{model="tiny"}}',
        f'{signals.GENERATION_TOKENS}_total{{model="tiny"}}',
        f'{signals.TIME_TO_FIRST_TOKEN}_count{{model="tiny"}}',
        f'{signals.QUEUE_TIME}_count{{model="tiny"}}',
        f'{signals.KV_CACHE_USAGE}{{model="tiny",replica="r1"}}',
        f'{signals.PREEMPTIONS}_total{{model="tiny",replica="r1"}}',
    }
    before = await world.metrics()
    assert {before[name] for name in names} == {0.0}
    assert before[f'{signals.REPLICA_UP}{{model="tiny",replica="r1"}}'] == 1
    async with world.client() as client:
        await client.chat.completions.create(model="tiny", messages=ASK, max_tokens=7)
        for name in ("nobody", "else", "' OR 1"):
            with pytest.raises(openai.NotFoundError):
                await client.chat.completions.create(model=name, messages=ASK)
    after = await world.metrics()
    assert after.keys() == before.keys()
    assert after[f'{signals.GENERATION_TOKENS}_total{{model="tiny"}}'] == 7
    assert 1 <= after[f'{signals.INTER_TOKEN_LATENCY}_count{{model="tiny"}}'] <= 6  # tokens may come together
    unknown = f'{signals.REQUESTS}_total{{finish="refused",model="-",operation="chat"}}'
    assert after[unknown] == before[unknown] + 3
    await world.table()
    assert not any('"tiny"' in name for name in await world.metrics())


async def test_only_a_newer_table_counts_and_the_last_one_survives_a_restart(own_world: World) -> None:
    world = own_world
    engine = await world.engine()
    await world.serve(engine)
    old = await world.control(wire.RoutingTable(version=1, models=()))
    assert (old.version, len(old.replicas)) == (1, 1)
    world.restart()
    async with world.client() as client:  # connects to the socket we hold; the new router finds it in the backlog
        answer = await client.chat.completions.create(model="tiny", messages=ASK)
    assert answer.choices[0].message.content == TEXT
    world.wait_until_up()
    status = await world.control(wire.GetRouterStatus())
    assert (status.version, status.base_url, status.pid) == (1, world.url, world.process.pid)


async def test_a_broken_snapshot_is_reported_and_left_aside(own_world: World) -> None:
    world = own_world
    (world.folder / "table.json").write_text("{")
    world.restart()
    world.wait_until_up()
    assert (await world.control(wire.GetRouterStatus())).version == 0
    assert "cannot be used" in (world.folder / "router.log").read_text()


async def test_a_table_that_cannot_be_kept_on_disk_serves_all_the_same(own_world: World) -> None:
    world = own_world
    (world.folder / "table.json").unlink(missing_ok=True)
    (world.folder / "table.json").mkdir()  # nothing can take its place, for root neither
    await world.serve(await world.engine())
    async with world.client() as client:
        answer = await client.chat.completions.create(model="tiny", messages=ASK)
    assert answer.choices[0].message.content == TEXT
    assert "cannot be kept" in (world.folder / "router.log").read_text()


async def test_garbage_on_the_control_socket_ends_that_connection_alone(world: World) -> None:
    reader, writer = await asyncio.open_unix_connection(world.folder / "control.sock")
    writer.write(b"\xff\xff\xff\xff")
    assert await reader.read() == b""
    writer.close()
    assert (await world.control(wire.GetRouterStatus())).version == world.version
    mode = (world.folder / "control.sock").stat().st_mode & 0o777
    assert mode == 0o600


async def test_a_signal_that_comes_before_it_serves_ends_it_in_order(own_world: World) -> None:
    world = own_world
    world.process.kill()
    world.process.wait()
    socket = world.folder / "control.sock"
    socket.unlink()
    world.restart()
    while not socket.exists():
        pass  # without a pause: there are some milliseconds
    world.process.terminate()
    assert await asyncio.to_thread(world.process.wait, 10) == 0


async def test_sigterm_lets_a_stream_finish(own_world: World) -> None:
    world = own_world
    engine = await world.engine(pace=0.005)
    await world.serve(engine)
    async with world.client() as client:
        stream = await client.chat.completions.create(model="tiny", messages=ASK, stream=True)
        await anext(aiter(stream))
        world.process.send_signal(signal.SIGTERM)
        text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
    assert text == TEXT


async def test_sigterm_tells_whoever_asks_on_that_a_connection_ends(own_world: World) -> None:
    world = own_world

    def asks_on() -> list[str | None]:
        """Ask over one connection until there is an answer that ends it: what each said of the connection."""
        busy, idle = (http.client.HTTPConnection("127.0.0.1", world.port, timeout=10) for _ in range(2))
        for each in (busy, idle):
            each.request("GET", "/livez")
            assert each.getresponse().read()
            each.auto_open = 0  # one connection, and no other one after it
        world.process.send_signal(signal.SIGTERM)
        told: list[str | None] = []
        while "close" not in told:
            busy.request("GET", "/livez")
            answer = busy.getresponse()
            assert answer.status == 200
            assert answer.read()
            told.append(answer.headers.get("connection"))
        assert idle.sock.recv(1) == b"", "who asks nothing is left soon"
        idle.close()
        return told

    told = await asyncio.to_thread(asks_on)
    assert told[:-1] == [None] * (len(told) - 1)
    assert await asyncio.to_thread(world.process.wait, 5) == 0


async def test_a_head_that_has_begun_is_read_to_its_end(own_world: World) -> None:
    world = own_world
    reader, writer = await asyncio.open_connection("127.0.0.1", world.port)
    await world.raw(b"GET /livez HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")  # it is taken by now
    world.process.send_signal(signal.SIGTERM)
    await asyncio.sleep(0.1)
    writer.write(b"GET /livez HTTP/1.1\r\n")
    await asyncio.sleep(0.5)
    writer.write(b"Host: localhost\r\n\r\n")
    assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200")
    writer.close()
    assert await asyncio.to_thread(world.process.wait, 5) == 0


async def test_the_place_of_a_control_socket_that_nobody_answers_at_is_taken_again(own_world: World) -> None:
    """A router that is killed shortly after it was to follow this one has left its socket there, or none."""
    world = own_world
    path = world.folder / "control.sock"

    def asked() -> bool:
        with socket.socket(socket.AF_UNIX) as mine:
            mine.settimeout(0.5)
            try:
                mine.connect(str(path))
                mine.sendall(wire.frame(wire.GetRouterStatus()))
                return bool(mine.recv(4))
            except OSError:
                return False

    async def answers() -> bool:
        return await asyncio.to_thread(asked)

    path.unlink()
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(path))
        other.listen()
        await asyncio.sleep(1.5)
        assert not await answers(), "whoever answers there keeps it"
    await eventually(answers)
    path.unlink()
    await eventually(answers)


async def test_sigterm_ends_a_stream_that_takes_too_long_with_an_error(own_world: World) -> None:
    world = own_world
    engine = await world.engine(pace=0.05, text=TEXT * 3)
    await world.serve(engine)
    async with world.client() as client:
        stream = await client.chat.completions.create(model="tiny", messages=ASK, stream=True)
        with pytest.raises(openai.APIError, match="server stopped"):
            async for _ in stream:
                world.process.send_signal(signal.SIGTERM)


async def test_told_to_finish_it_ends_what_outlasts_the_grace_and_then_itself(own_world: World) -> None:
    world = own_world
    engine = await world.engine(pace=0.05, text=TEXT * 3)
    await world.serve(engine)
    asked = asyncio.create_task(world.raw(world.post("/v1/chat/completions", big(stream=True))))
    late = asyncio.create_task(world.raw(world.post("/v1/chat/completions", big(max_tokens=4))))

    async def running() -> bool:
        return bool(engine.running)

    await eventually(running)
    began = time.monotonic()
    await world.control(wire.Finish(grace=0.7))
    got = events(await asked)
    assert 0.6 < time.monotonic() - began < 2.7
    assert got[-1]["error"]["code"] == "service_unavailable"
    assert ["error" in event for event in got] == [False] * (len(got) - 1) + [True]
    assert (await late).startswith(b"HTTP/1.1 200"), "what ends within the grace ends as it should"
    assert await asyncio.to_thread(world.process.wait, 3) == 0
    assert time.monotonic() - began < 0.7 + 2
