"""One engine, seen from the router: a connection that is kept up, and the sequences running over it.

An `EngineClient` belongs to one incarnation of one replica. Its task connects, says `Hello`, and counts as
connected only when a `Welcome` with exactly that identity came back; a socket that answers as somebody else is
left alone and tried again later. When the connection breaks, each of its sequences is marked lost and its waiter
woken: what becomes of it is the gateway's decision. A client that left the routing table is retired: it takes no
new sequences, does not reconnect, and closes when its last sequence has ended.

Progress is what counts as life. A replica has made some when it sends deltas, when its count of steps has gone up,
or when it says that there is nothing to do; since the thread that steps is the one that answers `GetStats`, an
engine that is stopped or stuck says none of these. After `stall_seconds` without progress it is not ready,
whatever its socket says. It is asked often enough for that, and for the engine's lease. Nor is it ready while it
fails what it is given: how each sequence ends is told to its breaker (`breaker`).

Where a router has several workers, each has its own connection. The head's client counts the sequences of all:
those that another worker runs are *foreign* (`take_in`), and count as its own until they are let go.

    NotConnected      a sequence was to be started on a connection that is not up
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import random
import time
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Series
from typing import Literal

import msgspec

from quire.router.balancer import PREFIX_BLOCK, Burden, Candidate, Prefixes
from quire.router.breaker import NO_FAILURE, TRIAL_TOKENS, Breakers
from quire.router.memory import read_less
from quire_schemas import wire
from quire_schemas.workers import Wanted

log = logging.getLogger("quire.router")

HANDSHAKE_SECONDS = 5.0
_BACKOFF = (0.05, 1.0)
ASK_SECONDS = 1.0
"""Longest time between two questions for stats."""
_ASKED_A_LEASE = 4
_GET_STATS = wire.frame(wire.GetStats())
Ejection = Literal["disconnected", "stalled", "tripped"]
"""Why a replica that served is not ready any more, if nobody told it to leave."""


MOST_KEPT = 16
"""Deltas that are kept as they came, and packs of such."""
MUCH = 16 * 1024
"""Bytes of packs that are not made fewer: they have more in them than tokens."""
_pack = msgspec.msgpack.Encoder().encode
_unpack = msgspec.msgpack.Decoder(list[wire.Delta]).decode


class NotConnected(Exception):
    """The replica's connection is not up."""


class Sequence:
    """One sequence running on an engine: an inbox of its deltas, and the bell that rings when there is one."""

    __slots__ = (
        "background",
        "begun",
        "bell",
        "client",
        "connection",
        "deltas",
        "ended",
        "generated",
        "heard_at",
        "id",
        "lent",
        "lost",
        "max_tokens",
        "packed",
        "priority",
        "prompt_tokens",
        "sent_at",
        "trial",
        "well",
        "width",
    )

    def __init__(
        self, client: EngineClient, request: wire.Generate, bell: asyncio.Event, cached_tokens: int
    ) -> None:
        self.client = client
        self.connection = client.connection
        self.id = request.id
        self.bell = bell
        self.deltas: list[wire.Delta] = []
        self.packed: list[bytes] = []
        """Those before, while a client reads nothing: log-probabilities take a tenth of their room so."""
        self.heard_at = 0.0
        """When the first of them came."""
        self.prompt_tokens = len(request.token_ids) + len(request.written) - cached_tokens
        """Those that are probably to be computed."""
        self.priority = request.priority
        self.lent = request.lent
        self.background = request.background
        self.width = 1 if request.beam is None else request.beam.width
        self.max_tokens = request.sampling.max_tokens - len(request.written)
        self.generated = 0
        self.sent_at = time.monotonic()
        self.begun = False
        """Its prompt is computed: it has brought a token, or word that it could have."""
        self.ended = False
        self.lost = False
        self.trial = False
        """It decides whether its replica gets others."""
        self.well: bool | None = None
        """Whether its end speaks for its replica, or against it; None while it has none, or does not show."""

    def put(self, delta: wire.Delta) -> None:
        """One more; those that nobody takes are packed, such as bring tokens alone as one."""
        if len(self.deltas) >= MOST_KEPT:
            self.packed.append(_pack(list(_joined(self.deltas))))
            self.deltas = []
            if len(self.packed) >= MOST_KEPT and sum(map(len, self.packed)) < MUCH:
                self.packed = [_pack(list(_joined(self._unpacked())))]
        self.deltas.append(delta)

    def _unpacked(self) -> list[wire.Delta]:
        return [delta for pack in self.packed for delta in _unpack(pack)]

    def take(self) -> list[wire.Delta]:
        """The deltas since the last call."""
        taken, self.deltas = self.deltas, []
        if self.packed:
            taken = self._unpacked() + taken
            self.packed = []
        return taken

    def abort(self) -> None:
        """Tell the engine to stop; a sequence that has ended is left as it is."""
        self.client.abort(self)


