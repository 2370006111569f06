"""Quire on one GPU: figures beside the roofline of the same card, measured in the same run.

    python -m benchmarks.gpu --parts exactness,attention,experts,tune,0.6b,8b --out rows.jsonl

Needs torch, triton and what engine, kernels and schemas import; no network and no weights, which are random and
made on the device. `roofline` is what a step cannot beat: bytes that it has to read over the bandwidth of a large
copy, and operations over the rate of a large bf16 product, both measured here.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import triton
from torch import Tensor

from benchmarks.gpu_experts import experts_rows
from benchmarks.gpu_products import product_rows
from benchmarks.gpu_weights import RandomWeights
from benchmarks.workload import Lengths
from quire_engine.driver import spare_the_collector
from quire_engine.engine import DTYPES, KV_DTYPES, Engine
from quire_engine.models import DecoderModel, KVCache, load_model
from quire_engine.quantization import linear_method
from quire_engine.resident import runner as resident
from quire_engine.resident.runner import Begun, ResidentRunner
from quire_engine.step import StepResult
from quire_kernels import load as load_kernels
from quire_kernels.paging import PagedBatch
from quire_kernels.triton import attention
from quire_schemas.checkpoint import profile_from_config, read_profile
from quire_schemas.quantization import quantized_bytes
from quire_schemas.sizing import FOOTPRINT, gpu_activations, kv_block_bytes, kv_bytes_per_token
from quire_schemas.wire import EngineSpec, Generate, KvDtype, Quantization, Sampling

CUDA = torch.device("cuda")
Dtype = Literal["float32", "bfloat16", "float16"]
SHAPES: dict[str, dict[str, Any]] = {
    "llama-3.1-8b": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 14336,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "rope_scaling": {
            "factor": 8.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "tie_word_embeddings": False,
        "hidden_act": "silu",
        "torch_dtype": "bfloat16",
        "bos_token_id": 128000,
        "eos_token_id": 128001,
    },
    "qwen3-0.6b": {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_size": 1024,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": 3072,
        "vocab_size": 151936,
        "max_position_embeddings": 40960,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": True,
        "hidden_act": "silu",
        "torch_dtype": "bfloat16",
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "use_sliding_window": False,
        "attention_bias": False,
    },
    "qwen3-30b-a3b": {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "hidden_size": 2048,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "vocab_size": 151936,
        "max_position_embeddings": 40960,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": False,
        "hidden_act": "silu",
        "torch_dtype": "bfloat16",
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "use_sliding_window": False,
        "attention_bias": False,
    },
}


EIGHT_B = {
    "8b-int8": Quantization("int8"),
    "8b-int8-fp8-kv": Quantization("int8"),
    "8b-int4": Quantization("int4", "bf16", 128),
    "8b-fp8": Quantization("fp8", "fp8"),
}
"""Parts that measure an 8B with weights in fewer bits."""


# ── the card ──────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Card:
    """What the GPU gives, measured: bytes a second of a copy (read and written), operations a second in bf16."""

    bandwidth: float
    bf16: float


def timed(work: Callable[[], object], repeats: int = 20) -> float:
    """Median seconds of one call, between events."""
    work()
    torch.cuda.synchronize()
    found: list[float] = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        work()
        end.record()
        torch.cuda.synchronize()
        found.append(start.elapsed_time(end) / 1000)
    return statistics.median(found)


def replayed(work: Callable[[], object], count: int = 20) -> float:
    """Seconds of one call, launched from a graph that holds `count` of them."""
    work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(count):
            work()
    return timed(graph.replay, 5) / count


def measure_card() -> Card:
    source = torch.empty(1 << 31, dtype=torch.uint8, device=CUDA)
    target = torch.empty_like(source)
    copied = timed(partial(target.copy_, source), 10)
    del source, target
    a = torch.randn(8192, 8192, device=CUDA, dtype=torch.bfloat16)
    b = torch.randn(8192, 8192, device=CUDA, dtype=torch.bfloat16)
    multiplied = timed(lambda: a @ b, 10)
    return Card(2 * (1 << 31) / copied, 2 * 8192**3 / multiplied)


def facts(commit: str) -> dict[str, Any]:
    return {
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit,
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": sys.version.split()[0],
    }


# ── engines ───────────────────────────────────────────────────────────────────────────────────────────────


def _spec(
    folder: Path, dtype: Dtype, *, seqs: int, tokens: int, length: int, blocks: int, kv: KvDtype | None = None
) -> EngineSpec:
    return EngineSpec(
        model=folder.name,
        replica_id="benchmark",
        incarnation=1,
        socket="",
        model_dir=str(folder),
        dtype=dtype,
        kv_dtype=kv or dtype,
        device="cuda",
        threads=4,
        max_model_len=length,
        block_size=16,
        num_blocks=blocks,
        max_num_seqs=seqs,
        max_num_batched_tokens=tokens,
        chunked_prefill=True,
        prefix_caching=False,
        async_scheduling=True,
        seed=0,
        memory_limit=1 << 40,
        hot_hash="",
    )


class Bench:
    """One engine on the device, and the seconds that its host waited for tokens."""

    def __init__(
        self,
        name: str,
        *,
        seqs: int,
        tokens: int,
        length: int,
        kv_bytes: int,
        kv: KvDtype = "bfloat16",
        quantization: Quantization | None = None,
    ) -> None:
        profile = profile_from_config(SHAPES[name])
        folder = Path(tempfile.mkdtemp())
        (folder / "config.json").write_text(json.dumps(SHAPES[name]))
        blocks = kv_bytes // kv_block_bytes(profile, kv, 16)
        self.profile = profile
        method = "" if quantization is None else f", {quantization.method} weights"
        self.name = name + method + ("" if kv == "bfloat16" else f", {kv} KV")
        spec = _spec(folder, "bfloat16", seqs=seqs, tokens=tokens, length=length, blocks=blocks, kv=kv)
        torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        kernels = load_kernels("triton")
        weights: Any = RandomWeights(profile, CUDA)
        method_of = linear_method(weights, kernels, quantization)
        model = DecoderModel.build(profile, weights, device=CUDA, kernels=kernels, method=method_of)
        cache = KVCache.allocate(profile, blocks, 16, KV_DTYPES[kv], CUDA)
        self.model, self.spec = model, spec
        width = profile.hidden_size
        self.number_bytes = 2 if quantization is None else quantized_bytes(quantization, 1, width) / width
        # for each number, of a bf16 product; of 8-bit numbers a card does twice as many
        rounded = quantization is not None and quantization.activations in ("int8", "fp8")
        self.operations = 1 if rounded else 2
        self.engine = Engine.assemble(spec, profile, model, cache)
        if not isinstance(self.engine.runner, ResidentRunner):
            raise TypeError("the engine did not choose the resident runner")
        self.runner = self.engine.runner
        self.waited = 0.0
        finish = self.runner.finish

        def watched(begun: Begun) -> StepResult:
            start = time.perf_counter()
            if begun.done is not None:
                begun.done.synchronize()
            self.waited += time.perf_counter() - start
            return finish(begun)

        self.runner.finish = watched  # type: ignore[method-assign]
        self.spent: dict[str, float] = {}
        """Seconds in parts of the host's work: to decide, to begin, therein to fill and replay, to take over."""
        for owner, part in (
            (self.engine._scheduler, "schedule"), (self.runner, "begin"), (self.runner.program, "decode"),
            (self.engine._scheduler, "commit"),
        ):  # fmt: skip
            self._clock(owner, part)
        self.engine.warm_up()
        spare_the_collector()  # as an engine process does
        self.load_seconds = time.perf_counter() - began

    def _clock(self, owner: Any, name: str) -> None:
        work, self.spent[name] = getattr(owner, name), 0.0

        def clocked(*given: Any) -> Any:
            start = time.perf_counter()
            result = work(*given)
            self.spent[name] += time.perf_counter() - start
            return result

        setattr(owner, name, clocked)

    def read_bytes(self, tokens: int) -> float:
        """Weights that a decode step of `tokens` tokens reads: all but an embedding that is not the head, and of
        experts those that are chosen, if choices are even. Of one token, the numbers that it is multiplied with.
        """
        profile, experts = self.profile, self.profile.experts
        unread = 0.0 if profile.tie_word_embeddings else profile.vocab_size * profile.hidden_size
        if experts is not None:
            spared = experts.num_experts * (1 - experts.num_experts_per_tok / experts.num_experts) ** tokens
            unread += spared * sum(experts.layers) * 3 * profile.hidden_size * experts.intermediate_size
        return self.number_bytes * (profile.num_parameters - unread)

    @property
    def multiplied(self) -> float:
        """Operations of a bf16 product that take as long as those of one token's."""
        return self.operations * self.read_bytes(1) / self.number_bytes

    def step_floor(self, card: Card, tokens: int, contexts: float) -> float:
        """Seconds that a step of `tokens` tokens, which see `contexts` cached ones in all, cannot beat."""
        kv = contexts * kv_bytes_per_token(self.profile, self.spec.kv_dtype)
        read = self.read_bytes(tokens)
        return max(read / card.bandwidth, self.multiplied * tokens / card.bf16) + kv / card.bandwidth

    def add(self, name: str, prompt: int, output: int, rng: random.Random) -> None:
        ids = [rng.randrange(32, 100_000) for _ in range(prompt)]
        self.engine.add(Generate(name, ids, Sampling(max_tokens=output, temperature=0.0, ignore_eos=True)))

    def drain(self) -> None:
        while self.engine.has_work:
            self._step()

    def _step(self) -> int:
        deltas = self.engine.step()
        for delta in deltas:
            if delta.finish_reason not in (None, "length"):
                raise RuntimeError(f"request {delta.id} ended with {delta.finish_reason}: {delta.error}")
        return sum(len(delta.token_ids) for delta in deltas)

    def close(self) -> None:
        """Give everything back."""
        del self.engine, self.runner, self.model
        gc.unfreeze()
        gc.collect()
        torch.cuda.empty_cache()


