"""What a collector is sent: the router as a process, engines on real sockets, OTLP on a real port."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from tests.integration.otlp_collector import Collector, Span
from tests.integration.router_world import World, a_world, end_world, eventually, make_world

from quire.tracing import SHUTDOWN_SECONDS

TRACE_ID, CALLER = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
TRACEPARENT = f"00-{TRACE_ID}-{CALLER}-01"
SERVER = 2
CHAT: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "Say it"}], "max_tokens": 8}
PHASES = ["tokenize", "queue", "prefill", "decode"]


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    with Collector() as collector:
        yield collector


@pytest.fixture(scope="module")
def shared_world(collector: Collector) -> Iterator[World]:
    with tempfile.TemporaryDirectory(prefix="qr") as name:
        world = make_world(Path(name), collector.environment())
        yield world
        end_world(world)


@pytest.fixture
async def world(shared_world: World, collector: Collector) -> AsyncIterator[World]:
    """The module's router, with an empty table before and after, and a collector that has heard of nothing."""
    collector.spans.clear()
    collector.raw.clear()
    yield shared_world
    for engine in shared_world.engines:
        await engine.stop()
    shared_world.engines.clear()
    await shared_world.table()


async def post(world: World, path: str = "/v1/chat/completions", **fields: Any) -> httpx.Response:
    headers = fields.pop("headers", {})
    async with httpx.AsyncClient(timeout=30) as http:
        return await http.post(f"{world.url}{path}", json={**CHAT, **fields}, headers=headers)


async def request_span(collector: Collector, number: int = 1) -> Span:
    """The span of the last of `number` requests; those below it have arrived before it or with it."""

    def found(spans: list[Span]) -> Span | None:
        roots = [span for span in spans if span.kind == SERVER]
        return roots[number - 1] if len(roots) >= number else None

    span: Span = await asyncio.to_thread(collector.wait, found)
    return span


def within(parent: Span, children: list[Span]) -> None:
    """Children lie in their parent, one after the other."""
    times = [at for child in children for at in (child.start, child.end)]
    assert [parent.start, *times, parent.end] == sorted([parent.start, *times, parent.end])
    assert {child.trace_id for child in children} == {parent.trace_id}


# ── one request ───────────────────────────────────────────────────────────────────────────────────────────


async def test_a_stream_is_a_server_span_below_the_clients_with_a_span_for_each_place(
    world: World, collector: Collector
) -> None:
    engine = await world.engine(text="CANARY-ANSWER one two CANARY-STOP three", pace=0.02, cached=lambda _: 16)
    await world.serve(engine)
    headers = {"traceparent": TRACEPARENT, "tracestate": "vendor=1,other=2", "baggage": "key=CANARY-BAGGAGE"}
    before = time.time_ns()
    answer = await post(
        world,
        messages=[{"role": "user", "content": "CANARY-PROMPT"}],
        stream=True,
        max_tokens=100,
        temperature=0.5,
        top_k=7,
        seed=11,
        stop=["CANARY-STOP"],
        user="CANARY-USER",
        headers=headers,
    )
    after = time.time_ns()
    events = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]
    text = "".join(event["choices"][0]["delta"].get("content") or "" for event in events)
    assert text == "CANARY-ANSWER one two "
    span = await request_span(collector)
    assert (span.name, span.trace_id, span.parent_id) == ("chat tiny", TRACE_ID, CALLER)
    assert (span.trace_state, span.service, span.failed) == ("vendor=1,other=2", "quire-router", False)
    assert engine.generates[0].trace == f"00-{TRACE_ID}-{span.span_id}-01"
    said = span.attributes
    prompt = len(engine.generates[0].token_ids)
    timed = {name: said.pop(name) for name in list(said) if ".latency." in name or "time_to" in name}
    assert said.pop("gen_ai.response.id").startswith("chatcmpl-")
    written = said.pop("gen_ai.usage.output_tokens")
    assert said == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "quire",
        "gen_ai.request.model": "tiny",
        "gen_ai.response.model": "tiny",
        "gen_ai.request.max_tokens": 100,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.top_p": 1.0,
        "gen_ai.request.top_k": 7,
        "gen_ai.request.seed": 11,
        "gen_ai.request.stream": True,
        "gen_ai.response.finish_reasons": ["stop"],
        "gen_ai.usage.input_tokens": prompt,
        "gen_ai.usage.cache_read.input_tokens": 16,
        "server.address": "127.0.0.1",
        "server.port": world.port,
        "http.request.method": "POST",
        "http.route": "/v1/chat/completions",
        "http.response.status_code": 200,
    }
    phases = collector.below(span)
    assert [phase.name for phase in phases] == PHASES
    within(span, phases)
    assert before <= span.start <= after
    _, queue, prefill, decode = phases
    assert [phase.attributes.get("quire.tokens") for phase in phases] == [prompt, None, prompt, written]
    assert all(phase.attributes["quire.replica.id"] == "r1" for phase in phases[1:])
    assert queue.end == prefill.start
    assert prefill.end == decode.start
    assert decode.end - decode.start > 0.02 * 1e9 * (written - 2)
    ((name, at, _),) = span.events
    assert name == "first_token"
    assert prefill.end <= at <= decode.end
    assert timed.keys() == {
        "gen_ai.response.time_to_first_chunk",
        "gen_ai.latency.time_to_first_token",
        "gen_ai.latency.e2e",
        "gen_ai.latency.time_in_queue",
        "gen_ai.latency.time_in_model_prefill",
        "gen_ai.latency.time_in_model_decode",
        "gen_ai.latency.time_in_model_inference",
    }
    took = (decode.end - decode.start) / 1e9
    assert timed["gen_ai.latency.time_in_model_decode"] == pytest.approx(took, abs=1e-5)
    assert timed["gen_ai.latency.e2e"] == pytest.approx((span.end - span.start) / 1e9, abs=0.01)
    sent = b"".join(collector.raw)
    assert b"chat tiny" in sent
    assert b"CANARY" not in sent


