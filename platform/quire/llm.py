"""The engine in one process, for scripts, tests and benchmarks: no router, no sockets, no manifest.

    from quire.llm import LLM, Sampling

    llm = LLM("builtin://tiny")
    for output in llm.generate(["What is PagedAttention?"], Sampling(max_tokens=40, temperature=0.0)):
        print(output.text)

`LLM` sizes itself by the same arithmetic as `platform plan`. It is the only module of this package that loads
the engine, and with it torch.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

import psutil

from quire.builtin import path as builtin_path
from quire_schemas.checkpoint import ModelProfile, read_profile
from quire_schemas.sizing import FitReport, SizingRequest, fit, kv_block_bytes
from quire_schemas.wire import EngineSpec, FinishReason, Generate, Sampling, Timings, TokenLogprobs

if TYPE_CHECKING:
    from quire.text import Tokenizer
    from quire_engine.engine import Engine

__all__ = ["LLM", "DoesNotFit", "RequestOutput", "Sampling"]

Dtype = Literal["float32", "bfloat16", "float16"]
Device = Literal["cpu", "cuda"]


class DoesNotFit(Exception):
    """The model does not fit this machine as asked; the message has the arithmetic and what would fit."""


@dataclass(slots=True)
class RequestOutput:
    """What became of one prompt. `text` is None when the folder has no tokenizer."""

    prompt_token_ids: list[int]
    token_ids: list[int] = field(default_factory=list)
    text: str | None = None
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None
    logprobs: list[TokenLogprobs] | None = None
    error: str | None = None
    timings: Timings | None = None


class LLM:
    """One model in this process. `None` and "auto" resolve as they do in a manifest; `fit` keeps the arithmetic.

    `model` is `builtin://NAME`, `file:///PATH` or a folder. `num_blocks` fixes the size of the KV cache, and
    `threads` torch's threads (of the whole process). Raises `DoesNotFit`, `CheckpointError`, `LookupError`.
    """

    def __init__(
        self,
        model: str,
        *,
        dtype: Literal["auto"] | Dtype = "auto",
        kv_dtype: Literal["auto"] | Dtype = "auto",
        device: Literal["auto"] | Device = "auto",
        max_model_len: int | None = None,
        block_size: int = 16,
        num_blocks: int | None = None,
        max_num_seqs: int = 64,
        max_num_batched_tokens: int = 512,
        chunked_prefill: bool = True,
        memory_share: float = 0.9,
        prefix_caching: bool = True,
        async_scheduling: bool = False,
        seed: int = 0,
        threads: int | None = None,
    ) -> None:
        import torch

        from quire_engine.engine import Engine

        folder = _folder(model)
        profile = read_profile(folder)
        resolved = cast(Dtype, profile.dtype) if dtype == "auto" else dtype
        kind: Device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
        total, available = torch.cuda.mem_get_info()[::-1] if kind == "cuda" else _memory()
        request = SizingRequest(
            dtype=resolved,
            kv_dtype=resolved if kv_dtype == "auto" else kv_dtype,
            block_size=block_size,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            device=kind,
            device_bytes_total=total,
            device_bytes_available=available,
            memory_share=memory_share,
            max_model_len=max_model_len,
        )
        self.fit = _fit(profile, request, num_blocks)
        spec = EngineSpec(
            model=model,
            replica_id="in-process",
            incarnation=1,
            socket="",
            model_dir=str(folder),
            dtype=resolved,
            kv_dtype=cast(Dtype, request.kv_dtype),
            device=kind,
            threads=threads or torch.get_num_threads(),
            max_model_len=self.fit.max_model_len,
            block_size=block_size,
            num_blocks=self.fit.num_blocks,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            chunked_prefill=chunked_prefill,
            seed=seed,
            memory_limit=self.fit.limit,
            hot_hash="",
            prefix_caching=prefix_caching,
            async_scheduling=async_scheduling,
        )
        self.engine: Engine = Engine.load(spec)
        self.profile = profile
        self._folder = folder
        self._tokenizer: Tokenizer | None = None
        self._numbers = itertools.count(1)

    @property
    def tokenizer(self) -> Tokenizer:
        """The checkpoint's tokenizer, read on first use. Raises `quire.text.TextError`."""
        if self._tokenizer is None:
            from quire.text import Tokenizer

            self._tokenizer = Tokenizer.load(self._folder)
        return self._tokenizer

    def generate(
        self,
        prompts: Sequence[str] | Sequence[Sequence[int]],
        sampling: Sampling | Sequence[Sampling] | None = None,
    ) -> list[RequestOutput]:
        """Continue every prompt, all in one batch; outputs in the order of the prompts.

        Text is encoded as it stands (special tokens may be written out). `sampling` is one for all or one for
        each; None is 128 greedy tokens. Raises `quire_engine.errors.RequestRefused`, before anything is computed,
        if one of the prompts cannot be served.
        """
        each = sampling or Sampling(max_tokens=128, temperature=0.0)
        samplings = [each] * len(prompts) if isinstance(each, Sampling) else list(each)
        ids = [self.tokenizer.encode(p) if isinstance(p, str) else list(p) for p in prompts]
        outputs: dict[str, RequestOutput] = {}
        try:
            for prompt, params in zip(ids, samplings, strict=True):
                name = str(next(self._numbers))
                self.engine.add(Generate(name, list(prompt), params))
                outputs[name] = RequestOutput(prompt, logprobs=None if params.logprobs is None else [])
            while self.engine.has_work:
                self._step(outputs)
        finally:
            for name, output in outputs.items():
                if output.finish_reason is None:
                    self.engine.abort(name)
        if (self._folder / "tokenizer.json").is_file():
            for output in outputs.values():
                output.text = self.tokenizer.decode(output.token_ids)
        return list(outputs.values())

    def _step(self, outputs: dict[str, RequestOutput]) -> None:
        for delta in self.engine.step():
            output = outputs[delta.id]
            output.token_ids += delta.token_ids
            if output.logprobs is not None and delta.logprobs:
                output.logprobs += delta.logprobs
            if delta.finish_reason is not None:
                output.finish_reason = delta.finish_reason
                output.stop_token_id = delta.stop_token_id
                output.error = delta.error
                output.timings = delta.timings


def _folder(model: str) -> Path:
    if model.startswith("builtin://"):
        return builtin_path(model.removeprefix("builtin://"))
    return Path(model.removeprefix("file://"))


def _memory() -> tuple[int, int]:
    """Total and available bytes of this machine."""
    memory = psutil.virtual_memory()
    return memory.total, memory.available


def _fit(profile: ModelProfile, request: SizingRequest, num_blocks: int | None) -> FitReport:
    """The report that the engine is built by. A fixed number of blocks may be less than one full context."""
    report = fit(profile, request)
    if num_blocks is not None:
        per_block = kv_block_bytes(profile, request.kv_dtype, request.block_size)
        room = report.limit - report.weights - report.activations - report.overhead
        reason = "" if num_blocks * per_block <= room else f"{num_blocks} blocks are more than the limit leaves"
        if report.max_model_len > profile.max_position_embeddings:
            reason = report.reason
        report = replace(
            report, fits=not reason, reason=reason, num_blocks=num_blocks, kv=num_blocks * per_block, notes=()
        )
    if not report.fits:
        raise DoesNotFit("\n".join(report.lines()))
    return report
