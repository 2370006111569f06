"""What the host does in a step of an engine: no model computes, and tokens are there at once.

Engine, scheduler, pipeline, runners and request table are the real ones. Left out is what a device would carry
out: its programs and kernels, the model and the draw. So a step takes as long as the host is busy with it; on a
GPU its calls to the driver come on top of that.

    steady-N    N requests that all draw, a step ahead (docs/gpu.md)
    unshared-N  the same without a prefix cache
    offline     1,000 requests of 216 tokens in and 196 out on average through 256 seats: some end, others come
    launched    256 that draw beside a prompt of 2,000 tokens, launched kernel by kernel
    in-turn-N   the runner of CPUs, each step after the one before

`--against` takes turns with the packages of another checkout, in processes of their own.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.rounds import in_turns
from benchmarks.rows import NO_KERNELS, RESULTS, ROOT, Row, commit_of, provenance, write
from benchmarks.workload import Lengths
from quire_engine.driver import spare_the_collector
from quire_engine.engine import Engine
from quire_engine.masks import MaskMaker
from quire_engine.models import KVCache
from quire_engine.resident import runner as resident
from quire_engine.resident.pipeline import Pipeline
from quire_engine.resident.program import MIXED_TOKENS
from quire_engine.runner import ModelRunner
from quire_kernels.triton.step import MixedBuffers
from quire_schemas.checkpoint import profile_from_config
from quire_schemas.wire import EngineSpec, Generate, Sampling

PARTS = (
    "steady-1", "steady-32", "steady-256", "unshared-256", "offline", "launched", "in-turn-1", "in-turn-32",
    "in-turn-256",
)  # fmt: skip
TOKEN = 7
CONTEXT = 4096
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "intermediate_size": 64,
    "vocab_size": 32000,
    "max_position_embeddings": CONTEXT,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
    "torch_dtype": "float32",
    "eos_token_id": 2,
}


class _NoModel:
    """States without width, and one token."""

    def __init__(self) -> None:
        self.profile = profile_from_config(CONFIG)

    def forward(self, token_ids: Tensor, batches: Any, kv: Any) -> Tensor:
        return torch.empty(batches[0].logits_rows.shape[0], 1)

    def best(self, states: Tensor) -> tuple[Tensor, Tensor]:
        return torch.zeros(len(states)), torch.full((len(states),), TOKEN)

    def narrow_logits(self, states: Tensor) -> Tensor:
        return states


class _NoProgram:
    """`StepProgram` that runs nothing; what it would be filled with is copied as ever. `decode` and `mixed` may be
    called as the program of another checkout is.
    """

    scratch = None

    def __init__(self, seats: int, groups: int) -> None:
        self.tokens = torch.full((seats,), TOKEN, dtype=torch.int32)
        self.items = torch.zeros(seats, 3 + 2 * groups, dtype=torch.int32)
        self.spans = torch.zeros(seats, 4, dtype=torch.int32)
        self.tables = torch.zeros(groups, 2 * seats, 1, dtype=torch.int32)
        self.given = torch.zeros(MIXED_TOKENS[-1], dtype=torch.int32)

    def decode(self, words: Tensor, *_: int) -> Tensor:
        self.items[: len(words)].copy_(words)
        return self.tokens

    def fits(self, num_tokens: int) -> bool:
        return num_tokens <= len(self.given)

    def mixed(self, words: Tensor, *rest: Any) -> Tensor:
        self.given[: len(rest[-1])].copy_(rest[-1])
        self.spans[: len(words)].copy_(words)
        return self.tokens

    def launched(self, words: Tensor, count: int, token_ids: Tensor) -> Tensor:
        spans = [(first, many) for _, first, many, _ in words[:count].tolist()]
        buffers = MixedBuffers.allocate(len(token_ids), count, self.tables, 16, CONTEXT, spans)
        buffers.given.copy_(token_ids)
        buffers.items.copy_(words[:count])
        return self.tokens


class _NoSampler:
    @staticmethod
    def scratch(*sizes: Any) -> None:
        return None

    @staticmethod
    def draw(logits: Any, own: Any, ends: Any, draws: Any, chosen: Tensor, *room: Any) -> None:
        chosen.fill_(TOKEN)


def engine_of(seats: int, *, shared: bool, in_turn: bool, budget: int = 8192) -> Engine:
    """An engine without a model; the step is the resident one's, a step ahead, unless it is `in_turn`."""
    folder = Path(tempfile.mkdtemp(prefix="quire-host-"))
    (folder / "config.json").write_text(json.dumps(CONFIG))
    model: Any = _NoModel()
    spec = EngineSpec(
        model="none",
        replica_id="benchmark",
        incarnation=1,
        socket="",
        model_dir=str(folder),
        dtype="float32",
        kv_dtype="float32",
        device="cpu",
        threads=1,
        max_model_len=CONTEXT,
        block_size=16,
        num_blocks=seats * CONTEXT // 16,
        max_num_seqs=seats,
        max_num_batched_tokens=budget,
        chunked_prefill=True,
        prefix_caching=shared,
        async_scheduling=not in_turn,
        seed=0,
        memory_limit=1 << 40,
        hot_hash="",
    )
    device = torch.device("cpu")
    kv = KVCache.allocate(model.profile, 1, 16, torch.float32, device)
    general = ModelRunner(
        model, kv, block_size=16, head_rows=seats, device=device, masks=MaskMaker(meanwhile=False)
    )
    if in_turn:
        return Engine(spec, model.profile, general)
    module: Any = resident
    module.sample, module.StepProgram = _NoSampler, lambda *_, **__: _NoProgram(seats, len(kv.groups))
    runner = resident.ResidentRunner(
        general, seats=seats, max_num_batched_tokens=budget, max_model_len=CONTEXT, captures=False
    )
    return Engine(spec, model.profile, runner, background=partial(Pipeline, runner))


