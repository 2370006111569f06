"""A store in a file and back, from either database to either: everything, or nothing and a word."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from tests.unit.operators.test_lease import election, taken
from tests.unit.operators.test_store import KEY, change, row

from quire_operators import backup
from quire_operators.backup import BadBackup, NotEmpty
from quire_operators.database import Deposed
from quire_operators.inventory import Managed
from quire_operators.overrides import Kind, Override
from quire_operators.rollout import Cause, Exit
from quire_operators.sqlite import UnusableStore
from quire_operators.store import Store
from quire_schemas.resource import Key

Place = Path | sa.URL


@pytest.fixture
def place(tmp_path: Path, request: pytest.FixtureRequest) -> Callable[[str], Place]:
    """A new empty place of a kind."""

    def make(kind: str) -> Place:
        if kind == "sqlite":
            return tmp_path / f"{os.urandom(4).hex()}.db"
        url: sa.URL = request.getfixturevalue("postgres").database()
        return url

    return make


def fill(where: Place) -> str:
    """Something in every table; the installation."""
    with closing(Store(where)) as store:
        store.apply([change(), replace(change(), key=Key("model", "ü"))], traceparent="00-1-2-01")
        store.apply([change("h2", 1, template="t2")])
        old = store.create_replica(row(memory=5 * 2**40))
        ended = Exit("OutOfMemory", "needs more", Cause.MEMORY, ("a line", "a\0nother\u2028one"))
        store.update_replica(old, replace(old, incarnation=3, not_before=0.1 + 0.2, last_exit=ended))
        uid = store.objects()[0].uid
        store.set_override(uid, Override(Kind.PAUSE, "me", 5.25, until=7.5))
        store.put_status(uid, {"summary": "x", "list": [1, [2.5, None, True]]})
        store.set_routing_version(7)
        store.set_note("router", {"listen": ["127.0.0.1", 1]})
        for number in range(3):
            store.add_event(KEY, "Normal", "Odd", f"number {number}")
        store.inventory.keep([Managed(KEY, "s", "prod", "3f1c", "a/ü.yaml", "h")])
        store.inventory.remember("s", {"applied": "3f1c", "history": [1]})
        return store.install_id


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ("sqlite", "postgresql"),
        ("postgresql", "sqlite"),
        pytest.param("sqlite", "sqlite", marks=pytest.mark.nightly),
        pytest.param("postgresql", "postgresql", marks=pytest.mark.nightly),
    ],
)
def test_what_is_restored_is_what_was_kept_on_either_database(
    source: str, target: str, place: Callable[[str], Place], tmp_path: Path
) -> None:
    first, second = place(source), place(target)
    install = fill(first)
    taken_ = backup.take(first, "1.0")
    assert set(taken_.counts()) == {table.name for table in backup.TABLES}, "every table is tried"
    backup.verify(taken_)
    file = tmp_path / "file"
    backup.write(taken_, file)
    assert file.stat().st_mode & 0o777 == 0o600
    assert backup.read(file) == taken_
    backup.restore(backup.read(file), second)
    assert backup.take(second, "1.0").lines == taken_.lines
    with closing(Store(second)) as store:
        assert store.install_id == install
        assert store.replicas("m")[0].memory == 5 * 2**40
        assert store.next_incarnation("m-r1-0") == 4
        store.add_event(KEY, "Normal", "New", "after it")
        assert store.events(after=3)[-1].id == 4, "numbers of events go on"


ODD: tuple[dict[str, Any], ...] = (
    {"schema": "3"}, {"version": None}, {"takenAt": 1}, {"store": []}, {"rows": True}, {"rows": -1},
    {"rows": 2**63},
)  # fmt: skip


def sealed(head: dict[str, Any], *lines: bytes) -> bytes:
    """A file whose digest is right, whatever is in it."""
    text = b"".join((json.dumps(head).encode() + b"\n", *lines))
    return text + json.dumps({"sha256": hashlib.sha256(text).hexdigest()}).encode() + b"\n"


def test_a_file_that_was_changed_cut_off_or_is_none_is_refused(
    place: Callable[[str], Place], tmp_path: Path
) -> None:
    fill(where := place("sqlite"))
    file = tmp_path / "file"
    backup.write(backup.take(where, "1.0"), file)
    whole = file.read_bytes()
    lines = whole.splitlines(keepends=True)
    head = json.loads(lines[0])
    for number, (content, said) in enumerate(
        {
            whole.replace(b'"summary": "x"', b'"summary": "y"'): "was changed",
            b"".join(lines[:3] + lines[4:]): "was changed",
            b"".join(lines[:-1]): "no whole backup",
            whole[: len(whole) // 2]: "no whole backup",
            whole[:-2]: "no whole backup",
            whole + b"x": "was changed",
            b"": "is no backup",
            b"kind: Model\n": "is no backup",
            b'{"a": 1}\n{"sha256": ""}\n': "is no backup",
            whole.replace(b'"schema": 3', b'"schema": 9'): "was changed",
            whole.replace(b'"rows": ', b'"rows": 9223372036854775807'): "is no backup",
            **{sealed({**head, "rows": 0} | odd): "is no backup" for odd in ODD},
            sealed({key: head[key] for key in head if key != "schema"} | {"rows": 0}): "is no backup",
            sealed({**head, "rows": 1}, b"\xff\n"): "is no backup",
            b"".join(lines[:-1]) + b"[" * 100_000: "no whole backup",
        }.items()
    ):
        odd = tmp_path / f"odd{number}"
        odd.write_bytes(content)
        with pytest.raises(BadBackup, match=said):
            backup.read(odd)
    with pytest.raises(BadBackup, match="is no backup"):
        backup.read(Path("/dev/zero"))


def test_a_file_of_another_schema_names_the_version_that_wrote_it(
    place: Callable[[str], Place], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(where := place("sqlite"))
    taken_ = backup.take(where, "7.1")
    monkeypatch.setattr(backup, "SCHEMA_VERSION", 99)
    backup.write(taken_, tmp_path / "file")
    monkeypatch.undo()
    with pytest.raises(BadBackup, match=r"is of quire 7\.1 \(schema 99, this version has 3\)"):
        backup.read(tmp_path / "file")


@pytest.mark.parametrize("kind", ["sqlite", pytest.param("postgresql", marks=pytest.mark.nightly)])
def test_what_has_objects_is_not_overwritten_without_a_word(kind: str, place: Callable[[str], Place]) -> None:
    fill(first := place("sqlite"))
    kept = backup.take(first, "1.0")
    second = place(kind)
    with closing(Store(second)) as store:
        store.apply([replace(change(), key=Key("model", "other"))])
    before = backup.take(second, "1.0").lines
    with pytest.raises(NotEmpty, match="objects: 1, replicas: 0"):
        backup.restore(kept, second)
    assert backup.take(second, "1.0").lines == before
    backup.restore(kept, second, replace=True)
    assert backup.take(second, "1.0").lines == kept.lines


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_a_restore_that_is_not_read_back_as_it_was_leaves_all_as_it_is(
    kind: str, place: Callable[[str], Place]
) -> None:
    fill(where := place("sqlite"))
    whole = backup.take(where, "1.0")
    odd = tuple(line.replace("number 1", "a\\u0000b") for line in whole.lines)  # which is kept as another sign
    target = place(kind)
    with closing(Store(target)) as store:
        install = store.install_id
    with pytest.raises(BadBackup, match="what was restored is not what was kept"):
        backup.restore(replace(whole, lines=odd), target)
    with closing(Store(target)) as store:
        assert store.install_id == install
        assert store.objects() == ()


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("[" * 100_000, "no row"),
        ('{"table": "objects"}', "no row"),
        ('{"table": [], "row": {}}', "no row"),
        ('{"table": "more", "row": {}}', "a table more, which"),
        ('{"table": "meta", "row": {"key": "a", "more": 1}}', "another table meta"),
    ],
)
def test_a_line_that_is_no_row_of_this_version_is_refused(line: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(BadBackup, match=said):
        backup.restore(backup.Backup("1.0", "", "", (line,)), tmp_path / "state.db")


def test_a_restore_without_the_lease_changes_nothing(place: Callable[[str], Place]) -> None:
    fill(first := place("sqlite"))
    second = place("postgresql")
    with closing(election(second)) as who, closing(election(second)) as other:
        mine = taken(who, locked=True)
        taken(other, locked=True)
        with pytest.raises(Deposed):
            backup.restore(backup.take(first, "1.0"), second, mine)
    with closing(Store(second)) as store:
        assert store.objects() == ()


@pytest.mark.nightly
@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_a_backup_is_of_one_moment_whoever_writes_meanwhile(kind: str, place: Callable[[str], Place]) -> None:
    """The writer gives two objects the same generation in each transaction: no snapshot may tell them apart."""
    where = place(kind)
    both = (Key("model", "a"), Key("model", "b"))
    with closing(Store(where)) as store:
        store.apply([replace(change("h0", template=None), key=key) for key in both])
    code = (
        "import sys, sqlalchemy as sa\n"
        "from pathlib import Path\n"
        "from quire_operators.store import Store\n"
        "from tests.unit.operators.test_store import change\n"
        "from quire_schemas.resource import Key\n"
        "from dataclasses import replace\n"
        "text = sys.argv[1]\n"
        "store = Store(sa.make_url(text) if '://' in text else Path(text))\n"
        "for n in range(1, 10**6):\n"
        "    store.apply([replace(change(f'h{n}', n, template=None), key=Key('model', x)) for x in 'ab'])\n"
        "    print(n, flush=True)\n"
    )
    text = where.render_as_string(hide_password=False) if isinstance(where, sa.URL) else str(where)
    writer = subprocess.Popen([sys.executable, "-c", code, text], stdout=subprocess.PIPE)
    assert writer.stdout is not None
    try:
        with writer.stdout as said:
            assert said.readline()
            drain = threading.Thread(target=said.read)
            drain.start()
            seen = set()
            for _ in range(20):
                rows = [json.loads(line) for line in backup.take(where, "1.0").lines]
                generations = {each["row"]["generation"] for each in rows if each["table"] == "objects"}
                assert len(generations) == 1
                seen |= generations
            writer.kill()
            drain.join(20)
    finally:
        writer.kill()
        writer.wait(20)
    assert len(seen) > 3, "it wrote meanwhile"


def test_no_file_and_no_store_is_overwritten_or_made_by_a_backup(
    place: Callable[[str], Place], tmp_path: Path
) -> None:
    missing = tmp_path / "none.db"
    with pytest.raises(UnusableStore, match="there is no store"):
        backup.take(missing, "1.0")
    assert not missing.exists()
    fill(where := place("sqlite"))
    (tmp_path / "there").write_text("mine")
    with pytest.raises(FileExistsError):
        backup.write(backup.take(where, "1.0"), tmp_path / "there")
    assert (tmp_path / "there").read_text() == "mine"
    assert [path.name for path in tmp_path.glob(".there*")] == []
