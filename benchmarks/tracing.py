"""What telling a collector costs: the same streams through routers that tell one less or more, taken in turns.

    off, off-again    nothing leaves the router: their ratio is the noise
    on                traces
    metrics           traces, and OTLP metrics every five seconds
    dead              both, to a collector that nobody has started

All stand before one engine.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import statistics
import tempfile
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from benchmarks import service
from benchmarks.quire_systems import engine_spec
from benchmarks.rounds import Against, in_turns, milliseconds
from benchmarks.rows import RESULTS, backend, provenance, write
from benchmarks.workload import SCENARIOS
from quire import builtin
from quire_schemas.checkpoint import read_profile

NOBODY = "http://127.0.0.1:9"


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--scenario", default="short", choices=["short", "mixed", "smoke"])
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS / "tracing.jsonl")


def run(args: argparse.Namespace) -> None:
    scenario = SCENARIOS[args.scenario]
    jobs = scenario.jobs(read_profile(builtin.path("tiny")).vocab_size)
    tokens = sum(job.output_tokens for job in jobs)

    spec = engine_spec(builtin.path("tiny"), "bfloat16", threads=args.threads, max_num_seqs=32)
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="qb")))
        url = stack.enter_context(service.collector(folder))
        endpoint, _ = stack.enter_context(service.engine(folder, spec))
        settings: list[tuple[str, dict[str, str]]] = [
            ("off", {}), ("off-again", {}), ("on", told(url)), ("metrics", told(url, "otlp")),
            ("dead", told(NOBODY, "otlp")),
        ]  # fmt: skip
        routers = [stack.enter_context(service.router(folder, name, more)) for name, more in settings]
        for router in routers:
            asyncio.run(service.connect(folder, router.name, service.route(spec, endpoint)))

        def streams(router: service.Router) -> float:
            return asyncio.run(router.run(spec.model, jobs, args.concurrency))

        for router in routers:
            streams(router)  # untimed: caches, allocators, imports
        seconds = in_turns(
            {router.name: partial(streams, router) for router in routers}, args.rounds, milliseconds
        )
        time.sleep(6)  # the exporter's own rhythm is five seconds
        counted = {router.name: asyncio.run(router.counts()) for router in routers}

    requests = len(jobs) * (args.rounds + 1)
    for name in ("on", "metrics"):
        exported, dropped = spans(counted[name])
        if dropped or exported < 5 * requests:
            raise RuntimeError(f"{name}: {requests} requests gave {exported:.0f} spans, {dropped:.0f} dropped")
    if spans(counted["dead"])[0]:
        raise RuntimeError("somebody took spans where nobody should be")
    rows = []
    for name in ("on", "metrics", "dead"):
        compared = Against.of(seconds[name], seconds["off"], seconds["off-again"])
        rows.append(
            provenance(backend(args.threads)) | {
                "benchmark": "tracing", "told": name, "model": "tiny", "scenario": scenario.name,
                "seed": scenario.seed, "requests": len(jobs), "output_tokens": tokens,
                "concurrency": args.concurrency, "threads": args.threads, "rounds": args.rounds,
                "spans": int(spans(counted[name])[0]),
                "tokens_per_s_off": round(tokens / statistics.median(seconds["off"]), 1),
                **compared.row("on"),
            }
        )  # fmt: skip
        print(f"{name}: seconds to those of a router that tells nothing: {compared}")
    write(args.out, rows)


def told(url: str, metrics: str = "none") -> dict[str, str]:
    """The environment of a router that tells a collector."""
    return {
        "OTEL_EXPORTER_OTLP_ENDPOINT": url,
        "OTEL_METRICS_EXPORTER": metrics,
        "OTEL_METRIC_EXPORT_INTERVAL": "5000",
    }


def spans(counts: Mapping[str, float]) -> tuple[float, float]:
    """Spans that a router got rid of, and those that it lost."""
    lost = sum(value for name, value in counts.items() if name.startswith("quire_spans_dropped_total"))
    return counts["quire_spans_exported_total"], lost
