"""The head of a router as its other workers see it: a desk, a ledger, and whoever works in the background.

All of it is words over one line (`quire_schemas.workers`). A question costs a hop to the head and back; what has
ended is told without waiting. How many tokens sequences have is told ten times a second, so that the head knows
the burden of each replica.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
from collections.abc import AsyncIterator, Callable
from dataclasses import astuple
from typing import Final

from quire import errors
from quire.errors import ApiError, InternalError
from quire.router.access import Caller
from quire.router.background import Later
from quire.router.budgets import Amount
from quire.router.desk import Entry, Headers, nobodys
from quire.router.engine_client import EngineClient, Sequence
from quire.router.fleet import Fleet, ServedModel
from quire.router.line import Line
from quire.router.placing import RECHECK_SECONDS, News
from quire.router.responses import Responses
from quire.router.traffic import Asked, Way
from quire.router.usage import Who
from quire_schemas import wire, workers
from quire_schemas.workers import Wanted

log = logging.getLogger("quire.router")

TELL_SECONDS: Final = 0.1
"""Between two words on how many tokens sequences have."""
Wire = Line[workers.ToHead, workers.ToWorker]


class FarHead:
    """The head, from a worker. `hear` is given what comes over the line."""

    def __init__(self, line: Wire, fleet: Fleet) -> None:
        self._line = line
        self._fleet = fleet
        self._numbers = itertools.count(1)
        self._asked: dict[int, asyncio.Future[workers.Answer]] = {}
        self._listeners: dict[int, Callable[[News], None]] = {}
        """By seat, who wants to know how its replica is looked for."""
        self._running: dict[int, tuple[Sequence, int]] = {}
        """By seat, its sequence, and how many tokens of it the head knows."""
        self._telling: asyncio.TimerHandle | None = None
        self._links: tuple[workers.Replica, ...] = ()
        self.desk = FarDesk(self, fleet)

    # ── the line ──────────────────────────────────────────────────────────────────────────────────────────

    def hear(self, message: workers.Answer | workers.News) -> None:
        """An answer, or news of a seat."""
        if isinstance(message, workers.News):
            if (listener := self._listeners.get(message.seat)) is not None:
                listener(message.what)
        elif (asked := self._asked.pop(message.number, None)) is not None and not asked.done():
            asked.set_result(message)

    def tell_links(self) -> None:
        """Tell to which replicas this worker is connected, if that has changed."""
        if (links := self._fleet.links) != self._links:
            self._links = links
            self._line.tell(workers.Links(links))

    def number(self) -> int:
        """One that no question had."""
        return next(self._numbers)

    def tell(self, message: workers.ToHead) -> None:
        self._line.tell(message)

    async def ask(self, message: workers.Question) -> workers.Answer:
        """The answer to a question. Raises the error that it is refused with."""
        answer: asyncio.Future[workers.Answer] = asyncio.get_running_loop().create_future()
        self._asked[message.number] = answer
        try:
            self._line.tell(message)
            told: workers.Answer = await answer
        finally:
            self._asked.pop(message.number, None)
        if isinstance(told, workers.Refused):
            kind = getattr(errors, told.kind, InternalError)
            if not (isinstance(kind, type) and issubclass(kind, ApiError)):
                kind = InternalError
            raise kind(told.message, param=told.param, retry_after=told.retry_after)
        return told

    # ── sequences that run here ───────────────────────────────────────────────────────────────────────────

    def listen(self, seat: int, news: Callable[[News], None] | None) -> None:
        if news is not None:
            self._listeners[seat] = news
        else:
            self._listeners.pop(seat, None)

    def runs(self, seat: int, sequence: Sequence | None) -> None:
        """The sequence of a seat runs, or none does any more."""
        if sequence is None:
            self._running.pop(seat, None)
            return
        self._running[seat] = (sequence, 0)
        if self._telling is None:
            self._telling = asyncio.get_running_loop().call_later(TELL_SECONDS, self._tell_progress)

    def _tell_progress(self) -> None:
        gained: list[tuple[int, int]] = []
        for seat, (sequence, known) in self._running.items():
            if sequence.generated > known:
                gained.append((seat, sequence.generated))
                self._running[seat] = (sequence, sequence.generated)
        if gained:
            self.tell(workers.Progress(gained))
        self._telling = None
        if self._running:
            self._telling = asyncio.get_running_loop().call_later(TELL_SECONDS, self._tell_progress)

    # ── what is not a request's ───────────────────────────────────────────────────────────────────────────

    def add(self, who: Who, amount: Amount) -> None:
        """Note in the ledger what a request came to."""
        self.tell(workers.Used(who.policy, who.key, who.model, workers.Spent(*astuple(amount))))

    def wake(self) -> None:
        """A batch was made or cancelled."""
        self.tell(workers.Wake())

    def later(self, responses: Responses) -> Later:
        """Where responses in the background are left."""
        return _FarLater(self, responses)

    async def page(self, path: str) -> tuple[int, bytes]:
        """What the router as a whole answers at a path."""
        told = await self.ask(workers.GetPage(self.number(), path))
        if not isinstance(told, workers.Page):
            raise _strange(told)
        return told.status, told.body


class FarDesk:
    """The head's desk, from a worker."""

    def __init__(self, head: FarHead, fleet: Fleet) -> None:
        self._head = head
        self._fleet = fleet

    @contextlib.asynccontextmanager
    async def entered(self, tenant: wire.Tenant | None, key: str) -> AsyncIterator[Entry]:
        if tenant is None:
            yield nobodys()
            return
        entry = _FarEntry(self._head)
        try:
            await self._head.ask(workers.Enter(entry.number, tenant.name, key))
            yield entry
        finally:
            self._head.tell(workers.Leave(entry.number, entry.used, entry.counted))

    async def limits(self, tenant: wire.Tenant | None, key: str) -> Headers:
        if tenant is None:
            return []
        told = await self._head.ask(workers.TellLimits(self._head.number(), tenant.name, key))
        if not isinstance(told, workers.Limits):
            raise _strange(told)
        return told.headers

    async def way(self, asked: Asked, caller: Caller) -> Way:
        """The turns are the head's: it is asked where they decide. While it does not know a route that was told to
        both a moment ago, the turn is the worker's own."""
        traffic = self._fleet.traffic
        if (route := traffic.route_for(asked)) is None:
            return self._fleet.way(asked, caller)
        user, weighed, copies = traffic.turns_at(route, asked)
        if not (weighed or copies):
            return self._fleet.way(asked, caller)
        caller.check_model(asked.name)
        told = await self._head.ask(workers.TakeTurn(self._head.number(), route.route, weighed))
        if not isinstance(told, workers.Turn):
            raise _strange(told)
        if not told.known:
            return self._fleet.way(asked, caller)
        return traffic.going(route, asked, user, told.model, copied=told.copied)

    async def turn(self, served: ServedModel) -> ServedModel:
        """The turns are the head's, where there is a canary."""
        canary = self._fleet.canaries.beside(served)
        if canary is None:
            return served
        told = await self._head.ask(workers.TryCanary(self._head.number(), served.route.model))
        return canary if isinstance(told, workers.Told) and told.yes else served

    def compare(self, served: ServedModel, fared: workers.Fared) -> None:
        if self._fleet.canaries.compares(served):
            self._head.tell(workers.Compare(served.route.model, fared))

    @contextlib.asynccontextmanager
    async def admitted(
        self, served: ServedModel, sequences: int, owner: str, *, background: bool = False, copy: bool = False
    ) -> AsyncIterator[None]:
        number, model = self._head.number(), served.route.model
        try:
            await self._head.ask(workers.Admit(number, model, sequences, owner, background, copy))
            yield
        finally:
            self._head.tell(workers.GiveBack(number))

    def seat(self, served: ServedModel, owner: str, *, background: bool) -> _FarSeat:
        return _FarSeat(self._head, self._fleet, served, owner, background)


