"""The router as a process of its own, on a real port, and what tests put around it.

On one side the official client and raw sockets, on the other engines that speak the real protocol on Unix sockets.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import httpx
import msgspec
import openai
from tests.integration.wire_engine import TEMPLATE_HASH, WireEngine
from tests.unit.platform import tokenizers_for_tests as made

from quire.router.config import LISTEN_FD, RouterConfig
from quire.text import Tokenizer
from quire_schemas import signals, wire

TEXT = "The quick brown fox — naïve café, 你好 🦊🙂 — jumps over the lazy dog. " * 3
ASK: list[Any] = [{"role": "user", "content": "Say it"}]
CHAT = {"model": "tiny", "messages": ASK}


def big(**changes: object) -> bytes:
    return json.dumps({**CHAT, **changes}).encode()


def events(answer: bytes) -> list[Any]:
    """The events of a raw stream, out of the chunks of its transfer encoding."""
    body = re.sub(rb"\r\n[0-9a-f]+\r\n|^[0-9a-f]+\r\n", b"", answer.split(b"\r\n\r\n", 1)[1])
    lines = [line[6:] for line in body.split(b"\n\n") if line.startswith(b"data: ")]
    return ["DONE" if line.startswith(b"[DONE]") else json.loads(line) for line in lines]


@dataclass
class World:
    """One router process, its folder, and the engines and tables a test gives it."""

    folder: Path
    process: subprocess.Popen[bytes]
    port: int
    tokenizer: Tokenizer
    listening: socket.socket
    config_file: Path
    environment: dict[str, str] = field(default_factory=dict)
    """Variables of the router's process besides our own."""
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

    def wait_for_workers(self, count: int) -> tuple[wire.WorkerStatus, ...]:
        """Until so many processes take requests; the head is the first of them."""
        end = time.monotonic() + 30
        while True:
            self.wait_until_up()
            with socket.socket(socket.AF_UNIX) as line:
                line.connect(str(self.folder / "control.sock"))
                line.sendall(wire.frame(wire.GetRouterStatus()))
                with line.makefile("rb") as answer:
                    body = answer.read(int.from_bytes(answer.read(4)))
            found = msgspec.msgpack.decode(body, type=wire.RouterStatus).workers
            if len(found) == count:
                return found
            if time.monotonic() > end:
                raise AssertionError((self.folder / "router.log").read_text())
            time.sleep(0.02)

    def restart(self, number: int = signal.SIGKILL, status_fd: int | None = None) -> None:
        """End the router by a signal, and start it again."""
        self.process.send_signal(number)
        self.process.wait()
        self.process = launch(self.folder, self.listening, self.config_file, self.environment, status_fd)

    async def engine(self, name: str = "r1", text: str = TEXT, **options: Any) -> WireEngine:
        engine = WireEngine(self.folder / f"{name}.sock", name, self.says(text), **options)
        self.engines.append(engine)
        return await engine.start()

    def route(self, *replicas: wire.ReplicaEndpoint, **changes: Any) -> wire.ModelRoute:
        fields: dict[str, Any] = {
            "model": "tiny",
            "names": ("tiny", "org/tiny"),
            "revision": 1,
            "template_hash": TEMPLATE_HASH,
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
        answer = await self.asked(message)
        assert isinstance(answer, wire.RouterStatus)
        return answer

    async def asked(self, message: wire.ToRouter) -> wire.FromRouter:
        """One message over the control socket, and its answer."""
        reader, writer = await asyncio.open_unix_connection(self.folder / "control.sock")
        writer.write(wire.frame(message))
        frames: wire.Reader[wire.FromRouter] = wire.Reader(reader, wire.FromRouter)
        answer = await frames.read()
        writer.close()
        await writer.wait_closed()
        assert answer is not None
        return answer

    async def table(
        self,
        *models: wire.ModelRoute,
        routes: Sequence[wire.TrafficRoute] = (),
        access: Sequence[wire.Tenant] = (),
        budgets: Sequence[wire.AccessBudget] = (),
        **http: Any,
    ) -> wire.RouterStatus:
        """Put a table into force, with these settings of the gateway."""
        self.version += 1
        http_settings = wire.HttpSettings(**http)
        return await self.control(
            wire.RoutingTable(self.version, models, http_settings, tuple(routes), tuple(access), tuple(budgets))
        )

    async def is_connected(self, *names: str) -> bool:
        status = await self.control(wire.GetRouterStatus())
        return set(names) <= {load.replica_id for load in status.replicas if load.connected}

    async def connected(self, *names: str) -> None:
        await eventually(lambda: self.is_connected(*names))

    async def serve(self, *engines: WireEngine, **changes: Any) -> None:
        await self.table(self.route(*(engine.endpoint() for engine in engines), **changes))
        await self.connected(*(engine.replica_id for engine in engines))

    async def serve_process(self, spec: wire.EngineSpec, **changes: Any) -> None:
        """Serve an engine that runs as a process, with the tokenizer of its checkpoint."""
        endpoint = wire.ReplicaEndpoint(spec.replica_id, spec.incarnation, spec.socket)
        await self.table(self.route(endpoint, tokenizer_dir=spec.model_dir, **changes))
        await self.connected(spec.replica_id)

    async def holds(self, count: int, model: str = "tiny") -> bool:
        """Whether so many of a model's requests wait for a replica."""
        return (await self.metrics())[f'{signals.REQUESTS_HELD}{{model="{model}"}}'] == count

    async def is_ready(self, replicas: int) -> bool:
        """Whether /health counts so many replicas as ready."""
        async with httpx.AsyncClient() as http:
            models = (await http.get(f"{self.url}/health")).json()["models"]
        return [model["ready"] for model in models.values()] == [replicas]

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


def launch(
    folder: Path,
    listening: socket.socket,
    config_file: Path,
    more: dict[str, str],
    status_fd: int | None = None,
) -> subprocess.Popen[bytes]:
    told = [] if status_fd is None else [status_fd]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("OTEL_")}
    with (folder / "router.log").open("ab") as log:
        return subprocess.Popen(
            [
                sys.executable,
                "-W",
                "error",
                "-m",
                "quire.router",
                str(config_file),
                *(f"--status-fd={fd}" for fd in told),
            ],
            env={**environment, **more, LISTEN_FD: str(listening.fileno())},
            pass_fds=[listening.fileno(), *told],
            stderr=log,
        )


