"""How many replicas a load is for, in virtual time: each measure, the delays, none and back, and no flapping."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from typing import Any

import pytest
from benchmarks.autoscaling import POLICIES, simulate, synthetic
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.effort import examples

from quire_operators.autoscaling import Decision, Load, Memory, Policy, decide, first_count, policy_of
from quire_schemas.manifest import load
from quire_schemas.model import Model, resolve_defaults

POLICY = Policy(
    least=1,
    most=10,
    seats=10,
    in_flight=8.0,
    kv_usage=None,
    queue_time=None,
    up_delay=0.0,
    down_delay=300.0,
    idle_timeout=300.0,
)


class Scaled:
    """A model that is looked at once a second, and has at once what is decided."""

    def __init__(self, policy: Policy, replicas: int | None = None, *, proven: bool = True) -> None:
        self.policy, self.memory, self.now, self.proven = policy, Memory(), 0.0, proven
        self.replicas = first_count(policy) if replicas is None else replicas
        self.changes: list[tuple[float, int]] = []

    def look(self, load: Load) -> Decision:
        decision = decide(self.policy, self.memory, load, self.replicas, self.proven, self.now)
        if decision.replicas != self.replicas:
            assert decision.because, "a change says why"
            self.changes.append((self.now, decision.replicas))
        self.replicas = decision.replicas
        self.now += 1.0
        return decision

    def stay(self, seconds: int, in_flight: int, idle_from: float | None = None) -> None:
        for _ in range(seconds):
            idle = 0.0 if idle_from is None else self.now - idle_from
            self.look(Load(in_flight, ready=self.replicas, idle=idle))


def test_each_measure_says_how_many_and_the_largest_number_counts() -> None:
    def called_for(load: Load, current: int = 2, **declared: Any) -> int:
        policy = replace(replace(POLICY, in_flight=None), **declared)
        return decide(policy, Memory(), load, current, True, 0.0).replicas

    assert called_for(Load(25, ready=2), in_flight=8.0) == 4
    assert called_for(Load(0, ready=2, kv_usage=0.9), kv_usage=0.5) == 4
    assert called_for(Load(0, ready=2, queue_time=3.0), queue_time=2.0) == 3
    assert called_for(Load(0, ready=2, queue_time=60.0), queue_time=2.0) == 4, "at most twice as many"
    assert called_for(Load(0, ready=2, queue_time=0.1), queue_time=0.0) == 4
    assert called_for(Load(33, ready=5, kv_usage=0.4), 5, in_flight=8.0, kv_usage=0.5) == 5
    assert called_for(Load(9, ready=2, kv_usage=0.9), in_flight=8.0, kv_usage=0.5) == 4
    assert called_for(Load(1000, ready=2), in_flight=8.0) == 4, "at most twice as many, while those start"
    assert called_for(Load(1000, ready=0), 0, in_flight=8.0) == POLICY.most
    assert called_for(Load(17, ready=2), in_flight=8.0) == 2, "a sixteenth above the target is met"
    assert called_for(Load(18, ready=2), in_flight=8.0) == 3


def test_a_queue_that_is_short_lets_go_only_of_what_runs_does_not_need() -> None:
    policy = replace(POLICY, in_flight=None, queue_time=2.0, down_delay=10.0)
    busy = Scaled(policy, 4)
    for _ in range(60):
        busy.look(Load(31, ready=4, queue_time=0.0))
    assert busy.replicas == 4, "31 sequences of 40 seats, a fifth of which is to be free"
    for _ in range(60):
        busy.look(Load(8, ready=4, queue_time=0.0))
    assert busy.replicas == 1


def test_up_waits_until_the_load_was_high_all_the_time_and_down_until_it_was_low() -> None:
    model = Scaled(replace(POLICY, up_delay=30.0), 3)
    model.stay(29, 30)
    model.stay(2, 3)  # a moment of calm
    model.stay(30, 30)
    assert model.changes == []
    model.stay(2, 40)
    assert model.replicas == 4, "the least that was called for during the delay"
    model.stay(60, 40)
    assert model.replicas == 5
    began = model.now
    model.stay(200, 10)
    model.stay(5, 24)  # three for a moment
    model.stay(90, 1)
    assert model.replicas == 5
    model.stay(20, 1)
    assert model.replicas == 3, "the most that was called for during the delay"
    model.stay(300, 1)
    assert model.replicas == 1
    assert [at for at, _ in model.changes if at < began + 300] == [at for at, _ in model.changes[:2]]


@settings(max_examples=examples(15))
@given(st.integers(0, 2**32), st.integers(1, 9), st.integers(0, 1))
def test_noise_that_is_shorter_than_the_delays_does_not_flap(seed: int, high: int, delayed: int) -> None:
    """Whatever jumps about within some seconds ends in one number, and no number is come back to."""
    rng = random.Random(seed)  # one that is drawn by Hypothesis may say the same for minutes: that is no noise
    model = Scaled(replace(POLICY, up_delay=30.0 * delayed))
    for _ in range(1000):
        model.look(Load(rng.randint(0, 8 * high), ready=model.replicas))
    late = [change for change in model.changes if change[0] > 700]
    ups = [replicas for _, replicas in model.changes]
    assert ups == sorted(ups), f"it went down and up again: {model.changes}"
    assert not late, model.changes


def test_to_none_after_the_idle_time_and_back_at_once() -> None:
    model = Scaled(replace(POLICY, least=0, idle_timeout=60.0))
    model.stay(10, 3)
    model.stay(61, 0, idle_from=model.now)
    assert model.replicas == 0
    model.stay(1000, 0, idle_from=model.now - 61)
    assert model.replicas == 0
    model.stay(1, 17)
    assert model.replicas == 3, "as many as those that wait are for"


def test_who_was_never_ready_is_not_taken_away() -> None:
    model = Scaled(replace(POLICY, least=0, idle_timeout=60.0), proven=False)
    model.stay(3600, 0, idle_from=0.0)
    assert model.replicas == 1


def test_what_is_not_known_is_no_load_of_nothing() -> None:
    model = Scaled(POLICY, 5)
    model.stay(290, 1)
    model.memory.forget()  # the router was away
    model.stay(290, 1)
    assert model.replicas == 5
    model.stay(12, 1)
    assert model.replicas == 1


def test_another_range_holds_at_once() -> None:
    model = Scaled(POLICY, 9)
    model.policy = replace(POLICY, most=4)
    model.stay(1, 100)
    assert model.replicas == 4
    model.policy = replace(POLICY, least=6)
    model.stay(1, 0)
    assert model.replicas == 6


@settings(max_examples=examples(200))
@given(
    st.lists(st.tuples(st.integers(0, 200), st.floats(0, 100), st.floats(0, 1)), max_size=60),
    st.integers(0, 5),
    st.integers(5, 20),
    st.sampled_from([0.0, 5.0, 30.0]),
)
def test_it_is_always_within_the_range(
    loads: list[tuple[int, float, float]], least: int, most: int, delay: float
) -> None:
    policy = replace(
        POLICY, least=least, most=most, kv_usage=0.5, queue_time=2.0, up_delay=delay, down_delay=delay
    )
    model = Scaled(policy)
    for in_flight, queue_time, usage in loads:
        model.look(Load(in_flight, model.replicas, queue_time, usage, idle=0.0))
        assert least <= model.replicas <= most
        assert model.replicas >= 1, "who is not idle is not taken away"
    assert len(model.memory.called_for) <= max(policy.down_delay, 1) + 2, "what is remembered is bounded"


def test_a_new_router_has_seen_nobody_ask_and_that_says_nothing() -> None:
    memory = Memory()
    memory.hear_from(1)
    memory.note(100.0, 2, 60.0)
    memory.hear_from(1)
    assert memory.knows(100.0)
    memory.hear_from(2)
    assert not memory.knows(1000.0)
    assert memory.since(0.0) == []


def test_the_manifest_in_numbers() -> None:
    def of(autoscaling: str) -> Policy:
        text = (
            "apiVersion: quire.dev/v1alpha1\nkind: Model\nmetadata: {name: m}\n"
            f"spec: {{source: builtin://tiny, batching: {{maxNumSeqs: 20}}, autoscaling: {autoscaling}}}\n"
        )
        resource = load([("m.yaml", text)]).resources[0].resource
        assert isinstance(resource, Model)
        policy = policy_of(resolve_defaults(resource))
        assert policy is not None
        return policy

    assert of("{maxReplicas: 3}") == Policy(1, 3, 20, 16.0, None, None, 0.0, 300.0, 300.0)
    given_all = of(
        "{minReplicas: 0, maxReplicas: 3, target: {kvCacheUsage: 80%, queueTime: 2s}, scaleUpDelay: 5s, "
        "scaleDownDelay: 1m, idleTimeout: 15m}"
    )
    assert given_all == Policy(0, 3, 20, None, 0.8, 2.0, 5.0, 60.0, 900.0)
    assert math.isclose(of("{maxReplicas: 3, target: {inFlightPerReplica: 7}}").in_flight or 0, 7)


@pytest.mark.parametrize("gap", [0.2, 1.0, 7.0])
def test_the_delays_are_of_time_not_of_looks(gap: float) -> None:
    memory, replicas, now = Memory(), 1, 0.0
    while replicas == 1:
        replicas = decide(replace(POLICY, up_delay=30.0), memory, Load(40, 1), replicas, True, now).replicas
        now += gap
    assert 30.0 <= now - gap < 30.0 + gap


@pytest.mark.parametrize("name", POLICIES)
def test_a_trace_is_served_without_flapping(name: str) -> None:
    """The benchmark's own trace, an hour of it: what was added is never taken back within `scaleDownDelay`."""
    trace, policy = synthetic(7, hours=1.0), POLICIES[name]
    got = simulate(trace, policy, load=30.0, slo=2.0)
    up_and_down, _ = got.taken_back(policy.down_delay)
    assert up_and_down == 0, got.changes
    assert got.changes, "it followed the load"
    constant = simulate(trace, replace(policy, least=2, most=2), load=0.0, slo=2.0)
    assert got.in_time > constant.in_time, "more than two replicas had them that were there all the time"
