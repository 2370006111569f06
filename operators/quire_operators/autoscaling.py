"""How many replicas a model has whose manifest gives a range: by what the router tells of its load.

Each measure that is declared says how many replicas the present load is for, and the largest number counts:

    inFlightPerReplica   requests that run or wait / the target
    kvCacheUsage         ready replicas × share of their blocks in use / the target
    queueTime            while the first request waits longer than the target: ready replicas × time / target, at
                         most twice as many; else as many as leave a fifth of the seats free, and no more than now

A ratio within a tenth of its target changes nothing. Up goes to the least that was called for all through
`scaleUpDelay`, down to the most that was called for during `scaleDownDelay`: noise of any height that is shorter
than the delay moves nothing, and no number is left and come back to within one. A load that is not known is no
load of nothing: what was called for before is forgotten, and the delays begin anew.

To none goes only who may (`minReplicas: 0`), was ready once, and was asked by nobody for `idleTimeout`; the first
request brings it back at once, and waits for that.

Pure: `decide` is given the time, and keeps nothing but what is in `Memory`.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from quire_schemas.quantities import parse_duration, parse_percent

TOLERANCE = 0.1
"""Of a ratio to its target, in which it counts as met."""
SPARE_SEATS = 0.8
"""Share of the seats that is in use where the number is right, if nothing else is declared."""
MOST_AT_ONCE = 2.0
"""Times as many replicas as there are, for a queue that is too long: how much too long says little of how many."""


@dataclass(frozen=True, slots=True)
class Policy:
    """`spec.autoscaling`, in seconds and shares; `seats` are the sequences that one replica computes at once."""

    least: int
    most: int
    seats: int
    in_flight: float | None
    kv_usage: float | None
    queue_time: float | None
    up_delay: float
    down_delay: float
    idle_timeout: float

    def clamp(self, replicas: int) -> int:
        return min(max(replicas, self.least), self.most)


@dataclass(frozen=True, slots=True)
class Load:
    """What is known of a model now."""

    in_flight: int
    """Sequences that run or wait."""
    ready: int
    queue_time: float = 0.0
    """Seconds that who waits longest has waited."""
    kv_usage: float = 0.0
    """Mean share of cache blocks in use."""
    idle: float = 0.0
    """Seconds in which nobody has asked, as far as is known."""


@dataclass(slots=True)
class Memory:
    """What was called for, as (since when, how many), oldest first; each holds until the next one."""

    called_for: deque[tuple[float, int]] = field(default_factory=deque)
    began: float | None = None
    """Since when the router has told of the model without a gap."""
    teller: int | None = None
    """The router's process."""

    def note(self, now: float, replicas: int, kept: float) -> None:
        if self.began is None:
            self.began = now
        if not self.called_for or self.called_for[-1][1] != replicas:
            self.called_for.append((now, replicas))
        while len(self.called_for) > 1 and self.called_for[1][0] <= now - kept:
            self.called_for.popleft()

    def hear_from(self, teller: int) -> None:
        """Another router than before knows of nothing that was before it: all begins anew."""
        if teller != self.teller:
            self.teller = teller
            self.forget()

    def forget(self) -> None:
        self.called_for.clear()
        self.began = None

    def since(self, start: float) -> list[int]:
        """All that was called for from `start` on."""
        after = [replicas for at, replicas in self.called_for if at > start]
        at_start = [replicas for at, replicas in self.called_for if at <= start][-1:]
        return at_start + after

    def knows(self, start: float) -> bool:
        return self.began is not None and self.began <= start


@dataclass(frozen=True, slots=True)
class Decision:
    """How many replicas there are to be, and why, in words for an event."""

    replicas: int
    because: str


