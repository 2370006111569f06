"""Weights in 8 and 4 bits: what they hold, and how rows of numbers become one.

Both are symmetric, so zero stays zero and a product needs no correction by the weight's own sums of zero points:

    int8    w[n, k] ≈ scales[n] · values[n, k]                     a scale for each output
    int4    w[n, k] ≈ scales[n, k / g] · code[n, k]                a scale for each group of g inputs of an output

A weight is made piece by piece: `empty` takes the memory, `put` quantises some rows into their place. So a
checkpoint can be read in small pieces, and the weight is in memory once.

Legend: N outputs, K inputs, n rows of a piece, g inputs of a group.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from quire_kernels.errors import KernelError
from quire_kernels.memory import large_pages

GROUP_SIZES = (32, 64, 128)
"""Inputs that may share a scale in 4 bits."""

_PIECE = 1 << 18
"""Numbers that are quantised at a time: what is in between stays in a core's cache."""

Activations = Literal["int8", "float"]
"""What a product with a quantised weight does with its input: rounds each row to 8 bits, or takes it as it is."""


@dataclass(slots=True, frozen=True)
class Int8Weight:
    """8 bits a number, one scale for each output."""

    values: Tensor
    """[N, K] int8, -127 to 127."""
    scales: Tensor
    """[N] float32."""

    @classmethod
    def empty(cls, outputs: int, width: int, device: torch.device | str = "cpu") -> Int8Weight:
        """Memory for a weight [outputs, width], to be filled by `put`."""
        return cls(
            large_pages(torch.empty((outputs, width), dtype=torch.int8, device=device)),
            torch.empty(outputs, device=device),
        )

    @property
    def shape(self) -> tuple[int, int]:
        """N and K."""
        return self.values.shape[0], self.values.shape[1]

    def put(self, start: int, rows: Tensor) -> None:
        """Quantises `rows` [n, K] of any float dtype, on any device, as the outputs from `start` on.

        The largest number of an output becomes 127. Raises `KernelError` if a number is not finite.
        """
        for at, piece in _pieces(start, rows):
            wide = piece.to(self.values.device).float()
            scales = _finite(wide.abs().amax(-1)) / 127.0
            self.scales[at] = scales
            self.values[at] = (wide / _divisor(scales)).round_().clamp_(-127, 127).to(torch.int8)

    def part(self, outputs: slice | Tensor) -> Int8Weight:
        """Some outputs, by a slice or by their numbers [n] int64."""
        return Int8Weight(self.values[outputs], self.scales[outputs])

    def dequantized(self) -> Tensor:
        """The numbers that it stands for, [N, K] float32."""
        return self.values.float() * self.scales.unsqueeze(-1)


@dataclass(slots=True, frozen=True)
class Int4Weight:
    """4 bits a number, one scale for `group_size` inputs of an output that follow each other."""

    values: Tensor
    """[N, K / 2] uint8: byte j of a row holds code + 8 of input 2j in its low half, of input 2j + 1 in its high
    half; a code is -8 to 7."""
    scales: Tensor
    """[N, K / group_size] bfloat16, of either sign: a code is rounded by the scale as it is stored, so few bits
    of it are enough, and the range of bfloat16 is that of what it scales."""
    group_size: int

    def __post_init__(self) -> None:
        check_groups(self.values.shape[1] * 2, self.group_size)

    @classmethod
    def empty(cls, outputs: int, width: int, group_size: int, device: torch.device | str = "cpu") -> Int4Weight:
        """Memory for a weight [outputs, width], to be filled by `put`.

        Raises `KernelError` unless the group size is one of `GROUP_SIZES` and divides `width`.
        """
        check_groups(width, group_size)
        return cls(
            large_pages(torch.empty((outputs, width // 2), dtype=torch.uint8, device=device)),
            torch.empty((outputs, width // group_size), dtype=torch.bfloat16, device=device),
            group_size,
        )

    @property
    def shape(self) -> tuple[int, int]:
        """N and K."""
        return self.values.shape[0], self.values.shape[1] * 2

    def put(self, start: int, rows: Tensor) -> None:
        """Quantises `rows` [n, K] of any float dtype, on any device, as the outputs from `start` on.

        The number of a group that is largest without its sign becomes -8. Raises `KernelError` if a number is
        not finite.
        """
        for at, piece in _pieces(start, rows):
            groups = piece.to(self.values.device).float().reshape(*self.scales[at].shape, self.group_size)
            low, high = groups.amin(-1), groups.amax(-1)  # `aminmax` takes five times as long
            scales = (_finite(torch.where(-low > high, low, high)) / -8.0).bfloat16()
            self.scales[at] = scales
            codes = (groups / _divisor(scales.float())).round_().clamp_(-8, 7).add_(8).to(torch.uint8)
            pairs = codes.view(piece.shape).view(torch.int16)  # the first of a pair in the lower byte
            self.values[at] = (pairs | pairs >> 4).to(torch.uint8)

    def part(self, outputs: slice | Tensor) -> Int4Weight:
        """Some outputs, by a slice or by their numbers [n] int64."""
        return Int4Weight(self.values[outputs], self.scales[outputs], self.group_size)

    def codes(self) -> Tensor:
        """[N, K] int8, -8 to 7."""
        halves = torch.stack((self.values & 15, self.values >> 4), -1)
        return halves.view(self.shape).to(torch.int8) - 8

    def dequantized(self) -> Tensor:
        """The numbers that it stands for, [N, K] float32."""
        groups = self.codes().float().view(*self.scales.shape, self.group_size)
        return (groups * self.scales.float().unsqueeze(-1)).view(self.shape)


QuantizedWeight = Int8Weight | Int4Weight


def quantize_int8(rows: Tensor) -> Int8Weight:
    """`rows` [n, K] in 8 bits; see `Int8Weight.put`."""
    outputs, width = rows.shape
    weight = Int8Weight.empty(outputs, width, rows.device)
    weight.put(0, rows)
    return weight


def quantize_int4(rows: Tensor, group_size: int) -> Int4Weight:
    """`rows` [n, K] in 4 bits; see `Int4Weight.put` and `Int4Weight.empty`."""
    outputs, width = rows.shape
    weight = Int4Weight.empty(outputs, width, group_size, rows.device)
    weight.put(0, rows)
    return weight


def check_groups(width: int, group_size: int) -> None:
    """Raises `KernelError` unless inputs of that number can be cut into groups of that size."""
    if group_size not in GROUP_SIZES:
        raise KernelError(f"a group of {group_size} inputs is none of {', '.join(map(str, GROUP_SIZES))}")
    if width % group_size:
        raise KernelError(f"{width} inputs are no whole number of groups of {group_size}")


def _finite(largest: Tensor) -> Tensor:
    if not bool(largest.isfinite().all()):
        raise KernelError("a weight that is not finite cannot be quantised")
    return largest


def _divisor(scales: Tensor) -> Tensor:
    """`scales`, or 1 where all that is scaled is zero, with a last dimension of one."""
    return torch.where(scales == 0, 1.0, scales).unsqueeze(-1)


def _pieces(start: int, rows: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """`rows`, some at a time, and where they belong if the first is `start`."""
    step = max(1, _PIECE // rows.shape[1])
    for first in range(0, rows.shape[0], step):
        piece = rows[first : first + step]
        yield slice(start + first, start + first + piece.shape[0]), piece
