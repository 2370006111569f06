"""Mutated requests against the router as a process: no 5xx, every error in the contract's shape, and it serves on.

A failure prints the case and how to replay it: `QUIRE_FUZZ_CASE=seed:number pytest <this file>`.
"""

from __future__ import annotations

import asyncio
import json
import random
import re
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from tests.effort import fuzz_cases, replay
from tests.integration.router_world import World, end_world, make_world
from tests.mutations import as_json, damaged, generator, scarred
from tests.unit.platform import tokenizers_for_tests as made
from tokenizers import AddedToken

import quire
from quire.errors import TABLE, Api
from quire_schemas.anthropic import MessagesAnswer, MessagesError, TokenCount
from quire_schemas.openai.answer import ErrorBody
from quire_schemas.openai.chat import ChatCompletion
from quire_schemas.openai.completions import Completion
from quire_schemas.openai.embeddings import EmbeddingList
from quire_schemas.openai.responses import InputTokens, ResponseObject
from quire_schemas.openai.score import ScoreList
from quire_schemas.openai.tokens import Detokenized, Tokenized

AT_ONCE = 8
"""Requests under way at the same time; fewer than one engine takes."""
SECONDS = 30.0
CHAT: dict[str, Any] = {
    "model": "tiny",
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "naïve 🦊"}], "name": "a"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}],
        },
        {"role": "tool", "content": "2", "tool_call_id": "c1"},
        {"role": "user", "content": "Say it"},
    ],
    "temperature": 0.5,
    "top_p": 0.9,
    "n": 2,
    "max_completion_tokens": 8,
    "stop": ["zzz", "yyy"],
    "logit_bias": {"7": -100},
    "logprobs": True,
    "top_logprobs": 2,
    "presence_penalty": 0.1,
    "seed": 5,
    "priority": 0,
    "cache_salt": "naïve",
    "user": "u",
    "stream": True,
    "stream_options": {"include_usage": True},
    "response_format": {"type": "text"},
    "logprob_token_ids": [5],
    "logprobs_mode": "processed_logprobs",
    "bad_words": ["zzz"],
    "truncate_prompt_tokens": 64,
    "truncation_side": "right",
    "return_token_ids": True,
    "repetition_detection": {"max_pattern_size": 3, "min_count": 9},
    "chat_template_kwargs": {"enable_thinking": False},
}
PLAIN: dict[str, Any] = {"model": "org/tiny", "messages": [{"role": "user", "content": "Say it"}], "max_tokens": 4}
COMPLETION: dict[str, Any] = {
    "model": "tiny",
    "prompt": ["Hello", "World"],
    "max_tokens": 4,
    "min_tokens": 1,
    "logprobs": 1,
    "stop": "zzz",
    "top_k": 40,
    "min_p": 0.1,
    "repetition_penalty": 1.1,
    "stop_token_ids": [3],
    "allowed_token_ids": [1, 2, 3],
    "prompt_logprobs": 1,
    "echo": True,
    "best_of": 2,
    "return_tokens_as_token_ids": True,
    "ignore_eos": False,
    "n": 1,
}
BY_IDS: dict[str, Any] = {"model": "tiny", "prompt": [1, 2, 3], "echo": True, "stream": True, "max_tokens": 4}
TOKENIZE: dict[str, Any] = {"model": "tiny", "prompt": "naïve 🦊", "return_token_strs": True}
TURNS: dict[str, Any] = {
    "messages": [{"role": "user", "content": "Say it"}],
    "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}],
    "add_generation_prompt": False,
    "chat_template_kwargs": {"thinking": False},
}
DETOKENIZE: dict[str, Any] = {"model": "org/tiny", "tokens": [1, 2, 300]}
SCORE: dict[str, Any] = {
    "model": "tiny",
    "queries": ["naïve 🦊"],
    "documents": ["a", "b"],
    "pooling": "mean",
    "dimensions": 2,
}
TOOLS: Any = [
    {
        "type": "function",
        "function": {
            "name": "f",
            "description": "naïve 🦊",
            "parameters": {
                "type": "object",
                "properties": {"x": {"type": "integer"}, "y": {"$ref": "#/$defs/y"}},
                "required": ["x"],
                "additionalProperties": False,
                "$defs": {"y": {"enum": ["a", "b"]}},
            },
            "strict": True,
        },
    },
    {"type": "function", "function": {"name": "g"}},
]
CALLING: dict[str, Any] = {
    **PLAIN,
    "tools": TOOLS,
    "tool_choice": "auto",
    "parallel_tool_calls": False,
    "reasoning_effort": "low",
    "include_reasoning": False,
    "documents": [{"title": "a", "text": "b"}],
    "stream": True,
}
FORCED: dict[str, Any] = {
    **PLAIN,
    "tools": TOOLS,
    "tool_choice": {
        "type": "allowed_tools",
        "allowed_tools": {
            "mode": "required",
            "tools": [
                {"type": "function", "function": {"name": "f"}},
            ],
        },
    },
}
STRUCTURED: dict[str, Any] = {
    **PLAIN,
    "separate_reasoning": False,
    "response_format": {
        "type": "json_schema",
        "json_schema": {"name": "a", "schema": {"type": "object", "properties": {"a": {"type": "string"}}}},
    },
}
BOUND: dict[str, Any] = {
    "model": "tiny",
    "prompt": "x",
    "max_tokens": 4,
    "structured_outputs": {"regex": "[a-z ]+", "disable_any_whitespace": False},
}
MESSAGES: dict[str, Any] = {
    "model": "tiny",
    "max_tokens": 4,
    "system": [{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}],
    "messages": [
        {"role": "user", "content": [{"type": "text", "text": "naïve 🦊"}]},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "Hm.", "signature": ""},
                {"type": "text", "text": "Let me look."},
                {"type": "tool_use", "id": "t1", "name": "f", "input": {"x": 1}},
            ],
        },
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t1", "content": "2"}]},
    ],
    "tools": [{"name": "f", "description": "d", "input_schema": TOOLS[0]["function"]["parameters"]}],
    "tool_choice": {"type": "auto", "disable_parallel_tool_use": True},
    "thinking": {"type": "enabled", "budget_tokens": 1024},
    "stop_sequences": ["zzz"],
    "temperature": 0.5,
    "top_k": 5,
    "metadata": {"user_id": "u"},
    "stream": True,
}
SAID: dict[str, Any] = {"model": "tiny", "max_tokens": 4, "messages": [{"role": "user", "content": "Say it"}]}
COUNTED: dict[str, Any] = {
    name: MESSAGES[name] for name in ("model", "system", "messages", "tools", "tool_choice")
}
ITEMS: dict[str, Any] = {
    "model": "tiny",
    "instructions": "Be brief.",
    "input": [
        {"role": "user", "content": [{"type": "input_text", "text": "naïve 🦊"}]},
        {"type": "reasoning", "summary": [{"type": "summary_text", "text": "Hm."}]},
        {"type": "function_call", "call_id": "c1", "name": "f", "arguments": '{"x": 1}'},
        {"type": "function_call_output", "call_id": "c1", "output": "2"},
        {"type": "message", "role": "user", "content": "Say it"},
    ],
    "tools": [{"type": "function", **TOOLS[0]["function"]}],
    "tool_choice": "auto",
    "parallel_tool_calls": True,
    "text": {"format": {"type": "text"}},
    "reasoning": {"effort": "low", "summary": "auto"},
    "include": ["message.output_text.logprobs"],
    "top_logprobs": 1,
    "max_output_tokens": 4,
    "metadata": {"a": "b"},
    "store": False,
    "stream": True,
}
ITEM: dict[str, Any] = {"model": "tiny", "input": "Say it", "max_output_tokens": 4, "previous_response_id": None}
LATER: dict[str, Any] = {**ITEM, "background": True}
INPUT: dict[str, Any] = {name: ITEMS[name] for name in ("model", "instructions", "input", "tools", "tool_choice")}
EMBEDDING: dict[str, Any] = {
    "model": "tiny",
    "input": ["naïve 🦊", "b"],
    "encoding_format": "base64",
    "dimensions": 2,
    "pooling": "mean",
    "user": "u",
}
BATCH: dict[str, Any] = {
    "input_file_id": "file-0",
    "endpoint": "/v1/completions",
    "completion_window": "24h",
    "metadata": {"a": "b"},
    "output_expires_after": {"anchor": "created_at", "seconds": 3600},
}
DOCUMENTS = "{% for each in documents or [] %}{{ each.text }}{% endfor %}"
"""Before the built-in model's template, which shows none."""
BODIES = (
    ("/v1/chat/completions", CHAT),
    ("/v1/chat/completions", PLAIN),
    ("/v1/completions", COMPLETION),
    ("/v1/completions", BY_IDS),
    ("/tokenize", TOKENIZE),
    ("/v1/tokenize", TURNS),
    ("/detokenize", DETOKENIZE),
    ("/v1/score", SCORE),
    ("/v1/chat/completions", CALLING),
    ("/v1/chat/completions", FORCED),
    ("/v1/chat/completions", STRUCTURED),
    ("/v1/completions", BOUND),
    ("/v1/messages", MESSAGES),
    ("/v1/messages", SAID),
    ("/v1/messages/count_tokens", COUNTED),
    ("/v1/responses", ITEMS),
    ("/v1/responses", ITEM),
    ("/v1/responses", LATER),
    ("/v1/responses/input_tokens", INPUT),
    ("/v1/embeddings", EMBEDDING),
    ("/v1/batches", BATCH),
)
KEPT = ("model", "messages", "prompt", "input", "max_tokens")
"""Fields that stay where others are left out, most of the time."""
TYPES = ("text/plain", "", "application/json; charset=latin-1", "APPLICATION/JSON", "multipart/form-data", "json")
HEADERS = (
    ("x-request-id", "\x7f"), ("x-request-id", "a" * 300), ("traceparent", "00-zz-zz-01"),
    ("traceparent", "00-" + "0" * 32 + "-" + "0" * 16 + "-ff"), ("accept", "text/html"),
    ("accept-encoding", "br;q=nan"),
    ("authorization", "Bearer é"), ("content-encoding", "gzip"), ("origin", "null"), ("expect", "200-ok"),
)  # fmt: skip
SHAPES: dict[str, Callable[[bytes], Any]] = {
    "chat/completions": ChatCompletion.model_validate_json,
    "completions": Completion.model_validate_json,
    "tokenize": msgspec.json.Decoder(Tokenized).decode,
    "detokenize": msgspec.json.Decoder(Detokenized).decode,
    "score": msgspec.json.Decoder(ScoreList).decode,
    "messages": msgspec.json.Decoder(MessagesAnswer).decode,
    "messages/count_tokens": msgspec.json.Decoder(TokenCount).decode,
    "responses": msgspec.json.Decoder(ResponseObject).decode,
    "responses/input_tokens": msgspec.json.Decoder(InputTokens).decode,
    "embeddings": msgspec.json.Decoder(EmbeddingList).decode,
}
"""What a whole answer has to be, by its path."""
LAST_EVENTS = {
    "/v1/messages": ("message_stop",),
    "/v1/responses": ("response.completed", "response.incomplete"),
}
"""Where streams have events with names, how they end."""
INSIDES = re.compile(
    r"pydantic|msgspec|litestar|Traceback|site-packages|\.py\b|\bat 0x[0-9a-f]+|/(home|root|tmp|usr|var|opt)/"
)
"""What tells of files, memory and libraries of ours, and of nobody's request."""
Case = tuple[str, bytes, dict[str, str]]


