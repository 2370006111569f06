"""Both ends of a router: HTTP clients before it, engines that compute nothing behind it, in one process.

One process and one event loop, so that what a client sent and what an engine got have times of one clock, and a
request is known on both sides by its number, which travels as its `seed`. So the time that a router adds is
measured from outside, and is more than what it spends itself: from the client's write to the engine's read, and
from the engine's write to the client's read. That has four passages through sockets in it and whatever the process
here waits for itself. `HttpEngine` asked directly, with nothing in between, shows how much that is.

`python -m benchmarks.standin` takes JSON lines on stdin and answers each with one on stdout: a `Setup`, then as
many `Case`s as there are. It collects no garbage while a case runs.
"""

from __future__ import annotations

import asyncio
import bisect
import gc
import itertools
import math
import random
import sys
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

import msgspec
import psutil

from quire_schemas import wire

_TEXT = (
    "a table of the first things that a reader asks for when the page is open and the lamp is on by the window "
    "where rivers bend slowly past old mills and every letter waits for its answer"
)
WORDS = _TEXT.split()
_LENGTH = 4
_STATS_SECONDS = 0.25
LATE = 0.005
"""Seconds after which what was to be done at a moment counts as late."""


class Setup(msgspec.Struct):
    """Where engines listen, and what they say: ids whose text is one character each."""

    sockets: list[str]
    letters: list[int]
    vocab_size: int
    seats: int = 512


class Ready(msgspec.Struct):
    """The port of the engine that is an OpenAI server."""

    http_port: int


class Case(msgspec.Struct):
    """One measurement. `rate`: requests a second come by chance, whatever becomes of the others as long as one of
    `clients` is free (open loop); else each client has one all the time (closed loop).

    Each engine makes a step every `pace` seconds while it has something to do, or at once if that is 0, and gives
    every request a token then, or with `whole` all of them. Answers have `shortest` to `longest` tokens.
    """

    name: str
    port: int
    model: str
    pids: list[int]
    """Whose processor time is told, their children's included."""
    seconds: float
    beside: list[int] = []
    """Of their children those whose processor time is told apart, and is not in the other."""
    stream: bool = False
    rate: float | None = None
    clients: int = 32
    shortest: int = 16
    longest: int = 16
    pace: float = 0.01
    whole: bool = False
    words: int = 40
    warm: float = 1.0
    """Seconds before those that count."""
    seed: int = 0


class Spread(msgspec.Struct):
    """Milliseconds."""

    p50: float
    p90: float
    p99: float

    @classmethod
    def of(cls, seconds: list[float]) -> Spread | None:
        """None where nothing was measured."""
        if not seconds:
            return None
        seconds.sort()
        return cls(*(round(1000 * seconds[math.ceil(part * len(seconds)) - 1], 3) for part in (0.5, 0.9, 0.99)))


class Measured(msgspec.Struct):
    """What a case gave in the seconds that count. `inward`: client's write to engine's read. `outward`: engine's
    write to client's read, of every chunk. `added`: the sum for each request, outward that of its first chunk in a
    stream and of its last token in a whole answer. `inward` and `added` are of requests that came in these
    seconds, and None if there were none."""

    seconds: float
    requests: int
    chunks: int
    """Events with text, of streams."""
    inward: Spread | None
    outward: Spread | None
    added: Spread | None
    cpu_s: float
    """Of the processes named in the case."""
    beside_cpu_s: float
    """Of those that are told apart."""
    own_cpu_s: float
    unasked: int
    """Requests of an open loop that found every client waiting: there is no keeping up."""
    late_share: float
    """Of what this process was to do at a moment (requests, steps), what it did more than `LATE` after it."""


