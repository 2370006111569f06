"""The experts of a layer over products in the native order: one native operation.

Legend: see `quire_kernels`.
"""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from quire_kernels.cpu.native import FORMATS, ExpertsCall, Linear, Native, NotRecordable
from quire_kernels.cpu.products import Packed, PackedQuantized
from quire_kernels.errors import KernelError
from quire_kernels.reference.experts import EachExpert, GatedProducts

if TYPE_CHECKING:
    from quire_kernels import Clamp, Experts


def native_experts(native: Native, experts: Sequence[GatedProducts], clamp: Clamp | None = None) -> Experts:
    """Those of native products as one operation, others one by one. Raises `KernelError` if they differ."""
    given = list(itertools.chain.from_iterable(experts))
    products = [product for product in given if isinstance(product, Packed | PackedQuantized)]
    if len(products) < len(given):
        return _OneByOne(native, EachExpert(experts, clamp))
    gate = products[0].call
    inward, outward = (gate.outputs, gate.width), (gate.width, gate.outputs)
    shapes = itertools.cycle((inward, inward, outward))
    kind = (type(gate), gate.format, getattr(gate, "group", 0), getattr(gate, "round_input", 0))
    for product, shape in zip(products, shapes, strict=False):
        call = product.call
        found = (type(call), call.format, getattr(call, "group", 0), getattr(call, "round_input", 0))
        if found != kind or (call.outputs, call.width) != shape:
            raise KernelError(f"experts differ: {kind} {shape} and {found} {(call.outputs, call.width)}")
    calls: ctypes.Array[Any] = (type(gate) * len(products))()
    for at, product in enumerate(products):
        calls[at] = product.call
    place = "floats" if isinstance(gate, Linear) else "quantized"
    common = ExpertsCall(
        format=gate.format, width=gate.width, inner=gate.outputs, experts=len(experts),
        alpha=0.0 if clamp is None else clamp.alpha, limit=0.0 if clamp is None else clamp.limit,
        **{place: ctypes.addressof(calls)},
    )  # fmt: skip
    dtype = next(dtype for dtype, number in FORMATS.items() if number == gate.format)
    return PackedExperts(native, products, dtype, calls, common)


@dataclass(slots=True, frozen=True)
class PackedExperts:
    """`Experts` as one native operation."""

    native: Native
    products: Sequence[Packed | PackedQuantized]
    """Gate, up and down of each, one after the other."""
    dtype: torch.dtype
    calls: ctypes.Array[Any]
    """A `Linear` or `QuantizedLinear` of each product. The operation reads them where they lie."""
    call: ExpertsCall
    """What every call has in common, with room for the rest: calls do not overlap."""

    def __call__(self, x: Tensor, choice: Tensor, shares: Tensor) -> Tensor:
        native, call, (tokens, width) = self.native, self.call, x.shape
        if x.dtype != self.dtype or width != call.width or x.stride(1) != 1:
            raise KernelError(f"x is {x.dtype} {tuple(x.shape)}, the experts are of {self.dtype} [{call.width}]")
        out = native.empty(x.shape, x.dtype)
        call.rows, call.x, call.stride, call.chosen = tokens, native.address(x), x.stride(0), choice.shape[1]
        call.choice, call.shares, call.out = native.address(choice), native.address(shares), out.data_ptr()
        native.run(call)
        return out

    def parameters(self) -> Iterator[Tensor]:
        for product in self.products:
            yield from product.parameters()


@dataclass(slots=True, frozen=True)
class _OneByOne:
    """`Experts` with an odd number of inputs."""

    native: Native
    experts: EachExpert

    def __call__(self, x: Tensor, choice: Tensor, shares: Tensor) -> Tensor:
        if self.native.recording is not None:
            raise NotRecordable("experts of torch's")
        return self.experts(x, choice, shares)

    def parameters(self) -> Iterator[Tensor]:
        return self.experts.parameters()
