"""The HTTP server of one worker: uvicorn's, on a socket that it was handed or binds itself, with an end in order.

The end: no new connection is taken, requests in flight may go on for the grace, and what then still runs ends with
an error (in a stream: its one error event). A client that does not take even that within `LAST_WORDS` is cut.

Workers that share a socket leave a connection to whoever has least to do (`Board`): the system would wake all of
them and give all connections of a quiet moment to the same one, and connections are long.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import math
import mmap
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from typing import Any, cast

import uvicorn
from litestar.types import ASGIApp

from quire.doors import Door, farewell, keep_quiet
from quire.errors import ServiceUnavailable, describe
from quire.router.config import LISTEN_FD, RouterConfig
from quire.router.fleet import Fleet
from quire.router.http import Protocol, State
from quire.router.memory import Memory
from quire.router.tls import Certificate

log = logging.getLogger("quire.router")
BACKLOG = 2048
SEND_BYTES = 128 * 1024
"""Of answers that the system keeps for a client that does not read, as much again for its own books; then the
connection's time to read on begins."""
LEAVE_SECONDS = 0.002
"""That a connection is left to another worker; then whoever comes first takes it."""
FULL_SECONDS = 1.0
"""That no connection is taken when there are too many open files."""
GARBAGE = 10_000
"""Objects that are made, and not gone, between two looks for cycles: a request makes hundreds."""
TURN_SECONDS = 0.001
"""That a thread computes before another one has its turn. While one does, the event loop waits so long behind each
of its system calls, of which every request has some."""
MAX_WORKERS = 64
_CROWDED = "The server has as many connections as it can hold."
HANDSHAKE_SECONDS = 2.0
"""That the end waits for handshakes of TLS which have begun."""
LAST_WORDS = 1.0
"""Seconds for clients to take the errors that their requests end with."""


class Board:
    """What each worker has to do, in memory that all have: each writes its own number, 0 where there is none."""

    def __init__(self, descriptor: int, index: int) -> None:
        self.descriptor = descriptor
        self._memory = mmap.mmap(descriptor, 8 * MAX_WORKERS)
        self._rows = memoryview(self._memory).cast("Q")
        self._index = index

    @classmethod
    def new(cls) -> Board:
        """That of a head."""
        descriptor = os.memfd_create("workers")
        os.ftruncate(descriptor, 8 * MAX_WORKERS)
        return cls(descriptor, 0)

    def tell(self, work: int) -> None:
        self._rows[self._index] = work + 1

    def leave(self, index: int | None = None) -> None:
        """The worker takes no connections any more; this one, unless another one is named."""
        self._rows[self._index if index is None else index] = 0

    @property
    def is_least(self) -> bool:
        """Whether no other worker has less to do."""
        mine = self._rows[self._index]
        return not any(0 < row < mine for row in self._rows)


class _Taker:
    """Takes connections from a socket that other workers take from, too, one at a time."""

    def __init__(
        self,
        listening: socket.socket,
        board: Board,
        make: Callable[[], asyncio.Protocol],
        tls: Any,
        patience: Callable[[], float],
    ) -> None:
        """`patience`: seconds that a client has for a handshake that begins now."""
        self._listening = listening
        self._board = board
        self._make = make
        self._tls = tls
        self._patience = patience
        self._loop = asyncio.get_running_loop()
        self._later: asyncio.TimerHandle | None = None
        self._taking: set[asyncio.Task[None]] = set()
        self._loop.add_reader(listening, self._offered)

    def stop(self) -> set[asyncio.Task[None]]:
        """Take none any more; those whose handshake goes on."""
        if self._later is not None:
            self._later.cancel()
        self._loop.remove_reader(self._listening)
        self._board.leave()
        return self._taking

    def _offered(self) -> None:
        if self._board.is_least:
            self._take()
        else:
            self._pause(LEAVE_SECONDS)

    def _pause(self, seconds: float) -> None:
        self._loop.remove_reader(self._listening)
        self._later = self._loop.call_later(seconds, self._again)

    def _again(self) -> None:
        self._later = None
        self._loop.add_reader(self._listening, self._offered)
        self._take()

    def _take(self) -> None:
        try:
            taken, _ = self._listening.accept()
        except (BlockingIOError, InterruptedError, ConnectionAbortedError):
            return  # another one has it, or it is gone
        except OSError:  # the door has said why
            if self._later is None:
                self._pause(FULL_SECONDS)
            return
        taken.setblocking(False)
        task = self._loop.create_task(self._serve(taken))
        self._taking.add(task)
        task.add_done_callback(self._taking.discard)

    async def _serve(self, taken: socket.socket) -> None:
        try:
            patience = self._patience() if self._tls is not None else None
            await self._loop.connect_accepted_socket(
                self._make, taken, ssl=self._tls, ssl_handshake_timeout=patience
            )
        except OSError as error:  # of TLS, mostly
            log.debug("a connection could not be begun: %r", error)


