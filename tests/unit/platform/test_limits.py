"""Limits of tenants: buckets against exact fractions, and what a limiter lets in and takes back."""

from __future__ import annotations

import contextlib
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quire.errors import RateLimited
from quire.router.budgets import Amount
from quire.router.limits import SECOND, Bucket, Limiter, Ticket, _seconds
from quire_schemas.wire import AccessKey, AccessLimit, Tenant

MINUTE = 60_000


class Clock:
    """Nanoseconds, as a test says."""

    def __init__(self) -> None:
        self.now = 0

    def __call__(self) -> int:
        return self.now

    def passes(self, seconds: float) -> None:
        self.now += round(seconds * SECOND)


def tenant(*limits: AccessLimit, name: str = "a", keys: tuple[str, ...] = ("k", "l")) -> Tenant:
    return Tenant(name, tuple(AccessKey(key, f"{name}-{key}") for key in keys), limits=limits)


def asks(limiter: Limiter, who: Tenant, key: str = "k") -> Ticket | None:
    """A request that ends at once; None if it is refused."""
    try:
        with limiter.entered(who, key) as ticket:
            return ticket
    except RateLimited:
        return None


STEPS = st.lists(st.tuples(st.integers(0, 3 * SECOND), st.integers(1, 30)), max_size=40)


