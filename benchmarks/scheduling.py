"""What the host does for a step: `schedule()` and `commit()` of a full batch that generates, without a model.

Prompts have random lengths, so that blocks become full, and are sealed, a few in every step. No torch.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from functools import partial
from pathlib import Path

from benchmarks.rounds import in_turns
from benchmarks.rows import NO_KERNELS, RESULTS, Row, provenance, write
from quire_engine.blocks import BlockPool
from quire_engine.config import BatchLimits
from quire_engine.driver import spare_the_collector
from quire_engine.request import Request
from quire_engine.scheduler import Scheduler
from quire_engine.step import StepResult
from quire_schemas.wire import Generate, Sampling


def host_times(running: int, steps: int, seed: int, *, prefix_cache: bool) -> list[float]:
    """Seconds of schedule and commit for `steps` steps in which `running` requests each draw a token."""
    rng = random.Random(seed)
    pool = BlockPool(running * 128, 16)
    scheduler = Scheduler(pool, BatchLimits(running, 1 << 16, True), max_model_len=2048)
    for number in range(running):
        prompt = [rng.randrange(1 << 15) for _ in range(rng.randrange(50, 600))]
        message = Generate(str(number), prompt, Sampling(max_tokens=steps + 10, temperature=0.0))
        request = Request.of(message, eos_token_ids=(1 << 20,), seed=number, received_at=0.0)
        if prefix_cache:
            request.share_with("all")
        scheduler.add(request)
    seconds = []
    for _ in range(steps + 2):
        began = time.perf_counter()
        plan = scheduler.schedule()
        planned = time.perf_counter()
        result = StepResult({item.request_id: plan.step for item in plan.items if item.draw is not None})
        drawn = time.perf_counter()
        scheduler.commit(plan, result)
        if plan.num_tokens == len(plan.items) == running:
            seconds.append(time.perf_counter() - drawn + planned - began)
    return seconds


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--running", type=int, default=256)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--out", type=Path, default=RESULTS / "scheduling.jsonl")


def run(args: argparse.Namespace) -> None:
    common, found = provenance(NO_KERNELS), rows(args.running, args.steps, seed=0)
    for row in found:
        print(f"{row['system']:18} p50 {row['p50_us']} us   p99 {row['p99_us']} us   A/A {row['aa_ratio']}")
    write(args.out, [common | row for row in found])


def rows(running: int, steps: int, seed: int) -> list[Row]:
    """A row with and one without prefix cache, each twice in turns: the ratio of the two medians is the noise."""
    spare_the_collector()  # as an engine process does
    found = in_turns({on: partial(host_times, running, steps, seed, prefix_cache=on) for on in (True, False)}, 2)
    rows = []
    for prefix_cache, runs in found.items():
        medians = [statistics.median(run) for run in runs]
        every = sorted(runs[0] + runs[1])
        p50, p90, p99 = (round(every[int(part * (len(every) - 1))] * 1e6, 1) for part in (0.5, 0.9, 0.99))
        rows.append(
            {
                "benchmark": "scheduling", "system": f"prefix cache {'on' if prefix_cache else 'off'}",
                "running": running, "steps": len(every), "seed": seed,
                "p50_us": p50, "p90_us": p90, "p99_us": p99,
                "mean_us": round(statistics.fmean(every) * 1e6, 1),
                "aa_ratio": round(max(medians) / min(medians), 3),
            }
        )  # fmt: skip
    return rows