def case(seed: int, number: int) -> Case:
    """Path, body and headers of one mutated request."""
    rng = generator(seed, number)
    path, body = rng.choice(BODIES)
    if rng.random() < 0.3:
        body = {name: body[name] for name in body if rng.random() < 0.6 or name in KEPT}
    data = as_json(rng, damaged(rng, body))
    if rng.random() < 0.15:
        data = scarred(rng, data)
    headers = {"content-type": rng.choice(TYPES) if rng.random() < 0.03 else "application/json"}
    if rng.random() < 0.05:
        headers.update([rng.choice(HEADERS)])
    if rng.random() < 0.03:
        path = rng.choice(("/v1/models/%00", "/v1/models/é", path + "/", path.upper(), f"/{path}", "/v1/x"))
    return path, data, headers


def sound(case: Case, answer: httpx.Response) -> None:
    """A whole answer, a whole stream, or an error as the contract has it."""
    assert answer.status_code < 500, answer.text
    assert answer.headers["x-request-id"]
    if answer.status_code == 200:
        if answer.headers["content-type"].startswith("text/event-stream"):
            events = [line for line in answer.text.split("\n\n") if line]
            if (last := LAST_EVENTS.get(case[0].rstrip("/"))) is not None:
                kinds = [line.removeprefix("event: ").partition("\n")[0] for line in events]
                data = [json.loads(line.partition("\ndata: ")[2]) for line in events]
                assert [each["type"] for each in data] == kinds
                assert kinds[-1] in last
                assert not {"error", "response.failed"} & set(kinds)
                return
            assert all(event.startswith("data: ") for event in events)
            assert events[-1] == "data: [DONE]"
            found = [json.loads(event[6:]) for event in events[:-1]]
            assert not any("error" in event for event in found)
            ended = [choice["index"] for event in found for choice in event["choices"] if choice["finish_reason"]]
            assert ended, "no finish reason"
            assert len(ended) == len(set(ended)), "two finish reasons"
            return
        SHAPES[case[0].strip("/").removeprefix("v1/")](answer.content)
        return
    if Api.of(case[0], ()) is Api.ANTHROPIC:
        told = msgspec.json.decode(answer.content, type=MessagesError).error
        assert told.message.isprintable()
        assert told.message.endswith((".", "?"))
        assert 10 < len(told.message) < 500
        return
    error = ErrorBody.model_validate_json(answer.content).error
    rows = {(row.status, row.type, row.code) for row in TABLE.values()}
    assert (answer.status_code, error.type, error.code) in rows
    assert error.message.isprintable(), f"what a terminal would act upon: {error.message!r}"
    assert error.message.endswith((".", "?"))
    assert 10 < len(error.message) < 500
    assert error.param is None or (error.param.isprintable() and len(error.param) < 200)
    assert not INSIDES.search(answer.text), answer.text
    if answer.status_code == 429:
        assert answer.headers["retry-after"]


