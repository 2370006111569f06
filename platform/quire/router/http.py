"""HTTP/1.1 on one connection: bytes to ASGI, and back.

uvicorn listens, counts connections and ends the process; this is its protocol, in place of those that it brings.
h11 reads, one `Framing` for each request; answers are written here, without it:

- **One write** for the head of an answer and the first of its body.
- **Patience** that ends: a connection that does not bring the head of a request, that asks nothing more, or whose
  client does not read, is cut. One timer a connection looks at where that stands; what changes is a number.
- **Errors** of our own shape for what is not HTTP, and none into an answer that is on its way.
- **Who leaves** is told to whoever answers, by a future in the scope (`GONE`), with no task that waits for it.

What a client offers besides HTTP/1.1 is declined by an answer in HTTP/1.1. What comes behind a request after which
the connection ends is not looked at.
"""

from __future__ import annotations

import asyncio
import logging
import math
import re
from collections.abc import Callable, Iterable
from http import HTTPStatus
from typing import Any, Final, cast
from urllib.parse import unquote

import h11
import uvicorn
from litestar.types import ASGIApp, Message, Scope
from uvicorn.protocols.utils import get_local_addr, get_remote_addr, is_ssl
from uvicorn.server import ServerState

from quire.doors import farewell
from quire.errors import InvalidRequest, describe
from quire.router.account import new_request_id
from quire.router.memory import read_less
from quire_schemas.wire import HttpSettings

log = logging.getLogger("quire.router")

MAX_HEADER_BYTES: Final = 16 * 1024
GONE: Final = "quire.gone"
SLOW: Final = "slow"
"""What the future of `GONE` gives of a client that was cut off as it read nothing of its answer."""
"""In the scope: a future that is done when the client leaves before its answer is complete."""
WAITING_BYTES: Final = 16 * 1024
"""Of answers that are kept here for a client, behind what the system keeps: what is made later waits as tokens."""
_AMBIGUOUS: Final = re.compile(rb"(?<!\r)\n|\n[ \t]|\r(?=[^\n])")
"""In a head: an end of line that is none, and a line that goes on in the next one."""
_CLOSES: Final = re.compile(rb"(?i)(?:^|,)[ \t]*close[ \t]*(?:,|$)")
_MUCH: Final = 64 * 1024
"""Of a body that nobody has asked for yet; reading pauses."""
_GOODBYE_SECONDS: Final = 1.0
_LINGER_SECONDS: Final = 1.0
_LAST_SECONDS: Final = 0.25
"""That a connection without a request stays when the server ends. Whoever asks one question after the other is
told with the next answer that no further one is taken; at a close a question may be on its way, and gets none.
"""
_NO_BODY: Final = frozenset({204, 304})
_STATUS: Final = {each.value: b"HTTP/1.1 %d %b\r\n" % (each.value, each.phrase.encode()) for each in HTTPStatus}


class Framing(h11.Connection):
    """Reads heads, and headers behind chunks, by the book: h11 takes folded lines and bare line feeds, which some
    proxies see otherwise. It is given more bytes only when it has said that it needs some."""

    _chunked = False
    _came = b""
    """Of a body in chunks, what h11 read last, or reads next."""

    def receive_data(self, data: bytes) -> None:
        if self._chunked:
            self._came = self.trailing_data[0] + data
        super().receive_data(data)

    def next_event(self) -> h11.Event | type[h11.NEED_DATA] | type[h11.PAUSED]:
        if self.their_state is h11.IDLE:  # whatever waits to be read begins with a head, as far as it has come
            waiting = self.trailing_data[0]
            if _AMBIGUOUS.search(waiting, 0, end + 2 if (end := waiting.find(b"\r\n\r\n")) >= 0 else len(waiting)):
                raise h11.RemoteProtocolError(
                    "a line of the head ends otherwise than by CRLF, or goes on in the next"
                )
        event = super().next_event()
        if isinstance(event, h11.Request):
            self._chunked = any(name == b"transfer-encoding" for name, _ in event.headers)
            self._came = self.trailing_data[0] if self._chunked else b""
        elif isinstance(event, h11.EndOfMessage) and self._chunked:
            self._check_end([name for name, _ in event.headers])
        return event

    def _check_end(self, names: list[bytes]) -> None:
        """Raises if the end of the chunks is not these headers, a line each, and an empty line."""
        read = self._came[: len(self._came) - len(self.trailing_data[0])]
        *before, empty, rest = [b"", *read.rsplit(b"\r\n", len(names) + 2)]
        lines = before[-len(names) :] if names else []
        if (
            empty + rest
            or any(b"\n" in line or b"\r" in line for line in lines)
            or [line.partition(b":")[0].lower() for line in lines] != names
        ):
            raise h11.RemoteProtocolError("a line behind the chunks ends otherwise than by CRLF")


