"""What `spec.quantization` means for a checkpoint on a device, and the bytes of a quantized weight. Pure, no I/O.

    int8    N × K + 4 N             bytes, for N outputs of K inputs: a float32 scale for each output
    int4    N × K / 2 + 2 N K / g   a bfloat16 scale for each group of g inputs
    fp8     N × K + 4 N/b ⌈K/128⌉   a float32 scale for each block of b outputs and 128 inputs
    mxfp4   N × K / 2 + N K / 32    a power of two for each group of 32 inputs

b is 128, or as many as suit all parts that are fused (`shared_outputs`). `quire_kernels.quantized` has the
formats themselves. Quantized are the weights of all linear layers, those of experts too, and of the head, which
with tied embeddings is the embedding. An untied embedding is read by row, where nothing but memory would be
gained, norms and routers of experts are small, and a router's decision is one between near equals: they stay in
the engine's dtype. Biases are added in float32, and kept as that.

Of a checkpoint that is in fp8 already `fp8` takes what the file has, so its head stays, too. `none` is then fp8
on a GPU, and on a CPU weights of the engine's dtype; int8 and int4 are made of what the file's codes stand for.
Experts in fp8 meet inputs as they are, whatever those of other layers are rounded to. Of a checkpoint with experts
in MXFP4 `none` is `mxfp4` on a GPU: these stay as they are, and all else is in the engine's dtype. Nobody declares
it.

Exceptions:

    Unquantizable    a checkpoint, dtype or device that cannot be had; it has field, message and hint
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any, Literal

from quire_schemas.checkpoint import ModelProfile, expected_tensors, is_packed
from quire_schemas.fp8 import BLOCK
from quire_schemas.mxfp4 import stored_bytes
from quire_schemas.wire import Quantization

METHODS: tuple[Literal["int8", "int4", "fp8"], ...] = ("int8", "int4", "fp8")
Declared = Literal["none", "int8", "int4", "fp8"]
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
    if method == "none" and profile.fp8 is not None and device == "cuda":
        method = "fp8"
    packed = profile.experts is not None and profile.experts.packed
    if method == "none" and packed and device == "cuda" and activations in ("auto", FLOATS[dtype]):
        return Quantization("mxfp4", FLOATS[dtype])
    if method == "none":
        if activations != "auto":
            why = "the checkpoint is in floats, and nothing of it is quantized"
            if packed:
                why = "experts in MXFP4 are multiplied by numbers of the engine's dtype"
                if device == "cpu":
                    why = "experts in MXFP4 are widened on a CPU, where no input is rounded"
            if profile.fp8 is not None:
                why = "weights in fp8 are widened on a CPU, where no input is rounded"
            other: Declared = "fp8" if activations == "fp8" else "int8"
            met = (activations != "bf16" or dtype == "bfloat16") and not (
                _unfit(profile, other, device) or activations_misfit(profile, other, activations, device)
            )
            quantized = f", or method: {other}" if met else ""
            raise Unquantizable("activations", why, f"declare activations: auto{quantized}")
        return None
    if problem := device_misfit(method, device) or experts_misfit(profile, method):
        raise Unquantizable("method", problem, _instead(profile, declared["method"], device))
    if activations in ("int8", "fp8") and (activations == "fp8") != (method == "fp8"):
        raise Unquantizable(
            "activations",
            f"{method} weights do not meet {activations} activations",
            "declare activations: auto, or bf16",
        )
    if problem := activations_misfit(profile, method, activations, device):
        other_one = ", or method: int8" if profile.experts is None else ""
        raise Unquantizable("activations", problem, f"declare activations: auto{other_one}")
    if activations == "auto" and activations_misfit(profile, method, "int8", device):
        activations = FLOATS[dtype]
    if activations == "bf16" and dtype != "bfloat16":
        raise Unquantizable(
            "activations",
            f"the activations are {dtype}",
            "declare engine.dtype: bfloat16, or activations: auto",
        )
    size = declared["groupSize"] or GROUP_SIZES[0] if method == "int4" else None
    rounded: Literal["int8", "fp8"] = "fp8" if method == "fp8" else "int8"
    found = Quantization(method, rounded if activations == "auto" else activations, size)
    if problem := misfit(profile, found):
        least = GROUP_SIZES[0]
        others = [
            (f"groupSize: {least}", Quantization("int4", group_size=least)),
            ("method: int8", Quantization("int8")),
        ]
        if method == "fp8":
            raise Unquantizable("method", problem, _instead(profile, declared["method"], device))
        fitting = [said for said, other in others if not misfit(profile, other)]
        field = "method" if size is None else "groupSize"
        raise Unquantizable(field, problem, f"declare {', or '.join(fitting or ['method: none'])}")
    return found


def _unfit(profile: ModelProfile, method: Declared, device: Literal["cpu", "cuda"]) -> str:
    """Why a declared method cannot be had on that device, whatever else is declared; empty if it can."""
    if method == "none":
        return "" if profile.fp8 is None or device == "cpu" else misfit(profile, Quantization("fp8", "fp8"))
    size = GROUP_SIZES[0] if method == "int4" else None
    return (
        device_misfit(method, device)
        or experts_misfit(profile, method)
        or misfit(profile, Quantization(method, group_size=size))
    )


def _instead(profile: ModelProfile, method: Declared, device: Literal["cpu", "cuda"]) -> str:
    """What can be declared in place of a method that cannot be had on that device, and is not refused next."""
    other: Literal["cpu", "cuda"] = "cuda" if device == "cpu" else "cpu"
    found = [] if _unfit(profile, method, other) else [f"engine.device: {other}"]
    others: tuple[Declared, ...] = ("none", "int8")
    for another in others:
        if another != method and not _unfit(profile, another, device):
            widens = another == "none" and method == "fp8" and profile.fp8 is not None
            found.append(f"method: {another}" + (", which widens them" if widens else ""))
    return f"declare {', or '.join(found or ['engine.device: cpu and method: none'])}"


def misfit(profile: ModelProfile, quantization: Quantization) -> str:
    """Which quantized weight has a number of inputs that the format does not take; empty if all fit. In fp8 any
    number does, of experts any even one, but what is multiplied as one weight must be in fp8 as one."""
    if quantization.method == "fp8":
        return _half_in_fp8(profile) or _odd_experts(profile)
    if quantization.method == "mxfp4":  # the checkpoint was looked at
        return ""
    size = quantization.group_size
    for name, shape in expected_tensors(profile):
        if is_quantized(profile, name, shape, quantization) and shape[1] % (size or INT8_INPUTS):
            what = f"multiple of {INT8_INPUTS}" if size is None else f"whole number of groups of {size}"
            return f"the {shape[1]} inputs of {name} are no {what}"
    return ""


@functools.lru_cache(maxsize=32)  # experts are thousands of tensors
def _in_fp8(profile: ModelProfile) -> frozenset[str]:
    """Names of the weights that the checkpoint has in fp8."""
    if (fp8 := profile.fp8) is None:
        return frozenset()
    return frozenset(name for name, shape in expected_tensors(profile) if fp8.holds(name, shape))


@functools.lru_cache(maxsize=32)
def _half_in_fp8(profile: ModelProfile) -> str:
    seen: dict[str, tuple[str, bool]] = {}
    all_coded = _in_fp8(profile)
    for name, _ in expected_tensors(profile) if all_coded else ():
        if (one := _one_on_a_gpu(name)) is None:
            continue
        coded = name in all_coded
        first, whole = seen.setdefault(one, (name, coded))
        if coded != whole:
            there, lacking = (first, name) if whole else (name, first)
            return f"{there} is in fp8 and {lacking} is not, and on a GPU they are multiplied as one"
    return ""


def _odd_experts(profile: ModelProfile) -> str:
    experts = profile.experts
    if experts is None or (profile.fp8 is not None and not has_coded_experts(profile)):
        return ""
    for inputs in (profile.hidden_size, experts.intermediate_size):
        if inputs % 2:
            return f"experts have {inputs} inputs, and in fp8 two are multiplied at once"
    return ""


def has_coded_experts(profile: ModelProfile) -> bool:
    """Whether the checkpoint has experts in fp8."""
    return any(".experts." in name for name in _in_fp8(profile))


def _one_on_a_gpu(name: str) -> str | None:
    """What a weight is a part of: projections that are fused, or all experts of a layer. None if it is alone."""
    layer, experts, _ = name.partition(".experts.")
    if experts:
        return layer
    for number, group in enumerate((("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))):
        for part in group:
            if name.endswith(f".{part}.weight"):
                return f"{name.removesuffix(f'{part}.weight')}{number}"
    return None


def device_misfit(method: str, device: Literal["cpu", "cuda"]) -> str:
    """Why weights of that method cannot be had on that device; empty if they can."""
    if method not in ("fp8", "mxfp4") or device == "cuda":
        return ""
    return f"{method} weights are multiplied on a GPU alone, and this model runs on a CPU"


def experts_misfit(profile: ModelProfile, method: str) -> str:
    """Why experts quantized by that method cannot be had; empty if they can, or if there are none."""
    packed = profile.experts is not None and profile.experts.packed
    if method == "mxfp4":
        return "" if packed else f"the checkpoint ({profile.architecture}) has no experts in MXFP4"
    if profile.experts is not None and profile.experts.turned:
        return f"quantized experts of {profile.architecture} are not supported by this version"
    return ""


def activations_misfit(
    profile: ModelProfile, method: str, activations: str, device: Literal["cpu", "cuda"]
) -> str:
    """Why weights made by that method cannot meet such activations on that device; empty if they can."""
    if activations != "int8" or device == "cpu" or method not in ("int8", "int4"):
        return ""
    which = "int4 weights" if method == "int4" else "experts in int8"
    if method == "int8" and profile.experts is None:
        return ""
    return f"{which} meet int8 activations on a CPU alone, and this model runs on a GPU"


def widened(profile: ModelProfile, quantization: Quantization | None) -> str:
    """Which weights that the checkpoint has in fewer bits become numbers of the engine's dtype; empty if none
    do."""
    if profile.experts is not None and profile.experts.packed:
        return "experts in MXFP4" if quantization is None else ""
    return "weights in fp8" if profile.fp8 is not None and quantization is None else ""


def is_quantized(profile: ModelProfile, name: str, shape: tuple[int, ...], quantization: Quantization) -> bool:
    """Whether a tensor of the checkpoint is one of those that are quantized."""
    if quantization.method == "mxfp4":
        return is_packed(profile, name)
    if quantization.method == "fp8" and profile.fp8 is not None:
        return name in _in_fp8(profile)
    experts = profile.experts
    if experts is not None and name.endswith(f".{experts.block}.{experts.router_name}.weight"):
        return False
    return len(shape) == 2 and (profile.tie_word_embeddings or name != "model.embed_tokens.weight")


def is_wide(profile: ModelProfile, name: str, quantization: Quantization) -> bool:
    """Whether a tensor of the checkpoint is the bias of one that is quantized."""
    weight = f"{name.removesuffix('.bias')}.weight"
    return name.endswith(".bias") and is_quantized(profile, weight, (1, 1), quantization)


def shared_outputs(profile: ModelProfile, name: str, outputs: int) -> int:
    """Outputs of the weight `name` that share a scale in fp8: as many as suit all that it is fused with."""
    if name.endswith((".q_proj.weight", ".k_proj.weight", ".v_proj.weight")):
        return math.gcd(BLOCK, profile.q_size, profile.kv_size)
    return math.gcd(BLOCK, outputs)


def tensor_bytes(profile: ModelProfile, name: str, shape: tuple[int, ...], quantization: Quantization) -> int:
    """What a tensor of the checkpoint takes that `is_quantized`."""
    if quantization.method == "mxfp4":
        return stored_bytes(shape)
    outputs, inputs = shape
    return quantized_bytes(quantization, outputs, inputs, shared_outputs(profile, name, outputs))


def quantized_bytes(quantization: Quantization, outputs: int, inputs: int, shared: int = BLOCK) -> int:
    """What a weight [outputs, inputs] takes, scales and all; `shared` is as of `shared_outputs`."""
    if quantization.method == "fp8":
        return outputs * inputs + 4 * -(-outputs // shared) * -(-inputs // BLOCK)
    if quantization.group_size is None:
        return outputs * (inputs + 4)
    return outputs * (inputs // 2 + 2 * (inputs // quantization.group_size))
