"""A collector of traces and metrics: OTLP over HTTP on a real socket, bodies read by the protocol's own classes.

It does what a collector on a bad day does: refuse, answer with an error, or take a connection and never answer.
"""

from __future__ import annotations

import gzip
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal

from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (
    ExportMetricsServiceRequest,
    ExportMetricsServiceResponse,
)
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)


@dataclass(frozen=True)
class Span:
    """One span as it arrived. Ids are hex; times nanoseconds since 1970; `events` (name, time, attributes)."""

    name: str
    kind: int
    trace_id: str
    span_id: str
    parent_id: str
    trace_state: str
    start: int
    end: int
    failed: bool
    attributes: dict[str, Any]
    events: list[tuple[str, int, dict[str, Any]]]
    links: list[tuple[str, str]]
    service: str
    scope: str


@dataclass(frozen=True)
class Measure:
    """One histogram as it arrived: how often, and the sum, by its attributes."""

    unit: str
    bounds: tuple[float, ...]
    points: dict[frozenset[tuple[str, Any]], tuple[int, float]]

    def count(self, **attributes: Any) -> int:
        """Values with these attributes; dots are written as two underscores."""
        wanted = {(name.replace("__", "."), value) for name, value in attributes.items()}
        return sum(count for about, (count, _) in self.points.items() if wanted <= about)

    def total(self, **attributes: Any) -> float:
        wanted = {(name.replace("__", "."), value) for name, value in attributes.items()}
        return sum(total for about, (_, total) in self.points.items() if wanted <= about)


@dataclass
class Collector:
    """Listens on a free port while it is entered. `raw` keeps every body for a search of its bytes."""

    manner: Literal["takes", "refuses", "hangs"] = "takes"
    spans: list[Span] = field(default_factory=list)
    measures: dict[str, Measure] = field(default_factory=dict)
    """As last sent, by name."""
    raw: list[bytes] = field(default_factory=list)
    _server: ThreadingHTTPServer | None = None
    _released: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> Collector:
        collector = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                if collector.manner == "hangs":
                    collector._released.wait(60)
                    return
                if collector.manner == "refuses":
                    self.send_response(400)
                    self.send_header("content-length", "0")
                    self.end_headers()
                    return
                if self.headers.get("content-encoding") == "gzip":
                    body = gzip.decompress(body)
                assert self.headers["content-type"] == "application/x-protobuf"
                collector.raw.append(body)
                if self.path == "/v1/metrics":
                    collector.measures.update(_measured(body))
                    answer = ExportMetricsServiceResponse().SerializeToString()
                else:
                    assert self.path == "/v1/traces"
                    collector.spans += _read(body)
                    answer = ExportTraceServiceResponse().SerializeToString()
                self.send_response(200)
                self.send_header("content-type", "application/x-protobuf")
                self.send_header("content-length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            def log_message(self, *_: object) -> None:
                return

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        assert self._server is not None
        self._released.set()
        self._server.shutdown()
        self._server.server_close()

    @property
    def url(self) -> str:
        assert self._server is not None
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def environment(self) -> dict[str, str]:
        """What sends a process's spans here, soon after they end, and its metrics, often."""
        return {
            "OTEL_EXPORTER_OTLP_ENDPOINT": self.url,
            "OTEL_BSP_SCHEDULE_DELAY": "50",
            "OTEL_METRIC_EXPORT_INTERVAL": "200",
        }

    def wait(self, found: Callable[[list[Span]], Any], seconds: float = 30.0) -> Any:
        """The first true answer of `found` about what has arrived."""
        end = time.monotonic() + seconds
        while True:
            answer = found(list(self.spans))
            if answer:
                return answer
            if time.monotonic() > end:
                names = sorted(f"{span.service} {span.name} {span.attributes}" for span in self.spans)
                raise AssertionError("it did not arrive; what did:\n" + "\n".join(names))
            time.sleep(0.02)

    def below(self, span: Span) -> list[Span]:
        """The spans whose parent `span` is, in order of their starts."""
        return sorted((s for s in self.spans if s.parent_id == span.span_id), key=lambda s: (s.start, s.end))


def _read(body: bytes) -> Iterable[Span]:
    request = ExportTraceServiceRequest.FromString(body)
    for resource in request.resource_spans:
        service = _attributes(resource.resource.attributes)["service.name"]
        for scope in resource.scope_spans:
            for span in scope.spans:
                yield Span(
                    name=span.name,
                    kind=span.kind,
                    trace_id=span.trace_id.hex(),
                    span_id=span.span_id.hex(),
                    parent_id=span.parent_span_id.hex(),
                    trace_state=span.trace_state,
                    start=span.start_time_unix_nano,
                    end=span.end_time_unix_nano,
                    failed=span.status.code == 2,
                    attributes=_attributes(span.attributes),
                    events=[(e.name, e.time_unix_nano, _attributes(e.attributes)) for e in span.events],
                    links=[(link.trace_id.hex(), link.span_id.hex()) for link in span.links],
                    service=service,
                    scope=scope.scope.name,
                )


def _measured(body: bytes) -> dict[str, Measure]:
    request = ExportMetricsServiceRequest.FromString(body)
    found = {}
    for of_resource in request.resource_metrics:
        assert _attributes(of_resource.resource.attributes)["service.name"] == "quire-router"
        for scope in of_resource.scope_metrics:
            for metric in scope.metrics:
                points = metric.histogram.data_points
                found[metric.name] = Measure(
                    metric.unit,
                    tuple(points[0].explicit_bounds),
                    {
                        frozenset(_attributes(point.attributes).items()): (point.count, point.sum)
                        for point in points
                    },
                )
    return found


def _attributes(pairs: Iterable[Any]) -> dict[str, Any]:
    return {pair.key: _value(pair.value) for pair in pairs}


def _value(value: Any) -> Any:
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return [_value(item) for item in value.array_value.values]
    return getattr(value, kind)
