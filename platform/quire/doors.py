"""A listening socket that does not run its process out of descriptors.

    free descriptors     what happens to a connection
    more than a reserve  taken
    the reserve          taken, told that there is no room, and closed: that is for what the process opens itself
    none                 it waits with the system; accepting rests for a second

The kernel gives the lowest number that is free, so a connection's number says how many descriptors are in use,
and nothing need be counted. asyncio rests for a second by itself when `accept` finds no descriptor, but only after
it has tried, and complained, once for each connection that may wait (`backlog`): here the first complaint of a
rest is the only one, and it comes without a traceback.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import math
import resource
import socket
import time
from collections.abc import Iterable
from http import HTTPStatus
from typing import Any, Final

log = logging.getLogger("quire.doors")
RESERVE: Final = 64
REST_SECONDS: Final = 0.5
"""Below the second after which asyncio tries again."""
COMPLAIN_SECONDS: Final = 10.0
_NO_ROOM: Final = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


def reserve(limit: int) -> int:
    """How many of so many descriptors are not for connections."""
    return min(RESERVE, limit // 3)


def raise_limit() -> None:
    """Have as many descriptors as this user may: the usual soft limit is for programs that use `select`."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):  # what a system calls unlimited may be more than it gives
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def farewell(status: int, headers: Iterable[tuple[bytes, bytes]], body: bytes) -> bytes:
    """A whole answer in plain HTTP/1.1, for a connection whose request is not even read."""
    head = b"".join(name + b": " + value + b"\r\n" for name, value in headers)
    reason = HTTPStatus(status).phrase.encode()
    return b"HTTP/1.1 %d %s\r\n%sconnection: close\r\n\r\n%s" % (status, reason, head, body)


class Door(socket.socket):
    """Listens; `farewell` is what a connection is told for which there is no room."""

    farewell: bytes = b""
    refused = 0
    """Connections that were told so."""
    rests = 0
    """How often there was no descriptor at all."""
    _rests_until = -math.inf
    _said_at = -math.inf

    @classmethod
    def of(cls, listening: socket.socket, farewell: bytes = b"") -> Door:
        """The same socket as a door; the one given is closed."""
        door = cls(fileno=listening.detach())
        door.farewell = farewell
        return door

    def accept(self) -> tuple[socket.socket, Any]:
        """As that of every socket. Raises `BlockingIOError` also when nobody is to be let in now."""
        if time.monotonic() < self._rests_until:
            raise BlockingIOError(errno.EAGAIN, "no descriptor is free")
        try:
            taken, address = super().accept()
        except OSError as error:
            if error.errno in _NO_ROOM:
                self.rests += 1
                self._rests_until = time.monotonic() + REST_SECONDS
                self._say("no descriptor is free: connections wait")
            raise
        limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        if limit != resource.RLIM_INFINITY and taken.fileno() >= limit - reserve(limit):
            self._refuse(taken)
            raise BlockingIOError(errno.EAGAIN, "the reserve of descriptors is reached")
        return taken, address

    def _refuse(self, taken: socket.socket) -> None:
        self.refused += 1
        self._say("all descriptors for connections are in use: others are turned away")
        with contextlib.suppress(OSError), taken:
            taken.setblocking(False)
            if self.farewell:
                taken.send(self.farewell)
                taken.shutdown(socket.SHUT_WR)
                taken.recv(65536)  # what is not read would make the close a reset, which overtakes the words

    def _say(self, what: str) -> None:
        if time.monotonic() - self._said_at >= COMPLAIN_SECONDS:
            self._said_at = time.monotonic()
            log.warning("%s (%d turned away and %d rests so far)", what, self.refused, self.rests)


def keep_quiet(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """An exception handler of a loop: what a `Door` has said need not be said again."""
    error = context.get("exception")
    if isinstance(error, OSError) and error.errno in _NO_ROOM and "accept" in str(context.get("message")):
        return
    loop.default_exception_handler(context)


__all__ = ["Door", "farewell", "keep_quiet", "raise_limit", "reserve"]
