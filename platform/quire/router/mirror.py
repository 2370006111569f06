"""Copies of requests for another model: background work whose answers are thrown away.

A copy is the request's `Job` for that model, run as nobody's: nothing is written, stored or sent. It is made where
the model has a seat free besides all that it has to do (`desk`), and dropped otherwise, so that it takes nothing
from anybody; engines take it last. What becomes of it is counted, and changes nothing for the request that it
copies.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Final

from quire.errors import QueueFull
from quire.router.desk import Desk
from quire.router.fleet import Fleet, ServedModel
from quire.router.job import Job
from quire.router.model_metrics import COPIED
from quire.router.run import Run
from quire.router.spans import RequestSpan
from quire.router.traffic import adapter_of

log = logging.getLogger("quire.router")

MAX_SECONDS: Final = 600.0
"""That a copy may take."""
MakeJob = Callable[[ServedModel, float, RequestSpan], Awaitable[Job]]


class Mirrors:
    """The copies of one worker's requests."""

    def __init__(self, fleet: Fleet, desk: Desk) -> None:
        self._fleet = fleet
        self._desk = desk

    def begin(self, route: str, target: str, sequences: int, make: MakeJob) -> None:
        """Send a copy of a request to `target`, a model that may be one with an adapter, if there is room for it;
        `make` gives its job for a model."""
        served = self._fleet.targets.get(target)
        if served is None or not served.ready:
            self._fleet.metrics.count_routed(COPIED, route, target, "dropped")
            return
        task = asyncio.create_task(self._carry(route, served, target, sequences, make), name=f"copy for {target}")
        self._fleet.copies.add(task)
        task.add_done_callback(self._fleet.copies.discard)

    async def _carry(self, route: str, served: ServedModel, target: str, sequences: int, make: MakeJob) -> None:
        finish = "failed"
        try:
            async with contextlib.AsyncExitStack() as places:
                try:
                    held = self._desk.admitted(served, sequences, "", background=True, copy=True)
                    await places.enter_async_context(held)
                except QueueFull:
                    finish = "dropped"
                    return
                job = await make(served, time.monotonic(), RequestSpan.unseen())
                patience = min(job.timeout or MAX_SECONDS, MAX_SECONDS)
                copy = dataclasses.replace(job, background=True, timeout=patience, adapter=adapter_of(target))
                run = Run(self._fleet, self._desk, copy, time.monotonic())
                async with contextlib.aclosing(run.updates()) as batches:
                    async for _ in batches:
                        pass
            finish = "completed"
        except Exception as error:  # noqa: BLE001 - whatever it is, the request itself is answered elsewhere
            log.debug("a copy for %s failed: %r", target, error)
        finally:
            self._fleet.metrics.count_routed(COPIED, route, target, finish)
