"""The store: what is durable, what is refused, what is not written at all."""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from quire_operators.clock import on_the_wall
from quire_operators.database import Conflict, NotFound
from quire_operators.inventory import Managed
from quire_operators.records import Change, NewRevision
from quire_operators.rollout import Cause, Exit, Goal, Row
from quire_operators.sqlite import StoreUnavailable, UnusableStore
from quire_operators.store import Store
from quire_schemas.resource import Key

KEY = Key("model", "m")
SPEC = {"replicas": 1}


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def file_store(tmp_path: Path, clock: Clock) -> Iterator[Store]:
    store = Store(tmp_path / "state.db", clock)
    yield store
    store.close()


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.nightly)])
def store(request: pytest.FixtureRequest, tmp_path: Path, clock: Clock) -> Iterator[Store]:
    """A store on each of the two; by day `test_lease` and `test_backup` are what tries the other one."""
    on_file = request.param == "sqlite"
    store = Store(tmp_path / "state.db" if on_file else request.getfixturevalue("postgres").database(), clock)
    yield store
    store.close()


def change(hash_: str = "h1", expected: int | None = None, template: str | None = "t1") -> Change:
    revision = NewRevision(template, 1, {"memory": 1}, "created") if template else None
    return Change(KEY, {"spec": {"a": hash_}}, hash_, SPEC, expected, revision, keep_revisions=2)


def row(**more: object) -> Row:
    base = Row("m-r1-0", "m", 0, 1, "t1", Goal.RUN, 1000.0, memory=5)
    return replace(base, **more)  # type: ignore[arg-type]


def test_an_intent_is_kept_with_its_revision_and_its_hash_decides_what_is_new(store: Store) -> None:
    (created,) = store.apply([change()])
    assert (created.result, created.generation, created.revision) == ("created", 1, 1)
    (same,) = store.apply([change(expected=1)])
    assert (same.result, same.generation) == ("unchanged", 1)
    stored = store.get(KEY)
    assert stored is not None
    assert stored.resource_version == 1
    (hot,) = store.apply([change("h2", 1, template=None)])
    assert (hot.result, hot.generation, hot.revision) == ("updated", 2, 1)
    (rolled,) = store.apply([change("h3", 2, template="t2")])
    assert (rolled.generation, rolled.revision) == (3, 2)
    assert [r.template_hash for r in store.revisions(stored.uid)] == ["t2", "t1"]


def test_the_same_intent_writes_nothing(file_store: Store, tmp_path: Path) -> None:
    file_store.apply([change()])
    file_store.put_status(file_store.objects()[0].uid, {"summary": "x", "list": [1, [2]]})
    with closing(sqlite3.connect(tmp_path / "state.db")) as other:
        before = other.execute("PRAGMA data_version").fetchone()
        file_store.apply([change(expected=1)])
        assert not file_store.put_status(file_store.objects()[0].uid, {"summary": "x", "list": [1, [2]]})
        assert other.execute("PRAGMA data_version").fetchone() == before
        assert file_store.put_status(file_store.objects()[0].uid, {"summary": "y"})
        assert other.execute("PRAGMA data_version").fetchone() != before


def test_apply_is_all_or_nothing_and_compares_versions(store: Store) -> None:
    store.apply([change()])
    other = replace(change(), key=Key("model", "other"))
    with pytest.raises(Conflict):
        store.apply([other, change("h2", expected=7)])
    assert store.get(other.key) is None


def test_it_survives_being_closed_and_keeps_its_installation(tmp_path: Path) -> None:
    first = Store(tmp_path / "state.db")
    first.apply([change()])
    first.create_replica(row())
    first.set_routing_version(12)
    install = first.install_id
    first.close()
    second = Store(tmp_path / "state.db")
    assert second.install_id == install
    assert second.replicas() == (row(),)
    assert second.routing_version() == 12
    assert (tmp_path / "state.db").stat().st_mode & 0o777 == 0o600
    second.close()


