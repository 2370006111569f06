"""The back-end for NVIDIA GPUs: kernels in Triton, one family a file, and cuBLAS where that is the best there is.

Within a block the cache lies head by head, for keys and for values alike: `cache[side].view(N, K, P, D)`. One
head's keys of a block are then one dense run of P · D numbers. Nobody else looks.

With `TRITON_INTERPRET=1` in the environment when this is imported, kernels run in Triton's interpreter on a CPU:
slow, and right in float32 and float16 (products of bfloat16 are not).

Legend: see `quire_kernels`.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from triton import knobs

from quire_kernels.errors import BackendUnavailable, KernelError
from quire_kernels.paging import PagedBatch
from quire_kernels.quantized import Activations, Fp8Weight, QuantizedWeight
from quire_kernels.reference import rounded
from quire_kernels.triton import gate, heads, norm, rotation, tokens
from quire_kernels.triton.attention import COUNTERS, Chip, StepAttention
from quire_kernels.triton.experts import TritonExperts, route
from quire_kernels.triton.product import TritonProduct
from quire_kernels.triton.quantized import Room, TritonQuantizedProduct
from quire_kernels.triton.rounding import Rounding
from quire_kernels.triton.scaled import TritonScaledProduct

if TYPE_CHECKING:
    from quire_kernels import Body, Clamp, Experts, HeadNorms, Product

__all__ = ["TritonKernels"]

# a product and a sum in one instruction; Triton 3.9 wants that said, and warns when it is not
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

INTERPRETED: bool = knobs.runtime.interpret
"""Whether kernels run on a CPU: decided at import, as each kernel is."""


class TritonKernels:
    """Every operation by a kernel of its own, or by cuBLAS. Raises `BackendUnavailable`."""

    name = "triton"

    def __init__(self) -> None:
        if not INTERPRETED and not torch.cuda.is_available():
            raise BackendUnavailable("torch sees no CUDA device")
        self._chip = Chip(8, 227 * 1024) if INTERPRETED else Chip.current()
        # here, so that no captured graph has it in its own memory
        self._counters = torch.zeros(COUNTERS, dtype=torch.int32, device="cpu" if INTERPRETED else "cuda")
        self._room = Room(self._counters.device)
        self._rounding = Rounding()

    def product(self, weight: Tensor, bias: Tensor | None) -> Product:
        return TritonProduct(weight, bias)

    def quantized_product(
        self, weight: QuantizedWeight, bias: Tensor | None, activations: Activations, dtype: torch.dtype
    ) -> Product:
        chip = self._room, self._rounding, self._chip.multiprocessors
        if isinstance(weight, Fp8Weight):
            return TritonScaledProduct.of(weight, bias, activations, dtype, *chip)
        return TritonQuantizedProduct.of(weight, bias, activations, dtype, *chip)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return norm.rms_norm(x, weight, eps, self._rounding)

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
        return norm.add_rms_norm(x, residual, weight, eps, self._rounding)

    def turns(self, positions: Tensor, frequencies: Tensor, factor: float) -> tuple[Tensor, Tensor]:
        return rotation.turns(positions, frequencies, factor)

    def place_heads(
        self,
        qkv: Tensor,
        num_heads: int,
        norms: HeadNorms | None,
        cos: Tensor,
        sin: Tensor,
        cache: Tensor,
        slots: Tensor,
    ) -> Tensor:
        return heads.place_heads(qkv, num_heads, norms, cos, sin, cache, slots)

    def paged_attention(
        self, batch: PagedBatch, *, window: int | None, softcap: float | None = None
    ) -> StepAttention:
        return StepAttention(batch, window, self._chip, self._counters, softcap)

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        return gate.silu_mul(gate_up, self._rounding)

    def gelu_mul(self, gate_up: Tensor) -> Tensor:
        return gate.gelu_mul(gate_up, self._rounding)

    def experts(
        self,
        gate: Tensor,
        up: Tensor,
        down: Tensor,
        *,
        biases: tuple[Tensor, Tensor, Tensor] | None = None,
        clamp: Clamp | None = None,
    ) -> Experts:
        return TritonExperts(gate, up, down, self._chip.shared_bytes, biases, clamp)

    def quantized_experts(
        self,
        gate: QuantizedWeight,
        up: QuantizedWeight,
        down: QuantizedWeight,
        count: int,
        activations: Activations,
        dtype: torch.dtype,
    ) -> Experts:
        raise KernelError("the triton back-end has no quantized experts")

    def route(self, logits: Tensor, count: int, over_chosen: bool) -> tuple[Tensor, Tensor]:
        return route(logits, count, over_chosen)

    def route_of(self, router: Product, x: Tensor, count: int, over_chosen: bool) -> tuple[Tensor, Tensor]:
        return route(router(x), count, over_chosen)  # of which `wide` is a copy in float32

    def take(self, x: Tensor, rows: Tensor) -> Tensor:
        return x.index_select(0, rows)

    def multiply(self, x: Tensor, factor: float) -> Tensor:
        return x.mul_(rounded(factor, x.dtype))

    def recorded(self, body: Body) -> Body:
        return body

    def largest(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        return tokens.largest(logits)

    def largest_of(self, product: Product, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.largest(product.wide(x))

    def cap_logits(self, logits: Tensor, cap: float) -> None:
        tokens.cap_logits(logits, cap)

    def mask_tokens(self, logits: Tensor, rows: Tensor, bits: Tensor) -> None:
        tokens.mask_tokens(logits, rows, bits)
