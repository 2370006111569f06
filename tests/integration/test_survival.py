"""What goes wrong with processes, and what the control plane makes of it; a stand-in acts for the engines."""

from __future__ import annotations

import os
import re
import resource
import signal
import socket
import sqlite3
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil
import pytest
from tests.effort import bound, times
from tests.integration.plane import GATEWAY, Plane, Stream, model
from tests.waiting import alive, eventually

SLOW = "  restartPolicy: {backoffBase: 1h, backoffMax: 1h}\n"
QUICK = "  restartPolicy: {backoffBase: 100ms, backoffMax: 200ms}\n"


@pytest.fixture(scope="module")
def plane(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Plane]:
    plane = Plane(tmp_path_factory.mktemp("plane"), movable=True)
    plane.start()
    plane.apply(GATEWAY)
    yield plane
    plane.end()
    assert plane.ours() == []


def events(plane: Plane, name: str) -> dict[str, dict[str, Any]]:
    """The newest event of each reason."""
    items = plane.client.get("/v1/events", **{"for": f"model/{name}"})["items"]
    return {item["reason"]: item for item in items}


def carriers(plane: Plane) -> set[int]:
    """Every process that an engine's or router's environment was handed down to."""
    mark = f"QUIRE_UNIT={plane.client.get('/v1/ping')['installId']}@".encode()
    found = set()
    for process in psutil.process_iter():
        try:
            if mark in Path(f"/proc/{process.pid}/environ").read_bytes():
                found.add(process.pid)
        except OSError:
            continue
    return found


def test_a_stopped_engine_is_killed_and_replaced_within_the_stall_time_and_a_second(plane: Plane) -> None:
    plane.apply(model("frozen", "  probes: {liveness: {timeout: 1s}}\n", STEP="0.05"))
    pid = plane.wait_served("frozen")["replicas"][0]["pid"]
    stream = Stream(plane.base_url, "frozen", 400)
    stream.wait_running()
    os.kill(pid, signal.SIGSTOP)
    stopped = time.monotonic()
    seen = eventually(lambda: plane.condition("frozen", "Ready")["status"] == "False" and time.monotonic(), "out")
    eventually(lambda: not alive(pid), "it is killed")
    assert seen - stopped >= 0.5, "not before the stall time"
    stream.join(30)
    assert '"engine_died"' in stream.lines[-1], "its stream ends in one error event"
    view = eventually(
        lambda: (v := plane.view("frozen"))["replicas"][0]["incarnation"] == 2 and v, "a second incarnation"
    )
    assert view["replicas"][0]["lastExit"]["reason"] == "EngineStalled"
    plane.wait_served("frozen")
    told = events(plane, "frozen")
    assert "EngineStalled" in told["Stopping"]["message"]
    assert "no step" in told["EngineStalled"]["message"]
    assert told["Stopping"]["count"] == 1
    assert plane.complete("frozen").status_code == 200
    # idle this time: nobody waits for it, and it is found all the same
    pid = plane.view("frozen")["replicas"][0]["pid"]
    os.kill(pid, signal.SIGSTOP)
    eventually(lambda: not alive(pid), "an idle one is found too")
    plane.wait_served("frozen")
    plane.delete("frozen")


FAILURES: dict[str, tuple[dict[str, object], str, str, str]] = {
    "header": ({"EXIT": 78, "REASON": "BadHeader"}, "Failed", "BadHeader", "ConfigRejected"),
    "tensors": ({"EXIT": 78, "REASON": "WrongTensors"}, "Failed", "WrongTensors", "ConfigRejected"),
    "spec": ({"EXIT": 78, "REASON": "InvalidSpec"}, "Failed", "InvalidSpec", "ConfigRejected"),
    "argument": ({"EXIT": 2, "REASON": "none"}, "Failed", "ConfigRejected", "ConfigRejected"),
    "missing": ({"EXIT": 78, "REASON": "MissingFile"}, "Backoff", "MissingFile", "MissingFile"),
    "memory": ({"EXIT": 1, "REASON": "OutOfMemory"}, "Backoff", "OutOfMemory", ""),
    "socket": ({"EXIT": 1, "REASON": "SocketTaken"}, "Backoff", "SocketTaken", ""),
    "device": ({"EXIT": 1, "REASON": "DeviceUnavailable"}, "Backoff", "DeviceUnavailable", ""),
    "segfault": ({"SIGNAL": 11}, "Backoff", "ProcessEnded", ""),
    "killed": ({"SIGNAL": 9}, "Backoff", "ProcessEnded", ""),
    "leaves": ({"EXIT": 0, "REASON": "none"}, "Backoff", "ProcessEnded", ""),
    "repeats": ({"REPEAT": 1}, "Backoff", "StartupTimeout", ""),
    "hangs": ({"SIGNAL": 19}, "Backoff", "StartupTimeout", ""),
}
"""Kind of failure at the start -> what the stand-in does, state and reason of the replica, reason of Stalled."""


