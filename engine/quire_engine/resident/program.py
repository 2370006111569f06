"""A step as one program: addresses, model, head, draw, with no host in between.

The program is the same for every step of one shape, so on a GPU it is captured once and replayed: one call
instead of hundreds. There are two kinds of shapes, each in some sizes up to which a step is filled with padding,
which sees nothing and writes nowhere:

    decode   B items of one new token each
    mixed    up to T tokens of up to B items, prompts and others; only small ones, for in a large step the device
             is busy for longer than the host needs to launch everything

A shape is captured when it is first needed; `warm_up` does so ahead, as long as its time lasts, and then lets go
of sizes that take no less time than a larger one: libraries choose their kernels by tables, and some rows of those
are bad. All graphs share one pool of memory: no two run at once.

Legend: B items of a shape, T tokens, X groups of layers, V vocabulary.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from quire_engine.models import DecoderModel, KVCache
from quire_engine.resident.table import RequestTable
from quire_kernels.triton import sample
from quire_kernels.triton.step import MixedBuffers, StepBuffers, prepare, prepare_mixed

DECODE_SIZES = (1, 2, 4, *range(8, 64, 8), *range(64, 128, 16), *range(128, 256, 32), *range(256, 1025, 64))
"""B of decode shapes."""
MIXED_TOKENS = (64, 128, 192, 256, 320, 384, 448, 512, 640, 768, 896, 1024, 1280, 1536, 1792, 2048)
"""T of mixed shapes."""
MIXED_ITEMS = (16,)
"""B of mixed shapes, besides all seats."""


_WORTH = 1.01
"""A size may take this times as long as a larger one before it is let go of: less is noise."""


@dataclass(slots=True)
class _Shape:
    """What a step is put into, how it is computed, and where its tokens will be, [B] int32."""

    buffers: StepBuffers | MixedBuffers
    compute: Callable[[], None]
    tokens: Tensor
    graph: torch.cuda.CUDAGraph | None = None

    def run(self) -> Tensor:
        if self.graph is None:
            self.compute()
        else:
            self.graph.replay()
        return self.tokens


class StepProgram:
    """Steps of up to as many items as `table` has seats. `stream` is that of captures, of which there is one in a
    process: libraries have a workspace for each stream, and keep it. None: every kernel is launched by itself."""

    def __init__(
        self,
        model: DecoderModel,
        kv: KVCache,
        table: RequestTable,
        *,
        block_size: int,
        max_model_len: int,
        max_num_batched_tokens: int,
        stream: torch.cuda.Stream | None,
    ) -> None:
        self._model = model
        self._kv = kv
        self._table = table
        self._block_size = block_size
        self._max_model_len = max_model_len
        self._decode_sizes = _up_to(table.seats, DECODE_SIZES)
        self._mixed_items = _up_to(table.seats, MIXED_ITEMS)
        sizes = mixed_sizes(max_num_batched_tokens)
        self._mixed_tokens = dict.fromkeys(self._mixed_items, sizes)
        self._most_tokens = sizes[-1]
        self._decode: dict[int, _Shape] = {}
        self._mixed: dict[tuple[int, int], _Shape] = {}
        self._pool: Any = None
        self._stream = stream
        self.scratch = sample.scratch(table.seats, model.profile.vocab_size, table.device)
        """For `sample.draw`."""

    @property
    def captured(self) -> int:
        """How many shapes are replayed."""
        return sum(shape.graph is not None for shape in (*self._decode.values(), *self._mixed.values()))

    def decode(self, words: Tensor, count: int) -> Tensor:
        """Begin a step of one new token each. The first `count` of `words`, which are on the host and have a row
        for each seat, are those of `RequestTable.addresses`. Its tokens will be in what is returned, [B] int32 on
        the device.
        """
        shape = self._decode_shape(_fitting(self._decode_sizes, count))
        _fill(shape.buffers.items, words, count)
        return shape.run()

    def fits(self, num_tokens: int) -> bool:
        """Whether a mixed step has a shape."""
        return num_tokens <= self._most_tokens

    def mixed(self, words: Tensor, count: int, token_ids: Tensor) -> Tensor:
        """Begin a step whose `words` are those of `RequestTable.spans`, given like those of `decode`, and whose
        `token_ids` [T] int32 all on the host. Its tokens will be in what is returned, [B] int32; those of items
        that draw nothing mean nothing.
        """
        num_items = _fitting(self._mixed_items, count)
        shape = self._mixed_shape(_fitting(self._mixed_tokens[num_items], token_ids.shape[0]), num_items)
        buffers = shape.buffers
        if isinstance(buffers, MixedBuffers):
            buffers.given[: token_ids.shape[0]].copy_(token_ids, non_blocking=True)
        _fill(buffers.items, words, count)
        return shape.run()

    def launched(self, words: Tensor, count: int, token_ids: Tensor) -> Tensor:
        """`mixed`, kernel by kernel, for a step of any number of tokens."""
        # as if all were as long as can be: for fewer splits of keys the kernel would be another one, and some step
        # would wait seconds for it
        spans = [(self._max_model_len - many, many) for _, _, many, _ in words[:count].tolist()]
        buffers = MixedBuffers.allocate(
            token_ids.shape[0], count, self._table.tables, self._block_size, self._max_model_len, spans
        )
        buffers.given.copy_(token_ids, non_blocking=True)
        _fill(buffers.items, words, count)
        return self._mixed_of(buffers).run()

    def release(self) -> None:
        """Let go of what was captured; it is captured again if it is needed again."""
        self._decode.clear()
        self._mixed.clear()

    def warm_up(self, seconds: float) -> None:
        """Capture shapes until they are all there or the time is up: the largest of each kind first."""
        until = time.monotonic() + seconds
        captures: list[Callable[[], _Shape]] = [
            *(partial(self._decode_shape, size) for size in reversed(self._decode_sizes)),
            *(
                partial(self._mixed_shape, num_tokens, num_items)
                for num_items in reversed(self._mixed_items)
                for num_tokens in reversed(self._mixed_tokens[num_items])
            ),
        ]
        for capture in captures:
            if time.monotonic() > until:
                break
            capture()
        self._weed()

    def _weed(self) -> None:
        """Let go of sizes that are not worth having."""
        self._decode_sizes = _worth_having(self._decode_sizes, self._decode)
        self._decode = {size: self._decode[size] for size in self._decode_sizes if size in self._decode}
        for num_items in self._mixed_items:
            mixed = {tokens: shape for (tokens, items), shape in self._mixed.items() if items == num_items}
            kept = self._mixed_tokens[num_items] = _worth_having(self._mixed_tokens[num_items], mixed)
            for tokens in mixed.keys() - set(kept):
                del self._mixed[tokens, num_items]

    def _decode_shape(self, num_items: int) -> _Shape:
        shape = self._decode.get(num_items)
        if shape is None:
            table = self._table
            buffers = StepBuffers.allocate(
                num_items, table.tables, self._block_size, self._max_model_len, table.device
            )
            tokens = torch.zeros(num_items, dtype=torch.int32, device=table.device)

            def compute() -> None:
                prepare(buffers, table.tables, table.last_token)
                states = self._model.forward(buffers.token_ids, buffers.batches, self._kv)
                self._draw(states, buffers.rows, buffers.ends, tokens)

            shape = self._decode[num_items] = self._captured(_Shape(buffers, compute, tokens))
        return shape

    def _mixed_shape(self, num_tokens: int, num_items: int) -> _Shape:
        shape = self._mixed.get((num_tokens, num_items))
        if shape is None:
            buffers = MixedBuffers.allocate(
                num_tokens, num_items, self._table.tables, self._block_size, self._max_model_len
            )
            shape = self._mixed[num_tokens, num_items] = self._captured(self._mixed_of(buffers))
        return shape

    def _mixed_of(self, buffers: MixedBuffers) -> _Shape:
        table = self._table
        tokens = torch.zeros(buffers.items.shape[0], dtype=torch.int32, device=table.device)

        def compute() -> None:
            prepare_mixed(buffers, table.tables, table.last_token)
            states = self._model.forward(buffers.token_ids, buffers.batches, self._kv)
            self._draw(states, buffers.rows[1], buffers.ends, tokens)

        return _Shape(buffers, compute, tokens)

    def _draw(self, states: Tensor, rows: Tensor, ends: Tensor, tokens: Tensor) -> None:
        table = self._table
        sample.draw(
            self._model.narrow_logits(states),
            rows,
            ends,
            table.draws,
            tokens,
            table.last_token,
            self.scratch,
            self._model.profile.logit_softcap,
        )

    def _captured(self, shape: _Shape) -> _Shape:
        """With its graph, if there are any. All items are padding meanwhile: running it changes nothing."""
        if self._stream is None:
            return shape
        # kernels are compiled and libraries take their workspaces on the first run, which no graph could hold
        shape.compute()
        torch.cuda.current_stream().synchronize()
        if not self.captured:  # a pool is gone with the last graph that used it
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        # by hand: `torch.cuda.graph` would collect Python's garbage and give memory back each time, and the loop
        # that waits for this one serves everybody
        with torch.cuda.stream(self._stream):
            # other threads (masks, tokenizing) may touch the device meanwhile
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                shape.compute()
            finally:
                graph.capture_end()
        torch.cuda.current_stream().wait_stream(self._stream)
        shape.graph = graph
        return shape


def mixed_sizes(max_num_batched_tokens: int) -> tuple[int, ...]:
    """T of the mixed shapes of an engine: no step has more tokens than the last, unless none is as large."""
    return MIXED_TOKENS[: bisect_left(MIXED_TOKENS, max_num_batched_tokens) + 1]


def _up_to(most: int, sizes: tuple[int, ...]) -> tuple[int, ...]:
    """Those of `sizes` that are smaller, and `most`."""
    return (*(size for size in sizes if size < most), most)


def _fitting(sizes: tuple[int, ...], count: int) -> int:
    return sizes[bisect_left(sizes, count)]


def _worth_having(sizes: tuple[int, ...], shapes: Mapping[int, _Shape]) -> tuple[int, ...]:
    """Those of `sizes` that take less time than every larger one, as far as they have graphs. A graph that nothing
    was put into computes on padding, which takes as long.
    """
    kept, best = list[int](), float("inf")
    for size in reversed(sizes):
        graph = shapes[size].graph if size in shapes else None
        if graph is not None:
            seconds = _seconds(graph)
            if seconds > _WORTH * best:
                continue
            best = seconds
        kept.append(size)
    return tuple(reversed(kept))


def _seconds(graph: torch.cuda.CUDAGraph) -> float:
    """The shortest of three replays, after one."""
    graph.replay()
    found = list[float]()
    for _ in range(3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        found.append(start.elapsed_time(end) / 1000)
    return min(found)


def _fill(items: Tensor, words: Tensor, count: int) -> None:
    """The first `count` of `words`, from the host, and padding behind them."""
    size = items.shape[0]
    words.numpy()[count:size] = -1
    items.copy_(words[:size], non_blocking=True)
