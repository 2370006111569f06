"""`python -m quire.router CONFIG.json [--status-fd N]`: run a router until SIGTERM, or until it is told to finish.

The line {"event": "ready"} goes to the descriptor N when requests are answered: its shim waits longer each time
with a router that does not get there.

The end: no new connection is taken, requests in flight may go on for the grace, and what then still runs ends with
an error (in a stream: its one error event). A client that does not take even that within `LAST_WORDS` is cut.

Exit codes: 0 after SIGTERM, SIGINT or `wire.Finish`, 78 when the configuration is wrong (starting again is
pointless), 1 otherwise, also while the files of the certificate are no pair.
"""

# ruff: noqa: E402 - the search for garbage is off while modules are imported
from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import logging
import math
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

gc.disable()  # nothing of what is imported is garbage, and the search for it takes a tenth of the start

import uvicorn

from quire.doors import Door, farewell, keep_quiet, raise_limit
from quire.errors import ServiceUnavailable, describe
from quire.metering import Metering
from quire.router import config as configuration
from quire.router.access import Access
from quire.router.app import build
from quire.router.control import ControlServer
from quire.router.fleet import Fleet
from quire.router.guard import MAX_HEADER_BYTES, Protocol
from quire.router.tls import Certificate
from quire.tracing import BadTelemetry, Tracing, shut_down
from quire_operators.certificates import BadCertificate
from quire_schemas import signals

log = logging.getLogger("quire.router")
EX_CONFIG = 78
BACKLOG = 2048
SEND_BYTES = 128 * 1024
"""Of answers that the system keeps for a client that does not read, as much again for its own books; then the
connection's time to read on begins."""
_CROWDED = "The server has as many connections as it can hold."
LAST_WORDS = 1.0
"""Seconds for clients to take the errors that their requests end with."""


class _Server(uvicorn.Server):
    """uvicorn without its signal handling, which would end the process by the signal instead of in order.

    The grace is counted here and not by uvicorn, which knows one number of whole seconds, set before it starts,
    and leaves as soon as it has cancelled the requests, before their last words are out.
    """

    def __init__(
        self, config: uvicorn.Config, grace: float, status_fd: int | None, begins_to_end: Callable[[], None]
    ) -> None:
        super().__init__(config)
        self._begins_to_end = begins_to_end
        self._grace = grace
        self._status_fd = status_fd
        self._ends_at = math.inf
        self._timers: list[asyncio.TimerHandle] = []

    def finish(self, grace: float) -> None:
        """Begin the end; said again, the shorter grace counts."""
        self.should_exit = True
        self._begins_to_end()
        loop = asyncio.get_running_loop()
        ends_at = loop.time() + max(grace, 0.0)
        if ends_at >= self._ends_at:
            return
        self._ends_at = ends_at
        for timer in self._timers:
            timer.cancel()
        self._timers = [loop.call_at(ends_at, self._cancel), loop.call_at(ends_at + LAST_WORDS, self._cut)]

    def _cancel(self) -> None:
        for task in self.server_state.tasks:
            task.cancel()

    def _cut(self) -> None:
        for connection in list(self.server_state.connections):
            connection.transport.abort()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self._status_fd is not None:
            os.write(self._status_fd, b'{"event": "ready"}\n')

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        if not self._timers:  # by a signal
            self.finish(self._grace)
        await super().shutdown(sockets)
        for timer in self._timers:
            timer.cancel()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def listening_socket(config: configuration.RouterConfig) -> socket.socket:
    """The socket handed down by the shim, or one of our own on `host` and `port`."""
    inherited = os.environ.pop(configuration.LISTEN_FD, None)
    if inherited is not None:
        taken = socket.socket(fileno=int(inherited))
        taken.set_inheritable(False)
        return taken
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    own = socket.socket(family, socket.SOCK_STREAM)
    own.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    own.bind((config.host, config.port))
    own.listen(BACKLOG)
    return own