class _FarEntry:
    """A request that the head has let in."""

    def __init__(self, head: FarHead) -> None:
        self._head = head
        self.number = head.number()
        self.used = 0
        self.counted = True

    async def reserve(self, most: Amount) -> None:
        spent = workers.Spent(*astuple(most))
        await self._head.ask(workers.Reserve(self._head.number(), self.number, self.used, spent))

    def uncount(self) -> None:
        self.counted = False


class _FarSeat:
    """A seat of the head's (`placing.Seat`) that a sequence here has."""

    __slots__ = (
        "_background",
        "_fleet",
        "_has_begun",
        "_head",
        "_number",
        "_owner",
        "_sequence",
        "_served",
        "is_lent",
    )

    def __init__(self, head: FarHead, fleet: Fleet, served: ServedModel, owner: str, background: bool) -> None:
        self._head = head
        self._fleet = fleet
        self._served = served
        self._owner = owner
        self._background = background
        self._number = head.number()
        self._has_begun = False
        self._sequence: Sequence | None = None
        self.is_lent = False

    async def find(
        self,
        wanted: Wanted,
        fingerprint: Callable[[], bytes],
        home: Callable[[], str | None],
        news: Callable[[News], None],
    ) -> EngineClient:
        """As a seat's; `home` the head knows, which hears of all sequences of a prompt first."""
        self._head.runs(self._number, None)
        self._has_begun, self._sequence = False, None
        self._head.listen(self._number, news)
        printed = b""
        try:
            while True:
                changed = self._fleet.changed
                self._head.tell_links()
                told = await self._head.ask(
                    workers.Find(
                        self._head.number(),
                        self._number,
                        self._served.route.model,
                        self._owner,
                        self._background,
                        wanted,
                        printed,
                    )
                )
                if isinstance(told, workers.FingerprintWanted):
                    printed = fingerprint()
                    continue
                if not isinstance(told, workers.Found):
                    raise _strange(told)
                self.is_lent = told.lent
                for client in self._served.clients:
                    replica = client.endpoint.replica_id, client.endpoint.incarnation
                    if replica == told.replica and client.connected and not client.retired:
                        return client
                # it was lost this moment, and the head hears of it before it is asked again
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(RECHECK_SECONDS):
                        await changed.wait()
        finally:
            self._head.listen(self._number, None)

    async def has_other(self, wanted: Wanted) -> bool:
        return await self._told(workers.HasOther(self._head.number(), self._number, wanted))

    async def is_queued(self, sequence: Sequence) -> bool:
        stats = sequence.client.stats
        if sequence.begun or stats is None or not stats.waiting:
            return False
        return await self._told(workers.IsQueued(self._head.number(), self._number))

    def given(self, sequence: Sequence) -> None:
        self._sequence = sequence
        self._head.runs(self._number, sequence)

    def begun(self) -> None:
        if not self._has_begun:
            self._has_begun = True
            self._head.tell(workers.Begun(self._number))

    def blame(self, fingerprint: bytes) -> None:
        self._head.tell(workers.Blame(self._number, fingerprint))

    def settle(self) -> None:
        self._head.runs(self._number, None)
        self._head.tell(workers.Settle(self._number, self._well))

    def end(self) -> None:
        self._head.runs(self._number, None)
        self._head.tell(workers.End(self._number, self._well))

    @property
    def _well(self) -> bool | None:
        return None if self._sequence is None else self._sequence.well

    async def _told(self, question: workers.IsQueued | workers.HasOther) -> bool:
        told = await self._head.ask(question)
        return isinstance(told, workers.Told) and told.yes


class _FarLater:
    """Responses in the background, which the head works on."""

    def __init__(self, head: FarHead, responses: Responses) -> None:
        self._head = head
        self._responses = responses

    async def check_room(self) -> None:
        await self._head.ask(workers.CheckBackground(self._head.number()))

    def begin(self, response_id: str, size: int) -> None:
        self._head.tell(workers.BeginResponse(response_id, size))

    async def cancel(self, response_id: str, owner: str) -> bytes:
        answer = await self._responses.cancel(response_id, owner)
        self._head.tell(workers.LeaveResponse(response_id))
        return answer


def _strange(answer: workers.Answer) -> InternalError:
    return InternalError(f"The head of the router answered with a {type(answer).__name__}.")


__all__ = ["FarDesk", "FarHead"]
