"""`model:adapter` in every API of the router, over real sockets; from a manifest to what a real engine says."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import openai
import pytest
from tests.adapters import merge, write_adapter
from tests.engine_specs import run, tiny_spec
from tests.integration.forked import ForkedPlane
from tests.integration.plane import GATEWAY, Plane
from tests.integration.router_world import ASK, World, eventually
from tests.integration.test_router_access import headed, tenant
from tests.integration.wire_engine import WireEngine

from quire_schemas import signals, wire
from quire_schemas.keys import new_key

ADAPTERS = tuple(wire.AdapterRoute(name, (f"lora:{name}", f"org/lora:{name}")) for name in ("a", "b"))


def endpoint(engine: WireEngine, *adapters: str) -> wire.ReplicaEndpoint:
    return msgspec.structs.replace(engine.endpoint(), adapters=adapters)


def route(world: World, *replicas: wire.ReplicaEndpoint, **fields: Any) -> wire.ModelRoute:
    named = {"model": "lora", "names": ("lora", "org/lora"), "adapters": ADAPTERS}
    return world.route(*replicas, **{**named, **fields})


async def serve(world: World, *engines: WireEngine, **fields: Any) -> None:
    await world.table(route(world, *(endpoint(engine, "a", "b") for engine in engines), **fields))
    await world.connected(*(engine.replica_id for engine in engines))


async def test_every_api_asks_an_engine_for_the_adapter_that_is_named(world: World) -> None:
    engine = await world.engine("r1")
    await serve(world, engine)
    client = world.client()
    said = await client.chat.completions.create(model="lora:a", messages=ASK, max_tokens=2)
    assert said.model == "lora:a"
    await client.completions.create(model="org/lora:b", prompt="x", max_tokens=2)
    await client.responses.create(model="lora:b", input="x", max_output_tokens=16)
    async with httpx.AsyncClient(base_url=world.url, timeout=20) as http:
        body = {"model": "lora:a", "messages": ASK, "max_tokens": 2}
        answer = await http.post("/v1/messages", json=body, headers={"anthropic-version": "2023-06-01"})
        assert answer.status_code == 200, answer.text
        assert answer.headers["x-quire-model"] == "lora:a"
        assert (await http.post("/tokenize", json={"model": "lora:a", "prompt": "x"})).status_code == 200
    line = {"custom_id": "1", "method": "POST", "url": "/v1/chat/completions", "body": {**body, "model": "lora:b"}}
    file = await client.files.create(file=("in.jsonl", json.dumps(line).encode()), purpose="batch")
    batch = await client.batches.create(
        input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h"
    )

    async def done() -> Any:
        found = await client.batches.retrieve(batch.id)
        return found if found.status == "completed" else None

    assert (await eventually(done)).request_counts.completed == 1
    await client.chat.completions.create(model="lora", messages=ASK, max_tokens=2)
    assert [each.adapter for each in engine.generates] == ["a", "b", "b", "a", "b", ""]
    await client.close()


async def test_the_list_of_models_has_them_and_an_unknown_one_is_told_which_there_are(world: World) -> None:
    engine = await world.engine("r1")
    plain = await world.engine("r2")
    await world.table(route(world, endpoint(engine, "a", "b")), world.route(plain.endpoint()))
    await world.connected("r1", "r2")
    client = world.client()
    listed = {
        card.id: (getattr(card, "root", None), getattr(card, "parent", None))
        async for card in client.models.list()
    }
    assert listed["lora"] == ("model/lora", None)
    assert listed["lora:a"] == ("model/lora", "lora")
    assert listed["org/lora:b"] == ("model/lora", "org/lora")
    card = await client.models.retrieve("lora:b")
    assert getattr(card, "parent", None) == "lora"
    for name, told in (
        ("lora:c", "Adapters of 'lora': lora:a, lora:b."),
        ("tiny:c", "'tiny' has no adapters."),
        ("other:a", "Models here: lora, lora:a, lora:b, org/lora, org/lora:a, org/lora:b, org/tiny, tiny."),
    ):
        with pytest.raises(openai.NotFoundError) as refused:
            await client.chat.completions.create(model=name, messages=ASK)
        assert (refused.value.code, refused.value.param) == ("model_not_found", "model")
        assert told in refused.value.message
    assert engine.generates == []
    await client.close()


async def test_a_key_is_for_the_names_that_its_policy_has_and_no_others(world: World) -> None:
    engine = await world.engine("r1")
    key = new_key()
    await world.table(route(world, endpoint(engine, "a", "b")), access=(tenant("t", key, models=("lora:a",)),))
    await world.connected("r1")
    async with httpx.AsyncClient(base_url=world.url, timeout=20, headers=headed(key)) as http:
        asked = {
            name: (await http.post("/v1/chat/completions", json={"model": name, "messages": ASK, "max_tokens": 1}))
            for name in ("lora:a", "lora", "lora:b", "lora:c")
        }
        assert {name: answer.status_code for name, answer in asked.items()} == {
            "lora:a": 200, "lora": 403, "lora:b": 403, "lora:c": 403,
        }  # fmt: skip
        listed = (await http.get("/v1/models")).json()["data"]
        assert [card["id"] for card in listed] == ["lora:a"]


async def test_only_replicas_that_have_it_are_asked_and_another_one_goes_on_with_it(world: World) -> None:
    old = await world.engine("old")
    dies = await world.engine("dies", die_after=3, pace=0.002)
    other = await world.engine("other", pace=0.002)
    await world.table(
        route(world, endpoint(old), endpoint(dies, "a"), endpoint(other, "b", "a"), max_migrations=1,
              prefix_caching=True)
    )  # fmt: skip
    await world.connected("old", "dies", "other")
    client = world.client()
    for _ in range(4):
        await client.chat.completions.create(model="lora:b", messages=ASK, max_tokens=2)
    assert [len(each.generates) for each in (old, dies, other)] == [0, 0, 4]
    stream = await client.chat.completions.create(
        model="lora:a", messages=ASK, max_tokens=12, temperature=0, stream=True
    )
    ends = [chunk.choices[0].finish_reason async for chunk in stream if chunk.choices]
    assert ends[-1] is not None
    assert [each.adapter for each in dies.generates] == ["a"]
    again = [each for each in other.generates if each.written]
    assert [each.adapter for each in again] == ["a"]
    assert old.generates == []
    await client.close()


async def test_it_is_counted_by_its_own_name_and_a_route_leads_to_it(world: World) -> None:
    engine = await world.engine("r1")
    backends = (wire.Backend("lora", 1), wire.Backend("lora:a", 3), wire.Backend("lora:gone", 4))
    await world.table(
        route(world, endpoint(engine, "a", "b")), routes=[wire.TrafficRoute("r", ("chat",), 5, backends)]
    )
    await world.connected("r1")
    series = f'{signals.ROUTE_REQUESTS}_total{{model="lora:a",route="r"}}'
    before = (await world.metrics()).get(series, 0.0)
    client = world.client()
    for _ in range(8):
        await client.chat.completions.create(model="chat", messages=ASK, max_tokens=1)
    assert sorted(each.adapter for each in engine.generates) == ["", "", *"aaaaaa"]
    metrics = await world.metrics()
    assert metrics[series] - before == 6
    assert any('model="lora:a"' in name and name.startswith(signals.REQUESTS) for name in metrics)
    report = await world.asked(wire.GetUsage("2000-01-01", ("model",)))
    assert isinstance(report, wire.UsageReport)
    assert {row.model for row in report.rows} >= {"lora", "lora:a"}
    await client.close()


async def test_an_adapter_steps_in_and_gets_copies(world: World) -> None:
    engine = await world.engine("r1")
    routes = [
        wire.TrafficRoute(
            "r", ("chat",), 5, (wire.Backend("gone", 1),),
            fallbacks=(wire.Fallback("lora:gone", ("Unavailable",)), wire.Fallback("lora:b", ("Unavailable",))),
        ),
        wire.TrafficRoute("m", ("copied",), 6, (wire.Backend("lora", 1),), mirror=wire.Mirror("lora:a", 100)),
    ]  # fmt: skip
    await world.table(route(world, endpoint(engine, "a", "b")), routes=routes)
    await world.connected("r1")
    copies = f'{signals.ROUTE_MIRRORED}_total{{finish="completed",model="lora:a",route="m"}}'
    before = (await world.metrics()).get(copies, 0.0)
    client = world.client()
    answer = await client.chat.completions.with_raw_response.create(model="chat", messages=ASK, max_tokens=1)
    assert answer.headers["x-quire-model"] == "lora:b"
    await client.chat.completions.create(model="copied", messages=ASK, max_tokens=1)

    async def copied() -> bool:
        return (await world.metrics()).get(copies, 0.0) == before + 1

    await eventually(copied)
    assert [each.adapter for each in engine.generates][:2] == ["b", ""]
    assert [each.adapter for each in engine.generates][2:] == ["a"]
    await client.close()


# ── from a manifest to the answers of a real engine ───────────────────────────────────────────────────────


@pytest.fixture
def real(tmp_path: Path) -> Iterator[Plane]:
    """A control plane whose engines compute."""
    plane = ForkedPlane(tmp_path / "plane")
    del plane.env["PYTHONPATH"]
    plane.start()
    plane.apply(GATEWAY)
    yield plane
    plane.end()
    assert plane.ours() == []


def test_a_manifest_serves_an_adapter_and_follows_its_folder(real: Plane, tmp_path: Path) -> None:
    from quire_engine.engine import Engine

    folder = write_adapter(tmp_path / "sql", 1)
    text = (
        "apiVersion: quire.dev/v1alpha1\nkind: Model\nmetadata: {name: m}\nspec:\n  source: builtin://tiny\n"
        "  engine: {dtype: float32, device: cpu, maxModelLen: 256, kvCache: {size: 32Mi}}\n"
        "  resources: {cpu: 1}\n"
        f"  lora: {{adapters: [{{name: sql, source: 'file://{folder}'}}]}}\n"
    )
    prompt = [11 + 7 * at for at in range(20)]

    def expected(seed: int) -> list[int]:
        """What an engine of the merged checkpoint says."""
        source = write_adapter(tmp_path / f"again-{seed}", seed)
        engine = Engine.load(tiny_spec(model_dir=str(merge(source, tmp_path / f"merged-{seed}", scale=2.0))))
        sampling = wire.Sampling(max_tokens=8, temperature=0.0, ignore_eos=True)
        deltas = run(engine, wire.Generate("x", list(prompt), sampling))["x"]
        return [token for delta in deltas for token in delta.token_ids]

    def said(model: str) -> list[int]:
        with openai.OpenAI(base_url=real.base_url, api_key="none", max_retries=0, timeout=30) as client:
            answer = client.completions.create(
                model=model, prompt=prompt, max_tokens=8, temperature=0,
                extra_body={"ignore_eos": True, "return_token_ids": True},
            )  # fmt: skip
        return list(getattr(answer.choices[0], "token_ids", ()))

    assert real.apply(text)["model/m"]["result"] == "created"
    real.wait_served("m")
    assert said("m:sql") == expected(1) != said("m")
    assert real.apply(text)["model/m"]["result"] == "unchanged"
    write_adapter(folder, 2)
    assert real.apply(text)["model/m"]["result"] == "updated"
    real.wait_served("m")
    assert said("m:sql") == expected(2)
