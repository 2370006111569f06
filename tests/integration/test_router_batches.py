"""Files and batches over the router as clients see them: the official client, real sockets, a stand-in engine."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest
from tests.integration.router_world import World, eventually


def line(number: int | str, endpoint: str = "/v1/chat/completions", **changes: Any) -> dict[str, Any]:
    body = {"model": "tiny", "messages": [{"role": "user", "content": f"Say {number}"}], "max_tokens": 4}
    return {"custom_id": f"c{number}", "method": "POST", "url": endpoint, "body": {**body, **changes}}


def jsonl(*lines: Any) -> bytes:
    return b"".join(json.dumps(each).encode() + b"\n" for each in lines)


async def upload(client: openai.AsyncOpenAI, *lines: Any) -> str:
    file = await client.files.create(file=("in.jsonl", jsonl(*lines)), purpose="batch")
    return file.id


async def create(client: openai.AsyncOpenAI, input_id: str, **more: Any) -> Any:
    options: dict[str, Any] = {"endpoint": "/v1/chat/completions", "completion_window": "24h", **more}
    return await client.batches.create(input_file_id=input_id, **options)


ENDS = ("completed", "failed", "expired", "cancelled")


async def ended(client: openai.AsyncOpenAI, batch_id: str, seconds: float = 15.0) -> Any:
    async def look() -> Any:
        batch = await client.batches.retrieve(batch_id)
        return batch if batch.status in ENDS else None

    return await eventually(look, seconds)


async def lines_of(client: openai.AsyncOpenAI, file_id: str | None) -> list[dict[str, Any]]:
    if file_id is None:
        return []
    content = await client.files.content(file_id)
    return [json.loads(each) for each in content.text.splitlines()]


async def test_the_whole_life_of_a_batch(world: World) -> None:
    await world.serve(await world.engine())
    async with world.client() as client:
        lines = [line(1), line("unknown", model="nobody"), line("long", max_tokens=5000), line(2)]
        input_id = await upload(client, *lines)
        batch = await create(client, input_id, metadata={"job": "nightly"})
        assert (batch.status, batch.metadata, batch.object) == ("validating", {"job": "nightly"}, "batch")
        assert batch.expires_at == batch.created_at + 86400
        with pytest.raises(openai.ConflictError, match=batch.id):
            await client.files.delete(input_id)
        done = await ended(client, batch.id)
        assert done.status == "completed"
        assert (done.request_counts.total, done.request_counts.completed, done.request_counts.failed) == (4, 2, 2)
        assert done.created_at <= done.in_progress_at <= done.finalizing_at <= done.completed_at
        answers = await lines_of(client, done.output_file_id)
        assert [answer["custom_id"] for answer in answers] == ["c1", "c2"], "in the input's order"
        for answer in answers:
            assert answer.keys() == {"id", "custom_id", "response", "error"}
            assert answer["error"] is None
            assert answer["response"].keys() == {"status_code", "request_id", "body"}
            assert answer["response"]["status_code"] == 200
            body = openai.types.chat.ChatCompletion.model_validate(answer["response"]["body"], strict=True)
            assert body.usage is not None
            assert body.usage.completion_tokens == 4
        refused = await lines_of(client, done.error_file_id)
        assert [(each["custom_id"], each["response"]["status_code"]) for each in refused] == [
            ("cunknown", 404),
            ("clong", 400),
        ]
        assert refused[0]["response"]["body"]["error"]["code"] == "model_not_found"
        assert done.usage.output_tokens == 8
        await client.files.delete(input_id)
        with pytest.raises(openai.NotFoundError):
            await client.files.retrieve(input_id)
