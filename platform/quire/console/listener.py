"""The console's listener: a socket on loopback that opens when somebody asks for it, and ends with its process.

Exceptions:

    ConsoleError           has message and hint
    ├── AddressTaken       the port is another program's
    └── Elsewhere          it listens already, on another port
"""

from __future__ import annotations

import asyncio
import errno
import socket
from collections.abc import Callable, Sequence
from typing import Any, Final

import uvicorn
from litestar import Litestar, get, post
from litestar.datastructures import State
from litestar.handlers import HTTPRouteHandler
from litestar.types import ASGIApp

from quire.console import files
from quire.console.guard import Guard
from quire.console.links import Links
from quire.console.load import Load, Router
from quire.console.relay import Relay
from quire.serving import Server

PORT: Final = 8400
HOST: Final = "127.0.0.1"
MAX_BODY: Final = 64 * 1024


class ConsoleError(Exception):
    """The console cannot listen as asked."""

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class AddressTaken(ConsoleError):
    """The port is another program's."""


class Elsewhere(ConsoleError):
    """It listens already, on another port."""


class Console:
    """Listens or does not. `reads` are routes of the admin API that change nothing, over the state `rooms`;
    `refused` makes answers of their exceptions."""

    def __init__(
        self,
        reads: Sequence[HTTPRouteHandler],
        rooms: dict[str, Any],
        refused: Callable[[Any, Any], Any],
        router: Callable[[], Router],
    ) -> None:
        self._reads = reads
        self._rooms = rooms
        self._refused = refused
        self._router = router
        self._turn = asyncio.Lock()
        self._links = Links()
        self._load: Load | None = None
        self._server: Server | None = None
        self._serving: asyncio.Task[None] | None = None
        self._port: int | None = None

    def told(self) -> dict[str, Any]:
        """Whether it listens and where; never a token."""
        if self._port is None:
            return {"listening": False, "url": None, "used": False}
        return {"listening": True, "url": f"http://{HOST}:{self._port}/", "used": self._links.newest_used}

    async def open(self, port: int | None) -> str:
        """Listen, if nothing does yet, and make a link; the link. Port 0 is any free one, None the usual one or
        the one that is open. Raises `ConsoleError`."""
        async with self._turn:
            if self._port is None:
                await self._listen(PORT if port is None else port)
            elif port not in (None, 0, self._port):
                raise Elsewhere(
                    f"the console listens on port {self._port} already",
                    "platform console without --port gives a link to it; --stop closes it",
                )
            return f"http://{HOST}:{self._port}/#token={self._links.mint()}"

    async def close(self) -> bool:
        """Close it and forget all links; whether it listened."""
        async with self._turn:
            if self._server is None or self._serving is None or self._load is None:
                return False
            self._server.should_exit = True
            await self._serving
            await self._load.close()
            self._server = self._serving = self._load = self._port = None
            self._links = Links()
            return True

    async def _listen(self, port: int) -> None:
        listening = socket.socket()
        try:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind((HOST, port))
        except OSError as error:
            listening.close()
            what = "is in use by another program" if error.errno == errno.EADDRINUSE else str(error.strerror)
            raise AddressTaken(f"{HOST}:{port} {what}", "platform console --port 0 takes any free port") from error
        load = Load(self._router)
        config = uvicorn.Config(
            Guard(self._app(load), self._links, files.load()),
            log_config=None,
            access_log=False,
            server_header=False,
            lifespan="off",
            timeout_graceful_shutdown=1,
            limit_concurrency=200,
            ws="none",
        )
        server = Server(config)
        serving = asyncio.create_task(server.serve(sockets=[listening]), name="console")
        while not server.started and not serving.done():
            await asyncio.sleep(0.005)
        load.start()
        self._load, self._server, self._serving = load, server, serving
        self._port = listening.getsockname()[1]

    def _app(self, load: Load) -> Litestar:
        @get("/v1/load")
        async def read_load(after: int = 0) -> dict[str, Any]:
            return load.told(after)

        @get("/router/v1/models")
        async def read_models() -> ASGIApp:
            return Relay(self._router, "GET", "/v1/models")

        @post("/router/v1/chat/completions")
        async def chat() -> ASGIApp:
            return Relay(self._router, "POST", "/v1/chat/completions")

        return Litestar(
            [*self._reads, read_load, read_models, chat],
            state=State(self._rooms),
            exception_handlers=dict.fromkeys((Exception,), self._refused),
            request_max_body_size=MAX_BODY,
            openapi_config=None,
            logging_config=None,
        )
