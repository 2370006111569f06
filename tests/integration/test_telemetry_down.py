"""A collector that is gone for long: routers side by side, two that reach theirs and two that do not.

Requests go to each router in turns, so that what the machine does meanwhile falls on all alike. The effect is told
with its interval, from rounds drawn again and again: on the 99th percentile of the time, and on the processor time
of a request, in which others on the machine have less of a part. What is above the bar of one in a hundred, with
an interval that begins above none, fails. An interval that reaches over the bar is "unresolved" in its row, and no
more: on a noisy machine that is what the time does. QUIRE_BLACKHOLE_SECONDS sets how long it lasts (3600 for the
hour). Five minutes of a night are sixty times the exporter's rhythm of five seconds and thirty times its patience
of ten: all queues are full for long.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import random
import socket
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from tests.effort import times
from tests.figures import record
from tests.integration.otlp_collector import Collector
from tests.integration.router_world import World, end_world, make_world

from quire_schemas import signals

SECONDS = float(os.environ.get("QUIRE_BLACKHOLE_SECONDS", times(20, 300)))
QUEUE = 256
"""Spans that may wait: fewer than by default, so that they are full soon."""
AT_ONCE = 4
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "Say it"}], "max_tokens": 8}
GROWTH = 8 << 20
RESAMPLED = 400
BAR = 1.01
"""Times as much as beside a collector that is there."""


@dataclass
class Side:
    """One router, and how long its requests took, round by round."""

    name: str
    world: World
    rounds: list[list[float]] = field(default_factory=list)
    marks: list[float] = field(default_factory=list)
    """Processor time at the start of each round: up to the next one it is that of its requests, and of what is
    done with spans meanwhile."""
    first_rss: int = 0

    @property
    def rss(self) -> int:
        """Of the router, and of the child that tells for it."""
        router = psutil.Process(self.world.process.pid)
        return sum(int(each.memory_info().rss) for each in (router, *router.children()))

    async def take(self, http: httpx.AsyncClient) -> None:
        async def one() -> float:
            began = time.monotonic()
            answer = await http.post(f"{self.world.url}/v1/chat/completions", json=CHAT)
            assert answer.status_code == 200
            return time.monotonic() - began

        self.marks.append(self.processor_time())
        self.rounds.append(list(await asyncio.gather(*(one() for _ in range(AT_ONCE)))))

    def processor_time(self) -> float:
        """Of all threads of the router, to the nanosecond."""
        return time.clock_gettime(~self.world.process.pid << 3 | 2)


def p99(rounds: Sequence[Sequence[float]]) -> float:
    return statistics.quantiles([each for took in rounds for each in took], n=100)[98]


@dataclass(frozen=True)
class Effect:
    """By which factor something is larger, with the ends of an interval of 95 %."""

    factor: float
    low: float
    high: float

    @property
    def verdict(self) -> str:
        if self.factor > BAR and self.low > 1:
            return "fails"
        return "holds" if self.high <= BAR else "unresolved"


def effect(of: Side, against: Sequence[Side], figure: Callable[[Side, Sequence[int]], float]) -> Effect:
    """On a figure of some rounds. Of all sides the same rounds are drawn."""
    count = len(of.rounds) - 1  # what the last one took of the processor is not known
    drawn = random.Random(1)

    def factor(places: Sequence[int]) -> float:
        return figure(of, places) / statistics.fmean(figure(side, places) for side in against)

    found = sorted(factor([drawn.randrange(count) for _ in range(count)]) for _ in range(RESAMPLED))
    return Effect(factor(range(count)), found[RESAMPLED // 40], found[-RESAMPLED // 40])


def slowest(side: Side, places: Sequence[int]) -> float:
    return p99([side.rounds[place] for place in places])


def dearest(side: Side, places: Sequence[int]) -> float:
    return statistics.fmean(side.marks[place + 1] - side.marks[place] for place in places)


@contextlib.asynccontextmanager
async def side(name: str, url: str) -> AsyncIterator[Side]:
    environment = {"OTEL_EXPORTER_OTLP_ENDPOINT": url, "OTEL_BSP_MAX_QUEUE_SIZE": str(QUEUE)}
    environment |= {"OTEL_BSP_MAX_EXPORT_BATCH_SIZE": str(QUEUE // 2)}
    with tempfile.TemporaryDirectory(prefix="qr") as folder:
        world = make_world(Path(folder), environment)
        engine = await world.engine()
        try:
            await world.serve(engine)
            yield Side(name, world)
        finally:
            await engine.stop()
            end_world(world)
        log = (world.folder / "router.log").read_text()
        assert "Traceback" not in log
        assert log.count("exported") < 10, "the log says it once, and not again and again"


@pytest.mark.nightly  # in CI: test_tracing.py, where a bad collector costs spans and two lines of log
async def test_r36_a_collector_that_is_gone_costs_spans_and_no_time() -> None:
    async with contextlib.AsyncExitStack() as stack:
        good = stack.enter_context(Collector())
        hole = stack.enter_context(Collector("hangs"))
        nobody = stack.enter_context(socket.socket())
        nobody.bind(("127.0.0.1", 0))  # and it does not listen
        where = {
            "reached": good.url,
            "reached again": good.url,
            "never answers": hole.url,
            "refuses": f"http://127.0.0.1:{nobody.getsockname()[1]}",
        }
        sides = [await stack.enter_async_context(side(name, url)) for name, url in where.items()]
        http = await stack.enter_async_context(httpx.AsyncClient(timeout=30))
        drawn = random.Random(1)
        began = time.monotonic()
        while time.monotonic() - began < SECONDS:
            for each in drawn.sample(sides, len(sides)):
                await each.take(http)
            if time.monotonic() - began < SECONDS / 4:  # until then queues and pools fill
                for each in sides:
                    each.first_rss = each.rss
        told: list[tuple[Side, dict[str, Effect]]] = []
        for each in sides:
            now = await each.world.metrics()
            full = now[f'{signals.SPANS_DROPPED}_total{{reason="queue_full"}}']
            failed = now[f'{signals.SPANS_DROPPED}_total{{reason="export_failed"}}']
            exported = now[f"{signals.SPANS_EXPORTED}_total"]
            grown = each.rss - each.first_rss
            others = [other for other in sides[:2] if other is not each]
            effects = {"time": effect(each, others, slowest), "cpu": effect(each, others, dearest)}
            cpu = 1000 * dearest(each, range(len(each.rounds) - 1)) / AT_ONCE
            row: dict[str, Any] = {
                "system": f"collector: {each.name}", "repeat": AT_ONCE * len(each.rounds), "seconds": SECONDS,
                "p99_s": round(p99(each.rounds), 5), "cpu_ms_per_request": round(cpu, 4),
                "spans_exported": exported, "spans_lost": full + failed, "grown_bytes": grown,
            }  # fmt: skip
            for what, found in effects.items():
                row |= {f"{what}_{key}": round(value, 4) for key, value in dataclasses.asdict(found).items()}
                row[f"{what}_verdict"] = found.verdict
            print(row)
            record(row)
            told.append((each, effects))
            spans = AT_ONCE * len(each.rounds)  # and several more below each request
            if each in sides[:2]:
                assert exported > 0
                assert full + failed == 0 or exported > full
            else:
                assert exported == 0
                assert full + failed >= spans - QUEUE, "what does not fit is counted"
                assert grown <= max(other.rss - other.first_rss for other in sides[:2]) + GROWTH
        for each, effects in told[2:]:
            for what, found in effects.items():
                assert found.verdict != "fails", f"{each.name}: {what} {found}"
