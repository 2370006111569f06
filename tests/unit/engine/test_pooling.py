"""Pooled hidden states against transformers, whatever the schedule: chunks, preemption, company, a step ahead.

float32. The tolerance is max|d| <= 1e-5 on vectors of length 1: states of these models are computed to about 1e-6
of their size on either side, and the means of chunks are added up in double precision.
"""

from __future__ import annotations

import itertools
import random
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from tests.effort import EFFORT, examples
from tests.engine_specs import run, tiny_spec
from tests.unit.engine.test_models import CASES, build
from transformers import AutoModel

from quire import LLM, SamplingParams
from quire.builtin import path as builtin_path
from quire_engine.blocks import BlockPool
from quire_engine.config import BatchLimits
from quire_engine.engine import Engine
from quire_engine.errors import RequestRefused
from quire_engine.pooling import Pool
from quire_engine.request import Request
from quire_engine.runner import ModelRunner
from quire_engine.scheduler import Scheduler
from quire_engine.step import StepPlan, StepResult
from quire_schemas.wire import Delta, Generate, Pooling, Sampling

TOLERANCE = 1e-5
NOTHING = Sampling(max_tokens=0)
GREEDY = Sampling(max_tokens=20, temperature=0.0, ignore_eos=True)
Vector = npt.NDArray[np.float64]


def states_of(model: Any, prompts: list[list[int]]) -> list[Vector]:
    """The reference's last hidden states, one prompt at a time, without padding."""
    with torch.inference_mode():
        return [model(torch.tensor([ids])).last_hidden_state[0].double().numpy() for ids in prompts]


def expect(states: Vector, pooling: Pooling) -> Vector:
    vector: Vector = states.mean(0) if pooling.kind == "mean" else states[-1]
    vector = vector[: pooling.dimensions]
    if pooling.normalize:
        vector = vector / float(np.linalg.norm(vector))
    return vector


def vector_of(deltas: list[Delta]) -> Vector:
    (delta,) = deltas
    assert (delta.finish_reason, delta.token_ids) == ("stop", ())
    assert delta.timings is not None
    assert delta.timings.finished_at is not None
    assert delta.embedding is not None
    return np.frombuffer(delta.embedding, "<f4").astype(np.float64)


def gap(ours: Vector, theirs: Vector) -> float:
    assert ours.shape == theirs.shape
    return float(np.abs(ours - theirs).max() / max(1.0, np.abs(theirs).max()))


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    rng = random.Random(3)
    return [[rng.randrange(3, 2048) for _ in range(length)] for length in (1, 15, 17, 33, 64, 100)]


@pytest.fixture(scope="module")
def states(prompts: list[list[int]]) -> list[Vector]:
    torch.set_num_threads(1)
    return states_of(AutoModel.from_pretrained(str(builtin_path()), dtype=torch.float32).eval(), prompts)


WAYS = [
    pytest.param(chunk, pool, ahead, marks=() if (chunk == 16) == (pool == "preempted") else pytest.mark.nightly)
    for chunk, pool, ahead in itertools.product([16, None], ["roomy", "preempted"], [False, True])
]


@pytest.mark.parametrize(("chunk", "pool", "ahead"), WAYS, ids=lambda value: str(value or "whole"))
def test_every_way_gives_the_vectors_of_transformers(
    prompts: list[list[int]], states: list[Vector], chunk: int | None, pool: str, ahead: bool
) -> None:
    """Both kinds of all prompts in one batch, with requests that generate: their tokens do not change either.

    Where they are to be preempted, requests that go first come in between and take all the blocks.
    """
    engine = Engine.load(
        tiny_spec(
            block_size=4,
            num_blocks=64 if pool == "preempted" else 512,
            max_num_seqs=24,
            max_num_batched_tokens=chunk or 1024,
            prefix_caching=True,
            policy="priority",
            async_scheduling=ahead,
        )
    )
    expected = run(engine, *(Generate(f"g{n}", [5 + n], GREEDY, priority=1) for n in range(3)))
    wanted: dict[str, Pooling] = {}
    for number in range(len(prompts)):
        wanted |= {f"mean{number}": Pooling("mean"), f"last{number}": Pooling("last")}
    for n in range(3):
        engine.add(Generate(f"g{n}", [5 + n], GREEDY, priority=1))
    for name, pooling in wanted.items():
        engine.add(Generate(name, list(prompts[int(name[4:])]), NOTHING, priority=1, pooling=pooling))
    heard: dict[str, list[Delta]] = {}
    for step in itertools.count():
        if not engine.has_work:
            break
        if pool == "preempted" and step % 17 == 5 and step < 80:
            engine.add(Generate(f"urgent{step}", [step] * 200, Sampling(1)))
        for delta in engine.step():
            heard.setdefault(delta.id, []).append(delta)
        engine.check_integrity()
    for name, pooling in wanted.items():
        assert gap(vector_of(heard[name]), expect(states[int(name[4:])], pooling)) <= TOLERANCE, name
    for name, deltas in expected.items():
        assert [delta.token_ids for delta in heard[name]] == [delta.token_ids for delta in deltas]
    assert engine.stats().blocks_used == 0
    lost = [name for name in wanted if (found := heard[name][0].timings) is not None and found.preempted_at]
    if pool == "roomy":
        assert not lost
    elif chunk:
        assert "mean" in {name[:4] for name in lost}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in ("qwen2-sliding", "llama-biases", "qwen3") else pytest.mark.nightly)
        for name in CASES
    ],
)
def test_every_architecture_agrees(name: str, tmp_path: Path) -> None:
    model = build(name, tmp_path)
    rng = random.Random(5)
    prompts = [[rng.randrange(97) for _ in range(length)] for length in (1, 7, 40)]
    expected = states_of(model.model, prompts)
    engine = Engine.load(
        tiny_spec(model_dir=str(tmp_path), max_model_len=128, block_size=8, max_num_batched_tokens=16)
    )
    for kind, (number, ids) in itertools.product(("mean", "last"), enumerate(prompts)):
        pooling = Pooling(kind)  # type: ignore[arg-type]
        (deltas,) = run(engine, Generate("a", list(ids), NOTHING, pooling=pooling)).values()
        assert gap(vector_of(deltas), expect(expected[number], pooling)) <= TOLERANCE


