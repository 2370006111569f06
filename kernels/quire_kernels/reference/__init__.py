"""The reference back-end: plain torch on any device, float32 inside. Other back-ends are measured against it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from quire_kernels.paging import PagedBatch
from quire_kernels.quantized import Activations, QuantizedWeight
from quire_kernels.reference.attention import GATHER_BYTES, StepAttention
from quire_kernels.reference.bytes import LARGEST, to_bytes
from quire_kernels.reference.experts import EachExpert, each_biased, each_part, each_product, route
from quire_kernels.reference.product import PlainProduct, QuantizedProduct
from quire_kernels.reference.rotation import turns

if TYPE_CHECKING:
    from quire_kernels import Body, Clamp, HeadNorms, Product

__all__ = ["GATHER_BYTES", "ReferenceKernels", "rounded"]


def rounded(number: float, dtype: torch.dtype) -> float:
    """The nearest number of that format."""
    return float(torch.tensor(number, dtype=dtype))


class ReferenceKernels:
    """Every operation as its formula. `gather_bytes` bounds what attention copies out of the cache at a time."""

    name = "reference"

    def __init__(self, gather_bytes: int = GATHER_BYTES) -> None:
        self._gather_bytes = gather_bytes

    def product(self, weight: Tensor, bias: Tensor | None) -> PlainProduct:
        return PlainProduct(weight, bias)

    def quantized_product(
        self, weight: QuantizedWeight, bias: Tensor | None, activations: Activations, dtype: torch.dtype
    ) -> QuantizedProduct:
        return QuantizedProduct.of(weight, bias, activations, dtype)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        if x.dtype == weight.dtype == torch.float32:
            return F.rms_norm(x, weight.shape, weight, eps)
        return F.rms_norm(x.float(), weight.shape, weight.float(), eps).to(x.dtype)

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
        residual.add_(x)
        return self.rms_norm(residual, weight, eps)

    def turns(self, positions: Tensor, frequencies: Tensor, factor: float) -> tuple[Tensor, Tensor]:
        return turns(positions, frequencies, factor)

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
        turned = num_heads + cache.shape[3]
        if norms is None:
            rotated = self.rotary(qkv[:, :turned], cos, sin)
            query, key = rotated[:, :num_heads], rotated[:, num_heads:]
        else:
            query = self.rotary(self.rms_norm(qkv[:, :num_heads], norms.query, norms.eps), cos, sin)
            key = self.rotary(self.rms_norm(qkv[:, num_heads:turned], norms.key, norms.eps), cos, sin)
        self.write_kv(key, qkv[:, turned:], cache, slots)
        return query

    def rotary(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Rotates the pairs of each head of `x` [T, heads, D]; `cos` and `sin` as of `place_heads`. New tensor."""
        wide = x.float()
        # rolling by half a head puts each number's partner in its place; its sign is in `sin`
        return torch.addcmul(wide * cos, wide.roll(x.shape[-1] // 2, -1), sin).to(x.dtype)

    def write_kv(self, key: Tensor, value: Tensor, cache: Tensor, slots: Tensor) -> None:
        """Stores `key` and `value` [T, K, D] at `slots` [T] of `cache`, in its number format."""
        for side, new in zip(cache.view(2, -1, *cache.shape[3:]), (key, value), strict=True):
            if cache.dtype in LARGEST:
                # as bytes, for torch copies no rows of fp8
                side.view(torch.uint8).index_copy_(0, slots, to_bytes(new, cache.dtype).view(torch.uint8))
            else:
                side.index_copy_(0, slots, new.to(cache.dtype))

    def paged_attention(
        self, batch: PagedBatch, *, window: int | None, softcap: float | None = None
    ) -> StepAttention:
        return StepAttention(batch, window, self._gather_bytes, softcap)

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, -1)
        if gate_up.dtype == torch.float32:
            return F.silu(gate).mul_(up)
        return F.silu(gate.float()).mul_(up).to(gate_up.dtype)

    def gelu_mul(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.float().chunk(2, -1)
        return F.gelu(gate, approximate="tanh").mul_(up).to(gate_up.dtype)

    def experts(
        self,
        gate: Tensor,
        up: Tensor,
        down: Tensor,
        *,
        biases: tuple[Tensor, Tensor, Tensor] | None = None,
        clamp: Clamp | None = None,
    ) -> EachExpert:
        each = each_product(lambda pair: self.product(*pair), *each_biased(gate, up, down, biases))
        return EachExpert(each, clamp)

    def quantized_experts(
        self,
        gate: QuantizedWeight,
        up: QuantizedWeight,
        down: QuantizedWeight,
        count: int,
        activations: Activations,
        dtype: torch.dtype,
        *,
        biases: tuple[Tensor, Tensor, Tensor] | None = None,
        clamp: Clamp | None = None,
    ) -> EachExpert:
        def make(pair: tuple[QuantizedWeight, Tensor | None]) -> QuantizedProduct:
            return self.quantized_product(*pair, activations, dtype)

        gates, ups, downs = (each_part(weight, count) for weight in (gate, up, down))
        return EachExpert(each_product(make, *each_biased(gates, ups, downs, biases)), clamp)

    def route(self, logits: Tensor, count: int, over_chosen: bool) -> tuple[Tensor, Tensor]:
        return route(logits, count, over_chosen)

    def route_of(self, router: Product, x: Tensor, count: int, over_chosen: bool) -> tuple[Tensor, Tensor]:
        return self.route(router.wide(x), count, over_chosen)

    def take(self, x: Tensor, rows: Tensor) -> Tensor:
        return x.index_select(0, rows)

    def multiply(self, x: Tensor, factor: float) -> Tensor:
        return x.mul_(rounded(factor, x.dtype))

    def recorded(self, body: Body) -> Body:
        return body

    def largest(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        found = logits.max(dim=-1)
        return found.values, found.indices

    def largest_of(self, product: Product, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.largest(product.wide(x))

    def cap_logits(self, logits: Tensor, cap: float) -> None:
        logits.div_(cap).tanh_().mul_(cap)

    def mask_tokens(self, logits: Tensor, rows: Tensor, bits: Tensor) -> None:
        octets = torch.arange(256, dtype=torch.int32, device=logits.device).unsqueeze(1)
        allowed = (octets >> torch.arange(8, dtype=torch.int32, device=logits.device)) & 1
        penalty_of = torch.where(allowed == 1, 0.0, -math.inf)
        # eight tokens at a time, and added: several times as fast as to fill by a mask of booleans
        penalty_MV = penalty_of.index_select(0, bits.flatten().int()).view(rows.shape[0], -1)[:, : logits.shape[1]]
        logits.index_add_(0, rows, penalty_MV)
