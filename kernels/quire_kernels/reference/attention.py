"""Paged attention in plain torch: gather a sequence's blocks through its table, then softmax(q kᵀ · scale) v.

    out[t] = Σ_j p[t, j] v[j],   p[t, ·] = softmax over visible j of (q[t] · k[j] · scale)

where j is visible to the token at position p if j <= p and, with a window w, j > p - w. A soft cap c makes
c · tanh(s / c) of a score s before anything is hidden; a sink adds its exponential to what a softmax divides by.
Such scores are written out, for torch's own attention knows neither.

Sequences with one new token are taken together: blocks of several sequences are gathered into one padded tensor
and their padding is masked. Only sequences of similar length share a group, because padding costs work too.
Sequences with several new tokens are taken one by one, the queries in tiles, so that a mask stays small.

The copy out of the cache is bounded: groups are cut, and key/value heads taken in turns, so that one gather holds
at most `gather_bytes` (or, for one head of one very long sequence, what that head needs).

A masked score is -inf and its weight 0, but 0 · NaN is NaN. Slots that hold no token of the sequence are
therefore never left in a gather: what lies in them, or behind a table entry past the sequence, cannot matter.

A cache in 8 bits is widened as it is gathered. In int8 queries are rounded as its keys were, too: so back-ends may
multiply whole numbers.

Legend: T tokens of the step, S sequences (of a group), H query heads, K key/value heads, G = H / K, D head size,
N blocks, P slots a block, B blocks gathered a sequence, L = B · P gathered keys.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from quire_kernels.paging import PagedBatch
from quire_kernels.reference.bytes import LARGEST, from_bytes, rounded_rows

GATHER_BYTES = 64 * 1024 * 1024
"""Keys and values, as float32, that one gather holds at most."""

_GROUP_BYTES = 3 * 1024 * 1024
"""The same for a group, if less: it then stays in a core's cache between the copy and the products."""

_MASK_NUMBERS = 1 << 20
"""Entries of one mask tile, unless 16 rows need more."""

_PADDING_PER_CALL = 512
"""Padded keys that cost about as much as one more call does (measured on a CPU with 2 key/value heads of 64)."""


@dataclass(slots=True, frozen=True)
class _Span:
    """One sequence with `stop - start` query rows; keys `low` to `high` of its sequence may be visible."""

    start: int
    stop: int
    blocks: Tensor
    """[B] int64, from the block that holds `low` to the one that holds `high - 1`."""
    offset: int
    """Gathered keys before `low`."""
    low: int
    high: int


@dataclass(slots=True, frozen=True)
class _Group:
    """Several sequences with one query row each."""

    rows: Tensor
    """[S] int64, rows of T."""
    blocks: Tensor
    """[S · B] int64."""
    mask: Tensor
    """[S, 1, 1, L] float32, 0 or -inf."""
    unused: Tensor
    """Flat rows of [S · L] that hold no visible key."""


