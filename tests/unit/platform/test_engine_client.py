"""What waits in a sequence's inbox for a client that does not read."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from quire.router.engine_client import MOST_KEPT, Sequence
from quire_schemas import wire

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
