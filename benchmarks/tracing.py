"""What traces cost: the same streams through a router without them, twice, and through one that exports them.

All routers stand before one engine and are taken in turns.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path

from benchmarks import service
from benchmarks.quire_systems import engine_spec
from benchmarks.rounds import Against, in_turns, milliseconds
from benchmarks.rows import RESULTS, backend, provenance, write
from benchmarks.workload import SCENARIOS
from quire import builtin
from quire_schemas.checkpoint import read_profile


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
            ("off", {}), ("off-again", {}), ("on", {"OTEL_EXPORTER_OTLP_ENDPOINT": url}),
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
        counts = asyncio.run(routers[-1].counts())

    requests = len(jobs) * (args.rounds + 1)
    exported = counts["quire_spans_exported_total"]
    dropped = sum(value for name, value in counts.items() if name.startswith("quire_spans_dropped_total"))
    if dropped or exported < 5 * requests:
        raise RuntimeError(f"{requests} requests gave {exported:.0f} spans, {dropped:.0f} of them dropped")
    compared = Against.of(seconds["on"], seconds["off"], seconds["off-again"])
    row = provenance(backend(args.threads)) | {
        "benchmark": "tracing", "model": "tiny", "scenario": scenario.name, "seed": scenario.seed,
        "requests": len(jobs), "output_tokens": tokens, "concurrency": args.concurrency, "threads": args.threads,
        "rounds": args.rounds, "spans": int(exported),
        "tokens_per_s_off": round(tokens / statistics.median(seconds["off"]), 1),
        **compared.row("on"),
    }  # fmt: skip
    print(f"seconds with traces to seconds without: {compared}")
    write(args.out, [row])
