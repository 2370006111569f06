"""Matrix products by torch, with the weight as it is."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor


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
