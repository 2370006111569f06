"""Rows as codes of 8 bits: for products of whole numbers one plane of them, or two; or floats of 8 bits.

    s = max |x| / 127,   a[k] = round(x[k] / s),   b[k] = round((x[k] / s - a[k]) · 254)
    x[k] ≈ s · a[k],   or   x[k] ≈ s · (a[k] + b[k] / 254)

One plane is what `reference.bytes.quantize_rows` gives. Two have a row to 1/64,516 of its largest number.
Floats are those of e4m3, with a scale for each 128 numbers of a row, as `reference.bytes.quantize_groups` gives
them.

Whoever has a row in registers may round it at once: a norm or a gate that is followed by such a product
(`Rounding`) writes its codes beside its result, which saves every product of a layer but one a launch.

Legend: M rows, K numbers of a row, P planes.
"""

from __future__ import annotations

import weakref
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from quire_kernels.quantized import FP8_BLOCK, FP8_LARGEST
from quire_kernels.triton.bytes import code_of, e4m3_of, scale_of
from quire_kernels.triton.launch import dependent, wait

FLOATS = 8
"""Stands for a number of planes, where codes are floats: one plane."""
_FLOATS = tl.constexpr(FLOATS)
_GROUP, _LARGEST = tl.constexpr(FP8_BLOCK), tl.constexpr(FP8_LARGEST)


class Codes(NamedTuple):
    """Rows in 8 bits."""

    planes: Tensor
    """[M · P, K] int8, the planes of a row one after the other; of floats the bits."""
    scales: Tensor
    """[M] float32; of floats [M, ⌈K / 128⌉]."""


class Rounding:
    """What the products of a model want of the rows that norms and gates give them, and the codes given last."""

    def __init__(self) -> None:
        self.planes = 0
        """Of codes, or `FLOATS`; 0 if nothing is rounded."""
        self.most_rows = 0
        """More rows than these are multiplied as they are."""
        self._of: weakref.ref[Tensor] | None = None
        self._codes: Codes | None = None

    def want(self, planes: int, most_rows: int) -> None:
        """A product wants codes of up to so many rows; all of a model want as many planes."""
        self.planes, self.most_rows, self._codes = planes, max(self.most_rows, most_rows), None

    def beside(self, x: Tensor) -> Codes | None:
        """Room for codes of the rows `x`, which whoever writes `x` fills, too; None if nobody wants them."""
        if not self.planes or x.shape[0] > self.most_rows:
            return None
        self._codes = empty_codes(x, self.planes)
        self._of = weakref.ref(x)
        return self._codes

    def of(self, x: Tensor, planes: int) -> Codes:
        """Codes of `x`: those that were written with it, handed out once, or new ones."""
        kept, self._codes = self._codes, None
        if kept is not None and self._of is not None and self._of() is x and self.planes == planes:
            return kept
        return round_rows(x, planes)


def empty_codes(x: Tensor, planes: int) -> Codes:
    """Room for codes of `x` [M, K]."""
    rows, width = x.shape
    count = rows if planes == FLOATS else rows * planes
    scales = (rows, -(-width // FP8_BLOCK)) if planes == FLOATS else (rows,)
    return Codes(
        torch.empty((count, width), dtype=torch.int8, device=x.device),
        torch.empty(scales, dtype=torch.float32, device=x.device),
    )


def round_rows(x: Tensor, planes: int = 1) -> Codes:
    """Codes of `x` [M, K], each row dense."""
    rows, width = x.shape
    codes = empty_codes(x, planes)
    block = triton.next_power_of_2(width)
    _round_rows[(rows,)](
        *codes, x, width, x.stride(0), PLANES=planes, BLOCK=block,
        num_warps=min(16, max(1, block // 256)), **dependent(),
    )  # fmt: skip
    return codes


@triton.jit
def floats_of(x):
    """Rows [R, D] float32: the bits of codes of e4m3, int8, and scales [R] float32."""
    size = tl.abs(x)
    finite = size < float("inf")
    most = tl.max(tl.where(finite, size, 0.0), 1)
    inverse, scale = scale_of(most, tl.max(tl.where(finite, 0, 1), 1), _LARGEST)
    return e4m3_of(tl.where(finite, x, 0.0) * inverse[:, None]).to(tl.int8), scale


@triton.jit
def write_codes(codes, scales, row, number, width, PLANES: tl.constexpr, BLOCK: tl.constexpr):
    """Rounds one row, `number` [BLOCK] float32, zero behind its `width` numbers. A row, or of floats what shares a
    scale, with a number that is not finite has NaN for its scale."""
    ks = tl.arange(0, BLOCK)
    inside = ks < width
    if PLANES == _FLOATS:
        GROUPS: tl.constexpr = (BLOCK + _GROUP - 1) // _GROUP
        grouped = tl.reshape(number, (GROUPS, BLOCK // GROUPS))
        code, scale = floats_of(grouped)
        tl.store(codes + row * width + ks, tl.reshape(code, (BLOCK,)), mask=inside)
        groups, count = tl.arange(0, GROUPS), tl.cdiv(width, _GROUP)
        tl.store(scales + row * count + groups, scale, mask=groups < count)
    else:
        size = tl.abs(number)
        finite = size < float("inf")
        most = tl.max(tl.where(finite, size, 0.0), 0)
        inverse, scale = scale_of(most, tl.max(tl.where(finite, 0, 1), 0))
        scaled = tl.where(finite, number, 0.0) * inverse
        code = code_of(scaled)
        here = codes + row * PLANES * width + ks
        tl.store(here, code.to(tl.int8), mask=inside)
        if PLANES == 2:
            left = code_of((scaled - code.to(tl.float32)) * 254.0)
            tl.store(here + width, left.to(tl.int8), mask=inside)
        tl.store(scales + row, scale)


@triton.jit
def _round_rows(
    codes,
    scales,
    x,
    width,
    stride,
    PLANES: tl.constexpr,
    BLOCK: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    row, ks = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    wait(DEPENDENT)
    number = tl.load(x + row * stride + ks, mask=ks < width, other=0.0).to(tl.float32)
    write_codes(codes, scales, row, number, width, PLANES, BLOCK)
