"""The fleet and `down` with real shims: what is found again, what a failed start leaves, what will not end."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from quire.controlplane import plane as planes
from quire.controlplane.errors import ApiError
from quire.controlplane.intents import Intents
from quire.controlplane.plane import ControlPlane
from quire.controlplane.views import Views
from quire_operators.database import Deposed
from quire_operators.fleet import local
from quire_operators.fleet.local import Life, LocalFleet, StartFailed, Unit
from quire_operators.lease import Lease, enter
from quire_operators.paths import StateDir

SLEEPER = [sys.executable, "-c", "import time; time.sleep(600)"]


@pytest.fixture
async def plane(tmp_path: Path) -> AsyncIterator[ControlPlane]:
    """A control plane that reconciles nothing; whatever a test leaves is ended."""
    state = StateDir(tmp_path / "state")
    state.create()
    plane = ControlPlane(state, {})
    yield plane
    if not plane.finished.is_set():
        plane.begin_down(0.1)
        async with asyncio.timeout(30):
            await plane.finished.wait()
    await plane.close()
    assert not state.runtime.exists()


def unit(state: StateDir, listen: tuple[str, int] | None = None) -> Unit:
    return Unit(
        folder=state.replica_dir("m-r1-0") / "1",
        name="m-r1-0",
        incarnation=1,
        nonce="n",
        argv=SLEEPER,
        env={"PATH": os.environ["PATH"]},
        cwd=state.root,
        log=state.replica_log("m", "m-r1-0"),
        labels={"model": "m", "memory": 5, "device": "cpu"},
        files={},
        listen=listen,
    )


async def test_a_start_that_failed_leaves_nothing_behind(plane: ControlPlane) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        told = unit(plane.state, taken.getsockname()[:2])
        with pytest.raises(StartFailed) as refused:
            await plane.fleet.start(told)
    assert refused.value.code == "address_in_use"
    assert not told.folder.exists()
    assert (await plane.fleet.start(unit(plane.state))).running, "the same name can be started at once"


async def test_a_start_that_is_given_up_is_known_all_the_same(plane: ControlPlane) -> None:
    """A `down` that comes while the router starts gives up the start and then stops what is known."""
    told = unit(plane.state)
    start = asyncio.create_task(plane.fleet.start(told))
    while not (told.folder / "shim.json").exists():
        await asyncio.sleep(0)
    start.cancel()
    assert isinstance((await asyncio.gather(start, return_exceptions=True))[0], asyncio.CancelledError)
    (seen,) = plane.fleet.observed(told.name)
    assert seen.life is Life.LIVE
    plane.begin_down(0.1)
    async with asyncio.timeout(30):
        await plane.finished.wait()


async def test_a_shim_whose_files_were_cleaned_away_is_found_by_what_it_answers(plane: ControlPlane) -> None:
    started = await plane.fleet.start(unit(plane.state))
    (started.folder / "shim.json").unlink()
    dead = plane.state.replica_dir("m-r1-1") / "1"
    dead.mkdir(parents=True)
    with socket.socket(socket.AF_UNIX) as nobody:
        nobody.bind(str(dead / "shim.sock"))
    (plane.state.replica_dir("m-r1-2") / "1").mkdir(parents=True)

    later = LocalFleet((plane.state.replicas,), plane.store.install_id, lambda name: None, time.monotonic)
    await later.open()
    (found,) = later.observed()
    assert (found.name, found.incarnation, found.nonce, found.life) == ("m-r1-0", 1, "n", Life.LIVE)
    assert found.labels == {"model": "m", "memory": 5, "device": "cpu"}
    assert found.child_pid == started.child_pid
    assert not dead.exists()
    await later.close()


async def test_a_shim_that_does_not_answer_is_unknown_and_gets_no_twin(
    plane: ControlPlane, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local, "ANSWER_SECONDS", 0.5)
    started = await plane.fleet.start(unit(plane.state))
    assert started.shim_pid is not None
    os.kill(started.shim_pid, signal.SIGSTOP)
    later = LocalFleet((plane.state.replicas,), plane.store.install_id, lambda name: None, time.monotonic)
    try:
        await later.open()
        (found,) = later.observed("m-r1-0")
        assert found.life is Life.UNKNOWN
        with pytest.raises(StartFailed, match="still lives"):
            await later.start(replace(unit(plane.state), incarnation=2, folder=found.folder.with_name("2")))
    finally:
        os.kill(started.shim_pid, signal.SIGCONT)
    async with asyncio.timeout(30):
        while later.observed("m-r1-0")[0].life is not Life.LIVE:
            await asyncio.sleep(0.02)
    assert later.observed("m-r1-0")[0].child_pid == started.child_pid
    await later.close()


async def test_what_carries_a_units_name_and_has_no_shim_is_killed_and_nobody_else_is(plane: ControlPlane) -> None:
    place = plane.state.replicas.parent.name
    ours, foreign = f"{plane.store.install_id}@{place}", f"{plane.store.install_id}@a-copy-of-the-store"

    async def carrier(name: str) -> asyncio.subprocess.Process:
        return await asyncio.create_subprocess_exec(*SLEEPER, env={"QUIRE_UNIT": name})

    left, other = await carrier(f"{ours}/m-r9-0"), await carrier(f"{foreign}/m-r9-0")
    beside = await carrier(f"{ours}/m-r1-0")
    started = await plane.fleet.start(unit(plane.state))
    assert await asyncio.wait_for(beside.wait(), 20) == -signal.SIGKILL, "a start has the name for itself"
    later = LocalFleet((plane.state.replicas,), plane.store.install_id, lambda name: None, time.monotonic)
    await later.open()
    assert await asyncio.wait_for(left.wait(), 20) == -signal.SIGKILL
    assert later.observed("m-r1-0")[0].child_pid == started.child_pid
    assert started.child_pid is not None
    os.kill(started.child_pid, 0)
    assert other.returncode is None
    other.kill()
    await other.wait()
    await later.close()


async def test_a_down_that_cannot_end_a_process_says_so_and_can_be_tried_again(
    plane: ControlPlane, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planes, "STOP_SECONDS", 0.3)
    started = await plane.fleet.start(unit(plane.state))
    assert started.shim_pid is not None
    os.kill(started.shim_pid, signal.SIGSTOP)
    try:
        await down(plane)
        assert f"still alive: m-r1-0 (process {started.child_pid})" == plane.down_failed
        assert not plane.finished.is_set(), "the control plane stays"
        assert plane.state.runtime.exists()
        with pytest.raises(ApiError) as refused:
            await Intents(plane, Views(plane)).apply({"files": []})
        assert "m-r1-0" in refused.value.body["error"]["message"]
    finally:
        os.kill(started.shim_pid, signal.SIGCONT)
    monkeypatch.undo()
    await down(plane)
    assert plane.finished.is_set()
    assert plane.down_failed is None


async def test_an_error_in_a_down_is_told(plane: ControlPlane, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise OSError("the disk is gone")

    monkeypatch.setattr(plane.store, "replicas", broken)
    await down(plane)
    assert plane.down_failed == "OSError: the disk is gone"
    assert not plane.finished.is_set()
    monkeypatch.undo()


async def down(plane: ControlPlane) -> None:
    """Begin a `down` and wait until it succeeded or failed."""
    plane.begin_down(0.1)
    async with asyncio.timeout(30):
        while not plane.finished.is_set() and plane.down_failed is None:
            await asyncio.sleep(0.02)


async def test_who_may_not_lead_starts_stops_and_kills_nothing(plane: ControlPlane) -> None:
    lease = Lease(epoch=7, until=None)
    fleet = LocalFleet(
        (plane.state.replicas, plane.state.gateway),
        plane.store.install_id,
        lambda name: None,
        time.monotonic,
        lease,
    )
    await fleet.open()
    started = await fleet.start(unit(plane.state))
    lease.until = 0.0  # it cannot be sure any more
    with pytest.raises(Deposed, match="cannot tell whether it still leads"):
        await fleet.stop(started.folder, 0.1)
    other = replace(unit(plane.state), name="m-r1-1", folder=plane.state.replica_dir("m-r1-1") / "1")
    with pytest.raises(Deposed):
        await fleet.start(other)
    assert not other.folder.exists()
    assert fleet.observed("m-r1-0")[0].running
    lease.until = None
    enter(plane.state.runtime / "epochs", 8)  # another one leads, and this one does not know
    with pytest.raises(StartFailed, match="another control plane leads"):
        await fleet.start(other)
    await fleet.stop(started.folder, 0.1)
    await asyncio.sleep(0.3)
    assert fleet.observed("m-r1-0")[0].running, "the shim knows better"
    await fleet.close()
