"""What every request passes before any route is looked at.

- **Host**: only names we answer to. A web page that makes its own name resolve to 127.0.0.1 sends its own name
  here, and is turned away; so is a page whose `Origin` is not one of these names. A Host that is no host is a
  400.
- **Origin**: a web page of an origin that the gateway's manifest allows may call and read the answers; its browser
  asks beforehand (a preflight), and is answered here.
- **Key**: whoever sent it is found out here (`access`), and the answer tells him of his limits; what he may do is
  decided on the route that the request matches. A preflight carries no key and needs none.
- **Framing**: what two servers could read in two ways is refused and its connection closed: Content-Length beside
  Transfer-Encoding, chunks in HTTP/1.0, heads with folded lines or with ends of line that are not CRLF
  (`Framing`), and a target that is neither a path nor a URL.
- **Size**: a bounded number of headers of bounded length.
- **Request id**: the client's `X-Request-Id` when it is a plain word, else one of our own, on every answer; beside
  it `openai-processing-ms`, the time from the request to the first byte of its answer.
- **Account**: opened here, and told to the access log when the request has ended.

`Protocol` is uvicorn's, with answers of our own shape to what is not HTTP, and an end to patience: a connection
that does not bring the head of a request, or whose client does not read, is cut.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import time
import uuid
from collections.abc import Awaitable, Callable, Collection, Iterable
from typing import Any, Final, cast

import h11
from litestar.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from quire.errors import Api, ApiError, HostRefused, InvalidRequest, describe
from quire.router.access import VISIT, Access
from quire.router.account import METHODS, AccessLog, Account
from quire.router.desk import Headers
from quire_schemas.wire import HttpSettings, Tenant

log = logging.getLogger("quire.router")
MAX_HEADERS: Final = 100
MAX_HEADER_BYTES: Final = 16 * 1024
_HOST: Final = re.compile(r"(\[[0-9a-f:.]+\]|[a-z0-9._-]+)(?::[0-9]{1,5})?")
_ABSOLUTE: Final = re.compile(r"https?://([^/]+)(/.*)", re.DOTALL | re.IGNORECASE)
"""A target as proxies are given it; it is the same as its path."""
_ORIGIN: Final = re.compile(r"https?://(.+)")
_GOODBYE_SECONDS: Final = 1.0
_AMBIGUOUS: Final = re.compile(rb"(?<!\r)\n|\n[ \t]|\r(?=[^\n])")
"""In a head: an end of line that is none, and a line that goes on in the next one."""
_HEADER_NAMES: Final = re.compile(rb"[A-Za-z0-9!#$%&'*+.^_`|~ ,-]{0,1024}")
_PREFLIGHT_SECONDS: Final = b"600"
_READABLE: Final = b", ".join(
    [
        b"x-request-id, request-id, retry-after, retry-after-ms, x-should-retry, openai-processing-ms",
        b"x-quire-budget",
        *(
            f"x-ratelimit-{word}-{kind}".encode()
            for word in ("limit", "remaining", "reset")
            for kind in ("requests", "tokens")
        ),
    ]
)
"""Headers of answers that pages may read besides the few that they always may."""
WAITING_BYTES: Final = 16 * 1024
"""Of answers that are kept here for a client, behind what the system keeps: what is made later waits as tokens."""
_DRAINED: Final = 16 * 1024 * 1024
_DRAIN_SECONDS: Final = 5.0
"""How much of a refused body is read, and for how long: a client cut off while it sends never sees why."""
_WORD: Final = re.compile(rb"[A-Za-z0-9._-]{1,64}")


class Guard:
    """An ASGI application around the router's, which finds the `Visit` of each request in its scope. `limits`
    gives what an answer tells of its caller's, `settings` those in force now."""

    def __init__(
        self,
        app: ASGIApp,
        allowed_hosts: Collection[str],
        access: Access,
        access_log: AccessLog,
        limits: Callable[[Tenant | None, str], Awaitable[Headers]],
        settings: Callable[[], HttpSettings] = HttpSettings,
    ) -> None:
        self._app = app
        self._limits = limits
        self._log = access_log
        self._hosts = frozenset(host.lower() for host in allowed_hosts)
        self._access = access
        self._settings = settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        account = Account()
        try:
            await self._pass(account, scope, receive, send)
        finally:
            account.route = str(scope.get("path_template") or "")
            self._log.tell(account)

    async def _pass(self, account: Account, scope: Scope, receive: Receive, send: Send) -> None:
        headers: list[tuple[bytes, bytes]] = list(scope["headers"])
        stated = next((value for name, value in headers if name == b"x-request-id"), b"")
        request_id = stated if _WORD.fullmatch(stated) else b"req_" + uuid.uuid4().hex.encode()
        method = str(scope.get("method"))
        account.request_id, account.method = request_id.decode(), method if method in METHODS else ""
        account.open(scope)

        absolute = _ABSOLUTE.fullmatch(scope["path"])
        if absolute is not None:
            scope["path"] = absolute[2]
        crossing = self._crossing(headers)
        api = Api.of(scope["path"], headers)
        named = [(b"x-request-id", request_id)]
        visit = self._access.visit(scope)
        cast(dict[str, Any], scope)[VISIT] = visit
        if api is Api.ANTHROPIC:
            named.append((b"request-id", request_id))  # where its clients look

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                account.status = message["status"]
                if visit.unread:
                    await _drain(receive)
                if visit.limited and visit.caller is not None:
                    named.extend(await self._limits(visit.caller.tenant, visit.caller.key))
                spent = b"%d" % round(1000 * (time.monotonic() - account.arrived_at))
                ours = [*named, (b"openai-processing-ms", spent)]
                message["headers"] = [*message["headers"], *crossing, *ours]
            await send(message)

        try:
            if scope["http_version"] not in ("1.0", "1.1"):
                raise InvalidRequest("HTTP/1.1 is what is spoken here.")
            if absolute is not None and (
                (host := _HOST.fullmatch(absolute[1].lower())) is None or host[1] not in self._hosts
            ):
                raise HostRefused("This server does not answer to that Host.")
            if not scope["path"].startswith("/"):
                raise InvalidRequest("The target of the request is neither a path nor a URL.")
            self._check(headers, foreign=bool(crossing), old=scope["http_version"] == "1.0")
            if crossing and (permitted := _preflight(str(scope.get("method")), headers)):
                await send_with_id({"type": "http.response.start", "status": 204, "headers": permitted})
                await send_with_id({"type": "http.response.body", "body": b"", "more_body": False})
                return
        except ApiError as error:
            answer = describe(error, api)
            closing = [*answer.headers, (b"connection", b"close")]
            await send_with_id({"type": "http.response.start", "status": answer.status, "headers": closing})
            await send_with_id({"type": "http.response.body", "body": answer.body, "more_body": False})
            return
        await self._app(scope, receive, send_with_id)

    def _crossing(self, headers: Iterable[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
        """Headers by which a browser lets the page that asks read the answer; none for an origin not allowed."""
        allowed = self._settings().allow_origins
        stated = [value for name, value in headers if name == b"origin"] if allowed else []
        if len(stated) != 1 or not ("*" in allowed or stated[0].decode("latin-1").lower() in allowed):
            return []
        origin = b"*" if "*" in allowed else stated[0]
        return [
            (b"access-control-allow-origin", origin),
            (b"access-control-expose-headers", _READABLE),
            (b"vary", b"Origin"),
        ]

    def _check(self, headers: Iterable[tuple[bytes, bytes]], *, foreign: bool, old: bool) -> None:
        """Raises `ApiError`. `foreign`: it comes from a page whose origin is allowed, so that need not be ours;
        `old`: it is HTTP/1.0, which has no chunks."""
        values: dict[bytes, list[str]] = {}
        count = size = 0
        for name, value in headers:
            count += 1
            size += len(name) + len(value)
            values.setdefault(name, []).append(value.decode("latin-1"))
        if count > MAX_HEADERS or size > MAX_HEADER_BYTES:
            raise InvalidRequest(f"The headers are above {MAX_HEADERS} in number or {MAX_HEADER_BYTES} in bytes.")
        if b"transfer-encoding" in values:
            if old:
                raise InvalidRequest("HTTP/1.0 has no Transfer-Encoding.")
            if b"content-length" in values:
                raise InvalidRequest("The request has both Content-Length and Transfer-Encoding.")
        hosts = values.get(b"host", [])
        found = _HOST.fullmatch(hosts[0].lower()) if len(hosts) == 1 else None
        if found is None:
            raise InvalidRequest("The request needs exactly one proper Host header.")
        hosts_of_ours = self._hosts.union(self._settings().hosts)
        if found[1] not in hosts_of_ours:
            raise HostRefused("This server does not answer to that Host.")
        for origin in values.get(b"origin", []) if not foreign else ():
            inside = _ORIGIN.fullmatch(origin.lower())
            site = _HOST.fullmatch(inside[1]) if inside else None
            if site is None or site[1] not in hosts_of_ours:
                raise HostRefused("This server does not take requests from pages of that Origin.")


async def _drain(receive: Receive) -> None:
    """Read a body that nobody wants."""
    size = 0
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_DRAIN_SECONDS):
            while size <= _DRAINED:
                message = await receive()
                if message["type"] != "http.request" or not message["more_body"]:
                    return
                size += len(message["body"])


def _preflight(method: str, headers: Iterable[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """Headers of the answer to a browser that asks whether a page may send a request; none for what is one."""
    asked = dict(headers)
    if method != "OPTIONS" or b"access-control-request-method" not in asked:
        return []
    answer = [
        (b"access-control-allow-methods", b"GET, POST, DELETE"),
        (b"access-control-max-age", _PREFLIGHT_SECONDS),
    ]
    names = asked.get(b"access-control-request-headers", b"")
    if names and _HEADER_NAMES.fullmatch(names):
        answer.append((b"access-control-allow-headers", names))
    if asked.get(b"access-control-request-private-network") == b"true":
        answer.append((b"access-control-allow-private-network", b"true"))
    return answer


class Framing(h11.Connection):
    """Reads heads by the book: h11 takes folded lines and bare line feeds, which some proxies see otherwise."""

    def next_event(self) -> h11.Event | type[h11.NEED_DATA] | type[h11.PAUSED]:
        if self.their_state is h11.IDLE:  # whatever waits to be read begins with a head, as far as it has come
            waiting = self.trailing_data[0]
            if _AMBIGUOUS.search(waiting, 0, end + 2 if (end := waiting.find(b"\r\n\r\n")) >= 0 else len(waiting)):
                raise h11.RemoteProtocolError(
                    "a line of the head ends otherwise than by CRLF, or goes on in the next"
                )
        return super().next_event()


class Protocol(H11Protocol):
    """Answers bytes that are not HTTP in the shape of all other errors, and waits for nobody for ever."""

    settings: Callable[[], HttpSettings] = staticmethod(HttpSettings)
    """Those in force."""
    _head: asyncio.TimerHandle | None = None
    _room: asyncio.TimerHandle | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        most = self.config.h11_max_incomplete_event_size
        self.conn = Framing(h11.SERVER) if most is None else Framing(h11.SERVER, most)

    @classmethod
    def under(cls, settings: Callable[[], HttpSettings]) -> type[Protocol]:
        """The protocol with these settings: uvicorn makes its instances by itself."""
        return type(cls.__name__, (cls,), {"settings": staticmethod(settings)})

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=WAITING_BYTES)
        self._await_head()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        for timer in (self._head, self._room):
            if timer is not None:
                timer.cancel()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._room = self.loop.call_later(self.settings().send_seconds, self._cut, "reads nothing of its answer")

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._room is not None:
            self._room.cancel()
            self._room = None

    def _await_head(self) -> None:
        """Keep the time for as long as a head is begun, or the first one not even that."""
        begun = self.cycle is None or bool(self.conn.trailing_data[0])
        if self.conn.their_state is not h11.IDLE or not begun:
            if self._head is not None:
                self._head.cancel()
                self._head = None
        elif self._head is None:
            self._head = self.loop.call_later(self.settings().head_seconds, self._cut, "brings no request")

    def _cut(self, why: str) -> None:
        log.info("a client %s, and is cut off", why)
        self.transport.abort()

    def shutdown(self) -> None:
        super().shutdown()
        self._part()

    def on_response_complete(self) -> None:
        self.timeout_keep_alive = self.settings().idle_seconds  # type: ignore[assignment]
        super().on_response_complete()
        self._await_head()  # of what came while it was being answered
        self._part()

    def _part(self) -> None:
        """TLS waits half a minute for the other side's goodbye, which a client with nothing to ask never reads."""
        if self.transport.is_closing() and self.transport.get_extra_info("ssl_object") is not None:
            self.loop.call_later(_GOODBYE_SECONDS, self._leave)

    def _leave(self) -> None:
        if self.transport.get_write_buffer_size():  # an answer is still on its way
            self.loop.call_later(_GOODBYE_SECONDS, self._leave)
        else:
            self.transport.abort()

    def send_400_response(self, msg: str) -> None:
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.close()  # an answer is on its way: there is no room for another
            return
        answer = describe(InvalidRequest("The request is not proper HTTP/1.1, or its headers are above 16 KiB."))
        headers = [*answer.headers, (b"connection", b"close")]
        for event in (
            h11.Response(status_code=answer.status, headers=headers, reason=b"Bad Request"),
            h11.Data(data=answer.body),
            h11.EndOfMessage(),
        ):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()
