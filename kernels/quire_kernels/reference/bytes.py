"""Rows of numbers in 8 bits with a scale each, and the layout in which a cache keeps them.

    s = max |x| / most,   a[d] = round(x[d] · most / max |x|),   x[d] ≈ a[d] · s

where `most` and what is rounded to are those of the format: whole numbers to 127 in int8; in e4m3 (fp8) floats of
four bits of exponent and three of fraction, whose largest is 448.

Legend: D numbers of a row.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from quire_kernels.quantized import FP8, FP8_BLOCK, FP8_LARGEST

E4M3 = FP8

LARGEST = {torch.int8: 127.0, E4M3: FP8_LARGEST}
"""What the largest number of a row becomes, in each format that has scales."""

SCALE_BYTES = 4
"""Of a row in a cache: its scale, float32, behind its numbers."""

_NOTHING = 1e-30
"""A row whose largest number is below this is taken for zero: 127 divided by less may be infinite."""


def quantize_rows(x: Tensor, kept: torch.dtype = torch.int8) -> tuple[Tensor, Tensor]:
    """Rows [..., D] float32 as codes [..., D] in `kept`, one of `LARGEST`, and their scales [...] float32.

    A row with a number that is not finite has NaN for its scale: what it stands for is NaN.
    """
    largest = LARGEST[kept]
    most = x.abs().amax(-1)
    usable = most.isfinite() & (most >= _NOTHING)
    # by `full_like`, for torch computes 127 / most by a reciprocal, which rounds twice
    inverse = torch.where(usable, torch.full_like(most, largest) / most, 0.0)
    scaled = torch.where(usable.unsqueeze(-1), x * inverse.unsqueeze(-1), 0.0)
    codes = (scaled.round_() if kept == torch.int8 else scaled).clamp_(-largest, largest).to(kept)
    scales = torch.where(usable, most / largest, torch.where(most.isfinite(), 0.0, torch.nan))
    return codes, scales


def quantize_groups(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows [T, D] float32 in e4m3, each 128 numbers with a scale of their own: the bits of their codes [T, D]
    uint8, and scales [T, ⌈D / 128⌉] float32."""
    count, width = x.shape
    codes, scales = quantize_rows(F.pad(x, (0, -width % FP8_BLOCK)).view(count, -1, FP8_BLOCK), E4M3)
    return codes.view(torch.uint8).view(count, -1)[:, :width].contiguous(), scales


def rounded_rows(x: Tensor, kept: torch.dtype = torch.int8) -> Tensor:
    """What rows [..., D] stand for once they are quantized, float32."""
    codes, scales = quantize_rows(x.float(), kept)
    return codes.float() * scales.unsqueeze(-1)


def to_bytes(x: Tensor, kept: torch.dtype = torch.int8) -> Tensor:
    """Rows [..., D] as a cache in 8 bits keeps them, [..., D + `SCALE_BYTES`] in `kept`."""
    codes, scales = quantize_rows(x.float(), kept)
    return torch.cat([part.view(torch.uint8) for part in (codes, scales.unsqueeze(-1))], -1).view(kept)


def from_bytes(kept: Tensor) -> Tensor:
    """The reverse, [..., D] float32."""
    return kept[..., :-SCALE_BYTES].float().mul_(kept[..., -SCALE_BYTES:].contiguous().view(torch.float32))
