"""Matrix products by torch, with the weight as it is.

A quantised product rounds each row of the input to codes a of 8 bits by a scale s of its own (`bytes`) and
multiplies whole numbers. Their sums are exact here: float32 holds each sum of at most 1024 products of two
8-bit numbers, in whatever order, because none is above 2^24; longer ones are added up in int32. With a scale for
each group of inputs the sums end with the group, and what they stand for is added in float32, in order.

    int8    out[n] = (Σ_k a[k] · w[n, k]) · s · scales[n] + bias[n]
    int4    out[n] = (Σ_groups (Σ_k in group a[k] · w[n, k]) · scales[n, group]) · s + bias[n]

    fp8     out[n] = Σ_groups (Σ_k in group a[k] · w[n, k]) · s[group] · scales[n / b, group] + bias[n]

In fp8 the codes of 128 inputs have a scale of their own; products of two are exact in float32, their sums are not.

Floating-point activations meet the dequantised weight in float32. Weights are widened a piece at a time.

Legend: T tokens, N outputs, K inputs, G groups, g inputs of a group, b outputs of a block.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from quire_kernels.errors import KernelError
from quire_kernels.mxfp4 import Mxfp4Weight
from quire_kernels.quantized import (
    FP8,
    FP8_BLOCK,
    Activations,
    Fp8Weight,
    Int4Weight,
    Int8Weight,
    QuantizedWeight,
)
from quire_kernels.reference.bytes import quantize_groups, quantize_rows

WIDENED = 1 << 22
"""Numbers of a weight that are widened at a time."""

_EXACT = 1024
"""Products of two 8-bit numbers whose sum float32 holds: 1024 · 127 · 127 < 2^24."""


@dataclass(slots=True, frozen=True)
class PlainProduct:
    """`Product` of the reference back-end."""

    weight: Tensor
    bias: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)

    def wide(self, x: Tensor) -> Tensor:
        return self(x).float()

    def rows(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.weight)

    def parameters(self) -> Iterator[Tensor]:
        yield self.weight
        if self.bias is not None:
            yield self.bias


@dataclass(slots=True, frozen=True)
class QuantizedProduct:
    """`Product` with a quantised weight."""

    weight: QuantizedWeight
    bias: Tensor | None
    """[N] float32."""
    round_input: bool
    dtype: torch.dtype

    @classmethod
    def of(
        cls, weight: QuantizedWeight, bias: Tensor | None, activations: Activations, dtype: torch.dtype
    ) -> QuantizedProduct:
        """See `Kernels.quantized_product`."""
        check_activations(weight, activations)
        return cls(weight, None if bias is None else bias.float(), activations != "float", dtype)

    def __call__(self, x: Tensor) -> Tensor:
        return self.wide(x).to(self.dtype)

    def wide(self, x: Tensor) -> Tensor:
        multiply = self._rounded if self.round_input else self._floating
        out = multiply(x.float())
        return out if self.bias is None else out.add_(self.bias)

    def rows(self, ids: Tensor) -> Tensor:
        return self.weight.part(ids).dequantized().to(self.dtype)

    def parameters(self) -> Iterator[Tensor]:
        yield self.weight.values
        yield self.weight.scales
        if self.bias is not None:
            yield self.bias

    def _floating(self, x: Tensor) -> Tensor:
        pieces = _pieces(*self.weight.shape)
        return torch.cat([x @ self.weight.part(piece).dequantized().T for piece in pieces], -1)

    def _rounded(self, x: Tensor) -> Tensor:
        weight, pieces = self.weight, _pieces(*self.weight.shape)
        if isinstance(weight, Fp8Weight):
            codes, scales = quantize_groups(x)
            wide = codes.view(FP8).float()
            return torch.cat([_blocked(wide, scales, weight.part(piece)) for piece in pieces], -1)
        codes, scales = quantize_rows(x)
        wide = codes.float()
        if isinstance(weight, Int8Weight):
            sums = torch.cat([_exact(wide, weight.values[piece].float()) for piece in pieces], -1)
            return sums.float() * scales.unsqueeze(-1) * weight.scales
        if isinstance(weight, Int4Weight):
            sums = torch.cat([_grouped(wide, weight.part(piece)) for piece in pieces], -1)
            return sums * scales.unsqueeze(-1)
        raise KernelError(f"{type(weight).__name__} has no products with rounded inputs")


def check_activations(weight: QuantizedWeight, activations: Activations) -> None:
    """Raises `KernelError` if nothing multiplies the two: each format has its own way to round an input."""
    rounded = "fp8" if isinstance(weight, Fp8Weight) else "" if isinstance(weight, Mxfp4Weight) else "int8"
    if activations not in ("float", rounded):
        raise KernelError(f"{type(weight).__name__} has no products with an input in {activations}")


def _pieces(outputs: int, width: int) -> Iterator[slice]:
    """Outputs of a weight, some at a time."""
    step = max(1, WIDENED // width)
    return (slice(start, start + step) for start in range(0, outputs, step))


def _exact(x: Tensor, weight: Tensor) -> Tensor:
    """x · weightᵀ of whole numbers in float32 of at most 8 bits, [T, N] int32."""
    parts = zip(torch.split(x, _EXACT, -1), torch.split(weight, _EXACT, -1), strict=True)
    return torch.stack([(left @ right.T).to(torch.int32) for left, right in parts]).sum(0, dtype=torch.int32)


def _grouped(x: Tensor, weight: Int4Weight) -> Tensor:
    """Sums of each group times its scale, added in order. [T, N] float32."""
    scales, size = weight.scales.float(), weight.group_size
    out = torch.zeros(x.shape[0], weight.shape[0], device=x.device)
    parts = zip(torch.split(x, size, -1), torch.split(weight.codes().float(), size, -1), strict=True)
    for group, (left, right) in enumerate(parts):
        out.addcmul_(left @ right.T, scales[:, group])
    return out


def _blocked(x: Tensor, scales: Tensor, weight: Fp8Weight) -> Tensor:
    """Codes [T, K] with `scales` [T, groups] times those of a weight: sums of each group times both scales, added
    in order. [T, N] float32."""
    out = torch.zeros(x.shape[0], weight.shape[0], device=x.device)
    codes = weight.values.view(FP8).float()
    each = weight.scales.repeat_interleave(weight.shared, 0)[: weight.shape[0]]
    parts = zip(torch.split(x, FP8_BLOCK, -1), torch.split(codes, FP8_BLOCK, -1), strict=True)
    for group, (left, right) in enumerate(parts):
        out += (left @ right.T) * (scales[:, group].unsqueeze(-1) * each[:, group])
    return out