def base_url(listening: socket.socket, scheme: str) -> str:
    """Where clients on this machine reach the socket, without `/v1`."""
    host, port = listening.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 (a comparison, not a bind)
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


async def serve(
    config: configuration.RouterConfig,
    listening: socket.socket,
    tracing: Tracing,
    metering: Metering,
    status_fd: int | None,
) -> None:
    """Serve on `listening` until a signal, then let running requests finish within the grace."""
    full = describe(ServiceUnavailable(_CROWDED, retry_after=1.0))
    words = farewell(full.status, full.headers, full.body) if config.tls is None else b""
    listening = door = Door.of(listening, words)
    asyncio.get_running_loop().set_exception_handler(keep_quiet)
    listening.setblocking(False)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BYTES)  # connections have what it has
    fleet = Fleet(Path(config.snapshot_file), Access(config.closed))
    application, executor, usage = build(fleet, config, tracing, metering)
    await fleet.load_snapshot()
    options = uvicorn.Config(
        application,
        http=Protocol.under(lambda: fleet.table.http),
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        h11_max_incomplete_event_size=MAX_HEADER_BYTES,
        backlog=BACKLOG,
    )
    fleet.metrics.watch_room(lambda: door.refused, lambda: fleet.memory.share)
    certificate = None if config.tls is None else Certificate(config.tls)
    options.load()
    gc.freeze()  # what is there now stays: looking through it would stop all streams for some tens of milliseconds
    gc.enable()
    options.ssl = None if certificate is None else certificate.context
    server = _Server(options, config.shutdown_grace, status_fd, executor.drain)
    url = base_url(listening, "http" if config.tls is None else "https")
    control = ControlServer(fleet, Path(config.control_socket), url, server.finish, usage.report)

    def stop(*_: object) -> None:
        server.should_exit = True

    # Plain handlers, not the loop's, which end with it: a second SIGTERM must not be a sudden death.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    await control.open()
    log.info("router on %s, control on %s", url, config.control_socket)
    executor.start()
    watch = asyncio.create_task(fleet.memory.watch(), name="memory")
    renewal = None if certificate is None else asyncio.create_task(certificate.renew())
    try:
        await server.serve(sockets=[listening])
    finally:
        watch.cancel()
        if renewal is not None:
            renewal.cancel()
        await control.close()
        await executor.close()
        await fleet.close()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)  # the interpreter takes our handlers away before it is gone


def main(arguments: list[str]) -> int:
    """Run with the configuration file named in `arguments`."""
    parser = argparse.ArgumentParser(prog="python -m quire.router", description=__doc__)
    parser.add_argument("config", type=Path, metavar="CONFIG.json")
    parser.add_argument("--status-fd", type=int, metavar="N", help="open descriptor for the line that says ready")
    try:
        given = parser.parse_args(arguments)
    except SystemExit as end:
        return EX_CONFIG if end.code else 0
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr
    )
    # Each text is tokenized on the thread that asks: in the library's own pool a short one waits behind long ones.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        config = configuration.load(given.config)
        tracing = Tracing.set_up(signals.SERVICE_ROUTER, declared=config.telemetry)
        metering = Metering.set_up(signals.SERVICE_ROUTER, declared=config.telemetry)
    except (configuration.BadRouterConfig, BadTelemetry) as error:
        sys.stderr.write(f"error: {error}\n")
        return EX_CONFIG
    raise_limit()
    try:
        listening = listening_socket(config)
    except OSError as error:
        sys.stderr.write(
            f"error: cannot listen on {config.host}:{config.port}: {error.strerror}\n"
            "    hint: another process has the port; choose one in the Gateway's spec.port\n"
        )
        return 1
    try:
        asyncio.run(serve(config, listening, tracing, metering, given.status_fd))
    except BadCertificate as error:  # not EX_CONFIG: the files may be mended, and then another try does
        sys.stderr.write(f"error: {error}\n    hint: they are named in the Gateway's spec.tls\n")
        return 1
    finally:
        shut_down(tracing.provider, metering.provider)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