async def test_each_sequence_of_several_has_its_own_phases(world: World, collector: Collector) -> None:
    await world.serve(await world.engine(text="one two"))
    answer = await post(world, "/v1/completions", messages=None, prompt=["a", "b"], n=2)
    assert answer.status_code == 400, "a field of the other endpoint"
    async with httpx.AsyncClient(timeout=30) as http:
        body = {"model": "org/tiny", "prompt": ["a", "b"], "n": 2, "max_tokens": 3}
        assert (await http.post(f"{world.url}/v1/completions", json=body)).status_code == 200
    span = await request_span(collector, 2)
    assert (span.name, span.parent_id) == ("text_completion org/tiny", "")
    assert span.attributes["gen_ai.response.model"] == "tiny"
    assert span.attributes["gen_ai.request.choice.count"] == 2
    assert span.attributes["gen_ai.response.finish_reasons"] == ["length"] * 4
    phases = collector.below(span)
    for index in range(4):
        mine = [phase for phase in phases if phase.attributes.get("quire.choice.index") == index]
        assert [phase.name for phase in mine] == PHASES[1:]
        within(span, mine)


async def test_what_only_some_requests_have_is_told_by_its_name(world: World, collector: Collector) -> None:
    await world.serve(await world.engine(text="<think>one</think>two"), reasoning_dialect="think")
    schema = {"type": "json_schema", "json_schema": {"name": "CANARY", "schema": {"type": "object"}}}
    async with httpx.AsyncClient(timeout=30) as http:

        async def ask(path: str, **body: Any) -> Any:
            answer = await http.post(f"{world.url}/v1/{path}", json={"model": "tiny", **body})
            assert answer.status_code == 200, answer.text
            return answer.json()

        thought = await ask("chat/completions", messages=CHAT["messages"], max_tokens=200)
        await ask("completions", prompt="x", max_tokens=5, response_format=schema)
        await ask("embeddings", input="hi", encoding_format="base64", dimensions=4)
        first = await ask("responses", input="one")
        second = await ask("responses", input="two", previous_response_id=first["id"])
        third = await ask("responses", input="three", previous_response_id=second["id"])
    spans = [await request_span(collector, number) for number in range(1, 7)]
    about = [{name: span.attributes.get(f"gen_ai.{name}") for name in (
        "usage.reasoning.output_tokens", "output.type", "request.encoding_formats", "embeddings.dimension.count",
        "conversation.id",
    )} for span in spans]  # fmt: skip
    told = [{name.split(".")[0]: value for name, value in each.items() if value is not None} for each in about]
    tokens = thought["usage"]["completion_tokens_details"]["reasoning_tokens"]
    assert tokens > 0
    assert told[:3] == [
        {"usage": tokens},
        {"output": "json"},
        {"request": ["base64"], "embeddings": 4},
    ]
    assert [each["conversation"] for each in told[3:]] == [first["id"]] * 3
    assert third["id"] not in (first["id"], second["id"])
    assert b"CANARY" not in b"".join(collector.raw)


