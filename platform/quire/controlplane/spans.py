"""A span for each request of the admin API that changes something, below the command that sent it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from litestar import Request

from quire.controlplane.errors import answer
from quire_schemas import signals

if TYPE_CHECKING:
    from opentelemetry.trace import Tracer


@contextmanager
def traced(tracer: Tracer | None, request: Request[Any, Any, Any], route: str) -> Iterator[str | None]:
    """Gives the traceparent by which to remember the request: its span's, or the caller's when there is none."""
    said = {name: request.headers[name] for name in ("traceparent", "tracestate") if name in request.headers}
    if tracer is None:
        yield said.get("traceparent")
        return
    from opentelemetry.trace import SpanKind, StatusCode
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    propagator = TraceContextTextMapPropagator()
    with tracer.start_as_current_span(
        signals.SPAN_ADMIN.format(method=request.method, route=route),
        context=propagator.extract(said),
        kind=SpanKind.SERVER,
        attributes={signals.HTTP_METHOD: request.method, signals.HTTP_ROUTE: route},
        record_exception=False,
        set_status_on_exception=False,
    ) as span:
        carrier: dict[str, str] = {}
        propagator.inject(carrier)
        try:
            yield carrier.get("traceparent")
        except Exception as error:
            answered = answer(error)
            code = answered.body["error"]["code"] if answered.status != 500 else type(error).__qualname__
            span.set_attributes({signals.HTTP_STATUS: answered.status, signals.ERROR_TYPE: code})
            if answered.status >= 500:
                span.set_status(StatusCode.ERROR)
            raise
