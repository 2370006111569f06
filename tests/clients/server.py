"""What the clients talk to: one router and real engines, each a process, for a whole session of tests.

Three models, which is all there is to ask for:

- `tiny`, the built-in model, for what a model says;
- `parrot`, a scripted one (docs/testing-clients.md), for exact texts. It has eight places and no queue, so that
  eight sequences of one request are enough for a 429;
- `doomed`, another scripted one, with an engine that is there to be killed, and only once `doom` was called.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import msgspec
from tests.effort import bound
from tests.engine_specs import tiny_spec
from tests.integration.engine_process import Process
from tests.integration.router_world import World, end_world, make_world

from quire_schemas import wire

PLACES: Final = 8
STEP: Final = 0.012
"""Seconds from token to token of the scripted models."""
CONTEXT: Final = 2048
TEXT: Final = "The quick brown fox — naïve café, 你好 🦊🙂 — jumps over the lazy dog. "
ENDLESS: Final[dict[str, Any]] = {"script": TEXT, "ignore_eos": True, "max_tokens": CONTEXT - 148}
"""Fields of an answer that takes twenty seconds: nothing that is tested waits for its end."""
LENGTHY: Final = TEXT * 16
"""A message that a scripted model, which says it again, takes ten seconds for."""
FREED: Final = min(bound(0.3), 5.0)
"""Seconds after which an engine has nothing left of a client that has gone."""


@dataclass
class Server:
    """A running router, its address, and the engines behind it."""

    world: World
    folder: Path
    processes: dict[str, Process] = field(default_factory=dict)
    specs: dict[str, wire.EngineSpec] = field(default_factory=dict)

    @property
    def url(self) -> str:
        """As clients of the OpenAI API want it."""
        return f"{self.world.url}/v1"

    def start(self, model: str, **fields: Any) -> None:
        """Start the engine of a model; `wait` waits for it."""
        folder = self.folder / model
        folder.mkdir()
        spec = tiny_spec(
            model=model,
            replica_id=f"{model}-0",
            socket=str(folder / "e" / "engine.sock"),
            max_num_seqs=PLACES,
            **{"num_blocks": 256, **fields},
        )
        self.specs[model] = spec
        self.processes[model] = Process(msgspec.to_builtins(spec), folder)

    def script(self, model: str, **fields: Any) -> None:
        """Start a scripted engine, whose cache costs nothing."""
        size = {"max_model_len": CONTEXT, "num_blocks": CONTEXT // 4}
        self.start(model, runner="scripted", step_time=STEP, **size, **fields)

    def serve(self) -> None:
        """Wait for the engines that were started, and route to those that live."""
        for process in self.processes.values():
            process.wait_for("ready")
        asyncio.run(self._serve())

    async def _serve(self) -> None:
        specs = [self.specs[model] for model, process in self.processes.items() if process.child.poll() is None]
        await self.world.table(*(self._route(spec) for spec in specs))
        await self.world.connected(*(spec.replica_id for spec in specs))

    def _route(self, spec: wire.EngineSpec) -> wire.ModelRoute:
        return self.world.route(
            wire.ReplicaEndpoint(spec.replica_id, spec.incarnation, spec.socket),
            model=spec.model,
            names=(spec.model,),
            tokenizer_dir=spec.model_dir,
            max_model_len=spec.max_model_len,
            kv_tokens=spec.num_blocks * spec.block_size,
            scripted=spec.runner == "scripted",
            max_queue_length=0 if spec.model == "parrot" else 32,
            stall_seconds=30.0,
        )

    def doom(self) -> None:
        """Start the engine of `doomed`, another one after each that was killed."""
        lives = self.specs["doomed"].incarnation if "doomed" in self.specs else 0
        if lives:
            self.processes.pop("doomed").close()
            shutil.rmtree(self.folder / "doomed")
        self.script("doomed", incarnation=lives + 1)
        self.serve()

    def close(self) -> None:
        for process in self.processes.values():
            process.close()

    def kill(self, model: str) -> None:
        """Kill its engine, as the machine's memory keeper would."""
        child = self.processes[model].child
        if child.poll() is None:
            os.kill(child.pid, signal.SIGKILL)
            child.wait(10)

    def seconds_until_idle(self, model: str, since: float) -> float:
        """Seconds from `since` (`time.monotonic`) until the engine says that it has no sequence and no block."""
        asyncio.run(_idle(self.specs[model].socket))
        return time.monotonic() - since


async def _idle(socket: str) -> None:
    deadline = time.monotonic() + 20
    while True:
        stats = await _stats(socket)
        if (stats.running, stats.waiting, stats.blocks_used) == (0, 0, 0):
            return
        assert time.monotonic() < deadline, f"the engine still has {stats.running} sequences"


async def _stats(socket: str) -> wire.Stats:
    """What an engine says of itself now."""
    reader, writer = await asyncio.open_unix_connection(socket)
    frames: wire.Reader[Any] = wire.Reader(reader, wire.FromEngine)
    writer.write(wire.frame(wire.Hello("script")))
    try:
        while not isinstance(message := await asyncio.wait_for(frames.read(), 10), wire.Stats):
            assert message is not None
    finally:
        writer.close()
    return message


@contextmanager
def server_running() -> Iterator[Server]:
    """A server with `tiny` and `parrot`; in the end nothing of it is left."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="qc")))
        world = make_world(folder)
        stack.callback(end_world, world)
        server = Server(world, folder)
        stack.callback(server.close)
        server.start("tiny")
        server.script("parrot")
        server.serve()
        yield server
        log = (folder / "router.log").read_text()
        assert "Traceback" not in log, log