@dataclass(slots=True)
class Record:
    """One request on both sides. Times are monotonic; token counts are those so far."""

    answer: int
    sent_at: float
    received_at: float = 0.0
    written: list[tuple[int, float]] = field(default_factory=list)
    read: list[tuple[int, float]] = field(default_factory=list)

    def outward(self) -> Iterator[tuple[float, float]]:
        """For each write of the engine its moment, and the seconds until the client had all of it."""
        counts = [count for count, _ in self.read]
        for count, at in self.written:
            place = bisect.bisect_left(counts, count)
            yield at, self.read[place][1] - at


@dataclass(slots=True)
class Ledger:
    """What both sides note."""

    records: dict[int, Record] = field(default_factory=dict)
    pace: float = 0.01
    whole: bool = False
    chunks: int = 0
    ended: int = 0
    due: int = 0
    late: int = 0
    unasked: int = 0
    """Requests that had come and were not sent, because every connection waited for an answer."""

    def on_time(self, due_at: float) -> None:
        self.due += 1
        self.late += time.monotonic() - due_at > LATE


@dataclass(slots=True)
class Running:
    """A request in an engine."""

    id: str
    number: int
    answer: int
    peer: Any
    stream: bool = True
    sent: int = 0
    patience: float = 0.0
    waiting: tuple[int, ...] = ()
    told: int = 0
    told_at: float = 0.0
    """Of its tokens, as the engine tells of them: as a real one does (`wire.Generate.patience`)."""


class Engine:
    """Makes steps; what becomes of a step's tokens is a subclass's part."""

    def __init__(self, setup: Setup, ledger: Ledger) -> None:
        self.setup, self.ledger = setup, ledger
        self.running: dict[str, Running] = {}
        self.steps = 0
        self._loop = asyncio.get_running_loop()
        self._next_at = 0.0
        self._stepping = False

    def add(self, running: Running) -> None:
        record = self.ledger.records.get(running.number)
        if record is not None:
            record.received_at = time.monotonic()
        self.running[running.id] = running
        if not self._stepping:
            self._stepping = True
            self._next_at = self._loop.time() + self.ledger.pace
            self._plan()

    def _plan(self) -> None:
        if self.ledger.pace:
            self._loop.call_at(self._next_at, self._step)
        else:
            self._loop.call_soon(self._step)

    def _step(self) -> None:
        if self.ledger.pace:
            self.ledger.on_time(self._next_at)
        batch = list(self.running.values())
        if not batch:
            self._stepping = False
            return
        self.steps += 1
        letters = self.setup.letters
        gained: list[tuple[Running, tuple[int, ...]]] = []
        for each in batch:
            until = each.answer if self.ledger.whole else each.sent + 1
            gained.append((each, tuple([letters[at % len(letters)] for at in range(each.sent, until)])))
            each.sent = until
            if until >= each.answer:
                del self.running[each.id]
        self.write(gained)
        now = time.monotonic()
        for each in batch:
            record = self.ledger.records.get(each.number)
            if record is not None:
                record.written.append((each.sent, now))
        self._next_at = max(self._next_at + self.ledger.pace, self._loop.time())
        self._plan()

    def write(self, gained: list[tuple[Running, tuple[int, ...]]]) -> None:
        raise NotImplementedError


