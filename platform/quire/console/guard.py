"""What every request to the console passes before anything else looks at it.

- **Host**: only names of loopback. A web page that makes its own name resolve to 127.0.0.1 sends its own name.
- **Origin**: a request that a page sends has to come from the console's own, at the same name and port. There are
  no headers that would let another page read an answer.
- **Token**: without `Authorization: Bearer` and the token of a link there are only the page's files, which tell
  nothing. A token in a path or query is not looked at: those end up in logs and histories.
- **JSON**: what is sent has to say that it is; a form of another page cannot.
- **Headers** of every answer: a policy under which the page runs its own scripts alone, and none that is made of
  text; no frame around it; nothing of data kept by caches.

Answers that are whole carry a hash as their ETag, and a browser that has the same already is told so (304): the
page asks every few seconds, and mostly nothing has changed.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any, Final

from litestar.types import ASGIApp, Message, Receive, Scope, Send

from quire.console.links import Links

Headers = Mapping[bytes, list[bytes]]
NAMES: Final = frozenset({"localhost", "127.0.0.1", "[::1]"})
_HOST: Final = re.compile(r"(\[[0-9a-f:.]+\]|[a-z0-9._-]+)(:[0-9]{1,5})?")
_TOKEN: Final = re.compile(r"(?i:bearer) ([A-Za-z0-9_-]{1,128})")
_POLICY: Final = (
    b"default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    b"base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    b"require-trusted-types-for 'script'; trusted-types 'none'"
)
_ALWAYS: Final = (
    (b"content-security-policy", _POLICY),
    (b"x-frame-options", b"DENY"),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cross-origin-resource-policy", b"same-origin"),
)
_READS: Final = ("GET", "HEAD")


class _Turned(Exception):
    """A request that goes no further."""

    def __init__(self, status: int, code: str, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.body = json.dumps({"error": {"code": code, "message": message, "hint": hint, "exitCode": 1}}).encode()


class Guard:
    """An ASGI application around the console's; `files` is `files.load()`."""

    def __init__(self, app: ASGIApp, links: Links, files: Mapping[str, tuple[bytes, str]]) -> None:
        self._app = app
        self._links = links
        self._files = files

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        method, path = str(scope.get("method")), str(scope["path"])
        headers: dict[bytes, list[bytes]] = {}
        given: list[tuple[bytes, bytes]] = list(scope["headers"])
        for name, value in given:
            headers.setdefault(name, []).append(value)
        out = _Answer(send, _one(headers, b"if-none-match") if method in _READS else b"")
        try:
            _check_site(headers)
            if (found := self._files.get(path)) is not None:
                await out.whole(*self._file(method, *found))
                return
            self._check_token(headers)
            _check_json(method, headers)
        except _Turned as refusal:
            more = [(b"www-authenticate", b"Bearer")] if refusal.status == 401 else []
            await out.whole(refusal.status, refusal.body, b"application/json", [*more, (b"connection", b"close")])
            return
        await self._app(scope, receive, out.send)

    @staticmethod
    def _file(method: str, body: bytes, kind: str) -> tuple[int, bytes, bytes, list[tuple[bytes, bytes]]]:
        if method not in _READS:
            raise _Turned(405, "method_not_allowed", "this is a file of the page")
        # asked for again each time, by its hash: after an upgrade the page is a new one as a whole
        return 200, body if method == "GET" else b"", kind.encode(), [(b"cache-control", b"no-cache")]

    def _check_token(self, headers: Headers) -> None:
        stated = _TOKEN.fullmatch(_one(headers, b"authorization").decode("latin-1"))
        if stated is None or not self._links.knows(stated[1]):
            text = "this link does not count, or counts no longer"
            raise _Turned(401, "unauthorized", text, "platform console prints one that does")


def _one(headers: Headers, name: bytes) -> bytes:
    """The value of a header that is there once; empty for one that is not, or is there twice."""
    found = headers.get(name, [])
    return found[0] if len(found) == 1 else b""


def _check_site(headers: Headers) -> None:
    host = _one(headers, b"host").decode("latin-1").lower()
    named = _HOST.fullmatch(host)
    if named is None or named[1] not in NAMES:
        raise _Turned(403, "host_refused", "the console answers to names of this machine's loopback only")
    own = [f"http://{host}"]
    if [value.decode("latin-1").lower() for value in headers.get(b"origin", [])] not in ([], own):
        raise _Turned(403, "origin_refused", "the console takes requests from its own page only")


def _check_json(method: str, headers: Headers) -> None:
    if method in _READS:
        return
    kind = _one(headers, b"content-type").partition(b";")[0].strip().lower()
    if kind != b"application/json":
        raise _Turned(415, "not_json", "the body has to be JSON, and content-type has to say so")


class _Answer:
    """Sends an answer with the headers that all have, and none at all where the asker has the same already."""

    def __init__(self, send: Send, known: bytes) -> None:
        self._send = send
        self._known = known
        self._start: dict[str, Any] | None = None

    async def whole(self, status: int, body: bytes, kind: bytes, more: list[tuple[bytes, bytes]]) -> None:
        headers = [(b"content-type", kind), (b"content-length", b"%d" % len(body)), *more]
        await self.send({"type": "http.response.start", "status": status, "headers": headers})
        await self.send({"type": "http.response.body", "body": body, "more_body": False})

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = [*message["headers"], *_ALWAYS]
            if not any(name == b"cache-control" for name, _ in headers):
                headers.append((b"cache-control", b"no-store"))
            self._start = {**message, "headers": headers}
            return
        told: Any = message
        start, self._start = self._start, None
        if start is not None:
            body: bytes = told.get("body", b"")
            if start["status"] == 200 and body and not told.get("more_body"):
                tag = b'"' + hashlib.sha256(body).hexdigest()[:32].encode() + b'"'
                start["headers"].append((b"etag", tag))
                if tag == self._known:
                    kept = [pair for pair in start["headers"] if not pair[0].startswith(b"content-")]
                    start, told = {**start, "status": 304, "headers": kept}, {**told, "body": b""}
            await self._send(start)  # type: ignore[arg-type]
        await self._send(told)
