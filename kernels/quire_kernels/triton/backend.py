"""The back-end for NVIDIA GPUs: kernels in Triton, one family a file, and cuBLAS where that is the best there is.

Within a block the cache lies head by head, for keys and for values alike: `cache[side].view(N, K, P, D)`. One
head's keys of a block are then one dense run of P · D numbers. Nobody else looks.

With `TRITON_INTERPRET=1` in the environment when this is imported, kernels run in Triton's interpreter on a CPU:
slow, and right in float32 and float16 (products of bfloat16 are not).

Legend: see `quire_kernels`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from triton import knobs

from quire_kernels.errors import BackendUnavailable
from quire_kernels.paging import PagedBatch
from quire_kernels.quantized import Activations, QuantizedWeight
from quire_kernels.reference import ReferenceKernels
from quire_kernels.triton.attention import StepAttention

if TYPE_CHECKING:
    from quire_kernels import HeadNorms, Product

__all__ = ["TritonKernels"]

INTERPRETED: bool = knobs.runtime.interpret
"""Whether kernels run on a CPU: decided at import, as each kernel is."""


class TritonKernels:
    """Every operation by a kernel of its own. Raises `BackendUnavailable`."""

    name = "triton"

    def __init__(self) -> None:
        if not INTERPRETED and not torch.cuda.is_available():
            raise BackendUnavailable("torch sees no CUDA device")
        self._reference = ReferenceKernels()
        device = None if INTERPRETED else torch.cuda.get_device_properties(torch.cuda.current_device())
        self._multiprocessors = 8 if device is None else device.multi_processor_count

    def product(self, weight: Tensor, bias: Tensor | None) -> Product:
        return self._reference.product(weight, bias)

    def quantized_product(
        self, weight: QuantizedWeight, bias: Tensor | None, activations: Activations, dtype: torch.dtype
    ) -> Product:
        return self._reference.quantized_product(weight, bias, activations, dtype)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return self._reference.rms_norm(x, weight, eps)

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
        return self._reference.add_rms_norm(x, residual, weight, eps)

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
        _, blocks, size, kv_heads, head = cache.shape
        query, key = qkv[:, :num_heads], qkv[:, num_heads : num_heads + kv_heads]
        if norms is not None:
            query = self._reference.rms_norm(query, norms.query, norms.eps)
            key = self._reference.rms_norm(key, norms.key, norms.eps)
        key = self._reference.rotary(key, cos, sin)
        stored = slots >= 0
        places = slots[stored]
        for side, new in zip(cache, (key, qkv[:, num_heads + kv_heads :]), strict=True):
            inside = side.view(blocks, kv_heads, size, head)
            inside[places // size, :, places % size] = new[stored].to(cache.dtype)
        return self._reference.rotary(query, cos, sin)

    def paged_attention(self, batch: PagedBatch, *, window: int | None) -> StepAttention:
        return StepAttention(batch, window, self._multiprocessors)

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        return self._reference.silu_mul(gate_up)

    def largest(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        return self._reference.largest(logits)

    def mask_tokens(self, logits: Tensor, rows: Tensor, bits: Tensor) -> None:
        self._reference.mask_tokens(logits, rows, bits)
