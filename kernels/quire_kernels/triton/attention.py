"""Paged attention of one step: split-KV decode and tiled prefill, in one step side by side.

    out[t] = Σ_j p[t, j] v[j],   p[t, ·] = softmax over visible j of (q[t] · k[j] · scale)

Query heads that share a key/value head are the rows of one matrix product, so keys and values are read once for
all of them. Softmax is computed online, tile by tile, in powers of two. A soft cap bends a tile's scores before
any is hidden. A sink joins what a softmax divides by once, when all keys are seen and all splits weighed.

`_decode` serves sequences with one new token. There the time goes into reading the cache, and a long sequence
must not leave most of the chip idle: its keys are cut into splits, as many as fill the multiprocessors, but none
shorter than `_LEAST_SPLIT` keys. Whichever split of a head is the last to end weighs all of them by their sums, in
the order of the keys, so the result does not depend on which one that was. Splits are cut on the device from the
length that is there, so a captured graph fits any length.

`_prefill` serves sequences with several new tokens, in blocks of `BLOCK_Q` of them. As many programs as the chip
holds at once take one block after the other; which sequence a block is of follows from the sums of all sequences'
blocks, which every program makes for itself. The host has to know no lengths, and sequences with one token cost
nothing.

A block of the cache holds [K, P, D] here: the slots of one head lie side by side. In 8 bits scales follow
(`bytes`): the scales of keys are multiplied in behind their products, those of values before theirs. In int8
queries are rounded like keys, and products are whole numbers; values come as words of two neighbours, and even and
odd numbers of a head are products of their own, which meet when all keys are seen. In e4m3 queries stay as they
are; both halves of a head come out of the same words, and each is a product of its own.

Legend: T tokens, S sequences, H query heads, K key/value heads, G = H / K, D head size, N blocks, P slots a block,
X splits.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from quire_kernels.paging import PagedBatch
from quire_kernels.reference.bytes import E4M3, LARGEST
from quire_kernels.triton.bytes import halves_of, neighbours_of, rounded
from quire_kernels.triton.launch import dependent, fetch, wait
from quire_kernels.triton.tanh import tanh
from quire_kernels.tuning import Choices, named

_LEAST_SPLIT = 64
_SPLITS = (1, 2, 4, 8, 16, 32)
"""Each number is a kernel of its own to compile. More than the last gained nothing on an H200."""
_ITEMS = (64, 1024)
"""Sequences that a kernel for prompts is compiled for; more make a kernel of their own."""
_LINE_BYTES = 128
"""Of the cache."""
_PAIRS = 1024
"""Pairs of a sequence and a key/value head that may be cut into splits: no more than there are multiprocessors."""
COUNTERS = _PAIRS + 2
"""Whole numbers that are zero between kernels: splits that ended, of each pair; blocks of prompts that were taken,
and programs that found none left."""
_ROOMY = 200 * 1024
"""Shared bytes from which on the large tiles fit."""
_LOG2_E = math.log2(math.e)


@triton.jit
def _with_sinks(total, peak, sinks):
    """What softmaxes divide by whose largest score is `peak`, in powers of two, once `sinks` have joined. One that
    is more than 2^127 times the largest weight is as good as all of it."""
    return total + tl.exp2(tl.minimum(sinks * 1.4426950408889634 - peak, 127.0))


@triton.jit
def _tile(
    state_max,
    state_sum,
    acc,
    acc_high,
    q,
    q_high,
    q_scale,
    keys,
    values,
    key_scales,
    value_scales,
    table,
    start,
    low,
    high,
    row_last,
    row_low,
    head,
    kv_heads,
    scale,
    MASKED: tl.constexpr,
    GUARDED: tl.constexpr,
    CAP: tl.constexpr,
    BYTES: tl.constexpr,
    WORDS: tl.constexpr,
    NUMBER: tl.constexpr,
    P: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile of keys `start` … of a sequence, taken into the online softmax. Rows see keys `row_low` to
    `row_last`; those of the tile outside `low` to `high` are not read. MASKED: a row may not see all of the tile.
    GUARDED: a row may have seen none yet. WORDS: `q` and `acc` are of the first halves of heads, `q_high` and
    `acc_high` of the others, and BLOCK_D is for a half. BYTES: `acc` is of a head's even numbers, `acc_high` of
    its odd ones. Else those are nothing. CAP: the soft cap in powers of two, and `scale` is over it; or 0."""
    dims = tl.arange(0, BLOCK_D)
    places = start + tl.arange(0, BLOCK_N)
    there = (places >= low) & (places < high)
    blocks = tl.load(table + places // P, mask=there, other=0).to(tl.int64)
    if BYTES or WORDS:
        slot = head * P + places % P
        words = blocks * (P * kv_heads * (D // 2 + 2)) + slot * (D // 2)
        beside = blocks * (P * kv_heads * (D + 4) // 4) + P * kv_heads * D // 4 + slot
    if BYTES:
        at = blocks * (P * kv_heads * (D + 4)) + slot * D
        k = tl.load(keys + at[None, :] + dims[:, None], mask=there[None, :] & (dims < D)[:, None], other=0)
        k_scale = tl.load(key_scales + beside, mask=there, other=0.0)
        # whole numbers, exactly
        scores = tl.dot(q, k, out_dtype=tl.int32).to(tl.float32) * (q_scale[:, None] * k_scale[None, :])
    elif WORDS:
        inside = there[None, :] & (dims < D // 2)[:, None]
        k = tl.load(keys + words[None, :] + dims[:, None], mask=inside, other=0)
        k_scale = tl.load(key_scales + beside, mask=there, other=0.0)
        k_low, k_high = halves_of(k, NUMBER)
        scores = tl.dot(q, k_low, input_precision=PRECISION)
        scores = tl.dot(q_high, k_high, scores, input_precision=PRECISION) * k_scale[None, :]
    else:
        at = ((blocks * kv_heads + head) * P + places % P) * D
        k = tl.load(keys + at[None, :] + dims[:, None], mask=there[None, :] & (dims < D)[:, None], other=0.0)
        scores = tl.dot(q, k.to(NUMBER), input_precision=PRECISION)
    factor = scale
    if CAP > 0.0:
        scores = tanh(scores * scale)
        factor = CAP
    if MASKED:
        seen = (places[None, :] <= row_last[:, None]) & (places[None, :] >= row_low[:, None])
        scores = tl.where(seen, scores, float("-inf"))
    new_max = tl.maximum(state_max, tl.max(scores, 1) * factor)
    shift = new_max
    if GUARDED:  # a row that has seen nothing yet has no maximum to subtract
        shift = tl.where(new_max == float("-inf"), 0.0, new_max)
    weights = tl.exp2(scores * factor - shift[:, None])
    fade = tl.exp2(state_max - shift)
    state_sum = state_sum * fade + tl.sum(weights, 1)
    acc = acc * fade[:, None]
    if BYTES or WORDS:
        pairs = tl.arange(0, BLOCK_D // 2 if BYTES else BLOCK_D)
        inside = there[:, None] & (pairs < D // 2)[None, :]
        v = tl.load(values + words[:, None] + pairs[None, :], mask=inside, other=0)
        v_low, v_high = neighbours_of(v, NUMBER) if BYTES else halves_of(v, NUMBER)
        v_scale = tl.load(value_scales + beside, mask=there, other=0.0)
        acc_high = acc_high * fade[:, None]
        if tl.float16 == NUMBER:  # which has no room for small weights times small scales
            peak = tl.max(v_scale, 0)
            peak = tl.where(peak > 0.0, peak, 1.0)
            weights *= (v_scale / peak)[None, :]
            acc += tl.dot(weights.to(NUMBER), v_low) * peak
            acc_high += tl.dot(weights.to(NUMBER), v_high) * peak
        else:
            weights *= v_scale[None, :]
            acc = tl.dot(weights.to(NUMBER), v_low, acc, input_precision=PRECISION)
            acc_high = tl.dot(weights.to(NUMBER), v_high, acc_high, input_precision=PRECISION)
    else:
        v = tl.load(values + at[:, None] + dims[None, :], mask=there[:, None] & (dims < D)[None, :], other=0)
        acc = tl.dot(weights.to(NUMBER), v.to(NUMBER), acc, input_precision=PRECISION)
    return new_max, state_sum, acc, acc_high


@triton.jit
def _split_of(length, SPLITS: tl.constexpr, LEAST: tl.constexpr, BLOCK_N: tl.constexpr):
    """Keys a split holds if `length` keys are cut into at most SPLITS, in whole tiles."""
    splits = tl.minimum(tl.maximum(length // LEAST, 1), SPLITS)
    return tl.cdiv(tl.cdiv(length, splits), BLOCK_N) * BLOCK_N


@triton.jit
def _merge(
    out,
    parts,
    sums,
    sink,
    first,
    used,
    SINKS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """One head's result from the first `used` of its splits, weighed by what their exponentials sum to. Other
    programs wrote them, so they are not looked for in this multiprocessor's own cache."""
    splits, dims = tl.arange(0, SPLITS), tl.arange(0, BLOCK_D)
    there = splits < used
    place = first + splits
    peaks = tl.load(sums + place * 2, mask=there, other=float("-inf"), cache_modifier=".cg")
    totals = tl.load(sums + place * 2 + 1, mask=there, other=0.0, cache_modifier=".cg")
    peak = tl.max(peaks, 0)
    weights = tl.exp2(peaks - peak)
    inside = there[:, None] & (dims < D)[None, :]
    results = tl.load(parts + place[:, None] * D + dims[None, :], mask=inside, other=0.0, cache_modifier=".cg")
    result, total = tl.sum(results * weights[:, None], 0), tl.sum(totals * weights, 0)
    if SINKS:
        total = _with_sinks(total, peak, tl.load(sink))
    result = result / total
    tl.store(out + dims, result.to(out.dtype.element_ty), mask=dims < D)


# what changes from step to step must not decide what is compiled
@triton.jit(
    do_not_specialize=["table_width"],
    do_not_specialize_on_alignment=["table_rows", "query_starts", "contexts", "sinks"],
)
def _decode(
    out,
    parts,
    sums,
    arrivals,
    query,
    keys,
    values,
    key_scales,
    value_scales,
    tables,
    table_rows,
    query_starts,
    contexts,
    table_width,
    kv_heads,
    scale,
    sinks,
    INDIRECT: tl.constexpr,
    BYTES: tl.constexpr,
    WORDS: tl.constexpr,
    WINDOW: tl.constexpr,
    CAP: tl.constexpr,
    SINKS: tl.constexpr,
    G: tl.constexpr,
    ROWS: tl.constexpr,
    P: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLITS: tl.constexpr,
    LEAST: tl.constexpr,
    LINE: tl.constexpr,
    PRECISION: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    # addresses are older than the kernel before this one, and so are all keys but the last
    head, sequence, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row = tl.load(query_starts + sequence)
    alone = tl.load(query_starts + sequence + 1) - row == 1
    context = tl.load(contexts + sequence)
    low = 0
    if WINDOW > 0:
        low = tl.maximum(context - WINDOW, 0)
    size = _split_of(context - low, SPLITS, LEAST, BLOCK_N)
    begin = low + split * size
    end = tl.minimum(begin + size, context)
    table_row = sequence
    if INDIRECT:
        table_row = tl.load(table_rows + sequence, mask=alone, other=0)
    table = tables + table_row.to(tl.int64) * table_width
    if DEPENDENT:
        places = begin + tl.arange(0, BLOCK_N)
        there = (places < end) & alone
        blocks = tl.load(table + places // P, mask=there, other=0).to(tl.int64)
        WIDTH: tl.constexpr = D // 2 if WORDS else D
        at = (blocks * kv_heads + head) * (P * WIDTH) + places % P * WIDTH
        if BYTES:
            at += blocks * (P * kv_heads * 4)
        if WORDS:
            at += blocks * (P * kv_heads * 2)
        for number in tl.static_range(0, WIDTH, LINE):
            fetch(keys + at + number)
            fetch(values + ((at + number) // 2 if BYTES else at + number))
    wait(DEPENDENT)
    if (begin >= end) | (not alone):
        return
    members, dims = tl.arange(0, ROWS), tl.arange(0, BLOCK_D)
    heads = head * G + members
    inside = (members < G)[:, None] & (dims < (D // 2 if WORDS else D))[None, :]
    base = row.to(tl.int64) * kv_heads * G
    q = tl.load(query + (base + heads[:, None]) * D + dims[None, :], mask=inside, other=0.0)
    NUMBER: tl.constexpr = query.dtype.element_ty
    q_scale = tl.zeros([ROWS], tl.float32)
    q_high, acc_high = q_scale, q_scale
    if BYTES:
        q, q_scale = rounded(q.to(tl.float32))
        acc_high = tl.zeros([ROWS, BLOCK_D // 2], tl.float32)
    if WORDS:
        q_high = tl.load(query + (base + heads[:, None]) * D + D // 2 + dims[None, :], mask=inside, other=0.0)
        acc_high = tl.zeros([ROWS, BLOCK_D], tl.float32)
    state_max = tl.full([ROWS], float("-inf"), tl.float32)
    state_sum = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, BLOCK_D // 2 if BYTES else BLOCK_D], tl.float32)
    nothing = tl.zeros([ROWS], tl.int32)
    # whole tiles first: they need no mask
    whole = begin + (end - begin) // BLOCK_N * BLOCK_N
    for start in tl.range(begin, whole, BLOCK_N):
        state_max, state_sum, acc, acc_high = _tile(
            state_max, state_sum, acc, acc_high, q, q_high, q_scale,
            keys, values, key_scales, value_scales, table, start,
            begin, end, nothing, nothing, head,
            kv_heads, scale, False, False, CAP, BYTES, WORDS, NUMBER, P, D, BLOCK_D, BLOCK_N, PRECISION,
        )  # fmt: skip
    if whole < end:
        state_max, state_sum, acc, acc_high = _tile(
            state_max, state_sum, acc, acc_high, q, q_high, q_scale,
            keys, values, key_scales, value_scales, table, whole,
            begin, end, nothing + end - 1, nothing, head,
            kv_heads, scale, True, False, CAP, BYTES, WORDS, NUMBER, P, D, BLOCK_D, BLOCK_N, PRECISION,
        )  # fmt: skip
    if BYTES:
        acc = tl.interleave(acc, acc_high)
    if SPLITS == 1:
        if SINKS:
            sink = tl.load(sinks + heads, mask=members < G, other=0.0)
            state_sum = _with_sinks(state_sum, state_max, sink)
        acc = acc / state_sum[:, None]
        place = (base + heads[:, None]) * D + dims[None, :]
        tl.store(out + place, acc.to(out.dtype.element_ty), mask=inside)
        if WORDS:
            acc_high = acc_high / state_sum[:, None]
            tl.store(out + place + D // 2, acc_high.to(out.dtype.element_ty), mask=inside)
    else:
        first = (sequence.to(tl.int64) * kv_heads + head) * G * SPLITS
        place = first + members * SPLITS + split
        tl.store(parts + place[:, None] * D + dims[None, :], acc, mask=inside)
        if WORDS:
            tl.store(parts + place[:, None] * D + D // 2 + dims[None, :], acc_high, mask=inside)
        tl.store(sums + place * 2, state_max, mask=members < G)
        tl.store(sums + place * 2 + 1, state_sum, mask=members < G)
        # all threads have written before one of them says so
        tl.debug_barrier()
        used = tl.cdiv(context - low, size)
        ended = arrivals + sequence * kv_heads + head
        if tl.atomic_add(ended, 1, sem="acq_rel", scope="gpu") == used - 1:
            tl.store(ended, 0)
            for member in tl.static_range(G):
                _merge(
                    out + (base + head * G + member) * D,
                    parts,
                    sums,
                    sinks + head * G + member,
                    first + member * SPLITS,
                    used,
                    SINKS,
                    D,
                    2 * BLOCK_D if WORDS else BLOCK_D,
                    SPLITS,
                )


@triton.jit(
    do_not_specialize=["num_sequences", "table_width"],
    do_not_specialize_on_alignment=["table_rows", "query_starts", "contexts", "sinks"],
)
def _prefill(
    out,
    turns,
    query,
    keys,
    values,
    key_scales,
    value_scales,
    tables,
    table_rows,
    query_starts,
    contexts,
    num_sequences,
    table_width,
    kv_heads,
    scale,
    sinks,
    INDIRECT: tl.constexpr,
    BYTES: tl.constexpr,
    WORDS: tl.constexpr,
    WINDOW: tl.constexpr,
    CAP: tl.constexpr,
    SINKS: tl.constexpr,
    SKIP_SINGLE: tl.constexpr,
    ITEMS: tl.constexpr,
    G: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    P: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    # addresses are older than the kernel before this one
    items = tl.arange(0, ITEMS)
    starts = tl.load(query_starts + items, mask=items < num_sequences, other=0)
    counts = tl.load(query_starts + items + 1, mask=items < num_sequences, other=0) - starts
    if SKIP_SINGLE:
        counts = tl.where(counts == 1, 0, counts)
    blocks = tl.cdiv(counts, BLOCK_Q)
    until = tl.cumsum(blocks, 0)
    total = tl.sum(blocks, 0)
    wait(DEPENDENT)
    NUMBER: tl.constexpr = query.dtype.element_ty
    # whoever is done takes the next one, for some take many times as long as others; the last blocks of a sequence
    # see the most keys, and come first
    work = tl.atomic_add(turns, 1)
    while work < total * kv_heads:
        block, head = total - 1 - work // kv_heads, work % kv_heads
        sequence = tl.sum((until <= block).to(tl.int32), 0)
        offset = (block - tl.sum(tl.where(items < sequence, blocks, 0), 0)) * BLOCK_Q
        first = tl.load(query_starts + sequence)
        count = tl.load(query_starts + sequence + 1) - first
        context = tl.load(contexts + sequence)
        rows, dims = tl.arange(0, BLOCK_Q * BLOCK_G), tl.arange(0, BLOCK_D)
        tokens, members = offset + rows // BLOCK_G, rows % BLOCK_G
        inside = ((tokens < count) & (members < G))[:, None] & (dims < (D // 2 if WORDS else D))[None, :]
        at = ((first + tokens).to(tl.int64) * kv_heads * G + head * G + members) * D
        q = tl.load(query + at[:, None] + dims[None, :], mask=inside, other=0.0)
        q_scale = tl.zeros([BLOCK_Q * BLOCK_G], tl.float32)
        q_high, acc_high = q_scale, q_scale
        if BYTES:
            q, q_scale = rounded(q.to(tl.float32))
            acc_high = tl.zeros([BLOCK_Q * BLOCK_G, BLOCK_D // 2], tl.float32)
        if WORDS:
            q_high = tl.load(query + at[:, None] + D // 2 + dims[None, :], mask=inside, other=0.0)
            acc_high = tl.zeros([BLOCK_Q * BLOCK_G, BLOCK_D], tl.float32)
        row_last = context - count + tokens
        row_low = tl.zeros_like(row_last)
        low = 0
        if WINDOW > 0:
            row_low = tl.maximum(row_last - WINDOW + 1, 0)
            low = tl.maximum(context - count + offset - WINDOW + 1, 0)
        high = tl.minimum(context - count + offset + BLOCK_Q, context)
        table_row = sequence
        if INDIRECT:
            table_row = tl.load(table_rows + sequence)
        table = tables + table_row.to(tl.int64) * table_width
        state_max = tl.full([BLOCK_Q * BLOCK_G], float("-inf"), tl.float32)
        state_sum = tl.zeros([BLOCK_Q * BLOCK_G], tl.float32)
        acc = tl.zeros([BLOCK_Q * BLOCK_G, BLOCK_D // 2 if BYTES else BLOCK_D], tl.float32)
        begin = low // BLOCK_N * BLOCK_N
        # tiles that every row sees whole need no mask
        plain = begin
        if WINDOW == 0:
            plain = (context - count + offset + 1) // BLOCK_N * BLOCK_N
        for start in tl.range(begin, plain, BLOCK_N):
            state_max, state_sum, acc, acc_high = _tile(
                state_max, state_sum, acc, acc_high, q, q_high, q_scale,
                keys, values, key_scales, value_scales, table, start,
                low, high, row_last, row_low, head,
                kv_heads, scale, False, WINDOW > 0, CAP, BYTES, WORDS, NUMBER, P, D, BLOCK_D, BLOCK_N, PRECISION,
            )  # fmt: skip
        for start in tl.range(plain, high, BLOCK_N):
            state_max, state_sum, acc, acc_high = _tile(
                state_max, state_sum, acc, acc_high, q, q_high, q_scale,
                keys, values, key_scales, value_scales, table, start,
                low, high, row_last, row_low, head,
                kv_heads, scale, True, WINDOW > 0, CAP, BYTES, WORDS, NUMBER, P, D, BLOCK_D, BLOCK_N, PRECISION,
            )  # fmt: skip
        if BYTES:
            acc = tl.interleave(acc, acc_high)
        if SINKS:
            sink = tl.load(sinks + head * G + members, mask=members < G, other=0.0)
            state_sum = _with_sinks(state_sum, state_max, sink)
        total_sum = tl.where(state_sum == 0.0, 1.0, state_sum)[:, None]
        acc = acc / total_sum
        tl.store(out + at[:, None] + dims[None, :], acc.to(out.dtype.element_ty), mask=inside)
        if WORDS:
            acc_high = acc_high / total_sum
            tl.store(out + at[:, None] + D // 2 + dims[None, :], acc_high.to(out.dtype.element_ty), mask=inside)
        work = tl.atomic_add(turns, 1)
    if tl.atomic_add(turns + 1, 1) == tl.num_programs(0) - 1:  # nobody looks any more
        tl.store(turns, 0)
        tl.store(turns + 1, 0)


@dataclass(slots=True, frozen=True)
class Chip:
    """What tiles depend on: how many multiprocessors there are, and the bytes that a program may share on one."""

    multiprocessors: int
    shared_bytes: int
    choices: Choices = field(default_factory=Choices, compare=False)
    """And what was found fastest on it."""

    @classmethod
    def current(cls) -> Chip:
        """That of the current CUDA device."""
        found = triton.runtime.driver.active.utils.get_device_properties(torch.cuda.current_device())
        return cls(found["multiprocessor_count"], found["max_shared_mem"])


class StepAttention:
    """`PagedAttention` of the Triton back-end."""

    def __init__(
        self,
        batch: PagedBatch,
        window: int | None,
        chip: Chip,
        counters: Tensor,
        softcap: float | None = None,
    ) -> None:
        self._batch = batch
        self._window = window or 0
        self._softcap = softcap
        self._chip = chip
        self._counters = counters
        self._decodes = any(count == 1 for count in batch.query_lens)
        self._prefills = any(count != 1 for count in batch.query_lens)

    def __call__(self, query: Tensor, cache: Tensor, scale: float, sinks: Tensor | None = None) -> Tensor:
        """See `PagedAttention`. A kernel lies between what made the addresses of the batch and this: they are read
        before it has ended.
        """
        out = torch.empty_like(query, memory_format=torch.contiguous_format)
        if self._decodes:
            self._decode(out, query, cache, scale, sinks)
        if self._prefills:
            self._prefill(out, query, cache, scale, sinks)
        return out

    def _scores(self, scale: float, sinks: Tensor | None, out: Tensor) -> dict[str, Any]:
        """What kernels make of products; without sinks nobody reads through them."""
        over = _LOG2_E if self._softcap is None else 1 / self._softcap
        return {
            "scale": scale * over,
            "CAP": 0.0 if self._softcap is None else self._softcap * _LOG2_E,
            "sinks": out if sinks is None else sinks,
            "SINKS": sinks is not None,
        }

    def _decode(self, out: Tensor, query: Tensor, cache: Tensor, scale: float, sinks: Tensor | None) -> None:
        batch, shape = self._batch, _shape(query, cache)
        sequences, kv_heads = len(batch.query_lens), cache.shape[3]
        rows = sequences * kv_heads
        tuning = decode_tuning(self._chip, rows, shape["D"], cache.dtype)
        splits = num_splits(self._chip.multiprocessors, rows, batch.longest)
        facts = self.facts(query, cache, sinks is not None)
        found = self._chip.choices.get("attention.decode", facts, rung_of(self._chip.multiprocessors, rows))
        if found is not None:
            tuning, splits = found.tuning, min(splits, found.splits)
        parts = sums = out
        if splits > 1:
            # by sequence, not by token: a long prompt beside would need gigabytes for nothing
            heads = sequences * query.shape[1]
            parts = torch.empty((heads, splits, shape["D"]), dtype=torch.float32, device=query.device)
            sums = torch.empty((heads, splits, 2), dtype=torch.float32, device=query.device)
        _decode[(kv_heads, sequences, splits)](
            out,
            parts,
            sums,
            self._counters,
            query,
            *_numbers(cache),
            *_scales(cache),
            batch.block_tables,
            batch.query_starts if batch.table_rows is None else batch.table_rows,
            batch.query_starts,
            batch.context_lens,
            batch.block_tables.shape[1],
            kv_heads,
            **self._scores(scale, sinks, out),
            INDIRECT=batch.table_rows is not None,
            WINDOW=self._window,
            ROWS=max(16, triton.next_power_of_2(shape["G"])),
            SPLITS=splits,
            LEAST=_LEAST_SPLIT,
            LINE=_LINE_BYTES // (2 if shape["WORDS"] else cache.element_size()),
            **shape,
            **tuning,
            **dependent(),
        )

    def _prefill(self, out: Tensor, query: Tensor, cache: Tensor, scale: float, sinks: Tensor | None) -> None:
        batch, shape = self._batch, _shape(query, cache)
        sequences = len(batch.query_lens)
        tuning = prefill_tuning(self._chip, shape["D"], query.dtype, cache.dtype)
        found = self._chip.choices.get("attention.prompts", self.facts(query, cache, sinks is not None), 0)
        if found is not None:
            tuning = found.tuning
        members = triton.next_power_of_2(shape["G"])
        block_q = max(1, tuning["BLOCK_M"] // members)
        most = (query.shape[0] // block_q + sequences) * cache.shape[3]
        _prefill[(min(most, tuning["PROGRAMS"] * self._chip.multiprocessors),)](
            out,
            self._counters[_PAIRS:],
            query,
            *_numbers(cache),
            *_scales(cache),
            batch.block_tables,
            batch.query_starts if batch.table_rows is None else batch.table_rows,
            batch.query_starts,
            batch.context_lens,
            sequences,
            batch.block_tables.shape[1],
            cache.shape[3],
            **self._scores(scale, sinks, out),
            INDIRECT=batch.table_rows is not None,
            WINDOW=self._window,
            SKIP_SINGLE=self._decodes,
            ITEMS=next((size for size in _ITEMS if size >= sequences), triton.next_power_of_2(sequences)),
            BLOCK_G=members,
            BLOCK_Q=block_q,
            BLOCK_N=tuning["BLOCK_N"],
            **shape,
            num_warps=tuning["num_warps"],
            num_stages=tuning["num_stages"],
            **dependent(),
        )

    def facts(self, query: Tensor, cache: Tensor, sinks: bool) -> tuple[str | int, ...]:
        """What cuts depend on, besides how many there are."""
        block_size, kv_heads, (_, heads, head_dim) = cache.shape[2], cache.shape[3], query.shape
        number, kept = named(query.dtype), named(cache.dtype)
        scores = "-".join(["capped"] * (self._softcap is not None) + ["sinks"] * sinks) or "plain"
        return number, kept, kv_heads, heads // kv_heads, head_dim, block_size, self._window, scores


def rungs(multiprocessors: int) -> tuple[int, ...]:
    """Pairs of a sequence and a head up to which a cut is chosen: each has another number of splits, or none and
    another number of programs on a multiprocessor. More pairs have the default's."""
    return tuple(4 * multiprocessors // splits for splits in (32, 16, 8, 4, 2, 1))


@functools.cache
def rung_of(multiprocessors: int, rows: int) -> int:
    """The rung of so many pairs; 0: they have none."""
    return next((rung for rung in rungs(multiprocessors) if rows <= rung), 0)


def crowds(multiprocessors: int, kv_heads: int, most: int) -> list[int]:
    """Numbers of sequences, up to `most`, with each of which `_decode` or `_prefill` is another kernel than with
    fewer: rungs are those of splits."""
    first = {rung_of(multiprocessors, count * kv_heads): count for count in range(most, 0, -1)}
    return sorted({*first.values(), *(count + 1 for count in (1, *_ITEMS) if count < most)})


def num_splits(num_multiprocessors: int, rows: int, longest: int) -> int:
    """Into how many parts the keys of each of `rows` pairs of a sequence and a head are cut, of at most `longest`
    keys: four small programs for each multiprocessor, or one alone for each pair where that leaves few idle.
    """
    wanted = min(4 * num_multiprocessors / rows, longest / _LEAST_SPLIT)
    return 1 if rows > num_multiprocessors else max(splits for splits in _SPLITS if splits <= max(wanted, 1))


def decode_tuning(chip: Chip, rows: int, head_dim: int, kept: torch.dtype) -> dict[str, int]:
    """Tile and pipeline of `_decode` for `rows` pairs of a sequence and a head, whose keys are `kept` so.

    Where pairs are not cut and few, each must have much on its way; else small programs share a multiprocessor
    better. Found on an H200 (`benchmarks.gpu --sweep`).
    """
    if kept in LARGEST:
        return {"BLOCK_N": 64, "num_warps": 4, "num_stages": 3}
    if head_dim * kept.itemsize > 256:
        return {"BLOCK_N": 32, "num_warps": 4, "num_stages": 2}
    if chip.multiprocessors < rows <= 2 * chip.multiprocessors and chip.shared_bytes >= _ROOMY:
        return {"BLOCK_N": 128, "num_warps": 4, "num_stages": 3}
    return {"BLOCK_N": 64, "num_warps": 2, "num_stages": 3}


def prefill_tuning(chip: Chip, head_dim: int, number: torch.dtype, kept: torch.dtype) -> dict[str, int]:
    """Tile and pipeline of `_prefill` for a head size, the dtype of queries and that of keys, and programs that
    a multiprocessor holds. Found like those of `_decode`.
    """
    if number.itemsize > 2:
        block_n = 16 if head_dim > 128 and chip.shared_bytes < _ROOMY else 32
        return {"BLOCK_M": 32, "BLOCK_N": block_n, "num_warps": 4, "num_stages": 2, "PROGRAMS": 2}
    if head_dim > 128:
        return {"BLOCK_M": 64, "BLOCK_N": 32, "num_warps": 4, "num_stages": 2, "PROGRAMS": 2}
    if chip.shared_bytes < _ROOMY or kept in LARGEST:
        return {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 2, "PROGRAMS": 1}
    return {"BLOCK_M": 128, "BLOCK_N": 128, "num_warps": 8, "num_stages": 3, "PROGRAMS": 1}


def _numbers(cache: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values of a cache as the numbers in them are read."""
    keys, values = cache
    return (
        keys.view(torch.int16) if cache.dtype == E4M3 else keys,
        values.view(torch.int16) if cache.dtype in LARGEST else values,
    )


def _scales(cache: Tensor) -> Tensor:
    """Both sides of a cache as the scales in it are read, [2, …]; of one that has none, whatever."""
    return cache.view(torch.float32) if cache.dtype in LARGEST else cache


def _shape(query: Tensor, cache: Tensor) -> dict[str, Any]:
    head_dim = query.shape[2]
    words = cache.dtype == E4M3
    return {
        "G": query.shape[1] // cache.shape[3],
        "P": cache.shape[2],
        "D": head_dim,
        # products of 8 bits take 32 at a time
        "BLOCK_D": max(
            32 if cache.dtype == torch.int8 else 16, triton.next_power_of_2(head_dim // 2 if words else head_dim)
        ),
        "BYTES": cache.dtype == torch.int8,
        "WORDS": words,
        # three-term tf32 would do for float32, the interpreter knows ieee alone
        "PRECISION": "ieee",
    }
