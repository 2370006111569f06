"""Brings each model's processes to what was asked for: observe, plan (pure), execute step by step, report.

Every pass reads all it needs anew: the object and its rows from the store, its processes from the fleet, what
the router acknowledged from `Routes`. It takes the first steps of the plan, each written to the store before
its side effect, reports the status, and asks to be run again. A pass that is cut off anywhere leaves a row that
names what was about to be done; the next pass, of this control plane or of the next, observes what came of it.
"""

from __future__ import annotations

import logging
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import msgspec

from quire_operators import rollout
from quire_operators.cache import Need
from quire_operators.database import Conflict
from quire_operators.demand import Demand
from quire_operators.desired import (
    Canary,
    Effective,
    as_canary,
    desired_of,
    effective,
    priority_of,
)
from quire_operators.devices import Inventory
from quire_operators.downloads import Downloads, Progress
from quire_operators.fleet.heartbeat import Heartbeats
from quire_operators.fleet.local import LocalFleet, StartFailed, Unit
from quire_operators.gateway import GatewayReconciler
from quire_operators.ledger import Ledger, Waiter
from quire_operators.model_status import ModelStatus, Tried, View
from quire_operators.observed import report_of, seen_of
from quire_operators.overrides import Kind, Override, in_force
from quire_operators.paths import StateDir
from quire_operators.placement import Placement
from quire_operators.records import StoredObject
from quire_operators.rollout import Cause, Goal, Orphan, Process, Row, Seen, World
from quire_operators.routables import Standing, canary_name, routables
from quire_operators.routes import ROUTES, Routable, Routes
from quire_operators.secrets import without_tokens
from quire_operators.store import Store
from quire_operators.tracing import acted
from quire_operators.trials import Trials
from quire_operators.turns import Neighbour, Turns
from quire_schemas import wire
from quire_schemas.model import prefill_share
from quire_schemas.resource import Key
from quire_schemas.update import hot_hash

log = logging.getLogger(__name__)

ROOM_POLL = 2.0
"""Seconds between two looks at whether a GPU has room that it had not."""
TURN_POLL = 1.0
"""Seconds between two looks at whether a device is free for the next start."""
STOP_GRACE = 10.0
"""Seconds an engine has to end by itself after SIGTERM; it was drained before."""
HOPELESS_STOPS = frozenset({rollout.STALLED, rollout.STARTUP_TIMEOUT})
"""Stops of engines that would not hear a SIGTERM either."""


