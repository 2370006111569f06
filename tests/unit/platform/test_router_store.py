"""The router's own store on a real disk: what is kept, in which order, and whose word counts."""

from __future__ import annotations

import asyncio
import json
import sqlite3
import time
from collections.abc import AsyncIterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from quire.errors import Conflict, InvalidRequest, NotFound, QueueFull, StorageFull, StorageUnavailable
from quire.router import batches as stored
from quire.router import store as kept
from quire.router.api.files import listed
from quire.router.batches import Answer, Batch, Batches, Plan
from quire.router.files import FILES, Files
from quire.router.store import Incoming, Store
from quire_schemas.openai.batches import KEPT_SECONDS, CreateBatch
from quire_schemas.openai.files import MAX_FILES_LISTED


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[Store]:
    store = Store(tmp_path / "router")
    yield store
    await store.close()


@pytest.fixture
def files(store: Store) -> Files:
    return Files(store)


@pytest.fixture
def batches(store: Store, files: Files) -> Batches:
    return Batches(store, files)


async def keep(files: Files, content: bytes = b"{}\n", purpose: str = "batch", expires: int | None = None) -> str:
    file_id, incoming = files.begin()
    incoming.write(content)
    incoming.keep()
    return (await files.add(file_id, purpose, "in.jsonl", len(content), expires, "")).id


async def make(batches: Batches, files: Files) -> Batch:
    asked = {"input_file_id": await keep(files), "endpoint": "/v1/completions", "completion_window": "24h"}
    return await batches.create(CreateBatch.model_validate(asked), "", "")


def plan(lines: int) -> Plan:
    made = Plan(["tiny"])
    for line in range(lines):
        made.offsets.append(10 * line)
        made.lengths.append(10)
        made.of_model.append(0)
        made.sequences.append(1)
    return made


async def test_it_is_opened_when_it_is_needed_and_what_it_has_is_there_the_next_time(tmp_path: Path) -> None:
    first = Store(tmp_path / "router")
    assert not first.folder.exists()
    files = Files(first)
    file_id = await keep(files, b"abc")
    at = first.clock()
    await first.close()
    assert (first.folder.stat().st_mode & 0o777, (first.folder / "router.db").stat().st_mode & 0o777) == (
        0o700,
        0o600,
    )
    second = Store(tmp_path / "router")
    found = await Files(second).get(file_id, "")
    assert (found.bytes, Files(second).path(file_id).read_bytes()) == (3, b"abc")
    assert 0 <= second.clock() - at < 60, "the clock goes on"
    await second.close()


async def test_what_fails_in_a_transaction_leaves_nothing_of_it(store: Store, files: Files) -> None:
    def work(db: sa.Connection) -> None:
        files.insert(db, "file-1", "batch", "a", 1, None, "")
        raise NotFound("no")

    with pytest.raises(NotFound):
        await store.run(work)
    with pytest.raises(NotFound):
        await files.get("file-1", "")


async def test_a_file_of_another_version_or_none_is_left_alone(tmp_path: Path) -> None:
    folder = tmp_path / "router"
    folder.mkdir()
    for content in (b"no database at all, whatever its name says" * 50, None):
        path = folder / "router.db"
        if content is not None:
            path.write_bytes(content)
        else:
            path.unlink()
            with closing(sqlite3.connect(path)) as db, db:
                db.execute("PRAGMA journal_mode=WAL")
                db.execute("CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT)")
                db.execute("INSERT INTO meta VALUES ('schemaVersion', '99')")
        before = path.read_bytes()
        store = Store(folder)
        with pytest.raises(StorageUnavailable):
            await Files(store).get("file-1", "")
        await store.close()
        assert path.read_bytes() == before


async def test_a_store_that_is_moved_away_takes_nothing_any_more(store: Store, files: Files) -> None:
    await keep(files)
    store.folder.rename(store.folder.with_name("elsewhere"))
    with pytest.raises(StorageUnavailable):
        await keep(files)
    assert not store.folder.joinpath("router.db").exists()


