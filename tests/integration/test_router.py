"""The router as a process of its own, on a real port.

On one side the official client and raw sockets, on the other engines that speak the real protocol on Unix sockets.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import httpx
import msgspec
import openai
import pytest
from tests.engine_specs import tiny_spec
from tests.integration.wire_engine import WireEngine
from tests.unit.platform import tokenizers_for_tests as made

from quire import builtin
from quire.router.config import LISTEN_FD, BadRouterConfig, RouterConfig, load
from quire.text import Tokenizer
from quire_schemas import openai as shapes
from quire_schemas import signals, wire

TEXT = "The quick brown fox — naïve café, 你好 🦊🙂 — jumps over the lazy dog. " * 3


@dataclass
class World:
    """One router process, its folder, and the engines and tables a test gives it."""

    folder: Path
    process: subprocess.Popen[bytes]
    port: int
    tokenizer: Tokenizer
    listening: socket.socket
    config_file: Path
    engines: list[WireEngine] = field(default_factory=list)
    version: int = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def client(self, **options: Any) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=20, **options)

    def says(self, text: str) -> Callable[[wire.Generate], list[int]]:
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        return lambda _: list(ids)

    def wait_until_up(self) -> None:
        """Until the control socket answers; the file alone may be one that a killed router left."""
        end = time.monotonic() + 20
        while True:
            with socket.socket(socket.AF_UNIX) as probe:
                if probe.connect_ex(str(self.folder / "control.sock")) == 0:
                    return
            if time.monotonic() > end:
                raise AssertionError((self.folder / "router.log").read_text())
            time.sleep(0.02)

    def restart(self) -> None:
        self.process.kill()
        self.process.wait()
        self.process = launch(self.folder, self.listening, self.config_file)

    async def engine(self, name: str = "r1", text: str = TEXT, **options: Any) -> WireEngine:
        engine = WireEngine(self.folder / f"{name}.sock", name, self.says(text), **options)
        self.engines.append(engine)
        return await engine.start()

    def route(self, *replicas: wire.ReplicaEndpoint, **changes: Any) -> wire.ModelRoute:
        fields: dict[str, Any] = {
            "model": "tiny",
            "names": ("tiny", "org/tiny"),
            "revision": 1,
            "template_hash": "abcdef0123456789",
            "tokenizer_dir": str(self.folder / "ck"),
            "chat_template_file": None,
            "max_model_len": 512,
            "kv_tokens": 1024,
            "max_queue_length": 32,
            "max_queue_wait": 10.0,
            "created": 1_700_000_000,
            "replicas": replicas,
            "stall_seconds": 1.0,
        }
        return wire.ModelRoute(**{**fields, **changes})

    async def control(self, message: wire.ToRouter) -> wire.RouterStatus:
        reader, writer = await asyncio.open_unix_connection(self.folder / "control.sock")
        writer.write(wire.frame(message))
        frames: wire.Reader[wire.RouterStatus] = wire.Reader(reader, wire.FromRouter)
        status = await frames.read()
        writer.close()
        assert status is not None
        return status

    async def table(self, *routes: wire.ModelRoute) -> wire.RouterStatus:
        """Put a table into force and wait until each of its replicas that can be is connected."""
        self.version += 1
        return await self.control(wire.RoutingTable(version=self.version, models=routes))

    async def is_connected(self, *names: str) -> bool:
        status = await self.control(wire.GetRouterStatus())
        return set(names) <= {load.replica_id for load in status.replicas if load.connected}

    async def connected(self, *names: str) -> None:
        await eventually(lambda: self.is_connected(*names))

    async def serve(self, *engines: WireEngine, **changes: Any) -> None:
        await self.table(self.route(*(engine.endpoint() for engine in engines), **changes))
        await self.connected(*(engine.replica_id for engine in engines))

    async def metrics(self) -> dict[str, float]:
        async with httpx.AsyncClient() as http:
            text = (await http.get(f"{self.url}/metrics")).text
        lines = [line.rsplit(" ", 1) for line in text.splitlines() if line and not line.startswith("#")]
        return {name: float(value) for name, value in lines}

    async def raw(self, request: bytes) -> bytes:
        """The whole answer to raw bytes, until the router closes the connection."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            writer.write(request)
            return await asyncio.wait_for(reader.read(), 10)
        except TimeoutError:
            raise AssertionError(f"no end of the answer to {request[:60]!r}") from None
        finally:
            writer.close()

    def post(self, path: str, body: bytes, headers: str = "") -> bytes:
        return (
            f"POST {path} HTTP/1.1\r\nHost: localhost:{self.port}\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\nConnection: close\r\n{headers}\r\n"
        ).encode() + body


V = TypeVar("V")


async def eventually(look: Callable[[], Awaitable[V | None]], seconds: float = 10.0) -> V:
    """The first answer of `look` that is neither None nor false."""
    end = time.monotonic() + seconds
    while True:
        found = await look()
        if found:
            return found
        if time.monotonic() > end:
            raise AssertionError("it did not happen in time")
        await asyncio.sleep(0.02)


def launch(folder: Path, listening: socket.socket, config_file: Path) -> subprocess.Popen[bytes]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("OTEL_")}
    with (folder / "router.log").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-W", "error", "-m", "quire.router", str(config_file)],
            env={**environment, LISTEN_FD: str(listening.fileno())},
            pass_fds=[listening.fileno()],
            stderr=log,
        )


