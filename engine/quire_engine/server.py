"""The engine as a process: a Unix socket for requests, a descriptor for its own life, signals to end it.

The event loop only moves frames; steps are the driver's thread. Each connection opens with `Hello`, gets
`Welcome`, and then one `Deltas` frame for each step that gave any of its requests something. Requests are numbered
here, so that two connections may use the same ids and an id may be used again as soon as its request has ended or
was aborted: nothing that the driver still has to say about the old one reaches the new one.

Who may speak: the socket has mode 0600 in a folder of mode 0700, and the kernel must name our own user as the
peer (`wire.is_same_user`). A connection that breaks the protocol, goes away, or leaves more than `MAX_UNREAD`
bytes unread is cut, and its requests are aborted.

The process ends with 0 on SIGTERM or SIGINT (live requests get an error delta, `engine_shutdown`), with 0 also
when nobody reads the status descriptor any more, and when its lease has run out (`lease`) and nothing is left to
compute, with 78 when the spec cannot give an engine, with 1 otherwise.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import signal
import socket
import stat
import time
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from quire_engine.driver import Died, Driver, Loaded, Output
from quire_engine.errors import InvalidSpec, SocketTaken, StartError, is_out_of_memory
from quire_engine.lease import Lease
from quire_schemas.checkpoint_files import CheckpointError
from quire_schemas.wire import (
    PROTOCOL,
    Abort,
    Delta,
    Deltas,
    EngineEvent,
    EngineSpec,
    Generate,
    GetStats,
    Hello,
    Limits,
    Reader,
    ToEngine,
    Welcome,
    WireError,
    frame,
    is_same_user,
    joined,
)

log = logging.getLogger(__name__)

OUT_OF_MEMORY = "OutOfMemory"
"""Reason of a `failed` event that the control plane answers with patience, and in the end with advice."""
LEASE_ENDED = "LeaseEnded"
"""Reason of a `failed` event that a control plane finds when it comes back."""
EXIT_POINTLESS = 78
"""Trying again with the same spec would fail again (EX_CONFIG of sysexits.h)."""
MAX_UNREAD = 16 * 1024 * 1024
"""Bytes that a connection may leave unread."""
HELLO_PATIENCE = 5.0
"""Seconds that a new connection has for its first frame."""
STOP_PATIENCE = 2.0
"""Seconds for readers to take their last frames and for the step that is being computed."""
PROGRESS_INTERVAL = 0.5
"""Seconds between two `loading` events."""
DRAIN_LOOK = 0.1
"""Seconds between two looks at whether the last request of an engine without a lease has ended."""


class Status:
    """The descriptor to whoever started us: one `EngineEvent` a line."""

    def __init__(self, descriptor: int | None) -> None:
        self.descriptor = -1 if descriptor is None else descriptor
        self.is_watched = False
        """Whether the other end can go away."""
        if descriptor is not None:
            os.set_inheritable(descriptor, False)
            mode = os.fstat(descriptor).st_mode
            self.is_watched = stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode)

    def emit(self, event: EngineEvent, *, logged: bool = True) -> None:
        """Write one line. Raises `BrokenPipeError` when nobody reads any more."""
        line = msgspec.json.encode(event) + b"\n"
        if logged:
            log.info("%s", line.decode().rstrip())
        if self.descriptor >= 0:
            os.write(self.descriptor, line)

    def failed(self, error: BaseException) -> int:
        """Tell why the process ends; returns its exit code."""
        pointless = isinstance(error, StartError | CheckpointError)
        if is_out_of_memory(error):
            reason = OUT_OF_MEMORY
        else:
            reason = error.reason if isinstance(error, StartError) else type(error).__name__
        with contextlib.suppress(BrokenPipeError):  # we end anyhow
            self.emit(
                EngineEvent("failed", time.time(), reason=reason, message=str(error), retryable=not pointless)
            )
        return EXIT_POINTLESS if pointless else 1


@dataclass(slots=True, eq=False)
class Connection:
    """One client. `live` leads from its ids to our numbers."""

    writer: asyncio.StreamWriter
    live: dict[str, str] = field(default_factory=dict)

    def send(self, message: msgspec.Struct) -> None:
        """Queue one frame; a client that does not read is cut, which its reader then notices."""
        transport = self.writer.transport
        if transport.is_closing():
            return
        self.writer.write(frame(message))
        if transport.get_write_buffer_size() > MAX_UNREAD:
            log.warning("a client left more than %d bytes unread; its connection is cut", MAX_UNREAD)
            transport.abort()


@dataclass(slots=True)
class _Route:
    """Where the deltas of one of our numbers go."""

    connection: Connection
    request_id: str
    trace: str | None
    """The client's traceparent, shown in the log with a request that fails."""
    patience: float
    """Seconds that news behind the first token may wait."""
    waiting: list[Delta] = field(default_factory=list)
    told_at: float | None = None
    """When it was told of tokens last."""

    def tell(self, delta: Delta, now: float) -> Delta | None:
        """What is to be told now that there is this; None when it can wait for what follows."""
        self.waiting.append(delta)
        if delta.finish_reason is None and self.told_at is not None and now < self.told_at + self.patience:
            return None
        if delta.token_ids:
            self.told_at = now
        told, self.waiting = self.waiting, []
        return joined(told)


