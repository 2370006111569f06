"""Kills of each kind of process under oracle streams: nothing is altered, nothing hangs, all comes back by itself.

Times are asserted with `effort.bound`. `make nightly` keeps them as rows, in the file that QUIRE_FIGURES names.
"""

from __future__ import annotations

import contextlib
import os
import random
import resource
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import msgspec
import psutil
import pytest
from benchmarks.rows import backend, provenance, write
from tests.effort import bound, times
from tests.oracle import Clients, Oracle
from tests.waiting import eventually

from quire.client import Client
from quire_schemas import wire

if TYPE_CHECKING:
    from tests.e2e.conftest import Platform

STALL = 2.0
MODEL = f"""\
  restartPolicy: {{backoffBase: 100ms, backoffMax: 200ms}}
  probes: {{liveness: {{timeout: {STALL:g}s}}}}
"""


class World:
    """A platform that serves the built-in model in float32, with its oracle."""

    def __init__(self, platform: Platform) -> None:
        manifest = platform.model("chaos", MODEL)
        manifest.write_text(manifest.read_text().replace("engine: {", "engine: {dtype: float32, "))
        platform.run("apply", platform.gateway, manifest)
        self.client = Client(platform.state)
        self.runtime = platform.state
        self.base_url = platform.base_url("chaos")
        self.oracle = Oracle(self.base_url, "chaos", tokens=120)

    def view(self) -> dict[str, Any]:
        return dict(self.client.get("/v1/objects/model/chaos"))

    def replica(self) -> dict[str, Any]:
        (replica,) = self.view()["replicas"]
        return dict(replica)

    def is_ready(self) -> bool:
        conditions = {c["type"]: c["status"] for c in self.view()["status"]["conditions"]}
        return bool(conditions["Ready"] == "True")

    def serves_again(self, before: dict[str, Any]) -> float:
        """When another incarnation than `before` was first seen to serve."""
        return first_seen(
            lambda: self.is_ready() and self.replica()["incarnation"] > before["incarnation"], "it serves again"
        )

    def stats(self) -> wire.Stats:
        """The engine's own count, over a connection of the test's."""
        replica = self.replica()
        folder = self.runtime.replica_dir(replica["id"]) / str(replica["incarnation"])
        with socket.socket(socket.AF_UNIX) as sock, sock.makefile("rb") as file:
            sock.settimeout(10)
            sock.connect(str(folder / "engine.sock"))
            sock.sendall(wire.frame(wire.Hello(role="script")) + wire.frame(wire.GetStats()))
            while True:
                length = int.from_bytes(file.read(4), "big")
                message = msgspec.msgpack.decode(file.read(length), type=wire.FromEngine)
                if isinstance(message, wire.Stats):
                    return message


@pytest.fixture(scope="module")
def world(shared_platform: Platform) -> World:
    return World(shared_platform)


@pytest.fixture(scope="module")
def figures() -> Iterator[dict[str, list[float]]]:
    """Name of a figure -> seconds measured; written at the end of the module."""
    found: dict[str, list[float]] = {}
    yield found
    if path := os.environ.get("QUIRE_FIGURES"):
        rows = []
        for name, seconds in found.items():
            p50, p90, p99, most = (
                sorted(seconds)[int(part * (len(seconds) - 1))] for part in (0.5, 0.9, 0.99, 1.0)
            )
            figure = {"p50_s": p50, "p90_s": p90, "p99_s": p99, "max_s": most}
            row = {**provenance(backend(1)), "benchmark": "survival", "system": name, "repeat": len(seconds)}
            rows.append({**row, **{key: round(value, 3) for key, value in figure.items()}})
        write(Path(path), rows)


def first_seen(true: Callable[[], Any], what: str) -> float:
    """When it was first seen to be true."""
    eventually(true, what, pause=0.01)
    return time.monotonic()


def accepts(base_url: str) -> bool:
    url = httpx.URL(base_url)
    try:
        socket.create_connection((url.host, url.port or 80), timeout=5).close()
    except OSError:
        return False
    return True


def answers(base_url: str) -> bool:
    try:
        return httpx.get(f"{base_url}/models", timeout=5).status_code == 200
    except httpx.HTTPError:
        return False


