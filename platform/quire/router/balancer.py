"""Which replica takes a request: pure functions over what the router knows of them."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Final

EXPECTED_COMPLETION: Final = 256
"""Tokens counted for a request that may write many: most stop far before their limit, often the whole context."""
RETRY_SHARE: Final = 0.2
RETRY_FLOOR: Final = 3


@dataclass(frozen=True, slots=True)
class Candidate:
    """One replica at one moment. `ready`: connected, serving, making progress."""

    replica_id: str
    ready: bool
    outstanding_tokens: int
    """Tokens its requests still have to compute, as far as can be foreseen: see `outstanding`."""
    in_flight: int
    served: int
    """Requests it was ever given: spreads the load when all are idle."""


def outstanding(prompt_tokens: int, max_tokens: int, generated: int) -> int:
    """Tokens still ahead of one request; its prompt counts until its first token is there."""
    prompt = prompt_tokens if generated == 0 else 0
    return prompt + max(min(max_tokens, EXPECTED_COMPLETION) - generated, 1)


def choose(candidates: Iterable[Candidate], avoid: Collection[str] = ()) -> str | None:
    """The ready replica with the least ahead of it; one of `avoid` only if it is the last. None: none is ready."""
    ready = [candidate for candidate in candidates if candidate.ready]
    pool = [candidate for candidate in ready if candidate.replica_id not in avoid] or ready
    if not pool:
        return None
    best = min(pool, key=lambda c: (c.outstanding_tokens, c.in_flight, c.served, c.replica_id))
    return best.replica_id


def may_retry(retrying: int, in_flight: int) -> bool:
    """Whether one more request may be tried again: a fifth of those in flight, at least three.

    Keeps a dying fleet from being finished off by the requests that its deaths send round again.
    """
    return retrying < max(RETRY_FLOOR, int(in_flight * RETRY_SHARE))
