"""Weights as the checkpoint has them, in the engine's dtype."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from quire_engine.layers.linear import Dense, Linear
from quire_engine.weights import TensorSource
from quire_kernels import Kernels, Product


@dataclass(slots=True, frozen=True)
class Plain:
    """`LinearMethod` without quantization: weights fused along the output."""

    weights: TensorSource
    kernels: Kernels

    def linear(self, prefix: str, parts: Sequence[str], *, bias: bool) -> Linear:
        weight = self.weights.stack([f"{prefix}.{part}.weight" for part in parts])
        added = self.weights.stack([f"{prefix}.{part}.bias" for part in parts]) if bias else None
        return Dense(self.kernels.product(weight, added))

    def products(self, names: Sequence[str]) -> list[Product]:
        weights = self.weights.stack(names).chunk(len(names))
        return [self.kernels.product(weight, None) for weight in weights]
