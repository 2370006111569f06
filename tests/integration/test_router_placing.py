"""Where sequences go and how long they may take: families, prefixes, priorities, deadlines, full engines."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from tests.effort import EFFORT, bound, times
from tests.figures import record, spread
from tests.integration.house import Replica
from tests.integration.router_world import ASK, CHAT, TEXT, World, big, events, eventually
from tests.integration.wire_engine import WireEngine

from quire import builtin
from quire.router.desk import OwnDesk
from quire.router.fleet import Fleet
from quire_schemas import signals, wire
from quire_schemas.keys import Digest, new_key
from quire_schemas.openai.answer import ErrorBody, Usage
from quire_schemas.workers import Wanted

LATE = 0.1 if EFFORT > 1 else 1.5
"""Seconds after its deadline in which a request has its answer; in CI the machine has other things to do."""
COMPLETION: dict[str, Any] = {"model": "tiny", "max_tokens": 4}


def http_of(world: World) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=world.url, timeout=30)


async def complete(http: httpx.AsyncClient, prompt: object, **more: object) -> Any:
    answer = await http.post("/v1/completions", json={**COMPLETION, "prompt": prompt, **more})
    assert answer.status_code == 200, answer.text
    return answer.json()


# ── families ──────────────────────────────────────────────────────────────────────────────────────────────


async def test_the_choices_of_one_prompt_are_a_family_on_one_replica(world: World) -> None:
    engines = [await world.engine("fa"), await world.engine("fb")]
    await world.serve(*engines)
    async with http_of(world) as http:
        await asyncio.gather(*(complete(http, f"ask {number}", n=3) for number in range(6)))
        two = [await complete(http, ["one", "two"], n=2), await complete(http, "alone")]
    assert [len(answer["choices"]) for answer in two] == [4, 1]
    places: dict[tuple[str | None, tuple[int, ...]], list[str]] = {}
    for engine in engines:
        for request in engine.generates:
            places.setdefault((request.family, tuple(request.token_ids)), []).append(engine.replica_id)
    alone = [where for (family, _), where in places.items() if family is None]
    assert [len(where) for where in alone] == [1], "a single sequence is no family"
    families = {key: where for key, where in places.items() if key[0] is not None}
    assert sorted(len(where) for where in families.values()) == [2, 2, 3, 3, 3, 3, 3, 3]
    assert all(len(set(where)) == 1 for where in families.values()), "one prompt, one replica"
    assert len({family for family, _ in families}) == 7, "every request is a family of its own"
    assert {where[0] for where in families.values()} == {"fa", "fb"}, "requests still spread"


async def test_a_family_that_loses_its_engine_starts_again_together(world: World) -> None:
    engines = [await world.engine("la", stalled=True), await world.engine("lb", stalled=True)]
    await world.serve(*engines)
    async with http_of(world) as http:
        asked = asyncio.create_task(http.post("/v1/chat/completions", json={**CHAT, "n": 3}))

        async def there() -> WireEngine | None:
            return next((engine for engine in engines if len(engine.running) == 3), None)

        first = await eventually(there)
        other = next(engine for engine in engines if engine is not first)
        other.stalled = False
        await first.stop()
        answer = await asked
    assert [choice["message"]["content"] for choice in answer.json()["choices"]] == [TEXT] * 3
    assert {request.family for request in other.generates} == {request.family for request in first.generates}


async def test_a_family_does_not_insist_on_a_replica_without_places(world: World) -> None:
    engines = [await world.engine("pa", max_num_seqs=1), await world.engine("pb", max_num_seqs=1)]
    await world.serve(*engines, max_queue_length=0)
    async with http_of(world) as http:
        answer = await complete(http, "both", n=2)
    assert len(answer["choices"]) == 2
    assert [len(engine.generates) for engine in engines] == [1, 1]


# ── cached prefixes ───────────────────────────────────────────────────────────────────────────────────────

SHARED = list(range(100, 420))


async def test_a_request_goes_where_its_beginning_is_cached_until_that_costs_more_than_it_saves(
    world: World,
) -> None:
    engines = [await world.engine("ca"), await world.engine("cb")]
    await world.serve(*engines, prefix_caching=True, stall_seconds=30.0)
    taken: list[str] = []

    async def ask(http: httpx.AsyncClient, *own: int, **more: object) -> asyncio.Task[Any]:
        """Which replica got it is the last of `taken` then."""
        asked = asyncio.create_task(complete(http, [*SHARED, *own], **more))

        async def arrived() -> bool:
            return sum(len(engine.generates) for engine in engines) > len(taken)

        before = [len(engine.generates) for engine in engines]
        await eventually(arrived)
        taken.extend(e.replica_id for e, count in zip(engines, before, strict=True) if len(e.generates) > count)
        return asked

    async with http_of(world) as http:
        for number in range(5):
            await (await ask(http, number))
        await (await ask(http, 6, cache_salt="another tenant's"))
        home, other = taken[0], taken[-1]
        assert taken == [home] * 5 + [other], "one replica for what begins alike"
        assert home != other, "another salt finds nothing; the replica that has served less is next"
        taken.clear()
        for engine in engines:
            engine.generates.clear()
            engine.stalled = True
        # each has a token of its own to compute and a hundred to write; 320 are cached
        tasks = [await ask(http, number, max_tokens=100) for number in range(5)]
        assert taken == [home] * 4 + [other], "4 * 101 tokens of work outweigh the 320 that are saved"
        for engine in engines:
            engine.stalled = False
        await asyncio.gather(*tasks)


async def test_what_a_replica_had_cached_goes_with_its_engine(world: World) -> None:
    engines = [await world.engine("ga"), await world.engine("gb")]
    await world.serve(*engines, prefix_caching=True)
    async with http_of(world) as http:
        await complete(http, [*SHARED, 1])
        home = next(engine for engine in engines if engine.generates)
        other = next(engine for engine in engines if engine is not home)
        home.cut()
        await eventually(lambda: world.is_ready(2))
        await complete(http, [*SHARED, 2])
    assert len(other.generates) == 1, "it is a new life, in which it has served once and computed nothing"


async def test_a_replica_that_is_not_cached_anywhere_is_found_by_its_load(world: World) -> None:
    engines = [await world.engine("na"), await world.engine("nb")]
    await world.serve(*engines, prefix_caching=False)
    async with http_of(world) as http:
        for number in range(4):
            await complete(http, [*SHARED, number])
    assert [len(engine.generates) for engine in engines] == [2, 2], "without a cache they take turns"


async def test_cached_tokens_are_told_once_per_prompt(world: World) -> None:
    """Siblings share what the first of them computes: only what none of them computed was there before."""

    def cached(request: wire.Generate) -> int:
        return 16 if request.id.endswith("-0-0") or request.family is None else 48

    engine = await world.engine(cached=cached)
    await world.serve(engine)
    prompts = [list(range(50)), list(range(60))]
    async with world.client() as client:
        chat = await client.chat.completions.create(model="tiny", messages=ASK, n=3, max_tokens=3)
        stopped = await client.chat.completions.create(model="tiny", messages=ASK, stop=TEXT[0])
        texts = await client.completions.create(model="tiny", prompt=prompts, n=2, max_tokens=3)
        options: Any = {"include_usage": True, "continuous_usage_stats": True}
        stream = await client.chat.completions.create(
            model="tiny", messages=ASK, max_tokens=3, stream=True, stream_options=options
        )
        usages = [chunk.usage async for chunk in stream if chunk.usage is not None]
    found = [
        answer.usage.prompt_tokens_details.cached_tokens
        for answer in (chat, stopped, texts)
        if answer.usage is not None and answer.usage.prompt_tokens_details is not None
    ]
    assert found == [16, 16, 16 + 48]
    told = [usage.prompt_tokens_details.cached_tokens for usage in usages if usage.prompt_tokens_details]
    assert len(told) == len(usages)
    assert set(told) == {16}


async def test_metrics_tell_of_the_prefix_cache(world: World) -> None:
    await world.serve(await world.engine())

    async def there() -> bool:
        found = await world.metrics()
        labels = '{model="tiny",replica="r1"}'
        return [
            found[f"{signals.PREFIX_CACHE_QUERIES}_total{labels}"],
            found[f"{signals.PREFIX_CACHE_HITS}_total{labels}"],
            found[f"{signals.PREFIX_CACHE_BLOCKS}{labels}"],
            found[f"{signals.KV_BLOCKS_SAVED}{labels}"],
        ] == [1000, 750, 12, 5]

    await eventually(there)


@pytest.fixture
def real(world: World) -> Iterator[Replica]:
    """The built-in model in an engine process that keeps prefixes."""
    folder: Path = world.folder / "cached"
    replica = Replica(folder, "real", prefix_caching=True, num_blocks=64, max_num_batched_tokens=128)
    replica.start()
    yield replica
    replica.begin_to_end()
    replica.end()


async def test_a_real_engine_computes_a_shared_beginning_once(world: World, real: Replica) -> None:
    endpoint = wire.ReplicaEndpoint(real.name, 1, str(real.socket))
    await world.table(world.route(endpoint, tokenizer_dir=str(builtin.path("tiny")), prefix_caching=True))
    await eventually(lambda: world.is_connected(real.name), 60)
    shared = list(range(100, 260))

    async with http_of(world) as http:

        async def ask(own: int, **more: object) -> tuple[int, list[str]]:
            answer = await complete(http, [*shared, own], temperature=0, **more)
            usage = Usage.model_validate(answer["usage"])
            assert usage.prompt_tokens_details is not None
            assert usage.prompt_tokens == 161
            return usage.prompt_tokens_details.cached_tokens, [choice["text"] for choice in answer["choices"]]

        cold, first = await ask(300)
        warm, second = await ask(300)
        others, _ = await ask(301)
        salted, third = await ask(300, cache_salt="mine")
        again, fourth = await ask(300, cache_salt="mine", n=3)
    assert (cold, warm, others, salted, again) == (0, 160, 160, 0, 160)
    assert first == second == third, "the same tokens, computed or found"
    assert fourth == first * 3
    labels = '{model="tiny",replica="real"}'

    async def counted() -> bool:
        found = await world.metrics()
        queries = found[f"{signals.PREFIX_CACHE_QUERIES}_total{labels}"]
        hits = found[f"{signals.PREFIX_CACHE_HITS}_total{labels}"]
        return (queries, hits) == (7 * 161, 5 * 160) and found[f"{signals.PREFIX_CACHE_BLOCKS}{labels}"] >= 20

    await eventually(counted)
    await late(world, {**CHAT, "max_tokens": 400, "ignore_eos": True}, 0.1)  # it takes a third of a second
    await eventually(real.is_empty)
    await nothing_tells_whether_another_tenant_has_asked(world, endpoint)


async def nothing_tells_whether_another_tenant_has_asked(world: World, endpoint: wire.ReplicaEndpoint) -> None:
    """T19: neither what the engine says that it had cached, nor how long it takes."""
    keys = {"red": new_key(), "blue": new_key()}
    digests = {name: Digest.of(key) for name, key in keys.items()}
    tenants = tuple(
        wire.Tenant(name, (wire.AccessKey("k", digest.sha256, digest.id),)) for name, digest in digests.items()
    )
    tokenizer = str(builtin.path("tiny"))
    await world.table(world.route(endpoint, tokenizer_dir=tokenizer, prefix_caching=True), access=tenants)
    drawn, sooner, rounds = random.Random(5), 0, times(2, 40)
    async with http_of(world) as http:

        async def ask(who: str, prompt: list[int], **more: Any) -> tuple[int, float]:
            headers, began = {"Authorization": f"Bearer {keys[who]}"}, time.monotonic()
            body = {**COMPLETION, "prompt": prompt, "max_tokens": 1, **more}
            answer = await http.post("/v1/completions", json=body, headers=headers)
            took = time.monotonic() - began
            assert answer.status_code == 200, answer.text
            usage = Usage.model_validate(answer.json()["usage"])
            assert usage.prompt_tokens_details is not None
            return usage.prompt_tokens_details.cached_tokens, took

        for number in range(rounds):
            asked, fresh = ([drawn.randrange(100, 2000) for _ in range(161)] for _ in range(2))
            salt = {"cache_salt": "s"} if number % 2 else {}
            assert (await ask("red", asked, **salt))[0] == 0
            assert (await ask("red", asked, **salt))[0] == 160, "he finds his own"
            took = {}
            for which in drawn.sample((0, 1), 2):
                cached, took[which] = await ask("blue", (asked, fresh)[which], **salt)
                assert cached == 0
            sooner += took[0] < took[1]
    if EFFORT > 1:
        assert abs(2 * sooner - rounds) < 4 * rounds**0.5, (
            f"{sooner} of {rounds} times what red has asked was sooner"
        )


# ── priorities ────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_priority_is_honoured_where_the_model_has_priorities_and_refused_by_name_elsewhere(
    world: World,
) -> None:
    engine = await world.engine()
    await world.serve(engine)
    async with world.client() as client:
        with pytest.raises(openai.BadRequestError, match=r"batching\.policy is not 'priority'") as caught:
            await client.chat.completions.create(model="tiny", messages=ASK, extra_body={"priority": -1})
        assert caught.value.param == "priority"
        await client.chat.completions.create(model="tiny", messages=ASK, extra_body={"priority": 0})
        await world.table(world.route(engine.endpoint(), policy="priority"))
        await client.chat.completions.create(
            model="tiny", messages=ASK, extra_body={"priority": -7, "cache_salt": "s"}
        )
        await client.completions.create(model="tiny", prompt="x", n=2, extra_body={"priority": 3})
    assert [request.priority for request in engine.generates] == [0, -7, 3, 3]
    assert [request.cache_salt for request in engine.generates] == ["", "s", "", ""]


async def test_who_waits_too_long_is_told_by_priority(world: World) -> None:
    """The urgent one came last and is being computed, a long prompt; the one that waits is the older one."""
    engine = await world.engine(max_num_seqs=1, by_priority=True, stalled=True)
    await world.serve(engine, policy="priority", max_queue_wait=0.5, stall_seconds=30.0)
    async with http_of(world) as http:

        async def ask(priority: int) -> httpx.Response:
            return await http.post("/v1/chat/completions", json={**CHAT, "priority": priority})

        async def there(count: int) -> bool:
            return len(engine.running) == count

        patient = asyncio.create_task(ask(2))
        await eventually(lambda: there(1))
        urgent = asyncio.create_task(ask(-1))
        await eventually(lambda: there(2))
        waited = await patient
        await asyncio.sleep(0.6)  # the engine's last word is that one waits; it is not the one that is left
        engine.stalled = False
        whole = await urgent
    assert (waited.status_code, waited.json()["error"]["code"]) == (504, "timeout")
    assert whole.status_code == 200


# ── deadlines and full engines ────────────────────────────────────────────────────────────────────────────


async def late(world: World, body: dict[str, Any], asked: float) -> float:
    """Ask for what its engine does not end in time; it is told so after `asked` seconds, and not later. How much
    later it was."""
    async with http_of(world) as http:
        began = time.monotonic()
        answer = await http.post("/v1/chat/completions", json={**body, "timeout": asked})
        over = time.monotonic() - began - asked
    assert -0.01 <= over < LATE
    assert (answer.status_code, answer.json()["error"]["code"]) == (504, "timeout")
    assert answer.headers["x-should-retry"] == "false"
    assert "'timeout'" in answer.json()["error"]["message"]
    return over


async def test_r25_a_request_ends_when_its_own_time_is_over(world: World) -> None:
    await world.table(world.route())
    over = [await late(world, CHAT, 0.2) for _ in range(times(1, 17))]  # held, no replica is there
    stuck = await world.engine("stuck", stalled=True)
    await world.serve(stuck, stall_seconds=30.0)
    for count in range(1, 1 + times(1, 17)):
        over.append(await late(world, {**CHAT, "n": 2}, 0.4))  # the engine never says a word

        async def gone(count: int = count) -> bool:
            return len(stuck.aborts) == 2 * count and not stuck.running

        await eventually(gone, min(bound(0.2), 10))
    assert all(0 < (request.timeout or 0) <= 0.4 for request in stuck.generates), "the engine knows, too"
    stuck.stalled, stuck.pace = False, 0.02
    over += [await late(world, CHAT, 0.5) for _ in range(times(1, 17))]  # in the middle of a whole answer
    record({"system": "a request's own time is over: how late it is told", **spread(over)})
    found = await world.metrics()
    assert found[f'{signals.REQUESTS}_total{{finish="error",model="tiny",operation="chat"}}'] >= 3
    async with http_of(world) as http:
        answer = await http.post("/v1/chat/completions", json={**CHAT, "timeout": 20, "max_tokens": 3})
    assert answer.status_code == 200


async def test_a_stream_whose_time_is_over_ends_in_one_error_event(world: World) -> None:
    engine = await world.engine(pace=0.02)
    await world.serve(engine)
    got = events(await world.raw(world.post("/v1/chat/completions", big(stream=True, timeout=0.5))))
    assert got[-1]["error"]["code"] == "timeout"
    assert "DONE" not in got
    assert len([event for event in got if "error" in event]) == 1
    assert len(got) > 3

    async def gone() -> bool:
        return not engine.running

    await eventually(gone)


async def test_an_engine_that_keeps_the_time_is_believed(world: World) -> None:
    engine = await world.engine(fail_with="timeout")
    await world.serve(engine)
    async with http_of(world) as http:
        answer = await http.post("/v1/chat/completions", json={**CHAT, "timeout": 9})
    assert (answer.status_code, answer.json()["error"]["code"]) == (504, "timeout")


@pytest.mark.parametrize("stream", [False, True])
async def test_a_full_engine_is_a_429_like_the_routers_own(world: World, stream: bool) -> None:
    engine = await world.engine(fail_with="queue_full")
    await world.serve(engine)
    async with http_of(world) as http:
        answer = await http.post("/v1/chat/completions", json={**CHAT, "stream": stream})
    error = ErrorBody.model_validate_json(answer.content).error
    assert (answer.status_code, error.type, error.code) == (429, "rate_limit_exceeded", "queue_full")
    assert answer.headers["retry-after"] == "1"
    assert answer.headers["x-should-retry"] == "true"


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("timeout", 0, "greater than 0"),
        ("timeout", 1e9, "at most 86400"),
        ("timeout", "5", "must be a number"),
        ("cache_salt", "", "must not be empty"),
        ("cache_salt", "s" * 257, "longer than 256"),
        ("cache_salt", 5, "must be a string"),
        ("priority", 1.5, "whole number"),
        ("priority", 2**31, "at most 2147483647"),
    ],
)
async def test_bounds_are_told_by_name(world: World, field: str, value: object, words: str) -> None:
    await world.table(world.route(policy="priority"))
    answer = await world.raw(world.post("/v1/chat/completions", big(**{field: value})))
    error = json.loads(answer.split(b"\r\n\r\n", 1)[1])["error"]
    assert error["param"] == field
    assert words in error["message"]


# ── all of it at once ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.nightly
async def test_mixed_traffic_on_small_pools_alters_no_answer_and_leaks_no_block(world: World) -> None:
    """Families, salts, priorities, deadlines and clients that leave, on two engines that have to preempt."""
    fields: dict[str, Any] = {"max_num_seqs": 6, "num_blocks": 20, "policy": "priority", "max_waiting": 256}
    replicas = [Replica(world.folder / name, name, **fields) for name in ("a", "b")]
    for replica in replicas:
        replica.start()
    rng = random.Random()
    prompts = [[*range(200, 200 + rng.randrange(10, 60)), *rng.sample(range(300, 900), 9)] for _ in range(8)]
    plain: dict[str, Any] = {"model": "tiny", "temperature": 0, "ignore_eos": True, "max_tokens": 60}
    try:
        ends = [wire.ReplicaEndpoint(replica.name, 1, str(replica.socket)) for replica in replicas]
        folder = str(builtin.path("tiny"))
        await world.table(
            world.route(*ends, tokenizer_dir=folder, policy="priority", prefix_caching=True, max_queue_length=256)
        )
        await eventually(lambda: world.is_ready(2), 60)
        async with http_of(world) as http:
            references = [(await complete(http, prompt, **plain))["choices"][0]["text"] for prompt in prompts]

            async def ask() -> str:
                which = rng.randrange(len(prompts))
                body = {
                    **plain,
                    "prompt": prompts[which],
                    "n": rng.choice((1, 1, 2, 4)),
                    "priority": rng.randrange(3),
                }
                body |= rng.choice(
                    ({}, {"cache_salt": "a"}, {"cache_salt": "b"}, {"timeout": rng.uniform(0.05, 3)})
                )
                patience = rng.choice((None, None, None, 0.3))
                try:
                    async with asyncio.timeout(patience):
                        answer = await http.post("/v1/completions", json=body, timeout=120)
                except TimeoutError:
                    return "left"
                if answer.status_code != 200:
                    assert (answer.status_code, answer.json()["error"]["code"]) == (504, "timeout"), answer.text
                    assert "timeout" in body or "longer for its turn" in answer.text
                    return "late"
                choices = answer.json()["choices"]
                assert [choice["text"] for choice in choices] == [references[which]] * body["n"]
                usage = Usage.model_validate(answer.json()["usage"])
                assert usage.prompt_tokens_details is not None
                assert usage.prompt_tokens_details.cached_tokens < usage.prompt_tokens == len(prompts[which])
                return "whole"

            async def client() -> list[str]:
                return [await ask() for _ in range(30)]

            ended = [word for words in await asyncio.gather(*(client() for _ in range(8))) for word in words]
        assert set(ended) == {"whole", "late", "left"}, "all of it happened"
        for replica in replicas:
            await eventually(replica.is_empty)
            assert (await replica.stats()).preemptions > 0
    finally:
        for replica in replicas:
            replica.begin_to_end()
        for replica in replicas:
            replica.end()


async def test_what_a_lost_engine_had_before_it_is_forgotten_with_it(world: World) -> None:
    """The load of a replica is a sum that is kept up: a connection that breaks takes its part of it along."""
    engine = await world.engine(pace=0.05, die_after=2)
    await world.serve(engine)
    async with httpx.AsyncClient(timeout=20) as http:
        asked = [http.post(f"{world.url}/v1/completions", json={"model": "tiny", "prompt": "a", "stream": True})
                 for _ in range(3)]  # fmt: skip
        ended = await asyncio.gather(*asked, return_exceptions=True)
    assert all(isinstance(each, httpx.HTTPError) for each in ended), "each stream was cut"
    await world.connected(engine.replica_id)
    (load,) = (await world.control(wire.GetRouterStatus())).replicas
    assert load.in_flight == 0


# ── seats ─────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_seat_that_asks_again_leaves_the_replica_where_it_was_to_be_tried(world: World) -> None:
    engine = await world.engine()
    fleet = Fleet(None)
    await fleet.apply(wire.RoutingTable(1, (world.route(engine.endpoint()),)))
    try:
        served = fleet.by_model["tiny"]
        await eventually(lambda: asyncio.sleep(0, served.ready))
        deadline = time.monotonic() + 2
        wanted = Wanted(
            "q", "tiny", served.usable.fingerprint, deadline, prompt_tokens=8, max_tokens=8, attempts=0
        )
        served.suspects.blame(b"f", "death", tried=False)
        seat = OwnDesk(fleet).seat(served, "", background=False)
        for _ in range(2):  # the second time as a worker does that has lost its connection meanwhile
            client = await seat.find(wanted, lambda: b"f", lambda: None, lambda _: None)
            assert client.endpoint.replica_id == engine.replica_id
            assert served.trials == {engine.replica_id}
        assert await seat.has_other(wanted)
        assert not await seat.has_other(wanted, lambda _: False), "none that it could be given to from there"
        seat.end()
        assert not served.trials
    finally:
        await fleet.close()
