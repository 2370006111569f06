"""By how much heads are turned.

Legend: T tokens, D head size.
"""

from __future__ import annotations

import torch
from torch import Tensor


def turns(positions: Tensor, frequencies: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    """See `Kernels.turns`."""
    angles = positions.float()[:, None] * frequencies
    cos, sin = angles.cos().mul_(factor), angles.sin_().mul_(factor)
    return torch.cat((cos, cos), -1)[:, None], torch.cat((-sin, sin), -1)[:, None]