class WireEngine(Engine):
    """Speaks `wire` on a Unix socket: a replica for any number of routers."""

    def __init__(self, setup: Setup, ledger: Ledger, name: str) -> None:
        super().__init__(setup, ledger)
        self.name = name
        self._peers: set[_WirePeer] = set()
        self._told_at = 0.0

    def peer(self) -> _WirePeer:
        peer = _WirePeer(self)
        self._peers.add(peer)
        return peer

    def gone(self, peer: _WirePeer) -> None:
        self._peers.discard(peer)
        self.running = {key: each for key, each in self.running.items() if each.peer is not peer}

    def stats(self) -> wire.Stats:
        return wire.Stats(
            steps=self.steps,
            max_num_seqs=self.setup.seats,
            last_step_at=time.monotonic(),
            running=len(self.running),
            waiting=0,
            blocks_total=1 << 16,
            blocks_used=0,
            kv_slots_used=0,
            preemptions=0,
            prompt_tokens=0,
            generation_tokens=0,
            hot_hash="",
        )

    def write(self, gained: list[tuple[Running, tuple[int, ...]]]) -> None:
        now = time.monotonic()
        frames: dict[_WirePeer, list[wire.Delta]] = {}
        for each, drawn in gained:
            first, last = each.told == 0, each.sent >= each.answer
            if not (first or last) and now < each.told_at + each.patience:
                each.waiting += drawn
                continue
            tokens, each.waiting = each.waiting + drawn, ()
            each.told, each.told_at = each.sent, now
            timings = wire.Timings(now, now, now, now if last else None) if first or last else None
            delta = wire.Delta(each.id, tokens, finish_reason="length" if last else None, timings=timings)
            frames.setdefault(each.peer, []).append(delta)
        for peer, items in frames.items():
            peer.send(wire.Deltas(self.steps, items))
        if now - self._told_at > _STATS_SECONDS:
            self._told_at = now
            for peer in self._peers:
                peer.send(self.stats())


class _WirePeer(asyncio.Protocol):
    """One connection of a router."""

    def __init__(self, engine: WireEngine) -> None:
        self._engine = engine
        self._decoder: msgspec.msgpack.Decoder[wire.ToEngine] = msgspec.msgpack.Decoder(wire.ToEngine)
        self._buffer = bytearray()

    def connection_made(self, transport: Any) -> None:
        self._transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        self._engine.gone(self)

    def send(self, message: msgspec.Struct) -> None:
        self._transport.write(wire.frame(message))

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        while len(self._buffer) >= _LENGTH:
            end = _LENGTH + int.from_bytes(self._buffer[:_LENGTH], "big")
            if len(self._buffer) < end:
                return
            body = bytes(self._buffer[_LENGTH:end])
            del self._buffer[:end]
            self._hear(self._decoder.decode(body))

    def _hear(self, message: wire.ToEngine) -> None:
        engine, setup = self._engine, self._engine.setup
        match message:
            case wire.Generate():
                number = message.sampling.seed or 0
                engine.add(
                    Running(message.id, number, message.sampling.max_tokens, self, patience=message.patience)
                )
            case wire.Abort():
                engine.running.pop(message.id, None)
            case wire.Hello():
                self.send(
                    wire.Welcome(
                        engine.name, 1, wire.PROTOCOL, setup.vocab_size, (), 1 << 15, 16, 1 << 16, setup.seats
                    )
                )
                self.send(engine.stats())
            case _:
                self.send(engine.stats())


class HttpEngine(Engine):
    """An OpenAI server with the same steps, for what stands before such servers."""

    def write(self, gained: list[tuple[Running, tuple[int, ...]]]) -> None:
        for each, tokens in gained:
            text = "".join([chr(97 + at % 26) for at in range(each.sent - len(tokens), each.sent)])
            last = each.sent >= each.answer
            if each.stream:
                first = b'"role":"assistant",' if each.sent == len(tokens) else b""
                head = (
                    b'data: {"id":"%b","object":"chat.completion.chunk","created":1,"model":"tiny",'
                    % each.id.encode()
                )
                event = head + b'"choices":[{"index":0,"delta":{%b"content":"%b"},"finish_reason":%b}]}\n\n' % (
                    first, text.encode(), b'"length"' if last else b"null",
                )  # fmt: skip
                if last:
                    event += b"data: [DONE]\n\n"
                each.peer.write(b"%x\r\n%b\r\n" % (len(event), event) + (b"0\r\n\r\n" if last else b""))
            elif last:
                each.peer.write_whole(each)


