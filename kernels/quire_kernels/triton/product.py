"""Matrix products with a few rows, where all the time goes into reading the weight; cuBLAS does the others.

    out[m, n] = Σ_k x[m, k] · weight[n, k] + bias[n]

`_one_row` multiplies and adds number by number: a program has `block_n` outputs, its threads hold partial sums
side by side along k and add them up at the end. `_few_rows` gives weight tiles to the tensor cores with up to 16
rows of x as the narrow side. Either way a weight is read once, and sums are float32.

Legend: M rows of x, N outputs, K width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from quire_kernels.triton.launch import dependent, fetch, wait
from quire_kernels.tuning import Choices, Family, Trial, named

_FEW = 16
_LINE_BYTES, _LINES = 128, 16
"""Of the cache, and how many of each output's weights are fetched ahead."""


class Tiling(NamedTuple):
    """How a product is cut: outputs and numbers along k of a tile, and how many tiles are on their way at once."""

    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


CUBLAS = Tiling(0, 0, 0, 0)
"""No kernel of our own."""
ONE_ROW = tuple(
    Tiling(block_n, block_k, num_warps, num_stages)
    for block_n, block_k, num_warps in (
        (1, 2048, 4), (2, 1024, 4), (2, 2048, 4), (4, 512, 4), (4, 1024, 4), (8, 512, 4), (8, 256, 4),
        (16, 256, 4), (4, 512, 2), (8, 512, 8),
    )
    for num_stages in (1, 3)
)  # fmt: skip
"""Tilings worth trying with one row."""
FEW_ROWS = tuple(
    Tiling(block_n, block_k, num_warps, num_stages)
    for block_n, block_k, num_warps in (
        (16, 128, 2), (16, 256, 2), (16, 256, 4), (16, 512, 4), (32, 128, 4), (32, 256, 4), (64, 64, 4),
        (64, 128, 4), (128, 64, 4),
    )
    for num_stages in (3, 4, 5)
)  # fmt: skip
"""Tilings worth trying with 2 to 16 rows."""

RUNGS = (1, 8, 16)
"""Rows up to which a tiling is chosen; cuBLAS has kernels by tables, and our own is the same from 2 on."""
_TRIED = {
    True: ((4, 512, 2, 1), (2, 2048, 4, 1), (2, 2048, 4, 3), (8, 512, 4, 1), (8, 512, 8, 3)),
    False: ((64, 128, 4, 4), (32, 128, 4, 4), (16, 256, 4, 4)),
}
"""Tilings that are timed where an engine starts, with one row or some."""

_LIGHT = 1 << 23
"""Numbers of a weight up to which `_few_rows` beats cuBLAS, which does not come up early."""


def is_own(rows: int, outputs: int, width: int) -> bool:
    """Whether a kernel of our own serves a product: where a sweep on the device found that faster."""
    return rows == 1 or (rows <= _FEW and outputs * width <= _LIGHT and width <= 2 * outputs)


def tiling_for(rows: int, outputs: int, width: int) -> Tiling:
    """The tiling of a product, by what was fastest on an H200: with few outputs small tiles, so that each of its
    multiprocessors has several programs; with many, or with long rows, more numbers on their way in each.
    """
    if rows > 1:
        return Tiling(64, 128, 4, 4)
    if outputs < 3072 and width <= 4096:
        return Tiling(2, 2048, 4, 3)
    if width >= 8192:
        return Tiling(8, 512, 8, 3)
    if outputs >= 16384:
        return Tiling(2, 2048, 4, 1) if width >= 2048 else Tiling(8, 512, 4, 1)
    return Tiling(4, 512, 2, 1)


