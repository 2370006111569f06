"""The spans of one request: its own, below the client's, and one for each place where its time went.

Nothing is made before the end: a request notes its phases as times, and `RequestSpan.end` makes spans of them. So
a request that is not sampled, or not exported because it did not fail, costs a list of tuples.

**Clocks.** Spans are told in nanoseconds since 1970; everything here is measured in seconds of `time.monotonic()`.
Each request pairs the two once, when it arrives, and all of its times are counted from that pair: a wall clock
that is set meanwhile moves no phase against another. Engines report monotonic times too. On one machine that is
the same clock, whatever the process (CLOCK_MONOTONIC counts from the boot); `engine_offset` finds out whether it
is, and otherwise how far the engine's clock is off, as exactly as two messages can tell.

**What is told of a sequence.** Engines send `wire.Timings` with the first token and with the end. A sequence that
never got that far (its engine died, the client left while it waited) is one `attempt` with its two ends.

No span carries text: not of a prompt, not of an answer, not a stop string, and no header but `traceparent` and
`tracestate`; `baggage` is neither read nor handed on.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from quire.metering import Metering
from quire.router.account import Account
from quire.tracing import Tracing
from quire_schemas import signals
from quire_schemas.wire import Timings

if TYPE_CHECKING:
    from opentelemetry.trace import Span, Tracer

_TRACEPARENT: Final = re.compile(
    r"(?!ff)[0-9a-f]{2}-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}", re.ASCII
)


class _Event(NamedTuple):
    name: str
    at: float
    attributes: Mapping[str, Any]


class _Phase(NamedTuple):
    name: str
    start: float
    end: float
    attributes: Mapping[str, Any]
    events: Sequence[_Event]


@dataclass(frozen=True, slots=True)
class SequenceTimes:
    """One attempt at one sequence, as the router saw it. Times are monotonic seconds of the router."""

    sent_at: float
    heard_at: float
    """When the router had its last news of it, or gave it up."""
    timings: Timings | None
    """What the engine told, on its own clock."""
    prompt_tokens: int
    generated: int


def engine_offset(timings: Timings, sent_at: float, heard_at: float) -> float:
    """Seconds to add to an engine's times to have them on the router's clock.

    The engine can have received nothing before it was sent, and told nothing after it was heard. If its times fit
    between the two as they are, the clocks are one. Otherwise the middle of what is possible is off by at most
    half of the time that the two messages took.
    """
    low = sent_at - timings.received_at
    last = timings.finished_at or timings.first_token_at or timings.received_at
    high = heard_at - last
    return 0.0 if low <= 0.0 <= high else (low + high) / 2


class RequestSpan:
    """What is noted of one request; empty when nothing is exported."""

    __slots__ = (
        "_errors_only",
        "_events",
        "_longest",
        "_mono",
        "_phases",
        "_span",
        "_tracer",
        "_wall",
        "traceparent",
    )

    def __init__(
        self,
        span: Span | None,
        tracer: Tracer | None,
        traceparent: str | None,
        clocks: tuple[int, float],
        errors_only: bool = False,
    ) -> None:
        self._span = span
        self._tracer = tracer
        self._wall, self._mono = clocks
        self.traceparent = traceparent
        """For the engine: this span, or what the client sent when there is none."""
        self._errors_only = errors_only
        self._phases: list[_Phase] = []
        self._events: list[_Event] = []
        self._longest: dict[str, float] = {}

    @classmethod
    def unseen(cls) -> RequestSpan:
        """Of a request that nobody is told of."""
        return cls(None, None, None, (0, 0.0))

    @property
    def is_recorded(self) -> bool:
        """Whether anything that is noted here is kept."""
        return self._span is not None

    @property
    def trace_id(self) -> str:
        """Of the trace that it is in; empty where there is none."""
        return self.traceparent[3:35] if self.traceparent is not None else ""

    def _ns(self, at: float) -> int:
        return self._wall + int((at - self._mono) * 1e9)

    def name(self, operation: str, model: str) -> None:
        """Call the span by its operation and its model, which must be one that exists: names are few."""
        if self._span is not None:
            self._span.update_name(signals.SPAN_REQUEST.format(operation=operation, model=model))

    def set(self, attributes: Mapping[str, Any]) -> None:
        """Attributes of the request; None stands for one that does not apply."""
        if self._span is not None:
            self._span.set_attributes({key: value for key, value in attributes.items() if value is not None})

    def event(self, name: str, at: float, attributes: Mapping[str, Any] | None = None) -> None:
        if self._span is not None:
            self._events.append(_Event(name, at, attributes or {}))

    def phase(self, name: str, start: float, end: float, attributes: Mapping[str, Any] | None = None) -> None:
        """A span below the request's."""
        if self._span is not None:
            self._phases.append(_Phase(name, start, end, attributes or {}, ()))

    def sequence(self, times: SequenceTimes, where: Mapping[str, Any]) -> None:
        """The phases of one attempt at one sequence; `where` are attributes of each."""
        if self._span is None:
            return
        timings = times.timings
        if timings is None or timings.scheduled_at is None or timings.first_token_at is None:
            self._phases.append(_Phase(signals.SPAN_ATTEMPT, times.sent_at, times.heard_at, where, ()))
            return
        offset = engine_offset(timings, times.sent_at, times.heard_at)

        def here(at: float) -> float:
            return min(max(at + offset, times.sent_at), times.heard_at)

        received, scheduled = here(timings.received_at), here(timings.scheduled_at)
        first = here(timings.first_token_at)
        finished = here(timings.finished_at) if timings.finished_at is not None else times.heard_at
        preempted = [_Event(signals.EVENT_PREEMPTED, here(at), {}) for at in timings.preempted_at]
        self._phases += (
            _Phase(signals.SPAN_QUEUE, received, scheduled, where, ()),
            _Phase(
                signals.SPAN_PREFILL,
                scheduled,
                first,
                {**where, signals.QUIRE_TOKENS: times.prompt_tokens},
                [event for event in preempted if event.at < first],
            ),
            _Phase(
                signals.SPAN_DECODE,
                first,
                finished,
                {**where, signals.QUIRE_TOKENS: times.generated},
                [event for event in preempted if event.at >= first],
            ),
        )
        for name, seconds in (
            (signals.GEN_AI_TIME_IN_QUEUE, scheduled - received),
            (signals.GEN_AI_TIME_IN_PREFILL, first - scheduled),
            (signals.GEN_AI_TIME_IN_DECODE, finished - first),
            (signals.GEN_AI_TIME_IN_INFERENCE, finished - scheduled),
        ):
            self._longest[name] = max(seconds, self._longest.get(name, 0.0))

    def end(self, at: float, error_code: str | None, *, failed: bool) -> None:
        """Close the span. `error_code` is the word of the error contract, None for success.

        `failed`: the fault is on this side, which makes the span an error (a client's mistake does not).
        """
        span, tracer = self._span, self._tracer
        if span is None or tracer is None or (self._errors_only and not failed):
            return  # a span that does not end is not exported
        from opentelemetry.trace import StatusCode, set_span_in_context

        below = set_span_in_context(span)
        for phase in self._phases:
            child = tracer.start_span(
                phase.name, context=below, start_time=self._ns(phase.start), attributes=phase.attributes
            )
            for event in phase.events:
                child.add_event(event.name, event.attributes, self._ns(event.at))
            child.end(self._ns(phase.end))
        for event in self._events:
            span.add_event(event.name, event.attributes, self._ns(event.at))
        span.set_attributes(self._longest)
        if error_code is not None:
            span.set_attribute(signals.ERROR_TYPE, error_code)
        if failed:
            span.set_status(StatusCode.ERROR)
        span.end(self._ns(at))


