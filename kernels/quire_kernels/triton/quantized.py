"""Matrix products with weights in 8 and 4 bits, all of them by products of whole numbers.

    out[m, n] = (Σ_k a[m, k] · w[n, k]) · s[m] · scales[n] + bias[n]                            8 bits
    out[m, n] = (Σ_groups (Σ_k in group a[m, k] · code[n, k]) · scales[n, group]) · s[m] + bias[n]     4 bits

`rounding` gives the codes a and the scale s of each row of x. Activations that are rounded have one plane of
codes. Those that are not have two, of which the second has what the first leaves, 254 times as fine: together a
row's numbers to 1/64,516 of its largest. In bfloat16 that loses less than the rounding of the result, whatever the
row; numbers of other formats are not cut so. Bytes of a weight go into the tensor cores as they are, where
unpacking them to bfloat16 would take longer than reading them.

With one row of codes `_one_row` multiplies four pairs of bytes an instruction; all others go to the tensor cores
in `_product`, a tile of the weight being the wide side and as many rows the narrow one as there are. A weight with
few outputs has too few tiles for the chip. Then its inputs may be cut into splits; partial sums wait for each
other, and whoever comes last to a tile adds them up, always in the same order.

Many rows of an input that is not rounded, and any in another format than bfloat16, are work for cuBLAS: `unpack`
writes some outputs at a time in the dtype of x, so few that they are still in the L2 cache when they are read.

A weight is written by no kernel, so its first bytes are on their way to the L2 cache before the kernel waits for
the one before it.

4 bits lie in units of 2 · h inputs, [units, N, h] bytes: byte j of an output has the code of input j of the unit
in its low half and of input h + j in its high half, both in two's complement. A tile of a unit is one dense run of
bytes; a shift and a mask make sixteen times the codes of it. Every half of a unit has one scale.

Legend: M rows of x, N outputs, K inputs, g inputs of a group, P planes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from quire_kernels.errors import KernelError
from quire_kernels.quantized import Activations, Int4Weight, Int8Weight, IntegerWeight
from quire_kernels.reference.product import check_activations
from quire_kernels.triton.bytes import NATIVE
from quire_kernels.triton.launch import dependent, fetch, wait
from quire_kernels.triton.rounding import Codes, Rounding, round_rows
from quire_kernels.tuning import Choices, Family, Trial, named

SCRATCH_BYTES = 32 << 20
"""Of a weight that is unpacked at a time: less than the L2 cache of a data-centre GPU."""
ROOM_BYTES = 16 << 20
"""Of partial sums, at most."""
MOST_TILES = 4096
"""That can be cut into splits: more than fill any chip are not."""
MANY_ROWS = {0: 1024, 32: 128, 64: 128, 128: 256}
"""From so many rows on cuBLAS multiplies what is unpacked, by size of a group: the end of each costs time."""

_PIECE = 1 << 22
"""Numbers of a weight in 4 bits that are put in order at a time."""
_LEAST_HALF = 32
"""Bytes that the tensor cores take at a time."""


class Tiling(NamedTuple):
    """How a product is cut: outputs, rows and inputs of a tile, splits of the inputs, and how many tiles are on
    their way at once."""

    block_n: int
    block_m: int
    block_k: int
    splits: int
    num_warps: int
    num_stages: int


class Line(NamedTuple):
    """The same of `_one_row`: outputs, and words of four inputs."""

    block_n: int
    block_w: int
    num_warps: int
    num_stages: int


# ── inside kernels ────────────────────────────────────────────────────────────────────────────────────────


@triton.jit
def _dot4(w, x, acc):
    """acc + the sum of the products of the four signed bytes of each word."""
    if NATIVE:
        return tl.inline_asm_elementwise(
            "dp4a.s32.s32 $0, $1, $2, $3;", "=r,r,r,r", [w, x, acc], dtype=tl.int32, is_pure=True, pack=1
        )
    for place in tl.static_range(0, 32, 8):
        acc += ((w << (24 - place)) >> 24) * ((x << (24 - place)) >> 24)
    return acc


@triton.jit
def _halves(pairs):
    """Of bytes with two codes each: sixteen times the low ones and the high ones, int8."""
    if NATIVE:
        # four bytes at once, which the compiler would take one by one
        low, high = tl.inline_asm_elementwise(
            "{ .reg .b32 up; shl.b32 up, $2, 4; and.b32 up, up, 0xF0F0F0F0; "
            "and.b32 $1, $2, 0xF0F0F0F0; mov.b32 $0, up; }",
            "=&r,=&r,r",
            [pairs],
            dtype=(tl.int8, tl.int8),
            is_pure=True,
            pack=4,
        )
        return low, high
    low = (pairs << 4).to(tl.uint8).to(tl.int8, bitcast=True)
    high = (pairs & 0xF0).to(tl.uint8).to(tl.int8, bitcast=True)
    return low, high


@triton.jit
def sum_of_splits(acc, parts, arrivals, tile, splits, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr):
    """Keeps this program's sums, and says whether it is the last of its tile; then also the sums of all."""
    size: tl.constexpr = BLOCK_N * BLOCK_M
    inside = (tl.arange(0, BLOCK_N) * BLOCK_M)[:, None] + tl.arange(0, BLOCK_M)[None, :]
    mine = parts + tile.to(tl.int64) * splits * size + inside
    tl.store(mine + tl.program_id(1) * size, acc)
    tl.debug_barrier()
    last = tl.atomic_add(arrivals + tile, 1, sem="acq_rel") == splits - 1
    if last:
        tl.store(arrivals + tile, 0)  # for the next product
        acc = tl.load(mine, cache_modifier=".cg")
        for split in tl.range(1, splits, num_stages=1):
            acc += tl.load(mine + split * size, cache_modifier=".cg")
    return acc, last


