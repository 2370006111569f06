"""A collector that is gone for long: routers side by side, two that reach theirs and two that do not.

Requests go to each router in turns, so that what the machine does meanwhile falls on all alike. The effect on
the 99th percentile is told with its interval, from rounds drawn again and again: it fails when even the low end
shows one. QUIRE_BLACKHOLE_SECONDS sets how long it lasts (3600 for the hour). Five minutes of a night are sixty
times the exporter's rhythm of five seconds and thirty times its patience of ten: all queues are full for long.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import socket
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import psutil
import pytest
from benchmarks.rows import NO_KERNELS, provenance, write
from tests.effort import times
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


@dataclass
class Side:
    """One router, and how long its requests took, round by round."""

    name: str
    world: World
    rounds: list[list[float]] = field(default_factory=list)
    first_rss: int = 0

    @property
    def rss(self) -> int:
        return int(psutil.Process(self.world.process.pid).memory_info().rss)

    async def take(self, http: httpx.AsyncClient) -> None:
        async def one() -> float:
            began = time.monotonic()
            answer = await http.post(f"{self.world.url}/v1/chat/completions", json=CHAT)
            assert answer.status_code == 200
            return time.monotonic() - began

        self.rounds.append(list(await asyncio.gather(*(one() for _ in range(AT_ONCE)))))


def p99(rounds: Sequence[Sequence[float]]) -> float:
    return statistics.quantiles([each for took in rounds for each in took], n=100)[98]


def effect(of: Side, against: Sequence[Side]) -> tuple[float, float, float]:
    """By which factor the 99th percentile is larger, with the ends of an interval of 95 %."""
    count = len(of.rounds)
    drawn = random.Random(1)
    found = []
    for _ in range(RESAMPLED):
        places = [drawn.randrange(count) for _ in range(count)]
        base = p99([side.rounds[place] for side in against for place in places])
        found.append(p99([of.rounds[place] for place in places]) / base)
    found.sort()
    whole = p99(of.rounds) / p99([took for side in against for took in side.rounds])
    return whole, found[RESAMPLED // 40], found[-RESAMPLED // 40]


@contextlib.asynccontextmanager
async def side(name: str, url: str) -> AsyncIterator[Side]:
    environment = {"OTEL_EXPORTER_OTLP_ENDPOINT": url, "OTEL_BSP_MAX_QUEUE_SIZE": str(QUEUE)}
    environment |= {"OTEL_BSP_MAX_EXPORT_BATCH_SIZE": str(QUEUE // 2)}
    with tempfile.TemporaryDirectory(prefix="qr") as folder:
        world = make_world(Path(folder), environment)
        engine = await world.engine()
        await world.serve(engine)
        yield Side(name, world)
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
        rows = []
        for each in sides:
            told = await each.world.metrics()
            full = told[f'{signals.SPANS_DROPPED}_total{{reason="queue_full"}}']
            failed = told[f'{signals.SPANS_DROPPED}_total{{reason="export_failed"}}']
            exported = told[f"{signals.SPANS_EXPORTED}_total"]
            grown = each.rss - each.first_rss
            others = [other for other in sides[:2] if other is not each]
            factor, low, high = effect(each, others)
            print(
                f"{each.name}: p99 {1000 * p99(each.rounds):.2f} ms, {factor:.3f} ({low:.3f} to {high:.3f}) times "
                f"that of those reached; {exported:.0f} spans exported, {full + failed:.0f} lost; grown by {grown}"
            )
            rows.append(
                {
                    **provenance(NO_KERNELS), "benchmark": "survival", "system": f"collector: {each.name}",
                    "repeat": AT_ONCE * len(each.rounds), "seconds": SECONDS, "p99_s": round(p99(each.rounds), 5),
                    "factor": round(factor, 4), "factor_low": round(low, 4), "factor_high": round(high, 4),
                    "spans_lost": full + failed, "grown_bytes": grown,
                }
            )  # fmt: skip
            spans = AT_ONCE * len(each.rounds)  # and several more below each request
            if each in sides[:2]:
                assert exported > 0
                assert full + failed == 0 or exported > full
            else:
                assert exported == 0
                assert full + failed >= spans - QUEUE, "what does not fit is counted"
                assert low <= 1.01, f"{each.name}: even the low end of the effect is above one in a hundred"
                assert grown <= max(other.rss - other.first_rss for other in sides[:2]) + GROWTH
        if path := os.environ.get("QUIRE_FIGURES"):
            write(Path(path), rows)
