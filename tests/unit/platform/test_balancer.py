"""The choice of a replica, as a function of what is known of them."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from quire.router.balancer import (
    EXPECTED_COMPLETION,
    PREFIX_BLOCK,
    Burden,
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


def test_what_is_known_ends_where_the_first_block_is_forgotten() -> None:
    """Looking by halves finds what looking at each block would, whatever was given and forgotten before."""
    rng = random.Random(0)
    memory = Prefixes(40)
    chains = [prefix_chain([*range(head * 16), *(1000 * own + at for at in range(400))], "")
              for head in (0, 3, 9) for own in range(1, 6)]  # fmt: skip
    for _ in range(2000):
        given = rng.choice(chains)
        memory.add(given[: rng.randrange(len(given) + 1)])
        asked = rng.choice(chains)
        one_by_one = next((at for at in range(len(asked)) if not memory.known(asked[at : at + 1])), len(asked))
        assert memory.known(asked) == one_by_one * PREFIX_BLOCK


def test_a_burden_is_the_sum_over_the_sequences_that_go_on() -> None:
    rng = random.Random(0)
    burden = Burden()
    live: dict[int, list[int]] = {}
    for number in range(3000):
        if rng.random() < 0.4 or not live:
            live[number] = [rng.randrange(200), rng.choice([1, 16, 255, 256, 257, 4096]), 0, rng.randrange(1, 4)]
            unknown, most, _, width = live[number]
            burden.add(unknown, most, width)
        elif rng.random() < 0.7:
            each = rng.choice(list(live.values()))
            before, each[2] = each[2], each[2] + rng.randrange(1, 100)
            burden.gain(each[0], each[1], before, each[2])
        else:
            unknown, most, generated, width = live.pop(rng.choice(list(live)))
            burden.end(unknown, most, generated, width)
        assert burden.tokens == sum(outstanding(*each[:3]) for each in live.values())
        assert burden.width == sum(each[3] for each in live.values())
