"""`/health` says that a model can be served when its engines generate, and finds those that do not."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from typing import Any

import httpx
import msgspec
import pytest
from tests.engine_specs import tiny_spec
from tests.integration.engine_process import Process, without_weights
from tests.integration.router_world import ASK, World, big, events, eventually

from quire.router import proof
from quire_schemas import signals


async def look(world: World) -> tuple[int, dict[str, Any], float]:
    """Status, what is said of the one model, and the seconds it took."""
    began = time.monotonic()
    async with httpx.AsyncClient(timeout=20) as http:
        answer = await http.get(f"{world.url}/health")
    (model,) = answer.json()["models"].values()
    return answer.status_code, model, time.monotonic() - began


@pytest.mark.parametrize("runner", ["model", pytest.param("scripted", marks=pytest.mark.nightly)])
async def test_an_engine_that_is_stopped_is_found_and_found_well_again(
    world: World, tmp_path: Any, runner: str
) -> None:
    more = {"runner": runner, "model_dir": str(without_weights(tmp_path))} if runner == "scripted" else {}
    spec = tiny_spec(socket=str(world.folder / "real" / "engine.sock"), replica_id=f"real-{runner}", **more)
    process = Process(msgspec.to_builtins(spec), tmp_path)
    try:
        process.wait_for("ready")
        await world.serve_process(spec, stall_seconds=30.0, scripted=runner == "scripted")
        os.kill(process.child.pid, signal.SIGSTOP)
        status, model, took = await look(world)
        assert (status, model["ready"], model["failing"], model["stalled"]) == (503, 0, 1, 0)
        assert proof.ASKED_SECONDS <= took < proof.ASKED_SECONDS + 2
        status, _, took = await look(world)
        assert status == 503
        assert took < 1, "what is known of it is not waited for again"
        os.kill(process.child.pid, signal.SIGCONT)

        async def well() -> bool:
            return (await look(world))[0] == 200

        await eventually(well, proof.AGAIN_SECONDS + 5)
        status, model, took = await look(world)
        assert (status, model["ready"], model["failing"]) == (200, 1, 0)
        assert took < 1
    finally:
        process.close()


async def test_a_flood_of_looks_costs_one_token(world: World) -> None:
    engine = await world.engine(pace=0.05)
    await world.serve(engine, stall_seconds=30.0)
    async with httpx.AsyncClient(timeout=20, limits=httpx.Limits(max_connections=50)) as http:
        answers = await asyncio.gather(*(http.get(f"{world.url}/health") for _ in range(200)))
    assert {answer.status_code for answer in answers} == {200}
    (asked,) = engine.questions
    assert (len(asked.token_ids), asked.sampling.max_tokens) == (1, 1)
    assert asked.background
    found = await world.metrics()
    assert found[f'{signals.GENERATION_TOKENS}_total{{model="tiny"}}'] == 0, "it is nobody's request"


async def test_a_token_of_a_request_is_proof_enough(world: World) -> None:
    engine = await world.engine()
    await world.serve(engine, stall_seconds=30.0)
    async with world.client() as client:
        await client.chat.completions.create(model="tiny", messages=ASK)
    assert (await look(world))[0] == 200
    assert not engine.questions


async def test_proof_gets_old(world: World) -> None:
    engine = await world.engine()
    await world.serve(engine)  # the stall time of tests is a second
    for count in (1, 1, 2):
        if count == 2:
            await asyncio.sleep(1.1)
        assert (await look(world))[0] == 200
        assert len(engine.questions) == count


async def test_a_replica_that_computes_is_not_asked(world: World) -> None:
    engine = await world.engine(text="word", pace=0.5)
    await world.serve(engine, stall_seconds=30.0)
    asked = asyncio.create_task(world.raw(world.post("/v1/chat/completions", big(stream=True))))

    async def under_way() -> bool:
        return bool(engine.generates)

    await eventually(under_way)
    status, _, took = await look(world)
    assert status == 200
    assert took < 0.4, "it has no token yet, and is not waited for"
    assert events(await asked)[-1] == "DONE"
    assert not engine.questions


async def test_one_sick_replica_does_not_make_the_model_unhealthy(world: World) -> None:
    sick = await world.engine("sick", fail_with="internal_error")
    good = await world.engine("good")
    await world.serve(sick, good)
    status, model, _ = await look(world)
    assert (status, model["ready"], model["failing"]) == (200, 1, 1)
    sick.fail_with = None
    async with world.client() as client:
        for _ in range(4):
            await client.chat.completions.create(model="tiny", messages=ASK)
    assert len(sick.generates) > 1
    status, model, _ = await look(world)
    assert (status, model["ready"], model["failing"]) == (200, 2, 0), "a request's token clears its name"


async def test_an_engine_that_is_deaf_only_to_work_is_found(world: World) -> None:
    """It tells its state when asked, steps nothing, and has nobody's request: progress alone would not tell."""
    engine = await world.engine(stalled=True)
    await world.serve(engine, stall_seconds=0.5)
    status, model, took = await look(world)
    assert status == 503
    assert model["failing"] + model["stalled"] == 1
    assert took < 2
