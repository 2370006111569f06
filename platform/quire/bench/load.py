"""Sends requests and times what comes.

A closed loop has so many requests on the way at a time: the next is sent when one is answered. An open loop sends
by a schedule, however slow the answers are, and counts every time from when the schedule said: a request that was
sent late because the client, or whatever held it up, was late did wait for that long. How late is a figure of its
own.

Tokens reach a client in events, several of which may come in one read of the connection: these came together, at
that moment. The time from one such arrival to the next, divided by the tokens that came with it, is the
inter-token latency of each of these tokens. How many they were the server says, in the usage so far that each
event has; of a server that does not say it, every arrival is taken to have brought the same, the answer's tokens
by the number of arrivals, and gives one latency.
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import time
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass, field
from typing import Any

from quire.bench.work import Request
from quire.remote import Chunk, RemoteError, Server, Unreadable, Usage
from quire.remote.server import DONE, chunk, cut_off
from quire.remote.sse import Events

Clock = Callable[[], float]
FEW_BEFORE = 0.001
"""Seconds of sleep that are not worth it."""
TOGETHER = 64
"""Requests that are due at once and begin before what came meanwhile is read."""


@dataclass(slots=True)
class Row:
    """What became of one request. Times are in seconds; `due` and `sent` from the start of the run, latencies from
    `due`, which in a closed loop is when it was sent. None for what there is not."""

    index: int
    due: float
    sent: float
    input_asked: int | None
    output_asked: int | None
    ttft: float | None = None
    """To the first text."""
    last: float | None = None
    """To the last text."""
    e2e: float | None = None
    """To the end of the answer."""
    itl: list[float] = field(default_factory=list)
    input_tokens: int | None = None
    cached_tokens: int | None = None
    output_tokens: int | None = None
    finish_reason: str | None = None
    fingerprint: str | None = None
    error: str | None = None
    """What kind of error it ended with."""
    message: str | None = None

    @property
    def tpot(self) -> float | None:
        """Mean seconds for each token behind the first."""
        if self.ttft is None or self.last is None or (self.output_tokens or 0) < 2:
            return None
        return (self.last - self.ttft) / ((self.output_tokens or 0) - 1)


@dataclass(slots=True)
class Measured:
    """One run."""

    rows: list[Row]
    seconds: float
    """From the start to the end of the last answer."""
    cpu_seconds: float
    """What this process computed meanwhile."""
    started_at: float
    """Unix seconds."""
    unfinished: int = 0
    """Requests that were on the way when it was interrupted; they have no row."""


class Watch:
    """Reads one stream while it comes: `take` is called with each piece, in the event loop's call for it."""

    def __init__(self, row: Row, counts_tokens: bool, now: Clock) -> None:
        self._row = row
        self._counts = counts_tokens
        self._now = now
        self._events = Events()
        self._arrivals: list[tuple[float, int]] = []
        """When text came, and how many tokens there were by then (0 where it is not known)."""
        self._usage: Usage | None = None
        self._tokens = 0
        self._done = False

    def take(self, piece: bytes) -> None:
        now = self._now()
        has_text = False
        for data in self._events.feed(piece):
            if data == DONE:
                self._done = True
            elif not self._done:
                found = chunk(data)
                has_text |= self._note(found)
        if has_text:
            self._arrivals.append((now, self._tokens))

    def _note(self, found: Chunk) -> bool:
        """Keep what a chunk says; whether it has text."""
        if found.usage is not None:
            self._usage = found.usage
            self._tokens = found.usage.completion_tokens or self._tokens
        if found.system_fingerprint is not None:
            self._row.fingerprint = found.system_fingerprint
        has_text = False
        for choice in found.choices:
            delta = choice.delta
            if choice.text or (delta is not None and (delta.text or delta.thought)):
                has_text = True
            if choice.finish_reason is not None:
                self._row.finish_reason = choice.finish_reason
        return has_text

    def end(self, due: float) -> None:
        """Fill in the row. Raises `RemoteError` where the stream was not whole."""
        if not self._done:
            raise cut_off()
        fill(self._row, self._usage)
        if not self._arrivals:
            return
        self._row.ttft = self._arrivals[0][0] - due
        self._row.last = self._arrivals[-1][0] - due
        self._row.itl = latencies(self._arrivals, None if self._counts else self._row.output_tokens or 0)


