"""How a new revision takes over step by step: what to do now, from where its canary stands and what was measured.

    exam (`exam`) passed, if there is one
        ▼
    step by step: weight of the requests ──▶ hold elapsed and minRequests seen ──▶ the next step ──▶ … ──▶ Promote
                        │                          │ elapsed, and too few
                        │ worse at a gate          └──▶ onInconclusive: Hold waits, Rollback fails, Promote goes on
                        └──▶ Fail

Who fails, here or in the exam, is rolled back. Where `autoRollback` is false it stays, without requests, and what
becomes of it is a person's decision.

The stable revision keeps all its replicas until the canary is promoted; what follows is a rolling update. A step
of weight 0 has replicas that nobody's request goes to, and waits for its time alone. Measured is from the
beginning of the canary, of both revisions alike; a step counts the new one's requests from where it began. A
router that has started since counts anew, and so does the step; the looks begin anew, too, so that `ALPHA` holds
for each life of a router.

Pure: `decide` is given the time and what was measured; where a canary stands is a decision beside the intent.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from quire_operators.analysis import Gate, Limits, Measured, judge, next_look
from quire_operators.exam import Paper
from quire_operators.overrides import Kind, Override
from quire_schemas.quantities import format_duration, parse_duration, parse_percent


@dataclass(frozen=True, slots=True)
class Step:
    """One stage: percent of requests, and seconds that it lasts at least."""

    weight: int
    hold: float


@dataclass(frozen=True, slots=True)
class Policy:
    """`rollout.canary` of a resolved spec."""

    steps: tuple[Step, ...]
    min_requests: int
    limits: Limits
    on_inconclusive: Literal["Hold", "Rollback", "Promote"]
    paper: Paper | None = None
    """What it is asked before its first step."""
    gives_up: bool = True
    """One that fails is rolled back. Otherwise it stays, without requests, until a person decides."""

    def says(self, step: int) -> str:
        """A step in words."""
        at = self.steps[step]
        least = f", {self.min_requests} requests" if at.weight else ""
        return f"{at.weight} % of the requests, for {format_duration(at.hold)}{least} at least"

    def replicas(self, step: int, full: int) -> int:
        """How many replicas of the new revision a step needs, beside the `full` of the stable one."""
        weight = self.steps[min(step, len(self.steps) - 1)].weight
        return max(1, math.ceil(full * weight / 100))


PROMOTED = 1_000_000
"""The step of a canary that takes over: beyond all that a manifest may declare."""


@dataclass(frozen=True, slots=True)
class Stage:
    """Where a canary stands: which step (`PROMOTED`: beyond the last), since when, how many requests of the new
    revision came before, and at how many it was looked at last; and how it passed its exam, in words."""

    step: int
    since: float
    before: int = 0
    looked_at: int = 0
    examined: str = ""
    failed: str = ""
    """Why it has failed, where it is kept nevertheless (`Policy.gives_up`): `REASON: sentence`."""

    @classmethod
    def of(cls, override: Override) -> Stage | None:
        """Of the decision that keeps it; None if it has not begun."""
        return cls(**override.stage) if override.stage is not None else None

    def kept(self, template_hash: str, at: float) -> Override:
        """The decision that keeps it. `at` is when the step began, so that a look makes no other aim of it."""
        return Override(Kind.CANARY, "platform", at, template_hash=template_hash, stage=asdict(self))


@dataclass(frozen=True, slots=True)
class Stay:
    """Nothing yet. `inconclusive`: its time is over and its requests are too few. `stage` remembers a look."""

    stage: Stage
    inconclusive: bool
    look_at: float | None


@dataclass(frozen=True, slots=True)
class Next:
    """The step after this one begins."""

    stage: Stage


@dataclass(frozen=True, slots=True)
class Promote:
    """It takes over."""


@dataclass(frozen=True, slots=True)
class Fail:
    """It is given up, for this reason."""

    because: str


Decision = Stay | Next | Promote | Fail


def is_promoted(override: Override) -> bool:
    """Whether the canary of this decision has taken over."""
    stage = Stage.of(override)
    return stage is not None and stage.step >= PROMOTED


def policy_of(spec: Mapping[str, Any]) -> Policy | None:
    """The policy of a resolved spec; None for another strategy."""
    ways = spec["rollout"]
    declared = ways.get("canary")
    if ways["strategy"] != "Canary" or declared is None:
        return None
    analysis = declared["analysis"]
    return Policy(
        tuple(
            Step(step["weight"], parse_duration(step["hold"]) if step["hold"] else 0.0)
            for step in declared["steps"]
        ),
        analysis["minRequests"],
        Limits(
            parse_percent(analysis["maxErrorRate"]),
            parse_percent(analysis["maxTtftP95Increase"]),
            parse_percent(analysis["maxItlP95Increase"]),
        ),
        analysis["onInconclusive"],
        Paper.of(analysis),
        ways["autoRollback"],
    )


def decide(policy: Policy, stage: Stage, stable: Measured, new: Measured, now: float) -> Decision:
    """What to do now. A stage beyond the last step, of a manifest that has fewer of them by now, is promoted, but
    not one that has failed."""
    if stage.failed:
        return Stay(stage, False, None)
    if stage.step >= len(policy.steps):
        return Promote()
    if new.requests < max(stage.before, stage.looked_at):  # the router has begun to count anew
        stage = replace(stage, before=0, looked_at=0)
    if new.requests >= next_look(stage.looked_at):
        if worse := [gate for gate in judge(stable, new, policy.limits) if gate.worse]:
            return Fail(", ".join(map(text_of, worse)))
        stage = replace(stage, looked_at=new.requests)
    step = policy.steps[stage.step]
    ends_at = stage.since + step.hold
    if now < ends_at:
        return Stay(stage, False, ends_at)
    seen = new.requests - stage.before
    if step.weight and seen < policy.min_requests:
        if policy.on_inconclusive == "Hold":
            return Stay(stage, True, None)
        if policy.on_inconclusive == "Rollback":
            return Fail(f"{seen} requests in step {stage.step + 1}, {policy.min_requests} are asked for")
    if stage.step + 1 == len(policy.steps):
        return Promote()
    return Next(replace(stage, step=stage.step + 1, since=now, before=new.requests))


def text_of(gate: Gate) -> str:
    """A gate in words: `first token p95 410 ms against 310 ms, +20 % at most`."""
    if gate.relative:
        return f"{gate.name} {_seconds(gate.new)} against {_seconds(gate.stable)}, +{gate.limit:.0%} at most"
    return f"{gate.name} {_percent(gate.new)} against {_percent(gate.stable)}, {gate.limit:.1%} at most"


def gates(policy: Policy, stable: Measured, new: Measured) -> Sequence[Gate]:
    """The comparisons as they stand, to be shown."""
    return judge(stable, new, policy.limits)


def _seconds(value: float | None) -> str:
    return "none" if value is None else f"{1000 * value:.0f} ms"


def _percent(value: float | None) -> str:
    return "none" if value is None else f"{value:.1%}"
