"""HTTP/1.1 as a client, on asyncio: one request at a time on a connection, its answer handed on as it comes.

A connection reads in the event loop's call for arrived bytes: head, then a body by its length, in chunks or up to
the end of the connection. Of a body with status 200 what one read brought goes to the caller's function at once,
as one piece; any other body is kept, up to a limit, for it says what is wrong. Connections are kept for the next
request, for a short while and unless the server says otherwise. No request is ever sent twice: one that was lost
may have been worked on.

Cancelling a request closes its connection, which is how a server learns that nobody waits any more. Proxies and
redirects are not followed.
"""

from __future__ import annotations

import asyncio
import enum
import errno
import socket
import ssl
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import cast
from urllib.parse import urlsplit

from quire.remote.errors import Lost, RemoteError, Unreachable, Unreadable

Take = Callable[[bytes], None]
MAX_HEAD = 64 * 1024
MAX_ERROR = 256 * 1024
"""Bytes that are kept of the body of an error."""
REUSED_FOR = 2.0
"""Seconds: servers close what is idle for some more, and a request must not go out just then."""


@dataclass(frozen=True, slots=True)
class Answer:
    """The status, headers with names in lower case, and of another status than 200 the body."""

    status: int
    headers: Mapping[str, str]
    body: bytes


class _At(enum.Enum):
    """What the next bytes are."""

    HEAD = 0
    BODY = 1
    SIZE = 2
    CHUNK = 3
    TRAILER = 4
    TO_THE_END = 5


