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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec

from quire_operators import rollout, status
from quire_operators.admission import desired_of, stall_timeout
from quire_operators.cache import Need
from quire_operators.clock import on_the_wall
from quire_operators.devices import Inventory, free_places, held
from quire_operators.downloads import Downloads, Progress
from quire_operators.fleet.heartbeat import Heartbeats
from quire_operators.fleet.local import Life, LocalFleet, Observation, StartFailed, Unit
from quire_operators.gateway import GatewayReconciler
from quire_operators.paths import StateDir
from quire_operators.placement import Placement
from quire_operators.rollout import Cause, Desired, Goal, Orphan, Process, Row, Seen, World
from quire_operators.routes import Routable, Routes, Text
from quire_operators.secrets import without_tokens
from quire_operators.status import Fact, Reason
from quire_operators.store import Conflict, Revision, Store, StoredObject
from quire_operators.tracing import acted
from quire_schemas import wire
from quire_schemas.quantities import format_bytes, format_duration, parse_duration, parse_percent
from quire_schemas.resource import Key
from quire_schemas.update import hot_hash

log = logging.getLogger(__name__)

STOP_GRACE = 10.0
"""Seconds an engine has to end by itself after SIGTERM; it was drained before."""
HOPELESS_STOPS = frozenset({rollout.STALLED, rollout.STARTUP_TIMEOUT})
"""Stops of engines that would not hear a SIGTERM either."""
REFUSALS = frozenset({2, 78})
"""Exit codes with which a program says that it was told something wrong: a bad argument, a bad configuration."""
SOURCE_REASONS = frozenset({"MissingFile", "NotFound", "Unauthorized", "Forbidden"})
"""Reasons of engines that mean: the files could not be had."""
_events = msgspec.json.Decoder(wire.EngineEvent)


@dataclass(frozen=True, slots=True)
class Report:
    """What an engine said of its start, from its last status lines."""

    event: str = ""
    bytes_done: int = 0
    bytes_total: int = 0
    reason: str = ""
    message: str = ""
    retryable: bool = True
    load_seconds: float = 0.0


def read_report(lines: Sequence[str]) -> Report:
    """The state that status lines add up to; a line that is not an event is left aside and logged."""
    report = Report()
    for line in lines:
        try:
            event = _events.decode(line)
        except msgspec.MsgspecError:
            log.warning("not an engine event: %.200s", line)
            continue
        report = Report(
            event.event,
            max(report.bytes_done, event.bytes_done),
            max(report.bytes_total, event.bytes_total),
            event.reason,
            event.message,
            event.retryable,
            event.load_seconds,
        )
    return report


def exit_of(seen: Observation) -> rollout.Exit | None:
    """Why an incarnation ended: the engine's own word if it gave one, else how its process ended."""
    report = read_report(seen.lines)
    if seen.ended is None and report.event != "failed":
        return None
    tail = seen.ended.tail if seen.ended is not None else ()
    refused = seen.ended is not None and seen.ended.code in REFUSALS
    if report.event == "failed":
        reason = report.reason or "EngineFailed"
        if reason in SOURCE_REASONS:
            cause = Cause.SOURCE
        elif reason == rollout.OUT_OF_MEMORY:
            cause = Cause.MEMORY
        else:
            cause = Cause.CONFIG if refused or not report.retryable else Cause.UNKNOWN
        return rollout.Exit(reason, report.message, cause, tail)
    text = seen.ended.text() if seen.ended is not None else ""
    if refused:
        return rollout.Exit("ConfigRejected", text, Cause.CONFIG, tail)
    return rollout.Exit("ProcessEnded", text, Cause.UNKNOWN, tail)


def seen_of(row: Row, observations: Sequence[Observation]) -> Seen:
    """The fleet's side of what was seen of a row: its current incarnation, told by the nonce."""
    others = [o for o in observations if o.nonce != row.nonce]
    own = next((o for o in observations if o.incarnation == row.incarnation and o.nonce == row.nonce), None)
    if own is None:
        # Another process of that name: nothing may be started beside it before it is gone.
        return Seen(Process.UNKNOWN if any(o.life is not Life.GONE for o in others) else Process.NONE)
    if own.life is Life.UNKNOWN:
        return Seen(Process.UNKNOWN)
    if own.life is Life.GONE:
        return Seen(Process.EXITED, exit=exit_of(own))
    report = read_report(own.lines)
    ready = report.event == "ready" and own.running
    return Seen(Process.READY if ready else Process.STARTING)


