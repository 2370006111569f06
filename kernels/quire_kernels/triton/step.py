"""The addresses of a step, made on the device.

A request's row of the *request table* holds what outlives a step: its block table in each group of layers, and
the token that was drawn for it last. The host sends three numbers an item (row, position, token or `LAST`), and
where a block table has grown by a block, which and where. All else follows from these here, so a captured graph
can begin with this kernel, and the host never waits for a token to be able to plan behind it.

Two kinds of steps have fixed shapes: B items of one new token each, and up to T tokens of up to B items. An item
with a negative row is padding, and so are tokens behind the last item: they see nothing and write nowhere.

Legend: B items, T tokens, S rows of the request table, X groups of layers, W blocks of the longest sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from quire_kernels.paging import PagedBatch
from quire_kernels.triton.launch import dependent, wait

LAST = -1
"""Instead of a token: the one drawn last for that row."""
_ITEMS = 32
_TOKENS = 64


# each shape of a step would be compiled anew if its sizes were looked at
@triton.jit(do_not_specialize=["num_items"], do_not_specialize_on_alignment=["slots"])
def _prepare(
    token_ids,
    positions,
    ends,
    slots,
    contexts,
    rows,
    items,
    tables,
    last_token,
    num_items,
    table_rows,
    width,
    GROUPS: tl.constexpr,
    P: tl.constexpr,
    ITEMS: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    wait(DEPENDENT)
    at = tl.program_id(0) * ITEMS + tl.arange(0, ITEMS)
    there = at < num_items
    mine = items + at * (3 + 2 * GROUPS)
    row = tl.load(mine, mask=there, other=-1)
    position = tl.load(mine + 1, mask=there, other=0)
    token = tl.load(mine + 2, mask=there, other=0)
    real = there & (row >= 0)
    last = tl.load(last_token + row, mask=real & (token < 0), other=0)
    token = tl.where(token < 0, last, token)
    tl.store(token_ids + at, tl.where(real, token, 0).to(tl.int64), mask=there)
    tl.store(positions + at, tl.where(real, position, 0).to(tl.int64), mask=there)
    tl.store(ends + at, tl.where(real, position + 1, 0), mask=there)
    tl.store(contexts + at, tl.where(real, position + 1, 0), mask=there)
    tl.store(rows + at, row, mask=there)
    for group in tl.static_range(GROUPS):
        place = tl.load(mine + 3 + 2 * group, mask=there, other=-1)
        block = tl.load(mine + 4 + 2 * group, mask=there, other=0)
        table = tables + (group * table_rows + row).to(tl.int64) * width
        grown = real & (place >= 0)
        tl.store(table + place, block, mask=grown)
        here = position // P
        # the block just stored may not be visible yet to a load of the same program
        held = tl.load(table + here, mask=real & (place != here), other=0)
        held = tl.where(place == here, block, held)
        slot = held.to(tl.int64) * P + position % P
        tl.store(slots + group * num_items + at, tl.where(real, slot, -1), mask=there)


@triton.jit(do_not_specialize=["num_items"])
def _prepare_items(
    ends,
    contexts,
    rows,
    logits_rows,
    query_starts,
    items,
    num_items,
    ITEMS: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """What there is one of for each item; where its tokens begin is the sum of those before, so one program."""
    wait(DEPENDENT)
    at = tl.arange(0, ITEMS)
    there = at < num_items
    row = tl.load(items + at * 4, mask=there, other=-1)
    real = row >= 0
    start = tl.load(items + at * 4 + 1, mask=real, other=0)
    count = tl.load(items + at * 4 + 2, mask=real, other=0)
    draws = tl.load(items + at * 4 + 3, mask=real, other=0) > 0
    until = tl.cumsum(count, 0)
    tl.store(query_starts + at, until - count, mask=there)
    tl.store(query_starts + num_items, tl.sum(count, 0))
    tl.store(contexts + at, start + count, mask=there)
    tl.store(ends + at, start + count, mask=there)
    tl.store(rows + at, row, mask=there)
    # those who draw nothing have a row of logits all the same, which nobody looks at
    tl.store(rows + num_items + at, tl.where(draws, row, -1), mask=there)
    tl.store(logits_rows + at, tl.maximum(until - 1, 0).to(tl.int64), mask=there)


@triton.jit(do_not_specialize=["num_tokens", "num_items"])
def _prepare_tokens(
    token_ids,
    positions,
    slots,
    given,
    items,
    query_starts,
    tables,
    last_token,
    num_tokens,
    num_items,
    table_rows,
    width,
    GROUPS: tl.constexpr,
    P: tl.constexpr,
    TOKENS: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    wait(DEPENDENT)
    at = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    there = at < num_tokens
    real = there & (at < tl.load(query_starts + num_items))
    # the last item that begins here or before; of those without tokens it is the last, which is none of these
    left = tl.zeros_like(at)
    right = left + num_items
    while tl.max(right - left, 0) > 1:
        middle = (left + right) // 2
        before = tl.load(query_starts + middle) <= at
        left = tl.where(before, middle, left)
        right = tl.where(before, right, middle)
    row = tl.load(items + left * 4, mask=real, other=0)
    first = tl.load(query_starts + left)
    position = tl.load(items + left * 4 + 1, mask=real, other=0) + at - first
    token = tl.load(given + at, mask=real, other=0)
    last = tl.load(last_token + row, mask=real & (token < 0), other=0)
    tl.store(token_ids + at, tl.where(token < 0, last, token).to(tl.int64), mask=there)
    tl.store(positions + at, tl.where(real, position, 0).to(tl.int64), mask=there)
    for group in tl.static_range(GROUPS):
        table = tables + (group * table_rows + row).to(tl.int64) * width
        block = tl.load(table + position // P, mask=real, other=0).to(tl.int64)
        tl.store(slots + group * num_tokens + at, tl.where(real, block * P + position % P, -1), mask=there)


@dataclass(slots=True, frozen=True)
class StepBuffers:
    """The tensors of a step of B items of one new token each, at fixed places; `prepare` fills all but `items`."""

    items: Tensor
    """[B, 3 + 2 · X] int32: row, position, token or `LAST`; for each group a place in the block table, or -1, and
    the block that is new there."""
    token_ids: Tensor
    """[B] int64."""
    ends: Tensor
    """[B] int32, the position of the token that is drawn."""
    rows: Tensor
    """[B] int32."""
    batches: tuple[PagedBatch, ...]
    """One a group."""
    slots: Tensor
    """[X, B] int64: the slot mappings of `batches`."""

    @classmethod
    def allocate(
        cls, num_items: int, tables: Tensor, block_size: int, max_model_len: int, device: torch.device
    ) -> StepBuffers:
        """For `num_items` items of a request table whose block tables are `tables` [X, S, W] int32."""
        groups = tables.shape[0]
        token_ids = torch.zeros(num_items, dtype=torch.int64, device=device)
        positions = torch.zeros(num_items, dtype=torch.int64, device=device)
        contexts = torch.zeros(num_items, dtype=torch.int32, device=device)
        rows = torch.full((num_items,), -1, dtype=torch.int32, device=device)
        slots = torch.full((groups, num_items), -1, dtype=torch.int64, device=device)
        batches = tuple(
            PagedBatch(
                positions=positions,
                slot_mapping=slots[group],
                block_tables=tables[group],
                query_starts=torch.arange(num_items + 1, dtype=torch.int32, device=device),
                context_lens=contexts,
                logits_rows=torch.arange(num_items, dtype=torch.int64, device=device),
                block_size=block_size,
                query_lens=(1,) * num_items,
                contexts=(max_model_len,) * num_items,
                every_row=True,
                table_rows=rows,
            )
            for group in range(groups)
        )
        items = torch.full((num_items, 3 + 2 * groups), -1, dtype=torch.int32, device=device)
        ends = torch.zeros(num_items, dtype=torch.int32, device=device)
        return cls(items, token_ids, ends, rows, batches, slots)


def prepare(step: StepBuffers, tables: Tensor, last_token: Tensor) -> None:
    """Fills `step` from its items, and puts new blocks into `tables` [X, S, W]. `last_token` [S] int32."""
    num_items = step.rows.shape[0]
    batch = step.batches[0]
    _prepare[(triton.cdiv(num_items, _ITEMS),)](
        step.token_ids,
        batch.positions,
        step.ends,
        step.slots,
        batch.context_lens,
        step.rows,
        step.items,
        tables,
        last_token,
        num_items,
        tables.shape[1],
        tables.shape[2],
        GROUPS=len(step.batches),
        P=batch.block_size,
        ITEMS=_ITEMS,
        num_warps=1,
        **dependent(),
    )


@dataclass(slots=True, frozen=True)
class MixedBuffers:
    """The tensors of a step of up to T tokens of up to B items, at fixed places; `prepare_mixed` fills all but
    `items` and `given`.
    """

    items: Tensor
    """[B, 4] int32: row, position of the first new token, how many there are, whether the item draws. Items
    that are there come first."""
    given: Tensor
    """[T] int32: tokens of all items one after the other, or `LAST`."""
    token_ids: Tensor
    """[T] int64."""
    ends: Tensor
    """[B] int32, the position of the token that is drawn."""
    rows: Tensor
    """[2, B] int32: rows of all items, and of those that draw, -1 for others."""
    batches: tuple[PagedBatch, ...]
    """One a group."""
    slots: Tensor
    """[X, T] int64: the slot mappings of `batches`."""

    @classmethod
    def allocate(
        cls,
        num_tokens: int,
        num_items: int,
        tables: Tensor,
        block_size: int,
        max_model_len: int,
        spans: Sequence[tuple[int, int]] | None = None,
    ) -> MixedBuffers:
        """On the device of the block tables `tables` [X, S, W] int32. `spans`, where the host knows them, are the
        position of each item's first new token and how many it has.
        """

        def new(*shape: int, dtype: torch.dtype = torch.int32, fill: int = 0) -> Tensor:
            return torch.full(shape, fill, dtype=dtype, device=tables.device)

        groups = tables.shape[0]
        positions, rows = new(num_tokens, dtype=torch.int64), new(2, num_items, fill=-1)
        slots = new(groups, num_tokens, dtype=torch.int64, fill=-1)
        starts, contexts = new(num_items + 1), new(num_items)
        logits_rows = new(num_items, dtype=torch.int64)
        if spans is None:  # prompts and others, for all the host knows
            query_lens = (1, *(num_tokens,) * (num_items - 1)) if num_items > 1 else (num_tokens,)
            longest = (max_model_len,) * num_items
        else:
            query_lens = tuple([count for _, count in spans])
            longest = tuple([first + count for first, count in spans])
        batches = tuple(
            PagedBatch(
                positions=positions,
                slot_mapping=slots[group],
                block_tables=tables[group],
                query_starts=starts,
                context_lens=contexts,
                logits_rows=logits_rows,
                block_size=block_size,
                query_lens=query_lens,
                contexts=longest,
                table_rows=rows[0],
            )
            for group in range(groups)
        )
        return cls(
            items=new(num_items, 4, fill=-1),
            given=new(num_tokens),
            token_ids=new(num_tokens, dtype=torch.int64),
            ends=new(num_items),
            rows=rows,
            batches=batches,
            slots=slots,
        )


def prepare_mixed(step: MixedBuffers, tables: Tensor, last_token: Tensor) -> None:
    """Fills `step` from its items and tokens. `tables` [X, S, W] have all blocks; `last_token` [S] int32."""
    batch, num_items, num_tokens = step.batches[0], step.items.shape[0], step.given.shape[0]
    _prepare_items[(1,)](
        step.ends,
        batch.context_lens,
        step.rows,
        batch.logits_rows,
        batch.query_starts,
        step.items,
        num_items,
        ITEMS=triton.next_power_of_2(num_items),
        num_warps=4,
        **dependent(),
    )
    _prepare_tokens[(triton.cdiv(num_tokens, _TOKENS),)](
        step.token_ids,
        batch.positions,
        step.slots,
        step.given,
        step.items,
        batch.query_starts,
        tables,
        last_token,
        num_tokens,
        num_items,
        tables.shape[1],
        tables.shape[2],
        GROUPS=len(step.batches),
        P=batch.block_size,
        TOKENS=_TOKENS,
        num_warps=1,
        **dependent(),
    )
