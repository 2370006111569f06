"""`python -m quire.controlplane --state-dir DIR [--ready-fd N] [--standby]`: run one control plane until it is
told to end.

It leads for its whole life (`seat`). If another one does, it says so on stderr and leaves (exit 5), and says
nothing to N: whoever started it looks for the other one. One that stands by waits instead, with everything
loaded, until it may lead: when the other one has ended, or has not been heard of by their database for a while.
The admin socket is that of whoever leads: it takes the place of a stale one at one blow. `ready <version>` goes
to the descriptor N once the API listens; before that, what went wrong in words. SIGTERM and SIGINT end the
control plane alone; router and engines go on.

One that finds that another one leads by now stops working, and closes, without changing anything; one that stands
by waits again.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import logging
import logging.handlers
import os
import signal
import socket
import sys
from pathlib import Path

import uvicorn

from quire import builtin
from quire.client import HELD
from quire.controlplane.app import create_app
from quire.controlplane.errors import crowded
from quire.controlplane.plane import ControlPlane
from quire.controlplane.seat import Seat
from quire.doors import Door, farewell, keep_quiet, raise_limit
from quire.serving import Server
from quire.tracing import BadTelemetry, Tracing
from quire_operators.host import lock_holder
from quire_operators.lease import Lease
from quire_operators.paths import StateDir, StateDirError
from quire_operators.sqlite import StoreError, StoreUnavailable
from quire_schemas import signals

log = logging.getLogger("quire.controlplane")

LOG_BYTES = 16 * 1024 * 1024
LOG_KEEP = 3
BACKLOG = 128


class NotKept(Exception):
    """The lease cannot be kept, and nobody else is known to have it: what runs goes on, and nobody looks after
    it."""

    def __init__(self, cause: BaseException) -> None:
        super().__init__(f"the lease cannot be renewed: {getattr(cause, 'message', None) or repr(cause)}")
        self.hint = getattr(cause, "hint", "") or "its log in the state directory has more"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m quire.controlplane", description=__doc__)
    parser.add_argument("--state-dir", type=Path, required=True)
    parser.add_argument("--ready-fd", type=int)
    parser.add_argument("--standby", action="store_true")
    arguments = parser.parse_args()
    if arguments.ready_fd is not None:
        os.set_inheritable(arguments.ready_fd, False)
    state = StateDir(arguments.state_dir)
    try:
        state.create()
        seat = Seat(state, os.environ)
    except (StateDirError, StoreError, OSError) as error:
        return _fail(arguments.ready_fd, error)
    try:
        lease = seat.take()
    except (StoreError, OSError) as error:
        if not (arguments.standby and isinstance(error, StoreUnavailable)):
            return _fail(arguments.ready_fd, error)
        lease = None
    if lease is None and not arguments.standby:
        holder = lock_holder(state.daemon_lock)
        who = f" (process {holder})" if holder is not None else ""
        sys.stderr.write(
            f"error: another control plane{who} has the state directory {state.root}\n"
            "hint: platform version shows it; QUIRE_STATE_DIR chooses another state directory\n"
        )
        return HELD
    if lease is None:
        sys.stderr.write(f"another control plane leads on {state.root}; standing by\n")
        sys.stderr.flush()
    _log_to(state.log("controlplane"))
    try:
        tracing = Tracing.set_up(signals.SERVICE_CONTROL_PLANE)
    except BadTelemetry as error:
        return _fail(arguments.ready_fd, error)
    raise_limit()
    try:
        return asyncio.run(_run(state, seat, lease, arguments.ready_fd, tracing, standby=arguments.standby))
    except (StateDirError, StoreError) as error:  # its sentence says it all, to the one who waits and in the log
        return _fail(arguments.ready_fd, error)
    except NotKept as error:
        log.error("%s", error, exc_info=error.__cause__)
        return _fail(None, error)
    except OSError as error:
        log.exception("cannot run")
        return _fail(arguments.ready_fd, error)
    finally:
        tracing.shutdown()  # and the lock goes with the process: whoever waits for it waits for the end of that


def _fail(ready_fd: int | None, error: Exception) -> int:
    """Say why nothing runs, to whoever waits for it."""
    message, hint = getattr(error, "message", str(error)), getattr(error, "hint", "")
    text = f"{message}\nhint: {hint}\n" if hint else f"{message}\n"
    if ready_fd is not None:
        with contextlib.suppress(BrokenPipeError):  # nobody waits any more
            os.write(ready_fd, text.encode())
    with contextlib.suppress(OSError):  # it is a log file, and the disk may be what is wrong
        sys.stderr.write(text)
        sys.stderr.flush()
    return 1


def _log_to(path: Path) -> None:
    handler = logging.handlers.RotatingFileHandler(path, maxBytes=LOG_BYTES, backupCount=LOG_KEEP)
    os.chmod(path, 0o600)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])


def _listen(path: Path) -> socket.socket:
    """Bind the admin socket, mode 0600, in place of what lies there: the caller leads, so that is stale, or is
    one of somebody who was deposed."""
    making = path.with_name(f"{path.name}.{os.getpid()}")
    making.unlink(missing_ok=True)
    server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    mask = os.umask(0o177)
    try:
        server.bind(str(making))
    finally:
        os.umask(mask)
    server.listen(BACKLOG)  # before it has its name, so that nobody is refused
    making.replace(path)
    return server


def _farewell() -> bytes:
    """What a command is told for which no descriptor is free."""
    error = crowded()
    body = json.dumps(error.body).encode()
    headers = ((b"content-type", b"application/json"), (b"content-length", b"%d" % len(body)))
    return farewell(error.status, headers, body)


async def _run(
    state: StateDir, seat: Seat, lease: Lease | None, ready_fd: int | None, tracing: Tracing, *, standby: bool
) -> int:
    """Lead until told to end; one that stands by, whenever it may."""
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(keep_quiet)
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, ended.set)
    while True:
        if lease is None:
            log.info("standing by, pid %d", os.getpid())
            lease = await seat.wait(ended)
        if lease is None:
            return 0
        if await _lead(state, seat, lease, ready_fd, tracing, ended):
            return 0
        if not standby:
            sys.stderr.write("error: another control plane leads by now\n")
            return HELD
        seat.unlock()
        lease, ready_fd = None, None


async def _lead(
    state: StateDir, seat: Seat, lease: Lease, ready_fd: int | None, tracing: Tracing, ended: asyncio.Event
) -> bool:
    """Be the control plane; False when another one is by now, True at any other end. Raises `NotKept`."""
    seat.settle()
    lost = asyncio.Event()
    lease.on_lost = lost.set
    plane = ControlPlane(state, {"tiny": builtin.path("tiny")}, tracing=tracing, place=seat.place, lease=lease)
    keeping = asyncio.create_task(seat.keep(lease, plane.hear_of_others), name="lease")
    try:
        state.create()  # a `down` that another one carried out removed the folder of sockets
        server_socket = Door.of(_listen(state.admin_socket), _farewell())
        own_socket = os.stat(state.admin_socket).st_ino
        app = create_app(plane)
        config = uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            lifespan="off",
            timeout_graceful_shutdown=2,
            ws="none",
        )
        server = Server(config)
        await plane.open()
        serving = asyncio.create_task(server.serve(sockets=[server_socket]), name="admin API")
        while not server.started and not serving.done():
            await asyncio.sleep(0.005)
        log.info(
            "control plane %s, pid %d, epoch %d, state directory %s, store %s",
            plane.version, os.getpid(), lease.epoch, state.root, plane.store.place,
        )  # fmt: skip
        if ready_fd is not None:
            with contextlib.suppress(BrokenPipeError):  # the starter gave up waiting; others may still come
                os.write(ready_fd, f"ready {plane.version}\n".encode())
            os.close(ready_fd)
        waits = [asyncio.create_task(event.wait()) for event in (ended, plane.finished, lost)]
        await asyncio.wait([*waits, serving, keeping], return_when=asyncio.FIRST_COMPLETED)
        failure = keeping.exception() if keeping.done() else None
        for task in waits:
            task.cancel()
        await plane.stop_working()  # first, or what ends by the same signal would be replaced
        await app.state.console.close()
        server.should_exit = True
        await serving
        await plane.close()
        with contextlib.suppress(FileNotFoundError):  # `down` removed the folder already
            if os.stat(state.admin_socket).st_ino == own_socket:
                os.unlink(state.admin_socket)
        if failure is not None:
            raise NotKept(failure) from failure
    finally:
        keeping.cancel()
        await asyncio.gather(keeping, return_exceptions=True)
        seat.give_up(lease)
    log.info("control plane ended" if not lease.lost else "control plane stood down")
    return not lease.lost


if __name__ == "__main__":
    sys.exit(main())
