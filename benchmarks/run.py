"""The one runner: `python -m benchmarks.run NAME`, where a name is one of those below.

Rows go to `results/`, a table to stdout.

`throughput` compares, on the same weights, dtype and work, our engine (twice, as an A/A pair) with transformers
run sequentially, in the best static batch found, and with its continuous batching. Tokens that were asked for
count, nothing else. A system that has not finished after `--limit` seconds is stopped, and its row says so; a run
that breaks off writes the rows it has. `start-up` measures commands and imports in fresh processes. `tracing` puts
the same streams through routers with and without traces, in pairs, before one engine. `scheduling` times the
host's part of a step, and `ahead` runs a full batch with and without asynchronous scheduling. `kernels` computes
the same steps with the native kernels and with the reference ones. `prefix` runs requests that begin alike with
the prefix cache on and off, the choices of one request with and without shared blocks, and requests without
anything in common, for what the cache costs then. `structured` holds a batch of running requests to a JSON Schema,
and leaves it free, in turns; its part `hostile` has grammars compiled beside streams that take too long.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

ROOT = Path(__file__).resolve().parent.parent
Dtype = Literal["float32", "bfloat16", "float16"]


def provenance() -> dict[str, Any]:
    """Where and on what a row was measured."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    cpu = next(
        (
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        platform.processor(),
    )
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain") else ""),
        "machine": f"{cpu}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers")},
    }


