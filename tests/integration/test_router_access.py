"""Keys, scopes, limits and ownership over real sockets: who gets in, what he may do, what is his."""

from __future__ import annotations

import asyncio
import json
import re
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import anthropic
import httpx
import openai
import pytest
from tests.integration.otlp_collector import Collector
from tests.integration.router_world import ASK, TEXT, World, end_world, eventually, make_world
from tests.unit.platform.test_openapi import routes_of_the_router

from quire_schemas import wire
from quire_schemas.keys import Digest, new_key

TEAM, OTHER, SCRAPER = (new_key() for _ in range(3))
BROUGHT = "a-string-of-the-users-own"
CHAT: dict[str, Any] = {"model": "tiny", "messages": ASK}
PUBLIC = {"/livez", "/readyz"}
FAR = {"X-Forwarded-For": "203.0.113.9"}
"""What a proxy adds: such a request is not of this machine."""


def tenant(name: str, *keys: str, **fields: Any) -> wire.Tenant:
    known = []
    for number, key in enumerate(keys):
        digest = Digest.of(key)
        known.append(wire.AccessKey(f"k{number}", digest.sha256, digest.id))
    return wire.Tenant(name, tuple(known), **fields)


ALL = (tenant("other", OTHER), tenant("scraper", SCRAPER, operations=("metrics",)), tenant("team", TEAM, BROUGHT))


async def serve(world: World, *access: wire.Tenant, text: str = TEXT, **changes: Any) -> None:
    engine = await world.engine(text=text)
    await world.table(world.route(engine.endpoint(), **changes), access=access or ALL)
    await world.connected(engine.replica_id)


def headed(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


@pytest.fixture
async def http(world: World) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=world.url, timeout=20) as client:
        yield client


def at(path: str) -> str:
    """A path with something in place of its parameters."""
    return re.sub(r"{(\w+):?\w*}", "x", path)


# ── who gets in ───────────────────────────────────────────────────────────────────────────────────────────


async def test_every_route_needs_a_key_but_those_that_are_named(world: World, http: httpx.AsyncClient) -> None:
    await serve(world)
    routes = list(routes_of_the_router())
    assert len(routes) > 30
    for method, path in routes:
        answer = await http.request(method, at(path), headers=FAR)
        assert (answer.status_code == 401) == (path not in PUBLIC), (method, path, answer.status_code)
        wrong = await http.request(method, at(path), headers={**FAR, **headed(new_key())})
        assert (wrong.status_code == 401) == (path not in PUBLIC), (method, path)
        known = await http.request(method, at(path), headers={**FAR, **headed(TEAM)})
        assert known.status_code != 401, (method, path)
        # whoever may do one thing alone may do no other
        if method != "HEAD" and path not in PUBLIC | {
            "/v1/models",
            "/v1/models/{name}",
            "/openapi.json",
            "/health",
        }:
            scraper = await http.request(method, at(path), headers={**FAR, **headed(SCRAPER)})
            assert (scraper.status_code == 403) == (path != "/metrics"), (method, path, scraper.status_code)


async def test_what_leads_nowhere_needs_a_key_too(world: World, http: httpx.AsyncClient) -> None:
    await serve(world)
    for method, path in [
        ("GET", "/"), ("GET", "/v1/nothing"), ("GET", "/livez/../v1/models"), ("GET", "/v1%2fmodels"),
        ("DELETE", "/v1/chat/completions"), ("OPTIONS", "/v1/models"), ("PUT", "/livez"), ("GET", "/V1/MODELS"),
        ("GET", "/v1/models/"), ("GET", "/v1/models;/livez"), ("GET", "/livez%00/v1/models"),
        ("GET", "//v1/models"), ("GET", "/v1/audio/speech"), ("GET", "//v1//models"), ("POST", "//v1/messages"),
    ]:  # fmt: skip
        raw = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode()
        answer = await world.raw(raw)
        assert answer.split(b" ")[1] == b"401", (method, path, answer[:200])
    # the target's own host is no part of the path that is looked at
    for target in ("http://localhost/v1/models", "http://localhost/livez/../v1/models", "http://livez/v1/models"):
        raw = f"GET {target} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode()
        assert (await world.raw(raw)).split(b" ")[1] in (b"401", b"400", b"421"), target


async def test_a_refusal_says_how_to_prove_who_one_is(world: World, http: httpx.AsyncClient) -> None:
    await serve(world)
    answer = await http.post("/v1/chat/completions", json=CHAT)
    assert answer.status_code == 401
    assert answer.headers["www-authenticate"] == "Bearer"
    assert answer.headers["x-request-id"]
    assert answer.json()["error"]["type"] == "authentication_error"
    assert answer.json()["error"]["code"] == "invalid_api_key"
    answer = await http.post("/v1/messages", json=CHAT)
    assert (answer.status_code, answer.json()["error"]["type"]) == (401, "authentication_error")
    assert answer.json()["type"] == "error"


