"""A child process with pipes, for as long as a block runs: after it neither the process nor a pipe is left.

asyncio counts a process as gone only when all of its pipes have ended, too. A pipe ends with the last process
that holds it, which may be one that left the process group, and not at all while more was said than anybody
reads. So at the end our side of the pipes is closed: nothing that a child does keeps us waiting. Neither the start
nor the end, which are short then, is broken off by a cancel; it counts after them. Who breaks off a start has
asyncio kill the process alone and wait for the pipes, and who breaks off an end leaves pipes to a loop that may be
closed before it sees them end.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncGenerator, Mapping, Sequence
from pathlib import Path
from typing import Any

LINE_BYTES = 65536


@contextlib.asynccontextmanager
async def running(
    argv: Sequence[str],
    env: Mapping[str, str],
    *,
    cwd: Path | None = None,
    stdin: int = PIPE,
    limit: int = LINE_BYTES,
) -> AsyncGenerator[Process, None]:
    """The process of `argv`, in a session of its own, with pipes for what it says; `limit` is the longest line
    that is read of it. Where it still runs at the end of the block it is killed with its process group. Raises
    OSError when it cannot be started.
    """
    process = await _started(
        asyncio.create_task(
            asyncio.create_subprocess_exec(
                *argv,
                stdin=stdin,
                stdout=PIPE,
                stderr=PIPE,
                env=dict(env),
                cwd=cwd,
                limit=limit,
                start_new_session=True,
            )
        )
    )
    try:
        yield process
    finally:
        await _end(process)


async def _started(starting: asyncio.Task[Process]) -> Process:
    cancelled = await _whole(starting)
    if cancelled is None:
        return starting.result()
    if starting.exception() is None:
        await _end(starting.result())
    raise cancelled


async def _end(process: Process) -> None:
    ending = asyncio.create_task(_kill_and_close(process))
    cancelled = await _whole(ending)
    ending.result()
    if cancelled is not None:
        raise cancelled


async def _whole(task: asyncio.Task[Any]) -> asyncio.CancelledError | None:
    """Wait until `task` is done; gives the cancel that came meanwhile."""
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait([task])
        except asyncio.CancelledError as error:
            cancelled = error
    return cancelled


async def _kill_and_close(process: Process) -> None:
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    if process.stdin is not None:
        pipe = process.stdin.transport
        if pipe.get_write_buffer_size() or not pipe.is_closing():
            pipe.abort()  # a close would wait until all is written
    process._transport.close()  # type: ignore[attr-defined]  # asyncio lets nobody else close what it reads
    await process.wait()
    await asyncio.sleep(0)  # the pipes are let go of in the loop's next turn
