"""Several models on one GPU, which a played driver shows: who starts when, and who has its memory."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from typing import Any

import pytest
from tests.integration.plane import GATEWAY, Plane, model
from tests.waiting import alive, eventually

from quire.controlplane.wiring import DETECT_SECONDS

GIB = 1 << 30
QUICK = "  restartPolicy: {backoffBase: 100ms, backoffMax: 200ms}\n"


def on_gpu(kv: str, priority: int = 0) -> str:
    """A spec of a replica with that much cache on the GPU."""
    return QUICK + (
        f"  engine: {{device: cuda, maxModelLen: 256, kvCache: {{size: {kv}}}}}\n"
        f"  placement: {{priority: {priority}}}\n"
    )


@pytest.fixture(scope="module")
def plane(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Plane]:
    plane = Plane(tmp_path_factory.mktemp("plane"), gpu=16 * GIB)
    plane.start()
    plane.apply(GATEWAY)
    yield plane
    plane.end()
    assert plane.ours() == []


def replica(plane: Plane, name: str) -> dict[str, Any]:
    """Its only replica; nothing while it has none."""
    replicas = plane.view(name)["replicas"]
    return dict(replicas[0]) if replicas else {"state": "", "message": ""}


def wait_for_room(plane: Plane, name: str) -> str:
    """The message with which it says that it has none."""

    def lacks() -> str | None:
        condition = plane.condition(name, "Scheduled")
        return str(condition["message"]) if condition["reason"] == "InsufficientDevices" else None

    return str(eventually(lacks, f"{name} waits for room"))


def test_engines_start_one_after_another_and_say_whom_they_wait_for(plane: Plane) -> None:
    plane.apply(model("first", on_gpu("1Gi"), LOAD="2"), model("second", on_gpu("1Gi"), LOAD="0.5"))
    eventually(lambda: replica(plane, "first")["state"] == "Starting", "the first starts")
    waiting = eventually(lambda: (r := replica(plane, "second"))["message"] and r, "the second says why it waits")
    assert (waiting["state"], waiting["message"]) == ("Pending", "starts on cuda:0 after first-r1-0")
    assert waiting["pid"] is None
    assert waiting["devices"] == ["cuda:0"], "its memory is its own already"
    first, second = plane.wait_served("first"), plane.wait_served("second")
    assert second["replicas"][0]["since"] > first["replicas"][0]["since"]
    assert second["replicas"][0]["message"] == ""
    plane.delete("first")
    plane.delete("second")


def test_stopping_ends_when_the_memory_is_back(plane: Plane) -> None:
    """NVML may show the memory of a process for a moment, or for long, after it is gone."""
    plane.apply(model("old", on_gpu("12Gi")))
    pid = plane.wait_served("old")["replicas"][0]["pid"]
    plane.apply(model("new", on_gpu("12Gi")))
    wait_for_room(plane, "new")
    plane.use_gpu(14 * GIB)
    time.sleep(DETECT_SECONDS + 0.1)
    plane.delete("old")
    assert not alive(pid)
    eventually(
        lambda: "held by replicas 0 B and others 14.0 GiB" in wait_for_room(plane, "new"), "it is nobody's yet"
    )
    time.sleep(0.5)
    assert plane.view("new")["replicas"] == []
    plane.use_gpu(0)
    plane.wait_served("new")


def test_an_engine_that_crashed_starts_again_when_its_memory_is_back(plane: Plane) -> None:
    pid = plane.wait_served("new")["replicas"][0]["pid"]
    plane.use_gpu(14 * GIB)
    time.sleep(DETECT_SECONDS + 0.1)
    os.kill(pid, signal.SIGKILL)
    waits = eventually(lambda: "free of the" in (r := replica(plane, "new"))["message"] and r, "it says so")
    assert waits["message"].startswith("cuda:0 has 2.0 GiB free of the 13.")
    assert waits["incarnation"] == 1
    plane.use_gpu(0)
    plane.wait_served("new")
    assert replica(plane, "new")["incarnation"] == 2
    plane.delete("new")


def test_room_goes_to_the_highest_priority_and_nobody_is_ended_for_it(plane: Plane) -> None:
    plane.apply(model("there", on_gpu("12Gi")))
    served = plane.wait_served("there")["replicas"][0]
    plane.apply(model("low", on_gpu("12Gi")))
    plane.apply(model("high", on_gpu("12Gi", 10)))
    for name in ("low", "high"):
        wait_for_room(plane, name)
    assert replica(plane, "there")["pid"] == served["pid"]
    changed = on_gpu("12Gi").replace("maxModelLen: 256", "maxModelLen: 128")
    assert "unavailable 1" in plane.plan(model("there", changed))["rollout"]
    plane.apply(model("there", changed))
    assert plane.wait_served("there")["replicas"][0]["revision"] == 2, "who replaces its own keeps its place"
    assert plane.view("high")["replicas"] == []
    plane.delete("there")
    plane.wait_served("high")
    assert plane.view("low")["replicas"] == []
    # what waits may be given another place in the queue while it waits
    plane.apply(model("later", on_gpu("12Gi", 1)))
    plane.apply(model("low", on_gpu("12Gi", 2)))
    wait_for_room(plane, "later")
    plane.delete("high")
    plane.wait_served("low")
    assert plane.view("later")["replicas"] == []
    plane.apply(model("low", on_gpu("12Gi", -5)))
    assert plane.wait_served("low")["replicas"][0]["incarnation"] == 1, "another priority ends nobody"
    plane.delete("low")
    plane.wait_served("later")
    plane.delete("later")
