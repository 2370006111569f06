"""Weights in 8 and 4 bits: what they hold, and how rows of numbers become one.

All are symmetric, so zero stays zero and a product needs no correction by the weight's own sums of zero points:

    int8    w[n, k] ≈ scales[n] · values[n, k]                     a scale for each output
    int4    w[n, k] ≈ scales[n, k / g] · code[n, k]                a scale for each group of g inputs of an output
    fp8     w[n, k] ≈ scales[n / b, k / 128] · code[n, k]          a scale for each block of b outputs, 128 inputs
    mxfp4   w[n, k] = 2^(powers[n, k / 32] - 127) · code[n, k]     as checkpoints have it (`mxfp4`)

A code of fp8 is a float of its own, e4m3: a sign, four bits of exponent and three behind the leading one, up to
448 and down to 2^-9, without infinities. b is 128; where the parts of a fused weight do not begin at multiples of
it, the largest power of two that suits all: a block of the checkpoint is then several with one scale.

A weight is made piece by piece: `empty` takes the memory, `put` quantises some rows into their place. So a
checkpoint can be read in small pieces, and the weight is in memory once.

Legend: N outputs, K inputs, n rows of a piece, g inputs of a group, b outputs of a block.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from quire_kernels.errors import KernelError
from quire_kernels.memory import large_pages
from quire_kernels.mxfp4 import Mxfp4Weight

GROUP_SIZES = (32, 64, 128)
"""Inputs that may share a scale in 4 bits."""

FP8_BLOCK = 128
"""Outputs, and inputs, of a block of a checkpoint that share a scale in fp8."""
FP8_LARGEST = 448.0
"""The largest number of e4m3."""
FP8 = torch.float8_e4m3fn

_PIECE = 1 << 18
"""Numbers that are quantised at a time: what is in between stays in a core's cache."""

Activations = Literal["int8", "fp8", "float"]
"""What a product with a quantised weight does with its input: rounds each row to whole numbers of 8 bits, or 128
inputs at a time to fp8, or takes it as it is."""


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


