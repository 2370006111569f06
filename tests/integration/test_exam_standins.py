"""Exams of canaries with engines that do as they are told: that say of themselves to drift, end under a question,
are late, or have the scripted runner. Real sockets all along; what takes a minute has a clock that is put forward.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from tests.integration.engine_process import engine_running
from tests.integration.router_world import World, eventually
from tests.integration.wire_engine import TEMPLATE_HASH, WireEngine
from tests.unit.platform import tokenizers_for_tests as made

from quire.router.exams import AGAIN_SECONDS, FIRST_SECONDS, Examiner
from quire.router.fleet import Fleet
from quire.text import Tokenizer
from quire_operators.exam import DRIFTED, SMOKE_FAILED, Failed, Paper, Passed, Waits, judge
from quire_schemas import wire

NEW = "fedcba9876543210"
"""The canary's template."""
SAYS = "the quick brown fox jumps over the lazy dog"
ASKED = wire.Question("Say it", 16, "quick brown")
CANARY: dict[str, Any] = {"model": "tiny~", "names": (), "canary_of": "tiny", "template_hash": NEW}


def endpoint(spec: wire.EngineSpec, template: str) -> wire.ReplicaEndpoint:
    return wire.ReplicaEndpoint(spec.replica_id, spec.incarnation, spec.socket, template_hash=template)


async def examined(world: World) -> wire.Examined:
    status = await world.control(wire.GetRouterStatus())
    found = status.canaries["tiny"].examined
    assert found is not None
    return found


async def verdict(world: World, paper: Paper) -> Passed | Failed:
    async def look() -> Passed | Failed | None:
        found = judge(paper, await examined(world))
        return None if isinstance(found, Waits) else found

    return await eventually(look, 60)


async def two(world: World) -> tuple[WireEngine, WireEngine]:
    return await world.engine("old", SAYS), await world.engine("new", SAYS, template_hash=NEW)


async def sit(world: World, old: WireEngine, new: WireEngine, paper: Paper) -> Passed | Failed:
    canary = world.route(new.endpoint(), exam=paper.exam, **CANARY)
    await world.table(world.route(old.endpoint()), canary)
    return await verdict(world, paper)


def ends_under(engine: WireEngine, says: Callable[[wire.Generate], list[int]], times: int) -> None:
    """Have it end in the middle of so many answers."""
    asked = itertools.count()

    def script(request: wire.Generate) -> list[int]:
        engine.die_after = 3 if next(asked) < times else None
        return says(request)

    engine.script = script


async def test_drift_is_told_of_the_answers_tokens_and_of_no_others(world: World) -> None:
    old, new = await two(world)
    same = await sit(world, old, new, Paper((ASKED,), 0.0))
    assert isinstance(same, Passed), same
    asked = [request for request in old.generates if request.sampling.prompt_logprobs is None]
    tokens = len(world.tokenizer.encode(SAYS, add_special_tokens=False)[:32])
    prompt = len(asked[0].token_ids)
    assert all(each.token_ids[:prompt] == asked[0].token_ids for each in old.generates)

    new.leans = lambda place: place < prompt
    before = await sit(world, old, new, Paper((wire.Question("Say it", 17, "quick"),), 0.0))
    assert isinstance(before, Passed), "what it holds of the question is nobody's answer"

    new.leans = lambda place: place in (prompt, prompt + 3)
    paper = Paper((wire.Question("Say it", 18, "quick"),), 0.05)
    drifts = await sit(world, old, new, paper)
    told = (await examined(world)).drift
    assert [(each.tokens - each.agreed) for each in told] == [2], (told, tokens)
    assert isinstance(drifts, Failed)
    assert drifts.reason == DRIFTED
    assert isinstance(judge(Paper(paper.smoke, 0.9), await examined(world)), Passed), "another bound holds"


async def test_an_engine_that_ends_in_the_middle_is_asked_again_once(world: World) -> None:
    old, new = await two(world)
    says = world.says(SAYS)
    ends_under(old, says, 1)
    ends_under(new, says, 1)
    found = await sit(world, old, new, Paper((ASKED,), 0.01))
    assert isinstance(found, Passed), found
    assert len([each for each in new.generates if each.sampling.prompt_logprobs is None]) == 2

    ends_under(old, says, 2)
    given_up = await sit(world, old, new, Paper((wire.Question("Say more", 16, "quick"),), 0.01))
    assert isinstance(given_up, Failed)
    assert given_up.text == "answers to 'Say more' cannot be compared: old ended while it was asked"
    old.fail_with = "numerical_error"
    wrong = await sit(world, old, new, Paper((wire.Question("Say less", 16, "quick"),), 0.01))
    assert isinstance(wrong, Failed)
    assert wrong.text.endswith("cannot be compared: of the stable revision, its engine says numerical_error")


