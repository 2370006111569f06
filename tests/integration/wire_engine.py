"""An engine for the router's tests: the real wire protocol on a real Unix socket, tokens from a script.

It does what a real engine cannot be asked to do: die in the middle of a stream, stall with its socket open,
answer as somebody else, end a request with a chosen error. It also keeps a record of what the router sent.
"""

from __future__ import annotations

import asyncio
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from quire.router.proof import ID_PREFIX
from quire_schemas import wire

WHY = "/secret/path 0xdead"
"""What it says of a failure that it is told to have."""
TEMPLATE_HASH = "abcdef0123456789"
"""Of what engines run, unless something else is said."""
Script = Callable[[wire.Generate], list[int]]


@dataclass(slots=True)
class _Running:
    writer: asyncio.StreamWriter
    """Of the connection that asked for it, and hears of it."""
    request: wire.Generate
    answer: list[int]
    received_at: float
    sent: int = 0
    scheduled_at: float | None = None
    first_token_at: float | None = None

    def timings(self, skew: float, cached: int, finished_at: float | None) -> wire.Timings:
        def there(at: float | None) -> float | None:
            return at + skew if at is not None else None

        return wire.Timings(
            received_at=self.received_at + skew,
            scheduled_at=there(self.scheduled_at),
            first_token_at=there(self.first_token_at),
            finished_at=there(finished_at),
            cached_tokens=cached,
        )


