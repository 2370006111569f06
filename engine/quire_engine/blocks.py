"""The pool of KV blocks: the one place where block ids are minted, shared and freed.

The cache is cut into `num_blocks` blocks of `block_size` tokens. Layers of one kind form a *group*; a request owns
one *table* a group, a list of block ids, and its token `i` lies in block `table[i // block_size]` at offset
`i % block_size`. All groups take from one pool, and all tables of a request have one length. A group whose layers
see only a window lets go of what lies before it: `trim` puts `GONE` where such a block was.

Every block carries a count of the tables it is in. Full blocks may be in several; a block that is still being
filled is in exactly one, so no write ever reaches another request's tokens. Three roads lead to a shared block:

    seal, match, adopt   a block that is full and computed is *sealed* with the hash of all its tokens and all
                         before them; a request that begins alike adopts it
    fork                 a second set of tables over the same tokens: full blocks are shared, the one that is
                         being filled is to be copied (copy-on-write)

A sealed block whose last table leaves is *idle*: free, but found again by `match` until it is needed for something
else. Blank blocks are handed out first, the one freed last before others, for it is the warmest; then idle ones,
the least recently used first. Blocks leave a table last first, so that the end of a chain goes before its
beginning.

Hashes are chained: `chain(before, tokens)` covers the tokens of one block and, through `before`, everything ahead
of it. The first link is `root`: what keys and values depend on besides tokens, and who may share them at all.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from hashlib import blake2b

import msgspec

from quire_engine.errors import InvariantBroken
from quire_schemas.sizing import blocks_held

GONE = -1
"""In a table: a block before the group's window, which the request no longer has."""

Tables = list[list[int]]
"""One table a group."""


_encode = msgspec.msgpack.Encoder().encode
_BLAKE2B = blake2b(digest_size=16)
"""To copy: that is less work than to make one with parameters."""


def root(*parts: str) -> bytes:
    """The first link of a chain of hashes: only requests with the same `parts` can share blocks."""
    return _digest(parts)


def chain(before: bytes, token_ids: Sequence[int]) -> bytes:
    """The hash of a full block of `token_ids` behind the blocks that `before` stands for."""
    return _digest((before, token_ids))


def _digest(values: Sequence[object]) -> bytes:
    """Sixteen bytes that no other `values` give."""
    digest = _BLAKE2B.copy()
    digest.update(_encode(values))
    return digest.digest()


