"""transformers on the device, with random weights of the same shape: what each way gives of the same requests.

In a static batch every row runs to the longest of its batch, as in the original comparison; tokens that were asked
for count, nothing else. A way that has not finished when its time is up is stopped; then the tokens that were
asked for and are there by then count, of continuous batching those of requests that are done.
"""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.device import Device
from benchmarks.gpu.workloads import Pairs
from quire_engine.engine import DTYPES

STATIC = (32, 64, 128, 256)
"""Sizes of batches."""
CONTINUOUS: tuple[dict[str, Any], ...] = (
    {"max_batch_tokens": 8192},
    {"max_batch_tokens": 8192, "use_cuda_graph": True},
    {"max_batch_tokens": 8192, "use_cuda_graph": True, "use_async_batching": True},
    {"max_batch_tokens": 16384, "use_cuda_graph": True, "use_async_batching": True},
    {},
    {"max_batch_tokens": 8192, "use_async_batching": True, "default_compile_level": 1},
)
"""Configurations of continuous batching; what is not said is left to transformers."""
_PAGE = 256
"""Tokens of a page of transformers' own cache; its default."""


@dataclass(frozen=True, slots=True)
class Took:
    """Tokens that count, and seconds; `finished`: whether these are all that were asked for."""

    tokens: int
    seconds: float
    finished: bool

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds


class _Stop:
    """Ends a generation when its time is up, or after `most` tokens."""

    def __init__(self, until: float, width: int, most: int) -> None:
        self.until, self.last = until, width + most

    def __call__(self, ids: Tensor, scores: object, **_: object) -> Tensor:
        over = ids.shape[1] >= self.last or time.perf_counter() > self.until
        return torch.full((ids.shape[0],), over, dtype=torch.bool, device=ids.device)