def test_every_kind_of_failed_start_has_its_reason_its_last_words_and_no_leftovers(plane: Plane) -> None:
    def start(*kinds: str, more: str = "") -> None:
        acts = {kind: {"SAY": f"the trouble is {kind}", "CHILD": 1, **FAILURES[kind][0]} for kind in kinds}
        plane.apply(*(model(f"fail-{kind}", SLOW + more, **acts[kind]) for kind in kinds))

    late = [kind for kind, (_, _, reason, _) in FAILURES.items() if reason == "StartupTimeout"]
    start(*FAILURES.keys() - set(late))
    for kind in sorted(FAILURES, key=late.count):
        if kind == late[0]:  # these two alone, so that those before them cannot take their time away
            start(*late, more="  probes: {startup: {timeout: 4s}}\n")
        _, state, reason, stalled = FAILURES[kind]
        name = f"fail-{kind}"

        def ended(name: str = name, state: str = state) -> dict[str, Any] | None:
            replicas = plane.view(name)["replicas"]
            return replicas[0] if replicas and replicas[0]["state"] == state else None

        def seen(name: str = name) -> str:
            return str(plane.view(name)["replicas"])

        replica = eventually(ended, f"{name} is {state}", logs=seen)
        assert (replica["reason"], replica["incarnation"]) == (reason, 1)
        assert f"the trouble is {kind}" in "\n".join(replica["lastExit"]["log"])
        assert replica["lastExit"]["message"] == replica["message"] != ""
        condition = plane.condition(name, "Stalled")
        assert (condition["reason"] if condition["status"] == "True" else "") == stalled, (kind, condition)
        assert replica["pid"] is None
    eventually(lambda: carriers(plane) == {plane.client.get("/v1/ping")["router"]["pid"]}, "no orphan")
    for kind in FAILURES:
        plane.client.delete(f"/v1/objects/model/fail-{kind}")
    eventually(lambda: not plane.client.get("/v1/objects", kind="model")["items"], "their memory is free again")


def test_kernels_that_cannot_be_used_are_a_condition_of_a_model_that_serves(plane: Plane) -> None:
    plane.apply(model("native"))
    plane.apply(model("slow", LACKING="no C++ compiler is installed"))
    plane.wait_served("native")
    view = plane.wait_served("slow")
    assert plane.condition("native", "Accelerated") | {"status": "True", "reason": "NativeKernels"} == (
        plane.condition("native", "Accelerated")
    )
    condition = plane.condition("slow", "Accelerated")
    assert (condition["status"], condition["reason"]) == ("False", "ReferenceKernels")
    assert condition["message"] == "no C++ compiler is installed"
    assert any("g++" in line for line in view["status"]["remedies"])
    assert events(plane, "slow")["ReferenceKernels"]["count"] == 1
    assert "ReferenceKernels" not in events(plane, "native")
    assert plane.complete("slow").status_code == 200
    for name in ("native", "slow"):
        plane.delete(name)


def test_out_of_memory_twice_stalls_with_the_arithmetic(plane: Plane) -> None:
    plane.apply(model("fat", QUICK, EXIT=1, REASON="OutOfMemory"))
    stalled = plane.wait_stalled("fat")
    assert stalled["reason"] == "OutOfMemory"
    assert "planned were weights" in stalled["message"]
    assert "KV cache" in stalled["message"]
    assert plane.view("fat")["replicas"][0]["incarnation"] == 2, "two tries"
    plane.delete("fat")


