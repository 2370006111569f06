"""What a head does about one of its workers, which here is a script at the other end of a real line."""

from __future__ import annotations

import asyncio
import logging
import socket
import sys
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from quire.router.crew import Crew
from quire.router.fleet import Fleet
from quire.router.server import Board
from quire_schemas import signals

SCRIPT = """
import asyncio, socket, sys
from quire.router.line import Line
from quire_schemas import workers

async def main():
    line = await Line.over(
        socket.socket(fileno=int(sys.argv[1])), workers.FromWorkerFrame, workers.FromHeadFrame
    )
    for each in (workers.Serving(), workers.Wake(), workers.Wake(), workers.Enter(7, "gone", "key")):
        line.tell(each)
    async for message in line.heard():
        if isinstance(message, workers.Finish):
            return
        if isinstance(message, (workers.Refused, workers.Done)):
            line.tell(workers.BeginResponse(getattr(message, "kind", "let in"), message.number))

asyncio.run(main())
"""

LAST_WORDS = """
import asyncio, socket, sys
from quire.router.line import Line
from quire_schemas import wire, workers

async def main():
    line = await Line.over(
        socket.socket(fileno=int(sys.argv[1])), workers.FromWorkerFrame, workers.FromHeadFrame
    )
    counts = workers.Counts({}, refused=3)
    for each in (workers.Serving(), counts, workers.BeginResponse("counted", 1)):
        line.tell(each)
    async for message in line.heard():
        if isinstance(message, workers.GetCounts):
            answer = workers.FromWorkerFrame([workers.CountsFor(message.number, counts)])
            line._writer.write(wire.frame(answer) + wire.frame(wire.GetStats()))

asyncio.run(main())
"""
"""It answers with its counts, and in the same breath with what ends it."""


class Desk:
    """What a head is asked for; the first time it fails."""

    def __init__(self) -> None:
        self.woken = 0
        self.told: asyncio.Queue[tuple[str, int]] = asyncio.Queue()

    def wake(self) -> None:
        self.woken += 1
        if self.woken == 1:
            raise ValueError("for once")

    def begin(self, what: str, number: int) -> None:
        self.told.put_nowait((what, number))


async def test_what_fails_costs_no_worker_and_a_tenant_that_is_no_more_is_not_let_in() -> None:
    fleet, desk, tries = Fleet(None), Desk(), 0
    head: Any = SimpleNamespace(desk=None, executor=desk, background=desk)

    def command(index: int, line: int, board: int) -> Sequence[str]:
        nonlocal tries
        tries += 1
        if tries == 1:
            raise ValueError("no command, for once")
        return [sys.executable, "-c", SCRIPT, str(line)]

    with socket.create_server(("127.0.0.1", 0)) as listening:
        crew = Crew(1, command, listening, Board.new(), fleet, head)
        crew.start()
        try:
            assert await asyncio.wait_for(desk.told.get(), 10) == ("Unauthenticated", 7)
            assert desk.woken == 2
            assert tries == 2
        finally:
            crew.finish(1.0)
            await crew.close()
            await fleet.close()


async def test_a_worker_of_another_version_is_told_of(caplog: pytest.LogCaptureFixture) -> None:
    fleet = Fleet(None)
    head: Any = SimpleNamespace(desk=None)
    stranger = [sys.executable, "-m", "quire.router", "none.json", "--worker", "1", "--speaks", "another"]
    with socket.create_server(("127.0.0.1", 0)) as listening, caplog.at_level(logging.ERROR, "quire.router"):
        crew = Crew(1, lambda *_: stranger, listening, Board.new(), fleet, head)
        crew.start()
        try:
            async with asyncio.timeout(10):
                while not any("replace the gateway" in each.getMessage() for each in caplog.records):
                    await asyncio.sleep(0.01)
        finally:
            crew.finish(1.0)
            await crew.close()
            await fleet.close()


async def test_what_a_worker_counts_that_ends_meanwhile_is_counted_once() -> None:
    fleet, desk = Fleet(None), Desk()
    fleet.metrics.watch_room(lambda: 0, lambda: 0.0)
    head: Any = SimpleNamespace(desk=None, background=desk)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        crew = Crew(
            1,
            lambda _, line, __: [sys.executable, "-c", LAST_WORDS, str(line)],
            listening,
            Board.new(),
            fleet,
            head,
        )
        crew.start()
        try:
            await asyncio.wait_for(desk.told.get(), 10)
            told = (await crew.scrape()).decode()
            assert f"{signals.CONNECTIONS_REFUSED}_total 3.0" in told
        finally:
            crew.finish(1.0)
            await crew.close()
            await fleet.close()
