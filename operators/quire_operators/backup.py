"""A store in one portable file, and back: from SQLite or PostgreSQL, to either.

The file is text, a JSON document a line: a head, the rows of all tables in the order of their primary keys, and
the SHA-256 of all lines before the last. It is taken from one snapshot, whoever writes meanwhile. What it holds
is what the store holds: intents, revisions, decisions, replicas, statuses, events; of keys only their digests,
and of secrets only their names. Not in it: who leads, secrets themselves, and what the router keeps (files,
batches, responses).

Both ways are proven, not assumed. A backup is restored into a fresh database, and a restore is read back before it
is committed; in both cases every row has to be the same.

Exceptions, besides those of `database`:

    StoreError
    ├── BadBackup           a file that is none, is damaged, or is of another version
    ├── NotEmpty            what would be restored over has objects
    └── NothingStored       there is nothing yet that could be kept (an `UnusableStore`)
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import sqlite3
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

import sqlalchemy as sa

from quire_operators.database import Database, Leading, location
from quire_operators.paths import sync_folder
from quire_operators.postgres import Server
from quire_operators.sqlite import StoreError, StoreUnavailable, UnusableStore
from quire_operators.tables import EVENTS, LEASES, META, METADATA, OBJECTS, REPLICAS, SCHEMA_VERSION

FORMAT = 1
CHUNK = 500
MAX_HEAD = 64 * 1024
MAX_LINE = 64 * 1024 * 1024
"""Bytes of the first line, and of any other."""
MAX_ROWS = 2**31
HEAD = {"quireBackup": int, "schema": int, "version": str, "takenAt": str, "store": str, "rows": int}
"""What the first line has, whatever the format."""
OWN_SETTINGS = ("home", "schemaVersion", "minWriterVersion")
"""Of `meta`, what belongs to a database and not to what is in it."""
TABLES = tuple(table for table in METADATA.sorted_tables if table is not LEASES)


class BadBackup(StoreError):
    """The file cannot be restored."""


class NotEmpty(StoreError):
    """There is something that a restore would overwrite."""


class NothingStored(UnusableStore):
    """No control plane ever wrote there."""


@dataclass(frozen=True, slots=True)
class Backup:
    """The content of a file: where it came from, and every row as a line."""

    version: str
    taken_at: str
    store: str
    lines: tuple[str, ...]

    def counts(self) -> Mapping[str, int]:
        """Rows by table."""
        return Counter(json.loads(line)["table"] for line in self.lines)


# ── taking one ────────────────────────────────────────────────────────────────────────────────────────────


def take(place: Path | sa.URL, version: str) -> Backup:
    """The content of a store as it is now, also while a control plane writes. Raises `StoreError`."""
    with _snapshot(place) as (db, name):
        found = db.scalar(sa.select(META.c.value).where(META.c.key == "schemaVersion"))
        if found is None:
            raise NothingStored(f"nothing was ever stored in {name}", "platform apply makes a store of it")
        if found != str(SCHEMA_VERSION):
            raise UnusableStore(
                f"{name} is of schema {found}, and this version of schema {SCHEMA_VERSION}",
                "use the version that wrote it, or start this one on it first: platform daemon start",
            )
        lines = tuple(_lines(db))
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return Backup(version, now, name, lines)


@contextmanager
def _snapshot(place: Path | sa.URL) -> Iterator[tuple[sa.Connection, str]]:
    """A connection that sees one moment and changes nothing, and what people call the place."""
    if isinstance(place, Path):
        if not place.exists():
            raise UnusableStore(f"there is no store {place}", "platform apply makes one")
        name = str(place)
        address = f"file:{quote(name)}?mode=ro"
        engine = sa.create_engine(
            "sqlite://",
            creator=lambda: sqlite3.connect(address, uri=True, isolation_level=None),
            poolclass=sa.pool.StaticPool,
        )
        begin = "BEGIN"
    else:
        name = str(Server(place))
        engine = location(place).engine()
        begin = "SET TRANSACTION ISOLATION LEVEL REPEATABLE READ READ ONLY"
    try:
        with engine.connect() as db, db.begin():
            db.exec_driver_sql(begin)
            yield db, name
    except sa.exc.DatabaseError as error:
        refused = StoreUnavailable.of(error, place) if isinstance(place, Path) else location(place).unusable(error)
        raise refused from error
    finally:
        engine.dispose()


def _lines(db: sa.Connection) -> Iterator[str]:
    for table in TABLES:
        query = sa.select(table).order_by(*table.primary_key.columns)
        if table is META:
            query = query.where(META.c.key.not_in(OWN_SETTINGS))
        for row in db.execute(query).mappings():
            yield json.dumps({"table": table.name, "row": dict(row)}, ensure_ascii=False, allow_nan=False)


def verify(backup: Backup) -> None:
    """Restore it into a fresh database, read that back, and compare. Raises `BadBackup`."""
    with tempfile.TemporaryDirectory(prefix="quire-verify-") as folder:
        restore(backup, Path(folder) / "state.db")
        again = take(Path(folder) / "state.db", backup.version)
    _compare(backup.lines, again.lines)


def _compare(wanted: Sequence[str], found: Sequence[str]) -> None:
    if list(wanted) != list(found):
        odd = next(
            (one or other for one, other in zip(wanted, found, strict=False) if one != other), "one row too few"
        )
        raise BadBackup(f"what was restored is not what was kept, from here on: {odd[:200]}", "report this")


# ── the file ──────────────────────────────────────────────────────────────────────────────────────────────


def write(backup: Backup, path: Path) -> int:
    """Write the file as a whole or not at all, mode 0600; its size in bytes. Raises `FileExistsError`,
    `OSError`."""
    head = {
        "quireBackup": FORMAT,
        "schema": SCHEMA_VERSION,
        "version": backup.version,
        "takenAt": backup.taken_at,
        "store": backup.store,
        "rows": len(backup.lines),
    }
    text = "".join(f"{line}\n" for line in (json.dumps(head), *backup.lines)).encode()
    text += json.dumps({"sha256": hashlib.sha256(text).hexdigest()}).encode() + b"\n"
    making = path.with_name(f".{path.name}.{os.getpid()}")
    descriptor = os.open(making, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with open(descriptor, "wb") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.link(making, path)  # which, unlike a rename, takes no other file's place
    finally:
        making.unlink()
    sync_folder(path.absolute().parent)
    return len(text)


def read(path: Path) -> Backup:
    """The content of a file. What is none is known by its first line, and no more of it is read than that says.
    Raises `BadBackup`, `OSError`."""
    with path.open("rb") as file:
        first = file.readline(MAX_HEAD)
        about = _head(first)
        if about is None:
            raise BadBackup(f"{path} is no backup of a store", "platform backup FILE writes one")
        lines = list(itertools.islice(iter(lambda: file.readline(MAX_LINE), b""), about["rows"] + 1))
        rest = file.read(1)
    try:
        seal = json.loads(lines.pop())["sha256"]
    except (IndexError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise BadBackup(f"{path} is no whole backup of a store", "take another: it was cut off") from error
    now = hashlib.sha256(first + b"".join(lines)).hexdigest()
    if rest or len(lines) != about["rows"] or seal != now:
        raise BadBackup(f"{path} was changed since it was written", "take another")
    if (about["quireBackup"], about["schema"]) != (FORMAT, SCHEMA_VERSION):
        raise BadBackup(
            f"{path} is of quire {about['version']} (schema {about['schema']}, this version has {SCHEMA_VERSION})",
            "restore it with the version that wrote it; this one brings the store up to date then",
        )
    try:
        text = tuple(line.decode().removesuffix("\n") for line in lines)
    except UnicodeDecodeError as error:
        raise BadBackup(f"{path} is no backup of a store: {error}", "platform backup FILE writes one") from error
    return Backup(about["version"], about["takenAt"], about["store"], text)


def _head(line: bytes) -> dict[str, Any] | None:
    """What the first line of a backup says; None of any other line."""
    try:
        about = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(about, dict):
        return None
    said = all(type(about.get(name)) is kind for name, kind in HEAD.items())
    return about if said and 0 <= about["rows"] <= MAX_ROWS else None


# ── and back ──────────────────────────────────────────────────────────────────────────────────────────────


def restore(backup: Backup, place: Path | sa.URL, lease: Leading | None = None, *, replace: bool = False) -> None:
    """Have the store at `place` hold what the backup does and nothing else, or leave it as it is.

    Raises `NotEmpty` where there are objects or replicas, unless they are to be replaced."""
    with closing(Database(place, lease=lease)) as database, database.transaction() as db:
        if not replace:
            _refuse_to_overwrite(db, str(database))
        for table in reversed(TABLES):
            kept = table.c.key.in_(OWN_SETTINGS) if table is META else None
            db.execute(sa.delete(table) if kept is None else sa.delete(table).where(~kept))
        tables = {table.name: table for table in TABLES}
        rows: dict[str, list[dict[str, Any]]] = {}
        for line in backup.lines:
            name, row = _row(line)
            if name not in tables:
                raise BadBackup(
                    f"the backup has a table {name}, which this version has not", "use a newer version"
                )
            if row.keys() != set(tables[name].columns.keys()):
                raise BadBackup(f"the backup has another table {name} than this version", "take another")
            rows.setdefault(name, []).append(row)
        for name, of in rows.items():
            for chunk in _chunks(of):
                db.execute(sa.insert(tables[name]), chunk)
        if db.dialect.name == "postgresql":  # the next event's number follows the last one's
            last = sa.select(sa.func.coalesce(sa.func.max(EVENTS.c.id), 0) + 1).scalar_subquery()
            sequence = sa.func.pg_get_serial_sequence(EVENTS.name, "id")
            db.execute(sa.select(sa.func.setval(sequence, last, False)))
        _compare(backup.lines, tuple(_lines(db)))


def _row(line: str) -> tuple[str, dict[str, Any]]:
    """The table and the row of a line."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        found = None
    match found:
        case {"table": str(name), "row": dict(row)}:
            return name, row
    raise BadBackup(f"the backup has a line that is no row: {line[:200]}", "take another")


def _refuse_to_overwrite(db: sa.Connection, name: str) -> None:
    counts = {
        table.name: db.scalar(sa.select(sa.func.count()).select_from(table)) for table in (OBJECTS, REPLICAS)
    }
    if any(counts.values()):
        said = ", ".join(f"{what}: {number}" for what, number in counts.items())
        raise NotEmpty(
            f"{name} is not empty ({said}), and nothing was restored",
            "with --replace they are put aside into a backup of their own first",
        )


def _chunks(rows: Sequence[dict[str, Any]]) -> Iterator[Sequence[dict[str, Any]]]:
    for start in range(0, len(rows), CHUNK):
        yield rows[start : start + CHUNK]
