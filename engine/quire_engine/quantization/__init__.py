"""How a layer gets its linear: it asks a `LinearMethod`, by the name under which the checkpoint stores it.

A method decides what is read and what class multiplies by it, so a quantised or a tensor-parallel model differs
from a plain one in the method alone. This version has `Plain`; `quire_schemas.checkpoint` refuses checkpoints
that would need another.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from quire_engine.layers.linear import Dense, Linear
from quire_engine.weights import TensorSource
from quire_kernels import Kernels


class LinearMethod(Protocol):
    """Builds the linears of one model."""

    def linear(self, prefix: str, parts: Sequence[str], *, bias: bool) -> Linear:
        """The projections `prefix`.`part` as one linear whose outputs lie side by side in that order."""


class Plain:
    """Weights as they are, fused along the output."""

    def __init__(self, weights: TensorSource, kernels: Kernels) -> None:
        self._weights = weights
        self._kernels = kernels

    def linear(self, prefix: str, parts: Sequence[str], *, bias: bool) -> Linear:
        weight = self._weights.stack([f"{prefix}.{part}.weight" for part in parts])
        added = self._weights.stack([f"{prefix}.{part}.bias" for part in parts]) if bias else None
        return Dense(self._kernels.product(weight, added))
