"""`python -m quire.teller --fd N`: tells collectors what a process of the router tells it, until that is gone.

It is a child of that process, on one end of a socket pair (`quire_schemas.telling`), and has what the other is to
be spared: the SDK of OpenTelemetry, its threads, its encoders. From the moment that it is ready, for which its
parent waits, it has the lowest priority there is, so that it takes processor time that nobody else wants; where
there is none for long, spans are lost, which its parent counts.

Spans are made in one piece, as the request has ended, not started and ended one by one: a `Writer` has the SDK's
limits, and hands them to the gates of `quire.tracing`, which are those of every other process.

Signals that end its parent reach it, too, and it does not heed them: it ends when there is nothing more to come,
and exports what is left within `tracing.SHUTDOWN_SECONDS`. Of what is asked of it and cannot be done it tells, and
ends.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, NoReturn

from quire.metering import Metering
from quire.phases import longest, phases_of
from quire.router.line import version
from quire.tracing import BadTelemetry, Counts, Declared, Tracing, shut_down
from quire_schemas import signals, telling, wire

if TYPE_CHECKING:
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import SpanProcessor

log = logging.getLogger("quire.teller")

LEAST: Final = 19
"""The niceness of who stands back for everybody."""


class Writer:
    """Makes the spans of requests, and hands them to `gates`."""

    def __init__(self, resource: Resource, gates: Sequence[SpanProcessor]) -> None:
        from opentelemetry import trace
        from opentelemetry.attributes import BoundedAttributes
        from opentelemetry.sdk.trace import Event, ReadableSpan, SpanLimits
        from opentelemetry.sdk.trace.id_generator import RandomIdGenerator
        from opentelemetry.sdk.util import BoundedList
        from opentelemetry.sdk.util.instrumentation import InstrumentationScope

        limits, scope, ids = SpanLimits(), InstrumentationScope("quire.router"), RandomIdGenerator()
        failed = trace.Status(trace.StatusCode.ERROR)
        fine = trace.Status(trace.StatusCode.UNSET)

        def context(traceparent: str, state: trace.TraceState | None, *, remote: bool) -> trace.SpanContext:
            _, trace_id, span_id, flags = traceparent.split("-")
            return trace.SpanContext(
                int(trace_id, 16), int(span_id, 16), remote, trace.TraceFlags(int(flags, 16)), state
            )

        def attributes(found: Mapping[str, Any], count: int | None, length: int | None) -> Any:
            applying = {key: value for key, value in found.items() if value is not None}
            return BoundedAttributes(count, applying, immutable=True, max_value_len=length)

        def span(
            name: str,
            own: trace.SpanContext,
            parent: trace.SpanContext | None,
            kind: trace.SpanKind,
            status: trace.Status,
            times: tuple[int, int],
            about: Mapping[str, Any],
            events: Iterable[tuple[telling.Event, int]],
        ) -> ReadableSpan:
            return ReadableSpan(
                name,
                context=own,
                parent=parent,
                resource=resource,
                attributes=attributes(about, limits.max_span_attributes, limits.max_span_attribute_length),
                events=BoundedList.from_seq(
                    limits.max_events,
                    [
                        Event(
                            event.name,
                            attributes(event.attributes, limits.max_event_attributes, limits.max_attribute_length),
                            at,
                        )
                        for event, at in events
                    ],
                ),
                kind=kind,
                status=status,
                start_time=times[0],
                end_time=times[1],
                instrumentation_scope=scope,
            )

        def spans(told: telling.Trace) -> list[ReadableSpan]:
            state = trace.TraceState.from_header([told.state]) if told.state else None
            own = context(told.context, state, remote=False)
            parent = context(told.parent, state, remote=True) if told.parent else None

            def ns(at: float) -> int:
                return told.wall + int((at - told.began_at) * 1e9)

            sequences = [phases_of(each) for each in told.sequences]
            phases = [*told.phases, *(phase for each in sequences for phase in each)]
            below = [
                span(
                    phase.name,
                    trace.SpanContext(own.trace_id, ids.generate_span_id(), False, own.trace_flags, state),
                    own,
                    trace.SpanKind.INTERNAL,
                    fine,
                    (ns(phase.start), ns(phase.end)),
                    phase.attributes,
                    [(event, ns(event.at)) for event in phase.events],
                )
                for phase in (phases if told.kept is None else phases[: told.kept - 1])
            ]
            named = signals.SPAN_REQUEST.format(operation=told.operation, model=told.asked)
            whole = span(
                named if told.asked else told.operation,
                own,
                parent,
                trace.SpanKind.SERVER,
                failed if told.failed else fine,
                (told.wall, ns(told.ended_at)),
                _known(told) | longest(sequences) | told.attributes,
                [(event, ns(event.at)) for event in told.events],
            )
            return [*below, whole]

        self._spans: Callable[[telling.Trace], list[ReadableSpan]] = spans
        self._gates = gates

    def write(self, told: telling.Trace) -> None:
        for span in self._spans(told):
            for gate in self._gates:
                gate.on_end(span)


def _known(told: telling.Trace) -> telling.Attributes:
    """Attributes of any request."""
    address, port = told.server or (None, None)
    return {
        signals.GEN_AI_OPERATION: told.operation,
        signals.GEN_AI_PROVIDER: signals.PROVIDER,
        signals.GEN_AI_REQUEST_MODEL: told.asked or None,
        signals.GEN_AI_RESPONSE_MODEL: told.model or None,
        signals.GEN_AI_E2E: told.ended_at - told.began_at,
        signals.HTTP_STATUS: told.status,
        signals.ERROR_TYPE: told.error or None,
        signals.HTTP_METHOD: "POST",
        signals.HTTP_ROUTE: told.route,
        signals.SERVER_ADDRESS: address,
        signals.SERVER_PORT: port,
    }


class _Reports:
    """Tells the parent what became of spans, from whatever thread knows."""

    def __init__(self, counts: Counts, writer: asyncio.StreamWriter) -> None:
        self._counts = counts
        self._writer = writer
        self._told = (0, 0, 0)
        self._loop = asyncio.get_running_loop()
        self._is_due = False

    def changed(self) -> None:
        if not self._is_due:
            self._is_due = True
            self._loop.call_soon_threadsafe(self._tell)

    def _tell(self) -> None:
        self._is_due = False
        now = (self._counts.exported, self._counts.queue_full, self._counts.export_failed)
        exported, full, failed = (new - old for new, old in zip(now, self._told, strict=True))
        self._told = now
        if not self._writer.is_closing():
            self._writer.write(wire.frame(telling.Done(exported, full, failed)))


async def tell(end: socket.socket) -> None:
    """Tell what comes in, until nothing does, and export what is left. What goes wrong ends the process."""
    reader, writer = await asyncio.open_unix_connection(sock=end)
    try:
        await _tell(wire.Reader(reader, telling.ToTeller), writer)
    except Exception:
        log.exception("no more can be told")
        _end(1)  # with the line open: who sees it cut kills this process, and knows nothing of its end
    writer.close()


async def _tell(incoming: wire.Reader[telling.ToTeller], writer: asyncio.StreamWriter) -> None:
    begin = await incoming.read()
    if not isinstance(begin, telling.Begin):
        return
    declared = Declared(begin.otlp_endpoint, begin.sampling, begin.metrics) if begin.declared else None
    try:
        tracing = Tracing.set_up(begin.service, declared=declared, pid=begin.pid)
        metering = Metering.set_up(begin.service, declared=declared, pid=begin.pid)
    except BadTelemetry as error:
        writer.write(wire.frame(telling.Unable(str(error))))
        await writer.drain()
        return
    spans = Writer(tracing.provider.resource, tracing.gates) if tracing.provider is not None else None
    tracing.counts.changed = _Reports(tracing.counts, writer).changed
    writer.write(wire.frame(telling.Ready()))
    _stand_back()
    try:
        while isinstance(news := await incoming.read(), telling.News):
            for item in news.items:
                if isinstance(item, telling.Measure):
                    metering.tell(item)
                elif spans is not None:
                    spans.write(item)
            await asyncio.sleep(0)  # what became of spans is told also while more and more comes in
    except (ConnectionError, asyncio.IncompleteReadError):
        pass  # the parent went in the middle of a word
    await asyncio.to_thread(shut_down, tracing.provider, metering.provider)
    tracing.counts.changed = Counts().changed  # nobody listens any more


def _stand_back() -> None:
    """Lower the priority of all threads: to the system it is that of each by itself."""
    for thread in os.listdir("/proc/self/task"):
        with contextlib.suppress(ProcessLookupError):
            os.setpriority(os.PRIO_PROCESS, int(thread), LEAST)


def _end(code: int) -> NoReturn:
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)  # an exporter's thread may still wait for its collector


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m quire.teller", description=__doc__)
    parser.add_argument("--fd", type=int, required=True, metavar="N", help="its end of the socket pair")
    parser.add_argument("--of", default="", metavar="NAME", help="whose it is, for the log")
    parser.add_argument("--speaks", required=True, metavar="VERSION", help="what the parent speaks")
    given = parser.parse_args(arguments)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    of = f" {given.of}:" if given.of else ""
    logging.basicConfig(
        level=logging.INFO, format=f"%(asctime)s %(levelname)s %(name)s:{of} %(message)s", stream=sys.stderr
    )
    code = 0
    if given.speaks != version():
        code = os.EX_PROTOCOL
    else:
        asyncio.run(tell(socket.socket(fileno=given.fd)))
    _end(code)


if __name__ == "__main__":
    main(sys.argv[1:])
