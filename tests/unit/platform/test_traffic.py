"""Where requests go: names, headers, exact shares, callers that stay, who steps in. All of it is pure."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.effort import examples

from quire.errors import (
    ContextLengthExceeded,
    EngineDied,
    EngineUnavailable,
    InvalidRequest,
    ModelNotFound,
    ModelStopped,
    OutOfTime,
    QueueFull,
    RequestQuarantined,
    TimedOut,
    failure_of,
)
from quire.router.balancer import STAY_LOAD, Candidate, choose
from quire.router.traffic import Asked, Shares, Traffic, stays_with, user_of
from quire_schemas import wire


def route(name: str = "r", names: tuple[str, ...] = ("chat",), created: int = 1, **more: Any) -> wire.TrafficRoute:
    backends = more.pop("backends", {"a": 1})
    made = tuple(wire.Backend(model, weight) for model, weight in backends.items())
    return wire.TrafficRoute(name, names, created, made, **more)


def traffic(*routes: wire.TrafficRoute, there: tuple[str, ...] = ("a", "b", "c")) -> Traffic:
    made = Traffic()
    made.set(routes, {name: name for name in there}, there)
    return made


def models(made: Traffic, asked: Asked, count: int) -> Counter[str | None]:
    ways = [made.way(asked) for _ in range(count)]
    return Counter(way.model for way in ways if way is not None)


# ── shares ────────────────────────────────────────────────────────────────────────────────────────────────


def test_ninety_five_to_five_is_ninety_five_to_five_in_any_hundred() -> None:
    shares = Shares((95, 5))
    turns = [shares.take() for _ in range(1000)]
    for begin in range(0, 900, 7):
        assert abs(turns[begin : begin + 100].count(1) - 5) <= 1
    assert turns[:100].count(1) == 5


@settings(max_examples=examples(150), deadline=None)
@given(st.lists(st.integers(0, 1000), min_size=1, max_size=8).filter(any), st.integers(1, 400))
def test_after_any_number_of_turns_each_has_its_share_but_for_less_than_one(weights: list[int], n: int) -> None:
    shares, had, total = Shares(weights), Counter[int](), sum(weights)
    for turn in range(1, n + 1):
        seen = shares.next
        assert shares.take() == seen, "to look takes no turn"
        had[seen] += 1
        for place, weight in enumerate(weights):
            assert abs(had[place] - turn * weight / total) < 1, (turn, had)
    assert all(had[place] == 0 for place, weight in enumerate(weights) if weight == 0)


def test_turns_go_on_over_tables_that_leave_the_weights_as_they_are() -> None:
    made = traffic(route(backends={"a": 3, "b": 1}))
    first = models(made, Asked("chat"), 2)
    made.set([route(backends={"a": 3, "b": 1}, attempts=5)], {}, ("a", "b"))
    assert first + models(made, Asked("chat"), 2) == {"a": 3, "b": 1}


def test_a_backend_that_is_not_there_leaves_its_share_to_the_others() -> None:
    made = traffic(route(backends={"a": 1, "gone": 2, "b": 3}))
    assert models(made, Asked("chat"), 40) == {"a": 10, "b": 30}


@pytest.mark.parametrize("backends", [{"a": 0, "b": 0}, {"gone": 1}])
def test_with_nobody_to_go_to_a_request_has_no_model_and_another_may_step_in(backends: dict[str, int]) -> None:
    fallbacks = (wire.Fallback("gone", ("Unavailable",)), wire.Fallback("c", ("Unavailable",)))
    way = traffic(route(backends=backends, fallbacks=fallbacks)).way(Asked("chat"))
    assert way is not None
    assert way.model is None
    assert way.instead("Unavailable", (), ("a", "b", "c")) == "c"


# ── names and headers ─────────────────────────────────────────────────────────────────────────────────────


def test_names_of_models_need_no_route_and_unknown_ones_have_none() -> None:
    made = traffic(route())
    way = made.way(Asked("a"))
    assert way is not None
    assert (way.model, way.route) == ("a", None)
    assert made.way(Asked("nobody")) is None
    assert made.names() == ["a", "b", "c", "chat"]


def test_more_headers_go_first_then_the_older_route_and_the_model_itself_has_the_rest() -> None:
    beta, eu = ("x-tenant", "beta"), ("x-region", "eu")
    made = traffic(
        route("plain", backends={"a": 1}),
        route("both", headers=(beta, eu), backends={"c": 1}),
        route("younger", headers=(eu,), backends={"c": 1}, created=9),
        route("one", headers=(beta,), backends={"b": 1}, created=5),
        route("own", names=("a",), headers=(beta,), backends={"b": 1}),
    )

    def chosen(name: str, **headers: str) -> str | None:
        given = [(f"x-{key}".encode(), value.encode()) for key, value in headers.items()]
        found = made.route_for(Asked(name, given))
        return found.route if found is not None else None

    assert chosen("chat") == "plain"
    assert chosen("chat", tenant="Beta") == "plain", "values are compared as they are"
    assert chosen("chat", tenant="beta") == "one"
    assert chosen("chat", region="eu") == "younger"
    assert chosen("chat", tenant="beta", region="eu") == "both"
    assert chosen("a") is None
    assert chosen("a", tenant="beta") == "own"
    made.set([route("own", names=("a",), backends={"b": 1})], {"a": "a"}, ("a", "b"))
    assert chosen("a") is None, "a Model keeps its name should both claim it"


# ── callers ───────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("body", "user"),
    [
        ({"user": "ann"}, "ann"),
        ({"user": "ann", "safety_identifier": "h7"}, "h7"),
        ({"metadata": {"user_id": "u1"}}, "u1"),
        ({"user_profile_id": "p"}, "p"),
        ({"user": 5, "metadata": ["x"]}, None),
        ({"user": ""}, None),
        ({}, None),
    ],
)
def test_the_user_is_named_as_each_api_names_him(body: dict[str, Any], user: str | None) -> None:
    assert user_of(json.dumps(body).encode()) == user
    assert user_of(b"[1") is None


@pytest.mark.parametrize("sticky", ["user", "header:x-user"])
def test_a_caller_stays_with_one_backend_and_callers_spread_by_weight(sticky: str) -> None:
    made = traffic(route(sticky=sticky, backends={"a": 3, "b": 1}))

    def of(caller: str) -> Asked:
        if sticky == "user":
            return Asked("chat", body=json.dumps({"user": caller}).encode())
        return Asked("chat", [(b"x-user", caller.encode())])

    first = {str(n): models(made, of(str(n)), 3) for n in range(800)}
    assert all(len(found) == 1 for found in first.values())
    share = sum("a" in found for found in first.values()) / 800
    assert 0.69 < share < 0.81
    way = made.way(of("7"))
    assert way is not None
    assert way.terms.caller == "7"
    assert not way.terms.by_prefix
    assert models(made, Asked("chat"), 40) == {"a": 30, "b": 10}, "who gives no name goes by weight"
    nameless = made.way(Asked("chat"))
    assert nameless is not None
    assert nameless.terms.by_prefix


@settings(max_examples=examples(100), deadline=None)
@given(
    st.dictionaries(st.sampled_from("abcdefgh"), st.integers(0, 50), min_size=1),
    st.sampled_from("abcdefgh"),
    st.lists(st.text(max_size=8), max_size=30),
)
def test_only_the_callers_of_one_who_leaves_move(weights: dict[str, int], left: str, callers: list[str]) -> None:
    rest = {name: weight for name, weight in weights.items() if name != left}
    for caller in callers:
        before = stays_with(caller, weights)
        assert before is None or weights[before] > 0
        if before != left:
            assert stays_with(caller, rest) == before


def test_what_a_route_says_of_stickiness_is_what_the_replica_is_chosen_by() -> None:
    for sticky, by_prefix in (("prefix", True), ("none", False)):
        way = traffic(route(sticky=sticky)).way(Asked("chat", body=b'{"user": "ann"}'))
        assert way is not None
        assert (way.terms.by_prefix, way.terms.caller) == (by_prefix, None)


def candidates(**in_flight: int) -> list[Candidate]:
    return [Candidate(name, True, 0, count, 0, 1000) for name, count in in_flight.items()]


@settings(max_examples=examples(150), deadline=None)
@given(
    st.dictionaries(st.sampled_from("abcdef"), st.integers(0, 40), min_size=1),
    st.text(max_size=8),
)
def test_a_caller_stays_with_a_replica_that_is_not_much_busier_than_the_rest(
    in_flight: dict[str, int], caller: str
) -> None:
    chosen = choose(candidates(**in_flight), caller=caller)
    assert chosen is not None
    assert in_flight[chosen] + 1 <= STAY_LOAD * (sum(in_flight.values()) + 1) / len(in_flight) + 1
    idle = dict.fromkeys(in_flight, 0)
    at_home = choose(candidates(**idle), caller=caller)
    if in_flight[str(at_home)] <= min(in_flight.values()):
        assert chosen == at_home
    others = {name: 0 for name in idle if name != at_home}
    if others:
        left = next(iter(others))
        rest = {name: 0 for name in idle if name != left}
        assert choose(candidates(**rest), caller=caller) == at_home, "who leaves moves his own callers alone"


def test_callers_spread_over_replicas() -> None:
    found = Counter(choose(candidates(a=0, b=0, c=0), caller=str(n)) for n in range(600))
    assert all(150 < count < 250 for count in found.values())


# ── failures ──────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("error", "failure"),
    [
        (ModelStopped(""), "Unavailable"),
        (EngineUnavailable(""), "Unavailable"),
        (ModelNotFound(""), "Unavailable"),
        (QueueFull(""), "QueueFull"),
        (TimedOut(""), "Timeout"),
        (ContextLengthExceeded(""), "ContextLengthExceeded"),
        (OutOfTime(""), None),
        (RequestQuarantined(""), None),
        (EngineDied(""), None),
        (InvalidRequest(""), None),
        (ValueError(""), None),
    ],
)
def test_which_failures_are_for_another_model_to_mend(error: Exception, failure: str | None) -> None:
    assert failure_of(error) == failure


def test_the_first_that_steps_in_for_a_failure_and_was_not_tried() -> None:
    fallbacks = (
        wire.Fallback("a", ("Unavailable",)),
        wire.Fallback("b", ("QueueFull", "Timeout")),
        wire.Fallback("c", ("QueueFull",)),
    )
    way = traffic(route(fallbacks=fallbacks)).way(Asked("chat"))
    assert way is not None
    there = ("a", "b", "c")
    assert way.instead("QueueFull", ["a"], there) == "b"
    assert way.instead("QueueFull", ["a", "b"], there) == "c"
    assert way.instead("QueueFull", ["a"], ("c",)) == "c"
    assert way.instead("Unavailable", ["a"], there) is None
    assert way.instead("ContextLengthExceeded", ["a"], there) is None


def test_a_percentage_of_requests_is_copied_exactly() -> None:
    made = traffic(route(mirror=wire.Mirror("b", 10)))
    copied = [way.mirror for _ in range(100) if (way := made.way(Asked("chat"))) is not None]
    assert copied.count("b") == 10
    ahead = made.way(Asked("chat"), ahead=True)
    assert ahead is not None
    assert ahead.mirror is None
