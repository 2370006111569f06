"""How long an engine lives without anybody above it: a lease that words renew, counted on the monotonic clock.

Two may speak. A router speaks with every frame it sends, and it pings when it has nothing to say; that its
connection is open proves nothing, for a stopped process keeps its connections. A control plane does not speak to
engines: it listens to the shim above each, and the shim tells, when asked, for how long nobody has listened. The
engine asks only when the routers' word has run out.

    held:      now - last word <= window
    run out:   ask the shim; silence on both sides for the whole window ends the engine once nothing is computed

What ends a lease is looked at twice: a process that was stopped, or a machine that was too busy, finds the words
that were spoken meanwhile in its sockets first.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable

import msgspec

log = logging.getLogger(__name__)

LAST_LOOK = 0.2
"""Seconds for frames that have long arrived to be read before a lease counts as run out."""
SHIM_PATIENCE = 5.0
"""Seconds that a shim has for its answer; one that stays silent longer vouches for nobody."""
MAX_ANSWER = 4 * 1024 * 1024


class _ShimState(msgspec.Struct, rename="camel"):
    """The one thing an engine wants to know of its shim's state."""

    unwatched_for: float


_state = msgspec.json.Decoder(_ShimState)


class Lease:
    """Renewed by `heard`; `run_out` returns when it has ended. `clock` is monotonic, in seconds."""

    def __init__(self, window: float, shim: str | None, clock: Callable[[], float]) -> None:
        self.window = window
        self._shim = shim
        self._clock = clock
        self._last_word = clock()

    def heard(self) -> None:
        """A router has spoken."""
        self._last_word = self._clock()

    @property
    def left(self) -> float:
        """Seconds until it ends, unless somebody speaks; 0 or less once it has."""
        return self._last_word + self.window - self._clock()

    async def run_out(self) -> None:
        """Wait until nobody has spoken for the whole window."""
        while True:
            await asyncio.sleep(max(self.left, 0.0))
            await asyncio.sleep(LAST_LOOK)
            if self.left > 0:
                continue
            silent = await self._control_plane_silent_for()
            if silent is None or silent >= self.window:
                if self.left <= 0:
                    return
            else:
                self._last_word = max(self._last_word, self._clock() - silent)

    async def _control_plane_silent_for(self) -> float | None:
        """Seconds for which no control plane has listened to the shim; None when the shim cannot say."""
        if self._shim is None:
            return None
        try:
            async with asyncio.timeout(SHIM_PATIENCE):
                reader, writer = await asyncio.open_unix_connection(self._shim, limit=MAX_ANSWER)
                try:
                    writer.write(b'{"op":"status"}\n')
                    return _state.decode(await reader.readline()).unwatched_for
                finally:
                    writer.close()
                    with contextlib.suppress(OSError):
                        await writer.wait_closed()
        except (OSError, TimeoutError, ValueError, msgspec.MsgspecError) as error:
            log.warning(
                "the shim does not say whether a control plane is there: %s: %s", type(error).__name__, error
            )
            return None
