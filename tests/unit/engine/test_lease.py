"""Who keeps an engine alive, and how it leaves when nobody does."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
from tests.unit.engine.serving import Client, spec_in

from quire_engine.lease import Lease
from quire_engine.server import Server, Status
from quire_schemas.wire import Deltas, EngineEvent, EngineSpec, Generate, Hello, Ping, Sampling, Stats

LONG = Sampling(max_tokens=1000, temperature=0.0, ignore_eos=True)


class Life:
    """A server from its start to the end that it finds by itself."""

    def __init__(self, spec: EngineSpec) -> None:
        self.socket = Path(spec.socket)
        self._reading, self._writing = os.pipe()
        self.server = Server(spec, Status(self._writing))
        self.task = asyncio.create_task(self.server.run())

    async def ready(self) -> None:
        while not self.socket.exists():
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.01)

    async def end(self) -> EngineEvent:
        """Its last words, once it has ended with 0."""
        assert await asyncio.wait_for(self.task, 30) == 0
        return msgspec.json.decode(os.read(self._reading, 65536).splitlines()[-1], type=EngineEvent)

    async def close(self) -> None:
        self.task.cancel()
        await asyncio.wait([self.task])
        assert self.server.stop_driver()
        os.close(self._reading)
        os.close(self._writing)


@asynccontextmanager
async def living(spec: EngineSpec) -> AsyncIterator[Life]:
    life = Life(spec)
    try:
        await life.ready()
        yield life
    finally:
        await life.close()


async def speak(client: Client, seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        client.send(Ping())
        await client.next(Stats)
        await asyncio.sleep(0.1)


async def test_a_routers_words_keep_the_engine_and_an_open_connection_does_not(folder: Path) -> None:
    async with living(spec_in(folder, adoption_window=1.0)) as life:
        router, script = await Client.connect(str(life.socket)), await Client.connect(str(life.socket))
        router.send(Hello("router"))
        script.send(Hello("script"))
        await speak(router, 2.5)
        assert not life.task.done(), "two and a half windows"
        silent = time.monotonic()
        talking = asyncio.create_task(speak(script, 60))
        last = await life.end()
        await asyncio.gather(talking, return_exceptions=True)  # cut with the engine
        assert time.monotonic() - silent >= 0.9, "not before the window is over"
        assert (last.event, last.reason, last.retryable) == ("failed", "LeaseEnded", True)
        assert last.message == "neither a router nor a control plane has spoken for 1 seconds"
        assert await router.is_cut()
        assert not life.socket.exists()
        router.close()
        script.close()


async def test_what_is_computed_is_finished_first(folder: Path) -> None:
    async with living(spec_in(folder, adoption_window=0.2, max_model_len=2048)) as life:
        router = await Client.connect(str(life.socket))
        router.send(Hello("router"), Generate("a", [5, 6], LONG))
        await router.next(Deltas)
        began = time.monotonic()
        heard = await router.hear("a")
        assert time.monotonic() - began > 0.5, "else the lease had no time to run out"
        assert heard["a"][-1].finish_reason == "length"
        assert (await life.end()).reason == "LeaseEnded"
        router.close()


async def test_whoever_speaks_again_while_it_drains_finds_it_alive(folder: Path) -> None:
    async with living(spec_in(folder, adoption_window=0.4, max_model_len=2048)) as life:
        router = await Client.connect(str(life.socket))
        router.send(Hello("router"), Generate("a", [5, 6], LONG))
        await asyncio.sleep(0.7)
        await speak(router, 1.0)
        assert not life.task.done()
        router.close()


async def test_a_control_plane_speaks_through_the_shim(folder: Path) -> None:
    silent_for = 0.0
    asked = 0

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal asked
        asked += 1
        assert await reader.readline() == b'{"op":"status"}\n'
        writer.write(b'{"running": true, "unwatchedFor": %g, "lines": []}\n' % silent_for)
        writer.close()

    folder.mkdir(mode=0o700)
    shim = await asyncio.start_unix_server(answer, folder / "shim.sock")
    async with living(spec_in(folder, adoption_window=0.4, shim=str(folder / "shim.sock"))) as life:
        await asyncio.sleep(2.0)
        assert not life.task.done()
        assert 1 <= asked <= 5, "only when the routers' word has run out"
        silent_for = 0.4
        assert (await life.end()).reason == "LeaseEnded"
    shim.close()


async def test_a_shim_that_says_nothing_useful_vouches_for_nobody(folder: Path) -> None:
    folder.mkdir(mode=0o700)

    async def babble(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b'{"unwatchedFor": "never"}\n')
        writer.close()

    shim = await asyncio.start_unix_server(babble, folder / "shim.sock")
    for socket in ("shim.sock", "absent.sock"):
        lease = Lease(0.01, str(folder / socket), time.monotonic)
        await asyncio.wait_for(lease.run_out(), 10)
    shim.close()


async def test_words_that_were_spoken_while_the_process_stood_still_count() -> None:
    """The clock is past the window, as after SIGCONT; what lies in the sockets is read before the lease ends."""
    now = 0.0
    lease = Lease(100.0, None, lambda: now)
    now = 1000.0
    ending = asyncio.create_task(lease.run_out())
    await asyncio.sleep(0.05)
    lease.heard()
    await asyncio.sleep(0.4)
    assert not ending.done()
    ending.cancel()
