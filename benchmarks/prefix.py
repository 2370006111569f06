"""What the prefix cache saves and what it costs; what the choices of one request save by sharing their prompt.

Three measurements on engines in this process, which differ in `prefix_caching` alone. Prompt tokens that are
computed are counted where that is done, in the plans that the runner gets, not by the cache's own counters.
"""

from __future__ import annotations

import argparse
import itertools
import os
import random
import statistics
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import msgspec
import torch

from benchmarks.models import CACHE, model_dir
from benchmarks.quire_systems import Quire
from benchmarks.rounds import in_turns
from benchmarks.rows import RESULTS, Row, provenance, write
from benchmarks.workload import Job, Lengths, Scenario
from quire_engine.engine import Engine
from quire_engine.runner import Runner
from quire_engine.step import StepPlan, StepResult
from quire_schemas.wire import Generate, Sampling

_passes = itertools.count()

SHAPES = {
    "alpaca": Scenario("alpaca", prompt=Lengths(mean=19, low=4), output=Lengths(mean=58)),
    "sharegpt": Scenario("sharegpt", prompt=Lengths(mean=161), output=Lengths(mean=338)),
}
"""Mean lengths of the two data sets for which PagedAttention's authors published the saving (6 % to 30 %)."""
_OWN = Lengths(mean=24, low=8, high=48)


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="tiny", choices=["tiny", "qwen2.5-0.5b"])
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parts = ["shared", "parallel", "cost"]
    parser.add_argument("--parts", nargs="*", choices=parts, default=parts)
    parser.add_argument("--requests", type=int, default=100, help="that share a system prompt of 600 tokens")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--n", type=int, default=6)
    parser.add_argument("--parallel-requests", type=int, default=8)
    parser.add_argument("--running", type=int, default=32)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--cache", type=Path, default=CACHE)
    parser.add_argument("--out", type=Path, default=RESULTS / "prefix.jsonl")


