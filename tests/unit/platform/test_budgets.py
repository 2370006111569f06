"""Budgets: times of the calendar, sums against a plain list of what was spent, and who gets in."""

from __future__ import annotations

from contextlib import AbstractContextManager
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.effort import examples

from quire.errors import BudgetSpent, RateLimited, StorageUnavailable, describe
from quire.router.budgets import HOUR, Amount, Budgets, ends, first_hour, most, value
from quire.router.limits import Limiter, Ticket
from quire_schemas.wire import AccessBudget, AccessKey, BudgetTime, Prices, Tenant

NOW = datetime(2027, 1, 15, 8, 30, tzinfo=UTC)  # a Friday
TEAM = Tenant("team", (AccessKey("k", "1"), AccessKey("l", "2")))
PRICES = Prices(1500, 750, 6000)
"""In ticks a token: 0.15, 0.075 and 0.60 for a million."""


def budget(name: str = "b", per: BudgetTime = "day", tokens: int | None = 100, **more: object) -> AccessBudget:
    return AccessBudget("team", name, more.pop("scope", "policy"), per, tokens, **more)  # type: ignore[arg-type]


def held_to(*budgets: AccessBudget) -> Budgets:
    """That know that nothing was spent."""
    made = Budgets()
    made.act_by(budgets, [TEAM])
    made.begin(["team"], ())
    return made


def at(moment: datetime) -> float:
    return moment.timestamp()


# ── times ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("per", "moment", "begins", "over"),
    [
        ("day", "2027-01-15T08:30", "2027-01-15T00", "2027-01-16T00"),
        ("day", "2027-01-15T00:00", "2027-01-15T00", "2027-01-16T00"),
        ("week", "2027-01-15T08:30", "2027-01-11T00", "2027-01-18T00"),
        ("week", "2027-01-17T23:59", "2027-01-11T00", "2027-01-18T00"),
        ("week", "2027-01-18T00:00", "2027-01-18T00", "2027-01-25T00"),
        ("month", "2027-01-31T23:59", "2027-01-01T00", "2027-02-01T00"),
        ("month", "2028-02-29T12:00", "2028-02-01T00", "2028-03-01T00"),
        ("month", "2027-12-31T23:00", "2027-12-01T00", "2028-01-01T00"),
    ],
)
def test_times_of_the_calendar_are_those_of_utc(per: BudgetTime, moment: str, begins: str, over: str) -> None:
    now, first, last = (datetime.fromisoformat(text).replace(tzinfo=UTC) for text in (moment, begins, over))
    assert first_hour(per, at(now)) * HOUR == at(first)
    assert ends(per, at(now)) == at(last)


def test_the_last_hours_count_whole_as_long_as_a_part_of_them_does() -> None:
    begins = at(NOW - timedelta(minutes=30))
    assert first_hour(24, at(NOW)) * HOUR == begins - 24 * HOUR
    assert first_hour(1, begins) * HOUR == begins - HOUR
    assert first_hour(1, begins + 3599) * HOUR == begins - HOUR


# ── what counts ───────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("more", "counted"),
    [
        ({}, 130),
        ({"cached": "free"}, 90),
        ({"counts": "prompt"}, 100),
        ({"counts": "prompt", "cached": "free"}, 60),
        ({"counts": "completion"}, 30),
        ({"tokens": None, "cost": 10**10}, 60 * 1500 + 40 * 750 + 30 * 6000),
    ],
)
def test_what_of_a_request_a_budget_counts(more: dict[str, object], counted: int) -> None:
    assert value(budget(**more), Amount(1, 100, 40, 30).priced(PRICES)) == counted  # type: ignore[arg-type]


def test_a_request_is_held_for_the_dearer_of_what_it_can_come_to() -> None:
    assert most(100, 130, PRICES).cost == 100 * 1500 + 30 * 6000
    assert most(100, 130, Prices(1, 5, 0)).cost == 500
    assert most(100, 130, None).cost == 0


