"""Commands about the platform's own processes: down, version."""

from __future__ import annotations

import fcntl
import os
import socket
import time

import click

from quire.cli import render
from quire.cli.change import seconds
from quire.cli.outcome import CommandFailed, ExitCode
from quire.cli.session import connect, notice
from quire.client import Client, display
from quire_operators.paths import StateDir

EXTRA_SECONDS = 30.0
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
    """Stop everything on this machine: engines, router, control plane. What was applied is kept."""
    client = connect(start=False)
    if not client.is_running():
        if not _anything_lives(client.state):
            print("nothing is running")
            return ExitCode.OK
        # Engines and router outlive the control plane on purpose. A new one finds them again and stops them.
        notice("the control plane is gone, but its processes are not: starting it to stop them")
        client = connect()
    ping = client.get("/v1/ping")
    for view in client.get("/v1/objects", kind="model")["items"]:
        live = view["status"].get("replicas", {}).get("live", 0)
        print(f"{render.key_of(view)}  {render.count(live, 'replica')} stopping")
    router = ping.get("router") or {}
    if router.get("pid"):
        print(f"router  stopping (pid {router['pid']})")
    client.post("/v1/down", {"grace": grace})
    print(f"control plane  stopping (pid {ping['pid']})", flush=True)
    _wait_down(client, grace + EXTRA_SECONDS)
    print("down. What was applied is kept: the next platform command that needs it starts it again")
    return ExitCode.OK


def _anything_lives(state: StateDir) -> bool:
    """Whether a shim of this state directory answers: each holds an engine or the router."""
    for path in state.runtime.glob("**/shim.sock"):
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.settimeout(2.0)
            try:
                probe.connect(str(path))
            except (ConnectionRefusedError, FileNotFoundError):
                continue
            return True
    return False


def _wait_down(client: Client, timeout: float) -> None:
    """Return when the control plane has let go of its lock, which it holds for its whole life."""
    deadline = time.monotonic() + timeout
    lock = os.open(client.state.daemon_lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        while time.monotonic() < deadline:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                time.sleep(0.05)
                continue
            return
    finally:
        os.close(lock)
    raise CommandFailed(
        f"the control plane still runs after {timeout:g} s",
        f"see its log: {display(client.state.log('controlplane'))}",
        ExitCode.TIMED_OUT,
    )


@click.command()
def version() -> int:
    """Print the version of this command and of the control plane, if it runs."""
    import importlib.metadata

    own = importlib.metadata.version("quire")
    print(f"platform       {own}")
    client = connect(start=False)
    if not client.is_running():
        print("control plane  not running")
        return ExitCode.OK
    ping = client.get("/v1/ping")
    print(f"control plane  {ping['version']} (pid {ping['pid']}, state directory {ping['stateDir']})")
    if ping["version"] != own:
        notice(
            f"the control plane {ping['version']} is not this command's version {own}: platform down restarts it"
        )
    return ExitCode.OK
