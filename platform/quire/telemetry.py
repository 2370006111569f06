"""What the router tells of itself: Prometheus series for `/metrics`, one OpenTelemetry span a request.

**Metrics.** Counters and histograms are written where things happen, through the handles of one model
(`ModelMetrics`), which exist from the moment the model is routed: every series is there, at zero, before the first
request. What engines report about themselves is read at the moment of the scrape, so that no gauge can go stale.
Label values come from closed sets: models and replicas of the routing table, and the words below. A request for a
model nobody serves counts under `NO_MODEL`.

**Traces.** The SDK is set up from the standard OTEL_* variables, and only when they name an exporter; without one
a span costs nothing, and a `traceparent` that came with a request is handed on to the engine all the same.

    BadTelemetry      OTEL_TRACES_EXPORTER names an exporter that is not installed
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any, Final

from opentelemetry import trace
from opentelemetry.sdk.resources import SERVICE_NAME, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from quire_schemas import signals
from quire_schemas.wire import Stats

OPERATIONS: Final = ("chat", "text_completion")
FINISHES: Final = ("stop", "length", "abort", "error", "refused")
NO_MODEL: Final = "-"
CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"


class BadTelemetry(Exception):
    """The environment asks for an exporter that is not there."""


# ── metrics ───────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class ReplicaSample:
    """One replica at the moment of a scrape."""

    model: str
    replica: str
    up: bool
    stats: Stats | None


class ModelMetrics:
    """The handles of one model's series, looked up once."""

    __slots__ = (
        "e2e",
        "generation_tokens",
        "held",
        "in_flight",
        "inter_token",
        "prompt_tokens",
        "queue_time",
        "requests",
        "time_to_first_token",
    )

    def __init__(self, metrics: Metrics, model: str) -> None:
        self.requests: Mapping[tuple[str, str], Counter] = {
            (operation, finish): metrics.requests.labels(model, operation, finish)
            for operation in OPERATIONS
            for finish in FINISHES
        }
        self.prompt_tokens = metrics.prompt_tokens.labels(model)
        self.generation_tokens = metrics.generation_tokens.labels(model)
        self.in_flight = metrics.in_flight.labels(model)
        self.held = metrics.held.labels(model)
        self.time_to_first_token = metrics.time_to_first_token.labels(model)
        self.inter_token = metrics.inter_token.labels(model)
        self.e2e = metrics.e2e.labels(model)
        self.queue_time = metrics.queue_time.labels(model)


