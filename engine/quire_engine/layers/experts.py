"""An MLP of several experts, of which a router chooses some for each token.

    shares = softmax(router · x)              in float32; the `num_experts_per_tok` largest
    out    = Σ shares[e] · down_e(silu(gate_e · x) · (up_e · x))

Some checkpoints have the shares of the chosen ones made to sum to one, which is the softmax over these alone.

Legend: T tokens, W hidden width, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from quire_kernels import Experts, Kernels, Product


@dataclass(slots=True, frozen=True)
class RoutedExperts:
    """The router's weight [E, W] is never quantized."""

    router: Product
    experts: Experts
    num_experts_per_tok: int
    norm_topk_prob: bool
    kernels: Kernels

    def __call__(self, x: Tensor) -> Tensor:
        """[T, W] to [T, W]."""
        choice, shares = self.kernels.route_of(self.router, x, self.num_experts_per_tok, self.norm_topk_prob)
        return self.experts(x, choice, shares)

    def parameters(self) -> Iterator[Tensor]:
        yield from self.router.parameters()
        yield from self.experts.parameters()
