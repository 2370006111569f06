"""Rotary embedding: the frequencies of every supported scaling rule, and a step's cosines and sines.

Pair d of a head turns by position · frequency[d], frequency[d] = theta^(-2d / D). The scaling rules change the
frequencies once, at load:

- `linear` divides all of them by the factor (position interpolation);
- `dynamic` raises theta with the length once a sequence is longer than `max_position_embeddings`. No sequence
  here can be: the context is bounded by that figure, within which the rule leaves theta as it is;
- `yarn` (Peng et al. 2023) divides low frequencies by the factor, keeps high ones, blends between the two, and
  multiplies cosines and sines by an attention factor;
- `llama3` does likewise with limits given as wavelengths.

Legend: T tokens, D head size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from quire_kernels import Kernels


class Rotary:
    """Cosines and sines for the positions of a step. `rope` is `ModelProfile.rope_parameters`."""

    def __init__(self, rope: Mapping[str, Any], head_dim: int, device: torch.device, kernels: Kernels) -> None:
        frequencies, self._factor = _frequencies(rope, head_dim)
        self._frequencies = frequencies.to(device)
        self._kernels = kernels

    def __call__(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """`positions` [T] to cosines and signed sines, [T, 1, D] float32, as `Kernels.place_heads` takes them."""
        return self._kernels.turns(positions, self._frequencies, self._factor)


def _frequencies(rope: Mapping[str, Any], head_dim: int) -> tuple[Tensor, float]:
    """Angle per position of each pair, [D / 2] float32, and the factor on cosines and sines."""
    theta, kind = float(rope["rope_theta"]), rope["rope_type"]
    base = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    if kind in ("default", "dynamic"):
        return base, 1.0
    factor = float(rope["factor"])
    if kind == "linear":
        return base / factor, 1.0
    original = float(rope["original_max_position_embeddings"])
    if kind == "llama3":
        low, high = float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
        turns = original * base / (2 * math.pi)
        # 0 where a pair turns less than `low` times over the original context, 1 where more than `high` times
        kept = ((turns - low) / (high - low)).clamp(0, 1)
        return base * kept + base / factor * (1 - kept), 1.0
    if kind == "yarn":
        return _yarn(rope, base, theta, factor, original, head_dim)
    raise ValueError(f"rope type {kind!r}")


def _yarn(
    rope: Mapping[str, Any], base: Tensor, theta: float, factor: float, original: float, head_dim: int
) -> tuple[Tensor, float]:
    def pair_that_turns(times: float) -> float:
        """The (fractional) pair that turns this often over the original context."""
        return head_dim * math.log(original / (times * 2 * math.pi)) / (2 * math.log(theta))

    first, last = pair_that_turns(rope.get("beta_fast", 32)), pair_that_turns(rope.get("beta_slow", 1))
    if rope["truncate"]:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_dim - 1)
    if first == last:
        last += 0.001
    interpolated = ((torch.arange(head_dim // 2, dtype=torch.float32) - first) / (last - first)).clamp(0, 1)

    def magnitude(scale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0

    attention = rope.get("attention_factor")
    if attention is None:
        if "mscale" in rope and "mscale_all_dim" in rope:
            attention = magnitude(rope["mscale"]) / magnitude(rope["mscale_all_dim"])
        else:
            attention = magnitude(1.0)
    return base / factor * interpolated + base * (1 - interpolated), float(attention)
