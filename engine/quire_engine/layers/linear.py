"""Matrix products. `Dense` keeps its weight as it is; quantised and parallel ones answer the same call."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch.nn.functional as F
from torch import Tensor


class Linear(Protocol):
    """x [T, in] to [T, out]."""

    def __call__(self, x: Tensor) -> Tensor: ...

    def parameters(self) -> Iterator[Tensor]:
        """Every tensor it holds, once."""


@dataclass(slots=True, frozen=True)
class Dense:
    """x · weightᵀ + bias, in the weight's dtype."""

    weight: Tensor
    """[out, in]."""
    bias: Tensor | None = None
    """[out]."""

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)

    def parameters(self) -> Iterator[Tensor]:
        yield self.weight
        if self.bias is not None:
            yield self.bias
