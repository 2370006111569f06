"""RMS norm, alone and after a residual is added to.

    out[t] = x[t] / sqrt(mean(x[t]²) + eps) · weight

A row is one program's, held in registers: it is read once and written once. Sums are float32.

Legend: T tokens, W width of a row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from quire_kernels.triton.launch import dependent, wait
from quire_kernels.triton.rounding import Rounding, write_codes


@triton.jit
def _rms_norm(
    out,
    x,
    residual,
    weight,
    codes,
    scales,
    eps,
    stride,
    residual_stride,
    W: tl.constexpr,
    BLOCK_W: tl.constexpr,
    ADD: tl.constexpr,
    PLANES: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    dims = tl.arange(0, BLOCK_W)
    inside = dims < W
    scale = tl.load(weight + dims, mask=inside, other=0.0).to(tl.float32)
    wait(DEPENDENT)
    number = tl.load(x + row * stride + dims, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        kept = residual + row * residual_stride + dims
        # the sum that the next layer will read is the one that is normed
        total = (number + tl.load(kept, mask=inside, other=0.0).to(tl.float32)).to(residual.dtype.element_ty)
        tl.store(kept, total, mask=inside)
        number = total.to(tl.float32)
    square = tl.sum(number * number, 0) / W
    result = number * tl.rsqrt(square + eps) * scale
    given = result.to(out.dtype.element_ty)
    tl.store(out + row * W + dims, given, mask=inside)
    if PLANES > 0:
        write_codes(codes, scales, row, given.to(tl.float32), W, PLANES, BLOCK_W)


def rms_norm(x: Tensor, weight: Tensor, eps: float, rounding: Rounding) -> Tensor:
    """See `Kernels.rms_norm`."""
    return _launch(x, None, weight, eps, rounding)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float, rounding: Rounding) -> Tensor:
    """See `Kernels.add_rms_norm`."""
    return _launch(x, residual, weight, eps, rounding)


def _launch(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, rounding: Rounding) -> Tensor:
    rows, width = x.shape
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    block = triton.next_power_of_2(width)
    kept = x if residual is None else residual
    codes = rounding.beside(out)
    _rms_norm[(rows,)](
        out,
        x,
        kept,
        weight,
        *(codes or (out, out)),
        eps,
        x.stride(0),
        kept.stride(0),
        W=width,
        BLOCK_W=block,
        ADD=residual is not None,
        PLANES=0 if codes is None else rounding.planes,
        # eight numbers a thread: 16 bytes of a 16-bit format
        num_warps=min(16, max(1, block // 256)),
        **dependent(),
    )
    return out