def policy_of(spec: Mapping[str, Any]) -> Policy | None:
    """The policy of a resolved spec; None for a fixed number."""
    declared = spec.get("autoscaling")
    if declared is None:
        return None
    target, seats = declared["target"], spec["batching"]["maxNumSeqs"]
    given = [target[name] for name in ("inFlightPerReplica", "kvCacheUsage", "queueTime")]
    in_flight = float(given[0]) if given[0] is not None else None
    if given == [None, None, None]:
        in_flight = max(SPARE_SEATS * seats, 1.0)
    down = parse_duration(declared["scaleDownDelay"])
    return Policy(
        least=declared["minReplicas"],
        most=declared["maxReplicas"],
        seats=seats,
        in_flight=in_flight,
        kv_usage=parse_percent(given[1]) if given[1] is not None else None,
        queue_time=parse_duration(given[2]) if given[2] is not None else None,
        up_delay=parse_duration(declared["scaleUpDelay"]),
        down_delay=down,
        idle_timeout=parse_duration(declared["idleTimeout"]) if declared["idleTimeout"] is not None else down,
    )


def first_count(policy: Policy) -> int:
    """How many replicas a model begins with: none before it was ready once would tell nobody that it can be."""
    return max(policy.least, 1)


def decide(policy: Policy, memory: Memory, load: Load, current: int, proven: bool, now: float) -> Decision:
    """How many replicas there are to be from now on; `current` if nothing is to change. `proven` says whether the
    model was ever ready; `memory` remembers what this load calls for."""
    floor = max(policy.least, 1)
    asked = load.in_flight > 0
    wanted, because = _called_for(policy, load, current)
    if load.ready > 0:  # a queue grows while replicas start that were asked for because of it
        wanted = min(wanted, max(math.ceil(MOST_AT_ONCE * load.ready), current))
    wanted = min(max(wanted, floor), policy.most)
    memory.note(now, wanted, max(policy.up_delay, policy.down_delay))
    before, current = current, policy.clamp(current)
    stays = Decision(current, "" if current == before else f"{policy.least} to {policy.most} are declared")
    if current == 0:
        if asked:
            return Decision(wanted, "it is asked for")
        return stays
    if policy.least == 0 and proven and not asked and load.idle >= policy.idle_timeout:
        return Decision(0, f"nobody asked for {policy.idle_timeout:g} s")
    if not proven:
        return stays
    up, down = now - policy.up_delay, now - policy.down_delay
    if memory.knows(up) and (least := min(memory.since(up))) > current:
        return Decision(least, because)
    if memory.knows(down) and (most := max(memory.since(down))) < current:
        return Decision(most, f"no more was called for in {policy.down_delay:g} s")
    return stays


def _called_for(policy: Policy, load: Load, current: int) -> tuple[int, str]:
    """How many replicas this load is for, by the measure that asks for most."""
    found: list[tuple[int, str]] = [(0, "no load")]
    if policy.in_flight is not None:
        text = f"{load.in_flight} requests in flight, {policy.in_flight:g} for each replica"
        found.append((_scaled(load.in_flight / policy.in_flight, current), text))
    ready = load.ready
    if policy.kv_usage is not None and ready:
        text = f"{load.kv_usage:.0%} of the cache in use, {policy.kv_usage:.0%} declared"
        found.append((_scaled(ready * load.kv_usage / policy.kv_usage, ready), text))
    if policy.queue_time is not None and ready:
        text = f"requests wait {load.queue_time:.1f} s, {policy.queue_time:g} s declared"
        ratio = load.queue_time / policy.queue_time if policy.queue_time else math.inf * bool(load.queue_time)
        if ratio > 1 + TOLERANCE:
            found.append((math.ceil(ready * min(ratio, MOST_AT_ONCE)), text))
        else:
            seats = math.ceil(load.in_flight / (SPARE_SEATS * policy.seats))
            found.append((min(seats, current), "what runs takes its seats"))
    return max(found, key=lambda each: each[0])


def _scaled(exact: float, present: int) -> int:
    """A number of replicas, that at present if it is near enough."""
    if present and abs(exact / present - 1) <= TOLERANCE:
        return present
    return math.ceil(exact)