class ModelReconciler:
    """One pass over one model. `clock` gives unix seconds and never jumps; `changed` is told keys that may need a
    pass."""

    def __init__(
        self,
        store: Store,
        fleet: LocalFleet,
        routes: Routes,
        gateway: GatewayReconciler,
        state: StateDir,
        detect: Callable[[], Inventory],
        engine_argv: Callable[[Path], Sequence[str]],
        environ: Mapping[str, str],
        changed: Callable[[Key], None],
        downloads: Downloads,
        clock: Callable[[], float],
        rng: random.Random | None = None,
    ) -> None:
        self._store = store
        self._downloads = downloads
        self._fleet = fleet
        self._routes = routes
        self._gateway = gateway
        self._state = state
        self._detect = detect
        self._engine_argv = engine_argv
        self._environ = environ
        self._changed = changed
        self._clock = clock
        self._rng = rng or random.Random()  # noqa: S311 - jitter, not a secret
        self._orphans_since: dict[tuple[str, int, str], float] = {}
        self._not_started: dict[str, rollout.Exit] = {}
        self._hot_hashes: dict[tuple[str, str], str] = {}
        """By model and template: the hot settings that its engines were last meant to run."""
        self._progress: dict[str, tuple[tuple[str, int], float]] = {}
        """By nonce of an engine that has a row: how far it last said it was, and when that was new."""
        self._status = ModelStatus(store, fleet, gateway, downloads.cache, detect, clock, lambda: changed(ROUTES))
        self.trials = Trials(store, routes, self.effective, self.serving, self._roll_back, self._told, clock)
        self._ledger = Ledger(store, fleet, detect)
        self.demand = Demand(
            store, routes, self._ledger, detect, self.effective,
            lambda wanted: self._fetching(wanted) is not None, changed, clock,
        )  # fmt: skip
        self._turns = Turns()
        self._heartbeats = Heartbeats(lambda model: changed(Key("model", model)), clock)

    async def close(self) -> None:
        """Let go of the engines. They go on."""
        await self._heartbeats.close()

    # ── observe ───────────────────────────────────────────────────────────────────────────────────────────

    def socket_of(self, row: Row) -> str:
        return str(self._folder(row) / "engine.sock")

    def _folder(self, row: Row) -> Path:
        return self._state.replica_dir(row.id) / str(row.incarnation)

    def seen(self, row: Row) -> Seen:
        """Fleet and router on one row."""
        seen = seen_of(row, self._fleet.observed(row.id))
        if seen.process is Process.NONE and row.nonce in self._not_started:
            seen = replace(seen, exit=self._not_started[row.nonce])
        if seen.process is Process.STARTING:
            seen = replace(seen, progress_at=self._progress_of(row))
        elif seen.process is Process.READY:
            seen = replace(seen, silent_since=self._heartbeats.silent_since((row.id, row.incarnation)))
        return self._routes.view(row, seen)

    def _progress_of(self, row: Row) -> float:
        """When a starting engine last got on: saying the same again is no progress."""
        report = report_of(row, self._fleet.observed(row.id))
        reached = (report.event, report.bytes_done)
        before, at = self._progress.get(row.nonce, (None, 0.0))
        if before != reached:
            at = self._clock()
            self._progress[row.nonce] = (reached, at)
        return at

    def effective(self, stored: StoredObject) -> Effective:
        """What is to run of a model: its intent with what was decided beside it."""
        revisions, overrides = self._store.revisions(stored.uid), self._store.overrides(stored.uid)
        return effective(stored, revisions, overrides, self._clock())

    def _observe(self, stored: StoredObject) -> View:
        wanted = self.effective(stored)
        return self._observe_as(wanted, self._fetching(wanted))

    def _fetching(self, wanted: Effective) -> Progress | None:
        """Have the files of the revision that is to serve fetched, and of its canary; how far that is."""
        stored, revisions = wanted.stored, [wanted.revision]
        if stored.deletion_time is not None or wanted.full == 0:
            self._downloads.forget(stored.key)
            return None
        if wanted.canary is not None:
            revisions.append(wanted.canary.revision)
        needs = [
            need for each in revisions for need in needs_of(each.resolved, Placement.from_dict(each.placement))
        ]
        return self._downloads.demand(stored.key, stored.generation, needs, stored.resolved.get("sourceAuth"))

    def _acting(self, view: View) -> View:
        """The view to plan by. While the files of the revision that is to serve are on their way, what runs is
        kept as it is, by the intent that it was started for: a rollout begins when there is something to roll
        out."""
        if view.fetching is None or view.tried is not None:
            return view
        running = {row.revision for row, _ in view.world.replicas}
        quarantine = view.wanted.overrides.get(Kind.QUARANTINE)
        given_up = quarantine.template_hash if quarantine is not None else ""
        kept = [
            revision
            for revision in self._store.revisions(view.stored.uid)
            if revision.n in running and revision.template_hash != given_up
        ]
        if not kept:
            return view
        newest = max(kept, key=lambda revision: revision.n)
        resolved = {**newest.resolved, "replicas": view.stored.resolved["replicas"]}
        stored = replace(view.stored, resolved=resolved)
        return self._observe_as(replace(view.wanted, stored=stored, revision=newest, fallback=None), view.fetching)

    def _observe_as(self, wanted: Effective, fetching: Progress | None) -> View:
        stored, placement = wanted.stored, Placement.from_dict(wanted.revision.placement)
        pairs = []
        for row in self._store.replicas(stored.key.name):
            seen = self.seen(row)
            if seen.routed and seen.process is Process.READY and row.goal is Goal.RUN and row.ready_since is None:
                row = self._note_ready(stored, row)
            pairs.append((row, seen))
        ready = [row for row, seen in pairs if seen.process is Process.READY]
        tried = wanted.canary
        own = [pair for pair in pairs if tried is None or pair[0].template_hash != tried.revision.template_hash]
        orphans = self._orphans(stored.key.name)
        self._heartbeats.keep(stored.key.name, {(row.id, row.incarnation): self.socket_of(row) for row in ready})
        world = World(
            replicas=tuple(own),
            room=len(self._ledger.places(wanted, placement, len(own))),
            router=self._routes.knowledge(),
            orphans=tuple(orphans),
            jitter=self._rng.uniform(-1, 1),
            late=fetching is None and self._status.is_late(wanted),
        )
        unusable = self._routes.unusable(stored.key.name)
        name = stored.key.name
        short, yields = self.demand.is_short(name), self.demand.is_being_made_room_for(name)
        listed = self._routes.lists(name)
        view = View(wanted, placement, desired_of(wanted), world, fetching, unusable, short, yields, listed=listed)
        if tried is None:
            return view
        beside = [pair for pair in pairs if pair[0].template_hash == tried.revision.template_hash]
        return replace(view, tried=self._try(view, tried, beside))

    def _try(self, view: View, tried: Canary, pairs: Sequence[tuple[Row, Seen]]) -> Tried:
        """A canary with all that is known of it: a population of its own, beside the one that `view` shows."""
        wanted, placement = as_canary(view.wanted, tried), Placement.from_dict(tried.revision.placement)
        world = replace(
            view.world,
            replicas=tuple(pairs),
            room=len(self._ledger.places(wanted, placement, len(pairs))),
            orphans=(),
            # one that serves has arrived: it is given up for what it does, or for ending too often
            late=tried.stage is None and view.fetching is None and self._status.is_late(view.wanted),
        )
        name = view.stored.key.name
        unusable = self._routes.unusable(canary_name(name))
        alone = View(wanted, placement, desired_of(wanted), world, view.fetching, unusable)
        return Tried(
            alone=alone, canary=tried, against=view.revision.n, compared=self.trials.compared(name, tried)
        )

    def _note_ready(self, stored: StoredObject, row: Row) -> Row:
        now = self._clock()
        new = self._store.update_replica(row, replace(row, ready_since=now))
        took = report_of(row, self._fleet.observed(row.id)).load_seconds
        if took > 0:
            self._store.set_load_seconds(stored.uid, row.revision, took)
        self._store.add_event(stored.key, "Normal", "ReplicaReady", f"{row.id} serves")
        return new

    def _orphans(self, model: str) -> list[Orphan]:
        """Live processes that say they belong to this model and that no row accounts for."""
        found = []
        for seen in self._ledger.now().strays:
            name = (seen.name, seen.incarnation, seen.nonce)
            if seen.labels.get("model") != model:
                continue
            since = self._orphans_since.setdefault(name, self._clock())
            released, in_flight = self._routes.load_of(seen.name, seen.incarnation)
            found.append(Orphan(*name, since, released, in_flight))
        return found

    def awaits_router(self) -> bool:
        """Whether something is under way that the router's next answers will show."""
        for stored in self._store.objects("model"):
            for row in self._store.replicas(stored.key.name):
                seen = self.seen(row)
                wanted = self._hot_hashes.get((row.model, row.template_hash))
                waits = seen.process is Process.READY and not seen.routed
                behind = seen.connected and wanted is not None and seen.hot_hash != wanted
                if row.goal is Goal.DRAIN or waits or behind or seen.process is Process.STARTING:
                    return True
        return False

    def waiters(self) -> list[Waiter]:
        """Models that wait for room."""
        return list(self._ledger.waiters.values())

    # ── the pass ──────────────────────────────────────────────────────────────────────────────────────────

    async def reconcile(self, key: Key) -> float | None:
        """One pass; seconds until it wants to run again, or None to wait for a hint."""
        stored = self._store.get(key)
        if stored is None:
            self._downloads.forget(key)
            return await self._sweep(key)
        view = self._observe(stored)
        if view.tried is not None and self.trials.note(view.wanted, view.tried.canary):
            return 0.0
        acting = self._acting(view)
        planned = rollout.plan(acting.desired, acting.world, self._clock())
        self._note_room(acting, planned)
        passes = [(acting, planned)]
        if view.tried is not None and view.tried.canary.is_noted and view.fetching is None:
            passes.append((view.tried.alone, self._plan_beside(view.tried.alone, planned)))
        for each, _ in passes:
            self._hot_hashes[key.name, each.desired.template_hash] = each.desired.hot_hash
        steps: list[rollout.Step] = []
        waits: dict[str, str] = {}
        try:
            for each, step in [(each, step) for each, its in passes for step in its.steps]:
                self._check_unchanged(view)
                if self._lacks_files(view, acting, step):
                    continue
                if isinstance(step, rollout.Launch) and (why := self._bar(each, step)) is not None:
                    waits[step.replica] = why
                    continue
                steps.append(step)
                await self._execute(each, step)
        except Conflict as conflict:
            log.info("%s: %s", key, conflict.message)  # an apply came in between: the next pass sees it
            return 0.0
        lasting = [step for step in steps if not isinstance(step, rollout.PushLimits | rollout.StopOrphan)]
        stored = self._store.get(key)
        if stored is None:
            return 0.0
        view = self._observe(stored)
        no_room = planned.no_room or any(its.no_room and not each.world.replicas for each, its in passes)
        if stored.deletion_time is not None and not view.world.replicas and not view.world.orphans:
            self._store.add_event(key, "Normal", "Deleted", "nothing of it runs any more")
            self._store.remove(key)
            self._heartbeats.keep(key.name, {})
            for known in [known for known in self._hot_hashes if known[0] == key.name]:
                del self._hot_hashes[known]
            self._neighbours_may_move()
            return None
        if self._is_newly_stable(view):
            self._store.mark_stable(stored.uid, view.revision.n)
            view = self._observe(stored)
        deadline = self._status.write(view, no_room=no_room, waits=waits)
        if lasting:
            return 0.0
        now = self._clock()
        requeue_at = min((at for _, its in passes if (at := its.requeue_at) is not None), default=None)
        if len(steps) < sum(len(its.steps) for _, its in passes) and requeue_at is not None and requeue_at <= now:
            requeue_at = None  # what waits for files is due when they are there, of which the download tells
        retry_at = view.fetching.retry_at if view.fetching is not None else None
        ends = [override.until for override in view.wanted.overrides.values()]
        # others than Quire's own may leave a GPU, and do not tell
        room_at = now + ROOM_POLL if no_room and acting.placement.device == "cuda" else None
        turn_at = now + TURN_POLL if waits else None
        return due_in((requeue_at, deadline, retry_at, room_at, turn_at, *ends), now)

    def _plan_beside(self, view: View, planned: rollout.RolloutPlan) -> rollout.RolloutPlan:
        """The plan of a canary, in the room that the plan of the stable revision leaves."""
        taken = sum(isinstance(step, rollout.Create) for step in planned.steps)
        world = replace(view.world, room=max(view.world.room - taken, 0))
        return rollout.plan(view.desired, world, self._clock())

    def _is_newly_stable(self, view: View) -> bool:
        """Whether a revision has come to be all that serves: another one's failure will lead back to it."""
        stable, desired = view.wanted.stable, view.desired
        if stable is not None and stable.n == view.revision.n:
            return False
        if desired.deleting or not desired.replicas:
            return False
        return rollout.is_settled(desired, view.world, self._clock())

    def _note_room(self, view: View, planned: rollout.RolloutPlan) -> None:
        """Remember who waits for room: others keep away from it, and a model on demand may leave for it."""
        model, rows = view.stored.key.name, [row for row, _ in view.world.replicas]
        waits = planned.no_room and view.fetching is None
        if waits:
            self.demand.wants_room(model)
        if self._ledger.note(view.wanted, rows, waits=waits):
            for other in self._ledger.waiters:
                self._changed(Key("model", other))

    def _bar(self, view: View, step: rollout.Launch) -> str | None:
        """Why an engine may not be started now although it is due."""
        row = next(row for row, _ in view.world.replicas if row.id == step.replica)
        if row.device == "cpu":
            return None
        neighbours = [
            Neighbour(
                other,
                seen_of(other, self._fleet.observed(other.id)).process,
                self._progress_of(other),
                self._priority_of(other.model),
            )
            for other in self._store.replicas()
            if other.device == row.device and other.id != row.id
        ]
        priority = priority_of(view.stored.resolved)
        return self._turns.bar(row, priority, neighbours, self._detect(), self._clock())

    def _priority_of(self, model: str) -> int:
        stored = self._store.get(Key("model", model))
        return priority_of(stored.resolved) if stored is not None else 0

    def _check_unchanged(self, view: View) -> None:
        """Raises `Conflict` when something was applied or decided since the view was taken: steps are awaited."""
        stored, wanted = self._store.get(view.stored.key), view.wanted
        decided = {} if stored is None else in_force(self._store.overrides(stored.uid), self._clock())
        if stored is None or stored.generation != wanted.stored.generation or decided != wanted.overrides:
            raise Conflict(f"{view.stored.key} was changed meanwhile", "it is looked at again")

    def _lacks_files(self, view: View, acting: View, step: rollout.Step) -> bool:
        """Whether a step would start an engine of the current revision before its files are there."""
        if view.fetching is None or view.tried is not None:
            return False  # of a canary nothing is planned meanwhile
        if isinstance(step, rollout.Create):
            return acting.revision.n == view.revision.n
        return isinstance(step, rollout.Launch) and self._row(step.replica).revision == view.revision.n

    async def _sweep(self, key: Key) -> float | None:
        """Processes that carry the name of a model that does not exist."""
        orphans = self._orphans(key.name)
        for orphan in orphans:
            if orphan.released and orphan.in_flight == 0:
                await self._stop_orphan(orphan.id, orphan.nonce)
        return 1.0 if orphans else None

    def _neighbours_may_move(self) -> None:
        """Memory came free, or a name: every other model may have waited for it."""
        for stored in self._store.objects("model"):
            self._changed(stored.key)

    def refresh(self, key: Key) -> None:
        """Report what is seen now, without a step: after a start, before anybody asks."""
        stored = self._store.get(key)
        if stored is not None:
            self._status.write(self._observe(stored), no_room=False, waits={})

    # ── execute ───────────────────────────────────────────────────────────────────────────────────────────

    async def _execute(self, view: View, step: rollout.Step) -> None:
        key = view.stored.key
        log.info("%s: %s", key, step)
        acted(step)
        match step:
            case rollout.Create():
                self._create(view, step)
            case rollout.Launch():
                await self._launch(view, step)
            case rollout.Forget():
                self._fleet.forget(step.replica)
                row = self._row(step.replica)
                self._progress.pop(row.nonce, None)
                self._store.delete_replica(row)
                self._ledger.vacated(view.wanted)
                self._remove_stale_logs(view.stored)
                self._neighbours_may_move()
            case rollout.StopOrphan():
                await self._stop_orphan(step.replica, step.nonce)
            case rollout.RollBack():
                self._roll_back(view.stored, step)
            case rollout.PushLimits():
                await self._routes.set_limits(
                    step.replicas, limits_of(view.stored.resolved, view.placement.device, step.hot_hash)
                )
            case rollout.Stop():
                row = self._move(step)
                kind, grace = ("Warning", 0.0) if step.because in HOPELESS_STOPS else ("Normal", STOP_GRACE)
                self._store.add_event(key, kind, "Stopping", f"{row.id}: {step.because}")
                self._changed(ROUTES)
                await self._fleet.stop(self._folder(row), grace)
            case rollout.Backoff() | rollout.Fail():
                # without numbers: ends of one kind are one event, which is counted
                again = "started again after a pause" if isinstance(step, rollout.Backoff) else "not tried again"
                row, follows = self._move(step), f"it is {again}"
                text = f"{row.id}: {step.exit.reason}: {step.exit.message}; {follows}"
                self._store.add_event(key, "Warning", step.exit.reason, text)
            case rollout.Drain():
                self._move(step)
                self._store.add_event(key, "Normal", "Draining", f"{step.replica}: {step.because}")
            case rollout.Undrain():
                self._move(step)
                self._store.add_event(key, "Normal", "Undrained", f"{step.replica} is needed after all")

    def _roll_back(self, stored: StoredObject, step: rollout.RollBack) -> None:
        why = f"{step.reason}: {step.message}"
        quarantine = Override(
            Kind.QUARANTINE,
            "platform",
            self._clock(),
            why,
            revision=step.revision,
            template_hash=step.template_hash,
        )
        self._store.set_override(stored.uid, quarantine, failed=(step.revision, why))
        text = f"revision {step.revision} → {step.to}: {why}"
        self._store.add_event(stored.key, "Warning", "RolledBack", text)
        self._changed(ROUTES)

    def _told(self, key: Key) -> None:
        """Something was decided about a model that its replicas and the router are to follow."""
        self._changed(key)
        self._changed(ROUTES)

    def serving(self, model: str, template_hash: str) -> int:
        """Replicas of a template that serve."""
        rows = [row for row in self._store.replicas(model) if row.template_hash == template_hash]
        return sum(row.ready_since is not None and self.seen(row).routed for row in rows)

    def _remove_stale_logs(self, stored: StoredObject) -> None:
        """Keep the logs of replicas whose revision is on record; all of them would pile up with every rollout."""
        name = stored.key.name
        revisions = {revision.n for revision in self._store.revisions(stored.uid)}
        rows = {row.id for row in self._store.replicas(name)}
        folder = self._state.replica_log(name, "any").parent
        for path in folder.iterdir() if folder.is_dir() else ():
            replica = log_owner(path.name, name)
            if replica is not None and replica[0] not in rows and replica[1] not in revisions:
                path.unlink(missing_ok=True)

    def _row(self, replica: str) -> Row:
        row = next((row for row in self._store.replicas() if row.id == replica), None)
        if row is None:
            raise Conflict(f"replica {replica} is gone", "it is looked at again")
        return row

    def _move(self, step: rollout.RowStep) -> Row:
        row = self._row(step.replica)
        return self._store.update_replica(row, rollout.after(row, step, self._clock()))

    def _create(self, view: View, step: rollout.Create) -> None:
        """Write the row that takes the memory, if it is still there: between plan and write nothing is awaited
        by this pass, but an earlier step of it may have been."""
        places = self._ledger.places(view.wanted, view.placement, len(self._store.replicas(view.stored.key.name)))
        if not places:
            raise Conflict("the memory was taken meanwhile", "it is looked at again")
        self._store.create_replica(
            Row(
                id=step.replica,
                model=view.stored.key.name,
                index=step.index,
                revision=view.revision.n,
                template_hash=view.revision.template_hash,
                goal=Goal.RUN,
                created_at=self._clock(),
                memory=view.placement.memory,
                device=places[0],
            )
        )

    async def _launch(self, view: View, step: rollout.Launch) -> None:
        """Write the incarnation and its nonce, then start it. A start that fails is observed as an end."""
        row = self._row(step.replica)
        revision = next(
            (r for r in self._store.revisions(view.stored.uid) if r.template_hash == row.template_hash), None
        )
        if revision is None:
            # Nothing says what it would be: another revision's engine under this row's name would be a lie.
            text = f"{row.id} is of revision {row.revision}, which is no longer on record"
            self._move(
                rollout.Fail(row.id, view.desired.generation, rollout.Exit("NoRevision", text, Cause.CONFIG))
            )
            self._store.add_event(view.stored.key, "Warning", "NoRevision", text)
            return
        placement = Placement.from_dict(revision.placement)
        for need in needs_of(revision.resolved, placement):
            self._downloads.cache.used(need)
        self._progress.pop(row.nonce, None)
        new = replace(rollout.after(row, step, self._clock()), nonce=Store.new_nonce())
        row = self._store.update_replica(row, new)
        spec = view.stored.resolved
        hot = spec if row.template_hash == view.desired.template_hash else revision.resolved
        folder = self._folder(row)
        engine = placement.engine_spec(
            row.model,
            row.id,
            row.incarnation,
            self.socket_of(row),
            hot,
            hot_hash(hot),
            adoption_window=self._gateway.adoption_window(),
        )
        declared = {item["name"]: item["value"] or "" for item in revision.resolved["env"]}
        specs = [other.resolved for other in self._store.objects()]
        env = {**without_tokens(self._environ, specs), **declared, **device_env(row.device)}
        unit = Unit(
            folder=folder,
            name=row.id,
            incarnation=row.incarnation,
            nonce=row.nonce,
            argv=self._engine_argv(folder / "engine.json"),
            env=env,
            cwd=self._state.root,
            log=self._state.replica_log(row.model, row.id),
            labels={"model": row.model, "memory": row.memory, "device": row.device},
            files={"engine.json": msgspec.json.encode(engine)},
            grace=STOP_GRACE,
        )
        try:
            await self._fleet.start(unit)
        except StartFailed as error:
            self._not_started = {row.nonce: rollout.Exit("CannotStart", error.message)} | dict(
                list(self._not_started.items())[-100:]
            )
            return
        # Without the incarnation: in a crash loop this is one event that is counted.
        self._store.add_event(view.stored.key, "Normal", "Started", row.id)

    async def _stop_orphan(self, name: str, nonce: str) -> None:
        for seen in self._fleet.observed(name):
            if seen.nonce == nonce:
                log.warning("stopping %s incarnation %d, which no row accounts for", name, seen.incarnation)
                await self._fleet.stop(seen.folder, STOP_GRACE)

    # ── routing ───────────────────────────────────────────────────────────────────────────────────────────

    def routables(self) -> list[Routable]:
        """Every model that is routed, with its replicas: the input of `routes.build`."""
        stored = [each for each in self._store.objects("model") if each.deletion_time is None]
        return [found for each in stored for found in routables(self._standing(self.effective(each)))]

    def _standing(self, wanted: Effective) -> Standing:
        stored, canary = wanted.stored, wanted.canary
        name, rows = stored.key.name, self._store.replicas(stored.key.name)
        revisions = self._store.revisions(stored.uid)
        return Standing(
            wanted,
            [(row, seen_of(row, self._fleet.observed(row.id))) for row in rows],
            {each.template_hash: Placement.from_dict(each.placement) for each in revisions},
            {row.id: self.socket_of(row) for row in rows},
            self.serving(name, canary.revision.template_hash) if canary is not None else 0,
            self._clock(),
        )


