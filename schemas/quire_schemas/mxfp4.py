"""Checkpoints of gpt-oss with experts in MXFP4, as `quantization_config` of config.json declares them.

    X_blocks    [E, N, K / 32, 16]    U8, two codes in a byte
    X_scales    [E, N, K / 32]        U8, the power of two that 32 codes share

for X a tensor [E, K, N] of all experts of a layer. All else is floats, so modules that `modules_to_not_convert`
names are that anyway, unless they have experts.

Legend: E experts, N outputs, K inputs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

from quire_schemas.checkpoint_files import UnsupportedFeature
from quire_schemas.quantization_config import check_keys, kept_names

GROUP = 32
"""Inputs that share a power of two."""

_HONOURED: dict[str, tuple[Any, ...]] = {"quant_method": ("mxfp4",), "dequantize": (False,)}
_KEPT = ("modules_to_not_convert",)


def read_mxfp4(found: Mapping[str, Any], modules: Iterable[str]) -> None:
    """Takes note of a `quantization_config` with that method; `modules` are those that have experts. Raises
    `UnsupportedFeature`, or `InvalidConfig`, naming the key."""
    kept = kept_names(found, _KEPT)
    check_keys(found, "mxfp4", _HONOURED, _KEPT)
    every = [f".{module}." for module in modules]
    for name in sorted(kept):
        if any(fnmatchcase(module, f"*.{name}.*") for module in every):
            raise UnsupportedFeature(
                f"config.json: quantization_config.{_KEPT[0]}: {name}: experts in floats beside mxfp4 are not "
                "supported by this version",
                "use a checkpoint whose experts are all in mxfp4, or all in bfloat16",
            )


def packed_shapes(shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Of experts' weights [E, K, N] those of their codes and of their powers of two."""
    count, inputs, outputs = shape
    groups = inputs // GROUP
    return (count, outputs, groups, GROUP // 2), (count, outputs, groups)


def stored_bytes(shape: tuple[int, ...]) -> int:
    """What both take in the file."""
    return sum(map(math.prod, packed_shapes(shape)))
