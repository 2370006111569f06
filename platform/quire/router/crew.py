"""The workers of one router besides its head: started, watched, told, and served by the head.

Each is a process of the head's own, started as the head was, which inherits the listening socket and one end of a
socket pair (`line`). It gets the routing table, and takes requests from the moment that it acts by it. Whatever
its requests share with those of others it asks for here, and what it holds is known here by its numbers: the
entries of tenants, places in queues, seats at replicas. When it is gone, however it went, all of that is given
back; what it has counted stays; and another one is started, after a pause that doubles as long as they do not
last.

A worker that has said nothing for `SILENT_SECONDS` stands still, and is killed: so many clients would wait for it.

The router has a table when all have it that take requests, and is connected to a replica when all are.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import math
import os
import socket
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from subprocess import Popen
from typing import Final

import msgspec

from quire.errors import ApiError, InternalError, ModelNotFound, Unauthenticated
from quire.router.access import NO_KEY
from quire.router.app import Head
from quire.router.budgets import Amount
from quire.router.config import LISTEN_FD
from quire.router.engine_client import EngineClient, Foreign
from quire.router.fleet import Fleet, ServedModel
from quire.router.limits import Ticket
from quire.router.line import Line
from quire.router.placing import Seat
from quire.router.server import LAST_WORDS, Board
from quire.router.usage import Who
from quire_operators.fleet import sibling
from quire_schemas import wire, workers

log = logging.getLogger("quire.router")

PAUSES: Final = (0.2, 30.0)
"""Seconds until a worker that ended is followed by another, and the most that doubling makes of it."""
HEALTHY_SECONDS: Final = 60.0
"""Who takes requests for so long is followed at once."""
SILENT_SECONDS: Final = 15.0
START_SECONDS: Final = 120.0
"""As much for one that takes no requests yet: it loads what it needs."""
TABLE_SECONDS: Final = 4.0
"""That the answer to a table waits for the workers."""
COUNTS_SECONDS: Final = 2.0
"""That a scrape does; of a worker that does not answer it shows what it told last."""
ENDS: Final = 16
"""Of workers, that are told of."""
END_SECONDS: Final = 2.0
"""Beyond the grace and their last words, for workers to be gone."""
Wire = Line[workers.ToWorker, workers.ToHead]
Command = Callable[[int, int, int], Sequence[str]]
"""argv of the worker with that number, whose end of the line and whose board are those descriptors."""


class _FingerprintWanted(Exception):
    """There are suspects, and who asks for a replica did not tell what the sequence is."""


@dataclass(slots=True)
class _Seated:
    """A seat that a worker has, and the sequence that it runs."""

    seat: Seat
    family: tuple[str, int]
    """Its request and prompt."""
    finding: asyncio.Task[None] | None = None
    foreign: Foreign | None = None

    def drop(self, well: bool | None = None) -> None:
        """The sequence runs no more."""
        foreign, self.foreign = self.foreign, None
        if foreign is not None:
            foreign.client.let_go(foreign, well)


@dataclass(slots=True)
class _Places:
    """Places in a model's queue that a worker holds."""

    served: ServedModel
    sequences: int
    owner: str
    background: bool
    copy: bool


@dataclass(slots=True, eq=False)
class Member:
    """One worker's life, and what it holds."""

    index: int
    process: Popen[bytes]
    line: Wire
    heard_at: float
    serving_since: float | None = None
    version: int = 0
    unusable: dict[str, str] = field(default_factory=dict)
    links: frozenset[workers.Replica] = frozenset()
    counts: workers.Counts = field(default_factory=lambda: workers.Counts({}))
    entries: dict[int, tuple[AbstractContextManager[Ticket], Ticket]] = field(default_factory=dict)
    places: dict[int, _Places] = field(default_factory=dict)
    seats: dict[int, _Seated] = field(default_factory=dict)
    homes: dict[tuple[str, int], str] = field(default_factory=dict)
    """By request and prompt, the replica that was given one of its sequences last."""
    families: Counter[tuple[str, int]] = field(default_factory=Counter)
    """How many seats they have."""
    asked: dict[int, asyncio.Future[workers.Counts]] = field(default_factory=dict)
    tasks: set[asyncio.Task[None]] = field(default_factory=set)
    still: bool = False
    """It stood still, and was killed."""

    def reaches(self, client: EngineClient) -> bool:
        """Whether it is connected to a replica."""
        return (client.endpoint.replica_id, client.endpoint.incarnation) in self.links


