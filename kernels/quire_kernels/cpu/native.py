"""The library from Python's side: the structs of its operations, and whoever runs them.

An operation is a struct that begins with the number of rows, and a function that takes nothing else (`abi.cpp`).
`Native.run` hands it over at once or, while a step is recorded, to the recording (`program`).
"""

from __future__ import annotations

import ctypes
import weakref
from ctypes import c_char, c_double, c_float, c_int, c_int64, c_void_p
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from quire_kernels.cpu import build
from quire_kernels.errors import BackendUnavailable, KernelError
from quire_kernels.paging import PagedBatch

if TYPE_CHECKING:
    from quire_kernels.cpu.program import Recording


class NotRecordable(KernelError):
    """An operation of a step that is recorded is not a native one. It does not leave this package."""


FORMATS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int8: 3}


class Call(ctypes.Structure):
    """The struct of an operation; `operation` is its name in the library."""

    operation: ClassVar[str]
    rows: int


class Linear(Call):
    operation = "quire_linear"
    _fields_ = (
        ("rows", c_int64), ("format", c_int64), ("x", c_void_p), ("stride", c_int64), ("width", c_int64),
        ("weight", c_void_p), ("bias", c_void_p), ("outputs", c_int64),
        ("out_format", c_int64), ("out", c_void_p), ("out_stride", c_int64),
    )  # fmt: skip


class UnpackRows(Call):
    operation = "quire_unpack_rows"
    _fields_ = (
        ("rows", c_int64), ("format", c_int64), ("weight", c_void_p), ("outputs", c_int64), ("width", c_int64),
        ("ids", c_void_p), ("out", c_void_p),
    )  # fmt: skip


class QuantizedLinear(Call):
    operation = "quire_quantized_linear"
    _fields_ = (
        ("rows", c_int64), ("format", c_int64), ("x", c_void_p), ("stride", c_int64), ("width", c_int64),
        ("weight", c_void_p), ("scales", c_void_p), ("group", c_int64), ("bias", c_void_p), ("outputs", c_int64),
        ("round_input", c_int64), ("out_format", c_int64), ("out", c_void_p), ("out_stride", c_int64),
    )  # fmt: skip


class UnpackQuantized(Call):
    operation = "quire_unpack_quantized"
    _fields_ = (
        ("rows", c_int64), ("format", c_int64), ("weight", c_void_p), ("scales", c_void_p), ("group", c_int64),
        ("outputs", c_int64), ("width", c_int64), ("ids", c_void_p), ("out", c_void_p),
    )  # fmt: skip


class Route(Call):
    operation = "quire_route"
    _fields_ = (
        ("rows", c_int64), ("logits", c_void_p), ("stride", c_int64), ("experts", c_int64), ("chosen", c_int64),
        ("over_chosen", c_int64), ("choice", c_void_p), ("shares", c_void_p),
    )  # fmt: skip


class ExpertsCall(Call):
    """`floats` is the address of `Linear`s, or `quantized` of `QuantizedLinear`s. A `limit` of 0 is silu."""

    operation = "quire_experts"
    _fields_ = (
        ("rows", c_int64), ("format", c_int64), ("x", c_void_p), ("stride", c_int64), ("width", c_int64),
        ("inner", c_int64), ("experts", c_int64), ("chosen", c_int64), ("choice", c_void_p), ("shares", c_void_p),
        ("alpha", c_double), ("limit", c_double), ("floats", c_void_p), ("quantized", c_void_p), ("out", c_void_p),
    )  # fmt: skip


class RmsNorm(Call):
    operation = "quire_rms_norm"
    _fields_ = (
        ("rows", c_int64), ("format", c_int64), ("x", c_void_p), ("stride", c_int64), ("width", c_int64),
        ("weight_format", c_int64), ("weight", c_void_p), ("eps", c_double), ("out", c_void_p),
    )  # fmt: skip


