"""Weights for figures alone: of the sizes of a real model, and no file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from quire_schemas.checkpoint import ModelProfile, expected_tensors


class RandomWeights:
    """A `TensorSource` of normal numbers (standard deviation 0.02, norms 1), made on `device`."""

    def __init__(self, profile: ModelProfile, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> None:
        self.device, self.dtype = device, dtype
        self._shapes = dict(expected_tensors(profile))
        self._generator = torch.Generator(device).manual_seed(0)

    def tensor(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        return self.stack([name], dtype)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def rows(self, name: str, whole: int = 1) -> Iterator[Tensor]:
        yield self.tensor(name)

    def is_coded(self, name: str) -> bool:
        return False

    def stays(self, name: str) -> bool:
        return False

    def turned(self, name: str, parts: int = 1) -> list[Tensor]:
        count, inputs, outputs = self._shapes[name]
        shape = (count, outputs // parts, inputs)
        made = (torch.empty(shape, dtype=self.dtype, device=self.device) for _ in range(parts))
        return [each.normal_(0.0, 0.02, generator=self._generator) for each in made]

    def stack(self, names: Sequence[str], dtype: torch.dtype | None = None) -> Tensor:
        shapes = [self._shapes[name] for name in names]
        shape = (sum(first for first, *_ in shapes), *shapes[0][1:])
        result = torch.ones(shape, dtype=dtype or self.dtype, device=self.device)
        return result if names[0].endswith("norm.weight") else result.normal_(0.0, 0.02, generator=self._generator)
