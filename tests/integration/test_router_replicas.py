"""Replicas as the router meets them: those that die, stall, drain, stand by, or are somebody else."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from typing import Any

import httpx
import openai
import pytest
from tests.integration.router_world import ASK, CHAT, TEXT, World, big, events, eventually
from tests.integration.wire_engine import WireEngine
from tests.unit.platform import tokenizers_for_tests as made

from quire_schemas import wire


async def test_a_template_that_breaks_the_compiler_takes_only_its_own_model_down(own_world: World) -> None:
    world = own_world
    bad = "".join(f"{{% for a{i} in messages %}}" for i in range(30)) + "{% endfor %}" * 30
    made.write(world.folder / "bad", made.byte_level(), template=bad)
    engine, other = await world.engine(), await world.engine("r2")
    poisoned = world.route(other.endpoint(), model="bad", names=("bad",), tokenizer_dir=str(world.folder / "bad"))
    await world.table(world.route(engine.endpoint()), poisoned)
    for _ in range(2):
        await world.connected("r1")
        async with world.client() as client:
            assert (await client.chat.completions.create(model="tiny", messages=ASK)).choices
            with pytest.raises(openai.InternalServerError) as caught:
                await client.chat.completions.create(model="bad", messages=ASK)
        assert (caught.value.status_code, caught.value.code) == (503, "model_unusable")
        world.restart()
        world.wait_until_up()


async def test_a_replica_on_standby_is_connected_and_gets_nothing(world: World) -> None:
    engine, waiting = await world.engine("on"), await world.engine("standby", vocab_size=100)
    await world.table(world.route(engine.endpoint(), waiting.endpoint(standby=True)))
    await world.connected("on", "standby")
    async with world.client() as client:
        for _ in range(4):
            await client.completions.create(model="tiny", prompt=[300], max_tokens=2)
    assert (len(engine.generates), len(waiting.generates)) == (4, 0)
    await world.table(world.route(engine.endpoint(standby=True), waiting.endpoint()))
    async with world.client() as client:
        with pytest.raises(openai.BadRequestError, match="vocabulary of 100"):
            await client.completions.create(model="tiny", prompt=[300], max_tokens=2)
        await client.completions.create(model="tiny", prompt=[30], max_tokens=2)
    assert (len(engine.generates), len(waiting.generates)) == (4, 1)
    await world.table(world.route(engine.endpoint(), waiting.endpoint()))
    async with world.client() as client:
        with pytest.raises(openai.BadRequestError, match="vocabulary of 100"):
            await client.completions.create(model="tiny", prompt=[300], max_tokens=2)


@pytest.mark.parametrize("same", [True, False], ids=["same content", "other content"])
async def test_ids_only_go_to_replicas_of_the_tokenizer_that_made_them(world: World, same: bool) -> None:
    folder = world.folder / f"next-{same}"
    made.write(folder, made.byte_level(), template=made.CHATML + ("" if same else "."))
    old, new = await world.engine("old", stalled=True), await world.engine("new")
    await world.serve(old)
    async with world.client() as client:
        asked = asyncio.create_task(client.chat.completions.create(model="tiny", messages=ASK))

        async def running() -> bool:
            return bool(old.running)

        await eventually(running)
        await world.table(world.route(new.endpoint(), tokenizer_dir=str(folder)))
        await world.connected("new")
        old.cut()
        if same:
            assert (await asked).choices[0].message.content == TEXT
            return
        with pytest.raises(openai.InternalServerError) as caught:
            await asked
        assert (caught.value.status_code, caught.value.code) == (502, "engine_unavailable")
        assert caught.value.response.headers["x-should-retry"] == "true"
        assert not new.generates
        assert (await client.chat.completions.create(model="tiny", messages=ASK)).choices[
            0
        ].message.content == TEXT


async def test_an_engine_that_dies_before_the_first_byte_is_replaced_unseen(world: World) -> None:
    dying = await world.engine("dying", die_after=1)
    alive = await world.engine("alive", pace=0.01)
    await world.serve(dying, alive)
    async with world.client() as client:
        answers = await asyncio.gather(
            *(client.chat.completions.create(model="tiny", messages=ASK) for _ in range(12))
        )
    assert all(answer.choices[0].message.content == TEXT for answer in answers), "even above the retry budget"
    assert dying.generates, "the balancer should have tried both"


async def test_an_engine_that_dies_in_a_stream_ends_it_with_one_error_event_and_a_cut(world: World) -> None:
    engine = await world.engine(die_after=5)
    await world.serve(engine)
    body = big(stream=True)
    answer = await world.raw(world.post("/v1/chat/completions", body))
    assert not answer.endswith(b"0\r\n\r\n"), "the answer must not look complete"
    got = events(answer)
    assert got[-1]["error"]["code"] == "engine_died"
    assert got[-1]["error"]["type"] == "server_error"
    assert "DONE" not in got
    assert all(event["choices"][0]["finish_reason"] is None for event in got[:-1])
    text = "".join(event["choices"][0]["delta"].get("content", "") for event in got[:-1])
    assert text
    assert TEXT.startswith(text)
    async with world.client() as client:
        stream = await client.chat.completions.create(model="tiny", messages=ASK, stream=True)
        with pytest.raises(openai.APIError, match="engine died"):
            async for _ in stream:
                pass


async def test_retries_are_bounded_and_the_answer_says_to_try_again(world: World) -> None:
    engine = await world.engine(die_after=1)
    await world.serve(engine)
    async with httpx.AsyncClient() as http:
        answer = await http.post(f"{world.url}/v1/chat/completions", json=CHAT, timeout=20)
    assert answer.status_code == 502
    assert answer.json()["error"]["code"] == "engine_unavailable"
    assert answer.headers["x-should-retry"] == "true"
    assert answer.headers["retry-after"] == "1"
    assert len(engine.generates) == 3


async def test_a_model_whose_engines_are_gone_keeps_no_other_from_trying_again(world: World) -> None:
    gone = await world.engine("gone", pace=60.0)
    dying, alive = await world.engine("dying", die_after=1), await world.engine("alive")
    await world.table(
        world.route(gone.endpoint(), model="broken", names=("broken",), max_queue_wait=30.0),
        world.route(dying.endpoint(), alive.endpoint()),
    )
    await world.connected("gone", "dying", "alive")

    async with httpx.AsyncClient() as http:
        url = f"{world.url}/v1/chat/completions"
        body = CHAT | {"model": "broken"}
        stuck = [asyncio.create_task(http.post(url, json=body, timeout=60)) for _ in range(5)]
        await eventually(lambda: at_engine(gone, 5))
        await gone.stop()
        await eventually(lambda: world.holds(5, "broken"))
        answers = await asyncio.gather(*(http.post(url, json=CHAT, timeout=10) for _ in range(6)))
        assert [answer.status_code for answer in answers] == [200] * 6
        assert dying.generates, "the balancer should have tried both"
        assert await world.holds(5, "broken"), "those that wait for their part of the budget count, too"
        for task in stuck:
            task.cancel()


async def test_waits_of_all_attempts_count_together(world: World) -> None:
    engine = await world.engine(text="word " * 100, max_num_seqs=1, pace=0.2)
    await world.serve(engine, max_queue_wait=2.0)
    async with httpx.AsyncClient() as http:
        url = f"{world.url}/v1/chat/completions"
        first = asyncio.create_task(http.post(url, json=CHAT, timeout=30))
        await eventually(lambda: at_engine(engine, 1))
        began = time.monotonic()
        second = asyncio.create_task(http.post(url, json=CHAT, timeout=30))
        await asyncio.sleep(1.6)
        assert not second.done()
        await engine.stop()
        answer = await second
        waited = time.monotonic() - began
        await first
    assert answer.status_code == 502, "1.6 s in the engine's queue, 0.4 s for another replica"
    assert 1.9 < waited < 3.4


async def at_engine(engine: WireEngine, requests: int) -> bool:
    return len(engine.generates) == requests


async def test_a_request_that_the_engine_fails_is_ours_to_word(world: World) -> None:
    engine = await world.engine(fail_with="out_of_memory")
    await world.serve(engine)
    async with httpx.AsyncClient() as http:
        answer = await http.post(f"{world.url}/v1/chat/completions", json=CHAT)
    assert answer.status_code == 500
    assert answer.json()["error"]["code"] == "internal_error"
    assert "secret" not in answer.text
    assert "secret" in (world.folder / "router.log").read_text()
    (world.folder / "router.log").write_text("")  # the fixture looks for tracebacks; this one was asked for


async def test_no_replica_is_waited_for_and_then_refused(world: World) -> None:
    await world.table(world.route(max_queue_wait=0.3, eta=7.5))
    began = time.monotonic()
    async with httpx.AsyncClient() as http:
        answer = await http.post(f"{world.url}/v1/chat/completions", json=CHAT)
    assert 0.25 < time.monotonic() - began < 3
    assert answer.status_code == 503
    assert answer.json()["error"]["code"] == "service_unavailable"
    assert (answer.headers["retry-after"], answer.headers["retry-after-ms"]) == ("8", "7500")


async def test_a_stopped_model_says_so_at_once(world: World) -> None:
    engine = await world.engine()
    await world.serve(engine, stopped=True, max_queue_wait=20.0)
    async with httpx.AsyncClient() as http:
        serving = await http.post(f"{world.url}/v1/chat/completions", json=CHAT)
        assert serving.status_code == 200  # as long as one is there, it serves
        await world.table(world.route(max_queue_wait=20.0))
        held = asyncio.create_task(http.post(f"{world.url}/v1/chat/completions", json=CHAT))
        await asyncio.sleep(0.1)
        began = time.monotonic()
        await world.table(world.route(stopped=True, max_queue_wait=20.0))
        answers = [await held, await http.post(f"{world.url}/v1/chat/completions", json=CHAT)]
    assert time.monotonic() - began < 5
    for answer in answers:
        assert answer.status_code == 503
        error = answer.json()["error"]
        assert error["code"] == "service_unavailable"
        assert error["message"] == "The model 'tiny' is stopped: no replica of it is wanted."
        assert answer.headers["x-should-retry"] == "false"
        assert "retry-after" not in answer.headers


async def test_a_held_request_goes_on_when_a_replica_comes(world: World) -> None:
    await world.table(world.route())
    async with world.client() as client:
        asked = asyncio.create_task(client.chat.completions.create(model="tiny", messages=ASK))
        await eventually(lambda: world.holds(1))
        await world.serve(await world.engine())
        assert (await asked).choices[0].message.content == TEXT
    assert await world.holds(0)


async def test_a_stalled_engine_is_unhealthy_and_gets_nothing_more(world: World) -> None:
    stuck = await world.engine("stuck", stalled=True)
    await world.serve(stuck)
    async with httpx.AsyncClient(base_url=world.url, timeout=20) as http, world.client() as client:
        first = asyncio.create_task(client.chat.completions.create(model="tiny", messages=ASK))

        async def sick() -> bool:
            answer = await http.get("/health")
            return answer.status_code == 503 and answer.json()["models"]["tiny"]["stalled"] == 1

        await eventually(sick)
        good = await world.engine("good")
        await world.table(world.route(stuck.endpoint(), good.endpoint()))
        await world.connected("good")
        assert (await client.chat.completions.create(model="tiny", messages=ASK)).choices
        assert (await first).choices[0].message.content == TEXT, "the stuck one goes to the other, too"
        assert (len(stuck.generates), len(good.generates)) == (1, 2)
        assert len(stuck.aborts) == 1


async def test_an_engine_whose_clock_is_ahead_stalls_like_any_other(world: World) -> None:
    engine = await world.engine("ahead", skew=3600.0, pace=0.02)
    await world.serve(engine)
    asked = asyncio.create_task(world.raw(world.post("/v1/chat/completions", big(stream=True))))

    async def under_way() -> bool:
        return engine.steps > 3

    await eventually(under_way)
    engine.stalled = True
    await eventually(lambda: world.is_ready(0))
    engine.stalled = False
    assert events(await asked)[-1] == "DONE"


async def test_an_engine_with_another_identity_is_not_connected(world: World) -> None:
    engine = await world.engine("r1", incarnation=4)
    other = wire.ReplicaEndpoint("r1", 5, str(engine.socket))
    await world.table(world.route(other))
    await asyncio.sleep(0.3)
    status = await world.control(wire.GetRouterStatus())
    assert (False, 5) in [(load.connected, load.incarnation) for load in status.replicas]
    engine.incarnation = 5
    await world.connected("r1")


async def test_a_replica_that_leaves_keeps_its_streams(world: World) -> None:
    old = await world.engine("old", text="o" * 60, pace=0.01)
    new = await world.engine("new", text="n")
    await world.serve(old)
    async with world.client() as client:
        stream = await client.chat.completions.create(model="tiny", messages=ASK, stream=True)
        first = await anext(aiter(stream))
        assert first.choices[0].delta.role == "assistant"
        status = await world.table(world.route(new.endpoint()))
        assert {load.replica_id: load.in_flight for load in status.replicas} == {"new": 0, "old": 1}
        await world.connected("new")
        other = await client.chat.completions.create(model="tiny", messages=ASK)
        rest = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
    assert other.choices[0].message.content == "n"
    assert rest == "o" * 60

    async def gone() -> bool:
        loads = (await world.control(wire.GetRouterStatus())).replicas
        return [load.replica_id for load in loads] == ["new"]

    await eventually(gone)


@pytest.mark.parametrize("draining", [False, True])
async def test_only_the_loss_of_a_serving_replica_is_a_warning(world: World, draining: bool) -> None:
    engine = await world.engine()
    await world.serve(engine)
    await world.table(world.route(engine.endpoint(draining=draining)))
    await engine.stop()
    log = world.folder / "router.log"

    async def told() -> str | None:
        text = log.read_text()
        return text if "nothing listens" in text else None

    warnings = [line for line in (await eventually(told)).splitlines() if "WARNING" in line]
    assert [line.partition("replica r1: ")[2] for line in warnings] == (
        [] if draining else ["the engine closed the connection"]
    )


async def test_limits_go_to_the_engines_and_their_hash_comes_back(world: World) -> None:
    engine = await world.engine()
    await world.serve(engine)
    limits = wire.Limits(hot_hash="h9", max_num_seqs=2, max_num_batched_tokens=64, chunked_prefill=True)
    await world.control(wire.SetLimits(replica_ids=("r1",), limits=limits))

    async def reported() -> bool:
        return (await world.control(wire.GetRouterStatus())).replicas[0].hot_hash == "h9"

    await eventually(reported)
    assert engine.limits == limits


# ── requests that engines die of ──────────────────────────────────────────────────────────────────────────

POISON = "kills on sight"


def is_poison(world: World) -> Callable[[wire.Generate], bool]:
    return lambda request: POISON in world.tokenizer.decode(request.token_ids, skip_special_tokens=True)


async def two_that_can_be_killed(world: World, name: str, **options: Any) -> tuple[WireEngine, WireEngine]:
    """Two replicas of a model of the test's own name: what is suspected of one test is not of the next."""
    first = await world.engine(f"{name}-1", poison=is_poison(world), **options)
    second = await world.engine(f"{name}-2", poison=is_poison(world), **options)
    await world.serve(first, second, model=name, names=("tiny",))
    return first, second