def decode(bench: Bench, card: Card, batch: int, context: int, steps: int) -> dict[str, Any]:
    """Steady decoding of `batch` sequences around `context` tokens."""
    rng = random.Random(batch)
    before = context - steps // 2 - 8
    for number in range(batch):
        bench.add(str(number), before, steps + 24 + batch, rng)
    # a prompt more than the budget takes leaves the first ones further: wait until all decode
    while bench.engine.stats().waiting or any(r.num_computed < r.num_prompt for r in _running(bench.engine)):
        bench._step()
    for _ in range(6):
        bench._step()
    torch.cuda.synchronize()
    seen = statistics.mean(r.num_known for r in _running(bench.engine)) + steps / 2
    bench.waited = 0.0
    bench.spent = dict.fromkeys(bench.spent, 0.0)
    start = time.perf_counter()
    for _ in range(steps):
        bench._step()
    seconds = (time.perf_counter() - start) / steps
    host = seconds - bench.waited / steps
    parts = {name: round(spent / steps * 1e6) for name, spent in bench.spent.items()}
    for number in range(batch):
        bench.engine.abort(str(number))
    bench.drain()
    floor = bench.step_floor(card, batch, batch * seen)
    return {
        "part": "decode",
        "model": bench.name,
        "batch": batch,
        "context": round(seen),
        "ms": round(seconds * 1000, 3),
        "tokens_per_second": round(batch / seconds, 1),
        "roofline_share": round(floor / seconds, 3),
        "host_us": round(host * 1e6),
        "host_parts_us": parts,
    }


