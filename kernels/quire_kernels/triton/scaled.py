"""Matrix products with weights in fp8, whose blocks have scales.

    out[m, n] = Σ_groups (Σ_k in group a[m, k] · w[n, k]) · s[m, group] · scales[n / b, group] + bias[n]

A group is 128 inputs. Where the input is rounded, a is a code of fp8 (`rounding`), and from sm_89 on the tensor
cores multiply the two as they are; before that both are widened to float16, which holds every code. Where it is
not, a is the number as it is, s is 1, and codes of the weight are widened to its 16 bits in registers, exactly.
Sums of a group start at zero and are scaled and added up in float32: tensor cores of Hopper keep few bits of a
long sum in fp8.

As in `quantized` a tile of the weight is the wide side and as many rows the narrow one as there are, a weight
with few outputs has its inputs cut into splits, and the first bytes of a weight are on their way before the
kernel waits. Rounded inputs are multiplied so whatever their number is: a token's numbers are rounded alike in
any company. Many rows of an input that is not rounded, and any in float32, are work for cuBLAS, with the weight
unpacked some outputs at a time.

Legend: M rows of x, N outputs, K inputs, b outputs of a block.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

from quire_kernels.quantized import FP8, FP8_BLOCK, Activations, Fp8Weight
from quire_kernels.reference.product import check_activations
from quire_kernels.triton.launch import dependent, fetch, wait
from quire_kernels.triton.quantized import ROOM_BYTES, Room, Tiling, multiply_unpacked, sum_of_splits
from quire_kernels.triton.rounding import FLOATS, Codes, Rounding, round_rows
from quire_kernels.tuning import Choices, Family, Trial, named

MANY_ROWS = 256
"""From so many rows on cuBLAS multiplies what is unpacked, unless they are rounded."""

_BLOCK = tl.constexpr(FP8_BLOCK)
_ADA = 89


# ── inside kernels ────────────────────────────────────────────────────────────────────────────────────────


@triton.jit
def _half(code):
    """Of the bits of codes, uint8: 1/256 of what they stand for, float16. Its exponent has room for all of them,
    and its subnormal numbers for theirs."""
    wide = code.to(tl.uint16)
    return (((wide & 128) << 8) | ((wide & 127) << 7)).to(tl.float16, bitcast=True)


# ── kernels ───────────────────────────────────────────────────────────────────────────────────────────────


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
    rows,
    outputs,
    width,
    stride,
    splits,
    SHARED: tl.constexpr,
    ROUNDED: tl.constexpr,
    NATIVE: tl.constexpr,
    BIAS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    SPLIT: tl.constexpr,
    EVEN: tl.constexpr,
    AHEAD: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """`ROUNDED`: x has codes, `NATIVE`: the chip multiplies them. `stride`: of the rows of x. `EVEN`: the width is
    a multiple of a group. `AHEAD`: groups that are asked for before the wait."""
    tile = tl.program_id(0)
    # tiles of the same few outputs run side by side, for at most 16 tiles of rows: both sides come from L2
    down, across = tl.cdiv(rows, BLOCK_M), tl.cdiv(outputs, BLOCK_N)
    band = tile // (16 * across) * 16
    high = tl.minimum(down - band, 16)
    within = tile - band * across
    first, top = within // high * BLOCK_N, (band + within % high) * BLOCK_M
    ns, columns, ks = tl.arange(0, BLOCK_N), top + tl.arange(0, BLOCK_M), tl.arange(0, _BLOCK)
    inside, real = first + ns < outputs, columns < rows
    groups = tl.cdiv(width, _BLOCK)
    each = tl.cdiv(groups, splits)
    begin = tl.program_id(1) * each
    end = tl.minimum(begin + each, groups)
    here = weight + first.to(tl.int64) * width + (ns * width)[:, None]
    numbers = x + (columns.to(tl.int64) * stride)[None, :]
    # one scale for a whole tile, where a tile lies within a block
    beside = scales + (first // SHARED) * groups
    each_beside = scales + ((first + ns) // SHARED) * groups
    x_beside = x_scales + columns.to(tl.int64) * groups
    if DEPENDENT and AHEAD > 0:
        lines = begin * _BLOCK + tl.arange(0, AHEAD) * _BLOCK
        # outputs behind the last one are none, and memory behind the weight may be nobody's
        near = weight + tl.minimum(first + ns, outputs - 1).to(tl.int64)[:, None] * width
        fetch(near + tl.minimum(lines, width - 1)[None, :])
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    # scales are asked for a group ahead, for nothing else of the loop would hide how long they take
    next_one = tl.minimum(begin, groups - 1)
    if SHARED % BLOCK_N == 0:
        scale = tl.load(beside + next_one)
    else:
        scale = tl.load(each_beside + next_one, mask=inside, other=0.0)
    wait(DEPENDENT)
    if ROUNDED:
        x_scale = tl.load(x_beside + next_one, mask=real, other=0.0)
    for group in tl.range(begin, end):
        k = group * _BLOCK
        next_one = tl.minimum(group + 1, groups - 1)
        if SHARED % BLOCK_N == 0:
            coming = tl.load(beside + next_one)
        else:
            coming = tl.load(each_beside + next_one, mask=inside, other=0.0)
        if ROUNDED:
            x_coming = tl.load(x_beside + next_one, mask=real, other=0.0)
        if EVEN:
            w = tl.load(here + (k + ks)[None, :], mask=inside[:, None], other=0.0)
            a = tl.load(numbers + (k + ks)[:, None], mask=real[None, :], other=0.0)
        else:
            there = k + ks < width
            w = tl.load(here + (k + ks)[None, :], mask=inside[:, None] & there[None, :], other=0.0)
            a = tl.load(numbers + (k + ks)[:, None], mask=there[:, None] & real[None, :], other=0.0)
        if ROUNDED and NATIVE:
            sums = tl.dot(w, a)
        elif ROUNDED:
            sums = tl.dot(_half(w), _half(a)) * 65536.0
        else:
            if NATIVE:
                sums = tl.dot(w.to(x.dtype.element_ty), a)
            else:
                sums = tl.dot(_half(w).to(x.dtype.element_ty), a) * 256.0
        if ROUNDED:
            sums *= x_scale[None, :]
            x_scale = x_coming
        if SHARED % BLOCK_N == 0:
            acc += sums * scale
        else:
            acc += sums * scale[:, None]
        scale = coming
    done = True
    if SPLIT:
        acc, done = sum_of_splits(acc, parts, arrivals, tile, splits, BLOCK_N, BLOCK_M)
    if done:
        if BIAS:
            acc += tl.load(bias + first + ns, mask=inside, other=0.0)[:, None]
        places = out + (columns.to(tl.int64) * outputs)[None, :] + (first + ns)[:, None]
        tl.store(places, acc.to(out.dtype.element_ty), mask=inside[:, None] & real[None, :])


@triton.jit
def _unpack(
    out,
    weight,
    scales,
    ids,
    first,
    rows,
    width,
    SHARED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BY_ID: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """What `rows` outputs, those of `ids` or from `first` on, stand for, in the dtype of `out`. A program has some
    of them, and one group of inputs."""
    here = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = here < rows
    wait(DEPENDENT)  # what was in `out` before may still be read
    which = (first + here).to(tl.int64)
    if BY_ID:
        which = tl.load(ids + here, mask=inside, other=0)
    group = tl.program_id(1)
    ks = group * _BLOCK + tl.arange(0, _BLOCK)
    there = inside[:, None] & (ks < width)[None, :]
    code = tl.load(weight + which[:, None] * width + ks[None, :], mask=there, other=0)
    scale = tl.load(scales + which // SHARED * tl.cdiv(width, _BLOCK) + group, mask=inside, other=0.0)
    # first the number itself, which is exact: the scale may be a very small one
    number = (_half(code).to(tl.float32) * 256.0) * scale[:, None]
    tl.store(out + here.to(tl.int64)[:, None] * width + ks[None, :], number.to(out.dtype.element_ty), mask=there)


# ── launchers ─────────────────────────────────────────────────────────────────────────────────────────────


@functools.cache
def native() -> bool:
    """Whether the chip of this process multiplies fp8. The interpreter does, too, widening both sides itself."""
    return knobs.runtime.interpret or bool(triton.runtime.driver.active.get_current_target().arch >= _ADA)


def multiply(
    x: Tensor | Codes,
    weight: Fp8Weight,
    bias: Tensor | None,
    dtype: torch.dtype,
    tiling: Tiling,
    room: Room,
    *,
    by_chip: bool,
) -> Tensor:
    """The product of M rows, as codes of fp8 or in a format of 16 bits, with each row dense. [M, N] in `dtype`.

    `by_chip` is as of `native`.
    """
    (numbers, x_scales), rounded = (x, True) if isinstance(x, Codes) else ((x, weight.scales), False)
    values = weight.values
    if rounded:
        numbers = numbers.view(torch.uint8)
    if by_chip:
        values = values.view(FP8)
        numbers = numbers.view(FP8) if rounded else numbers
    (rows, width), outputs, splits = numbers.shape, values.shape[0], tiling.splits
    out = torch.empty((rows, outputs), dtype=dtype, device=numbers.device)
    tiles = triton.cdiv(rows, tiling.block_m) * triton.cdiv(outputs, tiling.block_n)
    parts = out
    if splits > 1:
        size = tiles * splits * tiling.block_n * tiling.block_m
        parts = torch.empty(size, dtype=torch.float32, device=numbers.device)
    _product[(tiles, splits)](
        out, numbers, x_scales, values, weight.scales, weight.scales if bias is None else bias, parts,
        room.arrivals, rows, outputs, width, numbers.stride(0), splits, SHARED=weight.shared, ROUNDED=rounded,
        NATIVE=by_chip, BIAS=bias is not None, BLOCK_N=tiling.block_n, BLOCK_M=tiling.block_m, SPLIT=splits > 1,
        EVEN=width % FP8_BLOCK == 0, AHEAD=2, num_warps=tiling.num_warps, num_stages=tiling.num_stages,
        **dependent(),
    )  # fmt: skip
    return out


def unpack(weight: Fp8Weight, out: Tensor, first: int, ids: Tensor | None = None) -> Tensor:
    """Fills `out` [n, K] with the numbers of the outputs `ids` [n] int64, or of those from `first` on."""
    (rows, width), block_n = out.shape, 32
    _unpack[(triton.cdiv(rows, block_n), triton.cdiv(width, FP8_BLOCK))](
        out, weight.values, weight.scales, weight.scales if ids is None else ids, first, rows, width,
        SHARED=weight.shared, BLOCK_N=block_n, BY_ID=ids is not None, num_warps=4, **dependent(),
    )  # fmt: skip
    return out


def tiling_for(rows: int, outputs: int, width: int, multiprocessors: int, *, rounded: bool) -> Tiling:
    """How `_product` is cut for so many rows: as narrow as there are rows. Where tiles are fewer than
    multiprocessors they are narrower still, and long inputs are split. Rows that are not rounded take twice the
    room, and no tiling more than the 96 KiB that small chips have. By what was fastest for weights in 8 bits; not
    yet measured for these."""

    def tiles(block_n: int, block_m: int) -> int:
        return -(-rows // block_m) * -(-outputs // block_n)

    if rows <= 32:
        block_m = 16 if rows <= 16 else 32
        few = tiles(64, block_m) < multiprocessors
        found = Tiling(64, block_m, FP8_BLOCK, (4 if width >= 8192 else 2) if few else 1, 4, 5)
    elif rows <= 64:
        found = Tiling(64, 64, FP8_BLOCK, 2 if tiles(64, 64) < multiprocessors else 1, 4, 4)
    elif tiles(128, 128) >= multiprocessors:
        found = Tiling(128, 128 if rounded else 64, FP8_BLOCK, 1, 8, 3)
    else:
        found = Tiling(64, 64, FP8_BLOCK, 2 if tiles(64, 64) < multiprocessors else 1, 4, 4)
    most = ROOM_BYTES // (tiles(found.block_n, found.block_m) * found.block_n * found.block_m * 4)
    return found._replace(splits=max(1, min(found.splits, most, triton.cdiv(width, FP8_BLOCK))))


RUNGS = (16, 32, 64, 128, 256, 512, 1024, 2048)
"""Rows up to which a tiling is chosen."""
_TRIED = {32: ((64, 4, 5), (32, 4, 5), (128, 4, 4)), 2048: ((64, 4, 4), (128, 4, 3), (128, 8, 3))}
"""Outputs, warps and stages of tilings that are timed where an engine starts, by rows."""


def candidates(rung: int, outputs: int, width: int, multiprocessors: int, *, rounded: bool) -> tuple[Tiling, ...]:
    """The default with `rung` rows, and others worth trying. None needs more room than is planned for: programs
    with splits are at most twice the multiprocessors."""
    found = {tiling_for(rung, outputs, width, multiprocessors, rounded=rounded): None}
    for block_n, num_warps, num_stages in _TRIED[next(most for most in _TRIED if rung <= most)]:
        for block_m in sorted({min(rung, 64), min(rung, 128 if rounded else 64)}):
            tiles = triton.cdiv(rung, block_m) * triton.cdiv(outputs, block_n)
            for splits in (1, 2, 4):
                many = tiles * splits > 2 * multiprocessors or tiles * splits * block_n * block_m * 4 > ROOM_BYTES
                if splits == 1 or not (many or splits > triton.cdiv(width, FP8_BLOCK)):
                    found[Tiling(block_n, block_m, FP8_BLOCK, splits, num_warps, num_stages)] = None
    return tuple(found)


@dataclass(slots=True, frozen=True, eq=False, weakref_slot=True)
class TritonScaledProduct:
    """`Product` with a weight in fp8."""

    weight: Fp8Weight
    bias: Tensor | None
    """[N] float32."""
    rounds: bool
    """The input to fp8."""
    dtype: torch.dtype
    room: Room
    rounding: Rounding
    multiprocessors: int
    choices: Choices = field(default_factory=Choices)
    facts: tuple[str | int, ...] = field(init=False)

    def __post_init__(self) -> None:
        (outputs, width), met = self.weight.shape, "fp8" if self.rounds else named(self.dtype)
        kinds = self.weight.shared, met, "plain" if self.bias is None else "bias"
        object.__setattr__(self, "facts", (named(self.dtype), outputs, width, *kinds))

    @classmethod
    def of(
        cls,
        weight: Fp8Weight,
        bias: Tensor | None,
        activations: Activations,
        dtype: torch.dtype,
        room: Room,
        rounding: Rounding,
        multiprocessors: int,
        choices: Choices,
    ) -> TritonScaledProduct:
        """See `Kernels.quantized_product`."""
        check_activations(weight, activations)
        rounds, wide = activations == "fp8", None if bias is None else bias.float()
        if rounds:
            rounding.want(FLOATS, sys.maxsize)
        return cls(weight, wide, rounds, dtype, room, rounding, multiprocessors, choices)

    def __call__(self, x: Tensor) -> Tensor:
        rows, (outputs, width) = x.shape[0], self.weight.shape
        if rows == 0:
            return torch.empty((0, outputs), dtype=self.dtype, device=x.device)
        if self.unpacks(rows):
            return multiply_unpacked(x, self.bias, self.dtype, self.weight.shape, self._unpack)
        given = self.rounding.of(x, FLOATS) if self.rounds else x
        tiling = self.choices.get("scaled", self.facts, max(16, triton.next_power_of_2(rows)))
        default = partial(tiling_for, rows, outputs, width, self.multiprocessors, rounded=self.rounds)
        return self.cut(given, tiling or default())

    def cut(self, x: Tensor | Codes, tiling: Tiling) -> Tensor:
        """The product of rows that are rounded already, if they are, by a tiling of one's own."""
        return multiply(x, self.weight, self.bias, self.dtype, tiling, self.room, by_chip=native())

    def trials(self, rows: int) -> Iterator[Trial]:
        """Of up to `rows` rows."""
        outputs, width = self.weight.shape
        nbytes = self.weight.values.nbytes + self.weight.scales.nbytes
        for below, rung in pairwise((0, *RUNGS)):
            some = min(rung, rows)
            if below < some and not self.unpacks(some):
                family, given = Family("scaled", self.facts, rung), partial(self._given, some)
                tried = candidates(rung, outputs, width, self.multiprocessors, rounded=self.rounds)
                yield Trial(family, tried, given, self.cut, nbytes)

    def _given(self, rows: int) -> Tensor | Codes:
        x = torch.zeros((rows, self.weight.shape[1]), dtype=self.dtype, device=self.weight.values.device)
        return round_rows(x, FLOATS) if self.rounds else x

    def unpacks(self, rows: int) -> bool:
        """Whether so many rows are multiplied by cuBLAS."""
        return not self.rounds and (rows >= MANY_ROWS or self.dtype == torch.float32)

    def wide(self, x: Tensor) -> Tensor:
        # rounded as the others are: a request must not see other logits because of who is beside it
        return self(x).float()

    def rows(self, ids: Tensor) -> Tensor:
        out = torch.empty((ids.shape[0], self.weight.shape[1]), dtype=self.dtype, device=ids.device)
        return unpack(self.weight, out, 0, ids) if ids.shape[0] else out

    def parameters(self) -> Iterator[Tensor]:
        yield self.weight.values
        yield self.weight.scales
        if self.bias is not None:
            yield self.bias

    def _unpack(self, out: Tensor, first: int) -> None:
        unpack(self.weight, out, first)
