"""The back-end for processors: our own C++ (`native/`), called through ctypes without the interpreter's lock.

Operations run on a few threads of their own, which wait for the next one by spinning for a moment. Computation
is in float32; weights are packed once, in as many bytes (`native/gemm.cpp`). What comes out for a token depends on
its own sequence alone, whatever else is in the step.

A model's step is recorded as one call of the library (`program`). The cache of keys and values has this back-end's
own order inside a block (`native/attention.cpp`); nobody else looks. The library is built at the first use on a
machine (`build`).

Legend: see `quire_kernels`.
"""

from __future__ import annotations

import ctypes
import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from quire_kernels.cpu import build
from quire_kernels.cpu.experts import native_experts
from quire_kernels.cpu.native import (
    FORMATS,
    AddRmsNorm,
    Attention,
    CapLogits,
    Gate,
    GeluMul,
    Largest,
    Linear,
    MaskTokens,
    Multiply,
    Native,
    PlaceHeads,
    QuantizedLinear,
    RmsNorm,
    Route,
    Sequences,
    SiluMul,
    Take,
    Turns,
    address,
)
from quire_kernels.cpu.products import ByTorch, Packed, PackedQuantized
from quire_kernels.cpu.program import Recorded
from quire_kernels.errors import KernelError
from quire_kernels.memory import Slabs
from quire_kernels.mxfp4 import Mxfp4Weight
from quire_kernels.paging import PagedBatch
from quire_kernels.quantized import Activations, Fp8Weight, Int4Weight, QuantizedWeight
from quire_kernels.reference import rounded
from quire_kernels.reference.experts import each_biased, each_part, each_product
from quire_kernels.reference.product import PlainProduct, check_activations

if TYPE_CHECKING:
    from quire_kernels import Body, Clamp, Experts, HeadNorms, Product

__all__ = ["CpuKernels"]


@dataclass(slots=True, frozen=True)
class _StepAttention:
    """`PagedAttention`: everything is in the batch already."""

    native: Native
    batch: PagedBatch
    sequences: Sequences
    window: int | None
    softcap: float | None

    def __call__(self, query: Tensor, cache: Tensor, scale: float, sinks: Tensor | None = None) -> Tensor:
        native = self.native
        out = native.empty(query.shape, query.dtype)
        tokens, heads, dim = query.shape
        _, _, size, kv_heads, _ = cache.shape
        keys, values = cache
        native.run(
            Attention(
                tokens, FORMATS[query.dtype], FORMATS[cache.dtype], native.address(query), query.stride(0), heads,
                kv_heads, dim, keys.data_ptr(), values.data_ptr(), size, self.window or 0, scale,
                self.softcap or 0.0, address(sinks), out.data_ptr(), out.stride(0),
                sequences=ctypes.addressof(self.sequences),
            )
        )  # fmt: skip
        return out


