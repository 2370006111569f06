"""Who leads: taken once, renewed, expired by the database's clock, and in the way of whoever had it before."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import psycopg
import pytest
import sqlalchemy as sa
from tests.postgres import Postgres
from tests.waiting import eventually

from quire_operators import lease as module
from quire_operators.database import Deposed
from quire_operators.lease import Election, Home, Lease, enter, highest_first
from quire_operators.paths import StateDir
from quire_operators.postgres import STANDS_STILL, database_url, shown
from quire_operators.records import Change
from quire_operators.sqlite import StoreUnavailable, UnusableStore
from quire_operators.store import Store
from quire_operators.tables import META, METADATA, TEXT, WORDS
from quire_operators.whereabouts import find, settle
from quire_schemas.resource import Key

KEY = Key("model", "m")
HERE = Home("here", "/state", "machine")


NOWHERE = Path("/nowhere")


def election(place: Path | sa.URL, home: Home = HERE, acted: Path = NOWHERE) -> Election:
    return Election(place, "a test", lambda: home, acted)


def apply(store: Store, name: str = "m") -> None:
    store.apply([Change(Key("model", name), {"spec": {}}, "h", {}, None)])


def by_hand(url: sa.URL, statement: str) -> list[tuple[object, ...]]:
    """What a person at the database does; the rows that come of it."""
    address = url.set(drivername="postgresql").render_as_string(hide_password=False)
    with psycopg.connect(address, autocommit=True) as db:
        done = db.execute(statement.encode())
        return done.fetchall() if done.description is not None else []


EXPIRE = "UPDATE leases SET expires = expires - 3600"


@pytest.fixture
def url(postgres: Postgres) -> sa.URL:
    return postgres.database()


@pytest.fixture
def two(url: sa.URL) -> Iterator[tuple[Election, Election]]:
    first, second = election(url), election(url)
    yield first, second
    first.close()
    second.close()


def taken(who: Election, *, locked: bool = False) -> Lease:
    lease = who.take(locked=locked)
    assert lease is not None
    return lease


def test_one_has_it_until_it_expires_and_every_holder_has_a_higher_epoch(
    two: tuple[Election, Election], url: sa.URL
) -> None:
    first, second = two
    mine = taken(first)
    assert mine.epoch == 1
    assert second.take(locked=False) is None
    assert first.take(locked=False) is None, "who has it renews it, and does not take it again"
    first.renew(mine, locked=False)
    assert second.take(locked=True) is None, "the last holder had no lock: that it is free says nothing"
    by_hand(url, EXPIRE)
    assert taken(second).epoch == 2
    assert mine.is_sure(), "the old one cannot know by itself"
    first.renew(mine, locked=False)
    assert mine.lost
    with pytest.raises(Deposed, match="another control plane leads"):
        mine.check()


def test_who_has_the_lock_that_the_last_one_had_need_not_wait(two: tuple[Election, Election]) -> None:
    first, second = two
    taken(first, locked=True)
    assert second.take(locked=False) is None
    assert taken(second, locked=True).epoch == 2


def test_the_lock_of_another_kernel_says_nothing(
    two: tuple[Election, Election], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = two
    taken(first, locked=True)
    with monkeypatch.context() as elsewhere:  # a copy of the state directory, with a lock of its own
        elsewhere.setattr(module, "boot_id", lambda: "another")
        assert second.take(locked=True) is None
    assert taken(second, locked=True).epoch == 2


def test_one_that_gives_up_leaves_it_at_once(two: tuple[Election, Election]) -> None:
    first, second = two
    first.give_up(taken(first))
    assert taken(second).epoch == 2


def test_an_expired_lease_that_nobody_took_goes_on(two: tuple[Election, Election], url: sa.URL) -> None:
    mine = taken(two[0])
    by_hand(url, EXPIRE)
    two[0].renew(mine, locked=False)
    assert not mine.lost
    assert two[1].take(locked=False) is None


def test_of_many_at_once_one_gets_it(url: sa.URL) -> None:
    several = [election(url) for _ in range(6)]
    found: list[Lease | None] = []
    threads = [
        threading.Thread(target=lambda each=each: found.append(each.take(locked=False))) for each in several
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(found) == 6
    assert [each.epoch for each in found if each is not None] == [1]
    for each in several:
        each.close()


def test_one_is_not_sure_any_more_before_the_lease_expires(url: sa.URL, monkeypatch: pytest.MonkeyPatch) -> None:
    now = module._now()
    monkeypatch.setattr(module, "_now", lambda: now)  # it stands still, whatever the machine does meanwhile
    with closing(election(url)) as who:
        mine = taken(who)
        ahead = module.LEASE_SECONDS - module.MARGIN_SECONDS
        monkeypatch.setattr(module, "_now", lambda: now + ahead - 0.5)
        mine.check()
        monkeypatch.setattr(module, "_now", lambda: now + ahead)
        with pytest.raises(Deposed, match="cannot tell whether it still leads"):
            mine.check()
        who.renew(mine, locked=False)
        mine.check()


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_who_was_deposed_writes_nothing_and_can_read(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    place = tmp_path / "state.db" if kind == "sqlite" else request.getfixturevalue("postgres").database()
    with closing(election(place)) as first, closing(election(place)) as second:
        old = taken(first, locked=True)
        with closing(Store(place, lease=old)) as store:
            apply(store)
            new = taken(second, locked=True)
            stored = store.get(KEY)
            assert stored is not None
            for write in (
                lambda: apply(store, "other"),
                lambda: store.add_event(KEY, "Normal", "Odd", "a word"),
                lambda: store.put_status(stored.uid, {"summary": "odd"}),
                lambda: store.set_routing_version(99),
                lambda: store.next_incarnation("router"),
                lambda: store.remove(KEY),
            ):
                with pytest.raises(Deposed):
                    write()
            assert old.lost
            assert store.get(KEY) is not None
        with closing(Store(place, lease=new)) as store:
            assert [each.key.name for each in store.objects()] == ["m"]
            assert store.events() == ()
            assert store.routing_version() == 0
            apply(store, "other")


def test_a_transaction_under_way_is_over_before_anybody_else_leads(
    two: tuple[Election, Election], url: sa.URL
) -> None:
    first, second = two
    mine = taken(first, locked=True)
    with closing(Store(url, lease=mine)) as store:
        order: list[str] = []

        def take() -> None:
            taken(second, locked=True)
            order.append("taken")

        with store._database.transaction() as db:
            db.execute(sa.insert(META).values(key="note:x", value="{}"))
            taker = threading.Thread(target=take)
            taker.start()
            time.sleep(0.3)
            order.append("committed")
        taker.join(20)
        assert order == ["committed", "taken"]
        assert store.note("x") == {}
        with pytest.raises(Deposed):
            store.set_note("x", {})


@pytest.mark.nightly
def test_one_that_stands_still_in_a_transaction_keeps_nobody_from_leading(
    two: tuple[Election, Election], url: sa.URL
) -> None:
    first, second = two
    mine = taken(first, locked=True)
    with closing(Store(url, lease=mine)) as store:
        began = time.monotonic()
        with pytest.raises(StoreUnavailable), store._database.transaction() as db:
            db.execute(sa.insert(META).values(key="note:x", value="{}"))
            assert taken(second, locked=True).epoch == 2
            assert time.monotonic() - began < STANDS_STILL + 5
        assert store.note("x") == {}
        with pytest.raises(Deposed):
            store.set_note("x", {"a": 1})


def test_a_version_that_is_too_old_does_not_lead_and_does_not_open(url: sa.URL) -> None:
    with closing(election(url)) as who:
        who.give_up(taken(who))
        Store(url).close()
        by_hand(url, "UPDATE meta SET value = '99' WHERE key = 'minWriterVersion'")
        for refused in (lambda: who.take(locked=True), lambda: Store(url)):
            with pytest.raises(
                UnusableStore, match=r"another version \(writers of version 99, this version has 1\)"
            ):
                refused()


def test_another_state_directory_is_told_whose_database_it_is(url: sa.URL) -> None:
    with closing(election(url)) as who, closing(election(url, Home("there", "/other", "m2"))) as other:
        who.give_up(taken(who))
        with pytest.raises(UnusableStore, match="the store of the state directory /state on machine"):
            other.take(locked=True)


def test_what_was_read_is_read_anew_when_somebody_else_has_written(url: sa.URL) -> None:
    with closing(Store(url)) as store:
        apply(store)
        before = store.others_version
        store.set_routing_version(3)
        apply(store, "n")
        assert [each.generation for each in store.objects()] == [1, 1]
        assert store.others_version == before, "its own writes are no news"
        by_hand(url, "UPDATE objects SET generation = 9")
        eventually(lambda: [each.generation for each in store.objects()] == [9, 9], "it heard of it", 5)
        assert store.others_version > before
        assert store.inventory.all() == {}
        by_hand(url, "INSERT INTO managed VALUES ('model', 'm', 'uid', 'prod', '3f1c', 'a.yaml', 'h')")
        eventually(lambda: KEY in store.inventory.all(), "it heard of that, too", 5)


def test_every_text_is_compared_by_its_bytes() -> None:
    texts = [column for table in METADATA.sorted_tables for column in table.columns if _is_text(column)]
    assert len(texts) > 30
    assert [column for column in texts if column.type is not TEXT and column.type is not WORDS] == []


def _is_text(column: sa.Column[object]) -> bool:
    return isinstance(column.type, sa.String | sa.types.TypeDecorator)


def test_a_server_that_was_away_is_used_again(postgres: Postgres) -> None:
    url = postgres.database()
    with closing(Store(url)) as store:
        apply(store)
        postgres.stop()
        try:
            with pytest.raises(StoreUnavailable, match="cannot be used now") as refused:
                apply(store, "n")
            assert refused.value.passing
            with pytest.raises(StoreUnavailable):
                Store(url)
        finally:
            postgres.start()
        apply(store, "n")
        assert [each.key.name for each in store.objects()] == ["m", "n"]
        by_hand(url, "UPDATE objects SET generation = 9")
        eventually(lambda: {each.generation for each in store.objects()} == {9}, "it hears again", 5)


def test_words_with_a_nul_and_bytes_beyond_32_bits_are_kept(url: sa.URL) -> None:
    with closing(Store(url)) as store:
        store.add_event(KEY, "Warning", "Crashed", "a\0b")
        assert [event.message for event in store.events()] == ["a␀b"]
    query = (
        "SELECT data_type FROM information_schema.columns WHERE table_name = 'replicas' AND column_name = 'memory'"
    )
    assert by_hand(url, query) == [("bigint",)]


def test_an_older_store_is_copied_and_brought_up_to_date(url: sa.URL) -> None:
    with closing(Store(url)) as store:
        apply(store)
    by_hand(url, "ALTER TABLE revisions DROP COLUMN stable_at, DROP COLUMN failure")
    by_hand(url, "UPDATE meta SET value = '2' WHERE key = 'schemaVersion'")
    with closing(Store(url)) as store:
        assert store.get(KEY) is not None
        assert store.revisions("x") == ()
    assert by_hand(url, "SELECT name FROM quire_schema2.objects") == [("m",)]


def test_a_file_that_was_led_from_loses_nothing_when_others_look_at_it(tmp_path: Path) -> None:
    """A process that closes any descriptor of a file lets go of its locks, and the next one to close it would take
    the log of writes for nobody's."""
    path = tmp_path / "state.db"
    with closing(election(path)) as who:
        lease = taken(who, locked=True)
        with closing(Store(path, lease=lease)) as store:
            look = f"import sqlite3; sqlite3.connect({str(path)!r}).execute('SELECT * FROM meta').fetchall()"
            subprocess.run([sys.executable, "-c", look], check=True)
            apply(store)
            with closing(sqlite3.connect(path)) as db:
                assert db.execute("SELECT name FROM objects").fetchall() == [("m",)]


