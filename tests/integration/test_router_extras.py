"""What answers tell besides text: what ended it, where the time went, what the model read, who made it."""

from __future__ import annotations

import json
import time
from typing import Any

import httpx
import pytest
from tests.integration.router_world import ASK, TEXT, World, events

from quire_schemas.openai.chat import ChatChunk, ChatCompletion
from quire_schemas.openai.completions import Completion

METRICS = {"time_to_first_token_ms", "generation_time_ms", "queue_time_ms", "mean_itl_ms", "tokens_per_second"}
PATHS: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"model": "tiny", "messages": ASK},
    "/v1/completions": {"model": "tiny", "prompt": "Say it", "max_tokens": 200},
}


async def whole(world: World, path: str, **more: Any) -> Any:
    async with httpx.AsyncClient(timeout=20) as http:
        answer = (await http.post(f"{world.url}{path}", json={**PATHS[path], **more})).json()
    (ChatCompletion if "chat" in path else Completion).model_validate(answer)
    return answer


async def streamed(world: World, path: str, **more: Any) -> list[Any]:
    body = json.dumps({**PATHS[path], "stream": True, **more}).encode()
    *found, done = events(await world.raw(world.post(path, body)))
    assert done == "DONE"
    for event in found:
        (ChatChunk if "chat" in path else Completion).model_validate(event)
    return found


@pytest.mark.parametrize("path", PATHS)
async def test_what_ended_a_text_is_told(world: World, path: str) -> None:
    await world.serve(await world.engine())  # its answers end by the token 0
    for more, reason, cause in (
        ({}, "stop", None),
        ({"stop_token_ids": [5]}, "stop", None),
        ({"stop_token_ids": [5, 0]}, "stop", 0),
        ({"stop": ["never", "café, 你"]}, "stop", "café, 你"),
        ({"stop": ["fox"], "include_stop_str_in_output": True, "stop_token_ids": [0]}, "stop", "fox"),
        ({"max_tokens": 3, "stop": "fox", "stop_token_ids": [0]}, "length", None),
    ):
        choice = (await whole(world, path, **more))["choices"][0]
        assert (choice["finish_reason"], choice["stop_reason"]) == (reason, cause)
        choices = [event["choices"][0] for event in await streamed(world, path, **more)]
        assert (choices[-1]["finish_reason"], choices[-1]["stop_reason"]) == (reason, cause)
        assert all("stop_reason" not in earlier for earlier in choices[:-1])


@pytest.mark.parametrize("path", PATHS)
async def test_where_the_time_went(world: World, path: str) -> None:
    await world.serve(await world.engine(pace=0.02))
    began = time.monotonic()
    answer = await whole(world, path, max_tokens=11, return_metrics=True)
    took = 1000 * (time.monotonic() - began)
    told = answer["metrics"]
    assert told.keys() == METRICS
    assert 0 < told["time_to_first_token_ms"] < took
    assert 150 < told["generation_time_ms"] < took - told["time_to_first_token_ms"] + 1
    assert told["mean_itl_ms"] == pytest.approx(told["generation_time_ms"] / 10, abs=0.01)
    assert told["tokens_per_second"] == pytest.approx(10_000 / told["generation_time_ms"], rel=0.01)
    assert 0 <= told["queue_time_ms"] < told["time_to_first_token_ms"]
    found = await streamed(world, path, max_tokens=5, n=3, return_metrics=True)
    assert all("metrics" not in event for event in found[:-1])
    several = found[-1]["metrics"]
    assert found[-1]["choices"][0]["finish_reason"] == "length"
    assert 15 < several["mean_itl_ms"] < 200
    assert several["tokens_per_second"] > 1000 / several["mean_itl_ms"], "three at a time"
    one = (await whole(world, path, max_tokens=1, return_metrics=True))["metrics"]
    assert (one["mean_itl_ms"], one["tokens_per_second"], one["generation_time_ms"]) == (None, None, 0)
    assert "metrics" not in await whole(world, path, max_tokens=2)


async def test_metrics_of_what_has_no_tokens_or_all_at_once(world: World) -> None:
    await world.serve(await world.engine())
    path = "/v1/completions"
    scored = await whole(world, path, max_tokens=0, echo=True, return_metrics=True)
    assert set(scored["metrics"].values()) == {None}
    beams = await whole(world, path, max_tokens=4, use_beam_search=True, n=2, return_metrics=True)
    assert beams["metrics"].keys() == METRICS
    best = await whole(world, path, max_tokens=4, best_of=3, return_metrics=True)
    assert best["metrics"]["generation_time_ms"] > 0


async def test_the_text_that_the_model_read(world: World) -> None:
    await world.serve(await world.engine())
    path, expected = "/v1/chat/completions", "<|im_start|>user\nSay it<|im_end|>\n<|im_start|>assistant\n"
    assert (await whole(world, path, return_prompt_text=True))["prompt_text"] == expected
    assert "prompt_text" not in await whole(world, path)
    first, *others = await streamed(world, path, return_prompt_text=True, return_token_ids=True, max_tokens=3)
    assert first["prompt_text"] == expected
    assert world.tokenizer.decode(first["prompt_token_ids"], skip_special_tokens=False) == expected
    assert all("prompt_text" not in event for event in others)


async def test_the_fingerprint_names_the_revision(world: World) -> None:
    engine = await world.engine()
    seen = []
    for changes in ({}, {"revision": 2}, {"revision": 2, "template_hash": "ffff0123456789"}):
        await world.serve(engine, **changes)
        answer = await whole(world, "/v1/chat/completions", max_tokens=1)
        assert answer["choices"][0]["message"]["content"] in TEXT
        seen.append(answer["system_fingerprint"])
        assert {event["system_fingerprint"] for event in await streamed(world, "/v1/completions")} == {seen[-1]}
    assert seen == ["fp_1_abcdef0123", "fp_2_abcdef0123", "fp_2_ffff012345"]


async def test_every_answer_says_how_long_it_took_and_which_request_it_is_for(world: World) -> None:
    await world.serve(await world.engine(pace=0.1))
    async with httpx.AsyncClient(base_url=world.url, timeout=20) as http:
        answers = [
            await http.get("/livez", headers={"x-request-id": "abc-1"}),
            await http.get("/nowhere", headers={"x-request-id": "abc-1"}),
            await http.post("/v1/completions", json={}, headers={"x-request-id": "abc-1"}),
            await http.post("/tokenize", json={"prompt": "a"}, headers={"x-request-id": "abc-1"}),
            await http.get("/livez", headers={"host": "evil.com", "x-request-id": "abc-1"}),
        ]
        body = {**PATHS["/v1/completions"], "max_tokens": 10}
        slow = await http.post("/v1/completions", json=body)
        stream = await http.post("/v1/completions", json={**body, "stream": True})
    for answer in answers:
        assert answer.headers["x-request-id"] == "abc-1"
        assert 0 <= int(answer.headers["openai-processing-ms"]) < 5000
    assert int(slow.headers["openai-processing-ms"]) >= 900, "until the answer"
    assert int(stream.headers["openai-processing-ms"]) < 800, "until the first piece"
    assert slow.headers["x-request-id"].startswith("req_")
