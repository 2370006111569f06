"""A command's own span, above those of the control plane, for shells whose OTEL_* name an exporter.

A command without a span hands on the TRACEPARENT and TRACESTATE that it was started with, as shells and pipelines
set them (`quire.client` does that); one with a span is below them.
"""

from __future__ import annotations

from collections.abc import Callable

from quire.cli.outcome import ExitCode
from quire.cli.session import notice
from quire.client import Client
from quire.tracing import BadTelemetry, Tracing
from quire_schemas import signals


def in_span(client: Client, command: str, work: Callable[[], int]) -> int:
    """`work()`, which is `platform <command>` speaking through `client`; its exit code."""
    try:
        tracing = Tracing.set_up(signals.SERVICE_COMMAND)
    except BadTelemetry as error:
        notice(f"note: this command is not traced: {error}")
        tracing = Tracing()
    tracer = tracing.tracer("quire.cli")
    if tracer is None:
        return work()
    from opentelemetry.trace import SpanKind, StatusCode
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    propagator = TraceContextTextMapPropagator()
    name = signals.SPAN_COMMAND.format(command=command)
    try:
        with tracer.start_as_current_span(
            name, context=propagator.extract(client.trace), kind=SpanKind.CLIENT, record_exception=False
        ) as span:
            client.trace = {}
            propagator.inject(client.trace)
            code = work()
            span.set_attribute(signals.PROCESS_EXIT_CODE, int(code))
            if code != ExitCode.OK:
                span.set_status(StatusCode.ERROR)
            return code
    finally:
        tracing.shutdown()
