"""What the machine can do, measured by plain loops (`ceilings.cpp`), and the time that work takes at least.

The roofline is additive: reading the weights and computing do not overlap in it, as they hardly do in a step that
does one product after the other. Keys, values and attention are left out, so it is a little too kind to long
contexts.

    seconds of an output token = bytes of the weights / (read rate · sequences in a step)
                               + (2 · layers' weights · (prompt + output) / output + 2 · head's weights) / peak

`prompt` and `output` are mean lengths: every prompt token passes through the layers, only drawn ones through the
head.
"""

from __future__ import annotations

import ctypes
import heapq
import itertools
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from benchmarks.models import Parameters
from quire_kernels.cpu import build

BUFFER_BYTES = 1 << 30
"""More than any cache holds."""
_SLICE = 64 << 20
"""Bytes of one trial; the next one reads what follows."""
_ROUNDS = 400_000

Format = Literal["fp32", "bf16", "int8", "int4"]
BITS: dict[Format, float] = {"fp32": 32, "bf16": 16, "int8": 8, "int4": 4.5}
"""Of a weight as it is read; int4 with a scale of 16 bits for each 32."""


@dataclass(frozen=True, slots=True)
class Ceilings:
    """Bytes and operations a second; 0 for instructions that the processor does not have. A multiplication and an
    addition are two operations.
    """

    threads: int
    read_one: float
    """By one thread."""
    read: float
    """By `threads` threads, as are those that follow."""
    fma: float
    """float32 vfmadd."""
    dpbf16: float
    """vdpbf16ps."""
    dpbusd: float
    """vpdpbusd."""

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> Ceilings:
        """From a row that has them as columns."""
        return cls(**{name: row[name] for name in cls.__dataclass_fields__})

    def peak(self, format: Format) -> float:
        """Operations a second of the best instruction for products in that format."""
        if format in ("int8", "int4") and self.dpbusd:
            return self.dpbusd
        return (self.dpbf16 if format == "bf16" else 0.0) or self.fma

    def product_seconds(self, format: Format, rows: int, outputs: int, width: int) -> float:
        """A product of `rows` rows with a weight that lies in memory takes at least that, additively."""
        read = outputs * width * BITS[format] / 8 / self.read
        return read + 2.0 * rows * outputs * width / self.peak(format)

    def step_seconds(self, format: Format, model: Parameters, sequences: int) -> float:
        """A step in which that many sequences draw one token each."""
        return model.all * BITS[format] / 8 / self.read + sequences * 2.0 * model.all / self.peak(format)

    def prefill_seconds(self, format: Format, model: Parameters, tokens: int) -> float:
        """A step that computes a prompt of `tokens` tokens and draws one token."""
        compute = 2.0 * (model.layers * tokens + model.head) / self.peak(format)
        return model.all * BITS[format] / 8 / self.read + compute

    def tokens_per_second(
        self, format: Format, model: Parameters, sequences: int, prompt: float, output: float
    ) -> float:
        """Output tokens a second of requests with those mean lengths, `sequences` of them in each step."""
        read = model.all * BITS[format] / 8 / (self.read * sequences)
        operations = 2.0 * (model.layers * (prompt + output) / output + model.head)
        return 1.0 / (read + operations / self.peak(format))

    def served_seconds(
        self, format: Format, model: Parameters, lengths: Sequence[tuple[int, int]], clients: int
    ) -> float:
        """What requests of those lengths (tokens of prompt and of output) take at least, if so many clients ask
        for them in order and each waits for its answer. Every step reads the weights once, however few of the
        clients are left to share it, which is what `tokens_per_second` does not know.
        """
        free = [0] * clients
        for _, output in lengths:  # a step draws one token of each; a prompt is computed in the step of its first
            heapq.heapreplace(free, free[0] + output)
        operations = sum(
            2.0 * (model.layers * (prompt + output) + model.head * output) for prompt, output in lengths
        )
        return max(free) * model.all * BITS[format] / 8 / self.read + operations / self.peak(format)


def measure(threads: int, seconds: float = 2.0) -> Ceilings:
    """Plain loops compiled for this processor: of each the best of trials of milliseconds, for that many seconds.

    Raises `quire_kernels.BackendUnavailable` where there is no compiler, RuntimeError where it or memory fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        library = _compiled(Path(folder))
    buffer = library.buffer(BUFFER_BYTES)
    if not buffer:
        raise RuntimeError(f"there are no {BUFFER_BYTES >> 20} MiB of memory to read")

    def read(threads: int) -> float:
        places = itertools.cycle(range(buffer, buffer + BUFFER_BYTES, _SLICE))
        return _best(lambda: library.read_rate(next(places), _SLICE, threads), seconds)

    found = Ceilings(
        threads=threads,
        read_one=read(1),
        read=read(threads),
        fma=_best(lambda: library.fma_rate(threads, _ROUNDS), seconds),
        dpbf16=_best(lambda: library.dpbf16_rate(threads, _ROUNDS), seconds),
        dpbusd=_best(lambda: library.dpbusd_rate(threads, _ROUNDS), seconds),
    )
    library.forget(buffer, BUFFER_BYTES)
    return found


def _best(trial: Callable[[], float], seconds: float) -> float:
    until, best = time.perf_counter() + seconds, trial()
    while best and time.perf_counter() < until:
        best = max(best, trial())
    return best


def _compiled(folder: Path) -> ctypes.CDLL:
    made = folder / "ceilings.so"
    flags = ["-O3", "-std=c++20", "-march=native", "-fPIC", "-shared", "-pthread", "-w"]
    source = Path(__file__).with_suffix(".cpp")
    done = subprocess.run(
        [*build.compiler(), *flags, "-o", str(made), str(source)], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise RuntimeError(f"{source.name} does not compile: {done.stderr[:500]}")
    library = ctypes.CDLL(str(made))
    library.buffer.restype, library.buffer.argtypes = ctypes.c_void_p, (ctypes.c_size_t,)
    library.forget.restype, library.forget.argtypes = None, (ctypes.c_void_p, ctypes.c_size_t)
    library.read_rate.restype = ctypes.c_double
    library.read_rate.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    for name in ("fma_rate", "dpbf16_rate", "dpbusd_rate"):
        getattr(library, name).restype = ctypes.c_double
        getattr(library, name).argtypes = (ctypes.c_int, ctypes.c_long)
    return library
