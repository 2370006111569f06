"""Traces of one process: the OpenTelemetry SDK, set up from the standard OTEL_* variables, and kept harmless. What
sets up metrics, too (`quire.metering`), is here as well. The control plane and the command have this in their own
process; the router's requests are too many for that, and it has a child that tells for it (`quire.teller`).

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
from dataclasses import dataclass, field
from importlib.metadata import entry_points, version
from typing import TYPE_CHECKING, Any, Final, Literal

from quire_schemas import signals

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
    from opentelemetry.trace import Tracer

log = logging.getLogger("quire.tracing")

SHUTDOWN_SECONDS: Final = 1.0
COMPLAIN_SECONDS: Final = 60.0
"""A collector that comes and goes is reported at most this often."""
Sampling = Literal["always", "errors", "never"]
Lost = Literal["queue_full", "export_failed"]
Kind = Literal["traces", "metrics"]


class BadTelemetry(Exception):
    """The environment asks for traces in a way that cannot be done."""


@dataclass(frozen=True, slots=True)
class Declared:
    """What a manifest says about traces; it goes before the environment."""

    otlp_endpoint: str | None = None
    """Base URL of a collector; spans go to its /v1/traces."""
    sampling: Sampling = "always"
    metrics: Literal["always", "never"] = "always"
    """Whether metrics go to its /v1/metrics."""


@dataclass(slots=True)
class Counts:
    """What became of this process's spans."""

    exported: int = 0
    queue_full: int = 0
    export_failed: int = 0
    changed: Callable[[], None] = field(default=lambda: None)
    """Called, on whatever thread, when there is more."""

    def dropped(self) -> dict[Lost, int]:
        return {"queue_full": self.queue_full, "export_failed": self.export_failed}


def exporters(environment: Mapping[str, str], kind: Kind = "traces") -> list[str]:
    """Names of the exporters that OTEL_* ask for, OTLP with its protocol; empty when that kind is off."""
    if disabled(environment):
        return []
    asked = environment.get(f"OTEL_{kind.upper()}_EXPORTER", "")
    names = [name.strip() for name in asked.split(",") if name.strip()]
    if not names and any(
        environment.get(f"OTEL_EXPORTER_OTLP{which}_ENDPOINT") for which in ("", f"_{kind.upper()}")
    ):
        names = ["otlp"]
    return [] if names == ["none"] else [otlp(environment, kind) if name == "otlp" else name for name in names]


def wanted(environment: Mapping[str, str], declared: Declared | None, kind: Kind = "traces") -> list[str]:
    """Names of the exporters that there are to be, as declared, else as OTEL_* say; empty when that kind is off.
    The SDK is disabled whatever is declared."""
    if disabled(environment):
        return []
    names = exporters(environment, kind)
    if declared is not None:
        if (declared.sampling if kind == "traces" else declared.metrics) == "never":
            return []
        if declared.otlp_endpoint is not None or not names:
            return [otlp(environment, kind)]
    return names


def disabled(environment: Mapping[str, str]) -> bool:
    """Whether the SDK does nothing, whatever is asked for."""
    return environment.get("OTEL_SDK_DISABLED", "").strip().lower() == "true"


def otlp(environment: Mapping[str, str], kind: Kind = "traces") -> str:
    """The name of the exporter that speaks OTLP by the protocol that OTEL_* ask for."""
    for name in (f"OTEL_EXPORTER_OTLP_{kind.upper()}_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL"):
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
        self.gates: list[SpanProcessor] = []
        """One for each exporter: where spans go that have ended."""

    @classmethod
    def set_up(
        cls,
        service: str,
        environment: Mapping[str, str] = os.environ,
        declared: Declared | None = None,
        pid: int | None = None,
    ) -> Tracing:
        """Traces of the process `service`, which is this one unless another `pid` is given, as declared, else as
        OTEL_* say; none where the SDK is disabled. Raises `BadTelemetry`.

        What the SDK reads itself (sampler, limits, resource, the exporter's own settings) comes from `os.environ`.
        """
        names = wanted(environment, declared)
        if not names:
            return cls()
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.sampling import DEFAULT_ON

        provider = TracerProvider(
            sampler=DEFAULT_ON if declared is not None else None,
            resource=resource(service, pid),
            shutdown_on_exit=False,
        )
        tracing = cls(provider, Counts())
        endpoint = declared.otlp_endpoint if declared is not None else None
        for name in names:
            gate = _gate(load_exporter(name, endpoint), environment, tracing.counts)
            provider.add_span_processor(gate)
            tracing.gates.append(gate)
        return tracing

    def tracer(self, name: str) -> Tracer | None:
        return self.provider.get_tracer(name) if self.provider is not None else None

    def shutdown(self) -> None:
        """Export what is left, but wait no longer than `SHUTDOWN_SECONDS` for it."""
        shut_down(self.provider)


def shut_down(*providers: Any) -> None:
    """Have providers export what is left, all at once, but wait no longer than `SHUTDOWN_SECONDS` for it."""
    ends_at = time.monotonic() + SHUTDOWN_SECONDS
    last = [
        threading.Thread(target=provider.shutdown, name="last words", daemon=True)
        for provider in providers
        if provider is not None
    ]
    for thread in last:
        thread.start()
    for thread in last:
        thread.join(max(ends_at - time.monotonic(), 0.0))


