"""A server of bytes: answers what a test tells it to, in the pieces that the test cuts."""

from __future__ import annotations

import asyncio
import json
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

Answer = Callable[["Raw", asyncio.StreamWriter, str, Any], Awaitable[None]]


@dataclass
class Raw:
    """What came so far: (method and path, body), and the number of connections."""

    port: int = 0
    asked: list[tuple[str, Any]] = field(default_factory=list)
    connections: int = 0
    left: int = 0
    """Clients that closed their connection."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"


@asynccontextmanager
async def serving(answer: Answer, tls: ssl.SSLContext | None = None) -> AsyncIterator[Raw]:
    """A server on a free port that calls `answer` for each request, until the block ends."""
    raw = Raw()

    writers: list[asyncio.StreamWriter] = []
    serving: list[asyncio.Task[None] | None] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        raw.connections += 1
        writers.append(writer)
        serving.append(asyncio.current_task())
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                length = next(
                    (int(line[15:]) for line in head.lower().splitlines() if line[:15] == "content-length:"), 0
                )
                body = await reader.readexactly(length)
                line = " ".join(head.split(" ")[:2])
                raw.asked.append((line, json.loads(body) if body else None))
                await answer(raw, writer, line, raw.asked[-1][1])
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            raw.left += 1
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=tls)
    raw.port = server.sockets[0].getsockname()[1]
    try:
        yield raw
    finally:
        server.close()
        for writer in writers:
            writer.close()
        await asyncio.gather(*(task for task in serving if task is not None))


def whole(body: bytes, status: int = 200) -> bytes:
    return b"HTTP/1.1 %d X\r\ncontent-length: %d\r\n\r\n" % (status, len(body)) + body


def chunked(parts: Iterable[bytes], *, end: bool = True) -> bytes:
    """A 200 whose body comes in these chunks."""
    sent = b"".join(b"%x;note=1\r\n%b\r\n" % (len(part), part) for part in parts)
    return b"HTTP/1.1 200 OK\r\nTransfer-Encoding: Chunked\r\n\r\n" + sent + (b"0\r\nx: y\r\n\r\n" if end else b"")


def event(fields: Any) -> bytes:
    return b"data: " + (fields if isinstance(fields, bytes) else json.dumps(fields).encode()) + b"\n\n"


def text(content: str, tokens: int | None = None, **choice: Any) -> bytes:
    """An event of a chat's stream, with the usage so far if `tokens` are given."""
    fields: dict[str, Any] = {"choices": [{"index": 0, "delta": {"content": content}, **choice}]}
    if tokens is not None:
        fields["usage"] = usage(tokens)
    return event(fields)


def usage(tokens: int, prompt: int = 7) -> dict[str, int]:
    return {"prompt_tokens": prompt, "completion_tokens": tokens, "total_tokens": prompt + tokens}


DONE = b"data: [DONE]\n\n"