@pytest.mark.parametrize("stream", [False, True])
async def test_a_request_that_kills_is_tried_once_more_and_then_never_again(world: World, stream: bool) -> None:
    engines = await two_that_can_be_killed(world, f"poison-{stream}")
    bad = {**CHAT, "messages": [{"role": "user", "content": POISON}], "stream": stream}
    async with httpx.AsyncClient(base_url=world.url, timeout=20) as http:
        for attempt in range(4):
            answer = await http.post("/v1/chat/completions", json={**bad, "seed": attempt})
            assert answer.status_code == 502
            assert answer.json()["error"]["code"] == "request_quarantined"
            assert answer.headers["x-should-retry"] == "false"
            assert [engine.deaths for engine in engines] == [1, 1], "each replica once, and that is all"
        several = await http.post("/v1/chat/completions", json={**bad, "n": 2})
        assert several.json()["error"]["code"] == "request_quarantined"
        await eventually(lambda: world.is_ready(2))
        good = await http.post("/v1/chat/completions", json=CHAT)
        assert good.json()["choices"][0]["message"]["content"] == TEXT


async def test_those_who_were_beside_it_are_answered(world: World) -> None:
    """All that ran without a token when the first replica died are suspects; only the guilty one is condemned."""
    engines = await two_that_can_be_killed(world, "beside", pace=0.02)
    asks = [
        {**CHAT, "messages": [{"role": "user", "content": text}]} for text in ("a", "b", "c", POISON, "d", "e")
    ]
    async with httpx.AsyncClient(base_url=world.url, timeout=30) as http:
        answers = await asyncio.gather(*(http.post("/v1/chat/completions", json=ask) for ask in asks))
    assert [answer.status_code for answer in answers] == [200, 200, 200, 502, 200, 200]
    assert all(a.json()["choices"][0]["message"]["content"] == TEXT for a in answers if a.status_code == 200)
    assert sum(engine.deaths for engine in engines) == 2
    async with httpx.AsyncClient(base_url=world.url, timeout=30) as http:
        again = await asyncio.gather(*(http.post("/v1/chat/completions", json=ask) for ask in asks[2:5]))
    assert [answer.status_code for answer in again] == [200, 502, 200]
    assert sum(engine.deaths for engine in engines) == 2