def test_a_killed_control_plane_alters_no_stream_and_the_next_adopts_what_runs(
    world: World, figures: dict[str, list[float]]
) -> None:
    engine = world.replica()["pid"]
    router = world.client.get("/v1/ping")["router"]["pid"]
    with world.oracle.clients(8) as clients:
        clients.wait_streaming()
        for _ in range(times(1, 50)):
            pid = world.client.get("/v1/ping")["pid"]
            os.kill(pid, signal.SIGKILL)
            psutil.wait_procs([psutil.Process(pid)] if psutil.pid_exists(pid) else [], timeout=10)
            time.sleep(random.uniform(0, 0.3))
            assert world.client.get("/v1/ping")["pid"] != pid
            back = time.monotonic()
            adopted = first_seen(lambda: world.is_ready() and world.replica()["state"] == "Ready", "it is adopted")
            figures.setdefault("control plane: adopted after it is ready", []).append(adopted - back)
            assert adopted - back <= bound(2)
            assert (world.replica()["pid"], world.replica()["incarnation"]) == (engine, 1)
            assert world.client.get("/v1/ping")["router"]["pid"] == router
    assert set(world.oracle.check(clients.readings)) == {"finished"}, "no request failed"
    told = world.client.get("/v1/events", **{"for": "model/chaos"})["items"]
    assert [event["count"] for event in told if event["reason"] == "Started"] == [1]


def end_of(world: World, clients: Clients, kill: Callable[[], None], figures: list[float]) -> float:
    """Kill something under running streams; each of them ends in one error event soon. When it was killed."""
    clients.wait_streaming()
    victims = list(clients.running)
    killed = time.monotonic()
    kill()
    eventually(lambda: all(reading.ended_at for reading in victims), "every stream has an end")
    for reading in victims:
        if reading.outcome == "finished":
            continue  # it was through already
        assert reading.outcome == "broken", reading
        assert reading.error_at is not None
        assert reading.errors[0]["code"] == "engine_died"
        figures.append(reading.error_at - killed)
    return killed


@pytest.mark.parametrize("victim", ["engine", pytest.param("shim", marks=pytest.mark.nightly)])
def test_a_killed_engine_ends_its_streams_cleanly_and_serves_again_by_itself(
    victim: str, world: World, figures: dict[str, list[float]]
) -> None:
    for _ in range(times(1, 25)):
        before = world.replica()
        process = psutil.Process(before["pid"])
        target = process if victim == "engine" else process.parent()
        assert target is not None
        errors = figures.setdefault(f"{victim} killed: error event", [])
        with world.oracle.clients(8) as clients:
            killed = end_of(world, clients, target.kill, errors)
            assert all(seconds <= bound(1) for seconds in errors)
            again = world.serves_again(before)
            figures.setdefault(f"{victim} killed: serving again", []).append(again - killed)
            assert again - killed <= bound(10)
            clients.wait_streaming()
        assert world.oracle.check(clients.readings)["finished"] >= 8
        # An orphan that nobody reaps stays in the list of processes; it has ended all the same.
        assert not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
        assert world.replica()["incarnation"] == before["incarnation"] + 1, "one replacement"


def test_a_killed_router_listens_again_and_what_it_left_in_engines_is_freed(
    world: World, figures: dict[str, list[float]]
) -> None:
    for _ in range(times(1, 50)):
        engine = world.replica()["pid"]
        with world.oracle.clients(8) as clients:
            clients.wait_streaming()
            assert world.stats().blocks_used > 0
            clients.last_turn()
            killed = time.monotonic()
            os.kill(world.client.get("/v1/ping")["router"]["pid"], signal.SIGKILL)
            listening = first_seen(lambda: accepts(world.base_url), "it listens")
            freed = first_seen(lambda: world.stats().blocks_used == 0 == world.stats().running, "blocks are free")
            answering = first_seen(lambda: answers(world.base_url), "it answers")
            figures.setdefault("router killed: blocks free", []).append(freed - killed)
            figures.setdefault("router killed: listening again", []).append(listening - killed)
            figures.setdefault("router killed: answering again", []).append(answering - killed)
            assert freed - killed <= bound(2)
            assert listening - killed <= bound(1)
            assert answering - killed <= bound(2)
        world.oracle.check(clients.readings, cut_allowed=True)
        with world.oracle.clients(8) as clients:
            clients.wait_streaming()
            clients.last_turn()
        assert set(world.oracle.check(clients.readings)) == {"finished"}
        assert world.replica()["pid"] == engine
    told = world.client.get("/v1/events", **{"for": "gateway/default"})["items"]
    assert any(event["reason"] == "RouterEnded" and "SIGKILL" in event["message"] for event in told)


