"""Ours (twice, as an A/A pair) and transformers on the same weights, dtype and work.

transformers runs sequentially, in the best static batch found, and with its continuous batching. Tokens that were
asked for count, nothing else. A system that has not finished after `--limit` seconds is stopped, and its row says
so; a run that breaks off writes the rows it has.
"""

from __future__ import annotations

import argparse
import os
import statistics
from pathlib import Path
from typing import Any

import torch

from benchmarks.models import CACHE, model_dir
from benchmarks.quire_systems import Dtype, Quire, Run
from benchmarks.rows import RESULTS, Row, provenance, write
from benchmarks.transformers_systems import Transformers
from benchmarks.workload import SCENARIOS


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="tiny", choices=["tiny", "qwen2.5-0.5b"])
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--scenario", default="mixed", choices=["mixed", "smoke"])
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--systems", nargs="*", default=["sequential", "static", "continuous"])
    parser.add_argument("--static-batches", nargs="*", type=int, default=[16, 32, 64])
    parser.add_argument(
        "--limit", type=float, default=1200.0, help="seconds for transformers' continuous batching"
    )
    parser.add_argument("--cache", type=Path, default=CACHE)
    parser.add_argument("--out", type=Path, default=RESULTS / "throughput.jsonl")


def run(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    scenario = SCENARIOS[args.scenario]
    dtype: Dtype = args.dtype
    folder = model_dir(args.model, args.cache)
    ours = Quire(folder, dtype, threads=args.threads)
    jobs = scenario.jobs(ours.vocab_size)
    asked = sum(job.output_tokens for job in jobs)
    common = provenance(ours.engine.backend) | {
        "benchmark": "throughput", "model": args.model, "dtype": dtype, "threads": args.threads,
        "scenario": scenario.name, "seed": scenario.seed, "requests": len(jobs),
        "prompt_tokens": sum(len(job.prompt) for job in jobs), "output_tokens": asked,
    }  # fmt: skip
    rows: list[Row] = []

    def row(system: str, seconds: float, *, done: int = asked, **more: Any) -> None:
        rate = done / seconds
        rows.append(
            common | {"system": system, "seconds": round(seconds, 3), "tokens_per_s": round(rate, 2)} | more
        )
        print(f"{system:44} {seconds:9.1f} s {rate:9.1f} tokens/s", flush=True)

    def ours_row(name: str, run: Run) -> None:
        row(
            name, run.seconds, steps=run.steps, preemptions=run.preemptions,
            kv_waste=round(run.kv_waste, 4), kv_waste_contiguous=round(run.kv_waste_contiguous, 4),
            mean_live_length=round(run.mean_live_length, 1),
        )  # fmt: skip

    def theirs_row(name: str, seconds: float, done: int = asked, **more: Any) -> None:
        row(f"transformers {name}", seconds, done=done, backend="torch", **more)

    def measure() -> None:
        part = jobs[: max(1, len(jobs) // 8)]
        ours.run(part)  # untimed: allocators and thread pools pay their first time here
        passes.append(ours.run(jobs))
        ours_row("quire (A)", passes[-1])
        theirs = Transformers(folder, getattr(torch, dtype))
        theirs.static(part, 8, by_length=True)  # untimed, as above
        if "static" in args.systems:
            for size in args.static_batches:
                for by_length in (False, True) if size < len(jobs) else (False,):
                    order = "by length" if by_length else "in order"
                    seconds = theirs.static(jobs, size, by_length=by_length)
                    theirs_row(f"static, batch {size}, {order}", seconds)
        if "sequential" in args.systems:
            theirs_row("sequential", theirs.sequential(jobs))
        passes.append(ours.run(jobs))
        ours_row("quire (A again)", passes[-1])
        if "continuous" in args.systems:
            seconds, done = theirs.continuous(jobs, args.limit)
            unfinished = {} if done == asked else {"unfinished": True, "output_tokens_done": done}
            theirs_row("continuous", seconds, done, **unfinished)

    passes: list[Run] = []
    try:
        measure()
    finally:
        if passes:
            times = [each.seconds for each in passes]
            ours_rate, noise = asked / statistics.geometric_mean(times), max(times) / min(times)
            for entry in rows:
                entry["aa_ratio"] = round(noise, 4) if len(times) == 2 else None
                rate = entry["tokens_per_s"]
                entry["quire_ratio"] = round(ours_rate / rate, 3) if rate else None
            write(args.out, rows)
    print(f"A/A ratio {noise:.3f}; ratios of tokens/s, quire (geometric mean of the pair) to:")
    for entry in rows:
        if not entry["system"].startswith("quire"):
            print(f"  {entry['system']:42} {entry['quire_ratio']}")
    print(
        f"KV waste {passes[0].kv_waste:.2%} (mean live length {passes[0].mean_live_length:.0f}); "
        f"contiguous reservation of {ours.max_model_len}: {passes[0].kv_waste_contiguous:.1%}"
    )