def test_numbers_of_those_who_led_are_never_taken_back(tmp_path: Path) -> None:
    folder = tmp_path / "epochs"
    enter(folder, 3)
    enter(folder, 12)
    enter(folder, 4)
    assert highest_first(folder)[0] == 12


def test_a_store_that_is_new_here_counts_on_from_whoever_led_here(tmp_path: Path) -> None:
    folder = tmp_path / "epochs"
    enter(folder, 40)
    with closing(election(tmp_path / "new.db", acted=folder)) as first:
        assert taken(first, locked=True).epoch == 41
        assert taken(first, locked=True).epoch == 42
        enter(folder, 50)  # another store was led from meanwhile, and this one is come back to
        assert taken(first, locked=True).epoch == 51


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("not a url", "is not a URL"),
        ("mysql://u:secret@h/d", "names mysql"),
        ("postgresql+asyncpg://u:secret@h/d", r"names postgresql\+asyncpg"),
        ("sqlite:///x.db", "names sqlite"),
        ("postgresql://u:secret@h", "names no database"),
    ],
)
def test_an_address_that_will_not_do_is_refused_without_its_password(text: str, said: str) -> None:
    with pytest.raises(UnusableStore, match=said) as refused:
        database_url(text)
    assert "secret" not in refused.value.message + refused.value.hint


