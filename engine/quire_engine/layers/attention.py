"""Self-attention of one decoder layer over the paged cache.

Legend: T tokens of the step, W hidden width, H query heads, D head size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from quire_engine.layers.linear import Linear
from quire_kernels import HeadNorms, Kernels, PagedAttention


@dataclass(slots=True, frozen=True)
class Attention:
    """Projects, rotates, writes the cache, attends. The output projection is a call of its own."""

    qkv: Linear
    out: Linear
    norms: HeadNorms | None
    num_heads: int
    head_dim: int
    scale: float
    sinks: Tensor | None
    """[H] float32."""
    kernels: Kernels

    def attend(
        self, x: Tensor, cos: Tensor, sin: Tensor, cache: Tensor, slots: Tensor, attention: PagedAttention
    ) -> Tensor:
        """`x` [T, W] to the heads' results [T, H · D]; this step's keys and values are in `cache` afterwards."""
        qkv = self.qkv(x).view(x.shape[0], -1, self.head_dim)
        query = self.kernels.place_heads(qkv, self.num_heads, self.norms, cos, sin, cache, slots)
        return attention(query, cache, self.scale, self.sinks).view(x.shape[0], -1)

    def parameters(self) -> Iterator[Tensor]:
        yield from self.qkv.parameters()
        yield from self.out.parameters()
        if self.sinks is not None:
            yield self.sinks
        if self.norms is not None:
            yield self.norms.query
            yield self.norms.key
