"""What the router is told, and what it says about it.

`build` makes a table from rows and observations, without I/O. A route has one tokenizer, and ids made by one
tokenizer are nonsense to an engine of another: while replicas of both run, `serving_text` says which ones get
requests, and the others stand by. `Routes` holds the conversation with the router
over its control socket: it sends a table whenever the content differs from what the router acknowledged, asks
for the status while it has nothing to send, and answers the planner's questions about a replica by the last
status and by the table that this status acknowledges, never by the table that was merely sent.

A table is absolute. Its version is made durable before it is sent, and grows above whatever the router says it
has. A router that has started since gets it again: what it kept on disk may be by another version, which leaves
out the parts that it does not know. A part that the running router does not know is not in force, and no reason to
send the table again.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import msgspec

from quire_operators.rollout import Goal, Process, Router, Row, Seen
from quire_operators.store import Store
from quire_operators.tracing import acted
from quire_schemas import wire
from quire_schemas.resource import Key

log = logging.getLogger(__name__)

ROUTES = Key("routes", "router")
"""The key under which the routing table is reconciled."""
EXCHANGE_SECONDS = 5.0
FRESH_SECONDS = 5.0
"""A status older than this says nothing about now."""


@dataclass(frozen=True, slots=True)
class Text:
    """What turns text into ids and back for an engine, and whether it takes scripts. Replicas of equal `Text` can
    serve one route."""

    tokenizer_dir: str
    chat_template_file: str | None
    scripted: bool = False
    chat_template: str | None = None

    @classmethod
    def of(cls, route: wire.ModelRoute) -> Text:
        return cls(route.tokenizer_dir, route.chat_template_file, route.scripted, route.chat_template)


@dataclass(frozen=True, slots=True)
class Routable:
    """One model with what the table needs to know of it.

    `sockets` maps replica ids to engine sockets, `texts` to what they need for text; a replica without an entry
    there has that of `route`, which is also the text to use while no replica is ready.
    """

    route: wire.ModelRoute
    replicas: tuple[tuple[Row, Seen], ...]
    sockets: dict[str, str]
    texts: Mapping[str, Text] = field(default_factory=dict)
    adapters: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """By replica id, the names of those that it has."""

    def text_of(self, row: Row) -> Text:
        return self.texts.get(row.id, Text.of(self.route))


def serving_text(model: Routable) -> Text:
    """Whose replicas get requests: the text with the most ready replicas that do not drain, the one of the newer
    revision in a tie. Replicas that the router was once connected to count before those that merely say they are
    ready, so that requests never move to where nobody can take them yet. Draining replicas decide only when there
    are no others; with none at all it is the text of the current revision.
    """
    votes: dict[Text, list[int]] = {}
    for row, seen in model.replicas:
        if not _may_serve(row, seen) or row.id not in model.sockets:
            continue
        vote = votes.setdefault(model.text_of(row), [0, 0, 0])
        if row.goal is not Goal.DRAIN:
            vote[0] += row.ready_since is not None
            vote[1] += 1
        vote[2] = max(vote[2], row.revision)
    current = Text.of(model.route)
    return max(votes, key=lambda text: votes[text], default=current)


def build(models: Sequence[Routable]) -> tuple[wire.ModelRoute, ...]:
    """The table's content: every model, with the replicas that may carry requests.

    A replica is in it from the moment its engine is ready until it is gone or its stop was sent; one that
    drains is marked so and keeps its streams. One that needs another tokenizer or template than the route's
    stands by: it is connected, and takes over when its kind is the greater part.
    """
    routes = []
    for model in models:
        text = serving_text(model)
        endpoints = tuple(
            wire.ReplicaEndpoint(
                row.id,
                row.incarnation,
                model.sockets[row.id],
                draining=row.goal is Goal.DRAIN,
                standby=model.text_of(row) != text,
                template_hash=row.template_hash,
                adapters=model.adapters.get(row.id, ()),
            )
            for row, seen in model.replicas
            if _may_serve(row, seen) and row.id in model.sockets
        )
        routes.append(
            msgspec.structs.replace(
                model.route,
                tokenizer_dir=text.tokenizer_dir,
                chat_template_file=text.chat_template_file,
                chat_template=text.chat_template,
                scripted=text.scripted,
                replicas=endpoints,
            )
        )
    return tuple(routes)


def _may_serve(row: Row, seen: Seen) -> bool:
    if row.stop_sent is not None:
        return False
    silent = seen.process is Process.UNKNOWN and row.ready_since is not None
    return silent or seen.process is Process.READY


class Routes:
    """The control plane's end of the conversation with the router. `clock` gives unix seconds."""

    def __init__(
        self,
        socket: Path,
        store: Store,
        router_runs: Callable[[], bool | None],
        clock: Callable[[], float],
        overlaps: Callable[[], bool] = lambda: False,
        lives: Callable[[int], bool] = lambda pid: True,
    ) -> None:
        """`overlaps`: whether a router that does not answer here may have requests, at whichever replica. `lives`:
        whether a process may be one of the router's: what one said that is gone tells nothing of the next."""
        self._socket = socket
        self._store = store
        self._router_runs = router_runs
        self._overlaps = overlaps
        self._lives = lives
        self._clock = clock
        self._sent: dict[int, wire.RoutingTable] = {}
        self._status: wire.RouterStatus | None = None
        self._heard_at = float("-inf")
        self._told: int | None = None
        """The process that took the last table from us."""
        self._lock = asyncio.Lock()
        self._lost: dict[tuple[str, int], float] = {}
        self._endpoints: dict[tuple[str, int], wire.ReplicaEndpoint] = {}
        """Of the acknowledged table, and the loads of the last status, by (replica, incarnation)."""
        self._loads: dict[tuple[str, int], wire.ReplicaLoad] = {}

    # ── questions ─────────────────────────────────────────────────────────────────────────────────────────

    @property
    def status(self) -> wire.RouterStatus | None:
        """The last status, however old."""
        return self._status

    def knowledge(self) -> Router:
        """Whether the router's state is known, unknown, or known to be down (its shim says that nothing runs)."""
        if self._router_runs() is False:
            return Router.DOWN
        fresh = self._clock() - self._heard_at <= FRESH_SECONDS
        return Router.KNOWN if fresh and self._acknowledged() is not None else Router.UNKNOWN

    def _acknowledged(self) -> wire.RoutingTable | None:
        """The table that the router which lives acts by, as far as it is known."""
        if self._status is None or not self._lives(self._status.pid):
            return None
        return self._sent.get(self._status.version)

    def view(self, row: Row, seen: Seen) -> Seen:
        """`seen` with the router's side filled in."""
        if self.knowledge() is Router.DOWN:
            return replace(seen, connected=False, routed=False, released=True, in_flight=0, hot_hash=None)
        table = self._acknowledged()
        if table is None or self._status is None:
            return replace(seen, connected=False, routed=False, released=False)
        name = (row.id, row.incarnation)
        endpoint, load = self._endpoints.get(name), self._loads.get(name)
        connected = load is not None and load.connected and endpoint is not None
        routed = connected and endpoint is not None and not endpoint.draining
        if routed or row.ready_since is None:
            self._lost.pop(name, None)
        else:
            self._lost.setdefault(name, self._clock())
        return replace(
            seen,
            connected=connected,
            routed=routed,
            released=endpoint is None or endpoint.draining,
            in_flight=self._in_flight(load),
            hot_hash=load.hot_hash if load is not None else None,
            unready_since=self._lost.get(name),
            failing=load is not None and _fails(load),
        )

    def lists(self, model: str) -> bool:
        """Whether the router acts by a table that has this model."""
        told = self.in_force() if self.knowledge() is Router.KNOWN else None
        return told is not None and any(route.model == model for route in told.models)

    def unusable(self, model: str) -> str | None:
        """Why the router cannot serve this model, whatever its replicas do; None when it can, or is not known."""
        if self.knowledge() is not Router.KNOWN or self._status is None:
            return None
        return self._status.unusable.get(model)

    def use(self, model: str) -> wire.ModelUse | None:
        """How a model is used whose replicas come and go by it; None when that is not known."""
        if self.knowledge() is not Router.KNOWN or self._status is None:
            return None
        return self._status.uses.get(model)

    def comparison(self, model: str) -> wire.Comparison | None:
        """What was counted of a model and its canary; None when that is not known, or there is none."""
        if self.knowledge() is not Router.KNOWN or self._status is None:
            return None
        return self._status.canaries.get(model)

    @property
    def budgets(self) -> Sequence[wire.BudgetStanding]:
        """Those that were spent, or nearly, when the router told of itself last."""
        return self._status.budgets if self._status is not None else ()

    def low_budgets(self) -> set[tuple[object, ...]]:
        """The same, without what changes with each request."""
        return {(each.policy, each.name, each.key, each.size, each.state, each.resets) for each in self.budgets}

    def load_of(self, name: str, incarnation: int) -> tuple[bool, int]:
        """(released, in flight) of a process that no row accounts for."""
        if self.knowledge() is Router.DOWN:
            return True, 0
        table = self._acknowledged()
        if table is None or self._status is None:
            return False, 0
        load = self._loads.get((name, incarnation))
        return (name, incarnation) not in self._endpoints, self._in_flight(load)

    def _in_flight(self, load: wire.ReplicaLoad | None) -> int:
        """By the router's word, and at least one while another one may have some."""
        return max(load.in_flight if load is not None else 0, int(self._overlaps()))

    # ── conversation ──────────────────────────────────────────────────────────────────────────────────────

    def takes(self, part: str, wanted: object) -> bool:
        """Whether this part of the table is in force, by the router's own word. One of a version that does not
        know the part does what its default says.
        """
        table = self.in_force()
        return table is not None and bool(wanted == getattr(table, part))

    def in_force(self) -> wire.RoutingTable | None:
        """The table that the router acts by, by its own word, without the parts that it does not know; None when
        that is not known."""
        table = self._acknowledged()
        if self._status is None or table is None or self._status.pid != self._told:
            return None
        unknown = {part: getattr(_UNNUMBERED, part) for part in wire.PARTS if self.is_older(part)}
        return msgspec.structs.replace(table, **unknown)

    def is_older(self, part: str) -> bool:
        """Whether the router is of a version that does not know this part of a table."""
        return self._status is not None and part not in _known(self._status)

    async def reconcile(self, content: wire.RoutingTable) -> bool:
        """Bring the router to `content`, whose version says nothing, and hear its status; says whether what is
        known of it changed.

        A router that cannot be reached is no error here: `knowledge()` tells.
        """
        async with self._lock:
            before, knew = self._status, self.knowledge()
            try:
                async with asyncio.timeout(EXCHANGE_SECONDS):
                    await self._exchange(content)
            except (OSError, TimeoutError, wire.WireError, asyncio.IncompleteReadError) as error:
                log.debug("the router does not answer: %r", error)
            return _news(self._status) != _news(before) or self.knowledge() is not knew

    async def _exchange(self, content: wire.RoutingTable) -> None:
        status = self._hear(await self._ask(wire.GetRouterStatus()))
        table = self._sent.get(status.version)
        if table is not None and status.pid == self._told and _essence(table) == _essence(content):
            return
        version = max(self._store.routing_version(), status.version) + 1
        self._store.set_routing_version(version)
        table = msgspec.structs.replace(content, version=version)
        self._sent = {**dict(list(self._sent.items())[-8:]), version: table}
        acted(f"routing table {version}: {len(content.models)} models")
        self._told = self._hear(await self._ask(table)).pid

    def _hear(self, status: wire.RouterStatus) -> wire.RouterStatus:
        before, self._status = self._loads, status
        self._heard_at = self._clock()
        self._loads = {(load.replica_id, load.incarnation): load for load in status.replicas}
        table = self._sent.get(status.version)
        endpoints = (
            [endpoint for route in table.models for endpoint in route.replicas] if table is not None else ()
        )
        self._endpoints = {(endpoint.replica_id, endpoint.incarnation): endpoint for endpoint in endpoints}
        for route in table.models if table is not None else ():
            for endpoint in route.replicas:
                self._tell_breaker(
                    Key("model", route.canary_of or route.model),
                    (endpoint.replica_id, endpoint.incarnation),
                    before,
                )
        return status

    def _tell_breaker(
        self, model: Key, name: tuple[str, int], before: Mapping[tuple[str, int], wire.ReplicaLoad]
    ) -> None:
        """Note an event when a replica gets no requests any more because it fails them, or gets them again."""
        was, now = before.get(name), self._loads.get(name)
        if now is None:
            return
        failed, fails = was is not None and _fails(was), _fails(now)
        if fails and not failed:
            text = f"{name[0]} fails what it is given: it gets nothing for a while, then one request on trial"
            self._store.add_event(model, "Warning", "ReplicaTripped", text)
        elif failed and not fails:
            self._store.add_event(model, "Normal", "ReplicaRecovered", f"{name[0]} gets requests again")

    async def set_limits(self, replica_ids: tuple[str, ...], limits: wire.Limits) -> None:
        """Have the router pass new limits on. What became of it shows in a later status."""
        async with self._lock:
            try:
                async with asyncio.timeout(EXCHANGE_SECONDS):
                    self._hear(await self._ask(wire.SetLimits(replica_ids, limits)))
            except (OSError, TimeoutError, wire.WireError, asyncio.IncompleteReadError) as error:
                log.warning("cannot pass limits on through the router: %r", error)

    async def finish(self, grace: float) -> bool:
        """Have the router take no new request and end after at most `grace` seconds; whether it heard that."""
        async with self._lock:
            try:
                async with asyncio.timeout(EXCHANGE_SECONDS):
                    await self._ask(wire.Finish(grace))
            except (OSError, TimeoutError, wire.WireError, asyncio.IncompleteReadError) as error:
                log.warning("cannot tell the router to finish: %r", error)
                return False
            return True

    async def usage(self, asked: wire.GetUsage) -> wire.UsageReport | None:
        """What the router has noted of requests; None from one that does not answer, or is of a version that notes
        nothing."""
        try:
            async with asyncio.timeout(EXCHANGE_SECONDS):
                answer = await self._answer(asked)
        except (OSError, TimeoutError, wire.WireError, asyncio.IncompleteReadError) as error:
            log.warning("the router does not tell what was used: %r", error)
            return None
        return answer if isinstance(answer, wire.UsageReport) else None

    async def _ask(self, message: wire.ToRouter) -> wire.RouterStatus:
        """One message and the status that follows it, over a connection of its own. Only who leads says what
        changes anything: raises `Deposed`."""
        if not isinstance(message, wire.GetRouterStatus):
            self._store.check_lease()
        answer = await self._answer(message)
        if not isinstance(answer, wire.RouterStatus):
            raise wire.BadMessage(f"a {type(answer).__name__} is no status")
        return answer

    async def _answer(self, message: wire.ToRouter) -> wire.RouterStatus | wire.UsageReport:
        reader, writer = await asyncio.open_unix_connection(str(self._socket))
        try:
            writer.write(wire.frame(message))
            await writer.drain()
            answer = await wire.Reader[wire.FromRouter](reader, wire.FromRouter).read()
        finally:
            writer.close()
        if answer is None:
            raise ConnectionError("the router closed the control connection without an answer")
        return answer


