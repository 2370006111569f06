"""The choice of a replica, as a function of what is known of them."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from quire.router.balancer import (
    EXPECTED_COMPLETION,
    PREFIX_BLOCK,
    Candidate,
    Prefixes,
    choose,
    may_retry,
    outstanding,
    prefix_chain,
)

CANDIDATES = st.lists(
    st.builds(
        Candidate,
        replica_id=st.sampled_from("abcdef"),
        ready=st.booleans(),
        outstanding_tokens=st.integers(0, 50),
        in_flight=st.integers(0, 5),
        served=st.integers(0, 9),
        places=st.integers(1, 6),
        cached_tokens=st.integers(0, 50),
    ),
    unique_by=lambda c: c.replica_id,
)


@given(CANDIDATES, st.sets(st.sampled_from("abcdef")), st.none() | st.sampled_from("abcdef"))
def test_the_choice_is_ready_has_a_place_and_least_ahead_among_those_not_avoided(
    candidates: list[Candidate], avoid: set[str], home: str | None
) -> None:
    chosen = choose(candidates, avoid, home)
    able = [c for c in candidates if c.ready and c.in_flight < c.places]
    pool = [c for c in able if c.replica_id not in avoid] or able
    if not able:
        assert chosen is None
        return
    if home in {c.replica_id for c in pool}:
        assert chosen == home
        return
    best = next(c for c in pool if c.replica_id == chosen)
    ahead = best.outstanding_tokens - best.cached_tokens
    assert ahead == min(c.outstanding_tokens - c.cached_tokens for c in pool)


@given(CANDIDATES)
def test_no_replica_is_chosen_for_its_cache_that_is_busier_by_more_than_it_saves(
    candidates: list[Candidate],
) -> None:
    chosen = next((c for c in candidates if c.replica_id == choose(candidates)), None)
    for other in candidates:
        if chosen is not None and other.ready and other.in_flight < other.places:
            assert chosen.outstanding_tokens - other.outstanding_tokens <= chosen.cached_tokens


def test_idle_replicas_take_turns() -> None:
    served = dict.fromkeys("abc", 0)
    for _ in range(9):
        chosen = choose(Candidate(name, True, 0, 0, count, 1) for name, count in served.items())
        assert chosen is not None
        served[chosen] += 1
    assert served == {"a": 3, "b": 3, "c": 3}


def test_a_long_prompt_weighs_until_its_first_token() -> None:
    assert outstanding(1000, 50, 0) == 1050
    assert outstanding(1000, 50, 1) == 49
    assert outstanding(10, 100_000, 0) == 10 + EXPECTED_COMPLETION
    assert outstanding(10, 100_000, 5_000) == 1


PROMPT = st.lists(st.integers(0, 3), max_size=5 * PREFIX_BLOCK)


@given(PROMPT, PROMPT, st.sampled_from(("", "a")), st.sampled_from(("", "a", "b")))
def test_a_prefix_is_known_as_far_as_tokens_and_salts_agree(
    given_ids: list[int], asked_ids: list[int], given_salt: str, asked_salt: str
) -> None:
    memory = Prefixes(100)
    memory.add(prefix_chain(given_ids, given_salt))
    same = 0
    while same < min(len(given_ids), len(asked_ids)) and given_ids[same] == asked_ids[same]:
        same += 1
    last = min(len(given_ids), len(asked_ids)) - 1  # the last token of either is never found
    blocks = max(min(same, last), 0) // PREFIX_BLOCK if given_salt == asked_salt else 0
    assert memory.known(prefix_chain(asked_ids, asked_salt)) == blocks * PREFIX_BLOCK


def test_the_memory_of_prefixes_is_bounded_and_keeps_beginnings() -> None:
    memory = Prefixes(4)
    old, new = prefix_chain([1] * 65, ""), prefix_chain([2] * 33, "")
    memory.add(old)
    memory.add(new)
    assert len(memory) == 4
    assert (memory.known(old), memory.known(new)) == (2 * PREFIX_BLOCK, 2 * PREFIX_BLOCK)
    long = prefix_chain([3] * 1000, "")
    memory.add(long)
    assert (len(memory), memory.known(long)) == (4, 4 * PREFIX_BLOCK)
    assert Prefixes(0).known(old) == 0


def test_retries_are_a_share_of_the_load_with_a_floor() -> None:
    assert [may_retry(n, 0) for n in (0, 2, 3)] == [True, True, False]
    assert may_retry(19, 100)
    assert not may_retry(20, 100)