async def test_scripted_engines_say_what_they_are_asked_and_do_not_drift(
    world: World, scripted_spec: wire.EngineSpec
) -> None:
    wide = {"max_model_len": 1024, "kv_tokens": 1024, "scripted": True, "tokenizer_dir": scripted_spec.model_dir}
    more = {"model_dir": scripted_spec.model_dir, "max_model_len": 1024}
    with engine_running(replica_id="another", runner="scripted", **more) as spec:

        async def sit(paper: Paper) -> Passed | Failed:
            stable = world.route(endpoint(scripted_spec, TEMPLATE_HASH), **wide)
            canary = world.route(endpoint(spec, NEW), **{**CANARY, **wide, "exam": paper.exam})
            await world.table(stable, canary)
            return await verdict(world, paper)

        passed = await sit(Paper((wire.Question("naïve 你好 🦊", 32, "你好 🦊"),), 0.0))
        assert isinstance(passed, Passed), passed
        assert "; 0.0% of " in passed.text
        assert isinstance(await sit(Paper((), 0.0)), Passed), "Quire's own prompts"
        otherwise = await sit(Paper((wire.Question("Say it", 32, "Not it"),), None))
        assert otherwise == Failed(SMOKE_FAILED, "'Say it' was answered 'Say it', without 'Not it'")


# ── late ──────────────────────────────────────────────────────────────────────────────────────────────────


class Forward(asyncio.SelectorEventLoop):
    """A loop whose clock can be put forward."""

    ahead = 0.0

    def time(self) -> float:
        return super().time() + self.ahead


def forward(seconds: float) -> None:
    loop = asyncio.get_running_loop()
    assert isinstance(loop, Forward)
    loop.ahead += seconds


Examination = Callable[[Fleet, WireEngine, WireEngine], Awaitable[None]]


def in_process(folder: Path, paper: Paper, examination: Examination) -> None:
    """An examiner with two engines, in this process, for what a test does about them."""
    made.write(folder, made.byte_level())
    ids = Tokenizer.load(folder).encode(SAYS, add_special_tokens=False)

    def route(engine: WireEngine, template: str, **changes: Any) -> wire.ModelRoute:
        return wire.ModelRoute(
            changes.pop("model", "tiny"), (), 1, template, str(folder), None, 512, 1024, 32, 10.0, 0,
            (engine.endpoint(),), **changes,
        )  # fmt: skip

    async def world() -> None:
        old = WireEngine(folder / "o.sock", "old", lambda _: list(ids))
        new = WireEngine(folder / "n.sock", "new", lambda _: list(ids), template_hash=NEW)
        fleet = Fleet(None)
        examiner = Examiner(fleet)
        examiner.start()
        try:
            for engine in (old, new):
                await engine.start()
            canary = route(new, NEW, model="tiny~", canary_of="tiny", exam=paper.exam)
            await fleet.apply(wire.RoutingTable(1, (route(old, TEMPLATE_HASH), canary)))
            await examination(fleet, old, new)
        finally:
            await examiner.close()
            await fleet.close()
            for engine in (old, new):
                await engine.stop()

    with asyncio.Runner(loop_factory=Forward) as runner:
        runner.run(world())


def told(fleet: Fleet) -> wire.Examined:
    found = fleet.canaries.told()["tiny"].examined
    assert found is not None
    return found


async def asked(engine: WireEngine, before: int) -> None:
    async def look() -> bool:
        return len(engine.generates) > before

    await eventually(look)


@pytest.mark.parametrize("scores", [False, True])
def test_a_stable_revision_that_is_late_is_waited_for(tmp_path: Path, scores: bool) -> None:
    """For its answer, and for what it holds of it: users' requests that keep it busy say nothing of the canary."""
    paper = Paper((ASKED,), 0.0)
    late = f"there is no answer within {FIRST_SECONDS + (1 if scores else 32):g} seconds"

    async def examination(fleet: Fleet, old: WireEngine, new: WireEngine) -> None:
        says = old.script

        def script(request: wire.Generate) -> list[int]:
            old.stalled = (request.sampling.prompt_logprobs is not None) == scores
            return says(request)

        old.script = script
        for times in range(3):
            await asked(old, times * (2 if scores else 1) + scores)
            forward(FIRST_SECONDS + 33)

            async def waits(times: int = times) -> bool:
                return len(old.aborts) == times + 1 and told(fleet).waits != ""

            await eventually(waits)
            assert told(fleet).waits == f"the stable revision is busy: {late}"
            assert told(fleet).drift == (), "nothing came of it"
            old.stalled = False
            if times == 2:
                old.script = says
            forward(AGAIN_SECONDS)

        async def over() -> bool:
            return len(told(fleet).drift) == 1

        await eventually(over)
        assert isinstance(judge(paper, told(fleet)), Passed)
        assert told(fleet).waits == ""

    in_process(tmp_path, paper, examination)


@pytest.mark.parametrize("by_its_engine", [False, True])
def test_a_canary_that_is_late_has_failed(tmp_path: Path, by_its_engine: bool) -> None:
    paper = Paper((ASKED,), 0.0)

    async def examination(fleet: Fleet, _: WireEngine, new: WireEngine) -> None:
        new.stalled = not by_its_engine
        new.fail_with = "timeout" if by_its_engine else None
        await asked(new, 0)
        if not by_its_engine:
            assert told(fleet).smoke == ()
            forward(FIRST_SECONDS + ASKED.max_tokens + 1)

        async def over() -> bool:
            return len(told(fleet).smoke) == 1

        await eventually(over)
        failed = judge(paper, told(fleet))
        assert isinstance(failed, Failed)
        assert failed.text == "'Say it' was not answered: there is no answer within 76 seconds"

    in_process(tmp_path, paper, examination)