@pytest.mark.parametrize("key", [TEAM, BROUGHT], ids=["ours", "brought"])
async def test_a_key_is_taken_where_clients_put_it(world: World, http: httpx.AsyncClient, key: str) -> None:
    await serve(world)
    good = [{"Authorization": f"Bearer {key}"}, {"authorization": f"bearer  {key}"}, {"x-api-key": key}]
    bad = [
        {"Authorization": key}, {"Authorization": f"Basic {key}"}, {"Authorization": f"Bearer {key}x"},
        {"Authorization": f"Bearer {key[:-1]}"}, {"Authorization": "Bearer"}, {"x-api-key": ""}, {"cookie": key},
        {"Authorization": f"Bearer {key.upper()}"}, {"Authorization": f"Bearer {Digest.of(key).sha256}"},
        {"Authorization": f"Bearer {Digest.of(key)}"}, {"Authorization": "Bearer " + "x" * 8000},
        {"Authorization": f"Bearer {new_key()}", "x-api-key": key},
    ]  # fmt: skip
    for headers in good:
        assert (await http.get("/v1/models", headers=headers)).status_code == 200, headers
    for headers in bad:
        assert (await http.get("/v1/models", headers=headers)).status_code == 401, headers
    twice = [("Authorization", f"Bearer {key}"), ("Authorization", f"Bearer {key}")]
    assert (await http.get("/v1/models", headers=twice)).status_code == 401
    assert (await http.get(f"/v1/models?api_key={key}")).status_code == 401
    forged = re.sub("_[0-9a-f]{64}", "_" + "0" * 64, TEAM)
    assert (await http.get("/v1/models", headers=headed(forged))).status_code == 401, "the id alone is no key"


async def test_a_client_that_sends_a_lot_without_a_key_learns_why_it_is_refused(world: World) -> None:
    await serve(world)
    async with world.client() as client:
        with pytest.raises(openai.AuthenticationError):
            await client.chat.completions.create(
                model="tiny", messages=[{"role": "user", "content": "x" * 3_000_000}]
            )


async def test_official_clients_raise_their_own_errors(world: World) -> None:
    await serve(world, tenant("team", TEAM, models=("tiny",), operations=("chat", "messages")))
    async with openai.AsyncOpenAI(base_url=f"{world.url}/v1", api_key=new_key(), max_retries=0) as client:
        with pytest.raises(openai.AuthenticationError) as refused:
            await client.chat.completions.create(**CHAT)
        assert refused.value.code == "invalid_api_key"
    async with openai.AsyncOpenAI(base_url=f"{world.url}/v1", api_key=TEAM, max_retries=0) as client:
        assert (await client.chat.completions.create(**CHAT)).choices[0].message.content == TEXT
        with pytest.raises(openai.PermissionDeniedError):
            await client.completions.create(model="tiny", prompt="x")
        with pytest.raises(openai.PermissionDeniedError):
            await client.chat.completions.create(model="org/tiny", messages=ASK)
    talk: dict[str, Any] = {"model": "tiny", "messages": ASK, "max_tokens": 5}
    async with anthropic.AsyncAnthropic(base_url=world.url, api_key=new_key(), max_retries=0) as claude:
        with pytest.raises(anthropic.AuthenticationError):
            await claude.messages.create(**talk)
    async with anthropic.AsyncAnthropic(base_url=world.url, api_key=TEAM, max_retries=0) as claude:
        assert (await claude.messages.create(**talk)).content
        with pytest.raises(anthropic.PermissionDeniedError):
            await claude.messages.create(**{**talk, "model": "org/tiny"})
    async with anthropic.AsyncAnthropic(base_url=world.url, auth_token=TEAM, max_retries=0) as claude:
        assert (await claude.messages.count_tokens(model="tiny", messages=ASK)).input_tokens


async def test_who_was_refused_is_in_the_log_and_counted_by_policy(world: World, http: httpx.AsyncClient) -> None:
    few = (wire.AccessLimit("policy", requests=1, per=3_600_000),)
    team = tenant("team", TEAM, models=("tiny",), operations=("chat",), limits=few)
    engine = await world.engine()
    known = (team, tenant("other", OTHER))
    await world.table(world.route(engine.endpoint()), access=known, access_log="all")
    await world.connected(engine.replica_id)
    for path, model, key, status in (
        ("chat/completions", "tiny", TEAM, 200),
        ("chat/completions", "tiny", TEAM, 429),
        ("chat/completions", "secret-name", TEAM, 429),
        ("completions", "tiny", TEAM, 403),
        ("chat/completions", "tiny", new_key(), 401),
        ("chat/completions", "none", OTHER, 404),
    ):
        answer = await http.post(f"/v1/{path}", json={**CHAT, "model": model}, headers=headed(key))
        assert answer.status_code == status, answer.text
    for path in ("files", "models/none"):
        assert (await http.get(f"/v1/{path}", headers=headed(TEAM))).status_code == 403

    async def all_there() -> list[dict[str, str]] | None:
        text = (world.folder / "router.log").read_text()
        found = [dict(re.findall(r"(\w+)=(\S+)", line)) for line in text.splitlines() if "quire.access: " in line]
        return found if len(found) >= 8 else None

    found = await eventually(all_there)
    told = [tuple(line.get(name) for name in ("policy", "key", "model", "error")) for line in found]
    assert told == [
        ("team", "k0", "tiny", None),
        ("team", "k0", "tiny", "rate_limit_exceeded"),
        ("team", "k0", None, "rate_limit_exceeded"),
        ("team", "k0", None, "permission_denied"),
        (None, None, None, "invalid_api_key"),
        ("other", "k0", None, "model_not_found"),
        ("team", "k0", None, "permission_denied"),
        ("team", "k0", None, "permission_denied"),
    ]
    now = await world.metrics()
    counted = {name: value for name, value in now.items() if name.startswith("quire_policy_refusals_total")}
    assert len(counted) == 8
    assert {name.partition("{")[2]: value for name, value in counted.items() if value} == {
        'policy="team",reason="permission_denied"}': 3,
        'policy="team",reason="rate_limit_exceeded"}': 2,
    }


