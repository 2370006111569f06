"""One HTTP server around an application that does next to nothing: what `servers` measures.

    python -m benchmarks.bare SERVER LOOP        the port that it listens on is told on stdout

The application reads the body. It answers `/whole` with `ANSWER` at once, and `/stream` with `CHUNKS` pieces, each
of them sent by itself and after others had their turn, as those of an engine's steps are.
"""

from __future__ import annotations

import asyncio
import importlib.util
import os
import socket
import sys
from typing import Any, Final

ANSWER: Final = b'{"choices":[{"message":{"content":"' + b"a" * 350 + b'"}}]}'
CHUNK: Final = b'data: {"choices":[{"index":0,"delta":{"content":"' + b"a" * 8 + b'"},"finish_reason":null}]}\n\n'
CHUNKS: Final = 100
SERVERS: Final = {
    "quire": ("quire",),
    "uvicorn-h11": ("uvicorn", "h11"),
    "uvicorn-httptools": ("uvicorn", "httptools"),
    "granian": ("granian",),
}
"""What each needs to be installed."""
LOOPS: Final = ("asyncio", "uvloop")


def is_there(*modules: str) -> bool:
    return all(importlib.util.find_spec(name) is not None for name in modules)


async def app(scope: Any, receive: Any, send: Any) -> None:
    while (await receive()).get("more_body"):
        pass
    whole = scope["path"] == "/whole"
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(ANSWER))]
    if not whole:
        headers = [(b"content-type", b"text/event-stream")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    for _ in range(0 if whole else CHUNKS):
        await send({"type": "http.response.body", "body": CHUNK, "more_body": True})
        await asyncio.sleep(0)
    await send({"type": "http.response.body", "body": ANSWER if whole else b"", "more_body": False})


def _granian(listening: socket.socket, loop: str) -> None:
    from granian import Granian
    from granian.constants import Interfaces, Loops

    port = listening.getsockname()[1]
    listening.close()
    Granian("benchmarks.bare:app", address="127.0.0.1", port=port, interface=Interfaces.ASGI, workers=1,
            loop=Loops(loop), log_enabled=False, websockets=False).serve()  # fmt: skip


def _uvicorn(listening: socket.socket, name: str, loop: str) -> None:
    import uvicorn

    plain: dict[str, Any] = {"ws": "none", "lifespan": "off", "log_config": None, "access_log": False}
    if name == "quire":
        from quire.router.http import Protocol
        from quire.router.server import Server
        from quire_schemas.wire import HttpSettings

        settings = HttpSettings()
        config = uvicorn.Config(
            app, http=Protocol.under(lambda: settings), server_header=False, proxy_headers=False, **plain
        )
        server: uvicorn.Server = Server(config, 1.0, lambda: None, lambda _: None)
    else:
        config = uvicorn.Config(app, http=name.removeprefix("uvicorn-"), **plain)
        server = uvicorn.Server(config)
    factory = asyncio.new_event_loop
    if loop == "uvloop":
        import uvloop

        factory = uvloop.new_event_loop
    with asyncio.Runner(loop_factory=factory) as runner:
        runner.run(server.serve(sockets=[listening]))


def main() -> None:
    name, loop = sys.argv[1:]
    # asyncio sends small writes at once (TCP_NODELAY) only on sockets that say which protocol they are of
    listening = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listening.bind(("127.0.0.1", 0))
    listening.listen(1024)
    listening.setblocking(False)
    os.write(1, b"%d\n" % listening.getsockname()[1])
    if name == "granian":
        _granian(listening, loop)
    else:
        _uvicorn(listening, name, loop)


if __name__ == "__main__":
    main()
