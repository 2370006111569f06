"""The block pool alone: what it hands out, what it takes back, and that it notices when somebody cheats."""

from __future__ import annotations

import pytest

from quire_engine.blocks import BlockPool
from quire_engine.errors import InvariantBroken


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
