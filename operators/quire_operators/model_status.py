"""The status of a model as people read it: conditions with their reasons, progress, replicas; and its events.

`ModelStatus.write` makes one document of one pass's view. The facts are in order of what a reader asks first; the
words of conditions and summaries are `status`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from quire_operators import canary as canaries
from quire_operators import exam, rollout, status
from quire_operators.analysis import Measured
from quire_operators.cache import HubCache
from quire_operators.clock import on_the_wall
from quire_operators.desired import Canary, Effective, is_on_demand
from quire_operators.devices import Inventory, gpus_text, held
from quire_operators.downloads import Progress
from quire_operators.fleet.local import LocalFleet
from quire_operators.gateway import GatewayReconciler
from quire_operators.observed import Report, report_of
from quire_operators.overrides import Kind, Override
from quire_operators.placement import Placement
from quire_operators.records import Revision, StoredObject
from quire_operators.rollout import Cause, Desired, Goal, Process, Row, Seen, World
from quire_operators.status import Fact, Reason
from quire_operators.store import Store
from quire_schemas import wire
from quire_schemas.quantities import format_bytes, format_duration, parse_duration, parse_percent


@dataclass(frozen=True, slots=True)
class View:
    """One pass's view of a model."""

    wanted: Effective
    placement: Placement
    """Of the revision that is to serve."""
    desired: Desired
    world: World
    fetching: Progress | None = None
    """What its files still lack; None when all are there and verified."""
    unusable: str | None = None
    """Why the router cannot serve it, whatever its replicas do."""
    short: bool = False
    """It is asked for, and there is no room for it that anybody can make."""
    yields: bool = False
    """A model that is there on demand may leave for it."""
    tried: Tried | None = None
    """The canary beside it."""
    listed: bool = True
    """The router answers to its names."""

    @property
    def stored(self) -> StoredObject:
        """The model with the spec in force."""
        return self.wanted.stored

    @property
    def revision(self) -> Revision:
        """The revision that is to serve."""
        return self.wanted.revision

    def is_current(self, row: Row) -> bool:
        return rollout.is_current(self.desired, row)


