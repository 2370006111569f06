"""The back-end for processors: our own C++ (`native/`), called through ctypes without the interpreter's lock.

Operations run on a few threads of their own, which wait for the next one by spinning for a moment. Computation
is in float32; weights are packed once, in as many bytes (`native/gemm.cpp`). What comes out for a token depends on
its own sequence alone, whatever else is in the step.

The cache of keys and values has this back-end's own order inside a block (`native/attention.cpp`); nobody else
looks. The library is built at the first use on a machine (`build`).

Legend: see `quire_kernels`.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Iterator
from ctypes import POINTER, c_double, c_float, c_int, c_int64, c_void_p
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from quire_kernels.cpu import build
from quire_kernels.errors import BackendUnavailable, KernelError
from quire_kernels.memory import Slabs
from quire_kernels.paging import PagedBatch
from quire_kernels.quantized import Activations, Int4Weight, QuantizedWeight
from quire_kernels.reference.product import PlainProduct

if TYPE_CHECKING:
    from quire_kernels import HeadNorms, Product

__all__ = ["CpuKernels"]

_FORMATS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int8: 3}


class _Linear(ctypes.Structure):
    _fields_ = (
        ("format", c_int64), ("x", c_void_p), ("stride", c_int64), ("rows", c_int64), ("width", c_int64),
        ("weight", c_void_p), ("bias", c_void_p), ("outputs", c_int64),
        ("out_format", c_int64), ("out", c_void_p), ("out_stride", c_int64),
    )  # fmt: skip


class _QuantizedLinear(ctypes.Structure):
    _fields_ = (
        ("format", c_int64), ("x", c_void_p), ("stride", c_int64), ("rows", c_int64), ("width", c_int64),
        ("weight", c_void_p), ("scales", c_void_p), ("group", c_int64), ("bias", c_void_p), ("outputs", c_int64),
        ("round_input", c_int64), ("out_format", c_int64), ("out", c_void_p), ("out_stride", c_int64),
    )  # fmt: skip


class _Attention(ctypes.Structure):
    _fields_ = (
        ("format", c_int64), ("kv_format", c_int64),
        ("query", c_void_p), ("query_stride", c_int64), ("heads", c_int64), ("kv_heads", c_int64),
        ("head_dim", c_int64), ("keys", c_void_p), ("values", c_void_p), ("block_size", c_int64),
        ("window", c_int64), ("scale", c_float), ("out", c_void_p), ("out_stride", c_int64),
        ("sequences", c_int64), ("table_width", c_int64), ("block_tables", c_void_p), ("query_starts", c_void_p),
        ("contexts", c_void_p),
    )  # fmt: skip


class _WriteKV(ctypes.Structure):
    _fields_ = (
        ("format", c_int64), ("kv_format", c_int64), ("key", c_void_p), ("value", c_void_p),
        ("key_stride", c_int64), ("value_stride", c_int64), ("rows", c_int64), ("kv_heads", c_int64),
        ("head_dim", c_int64), ("block_size", c_int64), ("slots", c_void_p), ("keys", c_void_p),
        ("values", c_void_p),
    )  # fmt: skip


class _Native:
    """The library with a pool of threads. Calls must not overlap: an engine makes one step at a time."""

    def __init__(self, threads: int, level: build.Level | None) -> None:
        library = build.load(build.library(level))
        library.quire_open.restype = c_void_p
        library.quire_open.argtypes = (c_int,)
        library.quire_close.argtypes = (c_void_p,)
        library.quire_kept.restype = c_int64
        library.quire_kept.argtypes = (c_void_p,)
        library.quire_pack.argtypes = (c_void_p, c_int64, c_void_p, c_int64, c_int64)
        library.quire_unpack_rows.argtypes = (
            c_void_p, c_int64, c_void_p, c_int64, c_int64, c_void_p, c_int64, c_void_p,
        )  # fmt: skip
        library.quire_linear.argtypes = (c_void_p, POINTER(_Linear))
        library.quire_pack_quantized.argtypes = (c_void_p, c_void_p, c_int64, c_int64, c_int)
        library.quire_unpack_quantized.argtypes = (
            c_void_p, c_void_p, c_void_p, c_int64, c_int64, c_int64, c_void_p, c_int64, c_int64, c_void_p,
        )  # fmt: skip
        library.quire_quantized_linear.argtypes = (c_void_p, POINTER(_QuantizedLinear))
        library.quire_attention.argtypes = (c_void_p, POINTER(_Attention))
        library.quire_write_kv.argtypes = (c_void_p, POINTER(_WriteKV))
        ints = (c_int64, c_int64, c_int64, c_int64)
        library.quire_rms_norm.argtypes = (
            c_void_p, *ints, c_void_p, c_int64, c_int64, c_void_p, c_double, c_void_p,
        )  # fmt: skip
        library.quire_add_rms_norm.argtypes = (
            c_void_p, c_int64, c_int64, c_int64, c_void_p, c_int64, c_void_p, c_int64, c_void_p, c_double,
            c_void_p,
        )  # fmt: skip
        library.quire_rotary.argtypes = (
            c_void_p, *ints, c_void_p, c_int64, c_int64, c_void_p, c_void_p, c_void_p,
        )  # fmt: skip
        library.quire_silu_mul.argtypes = (c_void_p, c_int64, c_int64, c_int64, c_void_p, c_int64, c_void_p)
        library.quire_largest.argtypes = (c_void_p, c_void_p, c_int64, c_int64, c_int64, c_void_p, c_void_p)
        library.quire_mask_tokens.argtypes = (
            c_void_p, c_void_p, c_int64, c_int64, c_void_p, c_int64, c_void_p, c_int64,
        )  # fmt: skip
        products = ("pack", "unpack_rows", "linear", "attention", "write_kv")
        quantized = ("pack_quantized", "unpack_quantized", "quantized_linear")
        rows = ("rms_norm", "add_rms_norm", "rotary", "silu_mul", "mask_tokens", "largest")
        for name in ("close", *products, *quantized, *rows):
            getattr(library, f"quire_{name}").restype = None
        self.library = library
        self.engine = c_void_p(library.quire_open(threads))
        if not self.engine:
            raise BackendUnavailable(f"the machine gives no {threads} threads")
        # not at the end of the process: a thread may still be in a call
        weakref.finalize(self, library.quire_close, self.engine).atexit = False


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


@dataclass(slots=True, frozen=True)
class _Packed:
    """`Product` over a weight in the native order."""

    native: _Native
    weight: Tensor
    """[outputs, width] in name: the numbers lie in another order."""
    bias: Tensor | None
    call: _Linear
    """What every call has in common, with room for the rest: calls do not overlap."""

    def __call__(self, x: Tensor) -> Tensor:
        return self._multiply(x, x.dtype)

    def wide(self, x: Tensor) -> Tensor:
        return self._multiply(x, torch.float32)

    def rows(self, ids: Tensor) -> Tensor:
        outputs, width = self.weight.shape
        out = torch.empty((ids.shape[0], width), dtype=self.weight.dtype)
        self.native.library.quire_unpack_rows(
            self.native.engine, _FORMATS[out.dtype], self.weight.data_ptr(), outputs, width, ids.data_ptr(),
            ids.shape[0], out.data_ptr(),
        )  # fmt: skip
        return out

    def parameters(self) -> Iterator[Tensor]:
        yield self.weight
        if self.bias is not None:
            yield self.bias

    def _multiply(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        outputs, width = self.weight.shape
        if x.dtype != self.weight.dtype or x.shape[1] != width or x.stride(1) != 1:
            raise KernelError(
                f"x is {x.dtype} {tuple(x.shape)}, the weight {self.weight.dtype} [{outputs}, {width}]"
            )
        out = torch.empty((x.shape[0], outputs), dtype=dtype)
        call = self.call
        call.x, call.stride, call.rows = x.data_ptr(), x.stride(0), x.shape[0]
        call.out_format, call.out = _FORMATS[dtype], out.data_ptr()
        self.native.library.quire_linear(self.native.engine, call)
        return out


@dataclass(slots=True, frozen=True)
class _PackedQuantized:
    """`Product` over a quantised weight in the native order."""

    native: _Native
    values: Tensor
    scales: Tensor
    group_size: int
    """Inputs that share a scale; 0 in 8 bits, where an output has one."""
    shape: tuple[int, int]
    """Outputs and width."""
    bias: Tensor | None
    """[outputs] float32."""
    dtype: torch.dtype
    call: _QuantizedLinear
    """As of `_Packed`."""

    def __call__(self, x: Tensor) -> Tensor:
        return self._multiply(x, self.dtype)

    def wide(self, x: Tensor) -> Tensor:
        return self._multiply(x, torch.float32)

    def rows(self, ids: Tensor) -> Tensor:
        out = torch.empty((ids.shape[0], self.shape[1]), dtype=self.dtype)
        self.native.library.quire_unpack_quantized(
            self.native.engine, self.values.data_ptr(), self.scales.data_ptr(), self.group_size, *self.shape,
            ids.data_ptr(), ids.shape[0], _FORMATS[out.dtype], out.data_ptr(),
        )  # fmt: skip
        return out

    def parameters(self) -> Iterator[Tensor]:
        yield self.values
        yield self.scales
        if self.bias is not None:
            yield self.bias

    def _multiply(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        outputs, width = self.shape
        if x.dtype != self.dtype or x.shape[1] != width or x.stride(1) != 1:
            raise KernelError(f"x is {x.dtype} {tuple(x.shape)}, the product of {self.dtype} [{outputs}, {width}]")
        out = torch.empty((x.shape[0], outputs), dtype=dtype)
        call = self.call
        call.x, call.stride, call.rows = x.data_ptr(), x.stride(0), x.shape[0]
        call.out_format, call.out = _FORMATS[dtype], out.data_ptr()
        self.native.library.quire_quantized_linear(self.native.engine, call)
        return out


@dataclass(slots=True, frozen=True)
class _StepAttention:
    """`PagedAttention`: everything is in the batch already."""

    native: _Native
    batch: PagedBatch
    window: int | None

    def __call__(self, query: Tensor, cache: Tensor, scale: float) -> Tensor:
        out = torch.empty(query.shape, dtype=query.dtype)
        _, _, size, kv_heads, _ = cache.shape
        keys, values = cache
        batch = self.batch
        call = _Attention(
            _FORMATS[query.dtype], _FORMATS[cache.dtype], query.data_ptr(), query.stride(0), query.shape[1],
            kv_heads, query.shape[2], keys.data_ptr(), values.data_ptr(), size, self.window or 0, scale,
            out.data_ptr(), out.stride(0), len(batch.contexts), batch.block_tables.shape[1],
            batch.block_tables.data_ptr(), batch.query_starts.data_ptr(), batch.context_lens.data_ptr(),
        )  # fmt: skip
        self.native.library.quire_attention(self.native.engine, call)
        return out


class CpuKernels:
    """Every operation by the native library, on `threads` threads, built for `level` or the processor's best.

    Raises `BackendUnavailable`.
    """

    name = "cpu"

    def __init__(self, threads: int, level: build.Level | None = None) -> None:
        self._native = _Native(threads, level)
        self._slabs = Slabs()

    @property
    def kept_bytes(self) -> int:
        """What the library keeps for itself between operations: room for the widest so far."""
        return int(self._native.library.quire_kept(self._native.engine))

    def product(self, weight: Tensor, bias: Tensor | None) -> Product:
        if weight.shape[1] % 2:
            return PlainProduct(weight, bias)  # pairs of an odd number of inputs would need another byte or two
        weight = self._slabs.settle(weight)
        self._native.library.quire_pack(
            self._native.engine, _FORMATS[weight.dtype], weight.data_ptr(), *weight.shape
        )
        outputs, width = weight.shape
        call = _Linear(
            format=_FORMATS[weight.dtype], width=width, weight=weight.data_ptr(), bias=_address(bias),
            outputs=outputs, out_stride=outputs,
        )  # fmt: skip
        return _Packed(self._native, weight, bias, call)

    def quantized_product(
        self, weight: QuantizedWeight, bias: Tensor | None, activations: Activations, dtype: torch.dtype
    ) -> Product:
        native, (outputs, width) = self._native, weight.shape
        scales = self._slabs.settle(weight.scales)
        if isinstance(weight, Int4Weight):
            values, group_size = weight.values, weight.group_size
            # the scales lie as the numbers do, in panels
            native.library.quire_pack(native.engine, _FORMATS[torch.float16], scales.data_ptr(), *scales.shape)
        else:
            # four inputs lie together; what is added costs memory twice for a moment, but few widths need it
            values, group_size = F.pad(weight.values, (0, -width % 4)) if width % 4 else weight.values, 0
        values = self._slabs.settle(values)
        native.library.quire_pack_quantized(
            native.engine, values.data_ptr(), *values.shape, isinstance(weight, Int4Weight)
        )
        wide_bias = None if bias is None else bias.float()
        call = _QuantizedLinear(
            format=_FORMATS[dtype], width=width, weight=values.data_ptr(), scales=scales.data_ptr(),
            group=group_size, bias=_address(wide_bias), outputs=outputs, round_input=activations == "int8",
            out_stride=outputs,
        )  # fmt: skip
        return _PackedQuantized(native, values, scales, group_size, (outputs, width), wide_bias, dtype, call)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        out = torch.empty(x.shape, dtype=x.dtype)
        heads = x.shape[1] if x.dim() == 3 else 1
        self._native.library.quire_rms_norm(
            self._native.engine, _FORMATS[x.dtype], x.shape[0], heads, x.shape[-1], x.data_ptr(), x.stride(0),
            x.stride(1), weight.data_ptr(), eps, out.data_ptr(),
        )  # fmt: skip
        return out

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
        out = torch.empty(x.shape, dtype=x.dtype)
        self._native.library.quire_add_rms_norm(
            self._native.engine, _FORMATS[x.dtype], *x.shape, x.data_ptr(), x.stride(0), residual.data_ptr(),
            residual.stride(0), weight.data_ptr(), eps, out.data_ptr(),
        )  # fmt: skip
        return out

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
        turned = num_heads + cache.shape[3]
        if norms is None:
            rotated = self.rotary(qkv[:, :turned], cos, sin)
            query, key = rotated[:, :num_heads], rotated[:, num_heads:]
        else:
            query = self.rotary(self.rms_norm(qkv[:, :num_heads], norms.query, norms.eps), cos, sin)
            key = self.rotary(self.rms_norm(qkv[:, num_heads:turned], norms.key, norms.eps), cos, sin)
        self.write_kv(key, qkv[:, turned:], cache, slots)
        return query

    def rotary(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Rotates the pairs of each head of `x` [T, heads, D]; `cos` and `sin` as of `place_heads`. New tensor."""
        out = torch.empty(x.shape, dtype=x.dtype)
        self._native.library.quire_rotary(
            self._native.engine, _FORMATS[x.dtype], *x.shape, x.data_ptr(), x.stride(0), x.stride(1),
            cos.data_ptr(), sin.data_ptr(), out.data_ptr(),
        )  # fmt: skip
        return out

    def write_kv(self, key: Tensor, value: Tensor, cache: Tensor, slots: Tensor) -> None:
        """Stores `key` and `value` [T, K, D] at `slots` [T] of `cache`, in its number format."""
        _, _, size, kv_heads, _ = cache.shape
        keys, values = cache
        call = _WriteKV(
            _FORMATS[key.dtype], _FORMATS[cache.dtype], key.data_ptr(), value.data_ptr(), key.stride(0),
            value.stride(0), key.shape[0], kv_heads, key.shape[2], size, slots.data_ptr(), keys.data_ptr(),
            values.data_ptr(),
        )  # fmt: skip
        self._native.library.quire_write_kv(self._native.engine, call)

    def paged_attention(self, batch: PagedBatch, *, window: int | None) -> _StepAttention:
        return _StepAttention(self._native, batch, window)

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        rows, both = gate_up.shape
        out = torch.empty((rows, both // 2), dtype=gate_up.dtype)
        self._native.library.quire_silu_mul(
            self._native.engine, _FORMATS[gate_up.dtype], rows, both // 2, gate_up.data_ptr(), gate_up.stride(0),
            out.data_ptr(),
        )  # fmt: skip
        return out

    def largest(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        rows, width = logits.shape
        values, places = torch.empty(rows), torch.empty(rows, dtype=torch.int64)
        self._native.library.quire_largest(
            self._native.engine, logits.data_ptr(), logits.stride(0), rows, width, values.data_ptr(),
            places.data_ptr(),
        )  # fmt: skip
        return values, places

    def mask_tokens(self, logits: Tensor, rows: Tensor, bits: Tensor) -> None:
        self._native.library.quire_mask_tokens(
            self._native.engine, logits.data_ptr(), logits.stride(0), logits.shape[1], rows.data_ptr(),
            rows.shape[0], bits.data_ptr(), bits.shape[1],
        )  # fmt: skip
