"""Products with weights in the native order.

Legend: see `quire_kernels`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from quire_kernels.cpu.native import (
    FORMATS,
    Linear,
    LinearLargest,
    Native,
    NotRecordable,
    QuantizedLargest,
    QuantizedLinear,
    UnpackQuantized,
    UnpackRows,
)
from quire_kernels.errors import KernelError
from quire_kernels.reference.product import PlainProduct


@dataclass(slots=True, frozen=True)
class Packed:
    """`Product` over a weight in a float format."""

    native: Native
    weight: Tensor
    """[outputs, width] in name: the numbers lie in another order."""
    bias: Tensor | None
    call: Linear
    """What every call has in common, with room for the rest: calls do not overlap."""

    def __call__(self, x: Tensor) -> Tensor:
        return _multiply(self.native, self.call, x, self.weight.dtype, x.dtype)

    def wide(self, x: Tensor) -> Tensor:
        return _multiply(self.native, self.call, x, self.weight.dtype, torch.float32)

    def largest(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """As of `Kernels.largest`, of `wide(x)`."""
        return _largest(LinearLargest, self.native, self.call, x, self.weight.dtype)

    def rows(self, ids: Tensor) -> Tensor:
        outputs, width = self.weight.shape
        out = self.native.empty((ids.shape[0], width), self.weight.dtype)
        self.native.run(
            UnpackRows(
                ids.shape[0], FORMATS[out.dtype], self.weight.data_ptr(), outputs, width,
                self.native.address(ids), out.data_ptr(),
            )
        )  # fmt: skip
        return out

    def parameters(self) -> Iterator[Tensor]:
        yield self.weight
        if self.bias is not None:
            yield self.bias


@dataclass(slots=True, frozen=True)
class PackedQuantized:
    """`Product` over a quantised weight."""

    native: Native
    values: Tensor
    scales: Tensor
    group_size: int
    """Inputs that share a scale; 0 in 8 bits, where an output has one."""
    shape: tuple[int, int]
    """Outputs and width."""
    bias: Tensor | None
    """[outputs] float32."""
    dtype: torch.dtype
    call: QuantizedLinear
    """As of `Packed`."""

    def __call__(self, x: Tensor) -> Tensor:
        return _multiply(self.native, self.call, x, self.dtype, self.dtype)

    def wide(self, x: Tensor) -> Tensor:
        return _multiply(self.native, self.call, x, self.dtype, torch.float32)

    def largest(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """As of `Packed`."""
        return _largest(QuantizedLargest, self.native, self.call, x, self.dtype)

    def rows(self, ids: Tensor) -> Tensor:
        outputs, width = self.shape
        out = self.native.empty((ids.shape[0], width), self.dtype)
        self.native.run(
            UnpackQuantized(
                ids.shape[0], FORMATS[out.dtype], self.values.data_ptr(), self.scales.data_ptr(), self.group_size,
                outputs, width, self.native.address(ids), out.data_ptr(),
            )
        )  # fmt: skip
        return out

    def parameters(self) -> Iterator[Tensor]:
        yield self.values
        yield self.scales
        if self.bias is not None:
            yield self.bias


@dataclass(slots=True, frozen=True)
class ByTorch:
    """`Product` of an odd number of inputs: pairs of them would need another byte or two."""

    native: Native
    product: PlainProduct

    def __call__(self, x: Tensor) -> Tensor:
        return self._torch()(x)

    def wide(self, x: Tensor) -> Tensor:
        return self._torch().wide(x)

    def rows(self, ids: Tensor) -> Tensor:
        return self._torch().rows(ids)

    def parameters(self) -> Iterator[Tensor]:
        return self.product.parameters()

    def _torch(self) -> PlainProduct:
        if self.native.recording is not None:
            raise NotRecordable("a product of torch's")
        return self.product


def _multiply(
    native: Native, call: Linear | QuantizedLinear, x: Tensor, dtype: torch.dtype, out_dtype: torch.dtype
) -> Tensor:
    """The product that `call` describes, whose input is of `dtype`."""
    _check(call, x, dtype)
    out = native.empty((x.shape[0], call.outputs), out_dtype)
    call.x, call.stride, call.rows = native.address(x), x.stride(0), x.shape[0]
    call.out_format, call.out = FORMATS[out_dtype], out.data_ptr()
    native.run(call)
    return out


def _largest(
    kind: type[LinearLargest | QuantizedLargest],
    native: Native,
    call: Linear | QuantizedLinear,
    x: Tensor,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    _check(call, x, dtype)
    rows = x.shape[0]
    values, places = torch.empty(rows), torch.empty(rows, dtype=torch.int64)
    native.run(kind(rows, ctypes.addressof(call), x.data_ptr(), x.stride(0), values.data_ptr(), places.data_ptr()))
    return values, places


def _check(call: Linear | QuantizedLinear, x: Tensor, dtype: torch.dtype) -> None:
    if x.dtype != dtype or x.shape[1] != call.width or x.stride(1) != 1:
        raise KernelError(
            f"x is {x.dtype} {tuple(x.shape)}, the product of {dtype} [{call.outputs}, {call.width}]"
        )
