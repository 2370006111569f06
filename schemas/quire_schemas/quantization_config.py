"""`quantization_config` of a config.json: what is read of it, whatever the format.

What would change the numbers and is not read is refused by its key.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from quire_schemas.checkpoint_files import UnsupportedFeature, invalid


def kept_names(found: Mapping[str, Any], keys: Iterable[str]) -> frozenset[str]:
    """The names of modules that stay in floats, for which `keys` are names of one list. Raises `InvalidConfig`."""
    lists = [(key, found[key]) for key in keys if found.get(key) is not None]
    for key, kept in lists:
        if not isinstance(kept, list) or not all(isinstance(name, str) and name for name in kept):
            raise invalid(f"quantization_config.{key}", f"expected names of modules, got {kept!r}")
        if kept != lists[0][1]:
            raise invalid(f"quantization_config.{key}", f"has other names than {lists[0][0]}")
    return frozenset(lists[0][1]) if lists else frozenset()


def check_keys(
    found: Mapping[str, Any],
    read_as: str,
    honoured: Mapping[str, tuple[Any, ...]],
    others: tuple[str, ...],
    needed: tuple[str, ...] = (),
) -> None:
    """Raises `UnsupportedFeature` for a key that is neither of `others` nor `honoured`, or has none of the values
    there, of which the first is what it is taken for where it is left out and not `needed`."""
    for key, values in honoured.items():
        value = found.get(key, None if key in needed else values[0])
        if repr(value) not in map(repr, values):  # 128.0 and True are no 128 and no 1
            raise UnsupportedFeature(
                f"config.json: quantization_config.{key}: {value!r} is not supported by this version",
                f"{read_as} is read with {key} {values[0]!r}; or use the checkpoint in bfloat16",
            )
    for key in found:
        if key not in honoured and key not in others:
            raise UnsupportedFeature(
                f"config.json: quantization_config.{key} is not known to this version",
                f"{read_as} is read with {', '.join(honoured)} and {others[0]}",
            )