def test_a_crash_loop_writes_few_events_and_its_back_off_outlives_the_control_plane(plane: Plane) -> None:
    plane.apply(model("loop", QUICK, EXIT=3, SAY="x" * 200))
    eventually(lambda: plane.view("loop")["replicas"][0]["incarnation"] >= 5, "it crashes again and again")
    told = plane.client.get("/v1/events", **{"for": "model/loop"})["items"]
    assert max(item["count"] for item in told if item["reason"] == "StandinRefuses") >= 3
    assert len(told) <= 6, [item["message"] for item in told]
    assert plane.state.replica_log("loop", "loop-r1-0").stat().st_size < 100_000
    assert len(list(plane.state.replica_dir("loop-r1-0").iterdir())) == 1, "one folder, however many crashes"

    plane.apply(model("loop", SLOW, EXIT=3))
    eventually(lambda: plane.view("loop")["replicas"][0]["state"] == "Backoff", "it waits for an hour")
    since, created = plane.view("loop")["replicas"][0]["since"], plane.view("loop")["createdAt"]
    waited = datetime.fromisoformat(since) - datetime.fromisoformat(created)
    assert waited.total_seconds() > 0.3, "since it waits, not since it was made"
    before = plane.view("loop")["replicas"][0]["incarnation"]
    time.sleep(0.5)
    before = plane.view("loop")["replicas"][0]["incarnation"]
    with closing(sqlite3.connect(plane.state.store)) as db:
        ((due,),) = db.execute("SELECT not_before FROM replicas WHERE model = 'loop'").fetchall()
    plane.kill()
    plane.start()
    time.sleep(1.0)
    assert plane.view("loop")["replicas"][0]["incarnation"] == before
    with closing(sqlite3.connect(plane.state.store)) as db:
        assert db.execute("SELECT not_before FROM replicas WHERE model = 'loop'").fetchall() == [(due,)]
    plane.delete("loop")


def test_with_its_shim_an_engine_dies_all_it_started_dies_and_one_replaces_it(plane: Plane) -> None:
    plane.apply(model("shimless", QUICK, CHILD=1, STEP="0.05"))
    view = plane.wait_served("shimless")["replicas"][0]
    engine = psutil.Process(view["pid"])
    shim = engine.parent()
    assert shim is not None
    (child,) = engine.children()
    streams = [Stream(plane.base_url, "shimless", 400) for _ in range(2)]
    for stream in streams:
        stream.wait_running()
    shim.kill()
    eventually(lambda: not alive(engine.pid) and not alive(child.pid), "no orphan")
    for stream in streams:
        stream.join(30)
        assert stream.problem is not None or '"error"' in stream.lines[-1]
        assert sum('"error"' in line for line in stream.lines) == 1
    view = eventually(
        lambda: (r := plane.view("shimless")["replicas"][0])["incarnation"] == 2 and r["state"] == "Ready" and r,
        "a second incarnation serves",
    )
    assert [event["count"] for reason, event in events(plane, "shimless").items() if reason == "Started"] == [2]
    assert carriers(plane) >= {view["pid"]}
    assert plane.complete("shimless").status_code == 200
    plane.delete("shimless")
    eventually(lambda: carriers(plane) == {plane.client.get("/v1/ping")["router"]["pid"]}, "no orphan")


