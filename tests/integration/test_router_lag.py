"""Work that would hold the router's event loop up, and how long others wait meanwhile.

Another process asks for /livez every 5 ms over one connection: what it waits is what every stream of the router
would. Figures of a night go as rows to the file that QUIRE_FIGURES names.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import statistics
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from benchmarks.rows import NO_KERNELS, provenance, write
from tests.effort import EFFORT, times
from tests.integration.router_world import CHAT, World

from quire import builtin

LAG = 0.1 if EFFORT > 1 else 1.0
"""Seconds that 99 of 100 others may wait at most; in CI the machine has other things to do."""
LIMIT = 4 << 20
PROBE = """\
import json, socket, sys, threading, time
port = int(sys.argv[1])
ended = threading.Event()
threading.Thread(target=lambda: (sys.stdin.read(), ended.set()), daemon=True).start()
link = socket.create_connection(("127.0.0.1", port), 30)
link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
waits = []
print("ready", flush=True)
while not ended.is_set():
    began = time.monotonic()
    link.sendall(b"GET /livez HTTP/1.1\\r\\nHost: localhost\\r\\n\\r\\n")
    if not link.recv(4096):
        raise SystemExit("the router has closed the connection")
    waits.append(time.monotonic() - began)
    time.sleep(max(0.005 - waits[-1], 0))
