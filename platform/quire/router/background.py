"""Responses that nobody waits for: begun at once, gone on with after a crash, ended by who cancels them.

A response is worked on like any other request, by a client inside this process. What cannot be served now is tried
again for a while; what cannot be served at all fails, and says why.

What waits is an id here, and its request is in the store: it is read for a try, and those of all tries together
are bounded. Who comes first is tried first.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Final, Protocol

import msgspec
from litestar.types import ASGIApp

from quire.errors import NotFound, QueueFull, StorageUnavailable
from quire.router.access import OF_LINES, RATE_LIMITED, Access
from quire.router.inside import InsideClient
from quire.router.responses import Responses
from quire_schemas.openai.responses import ResponseError

log = logging.getLogger("quire.router")

PATH: Final = "/v1/responses"
PAUSES: Final = (0.5, 15.0)
"""Seconds until another try, and the most that doubling makes of it."""
MAX_WAITING: Final = 1_000
"""Responses that are worked on or wait; each is a task."""
MAX_TRIED_BYTES: Final = 32 * 1024 * 1024
"""Of the requests that are tried at a time; a larger one is tried alone."""
TRIED_SECONDS: Final = 3600.0
"""How long a response is tried that cannot be served now."""


class _Told(msgspec.Struct):
    code: str | None
    message: str


class _Refusal(msgspec.Struct):
    error: _Told


@dataclass(slots=True)
class _Work:
    size: int
    """Bytes of its request."""
    gone: asyncio.Event = field(default_factory=asyncio.Event)
    is_tried: bool = False
    task: asyncio.Task[None] | None = None

    def leave(self) -> None:
        """Let a try end as if the client had gone, and wait for no other one."""
        self.gone.set()
        if self.task is not None and not self.is_tried:
            self.task.cancel()


class _Room:
    """Bytes for all who want to come in, in their order; who wants more than there are is in alone."""

    def __init__(self) -> None:
        self._taken = 0
        self._turn = asyncio.Lock()
        self._left = asyncio.Event()

    @contextlib.asynccontextmanager
    async def of(self, size: int) -> AsyncIterator[None]:
        async with self._turn:
            while self._taken and self._taken + size > MAX_TRIED_BYTES:
                self._left.clear()
                await self._left.wait()
            self._taken += size
        try:
            yield
        finally:
            self._taken -= size
            self._left.set()


class Later(Protocol):
    """Where requests leave what is to be answered later: a `Background`, here or at the head."""

    async def check_room(self) -> None:
        """Raises `QueueFull` when there are as many as there may be."""

    def begin(self, response_id: str, size: int) -> None:
        """Have a response worked on that is kept, whose request has `size` bytes."""

    async def cancel(self, response_id: str, owner: str) -> bytes:
        """The response as it is once it is cancelled. Raises `NotFound` and `Conflict`."""


class Background:
    """The responses of one store. `exchange` makes what answers the request of the response with that id."""

    def __init__(self, responses: Responses, exchange: Callable[[str], ASGIApp], access: Access) -> None:
        self._responses = responses
        self._access = access
        self._exchange = exchange
        self._works: dict[str, _Work] = {}
        self._room = _Room()
        self._closed = False

    async def check_room(self) -> None:
        if len(self._works) >= MAX_WAITING:
            raise QueueFull(
                f"{len(self._works)} responses in the background wait already, as many as may.", retry_after=30.0
            )

    def begin(self, response_id: str, size: int) -> None:
        if self._closed or response_id in self._works:
            return
        work = self._works[response_id] = _Work(size)
        work.task = asyncio.create_task(self._carry(response_id, work), name=response_id)
        work.task.add_done_callback(lambda _: self._works.pop(response_id))

    async def cancel(self, response_id: str, owner: str) -> bytes:
        answer = await self._responses.cancel(response_id, owner)
        self.leave(response_id)
        return answer

    def leave(self, response_id: str) -> None:
        """Work no more on a response, which was cancelled."""
        if (work := self._works.get(response_id)) is not None:
            work.leave()

    async def resume(self) -> None:
        """Begin those that a router before has left."""
        pause = PAUSES[0]
        while not self._closed:
            try:
                for waiting in await self._responses.waiting():
                    self.begin(waiting.id, waiting.size)
            except StorageUnavailable:
                await asyncio.sleep(pause)
                pause = min(2 * pause, PAUSES[1])
            else:
                return

    async def sweep(self) -> None:
        if gone := await self._responses.sweep():
            log.info("%d responses have expired", gone)

    async def close(self) -> None:
        """Leave all of it to the next router."""
        self._closed = True
        tasks = [work.task for work in self._works.values() if work.task is not None]
        for work in self._works.values():
            work.leave()
        if tasks:
            await asyncio.wait(tasks)

    async def _carry(self, response_id: str, work: _Work) -> None:
        """Try until the response has ended, whatever comes between: nobody else would before the next start."""
        loop = asyncio.get_running_loop()
        until, pause = math.inf, PAUSES[0]
        while not work.gone.is_set():
            async with self._room.of(work.size):
                until = min(until, loop.time() + TRIED_SECONDS)
                work.is_tried = True
                try:
                    if await self._try(response_id, work, last=loop.time() >= until):
                        return
                except NotFound:
                    return  # somebody took it out of the store
                except StorageUnavailable:
                    pass  # it is in the log
                except Exception:
                    log.exception("response %s: a step failed, and is tried again", response_id)
                finally:
                    work.is_tried = False
            if not work.gone.is_set():
                await asyncio.sleep(pause)
                pause = min(2 * pause, PAUSES[1])

    async def _try(self, response_id: str, work: _Work, *, last: bool) -> bool:
        """Whether nothing is left to do. What cannot be served now fails with the `last` try; who is at a limit of
        his waits for as long as it takes."""
        started = await self._responses.start(response_id)
        if started is None:
            return True
        visit = self._access.inside(started.owner, started.key, OF_LINES[PATH])
        client = InsideClient(PATH, started.request, work.gone, visit)
        await client.ask(self._exchange(response_id))
        if client.status in (None, 200):
            return True  # it is kept, or was left
        told = msgspec.json.decode(bytes(client.body), type=_Refusal).error
        if told.code == RATE_LIMITED or (client.status in (429, 502, 503, 507) and not last):
            return False
        await self._responses.fail(response_id, ResponseError(told.code or "invalid_request", told.message))
        return True