class BlockPool:
    """`num_blocks` ids from 0, counted. Sizes are in blocks, over all groups, unless a name says tokens.

    `windows` has the window of each group in tokens, or None for layers that see everything.
    """

    __slots__ = (
        "_blank",
        "_full",
        "_idle",
        "_known",
        "_refs",
        "_sealed",
        "_sliding",
        "block_size",
        "evictions",
        "is_windowed",
        "num_blocks",
        "num_groups",
        "windows",
    )

    def __init__(self, num_blocks: int, block_size: int, windows: Sequence[int | None] = (None,)) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.windows = tuple(windows)
        self.num_groups = len(windows)
        self.is_windowed = any(window is not None for window in windows)
        """Whether some group does not keep everything."""
        self.evictions = 0
        """Idle blocks that were taken for something else."""
        self._full = tuple(group for group, window in enumerate(windows) if window is None)
        self._sliding = tuple((group, window) for group, window in enumerate(windows) if window is not None)
        self._blank = list(range(num_blocks - 1, -1, -1))
        self._idle: OrderedDict[int, None] = OrderedDict()  # the least recently used first
        self._refs = [0] * num_blocks
        self._known: tuple[dict[bytes, int], ...] = tuple({} for _ in windows)
        self._sealed: list[tuple[dict[bytes, int], bytes] | None] = [None] * num_blocks
        """Of each block, the part of `_known` that it is in and the digest it is found by."""

    # ── counting ──────────────────────────────────────────────────────────────────────────────────────

    @property
    def num_free(self) -> int:
        """Blocks that no table holds, idle ones included."""
        return len(self._blank) + len(self._idle)

    @property
    def num_idle(self) -> int:
        """Free blocks that can still be found by their hash."""
        return len(self._idle)

    @property
    def num_used(self) -> int:
        return self.num_blocks - len(self._blank) - len(self._idle)

    def blocks_for(self, num_tokens: int) -> int:
        """The length of a table that holds `num_tokens` tokens."""
        return -(-num_tokens // self.block_size)

    def most_held(self, num_tokens: int, chunk: int) -> int:
        """Blocks that a sequence of `num_tokens` holds at most, in all groups, if a step computes `chunk` of
        them.
        """
        if not self._sliding:
            return self.blocks_for(num_tokens) * self.num_groups
        return blocks_held(self.windows, num_tokens, chunk, self.block_size)

    # ── tables ────────────────────────────────────────────────────────────────────────────────────────

    def empty(self) -> Tables:
        """The tables of a request that holds nothing."""
        return [[] for _ in range(self.num_groups)]

    def held(self, tables: Tables) -> int:
        """Blocks that `tables` hold."""
        if not self._sliding:
            return len(tables[0]) * self.num_groups
        return sum(len(table) - table.count(GONE) for table in tables)

    def freed_by(self, owners: Iterable[Tables]) -> int:
        """Blocks that would be free if all these tables were released: those that nobody else holds."""
        held = Counter(block for tables in owners for table in tables for block in table if block != GONE)
        return sum(self._refs[block] == count for block, count in held.items())

    def grow(self, tables: Tables, num_tokens: int) -> bool:
        """Lengthen `tables` until they hold `num_tokens`. False, and nothing changed, if too few are free."""
        missing = -(-num_tokens // self.block_size) - len(tables[0])
        if missing <= 0:
            return True
        if missing * self.num_groups > len(self._blank) + len(self._idle):
            return False
        for table in tables:
            for _ in range(missing):
                table.append(self._mint())
        return True

    def extend(self, tables: Tables) -> None:
        """Lengthen `tables` by a block each; as many are free."""
        blank = self._blank
        for table in tables:
            if blank:  # as `_mint` does, without the call
                block = blank.pop()
                self._refs[block] = 1
                table.append(block)
            else:
                table.append(self._mint())

    def trim(self, tables: Tables, position: int) -> None:
        """Let go of what no token from `position` on can see."""
        for group, window in self._sliding:
            table = tables[group]
            index = max(0, position - window + 1) // self.block_size - 1
            while index >= 0 and table[index] != GONE:
                self._let_go(table[index])
                table[index] = GONE
                index -= 1

    def release(self, tables: Tables) -> None:
        """Give back every block of `tables` and leave them empty."""
        for table in tables:
            while table:
                block = table.pop()
                if block != GONE:
                    self._let_go(block)

    def fork(self, tables: Tables, num_tokens: int) -> tuple[Tables, list[tuple[int, int]]] | None:
        """A second set of tables over the first `num_tokens` tokens, and the copies (from, to) it needs.

        The block that these tokens do not fill is copied, for each of the two will write to its own; until the
        copy is made the new one holds nothing. None, and nothing changed, if too few blocks are free.
        """
        shared, begun = divmod(num_tokens, self.block_size)
        if shared + bool(begun) > len(tables[0]):
            raise InvariantBroken(f"{num_tokens} tokens of tables of {len(tables[0])} blocks cannot be shared")
        if begun and self.num_groups > self.num_free:
            return None
        forked: Tables = []
        copies: list[tuple[int, int]] = []
        for table in tables:
            for block in table[:shared]:
                if block != GONE:
                    self._hold(block)
            forked.append(table[:shared])
            if begun:
                copies.append((table[shared], self._mint()))
                forked[-1].append(copies[-1][1])
        return forked, copies

    # ── blocks that can be found ──────────────────────────────────────────────────────────────────────

    def seal(self, tables: Tables, index: int, digest: bytes) -> None:
        """The blocks at `index` are full and computed, and `digest` stands for them and all before them.

        Where another block already has the digest that one stays the known one.
        """
        sealed = self._sealed
        for group, known in enumerate(self._known):
            block = tables[group][index]
            if block != GONE and sealed[block] is None and known.setdefault(digest, block) == block:
                sealed[block] = (known, digest)

    def match(self, digests: Sequence[bytes]) -> int:
        """How many leading blocks of a chain are there, in every group as far as its window reaches back."""
        count = len(digests)
        for group in self._full:
            known = self._known[group]
            count = next((at for at in range(count) if digests[at] not in known), count)
        if not self._sliding or not count:
            return count
        runs = [0] * self.num_groups
        best = 0
        for at in range(1, count + 1):
            enough = True
            for group, window in self._sliding:
                runs[group] = runs[group] + 1 if digests[at - 1] in self._known[group] else 0
                enough = enough and runs[group] >= at - self._first_seen(at, window)
            if enough:
                best = at
        return best

    def price(self, digests: Sequence[bytes]) -> tuple[int, int]:
        """What adopting the chain `digests`, which `match` found whole, gives: blocks held, and those of them
        idle.
        """
        held = idle = 0
        for group, first in self._reach(len(digests)):
            for digest in digests[first:]:
                held += 1
                idle += not self._refs[self._known[group][digest]]
        return held, idle

    def adopt(self, tables: Tables, digests: Sequence[bytes]) -> None:
        """Make empty `tables` those of a request whose first blocks are the chain `digests`, which `match`
        found.
        """
        for group, first in self._reach(len(digests)):
            table = tables[group]
            table.extend([GONE] * first)
            for digest in digests[first:]:
                block = self._known[group][digest]
                self._hold(block)
                table.append(block)

    def _reach(self, count: int) -> list[tuple[int, int]]:
        """Per group, the first of `count` leading blocks that is still seen behind them."""
        reach = [(group, 0) for group in self._full]
        reach += [(group, self._first_seen(count, window)) for group, window in self._sliding]
        return sorted(reach)

    def _first_seen(self, count: int, window: int) -> int:
        return max(0, count * self.block_size - window + 1) // self.block_size

    # ── one block ─────────────────────────────────────────────────────────────────────────────────────

    def _mint(self) -> int:
        if self._blank:
            block = self._blank.pop()
        else:
            block, _ = self._idle.popitem(last=False)
            self.evictions += 1
            sealed = self._sealed[block]
            if sealed is not None:
                del sealed[0][sealed[1]]
                self._sealed[block] = None
        self._refs[block] = 1
        return block

    def _hold(self, block: int) -> None:
        if not self._refs[block]:
            if block not in self._idle:
                raise InvariantBroken(f"block {block} is blank and cannot be shared")
            del self._idle[block]
        self._refs[block] += 1

    def _let_go(self, block: int) -> None:
        self._refs[block] -= 1
        if self._refs[block] == 0:
            if self._sealed[block] is None:
                self._blank.append(block)
            else:
                self._idle[block] = None
        elif self._refs[block] < 0:
            raise InvariantBroken(f"block {block} was freed twice")

    def check_integrity(self, owners: Iterable[Tables]) -> None:
        """Raise `InvariantBroken` unless counts, free blocks, hashes and all live tables tell one story.

        O(num_blocks). `owners` are the tables of every live request.
        """
        counted = [0] * self.num_blocks
        for tables in owners:
            if len({len(table) for table in tables}) > 1:
                raise InvariantBroken("a request has tables of several lengths")
            for table in tables:
                for block in table:
                    if block == GONE:
                        continue
                    if not 0 <= block < self.num_blocks:
                        raise InvariantBroken(f"block {block} is not one of {self.num_blocks}")
                    counted[block] += 1
        if counted != self._refs:
            wrong = [block for block in range(self.num_blocks) if counted[block] != self._refs[block]]
            raise InvariantBroken(f"blocks {wrong[:8]} are in other numbers of tables than their counts say")
        free = [*self._blank, *self._idle]
        if len(set(free)) != len(free) or set(free) != {b for b, refs in enumerate(self._refs) if refs == 0}:
            raise InvariantBroken("the free blocks are not exactly those that no table holds")
        if any(self._sealed[block] is not None for block in self._blank) or any(
            self._sealed[block] is None for block in self._idle
        ):
            raise InvariantBroken("blank blocks are those without a hash, idle ones those with one")
        found = {block: (known, digest) for known in self._known for digest, block in known.items()}
        if found != {block: sealed for block, sealed in enumerate(self._sealed) if sealed is not None}:
            raise InvariantBroken("the hashes that are known are not those that blocks were sealed with")
