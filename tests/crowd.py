"""Many clients that ask for one thing again and again, in a process of their own.

They are cheap, so that it is a router that is measured: HTTP/1.1 in raw bytes over kept connections, and nothing
is read of what is answered but where it ends.

    python -m tests.crowd   lines of JSON (`Asked`) on stdin, one (`Answered`) on stdout for each

An *open* crowd asks at a rate, whoever is answered: what it cannot send, having no connection free, it counts
(`unsent`). A *closed* one has so many clients that ask when they were answered, after a `pause`; one that was
refused or cut asks again at once if it is `impatient`. A connection that brings no end of an answer is in `hung`.
"""

from __future__ import annotations

import asyncio
import gc
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec

ROOT = Path(__file__).resolve().parent.parent
PATIENCE = 20.0
"""Seconds after the last question in which answers may end."""
_LENGTH = re.compile(rb"(?i)\r\ncontent-length: *(\d+)")
_RETRY_AFTER = re.compile(rb"(?i)\r\nretry-after: *\d+\r\n")


class Asked(msgspec.Struct):
    """What a crowd does. `bodies` are sent in turns."""

    port: int
    bodies: list[str]
    seconds: float
    rate: float = 0.0
    """Questions a second of an open crowd; 0: a closed one."""
    connections: int = 64
    """Of a closed crowd its clients; of an open one the most it may have."""
    pause: float = 0.0
    impatient: bool = False
    path: str = "/v1/completions"
    key: str = ""


class Answer(msgspec.Struct, array_like=True):
    """One answer. Times are `time.monotonic()`, which all processes share."""

    sent_at: float
    status: int = 0
    """0: the connection ended before there was one."""
    first_at: float = 0.0
    """When the first byte of its body came."""
    ended_at: float = 0.0
    """0: it never ended."""
    whole: bool = False
    """It has the end that it announced, and no error in it."""
    retry_after: bool = False


class Answered(msgspec.Struct):
    """All answers, in the order in which they were asked for."""

    answers: list[Answer]
    unsent: int
    cpu_seconds: float
    began_at: float

    @property
    def hung(self) -> int:
        return sum(not answer.ended_at for answer in self.answers)

    def with_status(self, *statuses: int) -> list[Answer]:
        return [answer for answer in self.answers if answer.status in statuses]

    @property
    def good(self) -> list[Answer]:
        return [answer for answer in self.answers if answer.status == 200 and answer.whole]

    def rate(self, first: float, last: float) -> float:
        """Good answers a second that ended between two moments."""
        return sum(first <= answer.ended_at < last for answer in self.good) / (last - first)


class _Connection(asyncio.Protocol):
    """One connection, asked for one thing at a time."""

    def __init__(self) -> None:
        self.transport: asyncio.Transport | None = None
        self.answer: Answer | None = None
        self._done: asyncio.Future[None] | None = None
        self._heard = bytearray()
        self._body = -1
        """Where the body begins; -1: the head is not there yet."""
        self._length: int | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def ask(self, request: bytes, answer: Answer) -> asyncio.Future[None]:
        """What is done when the answer has ended, or the connection."""
        assert self.transport is not None
        self.answer, self._body, self._length = answer, -1, None
        self._heard.clear()
        self._done = asyncio.get_running_loop().create_future()
        self.transport.write(request)
        return self._done

    def data_received(self, data: bytes) -> None:
        answer = self.answer
        if answer is None:
            return
        self._heard += data
        if self._body < 0:
            end = self._heard.find(b"\r\n\r\n")
            if end < 0:
                return
            self._body = end + 4
            head = bytes(self._heard[: end + 2])
            answer.status = int(head[9:12])
            answer.retry_after = _RETRY_AFTER.search(head) is not None
            length = _LENGTH.search(head)
            self._length = int(length[1]) if length else None
        if len(self._heard) > self._body and not answer.first_at:
            answer.first_at = time.monotonic()
        if self._length is not None:
            if len(self._heard) >= self._body + self._length:
                answer.whole = True
                self._end()
        elif self._heard.endswith(b"0\r\n\r\n"):
            answer.whole = b'"error"' not in self._heard and b"[DONE]" in self._heard
            self._end()

    def connection_lost(self, exc: Exception | None) -> None:
        self.transport = None
        self._end()

    def _end(self) -> None:
        if self.answer is not None:
            self.answer.ended_at = time.monotonic()
            self.answer = None
        if self._done is not None and not self._done.done():
            self._done.set_result(None)

    def close(self) -> None:
        if self.transport is not None:
            self.transport.abort()


