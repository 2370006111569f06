"""Checkpoints with the weights of linear layers in fp8, as `quantization_config` of config.json declares them.

    X.weight              [N, K]                    F8_E4M3, codes
    X.weight_scale_inv    [⌈N / 128⌉, ⌈K / 128⌉]    F32, BF16 or F16: what a code of 1 stands for in its block

Embeddings, heads, norms and routers of experts are floats, and so are the modules that `modules_to_not_convert`
names, or `ignored_layers`, as some call it.

Legend: N outputs, K inputs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from quire_schemas.checkpoint_files import UnsupportedFeature
from quire_schemas.quantization_config import check_keys, kept_names

CODES = "F8_E4M3"
"""The dtype of codes, as headers spell it."""
SCALE = "_scale_inv"
"""What the name of a weight's scales ends with, behind the name of the weight."""
BLOCK = 128
"""Outputs, and inputs, of a block with one scale."""

_HONOURED: dict[str, tuple[Any, ...]] = {
    "quant_method": ("fp8",),
    "fmt": ("e4m3",),
    "weight_block_size": ([BLOCK, BLOCK],),
    "activation_scheme": ("dynamic",),
    "scale_fmt": ("float", None),
    "dequantize": (False,),
    "modules_to_convert": (None, []),
}
"""Of each key the values that are read; the first is what it is taken for where it is left out."""
_NEEDED = ("weight_block_size",)
_KEPT = ("modules_to_not_convert", "ignored_layers")
"""Two names for one list."""


@dataclass(frozen=True, slots=True)
class Fp8Profile:
    """Which weights of a checkpoint are in fp8: those of all linear layers but the ones within `kept`."""

    kept: frozenset[str] = frozenset()
    """Names of modules, or consecutive parts of such names."""

    def holds(self, name: str, shape: tuple[int, ...]) -> bool:
        """Whether the tensor `name` is in fp8."""
        if len(shape) != 2 or not name.startswith("model.layers.") or name.endswith(".gate.weight"):
            return False
        if not self.kept:
            return True
        # a file may keep a module of each layer, and have thousands of tensors: so names are looked up, not tried
        parts = name.removesuffix(".weight").split(".")
        ends = range(1, len(parts) + 1)
        return not any(".".join(parts[at:end]) in self.kept for end in ends for at in range(end))


def scales_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Of the scales of a weight of that shape."""
    return tuple(-(-size // BLOCK) for size in shape)


def stored_bytes(shape: tuple[int, ...]) -> int:
    """What codes and scales in float32 take in the file."""
    return math.prod(shape) + 4 * math.prod(scales_shape(shape))


def read_fp8(config: Mapping[str, Any]) -> Fp8Profile | None:
    """What `quantization_config` of a config.json says; None if there is none. Raises `UnsupportedFeature`, or
    `InvalidConfig`, naming the key."""
    found = config.get("quantization_config")
    if not found:
        return None
    method = found.get("quant_method", "unnamed") if isinstance(found, Mapping) else "unnamed"
    if not isinstance(found, Mapping) or method != "fp8":
        raise UnsupportedFeature(
            f"config.json: quantization_config: weights quantised by {method} are not supported by this version",
            "use the checkpoint in bfloat16 or float32 from which the quantised one was made, or one in fp8",
        )
    kept = kept_names(found, _KEPT)
    check_keys(found, "fp8", _HONOURED, _KEPT, _NEEDED)
    return Fp8Profile(kept)