def write(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        for row in rows:
            file.write(json.dumps(row) + "\n")
    print(f"\n{len(rows)} rows -> {path}")


def throughput(args: argparse.Namespace) -> None:
    import torch

    from benchmarks.models import model_dir
    from benchmarks.quire_systems import Quire, Run
    from benchmarks.transformers_systems import Transformers
    from benchmarks.workload import SCENARIOS

    torch.set_num_threads(args.threads)
    scenario = SCENARIOS[args.scenario]
    dtype: Dtype = args.dtype
    folder = model_dir(args.model, args.cache)
    ours = Quire(folder, dtype, threads=args.threads)
    jobs = scenario.jobs(ours.vocab_size)
    asked = sum(job.output_tokens for job in jobs)
    common = provenance() | {
        "benchmark": "throughput", "model": args.model, "dtype": dtype, "threads": args.threads,
        "scenario": scenario.name, "seed": scenario.seed, "requests": len(jobs),
        "prompt_tokens": sum(len(job.prompt) for job in jobs), "output_tokens": asked,
    }  # fmt: skip
    rows: list[dict[str, Any]] = []

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
                    row(f"transformers static, batch {size}, {order}", seconds)
        if "sequential" in args.systems:
            row("transformers sequential", theirs.sequential(jobs))
        passes.append(ours.run(jobs))
        ours_row("quire (A again)", passes[-1])
        if "continuous" in args.systems:
            seconds, done = theirs.continuous(jobs, args.limit)
            unfinished = {} if done == asked else {"unfinished": True, "output_tokens_done": done}
            row("transformers continuous", seconds, done=done, **unfinished)

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
            write(args.out or ROOT / "benchmarks/results/throughput.jsonl", rows)
    print(f"A/A ratio {noise:.3f}; ratios of tokens/s, quire (geometric mean of the pair) to:")
    for entry in rows:
        if not entry["system"].startswith("quire"):
            print(f"  {entry['system']:42} {entry['quire_ratio']}")
    print(
        f"KV waste {passes[0].kv_waste:.2%} (mean live length {passes[0].mean_live_length:.0f}); "
        f"contiguous reservation of {ours.max_model_len}: {passes[0].kv_waste_contiguous:.1%}"
    )


def tracing(args: argparse.Namespace) -> None:
    """What traces cost: the same streams through a router without them, twice, and through one that exports them.

    Each round takes all three in turn, in another order than the round before; ratios are within a round.
    """
    import asyncio
    import contextlib
    import tempfile

    from benchmarks import service
    from benchmarks.workload import SCENARIOS
    from quire import builtin
    from quire_schemas.checkpoint import read_profile

    scenario = SCENARIOS[args.scenario]
    jobs = scenario.jobs(read_profile(builtin.path("tiny")).vocab_size)
    tokens = sum(job.output_tokens for job in jobs)

    async def measure(
        routers: Sequence[service.Router], folder: Path, endpoint: Any
    ) -> tuple[dict[str, list[float]], dict[str, float]]:
        for router in routers:
            await service.connect(folder, router.name, endpoint)
        for router in routers:
            await router.run(jobs, args.concurrency)  # untimed: caches, allocators, imports
        seconds: dict[str, list[float]] = {router.name: [] for router in routers}
        for number in range(args.rounds):
            turn = number % len(routers)
            for router in [*routers[turn:], *routers[:turn]]:
                seconds[router.name].append(await router.run(jobs, args.concurrency))
            shown = "  ".join(f"{name} {took[-1]:6.2f} s" for name, took in seconds.items())
            print(f"round {number + 1:3}  {shown}", flush=True)
        await asyncio.sleep(6)  # the exporter's own rhythm is five seconds
        return seconds, await routers[-1].counts()

    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="qb")))
        url = stack.enter_context(service.collector(folder))
        endpoint = stack.enter_context(service.engine(folder, args.threads))
        settings: list[tuple[str, dict[str, str]]] = [
            ("off", {}), ("off-again", {}), ("on", {"OTEL_EXPORTER_OTLP_ENDPOINT": url}),
        ]  # fmt: skip
        routers = [stack.enter_context(service.router(folder, name, more)) for name, more in settings]
        seconds, counts = asyncio.run(measure(routers, folder, endpoint))

    requests = len(jobs) * (args.rounds + 1)
    exported = counts["quire_spans_exported_total"]
    dropped = sum(value for name, value in counts.items() if name.startswith("quire_spans_dropped_total"))
    if dropped or exported < 5 * requests:
        raise RuntimeError(f"{requests} requests gave {exported:.0f} spans, {dropped:.0f} of them dropped")
    noise = [b / a for a, b in zip(seconds["off"], seconds["off-again"], strict=True)]
    cost = [
        on / statistics.geometric_mean([a, b])
        for a, b, on in zip(seconds["off"], seconds["off-again"], seconds["on"], strict=True)
    ]
    row = provenance() | {
        "benchmark": "tracing", "model": "tiny", "scenario": scenario.name, "seed": scenario.seed,
        "requests": len(jobs), "output_tokens": tokens, "concurrency": args.concurrency, "threads": args.threads,
        "rounds": args.rounds, "spans": int(exported),
        "tokens_per_s_off": round(tokens / statistics.median(seconds["off"]), 1),
        "on_ratio": round(statistics.median(cost), 4),
        "on_ratio_min": round(min(cost), 4), "on_ratio_max": round(max(cost), 4),
        "aa_ratio": round(statistics.median(noise), 4),
        "aa_ratio_min": round(min(noise), 4), "aa_ratio_max": round(max(noise), 4),
    }  # fmt: skip
    print(
        f"seconds with traces to seconds without: {row['on_ratio']:.3f} "
        f"({row['on_ratio_min']:.3f}-{row['on_ratio_max']:.3f}); "
        f"without to without: {row['aa_ratio']:.3f} ({row['aa_ratio_min']:.3f}-{row['aa_ratio_max']:.3f})"
    )
    write(args.out or ROOT / "benchmarks/results/tracing.jsonl", [row])


def start_up(args: argparse.Namespace) -> None:
    """Wall time of `platform get` against a running control plane, of `--help`, and of the heavier imports."""

    def measure(name: str, command: Sequence[str]) -> dict[str, Any]:
        times = []
        for _ in range(args.repeat):
            start = time.perf_counter()
            subprocess.run(command, check=True, capture_output=True)
            times.append(time.perf_counter() - start)
        row = {
            "benchmark": "start-up", "system": name, "repeat": args.repeat,
            "p50_ms": round(statistics.median(times) * 1000, 1), "max_ms": round(max(times) * 1000, 1),
        }  # fmt: skip
        print(f"{name:44} p50 {row['p50_ms']:7.1f} ms   max {row['max_ms']:7.1f} ms")
        return row

    command = str(Path(sys.executable).with_name("platform"))
    subprocess.run([command, "get"], check=True, capture_output=True)  # starts the control plane if need be
    rows = [measure("platform get", [command, "get"]), measure("platform --help", [command, "--help"])]
    for module in ("quire.controlplane.app", "quire.router.app"):
        rows.append(measure(f"import {module}", [sys.executable, "-c", f"import {module}"]))
    common = provenance()
    write(args.out or ROOT / "benchmarks/results/start-up.jsonl", [common | row for row in rows])