class Crew:
    """The other workers of a router, `count` of them; with none it does nothing."""

    def __init__(
        self,
        count: int,
        command: Command,
        listening: socket.socket,
        board: Board | None,
        fleet: Fleet,
        head: Head,
    ) -> None:
        """`listening` is the socket that all take connections from, `board` is there where there may be others,
        and `head` is the application of this process."""
        self._many = count
        self._command = command
        self._listening = listening
        self._board = board
        self._fleet = fleet
        self._desk = head.desk
        self._head = head
        self._members: dict[int, Member] = {}
        self._keepers: list[asyncio.Task[None]] = []
        self._numbers = itertools.count(1)
        self._end_numbers = itertools.count(1)
        self._ends: deque[wire.WorkerEnd] = deque(maxlen=ENDS)
        self._news = asyncio.Event()
        """Somebody has a table, or is gone."""
        self._grace: float | None = None
        self._ends_at = math.inf
        """When it is over, once the end was begun."""
        self.own_requests: Callable[[], int] = lambda: 0
        """How many the head has answered itself."""

    # ── its life ──────────────────────────────────────────────────────────────────────────────────────────

    def start(self) -> None:
        self._keepers = [
            asyncio.create_task(self._keep(index), name=f"worker {index}") for index in range(1, self._many + 1)
        ]
        if self._keepers:
            self._keepers.append(asyncio.create_task(self._watch(), name="workers"))

    def finish(self, grace: float) -> None:
        """Have all take no new request, and end within the grace; said again, the shorter one counts."""
        self._grace = grace if self._grace is None else min(self._grace, grace)
        self._ends_at = min(self._ends_at, time.monotonic() + max(grace, 0.0))
        for member in self._members.values():
            self._part(member, self._grace)

    @staticmethod
    def _part(member: Member, grace: float) -> None:
        if member.serving_since is None:
            member.process.kill()  # nobody has asked it anything yet
        else:
            member.line.tell(workers.Finish(grace))

    async def close(self) -> None:
        """Wait until all are gone; those that do not go are killed. `finish` was said before."""
        left = 0.0 if self._grace is None else max(self._ends_at + LAST_WORDS - time.monotonic(), 0.0)
        await self._until_gone(left + END_SECONDS)
        for member in self._members.values():
            log.warning("worker %d does not end, and is killed", member.index)
            member.process.kill()
        await self._until_gone(END_SECONDS)
        for keeper in self._keepers:
            keeper.cancel()
        if self._keepers:
            await asyncio.wait(self._keepers)

    async def _until_gone(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while self._members and time.monotonic() < end:
            self._news.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(end - time.monotonic()):
                    await self._news.wait()

    async def _keep(self, index: int) -> None:
        """Have a worker with this number, again and again."""
        pause, restarts = PAUSES[0], 0
        while self._grace is None:
            lasted, because = 0.0, ""
            code: int | None = None
            try:
                lasted, code, because = await self._live(index)
            except OSError as error:
                log.error("worker %d cannot be started: %s", index, error)
                because = f"it cannot be started: {error}"
            except Exception as error:
                log.error("worker %d is given up", index, exc_info=error)
                because = f"the head gave it up: {error!r}"
            await self._remove(index)
            if self._grace is not None:
                return
            if lasted >= HEALTHY_SECONDS:
                pause, restarts = PAUSES[0], 0
            restarts += 1
            self._ends.append(wire.WorkerEnd(next(self._end_numbers), index, code, because, restarts, pause))
            await asyncio.sleep(pause)
            pause = min(2 * pause, PAUSES[1])

    async def _live(self, index: int) -> tuple[float, int, str]:
        """One life of a worker: for how many seconds it took requests, its exit code, and why it was killed if it
        was."""
        mine, its = socket.socketpair()
        try:
            board = self._board.descriptor if self._board is not None else -1
            argv = self._command(index, its.fileno(), board)
            listening = self._listening.fileno()
            env = {**os.environ, LISTEN_FD: str(listening)}
            process = sibling.start(argv, env, (listening, its.fileno(), board))
        except BaseException:
            mine.close()
            raise
        finally:
            its.close()
        because = ""
        line: Wire = await Line.over(mine, workers.FromHeadFrame, workers.FromWorkerFrame)
        member = self._members[index] = Member(index, process, line, time.monotonic())
        line.tell(workers.Take(self._fleet.table))
        if self._grace is not None:  # it was begun meanwhile
            self._part(member, self._grace)
        try:
            async for message in line.heard():
                member.heard_at = time.monotonic()
                self._heard(member, message)
        except wire.WireError as error:
            log.error("worker %d: %s", index, error)
            because = f"it said what the head does not understand: {error}"
        finally:
            lasted = 0.0 if member.serving_since is None else time.monotonic() - member.serving_since
            self._bury(member)
        if self._grace is None:
            process.kill()  # its line is cut, whatever it still does
        code = await asyncio.to_thread(process.wait)
        if self._grace is None:
            if code == os.EX_PROTOCOL:
                log.error("what is installed now is not what this router runs: replace the gateway to have it")
            level = logging.ERROR if code else logging.INFO
            log.log(level, "worker %d (pid %d) ended with %d; another one is started", index, process.pid, code)
        return lasted, code, "it stood still" if member.still else because

    async def _remove(self, index: int) -> None:
        """However a life ended, there is none of that number now."""
        if (member := self._members.get(index)) is not None:
            member.process.kill()
            await asyncio.to_thread(member.process.wait)
            del self._members[index]
            self._news.set()

    def _bury(self, member: Member) -> None:
        """Give back what it holds."""
        member.line.close()
        member.serving_since = None
        if self._board is not None:
            self._board.leave(member.index)
        for task in member.tasks:
            task.cancel()
        for seated in member.seats.values():
            seated.drop()
            seated.seat.end()
        for places in member.places.values():
            self._give_back(places)
        for entry, _ in member.entries.values():
            entry.__exit__(None, None, None)
        for asked in member.asked.values():
            asked.cancel()
        self._fleet.metrics.bury(member.counts)
        member.counts = workers.Counts({})
        self._fleet.stir()
        self._news.set()

    async def _watch(self) -> None:
        """Kill those that stand still. What this process did not hear while it stood still itself is no
        silence."""
        while True:
            before = time.monotonic()
            await asyncio.sleep(1.0)
            slept = time.monotonic() - before - 1.0
            for member in self._members.values():
                if slept > 1.0:
                    member.heard_at += slept
                patience = START_SECONDS if member.serving_since is None else SILENT_SECONDS
                if time.monotonic() - member.heard_at > patience:
                    log.error("worker %d stands still, and is killed", member.index)
                    member.still = True
                    member.process.kill()

    # ── what the control plane and scrapes ask ────────────────────────────────────────────────────────────

    @property
    def _serving(self) -> list[Member]:
        return [member for member in self._members.values() if member.serving_since is not None]

    async def complete(self, seconds: float) -> None:
        """Wait until all take requests, for so long at most."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while len(self._serving) < self._many:
                    self._news.clear()
                    await self._news.wait()

    async def apply(self, table: wire.RoutingTable) -> None:
        """Have the whole router act by a table: the head first, so that nobody is let in who is not counted."""
        await self._fleet.apply(table)
        for member in self._members.values():
            member.line.tell(workers.Take(self._fleet.table))
        end, version = time.monotonic() + TABLE_SECONDS, self._fleet.table.version
        while any(member.version < version for member in self._serving) and time.monotonic() < end:
            self._news.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(end - time.monotonic()):
                    await self._news.wait()

    def set_limits(self, message: wire.SetLimits) -> None:
        """Pass limits on to the replicas that they are for: each engine has them from the head alone."""
        self._fleet.set_limits(message)

    def status(self, base_url: str) -> wire.RouterStatus:
        """The acknowledgement of all that take requests."""
        status, serving = self._fleet.status(base_url), self._serving
        status.workers = (
            wire.WorkerStatus(status.pid, self.own_requests()),
            *(wire.WorkerStatus(member.process.pid, member.counts.requests) for member in serving),
        )
        status.worker_ends = tuple(self._ends)
        if not serving:
            return status
        status.version = min(status.version, *(member.version for member in serving))
        for member in serving:
            status.unusable = {**member.unusable, **status.unusable}
        status.replicas = [
            msgspec.structs.replace(
                load,
                connected=load.connected
                and all((load.replica_id, load.incarnation) in member.links for member in serving),
            )
            for load in status.replicas
        ]
        return status

    async def scrape(self) -> bytes:
        """What `/metrics` answers."""
        serving = self._serving
        await asyncio.gather(*(self._count(member) for member in serving))
        others, pids = [member.counts for member in serving], [member.process.pid for member in serving]
        return await self._fleet.metrics.scraped(others, pids)

    async def _count(self, member: Member) -> None:
        number = next(self._numbers)
        asked = member.asked[number] = asyncio.get_running_loop().create_future()
        member.line.tell(workers.GetCounts(number))
        with contextlib.suppress(TimeoutError, asyncio.CancelledError):
            async with asyncio.timeout(COUNTS_SECONDS):
                counts = await asked
                if member.serving_since is not None:  # else what it had counted is kept already
                    member.counts = counts
        member.asked.pop(number, None)

    # ── what workers say ──────────────────────────────────────────────────────────────────────────────────

    def _heard(self, member: Member, message: workers.ToHead) -> None:
        """Act by it. What fails is the fault of one request, and costs the worker's others nothing."""
        try:
            self._hear(member, message)
        except Exception as error:
            if isinstance(message, workers.Question):
                self._refuse(member, message.number, error)
            else:
                log.error("word of worker %d failed", member.index, exc_info=error)

    def _hear(self, member: Member, message: workers.ToHead) -> None:
        match message:
            case workers.Find():
                self._seek(member, message)
            case workers.GetPage():
                self._begin(member, self._page(member, message), message)
            case workers.HasOther(number, seat, wanted):
                self._begin(member, self._has_other(member, number, seat, wanted), message)
            case workers.CheckBackground(number):
                self._begin(member, self._check_background(member, number), message)
            case workers.Enter() | workers.Reserve() | workers.Admit():
                self._grant(member, message)
            case workers.TellLimits(number, owner, key):
                headers = self._fleet.access.limiter.headers(self._fleet.access.tenant(owner), key)
                member.line.tell(workers.Limits(number, headers))
            case workers.TakeTurn(number, route, weighed):
                turn = self._fleet.traffic.take(route, weighed=weighed)
                member.line.tell(workers.Turn(number, turn is not None, *(turn or ())))
            case workers.TryCanary(number, model):
                served = self._fleet.by_model.get(model)
                turn_of = served if served is None else self._fleet.canaries.turn(served)
                member.line.tell(workers.Told(number, turn_of is not served))
            case workers.IsQueued(number, seat):
                foreign = seated.foreign if (seated := member.seats.get(seat)) is not None else None
                member.line.tell(workers.Told(number, foreign is not None and foreign.client.queued(foreign)))
            case workers.Progress(gained):
                for seat, generated in gained:
                    if (seated := member.seats.get(seat)) is not None and seated.foreign is not None:
                        seated.foreign.client.gained(seated.foreign, generated)
            case workers.Begun(seat) | workers.Blame(seat) | workers.Settle(seat) | workers.End(seat):
                self._hear_of_seat(member, message)
            case workers.Leave(number, used, counted):
                if (entry := member.entries.pop(number, None)) is not None:
                    entry[1].used = used
                    if not counted:
                        entry[1].uncount()
                    entry[0].__exit__(None, None, None)
            case workers.GiveBack(number):
                if (places := member.places.pop(number, None)) is not None:
                    self._give_back(places)
            case workers.Used(policy, key, model, spent):
                self._head.usage.add(Who(policy, key, model), _amount(spent))
            case workers.Compare(model, fared):
                self._fleet.canaries.note(model, fared)
            case workers.Wake():
                self._head.executor.wake()
            case workers.BeginResponse(response, size):
                self._head.background.begin(response, size)
            case workers.LeaveResponse(response):
                self._head.background.leave(response)
            case workers.Links(up):
                member.links = frozenset(up)
                self._fleet.stir()
            case workers.TableTaken(version, unusable):
                member.version, member.unusable = version, unusable
                self._news.set()
            case workers.Serving():
                member.serving_since = time.monotonic()
                log.info("worker %d takes requests (pid %d)", member.index, member.process.pid)
            case workers.Counts():
                member.counts = message
            case workers.CountsFor(number, counts):
                if (asked := member.asked.get(number)) is not None and not asked.done():
                    asked.set_result(counts)

    def _begin(self, member: Member, work: Awaitable[None], question: workers.Question) -> asyncio.Task[None]:
        """Answer a question that takes time."""

        async def carried() -> None:
            try:
                await work
            except Exception as error:  # noqa: BLE001 - the worker raises it for its request
                self._refuse(member, question.number, error)

        task = asyncio.create_task(carried())
        member.tasks.add(task)
        task.add_done_callback(member.tasks.discard)
        return task

    def _grant(self, member: Member, message: workers.Enter | workers.Reserve | workers.Admit) -> None:
        try:
            match message:
                case workers.Enter(number, owner, key):
                    if (tenant := self._fleet.access.tenant(owner)) is None:
                        raise Unauthenticated(NO_KEY)  # the worker has not heard yet that he is no more
                    entered = self._fleet.access.limiter.entered(tenant, key)
                    member.entries[number] = entered, entered.__enter__()
                case workers.Reserve(_, entry, used, most):
                    _, ticket = member.entries[entry]
                    ticket.used = used
                    ticket.reserve(_amount(most))
                case workers.Admit(number, model, sequences, owner, background, copy):
                    served = self._served(model)
                    self._desk.admit(served, sequences, owner, background=background, copy=copy)
                    member.places[number] = _Places(served, sequences, owner, background, copy)
        except Exception as error:  # noqa: BLE001 - the worker raises it for its request
            self._refuse(member, message.number, error)
        else:
            member.line.tell(workers.Done(message.number))

    def _refuse(self, member: Member, number: int, error: Exception) -> None:
        if isinstance(error, _FingerprintWanted):
            member.line.tell(workers.FingerprintWanted(number))
            return
        if not isinstance(error, ApiError):
            log.error("a question of worker %d failed", member.index, exc_info=error)
            error = InternalError("The router had an error of its own.")
        kind, retry_after = type(error).__name__, error.retry_after
        member.line.tell(workers.Refused(number, kind, error.message, error.param, retry_after))

    def _served(self, model: str) -> ServedModel:
        served = self._fleet.by_model.get(model)
        if served is None:
            raise ModelNotFound(f"The model '{model}' was taken down.", param="model")
        return served

    def _give_back(self, places: _Places) -> None:
        background, copy = places.background, places.copy
        self._desk.give_back(places.served, places.sequences, places.owner, background=background, copy=copy)

    # ── seats ─────────────────────────────────────────────────────────────────────────────────────────────

    def _seek(self, member: Member, asked: workers.Find) -> None:
        """Begin to find a replica. The seat is there at once: what ends it may be the next message."""
        seated = member.seats.get(asked.seat)
        if seated is None:
            try:
                seat = self._desk.seat(self._served(asked.model), asked.owner, background=asked.background)
            except ApiError as error:
                self._refuse(member, asked.number, error)
                return
            family = asked.wanted.request, asked.wanted.prompt
            seated = member.seats[asked.seat] = _Seated(seat, family)
            member.families[family] += 1
        seated.drop()
        seated.finding = self._begin(member, self._find(member, seated, asked), asked)

    async def _find(self, member: Member, seated: _Seated, asked: workers.Find) -> None:
        def fingerprint() -> bytes:
            if not asked.fingerprint:
                raise _FingerprintWanted
            return asked.fingerprint

        client = await seated.seat.find(
            asked.wanted,
            fingerprint,
            lambda: member.homes.get(seated.family),
            lambda what: member.line.tell(workers.News(asked.seat, what)),
            member.reaches,
        )
        name = f"worker-{member.index}-{asked.seat}"
        seated.foreign = client.take_in(name, asked.wanted, background=asked.background, lent=seated.seat.is_lent)
        member.homes[seated.family] = client.endpoint.replica_id
        found = client.endpoint.replica_id, client.endpoint.incarnation
        member.line.tell(workers.Found(asked.number, found, seated.seat.is_lent))

    async def _has_other(self, member: Member, number: int, seat: int, wanted: workers.Wanted) -> None:
        seated = member.seats.get(seat)
        other = seated is not None and await seated.seat.has_other(wanted, member.reaches)
        member.line.tell(workers.Told(number, other))

    def _hear_of_seat(
        self, member: Member, message: workers.Begun | workers.Blame | workers.Settle | workers.End
    ) -> None:
        seated = member.seats.get(message.seat)
        if seated is None:
            return
        match message:
            case workers.Begun():
                if seated.foreign is not None:
                    seated.foreign.begun = True
                seated.seat.begun()
            case workers.Blame(_, fingerprint):
                seated.seat.blame(fingerprint)
            case workers.Settle(_, well):
                seated.drop(well)
                seated.seat.settle()
            case workers.End(_, well):
                del member.seats[message.seat]
                member.families[seated.family] -= 1
                if not member.families[seated.family]:
                    del member.families[seated.family]
                    member.homes.pop(seated.family, None)
                if seated.finding is not None:
                    seated.finding.cancel()
                seated.drop(well)
                seated.seat.end()

    # ── the rest ──────────────────────────────────────────────────────────────────────────────────────────

    async def _page(self, member: Member, asked: workers.GetPage) -> None:
        status, body = (200, await self.scrape()) if asked.path == "/metrics" else await self._head.look()
        member.line.tell(workers.Page(asked.number, status, body))

    async def _check_background(self, member: Member, number: int) -> None:
        await self._head.background.check_room()
        member.line.tell(workers.Done(number))


def _amount(spent: workers.Spent) -> Amount:
    return Amount(*msgspec.structs.astuple(spent))


__all__ = ["Crew"]
