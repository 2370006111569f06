"""Replicas that follow the load against every fixed number of them, in virtual time: waiting, and replica-hours.

The decision is the control plane's own (`quire_operators.autoscaling`), asked once a second of virtual time with
what a router would tell. Around it stands the least that there is of a fleet: a replica computes as many requests
at once as it has seats, each for as long as its prompt and its answer take; the others wait in the order of their
arrival. A replica that is added serves after `--load` seconds and costs from its beginning; one that is taken away
takes no more, and costs until its last request has ended.

A request is *in time* when it waited no longer than `--slo` seconds for a seat. For each policy a row says how
many were, how many replica-hours that took, how often the number changed, and how often a change was taken back
within `scaleDownDelay` of it: up and down again would be flapping, down and up again is a burst that came then.
And the least fixed number with as many in time, with its hours: the best that somebody could have declared who
knew the whole trace before.

The synthetic trace is a day made short: six hours with two hills, bursts of a minute, and an hour of silence.
**A trace of one's own** (`--trace FILE`): a CSV with the header `arrived_at,num_prefill_tokens,num_decode_tokens`.
"""

from __future__ import annotations

import argparse
import csv
import heapq
import itertools
import math
import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from benchmarks.rows import NO_KERNELS, RESULTS, Row, provenance, write
from quire_operators.autoscaling import Load, Memory, Policy, decide, first_count

PREFILL_RATE, STEP = 4000.0, 0.03
"""Prompt tokens a second, and seconds a token of an answer: of a small model on one device."""
KV_TOKENS = 24_576
"""Tokens that the cache of a replica has room for."""
POLICIES = {
    "in flight": Policy(1, 64, 16, 12.0, None, None, 0.0, 300.0, 300.0),
    "in flight, to none": Policy(0, 64, 16, 12.0, None, None, 0.0, 300.0, 300.0),
    "in flight, late up": Policy(1, 64, 16, 12.0, None, None, 30.0, 300.0, 300.0),
    "queue time": Policy(1, 64, 16, None, None, 1.0, 0.0, 300.0, 300.0),
    "in flight, cache": Policy(1, 64, 16, 12.0, 0.8, None, 0.0, 300.0, 300.0),
}


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--trace", type=Path, help="arrivals and lengths from a file")
    parser.add_argument("--slo", type=float, default=2.0, help="seconds that a request may wait for a seat")
    parser.add_argument("--load", type=float, default=30.0, help="seconds until a new replica serves")
    parser.add_argument("--seed", type=int, default=0)


def run(args: argparse.Namespace) -> None:
    trace = read_trace(args.trace) if args.trace is not None else synthetic(args.seed)
    rows = []
    print(f"{len(trace)} requests in {trace[-1].at / 3600:.1f} h")
    for name, policy in POLICIES.items():
        got = simulate(trace, policy, args.load, args.slo)
        fixed, best = best_fixed(trace, policy, args.slo, got.in_time)
        turned = got.taken_back(policy.down_delay)
        row: Row = {
            "scenario": "autoscaling", "policy": name, "requests": len(trace),
            "trace": args.trace.name if args.trace is not None else "synthetic", "seed": args.seed,
            "load": args.load, "slo": args.slo, "in_time": round(got.in_time, 5), "hours": round(got.hours, 2),
            "changes": len(got.changes), "up_down": turned[0], "down_up": turned[1],
            "most": got.most,
            "best_fixed": fixed, "fixed_in_time": round(best.in_time, 5), "fixed_hours": round(best.hours, 2),
            "hours_ratio": round(got.hours / best.hours, 3), **provenance(NO_KERNELS),
        }  # fmt: skip
        rows.append(row)
        print(
            f"{name:20} in time {got.in_time:8.3%}  hours {got.hours:6.2f}  changes {len(got.changes):4}  "
            f"up and down {turned[0]}, down and up {turned[1]}  at most {got.most:2}  | fixed {fixed}: "
            f"{best.in_time:8.3%}  hours {best.hours:6.2f}  ratio {row['hours_ratio']}"
        )
    write(RESULTS / "autoscaling.jsonl", rows)


@dataclass(frozen=True, slots=True)
class Asked:
    """One request: when it comes, in seconds, and for how long it takes a seat."""

    at: float
    takes: float
    tokens: int


def asked(at: float, prompt: int, answer: int) -> Asked:
    return Asked(at, prompt / PREFILL_RATE + answer * STEP, prompt + answer)


