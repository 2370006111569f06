"""The control plane's working parts, put together: what the admin API calls and what the work queue runs.

Order at a start: open the store, find every process there is (adoption: no signal is sent), report what was
seen, and only then reconcile, so that nothing is started beside something that still runs. Order at an end by
signal: stop reconciling, close; processes go on. Order of `down`: leave the marker, stop reconciling, the router
first (it stops accepting and lets running requests finish within the grace), then the engines, then the folder of
sockets.

The marker in the state directory outlasts the processes: until an `apply` or `up` removes it a control plane
adopts what there is, answers a `plan`, deletes, and starts nothing. That somebody looks is no wish to have it all
back.

Exceptions:

    ApiError               an answer other than 2xx: status, code, message, hint, exit code of the command
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import msgspec

from quire.client import DOWN, UP
from quire.controlplane.errors import ApiError
from quire.router.config import RouterConfig
from quire.text import Tokenizer
from quire.tracing import Declared, Tracing
from quire_operators import admission, devices, status
from quire_operators.clock import on_the_wall
from quire_operators.controller import Controller
from quire_operators.devices import Inventory, InventoryError
from quire_operators.downloads import Downloads
from quire_operators.fleet.local import Life, LocalFleet
from quire_operators.gateway import KEY as GATEWAY
from quire_operators.gateway import UNIT as ROUTER_UNIT
from quire_operators.gateway import GatewayReconciler, RouterCommand, resolved_spec
from quire_operators.models import ROUTES, ModelReconciler, needs_of
from quire_operators.paths import StateDir
from quire_operators.placement import Placement
from quire_operators.rollout import Router
from quire_operators.routes import Routes, build
from quire_operators.secrets import SecretNotFound, Secrets
from quire_operators.sources import SourceError, Sources
from quire_operators.store import Conflict, NotFound, Store, StoredObject, StoreUnavailable
from quire_operators.tracing import Passes
from quire_schemas import manifest
from quire_schemas.manifest import Problem
from quire_schemas.model import SECRET_NAME, Model
from quire_schemas.resource import NAME_PATTERN, Key

log = logging.getLogger(__name__)

BUSY_POLL = 0.1
"""Seconds between two looks at the router while a replica starts, drains or waits for an acknowledgement."""
IDLE_POLL = 1.0
DETECT_SECONDS = 1.0
ENGINE_GRACE = 10.0
ROUTER_EXTRA = 5.0
"""How much longer than its grace the router has to end by itself before its shim kills it."""
MOVED_SECONDS = 15.0
"""How long a plan waits for the hub to say where branches are now."""
STOP_SECONDS = 10.0
"""How long a shim may take to hear of a stop, and then to end after the grace."""
OTHER_PORT = (
    "platform apply manifests/gateway.yaml, a Gateway named default with port 0 for any free one; "
    "or set its spec.port to one that is free"
)
CONTROL_PLANE = Key("controlplane", "default")
"""What events of the control plane itself are told of; no object."""
HUB_TOKENS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
_NAME = re.compile(NAME_PATTERN)
MAX_LOG = 4 * 1024 * 1024
"""Bytes of one log in one answer."""


def invalid(problems: Sequence[Problem]) -> ApiError:
    """Manifests with problems: 422, with each problem's place."""
    number = len(problems)
    return ApiError(
        422,
        "invalid_manifest",
        f"{number} error{'' if number == 1 else 's'}",
        exit_code=3,
        problems=[problem.as_dict() for problem in problems],
    )


def engine_argv(spec: Path) -> list[str]:
    """How an engine is started."""
    return [sys.executable, "-P", "-m", "quire_engine", str(spec), "--status-fd", "{status_fd}"]


def router_command(state: StateDir) -> RouterCommand:
    """How the router of this state directory is started."""

    def config(spec: Mapping[str, Any]) -> bytes:
        host, port, telemetry = spec["bind"], spec["port"], spec.get("telemetry")
        names = ("localhost", "127.0.0.1", "[::1]", f"[{host}]" if ":" in host else host)
        return msgspec.json.encode(
            RouterConfig(
                control_socket=str(state.router_control),
                snapshot_file=str(state.router_snapshot),
                host=host,
                port=port,
                allowed_hosts=tuple(dict.fromkeys(names)),
                telemetry=Declared(telemetry["otlpEndpoint"], telemetry["sampling"]) if telemetry else None,
            )
        )

    def argv(path: Path) -> list[str]:
        return [sys.executable, "-P", "-m", "quire.router", str(path), "--status-fd", "{status_fd}"]

    return RouterCommand(argv, config)