def test_a_database_is_shown_without_user_password_and_options() -> None:
    url = database_url("postgresql://u:secret@h:5433/d?sslpassword=other&password=third")
    assert shown(url) == "postgresql://h:5433/d"


def test_a_server_that_cannot_be_reached_is_named_without_its_password() -> None:
    with pytest.raises(StoreUnavailable, match=r"postgresql://127\.0\.0\.1:1/d cannot be used now") as refused:
        Store(database_url("postgresql://u:secret@127.0.0.1:1/d"))
    assert "secret" not in refused.value.message + refused.value.hint


def test_a_server_that_has_no_second_connection_is_named(url: sa.URL) -> None:
    by_hand(url, f"CREATE ROLE {url.database}_one LOGIN CONNECTION LIMIT 1")
    by_hand(url, f"ALTER DATABASE {url.database} OWNER TO {url.database}_one")
    with pytest.raises(StoreUnavailable, match="too many connections for role") as refused:
        Store(url.set(username=f"{url.database}_one"))
    assert refused.value.hint


def test_a_state_directory_keeps_to_its_database(tmp_path: Path, url: sa.URL) -> None:
    state = StateDir(tmp_path / "state")
    state.root.mkdir()
    given = {"QUIRE_DATABASE": url.render_as_string(hide_password=False)}
    assert find(state, {}) == state.store
    assert find(state, given) == url
    with closing(Store(state.store)) as store:
        apply(store)
    with pytest.raises(UnusableStore, match="has a store with 1 objects in it") as refused:
        find(state, given)
    assert "platform backup" in refused.value.hint
    settle(state, find(state, given, moving=True))
    assert find(state, given) == url
    with pytest.raises(UnusableStore, match="and QUIRE_DATABASE is not set"):
        find(state, {})
    with pytest.raises(UnusableStore, match="and QUIRE_DATABASE names postgresql://h/other"):
        find(state, {"QUIRE_DATABASE": "postgresql://h/other"})
    assert state.database.stat().st_mode & 0o777 == 0o600