def synthetic(seed: int, hours: float = 6.0) -> list[Asked]:
    """Two hills, a burst of a minute every twenty, an hour of silence at two thirds."""
    rng, now, found = random.Random(seed), 0.0, []
    bursts = [(at, at + 60) for at in (1200 * n + rng.uniform(0, 600) for n in range(int(3 * hours)))]
    quiet = (hours * 2400, hours * 2400 + 3600)
    while now < hours * 3600:
        rate = 4 + 3.5 * math.sin(now / (hours * 3600) * 4 * math.pi)
        rate *= 2.5 if any(begin <= now < end for begin, end in bursts) else 1
        now += rng.expovariate(rate)
        if not quiet[0] <= now < quiet[1]:
            found.append(
                asked(now, round(rng.lognormvariate(5.5, 0.8)), min(round(rng.lognormvariate(4.8, 0.7)), 900))
            )
    return found


def read_trace(path: Path) -> list[Asked]:
    """The requests of a file. Raises `ValueError` for one that is no trace."""
    with path.open(newline="") as file:
        try:
            found = [
                asked(float(row["arrived_at"]), int(row["num_prefill_tokens"]), int(row["num_decode_tokens"]))
                for row in csv.DictReader(file)
            ]
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is no trace: {error!r}") from error
    if not found:
        raise ValueError(f"{path} has no requests")
    return sorted(found, key=lambda each: each.at)


@dataclass(slots=True)
class Replica:
    """One replica: what runs is (when it ends, tokens)."""

    serves_at: float
    running: list[tuple[float, int]] = field(default_factory=list)
    leaves: bool = False

    @property
    def used(self) -> float:
        """Share of its cache that is in use."""
        return sum(tokens for _, tokens in self.running) / KV_TOKENS

    def fits(self, one: Asked) -> bool:
        return not self.running or self.used + one.tokens / KV_TOKENS <= 1


@dataclass(slots=True)
class Outcome:
    """What came of a trace: share of requests in time, replica-hours, and each change as (when, how many)."""

    in_time: float
    hours: float
    changes: list[tuple[float, int]]
    most: int

    def taken_back(self, within: float) -> tuple[int, int]:
        """Changes that were taken back within these seconds: (up and down again, down and up again)."""
        counts = [1, *(count for _, count in self.changes)]
        ups, downs = 0, 0
        for n, ((at, count), (later, then)) in enumerate(itertools.pairwise(self.changes)):
            if later - at < within:
                ups += counts[n] < count > then
                downs += counts[n] > count < then
        return ups, downs


def simulate(trace: Sequence[Asked], policy: Policy, load: float, slo: float) -> Outcome:
    """All of `trace`, looked at once a second."""
    fleet = [Replica(0.0) for _ in range(first_count(policy))]
    memory, waiting = Memory(), deque[Asked]()
    count, changes, most = len(fleet), [], len(fleet)
    in_time, seconds, idle_since, arrivals = 0, 0.0, 0.0, deque(trace)
    now, proven = 0.0, True
    while arrivals or waiting or any(replica.running for replica in fleet):
        while arrivals and arrivals[0].at <= now:
            waiting.append(arrivals.popleft())
        for replica in fleet:
            while replica.running and replica.running[0][0] <= now:
                heapq.heappop(replica.running)
        fleet = [replica for replica in fleet if replica.running or not replica.leaves]
        serving = [replica for replica in fleet if replica.serves_at <= now and not replica.leaves]
        for replica in sorted(serving, key=lambda each: len(each.running)):
            while waiting and len(replica.running) < policy.seats and replica.fits(waiting[0]):
                one = waiting.popleft()
                in_time += now - one.at <= slo
                heapq.heappush(replica.running, (now + one.takes, one.tokens))
        running = sum(len(replica.running) for replica in fleet)
        if running or waiting:
            idle_since = now
        used = [replica.used for replica in serving]
        told = Load(
            running + len(waiting),
            len(serving),
            now - waiting[0].at if waiting else 0.0,
            sum(used) / len(used) if used else 0.0,
            now - idle_since,
        )
        decision = decide(policy, memory, told, count, proven, now)
        if decision.replicas != count:
            _resize(fleet, decision.replicas, now, load)
            count = decision.replicas
            changes.append((now, count))
            most = max(most, count)
        seconds += len(fleet)
        now += 1.0
    return Outcome(in_time / len(trace), seconds / 3600, changes, most)


def _resize(fleet: list[Replica], count: int, now: float, load: float) -> None:
    """Replicas come, or those go that came last."""
    stay = [replica for replica in fleet if not replica.leaves]
    for replica in stay[count:]:
        replica.leaves = True
    fleet += [Replica(now + load) for _ in range(count - len(stay))]


def best_fixed(trace: Sequence[Asked], policy: Policy, slo: float, in_time: float) -> tuple[int, Outcome]:
    """The least fixed number of replicas that has as many requests in time."""
    for count in range(1, policy.most + 1):
        fixed = replace(policy, least=count, most=count)
        got = simulate(trace, fixed, 0.0, slo)
        if got.in_time >= in_time:
            return count, got
    return policy.most, got
