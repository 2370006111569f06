"""Experts in MXFP4 as the checkpoint has them; all else is `Plain`'s."""

from __future__ import annotations

from dataclasses import dataclass

from quire_engine.quantization.plain import Plain
from quire_engine.weights import Weights
from quire_kernels import Clamp, Experts


@dataclass(slots=True, frozen=True)
class Packed(Plain):
    """`LinearMethod` of `mxfp4`."""

    weights: Weights

    def turned_experts(self, at: str, clamp: Clamp | None) -> Experts:
        gate, up = self.weights.packed(f"{at}.gate_up_proj", 2)
        (down,) = self.weights.packed(f"{at}.down_proj")
        biases = self.turned_biases(at)
        return self.kernels.quantized_experts(
            gate, up, down, len(biases[0]), "float", self.weights.dtype, biases=biases, clamp=clamp
        )
