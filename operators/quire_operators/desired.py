"""What is to run of a stored model, as the rollout's planner sees it: durations in seconds, ways as it names them.

`effective` joins the intent with what was decided beside it (`overrides`): which revision serves, how many
replicas there are, whether a rollout may go on. What is hot follows the newest intent whichever revision serves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from quire_operators import autoscaling, canary, rollout
from quire_operators.overrides import Kind, Override, Overrides, in_force
from quire_operators.placement import Placement
from quire_operators.records import Revision, StoredObject
from quire_operators.rollout import Row
from quire_schemas import wire
from quire_schemas.model import BreakerProbe, LivenessProbe
from quire_schemas.quantities import parse_duration, parse_percent
from quire_schemas.update import hot_hash, under_template

CRASHES_BEFORE_ROLLBACK = 3
"""Of one replica of a new revision, where `restartPolicy.maxRestartsBeforeRollback` is left out."""


@dataclass(frozen=True, slots=True)
class Canary:
    """A new revision that is tried beside the one that is to serve."""

    revision: Revision
    policy: canary.Policy
    stage: canary.Stage | None
    """None until a replica of it serves."""
    is_noted: bool
    """It is on record, so that its replicas are known for what they are, however it ends."""

    @property
    def step(self) -> int:
        """From 0."""
        return 0 if self.stage is None else self.stage.step


@dataclass(frozen=True, slots=True)
class Effective:
    """What is to run of a model: `stored` with the spec in force, the revision that is to serve, and the one that
    would serve without pin or quarantine."""

    stored: StoredObject
    revision: Revision
    newest: Revision
    overrides: Overrides
    stable: Revision | None
    """The last revision that was rolled out as a whole."""
    fallback: Revision | None
    """The last one that was, of another template than the one that is to serve."""
    full: int
    """Replicas that it has while it is in memory."""
    standby: bool
    """It is there when it is asked for, and not in memory now."""
    canary: Canary | None = None

    @property
    def set_aside(self) -> str:
        """The template of a canary that is over and did not take over: what still runs of it gets no requests."""
        kept = self.overrides.get(Kind.CANARY)
        if kept is None or kept.template_hash == self.revision.template_hash:
            return ""
        goes_on = self.canary is not None and self.canary.revision.template_hash == kept.template_hash
        return "" if goes_on or canary.is_promoted(kept) else kept.template_hash

    @property
    def is_newest(self) -> bool:
        return self.revision.n == self.newest.n


def effective(
    stored: StoredObject, revisions: Sequence[Revision], overrides: Sequence[Override], now: float
) -> Effective:
    """The intent with what was decided beside it."""
    newest = next(revision for revision in revisions if revision.n == stored.revision)
    current = in_force(overrides, now)
    pin, quarantine = current.get(Kind.PIN), current.get(Kind.QUARANTINE)
    revision = newest
    if (kept := pin or current.get(Kind.HOLD)) is not None:
        revision = next((each for each in revisions if each.n == kept.revision), newest)
    elif quarantine is not None and quarantine.template_hash == newest.template_hash:
        revision = last_stable(revisions, newest.template_hash) or newest
    tried = _canary(stored, newest, last_stable(revisions), current)
    if tried is not None:
        revision = last_stable(revisions) or newest
    spec = stored.resolved
    if revision.n != newest.n:
        spec = under_template(revision.resolved, spec, Placement.from_dict(revision.placement).limits())
    full, idle = _how_many(spec, current)
    standby = idle or (full > 0 and is_on_demand(spec) and Kind.RESIDENT not in current)
    replicas = 0 if standby else full
    if replicas != spec["replicas"]:
        spec = {**spec, "replicas": replicas}
    return Effective(
        stored=replace(stored, resolved=spec),
        revision=revision,
        newest=newest,
        overrides=current,
        stable=last_stable(revisions),
        fallback=last_stable(revisions, revision.template_hash),
        full=full,
        standby=standby,
        canary=tried,
    )


def _canary(stored: StoredObject, newest: Revision, stable: Revision | None, current: Overrides) -> Canary | None:
    """The newest revision as a canary, where it is one: another one is stable, and neither a person nor a failure
    has decided otherwise. A pause of rollouts keeps one from beginning, and one that has begun where it is."""
    policy = canary.policy_of(stored.resolved)
    if policy is None or stable is None or stable.template_hash == newest.template_hash or stored.deletion_time:
        return None
    quarantine, kept = current.get(Kind.QUARANTINE), current.get(Kind.CANARY)
    given_up = quarantine is not None and quarantine.template_hash == newest.template_hash
    if given_up or Kind.PIN in current:
        return None
    if kept is not None and kept.template_hash != newest.template_hash:
        kept = None
    if kept is None and Kind.HOLD in current:
        return None
    stage = canary.Stage.of(kept) if kept is not None else None
    if stage is not None and stage.step >= len(policy.steps):
        return None
    return Canary(newest, policy, stage, is_noted=kept is not None)


def as_canary(wanted: Effective, tried: Canary) -> Effective:
    """What is to run of the new revision alone: as many replicas as its step needs, the stable one behind it."""
    stored, full = wanted.stored, wanted.stored.resolved["replicas"]
    replicas = tried.policy.replicas(tried.step, full) if full else 0
    spec = {**tried.revision.resolved, "replicas": replicas}
    return replace(
        wanted,
        stored=replace(stored, resolved=spec),
        revision=tried.revision,
        fallback=wanted.revision,
        full=replicas,
        canary=None,
    )


def _how_many(spec: Mapping[str, Any], current: Overrides) -> tuple[int, bool]:
    """Replicas while it is in memory; and whether the load has none of it in memory, as nobody asks."""
    if Kind.PAUSE in current:
        return 0, False
    if (scale := current.get(Kind.SCALE)) is not None and scale.replicas is not None:
        return scale.replicas, False
    if (policy := autoscaling.policy_of(spec)) is None:
        return int(spec["replicas"]), False
    followed = current.get(Kind.AUTOSCALE)
    if followed is None or followed.replicas is None:
        return autoscaling.first_count(policy), False
    replicas = policy.clamp(followed.replicas)
    return (replicas, False) if replicas else (1, True)


def priority_of(spec: Mapping[str, Any]) -> int:
    """Of a resolved spec: who comes first where room is short. One of a version without the field has 0."""
    return int(spec["placement"].get("priority", 0))


def is_on_demand(spec: Mapping[str, Any]) -> bool:
    """Whether a resolved spec has its model in memory only while somebody asks for it."""
    return spec.get("residency") == "onDemand"


def declared_replicas(spec: Mapping[str, Any]) -> int:
    """Replicas that a resolved spec begins with, whatever was decided beside it."""
    policy = autoscaling.policy_of(spec)
    return int(spec["replicas"]) if policy is None else autoscaling.first_count(policy)


def comes_and_goes(spec: Mapping[str, Any]) -> bool:
    """Whether replicas of a resolved spec come and go by the use that the router tells of."""
    return is_on_demand(spec) or spec.get("autoscaling") is not None


def last_stable(revisions: Sequence[Revision], without: str = "") -> Revision | None:
    """The revision that was rolled out as a whole last, of those of another template than `without`."""
    found = [each for each in revisions if each.stable_at is not None and each.template_hash != without]
    return max(found, key=lambda each: (each.stable_at, each.n), default=None)


def desired_of(wanted: Effective) -> rollout.Desired:
    """The planner's view of what is to run."""
    stored, revision, overrides = wanted.stored, wanted.revision, wanted.overrides
    spec = stored.resolved
    restart, quarantine = overrides.get(Kind.RESTART), overrides.get(Kind.QUARANTINE)
    given_up = quarantine.template_hash if quarantine is not None else ""
    most = spec["restartPolicy"].get("maxRestartsBeforeRollback")
    # what serves because of a pin or a rollback has nothing behind it
    can_go_back = spec["rollout"]["autoRollback"] and wanted.is_newest and wanted.fallback is not None
    return rollout.Desired(
        model=stored.key.name,
        generation=stored.generation,
        revision=revision.n,
        template_hash=revision.template_hash,
        replicas=spec["replicas"],
        deleting=stored.deletion_time is not None,
        held=Kind.HOLD in overrides,
        restarted_at=restart.at if restart is not None else 0.0,
        proven=revision.stable_at is not None,
        fallback=wanted.fallback.n if can_go_back and wanted.fallback is not None else None,
        crashes_before_rollback=most or CRASHES_BEFORE_ROLLBACK,
        quarantined=given_up if given_up != revision.template_hash else "",
        **rollout_options(spec),
    )


