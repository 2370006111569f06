"""Requests that are wrong, too many, or too long in coming to their turn; clients that leave."""

from __future__ import annotations

import asyncio
import re
from typing import Any

import httpx
import openai
import pytest
from tests.integration.router_world import ASK, CHAT, TEXT, World, big, eventually
from tests.unit.platform import tokenizers_for_tests as made

from quire_schemas import signals, wire
from quire_schemas.openai.answer import ErrorBody


@pytest.mark.parametrize(
    ("body", "status", "param", "code", "words"),
    [
        (b"{", 400, None, None, "line 1, column 2"),
        (b"[]", 400, None, None, "JSON object"),
        (b"\xff", 400, None, None, "UTF-8"),
        (b'{"model": "tiny", "messages": [{"role": "user", "content": "\\ud800"}]}', 400, None, None, "UTF-8"),
        (b"[" * 100_000, 400, None, None, "256 levels"),
        (big(temperature=float("nan")), 400, "temperature", None, "finite"),
        (big(temperature=3), 400, "temperature", None, "at most 2"),
        (big(max_tokens=-1), 400, "max_tokens", None, "at least 1, not -1"),
        (big(n=17), 400, "n", None, "at most 16"),
        (big(logit_bias={"1": 101}), 400, "logit_bias", None, "-100 to 100"),
        (big(logit_bias={"999999": 1}), 400, "logit_bias", None, "vocabulary"),
        (big(tools=[{"type": "function"}]), 400, "tools[0].function", None, "is required"),
        (big(functions=[{"name": "f"}]), 400, "functions", None, "not honoured"),
        (big(temprature=1), 400, "temprature", None, "Did you mean 'temperature'?"),
        (big(model="other"), 404, "model", "model_not_found", "tiny"),
        (big(max_tokens=5000), 400, "max_tokens", "context_length_exceeded", "512 tokens; the request needs 50"),
        (big(max_completion_tokens=5000), 400, "max_completion_tokens", "context_length_exceeded", "512 tokens"),
        (
            big(messages=[{"role": "user", "content": "word " * 4000}], max_tokens=1),
            400,
            "messages",
            "context_length_exceeded",
            "512",
        ),
        (
            big(max_tokens=1e9),
            400,
            "max_tokens",
            None,
            "whole number, written without a point or an exponent: 1000",
        ),
        (big()[:-1] + b', "model" : "other"}', 400, "model", None, "key 'model' twice"),
        (big(chat_template_kwargs={"messages": []}), 400, "chat_template_kwargs", None, "'messages', which"),
        (big(chat_template_kwargs={"moood": 1}), 400, "chat_template_kwargs.moood", None, "never looks"),
    ],
)
async def test_a_bad_request_is_named(
    world: World, body: bytes, status: int, param: str | None, code: str | None, words: str
) -> None:
    await world.table(world.route())
    async with httpx.AsyncClient() as http:
        answer = await http.post(
            f"{world.url}/v1/chat/completions", content=body, headers={"content-type": "application/json"}
        )
    error = ErrorBody.model_validate_json(answer.content).error
    assert (answer.status_code, error.param, error.code) == (status, param, code), error
    assert words in error.message
    assert error.type == "invalid_request_error"
    assert answer.headers["x-request-id"].startswith("req_")
    assert not re.search(r"/[a-z]+/|0x|Traceback|pydantic|msgspec", error.message)


