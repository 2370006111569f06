"""MXFP4, in which gpt-oss is published, widened: 32 numbers of 4 bits that share a power of two.

A code is a sign, two bits of exponent and one of fraction; the first of two is in the low half of a byte. Every
number is one of bfloat16, too, so nothing is lost, unless the engine computes in float16, which has no such range.

With the largest powers there are numbers that an engine's dtype cannot hold; callers look for them.

Legend: N outputs, G groups of 32 inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

NO_SCALE = 255
"""Stands for no number."""
_SIZES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_NUMBERS = torch.tensor([*_SIZES, *(-size for size in _SIZES)])


def largest(power: int) -> float:
    """The largest number that there can be with that power."""
    return float(_SIZES[-1] * 2.0 ** (power - 127))


def widened(codes: Tensor, powers: Tensor) -> Tensor:
    """`codes` [N, G, 16] and `powers` [N, G], both uint8, to [N, 32 · G] float32."""
    pairs = torch.stack((codes & 15, codes >> 4), -1).flatten(-2)
    numbers = _NUMBERS[pairs.int()]
    return torch.ldexp(numbers, powers.unsqueeze(-1).int() - 127).flatten(-2)