@pytest.mark.parametrize(
    "pooling",
    [
        Pooling("mean", normalize=False),
        Pooling("last", normalize=False, dimensions=7),
        Pooling("mean", dimensions=1),
        Pooling("last", dimensions=32),
    ],
)
def test_dimensions_are_cut_before_the_length_is_made_one(
    prompts: list[list[int]], states: list[Vector], pooling: Pooling
) -> None:
    engine = Engine.load(tiny_spec(max_num_batched_tokens=16))
    (deltas,) = run(engine, Generate("a", list(prompts[3]), NOTHING, pooling=pooling)).values()
    assert gap(vector_of(deltas), expect(states[3], pooling)) <= TOLERANCE


def test_last_uses_the_prefix_cache_and_mean_does_not(prompts: list[list[int]], states: list[Vector]) -> None:
    engine = Engine.load(tiny_spec(block_size=8, prefix_caching=True))
    for round_ in range(2):
        heard = run(engine, Generate("a", list(prompts[4]), NOTHING, pooling=Pooling("last")))["a"]
        assert heard[0].timings is not None
        assert heard[0].timings.cached_tokens == 56 * round_
        assert gap(vector_of(heard), expect(states[4], Pooling("last"))) <= TOLERANCE
    heard = run(engine, Generate("a", list(prompts[4]), NOTHING, pooling=Pooling("mean")))["a"]
    assert heard[0].timings is not None
    assert heard[0].timings.cached_tokens == 0
    assert gap(vector_of(heard), expect(states[4], Pooling("mean"))) <= TOLERANCE


def test_a_prompt_may_fill_the_whole_context_and_the_whole_cache() -> None:
    engine = Engine.load(tiny_spec(max_model_len=64, block_size=16, num_blocks=4))
    vector_of(run(engine, Generate("a", [7] * 64, NOTHING, pooling=Pooling("mean")))["a"])
    with pytest.raises(RequestRefused, match="above the context of 64"):
        engine.add(Generate("a", [7] * 65, NOTHING, pooling=Pooling("mean")))


@pytest.mark.parametrize("dimensions", [0, -1, 100_000])
def test_dimensions_that_a_model_does_not_have_are_refused(dimensions: int) -> None:
    engine = Engine.load(tiny_spec())
    with pytest.raises(RequestRefused, match=f"dimensions is {dimensions}; this model's vectors have"):
        engine.add(Generate("a", [5], NOTHING, pooling=Pooling("last", dimensions=dimensions)))
    with pytest.raises(RequestRefused, match="max_tokens is 0"):
        engine.add(Generate("a", [5], NOTHING))
    with pytest.raises(RequestRefused, match="no hidden states"):
        Engine.load(tiny_spec(runner="scripted")).add(Generate("a", [5], NOTHING, pooling=Pooling("last")))