class _Crowd:
    def __init__(self, asked: Asked) -> None:
        self.asked = asked
        self.answers: list[Answer] = []
        self.unsent = 0
        key = f"Authorization: Bearer {asked.key}\r\n" if asked.key else ""
        self._requests = [
            (
                f"POST {asked.path} HTTP/1.1\r\nHost: localhost:{asked.port}\r\nContent-Type: application/json\r\n"
                f"{key}Content-Length: {len(body.encode())}\r\n\r\n{body}"
            ).encode()
            for body in asked.bodies
        ]
        self._every: list[_Connection] = []
        self._free: list[_Connection] = []

    async def run(self) -> Answered:
        began, cpu = time.monotonic(), time.process_time()
        if self.asked.rate:
            await self._open(began)
        else:
            clients = [
                asyncio.create_task(self._client(number, began)) for number in range(self.asked.connections)
            ]
            await asyncio.wait(clients, timeout=self.asked.seconds + PATIENCE)
            for client in clients:
                client.cancel()
            await asyncio.wait(clients)
        for connection in self._every:
            connection.answer = None  # what has not ended by now never does
            connection.close()
        return Answered(self.answers, self.unsent, time.process_time() - cpu, began)

    async def _connect(self) -> _Connection:
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(_Connection, "127.0.0.1", self.asked.port)
        self._every.append(connection)
        return connection

    def _send(self, connection: _Connection, sent_at: float) -> asyncio.Future[None]:
        answer = Answer(sent_at)
        request = self._requests[len(self.answers) % len(self._requests)]
        self.answers.append(answer)
        return connection.ask(request, answer)

    async def _open(self, began: float) -> None:
        running: set[asyncio.Future[None]] = set()
        for _ in range(min(self.asked.connections, 50)):
            self._free.append(await self._connect())
        sent = 0
        while (now := time.monotonic()) < began + self.asked.seconds:
            for _ in range(int((now - began) * self.asked.rate) - sent):
                sent += 1
                connection = next((c for c in iter(self._take, None) if c.transport is not None), None)
                if connection is None and len(self._every) < self.asked.connections:
                    connection = await self._connect()
                if connection is None:
                    self.unsent += 1
                    continue
                done = self._send(connection, time.monotonic())
                running.add(done)
                done.add_done_callback(running.discard)
                done.add_done_callback(lambda _, back=connection: self._free.append(back))  # type: ignore[misc]
            await asyncio.sleep(0.001)
        if running:
            await asyncio.wait(running, timeout=PATIENCE)

    def _take(self) -> _Connection | None:
        return self._free.pop() if self._free else None

    async def _client(self, number: int, began: float) -> None:
        connection = await self._connect()
        await asyncio.sleep(self.asked.pause * number / self.asked.connections)  # not all in one moment
        while time.monotonic() < began + self.asked.seconds:
            if connection.transport is None:
                connection = await self._connect()
            mine = len(self.answers)
            await self._send(connection, time.monotonic())
            answer = self.answers[mine]
            if not (self.asked.impatient and not (answer.status == 200 and answer.whole)):
                await asyncio.sleep(self.asked.pause)


class Crowd:
    """The process, for tests."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process

    async def ask(self, **asked: Any) -> Answered:
        """What `Asked` says, and what came of it. One at a time."""
        return await asyncio.to_thread(self._talk, Asked(**asked))

    def _talk(self, asked: Asked) -> Answered:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(msgspec.json.encode(asked) + b"\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        assert line, "the crowd has ended"
        return msgspec.json.decode(line, type=Answered)


@contextmanager
def crowd() -> Iterator[Crowd]:
    """A crowd's process, for as long as this is entered."""
    command = [sys.executable, "-m", "tests.crowd"]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        yield Crowd(process)
        assert process.stdin is not None
        process.stdin.close()
        process.wait(PATIENCE)


def main() -> None:
    gc.disable()
    for line in sys.stdin.buffer:
        answered = asyncio.run(_Crowd(msgspec.json.decode(line, type=Asked)).run())
        sys.stdout.buffer.write(msgspec.json.encode(answered) + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
