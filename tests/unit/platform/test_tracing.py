"""Tracing is set up by OTEL_* or a manifest, costs nothing without, and puts engines' times where they belong."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.context import Context
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, ALWAYS_ON, Decision, ParentBased, TraceIdRatioBased
from opentelemetry.trace import NonRecordingSpan, SpanContext, TraceFlags, set_span_in_context

from quire.metering import Metering
from quire.phases import engine_offset
from quire.router.account import Account
from quire.router.line import version
from quire.router.spans import RequestSpans
from quire.router.telling import GATHER_SECONDS, Sampler, Teller
from quire.teller import Writer
from quire.tracing import COMPLAIN_SECONDS, BadTelemetry, Counts, Declared, Health, Tracing, exporters, shut_down
from quire_schemas import telling
from quire_schemas.wire import Timings

TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
ENDPOINT = "http://localhost:4318"


class Here:
    """Tells of traces within this process, but through the same bytes as a child is told."""

    def __init__(self, sampler: Sampler | None = None, *, errors_only: bool = False) -> None:
        self.sampler: Sampler | None = sampler or Sampler()
        self.errors_only = errors_only
        self.kept = InMemorySpanExporter()
        self._writer = Writer(Resource({}), [SimpleSpanProcessor(self.kept)])

    def trace(self, told: telling.Trace) -> None:
        self._writer.write(msgspec.msgpack.decode(msgspec.msgpack.encode(told), type=telling.Trace))

    def measure(self, account: Account) -> None:
        return


def traceparent(*stated: str) -> str | None:
    """What the engine is told when a client sent these and nothing is exported."""
    headers = [(b"traceparent", text.encode()) for text in stated]
    span = RequestSpans(Teller()).start("chat", headers, "/v1/chat/completions", None)
    span.set({"a": 1})
    span.event("b", 1.0)
    span.end(2.0, None, failed=False)
    return span.traceparent


# ── what is asked for ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("environment", "names"),
    [
        ({}, []),
        ({"OTEL_SERVICE_NAME": "x"}, []),
        ({"OTEL_TRACES_EXPORTER": "none"}, []),
        ({"OTEL_SDK_DISABLED": "true", "OTEL_TRACES_EXPORTER": "x"}, []),
        ({"OTEL_TRACES_EXPORTER": "none", "OTEL_EXPORTER_OTLP_ENDPOINT": ENDPOINT}, []),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": ENDPOINT}, ["otlp_proto_http"]),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": ENDPOINT}, ["otlp_proto_http"]),
        ({"OTEL_TRACES_EXPORTER": "otlp, console"}, ["otlp_proto_http", "console"]),
        ({"OTEL_TRACES_EXPORTER": "otlp", "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}, ["otlp_proto_grpc"]),
        (
            {
                "OTEL_TRACES_EXPORTER": "otlp",
                "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc",
                "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf",
            },
            ["otlp_proto_http"],
        ),
    ],
)
def test_the_environment_says_which_exporters_there_are(environment: dict[str, str], names: list[str]) -> None:
    assert exporters(environment) == names


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"OTEL_TRACES_EXPORTER": "carrier-pigeon"}, "opentelemetry-exporter-carrier-pigeon"),
        ({"OTEL_TRACES_EXPORTER": "otlp", "OTEL_EXPORTER_OTLP_PROTOCOL": "http/json"}, "http/json"),
        ({"OTEL_TRACES_EXPORTER": "console", "OTEL_BSP_MAX_QUEUE_SIZE": "much"}, "OTEL_BSP_MAX_QUEUE_SIZE"),
        ({"OTEL_TRACES_EXPORTER": "console", "OTEL_BSP_MAX_QUEUE_SIZE": "5"}, "OTEL_BSP_MAX_EXPORT_BATCH_SIZE"),
    ],
)
def test_what_cannot_be_done_is_an_error_with_a_hint(environment: dict[str, str], words: str) -> None:
    with pytest.raises(BadTelemetry, match=f"(?s)hint: .*{words}|{words}.*hint: "):
        Tracing.set_up("quire-router", environment)


def test_a_manifest_goes_before_the_environment() -> None:
    never = Tracing.set_up("x", {"OTEL_EXPORTER_OTLP_ENDPOINT": ENDPOINT}, Declared(sampling="never"))
    assert never.tracer("x") is None
    disabled = Tracing.set_up("x", {"OTEL_SDK_DISABLED": "true"}, Declared("http://127.0.0.1:9", "always"))
    assert disabled.tracer("x") is None, "but for the switch that switches everything off"
    for environment in ({}, {"OTEL_TRACES_EXPORTER": "console"}):
        errors = Declared("http://127.0.0.1:9", "errors")
        declared = Tracing.set_up("x", environment, errors)
        assert declared.tracer("x") is not None
        assert Teller.of(errors, environment).errors_only
        declared.shutdown()


def test_metrics_follow_the_same_rules_and_can_be_left_out() -> None:
    endpoint = {"OTEL_EXPORTER_OTLP_ENDPOINT": ENDPOINT}
    asked: list[tuple[dict[str, str], list[str]]] = [
        ({}, []),
        (endpoint, ["otlp_proto_http"]),
        ({"OTEL_EXPORTER_OTLP_METRICS_ENDPOINT": ENDPOINT}, ["otlp_proto_http"]),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": ENDPOINT}, []),
        ({**endpoint, "OTEL_METRICS_EXPORTER": "none"}, []),
        ({**endpoint, "OTEL_SDK_DISABLED": "true"}, []),
        ({"OTEL_METRICS_EXPORTER": "console"}, ["console"]),
    ]
    for environment, names in asked:
        assert exporters(environment, "metrics") == names
    assert Metering.set_up("x", {}).provider is None
    assert Metering.set_up("x", endpoint, Declared("http://127.0.0.1:9", metrics="never")).provider is None
    assert Metering.set_up("x", {"OTEL_SDK_DISABLED": "true"}, Declared("http://127.0.0.1:9")).provider is None
    declared = Metering.set_up("x", {}, Declared("http://127.0.0.1:9", "never"))
    assert declared.provider is not None, "sampling is of traces"
    shut_down(declared.provider)
    with pytest.raises(
        BadTelemetry, match=r"(?s)opentelemetry-exporter-carrier-pigeon.*OTEL_METRICS_EXPORTER=none"
    ):
        Metering.set_up("x", {"OTEL_METRICS_EXPORTER": "carrier-pigeon"})


def test_off_imports_nothing_of_opentelemetry() -> None:
    code = (
        "import sys, pathlib\n"
        "import quire.router.__main__, quire.controlplane.__main__, quire.cli.change\n"
        "from quire.router.spans import RequestSpans\n"
        "from quire.metering import Metering\n"
        "from quire.router.account import Account\n"
        "from quire.router.telling import Teller\n"
        "from quire.tracing import Tracing\n"
        "assert Tracing.set_up('x').provider is Metering.set_up('x').provider is None\n"
        "spans = RequestSpans(Teller.of())\n"
        "spans.start('chat', [], '/', None).end(1.0, None, failed=False)\n"
        "spans.measure(Account())\n"
        "assert not [name for name in sys.modules if name.startswith('opentelemetry')]\n"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith("OTEL_")}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"OTEL_RESOURCE_ATTRIBUTES": "team=x"}, ['"service.name": "quire-router"', '"team": "x"']),
        ({"OTEL_SERVICE_NAME": "mine"}, ['"service.name": "mine"']),
        ({"OTEL_TRACES_SAMPLER": "always_off"}, []),
    ],
)
def test_the_console_exporter_shows_the_span_as_the_environment_says(
    more: dict[str, str], words: list[str]
) -> None:
    code = (
        "import asyncio, sys\n"
        "from quire.router.spans import RequestSpans\n"
        "from quire.router.telling import Teller\n"
        "async def main():\n"
        "    t = Teller.of(command=[sys.executable, '-W', 'error', '-m', 'quire.teller'])\n"
        "    t.start()\n"
        f"    s = RequestSpans(t).start('chat', [(b'traceparent', b'{TRACE}')], '/v1/chat/completions', None)\n"
        "    assert s.traceparent and s.traceparent[3:35] == '0af7651916cd43dd8448eb211c80319c'\n"
        f"    assert s.traceparent != '{TRACE}'\n"
        "    s.set({'gen_ai.request.model': 'tiny', 'absent': None})\n"
        "    s.end(1e9, 'engine_died', failed=True)\n"
        "    await t.begun()\n"
        "    await t.close()\n"
        "asyncio.run(main())\n"
        "assert not [name for name in sys.modules if name.startswith('opentelemetry')]\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env={**os.environ, "OTEL_TRACES_EXPORTER": "console", **more},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    if "OTEL_TRACES_SAMPLER" in more:
        assert done.stdout == ""
        return
    for word in (
        '"name": "chat"',
        "0xb7ad6b7169203331",
        '"gen_ai.request.model": "tiny"',
        '"engine_died"',
        *words,
    ):
        assert word in done.stdout, (word, done.stdout)


def test_only_failures_are_exported_when_only_they_are_asked_for() -> None:
    here = Here(errors_only=True)
    kept, spans = here.kept, RequestSpans(here)
    for failed in (False, True):
        span = spans.start("chat", [], "/v1/chat/completions", ("127.0.0.1", 8000))
        span.phase("tokenize", 1.0, 2.0)
        span.end(3.0, "queue_full" if not failed else "engine_died", failed=failed)
    assert [span.name for span in kept.get_finished_spans()] == ["tokenize", "chat"]
    assert (kept.get_finished_spans()[1].attributes or {})["error.type"] == "engine_died"


def test_a_preemption_is_an_event_where_it_happened() -> None:
    here = Here()
    kept, span = here.kept, RequestSpans(here).start("chat", [], "/v1/chat/completions", None)
    timings = Timings(10.0, 11.0, 14.0, 20.0, preempted_at=(12.0, 13.0, 15.0))
    span.sequence(telling.Sequence(9.0, 21.0, timings, 5, 3, {"quire.replica.id": "r"}))
    span.end(22.0, None, failed=False)
    found = {each.name: each for each in kept.get_finished_spans()}
    assert list(found) == ["queue", "prefill", "decode", "chat"]
    lengths = {name: (found[name].end_time or 0) - (found[name].start_time or 0) for name in found}
    assert [round(lengths[name] / 1e9) for name in ("queue", "prefill", "decode")] == [1, 3, 6]
    for name, times in (("queue", []), ("prefill", [1, 2]), ("decode", [1])):
        start = found[name].start_time or 0
        assert {event.name for event in found[name].events} <= {"preempted"}
        assert [round((event.timestamp - start) / 1e9) for event in found[name].events] == times


# ── the child that tells ──────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("parent", [None, False, True])
@given(trace_id=st.integers(1, (1 << 128) - 1), share=st.sampled_from(["0", "0.25", "1", "1.5", "", "x"]))
def test_the_samplers_decide_as_those_of_the_sdk(parent: bool | None, trace_id: int, share: str) -> None:
    ratio = TraceIdRatioBased(float(share) if share[:1] == "0" or share == "1" else 1.0)
    context = Context()
    if parent is not None:
        flags = TraceFlags(TraceFlags.SAMPLED if parent else TraceFlags.DEFAULT)
        context = set_span_in_context(NonRecordingSpan(SpanContext(trace_id, 1, True, flags)), context)
    for name, theirs in {
        "": ParentBased(ALWAYS_ON),
        "always_on": ALWAYS_ON,
        "always_off": ALWAYS_OFF,
        "traceidratio": ratio,
        "parentbased_always_on": ParentBased(ALWAYS_ON),
        "parentbased_always_off": ParentBased(ALWAYS_OFF),
        "ParentBased_TraceIdRatio": ParentBased(ratio),
        "no such": ParentBased(ALWAYS_ON),
    }.items():
        ours = Sampler.of({"OTEL_TRACES_SAMPLER": name, "OTEL_TRACES_SAMPLER_ARG": share})
        decision = theirs.should_sample(context, trace_id, "x").decision
        assert ours.takes(f"{trace_id:032x}", parent) == (decision is Decision.RECORD_AND_SAMPLE), name


def test_of_traces_that_begin_here_the_share_is_told_and_no_id_comes_twice() -> None:
    here = Here(Sampler(0.25))
    spans = RequestSpans(here)
    begun = [spans.start("chat", [], "/", None) for _ in range(1000)]
    found = [span.traceparent or "" for span in begun]
    assert len({each[3:35] for each in found}) == len({each[36:52] for each in found}) == 1000
    assert all(re.fullmatch(r"00-[0-9a-f]{32}-[0-9a-f]{16}-0[23]", each) for each in found)
    assert [span.is_recorded for span in begun] == [each[-1] == "3" for each in found]
    assert 150 < sum(span.is_recorded for span in begun) < 350


def a_trace(phases: int) -> telling.Trace:
    below = [telling.Phase(f"phase {at}", at, at + 1, {}) for at in range(phases)]
    return telling.Trace(TRACE, "", "", "chat", "", "", "/", None, 10**9, 0.0, 9.0, {}, [], below, [])


def test_where_there_is_not_room_for_all_of_a_request_its_own_span_is_kept() -> None:
    teller, here = Teller(1, capacity=8), Here()
    for names in (["phase 0", "phase 1", "phase 2", "phase 3", "chat"], ["phase 0", "phase 1", "chat"]):
        told = a_trace(4)
        teller.trace(told)
        here.kept.clear()
        here.trace(told)
        assert [span.name for span in here.kept.get_finished_spans()] == names
    teller.trace(a_trace(0))
    assert teller.counts == Counts(queue_full=3, changed=teller.counts.changed)


def test_what_is_left_of_a_request_is_all_that_is_sent_and_its_times_are_those_of_all() -> None:
    def queued(seconds: float) -> telling.Sequence:
        return telling.Sequence(0.0, 99.0, Timings(0.0, seconds, seconds + 1, seconds + 2), 1, 1, {})

    for room, phases, sequences in ((1, 0, 0), (3, 2, 0), (4, 2, 1), (6, 2, 2), (8, 2, 3)):
        told, here = a_trace(2), Here()
        told.sequences = [telling.Sequence(0.0, 1.0, None, 0, 0, {}), *(queued(each) for each in (1.0, 7.0, 2.0))]
        Teller(1, capacity=room).trace(told)
        assert (len(told.phases), len(told.sequences)) == (phases, sequences)
        here.trace(told)
        spans = here.kept.get_finished_spans()
        assert len(spans) == room
        assert (spans[-1].attributes or {})["gen_ai.latency.time_in_queue"] == 7.0


async def test_a_child_that_stands_still_or_is_killed_costs_spans_and_no_time(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for name, value in {
        "TRACES_EXPORTER": "console", "BSP_MAX_QUEUE_SIZE": "16", "BSP_MAX_EXPORT_BATCH_SIZE": "8",
        "BSP_SCHEDULE_DELAY": "20",
    }.items():  # fmt: skip
        monkeypatch.setenv(f"OTEL_{name}", value)
    teller = Teller.of()
    counts, full = teller.counts, 50 - 16
    teller.start()
    await teller.begun()
    first = teller.pid
    os.kill(first, signal.SIGSTOP)
    for _ in range(10):
        teller.trace(a_trace(4))
    await asyncio.sleep(2 * GATHER_SECONDS)
    assert (counts.exported, counts.dropped()) == (0, {"queue_full": full, "export_failed": 0})
    os.kill(first, signal.SIGKILL)
    while teller.pid == first:
        await asyncio.sleep(0.01)
    assert counts.dropped() == {"queue_full": full, "export_failed": 16}, "they were the child's"
    for _ in range(3):
        teller.trace(a_trace(4))  # there is no child, or one that does not listen yet
    async with asyncio.timeout(20):
        while counts.exported < 15:
            await asyncio.sleep(0.01)
    await teller.close()
    assert (counts.exported, counts.dropped()) == (15, {"queue_full": full, "export_failed": 16})
    assert capfd.readouterr().out.count('"name": "chat"') == 3


STAND_IN = """
import json, socket, sys
import msgspec
from quire_schemas import telling, wire

