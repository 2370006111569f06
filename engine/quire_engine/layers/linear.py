"""Matrix products. `Dense` is one product, of whatever weight; parallel ones answer the same call."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from quire_kernels import Product


class Linear(Protocol):
    """x [T, in] to [T, out]."""

    def __call__(self, x: Tensor) -> Tensor: ...

    def parameters(self) -> Iterator[Tensor]:
        """Every tensor it holds, once."""


@dataclass(slots=True, frozen=True)
class Dense:
    """x · weightᵀ + bias, in the dtype of x."""

    product: Product

    def __call__(self, x: Tensor) -> Tensor:
        return self.product(x)

    def parameters(self) -> Iterator[Tensor]:
        yield from self.product.parameters()
