"""What every request passes before any route is looked at.

- **Host**: only names we answer to. A web page that makes its own name resolve to 127.0.0.1 sends its own name
  here, and is turned away; so is a page whose `Origin` is not one of these names. A Host that is no host is a
  400. Probes come by address, so `/livez` and `/readyz` answer to any address in place of a name: no page's name
  is one.
- **Origin**: a web page of an origin that the gateway's manifest allows may call and read the answers; its browser
  asks beforehand (a preflight), and is answered here.
- **Key**: whoever sent it is found out here (`access`), and the answer tells him of his limits; what he may do is
  decided on the route that the request matches. A preflight carries no key and needs none.
- **Framing**: what two servers could read in two ways is refused and its connection closed: Content-Length beside
  Transfer-Encoding, chunks in HTTP/1.0, heads with folded lines or with ends of line that are not CRLF
  (`http`), and a target that is neither a path nor a URL.
- **Size**: a bounded number of headers of bounded length.
- **Request id**: the client's `X-Request-Id` when it is a plain word, else one of our own, on every answer; beside
  it `openai-processing-ms`, the time from the request to the first byte of its answer.
- **Account**: opened here, and told to the access log when the request has ended.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import re
import time
from collections.abc import Awaitable, Callable, Collection, Iterable
from typing import Any, Final, cast

from litestar.types import ASGIApp, Message, Receive, Scope, Send

from quire.errors import Api, ApiError, HostRefused, InvalidRequest, describe
from quire.router.access import VISIT, Access
from quire.router.account import METHODS, AccessLog, Account, new_request_id
from quire.router.desk import Headers
from quire.router.http import MAX_HEADER_BYTES
from quire_schemas.wire import HttpSettings, Tenant

log = logging.getLogger("quire.router")
MAX_HEADERS: Final = 100
_HOST: Final = re.compile(r"(\[[0-9a-f:.]+\]|[a-z0-9._-]+)(?::[0-9]{1,5})?")
_ABSOLUTE: Final = re.compile(r"https?://([^/]+)(/.*)", re.DOTALL | re.IGNORECASE)
"""A target as proxies are given it; it is the same as its path."""
_ORIGIN: Final = re.compile(r"https?://(.+)")
_HEADER_NAMES: Final = re.compile(rb"[A-Za-z0-9!#$%&'*+.^_`|~ ,-]{0,1024}")
_PREFLIGHT_SECONDS: Final = b"600"
_READABLE: Final = b", ".join(
    [
        b"x-request-id, request-id, retry-after, retry-after-ms, x-should-retry, openai-processing-ms",
        b"x-quire-budget, x-quire-model",
        *(
            f"x-ratelimit-{word}-{kind}".encode()
            for word in ("limit", "remaining", "reset")
            for kind in ("requests", "tokens")
        ),
    ]
)
"""Headers of answers that pages may read besides the few that they always may."""
_DRAINED: Final = 16 * 1024 * 1024
_DRAIN_SECONDS: Final = 5.0
"""How much of a refused body is read, and for how long: a client cut off while it sends never sees why."""
_PROBED: Final = frozenset({"/livez", "/readyz"})
_ELSEWHERE: Final = (
    "This server does not answer to that Host: spec.hosts of its Gateway names those that it answers to, besides "
    "localhost and the address that it is bound to."
)
_WORD: Final = re.compile(rb"[A-Za-z0-9._-]{1,64}")


class Guard:
    """An ASGI application around the router's, which finds the `Visit` of each request in its scope. `limits`
    gives what an answer tells of its caller's, `settings` those in force now; `count` is told of an answer with an
    error to a caller who is known: his policy, and the error's code."""

    def __init__(
        self,
        app: ASGIApp,
        allowed_hosts: Collection[str],
        access: Access,
        access_log: AccessLog,
        limits: Callable[[Tenant | None, str], Awaitable[Headers]],
        count: Callable[[str, str], None],
        settings: Callable[[], HttpSettings] = HttpSettings,
    ) -> None:
        self._app = app
        self._limits = limits
        self._count = count
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
            if account.policy and account.error:
                self._count(account.policy, account.error)
            self._log.tell(account)

    async def _pass(self, account: Account, scope: Scope, receive: Receive, send: Send) -> None:
        headers: list[tuple[bytes, bytes]] = list(scope["headers"])
        stated = next((value for name, value in headers if name == b"x-request-id"), b"")
        request_id = stated if _WORD.fullmatch(stated) else new_request_id()
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
        if visit.caller is not None:
            account.policy, account.key = visit.caller.owner, visit.caller.key
        cast(dict[str, Any], scope)[VISIT] = visit
        # who waits for our word before it sends the body is told the answer instead
        waits = any(name == b"expect" and value.lower() == b"100-continue" for name, value in headers)
        if api is Api.ANTHROPIC:
            named.append((b"request-id", request_id))  # where its clients look

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                account.status = message["status"]
                if visit.unread and not waits:
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
                raise HostRefused(_ELSEWHERE)
            if not scope["path"].startswith("/"):
                raise InvalidRequest("The target of the request is neither a path nor a URL.")
            self._check(
                headers,
                foreign=bool(crossing),
                old=scope["http_version"] == "1.0",
                probe=scope["path"] in _PROBED,
            )
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

    def _check(self, headers: Iterable[tuple[bytes, bytes]], *, foreign: bool, old: bool, probe: bool) -> None:
        """Raises `ApiError`. `foreign`: it comes from a page whose origin is allowed, so that need not be ours;
        `old`: it is HTTP/1.0, which has no chunks; `probe`: it is for what may be asked by any address."""
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
        if found[1] not in hosts_of_ours and not (probe and _is_address(found[1])):
            raise HostRefused(_ELSEWHERE)
        for origin in values.get(b"origin", []) if not foreign else ():
            inside = _ORIGIN.fullmatch(origin.lower())
            site = _HOST.fullmatch(inside[1]) if inside else None
            if site is None or site[1] not in hosts_of_ours:
                raise HostRefused(
                    "This server does not take requests from pages of that Origin: spec.cors.allowOrigins of its "
                    "Gateway names those that it takes them from."
                )


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        return False
    return True


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
