"""Traces of one process: the OpenTelemetry SDK, set up from the standard OTEL_* variables, and kept harmless.

**Off costs nothing.** Without an exporter in the environment (`exporters`) nothing of OpenTelemetry is imported.
The specification's default, OTLP to localhost, is not ours: a machine without a collector would pay for nobody.

**A collector that is gone costs nothing.** Ended spans wait for the exporter's thread in a queue of
OTEL_BSP_MAX_QUEUE_SIZE. Whoever ends a span never waits: the gate before that queue lets in no more than fit,
those at the exporter included, and counts the others as dropped; so the SDK's own queue never overflows, and never
logs. A meter around the exporter counts what became of each batch. What the exporter's library logs about a
collector is kept back; that it fails is said once, with the library's last words, and once that it works again.
The end of the process waits at most `SHUTDOWN_SECONDS` for what is left.

    BadTelemetry      OTEL_* ask for an exporter that is not installed, or for a value that makes no sense
"""

from __future__ import annotations

import logging
import os
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points, version
from typing import TYPE_CHECKING, Any, Final, Literal

from quire_schemas import signals

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Tracer

log = logging.getLogger("quire.tracing")

SHUTDOWN_SECONDS: Final = 1.0
COMPLAIN_SECONDS: Final = 60.0
"""A collector that comes and goes is reported at most this often."""
Sampling = Literal["always", "errors", "never"]
Lost = Literal["queue_full", "export_failed"]


class BadTelemetry(Exception):
    """The environment asks for traces in a way that cannot be done."""


@dataclass(frozen=True, slots=True)
class Declared:
    """What a manifest says about traces; it goes before the environment."""

    otlp_endpoint: str | None = None
    """Base URL of a collector; spans go to its /v1/traces."""
    sampling: Sampling = "always"


@dataclass(slots=True)
class Counts:
    """What became of this process's spans."""

    exported: int = 0
    queue_full: int = 0
    export_failed: int = 0

    def dropped(self) -> dict[Lost, int]:
        return {"queue_full": self.queue_full, "export_failed": self.export_failed}


def exporters(environment: Mapping[str, str]) -> list[str]:
    """Names of the exporters that OTEL_* ask for, OTLP with its protocol; empty when traces are off."""
    if _disabled(environment):
        return []
    names = [name.strip() for name in environment.get("OTEL_TRACES_EXPORTER", "").split(",") if name.strip()]
    if not names and any(environment.get(f"OTEL_EXPORTER_OTLP{which}_ENDPOINT") for which in ("", "_TRACES")):
        names = ["otlp"]
    return [] if names == ["none"] else [_otlp(environment) if name == "otlp" else name for name in names]


def _disabled(environment: Mapping[str, str]) -> bool:
    return environment.get("OTEL_SDK_DISABLED", "").strip().lower() == "true"


def _otlp(environment: Mapping[str, str]) -> str:
    for name in ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL"):
        protocol = environment.get(name, "").strip()
        if protocol:
            known = {"grpc": "otlp_proto_grpc", "http/protobuf": "otlp_proto_http"}
            return known.get(protocol, f"otlp {protocol}")
    return "otlp_proto_http"


class Tracing:
    """Where a process's spans go. `tracer` is None when they go nowhere."""

    def __init__(self, provider: TracerProvider | None = None, counts: Counts | None = None) -> None:
        self.provider = provider
        self.counts = counts or Counts()
        self.errors_only = False
        """Only requests that failed are to be exported; who makes a request's spans sees to it."""

    @classmethod
    def set_up(
        cls, service: str, environment: Mapping[str, str] = os.environ, declared: Declared | None = None
    ) -> Tracing:
        """Traces of the process `service`, as declared, else as OTEL_* say; none where the SDK is disabled. Raises
        `BadTelemetry`.

        What the SDK reads itself (sampler, limits, resource, the exporter's own settings) comes from `os.environ`.
        """
        if _disabled(environment):  # the SDK obeys it whatever is declared
            if declared is not None and declared.otlp_endpoint is not None:
                log.warning("OTEL_SDK_DISABLED is set: no traces go to %s", declared.otlp_endpoint)
            return cls()
        names = exporters(environment)
        if declared is not None:
            if declared.sampling == "never":
                return cls()
            if declared.otlp_endpoint is not None or not names:
                names = [_otlp(environment)]
        if not names:
            return cls()
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.sampling import DEFAULT_ON

        own: dict[str, str | int] = {
            signals.SERVICE_NAME: service,
            signals.SERVICE_VERSION: version("quire"),
            signals.PROCESS_PID: os.getpid(),
        }
        said = Resource.create()  # from OTEL_RESOURCE_ATTRIBUTES and OTEL_SERVICE_NAME, which win over ours
        if str(said.attributes.get(signals.SERVICE_NAME)).startswith("unknown_service"):
            said = Resource({k: v for k, v in said.attributes.items() if k != signals.SERVICE_NAME})
        provider = TracerProvider(
            sampler=DEFAULT_ON if declared is not None else None,
            resource=Resource(own).merge(said),
            shutdown_on_exit=False,
        )
        tracing = cls(provider, Counts())
        tracing.errors_only = declared is not None and declared.sampling == "errors"
        endpoint = declared.otlp_endpoint if declared is not None else None
        for name in names:
            provider.add_span_processor(_gate(_exporter(name, endpoint), environment, tracing.counts))
        return tracing

    def tracer(self, name: str) -> Tracer | None:
        return self.provider.get_tracer(name) if self.provider is not None else None

    def shutdown(self) -> None:
        """Export what is left, but wait no longer than `SHUTDOWN_SECONDS` for it."""
        if self.provider is None:
            return
        last = threading.Thread(target=self.provider.shutdown, name="last traces", daemon=True)
        last.start()
        last.join(SHUTDOWN_SECONDS)


