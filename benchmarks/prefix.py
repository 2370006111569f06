"""What the prefix cache saves and what it costs; what the choices of one request save by sharing their prompt.

Three measurements on engines in this process, which differ in `prefix_caching` alone. Prompt tokens that are
computed are counted where that is done, in the plans that the runner gets, not by the cache's own counters.
"""

from __future__ import annotations

import itertools
import random
import statistics
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

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
    seconds: dict[str, list[float]] = {name: [] for name in engines}
    order = list(engines.items())
    for _ in range(steps):
        for name, engine in order:
            began = time.perf_counter()
            deltas = engine.step()
            seconds[name].append(time.perf_counter() - began)
            if len(deltas) != running:
                raise RuntimeError(f"{name}: {len(deltas)} of {running} requests drew a token")
        order.append(order.pop(0))
    for engine in engines.values():
        for index in range(running):
            engine.abort(f"{number}/{index}")
    return seconds


def percentile(ordered: Sequence[float], part: float) -> float:
    return ordered[round(part * (len(ordered) - 1))]