class _HttpPeer(asyncio.Protocol):
    """One connection of a client to an `HttpEngine`. A request comes at a time."""

    def __init__(self, engine: HttpEngine) -> None:
        self._engine = engine
        self._buffer = b""
        self._count = itertools.count()

    def connection_made(self, transport: Any) -> None:
        self.write = transport.write

    def connection_lost(self, exc: Exception | None) -> None:
        running = self._engine.running
        self._engine.running = {key: each for key, each in running.items() if each.peer is not self}

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        while (end := self._buffer.find(b"\r\n\r\n")) >= 0:
            head = self._buffer[:end].lower()
            at = head.find(b"content-length:")
            size = int(head[at + 15 :].split(b"\r\n", 1)[0]) if at >= 0 else 0
            if len(self._buffer) < end + 4 + size:
                return
            body, self._buffer = self._buffer[end + 4 : end + 4 + size], self._buffer[end + 4 + size :]
            self._begin(msgspec.json.decode(body) if body else {})

    def _begin(self, asked: dict[str, Any]) -> None:
        number, stream = asked.get("seed", 0), bool(asked.get("stream"))
        answer = asked.get("max_tokens") or asked.get("max_completion_tokens") or 1
        running = Running(f"chatcmpl-{id(self)}-{next(self._count)}", number, answer, self, stream)
        if stream:
            self.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")
        self._engine.add(running)

    def write_whole(self, running: Running) -> None:
        text = "".join([chr(97 + at % 26) for at in range(running.answer)])
        usage = {"prompt_tokens": 1, "completion_tokens": running.answer, "total_tokens": 1 + running.answer}
        choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "length"}
        body = msgspec.json.encode(
            {
                "id": running.id,
                "object": "chat.completion",
                "created": 1,
                "model": "tiny",
                "choices": [choice],
                "usage": usage,
            }
        )
        self.write(
            b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(body) + body
        )


# ── clients ───────────────────────────────────────────────────────────────────────────────────────────────


class _Said(msgspec.Struct):
    content: str | None = None


class _Choice(msgspec.Struct):
    delta: _Said = msgspec.field(default_factory=_Said)
    message: _Said = msgspec.field(default_factory=_Said)


class _Answer(msgspec.Struct):
    choices: list[_Choice] = []


_answers = msgspec.json.Decoder(_Answer)


class Client(asyncio.Protocol):
    """One kept connection, which has one request at a time."""

    def __init__(self, load: Load) -> None:
        self._load = load
        self._record: Record | None = None
        self._clear()

    def _clear(self) -> None:
        self._buffer = b""
        self._body = b""
        self._left = -2  # bytes of a whole body; -1: in chunks; -2: the head is not there yet
        self._characters = 0
        self._ended = False

    def connection_made(self, transport: Any) -> None:
        self._transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        if self._record is not None:
            self._load.fail(f"the connection was cut: {exc}")
        self._load.lost(self)

    def close(self) -> None:
        self._transport.close()

    def ask(self, request: bytes, record: Record) -> None:
        self._clear()
        record.sent_at = time.monotonic()
        self._record = record
        self._transport.write(request)

    def data_received(self, data: bytes) -> None:
        now = time.monotonic()
        self._buffer += data
        if self._left == -2 and not self._head():
            return
        if self._left >= 0:
            if len(self._buffer) < self._left:
                return
            answer, self._buffer = self._buffer[: self._left], b""
            self._gain(answer, now, whole=True)
            self._end()
            return
        while (end := self._buffer.find(b"\r\n")) >= 0:
            size = int(self._buffer[:end], 16)
            if len(self._buffer) < end + 4 + size:
                return
            part = self._buffer[end + 2 : end + 2 + size]
            self._buffer = self._buffer[end + 4 + size :]
            if not size:
                if not self._ended:  # a whole answer that came in chunks
                    self._gain(self._body, now, whole=True)
                self._end()
                return
            *events, self._body = (self._body + part).split(b"\n\n")
            for event in events:
                if event.startswith(b"data: [DONE]"):
                    self._ended = True
                elif event.startswith(b"data: "):
                    self._gain(event[6:], now)

    def _head(self) -> bool:
        end = self._buffer.find(b"\r\n\r\n")
        if end < 0:
            return False
        head, self._buffer = self._buffer[:end].lower(), self._buffer[end + 4 :]
        if not head.startswith(b"http/1.1 200"):
            self._load.fail(f"{head.splitlines()[0].decode()}: {self._buffer[:300]!r}")
        at = head.find(b"content-length:")
        self._left = int(head[at + 15 :].split(b"\r\n", 1)[0]) if at >= 0 else -1
        return True

    def _gain(self, answer: bytes, now: float, *, whole: bool = False) -> None:
        said = [each.message if whole else each.delta for each in _answers.decode(answer).choices]
        gained = sum(len(each.content or "") for each in said)
        if gained and self._record is not None:
            self._characters += gained
            self._record.read.append((self._characters, now))
            self._load.ledger.chunks += not whole

    def _end(self) -> None:
        record, self._record = self._record, None
        if record is None or self._characters != record.answer:
            self._load.fail(f"{self._characters} tokens came of an answer: {record}")
        self._load.ended(self)


