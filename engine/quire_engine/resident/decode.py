"""A step of one new token a request as one program: addresses, model, head, draw, with no host in between.

The program is the same for every step of so many items, so on a GPU it is captured once and replayed: one call
instead of hundreds. Batches are rounded up to the next of `BUCKETS`; what is added is padding, which sees nothing
and writes nowhere. A bucket is captured when it is first needed, or by `warm_up` as long as its time lasts.
All graphs share one pool of memory: no two run at once.

Legend: B items of a bucket, V vocabulary, S rows of the request table.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from dataclasses import dataclass

import torch
from torch import Tensor

from quire_engine.models import DecoderModel, KVCache
from quire_engine.resident.table import RequestTable
from quire_kernels.triton import sample
from quire_kernels.triton.step import StepBuffers, prepare

BUCKETS = (1, 2, 4, *range(8, 64, 8), *range(64, 256, 16), *range(256, 1025, 32))
"""Sizes of captured steps: at most an eighth of a larger step is padding."""


@dataclass(slots=True)
class _Bucket:
    buffers: StepBuffers
    tokens: Tensor
    """[B] int32, what was drawn."""
    graph: torch.cuda.CUDAGraph | None = None


class DecodeProgram:
    """Steps of up to `seats` items. `captures` False launches every kernel by itself."""

    def __init__(
        self,
        model: DecoderModel,
        kv: KVCache,
        table: RequestTable,
        *,
        block_size: int,
        max_model_len: int,
        captures: bool,
    ) -> None:
        self._model = model
        self._kv = kv
        self._table = table
        self._block_size = block_size
        self._max_model_len = max_model_len
        self._captures = captures
        self._sizes: tuple[int, ...] = (*(size for size in BUCKETS if size < table.seats), table.seats)
        self._buckets: dict[int, _Bucket] = {}
        self._pool = torch.cuda.graph_pool_handle() if captures else None
        self.scratch = sample.scratch(table.seats, model.profile.vocab_size, table.device)
        """For `sample.draw`."""

    @property
    def captured(self) -> tuple[int, ...]:
        """The sizes of steps that are replayed."""
        return tuple(sorted(size for size, bucket in self._buckets.items() if bucket.graph is not None))

    def size_for(self, num_items: int) -> int:
        """The bucket of a step."""
        return self._sizes[bisect_left(self._sizes, num_items)]

    def run(self, words: Tensor) -> Tensor:
        """Begin a step whose `words`, on the host, are those of `RequestTable.addresses`. Its tokens will be in
        what is returned, [B] int32 on the device.
        """
        num_items = words.shape[0]
        bucket = self._bucket(self.size_for(num_items))
        items = bucket.buffers.items
        items[:num_items].copy_(words, non_blocking=True)
        if num_items < items.shape[0]:
            items[num_items:].fill_(-1)
        if bucket.graph is None:
            self._compute(bucket)
        else:
            bucket.graph.replay()
        return bucket.tokens

    def warm_up(self, seconds: float) -> None:
        """Capture buckets, the largest first, until they are all there or the time is up."""
        until = time.monotonic() + seconds
        for size in reversed(self._sizes):
            self._bucket(size)
            if time.monotonic() > until:
                break

    def _bucket(self, size: int) -> _Bucket:
        bucket = self._buckets.get(size)
        if bucket is None:
            table = self._table
            buffers = StepBuffers.allocate(size, table.tables, self._block_size, self._max_model_len, table.device)
            bucket = _Bucket(buffers, torch.zeros(size, dtype=torch.int32, device=table.device))
            if self._captures:
                self._capture(bucket)
            self._buckets[size] = bucket
        return bucket

    def _capture(self, bucket: _Bucket) -> None:
        """All of its items are padding meanwhile, so running it changes nothing."""
        # kernels are compiled and libraries take their workspaces on the first run, which no graph could hold
        self._compute(bucket)
        torch.cuda.current_stream().synchronize()
        graph = torch.cuda.CUDAGraph()
        # other threads (masks, the collector of events) may touch the device meanwhile
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            self._compute(bucket)
        bucket.graph = graph

    def _compute(self, bucket: _Bucket) -> None:
        table, step = self._table, bucket.buffers
        prepare(step, table.tables, table.last_token)
        states = self._model.forward(step.token_ids, step.batches, self._kv)
        logits = self._model.narrow_logits(states)
        sample.draw(logits, step.rows, step.ends, table.draws, bucket.tokens, table.last_token, self.scratch)