async def test_a_beam_search_that_has_begun_is_no_suspect(world: World) -> None:
    """It brings no token before its end, but word that it could have."""
    name = "search"
    engines = [await world.engine(f"{name}-{number}", die_after=3) for number in range(2)]
    await world.serve(*engines, model=name, names=("tiny",))
    ask = {**CHAT, "n": 2, "max_tokens": 8, "use_beam_search": True, "temperature": 0}
    async with httpx.AsyncClient(base_url=world.url, timeout=20) as http:
        lost = await http.post("/v1/chat/completions", json=ask)
        assert lost.json()["error"]["code"] == "engine_unavailable", "each attempt was lost"
        for engine in engines:
            engine.die_after = None
        await eventually(lambda: world.is_ready(2))
        found = await http.post("/v1/chat/completions", json=ask)
    assert found.status_code == 200, found.text
    assert len(found.json()["choices"]) == 2


async def test_several_choices_of_a_suspect_wait_for_each_other(world: World) -> None:
    first, second = await two_that_can_be_killed(world, "several", stalled=True)
    async with httpx.AsyncClient(base_url=world.url, timeout=20) as http:
        suspect = asyncio.create_task(http.post("/v1/chat/completions", json=CHAT))

        async def at(engine: WireEngine) -> bool:
            return bool(engine.running)

        await eventually(lambda: at(first))
        first.cut()
        await eventually(lambda: at(second))
        suspect.cancel()  # it leaves before it could be cleared
        await eventually(lambda: idle(first, second))
        first.stalled = second.stalled = False
        await eventually(lambda: world.is_ready(2))
        answer = await http.post("/v1/chat/completions", json={**CHAT, "n": 4})
        assert [c["message"]["content"] for c in answer.json()["choices"]] == [TEXT] * 4