class Load:
    """The clients of one case."""

    def __init__(self, case: Case, ledger: Ledger) -> None:
        self.case, self.ledger = case, ledger
        self._random = random.Random(case.seed)
        self._idle: list[Client] = []
        self._all: set[Client] = set()
        self._loop = asyncio.get_running_loop()
        self._over = False
        self._failed: asyncio.Future[Any] = self._loop.create_future()
        self._numbers = itertools.count(1)
        self._dues: deque[float] = deque()
        self._quiet = asyncio.Event()
        self._open = 0

    def fail(self, words: str) -> None:
        if not self._failed.done():
            self._failed.set_exception(RuntimeError(f"{self.case.name}: {words}"))

    def lost(self, client: Client) -> None:
        self._all.discard(client)
        if client in self._idle:
            self._idle.remove(client)

    def ended(self, client: Client) -> None:
        self.ledger.ended += 1
        self._open -= 1
        self._idle.append(client)
        if self.case.rate is None and not self._over:
            self._ask()
        if not self._open:
            self._quiet.set()

    async def _connect(self, count: int) -> None:
        for _ in range(count):
            _, client = await self._loop.create_connection(lambda: Client(self), "127.0.0.1", self.case.port)
            self._all.add(client)
            self._idle.append(client)

    def _ask(self) -> None:
        number, case = next(self._numbers), self.case
        answer = self._random.randint(case.shortest, case.longest)
        said = " ".join(self._random.choices(WORDS, k=case.words))
        body = msgspec.json.encode(
            {
                "model": case.model,
                "messages": [{"role": "user", "content": said}],
                "max_tokens": answer,
                "temperature": 0,
                "seed": number,
                "stream": case.stream,
            }
        )
        head = (
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b"Authorization: Bearer none\r\nContent-Length: %d\r\n\r\n" % len(body)
        )
        record = self.ledger.records[number] = Record(answer, 0.0)
        self._open += 1
        self._idle.pop().ask(head + body, record)

    def _arrive(self) -> None:
        now = self._loop.time()
        while self._dues and self._dues[0] <= now:
            due = self._dues.popleft()
            self.ledger.on_time(due)
            if self._idle:
                self._ask()
            else:
                self.ledger.unasked += 1
        if self._dues:
            self._loop.call_at(self._dues[0], self._arrive)

    async def run(self) -> Measured:
        """The case from its first connection to its last answer. Raises if any answer was not whole."""
        case, ledger = self.case, self.ledger
        await self._connect(case.clients)
        began = self._loop.time()
        if case.rate is not None:
            due = began
            while due < began + case.warm + case.seconds:
                due += self._random.expovariate(case.rate)
                self._dues.append(due)
            self._loop.call_at(self._dues[0], self._arrive)
        else:
            for _ in range(case.clients):
                self._ask()
        await self._for(case.warm)
        first = next(self._numbers)
        before = time.monotonic(), ledger.chunks, ledger.ended, ledger.due, ledger.late, time.process_time()
        spent, beside = processor_time(case.pids), processor_time(case.beside)
        await self._for(case.seconds)
        after = time.monotonic(), ledger.chunks, ledger.ended, ledger.due, ledger.late, time.process_time()
        beside = processor_time(case.beside) - beside
        spent = processor_time(case.pids) - spent - beside
        seconds, chunks, ended, due_count, late, own = (b - a for a, b in zip(before, after, strict=True))
        self._over = True
        if self._open:
            self._quiet.clear()
            quiet = self._loop.create_task(self._quiet.wait())
            await asyncio.wait({self._failed, quiet}, timeout=60, return_when=asyncio.FIRST_COMPLETED)
        if self._failed.done():
            self._failed.result()
        if self._open:
            raise RuntimeError(f"{case.name}: {self._open} requests have no answer after a minute")
        self._failed.cancel()
        for client in list(self._all):
            client.close()
        every = ledger.records.values()
        outward = [seconds for record in every for at, seconds in self._counted(record) if at >= before[0]]
        done = [record for number, record in ledger.records.items() if number > first]
        inward = [record.received_at - record.sent_at for record in done]
        added = [into + next(self._counted(record))[1] for into, record in zip(inward, done, strict=True)]
        return Measured(
            seconds=seconds,
            requests=int(ended),
            chunks=int(chunks),
            inward=Spread.of(inward),
            outward=Spread.of(outward),
            added=Spread.of(added),
            cpu_s=spent,
            beside_cpu_s=beside,
            own_cpu_s=own,
            unasked=ledger.unasked,
            late_share=late / max(due_count, 1),
        )

    def _counted(self, record: Record) -> Iterator[tuple[float, float]]:
        """The writes that a client can tell of: all of a stream, the last one of a whole answer."""
        outward = record.outward()
        return outward if self.case.stream else iter(list(outward)[-1:])

    async def _for(self, seconds: float) -> None:
        await asyncio.wait({self._failed}, timeout=seconds)
        if self._failed.done():
            self._failed.result()


