"""R30: a platform under mixed traffic for a long time neither grows nor leaves anything lying.

First a round of everything and a warm-up in a hurry, after which all caches have what they may have, then a rest
and a look at each process: descriptors, threads, tasks, shared memory, blocks, labels of metrics. Then the same
traffic with two rollouts, during which memory is read, and after it another rest and another look, which must find
the same.

    make soak MINUTES=30                what grew, and a row for each process in benchmarks/results/survival.jsonl
    make soak MINUTES=30 SOAK_TRACE=1   the same with tracemalloc: slower and larger, and it says where

A third of the minutes is warm-up. `make nightly` soaks for 30. Every reading of memory stays beside the rows, as
`soak-DATE.json`: of each process its seconds and bytes, and how many requests had been answered when.
"""

from __future__ import annotations

import asyncio
import datetime
import hashlib
import json
import os
import re
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from benchmarks.rows import backend, provenance, write
from tests.e2e.conftest import COMMAND, Platform
from tests.e2e.soak import LOOK, Shape, Traffic, Watch, grown
from tests.effort import times
from tests.slopes import slope
from tests.waiting import eventually

from quire.client import Client
from quire_schemas import wire

MINUTES = float(os.environ.get("QUIRE_SOAK_MINUTES", times(2, 30)))
WARM = MINUTES / 3
PAUSE = 0.5
"""Mean seconds between an answer and the next question of a client."""
WARM_PAUSE = 0.05
"""The same in the warm-up: what fills with requests, not with time, is to be full by its end."""
REST = 30.0
"""Seconds without a request before each look."""
READ_EVERY = 2.0
BAR = 2**20
"""Bytes an hour that a process may grow."""
KEYS = ("soak-key-of-the-first-policy", "soak-key-of-the-second-policy")
MODEL = """\
apiVersion: quire.dev/v1alpha1
kind: Model
metadata: {{name: {name}}}
spec:
  source: builtin://tiny
  engine: {{maxModelLen: 1024, kvCache: {{size: 8Mi}}}}
  resources: {{cpu: 1}}
  env: [{{name: ROUND, value: '{round}'}}]
---
"""
AROUND = f"""\
apiVersion: quire.dev/v1alpha1
kind: Route
metadata: {{name: either}}
spec:
  match: {{modelNames: [either]}}
  backends: [{{model: steady, weight: 1}}, {{model: moving, weight: 1}}]
  sticky: {{by: user}}
---
apiVersion: quire.dev/v1alpha1
kind: AccessPolicy
metadata: {{name: one}}
spec:
  keys: [{{name: k, hash: "sha256:{hashlib.sha256(KEYS[0].encode()).hexdigest()}"}}]
  limits: [{{scope: key, requests: 100000, per: 1m}}, {{scope: policy, tokens: 100000000, per: 1h}}]
---
apiVersion: quire.dev/v1alpha1
kind: AccessPolicy
metadata: {{name: two}}
spec:
  keys: [{{name: k, hash: "sha256:{hashlib.sha256(KEYS[1].encode()).hexdigest()}"}}]
"""


@dataclass(frozen=True, slots=True)
class Rest:
    """The platform while nobody asks for anything."""

    shapes: dict[str, Shape]
    shared_memory: set[str]
    labels: dict[str, int]
    """Name of a metric -> how many series it has."""
    taken: dict[str, int]
    """What engines hold: blocks, requests."""


