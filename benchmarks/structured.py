"""What structured output costs a step: the same batch of running requests, free and held to a JSON Schema.

Only steps in which every request generates are timed; the constraint is compiled before. It never lets the text
end, so that both write as many tokens. Public shapes come without a tokenizer: they get a vocabulary of their size
made of bytes, words and the runs of signs that JSON has.

The other part is what hostile grammars cost others: the time between the tokens of streams beside them, and what
an ordinary schema waits behind them. They are aborted with the round, so that each begins alike but for what is
still being compiled.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import queue
import random
import statistics
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch

from benchmarks.models import CACHE, SHAPES, model_dir
from benchmarks.quire_systems import Quire, engine_spec
from benchmarks.rounds import Against, in_turns, milliseconds
from benchmarks.rows import RESULTS, Row, backend, provenance, write
from quire_engine.driver import Died, Driver, Loaded, Output
from quire_engine.engine import Engine
from quire_schemas.wire import Delta, EngineSpec, Generate, Sampling, Structured

SCHEMA = {
    "type": "array",
    "minItems": 1000,
    "items": {
        "type": "object",
        "properties": {
            "name": {"type": "string", "minLength": 1, "maxLength": 24},
            "kind": {"enum": ["river", "mountain", "city", "lake"]},
            "height": {"type": "integer", "minimum": 0, "maximum": 9000},
            "tags": {"type": "array", "items": {"type": "string", "maxLength": 12}, "maxItems": 4},
        },
        "required": ["name", "kind", "height", "tags"],
        "additionalProperties": False,
    },
}
CONSTRAINT = Structured("json_schema", json.dumps(SCHEMA))


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="qwen2.5-0.5b", choices=["tiny", "qwen2.5-0.5b"])
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=6)
    parts = ["cost", "hostile"]
    parser.add_argument("--parts", nargs="*", choices=parts, default=parts)
    parser.add_argument("--streams", type=int, default=8, help="beside hostile grammars")
    parser.add_argument("--tokens", type=int, default=400, help="of each stream and round")
    parser.add_argument("--every", type=int, default=4, help="steps from one hostile grammar to the next")
    parser.add_argument("--pause", type=float, default=10.0, help="seconds in which what is still compiled ends")
    parser.add_argument("--cache", type=Path, default=CACHE)
    parser.add_argument("--out", type=Path, default=RESULTS / "structured.jsonl")


def run(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    folder = model_dir(args.model, args.cache)
    if "hostile" in args.parts:
        write(args.out, [_beside_hostile(args, folder)])
    if "cost" not in args.parts:
        return
    engine = Quire(folder, args.dtype, threads=args.threads, max_num_seqs=args.batch).engine
    began = time.perf_counter()
    engine.grammars.prepare()
    read = time.perf_counter() - began
    began = time.perf_counter()
    engine.grammars.compile(CONSTRAINT)
    compiled = time.perf_counter() - began
    masks = sorted(mask_seconds(engine, 2000))
    systems = {"free": None, "free-again": None, "bound": CONSTRAINT}

    def step(constraint: Structured | None) -> float:
        return statistics.median(step_seconds(engine, args.batch, args.steps, constraint))

    for constraint in (None, CONSTRAINT):
        step_seconds(engine, args.batch, 2, constraint)  # untimed
    measures = {name: partial(step, constraint) for name, constraint in systems.items()}
    steps = in_turns(measures, args.rounds, milliseconds)
    cost = Against.of(steps["bound"], steps["free"], steps["free-again"])
    row = provenance(engine.backend) | {
        "benchmark": "structured", "model": args.model, "dtype": args.dtype, "threads": args.threads, "seed": 0,
        "vocabulary": engine.profile.vocab_size, "synthetic_vocabulary": args.model in SHAPES,
        "batch": args.batch, "steps": args.steps, "rounds": args.rounds,
        "step_ms_free": round(statistics.median(steps["free"]) * 1000, 2),
        "step_ms_bound": round(statistics.median(steps["bound"]) * 1000, 2),
        **cost.row("bound"),
        "mask_us_p50": round(masks[len(masks) // 2] * 1e6, 1),
        "mask_us_p99": round(masks[len(masks) * 99 // 100] * 1e6, 1),
        "mask_us_max": round(masks[-1] * 1e6, 1),
        "vocabulary_s": round(read, 3), "compile_s": round(compiled, 3),
    }  # fmt: skip
    print(f"step bound to step free: {cost}; one mask p50 {row['mask_us_p50']} us, p99 {row['mask_us_p99']} us")
    write(args.out, [row])


def _beside_hostile(args: argparse.Namespace, folder: Path) -> Row:
    """What hostile grammars cost who is beside them: streams alone, alone again, and beside them, in turns."""
    streams = Streams(engine_spec(folder, args.dtype, threads=args.threads, max_num_seqs=128))
    hostile = hostile_grammars()
    streams.gaps(args.streams, 20, None, 1)  # untimed

    def gaps(beside: Iterator[Structured] | None) -> list[float]:
        took = streams.gaps(args.streams, args.tokens, beside, args.every)
        time.sleep(args.pause)
        return took

    found = {
        name: sorted(itertools.chain.from_iterable(rounds))
        for name, rounds in in_turns(
            {"alone": partial(gaps, None), "again": partial(gaps, None), "beside": partial(gaps, hostile)},
            args.rounds,
            lambda took: f"p99 {milliseconds(took[len(took) * 99 // 100])}",
        ).items()
    }
    waits = {}
    for many in (0, 1, 8, 64):
        time.sleep(args.pause)
        waits[many] = statistics.median(streams.wait(many, hostile, 10 * many + at) for at in range(3))
    streams.driver.stop(10)

    def figures(name: str) -> dict[str, float]:
        ordered = found[name]
        return {
            f"itl_ms_{name}_{label}": round(ordered[min(int(share * len(ordered)), len(ordered) - 1)] * 1e3, 2)
            for label, share in (("p50", 0.5), ("p90", 0.9), ("p99", 0.99), ("max", 1.0))
        }

    row = provenance(backend(args.threads)) | {
        "benchmark": "structured-hostile", "model": args.model, "dtype": args.dtype, "threads": args.threads,
        "seed": 0, "streams": args.streams, "tokens": args.tokens, "rounds": args.rounds, "every": args.every,
        **figures("alone"), **figures("again"), **figures("beside"),
        **{f"wait_s_behind_{many}": round(seconds, 3) for many, seconds in waits.items()},
    }  # fmt: skip
    for name in found:
        print(f"{name:8} {figures(name)}")
    print("an ordinary schema behind hostile ones: " + ", ".join(f"{n}: {s:.3f} s" for n, s in waits.items()))
    return row


def step_seconds(engine: Engine, batch: int, steps: int, constraint: Structured | None) -> list[float]:
    """Seconds of each of `steps` steps in which `batch` requests generate one token each."""
    rng = random.Random(0)
    vocabulary = engine.profile.vocab_size
    for number in range(batch):
        prompt = [rng.randrange(min(vocabulary, 2000)) for _ in range(16)]
        sampling = Sampling(
            max_tokens=steps + 16, temperature=0.0, seed=number, ignore_eos=True, structured=constraint
        )
        engine.add(Generate(str(number), prompt, sampling))
    begun: set[str] = set()
    while len(begun) < batch:
        begun.update(delta.id for delta in engine.step())
    took: list[float] = []
    for _ in range(steps):
        start = time.perf_counter()
        deltas = engine.step()
        took.append(time.perf_counter() - start)
        if len(deltas) != batch or any(delta.finish_reason for delta in deltas):
            raise RuntimeError("a step did not give every request one token")
    for number in range(batch):
        engine.abort(str(number))
    return took


def mask_seconds(engine: Engine, tokens: int) -> list[float]:
    """Seconds of single masks along one random text; no model."""
    rng = random.Random(0)
    matcher = engine.grammars.compile(CONSTRAINT).matcher(engine.profile.eos_token_ids)
    output: list[int] = []
    took: list[float] = []
    for _ in range(tokens):
        start = time.perf_counter()
        bits = matcher.allowed(output, may_end=False)
        took.append(time.perf_counter() - start)
        allowed = int.from_bytes(bits, "little")
        index = rng.randrange(8 * len(bits))
        above = allowed >> index
        chosen = above if above else allowed
        output.append((chosen & -chosen).bit_length() - 1 + (index if above else 0))
    return took


# ── hostile grammars ──────────────────────────────────────────────────────────────────────────────────────


def hostile_grammars() -> Iterator[Structured]:
    """Distinct ones without end: refused after all the time they may take, or followed at a great cost."""
    for number in itertools.count():
        yield Structured("regex", f"((a{{0,100}}){{0,100}}){{0,{101 + number}}}")
        yield Structured("json_schema", json.dumps({"type": "integer", "multipleOf": 1_000_000_007 + number}))
        chain = "".join(f"r{i}: r{i + 1}\n" for i in range(3000))
        yield Structured("grammar", f"start: r0\n{chain}r3000: /{number}/")
        yield Structured("regex", f"([ab]*a[ab]{{18}}){{1,20}}{number}")


class Streams:
    """An engine in its own thread, as a server drives it, and when each token of it came."""

    def __init__(self, spec: EngineSpec) -> None:
        self._heard: queue.SimpleQueue[tuple[float, list[Delta]]] = queue.SimpleQueue()
        self._loaded = threading.Event()
        self.driver = Driver(spec, self._out)
        self.driver.start()
        if not self._loaded.wait(600):
            raise RuntimeError("the engine does not start")

    def _out(self, said: Loaded | Output | Died) -> None:
        if isinstance(said, Output):
            self._heard.put((time.perf_counter(), said.deltas))
        elif isinstance(said, Died):
            raise said.error
        self._loaded.set()

    def gaps(self, streams: int, tokens: int, hostile: Iterator[Structured] | None, every: int) -> list[float]:
        """Seconds between tokens of `streams` requests until each has `tokens`; something hostile comes each
        `every` steps.
        """
        free = Sampling(max_tokens=tokens, temperature=0.0, ignore_eos=True)
        names = [f"s{time.monotonic_ns()}-{number}" for number in range(streams)]
        for name in names:
            self.driver.add(Generate(name, [5, 6, 7, 8], free), time.time())
        last: dict[str, float] = {}
        found: list[float] = []
        sent: list[str] = []
        steps = 0
        while names:
            now, deltas = self._heard.get(timeout=60)
            steps += bool(deltas)
            for delta in deltas:
                if delta.id not in names or not delta.token_ids:
                    continue
                if delta.id in last:
                    found.append(now - last[delta.id])
                last[delta.id] = now
                if delta.finish_reason:
                    names.remove(delta.id)
            if hostile is not None and steps % every == 0 and deltas:
                sent.append(f"h{time.monotonic_ns()}")
                bound = Sampling(max_tokens=200, temperature=1.0, structured=next(hostile))
                self.driver.add(Generate(sent[-1], [5], bound), time.time())
        for name in sent:
            self.driver.abort(name)
        return sorted(found)

    def wait(self, many: int, hostile: Iterator[Structured], number: int) -> float:
        """Seconds to the first token of an ordinary JSON Schema behind `many` hostile grammars."""
        sent = [f"w{time.monotonic_ns()}-{at}" for at in range(many)]
        for name in sent:
            bound = Sampling(max_tokens=1, structured=next(hostile))
            self.driver.add(Generate(name, [5], bound), time.time())
        usual = {"type": "object", "properties": {f"p{number}": {"type": "string"}}, "required": [f"p{number}"]}
        name = f"u{time.monotonic_ns()}"
        began = time.perf_counter()
        asked = Sampling(max_tokens=2, structured=Structured("json_schema", json.dumps(usual)))
        self.driver.add(Generate(name, [5], asked), time.time())
        while True:
            now, deltas = self._heard.get(timeout=120)
            for delta in deltas:
                if delta.id == name and delta.token_ids:
                    for other in sent:
                        self.driver.abort(other)
                    return now - began