async def test_a_policy_that_has_expired_lets_nobody_in(world: World, http: httpx.AsyncClient) -> None:
    soon = tenant("team", TEAM, expires_at=time.time() - 1)
    await serve(world, soon, tenant("other", OTHER, expires_at=4e9))
    assert (await http.get("/v1/models", headers=headed(TEAM))).status_code == 401
    assert (await http.get("/v1/models", headers=headed(OTHER))).status_code == 200


async def test_keys_come_and_go_with_the_table_and_without_policies_all_is_open(
    world: World, http: httpx.AsyncClient
) -> None:
    old, new = new_key(), new_key()
    for keys, works in [((old,), (True, False)), ((old, new), (True, True)), ((new,), (False, True))]:
        await world.table(access=(tenant("team", *keys),))
        for key, expected in zip((old, new), works, strict=True):
            assert ((await http.get("/v1/models", headers=headed(key))).status_code == 200) is expected
    await world.table(access=(tenant("team"),))
    assert (await http.get("/v1/models")).status_code == 401, "a policy without keys still closes the door"
    await world.table()
    assert (await http.get("/v1/models", headers=headed(old))).status_code == 200


async def test_a_router_that_others_can_reach_is_closed_from_the_start(own_world: World) -> None:
    config = json.loads(own_world.config_file.read_bytes())
    own_world.config_file.write_text(json.dumps({**config, "closed": True}))
    own_world.restart()
    own_world.wait_until_up()
    async with httpx.AsyncClient(base_url=own_world.url) as http:
        for access in ((), (tenant("team", TEAM),), ()):
            await own_world.table(access=access)
            for key in (None, TEAM):
                answer = await http.get("/v1/models", headers=headed(key) if key else {})
                assert answer.status_code == (200 if access and key else 401)
        assert (await http.get("/livez")).status_code == 200
        assert (await http.get("/metrics")).status_code == 200, "of this machine"
        assert (await http.get("/metrics", headers=FAR)).status_code == 401


async def test_metrics_are_for_this_machine_and_for_keys_that_say_so(
    world: World, http: httpx.AsyncClient
) -> None:
    await serve(world)
    assert (await http.get("/metrics")).status_code == 200
    for far in (FAR, {"Host": "localhost", "Forwarded": "for=1.2.3.4"}, {"Via": "1.1 proxy"}):
        assert (await http.get("/metrics", headers=far)).status_code == 401
        assert (await http.get("/metrics", headers={**far, **headed(TEAM)})).status_code == 403
        assert (await http.get("/metrics", headers={**far, **headed(SCRAPER)})).status_code == 200
    assert (await http.get("/metrics", headers=headed(new_key()))).status_code == 401, (
        "a key that is wrong is none"
    )