def scheduling(args: argparse.Namespace) -> None:
    """Microseconds of the host for a step of a full batch that generates."""
    from benchmarks.scheduling import rows

    common, found = provenance(), rows(args.running, args.steps, seed=0)
    for row in found:
        print(f"{row['system']:18} p50 {row['p50_us']} us   p99 {row['p99_us']} us   A/A {row['aa_ratio']}")
    write(args.out or ROOT / "benchmarks/results/scheduling.jsonl", [common | row for row in found])


def ahead(args: argparse.Namespace) -> None:
    """What deciding a step ahead saves, beside an A/A pair; ratios are within a round."""
    from benchmarks import ahead as work
    from quire import builtin
    from quire_engine.driver import spare_the_collector

    rows = []
    for part in args.parts:
        runner: Literal["model", "scripted"] = "scripted" if part == "device" else "model"
        threads = 1 if part == "device" else args.threads
        engines = {
            name: work.load(
                builtin.path(), runner, ahead=name == "ahead", threads=threads, running=args.running,
                step_time=args.step_ms / 1000 if part == "device" else 0.0,
            )
            for name in ("in turn", "in turn again", "ahead")
        }  # fmt: skip
        spare_the_collector()  # as an engine process does
        seconds: dict[str, list[float]] = {name: [] for name in engines}
        for number in range(args.rounds):
            turn = number % len(engines)
            for name in [*engines, *engines][turn : turn + len(engines)]:
                seconds[name].append(work.step_seconds(engines[name], args.running, args.steps))
        rounds = list(zip(*seconds.values(), strict=True))
        saved = [then / statistics.geometric_mean([one, two]) for one, two, then in rounds]
        row = provenance() | {
            "benchmark": "ahead", "part": part, "threads": threads, "running": args.running,
            "steps": args.steps, "rounds": args.rounds,
            "device_step_ms": args.step_ms if part == "device" else None,
            "step_ms_in_turn": round(statistics.median(seconds["in turn"]) * 1000, 3),
            "step_ms_ahead": round(statistics.median(seconds["ahead"]) * 1000, 3),
            "ahead_ratio": round(statistics.median(saved), 4),
            "ahead_ratio_min": round(min(saved), 4), "ahead_ratio_max": round(max(saved), 4),
            "aa_ratio": round(statistics.median(two / one for one, two, _ in rounds), 4),
        }  # fmt: skip
        rows.append(row)
        print(
            f"{part:7} step in turn {row['step_ms_in_turn']} ms  ahead {row['step_ms_ahead']} ms  "
            f"ratio {row['ahead_ratio']} ({row['ahead_ratio_min']}-{row['ahead_ratio_max']})  "
            f"A/A {row['aa_ratio']}"
        )
    write(args.out or ROOT / "benchmarks/results/ahead.jsonl", rows)


def kernels(args: argparse.Namespace) -> None:
    """Steps with the native kernels (twice) and with the reference ones, on one checkpoint, in turns."""
    import torch

    from benchmarks import structured as work
    from benchmarks.models import model_dir
    from benchmarks.quire_systems import engine_of, engine_spec
    from quire_kernels import load

    torch.set_num_threads(args.threads)
    folder = model_dir(args.model, args.cache)
    spec = engine_spec(folder, args.dtype, threads=args.threads, max_num_seqs=max(args.batches))
    backends = {"native": "cpu", "native-again": "cpu", "reference": "reference"}
    engines = {name: engine_of(spec, load(backend, args.threads)) for name, backend in backends.items()}
    rows = []
    for batch in args.batches:
        steps: dict[str, list[float]] = {name: [] for name in engines}
        for number in range(args.rounds):
            turn = number % len(engines)
            for name in [*engines, *engines][turn : turn + len(engines)]:
                steps[name].append(statistics.median(work.step_seconds(engines[name], batch, args.steps, None)))
        pairs = list(zip(*steps.values(), strict=True))
        faster = [reference / statistics.geometric_mean([one, two]) for one, two, reference in pairs]
        row = provenance() | {
            "benchmark": "kernels", "model": args.model, "dtype": args.dtype, "threads": args.threads, "seed": 0,
            "backend": engines["native"].backend, "batch": batch, "steps": args.steps, "rounds": args.rounds,
            "step_ms_native": round(statistics.median(steps["native"]) * 1000, 2),
            "step_ms_reference": round(statistics.median(steps["reference"]) * 1000, 2),
            "native_ratio": round(statistics.median(faster), 3),
            "native_ratio_min": round(min(faster), 3), "native_ratio_max": round(max(faster), 3),
            "aa_ratio": round(statistics.median(two / one for one, two, _ in pairs), 4),
        }  # fmt: skip
        rows.append(row)
        print(
            f"batch {batch:3}  native {row['step_ms_native']} ms  reference {row['step_ms_reference']} ms  "
            f"{row['native_ratio']} times as fast ({row['native_ratio_min']}-{row['native_ratio_max']})  "
            f"A/A {row['aa_ratio']}"
        )
    write(args.out or ROOT / "benchmarks/results/kernels.jsonl", rows)


