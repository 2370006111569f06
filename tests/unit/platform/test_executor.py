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
from quire.router.app import build
from quire.router.background import Background
from quire.router.batches import Batch, Batches
from quire.router.config import RouterConfig
from quire.router.executor import Executor
from quire.router.files import Files
from quire.router.fleet import Fleet
from quire.router.responses import Waiting
from quire.tracing import Tracing
from quire_schemas import signals, wire
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
    tracing = Tracing.set_up(signals.SERVICE_ROUTER)
    _, executor, _ = build(fleet, config, tracing)
    yield executor
    await executor.close()
    await fleet.close()
    tracing.shutdown()


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


@pytest.mark.parametrize("step", ["start", "fail"])
@pytest.mark.parametrize("error", [RuntimeError("planted"), StorageUnavailable("planted")], ids=["bug", "disk"])
async def test_a_response_in_the_background_is_tried_until_it_has_ended(
    executor: Executor, step: str, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    (background,) = executor._beside
    assert isinstance(background, Background)
    responses = background._responses
    monkeypatch.setattr(responses, step, failing(getattr(responses, step), 1, error))
    monkeypatch.setattr(beside, "PAUSES", (0.01, 0.02))
    body = json.dumps({"model": "nobody", "input": "x", "background": True}).encode()
    begun = ResponseObject.begun(responses.new_id(), int(time.time()), read_response(body, False))
    await responses.begin(begun, body, (), "", "")
    background.begin(Waiting(begun.id, body, "", ""))
    async with asyncio.timeout(15):
        while (now := json.loads(await responses.get(begun.id, "")))["status"] != "failed":
            await asyncio.sleep(0.01)
    assert now["error"]["code"] == "model_not_found"
    assert await responses.waiting() == []


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
