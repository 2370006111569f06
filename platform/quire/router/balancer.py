"""Which replica takes a request: pure functions over what the router knows of them, and the memory of prefixes.

The rule is one sum: a request goes where the fewest tokens stand before its own first one. These are the tokens
that the replica's other requests still have to compute, and those of its own prompt that the replica has not
computed yet. So a cached prefix of k tokens is worth k tokens of other work and never more: no replica is loaded
beyond that for its cache, and once it is busier by k tokens the prefix is computed a second time elsewhere, which
then has it, too. Without a cache the second part of the sum is the same everywhere, and the least outstanding work
decides. A caller whom a route keeps with one replica goes there as long as that has not much more than its share.

A replica that has no place left, in its batch or its queue, is not given more. The `n` sequences of one prompt
share its blocks, so they all go where the first of them went, as long as that is ready and has places (`home`).

What a replica has computed is remembered from what it was given (`Prefixes`): engines do not tell what they throw
away. A prefix that is remembered in vain costs a detour, after which it is there again.
"""

from __future__ import annotations

import hashlib
import math
from array import array
from collections import OrderedDict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Final

EXPECTED_COMPLETION: Final = 256
"""Tokens counted for a request that may write many: most stop far before their limit, often the whole context."""
RETRY_SHARE: Final = 0.2
RETRY_FLOOR: Final = 3
STAY_LOAD: Final = 1.25
"""How much busier than the average a replica may be for a caller who stays with it."""
PREFIX_BLOCK: Final = 16
"""Tokens of a block of a remembered prefix."""
MAX_REMEMBERED: Final = 65_536
"""Blocks that are remembered of one replica at most, a million tokens."""


@dataclass(slots=True)  # not frozen: each request makes one of each replica
class Candidate:
    """One replica at one moment. `ready`: connected, serving, making progress."""

    replica_id: str
    ready: bool
    outstanding_tokens: int
    """Tokens its requests still have to compute, as far as can be foreseen: see `outstanding`."""
    in_flight: int
    served: int
    """Requests it was ever given: spreads the load when all are idle."""
    places: int
    """Sequences it computes or queues at most."""
    cached_tokens: int = 0
    """Of the prompt of the request that is to be placed, from its beginning."""


def outstanding(prompt_tokens: int, max_tokens: int, generated: int) -> int:
    """Tokens still ahead of one request. Its prompt counts until its first token is there, less what is cached."""
    prompt = prompt_tokens if generated == 0 else 0
    return prompt + max(min(max_tokens, EXPECTED_COMPLETION) - generated, 1)


class Burden:
    """What the sequences of one replica have before them: the sum of `outstanding`, and the seats they take.

    It is kept up as they go on, so that a look at it costs the same however many there are. `unknown` are prompt
    tokens that are probably to be computed.
    """

    __slots__ = ("tokens", "width")

    def __init__(self) -> None:
        self.tokens = 0
        self.width = 0

    def add(self, unknown: int, max_tokens: int, width: int) -> None:
        """A sequence that takes `width` seats begins."""
        self.tokens += outstanding(unknown, max_tokens, 0)
        self.width += width

    def gain(self, unknown: int, max_tokens: int, before: int, generated: int) -> None:
        """A sequence that had `before` tokens now has `generated`."""
        self.tokens += outstanding(unknown, max_tokens, generated) - outstanding(unknown, max_tokens, before)

    def end(self, unknown: int, max_tokens: int, generated: int, width: int) -> None:
        """A sequence is over."""
        self.tokens -= outstanding(unknown, max_tokens, generated)
        self.width -= width


def choose(
    candidates: Iterable[Candidate],
    avoid: Collection[str] = (),
    home: str | None = None,
    caller: str | None = None,
) -> str | None:
    """The replica that is to have a sequence, None if there is none now.

    Only those that are ready and have a place come into question, and one of `avoid` only if it is the last. Of
    these `home`; else the one that `caller` stays with, if it is named; else the one with the least ahead of it,
    less what it has of the prompt.
    """
    able = [candidate for candidate in candidates if candidate.ready and candidate.in_flight < candidate.places]
    pool = [candidate for candidate in able if candidate.replica_id not in avoid] or able
    if not pool:
        return None
    if home is not None and any(candidate.replica_id == home for candidate in pool):
        return home
    if caller is not None:
        return _stay(pool, caller)
    best = min(pool, key=lambda c: (c.outstanding_tokens - c.cached_tokens, c.in_flight, c.served, c.replica_id))
    return best.replica_id


def _stay(pool: Sequence[Candidate], caller: str) -> str:
    """The first in the caller's own order of replicas that would not be busier than `STAY_LOAD` times the average
    with one request more. Who comes and who leaves moves the callers of its own alone."""
    bound = math.ceil(STAY_LOAD * (sum(candidate.in_flight for candidate in pool) + 1) / len(pool))
    fit = [candidate for candidate in pool if candidate.in_flight < bound]
    return min(fit, key=lambda each: hashlib.blake2b(f"{each.replica_id}\0{caller}".encode()).digest()).replica_id


def may_retry(retrying: int, in_flight: int) -> bool:
    """Whether one more request may be tried again: a fifth of those in flight, at least three.

    Keeps a dying fleet from being finished off by the requests that its deaths send round again.
    """
    return retrying < max(RETRY_FLOOR, int(in_flight * RETRY_SHARE))


def prefix_chain(token_ids: Sequence[int], salt: str) -> tuple[bytes, ...]:
    """A hash for each full block of `token_ids`, of the block and all before it; other salts give other hashes.

    The last token is left out, as engines compute it in any case. The hashes are the router's own: they say the
    same of a prompt as an engine's, and are not compared with them.
    """
    digest = hashlib.blake2b(salt.encode(), digest_size=8).digest()
    chain: list[bytes] = []
    ids = array("q", token_ids).tobytes()
    size = PREFIX_BLOCK * 8
    for at in range((len(token_ids) - 1) // PREFIX_BLOCK):
        digest = hashlib.blake2b(digest + ids[at * size : (at + 1) * size], digest_size=8).digest()
        chain.append(digest)
    return tuple(chain)


class Prefixes:
    """The blocks of prompts that one replica was given, at most `capacity`, the least recently used forgotten
    first.
    """

    __slots__ = ("_blocks", "capacity")

    def __init__(self, capacity: int) -> None:
        self.capacity = min(max(capacity, 0), MAX_REMEMBERED)
        self._blocks: OrderedDict[bytes, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._blocks)

    def add(self, chain: Sequence[bytes]) -> None:
        """The replica was given a prompt with this chain. The end of a chain is forgotten before its beginning."""
        for digest in reversed(chain[: self.capacity]):
            self._blocks[digest] = None
            self._blocks.move_to_end(digest)
        while len(self._blocks) > self.capacity:
            self._blocks.popitem(last=False)

    def known(self, chain: Sequence[bytes]) -> int:
        """Tokens at the beginning of a prompt that the replica has, as far as is remembered.

        What stands before a remembered block is remembered, too: it was given with it, or since. So the end of
        what is known is found by halves.
        """
        blocks, low, high = self._blocks, 0, len(chain)
        while low < high:
            middle = (low + high) // 2
            if chain[middle] in blocks:
                low = middle + 1
            else:
                high = middle
        return low * PREFIX_BLOCK
