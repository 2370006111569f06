"""One connection of the router's, over a real socket: who leaves, who does not read, and how it ends."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from typing import Any

import h11
import pytest
import uvicorn

from quire.router.http import GONE, MAX_HEADER_BYTES, Framing, Protocol, State
from quire_schemas.wire import HttpSettings

POST = b"POST / HTTP/1.1\r\nHost: localhost\r\n"


class Place:
    """A server, and an application that answers how long the body was."""

    def __init__(self) -> None:
        self.state = State()
        self.port = 0
        self.came = asyncio.Event()
        """A request has."""
        self.left = asyncio.Event()
        """Its client has."""
        self.waits = False
        """The answer waits for the client to leave."""
        self.fills = False
        """The answer goes on until some of it waits here."""

    async def app(self, scope: Any, receive: Any, send: Any) -> None:
        self.came.set()
        size, more = 0, True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            size, more = size + len(message["body"]), message["more_body"]
        if self.waits:
            await scope[GONE]
            self.left.set()
            return
        await send({"type": "http.response.start", "status": 200, "headers": []})
        (connection,) = self.state.connections
        while self.fills and not connection.transport.get_write_buffer_size():
            await send({"type": "http.response.body", "body": bytes(4000), "more_body": True})
        await send({"type": "http.response.body", "body": b"%d" % size, "more_body": False})


@contextlib.asynccontextmanager
async def served(**settings: float) -> AsyncIterator[Place]:
    place = Place()
    config = uvicorn.Config(place.app, interface="asgi3", proxy_headers=False, lifespan="off", log_config=None)
    protocol = Protocol.under(lambda: HttpSettings(**settings))  # type: ignore[arg-type]
    listening = socket.create_server(("127.0.0.1", 0))
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    place.port = listening.getsockname()[1]
    server = await asyncio.get_running_loop().create_server(
        lambda: protocol(config, place.state, {}), sock=listening
    )
    try:
        yield place
    finally:
        server.close()
        for connection in list(place.state.connections):
            connection.transport.abort()


async def ended(place: Place) -> None:
    async with asyncio.timeout(5):
        while place.state.connections:
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("size", [1_000, 100_000, 300_000])
async def test_who_leaves_is_seen_however_long_the_body_was(size: int) -> None:
    async with served() as place:
        place.waits = True
        _, writer = await asyncio.open_connection("127.0.0.1", place.port)
        writer.write(POST + b"Content-Length: %d\r\n\r\n" % size + bytes(size))
        await writer.drain()
        await asyncio.wait_for(place.came.wait(), 5)
        writer.close()
        await asyncio.wait_for(place.left.wait(), 5)


async def test_a_body_on_its_way_is_read_to_its_end_when_the_server_ends() -> None:
    async with served() as place:
        reader, writer = await asyncio.open_connection("127.0.0.1", place.port)
        writer.write(POST + b"Content-Length: 10\r\n\r\n01234")
        await asyncio.wait_for(place.came.wait(), 5)
        for connection in place.state.connections:
            connection.shutdown()
        writer.write(b"56789")
        answer = await asyncio.wait_for(reader.read(), 5)
        assert answer.startswith(b"HTTP/1.1 200 ")
        assert b"\r\nconnection: close\r\n" in answer
        assert b"\r\n10\r\n" in answer
        writer.close()


async def test_who_does_not_read_the_end_of_an_answer_is_cut() -> None:
    async with served(send_seconds=0.2) as place:
        place.fills = True
        with socket.socket() as lazy:
            lazy.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            lazy.connect(("127.0.0.1", place.port))
            lazy.sendall(POST + b"Connection: close\r\nContent-Length: 0\r\n\r\n")
            await asyncio.wait_for(place.came.wait(), 5)
            await ended(place)


async def test_who_comes_when_the_server_ends_is_let_go() -> None:
    async with served() as place:
        place.state.ending = True
        reader, writer = await asyncio.open_connection("127.0.0.1", place.port)
        assert await asyncio.wait_for(reader.read(), 5) == b""
        writer.close()


@pytest.mark.parametrize("at_once", [True, False])
@pytest.mark.parametrize(
    ("end", "is_sound"),
    [
        (b"\r\n", True),
        (b"X-A: b\r\nX-B: c\r\n\r\n", True),
        (b"\n", False),
        (b"X-A: b\n\r\n", False),
        (b"X-A: b\r\n\n", False),
        (b"X-A: b\n\n", False),
        (b"X-A: b\nX-B: c\r\n\r\n", False),
        (b"X-A: b\r\n c\r\n\r\n", False),
        (b"X-A: b\rX-B: c\r\n\r\n", False),
    ],
)
def test_headers_behind_chunks_are_read_by_the_book(end: bytes, is_sound: bool, at_once: bool) -> None:
    data = POST + b"Transfer-Encoding: chunked\r\n\r\n3\r\na\nb\r\n0\r\n" + end
    behind = b"GET / HTTP/1.1\r\n\r\n"
    reader, found = Framing(h11.SERVER, MAX_HEADER_BYTES), []

    def read(piece: bytes) -> None:
        reader.receive_data(piece)
        while not isinstance(event := reader.next_event(), type):
            found.append(event)

    def read_all() -> None:
        for piece in [data + behind] if at_once else [*(data[at : at + 1] for at in range(len(data))), behind]:
            read(piece)

    if is_sound:
        read_all()
        assert isinstance(found[-1], h11.EndOfMessage)
        assert b"".join(bytes(event.data) for event in found if isinstance(event, h11.Data)) == b"a\nb"
    else:
        with pytest.raises(h11.RemoteProtocolError):
            read_all()
