"""The work queue of the control plane: which key to reconcile next, and when.

`Schedule` is the queue itself, without clock or task: a key waits at most once, is worked on by at most one
worker, and a key that is added while it is worked on runs once more afterwards. Triggers are only hints, so
losing one costs at most the resync period. A key whose reconcile raised comes again after a back-off of its
own. `Controller` is the loop around it.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Awaitable, Callable, Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
log = logging.getLogger(__name__)

RESYNC_SECONDS = 30.0
ERROR_BASE = 0.2
ERROR_MAX = 30.0


class Schedule(Generic[K]):
    """Keys and the time at which each is due. Times are whatever clock the caller uses."""

    def __init__(self, resync: float = RESYNC_SECONDS) -> None:
        self._resync = resync
        self._due: dict[K, float] = {}
        self._working: set[K] = set()
        self._again: dict[K, float] = {}
        self._failures: dict[K, int] = {}

    def add(self, key: K, at: float) -> None:
        """Make `key` due at `at`, or earlier if it already is."""
        waiting = self._again if key in self._working else self._due
        waiting[key] = min(at, waiting.get(key, at))

    def take(self, now: float) -> list[K]:
        """Keys that are due and not worked on, longest due first; they count as worked on until `done`."""
        due = sorted((at, number) for number, (key, at) in enumerate(self._due.items()) if at <= now)
        keys = list(self._due)
        taken = [keys[number] for _, number in due]
        for key in taken:
            del self._due[key]
            self._working.add(key)
        return taken

    def done(self, key: K, now: float, *, again_at: float | None = None, keep: bool = True) -> None:
        """`key` was reconciled. It is due again at `again_at`, at a hint's time, or at the resync."""
        self._failures.pop(key, None)
        self._release(key, again_at, now + self._resync if keep else None)

    def failed(self, key: K, now: float, jitter: float) -> float:
        """Reconciling `key` raised: due again after its back-off, in seconds the return value. Hints wait too."""
        count = self._failures.get(key, 0)
        self._failures[key] = count + 1
        delay = min(ERROR_BASE * 2.0 ** min(count, 30), ERROR_MAX) * (1 + 0.2 * jitter)
        self._working.discard(key)
        self._again.pop(key, None)
        self._due[key] = now + delay
        return delay

    def _release(self, key: K, *times: float | None) -> None:
        self._working.discard(key)
        candidates = [at for at in (*times, self._again.pop(key, None)) if at is not None]
        if candidates:
            self._due[key] = min(candidates)

    def next_at(self) -> float | None:
        """When the next key is due; None when none waits."""
        return min(self._due.values(), default=None)


class Controller(Generic[K]):
    """Runs `reconcile` for due keys, different keys at the same time.

    `reconcile(key)` gives the seconds after which it wants to run again, or None to wait for a hint or the
    resync. `clock` is monotonic seconds. Call `add` from the loop's thread.
    """

    def __init__(
        self,
        reconcile: Callable[[K], Awaitable[float | None]],
        *,
        clock: Callable[[], float] = time.monotonic,
        rng: random.Random | None = None,
        resync: float = RESYNC_SECONDS,
    ) -> None:
        self._reconcile = reconcile
        self._clock = clock
        self._rng = rng or random.Random()  # noqa: S311 - jitter, not a secret
        self._schedule: Schedule[K] = Schedule(resync)
        self._wake = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()

    def add(self, key: K, after: float = 0.0) -> None:
        """Hint that `key` may need work, now or `after` seconds from now."""
        self._schedule.add(key, self._clock() + after)
        self._wake.set()

    async def run(self) -> None:
        """Work until cancelled; then cancel what is being worked on and wait for it."""
        try:
            while True:
                self._wake.clear()
                for key in self._schedule.take(self._clock()):
                    task = asyncio.create_task(self._work(key), name=f"reconcile {key}")
                    self._tasks.add(task)
                    task.add_done_callback(self._tasks.discard)
                await self._sleep()
        finally:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _sleep(self) -> None:
        """Until a hint or the next due time. Not with `asyncio.wait_for`: before Python 3.12 it could lose a
        cancellation that came together with the event, and the loop would never end.
        """
        at = self._schedule.next_at()
        try:
            async with asyncio.timeout(None if at is None else max(0.0, at - self._clock())):
                await self._wake.wait()
        except TimeoutError:
            return

    async def _work(self, key: K) -> None:
        try:
            delay = await self._reconcile(key)
        except Exception:
            pause = self._schedule.failed(key, self._clock(), self._rng.uniform(-1, 1))
            log.exception("reconcile %s failed; again in %.1f s", key, pause)
        else:
            now = self._clock()
            self._schedule.done(key, now, again_at=None if delay is None else now + delay)
        self._wake.set()