def make_world(folder: Path) -> World:
    """A router with an inherited listening socket and an empty table."""
    made.write(folder / "ck", made.byte_level())
    listening = socket.socket()
    listening.bind(("127.0.0.1", 0))
    listening.listen(128)
    config_file = folder / "router.json"
    config = RouterConfig(
        control_socket=str(folder / "control.sock"),
        snapshot_file=str(folder / "table.json"),
        shutdown_grace=2.0,
    )
    config_file.write_bytes(msgspec.json.encode(config))
    process = launch(folder, listening, config_file)
    tokenizer = Tokenizer.load(folder / "ck")
    world = World(folder, process, listening.getsockname()[1], tokenizer, listening, config_file)
    world.wait_until_up()
    return world


def end_world(world: World) -> None:
    world.process.terminate()
    assert world.process.wait(10) == 0
    world.listening.close()


@pytest.fixture(scope="module")
def shared_world() -> Iterator[World]:
    with tempfile.TemporaryDirectory(prefix="qr") as name:  # short: a Unix socket's path has 107 bytes
        world = make_world(Path(name))
        yield world
        end_world(world)


@pytest.fixture
async def world(shared_world: World) -> AsyncIterator[World]:
    """The module's router, with an empty table before and after."""
    yield shared_world
    for engine in shared_world.engines:
        await engine.stop()
    shared_world.engines.clear()
    await shared_world.table()
    log = (shared_world.folder / "router.log").read_text()
    (shared_world.folder / "router.log").write_text("")
    assert "Traceback" not in log, log


@pytest.fixture
async def own_world() -> AsyncIterator[World]:
    """A router of the test's own, to be killed and started again."""
    with tempfile.TemporaryDirectory(prefix="qr") as name:
        world = make_world(Path(name))
        yield world
        for engine in world.engines:
            await engine.stop()
        end_world(world)
        log = (world.folder / "router.log").read_text()
        assert "Traceback" not in log, log


ASK: list[Any] = [{"role": "user", "content": "Say it"}]


def events(answer: bytes) -> list[Any]:
    """The events of a raw stream, out of the chunks of its transfer encoding."""
    body = re.sub(rb"\r\n[0-9a-f]+\r\n|^[0-9a-f]+\r\n", b"", answer.split(b"\r\n\r\n", 1)[1])
    lines = [line[6:] for line in body.split(b"\n\n") if line.startswith(b"data: ")]
    return ["DONE" if line.startswith(b"[DONE]") else json.loads(line) for line in lines]


# ── answers ───────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_chat_whole_and_streamed_say_the_same(world: World) -> None:
    engine = await world.engine()
    await world.serve(engine)
    async with world.client() as client:
        whole = await client.chat.completions.create(model="tiny", messages=ASK)
        stream = await client.chat.completions.create(
            model="tiny", messages=ASK, stream=True, stream_options={"include_usage": True}
        )
        chunks = [chunk async for chunk in stream]
    assert whole.choices[0].message.content == TEXT
    assert whole.choices[0].finish_reason == "stop"
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == TEXT
    assert chunks[-1].usage == whole.usage
    assert whole.usage is not None
    assert whole.usage.prompt_tokens == len(engine.generates[0].token_ids)
    assert whole.usage.completion_tokens == len(world.tokenizer.encode(TEXT)) + 1  # the token that ended it counts
    sent = world.tokenizer.decode(engine.generates[0].token_ids, skip_special_tokens=False)
    assert sent == "<|im_start|>user\nSay it<|im_end|>\n<|im_start|>assistant\n"
    assert engine.generates[0].sampling.max_tokens == 512 - whole.usage.prompt_tokens


async def test_the_events_of_a_chat_stream_have_their_shape_and_order(world: World) -> None:
    await world.serve(await world.engine())
    body = {"model": "tiny", "messages": ASK, "stream": True, "n": 2, "stream_options": {"include_usage": True}}
    got = events(await world.raw(world.post("/v1/chat/completions", json.dumps(body).encode())))
    assert got.pop() == "DONE"
    chunks = [shapes.ChatChunk.model_validate(event) for event in got]
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    for index in (0, 1):
        mine = [c.choices[0] for c in chunks[:-1] if c.choices[0].index == index]
        assert (mine[0].delta.role, mine[0].delta.content) == ("assistant", "")
        assert all(c.delta.role is None and c.delta.content and c.finish_reason is None for c in mine[1:-1])
        assert (mine[-1].delta, mine[-1].finish_reason) == (shapes.ChatDelta(), "stop")
        assert "".join(c.delta.content or "" for c in mine) == TEXT
    assert all("\ufffd" not in (c.choices[0].delta.content or "") for c in chunks[:-1])
    assert all(event["usage"] is None for event in got[:-1])


async def test_running_usage_grows_in_every_chunk(world: World) -> None:
    await world.serve(await world.engine())
    async with world.client() as client:
        stream = await client.chat.completions.create(
            model="tiny",
            messages=ASK,
            stream=True,
            max_tokens=5,
            extra_body={"stream_options": {"continuous_usage_stats": True}},
        )
        usages = [chunk.usage.completion_tokens async for chunk in stream if chunk.usage]
    assert usages == sorted(usages)
    assert usages[-1] == 5