class Server(uvicorn.Server):
    """uvicorn without its signal handling, which would end the process by the signal instead of in order.

    The grace is counted here and not by uvicorn, which knows one number of whole seconds, set before it starts,
    and leaves as soon as it has cancelled the requests, before their last words are out.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        grace: float,
        begins: Callable[[], None],
        begins_to_end: Callable[[float], None],
        board: Board | None = None,
    ) -> None:
        """`begins` is called when requests are answered, `begins_to_end` with the grace. `board` is there where
        several workers have the socket, or connections begin with a handshake: uvicorn gives that a minute."""
        super().__init__(config)
        self.server_state: State = State()
        self._begins = begins
        self._begins_to_end = begins_to_end
        self._grace = grace
        self._board = board
        self._taker: _Taker | None = None
        self._ends_at = math.inf
        self._timers: list[asyncio.TimerHandle] = []

    def finish(self, grace: float) -> None:
        """Begin the end; said again, the shorter grace counts."""
        self.should_exit = True
        self._begins_to_end(grace)
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
        if self._board is None or not sockets:
            await super().startup(sockets)
        else:
            await super().startup([])
            self._taker = _Taker(sockets[0], self._board, self._protocol, self.config.ssl, self._patience)
            self._tell_work()
        self._begins()

    async def on_tick(self, counter: int) -> bool:
        self._tell_work()
        return await super().on_tick(counter)

    def _protocol(self) -> asyncio.Protocol:
        self._tell_work(1)
        return self.config.http_protocol_class(  # type: ignore[call-arg]
            config=self.config, server_state=self.server_state, app_state=self.lifespan.state
        )

    def _patience(self) -> float:
        return cast(type[Protocol], self.config.http_protocol_class).settings().head_seconds

    def _tell_work(self, more: int = 0) -> None:
        """A connection is some work to come, and a request that runs is some more."""
        if self._board is not None and self._taker is not None:
            state = self.server_state
            self._board.tell(len(state.connections) + len(state.tasks) + more)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        if not self._timers:  # by a signal
            self.finish(self._grace)
        coming: set[asyncio.Task[None]] = set()
        if self._taker is not None:
            coming = self._taker.stop()
            self._taker = None
        self.server_state.ending = True
        await super().shutdown(sockets)
        if coming:  # a connection that was taken brings its request
            await asyncio.wait(coming, timeout=HANDSHAKE_SECONDS)
            while (self.server_state.connections or self.server_state.tasks) and not self.is_over:
                await asyncio.sleep(0.05)
        for timer in self._timers:
            timer.cancel()

    @property
    def is_over(self) -> bool:
        """Whether the grace is over, and the last words are out."""
        return asyncio.get_running_loop().time() >= self._ends_at + LAST_WORDS

    @property
    def requests(self) -> int:
        """How many it has been given."""
        return self.server_state.total_requests

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def listening_socket(config: RouterConfig) -> socket.socket:
    """The socket handed down by the shim, or one of our own on `host` and `port`."""
    inherited = os.environ.pop(LISTEN_FD, None)
    if inherited is not None:
        taken = socket.socket(fileno=int(inherited))
        taken.set_inheritable(False)
        return taken
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    # asyncio sends small writes at once only on sockets that say which protocol they are of
    own = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    own.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    own.bind((config.host, config.port))
    own.listen(BACKLOG)
    return own


def base_url(listening: socket.socket, scheme: str) -> str:
    """Where clients on this machine reach the socket, without `/v1`."""
    host, port = listening.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 (a comparison, not a bind)
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


def options(application: ASGIApp, fleet: Fleet, certificate: Certificate | None) -> uvicorn.Config:
    """uvicorn's, loaded."""
    made = uvicorn.Config(
        application,
        http=Protocol.under(lambda: fleet.table.http),
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        backlog=BACKLOG,
    )
    made.load()
    gc.freeze()  # what is there now stays: looking through it would stop all streams for some tens of milliseconds
    gc.set_threshold(GARBAGE, *gc.get_threshold()[1:])
    gc.enable()
    sys.setswitchinterval(TURN_SECONDS)
    made.ssl = None if certificate is None else certificate.context
    return made


def prepare(listening: socket.socket, *, plain: bool) -> Door:
    """The socket as one for the server, on a loop that runs. `plain`: clients on it can be told that there is no
    room for them."""
    full = describe(ServiceUnavailable(_CROWDED, retry_after=1.0))
    door = Door.of(listening, farewell(full.status, full.headers, full.body) if plain else b"")
    asyncio.get_running_loop().set_exception_handler(keep_quiet)
    door.setblocking(False)
    door.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BYTES)  # connections have what it has
    return door


async def until_told(
    server: Server, listening: socket.socket, certificate: Certificate | None, memory: Memory
) -> None:
    """Serve until the end is begun, by a signal or otherwise, and is over, with an eye on memory."""
    watch = asyncio.create_task(memory.watch(), name="memory")
    renewal = None if certificate is None else asyncio.create_task(certificate.renew())
    try:
        await server.serve(sockets=[listening])
    finally:
        watch.cancel()
        if renewal is not None:
            renewal.cancel()


def heed(server: Server) -> None:
    """Have a signal begin the end of the server, also where it has not begun to serve."""

    def stop(*_: object) -> None:
        server.should_exit = True

    # Plain handlers, not the loop's, which end with it: a second SIGTERM must not be a sudden death.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)


def deaf() -> None:
    """Take no signal any more: the interpreter takes handlers away before it is gone."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
