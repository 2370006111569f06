"""Weights as the checkpoint has them, in the engine's dtype."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from quire_engine.layers.linear import Dense, Linear
from quire_engine.weights import TensorSource
from quire_kernels import Clamp, Experts, Kernels, Product


@dataclass(slots=True, frozen=True)
class Plain:
    """`LinearMethod` without quantization: weights fused along the output."""

    weights: TensorSource
    kernels: Kernels

    def linear(self, prefix: str, parts: Sequence[str], *, bias: bool) -> Linear:
        weight = self.weights.stack([f"{prefix}.{part}.weight" for part in parts])
        added = self.weights.stack([f"{prefix}.{part}.bias" for part in parts]) if bias else None
        return Dense(self.kernels.product(weight, added))

    def outputs(self, name: str) -> int:
        return self.weights.shape(name)[0]

    def product(self, name: str) -> Product:
        return self.kernels.product(self.weights.tensor(name), None)

    def experts(self, gate: Sequence[str], up: Sequence[str], down: Sequence[str]) -> Experts:
        stacked = (self.weights.stack(names) for names in (gate, up, down))
        return self.kernels.experts(*(weight.view(len(gate), -1, weight.shape[1]) for weight in stacked))

    def turned_experts(self, at: str, clamp: Clamp | None) -> Experts:
        gate, up = self.weights.turned(f"{at}.gate_up_proj", 2)
        (down,) = self.weights.turned(f"{at}.down_proj")
        return self.kernels.experts(gate, up, down, biases=self.turned_biases(at), clamp=clamp)

    def turned_biases(self, at: str) -> tuple[Tensor, Tensor, Tensor]:
        """Of gate, up and down of all `turned_experts`, [E, I], [E, I] and [E, W]."""
        inward, outward = (self.weights.tensor(f"{at}.{name}_bias") for name in ("gate_up_proj", "down_proj"))
        return inward[:, 0::2].contiguous(), inward[:, 1::2].contiguous(), outward
