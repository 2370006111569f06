"""One command of others, run to its end within bounds: of time, of what it may print, of the size of files that it
may write. What it started ends with it, whatever becomes of whoever waits for it.

Exceptions, besides `OSError` where it cannot be started:

    Exceeded        it was ended
    ├── TooLong     it took longer than it may
    └── TooMuch     it printed more than it may
"""

from __future__ import annotations

import asyncio
import contextlib
import resource
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from quire_operators import child

SAID_BYTES = 4096
"""Of what it says on stderr, kept from its beginning."""


class Exceeded(Exception):
    """It was ended, for it went beyond a bound."""


class TooLong(Exceeded):
    """It took longer than it may."""


class TooMuch(Exceeded):
    """It printed more than it may."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """What one command may take. `file_bytes` None: files as large as ours may be."""

    seconds: float
    out_bytes: int
    file_bytes: int | None = None


async def run(
    argv: Sequence[str], env: Mapping[str, str], cwd: Path, bounds: Bounds, given: bytes = b""
) -> tuple[int, bytes, bytes]:
    """Exit code, output, and the beginning of what it said on stderr. `given` is its input. Raises `Exceeded`,
    `OSError`."""
    stdin = asyncio.subprocess.PIPE if given else asyncio.subprocess.DEVNULL
    async with child.running(argv, env, cwd=cwd, stdin=stdin) as process:
        if bounds.file_bytes is not None:
            with contextlib.suppress(ProcessLookupError):  # it ended already
                resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (bounds.file_bytes, bounds.file_bytes))
        try:
            async with asyncio.timeout(bounds.seconds):
                _, out, said = await asyncio.gather(
                    _write(process.stdin, given),
                    _read(process.stdout, bounds.out_bytes, strict=True),
                    _read(process.stderr, SAID_BYTES),
                )
                code = await process.wait()
        except TimeoutError as error:
            raise TooLong(f"{argv[0]} took longer than {bounds.seconds:g} s") from error
    return code, out, said


async def _write(pipe: asyncio.StreamWriter | None, given: bytes) -> None:
    if pipe is None:
        return
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # its exit code says why it left
        pipe.write(given)
        await pipe.drain()
        pipe.close()


async def _read(pipe: asyncio.StreamReader | None, most: int, *, strict: bool = False) -> bytes:
    """What comes, up to `most` bytes; the rest is dropped, or with `strict` a `TooMuch`."""
    found = bytearray()
    while pipe is not None and (part := await pipe.read(65536)):
        if strict and len(found) + len(part) > most:
            raise TooMuch(f"it printed more than {most} bytes")
        found += part[: most - len(found)]
    return bytes(found)
