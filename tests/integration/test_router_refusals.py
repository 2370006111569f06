"""What an engine refuses: the answer names what is at fault, and it counts as refused."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from tests.integration.engine_process import engine_running
from tests.integration.router_world import World
from tests.integration.wire_engine import WHY

from quire.cli.reference import metrics_page
from quire.router.model_metrics import FINISHES, NO_MODEL
from quire_schemas import signals, wire

BEAMS = {"use_beam_search": True, "n": 5}


@pytest.fixture(scope="module")
def narrow_engine() -> Iterator[wire.EngineSpec]:
    with engine_running(replica_id="narrow", max_num_seqs=4, num_blocks=64) as spec:
        yield spec


async def ask(world: World, path: str = "completions", **body: Any) -> httpx.Response:
    async with httpx.AsyncClient(timeout=20) as http:
        return await http.post(f"{world.url}/v1/{path}", json={"model": "tiny", **body})


async def counted(world: World) -> dict[str, float]:
    """How the model's requests for text have ended so far."""
    found = await world.metrics()
    return {
        finish: found[f'{signals.REQUESTS}_total{{finish="{finish}",model="tiny",operation="text_completion"}}']
        for finish in FINISHES
    }


@pytest.mark.parametrize(
    ("code", "status", "finish"),
    [
        ("invalid_grammar", 400, "refused"),
        ("context_length_exceeded", 400, "refused"),
        ("queue_full", 429, "refused"),
        ("internal_error", 500, "error"),
    ],
)
async def test_what_an_engine_refuses_counts_as_refused(
    own_world: World, code: str, status: int, finish: str
) -> None:
    world = own_world
    await world.serve(await world.engine(fail_with=code))
    answer = await ask(world, prompt="a", structured_outputs={"regex": "a"})
    assert answer.status_code == status
    after = await counted(world)
    assert after == {name: float(name == finish) for name in FINISHES}
    (world.folder / "router.log").write_text("")  # an engine's fault is in it


async def test_a_stream_that_breaks_is_an_error_whatever_broke_it(own_world: World) -> None:
    world = own_world
    engine = await world.engine()
    await world.serve(engine)
    body = {"model": "tiny", "prompt": "a", "stream": True, "structured_outputs": {"regex": "a"}}
    async with (
        httpx.AsyncClient(timeout=20) as http,
        http.stream("POST", f"{world.url}/v1/completions", json=body) as answer,
    ):
        events = answer.aiter_lines()
        assert answer.status_code == 200
        assert "choices" in await anext(events)
        engine.fail_with = "invalid_grammar"
        lines: list[str] = []
        with pytest.raises(httpx.RemoteProtocolError):
            async for line in events:
                lines.append(line)
    assert '"error"' in [line for line in lines if line][-1]
    assert (await counted(world))["error"] == 1


def test_the_page_on_metrics_has_every_way_to_end() -> None:
    line = next(line for line in metrics_page().splitlines() if f"`{signals.REQUESTS}`" in line)
    assert all(finish in line for finish in FINISHES)
    assert f"`{NO_MODEL}`" in line


@pytest.mark.parametrize(
    ("path", "body", "param", "words"),
    [
        ("embeddings", {"input": "a", "dimensions": 257}, "dimensions", "have 256"),
        ("completions", {"prompt": "a", "use_beam_search": True, "n": 5}, "n", "width 5"),
        ("completions", {"prompt": "a", "use_beam_search": True, "best_of": 6}, "best_of", "width 6"),
        ("chat/completions", {"messages": [{"role": "user", "content": "a"}], **BEAMS}, "n", "width 5"),
    ],
)
async def test_what_a_replica_cannot_do_is_named(
    world: World, narrow_engine: wire.EngineSpec, path: str, body: dict[str, Any], param: str, words: str
) -> None:
    await world.serve_process(narrow_engine)
    answer = await ask(world, path, **body)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, param)
    assert error["message"].startswith(f"'{param}' cannot be honoured: ")
    assert words in error["message"]


async def test_why_a_replica_has_no_room_is_told(world: World) -> None:
    await world.serve(await world.engine(fail_with="queue_full"))
    answer = await ask(world, prompt="a", structured_outputs={"regex": "a"})
    assert answer.status_code == 429
    assert answer.json()["error"]["message"] == f"A replica of this model has no room for the request now: {WHY}."