class AddRmsNorm(Call):
    operation = "quire_add_rms_norm"
    _fields_ = (
        ("rows", c_int64), ("format", c_int64), ("x", c_void_p), ("stride", c_int64), ("width", c_int64),
        ("residual", c_void_p), ("residual_stride", c_int64), ("weight_format", c_int64), ("weight", c_void_p),
        ("eps", c_double), ("out", c_void_p),
    )  # fmt: skip


class Turns(Call):
    operation = "quire_turns"
    _fields_ = (
        ("rows", c_int64), ("positions", c_void_p), ("frequencies", c_void_p), ("width", c_int64),
        ("factor", c_double), ("cos", c_void_p), ("sin", c_void_p),
    )  # fmt: skip


class PlaceHeads(Call):
    operation = "quire_place_heads"
    _fields_ = (
        ("rows", c_int64), ("format", c_int64), ("qkv", c_void_p), ("stride", c_int64), ("heads", c_int64),
        ("norm_format", c_int64), ("query_norm", c_void_p), ("key_norm", c_void_p), ("eps", c_double),
        ("cos", c_void_p), ("sin", c_void_p), ("slots", c_void_p), ("kv_format", c_int64), ("kv_heads", c_int64),
        ("head_dim", c_int64), ("block_size", c_int64), ("keys", c_void_p), ("values", c_void_p),
        ("out", c_void_p),
    )  # fmt: skip


class Gate(Call):
    _fields_ = (
        ("rows", c_int64), ("format", c_int64), ("gate_up", c_void_p), ("stride", c_int64), ("width", c_int64),
        ("out", c_void_p),
    )  # fmt: skip


class SiluMul(Gate):
    operation = "quire_silu_mul"


class GeluMul(Gate):
    operation = "quire_gelu_mul"


class Multiply(Call):
    operation = "quire_multiply"
    _fields_ = (
        ("rows", c_int64), ("format", c_int64), ("x", c_void_p), ("stride", c_int64), ("width", c_int64),
        ("factor", c_double),
    )  # fmt: skip


class Take(Call):
    """`stride` and `width` are bytes."""

    operation = "quire_take"
    _fields_ = (
        ("rows", c_int64), ("x", c_void_p), ("stride", c_int64), ("width", c_int64), ("ids", c_void_p),
        ("out", c_void_p),
    )  # fmt: skip


class Largest(Call):
    operation = "quire_largest"
    _fields_ = (
        ("rows", c_int64), ("logits", c_void_p), ("stride", c_int64), ("width", c_int64), ("values", c_void_p),
        ("places", c_void_p),
    )  # fmt: skip


class Head(Call):
    """`product` is the address of its struct, of which all but its rows, input and result counts."""

    _fields_ = (
        ("rows", c_int64), ("product", c_void_p), ("x", c_void_p), ("stride", c_int64), ("values", c_void_p),
        ("places", c_void_p),
    )  # fmt: skip


class LinearLargest(Head):
    operation = "quire_linear_largest"


class QuantizedLargest(Head):
    operation = "quire_quantized_largest"


class CapLogits(Call):
    operation = "quire_cap_logits"
    _fields_ = (
        ("rows", c_int64), ("logits", c_void_p), ("stride", c_int64), ("width", c_int64), ("cap", c_double),
    )  # fmt: skip


class MaskTokens(Call):
    operation = "quire_mask_tokens"
    _fields_ = (
        ("rows", c_int64), ("logits", c_void_p), ("stride", c_int64), ("width", c_int64), ("ids", c_void_p),
        ("bits", c_void_p), ("bits_stride", c_int64),
    )  # fmt: skip