@dataclass(slots=True, frozen=True)
class Fp8Weight:
    """Floats of 8 bits, one scale for `shared` outputs and 128 inputs that follow each other."""

    values: Tensor
    """[N, K] uint8: the bits of each code, none of which is NaN."""
    scales: Tensor
    """[⌈N / shared⌉, ⌈K / 128⌉] float32, none negative."""
    shared: int

    @classmethod
    def empty(cls, outputs: int, width: int, shared: int, device: torch.device | str = "cpu") -> Fp8Weight:
        """Memory for a weight [outputs, width], to be filled by `put`, or by `put_codes` and `put_scales`.

        Raises `KernelError` unless `shared` divides `FP8_BLOCK`.
        """
        if shared < 1 or FP8_BLOCK % shared:
            raise KernelError(f"a block of {shared} outputs is no part of {FP8_BLOCK}")
        return cls(
            large_pages(torch.empty((outputs, width), dtype=torch.uint8, device=device)),
            torch.empty((-(-outputs // shared), -(-width // FP8_BLOCK)), device=device),
            shared,
        )

    @property
    def shape(self) -> tuple[int, int]:
        """N and K."""
        return self.values.shape[0], self.values.shape[1]

    def put(self, start: int, rows: Tensor) -> None:
        """Quantises `rows` [n, K] of any float dtype, on any device, as the outputs from `start` on, which begins
        a block.

        The largest number of a block becomes 448. Raises `KernelError` if a number is not finite.
        """
        shared, width = self.shared, rows.shape[1]
        for at, piece in _pieces(start, rows, shared):
            wide = piece.to(self.values.device).float()
            # whole blocks, of which what is added is zero
            filled = F.pad(wide, (0, -width % FP8_BLOCK, 0, -wide.shape[0] % shared))
            blocks = filled.view(filled.shape[0] // shared, shared, -1, FP8_BLOCK)
            scales = _finite(blocks.abs().amax((1, 3))) / FP8_LARGEST
            self.scales[at.start // shared : -(-at.stop // shared)] = scales
            codes = (blocks / _divisor(scales).unsqueeze(1)).clamp_(-FP8_LARGEST, FP8_LARGEST).to(FP8)
            self.values[at] = codes.view(torch.uint8).view(filled.shape)[: wide.shape[0], :width]

    def put_codes(self, start: int, codes: Tensor) -> None:
        """Codes [n, K] uint8, on any device, as the outputs from `start` on. Raises `KernelError` for a NaN."""
        check_codes(codes)
        self.values[start : start + codes.shape[0]] = codes.to(self.values.device)

    def put_scales(self, start: int, outputs: int, scales: Tensor) -> None:
        """Scales [⌈outputs / 128⌉, ⌈K / 128⌉] float of so many outputs from `start` on, which begins a block.
        Raises `KernelError` for one that is negative or not finite."""
        check_scales(scales)
        first, count = start // self.shared, -(-outputs // self.shared)
        repeated = scales.float().repeat_interleave(FP8_BLOCK // self.shared, 0)[:count]
        self.scales[first : first + count] = repeated.to(self.scales.device)

    def part(self, outputs: slice | Tensor) -> Fp8Weight:
        """Some outputs, by a slice or by their numbers [n] int64. Unless a slice begins with a block each has
        scales of its own then."""
        if isinstance(outputs, slice):
            start, stop, step = outputs.indices(self.shape[0])
            if step == 1 and start % self.shared == 0:
                blocks = self.scales[start // self.shared : -(-stop // self.shared)]
                return Fp8Weight(self.values[start:stop], blocks, self.shared)
            outputs = torch.arange(self.shape[0], device=self.values.device)[outputs]
        return Fp8Weight(self.values[outputs], self.scales[outputs // self.shared], 1)

    def dequantized(self) -> Tensor:
        """The numbers that it stands for, [N, K] float32."""
        return widened(self.values, self.scales, self.shared)


IntegerWeight = Int8Weight | Int4Weight
QuantizedWeight = IntegerWeight | Fp8Weight | Mxfp4Weight


def widened(codes: Tensor, scales: Tensor, shared: int = FP8_BLOCK, first: int = 0) -> Tensor:
    """What codes [n, K] uint8 of fp8 stand for, float32, if they are the outputs from `first` on of a weight with
    `scales` [any, ⌈K / 128⌉] float for `shared` outputs each."""
    rows = torch.arange(first, first + codes.shape[0], device=codes.device) // shared
    each = scales.float()[rows]
    # by the bits, ten times as fast on a CPU: float16 has room for every code, at 1/256 of it
    halves = (codes.view(torch.int8).to(torch.int16) << 7) & ~(1 << 14)
    numbers = halves.view(torch.float16).float().mul_(256.0)
    whole = codes.shape[1] // FP8_BLOCK
    if whole:
        blocks = numbers[:, : whole * FP8_BLOCK].view(-1, whole, FP8_BLOCK)
        blocks.mul_(each[:, :whole].unsqueeze(-1))
    numbers[:, whole * FP8_BLOCK :].mul_(each[:, whole:])
    return numbers


def check_codes(codes: Tensor) -> None:
    """Raises `KernelError` if one of the bytes is a NaN of e4m3."""
    if codes.numel() and int((codes & 127).max()) == 127:
        raise KernelError("a code is not a number")


def check_scales(scales: Tensor) -> None:
    """Raises `KernelError` if one of the scales of blocks is negative or not finite."""
    if not bool((scales.isfinite() & (scales >= 0)).all()):
        raise KernelError("the scale of a block is negative or not finite")


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


def quantize_fp8(rows: Tensor, shared: int | None = None) -> Fp8Weight:
    """`rows` [n, K] in fp8, in blocks of as many outputs as `shared_outputs` says unless told; see `Fp8Weight.put`
    and `Fp8Weight.empty`."""
    outputs, width = rows.shape
    weight = Fp8Weight.empty(outputs, width, shared or shared_outputs(outputs), rows.device)
    weight.put(0, rows)
    return weight


def shared_outputs(*parts: int) -> int:
    """Outputs of a block in fp8 if so many of each part lie side by side."""
    return math.gcd(FP8_BLOCK, *parts)


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


def _pieces(start: int, rows: Tensor, whole: int = 1) -> Iterator[tuple[slice, Tensor]]:
    """`rows`, some at a time, a multiple of `whole`, and where they belong if the first is `start`."""
    step = max(1, _PIECE // rows.shape[1] // whole) * whole
    for first in range(0, rows.shape[0], step):
        piece = rows[first : first + step]
        yield slice(start + first, start + first + piece.shape[0]), piece
