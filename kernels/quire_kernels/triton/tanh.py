"""tanh, of which soft caps are made: c · tanh(x / c) of scores and of logits."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tanh(x):
    """Within 5e-7 of it, relatively and near 0 as well. Triton's own is CUDA's alone."""
    far = tl.abs(x)
    fall = tl.exp2(far * -2.8853900817779268)  # e^(-2 |x|), which cannot overflow
    square = far * far
    # near 0 the other formula takes one from what is nearly one; of such series this is that which errs least
    near = 0.13299825315039 + square * -0.04914849744115
    near = far + far * square * (-0.33332663161891 + square * near)
    found = tl.where(far < 0.35, near, (1.0 - fall) / (1.0 + fall))
    return tl.where(x < 0.0, -found, found)


@triton.jit
def capped(x, cap):
    """c · tanh(x / c) of float32. NaN stays NaN, the infinite are at the cap."""
    return cap * tanh(x * (1.0 / cap))
