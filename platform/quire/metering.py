"""Metrics of requests for a collector: the GenAI instruments of OpenTelemetry's conventions, sent over OTLP.

They are for who collects everything in one place; `/metrics` has more and needs no collector. Set up beside the
traces (`quire.tracing`) from the same variables and the same section of the gateway's manifest, by the child that
tells for the router (`quire.teller`), and under the same two rules:

**Off costs nothing.** Without an exporter nothing of OpenTelemetry's metrics is imported, and a request costs one
look at whether it is to be measured.

**A collector that is gone costs nothing.** A request adds to sums that are there anyhow, one for each combination
of operation, model and error, which all come from closed sets. A thread of the SDK sends them from time to time
(OTEL_METRIC_EXPORT_INTERVAL); what it cannot send goes with the next ones, since the sums only grow (where
OTEL_EXPORTER_OTLP_METRICS_TEMPORALITY_PREFERENCE asks for deltas they begin anew, and it is lost). That it fails
is said once, and once that it works again.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from quire.tracing import BadTelemetry, Declared, Health, load_exporter, resource, wanted
from quire_schemas import signals

if TYPE_CHECKING:
    from opentelemetry.sdk.metrics import MeterProvider

    from quire_schemas.telling import Measure


class Metering:
    """Where measures of requests go. Without a provider they go nowhere."""

    def __init__(self, provider: MeterProvider | None = None) -> None:
        self.provider = provider
        if provider is None:
            return
        meter = provider.get_meter("quire.router")

        def histogram(name: str, unit: str, text: str, bounds: tuple[float, ...]) -> Any:
            return meter.create_histogram(name, unit, text, explicit_bucket_boundaries_advisory=list(bounds))

        self._duration = histogram(
            signals.METER_REQUEST_DURATION,
            "s",
            "From a request's arrival to its end.",
            signals.METER_DURATION_BUCKETS,
        )
        self._first_token = histogram(
            signals.METER_FIRST_TOKEN,
            "s",
            "From a request's arrival to its first token.",
            signals.METER_TTFT_BUCKETS,
        )
        self._per_token = histogram(
            signals.METER_PER_TOKEN, "s", "For each token behind the first.", signals.METER_TPOT_BUCKETS
        )
        self._tokens = histogram(
            signals.METER_TOKENS, "{token}", "Tokens of prompts and answers.", signals.METER_TOKENS_BUCKETS
        )

    @classmethod
    def set_up(
        cls,
        service: str,
        environment: Mapping[str, str] = os.environ,
        declared: Declared | None = None,
        pid: int | None = None,
    ) -> Metering:
        """Metrics of the process `service`, which is this one unless another `pid` is given, as declared, else as
        OTEL_* say; none where the SDK is disabled. Raises `BadTelemetry`.

        What the SDK reads itself (interval, temporality, resource, the exporter's own settings) comes from
        `os.environ`.
        """
        names = wanted(environment, declared, "metrics")
        if not names:
            return cls()
        from opentelemetry.sdk.metrics import AlwaysOffExemplarFilter, MeterProvider
        from opentelemetry.sdk.metrics.export import MetricExporter, PeriodicExportingMetricReader

        readers = []
        for name in names:
            exporter = load_exporter(name, declared.otlp_endpoint if declared is not None else None, "metrics")
            if not isinstance(exporter, MetricExporter):
                raise BadTelemetry(
                    f"the metrics exporter '{name}' that OTEL_* ask for does not send metrics anywhere\n"
                    "    hint: OTEL_METRICS_EXPORTER=otlp sends them to a collector; Prometheus scrapes /metrics"
                )
            try:
                readers.append(PeriodicExportingMetricReader(_watched(exporter)))
            except ValueError as error:
                raise BadTelemetry(
                    f"metrics cannot be sent from time to time: {error}\n"
                    "    hint: OTEL_METRIC_EXPORT_INTERVAL and OTEL_METRIC_EXPORT_TIMEOUT are positive numbers"
                ) from error
        provider = MeterProvider(
            readers,
            resource=resource(service, pid),
            exemplar_filter=AlwaysOffExemplarFilter(),  # looked for at each value, and no span is current here
            shutdown_on_exit=False,
        )
        return cls(provider)

    def tell(self, measure: Measure) -> None:
        """A request has ended. One for a model that nobody serves has no model, so that models are few."""
        if self.provider is None:
            return
        about: dict[str, str] = {
            signals.GEN_AI_OPERATION: measure.operation,
            signals.GEN_AI_PROVIDER: signals.PROVIDER,
        }
        if measure.model:
            about[signals.GEN_AI_REQUEST_MODEL] = measure.asked
            about[signals.GEN_AI_RESPONSE_MODEL] = measure.model
        for kind, count in (("input", measure.prompt_tokens), ("output", measure.completion_tokens)):
            if count is not None:
                self._tokens.record(count, {**about, signals.GEN_AI_TOKEN_TYPE: kind})
        if measure.background:  # nobody waited
            return
        if measure.first_token is not None:
            self._first_token.record(measure.first_token, about)
        if measure.writing is not None and (measure.completion_tokens or 0) > 1 and not measure.error:
            self._per_token.record(measure.writing / ((measure.completion_tokens or 0) - 1), about)
        ended = {**about, signals.ERROR_TYPE: measure.error} if measure.error else about
        self._duration.record(measure.total, ended)


def _watched(exporter: Any) -> Any:
    """`exporter`, whose failures are heard of once. The class is made here because its base is imported late."""
    from opentelemetry.sdk.metrics.export import (
        AggregationTemporality,
        MetricExporter,
        MetricExportResult,
        MetricsData,
    )

    deltas = AggregationTemporality.DELTA in (exporter._preferred_temporality or {}).values()
    health = Health("metrics", "exports", keeps=not deltas)

    class Watched(MetricExporter):
        def __init__(self) -> None:
            super().__init__(exporter._preferred_temporality, exporter._preferred_aggregation)

        def export(
            self, metrics_data: MetricsData, timeout_millis: float = 10_000, **kwargs: Any
        ) -> MetricExportResult:
            result = MetricExportResult.FAILURE
            words = ""
            try:
                result = exporter.export(metrics_data, timeout_millis, **kwargs)
            except Exception as error:  # noqa: BLE001 - a library's; it is reported once, and told on
                words = f"{type(error).__name__}: {error}"
            health.heard(result is MetricExportResult.SUCCESS, 1, words)
            return result

        def force_flush(self, timeout_millis: float = 10_000) -> bool:
            return bool(exporter.force_flush(timeout_millis))

        def shutdown(self, timeout_millis: float = 30_000, **kwargs: Any) -> None:
            exporter.shutdown(timeout_millis, **kwargs)

    return Watched()
