"""What a LoRA adapter's folder holds, from its `adapter_config.json` and its safetensors header alone.

The format is that of the PEFT library. For each projection that it targets a file has two tensors, A [r, in] and
B [out, r], by which the projection's product gains scale · B(A x); the scale is alpha / r, or alpha / sqrt(r) with
`use_rslora`. `rank_pattern` and `alpha_pattern` give some projections a rank and an alpha of their own.

A config has many other keys. Those that only say how the adapter was trained are passed over; those that change
what it computes are refused by name, and so is a key that this version does not know, unless its value is one that
turns it off. Patterns are names, never regular expressions: they come from strangers.

Raises a `checkpoint.CheckpointError`.
"""

from __future__ import annotations

import functools
import hashlib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from quire_schemas.checkpoint import DTYPE_BYTES, ModelProfile, expected_tensors
from quire_schemas.checkpoint_files import (
    InvalidConfig,
    MissingFile,
    TensorInfo,
    UnsupportedFeature,
    WrongTensors,
    read_header,
    read_json,
)

CONFIG: Final = "adapter_config.json"
WEIGHTS: Final = "adapter_model.safetensors"
TARGETS: Final = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The projections that an adapter may add to."""

_WITHOUT_EFFECT: Final = frozenset(
    (
        "auto_mapping", "base_model_name_or_path", "revision", "inference_mode", "lora_dropout", "layers_pattern",
        "layers_to_transform", "exclude_modules", "megatron_core", "loftq_config", "eva_config", "corda_config",
        "lora_ga_config", "qalora_group_size", "runtime_config", "peft_version",
    )
)  # fmt: skip
"""Of training, of where it was, or said by the tensors, too."""
_HONOURED: Final = frozenset(
    (
        "peft_type", "task_type", "r", "lora_alpha", "target_modules", "use_rslora", "rank_pattern",
        "alpha_pattern", "bias", "init_lora_weights",
    )
)  # fmt: skip
_PREFIX: Final = "base_model.model."
_PART: Final = re.compile(r"(.+)\.lora_([AB])\.weight")
_PATTERN: Final = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*")
_DTYPES: Final = ("F32", "BF16", "F16")
_PLAIN_STARTS: Final = (True, False, None, "gaussian", "eva", "orthogonal")
"""Values of `init_lora_weights` that leave the base's weights what they are."""
_MAX_RANK: Final = 1024


@dataclass(frozen=True, slots=True)
class Low:
    """One projection's addition: scale · up(down(x))."""

    down: TensorInfo
    """[rank, in]."""
    up: TensorInfo
    """[out, rank]."""
    scale: float

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def numbers(self) -> int:
        """What an engine keeps of it."""
        return even(self.rank) * (self.down.shape[1] + self.up.shape[0])


@dataclass(frozen=True, slots=True)
class AdapterProfile:
    """One adapter for one base; `parts` by the projection's name in the base, as `model.layers.0.mlp.up_proj`."""

    parts: Mapping[str, Low]

    @property
    def rank(self) -> int:
        """The largest."""
        return max(part.rank for part in self.parts.values())

    def bytes(self, dtype: str) -> int:
        """What an engine's tensors of it hold, exactly."""
        return sum(part.numbers for part in self.parts.values()) * DTYPE_BYTES[dtype]


def even(rank: int) -> int:
    """The rank that an engine computes with: native products take pairs of inputs."""
    return rank + rank % 2


def read_adapter(folder: Path, base: ModelProfile, max_rank: int = _MAX_RANK) -> AdapterProfile:
    """The adapter in a folder, checked against the model that it is for. `max_rank`: no rank is above it."""
    if not folder.is_dir():
        raise MissingFile(f"{folder}: not a folder", f"give the folder that holds {CONFIG} and {WEIGHTS}")
    config = read_json(folder / CONFIG)
    _refuse_features(config)
    tensors = read_header(folder / WEIGHTS)
    shapes = _projections(base)
    found: dict[str, dict[str, TensorInfo]] = {}
    for name, tensor in tensors.items():
        module, part = _place(name, tensor, base, shapes)
        found.setdefault(module, {})[part] = tensor
    if not found:
        raise WrongTensors(f"{WEIGHTS}: has no tensor", "save the adapter with PEFT's save_pretrained")
    _check_targets(config, found)
    return AdapterProfile(
        {module: _part(module, found[module], shapes, config, max_rank) for module in sorted(found)}
    )


def digest_of(folder: Path) -> str:
    """SHA-256 (hex) of the two files: what the adapter is, whatever it is called and wherever it lies."""
    try:
        stats = tuple(
            (path.name, stat.st_ino, stat.st_size, stat.st_mtime_ns)
            for path in (folder / CONFIG, folder / WEIGHTS)
            for stat in (path.stat(),)
        )
        return _digest(folder, stats)
    except OSError as error:
        raise MissingFile(
            f"{error.filename}: {error.strerror or error}", f"an adapter's folder holds {CONFIG} and {WEIGHTS}"
        ) from error


@functools.lru_cache(maxsize=256)
def _digest(folder: Path, stats: tuple[object, ...]) -> str:
    """`stats` make sure that a file that was written anew is read anew."""
    digest = hashlib.sha256()
    for name in (CONFIG, WEIGHTS):
        with (folder / name).open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _unsupported(key: str, problem: str, hint: str) -> UnsupportedFeature:
    return UnsupportedFeature(f"{CONFIG}: {key}: {problem}", hint)


def _invalid(key: str, problem: str) -> InvalidConfig:
    return InvalidConfig(f"{CONFIG}: {key}: {problem}", "save the adapter again with PEFT's save_pretrained")


