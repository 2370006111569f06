"""Routes over real sockets: whom a name leads to, who steps in, what is waited for, and what a copy changes."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sqlite3
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest
from tests.effort import EFFORT, bound, times
from tests.figures import record, spread
from tests.integration.router_world import ASK, World, events, eventually
from tests.integration.wire_engine import WireEngine

from quire_schemas import signals, wire

LATE = 0.1 if EFFORT > 1 else 1.5
"""Seconds after its deadline in which a request has its answer; in CI the machine has other things to do."""
CHAT = {"model": "chat", "messages": ASK, "max_tokens": 4}


@dataclass
class Town:
    """Some models, each with engines of its own, and the routes between them."""

    world: World
    models: dict[str, wire.ModelRoute] = field(default_factory=dict)
    engines: dict[str, list[WireEngine]] = field(default_factory=dict)

    async def add(self, name: str, replicas: int = 1, engine: dict[str, Any] | None = None, **route: Any) -> None:
        ids = [f"{name}-r1-{n}" for n in range(replicas)]
        made = [await self.world.engine(each, **(engine or {})) for each in ids]
        endpoints = [each.endpoint() for each in made]
        self.models[name] = self.world.route(*endpoints, **{"model": name, "names": (name,), **route})
        self.engines[name] = made

    async def go(self, *routes: wire.TrafficRoute) -> None:
        await self.world.table(*self.models.values(), routes=routes)
        await self.world.connected(*(each.replica_id for all_ in self.engines.values() for each in all_))

    async def ask(self, path: str = "/v1/chat/completions", headers: Any = None, **body: Any) -> httpx.Response:
        async with httpx.AsyncClient(base_url=self.world.url, timeout=20) as http:
            return await http.post(path, json={**CHAT, **body}, headers=headers)

    async def timed(self, **body: Any) -> tuple[httpx.Response, float]:
        """An answer, and the seconds that it took. A client is made before: that takes longer than a request."""
        async with httpx.AsyncClient(base_url=self.world.url, timeout=20) as http:
            began = time.monotonic()
            answer = await http.post("/v1/chat/completions", json={**CHAT, **body})
            return answer, time.monotonic() - began

    async def served(self, count: int, headers: Any = None, **body: Any) -> Counter[str]:
        async with httpx.AsyncClient(base_url=self.world.url, timeout=20) as http:
            answers = [
                await http.post("/v1/chat/completions", json={**CHAT, **body}, headers=headers)
                for _ in range(count)
            ]
        assert {answer.status_code for answer in answers} == {200}, answers[0].text
        return Counter(answer.headers["x-quire-model"] for answer in answers)

    async def metric(self, name: str, **labels: str) -> float:
        told = ",".join(f'{key}="{value}"' for key, value in sorted(labels.items()))
        return (await self.world.metrics())[f"{name}_total{{{told}}}"]


@pytest.fixture
def town(world: World) -> Town:
    return Town(world)


def to(*models: tuple[str, int], **more: Any) -> wire.TrafficRoute:
    backends = tuple(wire.Backend(model, weight) for model, weight in models)
    fields: dict[str, Any] = {"route": "r", "names": ("chat", "gpt-4o"), "created": 5, "backends": backends}
    return wire.TrafficRoute(**fields | more)


async def cut(town: Town, **body: Any) -> tuple[bytes, list[Any]]:
    """The head and the events of a stream that is cut off."""
    body = {**CHAT, "stream": True, **body}
    answer = await town.world.raw(town.world.post("/v1/chat/completions", json.dumps(body).encode()))
    assert answer.startswith(b"HTTP/1.1 200"), answer
    return answer.split(b"\r\n\r\n")[0], events(answer)


# ── whom a name leads to ──────────────────────────────────────────────────────────────────────────────────


async def test_weights_are_exact_and_the_answer_says_who_it_is_from(town: Town) -> None:
    await town.add("a", engine={"pace": 0.0005})
    await town.add("b", engine={"pace": 0.0005})
    await town.go(to(("a", 95), ("b", 5)))
    assert await town.served(100, max_tokens=1) == {"a": 95, "b": 5}
    assert await town.metric(signals.ROUTE_REQUESTS, route="r", model="b") == 5
    answer = await town.ask(model="gpt-4o")
    assert answer.json()["model"] == "gpt-4o", "the body repeats the name that was asked for"
    assert (await town.ask(model="b")).headers["x-quire-model"] == "b", "without a route, too"


async def test_headers_decide_first(town: Town) -> None:
    for name in ("a", "b", "c"):
        await town.add(name)
    beta, eu = ("x-tenant", "beta"), ("x-region", "eu")
    both = to(("c", 1), route="both", headers=(beta, eu))
    await town.go(to(("a", 1)), to(("b", 1), route="one", headers=(beta,)), both)
    assert await town.served(2) == {"a": 2}
    assert await town.served(2, {"X-Tenant": "beta"}) == {"b": 2}
    assert await town.served(2, {"X-Tenant": "beta", "X-Region": "eu"}) == {"c": 2}
    assert await town.served(2, {"X-Tenant": "other"}) == {"a": 2}


async def test_every_endpoint_takes_the_names_of_routes(town: Town) -> None:
    await town.add("a", max_model_len=300)
    await town.add("b", max_model_len=200)
    hidden = to(("b", 1), route="h", names=("hidden",), headers=(("x-tenant", "beta"),))
    await town.go(to(("a", 1), ("b", 1)), hidden, to(("gone", 1), route="g", names=("nowhere",)))
    asked: dict[str, dict[str, Any]] = {
        "/v1/completions": {"prompt": "x", "max_tokens": 2},
        "/v1/embeddings": {"input": "x"},
        "/v1/score": {"text_1": "x", "text_2": "y"},
        "/v1/messages": {"messages": ASK, "max_tokens": 2},
        "/v1/messages/count_tokens": {"messages": ASK},
        "/v1/responses": {"input": "x", "max_output_tokens": 2},
        "/v1/responses/input_tokens": {"input": "x"},
        "/v1/tokenize": {"prompt": "x"},
        "/v1/detokenize": {"tokens": [1]},
    }
    async with httpx.AsyncClient(base_url=town.world.url, timeout=20) as http:
        for path, body in asked.items():
            answer = await http.post(path, json={"model": "chat", **body})
            assert answer.status_code == 200, (path, answer.text)
        listed = {card["id"]: card for card in (await http.get("/v1/models")).json()["data"]}
        assert set(listed) == {"a", "b", "chat", "gpt-4o"}, (
            "one without a model and one for a header are not there"
        )
        card = (await http.get("/v1/models/chat")).json()
        assert card == listed["chat"]
        assert (card["root"], card["created"], card["max_model_len"]) == ("route/r", 5, 200)
        mine = await http.get("/v1/models", headers={"X-Tenant": "beta"})
        assert "hidden" in {each["id"] for each in mine.json()["data"]}
        assert (await http.get("/v1/models/hidden")).status_code == 404
        nowhere = await http.post("/v1/completions", json={"model": "nowhere", "prompt": "x"})
    assert (nowhere.status_code, nowhere.json()["error"]["code"]) == (503, "service_unavailable")
    assert nowhere.json()["error"]["message"] == "No model is behind 'nowhere' now."
    assert nowhere.headers["x-should-retry"] == "false"


async def test_a_user_stays_with_one_backend_and_one_replica(town: Town) -> None:
    await town.add("a", replicas=3)
    await town.add("b")
    await town.go(to(("a", 1), ("b", 1), sticky="user"))
    found = {user: await town.served(4, user=user) for user in "0123456789"}
    assert all(len(each) == 1 for each in found.values())
    assert len({next(iter(each)) for each in found.values()}) == 2, "not all users have one backend"
    of_a = [user for user, each in found.items() if "a" in each]
    for user in of_a:
        before = [len(engine.generates) for engine in town.engines["a"]]
        await town.served(3, user=user)
        more = [len(engine.generates) - had for engine, had in zip(town.engines["a"], before, strict=True)]
        assert sorted(more) == [0, 0, 3], "his requests meet one replica"
    assert await town.served(4) == {"a": 2, "b": 2}


async def test_a_table_without_the_route_ends_the_name(town: Town) -> None:
    await town.add("a")
    await town.go(to(("a", 1)))
    assert await town.served(1) == {"a": 1}
    await town.go()
    answer = await town.ask()
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")
    assert f'{signals.ROUTE_REQUESTS}_total{{model="a",route="r"}}' not in await town.world.metrics()


@pytest.mark.nightly
async def test_a_router_that_starts_again_has_its_routes_from_disk(own_world: World) -> None:
    town = Town(own_world)
    await town.add("a")
    await town.go(to(("a", 1)))
    own_world.restart()
    own_world.wait_until_up()
    await own_world.connected("a-r1-0")
    assert await town.served(2) == {"a": 2}


# ── who steps in ──────────────────────────────────────────────────────────────────────────────────────────


def stands_in(*when: Any, **more: Any) -> wire.TrafficRoute:
    return to(("a", 1), **{"fallbacks": (wire.Fallback("b", when),), **more})


async def fell_back(town: Town, failure: str, **body: Any) -> httpx.Response:
    """The answer that `b` gives in place of `a`, whose failure is counted."""
    answer = await town.ask(**body)
    assert answer.status_code == 200, answer.text
    assert answer.headers["x-quire-model"] == "b"
    assert await town.metric(signals.ROUTE_FALLBACKS, failure=failure, model="b", route="r") == 1
    return answer


@pytest.mark.parametrize("stream", [False, True])
async def test_another_model_steps_in_for_one_that_is_stopped(town: Town, stream: bool) -> None:
    await town.add("a", replicas=0, stopped=True)
    await town.add("b")
    await town.go(stands_in("Unavailable"))
    answer = await fell_back(town, "Unavailable", stream=stream)
    assert '"model":"chat"' in answer.text.replace(" ", "")


async def test_another_model_steps_in_for_one_that_does_not_exist(town: Town) -> None:
    await town.add("b")
    await town.go(stands_in("Unavailable"))
    await fell_back(town, "Unavailable")


async def test_another_model_steps_in_when_engines_die_before_the_first_byte(town: Town) -> None:
    await town.add("a", replicas=2, engine={"die_after": 1, "pace": 0.005})
    await town.add("b")
    await town.go(stands_in("Unavailable", attempts=2))
    await fell_back(town, "Unavailable")
    assert sum(len(engine.generates) for engine in town.engines["a"]) == 2, "its own replicas were tried first"


async def test_nobody_steps_in_after_the_first_byte(town: Town) -> None:
    await town.add("a", engine={"die_after": 3})
    await town.add("b")
    await town.go(stands_in("Unavailable", "Timeout"))
    head, told = await cut(town, max_tokens=50)
    assert b"x-quire-model: a\r\n" in head
    assert told[-1]["error"]["code"] == "engine_died"
    assert not town.engines["b"][0].generates


async def test_nobody_steps_in_for_a_choice_that_waits_while_another_one_is_written(town: Town) -> None:
    await town.add("a", engine={"max_num_seqs": 1, "pace": 0.05}, max_queue_wait=0.4)
    await town.add("b")
    await town.go(stands_in("Timeout"))
    _, told = await cut(town, n=2, max_tokens=60)
    assert told[-1]["error"]["code"] == "timeout"
    assert not town.engines["b"][0].generates


async def test_another_model_steps_in_for_a_full_queue(town: Town) -> None:
    await town.add("a", engine={"stalled": True, "max_num_seqs": 1}, max_queue_length=0, stall_seconds=60.0)
    await town.add("b")
    await town.go(stands_in("QueueFull"))
    waits = asyncio.create_task(town.ask())
    await eventually(lambda: _holds(town.engines["a"][0]))
    await fell_back(town, "QueueFull")
    waits.cancel()
    await asyncio.gather(waits, return_exceptions=True)


async def _holds(engine: WireEngine) -> bool:
    return bool(engine.running)


async def test_another_model_steps_in_for_a_first_token_that_does_not_come(town: Town) -> None:
    await town.add("a", engine={"stalled": True}, stall_seconds=60.0)
    await town.add("b")
    await town.go(stands_in("Timeout", first_token=0.2))
    await fell_back(town, "Timeout")
    (request,) = town.engines["a"][0].generates
    await eventually(lambda: _aborted(town.engines["a"][0], request.id))


async def _aborted(engine: WireEngine, name: str) -> bool:
    return name in engine.aborts


async def test_a_longer_model_steps_in_for_a_prompt_that_is_too_long(town: Town) -> None:
    await town.add("a", max_model_len=40)
    await town.add("b")
    await town.go(stands_in("ContextLengthExceeded"))
    await fell_back(town, "ContextLengthExceeded", messages=[{"role": "user", "content": "word " * 30}])


async def test_a_failure_that_nobody_steps_in_for_is_told_as_it_was(town: Town) -> None:
    await town.add("a", max_model_len=40)
    await town.add("b", replicas=0, stopped=True)
    await town.go(stands_in("Unavailable"))
    long = [{"role": "user", "content": "word " * 30}]
    answer = await town.ask(messages=long)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "context_length_exceeded")
    await town.go(stands_in("ContextLengthExceeded"))
    answer = await town.ask(messages=long)
    assert answer.json()["error"]["code"] == "context_length_exceeded", (
        "the first failure, not that of who stepped in"
    )
    wrong = await town.ask(temperature=-1)
    assert wrong.status_code == 400
    assert await town.metric(signals.ROUTE_FALLBACKS, failure="ContextLengthExceeded", model="b", route="r") == 1


# ── how long, and how often ───────────────────────────────────────────────────────────────────────────────


async def test_r25_the_first_token_has_its_time_and_a_stream_goes_on_after_it(town: Town) -> None:
    await town.add("a", engine={"pace": 0.05}, stall_seconds=60.0)
    await town.go(to(("a", 1), first_token=0.4))
    answer = await town.ask(max_tokens=12)
    assert answer.status_code == 200, "it took longer than its first token may"
    town.engines["a"][0].stalled = True
    over = []
    for _ in range(times(1, 25)):
        answer, took = await town.timed()
        over.append(took - 0.4)
        assert (answer.status_code, answer.json()["error"]["code"]) == (504, "timeout")
        assert "0.4 seconds that its route allows" in answer.json()["error"]["message"]
    record({"system": "a route's time for the first token is over: how late it is told", **spread(over)})
    assert min(over) >= -0.01
    assert max(over) < LATE


@pytest.mark.parametrize("own", [None, 0.15])
async def test_r25_a_request_ends_with_the_smaller_of_its_times_and_its_blocks_are_free(
    town: Town, own: float | None
) -> None:
    await town.add("a", engine={"pace": 0.02})
    await town.go(to(("a", 1), request=0.3 if own is None else 5.0, fallbacks=(wire.Fallback("a", ("Timeout",)),)))
    mine: dict[str, Any] = {"max_tokens": 200} if own is None else {"max_tokens": 200, "timeout": own}
    engine, over = town.engines["a"][0], []
    for ended in range(times(1, 25)):
        whole, took = await town.timed(**mine)
        over.append(took - (own or 0.3))
        assert (whole.status_code, whole.json()["error"]["code"]) == (504, "timeout")
        assert ("its route allows" in whole.text) is (own is None)
        began = time.monotonic()
        _, events = await cut(town, **mine)
        over.append(time.monotonic() - began - (own or 0.3))
        assert [event["error"]["code"] for event in events if "error" in event] == ["timeout"]
        assert "error" in events[-1]
        assert len(events) > 3
        await eventually(lambda: _idle(engine, 2 * ended + 2), min(bound(0.2), 10))  # noqa: B023
    record(
        {
            "system": f"time is over, {'its route' if own is None else 'its own'}: how late it is told",
            **spread(over),
        }
    )
    assert min(over) >= -0.01
    assert max(over) < LATE


async def _idle(engine: WireEngine, aborts: int) -> bool:
    return not engine.running and len(engine.aborts) == aborts


@pytest.mark.parametrize(
    ("attempts", "retried", "tried"),
    [(1, ("ConnectionError", "503"), 1), (5, ("503",), 1), (5, ("ConnectionError",), 5)],
)
async def test_attempts_are_as_many_as_the_route_says(
    town: Town, attempts: int, retried: tuple[Any, ...], tried: int
) -> None:
    await town.add("a", replicas=5, engine={"die_after": 1, "pace": 0.005})
    await town.go(to(("a", 1), attempts=attempts, retried=retried))
    assert (await town.ask()).status_code == 502
    assert sum(len(engine.generates) for engine in town.engines["a"]) == tried


# ── copies ────────────────────────────────────────────────────────────────────────────────────────────────


async def copies(town: Town, finish: str) -> float:
    return await town.metric(signals.ROUTE_MIRRORED, finish=finish, model="b", route="r")


async def test_a_share_of_the_requests_is_copied_and_nothing_is_stored_of_it(town: Town) -> None:
    await town.add("a")
    await town.add("b")
    await town.go(to(("a", 1), mirror=wire.Mirror("b", 50)))
    assert await town.served(10) == {"a": 10}
    await eventually(lambda: _are(town, "completed", 5))
    assert [request.background for request in town.engines["b"][0].generates] == [True] * 5
    assert await town.metric(signals.ROUTE_REQUESTS, route="r", model="a") == 10
    rows = f"file:{town.world.folder}/router/router.db?mode=ro"
    with contextlib.closing(sqlite3.connect(rows, uri=True)) as store:
        (before,) = store.execute("SELECT count(*) FROM responses").fetchone()
        async with httpx.AsyncClient(base_url=town.world.url, timeout=20) as http:
            for _ in range(2):
                kept = await http.post("/v1/responses", json={"model": "chat", "input": "x"})
                assert kept.status_code == 200, kept.text
        await eventually(lambda: _are(town, "completed", 6))
        assert store.execute("SELECT count(*) FROM responses").fetchone() == (before + 2,)


async def _are(town: Town, finish: str, count: int) -> bool:
    return await copies(town, finish) == count


async def test_a_copy_neither_delays_nor_fails_the_request(town: Town) -> None:
    await town.add("a")
    await town.add("b", engine={"stalled": True, "max_num_seqs": 2}, stall_seconds=60.0)
    await town.go(to(("a", 1), mirror=wire.Mirror("b", 100)))
    began = asyncio.get_running_loop().time()
    assert await town.served(5) == {"a": 5}
    assert asyncio.get_running_loop().time() - began < 5
    assert len(town.engines["b"][0].running) == 2, "as many as it has places for"
    assert await copies(town, "dropped") == 3
    await town.engines["b"][0].stop()
    assert await town.served(2) == {"a": 2}
    assert await copies(town, "dropped") == 5
    await town.world.table(town.models["a"], routes=[to(("a", 1), mirror=wire.Mirror("b", 100))])
    assert await town.served(1) == {"a": 1}, "the model of the copies is gone"


# ── batches and responses in the background ───────────────────────────────────────────────────────────────


async def test_lines_of_batches_and_responses_in_the_background_go_by_routes(town: Town) -> None:
    await town.add("a", replicas=0, stopped=True)
    await town.add("b")
    await town.go(stands_in("Unavailable", request=0.001))
    client = town.world.client()
    lines = [
        {"custom_id": str(n), "method": "POST", "url": "/v1/chat/completions", "body": CHAT} for n in range(4)
    ]
    text = "\n".join(json.dumps(line) for line in lines).encode()
    file = await client.files.create(file=("in.jsonl", text), purpose="batch")
    batch = await client.batches.create(
        input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h"
    )

    async def done() -> Any:
        found = await client.batches.retrieve(batch.id)
        return found if found.status == "completed" else None

    found = await eventually(done)
    assert found.request_counts.completed == 4
    response = await client.responses.create(model="chat", input="x", background=True, max_output_tokens=3)

    async def ended() -> Any:
        told = await client.responses.retrieve(response.id)
        return told if told.status not in ("queued", "in_progress") else None

    assert (await eventually(ended)).status in ("completed", "incomplete")
    await client.close()


async def test_an_unknown_name_is_told_what_is_served_first_and_how_much_more_there_is(town: Town) -> None:
    await town.add("zebra")
    await town.add("cold", replicas=0, names=tuple(f"c{n}" for n in range(9)))
    await town.go(to(("gone", 1), names=("dead",)))
    answer = await town.ask(model="nobody")
    assert (answer.status_code, answer.json()["error"]["message"]) == (
        404,
        "The model 'nobody' does not exist. Models here: zebra, c0, c1, c2, c3, c4, c5, c6 and 2 more, which GET "
        "/v1/models lists.",
    )
