"""One engine with random weights on the device, and what its host does meanwhile."""

from __future__ import annotations

import gc
import json
import random
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.gpu.device import Card, Device, Dtype
from benchmarks.gpu.weights import RandomWeights
from quire_engine.driver import spare_the_collector
from quire_engine.engine import DTYPES, KV_DTYPES, Engine
from quire_engine.models import DecoderModel, KVCache
from quire_engine.quantization import linear_method
from quire_engine.resident.runner import Begun, ResidentRunner
from quire_engine.step import StepResult
from quire_schemas.checkpoint import profile_from_config
from quire_schemas.quantization import quantized_bytes
from quire_schemas.sizing import kv_block_bytes, kv_bytes_per_token
from quire_schemas.wire import EngineSpec, Generate, KvDtype, Quantization, Sampling


def spec_of(
    folder: Path,
    device: Device,
    dtype: Dtype,
    *,
    seqs: int,
    tokens: int,
    length: int,
    blocks: int,
    kv: KvDtype | None = None,
) -> EngineSpec:
    """Of an engine in this process alone."""
    return EngineSpec(
        model=folder.name,
        replica_id="benchmark",
        incarnation=1,
        socket="",
        model_dir=str(folder),
        dtype=dtype,
        kv_dtype=kv or dtype,
        device="cuda" if device.torch.type == "cuda" else "cpu",
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
    """One engine on the device, and the seconds that its host waited for tokens. A rehearsal's is small."""

    def __init__(
        self,
        device: Device,
        name: str,
        *,
        seqs: int,
        tokens: int,
        length: int,
        kv_bytes: int,
        kv: KvDtype | None = None,
        quantization: Quantization | None = None,
    ) -> None:
        scale = device.scale
        config = scale.shape(name)
        profile = profile_from_config(config)
        self._folder = tempfile.TemporaryDirectory()
        folder = Path(self._folder.name)
        (folder / "config.json").write_text(json.dumps(config))
        blocks = scale.at_most(kv_bytes // kv_block_bytes(profile, kv or device.dtype, 16), 128)
        self.device, self.profile, self.config, self.quantization = device, profile, config, quantization
        method = "" if quantization is None else f", {quantization.method} weights"
        self.name = name + method + ("" if kv is None else f", {kv} KV")
        self.spec = spec_of(
            folder,
            device,
            device.dtype,
            seqs=scale.at_most(seqs, 4),
            tokens=scale.at_most(tokens, 64),
            length=scale.at_most(length, 96),
            blocks=blocks,
            kv=kv,
        )
        device.reset_peak()
        began = time.perf_counter()
        kernels = device.kernels()
        weights: Any = RandomWeights(profile, device.torch, DTYPES[device.dtype])
        method_of = linear_method(weights, kernels, quantization)
        model = DecoderModel.build(profile, weights, device=device.torch, kernels=kernels, method=method_of)
        cache = KVCache.allocate(profile, blocks, 16, KV_DTYPES[kv or device.dtype], device.torch)
        self.model, spec = model, self.spec
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
        self.ask(name, prompt, Sampling(max_tokens=output, temperature=0.0, ignore_eos=True), rng)

    def ask(self, name: str, prompt: int, sampling: Sampling, rng: random.Random) -> None:
        """A prompt of so many random ids."""
        ids = [rng.randrange(32, self.profile.vocab_size) for _ in range(prompt)]
        self.engine.add(Generate(name, ids, sampling))

    def drain(self) -> None:
        while self.engine.has_work:
            self.step()

    def step(self) -> int:
        """Tokens that came of it."""
        deltas = self.engine.step()
        for delta in deltas:
            if delta.finish_reason not in (None, "length"):
                raise RuntimeError(f"request {delta.id} ended with {delta.finish_reason}: {delta.error}")
        return sum(len(delta.token_ids) for delta in deltas)

    @property
    def running(self) -> list[Any]:
        """Requests that have a place."""
        return self.engine._scheduler.running

    @property
    def is_waiting(self) -> bool:
        """Whether a request has no place yet."""
        return bool(self.engine._scheduler.waiting)

    @property
    def told(self) -> str:
        """How long it took to be there."""
        return f"loaded in {self.load_seconds:.1f} s, captured {self.runner.program.captured}; {self.runner.tuned}"

    def close(self) -> None:
        """Give everything back."""
        del self.engine, self.runner, self.model
        gc.unfreeze()
        self.device.release()
        self._folder.cleanup()
