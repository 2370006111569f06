"""The ledger on a real disk: added up, written in one go, kept when the disk refuses."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import AsyncIterator
from contextlib import closing
from pathlib import Path

import pytest
import sqlalchemy as sa

from quire.errors import StorageUnavailable
from quire.router import store as kept
from quire.router import usage as ledger
from quire.router.budgets import Amount, Budgets
from quire.router.store import Store
from quire.router.usage import Usage, Who
from quire_schemas import wire
from quire_schemas.wire import UsageRow

DAY = 86400.0
ANN, BOB = Who("team", "ann", "m"), Who("team", "bob", "m")


class Wall:
    now = 1_800_000_000.0  # 2027-01-15, at eight

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def wall() -> Wall:
    return Wall()


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[Store]:
    store = Store(tmp_path / "router")
    yield store
    await store.close()


async def rows(usage: Usage, *by: wire.UsageColumn, since: str = "2000-01-01") -> list[UsageRow]:
    report = await usage.report(wire.GetUsage(since, by))
    assert report.problem == ""
    return report.rows


async def test_it_is_added_up_by_what_is_asked_for(store: Store, wall: Wall) -> None:
    usage = Usage(store, wall)
    assert await rows(usage) == []
    usage.add(ANN, Amount(1, 10, 5, 3))
    usage.add(ANN, Amount(1, 10, 10, 4))
    usage.add(BOB, Amount(1, 1, 0, 1))
    wall.now += DAY
    usage.add(ANN, Amount(1, 100, 0, 0))
    usage.add(Who("", "", "other"), Amount(1, 7, 0, 7))
    assert await rows(usage, "policy", "key", "model") == [
        UsageRow(1, 7, 0, 7, model="other"),
        UsageRow(3, 120, 15, 7, policy="team", key="ann", model="m"),
        UsageRow(1, 1, 0, 1, policy="team", key="bob", model="m"),
    ]
    assert await rows(usage, "day", since="2027-01-16") == [UsageRow(2, 107, 0, 7, day="2027-01-16")]
    assert await rows(usage) == [UsageRow(5, 128, 15, 15)]
    usage.add(BOB, Amount(1, 1, 0, 1))
    assert (await rows(usage, "key"))[-1] == UsageRow(2, 2, 0, 2, key="bob"), "asked again, nothing counts twice"


async def test_what_was_noted_is_there_after_an_end_in_order(tmp_path: Path, wall: Wall) -> None:
    first = Store(tmp_path / "router")
    Usage(first, wall).add(ANN, Amount(1, 10, 5, 3))
    await first.close()
    second = Store(tmp_path / "router")
    assert await rows(Usage(second, wall), "key") == [UsageRow(1, 10, 5, 3, key="ann")]
    await second.close()


async def test_it_is_written_by_itself_within_seconds(
    tmp_path: Path, wall: Wall, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledger, "WRITE_SECONDS", 0.01)
    first, second = Store(tmp_path / "router"), Store(tmp_path / "router")
    usage, other = Usage(first, wall), Usage(second, wall)
    usage.add(ANN, Amount(1, 10, 5, 3))
    async with asyncio.timeout(10):
        while await rows(other) != [UsageRow(1, 10, 5, 3)]:
            await asyncio.sleep(0.01)
    for store in (first, second):
        await store.close()


async def test_what_the_disk_refuses_is_written_later_and_once(
    store: Store, wall: Wall, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = Usage(store, wall)
    reserve = kept.RESERVE_BYTES
    usage.add(ANN, Amount(1, 10, 5, 3))
    monkeypatch.setattr(kept, "RESERVE_BYTES", 1 << 60)
    with pytest.raises(StorageUnavailable):
        await usage.write()
    assert (await usage.report(wire.GetUsage("2000-01-01"))).problem.startswith("There is no room")
    usage.add(ANN, Amount(1, 10, 5, 3))
    monkeypatch.setattr(kept, "RESERVE_BYTES", reserve)
    assert await rows(usage) == [UsageRow(2, 20, 10, 6)]


async def test_who_stops_waiting_has_nothing_written_twice(store: Store, wall: Wall) -> None:
    usage = Usage(store, wall)
    for _ in range(20):
        usage.add(ANN, Amount(1, 1, 0, 1))
        left = asyncio.create_task(usage.write())
        await asyncio.sleep(0)
        left.cancel()
        await asyncio.wait([left])
    assert await rows(usage) == [UsageRow(20, 20, 0, 20)]


async def test_what_is_older_than_a_year_and_a_month_is_forgotten(store: Store, wall: Wall) -> None:
    usage = Usage(store, wall)
    usage.add(ANN, Amount(1, 1, 0, 1))
    await usage.write()
    wall.now += ledger.KEPT_DAYS * DAY
    usage.add(BOB, Amount(1, 1, 0, 1))
    assert len(await rows(usage, "day")) == 2
    wall.now += DAY
    usage.add(BOB, Amount(1, 1, 0, 1))
    assert [row.day for row in await rows(usage, "day")] == ["2028-02-19", "2028-02-20"]


# ── for budgets ───────────────────────────────────────────────────────────────────────────────────────────

TEAM = wire.Tenant("team", (wire.AccessKey("ann", "1"), wire.AccessKey("bob", "2")))


def following(*policies: str, per: wire.BudgetTime = "month") -> Budgets:
    budgets = Budgets()
    made = [wire.AccessBudget(policy, "b", "policy", per, tokens=1000) for policy in policies]
    budgets.act_by(made, [TEAM])
    return budgets


def spent(budgets: Budgets, wall: Wall) -> list[int]:
    return [each.spent for each in budgets.standing(wall())]


async def test_a_router_that_starts_knows_what_was_spent(tmp_path: Path, wall: Wall) -> None:
    first = Store(tmp_path / "router")
    usage = Usage(first, wall)
    usage.add(ANN, Amount(1, 10, 5, 3))
    wall.now += 2 * 3600
    usage.add(BOB, Amount(1, 1, 0, 1))
    usage.add(Who("other", "x", "m"), Amount(1, 500, 0, 0))
    await first.close()
    second = Store(tmp_path / "router")
    for per, there in (("month", 15), (24, 15), (1, 2)):
        budgets = following("team", per=per)  # type: ignore[arg-type]
        usage = Usage(second, wall, budgets)
        assert budgets.unread == {"team"}
        await usage.read_for_budgets()
        assert (spent(budgets, wall), budgets.unread) == ([there], frozenset())
    usage.add(ANN, Amount(1, 7, 0, 0))
    assert spent(budgets, wall) == [9], "and is told of what comes"
    await usage.write()
    await usage.read_for_budgets()
    assert spent(budgets, wall) == [9]
    await second.close()


async def test_what_a_router_before_wrote_last_is_known_once_it_is_gone(tmp_path: Path, wall: Wall) -> None:
    old = Store(tmp_path / "router")
    before = Usage(old, wall)
    before.add(ANN, Amount(1, 10, 5, 3))
    await before.write()
    new, budgets = Store(tmp_path / "router"), following("team")
    usage = Usage(new, wall, budgets)
    await usage.read_for_budgets()
    before.add(ANN, Amount(1, 7, 0, 0))  # it finishes beside the new one
    usage.add(ANN, Amount(1, 2, 0, 0))
    await old.close()
    assert spent(budgets, wall) == [15]
    await usage.resume()
    assert spent(budgets, wall) == [22]
    await new.close()


async def test_what_waits_to_be_written_counts_once(
    store: Store, wall: Wall, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Requests end while it is read what was spent, on a disk that takes nothing and on one that does."""
    budgets = Budgets()
    usage, total = Usage(store, wall, budgets), 0
    reserve = kept.RESERVE_BYTES
    for step in range(24):
        monkeypatch.setattr(kept, "RESERVE_BYTES", 1 << 60 if step % 3 == 0 else reserve)
        budgets.act_by([], [TEAM])
        budgets.act_by([wire.AccessBudget("team", "b", "policy", "month", tokens=1000)], [TEAM])
        reading = asyncio.create_task(usage.read_for_budgets())
        writing = set[asyncio.Task[None]]()
        while not reading.done():
            usage.add(ANN, Amount(1, 1, 0, 0))
            total += 1
            if total % 3 == 0:
                writing.add(asyncio.create_task(usage.write()))
            await asyncio.sleep(0.0005)
        await reading
        assert spent(budgets, wall) == [total]
        await asyncio.gather(*writing, return_exceptions=True)


