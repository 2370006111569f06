"""What is measured in a process of its own: `python -m benchmarks.cpu.child NAME JSON`, a row as JSON on stdout.

engine         our engine alone: decode of so many sequences after their prompts, and the prompts
host           what a step of one sequence costs beside the native kernels
first_tokens   what our engine answers to some prompts, greedily
transformers   the jobs in one of three ways
"""

from __future__ import annotations

import ctypes
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.cpu.ceilings import Format
from benchmarks.quire_systems import engine_spec
from benchmarks.rows import ROOT, Row
from benchmarks.transformers_systems import Transformers
from benchmarks.workload import SCENARIOS, Job
from quire_engine.driver import spare_the_collector
from quire_engine.engine import Engine
from quire_kernels.cpu import build
from quire_schemas.wire import EngineSpec, Generate, Quantization, Sampling

BUDGET = 512
"""Tokens of a step."""


def run(name: str, **words: Any) -> Row:
    """The row of that child process. Raises with what it said last if it fails."""
    command = [sys.executable, "-m", "benchmarks.cpu.child", name, json.dumps(words)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{name} {words}: {done.stderr[-1000:]}")
    row: Row = json.loads(done.stdout.splitlines()[-1])
    return row


SERVED: dict[Format, Quantization | None] = {
    "bf16": None,
    "int8": Quantization("int8"),
    "int4": Quantization("int4", group_size=32),
}
"""What engines can store weights in; as many bits as the files of llama.cpp that they stand beside."""


def spec(folder: Path, format: Format, *, threads: int, sequences: int, context: int) -> EngineSpec:
    """An engine of ours for a format of `SERVED`."""
    if format not in SERVED:
        raise ValueError(f"engines have no weights in {format}")
    return engine_spec(
        folder, "bfloat16", threads=threads, max_num_seqs=sequences,
        max_num_batched_tokens=BUDGET, max_model_len=-(-context // 16) * 16, quantization=SERVED[format],
    )  # fmt: skip


def jobs(vocabulary: int, requests: int) -> list[Job]:
    """The first of the mixed scenario's."""
    return SCENARIOS["mixed"].jobs(vocabulary)[:requests]


def engine(
    folder: str, format: Format, threads: int, sequences: int, prompt: int, output: int, repeats: int
) -> Row:
    """Each of `repeats`: prompts of `prompt` tokens for all, then `output` steps in which each draws a token."""
    tokens = output + 2 + sequences * prompt // BUDGET  # who begins first draws while the others' prompts go on
    at, context = Path(folder), prompt + tokens
    loaded = _loaded(spec(at, format, threads=threads, sequences=sequences, context=context))
    prefill, decode = [], []
    for number in range(repeats):
        began = time.perf_counter()
        _begin(loaded, sequences, prompt, tokens, seed=number)
        prefill.append(sequences * prompt / (time.perf_counter() - began))
        began = time.perf_counter()
        for _ in range(output):
            _step(loaded, sequences)
        decode.append(sequences * output / (time.perf_counter() - began))
        _end(loaded, sequences)
    return {
        "backend": loaded.backend,
        "prefill_tokens_per_s": round(max(prefill), 2),
        "decode_tokens_per_s": round(max(decode), 2),
    }


def paced(folder: str, format: Format, threads: int, sequences: int, seconds: float, gate: str) -> Row:
    """Steps for so many seconds, counted from the moment that a file `go` is in the folder `gate`: those who wait
    there begin and end together.
    """
    most = 2_000
    loaded = _loaded(spec(Path(folder), format, threads=threads, sequences=sequences, context=most + 64))
    _begin(loaded, sequences, 32, most, seed=0)
    (Path(gate) / str(os.getpid())).touch()
    while not (Path(gate) / "go").exists():
        time.sleep(0.001)
    began, steps = time.perf_counter(), 0
    while steps < most - 16 and time.perf_counter() - began < seconds:
        _step(loaded, sequences)
        steps += 1
    return {"backend": loaded.backend, "tokens_per_s": round(sequences * steps / (time.perf_counter() - began), 2)}


def host(folder: str, format: Format, threads: int, steps: int) -> Row:
    """Steps of one sequence: their time, and what of it did not pass inside the native library."""
    inside = _Inside()
    load = build.load
    build.load = lambda path: inside.watch(load(path))  # type: ignore[assignment, return-value]
    loaded = _loaded(spec(Path(folder), format, threads=threads, sequences=1, context=steps + 64))
    _begin(loaded, 1, 32, steps + 16, seed=0)
    for _ in range(8):
        _step(loaded, 1)
    steps_s, inside_s, calls = [], [], []
    for _ in range(steps):
        inside.seconds, inside.calls = 0.0, 0
        began = time.perf_counter()
        _step(loaded, 1)
        steps_s.append(time.perf_counter() - began)
        inside_s.append(inside.seconds)
        calls.append(inside.calls)
    outside = sorted(step - kernels for step, kernels in zip(steps_s, inside_s, strict=True))
    step_ms = sorted(steps_s)[len(steps_s) // 2] * 1000
    outside_ms = outside[len(outside) // 2] * 1000
    return {
        "backend": loaded.backend, "steps": steps,
        "step_ms": round(step_ms, 3), "outside_ms": round(outside_ms, 3),
        "outside_share": round(outside_ms / step_ms, 4), "native_calls": max(calls),
    }  # fmt: skip


class _Inside:
    """Seconds spent in functions of a library, and how often they were called."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.calls = 0

    def watch(self, library: ctypes.CDLL) -> object:
        """The library, its functions timed."""
        inside = self

        class Watched:
            def __getattr__(self, name: str) -> _Timed:
                timed = _Timed(getattr(library, name), inside)
                self.__dict__[name] = timed
                return timed

        return Watched()


class _Timed:
    """A function of a library, timed; types are set on it as on the function itself."""

    function: Any
    inside: _Inside

    def __init__(self, function: Any, inside: _Inside) -> None:
        self.__dict__.update(function=function, inside=inside, _as_parameter_=function)

    def __setattr__(self, name: str, value: object) -> None:
        setattr(self.function, name, value)

    def __call__(self, *words: object) -> object:
        began = time.perf_counter()
        answer = self.function(*words)
        self.inside.seconds += time.perf_counter() - began
        self.inside.calls += 1
        return answer


def first_tokens(folder: str, threads: int, prompts: list[list[int]], tokens: int) -> Row:
    """The first so many tokens of each answer, in bfloat16."""
    longest = max(map(len, prompts)) + tokens
    engine = Engine.load(spec(Path(folder), "bf16", threads=threads, sequences=len(prompts), context=longest))
    sampling = Sampling(max_tokens=tokens, temperature=0.0, ignore_eos=True)
    for number, prompt in enumerate(prompts):
        engine.add(Generate(str(number), prompt, sampling))
    answers: list[list[int]] = [[] for _ in prompts]
    while engine.has_work:
        for delta in engine.step():
            answers[int(delta.id)] += delta.token_ids
    return {"answers": answers}


def transformers(folder: str, way: str, threads: int, requests: int, limit: float, batch: int) -> Row:
    """Output tokens a second of the jobs in that way, in bfloat16."""
    torch.set_num_threads(threads)
    theirs = Transformers(Path(folder), torch.bfloat16)
    asked = jobs(theirs.model.config.vocab_size, requests)
    theirs.static(asked[:2], 2, by_length=True)  # untimed: allocators and thread pools
    spent = time.process_time()
    done = sum(job.output_tokens for job in asked)
    if way == "sequential":
        seconds = theirs.sequential(asked)
    elif way == "static":
        seconds = theirs.static(asked, batch, by_length=True)
    else:
        seconds, done = theirs.continuous(asked, limit)
    return {
        "backend": "torch", "seconds": round(seconds, 2), "output_tokens": done,
        "tokens_per_s": round(done / seconds, 2),
        "cpu_s_per_1000": round((time.process_time() - spent) / done * 1000, 2),
    }  # fmt: skip


def _loaded(spec: EngineSpec) -> Engine:
    engine = Engine.load(spec)
    engine.warm_up()
    spare_the_collector()  # as an engine process does
    return engine


def _begin(engine: Engine, sequences: int, prompt: int, tokens: int, seed: int) -> None:
    """Adds the requests, and steps until each has drawn its first token."""
    rng = random.Random(seed)
    for number in range(sequences):
        ids = [rng.randrange(32, engine.profile.vocab_size) for _ in range(prompt)]
        sampling = Sampling(max_tokens=tokens, temperature=0.0, ignore_eos=True)
        engine.add(Generate(str(number), ids, sampling))
    begun: set[str] = set()
    while len(begun) < sequences:
        begun.update(delta.id for delta in engine.step())


def _step(engine: Engine, sequences: int) -> None:
    if len(deltas := engine.step()) != sequences:
        raise RuntimeError(f"{len(deltas)} of {sequences} requests drew a token")


def _end(engine: Engine, sequences: int) -> None:
    for number in range(sequences):
        engine.abort(str(number))
    while engine.has_work:
        engine.step()


CHILDREN: Sequence[Callable[..., Row]] = (engine, paced, host, first_tokens, transformers)


def main() -> None:
    child = next(each for each in CHILDREN if each.__name__ == sys.argv[1])
    print(json.dumps(child(**json.loads(sys.argv[2]))))


if __name__ == "__main__":
    main()
