"""The engine: requests in, tokens out, one step at a time. No I/O, and no clock of its own but timings and
deadlines.

A step is three lines: the scheduler decides, the runner computes, the scheduler takes over. With asynchronous
scheduling the runner computes in the background (`ahead`): the next step is decided while it runs, and what it
gave is taken over while the next one does; each request gets the same tokens. Around the middle line
stands a fence: when a step fails, its items are computed again one by one (which is safe, see `runner`), and only
those that fail alone end with an error; everybody else does not notice.

`Engine.load` builds one from a spec and holds it to its figures: weights and cache must have exactly the bytes
that `quire_schemas.sizing` planned, and lie, together with the activations, below the limit.
"""

from __future__ import annotations

import itertools
import logging
import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import msgspec
import torch

from quire_engine.adapters import NONE, Loaded, read_adapters
from quire_engine.ahead import Ahead, Background
from quire_engine.attest import attest
from quire_engine.beam import Searches
from quire_engine.blocks import BlockPool
from quire_engine.config import BatchLimits, check_spec
from quire_engine.errors import (
    DeviceLost,
    DeviceUnavailable,
    InvalidSpec,
    InvariantBroken,
    NotInvariant,
    RequestRefused,
)
from quire_engine.grammar import Grammar, Grammars
from quire_engine.masks import MaskMaker
from quire_engine.memory import MemoryPlan
from quire_engine.models import DecoderModel, KVCache, load_model
from quire_engine.request import Request
from quire_engine.runner import ModelRunner, Runner
from quire_engine.scheduler import Counters, Scheduler
from quire_engine.scripted import ScriptedRunner
from quire_engine.step import StepPlan, StepResult
from quire_engine.trace import RecordingScheduler
from quire_kernels import best as best_kernels
from quire_schemas.checkpoint import ModelProfile, read_config, read_profile
from quire_schemas.gpu_sizing import HEAD_ROWS
from quire_schemas.quantization import activations_misfit, experts_misfit, misfit
from quire_schemas.sizing import kv_groups, kv_misfit
from quire_schemas.wire import (
    MAX_LOGPROB_ENTRIES,
    Delta,
    EngineSpec,
    Generate,
    Limits,
    Pooling,
    Sampling,
    Stats,
)

log = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
KV_DTYPES = DTYPES | {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
_HEAD_ROWS = {"cpu": 1 << 30, "cuda": HEAD_ROWS}
"""Of so many rows logits are there at once when the host draws; on a CPU of all that draw."""
MAX_LIVE_ENTRIES = 2 * MAX_LOGPROB_ENTRIES
"""Log-probabilities that all live requests together may ask for when another one wants many at a position: what
one step makes of them has to go through a client's connection at once."""
_WARM_UP = "warm-up"
_WARM_UP_SECONDS = 30.0
"""What a start may take longer so that no step has to be captured later."""


@dataclass(frozen=True, slots=True)
class SlotCounts:
    """The KV cache between two steps, in tokens: slots of allocated blocks, and those that hold one."""

    allocated: int
    used: int


class Engine:
    """One model, one cache, many requests. Not thread-safe: whoever steps it also adds and aborts."""

    def __init__(
        self,
        spec: EngineSpec,
        profile: ModelProfile,
        runner: Runner,
        *,
        backend: str = "",
        backend_lacking: str = "",
        background: Callable[[Callable[[StepPlan], StepResult]], Background] = Ahead,
        clock: Callable[[], float] = time.monotonic,
        adapters: Sequence[Loaded] = (),
    ) -> None:
        self.spec = spec
        self.profile = profile
        self.adapters = tuple(adapters)
        self._adapters = {adapter.name: number for number, adapter in enumerate(adapters, NONE + 1)}
        self.runner = runner
        self.backend = backend
        """Whose kernels compute; empty for a script."""
        self.backend_lacking = backend_lacking
        """What keeps the back-end that was made for the device from being used; empty if it is."""
        self.hot_hash = spec.hot_hash
        self.grammars = Grammars(Path(spec.model_dir), profile.vocab_size, profile.eos_token_ids)
        self._clock = clock
        pool = BlockPool(spec.num_blocks, spec.block_size, [group.window for group in kv_groups(profile)])
        self._scheduler = Scheduler(pool, BatchLimits.of(spec), max_model_len=spec.max_model_len, clock=clock)
        # replicas of one model must not give the same answers to requests without a seed
        self._seeds = random.Random(f"{spec.seed}/{spec.replica_id}")  # noqa: S311 - sampling, no secret
        self._last_step_at = clock()
        self._searches = Searches()
        self._ahead = background(self._execute) if spec.async_scheduling else None

    @classmethod
    def load(cls, spec: EngineSpec, on_progress: Callable[[int, int], None] = lambda done, total: None) -> Engine:
        """Read the checkpoint and allocate the cache that `spec` asks for. Sets torch's threads for the process.

        Raises `quire_schemas.checkpoint_files.CheckpointError`, `StartError` (pointless to try again) or
        `DeviceUnavailable`. `on_progress(done, total)` counts bytes of weights.
        """
        check_spec(spec)
        if spec.runner == "scripted":
            return cls._load_scripted(spec)
        torch.set_num_threads(spec.threads)
        device = _device(spec)
        profile = read_profile(Path(spec.model_dir))
        _check_length(spec, profile)
        if spec.quantization is not None and (
            problem := misfit(profile, spec.quantization)
            or experts_misfit(profile, spec.quantization.method)
            or activations_misfit(profile, spec.quantization.method, spec.quantization.activations, spec.device)
        ):
            raise InvalidSpec(problem)
        if problem := kv_misfit(profile, spec.kv_dtype, spec.device):
            raise InvalidSpec(problem)
        adapters = read_adapters(spec.adapters, profile)
        plan = MemoryPlan.of(spec, profile, adapters=[adapter.profile for adapter in adapters])
        kernels, lacking = best_kernels(spec.device, spec.threads)
        if lacking and spec.device == "cuda":
            # the plan counts what they take; the reference kernels take several times that
            raise DeviceUnavailable(
                f"a GPU computes with the Triton kernels alone, which cannot be used: {lacking}\n"
                "hint: declare spec.engine.device: cpu"
            )
        if lacking:
            log.warning("the reference kernels compute, slowly: %s", lacking)
        with plan.explained("weights were loaded"):
            model = load_model(
                Path(spec.model_dir),
                profile,
                dtype=DTYPES[spec.dtype],
                device=device,
                kernels=kernels,
                on_progress=on_progress,
                quantization=spec.quantization,
                adapters=[adapter.profile for adapter in adapters],
            )
        with plan.explained("the cache was allocated"):
            kv = KVCache.allocate(profile, spec.num_blocks, spec.block_size, KV_DTYPES[spec.kv_dtype], device)
        plan.check(model, kv)
        if spec.batch_invariant:
            if lacking:
                raise NotInvariant(f"the kernels that keep to it cannot be used: {lacking}")
            attest(model, kv, block_size=spec.block_size, backend=kernels.name, adapters=len(adapters))
        return cls.assemble(spec, profile, model, kv, backend_lacking=lacking, adapters=adapters)

    @classmethod
    def assemble(
        cls,
        spec: EngineSpec,
        profile: ModelProfile,
        model: DecoderModel,
        kv: KVCache,
        *,
        backend_lacking: str = "",
        adapters: Sequence[Loaded] = (),
    ) -> Engine:
        """An engine of a loaded model and its cache, with the runner that fits the model's kernels."""
        device = kv.tensors[0].device
        runner = ModelRunner(
            model,
            kv,
            block_size=spec.block_size,
            head_rows=min(spec.max_num_seqs, spec.max_num_batched_tokens, _HEAD_ROWS[device.type]),
            device=device,
            masks=MaskMaker(meanwhile=device.type != "cpu" or spec.spare_core),
        )
        backend = model.kernels.name
        if backend != "triton":
            return cls(spec, profile, runner, backend=backend, backend_lacking=backend_lacking, adapters=adapters)
        # here and not above: nothing else needs Triton, which takes a second to import
        from quire_engine.resident.draws import draw_rows
        from quire_engine.resident.pipeline import Pipeline
        from quire_engine.resident.runner import ResidentRunner

        runner.drawer = draw_rows
        resident = ResidentRunner(
            runner,
            seats=spec.max_num_seqs,
            max_num_batched_tokens=spec.max_num_batched_tokens,
            max_model_len=spec.max_model_len,
            captures=device.type == "cuda" and not spec.enforce_eager,
        )
        resident.take_tilings()
        return cls(spec, profile, resident, backend=backend, background=partial(Pipeline, resident))

    @classmethod
    def _load_scripted(cls, spec: EngineSpec) -> Engine:
        """An engine of which nothing but the checkpoint's configuration is read."""
        profile = read_config(Path(spec.model_dir))
        _check_length(spec, profile)
        runner = ScriptedRunner(
            eos_token_ids=profile.eos_token_ids,
            num_blocks=spec.num_blocks,
            block_size=spec.block_size,
            step_time=spec.step_time,
        )
        return cls(spec, profile, runner)

    def record(self, path: Path) -> None:
        """Write to `path` all that is scheduled from now on (`quire_engine.trace`). The engine must be idle.

        The prefix cache begins empty again: a trace has to tell everything that decisions came from.
        """
        if self.has_work:
            raise InvariantBroken("recording begins with an idle engine")
        old = self._scheduler
        pool = BlockPool(old.pool.num_blocks, old.pool.block_size, old.pool.windows)
        self._scheduler = RecordingScheduler(
            pool, old.limits, max_model_len=old.max_model_len, tickets=old.tickets, path=path
        )

    # ── requests ──────────────────────────────────────────────────────────────────────────────────────

    @property
    def has_work(self) -> bool:
        """Whether `step` has something to do or to hand out."""
        return self._scheduler.has_work or (self._ahead is not None and self._ahead.is_busy)

    def add(self, message: Generate, received_at: float | None = None, grammar: Grammar | None = None) -> None:
        """Queue a request, or raise `RequestRefused`. `received_at` is when it reached this machine, or now.

        `grammar` is what `grammars` made of its constraint; without it the constraint is compiled here and now.
        """
        pooling = message.pooling
        if pooling is not None:
            self._check_pooling(message, pooling)
            message.sampling = Sampling(max_tokens=0)
        self._check(message)
        if self.spec.runner == "scripted" and message.sampling.structured is not None:
            raise RequestRefused("invalid_grammar", "this model's runner is scripted and says what it says")
        if self.spec.runner == "scripted" and message.sampling.script is None:
            message.sampling = msgspec.structs.replace(message.sampling, script=tuple(message.token_ids))
        adapter, kin = self._adapter(message.adapter)
        sampling, seed = message.sampling, message.sampling.seed
        if sampling.structured is not None and grammar is None:
            grammar = self.grammars.compile(sampling.structured)
        if message.beam is not None:
            message.sampling = Searches.asks(message.beam, sampling)
        request = Request.of(
            message,
            eos_token_ids=self.profile.eos_token_ids,
            seed=self._seeds.getrandbits(63) if seed is None else seed,
            received_at=self._clock() if received_at is None else received_at,
            grammar=grammar,
            adapter=adapter,
        )
        if pooling is not None and pooling.kind == "mean":
            pass  # it needs the states of every token: none may be found in the cache
        elif self.spec.prefix_caching:
            request.share_with("all", message.cache_salt, *kin)
        elif message.family is not None or message.beam is not None:
            request.share_with("family", message.family or message.id, *kin)
        self._scheduler.add(request)
        if message.beam is not None:
            self._searches.begin(request, message.beam, sampling)

    def abort(self, request_id: str) -> bool:
        """End a request without a delta; its blocks are free on return. False if it is not live."""
        return self._searches.abort(request_id, self._scheduler) or self._scheduler.abort(request_id)

    def _adapter(self, name: str) -> tuple[int, tuple[str, ...]]:
        """The number of an adapter, and what keys and values depend on by it: its name and its contents."""
        if not name:
            return NONE, ()
        number = self._adapters.get(name)
        if number is None:
            there = ", ".join(self._adapters) or "none"
            raise RequestRefused("model_not_found", f"there is no adapter '{name}' here; those that are: {there}")
        return number, (name, self.spec.adapters[number - 1].digest)

    def _check(self, message: Generate) -> None:
        """What would break the step for everybody is refused here."""
        vocabulary = self.profile.vocab_size
        if not message.token_ids:
            raise RequestRefused("invalid_request", "the prompt has no tokens")
        if min(message.token_ids) < 0 or max(message.token_ids) >= vocabulary:
            raise RequestRefused("invalid_request", f"the prompt has ids outside the vocabulary of {vocabulary}")
        self._check_written(message)
        sampling = message.sampling
        if sampling.max_tokens < 1 and message.pooling is None:
            raise RequestRefused("invalid_request", f"max_tokens is {sampling.max_tokens}; it must be at least 1")
        beam = message.beam
        if beam is not None and self.spec.runner == "scripted":
            raise RequestRefused("invalid_request", "a script is one answer: there are no others to search")
        if beam is not None and 2 * beam.width > vocabulary:
            raise RequestRefused(
                "invalid_request",
                f"a beam search of width {beam.width} needs a vocabulary of {2 * beam.width}; it is {vocabulary}",
                param="width",
            )
        if beam is not None and not 1 <= beam.width <= self.limits.max_num_seqs:
            raise RequestRefused(
                "invalid_request",
                f"a beam search of width {beam.width} needs as many seats; "
                f"the engine has {self.limits.max_num_seqs}",
                param="width",
            )
        if beam is not None and sampling.structured is not None:
            raise RequestRefused("invalid_grammar", "a beam search cannot be held to it")
        for name, ids in _named_ids(sampling):
            if not all(0 <= token < vocabulary for token in ids):
                raise RequestRefused("invalid_request", f"{name} has ids outside the vocabulary of {vocabulary}")
        if not all(sampling.bad_words):
            raise RequestRefused("invalid_request", "bad_words has an entry without ids")
        entries = sampling.logprob_entries(len(message.token_ids), vocabulary)
        if entries > MAX_LOGPROB_ENTRIES:
            raise RequestRefused(
                "invalid_request",
                f"{entries} log-probabilities are asked for, above the limit of {MAX_LOGPROB_ENTRIES}",
            )
        if entries and sampling.asks_for_many:
            scheduler = self._scheduler
            for other in (*scheduler.running, *scheduler.waiting):
                entries += other.draw.sampling.logprob_entries(other.num_prompt, vocabulary)
            if entries > MAX_LIVE_ENTRIES:
                raise RequestRefused("queue_full", "as many log-probabilities are being made as the engine holds")
        if sampling.script is not None:
            self._check_script(sampling, sampling.script)

    def _check_written(self, message: Generate) -> None:
        """What is said to be written already has to be a beginning of the answer that is asked for."""
        written, vocabulary = message.written, self.profile.vocab_size
        if not written:
            return
        if message.beam is not None or message.pooling is not None:
            raise RequestRefused("invalid_request", "only an answer that is drawn can be gone on with")
        if min(written) < 0 or max(written) >= vocabulary:
            raise RequestRefused("invalid_request", f"the answer has ids outside the vocabulary of {vocabulary}")
        if len(written) >= message.sampling.max_tokens:
            raise RequestRefused(
                "invalid_request",
                f"the answer has {len(written)} tokens of {message.sampling.max_tokens}: there is none to draw",
            )

    def _check_pooling(self, message: Generate, pooling: Pooling) -> None:
        hidden = self.profile.hidden_size
        if message.beam is not None:
            raise RequestRefused(
                "invalid_request", "a beam search has no vector: pooling and beam exclude each other"
            )
        if self.spec.runner == "scripted":
            raise RequestRefused("invalid_request", "the scripted runner has no hidden states to make a vector of")
        if pooling.dimensions is not None and not 1 <= pooling.dimensions <= hidden:
            raise RequestRefused(
                "invalid_request",
                f"dimensions is {pooling.dimensions}; this model's vectors have {hidden}",
                param="dimensions",
            )

    def _check_script(self, sampling: Sampling, script: tuple[int, ...]) -> None:
        vocabulary = self.profile.vocab_size
        if self.spec.runner != "scripted":
            raise RequestRefused("invalid_request", "a script is for engines with the scripted runner alone")
        if not script and (sampling.ignore_eos or sampling.min_tokens or not self.profile.eos_token_ids):
            raise RequestRefused("invalid_request", "the script is empty, and the request is not to end with it")
        if script and not 0 <= min(script) <= max(script) < vocabulary:
            raise RequestRefused("invalid_request", f"the script has ids outside the vocabulary of {vocabulary}")

    # ── steps ─────────────────────────────────────────────────────────────────────────────────────────

    def step(self) -> list[Delta]:
        """Compute one step for whoever is due; one delta for each request that got a token or ended.

        With asynchronous scheduling what is computed comes with the next call.
        """
        scheduler = self._scheduler
        deltas = scheduler.expire(self._clock())
        if self._ahead is not None:
            done = self._ahead.exchange(scheduler.schedule())
            deltas += [] if done is None else scheduler.commit(*done)
        elif scheduler.has_work:
            plan = scheduler.schedule()
            deltas += scheduler.commit(plan, self._execute(plan))
        self._last_step_at = self._clock()
        return self._searches.follow(deltas, self._scheduler) if self._searches else deltas

    def _execute(self, plan: StepPlan) -> StepResult:
        """The plan's result, failures in place of exceptions. Raises `DeviceLost` when no step can succeed."""
        try:
            return self.runner.execute(plan)
        except torch.AcceleratorError as error:
            raise DeviceLost(str(error)) from error
        except Exception as error:
            log.exception("step failed: %s", plan)
            if len(plan.items) == 1:
                failure = ("internal_error", f"the engine failed on this request: {type(error).__name__}")
                return StepResult({}, failures={plan.items[0].request_id: failure})
        alone = [
            self._execute(StepPlan(plan.step, (item,), copies=plan.copies if item is plan.items[0] else ()))
            for item in plan.items
        ]
        return StepResult(
            tokens={name: token for result in alone for name, token in result.tokens.items()},
            logprobs={name: entry for result in alone for name, entry in result.logprobs.items()},
            prompt_logprobs={name: found for result in alone for name, found in result.prompt_logprobs.items()},
            failures={name: failure for result in alone for name, failure in result.failures.items()},
            states={name: states for result in alone for name, states in result.states.items()},
        )

    def warm_up(self) -> None:
        """Make ready for all steps and generate one token, which is forgotten: the first request of a user pays no
        first-time cost.
        """
        with self._plan().explained("the first steps ran"):
            self.runner.warm_up(_WARM_UP_SECONDS)
        self.add(Generate(_WARM_UP, [0], Sampling(max_tokens=1, temperature=0.0)))
        while self.has_work:
            for delta in self.step():
                if delta.error is not None:
                    raise DeviceUnavailable(f"the first token could not be generated: {delta.error}")
        self._scheduler.counters = Counters()

    @property
    def steps(self) -> int:
        """Steps since the engine became ready."""
        return self._scheduler.counters.steps

    # ── knobs and gauges ──────────────────────────────────────────────────────────────────────────────

    def set_limits(self, limits: Limits) -> None:
        """Apply hot knobs from the next step on. Raises `StartError`, and changes nothing, if they cannot hold."""
        changed = BatchLimits.of(limits)
        self._plan(changed)
        self._scheduler.set_limits(changed)
        self.runner.set_seats(changed.max_num_seqs)
        self.hot_hash = limits.hot_hash

    def _plan(self, limits: BatchLimits | None = None) -> MemoryPlan:
        return MemoryPlan.of(self.spec, self.profile, limits, [adapter.profile for adapter in self.adapters])

    @property
    def limits(self) -> BatchLimits:
        return self._scheduler.limits

    def slots(self) -> SlotCounts:
        """The cache's use between steps; averaged over time, (allocated - used) / allocated is what is wasted."""
        pool = self._scheduler.pool
        return SlotCounts(pool.num_used * pool.block_size, self._scheduler.slots_used)

    def stats(self) -> Stats:
        scheduler, counters = self._scheduler, self._scheduler.counters
        return Stats(
            steps=counters.steps,
            max_num_seqs=scheduler.limits.max_num_seqs,
            last_step_at=self._last_step_at,
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            blocks_total=scheduler.pool.num_blocks,
            blocks_used=scheduler.pool.num_used,
            kv_slots_used=scheduler.slots_used,
            preemptions=counters.preemptions,
            prompt_tokens=counters.prompt_tokens,
            generation_tokens=counters.generation_tokens,
            prefix_queried_tokens=counters.prefix_queried_tokens,
            prefix_hit_tokens=counters.prefix_hit_tokens,
            blocks_cached=scheduler.pool.num_idle,
            hot_hash=self.hot_hash,
            oldest_running_at=scheduler.oldest_running_at,
            blocks_saved=scheduler.blocks_saved,
            computed_tokens=counters.computed_tokens,
            steps_by_tokens=tuple(counters.steps_by_tokens),
        )

    def check_integrity(self) -> None:
        """Raise `InvariantBroken` unless all books balance. For tests and idle moments."""
        self._scheduler.check_integrity()


def _named_ids(sampling: Sampling) -> Iterator[tuple[str, Iterable[int]]]:
    """The ids that a request names, by field. Those that end it may lie outside: they are then never drawn."""
    yield "logit_bias", sampling.logit_bias
    yield "allowed_token_ids", sampling.allowed_token_ids
    yield "logprob_token_ids", sampling.logprob_token_ids
    yield "bad_words", itertools.chain.from_iterable(sampling.bad_words)
    if sampling.thinking is not None:
        yield "thinking", (*sampling.thinking.opening, *sampling.thinking.closing)


# ── figures ───────────────────────────────────────────────────────────────────────────────────────────────


def _device(spec: EngineSpec) -> torch.device:
    if spec.device == "cuda" and not torch.cuda.is_available():
        raise DeviceUnavailable("the spec asks for cuda; torch sees no such device here")
    return torch.device(spec.device)


def _check_length(spec: EngineSpec, profile: ModelProfile) -> None:
    if spec.max_model_len > profile.max_position_embeddings:
        raise InvalidSpec(
            f"max_model_len {spec.max_model_len} is above the checkpoint's {profile.max_position_embeddings} "
            "positions"
        )
