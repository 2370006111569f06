"""What `spec.quantization` means for a checkpoint on a device, and the bytes of a quantized weight. Pure, no I/O.

    int8    N × K + 4 N             bytes, for N outputs of K inputs: a float32 scale for each output
    int4    N × K / 2 + 2 N K / g   a bfloat16 scale for each group of g inputs

`quire_kernels.quantized` has the formats themselves. Quantized are the weights of all linear layers and of the
head, which with tied embeddings is the embedding, too. An untied embedding is read by row, where nothing but
memory would be gained, and norms are small: they stay in the engine's dtype. Biases are added in float32, and kept
as that.

Exceptions:

    Unquantizable    a checkpoint, dtype or device that cannot be had; it has field, message and hint
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from quire_schemas.checkpoint import ModelProfile, expected_tensors
from quire_schemas.wire import Quantization

METHODS: tuple[Literal["int8", "int4"], ...] = ("int8", "int4")
GROUP_SIZES = (32, 64, 128)
"""With int4; the first is the default."""
QUANTIZED_AT_A_TIME = 1 << 20
"""Numbers of a weight that are read and quantized together, unless one output has more."""


class Unquantizable(Exception):
    """A quantization that this checkpoint, dtype or device cannot have, for the sake of `field` of the section."""

    def __init__(self, field: str, message: str, hint: str) -> None:
        super().__init__(message)
        self.field = field
        self.message = message
        self.hint = hint


def resolve(
    declared: Mapping[str, Any], profile: ModelProfile, *, dtype: str, device: Literal["cpu", "cuda"]
) -> Quantization | None:
    """What the resolved section `spec.quantization` asks for; None is nothing. Raises `Unquantizable`.

    Only what depends on the checkpoint, the dtype and the device is looked at: `rules` has the rest.
    """
    method, activations = declared["method"], declared["activations"]
    if method == "none":
        return None
    if device == "cuda":
        raise Unquantizable(
            "method",
            f"{method} runs on a CPU, and this model runs on a GPU",
            "declare engine.device: cpu, or method: none",
        )
    if activations == "bf16" and dtype != "bfloat16":
        raise Unquantizable(
            "activations",
            f"the activations are {dtype}",
            "declare engine.dtype: bfloat16, or activations: int8",
        )
    size = None
    if method == "int4":
        size = declared["groupSize"] or GROUP_SIZES[0]
        name, width = ungrouped(profile, size)
        if name:
            least = GROUP_SIZES[0]
            smaller = size != least and not ungrouped(profile, least)[0]
            raise Unquantizable(
                "groupSize",
                f"the {width} inputs of {name} are no whole number of groups of {size}",
                f"declare groupSize: {least}, or method: int8" if smaller else "declare method: int8",
            )
    return Quantization(method, "bf16" if activations == "bf16" else "int8", size)


def ungrouped(profile: ModelProfile, group_size: int) -> tuple[str, int]:
    """Name and inputs of the first quantized weight that groups of that size do not fit; no name if all do."""
    for name, shape in expected_tensors(profile):
        if is_quantized(profile, name, shape) and shape[1] % group_size:
            return name, shape[1]
    return "", 0


def is_quantized(profile: ModelProfile, name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor of the checkpoint is one of those that a method quantizes."""
    return len(shape) == 2 and (profile.tie_word_embeddings or name != "model.embed_tokens.weight")


def quantized_bytes(quantization: Quantization, outputs: int, inputs: int) -> int:
    """What a weight [outputs, inputs] takes, scales and all."""
    if quantization.group_size is None:
        return outputs * (inputs + 4)
    return outputs * (inputs // 2 + 2 * (inputs // quantization.group_size))
