"""Who keeps an engine alive, and how it leaves when nobody does."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Literal

import msgspec
import pytest
from tests.unit.engine.serving import SHORT, Client, spec_in

from quire_engine.lease import Lease
from quire_engine.scheduler import Scheduler
from quire_engine.server import Server, Status
from quire_engine.step import StepPlan
from quire_schemas.wire import EngineEvent, EngineSpec, Generate, GetStats, Hello, Stats


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
        client.send(GetStats())
        await client.next(Stats)
        await asyncio.sleep(0.1)


@pytest.mark.parametrize("role", ["router", "control"])
async def test_words_from_above_keep_the_engine_and_an_open_connection_does_not(
    folder: Path, role: Literal["router", "control"]
) -> None:
    async with living(spec_in(folder, adoption_window=0.8)) as life:
        above, script = await Client.connect(str(life.socket)), await Client.connect(str(life.socket))
        above.send(Hello(role))
        script.send(Hello("script"))
        await speak(above, 2.0)
        assert not life.task.done(), "two and a half windows"
        silent = time.monotonic()
        talking = asyncio.create_task(speak(script, 60))
        last = await life.end()
        await asyncio.gather(talking, return_exceptions=True)  # cut with the engine
        assert time.monotonic() - silent >= 0.7, "not before the window is over"
        assert (last.event, last.reason, last.retryable) == ("failed", "LeaseEnded", True)
        assert last.message == "neither a router nor a control plane has spoken for 0.8 seconds"
        assert await above.is_cut()
        assert not life.socket.exists()
        above.close()
        script.close()


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """No step is made while it is clear. It begins set: loading makes a step of its own."""
    let_go = threading.Event()
    let_go.set()
    schedule = Scheduler.schedule

    def stuck(scheduler: Scheduler) -> StepPlan:
        assert let_go.wait(20)
        return schedule(scheduler)

    monkeypatch.setattr(Scheduler, "schedule", stuck)
    yield let_go
    let_go.set()


async def test_what_is_computed_is_finished_first(folder: Path, held: threading.Event) -> None:
    async with living(spec_in(folder, adoption_window=0.5)) as life:
        router = await Client.connect(str(life.socket))
        held.clear()
        router.send(Hello("router"), Generate("a", [5, 6], SHORT))
        await asyncio.sleep(1.2)  # the window and the last look are over
        assert not life.task.done()
        held.set()
        heard = await router.hear("a")
        assert heard["a"][-1].finish_reason == "length"
        assert (await life.end()).reason == "LeaseEnded"
        router.close()


async def test_whoever_speaks_again_while_it_drains_finds_it_alive(folder: Path, held: threading.Event) -> None:
    async with living(spec_in(folder, adoption_window=0.8)) as life:
        router = await Client.connect(str(life.socket))
        held.clear()
        router.send(Hello("router"), Generate("a", [5, 6], SHORT))
        await asyncio.sleep(1.5)  # the window and the last look are over
        router.send(GetStats())
        await asyncio.sleep(0.1)
        held.set()
        assert (await router.hear("a"))["a"][-1].finish_reason == "length"
        await speak(router, 1.2)
        assert not life.task.done()
        router.close()


async def test_words_that_were_spoken_while_the_process_stood_still_count() -> None:
    """The clock is past the window, as after SIGCONT; what lies in the sockets is read before the lease ends."""
    now = 0.0
    lease = Lease(0.1, lambda: now)
    ending = asyncio.create_task(lease.run_out())
    await asyncio.sleep(0.05)
    now = 1000.0
    await asyncio.sleep(0.1)
    lease.heard()
    await asyncio.sleep(0.5)
    assert not ending.done()
    now = 1001.0
    await asyncio.wait_for(ending, 10)