def test_it_writes_as_promised(file_store: Store, tmp_path: Path) -> None:
    with file_store._database.transaction() as db:
        assert db.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"
        assert db.exec_driver_sql("PRAGMA synchronous").scalar() == 2
        other = sqlite3.connect(tmp_path / "state.db", timeout=0)
        with closing(other), pytest.raises(sqlite3.OperationalError, match="locked"):
            other.execute("BEGIN IMMEDIATE")


def test_a_deletion_keeps_the_object_until_it_is_removed(store: Store) -> None:
    store.apply([change()])
    marked = store.mark_deleting(KEY)
    assert marked.deletion_time is not None
    assert marked.generation == 2
    assert store.mark_deleting(KEY) == marked
    with pytest.raises(Conflict, match="being deleted"):
        store.apply([change("h9", marked.resource_version)])
    store.remove(KEY)
    assert store.get(KEY) is None
    with pytest.raises(NotFound):
        store.mark_deleting(KEY)


def test_what_a_source_remembers_and_manages_goes_with_it(store: Store) -> None:
    source = Key("gitsource", "prod")
    store.apply([replace(change(template=None), key=source), change()])
    stored = store.get(source)
    assert stored is not None
    store.inventory.keep([Managed(KEY, stored.uid, "prod", "3f1c", "a.yaml", "h")])
    store.inventory.remember(stored.uid, {"applied": "3f1c"})
    assert store.inventory.manager(KEY) is not None
    store.remove(source)
    assert store.inventory.manager(KEY) is None
    assert store.inventory.memory(stored.uid) == {}
    assert store.get(KEY) is not None


def test_revisions_beyond_the_limit_are_forgotten(store: Store) -> None:
    for number in range(5):
        store.apply([change(f"h{number}", number or None, template=f"t{number}")])
    stored = store.get(KEY)
    assert stored is not None
    assert [r.n for r in store.revisions(stored.uid)] == [5, 4, 3]


def test_what_needs_no_new_revision_is_wanted_of_the_last_one(store: Store) -> None:
    store.apply([change()])
    store.apply([replace(change("h2", 1, template=None), resolved={"replicas": 3})])
    store.apply([replace(change("h3", 2, template="t2"), resolved={"replicas": 4})])
    stored = store.get(KEY)
    assert stored is not None
    assert [(r.n, r.resolved["replicas"]) for r in store.revisions(stored.uid)] == [(2, 4), (1, 3)]


def test_a_revision_with_an_old_template_adopts_its_replicas_and_load_time(store: Store) -> None:
    store.apply([change()])
    stored = store.get(KEY)
    assert stored is not None
    store.create_replica(row())
    store.set_load_seconds(stored.uid, 1, 4.5)
    store.apply([change("h2", 1, template="t2")])
    store.apply([change("h3", 2, template="t1")])
    assert [r.revision for r in store.replicas("m")] == [3]
    assert store.revisions(stored.uid)[0].load_seconds == 4.5


def test_replica_rows_are_compared_before_they_are_set(store: Store) -> None:
    old = store.create_replica(row())
    new = store.update_replica(old, replace(old, incarnation=1, nonce="n"))
    with pytest.raises(Conflict):
        store.update_replica(old, replace(old, goal=Goal.DRAIN))
    assert store.replicas() == (new,)
    with pytest.raises(Conflict):
        store.update_replica(row(id="gone"), row(id="gone"))


def test_no_incarnation_is_ever_used_twice(store: Store) -> None:
    old = store.create_replica(row())
    store.update_replica(old, replace(old, incarnation=4))
    store.delete_replica(old)
    again = store.create_replica(row())
    assert (again.incarnation, again.exited) == (4, 4)
    assert [store.next_incarnation("gateway") for _ in range(3)] == [1, 2, 3]