def prefill(bench: Bench, card: Card, tokens: int, prompts: int = 8) -> dict[str, Any]:
    """`prompts` prompts of `tokens` tokens, as many in a step as its budget takes."""
    rng, found = random.Random(tokens), []
    for _ in range(3):
        for number in range(prompts):
            bench.add(str(number), tokens, 1, rng)
        torch.cuda.synchronize()
        start = time.perf_counter()
        bench.drain()
        found.append(time.perf_counter() - start)
    seconds = statistics.median(found)
    profile = bench.profile
    body = bench.read_bytes(1) / bench.number_bytes - profile.vocab_size * profile.hidden_size
    attention = 4 * profile.num_layers * tokens * tokens / 2 * profile.q_size
    rate = prompts * (2 * body * tokens + attention) / seconds
    return {
        "part": "prefill",
        "model": bench.name,
        "tokens": tokens,
        "prompts": prompts,
        "budget": bench.spec.max_num_batched_tokens,
        "ms_each": round(seconds / prompts * 1000, 2),
        "tokens_per_second": round(prompts * tokens / seconds),
        "tflops": round(rate / 1e12, 1),
        "roofline_share": round(rate / card.bf16 * bench.operations / 2, 3),
    }


def memory(bench: Bench) -> dict[str, Any]:
    """What the plan says, and what torch holds at its peak."""
    spec, profile = bench.spec, bench.profile
    parts = gpu_activations(
        profile,
        "bfloat16",
        spec.max_num_batched_tokens,
        spec.max_num_seqs,
        spec.max_model_len,
        block_size=spec.block_size,
    )
    kv = spec.num_blocks * kv_block_bytes(profile, spec.kv_dtype, spec.block_size)
    weights = bench.model.bytes
    free, total = torch.cuda.mem_get_info()
    return {
        "part": "memory",
        "model": bench.name,
        "weights_mib": weights >> 20,
        "kv_mib": kv >> 20,
        "planned_activations_mib": sum(parts.values()) >> 20,
        "planned_parts_mib": {name: size >> 20 for name, size in parts.items()},
        "planned_overhead_mib": FOOTPRINT["cuda"].overhead >> 20,
        "peak_activations_mib": (torch.cuda.max_memory_allocated() - weights - kv) >> 20,
        "reserved_mib": torch.cuda.max_memory_reserved() >> 20,
        "device_used_mib": (total - free) >> 20,
    }


