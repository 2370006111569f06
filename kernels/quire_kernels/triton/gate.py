"""The gate of an MLP: out = silu(gate) · up, silu(g) = g / (1 + exp(-g)); or gelu in its place,

    gelu(g) = g / 2 · (1 + tanh(u)) = g / (1 + exp(-2u)),   u = √(2 / π) · (g + 0.044715 · g³)

Legend: T tokens, I width between the two halves of an MLP.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from quire_kernels.triton.launch import dependent, wait
from quire_kernels.triton.rounding import Rounding, write_codes

_BLOCK = 1024


@triton.jit
def _through(gate, GELU: tl.constexpr):
    away = -gate
    if GELU:
        away = gate * (-1.5957691216057308 - 0.07135481627260025 * gate * gate)
    return gate / (1.0 + tl.exp(away))


@triton.jit
def _mul(out, gate_up, stride, width, GELU: tl.constexpr, BLOCK: tl.constexpr, DEPENDENT: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    dims = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = dims < width
    here = gate_up + row * stride + dims
    wait(DEPENDENT)
    gate = tl.load(here, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(here + width, mask=inside, other=0.0).to(tl.float32)
    result = _through(gate, GELU) * up
    tl.store(out + row * width + dims, result.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _mul_row(
    out,
    codes,
    scales,
    gate_up,
    stride,
    width,
    GELU: tl.constexpr,
    BLOCK: tl.constexpr,
    PLANES: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """Rows whole, and their codes."""
    row, dims = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    inside = dims < width
    here = gate_up + row * stride + dims
    wait(DEPENDENT)
    gate = tl.load(here, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(here + width, mask=inside, other=0.0).to(tl.float32)
    given = (_through(gate, GELU) * up).to(out.dtype.element_ty)
    tl.store(out + row * width + dims, given, mask=inside)
    write_codes(codes, scales, row, given.to(tl.float32), width, PLANES, BLOCK)


def silu_mul(gate_up: Tensor, rounding: Rounding) -> Tensor:
    """See `Kernels.silu_mul`."""
    return _launch(gate_up, rounding, gelu=False)


def gelu_mul(gate_up: Tensor, rounding: Rounding) -> Tensor:
    """See `Kernels.gelu_mul`."""
    return _launch(gate_up, rounding, gelu=True)


def _launch(gate_up: Tensor, rounding: Rounding, *, gelu: bool) -> Tensor:
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty((rows, width), dtype=gate_up.dtype, device=gate_up.device)
    codes = rounding.beside(out)
    if codes is not None:
        block = triton.next_power_of_2(width)
        _mul_row[(rows,)](
            out, *codes, gate_up, gate_up.stride(0), width, GELU=gelu, BLOCK=block, PLANES=rounding.planes,
            num_warps=min(16, max(1, block // 256)), **dependent(),
        )  # fmt: skip
        return out
    _mul[(rows, triton.cdiv(width, _BLOCK))](
        out, gate_up, gate_up.stride(0), width, GELU=gelu, BLOCK=_BLOCK, num_warps=4, **dependent()
    )
    return out