async def test_completions_of_several_prompts(world: World) -> None:
    engine = await world.engine(text="one two three")
    await world.serve(engine)
    ids = world.tokenizer.encode("Hello")
    async with world.client() as client:
        texts = await client.completions.create(model="tiny", prompt=["Hello", "Other"], n=2, max_tokens=100)
        by_ids = await client.completions.create(model="tiny", prompt=ids, echo=True)
        stream = await client.completions.create(model="tiny", prompt=[ids], echo=True, stream=True)
        parts = [chunk async for chunk in stream]
    assert [choice.index for choice in texts.choices] == [0, 1, 2, 3]
    assert {choice.text for choice in texts.choices} == {"one two three"}
    assert by_ids.choices[0].text == "Helloone two three"
    assert "".join(part.choices[0].text for part in parts) == "Helloone two three"
    assert [part.choices[0].finish_reason for part in parts][-1] == "stop"
    assert engine.generates[0].token_ids == engine.generates[4].token_ids == ids
    assert {request.sampling.max_tokens for request in engine.generates[4:]} == {16}


async def test_length_is_reported_as_such(world: World) -> None:
    await world.serve(await world.engine())
    async with world.client() as client:
        answer = await client.chat.completions.create(model="tiny", messages=ASK, max_completion_tokens=3)
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 3


async def test_a_stop_string_is_cut_and_the_engine_told(world: World) -> None:
    engine = await world.engine(tokens_per_step=2)
    await world.serve(engine)
    expected = TEXT[: TEXT.index("fox jum") if "fox jum" in TEXT else TEXT.index("café, 你")]
    stop = "café, 你"
    async with world.client() as client:
        whole = await client.chat.completions.create(model="tiny", messages=ASK, stop=[stop, "never"])
        stream = await client.chat.completions.create(model="tiny", messages=ASK, stop=stop, stream=True)
        pieces = [c.choices[0].delta.content or "" async for c in stream]
        kept = await client.chat.completions.create(
            model="tiny", messages=ASK, stop=stop, extra_body={"include_stop_str_in_output": True}
        )
    assert whole.choices[0].message.content == "".join(pieces) == expected
    assert kept.choices[0].message.content == expected + stop
    assert whole.choices[0].finish_reason == "stop"

    async def told() -> bool:
        return len(engine.aborts) == 3 and not engine.running

    await eventually(told)


async def test_logprobs_line_up_with_the_text_and_stop_where_it_stops(world: World) -> None:
    await world.serve(await world.engine())
    async with world.client() as client:
        answer = await client.chat.completions.create(
            model="tiny", messages=ASK, logprobs=True, top_logprobs=2, stop="fox"
        )
        stream = await client.chat.completions.create(
            model="tiny", messages=ASK, logprobs=True, top_logprobs=2, stop="fox", stream=True
        )
        chunks = [chunk async for chunk in stream]
        plain = await client.completions.create(model="tiny", prompt="x", logprobs=1, max_tokens=4)
    found = answer.choices[0].logprobs
    assert found is not None
    assert found.content is not None
    joined = b"".join(bytes(token.bytes or []) for token in found.content).decode()
    assert answer.choices[0].message.content == "The quick brown "
    assert joined.startswith("The quick brown")
    assert "fox" not in joined
    assert all(len(token.top_logprobs) == 2 and token.logprob == -0.5 for token in found.content)
    streamed = [t for c in chunks if c.choices[0].logprobs for t in c.choices[0].logprobs.content or []]
    assert streamed == found.content
    scores = plain.choices[0].logprobs
    assert scores is not None
    assert scores.text_offset is not None
    assert len(scores.tokens or []) == 4
    assert [
        plain.choices[0].text[at:][: len(t)] for at, t in zip(scores.text_offset, scores.tokens or [], strict=True)
    ] == (scores.tokens)


async def test_sampling_reaches_the_engine_as_asked(world: World) -> None:
    engine = await world.engine()
    await world.serve(engine)
    async with world.client() as client:
        await client.chat.completions.create(
            model="tiny",
            messages=ASK,
            n=2,
            temperature=0.7,
            top_p=0.9,
            seed=5,
            presence_penalty=0.5,
            frequency_penalty=-0.5,
            logit_bias={"7": -100, "8": 3},
            max_tokens=4,
            user="somebody",
            extra_body={
                "top_k": -1,
                "min_p": 0.1,
                "repetition_penalty": 1.1,
                "stop_token_ids": [3],
                "min_tokens": 2,
                "ignore_eos": True,
            },
        )
    first, second = (request.sampling for request in engine.generates)
    assert first == wire.Sampling(
        max_tokens=4,
        min_tokens=2,
        temperature=0.7,
        top_p=0.9,
        top_k=0,
        min_p=0.1,
        seed=5,
        stop_token_ids=(3,),
        ignore_eos=True,
        presence_penalty=0.5,
        frequency_penalty=-0.5,
        repetition_penalty=1.1,
        logit_bias={7: -100.0, 8: 3.0},
    )
    assert second.seed == 6


async def test_the_checkpoints_advice_is_the_default_of_sampling(world: World) -> None:
    made.write(world.folder / "advised", made.byte_level(), generation={"temperature": 0.6, "top_k": 20})
    engine = await world.engine()
    await world.serve(engine, tokenizer_dir=str(world.folder / "advised"))
    async with world.client() as client:
        await client.chat.completions.create(model="tiny", messages=ASK, max_tokens=1)
        await client.chat.completions.create(model="tiny", messages=ASK, max_tokens=1, temperature=0)
    assert [(r.sampling.temperature, r.sampling.top_k) for r in engine.generates] == [(0.6, 20), (0.0, 20)]


