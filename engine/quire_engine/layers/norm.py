"""RMS norm with its weight: x / sqrt(mean(x²) + eps) · weight.

Some models multiply by 1 + what their checkpoint has. The 1 is added once, when the weight is loaded, in float32,
which is where those models add it at every call, and the sum stays in float32: rounded to 16 bits it would be
another number.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from quire_kernels import Kernels


@dataclass(slots=True, frozen=True)
class RMSNorm:
    """Over the last dimension."""

    weight: Tensor
    eps: float
    kernels: Kernels

    def __call__(self, x: Tensor) -> Tensor:
        """The norm of `x`, a new tensor."""
        return self.kernels.rms_norm(x, self.weight, self.eps)

    def add(self, x: Tensor, residual: Tensor) -> Tensor:
        """Adds `x` to `residual` in place and returns the norm of the sum."""
        return self.kernels.add_rms_norm(x, residual, self.weight, self.eps)
