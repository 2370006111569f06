"""What an engine is built from: the spec as read and checked, and the part of it that may change while it runs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import msgspec

from quire_engine.errors import InvalidSpec
from quire_schemas.quantization import FLOATS, GROUP_SIZES, device_misfit
from quire_schemas.wire import EngineSpec, Limits, Policy, Quantization

_LEAST = {"threads": 1, "max_model_len": 2, "block_size": 1, "num_blocks": 1, "memory_limit": 1}


@dataclass(frozen=True, slots=True)
class BatchLimits:
    """The hot knobs: sequences that run at once, tokens that a step computes, and whether prompts are cut; who
    goes first, how many may wait, and how many tokens of prompts a step has while others write (None: any number).
    """

    max_num_seqs: int
    max_num_batched_tokens: int
    chunked_prefill: bool
    policy: Policy = "fcfs"
    max_waiting: int | None = None
    max_prefill_tokens: int | None = None

    @classmethod
    def of(cls, source: EngineSpec | Limits) -> BatchLimits:
        """The hot knobs as a spec or a change of them has them."""
        return cls(
            source.max_num_seqs,
            source.max_num_batched_tokens,
            source.chunked_prefill,
            source.policy,
            source.max_waiting,
            source.max_prefill_tokens,
        )

    def __post_init__(self) -> None:
        if self.max_num_seqs < 1 or self.max_num_batched_tokens < 1:
            raise InvalidSpec(
                f"max_num_seqs {self.max_num_seqs} and max_num_batched_tokens {self.max_num_batched_tokens} "
                "must both be at least 1"
            )
        if self.max_prefill_tokens is not None and self.max_prefill_tokens < 1:
            raise InvalidSpec(f"max_prefill_tokens is {self.max_prefill_tokens}; it must be at least 1")


def read_spec(path: Path) -> EngineSpec:
    """The spec in the JSON file `path`, or `InvalidSpec` that names the file and the field."""
    try:
        spec = msgspec.json.decode(path.read_bytes(), type=EngineSpec)
    except OSError as error:
        raise InvalidSpec(f"{path}: {error.strerror}") from error
    except msgspec.MsgspecError as error:
        raise InvalidSpec(f"{path}: {error}") from error
    check_spec(spec)
    return spec


def check_spec(spec: EngineSpec) -> None:
    """Raise `InvalidSpec` for a number that no engine can be built with."""
    # a context of one token would have room for a prompt and none for an answer
    for name, least in _LEAST.items():
        if getattr(spec, name) < least:
            raise InvalidSpec(f"{name} is {getattr(spec, name)}; it must be at least {least}")
    if not spec.chunked_prefill and spec.max_num_batched_tokens < spec.max_model_len:
        raise InvalidSpec(
            f"without chunked_prefill a step has to hold a whole prompt: max_num_batched_tokens is "
            f"{spec.max_num_batched_tokens}, max_model_len {spec.max_model_len}"
        )
    if not spec.adoption_window > 0:
        raise InvalidSpec(f"adoption_window is {spec.adoption_window}; it must be above 0 seconds")
    if not 0 <= spec.step_time < float("inf") or (spec.step_time and spec.runner != "scripted"):
        raise InvalidSpec(f"step_time is {spec.step_time}; only the scripted runner takes one, in seconds")
    if spec.batch_invariant and spec.device != "cpu":
        raise InvalidSpec(f"batch_invariant is kept on a CPU alone; device is {spec.device}")
    if spec.adapters and (spec.device != "cpu" or spec.runner == "scripted"):
        raise InvalidSpec(f"adapters are for models on a CPU; device is {spec.device}, runner {spec.runner}")
    names = [adapter.name for adapter in spec.adapters]
    if len(set(names)) != len(names):
        raise InvalidSpec(f"two adapters have one name: {', '.join(names)}")
    if spec.quantization is not None:
        _check_quantization(spec, spec.quantization)
    BatchLimits.of(spec)


def _check_quantization(spec: EngineSpec, quantization: Quantization) -> None:
    if quantization.group_size not in (GROUP_SIZES if quantization.method == "int4" else (None,)):
        raise InvalidSpec(f"{quantization.method} weights have no groups of {quantization.group_size}")
    if spec.device != "cpu" and quantization.method == "int4" and quantization.activations == "int8":
        raise InvalidSpec(f"int4 weights meet int8 activations on a CPU alone; device is {spec.device}")
    if problem := device_misfit(quantization.method, spec.device):
        raise InvalidSpec(problem)
    if spec.runner == "scripted":
        raise InvalidSpec("a scripted engine has no weights to quantize")
    rounded = {"fp8": ("fp8",), "mxfp4": ()}.get(quantization.method, ("int8",))
    if quantization.activations not in (*rounded, FLOATS[spec.dtype]):
        raise InvalidSpec(
            f"activations of quantized layers are {quantization.activations}, and dtype is {spec.dtype}"
        )