@given(st.integers(1, 50), st.integers(1, 5 * SECOND), STEPS)
def test_a_bucket_is_exact(size: int, per: int, steps: list[tuple[int, int]]) -> None:
    bucket, now, level = Bucket(size, per, 0), 0, Fraction(size)
    for passed, amount in steps:
        now += passed
        level = min(level + Fraction(passed * size, per), Fraction(size))
        wanted = min(amount, size)
        wait = bucket.wait(amount, now)
        assert (wait == 0) == (level >= wanted)
        assert bucket.left(now) == max(level.numerator // level.denominator, 0)
        # that long and no nanosecond less
        assert level + Fraction(wait * size, per) >= wanted
        assert not wait or level + Fraction((wait - 1) * size, per) < wanted
        if not wait:
            bucket.take(amount, now)
            level -= amount


@given(st.integers(1, 20), st.integers(1, 2 * SECOND), STEPS)
def test_in_any_span_no_more_is_let_in_than_the_size_and_what_flows_in(
    size: int, per: int, steps: list[tuple[int, int]]
) -> None:
    bucket, now = Bucket(size, per, 0), 0
    taken: list[tuple[int, int]] = []
    for passed, asked in steps:
        now += passed
        amount = min(asked, size)
        if not bucket.wait(amount, now):
            bucket.take(amount, now)
            taken.append((now, amount))
    for first in range(len(taken)):
        for last in range(first, len(taken)):
            span = taken[last][0] - taken[first][0]
            assert sum(amount for _, amount in taken[first : last + 1]) <= size + Fraction(span * size, per)


def test_requests_come_back_evenly_and_each_key_has_its_own() -> None:
    clock = Clock()
    limiter, who = Limiter(clock), tenant(AccessLimit("key", requests=6, per=MINUTE))
    assert [asks(limiter, who) is not None for _ in range(7)] == [True] * 6 + [False]
    assert asks(limiter, who, "l") is not None
    clock.passes(9.999)
    assert asks(limiter, who) is None
    clock.passes(0.001)
    assert asks(limiter, who) is not None
    assert asks(limiter, who) is None


def test_a_refused_request_takes_nothing_of_any_limit_and_is_told_the_longest_wait() -> None:
    clock = Clock()
    both = AccessLimit("key", requests=1, per=1000), AccessLimit("policy", requests=2, per=MINUTE)
    limiter, who = Limiter(clock), tenant(*both)
    assert asks(limiter, who)
    with pytest.raises(RateLimited) as refused, limiter.entered(who, "k"):
        pass
    assert refused.value.retry_after == 1.0
    assert "1 requests in 1s for this key" in refused.value.message
    assert asks(limiter, who, "l"), "the refused one took nothing of the policy's"
    with pytest.raises(RateLimited) as refused, limiter.entered(who, "k"):
        pass
    assert refused.value.retry_after == 30.0, "the first one hit is named, and the longest wait told"


def test_tokens_are_reserved_and_what_was_not_used_comes_back() -> None:
    clock = Clock()
    limiter, who = Limiter(clock), tenant(AccessLimit("policy", tokens=100, per=MINUTE))
    with limiter.entered(who, "k") as ticket:
        ticket.reserve(Amount(1, 80))
        with pytest.raises(RateLimited), limiter.entered(who, "l") as other:
            other.reserve(Amount(1, 30))
        ticket.used = 10
    with limiter.entered(who, "l") as ticket:
        ticket.reserve(Amount(1, 90))
        ticket.used = 90
    assert asks(limiter, who) is None, "an empty bucket lets nobody in, before a prompt is tokenized"


def test_a_request_that_fails_gives_back_what_it_reserved() -> None:
    limiter, who = Limiter(Clock()), tenant(AccessLimit("policy", tokens=100, per=MINUTE))
    for _ in range(3):
        with contextlib.suppress(ValueError), limiter.entered(who, "k") as ticket:
            ticket.reserve(Amount(1, 100))
            raise ValueError
    assert limiter.headers(who, "k")[1] == (b"x-ratelimit-remaining-tokens", b"100")


def test_who_is_given_to_one_model_after_another_takes_no_more_than_he_may_use() -> None:
    limiter, who = Limiter(Clock()), tenant(AccessLimit("policy", tokens=100, per=MINUTE))
    with limiter.entered(who, "k") as ticket:
        ticket.reserve(Amount(1, 80))
        ticket.used += 10
        ticket.reserve(Amount(1, 90))
        assert limiter.headers(who, "k")[1] == (b"x-ratelimit-remaining-tokens", b"0")
        ticket.reserve(Amount(1, 40))
        assert limiter.headers(who, "k")[1] == (b"x-ratelimit-remaining-tokens", b"50")
        with pytest.raises(RateLimited):
            ticket.reserve(Amount(1, 91))
        ticket.used += 20
    assert limiter.headers(who, "k")[1] == (b"x-ratelimit-remaining-tokens", b"70")


def test_who_asks_for_more_than_a_bucket_holds_waits_until_it_is_full_and_pays_later() -> None:
    clock = Clock()
    limiter, who = Limiter(clock), tenant(AccessLimit("policy", tokens=100, per=10_000))
    with limiter.entered(who, "k") as ticket:
        ticket.reserve(Amount(1, 1000))
        ticket.used = 300
    clock.passes(19.9)  # 200 of debt, and one token to begin with
    assert asks(limiter, who) is None
    clock.passes(0.2)
    assert asks(limiter, who) is not None


def test_places_are_given_back_however_a_request_ends() -> None:
    limiter, who = (
        Limiter(Clock()),
        tenant(AccessLimit("key", concurrency=1), AccessLimit("policy", concurrency=2)),
    )
    with limiter.entered(who, "k"):
        assert asks(limiter, who) is None
        with limiter.entered(who, "l"):
            pass
        with contextlib.suppress(ValueError), limiter.entered(who, "l"):
            raise ValueError
        assert asks(limiter, who, "l") is not None
    assert asks(limiter, who) is not None


def test_a_changed_limit_begins_anew_and_running_requests_stay_counted() -> None:
    limiter = Limiter(Clock())
    before = tenant(AccessLimit("key", requests=1, per=MINUTE), AccessLimit("key", concurrency=1))
    after = tenant(AccessLimit("key", requests=2, per=MINUTE), AccessLimit("key", concurrency=2))
    with limiter.entered(before, "k"):
        limiter.act_by([after])
        with limiter.entered(after, "k"):
            assert asks(limiter, after) is None, "two run"
        assert asks(limiter, after) is not None
        assert asks(limiter, after) is None, "two of two were let in since"
    limiter.act_by([])
    assert asks(limiter, before) is not None, "a tenant that comes back begins anew"


def test_who_has_no_policy_has_no_limits() -> None:
    limiter = Limiter(Clock())
    with limiter.entered(None, "") as ticket:
        ticket.reserve(Amount(1, 10**9))
        ticket.used = 10**9
    assert limiter.headers(None, "") == []


def test_headers_tell_of_the_limit_that_leaves_least() -> None:
    clock = Clock()
    limits = (
        AccessLimit("policy", requests=100, per=1000),
        AccessLimit("key", requests=3, per=MINUTE),
        AccessLimit("key", tokens=1000, per=3_600_000),
    )
    limiter, who = Limiter(clock), tenant(*limits)
    with limiter.entered(who, "k") as ticket:
        ticket.reserve(Amount(1, 100))
        assert dict(limiter.headers(who, "k")) == {
            b"x-ratelimit-limit-requests": b"3",
            b"x-ratelimit-remaining-requests": b"2",
            b"x-ratelimit-reset-requests": b"20s",
            b"x-ratelimit-limit-tokens": b"1000",
            b"x-ratelimit-remaining-tokens": b"900",
            b"x-ratelimit-reset-tokens": b"6m0s",
        }


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0ms"),
        (0.0001, "1ms"),
        (0.12, "120ms"),
        (6.5, "6.5s"),
        (90, "1m30s"),
        (7200, "2h0m0s"),
        (59.9999, "1m0s"),
    ],
)
def test_times_are_written_as_openai_writes_them(seconds: float, text: str) -> None:
    assert _seconds(round(seconds * SECOND)) == text


def test_the_same_limit_twice_is_one() -> None:
    twice = AccessLimit("key", requests=2, per=MINUTE)
    limiter, who = Limiter(Clock()), tenant(twice, twice)
    assert [asks(limiter, who) is not None for _ in range(3)] == [True, True, False]
