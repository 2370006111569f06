"""Checkpoints with the weights of linear layers in fp8, as `quantization_config` of config.json declares them.

    X.weight              [N, K]                    F8_E4M3, codes
    X.weight_scale_inv    [⌈N / 128⌉, ⌈K / 128⌉]    F32, BF16 or F16: what a code of 1 stands for in its block

Embeddings, heads, norms and routers of experts are floats, and so are the modules that `modules_to_not_convert`
names, or `ignored_layers`, as some call it. Everything that would change the numbers and is not read is refused by
its key.

Legend: N outputs, K inputs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from quire_schemas.checkpoint_files import UnsupportedFeature, invalid

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

    kept: tuple[str, ...] = ()
    """Names of modules, or consecutive parts of such names."""

    def holds(self, name: str, shape: tuple[int, ...]) -> bool:
        """Whether the tensor `name` is in fp8."""
        linear = len(shape) == 2 and name.startswith("model.layers.") and not name.endswith(".gate.weight")
        module = f".{name.removesuffix('.weight')}."
        return linear and not any(f".{kept}." in module for kept in self.kept)


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
    lists = [(key, found[key]) for key in _KEPT if found.get(key) is not None]
    for key, kept in lists:
        if not isinstance(kept, list) or not all(isinstance(name, str) and name for name in kept):
            raise invalid(f"quantization_config.{key}", f"expected names of modules, got {kept!r}")
        if kept != lists[0][1]:
            raise invalid(f"quantization_config.{key}", f"has other names than {lists[0][0]}")
    for key, values in _HONOURED.items():
        value = found.get(key, None if key in _NEEDED else values[0])
        if repr(value) not in map(repr, values):  # 128.0 and True are no 128 and no 1
            raise UnsupportedFeature(
                f"config.json: quantization_config.{key}: {value!r} is not supported by this version",
                f"fp8 is read with {key} {values[0]!r}; or use the checkpoint in bfloat16",
            )
    for key in found:
        if key not in _HONOURED and key not in _KEPT:
            raise UnsupportedFeature(
                f"config.json: quantization_config.{key} is not known to this version",
                f"fp8 is read with {', '.join(_HONOURED)} and modules_to_not_convert",
            )
    return Fp8Profile(tuple(lists[0][1]) if lists else ())