class StepAttention:
    """`PagedAttention` of the reference back-end: planned once a step, called once a layer."""

    def __init__(
        self, batch: PagedBatch, window: int | None, gather_bytes: int, softcap: float | None = None
    ) -> None:
        self._window = window
        self._softcap = softcap
        self._gather_bytes = gather_bytes
        self._batch = batch
        self._tables = batch.block_tables.long()
        self._single: list[tuple[int, int, int]] = []
        self._spans: list[_Span] = []
        row = 0
        for index, (count, context) in enumerate(zip(batch.query_lens, batch.contexts, strict=True)):
            low = 0 if window is None else max(0, context - count - window + 1)
            if count == 1:
                self._single.append((context - low, index, row))
            else:
                self._spans.append(self._span(index, row, count, low, context))
            row += count
        self._single.sort(reverse=True)
        self._plans: dict[int, list[_Span | _Group]] = {}

    def _span(self, index: int, row: int, count: int, low: int, high: int) -> _Span:
        size = self._batch.block_size
        blocks = self._tables[index, low // size : (high - 1) // size + 1]
        return _Span(row, row + count, blocks, low % size, low, high)

    def _group(self, members: list[tuple[int, int, int]]) -> _Span | _Group:
        """The plan for sequences, longest first, given as (visible keys, sequence, row)."""
        size, device = self._batch.block_size, self._tables.device
        if len(members) == 1:
            length, index, row = members[0]
            high = self._batch.contexts[index]
            return self._span(index, row, 1, high - length, high)
        ends = [self._batch.contexts[index] for _, index, _ in members]
        facts = torch.tensor(
            [
                [index for _, index, _ in members],
                [row for _, _, row in members],
                [end - length for end, (length, _, _) in zip(ends, members, strict=True)],
                ends,
            ],
            dtype=torch.int64,
        ).to(device)
        indices, rows, low, high = facts
        first = low // size
        width = max(
            (end - 1) // size - (end - length) // size + 1
            for end, (length, _, _) in zip(ends, members, strict=True)
        )
        # past its last block a sequence repeats that block: a table entry beyond it means nothing
        columns = torch.minimum(first[:, None] + torch.arange(width, device=device), ((high - 1) // size)[:, None])
        blocks = self._tables[indices[:, None], columns].flatten()
        keys = (first * size)[:, None] + torch.arange(width * size, device=device)
        hidden = (keys < low[:, None]) | (keys >= high[:, None])
        mask = torch.zeros(hidden.shape, device=device).masked_fill_(hidden, float("-inf"))
        return _Group(rows, blocks, mask[:, None, None, :], hidden.flatten().nonzero().squeeze(1))

    def _plan(self, key_bytes: int) -> list[_Span | _Group]:
        """Spans and groups, for a cache whose one key and value take `key_bytes` as float32."""
        plan = self._plans.get(key_bytes)
        if plan is None:
            plan = [*self._spans]
            room = max(1, min(self._gather_bytes, _GROUP_BYTES) // key_bytes)
            members: list[tuple[int, int, int]] = []
            padding = longest = 0
            for member in self._single:
                rounded = member[0] + 2 * self._batch.block_size
                if members and (
                    padding + longest - rounded > _PADDING_PER_CALL or (len(members) + 1) * longest > room
                ):
                    plan.append(self._group(members))
                    members, padding = [], 0
                if not members:
                    longest = rounded
                padding += longest - rounded
                members.append(member)
            if members:
                plan.append(self._group(members))
            self._plans[key_bytes] = plan
        return plan

    def __call__(self, query: Tensor, cache: Tensor, scale: float, sinks: Tensor | None = None) -> Tensor:
        kv_heads, head = cache.shape[3], query.shape[2]
        out = torch.empty_like(query, memory_format=torch.contiguous_format)
        if cache.dtype == torch.int8:
            query = rounded_rows(query)
        grouped = query.view(query.shape[0], kv_heads, -1, head)
        result = out.view(grouped.shape)
        scores = _Scores(scale, self._softcap, None if sinks is None else sinks.view(kv_heads, -1))
        for part in self._plan(2 * kv_heads * head * 4):
            if isinstance(part, _Span):
                self._attend_span(part, grouped, cache, scores, result)
            else:
                self._attend_group(part, grouped, cache, scores, result)
        return out

    def _attend_group(self, part: _Group, query: Tensor, cache: Tensor, scores: _Scores, result: Tensor) -> None:
        keys, values = (_gather(side, part.blocks) for side in cache)  # [S · L, K, D]
        sequences = part.rows.shape[0]
        for gathered in (keys, values):
            gathered.index_fill_(0, part.unused, 0.0)
        shape = (sequences, -1, *keys.shape[1:])
        result[part.rows] = scores.attend(
            query[part.rows].float(),  # [S, K, G, D]: the heads that share keys are the rows of one product
            keys.view(shape).transpose(1, 2),
            values.view(shape).transpose(1, 2),
            part.mask,
            scores.sinks,
        ).to(result.dtype)

    def _attend_span(self, part: _Span, query: Tensor, cache: Tensor, scores: _Scores, result: Tensor) -> None:
        kv_heads, head = cache.shape[3], query.shape[3]
        length, count = part.high - part.low, part.stop - part.start
        turn = max(1, min(kv_heads, self._gather_bytes // (2 * 4 * head * part.blocks.shape[0] * cache.shape[2])))
        for heads in (slice(at, at + turn) for at in range(0, kv_heads, turn)):
            keys, values = (
                _gather(side[:, :, heads], part.blocks)[part.offset : part.offset + length].transpose(0, 1)
                for side in cache
            )  # [K, L, D]
            sinks = None if scores.sinks is None else scores.sinks[heads]
            queries = query[part.start : part.stop, heads]  # [T, K, G, D]
            if count == 1:
                found = scores.attend(queries.float(), keys[None], values[None], None, sinks)  # [1, K, G, D]
                result[part.start : part.stop, heads] = found.to(result.dtype)
                continue
            groups = queries.shape[2]
            keys, values = (side[:, None].expand(-1, groups, -1, -1) for side in (keys, values))
            most = _MASK_NUMBERS if scores.plain else _MASK_NUMBERS // (groups * keys.shape[0])
            for tile, mask in self._tiles(part, count, length, most, query.device):
                found = scores.attend(
                    queries[tile].permute(1, 2, 0, 3).float(),  # [K, G, tile, D]
                    keys,
                    values,
                    mask,
                    None if sinks is None else sinks[:, :, None],
                )
                result[part.start : part.stop, heads][tile] = found.permute(2, 0, 1, 3).to(result.dtype)

    def _tiles(
        self, part: _Span, count: int, length: int, most: int, device: torch.device
    ) -> Iterator[tuple[slice, Tensor]]:
        """Query rows in tiles, each with its mask [tile, L], of `most` numbers if that is enough for 16 rows."""
        step = max(16, most // length)
        for begin in range(0, count, step):
            rows = min(step, count - begin)
            # row r stands at key `here + r`: later keys are hidden, and with a window those before it
            here = length - count + begin
            mask = torch.full((rows, length), float("-inf"), device=device).triu_(here + 1)
            if self._window is not None and here + rows > self._window:
                mask += torch.full((rows, length), float("-inf"), device=device).tril_(here - self._window)
            yield slice(begin, begin + rows), mask


@dataclass(slots=True, frozen=True)
class _Scores:
    """What becomes of products of queries and keys."""

    scale: float
    softcap: float | None
    sinks: Tensor | None
    """[K, G] float32."""

    @property
    def plain(self) -> bool:
        """Whether torch's own attention does it, which keeps no scores."""
        return self.softcap is None and self.sinks is None

    def attend(
        self, query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, sinks: Tensor | None
    ) -> Tensor:
        """`query` […, rows, D], `keys` and `values` […, L, D], to [rows, D] each; to scores `mask` is added, and
        `sinks` [… rows] are those of the rows, both as they can be expanded."""
        if self.plain:
            return F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=self.scale)
        scores = query @ keys.transpose(-1, -2) * self.scale
        if self.softcap is not None:
            scores = torch.tanh(scores / self.softcap) * self.softcap
        if mask is not None:
            scores = scores + mask
        if sinks is None:
            return scores.softmax(-1) @ values
        beside = sinks[..., None].expand(*scores.shape[:-1], 1)
        return torch.cat((scores, beside), -1).softmax(-1)[..., :-1] @ values


def _gather(side: Tensor, blocks: Tensor) -> Tensor:
    """The slots of `blocks` one after the other, [B · P, K, D] float32, from one side of a cache."""
    if side.dtype not in LARGEST:
        return side.index_select(0, blocks).float().flatten(0, 1)
    # as bytes, for not every torch can index fp8
    return from_bytes(side.view(torch.uint8).index_select(0, blocks).view(side.dtype)).flatten(0, 1)