@dataclass(frozen=True, slots=True)
class Tried:
    """A canary as one pass sees it."""

    alone: View
    """Its replicas, as if there were no others."""
    canary: Canary
    against: int
    """The stable revision."""
    compared: wire.Comparison | None
    """What was counted of it and of the stable revision; None before there is anything."""

    def decision(self, now: float) -> canaries.Decision | None:
        """What its numbers say; None before it has begun."""
        if self.canary.stage is None or self.compared is None:
            return None
        stable, new = Measured.of(self.compared.stable), Measured.of(self.compared.new)
        return canaries.decide(self.canary.policy, self.canary.stage, stable, new, now)

    @property
    def verdict(self) -> exam.Verdict | None:
        """That of its exam, while this is on: from when a replica of it serves until its first step."""
        paper, replicas = self.canary.policy.paper, self.alone.world.replicas
        serves = any(seen.routed and row.ready_since is not None for row, seen in replicas)
        if paper is None or self.canary.stage is not None or not serves:
            return None
        return exam.judge(paper, self.compared.examined if self.compared is not None else None)

    @property
    def failed(self) -> str:
        """Why it has failed its exam or a gate, where it is kept nevertheless."""
        return self.canary.stage.failed if self.canary.stage is not None else ""

    def down(self, now: float) -> str:
        """Why it is not worth another try, as it does not come up or stay up: `REASON: sentence`; else empty."""
        found = rollout.failure(self.alone.desired, self.alone.world, now)
        return "" if found is None else ": ".join(found)

    def turns_at(self) -> tuple[float, ...]:
        """When the time of its step is over, and when it has waited for requests for too long after that."""
        if self.canary.stage is None:
            return ()
        over = self.canary.stage.since + self.canary.policy.steps[self.canary.step].hold
        return over, over + parse_duration(self.alone.stored.resolved["rollout"]["progressDeadline"])

    def is_inconclusive(self, now: float) -> bool:
        """Whether it has waited for requests for the progress deadline, and does not go on without them."""
        decision = self.decision(now)
        return isinstance(decision, canaries.Stay) and decision.inconclusive and now >= self.turns_at()[1]

    def text(self, now: float) -> str:
        """Where it stands, in a sentence."""
        policy, step, n = self.canary.policy, self.canary.step, self.canary.revision.n
        if self.failed:
            return f"revision {n} has no requests, and is kept as autoRollback is false: {self.failed}"
        if down := self.down(now):
            kept = "" if policy.gives_up else ", and is kept as autoRollback is false"
            return f"revision {n} is a canary whose engine fails{kept}: {down}"
        if (verdict := self.verdict) is not None:
            return f"revision {n} is a canary beside revision {self.against}: {verdict.text}"
        if self.canary.stage is None:
            return f"revision {n} is a canary; its first replica is on its way"
        seen = max(self.seen, 0)
        weight = policy.steps[step].weight
        text = f"revision {n} at step {step + 1} of {len(policy.steps)}: {weight} % of the requests"
        if weight:
            text += f", {seen} of {policy.min_requests} seen"
        decision = self.decision(now)
        if isinstance(decision, canaries.Stay) and decision.inconclusive:
            return text + "; its time is over, and it waits for requests"
        left = self.turns_at()[0] - now
        return text + (f", {format_duration(max(round(left), 1))} left" if left > 0 else "")

    @property
    def seen(self) -> int:
        """Requests of this step."""
        before = self.canary.stage.before if self.canary.stage is not None else 0
        return self.compared.new.requests - before if self.compared is not None else 0

    def document(self, now: float) -> dict[str, Any]:
        """As the status shows it."""
        policy, stage = self.canary.policy, self.canary.stage
        shown: dict[str, Any] = {
            "revision": self.canary.revision.n,
            "step": self.canary.step + 1 if stage is not None else 0,
            "steps": [{"weight": step.weight, "hold": format_duration(step.hold)} for step in policy.steps],
            "requests": max(self.seen, 0),
            "minRequests": policy.min_requests,
            "gates": [],
        }
        if failure := self.failed or self.down(now):
            shown["failure"] = failure
        if (verdict := self.verdict) is not None:
            shown["exam"] = {"state": type(verdict).__name__, "text": verdict.text}
            if isinstance(verdict, exam.Waits):
                shown["exam"] |= {"asked": verdict.asked, "questions": verdict.questions}
        elif stage is not None and stage.examined:
            shown["exam"] = {"state": exam.Passed.__name__, "text": stage.examined}
        if "exam" in shown:
            shown["exam"]["against"] = self.against
        if self.compared is not None:
            stable, new = Measured.of(self.compared.stable), Measured.of(self.compared.new)
            shown["total"] = {"stable": stable.requests, "new": new.requests}
            shown["gates"] = [
                {
                    "name": gate.name,
                    "stable": gate.stable,
                    "new": gate.new,
                    "limit": gate.limit,
                    "relative": gate.relative,
                    "beyond": gate.beyond,
                }
                for gate in canaries.gates(policy, stable, new)
            ]
        return shown