async def test_what_cannot_be_read_is_asked_for_again(
    store: Store, wall: Wall, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledger, "WRITE_SECONDS", 0.01)
    Usage(store, wall).add(ANN, Amount(1, 10, 5, 3))
    await store.close()
    again = Store(store.folder)
    path = store.folder / "router.db"
    path.rename(store.folder / "aside")
    path.mkdir()
    budgets = following("team")
    await Usage(again, wall, budgets).read_for_budgets()
    assert budgets.unread == {"team"}
    path.rmdir()
    (store.folder / "aside").rename(path)
    async with asyncio.timeout(10):
        while budgets.unread:
            await asyncio.sleep(0.01)
    assert spent(budgets, wall) == [13]
    await again.close()


async def test_hours_that_no_budget_is_for_become_days(store: Store, wall: Wall) -> None:
    usage = Usage(store, wall)
    for hours in (0, 1, 1, 24):
        wall.now += hours * 3600
        usage.add(ANN, Amount(1, 10, 5, 3, 10**10 * 2**28))
        await usage.write()
    wall.now += ledger.KEPT_HOURS * DAY
    usage.add(BOB, Amount(1, 1, 0, 1))
    before = await rows(usage, "day", "key")
    assert [(row.day, row.requests) for row in before] == [("2027-01-15", 3), ("2027-01-16", 1), ("2027-02-20", 1)]
    assert sum(row.cost for row in before) == 4 * 10**10 * 2**28, "above what SQL can add up"
    kept_at = await store.run(
        lambda db: [row.at for row in db.execute(sa.select(ledger.USAGE.c.at).order_by("at"))]
    )
    assert kept_at == ["2027-01-15", "2027-01-16T10", "2027-02-20T10"]
    wall.now += DAY
    usage.add(BOB, Amount(1, 1, 0, 1))
    assert (await rows(usage, "day", "key"))[:3] == before


async def test_a_ledger_of_days_is_taken_over(tmp_path: Path, wall: Wall) -> None:
    first = Store(tmp_path / "router")
    Usage(first, wall).add(ANN, Amount(1, 10, 5, 3))
    await first.close()
    with closing(sqlite3.connect(first.folder / "router.db")) as db:  # as the version before has left it
        db.execute("ALTER TABLE usage DROP COLUMN cost")
        db.execute("ALTER TABLE usage RENAME COLUMN at TO day")
        db.execute("UPDATE usage SET day = substr(day, 1, 10)")
        db.execute("UPDATE meta SET value = '2' WHERE key = 'schemaVersion'")
        db.commit()
    second = Store(tmp_path / "router")
    budgets = following("team", per="day")
    usage = Usage(second, wall, budgets)
    await usage.read_for_budgets()
    assert spent(budgets, wall) == [13]
    usage.add(ANN, Amount(1, 1, 0, 0, 7))
    assert await rows(usage, "day", "key") == [UsageRow(2, 11, 5, 3, day="2027-01-15", key="ann", cost=7)]
    await second.close()
