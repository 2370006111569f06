"""Small answers that are ready to send, and what a path names."""

from __future__ import annotations

from typing import Any

from litestar import Request
from litestar.types import Receive, Scope, Send

from quire.router.access import visit_of


class Reply:
    """A small answer that is ready to send."""

    def __init__(self, status: int, body: bytes, content_type: str = "application/json") -> None:
        self._start = {
            "type": "http.response.start",
            "status": status,
            "headers": [
                (b"content-type", content_type.encode()),
                (b"content-length", str(len(body)).encode()),
                (b"cache-control", b"no-store"),
            ],
        }
        self._body = body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send(self._start)  # type: ignore[arg-type]
        body = b"" if scope.get("method") == "HEAD" else self._body
        await send({"type": "http.response.body", "body": body, "more_body": False})


def named(request: Request[Any, Any, Any], parameter: str) -> str:
    """What stands in the path at `parameter`."""
    return str(request.path_params[parameter])


def owner_of(request: Request[Any, Any, Any]) -> str:
    """To whom belongs what a request makes, and what alone it may see."""
    return visit_of(request.scope).known.owner