class Soak:
    """A platform with two models, a route and two policies, and what watches it."""

    def __init__(self, platform: Platform) -> None:
        self.platform = platform
        looks = platform.root / "looks"
        looks.mkdir()
        platform.write("inside/sitecustomize.py", LOOK)
        platform.environment |= {"PYTHONPATH": str(platform.root / "inside"), "TEST_LOOK": str(looks)}
        if os.environ.get("SOAK_TRACE"):
            platform.environment["PYTHONTRACEMALLOC"] = "1"
        self.rollouts = 0
        # in the foreground, as a supervisor runs it: what a command starts does not inherit PYTHONPATH
        self.daemon = subprocess.Popen(
            [COMMAND, "daemon", "run"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=platform.environment,
        )
        eventually(Client(platform.state).is_running, "the control plane runs")
        platform.run("apply", platform.gateway, self._models(), platform.write("around.yaml", AROUND))
        self.client = Client(platform.state)
        self.traffic = Traffic(platform.base_url("steady"), KEYS)
        self.watch = Watch(platform.processes, looks)
        self.answered: list[tuple[float, int]] = []
        """Seconds, and requests that were answered by then."""

    def _models(self) -> Path:
        texts = [MODEL.format(name="steady", round=0), MODEL.format(name="moving", round=self.rollouts)]
        return self.platform.write("models.yaml", "".join(texts))

    def roll_out(self) -> None:
        self.rollouts += 1
        self.platform.run("apply", self._models(), timeout=600)

    def run(self, minutes: float, rollouts: int, *, pause: float = PAUSE) -> None:
        """Traffic for so long, with rollouts at even distances, and what people look at besides."""
        self.traffic.pause = pause

        async def soak() -> None:
            asking = asyncio.create_task(self.traffic.run(60 * minutes))
            start, done, turn = time.monotonic(), 0, 0
            while not asking.done():
                await asyncio.to_thread(self.watch.note_memory)
                self.answered.append((time.monotonic() - self.watch.started_at, sum(self.traffic.told.values())))
                if done < rollouts and time.monotonic() - start > 60 * minutes * (done + 1) / (rollouts + 1):
                    done += 1
                    await asyncio.to_thread(self.roll_out)
                if turn % 5 == 0:
                    for path in ("/v1/objects/model/moving", "/v1/events"):
                        await asyncio.to_thread(self.client.get, path)
                turn += 1
                await asyncio.wait([asking], timeout=READ_EVERY)
            await asking

        asyncio.run(soak())
        if rollouts:
            eventually(lambda: len(self.watch.named()) == 7, "what was replaced is gone", logs=self.platform.logs)

    def rest(self) -> Rest:
        time.sleep(REST)
        shapes = self.watch.shapes()
        text = httpx.get(self.traffic.base_url.removesuffix("/v1") + "/metrics").text
        labels: dict[str, int] = {}
        for line in text.splitlines():
            if line and not line.startswith("#"):
                name = re.split(r"[{ ]", line, maxsplit=1)[0]
                labels[name] = labels.get(name, 0) + 1
        taken: dict[str, int] = {}
        for model in ("steady", "moving"):
            for replica in self.client.get(f"/v1/objects/model/{model}")["replicas"]:
                stats = self._stats(replica)
                taken[f"{model}: blocks"] = stats.blocks_used
                taken[f"{model}: slots"] = stats.kv_slots_used
                taken[f"{model}: requests"] = stats.running + stats.waiting + stats.deferred
        return Rest(shapes, set(os.listdir("/dev/shm")), labels, taken)

    def keep_readings(self) -> Path:
        """Put what was read beside the rows, or where there are none into the platform's folder."""
        rows = os.environ.get("QUIRE_FIGURES")
        now = datetime.datetime.now(datetime.UTC)
        path = (Path(rows).parent if rows else self.platform.root) / f"soak-{now:%Y-%m-%dT%H%M}.json"
        memory = [{"system": name, "pid": pid, "told": told} for (name, pid), told in self.watch.memory.items()]
        path.write_text(json.dumps({"memory": memory, "answered": self.answered}))
        return path.resolve()

    def _stats(self, replica: dict[str, Any]) -> wire.Stats:
        folder = self.platform.state.replica_dir(replica["id"]) / str(replica["incarnation"])
        with socket.socket(socket.AF_UNIX) as sock, sock.makefile("rb") as file:
            sock.settimeout(10)
            sock.connect(str(folder / "engine.sock"))
            sock.sendall(wire.frame(wire.Hello(role="script")) + wire.frame(wire.GetStats()))
            while True:
                message = msgspec.msgpack.decode(
                    file.read(int.from_bytes(file.read(4), "big")), type=wire.FromEngine
                )
                if isinstance(message, wire.Stats):
                    return message


@pytest.fixture
def soak(platform: Platform) -> Iterator[Soak]:
    soak = Soak(platform)
    yield soak
    platform.run("down", "--grace", "1s")
    soak.daemon.wait(30)


@pytest.mark.nightly
def test_r30_a_soaked_platform_neither_grows_nor_keeps_anything(soak: Soak) -> None:
    asyncio.run(soak.traffic.each_once())
    soak.run(WARM, rollouts=0, pause=WARM_PAUSE)
    before = soak.rest()
    measured_from = time.monotonic() - soak.watch.started_at
    asked_before = sum(soak.traffic.told.values())
    soak.run(MINUTES - WARM, rollouts=2)
    after = soak.rest()
    asked = sum(soak.traffic.told.values()) - asked_before

    print(f"\n{asked} requests in {MINUTES - WARM:g} minutes: {dict(sorted(soak.traffic.told.items()))}")
    print(f"every reading of memory is in {soak.keep_readings()}")
    rows: list[dict[str, Any]] = []
    growing: list[str] = []
    for name, shape in sorted(after.shapes.items()):
        old = before.shapes[name]
        if old.pid != shape.pid:
            continue  # it has replaced another
        told = [(at / 3600, size) for at, size in soak.watch.memory[name, shape.pid] if at >= measured_from]
        found = slope([at for at, _ in told], [float(size) for _, size in told])
        row = {
            "system": f"soak: {name}",
            "mib_per_hour": round(found.value / BAR, 3),
            "low": round(found.low / BAR, 3),
            "high": round(found.high / BAR, 3),
            "resident_mib": round(told[-1][1] / BAR, 1),
            "resting_mib_before": round(old.resident / BAR, 1),
            "resting_mib_after": round(shape.resident / BAR, 1),
            "descriptors": shape.descriptors,
            "threads": shape.threads,
            "tasks": sum(shape.tasks.values()),
        }
        rows.append(row)
        print(row)
        for what in ("objects", "traced"):
            more = grown(getattr(old, what), getattr(shape, what), 20 if what == "objects" else 10_000)
            if more:
                print(f"        more {what}: {', '.join(more)}")
        if found.grows(BAR):
            growing.append(f"{name}: {row}")
    if path := os.environ.get("QUIRE_FIGURES"):
        common = {**provenance(backend(1)), "benchmark": "survival", "minutes": MINUTES - WARM, "requests": asked}
        write(Path(path), [{**common, **row} for row in rows])

    assert not soak.traffic.wrong, soak.traffic.wrong[:10]
    assert soak.rollouts == 2
    assert set(after.shapes) == set(before.shapes), "the same processes"
    for name, shape in after.shapes.items():
        old = before.shapes[name]
        assert shape.descriptors == old.descriptors, (
            f"descriptors of {name}: {old.descriptors}, {shape.descriptors}"
        )
        assert shape.threads == old.threads, f"threads of {name}: {old.threads}, {shape.threads}"
        assert shape.tasks == old.tasks, f"tasks of {name}"
    assert after.shared_memory == before.shared_memory
    assert after.labels == before.labels, "no series came or went"
    assert set(after.taken.values()) == {0}, after.taken
    assert not growing, growing
