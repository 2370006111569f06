"""The routing table in action: for each model its tokenizer, its replicas' connections, and what is in flight; for
each name where its requests go (`traffic`).

`Fleet.apply` takes a table whole: it loads what is new (tokenizers on a thread, so that streams keep flowing),
then writes the table to disk, then switches over in one step of the event loop. A table that cannot be loaded is
never written. Connections to replicas that are in both tables stay; those that left are retired. The file is what
a restarted router begins with while the control plane is away.

A model whose tokenizer or template cannot be loaded stays in the table, unusable: its requests are answered with
the reason, its replicas are not connected to, so that the control plane never sees it ready, and the
acknowledgement says why.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import msgspec

from quire.errors import InvalidRequest, ModelNotFound, ModelStopped, ServiceUnavailable
from quire.router.access import Access, Caller
from quire.router.breaker import Breakers
from quire.router.canaries import Canaries
from quire.router.engine_client import Ejection, EngineClient, endpoint_key
from quire.router.memory import Memory
from quire.router.metrics import Metrics
from quire.router.model_metrics import ReplicaSample, Standing
from quire.router.quarantine import Suspects
from quire.router.shares import Turns
from quire.router.traffic import Asked, Traffic, Way
from quire.text import TextError, Tokenizer
from quire.text.dialects import Dialects
from quire_schemas import wire

log = logging.getLogger("quire.router")
LISTED: Final = 8
"""Names of models that an error tells of."""


@dataclass(slots=True)
class Pulse:
    """Wakes everybody who waits on `event`, and has a new event for those who come later."""

    event: asyncio.Event = field(default_factory=asyncio.Event)

    def fire(self) -> None:
        fired, self.event = self.event, asyncio.Event()
        fired.set()


@dataclass(slots=True)
class ServedModel:
    """One model as requests meet it. Lives as long as the model is in the table; the route may change under it."""

    route: wire.ModelRoute
    tokenizer: Tokenizer | TextError
    clients: tuple[EngineClient, ...] = ()
    in_flight: int = 0
    """Sequences admitted and not ended, those without a replica included."""
    background: int = 0
    """Those of them that nobody waits for: they take no place from others."""
    used_at: float | None = None
    """When the last of them came or ended, by the monotonic clock."""
    retrying: int = 0
    """Sequences on a further attempt that has not brought a token yet."""
    suspects: Suspects = field(default_factory=Suspects)
    trials: set[str] = field(default_factory=set)
    """Replicas on which a suspect is tried now."""
    held: Counter[str] = field(default_factory=Counter)
    """Of those in flight that are not in the background, how many are whose tenant's."""
    turns: Turns = field(default_factory=Turns)
    """Whose turn it is at the engines, where there are several tenants."""
    breakers: Breakers = field(default_factory=Breakers)
    """Which replicas get no requests because they fail them."""
    settled: Pulse = field(default_factory=Pulse)
    """A further attempt or a trial has brought its token, or ended."""

    @property
    def name(self) -> str:
        """The Model's, of a canary, too."""
        return self.route.canary_of or self.route.model

    def target(self, adapter: str) -> str:
        """It, or one of its adapters, as backends of routes, metrics and the ledger name it."""
        return f"{self.name}{wire.ADAPTER_MARK}{adapter}" if adapter else self.name

    def has_adapter(self, name: str) -> bool:
        """Whether requests may ask for that one; for none they always may."""
        return not name or any(each.name == name for each in self.route.adapters)

    @property
    def has_place(self) -> bool:
        """Whether one more request would be taken by a replica, at once or from the queue."""
        waited_for = self.in_flight - self.background
        return self.ready and waited_for < self.slots + self.route.max_queue_length

    @property
    def usable(self) -> Tokenizer:
        """The tokenizer. Raises the `TextError` that loading it ended in."""
        if isinstance(self.tokenizer, TextError):
            raise type(self.tokenizer)(
                str(self.tokenizer)
            )  # a new one: the old would gather a traceback a request
        return self.tokenizer

    @property
    def dialects(self) -> Dialects:
        """How the model writes calls and thoughts: as its manifest says, else as its template shows."""
        return self.usable.dialects.overridden(self.route.tool_dialect, self.route.reasoning_dialect)

    @property
    def vocab_size(self) -> int:
        """Rows of logits that all serving replicas have; what the tokenizer knows until one has told."""
        told = [c.welcome.vocab_size for c in self.clients if c.welcome is not None and c.serving]
        return min(told) if told else self.usable.vocab_size

    @property
    def ready(self) -> bool:
        """Whether a request could be started now."""
        return any(client.ready for client in self.clients)

    def check_wanted(self) -> None:
        """Raises `ModelStopped` when no replica is ready and none is wanted, and `ServiceUnavailable` when all
        fail, so that it makes no sense to wait for one."""
        if self.route.stopped and not self.ready:
            how = "paused" if self.route.paused else "stopped: no replica of it is wanted"
            raise ModelStopped(f"The model '{self.route.model}' is {how}.")
        if (wait := self.breakers.waits(time.monotonic())) is not None:
            raise ServiceUnavailable("All replicas of this model fail what they are given.", retry_after=wait)

    def use(self, now: float) -> wire.ModelUse:
        """Whether it is asked for, and since when not."""
        placed = sum(client.in_flight for client in self.clients)
        idle = None if self.used_at is None else max(now - self.used_at, 0.0)
        serving = [client for client in self.clients if client.ready]
        since = [self.turns.waits_since, *(client.waits_since for client in serving)]
        first = min((at for at in since if at is not None), default=now)
        stats = [client.stats for client in serving if client.stats is not None]
        shares = [each.blocks_used / each.blocks_total for each in stats if each.blocks_total]
        return wire.ModelUse(
            self.in_flight,
            max(self.in_flight - placed, 0),
            idle,
            ready=len(serving),
            queue_time=max(now - first, 0.0),
            kv_usage=sum(shares) / len(shares) if shares else 0.0,
        )

    @property
    def slots(self) -> int:
        """Sequences that the ready replicas compute at once."""
        return sum(client.max_num_seqs for client in self.clients if client.ready)


