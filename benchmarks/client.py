"""A client of an OpenAI server: so many streams at a time until all jobs are done, and when each piece came.

`python -m benchmarks.client` is a process of its own, so that what the client costs can be told from what the
server does: one JSON object (`Asked`) on stdin, one (`Answered`) on stdout. It collects no garbage meanwhile.

It reads streams by itself rather than by `quire.remote`, because that would change what is measured: here each
request opens a connection, which its first gap counts, there connections are kept; and the processor time of this
client is a row of the benchmarks, which are compared with those of earlier versions.
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import sys
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

import msgspec

from benchmarks.workload import Job


class Asked(msgspec.Struct):
    """What a client process does. `more` goes into each request's body as it is."""

    port: int
    model: str
    clients: int
    prompts: list[tuple[int, ...]]
    output_tokens: list[int]
    more: dict[str, Any] = {}


class Stream(msgspec.Struct):
    """One answer. Times are in seconds."""

    first: float
    """From sending the request to the first piece with text."""
    gaps: list[float]
    """From each piece with text to the next one."""


class Answered(msgspec.Struct):
    """All answers, in the order of the jobs; `seconds` from the first request to the last answer's end."""

    seconds: float
    client_cpu_s: float
    streams: list[Stream]


class _Choice(msgspec.Struct):
    text: str = ""


class _Usage(msgspec.Struct):
    completion_tokens: int


class _Piece(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None


async def keep_busy(
    port: int, model: str, jobs: Sequence[Job], clients: int, more: Mapping[str, Any] | None = None
) -> list[Stream]:
    """All jobs as streams of /v1/completions, `clients` at a time. Raises if one is not answered in full."""
    places = asyncio.Semaphore(clients)

    async def one(job: Job) -> Stream:
        async with places:
            return await _stream(port, model, job, more or {})

    return await asyncio.gather(*(one(job) for job in jobs))


async def _stream(port: int, model: str, job: Job, more: Mapping[str, Any]) -> Stream:
    body = {
        "model": model,
        "prompt": job.prompt,
        "max_tokens": job.output_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
        **more,
    }
    sent = time.perf_counter()
    reader, writer = await request(port, "POST", "/v1/completions", msgspec.json.encode(body))
    came: list[float] = []
    tokens, ended, rest = 0, False, b""
    async for part in pieces(reader):
        now = time.perf_counter()
        *lines, rest = (rest + part).split(b"\n")
        for line in lines:
            if not line.startswith(b"data: "):
                continue
            if line.startswith(b"data: [DONE]"):
                ended = True
                continue
            piece = msgspec.json.decode(line[6:], type=_Piece)
            if piece.usage is not None:
                tokens = piece.usage.completion_tokens
            if any(choice.text for choice in piece.choices):
                came.append(now)
    writer.close()
    if not ended or tokens != job.output_tokens or not came:
        raise RuntimeError(f"{tokens} tokens came where {job.output_tokens} were asked for, the end: {ended}")
    return Stream(came[0] - sent, [after - before for before, after in itertools.pairwise(came)])


async def request(
    port: int, method: str, path: str, body: bytes = b""
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Sends a request of a connection of its own."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(
        b"%s %s HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Type: application/json\r\n"
        b"Content-Length: %d\r\n\r\n" % (method.encode(), path.encode(), len(body)) + body
    )
    return reader, writer


async def pieces(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    """The body of an answer as it comes, whole or in chunks. Raises on another status than 200."""
    head = await reader.readuntil(b"\r\n\r\n")
    chunked = b"transfer-encoding: chunked" in head.lower()
    if b" 200 " not in head.split(b"\r\n")[0]:
        raise RuntimeError(f"{head.splitlines()[0].decode()}: {(await reader.read())[-500:]!r}")
    while True:
        if not chunked:
            part = await reader.read(1 << 16)
        elif size := int((await reader.readline()).split(b";")[0], 16):
            part = (await reader.readexactly(size + 2))[:-2]
        else:
            return
        if not part:
            return
        yield part


async def fetch(port: int, method: str, path: str, body: bytes = b"") -> bytes:
    """The whole body of an answer."""
    reader, writer = await request(port, method, path, body)
    answer = b"".join([part async for part in pieces(reader)])
    writer.close()
    return answer


def main() -> None:
    asked = msgspec.json.decode(sys.stdin.buffer.read(), type=Asked)
    jobs = [Job(*each) for each in zip(asked.prompts, asked.output_tokens, strict=True)]
    gc.disable()
    began, spent = time.perf_counter(), time.process_time()
    streams = asyncio.run(keep_busy(asked.port, asked.model, jobs, asked.clients, asked.more))
    answered = Answered(time.perf_counter() - began, time.process_time() - spent, streams)
    sys.stdout.buffer.write(msgspec.json.encode(answered))


if __name__ == "__main__":
    main()
