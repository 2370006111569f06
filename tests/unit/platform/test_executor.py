"""What the router works off in the background, on a real store and without a model, outlives what fails in it."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from quire.errors import StorageUnavailable
from quire.router import background as beside
from quire.router import executor as executing
from quire.router.access import Access
from quire.router.app import build
from quire.router.background import Background
from quire.router.batches import Batch, Batches
from quire.router.config import RouterConfig
from quire.router.executor import Executor
from quire.router.files import Files
from quire.router.fleet import Fleet
from quire.router.responses import Responses
from quire.router.telling import Teller
from quire_schemas import wire
from quire_schemas.openai.batches import CreateBatch
from quire_schemas.openai.responses import ResponseObject, read_response

ENDPOINT = "/v1/completions"


@pytest.fixture
async def executor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Executor]:
    """Serves nothing, and knows it: every line is answered with a 404."""
    monkeypatch.setattr(executing, "BEGUN_AGAIN_SECONDS", 0.01)
    fleet = Fleet(tmp_path / "table.json")
    await fleet.apply(wire.RoutingTable(version=1, models=()))
    config = RouterConfig(control_socket="", snapshot_file=str(tmp_path / "table.json"))
    executor = build(fleet, config, Teller()).executor
    yield executor
    await executor.close()
    await fleet.close()


async def batch_of(files: Files, batches: Batches, lines: int) -> Batch:
    body = {"model": "nobody", "prompt": "x"}
    made = [{"custom_id": str(n), "method": "POST", "url": ENDPOINT, "body": body} for n in range(lines)]
    content = b"".join(json.dumps(each).encode() + b"\n" for each in made)
    async with files.incoming() as (file_id, file):
        file.write(content)
        file.keep()
        await files.add(file_id, "batch", "in.jsonl", len(content), None, "")
    asked = {"input_file_id": file_id, "endpoint": ENDPOINT, "completion_window": "24h"}
    return await batches.create(CreateBatch.model_validate(asked), "", "")


async def ended(batches: Batches, batch: Batch) -> Batch:
    async with asyncio.timeout(15):
        while (now := await batches.get(batch.id, "")).status != "completed":
            await asyncio.sleep(0.02)
    return now


def failing(work: Callable[..., Any], at: int, error: Exception) -> Callable[..., Any]:
    """`work`, whose call with that number fails."""
    calls = 0

    def called(*given: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == at:
            raise error
        return work(*given)

    return called


@pytest.mark.parametrize("part", ["sending", "committing"])
async def test_what_fails_once_is_logged_and_holds_up_no_batch(
    executor: Executor, part: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    files, batches = executor._files, executor._batches
    owner, name = {"sending": (executor._lines, "_send_one"), "committing": (batches, "add_answers")}[part]
    monkeypatch.setattr(owner, name, failing(getattr(owner, name), 1, RuntimeError("planted")))
    batch = await batch_of(files, batches, 3)
    executor.start()
    done = await ended(batches, batch)
    assert (done.total, done.completed, done.failed) == (3, 0, 3)
    told = [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert [str(record.exc_info and record.exc_info[1]) for record in told] == ["planted"]


async def to_be_answered(responses: Responses, size: int = 0) -> tuple[str, int]:
    """A response in the background that is kept: its id, and the bytes of its request."""
    body = json.dumps({"model": "nobody", "input": "x" * max(size, 1), "background": True}).encode()
    begun = ResponseObject.begun(responses.new_id(), int(time.time()), read_response(body, False))
    await responses.begin(begun, body, (), "", "")
    return begun.id, len(body)


@pytest.mark.parametrize("step", ["start", "fail"])
@pytest.mark.parametrize("error", [RuntimeError("planted"), StorageUnavailable("planted")], ids=["bug", "disk"])
async def test_a_response_in_the_background_is_tried_until_it_has_ended(
    executor: Executor, step: str, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    background = next(each for each in executor._beside if isinstance(each, Background))
    responses = background._responses
    monkeypatch.setattr(responses, step, failing(getattr(responses, step), 1, error))
    monkeypatch.setattr(beside, "PAUSES", (0.01, 0.02))
    begun, size = await to_be_answered(responses)
    background.begin(begun, size)
    async with asyncio.timeout(15):
        while (now := json.loads(await responses.get(begun, "")))["status"] != "failed":
            await asyncio.sleep(0.01)
    assert now["error"]["code"] == "model_not_found"
    assert await responses.waiting() == []


class Endpoint:
    """Takes requests in and, once it is told to, answers them; what came in is in `tried`, in its order."""

    def __init__(self) -> None:
        self.tried: list[str] = []
        self.inside = 0
        self.most = 0
        """Bytes of the requests that were inside at the same time."""
        self.answers = asyncio.Event()

    def __call__(self, response_id: str) -> Any:
        async def answer(scope: Any, receive: Any, send: Any) -> None:
            body = (await receive())["body"]
            assert json.loads(body)["background"]
            self.tried.append(response_id)
            self.inside += len(body)
            self.most = max(self.most, self.inside)
            await asyncio.wait(
                [asyncio.ensure_future(receive()), asyncio.ensure_future(self.answers.wait())],
                return_when=asyncio.FIRST_COMPLETED,
            )
            self.inside -= len(body)
            await send({"type": "http.response.start", "status": 200, "headers": []})

        return answer


async def test_requests_in_the_background_are_in_memory_only_while_they_are_tried(
    executor: Executor, monkeypatch: pytest.MonkeyPatch
) -> None:
    responses = next(each for each in executor._beside if isinstance(each, Background))._responses
    endpoint = Endpoint()
    background = Background(responses, endpoint, Access())
    begun = [await to_be_answered(responses, size) for size in (4_000, 4_000, 30_000, 4_000, 4_000, 4_000)]
    assert [(each.id, each.size) for each in await responses.waiting()] == begun
    monkeypatch.setattr(beside, "MAX_TRIED_BYTES", 10_000)
    await background.resume()

    async def until(tried: list[int]) -> None:
        async with asyncio.timeout(15):
            while endpoint.tried != [begun[place][0] for place in tried]:
                await asyncio.sleep(0.005)

    await until([0, 1])
    await asyncio.sleep(0.05)
    assert len(endpoint.tried) == 2, "the others have no room, and nobody overtakes the large one"
    await asyncio.wait_for(background.cancel(begun[3][0], ""), 5)
    async with asyncio.timeout(5):
        while begun[3][0] in background._works:
            await asyncio.sleep(0.005)
    endpoint.answers.set()
    await until([0, 1, 2, 4, 5])
    assert endpoint.most == begun[2][1]
    async with asyncio.timeout(5):
        while background._works:
            await asyncio.sleep(0.005)


async def test_what_waits_in_the_background_ends_with_the_router_and_is_left_to_the_next(
    executor: Executor, monkeypatch: pytest.MonkeyPatch
) -> None:
    responses = next(each for each in executor._beside if isinstance(each, Background))._responses
    endpoint = Endpoint()
    background = Background(responses, endpoint, Access())
    monkeypatch.setattr(beside, "MAX_TRIED_BYTES", 1_000)
    begun = [await to_be_answered(responses, 900) for _ in range(50)]
    await background.resume()
    async with asyncio.timeout(15):
        while not endpoint.tried:
            await asyncio.sleep(0.005)
    await asyncio.wait_for(background.close(), 5)
    assert len(endpoint.tried) == 1
    assert not background._works
    assert [each.id for each in await responses.waiting()] == sorted(name for name, _ in begun)


async def test_an_export_that_fails_leaves_nothing_behind(
    executor: Executor, monkeypatch: pytest.MonkeyPatch
) -> None:
    files, batches = executor._files, executor._batches
    batch = await batch_of(files, batches, 1)
    begin = failing(files.begin, 2, StorageUnavailable("planted"))  # that of the error file
    monkeypatch.setattr(files, "begin", begin)
    executor.start()
    done = await ended(batches, batch)
    expected = sorted([done.input_file_id, str(done.error_file_id)])
    end = time.monotonic() + 5
    while (left := sorted(path.name for path in files.folder.iterdir())) != expected:
        assert time.monotonic() < end, left  # the batch has ended a moment before its parts are gone
        await asyncio.sleep(0.01)
    opened = [os.readlink(each) for each in Path("/proc/self/fd").iterdir() if each.is_symlink()]
    assert [each for each in opened if each.startswith(str(files.folder))] == []
