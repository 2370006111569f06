"""The engine in one process on the built-in model: refusals, the fence around a step, seeds, books and figures."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from tests.effort import EFFORT, examples
from tests.engine_specs import run, tiny_spec
from torch import Tensor

from quire.builtin import path as builtin_path
from quire_engine.engine import Engine, SlotCounts
from quire_engine.errors import (
    DeviceLost,
    InvalidSpec,
    InvariantBroken,
    MemoryMismatch,
    OutOfMemory,
    RequestRefused,
)
from quire_engine.memory import MemoryPlan, allocator_share
from quire_engine.models import KVCache
from quire_engine.runner import ModelRunner
from quire_engine.step import StepPlan, StepResult
from quire_engine.trace import replay
from quire_schemas.checkpoint import read_profile
from quire_schemas.gpu_sizing import CONTEXT
from quire_schemas.quantities import format_bytes
from quire_schemas.signals import ITERATION_TOKENS_BUCKETS
from quire_schemas.sizing import activation_bytes, kv_bytes_per_token, weight_bytes
from quire_schemas.wire import Delta, EngineSpec, Generate, Limits, Sampling

SPEC = tiny_spec(max_model_len=256, block_size=8, num_blocks=64)
PROMPT = [50, 60, 70, 80, 90]


@pytest.fixture(scope="module")
def shared() -> Engine:
    """One engine for tests that leave it empty."""
    return Engine.load(SPEC)


def model_runner(engine: Engine) -> ModelRunner:
    assert isinstance(engine.runner, ModelRunner)
    return engine.runner


def with_fields(**fields: Any) -> EngineSpec:
    return msgspec.structs.replace(SPEC, **fields)


def params(max_tokens: int = 8, **fields: Any) -> Sampling:
    return Sampling(max_tokens=max_tokens, ignore_eos=True, **fields)


GREEDY = params(temperature=0.0)


def tokens(deltas: list[Delta]) -> list[int]:
    return [token for delta in deltas for token in delta.token_ids]


# ── refusals ──────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("token_ids", "sampling", "code", "message"),
    [
        ([], params(), "invalid_request", "no tokens"),
        ([1, 2048], params(), "invalid_request", "outside the vocabulary of 2048"),
        ([1, -1], params(), "invalid_request", "outside the vocabulary of 2048"),
        ([1], params(0), "invalid_request", "max_tokens is 0"),
        ([1], params(-5), "invalid_request", "max_tokens is -5"),
        ([1], params(logit_bias={2048: 1.0}), "invalid_request", "logit_bias"),
        ([1] * 200, params(57), "context_length_exceeded", "make 257, above the context of 256"),
        ([1] * 300, params(), "context_length_exceeded", "above the context of 256"),
    ],
)
def test_a_request_that_would_break_a_step_never_enters(
    shared: Engine, token_ids: list[int], sampling: Sampling, code: str, message: str
) -> None:
    with pytest.raises(RequestRefused, match=message) as error:
        shared.add(Generate("bad", token_ids, sampling))
    assert error.value.code == code
    assert not shared.has_work


# ── the fence ─────────────────────────────────────────────────────────────────────────────────────────────


class Faulty(ModelRunner):
    """A runner in which a request with a certain token in its share of a step fails."""

    poison = 666
    error: Callable[[], Exception] = staticmethod(lambda: RuntimeError("planted"))

    def execute(self, plan: StepPlan) -> StepResult:
        if any(self.poison in item.token_ids for item in plan.items):
            raise self.error()
        return super().execute(plan)


def faulty_engine(**fields: Any) -> Engine:
    engine = Engine.load(with_fields(**fields))
    real = model_runner(engine)
    engine.runner = Faulty(
        real.model,
        real.kv,
        block_size=real.block_size,
        head_rows=real.head_rows,
        device=real.device,
        masks=real.masks,
    )
    return engine


@pytest.mark.parametrize("ahead", [False, True], ids=["in turn", "a step ahead"])
def test_a_request_on_which_the_model_fails_ends_alone(shared: Engine, ahead: bool) -> None:
    neighbours = [Generate(f"good{i}", [*PROMPT, i], GREEDY) for i in range(3)]
    expected = run(shared, *msgspec.convert(msgspec.to_builtins(neighbours), list[Generate]))
    engine = faulty_engine(async_scheduling=ahead)
    heard = run(engine, *neighbours[:1], Generate("bad", [1, 666, 2], GREEDY), *neighbours[1:])
    assert heard["bad"][0].error_code == "internal_error"
    assert "planted" not in (heard["bad"][0].error or ""), "what failed inside is for the log"
    for name, deltas in expected.items():
        assert tokens(heard[name]) == tokens(deltas)


@pytest.mark.parametrize("ahead", [False, True], ids=["in turn", "a step ahead"])
def test_an_exception_at_any_step_fails_those_it_is_about_and_leaks_nothing(shared: Engine, ahead: bool) -> None:
    """At step k the forward of a batch fails: once, which nobody notices, or for one request, which ends alone."""
    rng = random.Random(EFFORT)
    names = [f"r{number}" for number in range(6)]
    prompts = {name: [*PROMPT, number] for number, name in enumerate(names)}
    expected = run(shared, *(Generate(name, list(prompts[name]), GREEDY) for name in names))
    engine = faulty_engine(async_scheduling=ahead)
    real = engine.runner.execute
    for _ in range(examples(10)):
        fails_at = engine.steps + rng.randrange(8)
        victim = rng.choice([None, *names])

        def execute(plan: StepPlan, at: int = fails_at, victim: str | None = victim) -> StepResult:
            if plan.step == at and (len(plan.items) > 1 or plan.items[0].request_id == victim):
                raise RuntimeError("planted")
            return real(plan)

        engine.runner.execute = execute  # type: ignore[method-assign]
        heard = run(engine, *(Generate(name, list(prompts[name]), GREEDY) for name in names))
        for name in names:
            if name == victim:
                assert heard[name][-1].error_code == "internal_error"
                assert tokens(heard[name]) == tokens(expected[name])[: fails_at - (engine.steps - 8)]
            else:
                assert tokens(heard[name]) == tokens(expected[name])
        assert engine.slots() == SlotCounts(0, 0)


@pytest.mark.parametrize("ahead", [False, True], ids=["in turn", "a step ahead"])
def test_a_lost_device_is_not_blamed_on_requests(ahead: bool) -> None:
    engine = faulty_engine(async_scheduling=ahead)
    assert isinstance(engine.runner, Faulty)
    engine.runner.error = lambda: torch.AcceleratorError("planted")
    engine.add(Generate("a", [666], GREEDY))
    with pytest.raises(DeviceLost, match="planted"):
        for _ in range(2):
            engine.step()


@pytest.mark.parametrize("ahead", [False, True], ids=["in turn", "a step ahead"])
def test_logits_that_are_not_finite_end_their_request_alone(
    shared: Engine, monkeypatch: pytest.MonkeyPatch, ahead: bool
) -> None:
    expected = run(shared, Generate("a", list(PROMPT), GREEDY))["a"]
    spec = with_fields(async_scheduling=ahead)
    engine = Engine(spec, shared.profile, shared.runner)
    forward = model_runner(shared).model.forward

    def poisoned(token_ids: Tensor, batches: Any, kv: KVCache, adapters: Any) -> Tensor:
        states = forward(token_ids, batches, kv, adapters)
        for row, index in enumerate(batches[0].logits_rows.tolist()):
            if int(token_ids[index]) == 99:
                states[row, 7] = float("nan")
        return states

    monkeypatch.setattr(model_runner(shared).model, "forward", poisoned)
    heard = run(engine, Generate("bad", [5, 99], GREEDY), Generate("a", list(PROMPT), GREEDY))
    assert [delta.error_code for delta in heard["bad"]] == ["numerical_error"]
    assert tokens(heard["a"]) == tokens(expected)


# ── sampling through the whole engine ─────────────────────────────────────────────────────────────────────


def test_a_seeded_request_says_the_same_alone_in_company_and_after_preemption(shared: Engine) -> None:
    seeded = params(24, temperature=1.3, top_p=0.95, seed=11, frequency_penalty=0.3)
    alone = tokens(run(shared, Generate("a", list(PROMPT), seeded))["a"])
    company = [Generate(f"n{i}", [100 + i] * (i + 1), params(24, temperature=2.0)) for i in range(6)]
    assert tokens(run(shared, *company, Generate("a", list(PROMPT), seeded))["a"]) == alone
    tight = Engine.load(with_fields(num_blocks=14, block_size=4))
    company = [Generate(f"n{i}", [100 + i] * (i + 1), params(24, temperature=2.0)) for i in range(3)]
    heard = run(tight, *company, Generate("a", list(PROMPT), seeded))
    timings = heard["a"][-1].timings
    assert timings is not None
    assert timings.preempted_at
    assert timings.scheduled_at is not None
    assert timings.finished_at is not None
    assert timings.scheduled_at < timings.preempted_at[0] <= timings.preempted_at[-1] < timings.finished_at
    assert tokens(heard["a"]) == alone


def test_requests_without_a_seed_differ_and_a_restart_with_the_same_spec_repeats_them() -> None:
    def said(spec: EngineSpec) -> list[list[int]]:
        heard = run(Engine.load(spec), *(Generate(f"{i}", [5], params(temperature=2.0)) for i in range(3)))
        return [tokens(deltas) for deltas in heard.values()]

    first = said(SPEC)
    assert len({tuple(answer) for answer in first}) == 3
    assert said(SPEC) == first
    assert said(with_fields(seed=1)) != first
    assert said(with_fields(replica_id="tiny-1")) != first, "replicas do not echo each other"


def test_stop_ids_min_tokens_bias_and_logprobs_reach_the_sampler(shared: Engine) -> None:
    plain = tokens(run(shared, Generate("a", list(PROMPT), GREEDY))["a"])
    stop = plain[0]
    stopped = run(shared, Generate("a", list(PROMPT), params(temperature=0.0, stop_token_ids=(stop,))))["a"]
    assert [(d.token_ids, d.finish_reason, d.stop_token_id) for d in stopped] == [((), "stop", stop)]
    patient = params(temperature=0.0, stop_token_ids=(stop,), min_tokens=3)
    assert stop not in tokens(run(shared, Generate("a", list(PROMPT), patient))["a"])[:3]
    forced = run(
        shared, Generate("a", list(PROMPT), params(4, temperature=0.0, logit_bias={9: 100.0}, logprobs=2))
    )
    assert tokens(forced["a"]) == [9, 9, 9, 9]
    for delta in forced["a"]:
        assert delta.logprobs is not None
        assert delta.logprobs[0].token_id == 9
        assert len(delta.logprobs[0].top) == 2
        assert delta.logprobs[0].top[0][1] >= delta.logprobs[0].top[1][1] >= delta.logprobs[0].logprob


# ── books ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_stats_slots_and_timings_tell_what_happened() -> None:
    times = itertools.count(100.0)
    loaded = Engine.load(SPEC)
    engine = Engine(SPEC, loaded.profile, loaded.runner, clock=lambda: next(times))
    engine.warm_up()
    stats = engine.stats()
    assert (stats.steps, stats.generation_tokens, stats.blocks_used, stats.blocks_total) == (0, 0, 0, 64)
    engine.add(Generate("a", [1] * 10, params(3, temperature=0.0)), received_at=50.0)
    (first,) = engine.step()
    assert (engine.slots().allocated, engine.slots().used) == (16, 10)
    engine.step()
    stats = engine.stats()
    assert (stats.running, stats.waiting, stats.blocks_used, stats.kv_slots_used) == (1, 0, 2, 11)
    (last,) = engine.step()
    timings = last.timings
    assert timings is not None
    assert timings.received_at == 50.0
    assert first.timings == msgspec.structs.replace(timings, finished_at=None)
    assert timings.scheduled_at is not None
    assert timings.first_token_at is not None
    assert timings.finished_at is not None
    assert 100.0 < timings.scheduled_at < timings.first_token_at < timings.finished_at
    stats = engine.stats()
    assert (stats.steps, stats.running, stats.blocks_used, stats.kv_slots_used) == (3, 0, 0, 0)
    assert (stats.prompt_tokens, stats.generation_tokens, stats.hot_hash) == (10, 3, "h0")
    by_tokens = dict(zip(ITERATION_TOKENS_BUCKETS, stats.steps_by_tokens, strict=False))
    assert {bound: steps for bound, steps in by_tokens.items() if steps} == {1: 2, 16: 1}
    assert stats.computed_tokens == 10 + 1 + 1
    assert engine.step() == [], "an idle step is none"
    assert engine.steps == 3


def test_abort_gives_blocks_back_before_the_next_step(shared: Engine) -> None:
    shared.add(Generate("a", [1] * 30, params(50)))
    shared.add(Generate("b", [2] * 30, params(2)))
    shared.step()
    used = shared.stats().blocks_used
    assert shared.abort("a")
    assert shared.stats().blocks_used == used // 2
    assert not shared.abort("a")
    while shared.has_work:
        assert {delta.id for delta in shared.step()} <= {"b"}
    assert shared.stats().blocks_used == 0


def test_hot_limits_apply_from_the_next_step_and_impossible_ones_not_at_all() -> None:
    engine = Engine.load(SPEC)
    engine.set_limits(Limits("h1", 2, 16, False))
    assert (engine.stats().max_num_seqs, engine.stats().hot_hash) == (2, "h1")
    for impossible in (Limits("h2", 0, 16, True), Limits("h2", 4, 0, True)):
        with pytest.raises(InvalidSpec, match="at least 1"):
            engine.set_limits(impossible)
    with pytest.raises(MemoryMismatch, match="above the limit"):
        engine.set_limits(Limits("h2", 64, 1 << 22, True))
    assert (engine.stats().max_num_seqs, engine.stats().hot_hash) == (2, "h1")


@pytest.mark.parametrize("ahead", [False, True])
def test_what_an_engine_records_is_decided_again_without_it(ahead: bool, tmp_path: Path) -> None:
    engine = Engine.load(with_fields(async_scheduling=ahead, num_blocks=12))
    trace = tmp_path / "trace.jsonl"
    engine.record(trace)
    heard = run(engine, *(Generate(f"r{i}", [*PROMPT, i], params(24)) for i in range(6)))
    assert [len(tokens(deltas)) for deltas in heard.values()] == [24] * 6
    assert engine.stats().preemptions > 0
    pairs = list(replay(trace.read_bytes().splitlines()))
    assert len(pairs) >= engine.steps
    assert all(recorded == decided for recorded, decided in pairs)
    engine.add(Generate("late", list(PROMPT), GREEDY))
    with pytest.raises(InvariantBroken, match="idle"):
        engine.record(trace)


# ── figures ───────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(("kv_dtype", "block_size", "num_blocks"), [("float32", 8, 5), ("bfloat16", 16, 9)])
def test_what_is_allocated_is_what_the_arithmetic_says(
    dtype: str, kv_dtype: str, block_size: int, num_blocks: int
) -> None:
    spec = with_fields(dtype=dtype, kv_dtype=kv_dtype, block_size=block_size, num_blocks=num_blocks)
    engine = Engine.load(spec)
    profile = read_profile(builtin_path())
    assert sum(p.nbytes for p in model_runner(engine).model.parameters()) == weight_bytes(profile, dtype)
    per_token = kv_bytes_per_token(profile, kv_dtype)
    assert sum(tensor.nbytes for tensor in model_runner(engine).kv.tensors) == per_token * block_size * num_blocks
    assert len(tokens(run(engine, Generate("a", list(PROMPT), params(3)))["a"])) == 3


def test_an_engine_above_its_limit_is_refused_with_the_numbers_before_anything_is_read() -> None:
    profile = read_profile(builtin_path())
    weights = weight_bytes(profile, "float32")
    kv = kv_bytes_per_token(profile, "float32") * 8 * 64
    activations = activation_bytes(profile, "float32", 64, 8, 256)
    total = weights + kv + activations
    Engine.load(with_fields(memory_limit=total))
    with pytest.raises(MemoryMismatch) as error:
        Engine.load(with_fields(memory_limit=total - 1), on_progress=lambda done, total: pytest.fail("read"))
    for number in (weights, kv, activations, total, total - 1):
        assert str(number) in str(error.value)


def test_an_allocation_of_another_size_than_planned_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = KVCache.allocate

    def generous(profile: Any, num_blocks: int, *rest: Any) -> KVCache:
        return honest(profile, num_blocks + 1, *rest)

    monkeypatch.setattr(KVCache, "allocate", generous)
    with pytest.raises(MemoryMismatch, match=r"allocated weights .* planned were"):
        Engine.load(SPEC)


@pytest.mark.parametrize(
    ("place", "doing"),
    [
        ("load_model", "weights were loaded"),
        ("KVCache.allocate", "the cache was allocated"),
    ],
)
@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("tried 3 GiB"), RuntimeError("DefaultCPUAllocator: not enough"), MemoryError()],
)
def test_memory_that_cannot_be_had_is_told_with_the_arithmetic(
    place: str, doing: str, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def short(*_: Any, **__: Any) -> Any:
        raise error

    monkeypatch.setattr(f"quire_engine.engine.{place}", short)
    with pytest.raises(OutOfMemory) as shown:
        Engine.load(SPEC)
    plan = MemoryPlan.of(SPEC, read_profile(builtin_path()))
    text = str(shown.value)
    assert f"memory ran out while {doing}: planned are weights {format_bytes(plan.weights)} + KV " in text
    assert f"({SPEC.num_blocks} blocks of {SPEC.block_size} tokens)" in text
    assert f"within a limit of {format_bytes(SPEC.memory_limit)}\nhint: " in text
    assert shown.value.__cause__ is error


def test_memory_that_runs_out_in_the_first_steps_is_told_with_the_arithmetic() -> None:
    engine = Engine.load(SPEC)

    def short(seconds: float) -> None:
        raise torch.OutOfMemoryError("tried 3 GiB")

    engine.runner.warm_up = short  # type: ignore[method-assign]
    with pytest.raises(OutOfMemory, match="while the first steps ran: planned are weights"):
        engine.warm_up()


def test_other_errors_of_a_load_stay_what_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("another")

    monkeypatch.setattr("quire_engine.engine.load_model", broken)
    with pytest.raises(RuntimeError, match="another"):
        Engine.load(SPEC)


def test_torch_may_take_what_the_plan_leaves_it() -> None:
    total = 140 << 30
    assert allocator_share(100 << 30, total) == ((100 << 30) - CONTEXT) / total
    assert allocator_share(1 << 40, total) == 1.0
    assert allocator_share(1, total) == 0.0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_blocks": 0}, "num_blocks is 0"),
        ({"threads": 0}, "threads is 0"),
        ({"batch_invariant": True, "device": "cuda"}, "batch_invariant is kept on a CPU alone; device is cuda"),
        ({"max_model_len": 1}, "max_model_len is 1; it must be at least 2"),
        ({"max_num_seqs": 0}, "max_num_seqs 0"),
        ({"max_model_len": 4096}, "above the checkpoint's 2048 positions"),
    ],
)
def test_impossible_specs_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidSpec, match=message):
        Engine.load(with_fields(**fields))


def test_a_context_of_two_tokens_warms_up() -> None:
    engine = Engine.load(with_fields(max_model_len=2))
    engine.warm_up()
    assert engine.steps == 0


@pytest.mark.parametrize("prefix_caching", [True, False])
def test_six_answers_to_one_prompt_save_five_times_its_full_blocks(prefix_caching: bool) -> None:
    engine = Engine.load(with_fields(prefix_caching=prefix_caching))
    for index in range(6):
        sampling = Sampling(max_tokens=20, temperature=1.0, seed=index, ignore_eos=True)
        engine.add(Generate(str(index), list(range(5, 34)), sampling, family="f"))
    most = 0
    while engine.has_work:
        engine.step()
        engine.check_integrity()
        stats = engine.stats()
        most = max(most, stats.blocks_saved)
        if stats.running == 6:
            assert stats.blocks_saved == 5 * 3, "of 29 tokens in blocks of 8, three blocks are full"
    assert most == 5 * 3
    assert engine.stats().blocks_saved == 0
