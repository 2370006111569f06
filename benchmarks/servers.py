"""Which HTTP server stands before the router: what each takes of the processor around a small application.

    quire               uvicorn with the router's own protocol (`quire.router.http`)
    uvicorn-h11         uvicorn as it comes
    uvicorn-httptools   with llhttp in C in place of h11
    granian             hyper in Rust, which calls the application; its threads are on the same core

Each on asyncio, and on uvloop where that is installed (`NAME/uvloop`); a server that is not installed is left out
by name. The server has the last core. One process on the first one asks, 32 at a time on kept connections:
`whole` answers of 400 bytes, `stream`s of 100 pieces. In turns; `quire` twice, so that `again` is the noise.

It says what reading and writing HTTP costs, and not whether a server can do what the router needs: for that see
`docs/adr/0033-the-router-writes-http-by-itself.md`.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

from benchmarks import service
from benchmarks.bare import ANSWER, CHUNK, CHUNKS, LOOPS, SERVERS, is_there
from benchmarks.rounds import in_turns
from benchmarks.router import environment, pin
from benchmarks.rows import NO_KERNELS, RESULTS, ROOT, Row, provenance, write
from benchmarks.standin import processor_time

BODY: Final = b'{"model":"tiny","messages":[{"role":"user","content":"' + b"word " * 40 + b'"}]}'
CASES: Final = ("whole", "stream")
WARM_SECONDS: Final = 0.5
START_SECONDS: Final = 30.0


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--cases", nargs="*", choices=CASES, default=list(CASES))
    parser.add_argument("--seconds", type=float, default=4.0, help="that each measurement counts")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--out", type=Path, default=RESULTS / "servers.jsonl")


class Client(asyncio.Protocol):
    """One kept connection, which has one request at a time until it is stopped."""

    def __init__(self, path: str) -> None:
        self._request = (
            b"POST /%b HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b"Authorization: Bearer none\r\nContent-Length: %d\r\n\r\n%b" % (path.encode(), len(BODY), BODY)
        )
        self._end = ANSWER[-8:] if path == "whole" else b"0\r\n\r\n"
        self._least = len(ANSWER) if path == "whole" else CHUNKS * len(CHUNK)
        self._got, self._tail = 0, b""
        self._stopped = False
        self.answers = 0
        self.failure = ""

    def connection_made(self, transport: Any) -> None:
        self._transport = transport
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        if not self._got and not data.startswith(b"HTTP/1.1 200"):
            self.failure = f"it answers {data[:60]!r}"
        self._got += len(data)
        self._tail = (self._tail + data)[-8:]
        if self._tail.endswith(self._end) and self._got >= self._least:
            self.answers += 1
            self._got, self._tail = 0, b""
            if self._stopped:
                self._transport.close()
            else:
                self._transport.write(self._request)

    def connection_lost(self, exc: Exception | None) -> None:
        if not self._stopped:
            self.failure = f"the connection was cut: {exc}"

    def stop(self) -> None:
        self._stopped = True


@dataclass(frozen=True, slots=True)
class System:
    name: str
    port: int
    pid: int


async def measured(system: System, path: str, clients: int, seconds: float) -> Row:
    """Raises where an answer is none."""
    loop = asyncio.get_running_loop()
    made = [
        (await loop.create_connection(partial(Client, path), "127.0.0.1", system.port))[1] for _ in range(clients)
    ]

    def counted() -> tuple[int, float, float]:
        for each in made:
            if each.failure:
                raise RuntimeError(f"{system.name}: {each.failure}")
        return sum(each.answers for each in made), processor_time([system.pid]), time.monotonic()

    await asyncio.sleep(WARM_SECONDS)
    answers, spent, began = counted()
    await asyncio.sleep(seconds)
    after, spent_after, ended = counted()
    for each in made:
        each.stop()
    await asyncio.sleep(0.1)
    answers, spent = after - answers, spent_after - spent
    if not answers:
        raise RuntimeError(f"{system.name} has answered nothing")
    row = {
        "requests_per_s": round(answers / (ended - began), 1),
        "cpu_us_per_request": round(1e6 * spent / answers, 1),
    }
    if path == "stream":
        row["cpu_us_per_chunk"] = round(1e6 * spent / answers / CHUNKS, 2)
    return row


@contextlib.contextmanager
def serving(folder: Path, name: str, server: str, loop: str, core: int) -> Iterator[System]:
    command = [sys.executable, "-m", "benchmarks.bare", server, loop]
    log = folder / f"{name.replace('/', '-')}.log"
    with service.running(command, log, stdout=subprocess.PIPE, env=environment(ROOT), cwd=ROOT) as process:
        if process.stdout is None:
            raise RuntimeError("no pipe")
        port = int(process.stdout.readline())
        deadline = time.monotonic() + START_SECONDS
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1) as asked:
                asked.settimeout(1)
                asked.sendall(b"POST /whole HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n")
                if asked.recv(100):
                    break
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{name} does not start:\n{log.read_text()[-2000:]}")
            time.sleep(0.1)
        for pid in {process.pid, *_children(process.pid)}:
            pin(pid, core)
        yield System(name, port, process.pid)


def _children(pid: int) -> Sequence[int]:
    told = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(each) for each in told.split()]


def run(args: argparse.Namespace) -> None:
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        raise SystemExit("error: the server and what measures it need a core each\n    hint: free a second one")
    os.sched_setaffinity(0, {cores[0]})
    wanted = [("quire", "quire", LOOPS[0]), ("again", "quire", LOOPS[0])]
    for server, loop in itertools.product(SERVERS, LOOPS):
        if server == "quire" and loop == LOOPS[0]:
            continue
        name = server if loop == LOOPS[0] else f"{server}/{loop}"
        if is_there(*SERVERS[server], *([loop] if loop != LOOPS[0] else [])):
            wanted.append((name, server, loop))
        else:
            print(f"{name} is left out: it is not installed")
    rows: list[Row] = []
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="qb")))
        systems = [
            stack.enter_context(serving(folder, name, server, loop, cores[-1])) for name, server, loop in wanted
        ]
        common = provenance(NO_KERNELS) | {"benchmark": "servers", "clients": args.clients, "rounds": args.rounds}
        for case in args.cases:
            taken = in_turns(
                {each.name: partial(_measure, each, case, args) for each in systems},
                args.rounds,
                lambda row: f"{row['cpu_us_per_request']}",
            )
            for each in systems:
                rows.append(common | {"part": case, "system": each.name} | _of(taken[each.name], taken["quire"]))
                print(_line(rows[-1]))
    write(args.out, rows)


def _measure(system: System, case: str, args: argparse.Namespace) -> Row:
    return asyncio.run(measured(system, case, args.clients, args.seconds))


def _of(passes: Sequence[Row], first: Sequence[Row]) -> Row:
    """Medians, and the ratio of processor time to that of `quire` in the same round."""
    row: Row = {key: round(statistics.median(each[key] for each in passes), 2) for key in passes[0]}
    ratios = [
        each["cpu_us_per_request"] / one["cpu_us_per_request"] for each, one in zip(passes, first, strict=True)
    ]
    return row | {
        "cpu_to_quire": round(statistics.median(ratios), 3),
        "cpu_to_quire_min": round(min(ratios), 3),
        "cpu_to_quire_max": round(max(ratios), 3),
    }


def _line(row: Row) -> str:
    told = "  ".join(f"{key} {value}" for key, value in row.items() if key.startswith(("cpu_", "requests_")))
    return f"{row['part']:7} {row['system']:26} {told}"