def default_for(rows: int, outputs: int, width: int, number_bytes: int, shared_bytes: int) -> Tiling:
    """The tiling of a product that was not timed here, or `CUBLAS`. No more of its tiles are on their way than a
    program may share on a multiprocessor."""
    if not is_own(rows, outputs, width):
        return CUBLAS
    found = tiling_for(rows, outputs, width)
    tile = (found.block_n + _FEW) * found.block_k * number_bytes
    return found if rows == 1 else found._replace(num_stages=max(1, min(found.num_stages, shared_bytes // tile)))


def candidates(rung: int, outputs: int, width: int, number_bytes: int, shared_bytes: int) -> tuple[Tiling, ...]:
    """The default with `rung` rows, and others worth trying."""
    default = default_for(rung, outputs, width, number_bytes, shared_bytes)
    return tuple(dict.fromkeys((default, *(Tiling(*sizes) for sizes in _TRIED[rung == 1]), CUBLAS)))


@triton.jit
def _one_row(
    out,
    x,
    weight,
    bias,
    outputs,
    width,
    BIAS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    first = tl.program_id(0) * BLOCK_N
    rows, ks = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    inside = first + rows < outputs
    here = weight + first.to(tl.int64) * width + (rows * width)[:, None] + ks[None, :]
    acc = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    # a weight is written by no kernel: its first tile is on its way before the last kernel has ended, and the
    # next one always before this one is needed; nobody reads it again before the next step
    w = tl.load(here, mask=inside[:, None] & (ks < width)[None, :], other=0.0, eviction_policy="evict_first")
    wait(DEPENDENT)
    for k in tl.range(0, width, BLOCK_K, num_stages=STAGES):
        following = k + BLOCK_K + ks < width
        coming = tl.load(
            here + k + BLOCK_K, mask=inside[:, None] & following[None, :], other=0.0, eviction_policy="evict_first"
        )
        number = tl.load(x + k + ks, mask=k + ks < width, other=0.0)
        acc += w.to(tl.float32) * number.to(tl.float32)[None, :]
        w = coming
    total = tl.sum(acc, 1)
    if BIAS:
        total += tl.load(bias + first + rows, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + first + rows, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _few_rows(
    out,
    x,
    weight,
    bias,
    tokens,
    outputs,
    width,
    x_stride,
    BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    LINE: tl.constexpr,
    LINES: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    first = tl.program_id(0) * BLOCK_N
    rows, ks, columns = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K), tl.arange(0, ROWS)
    inside = first + rows < outputs
    real = columns < tokens
    here = weight + first.to(tl.int64) * width + (rows * width)[:, None] + ks[None, :]
    numbers = x + (columns * x_stride)[None, :] + ks[:, None]
    acc = tl.zeros([BLOCK_N, ROWS], tl.float32)
    if (
        DEPENDENT
    ):  # a weight is written by no kernel: its first lines are on their way before the last one has ended
        lines = tl.minimum(tl.arange(0, LINES) * LINE, width - 1)
        near = tl.minimum(first + rows, outputs - 1).to(tl.int64) * width
        fetch(weight + near[:, None] + lines[None, :])
    wait(DEPENDENT)
    for k in tl.range(0, width, BLOCK_K):
        there = k + ks < width
        w = tl.load(here + k, mask=inside[:, None] & there[None, :], other=0.0, eviction_policy="evict_first")
        number = tl.load(numbers + k, mask=there[:, None] & real[None, :], other=0.0)
        acc = tl.dot(w, number, acc, input_precision="ieee")
    if BIAS:
        acc += tl.load(bias + first + rows, mask=inside, other=0.0).to(tl.float32)[:, None]
    places = out + (columns * outputs)[None, :] + (first + rows)[:, None]
    tl.store(places, acc.to(out.dtype.element_ty), mask=inside[:, None] & real[None, :])


def multiply(x: Tensor, weight: Tensor, bias: Tensor | None, tiling: Tiling) -> Tensor:
    """x · weightᵀ + bias, for 1 to 16 rows `x` [M, K], each dense, and `weight` [N, K], dense."""
    (rows, width), outputs = x.shape, weight.shape[0]
    out = torch.empty((rows, outputs), dtype=x.dtype, device=x.device)
    grid = (triton.cdiv(outputs, tiling.block_n),)
    added = weight if bias is None else bias
    if rows == 1:
        _one_row[grid](
            out, x, weight, added, outputs, width, BIAS=bias is not None, BLOCK_N=tiling.block_n,
            BLOCK_K=tiling.block_k, STAGES=tiling.num_stages, num_warps=tiling.num_warps, **dependent(),
        )  # fmt: skip
    else:
        _few_rows[grid](
            out, x, weight, added, rows, outputs, width, x.stride(0), BIAS=bias is not None, ROWS=_FEW,
            BLOCK_N=tiling.block_n, BLOCK_K=tiling.block_k, LINE=_LINE_BYTES // weight.element_size(),
            LINES=_LINES, num_warps=tiling.num_warps, num_stages=tiling.num_stages, **dependent(),
        )  # fmt: skip
    return out


@dataclass(slots=True, frozen=True, eq=False, weakref_slot=True)
class TritonProduct:
    """`Product` of the Triton back-end."""

    weight: Tensor
    bias: Tensor | None
    shared_bytes: int
    """That a program may share on a multiprocessor."""
    choices: Choices = field(default_factory=Choices)
    facts: tuple[str | int, ...] = field(init=False)

    def __post_init__(self) -> None:
        facts = (named(self.weight.dtype), *self.weight.shape, "plain" if self.bias is None else "bias")
        object.__setattr__(self, "facts", facts)

    def __call__(self, x: Tensor) -> Tensor:
        rows = x.shape[0]
        if rows > _FEW:
            return F.linear(x, self.weight, self.bias)
        rung = 1 if rows == 1 else 8 if rows <= 8 else 16
        found: Tiling | None = self.choices.get("product", self.facts, rung)
        (outputs, width), number_bytes = self.weight.shape, self.weight.element_size()
        return self.cut(x, found or default_for(rows, outputs, width, number_bytes, self.shared_bytes))

    def cut(self, x: Tensor, tiling: Tiling) -> Tensor:
        """As a call, by a tiling of one's own."""
        if tiling == CUBLAS:
            return F.linear(x, self.weight, self.bias)
        return multiply(x, self.weight, self.bias, tiling)

    def trials(self, rows: int) -> Iterator[Trial]:
        """Of up to `rows` rows."""
        outputs, width = self.weight.shape
        for below, rung in pairwise((0, *RUNGS)):
            if below < rows:
                some = (min(rung, rows), width)
                given = partial(torch.zeros, some, dtype=self.weight.dtype, device=self.weight.device)
                family = Family("product", self.facts, rung)
                tried = candidates(rung, outputs, width, self.weight.element_size(), self.shared_bytes)
                yield Trial(family, tried, given, self.cut, self.weight.nbytes)

    def wide(self, x: Tensor) -> Tensor:
        # rounded as the others are: a request must not see other logits because of who is beside it
        return self(x).float()

    def rows(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.weight)

    def parameters(self) -> Iterator[Tensor]:
        yield self.weight
        if self.bias is not None:
            yield self.bias
