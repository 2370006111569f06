"""transformers, three ways: one request after another, the best static batch, continuous batching.

Each takes the jobs and returns the seconds it needed to produce every job's tokens. EOS is ignored everywhere. In
a static batch every row runs to the longest output of its batch; those extra tokens are work, not result, and the
caller counts only the tokens that were asked for.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.generation import ContinuousBatchingConfig

from benchmarks.workload import Job

PAGE = 256
"""Tokens of a page in transformers' own cache; its default."""


class Transformers:
    """One loaded model, and the three ways to run it."""

    def __init__(self, folder: Path, dtype: torch.dtype) -> None:
        transformers.logging.set_verbosity_error()
        self.model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()

    def _generate(self, batch: Sequence[Job]) -> None:
        width = max(len(job.prompt) for job in batch)
        longest = max(job.output_tokens for job in batch)
        ids = torch.zeros(len(batch), width, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, job in enumerate(batch):
            ids[row, width - len(job.prompt) :] = torch.tensor(job.prompt)
            mask[row, width - len(job.prompt) :] = 1
        config = GenerationConfig(
            max_new_tokens=longest, min_new_tokens=longest, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        with torch.inference_mode():
            out = self.model.generate(ids, attention_mask=mask, generation_config=config)
        if out.shape[1] != width + longest:
            raise RuntimeError(f"generate gave {out.shape[1] - width} tokens where {longest} were asked")

    def sequential(self, jobs: Sequence[Job]) -> float:
        """Batch 1, in order."""
        start = time.perf_counter()
        for job in jobs:
            self._generate([job])
        return time.perf_counter() - start

    def static(self, jobs: Sequence[Job], batch_size: int, *, by_length: bool) -> float:
        """Fixed batches, in file order or sorted by output length (the kindest order for a static batch)."""
        order = sorted(jobs, key=lambda job: job.output_tokens) if by_length else list(jobs)
        start = time.perf_counter()
        for at in range(0, len(order), batch_size):
            self._generate(order[at : at + batch_size])
        return time.perf_counter() - start

    def continuous(self, jobs: Sequence[Job], limit: float) -> tuple[float, int]:
        """The engine of `generate_batch` with a length per request; warm-up lies outside the timer.

        It gets the token budget that ours has and pages for every job at once. Left to itself it plans batches of
        8,192 tokens and fills most of the memory with their masks, which on a CPU only costs it time.

        Returns the seconds and the tokens produced: fewer than asked if `limit` seconds were not enough, and then
        only those of finished requests count.
        """
        config = GenerationConfig(do_sample=False, max_new_tokens=max(job.output_tokens for job in jobs))
        pages = sum(-(-(len(job.prompt) + job.output_tokens) // PAGE) for job in jobs)
        batching = ContinuousBatchingConfig(page_size=PAGE, num_blocks=pages, max_batch_tokens=512)
        with self.model.continuous_batching_context_manager(
            generation_config=config, continuous_batching_config=batching
        ) as manager:
            start = time.perf_counter()
            wanted = {
                manager.add_request(list(job.prompt), max_new_tokens=job.output_tokens, eos_token_id=-1): job
                for job in jobs
            }
            done = 0
            while wanted and (left := start + limit - time.perf_counter()) > 0:
                result = manager.get_result(timeout=left)
                if result is None:  # nothing within the time that was left
                    break
                if result.error:
                    raise RuntimeError(f"continuous batching failed: {result.error}")
                if result.is_finished():
                    done += len(result.generated_tokens)
                    del wanted[result.request_id]
            elapsed = time.perf_counter() - start
        asked = sum(job.output_tokens for job in jobs)
        if not wanted and done != asked:
            raise RuntimeError(f"continuous batching gave {done} tokens where {asked} were asked")
        return elapsed, done