class Fleet:
    """Everything routable. `apply` changes it, all else reads."""

    def __init__(self, snapshot: Path | None, access: Access | None = None, *, leads: bool = True) -> None:
        """Tables are kept in `snapshot`, if one is given. `leads`: it is the head's, and no other worker's."""
        self.table = wire.RoutingTable(version=0, models=())
        self.access = access or Access()
        self.models: dict[str, ServedModel] = {}
        """By every name that a Model has itself."""
        self.by_model: dict[str, ServedModel] = {}
        """By the name of the Model."""
        self.targets: dict[str, ServedModel] = {}
        """The same, and by `ServedModel.target` of its adapters."""
        self.traffic = Traffic()
        self.canaries = Canaries()
        self.copies: set[asyncio.Task[None]] = set()
        """Copies of requests on their way, which nobody waits for."""
        self.metrics = Metrics(self.samples, self.standings)
        self.memory = Memory()
        self._snapshot = snapshot
        self._leads = leads
        self._clients: dict[tuple[str, int, str], EngineClient] = {}
        self._leaving: list[EngineClient] = []
        self._tokenizers: dict[tuple[object, ...], Tokenizer | TextError] = {}
        self._turn = asyncio.Lock()
        self._pulse = Pulse()

    # ── changing it ───────────────────────────────────────────────────────────────────────────────────────

    async def load_snapshot(self) -> None:
        """Begin with the table on disk, if there is one. A file that is none is reported and left aside."""
        if self._snapshot is None:
            return
        try:
            table = msgspec.json.decode(self._snapshot.read_bytes(), type=wire.RoutingTable)
            tokenizers = await self._load(table)
            await self.access.prepare(table.budgets)
        except FileNotFoundError:
            return
        except Exception as error:  # noqa: BLE001 - an empty router is better than one that does not start
            log.error("the routing snapshot %s cannot be used: %s", self._snapshot, error)
            return
        self._switch(table, tokenizers)
        log.info("routing table %d from disk: %d models", table.version, len(table.models))

    async def apply(self, table: wire.RoutingTable) -> None:
        """Act by `table` from now on, if it is newer, on a disk that takes nothing, too: the copy is for a router
        that starts while no control plane is there."""
        async with self._turn:
            if table.version <= self.table.version:
                return
            tokenizers = await self._load(table)
            await self.access.prepare(table.budgets)
            try:
                if self._snapshot is not None:
                    await asyncio.to_thread(_write, self._snapshot, msgspec.json.encode(table))
            except OSError as error:
                log.error("the routing table cannot be kept in %s, and serves: %s", self._snapshot, error)
            self._switch(table, tokenizers)
            log.info("routing table %d: %d models", table.version, len(table.models))

    async def _load(self, table: wire.RoutingTable) -> dict[str, tuple[tuple[object, ...], Tokenizer | TextError]]:
        return {route.model: await self._tokenizer(route) for route in table.models}

    def _switch(
        self, table: wire.RoutingTable, tokenizers: dict[str, tuple[tuple[object, ...], Tokenizer | TextError]]
    ) -> None:
        known, by_model = self.by_model, {}
        clients: dict[tuple[str, int, str], EngineClient] = {}
        by_name: dict[str, ServedModel] = {}
        targets: dict[str, ServedModel] = {}
        own: dict[str, str] = {}
        for route in table.models:
            tokenizer = tokenizers[route.model][1]
            served = known.get(route.model) or ServedModel(route, tokenizer)
            served.breakers.set(
                route.breaker,
                [each.replica_id for each in route.replicas],
                [each.replica_id for each in route.replicas if not (each.draining or each.standby)],
            )
            mine: list[EngineClient] = []
            for endpoint in route.replicas if isinstance(tokenizer, Tokenizer) else ():
                key = endpoint_key(endpoint)
                client = self._clients.get(key) or EngineClient(
                    endpoint,
                    self._pulse.fire,
                    self._ejected(served.name),
                    served.breakers if self._leads else None,  # the head decides who gets none
                    leads=self._leads,
                )
                if self._leads:
                    client.breakers = served.breakers  # a canary's replica comes to be one of its model
                client.endpoint, client.stall_seconds = endpoint, route.stall_seconds
                client.max_queue_length, client.policy = route.max_queue_length, route.policy
                clients[key] = client
                mine.append(client)
            served.route, served.tokenizer, served.clients = route, tokenizer, tuple(mine)
            served.turns.look(served.slots)
            by_model[route.model] = served
            named = [(route.model, route.names)]
            if not route.canary_of:  # a canary's are its model's
                named += [(served.target(each.name), each.names) for each in route.adapters]
            for target, names in named:
                targets[target] = served
                for name in names:
                    if by_name.setdefault(name, served) is served:
                        own.setdefault(name, target)
                    else:
                        log.error("two models are served as %s; %s keeps the name", name, own[name])
        for key, client in self._clients.items():
            if key not in clients:
                client.retire()
                self._leaving.append(client)
        self._clients, self.models, self.by_model, self.table = clients, by_name, by_model, table
        self.targets = targets
        self.traffic.set(table.routes, own, targets)
        self.canaries.set(by_model)
        self._tokenizers = dict(tokenizers.values())
        self.access.act_by(table.access, table.budgets)
        self.metrics.set_models(name for name, served in targets.items() if not served.route.canary_of)
        self.metrics.set_routes(table.routes, table.access)
        self._pulse.fire()

    async def _tokenizer(self, route: wire.ModelRoute) -> tuple[tuple[object, ...], Tokenizer | TextError]:
        """The route's tokenizer, and the key it is remembered by: its template, and when its files changed."""
        folder = Path(route.tokenizer_dir)
        chosen: str | Path | None = route.chat_template
        if chosen is None and route.chat_template_file is not None:
            chosen = Path(route.chat_template_file)
        files = [*(folder / name for name in _FILES), *([chosen] if isinstance(chosen, Path) else [])]
        key = (folder, chosen, *(_changed_at(path) for path in files))
        known = self._tokenizers.get(key)
        if known is not None:
            return key, known
        loaded = await asyncio.to_thread(Tokenizer.attempt, folder, chosen)
        if isinstance(loaded, TextError):
            log.error("model %s cannot be served: %s (%r)", route.model, loaded, loaded.__cause__)
        return key, loaded

    def set_limits(self, message: wire.SetLimits) -> None:
        """Pass limits on to the replicas they are for."""
        for client in self._clients.values():
            if client.endpoint.replica_id in message.replica_ids:
                client.set_limits(message.limits)

    async def close(self) -> None:
        """Drop all connections, and what nobody waits for."""
        for copy in self.copies:
            copy.cancel()
        if self.copies:
            await asyncio.wait(self.copies)
        for client in [*self._clients.values(), *self._leaving]:
            await client.close()

    # ── reading it ────────────────────────────────────────────────────────────────────────────────────────

    def way(self, asked: Asked, caller: Caller, *, ahead: bool = False) -> Way:
        """Where a caller's request goes; `ahead`: where the next one would, which takes nobody's turn.

        He is held to the name that he asks for, whatever is behind it. Raises `PermissionDenied`, and
        `ModelNotFound`, which names none that he may not use.
        """
        caller.check_model(asked.name)
        way = self.traffic.way(asked, ahead=ahead)
        if way is None:
            shown = "".join(c if c.isprintable() else "?" for c in asked.name[:64])
            names, base = self.names(asked.headers, caller), asked.name.rpartition(wire.ADAPTER_MARK)[0]
            if base in names:  # it is its adapter that there is not
                begin = base + wire.ADAPTER_MARK
                known = ", ".join(name for name in names if name.startswith(begin))
                told = f" Adapters of '{base}': {known}." if known else f" '{base}' has no adapters."
            else:
                known = self._those_served(names, asked.headers)
                told = f" Models here: {known}." if known else " No model is served here yet."
            raise ModelNotFound(f"The model '{shown}' does not exist.{told}", param="model")
        return way

    def _those_served(self, names: Sequence[str], headers: Sequence[tuple[bytes, bytes]]) -> str:
        """Names that lead somewhere, those that a replica answers now first, and how many there are besides."""
        behind = {name: self.traffic.behind_name(name, headers) for name in names}
        answered = {
            name: any(client.ready for target in found for client in self.targets[target].clients)
            for name, found in behind.items()
            if found
        }
        listed = sorted(answered, key=lambda name: (not answered[name], name))
        more = f" and {len(listed) - LISTED} more, which GET /v1/models lists" if len(listed) > LISTED else ""
        return ", ".join(listed[:LISTED]) + more

    def at(self, way: Way, model: str | None) -> ServedModel:
        """One of the models of a way, with or without an adapter. Raises `ModelStopped` if it is not there."""
        served = self.targets.get(model) if model is not None else None
        if served is None:
            raise ModelStopped(f"No model is behind '{way.name}' now.")
        return served

    def names(self, headers: Sequence[tuple[bytes, bytes]], caller: Caller) -> list[str]:
        """All names that a caller's request with these headers may use."""
        return [name for name in self.traffic.names(headers) if caller.may_use(name)]

    def resolve(self, asked: Asked, caller: Caller) -> ServedModel:
        """The model that would have the caller's request, for what needs none of its replicas. Raises
        `PermissionDenied`, `ModelNotFound` and `ModelStopped`."""
        way = self.way(asked, caller, ahead=True)
        return self.at(way, way.model or way.instead("Unavailable", (), self.targets))

    def sole(self, caller: Caller) -> ServedModel:
        """The only model behind the names that the caller may use. Raises `InvalidRequest` where there are others,
        and `ModelNotFound`."""
        found = {
            self.targets[target].route.model
            for name in self.names((), caller)
            for target in self.traffic.behind_name(name)
        }
        if not found:
            raise ModelNotFound("No model is served here yet.", param="model")
        if len(found) > 1:
            raise InvalidRequest("'model' is required: several are served here.", param="model")
        return self.by_model[found.pop()]

    @property
    def changed(self) -> asyncio.Event:
        """Set at the next change of the table or of a connection. Take it before looking, then wait for it."""
        return self._pulse.event

    def stir(self) -> None:
        """Have whoever waits for a change look again."""
        self._pulse.fire()

    @property
    def links(self) -> tuple[tuple[str, int], ...]:
        """The replicas to which it is connected."""
        return tuple((id_, incarnation) for (id_, incarnation, _), c in self._clients.items() if c.connected)

    @property
    def unusable(self) -> dict[str, str]:
        """Models whose tokenizer or template cannot be loaded, and why."""
        return {
            served.route.model: str(served.tokenizer)
            for served in self.by_model.values()
            if isinstance(served.tokenizer, TextError)
        }

    def status(self, base_url: str) -> wire.RouterStatus:
        """The acknowledgement: the table in force, its replicas, and those that still drain from an older one."""
        self._leaving = [client for client in self._leaving if not client.closed]
        loads = [client.load() for client in [*self._clients.values(), *self._leaving]]
        return wire.RouterStatus(
            version=self.table.version,
            pid=os.getpid(),
            base_url=base_url,
            http=self.table.http,
            parts=wire.PARTS,
            budgets=self.access.limiter.low_budgets(),
            replicas=[*loads, *self._unconnected()],
            unusable=self.unusable,
            uses={
                served.route.model: self._use(served, time.monotonic())
                for served in self.by_model.values()
                if served.route.on_demand and not served.route.canary_of
            },
            canaries=self.canaries.told(),
        )

    def _use(self, served: ServedModel, now: float) -> wire.ModelUse:
        """How a model is used, its canary included: what that does its own replicas may have to do soon."""
        use, canary = served.use(now), self.canaries.beside(served)
        if canary is None:
            return use
        more = canary.use(now)
        idle = min((each for each in (use.idle, more.idle) if each is not None), default=None)
        return msgspec.structs.replace(use, in_flight=use.in_flight + more.in_flight, idle=idle)

    def _unconnected(self) -> Iterator[wire.ReplicaLoad]:
        """Replicas of models that cannot be served."""
        for route in self.table.models:
            for endpoint in route.replicas:
                if endpoint_key(endpoint) not in self._clients:
                    yield wire.ReplicaLoad(endpoint.replica_id, endpoint.incarnation, False, 0)

    def _ejected(self, model: str) -> Callable[[Ejection], None]:
        if not self._leads:  # the head counts it
            return lambda _: None
        return lambda why: self.metrics.model(model).ejections[why].inc()

    def standings(self) -> Iterator[Standing]:
        """What a scrape shows of the models as they stand."""
        for served in self.by_model.values():
            if served.route.canary_of:
                continue  # what is wanted is the model's number; its replicas are shown by themselves
            ready = sum(client.ready for client in served.clients)
            yield Standing(served.route.model, served.route.wanted, ready, served.route.restarts)

    def samples(self) -> Iterator[ReplicaSample]:
        """What a scrape shows of the replicas."""
        for served in self.by_model.values():
            for client in served.clients:
                up, connected = client.connected and not client.stalled, client.connected
                yield ReplicaSample(
                    served.name,
                    client.endpoint.replica_id,
                    up,
                    client.stats if connected else None,
                    client.welcome if connected else None,
                    served.route.prefix_caching,
                    client.breaker,
                )


_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)


def _changed_at(path: Path) -> int | None:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return None


def _write(path: Path, content: bytes) -> None:
    """Replace `path` so that a crash leaves the old content or the new, never a part."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
