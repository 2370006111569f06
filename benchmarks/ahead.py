"""What deciding a step ahead saves: a full batch that generates, with and without asynchronous scheduling.

Two runners: the model, on the threads that it is given, and a device of another kind, for which the scripted
runner stands: a step takes it a given time and the host has nothing to do meanwhile. Between two steps the host
does what it does in an engine process, which is to write the deltas of the step as one frame.
"""

from __future__ import annotations

import random
import time
from pathlib import Path

import msgspec

from benchmarks.quire_systems import engine_spec
from quire_engine.engine import Engine
from quire_schemas.wire import Deltas, Generate, RunnerKind, Sampling, frame


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
