"""Steps with the native kernels (twice) and with the reference ones, on one checkpoint, in turns."""

from __future__ import annotations

import argparse
import os
import statistics
from functools import partial
from pathlib import Path

import torch

from benchmarks.models import CACHE, model_dir
from benchmarks.quire_systems import engine_of, engine_spec
from benchmarks.rounds import Against, in_turns
from benchmarks.rows import RESULTS, provenance, write
from benchmarks.structured import step_seconds
from quire_engine.engine import Engine
from quire_kernels import load


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="qwen2.5-0.5b", choices=["tiny", "qwen2.5-0.5b"])
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--batches", nargs="*", type=int, default=[1, 8, 32])
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cache", type=Path, default=CACHE)
    parser.add_argument("--out", type=Path, default=RESULTS / "kernels.jsonl")


def run(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    folder = model_dir(args.model, args.cache)
    spec = engine_spec(folder, args.dtype, threads=args.threads, max_num_seqs=max(args.batches))
    backends = {"native": "cpu", "native-again": "cpu", "reference": "reference"}
    engines = {name: engine_of(spec, load(backend, args.threads)) for name, backend in backends.items()}

    def step(engine: Engine, batch: int) -> float:
        return statistics.median(step_seconds(engine, batch, args.steps, None))

    rows = []
    for batch in args.batches:
        medians = in_turns({name: partial(step, engine, batch) for name, engine in engines.items()}, args.rounds)
        faster = Against.of(medians["reference"], medians["native"], medians["native-again"])
        row = provenance(engines["native"].backend) | {
            "benchmark": "kernels", "model": args.model, "dtype": args.dtype, "threads": args.threads, "seed": 0,
            "batch": batch, "steps": args.steps, "rounds": args.rounds,
            "step_ms_native": round(statistics.median(medians["native"]) * 1000, 2),
            "step_ms_reference": round(statistics.median(medians["reference"]) * 1000, 2),
            **faster.row("native"),
        }  # fmt: skip
        rows.append(row)
        print(
            f"batch {batch:3}  native {row['step_ms_native']} ms  reference {row['step_ms_reference']} ms  "
            f"times as fast {faster}"
        )
    write(args.out, rows)
