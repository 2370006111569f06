"""Matrix products with weights in 8 and 4 bits.

    int8, input rounded    out[m, n] = (Σ_k a[m, k] · w[n, k]) · s[m] · scales[n] + bias[n]      sums in int32
    int8, input as it is   out[m, n] = (Σ_k x[m, k] · w[n, k]) · scales[n] + bias[n]             sums in float32
    int4                   out[m, n] = Σ_k x[m, k] · v[n, k] + bias[n],  v = code · scale, in the dtype of x

`_round_rows` gives the codes a and the scale s of each row of x. With one row of them, `_one_row` multiplies four
pairs of bytes an instruction; all others go to the tensor cores in `_product`, with a tile of the weight as the
wide side: it is unpacked on its way into them, from registers, so the narrow side is as narrow as the input has
rows. A weight with few outputs has too few tiles for the chip. Then its inputs are cut into splits; partial sums
wait in `Room`, and whoever comes last to a tile adds them up, always in the same order.

Many rows of an input that is not rounded are work for cuBLAS: `unpack` writes some outputs at a time in the dtype
of x, so few that they are still in the L2 cache when they are read. What is multiplied is the same number for
number: v above, or w · scale.

A weight is written by no kernel, so its first bytes are on their way to the L2 cache before the kernel waits for
the one before it.

4 bits lie group by group: [groups, N, g / 2], where byte j of an output has code + 8 of input j of the group in
its low half, and of input g / 2 + j in its high half. A tile of a group is one dense run of bytes, and both halves
meet inputs that follow each other.

Legend: M rows of x, N outputs, K inputs, g inputs of a group, L splits.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

from quire_kernels.errors import KernelError
from quire_kernels.quantized import Activations, Int4Weight, Int8Weight, QuantizedWeight
from quire_kernels.triton.launch import dependent, fetch, wait

SCRATCH_BYTES = 32 << 20
"""Of a weight that is unpacked at a time: less than the L2 cache of a data-centre GPU."""
ROOM_BYTES = 16 << 20
"""Of partial sums, at most."""
MOST_TILES = 4096
"""That can be cut into splits: more than fill any chip are not."""
MANY_ROWS = 256
"""From so many rows on cuBLAS multiplies what is unpacked."""

_PIECE = 1 << 22
"""Numbers of a weight in 4 bits that are put in order at a time."""
_INTERPRETED: bool = knobs.runtime.interpret


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
def _nearest(x, NATIVE: tl.constexpr):
    """The whole number next to x, int32, the even one of two, for |x| < 2^22."""
    if NATIVE:
        # a product before it must be rounded by itself: no instruction of Triton's would keep the two apart
        return tl.inline_asm_elementwise(
            "cvt.rni.s32.f32 $0, $1;", "=r,f", [x], dtype=tl.int32, is_pure=True, pack=1
        )
    return ((x + 12582912.0) - 12582912.0).to(tl.int32)


@triton.jit
def _dot4(w, x, acc, NATIVE: tl.constexpr):
    """acc + the sum of the products of the four signed bytes of each word."""
    if NATIVE:
        return tl.inline_asm_elementwise(
            "dp4a.s32.s32 $0, $1, $2, $3;", "=r,r,r,r", [w, x, acc], dtype=tl.int32, is_pure=True, pack=1
        )
    for place in tl.static_range(0, 32, 8):
        acc += ((w << (24 - place)) >> 24) * ((x << (24 - place)) >> 24)
    return acc


@triton.jit
def _numbers(pairs, scale, dtype: tl.constexpr, NATIVE: tl.constexpr):
    """Of bytes [N, g / 2] with two codes + 8 each, and of `scale` [N, 1]: code · scale of the low and of the high
    halves, rounded once."""
    if NATIVE:
        # 128 + a whole number below 128 is a bfloat16 whose last bits are that number
        low, high = tl.inline_asm_elementwise(
            """
            {
            .reg .b32 a, b, c, d, one, less, zero;
            mov.b32 one, 0x3F803F80;
            mov.b32 less, 0xC308C308;
            mov.b32 zero, 0x80008000;
            prmt.b32 a, $4, 0, 0x4140;
            prmt.b32 b, $4, 0, 0x4342;
            shr.b32 c, a, 4;
            shr.b32 d, b, 4;
            lop3.b32 a, a, 0x000F000F, 0x43004300, 0xEA;
            lop3.b32 b, b, 0x000F000F, 0x43004300, 0xEA;
            lop3.b32 c, c, 0x000F000F, 0x43004300, 0xEA;
            lop3.b32 d, d, 0x000F000F, 0x43004300, 0xEA;
            fma.rn.bf16x2 a, a, one, less;
            fma.rn.bf16x2 b, b, one, less;
            fma.rn.bf16x2 c, c, one, less;
            fma.rn.bf16x2 d, d, one, less;
            fma.rn.bf16x2 a, a, $5, zero;
            fma.rn.bf16x2 b, b, $6, zero;
            fma.rn.bf16x2 c, c, $5, zero;
            fma.rn.bf16x2 d, d, $6, zero;
            mov.b32 $0, a;
            mov.b32 $1, b;
            mov.b32 $2, c;
            mov.b32 $3, d;
            }
            """,
            "=r,=r,=r,=r,r,r,r",
            [pairs, scale],
            dtype=(tl.bfloat16, tl.bfloat16),
            is_pure=True,
            pack=4,
        )
        return low, high
    wide = scale.to(tl.float32)
    low = (((pairs & 15).to(tl.float32) - 8.0) * wide).to(dtype)
    high = (((pairs >> 4).to(tl.float32) - 8.0) * wide).to(dtype)
    return low, high


@triton.jit
def _sum_of_splits(acc, parts, arrivals, tile, splits, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr):
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
def _round_rows(
    codes, scales, x, width, stride, BLOCK: tl.constexpr, NATIVE: tl.constexpr, DEPENDENT: tl.constexpr
):
    row, ks = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    inside = ks < width
    wait(DEPENDENT)
    number = tl.load(x + row * stride + ks, mask=inside, other=0.0).to(tl.float32)
    size = tl.abs(number)
    finite = size < float("inf")
    most = tl.max(tl.where(finite, size, 0.0), 0)
    broken = tl.max(tl.where(finite, 0, 1), 0) > 0
    usable = (most >= 1e-30) & (broken == 0)
    inverse = tl.where(usable, tl.div_rn(127.0, tl.where(usable, most, 1.0)), 0.0)
    scaled = tl.where(usable, tl.where(finite, number, 0.0) * inverse, 0.0)
    code = tl.minimum(tl.maximum(_nearest(scaled, NATIVE), -127), 127)
    tl.store(codes + row * width + ks, code.to(tl.int8), mask=inside)
    scale = tl.where(usable, tl.div_rn(most, 127.0), tl.where(broken, float("nan"), 0.0))
    tl.store(scales + row, scale)


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
    NATIVE: tl.constexpr,
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
        acc = _dot4(w, tl.broadcast_to(number[None, :], [BLOCK_N, BLOCK_W]), acc, NATIVE)
        w = coming
    total = tl.sum(acc, 1).to(tl.float32) * tl.load(x_scales) * scale
    if BIAS:
        total += tl.load(bias + first + rows, mask=inside, other=0.0)
    tl.store(out + first + rows, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _product(
    out,
    x,
    x_scales,
    weight,
    scales,
    bias,
    parts,
    arrivals,
    tokens,
    outputs,
    width,
    x_stride,
    splits,
    GROUP: tl.constexpr,
    ROUNDED: tl.constexpr,
    BIAS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT: tl.constexpr,
    EVEN: tl.constexpr,
    AHEAD: tl.constexpr,
    NATIVE: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """`GROUP` 0: 8 bits. `SPLIT`: there are several splits. `EVEN`: the width is a multiple of `BLOCK_K`. `AHEAD`:
    tiles that are asked for before the wait."""
    tile = tl.program_id(0)
    # tiles of the same few outputs run side by side, for at most 16 tiles of rows: both sides come from L2
    down, across = tl.cdiv(tokens, BLOCK_M), tl.cdiv(outputs, BLOCK_N)
    band = tile // (16 * across) * 16
    high = tl.minimum(down - band, 16)
    within = tile - band * across
    first, top = within // high * BLOCK_N, (band + within % high) * BLOCK_M
    rows, columns, ks = tl.arange(0, BLOCK_N), top + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_K)
    inside, real = first + rows < outputs, columns < tokens
    each = tl.cdiv(tl.cdiv(width, BLOCK_K), splits) * BLOCK_K
    begin = tl.program_id(1) * each
    end = tl.minimum(begin + each, width)
    numbers = x + (columns.to(tl.int64) * x_stride)[None, :]
    if GROUP == 0:
        here = weight + first.to(tl.int64) * width + (rows * width)[:, None]
        if DEPENDENT and AHEAD > 0:
            lines = begin + tl.arange(0, (AHEAD * BLOCK_K + 127) // 128) * 128
            fetch(here + tl.minimum(lines, width - 1)[None, :])
    else:
        tl.static_assert(BLOCK_K % GROUP == 0)
        HALF: tl.constexpr = GROUP // 2
        pairs = tl.arange(0, HALF)
        here = weight + first.to(tl.int64) * HALF + (rows * HALF)[:, None] + pairs[None, :]
        beside = scales + first + rows
        group_bytes = tl.cast(outputs, tl.int64) * HALF
        if DEPENDENT and AHEAD > 0:
            groups = begin // GROUP + tl.arange(0, AHEAD * BLOCK_K // GROUP)
            groups = tl.minimum(groups, width // GROUP - 1).to(tl.int64)
            lines = first * HALF + tl.arange(0, (BLOCK_N * HALF + 127) // 128) * 128
            there = tl.minimum(lines, outputs * HALF - 1)
            fetch(weight + (groups * group_bytes)[:, None] + there[None, :])
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.int32 if ROUNDED else tl.float32)
    wait(DEPENDENT)
    for k in tl.range(begin, end, BLOCK_K):
        if GROUP == 0:
            if EVEN:
                w = tl.load(here + (k + ks)[None, :], mask=inside[:, None], other=0)
                number = tl.load(numbers + (k + ks)[:, None], mask=real[None, :], other=0)
            else:
                there = k + ks < end
                w = tl.load(here + (k + ks)[None, :], mask=inside[:, None] & there[None, :], other=0)
                number = tl.load(numbers + (k + ks)[:, None], mask=there[:, None] & real[None, :], other=0)
            if ROUNDED:
                acc = tl.dot(w, number, acc, out_dtype=tl.int32)
            else:
                acc = tl.dot(w.to(number.dtype), number, acc, input_precision="ieee")
        else:
            for part in tl.static_range(BLOCK_K // GROUP):
                start = k + part * GROUP
                group = tl.cast(start // GROUP, tl.int64)
                mine, found = inside, real
                if not EVEN:
                    mine, found = inside & (start + 0 * rows < end), real & (start + 0 * columns < end)
                w = tl.load(here + group * group_bytes, mask=mine[:, None], other=0)
                scale = tl.load(beside + group * outputs, mask=mine, other=0.0)
                front = tl.load(numbers + (start + pairs)[:, None], mask=found[None, :], other=0.0)
                back = tl.load(numbers + (start + HALF + pairs)[:, None], mask=found[None, :], other=0.0)
                low, upper = _numbers(w, scale[:, None], front.dtype, NATIVE)
                acc = tl.dot(low, front, acc, input_precision="ieee")
                acc = tl.dot(upper, back, acc, input_precision="ieee")
    done = True
    if SPLIT:
        acc, done = _sum_of_splits(acc, parts, arrivals, tile, splits, BLOCK_N, BLOCK_M)
    if done:
        result = acc.to(tl.float32)
        if ROUNDED:
            result = result * tl.load(x_scales + columns, mask=real, other=0.0)[None, :]
        if GROUP == 0:
            result = result * tl.load(scales + first + rows, mask=inside, other=0.0)[:, None]
        if BIAS:
            result += tl.load(bias + first + rows, mask=inside, other=0.0)[:, None]
        places = out + (columns.to(tl.int64) * outputs)[None, :] + (first + rows)[:, None]
        tl.store(places, result.to(out.dtype.element_ty), mask=inside[:, None] & real[None, :])


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
        HALF: tl.constexpr = GROUP // 2
        group = tl.program_id(1).to(tl.int64)
        both = tl.arange(0, HALF)[None, :]
        pairs = tl.load(weight + (group * outputs + which)[:, None] * HALF + both, mask=inside[:, None], other=0)
        scale = tl.load(scales + group * outputs + which, mask=inside, other=0.0)[:, None]
        low, high = _numbers(pairs, scale, out.dtype.element_ty, False)
        tl.store(place + group * GROUP + both, low, mask=inside[:, None])
        tl.store(place + group * GROUP + HALF + both, high, mask=inside[:, None])


# ── launchers ─────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(slots=True, frozen=True)
class Packed:
    """A weight in the order that kernels read it in."""

    values: Tensor
    """[N, K] int8; of 4 bits [K / g, N, g / 2] uint8."""
    scales: Tensor
    """[N] float32; of 4 bits [K / g, N] bfloat16."""
    group_size: int
    """0 in 8 bits."""
    outputs: int
    width: int

    @classmethod
    def of(cls, weight: QuantizedWeight) -> Packed:
        """Takes over `weight`. 4 bits are copied: for that long they are there twice."""
        outputs, width = weight.shape
        if isinstance(weight, Int8Weight):
            return cls(weight.values.contiguous(), weight.scales.contiguous(), 0, outputs, width)
        size = weight.group_size
        groups = width // size
        values = torch.empty((groups, outputs, size // 2), dtype=torch.uint8, device=weight.values.device)
        step = max(1, _PIECE // width)
        for start in range(0, outputs, step):
            # pairs of neighbours become pairs of both halves of a group
            rows = weight.values[start : start + step].reshape(-1, groups, size // 4, 2)
            codes = torch.stack((rows & 15, rows >> 4), -1).view(-1, groups, 2, size // 2)
            values[:, start : start + step] = (codes[:, :, 0] | codes[:, :, 1] << 4).transpose(0, 1)
        return cls(values, weight.scales.T.contiguous(), size, outputs, width)


class Room:
    """Where partial sums of a product wait for each other. One product at a time uses it."""

    def __init__(self, device: torch.device) -> None:
        self.arrivals = torch.zeros(MOST_TILES, dtype=torch.int32, device=device)
        """How many splits of a tile are there; 0 between products."""


def round_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """`x` [M, K], each row dense, as [M, K] int8 and scales [M] float32: `reference.bytes.quantize_rows`."""
    rows, width = x.shape
    codes = torch.empty((rows, width), dtype=torch.int8, device=x.device)
    scales = torch.empty(rows, dtype=torch.float32, device=x.device)
    block = triton.next_power_of_2(width)
    _round_rows[(rows,)](
        codes, scales, x, width, x.stride(0), BLOCK=block, NATIVE=not _INTERPRETED,
        num_warps=min(16, max(1, block // 256)), **dependent(),
    )  # fmt: skip
    return codes, scales


def multiply_row(
    codes: Tensor, x_scales: Tensor, weight: Packed, bias: Tensor | None, dtype: torch.dtype, line: Line
) -> Tensor:
    """The product of one rounded row [1, K], K a multiple of 4, with a weight in 8 bits. [1, N] in `dtype`."""
    out = torch.empty((1, weight.outputs), dtype=dtype, device=codes.device)
    _one_row[(triton.cdiv(weight.outputs, line.block_n),)](
        out, codes.view(torch.int32), x_scales, weight.values.view(torch.int32), weight.scales,
        weight.scales if bias is None else bias, weight.outputs, weight.width // 4, BIAS=bias is not None,
        BLOCK_N=line.block_n, BLOCK_W=line.block_w, STAGES=line.num_stages, NATIVE=not _INTERPRETED,
        num_warps=line.num_warps, **dependent(),
    )  # fmt: skip
    return out


def multiply(
    x: Tensor,
    x_scales: Tensor | None,
    weight: Packed,
    bias: Tensor | None,
    dtype: torch.dtype,
    tiling: Tiling,
    room: Room,
) -> Tensor:
    """The product of rows `x` [M, K], each dense, in `dtype`: codes if they have scales [M], else numbers of that
    dtype. [M, N]."""
    (rows, _), splits = x.shape, tiling.splits
    out = torch.empty((rows, weight.outputs), dtype=dtype, device=x.device)
    tiles = triton.cdiv(rows, tiling.block_m) * triton.cdiv(weight.outputs, tiling.block_n)
    parts = out
    if splits > 1:
        sums = torch.float32 if x_scales is None else torch.int32
        size = tiles * splits * tiling.block_n * tiling.block_m
        parts = torch.empty(size, dtype=sums, device=x.device)
    _product[(tiles, splits)](
        out, x, weight.scales if x_scales is None else x_scales, weight.values, weight.scales,
        weight.scales if bias is None else bias, parts, room.arrivals, rows, weight.outputs, weight.width,
        x.stride(0), splits, GROUP=weight.group_size, ROUNDED=x_scales is not None, BIAS=bias is not None,
        BLOCK_N=tiling.block_n, BLOCK_M=tiling.block_m, BLOCK_K=tiling.block_k, SPLIT=splits > 1,
        EVEN=weight.width % tiling.block_k == 0, AHEAD=2,
        NATIVE=not _INTERPRETED and (weight.group_size == 0 or dtype == torch.bfloat16),
        num_warps=tiling.num_warps, num_stages=tiling.num_stages, **dependent(),
    )  # fmt: skip
    return out


def unpack(weight: Packed, out: Tensor, first: int, ids: Tensor | None = None) -> Tensor:
    """Fills `out` [n, K] with the numbers of the outputs `ids` [n] int64, or of those from `first` on."""
    rows, size = out.shape[0], weight.group_size
    block_n, block_k = (4, 1024) if size == 0 else (64, size)
    grid = (triton.cdiv(rows, block_n), triton.cdiv(weight.width, block_k))
    _unpack[grid](
        out, weight.values, weight.scales, weight.scales if ids is None else ids, first, rows, weight.outputs,
        weight.width, GROUP=size, BLOCK_N=block_n, BLOCK_K=block_k, BY_ID=ids is not None, num_warps=4,
        **dependent(),
    )  # fmt: skip
    return out


def line_for(outputs: int, width: int) -> Line:
    """How `_one_row` is cut."""
    if width >= 8192:
        return Line(4, 512, 4, 1)
    return Line(2, 512, 4, 1) if outputs < 8192 else Line(4, 512, 4, 1)


def tiling_for(rows: int, weight: Packed, rounded: bool, multiprocessors: int) -> Tiling:
    """How `_product` is cut: as narrow as there are rows, and with as many splits as give every multiprocessor
    something to do."""
    block_m = min(max(triton.next_power_of_2(rows), 16), 256 if rounded else 128)
    if rows > 128:
        block_n, block_k, num_warps, num_stages = 128, 128, 8, 4
        if weight.group_size:
            num_stages = 3
    elif rows > 32:
        block_n, block_k, num_warps, num_stages = 128 if rows > 64 else 64, 128, 4, 4
    else:
        block_n, block_k, num_warps, num_stages = 64, 256, 4, 4
    if weight.group_size:
        block_k = 128
    tiles = triton.cdiv(rows, block_m) * triton.cdiv(weight.outputs, block_n)
    steps = triton.cdiv(weight.width, block_k)
    splits = 1
    while (
        tiles * splits < multiprocessors
        and 2 * splits <= 8
        and steps >= 8 * splits
        and tiles * 2 * splits * block_n * block_m * 4 <= ROOM_BYTES
    ):
        splits *= 2
    return Tiling(block_n, block_m, block_k, splits, num_warps, num_stages)


@dataclass(slots=True, frozen=True)
class TritonQuantizedProduct:
    """`Product` with a quantised weight."""

    weight: Packed
    bias: Tensor | None
    """[N] float32."""
    rounds: bool
    """The input to 8 bits."""
    dtype: torch.dtype
    room: Room
    multiprocessors: int

    @classmethod
    def of(
        cls,
        weight: QuantizedWeight,
        bias: Tensor | None,
        activations: Activations,
        dtype: torch.dtype,
        room: Room,
        multiprocessors: int,
    ) -> TritonQuantizedProduct:
        """See `Kernels.quantized_product`. Raises `KernelError` for what no kernel is made for."""
        rounds = activations == "int8"
        if isinstance(weight, Int4Weight) and rounds:
            raise KernelError("the triton back-end multiplies weights in 4 bits by floating-point activations")
        if weight.shape[1] % 4:
            raise KernelError(f"the triton back-end takes whole words of inputs, and {weight.shape[1]} are none")
        wide = None if bias is None else bias.float()
        return cls(Packed.of(weight), wide, rounds, dtype, room, multiprocessors)

    def __call__(self, x: Tensor) -> Tensor:
        rows, weight = x.shape[0], self.weight
        if rows == 0:
            return torch.empty((0, weight.outputs), dtype=self.dtype, device=x.device)
        if not self.rounds and rows >= MANY_ROWS:
            return self._unpacked(x)
        if not self.rounds:
            tiling = tiling_for(rows, weight, False, self.multiprocessors)
            return multiply(x, None, weight, self.bias, self.dtype, tiling, self.room)
        codes, scales = round_rows(x)
        if rows == 1:
            line = line_for(weight.outputs, weight.width)
            return multiply_row(codes, scales, weight, self.bias, self.dtype, line)
        tiling = tiling_for(rows, weight, True, self.multiprocessors)
        return multiply(codes, scales, weight, self.bias, self.dtype, tiling, self.room)

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

    def _unpacked(self, x: Tensor) -> Tensor:
        outputs, width = self.weight.outputs, self.weight.width
        out = torch.empty((x.shape[0], outputs), dtype=self.dtype, device=x.device)
        step = outputs_at_a_time(outputs, width, self.dtype.itemsize)
        scratch = torch.empty((step, width), dtype=self.dtype, device=x.device)
        for first in range(0, outputs, step):
            piece = scratch[: outputs - first]
            unpack(self.weight, piece, first)
            target = out[:, first : first + step]
            if self.bias is None:
                torch.mm(x, piece.T, out=target)
            else:
                torch.addmm(self.bias[first : first + step].to(self.dtype), x, piece.T, out=target)
        return out


def outputs_at_a_time(outputs: int, width: int, itemsize: int) -> int:
    """How many outputs of a weight are unpacked before they are multiplied."""
    most = max(256, SCRATCH_BYTES // (width * itemsize) // 256 * 256)
    return min(outputs, most)