async def test_a_preflight_needs_no_key_and_the_request_after_it_does(
    world: World, http: httpx.AsyncClient
) -> None:
    await world.table(access=ALL, allow_origins=("https://chat.example",))
    page = {"Origin": "https://chat.example"}
    asked = {**page, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    answer = await http.options("/v1/chat/completions", headers=asked)
    assert (answer.status_code, answer.headers["access-control-allow-headers"]) == (204, "authorization")
    refused = await http.get("/v1/models", headers=page)
    assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (401, "https://chat.example")
    readable = refused.headers["access-control-expose-headers"]
    assert "x-ratelimit-remaining-requests" in readable
    assert "x-quire-model" in readable
    assert (await http.get("/v1/models", headers={**page, **headed(TEAM)})).status_code == 200


async def test_names_of_the_gateway_are_answered_to(world: World, http: httpx.AsyncClient) -> None:
    named = {"Host": "llm.example.org:443"}
    await world.table()
    assert (await http.get("/livez", headers=named)).status_code == 421
    await world.table(hosts=("llm.example.org",))
    assert (await http.get("/livez", headers=named)).status_code == 200
    assert (await http.get("/livez", headers={"Host": "evil.example"})).status_code == 421


async def test_probes_by_address_are_answered_and_nothing_else_is(world: World, http: httpx.AsyncClient) -> None:
    await serve(world)
    for host in ("192.0.2.7:8000", "[2001:db8::1]"):
        for path in ("/livez", "/readyz"):
            assert (await http.get(path, headers={"Host": host})).status_code == 200
        for path in ("/health", "/v1/models", "/livez/../v1/models"):
            refused = await http.get(path, headers={"Host": host, **headed(TEAM)})
            assert (refused.status_code, refused.json()["error"]["code"]) == (421, "host_not_allowed")
            assert "spec.hosts" in refused.json()["error"]["message"]
    page = {"Host": "192.0.2.7", "Origin": "http://evil.example"}
    assert (await http.get("/livez", headers=page)).status_code == 421
    assert (await http.get("/livez", headers={"Host": "192.0.2.7.evil.example"})).status_code == 421


# ── what he may do ────────────────────────────────────────────────────────────────────────────────────────


async def test_models_out_of_scope_are_forbidden_and_not_told_of(world: World, http: httpx.AsyncClient) -> None:
    await serve(world, tenant("team", TEAM, models=("tiny",)))
    async with openai.AsyncOpenAI(base_url=f"{world.url}/v1", api_key=TEAM, max_retries=0) as client:
        assert [card.id async for card in client.models.list()] == ["tiny"]
        with pytest.raises(openai.PermissionDeniedError):
            await client.models.retrieve("org/tiny")
        told = []
        for name in ("org/tiny", "no-such"):
            with pytest.raises(openai.PermissionDeniedError) as refused:
                await client.chat.completions.create(model=name, messages=ASK)
            told.append(refused.value.message.replace(name, "X"))
        assert told[0] == told[1], "whether there is such a model is not told"
        assert "tiny" not in told[0]
    answer = await http.post("/tokenize", json={"model": "org/tiny", "prompt": "x"}, headers=headed(TEAM))
    assert answer.status_code == 403
    assert (await http.post("/tokenize", json={"prompt": "x"}, headers=headed(TEAM))).status_code == 200


async def test_rank_and_cache_are_the_policys(world: World, http: httpx.AsyncClient) -> None:
    high = tenant("high", TEAM, priority=7)
    await serve(world, high, tenant("other", OTHER), policy="priority")
    engine = world.engines[0]
    asks: list[tuple[str, dict[str, Any]]] = [
        (TEAM, {}),
        (TEAM, {"priority": 3, "cache_salt": "s"}),
        (OTHER, {}),
        (OTHER, {"cache_salt": "s"}),
    ]
    for key, more in asks:
        answer = await http.post("/v1/chat/completions", json={**CHAT, **more}, headers=headed(key))
        assert answer.status_code == 200, answer.text
    assert [(each.priority, each.cache_salt) for each in engine.generates] == [
        (-7, "high\0"), (-4, "high\0s"), (0, "other\0"), (0, "other\0s"),
    ]  # fmt: skip
    answer = await http.post("/v1/chat/completions", json={**CHAT, "priority": -1}, headers=headed(OTHER))
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "priority")
    await world.table(world.route(engine.endpoint()), access=(high,))
    assert (await http.post("/v1/chat/completions", json=CHAT, headers=headed(TEAM))).status_code == 200
    assert engine.generates[-1].priority == 0, "where the policy is fcfs"


def named(*names: str, **more: Any) -> wire.TrafficRoute:
    """A Route that gives model `tiny` these names."""
    return wire.TrafficRoute("r", names, 5, (wire.Backend("tiny", 1),), **more)


async def test_the_name_of_a_route_is_allowed_as_it_is_asked_for(world: World, http: httpx.AsyncClient) -> None:
    """Whoever may ask a Route's name needs no leave for the Model behind it, and has none for it by that."""
    engine = await world.engine()
    by_route, by_model = tenant("route", TEAM, models=("alias",)), tenant("model", OTHER, models=("tiny",))
    tables: dict[str, Any] = {"routes": [named("alias", "other-alias")], "access": (by_route, by_model)}
    await world.table(world.route(engine.endpoint()), **tables)
    await world.connected(engine.replica_id)
    for key, mine, names in (
        (TEAM, ["alias"], ["tiny", "other-alias", "none"]),
        (OTHER, ["tiny"], ["alias", "none"]),
    ):
        listed = await http.get("/v1/models", headers=headed(key))
        assert [card["id"] for card in listed.json()["data"]] == mine
        for path, body in (
            ("/v1/chat/completions", {"messages": ASK}),
            ("/v1/responses", {"input": "x"}),
            ("/v1/responses", {"input": "x", "background": True}),
            ("/v1/responses/input_tokens", {"input": "x"}),
            ("/v1/messages", {"messages": ASK, "max_tokens": 5}),
            ("/v1/messages/count_tokens", {"messages": ASK}),
            ("/tokenize", {"prompt": "x"}),
        ):
            for name in [*mine, *names]:
                answer = await http.post(path, json={**body, "model": name}, headers=headed(key))
                assert answer.status_code == (200 if name in mine else 403), (path, name, answer.text)
        for name in [*mine, *names]:
            answer = await http.get(f"/v1/models/{name}", headers=headed(key))
            assert answer.status_code == (200 if name in mine else 403), name
        sole = await http.post("/tokenize", json={"prompt": "x"}, headers=headed(key))
        assert sole.status_code == 200, "one model is behind all names that it may use"


