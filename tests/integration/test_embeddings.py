"""`/v1/embeddings`: the official client, a real router and a real engine, against the engine in this process."""

from __future__ import annotations

import base64
import math
import struct
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from tests.integration.engine_process import engine_running
from tests.integration.router_world import World
from tests.integration.test_router_batches import create, ended, lines_of, upload

from quire import LLM
from quire.router.job import AT_ONCE
from quire_schemas import wire


@pytest.fixture(scope="module")
def engine_spec() -> Iterator[wire.EngineSpec]:
    with engine_running(prefix_caching=True) as spec:
        yield spec


@pytest.fixture
async def served(world: World, engine_spec: wire.EngineSpec) -> World:
    await world.serve_process(engine_spec)
    return world


async def test_vectors_are_those_of_the_engine(served: World) -> None:
    llm = LLM("builtin://tiny", dtype="float32", max_model_len=512, num_blocks=64, threads=1)
    texts = ["When the", "A list is", "naïve 你好 🦊"]
    ids = [llm.tokenizer.encode(text) for text in texts]
    last = [output.outputs.embedding for output in llm.embed(texts)]
    mean = [output.outputs.embedding for output in llm.embed(texts, pooling="mean", dimensions=16)]
    async with served.client() as client:
        answer = await client.embeddings.create(model="tiny", input=texts)  # which asks for base64
        assert [entry.index for entry in answer.data] == [0, 1, 2]
        for entry, expected in zip(answer.data, last, strict=True):
            assert entry.embedding == pytest.approx(expected, abs=1e-5)
        assert answer.usage.prompt_tokens == answer.usage.total_tokens == sum(map(len, ids))
        assert answer.model == "tiny"
        floats = await client.embeddings.create(model="tiny", input=ids, encoding_format="float")
        for entry, expected in zip(floats.data, last, strict=True):
            assert entry.embedding == pytest.approx(expected, abs=1e-5)
        short = await client.embeddings.create(
            model="tiny", input=texts, dimensions=16, extra_body={"pooling": "mean"}, user="somebody"
        )
        for entry, expected in zip(short.data, mean, strict=True):
            assert entry.embedding == pytest.approx(expected, abs=1e-5)
            assert math.hypot(*entry.embedding) == pytest.approx(1, abs=1e-5)
        asked = {"model": "tiny", "input": texts, "encoding_format": "float"}
        batch = await create(
            client,
            await upload(client, {"custom_id": "a", "method": "POST", "url": "/v1/embeddings", "body": asked}),
            endpoint="/v1/embeddings",
        )
        done = await ended(client, batch.id)
        (line,) = await lines_of(client, done.output_file_id)
        for entry, expected in zip(line["response"]["body"]["data"], last, strict=True):
            assert entry["embedding"] == pytest.approx(expected, abs=1e-5)
        assert (done.usage.input_tokens, done.usage.output_tokens) == (sum(map(len, ids)), 0)
    async with httpx.AsyncClient() as http:
        body = {"model": "tiny", "input": "When the", "encoding_format": "base64"}
        raw = (await http.post(f"{served.url}/v1/embeddings", json=body)).json()
    assert raw["object"] == "list"
    assert set(raw["usage"]) == {"prompt_tokens", "total_tokens"}
    vector = base64.b64decode(raw["data"][0]["embedding"])
    assert struct.unpack(f"<{len(vector) // 4}f", vector) == pytest.approx(last[0], abs=1e-5)


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({"input": []}, "input", "must be a string, a list of strings"),
        ({"input": ""}, "input", "'input' is empty"),
        ({"input": [5, 99999]}, "input", "outside the vocabulary of 2048"),
        ({"input": [5] * 513}, "input", "This model takes 512 tokens; 'input' has 513."),
        ({"input": "a", "dimensions": 0}, "dimensions", "must be at least 1"),
        (
            {"input": "a", "dimensions": 100_000},
            "dimensions",
            "dimensions is 100000; this model's vectors have 256",
        ),
        ({"input": "a", "encoding_format": "bytes"}, "encoding_format", "must be"),
        ({"input": "a", "pooling": "max"}, "pooling", "must be"),
        ({"input": "a", "truncate_prompt_tokens": 5}, "truncate_prompt_tokens", "never cut short"),
        ({"input": "a", "messages": []}, "messages", "send texts"),
        ({"input": "a", "temperature": 1}, "temperature", "Unknown field"),
    ],
)
async def test_what_is_not_honoured_is_refused(
    served: World, body: dict[str, Any], param: str | None, words: str
) -> None:
    async with served.client() as client:
        with pytest.raises(openai.BadRequestError) as error:
            await client.post("/embeddings", body={"model": "tiny", **body}, cast_to=object)
    assert error.value.param == param
    assert words in error.value.message


async def test_a_scripted_model_has_no_vectors(world: World) -> None:
    await world.serve(await world.engine(), scripted=True)
    async with world.client() as client:
        with pytest.raises(openai.BadRequestError, match="no hidden states") as error:
            await client.embeddings.create(model="tiny", input="a")
    assert error.value.param == "model"


async def test_a_list_as_long_as_clients_send_is_answered_a_few_at_a_time(world: World) -> None:
    engine = await world.engine(pace=0.001, max_num_seqs=8)
    await world.serve(engine, max_queue_length=32)
    async with world.client() as client:
        answer = await client.embeddings.create(model="tiny", input=[f"text {number}" for number in range(300)])
        assert [entry.index for entry in answer.data] == list(range(300))
        assert len(engine.generates) == 300
        with pytest.raises(openai.BadRequestError) as refused:
            await client.embeddings.create(model="tiny", input=["x"] * 2049)
    assert refused.value.param == "input"


async def test_a_long_list_in_a_batch_waits_for_as_long_as_it_takes(world: World) -> None:
    """Its texts are begun a few at a time; each waits behind the others, and nobody waits for the batch."""
    engine = await world.engine(pace=0.03, max_num_seqs=1)
    await world.serve(engine, max_queue_wait=0.1)
    inputs = [f"text {number}" for number in range(AT_ONCE + 8)]
    asked = {
        "custom_id": "a",
        "method": "POST",
        "url": "/v1/embeddings",
        "body": {"model": "tiny", "input": inputs},
    }
    async with world.client() as client:
        batch = await create(client, await upload(client, asked), endpoint="/v1/embeddings")
        done = await ended(client, batch.id)
        assert done.request_counts.failed == 0, await lines_of(client, done.error_file_id)
        (line,) = await lines_of(client, done.output_file_id)
    assert len(line["response"]["body"]["data"]) == len(inputs)
