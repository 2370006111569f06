"""Heartbeats over a real socket: who counts as silent, and since when."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from quire_operators.fleet.heartbeat import SILENCE_SECONDS, Heartbeats
from quire_schemas import wire


@dataclass
class Engine:
    """Answers `GetStats` while `awake`; its socket accepts and welcomes whatever happens."""

    socket: Path
    awake: bool = True
    asked: int = 0
    replica: str = "m-r1-0"
    roles: list[str] = field(default_factory=list)
    mute: bool = False
    """Hangs up on a greeting, as an engine of another version does."""

    async def open(self) -> asyncio.Server:
        return await asyncio.start_unix_server(self.talk, self.socket)

    async def talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        frames: wire.Reader[wire.ToEngine] = wire.Reader(reader, wire.ToEngine)
        while (message := await frames.read()) is not None:
            if isinstance(message, wire.Hello):
                self.roles.append(message.role)
                if self.mute:
                    break
                writer.write(wire.frame(wire.Welcome(self.replica, 1, wire.PROTOCOL, 9, (), 9, 1, 9, 1)))
            elif isinstance(message, wire.GetStats):
                self.asked += 1
                if self.awake:
                    writer.write(wire.frame(wire.Stats(0, 1, 0.0, 0, 0, 9, 0, 0, 0, 0, 0, "h")))
        writer.close()


@dataclass
class World:
    engine: Engine
    beats: Heartbeats
    news: list[str]
    ahead: float = 0.0

    def clock(self) -> float:
        return time.monotonic() + self.ahead


NAME = ("m-r1-0", 1)


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    engine = Engine(tmp_path / "e.sock")
    server = await engine.open()
    news: list[str] = []
    made = World(engine, Heartbeats(news.append, lambda: made.clock()), news)
    yield made
    await made.beats.close()
    server.close()


async def until(world: World, silent: bool) -> None:
    async with asyncio.timeout(20):
        while (world.beats.silent_since(NAME) is not None) is not silent:
            await asyncio.sleep(0.02)


async def test_an_engine_whose_loop_stands_is_silent_though_its_socket_answers(world: World) -> None:
    world.beats.keep("m", {NAME: str(world.engine.socket)})
    async with asyncio.timeout(20):
        while world.engine.asked < 3:
            await asyncio.sleep(0.02)
    assert world.beats.silent_since(NAME) is None
    assert world.engine.roles == ["control"], "one connection, kept"
    stopped_at = world.clock()
    world.engine.awake = False
    await until(world, silent=True)
    since = world.beats.silent_since(NAME)
    assert since is not None
    assert stopped_at - 1 <= since <= stopped_at + 0.3
    world.engine.awake = True
    await until(world, silent=False)
    assert world.news == ["m", "m"]
    world.beats.keep("m", {})
    assert world.beats.silent_since(NAME) is None


async def test_a_stranger_on_the_socket_is_no_sign_of_life(world: World) -> None:
    world.engine.replica = "m-r1-7"
    world.beats.keep("m", {NAME: str(world.engine.socket)})
    await until(world, silent=True)


async def test_an_engine_that_cannot_read_the_greeting_is_not_taken_for_silent(world: World) -> None:
    world.engine.mute = True
    world.beats.keep("m", {NAME: str(world.engine.socket)})
    await asyncio.sleep(SILENCE_SECONDS + 1.5)
    assert len(world.engine.roles) > 1, "it was greeted again"
    assert world.beats.silent_since(NAME) is None


async def test_time_that_this_process_slept_through_is_not_held_against_engines(world: World) -> None:
    world.beats.keep("m", {NAME: str(world.engine.socket)})
    async with asyncio.timeout(20):
        while world.engine.asked < 2:
            await asyncio.sleep(0.02)
    world.engine.awake = False
    world.ahead += 3600.0
    await until(world, silent=True)
    since = world.beats.silent_since(NAME)
    assert since is not None
    assert world.clock() - since < 60
