"""What deciding a step ahead saves: a full batch that generates, with and without asynchronous scheduling.

Two runners: the model, on the threads that it is given, and a device of another kind, for which the scripted
runner stands: a step takes it a given time and the host has nothing to do meanwhile. Between two steps the host
does what it does in an engine process, which is to write the deltas of the step as one frame.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from functools import partial
from pathlib import Path

import msgspec

from benchmarks.quire_systems import engine_spec
from benchmarks.rounds import Against, in_turns
from benchmarks.rows import NO_KERNELS, RESULTS, provenance, write
from quire import builtin
from quire_engine.driver import spare_the_collector
from quire_engine.engine import Engine
from quire_schemas.wire import Deltas, Generate, RunnerKind, Sampling, frame


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--parts", nargs="*", choices=["model", "device"], default=["model", "device"])
    parser.add_argument("--running", type=int, default=32)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--step-ms", type=float, default=4.0, help="of the device that the script stands for")
    parser.add_argument("--out", type=Path, default=RESULTS / "ahead.jsonl")


def run(args: argparse.Namespace) -> None:
    rows = []
    for part in args.parts:
        runner: RunnerKind = "scripted" if part == "device" else "model"
        threads = 1 if part == "device" else args.threads
        engines = {
            name: load(
                builtin.path(), runner, ahead=name == "ahead", threads=threads, running=args.running,
                step_time=args.step_ms / 1000 if part == "device" else 0.0,
            )
            for name in ("in turn", "in turn again", "ahead")
        }  # fmt: skip
        spare_the_collector()  # as an engine process does
        seconds = in_turns(
            {name: partial(step_seconds, engine, args.running, args.steps) for name, engine in engines.items()},
            args.rounds,
        )
        saved = Against.of(seconds["ahead"], seconds["in turn"], seconds["in turn again"])
        row = provenance(engines["ahead"].backend or NO_KERNELS) | {
            "benchmark": "ahead", "part": part, "threads": threads, "running": args.running,
            "steps": args.steps, "rounds": args.rounds,
            "device_step_ms": args.step_ms if part == "device" else None,
            "step_ms_in_turn": round(statistics.median(seconds["in turn"]) * 1000, 3),
            "step_ms_ahead": round(statistics.median(seconds["ahead"]) * 1000, 3),
            **saved.row("ahead"),
        }  # fmt: skip
        rows.append(row)
        print(f"{part:7} step in turn {row['step_ms_in_turn']} ms  ahead {row['step_ms_ahead']} ms  ratio {saved}")
    write(args.out, rows)


def load(folder: Path, runner: RunnerKind, *, ahead: bool, threads: int, running: int, step_time: float) -> Engine:
    """An engine with a seat for each of `running`; a step of the scripted runner takes `step_time` seconds."""
    spec = msgspec.structs.replace(
        engine_spec(folder, "float32", threads=threads, max_num_seqs=running),
        async_scheduling=ahead,
        runner=runner,
        step_time=step_time,
    )
    engine = Engine.load(spec)
    engine.warm_up()
    return engine


def step_seconds(engine: Engine, running: int, steps: int) -> float:
    """Seconds a step, over `steps` steps in which each of `running` requests draws one token."""
    rng = random.Random(0)
    for number in range(running):
        prompt = [rng.randrange(2000) for _ in range(rng.randrange(8, 64))]
        sampling = Sampling(max_tokens=steps + 200, temperature=0.0, ignore_eos=True)
        engine.add(Generate(str(number), prompt, sampling))
    begun: set[str] = set()
    while len(begun) < running:
        begun.update(delta.id for delta in engine.step())
    began = time.perf_counter()
    for number in range(steps):
        deltas = engine.step()
        frame(Deltas(number, deltas))
        if len(deltas) != running:
            raise RuntimeError(f"{len(deltas)} of {running} requests drew a token")
    took = time.perf_counter() - began
    for number in range(running):
        engine.abort(str(number))
    while engine.has_work:
        engine.step()
    return took / steps
