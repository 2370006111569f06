"""Which replica a sequence is given to, and when: the claim of one sequence on its model, over all its attempts.

A `Seat` waits until it is its tenant's turn (`shares`), until there is a place at a replica that fits
(`balancer`), within the model's budget of further attempts, and apart from other suspects where engines may die of
it (`quarantine`). All of this is counted for the model as a whole, so it happens where that is known: in the head,
for the sequences of all workers. What the sequence then brings its run reads for itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Collection
from typing import Final, Literal

from quire.errors import (
    EngineUnavailable,
    ModelNotFound,
    RequestQuarantined,
    ServiceUnavailable,
    TimedOut,
)
from quire.router import quarantine
from quire.router.balancer import choose, may_retry
from quire.router.engine_client import EngineClient, Sequence
from quire.router.fleet import Fleet, ServedModel
from quire.text import TextError
from quire_schemas.workers import Wanted

log = logging.getLogger("quire.router")

DEFAULT_RETRY_AFTER: Final = 5.0
RECHECK_SECONDS: Final = 0.5
"""How often something that no event tells of (a stall, a place in an engine's queue) is looked at again."""
News = Literal["held", "retrying"]
_QUARANTINED: Final = (
    f"{quarantine.DEATHS_TO_CONDEMN} engines died when they were given this request, so it is not tried again for "
    f"{quarantine.REMEMBERED_SECONDS / 60:g} minutes. Other requests are served."
)


def waited(seconds: float) -> TimedOut:
    """The error of a sequence that has waited as long as its model's manifest allows."""
    return TimedOut(
        f"The request waited longer for its turn than the {seconds:g} seconds that this model's manifest allows."
    )


def gave_up(attempts: int) -> EngineUnavailable:
    """The error of one that is not tried again."""
    return EngineUnavailable(f"The engine died under this request, at attempt {attempts}.", retry_after=1.0)


def _everywhere(_: EngineClient) -> bool:
    return True


class Seat:
    """The claim of one sequence of `owner`'s."""

    __slots__ = (
        "_background",
        "_death",
        "_fingerprint",
        "_fleet",
        "_lent",
        "_owner",
        "_retrying",
        "_served",
        "_trial",
        "_turn",
    )

    def __init__(self, fleet: Fleet, served: ServedModel, owner: str, *, background: bool) -> None:
        self._fleet = fleet
        self._served = served
        self._owner = owner
        self._background = background
        self._turn = False
        """It was its turn to go to an engine, where tenants take turns."""
        self._lent: bool | None = None
        """Once it has had its turn and goes: whether its seat is lent (`shares`)."""
        self._retrying = False
        self._trial: str | None = None
        """The replica where it is tried although engines may die of it."""
        self._fingerprint = b""
        """On trial."""
        self._death: tuple[str, int, int] = ("", 0, 0)
        """The name that the death of its engine would have."""

    async def find(
        self,
        wanted: Wanted,
        fingerprint: Callable[[], bytes],
        home: Callable[[], str | None],
        news: Callable[[News], None],
        reaches: Callable[[EngineClient], bool] = _everywhere,
    ) -> EngineClient:
        """The replica that is to have the sequence now. Whoever asks gives it to it before anything else happens.

        `fingerprint` makes its own when there is somebody to suspect; `home` is the replica that one of its
        prompt's sequences was given to last; `reaches` says to which replicas it could be
        given from where it is. While none can have it, it waits, as long as the manifest says; `news` hears of
        that (`held`), and that it has its part of the budget of further attempts (`retrying`), once each.

        Raises `EngineUnavailable` after too many attempts and when its ids are not those that the model's replicas
        now understand, `RequestQuarantined` when engines die of it, `ServiceUnavailable` when none gets ready,
        `TimedOut` when none that is has a place.
        """
        self._leave_trial()  # of the replica that it was to have before, if it never came there
        served, is_held = self._served, False
        turn: asyncio.Future[None] | None = None
        try:
            while True:
                turn = self._take_turn(turn)
                changed, settled = self._fleet.changed, served.settled.event
                suspected = self._check_wanted(wanted, fingerprint)
                permitted = turn is None and (wanted.attempts == 0 or self._may_try_again(news))
                died = served.suspects.died_at(fingerprint()) if suspected else None
                client = self._choose(wanted, home(), reaches, died) if permitted else None
                if client is not None:
                    self._go(client, fingerprint() if suspected else b"")
                    return client
                left = wanted.deadline - time.monotonic()
                if left <= 0:
                    raise self._without(wanted)
                if not is_held:
                    is_held = True
                    news("held")
                for_others = not permitted or (suspected and served.ready)
                if turn is not None:
                    await asyncio.wait([turn], timeout=min(left, RECHECK_SECONDS))
                    continue
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(min(left, RECHECK_SECONDS)):
                        await (settled if for_others else changed).wait()
        finally:
            if turn is not None:
                served.turns.leave(self._owner, turn, served.slots)

    async def has_other(self, wanted: Wanted, reaches: Callable[[EngineClient], bool] = _everywhere) -> bool:
        """Whether a replica that is ready, and that it could be given to (`reaches`), could have the sequence
        now."""
        return self._choose(wanted, None, reaches, None) is not None

    async def is_queued(self, sequence: Sequence) -> bool:
        """Whether it waits in its engine's queue, as far as can be told."""
        return sequence.client.queued(sequence)

    def given(self, sequence: Sequence) -> None:
        """It runs, as this."""

    @property
    def is_lent(self) -> bool:
        """Whether its engine's seat is lent, which others of more right may take back."""
        return bool(self._lent)

    def begun(self) -> None:
        """The sequence has brought a token, or word that it could have."""
        if self._trial is not None:
            self._served.suspects.clear(self._fingerprint)
        self.settle()

    def blame(self, fingerprint: bytes) -> None:
        """Its engine died, or hung, before that: it may be what engines die of."""
        self._served.suspects.blame(
            fingerprint, self._death, tried=self._trial is not None, replica=self._death[0]
        )

    def settle(self) -> None:
        """It is no longer on a further attempt, nor on trial."""
        if self._retrying:
            self._retrying = False
            self._served.retrying -= 1
            self._served.settled.fire()
        self._leave_trial()

    def end(self) -> None:
        """It is not needed any more; may be said twice."""
        self.settle()
        if self._turn:
            self._turn = False
            self._served.turns.end(self._owner, self._served.slots, own=self._lent is False)

    def _leave_trial(self) -> None:
        if self._trial is not None:
            self._served.trials.discard(self._trial)
            self._trial = None
            self._served.settled.fire()

    def _go(self, client: EngineClient, fingerprint: bytes) -> None:
        endpoint = client.endpoint
        self._death = (endpoint.replica_id, endpoint.incarnation, client.connection)
        if self._turn and self._lent is None:
            self._lent = self._served.turns.lend(self._owner, self._served.slots)
        if fingerprint:
            self._trial, self._fingerprint = endpoint.replica_id, fingerprint
            self._served.trials.add(self._trial)

    def _take_turn(self, turn: asyncio.Future[None] | None) -> asyncio.Future[None] | None:
        """What it waits for before it may go to an engine; None when it need not, or now has its turn."""
        if self._turn or self._background or (turn is None and not self._fleet.access.is_shared):
            return None
        if turn is not None:
            self._turn = turn.done()
            return None if self._turn else turn
        turns = self._served.turns
        self._turn = turns.take(self._owner, self._served.slots)
        return None if self._turn else turns.queue(self._owner)

    def _check_wanted(self, wanted: Wanted, fingerprint: Callable[[], bytes]) -> bool:
        """Whether engines may die of it. Raises when it is not to be given to an engine any more."""
        served, suspects = self._served, self._served.suspects
        if self._fleet.by_model.get(served.route.model) is not served:
            raise ModelNotFound(f"The model '{wanted.asked_model}' was taken down.", param="model")
        if not served.has_adapter(wanted.adapter):
            raise ModelNotFound(f"The model '{wanted.asked_model}' was taken down.", param="model")
        served.check_wanted()
        if served.route.canary_of and wanted.begun_with is None and not served.ready:
            raise EngineUnavailable("The new revision has no replica that is ready.", retry_after=1.0)
        serving = served.tokenizer
        if isinstance(serving, TextError) or serving.fingerprint != wanted.tokenizer:
            raise EngineUnavailable("The model was changed while the request waited.", retry_after=1.0)
        begun_with = served.route.template_hash if wanted.begun_with is None else wanted.begun_with
        if begun_with != served.route.template_hash and all(
            client.endpoint.template_hash != begun_with for client in served.clients
        ):
            raise EngineUnavailable(
                "No replica has the revision any more that it was begun with.", retry_after=1.0
            )
        suspected = bool(suspects) and suspects.is_suspected(fingerprint())
        if suspected and suspects.is_condemned(fingerprint()):
            log.warning("request %s is refused: engines have died of it", wanted.request)
            raise RequestQuarantined(_QUARANTINED)
        return suspected

    def _may_try_again(self, news: Callable[[News], None]) -> bool:
        """Whether it has, or now gets, its part of the model's budget of further attempts."""
        served = self._served
        if not self._retrying and may_retry(served.retrying, served.in_flight):
            news("retrying")
            self._fleet.metrics.model(served.name).retries.inc()
            self._retrying = True
            served.retrying += 1
        return self._retrying

    def _choose(
        self,
        wanted: Wanted,
        home: str | None,
        reaches: Callable[[EngineClient], bool],
        died: Collection[str] | None,
    ) -> EngineClient | None:
        """The replica that is to have it now. `died` are those that died under it, of a suspect: it gets none on
        which another one is tried, nor one of these while there is another."""
        barred: set[str] = set()
        if died is not None:
            there = self._served.clients
            elsewhere = any(client.ready and client.endpoint.replica_id not in died for client in there)
            barred = self._served.trials.union(died if elsewhere else ())
        clients = {
            client.endpoint.replica_id: client
            for client in self._served.clients
            if client.endpoint.replica_id not in barred
            and (wanted.begun_with is None or client.goes_on(wanted.begun_with))
            and (not wanted.adapter or wanted.adapter in client.endpoint.adapters)
            and reaches(client)
        }
        chosen = choose(
            (client.candidate(wanted.chain, background=self._background) for client in clients.values()),
            wanted.avoid,
            home,
            wanted.caller,
        )
        return clients[chosen] if chosen is not None else None

    def _without(self, wanted: Wanted) -> Exception:
        """What it ends with when it has waited long enough."""
        if wanted.attempts:
            return gave_up(wanted.attempts)
        if self._served.ready:
            return waited(self._served.route.max_queue_wait)
        return ServiceUnavailable(
            "No replica of this model is ready.", retry_after=self._served.route.eta or DEFAULT_RETRY_AFTER
        )
