"""What requests ask for that there is only so much of, for all workers of a router together: limits of tenants,
places in the queues of models, replicas, turns at routes.

Requests ask a `Desk`. There is one owner, the *head*: its desk (`OwnDesk`) decides, at once and without waiting,
by what it counts itself. The desk of another worker (`far`) asks the head's, so that whatever a request comes to,
it is decided by the same code and the same counts; it costs a hop to another process, and nothing where there is
one worker alone.

Admission is a bound on sequences per model: what the ready replicas compute at once, plus the manifest's queue
length; while no replica is ready, the queue length alone, and at least one request. Where tenants share a model,
none may take all of its places (`shares`). Background work neither takes places of that bound nor is held to it:
whoever sends it looks for room himself. A copy of a request is let in where a seat is free besides all that the
model has to do, up to `MAX_COPIES` of them.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from typing import Final, Protocol

from quire.errors import InvalidRequest, QueueFull
from quire.router.access import Caller
from quire.router.budgets import Amount
from quire.router.engine_client import EngineClient, Sequence
from quire.router.fleet import Fleet, ServedModel
from quire.router.limits import Ticket
from quire.router.placing import News, Seat
from quire.router.shares import may_enter
from quire.router.traffic import Asked, Way
from quire_schemas import wire
from quire_schemas.workers import Fared, Wanted

MAX_COPIES: Final = 64
"""On their way at a time, of all routes."""
Headers = list[tuple[bytes, bytes]]


class Entry(Protocol):
    """One request that was let in, until it ends."""

    used: int
    """Tokens that it came to; the owner keeps it up to date."""

    async def reserve(self, most: Amount) -> None:
        """Take as much as it may come to from here on. Raises as `Ticket.reserve` does."""

    def uncount(self) -> None:
        """It is no request of its own: another one stands for it."""


class Claim(Protocol):
    """A sequence's claim on its model: a `Seat`, here or at the head."""

    @property
    def is_lent(self) -> bool: ...
    async def find(
        self,
        wanted: Wanted,
        fingerprint: Callable[[], bytes],
        home: Callable[[], str | None],
        news: Callable[[News], None],
    ) -> EngineClient: ...
    async def has_other(self, wanted: Wanted) -> bool: ...
    async def is_queued(self, sequence: Sequence) -> bool: ...
    def given(self, sequence: Sequence) -> None: ...
    def begun(self) -> None: ...
    def blame(self, fingerprint: bytes) -> None: ...
    def settle(self) -> None: ...
    def end(self) -> None: ...


class Desk(Protocol):
    """Where requests ask."""

    def entered(self, tenant: wire.Tenant | None, key: str) -> AbstractAsyncContextManager[Entry]:
        """Let a request in by its tenant's limits, and hold its place. Raises as `Limiter.entered` does."""

    def limits(self, tenant: wire.Tenant | None, key: str) -> Awaitable[Headers]:
        """What an answer tells of them."""

    def way(self, asked: Asked, caller: Caller) -> Awaitable[Way]:
        """Where a caller's request goes. Raises `PermissionDenied` and `ModelNotFound`."""

    def turn(self, served: ServedModel) -> Awaitable[ServedModel]:
        """Who has a request for this model: itself, or its canary."""

    def compare(self, served: ServedModel, fared: Fared) -> None:
        """Count how a request fared at it, where it is compared with another revision."""

    def admitted(
        self, served: ServedModel, sequences: int, owner: str, *, background: bool = False, copy: bool = False
    ) -> AbstractAsyncContextManager[None]:
        """Hold places for `sequences` of a tenant's in the model's queue.

        Raises `ModelStopped`, `QueueFull`, and `InvalidRequest` when there are more sequences than places.
        """

    def seat(self, served: ServedModel, owner: str, *, background: bool) -> Claim:
        """The claim of a sequence on a model."""


class _OwnEntry:
    """A ticket of this process's own limiter."""

    __slots__ = ("_ticket",)

    def __init__(self, ticket: Ticket) -> None:
        self._ticket = ticket

    @property
    def used(self) -> int:
        return self._ticket.used

    @used.setter
    def used(self, tokens: int) -> None:
        self._ticket.used = tokens

    async def reserve(self, most: Amount) -> None:
        self._ticket.reserve(most)

    def uncount(self) -> None:
        self._ticket.uncount()


def nobodys() -> Entry:
    """That of a request of which nothing is counted."""
    return _OwnEntry(Ticket())


class OwnDesk:
    """The desk of whoever owns what is asked for."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._copies = 0

    @contextlib.asynccontextmanager
    async def entered(self, tenant: wire.Tenant | None, key: str) -> AsyncIterator[Entry]:
        with self._fleet.access.limiter.entered(tenant, key) as ticket:
            yield _OwnEntry(ticket)

    async def limits(self, tenant: wire.Tenant | None, key: str) -> Headers:
        return self._fleet.access.limiter.headers(tenant, key)

    async def way(self, asked: Asked, caller: Caller) -> Way:
        return self._fleet.way(asked, caller)

    async def turn(self, served: ServedModel) -> ServedModel:
        return self._fleet.canaries.turn(served)

    def compare(self, served: ServedModel, fared: Fared) -> None:
        self._fleet.canaries.note(served.route.model, fared)

    @contextlib.asynccontextmanager
    async def admitted(
        self, served: ServedModel, sequences: int, owner: str, *, background: bool = False, copy: bool = False
    ) -> AsyncIterator[None]:
        self.admit(served, sequences, owner, background=background, copy=copy)
        try:
            yield
        finally:
            self.give_back(served, sequences, owner, background=background, copy=copy)

    def seat(self, served: ServedModel, owner: str, *, background: bool) -> Seat:
        return Seat(self._fleet, served, owner, background=background)

    def admit(self, served: ServedModel, sequences: int, owner: str, *, background: bool, copy: bool) -> None:
        """Take places, as `admitted` says; `give_back` gives them back."""
        served.check_wanted()
        if copy and (self._copies >= MAX_COPIES or served.in_flight + sequences > served.slots):
            raise QueueFull("No seat of this model is free for a copy.", retry_after=1.0)
        places = served.slots + served.route.max_queue_length
        if served.ready and sequences > places:
            raise InvalidRequest(
                f"The request asks for {sequences} sequences ('n' for each prompt); this model takes at most "
                f"{places} at a time. Lower 'n', or send fewer prompts at once.",
                param="n",
            )
        waited_for = served.in_flight - served.background
        full = waited_for + sequences > places and not background
        if full and (served.ready or waited_for):  # with none ready, one request may always wait for one
            raise QueueFull(
                f"{waited_for} requests run or wait for this model, as many as it takes.", retry_after=1.0
            )
        shared = self._fleet.access.is_shared and served.ready and not background
        own = served.held[owner]
        if shared and not may_enter(sequences, own, waited_for, places):
            raise QueueFull(
                f"{own} requests of this policy run or wait for this model, and the {places - waited_for} places "
                "that are left are for others, too.",
                retry_after=1.0,
            )
        if not background:
            served.held[owner] += sequences
        served.in_flight += sequences
        served.background += sequences * background
        served.used_at = time.monotonic()
        self._copies += copy

    def give_back(self, served: ServedModel, sequences: int, owner: str, *, background: bool, copy: bool) -> None:
        if not background:
            served.held[owner] -= sequences
            if not served.held[owner]:
                del served.held[owner]
        served.in_flight -= sequences
        served.background -= sequences * background
        served.used_at = time.monotonic()
        self._copies -= copy


__all__ = ["MAX_COPIES", "Claim", "Desk", "Entry", "Headers", "OwnDesk", "nobodys"]
