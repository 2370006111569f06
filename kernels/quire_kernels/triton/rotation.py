"""By how much heads are turned: cosines and signed sines of each token's position, once a step for all layers.

    cos[t] = [c, c],  sin[t] = [-s, s],   c, s = cos, sin (position[t] · frequency) · factor

Legend: T tokens, D head size.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from quire_kernels.triton.launch import dependent, wait

_TOKENS = 8
"""Tokens a program."""


@triton.jit(do_not_specialize=["num_tokens"])
def _turns(
    cos,
    sin,
    positions,
    frequencies,
    factor,
    num_tokens,
    HALF: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    TOKENS: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    tokens, dims = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS), tl.arange(0, BLOCK_HALF)
    there = (tokens < num_tokens)[:, None] & (dims < HALF)[None, :]
    frequency = tl.load(frequencies + dims, mask=dims < HALF, other=0.0)
    wait(DEPENDENT)
    position = tl.load(positions + tokens, mask=tokens < num_tokens, other=0)
    angle = position.to(tl.float32)[:, None] * frequency[None, :]
    c, s = tl.cos(angle) * factor, tl.sin(angle) * factor
    at = tokens[:, None] * (2 * HALF) + dims[None, :]
    tl.store(cos + at, c, mask=there)
    tl.store(cos + at + HALF, c, mask=there)
    tl.store(sin + at, -s, mask=there)
    tl.store(sin + at + HALF, s, mask=there)


def turns(positions: Tensor, frequencies: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    """See `Kernels.turns`."""
    num_tokens, half = positions.shape[0], frequencies.shape[0]
    block = triton.next_power_of_2(half)
    cos, sin = (
        torch.empty((num_tokens, 1, 2 * half), dtype=torch.float32, device=positions.device) for _ in range(2)
    )
    _turns[(triton.cdiv(num_tokens, _TOKENS),)](
        cos, sin, positions, frequencies, factor, num_tokens, HALF=half, BLOCK_HALF=block, TOKENS=_TOKENS,
        num_warps=max(1, min(4, _TOKENS * block // 128)), **dependent(),
    )  # fmt: skip
    return cos, sin