WORKERS = int(os.environ.get("QUIRE_TEST_WORKERS", "1"))
"""Processes of the router that tests have, unless they say how many."""


def make_world(folder: Path, environment: dict[str, str] | None = None, workers: int = WORKERS) -> World:
    """A router with an inherited listening socket and an empty table; `environment` adds to its variables."""
    made.write(folder / "ck", made.byte_level())
    listening = socket.socket()
    listening.bind(("127.0.0.1", 0))
    listening.listen(128)
    config_file = folder / "router.json"
    config = RouterConfig(
        control_socket=str(folder / "control.sock"),
        snapshot_file=str(folder / "table.json"),
        shutdown_grace=2.0,
        workers=workers,
    )
    config_file.write_bytes(msgspec.json.encode(config))
    more = environment or {}
    process = launch(folder, listening, config_file, more)
    tokenizer = Tokenizer.load(folder / "ck")
    world = World(folder, process, listening.getsockname()[1], tokenizer, listening, config_file, more)
    world.wait_until_up()
    world.wait_for_workers(workers)
    return world


@contextlib.contextmanager
def a_world(folder: Path, environment: dict[str, str] | None = None, workers: int = WORKERS) -> Iterator[World]:
    """`make_world` for a block: ended in order with it, and of a block that failed nothing is left running."""
    world = make_world(folder, environment, workers)
    try:
        yield world
        end_world(world)
    finally:
        world.process.kill()
        world.process.wait()
        world.listening.close()


def end_world(world: World) -> None:
    world.process.terminate()
    code = world.process.wait(10)
    world.listening.close()
    assert code == 0
