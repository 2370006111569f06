"""What each model did over the last minutes: the router's own figures, looked at every two seconds.

Somebody looks only while the page is open somewhere: when nobody has asked for ten minutes, which is as long as
figures are kept, it rests, and begins anew with the next question.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from quire import endpoint
from quire.remote.errors import RemoteError
from quire.remote.http import Http
from quire.series import Buckets, Series, percentile, rate, read, read_buckets
from quire_schemas import signals

EVERY: Final = 2.0
"""Seconds between two looks."""
KEPT: Final = 300
"""Points: ten minutes."""
WINDOW: Final = 15
"""Points over which times to the first token are taken together: half a minute."""
LOOK_SECONDS: Final = 5.0
NO_MODEL: Final = "-"
"""What the router counts requests under that name no model of its own."""
FIELDS: Final = (
    "outTokensPerSecond", "inTokensPerSecond", "ttftP50", "ttftP95", "inFlight", "held", "waiting", "running",
    "kv", "up",
)  # fmt: skip
"""What a point tells of a model, in this order; null for a percentile of nothing."""
_GAUGES: Final = (
    signals.REQUESTS_IN_FLIGHT,
    signals.REQUESTS_HELD,
    signals.NUM_REQUESTS_WAITING,
    signals.NUM_REQUESTS_RUNNING,
)


@dataclass(frozen=True, slots=True)
class Router:
    """Where the router is. `away`: why it cannot be asked now."""

    base_url: str
    certificate: str | None
    away: str | None


@dataclass(frozen=True, slots=True)
class Look:
    """One page of metrics, and when it was read on a clock that nobody sets."""

    at: float
    series: Series
    first_tokens: Buckets

    @classmethod
    def of(cls, at: float, text: str) -> Look:
        return cls(at, read(text), read_buckets(text, signals.TIME_TO_FIRST_TOKEN))


def point(earlier: Look, before: Look, now: Look) -> dict[str, list[float | None]]:
    """Model -> `FIELDS`: rates since `before`, percentiles since `earlier`, and what is now."""

    def of(metric: str, model: str, look: Look = now) -> float:
        return look.series.get((metric, model), 0.0)

    def speed(counter: str, model: str) -> float:
        name = f"{counter}_total"
        return round(rate(of(name, model, before), of(name, model), max(now.at - before.at, 1e-3)), 2)

    def wait(model: str, share: float) -> float | None:
        found = percentile(earlier.first_tokens.get(model, ()), now.first_tokens.get(model, ()), share)
        return None if found is None else round(found, 5)

    models = sorted({model for metric, model in now.series if metric == signals.REQUESTS_IN_FLIGHT} - {NO_MODEL})
    return {
        model: [
            speed(signals.GENERATION_TOKENS, model),
            speed(signals.PROMPT_TOKENS, model),
            wait(model, 0.5),
            wait(model, 0.95),
            *(of(metric, model) for metric in _GAUGES),
            round(of(signals.KV_CACHE_USAGE, model) / max(of(signals.REPLICA_UP, model), 1.0), 4),
            of(signals.REPLICA_UP, model),
        ]
        for model in models
    }


class Load:
    """The last minutes of one router. `start` before anything else, `close` in the end."""

    def __init__(
        self,
        router: Callable[[], Router],
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._router = router
        self._clock = clock
        self._wall = wall
        self._looks: deque[Look] = deque(maxlen=WINDOW + 1)
        self._items: deque[dict[str, Any]] = deque(maxlen=KEPT)
        self._number = 0
        self._problem: str | None = None
        self._asked_at = clock()
        self._asked = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.create_task(self._run(), name="console load")

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    def told(self, after: int = 0) -> dict[str, Any]:
        """The points with a number above `after`, oldest first; all of them to who has numbers of another time."""
        self._asked_at = self._clock()
        self._asked.set()
        if after > self._number:
            after = 0
        return {
            "every": EVERY,
            "kept": KEPT,
            "fields": FIELDS,
            "problem": self._problem,
            "items": [item for item in self._items if item["n"] > after],
        }

    def take(self, text: str) -> None:
        """Keep what a page of metrics says. The first one gives no point: rates need two."""
        now = Look.of(self._clock(), text)
        if self._looks:
            self._number += 1
            found = point(self._looks[0], self._looks[-1], now)
            self._items.append({"n": self._number, "at": round(self._wall(), 3), "models": found})
        self._looks.append(now)

    async def _run(self) -> None:
        while True:
            began = self._clock()
            if began - self._asked_at > KEPT * EVERY:
                self._looks.clear()
                self._items.clear()
                self._asked.clear()
                await self._asked.wait()
                continue
            router = self._router()
            self._problem = router.away
            if router.away is None:
                try:
                    async with asyncio.timeout(LOOK_SECONDS):
                        self.take(await _metrics(router))
                except (RemoteError, OSError, ValueError) as error:
                    self._problem = getattr(error, "message", None) or f"the router does not answer: {error!r}"
            if self._problem is not None:
                self._looks.clear()  # a rate over a gap would be told for one moment
            await asyncio.sleep(max(EVERY - (self._clock() - began), 0.05))


async def _metrics(router: Router) -> str:
    """The router's page of metrics."""
    http = Http(router.base_url, {"connection": "close"}, endpoint.trust(router.base_url, router.certificate))
    parts: list[bytes] = []
    try:
        answer = await http.ask("GET", "/metrics", b"", parts.append)
    finally:
        http.close()
    if answer.status != 200:
        raise ValueError(f"it answered {answer.status} to /metrics")
    return b"".join(parts).decode()
