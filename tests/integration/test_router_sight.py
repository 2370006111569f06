"""What an operator sees of a request: the series of `/metrics`, and its line in the log."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from tests.integration.router_world import ASK, CHAT, World, eventually

from quire_schemas import signals, wire

CANARIES = {
    "messages": [{"role": "user", "content": "CANARY-PROMPT\r\nrequest=forged status=200"}],
    "user": "CANARY-USER",
    "stop": ["CANARY-STOP"],
    "metadata": {"CANARY-KEY": "CANARY-VALUE"},
}
HEADERS = {
    "authorization": "Bearer CANARY-SECRET",
    "baggage": "key=CANARY-BAGGAGE",
    "user-agent": "CANARY-AGENT",
    "traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
}


async def changes(world: World, before: dict[str, float]) -> dict[str, float]:
    """The series that have another value now, buckets left out; names without their model."""
    now = await world.metrics()
    found = {
        re.sub(r'model="[^"]*",?|,(?=})', "", name).replace("{}", ""): value - before.get(name, 0)
        for name, value in now.items()
        if value != before.get(name, 0) and "_bucket" not in name and name.startswith("quire_")
    }
    return {name: round(change, 6) for name, change in found.items()}


async def table(world: World, *engines: Any, http: wire.HttpSettings | None = None, **fields: Any) -> None:
    world.version += 1
    routes = (world.route(*(engine.endpoint() for engine in engines), **fields),)
    await world.control(wire.RoutingTable(world.version, routes, http or wire.HttpSettings()))
    await world.connected(*(engine.replica_id for engine in engines))


# ── series ────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_one_answer_counts_once_where_its_time_and_tokens_went(world: World) -> None:
    await table(world, await world.engine(cached=lambda _: 16, pace=0.1, tokens_per_step=4), wanted=2, restarts=3)
    before = await world.metrics()
    async with world.client() as client:
        answer = await client.chat.completions.create(model="tiny", messages=ASK, max_tokens=9, stream=False)
    assert answer.usage is not None
    prompt = answer.usage.prompt_tokens

    async def done() -> bool:
        now = await world.metrics()
        return now[f'{signals.NUM_REQUESTS_RUNNING}{{model="tiny",replica="r1"}}'] == 0

    await eventually(done)
    found = await changes(world, before)
    counts = {name: value for name, value in found.items() if "_count" in name and "replica=" not in name}
    between = counts[f"{signals.INTER_TOKEN_LATENCY}_count"]
    assert between in (1, 5), "4, 4 and 1 token come; two pieces may be found together"
    assert counts == {
        f"{name}_count": 1
        for name in (
            signals.TIME_TO_FIRST_TOKEN,
            signals.TIME_PER_OUTPUT_TOKEN,
            signals.E2E_LATENCY,
            signals.QUEUE_TIME,
            signals.PREFILL_TIME,
            signals.DECODE_TIME,
            signals.INFERENCE_TIME,
            signals.REQUEST_PROMPT_TOKENS,
            signals.REQUEST_COMPUTED_TOKENS,
            signals.REQUEST_GENERATION_TOKENS,
            signals.REQUEST_MAX_GENERATION_TOKENS,
            signals.REQUEST_PARAMS_N,
            signals.REQUEST_PARAMS_MAX_TOKENS,
            signals.REQUEST_NUM_PREEMPTIONS,
        )
    } | {
        f"{signals.INTER_TOKEN_LATENCY}_count": between,
        f'{signals.ROUTER_ADDED_TIME}_count{{part="request"}}': 1,
        f'{signals.ROUTER_ADDED_TIME}_count{{part="answer"}}': 1,
    }
    sums = {name.removesuffix("_sum"): value for name, value in found.items() if name.endswith("_sum")}
    assert sums[signals.REQUEST_PROMPT_TOKENS] == prompt
    assert sums[signals.REQUEST_COMPUTED_TOKENS] == prompt - 16
    assert sums[signals.REQUEST_GENERATION_TOKENS] == sums[signals.REQUEST_PARAMS_MAX_TOKENS] == 9
    assert sums[signals.DECODE_TIME] == pytest.approx(8 * sums[signals.TIME_PER_OUTPUT_TOKEN], abs=1e-4)
    assert sums[signals.INFERENCE_TIME] == pytest.approx(
        sums[signals.PREFILL_TIME] + sums[signals.DECODE_TIME], abs=1e-4
    )
    assert 0.15 < sums[signals.DECODE_TIME] <= sums[signals.E2E_LATENCY]
    added = f'{signals.ROUTER_ADDED_TIME}_sum{{part="%s"}}'
    assert 0 < found[added % "request"] + found[added % "answer"] < sums[signals.E2E_LATENCY]
    by_source = f'{signals.PROMPT_TOKENS_BY_SOURCE}_total{{source="%s"}}'
    assert (found[by_source % "local_cache_hit"], found[by_source % "local_compute"]) == (16, prompt - 16)
    now = await world.metrics()
    of = '{model="tiny"}'
    assert (now[signals.REPLICAS_WANTED + of], now[signals.REPLICAS_READY + of]) == (2, 1)
    assert now[signals.REPLICA_RESTARTS + of] == 3
    assert now["process_cpu_seconds_total"] > 0
    assert now["process_resident_memory_bytes"] > 1 << 20
    assert now[signals.STORE_FREE] > 0


async def test_what_is_refused_counts_by_its_code_and_makes_no_series(world: World) -> None:
    await table(world, await world.engine())
    before = await world.metrics()
    async with httpx.AsyncClient(timeout=20) as http:
        for fields, status in (
            ({"model": 'no\nsuch"} 1'}, 404),
            ({"model": "CANARY" * 30}, 404),
            ({"temprature": 1}, 400),
            ({"max_tokens": 100_000}, 400),
        ):
            answer = await http.post(f"{world.url}/v1/chat/completions", json={**CHAT, **fields})
            assert answer.status_code == status, answer.text
    assert (await world.metrics()).keys() == before.keys()
    now = await world.metrics()
    rejected = f'{signals.ADMISSION_REJECTIONS}_total{{model="%s",reason="%s"}}'
    told = {
        (model, reason): now[name] - before[name]
        for model in ("-", "tiny")
        for reason in ("model_not_found", "invalid_request", "context_length_exceeded", "queue_full")
        if now[name := rejected % (model, reason)] != before[name]
    }
    assert told == {
        ("-", "model_not_found"): 2,
        ("-", "invalid_request"): 1,
        ("tiny", "context_length_exceeded"): 1,
    }


async def test_deaths_stalls_and_retries_count_and_a_replica_told_to_leave_does_not(world: World) -> None:
    dying, other = await world.engine("a", pace=0.1), await world.engine("b", pace=0.005)
    await table(world, dying)
    before = await world.metrics()
    async with world.client() as client:
        asked = asyncio.create_task(client.chat.completions.create(model="tiny", messages=ASK, max_tokens=99))

        async def started() -> bool:
            return bool(dying.generates)

        await eventually(started)
        await table(world, dying, other)
        dying.die_after = 1
        await asked
        ejected = f'{signals.REPLICA_EJECTIONS}_total{{model="tiny",reason="%s"}}'
        now = await world.metrics()
        assert now[ejected % "disconnected"] - before[ejected % "disconnected"] >= 1
        name = f'{signals.RETRIES}_total{{model="tiny"}}'
        assert now[name] - before[name] == len(dying.generates) + len(other.generates) - 1 >= 1
        disconnected = now[ejected % "disconnected"]
        await table(world, other)  # the other one is told to leave
        assert (await world.metrics())[ejected % "disconnected"] == disconnected

        other.stalled = True
        asked = asyncio.create_task(client.chat.completions.create(model="tiny", messages=ASK, max_tokens=9))

        async def stalled() -> bool:
            found = await world.metrics()
            counted = found[ejected % "stalled"] > before[ejected % "stalled"]
            return counted and found[f'{signals.REPLICA_UP}{{model="tiny",replica="b"}}'] == 0

        await eventually(stalled, 30)
        other.stalled = False
        await asked


async def test_numbers_that_are_not_finite_are_counted(world: World) -> None:
    await table(world, await world.engine(fail_with="numerical_error"))
    name = f'{signals.CORRUPTED_REQUESTS}_total{{model="tiny"}}'
    before = await world.metrics()
    async with world.client() as client:
        with pytest.raises(openai.InternalServerError):
            await client.chat.completions.create(model="tiny", messages=ASK, max_tokens=5)
    assert (await world.metrics())[name] == before[name] + 1
    log_of(world).write_text("")  # of what is told of a failure of ours, a traceback is a part


# ── the access log ────────────────────────────────────────────────────────────────────────────────────────────


def lines(world: World) -> list[dict[str, str]]:
    """The lines of the access log, taken apart."""
    text = (world.folder / "router.log").read_text()
    found = [line.split("quire.access: ", 1)[1] for line in text.splitlines() if " quire.access: " in line]
    return [dict(word.split("=", 1) for word in line.split(" ")) for line in found]


async def logged(world: World, count: int) -> list[dict[str, str]]:
    async def there() -> list[dict[str, str]] | None:
        return lines(world) if len(lines(world)) >= count else None

    found = await eventually(there)
    assert len(found) == count, found
    return found


def log_of(world: World) -> Path:
    return world.folder / "router.log"


async def test_every_request_has_a_line_with_its_ids_and_nothing_that_a_client_wrote(world: World) -> None:
    engine = await world.engine(cached=lambda _: 16)
    await table(world, engine, http=wire.HttpSettings(access_log="all"))
    body = {**CHAT, **CANARIES, "max_tokens": 5}
    async with httpx.AsyncClient(timeout=20, headers=HEADERS) as http:
        whole = await http.post(f"{world.url}/v1/chat/completions", json=body)
        stream = await http.post(
            f"{world.url}/v1/chat/completions", json={**body, "stream": True}, headers={"x-request-id": "mine-1"}
        )
        await http.post(f"{world.url}/v1/chat/completions", json={**body, "model": "CANARY-MODEL\r\nrequest=x"})
        await http.post(f"{world.url}/v1/chat/completions", json={**body, "CANARY-FIELD": 1})
        await http.get(f"{world.url}/CANARY-PATH%0d%0arequest=forged?CANARY-QUERY")
        await http.get(f"{world.url}/v1/files/CANARY-FILE")
        await http.get(f"{world.url}/health")
        await http.request(
            "CANARY", f"{world.url}/v1/models", headers=[(b"x-request-id", "CANARY\u00e9".encode())]
        )
    found = await logged(world, 7)
    first, second, unknown, field, path, file, method = found
    assert whole.status_code == stream.status_code == 200
    assert first["request"] == whole.headers["x-request-id"]
    assert first["trace"] == "0af7651916cd43dd8448eb211c80319c"
    prompt = whole.json()["usage"]["prompt_tokens"]
    timed = {name: float(first.pop(name)) for name in ("queue_ms", "ttft_ms", "total_ms")}
    assert 0 <= timed["queue_ms"] <= timed["ttft_ms"] <= timed["total_ms"] < 20_000
    del first["request"], first["trace"]
    assert first == {
        "method": "POST",
        "route": "/v1/chat/completions",
        "operation": "chat",
        "model": "tiny",
        "replica": "r1",
        "status": "200",
        "finish": "length",
        "prompt_tokens": str(prompt),
        "cached_tokens": "16",
        "completion_tokens": "5",
    }
    assert (second["request"], second["stream"], second["completion_tokens"]) == ("mine-1", "true", "5")
    assert (unknown["status"], unknown["error"], unknown["finish"]) == ("404", "model_not_found", "refused")
    assert "model" not in unknown
    assert (field["status"], field["error"]) == ("400", "invalid_request")
    assert "route" not in path
    assert (path["status"], file["route"]) == ("404", "/v1/files/{file_id}")
    assert method["status"] == "405"
    assert "method" not in method
    assert method["request"].startswith("req_")
    assert "CANARY" not in log_of(world).read_text()


async def test_only_failures_have_a_line_unless_more_is_asked_for_and_that_changes_while_it_runs(
    world: World,
) -> None:
    engine = await world.engine(die_after=3, pace=0.005)
    await table(world, engine)
    async with httpx.AsyncClient(timeout=20) as http:
        assert (
            await http.post(f"{world.url}/v1/chat/completions", json={**CHAT, "max_tokens": 1})
        ).status_code == 200
        assert (await http.post(f"{world.url}/v1/chat/completions", json={**CHAT, "x": 1})).status_code == 400
        with pytest.raises(httpx.RemoteProtocolError):
            await http.post(f"{world.url}/v1/chat/completions", json={**CHAT, "stream": True, "max_tokens": 50})
        (broken,) = await logged(world, 1)
        assert (broken["status"], broken["finish"], broken["error"]) == ("200", "error", "engine_died")
        await table(world, engine, http=wire.HttpSettings(access_log="none"))
        with pytest.raises(httpx.RemoteProtocolError):
            await http.post(f"{world.url}/v1/chat/completions", json={**CHAT, "stream": True, "max_tokens": 50})
        await table(world, engine, http=wire.HttpSettings(access_log="all"))
        assert (await http.get(f"{world.url}/v1/models")).status_code == 200
    found = await logged(world, 2)
    assert found[1]["route"] == "/v1/models"


async def test_a_client_that_leaves_is_told_of(world: World) -> None:
    engine = await world.engine(pace=0.02)
    await table(world, engine, http=wire.HttpSettings(access_log="all"))
    _, writer = await asyncio.open_connection("127.0.0.1", world.port)
    body = json.dumps({**CHAT, "stream": True, "max_tokens": 400}).encode()
    writer.write(world.post("/v1/chat/completions", body))

    async def writes() -> bool:
        return any(run.sent > 2 for run in engine.running.values())

    await eventually(writes)
    writer.transport.abort()
    (left,) = await logged(world, 1)
    assert (left["client"], left["finish"], left["error"], left["status"]) == (
        "gone",
        "abort",
        "client_gone",
        "200",
    )
    assert int(left["completion_tokens"]) >= 2
