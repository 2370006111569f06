"""Rows of numbers in 8 bits with a scale each, and the layout in which a cache keeps them.

    s = max |x| / 127,   a[d] = round(x[d] · 127 / max |x|),   x[d] ≈ a[d] · s

Legend: D numbers of a row.
"""

from __future__ import annotations

import torch
from torch import Tensor

SCALE_BYTES = 4
"""Of a row in a cache: its scale, float32, behind its numbers."""

_NOTHING = 1e-30
"""A row whose largest number is below this is taken for zero: 127 divided by less may be infinite."""


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows [..., D] float32 as [..., D] int8, -127 to 127, and their scales [...] float32.

    A row with a number that is not finite has NaN for its scale: what it stands for is NaN.
    """
    most = x.abs().amax(-1)
    usable = most.isfinite() & (most >= _NOTHING)
    # by `full_like`, for torch computes 127 / most by a reciprocal, which rounds twice
    inverse = torch.where(usable, torch.full_like(most, 127.0) / most, 0.0)
    codes = torch.where(usable.unsqueeze(-1), x * inverse.unsqueeze(-1), 0.0).round_().clamp_(-127, 127)
    scales = torch.where(usable, most / 127.0, torch.where(most.isfinite(), 0.0, torch.nan))
    return codes.to(torch.int8), scales


def rounded_rows(x: Tensor) -> Tensor:
    """What rows [..., D] stand for once they are quantized, float32."""
    codes, scales = quantize_rows(x.float())
    return codes.float() * scales.unsqueeze(-1)


def to_bytes(x: Tensor) -> Tensor:
    """Rows [..., D] as a cache in 8 bits keeps them, [..., D + `SCALE_BYTES`] int8."""
    codes, scales = quantize_rows(x.float())
    return torch.cat((codes, scales.unsqueeze(-1).view(torch.int8)), -1)


def from_bytes(kept: Tensor) -> Tensor:
    """The reverse, [..., D] float32."""
    return kept[..., :-SCALE_BYTES].float().mul_(kept[..., -SCALE_BYTES:].contiguous().view(torch.float32))
