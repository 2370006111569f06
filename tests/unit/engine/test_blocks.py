"""The block pool alone: what it hands out, what it takes back, and that it notices when somebody cheats."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)
from tests.effort import EFFORT, examples

from quire_engine.blocks import BlockPool
from quire_engine.errors import EngineError, InvariantBroken


def test_a_table_grows_to_whole_blocks_and_comes_back_whole() -> None:
    pool = BlockPool(num_blocks=4, block_size=16)
    table: list[int] = []
    assert pool.grow(table, 1)
    assert len(table) == 1
    assert pool.grow(table, 16)
    assert len(table) == 1, "16 tokens still fit the first block"
    assert pool.grow(table, 17)
    assert len(set(table)) == 2
    assert (pool.num_used, pool.num_free) == (2, 2)
    pool.check_integrity([table])
    pool.release(table)
    assert table == []
    assert (pool.num_used, pool.num_free) == (0, 4)
    pool.check_integrity([])


def test_growth_beyond_the_pool_changes_nothing() -> None:
    pool = BlockPool(num_blocks=3, block_size=8)
    first: list[int] = []
    second: list[int] = []
    assert pool.grow(first, 16)
    assert not pool.grow(second, 16)
    assert second == []
    assert pool.num_free == 1
    pool.check_integrity([first, second])


@pytest.mark.parametrize(("tokens", "blocks"), [(0, 0), (1, 1), (15, 1), (16, 1), (17, 2), (160, 10), (161, 11)])
def test_blocks_for_rounds_up(tokens: int, blocks: int) -> None:
    assert BlockPool(1, 16).blocks_for(tokens) == blocks


def test_shared_blocks_stay_until_their_last_table_leaves() -> None:
    pool = BlockPool(num_blocks=4, block_size=4)
    table: list[int] = []
    pool.grow(table, 10)
    twin = pool.share(table, 8)
    assert twin == table[:2]
    pool.check_integrity([table, twin])
    pool.release(table)
    assert pool.num_used == 2, "the third block was only in the first table"
    pool.check_integrity([twin])
    assert pool.grow(twin, 12)
    pool.release(twin)
    assert pool.num_free == 4
    pool.check_integrity([])


def test_only_whole_live_blocks_can_be_shared() -> None:
    pool = BlockPool(num_blocks=4, block_size=4)
    table: list[int] = []
    pool.grow(table, 8)
    with pytest.raises(InvariantBroken, match="whole blocks"):
        pool.share(table, 6)
    with pytest.raises(InvariantBroken, match="whole blocks"):
        pool.share(table, 12)
    stale = list(table)
    pool.release(table)
    with pytest.raises(InvariantBroken, match="is free"):
        pool.share(stale, 4)


def test_a_second_release_of_the_same_blocks_is_noticed() -> None:
    pool = BlockPool(num_blocks=2, block_size=4)
    table: list[int] = []
    pool.grow(table, 4)
    copy = list(table)
    pool.release(table)
    with pytest.raises(InvariantBroken, match="freed twice"):
        pool.release(copy)


def test_integrity_notices_lost_doubled_and_invented_blocks() -> None:
    pool = BlockPool(num_blocks=4, block_size=4)
    table: list[int] = []
    pool.grow(table, 8)
    with pytest.raises(InvariantBroken, match="other numbers of tables"):
        pool.check_integrity([])
    with pytest.raises(InvariantBroken, match="other numbers of tables"):
        pool.check_integrity([table, table[:1]])
    with pytest.raises(InvariantBroken, match="not one of 4"):
        pool.check_integrity([[*table, 4]])


def test_the_block_freed_last_is_handed_out_first() -> None:
    pool = BlockPool(num_blocks=8, block_size=4)
    first: list[int] = []
    second: list[int] = []
    pool.grow(first, 8)
    pool.grow(second, 8)
    warm = first[0]
    pool.release(first)
    third: list[int] = []
    pool.grow(third, 1)
    assert third == [warm]


# ── every order of growing, sharing and leaving ───────────────────────────────────────────────────────────

QUICK = settings(
    max_examples=examples(60), stateful_step_count=30, deadline=None, derandomize=EFFORT == 1, database=None
)


class Slots(RuleBasedStateMachine):
    """A pool, a pretend cache written through the tables, and for each table the tokens it must read back."""

    pool_class: type[BlockPool] = BlockPool
    owners = Bundle("owners")

    @initialize(num_blocks=st.integers(1, 8), block_size=st.sampled_from([1, 2, 4]))
    def build(self, num_blocks: int, block_size: int) -> None:
        self.pool = self.pool_class(num_blocks, block_size)
        self.cache: dict[tuple[int, int], int] = {}
        self.tables: dict[int, list[int]] = {}
        self.tokens: dict[int, list[int]] = {}
        self.drawn = 0

    def slot(self, owner: int, position: int) -> tuple[int, int]:
        size = self.pool.block_size
        return self.tables[owner][position // size], position % size

    def _owner(self, table: list[int], tokens: list[int]) -> int:
        self.drawn += 1
        self.tables[self.drawn], self.tokens[self.drawn] = table, tokens
        return self.drawn

    @rule(target=owners)
    def arrive(self) -> int:
        return self._owner([], [])

    @rule(owner=owners, count=st.integers(1, 9))
    def append(self, owner: int, count: int) -> None:
        table, tokens = self.tables[owner], self.tokens[owner]
        free, before, wanted = self.pool.num_free, list(table), len(tokens) + count
        if not self.pool.grow(table, wanted):
            assert self.pool.blocks_for(wanted) - len(before) > free, "there was room"
            assert (table, self.pool.num_free) == (before, free), "a refusal changed something"
            return
        assert table[: len(before)] == before, "a table grows at its end only"
        for _ in range(count):
            self.drawn += 1
            self.cache[self.slot(owner, len(tokens))] = self.drawn
            tokens.append(self.drawn)

    @rule(target=owners, owner=owners, share=st.integers(0, 8))
    def share(self, owner: int, share: int) -> int:
        size = self.pool.block_size
        count = min(share, len(self.tokens[owner]) // size) * size
        return self._owner(self.pool.share(self.tables[owner], count), self.tokens[owner][:count])

    @rule(owner=consumes(owners))
    def leave(self, owner: int) -> None:
        table = self.tables.pop(owner)
        del self.tokens[owner]
        self.pool.release(table)
        assert table == []

    @invariant()
    def every_table_reads_what_was_written_through_it(self) -> None:
        for owner, tokens in getattr(self, "tokens", {}).items():
            assert [self.cache[self.slot(owner, at)] for at in range(len(tokens))] == tokens

    @invariant()
    def one_story(self) -> None:
        if hasattr(self, "pool"):
            self.pool.check_integrity(self.tables.values())
            held = {block for table in self.tables.values() for block in table}
            assert (self.pool.num_used, self.pool.num_free) == (len(held), self.pool.num_blocks - len(held))


def test_no_order_of_events_loses_doubles_or_overwrites_a_block() -> None:
    run_state_machine_as_test(Slots, settings=QUICK)


class UncountedShare(BlockPool):
    """Hands a table out a second time and keeps no count."""

    def share(self, table: Sequence[int], num_tokens: int) -> list[int]:
        return list(table[: num_tokens // self.block_size])

    def check_integrity(self, tables: object) -> None:
        """Blind, so that only reading and freeing can notice."""


class GreedyRefusal(BlockPool):
    """Takes what is left before it says that it is not enough."""

    def grow(self, table: list[int], num_tokens: int) -> bool:
        granted = super().grow(table, num_tokens)
        if not granted:
            super().grow(table, (len(table) + self.num_free) * self.block_size)
        return granted


class ForgetfulRelease(BlockPool):
    """Keeps the first block of a table that leaves."""

    def release(self, table: list[int]) -> None:
        rest = table[1:]
        table.clear()
        super().release(rest)


class OverlappingGrowth(BlockPool):
    """Mints a block without taking it off the free list."""

    def grow(self, table: list[int], num_tokens: int) -> bool:
        granted = super().grow(table, num_tokens)
        if granted and len(table) > 1:
            self._free.append(table[-1])
        return granted


@pytest.mark.parametrize("mutant", [UncountedShare, GreedyRefusal, ForgetfulRelease, OverlappingGrowth])
def test_the_machine_catches_a_planted_fault(mutant: type[BlockPool], capsys: pytest.CaptureFixture[str]) -> None:
    planted: type[RuleBasedStateMachine] = type(f"With{mutant.__name__}", (Slots,), {"pool_class": mutant})
    with pytest.raises((AssertionError, EngineError)):
        run_state_machine_as_test(planted, settings=settings(QUICK, phases=[Phase.generate]))
    capsys.readouterr()
