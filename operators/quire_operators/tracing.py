"""Spans of reconciling: one a pass, linked to the request that made the generation it works towards.

A pass is no child of that request: it comes later, again and again, and long after the request was answered. The
link is the store's, written with the intent (`Store.origin`): a control plane that was started again still has it.

A reconciler looks at its objects many times a second while something moves. A pass is told of when it did
something (`acted`), failed, or found another state of affairs than the pass before it; a span that would repeat
the last one is never ended, and so never exported. Without a tracer nothing is done at all.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from typing import TYPE_CHECKING

from quire_schemas import signals
from quire_schemas.resource import Key

if TYPE_CHECKING:
    from opentelemetry.trace import Span, Tracer

    from quire_operators.records import Origin

_steps: ContextVar[list[str] | None] = ContextVar("steps of the pass", default=None)


def acted(step: object) -> None:
    """Tell that the pass under way did something; `step` in words."""
    steps = _steps.get()
    if steps is not None:
        steps.append(str(step))


class Passes:
    """Runs passes, each in its span. `origin` gives an object's generation and what made it."""

    def __init__(self, tracer: Tracer | None, origin: Callable[[Key], Origin | None]) -> None:
        self._tracer = tracer
        self._origin = origin
        self._told: dict[Key, tuple[int | None, str]] = {}

    async def run(self, key: Key, reconcile: Callable[[Key], Awaitable[float | None]]) -> float | None:
        """`reconcile(key)`: its result, or what it raises."""
        if self._tracer is None:
            return await reconcile(key)
        origin = self._origin(key)
        span = self._start(self._tracer, key, origin)
        if not span.is_recording():
            return await reconcile(key)
        from opentelemetry.trace import StatusCode, use_span

        generation = origin.generation if origin is not None else None
        steps: list[str] = []
        token = _steps.set(steps)
        outcome = "cancelled"
        try:
            with use_span(span, record_exception=False, set_status_on_exception=False):
                again = await reconcile(key)
            outcome = "acted" if steps else "idle" if again is None else "waiting"
            return again
        except Exception as error:
            outcome = "failed"
            span.set_attribute(signals.ERROR_TYPE, type(error).__qualname__)
            span.set_status(StatusCode.ERROR, str(error))
            raise
        finally:
            _steps.reset(token)
            span.set_attribute(signals.QUIRE_OUTCOME, outcome)
            for step in steps:
                span.add_event(signals.EVENT_STEP, {signals.QUIRE_STEP: step})
            told, self._told[key] = self._told.get(key), (generation, outcome)
            if steps or outcome == "failed" or (outcome != "cancelled" and told != (generation, outcome)):
                span.end()

    @staticmethod
    def _start(tracer: Tracer, key: Key, origin: Origin | None) -> Span:
        from opentelemetry.context import Context
        from opentelemetry.trace import Link, get_current_span
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        attributes: dict[str, str | int] = {signals.QUIRE_RESOURCE: str(key)}
        links = []
        if origin is not None:
            attributes[signals.QUIRE_GENERATION] = origin.generation
            if origin.traceparent is not None:
                carrier = {"traceparent": origin.traceparent}
                request = get_current_span(TraceContextTextMapPropagator().extract(carrier, Context()))
                if request.get_span_context().is_valid:
                    links.append(Link(request.get_span_context()))
        return tracer.start_span(
            signals.SPAN_RECONCILE.format(kind=key.kind), context=Context(), attributes=attributes, links=links
        )
