"""Files and batches over the router as clients see them: the official client, real sockets, a stand-in engine."""

from __future__ import annotations

import asyncio
import json
import os
import random
import resource
import shutil
import signal
import sqlite3
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import msgspec
import openai
import psutil
import pytest
from tests.integration.disk import Disk, recorder, records, whole_until
from tests.integration.engine_process import engine_running, without_weights
from tests.integration.router_world import ASK, TEXT, World, end_world, eventually, launch, make_world

from quire.router.batches import Batches
from quire.router.files import Files
from quire.router.store import Store
from quire_schemas import signals, wire
from quire_schemas.openai.files import MAX_FILE_BYTES


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


def completed(batch: Any) -> int:
    return int(batch.request_counts.completed)


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
        assert (done.request_counts.total, completed(done), done.request_counts.failed) == (4, 2, 2)
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


async def test_completions(world: World) -> None:
    await world.serve(await world.engine())
    body = {"model": "org/tiny", "prompt": "hi", "max_tokens": 500}
    asked = {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": body}
    async with world.client() as client:
        batch = await create(client, await upload(client, asked), endpoint="/v1/completions")
        done = await ended(client, batch.id)
        assert (done.status, done.model) == ("completed", "org/tiny")
        (answer,) = await lines_of(client, done.output_file_id)
    assert answer["response"]["body"]["choices"][0]["text"] == TEXT


WRONG: dict[str, tuple[object, str, str | None]] = {
    "no JSON": ("{", "invalid_json_line", None),
    "no object": ([1], "invalid_json_line", None),
    "no id": (
        {"method": "POST", "url": "/v1/chat/completions", "body": {}},
        "missing_required_parameter",
        "custom_id",
    ),
    "the id is none": (line(3) | {"custom_id": ""}, "invalid_custom_id", "custom_id"),
    "twice": (line(0), "duplicate_custom_id", "custom_id"),
    "method": (line(4) | {"method": "GET"}, "invalid_method", "method"),
    "another endpoint": (line(5, "/v1/completions"), "invalid_url", "url"),
    "unknown": (line(6) | {"timeout": 3}, "unknown_parameter", "timeout"),
    "stream": (line(7, stream=True), "invalid_request", "body.stream"),
    "field": (line(8, temperature=9), "invalid_request", "body.temperature"),
    "no model": (line(9) | {"body": {"messages": []}}, "invalid_request", "body.model"),
    "body": (line(10) | {"body": 3}, "invalid_request", "body"),
}


async def test_an_input_that_is_none_fails_with_the_lines_that_are_wrong(world: World) -> None:
    engine = await world.engine()
    await world.serve(engine)
    async with world.client() as client:
        texts = [b"{" if wrong == "{" else json.dumps(wrong).encode() for wrong, *_ in WRONG.values()]
        content = jsonl(line(0)) + b"\n" + b"\n".join(texts)  # an empty line counts, and is no line of the batch
        file = await client.files.create(file=("in.jsonl", content), purpose="batch")
        done = await ended(client, (await create(client, file.id)).id)
        assert (done.status, done.output_file_id, done.error_file_id) == ("failed", None, None)
        assert done.request_counts.total == 0
        found = {error.line: (error.code, error.param) for error in done.errors.data}
        assert found == {place: (code, param) for place, (_, code, param) in enumerate(WRONG.values(), 3)}
        assert engine.generates == [], "nothing of it is sent"
        empty = await client.files.create(file=("in.jsonl", b""), purpose="batch")
        done = await ended(client, (await create(client, empty.id)).id)
        assert [error.code for error in done.errors.data] == ["empty_file"]
        await client.files.delete(empty.id)


async def test_what_a_batch_is_refused_for(world: World) -> None:
    async with world.client() as client:
        input_id = await upload(client, line(1))
        for change, param in (
            ({"endpoint": "/v1/images"}, "endpoint"),
            ({"completion_window": "1h"}, "completion_window"),
            ({"metadata": {str(number): "" for number in range(17)}}, "metadata"),
            ({"metadata": {"k" * 65: ""}}, f"metadata.{'k' * 64}"),
            ({"metadata": {"k": "v" * 513}}, "metadata.k"),
            ({"output_expires_after": {"anchor": "created_at", "seconds": 60}}, "output_expires_after.seconds"),
            ({"extra_body": {"windw": 1}}, "windw"),
        ):
            with pytest.raises(openai.BadRequestError) as refused:
                await create(client, input_id, **change)
            assert refused.value.param == param
        with pytest.raises(openai.BadRequestError) as refused:
            await create(client, "file-none")
        assert refused.value.param == "input_file_id"
        with pytest.raises(openai.NotFoundError):
            await client.batches.retrieve("batch_none")
        with pytest.raises(openai.NotFoundError):
            await client.batches.cancel("batch_none")


async def test_a_cancelled_batch_keeps_what_it_has_and_says_so_of_the_rest(world: World) -> None:
    engine = await world.engine(pace=0.02, max_num_seqs=2)
    await world.serve(engine)
    async with world.client() as client:
        batch = await create(client, await upload(client, *(line(number) for number in range(60))))

        async def begun() -> bool:
            return completed(await client.batches.retrieve(batch.id)) >= 3

        await eventually(begun)
        cancelling = await client.batches.cancel(batch.id)
        assert cancelling.status == "cancelling"
        assert (await client.batches.cancel(batch.id)).status in ("cancelling", "cancelled")
        done = await ended(client, batch.id)
        assert done.status == "cancelled"
        with pytest.raises(openai.ConflictError):
            await client.batches.cancel(batch.id)
        answered = await lines_of(client, done.output_file_id)
        without = await lines_of(client, done.error_file_id)
    assert 3 <= len(answered) == completed(done) < 60
    assert {(each["response"], each["error"]["code"]) for each in without} == {(None, "batch_cancelled")}
    assert [
        each["custom_id"] for each in sorted([*answered, *without], key=lambda one: int(one["custom_id"][1:]))
    ] == [f"c{number}" for number in range(60)]
    assert not engine.running, "what was on its way is stopped in the engine"
    assert all(generate.background for generate in engine.generates)


async def test_lists_page_by_themselves_also_while_what_they_list_is_deleted(world: World) -> None:
    async with world.client() as client:
        made = [await upload(client, line(number)) for number in range(5)]
        found = [
            file.id async for file in client.files.list(limit=2, order="asc", purpose="batch") if file.id in made
        ]
        assert found == made
        found = [file.id async for file in client.files.list(limit=2) if file.id in made]
        assert found == made[::-1]
        page = await client.files.list(limit=2, after=made[3])
        assert [file.id for file in page.data] == [made[2], made[1]]
        await world.table(world.route(stopped=True))  # none of them is done before it is cancelled
        batches = [await create(client, each) for each in made[:3]]
        for batch in batches:
            await client.batches.cancel(batch.id)
        for batch in batches:
            await ended(client, batch.id)
        listed = [batch.id async for batch in client.batches.list(limit=2) if batch.input_file_id in made]
        assert listed == [batch.id for batch in batches][::-1]
        async for file in client.files.list(limit=2):
            await client.files.delete(file.id)
        assert [file.id async for file in client.files.list()] == []
        for limit in (0, 101):
            with pytest.raises(openai.BadRequestError):
                await client.batches.list(limit=limit)
        with pytest.raises(openai.BadRequestError):
            await client.files.list(after="nothing")
        with pytest.raises(openai.BadRequestError):
            await client.files.list(extra_query={"sort": "size"})


async def test_a_file_is_what_was_uploaded(world: World) -> None:
    content = bytes(range(256)) * 9000  # more than one piece, and no text
    async with world.client() as client:
        file = await client.files.create(
            file=("naïve 你好.jsonl", content),
            purpose="batch",
            expires_after={"anchor": "created_at", "seconds": 3600},
        )
        assert (file.bytes, file.filename, file.purpose) == (len(content), "naïve 你好.jsonl", "batch")
        assert file.expires_at == file.created_at + 3600
        assert (await client.files.retrieve(file.id)) == file
        assert (await client.files.content(file.id)).content == content
        folder = world.folder / "router" / "files"
        assert (folder / file.id).stat().st_mode & 0o777 == 0o600
        deleted = await client.files.delete(file.id)
        assert (deleted.id, deleted.deleted) == (file.id, True)
        assert not (folder / file.id).exists()
        for missing in (client.files.retrieve, client.files.content, client.files.delete):
            with pytest.raises(openai.NotFoundError):
                await missing(file.id)
        for options, param in (
            ({"purpose": "fine-tune"}, "purpose"),
            (
                {"purpose": "batch", "expires_after": {"anchor": "created_at", "seconds": 5}},
                "expires_after.seconds",
            ),
            (
                {"purpose": "batch", "expires_after": {"anchor": "last_used", "seconds": 3600}},
                "expires_after.anchor",
            ),
            ({"purpose": "batch", "extra_body": {"name": "x"}}, "name"),
        ):
            with pytest.raises(openai.BadRequestError) as refused:
                await client.files.create(file=("in.jsonl", b"{}"), **options)
            assert refused.value.param == param
        assert list(folder.glob("*.part")) == []


async def test_bodies_of_uploads(world: World) -> None:
    """Parts in another order are a form as well; what is none is refused, and leaves nothing behind."""
    part = b'--x\r\nContent-Disposition: form-data; name="%b"%b\r\n\r\n%b\r\n'
    file = part % (b"file", b'; filename="a.jsonl"', b"{}")
    purpose = part % (b"purpose", b"", b"batch")
    end = b"--x--\r\n"
    form = "multipart/form-data; boundary=x"
    for body, kind, status in (
        (file + purpose + end, form, 200),
        (purpose + file, form, 400),
        (file + end, form, 400),
        (purpose + end, form, 400),
        (purpose + purpose + file + end, form, 400),
        (part % (b"file", b"", b"{}") + purpose + end, form, 400),
        (b"{}", form, 400),
        (b"{}", "application/json", 415),
        (b"{}", "multipart/form-data", 415),
    ):
        async with httpx.AsyncClient() as http:
            answer = await http.post(f"{world.url}/v1/files", content=body, headers={"content-type": kind})
        assert answer.status_code == status, (body, answer.text)
        assert ("id" in answer.json()) == (status == 200)
    folder = world.folder / "router" / "files"
    await eventually(lambda: asyncio.to_thread(lambda: not list(folder.glob("*.part"))))


async def test_a_file_above_the_limit_is_refused_and_not_kept(world: World) -> None:
    async def content() -> AsyncIterator[bytes]:
        yield (
            b'--x\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n'
            b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
        )
        piece = b"x" * 1024 * 1024
        for _ in range(MAX_FILE_BYTES // len(piece)):
            yield piece
        yield b"x\r\n--x--\r\n"

    headers = {"content-type": "multipart/form-data; boundary=x"}
    router = psutil.Process(world.process.pid)
    before = router.memory_info().rss
    async with httpx.AsyncClient(timeout=60) as http:
        answer = await http.post(f"{world.url}/v1/files", content=content(), headers=headers)
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "request_too_large")
    assert list((world.folder / "router" / "files").glob("*.part")) == []
    assert router.memory_info().rss - before < MAX_FILE_BYTES // 2, "it was never whole in memory"


async def test_nothing_of_a_client_that_leaves_is_kept(world: World) -> None:
    folder = world.folder / "router" / "files"
    head = (
        f"POST /v1/files HTTP/1.1\r\nHost: localhost:{world.port}\r\nContent-Length: 5000000\r\n"
        "Content-Type: multipart/form-data; boundary=x\r\n\r\n"
        '--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
    ).encode()
    _, writer = await asyncio.open_connection("127.0.0.1", world.port)
    writer.write(head + b"y" * 1_000_000)
    await eventually(lambda: asyncio.to_thread(lambda: list(folder.glob("*.part"))))
    writer.transport.abort()
    await eventually(lambda: asyncio.to_thread(lambda: not list(folder.glob("*.part"))))


async def test_a_batch_waits_for_a_model_that_has_no_replica_and_for_one_that_is_stopped(world: World) -> None:
    await world.table(world.route(stopped=True))
    async with world.client() as client:
        batch = await create(client, await upload(client, line(1), line(2)))
        await asyncio.sleep(0.7)
        waiting: Any = await client.batches.retrieve(batch.id)
        assert (waiting.status, waiting.request_counts.total) == ("in_progress", 2)
        await world.table(world.route())
        await eventually(lambda: world.holds(1))
        await world.serve(await world.engine())
        done = await ended(client, batch.id)
    assert (done.status, completed(done)) == ("completed", 2)


async def test_an_engine_that_dies_costs_no_line(world: World) -> None:
    engine = await world.engine(pace=0.01, max_num_seqs=4)
    await world.serve(engine)
    async with world.client() as client:
        batch = await create(client, await upload(client, *(line(number) for number in range(30))))
        for least in (0, 15):

            async def far_enough(least: int = least) -> bool:
                done = completed(await client.batches.retrieve(batch.id))
                return done >= least and any(running.sent for running in engine.running.values())

            await eventually(far_enough)
            engine.cut()
        done = await ended(client, batch.id)
        answers = await lines_of(client, done.output_file_id)
    assert (done.status, completed(done)) == ("completed", 30)
    assert [each["custom_id"] for each in answers] == [f"c{number}" for number in range(30)]
    assert len(engine.generates) > 30, "some were asked for again"


async def test_what_engines_die_of_holds_up_no_other_line(world: World) -> None:
    wanted = world.tokenizer.encode("poison", add_special_tokens=False)

    def poisonous(request: wire.Generate) -> bool:
        return any(request.token_ids[at : at + len(wanted)] == wanted for at in range(len(request.token_ids)))

    engine = await world.engine(poison=poisonous)
    await world.serve(engine)
    async with world.client() as client:
        batch = await create(client, await upload(client, line(1), line("poison"), line(2)))

        async def others() -> bool:
            return completed(await client.batches.retrieve(batch.id)) == 2

        await eventually(others, 20)
        assert engine.deaths == 2
        await client.batches.cancel(batch.id)  # it is put aside until the quarantine is over
        done = await ended(client, batch.id)
        (without,) = await lines_of(client, done.error_file_id)
    assert (completed(done), without["custom_id"], without["error"]["code"]) == (2, "cpoison", "batch_cancelled")


async def test_a_full_disk_stops_nothing_else_and_loses_no_answer(own_world: World) -> None:
    """Nothing can be written: whoever asks the store is told, chat goes on, and afterwards all is as before."""
    world = own_world
    engine = await world.engine(pace=0.02, max_num_seqs=4)
    await world.serve(engine)
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    async with world.client() as client:
        input_id = await upload(client, *(line(number) for number in range(20)))
        batch = await create(client, input_id)
        await eventually(lambda: asyncio.sleep(0, bool(engine.running)))
        resource.prlimit(world.process.pid, resource.RLIMIT_FSIZE, (0, hard))
        for ask in (lambda: upload(client, line(1)), lambda: create(client, input_id)):
            with pytest.raises(openai.InternalServerError) as refused:
                await ask()
            assert (refused.value.status_code, refused.value.code) == (507, "storage_full")
        answer = await client.chat.completions.create(model="tiny", messages=ASK)
        assert answer.choices[0].message.content == TEXT
        assert (await client.batches.retrieve(batch.id)).status == "in_progress", "what is there can be read"
        resource.prlimit(world.process.pid, resource.RLIMIT_FSIZE, (hard, hard))
        done = await ended(client, batch.id)
        assert (done.status, completed(done)) == ("completed", 20)
        assert len(await lines_of(client, done.output_file_id)) == 20
    assert len(engine.generates) == 21, "no answer was lost: none was asked for twice"


async def test_a_response_that_the_disk_has_no_room_for_is_asked_for_again(own_world: World) -> None:
    world = own_world
    await world.serve(await world.engine())
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    body = {"model": "tiny", "input": "Say it", "max_output_tokens": 16}
    asked = {"custom_id": "a", "method": "POST", "url": "/v1/responses", "body": body}
    late = {**asked, "custom_id": "late", "body": {**body, "background": True}}
    async with world.client() as client:
        refused = await create(client, await upload(client, late), endpoint="/v1/responses")
        (error,) = (await ended(client, refused.id)).errors.data
        assert (error.code, error.param) == ("invalid_request", "body.background")
        await world.table(world.route())  # a line waits until there is a replica
        batch = await create(client, await upload(client, asked), endpoint="/v1/responses")
        await eventually(lambda: world.holds(1))
        resource.prlimit(world.process.pid, resource.RLIMIT_FSIZE, (0, hard))
        engine = world.engines[0]
        await world.serve(engine)

        async def asked_again() -> bool:
            return len(engine.generates) >= 2

        await eventually(asked_again)
        resource.prlimit(world.process.pid, resource.RLIMIT_FSIZE, (hard, hard))
        done = await ended(client, batch.id)
        (answer,) = await lines_of(client, done.output_file_id)
        kept = await client.responses.retrieve(answer["response"]["body"]["id"])
    assert (done.status, completed(done), kept.status) == ("completed", 1, "incomplete")


async def test_a_store_that_cannot_be_opened_stops_nothing_else(own_world: World) -> None:
    world = own_world
    await world.serve(await world.engine())
    world.process.kill()
    world.process.wait()
    shutil.rmtree(world.folder / "router")
    (world.folder / "router").write_text("in the way")
    world.restart()
    world.wait_until_up()
    async with world.client() as client:
        for ask in (client.files.list, client.batches.list, lambda: upload(client, line(1))):
            with pytest.raises(openai.InternalServerError) as refused:
                await ask()
            assert (refused.value.status_code, refused.value.code) == (503, "storage_unavailable")
        answer = await client.chat.completions.create(model="tiny", messages=ASK)
        assert answer.choices[0].message.content == TEXT
        (world.folder / "router").unlink()
        batch = await create(client, await upload(client, line(1)))
        assert completed(await ended(client, batch.id)) == 1


async def test_who_is_killed_goes_on_where_the_store_is_and_answers_each_line_once(own_world: World) -> None:
    world = own_world
    engine = await world.engine(pace=0.005, max_num_seqs=4)
    await world.serve(engine)
    names = [f"c{number}" for number in range(80)]
    async with world.client() as client:
        batch = await create(client, await upload(client, *(line(number) for number in range(80))))
        kills, before = 0, -1
        while (now := await client.batches.retrieve(batch.id)).status not in ENDS:
            done = completed(now)
            assert done >= before, "what is committed stays"
            before = done
            if kills < 3 and done >= 20 * kills:
                world.restart(signal.SIGTERM if kills == 1 else signal.SIGKILL)
                await asyncio.to_thread(world.wait_until_up)
                kills += 1
            await asyncio.sleep(0.02)
        answers = await lines_of(client, now.output_file_id)
    assert kills == 3
    assert (now.status, completed(now), now.error_file_id) == ("completed", 80, None)
    assert [each["custom_id"] for each in answers] == names
    assert len({each["id"] for each in answers}) == 80
    assert len(engine.generates) < 80 + kills * 2 * 4, "only what was on its way is asked for again"


@pytest.mark.nightly
async def test_a_power_cut_loses_no_answer_that_was_counted(tmp_path: Path) -> None:
    """The writes of the router's database are cut off anywhere: what was not synced is there, or not, or torn."""
    lines, counted = 300, []
    with tempfile.TemporaryDirectory(prefix="qr") as name:
        database = Path(name) / "router" / "router.db"
        trace, environment = recorder(tmp_path, database)
        world = make_world(Path(name), environment)
        engine = await world.engine(pace=0.005, max_num_seqs=4)
        await world.serve(engine)
        async with world.client() as client:
            batch = await create(client, await upload(client, *(line(number) for number in range(lines))))
            kills = 0
            while (now := await client.batches.retrieve(batch.id)).status not in ENDS:
                counted.append((trace.stat().st_size, completed(now)))
                if kills < 2 and completed(now) >= 60 * (kills + 1):
                    world.process.kill()
                    world.process.wait()
                    os.truncate(trace, whole_until(trace.read_bytes()))  # the next one finds a log of writes
                    world.restart()
                    await asyncio.to_thread(world.wait_until_up)
                    kills += 1
                await asyncio.sleep(0.01)
            counted.append((trace.stat().st_size, completed(now)))
        assert (now.status, completed(now), kills) == ("completed", lines, 2)
        await engine.stop()
        end_world(world)
    # shared memory is no file that is synced, or read after a boot
    whole = [record for record in records(trace.read_bytes()) if not record.path.endswith("-shm")]
    rng = random.Random(3)
    disk, played, unsynced, seen = Disk(), 0, 0, set()
    for number, cut in enumerate(sorted(rng.sample(range(len(whole)), 200))):
        for record in whole[played:cut]:
            disk.play(record)
        played = cut
        unsynced += any(file.pending for file in disk.files.values())
        folder = tmp_path / f"cut{number}"
        folder.mkdir()
        for path, content in disk.after_power_cut(rng).items():
            (folder / Path(path).name).write_bytes(content)
        reached = whole[cut - 1].end if cut else 0
        promised = [count for at, count in counted if at <= reached]
        store = Store(folder)
        batches = Batches(store, Files(store))
        for found in [await batches.read(batch.id)] if promised else []:
            assert promised[-1] <= found.completed
            seen.add(found.status)
            if found.status != "completed":
                assert len(await batches.answers(batch.id, range(lines))) == found.completed
        await store.close()
        with closing(sqlite3.connect(folder / database.name)) as db:
            assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        shutil.rmtree(folder)
    assert seen >= {"in_progress"}
    assert unsynced > 20, "a cut between syncs is what this is about"


async def test_a_window_that_ends_leaves_what_there_is(own_world: World) -> None:
    world = own_world
    await world.serve(await world.engine(pace=0.03, max_num_seqs=2))
    async with world.client() as client:
        batch = await create(client, await upload(client, *(line(number) for number in range(50))))

        async def begun() -> bool:
            return completed(await client.batches.retrieve(batch.id)) >= 2

        await eventually(begun)
        world.process.kill()
        world.process.wait()
        with closing(sqlite3.connect(world.folder / "router" / "router.db")) as db, db:
            db.execute("UPDATE batches SET expires_at = created_at + 1")
            db.execute("UPDATE files SET expires_at = created_at + 1")
        world.restart()
        await asyncio.to_thread(world.wait_until_up)
        done = await ended(client, batch.id)
        assert done.status == "expired"
        assert done.expired_at is not None
        answered = await lines_of(client, done.output_file_id)
        without = await lines_of(client, done.error_file_id)
        assert len(answered) == completed(done) >= 2
        assert {each["error"]["code"] for each in without} == {"batch_expired"}
        assert len(answered) + len(without) == 50
        with pytest.raises(openai.NotFoundError):
            await client.files.retrieve(batch.input_file_id)
        assert [file.purpose async for file in client.files.list()] == ["batch_output"] * 2


async def test_of_two_routers_one_works_off_batches_and_the_other_when_that_is_gone(own_world: World) -> None:
    world = own_world
    engine = await world.engine(pace=0.04, max_num_seqs=2)
    await world.serve(engine)
    config = msgspec.json.decode(world.config_file.read_bytes())
    other = world.folder / "other.json"
    other.write_text(json.dumps(config | {"control_socket": str(world.folder / "other.sock")}))
    second = launch(world.folder, world.listening, other, {})  # on the same socket: either may take a connection
    try:
        async with world.client().with_options(max_retries=3) as client:
            batch = await create(client, await upload(client, *(line(number) for number in range(40))))

            async def begun() -> bool:
                return completed(await client.batches.retrieve(batch.id)) >= 20

            await eventually(begun, 20)
            asked = [tuple(generate.token_ids) for generate in engine.generates]
            assert len(asked) == len(set(asked)), "no line is asked for by both"
            world.process.kill()
            world.process.wait()
            done = await ended(client, batch.id)
            assert (done.status, completed(done)) == ("completed", 40)
            assert len({each["custom_id"] for each in await lines_of(client, done.output_file_id)}) == 40
    finally:
        second.terminate()
        second.wait(10)
        world.restart()
        await asyncio.to_thread(world.wait_until_up)


@pytest.fixture(scope="module")
def engine_spec(tmp_path_factory: pytest.TempPathFactory) -> Iterator[wire.EngineSpec]:
    """A real engine with four seats whose lines take four seconds."""
    checkpoint = str(without_weights(tmp_path_factory.mktemp("checkpoint")))
    with engine_running(model_dir=checkpoint, runner="scripted", step_time=0.02, max_num_seqs=4) as spec:
        yield spec


async def test_requests_do_not_wait_for_a_batch_and_meet_no_full_queue(
    world: World, engine_spec: wire.EngineSpec
) -> None:
    await world.serve_process(engine_spec, scripted=True, max_queue_length=0)
    async with world.client() as client:
        long = [line(number, script="again ", ignore_eos=True, max_tokens=200) for number in range(12)]
        batch = await create(client, await upload(client, *long))

        async def full() -> bool:
            return (await world.metrics())[f'{signals.NUM_REQUESTS_RUNNING}{{model="tiny",replica="tiny-0"}}'] == 4

        await eventually(full)

        async def ask() -> str | None:
            answer = await client.chat.completions.create(
                model="tiny", messages=ASK, extra_body={"script": "now"}, max_tokens=3
            )
            return answer.choices[0].message.content

        for _ in range(3):
            assert await asyncio.gather(*(ask() for _ in range(4))) == ["now"] * 4, "all seats are theirs"
        meanwhile = await client.batches.retrieve(batch.id)
        assert (meanwhile.status, completed(meanwhile)) == ("in_progress", 0), "no line has ended"
        assert (await world.metrics())[f'{signals.PREEMPTIONS}_total{{model="tiny",replica="tiny-0"}}'] >= 4
        await client.batches.cancel(batch.id)
        assert (await ended(client, batch.id)).status == "cancelled"
