"""Long prompts beside a stream: tokenizing holds up nobody else, and what cannot fit is refused before it."""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from typing import Any

import httpx
import pytest
from tests.integration.router_world import ASK, World

from quire import builtin

LONG = "a " * 300_000
CUT = {"max_tokens": 1, "truncate_prompt_tokens": 8}


async def _serve(world: World, **changes: Any) -> None:
    engine = await world.engine(text="word " * 2000, pace=0.005)
    await world.serve(
        engine, tokenizer_dir=str(builtin.path("tiny")), max_model_len=8192, kv_tokens=16384, **changes
    )


@pytest.mark.parametrize(
    ("path", "more"),
    [
        ("completions", {**CUT, "prompt": LONG}),
        ("chat/completions", {**CUT, "messages": [{"role": "user", "content": LONG}]}),
        ("completions", {**CUT, "prompt": [1] * 300_000, "echo": True}),
        ("tokenize", {"prompt": LONG, "return_token_strs": True}),
        ("detokenize", {"tokens": [70] * 600_000}),
    ],
    ids=["completion", "chat", "ids", "tokenize", "detokenize"],
)
async def test_a_stream_goes_on_while_a_long_prompt_is_tokenized(
    world: World, path: str, more: dict[str, Any]
) -> None:
    await _serve(world)
    body = json.dumps({"model": "tiny", **more}).encode()
    headers = {"content-type": "application/json"}
    async with world.client() as client, httpx.AsyncClient(timeout=60, headers=headers) as http:
        for _ in range(3):  # a busy machine may hold all up for so long; the interpreter's lock would each time
            stream = await client.chat.completions.create(
                model="tiny", messages=ASK, max_tokens=6000, stream=True, extra_body={"ignore_eos": True}
            )
            came: list[float] = []

            async def listen(events: Any = stream, came: list[float] = came) -> None:
                async for _ in events:
                    came.append(time.perf_counter())

            listening = asyncio.create_task(listen())
            while not came:
                await asyncio.sleep(0.01)
            began = time.perf_counter()
            answer = await http.post(f"{world.url}/v1/{path}", content=body)
            ended = time.perf_counter()
            assert answer.status_code == 200, answer.text
            assert "max_tokens" not in more or answer.json()["usage"]["prompt_tokens"] == 8
            listening.cancel()
            await asyncio.wait([listening])
            await stream.close()
            within = [began, *(at for at in came if began <= at <= ended), ended]
            longest = max(after - before for before, after in itertools.pairwise(within))
            if longest < max((ended - began) / 2, 0.1):
                return
    raise AssertionError(f"the stream stood still for {longest:.2f} s of {ended - began:.2f}")


async def test_a_prompt_of_usual_length_does_not_wait_behind_long_ones(world: World) -> None:
    await _serve(world)
    url = f"{world.url}/v1/completions"
    plain = {"model": "tiny", "max_tokens": 1, "truncate_prompt_tokens": 8}
    limits = httpx.Limits(max_connections=32)
    async with httpx.AsyncClient(timeout=60, limits=limits) as http:
        long = [asyncio.create_task(http.post(url, json={**plain, "prompt": "a " * 150_000})) for _ in range(8)]
        await asyncio.sleep(0.3)
        before = sum(task.done() for task in long)
        usual = await http.post(url, json={**plain, "prompt": "a " * 10_000})
        meanwhile = sum(task.done() for task in long) - before
        assert [(await task).status_code for task in long] == [200] * 8
    assert usual.status_code == 200
    assert meanwhile <= 2


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("completions", {"prompt": LONG}, "prompt"),
        ("completions", {"prompt": ["a", "b", LONG]}, "prompt[2]"),
        ("chat/completions", {"messages": [{"role": "user", "content": LONG}]}, "messages"),
        ("embeddings", {"input": ["a", LONG]}, "input[1]"),
    ],
)
async def test_what_cannot_fit_is_refused_by_its_length(
    world: World, path: str, body: dict[str, Any], param: str
) -> None:
    await _serve(world)
    async with httpx.AsyncClient(timeout=20) as http:
        answer = await http.post(f"{world.url}/v1/{path}", json={"model": "tiny", **body})
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (400, "context_length_exceeded", param)
    assert "has at least 3750" in error["message"]


async def test_a_script_that_cannot_be_said_is_refused_by_its_length(world: World) -> None:
    await _serve(world, scripted=True)
    async with httpx.AsyncClient(timeout=20) as http:
        answer = await http.post(
            f"{world.url}/v1/completions", json={"model": "tiny", "prompt": "a", "script": LONG}
        )
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (400, "context_length_exceeded", "script")


@pytest.mark.parametrize(
    ("path", "body", "param", "message"),
    [
        ("completions", {"prompt": ["a", ""]}, "prompt[1]", "is empty"),
        ("completions", {"prompt": [[1], [2], []]}, "prompt[2]", "is empty"),
        ("completions", {"prompt": [[1], [2] * 9000]}, "prompt[1]", "9000 in 'prompt[1]'"),
        ("completions", {"prompt": [[1], [4096]]}, "prompt[1]", "outside the vocabulary"),
        ("completions", {"prompt": ""}, "prompt", "is empty"),
        ("embeddings", {"input": ["a", ""]}, "input[1]", "is empty"),
        ("embeddings", {"input": [[1], [2] * 9000]}, "input[1]", "has 9000"),
        ("embeddings", {"input": [[1], [4096]]}, "input[1]", "outside the vocabulary"),
    ],
)
async def test_the_prompt_at_fault_is_named(
    world: World, path: str, body: dict[str, Any], param: str, message: str
) -> None:
    await _serve(world)
    async with httpx.AsyncClient(timeout=20) as http:
        answer = await http.post(f"{world.url}/v1/{path}", json={"model": "tiny", **body})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
    assert message in answer.json()["error"]["message"]