def latencies(arrivals: list[tuple[float, int]], tokens: int | None) -> list[float]:
    """Inter-token latencies of one answer, from the times when text came and the tokens there were by then.

    `tokens` is the number of all, where it is not known how many came when: then each arrival counts once, with
    the mean number of tokens. An arrival that brought no token, but text that had been kept back, is part of the
    next.
    """
    gaps: list[float] = []
    before, had = arrivals[0]
    if tokens is not None:
        each = tokens / len(arrivals) or 1.0
        return [(after[0] - at[0]) / each for at, after in itertools.pairwise(arrivals)]
    for at, now in arrivals[1:]:
        new = now - had
        if new > 0:
            gaps += [(at - before) / new] * new
            before, had = at, now
    return gaps


def fill(row: Row, usage: Usage | None) -> None:
    """The counts of the server. Raises `Unreadable` where there are none."""
    if usage is None or usage.completion_tokens is None:
        raise Unreadable("the answer has no usage", kind="no usage")
    row.input_tokens, row.output_tokens = usage.prompt_tokens, usage.completion_tokens
    details = usage.prompt_tokens_details
    row.cached_tokens = None if details is None else details.cached_tokens


class Load:
    """One run of requests against one server. `progress` is called with the number of ended requests."""

    def __init__(
        self,
        server: Server,
        path: str,
        *,
        streams: bool,
        counts_tokens: bool,
        stop: asyncio.Event,
        progress: Callable[[int], None] = lambda ended: None,
    ) -> None:
        self._server = server
        self._path = path
        self._streams = streams
        self._counts = counts_tokens
        self._stop = stop
        self._progress = progress
        self._rows: list[Row] = []
        self._start = 0.0
        self._on_the_way = 0

    async def closed(self, requests: Iterator[Request], concurrency: int, seconds: float | None) -> Measured:
        """`concurrency` at a time, until there are none left, or none that could begin within `seconds`."""

        async def keep_asking() -> None:
            while seconds is None or self._elapsed() < seconds:
                request = next(requests, None)
                if request is None:
                    return
                await self._measure(request, None)

        async def keep_all_asking() -> None:
            async with asyncio.TaskGroup() as group:
                for _ in range(concurrency):
                    group.create_task(keep_asking())

        return await self._run(keep_all_asking())

    async def open(self, requests: Iterator[tuple[float, Request]]) -> Measured:
        """Each request at its time, in seconds from the start."""

        async def send_all() -> None:
            async with asyncio.TaskGroup() as group:
                for due, request in requests:
                    wait = due - self._elapsed()
                    if wait > FEW_BEFORE:
                        await asyncio.sleep(wait)
                    elif request.index % TOGETHER == 0:
                        await asyncio.sleep(0)
                    group.create_task(self._measure(request, due))

        return await self._run(send_all())

    async def _run(self, work: Coroutine[Any, Any, None]) -> Measured:
        gc.collect()
        gc.freeze()  # what was made before is not looked at again while time is taken
        started_at, cpu, self._start = time.time(), time.process_time(), time.perf_counter()
        working = asyncio.create_task(work)
        stopping = asyncio.create_task(self._stop.wait())
        unfinished = 0
        try:
            await asyncio.wait({working, stopping}, return_when=asyncio.FIRST_COMPLETED)
            if working.done():
                working.result()  # an error of ours is no figure
            else:
                unfinished = self._on_the_way
                working.cancel()
                await asyncio.gather(working, return_exceptions=True)
        finally:
            stopping.cancel()
            gc.unfreeze()
        ends = [row.due + row.e2e for row in self._rows if row.e2e is not None]
        seconds = self._elapsed() if self._stop.is_set() or not ends else max(ends)
        self._rows.sort(key=lambda row: row.index)
        return Measured(self._rows, seconds, time.process_time() - cpu, started_at, unfinished)

    def _elapsed(self) -> float:
        return time.perf_counter() - self._start

    async def _measure(self, request: Request, due: float | None) -> None:
        sent = self._elapsed()
        due = sent if due is None else due
        row = Row(request.index, due, sent, request.size.input_tokens, request.size.output_tokens)
        self._on_the_way += 1
        try:
            if self._streams:
                watch = Watch(row, self._counts, self._elapsed)
                await self._server.post(self._path, request.body, watch.take)
                row.e2e = self._elapsed() - due
                watch.end(due)
            else:
                answer = await self._server.whole(self._path, request.body)
                row.e2e = self._elapsed() - due
                fill(row, answer.usage)
                row.fingerprint = answer.system_fingerprint
                row.finish_reason = answer.choices[0].finish_reason if answer.choices else None
        except RemoteError as error:
            row.e2e = self._elapsed() - due
            row.error, row.message = error.kind, error.message
        finally:
            self._on_the_way -= 1
        self._rows.append(row)
        self._progress(len(self._rows))