class Metrics:
    """All series of one router. `sample` tells of the replicas whenever somebody scrapes."""

    def __init__(self, sample: Callable[[], Iterable[ReplicaSample]]) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self._registry = CollectorRegistry(auto_describe=False)
        model = (signals.LABEL_MODEL,)
        by_finish = (signals.LABEL_MODEL, signals.LABEL_OPERATION, signals.LABEL_FINISH)
        into: Any = {"registry": self._registry}
        self.requests = Counter(signals.REQUESTS, "Requests by how they ended.", by_finish, **into)
        self.prompt_tokens = Counter(signals.PROMPT_TOKENS, "Tokens of accepted prompts.", model, **into)
        self.generation_tokens = Counter(signals.GENERATION_TOKENS, "Tokens that engines wrote.", model, **into)
        self.in_flight = Gauge(signals.REQUESTS_IN_FLIGHT, "Requests accepted and not yet ended.", model, **into)
        self.held = Gauge(
            signals.REQUESTS_HELD, "Requests that wait for a replica to become ready.", model, **into
        )

        def histogram(name: str, help_text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(name, help_text, model, buckets=buckets, **into)

        self.time_to_first_token = histogram(
            signals.TIME_TO_FIRST_TOKEN, "From the request's arrival to its first token.", signals.TTFT_BUCKETS
        )
        self.inter_token = histogram(
            signals.INTER_TOKEN_LATENCY, "Between two tokens of one sequence.", signals.ITL_BUCKETS
        )
        self.e2e = histogram(
            signals.E2E_LATENCY, "From the request's arrival to its end.", signals.LATENCY_BUCKETS
        )
        self.queue_time = histogram(
            signals.QUEUE_TIME, "From the engine's receipt to the first step.", signals.LATENCY_BUCKETS
        )
        self._registry.register(_Replicas(sample))
        self._models: dict[str, ModelMetrics] = {}
        self.set_models(())

    def set_models(self, models: Iterable[str]) -> None:
        """Make the series of these models exist, and drop those of models that are no longer routed."""
        wanted = {NO_MODEL, *models}
        for gone in self._models.keys() - wanted:
            del self._models[gone]
            for operation, finish in ((o, f) for o in OPERATIONS for f in FINISHES):
                self.requests.remove(gone, operation, finish)
            for family in (
                self.prompt_tokens,
                self.generation_tokens,
                self.in_flight,
                self.held,
                self.time_to_first_token,
                self.inter_token,
                self.e2e,
                self.queue_time,
            ):
                family.remove(gone)
        for name in wanted - self._models.keys():
            self._models[name] = ModelMetrics(self, name)

    def model(self, name: str | None) -> ModelMetrics:
        """The handles of a model; those of `NO_MODEL` for one that is not routed."""
        return self._models.get(name or NO_MODEL, self._models[NO_MODEL])

    def render(self) -> bytes:
        """All series in Prometheus' text format."""
        return generate_latest(self._registry)


class _Replicas(Collector):
    """Series read from the replicas at the moment of the scrape."""

    def __init__(self, sample: Callable[[], Iterable[ReplicaSample]]) -> None:
        self._sample = sample

    def collect(self) -> Iterator[Metric]:
        labels = [signals.LABEL_MODEL, signals.LABEL_REPLICA]
        up = GaugeMetricFamily(signals.REPLICA_UP, "1: connected, and making progress.", labels=labels)
        running = GaugeMetricFamily(
            signals.NUM_REQUESTS_RUNNING, "Sequences in the engine's batch.", labels=labels
        )
        waiting = GaugeMetricFamily(
            signals.NUM_REQUESTS_WAITING, "Sequences in the engine's queue.", labels=labels
        )
        usage = GaugeMetricFamily(signals.KV_CACHE_USAGE, "Allocated KV blocks, of all.", labels=labels)
        preemptions = CounterMetricFamily(
            signals.PREEMPTIONS, "Sequences put back for want of blocks.", labels=labels
        )
        steps = CounterMetricFamily(signals.ENGINE_STEPS, "Steps the engine has made.", labels=labels)
        for replica in self._sample():
            key = [replica.model, replica.replica]
            stats = replica.stats
            up.add_metric(key, float(replica.up))
            running.add_metric(key, stats.running if stats else 0)
            waiting.add_metric(key, stats.waiting if stats else 0)
            usage.add_metric(key, stats.blocks_used / stats.blocks_total if stats and stats.blocks_total else 0)
            preemptions.add_metric(key, stats.preemptions if stats else 0)
            steps.add_metric(key, stats.steps if stats else 0)
        yield from (up, running, waiting, usage, preemptions, steps)


# ── traces ────────────────────────────────────────────────────────────────────────────────────────────────

_TRACEPARENT: Final = re.compile(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")
_propagator: Final = TraceContextTextMapPropagator()


class RequestSpan:
    """The span of one request; an empty one when nothing is exported."""

    __slots__ = ("_span", "traceparent")

    def __init__(self, span: trace.Span | None, traceparent: str | None) -> None:
        self._span = span
        self.traceparent = traceparent
        """For the engine: this span, or what the client sent when there is none."""

    def set(self, attributes: Mapping[str, Any]) -> None:
        if self._span is not None:
            self._span.set_attributes({key: value for key, value in attributes.items() if value is not None})

    def end(self, error_code: str | None) -> None:
        """Close the span. `error_code` is the word of the error contract, None for success."""
        if self._span is None:
            return
        if error_code is not None:
            self._span.set_attribute(signals.ERROR_TYPE, error_code)
            self._span.set_status(trace.StatusCode.ERROR)
        self._span.end()


class Tracing:
    """Makes request spans, if an exporter is configured."""

    def __init__(self, provider: TracerProvider | None) -> None:
        self._provider = provider
        self._tracer = provider.get_tracer("quire.router") if provider is not None else None

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Tracing:
        """Honours OTEL_SDK_DISABLED, OTEL_TRACES_EXPORTER and endpoints; the SDK reads the other OTEL_* itself.

        Raises `BadTelemetry` for an exporter that is not installed.
        """
        names = [name.strip() for name in environment.get("OTEL_TRACES_EXPORTER", "").split(",") if name.strip()]
        if not names and any(environment.get(f"OTEL_EXPORTER_OTLP{which}_ENDPOINT") for which in ("", "_TRACES")):
            names = ["otlp"]
        if environment.get("OTEL_SDK_DISABLED", "").lower() == "true" or names in ([], ["none"]):
            return cls(None)
        protocol = environment.get("OTEL_EXPORTER_OTLP_PROTOCOL", "http/protobuf")
        resource = Resource.create()
        if not (
            environment.get("OTEL_SERVICE_NAME")
            or "service.name=" in environment.get("OTEL_RESOURCE_ATTRIBUTES", "")
        ):
            resource = resource.merge(Resource({SERVICE_NAME: signals.SERVICE_NAME}))
        provider = TracerProvider(resource=resource)
        for name in names:
            if name == "otlp":
                name = "otlp_proto_grpc" if protocol == "grpc" else "otlp_proto_http"
            found = entry_points(group="opentelemetry_traces_exporter", name=name)
            if not found:
                raise BadTelemetry(
                    f"the trace exporter '{name}' that OTEL_* asks for is not installed\n"
                    f"    hint: pip install opentelemetry-exporter-{name.replace('_', '-')}, or unset OTEL_*"
                )
            provider.add_span_processor(BatchSpanProcessor(next(iter(found)).load()()))
        return cls(provider)

    def start(self, operation: str, traceparent: str | None) -> RequestSpan:
        """A span for one request, below the client's own when it sent a proper `traceparent`."""
        if traceparent is not None and not _TRACEPARENT.fullmatch(traceparent):
            traceparent = None
        if self._tracer is None:
            return RequestSpan(None, traceparent)
        parent = _propagator.extract({"traceparent": traceparent} if traceparent else {})
        span = self._tracer.start_span(operation, context=parent, kind=trace.SpanKind.SERVER)
        carrier: dict[str, str] = {}
        _propagator.inject(carrier, context=trace.set_span_in_context(span))
        return RequestSpan(span, carrier.get("traceparent"))

    def shutdown(self) -> None:
        """Export what is left."""
        if self._provider is not None:
            self._provider.shutdown()