def offline(bench: Bench, card: Card, name: str, lengths: Sequence[tuple[int, int]]) -> dict[str, Any]:
    """All requests at once, to the end."""
    rng = random.Random(0)
    for number, (prompt, output) in enumerate(lengths):
        bench.add(str(number), prompt, output, rng)
    steps, produced, bench.waited = bench.engine.steps, 0, 0.0
    longest: list[float] = []
    full = None
    torch.cuda.synchronize()
    start = then = time.perf_counter()
    while bench.engine.has_work:
        produced += bench._step()
        then, before = time.perf_counter(), then
        longest.append(then - before)
        if full is None and not bench.engine._scheduler.waiting:
            full = produced, then - start
    seconds = then - start
    if produced != sum(output for _, output in lengths):
        raise RuntimeError("another number of tokens than asked for")
    steps = bench.engine.steps - steps
    floor = _offline_floor(bench, card, lengths)
    return {
        "part": "offline",
        "workload": name,
        "model": bench.name,
        "requests": len(lengths),
        "prompt_tokens": sum(prompt for prompt, _ in lengths),
        "output_tokens": produced,
        "seconds": round(seconds, 3),
        "output_per_second": round(produced / seconds, 1),
        "steps": steps,
        "host_us": round((seconds - bench.waited) / steps * 1e6),
        # as long as there was somebody to take the place of whoever ended
        "full_output_per_second": round(full[0] / full[1], 1) if full is not None and full[0] > 10_000 else None,
        "longest_steps_ms": [round(one * 1000) for one in sorted(longest, reverse=True)[:12]],
        "roofline_share": round(floor / seconds, 3),
    }


def _offline_floor(bench: Bench, card: Card, lengths: Sequence[tuple[int, int]]) -> float:
    """The additive roofline: all products at the peak or their weights read once a step of full batches, and every
    token's keys and values read once for each token behind it."""
    outputs = sum(output for _, output in lengths)
    prompts = sum(prompt for prompt, _ in lengths)
    seen = sum(prompt * output + output * output / 2 for prompt, output in lengths)
    per_step = min(bench.spec.max_num_seqs, len(lengths))
    read = bench.read_bytes(per_step)
    weights = max(bench.multiplied * outputs / card.bf16, outputs / per_step * read / card.bandwidth)
    profile = bench.profile
    body = bench.multiplied - bench.operations * profile.vocab_size * profile.hidden_size
    kv = seen * kv_bytes_per_token(profile, bench.spec.kv_dtype) / card.bandwidth
    return weights + body * prompts / card.bf16 + kv


def _running(engine: Engine) -> list[Any]:
    return engine._scheduler.running


def nano_lengths() -> list[tuple[int, int]]:
    """256 requests, prompts and outputs uniform in 100 … 1024, as published with seed 0."""
    rng = random.Random(0)
    # the ids are drawn between the lengths there, so they are here: 142,827 tokens in, 133,966 out
    prompts = [len([rng.randint(0, 10000) for _ in range(rng.randint(100, 1024))]) for _ in range(256)]
    return [(length, rng.randint(100, 1024)) for length in prompts]


def sharegpt_lengths(count: int) -> list[tuple[int, int]]:
    """Lognormal around the means of filtered ShareGPT (216 in, 196 out), clipped as its filters do."""
    rng, found = random.Random(0), list[tuple[int, int]]()
    prompts, outputs = (Lengths(mean=mean, low=4, high=1024) for mean in (216, 196))
    while len(found) < count:
        found.append((prompts.draw(rng), outputs.draw(rng)))
    return found


# ── the built-in model ────────────────────────────────────────────────────────────────────────────────────