class ModelStatus:
    """Writes statuses; `changed` is called when one reads otherwise than before. `clock` as the store's."""

    def __init__(
        self,
        store: Store,
        fleet: LocalFleet,
        gateway: GatewayReconciler,
        cache: HubCache,
        detect: Callable[[], Inventory],
        clock: Callable[[], float],
        changed: Callable[[], None],
    ) -> None:
        self._store = store
        self._fleet = fleet
        self._gateway = gateway
        self._cache = cache
        self._detect = detect
        self._clock = clock
        self._changed = changed
        self._began = clock()

    def write(self, view: View, *, no_room: bool, waits: Mapping[str, str]) -> float | None:
        """Write the status and its events; gives the time of the progress deadline while it is ahead. `waits`
        says of replicas that were due why they were not started yet."""
        now = self._clock()
        stored, desired, pairs = view.stored, view.desired, view.world.replicas
        before = self._store.status(stored.uid)
        want = 0 if desired.deleting else desired.replicas
        current = [(row, seen) for row, seen in pairs if view.is_current(row)]
        available = [row for row, seen in pairs if rollout.is_available(desired, row, seen, now)]
        updated = [row for row in available if view.is_current(row)]
        settled = rollout.is_settled(desired, view.world, now)
        shown_pairs = (*pairs, *view.tried.alone.world.replicas) if view.tried is not None else pairs
        reports = {row.id: report_of(row, self._fleet.observed(row.id)) for row, _ in shown_pairs}
        replicas = [self._replica(row, seen, reports[row.id], waits.get(row.id)) for row, seen in shown_pairs]
        signature: list[Any] = [
            [r["id"], r["incarnation"], r["state"], reports[r["id"]].bytes_done] for r in replicas
        ]
        fetching = view.fetching
        if fetching is not None:
            signature.append(fetching.done)
        signature = [*_aim(view.wanted), [view.world.router.value, *signature]]
        since = before["progressAt"] if signature == before.get("signature") else now
        deadline = self._deadline(since, stored)
        late = not settled and now >= deadline and rollout.lags(desired, view.world, now)
        waiting = view.tried is not None and isinstance(view.tried.verdict, exam.Waits)
        unasked = waiting and not desired.held and now >= deadline
        facts = self._facts(view, no_room, waits, len(available), settled, late=late, unasked=unasked)
        facts += _accelerated(reports.values()) + _deterministic(reports.values())
        wall = on_the_wall(now, self._clock)
        shown = status.conditions(facts, before.get("conditions", ()), stored.generation, wall)
        loading = max(((report.bytes_done, report.bytes_total) for report in reports.values()), default=(0, 0))
        loaded = [seen for _, seen in current if seen.process is Process.READY]
        manifest_serves = view.wanted.is_newest  # the steps are those of what was applied
        reached = {
            "accepted": True,
            "weights": fetching is None,
            "device": bool(current) or want == 0,
            "loaded": manifest_serves and (bool(loaded) or want == 0),
            "ready": manifest_serves and len(updated) >= want,
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
                # of the files: in memory there may be fewer
                details["loaded"] = {"bytesDone": loading[0], "bytes": loading[1] or view.placement.weights}
        served = max((row.revision for row in available), default=before.get("servedRevision"))
        document = {
            "observedGeneration": stored.generation,
            "summary": status.summary(facts, len(available), want, len(updated), deleting=desired.deleting),
            "servedRevision": view.revision.n if settled and want else served,
            "stableRevision": view.wanted.stable.n if view.wanted.stable is not None else None,
            "rollout": {
                "revision": view.revision.n,
                "settled": settled and view.tried is None,
                "strategy": stored.resolved["rollout"]["strategy"],
                "held": desired.held,
                **({"canary": view.tried.document(now)} if view.tried is not None else {}),
            },
            "overrides": [
                self._override(each)
                for each in view.wanted.overrides.values()
                if each.kind is not Kind.CANARY  # it is shown as where the rollout stands
            ],
            "replicas": {
                "desired": want,
                "live": sum(not seen.process.gone for _, seen in pairs),
                "ready": len(available),
                "updated": len(updated),
                "draining": sum(row.goal is Goal.DRAIN for row, _ in pairs),
            },
            "endpoints": {**self._gateway.endpoints(), "modelNames": stored.resolved["servedModelNames"]},
            "resolved": view.placement.resolved(stored.resolved),
            "progress": status.progress(
                before.get("progress"), stored.generation, reached, now - stored.applied_at, **details
            ),
            "conditions": shown,
            "remedies": status.remedies(str(stored.key), shown),
            "replicaList": replicas,
            "signature": signature,
            "progressAt": since,
        }
        if self._store.put_status(stored.uid, document):
            self._changed()
        self._note_fetch(stored, facts, before)
        for fact in facts:
            grave = (fact.type == "Stalled" and fact.status) or fact.reason is Reason.REFERENCE_KERNELS
            if grave and not _was(before, fact):
                self._store.add_event(stored.key, "Warning", fact.reason.value, fact.message)
        if view.tried is not None:
            ahead = [at for at in (deadline, *view.tried.turns_at()) if at > now]
            return min(ahead, default=None)
        return None if settled or now >= deadline else deadline

    def is_late(self, wanted: Effective) -> bool:
        """Whether the last status tells of a rollout of this very revision that has made no progress for too
        long."""
        before = self._store.status(wanted.stored.uid)
        if before.get("signature", [])[:-1] != _aim(wanted) or before["rollout"]["settled"]:
            return False
        return self._clock() >= self._deadline(before["progressAt"], wanted.stored)

    def _deadline(self, since: float, stored: StoredObject) -> float:
        """Until when something has to move. Nothing can have while no control plane was there to see it."""
        return max(since, self._began) + parse_duration(stored.resolved["rollout"]["progressDeadline"])

    def _override(self, override: Override) -> dict[str, Any]:
        """A decision as it is shown."""
        shown = {"kind": override.kind.value, "by": override.by, "reason": override.reason}
        for name in ("replicas", "revision"):
            if (value := getattr(override, name)) is not None:
                shown[name] = value
        for name, at in (("since", override.at), ("until", override.until)):
            if at is not None:
                shown[name] = status.timestamp(on_the_wall(at, self._clock))
        return shown

    def _note_fetch(self, stored: StoredObject, facts: Sequence[Fact], before: Mapping[str, Any]) -> None:
        """An event when a fetch begins, fails or ends."""
        fetched = next(fact for fact in facts if fact.type == "Fetched")
        was = next((c["reason"] for c in before.get("conditions", ()) if c["type"] == "Fetched"), None)
        if was == fetched.reason or (was is None and fetched.status):
            return
        kind = "Normal" if fetched.reason in (Reason.VERIFIED, Reason.DOWNLOADING) else "Warning"
        self._store.add_event(stored.key, kind, fetched.reason.value, fetched.message)

    def _replica(self, row: Row, seen: Seen, report: Report, waits: str | None) -> dict[str, Any]:
        own = next((o for o in self._fleet.observed(row.id) if o.nonce == row.nonce), None)
        state = rollout.state_of(row, seen)
        message = waits or row.message
        if state == "Starting" and report.event == "loading" and report.bytes_total:
            message = f"loading {format_bytes(report.bytes_done)} of {format_bytes(report.bytes_total)}"
        if state == "Ready" and seen.failing:
            message = "fails what it is given: one request at a time tries it"
        times = {
            "Ready": row.ready_since,
            "Draining": row.drain_since,
            "Stopping": row.stop_sent,
            "Starting": row.launched_at,
            **dict.fromkeys(("Backoff", "Failed"), row.last_exit.at if row.last_exit is not None else None),
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
            "logLost": own.log_lost if own is not None else 0,
        }

    def _facts(
        self,
        view: View,
        no_room: bool,
        waits: Mapping[str, str],
        available: int,
        settled: bool,
        *,
        late: bool,
        unasked: bool,
    ) -> list[Fact]:
        desired, world = view.desired, view.world
        want = 0 if desired.deleting else desired.replicas
        hot_pending = any(
            seen.hot_hash not in (None, desired.hot_hash) for row, seen in world.replicas if view.is_current(row)
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
            self._ready_fact(view, waits, available, want),
        ]
        if settled and hot_pending and view.tried is None:
            facts.append(Fact("RolledOut", False, Reason.HOT_UPDATE_PENDING, "an engine runs older settings"))
        else:
            facts.append(self._rolled_out_fact(view, settled))
        facts.append(self._stalled_fact(view, lacking, available, settled, late=late, unasked=unasked))
        return facts

    def _rolled_out_fact(self, view: View, settled: bool) -> Fact:
        wanted = view.wanted
        pin, quarantine = wanted.overrides.get(Kind.PIN), wanted.overrides.get(Kind.QUARANTINE)
        how = f"revision {view.revision.n} " + ("serves" if settled else "is on its way")
        if view.desired.deleting:
            return Fact("RolledOut", False, Reason.DELETING)
        if not wanted.is_newest and pin is not None:
            text = f"{how}: pinned by {pin.by}; revision {wanted.newest.n} is what the manifest says"
            return Fact("RolledOut", False, Reason.PINNED, text)
        hold = wanted.overrides.get(Kind.HOLD)
        if hold is not None and view.tried is not None:
            text = f"rollouts paused by {hold.by}" + _because(hold)
            return Fact("RolledOut", False, Reason.HELD, f"{view.tried.text(self._clock())}; {text}")
        if hold is not None and not (settled and wanted.is_newest):
            return Fact("RolledOut", False, Reason.HELD, f"{how}: rollouts paused by {hold.by}" + _because(hold))
        if not wanted.is_newest and quarantine is not None:
            text = f"{how}; revision {wanted.newest.n} was given up: {quarantine.reason}"
            return Fact("RolledOut", False, Reason.ROLLED_BACK, text)
        if view.tried is not None:
            failed = self._failed_canary(view.tried)
            reason = failed.reason if failed is not None else Reason.CANARY
            return Fact("RolledOut", False, reason, view.tried.text(self._clock()))
        if settled:
            return Fact("RolledOut", True, Reason.UP_TO_DATE, f"revision {view.revision.n}")
        return Fact("RolledOut", False, Reason.PROGRESS_MADE)

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
        now = self._cache.commit_of(spec["source"].removeprefix("hf://"), branch)
        if now is None or now == commit:
            return ""
        return f"; {branch} is at {now[:12]} in the cache by now, this model stays at {commit[:12]}"

    def _ready_fact(self, view: View, waits: Mapping[str, str], available: int, want: int) -> Fact:
        world = view.world
        if available:
            return Fact("Ready", True, Reason.SERVING, f"{available} of {want} replicas")
        if (pause := view.wanted.overrides.get(Kind.PAUSE)) is not None:
            until = ""
            if pause.until is not None:
                until = f" until {status.timestamp(on_the_wall(pause.until, self._clock))}"
            return Fact("Ready", False, Reason.PAUSED, f"paused by {pause.by}{until}" + _because(pause))
        if want == 0 and not view.wanted.standby:
            return Fact("Ready", False, Reason.STOPPED, "no replica is asked for")
        if world.router is not rollout.Router.KNOWN:
            return Fact("Ready", False, Reason.ROUTER_NOT_READY, self._without_router(world, want))
        if view.unusable is not None:
            return Fact("Ready", False, Reason.MODEL_UNUSABLE, view.unusable)
        if view.wanted.standby and view.fetching is None:
            if view.short:
                text = "requests wait for it, and nothing can be unloaded to make room"
                return Fact("Ready", False, Reason.INSUFFICIENT_MEMORY, text)
            if not view.listed:
                return Fact("Ready", False, Reason.ROUTER_NOT_READY, "the router is about to be told of it")
            if not is_on_demand(view.stored.resolved):
                return Fact("Ready", True, Reason.SCALED_TO_ZERO, "brought back by the next request")
            return Fact("Ready", True, Reason.ON_DEMAND, "loaded by the next request")
        for row, _ in world.replicas:
            if row.reason == rollout.STALLED:
                return Fact(
                    "Ready", False, Reason.ENGINE_STALLED, f"{row.id}: {row.message or 'it is being killed'}"
                )
        if view.fetching is not None and not world.replicas:
            failure_ = view.fetching.failure
            return Fact("Ready", False, Reason(failure_.reason) if failure_ is not None else Reason.DOWNLOADING)
        for replica, why in waits.items():
            return Fact("Ready", False, Reason.STARTING, f"{replica} {why}")
        starting = any(seen.process is Process.STARTING for _, seen in world.replicas)
        if starting or any(seen.process is Process.READY for _, seen in world.replicas):
            return Fact("Ready", False, Reason.STARTING, "requests are held meanwhile")
        return Fact("Ready", False, Reason.NO_REPLICA_AVAILABLE)

    def _without_router(self, world: World, want: int) -> str:
        """What is there, and what is not."""
        failure = self._gateway.failure()
        why = failure.message if failure else "the router starts"
        ready = sum(seen.process is Process.READY for _, seen in world.replicas)
        return f"{ready} of {want} replicas are ready, and no router serves: {why}" if ready else why

    def _lacking(self, view: View) -> Fact:
        """Scheduled is False: what a replica needs and what there is."""
        placement = view.placement
        need = format_bytes(placement.memory)
        taken = held(self._store.replicas())
        if placement.device == "cuda":
            text = f"a replica needs a GPU with {need} free: {gpus_text(self._detect(), taken)}"
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
        self, view: View, lacking: Fact | None, available: int, settled: bool, *, late: bool, unasked: bool
    ) -> Fact:
        desired = view.desired
        current = [(row, seen) for row, seen in view.world.replicas if view.is_current(row)]
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
        if view.unusable is not None and not desired.deleting:
            return Fact("Stalled", True, Reason.MODEL_UNUSABLE, view.unusable)
        if lacking is not None and not view.yields and not self._something_leaves():
            return Fact("Stalled", True, lacking.reason, lacking.message)
        failure = self._gateway.failure()
        # where there is a router now and then, that is no other state each time
        steady = failure is not None and failure.reason is Reason.ROUTER_CRASH_LOOP
        if failure is not None and not desired.deleting and (available == 0 or steady):
            return failure
        if view.tried is not None and (failed := self._failed_canary(view.tried)) is not None:
            return failed
        if view.tried is not None and (view.tried.is_inconclusive(now := self._clock()) or unasked):
            return Fact("Stalled", True, Reason.INCONCLUSIVE, view.tried.text(now))
        if late and not settled:
            deadline = view.stored.resolved["rollout"]["progressDeadline"]
            return Fact("Stalled", True, Reason.PROGRESS_DEADLINE, f"no progress for {deadline}")
        return Fact("Stalled", False, Reason.PROGRESS_MADE)

    def _failed_canary(self, tried: Tried) -> Fact | None:
        """Why a canary that failed is stuck, where it is not given up."""
        now = self._clock()
        if tried.canary.policy.gives_up:
            return None
        if tried.failed:
            return Fact("Stalled", True, Reason.CANARY_FAILED, tried.text(now))
        return Fact("Stalled", True, Reason.CANARY_DOWN, tried.text(now)) if tried.down(now) else None

    def _something_leaves(self) -> bool:
        """Whether room is about to be made."""
        return any(row.goal is Goal.DRAIN for row in self._store.replicas()) or any(
            stored.deletion_time is not None for stored in self._store.objects("model")
        )


