"""Copies of requests for another model: background work whose answers are thrown away.

A copy is the request's `Job` for that model, run as nobody's: nothing is written, stored or sent. It is made where
the model has a seat free besides all that it has to do, and dropped otherwise, so that it takes nothing from
anybody; engines take it last. What becomes of it is counted, and changes nothing for the request that it copies.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import time
from collections.abc import Awaitable, Callable
from contextlib import AbstractContextManager
from typing import Final, Protocol

from quire.router.fleet import Fleet, ServedModel
from quire.router.job import Job
from quire.router.metrics import COPIED
from quire.router.run import Run
from quire.router.spans import RequestSpan

log = logging.getLogger("quire.router")

MAX_COPIES: Final = 64
"""On their way at a time, of all routes."""
MAX_SECONDS: Final = 600.0
"""That a copy may take."""
MakeJob = Callable[[ServedModel, float, RequestSpan], Awaitable[Job]]


class Admit(Protocol):
    """Holds places in a model's queue: `Gateway.admit`."""

    def __call__(
        self, served: ServedModel, sequences: int, *, background: bool
    ) -> AbstractContextManager[None]: ...


class Mirrors:
    """The copies of one fleet's requests."""

    def __init__(self, fleet: Fleet, admit: Admit) -> None:
        self._fleet = fleet
        self._admit = admit

    def begin(self, route: str, model: str, sequences: int, make: MakeJob) -> None:
        """Send a copy of a request to `model` if there is room for it; `make` gives its job for a model."""
        served = self._fleet.by_model.get(model)
        if served is None or not served.ready or self._is_full(served, sequences):
            self._fleet.metrics.count_routed(COPIED, route, model, "dropped")
            return
        task = asyncio.create_task(self._carry(route, served, sequences, make), name=f"copy for {model}")
        self._fleet.copies.add(task)
        task.add_done_callback(self._fleet.copies.discard)

    def _is_full(self, served: ServedModel, sequences: int) -> bool:
        return len(self._fleet.copies) >= MAX_COPIES or served.in_flight + sequences > served.slots

    async def _carry(self, route: str, served: ServedModel, sequences: int, make: MakeJob) -> None:
        finish = "failed"
        try:
            with self._admit(served, sequences, background=True):
                job = await make(served, time.monotonic(), RequestSpan.unseen())
                patience = min(job.timeout or MAX_SECONDS, MAX_SECONDS)
                run = Run(self._fleet, dataclasses.replace(job, background=True, timeout=patience))
                async with contextlib.aclosing(run.updates()) as batches:
                    async for _ in batches:
                        pass
            finish = "completed"
        except Exception as error:  # noqa: BLE001 - whatever it is, the request itself is answered elsewhere
            log.debug("a copy for %s failed: %r", served.route.model, error)
        finally:
            self._fleet.metrics.count_routed(COPIED, route, served.route.model, finish)
