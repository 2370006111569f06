"""Who has used how much: requests, tokens and money by policy, key and model, hour by hour, in the router's store.

What a request came to is added up in memory when it ends, however it ends, and written every `WRITE_SECONDS`, all
of it in one transaction; so a router that is killed loses what came within the last seconds, and no request waits
for the disk. What the disk refuses is kept and written later. Hours and days are those of UTC, by the wall clock.
Once no budget can be for them, the hours of a day become one row (`KEPT_HOURS`). Money is what it cost by the
prices that were declared when it was used.

`Budgets` has the sums of the hours that budgets are for. It is told of every request here, and reads from here
what was spent of a policy that it has come to follow (`read_for_budgets`): from then on it has what is on the disk
and what still waits to be written, each once.

What was used stays when a key or a policy goes. Where there are no policies, both are "".
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, astuple, dataclass
from datetime import UTC, datetime
from functools import lru_cache
from typing import Final, Protocol

import sqlalchemy as sa
from sqlalchemy.dialects.sqlite import insert

from quire.errors import StorageUnavailable
from quire.router.budgets import HOUR, LONGEST_HOURS, Amount, Budgets
from quire.router.store import METADATA, Store
from quire_schemas import wire

WRITE_SECONDS: Final = 2.0
KEPT_DAYS: Final = 400
KEPT_HOURS: Final = 35
"""Days whose hours have rows of their own."""
MAX_ROWS: Final = 50_000
"""Of one answer."""
USAGE: Final = sa.Table(
    "usage",
    METADATA,
    sa.Column("at", sa.Text, primary_key=True),
    sa.Column("policy", sa.Text, primary_key=True),
    sa.Column("key", sa.Text, primary_key=True),
    sa.Column("model", sa.Text, primary_key=True),
    sa.Column("requests", sa.Integer, nullable=False),
    sa.Column("prompt_tokens", sa.Integer, nullable=False),
    sa.Column("cached_tokens", sa.Integer, nullable=False),
    sa.Column("completion_tokens", sa.Integer, nullable=False),
    sa.Column("cost", sa.Integer, nullable=False, server_default="0"),
)
"""`at` is an hour, as 2027-01-31T09, or a day, as 2027-01-31."""
_AMOUNTS: Final = ("requests", "prompt_tokens", "cached_tokens", "completion_tokens", "cost")
_DAY: Final = sa.func.substr(USAGE.c.at, 1, 10)


@dataclass(frozen=True, slots=True)
class Who:
    """Whose request it was, and which model's, by the name of its manifest."""

    policy: str
    key: str
    model: str


class Ledger(Protocol):
    """Where what requests came to is noted: a `Usage`, here or at the head."""

    def add(self, who: Who, amount: Amount) -> None:
        """Note what a request that has ended came to."""


