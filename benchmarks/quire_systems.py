"""Quire's engine in this process: the same jobs, stepped to the end, the KV cache looked at after each step."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from benchmarks.workload import Job
from quire_engine.engine import DTYPES, KV_DTYPES, Engine
from quire_engine.masks import MaskMaker
from quire_engine.models import KVCache, load_model
from quire_engine.runner import ModelRunner
from quire_kernels import Kernels
from quire_schemas.checkpoint import read_profile
from quire_schemas.wire import EngineSpec, Generate, KvDtype, Quantization, Sampling

Dtype = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True, slots=True)
class Run:
    """One pass over the jobs. Waste figures are time-averaged shares, 0 to 1; lengths are in tokens."""

    seconds: float
    steps: int
    preemptions: int
    kv_waste: float
    kv_waste_contiguous: float
    """The same trace with `max_model_len` slots reserved for each running sequence."""
    mean_live_length: float


def engine_spec(
    folder: Path,
    dtype: Dtype,
    *,
    threads: int,
    max_num_seqs: int = 64,
    max_num_batched_tokens: int = 512,
    max_model_len: int = 1024,
    block_size: int = 16,
    prefix_caching: bool = False,
    quantization: Quantization | None = None,
    kv_dtype: KvDtype | None = None,
) -> EngineSpec:
    """An engine for the checkpoint in `folder`, with room for all its seats at their longest."""
    return EngineSpec(
        model=folder.name,
        replica_id="benchmark",
        incarnation=1,
        socket="",
        model_dir=str(folder),
        dtype=dtype,
        kv_dtype=kv_dtype or dtype,
        device="cpu",
        threads=threads,
        max_model_len=max_model_len,
        block_size=block_size,
        num_blocks=max_num_seqs * max_model_len // block_size,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        chunked_prefill=True,
        prefix_caching=prefix_caching,
        seed=0,
        memory_limit=1 << 40,
        hot_hash="",
        quantization=quantization,
    )


def engine_of(spec: EngineSpec, kernels: Kernels) -> Engine:
    """As `Engine.load`, with kernels of one's choice."""
    folder, profile = Path(spec.model_dir), read_profile(Path(spec.model_dir))
    cpu, dtype = torch.device("cpu"), DTYPES[spec.dtype]
    model = load_model(
        folder,
        profile,
        dtype=dtype,
        device=cpu,
        kernels=kernels,
        on_progress=lambda done, total: None,
        quantization=spec.quantization,
    )
    cache = KVCache.allocate(profile, spec.num_blocks, spec.block_size, KV_DTYPES[spec.kv_dtype], cpu)
    masks = MaskMaker(meanwhile=False)
    runner = ModelRunner(
        model, cache, block_size=spec.block_size, head_rows=spec.max_num_seqs, device=cpu, masks=masks
    )
    engine = Engine(spec, profile, runner, backend=kernels.name)
    engine.warm_up()
    return engine


class Quire:
    """One loaded engine, sized so that every job of the scenario may run at once."""

    def __init__(
        self,
        folder: Path,
        dtype: Dtype,
        *,
        threads: int,
        prefix_caching: bool = False,
        quantization: Quantization | None = None,
        kv_dtype: KvDtype | None = None,
        **sizes: int,
    ) -> None:
        """`sizes` are the others of `engine_spec`."""
        spec = engine_spec(
            folder, dtype, threads=threads, prefix_caching=prefix_caching, quantization=quantization,
            kv_dtype=kv_dtype, **sizes,
        )  # fmt: skip
        self.vocab_size = read_profile(folder).vocab_size
        self.max_model_len = spec.max_model_len
        self.engine = Engine.load(spec)
        self.engine.warm_up()

    def run(self, jobs: Sequence[Job]) -> Run:
        """All jobs at once; raises if any ends early or produces another number of tokens than asked."""
        engine = self.engine
        before = engine.stats()
        for number, job in enumerate(jobs):
            sampling = Sampling(max_tokens=job.output_tokens, temperature=0.0, ignore_eos=True)
            engine.add(Generate(str(number), list(job.prompt), sampling))
        produced = [0] * len(jobs)
        allocated = used = reserved = live = spent = 0.0
        start = now = time.perf_counter()
        while engine.has_work:
            for delta in engine.step():
                if delta.finish_reason not in (None, "length"):
                    raise RuntimeError(f"request {delta.id} ended with {delta.finish_reason}: {delta.error}")
                produced[int(delta.id)] += len(delta.token_ids)
            then, now = now, time.perf_counter()
            slots, running = engine.slots(), engine.stats().running
            weight = now - then
            allocated += slots.allocated * weight
            used += slots.used * weight
            reserved += running * self.max_model_len * weight
            live += running * weight
            spent += weight
        if produced != [job.output_tokens for job in jobs]:
            raise RuntimeError("the engine produced another number of tokens than asked for")
        after = engine.stats()
        return Run(
            seconds=now - start,
            steps=after.steps - before.steps,
            preemptions=after.preemptions - before.preemptions,
            kv_waste=(allocated - used) / allocated,
            kv_waste_contiguous=(reserved - used) / reserved,
            mean_live_length=used / live,
        )