@pytest.fixture
def served() -> Iterator[World]:
    with tempfile.TemporaryDirectory(prefix="qr") as name:  # short: a Unix socket's path has 107 bytes
        world = make_world(Path(name))
        yield world
        end_world(world)
        log = (Path(name) / "router.log").read_text()
        assert "Traceback" not in log, log


@pytest.fixture
async def world(served: World) -> AsyncIterator[World]:
    tiny = json.loads((Path(quire.__file__).parent / "builtin/tiny/tokenizer_config.json").read_bytes())
    backend = made.byte_level()
    backend.add_tokens([AddedToken("</think>", special=False, normalized=False)])  # the other mark is there
    made.write(served.folder / "tools", backend, template=DOCUMENTS + tiny["chat_template"])
    engine = await served.engine(text="one two three", tokens_per_step=4, pace=0.0005)
    await served.serve(engine, tokenizer_dir=str(served.folder / "tools"), max_model_len=2048, kv_tokens=2048)
    yield served
    await engine.stop()
    await served.table()


async def test_mutated_requests_are_answered_or_refused_in_shape_and_the_router_serves_on(world: World) -> None:
    limits = httpx.Limits(max_connections=AT_ONCE)
    async with httpx.AsyncClient(base_url=world.url, timeout=SECONDS, limits=limits) as client:
        answers: list[int] = []
        whole: Counter[str] = Counter()

        async def send(seed: int, number: int) -> None:
            path, data, headers = one = case(seed, number)
            begun = time.monotonic()
            try:
                raw = {name.encode(): value.encode() for name, value in headers.items()}
                answer = await client.post(path, content=data, headers=raw)
                sound(one, answer)
            except Exception as error:
                took = time.monotonic() - begun
                raise AssertionError(
                    f"{replay(seed, number)} ({took:.1f} s)\n{path} {headers}\n{data[:3000]!r}"
                ) from error
            answers.append(answer.status_code)
            whole.update([path] * (answer.status_code == 200))

        async def valid() -> None:
            answer = await client.post("/v1/chat/completions", json=PLAIN)
            assert answer.json()["choices"][0]["message"]["content"] == "one ", answer.text

        refused = []
        for path, body in BODIES:
            answer = await client.post(path, json=body)
            sound((path, b"", {}), answer)
            refused += [(path, answer.text)] if answer.status_code != 200 else []
        assert [path for path, _ in refused] == ["/v1/batches"], refused  # there is no such file
        waiting: list[tuple[int, int]] = []
        for numbered in fuzz_cases():
            waiting.append(numbered)
            if len(waiting) == 25 * AT_ONCE:
                await in_turns(send, waiting)
                await valid()
        await in_turns(send, waiting)
        await valid()
    if len(answers) > 100:
        assert {200, 400} <= set(answers)
        assert answers.count(200) > len(answers) / 50, (
            "the mutations leave nothing whole: they test the front door"
        )
        assert {path for path, _ in BODIES if path != "/v1/batches"} <= set(whole), whole

    async def idle() -> bool:
        return not any(engine.running for engine in world.engines)

    deadline = time.monotonic() + 10
    while not await idle():
        assert time.monotonic() < deadline, "requests were left at the engine"
        await asyncio.sleep(0.02)


async def in_turns(send: Any, waiting: list[tuple[int, int]]) -> None:
    """Send all of them, `AT_ONCE` at a time, and empty the list."""
    queue = list(reversed(waiting))

    async def worker() -> None:
        while queue:
            await send(*queue.pop())

    await asyncio.gather(*(worker() for _ in range(AT_ONCE)))
    waiting.clear()


def test_the_same_seed_gives_the_same_requests() -> None:
    assert [case(7, number) for number in range(50)] == [case(7, number) for number in range(50)]
    assert random.Random("7:3").random() == generator(7, 3).random()
