"""MXFP4, in which gpt-oss is published: 32 numbers of 4 bits that share a power of two.

    w[n, k] = 2^(powers[n, k / 32] - 127) · number(code[n, k])

A code is a sign, two bits of exponent and one of fraction: ±0, 0.5, 1, 1.5, 2, 3, 4 and 6. Every number is one of
bfloat16, too, so nothing is lost by widening, unless to float16, which has no such range. With the largest powers
there are numbers that a format cannot hold; callers look for them.

Legend: N outputs, K inputs, n rows of a piece.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quire_kernels.memory import large_pages

GROUP = 32
"""Inputs that share a power."""
NO_POWER = 255
"""Stands for no number."""
_PIECE = 1 << 21
"""Bytes of codes that are on their way to a device at a time."""
_SIZES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_NUMBERS = torch.tensor([*_SIZES, *(-size for size in _SIZES)])


@dataclass(slots=True, frozen=True)
class Mxfp4Weight:
    """4 bits a number, one power of two for 32 inputs of an output that follow each other."""

    values: Tensor
    """[N, K / 2] uint8: byte j of a row holds the code of input 2j in its low half, of input 2j + 1 in its high
    half."""
    scales: Tensor
    """[N, K / 32] uint8: the powers, none of which is `NO_POWER`."""

    @classmethod
    def empty(cls, outputs: int, width: int, device: torch.device | str = "cpu") -> Mxfp4Weight:
        """Memory for a weight [outputs, width], a whole number of groups wide, to be filled by `put`."""
        return cls(
            large_pages(torch.empty((outputs, width // 2), dtype=torch.uint8, device=device)),
            torch.empty((outputs, width // GROUP), dtype=torch.uint8, device=device),
        )

    @property
    def shape(self) -> tuple[int, int]:
        """N and K."""
        return self.values.shape[0], self.values.shape[1] * 2

    def put(self, start: int, codes: Tensor, powers: Tensor) -> None:
        """`codes` [n, K / 2] and `powers` [n, K / 32] uint8, on any device, as the outputs from `start` on."""
        step = max(1, _PIECE // codes.shape[1])
        for first in range(0, codes.shape[0], step):
            piece = slice(first, first + step)
            at = slice(start + first, start + first + codes[piece].shape[0])
            self.values[at] = codes[piece].to(self.values.device)
            self.scales[at] = powers[piece].to(self.scales.device)

    def part(self, outputs: slice | Tensor) -> Mxfp4Weight:
        """Some outputs, by a slice or by their numbers [n] int64."""
        return Mxfp4Weight(self.values[outputs], self.scales[outputs])

    def dequantized(self) -> Tensor:
        """The numbers that it stands for, [N, K] float32."""
        return widened(self.values, self.scales)


def widened(codes: Tensor, powers: Tensor) -> Tensor:
    """What `codes` [n, K / 2] and `powers` [n, K / 32], uint8, stand for, [n, K] float32."""
    pairs = torch.stack((codes & 15, codes >> 4), -1).view(*powers.shape, GROUP)
    numbers = _NUMBERS.to(codes.device)[pairs.int()]
    return torch.ldexp(numbers, powers.unsqueeze(-1).int() - 127).flatten(-2)


def largest(power: int) -> float:
    """The largest number that there can be with that power."""
    return float(_SIZES[-1] * 2.0 ** (power - 127))