def run(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    folder = model_dir(args.model, args.cache)
    settings = {"on": True, "off": False, "off-again": False}
    systems = {
        name: Quire(folder, args.dtype, threads=args.threads, max_num_seqs=96, prefix_caching=caching)
        for name, caching in settings.items()
    }
    engines = {name: system.engine for name, system in systems.items()}
    vocabulary = systems["on"].vocab_size
    common = provenance(engines["on"].backend) | {
        "benchmark": "prefix", "model": args.model, "dtype": args.dtype, "threads": args.threads, "seed": 0,
    }  # fmt: skip
    rows: list[Row] = []

    def note(row: Row) -> None:
        rows.append(common | row)
        print("  ".join(f"{name} {value}" for name, value in row.items()), flush=True)

    def shared() -> None:
        scenario = Shared(requests=args.requests)
        jobs = scenario.jobs(vocabulary)
        for engine in engines.values():
            shared_pass(engine, jobs[:4], scenario.concurrency)  # untimed: allocators, thread pools
        passes = in_turns(
            {
                name: partial(shared_pass, engines[engine], jobs, scenario.concurrency)
                for name, engine in {"on": "on", "on-again": "on", "off": "off", "off-again": "off-again"}.items()
            },
            args.rounds,
            lambda each: f"{each.seconds:.1f} s",
        )
        firsts = {name: sorted(t for each in found for t in each.first_token) for name, found in passes.items()}
        seconds = {name: statistics.median(each.seconds for each in found) for name, found in passes.items()}
        computed = {name: found[0].computed for name, found in passes.items()}

        def at(part: float, name: str) -> float:
            return round(1000 * percentile(firsts[name], part), 1)

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
        for name, shape in SHAPES.items():
            jobs = replace(shape, requests=args.parallel_requests).jobs(vocabulary)
            alone = parallel_pass(engines["off"], jobs, args.n, share=False)
            together = parallel_pass(engines["off"], jobs, args.n, share=True)
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
        seconds = step_times(alike, args.running, args.steps, seed=0)
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
        write(args.out, rows)


@dataclass(frozen=True, slots=True)
class Shared:
    """Requests that begin with the same system prompt; so many are under way at a time."""

    requests: int = 100
    shared_tokens: int = 600
    own: Lengths = _OWN
    output_tokens: int = 16
    concurrency: int = 8
    seed: int = 0

    def jobs(self, vocab_size: int) -> list[Job]:
        rng = random.Random(self.seed)
        system = [rng.randrange(32, vocab_size) for _ in range(self.shared_tokens)]
        return [
            Job((*system, *(rng.randrange(32, vocab_size) for _ in range(self.own.draw(rng)))), self.output_tokens)
            for _ in range(self.requests)
        ]


class Counted:
    """A runner that counts the prompt tokens it is given; `prompts` has the lengths of prompts by request id."""

    def __init__(self, runner: Runner, prompts: Mapping[str, int]) -> None:
        self._runner = runner
        self._prompts = prompts
        self.prompt_tokens = 0

    def execute(self, plan: StepPlan) -> StepResult:
        for item in plan.items:
            self.prompt_tokens += max(0, min(item.end, self._prompts[item.request_id]) - item.start)
        return self._runner.execute(plan)

    def warm_up(self, seconds: float) -> None:
        """See `Runner`."""
        self._runner.warm_up(seconds)

    def set_seats(self, seats: int) -> None:
        """See `Runner`."""
        self._runner.set_seats(seats)


@dataclass(frozen=True, slots=True)
class SharedPass:
    """One pass over jobs that begin alike. Times to the first token are in seconds, sorted."""

    seconds: float
    first_token: list[float]
    prompt_tokens: int
    computed: int


def shared_pass(engine: Engine, jobs: Sequence[Job], concurrency: int) -> SharedPass:
    """All jobs, a new one whenever one ends, from an empty cache. Raises if one does not end as asked for."""
    salt = f"pass {next(_passes)}"  # what an earlier pass has left is not found
    names = {f"{salt}/{number}": job for number, job in enumerate(jobs)}
    runner = engine.runner
    counted = engine.runner = Counted(runner, {name: len(job.prompt) for name, job in names.items()})
    ahead = deque(names.items())
    began: dict[str, float] = {}
    first: dict[str, float] = {}
    left = len(names)
    start = time.perf_counter()
    try:
        while left:
            while ahead and len(names) - left + concurrency > len(began):
                name, job = ahead.popleft()
                sampling = Sampling(max_tokens=job.output_tokens, temperature=0.0, ignore_eos=True)
                began[name] = time.perf_counter()
                engine.add(Generate(name, list(job.prompt), sampling, cache_salt=salt))
            for delta in engine.step():
                first.setdefault(delta.id, time.perf_counter() - began[delta.id])
                if delta.finish_reason is not None:
                    left -= 1
                    if delta.finish_reason != "length":
                        raise RuntimeError(f"request {delta.id} ended with {delta.finish_reason}: {delta.error}")
    finally:
        engine.runner = runner
    prompt_tokens = sum(len(job.prompt) for job in jobs)
    return SharedPass(time.perf_counter() - start, sorted(first.values()), prompt_tokens, counted.prompt_tokens)


@dataclass(frozen=True, slots=True)
class Blocks:
    """Blocks that a pass held, over its steps."""

    mean: float
    most: int


def parallel_pass(engine: Engine, jobs: Sequence[Job], n: int, *, share: bool) -> Blocks:
    """Every job `n` times at once, each time another seed; with `share` the `n` of one job are a family."""
    number = next(_passes)
    for index, job in enumerate(jobs):
        for choice in range(n):
            sampling = Sampling(job.output_tokens, temperature=1.0, seed=choice, ignore_eos=True)
            family = f"{number}/{index}" if share else None
            engine.add(Generate(f"{number}/{index}/{choice}", list(job.prompt), sampling, family=family))
    held: list[int] = []
    before = engine.stats().preemptions
    while engine.has_work:
        engine.step()
        stats = engine.stats()
        if stats.preemptions != before:
            raise RuntimeError("the pool is too small: blocks that were taken away are not blocks that were saved")
        held.append(stats.blocks_used)
    return Blocks(statistics.fmean(held), max(held))


def step_times(engines: Mapping[str, Engine], running: int, steps: int, seed: int) -> dict[str, list[float]]:
    """Seconds of each step in which `running` requests that have nothing in common all draw a token.

    The engines step in turns, another one first each time: what the machine does meanwhile meets all alike.
    """
    rng = random.Random(seed)
    number = next(_passes)
    vocabulary = next(iter(engines.values())).profile.vocab_size
    prompts = [[rng.randrange(32, vocabulary) for _ in range(rng.randrange(32, 96))] for _ in range(running)]
    for engine in engines.values():
        for index, prompt in enumerate(prompts):
            sampling = Sampling(max_tokens=steps + 100, temperature=0.0, ignore_eos=True)
            engine.add(Generate(f"{number}/{index}", list(prompt), sampling))
        begun: set[str] = set()
        while len(begun) < running:
            begun.update(delta.id for delta in engine.step())

    def step(engine: Engine) -> float:
        began = time.perf_counter()
        deltas = engine.step()
        took = time.perf_counter() - began
        if len(deltas) != running:
            raise RuntimeError(f"{len(deltas)} of {running} requests drew a token")
        return took

    seconds = in_turns({name: partial(step, engine) for name, engine in engines.items()}, steps)
    for engine in engines.values():
        for index in range(running):
            engine.abort(f"{number}/{index}")
    return seconds


def percentile(ordered: Sequence[float], part: float) -> float:
    return ordered[round(part * (len(ordered) - 1))]
