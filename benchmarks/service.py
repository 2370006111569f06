"""The served model as processes: one engine, routers before it, a collector.

All routers share the engine, so that nothing but the router's own settings differs between two of them. The
collector is a process of its own, as it is in life, and does no more than read and answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from benchmarks.client import fetch, keep_busy
from benchmarks.workload import Job
from quire.router.config import LISTEN_FD, RouterConfig
from quire_schemas import wire

START_SECONDS = 600.0
COLLECTOR = """\
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_POST(self):
        self.rfile.read(int(self.headers["content-length"]))
        self.send_response(200)
        self.send_header("content-length", "0")
        self.end_headers()
    def log_message(self, *_):
        return
server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
print(server.server_address[1], flush=True)
server.serve_forever()
"""


def plain_environment() -> dict[str, str]:
    """Ours without what asks for traces."""
    return {name: value for name, value in os.environ.items() if not name.startswith("OTEL_")}


@contextlib.contextmanager
def running(command: Sequence[str], log: Path, **options: object) -> Iterator[subprocess.Popen[str]]:
    """A process for as long as this is entered; what it says on stderr goes to `log`."""
    with log.open("wb") as said:
        process = subprocess.Popen(command, stderr=said, text=True, **options)  # type: ignore[call-overload]
    try:
        yield process
    finally:
        process.terminate()
        process.wait(30)
        if process.stdout is not None:
            process.stdout.close()


@contextlib.contextmanager
def collector(folder: Path) -> Iterator[str]:
    """A collector's base URL."""
    command = [sys.executable, "-c", COLLECTOR]
    with running(command, folder / "collector.log", stdout=subprocess.PIPE) as process:
        if process.stdout is None:
            raise RuntimeError("no pipe")
        yield f"http://127.0.0.1:{int(process.stdout.readline())}"


@contextlib.contextmanager
def engine(
    folder: Path, spec: wire.EngineSpec, name: str = "engine"
) -> Iterator[tuple[wire.ReplicaEndpoint, int]]:
    """An engine process: its socket, which lies in `folder`, and its number."""
    endpoint = wire.ReplicaEndpoint(name, 1, str(folder / f"{name}.sock"))
    spec = msgspec.structs.replace(spec, replica_id=endpoint.replica_id, socket=endpoint.socket)
    path = folder / f"{name}.json"
    path.write_bytes(msgspec.json.encode(spec))
    with running([sys.executable, "-m", "quire_engine", str(path)], folder / f"{name}.log") as process:
        yield endpoint, process.pid


@dataclass(frozen=True, slots=True)
class Router:
    """A router process."""

    name: str
    port: int
    pid: int

    async def run(self, model: str, jobs: Sequence[Job], clients: int) -> float:
        """Seconds for all jobs as streams. Raises if one is not answered in full."""
        start = time.perf_counter()
        await keep_busy(self.port, model, jobs, clients)
        return time.perf_counter() - start

    async def counts(self) -> dict[str, float]:
        """The unlabelled and labelled series of its /metrics."""
        text = (await fetch(self.port, "GET", "/metrics")).decode()
        lines = [line.rsplit(" ", 1) for line in text.splitlines() if line.startswith("quire_")]
        return {name: float(value) for name, value in lines}


@contextlib.contextmanager
def router(folder: Path, name: str, environment: Mapping[str, str]) -> Iterator[Router]:
    """A router process with these variables; it serves nothing until `connect`."""
    own = folder / name
    own.mkdir()
    listening = socket.socket()
    listening.bind(("127.0.0.1", 0))
    listening.listen(1024)
    config = RouterConfig(control_socket=str(own / "c.sock"), snapshot_file=str(own / "table.json"))
    (own / "router.json").write_bytes(msgspec.json.encode(config))
    command = [sys.executable, "-m", "quire.router", str(own / "router.json")]
    variables = {**plain_environment(), **environment, LISTEN_FD: str(listening.fileno())}
    with running(command, own / "router.log", env=variables, pass_fds=[listening.fileno()]) as process:
        yield Router(name, listening.getsockname()[1], process.pid)
    listening.close()


def route(spec: wire.EngineSpec, endpoint: wire.ReplicaEndpoint) -> wire.ModelRoute:
    """How a router serves the engine of `spec`, by the name of its model."""
    return wire.ModelRoute(
        model=spec.model,
        names=(spec.model,),
        revision=1,
        template_hash="",
        tokenizer_dir=spec.model_dir,
        chat_template_file=None,
        max_model_len=spec.max_model_len,
        kv_tokens=spec.num_blocks * spec.block_size,
        max_queue_length=4096,
        max_queue_wait=600.0,
        created=0,
        replicas=(endpoint,),
    )


async def connect(folder: Path, name: str, *routes: wire.ModelRoute) -> None:
    """Give the router a table with these routes, and wait until it is connected to all of their engines."""
    message: wire.ToRouter = wire.RoutingTable(version=1, models=routes)
    wanted = sum(len(route.replicas) for route in routes)
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        with contextlib.suppress(FileNotFoundError, ConnectionRefusedError):
            reader, writer = await asyncio.open_unix_connection(folder / name / "c.sock")
            writer.write(wire.frame(message))
            status = await wire.Reader[wire.RouterStatus](reader, wire.FromRouter).read()
            writer.close()
            connected = sum(load.connected for load in status.replicas) if status is not None else 0
            if connected == wanted:
                return
            message = wire.GetRouterStatus()
        await asyncio.sleep(0.1)
    said = "".join(log.read_text()[-500:] for log in (*folder.glob("*.log"), folder / name / "router.log"))
    raise RuntimeError(f"the router {name} is not connected to its engines:\n{said}")
