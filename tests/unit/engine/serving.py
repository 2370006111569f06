"""A server in this process and clients of it, over a real Unix socket."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

import msgspec
from tests.engine_specs import tiny_spec

from quire_engine.server import Server, Status
from quire_schemas.wire import (
    Delta,
    Deltas,
    EngineEvent,
    EngineSpec,
    FromEngine,
    Hello,
    Limits,
    Reader,
    Sampling,
    Stats,
    frame,
)

LONG = Sampling(max_tokens=400, temperature=0.0, ignore_eos=True)
SHORT = Sampling(max_tokens=3, temperature=0.0, ignore_eos=True)
M = TypeVar("M")


def spec_in(folder: Path, **fields: Any) -> EngineSpec:
    return tiny_spec(**{"incarnation": 3, "socket": str(folder / "engine.sock"), **fields})


class Client:
    """One connection to an engine."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.messages: Reader[Any] = Reader(reader, FromEngine)
        self.writer = writer

    @classmethod
    async def connect(cls, path: str) -> Client:
        return cls(*await asyncio.open_unix_connection(path))

    def send(self, *messages: msgspec.Struct) -> None:
        for message in messages:
            self.writer.write(frame(message))

    async def next(self, kind: type[M]) -> M:
        """The next message of that kind; others are passed over."""
        while True:
            message = await asyncio.wait_for(self.messages.read(), 10)
            assert message is not None, "the engine closed the connection"
            if isinstance(message, kind):
                return message

    async def hear(self, *names: str) -> dict[str, list[Delta]]:
        """Deltas by request until each of `names` has ended."""
        heard: dict[str, list[Delta]] = {}
        while not all(name in heard and heard[name][-1].finish_reason for name in names):
            for delta in (await self.next(Deltas)).items:
                heard.setdefault(delta.id, []).append(delta)
        return heard

    async def is_cut(self) -> bool:
        """Whether the engine ends the connection, whatever it still sends."""
        try:
            while await asyncio.wait_for(self.messages.read(), 10) is not None:
                pass
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        return True

    def close(self) -> None:
        self.writer.close()


@asynccontextmanager
async def serving(spec: EngineSpec) -> AsyncIterator[Server]:
    """A server that is ready; ended by the signal that ends a real one."""
    reading, writing = os.pipe()
    lines = asyncio.StreamReader()
    loop = asyncio.get_running_loop()
    pipe, _ = await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), os.fdopen(reading, "rb"))
    server = Server(spec, Status(writing))
    task = asyncio.create_task(server.run())
    events: list[EngineEvent] = []
    while not events or events[-1].event != "ready":
        events.append(msgspec.json.decode(await asyncio.wait_for(lines.readline(), 20), type=EngineEvent))
        assert events[-1].event != "failed", events[-1]
    try:
        yield server
    finally:
        os.kill(os.getpid(), signal.SIGTERM)
        assert await asyncio.wait_for(task, 10) == 0
        assert server.stop_driver()
        os.close(writing)
        pipe.close()
        assert not Path(spec.socket).exists()


async def greeted(spec: EngineSpec) -> Client:
    client = await Client.connect(spec.socket)
    client.send(Hello("script"))
    await client.next(Stats)
    return client


async def until_idle(client: Client) -> Stats:
    """The first stats that show no request."""
    while True:
        client.send(Limits("asked", 8, 64, True))
        stats = await client.next(Stats)
        if not stats.running and not stats.waiting:
            return stats
        await asyncio.sleep(0.01)