# ── kernels ───────────────────────────────────────────────────────────────────────────────────────────────


@triton.jit
def _one_row(
    out,
    x,
    x_scales,
    weight,
    scales,
    bias,
    outputs,
    words,
    BIAS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_W: tl.constexpr,
    STAGES: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    first = tl.program_id(0) * BLOCK_N
    rows, ks = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_W)
    inside = first + rows < outputs
    here = weight + first.to(tl.int64) * words + (rows * words)[:, None] + ks[None, :]
    acc = tl.zeros([BLOCK_N, BLOCK_W], tl.int32)
    w = tl.load(here, mask=inside[:, None] & (ks < words)[None, :], other=0, eviction_policy="evict_first")
    scale = tl.load(scales + first + rows, mask=inside, other=0.0)
    wait(DEPENDENT)
    for k in tl.range(0, words, BLOCK_W, num_stages=STAGES):
        following = k + BLOCK_W + ks < words
        coming = tl.load(
            here + k + BLOCK_W, mask=inside[:, None] & following[None, :], other=0, eviction_policy="evict_first"
        )
        number = tl.load(x + k + ks, mask=k + ks < words, other=0)
        acc = _dot4(w, tl.broadcast_to(number[None, :], [BLOCK_N, BLOCK_W]), acc)
        w = coming
    total = tl.sum(acc, 1).to(tl.float32) * tl.load(x_scales) * scale
    if BIAS:
        total += tl.load(bias + first + rows, mask=inside, other=0.0)
    tl.store(out + first + rows, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _product(
    out,
    codes,
    x_scales,
    weight,
    scales,
    bias,
    parts,
    arrivals,
    rows,
    outputs,
    width,
    splits,
    GROUP: tl.constexpr,
    HALF: tl.constexpr,
    PLANES: tl.constexpr,
    BIAS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT: tl.constexpr,
    EVEN: tl.constexpr,
    AHEAD: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """`GROUP` 0: 8 bits. `HALF`: inputs of half a unit. `BLOCK_M`: rows of codes. `SPLIT`: there are several
    splits. `EVEN`: the width is a multiple of `BLOCK_K`. `AHEAD`: tiles that are asked for before the wait."""
    tile = tl.program_id(0)
    # tiles of the same few outputs run side by side, for at most 16 tiles of rows: both sides come from L2
    down, across = tl.cdiv(rows * PLANES, BLOCK_M), tl.cdiv(outputs, BLOCK_N)
    band = tile // (16 * across) * 16
    high = tl.minimum(down - band, 16)
    within = tile - band * across
    first, top = within // high * BLOCK_N, (band + within % high) * BLOCK_M
    ns, columns, ks = tl.arange(0, BLOCK_N), top + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_K)
    inside, real = first + ns < outputs, columns < rows * PLANES
    each = tl.cdiv(tl.cdiv(width, BLOCK_K), splits) * BLOCK_K
    begin = tl.program_id(1) * each
    end = tl.minimum(begin + each, width)
    numbers = codes + (columns.to(tl.int64) * width)[None, :]
    if GROUP == 0:
        here = weight + first.to(tl.int64) * width + (ns * width)[:, None]
        if DEPENDENT and AHEAD > 0:
            lines = begin + tl.arange(0, (AHEAD * BLOCK_K + 127) // 128) * 128
            # outputs behind the last one are none, and memory behind the weight may be nobody's
            near = weight + tl.minimum(first + ns, outputs - 1).to(tl.int64)[:, None] * width
            fetch(near + tl.minimum(lines, width - 1)[None, :])
        acc = tl.zeros([BLOCK_N, BLOCK_M], tl.int32)
    else:
        tl.static_assert(BLOCK_K % (2 * HALF) == 0)
        pairs = tl.arange(0, HALF)
        here = weight + first.to(tl.int64) * HALF + (ns * HALF)[:, None] + pairs[None, :]
        beside = scales + first + ns
        unit_bytes = tl.cast(outputs, tl.int64) * HALF
        if DEPENDENT and AHEAD > 0:
            units = begin // (2 * HALF) + tl.arange(0, AHEAD * BLOCK_K // (2 * HALF))
            units = tl.minimum(units, width // (2 * HALF) - 1).to(tl.int64)
            lines = first * HALF + tl.arange(0, (BLOCK_N * HALF + 127) // 128) * 128
            fetch(weight + (units * unit_bytes)[:, None] + tl.minimum(lines, outputs * HALF - 1)[None, :])
        acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    wait(DEPENDENT)
    for k in tl.range(begin, end, BLOCK_K):
        if GROUP == 0:
            if EVEN:
                w = tl.load(here + (k + ks)[None, :], mask=inside[:, None], other=0)
                code = tl.load(numbers + (k + ks)[:, None], mask=real[None, :], other=0)
            else:
                there = k + ks < end
                w = tl.load(here + (k + ks)[None, :], mask=inside[:, None] & there[None, :], other=0)
                code = tl.load(numbers + (k + ks)[:, None], mask=there[:, None] & real[None, :], other=0)
            acc = tl.dot(w, code, acc, out_dtype=tl.int32)
        else:
            for part in tl.static_range(BLOCK_K // (2 * HALF)):
                start = k + part * (2 * HALF)
                mine, found = inside, real
                if not EVEN:
                    mine, found = inside & (start + 0 * ns < end), real & (start + 0 * columns < end)
                unit = tl.cast(start // (2 * HALF), tl.int64)
                group = tl.cast(start // GROUP, tl.int64)
                w = tl.load(here + unit * unit_bytes, mask=mine[:, None], other=0)
                scale = tl.load(beside + group * outputs, mask=mine, other=0.0).to(tl.float32)
                front = tl.load(numbers + (start + pairs)[:, None], mask=found[None, :], other=0)
                back = tl.load(numbers + (start + HALF + pairs)[:, None], mask=found[None, :], other=0)
                low, upper = _halves(w)
                sums = tl.dot(low, front, out_dtype=tl.int32)
                if GROUP == HALF:
                    acc += sums.to(tl.float32) * scale[:, None]
                    following = tl.load(beside + (group + 1) * outputs, mask=mine, other=0.0).to(tl.float32)
                    sums = tl.dot(upper, back, out_dtype=tl.int32)
                    acc += sums.to(tl.float32) * following[:, None]
                else:
                    sums = tl.dot(upper, back, sums, out_dtype=tl.int32)
                    acc += sums.to(tl.float32) * scale[:, None]
    done = True
    if SPLIT:
        acc, done = sum_of_splits(acc, parts, arrivals, tile, splits, BLOCK_N, BLOCK_M)
    if done:
        result = acc.to(tl.float32)
        if GROUP > 0:
            result *= 0.0625  # codes went in sixteen times as large
        BLOCK_R: tl.constexpr = BLOCK_M // PLANES
        if PLANES == 2:
            coarse, fine = tl.split(tl.reshape(result, (BLOCK_N, BLOCK_R, 2)))
            result = coarse + fine * (1.0 / 254.0)
        which = top // PLANES + tl.arange(0, BLOCK_R)
        wanted = which < rows
        result = result * tl.load(x_scales + which, mask=wanted, other=0.0)[None, :]
        if GROUP == 0:
            result = result * tl.load(scales + first + ns, mask=inside, other=0.0)[:, None]
        if BIAS:
            result += tl.load(bias + first + ns, mask=inside, other=0.0)[:, None]
        places = out + (which.to(tl.int64) * outputs)[None, :] + (first + ns)[:, None]
        tl.store(places, result.to(out.dtype.element_ty), mask=inside[:, None] & wanted[None, :])


@triton.jit
def _unpack(
    out,
    weight,
    scales,
    ids,
    first,
    rows,
    outputs,
    width,
    GROUP: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BY_ID: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """What `rows` outputs, those of `ids` or from `first` on, stand for, in the dtype of `out`. A program has some
    of them, and in 4 bits one group of inputs."""
    here = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = here < rows
    wait(DEPENDENT)  # what was in `out` before may still be read
    which = (first + here).to(tl.int64)
    if BY_ID:
        which = tl.load(ids + here, mask=inside, other=0)
    place = out + here.to(tl.int64)[:, None] * width
    if GROUP == 0:
        ks = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
        there = inside[:, None] & (ks < width)[None, :]
        code = tl.load(weight + which[:, None] * width + ks[None, :], mask=there, other=0).to(tl.float32)
        scale = tl.load(scales + which, mask=inside, other=0.0)
        tl.store(place + ks[None, :], (code * scale[:, None]).to(out.dtype.element_ty), mask=there)
    else:
        unit, both = tl.program_id(1).to(tl.int64), tl.arange(0, HALF)[None, :]
        pairs = tl.load(weight + (unit * outputs + which)[:, None] * HALF + both, mask=inside[:, None], other=0)
        group = unit * (2 * HALF) // GROUP
        scale = tl.load(scales + group * outputs + which, mask=inside, other=0.0).to(tl.float32)
        here = place + unit * (2 * HALF) + both
        low, upper = _halves(pairs)
        low = low.to(tl.float32) * (scale * 0.0625)[:, None]
        tl.store(here, low.to(out.dtype.element_ty), mask=inside[:, None])
        if GROUP == HALF:
            scale = tl.load(scales + (group + 1) * outputs + which, mask=inside, other=0.0).to(tl.float32)
        upper = upper.to(tl.float32) * (scale * 0.0625)[:, None]
        tl.store(here + HALF, upper.to(out.dtype.element_ty), mask=inside[:, None])


# ── launchers ─────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(slots=True, frozen=True)
class Packed:
    """A weight in the order that kernels read it in."""

    values: Tensor
    """[N, K] int8; of 4 bits [K / (2 · h), N, h] uint8."""
    scales: Tensor
    """[N] float32; of 4 bits [K / g, N] bfloat16."""
    group_size: int
    """0 in 8 bits."""
    outputs: int
    width: int

    @classmethod
    def of(cls, weight: IntegerWeight) -> Packed:
        """Takes over `weight`. 4 bits are copied: for that long they are there twice."""
        outputs, width = weight.shape
        if isinstance(weight, Int8Weight):
            return cls(weight.values.contiguous(), weight.scales.contiguous(), 0, outputs, width)
        half = half_unit(weight.group_size, width)
        units = width // (2 * half)
        values = torch.empty((units, outputs, half), dtype=torch.uint8, device=weight.values.device)
        step = max(1, _PIECE // width)
        for start in range(0, outputs, step):
            # pairs of neighbours become pairs of both halves of a unit
            rows = weight.values[start : start + step]
            codes = torch.stack((rows & 15, rows >> 4), -1).view(-1, units, 2, half) ^ 8
            values[:, start : start + step] = (codes[:, :, 0] | codes[:, :, 1] << 4).transpose(0, 1)
        return cls(values, weight.scales.T.contiguous(), weight.group_size, outputs, width)

    @property
    def half(self) -> int:
        """h; in 8 bits of no meaning."""
        return half_unit(self.group_size, self.width) if self.group_size else 1

    @property
    def multiplies(self) -> bool:
        """Whether the tensor cores take half a unit."""
        return not self.group_size or self.half >= _LEAST_HALF


class Room:
    """Where partial sums of a product wait for each other. One product at a time uses it."""

    def __init__(self, device: torch.device) -> None:
        self.arrivals = torch.zeros(MOST_TILES, dtype=torch.int32, device=device)
        """How many splits of a tile are there; 0 between products."""


def half_unit(group_size: int, width: int) -> int:
    """Inputs of half a unit: half a group, or a whole small one if there is an even number of them."""
    return 32 if group_size == 32 and width % 64 == 0 else group_size // 2


def multiply_row(
    codes: Tensor, x_scales: Tensor, weight: Packed, bias: Tensor | None, dtype: torch.dtype, line: Line
) -> Tensor:
    """The product of one rounded row [1, K], K a multiple of 4, with a weight in 8 bits. [1, N] in `dtype`."""
    out = torch.empty((1, weight.outputs), dtype=dtype, device=codes.device)
    _one_row[(triton.cdiv(weight.outputs, line.block_n),)](
        out, codes.view(torch.int32), x_scales, weight.values.view(torch.int32), weight.scales,
        weight.scales if bias is None else bias, weight.outputs, weight.width // 4, BIAS=bias is not None,
        BLOCK_N=line.block_n, BLOCK_W=line.block_w, STAGES=line.num_stages,
        num_warps=line.num_warps, **dependent(),
    )  # fmt: skip
    return out


def multiply(
    codes: Tensor,
    x_scales: Tensor,
    weight: Packed,
    bias: Tensor | None,
    dtype: torch.dtype,
    tiling: Tiling,
    room: Room,
) -> Tensor:
    """The product of M rows that `round_rows` gave with a weight that `multiplies`. [M, N] in `dtype`."""
    rows, splits = x_scales.shape[0], tiling.splits
    out = torch.empty((rows, weight.outputs), dtype=dtype, device=codes.device)
    tiles = triton.cdiv(codes.shape[0], tiling.block_m) * triton.cdiv(weight.outputs, tiling.block_n)
    parts = out
    if splits > 1:
        sums = torch.float32 if weight.group_size else torch.int32
        size = tiles * splits * tiling.block_n * tiling.block_m
        parts = torch.empty(size, dtype=sums, device=codes.device)
    _product[(tiles, splits)](
        out, codes, x_scales, weight.values, weight.scales, weight.scales if bias is None else bias, parts,
        room.arrivals, rows, weight.outputs, weight.width, splits, GROUP=weight.group_size, HALF=weight.half,
        PLANES=codes.shape[0] // rows, BIAS=bias is not None, BLOCK_N=tiling.block_n, BLOCK_M=tiling.block_m,
        BLOCK_K=tiling.block_k, SPLIT=splits > 1, EVEN=weight.width % tiling.block_k == 0, AHEAD=2,
        num_warps=tiling.num_warps, num_stages=tiling.num_stages, **dependent(),
    )  # fmt: skip
    return out


def unpack(weight: Packed, out: Tensor, first: int, ids: Tensor | None = None) -> Tensor:
    """Fills `out` [n, K] with the numbers of the outputs `ids` [n] int64, or of those from `first` on."""
    rows, size = out.shape[0], weight.group_size
    block_n, block_k = (64, 2 * weight.half) if size else (4, 1024)
    grid = (triton.cdiv(rows, block_n), triton.cdiv(weight.width, block_k))
    _unpack[grid](
        out, weight.values, weight.scales, weight.scales if ids is None else ids, first, rows, weight.outputs,
        weight.width, GROUP=size, HALF=weight.half, BLOCK_N=block_n, BLOCK_K=block_k, BY_ID=ids is not None,
        num_warps=4, **dependent(),
    )  # fmt: skip
    return out


def line_for(outputs: int, width: int) -> Line:
    """How `_one_row` is cut, by what was fastest on an H200."""
    if width >= 8192:
        return Line(4, 512, 2, 3)
    if outputs >= 16384:
        return Line(2, 512, 4, 1)
    return Line(8, 256, 4, 3) if outputs > 5120 else Line(4, 512, 2, 1)


def tiling_for(columns: int, weight: Packed, multiprocessors: int) -> Tiling:
    """How `_product` is cut for so many rows of codes, by what was fastest on an H200: as narrow as there are
    rows. Where tiles are fewer than multiprocessors they are narrower still, and long inputs are split."""
    outputs, long = weight.outputs, weight.width >= 8192

    def tiles(block_n: int, block_m: int) -> int:
        return -(-columns // block_m) * -(-outputs // block_n)

    if columns <= 32:
        # of 4 bits each group's sums are scaled: a tile that is half empty costs more than one that is slower
        block_m = 8 if columns <= 8 and weight.group_size else 16 if columns <= 16 else 32
        splits = 2 if long and tiles(64, block_m) < multiprocessors else 1
        found = Tiling(64, block_m, 256, splits, 4, 5)
    elif columns <= 64:
        splits = 2 if tiles(64, 64) < multiprocessors else 1
        found = Tiling(64, 64, 128, splits * 2 if splits > 1 and long else splits, 4, 4)
    elif tiles(128, 128) >= multiprocessors:
        found = Tiling(128, 128, 128, 1, 8, 3)
    elif columns <= 128:
        found = Tiling(128, 64, 128, 4, 4, 4) if long else Tiling(64, 64, 128, 2, 4, 4)
    else:
        splits = 2 if long and tiles(64, 128) < multiprocessors else 1
        found = Tiling(64, 128, 128, splits, 4 if long else 8, 4)
    most = ROOM_BYTES // (tiles(found.block_n, found.block_m) * found.block_n * found.block_m * 4)
    return found._replace(splits=max(1, min(found.splits, most, triton.cdiv(weight.width, found.block_k))))


RUNGS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)
"""Rows of codes up to which a tiling is chosen."""
_LINES = (Line(8, 256, 4, 3), Line(4, 512, 2, 1), Line(2, 512, 4, 1), Line(4, 512, 2, 3))
"""Timed where an engine starts, and so are these, by rows of codes: with as many splits as the chip wants."""
_TRIED = {
    32: ((64, 256, 4, 5), (32, 256, 4, 5), (64, 128, 4, 5)),
    64: ((64, 128, 4, 4), (128, 128, 4, 3)),
    2048: ((128, 128, 8, 3), (64, 128, 8, 4), (64, 128, 4, 4)),
}


def rung_of(columns: int) -> int:
    """The rung of so many rows of codes; those of too many have no tiling but the default."""
    return 1 if columns == 1 else max(8, triton.next_power_of_2(columns))


def candidates(rung: int, weight: Packed, multiprocessors: int) -> tuple[Tiling | Line, ...]:
    """The default with `rung` rows of codes, and others worth trying. None needs more room than is planned for:
    programs with splits are at most twice the multiprocessors."""
    if rung == 1:
        return tuple(dict.fromkeys((line_for(weight.outputs, weight.width), *_LINES)))
    default = tiling_for(rung, weight, multiprocessors)
    found: dict[Tiling | Line, None] = {default: None}
    narrow = default.block_m if rung <= 32 else 0
    for block_n, block_k, num_warps, num_stages in _TRIED[next(most for most in _TRIED if rung <= most)]:
        for block_m in (narrow,) if narrow else {min(rung, 64): None, min(rung, 128): None}:
            tiles = triton.cdiv(rung, block_m) * triton.cdiv(weight.outputs, block_n)
            for splits in (1, 2, 4):
                sums = tiles * splits * block_n * block_m * 4
                many = tiles * splits > 2 * multiprocessors or sums > ROOM_BYTES
                if splits == 1 or not (many or splits > triton.cdiv(weight.width, block_k)):
                    found[Tiling(block_n, block_m, block_k, splits, num_warps, num_stages)] = None
    return tuple(found)


@dataclass(slots=True, frozen=True, eq=False, weakref_slot=True)
class TritonQuantizedProduct:
    """`Product` with a quantised weight."""

    weight: Packed
    bias: Tensor | None
    """[N] float32."""
    rounds: bool
    """The input to 8 bits."""
    dtype: torch.dtype
    room: Room
    rounding: Rounding
    multiprocessors: int
    choices: Choices = field(default_factory=Choices)
    facts: tuple[str | int, ...] = field(init=False)

    def __post_init__(self) -> None:
        weight, bits = self.weight, f"int4/{self.weight.group_size}" if self.weight.group_size else "int8"
        facts = (named(self.dtype), bits, 1 if self.rounds else 2, weight.outputs, weight.width)
        object.__setattr__(self, "facts", (*facts, "plain" if self.bias is None else "bias"))

    @classmethod
    def of(
        cls,
        weight: IntegerWeight,
        bias: Tensor | None,
        activations: Activations,
        dtype: torch.dtype,
        room: Room,
        rounding: Rounding,
        multiprocessors: int,
        choices: Choices,
    ) -> TritonQuantizedProduct:
        """See `Kernels.quantized_product`. Raises `KernelError` for what no kernel is made for."""
        check_activations(weight, activations)
        rounds = activations == "int8"
        if isinstance(weight, Int4Weight) and rounds:
            raise KernelError("the triton back-end multiplies weights in 4 bits by floating-point activations")
        if weight.shape[1] % 4:
            raise KernelError(f"the triton back-end takes whole words of inputs, and {weight.shape[1]} are none")
        wide = None if bias is None else bias.float()
        product = cls(Packed.of(weight), wide, rounds, dtype, room, rounding, multiprocessors, choices)
        if rounds:
            rounding.want(1, sys.maxsize)
        elif not product.unpacks(1):
            rounding.want(2, MANY_ROWS[product.weight.group_size] - 1)
        return product

    def __call__(self, x: Tensor) -> Tensor:
        rows, weight = x.shape[0], self.weight
        if rows == 0:
            return torch.empty((0, weight.outputs), dtype=self.dtype, device=x.device)
        if self.unpacks(rows):
            shape = weight.outputs, weight.width
            return multiply_unpacked(x, self.bias, self.dtype, shape, self._unpack)
        codes = self.rounding.of(x, 1 if self.rounds else 2)
        columns = codes.planes.shape[0]
        tiling = self.choices.get("quantized", self.facts, rung_of(columns))
        if tiling is None and columns == 1:
            tiling = line_for(weight.outputs, weight.width)
        return self.cut(codes, tiling or tiling_for(columns, weight, self.multiprocessors))

    def cut(self, codes: Codes, tiling: Tiling | Line) -> Tensor:
        """The product of rows that are rounded already, by a tiling of one's own."""
        if isinstance(tiling, Line):
            return multiply_row(*codes, self.weight, self.bias, self.dtype, tiling)
        return multiply(*codes, self.weight, self.bias, self.dtype, tiling, self.room)

    def trials(self, rows: int) -> Iterator[Trial]:
        """Of up to `rows` rows."""
        planes, weight = 1 if self.rounds else 2, self.weight
        for below, rung in pairwise((0, *RUNGS)):
            some = min(rung // planes, rows)
            if some * planes > below and not self.unpacks(some):
                given = partial(self._codes, some)
                family = Family("quantized", self.facts, rung)
                tried = candidates(rung, weight, self.multiprocessors)
                yield Trial(family, tried, given, self.cut, weight.values.nbytes + weight.scales.nbytes)

    def _codes(self, rows: int) -> Codes:
        x = torch.zeros((rows, self.weight.width), dtype=self.dtype, device=self.weight.values.device)
        return round_rows(x, 1 if self.rounds else 2)

    def unpacks(self, rows: int) -> bool:
        """Whether so many rows are multiplied by cuBLAS."""
        if self.rounds:
            return False
        many = rows >= MANY_ROWS[self.weight.group_size]
        return many or self.dtype != torch.bfloat16 or not self.weight.multiplies

    def wide(self, x: Tensor) -> Tensor:
        # rounded as the others are: a request must not see other logits because of who is beside it
        return self(x).float()

    def rows(self, ids: Tensor) -> Tensor:
        out = torch.empty((ids.shape[0], self.weight.width), dtype=self.dtype, device=ids.device)
        return unpack(self.weight, out, 0, ids) if ids.shape[0] else out

    def parameters(self) -> Iterator[Tensor]:
        yield self.weight.values
        yield self.weight.scales
        if self.bias is not None:
            yield self.bias

    def _unpack(self, out: Tensor, first: int) -> None:
        unpack(self.weight, out, first)


def multiply_unpacked(
    x: Tensor, bias: Tensor | None, dtype: torch.dtype, shape: tuple[int, int], fill: Callable[[Tensor, int], None]
) -> Tensor:
    """The product of x, of `dtype`, with a weight of that shape by cuBLAS. `fill(out, first)` writes its outputs
    from `first` on into `out` [n, K]."""
    outputs, width = shape
    out = torch.empty((x.shape[0], outputs), dtype=dtype, device=x.device)
    step = outputs_at_a_time(outputs, width, dtype.itemsize)
    scratch = torch.empty((step, width), dtype=dtype, device=x.device)
    for first in range(0, outputs, step):
        piece = scratch[: outputs - first]
        fill(piece, first)
        target = out[:, first : first + step]
        if bias is None:
            torch.mm(x, piece.T, out=target)
        else:
            torch.addmm(bias[first : first + step].to(dtype), x, piece.T, out=target)
    return out


def outputs_at_a_time(outputs: int, width: int, itemsize: int) -> int:
    """How many outputs of a weight are unpacked before they are multiplied."""
    most = max(256, SCRATCH_BYTES // (width * itemsize) // 256 * 256)
    return min(outputs, most)