async def suspected_after_it_left(world: World, name: str) -> tuple[asyncio.Task[httpx.Response], WireEngine]:
    """A request that has hung the only replica, which has left the table and is not dead yet."""
    stuck = await world.engine(f"{name}-stuck", stalled=True)
    await world.serve(stuck, model=name, names=("tiny",))

    async def ask() -> httpx.Response:
        async with httpx.AsyncClient(base_url=world.url, timeout=30) as http:
            return await http.post("/v1/chat/completions", json=CHAT)

    async def hung() -> bool:
        return bool(stuck.running)

    asked = asyncio.create_task(ask())
    await eventually(hung)
    await world.table(world.route(model=name, names=("tiny",)))
    return asked, stuck


async def test_what_hangs_an_engine_is_suspected_though_the_table_lost_the_replica_first(world: World) -> None:
    asked, stuck = await suspected_after_it_left(world, "left")
    await stuck.stop()
    other = await world.engine("left-other", poison=lambda _: True)
    await world.serve(other, model="left", names=("tiny",))
    answer = await asked
    assert answer.json()["error"]["code"] == "request_quarantined"
    assert other.deaths == 1, "it was there on trial"


async def test_choices_that_are_held_when_their_request_is_suspected_are_tried_in_turn(world: World) -> None:
    asked, stuck = await suspected_after_it_left(world, "held")
    async with httpx.AsyncClient(base_url=world.url, timeout=30) as http:
        several = asyncio.create_task(http.post("/v1/chat/completions", json={**CHAT, "n": 3}))
        await eventually(lambda: world.holds(1, "held"))
        await stuck.stop()
        await eventually(lambda: world.holds(2, "held"))  # the first one is suspected now, and so are the others
        asked.cancel()  # else its own token would clear them
        await eventually(lambda: world.holds(1, "held"))
        await world.serve(await world.engine("held-other"), model="held", names=("tiny",))
        answer = await several
    assert [c["message"]["content"] for c in answer.json()["choices"]] == [TEXT] * 3