async def test_a_client_that_is_not_sampled_is_not_traced(world: World, collector: Collector) -> None:
    engine = await world.engine()
    await world.serve(engine)
    assert (await post(world, headers={"traceparent": TRACEPARENT[:-1] + "0"})).status_code == 200
    assert (await post(world, headers={"traceparent": "garbage"})).status_code == 200
    span = await request_span(collector)
    assert span.parent_id == ""
    assert span.trace_id != TRACE_ID
    assert [span.trace_id for span in collector.spans if span.trace_id == TRACE_ID] == []
    trace = engine.generates[0].trace
    assert trace is not None
    assert trace.startswith(f"00-{TRACE_ID}-")
    assert trace.endswith("-00")


async def test_an_engine_with_another_clock_has_its_phases_where_they_belong(
    world: World, collector: Collector
) -> None:
    for name, skew in (("ahead", 86400.0), ("behind", -86400.0)):
        await world.serve(await world.engine(name, skew=skew, pace=0.01))
        await post(world)
    for number in (1, 2):
        span = await request_span(collector, number)
        within(span, collector.below(span))
        decode = collector.below(span)[-1]
        assert decode.end - decode.start > 0.04 * 1e9


# ── requests that go wrong ────────────────────────────────────────────────────────────────────────────────


async def test_a_clients_mistakes_are_told_and_are_no_errors_of_ours(world: World, collector: Collector) -> None:
    await world.serve(await world.engine())
    assert (await post(world, model="CANARY-MODEL")).status_code == 404
    assert (await post(world, temprature=1)).status_code == 400
    for number, (code, status) in enumerate([("model_not_found", 404), ("invalid_request", 400)], start=1):
        span = await request_span(collector, number)
        assert (span.name, span.failed) == ("chat", False)
        assert (span.attributes["error.type"], span.attributes["http.response.status_code"]) == (code, status)
    assert b"CANARY" not in b"".join(collector.raw)


async def test_a_request_that_changes_engines_shows_both_attempts(world: World, collector: Collector) -> None:
    dying, other = await world.engine("a", die_after=3, pace=0.01), await world.engine("b", pace=0.01)
    await world.table(world.route(dying.endpoint()))
    await world.connected("a")
    asked = asyncio.create_task(post(world))

    async def started() -> bool:
        return bool(dying.generates)

    await eventually(started)
    await world.table(world.route(dying.endpoint(), other.endpoint()))
    assert (await asked).status_code == 200
    span = await request_span(collector)
    retries = [(name, attributes) for name, _, attributes in span.events if name == "retry"]
    assert retries == [("retry", {"quire.replica.id": "a", "error.type": "engine_died"})]
    where = [
        (phase.name, phase.attributes.get("quire.replica.id"), phase.attributes.get("quire.attempt"))
        for phase in collector.below(span)
        if phase.name != "hold"
    ]
    assert where == [("tokenize", None, None)] + [
        (name, replica, attempt) for replica, attempt in (("a", None), ("b", 2)) for name in PHASES[1:]
    ]


async def test_a_request_whose_engines_all_die_shows_every_attempt_once(
    world: World, collector: Collector
) -> None:
    await world.serve(await world.engine(die_after=1, pace=0.01))
    assert (await post(world)).status_code == 502
    span = await request_span(collector)
    assert span.failed
    assert span.attributes["error.type"] == "engine_unavailable"
    assert [name for name, _, _ in span.events].count("retry") == 2
    queues = [phase for phase in collector.below(span) if phase.name in ("queue", "attempt")]
    assert [phase.attributes.get("quire.attempt") for phase in queues] == [None, 2, 3]


async def test_a_stream_whose_engine_dies_is_an_error(world: World, collector: Collector) -> None:
    await world.serve(await world.engine(die_after=3, pace=0.01))
    with pytest.raises(httpx.RemoteProtocolError, match="closed"):
        await post(world, stream=True)
    span = await request_span(collector)
    assert span.failed
    assert (span.attributes["error.type"], span.attributes["http.response.status_code"]) == ("engine_died", 200)


