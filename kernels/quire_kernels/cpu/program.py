"""A step as one call: what a model does is written down once, as a list of native operations, and run ever after.

Python goes through the body of a model a single time, on a stand-in of a step whose operations are recorded and
not carried out (`Recording`). What they read of a step lies in buffers, where each step's is copied to; what they
give lies in buffers, too, which are used again as soon as nobody holds their tensor any more. As every operation
knows its rows by one number and nothing else depends on how many there are, the recording serves for all counts of
tokens and of wanted rows up to what the buffers hold; for a larger step it is made anew.

The body may do nothing with what it is given but hand it, views of it, and what it gets for it, to operations. A
tensor from elsewhere would be another one in the next step: it is refused.

Legend: see `quire_kernels`.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from ctypes import c_int64, c_void_p
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from quire_kernels.cpu.native import Call, Native, NotRecordable, Sequences, memory_of
from quire_kernels.errors import KernelError
from quire_kernels.memory import large_pages
from quire_kernels.paging import PagedBatch

if TYPE_CHECKING:
    from quire_kernels import Body

_TOKENS, _ROWS = 3, 2
"""Of the stand-in. No matter how many, but they must differ."""

_GRAIN = 64
"""Buffers are made for a multiple of so many tokens."""


class _Recorded(ctypes.Structure):
    _fields_ = (("function", c_void_p), ("call", c_void_p), ("count", c_int64))


class Recording:
    """What is written down, and the buffers for `most` rows that it is about."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.calls: list[Call] = []
        self._buffers: list[Tensor] = []
        self._free: dict[int, list[int]] = {}
        self._sequences: list[tuple[PagedBatch, Sequences]] = []

    @property
    def bytes(self) -> int:
        """Of all buffers."""
        return sum(buffer.nbytes for buffer in self._buffers)

    def empty(self, shape: tuple[int, ...] | torch.Size, dtype: torch.dtype) -> Tensor:
        """A buffer's first rows. The buffer is free again when the tensor and all its views are gone."""
        rows, *rest = shape
        self._check_rows(rows)
        per_row = dtype.itemsize
        for size in rest:
            per_row *= size
        needed = -(-self.most * per_row // 64) * 64
        free = self._free.setdefault(needed, [])
        if free:
            at = free.pop()
        else:
            self._buffers.append(large_pages(torch.empty(needed + 64, dtype=torch.uint8)))
            at = -(-self._buffers[-1].data_ptr() // 64) * 64
        memory = memory_of(needed, at)
        weakref.finalize(memory, free.append, at)
        return torch.frombuffer(memory, dtype=dtype, count=rows * per_row // dtype.itemsize).view(shape)

    def address(self, tensor: Tensor) -> int:
        at = tensor.data_ptr()
        if not any(0 <= at - buffer.data_ptr() < buffer.nbytes for buffer in self._buffers):
            raise KernelError("a step is recorded, and an operation was given a tensor that is not of the step")
        return at

    def add(self, call: Call) -> None:
        self._check_rows(call.rows)
        self.calls.append(type(call).from_buffer_copy(call))

    def sequences(self, batch: PagedBatch) -> Sequences:
        """Those of a stand-in's batch; each step's are put there."""
        for known, sequences in self._sequences:
            if known is batch:
                return sequences
        self._sequences.append((batch, Sequences()))
        return self._sequences[-1][1]

    def _check_rows(self, rows: int) -> None:
        if rows not in (_TOKENS, _ROWS):
            raise KernelError(f"a step of {_TOKENS} tokens is recorded, and an operation has {rows} rows")


@dataclass(frozen=True, slots=True)
class _Program:
    """A recording that can be run."""

    recording: Recording
    inputs: list[int]
    """Where the slots of each batch go, then token ids, positions, and the rows that are wanted."""
    sequences: list[Sequences]
    calls: ctypes.Array[_Recorded]
    result: Tensor
    """For as many rows as there can be."""
    results: dict[int, Tensor] = field(default_factory=dict)
    """Its first rows, by their number: a step goes through all memory, and torch's own code is far away then."""

    def run(self, native: Native, token_ids: Tensor, batches: Sequence[PagedBatch]) -> Tensor:
        first = batches[0]
        tokens, rows = token_ids.shape[0], first.logits_rows.shape[0]
        given = [*(batch.slot_mapping for batch in batches), token_ids, first.positions, first.logits_rows]
        for buffer, tensor in zip(self.inputs, given, strict=True):
            ctypes.memmove(buffer, tensor.data_ptr(), tensor.nbytes)
        for sequences, batch in zip(self.sequences, batches, strict=True):
            sequences.point_to(batch)
        counts = (c_int64 * 2)(tokens, rows)
        native.library.quire_run(native.engine, self.calls, len(self.calls), counts)
        states = self.results.get(rows)
        if states is None:
            states = self.results[rows] = self.result[:rows]
        return states


class Recorded:
    """A body that is computed by its recording."""

    def __init__(self, native: Native, body: Body) -> None:
        self._native = native
        self._body = body
        self._program: _Program | None = None
        self._recordable = True

    @property
    def tokens(self) -> int:
        """Of the largest step that the recording serves; 0 without one."""
        return 0 if self._program is None else self._program.recording.most

    @property
    def bytes(self) -> int:
        """Of its buffers."""
        return 0 if self._program is None else self._program.recording.bytes

    def __call__(self, token_ids: Tensor, batches: Sequence[PagedBatch]) -> Tensor:
        tokens = token_ids.shape[0]
        if self._recordable and self.tokens < tokens:
            self._program = None  # its buffers first
            try:
                self._program = self._record(-(-tokens // _GRAIN) * _GRAIN, token_ids, batches)
            except NotRecordable:
                self._recordable = False
        if self._program is None:
            return self._body(token_ids, batches)
        return self._program.run(self._native, token_ids, batches)

    def _record(self, most: int, token_ids: Tensor, batches: Sequence[PagedBatch]) -> _Program:
        recording = Recording(most)

        def buffer(like: Tensor, rows: int) -> Tensor:
            return recording.empty((rows, *like.shape[1:]), like.dtype)

        slots = [buffer(batch.slot_mapping, _TOKENS) for batch in batches]
        ids, positions = buffer(token_ids, _TOKENS), buffer(batches[0].positions, _TOKENS)
        rows = buffer(batches[0].logits_rows, _ROWS)
        stand_ins = [
            replace(
                batch,
                positions=positions,
                slot_mapping=at,
                logits_rows=rows,
                query_lens=(1,) * _TOKENS,
                every_row=False,
            )
            for batch, at in zip(batches, slots, strict=True)
        ]
        with _recorded_by(self._native, recording):
            result = self._body(ids, stand_ins)
        calls = (_Recorded * len(recording.calls))()
        for entry, call in zip(calls, recording.calls, strict=True):
            entry.function = ctypes.cast(self._native.functions[type(call)], c_void_p).value
            entry.call = ctypes.addressof(call)
            entry.count = 0 if call.rows == _TOKENS else 1
        return _Program(
            recording,
            [recording.address(tensor) for tensor in (*slots, ids, positions, rows)],
            [recording.sequences(batch) for batch in stand_ins],
            calls,
            _whole(recording, result),
        )


@contextmanager
def _recorded_by(native: Native, recording: Recording) -> Iterator[None]:
    native.recording = recording
    try:
        yield
    finally:
        native.recording = None


def _whole(recording: Recording, tensor: Tensor) -> Tensor:
    """The buffer that a tensor has the first rows of."""
    at, width = recording.address(tensor), tensor[0].numel()
    memory = memory_of(recording.most * width * tensor.itemsize, at)
    return torch.frombuffer(memory, dtype=tensor.dtype).view(recording.most, *tensor.shape[1:])
