"""What a person, or the control plane itself, decided about a model beside its manifest.

None of it is part of an intent: applying the same manifest again takes nothing of it back, and a repository that
is applied every minute does not fight whoever is on call.

    scale        another number of replicas; until the manifest declares another one, or it is reset
    autoscale    as many replicas as the load calls for; while the manifest gives a range (`autoscaling`)
    pause        no replica at all; until it is resumed, or its time is over
    hold         what is to serve stays what it was then, and no rollout goes on; until it is resumed
    pin          an earlier revision serves (`platform rollout undo`); until the intent changes, or it is undone
    quarantine   a template that failed is not started again; until the intent changes, or it is retried
    restart      replicas that are older than it are replaced, one after the other
    canary       how far a new revision has come that serves a share of the requests (`canary`); until the intent
                 has another template
    resident     a model that is there on demand is in memory; until another one needs the room (`residency`)
    suspend      a git source applies nothing; until it is resumed, whatever its manifest says

The store keeps one of each kind for an object; `desired.effective` says what is to run because of them.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any


class Kind(enum.StrEnum):
    """What is decided."""

    SCALE = "scale"
    AUTOSCALE = "autoscale"
    PAUSE = "pause"
    HOLD = "hold"
    PIN = "pin"
    QUARANTINE = "quarantine"
    RESTART = "restart"
    RESIDENT = "resident"
    CANARY = "canary"
    SUSPEND = "suspend"


def ended_by_intent(old: Mapping[str, Any], new: Mapping[str, Any]) -> tuple[Kind, ...]:
    """Those that a new intent ends, from the resolved specs before and after."""
    scaled = (Kind.SCALE,) if old.get("replicas") != new.get("replicas") else ()
    fixed = (Kind.AUTOSCALE,) if new.get("autoscaling") is None else ()
    return (Kind.PIN, Kind.QUARANTINE, *scaled, *fixed)


@dataclass(frozen=True, slots=True)
class Override:
    """One decision. Times are the store's."""

    kind: Kind
    by: str
    at: float
    reason: str = ""
    until: float | None = None
    """When it ends by itself."""
    replicas: int | None = None
    """Of a scale, by a person or by the load."""
    revision: int | None = None
    """Of a pin and of a hold the one that serves, of a quarantine the one that failed."""
    template_hash: str = ""
    """Of a quarantine and a canary."""
    stage: dict[str, Any] | None = None
    """Of a canary that has begun: `canary.Stage`."""

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "kind": self.kind.value}

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> Override:
        return cls(**{**document, "kind": Kind(document["kind"])})


Overrides = Mapping[Kind, Override]


def in_force(overrides: Iterable[Override], now: float) -> Overrides:
    """Those whose time is not over, by kind."""
    return {each.kind: each for each in overrides if each.until is None or now < each.until}
