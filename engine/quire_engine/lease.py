"""How long an engine lives without anybody above it: a lease that words renew, counted on a monotonic clock.

Routers and the control plane speak: with every frame they send, and with `GetStats` when they have nothing else to
say. That a connection is open proves nothing, for a stopped process keeps its connections.

What ends a lease is looked at twice: a process that was stopped, or a machine that was too busy, finds the words
that were spoken meanwhile in its sockets first.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

LAST_LOOK = 0.2
"""Seconds for frames that have long arrived to be read before a lease counts as run out."""


class Lease:
    """Renewed by `heard`; `run_out` returns when it has ended. `clock` is monotonic, in seconds."""

    def __init__(self, window: float, clock: Callable[[], float]) -> None:
        self.window = window
        self._clock = clock
        self._last_word = clock()

    def heard(self) -> None:
        """Somebody above has spoken."""
        self._last_word = self._clock()

    @property
    def left(self) -> float:
        """Seconds until it ends, unless somebody speaks; 0 or less once it has."""
        return self._last_word + self.window - self._clock()

    async def run_out(self) -> None:
        """Wait until nobody has spoken for the whole window."""
        while self.left > 0:
            await asyncio.sleep(self.left)
            await asyncio.sleep(LAST_LOOK)