class CpuKernels:
    """Every operation by the native library, on `threads` threads, built for `level` or the processor's best.

    Raises `BackendUnavailable`.
    """

    name = "cpu"

    def __init__(self, threads: int, level: build.Level | None = None) -> None:
        self._native = Native(threads, level)
        self._slabs = Slabs()
        self._recorded: weakref.WeakSet[Recorded] = weakref.WeakSet()

    @property
    def kept_bytes(self) -> int:
        """What is kept between steps: the library's room for its widest operation so far, and recorded buffers."""
        kept = int(self._native.library.quire_kept(self._native.engine))
        return kept + sum(recorded.bytes for recorded in self._recorded)

    def product(self, weight: Tensor, bias: Tensor | None) -> Product:
        if weight.shape[1] % 2:
            return ByTorch(self._native, PlainProduct(weight, bias))
        weight = self._slabs.settle(weight)
        self._native.library.quire_pack(
            self._native.engine, FORMATS[weight.dtype], weight.data_ptr(), *weight.shape
        )
        outputs, width = weight.shape
        call = Linear(
            format=FORMATS[weight.dtype], width=width, weight=weight.data_ptr(), bias=address(bias),
            outputs=outputs, out_stride=outputs,
        )  # fmt: skip
        return Packed(self._native, weight, bias, call)

    def quantized_product(
        self, weight: QuantizedWeight, bias: Tensor | None, activations: Activations, dtype: torch.dtype
    ) -> Product:
        if isinstance(weight, Fp8Weight | Mxfp4Weight):
            raise KernelError(f"the cpu back-end has no products of {type(weight).__name__}")
        check_activations(weight, activations)
        native, (outputs, width) = self._native, weight.shape
        scales = self._slabs.settle(weight.scales)
        if isinstance(weight, Int4Weight):
            values, group_size = weight.values, weight.group_size
            # the scales lie as the numbers do, in panels
            native.library.quire_pack(native.engine, FORMATS[torch.float16], scales.data_ptr(), *scales.shape)
        else:
            # four inputs lie together; what is added costs memory twice for a moment, but few widths need it
            values, group_size = F.pad(weight.values, (0, -width % 4)) if width % 4 else weight.values, 0
        values = self._slabs.settle(values)
        native.library.quire_pack_quantized(
            native.engine, values.data_ptr(), *values.shape, isinstance(weight, Int4Weight)
        )
        wide_bias = None if bias is None else bias.float()
        call = QuantizedLinear(
            format=FORMATS[dtype], width=width, weight=values.data_ptr(), scales=scales.data_ptr(),
            group=group_size, bias=address(wide_bias), outputs=outputs, round_input=activations == "int8",
            out_stride=outputs,
        )  # fmt: skip
        return PackedQuantized(native, values, scales, group_size, (outputs, width), wide_bias, dtype, call)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        native = self._native
        out = native.empty(x.shape, x.dtype)
        native.run(
            RmsNorm(
                x.shape[0], FORMATS[x.dtype], native.address(x), x.stride(0), x.shape[1], FORMATS[weight.dtype],
                weight.data_ptr(), eps, out.data_ptr(),
            )
        )  # fmt: skip
        return out

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
        native = self._native
        out = native.empty(x.shape, x.dtype)
        native.run(
            AddRmsNorm(
                x.shape[0], FORMATS[x.dtype], native.address(x), x.stride(0), x.shape[1], native.address(residual),
                residual.stride(0), FORMATS[weight.dtype], weight.data_ptr(), eps, out.data_ptr(),
            )
        )  # fmt: skip
        return out

    def turns(self, positions: Tensor, frequencies: Tensor, factor: float) -> tuple[Tensor, Tensor]:
        native, tokens, width = self._native, positions.shape[0], 2 * frequencies.shape[0]
        cos, sin = (native.empty((tokens, 1, width), torch.float32) for _ in range(2))
        native.run(
            Turns(
                tokens, native.address(positions), frequencies.data_ptr(), width, factor, cos.data_ptr(),
                sin.data_ptr(),
            )
        )  # fmt: skip
        return cos, sin

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
        native = self._native
        tokens, _, dim = qkv.shape
        _, _, size, kv_heads, _ = cache.shape
        keys, values = cache
        out = native.empty((tokens, num_heads, dim), qkv.dtype)
        weights: tuple[int, int | None, int | None, float] = (0, None, None, 0.0)
        if norms is not None:
            weights = FORMATS[norms.query.dtype], norms.query.data_ptr(), norms.key.data_ptr(), norms.eps
        native.run(
            PlaceHeads(
                tokens, FORMATS[qkv.dtype], native.address(qkv), qkv.stride(0), num_heads, *weights,
                native.address(cos), native.address(sin), native.address(slots), FORMATS[cache.dtype], kv_heads,
                dim, size, keys.data_ptr(), values.data_ptr(), out.data_ptr(),
            )
        )  # fmt: skip
        return out

    def paged_attention(
        self, batch: PagedBatch, *, window: int | None, softcap: float | None = None
    ) -> _StepAttention:
        recording = self._native.recording
        if recording is not None:
            return _StepAttention(self._native, batch, recording.sequences(batch), window, softcap)
        sequences = Sequences()
        sequences.point_to(batch)
        return _StepAttention(self._native, batch, sequences, window, softcap)

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        return self._gate(SiluMul, gate_up)

    def gelu_mul(self, gate_up: Tensor) -> Tensor:
        return self._gate(GeluMul, gate_up)

    def _gate(self, kind: type[Gate], gate_up: Tensor) -> Tensor:
        native, (rows, both) = self._native, gate_up.shape
        out = native.empty((rows, both // 2), gate_up.dtype)
        native.run(
            kind(
                rows, FORMATS[gate_up.dtype], native.address(gate_up), gate_up.stride(0), both // 2, out.data_ptr()
            )
        )
        return out

    def experts(
        self,
        gate: Tensor,
        up: Tensor,
        down: Tensor,
        *,
        biases: tuple[Tensor, Tensor, Tensor] | None = None,
        clamp: Clamp | None = None,
    ) -> Experts:
        each = each_product(lambda pair: self.product(*pair), *each_biased(gate, up, down, biases))
        return native_experts(self._native, each, clamp)

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
        def make(pair: tuple[QuantizedWeight, Tensor | None]) -> Product:
            return self.quantized_product(*pair, activations, dtype)

        gates, ups, downs = (each_part(weight, count) for weight in (gate, up, down))
        each = each_product(make, *each_biased(gates, ups, downs, biases))
        return native_experts(self._native, each, clamp)

    def route(self, logits: Tensor, count: int, over_chosen: bool) -> tuple[Tensor, Tensor]:
        native, (tokens, experts) = self._native, logits.shape
        choice = native.empty((tokens, count), torch.int64)
        shares = native.empty((tokens, count), torch.float32)
        native.run(
            Route(
                tokens, native.address(logits), logits.stride(0), experts, count, over_chosen, choice.data_ptr(),
                shares.data_ptr(),
            )
        )  # fmt: skip
        return choice, shares

    def route_of(self, router: Product, x: Tensor, count: int, over_chosen: bool) -> tuple[Tensor, Tensor]:
        return self.route(router.wide(x), count, over_chosen)

    def take(self, x: Tensor, rows: Tensor) -> Tensor:
        native, (_, width), count = self._native, x.shape, rows.shape[0]
        out = native.empty((count, width), x.dtype)
        native.run(
            Take(
                count, x.data_ptr(), x.stride(0) * x.itemsize, width * x.itemsize, native.address(rows),
                out.data_ptr(),
            )
        )  # fmt: skip
        return out

    def multiply(self, x: Tensor, factor: float) -> Tensor:
        native, (rows, width) = self._native, x.shape
        native.run(
            Multiply(rows, FORMATS[x.dtype], native.address(x), x.stride(0), width, rounded(factor, x.dtype))
        )
        return x

    def recorded(self, body: Body) -> Body:
        recorded = Recorded(self._native, body)
        self._recorded.add(recorded)
        return recorded

    def largest(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        rows, width = logits.shape
        values, places = torch.empty(rows), torch.empty(rows, dtype=torch.int64)
        self._native.run(
            Largest(rows, logits.data_ptr(), logits.stride(0), width, values.data_ptr(), places.data_ptr())
        )
        return values, places

    def largest_of(self, product: Product, x: Tensor) -> tuple[Tensor, Tensor]:
        if isinstance(product, Packed | PackedQuantized):
            return product.largest(x)
        return self.largest(product.wide(x))

    def cap_logits(self, logits: Tensor, cap: float) -> None:
        self._native.run(CapLogits(logits.shape[0], logits.data_ptr(), logits.stride(0), logits.shape[1], cap))

    def mask_tokens(self, logits: Tensor, rows: Tensor, bits: Tensor) -> None:
        self._native.run(
            MaskTokens(
                rows.shape[0], logits.data_ptr(), logits.stride(0), logits.shape[1], rows.data_ptr(),
                bits.data_ptr(), bits.shape[1],
            )
        )  # fmt: skip
