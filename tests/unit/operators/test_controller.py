"""The work queue: nothing here waits for real time."""

from __future__ import annotations

import asyncio

import pytest

from quire_operators.controller import ERROR_MAX, Controller, Schedule


def test_a_key_waits_once_at_its_earliest_time() -> None:
    queue: Schedule[str] = Schedule()
    queue.add("a", 10)
    queue.add("b", 5)
    queue.add("a", 3)
    queue.add("a", 8)
    assert queue.next_at() == 3
    assert queue.take(2) == []
    assert queue.take(5) == ["a", "b"]
    assert queue.next_at() is None


def test_a_key_that_is_worked_on_runs_once_more_for_any_number_of_hints() -> None:
    queue: Schedule[str] = Schedule(resync=30)
    queue.add("a", 0)
    queue.take(0)
    queue.add("a", 1)
    queue.add("a", 1)
    assert queue.take(1) == []
    queue.done("a", 2)
    assert queue.take(2) == ["a"]
    queue.done("a", 3)
    assert queue.next_at() == 33, "then not before the resync"
    queue.take(33)
    queue.done("a", 33, again_at=34)
    assert queue.next_at() == 34


def test_failures_back_off_by_key_and_success_forgets_them() -> None:
    queue: Schedule[str] = Schedule()
    now, delays = 0.0, []
    for _ in range(10):
        queue.add("a", now)
        queue.take(now)
        delays.append(queue.failed("a", now, 0.0))
        now += delays[-1]
    assert delays[:4] == [0.2, 0.4, 0.8, 1.6]
    assert delays[-1] == ERROR_MAX
    assert queue.failed("b", 0, 1.0) == pytest.approx(0.24)
    queue.take(now)
    queue.done("a", now)
    assert queue.failed("a", now, 0.0) == 0.2


async def test_one_worker_a_key_different_keys_together_and_errors_stop_nobody() -> None:
    running: set[str] = set()
    seen: list[str] = []
    both = asyncio.Event()
    finished = asyncio.Event()
    bad = 0

    async def reconcile(key: str) -> float | None:
        nonlocal bad
        assert key not in running
        running.add(key)
        seen.append(key)
        if key == "bad":
            running.discard(key)
            bad += 1
            raise RuntimeError("this one always fails")
        if len(running) == 2:
            both.set()
        await both.wait()
        controller.add(key)
        running.discard(key)
        if seen.count("a") > 2 and seen.count("b") > 2:
            finished.set()
        return None

    controller: Controller[str] = Controller(reconcile)
    for key in ("a", "b", "bad"):
        controller.add(key)
    work = asyncio.create_task(controller.run())
    await asyncio.wait_for(finished.wait(), 10)
    work.cancel()
    await asyncio.gather(work, return_exceptions=True)
    assert bad >= 1
