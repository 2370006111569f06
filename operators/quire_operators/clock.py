"""The clock that decisions go by: unix seconds that nobody can set.

The wall clock jumps: by hand, by NTP after a bad start, with a laptop's battery. A deadline measured on it passes
a day early or never, so nothing is decided by it. The steady clock is `time.monotonic()` plus a base that is drawn
once a boot and kept in the store: it reads like unix time, never jumps, and goes on over restarts of the control
plane, so that stored times (`not_before`, `drain_since`) mean the same to the next one.

After a reboot the monotonic clock starts again and a new base is drawn, never below the newest time on record:
a wall clock that lost its date must not put everything stored into the future.

For display a steady time is moved by as much as the wall clock was (`on_the_wall`), so ages come out right; time
that the machine was suspended for is missing in them.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class SteadyClock:
    """Called, it gives unix seconds. `base` is what they were when the monotonic clock stood at zero."""

    base: float

    def __call__(self) -> float:
        return self.base + time.monotonic()


def new_base(newest: float) -> float:
    """A base for this boot: the wall clock's, or later if something is on record from after that."""
    return max(time.time(), newest) - time.monotonic()


def on_the_wall(at: float, clock: Callable[[], float]) -> float:
    """What the wall clock of now calls the time that `clock` calls `at`.

    The two are compared to the second: a wall clock that is merely kept on time must not make one event's time
    another at each look.
    """
    return at + round(time.time() - clock())


def boot_id() -> str:
    """What tells this boot of the machine from every other."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
