"""The choice of a replica, as a function of what is known of them."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from quire.router.balancer import EXPECTED_COMPLETION, Candidate, choose, may_retry, outstanding

CANDIDATES = st.lists(
    st.builds(
        Candidate,
        replica_id=st.sampled_from("abcdef"),
        ready=st.booleans(),
        outstanding_tokens=st.integers(0, 50),
        in_flight=st.integers(0, 5),
        served=st.integers(0, 9),
    ),
    unique_by=lambda c: c.replica_id,
)


@given(CANDIDATES, st.sets(st.sampled_from("abcdef")))
def test_the_choice_is_ready_and_has_least_ahead_among_those_not_avoided(
    candidates: list[Candidate], avoid: set[str]
) -> None:
    chosen = choose(candidates, avoid)
    ready = [c for c in candidates if c.ready]
    pool = [c for c in ready if c.replica_id not in avoid] or ready
    if not ready:
        assert chosen is None
        return
    best = next(c for c in pool if c.replica_id == chosen)
    assert best.outstanding_tokens == min(c.outstanding_tokens for c in pool)


def test_idle_replicas_take_turns() -> None:
    served = dict.fromkeys("abc", 0)
    for _ in range(9):
        chosen = choose(Candidate(name, True, 0, 0, count) for name, count in served.items())
        assert chosen is not None
        served[chosen] += 1
    assert served == {"a": 3, "b": 3, "c": 3}


def test_a_long_prompt_weighs_until_its_first_token() -> None:
    assert outstanding(1000, 50, 0) == 1050
    assert outstanding(1000, 50, 1) == 49
    assert outstanding(10, 100_000, 0) == 10 + EXPECTED_COMPLETION
    assert outstanding(10, 100_000, 5_000) == 1


def test_retries_are_a_share_of_the_load_with_a_floor() -> None:
    assert [may_retry(n, 0) for n in (0, 2, 3)] == [True, True, False]
    assert may_retry(19, 100)
    assert not may_retry(20, 100)
