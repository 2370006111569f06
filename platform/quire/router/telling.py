"""What tells collectors of a process's requests: a child of it, started, fed and watched here.

What is known of a request that has ended is put aside, and goes to the child with what else has ended within
`GATHER_SECONDS`: encoding many one after the other takes a fraction of what it takes each by itself, between other
work. All else, OpenTelemetry included, happens there (`quire.teller`). Whoever ends a request never waits for it.

**Room.** There is room for as many spans as OTEL_BSP_MAX_QUEUE_SIZE says, wherever they are: here, in the socket,
with the child's exporter. The child says what became of them, and only that makes room again. So a collector that
is gone, and a child that gets no processor time, come to the same: spans that are not taken, and are counted as
`queue_full`. Where there is not room for all of a request, its own span is kept and the last of those below it go.
Measures take no part in that, for the child adds them up at once; where it does not take them, those beyond
`MOST_MEASURES` here and `MOST_BYTES` on their way are lost, which is said once.

**A child that ends** is followed by another, after a pause that doubles as long as they do not last. The spans
that it had are counted as `export_failed`. What ends meanwhile waits for the next one, as far as there is room.
The sums of measures begin anew with it.

**Which requests** are traced is decided here, by the samplers that OpenTelemetry specifies: so a request that is
not costs next to nothing, and the ids that the engine is told are there when it is.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import socket
import sys
import time
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from quire.phases import longest, phases_of
from quire.router.account import Account
from quire.router.line import version
from quire.tracing import SHUTDOWN_SECONDS, BadTelemetry, Counts, Declared, disabled, room, wanted
from quire_operators.fleet import sibling
from quire_schemas import signals, telling, wire

log = logging.getLogger("quire.telling")

GATHER_SECONDS: Final = 0.1
GATHER_ITEMS: Final = 64
"""So many go at once."""
MOST_MEASURES: Final = 10_000
MOST_BYTES: Final = 4 << 20
PAUSES: Final = (0.2, 60.0)
"""Seconds until a child that ended is followed by another, and the most that doubling makes of it."""
HEALTHY_SECONDS: Final = 60.0
"""Who lasts so long is followed at once."""
START_SECONDS: Final = 20.0
"""That the first one may take until the process serves without it."""
END_SECONDS: Final = 0.5
"""Beyond `SHUTDOWN_SECONDS`, for the child to be gone."""


@dataclass(frozen=True, slots=True)
class Sampler:
    """Which traces are told of: `share` of those that begin here; and of a client's those that he tells of, if
    they are `followed`, else the same share."""

    share: float = 1.0
    followed: bool = True

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> Sampler:
        """As OTEL_TRACES_SAMPLER says; what it cannot mean is ignored with a warning, as is specified."""
        name = environment.get("OTEL_TRACES_SAMPLER", "").strip().lower() or "parentbased_always_on"
        followed, kind = name.startswith("parentbased_"), name.removeprefix("parentbased_")
        if kind in ("always_on", "always_off"):
            return cls(float(kind == "always_on"), followed)
        if kind != "traceidratio":
            log.warning("OTEL_TRACES_SAMPLER is ignored: there is no sampler '%s'", name)
            return cls()
        said = environment.get("OTEL_TRACES_SAMPLER_ARG", "").strip()
        try:
            share = float(said)
        except ValueError:
            share = -1.0
        if not 0.0 <= share <= 1.0:
            log.warning("OTEL_TRACES_SAMPLER_ARG is ignored: '%s' is no number from 0 to 1", said)
            share = 1.0
        return cls(share, followed)

    def takes(self, trace_id: str, parent_is_sampled: bool | None) -> bool:
        """`parent_is_sampled` is None where there is no parent."""
        if self.followed and parent_is_sampled is not None:
            return parent_is_sampled
        return self.share == 1.0 or int(trace_id[16:], 16) < round(self.share * 2**64)


class Teller:
    """Has a child tell collectors of requests. Without `traces` and `metrics` it does nothing."""

    def __init__(
        self,
        traces: int = 0,
        metrics: int = 0,
        *,
        capacity: int = 0,
        sampler: Sampler | None = None,
        declared: Declared | None = None,
        who: str = "",
        command: Sequence[str] = (),
    ) -> None:
        """`traces` and `metrics` are numbers of exporters. `who` this process is is for the log; `command` is what
        starts a child."""
        self.counts = Counts()
        self.sampler = (sampler or Sampler()) if traces else None
        """None where there are no traces."""
        self.errors_only = declared is not None and declared.sampling == "errors"
        """Only requests that failed are to be exported; who ends a request sees to it."""
        self.measures = bool(metrics)
        self._each = traces
        """Times that each span is exported, by which all numbers of spans here are multiplied."""
        self._capacity = capacity * traces
        self._declared = declared
        self._command = [*(command or (sys.executable, "-m", "quire.teller")), "--of", who, "--speaks", version()]
        self._traces: list[telling.Trace] = []
        self._measures: list[tuple[Account, float]] = []
        """With the time in all, which the access log tells a moment later."""
        self._gathered = 0
        """Spans of the traces."""
        self._sent = 0
        """Spans that the child has."""
        self._lost_measures = False
        self.pid = 0
        """Of the child that there is; 0 where there is none."""
        self._loop: asyncio.AbstractEventLoop | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._writer: asyncio.StreamWriter | None = None
        """Where there is a child that takes news."""
        self._keeper: asyncio.Task[None] | None = None
        self._begun = asyncio.Event()
        self._unable = ""
        self._ends = False

    @classmethod
    def of(
        cls,
        declared: Declared | None = None,
        environment: Mapping[str, str] = os.environ,
        who: str = "",
        command: Sequence[str] = (),
    ) -> Teller:
        """The one for traces and metrics as declared, else as OTEL_* say; idle where the SDK is disabled."""
        traces, metrics = wanted(environment, declared), wanted(environment, declared, "metrics")
        if declared is not None and declared.otlp_endpoint is not None and disabled(environment):
            log.warning("OTEL_SDK_DISABLED is set: nothing goes to %s", declared.otlp_endpoint)
        try:
            capacity = room(environment)
        except ValueError:
            capacity = 0  # the child says so
        sampler = Sampler() if declared is not None or not traces else Sampler.of(environment)
        return cls(
            len(traces),
            len(metrics),
            capacity=capacity,
            sampler=sampler,
            declared=declared,
            who=who,
            command=command,
        )

    # ── requests ──────────────────────────────────────────────────────────────────────────────────────────

    def trace(self, told: telling.Trace) -> None:
        """A request that is traced has ended."""
        room = (self._capacity - self._gathered - self._sent) // self._each if self._each else 0
        spans = told.spans
        if spans > room:
            self.counts.queue_full += (spans - max(room, 0)) * self._each
            if room <= 0:
                return
            _cut(told, room)
            spans = room
        self._gathered += spans * self._each
        self._traces.append(told)
        self._flush_soon()

    def measure(self, account: Account) -> None:
        """A request has ended."""
        if not self.measures:
            return
        if len(self._measures) < MOST_MEASURES:
            self._measures.append((account, account.total or 0.0))
        elif not self._lost_measures:
            self._lost_measures = True
            log.warning("measures of requests are not taken by the teller, and are lost")
        self._flush_soon()

    def _flush_soon(self) -> None:
        if (writer := self._writer) is None or self._loop is None:
            return
        many = len(self._measures) >= GATHER_ITEMS and _takes_measures(writer)
        if many or len(self._traces) >= GATHER_ITEMS:
            self._flush()
        elif self._timer is None:
            self._timer = self._loop.call_later(GATHER_SECONDS, self._flush)

    def _flush(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        writer = self._writer
        if writer is None or writer.transport.is_closing():
            return
        traces, self._traces = self._traces, []
        self._sent, self._gathered = self._sent + self._gathered, 0
        measures: list[tuple[Account, float]] = []
        if _takes_measures(writer):
            measures, self._measures = self._measures, []
        items: list[telling.Trace | telling.Measure] = [*traces, *(_measured(*each) for each in measures)]
        for at in range(0, len(items), 2 * GATHER_ITEMS):
            writer.write(wire.frame(telling.News(items[at : at + 2 * GATHER_ITEMS])))
        if self._measures:
            self._flush_soon()  # no other request may come that would see to it

    # ── the child ─────────────────────────────────────────────────────────────────────────────────────────

    async def during(self, work: Coroutine[None, None, None]) -> None:
        """Have a child while that is done, and its end told, however it ends."""
        self.start()
        try:
            await work
        finally:
            await self.close()

    def start(self) -> None:
        """Have a child, from now on."""
        if self._each or self.measures:
            self._loop = asyncio.get_running_loop()
            self._keeper = self._loop.create_task(self._keep(), name="teller")

    async def begun(self) -> None:
        """Wait until the first child knows what to tell to whom. Raises `BadTelemetry`. One that ends before, or
        takes long, is no reason not to serve."""
        if self._keeper is None:
            return
        try:
            async with asyncio.timeout(START_SECONDS):
                await self._begun.wait()
        except TimeoutError:
            log.warning("the teller takes long to start; requests are answered meanwhile")
        if self._unable:
            raise BadTelemetry(self._unable)

    async def close(self) -> None:
        """Tell what is left, and wait for the child's end, but no longer than it is given for that."""
        self._ends = True
        if self._keeper is None:
            return
        self._flush()
        writer, self._writer = self._writer, None  # what ends now comes too late
        if writer is not None and writer.can_write_eof():
            writer.write_eof()
            await asyncio.wait([self._keeper], timeout=SHUTDOWN_SECONDS + END_SECONDS)
        self._keeper.cancel()
        await asyncio.wait([self._keeper])

    async def _keep(self) -> None:
        pause = PAUSES[0]
        while not self._ends:
            lasted = 0.0
            try:
                lasted = await self._live()
            except OSError as error:
                log.error("the teller cannot be started: %s", error)
            except Exception as error:
                log.error("the teller failed", exc_info=error)
            self._begun.set()
            if self._ends or self._unable:
                return
            pause = PAUSES[0] if lasted >= HEALTHY_SECONDS else pause
            await asyncio.sleep(pause)
            pause = min(2 * pause, PAUSES[1])

    async def _live(self) -> float:
        """One life of a child; for how many seconds it took news."""
        mine, its = socket.socketpair()
        try:
            process = sibling.start([*self._command, "--fd", str(its.fileno())], os.environ, (its.fileno(),))
        except BaseException:
            mine.close()
            raise
        finally:
            its.close()
        self.pid = process.pid
        try:
            lasted = await self._feed(mine)
            if not self._ends:
                process.kill()  # its line is cut, whatever it still does
            code = await asyncio.to_thread(process.wait)
        except BaseException:
            process.kill()
            process.wait()
            raise
        finally:
            self.pid = 0  # not before its processor time is among that of children that have ended
        if not self._ends and not self._unable:
            if code == os.EX_PROTOCOL:
                log.error("what is installed now is not what this router runs: replace the gateway to have it")
            log.error("the teller (pid %d) ended with %d; another one is started", process.pid, code)
        return lasted

    async def _feed(self, end: socket.socket) -> float:
        """Tell the child at the other end, until it is gone; for how many seconds it took news."""
        began: float | None = None
        reader, writer = await asyncio.open_unix_connection(sock=end)
        try:
            writer.write(wire.frame(self._begin()))
            heard: wire.Reader[telling.FromTeller] = wire.Reader(reader, telling.FromTeller)
            while (message := await heard.read()) is not None:
                match message:
                    case telling.Ready():
                        began, self._writer = time.monotonic(), writer
                        self._flush()
                        self._begun.set()
                    case telling.Unable(text):
                        self._unable = text
                    case telling.Done():
                        self._done(message)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass  # it ended in the middle of a word
        finally:
            self._writer = None
            self.counts.export_failed += self._sent
            self._sent = 0
            writer.transport.abort()
        return 0.0 if began is None else time.monotonic() - began

    def _begin(self) -> telling.Begin:
        said = self._declared or Declared()
        return telling.Begin(
            signals.SERVICE_ROUTER,
            os.getpid(),
            self._declared is not None,
            said.otlp_endpoint,
            said.sampling,
            said.metrics,
        )

    def _done(self, done: telling.Done) -> None:
        self.counts.exported += done.exported
        self.counts.queue_full += done.queue_full
        self.counts.export_failed += done.export_failed
        self._sent = max(self._sent - done.exported - done.queue_full - done.export_failed, 0)


def _takes_measures(writer: asyncio.StreamWriter) -> bool:
    return writer.transport.get_write_buffer_size() < MOST_BYTES


def _cut(told: telling.Trace, spans: int) -> None:
    """Leave so many of its spans; the times of its own one are those of all sequences yet."""
    told.attributes = {**told.attributes, **longest(phases_of(each) for each in told.sequences)}
    told.kept = spans
    told.phases = told.phases[: spans - 1]
    left = spans - 1 - len(told.phases)
    before = itertools.accumulate((each.spans for each in told.sequences), initial=0)
    told.sequences = [each for each, sum_ in zip(told.sequences, before, strict=False) if sum_ < left]


def _measured(account: Account, total: float) -> telling.Measure:
    return telling.Measure(
        account.operation,
        account.model,
        account.asked,
        account.background,
        account.prompt_tokens,
        account.completion_tokens,
        account.first_token,
        account.writing,
        total,
        account.error,
    )


__all__ = ["Sampler", "Teller"]