def prefix(args: argparse.Namespace) -> None:
    """What the prefix cache saves and costs, and what parallel sampling shares; each beside its A/A pair."""
    import msgspec
    import torch

    from benchmarks import prefix as work
    from benchmarks.models import model_dir
    from benchmarks.quire_systems import Quire
    from quire_engine.engine import Engine

    torch.set_num_threads(args.threads)
    folder = model_dir(args.model, args.cache)
    settings = {"on": True, "off": False, "off-again": False}
    systems = {
        name: Quire(folder, args.dtype, threads=args.threads, max_num_seqs=96, prefix_caching=caching)
        for name, caching in settings.items()
    }
    engines = {name: system.engine for name, system in systems.items()}
    vocabulary = systems["on"].vocab_size
    common = provenance() | {
        "benchmark": "prefix", "model": args.model, "dtype": args.dtype, "threads": args.threads, "seed": 0,
    }  # fmt: skip
    rows: list[dict[str, Any]] = []

    def note(row: dict[str, Any]) -> None:
        rows.append(common | row)
        print("  ".join(f"{name} {value}" for name, value in row.items()), flush=True)

    def shared() -> None:
        scenario = work.Shared(requests=args.requests)
        jobs = scenario.jobs(vocabulary)
        passes: dict[str, list[work.SharedPass]] = {name: [] for name in ("on", "on-again", "off", "off-again")}
        for engine in engines.values():
            work.shared_pass(engine, jobs[:4], scenario.concurrency)  # untimed: allocators, thread pools
        order = list(passes)
        for _ in range(args.rounds):
            for name in order:
                engine = engines["on" if name.startswith("on") else name]
                passes[name].append(work.shared_pass(engine, jobs, scenario.concurrency))
                print(f"shared, cache {name:10} {passes[name][-1].seconds:7.1f} s", flush=True)
            order.append(order.pop(0))
        firsts = {name: sorted(t for each in found for t in each.first_token) for name, found in passes.items()}
        seconds = {name: statistics.median(each.seconds for each in found) for name, found in passes.items()}
        computed = {name: found[0].computed for name, found in passes.items()}

        def at(part: float, name: str) -> float:
            return round(1000 * work.percentile(firsts[name], part), 1)

        note(
            {
                "part": "shared", "requests": len(jobs), "shared_tokens": scenario.shared_tokens,
                "concurrency": scenario.concurrency, "rounds": args.rounds,
                "prompt_tokens": passes["on"][0].prompt_tokens,
                "prefill_tokens_on": computed["on"], "prefill_tokens_off": computed["off"],
                "prefill_ratio": round(computed["off"] / computed["on"], 2),
                "ttft_p50_ms_on": at(0.5, "on"), "ttft_p50_ms_off": at(0.5, "off"),
                "ttft_p90_ms_on": at(0.9, "on"), "ttft_p90_ms_off": at(0.9, "off"),
                "ttft_p50_ratio": round(at(0.5, "off") / at(0.5, "on"), 2),
                "ttft_p90_ratio": round(at(0.9, "off") / at(0.9, "on"), 2),
                "aa_ttft_p50_on": round(at(0.5, "on-again") / at(0.5, "on"), 3),
                "aa_ttft_p50_off": round(at(0.5, "off-again") / at(0.5, "off"), 3),
                "seconds_on": round(seconds["on"], 2), "seconds_off": round(seconds["off"], 2),
                "seconds_ratio": round(seconds["off"] / seconds["on"], 2),
                "aa_seconds_on": round(seconds["on-again"] / seconds["on"], 3),
                "aa_seconds_off": round(seconds["off-again"] / seconds["off"], 3),
            }
        )  # fmt: skip

    def parallel() -> None:
        for name, shape in work.SHAPES.items():
            jobs = replace(shape, requests=args.parallel_requests).jobs(vocabulary)
            alone = work.parallel_pass(engines["off"], jobs, args.n, share=False)
            together = work.parallel_pass(engines["off"], jobs, args.n, share=True)
            note(
                {
                    "part": "parallel", "shape": name, "requests": len(jobs), "n": args.n,
                    "mean_prompt": round(statistics.fmean(len(job.prompt) for job in jobs), 1),
                    "mean_output": round(statistics.fmean(job.output_tokens for job in jobs), 1),
                    "blocks_mean_shared": round(together.mean, 1), "blocks_mean_alone": round(alone.mean, 1),
                    "blocks_most_shared": together.most, "blocks_most_alone": alone.most,
                    "saved_mean_percent": round(100 * (1 - together.mean / alone.mean), 1),
                    "saved_most_percent": round(100 * (1 - together.most / alone.most), 1),
                }
            )  # fmt: skip

    def cost() -> None:
        # three schedulers before one model and one cache, in which they write over each other (tokens mean
        # nothing): where weights happen to lie makes more of a difference
        one = engines["off"]
        alike = {
            name: Engine(msgspec.structs.replace(one.spec, prefix_caching=caching), one.profile, one.runner)
            for name, caching in settings.items()
        }
        seconds = work.step_times(alike, args.running, args.steps, seed=0)
        medians = {name: statistics.median(each) for name, each in seconds.items()}
        off = statistics.geometric_mean([medians["off"], medians["off-again"]])
        note(
            {
                "part": "no hits", "running": args.running, "steps": args.steps,
                "step_p50_ms_on": round(medians["on"] * 1000, 3), "step_p50_ms_off": round(off * 1000, 3),
                "on_ratio": round(medians["on"] / off, 4),
                "aa_ratio": round(medians["off-again"] / medians["off"], 4),
                "on_ratio_mean": round(
                    2 * sum(seconds["on"]) / (sum(seconds["off"]) + sum(seconds["off-again"])), 4
                ),
                "aa_ratio_mean": round(sum(seconds["off-again"]) / sum(seconds["off"]), 4),
            }
        )  # fmt: skip

    try:
        for part in args.parts:
            {"shared": shared, "parallel": parallel, "cost": cost}[part]()
    finally:
        write(args.out or ROOT / "benchmarks/results/prefix.jsonl", rows)