def _aim(wanted: Effective) -> list[Any]:
    """What a rollout is for: another aim begins its time anew."""
    decided = sorted([each.kind.value, each.at] for each in wanted.overrides.values())
    return [wanted.stored.generation, wanted.revision.n, decided]


def _because(override: Override) -> str:
    return f": {override.reason}" if override.reason else ""


def _was(before: Mapping[str, Any], fact: Fact) -> bool:
    """Whether the condition had this reason already."""
    return any(c["type"] == fact.type and c["reason"] == fact.reason.value for c in before.get("conditions", ()))


def _accelerated(reports: Iterable[Report]) -> list[Fact]:
    """Whether engines compute with the kernels made for their device; nothing while none has said so."""
    loaded = [report for report in reports if report.event == "ready" and report.backend]
    lacking = next((report.backend_lacking for report in loaded if report.backend_lacking), None)
    if lacking is not None:
        return [Fact("Accelerated", False, Reason.REFERENCE_KERNELS, lacking)]
    return [Fact("Accelerated", True, Reason.NATIVE_KERNELS, loaded[0].backend)] if loaded else []


def _deterministic(reports: Iterable[Report]) -> list[Fact]:
    """That the engines have found themselves batch-invariant, where that was asked of them."""
    if any(report.event == "ready" and report.batch_invariant for report in reports):
        return [Fact("Deterministic", True, Reason.ATTESTED, "alone, in chunks and in company, bit by bit")]
    return []