end = socket.socket(fileno=int(sys.argv[-1]))
stream = end.makefile("rb")
end.sendall(wire.frame(telling.Ready()))
while head := stream.read(4):
    message = msgspec.msgpack.decode(stream.read(int.from_bytes(head)), type=telling.ToTeller)
    if isinstance(message, telling.News):
        print([isinstance(each, telling.Trace) for each in message.items], flush=True)
"""


async def test_measures_that_a_child_did_not_take_come_when_it_does_and_hold_nothing_up(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("quire.router.telling.MOST_BYTES", 1)
    monkeypatch.setattr("quire.router.telling.MOST_MEASURES", 100)
    teller = Teller(1, 1, capacity=50, command=[sys.executable, "-c", STAND_IN])
    teller.start()
    await teller.begun()
    os.kill(teller.pid, signal.SIGSTOP)
    taken = -1
    while not caplog.records:
        teller.measure(Account())
        taken += 1
    for _ in range(50):
        teller.trace(a_trace(0))
    await asyncio.sleep(2 * GATHER_SECONDS)
    os.kill(teller.pid, signal.SIGCONT)
    heard: list[list[bool]] = []
    async with asyncio.timeout(20):
        while sum(each.count(False) for each in heard) < taken:
            await asyncio.sleep(0.01)
            heard += [json.loads(line.lower()) for line in capfd.readouterr().out.splitlines()]
    assert [each.count(True) for each in heard if any(each)] == [50], "what ends together goes together"
    await teller.close()


def test_what_a_child_dies_of_is_said_before_its_line_is_cut() -> None:
    mine, its = socket.socketpair()
    with mine, its:
        command = [sys.executable, "-m", "quire.teller", "--fd", str(its.fileno()), "--speaks", version()]
        child = subprocess.Popen(command, pass_fds=[its.fileno()], stderr=subprocess.PIPE, text=True)
        its.close()
        mine.sendall(b"\0\0\0\1x")
        assert mine.recv(1) == b""
        child.kill()  # as its parent does
        said = child.communicate(timeout=20)[1]
    assert (child.returncode, "BadMessage" in said) == (1, True)


async def test_a_process_that_fails_tells_what_it_has(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "console")
    teller = Teller.of()

    async def fails() -> None:
        await teller.begun()
        teller.trace(a_trace(0))
        raise OSError("no such socket")

    with pytest.raises(OSError, match="no such socket"):
        await teller.during(fails())
    assert teller.counts.exported == capfd.readouterr().out.count('"name": "chat"') == 1


async def test_what_the_child_cannot_do_is_said_before_anything_is_served(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "carrier-pigeon")
    teller = Teller.of()
    with pytest.raises(BadTelemetry, match=r"(?s)'carrier-pigeon'.*hint: "):
        await teller.during(teller.begun())


def test_the_limits_of_the_sdk_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_SPAN_ATTRIBUTE_COUNT_LIMIT", "2")
    monkeypatch.setenv("OTEL_SPAN_EVENT_COUNT_LIMIT", "1")
    monkeypatch.setenv("OTEL_ATTRIBUTE_VALUE_LENGTH_LIMIT", "3")
    here, told = Here(), a_trace(0)
    told.attributes = {"b": None, "c": 1, "d": "text"}
    told.events = [telling.Event("e", 1.0, {"f": "text"}), telling.Event("g", 2.0, {})]
    here.trace(told)
    (span,) = here.kept.get_finished_spans()
    assert (dict(span.attributes or {}), span.dropped_attributes) == ({"c": 1, "d": "tex"}, 5)
    assert ([event.name for event in span.events], span.dropped_events) == (["g"], 1)
    assert span.end_time == 10 * 10**9


# ── the client's context ──────────────────────────────────────────────────────────────────────────────────


def test_without_an_exporter_the_trace_is_handed_on_unchanged() -> None:
    assert traceparent(TRACE) == TRACE
    later = "cc" + TRACE[2:]
    assert traceparent(later + "-what-is-to-come") == later


@pytest.mark.parametrize(
    "stated",
    [
        (),
        ("",),
        ("garbage",),
        (TRACE + "\r\nx: y",),
        (TRACE + "-more",),
        (TRACE.upper(),),
        ("ff" + TRACE[2:],),
        (f"00-{'0' * 32}-b7ad6b7169203331-01",),
        (f"00-0af7651916cd43dd8448eb211c80319c-{'0' * 16}-01",),
        (TRACE, TRACE),
    ],
)
def test_a_trace_that_is_none_is_dropped(stated: tuple[str, ...]) -> None:
    assert traceparent(*stated) is None


# ── clocks ────────────────────────────────────────────────────────────────────────────────────────────────

seconds = st.floats(0, 1e3, allow_subnormal=False)


@given(sent=st.floats(0, 1e7), there=seconds, queue=seconds, compute=seconds, back=seconds)
def test_one_clock_is_found_to_be_one(
    sent: float, there: float, queue: float, compute: float, back: float
) -> None:
    received = sent + there
    finished = received + queue + compute
    timings = Timings(received, received + queue, finished, finished)
    assert engine_offset(timings, sent, finished + back) == 0.0


@given(
    sent=st.floats(0, 1e7),
    there=seconds,
    compute=seconds,
    back=seconds,
    skew=st.floats(1e4, 1e7) | st.floats(-1e7, -1e4),
)
def test_another_clock_is_off_by_half_of_the_way_at_most(
    sent: float, there: float, compute: float, back: float, skew: float
) -> None:
    received, heard = sent + there, sent + there + compute + back
    timings = Timings(received + skew, received + skew, received + compute + skew, received + compute + skew)
    found = engine_offset(timings, sent, heard)
    assert abs(found + skew) <= (there + back) / 2 + 1e-6


# ── a collector's bad day ─────────────────────────────────────────────────────────────────────────────────


def test_a_collector_that_comes_and_goes_fills_no_log(caplog: pytest.LogCaptureFixture) -> None:
    now = 0.0
    health = Health("traces", "spans", lambda: now)
    with caplog.at_level(logging.INFO):
        for _ in range(100):
            health.heard(False, 10, "connection refused")
        health.heard(True, 10, "")
        for _ in range(100):
            health.heard(False, 10, "connection refused")
            health.heard(True, 10, "")
        now += COMPLAIN_SECONDS
        health.heard(False, 10, "connection refused")
    said = [record.getMessage() for record in caplog.records]
    assert said == [
        "traces cannot be exported and are dropped until that works again: connection refused",
        "traces are exported again; 1000 spans were lost",
        "traces cannot be exported and are dropped until that works again: connection refused",
    ]
    caplog.clear()
    sums = Health("metrics", "exports", lambda: now, keeps=True)
    with caplog.at_level(logging.INFO):
        sums.heard(False, 1, "connection refused")
        sums.heard(True, 1, "")
    assert [record.getMessage() for record in caplog.records] == [
        "metrics cannot be exported and wait until that works again: connection refused",
        "metrics are exported again; 1 exports went with this one",
    ]