class Usage:
    """The ledger of one store, which tells `budgets` what is spent. `clock` is the wall's."""

    def __init__(
        self, store: Store, clock: Callable[[], float] = time.time, budgets: Budgets | None = None
    ) -> None:
        self._store = store
        self._budgets = budgets or Budgets()
        self._clock = clock
        self._fresh: dict[tuple[str, Who], Amount] = {}
        self._writing: asyncio.Task[None] | None = None
        self._swept = ""
        self._turn = asyncio.Lock()
        store.before_close.append(self._last)

    def add(self, who: Who, amount: Amount) -> None:
        """Note what a request that has ended came to."""
        now = self._clock()
        self._fresh.setdefault((_hour(now), who), Amount()).add(amount)
        self._budgets.add(int(now) // HOUR, who.policy, who.key, amount)
        self._begin()

    def _begin(self) -> None:
        if self._writing is None:
            self._writing = asyncio.create_task(self._write_for_ever(), name="usage")

    async def resume(self) -> None:
        """Nobody else writes any more: one that finished beside this one may have written since it was read."""
        await self._read(sorted(self._budgets.wanted))  # what fails is begun again by who asked

    async def sweep(self) -> None:
        """Hours are forgotten as others are written."""

    async def close(self) -> None:
        """Write before another one reads. What cannot be written now is tried again as the store is closed."""
        with contextlib.suppress(StorageUnavailable):
            await self.write()

    async def read_for_budgets(self) -> None:
        """Tell the budgets what was spent of those policies of which they do not know it. What cannot be read now
        is tried again."""
        try:
            await self._read(sorted(self._budgets.unread))
        except StorageUnavailable:
            self._begin()

    async def _read(self, policies: Sequence[str]) -> None:
        if not policies:
            return
        with contextlib.suppress(StorageUnavailable):  # what is not written counts all the same
            await self.write()
        since = time.strftime("%Y-%m-%d", time.gmtime(self._clock() - LONGEST_HOURS * HOUR))
        by = (USAGE.c.at, USAGE.c.policy, USAGE.c.key)
        query = sa.select(*by, *_sums()).where(USAGE.c.at >= since, USAGE.c.policy.in_(policies)).group_by(*by)
        async with self._turn:  # so that nothing goes from one place to the other meanwhile
            rows = await self._store.run(lambda db: db.execute(query).mappings().all())
            spent = [(_number(row["at"]), row["policy"], row["key"], _amount(row)) for row in rows]
            waiting = [(_number(at), who.policy, who.key, each) for (at, who), each in self._fresh.items()]
            self._budgets.begin(policies, [*spent, *(each for each in waiting if each[1] in policies)])

    async def report(self, asked: wire.GetUsage) -> wire.UsageReport:
        """What was used, up to this moment. What cannot be read is told as a problem."""
        columns = {"day": _DAY, **{name: USAGE.c[name] for name in ("policy", "key", "model")}}
        by = [column for name, column in columns.items() if name in asked.by]
        named = [column.label(name) for name, column in columns.items() if name in asked.by]
        query = (
            sa.select(*named, *_sums())
            .where(USAGE.c.at >= asked.since)
            .group_by(*by)
            .order_by(*by)
            .limit(MAX_ROWS)
        )
        if not by:
            query = query.having(sa.func.count() > 0)
        try:
            await self.write()
            rows = await self._store.run(lambda db: db.execute(query).mappings().all())
        except StorageUnavailable as error:
            return wire.UsageReport(problem=error.message)
        told = [
            wire.UsageRow(**asdict(_amount(row)), **{name: row[name] for name in columns if name in asked.by})
            for row in rows
        ]
        return wire.UsageReport(told, budgets=list(self._budgets.standing(self._clock())))

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
                db.execute(sa.delete(USAGE).where(USAGE.c.at < self._day(-KEPT_DAYS)))
                _fold(db, self._day(-KEPT_HOURS))

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
            await self.read_for_budgets()

    async def _last(self) -> None:
        if self._writing is not None:
            self._writing.cancel()
            await asyncio.wait([self._writing])
            with contextlib.suppress(StorageUnavailable):
                await self.write()

    def _day(self, shift: int = 0) -> str:
        return time.strftime("%Y-%m-%d", time.gmtime(self._clock() + shift * 86400))


def _sums() -> list[sa.Label[int]]:
    """Of each column of amounts; of money in two parts, since all of it may be above what SQL has numbers for."""
    cost = USAGE.c.cost
    return [
        *(sa.func.sum(USAGE.c[name]).label(name) for name in _AMOUNTS if name != "cost"),
        sa.func.sum(cost // wire.TICKS).label("units"),
        sa.func.sum(cost % wire.TICKS).label("ticks"),
    ]


def _amount(row: sa.RowMapping) -> Amount:
    counts = {name: row[name] for name in _AMOUNTS if name != "cost"}
    return Amount(**counts, cost=row["units"] * wire.TICKS + row["ticks"])


def _fold(db: sa.Connection, before: str) -> None:
    """Make one row of the hours of each day before this one."""
    hours = sa.and_(USAGE.c.at < before, sa.func.length(USAGE.c.at) > len(before))
    by = (_DAY, USAGE.c.policy, USAGE.c.key, USAGE.c.model)
    days = sa.select(*by, *(sa.func.sum(USAGE.c[name]) for name in _AMOUNTS)).where(hours).group_by(*by)
    row = insert(USAGE).from_select(USAGE.c.keys(), days)
    gained = {name: USAGE.c[name] + row.excluded[name] for name in _AMOUNTS}
    db.execute(row.on_conflict_do_update(index_elements=list(USAGE.primary_key.columns), set_=gained))
    db.execute(sa.delete(USAGE).where(hours))


def _hour(at: float) -> str:
    return _written(int(at // HOUR))


@lru_cache(maxsize=8)
def _written(hour: int) -> str:
    """As a row has an hour that is counted from 1970."""
    return time.strftime("%Y-%m-%dT%H", time.gmtime(hour * HOUR))


def _number(at: str) -> int:
    """The hour of a row since 1970; of a day the first."""
    read = datetime.strptime(at if "T" in at else f"{at}T00", "%Y-%m-%dT%H").replace(tzinfo=UTC)
    return int(read.timestamp()) // HOUR