def resource(service: str, pid: int | None = None) -> Any:
    """What this process, or the one with that number, is, as the SDK tells it."""
    from opentelemetry.sdk.resources import Resource

    own: dict[str, str | int] = {
        signals.SERVICE_NAME: service,
        signals.SERVICE_VERSION: version("quire"),
        signals.PROCESS_PID: os.getpid() if pid is None else pid,
    }
    said = Resource.create()  # from OTEL_RESOURCE_ATTRIBUTES and OTEL_SERVICE_NAME, which win over ours
    if str(said.attributes.get(signals.SERVICE_NAME)).startswith("unknown_service"):
        said = Resource({k: v for k, v in said.attributes.items() if k != signals.SERVICE_NAME})
    return Resource(own).merge(said)


def load_exporter(name: str, endpoint: str | None, kind: Kind = "traces") -> Any:
    """The installed exporter of that name, to `endpoint` if one is declared, and quiet. Raises `BadTelemetry`."""
    found = entry_points(group=f"opentelemetry_{kind}_exporter", name=name)
    if not found:
        what = re.sub(r"[^a-z0-9]+", "-", name.lower())
        raise BadTelemetry(
            f"the {kind} exporter '{name}' that OTEL_* ask for is not installed\n"
            f"    hint: pip install opentelemetry-exporter-{what}, or OTEL_EXPORTER_OTLP_PROTOCOL=http/protobuf, "
            f"which needs nothing more; OTEL_{kind.upper()}_EXPORTER=none to do without {kind}"
        )
    make = next(iter(found)).load()
    # OTEL_*_HEADERS with a wrong entry and the like are the library's to report, once, while it is set up.
    exporter = make() if endpoint is None else make(endpoint=_signal_url(name, endpoint, kind))
    quiet = logging.getLogger("opentelemetry.exporter")
    quiet.propagate = False
    quiet.handlers = [_last_words]
    return exporter


def _signal_url(name: str, endpoint: str, kind: Kind) -> str:
    return f"{endpoint.rstrip('/')}/v1/{kind}" if name == "otlp_proto_http" else endpoint


def _gate(exporter: Any, environment: Mapping[str, str], counts: Counts) -> Any:
    """`exporter` behind its queue. The classes are made here because their bases are imported only when needed."""
    from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor
    from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult

    lock = threading.Lock()
    waiting = 0
    health = Health("traces", "spans")

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
            counts.changed()
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
                full = waiting >= capacity
                if full:
                    counts.queue_full += 1
                else:
                    waiting += 1
            if full:
                counts.changed()
            else:
                self._batches.on_end(span)

        def shutdown(self) -> None:
            self._batches.shutdown()  # type: ignore[no-untyped-call]

        def force_flush(self, timeout_millis: int = 30000) -> bool:
            return self._batches.force_flush(timeout_millis)

    try:
        capacity = room(environment)
        return Gate()
    except ValueError as error:
        raise BadTelemetry(
            f"the queue for traces cannot be made: {error}\n"
            "    hint: OTEL_BSP_MAX_QUEUE_SIZE and OTEL_BSP_MAX_EXPORT_BATCH_SIZE are positive numbers, "
            "the second at most the first"
        ) from error


def room(environment: Mapping[str, str]) -> int:
    """How many spans may wait, those at the exporter included. Raises `ValueError`."""
    return int(environment.get("OTEL_BSP_MAX_QUEUE_SIZE", "").strip() or "2048")


class Health:
    """Says that an exporter fails, and that it works again: once each, however many batches that takes."""

    def __init__(
        self, what: str, of: str, clock: Callable[[], float] = time.monotonic, *, keeps: bool = False
    ) -> None:
        """`what` is exported, and `of` what it consists. `keeps`: what fails goes with the next."""
        self._keeps = keeps
        self._what = what
        self._of = of
        self._clock = clock
        self._failing = False
        self._lost = 0
        self._said_at = float("-inf")

    def heard(self, good: bool, count: int, words: str) -> None:
        """A batch of so many was exported, or was lost for the reason `words`, else the library's last."""
        if not good:
            self._lost += count
            if not self._failing and self._clock() - self._said_at >= COMPLAIN_SECONDS:
                self._failing, self._said_at = True, self._clock()
                log.warning(
                    "%s cannot be exported and %s until that works again: %s",
                    self._what,
                    "wait" if self._keeps else "are dropped",
                    words or _last_words.text or "no reason given",
                )
        elif self._failing:
            self._failing = False
            told = "went with this one" if self._keeps else "were lost"
            log.info("%s are exported again; %d %s %s", self._what, self._lost, self._of, told)
            self._lost = 0


class _LastWords(logging.Handler):
    """Remembers the last line that the exporter's library would have logged on this thread: traces and metrics
    have one each, and may fail at once."""

    def __init__(self) -> None:
        super().__init__()
        self._said = threading.local()

    @property
    def text(self) -> str:
        return getattr(self._said, "text", "")

    def emit(self, record: logging.LogRecord) -> None:
        self._said.text = " ".join(record.getMessage().split())[:300]


_last_words: Final = _LastWords()
