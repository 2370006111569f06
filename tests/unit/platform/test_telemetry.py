"""Spans are made when an exporter is configured, with the client's trace above them; otherwise nothing is paid."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from quire.telemetry import BadTelemetry, Tracing

TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def test_without_an_exporter_the_trace_is_handed_on_unchanged() -> None:
    for environment in (
        {},
        {"OTEL_TRACES_EXPORTER": "none"},
        {"OTEL_SDK_DISABLED": "true", "OTEL_TRACES_EXPORTER": "x"},
    ):
        span = Tracing.from_environment(environment).start("chat", TRACE)
        assert span.traceparent == TRACE
        span.set({"a": 1})
        span.end(None)


@pytest.mark.parametrize("stated", ["", "garbage", TRACE + "\r\nx: y", TRACE.upper()])
def test_a_trace_that_is_none_is_dropped(stated: str) -> None:
    assert Tracing.from_environment({}).start("chat", stated).traceparent is None


def test_an_exporter_that_is_not_installed_is_an_error_with_a_hint() -> None:
    with pytest.raises(BadTelemetry, match="hint: pip install"):
        Tracing.from_environment({"OTEL_TRACES_EXPORTER": "carrier-pigeon"})
    with pytest.raises(BadTelemetry, match="otlp"):
        Tracing.from_environment({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://localhost:4318"})


def test_the_console_exporter_shows_the_span_with_its_parent_and_attributes() -> None:
    code = (
        "from quire.telemetry import Tracing\n"
        "t = Tracing.from_environment()\n"
        f"s = t.start('chat', '{TRACE}')\n"
        "assert s.traceparent and s.traceparent[3:35] == '0af7651916cd43dd8448eb211c80319c'\n"
        f"assert s.traceparent != '{TRACE}'\n"
        "s.set({'gen_ai.request.model': 'tiny', 'absent': None})\n"
        "s.end('engine_died')\n"
        "t.shutdown()\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env={**os.environ, "OTEL_TRACES_EXPORTER": "console", "OTEL_RESOURCE_ATTRIBUTES": "team=x"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    for word in (
        '"name": "chat"',
        "0xb7ad6b7169203331",
        '"gen_ai.request.model": "tiny"',
        '"engine_died"',
        "quire-router",
    ):
        assert word in done.stdout, (word, done.stdout)
