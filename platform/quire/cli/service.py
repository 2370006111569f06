"""`platform daemon`: the control plane alone, without the engines and the router, which go on without it."""

from __future__ import annotations

import os
import select
import signal
import sys
import time
from pathlib import Path

import click

from quire.cli.outcome import CommandFailed, ExitCode, program
from quire.cli.session import connect, notice
from quire.client import Client, Unreachable, stands_by
from quire_operators.paths import StateDir

STOP_SECONDS = 30.0
UNIT = """\
# The control plane as a service of systemd. For one user:
#   platform daemon unit > ~/.config/systemd/user/quire.service
#   systemctl --user daemon-reload && systemctl --user enable --now quire
[Unit]
Description=Quire control plane
After=network.target

[Service]
Type=exec
Environment="QUIRE_STATE_DIR={state}"
ExecStart="{command}" daemon run
Restart=always
RestartSec=1
# The engines and the router are in this unit's control group. A restart of the control plane ends none of them;
# what is to be stopped is stopped by: platform down
KillMode=process
Delegate=yes
TimeoutStopSec={stop:.0f}

[Install]
WantedBy=default.target
"""


@click.group(short_help="Start, stop and restart the control plane alone.")
def daemon() -> None:
    """The control plane alone. Whatever happens to it, what is served goes on being served; platform down stops
    that."""


@daemon.command()
def start() -> int:
    """Start the control plane if it does not run. Commands that need it do so by themselves."""
    return _told(connect(wakes=True))


@daemon.command()
def stop() -> int:
    """End the control plane. Engines and router go on; the next command that needs it starts it again."""
    client = connect(start=False)
    if not client.is_running():
        print("the control plane does not run")
        return ExitCode.OK
    if client.get("/v1/ping").get("supervisor"):
        raise CommandFailed(
            "systemd runs the control plane, and would start it again",
            "systemctl stop its unit (--user for one of your own); what is served goes on",
            ExitCode.CONFLICT,
        )
    waits = stands_by(client.state)
    served = _end(client)
    if waits:
        print("the control plane ended, and one that stood by takes over; platform down stops everything")
        return ExitCode.OK
    print(f"the control plane ended; what is served goes on: {served}. To stop that: {program()} down")
    return ExitCode.OK


@daemon.command()
def restart() -> int:
    """End the control plane and start it anew, as after an upgrade. Nothing that is served notices.

    One that systemd runs is started again by systemd."""
    client = connect(start=False)
    if client.is_running():
        supervised = client.get("/v1/ping").get("supervisor")
        _end(client)
        if supervised:
            _wait_for_supervisor(client)
    return _told(connect(wakes=True))


@daemon.command()
def status() -> int:
    """Tell whether the control plane runs; exits with 7 if it does not."""
    client = connect(start=False)
    if not client.is_running():
        raise CommandFailed("the control plane does not run", "platform daemon start", ExitCode.UNREACHABLE)
    return _told(client)


@daemon.command()
def run() -> int:
    """Be the control plane, in the foreground, until SIGTERM: for systemd, containers and other supervisors.

    While another one leads on the same state directory, it stands by and takes over when that one ends; with the
    store on PostgreSQL also when that one has not been heard of for ten seconds."""
    words = [sys.executable, "-P", "-m", "quire.controlplane", "--standby"]
    words += ["--state-dir", str(StateDir.default().root)]
    sys.stdout.flush()
    os.execv(sys.executable, words)  # noqa: S606 - our own interpreter, and words of ours


@daemon.command()
def unit() -> int:
    """Print a unit of systemd that runs the control plane of this state directory."""
    words = {"state": StateDir.default().root, "command": Path(sys.argv[0]).absolute()}
    escaped = {name: str(word).replace("%", "%%") for name, word in words.items()}
    print(UNIT.format(**escaped, stop=STOP_SECONDS), end="")
    return ExitCode.OK


def _wait_for_supervisor(client: Client) -> None:
    """Until the control plane that ended is there again."""
    deadline = time.monotonic() + STOP_SECONDS
    while not client.is_running():
        if time.monotonic() > deadline:
            raise CommandFailed(
                f"systemd has not started the control plane again within {STOP_SECONDS:g} s",
                "systemctl status quire, with --user if it is your own",
                ExitCode.TIMED_OUT,
            )
        time.sleep(0.1)


def _told(client: Client) -> int:
    ping = client.get("/v1/ping")
    print(f"control plane  {ping['version']} (pid {ping['pid']}, state directory {ping['stateDir']})")
    return ExitCode.OK


def _end(client: Client) -> str:
    """End the control plane that answers, and wait until its lock is free; what it says that is served."""
    ping = client.get("/v1/ping")
    models = [] if ping.get("down") else client.get("/v1/objects", kind="model")["items"]
    served = (
        ", ".join(view["name"] for view in models if view["status"].get("replicas", {}).get("live")) or "nothing"
    )
    try:
        process = os.pidfd_open(ping["pid"])
    except ProcessLookupError:
        return served
    try:
        try:
            if client.get("/v1/ping")["pid"] == ping["pid"]:  # so the descriptor is of the process that answered
                signal.pidfd_send_signal(process, signal.SIGTERM)
        except (Unreachable, ProcessLookupError):
            pass  # it ended by itself
        ends = select.poll()
        ends.register(process, select.POLLIN)
        left = bool(ends.poll(STOP_SECONDS * 1000))
    finally:
        os.close(process)
    if not left:
        raise CommandFailed(
            f"the control plane (pid {ping['pid']}) still runs after {STOP_SECONDS:g} s",
            "platform logs controlplane",
            ExitCode.TIMED_OUT,
        )
    notice(f"control plane  ended (pid {ping['pid']})")
    return served
