"""The control plane's line into the router: a Unix socket that speaks `wire.ToRouter` and answers `RouterStatus`,
to `GetUsage` a `UsageReport`.

Every frame gets exactly one answer, after it took effect. Any number of connections may be open; tables are
absolute and versioned, so their order across connections does not matter.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Awaitable, Callable
from pathlib import Path

from quire.router.crew import Crew
from quire_schemas import wire

log = logging.getLogger("quire.router")
LOOK_SECONDS = 1.0
"""Between two looks whether the socket is where it was."""


async def _answers(path: Path) -> bool:
    """Whether somebody listens there."""
    try:
        _, writer = await asyncio.open_unix_connection(str(path))
    except (ConnectionRefusedError, FileNotFoundError):
        return False
    writer.close()
    return True


class ControlServer:
    """Listens on `path` (0600) until closed, or until a router that is to follow this one has taken the place.
    `finish(grace)` is called when the control plane ends the router.

    Two routers may be there for a while, and one that is killed may have taken the place shortly before: where
    nobody answers any more, the one that stays takes it again."""

    def __init__(
        self,
        crew: Crew,
        path: Path,
        base_url: str,
        finish: Callable[[float], None],
        usage: Callable[[wire.GetUsage], Awaitable[wire.UsageReport]],
    ) -> None:
        self._usage = usage
        self._crew = crew
        self._path = path
        self._base_url = base_url
        self._finish = finish
        self._server: asyncio.Server | None = None
        self._inode = -1
        self._keeping: asyncio.Task[None] | None = None
        self._talks: set[asyncio.Task[None]] = set()

    async def open(self) -> None:
        """Begin to listen. A socket file left by an earlier router is replaced."""
        await self._bind()
        self._keeping = asyncio.create_task(self._keep(), name="control socket")

    def leave(self) -> None:
        """The router ends: whoever takes the place now is to keep it."""
        if self._keeping is not None:
            self._keeping.cancel()

    async def _keep(self) -> None:
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            try:
                if self._path.exists() and (self._is_ours() or await _answers(self._path)):
                    continue
                log.warning("nobody answers at %s any more: this router takes it", self._path)
                await self._bind()
            except OSError as error:
                log.warning("cannot listen on %s: %s", self._path, error)

    def _is_ours(self) -> bool:
        return self._path.stat().st_ino == self._inode

    async def _bind(self) -> None:
        if self._server is not None:
            self._server.close()
        with contextlib.suppress(FileNotFoundError):
            self._path.unlink()
        mask = os.umask(0o177)
        try:
            self._server = await asyncio.start_unix_server(self._talk, path=self._path)
        finally:
            os.umask(mask)
        self._inode = self._path.stat().st_ino

    async def close(self) -> None:
        """Stop listening and end the conversations."""
        self.leave()
        if self._server is not None:
            self._server.close()
        for talk in self._talks:
            talk.cancel()
        if self._talks:
            await asyncio.wait(self._talks)
        with contextlib.suppress(FileNotFoundError):
            if self._is_ours():
                self._path.unlink()

    async def _talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        if task is not None:
            self._talks.add(task)
            task.add_done_callback(self._talks.discard)
        try:
            if not wire.is_same_user(writer.get_extra_info("socket")):
                log.warning("the control socket was opened by another user")
                return
            frames: wire.Reader[wire.ToRouter] = wire.Reader(reader, wire.ToRouter)
            while (message := await frames.read()) is not None:
                if isinstance(message, wire.GetUsage):
                    writer.write(wire.frame(await self._usage(message)))
                    await writer.drain()
                    continue
                if isinstance(message, wire.RoutingTable):
                    await self._crew.apply(message)
                elif isinstance(message, wire.SetLimits):
                    self._crew.set_limits(message)
                elif isinstance(message, wire.Finish):
                    log.info("told to finish within %g seconds", message.grace)
                    self._finish(message.grace)
                writer.write(wire.frame(self._crew.status(self._base_url)))
                await writer.drain()
        except (OSError, EOFError, wire.WireError) as error:
            log.warning("control connection ended: %s: %s", type(error).__name__, error)
        except asyncio.CancelledError:
            log.info("control connection ended: the router stops")
        finally:
            writer.close()