def _exporter(name: str, endpoint: str | None) -> Any:
    found = entry_points(group="opentelemetry_traces_exporter", name=name)
    if not found:
        what = re.sub(r"[^a-z0-9]+", "-", name.lower())
        raise BadTelemetry(
            f"the trace exporter '{name}' that OTEL_* ask for is not installed\n"
            f"    hint: pip install opentelemetry-exporter-{what}, or OTEL_EXPORTER_OTLP_PROTOCOL=http/protobuf, "
            "which needs nothing more; unset OTEL_* to do without traces"
        )
    make = next(iter(found)).load()
    # OTEL_*_HEADERS with a wrong entry and the like are the library's to report, once, while it is set up.
    exporter = make() if endpoint is None else make(endpoint=_signal_url(name, endpoint))
    quiet = logging.getLogger("opentelemetry.exporter")
    quiet.propagate = False
    quiet.handlers = [_last_words]
    return exporter


def _signal_url(name: str, endpoint: str) -> str:
    return endpoint.rstrip("/") + "/v1/traces" if name == "otlp_proto_http" else endpoint


def _gate(exporter: Any, environment: Mapping[str, str], counts: Counts) -> Any:
    """`exporter` behind its queue. The classes are made here because their bases are imported only when needed."""
    from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor
    from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult

    lock = threading.Lock()
    waiting = 0
    health = _Health()

    class Meter(SpanExporter):
        """Counts what becomes of each batch."""

        def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
            nonlocal waiting
            result = SpanExportResult.FAILURE
            words = ""
            try:
                result = exporter.export(spans)
            except Exception as error:  # noqa: BLE001 - a library's; it is counted, reported once, and told on
                words = f"{type(error).__name__}: {error}"
            good = result is SpanExportResult.SUCCESS
            with lock:
                waiting -= len(spans)
                if good:
                    counts.exported += len(spans)
                else:
                    counts.export_failed += len(spans)
            health.heard(good, len(spans), words)
            return result

        def shutdown(self) -> None:
            exporter.shutdown()

    class Gate(SpanProcessor):
        """Never lets more spans wait than the queue holds."""

        def __init__(self) -> None:
            self._batches = BatchSpanProcessor(Meter(), max_queue_size=capacity)

        def on_end(self, span: ReadableSpan) -> None:
            nonlocal waiting
            context = span.get_span_context()
            if context is None or not context.trace_flags.sampled:
                return
            with lock:
                if waiting >= capacity:
                    counts.queue_full += 1
                    return
                waiting += 1
            self._batches.on_end(span)

        def shutdown(self) -> None:
            self._batches.shutdown()  # type: ignore[no-untyped-call]

        def force_flush(self, timeout_millis: int = 30000) -> bool:
            return self._batches.force_flush(timeout_millis)

    said = environment.get("OTEL_BSP_MAX_QUEUE_SIZE", "").strip() or "2048"
    try:
        capacity = int(said)
        return Gate()
    except ValueError as error:
        raise BadTelemetry(
            f"the queue for traces cannot be made: {error}\n"
            "    hint: OTEL_BSP_MAX_QUEUE_SIZE and OTEL_BSP_MAX_EXPORT_BATCH_SIZE are positive numbers, "
            "the second at most the first"
        ) from error


class _Health:
    """Says that an exporter fails, and that it works again: once each, however many batches that takes."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._failing = False
        self._lost = 0
        self._said_at = float("-inf")

    def heard(self, good: bool, spans: int, words: str) -> None:
        """A batch of `spans` was exported, or was lost for the reason `words`, else the library's last."""
        if not good:
            self._lost += spans
            if not self._failing and self._clock() - self._said_at >= COMPLAIN_SECONDS:
                self._failing, self._said_at = True, self._clock()
                log.warning(
                    "traces cannot be exported and are dropped until that works again: %s",
                    words or _last_words.text or "no reason given",
                )
        elif self._failing:
            self._failing = False
            log.info("traces are exported again; %d spans were lost", self._lost)
            self._lost = 0


class _LastWords(logging.Handler):
    """Remembers the last line that the exporter's library would have logged."""

    text = ""

    def emit(self, record: logging.LogRecord) -> None:
        self.text = " ".join(record.getMessage().split())[:300]


_last_words: Final = _LastWords()
