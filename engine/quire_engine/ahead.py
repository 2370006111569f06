"""A step in the background: the host plans the next one and hands out the last one's tokens while it runs.

`Background` is what the engine knows of it. On a CPU it is `Ahead`: one thread carries plans out, one after the
other. A plan that was made before its predecessor's tokens were known is completed with them here, at the last
moment. A GPU goes on by itself and needs no thread; see `resident.pipeline`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

from quire_engine.step import StepPlan, StepResult, resolve


class Background(Protocol):
    """Carries plans out in order; the host waits for one when it hands over the next."""

    @property
    def is_busy(self) -> bool:
        """A plan was handed over and its result not taken."""

    def exchange(self, plan: StepPlan) -> tuple[StepPlan, StepResult] | None:
        """Hands over `plan`, which may have no items, and takes the one before it with its result, if there is
        one. Raises what carrying that one out raised.
        """


class Ahead:
    """`execute` in a thread of its own."""

    def __init__(self, execute: Callable[[StepPlan], StepResult]) -> None:
        self._execute = execute
        self._thread = ThreadPoolExecutor(1, "step")
        self._under_way: tuple[StepPlan, Future[StepResult]] | None = None

    @property
    def is_busy(self) -> bool:
        """See `Background`."""
        return self._under_way is not None

    def exchange(self, plan: StepPlan) -> tuple[StepPlan, StepResult] | None:
        """See `Background`; `plan` begins when the one before it has ended, and has begun on return."""
        before, self._under_way = self._under_way, None
        done = None if before is None else (before[0], before[1].result())
        if plan.num_items:
            self._begin(plan, {} if done is None else done[1].tokens)
        return done

    def _begin(self, plan: StepPlan, drawn: Mapping[str, int]) -> None:
        begun = threading.Event()
        self._under_way = plan, self._thread.submit(self._carry_out, resolve(plan, drawn), begun)
        # Python threads take turns of milliseconds: without this the device would be idle until the caller has
        # nothing left to do
        begun.wait()

    def _carry_out(self, plan: StepPlan, begun: threading.Event) -> StepResult:
        begun.set()
        return self._execute(plan)