def add(engine: Engine, rng: random.Random, name: int, prompt: int, output: int) -> None:
    ids = rng.choices(range(32, 32000), k=prompt)
    engine.add(Generate(str(name), ids, Sampling(max_tokens=output, temperature=0.0, ignore_eos=True)))


def steady(running: int, steps: int, *, shared: bool = True, in_turn: bool = False) -> list[float]:
    """Seconds of each of `steps` steps in which `running` requests draw."""
    engine, rng = engine_of(running, shared=shared, in_turn=in_turn), random.Random(0)
    for number in range(running):
        add(engine, rng, number, rng.randrange(400, 800), steps + 100 + running)
    begun: set[str] = set()
    while len(begun) < running:
        begun.update(delta.id for delta in engine.step())
    return _timed(engine, 20, steps, running)


def _timed(engine: Engine, warm: int, steps: int, deltas: int) -> list[float]:
    spare_the_collector()  # as an engine process does
    found = []
    for _ in range(warm + steps):
        began = time.perf_counter()
        heard = engine.step()
        found.append(time.perf_counter() - began)
        if len(heard) != deltas:
            raise RuntimeError(f"{len(heard)} of {deltas} requests drew a token")
    return found[warm:]


def offline(steps: int) -> list[float]:
    """Seconds of each step from the first token to the moment when nobody waits any more."""
    engine, rng = engine_of(256, shared=True, in_turn=False), random.Random(0)
    prompts, outputs = (Lengths(mean=mean, low=4, high=1024) for mean in (216, 196))
    for number in range(1000):
        add(engine, rng, number, prompts.draw(rng), outputs.draw(rng))
    while not engine.step():
        pass
    spare_the_collector()
    found: list[float] = []
    while engine._scheduler.waiting and len(found) < steps:
        began = time.perf_counter()
        engine.step()
        found.append(time.perf_counter() - began)
    return found


def launched(steps: int) -> list[float]:
    """Seconds of `begin` and `finish` of one step, again and again."""
    engine, rng = engine_of(257, shared=True, in_turn=False), random.Random(0)
    for number in range(256):
        add(engine, rng, number, rng.randrange(400, 800), 1000)
    begun: set[str] = set()
    while len(begun) < 256:
        begun.update(delta.id for delta in engine.step())
    engine.step()
    add(engine, rng, 256, 2000, 1)
    plan = engine._scheduler.schedule()
    if plan.num_tokens != 2256:
        raise RuntimeError(f"{plan.num_tokens} tokens in the step")
    runner: Any = engine.runner
    found = []
    for _ in range(steps):
        began = time.perf_counter()
        runner.finish(runner.begin(plan))
        found.append(time.perf_counter() - began)
    return found


def measure(part: str, steps: int) -> list[float]:
    """Seconds of steps of a part, in this process."""
    torch.set_num_threads(1)
    kind, _, number = part.rpartition("-")
    if kind in ("steady", "unshared", "in-turn"):
        return steady(int(number), steps, shared=kind != "unshared", in_turn=kind == "in-turn")
    return launched(max(20, steps // 10)) if part == "launched" else offline(steps)


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=PARTS)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--against", type=Path, help="another checkout of this repository")
    parser.add_argument("--out", type=Path, default=RESULTS / "host.jsonl")


def run(args: argparse.Namespace) -> None:
    rows = []
    for part in args.parts:
        systems: dict[str, Callable[[], float]] = {
            "here": partial(_median, part, args.steps, ROOT),
            "again": partial(_median, part, args.steps, ROOT),
        }
        if args.against is not None:
            systems["other"] = partial(_median, part, args.steps, args.against)
        found = in_turns(systems, args.rounds)
        row: Row = provenance(NO_KERNELS) | {"benchmark": "host", "part": part, "steps": args.steps}
        row["rounds"] = args.rounds
        row["us"] = round(statistics.median(found["here"] + found["again"]) * 1e6, 1)
        row["aa_ratio"] = _ratio(found["again"], found["here"])
        if args.against is not None:
            row["other"] = commit_of(args.against)
            row["other_us"] = round(statistics.median(found["other"]) * 1e6, 1)
            row["other_ratio"] = _ratio(found["other"], found["here"])
        rows.append(row)
        shown = f"   other {row['other_us']:8} us, {row['other_ratio']} times" if args.against is not None else ""
        print(f"{part:14} {row['us']:8} us   A/A {row['aa_ratio']}{shown}", flush=True)
    write(args.out, rows)


def _ratio(one: list[float], other: list[float]) -> float:
    return round(statistics.median(a / b for a, b in zip(one, other, strict=True)), 3)


def _median(part: str, steps: int, checkout: Path) -> float:
    """Median seconds of a step; for a whole run the mean, as its steps are of many kinds."""
    folders = (str(checkout / name) for name in ("schemas", "kernels", "engine"))
    command = [sys.executable, "-m", "benchmarks.host", part, str(steps)]
    environment = os.environ | {"PYTHONPATH": ":".join((str(ROOT), *folders))}
    done = subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    seconds = json.loads(done.stdout)
    return statistics.fmean(seconds) if part == "offline" else statistics.median(seconds)


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1], int(sys.argv[2]))))
