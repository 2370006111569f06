"""The gated MLP: down(act(gate(x)) · up(x))."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import Tensor

from quire_engine.layers.linear import Linear


@dataclass(slots=True, frozen=True)
class GatedMLP:
    """`gate_up` gives both halves at once, gate first; `act` is the operation that multiplies them."""

    gate_up: Linear
    down: Linear
    act: Callable[[Tensor], Tensor]

    def __call__(self, x: Tensor) -> Tensor:
        """[T, W] to [T, W]."""
        return self.down(self.act(self.gate_up(x)))

    def parameters(self) -> Iterator[Tensor]:
        yield from self.gate_up.parameters()
        yield from self.down.parameters()
