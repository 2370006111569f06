"""The scripted runner in a whole engine: scripts come out token for token, whatever the schedule."""

from __future__ import annotations

import math
import random
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from tests.effort import EFFORT, examples
from tests.engine_specs import run, tiny_spec

from quire.builtin import path as builtin_path
from quire_engine.engine import Engine
from quire_engine.errors import InvalidSpec, InvariantBroken, RequestRefused
from quire_engine.scripted import ScriptedRunner
from quire_engine.step import Draw, Scheduled, StepPlan
from quire_schemas.wire import Delta, Generate, Limits, Sampling, TokenLogprobs

PROMPT = [50, 60, 70]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint without weights."""
    folder = tmp_path_factory.mktemp("bare")
    for name in ("config.json", "generation_config.json"):
        shutil.copy(builtin_path() / name, folder)
    return folder


def load(folder: Path, **fields: Any) -> Engine:
    return Engine.load(tiny_spec(model_dir=str(folder), runner="scripted", **fields))


@pytest.fixture(scope="module")
def shared(folder: Path) -> Engine:
    engine = load(folder)
    engine.warm_up()
    return engine


def scripted(max_tokens: int = 100, script: tuple[int, ...] | None = (9, 8, 7), **fields: Any) -> Sampling:
    return Sampling(max_tokens, script=script, **fields)


def said(deltas: list[Delta]) -> tuple[list[int], str | None]:
    return [token for delta in deltas for token in delta.token_ids], deltas[-1].finish_reason


@pytest.mark.parametrize(
    ("sampling", "token_ids", "finish"),
    [
        (scripted(), [9, 8, 7], "stop"),
        (scripted(2), [9, 8], "length"),
        (scripted(3), [9, 8, 7], "length"),
        (scripted(7, ignore_eos=True), [9, 8, 7, 9, 8, 7, 9], "length"),
        (scripted(min_tokens=4), [9, 8, 7, 9], "stop"),
        (scripted(stop_token_ids=(7,)), [9, 8], "stop"),
        (scripted(script=()), [], "stop"),
        (scripted(script=None), PROMPT, "stop"),
        (scripted(temperature=2.0, top_p=0.5, logit_bias={5: 100.0}, presence_penalty=2.0), [9, 8, 7], "stop"),
    ],
)
def test_a_script_comes_out_token_for_token(
    shared: Engine, sampling: Sampling, token_ids: list[int], finish: str
) -> None:
    assert said(run(shared, Generate("a", list(PROMPT), sampling))["a"]) == (token_ids, finish)


def test_a_script_is_certain(shared: Engine) -> None:
    deltas = run(shared, Generate("a", list(PROMPT), scripted(logprobs=2)))["a"]
    assert [delta.logprobs for delta in deltas[:3]] == [[TokenLogprobs(t, 0.0, ((t, 0.0),))] for t in (9, 8, 7)]
    (first, *_) = run(shared, Generate("a", list(PROMPT), scripted(logprobs=0)))["a"]
    assert first.logprobs == [TokenLogprobs(9, 0.0)]


def test_a_scripted_prompt_is_certain_too(shared: Engine) -> None:
    wishes = scripted(prompt_logprobs=1, logprob_token_ids=(PROMPT[1], 4), logprobs=0)
    deltas = run(shared, Generate("a", list(PROMPT), wishes))["a"]
    scores = [entry for delta in deltas for entry in delta.prompt_logprobs or ()]
    assert [(entry.token_id, entry.rank, entry.top) for entry in scores] == [
        (t, 1, ((t, 0.0),)) for t in PROMPT[1:]
    ]
    assert scores[0].named == (0.0, -math.inf)


@pytest.mark.parametrize("ahead", [False, True], ids=["in turn", "a step ahead"])
def test_no_schedule_changes_a_script(folder: Path, ahead: bool) -> None:
    """Any chunks, few seats, so few blocks that requests lose theirs, shared prefixes, aborts of others."""
    rng = random.Random(EFFORT)
    engine = load(folder, block_size=4, num_blocks=30, max_num_seqs=6, prefix_caching=True, async_scheduling=ahead)
    for round_ in range(examples(15)):
        engine.set_limits(Limits("h", rng.randint(1, 6), rng.choice([3, 16, 64]), True))
        head = [rng.randrange(2048) for _ in range(12)]
        scripts = {f"{round_}-{n}": [rng.randrange(3, 2048) for _ in range(rng.randint(1, 60))] for n in range(10)}
        messages = [
            Generate(name, [*head, n], scripted(60, tuple(script), ignore_eos=rng.random() < 0.3))
            for n, (name, script) in enumerate(scripts.items())
        ]
        for name, deltas in run(engine, *messages).items():
            token_ids, finish = said(deltas)
            ending = deltas[-1].stop_token_id
            script = scripts[name]
            assert token_ids == (script * 60)[: len(token_ids)]
            if finish == "stop":
                assert ending in engine.profile.eos_token_ids
                assert len(token_ids) == len(script) or script[len(token_ids)] == ending
            else:
                assert (finish, len(token_ids)) == ("length", 60)
        assert engine.stats().blocks_used == 0
    assert engine.stats().preemptions > 5
    assert engine.stats().prefix_hit_tokens > 0


@pytest.mark.parametrize(
    ("sampling", "message"),
    [
        (scripted(script=(1, 2048)), "outside the vocabulary of 2048"),
        (scripted(script=(-1,)), "outside the vocabulary of 2048"),
        (scripted(script=(), ignore_eos=True), "the script is empty"),
        (scripted(script=(), min_tokens=1), "the script is empty"),
    ],
)
def test_what_cannot_be_followed_is_refused(shared: Engine, sampling: Sampling, message: str) -> None:
    with pytest.raises(RequestRefused, match=message) as error:
        shared.add(Generate("a", list(PROMPT), sampling))
    assert error.value.code == "invalid_request"
    assert not shared.has_work


def test_a_model_takes_no_script() -> None:
    with pytest.raises(RequestRefused, match="scripted runner alone"):
        Engine.load(tiny_spec()).add(Generate("a", list(PROMPT), scripted()))


def test_a_step_takes_the_declared_time(folder: Path) -> None:
    engine = load(folder, step_time=0.02)
    began = time.monotonic()
    deltas = run(engine, Generate("a", list(PROMPT), scripted()))["a"]
    assert time.monotonic() - began >= 0.02 * engine.steps
    assert (len(deltas), engine.steps) == (4, 4)
    for spec in (tiny_spec(step_time=0.02), tiny_spec(runner="scripted", step_time=-1.0)):
        with pytest.raises(InvalidSpec, match="step_time"):
            Engine.load(spec)


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (Scheduled("a", 1, (5, 6), 15, 17, ((0,),)), "1 blocks for 17 tokens"),
        (Scheduled("a", 1, (5, 6), 15, 17, ((0, 1), (0,))), "1 blocks for 17 tokens"),
        (Scheduled("a", 1, (5, 6), 15, 17, ((0, 8),)), "outside the cache"),
        (Scheduled("a", 1, (-1,), 15, 16, ((0,),)), "not known"),
        (Scheduled("a", 1, (5,), 0, 1, ((0,),), Draw(Sampling(4), 0, 1, ())), "without a script"),
    ],
)
def test_a_plan_that_no_cache_could_carry_out_is_an_error(item: Scheduled, message: str) -> None:
    runner = ScriptedRunner(eos_token_ids=(2,), num_blocks=8, block_size=16)
    with pytest.raises(InvariantBroken, match=message):
        runner.execute(StepPlan(0, (item,)))