def due_in(times: Sequence[float | None], now: float) -> float | None:
    """Seconds from `now` to the earliest of these; 0 for one that passed while the pass that named it went on."""
    named = [at for at in times if at is not None]
    return max(min(named) - now, 0.0) if named else None


def log_owner(file: str, model: str) -> tuple[str, int] | None:
    """The replica's id and revision that a log file of `model` (rotated ones too) is named after, if it is one."""
    found = re.fullmatch(rf"({re.escape(model)}-r(\d+)-\d+)\.log(\.\d+)?", file)
    return (found[1], int(found[2])) if found else None


def device_env(device: str) -> dict[str, str]:
    """What shows an engine its device alone. Devices are numbered as NVML does, by bus; CUDA would put the fastest
    first unless told otherwise."""
    if not device.startswith("cuda:"):
        return {}
    return {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": device.removeprefix("cuda:")}


def needs_of(resolved: Mapping[str, Any], placement: Placement) -> tuple[Need, ...]:
    """The parts of repositories that engine and router read for one revision."""
    found = []
    if placement.commit is not None:
        found.append(Need(resolved["source"].removeprefix("hf://"), placement.commit, "model"))
    tokenizer = resolved["tokenizer"]["source"]
    if tokenizer is not None and tokenizer.startswith("hf://"):
        commit = Path(placement.tokenizer_dir).name
        found.append(Need(tokenizer.removeprefix("hf://"), commit, "tokenizer"))
    return tuple(found)


def limits_of(resolved: Mapping[str, Any], device: Literal["cpu", "cuda"], digest: str) -> wire.Limits:
    """The hot knobs of a resolved spec, for running engines on a device."""
    batching = resolved["batching"]
    return wire.Limits(
        hot_hash=digest,
        max_num_seqs=batching["maxNumSeqs"],
        max_num_batched_tokens=batching["maxNumBatchedTokens"],
        chunked_prefill=batching["chunkedPrefill"],
        policy=batching["policy"],
        max_waiting=batching["maxQueueLength"],
        max_prefill_tokens=prefill_share(batching.get("maxPrefillTokens"), device),
    )