print(json.dumps(waits))
"""


EVERY = 0.005


@dataclass
class Waits:
    """Seconds that questions of the probe waited; those that it could not ask while one was waiting count, too."""

    seconds: list[float] = field(default_factory=list)

    def add(self, waited: float) -> None:
        while waited > 0:
            self.seconds.append(waited)
            waited -= EVERY

    @property
    def p99(self) -> float:
        return statistics.quantiles(self.seconds, n=100)[98]


@contextlib.asynccontextmanager
async def probed(world: World) -> AsyncIterator[Waits]:
    """The waits of others meanwhile."""
    found = Waits()
    process = subprocess.Popen(
        [sys.executable, "-c", PROBE, str(world.port)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdin is not None
    assert process.stdout is not None
    assert await asyncio.to_thread(process.stdout.readline) == "ready\n"
    try:
        yield found
        await asyncio.sleep(0.3)  # never so short that there is no percentile
    finally:
        process.stdin.close()
        said = await asyncio.to_thread(process.stdout.read)
        assert await asyncio.to_thread(process.wait, 30) == 0
        process.stdout.close()
    for waited in json.loads(said):
        found.add(waited)


def send(world: World, path: str, body: bytes, *, chunked: bool = False) -> tuple[int, bytes]:
    """The status and the start of the answer, all of which is read. The router need not take the whole body."""
    how = "Transfer-Encoding: chunked" if chunked else f"Content-Length: {len(body)}"
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n{how}\r\n"
    with socket.create_connection(("127.0.0.1", world.port), 60) as link:
        with contextlib.suppress(ConnectionError):
            link.sendall(head.encode() + b"Connection: close\r\n\r\n")
            for start in range(0, len(body), 1 << 18):
                piece = body[start : start + (1 << 18)]
                link.sendall(b"%x\r\n%s\r\n" % (len(piece), piece) if chunked else piece)
            if chunked:
                link.sendall(b"0\r\n\r\n")
        answer = b""
        with contextlib.suppress(ConnectionError):
            while piece := link.recv(1 << 20):
                answer = answer or piece
    return int(answer[9:12] or 0), answer


def chat(**more: Any) -> bytes:
    return json.dumps({**CHAT, "max_tokens": 4, **more}).encode()


def schema(**more: Any) -> bytes:
    return chat(response_format={"type": "json_schema", "json_schema": {"name": "x", **more}})


def nested(depth: int) -> bytes:
    """A schema as deep as that: no JSON library of ours would write it."""
    inside = b'{"type":"object","properties":{"a":' * depth + b'{"type":"null"}' + b"}}" * depth
    return schema(schema="HERE").replace(b'"HERE"', inside)


def tool(number: int, properties: int = 1) -> dict[str, Any]:
    fields = {
        f"field_{each}": {"type": "string", "description": "what it is for " * 4} for each in range(properties)
    }
    return {
        "type": "function",
        "function": {"name": f"tool_{number}", "parameters": {"type": "object", "properties": fields}},
    }


WORK: dict[str, tuple[str, Any, dict[str, Any], set[int]]] = {
    "50 MB": ("chat/completions", lambda: b'{"model": "' + b"x" * (50 << 20), {}, {413}),
    "50 MB in chunks": ("chat/completions", lambda: b'{"model": "' + b"x" * (50 << 20), {"chunked": True}, {413}),
    "text at the limit": (
        "chat/completions",
        lambda: chat(messages=[{"role": "user", "content": "a b " * (LIMIT // 4 - 50)}]),
        {},
        {200, 400},
    ),
    "ids at the limit": (
        "completions",
        lambda: json.dumps({"model": "tiny", "max_tokens": 1, "prompt": [70] * (LIMIT // 4 - 50)}).encode(),
        {},
        {200, 400},
    ),
    "messages at the limit": (
        "chat/completions",
        lambda: chat(messages=[{"role": "user", "content": "x"}] * (LIMIT // 40)),
        {},
        {200, 400},
    ),
    "brackets at the limit": ("chat/completions", lambda: b"[" * (LIMIT - 10), {}, {400}),
    "unknown fields at the limit": (
        "chat/completions",
        lambda: chat(**{f"field_{number}": number for number in range(LIMIT // 24)}),
        {},
        {400},
    ),
    "30k-deep schema": ("chat/completions", lambda: nested(30_000), {}, {400}),
    "wide schema": (
        "chat/completions",
        lambda: schema(
            schema={"type": "object", "properties": {f"p{n}": {"enum": ["a", n]} for n in range(60_000)}}
        ),
        {},
        {200, 400},
    ),
    "1 MB regex": (
        "chat/completions",
        lambda: chat(structured_outputs={"regex": "(a|b)?" * 170_000}),
        {},
        {200, 400},
    ),
    "huge tools": ("chat/completions", lambda: chat(tools=[tool(n, 40) for n in range(500)]), {}, {200, 400}),
    "many tools": ("chat/completions", lambda: chat(tools=[tool(n) for n in range(12_000)]), {}, {200, 400}),
    "200k log-probabilities": (
        "chat/completions",
        lambda: chat(max_tokens=650, n=16, logprobs=True, top_logprobs=20),
        {},
        {200},
    ),
    "200k log-probabilities streamed": (
        "chat/completions",
        lambda: chat(max_tokens=650, n=16, logprobs=True, top_logprobs=20, stream=True),
        {},
        {200},
    ),
    "template bomb": (
        "chat/completions",
        lambda: chat(messages=[{"role": "user", "content": "bomb"}]),
        {"bomb": True},
        {400},
    ),
}
"""Name -> path, the body, how it is sent, statuses that it may be answered with."""
IN_CI = {
    "50 MB", "50 MB in chunks", "messages at the limit", "brackets at the limit", "unknown fields at the limit",
    "30k-deep schema", "1 MB regex", "huge tools", "many tools", "template bomb",
}  # fmt: skip
BOMB = "{% for a in range(9000) %}{% for b in range(9000) %}{{ a }}{% endfor %}{% endfor %}"


@pytest.fixture(scope="module")
def figures() -> Iterator[dict[str, list[float]]]:
    found: dict[str, list[float]] = {}
    yield found
    if path := os.environ.get("QUIRE_FIGURES"):
        rows = []
        for name, seconds in found.items():
            p50, p90, p99 = (statistics.quantiles(seconds, n=100)[place] for place in (49, 89, 98))
            figure = {"p50_s": p50, "p90_s": p90, "p99_s": p99, "max_s": max(seconds)}
            row = {**provenance(NO_KERNELS), "benchmark": "survival", "system": name, "repeat": len(seconds)}
            rows.append({**row, **{key: round(value, 4) for key, value in figure.items()}})
        write(Path(path), rows)


@pytest.mark.parametrize(
    "name", [name if name in IN_CI else pytest.param(name, marks=pytest.mark.nightly) for name in WORK]
)
async def test_r37_others_wait_no_longer_than_a_tenth_of_a_second(
    name: str, world: World, figures: dict[str, list[float]]
) -> None:
    path, make, how, statuses = WORK[name]
    engine = await world.engine(text="word " * 1000)
    template = world.folder / "bomb.jinja"
    template.write_text(BOMB)
    await world.serve(
        engine,
        tokenizer_dir=str(builtin.path("tiny")),
        chat_template_file=str(template) if how.get("bomb") else None,
        max_model_len=2 << 20,
        kv_tokens=4 << 20,
        max_queue_length=100,
    )
    body = make()
    assert len(body) <= LIMIT or statuses == {413}, len(body)
    for _ in range(times(1, 3)):
        async with probed(world) as waits:
            chunked = bool(how.get("chunked"))
            status, answer = await asyncio.to_thread(send, world, f"/v1/{path}", body, chunked=chunked)
        assert status in statuses, (status, answer[:300])
        figures.setdefault(f"others wait beside: {name}", []).extend(waits.seconds)
        print(
            f"{name}: {status}, p99 {waits.p99:.4f} s, at most {max(waits.seconds):.4f} s of {len(waits.seconds)}"
        )
        assert waits.p99 < LAG, f"{waits.p99:.3f} s; at most {max(waits.seconds):.3f} s"