def test_money_adds_up_to_the_last_tick() -> None:
    """A tenth of a cent for a million tokens, one token at a time."""
    one = Amount(1, 1, 0, 0).priced(Prices(10, 0, 0))
    budgets = held_to(budget(tokens=None, cost=10 * 1_000_000))
    for _ in range(999):
        budgets.add(int(at(NOW)) // HOUR, "team", "k", one)
    (shown,) = budgets.standing(at(NOW))
    assert shown.spent == 9990, "not a sum of rounded floats"


# ── who gets in ───────────────────────────────────────────────────────────────────────────────────────────


def spend(budgets: Budgets, tokens: int, key: str = "k", when: datetime = NOW) -> None:
    budgets.add(int(at(when)) // HOUR, "team", key, Amount(1, tokens))


def test_a_spent_budget_refuses_until_its_time_is_over() -> None:
    budgets = held_to(budget())
    spend(budgets, 99)
    budgets.check("team", "l", at(NOW))
    spend(budgets, 1)
    with pytest.raises(BudgetSpent) as refused:
        budgets.check("team", "l", at(NOW))
    assert refused.value.message == "The budget 'b' of this policy is spent, until 2027-01-16T00:00:00Z."
    headers = dict(describe(refused.value).headers)
    assert headers[b"retry-after"] == b"55800", "fifteen and a half hours, which are not cut"
    assert headers[b"x-should-retry"] == b"false"
    budgets.check("team", "l", at(datetime(2027, 1, 16, tzinfo=UTC)))


def test_a_budget_of_keys_is_one_for_each() -> None:
    budgets = held_to(budget(scope="key"))
    spend(budgets, 100, "k")
    assert (budgets.has_room("team", "k", at(NOW)), budgets.has_room("team", "l", at(NOW))) == (False, True)
    assert [(each.key, each.spent) for each in budgets.standing(at(NOW))] == [("k", 100), ("l", 0)]


def test_of_the_last_hours_the_first_that_is_forgotten_opens_it_again() -> None:
    budgets = held_to(budget(per=3))
    spend(budgets, 60, when=NOW - timedelta(hours=2))
    spend(budgets, 60, when=NOW - timedelta(hours=1))
    with pytest.raises(BudgetSpent) as refused:
        budgets.check("team", "k", at(NOW))
    assert "until 2027-01-15T10:00:00Z" in refused.value.message
    assert not budgets.has_room("team", "k", at(NOW.replace(hour=9, minute=59)))
    assert budgets.has_room("team", "k", at(NOW.replace(hour=10, minute=0)))


def test_what_is_not_known_to_be_left_is_not_given_out() -> None:
    budgets = Budgets()
    budgets.act_by([budget()], [TEAM])
    with pytest.raises(StorageUnavailable):
        budgets.check("team", "k", at(NOW))
    budgets.check("other", "k", at(NOW))
    spend(budgets, 7)
    budgets.begin(["team"], [(int(at(NOW)) // HOUR, "team", "gone", Amount(1, 50))])
    (shown,) = budgets.standing(at(NOW))
    assert shown.spent == 50, "what the ledger says is all of it, of keys that are no more, too"


def test_a_budget_that_changes_counts_what_was_spent() -> None:
    budgets = held_to(budget(tokens=100))
    spend(budgets, 60)
    budgets.act_by([budget(tokens=50)], [TEAM])
    assert not budgets.has_room("team", "k", at(NOW))
    budgets.act_by([budget(tokens=500), budget("w", "week", tokens=61)], [TEAM])
    assert budgets.has_room("team", "k", at(NOW))
    spend(budgets, 1)
    assert not budgets.has_room("team", "k", at(NOW))


def test_what_was_spent_before_its_time_is_none_of_it_also_when_the_clock_goes_back() -> None:
    budgets = held_to(budget())
    spend(budgets, 5)
    assert [each.spent for each in budgets.standing(at(NOW))] == [5]
    spend(budgets, 90, when=NOW - timedelta(days=1))
    assert [each.spent for each in budgets.standing(at(NOW))] == [5]
    assert [each.spent for each in budgets.standing(at(NOW - timedelta(days=1)))] == [95]


def test_it_warns_from_the_declared_share_on() -> None:
    budgets = held_to(budget(warn_at=7500), budget("w", "week", tokens=1000))
    spend(budgets, 74)
    assert (budgets.warning("team", "k", at(NOW)), budgets.low(at(NOW))) == ("", [])
    spend(budgets, 1)
    assert budgets.warning("team", "k", at(NOW)) == "b; left=25.00%; until=2027-01-16T00:00:00Z"
    assert [(each.name, each.state) for each in budgets.low(at(NOW))] == [("b", "warned")]
    spend(budgets, 25)
    assert [(each.name, each.state) for each in budgets.low(at(NOW))] == [("b", "spent")]
    assert budgets.warning("team", "k", at(NOW)) == "b; left=0.00%; until=2027-01-16T00:00:00Z"


def limiter(*budgets: AccessBudget) -> Limiter:
    made = Limiter(lambda: 0, lambda: at(NOW))
    made.budgets.act_by(budgets, [TEAM])
    made.budgets.begin(["team"], ())
    return made


def test_what_running_requests_may_need_is_held_and_comes_back() -> None:
    made = limiter(budget())
    with made.entered(TEAM, "k") as ticket:
        ticket.reserve(Amount(1, 10, 0, 5000))
        with pytest.raises(RateLimited) as refused, made.entered(TEAM, "l"):
            pass
        assert not isinstance(refused.value, BudgetSpent), "it may be free in a moment"
        assert dict(describe(refused.value).headers)[b"x-should-retry"] == b"true"
        ticket.reserve(Amount(1, 10, 0, 5000))  # another model is tried for it
    assert made.has_place(TEAM, "l")
    spend(made.budgets, 30)
    with made.entered(TEAM, "l") as ticket:
        ticket.reserve(Amount(1, 69))
        with made.entered(TEAM, "k") as other:
            other.reserve(Amount(1, 1))
            with pytest.raises(RateLimited), made.entered(TEAM, "k"):
                pass


def test_a_budget_that_comes_while_a_request_runs_holds_nothing_of_it() -> None:
    made = Limiter(lambda: 0, lambda: at(NOW))
    with made.entered(TEAM, "k") as ticket:
        ticket.reserve(Amount(1, 50))
        made.budgets.act_by([budget()], [TEAM])
        made.budgets.begin(["team"], ())
    (shown,) = made.budgets.standing(at(NOW))
    assert (shown.held, shown.spent) == (0, 0)


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["ask", "end", "pass"]),
        st.sampled_from(["k", "l"]),
        st.integers(1, 60),
        st.integers(0, 60),
    ),
    max_size=60,
)
DECLARED = st.lists(
    st.builds(
        budget,
        st.sampled_from(["a", "b", "c"]),
        st.sampled_from(["day", "week", "month", 1, 2, 30]),
        st.integers(1, 300),
        scope=st.sampled_from(["key", "policy"]),
        counts=st.sampled_from(["total", "prompt", "completion"]),
        cached=st.sampled_from(["full", "free"]),
    ),
    min_size=1,
    max_size=3,
)


@settings(max_examples=examples(100), deadline=None)
@given(DECLARED, STEPS)
def test_sums_are_those_of_a_plain_list_and_no_budget_is_overdrawn_by_a_whole_request(
    declared: list[AccessBudget], steps: list[tuple[str, str, int, int]]
) -> None:
    now = at(NOW)
    made = Limiter(lambda: 0, lambda: now)
    made.budgets.act_by(declared, [TEAM])
    made.budgets.begin(["team"], ())
    spent: list[tuple[float, str, Amount]] = []
    running: list[tuple[AbstractContextManager[Ticket], str, Amount]] = []

    def counted(each: AccessBudget, key: str) -> int:
        first = first_hour(each.per, now)
        return sum(
            value(each, amount)
            for when, whose, amount in spent
            if int(when) // HOUR >= first and (each.scope == "policy" or whose == key)
        )

    for what, key, one, other in steps:
        if what == "pass":
            now += one * 1200
        elif what == "ask":
            place: AbstractContextManager[Ticket] = made.entered(TEAM, key)
            left = all(counted(each, key) < each.size for each in declared)
            refusal: RateLimited | None = None
            try:
                ticket = place.__enter__()
            except RateLimited as error:
                refusal = error
            if refusal is not None:
                assert isinstance(refusal, BudgetSpent) != left
                continue
            assert left
            amount = Amount(1, one, 0, other)
            ticket.reserve(amount)
            running.append((place, key, amount))
        elif running:
            place, key, amount = running.pop(one % len(running))
            came = Amount(
                1, amount.prompt_tokens, min(other, amount.prompt_tokens), min(other, amount.completion_tokens)
            )
            spent.append((now, key, came))
            made.budgets.add(int(now) // HOUR, "team", key, came)
            place.__exit__(None, None, None)
        for each in declared:
            for name in ("k", "l") if each.scope == "key" else ("",):
                found = made.budgets._standing(each, name, now)
                assert found.spent == counted(each, name)
                assert found.spent < each.size + 120, "less than the most of one request"