def exactness(folder: Path) -> Iterator[dict[str, Any]]:
    """Greedy tokens of a small real model, ours and those of transformers, both on the device."""
    from transformers import AutoModelForCausalLM

    rng = random.Random(5)
    prompts = [[rng.randrange(32, 1800) for _ in range(rng.randint(4, 90))] for _ in range(24)]
    dtypes: tuple[Dtype, ...] = ("float32", "bfloat16")
    for dtype in dtypes:
        number = DTYPES[dtype]
        theirs: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=number).to(CUDA).eval()
        profile = read_profile(folder)
        spec = _spec(folder, dtype, seqs=16, tokens=256, length=512, blocks=600)
        kernels = load_kernels("triton")
        model = load_model(
            folder, profile, dtype=number, device=CUDA, kernels=kernels, on_progress=lambda *_: None
        )
        engine = Engine.assemble(spec, profile, model, KVCache.allocate(profile, 600, 16, number, CUDA))
        engine.warm_up()
        for name, prompt in enumerate(prompts):
            sampling = Sampling(max_tokens=64, temperature=0.0, ignore_eos=True)
            engine.add(Generate(str(name), list(prompt), sampling))
        ours: dict[str, list[int]] = {str(name): [] for name in range(len(prompts))}
        while engine.has_work:
            for delta in engine.step():
                ours[delta.id] += delta.token_ids
        equal = same = 0
        for name, prompt in enumerate(prompts):
            with torch.inference_mode():
                ids = torch.tensor([prompt], device=CUDA)
                found = theirs.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=64,
                    min_new_tokens=64,
                    do_sample=False,
                    eos_token_id=None,
                    pad_token_id=0,
                )[0, len(prompt) :].tolist()
            equal += found == ours[str(name)]
            same += sum(1 for a, b in zip(found, ours[str(name)], strict=True) if a == b)
        yield {
            "part": "exactness",
            "dtype": dtype,
            "answers": len(prompts),
            "equal": equal,
            "tokens_in_place": round(same / (64 * len(prompts)), 4),
        }


# ── tilings ───────────────────────────────────────────────────────────────────────────────────────────────


def tuning_rows(card: Card, *, quick: bool) -> Iterator[dict[str, Any]]:
    """What an engine's start finds of each family of kernels, in a folder of its own; then decoding with what was
    found beside decoding with the defaults.
    """
    formats: list[tuple[KvDtype, Quantization | None]] = [("bfloat16", None), ("int8", Quantization("int8"))]
    home, limit = os.environ.get("XDG_CACHE_HOME"), resident.TUNING_SECONDS
    for kv, quantization in formats[:1] if quick else formats:
        # defaults last: where both are equal, what a card gives after a while is what counts
        for way, seconds in (("chosen", 240.0), ("default", 0.0)):
            with tempfile.TemporaryDirectory() as folder:
                try:
                    os.environ["XDG_CACHE_HOME"], resident.TUNING_SECONDS = folder, seconds
                    bench = Bench(
                        "llama-3.1-8b", seqs=256, tokens=2048, length=4096, kv_bytes=20 << 30, kv=kv,
                        quantization=quantization,
                    )  # fmt: skip
                finally:
                    os.environ.pop("XDG_CACHE_HOME")
                    os.environ.update({} if home is None else {"XDG_CACHE_HOME": home})
                    resident.TUNING_SECONDS = limit
            yield from _found(bench) if way == "chosen" else ()
            for batch in (1, 32, 256):
                yield decode(bench, card, batch, 1024, 32) | {"part": "tuned decode", "tilings": way}
            yield prefill(bench, card, 2048) | {"part": "tuned prefill", "tilings": way}
            bench.close()


def _loaded(bench: Bench) -> str:
    return f"loaded in {bench.load_seconds:.1f} s, captured {bench.runner.program.captured}; {bench.runner.tuned}"


def _found(bench: Bench) -> Iterator[dict[str, Any]]:
    report = bench.runner.tuned
    for name, default, taken, before, after in report.measured:
        yield {
            "part": "tune",
            "model": bench.name,
            "family": name,
            "default": list(default),
            "chosen": list(taken),
            "default_us": round(before * 1e6, 2),
            "us": round(after * 1e6, 2),
            "saved": round(1 - after / before, 3),
        }
    yield {
        "part": "tuning",
        "model": bench.name,
        "families": report.families,
        "measured": len(report.measured),
        "changed": sum(default != taken for _, default, taken, *_ in report.measured),
        "left": len(report.left),
        "skipped": report.skipped,
        "seconds": round(report.seconds, 1),
    }


# ── attention alone ───────────────────────────────────────────────────────────────────────────────────────


