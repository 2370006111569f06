"""The back-end for NVIDIA GPUs: kernels in Triton, one family a file, and cuBLAS where that is the best there is.

Within a block the cache lies head by head, for keys and for values alike: `cache[side].view(N, K, P, D)`. One
head's keys of a block are then one dense run of P · D numbers. Nobody else looks.

With `TRITON_INTERPRET=1` in the environment when this is imported, kernels run in Triton's interpreter on a CPU:
slow, and right in float32 and float16 (products of bfloat16 are not).

Legend: see `quire_kernels`.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor
from triton import knobs

from quire_kernels.errors import BackendUnavailable, KernelError
from quire_kernels.mxfp4 import Mxfp4Weight
from quire_kernels.paging import PagedBatch
from quire_kernels.quantized import Activations, Fp8Weight, QuantizedWeight
from quire_kernels.reference import rounded
from quire_kernels.triton import attention, attention_cuts, gate, heads, norm, rotation, tokens
from quire_kernels.triton.attention import COUNTERS, Chip, StepAttention
from quire_kernels.triton.coded import Coded
from quire_kernels.triton.experts import CodedExperts, ExpertLayer, TritonExperts, route
from quire_kernels.triton.product import TritonProduct
from quire_kernels.triton.quantized import Room, TritonQuantizedProduct
from quire_kernels.triton.rounding import Rounding
from quire_kernels.triton.scaled import TritonScaledProduct
from quire_kernels.triton.timing import UNFIT, Replays, compile_ahead, records_of
from quire_kernels.tuning import Report, Trial, tune

if TYPE_CHECKING:
    from quire_kernels import Body, Clamp, Experts, HeadNorms, Product

__all__ = ["Served", "TritonKernels"]

# a product and a sum in one instruction; Triton 3.9 wants that said, and warns when it is not
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

INTERPRETED: bool = knobs.runtime.interpret
"""Whether kernels run on a CPU: decided at import, as each kernel is."""


OLDEST = (8, 0)
"""Compute capability that kernels are made for, and later ones: Ampere has bfloat16 and copies that run beside."""


def require(name: str, capability: tuple[int, int]) -> None:
    """Raises `BackendUnavailable` of a card that is too old."""
    if capability < OLDEST:
        raise BackendUnavailable(
            f"{name} has compute capability {capability[0]}.{capability[1]}, and the kernels need {OLDEST[0]}."
            f"{OLDEST[1]} or later. hint: use an Ampere card or a newer one (A10, L4, RTX 30 and later), or "
            "spec.engine.device: cpu"
        )


_Made = TypeVar("_Made", TritonProduct, TritonQuantizedProduct, TritonScaledProduct, TritonExperts, CodedExperts)


@dataclass(slots=True, frozen=True)
class Served:
    """What an engine will ask of the kernels, as far as tilings depend on it."""

    layers: Sequence[tuple[int | None, Sequence[Tensor]]]
    """Of each kind of layer its window, and keys and values of some such layers."""
    heads: int
    head_dim: int
    number: torch.dtype
    """Of activations."""
    sequences: int
    """Of a step, at most."""
    tokens: int
    longest: int
    """Tokens of a sequence, at most."""
    chosen: int = 0
    """Experts of a token."""
    softcap: float | None = None
    """Of attention."""
    sinks: bool = False
    """Whether its heads have some."""


def _chip() -> Chip:
    """That of the current CUDA device. The first to ask on a machine compiles what Triton speaks to the driver by.
    Raises `BackendUnavailable`."""
    try:
        return Chip.current()
    except torch.AcceleratorError:
        raise
    except Exception as error:  # Triton runs ldconfig and a compiler, and each part fails in its own way
        said = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        raise BackendUnavailable(
            f"Triton cannot speak to the driver: {said}; it needs libcuda.so.1, and once a C compiler (gcc, "
            "clang, or what CC names) and the headers of Python"
        ) from error


class TritonKernels:
    """Every operation by a kernel of its own, or by cuBLAS. Raises `BackendUnavailable`."""

    name = "triton"

    def __init__(self) -> None:
        if not INTERPRETED and not torch.cuda.is_available():
            raise BackendUnavailable("torch sees no CUDA device")
        self._chip = Chip(8, 227 * 1024) if INTERPRETED else _chip()
        if not INTERPRETED:
            require(torch.cuda.get_device_name(), torch.cuda.get_device_capability())
        # here, so that no captured graph has it in its own memory
        self._counters = torch.zeros(COUNTERS, dtype=torch.int32, device="cpu" if INTERPRETED else "cuda")
        self._room = Room(self._counters.device)
        self._rounding = Rounding()
        self._made: list[
            weakref.ref[TritonProduct | TritonQuantizedProduct | TritonScaledProduct | ExpertLayer[Any]]
        ] = []
        """What has tilings of its own."""

    def product(self, weight: Tensor, bias: Tensor | None) -> Product:
        return self._with_tilings(TritonProduct(weight, bias, self._chip.shared_bytes, self._chip.choices))

    def quantized_product(
        self, weight: QuantizedWeight, bias: Tensor | None, activations: Activations, dtype: torch.dtype
    ) -> Product:
        chip = self._room, self._rounding, self._chip.multiprocessors, self._chip.choices
        if isinstance(weight, Fp8Weight):
            return self._with_tilings(TritonScaledProduct.of(weight, bias, activations, dtype, *chip))
        if isinstance(weight, Mxfp4Weight):
            raise KernelError("the triton back-end has no products with weights in mxfp4 but those of experts")
        return self._with_tilings(TritonQuantizedProduct.of(weight, bias, activations, dtype, *chip))

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return norm.rms_norm(x, weight, eps, self._rounding)

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
        return norm.add_rms_norm(x, residual, weight, eps, self._rounding)

    def turns(self, positions: Tensor, frequencies: Tensor, factor: float) -> tuple[Tensor, Tensor]:
        return rotation.turns(positions, frequencies, factor)

    def place_heads(
        self,
        qkv: Tensor,
        num_heads: int,
        norms: HeadNorms | None,
        cos: Tensor,
        sin: Tensor,
        cache: Tensor,
        slots: Tensor,
    ) -> Tensor:
        return heads.place_heads(qkv, num_heads, norms, cos, sin, cache, slots)

    def paged_attention(
        self, batch: PagedBatch, *, window: int | None, softcap: float | None = None
    ) -> StepAttention:
        return StepAttention(batch, window, self._chip, self._counters, softcap)

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        return gate.silu_mul(gate_up, self._rounding)

    def gelu_mul(self, gate_up: Tensor) -> Tensor:
        return gate.gelu_mul(gate_up, self._rounding)

    def experts(
        self,
        gate: Tensor,
        up: Tensor,
        down: Tensor,
        *,
        biases: tuple[Tensor, Tensor, Tensor] | None = None,
        clamp: Clamp | None = None,
    ) -> Experts:
        made = TritonExperts(gate, up, down, self._chip.shared_bytes, biases, clamp, self._chip.choices)
        return self._with_tilings(made)

    def quantized_experts(
        self,
        gate: QuantizedWeight,
        up: QuantizedWeight,
        down: QuantizedWeight,
        count: int,
        activations: Activations,
        dtype: torch.dtype,
        *,
        biases: tuple[Tensor, Tensor, Tensor] | None = None,
        clamp: Clamp | None = None,
    ) -> Experts:
        if activations != "float":
            raise KernelError("the triton back-end multiplies experts in fewer bits by floating-point activations")
        first, second, third = (Coded.of(weight, count, dtype) for weight in (gate, up, down))
        chip = self._chip
        made = CodedExperts(first, second, third, chip.shared_bytes, biases, clamp, chip.choices)
        return self._with_tilings(made)

    def route(self, logits: Tensor, count: int, over_chosen: bool) -> tuple[Tensor, Tensor]:
        return route(logits, count, over_chosen)

    def route_of(self, router: Product, x: Tensor, count: int, over_chosen: bool) -> tuple[Tensor, Tensor]:
        return route(router(x), count, over_chosen)  # of which `wide` is a copy in float32

    def take(self, x: Tensor, rows: Tensor) -> Tensor:
        return x.index_select(0, rows)

    def multiply(self, x: Tensor, factor: float) -> Tensor:
        return x.mul_(rounded(factor, x.dtype))

    def recorded(self, body: Body) -> Body:
        return body

    def largest(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        return tokens.largest(logits)

    def largest_of(self, product: Product, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.largest(product.wide(x))

    def cap_logits(self, logits: Tensor, cap: float) -> None:
        tokens.cap_logits(logits, cap)

    def mask_tokens(self, logits: Tensor, rows: Tensor, bits: Tensor) -> None:
        tokens.mask_tokens(logits, rows, bits)

    # ── tilings ───────────────────────────────────────────────────────────────────────────────────────

    def trials(self, served: Served) -> Iterator[Trial]:
        """Of every family of the products and experts made here and of the attention of `served`."""
        for window, caches in served.layers:
            yield from attention_cuts.trials(
                self._chip,
                partial(self._attention, window, served.softcap),
                caches,
                torch.empty((0, served.heads, served.head_dim), dtype=served.number, device=caches[0].device),
                sequences=served.sequences,
                tokens=served.tokens,
                longest=served.longest,
                sinks=served.sinks,
            )
        most = max(served.sequences, served.tokens)
        for reference in self._made:
            made = reference()
            if isinstance(made, ExpertLayer):
                yield from made.trials(most, served.chosen)
            elif made is not None:
                yield from made.trials(most)

    def _attention(
        self, window: int | None, softcap: float | None, batch: PagedBatch, chip: Chip
    ) -> StepAttention:
        return StepAttention(batch, window, chip, self._counters, softcap)

    def tune(self, served: Served, seconds: float, stream: torch.cuda.Stream | None) -> Report:
        """Takes for `served` the tilings that were found fastest on this machine, and finds those that were not
        yet, as far as `seconds` last: see `tuning`. `stream` is that of captures; without one nothing is found.
        Called before the first step. Holds no more memory than the widest step meanwhile, and reads the cache.
        """
        report = tune(
            self.trials(served),
            self._chip.choices,
            records_of(self.card),
            seconds=seconds,
            timer=None if stream is None else Replays(stream),
            compile_ahead=compile_ahead,
            unfit=UNFIT,
        )
        if report.measured:
            torch.cuda.empty_cache()  # of pools that are gone
        return report

    def crowds(self, kv_heads: int, most: int) -> list[int]:
        """Numbers of sequences, up to `most`, with each of which the kernels of attention over `kv_heads` are
        others than with fewer."""
        return attention.crowds(self._chip.multiprocessors, kv_heads, most)

    @property
    def card(self) -> dict[str, str | int]:
        """What tilings that are kept hold for, besides a kernel and versions."""
        name, capability = "interpreter", ""
        if not INTERPRETED:
            properties = torch.cuda.get_device_properties(torch.cuda.current_device())
            name, capability = properties.name, f"{properties.major}.{properties.minor}"
        return {
            "card": name,
            "capability": capability,
            "multiprocessors": self._chip.multiprocessors,
            "shared": self._chip.shared_bytes,
        }

    def _with_tilings(self, made: _Made) -> _Made:
        self._made.append(weakref.ref(made))
        return made