async def test_a_copy_is_in_the_cache_of_whoever_is_copied_and_costs_him_nothing(
    world: World, http: httpx.AsyncClient
) -> None:
    engine, copying = await world.engine(), await world.engine("copy-r1-0")
    copier = world.route(copying.endpoint(), model="copy", names=("copy",), policy="priority")
    route = named("alias", mirror=wire.Mirror("copy", 100))
    team = limited(wire.AccessLimit("key", tokens=1000, per=366 * 86_400_000))
    team = wire.Tenant("team", team.keys, ("alias",), limits=team.limits, priority=3)
    await world.table(world.route(engine.endpoint()), copier, routes=[route], access=(team,))
    await world.connected(engine.replica_id, copying.replica_id)
    body = {**CHAT, "model": "alias", "cache_salt": "s", "max_tokens": 5}
    answer = await http.post("/v1/chat/completions", json=body, headers=headed(TEAM))
    assert answer.status_code == 200, answer.text

    async def copied() -> bool:
        return bool(copying.generates) and not copying.running

    await eventually(copied)
    [first], [copy] = engine.generates, copying.generates
    assert (first.cache_salt, copy.cache_salt) == ("team\0s", "team\0s")
    assert (first.background, copy.background, copy.priority) == (False, True, -3)
    told = await http.post("/tokenize", json={"model": "alias", "prompt": "x"}, headers=headed(TEAM))
    left = int(told.headers["x-ratelimit-remaining-tokens"])
    assert left == 1000 - answer.json()["usage"]["total_tokens"]
    assert not [row for row in await used(world, "model") if row.model == "copy"]


# ── how much ──────────────────────────────────────────────────────────────────────────────────────────────


def limited(*limits: wire.AccessLimit, key: str = TEAM) -> wire.Tenant:
    return tenant("team", key, limits=limits)


async def test_limits_are_told_on_good_answers_and_end_in_a_429(world: World) -> None:
    await serve(world, limited(wire.AccessLimit("key", requests=2, per=3_600_000)))
    async with openai.AsyncOpenAI(base_url=f"{world.url}/v1", api_key=TEAM, max_retries=0) as client:
        for left in ("1", "0"):
            good = await client.chat.completions.with_raw_response.create(**CHAT)
            assert good.headers["x-ratelimit-limit-requests"] == "2"
            assert good.headers["x-ratelimit-remaining-requests"] == left
            assert good.headers["x-ratelimit-reset-requests"]
            assert "x-ratelimit-limit-tokens" not in good.headers
        with pytest.raises(openai.RateLimitError) as refused:
            await client.chat.completions.create(**CHAT)
    answer = refused.value.response
    assert refused.value.code == "rate_limit_exceeded"
    assert 0 < int(answer.headers["retry-after"]) <= 120
    assert int(answer.headers["retry-after-ms"]) > 1000
    assert answer.headers["x-ratelimit-remaining-requests"] == "0"
    async with anthropic.AsyncAnthropic(base_url=world.url, api_key=TEAM, max_retries=0) as claude:
        with pytest.raises(anthropic.RateLimitError):
            await claude.messages.create(model="tiny", messages=ASK, max_tokens=5)


async def test_the_official_client_waits_out_a_limit(world: World) -> None:
    await serve(world, limited(wire.AccessLimit("key", requests=2, per=1000)))
    async with openai.AsyncOpenAI(base_url=f"{world.url}/v1", api_key=TEAM, max_retries=3) as client:
        for _ in range(4):
            assert (await client.chat.completions.create(**CHAT)).choices[0].message.content == TEXT


async def test_tokens_are_counted_as_they_were_used_also_of_a_stream_that_is_left(
    world: World, http: httpx.AsyncClient
) -> None:
    await serve(
        world, limited(wire.AccessLimit("policy", tokens=10_000, per=366 * 86_400_000)), text="word " * 200
    )

    async def left() -> int:
        answer = await http.post("/tokenize", json={"model": "tiny", "prompt": "x"}, headers=headed(TEAM))
        return int(answer.headers["x-ratelimit-remaining-tokens"])

    async with openai.AsyncOpenAI(base_url=f"{world.url}/v1", api_key=TEAM, max_retries=0) as client:
        raw = await client.chat.completions.with_raw_response.create(**CHAT, max_tokens=100)
        usage = raw.parse().usage
        assert usage is not None
        reserved = int(raw.headers["x-ratelimit-remaining-tokens"])
        assert 10_000 - reserved == usage.prompt_tokens + 100, "told while it is reserved"
        assert await left() == 10_000 - usage.total_tokens
        world.engines[0].pace = 0.05
        before = await left()
        stream = await client.chat.completions.create(**CHAT, max_tokens=400, stream=True)
        async for _ in stream:
            break
        await stream.close()
    used = await eventually(lambda: _settled(left, before))
    assert 0 < used < 400


async def _settled(left: Any, before: int) -> int | None:
    used = before - int(await left())
    return used if used < 400 else None


async def test_only_so_many_run_at_a_time(world: World, http: httpx.AsyncClient) -> None:
    await serve(world, limited(wire.AccessLimit("policy", concurrency=1)))
    world.engines[0].pace = 0.03
    body, key = {**CHAT, "max_tokens": 20}, headed(TEAM)
    first = asyncio.create_task(http.post("/v1/chat/completions", json=body, headers=key))
    await eventually(lambda: _running(world))
    refused = await http.post("/v1/chat/completions", json=body, headers=key)
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "rate_limit_exceeded")
    assert (await first).status_code == 200
    assert (await http.post("/v1/chat/completions", json=body, headers=key)).status_code == 200