def processor_time(pids: list[int]) -> float:
    """Seconds that these processes and those below them have had so far."""
    every = {each for pid in pids for each in [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]}
    return sum(spent.user + spent.system for spent in (each.cpu_times() for each in every))


T = TypeVar("T")


async def _line(reader: asyncio.StreamReader, kind: type[T]) -> T | None:
    line = await reader.readline()
    return msgspec.json.decode(line, type=kind) if line else None


def _say(answer: msgspec.Struct) -> None:
    sys.stdout.buffer.write(msgspec.json.encode(answer) + b"\n")
    sys.stdout.buffer.flush()


async def _main() -> None:
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader(limit=1 << 20)
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    setup = await _line(reader, Setup)
    if setup is None:
        return
    ledger = Ledger()
    engines: list[Engine] = []
    for number, path in enumerate(setup.sockets):
        engine = WireEngine(setup, ledger, f"standin-{number}")
        engines.append(engine)
        await loop.create_unix_server(engine.peer, path)
    http = HttpEngine(setup, ledger)
    server = await loop.create_server(lambda: _HttpPeer(http), "127.0.0.1", 0, backlog=1024)
    _say(Ready(server.sockets[0].getsockname()[1]))
    while (case := await _line(reader, Case)) is not None:
        ledger.records.clear()
        ledger.unasked = 0
        ledger.pace, ledger.whole = case.pace, case.whole
        gc.collect()
        gc.disable()
        measured = await Load(case, ledger).run()
        gc.enable()
        _say(measured)


if __name__ == "__main__":
    asyncio.run(_main())
