"""How a layer gets its linear: it asks a `LinearMethod`, by the name under which the checkpoint stores it.

A method decides what is read and what class multiplies by it, so a quantized or a tensor-parallel model differs
from a plain one in the method alone. There are `Plain`, `Integers`, `Fp8` and `Packed`; `quire_schemas.checkpoint`
refuses checkpoints that would need another.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from quire_engine.layers.linear import Linear
from quire_engine.quantization.fp8 import Fp8
from quire_engine.quantization.integers import Integers
from quire_engine.quantization.packed import Packed
from quire_engine.quantization.plain import Plain
from quire_engine.weights import Weights
from quire_kernels import Clamp, Experts, Kernels, Product
from quire_schemas.wire import Quantization

__all__ = ["LinearMethod", "Plain", "linear_method"]


class LinearMethod(Protocol):
    """Builds the products of one model."""

    def linear(self, prefix: str, parts: Sequence[str], *, bias: bool) -> Linear:
        """The projections `prefix`.`part` as one linear whose outputs lie side by side in that order."""

    def outputs(self, name: str) -> int:
        """Rows of this tensor."""

    def product(self, name: str) -> Product:
        """The product with this tensor: the head's, whose rows are the embedding if it is tied."""

    def experts(self, gate: Sequence[str], up: Sequence[str], down: Sequence[str]) -> Experts:
        """The experts that have these tensors, in that order. Those of each kind lie side by side in memory."""

    def turned_experts(self, at: str, clamp: Clamp | None) -> Experts:
        """The experts of a checkpoint whose `ExpertsProfile` is `turned`: `at`.gate_up_proj and `at`.down_proj."""


def linear_method(weights: Weights, kernels: Kernels, quantization: Quantization | None) -> LinearMethod:
    """The method that `EngineSpec.quantization` names."""
    if quantization is None:
        return Plain(weights, kernels)
    if quantization.method == "mxfp4":
        return Packed(weights, kernels)
    return (Fp8 if quantization.method == "fp8" else Integers)(weights, kernels, quantization)