class State(ServerState):
    """What the server and its connections know of each other."""

    def __init__(self) -> None:
        super().__init__()
        self.ending = False
        """A connection brings one more request at most, and soon: also one that comes from its TLS handshake only
        now."""


class Protocol(asyncio.Protocol):
    """One connection. `settings` are those in force."""

    settings: Callable[[], HttpSettings] = staticmethod(HttpSettings)

    @classmethod
    def under(cls, settings: Callable[[], HttpSettings]) -> type[Protocol]:
        """The protocol with these settings: uvicorn makes its instances by itself."""
        return type(cls.__name__, (cls,), {"settings": staticmethod(settings)})

    def __init__(
        self,
        config: uvicorn.Config,
        server_state: State,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        if not config.loaded:
            config.load()
        self._app = cast(ASGIApp, config.loaded_app)
        self.server = server_state
        self.loop = _loop or asyncio.get_event_loop()
        self._reader = Framing(h11.SERVER, MAX_HEADER_BYTES)
        self._cycle: Cycle | None = None
        """The request that is being read or answered."""
        self._asked = False
        """There was a request."""
        self._ends = False
        """No request is read any more."""
        self._last = False
        """One more request is read at most."""
        self._waits, self._until = "", math.inf
        """What the client does not do yet, if it is waited for, and until when."""
        self._timer: asyncio.TimerHandle | None = None
        self._left_as: str | None = None
        """As what its client will have left."""
        self._unread: asyncio.TimerHandle | None = None
        """Runs while the client does not read."""
        self._goodbye: asyncio.TimerHandle | None = None
        self._gone_by = math.inf
        """Looks, until then, whether what was written last is out."""
        self._writable: asyncio.Future[None] | None = None
        """Of those that wait for the client to read."""

    # ── the transport ─────────────────────────────────────────────────────────────────────────────────────────

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.transport.set_write_buffer_limits(high=WAITING_BYTES)
        read_less(self.transport)
        self.server.connections.add(self)  # type: ignore[arg-type]
        self._place = {
            "server": get_local_addr(self.transport),
            "client": get_remote_addr(self.transport),
            "scheme": "https" if is_ssl(self.transport) else "http",
        }
        self._wait()
        if self.server.ending:
            self.shutdown()

    def connection_lost(self, exc: Exception | None) -> None:
        self.server.connections.discard(self)
        for timer in (self._timer, self._unread, self._goodbye):
            if timer is not None:
                timer.cancel()
        if self._cycle is not None:
            self._cycle.leave(self._left_as)
        self.resume_writing()
        self._ends = True

    def eof_received(self) -> None:
        """The transport closes itself."""

    def pause_writing(self) -> None:
        self._writable = self.loop.create_future()
        self._unread = self.loop.call_later(self.settings().send_seconds, self._cut_reader)

    def resume_writing(self) -> None:
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None
        if self._writable is not None:
            self._writable.set_result(None)
            self._writable = None

    @property
    def is_full(self) -> bool:
        """The client does not read as fast as is written to it."""
        return self._writable is not None

    async def writable(self) -> None:
        """Wait until the client has read most of what was written."""
        while self._writable is not None:
            await asyncio.shield(self._writable)

    # ── requests ──────────────────────────────────────────────────────────────────────────────────────────────

    def data_received(self, data: bytes) -> None:
        if self._ends:
            return
        self._reader.receive_data(data)
        self._go_on()

    def _go_on(self) -> None:
        """Read what has come, up to the end of one request: the next one is looked at when that is answered."""
        try:
            while not (self._ends or self._is_busy) and self._read():
                continue
        except h11.RemoteProtocolError:
            self._refuse()
        if self._is_busy and self._reader.trailing_data[0]:
            self.transport.pause_reading()
        self._wait()

    def read_on(self) -> None:
        """There is room again for what comes, unless that is the next request's."""
        if not (self._is_busy and self._reader.trailing_data[0]):
            self.transport.resume_reading()

    @property
    def _is_busy(self) -> bool:
        return self._cycle is not None and self._cycle.is_whole

    def _read(self) -> bool:
        """Take what comes next; whether there was something."""
        event = self._reader.next_event()
        cycle = self._cycle
        if isinstance(event, h11.Request):
            self._take(event)
        elif isinstance(event, h11.Data) and cycle is not None:
            cycle.gain(bytes(event.data))
        elif isinstance(event, h11.EndOfMessage) and cycle is not None:
            cycle.gain(b"", whole=True)
            self._ends = not cycle.keeps
            rest, self._reader = self._reader.trailing_data[0], Framing(h11.SERVER, MAX_HEADER_BYTES)
            if rest:
                self._reader.receive_data(rest)
        else:
            return False
        return True

    def _take(self, request: h11.Request) -> None:
        self._asked = True
        version = request.http_version.decode("ascii")
        path, _, query = request.target.partition(b"?")
        headers = list(request.headers)
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": version,
            "method": request.method.decode("ascii"),
            "path": unquote(path.decode("ascii")),
            "raw_path": path,
            "query_string": query,
            "root_path": "",
            "headers": headers,
            "state": {},
            **self._place,
        }
        closes = any(name == b"connection" and _CLOSES.search(value) for name, value in headers)
        cycle = Cycle(
            self,
            scope,
            keeps=version == "1.1" and not closes and not self._last,
            expects=self._reader.they_are_waiting_for_100_continue,
        )
        self._cycle = cycle
        task = self.loop.create_task(cycle.run(self._app))
        self.server.tasks.add(task)
        task.add_done_callback(self.server.tasks.discard)

    @property
    def _began(self) -> bool:
        """The head of a request has begun, and is not whole."""
        return self._reader.their_state is h11.IDLE and bool(self._reader.trailing_data[0])

    def ended(self, cycle: Cycle) -> None:
        """The answer is complete."""
        self.server.total_requests += 1
        self._cycle = None
        if not cycle.is_whole and not self.transport.is_closing():
            self._linger()
            return
        if not cycle.keeps:
            self.shut()
            return
        if not self.transport.is_closing():
            self.transport.resume_reading()
            self._go_on()

    # ── patience, and the end ─────────────────────────────────────────────────────────────────────────────────

    def _wait(self) -> None:
        """See to it that what the client does next comes in time. What it brings in drops prolongs nothing."""
        if self._cycle is not None or self._ends:
            waits = ""
        else:
            waits = "brings no request" if self._began or not self._asked else "asks nothing more"
            if self._last and self._began:
                waits = "brings no whole request"  # other than the one before: its time begins anew
        if waits == self._waits and waits:
            return
        self._waits, self._until = waits, math.inf
        if waits:
            settings = self.settings()
            patience = settings.idle_seconds if self._asked and not self._began else settings.head_seconds
            if self._last and not self._began:
                patience = min(patience, _LAST_SECONDS)
            self._until = self.loop.time() + patience
        if self._timer is not None and self._timer.when() > self._until:
            self._timer.cancel()
            self._timer = None
        if self._timer is None and waits:
            self._timer = self.loop.call_at(self._until, self._look)

    def _look(self) -> None:
        self._timer = None
        if self.loop.time() < self._until:
            if self._waits:
                self._timer = self.loop.call_at(self._until, self._look)
        elif (self._asked or self._last) and not self._began:
            self.shut()
        else:
            self._cut(self._waits)

    def _cut(self, why: str) -> None:
        log.info("a client %s, and is cut off", why)
        self.transport.abort()

    def _cut_reader(self) -> None:
        self._left_as = SLOW
        self._cut("reads nothing of its answer")

    def _linger(self) -> None:
        """Read on for a while without looking: who is cut off while he sends may never see his answer."""
        self._ends = True
        self._wait()
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self.transport.resume_reading()
        self.loop.call_later(_LINGER_SECONDS, self.shut)

    def shut(self) -> None:
        """Close once what is written is out, for which the client has as long as for reading on."""
        self._ends = True
        if self.transport.is_closing():
            return  # who lingered has left meanwhile; and that of TLS can be closed once only
        self.transport.close()
        # TLS waits half a minute for the other side's goodbye, which a client with nothing to ask never reads.
        is_tls = self.transport.get_extra_info("ssl_object") is not None
        if self._goodbye is None and (is_tls or self.transport.get_write_buffer_size()):
            self._gone_by = self.loop.time() + self.settings().send_seconds
            self._leave_later()

    def _leave_later(self) -> None:
        self._goodbye = self.loop.call_at(min(self.loop.time() + _GOODBYE_SECONDS, self._gone_by), self._leave)

    def _leave(self) -> None:
        if not self.transport.get_write_buffer_size():
            self.transport.abort()
        elif self.loop.time() < self._gone_by:  # an answer is still on its way
            self._leave_later()
        else:
            self._cut("reads nothing of the end of its answer")

    def shutdown(self) -> None:
        """Take no further request, but for one that may be on its way already; called by the server. One that has
        begun is read to its end."""
        self._last = True
        if self._cycle is None:
            self._waits = ""
            self._wait()
        elif not self._cycle.started:  # else its client has been told otherwise
            self._cycle.keeps = False
            self._ends = self._cycle.is_whole

    def _refuse(self) -> None:
        """Answer what is not HTTP. Where an answer is on its way there is no room for another one."""
        if not self._ends and not (self._cycle is not None and self._cycle.started):
            known = describe(
                InvalidRequest("The request is not proper HTTP/1.1, or its headers are above 16 KiB.")
            )
            headers = (*self.server.default_headers, *known.headers, (b"x-request-id", new_request_id()))
            self.transport.write(farewell(known.status, headers, known.body))
        if self._cycle is not None:
            self._cycle.leave()
        self.shut()