class EngineClient:
    """The router's end of one replica. All of it runs on one event loop."""

    def __init__(
        self,
        endpoint: wire.ReplicaEndpoint,
        changed: Callable[[], None],
        ejected: Callable[[Ejection], None] = lambda _: None,
        breakers: Breakers | None = None,
        *,
        leads: bool = True,
    ) -> None:
        """`changed` is called when it is connected or no longer, and when its breaker opens or closes; `ejected`
        when it stops being ready by itself. One that does not lead asks for
        what the engine tells all only where nobody else has asked."""
        self._leads = leads
        self._told_at = 0.0
        self.endpoint = endpoint
        self.breakers = breakers or Breakers()
        """Those of its model."""
        self.stall_seconds = math.inf
        """The route's; set with the endpoint, as are the next two."""
        self.max_queue_length = 0
        self.policy: wire.Policy = "fcfs"
        self.prefixes = Prefixes(0)
        """What it has computed since it was connected."""
        self.welcome: wire.Welcome | None = None
        self.stats: wire.Stats | None = None
        self.max_num_seqs = 0
        """Sequences it computes at once, by the limits in force there."""
        self.served = 0
        self.proved_at: float | None = None
        """When this life of it last gave a token, a vector, or the end of an answer."""
        self.connection = 0
        """Counts connections: together with the replica, the name of one life of one engine."""
        self.retired = False
        self._changed = changed
        self._ejected = ejected
        self._sequences: dict[str, Sequence] = {}
        self._waited_for, self._unwatched = Burden(), Burden()
        """Of those that somebody waits for, and of background work."""
        self._limits: dict[str, wire.Limits] = {}
        self._writer: asyncio.StreamWriter | None = None
        self._progress_at = 0.0
        self._complaint = ""
        self._was_up = False
        """Whether the last connection got as far as its welcome."""
        self._task = asyncio.create_task(self._stay_connected(), name=f"engine {endpoint.replica_id}")

    # ── what is known of it ───────────────────────────────────────────────────────────────────────────────

    @property
    def connected(self) -> bool:
        return self._writer is not None

    @property
    def in_flight(self) -> int:
        """Seats and places in the queue that its sequences take: a beam search takes one for each beam."""
        return self._waited_for.width + self._unwatched.width

    @property
    def steps(self) -> int:
        """Those it has made, as far as it has told."""
        return self.stats.steps if self.stats is not None else 0

    @property
    def busy(self) -> bool:
        """Whether there are sequences to compute, ours or those of others."""
        return bool(self._sequences) or (self.stats is not None and self.stats.running + self.stats.waiting > 0)

    def has_others(self, sequence: Sequence) -> bool:
        """Whether there are sequences besides this one of ours."""
        stats = self.stats
        return self._sequences.keys() != {sequence.id} or (stats is not None and stats.running + stats.waiting > 1)

    @property
    def stalled(self) -> bool:
        return self.connected and time.monotonic() - self._progress_at > self.stall_seconds

    @property
    def ready(self) -> bool:
        """Whether a new sequence may be given to it."""
        able = self.connected and not self.retired and self.serving and not self.stalled
        return able and self.breakers.takes(self.endpoint.replica_id, time.monotonic())

    @property
    def serving(self) -> bool:
        """Whether the table has it for new sequences; else it only keeps what it has."""
        return not self.endpoint.draining and not self.endpoint.standby

    def goes_on(self, template_hash: str) -> bool:
        """Whether it could go on with an answer of what has this hash."""
        knows = self.welcome is not None and self.welcome.goes_on
        return knows and bool(template_hash) and self.endpoint.template_hash == template_hash

    @property
    def leaving(self) -> bool:
        """Whether its end is expected: it drains, or the table has it no more."""
        return self.retired or self.endpoint.draining

    def candidate(self, chain: Series[bytes] = (), *, background: bool = False) -> Candidate:
        """What it is for a sequence whose prompt has this chain of blocks. Only background work has background
        work before it."""
        tokens, width = self._waited_for.tokens, self._waited_for.width
        if background:
            tokens += self._unwatched.tokens
            width += self._unwatched.width
        return Candidate(
            self.endpoint.replica_id,
            self.ready,
            tokens,
            width,
            self.served,
            self.max_num_seqs + self.max_queue_length,
            self.prefixes.known(chain),
        )

    def load(self) -> wire.ReplicaLoad:
        return wire.ReplicaLoad(
            replica_id=self.endpoint.replica_id,
            incarnation=self.endpoint.incarnation,
            connected=self.connected,
            in_flight=self.in_flight,
            hot_hash=self.stats.hot_hash if self.stats is not None and self.connected else None,
            breaker=self.breaker,
        )

    @property
    def breaker(self) -> wire.BreakerState:
        """Whether its failures keep requests from it."""
        return self.breakers.of(self.endpoint.replica_id).state(time.monotonic())

    def queued(self, sequence: Sequence) -> bool:
        """Whether the sequence still waits in the engine's queue, as far as can be told from here.

        Those that run are the first in the engine's order, which is that of arrival, or of priority before it;
        without priorities seats that are lent come after others, and background work comes last.
        They are counted, and not those that wait, because one that gives up leaves the queue before the engine
        says so: who runs must not be taken for it.
        """
        if sequence.begun or self.stats is None or not self.stats.waiting:
            return False
        if self._sequences.get(sequence.id) is not sequence:
            return False  # it has ended, or its connection has, which whoever runs it may not have heard yet
        order = self._order()
        before = sum(each.width for each in order[: order.index(sequence)])
        return before >= self.stats.running

    def _order(self) -> list[Sequence]:
        """Its sequences in the order in which the engine lets them in."""
        by_priority = self.policy == "priority"
        # keeps the order of arrival among equals
        return sorted(
            self._sequences.values(),
            key=lambda each: (each.background, each.priority if by_priority else each.lent),
        )

    @property
    def waits_since(self) -> float | None:
        """When who waits longest in the engine's queue was sent there, as far as can be told; None if nobody
        waits that somebody waits for."""
        if self.stats is None or not self.stats.waiting:
            return None
        found, before = None, 0
        for sequence in self._order():
            if before >= self.stats.running and not (sequence.begun or sequence.background):
                found = sequence.sent_at if found is None else min(found, sequence.sent_at)
            before += sequence.width
        return found

    # ── sequences ─────────────────────────────────────────────────────────────────────────────────────────

    def start(self, request: wire.Generate, bell: asyncio.Event, chain: Series[bytes] = ()) -> Sequence:
        """Send a sequence, whose prompt has this chain of blocks, to the engine.

        `bell` is set whenever the sequence has news.
        """
        sequence = self._send(request, bell, self.prefixes.known(chain))
        self.prefixes.add(chain)
        self.served += 1
        return sequence

    def ask(self, request: wire.Generate, bell: asyncio.Event) -> Sequence:
        """Send a sequence of the router's own, which does not count as served."""
        return self._send(request, bell, 0)

    def take_in(self, name: str, wanted: Wanted, *, background: bool, lent: bool) -> Foreign:
        """Count a sequence that another worker gives to the engine now."""
        sequence = Foreign(self, name, wanted, background=background, lent=lent)
        self._sequences[name] = sequence
        sequence.trial = self.breakers.begin(self.endpoint.replica_id, time.monotonic())
        self._burden(sequence).add(sequence.prompt_tokens, sequence.max_tokens, sequence.width)
        self.prefixes.add(wanted.chain)
        self.served += 1
        return sequence

    def gained(self, sequence: Foreign, generated: int) -> None:
        """A foreign sequence has so many tokens by now."""
        if self._sequences.get(sequence.id) is sequence:
            self.proved_at, sequence.begun = time.monotonic(), True
            before, sequence.generated = sequence.generated, generated
            self._burden(sequence).gain(sequence.prompt_tokens, sequence.max_tokens, before, generated)
            if sequence.trial and generated >= TRIAL_TOKENS:
                self._judge(True, sequence)

    def let_go(self, sequence: Foreign, well: bool | None = None) -> None:
        """A foreign sequence runs no more; `well` as a sequence has it."""
        if self._sequences.get(sequence.id) is sequence:
            del self._sequences[sequence.id]
            self._over(sequence)
            self._judge(well, sequence)
            self._close_if_done()

    def _send(self, request: wire.Generate, bell: asyncio.Event, cached: int) -> Sequence:
        if self._writer is None or self.retired:
            raise NotConnected(self.endpoint.replica_id)
        sequence = self._sequences[request.id] = Sequence(self, request, bell, cached)
        sequence.trial = self.breakers.begin(self.endpoint.replica_id, time.monotonic())
        self._burden(sequence).add(sequence.prompt_tokens, sequence.max_tokens, sequence.width)
        self._writer.write(wire.frame(request))
        return sequence

    def abort(self, sequence: Sequence) -> None:
        if self._sequences.pop(sequence.id, None) is None:
            return
        self._over(sequence)
        self._judge(None, sequence)
        if self._writer is not None:
            self._writer.write(wire.frame(wire.Abort(sequence.id)))
        self._close_if_done()

    def _burden(self, sequence: Sequence) -> Burden:
        return self._unwatched if sequence.background else self._waited_for

    def _over(self, sequence: Sequence) -> None:
        sequence.ended = True
        self._burden(sequence).end(sequence.prompt_tokens, sequence.max_tokens, sequence.generated, sequence.width)

    def _judge(self, ok: bool | None, *sequences: Sequence) -> None:
        """Tell the breaker how these have ended, or that the replica has failed while they ran; None: it does not
        show."""
        trial = any(sequence.trial for sequence in sequences)
        for sequence in sequences:
            sequence.trial = False
        name = self.endpoint.replica_id
        changed = self.breakers.end(name, time.monotonic(), ok, trial=trial)
        if changed == "opened":
            log.warning("replica %s: fails, and gets no requests for a while", name)
            self._ejected("tripped")
        elif changed == "closed":
            log.info("replica %s: gets requests again", name)
        if changed or (trial and ok is None):
            self._changed()

    # ── control ───────────────────────────────────────────────────────────────────────────────────────────

    def set_limits(self, limits: wire.Limits) -> None:
        """Pass the hot knobs on; the engine's next `Stats` carries their hash."""
        self._limits = {limits.hot_hash: limits}
        if self._writer is not None:
            self._writer.write(wire.frame(limits))

    def retire(self) -> None:
        """Take nothing new; close when the last sequence has ended."""
        self.retired = True
        self._close_if_done()

    @property
    def closed(self) -> bool:
        return self._task.done()

    async def close(self) -> None:
        """Drop the connection now. Sequences still running are lost."""
        self.retired = True
        self._task.cancel()
        await asyncio.wait([self._task])

    def _close_if_done(self) -> None:
        if self.retired and not self._sequences:
            self._task.cancel()

    # ── the connection ────────────────────────────────────────────────────────────────────────────────────

    async def _stay_connected(self) -> None:
        delay = _BACKOFF[0]
        while not self.retired:
            try:
                await self._converse()
                delay = _BACKOFF[0]
                self._complain("the engine closed the connection", lost=True)
            except (FileNotFoundError, ConnectionRefusedError):
                self._complain("nothing listens on its socket; trying again until something does")
            except (OSError, EOFError, TimeoutError) as error:
                self._complain(f"the connection failed: {type(error).__name__}: {error}", lost=self._was_up)
            except wire.WireError as error:
                self._complain(f"{type(error).__name__}: {error}", lost=True)
            await asyncio.sleep(delay * random.uniform(0.8, 1.2))  # noqa: S311 (jitter, not a secret)
            delay = min(delay * 2, _BACKOFF[1])

    async def _converse(self) -> None:
        """One connection from its start to its end."""
        self._was_up = False
        reader, writer = await asyncio.open_unix_connection(self.endpoint.socket)
        read_less(writer.transport)
        asking: asyncio.Task[None] | None = None
        try:
            frames: wire.Reader[wire.FromEngine] = wire.Reader(reader, wire.FromEngine)
            async with asyncio.timeout(HANDSHAKE_SECONDS):
                if not wire.is_same_user(writer.get_extra_info("socket")):
                    raise wire.BadMessage("the socket belongs to another user")
                writer.write(wire.frame(wire.Hello(role="router")))
                lease = self._accept(await frames.read())
            self._writer = writer
            self.connection += 1
            if self.connection == 1:
                self.breakers.of(self.endpoint.replica_id).renew(time.monotonic())
            self.stats = self.proved_at = None
            self._progress_at = time.monotonic()
            asking = asyncio.create_task(self._ask(writer, lease / _ASKED_A_LEASE))
            self._complaint = ""
            log.info("replica %s: connected", self.endpoint.replica_id)
            self._changed()
            for limits in self._limits.values():
                writer.write(wire.frame(limits))
            while (message := await frames.read()) is not None:
                self._hear(message)
        finally:
            if asking is not None:
                asking.cancel()
            self._was_up, self._writer = self._writer is not None, None
            lost, self._sequences = self._sequences, {}
            self._waited_for, self._unwatched = Burden(), Burden()
            for sequence in lost.values():
                sequence.lost = True
                sequence.bell.set()
            if self._was_up:
                self._judge(None if self.leaving else False, *lost.values())
                log.info("replica %s: disconnected, %d sequences lost", self.endpoint.replica_id, len(lost))
                if not self.leaving:
                    self._ejected("disconnected")
                self._changed()
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    async def _ask(self, writer: asyncio.StreamWriter, for_lease: float) -> None:
        """Ask for stats until cancelled, four times a stall time at least."""
        was_stalled = False
        while True:
            pause = min(ASK_SECONDS, self.stall_seconds / 4, for_lease)
            await asyncio.sleep(pause)
            if self._leads or time.monotonic() - self._told_at > 1.5 * pause:
                writer.write(_GET_STATS)
            if self.stalled and not was_stalled:
                self._ejected("stalled")
                self._judge(False, *self._sequences.values())
            was_stalled = self.stalled

    def _accept(self, message: wire.FromEngine | None) -> float:
        """Check who answers; the lease that we hold by speaking, in seconds."""
        if message is None:
            raise EOFError("closed before its welcome")
        if not isinstance(message, wire.Welcome):
            raise wire.BadMessage(f"a {type(message).__name__} came in place of the welcome")
        mine = (self.endpoint.replica_id, self.endpoint.incarnation, wire.PROTOCOL)
        theirs = (message.replica_id, message.incarnation, message.protocol)
        if mine != theirs:
            raise wire.BadMessage(f"it answers as {theirs}, the table says {mine}")
        self.welcome = message
        self.max_num_seqs = message.max_num_seqs
        self.prefixes = Prefixes(message.num_blocks * message.block_size // PREFIX_BLOCK)
        return message.lease

    def _hear(self, message: wire.FromEngine) -> None:
        if isinstance(message, wire.Deltas):
            self._progress_at = time.monotonic()
            for delta in message.items:
                sequence = self._sequences.get(delta.id)
                if sequence is None:
                    continue  # aborted a moment ago
                if delta.token_ids:
                    before = sequence.generated
                    sequence.generated += len(delta.token_ids)
                    self._burden(sequence).gain(
                        sequence.prompt_tokens, sequence.max_tokens, before, sequence.generated
                    )
                if delta.token_ids or delta.finish_reason in ("stop", "length", "repetition"):
                    self.proved_at = time.monotonic()
                timings = delta.timings
                if delta.token_ids or (timings is not None and timings.first_token_at is not None):
                    sequence.begun = True
                if not sequence.deltas:
                    sequence.heard_at = self._progress_at
                sequence.put(delta)
                if delta.finish_reason is not None:
                    del self._sequences[delta.id]
                    self._over(sequence)
                    sequence.well = _went_well(delta)
                    self._judge(sequence.well, sequence)
                elif sequence.trial and sequence.generated >= TRIAL_TOKENS:
                    self._judge(True, sequence)
                sequence.bell.set()
            self._close_if_done()
        elif isinstance(message, wire.Stats):
            if message.running + message.waiting == 0:
                self._progress_at = time.monotonic()
            elif self.stats is None or message.steps != self.stats.steps:
                # its clock may be ahead of ours
                self._progress_at = max(self._progress_at, min(message.last_step_at, time.monotonic()))
            self.stats = message
            self._told_at = time.monotonic()
            self.max_num_seqs = message.max_num_seqs
        else:
            raise wire.BadMessage("a second welcome")

    def _complain(self, words: str, *, lost: bool = False) -> None:
        """Log why there is no connection, once for each reason and not at each attempt.

        `lost`: something is wrong, unless the replica is on its way out anyhow; else it is one more attempt. Of
        several workers the head says so.
        """
        if words != self._complaint and not self.retired:
            self._complaint = words
            level = logging.WARNING if lost and self._leads and not self.leaving else logging.INFO
            log.log(level, "replica %s: %s", self.endpoint.replica_id, words)


class Foreign(Sequence):
    """A sequence that another worker runs, as far as it tells."""

    __slots__ = ()

    def __init__(self, client: EngineClient, name: str, wanted: Wanted, *, background: bool, lent: bool) -> None:
        self.client = client
        self.connection = client.connection
        self.id = name
        self.bell = asyncio.Event()
        self.deltas, self.packed = [], []
        self.heard_at = 0.0
        self.prompt_tokens = wanted.prompt_tokens - client.prefixes.known(wanted.chain)
        self.priority = wanted.priority
        self.lent = lent
        self.background = background
        self.width = wanted.width
        self.max_tokens = wanted.max_tokens
        self.generated = 0
        self.sent_at = time.monotonic()
        self.well = None
        self.begun = self.ended = self.lost = self.trial = False


def _went_well(delta: wire.Delta) -> bool | None:
    """Whether the end of a sequence speaks for its replica, or against it; None for neither."""
    if delta.finish_reason != "error":
        return True
    return None if delta.error_code in NO_FAILURE else False


def _joined(deltas: Series[wire.Delta]) -> Iterator[wire.Delta]:
    """The same with fewer: whatever is no more than tokens goes to the one before that is no more either."""
    tokens: list[int] = []
    for delta in deltas:
        if delta == wire.Delta(delta.id, delta.token_ids):
            tokens += delta.token_ids
            continue
        if tokens:
            yield wire.Delta(delta.id, tuple(tokens))
            tokens = []
        yield delta
    if tokens:
        yield wire.Delta(deltas[0].id, tuple(tokens))


def endpoint_key(endpoint: wire.ReplicaEndpoint) -> tuple[str, int, str]:
    """What makes two endpoints the same connection; `draining` and `standby` are only its state."""
    return endpoint.replica_id, endpoint.incarnation, endpoint.socket


__all__ = ["EngineClient", "NotConnected", "Sequence", "endpoint_key"]
