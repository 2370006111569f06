"""`platform console`: have the control plane show its page to a browser on this machine."""

from __future__ import annotations

import os
import time
import webbrowser
from pathlib import Path

import click

from quire.cli.outcome import ExitCode, usage_error
from quire.cli.session import connect, notice
from quire.client import Client

BROWSER_SECONDS = 20.0
"""How long a browser may take to come, before the file that leads it there is removed."""


@click.command(short_help="Show models, load and events in a browser, and a playground.")
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    help="Port on 127.0.0.1, 8400 if none is given; 0 is any free one.",
)
@click.option("--open", "opens", is_flag=True, help="Open the link in this machine's browser.")
@click.option("--stop", is_flag=True, help="Close the page and forget its links.")
def console(port: int | None, opens: bool, stop: bool) -> int:
    """Print a link to the console: models, replicas, rollouts, events, load, and a playground, in a browser.

    The control plane listens for it on 127.0.0.1, until --stop or until it ends. Whoever has the link can look,
    and ask models; nothing can be changed there."""
    if stop:
        if opens or port is not None:
            usage_error("--stop goes with no other option", "platform console --stop")
        client = connect(start=False)
        closed = client.is_running() and client.delete("/v1/console")["closed"]
        print("the console is closed" if closed else "the console was not open")
        return ExitCode.OK
    client = connect()
    url: str = client.post("/v1/console", {"port": port})["url"]
    print(url, flush=True)
    if opens:
        _show(client, url)
    return ExitCode.OK


def _show(client: Client, url: str) -> None:
    """Open a browser. The link goes by a file that only its user can read: the arguments of a process can be read
    by all."""
    path = client.state.runtime / "console.html"
    _write_private(path, f'<!doctype html><meta http-equiv="refresh" content="0;url={url}">\n')
    try:
        if not webbrowser.open(path.as_uri()):
            notice("there is no browser here that could be opened: open the link in one")
            return
        deadline = time.monotonic() + BROWSER_SECONDS
        while not client.get("/v1/console")["used"] and time.monotonic() < deadline:
            time.sleep(0.2)
    finally:
        path.unlink(missing_ok=True)


def _write_private(path: Path, text: str) -> None:
    path.unlink(missing_ok=True)
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "w") as file:
        file.write(text)
