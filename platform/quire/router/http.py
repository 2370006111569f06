"""HTTP/1.1 on one connection: bytes to ASGI, and back.

The parser is llhttp (`httptools`), in its strict mode. uvicorn listens, counts connections and ends the process;
this is its protocol, in place of those that it brings, for what they lack:

- **Bounds.** llhttp calls back for each header that is whole, and for each piece of a body as it comes. What comes
  without a call is a part of a header, of a trailer or of a chunk's size: it is fed in pieces, so that no more
  than one of them comes unseen before a call. `MAX_HEADER_BYTES` hold for a head with its trailers, and for what
  comes between two calls.
- **Patience** that ends: a connection that does not bring the head of a request, that asks nothing more, or whose
  client does not read, is cut. One timer a connection looks at where that stands; what changes is a number.
- **Errors** of our own shape for what is not HTTP, and none into an answer that is on its way.
- **One write** for the head of an answer and the first of its body. A head says `connection: close` where that is
  what comes.
- **Who leaves** is told to whoever answers, by a future in the scope (`GONE`), with no task that waits for it.

What a client offers besides HTTP/1.1 is declined by an answer in HTTP/1.1. What comes behind a request after which
the connection ends is not looked at.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections import deque
from collections.abc import Callable, Iterable
from http import HTTPStatus
from typing import Any, Final, cast
from urllib.parse import unquote

import httptools
import uvicorn
from litestar.types import ASGIApp, Message, Scope
from uvicorn.protocols.utils import get_local_addr, get_remote_addr, is_ssl
from uvicorn.server import ServerState

from quire.errors import InvalidRequest, describe
from quire.router.account import new_request_id
from quire_schemas.wire import HttpSettings

log = logging.getLogger("quire.router")

MAX_HEADER_BYTES: Final = 16 * 1024
GONE: Final = "quire.gone"
"""In the scope: a future that is done when the client leaves before its answer is complete."""
_PIECE: Final = 8 * 1024
"""Bytes that the parser gets at a time."""
_MUCH: Final = 64 * 1024
"""Of a body that nobody has asked for yet; reading pauses."""
_GOODBYE_SECONDS: Final = 1.0
_NO_BODY: Final = frozenset({204, 304})
_STATUS: Final = {each.value: b"HTTP/1.1 %d %b\r\n" % (each.value, each.phrase.encode()) for each in HTTPStatus}


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
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        if not config.loaded:
            config.load()
        self._app = cast(ASGIApp, config.loaded_app)
        self.server = server_state
        self.loop = _loop or asyncio.get_event_loop()
        self._parser = httptools.HttpRequestParser(self)
        self._cycles: deque[Cycle] = deque()
        """Requests that are not answered, in their order; the first one is being answered."""
        self._began = False
        """The head of a request has begun, and is not whole."""
        self._asked = False
        """There was a request."""
        self._ends = False
        """No request is read any more."""
        self._head_ended = False
        self._uncalled = self._head_bytes = 0
        """Bytes since the parser's last call, and of a request's head and trailers."""
        self._waits, self._until = "", math.inf
        """What the client does not do yet, if it is waited for, and until when."""
        self._timer: asyncio.TimerHandle | None = None
        self._unread: asyncio.TimerHandle | None = None
        """Runs while the client does not read."""
        self._writable: asyncio.Future[None] | None = None
        """Of those that wait for the client to read."""

    # ── the transport ─────────────────────────────────────────────────────────────────────────────────────────

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.server.connections.add(self)  # type: ignore[arg-type]
        self._place = {
            "server": get_local_addr(self.transport),
            "client": get_remote_addr(self.transport),
            "scheme": "https" if is_ssl(self.transport) else "http",
        }
        self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        self.server.connections.discard(self)
        for timer in (self._timer, self._unread):
            if timer is not None:
                timer.cancel()
        for cycle in self._cycles:
            cycle.leave()
        self._cycles.clear()
        self.resume_writing()
        self._ends = True

    def eof_received(self) -> None:
        """The transport closes itself."""

    def pause_writing(self) -> None:
        self._writable = self.loop.create_future()
        self._unread = self.loop.call_later(self.settings().send_seconds, self._cut, "reads nothing of its answer")

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
        left = memoryview(data)
        while left and not self._ends:
            piece, left = left[:_PIECE], left[_PIECE:]
            self._uncalled += len(piece)
            try:
                self._parser.feed_data(piece)
            except httptools.HttpParserUpgrade as offered:
                left = memoryview(b"".join([self._head_without_offer(), piece[offered.args[0] :], left]))
                self._parser = httptools.HttpRequestParser(self)
            except httptools.HttpParserError:
                self._refuse()
            if self._uncalled > MAX_HEADER_BYTES:
                self._refuse()
        self._wait()

    def on_message_begin(self) -> None:
        self._began, self._head_ended = True, False
        self._uncalled = self._head_bytes = 0
        self._url = b""
        self._headers: list[tuple[bytes, bytes]] = []

    def on_url(self, url: bytes) -> None:
        self._gather(len(url))
        self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self._gather(len(name) + len(value))
        if not self._head_ended:  # what comes behind a body is no header of it, and nothing here reads it
            self._headers.append((name.lower(), value.rstrip(b" \t")))

    def on_headers_complete(self) -> None:
        parser = self._parser
        self._head_ended = True
        if parser.get_method() == b"CONNECT":
            raise ValueError("this is no proxy")
        if parser.should_upgrade():
            return
        self._began, self._asked = False, True
        version = parser.get_http_version()
        path, _, query = self._url.partition(b"?")
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": version,
            "method": parser.get_method().decode("ascii"),
            "path": unquote(path.decode("ascii")),
            "raw_path": path,
            "query_string": query,
            "root_path": "",
            "headers": self._headers,
            "state": {},
            **self._place,
        }
        cycle = Cycle(self, scope, keeps=version == "1.1" and parser.should_keep_alive())
        self._cycles.append(cycle)
        if len(self._cycles) == 1:
            self._start(cycle)
        else:
            self.transport.pause_reading()  # one more is read at most

    def on_body(self, body: bytes) -> None:
        self._uncalled = 0
        if self._cycles:
            self._cycles[-1].gain(body)

    def on_message_complete(self) -> None:
        if self._parser.should_upgrade():
            return
        if self._cycles:
            self._cycles[-1].gain(b"", whole=True)
            self._ends = self._ends or not self._cycles[-1].keeps
        else:  # answered before it was whole
            self._ends = self._ends or not self._parser.should_keep_alive()

    def _gather(self, size: int) -> None:
        """Raises, which the parser hands on as an error of its own."""
        self._uncalled = 0
        self._head_bytes += size
        if self._head_bytes > MAX_HEADER_BYTES:
            raise ValueError("too many headers")

    def _head_without_offer(self) -> bytes:
        """The head of a request whose client would go on in another protocol, without that offer: the parser reads
        no body behind one."""
        kept = [b"%b: %b\r\n" % header for header in self._headers if header[0] != b"upgrade"]
        version = self._parser.get_http_version().encode()
        return b"%b %b HTTP/%b\r\n%b\r\n" % (self._parser.get_method(), self._url, version, b"".join(kept))

    def _start(self, cycle: Cycle) -> None:
        task = self.loop.create_task(cycle.run(self._app))
        self.server.tasks.add(task)
        task.add_done_callback(self.server.tasks.discard)

    def ended(self, cycle: Cycle) -> None:
        """The answer of the first request is complete."""
        self.server.total_requests += 1
        self._cycles.popleft()
        if not (cycle.keeps and cycle.is_whole):
            self.shut()
            return
        if self._cycles:
            self._start(self._cycles[0])
        if len(self._cycles) < 2 and not self.transport.is_closing():
            self.transport.resume_reading()
        self._wait()

    # ── patience, and the end ─────────────────────────────────────────────────────────────────────────────────

    def _wait(self) -> None:
        """See to it that what the client does next comes in time. What it brings in drops prolongs nothing."""
        if self._cycles or self._ends:
            waits = ""
        else:
            waits = "brings no request" if self._began or not self._asked else "asks nothing more"
        if waits == self._waits and waits:
            return
        self._waits, self._until = waits, math.inf
        if waits:
            settings = self.settings()
            kept = self._asked and not self._began
            self._until = self.loop.time() + (settings.idle_seconds if kept else settings.head_seconds)
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
        elif self._asked and not self._began:
            self.shut()
        else:
            self._cut(self._waits)

    def _cut(self, why: str) -> None:
        log.info("a client %s, and is cut off", why)
        self.transport.abort()

    def shut(self) -> None:
        """Close once what is written is out."""
        self._ends = True
        self.transport.close()
        if self.transport.get_extra_info("ssl_object") is not None:
            # TLS waits half a minute for the other side's goodbye, which a client with nothing to ask never reads.
            self.loop.call_later(_GOODBYE_SECONDS, self._leave)

    def _leave(self) -> None:
        if self.transport.get_write_buffer_size():  # an answer is still on its way
            self.loop.call_later(_GOODBYE_SECONDS, self._leave)
        else:
            self.transport.abort()

    def shutdown(self) -> None:
        """Take no further request; called by the server."""
        self._ends = True
        if self._cycles:
            self._cycles[-1].keeps = False
        else:
            self.shut()

    def _refuse(self) -> None:
        """Answer what is not HTTP. Where an answer is on its way there is no room for another one."""
        if not self._ends and not any(cycle.started for cycle in self._cycles):
            known = describe(
                InvalidRequest("The request is not proper HTTP/1.1, or its headers are above 16 KiB.")
            )
            more = ((b"x-request-id", new_request_id()), (b"connection", b"close"))
            lines = [b"%b: %b\r\n" % header for header in (*self.server.default_headers, *known.headers, *more)]
            self.transport.write(b"".join([_STATUS[known.status], *lines, b"\r\n", known.body]))
        for cycle in self._cycles:
            cycle.leave()
        self._cycles.clear()
        self.shut()


class Cycle:
    """One request and its answer, as an application sees them."""

    def __init__(self, protocol: Protocol, scope: dict[str, Any], *, keeps: bool) -> None:
        self.keeps = keeps
        """The connection goes on behind it."""
        self.is_whole = False
        """All of the request's body has come."""
        self.started = self.ended = False
        """Its answer."""
        self._protocol = protocol
        self._scope = scope
        self._gone: asyncio.Future[None] = protocol.loop.create_future()
        scope[GONE] = self._gone
        self._body: list[bytes] = []
        self._size = 0
        self._told = False
        """The application has all of the body."""
        self._come: asyncio.Future[None] | None = None
        """Of who waits for more of the body."""
        self._expects = (b"expect", b"100-continue") in scope["headers"]
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

    def leave(self) -> None:
        """The client is gone."""
        if not self._gone.done():
            self._gone.set_result(None)
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


__all__ = ["GONE", "MAX_HEADER_BYTES", "Cycle", "Protocol"]