def _refuse_features(config: Mapping[str, Any]) -> None:
    if config.get("peft_type") != "LORA":
        raise _unsupported("peft_type", f"{config.get('peft_type')!r}, and only LORA is served", "train a LoRA")
    if config.get("task_type") not in ("CAUSAL_LM", None):
        raise _unsupported(
            "task_type", f"{config['task_type']!r}, and only CAUSAL_LM is served", "train it for text generation"
        )
    if config.get("bias", "none") != "none":
        raise _unsupported("bias", f"{config['bias']!r}: trained biases are not added", "train with bias none")
    start = config.get("init_lora_weights")
    if start not in _PLAIN_STARTS:
        raise _unsupported(
            "init_lora_weights",
            f"{start!r} trains beside weights that are not the base's",
            "save it with path_initial_model_for_weight_conversion, which makes a plain LoRA of it",
        )
    for key, value in config.items():
        if key in _HONOURED or key in _WITHOUT_EFFECT or not value:
            continue
        raise _unsupported(
            key, f"{value!r} is not honoured by this version", "merge the adapter into its base, and serve that"
        )


def _projections(base: ModelProfile) -> dict[str, tuple[int, ...]]:
    """Shape [out, in] of each projection that can be added to, by its name without `.weight`."""
    found = {}
    for name, shape in expected_tensors(base):
        module = name.removesuffix(".weight")
        layer, _, last = module.rpartition(".")
        if module != name and layer.endswith(("self_attn", "mlp")) and last in TARGETS and ".experts." not in name:
            found[module] = shape
    return found


def _place(
    name: str, tensor: TensorInfo, base: ModelProfile, shapes: Mapping[str, tuple[int, ...]]
) -> tuple[str, str]:
    """The projection that a tensor is for, and which of its two parts it is."""
    matched = _PART.fullmatch(name.removeprefix(_PREFIX))
    if matched is None:
        raise UnsupportedFeature(
            f"{WEIGHTS}: tensor {name} is neither lora_A nor lora_B of a projection",
            f"only {', '.join(TARGETS)} are added to; train without embeddings, modules_to_save and DoRA",
        )
    module, part = matched.groups()
    if module not in shapes:
        last = module.rsplit(".", 1)[-1]
        if last not in TARGETS or ".experts." in module:
            raise UnsupportedFeature(
                f"{WEIGHTS}: {module} is not added to by this version", f"target {', '.join(TARGETS)}"
            )
        raise WrongTensors(
            f"{WEIGHTS}: the base has no {module} ({base.architecture}, {base.num_layers} layers)",
            "name the model that the adapter was trained on as spec.source",
        )
    if tensor.dtype not in _DTYPES:
        raise UnsupportedFeature(
            f"{WEIGHTS}: tensor {name} is {tensor.dtype}", f"save it in one of {', '.join(_DTYPES)}"
        )
    return module, part


def _check_targets(config: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    """Each projection that the config names has a tensor: else part of the adapter is missing."""
    targets = config.get("target_modules")
    if not isinstance(targets, list):  # an expression, whose outcome the tensors say
        return
    for target in targets:
        named = str(target)
        if not any(module == named or module.endswith(f".{named}") for module in found):
            raise WrongTensors(
                f"{CONFIG}: target_modules: {named!r} has no tensor in {WEIGHTS}",
                f"only {', '.join(TARGETS)} are added to; if it is one of these, the file is not whole",
            )


def _part(
    module: str,
    tensors: Mapping[str, TensorInfo],
    shapes: Mapping[str, tuple[int, ...]],
    config: Mapping[str, Any],
    max_rank: int,
) -> Low:
    if len(tensors) != 2:
        lacks = "AB".replace(next(iter(tensors)), "")
        raise WrongTensors(f"{WEIGHTS}: {module} has no lora_{lacks}", "the file is not whole; save it again")
    rank = _number(config, "r", "rank_pattern", module, whole=True)
    alpha = _number(config, "lora_alpha", "alpha_pattern", module, whole=False)
    if rank > max_rank:
        raise UnsupportedFeature(
            f"{CONFIG}: {module} has rank {rank:g}, above maxRank {max_rank}",
            f"declare spec.lora.maxRank: {rank:g}" if rank <= _MAX_RANK else "train it with a smaller rank",
        )
    outputs, inputs = shapes[module]
    for part, shape in (("A", (rank, inputs)), ("B", (outputs, rank))):
        if tensors[part].shape != shape:
            wanted = [int(size) for size in shape]
            raise WrongTensors(
                f"{WEIGHTS}: {module}.lora_{part} is {list(tensors[part].shape)}; it should be {wanted}",
                "name the model that the adapter was trained on as spec.source",
            )
    scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    return Low(tensors["A"], tensors["B"], scale)


def _number(config: Mapping[str, Any], key: str, patterns: str, module: str, *, whole: bool) -> float:
    """The value of `key` for a projection: that of the first pattern that names it, or the common one."""
    named = config.get(patterns) or {}
    if not isinstance(named, dict):
        raise _invalid(patterns, "is not an object")
    value, at = config.get(key, 8), key
    for pattern in named:
        if not _PATTERN.fullmatch(pattern):
            raise _unsupported(
                f"{patterns}.{pattern}", "is an expression, and only names of projections are read",
                "name the projections one by one",
            )  # fmt: skip
    for pattern, own in named.items():
        if module == pattern or module.endswith(f".{pattern}"):
            value, at = own, f"{patterns}.{pattern}"
            break
    kinds = int if whole else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds) or not 0 < value < math.inf:
        raise _invalid(at, f"{value!r} is not a {'whole ' if whole else ''}number above 0")
    return value
