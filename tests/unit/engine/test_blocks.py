"""The block pool alone: what it hands out, what it takes back, and that it notices when somebody cheats."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

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

from quire_engine.blocks import GONE, BlockPool, Tables, chain, root
from quire_engine.errors import EngineError, InvariantBroken


def test_tables_grow_to_whole_blocks_and_come_back_whole() -> None:
    pool = BlockPool(8, 16, (None, 100))
    tables = pool.empty()
    assert pool.grow(tables, 1)
    assert [len(table) for table in tables] == [1, 1]
    assert pool.grow(tables, 16)
    assert [len(table) for table in tables] == [1, 1], "16 tokens still fit the first block"
    assert pool.grow(tables, 17)
    assert len({block for table in tables for block in table}) == 4
    assert (pool.num_used, pool.num_free) == (4, 4)
    pool.check_integrity([tables])
    pool.release(tables)
    assert tables == [[], []]
    assert (pool.num_used, pool.num_free) == (0, 8)
    pool.check_integrity([])


def test_growth_beyond_the_pool_changes_nothing() -> None:
    pool = BlockPool(num_blocks=3, block_size=8)
    first, second = pool.empty(), pool.empty()
    assert pool.grow(first, 16)
    assert not pool.grow(second, 16)
    assert second == [[]]
    assert pool.num_free == 1
    pool.check_integrity([first, second])


@pytest.mark.parametrize(("tokens", "blocks"), [(0, 0), (1, 1), (15, 1), (16, 1), (17, 2), (160, 10), (161, 11)])
def test_blocks_for_rounds_up(tokens: int, blocks: int) -> None:
    assert BlockPool(1, 16).blocks_for(tokens) == blocks


def test_a_fork_shares_full_blocks_and_copies_the_one_that_is_being_filled() -> None:
    pool = BlockPool(num_blocks=4, block_size=4)
    tables = pool.empty()
    pool.grow(tables, 10)
    forked = pool.fork(tables, 10)
    assert forked is not None
    twin, copies = forked
    assert twin[0][:2] == tables[0][:2]
    assert copies == [(tables[0][2], twin[0][2])]
    pool.check_integrity([tables, twin])
    assert pool.fork(tables, 9) is None, "there is no block left to copy to"
    whole = pool.fork(tables, 8)
    assert whole == ([tables[0][:2]], [])
    pool.release(whole[0])
    pool.release(tables)
    assert pool.num_used == 3, "one block was only in the first tables"
    pool.check_integrity([twin])
    pool.release(twin)
    assert pool.num_free == 4
    pool.check_integrity([])
    with pytest.raises(InvariantBroken, match="cannot be shared"):
        pool.fork(twin, 1)


def chain_of(*blocks: Sequence[int], kin: str = "all") -> list[bytes]:
    digests = [root(kin)]
    for tokens in blocks:
        digests.append(chain(digests[-1], tokens))
    return digests[1:]


def test_a_digest_covers_all_tokens_before_its_block_and_who_may_share_it() -> None:
    digests = {
        *chain_of([1, 2], [3, 4]),
        *chain_of([9, 2], [3, 4]),
        *chain_of([1, 2], [3, 4], kin="other"),
        root("a", "b"),
        root("ab", ""),
    }
    assert len(digests) == 8


def test_idle_blocks_are_found_until_they_are_needed_for_something_else() -> None:
    pool = BlockPool(num_blocks=3, block_size=2)
    tables = pool.empty()
    pool.grow(tables, 4)
    digests = chain_of([1, 2], [3, 4])
    for index, digest in enumerate(digests):
        pool.seal(tables, index, digest)
    pool.release(tables)
    assert (pool.num_used, pool.num_free, pool.num_idle) == (0, 3, 2)
    assert pool.match(digests) == 2
    assert pool.match(chain_of([1, 2], [9, 9])) == 1
    assert pool.price(digests) == (2, 2)
    adopted = pool.empty()
    pool.adopt(adopted, digests)
    assert pool.num_idle == 0
    assert pool.price(digests) == (2, 0)
    pool.check_integrity([adopted])
    pool.release(adopted)
    other = pool.empty()
    pool.grow(other, 4)
    assert pool.evictions == 1, "the blank block went first"
    assert pool.match(digests) == 1, "and then the end of the chain"
    pool.check_integrity([other])


def test_a_second_block_of_the_same_content_stays_its_owners_alone() -> None:
    pool = BlockPool(num_blocks=4, block_size=2)
    first, second = pool.empty(), pool.empty()
    (digest,) = chain_of([1, 2])
    for tables in (first, second):
        pool.grow(tables, 2)
        pool.seal(tables, 0, digest)
    pool.release(second)
    assert pool.num_idle == 0, "it cannot be found, so it is blank"
    adopted = pool.empty()
    pool.adopt(adopted, [digest])
    assert adopted == first
    pool.check_integrity([first, adopted])


def test_behind_a_window_a_prefix_needs_only_what_is_still_seen() -> None:
    pool = BlockPool(12, 2, (None, 3))
    tables = pool.empty()
    pool.grow(tables, 8)
    digests = chain_of([1, 2], [3, 4], [5, 6], [7, 8])
    for index, digest in enumerate(digests):
        pool.seal(tables, index, digest)
    pool.trim(tables, 8)
    assert tables[1][:3] == [GONE, GONE, GONE], "token 8 looks back to token 6"
    assert tables[1][3] != GONE
    assert pool.held(tables) == 5
    assert pool.match(digests) == 4
    adopted = pool.empty()
    pool.adopt(adopted, digests)
    assert adopted == tables
    pool.check_integrity([tables, adopted])
    for each in (tables, adopted):
        pool.release(each)
    assert pool.num_used == 0
    blocker = pool.empty()
    pool.grow(blocker, 10)
    assert pool.match(digests) < 4


def test_a_second_release_of_the_same_blocks_is_noticed() -> None:
    pool = BlockPool(num_blocks=2, block_size=4)
    tables = pool.empty()
    pool.grow(tables, 4)
    copy = [list(tables[0])]
    pool.release(tables)
    with pytest.raises(InvariantBroken, match="freed twice"):
        pool.release(copy)


def test_integrity_notices_lost_doubled_and_invented_blocks() -> None:
    pool = BlockPool(num_blocks=4, block_size=4)
    tables = pool.empty()
    pool.grow(tables, 8)
    with pytest.raises(InvariantBroken, match="other numbers of tables"):
        pool.check_integrity([])
    with pytest.raises(InvariantBroken, match="other numbers of tables"):
        pool.check_integrity([tables, [tables[0][:1]]])
    with pytest.raises(InvariantBroken, match="not one of 4"):
        pool.check_integrity([[[*tables[0], 4]]])
    with pytest.raises(InvariantBroken, match="several lengths"):
        pool.check_integrity([[tables[0], []]])


def test_the_block_freed_last_is_handed_out_first() -> None:
    pool = BlockPool(num_blocks=8, block_size=4)
    first, second, third = pool.empty(), pool.empty(), pool.empty()
    pool.grow(first, 8)
    pool.grow(second, 8)
    warm = first[0][0]
    pool.release(first)
    pool.grow(third, 1)
    assert third == [[warm]]


# ── every order of growing, sharing and leaving ───────────────────────────────────────────────────────────

QUICK = settings(
    max_examples=examples(200), stateful_step_count=30, deadline=None, derandomize=EFFORT == 1, database=None
)


class Slots(RuleBasedStateMachine):
    """A pool, a pretend cache written through the tables, and for each table the tokens it must read back."""

    pool_class: type[BlockPool] = BlockPool
    owners = Bundle("owners")

    @initialize(num_blocks=st.integers(2, 6), block_size=st.sampled_from([1, 2, 4]))
    def build(self, num_blocks: int, block_size: int) -> None:
        self.pool = self.pool_class(num_blocks, block_size)
        self.cache: dict[tuple[int, int], int] = {}
        self.tables: dict[int, Tables] = {}
        self.tokens: dict[int, list[int]] = {}
        self.sealed: dict[bytes, list[int]] = {}
        self.drawn = 0

    def slot(self, owner: int, position: int) -> tuple[int, int]:
        size = self.pool.block_size
        return self.tables[owner][0][position // size], position % size

    def _owner(self, tables: Tables, tokens: list[int]) -> int:
        self.drawn += 1
        self.tables[self.drawn], self.tokens[self.drawn] = tables, tokens
        return self.drawn

    @rule(target=owners)
    def arrive(self) -> int:
        return self._owner(self.pool.empty(), [])

    @rule(owner=owners, count=st.integers(1, 5))
    def append(self, owner: int, count: int) -> None:
        tables, tokens = self.tables[owner], self.tokens[owner]
        free, before, wanted = self.pool.num_free, list(tables[0]), len(tokens) + count
        if not self.pool.grow(tables, wanted):
            assert self.pool.blocks_for(wanted) - len(before) > free, "there was room"
            assert (tables, self.pool.num_free) == ([before], free), "a refusal changed something"
            return
        assert tables[0][: len(before)] == before, "a table grows at its end only"
        for _ in range(count):
            self.drawn += 1
            self.cache[self.slot(owner, len(tokens))] = self.drawn
            tokens.append(self.drawn)

    @rule(target=owners, owner=owners, kept=st.integers(0, 9))
    def fork(self, owner: int, kept: int) -> Any:
        count = min(kept, len(self.tokens[owner]))
        forked = self.pool.fork(self.tables[owner], count)
        if forked is None:
            assert not self.pool.num_free
            return self.arrive()
        tables, copies = forked
        for source, target in copies:
            for offset in range(self.pool.block_size):
                if (source, offset) in self.cache:
                    self.cache[target, offset] = self.cache[source, offset]
        return self._owner(tables, self.tokens[owner][:count])

    @rule(owner=owners)
    def seal(self, owner: int) -> None:
        tokens, size = self.tokens[owner], self.pool.block_size
        for index, digest in enumerate(self._chain(tokens)):
            self.pool.seal(self.tables[owner], index, digest)
            self.sealed[digest] = tokens[: (index + 1) * size]

    @rule(target=owners, data=st.data())
    def adopt(self, data: st.DataObject) -> Any:
        tokens = data.draw(st.sampled_from([[], *self.sealed.values()]))
        digests = self._chain(tokens)
        digests = digests[: self.pool.match(digests)]
        tables = self.pool.empty()
        self.pool.adopt(tables, digests)
        return self._owner(tables, tokens[: len(digests) * self.pool.block_size])

    def _chain(self, tokens: list[int]) -> list[bytes]:
        size = self.pool.block_size
        return chain_of(*(tokens[at : at + size] for at in range(0, len(tokens) - size + 1, size)))

    @rule(owner=consumes(owners))
    def leave(self, owner: int) -> None:
        tables = self.tables.pop(owner)
        del self.tokens[owner]
        self.pool.release(tables)
        assert tables == [[]]

    @invariant()
    def every_table_reads_what_was_written_through_it(self) -> None:
        for owner, tokens in getattr(self, "tokens", {}).items():
            assert [self.cache[self.slot(owner, at)] for at in range(len(tokens))] == tokens

    @invariant()
    def one_story(self) -> None:
        if hasattr(self, "pool"):
            self.pool.check_integrity(self.tables.values())
            held = {block for tables in self.tables.values() for block in tables[0]}
            assert (self.pool.num_used, self.pool.num_free) == (len(held), self.pool.num_blocks - len(held))


def test_no_order_of_events_loses_doubles_or_overwrites_a_block() -> None:
    run_state_machine_as_test(Slots, settings=QUICK)


class UncountedShare(BlockPool):
    """Shares blocks without counting the second tables."""

    __slots__ = ()

    def fork(self, tables: Tables, num_tokens: int) -> tuple[Tables, list[tuple[int, int]]] | None:
        forked = super().fork(tables, num_tokens)
        for block in tables[0][: num_tokens // self.block_size]:
            self._refs[block] -= 1
        return forked

    def check_integrity(self, owners: object) -> None:
        """Blind, so that only reading and freeing can notice."""


class UncopiedFork(BlockPool):
    """Writes both forks into one block."""

    __slots__ = ()

    def fork(self, tables: Tables, num_tokens: int) -> tuple[Tables, list[tuple[int, int]]] | None:
        if not num_tokens % self.block_size:
            return super().fork(tables, num_tokens)
        forked = super().fork(tables, self.blocks_for(num_tokens) * self.block_size)
        return forked


class GreedyRefusal(BlockPool):
    """Takes what is left before it says that it is not enough."""

    __slots__ = ()

    def grow(self, tables: Tables, num_tokens: int) -> bool:
        granted = super().grow(tables, num_tokens)
        if not granted:
            super().grow(tables, (len(tables[0]) + self.num_free) * self.block_size)
        return granted


class ForgetfulRelease(BlockPool):
    """Keeps the first block of a table that leaves."""

    __slots__ = ()

    def release(self, tables: Tables) -> None:
        rest = [tables[0][1:]]
        tables[0].clear()
        super().release(rest)


class OverlappingGrowth(BlockPool):
    """Mints a block without taking it off the free list."""

    __slots__ = ()

    def grow(self, tables: Tables, num_tokens: int) -> bool:
        granted = super().grow(tables, num_tokens)
        if granted and len(tables[0]) > 1:
            self._blank.append(tables[0][-1])
        return granted


MUTANTS = (UncountedShare, UncopiedFork, GreedyRefusal, ForgetfulRelease, OverlappingGrowth)


@pytest.mark.parametrize("mutant", MUTANTS)
def test_the_machine_catches_a_planted_fault(mutant: type[BlockPool], capsys: pytest.CaptureFixture[str]) -> None:
    planted: type[RuleBasedStateMachine] = type(f"With{mutant.__name__}", (Slots,), {"pool_class": mutant})
    with pytest.raises((AssertionError, EngineError)):
        run_state_machine_as_test(planted, settings=settings(QUICK, phases=[Phase.generate]))
    capsys.readouterr()
