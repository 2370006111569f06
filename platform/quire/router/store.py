"""What the router keeps by itself: one SQLite file, and who writes to it.

The file is the router's own; the control plane has another, and neither needs the other's. It is opened when it is
first needed, and again after that failed, so that a disk which is full or read-only stops nothing but the
endpoints that keep something. All of it is done on one thread, in whole transactions: the event loop never waits
for the disk, and a transaction that has returned survives a power cut.

Each kind of thing that is kept has a module of its own with its tables (`files`, `batches`, `responses`, `usage`),
made of `METADATA`; an entry of `UPGRADES` brings a file of an earlier version up to date. Bytes that are large lie
beside the database as files: `Incoming` makes one that is there whole, and on the disk, or not at all.

Times are unix seconds of a clock that nobody can set (`quire_operators.clock`); its base is kept in the file.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import logging
import os
import secrets
import shutil
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final, TypeVar

import sqlalchemy as sa
from sqlalchemy.dialects.sqlite import insert

from quire.errors import StorageFull, StorageUnavailable
from quire_operators.clock import SteadyClock, boot_id, new_base
from quire_operators.paths import sync_folder
from quire_operators.sqlite import File, StoreError, StoreUnavailable

log = logging.getLogger("quire.router")

T = TypeVar("T")

SCHEMA_VERSION: Final = 3


def _add_owners(db: sa.Connection) -> None:
    """What was kept before there were tenants is nobody's, as is what is kept where there are none."""
    there = sa.inspect(db).get_table_names()
    for table, columns in (
        ("files", ("owner",)),
        ("batches", ("owner", "owner_key")),
        ("responses", ("owner", "owner_key")),
    ):
        for column in columns if table in there else ():
            db.exec_driver_sql(f"ALTER TABLE {table} ADD COLUMN {column} TEXT NOT NULL DEFAULT ''")


def _count_hours(db: sa.Connection) -> None:
    """The ledger had a row for each day, and knew no money."""
    if "usage" in sa.inspect(db).get_table_names():
        db.exec_driver_sql("ALTER TABLE usage RENAME COLUMN day TO at")
        db.exec_driver_sql("ALTER TABLE usage ADD COLUMN cost INTEGER NOT NULL DEFAULT 0")