async def test_a_client_that_leaves_early_or_late_leaves_a_whole_trace(world: World, collector: Collector) -> None:
    engine = await world.engine(pace=0.05)
    await world.serve(engine)
    await world.table(world.route(engine.endpoint()))
    for number, tokens in enumerate((0, 2), start=1):
        engine.stalled = tokens == 0
        body = json.dumps({**CHAT, "stream": True, "max_tokens": 400}).encode()
        _, writer = await asyncio.open_connection("127.0.0.1", world.port)
        writer.write(world.post("/v1/chat/completions", body))

        async def far_enough(least: int = tokens) -> bool:
            return any(run.sent >= least for run in engine.running.values())

        await eventually(far_enough)
        writer.transport.abort()
        span = await request_span(collector, number)
        assert (span.attributes["error.type"], span.failed) == ("client_gone", False)
        assert "http.response.status_code" not in span.attributes or tokens
        names = [phase.name for phase in collector.below(span)]
        assert names == (PHASES if tokens else ["tokenize", "attempt"])
        within(span, collector.below(span))


async def test_a_request_that_waits_for_a_replica_says_so(world: World, collector: Collector) -> None:
    engine = await world.engine()
    await world.table(world.route())
    asked = asyncio.create_task(post(world))

    async def held() -> bool:
        return (await world.metrics())['quire_requests_held{model="tiny"}'] == 1

    await eventually(held)
    await asyncio.sleep(0.15)
    await world.table(world.route(engine.endpoint()))
    assert (await asked).status_code == 200
    span = await request_span(collector)
    hold = next(phase for phase in collector.below(span) if phase.name == "hold")
    assert hold.end - hold.start > 0.1 * 1e9
    within(span, collector.below(span))


# ── who tells it ──────────────────────────────────────────────────────────────────────────────────────────


def teller_of(world: World) -> psutil.Process:
    (found,) = [each for each in psutil.Process(world.process.pid).children() if "quire.teller" in each.cmdline()]
    return found


async def test_a_teller_that_is_killed_costs_no_answer_and_is_followed_by_another(
    world: World, collector: Collector
) -> None:
    await world.serve(await world.engine())
    first = teller_of(world)

    async def stands_back() -> bool:
        return {os.getpriority(os.PRIO_PROCESS, each.id) for each in first.threads()} == {19}

    await eventually(stands_back)
    assert len(first.threads()) > 2, "exporters have threads of their own"
    assert {Path(each.path).name for each in first.open_files()} <= {"router.log", "null"}
    assert [each for each in first.net_connections("inet") if each.status == "LISTEN"] == []
    told, own = (await world.metrics())["process_resident_memory_bytes"], psutil.Process(world.process.pid)
    assert told > own.memory_info().rss + first.memory_info().rss / 2
    dropped = (await spans_at(world))[1:]
    first.kill()
    await asyncio.to_thread(first.wait, 10)
    for _ in range(3):
        assert (await post(world)).status_code == 200
    await request_span(collector, 3)
    second = teller_of(world)
    assert second.pid != first.pid
    assert (await spans_at(world))[1:] == dropped, "what ended meanwhile has waited"
    log = (world.folder / "router.log").read_text()
    assert f"the teller (pid {first.pid}) ended with -9; another one is started" in log

    world.restart()
    await asyncio.to_thread(second.wait, 10)
    world.wait_until_up()


def test_a_router_that_cannot_tell_what_it_is_asked_to_does_not_start(shared_world: World) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "quire.router", str(shared_world.config_file)],
        env={**os.environ, "OTEL_TRACES_EXPORTER": "carrier-pigeon"},
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert done.returncode == 78
    said = done.stderr.splitlines()
    assert said[-2].startswith("error: the traces exporter 'carrier-pigeon'")
    assert said[-1].startswith("    hint: ")
    assert "router on http" not in done.stderr, "it has not served"


# ── metrics ───────────────────────────────────────────────────────────────────────────────────────────────


