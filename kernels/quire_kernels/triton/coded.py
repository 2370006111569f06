"""Weights of experts in few bits, whose codes become numbers of 16 bits in registers, inside `experts`.

    int8     out[n] = (Σ_k x[k] · code[n, k]) · scales[n]
    int4     out[n] = Σ_groups (Σ_k in group x[k] · code[n, k]) · scales[group, n]
    mxfp4    as int4 in groups of 32, whose scales are powers of two
    fp8      as int4 in groups of 128, whose scales are those of blocks of b outputs

An input is taken as it is, and each code is a number of its format exactly, so a weight stands for what it stands
for on a CPU. Sums are float32; those of a group start at zero, and are scaled and added up in order.

A step of few tokens waits for bytes, and a thread has time for three instructions or so a code of 4 bits. So codes
are never moved one by one: what is loaded, and laid out for the tensor cores, are words of 16 bits, each with the
codes of inputs that lie a part of a unit apart, and a word becomes several numbers where it arrives
(`bytes.halves_of`, which keys and values in fp8 have, too). A unit is 128 inputs of an output; what is left is a
shorter one, and of 4 bits one of 64 and one of 32, so that no part of a unit reaches across groups.

    8 bits    word j of a unit of 2 · h inputs    inputs j, h + j                       lower byte first
    4 bits    word j of a unit of 4 · h inputs    inputs j, h + j, 2 · h + j, 3 · h + j    lowest bits first

A bfloat16 between 128 and 256 has whole numbers for its last seven bits: bits put there, less what they are above
the code, are the number. float16 is the same from 1024 on. A code of MXFP4 is a small float: its exponent and
fraction, put where those of the wide number are lowest, are the number but for a power of two, subnormal or not.

Legend: E experts, N outputs of each, K inputs, G groups of g inputs, h words of a unit, b outputs of a block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from quire_kernels.errors import KernelError
from quire_kernels.mxfp4 import GROUP
from quire_kernels.quantized import Fp8Weight, Int4Weight, Int8Weight, QuantizedWeight
from quire_kernels.triton.bytes import NATIVE, halves_of

INT8, FP8, INT4, MXFP4 = 1, 2, 3, 4
"""What the codes of a weight are, up to fp8 two of a word, else four; 0 are numbers as they are."""
UNIT = 128
"""Inputs of an output whose words lie together."""

_INT8, _MXFP4, _FP8, _UNIT = tl.constexpr(INT8), tl.constexpr(MXFP4), tl.constexpr(FP8), tl.constexpr(UNIT)
_PIECE = 1 << 22
"""Numbers of a weight that are put in order at a time."""

INT8_TO_BFLOAT16 = tl.constexpr("""{
    .reg .b32 low, high, sign, top, one;
    mov.b32 one, 0x3f803f80;
    shr.b32 high, $2, 8;
    and.b32 low, $2, 0x007f007f;
    or.b32 low, low, 0x43004300;
    and.b32 sign, $2, 0x00800080;
    or.b32 sign, sign, 0xc300c300;
    and.b32 top, high, 0x00800080;
    or.b32 top, top, 0xc300c300;
    and.b32 high, high, 0x007f007f;
    or.b32 high, high, 0x43004300;
    fma.rn.bf16x2 $0, low, one, sign;
    fma.rn.bf16x2 $1, high, one, top;
}""")
INT8_TO_FLOAT16 = tl.constexpr("""{
    .reg .b32 low, high, above;
    mov.b32 above, 0xe480e480;
    and.b32 low, $2, 0x00ff00ff;
    xor.b32 low, low, 0x64806480;
    shr.b32 high, $2, 8;
    and.b32 high, high, 0x00ff00ff;
    xor.b32 high, high, 0x64806480;
    add.f16x2 $0, low, above;
    add.f16x2 $1, high, above;
}""")
"""Of two words of two signed bytes in $2 the numbers of their lower bytes, $0, and of their upper ones, $1."""
INT4_TO_BFLOAT16 = tl.constexpr("""{
    .reg .b32 a, b, c, d, one, above;
    mov.b32 one, 0x3f803f80;
    mov.b32 above, 0xc308c308;
    and.b32 a, $4, 0x000f000f;
    or.b32 a, a, 0x43004300;
    shr.b32 b, $4, 4;
    and.b32 b, b, 0x000f000f;
    or.b32 b, b, 0x43004300;
    shr.b32 c, $4, 8;
    and.b32 c, c, 0x000f000f;
    or.b32 c, c, 0x43004300;
    shr.b32 d, $4, 12;
    and.b32 d, d, 0x000f000f;
    or.b32 d, d, 0x43004300;
    fma.rn.bf16x2 $0, a, one, above;
    fma.rn.bf16x2 $1, b, one, above;
    fma.rn.bf16x2 $2, c, one, above;
    fma.rn.bf16x2 $3, d, one, above;
}""")
INT4_TO_FLOAT16 = tl.constexpr("""{
    .reg .b32 a, b, c, d, above;
    mov.b32 above, 0xe408e408;
    and.b32 a, $4, 0x000f000f;
    or.b32 a, a, 0x64006400;
    shr.b32 b, $4, 4;
    and.b32 b, b, 0x000f000f;
    or.b32 b, b, 0x64006400;
    shr.b32 c, $4, 8;
    and.b32 c, c, 0x000f000f;
    or.b32 c, c, 0x64006400;
    shr.b32 d, $4, 12;
    and.b32 d, d, 0x000f000f;
    or.b32 d, d, 0x64006400;
    add.f16x2 $0, a, above;
    add.f16x2 $1, b, above;
    add.f16x2 $2, c, above;
    add.f16x2 $3, d, above;
}""")
"""Of two words of four codes, 8 above what they are, in $4 the numbers of each quarter, lowest first. What
is given is written to registers of its own (`=&r`), for $4 is read to the end."""
MXFP4_TO_BFLOAT16 = tl.constexpr("""{
    .reg .b32 a, b, c, d, sign, factor, zero;
    mov.b32 factor, 0x7e807e80;
    mov.b32 zero, 0x80008000;
    shl.b32 a, $4, 6;
    and.b32 a, a, 0x01c001c0;
    shl.b32 sign, $4, 12;
    and.b32 sign, sign, 0x80008000;
    or.b32 a, a, sign;
    shl.b32 b, $4, 2;
    and.b32 b, b, 0x01c001c0;
    shl.b32 sign, $4, 8;
    and.b32 sign, sign, 0x80008000;
    or.b32 b, b, sign;
    shr.b32 c, $4, 2;
    and.b32 c, c, 0x01c001c0;
    shl.b32 sign, $4, 4;
    and.b32 sign, sign, 0x80008000;
    or.b32 c, c, sign;
    shr.b32 d, $4, 6;
    and.b32 d, d, 0x01c001c0;
    and.b32 sign, $4, 0x80008000;
    or.b32 d, d, sign;
    fma.rn.bf16x2 $0, a, factor, zero;
    fma.rn.bf16x2 $1, b, factor, zero;
    fma.rn.bf16x2 $2, c, factor, zero;
    fma.rn.bf16x2 $3, d, factor, zero;
}""")
MXFP4_TO_FLOAT16 = tl.constexpr("""{
    .reg .b32 a, b, c, d, sign, factor;
    mov.b32 factor, 0x74007400;
    shl.b32 a, $4, 9;
    and.b32 a, a, 0x0e000e00;
    shl.b32 sign, $4, 12;
    and.b32 sign, sign, 0x80008000;
    or.b32 a, a, sign;
    shl.b32 b, $4, 5;
    and.b32 b, b, 0x0e000e00;
    shl.b32 sign, $4, 8;
    and.b32 sign, sign, 0x80008000;
    or.b32 b, b, sign;
    shl.b32 c, $4, 1;
    and.b32 c, c, 0x0e000e00;
    shl.b32 sign, $4, 4;
    and.b32 sign, sign, 0x80008000;
    or.b32 c, c, sign;
    shr.b32 d, $4, 3;
    and.b32 d, d, 0x0e000e00;
    and.b32 sign, $4, 0x80008000;
    or.b32 d, d, sign;
    mul.f16x2 $0, a, factor;
    mul.f16x2 $1, b, factor;
    mul.f16x2 $2, c, factor;
    mul.f16x2 $3, d, factor;
}""")
"""The same of codes of MXFP4, with 2^126 and 2^14 for the power that is lacking. What a product adds is a zero of
the sign that leaves every zero as it is."""


# ── inside kernels ────────────────────────────────────────────────────────────────────────────────────────


@triton.jit
def bytes_of(words, NUMBER: tl.constexpr):
    """The lower and the upper signed bytes of `words` int16, as NUMBER."""
    if NATIVE and tl.bfloat16 == NUMBER:
        low, high = tl.inline_asm_elementwise(
            INT8_TO_BFLOAT16,
            "=&r,=&r,r", [words], dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=2,
        )  # fmt: skip
    elif NATIVE and tl.float16 == NUMBER:
        low, high = tl.inline_asm_elementwise(
            INT8_TO_FLOAT16,
            "=&r,=&r,r", [words], dtype=(tl.float16, tl.float16), is_pure=True, pack=2,
        )  # fmt: skip
    else:
        wide = words.to(tl.int32)
        low, high = ((wide << 24) >> 24).to(tl.float32), (wide >> 8).to(tl.float32)
    return low.to(NUMBER), high.to(NUMBER)


@triton.jit
def quarters_of(words, NUMBER: tl.constexpr, CODES: tl.constexpr):
    """What the four codes of each of `words` int16 stand for, lowest bits first, as NUMBER."""
    if NATIVE and tl.bfloat16 == NUMBER:
        a, b, c, d = tl.inline_asm_elementwise(
            MXFP4_TO_BFLOAT16 if CODES == _MXFP4 else INT4_TO_BFLOAT16,
            "=&r,=&r,=&r,=&r,r", [words], dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16),
            is_pure=True, pack=2,
        )  # fmt: skip
    elif NATIVE and tl.float16 == NUMBER:
        a, b, c, d = tl.inline_asm_elementwise(
            MXFP4_TO_FLOAT16 if CODES == _MXFP4 else INT4_TO_FLOAT16,
            "=&r,=&r,=&r,=&r,r", [words], dtype=(tl.float16, tl.float16, tl.float16, tl.float16),
            is_pure=True, pack=2,
        )  # fmt: skip
    else:
        wide = words.to(tl.int32)
        a, b = _number(wide & 15, CODES), _number((wide >> 4) & 15, CODES)
        c, d = _number((wide >> 8) & 15, CODES), _number((wide >> 12) & 15, CODES)
    return a.to(NUMBER), b.to(NUMBER), c.to(NUMBER), d.to(NUMBER)


@triton.jit
def _number(code, CODES: tl.constexpr):
    """What `code` int32 of 4 bits stands for, float32."""
    if CODES == _MXFP4:
        exponent, fraction = (code >> 1) & 3, code & 1
        size = (tl.where(exponent > 0, fraction + 2, fraction) << tl.maximum(exponent, 1)).to(tl.float32) * 0.25
        number = tl.where(code > 7, -size, size)
    else:
        number = (code - 8).to(tl.float32)
    return number


@triton.jit
def _scale(scale, CODES: tl.constexpr):
    """A scale as it is stored, float32: the 8 bits of a power are those of an exponent, the lowest subnormal."""
    if CODES == _MXFP4:
        bits = scale.to(tl.int32)
        number = tl.where(bits == 0, 1 << 22, bits << 23).to(tl.float32, bitcast=True)
    else:
        number = scale.to(tl.float32)
    return number


@triton.jit
def _scales_at(beside, group, groups, stride, CODES: tl.constexpr, GROUP: tl.constexpr, SIZE: tl.constexpr):
    """Of the four parts of a unit of SIZE inputs, the first of which are in `group`, what scales their sums; of
    the last group where there is none. `beside`: of the first group; the next lies `stride` behind it. In int8
    nothing is read."""
    if CODES == _INT8:
        a, b, c, d = 0.0, 0.0, 0.0, 0.0
    else:
        a = _scale(tl.load(beside + tl.minimum(group, groups - 1) * stride), CODES)
        b, c, d = a, a, a
        if CODES != _FP8 and GROUP < SIZE:
            c = _scale(tl.load(beside + tl.minimum(group + SIZE // GROUP // 2, groups - 1) * stride), CODES)
            d = c
        if CODES != _FP8 and GROUP * 4 == SIZE:
            b = _scale(tl.load(beside + tl.minimum(group + 1, groups - 1) * stride), CODES)
            d = _scale(tl.load(beside + tl.minimum(group + 3, groups - 1) * stride), CODES)
    return a, b, c, d


@triton.jit
def _inputs_at(numbers, k, real, SIZE: tl.constexpr, PARTS: tl.constexpr, BLOCK_H: tl.constexpr):
    """The parts of SIZE inputs from k on, each [BLOCK_H, rows], zero behind a part that is shorter. `numbers`: the
    first input of each row [1, rows]; those that are not `real` have zeros."""
    HALF: tl.constexpr = SIZE // PARTS
    lanes = tl.arange(0, BLOCK_H)
    here = numbers + (lanes + k)[:, None]
    there = real
    if HALF < BLOCK_H:
        there = real & (lanes < HALF)[:, None]
    a = tl.load(here, mask=there, other=0.0)
    b = tl.load(here + HALF, mask=there, other=0.0)
    c, d = a, b
    if PARTS == 4:
        c = tl.load(here + 2 * HALF, mask=there, other=0.0)
        d = tl.load(here + 3 * HALF, mask=there, other=0.0)
    return a, b, c, d


@triton.jit
def _words_at(weight, at, SIZE: tl.constexpr, PARTS: tl.constexpr, BLOCK_H: tl.constexpr):
    """Of a unit of SIZE inputs, whose first word is number `at` of its output, [outputs, BLOCK_H]. `weight`: the
    first word of each output [outputs, 1]."""
    lanes = tl.arange(0, BLOCK_H)[None, :]
    if BLOCK_H * PARTS == SIZE:
        words = tl.load(weight + (lanes + at))
    else:
        words = tl.load(weight + (lanes + at), mask=lanes < SIZE // PARTS, other=0)
    return words


@triton.jit
def _dot(weight, number, acc):
    return tl.dot(weight, number, acc, input_precision="ieee")


@triton.jit
def _met(acc, words, scales, a, b, c, d, CODES: tl.constexpr, GROUP: tl.constexpr, SIZE: tl.constexpr):
    """`acc` [outputs, rows] with what a unit of SIZE inputs adds: its words [outputs, h], the scales of its parts,
    and those of the input, two or four of [h, rows]."""
    if CODES == _INT8:
        low, high = bytes_of(words, a.dtype)
        acc = _dot(high, b, _dot(low, a, acc))
    elif CODES == _FP8:
        low, high = halves_of(words, a.dtype)
        acc += _dot(high, b, _dot(low, a, tl.zeros_like(acc))) * scales[0][:, None]
    else:
        none = tl.zeros_like(acc)
        first, second, third, fourth = quarters_of(words, a.dtype, CODES)
        if GROUP >= SIZE:
            sums = _dot(fourth, d, _dot(third, c, _dot(second, b, _dot(first, a, none))))
            acc += sums * scales[0][:, None]
        elif GROUP * 2 == SIZE:
            acc += _dot(second, b, _dot(first, a, none)) * scales[0][:, None]
            acc += _dot(fourth, d, _dot(third, c, none)) * scales[2][:, None]
        else:
            acc += _dot(first, a, none) * scales[0][:, None]
            acc += _dot(second, b, none) * scales[1][:, None]
            acc += _dot(third, c, none) * scales[2][:, None]
            acc += _dot(fourth, d, none) * scales[3][:, None]
    return acc


@triton.jit
def _unit(
    acc,
    other,
    weight,
    second,
    scales,
    second_scales,
    numbers,
    real,
    at,
    k,
    GATED: tl.constexpr,
    CODES: tl.constexpr,
    GROUP: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """What a unit of SIZE inputs from k on adds to both sums."""
    PARTS: tl.constexpr = 2 if CODES <= _FP8 else 4
    a, b, c, d = _inputs_at(numbers, k, real, SIZE, PARTS, BLOCK_H)
    acc = _met(acc, _words_at(weight, at, SIZE, PARTS, BLOCK_H), scales, a, b, c, d, CODES, GROUP, SIZE)
    if GATED:
        words = _words_at(second, at, SIZE, PARTS, BLOCK_H)
        other = _met(other, words, second_scales, a, b, c, d, CODES, GROUP, SIZE)
    return acc, other


@triton.jit
def coded_sums(
    acc,
    other,
    weight,
    second,
    scales,
    second_scales,
    numbers,
    real,
    near,
    outputs,
    width,
    GATED: tl.constexpr,
    CODES: tl.constexpr,
    GROUP: tl.constexpr,
    LEFT: tl.constexpr,
):
    """The sums of a tile over all inputs of rows, [outputs, rows] float32: of one weight of an expert, and, GATED,
    of a second.

    `weight` and `scales` begin with those of the expert, and `near` has the outputs. `numbers`: the first input of
    each row [1, rows]; rows that are not `real` have zeros. `GROUP`: as `Coded.group`. `LEFT`: inputs behind the
    last whole unit.
    """
    PARTS: tl.constexpr = 2 if CODES <= _FP8 else 4
    WORDS: tl.constexpr = _UNIT // PARTS
    PER: tl.constexpr = 1 if PARTS == 2 else _UNIT // GROUP
    units, groups, stride = width // _UNIT, 1, outputs
    here = (near * (width // PARTS))[:, None]
    weight, second = weight + here, second + here
    if CODES == _FP8:
        groups, stride = tl.cdiv(width, _UNIT), 1
        near = near // GROUP * groups
    elif CODES != _INT8:
        groups = width // GROUP
    beside, second_beside = scales + near, second_scales + near
    # scales are asked for a unit ahead, for nothing else of the loop would hide how long they take
    mine = _scales_at(beside, 0, groups, stride, CODES, GROUP, _UNIT)
    hers = _scales_at(second_beside, 0, groups, stride, CODES, GROUP, _UNIT) if GATED else mine
    for unit in tl.range(0, units):
        coming = _scales_at(beside, (unit + 1) * PER, groups, stride, CODES, GROUP, _UNIT)
        following = coming
        if GATED:
            following = _scales_at(second_beside, (unit + 1) * PER, groups, stride, CODES, GROUP, _UNIT)
        acc, other = _unit(
            acc, other, weight, second, mine, hers, numbers, real, unit * WORDS, unit * _UNIT,
            GATED, CODES, GROUP, _UNIT, WORDS,
        )  # fmt: skip
        mine, hers = coming, following
    if PARTS == 2:
        if LEFT > 0:
            acc, other = _unit(
                acc, other, weight, second, mine, hers, numbers, real, units * WORDS, units * _UNIT,
                GATED, CODES, GROUP, LEFT, WORDS,
            )  # fmt: skip
        if CODES == _INT8:
            acc *= tl.load(beside)[:, None]
            if GATED:
                other *= tl.load(second_beside)[:, None]
    else:
        if LEFT & 64:
            k = units * _UNIT
            mine = _scales_at(beside, k // GROUP, groups, stride, CODES, GROUP, 64)
            hers = _scales_at(second_beside, k // GROUP, groups, stride, CODES, GROUP, 64) if GATED else mine
            acc, other = _unit(
                acc, other, weight, second, mine, hers, numbers, real, k // 4, k, GATED, CODES, GROUP, 64, 16
            )
        if LEFT & 32:
            k = units * _UNIT + (LEFT & 64)
            mine = _scales_at(beside, k // GROUP, groups, stride, CODES, GROUP, 32)
            hers = _scales_at(second_beside, k // GROUP, groups, stride, CODES, GROUP, 32) if GATED else mine
            acc, other = _unit(
                acc, other, weight, second, mine, hers, numbers, real, k // 4, k, GATED, CODES, GROUP, 32, 16
            )
    return acc, other


# ── launchers ─────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(slots=True, frozen=True, eq=False)
class Coded:
    """One weight of all experts of a layer, in the order that kernels read it in."""

    words: Tensor
    """[E, N, K / c] int16, of c codes each."""
    scales: Tensor
    """int8: [E, N] float32; int4: [E, G, N] bfloat16, mxfp4: uint8; fp8: [E, N / b, ⌈K / 128⌉] float32."""
    codes: int
    group: int
    """Inputs that share a scale, 0 if those of an output do; in fp8 outputs that share one."""
    dtype: torch.dtype
    """Of the numbers that codes become."""
    shape: tuple[int, int, int]
    """E, N and K."""

    @classmethod
    def of(cls, weight: QuantizedWeight, count: int, dtype: torch.dtype) -> Coded:
        """Takes over the `weight` [E · N, K] of `count` experts, whose bytes are put in order where they are.

        Raises `KernelError` for an odd width in 8 bits, and for outputs that are no whole blocks in fp8.
        """
        (rows, width), values = weight.shape, weight.values
        shape = count, rows // count, width
        if isinstance(weight, Int8Weight | Fp8Weight):
            if width % 2:
                raise KernelError(f"experts in 8 bits have whole words of inputs, and {width} are none")
            _in_place(values, width, _halved)
            words = values.view(torch.int16).view(*shape[:2], -1)
            if isinstance(weight, Int8Weight):
                return cls(words, weight.scales.view(*shape[:2]), INT8, 0, dtype, shape)
            if shape[1] % weight.shared:
                raise KernelError(f"{shape[1]} outputs of an expert are no whole blocks of {weight.shared}")
            blocks = weight.scales.view(count, shape[1] // weight.shared, -1)
            return cls(words, blocks, FP8, weight.shared, dtype, shape)
        _in_place(values, width, _quartered)
        scales = weight.scales.view(*shape[:2], -1)
        for one in scales:  # so that there is never more of it twice
            one.view(-1).copy_(one.T.reshape(-1).clone())
        words = values.view(torch.int16).view(*shape[:2], -1)
        codes, group = (INT4, weight.group_size) if isinstance(weight, Int4Weight) else (MXFP4, GROUP)
        return cls(words, scales.view(count, -1, shape[1]), codes, group, dtype, shape)

    @property
    def nbytes(self) -> int:
        """All bytes of it."""
        return self.words.nbytes + self.scales.nbytes

    @property
    def device(self) -> torch.device:
        """Where it lies."""
        return self.words.device

    @property
    def kind(self) -> str:
        """What tilings go by."""
        return {INT8: "int8", INT4: f"int4/{self.group}", MXFP4: "mxfp4", FP8: "fp8"}[self.codes]

    def parameters(self) -> Iterator[Tensor]:
        """Every tensor it holds, once."""
        yield self.words
        yield self.scales


def _in_place(values: Tensor, width: int, order: Callable[[Tensor], Tensor]) -> None:
    """Puts the bytes of each output [rows, bytes] in order, unit by unit, some outputs at a time. `order` takes
    and gives those of units [any, bytes] of one size."""
    step = max(1, _PIECE // width)
    scale = values.shape[1] / width
    whole = width // UNIT * UNIT
    left = width - whole
    sizes = [UNIT] * bool(whole) + ([left] if scale == 1 else [left & 64, left & 32])
    for first in range(0, values.shape[0], step):
        rows, at = values[first : first + step], 0
        for size in filter(None, sizes):
            end = at + int((whole if size == UNIT else size) * scale)
            units = rows[:, at:end].reshape(-1, int(size * scale))
            rows[:, at:end] = order(units).view(rows.shape[0], -1)
            at = end


def _halved(units: Tensor) -> Tensor:
    """Bytes of inputs in turns: one of the first half of a unit, one of the second."""
    return units.view(units.shape[0], 2, -1).transpose(1, 2).reshape(units.shape)


def _quartered(units: Tensor) -> Tensor:
    """Of units [any, n / 2] whose bytes have the codes of inputs 2j and 2j + 1 those whose words have the codes of
    j, n / 4 + j, n / 2 + j, 3 · n / 4 + j."""
    codes = torch.stack((units & 15, units >> 4), -1).view(units.shape[0], 4, -1)
    low, high = codes[:, 0] | codes[:, 1] << 4, codes[:, 2] | codes[:, 3] << 4
    return torch.stack((low, high), -1).view(units.shape)
