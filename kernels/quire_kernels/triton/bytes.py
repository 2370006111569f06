"""Rows in 8 bits with a scale each, as `quire_kernels.reference.bytes` has them, inside other kernels.

    s = max |x| / most,   a[d] = round(x[d] · most / max |x|),   x[d] ≈ a[d] · s      most: 127, in e4m3 448

A block of a cache in 8 bits lies head by head like any other, codes first: [K, P, D] bytes, then [K, P] float32 of
scales. What reads it has it as both.

In e4m3 the numbers d and d + D/2 of a head are one word of 16 bits, the first in its lower byte, and a block of
codes is [K, P, D/2] words. Tensor cores are given numbers of 16 bits, and what lays those out for them moves
words, not bytes: so words are moved, and each becomes two numbers where it arrives (`halves_of`). Bits of e4m3 put
where a wider format has its lowest exponent bits stand for 2^-8 (float16) or 2^-120 (bfloat16) of the number, also
where it has no leading one, and a product with a power of two is exact. No GPU needs to know e4m3.

In int8 a word has two neighbours: bytes lie as they do without words, so keys are read byte by byte, as the tensor
cores take them, and values in words (`neighbours_of`). 2^7 + (a mod 2^7) and 2^7 + (2^7 if a < 0) are the byte's
bits below those of 2^7 in bfloat16, each by one mask, and their difference is a; in float16 it is 2^10.

Legend: R rows, K key/value heads, P slots a block, D numbers of a row.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton import knobs

NATIVE = tl.constexpr(not knobs.runtime.interpret)
"""Whether kernels may have assembly."""

TO_BFLOAT16 = tl.constexpr("""{
    .reg .b32 low, high, sign, unit, none;
    mov.b32 unit, 0x7b807b80;
    mov.b32 none, 0x80008000;
    shl.b32 low, $2, 4;
    and.b32 low, low, 0x07f007f0;
    shl.b32 sign, $2, 8;
    and.b32 sign, sign, 0x80008000;
    or.b32 low, low, sign;
    shr.b32 high, $2, 4;
    and.b32 high, high, 0x07f007f0;
    and.b32 sign, $2, 0x80008000;
    or.b32 high, high, sign;
    fma.rn.bf16x2 $0, low, unit, none;
    fma.rn.bf16x2 $1, high, unit, none;
}""")
TO_FLOAT16 = tl.constexpr("""{
    .reg .b32 low, high, sign, unit;
    mov.b32 unit, 0x5c005c00;
    shl.b32 low, $2, 7;
    and.b32 low, low, 0x3f803f80;
    shl.b32 sign, $2, 8;
    and.b32 sign, sign, 0x80008000;
    or.b32 low, low, sign;
    shr.b32 high, $2, 1;
    and.b32 high, high, 0x3f803f80;
    and.b32 sign, $2, 0x80008000;
    or.b32 high, high, sign;
    mul.f16x2 $0, low, unit;
    mul.f16x2 $1, high, unit;
}""")
"""Of two words of e4m3 in $2 the numbers in their lower bytes, $0, and in their upper ones, $1. These are written
last, for they may be where $2 is."""

NEIGHBOURS_TO_BFLOAT16 = tl.constexpr("""{
    .reg .b32 low, high, low_sign, high_sign, minus, base;
    mov.b32 minus, 0xbf80bf80;
    mov.b32 base, 0x43004300;
    shr.b32 high, $2, 8;
    lop3.b32 low, $2, 0x007f007f, base, 0xea;
    lop3.b32 low_sign, $2, 0x00800080, base, 0xea;
    lop3.b32 high_sign, high, 0x00800080, base, 0xea;
    lop3.b32 high, high, 0x007f007f, base, 0xea;
    fma.rn.bf16x2 $0, low_sign, minus, low;
    fma.rn.bf16x2 $1, high_sign, minus, high;
}""")
NEIGHBOURS_TO_FLOAT16 = tl.constexpr("""{
    .reg .b32 low, high, low_sign, high_sign, base;
    mov.b32 base, 0x64006400;
    shr.b32 high, $2, 8;
    lop3.b32 low, $2, 0x007f007f, base, 0xea;
    lop3.b32 low_sign, $2, 0x00800080, base, 0xea;
    lop3.b32 high_sign, high, 0x00800080, base, 0xea;
    lop3.b32 high, high, 0x007f007f, base, 0xea;
    sub.f16x2 $0, low, low_sign;
    sub.f16x2 $1, high, high_sign;
}""")
"""The same of two words of int8. 0xea: (a & b) | c."""


@triton.jit
def nearest(x):
    """The whole number next to x, int32, the even one of two, for |x| < 2^22."""
    if NATIVE:
        # a product before it must be rounded by itself: no instruction of Triton's would keep the two apart
        return tl.inline_asm_elementwise(
            "cvt.rni.s32.f32 $0, $1;", "=r,f", [x], dtype=tl.int32, is_pure=True, pack=1
        )
    return ((x + 12582912.0) - 12582912.0).to(tl.int32)


@triton.jit
def code_of(x):
    """What is left of numbers in units of their scale: -127 to 127, int32."""
    return tl.minimum(tl.maximum(nearest(x), -127), 127)


@triton.jit
def scale_of(most, broken, LARGEST: tl.constexpr = 127.0):
    """Of the largest numbers of rows, and whether a row is broken, that is has one that is not finite: by what to
    multiply, and what a code of 1 stands for. A row of next to nothing is zeros; a broken one is NaN."""
    usable = (most >= 1e-30) & (broken == 0)
    inverse = tl.where(usable, tl.div_rn(LARGEST, tl.where(usable, most, 1.0)), 0.0)
    scale = tl.where(usable, tl.div_rn(most, LARGEST), tl.where(broken > 0, float("nan"), 0.0))
    return inverse, scale


@triton.jit
def e4m3_of(x):
    """The bits of the numbers in e4m3 next to x, of two the even ones, for what is larger than 448 those of 448:
    int32, 0 to 255, for |x| < 2^12."""
    bits = x.to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    # from 2^-6 on three bits of fraction are left, and the exponent is 120 lower; below are multiples of 2^-9
    normal = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - (120 << 3)
    code = tl.where(size < 0x3C800000, nearest(tl.abs(x) * 512.0), normal)
    return tl.minimum(code, 0x7E) | ((bits >> 24) & 0x80)


@triton.jit
def halves_of(words, NUMBER: tl.constexpr):
    """The numbers in e4m3 in the lower and in the upper bytes of `words` int16, as NUMBER, exactly."""
    if NATIVE and tl.bfloat16 == NUMBER:
        low, high = tl.inline_asm_elementwise(
            TO_BFLOAT16,
            "=r,=r,r", [words], dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=2,
        )  # fmt: skip
    elif NATIVE:
        low, high = tl.inline_asm_elementwise(
            TO_FLOAT16,
            "=r,=r,r", [words], dtype=(tl.float16, tl.float16), is_pure=True, pack=2,
        )  # fmt: skip
    else:
        wide = words.to(tl.int32)
        low = (((wide << 7) & 0x3F80) | ((wide << 8) & 0x8000)).to(tl.int16).to(tl.float16, bitcast=True) * 256.0
        high = (((wide >> 1) & 0x3F80) | (wide & 0x8000)).to(tl.int16).to(tl.float16, bitcast=True) * 256.0
    return low.to(NUMBER), high.to(NUMBER)


@triton.jit
def neighbours_of(words, NUMBER: tl.constexpr):
    """The whole numbers in the lower and in the upper bytes of `words` int16, as NUMBER, exactly."""
    if NATIVE and tl.bfloat16 == NUMBER:
        low, high = tl.inline_asm_elementwise(
            NEIGHBOURS_TO_BFLOAT16,
            "=r,=r,r", [words], dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=2,
        )  # fmt: skip
    elif NATIVE:
        low, high = tl.inline_asm_elementwise(
            NEIGHBOURS_TO_FLOAT16,
            "=r,=r,r", [words], dtype=(tl.float16, tl.float16), is_pure=True, pack=2,
        )  # fmt: skip
    else:
        wide = words.to(tl.int32)
        low, high = (wide << 24) >> 24, wide >> 8
    return low.to(NUMBER), high.to(NUMBER)


@triton.jit
def rounded(x):
    """Rows [R, D] float32: codes int8 and scales [R] float32."""
    size = tl.abs(x)
    finite = size < float("inf")
    most = tl.max(tl.where(finite, size, 0.0), 1)
    inverse, scale = scale_of(most, tl.max(tl.where(finite, 0, 1), 1))
    return code_of(tl.where(finite, x, 0.0) * inverse[:, None]).to(tl.int8), scale
