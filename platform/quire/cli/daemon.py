"""Commands about the platform's own processes: down, up, version."""

from __future__ import annotations

import fcntl
import os
import shutil
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from quire.cli import render
from quire.cli.change import follow
from quire.cli.outcome import CommandFailed, ExitCode, interruptible, spelled
from quire.cli.session import connect, notice, seconds
from quire.client import Client, Unreachable, display, stands_by
from quire_operators.host import lock_holder
from quire_operators.paths import StateDir, check_private

EXTRA_SECONDS = 60.0
"""How much longer than the grace `down` waits: engines are killed after it, and the store is closed."""


@click.command()
@click.option(
    "--grace",
    metavar="DURATION",
    callback=seconds,
    default="30s",
    show_default=True,
    help="How long running requests may go on.",
)
def down(grace: float) -> int:
    """Stop everything on this machine.

    Engines, router and control plane end. What was applied is kept, and stays stopped until platform up or
    platform apply."""
    client = connect(start=False)
    ping = _answer(client)
    if ping is None:
        if not _living(client.state):
            if client.state.root.is_dir():
                try:
                    client.state.down_marker.touch(mode=0o600)
                except OSError as error:
                    notice(
                        f"cannot leave {client.state.down_marker} ({error.strerror}): the next command will start "
                        "what was applied"
                    )
            _remove_sockets(client.state)
            print("nothing is running")
            return ExitCode.OK
        # Engines and router outlive the control plane on purpose. A new one finds them again and stops them.
        notice("the control plane is gone, but its processes are not: starting it to stop them")
        client = connect(wakes=True)
        ping = client.get("/v1/ping")
    for view in [] if ping.get("down") else client.get("/v1/objects", kind="model")["items"]:
        live = view["status"].get("replicas", {}).get("live", 0)
        print(f"{render.key_of(view)}  {render.count(live, 'replica')} stopping")
    router = ping.get("router") or {}
    if router.get("pid"):
        print(f"router  stopping (pid {router['pid']})")
    with interruptible("detached: everything goes on stopping. Look again with: platform down"):
        client.post("/v1/down", {"grace": grace})
        print(f"control plane  stopping (pid {ping['pid']})", flush=True)
        _wait_down(connect(start=False), grace + EXTRA_SECONDS)
    if living := _living(client.state):
        raise CommandFailed(
            f"the control plane ended, and something still lives: {', '.join(map(str, living))}",
            "platform down starts it again to stop them",
            ExitCode.FAILED,
        )
    _remove_sockets(client.state)
    print(spelled("down. What was applied is kept: platform up starts it again, and so does platform apply"))
    return ExitCode.OK


def _answer(client: Client) -> dict[str, Any] | None:
    """What the control plane says of itself; None if there is none. One that has the lock and does not listen is
    about to do so, or is ending: it is waited for, unless it stands by, for that one looks for the mark of `down`.
    """
    state, began, told = client.state, time.monotonic(), False
    while True:
        try:
            return dict(client.get("/v1/ping"))
        except Unreachable:
            if client.is_running():
                raise
        holder = lock_holder(state.daemon_lock)
        if holder is None or stands_by(state):
            return None
        waited = time.monotonic() - began
        if waited > EXTRA_SECONDS:
            raise CommandFailed(
                f"process {holder} has {display(state.daemon_lock)} and has not answered for {EXTRA_SECONDS:g} s",
                f"see what it does, or the control plane's log: {display(state.log('controlplane'))}",
                ExitCode.TIMED_OUT,
            )
        if waited > 1.0 and not told:
            notice(f"waiting for process {holder}, which starts or ends")
            told = True
        time.sleep(0.05)


def _living(state: StateDir) -> list[Path]:
    """Control sockets of this state directory whose shim lives: each holds an engine or the router."""
    found = []
    for path in state.runtime.glob("**/shim.sock"):
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.settimeout(2.0)
            try:
                probe.connect(str(path))
            except (ConnectionRefusedError, FileNotFoundError):
                continue
            except TimeoutError:
                pass  # it listens and has no time to accept: that is alive
            found.append(path)
    return found


def _remove_sockets(state: StateDir) -> None:
    """Remove the folder of sockets that processes left which were killed, unless somebody is about to use it."""
    if not state.runtime.exists() or not state.root.exists():
        return
    check_private(state.runtime)
    with open(state.start_lock, "ab") as starting, open(state.daemon_lock, "ab") as running:
        try:
            for lock in (starting, running):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
        shutil.rmtree(state.runtime)


def _wait_down(client: Client, timeout: float) -> None:
    """Return when the control plane has let go of its lock, which it holds for its whole life. One that could not
    stop everything stays, and says so."""
    if wait_for_lock(client.state, time.monotonic() + timeout, lambda: _raise_failure(client)):
        return
    raise CommandFailed(
        f"the control plane still runs after {timeout:g} s",
        f"see its log: {display(client.state.log('controlplane'))}",
        ExitCode.TIMED_OUT,
    )


def wait_for_lock(state: StateDir, deadline: float, meanwhile: Callable[[], object] = lambda: None) -> bool:
    """Whether the lock that a control plane holds for its whole life comes free before `deadline`."""
    lock = os.open(state.daemon_lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        while time.monotonic() < deadline:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                meanwhile()
                time.sleep(0.05)
                continue
            return True
    finally:
        os.close(lock)
    return False


def _raise_failure(client: Client) -> None:
    """End the command if the control plane says that it could not stop everything."""
    try:
        failed = client.get("/v1/ping").get("downFailed")
    except Unreachable:
        return  # it is about to end
    if failed:
        raise CommandFailed(
            f"not everything could be stopped: {failed}",
            f"platform down tries again; the control plane's log: {display(client.state.log('controlplane'))}",
            ExitCode.FAILED,
        )


@click.command()
@click.option(
    "--wait/--no-wait", "waits", default=True, help="Wait until what was applied is served (the default)."
)
@click.option(
    "--timeout", metavar="DURATION", callback=seconds, default="30m", show_default=True, help="How long to wait."
)
def up(waits: bool, timeout: float) -> int:
    """Start again what was applied before platform down. What runs already stays as it is."""
    client = connect(wakes=True)
    with interruptible("detached: everything goes on starting. Follow with: platform get"):
        answer = client.post("/v1/up", {})
    if not answer["results"]:
        notice("nothing was applied yet: platform apply manifests/quickstart.yaml")
    return follow(client, answer, waits=waits, timeout=timeout)


@click.command()
def version() -> int:
    """Print the versions of this command and of the control plane."""
    import importlib.metadata

    own = importlib.metadata.version("quire")
    print(f"platform       {own}")
    client = connect(start=False)
    if not client.is_running():
        is_down = client.state.down_marker.exists()
        print("control plane  down: platform up starts it again" if is_down else "control plane  not running")
        return ExitCode.OK
    ping = client.get("/v1/ping")
    print(f"control plane  {ping['version']} (pid {ping['pid']}, state directory {ping['stateDir']})")
    if ping["version"] != own:
        notice(
            f"the control plane {ping['version']} is not this command's version {own}: platform down restarts it"
        )
    return ExitCode.OK