@dataclass(slots=True)
class WireEngine:
    """One replica. `script` gives the ids that a request is answered with, before `max_tokens` cuts them."""

    socket: Path
    replica_id: str
    script: Script
    incarnation: int = 1
    pace: float = 0.002
    """Seconds between steps."""
    tokens_per_step: int = 1
    max_num_seqs: int = 64
    vocab_size: int = 4096
    die_after: int | None = None
    """Cut every connection once this many tokens of some request were sent."""
    poison: Callable[[wire.Generate], bool] | None = None
    """Requests that it dies of on sight: every connection is cut."""
    deaths: int = 0
    stalled: bool = False
    deaf: bool = False
    """Reads what comes and answers nothing, as a stopped process's kernel does."""
    skew: float = 0.0
    """Seconds by which its clock is ahead of the router's, as if it was on another machine."""
    by_priority: bool = False
    """Serves requests by their priority, then by arrival, as an engine whose policy that is."""
    cached: Callable[[wire.Generate], int] = lambda _: 0
    """Prompt tokens that it says it had cached."""
    template_hash: str = TEMPLATE_HASH
    goes_on: bool = True
    """Knows answers that another engine has begun."""
    looked_up: int = 0
    """Tokens that it says each step has found in its prefix cache."""
    leans: Callable[[int], bool] = lambda _: False
    """At which places of a prompt it says to hold another token for likelier than the one that stands there."""
    fail_with: str | None = None
    """Error code to end each request with, after its first token."""
    generates: list[wire.Generate] = field(default_factory=list)
    """Requests of clients; what the router asks for `/health` is in `questions`."""
    questions: list[wire.Generate] = field(default_factory=list)
    aborts: list[str] = field(default_factory=list)
    limits: wire.Limits | None = None
    running: dict[str, _Running] = field(default_factory=dict)
    steps: int = 0
    _server: asyncio.Server | None = None
    _talks: set[asyncio.Task[None]] = field(default_factory=set)
    _writers: set[asyncio.StreamWriter] = field(default_factory=set)

    def endpoint(self, draining: bool = False, standby: bool = False) -> wire.ReplicaEndpoint:
        return wire.ReplicaEndpoint(
            self.replica_id, self.incarnation, str(self.socket), draining, standby, self.template_hash
        )

    async def start(self) -> WireEngine:
        self.socket.unlink(missing_ok=True)
        self._server = await asyncio.start_unix_server(self._taken, path=self.socket)
        return self

    async def stop(self) -> None:
        """As if the process was killed: the socket stops listening and all connections are cut."""
        if self._server is not None:
            self._server.close()
        for _ in range(3):  # rounds of the loop from a connection's accept to its talk
            await asyncio.sleep(0)
        self.cut()
        talks = list(self._talks)
        for talk in talks:
            talk.cancel()
        if talks:
            await asyncio.wait(talks)
        await asyncio.sleep(0)  # transports end in the loop, which may be closed next
        self.socket.unlink(missing_ok=True)

    def cut(self) -> None:
        for writer in self._writers:
            writer.transport.abort()
        self.running.clear()

    def _taken(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Begin the talk of a connection; `stop` and `cut` find both from here on, also before its first step."""
        self._writers.add(writer)
        talk = asyncio.create_task(self._talk(reader, writer))
        self._talks.add(talk)
        talk.add_done_callback(self._talks.discard)
        talk.add_done_callback(lambda _: self._writers.discard(writer))

    async def _talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        stepping = asyncio.create_task(self._step_for_ever(writer))
        try:
            frames: wire.Reader[wire.ToEngine] = wire.Reader(reader, wire.ToEngine)
            while (message := await frames.read()) is not None:
                if not self.deaf:
                    self._hear(message, writer)
        except (OSError, EOFError, asyncio.CancelledError):
            return
        finally:
            stepping.cancel()
            await asyncio.wait([stepping])
            self.running = {name: run for name, run in self.running.items() if run.writer is not writer}
            writer.transport.abort()

    def _hear(self, message: wire.ToEngine, writer: asyncio.StreamWriter) -> None:
        match message:
            case wire.Hello():
                writer.write(
                    wire.frame(
                        wire.Welcome(
                            replica_id=self.replica_id,
                            incarnation=self.incarnation,
                            protocol=wire.PROTOCOL,
                            vocab_size=self.vocab_size,
                            eos_token_ids=(0,),
                            max_model_len=512,
                            block_size=16,
                            num_blocks=64,
                            max_num_seqs=self.max_num_seqs,
                            lease=wire.ADOPTION_WINDOW,
                            goes_on=self.goes_on,
                        )
                    )
                )
                writer.write(wire.frame(self._stats()))
            case wire.Generate():
                asked = message.id.startswith(ID_PREFIX)
                (self.questions if asked else self.generates).append(message)
                answer = self.script(message)[len(message.written) : message.sampling.max_tokens]
                self.running[message.id] = _Running(writer, message, answer, time.monotonic())
                if self.poison is not None and self.poison(message):
                    self.deaths += 1
                    self.cut()
            case wire.Abort():
                if not message.id.startswith(ID_PREFIX):
                    self.aborts.append(message.id)
                self.running.pop(message.id, None)
            case wire.GetStats():
                writer.write(wire.frame(self._stats()))
            case wire.Limits():
                self.limits = message
                writer.write(wire.frame(self._stats()))

    def _stats(self) -> wire.Stats:
        waiting = max(len(self.running) - self.max_num_seqs, 0)
        return wire.Stats(
            steps=self.steps,
            max_num_seqs=self.limits.max_num_seqs if self.limits is not None else self.max_num_seqs,
            last_step_at=time.monotonic() + self.skew,
            running=len(self.running) - waiting,
            waiting=waiting,
            blocks_total=64,
            blocks_used=min(4 * len(self.running), 64),
            kv_slots_used=0,
            preemptions=0,
            prompt_tokens=0,
            generation_tokens=0,
            hot_hash=self.limits.hot_hash if self.limits is not None else "h0",
            prefix_queried_tokens=1000 + self.looked_up * self.steps,
            prefix_hit_tokens=750 + self.looked_up * self.steps,
            blocks_cached=12,
            blocks_saved=5,
            deferred=0,
            computed_tokens=17 * self.steps,
            steps_by_tokens=(0, 0, 0, self.steps, *[0] * 10),
            cpu_seconds=1.5,
            resident_bytes=1 << 20,
        )

    async def _step_for_ever(self, writer: asyncio.StreamWriter) -> None:
        while True:
            await asyncio.sleep(self.pace)
            order = list(self.running.values())
            if self.by_priority:
                order.sort(key=lambda run: run.request.priority)
            mine = [run for run in order[: self.max_num_seqs] if run.writer is writer]
            if self.stalled or not mine:
                continue
            self.steps += 1
            items = [self._advance(run) for run in mine]
            for item in items:
                if item.finish_reason is not None:
                    del self.running[item.id]
            writer.write(wire.frame(wire.Deltas(self.steps, items)))
            writer.write(wire.frame(self._stats()))
            most = max((run.sent for run in self.running.values()), default=0)
            if self.die_after is not None and most >= self.die_after:
                await writer.drain()
                self.cut()

    def _advance(self, run: _Running) -> wire.Delta:
        if run.request.pooling is not None:
            return wire.Delta(run.request.id, finish_reason="stop", embedding=struct.pack("<2f", 0.6, 0.8))
        ids = run.answer[run.sent : run.sent + self.tokens_per_step]
        run.sent += len(ids)
        delta = wire.Delta(id=run.request.id, token_ids=tuple(ids))
        now = time.monotonic()
        if run.first_token_at is None:
            run.scheduled_at, run.first_token_at = max(now - self.pace, run.received_at), now
            delta.timings = run.timings(self.skew, self.cached(run.request), None)
        sampling = run.request.sampling
        named = tuple(-3.0 for _ in sampling.logprob_token_ids)

        def scores(ids: list[int], wanted: int) -> list[wire.TokenLogprobs]:
            many = self.vocab_size if wanted == wire.WHOLE_VOCABULARY else wanted
            return [
                wire.TokenLogprobs(index, -0.5, tuple((index + k, -0.5 - k) for k in range(many)), 1, named)
                for index in ids
            ]

        if sampling.logprobs is not None:
            delta.logprobs = scores(ids, sampling.logprobs)
        if sampling.prompt_logprobs is not None and delta.timings is not None:
            told = scores(run.request.token_ids[1:], sampling.prompt_logprobs)
            delta.prompt_logprobs = [
                _leaning(each) if self.leans(place) else each for place, each in enumerate(told, 1)
            ]
        if self.fail_with is not None:
            delta.finish_reason, delta.error_code, delta.error = "error", self.fail_with, WHY
        elif run.sent >= run.request.sampling.max_tokens:
            delta.finish_reason = "length"
        elif run.sent >= len(run.answer):
            delta.finish_reason, delta.stop_token_id = "stop", 0
        if delta.finish_reason is not None:
            delta.timings = run.timings(self.skew, self.cached(run.request), now)
        if (pooling := run.request.pooling) is not None:  # one step, one vector
            delta.token_ids, delta.finish_reason = (), "stop"
            delta.embedding = struct.pack("<f", 1.0) + bytes(4 * (min(pooling.dimensions or 8, 8) - 1))
            delta.timings = run.timings(self.skew, self.cached(run.request), now)
        if run.request.beam is not None:  # says when it begins, and what it found
            delta.token_ids = ()
            if delta.finish_reason is not None:
                delta.beams = [wire.BeamResult(run.answer, -1.0, "length", None)] * run.request.beam.width
        return delta


def _leaning(scores: wire.TokenLogprobs) -> wire.TokenLogprobs:
    """The same with the likeliest two tokens changed for each other."""
    (first, likely), (second, less), *others = scores.top
    return wire.TokenLogprobs(scores.token_id, less, ((second, likely), (first, less), *others), 2, scores.named)
