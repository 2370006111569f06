"""Rows in 8 bits with a scale each, as `quire_kernels.reference.bytes` has them, inside other kernels.

    s = max |x| / 127,   a[d] = round(x[d] · 127 / max |x|),   x[d] ≈ a[d] · s

A block of a cache in 8 bits lies head by head like any other, codes first: [K, P, D] int8, then [K, P] float32 of
scales. What reads it has it as both.

Legend: K key/value heads, P slots a block, D numbers of a row.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def scale_of(most, broken):
    """Of the largest numbers of rows, and whether a row is broken, that is has one that is not finite: by what to
    multiply, and what a code of 1 stands for. A row of next to nothing is zeros; a broken one is NaN."""
    usable = (most >= 1e-30) & (broken == 0)
    inverse = tl.where(usable, tl.div_rn(tl.zeros_like(most) + 127.0, tl.where(usable, most, 1.0)), 0.0)
    scale = tl.where(usable, tl.div_rn(most, tl.zeros_like(most) + 127.0), tl.where(broken > 0, float("nan"), 0.0))
    return inverse, scale


@triton.jit
def codes_of(x, inverse):
    """Numbers [R, D], with the `inverse` [R, 1] of their rows, as int8. What is not finite is 0."""
    scaled = tl.where(tl.abs(x) < float("inf"), x, 0.0) * inverse
    # where numbers are 1 apart, adding rounds to the nearest, of two to the even one
    nearest = (scaled + 12582912.0) - 12582912.0
    return tl.minimum(tl.maximum(nearest, -127.0), 127.0).to(tl.int8)


@triton.jit
def rounded(x):
    """Rows [R, D] float32: codes int8 and scales [R] float32."""
    size = tl.abs(x)
    finite = size < float("inf")
    most = tl.max(tl.where(finite, size, 0.0), 1)
    inverse, scale = scale_of(most, tl.max(tl.where(finite, 0, 1), 1))
    return codes_of(x, inverse[:, None]), scale