UPGRADES: Final[Mapping[int, Callable[[sa.Connection], None]]] = {1: _add_owners, 2: _count_hours}
"""By version, what makes the next one of it. A file may lack tables that came without a new version."""
RESERVE_BYTES: Final = 64 * 1024 * 1024
"""Of the file system, which what is kept here leaves to others, the control plane among them."""
METADATA: Final = sa.MetaData()
META: Final = sa.Table(
    "meta", METADATA, sa.Column("key", sa.Text, primary_key=True), sa.Column("value", sa.Text, nullable=False)
)
_NO_ROOM: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Store:
    """One router's store in `folder`, which is made when something is first kept."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.clock: Callable[[], float] = time.time
        """Unix seconds; those of the steady clock once the file is open."""
        self._path = folder / "router.db"
        self._opened: tuple[File, sa.Engine] | None = None
        self._complaint = ""
        self._has_room = True
        self._stamp = 0
        """Milliseconds, of the newest id."""
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="store")
        self.before_close: list[Callable[[], Awaitable[None]]] = []
        """Each writes what its owner still has to write."""

    def new_id(self, prefix: str) -> str:
        """An id that nothing else has. Those of one prefix are in the order of their age."""
        self._stamp = max(int(self.clock() * 1000), self._stamp + 1)  # several are made in a millisecond
        return f"{prefix}{self._stamp:012x}{secrets.token_hex(10)}"

    async def run(self, work: Callable[[sa.Connection], T]) -> T:
        """What `work` gives, in one transaction on the store's thread; what it raises rolls all of it back.

        Raises `StorageUnavailable` and `StorageFull`: nothing was written.
        """
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._run, work)

    def check_room(self) -> None:
        """Raises `StorageFull` when what is added would be taken from the disk's reserve. It costs a system call:
        whoever is about to keep something asks before the work, and what ends or deletes something need not.
        """
        try:
            check_reserve(self.folder if self.folder.is_dir() else self.folder.parent)
        except OSError as error:
            if self._has_room:
                log.error("nothing more can be kept: %s", error)
            self._has_room = False
            raise refusal(error) from error
        self._has_room = True

    async def close(self) -> None:
        """Write no more. What was begun is ended before."""
        for last in self.before_close:
            await last()
        await asyncio.to_thread(self._thread.shutdown)
        if self._opened is not None:
            self._opened[1].dispose()

    def _run(self, work: Callable[[sa.Connection], T]) -> T:
        try:
            file, engine = self._opened = self._opened or self._open()
            file.check_in_place()
            with engine.begin() as db:
                done = work(db)
        except sa.exc.DBAPIError as error:
            raise self._refusal(StoreUnavailable.of(error, self._path)) from error
        except (StoreError, OSError) as error:
            raise self._refusal(error) from error
        self._complaint = ""
        return done

    def _refusal(self, error: StoreError | OSError) -> StorageUnavailable:
        """The error for clients; the log has the details, once for each cause."""
        if str(error) != self._complaint:
            self._complaint = str(error)
            log.error("nothing can be kept: %s", error)
        return refusal(error)

    def _open(self) -> tuple[File, sa.Engine]:
        make(self.folder)
        file = File(self._path)
        engine = file.engine()
        try:
            with engine.begin() as db:
                self._upgrade(db)
                METADATA.create_all(db)
                self.clock = self._steady_clock(db)
        except BaseException:
            engine.dispose()
            raise
        return file, engine

    def _upgrade(self, db: sa.Connection) -> None:
        META.create(db, checkfirst=True)
        found = int(_setting(db, "schemaVersion") or SCHEMA_VERSION)
        if found > SCHEMA_VERSION:
            raise StoreError(
                f"{self._path} was written by another version (schema {found}, this one has {SCHEMA_VERSION})",
                "use the version that wrote it, or move the file away",
            )
        for version in range(found, SCHEMA_VERSION):
            UPGRADES[version](db)
        _keep_setting(db, "schemaVersion", str(SCHEMA_VERSION))

    @staticmethod
    def _steady_clock(db: sa.Connection) -> SteadyClock:
        """The clock of this boot, or a new one that nothing on record is ahead of."""
        kept = json.loads(_setting(db, "clock") or "{}")
        if kept.get("boot") != boot_id():
            past = [
                column
                for table in METADATA.sorted_tables
                for column in table.c
                if column.name.endswith("_at") and column.name != "expires_at"
            ]
            newest = [db.scalar(sa.select(sa.func.max(column))) or 0 for column in past]
            kept = {"boot": boot_id(), "base": new_base(float(max(newest, default=0)))}
            _keep_setting(db, "clock", json.dumps(kept))
        return SteadyClock(kept["base"])


def make(folder: Path) -> None:
    """Have a folder that nobody else can open, and that outlives a power cut. Raises `OSError`."""
    if not folder.is_dir():
        folder.mkdir(mode=0o700, exist_ok=True)
        sync_folder(folder.parent)


def check_reserve(folder: Path, more: int = 0) -> None:
    """Raise `OSError` when the disk of `folder` would have less than its reserve with so many bytes more."""
    if shutil.disk_usage(folder).free < RESERVE_BYTES + more:
        raise OSError(errno.ENOSPC, "the reserve of the disk is reached", str(folder))


def refusal(error: StoreError | OSError) -> StorageUnavailable:
    """What the disk or the database says, for clients."""
    full = error.full if isinstance(error, StoreUnavailable) else getattr(error, "errno", None) in _NO_ROOM
    if full:
        return StorageFull("There is no room on the server's disk to keep anything more.")
    return StorageUnavailable("The server's store cannot be used now; its log says why.", retry_after=5.0)


def _setting(db: sa.Connection, key: str) -> str | None:
    value = db.scalar(sa.select(META.c.value).where(META.c.key == key))
    return None if value is None else str(value)


def _keep_setting(db: sa.Connection, key: str, value: str) -> None:
    statement = insert(META).values(key=key, value=value)
    db.execute(statement.on_conflict_do_update(index_elements=["key"], set_={"value": value}))


class Incoming:
    """A file that is being written under another name. Its methods block, and raise `StorageUnavailable`."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._part = path.with_name(f"{path.name}.part")
        self.size = 0
        with _refused():
            make(path.parent.parent)
            make(path.parent)
            flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
            self._file = os.fdopen(os.open(self._part, flags, 0o600), "wb")

    def write(self, content: bytes) -> None:
        """Add to it. Raises `StorageFull` when the disk would have no more than its reserve left."""
        with _refused():
            check_reserve(self._path.parent, len(content))
            self._file.write(content)
            self.size += len(content)

    def keep(self) -> None:
        """Have it there, under its name, whatever happens from now on."""
        with _refused():
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            self._part.rename(self._path)
            sync_folder(self._path.parent)

    def discard(self) -> None:
        """Remove what was written; nothing, where it is kept."""
        with contextlib.suppress(OSError):
            self._file.close()
        with contextlib.suppress(OSError):
            self._part.unlink()


@contextlib.contextmanager
def _refused() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        log.error("a file cannot be kept: %s", error)
        raise refusal(error) from error


__all__ = ["METADATA", "Incoming", "Store", "make", "refusal"]
