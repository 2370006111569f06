"""What an engine's start finds of tilings, and what they give."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from typing import Any

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.device import Card, Device, Readings
from benchmarks.gpu.figures import decode, prefill
from quire_engine.resident import runner as resident
from quire_schemas.wire import KvDtype, Quantization


def tuning_rows(device: Device, card: Card, readings: Readings, *, quick: bool) -> Iterator[dict[str, Any]]:
    """What an engine's start finds of each family of kernels, in a folder of its own; then decoding with what was
    found beside decoding with the defaults.
    """
    formats: list[tuple[KvDtype | None, Quantization | None]] = [(None, None), ("int8", Quantization("int8"))]
    home, limit = os.environ.get("XDG_CACHE_HOME"), resident.TUNING_SECONDS
    for kv, quantization in formats[:1] if quick else formats:
        # defaults last: where both are equal, what a card gives after a while is what counts
        for way, seconds in (("chosen", 240.0), ("default", 0.0)):
            with tempfile.TemporaryDirectory() as folder:
                try:
                    os.environ["XDG_CACHE_HOME"], resident.TUNING_SECONDS = folder, seconds
                    bench = Bench(
                        device, "llama-3.1-8b", seqs=256, tokens=2048, length=4096, kv_bytes=20 << 30, kv=kv,
                        quantization=quantization,
                    )  # fmt: skip
                finally:
                    os.environ.pop("XDG_CACHE_HOME")
                    os.environ.update({} if home is None else {"XDG_CACHE_HOME": home})
                    resident.TUNING_SECONDS = limit
            yield from _found(bench) if way == "chosen" else ()
            for batch in (1, 32, 256):
                yield decode(bench, card, readings, batch, 1024, 32) | {"part": "tuned decode", "tilings": way}
            yield prefill(bench, card, readings, 2048) | {"part": "tuned prefill", "tilings": way}
            bench.close()


def _found(bench: Bench) -> Iterator[dict[str, Any]]:
    report = bench.runner.tuned
    for name, default, taken, before, after in report.measured:
        yield {
            "part": "tune",
            "model": bench.name,
            "family": name,
            "default": list(default),
            "chosen": list(taken),
            "default_us": round(before * 1e6, 2),
            "us": round(after * 1e6, 2),
            "saved": round(1 - after / before, 3),
        }
    yield {
        "part": "tuning",
        "model": bench.name,
        "families": report.families,
        "measured": len(report.measured),
        "changed": sum(default != taken for _, default, taken, *_ in report.measured),
        "left": len(report.left),
        "skipped": report.skipped,
        "seconds": round(report.seconds, 1),
    }
