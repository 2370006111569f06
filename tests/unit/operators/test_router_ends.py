"""Each end of a router or of one of its workers is told of once, whoever looks and however often."""

from __future__ import annotations

from pathlib import Path

from quire_operators.gateway import KEY
from quire_operators.router_ends import MANY, RouterEnds
from quire_operators.store import Store
from quire_schemas import wire


def said(store: Store) -> list[tuple[str, int]]:
    return [(event.message, event.count) for event in store.events(KEY) if event.reason == "WorkerEnded"]


def status(pid: int, *ends: wire.WorkerEnd) -> wire.RouterStatus:
    return wire.RouterStatus(1, pid, "http://x", [], worker_ends=ends)


def test_ends_of_workers_are_told_once_and_those_of_another_head_anew(tmp_path: Path) -> None:
    store = Store(tmp_path / "s.db")
    killed = wire.WorkerEnd(1, 2, -9, "", 1, 0.2)
    left = wire.WorkerEnd(2, 1, 1, "it stood still", 4, 1.6)
    RouterEnds(store, KEY, store.clock).look_at_workers(status(7, killed))
    for _ in range(2):
        RouterEnds(store, KEY, store.clock).look_at_workers(status(7, killed, left))
    first = ("worker 2 of the router ended: killed by SIGKILL; restart 1 follows in 0.2 s", 1)
    second = (
        "worker 1 of the router ended: ended with exit status 1, as it stood still; restart 4 follows in 1.6 s",
        1,
    )
    assert said(store) == [first, second]
    RouterEnds(store, KEY, store.clock).look_at_workers(status(8, killed))
    assert said(store) == [second, (first[0], 2)]


def test_of_very_many_restarts_there_is_one_event_that_is_counted(tmp_path: Path) -> None:
    store = Store(tmp_path / "s.db")
    ends = [wire.WorkerEnd(n, 1, -6, "", n, 30.0) for n in range(1, MANY + 6)]
    RouterEnds(store, KEY, store.clock).look_at_workers(status(7, *ends))
    assert len(said(store)) == MANY + 1
    assert max(said(store), key=lambda each: each[1]) == (
        "worker 1 of the router ended: killed by SIGABRT; it is started again, for the 11th time or more, "
        "after the longest pause",
        5,
    )
