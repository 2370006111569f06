"""What is measured on: a GPU, or in a rehearsal a processor that stands for it.

Times on a GPU lie between events, and what is short is launched from a graph. In a rehearsal they are the host's;
kernels run in Triton's interpreter, nothing is captured, and no time means anything.
"""

from __future__ import annotations

import contextlib
import gc
import os
import shutil
import statistics
import subprocess
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import Any, Literal

import torch
import triton
from torch import Tensor
from torch.autograd import DeviceType  # type: ignore[attr-defined]
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu.workloads import Scale
from quire_kernels import Kernels, Product
from quire_kernels import load as load_kernels
from quire_kernels.reference import ReferenceKernels
from quire_kernels.triton import TritonKernels

Dtype = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True, slots=True)
class Card:
    """What the GPU gives, measured: bytes a second of a copy (read and written), operations a second in bf16."""

    bandwidth: float
    bf16: float


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes. `used`: of the device, by everybody; None if nobody says. `reserved`, `peak`: the most that torch's
    allocator held, and gave out. `free`: what may still be had.
    """

    used: int | None
    reserved: int
    peak: int
    free: int


@dataclass(frozen=True, slots=True)
class Span:
    """A kernel or copy on the device, from `start` to `end`, in microseconds."""

    name: str
    start: float
    end: float


class Device(ABC):
    """See the module."""

    torch: torch.device
    dtype: Dtype
    """Of models."""
    scale: Scale
    name: str

    @abstractmethod
    def synchronize(self) -> None: ...

    @abstractmethod
    def timed(self, work: Callable[[], object], repeats: int = 20) -> float:
        """Median seconds of one call."""

    @abstractmethod
    def replayed(self, work: Callable[[], object], count: int = 20) -> float:
        """Seconds of one call, launched from a graph that holds `count` of them."""

    @abstractmethod
    def measure(self) -> Card: ...

    @abstractmethod
    def memory(self) -> Memory: ...

    @abstractmethod
    def reset_peak(self) -> None: ...

    @abstractmethod
    def kernels(self) -> Kernels: ...

    @abstractmethod
    def spans(self, work: Callable[[], object]) -> list[Span]:
        """What the device did during `work` and until all of that was done, in the order of starts."""

    @abstractmethod
    def release(self) -> None:
        """Give back what nobody holds any more."""

    def facts(self, commit: str) -> dict[str, Any]:
        """Of each row."""
        return {
            "at": datetime.now(UTC).isoformat(timespec="seconds"),
            "commit": commit,
            "device": self.name,
            "torch": torch.__version__,
            "triton": triton.__version__,
            "python": sys.version.split()[0],
            **({"rehearsal": True} if self.scale.small else {}),
        }


class Gpu(Device):
    """The first CUDA device."""

    def __init__(self) -> None:
        self.torch, self.dtype, self.scale = torch.device("cuda"), "bfloat16", Scale()
        self.name = torch.cuda.get_device_name()

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def timed(self, work: Callable[[], object], repeats: int = 20) -> float:
        work()
        torch.cuda.synchronize()
        found: list[float] = []
        for _ in range(repeats):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            start.record()
            work()
            end.record()
            torch.cuda.synchronize()
            found.append(start.elapsed_time(end) / 1000)
        return statistics.median(found)

    def replayed(self, work: Callable[[], object], count: int = 20) -> float:
        work()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(count):
                work()
        return self.timed(graph.replay, 5) / count

    def measure(self) -> Card:
        source = torch.empty(1 << 31, dtype=torch.uint8, device=self.torch)
        target = torch.empty_like(source)
        copied = self.timed(partial(target.copy_, source), 10)
        a, b = (torch.randn(8192, 8192, device=self.torch, dtype=torch.bfloat16) for _ in range(2))
        multiplied = self.timed(partial(torch.matmul, a, b), 10)
        del source, target, a, b
        self.release()  # or it is counted as the engine's
        return Card(2 * (1 << 31) / copied, 2 * 8192**3 / multiplied)

    def memory(self) -> Memory:
        free, _ = torch.cuda.mem_get_info()
        unused = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        return Memory(
            used_bytes(), torch.cuda.max_memory_reserved(), torch.cuda.max_memory_allocated(), free + unused
        )

    def reset_peak(self) -> None:
        torch.cuda.reset_peak_memory_stats()

    def kernels(self) -> Kernels:
        return load_kernels("triton")

    def spans(self, work: Callable[[], object]) -> list[Span]:
        with profile(activities=[ProfilerActivity.CUDA]) as seen:
            work()
            torch.cuda.synchronize()
        found = [
            Span(event.name, event.time_range.start, event.time_range.end)
            for event in seen.events() or ()
            if event.device_type == DeviceType.CUDA
        ]
        if not found:
            raise RuntimeError("torch's profiler saw nothing on the device")
        return sorted(found, key=lambda span: span.start)

    def release(self) -> None:
        gc.unfreeze()  # what an engine froze that was not closed
        gc.collect()
        torch.cuda.empty_cache()


class _Interpreted(TritonKernels):
    """Products by torch, as most are on a GPU: the interpreter takes milliseconds a program."""

    def __init__(self) -> None:
        super().__init__()
        self._reference = ReferenceKernels()

    def product(self, weight: Tensor, bias: Tensor | None) -> Product:
        return self._reference.product(weight, bias)


class Rehearsal(Device):
    """A processor, and Triton's interpreter: it has to be chosen (`TRITON_INTERPRET=1`) before Triton is imported.
    In float32, for that has no product in bfloat16.
    """

    def __init__(self) -> None:
        self.torch, self.dtype, self.scale = torch.device("cpu"), "float32", Scale(small=True)
        self.name = "a rehearsal without a GPU"

    def synchronize(self) -> None:
        pass

    def timed(self, work: Callable[[], object], repeats: int = 20) -> float:
        start = time.perf_counter()
        work()
        return time.perf_counter() - start

    def replayed(self, work: Callable[[], object], count: int = 20) -> float:
        return self.timed(work)

    def measure(self) -> Card:
        return Card(1e9, 1e9)

    def memory(self) -> Memory:
        return Memory(used_bytes(), 1 << 20, 1 << 20, 1 << 30)

    def reset_peak(self) -> None:
        pass

    def kernels(self) -> Kernels:
        return _Interpreted()

    def spans(self, work: Callable[[], object]) -> list[Span]:
        from triton.runtime.interpreter import InterpretedFunction

        found, run = list[Span](), InterpretedFunction.run

        def watched(kernel: Any, *args: Any, **options: Any) -> Any:
            start = time.perf_counter()
            result = run(kernel, *args, **options)
            found.append(Span(kernel.fn.__name__, start * 1e6, time.perf_counter() * 1e6))
            return result

        InterpretedFunction.run = watched
        try:
            work()
        finally:
            InterpretedFunction.run = run
        return found

    def release(self) -> None:
        gc.collect()


# ── what the driver says ──────────────────────────────────────────────────────────────────────────────────

_FIELDS = {
    "sm_mhz": "clocks.sm",
    "memory_mhz": "clocks.mem",
    "watts": "power.draw",
    "celsius": "temperature.gpu",
}


def _smi(fields: str, *more: str) -> list[str] | None:
    """A command line of nvidia-smi for the first device of this process; None where there is none."""
    program = shutil.which("nvidia-smi")
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0] or "0"
    if program is None:
        return None
    return [program, "-i", first, f"--query-gpu={fields}", "--format=csv,noheader,nounits", *more]


def used_bytes() -> int | None:
    """Of the device, by everybody."""
    command = _smi("memory.used")
    if command is None:
        return None
    with contextlib.suppress(OSError, subprocess.SubprocessError, ValueError):
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
        return int(done.stdout.split()[0]) << 20
    return None


class Readings:
    """Clocks, power and temperature while the device works, twice a second, by nvidia-smi."""

    def __init__(self) -> None:
        self._seen: list[tuple[float, list[float | None]]] = []
        command = _smi(",".join(_FIELDS.values()), "-lms", "500")
        self._process: subprocess.Popen[str] | None = None
        if command is not None:
            self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
            self._reader = threading.Thread(target=self._read, args=(self._process,), daemon=True)
            self._reader.start()

    def _read(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        with process.stdout as lines:
            for line in lines:
                self._seen.append((time.perf_counter(), [_number(cell) for cell in line.split(",")]))

    def since(self, start: float) -> dict[str, float]:
        """The median of each since then; without any of that time, the last ones."""
        rows = [row for at, row in self._seen if at >= start] or [row for _, row in self._seen[-1:]]
        columns = zip(_FIELDS, zip(*rows, strict=False), strict=False)
        told = {name: [cell for cell in column if cell is not None] for name, column in columns}
        return {name: statistics.median(cells) for name, cells in told.items() if cells}

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait(10)
            self._reader.join(10)


def _number(cell: str) -> float | None:
    """`[N/A]` is none."""
    try:
        return float(cell)
    except ValueError:
        return None


def spread(name: str, values: list[float], digits: int = 1) -> dict[str, float]:
    """The columns of a row: the median, the least and the most."""
    return {
        name: round(statistics.median(values), digits),
        f"{name}_min": round(min(values), digits),
        f"{name}_max": round(max(values), digits),
    }
