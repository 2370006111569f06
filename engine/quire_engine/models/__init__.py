"""Checkpoint in, model out: `load_model` picks the class that runs an architecture and loads its weights.

Every architecture of this version is one configuration of `DecoderModel`; `quire_schemas.checkpoint` has already
refused the others by name.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from quire_engine.adapters import WithAdapters
from quire_engine.models.decoder import DecoderModel, KVCache
from quire_engine.quantization import linear_method
from quire_engine.weights import Weights
from quire_kernels import Kernels
from quire_schemas.adapters import AdapterProfile
from quire_schemas.checkpoint import ModelProfile
from quire_schemas.wire import Quantization

__all__ = ["DecoderModel", "KVCache", "load_model"]


def load_model(
    model_dir: Path,
    profile: ModelProfile,
    *,
    dtype: torch.dtype,
    device: torch.device,
    kernels: Kernels,
    on_progress: Callable[[int, int], None],
    quantization: Quantization | None = None,
    adapters: Sequence[AdapterProfile] = (),
) -> DecoderModel:
    """The model of a checkpoint folder, its weights on `device`, in `dtype` but for those that are quantized, and
    with its adapters, if there are any.

    `on_progress(done, total)` is called with bytes read of the files, at least every 64 MiB and at the end.
    Raises `quire_schemas.checkpoint_files.CheckpointError` when the files do not hold what the profile says.
    """
    weights = Weights(model_dir, profile, dtype=dtype, device=device, on_progress=on_progress)
    method = linear_method(weights, kernels, quantization)
    if not adapters:
        return DecoderModel.build(profile, weights, device=device, kernels=kernels, method=method)
    adapted = WithAdapters(method, adapters, kernels, dtype)
    return DecoderModel.build(
        profile, weights, device=device, kernels=kernels, method=adapted, company=adapted.company
    )
