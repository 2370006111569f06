"""A child process ends with the block it runs in, whatever it does with its pipes, whenever we are cancelled."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from pathlib import Path

import psutil
import pytest

from quire_operators import bounded, child
from quire_operators.bounded import Bounds, Exceeded, TooLong, TooMuch
from quire_operators.fleet import worker

SHELL = {"PATH": os.environ["PATH"]}
MUCH = "cat /dev/zero"
"""More than anybody reads: the pipe never comes to its end."""


FAMILY = ["sh", "-c", "sleep 60 & wait"]
"""A child with one of its own, which holds the same pipes."""


async def bounded_work() -> None:
    await bounded.run(FAMILY, SHELL, Path("/"), Bounds(50, 100), b"given")


async def worker_work() -> None:
    async with aclosing(worker.lines(FAMILY, SHELL, b"job")) as lines:
        async for _ in lines:
            pass


async def work_that_is_done() -> None:
    async with aclosing(worker.lines(["cat"], SHELL, b"job")) as lines:
        async for _ in lines:
            break


def held() -> tuple[int, set[psutil.Process]]:
    """What the tests' process has of open descriptors, and of children."""
    return len(os.listdir("/proc/self/fd")), set(psutil.Process().children())


@pytest.mark.parametrize("again", [None, 0, 2, 5])
@pytest.mark.parametrize("work", [bounded_work, worker_work, work_that_is_done])
async def test_whoever_is_cancelled_leaves_nothing_when_it_ends(
    work: Callable[[], Awaitable[None]], again: int | None
) -> None:
    """At any moment of a start, and once more at any moment of the end. What would be left to later turns of the
    loop is left for good where the loop is closed at once."""
    for turns in range(14):  # in which a process is forked, its pipes are connected one by one, and it is read
        before = held()
        task = asyncio.ensure_future(work())
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()
        if again is not None:
            for _ in range(again):
                await asyncio.sleep(0)
            task.cancel()
        done, _ = await asyncio.wait([task], timeout=5)
        assert done, f"cancelled after {turns} turns of the loop it never ended"
        assert held() == before, f"cancelled after {turns} turns of the loop"


@pytest.mark.parametrize(
    ("script", "beyond", "seconds"),
    [
        (MUCH, TooMuch, 14),
        (f"{MUCH} >&2", TooLong, 0.3),
        # who left the process group keeps the pipes, and is not ours to end
        ("setsid sleep 20 & sleep 60", TooLong, 0.3),
        (f"setsid sleep 20 & {MUCH}", TooMuch, 14),
    ],
)
async def test_bounds_hold_whatever_the_child_does_with_its_pipes(
    script: str, beyond: type[Exceeded], seconds: float, tmp_path: Path
) -> None:
    before = held()
    with pytest.raises(beyond):
        async with asyncio.timeout(15):
            await bounded.run(["sh", "-c", script], SHELL, tmp_path, Bounds(seconds, 100))
    assert held() == before


async def test_what_was_never_written_keeps_nobody() -> None:
    before = held()
    async with asyncio.timeout(15), child.running(["sh", "-c", "setsid sleep 20 & sleep 60"], SHELL) as process:
        assert process.stdin is not None
        process.stdin.write(bytes(4_000_000))
        process.stdin.close()
    assert held() == before


async def test_what_cannot_be_started_says_so() -> None:
    with pytest.raises(FileNotFoundError):
        async with child.running(["/no/such/program"], SHELL):
            pytest.fail("it ran")