class Peers:
    """One model of transformers, and the ways to run it. `bytes_per_token`: of its keys and values."""

    def __init__(self, device: Device, config: dict[str, Any], bytes_per_token: float) -> None:
        import transformers
        from transformers import AutoConfig, AutoModelForCausalLM

        transformers.logging.set_verbosity_error()
        self.version = transformers.__version__
        self.device, self._bytes_per_token = device, bytes_per_token
        with torch.device(device.torch):
            self.model: Any = AutoModelForCausalLM.from_config(
                AutoConfig.for_model(**config), dtype=DTYPES[device.dtype]
            ).eval()

    @property
    def attention(self) -> str:
        """Which implementation runs."""
        return str(self.model.config._attn_implementation)

    # ── static batches ────────────────────────────────────────────────────────────────────────────────

    def fits(self, batch: Pairs) -> bool:
        """Whether a batch finds room: keys and values in a cache that is copied layer by layer as it grows, and
        what an MLP has at once of all prompts."""
        width, longest = max(p for p, _ in batch), max(o for _, o in batch)
        inside: int = 3 * len(batch) * width * self.model.config.intermediate_size * self.model.dtype.itemsize
        kept = 1.15 * len(batch) * (width + longest) * self._bytes_per_token
        return kept + inside + (1 << 30) < self._free

    @property
    def _free(self) -> float:
        return float("inf") if self.device.torch.type == "cpu" else self.device.memory().free

    def step_seconds(self, batch: Pairs, tokens: int, until: float, **options: Any) -> float:
        """Of a token of a whole batch, in the middle of `tokens` of them; the prompts are left out. Whatever
        compiles does so before.
        """
        self._generate(batch, until, most=3, **options)
        few, many = (
            self._generate(batch, until, most=most, **options) for most in (2, tokens)
        )  # whose difference has no prompts in it
        if many.tokens <= few.tokens:
            raise TimeoutError("no time was left to try it")
        return (many.seconds - few.seconds) / (tokens - 2)

    def static(self, pairs: Pairs, size: int, until: float, **options: Any) -> Took:
        """Batches of `size`, in the order given."""
        start, tokens, finished = time.perf_counter(), 0, True
        for at in range(0, len(pairs), size):
            took = self._generate(pairs[at : at + size], until, **options)
            tokens, finished = tokens + took.tokens, finished and took.finished
            if not finished:
                break
        return Took(tokens, time.perf_counter() - start, finished)

    def _generate(self, batch: Pairs, until: float, *, most: int | None = None, **options: Any) -> Took:
        from transformers import StoppingCriteriaList

        width, longest = max(p for p, _ in batch), max(o for _, o in batch)
        wanted = longest if most is None else min(most, longest)
        ids = torch.randint(32, self.model.config.vocab_size, (len(batch), width), device=self.device.torch)
        mask = torch.ones_like(ids)
        for number, (prompt, _) in enumerate(batch):
            mask[number, : width - prompt] = 0
        self.device.synchronize()
        start = time.perf_counter()
        with torch.inference_mode():
            out = self.model.generate(
                ids,
                attention_mask=mask,
                max_new_tokens=longest,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
                stopping_criteria=StoppingCriteriaList([_Stop(until, width, wanted)]),
                **options,
            )
        self.device.synchronize()
        seconds, made = time.perf_counter() - start, out.shape[1] - width
        if made > wanted or not made:
            raise RuntimeError(f"generate gave {made} tokens where {wanted} were asked")
        return Took(sum(min(made, output) for _, output in batch), seconds, made == longest)

    # ── continuous batching ───────────────────────────────────────────────────────────────────────────

    @contextlib.contextmanager
    def continuous(self, pairs: Pairs, options: dict[str, Any]) -> Iterator[Continuous]:
        """The engine of `generate_batch` in one configuration, warm, for such requests."""
        from transformers import GenerationConfig
        from transformers.generation import ContinuousBatchingConfig

        longest = max(output for _, output in pairs)
        asked = GenerationConfig(do_sample=False, max_new_tokens=longest)
        if self.device.torch.type == "cpu":
            # left to itself it fills most of the memory with masks of 8,192 tokens
            pages = sum(-(-(prompt + output) // _PAGE) for prompt, output in pairs)
            options = {"num_blocks": pages, "max_batch_tokens": 512}
        with self.model.continuous_batching_context_manager(
            generation_config=asked, continuous_batching_config=ContinuousBatchingConfig(**options), timeout=30.0
        ) as manager:
            running = Continuous(manager, self.model.config.vocab_size)
            try:
                yield running
            finally:
                if running.left:
                    # it would finish what it has otherwise, however long that takes
                    manager.stop(block=True, timeout=30.0, hard_stop=True)


class Continuous:
    """A manager that runs. `left`: how many requests it did not finish."""

    def __init__(self, manager: Any, vocabulary: int) -> None:
        self._manager, self._vocabulary, self.left = manager, vocabulary, 0

    def run(self, pairs: Pairs, until: float) -> Took:
        """All of them at once. After one that did not finish there is no other."""
        rng, done = random.Random(0), 0
        prompts = [[rng.randrange(32, self._vocabulary) for _ in range(prompt)] for prompt, _ in pairs]
        start = time.perf_counter()
        wanted = {
            self._manager.add_request(prompt, max_new_tokens=output, eos_token_id=-1)
            for prompt, (_, output) in zip(prompts, pairs, strict=True)
        }
        self.left = len(wanted)
        while wanted and (patience := until - time.perf_counter()) > 0:
            if not self._manager.is_running():
                raise RuntimeError("continuous batching ended by itself")
            result = self._manager.get_result(timeout=min(patience, 5.0))
            if result is None:
                continue
            if result.error:
                raise RuntimeError(f"continuous batching failed: {result.error}")
            if result.is_finished():
                done += len(result.generated_tokens)
                wanted.discard(result.request_id)
                self.left = len(wanted)
        seconds = time.perf_counter() - start
        asked = sum(output for _, output in pairs)
        if not wanted and done != asked:
            raise RuntimeError(f"continuous batching gave {done} tokens where {asked} were asked")
        return Took(done, seconds, not wanted)


def by_output(pairs: Pairs) -> Pairs:
    """In the order that is kindest to static batches."""
    return sorted(pairs, key=lambda pair: pair[1])


def static_tokens(pairs: Sequence[tuple[int, int]], size: int) -> int:
    """Steps of all batches, each as long as its longest."""
    return sum(max(output for _, output in pairs[at : at + size]) for at in range(0, len(pairs), size))
