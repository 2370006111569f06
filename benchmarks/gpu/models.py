"""The parts that load a model: figures first, memory, then what needs the profiler, which stays in the way."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.figures import decode, memory, offline, prefill
from benchmarks.gpu.profile import profiles
from benchmarks.gpu.workloads import nano_lengths, sharegpt_lengths
from quire_schemas.wire import KvDtype, Quantization

if TYPE_CHECKING:
    from benchmarks.gpu.__main__ import Run

Row = dict[str, Any]
SMALL_KEPT: dict[str, KvDtype] = {"0.6b-int8-kv": "int8", "0.6b-fp8-kv": "fp8"}
LARGE_CODED = {
    "8b-int8": Quantization("int8"),
    "8b-int8-fp8-kv": Quantization("int8"),
    "8b-int4": Quantization("int4", "bf16", 128),
    "8b-fp8": Quantization("fp8", "fp8"),
}
"""Parts that measure an 8B with weights in fewer bits."""
_SMALL: dict[str, Any] = {"name": "qwen3-0.6b", "seqs": 256, "tokens": 16384, "length": 2304}
_LARGE: dict[str, Any] = {"name": "llama-3.1-8b", "seqs": 1000, "tokens": 8192, "length": 8448}


def small(run: Run) -> Iterator[Row]:
    """Qwen3-0.6B."""
    bench = _bench(run, **_SMALL, kv_bytes=_room(run, 60))
    yield from _decoded(run, bench, (1, 32, 256) if run.quick else (1, 8, 32, 128, 256), 64)
    yield prefill(bench, run.card, run.readings, 2048)
    yield offline(bench, run.card, run.readings, "nano", nano_lengths())
    yield memory(bench, run.used_before)
    yield from profiles(bench, run.card, (1, 32, 256), (2048,), ("nano", nano_lengths()))
    bench.close()


def large(run: Run) -> Iterator[Row]:
    """Llama 3.1 8B."""
    bench = _bench(run, **_LARGE, kv_bytes=_room(run, 70))
    yield from _decoded(run, bench, (1, 32, 128, 256) if run.quick else (1, 8, 32, 64, 128, 256), 32)
    for tokens in (2048, 4096, 8192):
        yield prefill(bench, run.card, run.readings, tokens)
    yield offline(bench, run.card, run.readings, "sharegpt", sharegpt_lengths(1000))
    yield memory(bench, run.used_before)
    yield from _large_profiles(run, bench)
    bench.close()


def experts(run: Run) -> Iterator[Row]:
    """Qwen3-30B-A3B."""
    bench = _bench(run, name="qwen3-30b-a3b", seqs=256, tokens=8192, length=2304, kv_bytes=_room(run, 30))
    yield from _decoded(run, bench, (1, 32, 256), 32)
    yield prefill(bench, run.card, run.readings, 2048)
    yield memory(bench, run.used_before)
    bench.close()


def small_kept(run: Run, kept: KvDtype) -> Iterator[Row]:
    """Qwen3-0.6B with keys and values in fewer bits."""
    bench = _bench(run, **_SMALL, kv_bytes=_room(run, 40), kv=kept)
    yield from _decoded(run, bench, (1, 32, 256), 64)
    yield offline(bench, run.card, run.readings, "nano", nano_lengths())
    bench.close()


def large_coded(run: Run, part: str) -> Iterator[Row]:
    """Llama 3.1 8B with weights, keys and values in fewer bits."""
    kept: KvDtype = "fp8" if part == "8b-int8-fp8-kv" else "int8"
    bench = _bench(run, **_LARGE, kv_bytes=_room(run, 40), kv=kept, quantization=LARGE_CODED[part])
    yield from _decoded(run, bench, (1, 32, 256), 32)
    yield prefill(bench, run.card, run.readings, 2048)
    yield offline(bench, run.card, run.readings, "sharegpt", sharegpt_lengths(256 if run.quick else 1000))
    bench.close()


def profiled(run: Run, name: str) -> Iterator[Row]:
    """The profiles alone."""
    if name == "qwen3-0.6b":
        bench = _bench(run, **_SMALL, kv_bytes=_room(run, 60))
        yield from profiles(bench, run.card, (1, 32, 256), (2048,), ("nano", nano_lengths()))
    else:
        bench = _bench(run, **_LARGE, kv_bytes=_room(run, 70))
        yield from _large_profiles(run, bench)
    bench.close()


def _large_profiles(run: Run, bench: Bench) -> Iterator[Row]:
    lengths = sharegpt_lengths(1000)
    yield from profiles(bench, run.card, (1, 32, 128, 256), (2048, 8192), ("sharegpt", lengths))


def _bench(run: Run, **options: Any) -> Bench:
    bench = Bench(run.device, **options)
    print(bench.told, flush=True)
    return bench


def _room(run: Run, gibibytes: int) -> int:
    """So many for a cache, or what a smaller card has besides an 8B and 10 GiB more."""
    return int(min(gibibytes << 30, max(run.device.memory().free - (26 << 30), 4 << 30)))


def _decoded(run: Run, bench: Bench, batches: Sequence[int], steps: int) -> Iterator[Row]:
    for batch in batches:
        yield decode(bench, run.card, run.readings, batch, 1024, steps)