class RequestSpans:
    """Makes the spans of requests, and has them measured, if that goes anywhere."""

    def __init__(self, tracing: Tracing, metering: Metering | None = None) -> None:
        self._metering = metering or Metering()
        self._tracer = tracing.tracer("quire.router")
        self._errors_only = tracing.errors_only
        if self._tracer is not None:
            from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

            self._context = TraceContextTextMapPropagator()

    def measure(self, account: Account) -> None:
        """A request has ended."""
        self._metering.tell(account)

    def start(
        self,
        operation: str,
        headers: Iterable[tuple[bytes, bytes]],
        route: str,
        server: tuple[str, int | None] | None,
    ) -> RequestSpan:
        """A span for one request, from now on; below the client's own when it sent a proper `traceparent`."""
        parents, states = [], []
        for name, value in headers:
            if name == b"traceparent":
                parents.append(value.decode("latin-1"))
            elif name == b"tracestate":
                states.append(value.decode("latin-1"))
        parent = parents[0] if len(parents) == 1 else ""
        clocks = time.time_ns(), time.monotonic()
        if self._tracer is None:
            return RequestSpan(None, None, parent if _TRACEPARENT.fullmatch(parent) else None, clocks)
        from opentelemetry.trace import SpanKind, set_span_in_context

        attributes: dict[str, Any] = {
            signals.GEN_AI_OPERATION: operation,
            signals.GEN_AI_PROVIDER: signals.PROVIDER,
            signals.HTTP_METHOD: "POST",
            signals.HTTP_ROUTE: route,
        }
        if server is not None:
            attributes[signals.SERVER_ADDRESS] = server[0]
            if server[1] is not None:
                attributes[signals.SERVER_PORT] = server[1]
        span = self._tracer.start_span(
            operation,
            context=self._context.extract({"traceparent": parent, "tracestate": ",".join(states)}),
            kind=SpanKind.SERVER,
            start_time=clocks[0],
            attributes=attributes,
        )
        carrier: dict[str, str] = {}
        self._context.inject(carrier, context=set_span_in_context(span))
        recorded = span if span.is_recording() else None
        return RequestSpan(recorded, self._tracer, carrier.get("traceparent"), clocks, self._errors_only)