def structured(args: argparse.Namespace) -> None:
    """What a JSON Schema costs each step of a full batch, beside an A/A pair; ratios are within a round."""
    import torch

    from benchmarks import structured as work
    from benchmarks.models import SHAPES, model_dir
    from benchmarks.quire_systems import Quire

    torch.set_num_threads(args.threads)
    folder = model_dir(args.model, args.cache)
    if args.model in SHAPES:
        shape = SHAPES[args.model]
        special = {f"<{name}>": shape[f"{name}_token_id"] for name in ("bos", "eos")}
        work.write_vocabulary(folder, shape["vocab_size"], special)
    if "hostile" in args.parts:
        write(args.out or ROOT / "benchmarks/results/structured.jsonl", [_beside_hostile(args, folder)])
    if "cost" not in args.parts:
        return
    engine = Quire(folder, args.dtype, threads=args.threads, max_num_seqs=args.batch).engine
    began = time.perf_counter()
    engine.grammars.prepare()
    read = time.perf_counter() - began
    began = time.perf_counter()
    engine.grammars.compile(work.CONSTRAINT)
    compiled = time.perf_counter() - began
    masks = sorted(work.mask_seconds(engine, 2000))
    systems = {"free": None, "free-again": None, "bound": work.CONSTRAINT}
    for constraint in (None, work.CONSTRAINT):
        work.step_seconds(engine, args.batch, 2, constraint)  # untimed
    steps: dict[str, list[float]] = {name: [] for name in systems}
    for number in range(args.rounds):
        turn = number % len(systems)
        for name in [*systems, *systems][turn : turn + len(systems)]:
            took = work.step_seconds(engine, args.batch, args.steps, systems[name])
            steps[name].append(statistics.median(took))
        shown = "  ".join(f"{name} {took[-1] * 1000:7.1f} ms" for name, took in steps.items())
        print(f"round {number + 1:3}  {shown}", flush=True)
    pairs = list(zip(steps["free"], steps["free-again"], steps["bound"], strict=True))
    noise = [again / free for free, again, _ in pairs]
    cost = [bound / statistics.geometric_mean([free, again]) for free, again, bound in pairs]
    row = provenance() | {
        "benchmark": "structured", "model": args.model, "dtype": args.dtype, "threads": args.threads, "seed": 0,
        "vocabulary": engine.profile.vocab_size, "synthetic_vocabulary": args.model in SHAPES,
        "batch": args.batch, "steps": args.steps, "rounds": args.rounds,
        "step_ms_free": round(statistics.median(steps["free"]) * 1000, 2),
        "step_ms_bound": round(statistics.median(steps["bound"]) * 1000, 2),
        "bound_ratio": round(statistics.median(cost), 4),
        "bound_ratio_min": round(min(cost), 4), "bound_ratio_max": round(max(cost), 4),
        "aa_ratio": round(statistics.median(noise), 4),
        "aa_ratio_min": round(min(noise), 4), "aa_ratio_max": round(max(noise), 4),
        "mask_us_p50": round(masks[len(masks) // 2] * 1e6, 1),
        "mask_us_p99": round(masks[len(masks) * 99 // 100] * 1e6, 1),
        "mask_us_max": round(masks[-1] * 1e6, 1),
        "vocabulary_s": round(read, 3), "compile_s": round(compiled, 3),
    }  # fmt: skip
    print(
        f"step bound to step free: {row['bound_ratio']:.3f} ({row['bound_ratio_min']:.3f}-"
        f"{row['bound_ratio_max']:.3f}); free to free: {row['aa_ratio']:.3f}; one mask "
        f"p50 {row['mask_us_p50']} us, p99 {row['mask_us_p99']} us"
    )
    write(args.out or ROOT / "benchmarks/results/structured.jsonl", [row])


def _beside_hostile(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """What hostile grammars cost who is beside them: streams alone, alone again, and beside them, in turns."""
    from benchmarks import structured as work
    from benchmarks.quire_systems import engine_spec

    streams = work.Streams(engine_spec(folder, args.dtype, threads=args.threads, max_num_seqs=128))
    hostile = work.hostile_grammars()
    streams.gaps(args.streams, 20, None, 1)  # untimed
    found: dict[str, list[float]] = {"alone": [], "again": [], "beside": []}
    for number in range(args.rounds):
        turn = number % len(found)
        for name in [*found, *found][turn : turn + len(found)]:
            beside = hostile if name == "beside" else None
            found[name] += streams.gaps(args.streams, args.tokens, beside, args.every)
            time.sleep(args.pause)
        shown = "  ".join(
            f"{name} p99 {sorted(gaps)[len(gaps) * 99 // 100] * 1e3:.1f} ms" for name, gaps in found.items()
        )
        print(f"round {number + 1:3}  {shown}", flush=True)
    waits = {}
    for many in (0, 1, 8, 64):
        time.sleep(args.pause)
        waits[many] = statistics.median(streams.wait(many, hostile, 10 * many + at) for at in range(3))
    streams.driver.stop(10)

    def figures(name: str) -> dict[str, float]:
        gaps = sorted(found[name])
        return {
            f"itl_ms_{name}_{label}": round(gaps[min(int(share * len(gaps)), len(gaps) - 1)] * 1e3, 2)
            for label, share in (("p50", 0.5), ("p90", 0.9), ("p99", 0.99), ("max", 1.0))
        }

    row = provenance() | {
        "benchmark": "structured-hostile", "model": args.model, "dtype": args.dtype, "threads": args.threads,
        "seed": 0, "streams": args.streams, "tokens": args.tokens, "rounds": args.rounds, "every": args.every,
        **figures("alone"), **figures("again"), **figures("beside"),
        **{f"wait_s_behind_{many}": round(seconds, 3) for many, seconds in waits.items()},
    }  # fmt: skip
    for name in found:
        print(f"{name:8} {figures(name)}")
    print("an ordinary schema behind hostile ones: " + ", ".join(f"{n}: {s:.3f} s" for n, s in waits.items()))
    return row


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__)
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("throughput")
    one.add_argument("--model", default="tiny", choices=["tiny", "qwen2.5-0.5b"])
    one.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16", "float16"])
    one.add_argument("--scenario", default="mixed", choices=["mixed", "smoke"])
    one.add_argument("--threads", type=int, default=os.cpu_count())
    one.add_argument("--systems", nargs="*", default=["sequential", "static", "continuous"])
    one.add_argument("--static-batches", nargs="*", type=int, default=[16, 32, 64])
    one.add_argument("--limit", type=float, default=1200.0, help="seconds for transformers' continuous batching")
    one.add_argument("--cache", type=Path, default=Path.home() / ".cache/quire/benchmarks")
    one.set_defaults(action=throughput)
    two = commands.add_parser("start-up")
    two.add_argument("--repeat", type=int, default=15)
    two.set_defaults(action=start_up)
    three = commands.add_parser("tracing")
    three.add_argument("--scenario", default="short", choices=["short", "mixed", "smoke"])
    three.add_argument("--rounds", type=int, default=12)
    three.add_argument("--concurrency", type=int, default=16)
    three.add_argument("--threads", type=int, default=1)
    three.set_defaults(action=tracing)
    four = commands.add_parser("scheduling")
    four.add_argument("--running", type=int, default=256)
    four.add_argument("--steps", type=int, default=1000)
    four.set_defaults(action=scheduling)
    five = commands.add_parser("prefix")
    five.add_argument("--model", default="tiny", choices=["tiny", "qwen2.5-0.5b"])
    five.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16", "float16"])
    five.add_argument("--threads", type=int, default=os.cpu_count())
    parts = ["shared", "parallel", "cost"]
    five.add_argument("--parts", nargs="*", choices=parts, default=parts)
    five.add_argument("--requests", type=int, default=100, help="that share a system prompt of 600 tokens")
    five.add_argument("--rounds", type=int, default=2)
    five.add_argument("--n", type=int, default=6)
    five.add_argument("--parallel-requests", type=int, default=8)
    five.add_argument("--running", type=int, default=32)
    five.add_argument("--steps", type=int, default=400)
    five.add_argument("--cache", type=Path, default=Path.home() / ".cache/quire/benchmarks")
    five.set_defaults(action=prefix)
    six = commands.add_parser("structured")
    six.add_argument("--model", default="qwen2.5-0.5b", choices=["tiny", "qwen2.5-0.5b"])
    six.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16", "float16"])
    six.add_argument("--threads", type=int, default=os.cpu_count())
    six.add_argument("--batch", type=int, default=32)
    six.add_argument("--steps", type=int, default=12)
    six.add_argument("--rounds", type=int, default=6)
    parts = ["cost", "hostile"]
    six.add_argument("--parts", nargs="*", choices=parts, default=parts)
    six.add_argument("--streams", type=int, default=8, help="beside hostile grammars")
    six.add_argument("--tokens", type=int, default=400, help="of each stream and round")
    six.add_argument("--every", type=int, default=4, help="steps from one hostile grammar to the next")
    six.add_argument("--pause", type=float, default=10.0, help="seconds in which what is still compiled ends")
    six.add_argument("--cache", type=Path, default=Path.home() / ".cache/quire/benchmarks")
    six.set_defaults(action=structured)
    seven = commands.add_parser("ahead")
    seven.add_argument("--parts", nargs="*", choices=["model", "device"], default=["model", "device"])
    seven.add_argument("--running", type=int, default=32)
    seven.add_argument("--steps", type=int, default=200)
    seven.add_argument("--rounds", type=int, default=6)
    seven.add_argument("--threads", type=int, default=1)
    seven.add_argument("--step-ms", type=float, default=4.0, help="of the device that the script stands for")
    seven.set_defaults(action=ahead)
    eight = commands.add_parser("kernels")
    eight.add_argument("--model", default="qwen2.5-0.5b", choices=["tiny", "qwen2.5-0.5b"])
    eight.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16", "float16"])
    eight.add_argument("--threads", type=int, default=os.cpu_count())
    eight.add_argument("--batches", nargs="*", type=int, default=[1, 8, 32])
    eight.add_argument("--steps", type=int, default=8)
    eight.add_argument("--rounds", type=int, default=3)
    eight.add_argument("--cache", type=Path, default=Path.home() / ".cache/quire/benchmarks")
    eight.set_defaults(action=kernels)
    for command in (one, two, three, four, five, six, seven, eight):
        command.add_argument("--out", type=Path, help="JSONL file to append to (default: benchmarks/results/)")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))  # what was measured so far is written
    args.action(args)


if __name__ == "__main__":
    main()
