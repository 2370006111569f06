"""The judgement of a canary: exact where it can be counted, and how often it errs in thousands of made ones."""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter

import pytest
from tests.effort import times

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


class Canary:
    """A made one: two revisions that serve the same number of requests; looked at as often as there is a look."""

    def __init__(self, rng: random.Random, **new: float) -> None:
        self.rng, self.new = rng, new
        self.counts = {name: [Counter[int](), Counter[int]()] for name in ("stable", "new")}
        self.failed, self.empty, self.n = Counter[str](), Counter[str](), 0

    def serve(self, until: int) -> None:
        for name, how in (("stable", {}), ("new", self.new)):
            first, between = self.counts[name]
            for _ in range(until - self.n):
                if self.rng.random() < how.get("errors", 0.004):
                    self.failed[name] += 1
                    continue
                self.empty[name] += self.rng.random() < how.get("empty", 0.02)
                first[time_bucket(how.get("first", 1.0) * 0.3 * self.rng.lognormvariate(0, 0.5))] += 1
                between[time_bucket(how.get("between", 1.0) * 0.03 * self.rng.lognormvariate(0, 0.2))] += 1
        self.n = until

    def measured(self, name: str) -> Measured:
        answers = self.n - self.failed[name]
        first, between = self.counts[name]
        return Measured(self.n, self.failed[name], answers, self.empty[name], Times(first), Times(between))

    def given_up(self, requests: int) -> tuple[int, Gate] | None:
        """At how many requests and at which gate, within so many of them."""
        while (look := next_look(self.n)) <= requests:
            self.serve(look)
            worse = [gate for gate in judge(self.measured("stable"), self.measured("new"), LIMITS) if gate.worse]
            if worse:
                return self.n, worse[0]
        return None


def test_who_is_no_worse_is_given_up_in_less_than_alpha() -> None:
    rng, count = random.Random(5), times(100, 10_000)
    given_up = sum(Canary(rng).given_up(800) is not None for _ in range(count))
    # three standard deviations above the bound, for it is a sample
    assert given_up <= ALPHA * count + 3 * math.sqrt(ALPHA * count), given_up


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
    found = [Canary(rng, **how).given_up(within) for _ in range(count)]
    assert sum(each is not None and each[1].name == gate for each in found) >= 0.95 * count, found


def test_what_is_worse_by_less_than_declared_is_let_through() -> None:
    rng = random.Random(3)
    for _ in range(5):
        canary = Canary(rng, first=1.05, errors=0.006)
        assert canary.given_up(2000) is None


def test_a_revision_that_nobody_asked_is_not_judged() -> None:
    assert not any(gate.worse for gate in judge(Measured(), Measured(), LIMITS))
    gates = judge(Measured(), Measured(9, failed=9), LIMITS)
    assert not any(gate.worse for gate in gates), "before the first look"