def test_equal_events_are_counted_and_old_or_surplus_ones_dropped(store: Store, clock: Clock) -> None:
    store.add_event(KEY, "Warning", "Old", "long ago")
    clock.now += 8 * 86400
    for number in range(230):
        store.add_event(KEY, "Normal", "R", f"message {number}")
    store.add_event(KEY, "Normal", "R", "message 229")
    store.add_event(Key("model", "x"), "Normal", "R", "message 229")
    events = store.events(KEY)
    assert len(events) == 200
    assert events[0].message == "message 30"
    assert (events[-1].message, events[-1].count) == ("message 229", 2)
    assert len(store.events()) == 201
    assert [event.object for event in store.events(after=events[-1].id)] == ["model/x"]


def test_a_file_that_is_no_store_is_refused(tmp_path: Path) -> None:
    (tmp_path / "junk.db").write_bytes(os.urandom(4096))
    with pytest.raises(UnusableStore, match="not a usable store"):
        Store(tmp_path / "junk.db")
    store = Store(tmp_path / "newer.db")
    with store._database.transaction() as db:
        db.exec_driver_sql("UPDATE meta SET value = '99' WHERE key = 'schemaVersion'")
    store.close()
    with pytest.raises(UnusableStore, match="another version"):
        Store(tmp_path / "newer.db")


def test_a_store_that_was_moved_away_acknowledges_nothing(file_store: Store, tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    file_store.create_replica(row())
    path.rename(tmp_path / "aside.db")
    with pytest.raises(StoreUnavailable, match="was moved away") as refused:
        file_store.set_routing_version(7)
    assert refused.value.passing
    path.write_bytes(b"")
    with pytest.raises(StoreUnavailable, match="or replaced"):
        file_store.set_routing_version(7)
    (tmp_path / "aside.db").rename(path)
    file_store.set_routing_version(7)
    assert file_store.routing_version() == 7


def test_a_revision_stays_on_record_as_long_as_a_replica_is_of_it(store: Store) -> None:
    store.apply([change()])
    kept = store.create_replica(row())
    for number in range(2, 7):
        store.apply([change(f"h{number}", expected=number - 1, template=f"t{number}")])
    stored = store.get(KEY)
    assert stored is not None
    assert [revision.n for revision in store.revisions(stored.uid)] == [6, 5, 4, 1]
    store.delete_replica(kept)
    store.apply([change("h7", expected=6, template="t7")])
    assert [revision.n for revision in store.revisions(stored.uid)] == [7, 6, 5]


def test_events_of_a_deleted_object_stay_apart_from_those_of_a_new_one_of_its_name(store: Store) -> None:
    store.apply([change()])
    for _ in range(2):
        store.add_event(KEY, "Warning", "Crashed", "killed by SIGKILL")
    store.mark_deleting(KEY)
    store.add_event(KEY, "Normal", "Deleted", "gone")
    store.remove(KEY)
    assert [event.reason for event in store.events(KEY)] == ["Crashed", "Deleted"], "a dead name tells its story"
    store.apply([change()])
    store.add_event(KEY, "Warning", "Crashed", "killed by SIGKILL")
    (own,) = store.events(KEY)
    assert own.count == 1
    assert [event.count for event in store.events() if event.reason == "Crashed"] == [2, 1]


def test_the_clock_reads_like_unix_time_goes_on_over_restarts_and_is_moved_by_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = Store(tmp_path / "state.db")
    assert first.clock() == pytest.approx(time.time(), abs=5)
    before = first.clock()
    first.close()
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() - 86400)
    again = Store(tmp_path / "state.db")
    assert before <= again.clock() < before + 5
    assert on_the_wall(again.clock() - 60, again.clock) == pytest.approx(time.time() - 60, abs=1)
    again.apply([change()])
    again.close()
    monkeypatch.setattr("quire_operators.database.boot_id", lambda: "another boot")
    rebooted = Store(tmp_path / "state.db")
    assert rebooted.clock() >= before, "no time on record lies ahead, whatever the wall clock says after a boot"
    rebooted.close()