class _Connection(asyncio.Protocol):
    """One connection; `ask` waits for one answer."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._waiting: asyncio.Future[Answer] | None = None
        self._take: Take = _nothing
        self.is_open = False
        self.idle_since = 0.0
        self._reset()

    def _reset(self) -> None:
        self._at = _At.HEAD
        self._rest = b""
        self._left = 0
        self._status = 0
        self._headers: dict[str, str] = {}
        self._came: list[bytes] = []
        self._kept: list[bytes] = []
        self._kept_size = 0

    async def ask(self, request: bytes, take: Take) -> Answer:
        """Send `request` and wait for the end of its answer."""
        if self._transport is None or not self.is_open:
            raise Lost("the connection is closed", kind="connection lost")
        self._reset()
        self._take = take
        self._waiting = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        try:
            return await self._waiting
        except BaseException:
            self.close()
            raise
        finally:
            self._waiting = None
            self._take = _nothing

    def close(self) -> None:
        self.is_open = False
        if self._transport is not None:
            self._transport.abort()

    # what the event loop calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self.is_open = True

    def connection_lost(self, exc: Exception | None) -> None:
        self.is_open = False
        if self._waiting is None or self._waiting.done():
            return
        if exc is None and self._at is _At.TO_THE_END:
            self._finish()
            return
        why = f": {exc}" if exc is not None and str(exc) else ""
        self._waiting.set_exception(Lost(f"the connection broke{why}", kind="connection lost"))

    def data_received(self, data: bytes) -> None:
        if self._waiting is None or self._waiting.done():
            self.close()  # nobody asked
            return
        try:
            self._read(self._rest + data if self._rest else data)
        except RemoteError as error:
            if not self._waiting.done():
                self._waiting.set_exception(error)
            self.close()

    def _read(self, data: bytes) -> None:
        at = 0
        while True:
            match self._at:
                case _At.CHUNK:
                    if self._left:
                        piece = data[at : at + self._left]
                        if not piece:
                            break
                        at += len(piece)
                        self._left -= len(piece)
                        self._hand_on(piece)
                        if self._left:
                            break
                    if len(data) - at < 2:
                        break
                    if data[at : at + 2] != b"\r\n":
                        raise _unreadable("a chunk does not end where it says")
                    at += 2
                    self._at = _At.SIZE
                case _At.SIZE:
                    end = self._line_end(data, at)
                    if end < 0:
                        break
                    self._left = _number(data[at:end].partition(b";")[0].strip(), 16)
                    at = end + 2
                    self._at = _At.CHUNK if self._left else _At.TRAILER
                case _At.TRAILER:
                    end = self._line_end(data, at)
                    if end < 0:
                        break
                    was_empty = end == at
                    at = end + 2
                    if was_empty:
                        self._finish()
                        return
                case _At.BODY:
                    piece = data[at : at + self._left]
                    if piece:
                        at += len(piece)
                        self._left -= len(piece)
                        self._hand_on(piece)
                    if not self._left:
                        self._finish()
                        return
                    break
                case _At.TO_THE_END:
                    if at < len(data):
                        self._hand_on(data[at:])
                        at = len(data)
                    break
                case _At.HEAD:
                    end = data.find(b"\r\n\r\n", at)
                    if end < 0:
                        if len(data) - at > MAX_HEAD:
                            raise _unreadable("its head does not end")
                        break
                    self._begin(data[at:end])
                    at = end + 4
        self._rest = data[at:]
        self._flush()

    def _line_end(self, data: bytes, at: int) -> int:
        end = data.find(b"\r\n", at)
        if end < 0 and len(data) - at > MAX_HEAD:
            raise _unreadable("a line does not end")
        return end

    def _begin(self, head: bytes) -> None:
        first, *lines = head.decode("latin-1").split("\r\n")
        version, _, rest = first.partition(" ")
        if not version.startswith("HTTP/1.") or not rest[:3].isdigit():
            raise _unreadable("it is not HTTP/1.1")
        self._status = int(rest[:3])
        if self._status < 200:
            return  # an interim answer: the head of the real one follows
        self._headers = {}
        for line in lines:
            name, _, value = line.partition(":")
            self._headers[name.strip().lower()] = value.strip()
        if version == "HTTP/1.0":
            self._headers.setdefault("connection", "close")
        if self._status in (204, 304):
            self._left, self._at = 0, _At.BODY
        elif "chunked" in self._headers.get("transfer-encoding", "").lower():
            self._at = _At.SIZE
        elif "content-length" in self._headers:
            self._left, self._at = _number(self._headers["content-length"].encode(), 10), _At.BODY
        else:
            self._at = _At.TO_THE_END

    def _hand_on(self, piece: bytes) -> None:
        if self._status == 200:
            self._came.append(piece)
        elif self._kept_size < MAX_ERROR:
            self._kept.append(piece)
            self._kept_size += len(piece)

    def _flush(self) -> None:
        """Hand on, as one, what came in one read."""
        if self._came:
            came, self._came = self._came, []
            self._take(came[0] if len(came) == 1 else b"".join(came))

    def _finish(self) -> None:
        self._flush()
        answer = Answer(self._status, self._headers, b"".join(self._kept))
        if self._at is _At.TO_THE_END or self._headers.get("connection", "").lower() == "close":
            self.close()
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(answer)


class Http:
    """Requests to the host and port of one URL, as many at a time as are asked for."""

    def __init__(self, base_url: str, headers: Mapping[str, str], tls: ssl.SSLContext | None = None) -> None:
        url = urlsplit(base_url)
        self._host = url.hostname or ""
        self._port = url.port or (443 if url.scheme == "https" else 80)
        self._tls = tls if url.scheme == "https" else None
        shown = f"[{self._host}]" if ":" in self._host else self._host
        self._headers = "".join(
            f"{name}: {value}\r\n"
            for name, value in {"host": f"{shown}:{self._port}" if url.port else shown, **headers}.items()
        )
        self._idle: list[_Connection] = []

    @property
    def place(self) -> str:
        return f"{self._host}:{self._port}"

    async def ask(self, method: str, path: str, body: bytes, take: Take) -> Answer:
        """Send one request; `take` gets the body of a 200, piece by piece. Raises `RemoteError`."""
        request = (
            f"{method} {path} HTTP/1.1\r\n{self._headers}"
            f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
        ).encode("latin-1") + body
        connection = await self._connection()
        answer = await connection.ask(request, take)
        if connection.is_open:
            connection.idle_since = time.monotonic()
            self._idle.append(connection)
        return answer

    async def _connection(self) -> _Connection:
        oldest = time.monotonic() - REUSED_FOR
        while self._idle:
            connection = self._idle.pop()
            if connection.is_open and connection.idle_since > oldest:
                return connection
            connection.close()
        return await self._connect()

    async def _connect(self) -> _Connection:
        loop = asyncio.get_running_loop()
        try:
            _, connection = await loop.create_connection(_Connection, self._host, self._port, ssl=self._tls)
        except OSError as error:
            kind, hint = _sort(error)
            why = str(error) if kind == "no connection" else kind
            raise Unreachable(f"{self.place} does not answer: {why}", hint, kind) from error
        return connection

    def close(self) -> None:
        """Close the connections that are kept."""
        while self._idle:
            self._idle.pop().close()


def _sort(error: OSError) -> tuple[str, str]:
    """What kind of failure this is, and a hint."""
    if isinstance(error, ssl.SSLError):
        return "no TLS", "SSL_CERT_FILE names a file of certificates to trust; does the server speak https?"
    if isinstance(error, socket.gaierror):
        return "no such host", "is the name right?"
    refused = f"[Errno {errno.ECONNREFUSED}]"  # of several addresses asyncio has the texts alone
    if isinstance(error, ConnectionRefusedError) or refused in str(error):
        return "connection refused", "is the address right, and does the server run?"
    return "no connection", "is the address right, and does the server run?"


def _number(text: bytes, base: int) -> int:
    try:
        number = int(text, base)
    except ValueError:
        number = -1
    if number < 0:
        raise _unreadable(f"{text[:20]!r} is no length")
    return number


def _nothing(_: bytes) -> None:
    """Takes no notice."""


def _unreadable(why: str) -> Unreadable:
    return Unreadable(f"the server's answer cannot be read: {why}", "is it a server of HTTP?", "unreadable answer")
