"""Where the time of a step goes: kernels of a few steps by what they are for, and what is left between them.

An instant belongs to the kernel that began first of those that run, for with dependent launches the next one comes
up and waits meanwhile. So groups and `between` add up to the time from the first kernel to the end of the last.
What a group cannot beat is known for products (weights read, or multiplied) and attention (keys and values).
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
import random
import re
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import quire_kernels.triton
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.device import Card, Span
from benchmarks.gpu.figures import leave, prompt_operations, until_all_decode
from benchmarks.gpu.workloads import Pairs
from quire_schemas.sizing import kv_bytes_per_token

GROUPS = {
    "attention": "attention",
    "experts": "products",
    "product": "products",
    "quantized": "products",
    "scaled": "products",
    "rounding": "norms, gate, rotary",
    "norm": "norms, gate, rotary",
    "gate": "norms, gate, rotary",
    "heads": "norms, gate, rotary",
    "rotation": "norms, gate, rotary",
    "sample": "draw",
    "tokens": "draw",
    "step": "addresses",
}
"""What the kernels of each file of `quire_kernels.triton` are for."""
OTHER = "others"
"""Copies, fills, what torch does besides."""
BETWEEN = "between"
_PRODUCTS = re.compile(r"gemm|gemv|nvjet|cutlass|cublas|splitk", re.IGNORECASE)
STEPS = 8
"""That are looked at."""


@functools.cache
def kernel_groups() -> Mapping[str, str]:
    """The group of each kernel of the back-end by its name. Two files may have one of a name in the same group."""
    found: dict[str, str] = {}
    for file in pkgutil.iter_modules(quire_kernels.triton.__path__):
        module = importlib.import_module(f"quire_kernels.triton.{file.name}")
        for name, value in vars(module).items():
            # a compiled and an interpreted function of Triton have one ancestor and this
            function = getattr(value, "fn", None)
            if function is not None and getattr(function, "__module__", "") == module.__name__:
                found.setdefault(name, GROUPS.get(file.name, OTHER))
    return found


def group_of(kernel: str) -> str:
    """What a kernel is for, by its name as the device's profiler has it."""
    own = kernel_groups().get(kernel)
    if own is not None:
        return own
    return "products" if _PRODUCTS.search(kernel) else OTHER


def shares(spans: Sequence[Span]) -> tuple[dict[str, float], dict[str, tuple[float, int]]]:
    """Microseconds of each group and of `between`; and of each kernel, with how many there were. `spans` are in
    the order of their starts.
    """
    if not spans:
        raise RuntimeError("nothing ran on the device in the steps that are looked at")
    groups, kernels = defaultdict[str, float](float), dict[str, tuple[float, int]]()
    cursor = spans[0].start
    for span in spans:
        groups[BETWEEN] += max(0.0, span.start - cursor)
        alone = max(0.0, span.end - max(cursor, span.start))
        groups[group_of(span.name)] += alone
        taken, count = kernels.get(span.name, (0.0, 0))
        kernels[span.name] = taken + alone, count + 1
        cursor = max(cursor, span.end)
    return dict(groups), kernels


def profiles(
    bench: Bench, card: Card, batches: Sequence[int], prompts: Sequence[int], offline: tuple[str, Pairs]
) -> Iterator[dict[str, Any]]:
    """Rows of decoding at 1k, of prompts of these lengths, and of the fullest steps of all requests at once."""
    for batch in batches:
        yield _decode(bench, card, batch, 1024)
    for tokens in prompts:
        yield _prefill(bench, card, tokens)
    yield _offline(bench, *offline)


def _decode(bench: Bench, card: Card, batch: int, context: int) -> dict[str, Any]:
    scale = bench.device.scale
    many, steps = scale.at_most(batch, 3), scale.at_most(STEPS, 2)
    until_all_decode(bench, many, context, 2 * steps + 4, random.Random(batch))
    # without the profiler, which makes launches slower
    alone = _wall(lambda: _steps(bench, steps)) / steps
    seen = statistics.mean(request.num_known for request in bench.running)
    spans = bench.device.spans(lambda: _steps(bench, steps))
    leave(bench, many)
    floors = {
        "products": max(bench.read_bytes(many) / card.bandwidth, bench.multiplied * many / card.bf16),
        "attention": many * seen * kv_bytes_per_token(bench.profile, bench.spec.kv_dtype) / card.bandwidth,
    }
    row = _row(bench, "decode", spans, steps, alone, floors)
    return row | {"batch": many, "context": round(seen)} | scale.stands_for(batch=batch, context=context)


def _prefill(bench: Bench, card: Card, tokens: int) -> dict[str, Any]:
    scale = bench.device.scale
    length, rng = scale.at_most(tokens, 40), random.Random(tokens)
    prompts = scale.at_most(max(1, bench.spec.max_num_batched_tokens // length), 1)

    def prepared() -> Callable[[], None]:
        for number in range(prompts):
            bench.add(str(number), length, 1, rng)
        return bench.drain

    prepared()()
    alone = _wall(prepared())
    spans = bench.device.spans(prepared())
    profile = bench.profile
    attention = 2 * profile.num_layers * length * length * profile.q_size * prompts
    products = prompts * prompt_operations(bench, length) - attention
    floors = {"products": bench.operations / 2 * products / card.bf16, "attention": attention / card.bf16}
    row = _row(bench, "prefill", spans, 1, alone, floors)
    return row | {"tokens": length, "prompts": prompts} | scale.stands_for(tokens=tokens)


def _offline(bench: Bench, name: str, whole: Pairs) -> dict[str, Any]:
    """A third of the way through, prompts come in where others end."""
    pairs, rng = bench.device.scale.pairs(whole), random.Random(0)
    for number, (prompt, output) in enumerate(pairs):
        bench.add(str(number), prompt, output, rng)
    wanted, produced = sum(output for _, output in pairs) // 3, 0
    while produced < wanted:
        produced += bench.step()
    steps = bench.device.scale.at_most(2 * STEPS, 1)
    alone = _wall(lambda: _steps(bench, steps)) / steps
    spans = bench.device.spans(lambda: _steps(bench, steps))
    leave(bench, len(pairs))
    row = _row(bench, "offline", spans, steps, alone, {})
    return row | {"name": name, "requests": len(pairs)} | bench.device.scale.stands_for(requests=len(whole))


def _row(
    bench: Bench, workload: str, spans: Sequence[Span], steps: int, alone: float, floors: Mapping[str, float]
) -> dict[str, Any]:
    groups, kernels = shares(spans)
    whole = sum(groups.values())
    told = {
        name: {
            "us": round(taken / steps, 1),
            "share": round(taken / whole, 3),
            **({"roofline_share": round(floors[name] * 1e6 * steps / taken, 3)} if name in floors else {}),
        }
        for name, taken in sorted(groups.items(), key=lambda item: -item[1])
        if taken > 0
    }
    most = sorted(kernels.items(), key=lambda item: -item[1][0])[:10]
    return {
        "part": "profile",
        "workload": workload,
        "model": bench.name,
        "ms": round(alone * 1000, 3),
        "profiled_ms": round(whole / steps / 1000, 3),
        "groups": told,
        "kernels": [
            [name[:80], round(taken / steps, 1), round(count / steps, 1)] for name, (taken, count) in most
        ],
    }


def _steps(bench: Bench, steps: int) -> None:
    for _ in range(steps):
        bench.step()


def _wall(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