async def test_models_by_every_name(world: World) -> None:
    await world.table(world.route())
    async with world.client() as client:
        assert [model.id async for model in client.models.list()] == ["org/tiny", "tiny"]
        card = await client.models.retrieve("org/tiny")
        assert (card.id, card.owned_by, card.created) == ("org/tiny", "quire", 1_700_000_000)
        with pytest.raises(openai.NotFoundError) as caught:
            await client.models.retrieve("other")
    assert caught.value.code == "model_not_found"


async def test_two_models_are_routed_by_name(world: World) -> None:
    one, two = await world.engine("one", "from one"), await world.engine("two", "from two")
    await world.table(
        world.route(one.endpoint(), model="one", names=("one",)),
        world.route(two.endpoint(), model="two", names=("two",)),
    )
    async with world.client() as client:
        for name in ("one", "two"):
            answer = await client.chat.completions.create(model=name, messages=ASK)
            assert (answer.choices[0].message.content, answer.model) == (f"from {name}", name)


# ── bad requests ──────────────────────────────────────────────────────────────────────────────────────────

CHAT = {"model": "tiny", "messages": ASK}


def big(**changes: object) -> bytes:
    return json.dumps({**CHAT, **changes}).encode()


@pytest.mark.parametrize(
    ("body", "status", "param", "code", "words"),
    [
        (b"{", 400, None, None, "line 1, column 2"),
        (b"[]", 400, None, None, "JSON object"),
        (b"\xff", 400, None, None, "UTF-8"),
        (b'{"model": "tiny", "messages": [{"role": "user", "content": "\\ud800"}]}', 400, None, None, "UTF-8"),
        (b"[" * 100_000, 400, None, None, "64 levels"),
        (big(temperature=float("nan")), 400, "temperature", None, "finite"),
        (big(temperature=3), 400, "temperature", None, "at most 2"),
        (big(max_tokens=-1), 400, "max_tokens", None, "at least 1, not -1"),
        (big(n=17), 400, "n", None, "at most 16"),
        (big(logit_bias={"1": 101}), 400, "logit_bias", None, "-100 to 100"),
        (big(logit_bias={"999999": 1}), 400, "logit_bias", None, "vocabulary"),
        (big(tools=[{"type": "function"}]), 400, "tools", None, "not honoured"),
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
        (big(chat_template_kwargs={"messages": []}), 400, "chat_template_kwargs", None, "may not set"),
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
    error = shapes.ErrorBody.model_validate_json(answer.content).error
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
        error = shapes.ErrorBody.model_validate_json(body).error
        assert error.code == code
        if status == 413:
            assert b"connection: close" in head.lower()
    for host_ok in ("127.0.0.1", "LOCALHOST:1", f"[::1]:{world.port}"):
        got = await world.raw(f"GET /livez HTTP/1.1\r\nHost: {host_ok}\r\nConnection: close\r\n\r\n".encode())
        assert got.startswith(b"HTTP/1.1 200"), host_ok


async def test_a_wrong_path_or_method_is_told_what_there_is(world: World) -> None:
    async with httpx.AsyncClient(base_url=world.url) as http:
        nowhere = await http.post("/v1/embeddings", json={})
        wrong = await http.get("/v1/chat/completions")
    words = nowhere.json()["error"]["message"]
    for endpoint in ("POST /v1/chat/completions", "POST /v1/completions", "GET /v1/models/{name}", "GET /health"):
        assert endpoint in words
    assert (wrong.status_code, wrong.headers["allow"]) == (405, "POST, OPTIONS")
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


async def test_a_template_that_breaks_the_compiler_takes_only_its_own_model_down(own_world: World) -> None:
    world = own_world
    bad = "".join(f"{{% for a{i} in messages %}}" for i in range(30)) + "{% endfor %}" * 30
    made.write(world.folder / "bad", made.byte_level(), template=bad)
    engine, other = await world.engine(), await world.engine("r2")
    poisoned = world.route(other.endpoint(), model="bad", names=("bad",), tokenizer_dir=str(world.folder / "bad"))
    await world.table(world.route(engine.endpoint()), poisoned)
    for _ in range(2):
        await world.connected("r1")
        async with world.client() as client:
            assert (await client.chat.completions.create(model="tiny", messages=ASK)).choices
            with pytest.raises(openai.InternalServerError) as caught:
                await client.chat.completions.create(model="bad", messages=ASK)
        assert (caught.value.status_code, caught.value.code) == (503, "model_unusable")
        world.restart()
        world.wait_until_up()


# ── a rollout to another tokenizer ────────────────────────────────────────────────────────────────────────


async def test_a_replica_on_standby_is_connected_and_gets_nothing(world: World) -> None:
    engine, waiting = await world.engine("on"), await world.engine("standby", vocab_size=100)
    await world.table(world.route(engine.endpoint(), waiting.endpoint(standby=True)))
    await world.connected("on", "standby")
    async with world.client() as client:
        for _ in range(4):
            await client.completions.create(model="tiny", prompt=[300], max_tokens=2)
    assert (len(engine.generates), len(waiting.generates)) == (4, 0)
    await world.table(world.route(engine.endpoint(standby=True), waiting.endpoint()))
    async with world.client() as client:
        with pytest.raises(openai.BadRequestError, match="vocabulary of 100"):
            await client.completions.create(model="tiny", prompt=[300], max_tokens=2)
        await client.completions.create(model="tiny", prompt=[30], max_tokens=2)
    assert (len(engine.generates), len(waiting.generates)) == (4, 1)
    await world.table(world.route(engine.endpoint(), waiting.endpoint()))
    async with world.client() as client:
        with pytest.raises(openai.BadRequestError, match="vocabulary of 100"):
            await client.completions.create(model="tiny", prompt=[300], max_tokens=2)


@pytest.mark.parametrize("same", [True, False], ids=["same content", "other content"])
async def test_ids_only_go_to_replicas_of_the_tokenizer_that_made_them(world: World, same: bool) -> None:
    folder = world.folder / f"next-{same}"
    made.write(folder, made.byte_level(), template=made.CHATML + ("" if same else "."))
    old, new = await world.engine("old", stalled=True), await world.engine("new")
    await world.serve(old)
    async with world.client() as client:
        asked = asyncio.create_task(client.chat.completions.create(model="tiny", messages=ASK))

        async def running() -> bool:
            return bool(old.running)

        await eventually(running)
        await world.table(world.route(new.endpoint(), tokenizer_dir=str(folder)))
        await world.connected("new")
        old.cut()
        if same:
            assert (await asked).choices[0].message.content == TEXT
            return
        with pytest.raises(openai.InternalServerError) as caught:
            await asked
        assert (caught.value.status_code, caught.value.code) == (502, "engine_unavailable")
        assert caught.value.response.headers["x-should-retry"] == "true"
        assert not new.generates
        assert (await client.chat.completions.create(model="tiny", messages=ASK)).choices[
            0
        ].message.content == TEXT


# ── engines that fail ─────────────────────────────────────────────────────────────────────────────────────


async def test_an_engine_that_dies_before_the_first_byte_is_replaced_unseen(world: World) -> None:
    dying = await world.engine("dying", die_after=1)
    alive = await world.engine("alive", pace=0.01)
    await world.serve(dying, alive)
    async with world.client() as client:
        answers = await asyncio.gather(
            *(client.chat.completions.create(model="tiny", messages=ASK) for _ in range(12))
        )
    assert all(answer.choices[0].message.content == TEXT for answer in answers), "even above the retry budget"
    assert dying.generates, "the balancer should have tried both"


async def test_an_engine_that_dies_in_a_stream_ends_it_with_one_error_event_and_a_cut(world: World) -> None:
    engine = await world.engine(die_after=5)
    await world.serve(engine)
    body = big(stream=True)
    answer = await world.raw(world.post("/v1/chat/completions", body))
    assert not answer.endswith(b"0\r\n\r\n"), "the answer must not look complete"
    got = events(answer)
    assert got[-1]["error"]["code"] == "engine_died"
    assert got[-1]["error"]["type"] == "server_error"
    assert "DONE" not in got
    assert all(event["choices"][0]["finish_reason"] is None for event in got[:-1])
    text = "".join(event["choices"][0]["delta"].get("content", "") for event in got[:-1])
    assert text
    assert TEXT.startswith(text)
    async with world.client() as client:
        stream = await client.chat.completions.create(model="tiny", messages=ASK, stream=True)
        with pytest.raises(openai.APIError, match="engine died"):
            async for _ in stream:
                pass


async def test_retries_are_bounded_and_the_answer_says_to_try_again(world: World) -> None:
    engine = await world.engine(die_after=1)
    await world.serve(engine)
    async with httpx.AsyncClient() as http:
        answer = await http.post(f"{world.url}/v1/chat/completions", json=CHAT, timeout=20)
    assert answer.status_code == 502
    assert answer.json()["error"]["code"] == "engine_unavailable"
    assert answer.headers["x-should-retry"] == "true"
    assert answer.headers["retry-after"] == "1"
    assert len(engine.generates) == 3


async def test_a_request_that_the_engine_fails_is_ours_to_word(world: World) -> None:
    engine = await world.engine(fail_with="out_of_memory")
    await world.serve(engine)
    async with httpx.AsyncClient() as http:
        answer = await http.post(f"{world.url}/v1/chat/completions", json=CHAT)
    assert answer.status_code == 500
    assert answer.json()["error"]["code"] == "internal_error"
    assert "secret" not in answer.text
    assert "secret" in (world.folder / "router.log").read_text()
    (world.folder / "router.log").write_text("")  # the fixture looks for tracebacks; this one was asked for


async def test_no_replica_is_waited_for_and_then_refused(world: World) -> None:
    await world.table(world.route(max_queue_wait=0.3, eta=7.5))
    began = time.monotonic()
    async with httpx.AsyncClient() as http:
        answer = await http.post(f"{world.url}/v1/chat/completions", json=CHAT)
    assert 0.25 < time.monotonic() - began < 3
    assert answer.status_code == 503
    assert answer.json()["error"]["code"] == "service_unavailable"
    assert (answer.headers["retry-after"], answer.headers["retry-after-ms"]) == ("8", "7500")


async def test_a_stopped_model_says_so_at_once(world: World) -> None:
    engine = await world.engine()
    await world.serve(engine, stopped=True, max_queue_wait=20.0)
    async with httpx.AsyncClient() as http:
        serving = await http.post(f"{world.url}/v1/chat/completions", json=CHAT)
        assert serving.status_code == 200  # as long as one is there, it serves
        await world.table(world.route(max_queue_wait=20.0))
        held = asyncio.create_task(http.post(f"{world.url}/v1/chat/completions", json=CHAT))
        await asyncio.sleep(0.1)
        began = time.monotonic()
        await world.table(world.route(stopped=True, max_queue_wait=20.0))
        answers = [await held, await http.post(f"{world.url}/v1/chat/completions", json=CHAT)]
    assert time.monotonic() - began < 5
    for answer in answers:
        assert answer.status_code == 503
        error = answer.json()["error"]
        assert error["code"] == "service_unavailable"
        assert error["message"] == "The model 'tiny' is stopped: its spec.replicas is 0."
        assert answer.headers["x-should-retry"] == "false"
        assert "retry-after" not in answer.headers


async def test_a_held_request_goes_on_when_a_replica_comes(world: World) -> None:
    await world.table(world.route())
    async with world.client() as client:
        asked = asyncio.create_task(client.chat.completions.create(model="tiny", messages=ASK))

        async def held() -> bool:
            return (await world.metrics())[f'{signals.REQUESTS_HELD}{{model="tiny"}}'] == 1

        await eventually(held)
        await world.serve(await world.engine())
        assert (await asked).choices[0].message.content == TEXT
    assert (await world.metrics())[f'{signals.REQUESTS_HELD}{{model="tiny"}}'] == 0


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
    await world.table(world.route(max_queue_wait=0.4, max_queue_length=0))
    async with httpx.AsyncClient(base_url=world.url) as http:
        first = asyncio.create_task(http.post("/v1/chat/completions", json={**CHAT, "n": 2}))

        async def held() -> bool:
            return (await world.metrics())[f'{signals.REQUESTS_HELD}{{model="tiny"}}'] == 1

        await eventually(held)
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

    async def held(count: int) -> bool:
        return (await world.metrics())[f'{signals.REQUESTS_HELD}{{model="tiny"}}'] == count

    await eventually(lambda: held(1))
    writer.close()
    await eventually(lambda: held(0))


# ── health, metrics, control ──────────────────────────────────────────────────────────────────────────────


async def test_health_is_about_serving(world: World) -> None:
    async with httpx.AsyncClient(base_url=world.url) as http:
        assert (await http.get("/health")).json() == {"status": "unavailable", "models": {}}

        async def states() -> tuple[int, int, int]:
            return tuple([(await http.get(f"/{path}")).status_code for path in ("livez", "readyz", "health")])  # type: ignore[return-value]

        await world.table(world.route())
        assert await states() == (200, 200, 503)
        engine = await world.engine()
        await world.serve(engine)
        assert await states() == (200, 200, 200)
        await world.table(world.route(engine.endpoint(draining=True)))
        assert await states() == (200, 200, 503)
        for path in ("livez", "readyz", "health"):
            head, get = await http.head(f"/{path}"), await http.get(f"/{path}")
            assert (head.status_code, head.content) == (get.status_code, b"")
            assert head.headers["content-length"] == get.headers["content-length"]


async def test_a_stalled_engine_is_unhealthy_and_gets_nothing_more(world: World) -> None:
    stuck = await world.engine("stuck", stalled=True)
    await world.serve(stuck)
    async with httpx.AsyncClient(base_url=world.url, timeout=20) as http, world.client() as client:
        first = asyncio.create_task(client.chat.completions.create(model="tiny", messages=ASK))

        async def sick() -> bool:
            answer = await http.get("/health")
            return answer.status_code == 503 and answer.json()["models"]["tiny"]["stalled"] == 1

        await eventually(sick)
        good = await world.engine("good")
        await world.table(world.route(stuck.endpoint(), good.endpoint()))
        await world.connected("good")
        assert (await client.chat.completions.create(model="tiny", messages=ASK)).choices
        assert (await first).choices[0].message.content == TEXT, "the stuck one goes to the other, too"
        assert (len(stuck.generates), len(good.generates)) == (1, 2)
        assert len(stuck.aborts) == 1


async def test_series_are_there_at_zero_and_leave_with_their_model(world: World) -> None:
    engine = await world.engine()
    await world.serve(engine)
    names = {
        f'{signals.REQUESTS}_total{{finish="stop",model="tiny",operation="chat"}}',
        f'{signals.PROMPT_TOKENS}_total{{model="tiny"}}',
        f'{signals.GENERATION_TOKENS}_total{{model="tiny"}}',
        f'{signals.TIME_TO_FIRST_TOKEN}_count{{model="tiny"}}',
        f'{signals.QUEUE_TIME}_count{{model="tiny"}}',
        f'{signals.KV_CACHE_USAGE}{{model="tiny",replica="r1"}}',
        f'{signals.PREEMPTIONS}_total{{model="tiny",replica="r1"}}',
    }
    before = await world.metrics()
    assert {before[name] for name in names} == {0.0}
    assert before[f'{signals.REPLICA_UP}{{model="tiny",replica="r1"}}'] == 1
    async with world.client() as client:
        await client.chat.completions.create(model="tiny", messages=ASK, max_tokens=7)
        for name in ("nobody", "else", "' OR 1"):
            with pytest.raises(openai.NotFoundError):
                await client.chat.completions.create(model=name, messages=ASK)
    after = await world.metrics()
    assert after.keys() == before.keys()
    assert after[f'{signals.GENERATION_TOKENS}_total{{model="tiny"}}'] == 7
    assert 1 <= after[f'{signals.INTER_TOKEN_LATENCY}_count{{model="tiny"}}'] <= 6  # tokens may come together
    unknown = f'{signals.REQUESTS}_total{{finish="refused",model="-",operation="chat"}}'
    assert after[unknown] == before[unknown] + 3
    await world.table()
    assert not any('"tiny"' in name for name in await world.metrics())


async def test_only_a_newer_table_counts_and_the_last_one_survives_a_restart(own_world: World) -> None:
    world = own_world
    engine = await world.engine()
    await world.serve(engine)
    old = await world.control(wire.RoutingTable(version=1, models=()))
    assert (old.version, len(old.replicas)) == (1, 1)
    world.restart()
    async with world.client() as client:  # connects to the socket we hold; the new router finds it in the backlog
        answer = await client.chat.completions.create(model="tiny", messages=ASK)
    assert answer.choices[0].message.content == TEXT
    world.wait_until_up()
    status = await world.control(wire.GetRouterStatus())
    assert (status.version, status.base_url, status.pid) == (1, world.url, world.process.pid)


async def test_a_broken_snapshot_is_reported_and_left_aside(own_world: World) -> None:
    world = own_world
    (world.folder / "table.json").write_text("{")
    world.restart()
    world.wait_until_up()
    assert (await world.control(wire.GetRouterStatus())).version == 0
    assert "cannot be used" in (world.folder / "router.log").read_text()


async def test_an_engine_with_another_identity_is_not_connected(world: World) -> None:
    engine = await world.engine("r1", incarnation=4)
    other = wire.ReplicaEndpoint("r1", 5, str(engine.socket))
    await world.table(world.route(other))
    await asyncio.sleep(0.3)
    status = await world.control(wire.GetRouterStatus())
    assert (False, 5) in [(load.connected, load.incarnation) for load in status.replicas]
    engine.incarnation = 5
    await world.connected("r1")


async def test_a_replica_that_leaves_keeps_its_streams(world: World) -> None:
    old = await world.engine("old", text="o" * 60, pace=0.01)
    new = await world.engine("new", text="n")
    await world.serve(old)
    async with world.client() as client:
        stream = await client.chat.completions.create(model="tiny", messages=ASK, stream=True)
        first = await anext(aiter(stream))
        assert first.choices[0].delta.role == "assistant"
        status = await world.table(world.route(new.endpoint()))
        assert {load.replica_id: load.in_flight for load in status.replicas} == {"new": 0, "old": 1}
        await world.connected("new")
        other = await client.chat.completions.create(model="tiny", messages=ASK)
        rest = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
    assert other.choices[0].message.content == "n"
    assert rest == "o" * 60

    async def gone() -> bool:
        loads = (await world.control(wire.GetRouterStatus())).replicas
        return [load.replica_id for load in loads] == ["new"]

    await eventually(gone)


@pytest.mark.parametrize("draining", [False, True])
async def test_only_the_loss_of_a_serving_replica_is_a_warning(world: World, draining: bool) -> None:
    engine = await world.engine()
    await world.serve(engine)
    await world.table(world.route(engine.endpoint(draining=draining)))
    await engine.stop()
    log = world.folder / "router.log"

    async def told() -> str | None:
        text = log.read_text()
        return text if "nothing listens" in text else None

    warnings = [line for line in (await eventually(told)).splitlines() if "WARNING" in line]
    assert [line.partition("replica r1: ")[2] for line in warnings] == (
        [] if draining else ["the engine closed the connection"]
    )


async def test_limits_go_to_the_engines_and_their_hash_comes_back(world: World) -> None:
    engine = await world.engine()
    await world.serve(engine)
    limits = wire.Limits(hot_hash="h9", max_num_seqs=2, max_num_batched_tokens=64, chunked_prefill=True)
    await world.control(wire.SetLimits(replica_ids=("r1",), limits=limits))

    async def reported() -> bool:
        return (await world.control(wire.GetRouterStatus())).replicas[0].hot_hash == "h9"

    await eventually(reported)
    assert engine.limits == limits


async def test_garbage_on_the_control_socket_ends_that_connection_alone(world: World) -> None:
    reader, writer = await asyncio.open_unix_connection(world.folder / "control.sock")
    writer.write(b"\xff\xff\xff\xff")
    assert await reader.read() == b""
    writer.close()
    assert (await world.control(wire.GetRouterStatus())).version == world.version
    mode = (world.folder / "control.sock").stat().st_mode & 0o777
    assert mode == 0o600


async def test_sigterm_lets_a_stream_finish(own_world: World) -> None:
    world = own_world
    engine = await world.engine(pace=0.005)
    await world.serve(engine)
    async with world.client() as client:
        stream = await client.chat.completions.create(model="tiny", messages=ASK, stream=True)
        await anext(aiter(stream))
        world.process.send_signal(signal.SIGTERM)
        text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
    assert text == TEXT


async def test_sigterm_ends_a_stream_that_takes_too_long_with_an_error(own_world: World) -> None:
    world = own_world
    engine = await world.engine(pace=0.05, text=TEXT * 3)
    await world.serve(engine)
    async with world.client() as client:
        stream = await client.chat.completions.create(model="tiny", messages=ASK, stream=True)
        with pytest.raises(openai.APIError, match="server stopped"):
            async for _ in stream:
                world.process.send_signal(signal.SIGTERM)


async def test_told_to_finish_it_ends_what_outlasts_the_grace_and_then_itself(own_world: World) -> None:
    world = own_world
    engine = await world.engine(pace=0.05, text=TEXT * 3)
    await world.serve(engine)
    asked = asyncio.create_task(world.raw(world.post("/v1/chat/completions", big(stream=True))))
    late = asyncio.create_task(world.raw(world.post("/v1/chat/completions", big(max_tokens=4))))

    async def running() -> bool:
        return bool(engine.running)

    await eventually(running)
    began = time.monotonic()
    await world.control(wire.Finish(grace=0.7))
    got = events(await asked)
    assert 0.6 < time.monotonic() - began < 2.7
    assert got[-1]["error"]["code"] == "service_unavailable"
    assert ["error" in event for event in got] == [False] * (len(got) - 1) + [True]
    assert (await late).startswith(b"HTTP/1.1 200"), "what ends within the grace ends as it should"
    assert await asyncio.to_thread(world.process.wait, 3) == 0
    assert time.monotonic() - began < 0.7 + 2


async def test_the_clients_trace_reaches_the_engine(world: World) -> None:
    engine = await world.engine()
    await world.serve(engine)
    async with httpx.AsyncClient() as http:
        trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
        await http.post(f"{world.url}/v1/chat/completions", json=CHAT, headers={"traceparent": trace})
    assert engine.generates[0].trace == trace


# ── the real engine ───────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def real_engine(world: World) -> Iterator[wire.ReplicaEndpoint]:
    """The built-in model in an engine process."""
    endpoint = wire.ReplicaEndpoint("real", 1, str(world.folder / "real" / "engine.sock"))
    spec = tiny_spec(
        replica_id=endpoint.replica_id,
        incarnation=endpoint.incarnation,
        socket=endpoint.socket,
        num_blocks=64,
        max_num_batched_tokens=128,
    )
    path = world.folder / "real.json"
    path.write_bytes(msgspec.json.encode(spec))
    reading, writing = os.pipe()
    with (world.folder / "engine.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "quire_engine", str(path), "--status-fd", str(writing)],
            pass_fds=[writing],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stderr=log,
        )
    os.close(writing)
    yield endpoint
    process.terminate()
    process.wait(10)
    os.close(reading)


async def test_the_built_in_model_answers_through_a_real_engine(
    world: World, real_engine: wire.ReplicaEndpoint
) -> None:
    folder = str(builtin.path("tiny"))
    await world.table(world.route(real_engine, tokenizer_dir=folder))
    await eventually(lambda: world.is_connected("real"), 60)
    async with world.client() as client:
        plain: Any = {"model": "tiny", "messages": ASK, "max_tokens": 24}
        whole = await client.chat.completions.create(**plain)
        chunks = [chunk async for chunk in await client.chat.completions.create(**plain, stream=True)]
        many = await asyncio.gather(*(client.chat.completions.create(**plain) for _ in range(6)))
        seeded = [
            await client.chat.completions.create(
                **plain, n=2, temperature=1.5, seed=7, logprobs=True, top_logprobs=3
            )
            for _ in range(2)
        ]
        ids = Tokenizer.load(builtin.path("tiny")).encode("The", add_special_tokens=False)
        by_ids = await client.completions.create(model="tiny", prompt=ids, max_tokens=8, temperature=0)
        by_text = await client.completions.create(model="tiny", prompt="The", max_tokens=8, temperature=0)
        begun = await client.chat.completions.create(
            **{**plain, "max_tokens": 400}, stream=True, extra_body={"ignore_eos": True}
        )
        await anext(aiter(begun))
        await begun.close()
    answer = whole.choices[0].message.content
    assert answer
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == answer
    assert {one.choices[0].message.content for one in many} == {answer}, "alone and in a batch"
    assert [c.message.content for c in seeded[0].choices] == [c.message.content for c in seeded[1].choices]
    first = seeded[0].choices[0]
    assert first.logprobs is not None
    assert first.logprobs.content is not None
    assert (
        b"".join(bytes(t.bytes or []) for t in first.logprobs.content).decode("utf-8", "replace")
        == first.message.content
    )
    assert all(len(t.top_logprobs) == 3 for t in first.logprobs.content)
    assert by_ids.choices[0].text == by_text.choices[0].text

    async def idle() -> bool:
        found = await world.metrics()
        labels = '{model="tiny",replica="real"}'
        return found[signals.NUM_REQUESTS_RUNNING + labels] == 0 and found[signals.KV_CACHE_USAGE + labels] == 0

    await eventually(idle)


@pytest.mark.parametrize("content", ["", "{}", '{"control_socket": "x", "snapshot_file": "y", "sprt": 1}'])
def test_a_wrong_configuration_is_named(tmp_path: Path, content: str) -> None:
    file = tmp_path / "c.json"
    file.write_text(content)
    with pytest.raises(BadRouterConfig, match=r"c\.json"):
        load(file)


def test_a_wrong_configuration_ends_the_router_with_78(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "quire.router", str(tmp_path / "absent")], capture_output=True, text=True
    )
    assert done.returncode == 78
    assert done.stderr.startswith("error: ")