_UNNUMBERED = wire.RoutingTable(0)


def _known(status: wire.RouterStatus) -> tuple[str, ...]:
    """The parts of a table that the router which says this knows."""
    return status.parts or (("models",) if status.http is None else ("models", "http"))


def _essence(table: wire.RoutingTable) -> wire.RoutingTable:
    """What of a table is a reason to send another one: not its number, nor an estimate that merely grew shorter;
    one that appears or ends is."""
    models = tuple(msgspec.structs.replace(m, eta=None if m.eta is None else 0.0) for m in table.models)
    return msgspec.structs.replace(table, version=0, models=models)


def _fails(load: wire.ReplicaLoad) -> bool:
    return load.breaker != "closed"


def _news(status: wire.RouterStatus | None) -> object:
    """What of a status the planner acts on: not the number of requests in flight, but whether there are any."""
    if status is None:
        return None
    loads = [
        (
            load.replica_id,
            load.incarnation,
            load.connected,
            load.in_flight == 0,
            load.hot_hash,
            load.breaker == "closed",
        )
        for load in status.replicas
    ]
    pids = [worker.pid for worker in status.workers]
    return (
        status.version,
        status.pid,
        status.base_url,
        status.unusable,
        status.worker_ends,
        pids,
        sorted(loads, key=lambda load: load[:2]),
    )
