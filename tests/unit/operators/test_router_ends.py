"""Each end of a router or of one of its workers is told of once, whoever looks and however often."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from quire_operators.fleet.local import Ended, Life, Observation
from quire_operators.gateway import KEY
from quire_operators.router_ends import LOOP_SECONDS, MANY, RouterEnds
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
    never = wire.WorkerEnd(2, 1, None, "it cannot be started: no memory", 1, 0.2)
    RouterEnds(store, KEY, store.clock).look_at_workers(status(8, killed, never))
    text = "worker 1 of the router ended: it cannot be started: no memory; restart 1 follows in 0.2 s"
    assert (text, 1) in said(store)


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


class Routers:
    """What is seen of a router that ends now and then, at seconds of a clock."""

    def __init__(self, folder: Path) -> None:
        self.now = 0.0
        self.store = Store(folder / "s.db")
        self.ends = RouterEnds(self.store, KEY, lambda: self.now)
        killed = Ended(None, 9, asked=False, pause=1.0)
        self.seen = Observation(folder, "router", 1, "n", {}, Life.LIVE, 0.0, starts=1, running=True, ended=killed)
        self.ends.look(replace(self.seen, ended=None), None)

    def end(self, at: float, times: int = 1) -> None:
        self.now = at
        self.seen = replace(self.seen, starts=self.seen.starts + times)
        self.ends.look(self.seen, None)

    def told(self) -> list[str]:
        return [event.message for event in self.store.events(KEY) if event.reason == "RouterEnded"]


@pytest.mark.parametrize(("apart", "loop"), [(5.0, True), (28.0, True), (31.0, False)])
def test_three_ends_within_a_minute_are_a_loop_until_a_minute_is_quiet(
    apart: float, loop: bool, tmp_path: Path
) -> None:
    routers = Routers(tmp_path)
    for number in range(6):
        routers.end(number * apart)
        assert bool(routers.ends.loop_left()) is (loop and number >= 2)
        routers.now += apart - 0.01  # just before the next one
        assert bool(routers.ends.loop_left()) is (loop and number >= 2)
    routers.now = 5 * apart + LOOP_SECONDS
    assert routers.ends.loop_left() == 0


def test_ends_that_nobody_saw_are_told_of_and_no_loop(tmp_path: Path) -> None:
    routers = Routers(tmp_path)
    routers.end(3 * 86_400.0, times=3)
    assert routers.ends.loop_left() == 0
    assert ["3 times" in each for each in routers.told()] == [True]


def test_an_end_that_was_asked_for_is_none_to_tell_of(tmp_path: Path) -> None:
    routers = Routers(tmp_path)
    routers.ends.look(replace(routers.seen, stopping=True, running=False, ended=Ended(0, None, asked=True)), None)
    assert routers.told() == []
