"""PagedBatch: the addresses of a step, from plain lists."""

from __future__ import annotations

import pytest
import torch

from quire_kernels import PagedBatch, UnknownBackend, load
from quire_kernels.paging import integers


def test_a_mixed_step_is_laid_out_sequence_after_sequence() -> None:
    batch = PagedBatch.build(
        starts=[5, 2, 0],
        query_lens=[1, 4, 1],
        block_tables=[[7, 3], [2, 9], [4]],
        logits=[True, False, True],
        block_size=4,
    )
    assert batch.positions.tolist() == [5, 2, 3, 4, 5, 0]
    assert batch.slot_mapping.tolist() == [3 * 4 + 1, 2 * 4 + 2, 2 * 4 + 3, 9 * 4, 9 * 4 + 1, 16]
    assert batch.block_tables.tolist() == [[7, 3], [2, 9], [4, 0]]
    assert batch.query_starts.tolist() == [0, 1, 5, 6]
    assert batch.context_lens.tolist() == [6, 6, 1]
    assert batch.logits_rows.tolist() == [0, 5]
    assert (batch.contexts, batch.query_lens) == ((6, 6, 1), (1, 4, 1))
    assert batch.num_tokens == 6
    assert batch.positions.dtype == batch.slot_mapping.dtype == batch.logits_rows.dtype == torch.int64
    assert batch.block_tables.dtype == batch.query_starts.dtype == batch.context_lens.dtype == torch.int32


@pytest.mark.parametrize("block_size", [1, 8, 16, 32])
@pytest.mark.parametrize("start", [0, 1, 15, 16, 17])
def test_every_slot_is_where_the_block_table_says(block_size: int, start: int) -> None:
    count = 40
    table = [3 * index + 1 for index in range((start + count) // block_size + 1)]
    batch = PagedBatch.build(
        starts=[start], query_lens=[count], block_tables=[table], logits=[True], block_size=block_size
    )
    expected = [
        table[position // block_size] * block_size + position % block_size
        for position in range(start, start + count)
    ]
    assert batch.slot_mapping.tolist() == expected


@pytest.mark.parametrize(
    ("start", "count", "table"), [(0, 0, [1]), (-1, 1, [1]), (4, 1, [1]), (0, 9, [1, 2]), (3, 2, [1])]
)
def test_a_table_too_short_for_its_tokens_is_refused(start: int, count: int, table: list[int]) -> None:
    with pytest.raises(ValueError, match="do not fit"):
        PagedBatch.build(starts=[start], query_lens=[count], block_tables=[table], logits=[True], block_size=4)


@pytest.mark.parametrize(("dtype", "largest"), [(torch.int32, 2**31 - 1), (torch.int64, 2**63 - 1)])
@pytest.mark.parametrize("count", [0, 1, 3, 1000])
def test_integers_are_those_of_the_list(dtype: torch.dtype, largest: int, count: int) -> None:
    values = [(-1, largest, -largest - 1, 0)[at % 4] for at in range(count)]
    made = integers(values, dtype)
    assert made.dtype == dtype
    assert torch.equal(made, torch.tensor(values, dtype=dtype))
    with pytest.raises(OverflowError):
        integers([*values, largest + 1], dtype)


def test_an_unknown_backend_is_refused_with_those_there_are() -> None:
    with pytest.raises(UnknownBackend, match="hint: one of reference"):
        load("warp")
    assert [load(name).name for name in ("reference", "cpu")] == ["reference", "cpu"]