async def _running(world: World) -> bool:
    return len(world.engines[0].generates) == 1


# ── what is his ───────────────────────────────────────────────────────────────────────────────────────────


def client_of(world: World, key: str) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{world.url}/v1", api_key=key, max_retries=0, timeout=20)


async def uploaded(client: openai.AsyncOpenAI, count: int, model: str = "tiny") -> str:
    lines = [
        {
            "custom_id": f"c{n}",
            "method": "POST",
            "url": "/v1/chat/completions",
            "body": {"model": model, "messages": [{"role": "user", "content": f"Say {n}"}], "max_tokens": 4},
        }
        for n in range(count)
    ]
    content = b"".join(json.dumps(line).encode() + b"\n" for line in lines)
    return (await client.files.create(file=("in.jsonl", content), purpose="batch")).id


async def batch_of(client: openai.AsyncOpenAI, file_id: str) -> Any:
    return await client.batches.create(
        input_file_id=file_id, endpoint="/v1/chat/completions", completion_window="24h"
    )


async def ended(client: openai.AsyncOpenAI, batch_id: str) -> Any:
    async def look() -> Any:
        batch = await client.batches.retrieve(batch_id)
        return batch if batch.completed_at is not None else None

    return await eventually(look, 20)


async def test_files_batches_and_responses_are_their_policys_alone(world: World) -> None:
    await serve(world)
    async with client_of(world, TEAM) as mine, client_of(world, BROUGHT) as too, client_of(world, OTHER) as other:
        file_id = await uploaded(mine, 1)
        batch = await ended(mine, (await batch_of(mine, file_id)).id)
        assert batch.request_counts.completed == 1
        response = await mine.responses.create(model="tiny", input="My name is Ann.")
        item = response.output[0].id
        assert item is not None
        calls: list[tuple[Any, dict[str, Any]]] = [
            (lambda client, **more: client.files.retrieve(file_id), {}),
            (lambda client, **more: client.files.content(batch.output_file_id), {}),
            (lambda client, **more: client.batches.retrieve(batch.id), {}),
            (lambda client, **more: client.responses.retrieve(response.id), {}),
            (lambda client, **more: client.responses.input_items.list(response.id), {}),
        ]
        for call, more in calls:
            await call(mine, **more)
            await call(too, **more)  # another key of the policy
            with pytest.raises(openai.NotFoundError):
                await call(other, **more)
        with pytest.raises(openai.NotFoundError):
            await other.files.delete(file_id)
        with pytest.raises(openai.NotFoundError):
            await other.batches.cancel(batch.id)
        with pytest.raises(openai.NotFoundError):
            await other.responses.delete(response.id)
        with pytest.raises(openai.BadRequestError, match="no file that is here"):
            await batch_of(other, file_id)
        with pytest.raises(openai.BadRequestError, match="does not exist"):
            await other.responses.create(model="tiny", input="x", previous_response_id=response.id)
        reference: Any = [{"type": "item_reference", "id": item}]
        with pytest.raises(openai.BadRequestError, match="no item"):
            await other.responses.create(model="tiny", input=reference)
        assert (await mine.responses.create(model="tiny", input="x", previous_response_id=response.id)).id
        for listed in (other.files, other.batches):
            assert [each async for each in listed.list()] == []
        assert file_id in [each.id async for each in mine.files.list()]
        assert [each.id async for each in too.batches.list()] == [batch.id]
        background = await mine.responses.create(model="tiny", input="x", background=True)
        with pytest.raises(openai.NotFoundError):
            await other.responses.cancel(background.id)

        async def done() -> bool:
            return (await too.responses.retrieve(background.id)).status == "completed"

        await eventually(done)
        salts = {each.cache_salt for each in world.engines[0].generates}
        assert salts == {"team\0"}, "what is done in the background, too"


async def test_the_lines_of_a_batch_have_the_scope_and_the_limits_of_its_owner(world: World) -> None:
    limits = (wire.AccessLimit("policy", requests=4, per=1000), wire.AccessLimit("policy", concurrency=2))
    await serve(world, tenant("other", OTHER), tenant("team", TEAM, models=("tiny",), limits=limits))
    async with client_of(world, TEAM) as mine, client_of(world, OTHER) as other:
        began = time.monotonic()
        slow = await batch_of(mine, await uploaded(mine, 8))
        quick = await ended(other, (await batch_of(other, await uploaded(other, 8))).id)
        assert quick.request_counts.completed == 8
        done = await ended(mine, slow.id)
        assert (done.request_counts.completed, done.request_counts.failed) == (8, 0), "a limit fails no line"
        assert time.monotonic() - began >= 0.9, "and is kept"
        out = await ended(mine, (await batch_of(mine, await uploaded(mine, 1, "org/tiny"))).id)
        (line,) = [json.loads(each) for each in (await mine.files.content(out.error_file_id)).text.splitlines()]
        assert (line["response"]["status_code"], line["response"]["body"]["error"]["type"]) == (
            403,
            "permission_error",
        )


