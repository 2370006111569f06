"""A client inside this process, which goes the same road as one that comes by HTTP."""

from __future__ import annotations

import asyncio
import uuid
from typing import Any, cast

from litestar.types import ASGIApp, Message, Scope

from quire.router.access import VISIT, Visit
from quire.router.http import GONE


class InsideClient:
    """Waits for the whole answer to one request, or leaves once `gone` is set. `visit` says in whose name."""

    def __init__(self, path: str, body: bytes, gone: asyncio.Event, visit: Visit) -> None:
        self.status: int | None = None
        self.headers: dict[bytes, bytes] = {}
        self.body = bytearray()
        self.request_id = f"req_{uuid.uuid4().hex}"
        self.scope: dict[str, Any] = {
            "type": "http",
            "method": "POST",
            "path": path,
            "server": None,
            VISIT: visit,
            "headers": [
                (b"content-type", b"application/json"),
                (b"content-length", str(len(body)).encode()),
                (b"x-request-id", self.request_id.encode()),
            ],
        }
        self._sent = body
        self._gone = gone
        self._has_sent = False

    async def ask(self, app: ASGIApp) -> None:
        """Send it to what answers it, and wait for that."""
        leaves = asyncio.ensure_future(self._gone.wait())
        self.scope[GONE] = leaves
        try:
            await app(cast(Scope, self.scope), self.receive, self.send)
        finally:
            leaves.cancel()

    async def receive(self) -> Any:
        if not self._has_sent:
            self._has_sent = True
            return {"type": "http.request", "body": self._sent, "more_body": False}
        await self._gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self.headers = dict(message["headers"])
        elif message["type"] == "http.response.body":
            self.body += message["body"]