def test_jumps_of_the_wall_clock_change_nothing(plane: Plane) -> None:
    plane.apply(model("timed", "  probes: {startup: {timeout: 20s}, liveness: {timeout: 5s}}\n", STEP="0.02"))
    before = plane.wait_served("timed")["replicas"][0]
    stream = Stream(plane.base_url, "timed", 150)
    stream.wait_running()
    try:
        for _ in range(times(1, 5)):
            for jump in (86400, -86400, 3600, -3600):
                plane.move_clock(jump)
                time.sleep(0.2)
                assert plane.condition("timed", "Ready")["status"] == "True"
                (event,) = [e for e in events(plane, "timed").values() if e["reason"] == "ReplicaReady"]
                assert event["count"] == 1
        assert plane.view("timed")["replicas"][0]["pid"] == before["pid"]
        plane.client.delete("/v1/objects/model/timed")
        eventually(lambda: plane.view("timed")["replicas"][0]["state"] == "Draining", "it drains")
        plane.move_clock(2 * 86400)
        time.sleep(0.5)
        stream.finish()  # the deadline of the drain is no nearer
        eventually(lambda: not plane.exists("timed"), "it is gone")

        plane.apply(model("timed", "  restartPolicy: {backoffBase: 1s}\n"))
        os.kill(plane.wait_served("timed")["replicas"][0]["pid"], signal.SIGKILL)
        eventually(lambda: plane.view("timed")["replicas"][0]["state"] == "Backoff", "it waits a second")
        text = events(plane, "timed")["ProcessEnded"]["message"]
        assert text == "timed-r1-0: ProcessEnded: killed by SIGKILL; it is started again after a pause"
        plane.move_clock(-30 * 86400)
        plane.kill()
        plane.start()
        eventually(lambda: plane.view("timed")["replicas"][0]["incarnation"] == 2, "and no month")
        plane.wait_served("timed")
    finally:
        plane.move_clock(0)
    plane.delete("timed")


def test_a_hundred_starts_and_stops_leave_nothing_behind(plane: Plane) -> None:
    assert plane.process is not None
    own = psutil.Process(plane.process.pid)
    running, stopped = model("often", "  replicas: 1\n"), model("often", "  replicas: 0\n")
    plane.apply(stopped)
    plane.wait_stopped("often")
    eventually((plane.state.runtime / "router.sock").exists, "the router has its sockets")
    files, descriptors, children = sorted(plane.state.runtime.rglob("*")), own.num_fds(), own.children()
    shared = set(Path("/dev/shm").iterdir())
    for _ in range(times(4, 100)):
        plane.apply(running)
        pid = plane.wait_served("often")["replicas"][0]["pid"]
        plane.apply(stopped)
        plane.wait_stopped("often")
        assert not alive(pid)
        eventually(
            lambda: not [p for p in own.children() if p.status() == psutil.STATUS_ZOMBIE],
            "every process is reaped",
            seconds=bound(1),
        )
    assert sorted(plane.state.runtime.rglob("*")) == files
    ours = {path for path in Path("/dev/shm").iterdir() if not path.name.startswith("PostgreSQL.")}
    assert ours <= shared, "a server that other tests use has its own"
    eventually(lambda: own.num_fds() <= descriptors, f"descriptors: {own.num_fds()}, not {descriptors}")
    assert own.children() == children
    plane.delete("often")


def test_r16_a_log_that_cannot_be_written_is_counted_and_nothing_else_notices(plane: Plane) -> None:
    plane.apply(model("chatty", CHATTY=1, STEP="0.01"))
    pid = plane.wait_served("chatty")["replicas"][0]["pid"]
    shim = psutil.Process(pid).parent()
    assert shim is not None
    log = plane.state.replica_log("chatty", "chatty-r1-0")
    for _ in range(times(1, 10)):
        lost = plane.view("chatty")["replicas"][0]["logLost"]
        stream = Stream(plane.base_url, "chatty", 150)
        stream.wait_running()
        _, most = resource.prlimit(shim.pid, resource.RLIMIT_FSIZE)
        resource.prlimit(shim.pid, resource.RLIMIT_FSIZE, (log.stat().st_size, most))  # the disk is full
        eventually(lambda: plane.view("chatty")["replicas"][0]["logLost"] > lost, "what is lost is counted")  # noqa: B023
        size = log.stat().st_size
        stream.finish()
        assert log.stat().st_size == size
        resource.prlimit(shim.pid, resource.RLIMIT_FSIZE, (most, most))  # and has room again
        eventually(lambda: b"bytes of this log were lost" in log.read_bytes()[size:], "the log tells of the gap")  # noqa: B023
    view = plane.view("chatty")["replicas"][0]
    assert (view["pid"], view["incarnation"]) == (pid, 1)
    gaps = [int(n) for n in re.findall(rb"shim: (\d+) bytes of this log were lost\n", log.read_bytes())]
    assert len(gaps) == times(1, 10)
    eventually(lambda: plane.view("chatty")["replicas"][0]["logLost"] == sum(gaps), "the counts agree")
    plane.delete("chatty")


