"""A state folder that cannot be used, on real processes: what is said, the exit code, and that nothing is lost."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.integration.plane import GATEWAY, Plane, model
from tests.waiting import eventually

from quire.client import Refused

COMMAND = Path(sys.executable).parent / "platform"


@pytest.fixture
def plane(tmp_path: Path) -> Iterator[Plane]:
    plane = Plane(tmp_path)
    plane.start()
    plane.apply(GATEWAY, model("served"))
    plane.wait_served("served")
    yield plane
    plane.end()
    assert plane.ours() == []


def platform(state: Path, *args: str, before: str = "") -> subprocess.CompletedProcess[str]:
    """Run a command, after the shell commands `before` in a mount namespace of its own if there are any."""
    command = [str(COMMAND), *args]
    if before:
        command = ["unshare", "--mount", "sh", "-ec", f'{before}\nexec "$@"', "sh", *command]
        if os.geteuid() != 0:
            command.insert(1, "--map-root-user")
    environment = {**os.environ, "QUIRE_STATE_DIR": str(state)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


@pytest.fixture
def namespaces() -> None:
    probe = subprocess.run(["unshare", "--mount", "--map-root-user", "true"], capture_output=True)
    if probe.returncode != 0:
        pytest.skip("this machine does not let its users make mount namespaces")


def test_a_disk_that_fills_up_acknowledges_nothing_and_serving_goes_on(plane: Plane) -> None:
    assert plane.process is not None
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.prlimit(plane.process.pid, resource.RLIMIT_FSIZE, (0, hard))  # from here on no file can be written
    for _ in range(3):
        with pytest.raises(Refused) as refused:
            plane.apply(model("late"))
        assert (refused.value.status, refused.value.code, refused.value.exit_code) == (507, "store_unavailable", 7)
        assert "Nothing was stored" in refused.value.message
        assert "make room" in (refused.value.hint or "")
        assert plane.complete("served").status_code == 200
    with pytest.raises(Refused) as refused:
        plane.client.delete("/v1/objects/model/served")
    assert refused.value.status == 507
    assert not plane.exists("late")
    assert plane.view("served")["status"]["summary"] == "Serving", "what was stored can be read"
    resource.prlimit(plane.process.pid, resource.RLIMIT_FSIZE, (hard, hard))
    plane.apply(model("late"))  # the same process, nothing restarted
    plane.wait_served("late")
    plane.kill(signal.SIGKILL)
    plane.start()
    assert plane.wait_served("late")["generation"] == 1
    assert plane.wait_served("served")["generation"] == 1


def test_a_full_disk_at_the_start(tmp_path: Path) -> None:
    limit = "import resource, os; resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0));"
    script = f'{limit} os.execv("{COMMAND}", ["platform", "get"])'
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "QUIRE_STATE_DIR": str(tmp_path / "state")},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 7, done.stderr
    assert "error: the control plane failed to start: " in done.stderr
    assert "hint: make room where " in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.usefixtures("namespaces")
def test_a_full_file_system_is_said_in_two_lines(tmp_path: Path) -> None:
    state = tmp_path / "state"
    state.mkdir()
    done = platform(state, "get", before=f"mount -t tmpfs -o size=64k none {state}")
    assert done.returncode == 7, done.stderr
    error, hint = done.stderr.splitlines()
    assert error.startswith("error: the control plane failed to start: the store ")
    assert hint == f"hint: make room where {state} is, then try again"


@pytest.mark.parametrize("command", ["get", "down"])
def test_a_name_that_can_be_none_of_a_folder(tmp_path: Path, command: str) -> None:
    done = platform(tmp_path / ("x" * 300), command)
    assert done.returncode == 7, done.stderr
    assert "x can be no folder: File name too long\nhint: QUIRE_STATE_DIR chooses another one" in done.stderr


@pytest.mark.usefixtures("namespaces")
def test_a_read_only_state_folder(tmp_path: Path) -> None:
    state = tmp_path / "state"
    state.mkdir()
    done = platform(state, "get", before=f"mount -t tmpfs none {state}; mount -o remount,ro {state}")
    assert done.returncode == 7, done.stderr
    assert f"cannot make the state directory {state}: Read-only file system" in done.stderr
    assert "hint: QUIRE_STATE_DIR chooses another one" in done.stderr


@pytest.mark.usefixtures("namespaces")
def test_a_network_file_system_is_refused_for_the_store(tmp_path: Path) -> None:
    state = tmp_path / "state"
    table = f"server:/export {state} nfs4 rw 0 0"
    # A mount table as the kernel would have it, in the place where it would be.
    fake = f"mount -t tmpfs none /proc; mkdir /proc/self; echo '{table}' > /proc/self/mounts"
    done = platform(state, "get", before=fake)
    assert done.returncode == 7, done.stderr
    assert f"the state directory {state} is on a network filesystem (nfs4)" in done.stderr
    assert "hint: QUIRE_STATE_DIR must name a folder on a local disk" in done.stderr
    assert not (state / "state.db").exists()


def test_no_permission_on_the_state_folder(tmp_path: Path) -> None:
    state = tmp_path / "closed" / "state"
    state.mkdir(parents=True)
    if os.geteuid() == 0:
        os.chown(state, 12345, 12345)  # root may write anywhere, and must not use what is another's
    else:
        state.parent.chmod(0)
    try:
        done = platform(state, "get")
    finally:
        state.parent.chmod(0o700)
    assert done.returncode == 7, done.stderr
    assert "belongs to another user" in done.stderr or "Permission denied" in done.stderr
    assert "hint: QUIRE_STATE_DIR chooses another one" in done.stderr
    assert list(state.iterdir()) == [] or list(state.iterdir()) == [state / "logs"]
    eventually(lambda: not (state / "daemon.lock").exists(), "nothing was started")
