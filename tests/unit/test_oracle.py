"""The oracle itself: what it lets pass and what it must not."""

from __future__ import annotations

import pytest
from tests.oracle import Reading, check

REFERENCE = "one two three"
BROKEN = [{"code": "engine_died"}]


@pytest.mark.parametrize(
    "reading",
    [
        Reading("p", REFERENCE, 200, "length", done=True),
        Reading("p", "one tw", 200, errors=BROKEN),
        Reading("p", "", 200, errors=BROKEN),
        Reading("p", "", 503),
    ],
)
def test_a_whole_answer_a_declared_end_and_a_refusal_pass(reading: Reading) -> None:
    check(reading, REFERENCE)


@pytest.mark.parametrize(
    "reading",
    [
        Reading("p", "one tow three", 200, "length", done=True),
        Reading("p", "one two", 200, "length", done=True),
        Reading("p", "one two three four", 200, "length", done=True),
        Reading("p", REFERENCE, 200, "length"),
        Reading("p", REFERENCE, 200, "length", done=True, errors=BROKEN),
        Reading("p", "one", 200, done=True),
        Reading("p", "one", 200, errors=[*BROKEN, *BROKEN]),
        Reading("p", "one", 200, errors=BROKEN, done=True),
        Reading("p", "one", 200),
        Reading("p", "one"),
    ],
)
def test_what_is_altered_short_silent_or_said_twice_does_not(reading: Reading) -> None:
    with pytest.raises(AssertionError):
        check(reading, REFERENCE)


def test_a_cut_passes_where_the_router_was_killed() -> None:
    check(Reading("p", "one", 200), REFERENCE, cut_allowed=True)
    with pytest.raises(AssertionError, match="altered"):
        check(Reading("p", "two", 200), REFERENCE, cut_allowed=True)
