"""An engine's memory: what its spec plans, held against what is there.

Weights and cache must have the bytes that `quire_schemas.sizing` counts, exactly; together with the activations
they must lie below the spec's limit. Where memory cannot be had all the same, the error says what was planned and
what there is, instead of what torch was about to allocate.

On a GPU others may compute, too. `bound_allocator` keeps torch below the plan there, so that an engine which
took more than it said would fail itself and not its neighbour. It bounds the whole process: it is for processes
that are an engine and nothing else.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from quire_engine.config import BatchLimits
from quire_engine.errors import MemoryMismatch, OutOfMemory, is_out_of_memory
from quire_engine.models import DecoderModel, KVCache
from quire_schemas.adapters import AdapterProfile
from quire_schemas.checkpoint import ModelProfile
from quire_schemas.gpu_sizing import CONTEXT
from quire_schemas.quantities import format_bytes
from quire_schemas.sizing import activation_bytes, adapter_step_bytes, kv_block_bytes, weight_bytes
from quire_schemas.wire import EngineSpec


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Bytes of each part, and the most that all of them may be. `cache` says what the cache is made of."""

    device: str
    weights: int
    kv: int
    activations: int
    limit: int
    cache: str

    @classmethod
    def of(
        cls,
        spec: EngineSpec,
        profile: ModelProfile,
        limits: BatchLimits | None = None,
        adapters: Sequence[AdapterProfile] = (),
    ) -> MemoryPlan:
        """The arithmetic of `spec`, with other `limits` if given; weights are those of the adapters, too. Raises
        `MemoryMismatch` above the limit."""
        cache = f"{spec.num_blocks} blocks of {spec.block_size} tokens"
        if spec.runner == "scripted":
            return cls(spec.device, 0, 0, 0, spec.memory_limit, cache)
        limits = limits or BatchLimits.of(spec)
        weights = weight_bytes(profile, spec.dtype, spec.quantization)
        weights += sum(adapter.bytes(spec.dtype) for adapter in adapters)
        kv = spec.num_blocks * kv_block_bytes(profile, spec.kv_dtype, spec.block_size)
        activations = activation_bytes(
            profile,
            spec.dtype,
            limits.max_num_batched_tokens,
            limits.max_num_seqs,
            spec.max_model_len,
            device=spec.device,
            quantization=spec.quantization,
            block_size=spec.block_size,
            enforce_eager=spec.enforce_eager,
        ) + adapter_step_bytes(profile, spec.dtype, limits.max_num_batched_tokens, adapters)
        total = weights + kv + activations
        if total > spec.memory_limit:
            raise MemoryMismatch(
                f"weights {weights} + KV {kv} ({cache}) + activations {activations} = {total} bytes, above the "
                f"limit of {spec.memory_limit}"
            )
        return cls(spec.device, weights, kv, activations, spec.memory_limit, cache)

    def check(self, model: DecoderModel, kv: KVCache) -> None:
        """Hold what was allocated to what was planned, byte for byte."""
        if (model.bytes, kv.bytes) != (self.weights, self.kv):
            raise MemoryMismatch(
                f"allocated weights {model.bytes} and KV {kv.bytes} bytes; "
                f"planned were {self.weights} and {self.kv}"
            )

    @contextlib.contextmanager
    def explained(self, doing: str) -> Iterator[None]:
        """What runs out of memory inside raises `OutOfMemory` with the arithmetic. `doing` is for the message."""
        try:
            yield
        except OutOfMemory:
            raise
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            raise OutOfMemory(self._shortfall(doing)) from error

    def _shortfall(self, doing: str) -> str:
        parts = self.weights + self.kv + self.activations
        text = (
            f"memory ran out while {doing}: planned are weights {format_bytes(self.weights)} + KV "
            f"{format_bytes(self.kv)} ({self.cache}) + activations {format_bytes(self.activations)} = "
            f"{format_bytes(parts)}, within a limit of {format_bytes(self.limit)}"
        )
        if self.device == "cuda":
            free, total = torch.cuda.mem_get_info()
            text += (
                f"; torch holds {format_bytes(torch.cuda.memory_reserved())} here, and {format_bytes(free)} of "
                f"the GPU's {format_bytes(total)} are free"
            )
        where = (
            "another process may hold the GPU (nvidia-smi shows them)" if self.device == "cuda" else "free memory"
        )
        return f"{text}\nhint: {where}; or lower engine.memory, engine.maxModelLen or batching.maxNumBatchedTokens"


def bound_allocator(spec: EngineSpec) -> None:
    """Let torch take no more of the GPU than the spec's limit leaves besides the context; elsewhere nothing."""
    if spec.device == "cuda" and torch.cuda.is_available():
        _, total = torch.cuda.mem_get_info()
        torch.cuda.set_per_process_memory_fraction(allocator_share(spec.memory_limit, total))


def allocator_share(limit: int, total: int) -> float:
    """Of `total` bytes of a GPU, what torch's allocator may take of `limit`."""
    return min(max(limit - CONTEXT, 0) / total, 1.0)
