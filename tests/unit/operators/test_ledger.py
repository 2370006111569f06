"""Who may have the room of a machine: rows that hold it, those who wait for it by priority, those who had it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.unit.operators.test_desired import PLACEMENT, spec

from quire_operators.desired import Effective, effective
from quire_operators.devices import Inventory
from quire_operators.fleet.local import LocalFleet
from quire_operators.ledger import Ledger, Waiter, beside_waiters, missing
from quire_operators.records import Revision, StoredObject
from quire_operators.rollout import Goal, Row
from quire_operators.store import Store
from quire_schemas.resource import Key

GIB = 1 << 30
MACHINE = Inventory(10 * GIB, 10 * GIB, 4)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = Store(tmp_path / "state.db")
    yield store
    store.close()


@pytest.fixture
def ledger(store: Store, tmp_path: Path) -> Ledger:
    fleet = LocalFleet((tmp_path / "r",), "id", lambda name: None, store.clock)
    return Ledger(store, fleet, lambda: MACHINE)


PLACED = replace(PLACEMENT, memory=4 * GIB)


def model(name: str, priority: int = 0, **fields: Any) -> Effective:
    """Four GiB a replica, of ten that may be used."""
    more = {
        "engine": {"memory": "100%"},
        "placement": {"priority": priority},
        "rollout": {"maxSurge": 0},
        **fields,
    }
    resolved = spec(**more)
    revision = Revision(name, 1, "t", resolved, 1, PLACED.as_dict(), "", 0.0)
    return effective(
        StoredObject(Key("model", name), name, 1, 1, {}, "", resolved, 1, 0.0, 0.0), (revision,), (), 1.0
    )


def row(name: str, index: int = 0, **fields: Any) -> Row:
    base = Row(f"{name}-r1-{index}", name, index, 1, "t", Goal.RUN, 0.0, memory=4 * GIB)
    return replace(base, **fields)


def places(ledger: Ledger, wanted: Effective, rows: int = 0) -> int:
    return len(ledger.places(wanted, PLACED, rows))


def test_room_is_kept_for_who_waits_with_a_higher_priority_as_far_as_it_could_use_it(ledger: Ledger) -> None:
    low, high = model("low", replicas=2), model("high", 1)
    assert places(ledger, low) == 2
    assert not ledger.note(high, (), waits=True)
    assert places(ledger, low) == 1
    assert places(ledger, model("peer", 1, replicas=2)) == 2
    assert places(ledger, high) == 1, "nobody stands in its own way"
    assert ledger.note(high, (row("high"),), waits=False), "others may have it now"
    assert places(ledger, low) == 2


def test_what_a_waiter_cannot_use_is_not_kept(ledger: Ledger, store: Store) -> None:
    store.create_replica(row("there", memory=7 * GIB))
    ledger.note(model("high", 1), (), waits=True)
    small = replace(PLACED, memory=GIB)
    assert len(ledger.places(model("low", replicas=3), small, 0)) == 3


def test_who_replaces_its_own_replica_keeps_its_place(ledger: Ledger, store: Store) -> None:
    low = model("low")
    other, own = store.create_replica(row("other")), store.create_replica(row("low"))
    ledger.note(low, (own,), waits=False)
    ledger.note(model("high", 1), (), waits=True)
    assert places(ledger, low, 1) == 0
    store.delete_replica(own)
    ledger.vacated(low)
    assert places(ledger, model("high", 1), 0) == 0, "also before it has looked itself"
    ledger.note(low, (), waits=False)
    assert places(ledger, low, 0) == 1, "it stopped one to start another"
    assert places(ledger, model("high", 1), 0) == 1, "what it did not take in its pass is kept no longer"
    assert places(ledger, model("new"), 0) == 0
    paused = replace(low, stored=replace(low.stored, resolved={**low.stored.resolved, "replicas": 0}))
    ledger.note(paused, (), waits=False)
    ledger.note(low, (), waits=False)
    assert places(ledger, low, 0) == 0, "what was given up is given up"
    store.delete_replica(other)
    assert places(ledger, low, 0) == 1


def test_another_priority_or_a_smaller_want_lets_others_look_again(ledger: Ledger) -> None:
    ledger.note(model("high", 5, replicas=2), (), waits=True)
    assert not ledger.note(model("high", 5, replicas=2), (), waits=True)
    assert ledger.note(model("high", 5), (), waits=True)
    assert ledger.note(model("high", -5), (), waits=True)
    assert [waiter.priority for waiter in ledger.waiters.values()] == [-5]


def test_the_highest_of_those_who_wait_is_served_first() -> None:
    waiters = [Waiter(model("b", 1), 1), Waiter(model("c", 2), 2)]
    assert beside_waiters(model("a"), waiters, MACHINE, {}) == {"cpu": 8 * GIB}
    assert beside_waiters(model("a", 1), waiters, MACHINE, {"cpu": 3 * GIB}) == {"cpu": 7 * GIB}
    assert beside_waiters(model("a", 2), waiters, MACHINE, {}) == {}


def test_what_is_missing_is_counted_by_replicas_that_are_to_run() -> None:
    assert missing(model("m", replicas=3), [row("m"), row("m", 1, goal=Goal.DRAIN)]) == 2
