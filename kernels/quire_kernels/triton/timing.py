"""What `tuning` needs of a device: code for launches, the time they take, and which file is that of a kernel."""

from __future__ import annotations

import functools
import hashlib
import os
import re
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import triton
from triton import AsyncCompileMode
from triton.runtime.errors import TritonError
from triton.runtime.jit import KernelInterface

from quire_kernels.tilings import Record

COMPILERS = min(8, os.cpu_count() or 1)
"""Threads that compile at once."""
_IMPORTED = re.compile(r"^ *from quire_kernels\.triton\.(\w+) import", re.MULTILINE)


UNFIT = (RuntimeError, TritonError)
"""What the compiler, the driver and torch raise of a candidate that does not fit a card."""


def compile_ahead(launches: Iterable[Callable[[], object]], until: float, workers: int = COMPILERS) -> None:
    """See `tuning.Ahead`: several at once. What a compiler's thread raises shows when that is launched; what one
    of `launches` raises, this does. Other threads launch meanwhile as ever.
    """
    with (
        _COMPILING,
        _Paced(workers, thread_name_prefix="compile") as pool,
        AsyncCompileMode(pool, ignore_errors=True),
    ):
        for launch in launches:
            if time.monotonic() >= until:
                break
            launch()


class _Compiling:
    """A thread inside launches nothing: what it would launch is compiled. Triton has no word for that but its own
    launch, which therefore is another one while there is such a thread, and then only."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._threads = set[int]()
        self._launch: Callable[[Any, Any], Callable[..., Any]] = KernelInterface.__getitem__

    def __enter__(self) -> None:
        with self._lock:
            if not self._threads:
                self._launch = KernelInterface.__getitem__
                KernelInterface.__getitem__ = lambda kernel, grid: self._or_compile(kernel, grid)
            self._threads.add(threading.get_ident())

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._threads.discard(threading.get_ident())
            if not self._threads:
                KernelInterface.__getitem__ = self._launch

    def _or_compile(self, kernel: Any, grid: Any) -> Callable[..., Any]:
        if threading.get_ident() not in self._threads:
            return self._launch(kernel, grid)
        return lambda *args, **options: kernel.run(*args, grid=grid, warmup=True, **options)


_COMPILING = _Compiling()


class _Paced(ThreadPoolExecutor):
    """Takes no more than it has threads for: what is not begun when the time is up is never asked for."""

    def __init__(self, workers: int, **options: Any) -> None:
        super().__init__(workers, **options)
        self._room = threading.Semaphore(workers)

    def submit(self, work: Callable[..., Any], /, *args: Any, **options: Any) -> Future[Any]:
        self._room.acquire()
        future = super().submit(work, *args, **options)
        future.add_done_callback(lambda _: self._room.release())
        return future


class Replays:
    """A `Timer`: launches are captured in a graph, as they will be, and replayed between events. `stream` is that
    of captures: libraries have a workspace for each stream."""

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self._stream = stream
        self._pool: Any = None
        self._there: weakref.WeakSet[Callable[[], float]] = weakref.WeakSet()

    def __call__(self, launches: Sequence[Callable[[], object]]) -> Callable[[], float]:
        if not self._there:  # a pool is gone with the last graph that used it
            torch.cuda.empty_cache()
            self._pool = torch.cuda.graph_pool_handle()
        launches[0]()  # what is not loaded yet no graph could hold
        graph, count = torch.cuda.CUDAGraph(), len(launches)
        torch.cuda.current_stream().synchronize()
        with torch.cuda.stream(self._stream):
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                for launch in launches:
                    launch()
            finally:
                graph.capture_end()
        torch.cuda.current_stream().wait_stream(self._stream)
        graph.replay()

        def seconds() -> float:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            return float(start.elapsed_time(end)) / 1000 / count

        self._there.add(seconds)
        return seconds


def records_of(card: Mapping[str, str | int]) -> Callable[[str], Record]:
    """Of each kernel, by the name of its file here, what is on disk for a card."""

    @functools.cache
    def record(kernel: str) -> Record:
        source = hashlib.sha256()
        for path in sorted(_sources(kernel)):
            source.update(path.read_bytes())
        versions = {"torch": str(torch.__version__), "triton": str(triton.__version__)}
        return Record({"kernel": kernel, "source": source.hexdigest()[:16], **card, **versions})

    return record


def _sources(name: str) -> set[Path]:
    """The file of a kernel, and those here that it imports."""
    found, wanted = set[Path](), {name}
    while wanted:
        path = Path(__file__).with_name(f"{wanted.pop()}.py")
        if path not in found:
            found.add(path)
            wanted.update(_IMPORTED.findall(path.read_text()))
    return found
