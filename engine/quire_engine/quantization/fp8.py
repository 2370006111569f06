"""Weights in fp8: as the checkpoint has them, or made of a checkpoint in a float type while it is read.

Of a checkpoint in fp8 codes are taken over bit by bit, and what it keeps in floats is `Plain`'s. Experts meet
their input as it is. Else the file's own numbers are rounded, whole blocks at a time. The parts of a
fused weight keep their own blocks: where they do not begin at multiples of 128 outputs, blocks of the whole are
smaller, and several have one scale. Biases of what is in fp8 are added to sums in float32 and are kept as that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quire_engine.layers.linear import Dense, Linear
from quire_engine.quantization.integers import NEVER_RIGHT
from quire_engine.quantization.plain import Plain
from quire_engine.weights import Weights
from quire_kernels import Activations, Clamp, Experts, Fp8Weight, KernelError, Kernels, Product
from quire_kernels.quantized import shared_outputs
from quire_schemas.checkpoint_files import WrongTensors
from quire_schemas.wire import Quantization


@dataclass(slots=True, frozen=True)
class Fp8:
    """`LinearMethod` of `fp8`."""

    weights: Weights
    kernels: Kernels
    quantization: Quantization

    def linear(self, prefix: str, parts: Sequence[str], *, bias: bool) -> Linear:
        names = [f"{prefix}.{part}.weight" for part in parts]
        if self.weights.stays(names[0]):
            return self._plain.linear(prefix, parts, bias=bias)
        biases = [f"{prefix}.{part}.bias" for part in parts] if bias else []
        added = self.weights.stack(biases, torch.float32) if biases else None
        return Dense(self._product(self._stack(names), added))

    def outputs(self, name: str) -> int:
        return self.weights.shape(name)[0]

    def product(self, name: str) -> Product:
        if self.weights.stays(name):
            return self._plain.product(name)
        return self._product(self._stack([name]), None)

    def experts(self, gate: Sequence[str], up: Sequence[str], down: Sequence[str]) -> Experts:
        if self.weights.stays(gate[0]):
            return self._plain.experts(gate, up, down)
        stacked = self._stack(gate), self._stack(up), self._stack(down)
        return self.kernels.quantized_experts(*stacked, len(gate), "float", self.weights.dtype)

    def turned_experts(self, at: str, clamp: Clamp | None) -> Experts:
        raise KernelError(f"{at} cannot be quantized")  # `experts_misfit` has refused it by name

    @property
    def _plain(self) -> Plain:
        return Plain(self.weights, self.kernels)

    def _stack(self, names: Sequence[str]) -> Fp8Weight:
        """Tensors of one width, one after the other."""
        shapes = [self.weights.shape(name) for name in names]
        shared = shared_outputs(*(outputs for outputs, _ in shapes))
        outputs = sum(outputs for outputs, _ in shapes)
        weight, at = Fp8Weight.empty(outputs, shapes[0][1], shared, self.weights.device), 0
        for name, (count, _) in zip(names, shapes, strict=True):
            self._put(weight, at, name)
            at += count
        return weight

    def _put(self, weight: Fp8Weight, start: int, name: str) -> None:
        coded = self.weights.is_coded(name)
        if coded:
            weight.put_scales(start, self.weights.shape(name)[0], self.weights.scales(name))
        put = weight.put_codes if coded else weight.put
        for rows in self.weights.codes(name) if coded else self.weights.rows(name, weight.shared):
            try:
                put(start, rows)
            except KernelError as error:
                raise WrongTensors(f"tensor {name}: {error}", NEVER_RIGHT) from error
            start += rows.shape[0]

    def _product(self, weight: Fp8Weight, bias: Tensor | None) -> Product:
        return self.kernels.quantized_product(weight, bias, self._activations, self.weights.dtype)

    @property
    def _activations(self) -> Activations:
        return "fp8" if self.quantization.activations == "fp8" else "float"
