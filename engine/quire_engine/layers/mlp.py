"""The gated MLP: down(silu(gate(x)) · up(x))."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from quire_engine.layers.linear import Linear
from quire_kernels import Kernels


@dataclass(slots=True, frozen=True)
class GatedMLP:
    """`gate_up` gives both halves at once, gate first."""

    gate_up: Linear
    down: Linear
    kernels: Kernels

    def __call__(self, x: Tensor) -> Tensor:
        """[T, W] to [T, W]."""
        return self.down(self.kernels.silu_mul(self.gate_up(x)))

    def parameters(self) -> Iterator[Tensor]:
        yield from self.gate_up.parameters()
        yield from self.down.parameters()