async def test_ids_of_one_kind_are_in_the_order_of_their_age(store: Store, files: Files) -> None:
    ids = [await keep(files, bytes([number])) for number in range(5)]
    assert ids == sorted(ids)
    found, more = await files.page("", 3, None, newest_first=False, purpose=None)
    assert ([file.id for file in found], more) == (ids[:3], True)
    await files.delete(ids[2], "")
    found, more = await files.page("", 3, ids[2], newest_first=False, purpose="batch")
    assert ([file.id for file in found], more) == (ids[3:], False), "also behind one that is gone"
    assert (await files.page("", 3, None, newest_first=True, purpose="batch_output")) == ([], False)


async def test_a_list_of_all_files_holds_up_no_stream(store: Store, files: Files) -> None:
    """What is counted is the processor's time of the event loop's own thread, which nobody else adds to."""
    row = {
        "purpose": "batch",
        "filename": "naïve.jsonl",
        "bytes": 3,
        "created_at": int(store.clock()),
        "expires_at": None,
    }
    rows = [{"id": f"file-{number:08}", **row} for number in range(MAX_FILES_LISTED)]
    await store.run(lambda db: db.execute(sa.insert(FILES), rows))
    began = time.thread_time()
    answer = await listed(files, "", {})
    spent = time.thread_time() - began
    found = json.loads(answer)
    assert [each["id"] for each in found["data"]] == [each["id"] for each in reversed(rows)]
    assert found["data"][0] == {**rows[-1], "object": "file", "status": "processed", "status_details": None}
    assert (found["first_id"], found["last_id"], found["has_more"]) == (rows[-1]["id"], rows[0]["id"], False)
    assert spent < 0.01


