"""Who has used how much: requests and tokens by policy, key and model, day by day, in the router's store.

What a request came to is added up in memory when it ends, however it ends, and written every `WRITE_SECONDS`, all
of it in one transaction; so a router that is killed loses what came within the last seconds, and no request waits
for the disk. What the disk refuses is kept and written later. Days are those of UTC, by the wall clock.

What was used stays when a key or a policy goes. Where there are no policies, both are "".
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from dataclasses import astuple, dataclass
from typing import Final, Protocol

import sqlalchemy as sa
from sqlalchemy.dialects.sqlite import insert

from quire.errors import StorageUnavailable
from quire.router.store import METADATA, Store
from quire_schemas import wire

WRITE_SECONDS: Final = 2.0
KEPT_DAYS: Final = 400
MAX_ROWS: Final = 50_000
"""Of one answer."""
USAGE: Final = sa.Table(
    "usage",
    METADATA,
    sa.Column("day", sa.Text, primary_key=True),
    sa.Column("policy", sa.Text, primary_key=True),
    sa.Column("key", sa.Text, primary_key=True),
    sa.Column("model", sa.Text, primary_key=True),
    sa.Column("requests", sa.Integer, nullable=False),
    sa.Column("prompt_tokens", sa.Integer, nullable=False),
    sa.Column("cached_tokens", sa.Integer, nullable=False),
    sa.Column("completion_tokens", sa.Integer, nullable=False),
)
_AMOUNTS: Final = ("requests", "prompt_tokens", "cached_tokens", "completion_tokens")


@dataclass(frozen=True, slots=True)
class Who:
    """Whose request it was, and which model's, by the name of its manifest."""

    policy: str
    key: str
    model: str


@dataclass(slots=True)
class Amount:
    """What requests came to. `cached_tokens` are among those of prompts."""

    requests: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0

    def add(self, other: Amount) -> None:
        self.requests += other.requests
        self.prompt_tokens += other.prompt_tokens
        self.cached_tokens += other.cached_tokens
        self.completion_tokens += other.completion_tokens


class Ledger(Protocol):
    """Where what requests came to is noted: a `Usage`, here or at the head."""

    def add(self, who: Who, amount: Amount) -> None:
        """Note what a request that has ended came to."""


class Usage:
    """The ledger of one store. `clock` is the wall's."""

    def __init__(self, store: Store, clock: Callable[[], float] = time.time) -> None:
        self._store = store
        self._clock = clock
        self._fresh: dict[tuple[str, Who], Amount] = {}
        self._writing: asyncio.Task[None] | None = None
        self._swept = ""
        self._turn = asyncio.Lock()
        store.before_close.append(self._last)

    def add(self, who: Who, amount: Amount) -> None:
        """Note what a request that has ended came to."""
        self._fresh.setdefault((self._day(), who), Amount()).add(amount)
        if self._writing is None:
            self._writing = asyncio.create_task(self._write_for_ever(), name="usage")

    async def report(self, asked: wire.GetUsage) -> wire.UsageReport:
        """What was used, up to this moment. What cannot be read is told as a problem."""
        by = [USAGE.c[name] for name in ("day", "policy", "key", "model") if name in asked.by]
        sums = [sa.func.sum(USAGE.c[name]).label(name) for name in _AMOUNTS]
        query = sa.select(*by, *sums).where(USAGE.c.day >= asked.since).group_by(*by).order_by(*by).limit(MAX_ROWS)
        if not by:
            query = query.having(sa.func.count() > 0)
        try:
            await self.write()
            rows = await self._store.run(lambda db: db.execute(query).mappings().all())
        except StorageUnavailable as error:
            return wire.UsageReport(problem=error.message)
        return wire.UsageReport([wire.UsageRow(**dict(row)) for row in rows])

    async def write(self) -> None:
        """Have all of it on the disk. Raises `StorageUnavailable`; then it is kept for another try.

        Who stops waiting for it stops nothing: what is being written must not be written again.
        """
        writing = asyncio.create_task(self._write())
        writing.add_done_callback(lambda done: done.cancelled() or done.exception())
        await asyncio.shield(writing)

    async def _write(self) -> None:
        async with self._turn:
            await self._write_fresh()

    async def _write_fresh(self) -> None:
        fresh, self._fresh = self._fresh, {}
        day = self._day()
        if not fresh and day == self._swept:
            return

        def work(db: sa.Connection) -> None:
            self._store.check_room()
            for (at, who), amount in fresh.items():
                values = dict(zip(USAGE.c.keys(), (at, *astuple(who), *astuple(amount)), strict=True))
                row = insert(USAGE).values(values)
                gained = {name: USAGE.c[name] + row.excluded[name] for name in _AMOUNTS}
                db.execute(row.on_conflict_do_update(index_elements=list(USAGE.primary_key.columns), set_=gained))
            if day != self._swept:
                db.execute(sa.delete(USAGE).where(USAGE.c.day < self._day(-KEPT_DAYS)))

        try:
            await self._store.run(work)
        except Exception:
            for name, amount in fresh.items():
                self._fresh.setdefault(name, Amount()).add(amount)
            raise
        self._swept = day

    async def _write_for_ever(self) -> None:
        while True:
            await asyncio.sleep(WRITE_SECONDS)
            with contextlib.suppress(StorageUnavailable):  # it is in the log
                await self.write()

    async def _last(self) -> None:
        if self._writing is not None:
            self._writing.cancel()
            await asyncio.wait([self._writing])
            with contextlib.suppress(StorageUnavailable):
                await self.write()

    def _day(self, shift: int = 0) -> str:
        return time.strftime("%Y-%m-%d", time.gmtime(self._clock() + shift * 86400))
