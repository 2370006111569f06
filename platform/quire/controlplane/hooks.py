"""Where git servers say that something was pushed: a listener of its own, on loopback, open only while a source
has `spec.webhook`.

    POST /hooks/NAME      signed by the secret of the source NAME -> 202, and the repository is looked at soon

A notification is a hint and nothing else: what it says is never read. Its body goes through the signature and is
dropped as it comes, so it needs no memory; the source then asks the repository itself, at most once in
`quire_operators.gitops.HINT_SECONDS` however many come. Who cannot sign learns nothing: a name that is not there,
a source without a webhook and a wrong signature have one answer.

Sources that name one port share a listener. TLS, and being reached by others, is for a proxy in front of it.
"""

from __future__ import annotations

import asyncio
import errno
import hashlib
import hmac
import logging
import socket
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import uvicorn

from quire.serving import Server

log = logging.getLogger(__name__)

HOST: Final = "127.0.0.1"
PREFIX: Final = "/hooks/"
MAX_BODY: Final = 25 * 1024 * 1024
"""What GitHub sends at most."""
SECONDS: Final = 10.0
"""For one notification as a whole."""
Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]
SIGNATURES: Final = {
    "github": b"x-hub-signature-256",
    "gitea": b"x-gitea-signature",
    "gitlab": b"x-gitlab-token",
    "generic": b"x-hub-signature-256",
}


@dataclass(frozen=True, slots=True)
class Hook:
    """What a source takes notifications by."""

    provider: str
    secret: str


class Signature:
    """Judges one notification: fed with its body as it comes."""

    def __init__(self, hook: Hook, headers: Mapping[bytes, bytes]) -> None:
        self._hook = hook
        self._given = headers.get(SIGNATURES[hook.provider], b"")
        self._digest = hmac.new(hook.secret.encode(), digestmod=hashlib.sha256)

    def feed(self, part: bytes) -> None:
        self._digest.update(part)

    def holds(self) -> bool:
        """Whether it was signed by who knows the secret; compared in constant time."""
        if self._hook.provider == "gitlab":
            return hmac.compare_digest(self._given, self._hook.secret.encode())
        expected = self._digest.hexdigest().encode()
        given = self._given if self._hook.provider == "gitea" else self._given.removeprefix(b"sha256=")
        return hmac.compare_digest(given, expected)


class Hooks:
    """The listeners of one control plane. `find` gives what the source of a name takes notifications by on a port,
    or None; `hint` is told of a source whose notification was good."""

    def __init__(self, find: Callable[[str, int], Hook | None], hint: Callable[[str], None]) -> None:
        self._find = find
        self._hint = hint
        self._servers: dict[int, tuple[Server, asyncio.Task[None]]] = {}
        self._problems: dict[int, str] = {}
        self._turn = asyncio.Lock()

    def problem(self, port: int) -> str | None:
        """Why nothing listens on a port that was wanted; None when it does."""
        return self._problems.get(port, None if port in self._servers else "it does not listen yet")

    async def settle(self, ports: set[int]) -> None:
        """Listen on these ports and on no other."""
        async with self._turn:
            for port in self._servers.keys() - ports:
                server, serving = self._servers.pop(port)
                server.should_exit = True
                await serving
            self._problems = {port: why for port, why in self._problems.items() if port in ports}
            for port in ports - self._servers.keys():
                await self._listen(port)

    async def close(self) -> None:
        await self.settle(set())

    async def _listen(self, port: int) -> None:
        listening = socket.socket()
        try:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind((HOST, port))
        except OSError as error:
            listening.close()
            what = "is in use by another program" if error.errno == errno.EADDRINUSE else str(error.strerror)
            self._problems[port] = f"{HOST}:{port} {what}"
            return
        self._problems.pop(port, None)

        async def app(scope: dict[str, Any], receive: Receive, send: Send) -> None:
            await self._answer(port, scope, receive, send)

        config = uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            server_header=False,
            lifespan="off",
            timeout_graceful_shutdown=1,
            timeout_keep_alive=5,
            limit_concurrency=32,
            ws="none",
        )
        server = Server(config)
        serving = asyncio.create_task(server.serve(sockets=[listening]), name=f"hooks on {port}")
        while not server.started and not serving.done():
            await asyncio.sleep(0.005)
        self._servers[port] = server, serving

    async def _answer(self, port: int, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        status = await self._judge(port, scope, receive)
        await send({"type": "http.response.start", "status": status, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body", "body": b""})

    async def _judge(self, port: int, scope: dict[str, Any], receive: Receive) -> int:
        path = str(scope["path"])
        if not path.startswith(PREFIX):
            return 404
        if scope["method"] != "POST":
            return 405
        name = path.removeprefix(PREFIX)
        hook = self._find(name, port)
        signature = Signature(hook or Hook("generic", ""), dict(scope["headers"]))
        size = 0
        try:
            async with asyncio.timeout(SECONDS):
                while True:
                    message = await receive()
                    if message["type"] != "http.request":  # the sender left
                        return 400
                    part = message.get("body", b"")
                    size += len(part)
                    if size > MAX_BODY:
                        return 413
                    signature.feed(part)
                    if not message.get("more_body", False):
                        break
        except TimeoutError:
            return 408
        if not signature.holds() or hook is None:
            log.warning("a notification for %r was not signed by its secret", name[:64])
            return 401
        self._hint(name)
        return 202