@dataclass(frozen=True, slots=True)
class View:
    """One pass's view of a model."""

    stored: StoredObject
    revision: Revision
    placement: Placement
    desired: Desired
    world: World
    fetching: Progress | None = None
    """What its files still lack; None when all are there and verified."""


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
        self._progress: dict[str, tuple[tuple[str, int], float]] = {}
        """By nonce of a starting engine: how far it last said it was, and when that was new."""
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
        report = read_report(self._lines(row))
        reached = (report.event, report.bytes_done)
        before, at = self._progress.pop(row.nonce, (None, 0.0))
        if before != reached:
            at = self._clock()
        self._progress = {**dict(list(self._progress.items())[-100:]), row.nonce: (reached, at)}
        return at

    def _revision(self, stored: StoredObject) -> Revision:
        return next(r for r in self._store.revisions(stored.uid) if r.n == stored.revision)

    def _observe(self, stored: StoredObject) -> View:
        revision = self._revision(stored)
        fetching = self._fetching(stored, revision)
        return self._observe_as(stored, revision, fetching)

    def _fetching(self, stored: StoredObject, revision: Revision) -> Progress | None:
        """Have the files of the current revision fetched; how far that is."""
        if stored.deletion_time is not None or stored.resolved["replicas"] == 0:
            self._downloads.forget(stored.key)
            return None
        needs = needs_of(revision.resolved, Placement.from_dict(revision.placement))
        return self._downloads.demand(stored.key, stored.generation, needs, stored.resolved.get("sourceAuth"))

    def _acting(self, view: View) -> View:
        """The view to plan by. While the files of the current revision are on their way, what runs is kept as it
        is, by the intent that it was started for: a rollout begins when there is something to roll out."""
        if view.fetching is None:
            return view
        running = {row.revision for row, _ in view.world.replicas}
        kept = [revision for revision in self._store.revisions(view.stored.uid) if revision.n in running]
        if not kept:
            return view
        newest = max(kept, key=lambda revision: revision.n)
        return self._observe_as(replace(view.stored, resolved=newest.resolved), newest, view.fetching)

    def _observe_as(self, stored: StoredObject, revision: Revision, fetching: Progress | None) -> View:
        placement = Placement.from_dict(revision.placement)
        pairs = []
        for row in self._store.replicas(stored.key.name):
            seen = self.seen(row)
            if seen.routed and seen.process is Process.READY and row.goal is Goal.RUN and row.ready_since is None:
                row = self._note_ready(stored, row)
            pairs.append((row, seen))
        ready = [row for row, seen in pairs if seen.process is Process.READY]
        self._heartbeats.keep(stored.key.name, {(row.id, row.incarnation): self.socket_of(row) for row in ready})
        desired = desired_of(stored, revision)
        world = World(
            replicas=tuple(pairs),
            room=len(self.places(stored.resolved, placement)),
            router=self._routes.knowledge(),
            orphans=tuple(self._orphans(stored.key.name)),
            jitter=self._rng.uniform(-1, 1),
        )
        return View(stored, revision, placement, desired, world, fetching)

    def _note_ready(self, stored: StoredObject, row: Row) -> Row:
        now = self._clock()
        new = self._store.update_replica(row, replace(row, ready_since=now))
        took = read_report(self._lines(row)).load_seconds
        if took > 0:
            self._store.set_load_seconds(stored.uid, row.revision, took)
        self._store.add_event(stored.key, "Normal", "ReplicaReady", f"{row.id} serves")
        return new

    def _lines(self, row: Row) -> tuple[str, ...]:
        return next((o.lines for o in self._fleet.observed(row.id) if o.nonce == row.nonce), ())

    def _orphans(self, model: str) -> list[Orphan]:
        """Live processes that say they belong to this model and that no row accounts for."""
        rows = {(row.id, row.incarnation, row.nonce) for row in self._store.replicas()}
        found = []
        for seen in self._fleet.observed():
            name = (seen.name, seen.incarnation, seen.nonce)
            if seen.labels.get("model") != model or name in rows or seen.life is not Life.LIVE:
                continue
            since = self._orphans_since.setdefault(name, self._clock())
            released, in_flight = self._routes.load_of(seen.name, seen.incarnation)
            found.append(Orphan(*name, since, released, in_flight))
        return found

    def awaits_router(self) -> bool:
        """Whether something is under way that the router's next answers will show."""
        for stored in self._store.objects("model"):
            wanted = hot_hash(stored.resolved)
            for row in self._store.replicas(stored.key.name):
                seen = self.seen(row)
                waits = seen.process is Process.READY and not seen.routed
                behind = seen.connected and seen.hot_hash != wanted
                if row.goal is Goal.DRAIN or waits or behind or seen.process is Process.STARTING:
                    return True
        return False

    def places(self, spec: Mapping[str, Any], placement: Placement) -> list[str]:
        """Devices for as many more replicas as fit now, beside every row and every orphan."""
        rows = self._store.replicas()
        known = {row.nonce for row in rows}
        extra: dict[str, int] = {}
        for seen in self._fleet.observed():
            if seen.nonce not in known and seen.life is not Life.GONE and "memory" in seen.labels:
                device = str(seen.labels["device"])
                extra[device] = extra.get(device, 0) + int(seen.labels["memory"])
        return free_places(
            self._detect(),
            held(rows, extra),
            placement.device,
            placement.memory,
            parse_percent(spec["engine"]["memory"]),
            spec["placement"]["deviceIds"],
        )

    # ── the pass ──────────────────────────────────────────────────────────────────────────────────────────

    async def reconcile(self, key: Key) -> float | None:
        """One pass; seconds until it wants to run again, or None to wait for a hint."""
        stored = self._store.get(key)
        if stored is None:
            self._downloads.forget(key)
            return await self._sweep(key)
        view = self._observe(stored)
        acting = self._acting(view)
        planned = rollout.plan(acting.desired, acting.world, self._clock())
        steps = [step for step in planned.steps if not self._lacks_files(view, acting, step)]
        try:
            for step in steps:
                await self._execute(acting, step)
        except Conflict as conflict:
            log.info("%s: %s", key, conflict.message)  # an apply came in between: the next pass sees it
            return 0.0
        lasting = [step for step in steps if not isinstance(step, rollout.PushLimits | rollout.StopOrphan)]
        stored = self._store.get(key)
        if stored is None:
            return 0.0
        view = self._observe(stored)
        if stored.deletion_time is not None and not view.world.replicas and not view.world.orphans:
            self._store.add_event(key, "Normal", "Deleted", "nothing of it runs any more")
            self._store.remove(key)
            self._heartbeats.keep(key.name, {})
            self._neighbours_may_move()
            return None
        deadline = self._report(view, no_room=planned.no_room)
        if lasting:
            return 0.0
        # A step that waits for files is due when they are there, of which the download tells.
        requeue_at = planned.requeue_at if len(steps) == len(planned.steps) else None
        retry_at = view.fetching.retry_at if view.fetching is not None else None
        return due_in((requeue_at, deadline, retry_at), self._clock())

    def _lacks_files(self, view: View, acting: View, step: rollout.Step) -> bool:
        """Whether a step would start an engine of the current revision before its files are there."""
        if view.fetching is None:
            return False
        if isinstance(step, rollout.Create):
            return acting.revision.n == view.revision.n
        return isinstance(step, rollout.Launch) and self._row(step.replica).revision == view.revision.n

    async def _sweep(self, key: Key) -> float | None:
        """Processes that carry the name of a model that does not exist."""
        again = None
        for orphan in self._orphans(key.name):
            again = 1.0
            if orphan.released and orphan.in_flight == 0:
                await self._stop_orphan(orphan.id, orphan.nonce)
        return again

    def _neighbours_may_move(self) -> None:
        """Memory came free, or a name: every other model may have waited for it."""
        for stored in self._store.objects("model"):
            self._changed(stored.key)

    def refresh(self, key: Key) -> None:
        """Report what is seen now, without a step: after a start, before anybody asks."""
        stored = self._store.get(key)
        if stored is not None:
            self._report(self._observe(stored), no_room=False)

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
                self._store.delete_replica(step.replica)
                self._remove_stale_logs(view.stored)
                self._neighbours_may_move()
            case rollout.StopOrphan():
                await self._stop_orphan(step.replica, step.nonce)
            case rollout.PushLimits():
                await self._routes.set_limits(step.replicas, limits_of(view.stored.resolved, step.hot_hash))
            case rollout.Stop():
                row = self._move(step)
                kind, grace = ("Warning", 0.0) if step.because in HOPELESS_STOPS else ("Normal", STOP_GRACE)
                self._store.add_event(key, kind, "Stopping", f"{row.id}: {step.because}")
                self._changed(ROUTES)
                await self._fleet.stop(self._folder(row), grace)
            case rollout.Backoff() | rollout.Fail():
                row = self._move(step)
                retry = "" if isinstance(step, rollout.Backoff) else "; it is not tried again"
                text = f"{row.id}: {step.exit.reason}: {step.exit.message}{retry}"
                self._store.add_event(key, "Warning", step.exit.reason, text)
            case rollout.Drain():
                self._move(step)
                self._store.add_event(key, "Normal", "Draining", f"{step.replica}: {step.because}")
            case rollout.Undrain():
                self._move(step)
                self._store.add_event(key, "Normal", "Undrained", f"{step.replica} is needed after all")

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
        places = self.places(view.stored.resolved, view.placement)
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
        specs = [other.resolved for other in self._store.objects("model")]
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

    # ── report ────────────────────────────────────────────────────────────────────────────────────────────

    def _report(self, view: View, *, no_room: bool) -> float | None:
        """Write the status; gives the time of the progress deadline while it is ahead."""
        now = self._clock()
        stored, desired, pairs = view.stored, view.desired, view.world.replicas
        before = self._store.status(stored.uid)
        want = 0 if desired.deleting else desired.replicas
        current = [(row, seen) for row, seen in pairs if row.template_hash == desired.template_hash]
        available = [row for row, seen in pairs if rollout.is_available(desired, row, seen, now)]
        updated = [row for row in available if row.template_hash == desired.template_hash]
        settled = rollout.is_settled(desired, view.world, now)
        reports = {row.id: read_report(self._lines(row)) for row, _ in pairs}
        replicas = [self._replica(row, seen, reports[row.id]) for row, seen in pairs]
        signature: list[Any] = [
            [r["id"], r["incarnation"], r["state"], reports[r["id"]].bytes_done] for r in replicas
        ]
        fetching = view.fetching
        if fetching is not None:
            signature.append(fetching.done)
        since = before.get("progressAt", now)
        if [stored.generation, signature] != before.get("signature"):
            since = now
        deadline = since + parse_duration(stored.resolved["rollout"]["progressDeadline"])
        facts = self._facts(view, no_room, len(available), settled, late=not settled and now >= deadline)
        wall = on_the_wall(now, self._clock)
        shown = status.conditions(facts, before.get("conditions", ()), stored.generation, wall)
        loading = max((report.bytes_done for report in reports.values()), default=0)
        loaded = [seen for _, seen in current if seen.process is Process.READY]
        reached = {
            "accepted": True,
            "weights": fetching is None,
            "device": bool(current) or want == 0,
            "loaded": bool(loaded) or want == 0,
            "ready": len(updated) >= want,
        }
        details: dict[str, Any] = {"weights": {"bytes": view.placement.weights}}
        if fetching is not None:
            details["weights"] = {
                "bytes": fetching.total,
                "bytesDone": fetching.done,
                "rate": round(fetching.rate),
            }
        if current:
            details["device"] = {"device": ",".join(sorted({row.device for row, _ in current}))}
            if not loaded:
                details["loaded"] = {"bytesDone": loading, "bytes": view.placement.weights}
        served = max((row.revision for row in available), default=before.get("servedRevision"))
        document = {
            "observedGeneration": stored.generation,
            "summary": status.summary(facts, len(available), want, len(updated), deleting=desired.deleting),
            "servedRevision": stored.revision if settled else served,
            "replicas": {
                "desired": want,
                "live": sum(not seen.process.gone for _, seen in pairs),
                "ready": len(available),
                "updated": len(updated),
                "draining": sum(row.goal is Goal.DRAIN for row, _ in pairs),
            },
            "endpoints": {
                "openai": f"{self._gateway.base_url()}/v1",
                "modelNames": stored.resolved["servedModelNames"],
            },
            "resolved": view.placement.resolved(),
            "progress": status.progress(
                before.get("progress"), stored.generation, reached, now - stored.applied_at, **details
            ),
            "conditions": shown,
            "remedies": status.remedies(str(stored.key), shown),
            "replicaList": replicas,
            "signature": [stored.generation, signature],
            "progressAt": since,
        }
        if self._store.put_status(stored.uid, document):
            self._changed(ROUTES)
        self._note_fetch(stored, facts, before)
        for fact in facts:
            if fact.type == "Stalled" and fact.status and not _was(before, "Stalled", fact.reason):
                self._store.add_event(stored.key, "Warning", fact.reason.value, fact.message)
        return None if settled or now >= deadline else deadline

    def _note_fetch(self, stored: StoredObject, facts: Sequence[Fact], before: Mapping[str, Any]) -> None:
        """An event when a fetch begins, fails or ends."""
        fetched = next(fact for fact in facts if fact.type == "Fetched")
        was = next((c["reason"] for c in before.get("conditions", ()) if c["type"] == "Fetched"), None)
        if was == fetched.reason or (was is None and fetched.status):
            return
        kind = "Normal" if fetched.reason in (Reason.VERIFIED, Reason.DOWNLOADING) else "Warning"
        self._store.add_event(stored.key, kind, fetched.reason.value, fetched.message)

    def _replica(self, row: Row, seen: Seen, report: Report) -> dict[str, Any]:
        own = next((o for o in self._fleet.observed(row.id) if o.nonce == row.nonce), None)
        state = rollout.state_of(row, seen)
        message = row.message
        if state == "Starting" and report.event == "loading" and report.bytes_total:
            message = f"loading {format_bytes(report.bytes_done)} of {format_bytes(report.bytes_total)}"
        times = {
            "Ready": row.ready_since,
            "Draining": row.drain_since,
            "Stopping": row.stop_sent,
            "Starting": row.launched_at,
        }
        return {
            "id": row.id,
            "revision": row.revision,
            "state": state,
            "incarnation": row.incarnation,
            "restarts": row.restarts,
            "pid": own.child_pid if own is not None else None,
            "since": times.get(state) or row.created_at,
            "message": message,
            "reason": row.reason,
            "lastExit": {
                "reason": row.last_exit.reason,
                "message": row.last_exit.message,
                "log": list(row.last_exit.lines),
            }
            if row.last_exit is not None
            else None,
            "devices": [row.device],
        }

    def _facts(self, view: View, no_room: bool, available: int, settled: bool, *, late: bool) -> list[Fact]:
        stored, desired, world = view.stored, view.desired, view.world
        want = 0 if desired.deleting else desired.replicas
        hot_pending = any(
            seen.hot_hash not in (None, desired.hot_hash)
            for row, seen in world.replicas
            if row.template_hash == desired.template_hash
        )
        lacking = self._lacking(view) if no_room else None
        facts = [
            Fact("Accepted", True, Reason.VALID),
            self._fetched_fact(view),
            lacking
            or Fact(
                "Scheduled",
                len(world.replicas) >= want,
                Reason.SCHEDULED if len(world.replicas) >= want else Reason.PROGRESS_MADE,
            ),
            self._ready_fact(view, available, want),
        ]
        if settled and hot_pending:
            facts.append(Fact("RolledOut", False, Reason.HOT_UPDATE_PENDING, "an engine runs older settings"))
        elif settled:
            facts.append(Fact("RolledOut", True, Reason.UP_TO_DATE, f"revision {stored.revision}"))
        else:
            facts.append(Fact("RolledOut", False, Reason.DELETING if desired.deleting else Reason.PROGRESS_MADE))
        facts.append(self._stalled_fact(view, lacking, available, settled, late=late))
        return facts

    def _fetched_fact(self, view: View) -> Fact:
        fetching, placement = view.fetching, view.placement
        if fetching is None:
            text = f"{format_bytes(placement.weights)} in {placement.model_dir}"
            return Fact("Fetched", True, Reason.VERIFIED, text + self._moved(view))
        if fetching.failure is not None:
            return Fact("Fetched", False, Reason(fetching.failure.reason), fetching.failure.message)
        text = f"{format_bytes(fetching.done)} of {format_bytes(fetching.total)}"
        if fetching.rate:
            left = max(fetching.total - fetching.done, 0) / fetching.rate
            text += f", {format_bytes(round(fetching.rate))}/s, {max(round(left), 1)} s left"
        return Fact("Fetched", False, Reason.DOWNLOADING, text)

    def _moved(self, view: View) -> str:
        """That the branch stands for another commit in the cache than the one that was recorded."""
        spec = view.stored.intent["spec"]
        branch, commit = spec.get("revision", "main"), view.placement.commit
        if commit is None:
            return ""
        now = self._downloads.cache.commit_of(spec["source"].removeprefix("hf://"), branch)
        if now is None or now == commit:
            return ""
        return f"; {branch} is at {now[:12]} in the cache by now, this model stays at {commit[:12]}"

    def _ready_fact(self, view: View, available: int, want: int) -> Fact:
        world = view.world
        if available:
            return Fact("Ready", True, Reason.SERVING, f"{available} of {want} replicas")
        if want == 0:
            return Fact("Ready", False, Reason.STOPPED, "no replica is asked for")
        if world.router is not rollout.Router.KNOWN:
            failure = self._gateway.failure()
            return Fact(
                "Ready", False, Reason.ROUTER_NOT_READY, failure.message if failure else "the router starts"
            )
        for row, _ in world.replicas:
            if row.reason == rollout.STALLED:
                return Fact(
                    "Ready", False, Reason.ENGINE_STALLED, f"{row.id}: {row.message or 'it is being killed'}"
                )
        if view.fetching is not None and not world.replicas:
            failure_ = view.fetching.failure
            return Fact("Ready", False, Reason(failure_.reason) if failure_ is not None else Reason.DOWNLOADING)
        starting = any(seen.process is Process.STARTING for _, seen in world.replicas)
        if starting or any(seen.process is Process.READY for _, seen in world.replicas):
            return Fact("Ready", False, Reason.STARTING, "requests are held meanwhile")
        return Fact("Ready", False, Reason.NO_REPLICA_AVAILABLE)

    def _lacking(self, view: View) -> Fact:
        """Scheduled is False: what a replica needs and what there is."""
        placement = view.placement
        need = format_bytes(placement.memory)
        taken = held(self._store.replicas())
        if placement.device == "cuda":
            text = f"a replica needs a GPU with {need} free; held: " + (
                ", ".join(f"{name} {format_bytes(size)}" for name, size in sorted(taken.items())) or "nothing"
            )
            return Fact("Scheduled", False, Reason.INSUFFICIENT_DEVICES, text)
        share = view.stored.resolved["engine"]["memory"]
        limit = int(self._detect().memory * parse_percent(share))
        text = (
            f"a replica needs {need}; {format_bytes(taken.get('cpu', 0))} of {format_bytes(limit)} "
            f"({share} of this machine) are held by replicas already"
        )
        return Fact("Scheduled", False, Reason.INSUFFICIENT_MEMORY, text)

    def _arithmetic(self, view: View, row: Row) -> str:
        """What a replica was planned with, and what its device has."""
        placed = view.placement
        rest = max(row.memory - placed.weights - placed.kv, 0)
        return (
            f"planned were weights {format_bytes(placed.weights)} + KV cache {format_bytes(placed.kv)} "
            f"+ activations and process {format_bytes(rest)} = {format_bytes(row.memory)} a replica; "
            f"{row.device} has {format_bytes(self._detect().total(row.device))}"
        )

    def _stalled_fact(
        self, view: View, lacking: Fact | None, available: int, settled: bool, *, late: bool
    ) -> Fact:
        desired = view.desired
        current = [(row, seen) for row, seen in view.world.replicas if row.template_hash == desired.template_hash]
        fetch = view.fetching.failure if view.fetching is not None else None
        if fetch is not None and fetch.stuck:
            return Fact("Stalled", True, Reason(fetch.reason), fetch.message)
        for row, _ in current:
            if row.failed_generation is not None:
                text = f"{row.id}: {row.reason}: {row.message}"
                if row.last_exit is not None and row.last_exit.cause is Cause.MEMORY:
                    return Fact("Stalled", True, Reason.OUT_OF_MEMORY, f"{text}; {self._arithmetic(view, row)}")
                return Fact("Stalled", True, Reason.CONFIG_REJECTED, text)
        for row, seen in current:
            exit_ = row.last_exit
            if exit_ is not None and exit_.cause is Cause.SOURCE and seen.process.gone:
                reason = Reason(exit_.reason) if exit_.reason in set(Reason) else Reason.NOT_FOUND
                often = f"tried again every {format_duration(rollout.SOURCE_SECONDS)}"
                return Fact("Stalled", True, reason, f"{row.id}: {exit_.reason}: {exit_.message}; {often}")
        for row, seen in current:
            if row.restarts >= status.CRASH_LOOP_RESTARTS and not seen.routed:
                text = f"{row.id} ended {row.restarts} times" + (f": {row.message}" if row.message else "")
                return Fact("Stalled", True, Reason.CRASH_LOOP, text)
        leaving = any(row.goal is Goal.DRAIN for row in self._store.replicas()) or any(
            stored.deletion_time is not None for stored in self._store.objects("model")
        )
        if lacking is not None and not leaving:
            return Fact("Stalled", True, lacking.reason, lacking.message)
        failure = self._gateway.failure()
        if failure is not None and not desired.deleting and available == 0:
            return failure
        if late and not settled:
            deadline = view.stored.resolved["rollout"]["progressDeadline"]
            return Fact("Stalled", True, Reason.PROGRESS_DEADLINE, f"no progress for {deadline}")
        return Fact("Stalled", False, Reason.PROGRESS_MADE)

    # ── routing ───────────────────────────────────────────────────────────────────────────────────────────

    def routables(self) -> list[Routable]:
        """Every model that is routed, with its replicas: the input of `routes.build`."""
        found = []
        for stored in self._store.objects("model"):
            if stored.deletion_time is not None:
                continue
            revision = self._revision(stored)
            rows = self._store.replicas(stored.key.name)
            pairs = tuple((row, seen_of(row, self._fleet.observed(row.id))) for row in rows)
            placements = {
                r.template_hash: Placement.from_dict(r.placement) for r in self._store.revisions(stored.uid)
            }
            texts = {
                row.id: Text(placed.tokenizer_dir, placed.chat_template_file)
                for row in rows
                if (placed := placements.get(row.template_hash)) is not None
            }
            route = self._route(stored, revision, placements, pairs)
            found.append(Routable(route, pairs, {row.id: self.socket_of(row) for row in rows}, texts))
        return found

    def _route(
        self,
        stored: StoredObject,
        revision: Revision,
        placements: Mapping[str, Placement],
        pairs: tuple[tuple[Row, Seen], ...],
    ) -> wire.ModelRoute:
        """A table entry without replicas, with the current revision's text. Bounds are the narrowest among the
        revisions that are ready; `placements` are by template hash."""
        placement = Placement.from_dict(revision.placement)
        ready = {row.template_hash for row, seen in pairs if seen.process is Process.READY}
        narrow = [placed for template, placed in placements.items() if template in ready] or [placement]
        batching = stored.resolved["batching"]
        return wire.ModelRoute(
            model=stored.key.name,
            names=tuple(stored.resolved["servedModelNames"]),
            revision=revision.n,
            template_hash=revision.template_hash,
            tokenizer_dir=placement.tokenizer_dir,
            chat_template_file=placement.chat_template_file,
            max_model_len=min(p.max_model_len for p in narrow),
            kv_tokens=min(p.kv_tokens for p in narrow),
            max_queue_length=batching["maxQueueLength"],
            max_queue_wait=parse_duration(batching["maxQueueWait"]),
            created=int(stored.created_at),
            replicas=(),
            eta=self._eta(revision, pairs) if not ready else None,
            stopped=stored.resolved["replicas"] == 0,
            stall_seconds=stall_timeout(stored.resolved),
        )

    def _eta(self, revision: Revision, pairs: tuple[tuple[Row, Seen], ...]) -> float | None:
        """Seconds until the first starting replica should be ready, by how long the last one took."""
        started = [row.launched_at for row, seen in pairs if seen.process is Process.STARTING]
        if revision.load_seconds is None or not started:
            return None
        return max(1.0, revision.load_seconds - (self._clock() - min(started)))


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


ROUTES = Key("routes", "router")
"""The key under which the routing table is reconciled."""


def limits_of(resolved: Mapping[str, Any], digest: str) -> wire.Limits:
    """The hot knobs of a resolved spec, for running engines."""
    batching = resolved["batching"]
    return wire.Limits(
        hot_hash=digest,
        max_num_seqs=batching["maxNumSeqs"],
        max_num_batched_tokens=batching["maxNumBatchedTokens"],
        chunked_prefill=batching["chunkedPrefill"],
    )


def _was(before: Mapping[str, Any], type_: str, reason: Reason) -> bool:
    return any(
        c["type"] == type_ and c["status"] == "True" and c["reason"] == reason.value
        for c in before.get("conditions", ())
    )