def rollout_options(spec: Mapping[str, Any]) -> dict[str, Any]:
    """The knobs of a rollout in the planner's units."""
    ways = spec["rollout"]
    return {
        # what a canary leaves to do when it is promoted is done as by default
        "strategy": rollout.Strategy("Auto" if ways["strategy"] == "Canary" else ways["strategy"]),
        "max_surge": ways["maxSurge"],
        "max_unavailable": ways["maxUnavailable"],
        "min_ready": parse_duration(ways["minReadyDuration"]),
        "drain_timeout": parse_duration(spec["drainTimeout"]),
        "startup_timeout": parse_duration(spec["probes"]["startup"]["timeout"]),
        "stall_timeout": stall_timeout(spec),
        "backoff_base": parse_duration(spec["restartPolicy"]["backoffBase"]),
        "backoff_max": parse_duration(spec["restartPolicy"]["backoffMax"]),
        "hot_hash": hot_hash(spec),
    }


def breaker_rules(spec: Mapping[str, Any]) -> wire.BreakerRules:
    """When a replica that fails gets no requests. As below of a spec that has no such field."""
    declared = spec["probes"].get("breaker") or BreakerProbe().model_dump(mode="json", by_alias=True)
    return wire.BreakerRules(
        failures=declared["consecutiveFailures"],
        share=parse_percent(declared["errorShare"]),
        window=parse_duration(declared["window"]),
        requests=declared["minRequests"],
        pause=parse_duration(declared["openFor"]),
        longest=parse_duration(declared["maxOpenFor"]),
        out=parse_percent(declared["maxEjected"]),
    )


def stall_timeout(spec: Mapping[str, Any]) -> float:
    """Seconds without a step after which an engine counts as stalled. A spec that was resolved by a version that
    had no such field has its default."""
    declared = spec["probes"]["liveness"] or LivenessProbe().model_dump(mode="json", by_alias=True)
    return parse_duration(declared["timeout"])


def own_rows(wanted: Effective, rows: Sequence[Row]) -> Sequence[Row]:
    """The rows of a model without those of its canary."""
    if wanted.canary is None:
        return rows
    return [row for row in rows if row.template_hash != wanted.canary.revision.template_hash]
