"""The control plane's working parts, put together: their life, from open to down, and what the work queue runs.

Order at a start: open the store, find every process there is (adoption: no signal is sent), report what was
seen, and only then reconcile, so that nothing is started beside something that still runs. Order at an end by
signal: stop reconciling, close; processes go on. Order of `down`: leave the marker, stop reconciling, the router
first (it stops accepting and lets running requests finish within the grace), then the engines, then the folder of
sockets.

The marker in the state directory outlasts the processes: until an `apply` or `up` removes it a control plane
adopts what there is, answers a `plan`, deletes, and starts nothing. That somebody looks is no wish to have it all
back.

What the admin API asks is answered next door: `intents` changes what is wanted, `steering` decides beside it,
`views` shows it, `holdings` keeps the cache and the secrets.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

import sqlalchemy as sa

from quire.client import DOWN, UP
from quire.controlplane.errors import ApiError
from quire.controlplane.hooks import Hook, Hooks
from quire.controlplane.wiring import Machine, engine_argv, router_command, text_facts
from quire.tracing import Tracing
from quire_operators.access import KIND as POLICY
from quire_operators.access import Policies
from quire_operators.admission import Admission
from quire_operators.controller import Controller
from quire_operators.database import Deposed
from quire_operators.desired import priority_of
from quire_operators.devices import Inventory
from quire_operators.downloads import Downloads
from quire_operators.fleet.local import Life, LocalFleet
from quire_operators.gateway import KEY as GATEWAY
from quire_operators.gateway import UNIT as ROUTER_UNIT
from quire_operators.gateway import GatewayReconciler, RouterCommand
from quire_operators.gitops import KIND as SOURCE
from quire_operators.gitops import SourceReconciler
from quire_operators.lease import Lease
from quire_operators.models import ModelReconciler
from quire_operators.paths import StateDir, sync_folder
from quire_operators.records import StoredObject
from quire_operators.rollout import Router
from quire_operators.routes import ROUTES, Routes, build
from quire_operators.secrets import SecretNotFound, Secrets
from quire_operators.sources import Sources
from quire_operators.sqlite import StoreUnavailable
from quire_operators.store import Store
from quire_operators.tracing import Passes
from quire_operators.traffic import RouteReconciler
from quire_operators.whereabouts import VARIABLE
from quire_schemas import wire
from quire_schemas.resource import Key

log = logging.getLogger(__name__)

BUSY_POLL = 0.1
"""Seconds between two looks at the router while a replica starts, drains or waits for an acknowledgement."""
IDLE_POLL = 1.0
ENGINE_GRACE = 10.0
ROUTER_EXTRA = 5.0
"""How much longer than its grace the router has to end by itself before its shim kills it."""
STOP_SECONDS = 10.0
"""How long a shim may take to hear of a stop, and then to end after the grace."""
CONTROL_PLANE = Key("controlplane", "default")
"""What events of the control plane itself are told of; no object."""
KEPT_BACK = re.compile(rf"HF_TOKEN|HUGGING_FACE_HUB_TOKEN|{VARIABLE}|PG[A-Z]+")
"""Variables of the environment that are the control plane's alone: secrets, and all by which it comes to its
database."""


class ControlPlane:
    """One control plane of one state directory. `open` before anything else; `close` or `down` at the end. It
    changes nothing once it has lost its `lease`. The store is in `place`, or in its file in the state
    directory."""

    def __init__(
        self,
        state: StateDir,
        builtin: Mapping[str, Path],
        *,
        place: Path | sa.URL | None = None,
        lease: Lease | None = None,
        engine: Callable[[Path], Sequence[str]] = engine_argv,
        router: RouterCommand | None = None,
        environ: Mapping[str, str] = os.environ,
        tracing: Tracing | None = None,
    ) -> None:
        self.state = state
        self.tracer = tracing.tracer("quire.controlplane") if tracing is not None else None
        self.version = version("quire")
        self.started_at = time.time()
        self.store = Store(place or state.store, lease=lease)
        self.lease = lease
        self._others_version = self.store.others_version
        self._machine = Machine(time.monotonic)
        sources = Sources.of_environment(builtin, state.sources, environ)
        self.secrets = Secrets(state.secrets, environ)
        self.admission = Admission(
            self.store, sources, self._machine, text_facts, lambda: self.models.waiters(), self.secrets
        )
        self.downloads = Downloads(sources.cache, self.secrets, environ, self.wake, self.store.clock)
        self.offline = environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
        roots = (state.replicas, state.gateway)
        clock = self.store.clock
        self.fleet = LocalFleet(roots, self.store.install_id, self._process_changed, clock, lease)
        # Engines and router read local files only, and have no use for the hub's token or the database's password.
        child_env = {name: value for name, value in environ.items() if not KEPT_BACK.fullmatch(name)}
        child_env["HF_HUB_OFFLINE"] = "1"
        command = router or router_command(state)
        self.gateway = GatewayReconciler(self.store, self.fleet, state, command, child_env, clock)
        self.routes = Routes(
            state.router_control,
            self.store,
            self.gateway.router_runs,
            clock,
            self.gateway.overlaps,
            self.gateway.has_process,
        )
        self.gateway.routes = self.routes
        self.policies = Policies(self.store, self.secrets, self.routes, clock)
        self.models = ModelReconciler(
            self.store,
            self.fleet,
            self.routes,
            self.gateway,
            state,
            self._machine,
            engine,
            child_env,
            self.wake,
            self.downloads,
            clock,
        )
        self.traffic = RouteReconciler(self.store, self.routes, self.gateway, clock)
        self.sources = SourceReconciler(self.store, self.secrets, state.git, environ, clock)
        self.hooks = Hooks(self._hook, self._hinted)
        self.sources.listens = self.hooks.problem
        passes = Passes(self.tracer, self.store.origin)
        self._controller: Controller[Key] = Controller(lambda key: passes.run(key, self._reconcile))
        self._work: asyncio.Task[None] | None = None
        self.finished = asyncio.Event()
        """Set when `down` has stopped everything and the process is to end."""
        self.is_down = state.down_marker.exists()
        self._down: asyncio.Task[None] | None = None
        self.down_failed: str | None = None
        self._rising = asyncio.Lock()
        self.cache_turn = asyncio.Lock()
        """Held from an apply's look at the hub until what it found is stored, and by a prune."""

    # ── life ──────────────────────────────────────────────────────────────────────────────────────────────

    async def open(self) -> None:
        """Adopt what runs, then begin to reconcile, unless the platform is down."""
        began = time.monotonic()
        await self.fleet.open()
        self._tell_of_adoption(time.monotonic() - began)
        if not self.is_down:
            await self._begin_work()

    def _tell_of_adoption(self, seconds: float) -> None:
        """Events: the last control plane ended without a word; what it left was found."""
        before = self.store.note(CONTROL_PLANE.kind)
        if before and not before["ended"]:
            text = (
                f"the control plane before this one (pid {before['pid']}) ended without a word: killed, or a crash"
            )
            self.store.add_event(CONTROL_PLANE, "Warning", "ControlPlaneLost", text)
        if found := self.fleet.observed():
            lives = {life: sum(seen.life is life for seen in found) for life in Life}
            text = f"{lives[Life.LIVE]} running, {lives[Life.GONE]} ended"
            silent = f", {lives[Life.UNKNOWN]} do not answer" if lives[Life.UNKNOWN] else ""
            text = f"pid {os.getpid()} found the processes of the one before it in {seconds:.2f} s: {text}{silent}"
            self.store.add_event(CONTROL_PLANE, "Normal", "Adopted", text)
        self.store.set_note(CONTROL_PLANE.kind, {"pid": os.getpid(), "ended": False})

    async def _begin_work(self) -> None:
        await self.routes.reconcile(self._table())
        self.refuse_while_going_down()  # it may have begun meanwhile
        stored_objects = self.store.objects()
        for stored in sorted(stored_objects, key=_rank):  # after a reboot all of them start at once
            if stored.key.kind == "model":
                self.models.refresh(stored.key)
            self._controller.add(stored.key)
        for orphan in self.fleet.observed():
            self._process_changed(orphan.name)
        self._controller.add(GATEWAY)
        self._controller.add(ROUTES)
        self._work = asyncio.create_task(self._controller.run(), name="controller")

    async def close(self) -> None:
        """Stop working. Router and engines go on."""
        await self.stop_working()
        await self.models.close()
        await self.fleet.close()
        try:
            if self.lease is None or not self.lease.lost:
                self.store.set_note(CONTROL_PLANE.kind, {"pid": os.getpid(), "ended": True})
        except (StoreUnavailable, Deposed) as error:
            log.warning("the next control plane will think that this one was lost: %s", error.message)
        self.store.close()

    async def stop_working(self) -> None:
        """Reconcile nothing any more; the API still answers."""
        if self._work is not None:
            self._work.cancel()
            await asyncio.gather(self._work, return_exceptions=True)
            self._work = None
        await self.hooks.close()
        await self.downloads.close()

    def begin_down(self, grace: float) -> None:
        """Start stopping everything; `finished` is set when nothing is left. While it is under way a second call
        changes nothing; after it failed (`ping` says so) a second call tries again. Until then nothing is
        reconciled: nobody asked for what would be started.
        """
        if self._down is None or (self._down.done() and not self.finished.is_set()):
            self.down_failed = None
            self.is_down = True
            _leave_marker(self.state.down_marker)
            self._down = asyncio.create_task(self._try_down(grace), name="down")

    async def _try_down(self, grace: float) -> None:
        try:
            left = await self._stop_everything(grace)
        except Exception as error:
            log.exception("down failed")
            self.down_failed = f"{type(error).__name__}: {error}"
            return
        if left:
            self.down_failed = "still alive: " + ", ".join(left)
            log.error("down failed: %s", self.down_failed)
            return
        self.finished.set()

    async def _stop_everything(self, grace: float) -> list[str]:
        """What still lives afterwards; nothing is removed before all is gone."""
        log.info("down: stopping everything, grace %.1f s", grace)
        await self.stop_working()
        if self.gateway.router_runs() is not False and not await self.routes.finish(grace):
            log.warning("the router does not answer: it ends within the grace of its configuration, or is killed")
        await self._stop_units([ROUTER_UNIT], grace + ROUTER_EXTRA)
        names = sorted({seen.name for seen in self.fleet.observed()} - {ROUTER_UNIT})
        await self._stop_units(names, min(grace, ENGINE_GRACE))
        left = [seen for seen in self.fleet.observed() if seen.life is not Life.GONE]
        if not left:
            try:
                for row in self.store.replicas():
                    self.store.delete_replica(row)
            except StoreUnavailable as error:  # the next one finds that they are gone
                log.warning("what ran is not forgotten: %s", error.message)
            await self.fleet.close()
            shutil.rmtree(self.state.runtime)
        return [f"{seen.name} (process {seen.child_pid or 'unknown'})" for seen in left]

    async def _stop_units(self, names: Sequence[str], grace: float) -> None:
        """Stop every living incarnation of these units and wait until they are gone, or should be."""
        for seen in self.fleet.observed():
            if seen.name in names and seen.life is not Life.GONE:
                try:
                    async with asyncio.timeout(STOP_SECONDS):
                        await self.fleet.stop(seen.folder, grace)
                except (OSError, TimeoutError) as error:
                    log.error("down: cannot reach the shim of %s: %r", seen.name, error)
        await self.fleet.gone(names, grace + STOP_SECONDS)

    async def rise(self) -> bool:
        """End a `down`: remove its marker and reconcile from now on; whether there was one."""
        async with self._rising:
            if not self.is_down:
                return False
            await self._begin_work()
            self.is_down = False
            self.state.down_marker.unlink(missing_ok=True)
        return True

    def refuse_when_down(self) -> None:
        """While something still ends it can be looked at; when nothing runs there is nothing to tell."""
        if self.is_down and self._down is None:
            raise ApiError(503, "down", DOWN, UP, exit_code=7)

    def refuse_while_going_down(self) -> None:
        """Raise `ApiError` while a `down` is under way, or after one that failed."""
        if self.down_failed is not None:
            raise ApiError(
                503, "going_down", f"a down did not succeed: {self.down_failed}", "platform down tries again", 7
            )
        if self._down is not None:
            raise ApiError(
                503, "going_down", "the control plane is going down", "try again in a moment", exit_code=7
            )

    # ── work ──────────────────────────────────────────────────────────────────────────────────────────────

    def inventory(self) -> Inventory:
        """What this machine has."""
        return self._machine()

    def refresh(self, key: Key) -> None:
        """The status of something that is stored already, as `note`."""
        try:
            if key.kind == "model":
                self.models.refresh(key)
            self.wake_routes()
        except (StoreUnavailable, Deposed) as error:
            log.warning("no status of %s yet: %s", key, error.message)

    def note(self, key: Key, reason: str, text: str, kind: str = "Normal") -> None:
        """An event of something that is stored already: a disk that is full by now, or another one that leads,
        does not undo it."""
        try:
            self.store.add_event(key, kind, reason, text)
        except (StoreUnavailable, Deposed) as error:
            log.warning("no event %s for %s: %s", reason, key, error.message)

    def hear_of_others(self) -> None:
        """Have everything reconciled soon if somebody else has written to the store."""
        if self._others_version != (now := self.store.others_version):
            self._others_version = now
            log.info("somebody else wrote to the store: everything is looked at again")
            for stored in self.store.objects():
                self._controller.add(stored.key)
            self._controller.add(ROUTES)

    def wake(self, key: Key) -> None:
        """Have this key reconciled soon."""
        self._controller.add(key)

    def wake_sources(self) -> None:
        """Have every git source look at its objects soon: one of them may have been changed."""
        for key in self.sources.objects():
            self._controller.add(key)

    def _hook(self, name: str, port: int) -> Hook | None:
        """What the source of that name takes notifications by on that port."""
        declared = self.sources.webhooks().get(name)
        if declared is None or declared["port"] != port:
            return None
        try:
            return Hook(declared["provider"], self.secrets.value(declared))
        except SecretNotFound:  # its status says so
            return None

    def _hinted(self, name: str) -> None:
        if self.sources.hint(name):
            self._controller.add(Key(SOURCE, name))

    def wake_routes(self) -> None:
        """Have every Route reconciled soon: a Model that it names, or one of its names, may be another's now."""
        for stored in self.store.objects("route"):
            self._controller.add(stored.key)

    def _process_changed(self, name: str) -> None:
        if name == ROUTER_UNIT:
            self._controller.add(GATEWAY)
            self._controller.add(ROUTES)
            self._all_objects()  # a replica may wait for a router that finishes beside this one
            return
        models = {str(seen.labels["model"]) for seen in self.fleet.observed(name) if "model" in seen.labels}
        for model in models:
            self._controller.add(Key("model", model))
        self._controller.add(ROUTES)

    async def _reconcile(self, key: Key) -> float | None:
        if key == ROUTES:
            return await self._reconcile_routes()
        if key.kind == "gateway":
            failure = self.gateway.failure()
            again = await self.gateway.reconcile()
            if self.gateway.failure() != failure:
                self._all_objects()
                self._controller.add(ROUTES)
            elif not self.routes.takes("http", self.gateway.http_settings()):
                self._controller.add(ROUTES)
            return again
        if key.kind == POLICY:
            if not self.policies.are_acknowledged():
                self._controller.add(ROUTES)
            again = await self.policies.reconcile(key)
            self._controller.add(GATEWAY)
            return again
        if key.kind == "route":
            return self.traffic.reconcile(key)
        if key.kind == SOURCE:
            await self.hooks.settle({hook["port"] for hook in self.sources.webhooks().values()})
            return await self.sources.reconcile(key)
        hindrance = self.traffic.hindrance(key)
        again = await self.models.reconcile(key)
        if again == 0.0:
            self._controller.add(ROUTES)
        if self.traffic.hindrance(key) != hindrance:
            self.wake_routes()
        return again

    async def _reconcile_routes(self) -> float | None:
        if self.gateway.router_runs() is False:
            return None  # a change of its shim brings this key back
        table = self._table()
        took, told = self.policies.are_acknowledged(), self.routes.low_budgets()
        if await self.routes.reconcile(table):
            self._all_objects()
            self._controller.add(GATEWAY)
            took = False
        if not took or self.routes.low_budgets() != told:  # what is told of them may be otherwise now
            for policy in self.policies.names():
                self._controller.add(policy)
        demand, trials = self.models.demand, self.models.trials
        settled = (demand.settle_residency(), demand.settle_scaling(), trials.settle())
        looks = [look for look in settled if look]
        busy = self.routes.knowledge() is not Router.KNOWN or self.models.awaits_router()
        return BUSY_POLL if busy else min(looks, default=IDLE_POLL)

    def _table(self) -> wire.RoutingTable:
        """What the router is to act by; not numbered."""
        models, http = build(self.models.routables()), self.gateway.http_settings()
        return self.traffic.fill(models, http, self.policies.table(), self.policies.budgets())

    def _all_objects(self) -> None:
        """What the router says, or that it is silent, may change the status of each."""
        for stored in self.store.objects("model"):
            self._controller.add(stored.key)
        self.wake_routes()


def _rank(stored: StoredObject) -> int:
    """Whose turn it is first: that of models of high priority."""
    return -priority_of(stored.resolved) if stored.key.kind == "model" else 0


def _leave_marker(path: Path) -> None:
    """A `down` goes on without its marker: on a disk that is full it must be possible to stop things."""
    try:
        path.touch(mode=0o600)
        sync_folder(path.parent)
    except OSError as error:
        log.error("cannot leave %s, so the next command will start everything again: %s", path, error)
