"""What `spec.quantization` means for a checkpoint on a device, and the bytes of a quantized weight. Pure, no I/O.

    int8    N × K + 4 N             bytes, for N outputs of K inputs: a float32 scale for each output
    int4    N × K / 2 + 2 N K / g   a bfloat16 scale for each group of g inputs

`quire_kernels.quantized` has the formats themselves. Quantized are the weights of all linear layers, those of
experts too, and of the head, which with tied embeddings is the embedding, too. An untied embedding is read by row,
where nothing but memory would be gained, norms and routers of experts are small, and a router's decision is one
between near equals: they stay in the engine's dtype. Biases are added in float32, and kept
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
INT8_INPUTS = 4
"""A product of whole numbers takes so many inputs at once: a weight has a multiple of it."""
FLOATS: dict[str, Literal["bf16", "fp16", "fp32"]] = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
"""What activations that are not rounded are called, by the engine's dtype."""
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
    if problem := experts_misfit(profile, device):
        raise Unquantizable("method", problem, "declare engine.device: cpu, or method: none")
    if device == "cuda" and method == "int4":
        if activations == "int8":
            raise Unquantizable(
                "activations",
                "int4 weights meet int8 activations on a CPU alone, and this model runs on a GPU",
                "declare activations: auto, or method: int8",
            )
        activations = FLOATS[dtype] if activations == "auto" else activations
    if activations == "bf16" and dtype != "bfloat16":
        raise Unquantizable(
            "activations",
            f"the activations are {dtype}",
            "declare engine.dtype: bfloat16, or activations: auto",
        )
    size = declared["groupSize"] or GROUP_SIZES[0] if method == "int4" else None
    found = Quantization(method, "int8" if activations == "auto" else activations, size)
    if problem := misfit(profile, found):
        least = GROUP_SIZES[0]
        others = [
            (f"groupSize: {least}", Quantization("int4", group_size=least)),
            ("method: int8", Quantization("int8")),
        ]
        fitting = [said for said, other in others if not misfit(profile, other)]
        field = "method" if size is None else "groupSize"
        raise Unquantizable(field, problem, f"declare {', or '.join(fitting or ['method: none'])}")
    return found


def misfit(profile: ModelProfile, quantization: Quantization) -> str:
    """Which quantized weight has a number of inputs that the format does not take; empty if all fit."""
    size = quantization.group_size
    for name, shape in expected_tensors(profile):
        if is_quantized(profile, name, shape) and shape[1] % (size or INT8_INPUTS):
            what = f"multiple of {INT8_INPUTS}" if size is None else f"whole number of groups of {size}"
            return f"the {shape[1]} inputs of {name} are no {what}"
    return ""


def experts_misfit(profile: ModelProfile, device: Literal["cpu", "cuda"]) -> str:
    """Why quantized experts cannot be had on that device; empty if they can, or if there are none."""
    if profile.experts is None or device == "cpu":
        return ""
    return f"quantized experts ({profile.architecture}) run on a CPU alone, and this model runs on a GPU"


def is_quantized(profile: ModelProfile, name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor of the checkpoint is one of those that a method quantizes."""
    if profile.experts is not None and name.endswith(f".{profile.experts.block}.gate.weight"):
        return False
    return len(shape) == 2 and (profile.tie_word_embeddings or name != "model.embed_tokens.weight")


def quantized_bytes(quantization: Quantization, outputs: int, inputs: int) -> int:
    """What a weight [outputs, inputs] takes, scales and all."""
    if quantization.group_size is None:
        return outputs * (inputs + 4)
    return outputs * (inputs // 2 + 2 * (inputs // quantization.group_size))