class Attention(Call):
    """`sequences` is the address of a `Sequences`; what `_step` names is filled in from there."""

    operation = "quire_attention"
    _fields_ = (
        ("rows", c_int64), ("format", c_int64), ("kv_format", c_int64),
        ("query", c_void_p), ("query_stride", c_int64), ("heads", c_int64), ("kv_heads", c_int64),
        ("head_dim", c_int64), ("keys", c_void_p), ("values", c_void_p), ("block_size", c_int64),
        ("window", c_int64), ("scale", c_float), ("softcap", c_float), ("sinks", c_void_p), ("out", c_void_p),
        ("out_stride", c_int64), ("_step", c_int64 * 5), ("sequences", c_void_p),
    )  # fmt: skip


class Sequences(ctypes.Structure):
    """What a step says of its sequences to every layer of a kind."""

    _fields_ = (
        ("count", c_int64), ("table_width", c_int64), ("block_tables", c_void_p), ("query_starts", c_void_p),
        ("contexts", c_void_p),
    )  # fmt: skip

    def point_to(self, batch: PagedBatch) -> None:
        """Take those of `batch`, which must outlive all that reads them here."""
        self.count, self.table_width = batch.block_tables.shape
        self.block_tables = batch.block_tables.data_ptr()
        self.query_starts = batch.query_starts.data_ptr()
        self.contexts = batch.context_lens.data_ptr()


CALLS: tuple[type[Call], ...] = (
    Linear, UnpackRows, QuantizedLinear, UnpackQuantized, Route, ExpertsCall, RmsNorm, AddRmsNorm, Turns,
    PlaceHeads, SiluMul, GeluMul, Multiply, Take, Largest, LinearLargest, QuantizedLargest, CapLogits, MaskTokens,
    Attention,
)  # fmt: skip


class Native:
    """The library with a pool of threads. Calls must not overlap: an engine makes one step at a time."""

    def __init__(self, threads: int, level: build.Level | None) -> None:
        library = build.opened(level)
        library.quire_open.restype = c_void_p
        library.quire_open.argtypes = (c_int,)
        library.quire_close.argtypes = (c_void_p,)
        library.quire_kept.restype = c_int64
        library.quire_kept.argtypes = (c_void_p,)
        library.quire_pack.argtypes = (c_void_p, c_int64, c_void_p, c_int64, c_int64)
        library.quire_pack_quantized.argtypes = (c_void_p, c_void_p, c_int64, c_int64, c_int)
        library.quire_run.argtypes = (c_void_p, c_void_p, c_int64, c_void_p)
        for call in CALLS:
            getattr(library, call.operation).argtypes = (c_void_p, ctypes.POINTER(call))
        for name in ("close", "pack", "pack_quantized", "run"):
            getattr(library, f"quire_{name}").restype = None
        self.functions = {call: getattr(library, call.operation) for call in CALLS}
        for function in self.functions.values():
            function.restype = None
        self.library = library
        self.engine = c_void_p(library.quire_open(threads))
        if not self.engine:
            raise BackendUnavailable(f"the machine gives no {threads} threads")
        # not at the end of the process: a thread may still be in a call
        weakref.finalize(self, library.quire_close, self.engine).atexit = False
        self.recording: Recording | None = None

    def run(self, call: Call) -> None:
        """Carry it out, or write it down while a step is recorded. It may be changed afterwards."""
        if self.recording is None:
            self.functions[type(call)](self.engine, call)
        else:
            self.recording.add(call)

    def empty(self, shape: tuple[int, ...] | torch.Size, dtype: torch.dtype) -> Tensor:
        """A tensor for a result, whose first dimension is rows."""
        return torch.empty(shape, dtype=dtype) if self.recording is None else self.recording.empty(shape, dtype)

    def address(self, tensor: Tensor) -> int:
        """Where an input lies that differs from step to step."""
        return tensor.data_ptr() if self.recording is None else self.recording.address(tensor)


def address(tensor: Tensor | None) -> int | None:
    """Where a parameter lies."""
    return None if tensor is None else tensor.data_ptr()


def memory_of(count: int, at: int) -> ctypes.Array[c_char]:
    """`count` bytes at an address, as an object that torch can make a tensor of."""
    return (c_char * count).from_address(at)
