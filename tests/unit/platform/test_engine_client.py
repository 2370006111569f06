"""What waits in a sequence's inbox for a client that does not read."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from quire.router.engine_client import MOST_KEPT, EngineClient, Sequence
from quire_schemas import wire
from quire_schemas.workers import Wanted

STATS = wire.Stats(
    steps=7,
    max_num_seqs=1,
    last_step_at=0.0,
    running=1,
    waiting=1,
    blocks_total=500,
    blocks_used=125,
    kv_slots_used=0,
    preemptions=0,
    prompt_tokens=0,
    generation_tokens=0,
    hot_hash="h",
)
SCORES = [wire.TokenLogprobs(1, -0.5)]


@given(st.lists(st.tuples(st.lists(st.integers(0, 9), max_size=3), st.booleans()), max_size=400))
def test_nothing_is_lost_or_moved_however_much_waits(steps: list[tuple[list[int], bool]]) -> None:
    client: Any = SimpleNamespace(connection=1)
    asked = wire.Generate("a", [1], wire.Sampling(max_tokens=2000))
    sequence = Sequence(client, asked, asyncio.Event(), 0)
    deltas = [wire.Delta("a", tuple(ids), logprobs=list(SCORES) if scored else None) for ids, scored in steps]
    for delta in deltas:
        sequence.put(delta)
    scored = sum(delta.logprobs is not None for delta in deltas)
    assert len(sequence.deltas) <= max(MOST_KEPT, 2 * scored) + MOST_KEPT

    def told(found: list[wire.Delta]) -> list[tuple[int, bool]]:
        return [(token, delta.logprobs is not None) for delta in found for token in delta.token_ids]

    taken = sequence.take()
    assert told(taken) == told(deltas)
    assert sum(delta.logprobs is not None for delta in taken) == scored
    assert sequence.take() == []


def test_tokens_that_wait_take_little_room() -> None:
    client: Any = SimpleNamespace(connection=1)
    sequence = Sequence(client, wire.Generate("a", [1], wire.Sampling(max_tokens=9000)), asyncio.Event(), 0)
    for token in range(3000):
        sequence.put(wire.Delta("a", (token,)))
    assert len(sequence.deltas) <= MOST_KEPT
    assert len(sequence.packed) <= MOST_KEPT
    assert sum(map(len, sequence.packed)) < 4 * 3000
    assert [token for delta in sequence.take() for token in delta.token_ids] == list(range(3000))


WANTED = Wanted("q", "tiny", "", 0.0, prompt_tokens=8, max_tokens=8, attempts=0)


async def full(tmp_path: Path) -> EngineClient:
    """An engine that computes one sequence, while one waits."""
    client = EngineClient(wire.ReplicaEndpoint("r", 1, str(tmp_path / "none")), lambda: None)
    client.stats = STATS
    return client


async def test_what_has_ended_waits_in_no_queue(tmp_path: Path) -> None:
    client = await full(tmp_path)
    try:
        client.take_in("a", WANTED, background=False, lent=False)
        other = client.take_in("b", WANTED, background=False, lent=False)
        assert client.queued(other)
        client.let_go(other)
        assert not client.queued(other)
    finally:
        await client.close()


async def test_whose_seat_is_lent_waits_behind_the_others(tmp_path: Path) -> None:
    client = await full(tmp_path)
    try:
        lent = client.take_in("a", WANTED, background=False, lent=True)
        own = client.take_in("b", WANTED, background=False, lent=False)
        assert client.queued(lent)
        assert not client.queued(own)
        client.policy = "priority"
        assert not client.queued(lent)
        assert client.queued(own)
    finally:
        await client.close()
