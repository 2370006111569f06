"""Rows in 8 bits with a scale each, as `quire_kernels.reference.bytes` has them, inside other kernels.

    s = max |x| / 127,   a[d] = round(x[d] · 127 / max |x|),   x[d] ≈ a[d] · s

A block of a cache in 8 bits lies head by head like any other, codes first: [K, P, D] int8, then [K, P] float32 of
scales. What reads it has it as both.

Legend: R rows, K key/value heads, P slots a block, D numbers of a row.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton import knobs

NATIVE = tl.constexpr(not knobs.runtime.interpret)
"""Whether kernels may have assembly."""


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
def scale_of(most, broken):
    """Of the largest numbers of rows, and whether a row is broken, that is has one that is not finite: by what to
    multiply, and what a code of 1 stands for. A row of next to nothing is zeros; a broken one is NaN."""
    usable = (most >= 1e-30) & (broken == 0)
    inverse = tl.where(usable, tl.div_rn(127.0, tl.where(usable, most, 1.0)), 0.0)
    scale = tl.where(usable, tl.div_rn(most, 127.0), tl.where(broken > 0, float("nan"), 0.0))
    return inverse, scale


@triton.jit
def rounded(x):
    """Rows [R, D] float32: codes int8 and scales [R] float32."""
    size = tl.abs(x)
    finite = size < float("inf")
    most = tl.max(tl.where(finite, size, 0.0), 1)
    inverse, scale = scale_of(most, tl.max(tl.where(finite, 0, 1), 1))
    return code_of(tl.where(finite, x, 0.0) * inverse[:, None]).to(tl.int8), scale
