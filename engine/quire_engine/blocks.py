"""The pool of KV blocks: the one place where block ids are minted and freed.

The cache tensors are cut into `num_blocks` blocks of `block_size` tokens. A request owns a *table*, a list of
block ids; token `i` lies in block `table[i // block_size]` at offset `i % block_size`. A table only grows at its
end and leaves as a whole, through `release`, so that no block can be forgotten or freed twice.

Every block carries a count of the tables it is in. Full blocks may be in several (`share`); a block that is still
being filled is in exactly one, so no write ever reaches another request's tokens. A cache of shared prefixes hangs
on two points: chained hashes are computed where a table's block becomes full, and `release` is where a block
whose count falls to zero would be kept for a later hit and not just put back. Blocks leave a table last first, so
that the end of a chain is reused before its beginning. This version keeps no hashes: a free block is forgotten.

The free list is a stack: the block freed last is the warmest in the machine's caches.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from quire_engine.errors import InvariantBroken


class BlockPool:
    """`num_blocks` ids from 0, counted. Sizes are in blocks unless a name says tokens."""

    __slots__ = ("_free", "_refs", "block_size", "num_blocks")

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._free = list(range(num_blocks - 1, -1, -1))
        self._refs = [0] * num_blocks

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_used(self) -> int:
        return self.num_blocks - len(self._free)

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold `num_tokens` tokens."""
        return -(-num_tokens // self.block_size)

    def grow(self, table: list[int], num_tokens: int) -> bool:
        """Append blocks until `table` holds `num_tokens`. False, and nothing changed, if too few are free."""
        missing = self.blocks_for(num_tokens) - len(table)
        if missing <= 0:
            return True
        if missing > len(self._free):
            return False
        for _ in range(missing):
            block = self._free.pop()
            self._refs[block] = 1
            table.append(block)
        return True

    def share(self, table: Sequence[int], num_tokens: int) -> list[int]:
        """A second table over the first `num_tokens` tokens of `table`, which must fill whole blocks."""
        count, rest = divmod(num_tokens, self.block_size)
        if rest or count > len(table):
            raise InvariantBroken(f"{num_tokens} tokens of a table of {len(table)} blocks are not whole blocks")
        shared = list(table[:count])
        for block in shared:
            if self._refs[block] < 1:
                raise InvariantBroken(f"block {block} is free and cannot be shared")
            self._refs[block] += 1
        return shared

    def release(self, table: list[int]) -> None:
        """Give back every block of `table` and leave it empty."""
        while table:
            block = table.pop()
            self._refs[block] -= 1
            if self._refs[block] == 0:
                self._free.append(block)
            elif self._refs[block] < 0:
                raise InvariantBroken(f"block {block} was freed twice")

    def check_integrity(self, tables: Iterable[Sequence[int]]) -> None:
        """Raise `InvariantBroken` unless counts, free list and all live `tables` tell one story. O(num_blocks)."""
        counted = [0] * self.num_blocks
        for table in tables:
            for block in table:
                if not 0 <= block < self.num_blocks:
                    raise InvariantBroken(f"block {block} is not one of {self.num_blocks}")
                counted[block] += 1
        if counted != self._refs:
            wrong = [block for block in range(self.num_blocks) if counted[block] != self._refs[block]]
            raise InvariantBroken(f"blocks {wrong[:8]} are in other numbers of tables than their counts say")
        free = set(self._free)
        if len(free) != len(self._free) or free != {b for b, refs in enumerate(self._refs) if refs == 0}:
            raise InvariantBroken("the free list is not exactly the blocks that no table holds")
