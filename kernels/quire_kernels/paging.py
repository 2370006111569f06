"""What one step asks of the paged cache, as tensors: built once a step, read by every layer.

A sequence's keys and values lie in blocks of `block_size` slots. Its block table lists the blocks in order, so
position p of sequence s lies in block `table[s][p // block_size]` at offset `p % block_size`; the *slot* is that
block's number times `block_size` plus the offset. A step carries the new tokens of several sequences one after
the other; a sequence that decodes has one new token, one that prefills has as many as its chunk.

Legend: T new tokens of the step, S sequences, B longest block table, R rows whose logits are wanted.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_CODES = {torch.int32: "i", torch.int64: "q"}


def integers(values: list[int], dtype: torch.dtype) -> Tensor:
    """`values` [N] on the host, in int32 or int64: what `torch.tensor` gives, in less than a third of its time."""
    if not values:
        return torch.empty(0, dtype=dtype)
    return torch.frombuffer(array(_CODES[dtype], values), dtype=dtype)


@dataclass(slots=True, frozen=True)
class PagedBatch:
    """One step's addresses. Sequence s owns tokens `query_starts[s]` to `query_starts[s + 1]`, exclusive.

    Table entries past a sequence's own blocks are 0 and carry no meaning, and so are negative ones before a
    window: nobody may read through them.
    """

    positions: Tensor
    """[T] int64, each token's place in its sequence, from 0."""
    slot_mapping: Tensor
    """[T] int64, where each token's key and value go; no slot occurs twice."""
    block_tables: Tensor
    """[S, B] int32."""
    query_starts: Tensor
    """[S + 1] int32, from 0 to T."""
    context_lens: Tensor
    """[S] int32, tokens in the cache once this step's are written."""
    logits_rows: Tensor
    """[R] int64, rows of T, ascending."""
    block_size: int
    query_lens: tuple[int, ...]
    """[S], on the host: planning must not wait for a device."""
    contexts: tuple[int, ...]
    """[S], `context_lens` on the host, or at least as much where the host does not know."""
    every_row: bool = False
    """Whether `logits_rows` are all rows of T."""
    table_rows: Tensor | None = None
    """[S] int32, which row of `block_tables` each sequence has; None: they are in order. Only batches that are
    made on a device have it, for back-ends that live there."""

    @property
    def num_tokens(self) -> int:
        """T."""
        return self.positions.shape[0]

    @property
    def longest(self) -> int:
        """No sequence has more tokens in the cache; known on the host."""
        return max(self.contexts, default=0)

    @classmethod
    def build(
        cls,
        *,
        starts: Sequence[int],
        query_lens: Sequence[int],
        block_tables: Sequence[Sequence[int]],
        logits: Sequence[int],
        block_size: int,
        device: torch.device | str = "cpu",
    ) -> PagedBatch:
        """From plain lists, one entry a sequence; two tensors are allocated and everything else is a view.

        `starts`: tokens already in the cache. `query_lens`: new tokens, at least one each. `block_tables`: block
        numbers that cover `start + query_len` tokens (more are allowed). `logits`: of how many of the last new
        tokens the logits are wanted. Raises ValueError when a table is too short or a count is not positive: the
        caller's bookkeeping is broken then, and writing would corrupt another sequence.
        """
        positions: list[int] = []
        slots: list[int] = []
        rows: list[int] = []
        query_starts = [0]
        contexts: list[int] = []
        width = max((len(table) for table in block_tables), default=0)
        tables: list[int] = []
        for start, count, table, wanted in zip(starts, query_lens, block_tables, logits, strict=True):
            end = start + count
            if count < 1 or start < 0 or end > len(table) * block_size:
                raise ValueError(f"tokens {start} to {end} do not fit {len(table)} blocks of {block_size}")
            if count == 1:
                positions.append(start)
                slots.append(table[start // block_size] * block_size + start % block_size)
            else:
                positions.extend(range(start, end))
                for index in range(start // block_size, (end - 1) // block_size + 1):
                    base = (table[index] - index) * block_size
                    first, last = max(start, index * block_size), min(end, (index + 1) * block_size)
                    slots.extend(range(base + first, base + last))
            query_starts.append(query_starts[-1] + count)
            contexts.append(end)
            tables.extend(table)
            tables.extend([0] * (width - len(table)))
            if wanted:
                rows.extend(range(query_starts[-1] - wanted, query_starts[-1]))
        tokens, sequences = len(positions), len(contexts)
        wide = integers(positions + slots + rows, torch.int64).to(device)
        narrow = integers(tables + query_starts + contexts, torch.int32).to(device)
        cut = sequences * width
        return cls(
            positions=wide[:tokens],
            slot_mapping=wide[tokens : 2 * tokens],
            logits_rows=wide[2 * tokens :],
            block_tables=narrow[:cut].view(sequences, width),
            query_starts=narrow[cut : cut + sequences + 1],
            context_lens=narrow[cut + sequences + 1 :],
            block_size=block_size,
            query_lens=tuple(query_lens),
            contexts=tuple(contexts),
            every_row=len(rows) == tokens,
        )
