"""The short road to an endpoint and the framework's: what comes back is the same, byte for byte.

A question mark with something behind it sends a request the long way round; here it says nothing that counts.
"""

from __future__ import annotations

import json
import re
from typing import Any, Final

import pytest
from tests.integration.router_world import ASK, CHAT, World, big

from quire_schemas import wire
from quire_schemas.keys import Digest, new_key
from quire_schemas.openai.chat import ChatCompletion

TEAM, CHATS, GONE = new_key(), new_key(), new_key()
TOOL: Final = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
ASKED: Final[list[tuple[str, dict[str, Any]]]] = [
    ("/v1/chat/completions", CHAT),
    ("/v1/chat/completions", {**CHAT, "n": 2, "return_token_ids": True, "logprobs": True, "top_logprobs": 2}),
    ("/v1/chat/completions", {**CHAT, "stream": True, "stream_options": {"include_usage": True}}),
    ("/v1/chat/completions", {**CHAT, "stop": ["fox"], "return_prompt_text": True}),
    ("/v1/chat/completions", {**CHAT, "temperature": 7}),
    ("/v1/chat/completions", {**CHAT, "model": "nobody's"}),
    ("/v1/chat/completions", {**CHAT, "tools": [TOOL], "tool_choice": "required"}),
    ("/v1/completions", {"model": "tiny", "prompt": "a", "echo": True}),
    ("/v1/completions", {"model": "tiny", "prompt": ["a", "b"], "stream": True}),
    ("/v1/completions", {"model": "tiny"}),
    ("/v1/embeddings", {"model": "tiny", "input": ["a", "b"]}),
    ("/v1/score", {"model": "tiny", "text_1": "a", "text_2": "b"}),
    ("/score", {"model": "tiny", "text_1": "a"}),
    ("/v1/messages", {"model": "tiny", "messages": ASK, "max_tokens": 5}),
    ("/v1/messages", {"model": "tiny", "messages": ASK, "max_tokens": 5, "stream": True}),
    ("/v1/messages", {"model": "tiny", "messages": ASK}),
    ("/v1/messages/count_tokens", {"model": "tiny", "messages": ASK}),
    ("/v1/tokenize", {"model": "tiny", "prompt": "a b"}),
    ("/detokenize", {"model": "tiny", "tokens": [1, 2]}),
]


def tenant(name: str, key: str, **fields: Any) -> wire.Tenant:
    digest = Digest.of(key)
    return wire.Tenant(name, (wire.AccessKey("k", digest.sha256, digest.id),), **fields)


async def serve(world: World, *access: wire.Tenant) -> None:
    engine = await world.engine()
    await world.table(world.route(engine.endpoint()), access=access, ignore_unknown=True)
    await world.connected(engine.replica_id)


def alike(answer: bytes) -> bytes:
    """Without what is another one each time: ids, and times."""
    answer = re.sub(rb"[0-9a-f]{32}|call_\w{24}", b"ID", answer)
    answer = re.sub(rb'"created":\d+', b'"created":0', answer)
    return re.sub(rb"\r\n(date|openai-processing-ms): [^\r]*", b"", answer)


def begun(event: bytes) -> bytes:
    """The first event of a stream without how much of the answer has come with it."""
    return re.sub(rb'"(text|content|delta)":"[^"]*"|"(output_tokens)":\d+', rb"\1\2", event)


async def both(world: World, path: str, body: bytes, headers: str = "") -> bytes:
    """The answer, which is one on both roads; of streams that is the head, and how they begin and end."""
    answers = [alike(await world.raw(world.post(f"{path}{more}", body, headers))) for more in ("", "?unheard=of")]
    short, long = ([*answer.split(b"\r\n\r\n", 1), b""] for answer in answers)
    assert short[0].split(b"\r\n") == long[0].split(b"\r\n"), path
    if b"text/event-stream" in short[0]:
        kept = [each.split(b"\r\n", 1)[1].split(b"\n\n") for each in (short[1], long[1])]
        assert begun(kept[0][0]) == begun(kept[1][0])
        assert kept[0][-2:] == kept[1][-2:]
    else:
        assert short[1] == long[1], path
    return answers[0]


@pytest.mark.parametrize(("path", "body"), ASKED, ids=[f"{at}{path}" for at, (path, _) in enumerate(ASKED)])
async def test_both_roads_answer_alike(world: World, path: str, body: dict[str, Any]) -> None:
    await serve(world)
    answer = await both(world, path, json.dumps(body).encode())
    assert re.match(rb"HTTP/1.1 [24]\d\d ", answer)
    if body.get("stream"):
        assert answer.count(b"data: ") > 2


async def test_both_roads_refuse_alike(world: World) -> None:
    await serve(world, tenant("team", TEAM), tenant("chats", CHATS, operations=("chat",)),
                tenant("gone", GONE, expires_at=1.0))  # fmt: skip
    for path in dict.fromkeys(path for path, _ in ASKED):
        seen = []
        for key in ("", TEAM, CHATS, GONE):
            headers = f"Authorization: Bearer {key}\r\n" if key else ""
            seen.append((await both(world, path, b"{}", headers)).split(b" ")[1])
        assert seen == [b"401", b"400", b"400" if "chat" in path else b"403", b"401"], path
    for body, headers in ((b"{", ""), (b"", ""), (b"x", "Content-Encoding: gzip\r\n"), (b"[]", "")):
        bearer = f"Authorization: Bearer {TEAM}\r\n"
        assert b" 200 " not in (await both(world, "/v1/chat/completions", body, bearer + headers))[:20]


@pytest.mark.parametrize("changes", [{}, {"n": 3}, {"return_token_ids": True}, {"stop": ["fox"], "max_tokens": 30},
                                     {"return_metrics": True, "return_prompt_text": True}])  # fmt: skip
async def test_a_whole_answer_is_written_as_its_shape_would_be(world: World, changes: dict[str, Any]) -> None:
    await serve(world)
    answer = await world.raw(world.post("/v1/chat/completions", big(**changes)))
    body = answer.split(b"\r\n\r\n", 1)[1]
    assert ChatCompletion.model_validate_json(body, strict=True).model_dump_json().encode() == body