async def test_a_batch_whose_policy_is_gone_ends_and_is_nobodys(world: World) -> None:
    await serve(world)
    async with client_of(world, TEAM) as mine:
        file_id = await uploaded(mine, 3)
        world.engines[0].pace = 1.0
        batch = await batch_of(mine, file_id)
        await world.table(world.route(world.engines[0].endpoint()), access=(tenant("other", OTHER),))
        with pytest.raises(openai.AuthenticationError):
            await mine.batches.retrieve(batch.id)
        world.engines[0].pace = 0.002
        await world.table(world.route(world.engines[0].endpoint()), access=ALL)
        done = await ended(mine, batch.id)
        assert done.request_counts.completed + done.request_counts.failed == 3


# ── fair shares ───────────────────────────────────────────────────────────────────────────────────────────


async def test_who_floods_a_model_is_refused_first_and_others_are_served_at_once(
    world: World, http: httpx.AsyncClient
) -> None:
    engine = await world.engine(text=TEXT, max_num_seqs=4, pace=0.01)
    await world.table(world.route(engine.endpoint(), max_queue_length=16), access=ALL)
    await world.connected(engine.replica_id)
    flood: dict[str, Any] = {**CHAT, "max_tokens": 40}
    statuses: list[int] = []

    async def flooding() -> None:
        while True:
            answer = await http.post("/v1/chat/completions", json=flood, headers=headed(TEAM))
            statuses.append(answer.status_code)
            await asyncio.sleep(0.05 if answer.status_code == 429 else 0)

    floods = [asyncio.create_task(flooding()) for _ in range(30)]
    try:
        await eventually(lambda: _refused(statuses))
        before = len(engine.generates)
        for _ in range(5):
            answer = await http.post("/v1/chat/completions", json={**CHAT, "max_tokens": 2}, headers=headed(OTHER))
            assert answer.status_code == 200, answer.text
        mine = [at for at, each in enumerate(engine.generates) if each.cache_salt == "other\0"]
        assert not any(engine.generates[at].lent for at in mine), "its part was free"
        lent = [each.lent for each in engine.generates if each.cache_salt != "other\0"]
        assert lent[:3] == [False, False, True], "two of four seats are a policy's own"
        ahead = mine[0] - before
        assert ahead <= 6, f"{ahead} of the flood went before it"
        assert len(engine.running) <= 4 + 2, "the rest waits at the router"
    finally:
        for each in floods:
            each.cancel()
        await asyncio.wait(floods)
    assert set(statuses) <= {200, 429}
    assert 200 in statuses

    async def idle() -> bool:
        return not engine.running

    await eventually(idle)
    both = [
        asyncio.create_task(http.post("/v1/chat/completions", json=CHAT, headers=headed(k))) for k in (TEAM, OTHER)
    ]
    assert [(await each).status_code for each in both] == [200, 200], "all turns were given back"


async def _refused(statuses: list[int]) -> bool:
    return 429 in statuses


async def test_one_tenant_alone_has_all_there_is(world: World, http: httpx.AsyncClient) -> None:
    engine = await world.engine(text=TEXT, max_num_seqs=2, pace=0.02)
    await world.table(world.route(engine.endpoint(), max_queue_length=8), access=(tenant("team", TEAM),))
    await world.connected(engine.replica_id)
    asks = [
        http.post("/v1/chat/completions", json={**CHAT, "max_tokens": 10}, headers=headed(TEAM)) for _ in range(10)
    ]
    assert [answer.status_code for answer in await asyncio.gather(*asks)] == [200] * 10


# ── what he has used ──────────────────────────────────────────────────────────────────────────────────────


async def used(world: World, *by: wire.UsageColumn) -> list[wire.UsageRow]:
    report = await world.asked(wire.GetUsage("2000-01-01", by))
    assert isinstance(report, wire.UsageReport)
    assert report.problem == ""
    return report.rows


async def test_what_was_used_is_told_by_key_and_model(world: World) -> None:
    await serve(world, tenant("used-a", OTHER), tenant("used-b", TEAM, BROUGHT))
    async with client_of(world, TEAM) as mine, client_of(world, BROUGHT) as too, client_of(world, OTHER) as other:
        prompts = answers = 0
        for client in (mine, too, too):
            usage = (await client.chat.completions.create(**CHAT, max_tokens=7)).usage
            assert usage is not None
            prompts, answers = usage.prompt_tokens, usage.completion_tokens
        with pytest.raises(openai.NotFoundError):
            await mine.chat.completions.create(model="nobody", messages=ASK)
        await ended(other, (await batch_of(other, await uploaded(other, 3))).id)
        world.engines[0].pace = 0.05
        stream = await mine.chat.completions.create(**CHAT, max_tokens=100, stream=True)
        async for _ in stream:
            break
        await stream.close()

    async def all_of_it() -> list[wire.UsageRow] | None:
        found = [row for row in await used(world, "policy", "key", "model") if row.policy.startswith("used")]
        return found if [row.requests for row in found] == [3, 2, 2] else None

    batch, first, second = await eventually(all_of_it)
    assert (batch.policy, batch.key, batch.model, batch.completion_tokens) == ("used-a", "k0", "tiny", 12)
    assert (first.policy, first.key, first.prompt_tokens) == ("used-b", "k0", 2 * prompts)
    assert answers < first.completion_tokens < answers + 60, "a stream that was left counts as far as it came"
    assert second == wire.UsageRow(2, 2 * prompts, 0, 2 * answers, policy="used-b", key="k1", model="tiny")


