"""The judgement of a canary: exact where it can be counted, and how often it errs in thousands of made ones."""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter
from collections.abc import Sequence

import pytest
from tests.effort import times
from tests.figures import record

from quire_operators import canary
from quire_operators.analysis import (
    ALPHA,
    FIRST_LOOK,
    Gate,
    Limits,
    Measured,
    Times,
    judge,
    next_look,
    number_of,
    tail,
)
from quire_schemas.wire import time_bucket

LIMITS = Limits(error_rate=0.01, first_token=0.2, between_tokens=0.2)


def test_the_tail_is_what_counting_all_draws_gives() -> None:
    for marked, drawn, whole in itertools.product(range(5), range(1, 6), range(5, 8)):
        draws = list(itertools.combinations(range(whole), drawn))
        for hits in range(max(0, drawn + marked - whole), min(marked, drawn) + 1):
            at_least = sum(sum(each < marked for each in draw) >= hits for draw in draws)
            found = tail(hits, drawn, marked - hits, whole - drawn)
            assert found == pytest.approx(at_least / len(draws)), (hits, marked, drawn, whole)


def test_times_are_told_apart_by_a_percent() -> None:
    measured = Times(Counter(time_bucket(0.001 * n) for n in range(1, 1001)))
    assert measured.total == 1000
    assert measured.percentile() == pytest.approx(0.95, rel=0.01)
    assert measured.percentile(0.5) == pytest.approx(0.5, rel=0.01)
    assert Times().percentile() is None


def test_looks_are_at_fixed_counts_and_what_they_may_err_sums_up_to_alpha() -> None:
    at, counts = 0, []
    for _ in range(60):
        at = next_look(at)
        counts.append(at)
    assert counts[0] == FIRST_LOOK
    assert all(a < b <= math.ceil(1.25 * a) for a, b in itertools.pairwise(counts))
    assert [number_of(count) for count in counts] == list(range(1, 61))
    assert number_of(FIRST_LOOK - 1) == 0
    assert sum(ALPHA * 6 / (math.pi * k) ** 2 for k in range(1, 100_000)) <= ALPHA


class Served:
    """A made revision, and what was counted of it. `how` it does: shares, and times as multiples of the usual."""

    def __init__(self, rng: random.Random, **how: float) -> None:
        self.rng, self.how = rng, how
        self.requests = self.failed = self.empty = 0
        self.first, self.between = Counter[int](), Counter[int]()

    def serve(self) -> None:
        rng, how = self.rng, self.how
        self.requests += 1
        if rng.random() < how.get("errors", 0.004):
            self.failed += 1
            return
        self.empty += rng.random() < how.get("empty", 0.02)
        self.first[time_bucket(how.get("first", 1.0) * 0.3 * rng.lognormvariate(0, 0.5))] += 1
        self.between[time_bucket(how.get("between", 1.0) * 0.03 * rng.lognormvariate(0, 0.2))] += 1

    def measured(self) -> Measured:
        answers = self.requests - self.failed
        return Measured(self.requests, self.failed, answers, self.empty, Times(self.first), Times(self.between))


def given_up(rng: random.Random, requests: int, **how: float) -> tuple[int, Gate] | None:
    """At how many requests and at which gate a revision is given up within so many of them, where the stable one
    has as many; looked at as often as there is a look."""
    stable, new = Served(rng), Served(rng, **how)
    while (look := next_look(new.requests)) <= requests:
        for _ in range(look - new.requests):
            stable.serve()
            new.serve()
        worse = [gate for gate in judge(stable.measured(), new.measured(), LIMITS) if gate.worse]
        if worse:
            return look, worse[0]
    return None


def test_who_is_no_worse_is_given_up_in_less_than_alpha() -> None:
    rng, count = random.Random(5), times(100, 10_000)
    wrong = sum(given_up(rng, 800) is not None for _ in range(count))
    record(
        {
            "benchmark": "canary",
            "system": "canaries of a revision that is no worse",
            "made": count,
            "given_up": wrong,
        }
    )
    assert wrong <= ALPHA * count, wrong


@pytest.mark.parametrize(
    ("how", "gate", "within"),
    [
        ({"first": 1.3}, "first token p95", 2500),
        ({"between": 1.5}, "between tokens p95", 800),
        ({"errors": 0.2}, "errors", 300),
        ({"errors": 1.0}, "errors", 20),
        ({"empty": 0.3}, "empty or cut", 300),
    ],
)
def test_who_is_worse_is_found(how: dict[str, float], gate: str, within: int) -> None:
    rng, count = random.Random(7), times(20, 400)
    found = [given_up(rng, within, **how) for _ in range(count)]
    assert sum(each is not None and each[1].name == gate for each in found) >= 0.95 * count, found


def step_of_its_end(rng: random.Random, steps: Sequence[int], requests: int, **how: float) -> int | None:
    """In which step a revision is given up, where each step gives it no more than the requests that it needs and
    its weight of all; None where it takes over."""
    policy = canary.Policy(tuple(canary.Step(weight, 0.0) for weight in steps), requests, LIMITS, "Hold")
    stage, stable, new = canary.Stage(0, 0.0), Served(rng), Served(rng, **how)
    while True:
        until = min(next_look(stage.looked_at), stage.before + requests)
        while new.requests < until:
            (new if 100 * rng.random() < steps[stage.step] else stable).serve()
        decision = canary.decide(policy, stage, stable.measured(), new.measured(), 0.0)
        if isinstance(decision, canary.Fail):
            return stage.step
        if isinstance(decision, canary.Promote):
            return None
        stage = decision.stage


def test_first_tokens_that_take_three_tenths_longer_are_found_within_the_steps() -> None:
    """Those of docs/canaries.md, whose limit is two tenths, and the requests that a step needs by default."""
    rng, count = random.Random(11), times(40, 1000)
    ends = Counter(step_of_its_end(rng, (5, 25, 100), 200, first=1.3) for _ in range(count))
    record(
        {"benchmark": "canary", "system": "canaries whose first tokens take 1.3 times as long", "made": count}
        | {f"found_in_step_{step + 1}": ends[step] for step in range(3)}
    )  # fmt: skip
    assert count - ends[None] >= 0.95 * count, ends
    fine = Counter(step_of_its_end(rng, (5, 25, 100), 200) for _ in range(count))
    assert fine[None] >= (1 - ALPHA) * count - 1, fine


def test_what_is_worse_by_less_than_declared_is_let_through() -> None:
    rng = random.Random(3)
    for _ in range(5):
        assert given_up(rng, 2000, first=1.05, errors=0.006) is None


def test_a_revision_that_nobody_asked_is_not_judged() -> None:
    assert not any(gate.worse for gate in judge(Measured(), Measured(), LIMITS))
    gates = judge(Measured(), Measured(9, failed=9), LIMITS)
    assert not any(gate.worse for gate in gates), "before the first look"
