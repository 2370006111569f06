"""The playground's way to the router: a chat's stream passes through the console's own listener, so that the page
needs no leave of the gateway's to ask from another origin.

There is one kind of request, a streamed chat, and the list of models to choose from. A key that the gateway asks
for comes in a header of its own, as `Authorization` is the console's. Where the page leaves, the connection to the
router is closed at once, and the engine stops. A page that does not read is cut off once `MAX_WAITING` bytes wait.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any, Final

from litestar.types import Receive, Scope, Send

from quire import endpoint
from quire.console.load import Router
from quire.remote.errors import RemoteError
from quire.remote.http import Http

MAX_BODY: Final = 4 * 1024 * 1024
MAX_WAITING: Final = 4 * 1024 * 1024
KEY_HEADER: Final = b"x-gateway-key"
MAX_KEY: Final = 1024
_JSON, _EVENTS = b"application/json", b"text/event-stream; charset=utf-8"
_PASSED_ON: Final = ("retry-after", "x-request-id")


class Relay:
    """An ASGI application that asks the router one thing: `path` there, by GET without a stream, by POST with."""

    def __init__(self, router: Callable[[], Router], method: str, path: str) -> None:
        self._router = router
        self._method = method
        self._path = path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        answer = _Answer(send, _EVENTS if self._method == "POST" else _JSON)
        try:
            body = await _body(receive) if self._method == "POST" else b""
            if body is None:
                return
            headers = _headers(scope)
        except ValueError as error:
            await answer.refuse(400, "bad_request", str(error))
            return
        router = self._router()
        if router.away is not None:
            await answer.refuse(503, "router_away", router.away, "platform get gateway")
            return
        asking = asyncio.create_task(self._ask(router, headers, body, answer))
        leaving = asyncio.create_task(_left(receive))
        try:
            await asyncio.wait((asking, leaving), return_when=asyncio.FIRST_COMPLETED)
        finally:
            asking.cancel()
            leaving.cancel()
            await asyncio.gather(asking, leaving, return_exceptions=True)

    async def _ask(self, router: Router, headers: dict[str, str], body: bytes, answer: _Answer) -> None:
        try:
            http = Http(router.base_url, headers, endpoint.trust(router.base_url, router.certificate))
        except OSError as error:
            await answer.refuse(502, "router_away", f"cannot read the router's certificate: {error}")
            return
        passing = asyncio.create_task(answer.pass_on())
        try:
            found = await http.ask(self._method, self._path, body, answer.take)
            answer.end()
            await passing
            if not answer.began:
                more = [
                    (name.encode(), found.headers[name].encode()) for name in _PASSED_ON if name in found.headers
                ]
                await answer.whole(found.status, found.body, more)
        except RemoteError as error:
            answer.end()
            await passing
            await answer.refuse(502, "router_away", error.message, error.hint)
        finally:
            passing.cancel()
            await asyncio.gather(passing, return_exceptions=True)
            http.close()


class _Answer:
    """What goes back to the page: a 200 as it comes, anything else as a whole."""

    def __init__(self, send: Send, kind: bytes) -> None:
        self._send = send
        self._kind = kind
        self._waiting: asyncio.Queue[bytes | None] = asyncio.Queue()
        self._size = 0
        self.began = False

    def take(self, piece: bytes) -> None:
        """A piece of a 200's body, within the event loop's call. Raises `RemoteError` when too much waits."""
        self._size += len(piece)
        if self._size > MAX_WAITING:
            raise RemoteError("the page does not read what it asked for", kind="slow page")
        self._waiting.put_nowait(piece)

    def end(self) -> None:
        self._waiting.put_nowait(None)

    async def pass_on(self) -> None:
        """Send what was taken, until `end`."""
        while (piece := await self._waiting.get()) is not None:
            await self._begin()
            self._size -= len(piece)
            await self._send({"type": "http.response.body", "body": piece, "more_body": True})
        if self.began:
            await self._send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _begin(self) -> None:
        if not self.began:
            self.began = True
            headers = [(b"content-type", self._kind)]
            await self._send({"type": "http.response.start", "status": 200, "headers": headers})

    async def refuse(self, status: int, code: str, message: str, hint: str | None = None) -> None:
        """An error of our own. Of a stream that has begun nothing more can be said: that it has no end says it."""
        if not self.began:
            error = {"code": code, "message": message, "hint": hint}
            await self.whole(status, json.dumps({"error": error}).encode(), [])

    async def whole(self, status: int, body: bytes, more: list[tuple[bytes, bytes]]) -> None:
        headers = [(b"content-type", _JSON), (b"content-length", b"%d" % len(body)), *more]
        await self._send({"type": "http.response.start", "status": status, "headers": headers})
        await self._send({"type": "http.response.body", "body": body, "more_body": False})


def _headers(scope: Scope) -> dict[str, str]:
    """What the router is told besides the body. Raises ValueError."""
    keys = [value for name, value in scope["headers"] if name == KEY_HEADER]
    if not keys:
        return {}
    key = keys[0].decode("latin-1")
    if len(keys) > 1 or len(key) > MAX_KEY or not all("!" <= letter <= "~" for letter in key):
        raise ValueError("the gateway's key has letters that no key has")
    return {"authorization": f"Bearer {key}"}


async def _body(receive: Receive) -> bytes | None:
    """The request's body, a JSON object that asks for a stream; None for a client that left. Raises ValueError."""
    body = bytearray()
    while True:
        message: Any = await receive()
        if message["type"] == "http.disconnect":
            return None
        body += message.get("body", b"")
        if len(body) > MAX_BODY:
            raise ValueError(f"the body is above {MAX_BODY} bytes")
        if not message.get("more_body"):
            break
    asked = json.loads(body)
    if not isinstance(asked, dict) or asked.get("stream") is not True:
        raise ValueError("the console asks for streams only: an object with stream: true")
    return bytes(body)


async def _left(receive: Receive) -> None:
    """Returns when the page is gone."""
    while (await receive())["type"] != "http.disconnect":
        pass