def attention_rows(card: Card, *, sweep: bool) -> Iterator[dict[str, Any]]:
    """Paged decode attention: bytes of keys and values over time, beside a copy."""
    bf16, int8, fp8 = torch.bfloat16, torch.int8, torch.float8_e4m3fn
    shapes = [(8, 4, 128, 1, 8192, bf16), (8, 4, 128, 32, 1024, bf16), (8, 4, 128, 128, 1024, bf16)]
    shapes += [(8, 4, 128, 256, 1024, bf16), (8, 2, 128, 256, 1024, bf16), (8, 4, 128, 8, 8192, bf16)]
    shapes += [(8, 4, 128, 1, 32768, bf16), (2, 7, 64, 256, 1024, bf16)]
    for kept in (int8, fp8):
        shapes += [(8, 4, 128, 1, 8192, kept), (8, 4, 128, 32, 1024, kept), (8, 2, 128, 256, 1024, kept)]
        shapes += [(8, 4, 128, 256, 1024, kept)]
    kernels = load_kernels("triton")
    own = attention.decode_tuning
    tunings: list[dict[str, int]] = [{}]
    if sweep:
        tunings += [
            {"BLOCK_N": n, "num_warps": w, "num_stages": s} for n in (64, 128) for w in (2, 4) for s in (2, 3, 4)
        ]
    for kv_heads, group, dim, batch, context, kept in shapes:
        step, cache, query = _attention_case(kv_heads, group, dim, [1] * batch, context - 1, kept)
        moved = 2 * batch * context * kv_heads * cache.shape[-1] * cache.element_size()
        for tuning in tunings:
            attention.decode_tuning = partial(_given, tuning) if tuning else own
            seconds = replayed(partial(kernels.paged_attention(step, window=None), query, cache, dim**-0.5), 10)
            attention.decode_tuning = own
            yield {
                "part": "attention",
                "kv_heads": kv_heads,
                "group": group,
                "dim": dim,
                "kept": str(kept).removeprefix("torch."),
                "batch": batch,
                "context": context,
                "us": round(seconds * 1e6, 1),
                "bandwidth_share": round(moved / seconds / card.bandwidth, 3),
                **tuning,
            }


def prompt_rows(card: Card, *, sweep: bool) -> Iterator[dict[str, Any]]:
    """Paged attention of prompts: operations over time, beside a large product. The last case is a step of 512
    sequences that decode and three prompts, whose time is in microseconds alone.
    """
    kernels = load_kernels("triton")
    own = attention.prefill_tuning
    tunings: list[dict[str, int]] = [{}]
    if sweep:
        tunings += [
            {"BLOCK_M": m, "BLOCK_N": n, "num_warps": w, "num_stages": s, "PROGRAMS": p}
            for m, n, w, s, p in (
                (256, 64, 8, 2, 1), (256, 64, 8, 4, 1), (256, 128, 8, 2, 1), (256, 128, 8, 3, 1),
                (128, 64, 8, 3, 1), (128, 64, 4, 3, 2), (128, 64, 4, 2, 2), (128, 128, 8, 3, 1),
                (128, 128, 8, 2, 1),
            )
        ]  # fmt: skip
    for counts, cached in ([2048], 0), ([8192], 0), ([2048] * 4, 0), ([512], 7680), ([1] * 512 + [216] * 3, 300):
        step, cache, query = _attention_case(8, 4, 128, counts, cached)
        pairs = sum(count * cached + count * (count + 1) / 2 for count in counts)
        for tuning in tunings:
            attention.prefill_tuning = partial(_given, tuning) if tuning else own
            try:
                seconds = replayed(partial(kernels.paged_attention(step, window=None), query, cache, 128**-0.5), 4)
            except triton.runtime.errors.OutOfResources:
                continue
            finally:
                attention.prefill_tuning = own
            rate = 4 * pairs * query.shape[1] * query.shape[2] / seconds
            yield {
                "part": "prompts",
                "counts": counts if len(counts) < 9 else f"{counts.count(1)} and {[n for n in counts if n > 1]}",
                "cached": cached,
                "us": round(seconds * 1e6, 1),
                "tflops": round(rate / 1e12, 1),
                "roofline_share": round(rate / card.bf16, 3),
                **tuning,
            }


def _given(tuning: dict[str, int], *_: object) -> dict[str, int]:
    return tuning