@pytest.mark.nightly
def test_r31_a_control_plane_without_descriptors_waits_and_then_goes_on(plane: Plane) -> None:
    plane.apply(model("first", STEP="0.02"))
    plane.wait_served("first")
    assert plane.process is not None
    own = psutil.Process(plane.process.pid)
    before = resource.prlimit(own.pid, resource.RLIMIT_NOFILE)
    stream = Stream(plane.base_url, "first", 150)
    stream.wait_running()
    with ExitStack() as opened:
        for _ in range(50):
            link = opened.enter_context(socket.socket(socket.AF_UNIX))
            link.connect(str(plane.state.admin_socket))
            if not _:
                resource.prlimit(own.pid, resource.RLIMIT_NOFILE, (own.num_fds() + 1, before[1]))
        spent = -sum(own.cpu_times()[:2])
        time.sleep(times(1, 10))
        spent += sum(own.cpu_times()[:2])
        assert spent < 0.5 * times(1, 10), f"{spent:.2f} s of a processor"
        resource.prlimit(own.pid, resource.RLIMIT_NOFILE, before)
    stream.finish()
    eventually(lambda: plane.client.get("/v1/ping")["pid"] == own.pid, "it answers again")
    plane.apply(model("second"))
    plane.wait_served("second")
    assert plane.view("first")["replicas"][0]["incarnation"] == 1
    for name in ("first", "second"):
        plane.delete(name)


def test_everything_killed_at_once_comes_back_as_it_was_applied(plane: Plane) -> None:
    plane.apply(model("one", QUICK, CHILD=1), model("two", QUICK + "  replicas: 2\n"))
    for _ in range(times(1, 20)):
        plane.wait_served("one")
        plane.wait_served("two")
        assert plane.process is not None
        base_url = plane.base_url
        everything = sorted({*plane.ours(), *carriers(plane), plane.process.pid}, reverse=True)
        for pid in everything:
            os.kill(pid, signal.SIGKILL)
        plane.process.wait(15)
        assert list(plane.state.runtime.rglob("*.sock")), "their sockets lie there"
        plane.start()
        for name, count in (("one", 1), ("two", 2)):
            view = plane.wait_served(name)
            assert len(view["replicas"]) == count
            assert all(alive(replica["pid"]) for replica in view["replicas"])
            assert plane.complete(name).status_code == 200
        assert plane.base_url == base_url
        ids = [replica["id"] for name in ("one", "two") for replica in plane.view(name)["replicas"]]
        for replica in ids:
            told = [
                pid
                for pid in carriers(plane)
                if f"/{replica}\0".encode() in Path(f"/proc/{pid}/environ").read_bytes() + b"\0"
            ]
            assert len(told) == (2 if replica.startswith("one") else 1), "one process an id, and what it started"
    lost = plane.client.get("/v1/events", **{"for": "gateway/default"})["items"]
    assert any(event["reason"] == "RouterLost" for event in lost)


def test_sigterm_to_all_processes_ends_streams_with_a_word_and_leaves_no_process(plane: Plane) -> None:
    for _ in range(times(1, 20)):
        plane.apply(model("one", QUICK, STEP="0.05"))
        plane.wait_served("one")
        streams = [Stream(plane.base_url, "one", 400) for _ in range(3)]
        for stream in streams:
            stream.wait_running()
        for pid in plane.ours():
            os.kill(pid, signal.SIGTERM)
        for stream in streams:
            stream.join(60)
            assert "[DONE]" in stream.lines[-1] or '"error"' in stream.lines[-1], stream.lines[-1]
        assert plane.process is not None
        assert plane.process.wait(30) == 0
        eventually(lambda: plane.ours() == [], f"nothing runs: {plane.ours()}")
        assert not list(plane.state.runtime.rglob("*.sock")), "no socket is left"
        plane.start()
