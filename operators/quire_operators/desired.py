"""A stored model as the rollout's planner sees it: durations in seconds, ways as the planner names them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quire_operators import rollout
from quire_operators.store import Revision, StoredObject
from quire_schemas.model import LivenessProbe
from quire_schemas.quantities import parse_duration
from quire_schemas.update import hot_hash


def desired_of(stored: StoredObject, revision: Revision) -> rollout.Desired:
    """The planner's view of one stored model."""
    spec = stored.resolved
    return rollout.Desired(
        model=stored.key.name,
        generation=stored.generation,
        revision=revision.n,
        template_hash=revision.template_hash,
        replicas=spec["replicas"],
        deleting=stored.deletion_time is not None,
        **rollout_options(spec),
    )


def rollout_options(spec: Mapping[str, Any]) -> dict[str, Any]:
    """The knobs of a rollout in the planner's units."""
    ways = spec["rollout"]
    return {
        "strategy": rollout.Strategy(ways["strategy"]),
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


def stall_timeout(spec: Mapping[str, Any]) -> float:
    """Seconds without a step after which an engine counts as stalled. A spec that was resolved by a version that
    had no such field has its default."""
    declared = spec["probes"]["liveness"] or LivenessProbe().model_dump(mode="json", by_alias=True)
    return parse_duration(declared["timeout"])