@pytest.mark.nightly  # in CI with a stand-in: tests/integration/test_survival.py
def test_a_stopped_engine_leaves_the_rotation_within_the_stall_time_and_a_second(
    world: World, figures: dict[str, list[float]]
) -> None:
    for _ in range(times(1, 30)):
        before = world.replica()
        with world.oracle.clients(8) as clients:
            clients.wait_streaming()
            stopped = time.monotonic()
            os.kill(before["pid"], signal.SIGSTOP)
            out = first_seen(lambda: not world.is_ready(), "it is out of rotation")
            figures.setdefault("engine stopped: out of rotation", []).append(out - stopped)
            assert out - stopped <= bound(STALL + 1)
            again = world.serves_again(before)
            figures.setdefault("engine stopped: serving again", []).append(again - stopped)
        outcomes = world.oracle.check(clients.readings)
        assert outcomes["finished"] >= 8
        assert not psutil.pid_exists(before["pid"])
        assert world.replica()["lastExit"]["reason"] == "EngineStalled"


@pytest.mark.nightly
def test_r32_an_engine_that_gets_no_memory_harms_no_stream_and_serves_again(
    world: World, figures: dict[str, list[float]]
) -> None:
    """As much address space as it has, and not a page more, until it ends or the time is over. What the kernel
    does to one that has too much is a SIGKILL: the test of a killed engine."""
    for _ in range(times(1, 5)):
        before = world.replica()
        engine = psutil.Process(before["pid"])
        with world.oracle.clients(8) as clients:
            clients.wait_streaming()
            limits = resource.prlimit(engine.pid, resource.RLIMIT_AS)
            resource.prlimit(engine.pid, resource.RLIMIT_AS, (engine.memory_info().vms, limits[1]))
            time.sleep(3)
            if engine.is_running() and engine.status() != psutil.STATUS_ZOMBIE:
                with contextlib.suppress(ProcessLookupError):
                    resource.prlimit(engine.pid, resource.RLIMIT_AS, limits)
            free = time.monotonic()
            serves = first_seen(world.is_ready, "it serves")
            figures.setdefault("engine without memory: serving again", []).append(serves - free)
            clients.wait_streaming()
            clients.last_turn()
        outcomes = world.oracle.check(clients.readings)
        assert outcomes["finished"] >= 8, outcomes
        assert world.stats().blocks_used == 0


SUMMARY = {
    "detect an exit": (("engine killed: error event", "shim killed: error event"), 1.0),
    "detect a hang": (("engine stopped: out of rotation",), STALL + 1),
    "recover from an exit": (("engine killed: serving again", "shim killed: serving again"), 10.0),
    "recover from a hang": (("engine stopped: serving again",), STALL + 10.0),
}
"""What R40 tells -> the figures above that it is of, and what 99 of 100 may take. Loading is in it: the model is
small, and what a large one takes to load comes on top."""


def test_r40_how_long_it_takes_to_notice_and_to_recover(figures: dict[str, list[float]]) -> None:
    """Over all that this module has killed and stopped."""
    seen = {
        what: [each for name in names for each in figures.get(name, [])] for what, (names, _) in SUMMARY.items()
    }
    if not any(seen.values()):
        pytest.skip("it tells of what the tests before it have measured, and none of them was run")
    for what, seconds in seen.items():
        if seconds:
            figures[f"time to {what}"] = seconds
            p99 = sorted(seconds)[int(0.99 * (len(seconds) - 1))]
            assert p99 <= bound(SUMMARY[what][1]), f"time to {what}: {p99:.3f} s"
