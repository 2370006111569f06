"""A worker of a router besides its head: an HTTP server of its own on the shared socket, with connections of its
own to the engines, which asks the head for what all workers share (`far`).

It takes no request before it acts by the head's table. It tells once a second what it has counted, which is its
sign of life, and at once to which replicas it is connected. When the head is gone so is it: nobody would count
what it does.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from typing import Final

from quire.router.access import Access
from quire.router.app import build_worker
from quire.router.config import RouterConfig
from quire.router.far import FarHead, Wire
from quire.router.fleet import Fleet
from quire.router.line import Line
from quire.router.server import Board, Server, deaf, heed, options, prepare, until_told
from quire.router.telling import Teller
from quire.router.tls import Certificate
from quire_operators.fleet import sibling
from quire_schemas import workers

log = logging.getLogger("quire.router")

TELL_SECONDS: Final = 1.0


class _Worker:
    """What goes on beside the server."""

    def __init__(self, line: Wire, fleet: Fleet, head: FarHead) -> None:
        self._line = line
        self._fleet = fleet
        self._head = head
        self.server: Server | None = None
        self.ready = asyncio.Event()
        """It acts by the head's table."""
        self._tables: asyncio.Queue[workers.Take] = asyncio.Queue()
        self.ending = False

    async def hear(self) -> None:
        """What the head says, until it is gone."""
        async for message in self._line.heard():
            match message:
                case workers.Take():
                    self._tables.put_nowait(message)
                case workers.Finish(grace):
                    self.ending = True
                    if self.server is not None:
                        self.server.finish(grace)
                    else:
                        os._exit(0)  # it has not begun
                case workers.GetCounts(number):
                    self._line.tell(workers.CountsFor(number, self._counts()))
                case _:
                    self._head.hear(message)
        if not self.ending:
            log.error("the head of the router is gone, and so is this worker")
        os._exit(0 if self.ending else 1)

    async def take_tables(self) -> None:
        while True:
            message = await self._tables.get()
            await self._fleet.apply(message.table)
            self._line.tell(workers.TableTaken(self._fleet.table.version, self._fleet.unusable))
            self.ready.set()

    async def tell_links(self) -> None:
        while True:
            changed = self._fleet.changed
            self._head.tell_links()
            await changed.wait()

    async def tell_counts(self) -> None:
        while True:
            await asyncio.sleep(TELL_SECONDS)
            self._line.tell(self._counts())

    def last_words(self) -> None:
        """Tell what has been counted, and no more."""
        self._line.tell(self._counts())
        self._line.flush()

    def _counts(self) -> workers.Counts:
        return self._fleet.metrics.counts(self.server.requests if self.server is not None else 0)


async def work(
    config: RouterConfig,
    listening: socket.socket,
    end: socket.socket,
    board: Board,
    teller: Teller,
) -> None:
    """Serve on `listening`, which others share, for the head at the other end of `end`, until that says so."""
    sibling.die_with_starter()
    listening = door = prepare(listening, plain=config.tls is None)
    line: Wire = await Line.over(end, workers.FromWorkerFrame, workers.FromHeadFrame)
    fleet = Fleet(None, Access(config.closed), leads=False)
    fleet.metrics.watch_room(lambda: door.refused, lambda: fleet.memory.share)
    head = FarHead(line, fleet)
    application = build_worker(fleet, config, teller, head)
    worker = _Worker(line, fleet, head)
    beside = [
        asyncio.create_task(part(), name=part.__name__)
        for part in (worker.hear, worker.take_tables, worker.tell_links, worker.tell_counts)
    ]
    for each in beside:
        each.add_done_callback(_end_if_broken)
    await worker.ready.wait()
    await teller.begun()
    certificate = None if config.tls is None else Certificate(config.tls)

    def begins_to_end(_: float) -> None:
        worker.ending = True

    server = worker.server = Server(
        options(application.asgi, fleet, certificate),
        config.shutdown_grace,
        lambda: line.tell(workers.Serving()),
        begins_to_end,
        board,
    )
    heed(server)
    try:
        await until_told(server, listening, certificate, fleet.memory)
    finally:
        for each in beside:
            each.cancel()
        worker.last_words()
        await application.store.close()
        await fleet.close()
        line.close()
        deaf()


def _end_if_broken(part: asyncio.Task[None]) -> None:
    """A worker without one of its parts is none; the head starts another one."""
    if not part.cancelled() and (error := part.exception()) is not None:
        log.error("the worker's %s failed", part.get_name(), exc_info=error)
        os._exit(1)


__all__ = ["work"]
