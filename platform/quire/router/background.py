"""Responses that nobody waits for: begun at once, gone on with after a crash, ended by who cancels them.

A response is worked on like any other request, by a client inside this process. What cannot be served now is tried
again for a while; what cannot be served at all fails, and says why.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

import msgspec
from litestar.types import ASGIApp

from quire.errors import NotFound, QueueFull, StorageUnavailable
from quire.router.access import OF_LINES, RATE_LIMITED, Access
from quire.router.inside import InsideClient
from quire.router.responses import Responses, Waiting
from quire_schemas.openai.responses import ResponseError

log = logging.getLogger("quire.router")

PATH: Final = "/v1/responses"
PAUSES: Final = (0.5, 15.0)
"""Seconds until another try, and the most that doubling makes of it."""
MAX_WAITING: Final = 1_000
"""Responses that are worked on or wait; each is a task."""
TRIED_SECONDS: Final = 3600.0
"""How long a response is tried that cannot be served now."""


class _Told(msgspec.Struct):
    code: str | None
    message: str


class _Refusal(msgspec.Struct):
    error: _Told


@dataclass(slots=True)
class _Work:
    gone: asyncio.Event = field(default_factory=asyncio.Event)
    task: asyncio.Task[None] | None = None


class Background:
    """The responses of one store. `exchange` makes what answers the request of the response with that id."""

    def __init__(self, responses: Responses, exchange: Callable[[str], ASGIApp], access: Access) -> None:
        self._responses = responses
        self._access = access
        self._exchange = exchange
        self._works: dict[str, _Work] = {}
        self._closed = False

    def check_room(self) -> None:
        """Raises `QueueFull` when there are as many as there may be."""
        if len(self._works) >= MAX_WAITING:
            raise QueueFull(
                f"{len(self._works)} responses in the background wait already, as many as may.", retry_after=30.0
            )

    def begin(self, waiting: Waiting) -> None:
        """Work on a response that is kept."""
        if self._closed or waiting.id in self._works:
            return
        work = self._works[waiting.id] = _Work()
        work.task = asyncio.create_task(self._carry(waiting, work), name=waiting.id)

    async def cancel(self, response_id: str, owner: str) -> bytes:
        """The response as it is once it is cancelled. Raises `NotFound` and `Conflict`."""
        answer = await self._responses.cancel(response_id, owner)
        if (work := self._works.get(response_id)) is not None:
            work.gone.set()
        return answer

    async def resume(self) -> None:
        """Begin those that a router before has left."""
        pause = PAUSES[0]
        while not self._closed:
            try:
                for waiting in await self._responses.waiting():
                    self.begin(waiting)
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
            work.gone.set()
        if tasks:
            await asyncio.wait(tasks)

    async def _carry(self, waiting: Waiting, work: _Work) -> None:
        """Try until the response has ended, whatever comes between: nobody else would before the next start."""
        response_id = waiting.id
        loop = asyncio.get_running_loop()
        until, pause = loop.time() + TRIED_SECONDS, PAUSES[0]
        try:
            while not work.gone.is_set():
                try:
                    if await self._try(waiting, work, last=loop.time() >= until):
                        return
                except NotFound:
                    return  # somebody took it out of the store
                except StorageUnavailable:
                    pass  # it is in the log
                except Exception:
                    log.exception("response %s: a step failed, and is tried again", response_id)
                await self._pause(work, pause)
                pause = min(2 * pause, PAUSES[1])
        finally:
            del self._works[response_id]

    async def _try(self, waiting: Waiting, work: _Work, *, last: bool) -> bool:
        """Whether nothing is left to do. What cannot be served now fails with the `last` try; who is at a limit of
        his waits for as long as it takes."""
        response_id = waiting.id
        await self._responses.start(response_id)
        visit = self._access.inside(waiting.owner, waiting.key, OF_LINES[PATH])
        client = InsideClient(PATH, waiting.request, work.gone, visit)
        await self._exchange(response_id)(client.scope, client.receive, client.send)  # type: ignore[arg-type]
        if client.status in (None, 200):
            return True  # it is kept, or was left
        told = msgspec.json.decode(bytes(client.body), type=_Refusal).error
        if told.code == RATE_LIMITED or (client.status in (429, 502, 503, 507) and not last):
            return False
        await self._responses.fail(response_id, ResponseError(told.code or "invalid_request", told.message))
        return True

    async def _pause(self, work: _Work, seconds: float) -> None:
        try:
            async with asyncio.timeout(seconds):
                await work.gone.wait()
        except TimeoutError:
            return