async def test_who_steps_in_needs_no_leave_and_is_counted_once(world: World, http: httpx.AsyncClient) -> None:
    """What failed keeps none of the tokens that it took, and the ledger has one request, of who answered it."""
    engine, dying = await world.engine(), await world.engine("dying-r1-0", stalled=True)
    dies = world.route(dying.endpoint(), model="dying", names=("dying",))
    team = limited(wire.AccessLimit("key", tokens=200, per=366 * 86_400_000))
    team = wire.Tenant("steps-in", team.keys, ("alias",), limits=team.limits)
    route = wire.TrafficRoute(
        "r", ("alias",), 5, (wire.Backend("dying", 1),), fallbacks=(wire.Fallback("tiny", ("Timeout",)),),
        first_token=0.3,
    )  # fmt: skip
    await world.table(world.route(engine.endpoint()), dies, routes=[route], access=(team,))
    await world.connected(engine.replica_id, dying.replica_id)
    body = {**CHAT, "model": "alias", "max_tokens": 100}
    answer = await http.post("/v1/chat/completions", json=body, headers=headed(TEAM))
    assert (answer.status_code, answer.headers["x-quire-model"]) == (200, "tiny"), answer.text
    assert len(dying.generates) == 1
    usage = answer.json()["usage"]
    told = await http.post("/tokenize", json={"model": "alias", "prompt": "x"}, headers=headed(TEAM))
    prompts = 2 * usage["prompt_tokens"]
    assert int(told.headers["x-ratelimit-remaining-tokens"]) == 200 - prompts - usage["completion_tokens"]
    found = [row for row in await used(world, "policy", "model") if row.policy == "steps-in"]
    assert [(row.model, row.requests) for row in found] == [("dying", 0), ("tiny", 1)]


@pytest.mark.nightly
async def test_what_was_used_outlives_a_killed_router(own_world: World) -> None:
    await serve(own_world)
    async with client_of(own_world, TEAM) as mine:
        for _ in range(3):
            await mine.chat.completions.create(**CHAT, max_tokens=7)
    await asyncio.sleep(2.5)
    own_world.restart()
    own_world.wait_until_up()
    (row,) = await used(own_world, "policy", "key", "model")
    assert (row.policy, row.key, row.requests, row.completion_tokens) == ("team", "k0", 3, 21)


# ── what is not told ──────────────────────────────────────────────────────────────────────────────────────


WRONG = new_key()


async def told_of_keys(world: World) -> bytes:
    """All that a router says and keeps while keys, good and bad, are sent to it."""
    engine = await world.engine()
    access = (tenant("team", TEAM, limits=(wire.AccessLimit("key", requests=4, per=3_600_000),)),)
    await world.table(world.route(engine.endpoint()), access=access)
    await world.connected(engine.replica_id)
    said = b""
    async with httpx.AsyncClient(base_url=world.url) as http:
        for headers in (headed(TEAM), {"x-api-key": TEAM}, headed(WRONG), {"x-api-key": BROUGHT}):
            for path in ("/v1/chat/completions", "/v1/messages", "/v1/nothing"):
                answer = await http.post(path, json={**CHAT, "max_tokens": 2}, headers=headers)
                said += answer.content + str(answer.headers).encode()
        engine.fail_with = "internal"
        said += (await http.post("/v1/chat/completions", json=CHAT, headers=headed(TEAM))).content
        said += (await http.get("/metrics")).content
    said += (world.folder / "router.log").read_bytes() + (world.folder / "table.json").read_bytes()
    assert b"rate_limit_exceeded" in said
    assert b"invalid_api_key" in said
    return said


def without_keys(said: bytes) -> None:
    for key in (TEAM, WRONG, BROUGHT):
        assert key.encode() not in said
        assert key.rsplit("_", 1)[-1].encode() not in said


async def test_keys_are_in_no_log_no_metric_no_error_and_no_file(world: World) -> None:
    without_keys(await told_of_keys(world))


@pytest.mark.nightly
async def test_keys_are_in_no_span() -> None:
    with Collector() as collector, tempfile.TemporaryDirectory(prefix="qr") as name:
        world = make_world(Path(name), collector.environment())
        try:
            said = await told_of_keys(world)
            await asyncio.to_thread(collector.wait, lambda spans: len(spans) > 3)
            said += b"".join(collector.raw)
            assert b"chat tiny" in said
            without_keys(said)
        finally:
            for each in world.engines:
                await each.stop()
            end_world(world)


async def test_who_asks_before_he_sends_a_body_is_refused_before_he_does(world: World) -> None:
    await serve(world)
    head = world.post("/v1/chat/completions", b"x" * 1_000_000, "Expect: 100-continue\r\n")[:-1_000_000]
    answer = await world.raw(head)
    assert answer.startswith(b"HTTP/1.1 401 ")
    assert b"\r\nconnection: close\r\n" in answer.lower()