async def idle(*engines: WireEngine) -> bool:
    return not any(engine.running for engine in engines)


# ── several sequences of one request ──────────────────────────────────────────────────────────────────────


async def test_a_dead_engine_ends_a_stream_at_once_though_its_other_choice_could_be_tried_again(
    world: World,
) -> None:
    """One choice has been written to the client, the other waits in the same engine's queue."""
    engine = await world.engine("only", max_num_seqs=1, pace=0.02)
    await world.serve(engine, max_queue_wait=30.0)
    asked = asyncio.create_task(world.raw(world.post("/v1/chat/completions", big(stream=True, n=2))))

    async def under_way() -> bool:
        return engine.steps > 3

    await eventually(under_way)
    began = time.monotonic()
    await engine.stop()
    got = events(await asked)
    assert time.monotonic() - began < 5, "and not after the 30 s for which the other could wait"
    assert got[-1]["error"]["code"] == "engine_died"
    assert "DONE" not in got


async def test_what_runs_is_written_while_another_choice_waits_for_a_replica(world: World) -> None:
    """Of two prompts on two replicas one is lost before its first token; the other one's stream goes on."""
    steady, dying = await world.engine("steady", pace=0.02), await world.engine("dying", stalled=True)
    await world.serve(steady, dying)
    body = {"model": "tiny", "prompt": ["a", "b"], "max_tokens": 400, "stream": True}
    asked = asyncio.create_task(world.raw(world.post("/v1/completions", json.dumps(body).encode())))

    async def both() -> bool:
        return bool(steady.running) and bool(dying.running)

    await eventually(both)
    await dying.stop()
    got = events(await asked)
    assert got[-1] == "DONE"
    for index in (0, 1):
        mine = [c["choices"][0] for c in got[:-1] if c["choices"][0]["index"] == index]
        assert "".join(choice["text"] for choice in mine) == TEXT
        assert len([choice for choice in mine if choice["finish_reason"]]) == 1


async def test_an_idle_engine_that_stands_still_is_out_of_rotation_before_a_request_finds_out(
    world: World,
) -> None:
    silent, good = await world.engine("silent"), await world.engine("good")
    await world.serve(silent, good)
    silent.deaf = True
    async with httpx.AsyncClient(base_url=world.url, timeout=20) as http:
        await eventually(lambda: world.is_ready(1))
        assert await world.is_connected("silent", "good"), "its socket is open all the while"
        before = len(silent.generates)
        await asyncio.gather(*(http.post("/v1/chat/completions", json=CHAT) for _ in range(4)))
        assert (len(silent.generates), len(good.generates)) == (before, 4)
        silent.deaf = False
        await eventually(lambda: world.is_ready(2))