class Server:
    """One engine process from its spec to its exit code. To be made inside a running event loop."""

    def __init__(self, spec: EngineSpec, status: Status) -> None:
        self._spec = spec
        self._status = status
        self._loop = asyncio.get_running_loop()
        self._driver = Driver(spec, self._from_driver)
        self._loaded: asyncio.Future[Loaded] = self._loop.create_future()
        self._end: asyncio.Future[int] = self._loop.create_future()
        self._connections: set[Connection] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._routes: dict[str, _Route] = {}
        self._numbers = itertools.count(1)
        self._step = 0
        self._lease = Lease(spec.adoption_window, self._loop.time)

    async def run(self) -> int:
        """Load, listen, serve; returns the exit code once the socket is gone."""
        for number in (signal.SIGTERM, signal.SIGINT):
            self._loop.add_signal_handler(number, self._finish, 0)
        if self._status.is_watched:
            # when the other end of a pipe or socket closes, the poller reports ours as if it could be read
            self._loop.add_reader(self._status.descriptor, self._finish, 0)
        path = Path(self._spec.socket)
        try:
            self._status.emit(EngineEvent("starting", time.time()))
            prepare_socket(path)
            await self._load()
            if not self._end.done():
                await self._serve(path)
            return await self._end
        except BrokenPipeError:
            return 0
        except (StartError, SocketTaken) as error:
            return self._status.failed(error)

    def _finish(self, code: int) -> None:
        """Begin the end of the process; the first cause decides the exit code."""
        if self._status.is_watched:
            self._loop.remove_reader(self._status.descriptor)
        if not self._end.done():
            self._end.set_result(code)

    # ── start ─────────────────────────────────────────────────────────────────────────────────────────

    async def _load(self) -> None:
        """Wait for the driver to load, and report bytes meanwhile."""
        self._driver.start()
        first = True
        while True:
            self._status.emit(self._loading(), logged=first)
            first = False
            done, _ = await asyncio.wait(
                (self._loaded, self._end), timeout=PROGRESS_INTERVAL, return_when=asyncio.FIRST_COMPLETED
            )
            if self._end.done():
                return
            if done:
                self._status.emit(self._loading())
                return

    def _loading(self) -> EngineEvent:
        done, total = self._driver.progress
        return EngineEvent("loading", time.time(), bytes_done=done, bytes_total=total)

    async def _serve(self, path: Path) -> None:
        """Listen until the end is decided, then say good-bye to everybody."""
        server = await asyncio.start_unix_server(self._accept, path)
        try:
            path.chmod(0o600)
            loaded = self._loaded.result()
            self._status.emit(
                EngineEvent(
                    "ready",
                    time.time(),
                    load_seconds=loaded.seconds,
                    backend=loaded.backend,
                    backend_lacking=loaded.backend_lacking,
                    batch_invariant=loaded.batch_invariant,
                )
            )
            self._lease.heard()  # whoever started us has waited for this
            keeping = asyncio.create_task(self._keep_lease())
            try:
                await asyncio.wait((self._end, keeping), return_when=asyncio.FIRST_COMPLETED)
                if keeping.done():
                    keeping.result()
            finally:
                keeping.cancel()
        finally:
            server.close()
            path.unlink(missing_ok=True)
            await self._part("engine_shutdown" if self._end.done() and not self._end.result() else "engine_died")

    async def _keep_lease(self) -> None:
        """Return, with the end begun, once nobody is above us and nothing is computed any more."""
        while True:
            await self._lease.run_out()
            if not self._routes:
                break
            await asyncio.sleep(DRAIN_LOOK)
        text = f"neither a router nor a control plane has spoken for {self._lease.window:g} seconds"
        with contextlib.suppress(BrokenPipeError):  # the shim, too, is gone
            self._status.emit(EngineEvent("failed", time.time(), reason=LEASE_ENDED, message=text))
        self._finish(0)

    async def _part(self, code: str) -> None:
        """End every live request with an error, let readers take it, close."""
        ended: dict[Connection, list[Delta]] = {}
        now = self._loop.time()
        for route in self._routes.values():
            end = Delta(route.request_id, finish_reason="error", error_code=code, error="the engine has stopped")
            if (told := route.tell(end, now)) is not None:
                ended.setdefault(route.connection, []).append(told)
        self._routes.clear()
        for connection, deltas in ended.items():
            connection.send(Deltas(self._step, deltas))
        for connection in self._connections:
            connection.writer.close()
        if self._tasks:
            _, late = await asyncio.wait(self._tasks, timeout=STOP_PATIENCE)
            for connection in self._connections:
                connection.writer.transport.abort()
            for task in late:
                task.cancel()

    def stop_driver(self) -> bool:
        """End the driver's thread; False if it is stuck in a step or a load."""
        return self._driver.stop(STOP_PATIENCE)

    # ── from the driver ───────────────────────────────────────────────────────────────────────────────

    def _from_driver(self, news: Loaded | Output | Died) -> None:
        """In the driver's thread: hand over to the loop."""
        self._loop.call_soon_threadsafe(self._hear, news)

    def _hear(self, news: Loaded | Output | Died) -> None:
        match news:
            case Output():
                self._deliver(news)
            case Loaded():
                self._loaded.set_result(news)
            case Died(error):
                log.error("the engine has died", exc_info=error)
                self._finish(self._status.failed(error))

    def _deliver(self, output: Output) -> None:
        """One frame for each connection that gets anything; deltas of requests that left are dropped."""
        self._step = output.step
        shares: dict[Connection, list[Delta]] = {}
        now = self._loop.time()
        for each in output.deltas:
            route = self._routes.get(each.id)
            delta = route.tell(each, now) if route is not None else None
            if route is None or delta is None:
                continue
            if delta.finish_reason is not None:
                del self._routes[delta.id], route.connection.live[route.request_id]
            delta.id = route.request_id
            if delta.error_code is not None:
                why = delta.error if delta.error_code != "invalid_grammar" else "what it says is the client's"
                words = (delta.id, delta.error_code, why, route.trace or "no trace")
                log.warning("request %s ended: %s: %s (%s)", *words)
            shares.setdefault(route.connection, []).append(delta)
        for connection, deltas in shares.items():
            connection.send(Deltas(output.step, deltas))
        if output.stats is not None:
            for connection in self._connections:
                connection.send(output.stats)

    # ── from clients ──────────────────────────────────────────────────────────────────────────────────

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = Connection(writer)
        task = asyncio.current_task()
        if task is not None:
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        try:
            if is_same_user(writer.get_extra_info("socket")):
                await self._converse(connection, Reader(reader, ToEngine))
            else:
                log.warning("a process of another user connected; refused")
        except (WireError, asyncio.IncompleteReadError, ConnectionError, TimeoutError) as error:
            log.warning("a connection was cut: %s: %s", type(error).__name__, error)
        finally:
            self._forget(connection)
            writer.close()

    async def _converse(self, connection: Connection, messages: Reader[ToEngine]) -> None:
        async with asyncio.timeout(HELLO_PATIENCE):
            hello = await messages.read()
        if hello is None:
            return
        if not isinstance(hello, Hello):
            raise WireError(f"the first frame was {type(hello).__name__}, not Hello")
        connection.send(self._welcome())
        if hello.protocol != PROTOCOL:
            raise WireError(f"the client speaks protocol {hello.protocol}, this engine {PROTOCOL}")
        self._connections.add(connection)
        self._driver.report()
        above = hello.role in ("router", "control")
        while True:
            if above:
                self._lease.heard()
            message = await messages.read()
            match message:
                case None:
                    return
                case Generate():
                    self._start(connection, message)
                case Abort(request_id):
                    self._abort(connection, request_id)
                case Limits():
                    self._driver.set_limits(message)
                case GetStats():
                    self._driver.report()
                case Hello():
                    raise WireError("a second Hello on one connection")

    def _welcome(self) -> Welcome:
        spec, loaded = self._spec, self._loaded.result()
        return Welcome(
            replica_id=spec.replica_id,
            incarnation=spec.incarnation,
            protocol=PROTOCOL,
            vocab_size=loaded.vocab_size,
            eos_token_ids=loaded.eos_token_ids,
            max_model_len=spec.max_model_len,
            block_size=spec.block_size,
            num_blocks=spec.num_blocks,
            max_num_seqs=spec.max_num_seqs,
            lease=spec.adoption_window,
            goes_on=True,
        )

    def _start(self, connection: Connection, message: Generate) -> None:
        if message.id in connection.live:
            raise WireError(f"two live requests with the id {message.id!r}")
        number = f"r{next(self._numbers)}"
        connection.live[message.id] = number
        self._routes[number] = _Route(connection, message.id, message.trace, message.patience)
        message.id = number
        self._driver.add(message, time.monotonic())

    def _abort(self, connection: Connection, request_id: str) -> None:
        number = connection.live.pop(request_id, None)
        if number is not None:
            del self._routes[number]
            self._driver.abort(number)

    def _forget(self, connection: Connection) -> None:
        """The connection is gone: so are its requests."""
        self._connections.discard(connection)
        for request_id in list(connection.live):
            self._abort(connection, request_id)


# ── the socket ────────────────────────────────────────────────────────────────────────────────────────────


def prepare_socket(path: Path) -> None:
    """Make the folder ours alone and the name free.

    Raises `InvalidSpec` when others may enter the folder or something else has the name, `SocketTaken` when a
    process answers there.
    """
    folder = path.parent
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = folder.stat()
    if found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise InvalidSpec(f"{folder}: must belong to this user alone (mode 0700), as the socket lies in it")
    try:
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise InvalidSpec(f"{path}: is in the way and no socket")
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()  # left by a process that is no more
            return
    raise SocketTaken(f"{path}: another process listens there")
