"""A step in the background: the host plans the next one and hands out the last one's tokens while it runs.

One thread carries plans out, one after the other; at most one is under way. A plan that was made before its
predecessor's tokens were known is completed with them here, at the last moment.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor

from quire_engine.errors import InvariantBroken
from quire_engine.step import StepPlan, StepResult, resolve


class Ahead:
    """`execute` in a thread of its own."""

    def __init__(self, execute: Callable[[StepPlan], StepResult]) -> None:
        self._execute = execute
        self._thread = ThreadPoolExecutor(1, "step")
        self._under_way: tuple[StepPlan, Future[StepResult]] | None = None

    @property
    def is_busy(self) -> bool:
        """A plan was begun and its result not taken."""
        return self._under_way is not None

    def begin(self, plan: StepPlan, drawn: Mapping[str, int]) -> None:
        """Start to carry out `plan`, whose pending tokens are `drawn`; it has begun on return."""
        if self._under_way is not None:
            raise InvariantBroken("a step was begun while another was under way")
        begun = threading.Event()
        self._under_way = plan, self._thread.submit(self._carry_out, resolve(plan, drawn), begun)
        # Python threads take turns of milliseconds: without this the device would be idle until the caller has
        # nothing left to do
        begun.wait()

    def finish(self) -> tuple[StepPlan, StepResult]:
        """Wait for the plan under way; raises what carrying it out raised."""
        if self._under_way is None:
            raise InvariantBroken("no step is under way")
        plan, future = self._under_way
        self._under_way = None
        return plan, future.result()

    def _carry_out(self, plan: StepPlan, begun: threading.Event) -> StepResult:
        begun.set()
        return self._execute(plan)
