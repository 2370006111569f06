"""The real engine with a bug planted, started as `python -m quire_engine` is.

A prompt that begins with `POISON` kills the process in the step that would compute it, as a fault in a kernel
does. Without such a prompt it is the real engine and nothing else.
"""

from __future__ import annotations

import os
import signal
import sys

from quire_engine.__main__ import main
from quire_engine.runner import ModelRunner
from quire_engine.step import StepPlan, StepResult

POISON = (777, 777, 777)
_execute = ModelRunner.execute


def execute(self: ModelRunner, plan: StepPlan) -> StepResult:
    if any(item.start == 0 and item.token_ids[: len(POISON)] == POISON for item in plan.items):
        os.kill(os.getpid(), signal.SIGKILL)
    return _execute(self, plan)


if __name__ == "__main__":
    ModelRunner.execute = execute  # type: ignore[method-assign]
    sys.exit(main())
