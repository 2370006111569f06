"""Breakers: when they open, how long for, who decides, and that someone is left while someone does well."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.effort import examples

from quire.router.breaker import Breaker, Breakers, kept_out
from quire_schemas.wire import BreakerRules

RULES = BreakerRules(failures=3, share=0.5, window=10.0, requests=8, pause=4.0, longest=20.0, out=0.5)


def breaker(rules: BreakerRules = RULES) -> Breaker:
    return Breaker(rules, chance=lambda: 0.5)


def tripped(at: float = 0.0) -> Breaker:
    made = breaker()
    assert [made.fail(at) for _ in range(3)] == [False, False, True]
    return made


def test_it_opens_after_so_many_failures_in_a_row() -> None:
    made = breaker(BreakerRules(failures=3, requests=100))
    for _ in range(5):
        assert not made.fail(0)
        assert not made.fail(0)
        made.succeed(0)
    assert (made.fail(0), made.fail(0), made.fail(0)) == (False, False, True)
    assert (made.takes(0), made.state(0)) == (False, "open")


def test_it_opens_at_a_share_of_enough_requests_in_its_window() -> None:
    made = breaker()
    for at in range(3):  # good, bad, good, bad, good, bad
        made.succeed(at)
        assert not made.fail(at), "six say nothing"
    made.succeed(3)
    assert made.fail(3), "four of eight"
    made = breaker()
    for at in range(0, 80, 4):  # never eight within ten seconds
        made.succeed(at)
        assert not made.fail(at)


def test_one_sequence_decides_and_each_time_takes_twice_as_long() -> None:
    made, now = tripped(), 0.0
    for pause in (4.0, 8.0, 16.0, 20.0, 20.0):
        assert made.until == now + pause
        assert not made.takes(made.until - 0.01)
        assert not made.begin(made.until - 0.01)
        now = made.until
        assert made.takes(now)
        assert made.begin(now)
        assert (made.takes(now), made.state(now)) == (False, "trying"), "no second one beside it"
        assert not made.succeed(now), "what began before it opened says nothing"
        assert not made.fail(now)
        made.leave()
        assert made.begin(now), "the client of the first one left"
        assert made.fail(now, trial=True)
    assert made.begin(now + 20)
    assert made.succeed(now + 20, trial=True)
    assert made.state(now + 20) == "closed"


def test_its_pauses_go_on_where_they_were_until_it_has_done_well_for_a_while() -> None:
    for well, pause in ((9.0, 8.0), (10.0, 4.0)):
        made = tripped()
        made.begin(4.0)
        made.succeed(4.0, trial=True)
        for _ in range(3):
            made.fail(4.0 + well)
        assert made.until == 4.0 + well + pause


def test_pauses_differ_by_chance() -> None:
    ends = []
    for chance in (0.0, 1.0):
        made = Breaker(RULES, chance=lambda chance=chance: chance)  # type: ignore[misc]
        for _ in range(3):
            made.fail(0.0)
        ends.append(made.until)
    assert ends == [pytest.approx(3.2), pytest.approx(4.8)]


def test_a_new_process_is_tried_at_once() -> None:
    made = tripped()
    made.renew(1.0)
    assert made.begin(1.0)
    made.renew(1.5)
    assert made.begin(1.5), "the trial died with the old one"


def of(*names: str, rules: BreakerRules = RULES) -> Breakers:
    made = Breakers(chance=lambda: 0.5)
    made.set(rules, names, names)
    return made


def fail(breakers: Breakers, name: str, at: float = 0.0) -> None:
    for _ in range(3):
        breakers.end(name, at, ok=False)


def test_at_most_a_share_is_kept_out_unless_all_fail() -> None:
    made = of("a", "b", "c", "d")
    for at, name in enumerate("abc"):
        fail(made, name, at)
    assert [made.takes(name, 3.0) for name in "abcd"] == [False, False, True, True]
    assert made.waits(3.0) is None
    fail(made, "d", 3.0)
    assert [made.takes(name, 3.5) for name in "abcd"] == [False] * 4
    assert made.waits(3.5) == 0.5, "a is tried four seconds after it opened"
    assert made.waits(4.0) is None
    assert made.begin("a", 4.0)
    assert made.waits(4.0) == 1.0
    assert made.end("a", 5.5, ok=True, trial=True) == "closed"
    assert [made.takes(name, 4.5) for name in "abcd"] == [True, False, False, False], "the others are tried first"


def test_one_that_is_the_only_one_is_kept_out_too() -> None:
    made = of("a")
    fail(made, "a")
    assert (made.takes("a", 1.0), made.waits(1.0)) == (False, 3.0)
    made.set(RULES, ["a", "b"], ["a", "b"])
    assert (made.takes("a", 1.0), made.takes("b", 1.0), made.waits(1.0)) == (False, True, None)
    made.set(RULES, ["a", "b"], ["a"])
    assert made.waits(1.0) == 3.0, "one that drains is no help"
    made.set(RULES, ["b"], ["b"])
    made.set(RULES, ["a"], ["a"])
    assert made.takes("a", 1.0), "who comes back is forgotten"


def test_of_one_that_may_not_be_kept_out_every_sequence_is_a_trial() -> None:
    made = of("a", "b", "c", "d", "e")
    for name in "abc":
        fail(made, name)
    assert made.takes("c", 0.0)
    assert not made.begin("c", 0.0)
    assert made.end("c", 1.0, ok=True) == "closed"


NAMES = ("a", "b", "c", "d", "e")


@settings(max_examples=examples(150), deadline=None)
@given(
    st.integers(1, 5),
    st.floats(0.0, 1.0),
    st.lists(
        st.tuples(
            st.sampled_from(["well", "ill", "leave", "pass", "renew"]), st.integers(0, 4), st.integers(1, 12)
        ),
        max_size=120,
    ),
)
def test_someone_is_asked_while_someone_does_well_and_nobody_is_tried_twice_at_once(
    count: int, out: float, steps: list[tuple[str, int, int]]
) -> None:
    names = NAMES[:count]
    made, now = of(*names, rules=BreakerRules(3, 0.5, 10.0, 8, 4.0, 20.0, out)), 0.0
    trials: set[str] = set()
    all_failed = False
    for what, which, much in steps:
        name = names[which % count]
        if what == "pass":
            now += much
        elif what == "renew":
            made.of(name).renew(now)
            trials.discard(name)
        elif made.takes(name, now):
            trial = made.begin(name, now)
            assert not (trial and name in trials)
            if what == "leave" and trial:
                trials.add(name)
                assert not made.takes(name, now)
                made.end(name, now, None, trial=True)
                trials.discard(name)
                assert made.takes(name, now)
            elif what != "leave":
                made.end(name, now, ok=what == "well", trial=trial)
        opened = {each for each in names if made.of(each).opened_at is not None}
        all_failed = (all_failed and bool(opened)) or len(opened) == count
        assert made._out <= opened
        if len(opened) == count:
            assert made._out == opened
        elif not all_failed:
            assert len(made._out) <= max(1, int(out * count))
        assert any(made.takes(each, now) for each in names) or len(opened) == count
        wait = made.waits(now)
        assert (wait is not None) == (not any(made.takes(each, now) for each in names))
        if wait is not None:
            assert wait > 0
            assert any(made.takes(each, now + wait) for each in names)


def test_who_was_kept_out_stays_so_until_he_closes() -> None:
    assert kept_out((), {"b": 1.0, "a": 2.0}, 4, 0.25) == {"b"}
    assert kept_out({"a"}, {"b": 1.0, "a": 2.0}, 4, 0.25) == {"a"}
    assert kept_out({"a", "b", "c"}, {"b": 1.0, "a": 2.0}, 3, 0.0) == {"a", "b"}
    assert kept_out({"a"}, {}, 3, 0.5) == frozenset()