def _attention_case(
    kv_heads: int, group: int, dim: int, counts: Sequence[int], cached: int, kept: torch.dtype = torch.bfloat16
) -> tuple[Any, Tensor, Tensor]:
    """A step of sequences with `counts` new tokens behind `cached` ones, in shuffled blocks that are `kept` so."""
    held = [-(-(cached + count) // 16) for count in counts]
    order = torch.randperm(sum(held)).tolist()
    step = PagedBatch.build(
        starts=[cached] * len(counts),
        query_lens=counts,
        block_tables=[[order.pop() for _ in range(count)] for count in held],
        logits=[1] * len(counts),
        block_size=16,
        device=CUDA,
    )
    if kept.itemsize == 1:
        # whatever the codes: any byte is a number in either format as the kernels read them
        codes = torch.randint(-127, 128, (2, sum(held), 16, kv_heads, dim + 4), device=CUDA, dtype=torch.int8)
        cache = codes.view(kept)
        # scales lie behind the codes of a block
        cache.view(2, sum(held), -1)[..., 16 * kv_heads * dim :].view(torch.float32).fill_(0.01)
    else:
        cache = torch.randn(2, sum(held), 16, kv_heads, dim, device=CUDA, dtype=kept)
    query = torch.randn(sum(counts), kv_heads * group, dim, device=CUDA, dtype=torch.bfloat16)
    return step, cache, query


# ── transformers ──────────────────────────────────────────────────────────────────────────────────────────


def transformers_rows(
    name: str, lengths: Sequence[tuple[int, int]], sizes: Sequence[int]
) -> Iterator[dict[str, Any]]:
    """Static batches, sorted by output, every row run to the longest of its batch; then continuous batching."""
    import transformers
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**SHAPES[name])
    with torch.device(CUDA):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    order = sorted(lengths, key=lambda pair: pair[1])
    useful = sum(output for _, output in lengths)

    def row(way: str, seconds: float, produced: int, **more: Any) -> dict[str, Any]:
        return {
            "part": "transformers",
            "way": way,
            "model": name,
            "requests": len(lengths),
            "seconds": round(seconds, 2),
            "output_per_second": round(produced / seconds, 1),
            "transformers": transformers.__version__,
            **more,
        }

    for size in sizes:
        torch.cuda.synchronize()
        start = time.perf_counter()
        for at in range(0, len(order), size):
            batch = order[at : at + size]
            width, longest = max(p for p, _ in batch), max(o for _, o in batch)
            ids = torch.randint(32, 100_000, (len(batch), width), device=CUDA)
            mask = torch.ones_like(ids)
            for number, (prompt, _) in enumerate(batch):
                mask[number, : width - prompt] = 0
            with torch.inference_mode():
                model.generate(
                    ids,
                    attention_mask=mask,
                    max_new_tokens=longest,
                    min_new_tokens=longest,
                    do_sample=False,
                    eos_token_id=None,
                    pad_token_id=0,
                )
        torch.cuda.synchronize()
        yield row("static", time.perf_counter() - start, useful, batch=size)
    for more in CONTINUOUS:
        yield _continuous(model, lengths, row, more)


CONTINUOUS: tuple[dict[str, Any], ...] = (
    {"max_batch_tokens": 8192, "use_cuda_graph": True, "use_async_batching": True},
    {"max_batch_tokens": 8192},
)
"""Configurations of continuous batching; what is not said is left to transformers."""
_PATIENCE = 100.0
"""Seconds that one of them gets."""


def _continuous(
    model: Any, lengths: Sequence[tuple[int, int]], row: Callable[..., dict[str, Any]], more: dict[str, Any]
) -> dict[str, Any]:
    """All requests at once through `generate_batch`'s manager; tokens of unfinished ones do not count."""
    from transformers import GenerationConfig
    from transformers.generation import ContinuousBatchingConfig

    rng = random.Random(0)
    asked = GenerationConfig(do_sample=False, max_new_tokens=max(output for _, output in lengths))
    with model.continuous_batching_context_manager(
        generation_config=asked, continuous_batching_config=ContinuousBatchingConfig(**more)
    ) as manager:
        start = time.perf_counter()
        wanted = {
            manager.add_request(
                [rng.randrange(32, 100_000) for _ in range(prompt)], max_new_tokens=output, eos_token_id=-1
            )
            for prompt, output in lengths
        }
        done = 0
        while wanted and (left := start + _PATIENCE - time.perf_counter()) > 0:
            result = manager.get_result(timeout=left)
            if result is None:
                break
            if result.error:
                raise RuntimeError(f"continuous batching failed: {result.error}")
            if result.is_finished():
                done += len(result.generated_tokens)
                wanted.discard(result.request_id)
        return row("continuous", time.perf_counter() - start, done, unfinished=len(wanted), **more)


# ── the run ───────────────────────────────────────────────────────────────────────────────────────────────


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--parts", default="exactness,attention,experts,0.6b,8b,transformers-0.6b,transformers-8b")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--commit", default="unknown", help="of what is measured, for the rows")
    parser.add_argument("--sweep", action="store_true", help="try every tile of attention, products and experts")
    parser.add_argument("--kinds", default="", help="of products, separated by commas; default: all")
    parser.add_argument("--rows", default="", help="of products, separated by commas; default: 1 to 2048")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--model", type=Path, default=Path("platform/quire/builtin/tiny"), help="for exactness")
    options = parser.parse_args()
    card = measure_card()
    about = {
        **facts(options.commit),
        "copy_tb_s": round(card.bandwidth / 1e12, 3),
        "bf16_tflops": round(card.bf16 / 1e12, 1),
    }
    print(about, flush=True)
    rows: list[dict[str, Any]] = []
    failed: list[str] = []

    def take(row: dict[str, Any]) -> None:
        rows.append(row)
        print(json.dumps(row), flush=True)
        if options.out is not None:
            with options.out.open("a") as file:
                file.write(json.dumps({**row, **about}) + "\n")

    for part in options.parts.split(","):
        began = time.perf_counter()
        try:
            for row in _rows(part, card, options):
                take(row)
        except Exception:  # noqa: BLE001 - the other parts are worth having
            traceback.print_exc()
            failed.append(part)
        torch.cuda.empty_cache()
        print(f"{part}: {time.perf_counter() - began:.1f} s", flush=True)
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