async def test_requests_that_do_not_reach_a_route_have_the_same_shape(world: World) -> None:
    host = f"localhost:{world.port}".encode()
    cases = [
        (b"GET /nope HTTP/1.1\r\nHost: " + host + b"\r\nConnection: close\r\n\r\n", 404, "not_found"),
        (b"GET /v1/../admin HTTP/1.1\r\nHost: " + host + b"\r\nConnection: close\r\n\r\n", 404, "not_found"),
        (
            b"PUT /v1/models HTTP/1.1\r\nHost: " + host + b"\r\nConnection: close\r\n\r\n",
            405,
            "method_not_allowed",
        ),
        (world.post("/v1/models", b"{}"), 405, "method_not_allowed"),
        (b"GET /health HTTP/1.1\r\nHost: evil.com\r\n\r\n", 421, "host_not_allowed"),
        (b"GET /health HTTP/1.1\r\nHost: evil.com:80/?x=localhost\r\n\r\n", 400, None),
        (b"GET /health HTTP/1.1\r\nHost: localhost\r\nHost: localhost\r\n\r\n", 400, None),
        (b"GET /health HTTP/1.1\r\nX-Forwarded-Host: localhost\r\n\r\n", 400, None),
        (b"GET /health HTTP/1.0\r\n\r\n", 400, None),
        (b"GET /health HTTP/1.1\r\nHost: localhost\r\nOrigin: http://evil.com\r\n\r\n", 421, "host_not_allowed"),
        (b"GET /health HTTP/1.1\r\nHost: localhost\r\nOrigin: null\r\n\r\n", 421, "host_not_allowed"),
        (b"GET /health HTTP/3.1\r\nHost: localhost\r\n\r\n", 400, None),
        (b"GET http://evil.com/health HTTP/1.1\r\nHost: localhost\r\n\r\n", 421, "host_not_allowed"),
        (
            world.post("/v1/completions", b"{}").replace(b"application/json", b"application/json; charset=utf-16"),
            415,
            "unsupported_media_type",
        ),
        (b"\x16\x03\x01 what is this\r\n\r\n", 400, None),
        # just above the limit, so that it arrives in one piece: the router closes without reading what is left
        (b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 17_000 + b"\r\n\r\n", 400, None),
        (
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
            400,
            None,
        ),
        (
            world.post("/v1/completions", b"prompt=x").replace(b"application/json", b"text/plain"),
            415,
            "unsupported_media_type",
        ),
        (world.post("/v1/chat/completions", b" " * (4 * 2**20 + 1)), 413, "request_too_large"),
    ]
    for request, status, code in cases:
        answer = await world.raw(request)
        head, _, body = answer.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 %d" % status), (request[:80], answer[:300])
        error = ErrorBody.model_validate_json(body).error
        assert error.code == code
        if status == 413:
            assert b"connection: close" in head.lower()
    for host_ok in ("127.0.0.1", "LOCALHOST:1", f"[::1]:{world.port}"):
        got = await world.raw(f"GET /livez HTTP/1.1\r\nHost: {host_ok}\r\nConnection: close\r\n\r\n".encode())
        assert got.startswith(b"HTTP/1.1 200"), host_ok
    target = f"http://127.0.0.1:{world.port}/v1/models".encode()
    got = await world.raw(b"GET " + target + b" HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
    assert got.startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize(
    ("method", "path", "param"),
    [
        ("GET", "/v1/models?limit=1", "limit"),
        ("GET", "/v1/models/tiny?foo=1", "foo"),
        ("GET", "/v1/files/file-1?foo=1", "foo"),
        ("GET", "/v1/files?limit=1&limit=2", "limit"),
        ("GET", "/v1/responses/resp_1?include[]=a&include[]=b&foo=1", "foo"),
        ("POST", "/v1/chat/completions?api-version=1", "api-version"),
        ("POST", "/v1/messages?beta=true&foo=1", "foo"),
        ("DELETE", "/v1/files/file-1?foo=1", "foo"),
    ],
)
async def test_what_nobody_knows_behind_a_question_mark_is_named(
    world: World, method: str, path: str, param: str
) -> None:
    await world.table(world.route())
    async with httpx.AsyncClient(base_url=world.url) as http:
        answer = await http.request(method, path, json={} if method == "POST" else None)
        assert answer.status_code == 400, answer.text
        assert f"'{param}'" in answer.json()["error"]["message"]
        if param != "limit":
            await world.table(world.route(), ignore_unknown=True)
            again = await http.request(method, path, json={} if method == "POST" else None)
            assert f"'{param}'" not in again.text
        assert (await http.get("/livez?probe=1")).status_code == 200


async def test_a_wrong_path_or_method_is_told_what_there_is(world: World) -> None:
    async with httpx.AsyncClient(base_url=world.url) as http:
        nowhere = await http.post("/v1/nowhere", json={})
        wrong = await http.get("/v1/chat/completions")
    words = nowhere.json()["error"]["message"]
    assert "GET /openapi.json" in words
    assert (wrong.status_code, wrong.headers["allow"]) == (405, "OPTIONS, POST")
    assert wrong.json()["error"]["message"] == "This path takes POST only."


async def test_the_clients_request_id_comes_back(world: World) -> None:
    async with httpx.AsyncClient() as http:
        kept = await http.get(f"{world.url}/livez", headers={"x-request-id": "abc-1"})
        odd = await http.get(f"{world.url}/livez", headers={"x-request-id": "a b/c"})
    assert kept.headers["x-request-id"] == "abc-1"
    assert odd.headers["x-request-id"].startswith("req_")


async def test_a_model_without_a_chat_template_says_so(world: World) -> None:
    made.write(world.folder / "bare", made.byte_level(), template=None)
    engine = await world.engine()
    await world.serve(engine, tokenizer_dir=str(world.folder / "bare"))
    async with world.client() as client:
        with pytest.raises(openai.BadRequestError) as caught:
            await client.chat.completions.create(model="tiny", messages=ASK)
        assert (await client.completions.create(model="tiny", prompt="x")).choices[0].text
    assert caught.value.code == "no_chat_template"
    assert "chatTemplateFile" in caught.value.message


async def test_a_model_whose_tokenizer_is_broken_is_never_connected(world: World) -> None:
    engine = await world.engine()
    (world.folder / "empty").mkdir(exist_ok=True)
    status = await world.table(world.route(engine.endpoint(), tokenizer_dir=str(world.folder / "empty")))
    assert [load.connected for load in status.replicas] == [False]
    async with world.client() as client:
        with pytest.raises(openai.InternalServerError) as caught:
            await client.completions.create(model="tiny", prompt="x")
    assert (caught.value.status_code, caught.value.code) == (503, "model_unusable")


async def test_a_full_queue_is_a_429_at_once(world: World) -> None:
    engine = await world.engine(max_num_seqs=1, pace=0.05)
    await world.serve(engine, max_queue_length=1)
    async with world.client() as client:
        first = [
            asyncio.create_task(client.chat.completions.create(model="tiny", messages=ASK, max_tokens=20))
            for _ in range(2)
        ]

        async def both_in() -> bool:
            return len(engine.generates) == 2

        await eventually(both_in)
        with pytest.raises(openai.RateLimitError) as caught:
            await client.chat.completions.create(model="tiny", messages=ASK)
        await asyncio.gather(*first)
    assert caught.value.code == "queue_full"
    assert caught.value.response.headers["retry-after"] == "1"
    assert caught.value.response.headers["x-should-retry"] == "true"


async def test_more_sequences_than_places_is_the_requests_fault(world: World) -> None:
    engine = await world.engine(max_num_seqs=2)
    await world.serve(engine, max_queue_length=1)
    async with world.client() as client:
        with pytest.raises(openai.BadRequestError, match="at most 3 at a time") as caught:
            await client.completions.create(model="tiny", prompt=["a", "b"], n=2, max_tokens=2)
        assert caught.value.param == "n"
        assert (await client.completions.create(model="tiny", prompt="a", n=3, max_tokens=2)).choices
        limits = wire.Limits(hot_hash="h5", max_num_seqs=5, max_num_batched_tokens=64, chunked_prefill=True)
        await world.control(wire.SetLimits(replica_ids=("r1",), limits=limits))

        async def raised() -> bool:
            return (await world.control(wire.GetRouterStatus())).replicas[0].hot_hash == "h5"

        await eventually(raised)
        assert (await client.completions.create(model="tiny", prompt=["a", "b"], n=3, max_tokens=2)).choices


async def test_with_no_replica_ready_one_request_waits_even_without_a_queue(world: World) -> None:
    await world.table(world.route(max_queue_wait=2.0, max_queue_length=0))
    async with httpx.AsyncClient(base_url=world.url) as http:
        first = asyncio.create_task(http.post("/v1/chat/completions", json={**CHAT, "n": 2}))
        await eventually(lambda: world.holds(1))
        second = await http.post("/v1/chat/completions", json=CHAT)
        assert (await first).json()["error"]["code"] == "service_unavailable"
    assert second.json()["error"]["code"] == "queue_full"


async def test_waiting_too_long_in_the_engines_queue_is_a_504(world: World) -> None:
    engine = await world.engine(max_num_seqs=1, pace=0.02)
    await world.serve(engine, max_queue_wait=0.4)
    async with world.client() as client:
        long = asyncio.create_task(client.chat.completions.create(model="tiny", messages=ASK, max_tokens=150))

        async def running() -> bool:
            return bool(engine.running)

        await eventually(running)
        with pytest.raises(openai.InternalServerError) as caught:
            await client.chat.completions.create(model="tiny", messages=ASK)
        long.cancel()
    assert (caught.value.status_code, caught.value.code) == (504, "timeout")
    assert caught.value.response.headers["x-should-retry"] == "false"


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_leaves_stops_the_engine(world: World, stream: bool) -> None:
    engine = await world.engine(pace=0.01, text=TEXT * 2)
    await world.serve(engine)
    reader, writer = await asyncio.open_connection("127.0.0.1", world.port)
    writer.write(world.post("/v1/chat/completions", big(stream=stream, n=2)))
    if stream:
        await reader.readuntil(b"data: ")

    async def running() -> bool:
        return len(engine.running) == 2

    await eventually(running)
    writer.close()

    async def stopped() -> bool:
        return len(engine.aborts) == 2 and not engine.running

    await eventually(stopped, 2)

    async def counted() -> bool:
        found = await world.metrics()
        gone = found[f'{signals.REQUESTS}_total{{finish="abort",model="tiny",operation="chat"}}']
        return gone == 1 and found[f'{signals.REQUESTS_IN_FLIGHT}{{model="tiny"}}'] == 0

    await eventually(counted)


async def test_a_client_that_leaves_while_held_is_forgotten(world: World) -> None:
    await world.table(world.route())
    _, writer = await asyncio.open_connection("127.0.0.1", world.port)
    writer.write(world.post("/v1/chat/completions", big()))
    await eventually(lambda: world.holds(1))
    writer.close()
    await eventually(lambda: world.holds(0))


async def test_an_engine_may_wait_with_what_nobody_reads_yet(world: World) -> None:
    """Tokens of an answer that is sent whole may come together; not where each may be its last, or is sent on."""
    engine = await world.engine()
    await world.table(world.route(engine.endpoint()))
    asked: list[tuple[dict[str, Any], bool]] = [
        ({}, True),
        ({"n": 2}, True),
        ({"stop": ["zebra"]}, False),
        ({"stream": True}, False),
    ]
    async with httpx.AsyncClient(base_url=world.url) as http:
        for more, waits in asked:
            before = len(engine.generates)
            answer = await http.post("/v1/chat/completions", json={**CHAT, **more})
            assert answer.status_code == 200, answer.text
            assert {each.patience > 0 for each in engine.generates[before:]} == {waits}, more
