"""The addresses of a step in which every sequence has one new token, made on the device.

A request's row of the *request table* holds what outlives a step: its block table in each group of layers, and
the token that was drawn for it last. The host sends three numbers an item (row, position, token or `LAST`), and
where a block table has grown by a block, which and where. All else follows from these here, so a captured graph
can begin with this kernel, and the host never waits for a token to be able to plan behind it.

An item with a negative row is padding: it has an empty context and writes nowhere.

Legend: B items, S rows of the request table, X groups of layers, W blocks of the longest sequence.
"""

from __future__ import annotations

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


@triton.jit
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


@dataclass(slots=True, frozen=True)
class StepBuffers:
    """The tensors of a step of B items, at fixed places; `prepare` fills all but `items`."""

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
