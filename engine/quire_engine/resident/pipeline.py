"""`Background` on a device that takes orders: the next plan is enqueued before the result of the one that runs is
asked for, so the device has work while the host takes tokens over and decides again.

Three plans break the chain. One that the device cannot carry out alone waits for its predecessor's tokens and is
then executed whole; one whose predecessor was of that kind is completed with tokens that the host has already; and
one that could not be begun at all goes the first way, where the engine's fence finds out whose fault it is.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch

from quire_engine.errors import DeviceLost
from quire_engine.resident.runner import Begun, ResidentRunner
from quire_engine.step import StepPlan, StepResult, resolve

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Executed:
    plan: StepPlan
    result: StepResult


class Pipeline:
    """`runner` where it takes a plan, else `execute`."""

    def __init__(self, runner: ResidentRunner, execute: Callable[[StepPlan], StepResult]) -> None:
        self._runner = runner
        self._execute = execute
        self._under_way: Begun | _Executed | None = None

    @property
    def is_busy(self) -> bool:
        """See `Background`."""
        return self._under_way is not None

    def exchange(self, plan: StepPlan) -> tuple[StepPlan, StepResult] | None:
        """See `Background`."""
        before, self._under_way = self._under_way, None
        if isinstance(before, _Executed):
            self._under_way = self._start(plan, before.result, may_wait=True)
            return before.plan, before.result
        begun = self._start(plan, None, may_wait=before is None)
        done = None if before is None else (before.plan, self._finish(before))
        if begun is None and plan.num_items:
            begun = self._start(plan, None if done is None else done[1], may_wait=True)
        self._under_way = begun
        return done

    def _start(self, plan: StepPlan, known: StepResult | None, *, may_wait: bool) -> Begun | _Executed | None:
        """Begin `plan`, completed with the tokens that are `known`; if the device cannot do so and the host
        `may_wait`, execute it. None if nothing was done.
        """
        complete = plan if known is None else resolve(plan, known.tokens)
        if not complete.num_items:
            self._runner.copy_blocks(complete.copies)
            return _Executed(plan, StepResult({})) if plan.num_items else None
        try:
            if self._runner.takes(complete):
                begun = self._runner.begin(complete)
                begun.plan = plan
                return begun
        except torch.AcceleratorError as error:
            raise DeviceLost(str(error)) from error
        except Exception:
            log.exception("a step could not be begun: %s", plan)
        return _Executed(plan, self._execute(complete)) if may_wait else None

    def _finish(self, begun: Begun) -> StepResult:
        try:
            return self._runner.finish(begun)
        except torch.AcceleratorError as error:
            raise DeviceLost(str(error)) from error
