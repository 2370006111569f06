"""A router and two replicas as they run in production: real engines under real shims, to be killed and stopped."""

from __future__ import annotations

import asyncio
import json
import os
import random
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import msgspec
from tests import oracle
from tests.engine_specs import tiny_spec
from tests.integration.router_world import World, eventually
from tests.integration.wire_engine import TEMPLATE_HASH
from tests.oracle import Reading

from quire import builtin
from quire_operators.fleet.local import SHIM
from quire_schemas import wire

SYSTEM = list(range(200, 240))
"""What all prompts begin with."""
FAULTY = Path(__file__).with_name("faulty_engine.py")


class Replica:
    """One engine under its shim. `start` again after it died: the same replica, the same socket."""

    def __init__(self, folder: Path, name: str, **spec: Any) -> None:
        self.folder = folder
        self.name = name
        folder.mkdir(mode=0o700)
        self.socket = folder / "engine.sock"
        self.shim_socket = folder / "shim.sock"
        fields = {
            "replica_id": name, "socket": str(self.socket), "max_num_seqs": 3, "prefix_caching": True,
            "async_scheduling": name == "b",  # one of each, in case they differ
        }  # fmt: skip
        (folder / "engine.json").write_bytes(msgspec.json.encode(tiny_spec(**{**fields, **spec})))
        self.shim: subprocess.Popen[bytes] | None = None
        self.pid = 0

    def start(self) -> None:
        self.shim_socket.unlink(missing_ok=True)
        document = {
            "identity": {"installId": "i", "replicaId": self.name, "incarnation": 1, "nonce": "n"},
            "argv": [sys.executable, str(FAULTY), str(self.folder / "engine.json"), "--status-fd", "{status_fd}"],
            "env": {**os.environ, "OMP_NUM_THREADS": "1"},
            "cwd": "/",
            "log": str(self.folder / "engine.log"),
            "socket": str(self.shim_socket),
            "exitFile": str(self.folder / "exit.json"),
            "grace": 2.0,
        }
        (self.folder / "shim.json").write_text(json.dumps(document))
        self.shim = subprocess.Popen(
            [sys.executable, "-I", "-S", str(SHIM), str(self.folder / "shim.json")],
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        assert self.shim.stdout is not None
        with self.shim.stdout as said:
            assert said.readline() == b"ready\n"
        self.pid = self.ask("hello")["childPid"]

    def ask(self, op: str) -> dict[str, Any]:
        with closing(socket.socket(socket.AF_UNIX)) as sock:
            sock.settimeout(20)
            sock.connect(str(self.shim_socket))
            with sock.makefile("rwb") as file:
                file.write(json.dumps({"op": op}).encode() + b"\n")
                file.flush()
                answer: dict[str, Any] = json.loads(file.readline())
        return answer

    @property
    def lives(self) -> bool:
        """Whether its shim does."""
        return self.shim is not None and self.shim.poll() is None

    def engine_lives(self) -> bool:
        try:
            return Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
        except (FileNotFoundError, ProcessLookupError):
            return False

    def exit_record(self) -> dict[str, Any]:
        """What the shim left, once it has ended."""
        assert self.shim is not None
        assert self.shim.wait(30) == 0
        record: dict[str, Any] = json.loads((self.folder / "exit.json").read_text())
        return record

    def begin_to_end(self) -> None:
        if self.lives and self.shim is not None:
            self.shim.terminate()

    def end(self) -> None:
        if self.shim is not None:
            self.shim.wait(20)

    async def stats(self) -> wire.Stats:
        """What the engine says of itself now."""
        reader, writer = await asyncio.open_unix_connection(self.socket)
        frames: wire.Reader[Any] = wire.Reader(reader, wire.FromEngine)
        writer.write(wire.frame(wire.Hello("script")))
        try:
            while not isinstance(message := await asyncio.wait_for(frames.read(), 30), wire.Stats):
                assert message is not None
        finally:
            writer.close()
        return message

    async def is_empty(self) -> bool:
        stats = await self.stats()
        return (stats.running, stats.waiting, stats.blocks_used, stats.kv_slots_used) == (0, 0, 0, 0)


@dataclass
class House:
    world: World
    replicas: tuple[Replica, Replica]
    references: list[str] = field(default_factory=list)
    """By the number of the prompt."""
    max_tokens: int = 40
    max_migrations: int = 0
    rng: random.Random = field(default_factory=lambda: random.Random(7))

    async def open(self) -> None:
        """Start what does not run, and wait until the router has both."""
        for replica in self.replicas:
            if not replica.lives:
                replica.start()
        await self.world.table(self._route())
        await eventually(lambda: self.world.is_ready(2), 90)

    def _route(self) -> wire.ModelRoute:
        ends = [
            wire.ReplicaEndpoint(replica.name, 1, str(replica.socket), template_hash=TEMPLATE_HASH)
            for replica in self.replicas
        ]
        return self.world.route(
            *ends,
            tokenizer_dir=str(builtin.path("tiny")),
            max_queue_wait=60.0,
            prefix_caching=True,
            max_migrations=self.max_migrations,
        )

    async def learn(self, prompts: int) -> None:
        """Ask each prompt once: what the running engines say is the reference."""
        async with self.http() as http:
            for prompt in range(prompts):
                heard = await self.ask(http, prompt, stream=False)
                assert heard.finish_reason == "length"
                self.references.append(heard.text)

    def http(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(base_url=self.world.url, timeout=60)

    def body(self, prompt: int, *, stream: bool) -> dict[str, Any]:
        return {
            "model": "tiny",
            "prompt": [*SYSTEM, 50 + prompt, 60, 70 + prompt],
            "temperature": 0,
            "max_tokens": self.max_tokens,
            "ignore_eos": True,
            "stream": stream,
        }

    async def ask(self, http: httpx.AsyncClient, prompt: int, *, stream: bool) -> Reading:
        heard = Reading(str(prompt), stream=stream)
        async with http.stream("POST", "/v1/completions", json=self.body(prompt, stream=stream)) as answer:
            heard.status = answer.status_code
            if answer.status_code != 200 or not stream:
                oracle.note_whole(heard, await answer.aread())
            else:
                try:
                    async for line in answer.aiter_lines():
                        oracle.note_line(heard, line)
                except httpx.RemoteProtocolError:
                    assert heard.errors, "the stream was cut without a word"
        heard.ended_at = time.monotonic()
        return heard

    def verify(self, heard: Reading) -> None:
        """An answer is a prefix of its reference, equal to it if it says that it is whole; silence is no end."""
        oracle.check(heard, self.references[int(heard.prompt)])

    async def under_load(self, clients: int, act: Callable[[list[Reading]], Any]) -> list[Reading]:
        """Ask with so many clients, half of them streaming, until `act(all that was asked so far)` is over."""
        heard: list[Reading] = []
        over = asyncio.Event()

        async def client(number: int) -> None:
            async with self.http() as http:
                while not over.is_set():
                    prompt = self.rng.randrange(len(self.references))
                    heard.append(await self.ask(http, prompt, stream=number % 2 == 0))

        asking = [asyncio.create_task(client(number)) for number in range(clients)]
        try:
            await eventually(lambda: _done(len(heard) >= clients), 60)
            await act(heard)
        finally:
            over.set()
            await asyncio.gather(*asking)
        return heard

    def close(self) -> None:
        for replica in self.replicas:
            replica.begin_to_end()
        for replica in self.replicas:
            replica.end()


async def _done(value: bool) -> bool:
    return value
