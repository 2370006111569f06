"""Bytes on a connection to the router: what is bounded, what is left out, and what goes on afterwards."""

from __future__ import annotations

import asyncio
import contextlib
import json

import pytest
from tests.integration.router_world import CHAT, World

from quire_schemas.openai.answer import ErrorBody

GET = b"GET /livez HTTP/1.1\r\nHost: localhost\r\n"
POST = b"POST /v1/tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
BODY = b'{"model": "tiny", "prompt": "a"}'
LONG = b"a" * 15_000
CHUNKED = POST + b"Transfer-Encoding: chunked\r\n\r\n"


async def said(world: World, *parts: bytes, last: bytes = b"") -> bytes:
    """All that comes back on one connection that gets these parts a moment after each other."""
    reader, writer = await asyncio.open_connection("127.0.0.1", world.port)
    with contextlib.suppress(ConnectionError):  # the router may have had enough
        for part in (*parts, last):
            writer.write(part)
            await writer.drain()
            await asyncio.sleep(0.01)
    try:
        return await asyncio.wait_for(reader.read(), 10)
    finally:
        writer.close()


def refused(answer: bytes) -> bool:
    head, _, body = answer.partition(b"\r\n\r\n")
    error = ErrorBody.model_validate_json(body).error
    assert b"\r\nx-request-id: req_" in head
    return head.startswith(b"HTTP/1.1 400 Bad Request") and "not proper HTTP/1.1" in error.message


@pytest.mark.parametrize(
    "parts",
    [
        # only the last part is above the limit: what came behind it would reset the connection
        [GET, b"X: ", LONG, LONG],
        [b"GET /", LONG, LONG],
        [GET, *[b"X-%d: " % at + b"a" * 1000 + b"\r\n" for at in range(17)], b"X"],
        [CHUNKED, b"5;", LONG, LONG],
        [CHUNKED, b"0\r\nX: ", LONG, LONG],
        [CHUNKED, b"0\r\n", *[b"X-%d: " % at + b"a" * 1000 + b"\r\n" for at in range(17)], b"X"],
        [CHUNKED, b"zz\r\n"],
        [POST + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\n"],
        [POST + b"Content-Length: +5\r\n\r\n"],
        [POST + b"Transfer-Encoding: gzip\r\n\r\n"],
        [GET + b"X : a\r\n\r\n"],
        [GET + b"X: a\rb\r\n\r\n"],
        [GET.replace(b"\r\n", b"\n") + b"\n"],
    ],
    ids=["header", "path", "headers", "chunk size", "trailer", "trailers", "no size", "two lengths",
         "signed length", "no chunks", "space in name", "bare CR", "bare LF"],
)  # fmt: skip
async def test_what_has_no_end_or_can_be_read_in_two_ways_is_refused(world: World, parts: list[bytes]) -> None:
    assert refused(await said(world, *parts))


async def test_an_offer_of_another_protocol_is_declined_and_the_connection_serves_on(world: World) -> None:
    offer = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABk\r\n"
    engine = await world.engine()
    await world.serve(engine)
    post = POST + offer + b"Content-Length: %d\r\n\r\n" % len(BODY) + BODY
    last = GET + b"Connection: close\r\n\r\n"
    for parts in ([post, GET + offer + b"\r\n", post, last], [post + GET + offer + b"\r\n" + post + last]):
        answer = await said(world, *parts)
        assert answer.count(b"HTTP/1.1 200 OK") == 4, answer
        assert answer.count(b'"count":1') == 2


async def test_trailers_are_no_headers(world: World) -> None:
    chunked = CHUNKED + b"%x\r\n%b\r\n0\r\nHost: evil.com\r\nX-Request-Id: trailer\r\n\r\n" % (len(BODY), BODY)
    answer = await said(world, chunked, GET + b"Connection: close\r\n\r\n")
    assert b"HTTP/1.1 421" not in answer
    assert b"x-request-id: trailer" not in answer
    assert answer.count(b"HTTP/1.1 200 OK") == 1, "the second request, of a model nobody serves the first"


async def test_what_comes_behind_a_request_waits_for_its_answer(world: World) -> None:
    engine = await world.engine(pace=0.02)
    await world.serve(engine)
    asked = world.post("/v1/chat/completions", json.dumps({**CHAT, "stream": True}).encode())
    behind = b"\x00 what is this\r\n\r\n"
    answer = await said(world, asked.replace(b"Connection: close\r\n", b""), b"", b"", behind)
    assert answer.startswith(b"HTTP/1.1 200 OK")
    whole, _, rest = answer.partition(b"[DONE]\n\n\r\n0\r\n\r\n")
    assert b"HTTP/1.1" not in whole[8:]
    assert refused(rest)
