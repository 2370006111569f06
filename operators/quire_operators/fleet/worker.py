"""A process that works for the control plane and ends with it: no shim, no adoption, nothing to find again.

What it is to do is the first line of its standard input, which stays open: the process ends itself when that ends,
however the control plane ended. What it has to say are the lines of its standard output.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Mapping, Sequence

from quire_operators import child

MAX_LINE = 1024 * 1024
TAIL = 2000


class WorkerEnded(Exception):
    """The process ended other than it should; the message has the end of what it wrote to standard error."""


async def lines(argv: Sequence[str], env: Mapping[str, str], job: bytes) -> AsyncGenerator[bytes, None]:
    """Start a worker on `job` and give its lines. It is killed when the caller stops reading or is cancelled.

    Raises OSError when it cannot be started, `WorkerEnded` when it ended with another status than 0 or said a line
    that is too long.
    """
    async with child.running(argv, env, limit=MAX_LINE) as process:
        if process.stdin is None or process.stdout is None or process.stderr is None:
            raise OSError("a worker without pipes")
        errors = asyncio.create_task(_tail(process.stderr))
        with contextlib.suppress(ConnectionError):  # it ended at once: its status says why
            process.stdin.write(job + b"\n")
            await process.stdin.drain()
        try:
            while line := await process.stdout.readline():
                yield line
        except ValueError as error:
            raise WorkerEnded(f"said a line of more than {MAX_LINE} bytes") from error
        code = await process.wait()
        if code != 0:
            raise WorkerEnded(f"ended with status {code}: {(await errors)[-TAIL:].strip()}")


async def _tail(stream: asyncio.StreamReader) -> str:
    """The last of what a stream says; all of it is read, so that the writer never waits."""
    kept = b""
    while piece := await stream.read(65536):
        kept = (kept + piece)[-TAIL:]
    return kept.decode(errors="replace")