def _rows(part: str, card: Card, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    quick = options.quick
    if part == "exactness":
        yield from exactness(options.model)
    elif part == "attention":
        yield from attention_rows(card, sweep=options.sweep)
        yield from prompt_rows(card, sweep=options.sweep)
    elif part == "experts":
        yield from experts_rows(replayed, card.bandwidth, card.bf16, sweep=options.sweep, quick=quick)
    elif part == "products":
        yield from product_rows(card, replayed, sweep=options.sweep, kinds=options.kinds, rows_of=options.rows)
    elif part == "tune":
        yield from tuning_rows(card, quick=quick)
    elif part == "0.6b":
        bench = Bench("qwen3-0.6b", seqs=256, tokens=16384, length=2304, kv_bytes=60 << 30)
        print(_loaded(bench), flush=True)
        for batch in (1, 32, 256) if quick else (1, 8, 32, 128, 256):
            yield decode(bench, card, batch, 1024, 64)
        yield prefill(bench, card, 2048)
        yield offline(bench, card, "nano", nano_lengths())
        yield offline(bench, card, "nano, the first 128", nano_lengths()[:128])
        yield memory(bench)
        bench.close()
    elif part == "8b":
        bench = Bench("llama-3.1-8b", seqs=1000, tokens=8192, length=8448, kv_bytes=70 << 30)
        print(_loaded(bench), flush=True)
        for batch in (1, 32, 256) if quick else (1, 8, 32, 64, 128, 256):
            yield decode(bench, card, batch, 1024, 32)
        for tokens in (2048, 8192):
            yield prefill(bench, card, tokens)
        yield offline(bench, card, "sharegpt, 128", sharegpt_lengths(128))
        yield offline(bench, card, "sharegpt", sharegpt_lengths(256 if quick else 1000))
        yield memory(bench)
        bench.close()
    elif part in ("0.6b-int8-kv", "0.6b-fp8-kv"):
        kept: KvDtype = "int8" if part == "0.6b-int8-kv" else "fp8"
        bench = Bench("qwen3-0.6b", seqs=256, tokens=16384, length=2304, kv_bytes=40 << 30, kv=kept)
        for batch in (1, 32, 256):
            yield decode(bench, card, batch, 1024, 64)
        yield offline(bench, card, "nano", nano_lengths())
        bench.close()
    elif part == "30b-a3b":
        bench = Bench("qwen3-30b-a3b", seqs=256, tokens=8192, length=2304, kv_bytes=30 << 30)
        print(_loaded(bench), flush=True)
        for batch in (1, 32, 256):
            yield decode(bench, card, batch, 1024, 32)
        yield prefill(bench, card, 2048)
        yield memory(bench)
        bench.close()
    elif part in EIGHT_B:
        weights = EIGHT_B[part]
        bench = Bench(
            "llama-3.1-8b",
            seqs=1000,
            tokens=8192,
            length=8448,
            kv_bytes=40 << 30,
            kv="fp8" if part == "8b-int8-fp8-kv" else "int8",
            quantization=weights,
        )
        for batch in (1, 32, 256):
            yield decode(bench, card, batch, 1024, 32)
        yield prefill(bench, card, 2048)
        yield offline(bench, card, "sharegpt", sharegpt_lengths(256 if quick else 1000))
        bench.close()
    elif part == "transformers-0.6b":
        yield from transformers_rows("qwen3-0.6b", nano_lengths()[:128], () if quick else (64, 128))
    elif part == "transformers-8b":
        yield from transformers_rows("llama-3.1-8b", sharegpt_lengths(128), (128,))
    else:
        raise ValueError(f"no part is called {part!r}")


if __name__ == "__main__":
    main()