def text_problem(folder: Path, template: Path | None) -> str | None:
    """Why the router could not load the tokenizer in `folder`, or this template for it; None when it could."""
    loaded = Tokenizer.attempt(folder, template)
    if isinstance(loaded, Tokenizer):
        return None
    cause = str(loaded.__cause__ or "").splitlines()
    return f"{loaded} ({cause[0][:200]})" if cause else str(loaded)


class _Machine:
    """`devices.detect`, asked at most once a second: NVML takes its time."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._at = float("-inf")
        self._inventory: Inventory | None = None

    def __call__(self) -> Inventory:
        now = self._clock()
        if self._inventory is None or now - self._at > DETECT_SECONDS:
            self._inventory, self._at = devices.detect(), now
        return self._inventory


class ControlPlane:
    """One control plane of one state directory. `open` before anything else; `close` or `down` at the end."""

    def __init__(
        self,
        state: StateDir,
        builtin: Mapping[str, Path],
        *,
        engine: Callable[[Path], Sequence[str]] = engine_argv,
        router: RouterCommand | None = None,
        environ: Mapping[str, str] = os.environ,
        tracing: Tracing | None = None,
    ) -> None:
        self.state = state
        self.tracer = tracing.tracer("quire.controlplane") if tracing is not None else None
        self.version = version("quire")
        self.started_at = time.time()
        self.store = Store(state.store)
        self._machine = _Machine(time.monotonic)
        sources = Sources.of_environment(builtin, state.sources, environ)
        self.admission = admission.Admission(self.store, sources, self._machine, text_problem)
        self.secrets = Secrets(state.secrets, environ)
        self.downloads = Downloads(sources.cache, self.secrets, environ, self._key_changed, self.store.clock)
        self._offline = environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
        roots = (state.replicas, state.gateway)
        clock = self.store.clock
        self.fleet = LocalFleet(roots, self.store.install_id, self._process_changed, clock)
        # Engines and router read local files only, and have no use for the hub's token.
        child_env = {name: value for name, value in environ.items() if name not in HUB_TOKENS}
        child_env["HF_HUB_OFFLINE"] = "1"
        command = router or router_command(state)
        self.gateway = GatewayReconciler(self.store, self.fleet, state, command, child_env, clock)
        self.routes = Routes(state.router_control, self.store, self.gateway.router_runs, clock)
        self.gateway.routes = self.routes
        self.models = ModelReconciler(
            self.store,
            self.fleet,
            self.routes,
            self.gateway,
            state,
            self._machine,
            engine,
            child_env,
            self._key_changed,
            self.downloads,
            clock,
        )
        passes = Passes(self.tracer, self.store.origin)
        self._controller: Controller[Key] = Controller(lambda key: passes.run(key, self._reconcile))
        self._work: asyncio.Task[None] | None = None
        self.finished = asyncio.Event()
        """Set when `down` has stopped everything and the process is to end."""
        self._is_down = state.down_marker.exists()
        self._down: asyncio.Task[None] | None = None
        self._down_failed: str | None = None
        self._rising = asyncio.Lock()
        self._cache_turn = asyncio.Lock()
        """Held from an apply's look at the hub until what it found is stored, and by a prune."""

    # ── life ──────────────────────────────────────────────────────────────────────────────────────────────

    async def open(self) -> None:
        """Adopt what runs, then begin to reconcile, unless the platform is down."""
        began = time.monotonic()
        await self.fleet.open()
        self._tell_of_adoption(time.monotonic() - began)
        if not self._is_down:
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
        await self.routes.reconcile(build(self.models.routables()))
        self._refuse_while_going_down()  # it may have begun meanwhile
        for stored in self.store.objects():
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
            self.store.set_note(CONTROL_PLANE.kind, {"pid": os.getpid(), "ended": True})
        except StoreUnavailable as error:
            log.warning("the next control plane will think that this one was lost: %s", error.message)
        self.store.close()

    async def stop_working(self) -> None:
        """Reconcile nothing any more; the API still answers."""
        if self._work is not None:
            self._work.cancel()
            await asyncio.gather(self._work, return_exceptions=True)
            self._work = None
        await self.downloads.close()

    def begin_down(self, grace: float) -> None:
        """Start stopping everything; `finished` is set when nothing is left. While it is under way a second call
        changes nothing; after it failed (`ping` says so) a second call tries again. Until then nothing is
        reconciled: nobody asked for what would be started.
        """
        if self._down is None or (self._down.done() and not self.finished.is_set()):
            self._down_failed = None
            self._is_down = True
            _leave_marker(self.state.down_marker)
            self._down = asyncio.create_task(self._try_down(grace), name="down")

    async def _try_down(self, grace: float) -> None:
        try:
            left = await self._stop_everything(grace)
        except Exception as error:
            log.exception("down failed")
            self._down_failed = f"{type(error).__name__}: {error}"
            return
        if left:
            self._down_failed = "still alive: " + ", ".join(left)
            log.error("down failed: %s", self._down_failed)
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
                    self.store.delete_replica(row.id)
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

    # ── work ──────────────────────────────────────────────────────────────────────────────────────────────

    def _key_changed(self, key: Key) -> None:
        self._controller.add(key)

    def _process_changed(self, name: str) -> None:
        if name == ROUTER_UNIT:
            self._controller.add(GATEWAY)
            self._controller.add(ROUTES)
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
                self._all_models()
                self._controller.add(ROUTES)
            return again
        again = await self.models.reconcile(key)
        if again == 0.0:
            self._controller.add(ROUTES)
        return again

    async def _reconcile_routes(self) -> float | None:
        if self.gateway.router_runs() is False:
            return None  # a change of its shim brings this key back
        if await self.routes.reconcile(build(self.models.routables())):
            self._all_models()
            self._controller.add(GATEWAY)
        busy = self.routes.knowledge() is not Router.KNOWN or self.models.awaits_router()
        return BUSY_POLL if busy else IDLE_POLL

    def _all_models(self) -> None:
        for stored in self.store.objects("model"):
            self._controller.add(stored.key)

    # ── what the API asks ─────────────────────────────────────────────────────────────────────────────────

    def ping(self) -> dict[str, Any]:
        runner = self.gateway.current()
        return {
            "version": self.version,
            "pid": os.getpid(),
            "startedAt": status.timestamp(self.started_at),
            "stateDir": str(self.state.root),
            "installId": self.store.install_id,
            "router": {
                "baseUrl": f"{self.gateway.base_url()}/v1",
                "ready": self.gateway.ready(),
                "pid": runner.child_pid if runner is not None else None,
            },
            "down": self._is_down,
            "downFailed": self._down_failed,
        }

    async def plan(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """What applying these files would do, on this machine or on a declared one. Writes nothing."""
        loaded = _load(body)
        declared = body.get("devices")
        configs = body.get("configs") or {}
        if not isinstance(configs, dict) or not all(isinstance(value, dict) for value in configs.values()):
            raise ApiError(400, "bad_request", "configs maps a model's name or source to its config.json")
        try:
            inventory = devices.declared(declared) if declared is not None else None
        except InventoryError as error:
            raise ApiError(422, "bad_inventory", error.message, error.hint, exit_code=3) from error
        unfound = await self._look(self.admission.asks(loaded.resources, configs))
        reviews = self.admission.review(loaded.resources, inventory, configs, unfound)
        if inventory is None:
            self._foresee_address(reviews)
        await self._note_moved(reviews)
        return admission.report(reviews)

    async def _look(self, asks: Sequence[admission.Ask]) -> dict[admission.Ask, SourceError]:
        """Ask the hub about what the cache does not know; what it refused, and why."""
        if self._offline:
            return {}
        answers = await asyncio.gather(
            *(
                self.downloads.look(ask.repository, ask.revision, ask.part, dict(ask.auth) if ask.auth else None)
                for ask in asks
            )
        )
        return {ask: answer for ask, answer in zip(asks, answers, strict=True) if answer is not None}

    async def _note_moved(self, reviews: Sequence[admission.Review]) -> None:
        """Say of models that stay at a commit where their branch is on the hub now."""
        pinned = self.admission.pinned([review.located for review in reviews])
        if self._offline:
            return
        questions = {
            asyncio.create_task(
                self.downloads.moved_to(ask.repository, ask.revision, dict(ask.auth) if ask.auth else None)
            ): (review, ask, review.old.resolved["revision"])
            for review in reviews
            if (ask := pinned.get(review.key)) is not None and review.old is not None
        }
        if questions:
            _, late = await asyncio.wait(questions, timeout=MOVED_SECONDS)
            for question in late:
                question.cancel()
            await asyncio.gather(*late, return_exceptions=True)
        for question, (review, ask, stays) in questions.items():
            now = None if question.cancelled() else question.result()
            if now is None:
                review.notes.append(f"the hub does not say where {ask.revision} of hf://{ask.repository} is now")
            elif now != stays:
                review.notes.append(
                    f"{ask.revision} of hf://{ask.repository} is at {now} on the hub by now; this model stays at "
                    f"{stays[:12]} until spec.revision names another"
                )

    def _foresee_address(self, reviews: Sequence[admission.Review]) -> None:
        """Say in a plan what `_check_address` would say to an apply."""
        own = next((review for review in reviews if review.key == GATEWAY), None)
        models = [review for review in reviews if isinstance(review.located.resource, Model)]
        if own is not None and own.refusal is not None:
            return
        problem = self.gateway.conflict(
            own.resolved if own is not None else resolved_spec(self.store.get(GATEWAY))
        )
        if problem is None:
            return
        if own is not None:
            own.action = "refused"
            own.refusal = admission.Refusal("spec.port", "AddressInUse", problem, "choose another, or 0 for any")
        elif models:
            models[0].warnings.append(f"the router cannot listen: {problem}; apply would be refused")

    async def up(self) -> dict[str, Any]:
        """Start again what was applied before a `down`. What is not down stays as it is."""
        self._refuse_while_going_down()
        rose = await self._rise()
        return {
            "results": [
                {
                    "key": str(stored.key),
                    "result": "starting" if rose else "unchanged",
                    "generation": stored.generation,
                    "revision": stored.revision,
                }
                for stored in self.store.objects()
            ]
        }

    async def _rise(self) -> bool:
        """End a `down`: remove its marker and reconcile from now on; whether there was one."""
        async with self._rising:
            if not self._is_down:
                return False
            await self._begin_work()
            self._is_down = False
            self.state.down_marker.unlink(missing_ok=True)
        return True

    async def apply(self, body: Mapping[str, Any], traceparent: str | None = None) -> dict[str, Any]:
        """Store these files' resources, all or none, and set the reconcilers to work. Ends a `down`.

        `traceparent` is remembered with the objects as the origin of their new generation.
        """
        self._refuse_while_going_down()
        loaded = _load(body)
        async with self._cache_turn:
            unfound = await self._look(self.admission.asks(loaded.resources))
            self._refuse_while_going_down()  # it may have begun meanwhile
            reviews = self.admission.review(loaded.resources, unfound=unfound)
            if found := admission.problems(reviews):
                raise invalid(found)
            self._check_address(reviews)
            try:
                applied = self.store.apply(self.admission.changes(reviews), traceparent)
            except Conflict as conflict:
                raise ApiError(409, "conflict", conflict.message, conflict.hint, exit_code=5) from conflict
        for item in applied:
            self._controller.add(item.key)
        self._controller.add(GATEWAY)
        for item in applied:
            if item.result != "unchanged":
                self._refresh(item.key)
                text = f"generation {item.generation}" + (f", revision {item.revision}" if item.revision else "")
                self._note(item.key, item.result.capitalize(), text)
        await self._rise()
        return {
            "results": [
                {
                    "key": str(item.key),
                    "result": item.result,
                    "generation": item.generation,
                    "revision": item.revision,
                }
                for item in applied
            ]
        }

    def _refresh(self, key: Key) -> None:
        """The status of something that is stored already, as `_note`."""
        try:
            if key.kind == "model":
                self.models.refresh(key)
        except StoreUnavailable as error:
            log.warning("no status of %s yet: %s", key, error.message)

    def _note(self, key: Key, reason: str, text: str) -> None:
        """An event of something that is stored already: a disk that is full by now does not undo it."""
        try:
            self.store.add_event(key, "Normal", reason, text)
        except StoreUnavailable as error:
            log.warning("no event %s for %s: %s", reason, key, error.message)

    def _refuse_when_down(self) -> None:
        """While something still ends it can be looked at; when nothing runs there is nothing to tell."""
        if self._is_down and self._down is None:
            raise ApiError(503, "down", DOWN, UP, exit_code=7)

    def _refuse_while_going_down(self) -> None:
        if self._down_failed is not None:
            raise ApiError(
                503, "going_down", f"a down did not succeed: {self._down_failed}", "platform down tries again", 7
            )
        if self._down is not None:
            raise ApiError(
                503, "going_down", "the control plane is going down", "try again in a moment", exit_code=7
            )

    def _check_address(self, reviews: Sequence[admission.Review]) -> None:
        """Refuse an apply whose router could not listen, while a person is there to read it."""
        own = next((review for review in reviews if review.key == GATEWAY), None)
        needed = own is not None or any(isinstance(review.located.resource, Model) for review in reviews)
        if not needed:
            return
        spec = own.resolved if own is not None else resolved_spec(self.store.get(GATEWAY))
        problem = self.gateway.conflict(spec)
        if problem is None:
            return
        place = ""
        if own is not None:
            at = own.located.problem("spec.port", "", "")
            place = f"{at.file}:{at.line}:{at.col}: {at.path}: "
        raise _address_in_use(f"{place}the router cannot listen: {problem}", OTHER_PORT)

    def objects(self, kind: str | None) -> dict[str, Any]:
        self._refuse_when_down()
        items = [self._view(stored) for stored in self.store.objects(kind)]
        if kind == GATEWAY.kind and not items:
            items = [self._default_gateway()]
        return {"items": items}

    def object(self, key: Key) -> dict[str, Any]:
        stored = self.store.get(key)
        if stored is not None or key == GATEWAY:
            self._refuse_when_down()
        if stored is None and key == GATEWAY:
            return self._default_gateway()
        if stored is None:
            raise _not_found(key)
        return self._view(stored)

    def delete(self, key: Key, traceparent: str | None = None) -> dict[str, Any]:
        """Begin a deletion; the object stays until nothing of it runs."""
        self._refuse_while_going_down()
        if key == GATEWAY and (problem := self._no_way_back()) is not None:
            raise _address_in_use(
                f"without it the router would move to its default address, where it cannot listen: {problem}",
                "keep it, or stop the program that holds the address first; nothing was changed",
            )
        try:
            stored = self.store.mark_deleting(key, traceparent)
        except NotFound as error:
            raise _not_found(key) from error
        view = self._view(stored)
        self._note(key, "Deleting", f"generation {stored.generation}")
        if self._is_down and all(seen.life is Life.GONE for seen in self.fleet.observed()):
            self._note(key, "Deleted", "nothing of it ran: the platform is down")
            for row in self.store.replicas(key.name) if key.kind == "model" else ():
                self.store.delete_replica(row.id)
            self.store.remove(key)
        self._controller.add(key)
        self._controller.add(ROUTES)
        return view

    def _no_way_back(self) -> str | None:
        """Why the router could not listen where it does without a manifest; None when it could, or need not."""
        stored = self.store.get(GATEWAY)
        if stored is None or stored.deletion_time is not None:
            return None
        if self.gateway.current() is None and not self.store.objects("model"):
            return None
        return self.gateway.conflict(resolved_spec(None))

    def _default_gateway(self) -> dict[str, Any]:
        """The gateway that there is without a manifest: generation 0, never created."""
        report = self.gateway.status((), 0)
        self._tell_unavailable(report)
        return {
            "kind": GATEWAY.kind,
            "name": GATEWAY.name,
            "generation": 0,
            "intent": {},
            "resolved": resolved_spec(None),
            "createdAt": None,
            "deleting": False,
            "status": report,
            "replicas": [],
            "revisions": [],
        }

    # ── cache and secrets ─────────────────────────────────────────────────────────────────────────────────

    def _cache_users(self) -> tuple[dict[tuple[str, str], list[str]], dict[tuple[str, str], list[str]]]:
        """(repository, commit) -> the models that use it now, and those that only had it in an older revision."""
        now: dict[tuple[str, str], list[str]] = {}
        before: dict[tuple[str, str], list[str]] = {}
        for stored in self.store.objects("model"):
            rows = {row.revision for row in self.store.replicas(stored.key.name)}
            for revision in self.store.revisions(stored.uid):
                used = revision.n == stored.revision or revision.n in rows
                for need in needs_of(revision.resolved, Placement.from_dict(revision.placement)):
                    users = (now if used else before).setdefault((need.repository, need.commit), [])
                    if str(stored.key) not in users:
                        users.append(str(stored.key))
        return now, before

    async def cache(self) -> dict[str, Any]:
        """What lies in the cache, who uses it, and what `prune` would free."""
        cache = self.downloads.cache
        now, before = self._cache_users()
        entries = await asyncio.to_thread(cache.usage)
        items = []
        for entry in entries:
            key = (entry.repository, entry.commit)
            items.append(
                {
                    "source": f"hf://{entry.repository}",
                    "commit": entry.commit,
                    "refs": list(entry.refs),
                    "bytes": entry.size,
                    "incompleteBytes": entry.incomplete,
                    "prunableBytes": 0 if key in now else entry.ours + entry.incomplete,
                    "downloadedByQuire": entry.ours + entry.incomplete > 0,
                    "usedBy": now.get(key, []),
                    "formerlyUsedBy": [name for name in before.get(key, []) if name not in now.get(key, [])],
                    "lastUsed": None if entry.last_used is None else status.timestamp(entry.last_used),
                }
            )
        return {"folder": str(cache.root), "free": cache.free(), "items": items}

    async def prune(self, *, dry_run: bool) -> dict[str, Any]:
        """Remove what Quire downloaded and no declared model uses."""
        cache = self.downloads.cache
        removed = []
        async with self._cache_turn:
            used, _ = self._cache_users()
            for entry in await asyncio.to_thread(cache.usage):
                if (entry.repository, entry.commit) in used or not entry.ours + entry.incomplete:
                    continue
                freed = await asyncio.to_thread(cache.prune, entry.repository, entry.commit, dry_run=dry_run)
                removed.append({"source": f"hf://{entry.repository}", "commit": entry.commit, "bytes": freed})
        return {"folder": str(cache.root), "dryRun": dry_run, "items": removed}

    def list_secrets(self) -> dict[str, Any]:
        """Names, and which models refer to them; never a value."""
        users: dict[str, list[str]] = {}
        for stored in self.store.objects("model"):
            name = (stored.resolved.get("sourceAuth") or {}).get("secretRef")
            if name is not None:
                users.setdefault(name, []).append(str(stored.key))
        names = sorted({*self.secrets.names(), *users})
        kept = set(self.secrets.names())
        return {"items": [{"name": n, "set": n in kept, "usedBy": users.get(n, [])} for n in names]}

    def set_secret(self, name: str, value: Any) -> dict[str, Any]:
        if not isinstance(value, str) or not value.strip() or "\n" in value.strip():
            raise ApiError(400, "bad_request", "a secret is one line of text", exit_code=2)
        if not (value.strip().isascii() and value.strip().isprintable()):
            raise ApiError(400, "bad_request", "a secret is of letters, digits and signs of ASCII", exit_code=2)
        try:
            self.secrets.put(name, value.strip())
        except OSError as error:
            raise ApiError(
                507,
                "store_unavailable",
                f"the secret cannot be kept: {error.strerror}",
                "platform doctor",
                exit_code=7,
            ) from error
        except SecretNotFound as error:
            raise ApiError(400, "bad_request", error.message, error.hint, exit_code=2) from error
        self.downloads.look_again()
        return {"name": name}

    def remove_secret(self, name: str) -> dict[str, Any]:
        if not re.fullmatch(SECRET_NAME, name) or not self.secrets.remove(name):
            raise ApiError(404, "not_found", f"there is no secret {name}", "platform secret list", exit_code=8)
        return {"name": name}

    def _tell_unavailable(self, report: dict[str, Any]) -> None:
        """Say in a status why its endpoints cannot be reached now, whatever was true when it was written."""
        why = self.gateway.unavailable()
        if why is not None and "endpoints" in report:
            report["endpoints"] = {**report["endpoints"], "unavailable": why}

    def _view(self, stored: StoredObject) -> dict[str, Any]:
        report = self.store.status(stored.uid)
        self._tell_unavailable(report)
        replicas = report.pop("replicaList", [])
        for name in ("signature", "progressAt"):
            report.pop(name, None)
        return {
            "kind": stored.key.kind,
            "name": stored.key.name,
            "generation": stored.generation,
            "intent": stored.intent,
            "resolved": stored.resolved,
            "createdAt": self._shown(stored.created_at),
            "deleting": stored.deletion_time is not None,
            "status": report,
            "replicas": [{**item, "since": self._shown(item["since"])} for item in replicas],
            "revisions": self._revisions(stored),
        }

    def _shown(self, at: float) -> str:
        """A time of the store for people."""
        return status.timestamp(on_the_wall(at, self.store.clock))

    def _revisions(self, stored: StoredObject) -> list[dict[str, Any]]:
        alive = {row.revision for row in self.store.replicas(stored.key.name)}
        return [
            {
                "revision": revision.n,
                "templateHash": revision.template_hash,
                "state": "Current"
                if revision.n == stored.revision
                else "Leaving"
                if revision.n in alive
                else "Old",
                "cause": revision.cause,
                "createdAt": self._shown(revision.created_at),
                "loadSeconds": revision.load_seconds,
            }
            for revision in self.store.revisions(stored.uid)
        ]

    def events(self, key: Key | None, after: int) -> dict[str, Any]:
        self._refuse_when_down()
        return {
            "items": [
                {
                    "id": event.id,
                    "type": event.type,
                    "reason": event.reason,
                    "object": event.object,
                    "message": event.message,
                    "count": event.count,
                    "firstSeen": self._shown(event.first_seen),
                    "lastSeen": self._shown(event.last_seen),
                }
                for event in self.store.events(key, after)
            ]
        }

    def logs(self, name: str, replica: str | None, tail: int, offset: int | None) -> dict[str, Any]:
        """Text of logs: the last `tail` lines, or everything from byte `offset` on."""
        self._refuse_when_down()
        if name in ("controlplane", "router"):
            files = [(name, self.state.log(name))]
        else:
            key = parse_key(name)
            folder = self.state.logs / "replicas" / key.name
            if key.kind != "model" or (self.store.get(key) is None and not folder.is_dir()):
                raise _not_found(key)
            files = [(path.stem, path) for path in sorted(folder.glob("*.log"))]
            if replica is not None:
                files = [(stem, path) for stem, path in files if stem == replica]
        return {"sources": [_read_log(source, path, tail, offset) for source, path in files if path.is_file()]}


def _read_log(name: str, path: Path, tail: int, offset: int | None) -> dict[str, Any]:
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        begin = max(size - MAX_LOG, 0) if offset is None or offset > size else offset
        file.seek(begin)
        data = file.read(MAX_LOG)
    end = begin + len(data)
    text = data.decode(errors="replace")
    if offset is None:
        text = "".join(text.splitlines(keepends=True)[-tail:]) if tail > 0 else ""
    return {"name": name, "path": str(path), "text": text, "offset": end}


def _leave_marker(path: Path) -> None:
    """A `down` goes on without its marker: on a disk that is full it must be possible to stop things."""
    try:
        path.touch(mode=0o600)
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        log.error("cannot leave %s, so the next command will start everything again: %s", path, error)


def _load(body: Mapping[str, Any]) -> manifest.Manifest:
    """The resources of a request's files. Raises `ApiError` for a wrong request or problems in the files."""
    files = body.get("files")
    if not isinstance(files, list) or not all(
        isinstance(item, dict) and isinstance(item.get("name"), str) and isinstance(item.get("text"), str)
        for item in files
    ):
        raise ApiError(400, "bad_request", 'files is a list of {"name", "text"}')
    loaded = manifest.load([(item["name"], item["text"]) for item in files])
    if loaded.problems:
        raise invalid(loaded.problems)
    return loaded


def parse_key(text: str) -> Key:
    """`model/quickstart` as a key whose name an object could have: names become parts of paths here."""
    hint = "write it as kind/name, for example model/quickstart"
    try:
        key = Key.parse(text)
    except ValueError as error:
        raise ApiError(400, "bad_request", str(error), hint, exit_code=2) from error
    if not _NAME.fullmatch(key.name):
        raise ApiError(400, "bad_request", f"{key.name!r} is not the name of an object", hint, exit_code=2)
    return key


def _address_in_use(message: str, hint: str) -> ApiError:
    return ApiError(409, "address_in_use", message, hint, exit_code=6)


def _not_found(key: Key) -> ApiError:
    return ApiError(404, "not_found", f"there is no {key}", "platform get shows what there is", exit_code=8)
