"""One end of the line between the head of a router and one of its workers: messages out, in frames of all that
came up in one turn of the loop, and messages in, in their order."""

from __future__ import annotations

import asyncio
import hashlib
import importlib.metadata
import inspect
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Generic, TypeVar

import msgspec

from quire_schemas import telling, wire, workers

Out = TypeVar("Out", bound=msgspec.Struct)
In = TypeVar("In")


def version() -> str:
    """What is spoken over a line, and to a teller, by what is installed: the product's version, and the
    shapes of all messages. Two processes that were started from different ones do not understand each other."""
    shapes = b"".join(Path(inspect.getfile(module)).read_bytes() for module in (wire, workers, telling))
    return f"{importlib.metadata.version('quire')}-{hashlib.sha256(shapes).hexdigest()[:16]}"


class Line(Generic[Out, In]):
    """`frames` are the kinds of frame that go out and come in, each with its messages as `items`."""

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, outgoing: Any, incoming: Any
    ) -> None:
        self._frames: wire.Reader[Any] = wire.Reader(reader, incoming)
        self._writer = writer
        self._outgoing = outgoing
        self._items: list[Out] = []
        self._loop = asyncio.get_running_loop()

    @classmethod
    async def over(cls, end: socket.socket, outgoing: Any, incoming: Any) -> Line[Out, In]:
        """The line over one end of a socket pair."""
        reader, writer = await asyncio.open_unix_connection(sock=end)
        return cls(reader, writer, outgoing, incoming)

    def tell(self, message: Out) -> None:
        """Send it, behind all that was told before. To an end that is gone nothing is sent."""
        if not self._items:
            self._loop.call_soon(self.flush)
        self._items.append(message)

    def flush(self) -> None:
        """Send now what was told in this turn of the loop."""
        items, self._items = self._items, []
        if items and not self._writer.transport.is_closing():
            self._writer.write(wire.frame(self._outgoing(items)))

    async def heard(self) -> AsyncIterator[In]:
        """What comes in, until the other end is gone. Raises `WireError`."""
        try:
            while (frame := await self._frames.read()) is not None:
                for item in frame.items:
                    yield item
        except (ConnectionError, asyncio.IncompleteReadError):
            return

    def close(self) -> None:
        self._writer.transport.abort()