async def test_the_sweep_takes_what_has_expired_and_bytes_without_a_row(
    store: Store, files: Files, batches: Batches, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone, stays = await keep(files, expires=3600), await keep(files)
    needed = (await make(batches, files)).input_file_id
    await store.run(lambda db: db.execute(sa.update(FILES).where(FILES.c.id == needed).values(expires_at=1)))
    orphan = files.folder / "file-orphan"
    orphan.write_bytes(b"x")
    now = store.clock()
    monkeypatch.setattr(store, "clock", lambda: now + 3601)
    with pytest.raises(NotFound):
        await files.get(gone, "")
    assert await files.sweep() == 1
    assert sorted(path.name for path in files.folder.iterdir()) == sorted([stays, needed, "file-orphan"])
    monkeypatch.setattr("quire.router.files.ORPHAN_SECONDS", -1.0)
    await files.sweep()
    assert sorted(path.name for path in files.folder.iterdir()) == sorted([stays, needed])


def test_bytes_are_there_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "files" / "a"
    incoming = Incoming(path)
    incoming.write(b"abc")
    assert not path.exists()
    incoming.keep()
    incoming.discard()
    assert path.read_bytes() == b"abc"
    other = Incoming(tmp_path / "files" / "b")
    monkeypatch.setattr(kept, "RESERVE_BYTES", 1 << 62)
    with pytest.raises(StorageFull):
        other.write(b"x")
    other.discard()
    assert [each.name for each in path.parent.iterdir()] == ["a"]


async def test_the_reserve_of_the_disk_is_left_to_others(
    store: Store, batches: Batches, files: Files, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store.check_room()
    assert not store.folder.exists(), "a look makes nothing"
    batch = await make(batches, files)
    await batches.begin(batch.id, plan(1))
    reserve = kept.RESERVE_BYTES
    monkeypatch.setattr(kept, "RESERVE_BYTES", 1 << 62)
    answer = Answer(batch.id, 0, True, b"yes\n")
    for _ in range(3):
        with pytest.raises(StorageFull):
            store.check_room()
        with pytest.raises(StorageFull):
            await batches.add_answers([answer])
        asked = {"input_file_id": batch.input_file_id, "endpoint": "/v1/completions", "completion_window": "24h"}
        with pytest.raises(StorageFull):
            await batches.create(CreateBatch.model_validate(asked), "", "")
    assert [record.levelname for record in caplog.records] == ["ERROR"], "it is told once"
    assert (await batches.get(batch.id, "")).completed == 0
    await batches.cancel(batch.id, "")  # what ends something needs no room
    monkeypatch.setattr(kept, "RESERVE_BYTES", reserve)
    await batches.add_answers([answer])
    assert (await batches.get(batch.id, "")).completed == 1
    store.folder.rename(store.folder.with_name("elsewhere"))
    store.folder.parent.rename(store.folder.parent.with_name("away"))
    with pytest.raises(StorageUnavailable):
        store.check_room()


async def test_a_line_has_one_answer_however_often_it_comes(batches: Batches, files: Files) -> None:
    batch = await make(batches, files)
    assert (await batches.begin(batch.id, plan(3))).total == 3
    await batches.add_answers(
        [Answer(batch.id, 1, True, b"first\n", 5, 2, 7), Answer(batch.id, 0, False, b"no\n")]
    )
    await batches.add_answers([Answer(batch.id, 1, True, b"second\n", 5, 2, 7), Answer(batch.id, 1, False, b"x")])
    found = await batches.get(batch.id, "")
    assert (found.completed, found.failed) == (1, 1)
    assert (found.input_tokens, found.cached_tokens, found.output_tokens) == (5, 2, 7)
    again, answered = await batches.plan(batch.id)
    assert (again, answered) == (plan(3), {0, 1})
    assert list(stored.lines_without_answer(again, answered)) == [2]
    assert await batches.answers(batch.id, range(3)) == {0: (False, b"no\n"), 1: (True, b"first\n")}
    assert await batches.answers(batch.id, range(1, 2)) == {1: (True, b"first\n")}


async def test_the_end_of_a_batch_is_one_step(batches: Batches, files: Files) -> None:
    batch = await make(batches, files)
    await batches.begin(batch.id, plan(1))
    await batches.add_answers([Answer(batch.id, 0, True, b"yes\n")])
    with pytest.raises(Conflict):
        await files.delete(batch.input_file_id, "")
    finalizing = await batches.finalize(batch.id)
    output_id, output = files.begin()
    output.write(b"yes\n")
    output.keep()
    done = await batches.end(finalizing, "completed", (output_id, output.size), ("file-none", 0))
    assert (done.status, done.output_file_id, done.error_file_id) == ("completed", output_id, None)
    assert (await batches.plan(batch.id), await batches.answers(batch.id, range(9))) == ((Plan(), set()), {})
    assert await batches.end(finalizing, "expired", ("file-x", 1), ("file-y", 1)) == done, "it has ended"
    kept_file = await files.get(output_id, "")
    assert (kept_file.purpose, kept_file.filename) == ("batch_output", f"{batch.id}_output.jsonl")
    await files.delete(batch.input_file_id, "")
    assert await batches.live() == []


async def test_who_comes_second_changes_no_status(batches: Batches, files: Files) -> None:
    cancelled = await make(batches, files)
    cancelling = await batches.cancel(cancelled.id, "")
    assert cancelling.status == "cancelling"
    for late in (
        await batches.begin(cancelled.id, plan(1)),
        await batches.fail(cancelled.id, []),
        await batches.finalize(cancelled.id),
        await batches.cancel(cancelled.id, ""),
    ):
        assert late == cancelling
    failed = await make(batches, files)
    await batches.fail(failed.id, [{"code": "x", "message": "y", "param": None, "line": 1}])
    with pytest.raises(Conflict, match="failed"):
        await batches.cancel(failed.id, "")
    assert [each.id for each in await batches.live()] == [cancelled.id]


async def test_a_batch_needs_an_input_that_is_one(
    batches: Batches, files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    for file_id in ("file-none", await keep(files, purpose="batch_output")):
        asked = {"input_file_id": file_id, "endpoint": "/v1/completions", "completion_window": "24h"}
        with pytest.raises(InvalidRequest) as refused:
            await batches.create(CreateBatch.model_validate(asked), "", "")
        assert refused.value.param == "input_file_id"
    await make(batches, files)
    monkeypatch.setattr(stored, "MAX_LIVE", 1)
    with pytest.raises(QueueFull):
        await make(batches, files)


async def test_batches_that_ended_long_ago_are_forgotten(
    store: Store, batches: Batches, files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended, live = await make(batches, files), await make(batches, files)
    await batches.fail(ended.id, [])
    now = store.clock()
    monkeypatch.setattr(store, "clock", lambda: now + KEPT_SECONDS - 10)
    await batches.sweep()
    await batches.get(ended.id, "")
    monkeypatch.setattr(store, "clock", lambda: now + KEPT_SECONDS + 10)
    await batches.sweep()
    with pytest.raises(NotFound):
        await batches.get(ended.id, "")
    assert (await batches.get(live.id, "")).status == "validating"


async def test_the_event_loop_does_not_wait_for_the_disk(store: Store) -> None:
    slow = asyncio.create_task(store.run(lambda _: time.sleep(0.3)))
    began = time.monotonic()
    await asyncio.sleep(0.01)
    assert time.monotonic() - began < 0.25
    await slow


async def test_what_was_kept_before_there_were_tenants_is_nobodys_and_stays(tmp_path: Path) -> None:
    first = Store(tmp_path / "router")
    file_id = await keep(Files(first), b"abc")
    batch = await make(Batches(first, Files(first)), Files(first))
    await first.close()
    with closing(sqlite3.connect(first.folder / "router.db")) as db:  # as a version without tenants has left it
        for table, column in (("files", "owner"), ("batches", "owner"), ("batches", "owner_key")):
            db.execute(f"ALTER TABLE {table} DROP COLUMN {column}")
        for later in ("responses", "usage"):
            db.execute(f"DROP TABLE IF EXISTS {later}")
        db.execute("UPDATE meta SET value = '1' WHERE key = 'schemaVersion'")
        db.commit()
    second = Store(tmp_path / "router")
    files = Files(second)
    assert (await files.get(file_id, "")).bytes == 3
    assert (await Batches(second, files).get(batch.id, "")).owner == ""
    for owner in ("team", "other"):
        with pytest.raises(NotFound):
            await files.get(file_id, owner)
    await second.close()


async def test_what_is_somebodys_is_there_for_him_alone(store: Store, files: Files, batches: Batches) -> None:
    file_id, incoming = files.begin()
    incoming.write(b"{}")
    incoming.keep()
    await files.add(file_id, "batch", "in.jsonl", 2, None, "team")
    asked = CreateBatch.model_validate(
        {"input_file_id": file_id, "endpoint": "/v1/completions", "completion_window": "24h"}
    )
    with pytest.raises(InvalidRequest, match="no file that is here"):
        await batches.create(asked, "other", "k")
    batch = await batches.create(asked, "team", "k")
    assert (batch.owner, batch.owner_key) == ("team", "k")
    for other in ("other", ""):
        calls: list[tuple[Any, str]] = [
            *((call, file_id) for call in (files.get, files.delete)),
            *((call, batch.id) for call in (batches.get, batches.cancel)),
        ]
        for call, name in calls:
            with pytest.raises(NotFound):
                await call(name, other)
        assert await batches.page(other, 10, None) == ([], False)
        assert await files.page(other, 10, None, newest_first=True, purpose=None) == ([], False)
    assert [each.id for each in (await batches.page("team", 10, None))[0]] == [batch.id]
    begun = await batches.begin(batch.id, plan(1))
    output_id, output = files.begin()
    output.write(b"{}")
    output.keep()
    await batches.add_answers([Answer(batch.id, 0, True, b"{}")])
    await batches.finalize(begun.id)
    ended = await batches.end(await batches.read(batch.id), "completed", (output_id, 2), ("", 0))
    assert (await files.get(str(ended.output_file_id), "team")).purpose == "batch_output"
    with pytest.raises(NotFound):
        await files.get(str(ended.output_file_id), "other")