def test_what_was_read_is_read_anew_when_another_connection_has_written(file_store: Store, tmp_path: Path) -> None:
    file_store.apply([change()])
    file_store.create_replica(row())
    stored = file_store.get(KEY)
    assert stored is not None
    file_store.put_status(stored.uid, {"a": 1})
    assert file_store.replicas() == (row(),)
    assert file_store.status(stored.uid) == {"a": 1}
    version = file_store.rows_version
    with closing(sqlite3.connect(tmp_path / "state.db", isolation_level=None)) as db:
        db.execute("UPDATE replicas SET restarts = 7")
        db.execute("""UPDATE status SET json = '{"a": 2}'""")
        db.execute("UPDATE objects SET generation = 9")
    assert file_store.replicas("m")[0].restarts == 7
    assert file_store.rows_version > version
    assert file_store.status(stored.uid) == {"a": 2}
    assert [each.generation for each in file_store.objects("model")] == [9]


def test_what_was_read_is_not_what_a_transaction_that_failed_would_have_written(store: Store) -> None:
    store.apply([change()])
    first = store.create_replica(row())
    assert store.replicas() == (first,)
    with pytest.raises(Conflict):
        store.update_replica(replace(first, restarts=3), replace(first, restarts=4))
    assert store.replicas() == (first,)
    second = store.create_replica(row(id="n-r1-0", model="n"))
    assert store.replicas() == (first, second)
    store.delete_replica(first)
    assert store.replicas() == (second,)
    assert store.replicas("m") == ()


def test_a_status_that_was_given_out_is_the_callers(store: Store) -> None:
    store.apply([change()])
    stored = store.get(KEY)
    assert stored is not None
    store.put_status(stored.uid, {"a": 1, "b": 2})
    store.status(stored.uid).pop("a")
    assert store.status(stored.uid) == {"a": 1, "b": 2}
    assert not store.put_status(stored.uid, {"a": 1, "b": 2})


def test_how_a_replica_last_ended_is_kept(tmp_path: Path) -> None:
    store = Store(tmp_path / "state.db")
    old = store.create_replica(row())
    ended = Exit("OutOfMemory", "needs more", Cause.MEMORY, ("a line", "and another"))
    new = store.update_replica(old, replace(old, not_before=5.5, restarts=1, last_exit=ended))
    store.close()
    again = Store(tmp_path / "state.db")
    assert again.replicas() == (new,)
    again.close()


def test_a_store_of_the_first_schema_is_brought_up_to_date(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    store = Store(path)
    store.apply([change()])
    store.create_replica(row())
    store.add_event(KEY, "Normal", "Old", "from before")
    store.close()
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.execute("ALTER TABLE replicas DROP COLUMN last_exit")
        db.execute("ALTER TABLE events DROP COLUMN uid")
        db.execute("ALTER TABLE revisions DROP COLUMN stable_at")
        db.execute("ALTER TABLE revisions DROP COLUMN failure")
        db.execute("DROP TABLE overrides")
        db.execute("DELETE FROM meta WHERE key = 'clock'")
        db.execute("UPDATE meta SET value = '1' WHERE key = 'schemaVersion'")
    store = Store(path)
    assert store.replicas() == (row(),)
    assert [event.reason for event in store.events(KEY)] == ["Old"]
    stored = store.get(KEY)
    assert stored is not None
    assert store.overrides(stored.uid) == ()
    store.close()
    Store(path).close()
    with closing(sqlite3.connect(tmp_path / "state.db.schema1")) as kept:
        assert kept.execute("SELECT value FROM meta WHERE key = 'schemaVersion'").fetchone() == ("1",)
        assert kept.execute("SELECT name FROM objects").fetchall() == [("m",)]
    assert (tmp_path / "state.db.schema1").stat().st_mode & 0o777 == 0o600


def test_a_store_that_cannot_be_copied_is_not_changed(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    Store(path).close()
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.execute("UPDATE meta SET value = '2' WHERE key = 'schemaVersion'")
    (tmp_path / "state.db.schema2.part").mkdir()
    with pytest.raises(UnusableStore, match="cannot be copied before it is changed"):
        Store(path)
    with closing(sqlite3.connect(path)) as db:
        assert db.execute("SELECT value FROM meta WHERE key = 'schemaVersion'").fetchone() == ("2",)