class Cycle:
    """One request and its answer, as an application sees them."""

    def __init__(self, protocol: Protocol, scope: dict[str, Any], *, keeps: bool, expects: bool) -> None:
        """`expects`: the client waits for our word before it sends the body."""
        self.keeps = keeps
        """The connection goes on behind it."""
        self.is_whole = False
        """All of the request's body has come."""
        self.started = self.ended = False
        """Its answer."""
        self._protocol = protocol
        self._scope = scope
        self._gone: asyncio.Future[str | None] = protocol.loop.create_future()
        scope[GONE] = self._gone
        self._body: list[bytes] = []
        self._size = 0
        self._told = False
        """The application has all of the body."""
        self._come: asyncio.Future[None] | None = None
        """Of who waits for more of the body."""
        self._expects = expects
        self._head = b""
        """Of the answer, until it is written."""
        self._chunked = False
        self._left = math.inf
        """Bytes of the answer's body that are still to come, where its head says how many."""

    def gain(self, body: bytes, *, whole: bool = False) -> None:
        """More of the request's body has come."""
        self.is_whole = whole
        if body and not self.ended:
            self._body.append(body)
            self._size += len(body)
            if self._size > _MUCH:
                self._protocol.transport.pause_reading()
        self._wake()

    def leave(self, left_as: str | None = None) -> None:
        """The client is gone; None: by itself."""
        if not self._gone.done():
            self._gone.set_result(left_as)
        self._wake()

    def _wake(self) -> None:
        if self._come is not None and not self._come.done():
            self._come.set_result(None)

    async def run(self, app: ASGIApp) -> None:
        """Have it answered. Where the answer has no end, the connection has."""
        try:
            await app(cast(Scope, self._scope), self.receive, self.send)
        except Exception as error:
            log.error("a request failed", exc_info=error)
            if not self.started:
                await self._fail(error)
        finally:
            if not (self.ended or self._gone.done()):
                self._protocol.transport.write(self._head)
                self._protocol.shut()

    async def _fail(self, error: Exception) -> None:
        known = describe(error)
        headers = [*known.headers, (b"connection", b"close")]
        await self.send({"type": "http.response.start", "status": known.status, "headers": headers})
        await self.send({"type": "http.response.body", "body": known.body, "more_body": False})

    async def receive(self) -> Any:
        if self._expects and not self.started:
            self._expects = False
            self._protocol.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        while not (self._body or (self.is_whole and not self._told) or self.ended or self._gone.done()):
            self._protocol.transport.resume_reading()
            self._come = self._protocol.loop.create_future()
            try:
                await self._come
            finally:
                self._come = None
        if self.ended or self._gone.done():
            return {"type": "http.disconnect"}
        body, self._body, self._size, self._told = b"".join(self._body), [], 0, self.is_whole
        self._protocol.read_on()  # also behind the last of it: who leaves is seen by reading
        return {"type": "http.request", "body": body, "more_body": not self._told}

    async def send(self, message: Message) -> None:
        protocol = self._protocol
        if protocol.is_full:
            await protocol.writable()
        if self._gone.done():
            return
        if message["type"] == "http.response.start":
            if self.started:
                raise RuntimeError("an answer has one head")
            self._head = self._written(message["status"], message["headers"])
            self.started = True
            return
        if message["type"] != "http.response.body" or not self.started or self.ended:
            raise RuntimeError(f"no {message['type']} is taken now")
        body, more = message["body"], message["more_body"]
        parts, self._head = [self._head], b""
        if self._scope["method"] == "HEAD":
            self._left = 0
        elif not self._chunked:
            self._left -= len(body)
            parts.append(body)
            if self._left < 0 or (not more and 0 < self._left < math.inf):
                raise RuntimeError("an answer has as many bytes as its head says")
        else:
            if body:
                parts += (b"%x\r\n" % len(body), body, b"\r\n")
            if not more:
                parts.append(b"0\r\n\r\n")
        protocol.transport.write(b"".join(parts))
        if not more:
            self.ended = True
            self._wake()
            protocol.ended(self)

    def _written(self, status: int, headers: Iterable[tuple[bytes, bytes]]) -> bytes:
        """The head of the answer."""
        lines = [_STATUS[status]]
        self.keeps = self.keeps and self.is_whole
        closes = False
        for name, value in (*self._protocol.server.default_headers, *headers):
            if name == b"content-length":
                self._left = int(value)
            elif name == b"connection" and value == b"close":
                closes, self.keeps = True, False
            lines.append(b"%b: %b\r\n" % (name, value))
        if not (self.keeps or closes):
            lines.append(b"connection: close\r\n")
        if self._left == math.inf and status not in _NO_BODY:
            # to a client of HTTP/1.0 the end of the connection is that of the answer
            self._chunked = self._scope["http_version"] == "1.1"
            if self._chunked:
                lines.append(b"transfer-encoding: chunked\r\n")
        head = b"".join(lines)
        if head.count(b"\n") != len(lines) or head.count(b"\r") != len(lines) or b"\0" in head:
            raise RuntimeError("a header of an answer has no line of its own")
        return head + b"\r\n"


__all__ = ["GONE", "MAX_HEADER_BYTES", "SLOW", "Cycle", "Framing", "Protocol", "State"]
