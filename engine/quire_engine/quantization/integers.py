"""Weights in 8 or 4 bits, made of a checkpoint in a float type while it is read.

The file's own numbers are quantized, not those of the engine's dtype, some rows at a time: no weight is in memory
in both forms. Outputs of projections that are fused lie side by side; as no scale is shared between outputs, each
is what it would be alone. Biases are added to sums in float32 and are kept as that.

Legend: N outputs, K inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quire_engine.layers.linear import Dense, Linear
from quire_engine.weights import Weights
from quire_kernels import (
    Activations,
    Clamp,
    Experts,
    Int4Weight,
    Int8Weight,
    KernelError,
    Kernels,
    Product,
)
from quire_kernels.quantized import IntegerWeight
from quire_schemas.checkpoint_files import WrongTensors
from quire_schemas.wire import Quantization

NEVER_RIGHT = "the file is damaged, or its numbers were never right"


@dataclass(slots=True, frozen=True)
class Integers:
    """`LinearMethod` of `int8` and `int4`, which differ in the weight that is filled."""

    weights: Weights
    kernels: Kernels
    quantization: Quantization

    def linear(self, prefix: str, parts: Sequence[str], *, bias: bool) -> Linear:
        biases = [f"{prefix}.{part}.bias" for part in parts] if bias else []
        weight = self._stack([f"{prefix}.{part}.weight" for part in parts])
        return Dense(self._product(weight, self.weights.stack(biases, torch.float32) if biases else None))

    def outputs(self, name: str) -> int:
        return self.weights.shape(name)[0]

    def product(self, name: str) -> Product:
        return self._product(self._stack([name]), None)

    def experts(self, gate: Sequence[str], up: Sequence[str], down: Sequence[str]) -> Experts:
        stacked = self._stack(gate), self._stack(up), self._stack(down)
        return self.kernels.quantized_experts(*stacked, len(gate), self._activations, self.weights.dtype)

    def turned_experts(self, at: str, clamp: Clamp | None) -> Experts:
        raise KernelError(f"{at} cannot be quantized")  # `experts_misfit` has refused it by name

    def _stack(self, names: Sequence[str]) -> IntegerWeight:
        """Tensors of one width, one after the other."""
        shapes = [self.weights.shape(name) for name in names]
        weight = self._empty(sum(outputs for outputs, _ in shapes), shapes[0][1])
        at = 0
        for name in names:
            for rows in self.weights.rows(name):
                try:
                    weight.put(at, rows)
                except KernelError as error:
                    raise WrongTensors(f"tensor {name}: {error}", NEVER_RIGHT) from error
                at += rows.shape[0]
        return weight

    def _product(self, weight: IntegerWeight, bias: Tensor | None) -> Product:
        return self.kernels.quantized_product(weight, bias, self._activations, self.weights.dtype)

    @property
    def _activations(self) -> Activations:
        return "int8" if self.quantization.activations == "int8" else "float"

    def _empty(self, outputs: int, inputs: int) -> IntegerWeight:
        if self.quantization.group_size is None:
            return Int8Weight.empty(outputs, inputs, self.weights.device)
        return Int4Weight.empty(outputs, inputs, self.quantization.group_size, self.weights.device)