async def test_durations_and_tokens_of_requests_are_metrics_by_the_conventions(
    world: World, collector: Collector
) -> None:
    await world.serve(await world.engine(text="one two three", pace=0.01))
    about: dict[str, Any] = {"gen_ai__request__model": "org/tiny", "gen_ai__operation__name": "chat"}

    def count(name: str, **more: Any) -> int:
        return collector.measures[name].count(**about, **more) if name in collector.measures else 0

    def total(name: str, **more: Any) -> float:
        return collector.measures[name].total(**about, **more) if name in collector.measures else 0.0

    tokens, duration = "gen_ai.client.token.usage", "gen_ai.server.request.duration"
    first, each = "gen_ai.server.time_to_first_token", "gen_ai.server.time_per_output_token"
    answer = await post(world, model="org/tiny", max_tokens=5, user="CANARY-USER")
    assert (await post(world, model="org/tiny", max_tokens=100_000)).status_code == 400
    for name in ("CANARY-MODEL", "CANARY-OTHER"):
        assert (await post(world, model=name)).status_code == 404
    usage = answer.json()["usage"]

    async def there() -> bool:
        return count(duration) == 2 and collector.measures[duration].count(error__type="model_not_found") >= 2

    await eventually(there)
    assert (count(first), count(each), count(tokens)) == (1, 1, 2)
    assert total(tokens, gen_ai__token__type="input") == usage["prompt_tokens"]
    assert total(tokens, gen_ai__token__type="output") == usage["completion_tokens"] == 5
    assert 0.01 < total(each) * 4 < total(duration)
    assert count(duration, error__type="context_length_exceeded") == 1
    assert {name: measure.unit for name, measure in collector.measures.items()} == {
        tokens: "{token}", duration: "s", first: "s", each: "s",
    }  # fmt: skip
    assert collector.measures[tokens].bounds[:4] == (1, 4, 16, 64)
    assert collector.measures[duration].bounds[0] == 0.01
    models = {dict(point).get("gen_ai.request.model") for m in collector.measures.values() for point in m.points}
    assert models <= {None, "tiny", "org/tiny"}, "models that nobody serves are all one"
    assert b"CANARY" not in b"".join(collector.raw)


# ── a collector's bad day ─────────────────────────────────────────────────────────────────────────────────


async def spans_at(world: World) -> tuple[float, float, float]:
    """Exported, lost for want of room, lost by the collector; as /metrics shows them."""
    found = await world.metrics()
    dropped = 'quire_spans_dropped_total{reason="%s"}'
    return found["quire_spans_exported_total"], found[dropped % "queue_full"], found[dropped % "export_failed"]


async def test_a_bad_collector_costs_spans_and_two_lines_of_log_and_nothing_else() -> None:
    few = {"OTEL_BSP_MAX_QUEUE_SIZE": "16", "OTEL_BSP_MAX_EXPORT_BATCH_SIZE": "8"}
    with (
        Collector("refuses") as collector,
        tempfile.TemporaryDirectory(prefix="qr") as name,
        a_world(Path(name), {**collector.environment(), **few}) as world,
    ):
        await world.serve(await world.engine())
        log = world.folder / "router.log"

        async def lost(spans: int) -> bool:
            return await spans_at(world) == (0, 0, spans)

        for number in (1, 2, 3):
            assert (await post(world)).status_code == 200
            await eventually(lambda want=5 * number: lost(want), 30)  # type: ignore[misc]

        collector.manner = "takes"
        assert (await post(world)).status_code == 200
        span = await request_span(collector)
        assert [phase.name for phase in collector.below(span)] == PHASES

        async def both_again() -> bool:  # each has an exporter of its own, and either may be the first
            text = log.read_text()
            return "traces are exported again" in text and "metrics are exported again" in text

        await eventually(both_again, 30)
        lines = [line for line in log.read_text().splitlines() if "trace" in line.lower()]
        assert len(lines) == 2, lines
        of_metrics = [line for line in log.read_text().splitlines() if " metrics " in line]
        assert len(of_metrics) == 2, of_metrics
        assert "metrics cannot be exported and wait until that works again" in of_metrics[0]

        async def all_four() -> bool:  # what was not taken comes later
            return collector.measures["gen_ai.server.request.duration"].count() == 4

        await eventually(all_four)
        said = [line.split("quire.tracing: ")[1] for line in lines]
        assert said[0].startswith("traces cannot be exported and are dropped until that works again: ")
        assert "400" in said[0]
        assert said[1] == "traces are exported again; 15 spans were lost"

        collector.manner = "hangs"
        answers = await asyncio.gather(*(post(world) for _ in range(12)))
        assert {answer.status_code for answer in answers} == {200}
        assert await spans_at(world) == (5, 12 * 5 - 16, 15), "16 wait, one batch of them at the exporter"
        world.process.terminate()
        began = time.monotonic()
        assert await asyncio.to_thread(world.process.wait, 20) == 0
        assert time.monotonic() - began < SHUTDOWN_SECONDS + 4
        await world.engines[0].stop()
        assert log.read_text().lower().count("trace") == 2
