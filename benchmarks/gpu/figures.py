"""What an engine gives: decoding, prompts, all requests at once, memory. Rows with median, least and most."""

from __future__ import annotations

import random
import statistics
import time
from typing import Any

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.device import Card, Readings, spread
from benchmarks.gpu.workloads import Pairs
from quire_schemas.sizing import FOOTPRINT, gpu_activations, kv_block_bytes, kv_bytes_per_token
from quire_schemas.wire import Sampling

REPEATS = 3
SETTLE = 6
"""Steps that all decode before any is measured."""


def until_all_decode(bench: Bench, batch: int, context: int, steps: int, rng: random.Random) -> None:
    """`batch` sequences of which each has `context` tokens after half of `steps` more."""
    scale = bench.device.scale
    before = max(scale.at_most(context - steps // 2 - SETTLE - 2, 20), 1)
    for number in range(batch):
        bench.add(str(number), before, steps + SETTLE + 18 + batch, rng)
    # a prompt more than the budget takes leaves the first ones further: wait until all decode
    while bench.engine.stats().waiting or any(r.num_computed < r.num_prompt for r in bench.running):
        bench.step()
    for _ in range(scale.at_most(SETTLE, 1)):
        bench.step()
    bench.device.synchronize()


def leave(bench: Bench, batch: int) -> None:
    """End what `until_all_decode` began."""
    for number in range(batch):
        bench.engine.abort(str(number))
    bench.drain()


def decode(bench: Bench, card: Card, readings: Readings, batch: int, context: int, steps: int) -> dict[str, Any]:
    """Steady decoding of `batch` sequences around `context` tokens: runs of `steps` steps, one after the other."""
    scale = bench.device.scale
    many, each = scale.at_most(batch, 3), scale.at_most(steps, 2)
    until_all_decode(bench, many, context, each * REPEATS, random.Random(batch))
    began = time.perf_counter()
    taken, shares, hosts, waits, contexts = (list[float]() for _ in range(5))
    bench.spent = dict.fromkeys(bench.spent, 0.0)
    for _ in range(REPEATS):
        seen = statistics.mean(r.num_known for r in bench.running) + each / 2
        bench.waited = 0.0
        start = time.perf_counter()
        for _ in range(each):
            bench.step()
        seconds = (time.perf_counter() - start) / each
        waited = bench.waited / each
        taken.append(seconds)
        contexts.append(seen)
        hosts.append((seconds - waited) * 1e6)
        waits.append(waited * 1e6)
        shares.append(bench.step_floor(card, many, many * seen) / seconds)
    clocks = readings.since(began)
    parts = {name: round(spent / each / REPEATS * 1e6) for name, spent in bench.spent.items()}
    leave(bench, many)
    return {
        "part": "decode",
        "model": bench.name,
        "batch": many,
        "context": round(statistics.mean(contexts)),
        "repeats": REPEATS,
        **spread("ms", [seconds * 1000 for seconds in taken], 3),
        **spread("tokens_per_second", [many / seconds for seconds in taken]),
        **spread("roofline_share", shares, 3),
        **spread("host_us", hosts, 0),
        # a host that has to wait is hidden behind the device
        **spread("host_waits_us", waits, 0),
        "host_parts_us": parts,
        **clocks,
        **scale.stands_for(batch=batch, context=context),
    }


def prefill(bench: Bench, card: Card, readings: Readings, tokens: int, prompts: int = 8) -> dict[str, Any]:
    """`prompts` prompts of `tokens` tokens, as many in a step as its budget takes."""
    scale = bench.device.scale
    length, many = scale.at_most(tokens, 40), scale.at_most(prompts, 2)
    rng, found = random.Random(tokens), list[float]()
    began = time.perf_counter()
    for repeat in range(1 + REPEATS):
        for number in range(many):
            bench.add(str(number), length, 1, rng)
        bench.device.synchronize()
        start = time.perf_counter()
        bench.drain()
        if repeat:  # the first compiles what was not compiled yet
            found.append(time.perf_counter() - start)
    rate = many * prompt_operations(bench, length)
    return {
        "part": "prefill",
        "model": bench.name,
        "tokens": length,
        "prompts": many,
        "budget": bench.spec.max_num_batched_tokens,
        "repeats": REPEATS,
        **spread("ms_each", [seconds / many * 1000 for seconds in found], 2),
        **spread("tokens_per_second", [many * length / seconds for seconds in found], 0),
        **spread("tflops", [rate / seconds / 1e12 for seconds in found]),
        **spread("roofline_share", [rate / seconds / card.bf16 * bench.operations / 2 for seconds in found], 3),
        **readings.since(began),
        **scale.stands_for(tokens=tokens, prompts=prompts),
    }


def prompt_operations(bench: Bench, tokens: int) -> float:
    """Of a prompt, but for its last token's head."""
    profile = bench.profile
    body = bench.read_bytes(1) / bench.number_bytes - profile.vocab_size * profile.hidden_size
    return 2 * body * tokens + 4 * profile.num_layers * tokens * tokens / 2 * profile.q_size


def offline(bench: Bench, card: Card, readings: Readings, name: str, whole: Pairs) -> dict[str, Any]:
    """All requests at once, to the end."""
    pairs = bench.device.scale.pairs(whole)
    began = time.perf_counter()
    passes = [_Pass(bench, pairs) for _ in range(REPEATS)]
    outputs = sum(output for _, output in pairs)
    floor = _offline_floor(bench, card, pairs)
    middle = sorted(passes, key=lambda one: one.seconds)[REPEATS // 2]
    return {
        "part": "offline",
        "workload": name,
        "model": bench.name,
        "requests": len(pairs),
        "prompt_tokens": sum(prompt for prompt, _ in pairs),
        "output_tokens": outputs,
        "repeats": REPEATS,
        **spread("seconds", [one.seconds for one in passes], 3),
        **spread("output_per_second", [outputs / one.seconds for one in passes]),
        **spread("roofline_share", [floor / one.seconds for one in passes], 3),
        "steps": middle.steps,
        **spread("host_us", [(one.seconds - one.waited) / one.steps * 1e6 for one in passes], 0),
        # as long as there was somebody to take the place of whoever ended
        "full_output_per_second": middle.full,
        "longest_steps_ms": [round(one * 1000) for one in middle.longest],
        **readings.since(began),
        **bench.device.scale.stands_for(requests=len(whole)),
    }


class _Pass:
    """All of `pairs` to the end, once, and how it went."""

    def __init__(self, bench: Bench, pairs: Pairs) -> None:
        rng = random.Random(0)
        for number, (prompt, output) in enumerate(pairs):
            bench.add(str(number), prompt, output, rng)
        steps, produced, bench.waited = bench.engine.steps, 0, 0.0
        each, full = list[float](), None
        bench.device.synchronize()
        start = then = time.perf_counter()
        while bench.engine.has_work:
            produced += bench.step()
            then, before = time.perf_counter(), then
            each.append(then - before)
            if full is None and not bench.is_waiting:
                full = produced, then - start
        if produced != sum(output for _, output in pairs):
            raise RuntimeError(f"{produced} tokens, which is another number than was asked for")
        self.seconds, self.waited, self.steps = then - start, bench.waited, bench.engine.steps - steps
        self.longest = sorted(each, reverse=True)[:12]
        self.full = round(full[0] / full[1], 1) if full is not None and full[0] > 10_000 else None


def seconds_of(bench: Bench, pairs: Pairs) -> float:
    """Of all of them at once."""
    return _Pass(bench, pairs).seconds


def _offline_floor(bench: Bench, card: Card, pairs: Pairs) -> float:
    """The additive roofline: all products at the peak or their weights read once a step of full batches, and every
    token's keys and values read once for each token behind it."""
    outputs = sum(output for _, output in pairs)
    prompts = sum(prompt for prompt, _ in pairs)
    seen = sum(prompt * output + output * output / 2 for prompt, output in pairs)
    per_step = min(bench.spec.max_num_seqs, len(pairs))
    read = bench.read_bytes(per_step)
    weights = max(bench.multiplied * outputs / card.bf16, outputs / per_step * read / card.bandwidth)
    profile = bench.profile
    body = bench.multiplied - bench.operations * profile.vocab_size * profile.hidden_size
    kv = seen * kv_bytes_per_token(profile, bench.spec.kv_dtype) / card.bandwidth
    return weights + body * prompts / card.bf16 + kv


# ── memory ────────────────────────────────────────────────────────────────────────────────────────────────


def memory(bench: Bench, used_before: int | None) -> dict[str, Any]:
    """What the plan says and what there is, after the widest steps of either way. `used_before`: bytes of the
    device that were taken before this process touched it.
    """
    spec, profile = bench.spec, bench.profile
    _widest(bench)
    parts = gpu_activations(
        profile,
        bench.device.dtype,
        spec.max_num_batched_tokens,
        spec.max_num_seqs,
        spec.max_model_len,
        block_size=spec.block_size,
        quantization=bench.quantization,
    )
    kv = spec.num_blocks * kv_block_bytes(profile, spec.kv_dtype, spec.block_size)
    weights, reserve = bench.model.bytes, FOOTPRINT["cuda"].overhead
    planned, found = weights + kv + sum(parts.values()), bench.device.memory()
    taken = None if found.used is None or used_before is None else found.used - used_before
    row: dict[str, Any] = {
        "part": "memory",
        "model": bench.name,
        "weights_mib": weights >> 20,
        "kv_mib": kv >> 20,
        "planned_activations_mib": sum(parts.values()) >> 20,
        "planned_parts_mib": {name: size >> 20 for name, size in parts.items()},
        "planned_overhead_mib": reserve >> 20,
        "planned_mib": planned >> 20,
        "peak_activations_mib": (found.peak - weights - kv) >> 20,
        "peak_mib": found.peak >> 20,
        "reserved_mib": found.reserved >> 20,
        # what torch gave out, beside the plan without its reserve
        "peak_off_percent": round(100 * (found.peak - planned) / planned, 2),
    }
    if taken is not None:
        # what the device lost, beside the plan with its reserve
        row["device_used_mib"] = taken >> 20
        row["off_percent"] = round(100 * (taken - planned - reserve) / (planned + reserve), 2)
    return row


def _widest(bench: Bench) -> None:
    """Steps as wide as they come: prompts as far as the budget goes, with all seats taken, drawn on the device,
    and then by way of the host.
    """
    spec, rng = bench.spec, random.Random(1)
    each = max(1, min(spec.max_num_batched_tokens // spec.max_num_seqs, spec.max_model_len - 4))
    ways = (
        Sampling(max_tokens=3, temperature=0.8, top_p=0.9, ignore_eos=True),
        Sampling(max_tokens=3, temperature=0.8, top_p=0.9, top_k=50, frequency_penalty=0.5, ignore_eos=True),
    )
    for sampling in ways:
        for number in range(spec.max_num_seqs):
            bench.ask(str(number), each, sampling, rng)
        bench.drain()
