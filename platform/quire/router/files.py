"""Files that clients upload and batches leave: a row in the store each, and their bytes beside it.

The row is what counts. Bytes come first and are removed last, so a crash leaves at most bytes without a row, which
`sweep` finds. Files that something still needs (`holds`) are neither deleted nor expired.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Final

import sqlalchemy as sa

from quire.errors import Conflict, NotFound
from quire.router.store import METADATA, Incoming, Store, refusal

FILES: Final = sa.Table(
    "files",
    METADATA,
    sa.Column("id", sa.Text, primary_key=True),
    sa.Column("purpose", sa.Text, nullable=False),
    sa.Column("filename", sa.Text, nullable=False),
    sa.Column("bytes", sa.Integer, nullable=False),
    sa.Column("created_at", sa.Integer, nullable=False),
    sa.Column("expires_at", sa.Integer),
    sa.Column("owner", sa.Text, nullable=False, server_default=""),
)
PREFIX: Final = "file-"
ORPHAN_SECONDS: Final = 3 * 3600.0
"""Bytes without a row are removed after so long: they may be of an upload that still runs."""


@dataclass(frozen=True, slots=True)
class StoredFile:
    """One file's row. Times are unix seconds."""

    id: str
    purpose: str
    filename: str
    bytes: int
    created_at: int
    expires_at: int | None
    owner: str
    """The tenant who may see it; "" is everybody, where there are no tenants."""


COLUMNS: Final = [FILES.c[field.name] for field in fields(StoredFile)]


class Files:
    """The files of one store."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.folder = store.folder / "files"
        self.holds: list[Callable[[sa.Connection, str], str | None]] = []
        """Each says who needs a file of that id, if somebody does."""

    def path(self, file_id: str) -> Path:
        """Where the bytes of a file that has a row are."""
        return self.folder / file_id

    def begin(self) -> tuple[str, Incoming]:
        """The id of a new file, and where its bytes go. Blocks. Raises `StorageUnavailable`."""
        file_id = self.store.new_id(PREFIX)
        return file_id, Incoming(self.path(file_id))

    @contextlib.asynccontextmanager
    async def incoming(self) -> AsyncIterator[tuple[str, Incoming]]:
        """The same for a while, after which nothing is left of what is not kept."""
        file_id, file = await asyncio.to_thread(self.begin)
        try:
            yield file_id, file
        finally:
            await asyncio.shield(asyncio.to_thread(file.discard))  # also where the router ends meanwhile

    async def add(
        self, file_id: str, purpose: str, filename: str, size: int, expires_after: int | None, owner: str
    ) -> StoredFile:
        """Give a file, whose bytes are kept, its row."""

        def write(db: sa.Connection) -> StoredFile:
            return self.insert(db, file_id, purpose, filename, size, expires_after, owner)

        return await self.store.run(write)

    def insert(
        self,
        db: sa.Connection,
        file_id: str,
        purpose: str,
        filename: str,
        size: int,
        expires_after: int | None,
        owner: str,
    ) -> StoredFile:
        """The same in a transaction of somebody else's."""
        now = int(self.store.clock())
        expires_at = None if expires_after is None else now + expires_after
        made = StoredFile(file_id, purpose, filename, size, now, expires_at, owner)
        db.execute(sa.insert(FILES).values({column.name: getattr(made, column.name) for column in COLUMNS}))
        return made

    async def get(self, file_id: str, owner: str) -> StoredFile:
        """Raises `NotFound`, also when its time is over, or it is somebody else's."""
        return await self.store.run(lambda db: self.find(db, file_id, owner))

    def find(self, db: sa.Connection, file_id: str, owner: str) -> StoredFile:
        """The same in a transaction of somebody else's."""
        mine = (FILES.c.id == file_id, FILES.c.owner == owner, self._lives())
        found = db.execute(sa.select(*COLUMNS).where(*mine)).one_or_none()
        if found is None:
            raise NotFound("There is no such file.", param="file_id")
        return _stored(found)

    def _lives(self) -> sa.ColumnElement[bool]:
        return sa.or_(FILES.c.expires_at.is_(None), FILES.c.expires_at > self.store.clock())

    async def page(
        self, owner: str, limit: int, after: str | None, *, newest_first: bool, purpose: str | None
    ) -> tuple[list[StoredFile], bool]:
        """Up to `limit` files of the owner's behind the one with the id `after`, and whether more follow."""

        def read(db: sa.Connection) -> tuple[list[StoredFile], bool]:
            query = sa.select(*COLUMNS).where(FILES.c.owner == owner, self._lives())
            if purpose is not None:
                query = query.where(FILES.c.purpose == purpose)
            rows = page_of(db, query, FILES, limit, after, newest_first=newest_first)
            return [_stored(row) for row in rows[:limit]], len(rows) > limit

        return await self.store.run(read)

    async def delete(self, file_id: str, owner: str) -> None:
        """Remove a file. Raises `NotFound`, and `Conflict` when something needs it."""

        def write(db: sa.Connection) -> None:
            self.find(db, file_id, owner)
            for hold in self.holds:
                if (holder := hold(db, file_id)) is not None:
                    raise Conflict(f"The file is needed by {holder}.", param="file_id")
            db.execute(sa.delete(FILES).where(FILES.c.id == file_id))

        await self.store.run(write)
        await asyncio.to_thread(self._remove, [file_id])

    async def sweep(self) -> int:
        """Remove what has expired, and bytes that have no row; how many files expired."""

        def write(db: sa.Connection) -> tuple[list[str], set[str]]:
            found = db.scalars(sa.select(FILES.c.id).where(FILES.c.expires_at <= self.store.clock())).all()
            over = [each for each in found if all(hold(db, each) is None for hold in self.holds)]
            for each in over:
                db.execute(sa.delete(FILES).where(FILES.c.id == each))
            return over, set(db.scalars(sa.select(FILES.c.id)))

        over, known = await self.store.run(write)
        await asyncio.to_thread(self._remove, over)
        await asyncio.to_thread(self._remove_orphans, known)
        return len(over)

    def _remove(self, file_ids: list[str]) -> None:
        for each in file_ids:
            with contextlib.suppress(OSError):  # the next sweep finds it
                self.path(each).unlink(missing_ok=True)

    def _remove_orphans(self, known: set[str]) -> None:
        with contextlib.suppress(OSError):
            for path in self.folder.iterdir():
                if path.name not in known and time.time() - path.stat().st_mtime > ORPHAN_SECONDS:
                    path.unlink(missing_ok=True)


def _stored(row: sa.Row[Any]) -> StoredFile:
    return StoredFile(row.id, row.purpose, row.filename, row.bytes, row.created_at, row.expires_at, row.owner)


def page_of(
    db: sa.Connection,
    query: sa.Select[Any],
    table: sa.Table,
    limit: int,
    after: str | None,
    *,
    newest_first: bool,
) -> list[sa.Row[Any]]:
    """Rows of `query` behind the id `after`, by their age; one more than `limit` if there are more.

    What had that id may be gone: whoever deletes what a page lists still gets the next one.
    """
    if after is not None:
        query = query.where(table.c.id < after if newest_first else table.c.id > after)
    ordered = query.order_by(table.c.id.desc() if newest_first else table.c.id).limit(limit + 1)
    return list(db.execute(ordered).all())


def read_bytes(path: Path, offset: int, length: int) -> bytes:
    """A part of a file's bytes. Blocks. Raises `StorageUnavailable`."""
    try:
        with path.open("rb") as file:
            file.seek(offset)
            return file.read(length)
    except OSError as error:
        raise refusal(error) from error