# ── the fence ─────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("ahead", [False, True], ids=["in turn", "a step ahead"])
def test_states_that_are_not_finite_and_steps_that_fail_end_their_request_alone(
    prompts: list[list[int]], states: list[Vector], monkeypatch: pytest.MonkeyPatch, ahead: bool
) -> None:
    engine = Engine.load(tiny_spec(max_num_batched_tokens=16, async_scheduling=ahead))
    runner = engine.runner
    assert isinstance(runner, ModelRunner)
    forward, execute = runner.model.forward, runner.execute

    def poisoned(token_ids: Any, batches: Any, kv: Any, adapters: Any) -> Any:
        found = forward(token_ids, batches, kv, adapters)
        for row, index in enumerate(batches[0].logits_rows.tolist()):
            if int(token_ids[index]) == 99:
                found[row, 3] = float("inf")
        return found

    def failing(plan: StepPlan) -> StepResult:
        if any(666 in item.token_ids for item in plan.items):
            raise RuntimeError("planted")
        return execute(plan)

    monkeypatch.setattr(runner.model, "forward", poisoned)
    monkeypatch.setattr(runner, "execute", failing)
    long = [7] * 40
    heard = run(
        engine,
        Generate("good", list(prompts[3]), NOTHING, pooling=Pooling("mean")),
        Generate("inf", [5, 99, *long], NOTHING, pooling=Pooling("mean")),
        Generate("raises", [*long, 666], NOTHING, pooling=Pooling("mean")),
        Generate("unread", [5, 99, *long], NOTHING, pooling=Pooling("last")),
    )
    assert [delta.error_code for delta in heard["inf"]] == ["numerical_error"]
    assert [delta.error_code for delta in heard["raises"]] == ["internal_error"]
    assert gap(vector_of(heard["good"]), expect(states[3], Pooling("mean"))) <= TOLERANCE
    vector_of(heard["unread"])


# ── without a model ───────────────────────────────────────────────────────────────────────────────────────


def test_no_schedule_loses_or_doubles_a_state() -> None:
    """Every token's state is its id: a mean tells whether each was taken once, in the request's last life."""
    rng = random.Random(EFFORT)
    lost = 0
    for _ in range(examples(40)):
        limits = BatchLimits(rng.randint(1, 6), rng.choice([3, 8, 30]), True)
        scheduler = Scheduler(BlockPool(12, 4), limits, max_model_len=48)
        live: dict[str, list[int]] = {}
        for number in range(8):
            ids = [rng.randrange(1000) for _ in range(rng.randint(1, 40))]
            pooling = Pooling("mean" if rng.random() < 0.5 else "last", normalize=False)
            message = Generate(f"{pooling.kind}{number}", ids, NOTHING, pooling=pooling)
            if number % 3 == 2:
                message = Generate(f"g{number}", ids[:9], Sampling(30))
            else:
                live[message.id] = ids
            scheduler.add(Request.of(message, eos_token_ids=(), seed=0, received_at=0.0))
        given_out: list[StepPlan] = []
        while scheduler.has_work:
            plan = scheduler.schedule()
            lost += len(plan.preempted)
            if plan.items:
                given_out.append(plan)
            if len(given_out) < 2 and rng.random() < 0.5 and plan.items:
                continue
            done = given_out.pop(0)
            states = {
                item.request_id: np.array([sum(item.token_ids[-item.pooled :])], "<f4").tobytes()
                for item in done.items
                if item.pooled
            }
            drawn = {item.request_id: 5 for item in done.items if item.draw is not None}
            for delta in scheduler.commit(done, StepResult(drawn, states=states)):
                if delta.id in live:
                    ids = live.pop(delta.id)
                    value = sum(ids) / len(ids) if delta.id.startswith("mean") else ids[-1]
                    assert vector_of([delta]) == pytest.approx([value], rel=1e-6)
            scheduler.check_integrity()
        assert not live
        for plan in given_out:
            assert scheduler.commit(plan, StepResult({}, states={})) == []
    assert lost > 10


def test_a_vector_without_length_stays_as_it_is() -> None:
    pool = Pool(Pooling("mean"), 2)
    pool.add(bytes(8))
    assert pool.vector() == bytes(8)
    pool.clear()
    with pytest.raises(ValueError, match="no state"):
        pool.vector()


# ── offline ───────────────────────────────────────────────────────────────────────────────────────────────


def test_llm_embeds_text_and_ids(prompts: list[list[int]], states: list[Vector]) -> None:
    llm = LLM("builtin://tiny", dtype="float32", max_model_len=256, num_blocks=64, threads=1)
    outputs = llm.embed(prompts[:4], pooling="mean", dimensions=16)
    for output, ids, found in zip(outputs, prompts, states, strict=False):
        assert output.prompt_token_ids == ids
        vector = np.array(output.outputs.embedding)
        assert gap(vector, expect(found, Pooling("mean", dimensions=16))) <= TOLERANCE
        assert np.linalg.norm(vector) == pytest.approx(1, abs=1e-6)
    (text,) = llm.embed("When the")
    (ids_,) = llm.embed([llm.tokenizer.encode("When the")])
    assert text.outputs.embedding == pytest.approx(ids_.outputs.embedding, abs=1e-6)
    assert len(text.outputs.embedding) == llm.profile.hidden_size
    (bare,) = llm.embed("When the", normalize=False)
    assert np.linalg.norm(bare.outputs.embedding) != pytest.approx(1, abs=0.1)
    with pytest.raises(ValueError, match="pooling must be one of last, mean, not 'max'"):
        llm.embed("a", pooling="max")  # type: ignore[arg-type]
    with pytest.raises(RequestRefused, match="above the context"):
        llm.embed([[5], [5] * 300])
    assert not llm.engine.has_work
    assert llm.generate("When the", SamplingParams(max_tokens=2))[0].finished
